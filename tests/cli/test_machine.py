"""Threads and device of every command, and the versions of what computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from cli_helpers import environment, here
from conftest import make_pico

from ditmoe_cli import __version__
from ditmoe_cli.api.devices import best_device, checked_device
from ditmoe_cli.cli.app import COMMANDS, load_command
from ditmoe_cli.cli.machine import gpu_driver, versions
from ditmoe_cli.cli.options import unpacked_bytes
from ditmoe_cli.formats.unpacking_budget import default_budget

DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def device_as_before() -> Iterator[None]:
    """Each test finds the device anew, and leaves none behind."""
    best_device.cache_clear()
    yield
    best_device.cache_clear()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_threads(name: str) -> None:
    assert "--threads" in {option for parameter in load_command(name).params for option in parameter.opts}


def test_threads_are_used(folder: Path) -> None:
    result = here("bench", "a.safetensors", "--batch", 1, "--repeats", 1, "--threads", 2, cwd=folder).result
    assert result["conditions"]["threads"] == 2


@pytest.mark.parametrize("count", ["0", "-1", "1000000000"])
def test_threads_out_of_range_are_refused(count: str, folder: Path) -> None:
    assert (
        here("inspect", "a.safetensors", "--threads", count, cwd=folder).error(2).startswith(f"--threads {count}: give")
    )


_SHOWN = """
import json, os, sys
from ditmoe_cli.cli import app
app.run = lambda words: print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"),
    "torch" in sys.modules])) or 0
app.main()
"""


def test_the_program_prepares_threads_before_torch_is_loaded() -> None:
    families = ("OMP_", "MKL_", "GOMP_", "KMP_")
    unset = {name: value for name, value in environment().items() if not name.startswith(families)}
    for given, expected in ({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None):
        done = subprocess.run([sys.executable, "-c", _SHOWN], env={**unset, **given}, capture_output=True, check=True)
        rounds, count, torch_is_loaded = json.loads(done.stdout)
        assert rounds == expected and int(count) >= 1 and not torch_is_loaded


def test_auto_is_the_cpu_where_torch_sees_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked_device("auto") == "cpu"
    assert capsys.readouterr().err == ""


def test_auto_says_which_gpu_it_takes_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert [checked_device("auto"), checked_device("auto")] == ["cuda", "cuda"]
    assert capsys.readouterr().err == "ditmoe: computing on cuda (H100)\n"


def test_auto_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", broken)
    assert checked_device("auto") == "cpu"
    assert capsys.readouterr().err == (
        "ditmoe: the GPU cannot be used (CUDA error: no kernel image is available); computing on the cpu\n"
    )


def test_the_version_is_that_of_ditmoe_torch_and_the_driver(tmp_path: Path) -> None:
    lines = here("--version", cwd=tmp_path).out.splitlines()
    assert lines[:2] == [f"ditmoe {__version__}", f"torch {torch.__version__}"]
    assert lines == versions().splitlines() and len(lines) == 3


def test_the_driver_is_read_off_its_file(tmp_path: Path) -> None:
    assert gpu_driver(tmp_path / "none") == "no GPU found"
    (tmp_path / "version").write_text(DRIVER)
    assert gpu_driver(tmp_path / "version") == "NVIDIA driver 550.54.15"


def test_a_missing_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "torch not installed" in versions()


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_run_models_take_memory_for_unpacked_weights(name: str) -> None:
    options = {option for parameter in load_command(name).params for option in parameter.opts}
    training = {"heal", "distill"}
    running = {
        "sample",
        "schedule",
        "fid",
        "compare",
        "bench",
        "profile-experts",
        "prune",
        "merge",
        "quantize",
        "compress",
        *training,
    }
    assert ("--weights-memory" in options) is (name in running)


@pytest.mark.parametrize(("text", "held"), [("auto", None), ("0", 0), ("2KiB", 2048), ("1GB", 10**9)])
def test_memory_for_unpacked_weights_is_read(text: str, held: int | None) -> None:
    assert unpacked_bytes(text) == held


@pytest.mark.parametrize("text", ["", "none", "-1", "2 elephants"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give auto, 0, or a size"):
        unpacked_bytes(text)


def test_samples_do_not_depend_on_what_is_kept(folder: Path) -> None:
    here("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "q.safetensors", cwd=folder)
    made = []
    for i, memory in enumerate(("0", "3KiB", "auto")):
        options = ("--images", 4, "--steps", 3, "--weights-memory", memory, "-o", f"s{i}.safetensors")
        here("sample", "q.safetensors", *options, cwd=folder)
        made.append((folder / f"s{i}.safetensors").read_bytes())
        assert default_budget() == unpacked_bytes(memory)
    assert made[0] == made[1] == made[2]
    here("sample", "q.safetensors", "--images", 4, "-o", "t.safetensors", cwd=folder)
    assert default_budget() is None, "of the command alone"
    refused = here("sample", "q.safetensors", "--weights-memory", "much", cwd=folder).error(2)
    assert refused.startswith("--weights-memory much: give auto, 0, or a size")
