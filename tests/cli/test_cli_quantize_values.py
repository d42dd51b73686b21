"""Weights that formats do not hold: a mix leaves them and says so, GPTQ of one format refuses them before profiling."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import here, outputs
from compressing import measure_few_tokens, opened
from conftest import make_pico

from ditmoe_cli.compression.precision.mixed import held_formats

TINY = "blocks.0.moe.experts.0.up_proj.weight"
SETTINGS = ("--images", 2, "--steps", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3)
    pico.with_state(**{TINY: pico.state[TINY] * 1e-9}).save(folder / "tiny.safetensors")
    profiling = ("profile-experts", "tiny.safetensors", *SETTINGS, "-o", "p.safetensors")
    assert here(*profiling, cwd=folder).code == 0
    return folder


def test_a_mix_leaves_what_no_format_holds_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, 256)
    words = ("--profile", "p.safetensors", "--bits", 4, "--method", "outlier", "--rounding", "nearest", "--dry-run")
    done = here("quantize", "tiny.safetensors", *words, cwd=folder)
    assert done.code == 0 and TINY not in done.result["plan"]["formats"]
    assert "1 of 18 matrices of experts stay as they are" in done.err and "no format holds their values" in done.err
    assert TINY in done.err


def test_one_format_is_refused_before_profiling(folder: Path, tmp_path: Path) -> None:
    words = ("--uniform", "--format", "int", "--bits", 4, "--rounding", "gptq", "--calibration-images", 2)
    before = outputs(tmp_path)
    done = here("quantize", folder / "tiny.safetensors", *words, "--calibration-cfg", 1.5, cwd=tmp_path)
    message = done.error(3)
    assert "tiny.safetensors" in message and TINY in message and "so small that int4-g64" in message
    assert outputs(tmp_path) == before, "no profile was made"


def test_formats_that_do_not_hold_a_weight_are_left_out(tmp_path: Path) -> None:
    pico = make_pico()
    checkpoint = opened(pico.with_state(**{TINY: pico.state[TINY] * 1e-9}), tmp_path)
    offered = ("int4-g64", "int8-g64", None)
    assert held_formats(checkpoint, TINY, offered) == (None,)
    assert held_formats(checkpoint, TINY, offered[:2]) == (None,)
    assert held_formats(checkpoint, TINY.replace("up_proj", "down_proj"), offered) == offered
