"""``ditmoe sample``: images from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditmoe_cli.api.argument_checks import ending
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.cli.guiding_options import Guiding, WeakGuiding, sampling_work
from ditmoe_cli.cli.options import Accelerating, FileDestination, Models, Running, Source
from ditmoe_cli.cli.sampling_options import ImageSampling, samples_label, solver_row
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.processes import first_process
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.samples import Sampling, Targets


MACHINE = Models
EXAMPLES = (
    "ditmoe sample ckpt.pt --images 64 --cfg 4 --grid grid.png",
    "ditmoe sample ckpt.pt --guide-with half.safetensors --guide-scale 0.5",
    "ditmoe sample ckpt.pt --vae stabilityai/sd-vae-ft-mse --png images",
    "torchrun --nproc-per-node 8 -m ditmoe_cli sample ckpt.pt --images 50000 --npz samples.npz",
)


@dataclass(frozen=True)
class Images(ImageSampling):
    """Sampling for images."""

    images: Annotated[int, typer.Option("--images", metavar="N", help="Images to sample.")] = 64


@dataclass(frozen=True)
class ImageFiles(FileDestination):
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

    def targets(self, checkpoint: Path, label: str, inputs: tuple[Path, ...]) -> Targets:
        """Return the same as the sampler takes them; `label` ends the default name, `inputs` stay as they are."""
        from ditmoe_cli.evaluation.samples import Targets

        file = self.at(checkpoint, label)
        return Targets(file, png=self.png, npz=self.npz, grid=self.grid, force=self.force, inputs=inputs)


def run(
    sampling: Images,
    weaker: WeakGuiding,
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
    guiding = weaker.opened(source.given)
    spec = guiding.over(sampling.on(running.device))(opened)
    from ditmoe_cli.evaluation.samples import Sampling, check_targets, open_decoder

    vae = sampling.vae
    label = samples_label(spec, sampling, opened)
    targets = to.targets(opened.path, label, (Path(vae).expanduser(),) if vae is not None else ())
    images = Sampling(opened, spec, weak=guiding.weak)
    check_targets(images, targets, will_decode=vae is not None)
    if vae is not None:
        images = replace(images, decoder=open_decoder(opened, vae, running.runtime.device))
    size = write_or_reuse(images, running, targets, guiding)
    if size is None:
        return  # another rank writes and prints
    done = guiding.marked(stage).done("sample", spec.conditions(), samples=targets.file)
    document = done.to_json(result(images, targets, size))
    emit(printing, document, rows(images, targets, size), str(targets.file.absolute()))


def write_or_reuse(images: Sampling, running: Running, targets: Targets, guiding: Guiding) -> int | None:
    """Return the bytes of the samples file, which an earlier run may have written; None where another rank prints.

    Torch is not imported where samples of pixels are there already.
    """
    from ditmoe_cli.evaluation.samples import check_targets, complete_samples, is_made, write_samples

    if not is_made(images, targets):
        runtime = running.runtime
        expected = sampling_work(images.checkpoint, images.spec, runtime.batch, guiding)
        foretell([expected], lambda: runtime.device)
        return write_samples(images, runtime, targets, note)
    check_targets(images, targets)
    return complete_samples(images, targets, note) if first_process() else None


def result(sampling: Sampling, targets: Targets, size: int) -> dict[str, Any]:
    """Return the size, spec, NFE, VAE and files of the samples as JSON."""
    exports = {name: getattr(targets, name) for name in ("png", "npz", "grid")}
    paths = {name: str(path.absolute()) if path else None for name, path in exports.items()}
    vae = sampling.decoder.to_json() if sampling.decoder else None
    return {"bytes": size, "spec": sampling.spec.conditions(), "nfe": sampling.spec.nfe, "vae": vae, **paths}


def rows(sampling: Sampling, targets: Targets, size: int) -> list[Row]:
    """Return the files, images and solver as a table."""
    spec = sampling.spec
    kind = "images" if sampling.images else "latents"
    return [
        ("wrote", f"{targets.file.absolute()} ({human_bytes(size)})"),
        *(("wrote", path.absolute()) for path in targets.exports.values()),
        (kind, f"{spec.images} of {' x '.join(map(str, sampling.shape))}"),
        solver_row({**spec.conditions(), "nfe": spec.nfe}),
    ]
