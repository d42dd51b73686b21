"""Bytes of a loaded checkpoint, counted and measured.

Weights are counted from the tensors of the loaded model. Memory is measured as the process's private bytes: on the CPU
RssAnon of /proc/self/status, which leaves out mapped files, on CUDA the bytes that torch's allocator has handed out.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ditmoe_cli.files.names import SHARED, split_name
from ditmoe_cli.free_memory import free_memory
from ditmoe_cli.model.checkpoint import Checkpoint

KINDS = ("packed", "scales", "plain")
GROUPS = ("experts", "shared", "attention", "rest")
_FLOAT_BYTES = 4  # packed weights are unpacked to fp32
_STATUS = Path("/proc/self/status")
_POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parameters and buffers, in total, by `KINDS` and by `GROUPS`.

    `packed` are the codes of quantised weights, `scales` their scales, zero points and tables of codes, `plain` all
    other tensors.
    """

    total: int
    kinds: Mapping[str, int]
    groups: Mapping[str, int]


@dataclass(frozen=True)
class Buffer:
    """Bytes and name of the largest packed matrix once it is unpacked to fp32; 0 and None without packed ones."""

    bytes: int
    name: str | None


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model that are known without running it.

    Attributes:
        file: the checkpoint on disk.
        weights: the loaded model.
        fp32: a model of the same shapes with all weights in fp32.
        buffer: the largest matrix that is unpacked at a time.
    """

    file: int
    weights: Sizes
    fp32: Sizes
    buffer: Buffer

    @property
    def ratio(self) -> float:
        """Ratio of the weights' bytes to those of the fp32 model."""
        return self.weights.total / self.fp32.total

    @property
    def least(self) -> int:
        """Bytes of weights and buffer, which every run needs."""
        return self.weights.total + self.buffer.bytes


@dataclass(frozen=True)
class Memory:
    """Private memory in bytes before and after loading, and its peak in forward passes; None where unknown."""

    before: int | None
    loaded: int | None
    peak: int | None

    @property
    def growth(self) -> int | None:
        """Bytes that loading and running added, at the peak."""
        return None if self.before is None or self.peak is None else self.peak - self.before


# ------------------------------------------------------------------ counted


def footprint(checkpoint: Checkpoint, model: nn.Module, empty: nn.Module) -> Footprint:
    """Return the bytes of a checkpoint's file, of its loaded model, and of the `empty` one, plain and in fp32."""
    packed = {name.removesuffix(".weight") for name, weight in checkpoint.weights.items() if weight.quantized}
    return Footprint(
        checkpoint.header.file_bytes,
        sizes(_tensors(model), packed),
        sizes(_tensors(empty), set()),
        largest_unpacked(checkpoint),
    )


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of a loaded model's parameters and buffers."""
    return sum(tensor.nbytes for _, tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and buffer once, even if modules share it."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def sizes(tensors: Iterable[tuple[str, Tensor]], packed: set[str]) -> Sizes:
    """Return the bytes of named tensors; `packed` are the names of layers whose weight is packed."""
    kinds, groups = dict.fromkeys(KINDS, 0), dict.fromkeys(GROUPS, 0)
    for name, tensor in tensors:
        kinds[kind_of(name, packed)] += tensor.nbytes
        groups[group_of(name)] += tensor.nbytes
    return Sizes(sum(kinds.values()), kinds, groups)


def kind_of(name: str, packed: set[str]) -> str:
    """Return the kind of a tensor, one of `KINDS`, by its layer and its name in the layer."""
    layer, _, leaf = name.rpartition(".")
    if layer not in packed or leaf == "bias":
        return "plain"
    return "packed" if leaf.startswith("packed") else "scales"  # with a number where the weight is in pieces


def group_of(name: str) -> str:
    """Return the group of a tensor, one of `GROUPS`: routed experts, shared experts, attention, or the rest."""
    parts = split_name(name)
    if parts.expert is not None:
        return "experts"
    starts = {f"{SHARED}.": "shared", "attn.": "attention"} if parts.block is not None else {}
    return next((group for start, group in starts.items() if parts.rest.startswith(start)), "rest")


def loaded_bytes(checkpoint: Checkpoint) -> int:
    """Return the most bytes that the weights of a loaded model take: packed ones as stored, all others in fp32."""
    stored = checkpoint.header.tensors
    return sum(
        sum(stored[name].nbytes for name in weight.members) if weight.quantized else _FLOAT_BYTES * weight.info.numel
        for weight in checkpoint.weights.values()
    )


def largest_unpacked(checkpoint: Checkpoint) -> Buffer:
    """Return the buffer of the largest weight that stays packed in memory; the first of equal ones."""
    packed = [weight.info for weight in checkpoint.weights.values() if weight.quantized]
    largest = max(packed, key=lambda info: info.numel, default=None)
    return Buffer(_FLOAT_BYTES * largest.numel, largest.name) if largest else Buffer(0, None)


# ------------------------------------------------------------------ measured


def private_bytes(device: torch.device) -> int | None:
    """Return the private memory in use, of the process or on its GPU; None on systems without /proc.

    Linux adds up each core's share now and then only, so the process's is off by up to some hundred kilobytes a core.
    """
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def available_bytes(device: torch.device) -> float:
    """Return the memory that is free or can be freed, of the machine or of a GPU; infinite where it is unknown."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def let_go() -> None:
    """Give freed memory back to the system, so that what is allocated next counts as growth."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where no GPU was used
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc, which keeps freed memory for later


def resident_bytes(status: Path = _STATUS) -> int | None:
    """Return RssAnon, resident memory that no file backs, of a process's status in bytes; None where it is missing."""
    try:
        text = status.read_text()
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("RssAnon:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def peak_during(device: torch.device, work: Callable[[], object]) -> int | None:
    """Call `work` and return the peak of private memory meanwhile; None where it is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with polled(resident_bytes) as peak:
        work()
    return peak()


@contextmanager
def polled(read: Callable[[], int | None]) -> Iterator[Callable[[], int | None]]:
    """Read a value each millisecond in a thread; yield a function that returns the largest so far.

    The value is read first and last in any case. The function returns None where the first reading is None.
    """
    first = read()
    if first is None:
        yield lambda: None
        return
    largest, ended = first, threading.Event()

    def update() -> None:
        nonlocal largest
        largest = max(largest, read() or 0)

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            update()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: largest
    finally:
        ended.set()
        thread.join()
        update()
