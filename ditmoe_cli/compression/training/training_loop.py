"""The training loop: steps of fp32 weights, a rate that rises and falls, averaged weights, the best of them kept.

Per step k of K, with the gradients of a batch's mean loss, clipped to the norm `CLIP`:

    w <- w stepped (`weight_steps`), of rate  rate · lr(k),  lr(k) = min(1, (k + 1) / (W K)) · (1 + cos(π k / K)) / 2
    a <- a + (1 - d_k) (w - a),  d_k = min(d, (1 + k) / (10 + k))

Averaged weights a are judged on held-out states every few per cent of the steps; the best of them, or those before
training, are the result.

Which states make a batch depends on seed and step alone: each pass over all states has an order of its own. Each batch
is computed in parts where memory demands it, and by several processes where there are some, which changes its gradients
by rounding only.

A weight of n values takes 28 n bytes: itself, its gradient, two moments, the averaged values, the best ones, and during
a check those that training goes on with; temporaries of steps come for a moment in place of the last. Matrices have one
moment, so take 24 n. All but the first two are kept by one of several processes (`exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ditmoe_cli.compression.training.exchange import ALONE, Exchange
from ditmoe_cli.compression.training.side_by_side import side_by_side
from ditmoe_cli.compression.training.weight_steps import USUAL, Stepping, WeightSteps
from ditmoe_cli.errors import BadInputError, DitmoeError, is_out_of_memory
from ditmoe_cli.files.pacing import Pace
from ditmoe_cli.files.workfolder import Piece, WorkFolder
from ditmoe_cli.progress import phase

CLIP = 1.0
_KEPT = ("weight", "averaged", "best", "first", "second")  # of each weight there, but for second moments of matrices
_WARM_UP = 0.05  # of all steps
_AVERAGING = 0.99


@dataclass(frozen=True)
class Course:
    """How long and how fast is trained.

    Attributes:
        steps: K.
        batch: states of a step.
        rate: of steps, relative to the size of a weight.
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
        first, end = step * self.batch, (step + 1) * self.batch
        passes = range(first // states, (end - 1) // states + 1)
        orders = torch.cat([_order(self.seed, number, states) for number in passes])
        return orders[first - passes.start * states :][: self.batch]


@lru_cache(maxsize=2)
def _order(seed: int, number: int, states: int) -> Tensor:
    """Return the order (states,) of a pass over all states; not to be changed, since it is kept for the next step."""
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


CourseOf = Callable[[Mapping[str, Tensor], Objective], Course]
"""Takes weights and what they are to be trained towards, which it may time, and returns how to train them."""


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
        before, after: the errors on held-out states before training, and of the best weights.
        checks: all checks, in order.
    """

    before: float
    after: float
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Means:
    """By which means is trained.

    Attributes:
        work: keeps what going on takes, now and then; None where nothing does.
        note: takes lines for people.
        exchange: the processes that train together.
        subject: what is trained, for messages.
        piece: the name under which the work folder keeps that.
        workers: threads that a batch is divided over (`side_by_side`).
    """

    work: WorkFolder | None = None
    note: Callable[[str], None] = lambda _: None
    exchange: Exchange = ALONE
    subject: str = "the model"
    piece: str = "training"
    workers: int = 1


BARE = Means()


def train(
    weights: Mapping[str, Tensor],
    objective: Objective,
    course: Course,
    title: str,
    means: Means = BARE,
    stepping: Stepping = USUAL,
) -> Trained:
    """Train weights, by name, leaves that record gradients, and leave the best values in them.

    The best are those of least held-out error; where none has less than the values before training, these stand. What
    going on takes is kept now and then. Raises `BadInputError` where the error before training is not finite; where
    losses or errors cease to be, training ends there, which a note tells, and the best weights so far stand.
    """
    kept, work = _kept(means), means.work
    before = means.exchange.agreed(objective.judge()) if kept is None else float(kept.document["before"])
    if not math.isfinite(before):
        raise BadInputError(f"{means.subject}: its predictions before training are not finite; is it damaged?")
    run = _Run(weights, objective, course, means, before, stepping)
    if kept is not None:
        run.go_on(kept)
    pace = Pace()
    with phase(title, course.steps, "steps", start=run.step) as progress:
        while run.step < course.steps and run.advance():
            progress(1)
            if run.checks:
                progress.title = f"{title} (loss {run.checks[-1].loss:.3g}, held error {run.errors})"
            if work is not None and course.is_check(run.step) and means.exchange.agreed(pace.is_due):
                with pace.keeping():
                    work.write(means.piece, run.tensors(), run.document())
    run.put(run.best)
    return Trained(run.before, run.error, tuple(run.checks))


def _kept(means: Means) -> Piece | None:
    """Return what an earlier run has kept; all processes go on from it, or none does."""
    piece = means.work.read(means.piece) if means.work is not None else None
    if means.exchange.agreed(piece is not None) and piece is None:
        raise DitmoeError("what the first process keeps is not to be seen from this one; use a folder that they share")
    return piece


@dataclass
class _Run:
    """A run under way. Of several processes each keeps what there is to keep of its `own` weights."""

    weights: Mapping[str, Tensor]
    objective: Objective
    course: Course
    means: Means
    before: float
    stepping: Stepping
    step: int = 0
    checks: list[Check] = field(default_factory=list)
    losses: float = 0.0
    part: int = 0

    def __post_init__(self) -> None:
        self.error, self.part = self.before, self.course.part
        self.owners = self.means.exchange.owners(self.weights)
        rank = self.means.exchange.share.rank
        self.own = {name: weight for name, weight in self.weights.items() if self.owners[name] == rank}
        self.steps = WeightSteps(self.own, self.stepping, self.means.workers)
        self.averaged = {name: weight.detach().clone() for name, weight in self.own.items()}
        self.best = {name: weight.detach().clone() for name, weight in self.own.items()}

    def go_on(self, kept: Piece) -> None:
        """Take up what an earlier run has kept."""
        document = kept.document
        self.step, self.error = document["step"], document["error"]
        self.losses, self.part = document["losses"], document["part"]
        self.checks = [Check(**check) for check in document["checks"]]
        device = next(iter(self.weights.values())).device
        values: dict[str, dict[str, Tensor]] = {of: {} for of in _KEPT}
        for name in kept.names:
            of, _, weight = name.partition(".")
            if weight in self.own:
                values[of][weight] = kept.tensor(name).to(device)
        self.put(values["weight"])
        self.averaged, self.best = values["averaged"], values["best"]
        self.steps.go_on(self.step, values)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that going on takes, in the first process."""
        own = {"weight": self.own, "averaged": self.averaged, "best": self.best, **self.steps.moments()}
        found: dict[str, Tensor] = {}
        for of, tensors in own.items():
            like = {name: weight for name, weight in self.weights.items() if of != "second" or self._has_second(name)}
            collected = self.means.exchange.collected(tensors, like, self.owners)
            found |= {f"{of}.{name}": tensor for name, tensor in collected.items()}
        return found

    def _has_second(self, name: str) -> bool:
        return not self.stepping.matrices.get(name)

    def document(self) -> dict[str, Any]:
        """Return all numbers that going on takes."""
        checks = [vars(check) for check in self.checks]
        names = ("step", "before", "error", "losses", "part")
        return {**{name: getattr(self, name) for name in names}, "checks": checks}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the weights other values, of which each process has those of its own."""
        with torch.no_grad():
            for name, weight in self.own.items():
                weight.copy_(values[name])
        self.means.exchange.hand_out(self.weights, self.owners)

    def advance(self) -> bool:
        """Take a step, and check behind it where that is due; return whether values are still finite."""
        loss, norm = self._gradients()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.steps.step(self.course.rate * self.course.factor(self.step))
            self._average()
            self.means.exchange.hand_out(self.weights, self.owners)
            self.losses += loss
        self.step += 1
        if finite and self.course.is_check(self.step):
            finite = self._check()
        if not finite:
            self.means.note(f"warning: values ceased to be finite at step {self.step}: training ends there")
        return finite

    def _gradients(self) -> tuple[float, float]:
        """Set the clipped gradients of this step; return its loss, and the norm of its gradients before."""
        rows = self.course.rows(self.step, self.objective.states)
        loss, self.part = accumulate(self.weights, self.objective.losses, rows, self.part, self.means)
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), CLIP, foreach=True)
        both = torch.stack((loss, norm)).tolist()  # in one wait for the device
        return self.means.exchange.agreed((both[0], both[1]))

    @property
    def errors(self) -> str:
        """The held-out errors before and of the best weights so far, for reading."""
        return f"{self.before:.3g} -> {self.error:.3g}"

    def _average(self) -> None:
        decay = min(_AVERAGING, (1 + self.step) / (10 + self.step))
        if self.own:
            values = [weight.detach() for weight in self.own.values()]
            torch._foreach_lerp_([self.averaged[name] for name in self.own], values, 1 - decay)

    def _check(self) -> bool:
        """Judge the averaged weights, keep them where they are the best; return whether they are finite."""
        current = {name: weight.detach().clone() for name, weight in self.own.items()}
        self.put(self.averaged)
        error = self.means.exchange.agreed(self.objective.judge())
        if error < self.error:
            self.error = error
            for name, weight in self.own.items():
                self.best[name].copy_(weight.detach())
        self.put(current)
        since = self.step - (self.checks[-1].step if self.checks else 0)
        self.checks.append(Check(self.step, self.losses / since, error))
        self.losses = 0.0
        return math.isfinite(error)


def accumulate(
    weights: Mapping[str, Tensor],
    losses: Callable[[Tensor], Tensor],
    rows: Tensor,
    part: int = 0,
    means: Means = BARE,
) -> tuple[Tensor, int]:
    """Set the gradients of weights to those of the mean of ``losses(rows)``, computed `part` rows at a time, 0 for all.

    Each process computes those of its share of the rows, and all have their sum. Where memory runs out the part is
    halved, which a note tells. Returns the mean, and the part that memory sufficed for. Raises the error of memory that
    does not suffice for one row.
    """
    own = means.exchange.own(rows)
    while True:
        for weight in weights.values():
            weight.grad = None
        try:
            total = _accumulated(weights, losses, own, part or len(rows), len(rows), means.workers)
            gradients = [_gradient(weight) for weight in weights.values()]
            break
        except (MemoryError, RuntimeError) as error:
            size = min(part or len(own), len(own))
            if not is_out_of_memory(error) or size <= 1:
                raise
        part = (size + 1) // 2
        means.note(f"out of memory with {size} states at once: going on with {part}, to the same gradients")
    total = total.to(gradients[0].device)
    means.exchange.add_up([*gradients, total])
    return total, part


def _accumulated(
    weights: Mapping[str, Tensor],
    losses: Callable[[Tensor], Tensor],
    rows: Tensor,
    part: int,
    count: int,
    workers: int,
) -> Tensor:
    """Add the gradients of Σ ``losses(rows)`` / `count`, and return it."""
    total, leaves = torch.zeros(()), list(weights.values())

    def summed(some: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        loss = losses(some).sum() / count
        return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)

    for some in torch.split(rows, part) if len(rows) else ():
        if workers == 1:
            loss = losses(some).sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
            total = total.to(loss.device) + loss.detach()
            continue
        for one, gradients in side_by_side(summed, torch.chunk(some, workers)):
            total = total + one
            for weight, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return total


def _gradient(weight: Tensor) -> Tensor:
    """Return a weight's gradient, zeros where no loss depended on it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
