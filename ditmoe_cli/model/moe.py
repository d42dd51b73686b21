"""The mixture of one block: routed SwiGLU experts and the shared expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.router import Router, Routing


@dataclass(frozen=True)
class MoEEvent:
    """What one block's mixture saw and did in one forward pass, for those who watch.

    Attributes:
        block: index of the block.
        inputs: (T, width) tokens u, images one after the other.
        routing: where they went.
        outputs: (T, k, width) output of each selected expert, before its routing weight.
        gamma: (N, width) residual gate of each image: the block adds gamma * (routed + shared).
    """

    block: int
    inputs: Tensor
    routing: Routing
    outputs: Tensor
    gamma: Tensor


class Observer(Protocol):
    """Watches mixtures during a forward pass; must not change what it is shown."""

    def __call__(self, event: MoEEvent) -> None:
        """Take note of one block's event."""


class SwiGLU(nn.Module):
    """f(u) = W_down (SiLU(W_gate u) * W_up u), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., width)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))
        return out


class SparseMoE(nn.Module):
    """Routed experts, of any widths and formats, plus the always-on shared expert."""

    def __init__(self, width: int, block: BlockConfig, top_k: int) -> None:
        super().__init__()
        self.gate = Router(width, block.router_rows, top_k, block.mapped)
        self.experts = nn.ModuleList(SwiGLU(width, inner) for inner in block.expert_widths)
        self.shared_experts = SwiGLU(width, block.shared_width)

    def expert_outputs(self, u: Tensor, experts: Tensor) -> Tensor:
        """Return f_e(u) for each token and slot, (T, k, width): tokens sorted by expert, each expert run once."""
        slots = experts.reshape(-1)
        order = slots.argsort(stable=True)
        tokens = order // experts.shape[1]
        counts = torch.bincount(slots, minlength=len(self.experts)).tolist()
        parts = [
            expert(u[chunk])
            for expert, chunk in zip(self.experts, torch.split(tokens, counts), strict=True)
            if len(chunk)
        ]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return torch.cat(parts)[inverse].reshape(*experts.shape, u.shape[-1])

    def forward(self, u: Tensor, block: int, gamma: Tensor, observer: Observer | None) -> Tensor:
        """Return routed plus shared output for u (N, tokens, width)."""
        flat = u.reshape(-1, u.shape[-1])
        routing: Routing = self.gate(flat)
        outputs = self.expert_outputs(flat, routing.experts)
        if observer is not None:
            observer(MoEEvent(block, flat, routing, outputs, gamma))
        routed = (routing.weights.unsqueeze(-1) * outputs).sum(dim=1)
        shared: Tensor = self.shared_experts(u)
        return routed.reshape(u.shape) + shared
