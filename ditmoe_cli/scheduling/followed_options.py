"""Patterns in which predictions follow the state, with their errors over a bin: all of them measured, none replayed.

A model's way tells what it predicts at every evaluation, and by that what a followed prediction would be off there:
E‖o - ô‖² over the channels of the state, slopes being fitted to the same images. Asking the model takes all operations,
following none.
"""

from __future__ import annotations

from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.followed_predictions import following, slopes_at
from ditmoe_cli.model.compute_cost import evaluation_cost
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.scheduling.patterns import Pattern, following_patterns
from ditmoe_cli.scheduling.schedule_program import Priced
from ditmoe_cli.scheduling.way_states import Visited


def followed_options(
    seen: Visited, sampling: ScheduledSampling, config: DiTMoEConfig, evaluations: range
) -> list[Priced]:
    """Return the patterns of a bin in which predictions follow at times, with errors and operations an image."""
    once = evaluation_cost(config)
    branches = {k: 1 + sampling.guidance.takes_null_class(sampling.times[k]) for k in evaluations}
    found = []
    for pattern in following_patterns():
        followed = [k for k in evaluations if pattern.age(k)]
        if not followed or pattern.period > evaluations.stop:
            continue
        flops = sum(branches[k] * once for k in evaluations if not pattern.age(k))
        found.append(Priced(pattern, sum(_error(seen, pattern, k) for k in followed), flops))
    return found


def _error(seen: Visited, pattern: Pattern, evaluation: int) -> float:
    """Return the mean over images of ‖o - ô‖² in one evaluation."""
    last = evaluation - pattern.age(evaluation)
    before = last - pattern.period if last >= pattern.period else None
    channels = seen.states.shape[2]
    found = _followed(seen, evaluation, last, before)[:, :channels]
    off = (seen.predictions[evaluation, :, :channels] - found).double()
    return float(off.square().flatten(1).sum(dim=1).mean())


def _followed(seen: Visited, evaluation: int, last: int, before: int | None) -> Tensor:
    """Return the prediction that follows (N, C', H, W), from those of the way."""
    slopes = slopes_at(seen.states, seen.predictions, evaluation, last, before).to(seen.states.device)
    kept = seen.states[last], seen.predictions[last]
    return following(slopes, seen.states[evaluation], kept, None if before is None else seen.predictions[before])
