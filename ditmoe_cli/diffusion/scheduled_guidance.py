"""Guided predictions of a model that computes what a schedule says, evaluation after evaluation.

Where the null class is reused, uncond = cond - (cond' - uncond') with the branches of the evaluation that predicted it
last (https://arxiv.org/abs/2410.19355); where it is off, the conditional branch stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, SLOPES, ComputeSchedule
from ditmoe_cli.diffusion.followed_predictions import FollowedPredictions
from ditmoe_cli.diffusion.guidance import away_from_weak, combine
from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.step_bins import step_bin
from ditmoe_cli.diffusion.weak_guidance import Guidance
from ditmoe_cli.model.block_choices import ComputeTable
from ditmoe_cli.model.conditions import Conditions, conditions
from ditmoe_cli.model.dit import Denoiser, DiTMoE, ModulationOf
from ditmoe_cli.model.partial_mixtures import SlotStatistics
from ditmoe_cli.model.scheduled import ComputeCount, ScheduledRun, Statistics, no_statistics


@dataclass(frozen=True)
class Scheduled:
    """A table with the statistics of its rules on a device, and who is told what each batch computed.

    `slopes` (K, C, 2) are those by which predictions follow, where they do (`followed_predictions`).
    """

    table: ComputeTable
    statistics: Statistics = no_statistics
    counted: Callable[[ComputeCount], None] = lambda _: None
    slopes: Tensor | None = None


def loaded_schedule(
    schedule: ComputeSchedule, device: torch.device, counted: Callable[[ComputeCount], None] = lambda _: None
) -> Scheduled:
    """Return a schedule with its statistics on a device."""
    arrays = {name: torch.tensor(array, device=device) for name, array in schedule.statistics().items()}
    return scheduled_with(schedule.table, arrays, schedule.bins, counted)


def scheduled_with(
    table: ComputeTable,
    arrays: Mapping[str, Tensor],
    bins: int,
    counted: Callable[[ComputeCount], None] = lambda _: None,
) -> Scheduled:
    """Return a table with the arrays of its file."""
    return Scheduled(table, statistics_of(arrays, table.evaluations, bins), counted, arrays.get(SLOPES))


def statistics_of(arrays: Mapping[str, Tensor], evaluations: int, bins: int) -> Statistics:
    """Return what rules know in each evaluation, branch and block, from `energy`, `scale` and `constant`."""
    if not arrays:
        return no_statistics
    known: dict[tuple[int, int, int], SlotStatistics] = {}

    def at(evaluation: int, branch: int, block: int) -> SlotStatistics:
        place = (step_bin(evaluation, evaluations, bins), branch if ENERGY in arrays else 0, block)
        if place not in known:
            energy = arrays[ENERGY][place] if ENERGY in arrays else None
            scale, constant = (arrays[name][block] if name in arrays else None for name in (SCALE, CONSTANT))
            known[place] = SlotStatistics(energy, scale, constant)
        return known[place]

    return at


def scheduled_predictor(
    model: DiTMoE,
    labels: Tensor,
    guidance: Guidance,
    times: Sequence[float],
    scheduled: Scheduled,
    weak: Denoiser | None = None,
) -> Predictor:
    """Return a predictor for images with `labels` (N,), asked at all `times` in their order, each once.

    It is `guided_predictor`'s to the bit where everything is computed. Raises `ValueError` for another number of times
    than the table has evaluations.
    """
    table = scheduled.table
    if table.evaluations != len(times):
        raise ValueError(f"a table of {table.evaluations} evaluations for {len(times)} times")
    run, followed = ScheduledRun(model, table, scheduled.statistics), FollowedPredictions(table, scheduled.slopes)
    doubled = [t for e, t in enumerate(times) if table.computes_null(e)]
    single = [t for e, t in enumerate(times) if not table.computes_null(e) and not followed.at(e)]
    null = torch.full_like(labels, model.config.num_classes)
    one = _conditions(model, single, labels)
    two = _conditions(model, doubled, torch.cat((labels, null)))
    guided = dict.fromkeys(t for e, t in enumerate(times) if guidance.takes_weak(t) and not followed.at(e))
    weaker = weak.prepared(list(guided), labels) if weak else None
    branches = NullGuidance(table, guidance)

    def asked(x: Tensor, t: float, evaluation: int) -> Tensor:
        if table.computes_null(evaluation):
            predicted = run.predict(torch.cat((x, x)), t, _modulations(two, t), (0, 1))
        else:
            predicted = run.predict(x, t, _modulations(one, t), (0,))
        output, cond = branches.guided(predicted, evaluation)
        guide = guidance.guide
        if guide is None or weaker is None or not guidance.takes_weak(t):
            return output
        return away_from_weak(output, cond, weaker(x, t).float(), guide.scale, guidance.family)

    def predict(x: Tensor, t: float) -> Tensor:
        evaluation, run.kept_beside = run.evaluation, followed.nbytes
        if followed.at(evaluation):
            output = followed.predicted(evaluation, x)
            run.finish(0)
        else:
            output = followed.kept(evaluation, x, asked(x, t, evaluation))
        if run.evaluation == table.evaluations:
            scheduled.counted(run.count)
        return output

    return predict


class NullGuidance:
    """Guidance by the null class as a table says, evaluation after evaluation."""

    def __init__(self, table: ComputeTable, guidance: Guidance) -> None:
        self._table, self._guidance = table, guidance
        self._difference: Tensor | None = None

    def guided(self, predicted: Tensor, evaluation: int) -> tuple[Tensor, Tensor]:
        """Return the guided output and the conditional branch (N, C, H, W), in fp32.

        `predicted` are the branches that the table computes, the conditional one first.
        """
        scale, family, null = self._guidance.scale, self._guidance.family, self._table.null
        predicted = predicted.float()
        if self._table.computes_null(evaluation):
            cond, uncond = predicted.chunk(2)
            self._difference = cond - uncond if "reuse" in null[evaluation:] else None
            return combine(cond, uncond, scale, family), cond
        if not null or null[evaluation] != "reuse" or self._difference is None:
            return predicted, predicted
        return combine(predicted, predicted - self._difference, scale, family), predicted


def _conditions(model: DiTMoE, times: Sequence[float], labels: Tensor) -> Conditions:
    return conditions(list(dict.fromkeys(times)), labels, model.condition, model.config)


def _modulations(known: Conditions, t: float) -> ModulationOf:
    return lambda name, modulate: known.at(name, modulate, t)
