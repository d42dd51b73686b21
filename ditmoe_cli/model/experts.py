"""Experts, and their matrices in one piece of memory, for fewer and larger products.

The gate and up projections of E experts of H neurons lie there as (E, 2 H, D), the down projections as (E, D, H);
parameters of experts are views. What lies together is told by addresses whenever it is used, so that a parameter which
was replaced meanwhile is never overlooked: its expert is then computed by its own matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.products import fuses, linear, linear_times, silu_linear
from ditmoe_cli.model import fused_kernels
from ditmoe_cli.model.linear import Linear


class SwiGLU(nn.Module):
    """An expert f(u) = W_down (SiLU(W_gate u) * W_up u), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def neurons(self, u: Tensor) -> Tensor:
        """Return φ = SiLU(W_gate u) * W_up u, (..., inner).

        One product computes it where the matrices lie together, and two that activate and multiply where these are
        faster.
        """
        both = paired(self)
        if both is not None and both.dtype == u.dtype:
            gate, up = both.chunk(2)
            return linear_times(u, up, silu_linear(u, gate)) if fuses(u, gate) else swiglu(linear(u, both))
        if _ours(self.gate_proj, self.up_proj):
            activated = silu_linear(u, _matrix(self.gate_proj, u.dtype))  # before the other is unpacked in its place
            return linear_times(u, _matrix(self.up_proj, u.dtype), activated)
        phi: Tensor = F.silu(self.gate_proj(u)).mul_(self.up_proj(u))
        return phi

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., width)."""
        out: Tensor = self.down_proj(self.neurons(u))
        return out


def swiglu(both: Tensor) -> Tensor:
    """Return SiLU(g) * h for g and h side by side, (..., 2 H)."""
    if fused_kernels.usable(both):
        return fused_kernels.swiglu(both)
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True)
class ExpertStack:
    """Matrices of E experts of equal shapes: gate above up (E, 2 H, D), and down (E, D, H)."""

    gate_up: Tensor
    down: Tensor


def reserve(experts: Sequence[SwiGLU], device: torch.device, dtype: torch.dtype) -> None:
    """Give plain experts, of any widths, uninitialised weights that lie together, expert after expert."""
    width = _weight(experts[0].gate_proj).shape[1] if experts else 0
    inners = [_weight(expert.gate_proj).shape[0] for expert in experts]
    gate_up = torch.empty(2 * sum(inners), width, device=device, dtype=dtype)
    down = torch.empty(width * sum(inners), device=device, dtype=dtype)
    row = 0
    for expert, inner in zip(experts, inners, strict=True):
        _set(expert.gate_proj, gate_up[2 * row : 2 * row + inner])
        _set(expert.up_proj, gate_up[2 * row + inner : 2 * (row + inner)])
        _set(expert.down_proj, down[row * width : (row + inner) * width].view(width, inner))
        row += inner


def paired(expert: SwiGLU) -> Tensor | None:
    """Return the gate projection above the up projection, (2 H, D), where they lie so in memory."""
    if not _plain(expert.gate_proj, expert.up_proj):
        return None
    gate, up = expert.gate_proj.weight, expert.up_proj.weight
    if not _follows(gate, up, gate.numel()) or gate.shape != up.shape:
        return None
    return gate.as_strided((2 * gate.shape[0], gate.shape[1]), (gate.shape[1], 1))


def stacked(experts: Sequence[SwiGLU]) -> ExpertStack | None:
    """Return the matrices of all experts, where they are of equal shapes and lie together in memory."""
    matrices = [(expert.gate_proj, expert.up_proj, expert.down_proj) for expert in experts]
    if not matrices or not all(_plain(*layers) for layers in matrices):
        return None
    weights = [[_weight(layer) for layer in layers] for layers in matrices]
    gate, _, down = weights[0]
    size = gate.numel()
    for e, (this_gate, this_up, this_down) in enumerate(weights):
        if (
            (this_gate.shape, this_up.shape, this_down.shape) != (gate.shape, gate.shape, down.shape)
            or not _follows(gate, this_gate, 2 * size * e)
            or not _follows(gate, this_up, size * (2 * e + 1))
            or not _follows(down, this_down, size * e)
        ):
            return None
    (inner, width), count = gate.shape, len(weights)
    return ExpertStack(
        gate.as_strided((count, 2 * inner, width), (2 * size, width, 1)),
        down.as_strided((count, width, inner), (size, inner, 1)),
    )


@dataclass(frozen=True)
class PackedStack:
    """Packed experts of equal shapes: (gate_0, up_0, gate_1, up_1, ...), and their down projections.

    Their matrices are unpacked one after the other, and those of `down` where the others were, unless both are kept; so
    these have to be used before.
    """

    gates_and_ups: tuple[PackedLinear, ...]
    downs: tuple[PackedLinear, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The width and the neurons of each expert."""
        return self.downs[0].shape

    def gate_up(self, dtype: torch.dtype) -> Tensor:
        """Return the gate projections above the up projections (E, 2 H, D)."""
        width, inner = self.sizes
        return self._together(self.gates_and_ups, dtype).view(-1, 2 * inner, width)

    def down(self, dtype: torch.dtype) -> Tensor:
        """Return the down projections (E, D, H)."""
        return self._together(self.downs, dtype).view(-1, *self.sizes)

    def _together(self, layers: tuple[PackedLinear, ...], dtype: torch.dtype) -> Tensor:
        return layers[0].unpacked.together(layers, dtype)


def packed_stack(experts: Sequence[SwiGLU]) -> PackedStack | None:
    """Return packed experts whose matrices, in whatever formats, are of equal shapes; None for others."""
    gates_and_ups = _packed(*(layer for expert in experts for layer in (expert.gate_proj, expert.up_proj)))
    downs = _packed(*(expert.down_proj for expert in experts))
    if not experts or len(downs) < len(experts) or len(gates_and_ups) < 2 * len(experts):
        return None
    if len({layer.shape for layer in gates_and_ups}) > 1 or len({layer.shape for layer in downs}) > 1:
        return None
    return PackedStack(gates_and_ups, downs)


def _packed(*layers: nn.Module) -> tuple[PackedLinear, ...]:
    """Return the layers that are packed."""
    return tuple(layer for layer in layers if isinstance(layer, PackedLinear))


def _follows(first: Tensor, later: Tensor, elements: int) -> bool:
    """Tell whether a contiguous matrix begins that many elements behind the beginning of another in its memory."""
    return (
        later.data_ptr() == first.data_ptr() + elements * first.element_size()
        and later.dtype == first.dtype
        and later.is_contiguous()
        and later.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


def _plain(*layers: nn.Module) -> bool:
    """Tell whether layers are ours, neither packed nor put in their place, and record no gradients.

    Gradients of matrices that are taken together would not reach the parameters that lie behind the first.
    """
    return all(type(layer) is Linear and not _weight(layer).is_mkldnn for layer in layers) and not (
        torch.is_grad_enabled() and any(_weight(layer).requires_grad for layer in layers)
    )


def _ours(*layers: nn.Module) -> bool:
    """Tell whether layers are ours, plain or packed, without biases."""
    return all(type(layer) in (Linear, PackedLinear) and getattr(layer, "bias", None) is None for layer in layers)


def _matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight of a layer of ours to multiply by."""
    assert isinstance(layer, Linear | PackedLinear)
    return layer.matrix(dtype)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return layer.weight


def _set(layer: nn.Module, value: Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(value, requires_grad=False)
