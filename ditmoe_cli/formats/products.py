"""Products of activations and weights, by the library that computes them fastest.

torch leaves fp32 on a CPU to MKL, which has no AVX-512 kernels for processors that are not Intel's, and gives half
precision to oneDNN by a way that prepares more for each new number of rows. `linear` calls oneDNN's linear layer
itself. oneDNN compiles a kernel for each shape and keeps the last thousand, so where numbers of rows differ from call
to call, as of tokens that select an expert, rows are best rounded up by `padded_rows`.

oneDNN also applies SiLU, or multiplies by another tensor, before it writes a product, whose values are then rounded
once less. `silu_linear` and `linear_times` have it do so where `fuses` tells it.

For each product oneDNN lays the weight out anew, which takes as long as multiplying it by some twenty tokens.
`prepacked` does so once; products are the same to the last bit from two rows on.
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
LEAST_PACKED = 2**17  # entries of a matrix that oneDNN multiplies for any number of rows, so that it may be prepacked
_USUAL_ROWS = 512  # that matrices are laid out for; others take the same layout


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b of tokens x (..., in), a weight (out, in) and a bias (out,), all of one dtype.

    The weight may be what `prepacked` returned. Where gradients are recorded, in compiled code, and on devices other
    than the CPU, torch chooses how.
    """
    if _by_onednn(x, weight, bias) and _onednn(x.dtype):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight.to_dense() if weight.is_mkldnn else weight, bias)


def prepacked(weight: Tensor) -> Tensor:
    """Return a weight (out, in), laid out for products: nothing but these and ``to_dense`` can read it then.

    Small ones, those of dtypes that oneDNN is not asked for, and those on other devices are returned as they are.
    """
    if weight.is_mkldnn or not weight.is_cpu or weight.numel() < LEAST_PACKED or not _onednn_packs(weight.dtype):
        return weight
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)
    return packed


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
    square = x.shape[-1] ** 2
    is_small = rows * square < LEAST_SQUARE and square < LEAST_PACKED // 4  # experts are mostly four times as wide
    if not x.is_cpu or is_small or not _onednn(x.dtype):
        return rows
    return -(-rows // ROW_STEP) * ROW_STEP


def _by_onednn(x: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    """Tell whether a product, to which something is added or multiplied, is one for oneDNN, where torch has it."""
    if not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype) or torch.compiler.is_compiling():
        return False  # compiled code takes this operation for constant weights alone
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, other)):
        return False
    if not (weight.is_mkldnn or weight.is_contiguous()):
        return False  # a part of a wider matrix, which oneDNN multiplies some hundred times as slowly
    least = LEAST_MULTIPLICATIONS if x.dtype == torch.float32 else LEAST_HALF_MULTIPLICATIONS
    return weight.numel() >= LEAST_PACKED or x.numel() * weight.shape[0] >= least


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


@cache
def _onednn_packs(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's linear layer takes weights that were laid out before."""
    if not _onednn(dtype):
        return False
    x, weight = torch.ones(2, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)
        out = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return packed.is_mkldnn and torch.equal(packed.to_dense(), weight) and torch.equal(out, torch.full_like(out, 64.0))
