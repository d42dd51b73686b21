"""Every example runs, on less data."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli import load_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.py")), ids=lambda script: script.stem)
def test_every_example_imports_what_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert runpy.run_path(str(script))["__doc__"]


def test_the_demo_trains_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    train_demo = importlib.import_module("train_demo")
    digits = train_demo.load_digits()
    few = SimpleNamespace(images=digits.images[:200], target=digits.target[:200])
    monkeypatch.setattr(train_demo, "load_digits", lambda: few)
    path = tmp_path / "tiny.safetensors"
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--steps", "3", "--output", str(path)])
    with torch.random.fork_rng():
        train_demo.main()
    assert "Fréchet distance to the real digits" in capsys.readouterr().out
    model = load_model(path)
    assert (model.config.depth, model.config.num_experts, model.config.sampler) == (4, 8, "rf")


@pytest.fixture
def benchmark_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], list[str]]:
    """Return the lines that a benchmark prints for one row of a pico checkpoint; its commands run in this process."""
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "pico.safetensors")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "benchmarks"), *sys.path])

    def run(words: list[str], *, cwd: Path, **_: object) -> SimpleNamespace:
        assert words[:3] == [sys.executable, "-m", "ditmoe_cli"]
        outcome = here(*words[3:], cwd=cwd)
        assert outcome.code == 0, outcome.err
        return SimpleNamespace(stdout=outcome.out)

    def lines(script: str, row: str) -> list[str]:
        monkeypatch.setattr(importlib.import_module("measuring").subprocess, "run", run)
        checkpoint = str(tmp_path / "pico.safetensors")
        options = (checkpoint, "--images", "8", "--steps", "2", "--calibrations", "1", "--only", row)
        importlib.import_module(script).main(options)
        return capsys.readouterr().out.splitlines()

    return lines


def test_the_reduction_benchmark_prints_a_row_per_variant(benchmark_lines: Callable[[str, str], list[str]]) -> None:
    lines = benchmark_lines("expert_reduction", "prune reap --no-refit")
    assert len(lines) == 3
    assert lines[2].startswith("| prune reap --no-refit |")


def test_the_quantisation_benchmark_prints_a_row_per_variant(
    benchmark_lines: Callable[[str, str], list[str]], tmp_path: Path
) -> None:
    lines = benchmark_lines("quantization", "fp4")
    assert len(lines) == 3
    told = here("quantize", "pico.safetensors", "--uniform", "--format", "fp4", "--dry-run", cwd=tmp_path).result
    assert lines[2].startswith("| fp4 |") and f" | {told['bytes']:,} |" in lines[2]


@pytest.mark.slow
def test_the_pipeline_script_ends_in_equal_files(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "pico.safetensors")
    out = run_example("bash", str(EXAMPLES / "pipeline.sh"), "pico.safetensors", "16", cwd=tmp_path)
    assert '"frechet"' in out
    assert [file.name for file in tmp_path.iterdir()] == ["pico.safetensors"]
