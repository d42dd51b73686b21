"""Noise of images, a function of seed and image index alone.

Each image has its own generator on the CPU, so noise does not depend on batch size, device or number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def image_seed(seed: int, index: int, purpose: str = "image") -> int:
    """Return the 63-bit seed of image `index`; each `purpose` has independent seeds."""
    text = f"ditmoe:{purpose}:{seed}:{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class ImageNoise:
    """The generators of a batch of images; each draw advances all of them."""

    generators: tuple[torch.Generator, ...]
    device: torch.device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal noise (N, *shape) in fp32 on the device."""
        drawn = [torch.randn(*shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


def image_noise(seed: int, indices: Sequence[int], device: torch.device, purpose: str = "image") -> ImageNoise:
    """Return the generators of the images `indices`, at their start."""
    generators = tuple(torch.Generator().manual_seed(image_seed(seed, i, purpose)) for i in indices)
    return ImageNoise(generators, device)
