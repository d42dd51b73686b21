"""What is asked of a schedule: how it is chosen, within which operations or damage. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.errors import InfeasibleError, UsageError
from ditmoe_cli.model.compute_cost import fixed_cost
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.effort import BASELINE_BYTES, Estimate, activation_bytes, loading, model_bytes, passes
from ditmoe_cli.scheduling.fewer_steps import evaluations_of
from ditmoe_cli.scheduling.patterns import MOST_ROWS
from ditmoe_cli.scheduling.whole_methods import INHERITED, PLANNED, check_method, needs_statistics

LEAST_IMAGES = 8
_TRIES = 17
"""Samplings of all images that a plan takes: its ways of adding errors, its rivals, and bins alone."""
_PROBES = 45
"""Choices of a block that are replayed in a bin."""


@dataclass(frozen=True)
class Asked:
    """What a schedule is to be.

    Attributes:
        method: how it is chosen: ``planned``, or a method of `whole_methods`.
        flops: the share of all operations that it may take; None where damage decides, or the method itself.
        max_damage: the largest damage, an upper bound of 95 %; None where operations decide.
        images: whose way is followed; a quarter of them are measured on, the others tried on.
        bins: step bins.
    """

    method: str = PLANNED
    flops: float | None = None
    max_damage: float | None = None
    images: int = 32
    bins: int = 10

    @property
    def plans(self) -> bool:
        """Whether the program chooses."""
        return self.method in (PLANNED, INHERITED)


def check_least(share: float, least: float) -> None:
    """Raise `InfeasibleError` where a share of all operations is below the least that can be chosen."""
    if share < least:
        raise InfeasibleError(
            f"⟨flops⟩ {share:g}: the least that can be chosen here is {math.ceil(1000 * least) / 1000:g} of all "
            "operations; give that or more, or take fewer steps"
        )


def usual_bins(evaluations: int) -> int:
    """Return the number of step bins where none is given: a tenth of the evaluations, 10 to 25, or one for each."""
    return min(evaluations, max(10, min(25, evaluations // 10)))


def check_asked(asked: Asked, config: DiTMoEConfig, sampling: ScheduledSampling) -> Asked:
    """Return what is asked.

    Raises `UsageError` for values out of range, missing, or without effect, `InfeasibleError` for fewer operations than
    any schedule takes.
    """
    check_method(asked.method, config)
    given = [name for name, value in (("flops", asked.flops), ("max_damage", asked.max_damage)) if value is not None]
    if asked.plans and len(given) != 1:
        told = "both are given" if given else "nothing says how much to save"
        raise UsageError(f"⟨flops⟩, ⟨max_damage⟩: {told}; give one, as ⟨flops⟩ 0.6")
    if given and not asked.plans:
        raise UsageError(f"⟨{given[0]}⟩: has no effect beside ⟨method⟩ {asked.method}; leave one out")
    if asked.flops is not None and not 0.0 < asked.flops <= 1.0:
        raise UsageError(f"⟨flops⟩ {asked.flops:g}: must be a share of all operations, above 0 and at most 1")
    if asked.max_damage is not None and not 0.0 <= asked.max_damage < math.inf:
        raise UsageError(f"⟨max_damage⟩ {asked.max_damage:g}: must be at least 0, as 0.001")
    if asked.images < LEAST_IMAGES:
        raise UsageError(f"⟨images⟩ {asked.images}: a schedule is chosen on at least {LEAST_IMAGES} images")
    if asked.flops is not None:
        check_least(asked.flops, _least_operations(asked, config, sampling) / sampling.operations(config))
    return asked


def _least_operations(asked: Asked, config: DiTMoEConfig, sampling: ScheduledSampling) -> float:
    """Return operations below which no schedule is: of the ends of all evaluations, or of the first one at least."""
    return fixed_cost(config) * (len(sampling.times) if asked.method == INHERITED else 1)


def schedule_estimate(asked: Asked, config: DiTMoEConfig, sampling: ScheduledSampling) -> Estimate:
    """Return what choosing a schedule takes: samplings of all images, and replays in each bin.

    A replay in block l of L passes the L - l blocks behind it, L / 2 on average.
    """
    evaluations, branches = evaluations_of(sampling), 2 if sampling.null else 1
    measured = asked.images // 4
    samplings = _TRIES if asked.plans else 3
    work = passes(config, asked.images, samplings * evaluations, asked.images) + loading(config)
    if asked.plans:
        work += passes(config, measured, asked.bins * branches * _PROBES * config.depth / 2, measured)
    elif needs_statistics(asked.method):
        work += passes(config, measured, asked.bins * branches, measured)
    rows = max(branches * asked.images, MOST_ROWS)
    memory = BASELINE_BYTES + model_bytes(config) + activation_bytes(config, rows)
    return Estimate("choosing a schedule", work, memory)
