"""The training loop: AdamW on fp32 weights, a rate that rises and falls, averaged weights, the best of them kept.

Per step k of K, with the gradients of a batch's mean loss, clipped to the norm `CLIP`:

    w <- AdamW(w),  of rate  rate · size(w) · lr(k),  lr(k) = min(1, (k + 1) / (W K)) · (1 + cos(π k / K)) / 2
    a <- a + (1 - d_k) (w - a),  d_k = min(d, (1 + k) / (10 + k))

The rate is relative to the size of what it changes: size(w) is the root mean square of a weight before training,
rounded to a power of two, at least `LEAST_SIZE`; so one rate suits models of all widths. Averaged weights a are judged
on held-out states every few per cent of the steps; the best of them, or those before training, are the result.

Which states make a batch depends on seed and step alone: each pass over all states has an order of its own. Each batch
is computed in parts where memory demands it, which changes its gradients by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditmoe_cli.errors import BadInputError, is_out_of_memory
from ditmoe_cli.files.pacing import Pace
from ditmoe_cli.files.workfolder import Piece, WorkFolder
from ditmoe_cli.progress import phase

CLIP = 1.0
LEAST_SIZE = 2.0**-10
_WARM_UP = 0.05  # of all steps
_BETAS = (0.9, 0.99)
_AVERAGING = 0.99
_PIECE = "training"  # of the work folder


@dataclass(frozen=True)
class Course:
    """How long and how fast is trained.

    Attributes:
        steps: K.
        batch: states of a step.
        rate: rate of AdamW, relative to the size of a weight.
        seed: of the order of states.
        checks: how often averaged weights are judged, beside before training.
        part: states that are computed at once; 0 for all of a batch.
    """

    steps: int
    batch: int = 128
    rate: float = 0.01
    seed: int = 0
    checks: int = 25
    part: int = 0

    def is_check(self, done: int) -> bool:
        """Return whether averaged weights are judged behind so many steps: evenly spaced, and at the end."""
        return done * self.checks // self.steps > (done - 1) * self.checks // self.steps

    def factor(self, step: int) -> float:
        """Return lr(k)."""
        rising = min(1.0, (step + 1) / max(_WARM_UP * self.steps, 1.0))
        return rising * (1 + math.cos(math.pi * step / self.steps)) / 2

    def rows(self, step: int, states: int) -> Tensor:
        """Return the states of a step: `batch` of them, from passes over all `states` in orders of their own."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)
        passes = places // states
        orders = {n: _order(self.seed, n, states) for n in set(passes.tolist())}
        return torch.stack(
            [orders[n][place] for n, place in zip(passes.tolist(), (places % states).tolist(), strict=True)]
        )


def _order(seed: int, number: int, states: int) -> Tensor:
    return torch.randperm(states, generator=torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63))


@dataclass(frozen=True)
class Objective:
    """What is trained towards.

    Attributes:
        states: how many there are.
        losses: returns the losses (n,) of some states, by their rows, with gradients.
        judge: returns the error on held-out states, of the weights as they are.
    """

    states: int
    losses: Callable[[Tensor], Tensor]
    judge: Callable[[], float]


@dataclass(frozen=True)
class Check:
    """A check: steps done, the mean loss since the last check, the error of averaged weights."""

    step: int
    loss: float
    error: float


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        best: the best weights, by name; those before training where none was better.
        before, after: the errors on held-out states before training, and of the best weights.
        checks: all checks, in order.
    """

    best: Mapping[str, Tensor]
    before: float
    after: float
    checks: tuple[Check, ...]


def train(
    weights: Mapping[str, Tensor],
    objective: Objective,
    course: Course,
    title: str,
    work: WorkFolder | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train weights, by name, leaves that record gradients, and leave the best values in them.

    What going on takes is kept in `work` now and then. Raises `BadInputError` where the loss before training is not
    finite; where it ceases to be, training ends there, which `note` tells, and the best weights so far stand.
    """
    run = _Run(weights, objective, course, note)
    run.go_on(work.read(_PIECE) if work is not None else None)
    pace = Pace()
    with phase(title, course.steps, "steps", start=run.step) as progress:
        while run.step < course.steps and run.advance():
            progress(1)
            if work is not None and course.is_check(run.step) and pace.is_due:
                with pace.keeping():
                    work.write(_PIECE, run.tensors(), run.document())
    run.put(run.best)
    return Trained(run.best, run.before, run.error, tuple(run.checks))


@dataclass
class _Run:
    """A run under way."""

    weights: Mapping[str, Tensor]
    objective: Objective
    course: Course
    note: Callable[[str], None]
    step: int = 0
    checks: list[Check] = field(default_factory=list)
    losses: float = 0.0
    part: int = 0

    def __post_init__(self) -> None:
        self.part = self.course.part
        self.optimizer = torch.optim.AdamW(_groups(self.weights), betas=_BETAS, weight_decay=0.0, foreach=True)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.averaged = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def go_on(self, kept: Piece | None) -> None:
        """Take up what an earlier run has kept; without that judge the weights as they are."""
        if kept is None:
            self.before = self.error = self.objective.judge()
            if not math.isfinite(self.before):
                raise BadInputError("the predictions before training are not finite; is the checkpoint damaged?")
            return
        document = kept.document
        self.step, self.before, self.error = document["step"], document["before"], document["error"]
        self.losses, self.part = document["losses"], document["part"]
        self.checks = [Check(**check) for check in document["checks"]]
        device = next(iter(self.weights.values())).device
        values = {name: kept.tensor(name).to(device) for name in kept.names}
        self.put({name: values[f"weight.{name}"] for name in self.weights})
        for name, weight in self.weights.items():
            self.averaged[name], self.best[name] = values[f"averaged.{name}"], values[f"best.{name}"]
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": values[f"first.{name}"],
                "exp_avg_sq": values[f"second.{name}"],
            }

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that going on takes."""
        found: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            found |= {f"weight.{name}": weight.detach(), f"averaged.{name}": self.averaged[name]}
            found |= {f"best.{name}": self.best[name]}
            found |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def document(self) -> dict[str, Any]:
        """Return all numbers that going on takes."""
        checks = [vars(check) for check in self.checks]
        names = ("step", "before", "error", "losses", "part")
        return {**{name: getattr(self, name) for name in names}, "checks": checks}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the weights other values."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(values[name])

    def advance(self) -> bool:
        """Take a step, and check behind it where that is due; return whether values are still finite."""
        loss = self._gradients(self.course.rows(self.step, self.objective.states))
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), CLIP, foreach=True)
        finite = math.isfinite(loss) and math.isfinite(float(norm))
        if finite:
            factor = self.course.rate * self.course.factor(self.step)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.step()
            self._average()
            self.losses += loss
        self.step += 1
        if finite and self.course.is_check(self.step):
            finite = self._check()
        if not finite:
            self.note(f"warning: values ceased to be finite at step {self.step}: training ends there")
        return finite

    def _gradients(self, rows: Tensor) -> float:
        """Set the gradients of the mean loss of some states, and return it; in smaller parts where memory runs out."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            total = torch.zeros(())
            try:
                for part in torch.split(rows, self.part or len(rows)):
                    loss = self.objective.losses(part).sum() / len(rows)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total = total.to(loss.device) + loss.detach()
                for weight in self.weights.values():
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                return float(total)
            except (MemoryError, RuntimeError) as error:
                size = self.part or len(rows)
                if not is_out_of_memory(error) or size == 1:
                    raise
            self.part = (size + 1) // 2
            self.note(f"out of memory with {size} states at once: going on with {self.part}, to the same gradients")

    def _average(self) -> None:
        decay = min(_AVERAGING, (1 + self.step) / (10 + self.step))
        names = list(self.weights)
        torch._foreach_lerp_(
            [self.averaged[name] for name in names], [self.weights[name].detach() for name in names], 1 - decay
        )

    def _check(self) -> bool:
        """Judge the averaged weights, keep them where they are the best; return whether they are finite."""
        current = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.put(self.averaged)
        error = self.objective.judge()
        if error < self.error:
            self.error = error
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.put(current)
        since = self.step - (self.checks[-1].step if self.checks else 0)
        self.checks.append(Check(self.step, self.losses / since, error))
        self.losses = 0.0
        return math.isfinite(error)


def _groups(weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return weights in groups of one size each, whose learning rate that is."""
    groups: dict[float, list[Tensor]] = {}
    for weight in weights.values():
        size = max(float(weight.detach().float().square().mean().sqrt()), LEAST_SIZE)
        groups.setdefault(2.0 ** round(math.log2(size)), []).append(weight)
    return [{"params": members, "lr": size} for size, members in sorted(groups.items())]
