"""Experts' matrices that are stored as a base and compressed differences: put together."""

from __future__ import annotations

import torch
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.packing import pack_base3 as pack_ternary
from ditmoe_cli.formats.packing import unpack_base3 as unpack_ternary
from ditmoe_cli.formats.weights import Weight

__all__ = ["pack_ternary", "restored", "unpack_ternary"]


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
