"""Tensors in another dtype than they are stored in, cast one at a time as they are read."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import TensorReader, tensor_bytes, torch_dtype

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_NAMES: Mapping[str, str] = {code: name for name, code in DTYPES.items()}
_LARGEST: Mapping[str, str] = {"F32": "3.4e38", "BF16": "3.39e38", "F16": "65504"}
_MOST_LOST = 0.01  # of a tensor's norm; bf16 rounds by 0.2 %, fp16 by 0.03 % where it does not underflow


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
        return self._checked(name, stored, stored.to(torch_dtype(self.casts[name].dtype)))

    def _checked(self, name: str, stored: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
        code = self.casts[name].dtype
        lost = stored.isfinite() & ~cast.isfinite()
        if bool(lost.any()):
            value = float(stored[lost].reshape(-1)[0])
            raise BadInputError(
                f"{self.path}: tensor {name!r} holds {value:g}, beyond the {_LARGEST[code]} that {_NAMES[code]} can "
                "hold; choose a wider dtype"
            )
        norm = float(stored.double().norm())
        share = float((cast.double() - stored.double()).norm()) / norm if norm and norm == norm else 0.0
        if share > _MOST_LOST:
            raise BadInputError(
                f"{self.path}: tensor {name!r} would lose {share:.0%} of its norm in {_NAMES[code]}, which cannot hold "
                "values as small; choose a wider dtype"
            )
        return cast


def doubles_as_floats(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the fp64 tensors described as fp32, as which ditmoe takes them everywhere."""
    return {name: replace(info, dtype="F32") for name, info in tensors.items() if info.dtype == "F64"}
