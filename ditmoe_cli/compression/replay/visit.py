"""Calibration states on their way through the original blocks, for methods that look at one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ditmoe_cli.compression.precision.task import Task
from ditmoe_cli.compression.replay.amplification import embedded, measured_states
from ditmoe_cli.compression.replay.guided import slices
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing.profile import RoutingProfile

T = TypeVar("T")
Look = Callable[[int, Block, Sequence[Attended], Sequence[Tensor]], T]


def visit(task: Task, look: Look[T]) -> list[T]:
    """Return what `look` returns of each block of a task's checkpoint; see `visit_blocks`."""
    return visit_blocks(task.checkpoint, task.profile, task.device, task.bar, look)


def visit_blocks(
    checkpoint: Checkpoint, profile: RoutingProfile, device: str, bar: ProgressBar, look: Look[T]
) -> list[T]:
    """Return what `look(index, block, seen, after)` returns of each block.

    `seen` is what the mixture is given, and `after` (N, P, D) what the block returns, some images at a time, all
    guidance branches. One block's weights are in memory at a time. Raises `BadInputError` for a profile without states.
    """
    model = OffloadedDiTMoE(checkpoint, torch.device(device))
    found = []
    with torch.inference_mode(), resident_blocks(model, bar, f"measuring {checkpoint.path.name}") as blocks:
        x, c = embedded(model, measured_states(checkpoint, profile, model))
        for index, block in blocks:
            seen = [block.attend(x[rows], c[rows]) for rows in slices(len(x))]
            after = [block.mix(part, index, None) for part in seen]
            found.append(look(index, block, seen, after))
            x = torch.cat(after)
    return found
