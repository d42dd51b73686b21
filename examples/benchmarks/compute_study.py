"""Measure methods that compute less against fewer steps, under one ruler: errors over operations and seconds.

    python examples/benchmarks/compute_study.py demo:digits --way euler:50 --images 512 --folder demo.compute
    python examples/benchmarks/compute_study.py demo:digits --way ab2:16 --copy few.safetensors --folder demo.compute
    python examples/benchmarks/compute_study.py digits-ddpm.pt --way ddpm:250 --images 128 --folder ddpm.compute
    python examples/benchmarks/compute_study.py cifar10.pt --way euler:50 --real images.npz --folder cifar.compute

Prints a Markdown table, a row a method, and draws FOLDER/WAY.png. All rows of a way have the same noise and labels, of
a purpose that no schedule is chosen on. Columns: operations an image, as a share of the way's with everything computed
(for other solvers: evaluations, over the way's); the processor's seconds of an image over those of the way; the mean
squared pixel error to the way's own images, and to the fine solution (96 steps of ab3, or 150 of dpmpp-2m); and the
Fréchet distances of raw pixels (averaged to 8 x 8 where larger) to the way's images and to real ones. Errors to the
way's images are those of its noise; ancestral sampling draws noise at each step, so that other steps have none, and
there is no fine solution. Copies are distilled checkpoints (``--copy``), sampled by their own steps. Started again with
the same folder it goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from weak_guidance import Real, real_digits, real_images

from ditmoe_cli.diffusion.few_steps import usual_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch
from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER, choose_solver
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, scheduled_with
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.evaluation.features.extractors import PixelExtractor
from ditmoe_cli.evaluation.images import to_uint8
from ditmoe_cli.evaluation.scores.feature_statistics import feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_to
from ditmoe_cli.evaluation.scores.paired_error import paired_error
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint, resolve_path
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.scheduled import ComputeCount
from ditmoe_cli.scheduling.chosen_schedule import Planning
from ditmoe_cli.scheduling.schedule_request import Asked, usual_bins
from ditmoe_cli.scheduling.way_states import Way

FINE = {"rf": ("ab3", 96), "ddpm": ("dpmpp-2m", 150)}
SOLVERS = {"rf": ("euler", "ab2", "ab3", "dpmpp-2m"), "ddpm": ("ddim", "ddim-trailing", "dpmpp-2m", "ddpm")}
FEWER = (0.7, 0.5, 0.35, 0.2)
METHODS = (
    *("fora:2", "fora:3", "taylor:2", "taylor:3", "moeca:2", "top1", "regressed", "saliency", "odp", "top-p:0.4"),
    *("residual:0.05", "residual:0.1", "residual:0.2", "follow:2", "follow:3", "follow:4"),
)
PLANS = (("planned", 0.7), ("planned", 0.5), ("planned", 0.35), ("a-sdm", 0.5))
STOCHASTIC = "ddpm"


@dataclass(frozen=True)
class Row:
    """What was measured of a method."""

    label: str
    kind: str
    operations: float
    seconds: float
    to_way: float
    to_fine: float
    distance: float
    real: float


@dataclass
class Study:
    """A checkpoint with one way of sampling, and how much of it is sampled."""

    checkpoint: Checkpoint
    model: DiTMoE
    spec: SampleSpec
    real: Real
    folder: Path
    batch: int
    planned_on: int
    grey_levels: int

    @property
    def bins(self) -> int:
        """The step bins of schedules."""
        return usual_bins(len(self.spec.way.times))

    @cached_property
    def planning(self) -> Planning:
        """What schedules of the way are chosen by."""
        way = Way(self.model, self.spec.way, self.spec.seed, self.spec.classes)
        return Planning(way, self.planned_on, self.bins)

    @property
    def family(self) -> str:
        """The family of the weights."""
        return self.checkpoint.config.sampler

    def other(self, solver: str, steps: int) -> SampleSpec:
        """Return the spec of another solver."""
        return replace(self.spec, solver=choose_solver(solver, self.checkpoint.config.sampler), steps=steps)

    def images(
        self, name: str, spec: SampleSpec, scheduled: Scheduled | None = None, model: DiTMoE | None = None
    ) -> tuple[NDArray[Any], float]:
        """Return images, uint8, and the processor's seconds of one; kept by name."""
        path = self.folder / f"{name.replace(':', '')}.npz"
        if not path.exists():
            before = time.process_time()
            parts = [
                to_uint8(sample_batch(model or self.model, spec, indices, purpose="study", scheduled=scheduled))
                for indices in batches(spec.images, self.batch)
            ]
            seconds = (time.process_time() - before) / spec.images
            np.savez(path, images=np.concatenate(parts), seconds=seconds)
        with np.load(path) as found:
            return found["images"], float(found["seconds"])

    def by_schedule(self, asked: Asked, name: str) -> tuple[NDArray[Any], float, float]:
        """Return images by a schedule, the seconds of one, and their share of all operations."""
        record = self.folder / f"{name.replace(':', '')}.flops"
        path = self.folder / f"{name.replace(':', '')}.npz"
        if not (path.exists() and record.exists()):
            path.unlink(missing_ok=True)
            chosen = self.planning.chosen(asked)
            counts: list[ComputeCount] = []
            by = scheduled_with(chosen.best.table, chosen.arrays, asked.bins, counts.append)
            images, seconds = self.images(name, self.spec, by)
            share = sum(count.total for count in counts) / self.spec.images
            record.write_text(str(share / self.spec.way.operations(self.checkpoint.config)))
        images, seconds = self.images(name, self.spec)
        return images, seconds, float(record.read_text())


def scores(
    study: Study, images: NDArray[Any], way: NDArray[Any], fine: NDArray[Any] | None, pairs: bool
) -> dict[str, float]:
    """Return errors and distances of images; NaN where there is nothing to pair with."""
    levels = study.grey_levels
    features, others = (PixelExtractor(levels)(each) for each in (images, way))
    return {
        "to_way": paired_error(images, way, levels).mse if pairs else float("nan"),
        "to_fine": paired_error(images, fine, levels).mse if fine is not None else float("nan"),
        "distance": frechet_to(feature_statistics(others))(feature_statistics(features)),
        "real": study.real.distance(features),
    }


def measured(study: Study, copies: Sequence[Path], only: Callable[[str], bool]) -> list[Row]:
    """Return all rows of a way, printed as they are measured."""
    spec, stochastic = study.spec, study.spec.solver == STOCHASTIC
    way, seconds = study.images("full", spec)
    fine = None if stochastic else study.images("fine", study.other(*FINE[study.family]))[0]
    rows: list[Row] = []

    def add(label: str, kind: str, images: NDArray[Any], mine: float, share: float, pairs: bool = True) -> None:
        rows.append(Row(label, kind, share, mine / seconds, **scores(study, images, way, fine, pairs)))
        print(line(rows[-1]), flush=True)

    add("everything computed", "way", way, seconds, 1.0)
    for solver in SOLVERS[study.family]:
        for share in FEWER:
            steps = max(1, round(share * spec.nfe) - (2 if solver == "ab3" else 0))
            other = study.other(solver, steps)
            if not only("steps") or (solver in ("ab3", "ddim-trailing", "ddpm") and share not in (0.5, 0.2)):
                continue
            images, mine = study.images(f"{solver}.{steps}", other)
            add(f"{steps} steps of {solver}", "fewer steps", images, mine, other.nfe / spec.nfe, not stochastic)
    for method in METHODS:
        if only(method.partition(":")[0]):
            add(method, "whole method", *study.by_schedule(Asked(method, bins=study.bins), method))
    for method, share in PLANS:
        if only(method):
            asked = Asked(method, flops=share, images=study.planned_on, bins=study.bins)
            try:
                add(f"{method}, {share:g}", method, *study.by_schedule(asked, f"{method}{share:g}"))
            except InfeasibleError as error:
                print(f"| {method}, {share:g} | {error} |", flush=True)
    for path in copies:
        add_copy(study, path, add)
    return rows


def add_copy(study: Study, path: Path, add: Callable[..., None]) -> None:
    """Measure a distilled copy by its own steps; its operations are those of its evaluations and shapes."""
    copy = open_checkpoint(path)
    solver, steps = usual_sampling(copy, DEFAULT_SOLVER)
    spec = replace(study.spec, solver=solver, steps=steps, cfg=1.0)
    model = build_model(copy, torch.device("cpu"), torch.float32).prepack()
    images, mine = study.images(f"copy.{path.stem}", spec, model=model)
    share = spec.way.operations(copy.config) / study.spec.way.operations(study.checkpoint.config)
    add(f"{path.stem}, distilled to {steps}", "distilled", images, mine, share)


def line(row: Row) -> str:
    """Return a row of the table."""
    values = (row.to_way, row.to_fine, row.distance, row.real)
    cells = ["–" if np.isnan(value) else f"{value:.3g}" for value in values]
    return f"| {row.label} | {row.operations:.3f} | {row.seconds:.2f} | {' | '.join(cells)} |"


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw errors over operations, and distances to real images over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = not all(np.isnan(row.to_fine) for row in rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for kind in dict.fromkeys(row.kind for row in rows):
        mine = [row for row in rows if row.kind == kind]
        error = [row.to_fine if pairs else row.distance for row in mine]
        axes[0].scatter([row.operations for row in mine], error, label=kind, alpha=0.7)
        axes[1].scatter([row.seconds for row in mine], [row.real for row in mine], label=kind, alpha=0.7)
    for row in rows:
        place = (row.operations, row.to_fine if pairs else row.distance)
        axes[0].annotate(row.label, place, fontsize=5, xytext=(3, 2), textcoords="offset points")
    axes[0].set(xlabel="share of operations", yscale="log", title=title)
    axes[0].set_ylabel("squared pixel error to the fine solution" if pairs else "distance to the full sampling")
    axes[1].set(xlabel="share of seconds, one thread", ylabel="distance to real images")
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of one way of sampling."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file, a folder or demo:digits")
    parser.add_argument("--way", default="euler:50", help="solver and steps, as ab2:16, euler:50, ddim:50 or ddpm:250")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--planned-on", type=int, default=32, help="images that schedules are chosen on")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--real", type=Path, help="npz of real images; scikit-learn's digits where none is given")
    parser.add_argument("--grey-levels", type=int, help="of real images, 16 for the digits; default: the checkpoint's")
    parser.add_argument("--copy", type=Path, action="append", default=[], help="a distilled copy")
    parser.add_argument("--only", action="append", help="rows of this method, or 'steps'; can be repeated")
    parser.add_argument("--folder", type=Path, required=True, help="where images and the figure go")
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(resolve_path(options.checkpoint, lambda _: None).absolute())
    solver, _, steps = options.way.partition(":")
    spec = SampleSpec(
        images=options.images,
        steps=int(steps),
        cfg=options.cfg,
        seed=options.seed,
        solver=choose_solver(solver, checkpoint.config.sampler),
        classes=tuple(range(checkpoint.config.num_classes)),
    )
    folder = options.folder / options.way.replace(":", "")
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(checkpoint, torch.device("cpu"), torch.float32).prepack()
    real = real_images(options.real) if options.real else real_digits()
    levels = options.grey_levels or checkpoint.card.grey_levels
    study = Study(checkpoint, model, spec, real, folder, options.batch, options.planned_on, levels)
    print("| method | operations | seconds | to the full sampling | to the fine solution | ", end="")
    print("distance to the full sampling | to real images |\n|---|---|---|---|---|---|---|")
    wanted = set(options.only or ())
    rows = measured(study, options.copy, lambda name: not wanted or name in wanted)
    (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    draw(rows, options.folder / f"{options.way.replace(':', '')}.png", f"{checkpoint.name}, {spec.way.told}")


if __name__ == "__main__":
    main()
