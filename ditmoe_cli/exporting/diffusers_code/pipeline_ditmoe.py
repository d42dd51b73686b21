"""Sampling of DiT-MoE by class labels, for diffusers."""

# No annotations from __future__ here: diffusers reads those of `__init__` as types.
import json
import math
import shutil
from functools import wraps
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

logger = logging.get_logger(__name__)
DDPM_GUIDED_CHANNELS = 3  # of latents and noise, as DiT guides


class DiTMoEPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Sample images of given classes.

    Args:
        transformer: the model, as ``DiTMoETransformer2DModel``.
        scheduler: ``FlowMatchEulerDiscreteScheduler`` for rectified flow, ``DDIMScheduler`` or another one for DDPM.
        vae: decodes latents; None for models of pixels.
        num_inference_steps: steps where none are named; those that a distilled model was made for.
        distilled: whether the model is right at these steps alone, its guidance in its weights.
        vae_repository: the VAE on the Hugging Face hub that is fetched where latents are to be decoded without `vae`.
        auto_map: where ``AutoModel`` finds the model's class.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ("vae",)

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045
        num_inference_steps: int = 50,
        distilled: bool = False,
        vae_repository: Optional[str] = None,  # noqa: UP045
        auto_map: Optional[dict[str, str]] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        settings = {"num_inference_steps": num_inference_steps, "distilled": distilled}
        self.register_to_config(**settings, vae_repository=vae_repository, auto_map=auto_map)

    @wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, save_directory: Any, *settings: Any, **named: Any) -> None:
        """Save as all pipelines of diffusers, and the code too, so that the folder is opened as this one was."""
        super().save_pretrained(save_directory, *settings, **named)
        folder = Path(save_directory)
        shutil.copyfile(__file__, folder / "pipeline_ditmoe.py")
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"_class_name": ["pipeline_ditmoe", type(self).__name__]}
        index |= {"transformer": ["modeling_ditmoe", type(self.transformer).__name__]}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return an image of each label.

        Args:
            class_labels: labels from 0.
            num_inference_steps: evaluations of the model.
            guidance_scale: scale of classifier-free guidance; 1 for none.
            generator: of the noise; one, or one for each image.
            latents: the noise (N, C, H, W) itself.
            output_type: pil, np (N, H, W, C) or pt (N, C, H, W) in 0 … 1; latent for what the model makes.
            return_dict: whether to return an ``ImagePipelineOutput``, or a tuple.

        Raises:
            ValueError: guidance of a model that has no null class, or was distilled; a scale that is no number; an
                unknown label or output type; no steps; noise of another shape; a scheduler without steps of one's own.
        """
        config, device = self.transformer.config, self._execution_device
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        labels = _whole(class_labels).to(device)
        self._check(labels, steps, guidance_scale, output_type)
        shape = (len(labels), config.in_channels, config.input_size, config.input_size)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: give noise of shape {shape}")
        z = randn_tensor(shape, generator, device) if latents is None else latents.to(device, torch.float32)
        for t in self.progress_bar(self._timesteps(steps, device)):
            predicted = self._predicted(z, t, labels, guidance_scale)
            z = self.scheduler.step(predicted, t, z, return_dict=False)[0]
        images = z if output_type == "latent" else self._images(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, labels: Tensor, steps: int, scale: Any, output_type: str) -> None:
        config = self.transformer.config
        if steps < 1:
            raise ValueError(f"num_inference_steps {steps}: give at least 1")
        if self.config.distilled and steps != self.config.num_inference_steps:
            own = self.config.num_inference_steps
            logger.warning(f"the model was distilled to {own} steps, and is right at the times of these only")
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"guidance_scale {scale!r}: give a number, 1 for none")
        if scale != 1.0 and self.config.distilled:
            raise ValueError(f"guidance_scale {scale}: the model was distilled, and guidance is in its weights; give 1")
        if scale != 1.0 and not config.null_class:
            raise ValueError(f"guidance_scale {scale}: the model has no null class to guide away from; give 1")
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= config.num_classes:
            raise ValueError(f"class_labels {labels.tolist()}: give labels from 0 to {config.num_classes - 1}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: give pil, np, pt or latent")

    def _timesteps(self, steps: int, device: torch.device) -> Tensor:
        """Return the scheduler's timesteps; equal steps from t = 1 to 0 for rectified flow, which it has otherwise."""
        if self.transformer.config.sampler == "rf":
            if "sigmas" not in signature(self.scheduler.set_timesteps).parameters:
                kind = type(self.scheduler).__name__
                raise ValueError(f"scheduler {kind}: takes no sigmas; give a FlowMatchEulerDiscreteScheduler")
            self.scheduler.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def _predicted(self, z: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Return what the scheduler steps by: the velocity or the noise, guided, with the variance if it takes that."""
        is_flow, channels = self.transformer.config.sampler == "rf", z.shape[1]
        time = t / self.scheduler.config.num_train_timesteps if is_flow else t
        z = z if is_flow else self.scheduler.scale_model_input(z, t)
        if scale == 1.0:
            predicted: Tensor = self.transformer(z, time, labels, return_dict=False)[0]
        else:
            null = torch.full_like(labels, self.transformer.config.num_classes)
            both = self.transformer(torch.cat((z, z)), time, torch.cat((labels, null)), return_dict=False)[0]
            predicted, unconditional = both.chunk(2)
            guided = channels if is_flow else DDPM_GUIDED_CHANNELS
            head = unconditional[:, :guided] + scale * (predicted - unconditional)[:, :guided]
            predicted = torch.cat((head, predicted[:, guided:]), dim=1)
        takes_variance = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return predicted if takes_variance else predicted[:, :channels]

    def _images(self, z: Tensor, output_type: str) -> Any:
        """Return images in 0 … 1 of values in -1 … 1, or of latents, which the VAE decodes first."""
        if self.transformer.config.in_channels not in (1, 3):
            z = self._decoded(z)
        pixels = (z.float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _decoded(self, latents: Tensor) -> Tensor:
        if self.vae is None and self.config.vae_repository is not None:
            vae = AutoencoderKL.from_pretrained(self.config.vae_repository)
            self.register_modules(vae=vae.to(latents.device))
        if self.vae is None:
            raise ValueError("the model makes latents and the pipeline has no VAE; give vae=, or output_type='latent'")
        settings = self.vae.config
        z = latents / settings.scaling_factor + (settings.get("shift_factor") or 0.0)
        pixels: Tensor = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
        return pixels


def _whole(labels: int | list[int] | Tensor) -> Tensor:
    """Return labels as a list of whole numbers. Raises `ValueError` for anything else, which would be rounded."""
    try:
        found = torch.as_tensor(labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or (found.is_floating_point() and len(found)) or found.dtype == torch.bool:
        raise ValueError(f"class_labels {labels!r}: give whole numbers")
    return found.long()
