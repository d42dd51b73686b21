"""Draw what few_evaluations.py has measured: distance to real images against seconds an image, and images.

    python examples/benchmarks/few_evaluations.py demo:digits --folder demo.few --iterations 2000 --images 1797
    python examples/benchmarks/few_evaluations_picture.py demo:digits --folder demo.few --output few.png

Areas of circles are as bytes. Seconds are those of one thread, by its processor time (`ditmoe bench --batch 64
--processor-time`). Beside them are images of one noise seed, a row a checkpoint, one image of each of the first ten
classes. Rows are those whose scores the folder has; of a copy that was rounded, the rounded one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from few_evaluations import FINE, Row, Study, rows_of, stem_of
from measuring import ditmoe
from weak_guidance import Real, real_digits, real_images

from ditmoe_cli.model.checkpoint import open_checkpoint, resolve_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = ("original, 16 steps", "original, 4 steps", "half the neurons, 4", "half, by a weak copy, 4, an eighth")
_EIGHTH = ", an eighth"
AREA = 500  # points² of the original's bytes
IMAGES = 10


def seconds_an_image(file: str, evaluations: int, folder: Path) -> float:
    """Return the processor's seconds of an image in so many evaluations."""
    image = ditmoe("bench", file, "--batch", "64", "--processor-time", folder=folder)["image"]
    return float(image["seconds"]) / int(image["nfe"]) * evaluations


def measured(study: Study, rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Return the rows whose scores are in the folder, and their files."""
    kept = [row for row in rows if all(study.record(row, seed).exists() for seed in study.seeds)]
    rounded = {row.label.removesuffix(_EIGHTH) for row in kept if row.after}
    return [(row, study.made(row)[0]) for row in kept if row.label not in rounded]


def draw_scores(axes: Any, study: Study, found: Sequence[tuple[Row, str]]) -> None:
    """Draw a circle a row, of an area as its bytes."""
    whole = Path(study.checkpoint).stat().st_size
    for row, file in found:
        seconds = seconds_an_image(file, study.evaluations(row), study.folder)
        distance = mean(score.to_real for score in study.scores(row, file))
        size = Path(file).stat().st_size
        colour = "tab:gray" if not row.steps else "tab:orange" if row.after else "tab:blue"
        axes.scatter(1e3 * seconds, distance, s=AREA * size / whole, color=colour, alpha=0.6)
        place = (0, -20) if row.steps else (0, 14)
        name = row.label.replace(_EIGHTH, f", {size / whole:.0%} of the bytes")
        axes.annotate(name, (1e3 * seconds, distance), place, fontsize=7, ha="center", textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds an image, one core")
    axes.set_ylabel("distance to real images")
    axes.set_title("area: bytes of the file", fontsize=9)
    axes.margins(0.25)
    axes.grid(alpha=0.3)


def draw_images(axes: Any, study: Study, found: Sequence[tuple[Row, str]]) -> None:
    """Draw images of the first seed, a row a checkpoint, the fine solution first."""
    shown = {row.label: row for row, _ in found if row.label in SHOWN}
    strips = [study.fine((), study.seeds[0])]
    names = [f"original, {FINE} steps"]
    for label in (label for label in SHOWN if label in shown):
        row = shown[label]
        strips.append(study.samples(dict(found)[row], stem_of(row), study.seeds[0], row.sampling))
        names.append(label)
    framed = [np.pad(strip[:IMAGES], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for strip in strips]
    side = framed[0].shape[1]
    grid = np.concatenate([np.concatenate(list(strip), axis=1) for strip in framed])
    axes.imshow(grid.squeeze(), cmap="gray" if grid.shape[-1] == 1 else None, vmin=0, vmax=255)
    axes.set_frame_on(False)
    axes.set_yticks([(i + 0.5) * side for i in range(len(names))], names, fontsize=8)
    axes.set_xticks([])
    axes.set_title("the same noise", fontsize=9)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=(7, 11))
    parser.add_argument("--real", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    path = str(resolve_path(options.checkpoint, lambda _: None).absolute())
    real: Real = real_images(options.real) if options.real else real_digits()
    seeds, folder = tuple(options.seeds), options.folder.resolve()
    study = Study(path, folder, real, options.images, options.iterations, seeds, ())
    rows = rows_of(sum(weight.info.numel for weight in open_checkpoint(path).weights.values()))
    found = measured(study, rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(5, 6), layout="constrained")
    draw_scores(left, study, found)
    draw_images(right, study, found)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
