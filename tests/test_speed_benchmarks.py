"""The benchmarks of speed: upstream's algorithm computes what upstream and ditmoe compute."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cases import slow_but
from conftest import load_oracle, make_pico, oracle_folders

from ditmoe_cli.diffusion.forward_process import sampling_schedule
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.model.checkpoint import open_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
TOLERANCE = 1e-5
FOLDERS = oracle_folders()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return how to import a benchmark."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module


def distance(actual: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    wanted = torch.as_tensor(expected)
    assert actual.shape == wanted.shape
    return float((actual - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", FOLDERS)
def test_upstreams_algorithm_gives_upstreams_numbers(benchmarks: Callable[[str], ModuleType], name: str) -> None:
    upstream, oracle = benchmarks("upstream_algorithm"), load_oracle(FOLDERS[name])
    checkpoint = open_checkpoint(oracle.checkpoint, num_heads=oracle.heads)
    state = {name: checkpoint.reader.tensor(name) for name in checkpoint.weights}
    model = upstream.upstream_model(checkpoint.config, state, oracle.about["config"]["pretraining_tp"])
    given = {key: torch.from_numpy(oracle.expected[key]) for key in ("x", "t_ddpm", "t_rf", "y", "z", "y_cond")}
    x, y, z, labels = given["x"], given["y"].long(), given["z"], given["y_cond"].long()
    both = torch.cat((labels, torch.full_like(labels, checkpoint.config.num_classes)))
    generator = torch.Generator().manual_seed(123)

    def draw(shape: Any) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    computed = {
        "out_ddpm": lambda: model(x, given["t_ddpm"], y),
        "out_rf": lambda: model(x, given["t_rf"], y),
        "cfg_out_t500_s4": lambda: model.forward_with_cfg(
            torch.cat((z, z)), torch.tensor([500] * len(both)), both, 4.0
        ),
        "rf_euler10_cfg2": lambda: upstream.sample_flow(model, z, labels, 2.0, 10),
        "rf_euler10_nocfg": lambda: upstream.sample_flow(model, z, labels, None, 10),
        "ddpm10_cfg1p5_seed123": lambda: upstream.sample_ddpm(
            model, z, labels, 1.5, sampling_schedule("ddpm", 10), draw
        ),
    }
    with torch.no_grad():
        far = {key: distance(run(), oracle.expected[key]) for key, run in computed.items() if key in oracle.expected}
    assert {"out_ddpm", "out_rf", "cfg_out_t500_s4"} <= far.keys()
    assert max(far.values()) <= TOLERANCE, far


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize("family", ["rf", "ddpm"])
def test_both_sample_the_same_images(
    benchmarks: Callable[[str], ModuleType], attention: str, family: str, parts: int
) -> None:
    upstream, pico = benchmarks("upstream_algorithm"), make_pico(attention=attention, sampler=family)
    spec = SampleSpec(3, 4, 1.5, 0, "euler" if family == "rf" else "ddpm", (0, 1, 2))
    model = upstream.upstream_model(pico.config, pico.state, parts)
    stream = image_noise(0, range(3), torch.device("cpu"))
    shape = (pico.config.in_channels, pico.config.input_size, pico.config.input_size)
    z, labels = stream.draw(shape), torch.tensor(spec.labels(range(3)))

    def draw(doubled: Any) -> torch.Tensor:
        return torch.cat((stream.draw(shape), torch.zeros(doubled[0] - 3, *shape)))

    theirs = (
        upstream.sample_flow(model, z, labels, 1.5, 4)
        if family == "rf"
        else upstream.sample_ddpm(model, z, labels, 1.5, sampling_schedule("ddpm", 4), draw)
    )
    assert distance(sample_batch(pico.model(), spec, range(3)), theirs) <= TOLERANCE


def test_upstreams_algorithm_refuses_what_its_code_cannot_hold(benchmarks: Callable[[str], ModuleType]) -> None:
    narrowed = make_pico(widths=((64, 64, 32, 64), (64, 64, 64, 64)))
    with pytest.raises(ValueError, match="one width"):
        benchmarks("upstream_algorithm").upstream_model(narrowed.config, narrowed.state)


@pytest.fixture
def tiny(benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return how to import a benchmark whose model S has two narrow blocks, XL as well but of the other attention."""
    synthetic = benchmarks("synthetic_checkpoint")
    for name, flash in (("S", False), ("XL", True)):
        monkeypatch.setitem(synthetic.MODELS, name, synthetic.Shape(64, 2, 4, 4, flash, "fp32"))
    monkeypatch.setattr(benchmarks("interleaved"), "PEAK_SIDES", {"cpu": 16, "cuda": 16})
    return benchmarks


def rows_of(printed: str, columns: int) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {len(row) for row in cells} == {columns}
    return cells[2:]


@pytest.mark.parametrize("model", ["S", "XL"])
def test_the_mixture_benchmark_prints_a_row_per_size_and_dtype(
    tiny: Callable[[str], ModuleType], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, file = tiny("moe_layer"), tmp_path / "figures.json"
    script.main(["--model", model, "--tokens", "8,24", "--rounds", "2", "--clock", "processor", "--json", str(file)])
    rows = rows_of(capsys.readouterr().out, len(script.COLUMNS))
    assert [row[1:3] for row in rows] == [["8", "fp32"], ["8", "bf16"], ["24", "fp32"], ["24", "bf16"]]
    for row in json.loads(file.read_text())["rows"]:
        assert len(row["ours"]) == len(row["upstream"]) == 2
        assert row["difference"] < (1e-5 if row["dtype"] == "fp32" else 0.05)


@pytest.mark.parametrize(
    ("model", "family"), slow_but([("S", "rf")], [("S", "rf"), ("S", "ddpm"), ("XL", "rf"), ("XL", "ddpm")])
)
def test_the_sampling_benchmark_prints_a_row_per_batch_and_dtype(
    tiny: Callable[[str], ModuleType],
    model: str,
    family: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, file = tiny("sampling"), tmp_path / "figures.json"
    size = ["--model", model, "--blocks", "1", "--batch", "1,2", "--steps", "2", "--rounds", "2"]
    script.main([*size, "--family", family, "--json", str(file)])
    rows = rows_of(capsys.readouterr().out, len(script.COLUMNS))
    assert [row[1:3] for row in rows] == [["1", "fp32"], ["1", "bf16"], ["2", "fp32"], ["2", "bf16"]]
    for row in json.loads(file.read_text())["rows"]:
        assert row["difference"] < (1e-4 if row["dtype"] == "fp32" else 0.1)
        assert row["speed-up"]["low"] <= row["speed-up"]["median"] <= row["speed-up"]["high"]


@pytest.mark.parametrize("family", ["rf", "ddpm"])
def test_the_dtypes_benchmark_finds_no_difference_in_fp32_and_a_small_one_in_bf16(
    benchmarks: Callable[[str], ModuleType], family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_pico(sampler=family, in_channels=3).save(tmp_path / "pico.safetensors")
    size = ["--images", "4", "--steps", "3", "--times", "2", "--cfg", "1.5"]
    benchmarks("dtypes").main([str(file), *size, "--dtypes", "fp32", "bf16"])
    fp32, bf16, other = rows_of(capsys.readouterr().out, 9)
    assert [row[0] for row in (fp32, bf16, other)] == ["fp32", "bf16", "another seed"]
    assert fp32[1:6] == ["0 %"] * 5
    assert [float(cell) for cell in fp32[6:8]] == [0, 0]
    mean, most, *differences = (float(cell.removesuffix(" %")) for cell in bf16[1:6])
    assert mean <= most < 10
    assert all(0 < value < 5 for value in differences)
    assert 0 < float(bf16[6]) < float(other[6])
    assert 0 < float(bf16[7]) < float(other[7])


def test_the_share_routed_otherwise_counts_sets_of_experts_by_block(benchmarks: Callable[[str], ModuleType]) -> None:
    script, none = benchmarks("dtypes"), torch.zeros(1)
    exact = script.Evaluation(none, [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]])])
    found = script.Evaluation(none, [torch.tensor([[1, 0], [2, 3]]), torch.tensor([[0, 1], [2, 4]])])
    assert script.routed([found, exact], [exact, exact]) == script.Routed(mean=0.125, most=0.25)
