"""Ways to compute the routed experts of a block; all take tokens in the same order and agree within rounding.

| backend | takes | host waits for the device |
|---|---|---|
| `GroupedExperts` | experts of equal widths, plain or packed, where grouped products are fast | never |
| `LoopedExperts` | all others: ragged widths, CPUs, fp32 on a GPU | once a block |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.formats.products import ROW_STEP, padded_rows
from ditmoe_cli.model import fused_kernels
from ditmoe_cli.model.experts import SwiGLU, packed_stack, stacked, swiglu

NeuronWatcher = Callable[[int, Tensor, Tensor], None]
"""Is shown an expert's number, the slots (n,) that selected it, and its neurons φ (n, inner)."""

ROW_BYTES = 16  # rows of matrices in grouped products begin at multiples of this


@dataclass(frozen=True)
class Dispatch:
    """The slots of T tokens, k each, in the order of the experts that they selected; slots of constants come first.

    Attributes:
        order: (T k,) index of each slot in the flattened (T, k).
        tokens: (T k,) the token of each slot.
        ends: (E,) where the slots of each expert end, int32.
        top_k: k.
        dropped: (T, k) slots that are not computed, behind all others in `order`; None where all are.
    """

    order: Tensor
    tokens: Tensor
    ends: Tensor
    top_k: int
    dropped: Tensor | None = None

    @classmethod
    def of(cls, selected: Tensor, experts: int, dropped: Tensor | None = None) -> Dispatch:
        """Return the dispatch of selections (T, k): an expert e >= 0, or a constant below 0.

        The first slot of a token is never among the `dropped` ones.
        """
        if dropped is not None:
            selected = selected.masked_fill(dropped, experts)
        slots, order = selected.reshape(-1).sort(stable=True)
        numbers = torch.arange(experts, device=selected.device)
        ends = torch.searchsorted(slots, numbers, right=True).to(torch.int32)
        return cls(order, order // selected.shape[1], ends, selected.shape[1], dropped)

    @cached_property
    def inverse(self) -> Tensor:
        """(T k,) the place of each slot in `order`; of a dropped one that of its token's first slot."""
        count = torch.arange(len(self.order), device=self.order.device)
        places = torch.empty_like(self.order).scatter_(0, self.order, count)
        if self.dropped is None:
            return places
        by_token = places.view(-1, self.top_k)
        return torch.where(self.dropped, by_token[:, :1], by_token).reshape(-1)

    def by_slot(self, ordered: Tensor) -> Tensor:
        """Return rows (T k, D) in the order of the dispatch as (T, k, D)."""
        return ordered[self.inverse].reshape(-1, self.top_k, ordered.shape[1])

    def weighted_sum(self, ordered: Tensor, weights: Tensor) -> Tensor:
        """Return Σ_k w_k f_k (T, D) of rows (T k, D) in the order of the dispatch, in the dtype of weights w (T, k)."""
        if weights.dtype == torch.float32 and fused_kernels.usable(ordered, weights):
            return fused_kernels.weighted_sum(ordered, self.inverse, weights)
        if weights.is_cpu and weights.dtype == torch.float32 and not ordered.requires_grad:
            places = self.inverse.view(-1, self.top_k)
            return F.embedding_bag(places, ordered.float(), per_sample_weights=weights, mode="sum")
        outputs = self.by_slot(ordered)
        total = weights[:, :1] * outputs[:, 0]
        for slot in range(1, self.top_k):
            total = torch.addcmul(total, weights[:, slot : slot + 1], outputs[:, slot])
        return total

    def ranges(self, constants: int) -> list[slice]:
        """Return the slots of each expert; waits for the device. The first `constants` slots are of constants."""
        ends = [constants, *self.ends.tolist()]
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


class MixtureBackend(Protocol):
    """A way to compute routed experts; it `waits` where the host must know how many tokens each expert gets."""

    name: str
    waits: bool

    def accepts(self, experts: list[SwiGLU], u: Tensor) -> bool:
        """Return whether it computes these experts for tokens u (T, width)."""

    def outputs(
        self, experts: list[SwiGLU], u: Tensor, dispatch: Dispatch, constants: int, watch: NeuronWatcher | None
    ) -> Tensor:
        """Return each slot's f_e(u) in the order of the dispatch, without the first `constants` slots."""


class LoopedExperts:
    """Each expert runs once, on the tokens that selected it.

    Where rows are rounded up for faster products, the slots that follow are computed too, and left out.
    """

    name = "loop"
    waits = True

    def accepts(self, experts: list[SwiGLU], u: Tensor) -> bool:
        """Return True."""
        del experts, u
        return True

    def outputs(
        self, experts: list[SwiGLU], u: Tensor, dispatch: Dispatch, constants: int, watch: NeuronWatcher | None
    ) -> Tensor:
        """Return each slot's f_e(u) in the order of the dispatch, without the first `constants` slots."""
        parts, tokens = [u[:0]], F.pad(dispatch.tokens, (0, ROW_STEP))
        for e, (expert, slots) in enumerate(zip(experts, dispatch.ranges(constants), strict=True)):
            if slots.start == slots.stop:
                continue
            rows = slots.stop - slots.start
            phi = expert.neurons(u[tokens[slots.start : slots.start + padded_rows(rows, u)]])
            if watch is not None:
                watch(e, dispatch.order[slots], phi[:rows])
            parts.append(expert.down_proj(phi)[:rows])
        return torch.cat(parts)


class GroupedExperts:
    """All experts run in two grouped products (`torch.nn.functional.grouped_mm`), which read offsets on the device.

    These take bf16 on GPUs of compute capability 8.0 and above. Rows of all matrices begin at multiples of `ROW_BYTES`;
    groups may begin anywhere.
    """

    name = "grouped"
    waits = False

    def accepts(self, experts: list[SwiGLU], u: Tensor) -> bool:
        """Return whether experts can lie together, and products of their dtype and widths are fast on the device."""
        if not u.is_cuda or u.dtype != torch.bfloat16 or _capability(u.device) < (8, 0):
            return False
        found = _matrices(experts, u.dtype)
        return found is not None and all(size * u.element_size() % ROW_BYTES == 0 for size in found.sizes)

    def outputs(
        self, experts: list[SwiGLU], u: Tensor, dispatch: Dispatch, constants: int, watch: NeuronWatcher | None
    ) -> Tensor:
        """Return each slot's f_e(u) in the order of the dispatch, without the first `constants` slots."""
        matrices = _matrices(experts, u.dtype)
        assert matrices is not None
        ends = dispatch.ends - constants
        both = F.grouped_mm(u[dispatch.tokens[constants:]], matrices.gate_up().mT, offs=ends)
        phi = swiglu(both)
        if watch is not None:
            for e, slots in enumerate(dispatch.ranges(constants)):
                if slots.start != slots.stop:
                    watch(e, dispatch.order[slots], phi[slots.start - constants : slots.stop - constants])
        return F.grouped_mm(phi, matrices.down().mT, offs=ends)


@dataclass(frozen=True)
class _Matrices:
    """The matrices of experts that lie together, asked for in this order, since packed ones unpack in turns.

    Attributes:
        sizes: D and H.
        gate_up: returns the gate projections above the up projections, (E, 2 H, D).
        down: returns the down projections, (E, D, H).
    """

    sizes: tuple[int, ...]
    gate_up: Callable[[], Tensor]
    down: Callable[[], Tensor]


def _matrices(experts: list[SwiGLU], dtype: torch.dtype) -> _Matrices | None:
    """Return the matrices of experts in `dtype`; None where they cannot lie together, or are plain in another one."""
    packed = packed_stack(experts)
    if packed is not None:
        return _Matrices(packed.sizes, partial(packed.gate_up, dtype), partial(packed.down, dtype))
    stack = stacked(experts)
    if stack is None or stack.down.dtype != dtype:
        return None
    return _Matrices(tuple(stack.down.shape[1:]), lambda: stack.gate_up, lambda: stack.down)


BACKENDS: tuple[MixtureBackend, ...] = (GroupedExperts(), LoopedExperts())


def backend_for(experts: list[SwiGLU], u: Tensor) -> MixtureBackend:
    """Return the first backend that computes these experts for tokens u (T, width)."""
    return next(backend for backend in BACKENDS if backend.accepts(experts, u))


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
