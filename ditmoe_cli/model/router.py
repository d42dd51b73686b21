"""Top-k routing: softmax over all router rows, of which the k largest are kept, not renormalised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.model.config import GHOST, BlockConfig


@dataclass(frozen=True)
class Routing:
    """The selected experts of T tokens and their routing weights.

    Attributes:
        experts: (T, k) the expert of each slot, best first; -2 - j where the row selects constant j.
        weights: (T, k) routing weights: probabilities over all rows, not renormalised.
        rows: (T, k) selected router rows; equal to `experts` where the router has no map.
        probabilities: (T, R) softmax over all router rows, fp32.
        logits: (T, R) router outputs before the softmax, fp32.
    """

    experts: Tensor
    weights: Tensor
    rows: Tensor
    probabilities: Tensor
    logits: Tensor

    def gate_of(self, expert: int) -> Tensor:
        """Return an expert's routing weight for each token (T,), summed over rows that share it, else 0."""
        return (self.weights * (self.experts == expert)).sum(dim=1)

    def chosen(self, experts: int) -> Tensor:
        """Return the selections of the first `experts` one-hot, (T, k, experts); slots of constants are all 0."""
        return F.one_hot(self.experts.clamp_min(-1) + 1, experts + 1)[..., 1:]


class Router(nn.Module):
    """p = softmax(W u) over R rows; top-k over the rows that are no ghosts.

    The map ``expert_of`` (R,) gives what each row selects: p >= 0 an expert, -2 - j a constant, -1 nothing; such a
    *ghost* counts in the softmax but is never selected. Rows that share an expert each take a slot, so their weights
    add. Without a map, row e selects expert e. With `mass`, the selected weights are rescaled to the sum of the k
    largest probabilities of all rows.
    """

    expert_of: Tensor | None

    def __init__(self, width: int, block: BlockConfig, top_k: int) -> None:
        super().__init__()
        self.top_k, self.mass = top_k, block.mass
        self.weight = nn.Parameter(torch.empty(block.router_rows, width))
        self.register_buffer("expert_of", torch.zeros(block.router_rows, dtype=torch.int32) if block.mapped else None)

    def forward(self, u: Tensor) -> Routing:
        """Route tokens u (T, width)."""
        # in fp32, whatever the model's dtype: half precision would change near-ties of the top-k
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
