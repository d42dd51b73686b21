"""``ditmoe sample``: images from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ditmoe_cli.cli.options import (
    Batch,
    Cfg,
    CheckpointArg,
    Classes,
    Device,
    FileOutputOpt,
    Force,
    Heads,
    IntervalOpt,
    Json,
    Quiet,
    SamplerOpt,
    Seed,
    SolverOpt,
    StepsOpt,
    TopK,
    UpstreamExact,
    VaeOpt,
    checked_device,
    given,
    require_safetensors,
)
from ditmoe_cli.cli.sampling import SamplingOptions, sample_spec, solver_row
from ditmoe_cli.cli.stage import default_output, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, human_bytes, note, progress
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.samples import Sampling, Targets

Images = Annotated[int, typer.Option("--images", metavar="N", help="Images to sample.")]
PngOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--png", metavar="DIR", help="Write each image as PNG too."),
]
NpzOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--npz", metavar="FILE", help="Write arr_0 for ADM's evaluator too."),
]
GridOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--grid", metavar="FILE", help="PNG to draw the first 64 images in."),
]


def run(
    checkpoint: CheckpointArg = None,
    images: Images = 64,
    steps: StepsOpt = None,
    cfg: Cfg = 1.0,
    interval: IntervalOpt = None,
    solver: SolverOpt = None,
    upstream: UpstreamExact = False,
    classes: Classes = None,
    seed: Seed = 0,
    vae: VaeOpt = None,
    batch: Batch = 64,
    device: Device = "cpu",
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: FileOutputOpt = None,
    png: PngOpt = None,
    npz: NpzOpt = None,
    grid: GridOpt = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample images into safetensors.

    Image i depends on (seed, i) and its label alone. Pixel models, and latent ones with --vae, give images uint8
    (N, H, W, C); latent ones without give latents fp32 (N, C, S, S). A run that was cut off is gone on with by the same
    command; torchrun shares the work.
    """
    stage = incoming(checkpoint, given(heads, top_k, sampler), shared=True)
    opened = open_stage(stage)
    spec = sample_spec(opened, SamplingOptions(images, steps, cfg, seed, solver, classes, interval, upstream))
    check_endings(npz, grid, batch)
    file = require_safetensors(output or default_output(opened.path, "samples"))
    from ditmoe_cli.evaluation.samples import Runtime, Sampling, Targets, check_targets, decoded_by, write_samples

    inputs = (Path(vae).expanduser(),) if vae is not None else ()
    runtime, targets = Runtime(checked_device(device), batch), Targets(file, png, npz, grid, force, inputs)
    check_targets(Sampling(opened, spec), targets, will_decode=vae is not None)
    what = Sampling(opened, spec, decoded_by(opened, vae, runtime.device))
    size = write_samples(what, runtime, targets, progress, note)
    if size is None:
        return  # another rank writes and prints
    done = stage.done("sample", spec.conditions(), samples=file)
    emit(
        Printing(json, quiet),
        done.to_json(result(what, targets, size)),
        rows(what, targets, size),
        str(file.absolute()),
    )


def check_endings(npz: Path | None, grid: Path | None, batch: int) -> None:
    """Raise `UsageError` for names of files that another program would not know, and batches of nothing."""
    if npz is not None and npz.suffix != ".npz":
        raise UsageError(f"--npz {npz}: give a name that ends in .npz")
    if grid is not None and grid.suffix != ".png":
        raise UsageError(f"--grid {grid}: give a name that ends in .png")
    if batch < 1:
        raise UsageError(f"--batch {batch}: must be at least 1")


def result(what: Sampling, targets: Targets, size: int) -> dict[str, Any]:
    """Return what a program wants to know."""
    views = {name: getattr(targets, name) for name in ("png", "npz", "grid")}
    also = {name: str(path.absolute()) if path else None for name, path in views.items()}
    vae = what.decoder.to_json() if what.decoder else None
    return {"bytes": size, "spec": what.spec.conditions(), "nfe": what.spec.nfe, "vae": vae, **also}


def rows(what: Sampling, targets: Targets, size: int) -> list[Row]:
    """Return the same for people."""
    spec = what.spec
    kind = "images" if what.images else "latents"
    return [
        ("wrote", f"{targets.file.absolute()} ({human_bytes(size)})"),
        *(("wrote", path.absolute()) for path in targets.views.values()),
        (kind, f"{spec.images} of {' x '.join(map(str, what.shape))}"),
        solver_row({**spec.conditions(), "nfe": spec.nfe}),
    ]
