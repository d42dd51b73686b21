"""Element-wise work of a block on a GPU, each in one kernel: written in Triton, which comes with torch for CUDA.

Between products a block reads and writes its tokens some thirty times where each operation has a kernel of its own; on
an H200 that took 40 % of an XL block's time in bf16, and 12 % so. Values are computed in fp32, and rounded once.

Each function has a plain twin in the model, which the CPU, other dtypes and training take: `usable` tells.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_COLUMNS = 1024  # of a SwiGLU that one program computes
_WARPS = 4


def usable(*tensors: Tensor) -> bool:
    """Return whether tensors are on the current GPU, where kernels start, record no gradient, and Triton is there."""
    if not all(tensor.is_cuda for tensor in tensors):
        return False
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not recorded and tensors[0].device.index == torch.cuda.current_device() and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def swiglu(both: Tensor) -> Tensor:
    """Return SiLU(g) * h (n, H) for g and h side by side (n, 2 H), in their dtype."""
    flat = both.reshape(-1, both.shape[-1]).contiguous()
    inner = flat.shape[1] // 2
    out = torch.empty(len(flat), inner, dtype=both.dtype, device=both.device)
    if out.numel():
        grid = (len(flat), -(-inner // _COLUMNS))
        _kernels().swiglu[grid](flat, out, inner, BLOCK=_COLUMNS, num_warps=_WARPS)
    return out.reshape(*both.shape[:-1], inner)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift in `dtype` for x (N, P, D); shift and scale (N, D); all of them fp32."""
    images, patches, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _kernels().modulated_norm[(images * patches,)](
        x.contiguous(),
        shift,
        scale,
        out,
        shift.stride(0),
        scale.stride(0),
        patches,
        width,
        eps,
        BLOCK=_power_of_two(width),
        num_warps=_WARPS,
    )
    return out


def gated_sum(residual: Tensor, gate: Tensor, added: Tensor) -> Tensor:
    """Return residual + gate ⊙ added for residual (N, P, D) and gate (N, D), both fp32, and any added (N, P, D)."""
    images, patches, width = residual.shape
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _kernels().gated_sum[(images * patches,)](
        residual.contiguous(),
        gate,
        added.contiguous(),
        out,
        gate.stride(0),
        patches,
        width,
        BLOCK=_power_of_two(width),
        num_warps=_WARPS,
    )
    return out


def weighted_sum(ordered: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_s w_s f_s (T, D) in fp32 over the slots s of weights (T, k).

    `inverse` (T k,) is the row of `ordered` (T k, D) that holds each slot's f.
    """
    tokens, top_k = weights.shape
    width = ordered.shape[1]
    out = torch.empty(tokens, width, dtype=torch.float32, device=ordered.device)
    _kernels().weighted_sum[(tokens,)](
        ordered.contiguous(),
        inverse,
        weights.contiguous(),
        out,
        width,
        TOP_K=top_k,
        BLOCK=_power_of_two(width),
        num_warps=_WARPS,
    )
    return out


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@cache
def _kernels() -> Any:
    """Return the module of the kernels, which Triton reads by their source."""
    from ditmoe_cli.model import triton_kernels

    return triton_kernels
