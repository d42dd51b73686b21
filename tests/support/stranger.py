"""What somebody does with exported folders who has torch and diffusers, and no ditmoe.

Run as ``python -I stranger.py JOBS OUT``: for each folder in JOBS (JSON), images of the noise and labels beside it are
sampled into OUT (npz), as are the matrices that packed layers unpack.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


class NoDitmoe:
    """An importer that has no ditmoe, wherever it may be installed."""

    def find_spec(self, name: str, *_: object) -> None:
        """Refuse our package, and leave others to other importers."""
        if name.partition(".")[0] == "ditmoe_cli":
            raise ModuleNotFoundError(name)


def plain_euler(transformer: Any, z: Any, labels: Any, steps: int) -> Any:
    """Return images by a loop as any sampler of flows has it, which knows nothing of the model."""
    import torch

    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, after in pairwise(sigmas):
        with torch.no_grad():
            z = z + (after - sigma) * transformer(z, sigma, labels).sample
    return z


def handled(pipeline: Any, given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what comes of what people do with a pipeline: saving, loading the model alone, unpacking, decoding."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, FlowMatchHeunDiscreteScheduler

    model, folder = pipeline.transformer, pipeline.config._name_or_path
    alone = AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True)
    asked = (given["latents"], 0.5, given["class_labels"])
    made = {"predicted": model(*asked).sample, "predicted alone": alone(*asked).sample}
    pipeline.save_pretrained(f"{folder}-saved")
    again = DiffusionPipeline.from_pretrained(f"{folder}-saved", trust_remote_code=True)
    made["predicted after saving"] = again.transformer(*asked).sample
    pipeline.save_pretrained(f"{folder}-parts", variant="fp16", max_shard_size="30KB")
    kept = DiffusionPipeline.from_pretrained(f"{folder}-parts", trust_remote_code=True, variant="fp16")
    made["predicted of a variant in shards"] = kept.transformer(*asked).sample
    made["shards"] = np.array(len(list(Path(f"{folder}-parts", "transformer").glob("*fp16*.safetensors"))))
    stored = sum(buffer.nbytes for buffer in model.buffers())
    made["predicted in fp32 again"] = alone.bfloat16().float()(*asked).sample
    made["predicted unpacked"] = model.dequantize()(*asked).sample
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5).eval()
    pipeline.register_modules(vae=vae)
    images = {kind: pipeline(**{**given, "output_type": kind}, **settings).images for kind in ("pil", "np", "pt")}
    latents = pipeline(**given, **settings).images
    with torch.no_grad():
        made["decoded"] = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    made |= {"pt": images["pt"], "np": images["np"], "pil": np.stack([np.asarray(image) for image in images["pil"]])}
    refused = []
    few, none, short = {"class_labels": []}, {"num_inference_steps": 0}, {"latents": given["latents"][:2]}
    odd = ({"class_labels": [0.5, 1, 1]}, {"class_labels": "cat"}, {"guidance_scale": float("nan")})
    for wrong in ({"class_labels": [3]}, few, {"output_type": "png"}, none, short, *odd):
        try:
            pipeline(**{**given, **wrong})
        except ValueError as error:
            refused.append(str(error))
    scheduler, pipeline.scheduler = pipeline.scheduler, FlowMatchHeunDiscreteScheduler()
    try:
        pipeline(**given)
    except ValueError as error:
        refused.append(str(error))
    pipeline.scheduler = scheduler
    arrays = {what: value.numpy() if isinstance(value, torch.Tensor) else value for what, value in made.items()}
    return {**arrays, "stored": stored, "refused": np.array(refused)}


def main(jobs: str, out: str) -> None:
    """Do all jobs."""
    sys.meta_path.insert(0, NoDitmoe())
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    results = {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        dtype = getattr(torch, job["dtype"])
        pipeline = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True, torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        noise, labels = torch.tensor(job["noise"]), torch.tensor(job["labels"])
        given = {"class_labels": labels, "latents": noise, "output_type": "latent"}
        results[f"{name}/images"] = pipeline(**given, **job["settings"]).images.numpy()
        if "plain_steps" in job:
            results[f"{name}/plain"] = plain_euler(pipeline.transformer, noise, labels, job["plain_steps"]).numpy()
        for layer, module in pipeline.transformer.named_modules():
            if type(module).__name__.endswith("PackedLinear"):
                results[f"{name}/{layer}.weight"] = module.unpacked().float().numpy()
        if job["handled"]:
            results |= {f"{name}/{what}": array for what, array in handled(pipeline, given, job["settings"]).items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
