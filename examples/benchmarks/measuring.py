"""Steps that the benchmarks of compression share: making variants of a checkpoint, sampling and scoring them.

A variant is scored by the mean squared pixel error of images paired by their seeds, and by the Fréchet distance to the
original's samples and to real images, over raw pixels (averaged to 8 x 8 where images are larger).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np


@dataclass(frozen=True)
class Variant:
    """A row of the table: its label, and the command that makes it without checkpoint, profile and output."""

    label: str
    words: tuple[str, ...]


Row = TypeVar("Row", bound=Variant)


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
    keep: bool

    def prepare(self, seeds: Sequence[int], steps: str) -> None:
        """Sample the original, and profile it once for each calibration seed; files that are there are kept."""
        if not (self.folder / "original.safetensors").exists():
            ditmoe("sample", self.checkpoint, *self.sampling, "-o", "original.safetensors", folder=self.folder)
        for name, seed in ((f"profile{seed}.safetensors", seed) for seed in seeds):
            words = ("--seed", str(seed), "--steps", steps, "-o", name)
            if not (self.folder / name).exists():
                ditmoe("profile-experts", self.checkpoint, *words, folder=self.folder)

    def measure(self, variant: Variant, seed: int) -> Measured:
        """Make a row's checkpoint with the profile of a seed, sample it, and score the samples.

        A run whose files are all in the folder is not made again.
        """
        stem = f"{re.sub('[^a-z0-9.]+', '-', variant.label)}.{seed}"
        record = self.folder / f"{stem}.json"
        if not record.exists():
            record.write_text(json.dumps(asdict(self._measured(variant, seed, stem))))
        return Measured(**json.loads(record.read_text()))

    def _measured(self, variant: Variant, seed: int, stem: str) -> Measured:
        checkpoint, samples = f"{stem}.safetensors", f"{stem}.samples.safetensors"
        words = (*variant.words, "--profile", f"profile{seed}.safetensors", "-o", checkpoint, "--force")
        seeded = ("--seed", str(seed)) if "random" in variant.words else ()  # it draws experts
        (self.folder / f"profile{seed}.measured.json").unlink(missing_ok=True)  # each row is timed with measuring
        start = time.perf_counter()
        made = ditmoe(words[0], self.checkpoint, *words[1:], *seeded, folder=self.folder)
        seconds = time.perf_counter() - start
        ditmoe("sample", checkpoint, *self.sampling, "-o", samples, "--force", folder=self.folder)
        against = ("fid", samples, "--extractor", "pixels", "--ref")
        original = ditmoe(*against, "original.safetensors", folder=self.folder)
        real = ditmoe(*against, self.real, folder=self.folder)
        if not self.keep:
            (self.folder / checkpoint).unlink()
        return Measured(original["paired"]["mse"], original["frechet"], real["frechet"], made["bytes"], seconds)


def real_digits(path: Path) -> Path:
    """Write scikit-learn's digits, which the demo was trained on, as images; return the file."""
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(path, arr_0=images)
    return path


def parser(description: str, images: str = "1797") -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("checkpoint", help="a file, a folder or demo:digits")
    found.add_argument("--images", default=images)
    found.add_argument("--steps", default="20")
    found.add_argument("--calibrations", type=int, default=3)
    found.add_argument("--real", type=Path, help="npz of real images; for demo:digits scikit-learn's")
    found.add_argument("--short", action="store_true", help="eight rows at most")
    found.add_argument("--only", action="append", help="the row of this label, and no other; can be repeated")
    found.add_argument("--folder", type=Path, help="where all files are kept, so that a later run continues")
    return found


def chosen(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """Return the rows that were asked for."""
    unknown = set(options.only or ()) - {row.label for row in rows}
    if unknown:
        raise SystemExit(f"no row is called {sorted(unknown)[0]!r}; there are {', '.join(row.label for row in rows)}")
    return [row for row in rows if not options.only or row.label in options.only]


@contextmanager
def bench(options: argparse.Namespace) -> Iterator[Bench]:
    """Yield a folder with samples of the original, and its profiles by calibration seed.

    A folder that is given belongs to one checkpoint, number of images and number of steps.
    """
    checkpoint = options.checkpoint
    if Path(checkpoint).exists():
        checkpoint = str(Path(checkpoint).resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder.resolve() if options.folder else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        real = options.real.resolve() if options.real else real_digits(folder / "real.npz")
        made = Bench(
            checkpoint,
            ("--images", options.images, "--steps", options.steps, "--solver", "euler"),
            real,
            folder,
            bool(options.folder),
        )
        made.prepare(range(options.calibrations), options.steps)
        yield made
