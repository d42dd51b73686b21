"""Measure what packing a weight takes: time by number format and shape, and memory beside the weight and its bytes.

With --unpack it measures unpacking instead, into a tensor that is there.

    python examples/benchmarks/packing.py --rounds 20
    python examples/benchmarks/packing.py --threads 2 --formats nf4,int4-g64,int8
    python examples/benchmarks/packing.py --memory
    python examples/benchmarks/packing.py --unpack fp32,bf16 --rounds 20

Weights are random, of the shapes of an expert's matrices in DiT-MoE S, XL and G. Prints a Markdown table of
nanoseconds a weight, which are as many seconds per 10⁹ weights: checks of values, scales, codes and packing, but
neither reading nor writing. With one thread that is processor time, which other processes lengthen little; the best of
the rounds counts. With N threads, each packs a weight at a time with one thread of torch, as `quantize` does, and the
best wall time over all weights counts. With --memory it prints the most memory that packing a weight takes besides, in
a thread that keeps nothing yet (Linux with glibc). --unpack takes the dtypes to unpack to; where bitsandbytes is
installed, its kernels unpack what they unpack faster, and a row "ours" tells what it takes without them.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ditmoe_cli.files.casting import DTYPES
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats import bitsandbytes_kernel
from ditmoe_cli.formats.registry import pack, parse_format

SHAPES = {
    "S 1536 × 384": (1536, 384),
    "XL 4608 × 1152": (4608, 1152),
    "G 5632 × 1408": (5632, 1408),
    "G 1408 × 5632": (1408, 5632),
}
FORMATS = (
    *("nf4", "fp4", "nf4-dq", "fp4-dq", "int8"),
    *(f"int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)),
    *("int3-g64-sym", "int4-g64-sym", "int4-g32", "int4-g128", "ternary-g64"),
)
_OURS = ", ours"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_MMAP_THRESHOLD = -3  # of glibc's mallopt: the size from which memory comes from the system, and goes back to it


def weights_of(shape: tuple[int, int], dtype: str, count: int) -> list[tuple[Tensor, TensorInfo]]:
    """Return `count` random weights (out, in) with their descriptions."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            (0.02 * torch.randn(shape, generator=generator)).to(torch_dtype(DTYPES[dtype])),
            TensorInfo(f"{i}.weight", DTYPES[dtype], shape),
        )
        for i in range(count)
    ]


def nanoseconds(weights: Sequence[tuple[Tensor, TensorInfo]], formats: Sequence[str], rounds: int) -> Iterator[float]:
    """Yield the nanoseconds a weight of each format, the least of the rounds."""
    best = dict.fromkeys(formats, float("inf"))
    for _ in range(rounds):
        for fmt in formats:
            for weight, info in weights:
                start = time.thread_time()
                pack(weight, info, fmt)
                best[fmt] = min(best[fmt], (time.thread_time() - start) / weight.numel() * 1e9)
    yield from best.values()


def nanoseconds_unpacking(
    weight: Tensor, info: TensorInfo, formats: Sequence[str], rounds: int, dtype: torch.dtype
) -> Iterator[float]:
    """Yield the nanoseconds a weight that unpacking to a dtype takes, of each format, the least of the rounds."""
    loaded = {fmt: parse_format(_format(fmt)).load(info, pack(weight, info, _format(fmt))) for fmt in formats}
    out = torch.empty(weight.shape, dtype=dtype)
    best = dict.fromkeys(formats, float("inf"))
    for _ in range(rounds + 1):  # the first one chooses kernels
        for fmt, packed in loaded.items():
            with ours_alone() if fmt.endswith(_OURS) else nullcontext():
                start = time.thread_time()
                packed.unpack(packed.tensors, out)
                best[fmt] = min(best[fmt], (time.thread_time() - start) / weight.numel() * 1e9)
    yield from best.values()


def _format(row: str) -> str:
    return row.removesuffix(_OURS)


@contextmanager
def ours_alone() -> Iterator[None]:
    """Unpack without bitsandbytes' kernels."""
    kernel, bitsandbytes_kernel.kernel = bitsandbytes_kernel.kernel, lambda *_: None
    try:
        yield
    finally:
        bitsandbytes_kernel.kernel = kernel


def nanoseconds_side_by_side(
    weights: Sequence[tuple[Tensor, TensorInfo]], formats: Sequence[str], rounds: int, threads: int
) -> Iterator[float]:
    """Yield the nanoseconds a weight of each format, of wall time with several threads, the least of the rounds."""
    best = dict.fromkeys(formats, float("inf"))
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            for fmt in formats:
                start = time.perf_counter()
                for done in [pool.submit(pack, weight, info, fmt) for weight, info in weights]:
                    done.result()
                values = sum(weight.numel() for weight, _ in weights)
                best[fmt] = min(best[fmt], (time.perf_counter() - start) / values * 1e9)
    yield from best.values()


def mebibytes_beside(weight: Tensor, info: TensorInfo, fmt: str) -> float:
    """Return the most memory that packing took beside the weight and its bytes, in MiB.

    Memory has to be given back to the system as soon as it is free.
    """
    _CLEAR.write_text(_RESET_PEAK)
    before = _kibibytes("VmRSS")
    with ThreadPoolExecutor(1) as pool:
        members = pool.submit(pack, weight, info, fmt).result()
    return (_kibibytes("VmHWM") - before) / 1024 - sum(member.nbytes for member in members.values()) / 2**20


def _kibibytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0])


def print_table(title: str, formats: Sequence[str], columns: dict[str, list[str]]) -> None:
    """Print a Markdown table with a row for each format."""
    print(f"| {title} | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for i, fmt in enumerate(formats):
        print(f"| {fmt} | {' | '.join(values[i] for values in columns.values())} |")
    print(flush=True)


def main() -> None:
    """Parse options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help="names, separated by commas")
    parser.add_argument("--shapes", default="S,XL,G", help="models whose shapes are measured, separated by commas")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the weights")
    parser.add_argument("--rounds", type=int, default=10, help="of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="that pack weights side by side")
    parser.add_argument("--weights", type=int, default=8, help="of each shape, where several threads pack them")
    parser.add_argument("--memory", action="store_true", help="measure memory in place of time")
    parser.add_argument("--unpack", default="", help="dtypes to unpack to, separated by commas, in place of packing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    formats = chosen.formats.split(",")
    shapes = {name: shape for name, shape in SHAPES.items() if name.split()[0] in chosen.shapes.split(",")}

    columns: dict[str, list[str]] = {}
    if chosen.memory:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
        for name, shape in shapes.items():
            [(weight, info)] = weights_of(shape, chosen.dtype, 1)
            for fmt in formats:
                pack(*weights_of((64, 64), chosen.dtype, 1)[0], fmt)  # tables are made on the first call
            columns[name] = [f"{mebibytes_beside(weight, info, fmt):.1f}" for fmt in formats]
        print_table(f"MiB beside, {chosen.dtype}", formats, columns)
        return
    if chosen.unpack:
        rows = [row for fmt in formats for row in ((fmt, f"{fmt}{_OURS}") if fmt[:3] in ("nf4", "fp4") else (fmt,))]
        for name, shape in shapes.items():
            [(weight, info)] = weights_of(shape, chosen.dtype, 1)
            for dtype in chosen.unpack.split(","):
                found = nanoseconds_unpacking(weight, info, rows, chosen.rounds, torch_dtype(DTYPES[dtype]))
                columns[f"{name}, {dtype}"] = [f"{value:.2f}" for value in found]
        print_table("ns a weight, unpacking", rows, columns)
        return
    for name, shape in shapes.items():
        if chosen.threads == 1:
            found = nanoseconds(weights_of(shape, chosen.dtype, 1), formats, chosen.rounds)
        else:
            weights = weights_of(shape, chosen.dtype, chosen.weights)
            found = nanoseconds_side_by_side(weights, formats, chosen.rounds, chosen.threads)
        columns[name] = [f"{value:.1f}" for value in found]
    side = f", {chosen.threads} threads" if chosen.threads > 1 else ""
    print_table(f"ns a weight, {chosen.dtype}{side}", formats, columns)


if __name__ == "__main__":
    main()
