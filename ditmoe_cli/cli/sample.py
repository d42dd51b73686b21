"""``ditmoe sample``: images from a checkpoint."""

from __future__ import annotations

from typing import Annotated

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
    Json,
    Quiet,
    SamplerOpt,
    Seed,
    SolverOpt,
    Steps,
    TopK,
    checked_device,
    given,
    require_safetensors,
)
from ditmoe_cli.cli.output import Printing, emit, progress
from ditmoe_cli.cli.spec import sample_spec
from ditmoe_cli.cli.stage import default_output, incoming, open_stage

Images = Annotated[int, typer.Option("--images", metavar="N", help="Images to sample.")]


def run(
    checkpoint: CheckpointArg = None,
    images: Images = 64,
    steps: Steps = 20,
    cfg: Cfg = 1.0,
    solver: SolverOpt = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch: Batch = 64,
    device: Device = "cpu",
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: FileOutputOpt = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample images into safetensors.

    Image i depends on (seed, i) and its label alone. Pixel models give images uint8 (N, H, W, C); latent ones
    give latents fp32 (N, C, S, S).
    """
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    spec = sample_spec(opened, images, steps, cfg, seed, solver, classes)
    target = require_safetensors(output or default_output(opened.path, "samples"))
    from ditmoe_cli.evaluation.samples import Runtime, write_samples

    size = write_samples(opened, spec, Runtime(str(checked_device(device)), batch), target, force, progress)
    result = {"bytes": size, "spec": spec.conditions(), "nfe": spec.nfe}
    rows = [("wrote", target.absolute()), ("images", images), ("solver", f"{spec.solver}, {spec.nfe} NFE an image")]
    done = stage.done("sample", spec.conditions(), samples=target)
    emit(Printing(json, quiet), done.to_json(result), rows, str(target.absolute()))
