"""The mixture of one block: routed SwiGLU experts and the shared expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ditmoe_cli.files.names import (
    CONSTANTS,
    CONSTANTS_DOWN,
    CONSTANTS_UP,
    RESIDUAL_CONSTANT,
    RESIDUAL_LINEAR,
)
from ditmoe_cli.model.config import BlockConfig, extension_shapes
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.mixture_backends import Dispatch, NeuronWatcher, backend_for
from ditmoe_cli.model.router import Router, Routing


@dataclass(frozen=True)
class MoEEvent:
    """The inputs, routing and outputs of one block's mixture in a forward pass, as observers are shown them.

    Attributes:
        block: index of the block.
        inputs: (T, width) tokens u, image after image.
        routing: the experts and routing weights of the tokens.
        outputs: (T, k, width) output of each selected expert, before its routing weight is applied.
        gamma: (N, width) residual gate of each image: the block adds gamma * (routed + shared).
        residual: (N, tokens, width) the stream that the block adds to; None where a mixture is called alone.
    """

    block: int
    inputs: Tensor
    routing: Routing
    outputs: Tensor
    gamma: Tensor
    residual: Tensor | None = None


class Observer(Protocol):
    """Observe mixtures during a forward pass; an observer must not change the event."""

    def __call__(self, event: MoEEvent) -> None:
        """Process one block's event."""


@runtime_checkable
class NeuronObserver(Observer, Protocol):
    """An observer that is also shown experts' neurons, before each event."""

    def neurons(self, block: int, expert: int, weights: Tensor, activations: Tensor) -> None:
        """Process one expert's neurons: routing weights (n,) and activations φ (n, inner) of its tokens."""


def _watcher(observer: Observer | None, block: int, routing: Routing) -> NeuronWatcher | None:
    """Return a function that shows experts' neurons to a `NeuronObserver`; None for other observers."""
    if not isinstance(observer, NeuronObserver):
        return None
    weights = routing.weights.reshape(-1)
    return lambda expert, slots, phi: observer.neurons(block, expert, weights[slots], phi)


class RoutedExperts(nn.ModuleList):
    """The experts that a block routes to. They are called as one module, so that hooks see when they compute."""

    def forward(self, u: Tensor, dispatch: Dispatch, constants: int, watch: NeuronWatcher | None) -> Tensor:
        """Return each slot's f_e(u) for tokens u (T, width) as `MixtureBackend.outputs`, by the backend for them."""
        experts = cast("list[SwiGLU]", list(self))
        return backend_for(experts, u).outputs(experts, u, dispatch, constants, watch)


class SparseMoE(nn.Module):
    """Routed experts, of any widths and number formats, plus the shared expert, which takes every token.

    Compressed blocks may have, too:

    - ``constants`` (n, D), which router rows select instead of experts, with linear maps of u beside them,
      ``constants_up`` (n, D, r) ``constants_down`` (n, r, D)
    - ``residual_constant`` c (D,) and ``residual_linear`` L (D, D): (1 - Σ g) (c + L u) is added for the routing mass
      that selected rows do not carry

    Routing and the sum over experts are computed in the dtype of the tokens, experts in `dtype`; None for that of the
    tokens too.
    """

    dtype: torch.dtype | None = None

    constants: Tensor | None
    constants_up: Tensor | None
    constants_down: Tensor | None
    residual_constant: Tensor | None
    residual_linear: Tensor | None

    def __init__(self, width: int, block: BlockConfig, top_k: int) -> None:
        super().__init__()
        self.gate = Router(width, block, top_k)
        self.experts = RoutedExperts(SwiGLU(width, inner) for inner in block.expert_widths)
        self.shared_experts = SwiGLU(width, block.shared_width)
        shapes = extension_shapes(width, block)
        for name in (CONSTANTS, CONSTANTS_UP, CONSTANTS_DOWN, RESIDUAL_CONSTANT, RESIDUAL_LINEAR):
            self.register_buffer(name.removeprefix("moe."), torch.empty(shapes[name]) if name in shapes else None)

    def expert_outputs(self, u: Tensor, selected: Tensor, watch: NeuronWatcher | None = None) -> Tensor:
        """Return f_e(u) for each token u (T, width) and slot of `selected` (T, k), (T, k, width).

        ``watch(expert, slots, φ)`` is shown each expert's neurons; `slots` are indices into the flattened (T, k).
        """
        dispatch = Dispatch.of(selected, len(self.experts))
        return dispatch.by_slot(self.ordered_outputs(u, selected, dispatch, watch))

    def ordered_outputs(
        self, u: Tensor, selected: Tensor, dispatch: Dispatch, watch: NeuronWatcher | None = None
    ) -> Tensor:
        """Return f_e(u) of all slots (T, k) that are computed, in the order of the dispatch."""
        u = u.to(self.dtype or u.dtype)
        constants = int((selected < 0).sum()) if self.constants is not None else 0
        ordered: Tensor = self.experts(u, dispatch, constants, watch)
        if constants:
            chosen = -2 - selected.reshape(-1)[dispatch.order[:constants]]
            ordered = torch.cat((self.constant_outputs(u[dispatch.tokens[:constants]], chosen), ordered))
        return ordered

    def constant_outputs(self, u: Tensor, chosen: Tensor) -> Tensor:
        """Return v_j + A_j B_j u for tokens u (n, width) and the constants j (n,) that they selected."""
        assert self.constants is not None
        outputs = self.constants[chosen].to(u.dtype)
        if self.constants_up is not None and self.constants_down is not None:
            up, down = self.constants_up.to(u.dtype), self.constants_down.to(u.dtype)
            for j in sorted(set(chosen.tolist())):
                tokens = chosen == j
                outputs[tokens] += u[tokens] @ down[j].T @ up[j].T
        return outputs

    def left_over(self, u: Tensor, weights: Tensor) -> Tensor | None:
        """Return (1 - Σ g) (c + L u) for tokens (T, width) and selected weights (T, k); None without either."""
        if self.residual_constant is None and self.residual_linear is None:
            return None
        added = torch.zeros_like(u)
        if self.residual_linear is not None:
            inputs = u.to(self.dtype or u.dtype)
            added = (inputs @ self.residual_linear.to(inputs.dtype).T).to(u.dtype)
        if self.residual_constant is not None:
            added = added + self.residual_constant
        return (1 - weights.sum(dim=1, keepdim=True)) * added

    def forward(
        self, u: Tensor, block: int, gamma: Tensor, observer: Observer | None, residual: Tensor | None = None
    ) -> Tensor:
        """Return the routed plus the shared output for u (N, tokens, width); other arguments are for the observer."""
        flat = u.reshape(-1, u.shape[-1])
        inputs = flat.to(self.dtype or u.dtype)
        routing: Routing = self.gate(flat)
        dispatch = Dispatch.of(routing.experts, len(self.experts))
        ordered = self.ordered_outputs(inputs, routing.experts, dispatch, _watcher(observer, block, routing))
        if observer is not None:
            observer(MoEEvent(block, flat, routing, dispatch.by_slot(ordered), gamma, residual))
        mixed = dispatch.weighted_sum(ordered, routing.weights)
        rest = self.left_over(flat, routing.weights)
        if rest is not None:
            mixed = mixed + rest
        shared: Tensor = self.shared_experts(inputs)
        return (mixed + shared).reshape(u.shape)
