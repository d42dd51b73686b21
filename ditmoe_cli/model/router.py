"""Top-k routing as DiT-MoE does it: softmax over all rows, the k largest kept, not renormalised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.model.config import GHOST, BlockConfig


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        experts: (T, k) physical expert of each slot, best first; -2 - j where the slot went to constant j.
        weights: (T, k) routing weights: probabilities over all rows, not renormalised.
        rows: (T, k) router rows that were selected; the experts themselves where no map stands between.
        probabilities: (T, R) softmax over all router rows, fp32.
        logits: (T, R) what the softmax is of, fp32.
    """

    experts: Tensor
    weights: Tensor
    rows: Tensor
    probabilities: Tensor
    logits: Tensor

    def gate_of(self, expert: int) -> Tensor:
        """Return an expert's routing weight where a token selected it, else 0, (T,); of rows that share it, the sum."""
        return (self.weights * (self.experts == expert)).sum(dim=1)

    def chosen(self, experts: int) -> Tensor:
        """Return choices of the first `experts` as zeros and ones, (T, k, experts); a constant's slot is all 0."""
        return F.one_hot(self.experts.clamp_min(-1) + 1, experts + 1)[..., 1:]


class Router(nn.Module):
    """p = softmax(W u) over R rows; top-k over the rows that select something.

    ``expert_of`` (R,) says what a row selects: an expert p >= 0, a constant -2 - j, or -1 for a *ghost*, which counts
    in the softmax but is never selected. Rows that share an expert each take a slot, so their weights add. Without
    a map row e selects expert e. With `mass` the selected weights are rescaled to the sum of the k largest
    probabilities of all rows.
    """

    expert_of: Tensor | None

    def __init__(self, width: int, block: BlockConfig, top_k: int) -> None:
        super().__init__()
        self.top_k, self.mass = top_k, block.mass
        self.weight = nn.Parameter(torch.empty(block.router_rows, width))
        self.register_buffer("expert_of", torch.zeros(block.router_rows, dtype=torch.int32) if block.mapped else None)

    def forward(self, u: Tensor) -> Routing:
        """Route tokens u (T, width)."""
        # in fp32 whatever the model's dtype: half precision would tip near-ties of the top-k
        logits = u.float() @ self.weight.float().T
        probabilities = logits.softmax(dim=-1)
        if self.expert_of is None:
            weights, rows = probabilities.topk(self.top_k, dim=-1)
            return Routing(rows, weights.to(u.dtype), rows, probabilities, logits)
        selectable = probabilities.masked_fill(self.expert_of == GHOST, -1.0)
        rows = selectable.topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, rows)
        if self.mass:
            whole = probabilities.topk(self.top_k, dim=-1).values.sum(dim=-1, keepdim=True)
            weights = weights * (whole / weights.sum(dim=-1, keepdim=True))
        return Routing(self.expert_of.long()[rows], weights.to(u.dtype), rows, probabilities, logits)
