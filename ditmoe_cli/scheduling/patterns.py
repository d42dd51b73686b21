"""What blocks may do over a bin of steps: compute in every n-th evaluation, take from before in others. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ditmoe_cli.model.block_choices import FOLLOW, FULL, BlockChoice, parse_choice

PERIODS = (2, 3, 4, 5)
"""Every how many evaluations something is computed that is reused or extrapolated in between."""
LONG_PERIODS = (8, 16)
"""The same, for blocks that are reused as a whole: ways of hundreds of steps hardly move in some of them."""
FOLLOWED_PERIODS = (2, 3, 4, 5, 6, 8, 12, 16, 24)
"""Every how many evaluations the model is asked where its predictions follow the state in between."""
MOST_ROWS = 64
"""Images of all branches and choices that are replayed together."""
REUSED_AGES = (1, 2, 4, 8, 15)
"""Ages at which reuse is measured; between them errors are interpolated."""
TAKEN = ("reuse", "reuse-attention", "reuse-mixture", "forecast", "forecast-attention", "forecast-mixture")
SLOTS = "reuse-slots"


@dataclass(frozen=True)
class Pattern:
    """`computed` in every `period`-th evaluation, and `between` in all others.

    Evaluations are counted from the beginning of the way, so that bins of one pattern go on with it.
    """

    computed: BlockChoice
    between: BlockChoice = FULL
    period: int = 1

    @property
    def text(self) -> str:
        """The pattern as a text, as ``reuse/3`` or ``top1``."""
        return self.computed.text if self.period == 1 else f"{self.between.text}/{self.period}"

    def age(self, evaluation: int) -> int:
        """Return how many evaluations ago what an evaluation takes was computed; 0 where it is computed."""
        return evaluation % self.period

    def at(self, evaluation: int) -> BlockChoice:
        """Return what an evaluation does."""
        return self.between if self.age(evaluation) else self.computed


ALWAYS_FULL = Pattern(FULL)
JOINT = ("reuse", "forecast", "forecast-mixture")
"""What all blocks of a bin may do alike, which is replayed together."""


def periodic_patterns() -> list[Pattern]:
    """Return the patterns that take outputs from before."""
    found = [Pattern(FULL, parse_choice(text), n) for text in TAKEN for n in _periods_of(text)]
    return [*found, *(Pattern(FULL, parse_choice(SLOTS), n) for n in PERIODS[:2])]


def joint_patterns() -> list[Pattern]:
    """Return the patterns that all blocks of a bin may have alike."""
    return [Pattern(FULL, parse_choice(text), n) for text in JOINT for n in _periods_of(text)]


def following_patterns() -> list[Pattern]:
    """Return the patterns of all blocks in which the model is not asked in between."""
    return [Pattern(FULL, FOLLOW, n) for n in FOLLOWED_PERIODS]


def _periods_of(text: str) -> tuple[int, ...]:
    return (*PERIODS, *LONG_PERIODS) if text == "reuse" else PERIODS


@dataclass(frozen=True)
class Probe:
    """A choice that is replayed in one evaluation.

    Attributes:
        choice: what the block does there.
        age: how many evaluations ago it computed what it takes; 0 where it takes nothing.
        spacing: how many evaluations before that it computed last, for forecasts.
    """

    choice: BlockChoice
    age: int = 0
    spacing: int = 1


def probes_of(pattern: Pattern) -> list[Probe]:
    """Return the probes from which the error of a pattern over a bin follows."""
    if pattern.period == 1:
        return [Probe(pattern.computed)]
    ages = range(1, pattern.period)
    if pattern.between.text.startswith("forecast"):
        return [Probe(pattern.between, age, pattern.period) for age in ages]
    if pattern.between.text == SLOTS:
        return [Probe(pattern.between, age) for age in ages]
    return [Probe(pattern.between, age) for age in REUSED_AGES if age <= max(ages)]


def error_over(pattern: Pattern, evaluations: range, errors: dict[Probe, float]) -> float:
    """Return the sum of the errors of all evaluations of a bin, by those of the probes.

    What is left out in each of N evaluations errs one way in all of them, so that errors themselves add up, not their
    squares: N² times that of one.
    """
    if pattern.period == 1:
        return len(evaluations) ** 2 * errors[Probe(pattern.computed)]
    return sum(_error_at(pattern, pattern.age(k), errors) for k in evaluations if pattern.age(k))


def _error_at(pattern: Pattern, age: int, errors: dict[Probe, float]) -> float:
    """Return the error at an age: measured, or of reuse between two measured ages on a line of error over age."""
    forecast = pattern.between.text.startswith("forecast")
    exact = errors.get(Probe(pattern.between, age, pattern.period if forecast else 1))
    if exact is not None:
        return exact
    known = {probe.age: error for probe, error in errors.items() if probe.choice == pattern.between}
    below, above = max(a for a in known if a < age), min((a for a in known if a > age), default=None)
    if above is None:
        return known[below] * (age / below) ** 2
    return known[below] + (known[above] - known[below]) * (age - below) / (above - below)
