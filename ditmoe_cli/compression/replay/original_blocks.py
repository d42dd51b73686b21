"""Calibration states that pass the original blocks, for methods that measure one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.guided import measured_states
from ditmoe_cli.compression.replay.stream import embedded
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import each


@dataclass(frozen=True)
class OriginalBlock:
    """A block with its weights in memory, and calibration states inside and behind it.

    Attributes:
        index: index of the block.
        block: the block.
        attended: the states between attention and mixture, some images at a time, all branches.
        outputs: tokens behind the block, (N, P, D) for the same images.
    """

    index: int
    block: Block
    attended: Sequence[Attended]
    outputs: Sequence[Tensor]


@contextmanager
def original_blocks(calibrated: Calibrated) -> Iterator[Iterator[OriginalBlock]]:
    """Yield an iterator over a checkpoint's blocks, as `resident_blocks` does, with `measured_states` in them.

    Raises `BadInputError` for a profile without states.
    """
    checkpoint = calibrated.checkpoint
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    with resident_blocks(model, f"measuring {checkpoint.name}") as blocks:
        stream = embedded(model, measured_states(calibrated, model))

        def steps() -> Iterator[OriginalBlock]:
            for index, block in blocks:
                attended = stream.attended(block)
                parts = each(attended, "mixing", "batches of states", share=0.3)
                outputs = [block.mix(part, index, None) for part in parts]
                yield OriginalBlock(index, block, attended, outputs)
                stream.x = torch.cat(outputs)

        yield steps()
