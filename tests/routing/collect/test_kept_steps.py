"""Calibrations that are interrupted go on behind their last kept step, to the same bytes."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import with_slow
from conftest import make_pico
from keeping import Interrupted, keeping_all, result_after_interrupts
from profiling import opened
from torch import Tensor

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.files.workfolder import WorkFolder, open_work
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_data import CalibrationData, read_data
from ditmoe_cli.routing.calibration_settings import Calibration

SPEC = SampleSpec(images=5, steps=3, cfg=1.5, seed=11, solver="ddim", classes=(0, 2))
ON_CPU = Run("cpu")
SETTINGS = Calibration(SPEC, bins=2, reservoir=60, batch=3)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return opened(make_pico(hidden=16, input_size=4, in_channels=1, seed=3), tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pico = make_pico(hidden=16, input_size=4, in_channels=1, seed=3, sampler="rf")
    return opened(pico, tmp_path_factory.mktemp("flow"))


def goes_on_to_the_same_bytes(
    checkpoint: Checkpoint, settings: Calibration, folder: Path, run: Run = ON_CPU, data: Any = None
) -> None:
    target = folder / "p.safetensors"

    def profiled() -> bytes:
        assert calibrate(checkpoint, settings, run, target, data=data) is not None
        content = target.read_bytes()
        target.unlink()
        assert list(folder.iterdir()) == [], "work that is done leaves nothing behind"
        return content

    expected = profiled()
    assert result_after_interrupts(profiled) == expected


@pytest.mark.parametrize("solver", with_slow(["ddpm-dpmpp-2m", "ddpm"]))
def test_ddpm_solvers_go_on(solver: Any, ddpm: Checkpoint, tmp_path: Path) -> None:
    goes_on_to_the_same_bytes(ddpm, replace(SETTINGS, spec=replace(SPEC, solver=solver)), tmp_path)


@pytest.mark.parametrize("solver", with_slow(["ab4", "dpmpp-2m"]))
def test_flow_solvers_go_on_with_what_they_remember(solver: Any, flow: Checkpoint, tmp_path: Path) -> None:
    settings = replace(SETTINGS, spec=replace(SPEC, solver=solver, cfg=1.0, steps=4), batch=8)
    goes_on_to_the_same_bytes(flow, settings, tmp_path)


def test_a_fast_profile_goes_on(ddpm: Checkpoint, tmp_path: Path) -> None:
    goes_on_to_the_same_bytes(ddpm, replace(SETTINGS, fast=True), tmp_path)


def test_an_offloaded_model_goes_on_with_all_its_micro_batches(ddpm: Checkpoint, tmp_path: Path) -> None:
    goes_on_to_the_same_bytes(ddpm, replace(SETTINGS, batch=2), tmp_path, Run("cpu", offload=True))


def images(folder: Path, checkpoint: Checkpoint) -> CalibrationData:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 4, 1)).astype(np.uint8)
    np.savez(folder / "images.npz", arr_0=pixels, labels=np.array([2, 0, 1, 0, 0]))
    return read_data(folder / "images.npz", checkpoint.config, 5)


def test_given_images_go_on(ddpm: Checkpoint, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = images(tmp_path_factory.mktemp("images"), ddpm)
    settings = replace(SETTINGS, spec=replace(SPEC, classes=data.labels), data=data.digest)
    goes_on_to_the_same_bytes(ddpm, settings, tmp_path, data=data)


def test_keeping_changes_nothing(ddpm: Checkpoint, tmp_path: Path) -> None:
    calibrate(ddpm, SETTINGS, Run("cpu"), tmp_path / "rarely.safetensors")
    with keeping_all():
        calibrate(ddpm, SETTINGS, Run("cpu"), tmp_path / "often.safetensors")
    assert (tmp_path / "rarely.safetensors").read_bytes() == (tmp_path / "often.safetensors").read_bytes()


def interrupted(checkpoint: Checkpoint, settings: Calibration, target: Path, after: int) -> list[str]:
    """Interrupt a run behind a number of pieces, and return what it told."""
    told: list[str] = []
    with pytest.raises(Interrupted), keeping_all(after):
        calibrate(checkpoint, settings, Run("cpu", note=told.append), target)
    return told


def test_it_says_what_is_kept_and_where_it_goes_on(ddpm: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "p.safetensors"
    assert interrupted(ddpm, SETTINGS, target, 8) == ["kept 4 of 6 steps; the same command goes on"]
    told: list[str] = []
    calibrate(ddpm, SETTINGS, Run("cpu", note=told.append), target)
    assert told == [f"going on with step 5 of 6 (kept in {tmp_path / '.p.safetensors.work'})"]


def test_steps_that_are_kept_are_not_taken_again(
    ddpm: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditmoe_cli.model.dit import DiTMoE

    interrupted(ddpm, SETTINGS, tmp_path / "p.safetensors", 8)
    evaluations, patches = [], DiTMoE.patches

    def counted(self: DiTMoE, x: Tensor) -> Tensor:
        evaluations.append(len(x))
        return patches(self, x)

    monkeypatch.setattr(DiTMoE, "patches", counted)
    calibrate(ddpm, SETTINGS, Run("cpu"), tmp_path / "p.safetensors")
    assert evaluations == [4, 4], "two steps of the two last images, in both branches"


def test_other_settings_begin_anew(ddpm: Checkpoint, tmp_path: Path) -> None:
    target, others = tmp_path / "p.safetensors", replace(SETTINGS, spec=replace(SPEC, seed=12))
    interrupted(ddpm, SETTINGS, target, 8)
    calibrate(ddpm, others, Run("cpu"), target)
    calibrate(ddpm, others, Run("cpu"), tmp_path / "anew.safetensors")
    assert target.read_bytes() == (tmp_path / "anew.safetensors").read_bytes()


@pytest.mark.parametrize("piece", ["rows.0", "sums"])
def test_a_damaged_piece_costs_the_work_not_the_result(piece: str, ddpm: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "p.safetensors"
    interrupted(ddpm, SETTINGS, target, 8)
    damaged = tmp_path / ".p.safetensors.work" / f"{piece}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    calibrate(ddpm, SETTINGS, Run("cpu"), target)
    calibrate(ddpm, SETTINGS, Run("cpu"), tmp_path / "anew.safetensors")
    assert target.read_bytes() == (tmp_path / "anew.safetensors").read_bytes()


def test_a_full_disk_leaves_what_was_kept_before(
    ddpm: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, told, count = tmp_path / "p.safetensors", list[str](), 0
    write = WorkFolder.write

    def full(self: WorkFolder, name: str, tensors: Mapping[str, Any], document: Any = None) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensors, document)

    with keeping_all():
        monkeypatch.setattr(WorkFolder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            calibrate(ddpm, SETTINGS, Run("cpu", note=told.append), target)
        monkeypatch.undo()
    assert told == ["kept 2 of 6 steps; the same command goes on"]
    calibrate(ddpm, SETTINGS, Run("cpu"), target)
    calibrate(ddpm, SETTINGS, Run("cpu"), tmp_path / "anew.safetensors")
    assert target.read_bytes() == (tmp_path / "anew.safetensors").read_bytes()


def test_what_processes_of_an_earlier_run_kept_is_deleted_with_the_profile(ddpm: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "p.safetensors"
    with pytest.raises(Interrupted), open_work(tmp_path / "p.safetensors.rank1", "key", print) as work:
        work.write("sums", {})
        raise Interrupted
    assert (tmp_path / ".p.safetensors.rank1.work").is_dir()
    calibrate(ddpm, SETTINGS, ON_CPU, target)
    assert list(tmp_path.iterdir()) == [target]
