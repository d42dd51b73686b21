"""The choice of a pattern for each block, step bin and branch under a budget of operations. Torch-free.

With e the error of a pattern and f its operations an image, and A_b what an error in bin b makes of the final images,

    minimise Σ A_b e   subject to   Σ f <= F.

It is the program that plans formats (`compression/precision/program.py`), operations in place of bytes. What a branch
does in a bin is one group. Its options are those where all blocks do alike, whose error was replayed together, and
those where each block has a pattern of its own: the best ones at one price of operations each, for a ladder of prices,
whose errors add up. The null class may also be predicted in every n-th evaluation, or not at all. Where the model may
also not be asked, and its predictions follow the state, what both branches do in a bin is one group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ditmoe_cli.compression.precision.lagrange import Group, Option
from ditmoe_cli.compression.precision.program import solve
from ditmoe_cli.model.block_choices import FOLLOW, FULL, BlockChoice, NullChoice
from ditmoe_cli.scheduling.patterns import ALWAYS_FULL, Pattern

_PRICES = 48


@dataclass(frozen=True)
class Priced:
    """A pattern over a bin: the sum of its errors in the bin, and its operations an image."""

    pattern: Pattern
    error: float
    flops: float


@dataclass(frozen=True)
class NullPattern:
    """The null class over a bin: predicted in every `period`-th evaluation, and `between` in others.

    A period of 0 is never.
    """

    period: int = 1
    between: NullChoice = "reuse"

    def at(self, number: int) -> NullChoice:
        """Return what becomes of a prediction of the null class, counted from the beginning of the way."""
        return "compute" if self.period and number % self.period == 0 else self.between


@dataclass(frozen=True)
class PricedNull:
    """A pattern of the null class: the sum of its errors in the bin, and how often it is predicted."""

    pattern: NullPattern
    error: float
    predicted: int


@dataclass(frozen=True)
class BranchOptions:
    """What a branch may do in a bin: the patterns of each block, and those that all blocks may have alike."""

    blocks: Sequence[Sequence[Priced]]
    alike: Sequence[Priced] = ()


@dataclass(frozen=True)
class NullOptions:
    """What the null class may do in a bin.

    Attributes:
        branch: what its blocks do where it is always predicted.
        patterns: where it is not.
        full: operations of one prediction.
        fixed: those of them that no pattern of blocks saves.
        evaluations: how often it is predicted where nothing is saved.
    """

    branch: BranchOptions
    patterns: Sequence[PricedNull]
    full: float
    fixed: float
    evaluations: int


@dataclass(frozen=True)
class BinOptions:
    """What there is to choose in a bin.

    Attributes:
        conditional: of the conditional branch.
        null: of the null class, if that guides.
        ends: operations of the conditional branch that no pattern of blocks saves.
        followed: patterns in which the model is not asked at times, with the operations of all branches.
    """

    conditional: BranchOptions
    null: NullOptions | None = None
    ends: float = 0.0
    followed: Sequence[Priced] = ()


@dataclass(frozen=True)
class ChosenBin:
    """The patterns of a bin: of each block, of each block in the null branch, and of the null class."""

    conditional: tuple[Pattern, ...]
    null: tuple[Pattern, ...] = ()
    null_class: NullPattern = NullPattern()


@dataclass(frozen=True)
class ChosenBins:
    """A choice for all bins.

    Attributes:
        bins: the patterns.
        errors: of each bin, without amplification.
        predicted: the sum of all errors, amplified, to the exponent.
        flops: operations an image that can be chosen.
        gap: how far from the optimum the choice may be, relative to `predicted`.
    """

    bins: tuple[ChosenBin, ...]
    errors: tuple[float, ...]
    predicted: float
    flops: float
    gap: float


@dataclass(frozen=True)
class _Combination:
    """What a branch does in a bin, or both do: the patterns of their blocks, and of the null class."""

    error: float
    flops: float
    conditional: tuple[Pattern, ...] = ()
    null: tuple[Pattern, ...] = ()
    null_class: NullPattern = NullPattern()

    def beside(self, null: _Combination) -> _Combination:
        """Return what both branches do, this one being the conditional one."""
        error, flops = self.error + null.error, self.flops + null.flops
        return _Combination(error, flops, self.conditional, null.null, null.null_class)


def least_flops(bins: Sequence[BinOptions]) -> float:
    """Return the fewest operations an image that can be chosen."""
    return sum(min(each.flops for each in offered) for options in bins for offered in _offered(options))


def chosen_bins(
    bins: Sequence[BinOptions], amplification: Sequence[float], budget: float, exponent: float = 1.0
) -> ChosenBins:
    """Return the choice of least predicted error within a budget of operations.

    With an `exponent` q below 1, Σ (A_b e)^q is minimised: errors of steps that point one way add up themselves, that
    is q = 1/2, and not their squares. Raises `InfeasibleError` where none fits, as `solve` does.
    """
    offers = [_offered(options) for options in bins]
    groups = [
        Group(
            f"bin {b}, branch {branch}",
            tuple(
                Option(str(n), math.ceil(each.flops), (factor * each.error) ** exponent)
                for n, each in enumerate(offered)
            ),
        )
        for b, (both, factor) in enumerate(zip(offers, amplification, strict=True))
        for branch, offered in enumerate(both)
    ]
    solution = solve(groups, _whole_budget(groups, budget, least_flops(bins)))
    numbers = iter(solution.choice)
    picked = [[offered[next(numbers)] for offered in both] for both in offers]
    return ChosenBins(
        tuple(_together(taken) for taken in picked),
        tuple(sum(each.error for each in taken) for taken in picked),
        solution.error,
        sum(each.flops for taken in picked for each in taken),
        solution.gap,
    )


def _together(taken: Sequence[_Combination]) -> ChosenBin:
    """Return what a bin does, of which one or two groups tell."""
    both = taken[0].beside(taken[1]) if len(taken) == 2 else taken[0]
    return ChosenBin(both.conditional, both.null, both.null_class)


def _whole_budget(groups: Sequence[Group], budget: float, least: float) -> int:
    """Return a budget in whole operations; options are rounded up, and what is possible stays so."""
    rounded = sum(min(option.bytes for option in group.options) for group in groups)
    return max(math.floor(budget), rounded if budget >= least else 0)


def _offered(options: BinOptions) -> list[list[_Combination]]:
    """Return what each branch may do in a bin; both together where predictions may follow."""
    found = [replace(each, flops=each.flops + options.ends) for each in _combinations(options.conditional)]
    groups = [found] if options.null is None else [found, _of_null_class(options.null)]
    if not options.followed:
        return groups
    blocks = len(options.conditional.blocks)
    both = found if len(groups) == 1 else [a.beside(b) for a, b in itertools.product(*map(_undominated, groups))]
    followed = [
        _Combination(each.error, each.flops, (each.pattern,) * blocks, (ALWAYS_FULL,) * blocks * (len(groups) - 1))
        for each in options.followed
    ]
    return [_undominated([*both, *followed])]


def _of_null_class(null: NullOptions) -> list[_Combination]:
    """Return what the null branch may do in a bin."""
    always = null.evaluations * null.fixed
    predicted = [
        _Combination(each.error, each.flops + always, null=each.conditional) for each in _combinations(null.branch)
    ]
    blocks = (ALWAYS_FULL,) * len(null.branch.blocks)
    skipped = [
        _Combination(each.error, each.predicted * null.full, null=blocks, null_class=each.pattern)
        for each in null.patterns
    ]
    return [*predicted, *skipped]


def _undominated(combinations: Sequence[_Combination]) -> list[_Combination]:
    """Return those that no other beats both in error and in operations, from few operations to many."""
    kept: list[_Combination] = []
    for each in sorted(combinations, key=lambda c: (c.flops, c.error)):
        if not kept or each.error < kept[-1].error:
            kept.append(each)
    return kept


def _combinations(options: BranchOptions) -> list[_Combination]:
    """Return what all blocks may do alike, and what each may do at one price of operations, as conditional ones."""
    prices = [0.0, *_ladder(options.blocks), math.inf]
    apart = dict.fromkeys(_at_price(options.blocks, price) for price in prices)
    alike = [_Combination(each.error, each.flops, (each.pattern,) * len(options.blocks)) for each in options.alike]
    return [*apart, *alike]


def _at_price(blocks: Sequence[Sequence[Priced]], price: float) -> _Combination:
    """Return the best pattern of each block where an operation costs so much error; the cheapest at an infinite one."""

    def cost(each: Priced) -> tuple[float, float]:
        return (each.flops, each.error) if math.isinf(price) else (each.error + price * each.flops, each.flops)

    best = [min(patterns, key=cost) for patterns in blocks]
    return _Combination(
        sum(each.error for each in best), sum(each.flops for each in best), tuple(each.pattern for each in best)
    )


def _ladder(blocks: Sequence[Sequence[Priced]]) -> list[float]:
    """Return prices at which choices change: some of the slopes between patterns of a block, from small to large."""
    slopes = sorted(
        (b.error - a.error) / (a.flops - b.flops)
        for patterns in blocks
        for a, b in itertools.permutations(patterns, 2)
        if a.flops > b.flops and b.error > a.error
    )
    step = max(1, len(slopes) // _PRICES)
    return slopes[::step]


def cells_of(
    chosen: Sequence[ChosenBin], bins: Mapping[int, range], null: Sequence[NullChoice]
) -> tuple[list[list[list[BlockChoice]]], list[NullChoice]]:
    """Return the choice of each (evaluation, branch, block), and what becomes of the null class in each evaluation.

    `null` is what becomes of it where nothing is saved. What a pattern would take where nothing was computed before is
    computed.
    """
    cells: list[list[list[BlockChoice]]] = []
    planned: list[NullChoice] = []
    number, predicted = 0, False
    made: dict[tuple[int, int], set[str]] = {}
    for b, evaluations in sorted(bins.items()):
        for evaluation in evaluations:
            wanted = [[pattern.at(evaluation) for pattern in chosen[b].conditional]]
            follows = FOLLOW in wanted[0]
            if null:
                off = null[evaluation] == "off" or follows
                what: NullChoice = "off" if off else chosen[b].null_class.at(number)
                what = "compute" if what == "reuse" and not predicted else what
                patterns = chosen[b].null or (ALWAYS_FULL,) * len(wanted[0])
                wanted.append([FOLLOW if follows else pattern.at(number) for pattern in patterns])
                number += null[evaluation] == "compute"
                predicted = predicted or what == "compute"
                planned.append(what)
            cells.append(
                [
                    [_possible(choice, made.setdefault((branch, block), set())) for block, choice in enumerate(blocks)]
                    if branch == 0 or planned[-1] == "compute" or follows
                    else [FULL] * len(blocks)
                    for branch, blocks in enumerate(wanted)
                ]
            )
    return cells, planned


def _possible(choice: BlockChoice, made: set[str]) -> BlockChoice:
    """Return a choice whose parts take only what was `made`, which gets what it makes."""
    attention, mixture = choice.attention, choice.mixture
    if attention in ("reuse", "forecast") and "attention" not in made:
        attention = "compute"
    source = "slots" if mixture == "reuse-slots" else "mixture"
    if mixture in ("reuse", "forecast", "reuse-slots") and source not in made:
        mixture = "compute"
    found = BlockChoice(attention, mixture, choice.slots, choice.shared)
    made |= {"attention"} if attention == "compute" else set()
    if mixture in ("compute", "reuse-slots"):
        made |= {"mixture"} if found.slots is not None else {"mixture", "slots"}
    return found
