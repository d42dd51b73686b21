"""Bytes as a tensor in the same memory, such as that of a mapped file."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def shared_bytes(data: memoryview) -> Tensor:
    """Return bytes, at least one, as a tensor uint8 (n,) in the same memory. Writing to a mapped file is a crash."""
    import numpy as np
    import torch

    # torch warns of memory that may not be written, unless it comes as an address
    memory = (ctypes.c_char * data.nbytes).from_address(np.frombuffer(data, np.uint8).ctypes.data)
    memory.owner = data  # type: ignore[attr-defined]  # which lives as long as the tensor
    return torch.frombuffer(memory, dtype=torch.uint8)
