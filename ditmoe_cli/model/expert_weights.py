"""The weights of single experts, read from a checkpoint in any format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExpertWeights:
    """A SwiGLU expert f(u) = W_down (SiLU(W_gate u) ⊙ W_up u): gate and up (H, D), down (D, H)."""

    gate: Tensor
    up: Tensor
    down: Tensor


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a weight as the model sees it, whatever it is stored as. Raises `BadInputError` for NaN and infinity."""
    weight = checkpoint.weights[name]
    return weight.unpack({member: checkpoint.finite_tensor(member) for member in weight.members})


def read_expert(checkpoint: Checkpoint, block: int, expert: int) -> ExpertWeights:
    """Return the weights of a routed expert in fp32."""
    names = (in_expert(block, expert, f"{matrix}.weight") for matrix in MATRICES)
    return ExpertWeights(*(read_weight(checkpoint, name).float() for name in names))
