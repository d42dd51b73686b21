"""Measure whether compressed checkpoints run as fast as their original: seconds a step, taking turns with it.

    python examples/benchmarks/compressed_steps.py --model S
    python examples/benchmarks/compressed_steps.py --model XL --batches 1 --rounds 5 --only nf4 --only int4-g64
    python examples/benchmarks/compressed_steps.py --model demo --processor-time

A random model of a published shape, of one block unless --depth says more, is pruned, narrowed and quantised in a
temporary folder; `ditmoe bench` then times a step of all of them in each round, in changing order. Prints a Markdown
table of the ratios to the original by number of images, with their quartiles over rounds, and the most that each is
meant to take. Random weights route evenly, as trained ones nearly do. What follows `--` goes on to `ditmoe bench`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import Variant, chosen, ditmoe
from synthetic_checkpoint import MODELS, config_of, write

from ditmoe_cli.evaluation.step_parts import OTHER, PARTS

DEMO, DEMO_LIMIT = "demo", 1.3  # a model so small that single operations count
_SHARD_BYTES = 10**10
_RANDOM = ("--method", "random", "--no-refit")


@dataclass(frozen=True)
class Compressed(Variant):
    """A compressed checkpoint, and the most that a step of it may take, of the original's time."""

    limit: float = 1.1
    profiled: bool = False


def uniform(label: str, *words: str) -> Compressed:
    """Return the row of one format for all weights."""
    return Compressed(label, ("quantize", "--uniform", *words))


VARIANTS = (
    Compressed("half the experts", ("prune", "--keep", "0.5", *_RANDOM), 1.05),
    Compressed("half the experts, sliced", ("prune", "--keep", "0.5", "--router", "slice", *_RANDOM), 1.05),
    Compressed("half the neurons", ("prune", "--neurons", "0.5", "--no-refit"), 0.75, profiled=True),
    uniform("nf4", "--format", "nf4"),
    uniform("nf4-dq", "--format", "nf4", "--double-quant"),
    uniform("fp4", "--format", "fp4"),
    uniform("int8", "--format", "int8"),
    uniform("int8-g64", "--format", "int", "--bits", "8"),
    uniform("int4-g64", "--format", "int", "--bits", "4"),
    uniform("int3-g64", "--format", "int", "--bits", "3"),
    uniform("ternary-g64", "--format", "ternary"),
    Compressed("mixed, 3.25 bits", ("quantize", "--bits", "3.25", "--rounding", "nearest"), profiled=True),
)


def make(model: str, depth: int, rows: Sequence[Compressed], folder: Path) -> dict[str, str]:
    """Make the original and its variants in a folder; return their files by label, the original first."""
    original = "demo:digits" if model == DEMO else "original.safetensors"
    if model != DEMO:
        shape = replace(MODELS[model], depth=depth)
        write(folder / original, config_of(shape), shape.dtype, "safetensors", _SHARD_BYTES)
    if any(row.profiled for row in rows):
        ditmoe("profile-experts", original, "--images", "2", "--steps", "2", "-o", "p.safetensors", folder=folder)
    files = {"original": original}
    for number, row in enumerate(rows):
        files[row.label] = f"{number}.safetensors"
        profile = ("--profile", "p.safetensors") if row.profiled else ()
        ditmoe(row.words[0], original, *row.words[1:], *profile, "-o", files[row.label], folder=folder)
    return files


def table(measured: dict[int, list[dict[str, Any]]], rows: Sequence[Compressed], limit: float | None) -> list[str]:
    """Return a Markdown table of the results by number of images, each a list of the original's and the rows'."""
    batches = [f"{batch} image{'s' if batch > 1 else ''}" for batch in measured]
    heads = [f"{text} | {text}: ratio" for text in batches]
    lines = [f"| | weights, MB | {' | '.join(heads)} | meant |", f"|---|---:|{'---:|---:|' * len(measured)}---:|"]
    for number, label in enumerate(["original", *(row.label for row in rows)]):
        files = [results[number] for results in measured.values()]
        most = None if not number else limit or rows[number - 1].limit
        cells = [f"{1000 * file['seconds']:,.1f} ms | {ratio_text(file['ratio'], most)}" for file in files]
        size = files[0]["bytes"]["weights"]["total"] / 1e6
        lines.append(f"| {label} | {size:,.1f} | {' | '.join(cells)} | {'' if most is None else f'≤ {most:g}'} |")
    return lines


def ratio_text(ratio: dict[str, float], most: float | None) -> str:
    """Return the median of a ratio with its quartiles, bold where it is above the most; 1 for the original."""
    if most is None:
        return "1"
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"**{text}**" if ratio["median"] > most else text


def parts_table(results: list[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """Return a Markdown table of the milliseconds of each part of a step."""
    names = (*PARTS, OTHER)
    lines = [f"| ms of | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for label, file in zip(labels, results, strict=True):
        cells = (f"{1000 * file['parts']['seconds'][name]:.2f}" for name in names)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoints, time them, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(DEMO, *MODELS), default="S", help="whose shapes; demo is demo:digits")
    parser.add_argument("--depth", type=int, default=1, help="blocks of a random model")
    parser.add_argument("--batches", default="1,8", help="images a step, separated by commas")
    parser.add_argument("--rounds", default="9", help="timed steps of each")
    parser.add_argument("--only", action="append", help="the row of this label, and no other; can be repeated")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, where the machine has other work")
    parser.add_argument("--parts", action="store_true", help="print the parts of a step too")
    parser.add_argument("more", nargs="*", help="options of ditmoe bench, after --")
    options = parser.parse_args(arguments)
    rows = chosen(VARIANTS, options)
    more = [*options.more, *(["--processor-time"] if options.processor_time else [])]
    with tempfile.TemporaryDirectory() as name:
        files = make(options.model, options.depth, rows, Path(name))
        measured = {
            int(batch): ditmoe(
                *("bench", *files.values(), "--batch", batch, "--repeats", options.rounds, *more), folder=Path(name)
            )["files"]
            for batch in options.batches.split(",")
        }
    print("\n".join(table(measured, rows, DEMO_LIMIT if options.model == DEMO else None)))
    for batch, results in measured.items() if options.parts else ():
        print(f"\nParts of a step, images a step: {batch}\n")
        print("\n".join(parts_table(results, list(files))))


if __name__ == "__main__":
    main()
