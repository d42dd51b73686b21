"""How far a student's few steps lead away from its original's paths: what is trained on, and what judges.

The loss of a state z_i of step i is w_i ‖z' - z_{i+1}‖², z' being where the student's step leads from there. The error
of a path is that of the student's own steps from its noise: ‖x - z_N‖² of the image x that they end in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.distill.teacher_paths import Paths, StudentSteps
from ditmoe_cli.compression.training.exchange import ALONE, Exchange
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.model.dit import DiTMoE

_TINY = 1e-30


def step_errors(student: DiTMoE, steps: StudentSteps, z: Tensor, after: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """Return ‖z' - after‖² (n,) of steps of numbers `step` (n,) from states z (n, C, S, S), with gradients."""
    out = student(z, steps.times[step], labels).float()
    return (steps.advanced(z, out, step) - after).square().flatten(1).sum(dim=1)


@torch.no_grad()
def own_states(student: DiTMoE, steps: StudentSteps, noise: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """Return where the student's own steps lead from noise (n, C, S, S), before the steps of numbers `step` (n,).

    `step` is on the CPU, so that a GPU is not waited for.
    """
    z = noise.clone()
    for number in range(int(step.max()) if len(step) else 0):
        rows = (step > number).nonzero().flatten().to(z.device)
        here = torch.full_like(rows, number)
        z[rows] = steps.advanced(z[rows], student(z[rows], steps.times[here], labels[rows]).float(), here)
    return z


@dataclass(frozen=True)
class PathErrors:
    """Errors of a student's own paths: relative squared errors behind each of its steps, the images' last."""

    by_step: Sequence[float]

    @property
    def image(self) -> float:
        """That of the images."""
        return self.by_step[-1]


@torch.no_grad()
def path_errors(
    student: DiTMoE, steps: StudentSteps, paths: Paths, batch: FittingBatches, exchange: Exchange = ALONE
) -> PathErrors:
    """Return the errors of a student on paths, in batches; each process computes those of its share."""

    def errors(part: Paths) -> Tensor:
        path, labels = part.z.to(student.device), part.labels.to(student.device)
        z, found = path[:, 0], []
        for number in range(len(steps)):
            here = torch.full_like(labels, number)
            z = steps.advanced(z, student(z, steps.times[here], labels).float(), here)
            found.append((z - path[:, number + 1]).square().flatten(1).sum(dim=1))
        return torch.stack(found, dim=1)

    each = _of_all(errors, paths, batch, exchange)
    references = paths.z[:, 1:].double().square().flatten(2).sum(dim=2).sum(dim=0).clamp_min(_TINY)
    return PathErrors(exchange.agreed((each.sum(dim=0) / references).tolist()))


@torch.no_grad()
def mean_step_errors(
    student: DiTMoE, steps: StudentSteps, paths: Paths, batch: FittingBatches, exchange: Exchange = ALONE
) -> Tensor:
    """Return the mean ‖z' - z_{i+1}‖² (N,) of each step i from the states of paths, in batches, as `path_errors`."""

    def errors(part: Paths) -> Tensor:
        path, labels = part.z.to(student.device), part.labels.to(student.device)
        numbers = (torch.full_like(labels, number) for number in range(len(steps)))
        return torch.stack(
            [step_errors(student, steps, path[:, i], path[:, i + 1], labels, step) for i, step in enumerate(numbers)],
            dim=1,
        )

    return exchange.agreed(_of_all(errors, paths, batch, exchange).mean(dim=0))


def _of_all(errors: Callable[[Paths], Tensor], paths: Paths, batch: FittingBatches, exchange: Exchange) -> Tensor:
    """Return what `errors` returns of paths (P, N), in fp64 on the CPU, of all processes' shares."""
    mine = exchange.own(torch.arange(len(paths)))
    found = [part for _, part in batch.computed(lambda rows: errors(paths.at(mine[rows.start : rows.stop])), len(mine))]
    count = paths.z.shape[1] - 1
    return torch.stack(
        [exchange.gathered([part[:, number] for part in found], len(paths)) for number in range(count)], dim=1
    )
