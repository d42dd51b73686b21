"""Tensors in another dtype than they are stored in, cast one at a time as they are read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.finite import all_finite
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import TensorReader, tensor_bytes, torch_dtype

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_MOST_LOST = 0.01  # of a tensor's norm; bf16 rounds by 0.2 %, fp16 by 0.03 % where it does not underflow
_PART = 2**16  # elements worked on at a time: their doubles stay in a core's cache


@dataclass(frozen=True)
class CastReader:
    """Read tensors by another reader, and those of `casts` in the dtypes of these codes.

    Raises `BadInputError`, naming file, tensor and value, where a value exceeds the dtype's range, and where a tensor
    loses more than a hundredth of its norm because its values are too small for the dtype.
    """

    reader: TensorReader
    casts: Mapping[str, TensorInfo]
    path: Path

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor; from fp64 to fp32 without torch."""
        info = self.casts.get(name)
        if info is None:
            return self.reader.raw(name)
        stored = self.reader.raw(name)
        if info.dtype == "F32" and info.numel and stored.nbytes == 2 * info.nbytes:
            return memoryview(array("f", stored.cast("d"))).cast("B")
        return tensor_bytes(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        stored = self.reader.tensor(name)
        if name not in self.casts:
            return stored
        try:
            return checked_cast(stored, torch_dtype(self.casts[name].dtype))
        except ValueError as error:
            raise BadInputError(f"{self.path}: tensor {name!r} {error}; choose a wider dtype") from None


def checked_cast(tensor: torch.Tensor, dtype: torch.dtype, keeps_small: bool = True) -> torch.Tensor:
    """Return a floating tensor in a dtype of `DTYPES`; infinite values and NaN stay what they are.

    Raises `ValueError`, which tells what the tensor does, where a value exceeds the dtype's range, and, if it
    `keeps_small` values, where it loses more than a hundredth of its norm because they are too small for the dtype.
    """
    import torch

    cast = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    name = next(name for name, code in DTYPES.items() if torch_dtype(code) == dtype)
    square = lost_square = 0.0
    for part, kept in zip(torch.split(tensor.reshape(-1), _PART), torch.split(cast.view(-1), _PART), strict=True):
        kept.copy_(part)
        if not all_finite(kept) and bool((lost := part.isfinite() & ~kept.isfinite()).any()):
            value = float(part[lost][0])
            raise ValueError(f"holds {value:g}, beyond the {torch.finfo(dtype).max:.5g} that {name} can hold")
        if keeps_small and tensor.dtype != dtype:
            wide = part.double()
            difference = kept.double().sub_(wide)
            square += float(wide.dot(wide))
            lost_square += float(difference.dot(difference))
    share = math.sqrt(lost_square / square) if square and math.isfinite(square) else 0.0
    if share > _MOST_LOST:
        raise ValueError(f"would lose {share:.0%} of its norm in {name}, which cannot hold values as small")
    return cast


def doubles_as_floats(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the fp64 tensors described as fp32, as which ditmoe takes them everywhere."""
    return {name: replace(info, dtype="F32") for name, info in tensors.items() if info.dtype == "F64"}
