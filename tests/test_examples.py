"""Every example runs, on less data."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import here

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


def test_the_demo_trains_and_loads(tmp_path: Path) -> None:
    script = str(EXAMPLES / "train_demo.py")
    out = run_example(sys.executable, script, "--steps", "3", "--output", "tiny.safetensors", cwd=tmp_path)
    assert "Fréchet distance to the real digits" in out
    model = load_model(tmp_path / "tiny.safetensors")
    assert (model.config.depth, model.config.num_experts, model.config.sampler) == (4, 8, "rf")


def test_the_reduction_benchmark_prints_a_row_per_variant(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmarks" / "expert_reduction.py")
    options = ("demo:digits", "--images", "8", "--steps", "2", "--calibrations", "1", "--only", "prune reap --no-refit")
    lines = run_example(sys.executable, script, *options, cwd=tmp_path).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| prune reap --no-refit |")


def test_the_quantisation_benchmark_prints_a_row_per_variant(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmarks" / "quantization.py")
    options = ("demo:digits", "--images", "8", "--steps", "2", "--calibrations", "1", "--only", "fp4")
    lines = run_example(sys.executable, script, *options, cwd=tmp_path).splitlines()
    assert len(lines) == 3
    told = here("quantize", "demo:digits", "--uniform", "--format", "fp4", "--dry-run", cwd=tmp_path).result
    assert lines[2].startswith("| fp4 |") and f"| 5.90 | {told['bytes']:,} |" in lines[2]


def test_the_pipeline_script_ends_in_equal_files(tmp_path: Path) -> None:
    out = run_example("bash", str(EXAMPLES / "pipeline.sh"), "demo:digits", "16", cwd=tmp_path)
    assert '"frechet"' in out
    assert not list(tmp_path.iterdir())
