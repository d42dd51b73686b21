"""Measure how far images of an exported folder of diffusers are from ours, of the same noise, labels and steps.

    python examples/benchmarks/exported_images.py CHECKPOINT
    python examples/benchmarks/exported_images.py CHECKPOINT --random

With `--random` all weights are drawn anew, of the same shapes. For DDPM the scheduler's ᾱ, which is fp32, is replaced
by ours in fp64 for another run, whose difference comes last.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import ditmoe_cli as ditmoe
from ditmoe_cli.diffusion.forward_process import respaced_schedule
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import TRAINING_STEPS
from ditmoe_cli.model.checkpoint import Checkpoint

IMAGES, SEED = 16, 7


def with_random_weights(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """Return a checkpoint of the same shapes, of normal weights of a twentieth."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: weight.info.shape for name, weight in checkpoint.weights.items()}
    save_file({name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file)
    config = checkpoint.config
    return ditmoe.open_checkpoint(file, num_heads=config.num_heads, top_k=config.top_k, sampler=config.sampler)


def images(pipeline: Any, spec: SampleSpec, noise: torch.Tensor) -> torch.Tensor:
    """Return what the pipeline makes of noise, undecoded."""
    labels = spec.labels(range(spec.images))
    settings = {"num_inference_steps": spec.steps, "guidance_scale": spec.cfg, "output_type": "latent"}
    made: torch.Tensor = pipeline(class_labels=labels, latents=noise.clone(), **settings).images
    return made


def main() -> None:
    """Print the largest difference, for several numbers of steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--random", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, ditmoe.quiet():
        checkpoint = ditmoe.open_checkpoint(given.checkpoint)
        if given.random:
            checkpoint = with_random_weights(checkpoint, Path(folder, "random.safetensors"))
        exported = ditmoe.export(checkpoint, to="diffusers", output=Path(folder, "out"))
        pipeline = DiffusionPipeline.from_pretrained(exported.path, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        model, config = ditmoe.load_model(checkpoint), checkpoint.config
        shape = (config.in_channels, config.input_size, config.input_size)
        noise = image_noise(SEED, range(IMAGES), torch.device("cpu")).draw(shape)
        solver, counts = ("euler", (10, 50)) if config.sampler == "rf" else ("ddim-trailing", (10, 50, 100, 250))
        for steps in counts:
            for cfg in (1.0, 1.5):
                spec = SampleSpec(IMAGES, steps, cfg, SEED, solver, tuple(range(config.num_classes)))  # type: ignore[arg-type]
                ours = sample_batch(model, spec, range(IMAGES))
                apart = [float((images(pipeline, spec, noise) - ours).abs().max())]
                if config.sampler == "ddpm":
                    theirs = pipeline.scheduler.alphas_cumprod
                    pipeline.scheduler.alphas_cumprod = respaced_schedule(list(range(TRAINING_STEPS))).alphas_bar
                    apart.append(float((images(pipeline, spec, noise) - ours).abs().max()))
                    pipeline.scheduler.alphas_cumprod = theirs
                largest = float(ours.abs().max())
                told = ", ".join(f"{each:.1e} ({each / largest:.1e} of it)" for each in apart)
                print(f"{steps} steps, cfg {cfg}: largest value {largest:.3g}, apart {told}", flush=True)


if __name__ == "__main__":
    main()
