"""``ditmoe sample``: images from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ditmoe_cli.api import sample_runs as asked
from ditmoe_cli.api.argument_checks import ending
from ditmoe_cli.api.sample_runs import SampledImages, sampled
from ditmoe_cli.cli.guiding_options import WeakGuiding, beside, marked
from ditmoe_cli.cli.options import Accelerating, FileDestination, Models, Source
from ditmoe_cli.cli.sampling_options import ImageSampling, Scheduling, schedule_rows, scheduled, solver_row
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit
from ditmoe_cli.progress import human_bytes

MACHINE = Models
EXAMPLES = (
    "ditmoe sample ckpt.pt --images 64 --cfg 4 --grid grid.png",
    "ditmoe sample ckpt.pt --guide-with half.safetensors --guide-scale 0.5",
    "ditmoe sample ckpt.pt --schedule half.schedule.safetensors",
    "ditmoe sample ckpt.pt --vae stabilityai/sd-vae-ft-mse --png images",
    "torchrun --nproc-per-node 8 -m ditmoe_cli sample ckpt.pt --images 50000 --npz samples.npz",
)


@dataclass(frozen=True)
class Images(ImageSampling):
    """Sampling for images."""

    images: Annotated[int, typer.Option("--images", metavar="N", help="Images to sample.")] = 64


@dataclass(frozen=True)
class ImageFiles(asked.ImageFiles, FileDestination):
    """The samples file, and the other files that hold the same images."""

    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Folder to write each image to as PNG.")] = (
        None
    )
    npz: Annotated[
        Path | None,
        typer.Option(
            "--npz",
            metavar="FILE",
            callback=ending(".npz"),
            help="FILE.npz to write the images to as arr_0, as ADM's evaluator reads them.",
        ),
    ] = None
    grid: Annotated[
        Path | None,
        typer.Option("--grid", metavar="FILE", callback=ending(".png"), help="PNG to draw the first 64 images in."),
    ] = None


def run(
    sampling: Images,
    weaker: WeakGuiding,
    scheduling: Scheduling,
    running: Accelerating,
    source: Source,
    to: ImageFiles,
    printing: Printing,
) -> None:
    """Sample images.

    Image i depends on (seed, i) and its label alone. Pixel models, and latent models with --vae, give images as uint8
    (N, H, W, C); latent models without it give latents as fp32 (N, C, S, S). Started again, the same command continues
    a run that was interrupted; torchrun's processes share the work.
    """
    stage = source.stage(shared=True)
    opened = open_stage(stage)
    guiding = beside(weaker.opened(source.given), stage)
    schedule = scheduling.of(stage)
    result = sampled(opened, sampling, guiding, running, to, schedule)
    if result is None:
        return  # another rank writes and prints
    done = scheduled(marked(guiding, stage), schedule).done("sample", result.spec.conditions(), samples=result.path)
    emit(printing, done.to_json(result.to_json()), rows(result), str(result.path.absolute()))


def rows(result: SampledImages) -> list[Row]:
    """Return the files, images and solver as a table."""
    spec = result.spec
    return [
        ("wrote", f"{result.path.absolute()} ({human_bytes(result.bytes)})"),
        *(("wrote", path.absolute()) for path in result.exports.values()),
        (result.kind, f"{spec.images} of {' x '.join(map(str, result.shape))}"),
        solver_row({**spec.conditions(), "nfe": result.nfe}),
        *schedule_rows(result.to_json()),
    ]
