"""Which dtype ``auto`` is, and how far bf16 is from fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico

from ditmoe_cli.model import dtypes
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dtypes import (
    DTYPES,
    MOST_DIFFERENCE,
    NARROWEST,
    chosen_dtype,
    has_bf16,
    measured_difference,
    parse_dtype,
    torch_dtype_of,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags : fpu avx2\nmodel name : bf16 machine\n", False),
        ("", False),
    ],
)
def test_a_cpu_has_bf16_by_its_flags(text: str, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_bf16("cpu", file) is expected
    assert not has_bf16("cpu", tmp_path / "missing")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_bf16_by_its_capability(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_bf16("cuda:1") is expected


def test_names_are_those_of_torch() -> None:
    assert [torch_dtype_of(parse_dtype(name)) for name in DTYPES] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(ValueError, match="choose fp32, bf16, fp16"):
        parse_dtype("auto")


def wide(pico: Pico, folder: Path) -> Checkpoint:
    """Return a small checkpoint that says it is as wide as `auto` asks for."""
    opened = open_checkpoint(pico.save(folder / "a.safetensors"))
    return replace(opened, config=replace(opened.config, hidden_size=NARROWEST))


@pytest.fixture
def on_bf16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dtypes, "has_bf16", lambda _: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("on_bf16")
@pytest.mark.parametrize(("difference", "expected"), [(MOST_DIFFERENCE, "bf16"), (MOST_DIFFERENCE * 1.01, "fp32")])
def test_auto_measures_once(difference: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = wide(make_pico(), tmp_path), []
    monkeypatch.setattr(dtypes, "measured_difference", lambda *arguments: asked.append(arguments) or difference)
    assert chosen_dtype(checkpoint, "cpu", measures=False) == "bf16", "what is not known counts as small"
    assert [chosen_dtype(checkpoint, "cpu") for _ in range(3)] == [expected] * 3
    assert chosen_dtype(checkpoint, "cpu", measures=False) == expected
    assert len(asked) == 1


@pytest.mark.usefixtures("on_bf16")
def test_auto_is_fp32_where_nothing_is_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = open_checkpoint(make_pico().save(tmp_path / "a.safetensors"))
    assert chosen_dtype(narrow, "cpu") == "fp32"
    monkeypatch.setattr(dtypes, "has_bf16", lambda _: False)
    assert chosen_dtype(replace(narrow, config=replace(narrow.config, hidden_size=NARROWEST)), "cpu") == "fp32"


@pytest.mark.parametrize("sampler", ["rf", "ddpm"])
@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_differences_are_of_the_order_of_rounding(sampler: str, attention: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico(sampler=sampler, attention=attention).save(tmp_path / "a.safetensors"))
    assert measured_difference(checkpoint, "cpu", "fp32") == 0
    half, brain = (measured_difference(checkpoint, "cpu", dtype) for dtype in ("fp16", "bf16"))
    assert 0 < half < 0.1 and 0 < brain < 0.1


@pytest.mark.usefixtures("on_bf16")
def test_what_is_measured_to_be_far_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, told = wide(make_pico(), tmp_path), list[str]()
    monkeypatch.setattr(dtypes, "measured_difference", lambda *_: 0.042)
    for _ in range(2):
        assert chosen_dtype(checkpoint, "cpu", note=told.append) == "fp32"
    assert told == ["computing a.safetensors in fp32: its predictions in bf16 differ by 4.2%, more than 3%"] * 2


@pytest.mark.usefixtures("on_bf16")
def test_predictions_that_are_not_finite_are_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, told, asked = wide(make_pico(), tmp_path), list[str](), []

    def prediction(_: object) -> torch.Tensor:
        asked.append(1)
        return torch.full((2, 3), torch.nan if len(asked) > 1 else 1.0)

    monkeypatch.setattr(dtypes, "_prediction", prediction)
    monkeypatch.setattr("ditmoe_cli.model.offload.OffloadedDiTMoE", lambda *_, **__: None)
    for _ in range(2):
        assert chosen_dtype(checkpoint, "cpu", note=told.append) == "fp32"
    assert told == ["computing a.safetensors in fp32: its predictions in bf16 are not finite"] * 2
    assert len(asked) == 2, "measured once"


def test_a_dry_run_takes_a_gpu_as_one_that_has_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "has_bf16", lambda _: pytest.fail("takes torch"))
    assert chosen_dtype(wide(make_pico(), tmp_path), "cuda", measures=False) == "bf16"


def test_a_gpu_that_is_not_there_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def capability(_: torch.device) -> tuple[int, int]:
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert not has_bf16("cuda:9")
