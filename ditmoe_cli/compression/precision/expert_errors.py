"""Errors of formats of a mixture's matrices, replayed on tokens that are drawn by importance.

One expert at a time is rounded, one matrix at a time. The error of the guided output is the sum over guided tokens of
‖Σ_b s_b g_b γ_b ⊙ e_b‖², b being the branches, s their coefficients, g the routing weight and e the change of the
expert's output. Of the tokens that chose the expert `EXPERT_DRAWS` are drawn (`compression.replay.drawing`) with the
expected size Σ_b (s_b g_b ‖γ_b‖ ‖u_b‖)², as the error of a linear map would have. That keeps the estimate unbiased; its
standard deviation was 3 to 5 % of the error on trained models, at 2 to 8 bits, where as many evenly spaced tokens gave
7 to 40 % (docs/results.md).

With n rows that are drawn in all branches, an expert of H neurons takes 20 n D H operations for each format of its
three matrices, beside rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.compression.replay.drawing import drawn
from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.compression.working_sizes import EXPERT_DRAWS
from ditmoe_cli.files.names import MATRICES, SHARED
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.experts import SwiGLU

Formats = Mapping[str, Sequence[str]]
"""The formats to try for each matrix."""


class LocalError(NamedTuple):
    """The error of the stream that a format of a weight, named within its block, causes; a number on the device."""

    name: str
    format: str
    error: Tensor


def mixture_errors(block: Block, tokens: BlockTokens, formats: Formats) -> Iterator[LocalError]:
    """Yield the errors of a block's experts, then of its shared expert, replayed on the tokens of its mixture."""
    routing = block.moe.gate(tokens.inputs)
    norms = tokens.gamma.norm(dim=1) * tokens.inputs.norm(dim=1)
    for e, expert in enumerate(block.moe.experts):
        yield from _of_expert(f"moe.experts.{e}", expert, tokens, routing.gate_of(e), norms, formats)
    every_token = torch.ones_like(norms)
    yield from _of_expert(SHARED, block.moe.shared_experts, tokens, every_token, norms, formats)


def _of_expert(
    stem: str, expert: nn.Module, tokens: BlockTokens, gates: Tensor, norms: Tensor, formats: Formats
) -> Iterator[LocalError]:
    """Yield the errors of one expert's matrices."""
    of_matrices = {f"{matrix}.weight": formats.get(f"{stem}.{matrix}.weight", ()) for matrix in MATRICES}
    for matrix, fmt, error in expert_errors(expert, tokens, gates, norms, of_matrices):
        yield LocalError(f"{stem}.{matrix}", fmt, error)


def expert_errors(
    expert: nn.Module, tokens: BlockTokens, gates: Tensor, norms: Tensor, formats: Formats
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (matrix, format, Σ ‖guided error‖² / pairs) of rounding one matrix of an expert at a time.

    `gates` (T,) is its routing weight, 0 for tokens that did not select it, and `norms` (T,) are ‖γ‖ ‖u‖.
    """
    assert isinstance(expert, SwiGLU)
    scales = gates * tokens.coefficients
    draws = drawn(tokens.paired((scales * norms).square()).sum(dim=1), EXPERT_DRAWS)
    rows = torch.cat([draws.terms + branch * tokens.pairs for branch in range(tokens.branches)])
    u, scale = tokens.inputs[rows], scales[rows].unsqueeze(1) * tokens.gamma[rows]
    gate, up, down = (layer.weight for layer in (expert.gate_proj, expert.up_proj, expert.down_proj))
    opened, lifted = F.silu(u @ gate.T), u @ up.T
    neurons = opened * lifted
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "gate_proj.weight": lambda w: F.silu(u @ w.T).sub_(opened).mul_(lifted) @ down.T,
        "up_proj.weight": lambda w: (u @ w.sub_(up).T).mul_(opened) @ down.T,
        "down_proj.weight": lambda w: neurons @ w.sub_(down).T,
    }
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    for matrix, fmts in formats.items():
        for fmt in fmts:
            error = changes[matrix](nearest(weights[matrix], fmt)).mul_(scale)
            guided = error.reshape(tokens.branches, len(draws.terms), -1).sum(dim=0)
            energies = guided.square_().sum(dim=1).double() * draws.factors
            yield matrix, fmt, energies.sum() / tokens.pairs
