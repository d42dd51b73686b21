"""Offloading: a model with the weights of one block in memory, for checkpoints larger than the machine.

All images pass a block before the next block is read. They do so in the micro-batches that a resident model would be
given, so results are the same to the last bit. Each model evaluation reads the checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ditmoe_cli.files.names import split_name
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.loading import assign, empty_model, finish
from ditmoe_cli.model.moe import Observer


@runtime_checkable
class MicroBatchObserver(Observer, Protocol):
    """An observer that distinguishes the micro-batches of a batch."""

    def select(self, start: int, stop: int) -> None:
        """Announce events of the images from `start` up to, without, `stop` of the batch."""


class OffloadedDiTMoE:
    """Predict as `DiTMoE` does, with the weights of one block in memory.

    `images` is the number of images of a batch, `micro_batch` the number that pass a block at once. Where a batch holds
    both guidance branches, a micro-batch holds both branches of its images.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, images: int = 1, micro_batch: int = 1) -> None:
        self.config: DiTMoEConfig = checkpoint.config
        self.device: torch.device = device
        self._checkpoint, self._images, self._micro_batch = checkpoint, images, micro_batch
        self._model = empty_model(checkpoint)
        self._block_weights: list[list[Weight]] = [[] for _ in range(self.config.depth)]
        for weight in checkpoint.weights.values():
            block = split_name(weight.info.name).block
            if block is None:
                assign(self._model, checkpoint, weight, device, torch.float32)
            else:
                self._block_weights[block].append(weight)
        finish(self._model, checkpoint, device, torch.float32)

    @contextmanager
    def resident(self, index: int) -> Iterator[Block]:
        """Yield a block with its weights in memory; they are freed afterwards, even if the caller keeps the block."""
        for weight in self._block_weights[index]:
            assign(self._model, self._checkpoint, weight, self.device, torch.float32)
        block = self._model.blocks[index]
        assert isinstance(block, Block)
        try:
            yield block.eval().requires_grad_(False)
        finally:
            release(block)
            with torch.device("meta"):
                self._model.blocks[index] = Block(self.config, self.config.blocks[index])

    def linear(self, name: str) -> nn.Linear:
        """Return the linear layer of a weight outside the blocks."""
        layer = self._model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear)
        return layer

    def unembed(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return the output from the tokens that the last block returned, as `DiTMoE.unembed` does."""
        return self._model.unembed(tokens, c)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the first block, as `DiTMoE.embed` does."""
        return self._model.embed(x, t, y)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, observer: Observer | None = None) -> Tensor:
        """Predict for x (N, C, H, W) or, with both guidance branches, (2 N, C, H, W)."""
        parts = [self._rows(len(x), start) for start in range(0, self._images, self._micro_batch)]
        states = [self._model.embed(x[rows], t[rows], y[rows]) for rows in parts]
        for index in range(self.config.depth):
            with self.resident(index) as block:
                for i, (tokens, c) in enumerate(states):
                    start = i * self._micro_batch
                    if isinstance(observer, MicroBatchObserver):
                        observer.select(start, min(start + self._micro_batch, self._images))
                    states[i] = (block(tokens, c, index, observer), c)
        outputs = [self._model.unembed(tokens, c) for tokens, c in states]
        out = torch.empty((len(x), *outputs[0].shape[1:]), dtype=outputs[0].dtype, device=self.device)
        for rows, output in zip(parts, outputs, strict=True):
            out[rows] = output
        return out

    def _rows(self, total: int, start: int) -> Tensor:
        """Return the rows of the images of a micro-batch, in all branches."""
        stop = min(start + self._micro_batch, self._images)
        branches = [torch.arange(start, stop) + offset for offset in range(0, total, self._images)]
        return torch.cat(branches).to(self.device)


def release(block: Block) -> None:
    """Free a block's weights in place, by moving them to the meta device.

    Memory that other tensors share stays, such as that of weights kept in a result.
    """
    block.to("meta")
