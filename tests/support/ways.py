"""Ways of sampling of pico models, and one evaluation of them by a table, for tests of how schedules are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conftest import make_pico
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, ScheduledSampling
from ditmoe_cli.diffusion.schedule import SOLVERS
from ditmoe_cli.model.block_choices import FULL, BlockChoice, table_of
from ditmoe_cli.model.conditions import conditions
from ditmoe_cli.model.dit import Denoiser
from ditmoe_cli.model.partial_mixtures import SlotStatistics
from ditmoe_cli.model.scheduled import ScheduledRun
from ditmoe_cli.scheduling.patterns import Probe
from ditmoe_cli.scheduling.way_states import Visited, Way
from ditmoe_cli.scheduling.way_statistics import WayStatistics


def way_of(sampling: ScheduledSampling, weak: Denoiser | None = None, **changes: Any) -> Way:
    """A pico of one channel, without learned variance, with a way of sampling."""
    family = SOLVERS[sampling.solver].family
    pico = make_pico(**{"sampler": family, "in_channels": 1, "learn_sigma": False, **changes})
    return Way(pico.model(), sampling, 0, (0, 2, 1), weak)


def statistics_at(known: WayStatistics, place: int = 0) -> Any:
    """What rules know in every evaluation, by the statistics of one bin."""
    return lambda _, branch, block: SlotStatistics(
        known.arrays[ENERGY][place, branch, block], known.arrays[SCALE][block], known.arrays[CONSTANT][block]
    )


def by_probe(
    way: Way,
    seen: Visited,
    count: int,
    evaluation: int,
    probe: Probe,
    known: WayStatistics,
    branch: int = 0,
    blocks: Sequence[int] = (0, 1),
) -> tuple[list[Tensor], float]:
    """The branches of a prediction (N, C, H, W) where blocks of one branch do what a probe says, and its operations.

    They compute at the evaluations that the probe takes from, which alone are made before.
    """
    guided = bool(way.sampling.null) and way.sampling.null[evaluation] == "compute"
    branches = (0, 1) if guided else (0,)
    depth, last = way.model.config.depth, evaluation - probe.age
    made = sorted({k for k in (last - probe.spacing, last, evaluation) if k >= 0} if probe.age else {evaluation})

    def choice(k: int, which: int, block: int) -> BlockChoice:
        return probe.choice if (k, which) == (evaluation, branch) and block in blocks else FULL

    cells = [[[choice(k, which, block) for block in range(depth)] for which in branches] for k in made]
    null = ("compute",) * len(cells) if guided else ()
    run = ScheduledRun(way.model, table_of(cells, null), statistics_at(known))
    labels = way.labels(range(count))
    if guided:
        labels = torch.cat((labels, torch.full_like(labels, way.model.config.num_classes)))
    before, found = 0.0, torch.empty(0)
    with torch.inference_mode():
        for k in made:
            t, before = way.sampling.times[k], run.count.total
            at = conditions([t], labels, way.model.condition, way.model.config)
            x = torch.cat([seen.states[k][:count]] * len(branches))
            found = run.predict(x, t, lambda name, m, at=at, t=t: at.at(name, m, t), branches)  # type: ignore[misc]
    return list(found.float().chunk(len(branches))), (run.count.total - before) / count
