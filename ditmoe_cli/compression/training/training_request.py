"""What is asked of training a checkpoint towards another's predictions. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from ditmoe_cli.compression.planner import label_of
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.errors import UsageError

Codes = Literal["fixed", "learn"]
CODES: tuple[Codes, ...] = ("fixed", "learn")
DEFAULT_MINUTES, DEFAULT_BATCH = 10.0, 128
LOW_RANK = "lora:"
_MOST_ITERATIONS, _MOST_BATCH = 10**9 - 1, 2**20


@dataclass(frozen=True)
class Clock:
    """What the clock chose for a training of some minutes.

    Attributes:
        count: images or paths of the original.
        trainings: for each training, by its name, steps, checks, and states at once (0 for all of a batch).
    """

    count: int
    trainings: Mapping[str, tuple[int, int, int]]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The same in a row, as histories keep it."""
        return (self.count, *(number for chosen in self.trainings.values() for number in chosen))


def open_clock(trainings: int) -> tuple[int, ...]:
    """Return zeros in place of what the clock is yet to choose for some trainings, as many as `Clock.numbers`."""
    return (0,) * (1 + 3 * trainings)


def parse_clock(numbers: Sequence[int], names: Sequence[str]) -> Clock:
    """Return what the clock chose for trainings of these names. Raises `UsageError` for numbers that fit none."""
    expected = len(open_clock(len(names)))
    if len(numbers) != expected or not all(0 <= number <= _MOST_ITERATIONS for number in numbers):
        raise UsageError(
            f"⟨clock⟩ {','.join(map(str, numbers))[:80]}: give {expected} whole numbers, as a recipe has them"
        )
    count, *rest = numbers
    chosen = dict(zip(names, zip(rest[::3], rest[1::3], rest[2::3], strict=True), strict=True))
    if any(steps and not checks for steps, checks, _ in chosen.values()) or not any(rest[::3]):
        raise UsageError(f"⟨clock⟩ {','.join(map(str, numbers))}: no steps, or steps without a check")
    return Clock(count, chosen)


@dataclass(frozen=True)
class TrainingRequest:
    """A request to train a checkpoint.

    Attributes:
        original: fingerprint of the checkpoint that it is trained towards.
        minutes: how long to train; None where `iterations` say so.
        iterations: steps of training.
        train: groups of weights to train (`trained_groups.GROUPS`), or ``lora:R`` alone: all, matrices by updates of
            rank R.
        codes: of quantised weights: ``fixed``, or ``learn`` for those of integer formats.
        batch: states of a step.
        rate: learning rate, relative to the size of weights; None for `usual_rate`.
        seed: of noise and orders.
        clock: numbers that the clock chose in an earlier run of so many minutes, as its history has them (`Clock`);
            None where it chooses anew. They are no part of what is asked for, and of no digest.
    """

    original: str
    minutes: float | None = DEFAULT_MINUTES
    iterations: int | None = None
    train: tuple[str, ...] = GROUPS
    codes: Codes = "fixed"
    batch: int = DEFAULT_BATCH
    rate: float | None = None
    seed: int = 0
    clock: tuple[int, ...] | None = None

    command: ClassVar[str] = "train"
    length: ClassVar[str] = "iterations"  # what the setting of `iterations` is called
    usual_rate: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.iterations is None):
            raise UsageError(f"give ⟨minutes⟩, as 10, or ⟨{self.length}⟩, as 2000, and not both")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"⟨minutes⟩ {self.minutes:g}: give a time above 0")
        if self.iterations is not None and self.iterations < 1:
            raise UsageError(f"⟨{self.length}⟩ {self.iterations}: give at least 1")
        if self.iterations is not None and self.iterations > _MOST_ITERATIONS:
            raise UsageError(f"⟨{self.length}⟩ {self.iterations}: give at most {_MOST_ITERATIONS:,}")
        if not 1 <= self.batch <= _MOST_BATCH:
            raise UsageError(f"⟨batch⟩ {self.batch}: give 1 to {_MOST_BATCH:,} states")
        if self.rate is not None and not 0 < self.rate < 1:
            raise UsageError(f"⟨rate⟩ {self.rate:g}: give a share of a weight's size, above 0 and below 1, as 0.01")
        if self.clock is not None and self.minutes is None:
            raise UsageError(f"⟨clock⟩ has no effect with ⟨{self.length}⟩, which leave the clock nothing to choose")
        self._check_train()

    def _check_train(self) -> None:
        """Raise `UsageError` for what cannot be trained."""
        low_rank = [name for name in self.train if name.startswith(LOW_RANK)]
        if low_rank and len(self.train) > 1:
            raise UsageError(
                f"⟨train⟩ {','.join(self.train)}: {low_rank[0]} stands alone; it trains matrices by updates of low "
                "rank, and all other weights as they are"
            )
        if low_rank and not (low_rank[0][len(LOW_RANK) :].isdecimal() and self.rank):
            raise UsageError(f"⟨train⟩ {low_rank[0]}: give a rank of 1 or more, as {LOW_RANK}8")
        unknown = [name for name in self.train if name not in GROUPS and not low_rank]
        if unknown or not self.train:
            raise UsageError(f"⟨train⟩ {','.join(unknown)}: choose from all, {', '.join(GROUPS)}, or {LOW_RANK}R")

    @property
    def rank(self) -> int | None:
        """The rank of updates; None where weights are trained as they are."""
        return int(self.train[0][len(LOW_RANK) :]) if self.train and self.train[0].startswith(LOW_RANK) else None

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of weights that are trained, whole or by updates."""
        return self.train if self.rank is None else GROUPS

    @property
    def name(self) -> str:
        """The command, as part of a name."""
        return self.command

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        length = f"{self.minutes:g}min" if self.minutes is not None else f"{self.iterations}{self.length}"
        groups = "" if set(self.train) == set(GROUPS) else "+".join(self.train).replace(":", "")
        batch = self.batch != DEFAULT_BATCH and f"batch{self.batch}"
        rate = self.rate is not None and f"rate{self.rate:g}"
        seed = f"seed{self.seed}" if self.seed else ""
        codes = self.codes == "learn" and "codes"
        return label_of(f"{self.name}-{length}", self.own_label(), groups, codes, batch, rate, seed)

    def no_clock(self, trainings: int) -> tuple[int, ...]:
        """Return zeros in place of what the clock is yet to choose for some trainings; nothing without minutes."""
        return open_clock(trainings) if self.minutes is not None else ()

    def own_label(self) -> str:
        """Return the part of `label` that other settings of a command make."""
        return ""

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for histories; defaults are left out."""
        found = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("original", "train", "clock") or value is None or value == each.default:
                continue
            found[self.length if each.name == "iterations" else each.name] = value
        groups = {} if set(self.train) == set(GROUPS) else {"train": ",".join(self.train)}
        return {"original": self.original, **found, **groups}

    def defaults(self) -> dict[str, Any]:
        """Return the options that `options` leaves out, at the values that they have, by name; no switches."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {"train": ",".join(self.train), "rate": self.rate or self.usual_rate}
        left = values.keys() - {"original", "iterations", "guide", "clock", *self.options()}
        return {name: values[name] for name in sorted(left) if values[name] is not None and values[name] is not False}
