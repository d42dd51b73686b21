"""Benchmark of a checkpoint: bytes of its weights in memory, working memory, and seconds of a denoising step.

Weights are counted from the tensors of the loaded model. Memory is measured as the process's private bytes: on the CPU
RssAnon of /proc/self/status, which leaves out mapped files, on CUDA the bytes that torch's allocator has handed out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.schedule import TRAINING_STEPS, check_guidance
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.names import SHARED, split_name
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig, Sampler
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model, empty_model
from ditmoe_cli.progress import phase

KINDS = ("packed", "scales", "plain")
GROUPS = ("experts", "shared", "attention", "rest")
MOST_IMAGES, MOST_REPEATS = 65_536, 10_000  # of a pass, and of passes
WARM_UPS = 2  # passes that memory is measured in; the first also allocates buffers of kernels and allocator
_FLOAT_BYTES = 4  # packed weights are unpacked to fp32
_STATUS = Path("/proc/self/status")
_POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Load:
    """The work to time: `batch` images in one pass (twice as many rows where `cfg` is not 1), `repeats` times.

    On the CPU it is timed with each number of `threads`; with none given, with as many as torch uses.
    """

    batch: int = 8
    repeats: int = 3
    cfg: float = 1.0
    seed: int = 0
    device: str = "cpu"
    threads: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of one forward pass: images times guidance branches."""
        return self.batch * (1 if self.cfg == 1.0 else 2)


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


@dataclass(frozen=True)
class Bench:
    """A checkpoint's footprint, its memory, and the seconds of each timed pass by the number of threads."""

    load: Load
    time: float
    footprint: Footprint
    memory: Memory
    timed: Mapping[int, tuple[float, ...]]

    @property
    def threads(self) -> int:
        """The number of threads of the fastest pass; the smallest of equally fast ones."""
        return min(sorted(self.timed), key=lambda count: min(self.timed[count]))

    @property
    def seconds(self) -> tuple[float, ...]:
        """The seconds of each pass with that number of threads."""
        return self.timed[self.threads]

    @property
    def needed(self) -> int:
        """Bytes of weights and working memory: the measured growth, but at least the counted bytes.

        Weights of a mapped pickle are pages of the file, which are needed but are no private memory.
        """
        return max(self.footprint.least, self.memory.growth or 0)

    def to_json(self) -> dict[str, Any]:
        """Return bytes, memory, seconds and conditions as JSON."""
        footprint, growth, least = self.footprint, self.memory.growth, min(self.seconds)
        return {
            "bytes": {
                "file": footprint.file,
                "weights": asdict(footprint.weights),
                "fp32": asdict(footprint.fp32),
                "ratio": footprint.ratio,
                "buffer": asdict(footprint.buffer),
            },
            "memory": {
                **asdict(self.memory),
                "growth": growth,
                "beyond": None if growth is None else growth - footprint.least,
                "needed": self.needed,
            },
            "seconds": least,
            "seconds_by_threads": {str(count): min(seconds) for count, seconds in self.timed.items()},
            "images_per_second": self.load.batch / least,
            "conditions": {**asdict(self.load), "t": self.time, "threads": self.threads, "waiting": waiting()},
        }


def check_load(load: Load, config: DiTMoEConfig) -> Load:
    """Return `load`, or raise `UsageError` where a value is out of range for a model of `config`."""
    for name, value, most in (("batch", load.batch, MOST_IMAGES), ("repeats", load.repeats, MOST_REPEATS)):
        if not 1 <= value <= most:
            raise UsageError(f"⟨{name}⟩ {value}: must be at least 1, and at most {most}")
    check_guidance(load.cfg, config)
    return load


def bench(checkpoint: Checkpoint, load: Load) -> Bench:
    """Load a checkpoint and run denoising steps on noise at a time in the middle of its family's range.

    Memory is measured in `WARM_UPS` passes that are not timed, since measuring slows them.

    Raises `UsageError` for values of `load` out of range, `BadInputError` for a checkpoint that cannot be loaded.
    """
    check_load(load, checkpoint.config)
    device = torch.device(load.device)
    counts = load.threads if load.threads and device.type == "cpu" else (torch.get_num_threads(),)
    passes = WARM_UPS - 1 + (1 + load.repeats) * len(counts)
    with phase(f"measuring {checkpoint.name}", 1 + passes, "passes") as progress:
        empty = empty_model(checkpoint)  # before measuring, since it makes torch import modules
        before = private_bytes(device)
        model = build_model(checkpoint, device)
        loaded = private_bytes(device)
        progress(1)
        step = denoising_step(model, load)

        def run(passes: int) -> list[float]:
            return [_timed(step, device, progress) for _ in range(passes)]

        peak = peak_during(device, lambda: run(WARM_UPS))
        timed: dict[int, tuple[float, ...]] = {}
        for count in in_turn(counts):
            if timed:
                run(1)  # starts the threads, as the first passes above did
            timed[count] = tuple(run(load.repeats))
    return Bench(
        load=load,
        time=middle(model.config.sampler),
        footprint=footprint(checkpoint, model, empty),
        memory=Memory(before, loaded, peak),
        timed=timed,
    )


def thread_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of threads that are worth a try: `most`, and its halves down to 1."""
    return tuple(most >> shift for shift in range(most.bit_length()))


def in_turn(counts: Iterable[int]) -> Iterator[int]:
    """Yield numbers of threads, each set for torch while it is the current one, and then set what was set before."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def waiting() -> str:
    """Return how OpenMP's threads wait: as OMP_WAIT_POLICY says, else by the rounds they spin before they sleep."""
    rounds = os.environ.get("GOMP_SPINCOUNT", "as the runtime sees fit")
    return os.environ.get("OMP_WAIT_POLICY", f"spin {rounds}").lower()


def middle(family: Sampler) -> float:
    """Return the time in the middle of a family's range: 0.5 of rectified flow's (0, 1], 500 of DDPM's 0 to 999."""
    return 0.5 if family == "rf" else TRAINING_STEPS // 2


def denoising_step(model: DiTMoE, load: Load) -> Callable[[], Tensor]:
    """Return a function that predicts once from noise (N, C, S, S): that of (seed, i), with label i mod classes."""
    config = model.config
    x = image_noise(load.seed, range(load.batch), model.device).draw(
        (config.in_channels, config.input_size, config.input_size)
    )
    labels = torch.arange(load.batch, device=model.device) % config.num_classes
    t = middle(config.sampler)
    predict = guided_predictor(model, labels, load.cfg, config.sampler, times=[t])

    def step() -> Tensor:
        with torch.inference_mode():
            return predict(x, t)

    return step


def _timed(step: Callable[[], Tensor], device: torch.device, progress: Callable[[int], None]) -> float:
    """Return the seconds of a step, until its work on the device ends."""
    _finish(device)
    start = time.perf_counter()
    step()
    _finish(device)
    seconds = time.perf_counter() - start
    progress(1)
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
