"""Whole-expert pruning of a checkpoint: every method and router mode, scored on the same seeds.

    python examples/benchmarks/expert_pruning.py demo:digits --keep 0.5 --images 1797 --calibrations 3

Prints a Markdown table of the paired mean squared pixel error and the Fréchet distance to the original's samples,
as means over calibration seeds (or drawing seeds, for random), whose noise is never that of the evaluation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

VARIANTS = (("reap", "ghost"), ("reap", "slice"), ("frequency", "ghost"), ("frequency", "slice"), ("random", "slice"))


def ditmoe(*arguments: str | Path, folder: Path) -> dict[str, Any]:
    """Run a ditmoe command and return its result."""
    command = [sys.executable, "-m", "ditmoe_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result


def score(options: argparse.Namespace, method: str, router: str, seed: int, folder: Path) -> dict[str, Any]:
    """Prune with one method, mode and seed, and score the result against the original's samples."""
    pruned = folder / "pruned.safetensors"
    profile = folder / f"profile{seed}.safetensors"
    ditmoe(
        *("prune", options.checkpoint, "--keep", options.keep, "--method", method, "--router", router),
        *("--profile", profile, "--seed", str(seed), "-o", pruned, "--force"),
        folder=folder,
    )
    sampling = ("--images", str(options.images), "--steps", str(options.steps))
    return ditmoe(
        *("fid", pruned, "--ref", folder / "original.safetensors", "--extractor", "pixels", *sampling),
        folder=folder,
    )


def table(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the lines of the table."""
    sampling = ("--images", str(options.images), "--steps", str(options.steps))
    ditmoe("sample", options.checkpoint, *sampling, "-o", folder / "original.safetensors", folder=folder)
    for seed in range(options.calibrations):
        path = folder / f"profile{seed}.safetensors"
        ditmoe("profile-experts", options.checkpoint, "--seed", str(seed), "-o", path, folder=folder)
    lines = ["| method | router | paired MSE | Fréchet | per seed (MSE / Fréchet) |", "|---|---|---|---|---|"]
    for method, router in VARIANTS:
        scores = [score(options, method, router, seed, folder) for seed in range(options.calibrations)]
        errors, distances = [s["paired"]["mse"] for s in scores], [s["frechet"] for s in scores]
        single = ", ".join(f"{e:.3g} / {d:.3g}" for e, d in zip(errors, distances, strict=True))
        lines.append(f"| {method} | {router} | {mean(errors):.3g} | {mean(distances):.3g} | {single} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file, a folder or demo:digits")
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibrations", type=int, default=3)
    options = parser.parse_args(arguments)
    if Path(options.checkpoint).exists():
        options.checkpoint = str(Path(options.checkpoint).resolve())
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(table(options, Path(folder))))


if __name__ == "__main__":
    main()
