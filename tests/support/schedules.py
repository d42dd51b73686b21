"""Schedules of compute for checkpoints of tests: their tables, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, ScheduledSampling, schedule_document
from ditmoe_cli.files.arrays import write_arrays
from ditmoe_cli.model.block_choices import BlockChoice, ComputeTable, full_table, parse_choice, table_of
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import DiTMoEConfig

EULER = ScheduledSampling("euler", 3)
"""Three steps of Euler without guidance, as commands of tests sample."""


def all_full(way: ScheduledSampling, blocks: int = 2) -> ComputeTable:
    """The table in which everything is computed."""
    return full_table(len(way.times), blocks, way.null)


def by_evaluation(
    way: ScheduledSampling, choice_at: Callable[[int], str], blocks: int = 2, null: Sequence[Any] | None = None
) -> ComputeTable:
    """The table in which all blocks and branches have the choice of their evaluation."""
    chosen = way.null if null is None else tuple(null)
    choices: list[BlockChoice] = [parse_choice(choice_at(evaluation)) for evaluation in range(len(way.times))]
    branches = 2 if chosen else 1
    return table_of([[[choice] * blocks] * branches for choice in choices], chosen)


def every_second(way: ScheduledSampling, blocks: int = 2, saved: str = "reuse") -> ComputeTable:
    """The table in which every second evaluation saves by a choice."""
    return by_evaluation(way, lambda evaluation: saved if evaluation % 2 else "full", blocks)


def statistics_for(config: DiTMoEConfig, bins: int = 1, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random statistics of the shapes that a model needs."""
    made = np.random.default_rng(seed)
    blocks, rows = config.depth, max(block.router_rows for block in config.blocks)
    shapes = {
        ENERGY: (bins, 2, blocks, rows),
        SCALE: (blocks, rows, config.hidden_size),
        CONSTANT: (blocks, rows, config.hidden_size),
    }
    return {name: made.random(shape).astype(np.float32) for name, shape in shapes.items()}


def write_schedule(
    path: Path,
    checkpoint: Path,
    table: ComputeTable,
    way: ScheduledSampling = EULER,
    method: str = "by hand",
    bins: int = 1,
    arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Write the schedule of a checkpoint."""
    document = schedule_document(open_checkpoint(checkpoint).fingerprint, way, method, table, bins, {})
    write_arrays(path, arrays or {}, document, force=True)
    return path
