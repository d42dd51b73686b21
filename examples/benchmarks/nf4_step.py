"""Time NF4 on a device: the kernels that unpack a matrix, and a step of a block whose weights are NF4 against bf16.

    python examples/benchmarks/nf4_step.py --model XL --tokens 512,4096,16384 --device cuda --json nf4.json

The kernels are ours and, where it is installed, bitsandbytes'. A step is one block of the model with attention and
mixture: unpacked anew each time, or with what is unpacked kept. Weights are random.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from interleaved import (
    DTYPES,
    Run,
    Timer,
    add_options,
    machine,
    numbers,
    plain,
    ratio,
    relative_difference,
    report,
    table,
    timer_of,
)
from packing import ours_alone
from synthetic_checkpoint import MODELS, config_of, write
from torch import Tensor

from ditmoe_cli import load_model
from ditmoe_cli.cli.app import run as run_command
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.bitsandbytes_kernel import bitsandbytes
from ditmoe_cli.formats.registry import pack, parse_format
from ditmoe_cli.model.dit import DiTMoE

FORMAT, PATCHES = "nf4", 256
KERNEL_COLUMNS = ("matrix", "to", "ours µs", "bitsandbytes µs", "ours over theirs", "GB/s written")
STEP_COLUMNS = (
    "model",
    "tokens",
    "dtype",
    "plain ms",
    "unpacked each time",
    "kept",
    "ratio",
    "ratio, kept",
    "difference",
)


def kernel_rows(shape: tuple[int, int], dtypes: Sequence[str], timer: Timer, rounds: int) -> list[dict[str, Any]]:
    """Return what unpacking a matrix (out, in) takes, by dtype."""
    info, fmt = TensorInfo("w", "F16", shape), parse_format(FORMAT)
    members = pack((0.02 * torch.randn(shape)).half(), info, FORMAT)
    packed = fmt.load(info, {name: tensor.to(timer.device) for name, tensor in members.items()})
    rows = []
    for dtype in dtypes:
        out = torch.empty(shape, dtype=DTYPES[dtype], device=timer.device)

        def fastest(out: Tensor = out) -> Tensor:
            packed.unpack(packed.tensors, out)
            return out

        def ours(out: Tensor = out) -> Tensor:
            with ours_alone():
                packed.unpack(packed.tensors, out)
            return out

        runs: dict[str, Run] = {"ours": ours, "fastest": fastest}
        seconds = timer.in_turn(runs, rounds, warm_ups=2)
        theirs = seconds["fastest"] if bitsandbytes() is not None else None
        best = min(*seconds["ours"], *seconds["fastest"])
        rows.append(
            {
                "matrix": shape,
                "dtype": dtype,
                "ours": seconds["ours"],
                "with bitsandbytes": theirs,
                "ratio": None if theirs is None else ratio(seconds["ours"], theirs),
                "written": out.nbytes / best,
            }
        )
    return rows


def kernel_cells(row: dict[str, Any]) -> list[str]:
    """Return a row of kernels as texts."""
    theirs = row["with bitsandbytes"]
    times = [f"{1e6 * min(each):.1f}" if each else "" for each in (row["ours"], theirs)]
    return [
        " × ".join(map(str, row["matrix"])),
        row["dtype"],
        *times,
        str(row["ratio"] or ""),
        f"{row['written'] / 1e9:.0f}",
    ]


def files_of(model: str, folder: Path) -> tuple[Path, Path]:
    """Write one block of a model, as it is and in NF4."""
    config = config_of(MODELS[model])
    config = replace(config, depth=1, blocks=config.blocks[:1])
    whole, packed = folder / "plain.safetensors", folder / "packed.safetensors"
    write(whole, config, "fp16", "safetensors", 0)
    words = ["quantize", str(whole), "--uniform", "--format", FORMAT, "-o", str(packed), "--device", "cpu", "-q"]
    if run_command(words):
        raise SystemExit("quantize failed")
    return whole, packed


def step_of(model: DiTMoE, tokens: int) -> Run:
    """Return a call of a model's only block."""
    width, images = model.config.hidden_size, max(tokens // PATCHES, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, min(tokens, PATCHES), width, generator=generator).to(model.device)
    c = torch.randn(images, width, generator=generator).to(model.device)

    def run() -> Tensor:
        with torch.inference_mode():
            out: Tensor = model.blocks[0](x, c, 0, None)
            return out

    return run


def step_rows(
    model: str, tokens: Sequence[int], dtypes: Sequence[str], timer: Timer, rounds: int
) -> list[dict[str, Any]]:
    """Return what a step of one block takes, by tokens and dtype."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole, packed = files_of(model, Path(folder))
        for dtype in dtypes:
            kind = DTYPES[dtype]
            models = {
                "plain": load_model(whole, timer.device, kind),
                "anew": load_model(packed, timer.device, kind, weights_memory=0),
                "kept": load_model(packed, timer.device, kind),
            }
            for count in tokens:
                runs = {name: step_of(each, count) for name, each in models.items()}
                seconds = timer.in_turn(runs, rounds, warm_ups=3)
                images = {name: run() for name, run in runs.items()}
                found = {
                    "model": model,
                    "tokens": count,
                    "dtype": dtype,
                    **seconds,
                    "ratio": ratio(seconds["anew"], seconds["plain"]),
                    "ratio kept": ratio(seconds["kept"], seconds["plain"]),
                    "difference": relative_difference(images["anew"], images["plain"]),
                }
                rows.append(found)
    return rows


def step_cells(row: dict[str, Any]) -> list[str]:
    """Return a row of steps as texts."""
    times = [f"{1000 * min(row[key]):.2f}" for key in ("plain", "anew", "kept")]
    ratios = [str(row["ratio"]), str(row["ratio kept"]), f"{row['difference']:.1e}"]
    return [row["model"], str(row["tokens"]), row["dtype"], *times, *ratios]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure kernels and steps; print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="XL", help="of upstream's; G has 16 experts, others 8")
    parser.add_argument("--tokens", type=numbers, default=[512, 4096], help="256 an image and branch of guidance")
    add_options(parser, rounds=10)
    options = parser.parse_args(arguments)
    timer = timer_of(options)
    torch.manual_seed(0)
    width = MODELS[options.model].width
    kernels = [
        row
        for shape in ((4 * width, width), (width, 4 * width))
        for row in kernel_rows(shape, options.dtype, timer, options.rounds)
    ]
    steps = step_rows(options.model, options.tokens, options.dtype, timer, options.rounds)
    tables = table(KERNEL_COLUMNS, list(map(kernel_cells, kernels))), table(STEP_COLUMNS, list(map(step_cells, steps)))
    report(options.json, machine(timer), plain([*kernels, *steps]), "\n\n".join(tables))


if __name__ == "__main__":
    main()
