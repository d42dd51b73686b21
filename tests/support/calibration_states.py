"""What the tests of states and streams share: small checkpoints of each kind, with their profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Pico, make_pico

from ditmoe_cli.compression.replay.states import States, calibration_states
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration, profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile

Given = tuple[Checkpoint, RoutingProfile]
IMAGES, STEPS, BINS = 9, 4, 2
KINDS: dict[str, tuple[dict[str, Any], str, float]] = {
    "rf": ({"sampler": "rf", "in_channels": 1}, "euler", 1.0),
    "guided ddpm": ({"sampler": "ddpm", "in_channels": 4}, "ddim", 2.0),
}


def profiled(pico: Pico, solver: Any, cfg: float, folder: Path, **more: Any) -> Given:
    checkpoint = open_checkpoint(pico.save(folder / "a.safetensors"))
    settings = Calibration(SampleSpec(IMAGES, STEPS, cfg, 3, solver, (0, 1)), BINS, **{"reservoir": 200, **more})
    profile = calibrate(checkpoint, settings, Run("cpu"), folder / "p.safetensors", force=True)
    assert profile is not None
    return checkpoint, profile


def profiled_kind(kind: str, folder: Path) -> Given:
    """A checkpoint of one of `KINDS`, and its profile."""
    options, solver, cfg = KINDS[kind]
    return profiled(make_pico(**options), solver, cfg, folder)


def states_of(case: Given, wanted: int) -> States:
    checkpoint, profile = case
    return calibration_states(profile, profiled_spec(profile.calibration, checkpoint), wanted)
