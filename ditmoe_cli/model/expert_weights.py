"""The weights of single experts, read from a checkpoint in any number format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.files.names import in_expert
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExpertWeights:
    """A SwiGLU expert f(u) = W_down (SiLU(W_gate u) ⊙ W_up u): gate and up (H, D), down (D, H)."""

    gate: Tensor
    up: Tensor
    down: Tensor


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a weight, unpacked from any number format. Raises `BadInputError` for NaN and infinite values."""
    weight = checkpoint.weights[name]
    return weight.unpack({member: checkpoint.finite_tensor(member) for member in weight.members})


def read_expert(checkpoint: Checkpoint, block: int, expert: int) -> ExpertWeights:
    """Return the weights of a routed expert in fp32."""

    def matrix(name: str) -> Tensor:
        return read_weight(checkpoint, in_expert(block, expert, f"{name}.weight")).float()

    return ExpertWeights(gate=matrix("gate_proj"), up=matrix("up_proj"), down=matrix("down_proj"))
