"""Experts' matrices that are stored as a base and compressed differences: put together, and ternary codes packed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.checkpoint.formats import TERNARY_PER_BYTE, Weight, ternary_bytes
from ditmoe_cli.checkpoint.reader import torch_dtype
from ditmoe_cli.errors import BadInputError

_CELLS = 3**TERNARY_PER_BYTE


def restored(weight: Weight, members: dict[str, Tensor]) -> Tensor:
    """Return an expert's matrix (out, in), base + left right or base + scale · codes, in its logical dtype.

    Computed in fp32, or in fp64 if that is the dtype. Raises `BadInputError` for bytes that stand for no codes.
    """
    dtype = torch_dtype(weight.info.dtype)
    base, first, second = (members[name] for name in weight.members)
    wide = torch.promote_types(dtype, torch.float32)
    if weight.format == "svd":
        return torch.addmm(base.to(wide), first.to(wide), second.to(wide)).to(dtype)
    try:
        codes = unpack_ternary(first, weight.info.shape)
    except BadInputError as error:
        raise BadInputError(f"tensor {weight.members[1]!r}: {error}") from None
    return (base.to(wide) + codes * second.to(wide)).to(dtype)


def pack_ternary(codes: Tensor) -> Tensor:
    """Return ⌈n / 5⌉ bytes that hold n codes of any shape: Σ_i (c_i + 1) 3^i over five at a time, padded with 0."""
    flat = codes.reshape(-1)
    digits = F.pad(flat, (0, -flat.numel() % TERNARY_PER_BYTE)).reshape(-1, TERNARY_PER_BYTE).int() + 1
    return (digits * _powers(codes.device)).sum(dim=1).to(torch.uint8)


def unpack_ternary(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the int8 codes of `shape` that bytes hold.

    Raises `BadInputError` where their number does not fit the shape, or one stands for no codes.
    """
    size = math.prod(shape)
    if packed.shape != (ternary_bytes(size),):
        raise BadInputError(
            f"ternary codes: {packed.numel()} bytes for shape {list(shape)}, which takes {ternary_bytes(size)}"
        )
    if size and int(packed.max()) >= _CELLS:
        raise BadInputError(f"ternary codes: byte {int(packed.max())} stands for no five codes (at most {_CELLS - 1})")
    cells = torch.arange(_CELLS, device=packed.device).unsqueeze(1) // _powers(packed.device) % 3 - 1
    return cells.to(torch.int8)[packed.int()].reshape(-1)[:size].reshape(shape)


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(TERNARY_PER_BYTE, device=device)
