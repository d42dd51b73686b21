"""Products of activations and weights, by the library that computes them fastest.

torch leaves fp32 on a CPU to MKL, which has no AVX-512 kernels for processors that are not Intel's, and gives half
precision to oneDNN by a way that prepares more for each new number of rows. `linear` calls oneDNN's linear layer
itself. oneDNN compiles a kernel for each shape and keeps the last thousand, so where numbers of rows differ from call
to call, as of tokens that select an expert, rows are best rounded up by `padded_rows`.

oneDNN also applies SiLU, or multiplies by another tensor, before it writes a product, while its values are in registers:
in half precision they are rounded once less. `silu_linear` and `linear_times` do so where `fuses` tells it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_STEP = 16
LEAST_SQUARE = 2**22  # multiplications by a square matrix, from which rows are rounded up
LEAST_MULTIPLICATIONS = 2**24  # of products in fp32: smaller ones do not pay for kernels of their own
LEAST_HALF_MULTIPLICATIONS = 2**12  # of products in half precision: torch itself computes smaller ones


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b of tokens x (..., in), a weight (out, in) and a bias (out,), all of one dtype.

    Where gradients are recorded, and on devices other than the CPU, torch chooses how.
    """
    if _by_onednn(x, weight, bias) and _onednn(x.dtype):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def silu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return SiLU(x Wᵀ) of tokens x (..., in) and a weight (out, in) of one dtype."""
    if fuses(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "swish", [], "")
        return out
    return F.silu(linear(x, weight))


def linear_times(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Return x Wᵀ ⊙ f of tokens x (..., in), a weight (out, in) and f (..., out), all of one dtype."""
    if fuses(x, weight, factor):
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, None, "mul")
        return out
    return linear(x, weight).mul_(factor)


def fuses(x: Tensor, weight: Tensor, factor: Tensor | None = None) -> bool:
    """Return whether `silu_linear` and `linear_times` of x (..., in) and a weight (out, in) are one operation each."""
    return _by_onednn(x, weight, factor) and _onednn_fused(x.dtype)


def padded_rows(rows: int, x: Tensor) -> int:
    """Return how many rows to multiply where `rows` of x (..., in) are asked for: more where products are large."""
    if not x.is_cpu or rows * x.shape[-1] ** 2 < LEAST_SQUARE or not _onednn(x.dtype):
        return rows
    return -(-rows // ROW_STEP) * ROW_STEP


def _by_onednn(x: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    """Tell whether a product, to which something is added or multiplied, is one for oneDNN, where torch has it."""
    if not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype):
        return False
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, other)):
        return False
    least = LEAST_MULTIPLICATIONS if x.dtype == torch.float32 else LEAST_HALF_MULTIPLICATIONS
    return x.numel() * weight.shape[0] >= least


@cache
def _onednn(dtype: torch.dtype) -> bool:
    """Tell whether torch has oneDNN's linear layer for a dtype: it is no public function, so it is tried out."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((2, 3), (4, 3), (4,)))
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return torch.equal(out, torch.full((2, 4), 4.0, dtype=dtype))


@cache
def _onednn_fused(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's linear layer takes SiLU and a factor."""
    if not _onednn(dtype):
        return False
    x, weight, factor = (torch.ones(shape, dtype=dtype) for shape in ((2, 3), (4, 3), (2, 4)))
    try:
        activated = torch.ops.mkldnn._linear_pointwise(x, weight, None, "swish", [], "")
        multiplied = torch.ops.mkldnn._linear_pointwise.binary(x, 2 * factor, weight, None, "mul")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    near = torch.allclose(activated, F.silu(3 * factor), rtol=4 * torch.finfo(dtype).eps)
    return near and torch.equal(multiplied, 6 * factor)
