"""Every example runs, on less data."""

from __future__ import annotations

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cases import slow_but
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli import load_model, open_checkpoint
from ditmoe_cli.model.config import expected_weights

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


NOTEBOOK = EXAMPLES / "notebook.py"  # runs where it is imported


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of two processes on two cores wait for each other
    run_example(sys.executable, str(NOTEBOOK), cwd=tmp_path)
    pictures = [tmp_path / "notebook" / f"{name}.png" for name in ("routing", "samples", "damage")]
    assert all(picture.stat().st_size > 1000 for picture in pictures)


@pytest.mark.parametrize("script", sorted({*EXAMPLES.rglob("*.py")} - {NOTEBOOK}), ids=lambda script: script.stem)
def test_every_example_imports_what_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert runpy.run_path(str(script))["__doc__"]


@pytest.mark.slow
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
) -> Callable[..., list[str]]:
    """Return the lines that a benchmark prints for one row of a pico checkpoint; its commands run in this process."""
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "pico.safetensors")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "benchmarks"), *sys.path])

    def run(words: list[str], *, cwd: Path, **_: object) -> SimpleNamespace:
        assert words[:3] == [sys.executable, "-m", "ditmoe_cli"]
        outcome = here(*words[3:], cwd=cwd)
        if outcome.code:
            raise subprocess.CalledProcessError(outcome.code, words, outcome.out, outcome.err)
        return SimpleNamespace(stdout=outcome.out)

    def lines(script: str, row: str, *given: str) -> list[str]:
        monkeypatch.setattr(importlib.import_module("measuring").subprocess, "run", run)
        checkpoint = str(tmp_path / "pico.safetensors")
        scored = (checkpoint, "--images", "8", "--steps", "2", "--calibrations", "1")
        importlib.import_module(script).main(("--only", row, *(given or scored)))
        return capsys.readouterr().out.splitlines()

    return lines


def test_the_reduction_benchmark_prints_a_row_per_variant(benchmark_lines: Callable[..., list[str]]) -> None:
    lines = benchmark_lines("expert_reduction", "prune reap --no-refit")
    assert len(lines) == 3
    assert lines[2].startswith("| prune reap --no-refit |")


def test_the_quantisation_benchmark_prints_a_row_per_variant(
    benchmark_lines: Callable[..., list[str]], tmp_path: Path
) -> None:
    lines = benchmark_lines("quantization", "fp4")
    assert len(lines) == 3
    told = here("quantize", "pico.safetensors", "--uniform", "--format", "fp4", "--dry-run", cwd=tmp_path).result
    assert lines[2].startswith("| fp4 |") and f" | {told['bytes']:,} |" in lines[2]


@pytest.mark.parametrize("row", ["top1, W 0.5", pytest.param("half the experts, W 1", marks=pytest.mark.slow)])
def test_guidance_by_a_weaker_copy_is_scored(
    row: str, benchmark_lines: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = importlib.import_module("weak_guidance")
    monkeypatch.setitem(study.COPIES, study.HALF, ("prune", "--keep", "0.5", "--calibration-images", "4"))
    lines = benchmark_lines("weak_guidance", row, str(tmp_path / "pico.safetensors"), "--images", "9")
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert len(lines) == 3 and cells[:2] == [row, "32"]
    assert float(cells[2]) > 0 and cells[6].endswith(" %")


@pytest.mark.parametrize("model", slow_but(["S"], ["S", "demo"]))
def test_compressed_steps_are_printed_against_the_original(
    model: str, benchmark_lines: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, synthetic = (importlib.import_module(name) for name in ("compressed_steps", "synthetic_checkpoint"))
    monkeypatch.setitem(synthetic.MODELS, "S", synthetic.Shape(64, 2, 4, 4, True, "fp32"))
    words = ("--model", model, "--batches", "1,2", "--rounds", "1", "--parts", "--processor-time")
    lines = benchmark_lines("compressed_steps", "half the neurons", *words, *("--only", "nf4", "--", "--cfg", "2"))
    heads = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert heads[:5] == ["", "---", "original", "half the neurons", "nf4"]
    assert heads.count("ms of") == 2
    assert lines[4].endswith("| ≤ 1.3 |" if model == "demo" else "| ≤ 1.1 |")
    assert steps.ratio_text({"median": 1.2, "low": 1.1, "high": 1.3}, 1.1) == "**1.20 (1.10 to 1.30)**"
    assert steps.ratio_text({"median": 1.2, "low": 1.1, "high": 1.3}, 1.3) == "1.20 (1.10 to 1.30)"


def test_ways_to_a_size_are_the_largest_files_that_fit(
    benchmark_lines: Callable[..., list[str]], tmp_path: Path
) -> None:
    narrow = here("prune", "pico.safetensors", "--neurons", "0.5", "--multiple", "16", "--dry-run", cwd=tmp_path)
    size, numbers = narrow.result["bytes"] + 64, tmp_path / "numbers.json"  # global allocation adds some of header
    words = (str(tmp_path / "pico.safetensors"), "--sizes", f"{size},1000", "--calibration-seeds", "0", "--json")
    few = ("--images", "8", "--steps", "2", "--noise-seeds", "5", "--folder", str(tmp_path / "made"))
    lines = benchmark_lines("what_to_use", "narrowing", *words, str(numbers), *few)
    found = json.loads(numbers.read_text())
    at_half, unreached = (found[str(allowed)]["narrowing"][0] for allowed in (size, 1000))
    assert "--neurons 0.5" in at_half["score"]["way"] and narrow.result["bytes"] <= at_half["score"]["size"] <= size
    assert at_half["score"]["error"] > 0
    assert unreached["score"] is None and 1000 < unreached["least"] < size
    assert [line for line in lines if line.startswith("| narrowing |")][1].split("|")[4].strip() == (
        f"at least {unreached['least']:,}"
    )


def test_the_best_of_two_stages_is_found_from_any_start(benchmarks: Callable[[str], ModuleType]) -> None:
    module = benchmarks("what_to_use")
    errors = {"a": None, "b": 5.0, "c": 3.0, "d": 4.0, "e": 9.0, "f": 2.0, "g": 8.0}

    def score(way: tuple[tuple[str, ...], ...], _: int) -> object:
        error = errors[way[0][0]]
        return None if error is None else module.Score(way[0][0], error, 10 - error, 1, 0.0)

    grid = [[((name,),) for name in "abcde"], [((name,),) for name in "ggfge"]]
    for start in range(5):
        found = module.searched(grid, lambda _, at=start: at)(SimpleNamespace(score=score), 1, 0)
        assert (found.score.way, found.score.error, found.score.distance) == ("f", 2.0, 2.0)


def test_noise_of_a_calibration_is_refused_for_the_evaluation(benchmarks: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit, match="seed 1 is one of a calibration"):
        benchmarks("what_to_use").parsed(["--calibration-seeds", "0,1", "--noise-seeds", "1"])


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return how to import a benchmark."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "benchmarks"), *sys.path])
    return importlib.import_module


PAPER = {"S": 199_307_552, "B": 795_861_536, "L": 2_823_764_000, "XL": 4_168_172_192, "G": 16_503_731_232}


@pytest.mark.parametrize("model", PAPER)
def test_synthetic_models_have_as_many_parameters_as_published_ones(
    benchmarks: Callable[[str], ModuleType], model: str
) -> None:
    synthetic = benchmarks("synthetic_checkpoint")
    weights = expected_weights(synthetic.config_of(synthetic.MODELS[model]))
    assert sum(math.prod(shape) for shape in weights.values()) == PAPER[model]


@pytest.mark.parametrize("dtype", slow_but(["fp16"], ["fp16", "bf16"]))
def test_a_synthetic_model_is_the_same_in_all_containers(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, dtype: str
) -> None:
    synthetic = benchmarks("synthetic_checkpoint")
    config = synthetic.config_of(synthetic.Shape(64, 2, 4, 2, True, dtype))
    places = {container: tmp_path / f"{container}.pt" for container in ("bare", "ema", "train")}
    places |= {"deepspeed": tmp_path / "run", "safetensors": tmp_path / "one.safetensors"}
    for container, path in places.items():
        synthetic.write(path, config, dtype, container, 0)
    synthetic.write(tmp_path / "shards", config, dtype, "safetensors", 100_000)
    opened = [open_checkpoint(path) for path in (*places.values(), tmp_path / "shards")]
    assert len({checkpoint.fingerprint for checkpoint in opened}) == 1
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert {(each.config.attention, each.config.num_heads, each.config.sampler) for each in opened} == {
        ("flash", 4, "rf")
    }
    matrices = [bytes(opened[0].reader.raw(name)) for name, w in opened[0].weights.items() if len(w.info.shape) > 1]
    assert len(set(matrices)) == len(matrices)
    state = torch.load(places["train"], weights_only=False)
    assert state["model"].keys() == state["ema"].keys() and state["args"].num_experts == 2
    pair = state["model"]["pos_embed"], state["ema"]["pos_embed"]
    assert pair[0].shape == pair[1].shape and not torch.equal(*pair)


def tiny_streaming(benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark of streaming with a model of two narrow blocks as ``--model S``."""
    streaming, synthetic = benchmarks("streaming"), benchmarks("synthetic_checkpoint")
    monkeypatch.setitem(synthetic.MODELS, "S", synthetic.Shape(64, 2, 4, 4, True, "fp16"))
    return streaming


def test_the_streaming_benchmark_prints_a_row_per_command_and_cleans_up(
    benchmarks: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    streaming = tiny_streaming(benchmarks, monkeypatch)

    def in_process(place: SimpleNamespace, words: list[object], source: Path) -> object:
        assert source.exists()
        outcome = here(*map(str, words), cwd=place.folder)
        assert outcome.code == 0, outcome.err
        return streaming.Run(1.0, 1.0, 1, 1, 1, 1, outcome.result)

    monkeypatch.setattr(streaming, "run", in_process)
    streaming.main(["--model", "S", "--folder", str(tmp_path)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[1:]]
    assert {len(row) for row in rows} == {len(streaming.COLUMNS)}
    made = [row for row in rows[2:] if row[-1] != "-"]
    assert len(made) == len(streaming.ROWS) - 1  # all but inspect
    assert len(rows) == 2 + 1 + 2 * len(made) + len(streaming.VERIFIED)
    assert all(float(row[3]) >= 0 for row in made)
    assert [row[0].split()[0] for row in made if row[5] != "-"] == ["quantize", "quantize", "quantize", "apply:"]
    assert not list(tmp_path.iterdir())


def test_a_measured_process_is_watched(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming = tiny_streaming(benchmarks, monkeypatch)
    model = tmp_path / "model.safetensors"
    benchmarks("synthetic_checkpoint").main([str(model), "--model", "S"])
    place = streaming.Place(tmp_path, model, 0)
    found = streaming.run(place, ("inspect", model), model)
    assert found.result["config"]["depth"] == 2
    assert 2**20 < found.anonymous <= found.resident
    assert found.cpu > 0 and found.seconds > 0
    with pytest.raises(SystemExit, match="no-such"):
        streaming.run(place, ("inspect", "no-such.safetensors"), model)
    assert streaming.copying(model, tmp_path / "copy", 12_345) > 0
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_the_pipeline_script_ends_in_equal_files(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "pico.safetensors")
    out = run_example("bash", str(EXAMPLES / "pipeline.sh"), "pico.safetensors", "16", cwd=tmp_path)
    assert '"frechet"' in out
    assert [file.name for file in tmp_path.iterdir()] == ["pico.safetensors"]
