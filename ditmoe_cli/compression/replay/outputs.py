"""Outputs of a mixture, and the squared error between those of two mixtures."""

from __future__ import annotations

from torch import Tensor

from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.moe import SparseMoE

_TOKENS = 4096  # that are run at a time


def chunks(total: int) -> list[slice]:
    """Return slices of `total` tokens, some at a time."""
    return [slice(start, min(start + _TOKENS, total)) for start in range(0, total, _TOKENS)]


def output_of(moe: SparseMoE, inputs: Tensor) -> Tensor:
    """Return routed plus shared output (T, D) of tokens (T, D)."""
    out: Tensor = moe(inputs.unsqueeze(0), 0, inputs[:1], None)
    return out.squeeze(0)


def held_error(original: SparseMoE, changed: SparseMoE, tokens: Tokens) -> float:
    """Return Σ w ‖y - y'‖² over held-out tokens, y and y' the outputs of both mixtures."""
    inputs, weights = tokens.inputs[tokens.held], tokens.weights[tokens.held]
    error = 0.0
    for rows in chunks(len(inputs)):
        difference = output_of(original, inputs[rows]) - output_of(changed, inputs[rows])
        error += float((difference.double().square().sum(dim=1) * weights[rows]).sum())
    return error
