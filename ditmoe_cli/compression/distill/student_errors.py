"""How far a student's few steps lead away from its original's paths: what is trained on, and what judges.

The loss of a state z_i of step i is w_i ‖z' - z_{i+1}‖², z' being where the student's step leads from there. A path is
judged by the student's own steps from its noise: by ‖x - z_N‖² of the image x that they end in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.distill.teacher_paths import Paths, StudentSteps
from ditmoe_cli.compression.training.exchange import ALONE, Exchange
from ditmoe_cli.model.dit import DiTMoE

_TINY = 1e-30


def step_errors(student: DiTMoE, steps: StudentSteps, z: Tensor, after: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """Return ‖z' - after‖² (n,) of steps of numbers `step` (n,) from states z (n, C, S, S), with gradients."""
    out = student(z, steps.times[step], labels).float()
    return (steps.advanced(z, out, step) - after).square().flatten(1).sum(dim=1)


@torch.no_grad()
def own_states(student: DiTMoE, steps: StudentSteps, noise: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """Return where the student's own steps lead from noise (n, C, S, S), before the steps of numbers `step` (n,)."""
    z = noise.clone()
    for number in range(int(step.max())):
        rows = (step > number).nonzero().flatten()
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
    student: DiTMoE, steps: StudentSteps, paths: Paths, batch: int, exchange: Exchange = ALONE
) -> PathErrors:
    """Return the errors of a student on paths, `batch` at a time; each process computes those of its share."""
    device, found = student.device, []
    for rows in exchange.parts(torch.arange(len(paths)), batch):
        part = paths.at(rows)
        path, labels = part.z.to(device), part.labels.to(device)
        z, errors = path[:, 0], []
        for number in range(len(steps)):
            here = torch.full_like(labels, number)
            z = steps.advanced(z, student(z, steps.times[here], labels).float(), here)
            errors.append((z - path[:, number + 1]).square().flatten(1).sum(dim=1))
        found.append(torch.stack(errors, dim=1))
    each = [exchange.gathered([part[:, number] for part in found], len(paths)) for number in range(len(steps))]
    references = paths.z[:, 1:].double().square().flatten(2).sum(dim=2).sum(dim=0).clamp_min(_TINY)
    return PathErrors(exchange.agreed((torch.stack(each).sum(dim=1) / references).tolist()))
