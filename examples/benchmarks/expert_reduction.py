"""Fewer experts, by every method: what each costs in image error, bytes and time.

    python examples/benchmarks/expert_reduction.py demo:digits --keep 4 --images 1797 --calibrations 3
    python examples/benchmarks/expert_reduction.py cifar10.pt --keep 4 --images 400 --steps 15 --real images.npz --short

Prints a Markdown table: paired mean squared pixel error, Fréchet distance to the original's samples and to real images
(pixels, averaged to 8 x 8 where they are larger), bytes of the file, and seconds that the command took, means over
calibration seeds (for ``random``, drawing seeds), whose noise is never that of the evaluation. `--only` picks rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

PRUNERS = ("reap", "man", "msan", "easy-ep", "gate-mass", "frequency", "random", "naee", "diet")
MERGERS = ("m-smoe", "hc-smoe", "mergemoe", "sub-moe", "average", "uncurl")


@dataclass(frozen=True)
class Variant:
    """A row of the table: its label and the command that makes it, less checkpoint, profile and output."""

    label: str
    words: tuple[str, ...]


def prune(keep: str, method: str, *more: str) -> Variant:
    """Return a pruning row."""
    return Variant(" ".join(("prune", method, *more)), ("prune", "--keep", keep, "--method", method, *more))


def merge(groups: str, method: str, *more: str) -> Variant:
    """Return a merging row."""
    return Variant(" ".join(("merge", method, *more)), ("merge", "--groups", groups, "--method", method, *more))


def narrow(share: str, *more: str) -> Variant:
    """Return a row of all experts, narrowed to a share of their neurons."""
    return Variant(" ".join(("prune --neurons", share, *more)), ("prune", "--neurons", share, *more))


def variants(keep: str, short: bool) -> list[Variant]:
    """Return the rows for blocks of `keep` experts of 8, or as many bytes; at most eight of them if `short`."""
    share = str(int(keep) / 8)
    chosen = [
        prune(keep, "reap", "--router", "slice", "--no-refit"),
        prune(keep, "reap", "--router", "slice"),
        prune(keep, "reap", "--no-refit"),
        prune(keep, "reap"),
        prune(keep, "reap", "--allocate", "global"),
        narrow(share),
        narrow(share, "--allocate", "global"),
        merge(keep, "m-smoe"),
    ]
    if short:
        return chosen
    plain = [prune(keep, method, "--no-refit") for method in PRUNERS if method != "reap"]
    fitted = [prune(keep, method) for method in PRUNERS if method != "reap"]
    repairs = [
        merge(keep, "m-smoe", "--no-refit"),
        prune(keep, "reap", "--router", "mass", "--no-refit"),
        prune(keep, "reap", "--router", "auto", "--no-refit"),
        prune(keep, "reap", "--router", "mass"),
        prune(keep, "reap", "--constants", "--no-refit"),
        prune(keep, "reap", "--constants"),
        prune(keep, "reap", "--residual-rank", "8", "--no-refit"),
        prune(keep, "reap", "--residual-rank", "8"),
        narrow(share, "--no-refit"),
        narrow(share, "--allocate", "global", "--multiple", "32"),
        narrow(share, "--allocate", "global", "--keep", "auto"),
    ]
    merged = [merge(keep, method, *more) for method in MERGERS if method != "m-smoe" for more in (("--no-refit",), ())]
    return [*chosen, *plain, *fitted, *repairs, *merged]


def ditmoe(*arguments: str | Path, folder: Path) -> dict[str, Any]:
    """Run a ditmoe command and return its result."""
    command = [sys.executable, "-m", "ditmoe_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result


@dataclass(frozen=True)
class Measured:
    """One run of one row."""

    error: float
    to_original: float
    to_real: float
    size: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Where and how rows are measured."""

    checkpoint: str
    sampling: tuple[str, ...]
    real: Path
    folder: Path

    def prepare(self, seeds: Sequence[int], steps: str) -> None:
        """Sample the original, and profile it once for each calibration seed."""
        ditmoe("sample", self.checkpoint, *self.sampling, "-o", "original.safetensors", folder=self.folder)
        for seed in seeds:
            bins = str(min(10, int(steps)))
            words = ("--seed", str(seed), "--steps", steps, "--bins", bins, "-o", f"profile{seed}.safetensors")
            ditmoe("profile-experts", self.checkpoint, *words, folder=self.folder)

    def measure(self, variant: Variant, seed: int) -> Measured:
        """Make a row's checkpoint with the profile of a seed, sample it, and score the samples."""
        words = (*variant.words, "--profile", f"profile{seed}.safetensors", "-o", "made.safetensors", "--force")
        seeded = ("--seed", str(seed)) if "random" in variant.words else ()
        start = time.perf_counter()
        made = ditmoe(words[0], self.checkpoint, *words[1:], *seeded, folder=self.folder)
        seconds = time.perf_counter() - start
        samples = ("sample", "made.safetensors", *self.sampling, "-o", "samples.safetensors", "--force")
        ditmoe(*samples, folder=self.folder)
        against = ("fid", "samples.safetensors", "--extractor", "pixels", "--ref")
        original = ditmoe(*against, "original.safetensors", folder=self.folder)
        real = ditmoe(*against, self.real, folder=self.folder)
        return Measured(original["paired"]["mse"], original["frechet"], real["frechet"], made["bytes"], seconds)


def table(bench: Bench, rows: Sequence[Variant], seeds: Sequence[int]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| | paired MSE | Fréchet to the original | to real images | bytes | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for variant in rows:
        runs = [bench.measure(variant, seed) for seed in seeds]
        columns = [[getattr(run, name) for run in runs] for name in ("error", "to_original", "to_real")]
        spread = f" ({min(columns[1]):.3g} to {max(columns[1]):.3g})" if len(runs) > 1 else ""
        error, original, real = (f"{mean(column):.3g}" for column in columns)
        seconds = mean(run.seconds for run in runs)
        lines.append(f"| {variant.label} | {error} | {original}{spread} | {real} | {runs[0].size:,} | {seconds:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def real_digits(path: Path) -> Path:
    """Write scikit-learn's digits, which the demo was trained on, as images; return the file."""
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(path, arr_0=images)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file, a folder or demo:digits")
    parser.add_argument("--keep", default="4", help="experts that each block is left with")
    parser.add_argument("--images", default="1797")
    parser.add_argument("--steps", default="20")
    parser.add_argument("--calibrations", type=int, default=3)
    parser.add_argument("--real", type=Path, help="npz of real images; for demo:digits scikit-learn's")
    parser.add_argument("--short", action="store_true", help="eight rows at most")
    parser.add_argument("--only", default="", help="rows whose label has this in it")
    options = parser.parse_args(arguments)
    if Path(options.checkpoint).exists():
        options.checkpoint = str(Path(options.checkpoint).resolve())
    rows = [variant for variant in variants(options.keep, options.short) if options.only in variant.label]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = options.real.resolve() if options.real else real_digits(folder / "real.npz")
        sampling = ("--images", options.images, "--steps", options.steps)
        bench = Bench(options.checkpoint, sampling, real, folder)
        bench.prepare(range(options.calibrations), options.steps)
        print("\n".join(table(bench, rows, range(options.calibrations))))


if __name__ == "__main__":
    main()
