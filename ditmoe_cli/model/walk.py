"""Walking the blocks of a model in order, with the weights of one in memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

import torch

from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import Phase, phase


@contextmanager
def resident_blocks(
    model: DiTMoE | OffloadedDiTMoE, title: str = "walking the blocks", start: int = 0
) -> Iterator[Iterator[tuple[int, Block]]]:
    """Yield an iterator over (index, block), in order from `start`: a phase of that `title`, which counts blocks.

    The weights of an offloaded block are freed before the next block is read, even if the caller keeps the block::

        with resident_blocks(model, f"measuring {path.name}") as blocks:
            for index, block in blocks:
                ...

    No gradients are recorded within the context. Its end, by an exception too, frees the block and ends the phase.
    """
    with (
        torch.inference_mode(),
        phase(title, model.config.depth, "blocks", start=start) as progress,
        closing(_walk(model, progress)) as blocks,
    ):
        yield blocks


def _walk(model: DiTMoE | OffloadedDiTMoE, progress: Phase) -> Generator[tuple[int, Block], None, None]:
    for index in range(progress.start, progress.total):
        with _resident(model, index) as block:
            yield index, block
        progress(1)


def _resident(model: DiTMoE | OffloadedDiTMoE, index: int) -> AbstractContextManager[Block]:
    if isinstance(model, OffloadedDiTMoE):
        return model.resident(index)
    block = model.blocks[index]
    assert isinstance(block, Block)
    return nullcontext(block)
