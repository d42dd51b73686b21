"""Offloading: a model with the weights of one block in memory, for checkpoints larger than the machine.

All images pass a block before the next block is read. They do so in the micro-batches that a resident model would be
given, so results are the same to the last bit. Each model evaluation reads the checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ditmoe_cli.files.names import split_name
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.unpacked_weights import UnpackedWeights, unpacked_weights
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.conditions import conditions
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import Block, Prediction
from ditmoe_cli.model.loading import assign, empty_model, finish, reserve_block
from ditmoe_cli.model.moe import Observer


@runtime_checkable
class MicroBatchObserver(Observer, Protocol):
    """An observer that distinguishes the micro-batches of a batch."""

    def select(self, start: int, stop: int) -> None:
        """Announce events of the images from `start` up to, without, `stop` of the batch."""


class OffloadedDiTMoE:
    """Predict as `DiTMoE` does, with the weights of one block in memory.

    `images` is the number of images of a batch, `micro_batch` the number that pass a block at once. Where a batch holds
    both guidance branches, a micro-batch holds both branches of its images. Weights are kept in `stored`, fp32 where
    blocks are to be changed, and computed with in `dtype`. `unpacked` keeps what packed weights of the block in memory
    are unpacked to; without it, as much as `default_budget` says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        images: int = 1,
        micro_batch: int = 1,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype = torch.float32,
        unpacked: UnpackedWeights | None = None,
    ) -> None:
        self.config: DiTMoEConfig = checkpoint.config
        self.device: torch.device = device
        self.dtype, self._stored = dtype, stored
        self._checkpoint, self._images, self._micro_batch = checkpoint, images, micro_batch
        self._model = empty_model(checkpoint)
        self._unpacked = unpacked_weights() if unpacked is None else unpacked
        self._block_weights: list[list[Weight]] = [[] for _ in range(self.config.depth)]
        for weight in checkpoint.weights.values():
            block = split_name(weight.info.name).block
            if block is None:
                assign(self._model, checkpoint, weight, device, stored, self._unpacked)
            else:
                self._block_weights[block].append(weight)
        finish(self._model, checkpoint, device, dtype)

    @contextmanager
    def resident(self, index: int) -> Iterator[Block]:
        """Yield a block with its weights in memory; they are freed afterwards, even if the caller keeps the block."""
        block = self._model.blocks[index]
        assert isinstance(block, Block)
        block.compute_in(self.dtype)
        reserve_block(block, self._checkpoint, index, self.device, self._stored)
        for weight in self._block_weights[index]:
            assign(self._model, self._checkpoint, weight, self.device, self._stored, self._unpacked)
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

    def prepared(self, times: Sequence[float], labels: Tensor) -> Prediction:
        """Return the model for images of `labels`, (N,) or (2 N,) with both guidance branches, as `DiTMoE.prepared`."""
        parts = [self._rows(len(labels), start) for start in range(0, self._images, self._micro_batch)]
        runs = [conditions(times, labels[rows], self._model.condition, self.config, keeps=False) for rows in parts]

        def predict(x: Tensor, t: float, observer: Observer | None = None) -> Tensor:
            states = [self._model.patches(x[rows]) for rows in parts]
            for index in range(self.config.depth):
                with self.resident(index) as block:
                    for i, (tokens, run) in enumerate(zip(states, runs, strict=True)):
                        start = i * self._micro_batch
                        if isinstance(observer, MicroBatchObserver):
                            observer.select(start, min(start + self._micro_batch, self._images))
                        modulation = run.at(f"blocks.{index}", block.adaLN_modulation, t)
                        states[i] = block.mix(block.attend_modulated(tokens, modulation), index, observer)
            final = self._model.final_layer.adaLN_modulation
            outputs = [
                self._model.unpatched(tokens, run.at("final", final, t))
                for tokens, run in zip(states, runs, strict=True)
            ]
            out = torch.empty((len(x), *outputs[0].shape[1:]), dtype=outputs[0].dtype, device=self.device)
            for rows, output in zip(parts, outputs, strict=True):
                out[rows] = output
            return out

        return predict

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
