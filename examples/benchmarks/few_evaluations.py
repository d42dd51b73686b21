"""Measure bytes, evaluations and damage together: solvers in few steps against distilled copies.

    python examples/benchmarks/few_evaluations.py demo:digits --folder demo.few --iterations 3000
    python examples/benchmarks/few_evaluations.py digits-ddpm.pt --folder ddpm.few --iterations 2000 --only "itself, 4"
    python examples/benchmarks/few_evaluations.py cifar10.pt --images 256 --real images.npz --folder cifar.few

Prints a Markdown table, a row a checkpoint and its sampling: bytes; evaluations an image; the mean squared pixel error
to the original's fine solution (64 steps of its default solver, without guidance or with the row's) from the same
noise, and the Fréchet distances to that and to real images over raw pixels (averaged to 8 x 8 where larger), means over
noise seeds; precision, recall, the variance within classes over that of real images, and the labels that a logistic
regression finds right; and the processor's seconds of distilling. Images of the evaluation have noise of their own.
Started again with the same folder it goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from measuring import ditmoe
from weak_guidance import Real, real_digits, real_images, within_classes

from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER
from ditmoe_cli.evaluation.features.extractors import PixelExtractor
from ditmoe_cli.evaluation.images import read_images
from ditmoe_cli.evaluation.scores.feature_statistics import feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_to
from ditmoe_cli.evaluation.scores.paired_error import paired_error
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall
from ditmoe_cli.model.checkpoint import open_checkpoint, resolve_path

FINE = 64
WEAK = ("prune", "--keep", "0.5")
NARROW = {share: ("prune", "--neurons", share, "--allocate", "global") for share in ("0.5", "0.25")}
ITSELF, HALF, QUARTER = (), NARROW["0.5"], NARROW["0.25"]
GUIDED = ("--guide-with", "weak.safetensors", "--guide-scale", "0.5")


@dataclass(frozen=True)
class Row:
    """A checkpoint and how it is sampled.

    Attributes:
        label: its name.
        compressed: the command that makes the student; none for the original itself.
        steps: of the student, to which it is distilled; 0 for none.
        guided: guidance of the original, which distilling moves into the weights.
        after: the command that compresses what was distilled.
        sampling: options of sampling.
    """

    label: str
    compressed: tuple[str, ...] = ()
    steps: int = 0
    guided: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()


def stem_of(row: Row) -> str:
    """Return the name of a row as that of its files begins."""
    return row.label.replace(" ", "-").replace(",", "")


def rows_of(weights: int) -> tuple[Row, ...]:
    """Return all rows; an eighth is that of the original's weights in fp32."""
    eighth = ("quantize", "--size", str(weights // 2))
    cfg = ("--cfg", "1.5")
    return (
        *(Row(f"original, {steps} steps", sampling=("--steps", str(steps))) for steps in (16, 8, 6, 4)),
        *(Row(f"itself, {steps}", ITSELF, steps) for steps in (4, 2, 1)),
        *(Row(f"half the neurons, {steps}", HALF, steps) for steps in (4, 2, 1)),
        Row("a quarter of the neurons, 4", QUARTER, 4),
        Row("a quarter of the neurons, 2", QUARTER, 2),
        Row("original by a weak copy, 16 steps", guided=GUIDED),
        *(Row(f"half, by a weak copy, {steps}", HALF, steps, GUIDED) for steps in (4, 2)),
        *(Row(f"half, by a weak copy, {steps}, an eighth", HALF, steps, GUIDED, eighth) for steps in (4, 2)),
        Row("original, cfg 1.5, 16 steps", guided=cfg),
        Row("half, cfg 1.5, 4", HALF, 4, cfg),
    )


@dataclass(frozen=True)
class Score:
    """Scores of the images of one noise seed."""

    error: float
    to_original: float
    to_real: float
    precision: float
    recall: float
    spread: float
    accuracy: float


@dataclass(frozen=True)
class Study:
    """A checkpoint, the folder of all files, real images, and how much is sampled and trained."""

    checkpoint: str
    folder: Path
    real: Real
    images: int
    iterations: int
    seeds: tuple[int, ...]
    extra: tuple[str, ...]

    def made(self, row: Row) -> tuple[str, float]:
        """Return the file of a row, made where it is not there, and the processor's seconds of distilling."""
        name = self.checkpoint
        if row.compressed:
            name = self._file(f"student{row.compressed[2]}", row.compressed, name)
        if not row.steps:
            return name, 0.0
        stem = f"{row.compressed[2] if row.compressed else 1}.{row.steps}{_told(row.guided)}"
        words = ("distill", "--original", self.checkpoint, "--steps", str(row.steps), *row.guided)
        length = ("--iterations", str(self.iterations), *self.extra)
        before = _processor()
        name = self._file(f"distilled.{stem}", (*words, *length), name)
        seconds = self._kept_seconds(name, _processor() - before)
        if row.after:
            name = self._file(f"rounded.{stem}", row.after, name)
        return name, seconds

    def _file(self, stem: str, words: Sequence[str], source: str) -> str:
        path = self.folder / f"{stem}.safetensors"
        self._make_weak(words)
        if not path.exists():
            ditmoe(words[0], source, *words[1:], "-o", path, folder=self.folder)
        return str(path)

    def _make_weak(self, words: Sequence[str]) -> None:
        """Make the weaker copy that a command names, where it is not there."""
        if "--guide-with" in words and not (self.folder / "weak.safetensors").exists():
            ditmoe(WEAK[0], self.checkpoint, *WEAK[1:], "-o", "weak.safetensors", folder=self.folder)

    def _kept_seconds(self, name: str, seconds: float) -> float:
        record = Path(f"{name}.seconds")
        if not record.exists():
            record.write_text(f"{seconds:.0f}")
        return float(record.read_text())

    def samples(self, name: str, stem: str, seed: int, words: Sequence[str]) -> np.ndarray:
        """Return the images of a checkpoint, uint8 (N, S, S, C)."""
        path = self.folder / f"{stem}.{seed}.samples.safetensors"
        if not path.exists():
            asked = ("--images", str(self.images), "--seed", str(seed), *words)
            self._make_weak(words)
            ditmoe("sample", name, *asked, "-o", path, folder=self.folder)
        return np.asarray(read_images(path).images)

    def fine(self, guided: Sequence[str], seed: int) -> np.ndarray:
        """Return the images of the original's fine solution."""
        return self.samples(self.checkpoint, f"fine{_told(guided)}", seed, ("--steps", str(FINE), *guided))

    def record(self, row: Row, seed: int) -> Path:
        """Return the file that keeps the score of a row."""
        return self.folder / f"{stem_of(row)}.{seed}.json"

    def scores(self, row: Row, name: str) -> list[Score]:
        """Return the scores of a row, one a noise seed."""
        found, stem = [], stem_of(row)
        levels = open_checkpoint(self.checkpoint).card.grey_levels
        for seed in self.seeds:
            record = self.record(row, seed)
            if not record.exists():
                fine = self.fine(row.guided, seed)
                words = row.sampling if row.steps else (*row.sampling, *row.guided)
                record.write_text(json.dumps(asdict(self._score(self.samples(name, stem, seed, words), fine, levels))))
            found.append(Score(**json.loads(record.read_text())))
        return found

    def _score(self, images: np.ndarray, fine: np.ndarray, levels: int) -> Score:
        features, others = (PixelExtractor(levels)(each) for each in (images, fine))
        config = open_checkpoint(self.checkpoint).config
        labels = np.arange(len(images)) % config.num_classes
        near, real = precision_recall(features, self.real.features), self.real
        right = float((real.classify(features) == labels).mean()) if real.classify is not None else float("nan")
        return Score(
            paired_error(images, fine, levels).mse,
            frechet_to(feature_statistics(others))(feature_statistics(features)),
            real.distance(features),
            near.precision,
            near.recall,
            within_classes(features, labels) / within_classes(real.features, real.labels),
            right,
        )

    def evaluations(self, row: Row) -> int:
        """Return the evaluations an image."""
        if row.steps:
            return row.steps
        steps = int(row.sampling[1]) if row.sampling else 16 if DEFAULT_SOLVER["rf"] == self._solver else 20
        return steps * (2 if row.guided else 1)

    @property
    def _solver(self) -> str:
        return DEFAULT_SOLVER[open_checkpoint(self.checkpoint).config.sampler]


def _told(guided: Sequence[str]) -> str:
    """Return guidance as part of a name."""
    return "" if not guided else f".{guided[0].strip('-')}{guided[-1]}"


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def line(row: Row, size: int, nfe: int, scores: Sequence[Score], seconds: float) -> str:
    """Return a row of the table: means over noise seeds."""
    means = {name: mean(getattr(score, name) for score in scores) for name in asdict(scores[0])}
    accuracy = "–" if np.isnan(means["accuracy"]) else f"{means['accuracy']:.1%}"
    cells = (
        f"{size:,}",
        f"{nfe}",
        f"{means['error']:.3g}",
        f"{means['to_original']:.3g}",
        f"{means['to_real']:.2f}",
        f"{means['precision']:.3f}",
        f"{means['recall']:.3f}",
        f"{means['spread']:.3f}",
        accuracy,
        f"{seconds:.0f}" if seconds else "",
    )
    return f"| {row.label} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file, a folder or demo:digits")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=(7, 11, 13))
    parser.add_argument("--real", type=Path, help="npz of real images; scikit-learn's digits where none is given")
    parser.add_argument("--only", action="append", help="the row of this label, and no other; can be repeated")
    parser.add_argument("--folder", type=Path, help="where all files are kept, so that a later run goes on")
    parser.add_argument("--distill", default="", help="further options of ditmoe distill, as '--states own'")
    options = parser.parse_args(arguments)
    path = str(resolve_path(options.checkpoint, lambda _: None).absolute())
    rows = rows_of(sum(weight.info.numel for weight in open_checkpoint(path).weights.values()))
    unknown = set(options.only or ()) - {row.label for row in rows}
    if unknown:
        raise SystemExit(f"no row is called {sorted(unknown)[0]!r}; there are {', '.join(row.label for row in rows)}")
    real = real_images(options.real) if options.real else real_digits()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder.resolve() if options.folder else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        extra = tuple(options.distill.split())
        study = Study(path, folder, real, options.images, options.iterations, tuple(options.seeds), extra)
        print(
            "| checkpoint | bytes | evaluations | paired | to the original | to real images | precision | recall | ",
            end="",
        )
        print("spread | labels | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|")
        for row in (row for row in rows if row.label in (options.only or [row.label])):
            file, seconds = study.made(row)
            scores = study.scores(row, file)
            print(line(row, Path(file).stat().st_size, study.evaluations(row), scores, seconds), flush=True)
            print(f"measured {row.label}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
