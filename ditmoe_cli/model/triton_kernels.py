# mypy: ignore-errors
"""Kernels in Triton's language, which `fused_kernels` starts. One program takes one token, or a part of its neurons."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu(both, out, inner, BLOCK: tl.constexpr):
    """Compute SiLU(g) * h of the row that is the first program number."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(both + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * inner + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def modulated_norm(x, shift, scale, out, shift_row, scale_row, patches, width, eps, BLOCK: tl.constexpr):
    """Normalise one token, scale and shift it by its image's modulation."""
    row = tl.program_id(0).to(tl.int64)
    image = row // patches
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    normed = centred / tl.sqrt(variance + eps)
    factor = 1.0 + tl.load(scale + image * scale_row + column, mask=inside, other=0.0)
    result = normed * factor + tl.load(shift + image * shift_row + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_sum(residual, gate, added, out, gate_row, patches, width, BLOCK: tl.constexpr):
    """Add what an image's gate lets pass to one token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(added + row * width + column, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + (row // patches) * gate_row + column, mask=inside, other=0.0)
    total = tl.load(residual + row * width + column, mask=inside, other=0.0) + opened * value
    tl.store(out + row * width + column, total, mask=inside)


@triton.jit
def weighted_sum(ordered, inverse, weights, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the outputs of one token's experts by their routing weights."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        place = tl.load(inverse + token * TOP_K + slot)
        weight = tl.load(weights + token * TOP_K + slot)
        total += weight * tl.load(ordered + place * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total, mask=inside)
