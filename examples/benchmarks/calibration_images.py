"""Measure what calibrating on fewer images or steps costs.

    python examples/benchmarks/calibration_images.py demo:digits --settings 64x20 24x20 64x8 64x8xab2 --calibrations 3

The checkpoint is profiled with each setting (images x steps, and a solver if given; the first one is the standard) and
compressed with each profile; the images of each result are paired with the original's by their seeds. Prints a Markdown
table of mean squared pixel errors, means over calibration seeds, and in brackets the error over that of the standard:
the geometric mean over seeds, and the least and the most of them.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import Variant

from ditmoe_cli.cli.app import run

VARIANTS = (
    Variant("prune --keep 0.5 --no-refit", ("prune", "--keep", "0.5", "--no-refit")),
    Variant("prune --keep 0.5", ("prune", "--keep", "0.5")),
    Variant("prune --keep 0.5 --allocate global", ("prune", "--keep", "0.5", "--allocate", "global")),
    Variant(
        "prune --neurons 0.5 --allocate global --no-refit",
        ("prune", "--neurons", "0.5", "--allocate", "global", "--no-refit"),
    ),
    Variant("prune --neurons 0.5 --allocate global", ("prune", "--neurons", "0.5", "--allocate", "global")),
    Variant("quantize --bits 3", ("quantize", "--bits", "3")),
)


def ditmoe(*arguments: str) -> dict[str, Any]:
    """Run a command in this process, in the working folder, and return its result."""
    with redirect_stdout(io.StringIO()) as printed:
        code = run([*arguments, "--json"])
    if code:
        raise SystemExit(code)
    result: dict[str, Any] = json.loads(printed.getvalue())["result"]
    return result


def error(checkpoint: str, variant: Variant, setting: str, seed: int, sampling: Sequence[str]) -> float:
    """Return a variant's paired error, calibrated with a setting and a seed."""
    images, steps, *solver = setting.split("x")
    profile = f"profile-{setting}-{seed}.safetensors"
    if not Path(profile).exists():
        words = ("--images", images, "--steps", steps, "--seed", str(seed), "-o", profile)
        ditmoe("profile-experts", checkpoint, *words, *(("--solver", *solver) if solver else ()))
    command, *words = variant.words
    made = f"{re.sub('[^a-z0-9.]+', '-', variant.label)}-{setting}-{seed}.safetensors"
    ditmoe(command, checkpoint, *words, "--profile", profile, "-o", made)
    ditmoe("sample", made, *sampling, "-o", "samples.safetensors", "--force")
    Path(made).unlink()
    against = ("--ref", "original.safetensors", "--extractor", "pixels")
    return float(ditmoe("fid", "samples.safetensors", *against)["paired"]["mse"])


def cell(errors: Sequence[float], standard: Sequence[float]) -> str:
    """Return the mean error, and its ratio to the standard's over seeds."""
    ratios = [a / b for a, b in zip(errors, standard, strict=True)]
    middle = math.exp(mean(math.log(ratio) for ratio in ratios))
    return f"{mean(errors):.4g} ({middle:.3f}, {min(ratios):.2f} to {max(ratios):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("checkpoint", help="a file, a folder or demo:digits")
    options.add_argument("--settings", nargs="+", default=["64x20", "24x20"], metavar="IMAGESxSTEPS[xSOLVER]")
    options.add_argument("--images", default="512", help="of the comparison")
    options.add_argument("--steps", default="16", help="of the comparison")
    options.add_argument("--calibrations", type=int, default=2)
    options.add_argument("--only", action="append", help="the row of this label, and no other; can be repeated")
    found = options.parse_args(arguments)
    checkpoint = str(Path(found.checkpoint).resolve()) if Path(found.checkpoint).exists() else found.checkpoint
    sampling = ("--images", found.images, "--steps", found.steps)
    print(f"| | {' | '.join(found.settings)} |\n|---|{'---|' * len(found.settings)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        ditmoe("sample", checkpoint, *sampling, "-o", "original.safetensors")
        for variant in VARIANTS:
            if found.only and variant.label not in found.only:
                continue
            rows = [
                [error(checkpoint, variant, setting, seed, sampling) for seed in range(found.calibrations)]
                for setting in found.settings
            ]
            print(f"| {variant.label} | {' | '.join(cell(row, rows[0]) for row in rows)} |", flush=True)
            print(f"measured {variant.label}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
