"""The size of a profile is known before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_pico
from profiling import opened

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect import footprint
from ditmoe_cli.routing.collect.footprint import collected_bytes, reservoir_bytes

SPEC = SampleSpec(images=5, steps=4, cfg=1.5, seed=11, solver="ddim", classes=(0, 2))
SETTINGS = Calibration(SPEC, bins=2, reservoir=60, batch=3)
SUMMARIES = ("selected", "output.all_token_mean", "output.cka")  # made at the end, of what was collected
SMALL = ("states.t", "states.label", "states.image", "states.bin", "reservoir.state", "reservoir.branch")


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, fast=True), replace(SETTINGS, reservoir=0)])
def test_the_size_is_that_of_the_tensors(settings: Calibration, tmp_path: Path) -> None:
    checkpoint = opened(make_pico(hidden=16, input_size=4, seed=3), tmp_path)
    profile = calibrate(checkpoint, settings, Run("cpu"), tmp_path / "p.safetensors")
    assert profile is not None
    left_out = (*SUMMARIES, *SMALL, "reservoir.position")
    stored = sum(each.info.nbytes for name, each in profile.header.tensors.items() if name not in left_out)
    assert collected_bytes(checkpoint.config, settings) + reservoir_bytes(checkpoint.config, settings) == stored


@pytest.mark.parametrize(
    "asked",
    [
        lambda: replace(SETTINGS, spec=replace(SPEC, images=10**9)),
        lambda: replace(SETTINGS, spec=replace(SPEC, images=10**8), reservoir=10**15),
    ],
)
def test_what_no_memory_holds_is_refused_before_any_work(
    asked: Callable[[], Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint.os, "sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**12}.__getitem__)
    checkpoint = opened(make_pico(hidden=16, input_size=4, seed=3), tmp_path)
    with pytest.raises(InfeasibleError, match=r"takes \d+\.\d GB of memory, and this machine has 4\.3 GB"):
        calibrate(checkpoint, asked(), Run("nonsense"), tmp_path / "p.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]
