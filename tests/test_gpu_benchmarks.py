"""The run on a GPU: its scripts on a CPU, and what it does with steps that fail or take too long."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from cli_helpers import environment

BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return how to import a benchmark, whose model S has two narrow blocks."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    synthetic = importlib.import_module("synthetic_checkpoint")
    monkeypatch.setitem(synthetic.MODELS, "S", synthetic.Shape(64, 2, 4, 4, True, "fp16"))
    monkeypatch.setattr(importlib.import_module("interleaved"), "PEAK_SIDES", {"cpu": 16, "cuda": 16})
    return importlib.import_module


def test_a_device_is_described(
    tiny: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "facts.json"
    tiny("device_facts").main(["--rounds", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert [row["dtype"] for row in found["rows"]] == ["fp32", "bf16", "fp16", "fp64"]
    assert all(row["flops"] > 0 for row in found["rows"]) and found["machine"]["cores"]
    assert capsys.readouterr().out.count("\n| ") == 6


def test_ways_to_sample_are_told_against_upstream(tiny: Callable[[str], ModuleType], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ("--model", "S", "--batch", "1,2", "--steps", "2", "--rounds", "2", "--ways", "plain", "--dtype", "fp32")
    tiny("accelerated_sampling").main([*words, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(len(row["ours"]) == len(row["upstream"]) == 2 and row["difference"] < 1e-4 for row in rows)


def test_nf4_is_told_against_plain_weights(
    tiny: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    tiny("nf4_step").main(
        ["--model", "S", "--tokens", "16,512", "--rounds", "2", "--dtype", "bf16", "--json", str(file)]
    )
    *kernels, few, many = json.loads(file.read_text())["rows"]
    assert [row["matrix"] for row in kernels] == [[256, 64], [64, 256]]
    assert (few["tokens"], many["tokens"]) == (16, 512)
    assert all(len(row["kept"]) == 2 and 0 < row["difference"] < 0.3 for row in (few, many))
    assert "| S | 512 | bf16 |" in capsys.readouterr().out


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_step_that_fails_leaves_the_others_alone(tiny: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu = tiny("gpu")
    written = "import sys, json; json.dump({'rows': [1]}, open(sys.argv[1], 'w')); print('| a |\\n| --- |\\n| 1 |')"
    steps = (
        gpu.Step("fails", python("raise SystemExit('what went wrong')"), 20),
        gpu.Step("hangs", python("import time; print('begun', flush=True); time.sleep(60)"), 1),
        gpu.Step("tells", (*python(written), gpu.JSON), 20),
        gpu.Step("says", python("print('7.0 s | peak')"), 20),
    )
    report = gpu.Report(tmp_path, gpu.Sizes("cpu", True))
    gpu.run_section(gpu.Section("one", "First", steps), 100, tmp_path, report)
    gpu.run_section(gpu.Section("two", "Second", steps[:1] + steps[3:], chained=True), 100, tmp_path, report)
    gpu.run_section(gpu.Section("three", "Third", steps[3:]), 0, tmp_path, report)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    states = {name: [step["state"] for step in place["steps"]] for name, place in found.items()}
    assert states == {
        "one": ["exit 1", "cut off after 1 s", "done", "done"],
        "two": ["exit 1", "left out: a step before it failed"],
        "three": ["left out: the budget is spent"],
    }
    assert found["one"]["steps"][2]["figures"] == {"rows": [1]}
    text = (tmp_path / "gpu.md").read_text()
    assert "**First**" in text and "| a |\n| --- |\n| 1 |\n" in text
    assert "**exit 1**: what went wrong |" in text and "| 7.0 s / peak |" in text
    assert "\n\n\n" not in text


def test_commands_are_shown_as_typed(tiny: Callable[[str], ModuleType]) -> None:
    gpu = tiny("gpu")
    plan = gpu.sections(gpu.Sizes("cuda", False), Path("/tmp"))
    assert [section.name for group in plan for section in group] == [
        *("device", "whole", "tests", "mixture", "sampling", "nf4", "block")
    ]
    shown = {step.name: " ".join(gpu.shown(step.words)) for group in plan for each in group for step in each.steps}
    assert shown["facts"] == "python examples/benchmarks/device_facts.py --device cuda --rounds 5"
    assert shown["quantize --bits 4"].startswith("ditmoe quantize /tmp/half.safetensors --bits 4")
    assert "tests/model/test_fused_kernels.py" in shown["pytest -m cuda"]


@pytest.mark.slow
def test_the_whole_run_ends_well_at_tiny_sizes(tmp_path: Path) -> None:
    words = ["bash", str(BENCHMARKS / "gpu.sh"), "--small", "--output", str(tmp_path)]
    done = subprocess.run(
        words, env=environment(PYTHON=sys.executable), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{(tmp_path / 'gpu.md').read_text()}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
