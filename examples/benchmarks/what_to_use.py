"""Compare ways to take a checkpoint to a size, all in one run: what to use when.

    python examples/benchmarks/what_to_use.py --calibration-seeds 0,1,2 --folder demo.what
    python examples/benchmarks/what_to_use.py cifar10.pt --sizes 5600000 --calibration-seeds 0 --images 256 --steps 15

Prints a Markdown table for each size: paired mean squared pixel error and Fréchet distance to the original's samples,
means over calibration seeds (in brackets the least and the most), bytes of the file, and seconds of the processor that
its commands took. The noise of the evaluation is never that of a calibration. The rival in two stages, `prune --neurons
R --allocate global | quantize --size`, has the share R and the multiple of widths that are best *by the evaluation
itself*, in each column. What does not reach a size is listed with the least that it reaches. Files and scores stay in
``--folder``, which belongs to one checkpoint and version: started again, the same command goes on. ``--json`` writes
the numbers.

``--extras`` measures what `compress` leaves out: merging, and dropped experts that are replaced by constants or
low-rank maps, each before the mix of formats, with the best number of experts by the evaluation itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import ditmoe

INFEASIBLE = 4  # exit code of what no plan reaches
SHARES = (1.0, 0.9, 0.75, 0.65, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)
LIMIT = "{size}"  # stands for the bytes allowed

Stage = tuple[str, ...]
Way = tuple[Stage, ...]
"""Commands that make a file one after the other, each without checkpoint, profile and output."""


@dataclass(frozen=True)
class Made:
    """A file: its bytes, and the seconds of the processor that all its commands took."""

    path: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """A way measured with one calibration seed, over all noise seeds."""

    way: str
    error: float
    distance: float
    size: int
    seconds: float


@dataclass(frozen=True)
class Lab:
    """Where and how ways are measured.

    Attributes:
        checkpoint: what all ways start from.
        folder: keeps profiles, files and scores.
        sampling: options of sampling.
        noise_seeds: seeds of the evaluation.
    """

    checkpoint: str
    folder: Path
    sampling: tuple[str, ...]
    noise_seeds: tuple[int, ...]

    def profile(self, seed: int) -> str:
        """Return the profile of a calibration seed, made where it is not there."""
        name = f"profile{seed}.safetensors"
        if not (self.folder / name).exists():
            self._run("profile-experts", self.checkpoint, "--seed", str(seed), "-o", name)
        return name

    def original(self, noise: int) -> str:
        """Return the original's samples of a noise seed, made where they are not there."""
        name = f"original{noise}.safetensors"
        if not (self.folder / name).exists():
            self._run("sample", self.checkpoint, *self.sampling, "--seed", str(noise), "-o", name)
        return name

    def made(self, way: Way, seed: int) -> Made:
        """Return the file of a way, made where it is not there. Raises `CalledProcessError` where it cannot be made."""
        before = self.made(way[:-1], seed) if way[:-1] else Made(self.checkpoint, 0, 0.0)
        path = f"{_stem(way)}.{seed}.safetensors"
        record = self.folder / f"{path}.json"
        if not record.exists():
            start = _processor()
            result = self._run(*self._words(way, before, seed), "-o", path, "--force")
            made = Made(path, result["bytes"], before.seconds + _processor() - start)
            record.write_text(json.dumps(asdict(made)))
        return Made(**json.loads(record.read_text()))

    def size(self, way: Way, seed: int) -> int:
        """Return the bytes of a way's file, of which all stages but the last are made."""
        before = self.made(way[:-1], seed) if way[:-1] else Made(self.checkpoint, 0, 0.0)
        return int(self._run(*self._words(way, before, seed), "--dry-run")["bytes"])

    def _run(self, *words: str) -> dict[str, Any]:
        return ditmoe(*words, folder=self.folder)

    def _words(self, way: Way, before: Made, seed: int) -> tuple[str, ...]:
        profile = ("--profile", self.profile(seed)) if not way[:-1] else ()  # later ones are made as the first was
        return (way[-1][0], before.path, *way[-1][1:], *profile)

    def score(self, way: Way, seed: int) -> Score | None:
        """Return the score of a way with a calibration seed; None where it does not reach its size."""
        record = self.folder / f"{_stem(way)}.{seed}.score.json"
        if not record.exists():
            record.write_text(json.dumps(self._scored(way, seed)))
            print(f"seed {seed}: {record.read_text()}", file=sys.stderr, flush=True)
        found = json.loads(record.read_text())
        return Score(**found) if found else None

    def _scored(self, way: Way, seed: int) -> dict[str, Any] | None:
        try:
            made = self.made(way, seed)
        except subprocess.CalledProcessError as failed:
            if failed.returncode == INFEASIBLE:
                return None
            raise
        runs = [self._compared(made.path, noise) for noise in self.noise_seeds]
        error, distance = (mean(column) for column in zip(*runs, strict=True))
        return asdict(Score(_text(way), error, distance, made.size, made.seconds))

    def _compared(self, path: str, noise: int) -> tuple[float, float]:
        words = ("fid", path, "--ref", self.original(noise), "--extractor", "pixels", *self.sampling)
        found = self._run(*words, "--seed", str(noise))
        return found["paired"]["mse"], found["frechet"]


def _processor() -> float:
    """Return the seconds of the processor that finished commands took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _text(way: Way) -> str:
    return " | ".join(" ".join(stage) for stage in way)


def _stem(way: Way) -> str:
    """Return the name of a way's files: what can be read of it, and a digest."""
    digest = hashlib.sha256(repr(way).encode()).hexdigest()[:8]
    return f"{re.sub('[^a-z0-9.]+', '-', _text(way))[:80]}.{digest}"


@dataclass(frozen=True)
class Found:
    """What a method offers at a size: its score, or the least bytes that it reaches (None where that is not known)."""

    score: Score | None
    least: int | None = None


Find = Callable[[Lab, int, int], Found]
"""The search of a method, from lab, bytes allowed and calibration seed."""


def sized(*stages: Stage) -> Find:
    """Return the search of a method that takes a size."""
    return lambda lab, size, seed: Found(lab.score(_with_limit(stages, size), seed))


def _with_limit(way: Way, size: int) -> Way:
    return tuple(tuple(word.replace(LIMIT, str(size)) for word in stage) for stage in way)


def fitting(ways: Sequence[Way]) -> Find:
    """Return the search of a method without sizes: of `ways`, the largest file first, the first that fits."""

    def find(lab: Lab, size: int, seed: int) -> Found:
        low, high = 0, len(ways)  # the first that fits is at `low` or behind it, and before `high` or none
        while low < high:
            middle = (low + high) // 2
            if lab.size(ways[middle], seed) <= size:
                high = middle
            else:
                low = middle + 1
        if low == len(ways):
            return Found(None, lab.size(ways[-1], seed))
        return Found(lab.score(ways[low], seed))

    return find


def searched(grid: Sequence[Sequence[Way]], start: Callable[[int], int]) -> Find:
    """Return the search of the least paired error in a grid, by the evaluation itself.

    Along the first row it goes from `start` towards less error until both neighbours have more; of the other rows
    it takes the neighbourhood of that place. The score has the least distance of all that were tried.
    """

    def find(lab: Lab, size: int, seed: int) -> Found:
        def error(row: Sequence[Way], place: int) -> float:
            if not 0 <= place < len(row):
                return float("inf")
            score = lab.score(_with_limit(row[place], size), seed)
            return score.error if score else float("inf")

        best = start(size)
        while best + 1 < len(grid[0]) and error(grid[0], best) == float("inf"):
            best += 1
        while (near := min((best, best - 1, best + 1), key=lambda place: error(grid[0], place))) != best:
            best = near
        ways = [row[place] for row in grid for place in (best - 1, best, best + 1) if 0 <= place < len(row)]
        scores = [score for way in ways if (score := lab.score(_with_limit(way, size), seed))]
        if not scores:
            return Found(None)
        least = min(scores, key=lambda score: score.error)
        return Found(replace(least, distance=min(score.distance for score in scores)))

    return find


def methods(about: Mapping[str, Any], multiples: Sequence[str], extras: bool) -> dict[str, Find]:
    """Return the methods by their labels, for a checkpoint that `inspect` told about."""
    config, file_bytes = about["config"], about["file_bytes"]
    experts, top_k, width = (config[name] for name in ("num_experts", "top_k", "expert_width"))
    keeps = [str(count) for count in range(experts - 1, top_k - 1, -1)]
    nf4 = ("quantize", "--uniform", "--format", "nf4")
    mix = ("quantize", "--size", LIMIT)

    def narrowed(share: float, multiple: str) -> Stage:
        return ("prune", "--neurons", f"{share:g}", "--allocate", "global", "--multiple", multiple)

    def two_stages(share: float, multiple: str) -> Way:
        return (mix,) if share == 1.0 else (narrowed(share, multiple), mix)

    def share_at(size: int) -> int:
        """Return the place of the share at which formats of three to four bits about fill the bytes."""
        return min(range(len(SHARES)), key=lambda place: abs(SHARES[place] - 3 * size / file_bytes))

    def few_dropped(_: int) -> int:
        return min(1, len(keeps) - 1)

    def then_mixed(*stages: Stage) -> Find:
        return searched([[(stage, mix) for stage in stages]], few_dropped)

    finest = min(multiples, key=int)
    steps = width // int(finest)
    found = {
        "compress": sized(("compress", "--size", LIMIT)),
        "narrowing, then a mix": searched(
            [[two_stages(share, multiple) for share in SHARES] for multiple in multiples], share_at
        ),
        "a mix": sized(mix),
        "PMQ": sized((*mix, "--method", "pmq")),
        "uniform integers, GPTQ": fitting(
            [
                (("quantize", "--uniform", "--format", "int", "--bits", str(bits), "--rounding", "gptq"),)
                for bits in (8, 6, 5, 4, 3, 2)
            ]
        ),
        "NF4": fitting([(nf4,)]),
        "narrowing": fitting([(narrowed(step / steps, finest),) for step in range(steps - 1, 0, -1)]),
        "REAP": fitting([(("prune", "--keep", keep),) for keep in keeps]),
        "merging": fitting([(("merge", "--groups", keep, "--method", "uncurl"),) for keep in keeps]),
        "REAP + NF4": fitting([(("prune", "--keep", keep, "--router", "slice", "--no-refit"), nf4) for keep in keeps]),
    }
    if not extras:
        return found
    return {
        "compress": found["compress"],
        "merging, then a mix": then_mixed(*(("merge", "--groups", keep, "--method", "uncurl") for keep in keeps)),
        "REAP, then a mix": then_mixed(*(("prune", "--keep", keep) for keep in keeps)),
        "REAP with constants, then a mix": then_mixed(*(("prune", "--keep", keep, "--constants") for keep in keeps)),
        "REAP with maps of rank 8, then a mix": then_mixed(
            *(("prune", "--keep", keep, "--residual-rank", "8") for keep in keeps)
        ),
    }


def line(label: str, found: Sequence[Found]) -> str:
    """Return a method's row: means over the calibration seeds that reach the size, with least and most."""
    scores = [each.score for each in found if each.score]
    if not scores:
        least = [each.least for each in found if each.least]
        return f"| {label} | | | {f'at least {min(least):,}' if least else 'does not get there'} | |"
    cells = []
    for values in ([score.error for score in scores], [score.distance for score in scores]):
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
        cells.append(f"{mean(values):.3g}{spread}")
    ways = sorted({score.way for score in scores}) if any(" | " in score.way for score in scores) else []
    told = f" ({_settings(ways)})" if ways else ""
    seconds = mean(score.seconds for score in scores)
    return f"| {label}{told} | {' | '.join(cells)} | {max(score.size for score in scores):,} | {seconds:.0f} |"


def _settings(ways: Sequence[str]) -> str:
    """Return the numbers of the first stages of ways, as "0.5, multiple 16; 0.65, multiple 16"."""
    told = []
    for way in ways:
        words = way.split(" | ")[0].split()
        number = next(
            (words[words.index(name) + 1] for name in ("--neurons", "--keep", "--groups") if name in words), "1"
        )
        told.append(f"{number}, multiple {words[words.index('--multiple') + 1]}" if "--multiple" in words else number)
    return "; ".join(told)


def size_of(text: str, file_bytes: int) -> int:
    """Return the bytes of a size: a fraction of the file, or bytes."""
    value = Fraction(text)
    return int(value * file_bytes) if value < 1 else int(value)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options. Raises `SystemExit` where noise of the evaluation is that of a calibration."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("checkpoint", nargs="?", default="demo:digits", help="a file, a folder or demo:digits")
    found.add_argument("--sizes", default="1/2,1/4,1/6,1/8", help="shares of the file, or bytes")
    found.add_argument("--calibration-seeds", default="0,1,2")
    found.add_argument("--noise-seeds", default="7", help="of the evaluation")
    found.add_argument("--images", default="2048")
    found.add_argument("--steps", default="16")
    found.add_argument("--multiples", default="16,64", help="of narrowed widths, in plans of two stages")
    found.add_argument("--extras", action="store_true", help="what compress leaves out")
    found.add_argument("--only", action="append", help="the method of this label, and no other; can be repeated")
    found.add_argument("--folder", type=Path, help="where all files are kept, so that a later run continues")
    found.add_argument("--json", type=Path, help="file to write the numbers to")
    options = found.parse_args(arguments)
    for name in ("calibration_seeds", "noise_seeds"):
        setattr(options, name, tuple(int(seed) for seed in getattr(options, name).split(",")))
    both = set(options.calibration_seeds) & set(options.noise_seeds)
    if both:
        raise SystemExit(f"seed {min(both)} is one of a calibration: give another to --noise-seeds")
    return options


def measured(lab: Lab, options: argparse.Namespace) -> dict[int, dict[str, list[Found]]]:
    """Return what each method offers, by size, label and calibration seed."""
    about = ditmoe("inspect", lab.checkpoint, folder=lab.folder)
    ways = methods(about, options.multiples.split(","), options.extras)
    unknown = set(options.only or ()) - set(ways)
    if unknown:
        raise SystemExit(f"no method is called {sorted(unknown)[0]!r}; there are {', '.join(ways)}")
    asked = {label: find for label, find in ways.items() if not options.only or label in options.only}
    sizes = [size_of(text, about["file_bytes"]) for text in options.sizes.split(",")]
    return {
        size: {label: [find(lab, size, seed) for seed in options.calibration_seeds] for label, find in asked.items()}
        for size in sizes
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    options = parsed(arguments)
    checkpoint = str(Path(options.checkpoint).resolve()) if Path(options.checkpoint).exists() else options.checkpoint
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder.resolve() if options.folder else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        sampling = ("--images", options.images, "--steps", options.steps)
        table = measured(Lab(checkpoint, folder, sampling, options.noise_seeds), options)
    for size, rows in table.items():
        print(f"{size:,} bytes\n")
        print("| | paired MSE | Fréchet to the original | bytes | seconds of the processor |\n|---|---|---|---|---|")
        print("\n".join(line(label, found) for label, found in rows.items()) + "\n")
    if options.json:
        numbers = {
            size: {label: [asdict(each) for each in found] for label, found in rows.items()}
            for size, rows in table.items()
        }
        options.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
