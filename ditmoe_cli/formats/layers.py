"""Linear layers that keep their weights packed, in any number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self, cast

import torch
from torch import Tensor, nn

from ditmoe_cli.formats.base import NumberFormat, Weight
from ditmoe_cli.formats.products import linear
from ditmoe_cli.formats.unpacked_weights import UnpackedWeights


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight packed, and unpacks it where `unpacked` keeps no matrix of it.

    Its buffers are what the weight's format keeps in memory. Floating ones are held as the bits of their values, so
    that ``module.to(dtype)`` does not round them.
    """

    def __init__(
        self, weight: Weight, members: Mapping[str, Tensor], bias: bool, unpacked: UnpackedWeights | None = None
    ) -> None:
        """Take over the stored tensors of `weight`, by name. The bias, if there is to be one, is left empty.

        `unpacked` holds the matrices of all layers of a model; without it, nothing is kept.

        Raises `BadInputError` that names a tensor whose bytes stand for no codes, or describe none.
        """
        super().__init__()
        assert isinstance(weight.stored_as, NumberFormat)
        packed = weight.stored_as.load(weight.info, members)
        self.format, self.shape = weight.stored_as.name, weight.info.shape
        self.unpacked = UnpackedWeights(0) if unpacked is None else unpacked
        self._unpack = packed.unpack
        self._dtypes = {name: tensor.dtype for name, tensor in packed.tensors.items()}
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, _bits(tensor))
        self.bias = nn.Parameter(torch.empty(self.shape[0]), requires_grad=False) if bias else None

    @property
    def device(self) -> torch.device:
        """The device of the packed tensors."""
        return next(self.buffers(recurse=False)).device

    def weight(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Return the weight (out, in) in `dtype`, unpacked in fp32 and rounded: `out`, where that is given.

        `out` may be any tensor of this shape on this device, as a part of the matrices of a block; its dtype counts.
        """
        matrix = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        self._unpack({name: bits.view(self._dtypes[name]) for name, bits in self.named_buffers(recurse=False)}, matrix)
        return matrix

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return `weight` to multiply by: kept, or unpacked where the next layer of this thread unpacks its own."""
        return self.unpacked.matrix(self, dtype)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Move or cast the packed tensors, as ``to`` does, without what is kept of them."""
        self.unpacked.forget(self)
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, computed in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.matrix(x.dtype), bias)


def _bits(tensor: Tensor) -> Tensor:
    """Return floating values as integers of their size."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.int16 if tensor.dtype == torch.float16 else torch.int32)
