"""A model whose blocks' weights are in memory one at a time: for checkpoints larger than the machine.

All images go through a block together before the next one is read, in micro-batches of the size that a resident model
would be given, so the numbers are the same to the last bit. Each step reads the checkpoint once.
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
from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.model.loading import assign, empty_model, finish
from ditmoe_cli.model.moe import Observer


@runtime_checkable
class MicroBatchObserver(Observer, Protocol):
    """An observer that can be told which images of a batch the next events are of."""

    def select(self, start: int, stop: int) -> None:
        """The events that follow are of the images from `start` to `stop` of the batch."""


class OffloadedDiTMoE:
    """Predicts as `DiTMoE` does, with one block's weights resident at a time.

    `images` is the number of images of a batch, `micro_batch` how many of them go through a block at once; with both
    guidance branches in one batch, a micro-batch holds both branches of its images.
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
        """Yield a block with its weights in memory; after that it has none, whoever still holds it."""
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
        found = self._model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(found, nn.Linear)
        return found

    def unembed(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return the output for what the last block returned, as `DiTMoE.unembed` does."""
        return self._model.unembed(tokens, c)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first block is given, as `DiTMoE.embed` does."""
        return self._model.embed(x, t, y)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, observer: Observer | None = None) -> Tensor:
        """Predict for x (N, C, H, W) or, with both branches, (2 N, C, H, W)."""
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
        """Return the rows of one micro-batch's images, all branches."""
        stop = min(start + self._micro_batch, self._images)
        branches = [torch.arange(start, stop) + offset for offset in range(0, total, self._images)]
        return torch.cat(branches).to(self.device)


def release(block: Block) -> None:
    """Let a block's weights go, in place: tensors without memory stand where they were.

    Other tensors that share their memory, as results that kept some of the weights, keep it.
    """
    block.to("meta")


@contextmanager
def resident_block(model: DiTMoE | OffloadedDiTMoE, index: int) -> Iterator[Block]:
    """Yield a block of either kind of model with its weights in memory."""
    if isinstance(model, OffloadedDiTMoE):
        with model.resident(index) as block:
            yield block
        return
    found = model.blocks[index]
    assert isinstance(found, Block)
    yield found
