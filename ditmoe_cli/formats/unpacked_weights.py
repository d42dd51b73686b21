"""The unpacked matrices of a model's packed layers: kept while memory allows, else unpacked where others were before.

Unpacking a matrix takes about as long as multiplying it by a few dozen tokens, and a sampler asks each layer once a
step. So the matrices of the first layers that ask again are kept, as many as a budget holds. Replacing old ones by new
ones would unpack all of them each step, as soon as one does not fit. All other layers take turns in one buffer, since
clearing fresh pages takes as long as unpacking. Whatever is kept, the matrices are the same.

Layers may ask together, such as the experts of a block that run in one product: their matrices then lie one after the
other, and are kept, or unpacked, together.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor

from ditmoe_cli.formats.products import prepacked
from ditmoe_cli.formats.unpacking_budget import default_budget
from ditmoe_cli.free_memory import free_memory

SHARE = 0.5  # of the memory that is free when the first layer asks again, for matrices that are kept


class PackedLayer(Protocol):
    """A layer that unpacks its weight of `shape` (out, in), on its `device`."""

    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """The device of the packed tensors."""

    def weight(self, dtype: torch.dtype = ..., out: Tensor | None = None) -> Tensor:
        """Return the weight in `dtype`, written to `out` where that is given."""


class _Buffer(threading.local):
    """What this thread unpacks into."""

    memory: Tensor | None = None


@dataclass(frozen=True)
class _Kept:
    """The values of the matrices of some layers, one after the other."""

    layers: tuple[ReferenceType[PackedLayer], ...]
    values: Tensor

    def are_of(self, layers: Sequence[PackedLayer], dtype: torch.dtype) -> bool:
        """Return whether they are those of these layers, in `dtype`."""
        return (
            self.values.dtype == dtype
            and len(self.layers) == len(layers)
            and all(mine() is theirs for mine, theirs in zip(self.layers, layers, strict=True))
        )


class UnpackedWeights:
    """The unpacked matrices that a model keeps, in the dtype that their layers last asked for.

    A layer that is gone, or that `forget` names, gives its part of the budget back. Copies of a model begin with
    nothing, and the same budget.
    """

    def __init__(self, budget: int | None = None) -> None:
        """Keep matrices of at most `budget` bytes; without a number, `SHARE` of what is free when one is first kept.

        Raises `ValueError` for a number below 0.
        """
        if budget is not None and budget < 0:
            raise ValueError(f"{budget} bytes for unpacked weights; 0 keeps none")
        self._asked = budget
        self._budget = budget
        self._kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()  # by the first of the layers
        self._seen: WeakSet[Any] = WeakSet()  # layers that asked before
        self._count, self._bytes = 0, 0  # of what is kept, when it was counted last
        self._paused = False
        self._lays_out: Callable[[Tensor], Tensor] = prepacked
        self._buffer = _Buffer()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[UnpackedWeights], tuple[int | None]]:
        return UnpackedWeights, (self._asked,)

    @property
    def kept_bytes(self) -> int:
        """The bytes of all matrices that are kept."""
        with self._lock:
            if len(self._kept) != self._count:  # layers may be gone since
                self._count, self._bytes = len(self._kept), sum(kept.values.nbytes for kept in self._kept.values())
            return self._bytes

    def matrix(self, layer: PackedLayer, dtype: torch.dtype) -> Tensor:
        """Return the matrix (out, in) of a layer in `dtype`, to multiply by. Nobody may write to it.

        What is kept may be `prepacked`; what is not holds until this thread asks again.
        """
        values = self._values((layer,), dtype, lambda values: self._lays_out(values.view(layer.shape)))
        return values if values.is_mkldnn else values.view(layer.shape)

    def together(self, layers: Sequence[PackedLayer], dtype: torch.dtype) -> Tensor:
        """Return the values of the matrices of some layers, one after the other, as `matrix` returns those of one."""
        values = self._values(layers, dtype, lambda values: values)
        return values.to_dense().flatten() if values.is_mkldnn else values.flatten()

    def _values(
        self, layers: Sequence[PackedLayer], dtype: torch.dtype, laid_out: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the values of the matrices of some layers, `laid_out` where they are kept from now on."""
        kept = self._kept.get(layers[0])
        if kept is not None and kept.are_of(layers, dtype):
            return kept.values
        size, device = sum(math.prod(layer.shape) for layer in layers), layers[0].device
        with self._lock, torch.inference_mode(False):  # for tensors that are written to outside of that mode too
            again = layers[0] in self._seen
            self._seen.add(layers[0])
            self._kept.pop(layers[0], None)
            if again and self.kept_bytes + size * dtype.itemsize <= self._limit(device):
                values = laid_out(_unpacked(layers, torch.empty(size, dtype=dtype, device=device)))
                self._kept[layers[0]] = _Kept(tuple(map(ref, layers)), values)
                return values
            values = self._turn(size * dtype.itemsize, device).view(dtype)
        return _unpacked(layers, values)

    def forget(self, layer: PackedLayer) -> None:
        """Drop what is kept of a layer, with the matrices beside it."""
        with self._lock:
            for first, kept in list(self._kept.items()):
                if any(held() is layer for held in kept.layers):
                    del self._kept[first]

    def keep_plain(self) -> None:
        """Keep matrices as they are from now on, for compiled code, which cannot read those that are `prepacked`."""
        self._lays_out = lambda matrix: matrix

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep nothing that is not kept yet, as where memory is measured that a model needs at the least."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _limit(self, device: torch.device) -> int:
        if self._paused:
            return 0
        if self._budget is None:
            self._budget = int(SHARE * free_on(device))
        return self._budget

    def _turn(self, size: int, device: torch.device) -> Tensor:
        """Return the first `size` bytes of this thread's buffer, which grows where it is too small."""
        memory = self._buffer.memory
        if memory is None or len(memory) < size or memory.device != device:
            self._buffer.memory = None  # freed before the larger one is made
            memory = self._buffer.memory = torch.empty(size, dtype=torch.uint8, device=device)
        return memory[:size]


def _unpacked(layers: Sequence[PackedLayer], values: Tensor) -> Tensor:
    """Return `values`, into which the matrices of layers are written, one after the other."""
    for layer, part in zip(layers, torch.split(values, [math.prod(layer.shape) for layer in layers]), strict=True):
        layer.weight(values.dtype, part.view(layer.shape))
    return values


def unpacked_weights() -> UnpackedWeights:
    """Return what keeps unpacked weights of a model that is loaded without a budget of its own."""
    return UnpackedWeights(default_budget())


def free_on(device: torch.device) -> float:
    """Return this process's part of the bytes of memory that are free on a device; 0 where nobody knows.

    torchrun's processes on one machine share its memory, but each has a GPU.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = free_memory()
    return free / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if math.isfinite(free) else 0.0
