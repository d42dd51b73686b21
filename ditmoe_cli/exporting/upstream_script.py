"""The command of upstream's ``sample.py`` (feizc/DiT-MoE) that samples a file which we wrote for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.model.config import HEADS_BY_WIDTH, UPSTREAM_MODELS, DiTMoEConfig

_CLASSES, _LATENTS, _RATIO = 1000, 4, 4
_PIXELS = 8  # of an image's side for each of its latent's
_SIZES = (256, 512)
_FLASH = ("XL", "G")  # which it builds with flash attention, in fp16; all others with timm's
_PATCHES: Mapping[str, tuple[int, ...]] = {"G": (2,)}
_OTHER_PATCHES = (2, 4, 8)


@dataclass(frozen=True)
class Sampling:
    """How upstream's ``sample.py`` samples a file: its command, or else why it cannot."""

    command: str | None
    reason: str | None = None


def sampling(config: DiTMoEConfig, path: Path) -> Sampling:
    """Return the command of ``sample.py`` for a file of a model without `obstacle`, or what keeps it from that.

    ``--rf`` has type bool there, so that only an empty text is False.
    """
    size = next((name for name, shape in UPSTREAM_MODELS.items() if shape == (config.hidden_size, config.depth)), None)
    reason = _not_sampled(config, size)
    if reason is not None or size is None:
        return Sampling(None, reason)
    options = {
        "--model": f"DiT-{size}/{config.patch_size}",
        "--ckpt": str(path),
        "--image-size": str(_PIXELS * config.input_size),
        "--num_experts": str(config.num_experts),
        "--num_experts_per_tok": str(config.top_k),
        "--rf": "True" if config.sampler == "rf" else "",
    }
    return Sampling(f"python sample.py {shlex.join(word for option in options.items() for word in option)}")


def _not_sampled(config: DiTMoEConfig, size: str | None) -> str | None:
    """Return why ``sample.py`` does not sample a model of upstream's `size`; None where it does."""
    is_named = size is not None and config.patch_size in _PATCHES.get(size, _OTHER_PATCHES)
    if not is_named or config.num_heads != HEADS_BY_WIDTH[config.hidden_size]:
        shape = f"width {config.hidden_size}, depth {config.depth}, patch {config.patch_size}"
        return f"it has no model of {shape} and {config.num_heads} heads"
    if config.in_channels != _LATENTS or config.out_channels == _LATENTS:
        return "its models have latents of 4 channels and a learned sigma"
    if _PIXELS * config.input_size not in _SIZES:
        return f"it samples images of {' or '.join(map(str, _SIZES))} pixels"
    if config.num_classes != _CLASSES or not config.null_class:
        return f"it samples {_CLASSES} classes and a null class"
    if config.blocks[0].expert_widths[0] != _RATIO * config.hidden_size:
        return f"its experts have {_RATIO * config.hidden_size} neurons"
    if (config.attention == "flash") != (size in _FLASH):
        return f"it builds DiT-{size} with {'flash' if size in _FLASH else 'timm'} attention"
    if config.sampler == "rf" and size not in _FLASH:
        return f"it samples DiT-{size} by DDPM only"
    return None
