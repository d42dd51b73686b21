"""What the tests of healing share: small states, and pairs of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico, make_pico

from ditmoe_cli.compression.heal import healed_weights, healing_memory

SMALL: dict[str, Any] = {"sampler": "rf", "in_channels": 1, "input_size": 4, "experts": 3, "widths": ((16,) * 3,) * 2}
"""A checkpoint of 4 patches, on which a command takes a fraction of a second."""


def heal_on_few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heal blocks on 64 states of four patches, and judge models on 24."""
    monkeypatch.setattr(healing_memory, "BLOCK_TOKENS", 256)
    for module in (healing_memory, healed_weights):
        monkeypatch.setattr(module, "HELD_STATES", 24)


def changed(pico: Pico, size: float = 0.1, seed: int = 5) -> Pico:
    """The same model with noise on all weights but positions and maps: a student that can be healed."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor + size * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and name != "pos_embed"
        else tensor
        for name, tensor in pico.state.items()
    }
    return Pico(pico.config, state)


def pair(folder: Path, **options: Any) -> tuple[Path, Path]:
    """Write a checkpoint ``a`` and a student ``s``, whose lineage nothing tells."""
    original = make_pico(**{**SMALL, **options})
    return original.save(folder / "a.safetensors"), changed(original).save(folder / "s.safetensors")
