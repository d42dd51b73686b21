"""A small original and a distilled copy of it: other weights, and metadata as ``ditmoe distill`` writes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conftest import Pico, make_pico

from ditmoe_cli.files.provenance import Card, Distilled, Provenance, Step
from ditmoe_cli.model.checkpoint import open_checkpoint

FOUR = Distilled("euler", 4, cfg=1.5, teacher_solver="ab2", teacher_steps=16)
FOUR_DDPM = replace(FOUR, solver="ddim-trailing", teacher_solver="ddim-trailing")
SMALL = {"hidden": 16, "input_size": 4, "in_channels": 1, "seed": 3}
TEACHER_SETTINGS = {"solver": "euler", "steps": 20, "cfg": 1.5, "images": 8, "seed": 0, "classes": "0-2", "bins": 10}


@dataclass(frozen=True)
class DistilledPair:
    """The original and the distilled copy, in one folder."""

    original: Path
    few: Path


def moved(model: Pico, by: float = 0.02) -> Pico:
    """The model with weights that are a little larger."""
    return replace(model, state={name: tensor * (1 + by) for name, tensor in model.state.items()})


def save_distilled(model: Pico, path: Path, source: str, distilled: Distilled = FOUR) -> Path:
    """Write a model as distilled from a checkpoint of fingerprint `source`, which was profiled before."""
    step = Step("distill", source, "", {"original": source}, calibration={**TEACHER_SETTINGS})
    return model.save(path, provenance=Provenance(model.config.to_json(), (step,), Card("pixels"), distilled))


def distilled_pair(folder: Path, distilled: Distilled | None = None, **shape: Any) -> DistilledPair:
    """Write an original, and a copy that was distilled from it, to 4 steps and with guidance 1.5 unless told."""
    shape = {"sampler": "rf", **SMALL, **shape}
    usual = FOUR if shape["sampler"] == "rf" else FOUR_DDPM
    model = make_pico(**shape)
    original = model.save(folder / "original.safetensors")
    few = save_distilled(
        moved(model), folder / "few.safetensors", open_checkpoint(original).fingerprint, distilled or usual
    )
    return DistilledPair(original, few)
