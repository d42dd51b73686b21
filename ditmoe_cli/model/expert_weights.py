"""The weights of single experts, read from a checkpoint in any number format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.files.names import in_block, in_expert
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExpertWeights:
    """A SwiGLU expert f(u) = W_down (SiLU(W_gate u) ⊙ W_up u): gate and up (H, D), down (D, H)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down."""
        return self.gate, self.up, self.down


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a weight, unpacked from any number format. Raises `BadInputError` for NaN and infinite values."""
    weight = checkpoint.weights[name]
    return weight.unpack({member: checkpoint.finite_tensor(member) for member in weight.members})


def read_expert(checkpoint: Checkpoint, block: int, expert: int) -> ExpertWeights:
    """Return the weights of a routed expert in fp32."""

    def matrix(name: str) -> Tensor:
        return read_weight(checkpoint, in_expert(block, expert, f"{name}.weight")).float()

    return ExpertWeights(gate=matrix("gate_proj"), up=matrix("up_proj"), down=matrix("down_proj"))


@dataclass(frozen=True)
class StoredMixture(Mapping[str, Tensor]):
    """The weights of a block's mixture in fp32, by their names within the block, each read whenever it is asked for.

    Raises `BadInputError` for NaN and infinite values.
    """

    checkpoint: Checkpoint
    block: int
    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        return read_weight(self.checkpoint, in_block(self.block, name)).to(self.device, torch.float32)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and in_block(self.block, name) in self.checkpoint.weights

    def __iter__(self) -> Iterator[str]:
        start = in_block(self.block, "")
        names = (name.removeprefix(start) for name in self.checkpoint.weights if name.startswith(start))
        return (name for name in names if name.startswith("moe."))

    def __len__(self) -> int:
        return sum(1 for _ in self)
