"""Linear layers that keep their weights packed, in any number format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.formats.base import NumberFormat, Weight


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight packed and unpacks it for each multiplication.

    Its buffers are what the weight's format keeps in memory. Floating ones are held as the bits of their values, so
    that ``module.to(dtype)`` does not round them.
    """

    def __init__(self, weight: Weight, members: Mapping[str, Tensor], bias: bool) -> None:
        """Take over the stored tensors of `weight`, by name. The bias, if there is to be one, is left empty.

        Raises `BadInputError` that names a tensor whose bytes stand for no codes, or describe none.
        """
        super().__init__()
        assert isinstance(weight.stored_as, NumberFormat)
        packed = weight.stored_as.load(weight.info, members)
        self.format, self.shape = weight.stored_as.name, weight.info.shape
        self._unpack = packed.unpack
        self._dtypes = {name: tensor.dtype for name, tensor in packed.tensors.items()}
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, _bits(tensor))
        self.bias = nn.Parameter(torch.empty(self.shape[0]), requires_grad=False) if bias else None

    def weight(self) -> Tensor:
        """Return the unpacked weight (out, in) in fp32."""
        return self._unpack({name: bits.view(self._dtypes[name]) for name, bits in self.named_buffers(recurse=False)})

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, computed in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight().to(x.dtype), bias)


def _bits(tensor: Tensor) -> Tensor:
    """Return floating values as integers of their size."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.int16 if tensor.dtype == torch.float16 else torch.int32)
