"""``torchrun … ditmoe heal``: two processes heal as one does, and one of them writes and speaks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import here, start
from conftest import Pico
from torch import Tensor

from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.reader import SafetensorsReader

PROFILE = ("--calibration-images", "16", "--calibration-steps", "3")
WORDS = ("heal", "s.safetensors", "--original", "a.safetensors", "--batch", "8", *PROFILE)


@pytest.fixture
def folder(pico: Callable[..., Pico], tmp_path: Path) -> Path:
    """A folder with an original and a student."""
    student_of(pico(sampler="rf", in_channels=1, depth=1), tmp_path)
    return tmp_path


def student_of(original: Pico, folder: Path) -> None:
    """Save an original, and a student whose experts are far from its."""
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name.replace(".", "__"): tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in original.state.items()
        if "experts" in name
    }
    original.save(folder / "a.safetensors")
    original.with_state(**noisy).save(folder / "s.safetensors")


def tensors(path: Path) -> dict[str, Tensor]:
    reader = SafetensorsReader(read_safetensors_header(path).tensors)
    return {name: reader.tensor(name) for name in read_safetensors_header(path).tensors}


def torchrun(*words: object) -> list[str]:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")
    return [sys.executable, "-m", *launcher, "-m", "ditmoe_cli", *map(str, words)]


@pytest.mark.slow  # test_cli_distill_processes.py has two processes train together each time
def test_two_processes_heal_as_one_does(folder: Path) -> None:
    words = (*WORDS, "--steps", "6")
    job = start(torchrun(*words, "-o", "two.safetensors"), folder)  # makes the profile, too
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert out.count("\n") == 1, "one process prints"
    assert err.count("nothing tells whether") == err.count("profiling ") == 1, "and one speaks"
    two = json.loads(out)["result"]
    one = here(*words, "-o", "one.safetensors", cwd=folder).result
    assert two["scopes"] == one["scopes"] == ["block", "model"]
    assert one["held_error"][1] < one["held_error"][0]
    assert two["held_error"] == pytest.approx(one["held_error"], rel=1e-3)
    assert two["held_error_after"] == pytest.approx(one["held_error_after"], rel=2e-3)
    before, alone, together = (tensors(folder / f"{name}.safetensors") for name in ("s", "one", "two"))
    changed = sum(float((alone[name] - before[name]).square().sum()) for name in before)
    differing = sum(float((alone[name] - together[name]).square().sum()) for name in before)
    assert differing < 1e-3 * changed
    assert not list(folder.glob(".*")), "nothing is left beside the output"


@pytest.mark.slow
def test_processes_agree_on_how_many_steps_the_time_allows(folder: Path) -> None:
    job = start(torchrun(*WORDS, "--minutes", "0.05", "--scope", "model", "-o", "two.safetensors"), folder)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    result = json.loads(out)["result"]
    assert result["model_steps"] >= 1 and result["held_error"][1] <= result["held_error"][0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
def test_a_process_that_dies_ends_the_job_and_the_next_one_goes_on(pico: Callable[..., Pico], tmp_path: Path) -> None:
    folder = tmp_path
    student_of(pico(sampler="rf", in_channels=1, depth=3), folder)
    words = torchrun(*WORDS, "--steps", "3", "--scope", "block", "-o", "two.safetensors")
    job = start(words, folder)
    try:
        end = time.monotonic() + 90
        while not list(folder.glob(".*.work/healed-block.state.*")):
            assert job.poll() is None and time.monotonic() < end, "no block was healed"
            time.sleep(0.01)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        (victim,) = [
            int(child) for child in children if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ]
        os.kill(victim, signal.SIGKILL)
        out, err = job.communicate(timeout=60)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode != 0 and out == "" and "internal error" not in err
    assert not (folder / "two.safetensors").exists()
    job = start(words, folder)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert err.count("going on with block") == 1, "one speaks"
    assert json.loads(out)["result"]["held_error"][1] < json.loads(out)["result"]["held_error"][0]
    assert not list(folder.glob(".*"))


def test_what_is_refused_is_refused_in_every_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert "itself" in here("heal", "a.safetensors", "--original", "a.safetensors", cwd=folder).error(3)
    assert here(*WORDS, "--dry-run", cwd=folder).out == "", "the first process prints"
    monkeypatch.setitem(os.environ, "RANK", "0")
    assert here(*WORDS, "--dry-run", cwd=folder).result["dry_run"]
    envelope = here("inspect", "a.safetensors", cwd=folder).out
    assert "torchrun" in here("heal", "--original", "a.safetensors", cwd=folder, stdin=envelope).error(2)
