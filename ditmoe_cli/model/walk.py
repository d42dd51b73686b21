"""The blocks of a model in order, the weights of one in memory: the loop of every method that goes block by block."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

import torch

from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE, resident_block
from ditmoe_cli.progress import Progress, ProgressBar, silent_bar


@contextmanager
def resident_blocks(
    model: DiTMoE | OffloadedDiTMoE, bar: ProgressBar = silent_bar, title: str = ""
) -> Iterator[Iterator[tuple[int, Block]]]:
    """Yield an iterator over (index, block), in order, and show under `title` how many blocks are done.

    A block of an offloaded model loses its weights before the next one is read, also where the caller still holds it::

        with resident_blocks(model, bar, f"measuring {path.name}") as blocks:
            for index, block in blocks:
                ...

    No gradients are recorded within the context. Leaving it, by an exception too, frees the block and closes the bar.
    """
    total = model.config.depth
    with torch.inference_mode(), bar(title, total) as progress, closing(_walk(model, total, progress)) as blocks:
        yield blocks


def _walk(model: DiTMoE | OffloadedDiTMoE, total: int, progress: Progress) -> Generator[tuple[int, Block], None, None]:
    for index in range(total):
        with resident_block(model, index) as block:
            yield index, block
        progress(1)
