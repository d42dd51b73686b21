"""bitsandbytes' kernels that unpack NF4 and FP4 weights, used where they are installed, right and faster than ours.

Both are measured: the first weight of each shape and format that is unpacked to a dtype on a device is unpacked in both
ways, and the kernel unpacks all further ones if it gave the same bits in less time. What is unpacked thus never depends
on which of them was faster. Its kernels know no other codebooks than the usual ones, so weights of others never reach
it. Its products of packed weights (``matmul_4bit``) are not used: their sums have another order.

On a GPU its functions are called. On the CPU these would take two seconds to import, for torch's compiler, and write to
a tensor of their own; so the functions of its library are called as it calls them, in the versions that were checked.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Unpack = Callable[[Tensor], None]  # into the tensor that is given
Kind = tuple[str, torch.Size, int, torch.dtype, str]  # format, shape, block, dtype, device
_ROUNDS = 3
_CHECKED = ("0.50.",)  # versions whose library for the CPU takes the arguments that `_on_cpu` gives
_ENDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_preferred: dict[Kind, bool] = {}


@dataclass(frozen=True)
class FourBitTensors:
    """A packed weight as the kernels take it.

    Attributes:
        packed: its bytes, two codes each.
        absmax: (⌈out · in / block⌉,), fp32.
        kind: ``nf4`` or ``fp4``, of the usual codebook.
        block: weights that share an absmax.
    """

    packed: Tensor
    absmax: Tensor
    kind: str
    block: int


def unpack_fastest(ours: Unpack, weight: FourBitTensors, out: Tensor) -> None:
    """Write a weight into `out` (out, in), unpacked by `ours` or by bitsandbytes' kernel."""
    theirs = kernel(weight, out)
    if theirs is None:
        ours(out)
        return
    key = (weight.kind, out.shape, weight.block, out.dtype, str(out.device))
    if key not in _preferred:
        _preferred[key] = is_right_and_faster(ours, theirs, out)
    (theirs if _preferred[key] else ours)(out)


def kernel(weight: FourBitTensors, out: Tensor) -> Unpack | None:
    """Return the kernel that unpacks a weight into tensors like `out`; None where there is none.

    That on the CPU mistakes the blocks of rows that are not whole ones.
    """
    if out.dtype not in _ENDS or not out.is_contiguous():
        return None
    if out.device.type == "cuda":
        functional = bitsandbytes()
        return None if functional is None else _on_gpu(functional, weight)
    if out.device.type == "cpu" and out.shape[1] % weight.block == 0:
        library = cpu_library()
        return None if library is None else _on_cpu(library, weight, out.dtype)
    return None


def _on_gpu(functional: Any, weight: FourBitTensors) -> Unpack:
    def unpack(out: Tensor) -> None:
        state = functional.QuantState(
            absmax=weight.absmax, shape=out.shape, blocksize=weight.block, quant_type=weight.kind, dtype=out.dtype
        )
        functional.dequantize_4bit(weight.packed, state, out=out)

    return unpack


def _on_cpu(library: Any, weight: FourBitTensors, dtype: torch.dtype) -> Unpack | None:
    name = f"cdequantize_blockwise_cpu_{weight.kind}_{_ENDS[dtype]}"
    function = getattr(library, name, None)
    if function is None or not weight.packed.is_contiguous() or not weight.absmax.is_contiguous():
        return None

    def unpack(out: Tensor) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight.packed, weight.absmax, out)]
        function(*pointers, *map(ctypes.c_longlong, (weight.block, *out.shape)))

    return unpack


def is_right_and_faster(ours: Unpack, theirs: Unpack, out: Tensor, clock: Callable[[], float] | None = None) -> bool:
    """Return whether `theirs` writes the values of `ours` into tensors like `out` in less time; False if it fails."""
    expected, values = torch.empty_like(out), torch.empty_like(out)
    ours(expected)
    try:
        theirs(values)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False
    if not torch.equal(values, expected):
        return False
    return _seconds(theirs, values, clock or _clock) < _seconds(ours, values, clock or _clock)


def _seconds(unpack: Unpack, out: Tensor, clock: Callable[[], float]) -> float:
    """Return the least time of a few rounds."""
    times = []
    for _ in range(_ROUNDS):
        start = clock()
        unpack(out)
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


@lru_cache(maxsize=1)
def cpu_library() -> Any | None:
    """Return bitsandbytes' library for the CPU; None where there is none of a version that was checked."""
    try:
        found = importlib.util.find_spec("bitsandbytes")
        if found is None or not metadata.version("bitsandbytes").startswith(_CHECKED):
            return None
        folders = found.submodule_search_locations or ()
        return ctypes.CDLL(
            str(next(file for folder in folders for file in Path(folder).glob("libbitsandbytes_cpu.so")))
        )
    except (metadata.PackageNotFoundError, ImportError, ValueError, OSError, StopIteration):
        return None
