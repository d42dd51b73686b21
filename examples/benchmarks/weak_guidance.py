"""Compare guidance by weaker copies of a model with classifier-free guidance, by distances to real images.

    python examples/benchmarks/weak_guidance.py demo:digits --images 1024 --seeds 0 1 2
    python examples/benchmarks/weak_guidance.py digits-ddpm.pt --images 1024 --short
    python examples/benchmarks/weak_guidance.py cifar10.pt --images 256 --short --real images.npz

Prints a Markdown table, a row a guidance, under the default solver and steps. Weaker copies are made by `ditmoe prune`
and `ditmoe quantize`; top1 and rank2 are other routings of the model. Columns: evaluations an image; the Fréchet
distance to real images over raw pixels (averaged to 8 x 8 where images are larger), of each noise seed; then means over
seeds: precision and recall of k nearest neighbours, k = 3; the variance within classes over that of real images; and,
for digits, how many labels a logistic regression that was fitted to the real ones finds.

Real images are scikit-learn's digits, on the scale of 0 to 16, or those of ``--real``, an npz of arr_0 and labels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from measuring import ditmoe
from numpy.typing import NDArray

from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch
from ditmoe_cli.diffusion.schedule import ALWAYS, DEFAULT_SOLVER, DEFAULT_STEPS, Interval
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.evaluation.features.extractors import PixelExtractor
from ditmoe_cli.evaluation.images import to_uint8
from ditmoe_cli.evaluation.scores.feature_statistics import feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_to
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall
from ditmoe_cli.model.checkpoint import open_checkpoint, resolve_path
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model

COPIES: dict[str, tuple[str, ...]] = {
    "half the experts": ("prune", "--keep", "0.5"),
    "a quarter of the neurons": ("prune", "--neurons", "0.25", "--allocate", "global"),
    "2.5-bit mix": ("quantize", "--bits", "2.5"),
}


@dataclass(frozen=True)
class Row:
    """A guidance: its scale of the null class, and the weaker copy or routing with scale and interval."""

    cfg: float = 1.0
    weak: str | None = None
    scale: float = 0.0
    interval: Interval = ALWAYS
    short: bool = False

    @property
    def label(self) -> str:
        """The row's name."""
        parts = [f"cfg {self.cfg:g}"] if self.cfg != 1.0 else []
        if self.weak is not None:
            within = "" if self.interval == ALWAYS else " in {:g} to {:g}".format(*self.interval)
            parts.append(f"{self.weak}, W {self.scale:g}{within}")
        return " and ".join(parts) or "none"


HALF, QUARTER, BITS = COPIES
ROWS = (
    Row(short=True),
    Row(cfg=1.1, short=True),
    Row(cfg=1.25, short=True),
    *(Row(weak=HALF, scale=scale, short=scale != 2) for scale in (0.25, 0.5, 1, 2)),
    *(Row(weak=QUARTER, scale=scale, short=scale < 1) for scale in (0.25, 0.5, 1, 2)),
    *(Row(weak=BITS, scale=scale) for scale in (0.25, 0.5, 1, 2)),
    *(Row(weak="top1", scale=scale, short=scale != 2) for scale in (0.25, 0.5, 1, 2)),
    *(Row(weak="rank2", scale=scale) for scale in (0.25, 0.5, 1)),
    *(Row(weak=HALF, scale=1, interval=within) for within in ((0.0, 0.5), (0.5, 1.0), (0.2, 0.8))),
    Row(cfg=1.1, weak=HALF, scale=0.5),
)


@dataclass(frozen=True)
class Real:
    """Real images as features (N, D), and their labels."""

    features: NDArray[np.float64]
    labels: NDArray[np.int64]
    classify: Callable[[NDArray[np.float64]], NDArray[np.int64]] | None = None

    @cached_property
    def distance(self) -> Callable[[NDArray[np.float64]], float]:
        """The Fréchet distance of features to the real ones."""
        to_real = frechet_to(feature_statistics(self.features))
        return lambda features: to_real(feature_statistics(features))


def real_digits() -> Real:
    """Return scikit-learn's digits, and the labels that a logistic regression gives to others."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    return Real(digits.data, digits.target, LogisticRegression(max_iter=5000).fit(digits.data, digits.target).predict)


def real_images(path: Path, most: int = 10_000) -> Real:
    """Return the images of an npz."""
    with np.load(path) as found:
        return Real(PixelExtractor(255)(found["arr_0"][:most]), found["labels"][:most])


def within_classes(features: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the variance of features about the means of their classes, summed over features."""
    parts = [features[labels == label] for label in np.unique(labels)]
    squares = sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in parts)
    return squares / (len(features) - len(parts))


@dataclass
class Study:
    """A checkpoint, its weaker copies in a folder, real images, and how it is sampled."""

    checkpoint: str
    folder: Path
    real: Real
    spec: SampleSpec
    grey_levels: int
    models: dict[str, DiTMoE] = field(default_factory=dict)

    def model(self, name: str | None) -> DiTMoE:
        """Return the model, or the weaker copy of a name, which is made where it is not there."""
        path = Path(self.checkpoint) if name is None else self.folder / f"{list(COPIES).index(name)}.safetensors"
        if str(path) not in self.models:
            if name is not None and not path.exists():
                command, *words = COPIES[name]
                ditmoe(command, self.checkpoint, *words, "-o", path, folder=self.folder)
            self.models[str(path)] = build_model(open_checkpoint(path), torch.device("cpu")).prepack()
        return self.models[str(path)]

    def spec_of(self, row: Row) -> SampleSpec:
        """Return how a row's images are sampled; the guide of a copy has its name in place of its fingerprint."""
        guide = None if row.weak is None else Guide(row.weak, row.scale, row.interval)
        return replace(self.spec, cfg=row.cfg, guide=guide)

    def scores(self, row: Row, seed: int) -> list[float]:
        """Return distance, precision, recall, spread and accuracy of the images of a seed; NaN where unknown."""
        spec, model = replace(self.spec_of(row), seed=seed), self.model(None)
        weak = weak_model(model, spec.guide, lambda: self.model(row.weak))
        parts = [to_uint8(sample_batch(model, spec, part, weak=weak)) for part in batches(spec.images, 256)]
        features = PixelExtractor(self.grey_levels)(np.concatenate(parts))
        labels = np.asarray(spec.labels(range(spec.images)))
        near, real = precision_recall(features, self.real.features), self.real
        spread = within_classes(features, labels) / within_classes(real.features, real.labels)
        right = float((real.classify(features) == labels).mean()) if real.classify is not None else float("nan")
        return [real.distance(features), near.precision, near.recall, spread, right]


def line(row: Row, nfe: int, found: Sequence[Sequence[float]]) -> str:
    """Return a row of the table."""
    distances = " / ".join(f"{scores[0]:.2f}" for scores in found)
    precision, recall, spread, right = (float(np.mean([scores[i] for scores in found])) for i in range(1, 5))
    accuracy = "–" if np.isnan(right) else f"{100 * right:.1f} %"
    return f"| {row.label} | {nfe} | {distances} | {precision:.3f} | {recall:.3f} | {spread:.3f} | {accuracy} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file, a folder or demo:digits")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--real", type=Path, help="npz of real images; scikit-learn's digits where none is given")
    parser.add_argument("--short", action="store_true", help="fewer rows")
    parser.add_argument("--only", action="append", help="the row of this label, and no other; can be repeated")
    parser.add_argument("--folder", type=Path, help="where weaker copies are kept, so that a later run finds them")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.label in (options.only or [row.label]) and (row.short or not options.short)]
    path = str(resolve_path(options.checkpoint, lambda _: None).absolute())
    config = open_checkpoint(path).config
    family, classes = config.sampler, tuple(range(config.num_classes))
    spec = SampleSpec(options.images, DEFAULT_STEPS[family], 1.0, 0, DEFAULT_SOLVER[family], classes)
    real = real_images(options.real) if options.real else real_digits()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder.resolve() if options.folder else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        study = Study(path, folder, real, spec, 255 if options.real else 16)
        print("| guidance | evaluations | distance to real images | precision | recall | spread | labels |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            found = [study.scores(row, seed) for seed in options.seeds]
            print(line(row, study.spec_of(row).nfe, found), flush=True)
            print(f"measured {row.label}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
