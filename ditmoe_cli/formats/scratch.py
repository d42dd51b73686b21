"""Tensors to work in, which each thread keeps: clearing fresh pages takes longer than the arithmetic in them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_KEPT_BYTES = 16 << 20  # of one tensor, at most


class _Kept(threading.local):
    """The bytes that this thread works in, by their use."""

    def __init__(self) -> None:
        self.by_use: dict[str, Tensor] = {}


_kept = _Kept()


def scratch(use: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of undefined values, which holds until this thread asks for the same `use` again.

    On other devices than the CPU it is a fresh one: torch keeps their memory itself.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size > _KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    kept = _kept.by_use.get(use)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):  # so that it may be written to outside of that mode too
            kept = _kept.by_use[use] = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).reshape(shape)
