"""bitsandbytes' CUDA kernel for NF4 and FP4 weights, used where it is installed, right and faster than our unpacking.

Both are measured: the first weight of each shape and format on a device is unpacked in both ways, and the kernel
unpacks all further weights of that shape and format if it gave the same values in less time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Unpack = Callable[[], Tensor]
Kind = tuple[str, tuple[int, ...], int, str]  # format, shape, block, device
_ROUNDS = 3
_TOLERANCE = 1e-6  # of the largest weight: the order of a multiplication

_preferred: dict[Kind, bool] = {}


@dataclass(frozen=True)
class FourBitTensors:
    """A packed weight as the kernel takes it.

    Attributes:
        packed: its bytes, two codes each.
        absmax: (⌈out · in / block⌉,), fp32.
        codes: the values of the 16 codes, fp32.
        kind: ``nf4`` or ``fp4``.
        shape: out, in.
        block: weights that share an absmax.
    """

    packed: Tensor
    absmax: Tensor
    codes: Tensor
    kind: str
    shape: tuple[int, ...]
    block: int


def unpack_fastest(ours: Unpack, weight: FourBitTensors) -> Tensor:
    """Return a weight (out, in) in fp32, unpacked by `ours` or by bitsandbytes' kernel."""
    functional = bitsandbytes() if weight.packed.is_cuda else None
    if functional is None:
        return ours()

    def theirs() -> Tensor:
        state = functional.QuantState(
            absmax=weight.absmax,
            shape=torch.Size(weight.shape),
            code=weight.codes,
            blocksize=weight.block,
            quant_type=weight.kind,
            dtype=torch.float32,
        )
        values: Tensor = functional.dequantize_4bit(weight.packed, state)
        return values

    key = (weight.kind, weight.shape, weight.block, str(weight.packed.device))
    if key not in _preferred:
        _preferred[key] = is_right_and_faster(ours, theirs)
    return theirs() if _preferred[key] else ours()


def is_right_and_faster(ours: Unpack, theirs: Unpack, clock: Callable[[], float] | None = None) -> bool:
    """Return whether `theirs` gives the values of `ours` in less time; False where it fails."""
    expected = ours()
    try:
        values = theirs()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False
    scale = float(expected.abs().max())
    if values.shape != expected.shape or not bool(((values - expected).abs() <= _TOLERANCE * scale).all()):
        return False
    return _seconds(theirs, clock or _clock) < _seconds(ours, clock or _clock)


def _seconds(unpack: Unpack, clock: Callable[[], float]) -> float:
    """Return the least time of a few rounds."""
    times = []
    for _ in range(_ROUNDS):
        start = clock()
        unpack()
        times.append(clock() - start)
    return min(times)


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@lru_cache(maxsize=1)
def bitsandbytes() -> Any | None:
    """Return bitsandbytes' functions; None where it is not installed or cannot be used here."""
    try:
        from bitsandbytes import functional
    except (ImportError, RuntimeError, OSError):
        return None
    return functional
