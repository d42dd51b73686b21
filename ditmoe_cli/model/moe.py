"""The mixture of one block: routed SwiGLU experts and the shared expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
        residual: (N, tokens, width) residual stream that the block adds to; None where a mixture is called alone.
    """

    block: int
    inputs: Tensor
    routing: Routing
    outputs: Tensor
    gamma: Tensor
    residual: Tensor | None = None


class Observer(Protocol):
    """Watches mixtures during a forward pass; must not change what it is shown."""

    def __call__(self, event: MoEEvent) -> None:
        """Take note of one block's event."""


@runtime_checkable
class NeuronObserver(Observer, Protocol):
    """An observer that is shown experts' neurons too, before each event."""

    def neurons(self, block: int, expert: int, weights: Tensor, activations: Tensor) -> None:
        """Take note of one expert's neurons: routing weights (n,) and activations φ (n, inner) of its tokens."""


class SwiGLU(nn.Module):
    """f(u) = W_down (SiLU(W_gate u) * W_up u), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def neurons(self, u: Tensor) -> Tensor:
        """Return φ = SiLU(W_gate u) * W_up u, (..., inner)."""
        phi: Tensor = F.silu(self.gate_proj(u)) * self.up_proj(u)
        return phi

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., width)."""
        out: Tensor = self.down_proj(self.neurons(u))
        return out


NeuronWatcher = Callable[[int, Tensor, Tensor], None]


def _watcher(observer: Observer | None, block: int, routing: Routing) -> NeuronWatcher | None:
    """Return what shows experts' neurons to an observer, if it wants to see them."""
    if not isinstance(observer, NeuronObserver):
        return None
    weights = routing.weights.reshape(-1)
    return lambda expert, slots, phi: observer.neurons(block, expert, weights[slots], phi)


class SparseMoE(nn.Module):
    """Routed experts, of any widths and formats, plus the always-on shared expert."""

    def __init__(self, width: int, block: BlockConfig, top_k: int) -> None:
        super().__init__()
        self.gate = Router(width, block.router_rows, top_k, block.mapped)
        self.experts = nn.ModuleList(SwiGLU(width, inner) for inner in block.expert_widths)
        self.shared_experts = SwiGLU(width, block.shared_width)

    def expert_outputs(self, u: Tensor, experts: Tensor, watch: NeuronWatcher | None = None) -> Tensor:
        """Return f_e(u) for each token and slot, (T, k, width): tokens sorted by expert, each expert run once.

        `watch(expert, slots, φ)` is shown each expert's neurons, `slots` indexing the flattened (T, k).
        """
        slots = experts.reshape(-1)
        order = slots.argsort(stable=True)
        counts = torch.bincount(slots, minlength=len(self.experts)).tolist()
        parts = []
        for e, chunk in enumerate(torch.split(order, counts)):
            if not len(chunk):
                continue
            expert = self.experts[e]
            assert isinstance(expert, SwiGLU)
            phi = expert.neurons(u[chunk // experts.shape[1]])
            if watch is not None:
                watch(e, chunk, phi)
            parts.append(expert.down_proj(phi))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return torch.cat(parts)[inverse].reshape(*experts.shape, u.shape[-1])

    def forward(
        self, u: Tensor, block: int, gamma: Tensor, observer: Observer | None, residual: Tensor | None = None
    ) -> Tensor:
        """Return routed plus shared output for u (N, tokens, width); the rest is for the observer."""
        flat = u.reshape(-1, u.shape[-1])
        routing: Routing = self.gate(flat)
        outputs = self.expert_outputs(flat, routing.experts, _watcher(observer, block, routing))
        if observer is not None:
            observer(MoEEvent(block, flat, routing, outputs, gamma, residual))
        routed = (routing.weights.unsqueeze(-1) * outputs).sum(dim=1)
        shared: Tensor = self.shared_experts(u)
        return routed.reshape(u.shape) + shared
