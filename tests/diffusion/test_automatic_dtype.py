"""Which dtype ``auto`` is, and how far bf16 is from fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico, make_pico
from distilling import distilled_pair

from ditmoe_cli.diffusion import automatic_dtype as module
from ditmoe_cli.diffusion.automatic_dtype import (
    MOST_DIFFERENCE,
    NARROWEST,
    chosen_dtype,
    has_bf16,
    measured_difference,
)
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.offload import OffloadedDiTMoE


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


def wide(pico: Pico, folder: Path) -> Checkpoint:
    """Return a small checkpoint that says it is as wide as `auto` asks for."""
    opened = open_checkpoint(pico.save(folder / "a.safetensors"))
    return replace(opened, config=replace(opened.config, hidden_size=NARROWEST))


@pytest.fixture
def on_bf16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda _: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("on_bf16")
@pytest.mark.parametrize(("difference", "expected"), [(MOST_DIFFERENCE, "bf16"), (MOST_DIFFERENCE * 1.01, "fp32")])
def test_auto_measures_once(difference: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = wide(make_pico(), tmp_path), []
    monkeypatch.setattr(module, "measured_difference", lambda *arguments: asked.append(arguments) or difference)
    assert chosen_dtype(checkpoint, "cpu", measures=False) == "bf16", "what is not known counts as small"
    assert [chosen_dtype(checkpoint, "cpu") for _ in range(3)] == [expected] * 3
    assert chosen_dtype(checkpoint, "cpu", measures=False) == expected
    assert len(asked) == 1


@pytest.mark.usefixtures("on_bf16")
def test_auto_is_fp32_where_nothing_is_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = open_checkpoint(make_pico().save(tmp_path / "a.safetensors"))
    assert chosen_dtype(narrow, "cpu") == "fp32"
    monkeypatch.setattr(module, "has_bf16", lambda _: False)
    assert chosen_dtype(replace(narrow, config=replace(narrow.config, hidden_size=NARROWEST)), "cpu") == "fp32"


@pytest.mark.parametrize(("sampler", "attention"), [("rf", "flash"), ("ddpm", "timm")])
def test_differences_are_of_the_order_of_rounding(sampler: str, attention: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico(sampler=sampler, attention=attention).save(tmp_path / "a.safetensors"))
    assert measured_difference(checkpoint, "cpu", "fp32") == 0
    half, brain = (measured_difference(checkpoint, "cpu", dtype) for dtype in ("fp16", "bf16"))
    assert 0 < half < 0.1 and 0 < brain < 0.1


@pytest.mark.usefixtures("on_bf16")
def test_what_is_measured_to_be_far_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, told = wide(make_pico(), tmp_path), list[str]()
    monkeypatch.setattr(module, "measured_difference", lambda *_: 0.042)
    for _ in range(2):
        assert chosen_dtype(checkpoint, "cpu", note=told.append) == "fp32"
    assert told == ["computing a.safetensors in fp32: its predictions in bf16 differ by 4.2%, more than 3%"] * 2


@pytest.mark.usefixtures("on_bf16")
def test_predictions_that_are_not_finite_are_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, told, asked = wide(make_pico(), tmp_path), list[str](), []

    def prediction(*_: object) -> torch.Tensor:
        asked.append(1)
        return torch.full((2, 3), torch.nan if len(asked) > 1 else 1.0)

    monkeypatch.setattr(module, "_last_state", lambda *_: (torch.zeros(1), 0.5))
    monkeypatch.setattr(module, "_prediction", prediction)
    monkeypatch.setattr("ditmoe_cli.model.offload.OffloadedDiTMoE", lambda *_, **__: None)
    for _ in range(2):
        assert chosen_dtype(checkpoint, "cpu", note=told.append) == "fp32"
    assert told == ["computing a.safetensors in fp32: its predictions in bf16 are not finite"] * 2
    assert len(asked) == 2, "measured once"


@pytest.mark.parametrize(
    ("sampler", "distilled", "last"),
    [("rf", False, 1 / 8), ("ddpm", False, 125), ("rf", True, 1 / 4), ("ddpm", True, 249)],
)
def test_it_is_measured_at_the_end_of_the_path(
    sampler: str, distilled: bool, last: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = distilled_pair(tmp_path, sampler=sampler)
    checkpoint = open_checkpoint(pair.few if distilled else pair.original)
    judged, honest = [], module._prediction

    def prediction(model: Any, spec: Any, x: torch.Tensor, t: float) -> torch.Tensor:
        judged.append((model.dtype, x, t))
        return honest(model, spec, x, t)

    monkeypatch.setattr(module, "_prediction", prediction)
    assert measured_difference(checkpoint, "cpu", "bf16") > 0
    (exact, x, t), (half, same, at) = judged
    assert (exact, half) == (torch.float32, torch.bfloat16)
    assert t == at == last and torch.equal(x, same) and len(x) == 4
    noise = image_noise(0, range(4), torch.device("cpu")).draw(tuple(x.shape[1:]))
    assert float((x - noise).norm() / noise.norm()) > 0.1, "no longer noise"


def test_a_difference_of_the_end_alone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_pico(sampler="rf").save(tmp_path / "a.safetensors"))
    honest = OffloadedDiTMoE.prepared

    def prepared(self: OffloadedDiTMoE, times: Sequence[float], labels: torch.Tensor) -> Any:
        predict = honest(self, times, labels)
        far = 1.1 if self.dtype == torch.bfloat16 else 1.0
        return lambda x, t, *rest: predict(x, t, *rest) * (far if t < 0.25 else 1.0)

    monkeypatch.setattr(OffloadedDiTMoE, "prepared", prepared)
    assert measured_difference(checkpoint, "cpu", "bf16") == pytest.approx(0.1, rel=0.2)


def test_what_is_not_finite_in_fp32_either_is_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_pico().save(tmp_path / "a.safetensors"))

    def prepared(*_: object) -> Any:
        return lambda x, *_: torch.full_like(x, torch.nan)

    monkeypatch.setattr(OffloadedDiTMoE, "prepared", prepared)
    assert measured_difference(checkpoint, "cpu", "bf16") > MOST_DIFFERENCE


def test_a_dry_run_takes_a_gpu_as_one_that_has_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda _: pytest.fail("takes torch"))
    assert chosen_dtype(wide(make_pico(), tmp_path), "cuda", measures=False) == "bf16"


def test_a_gpu_that_is_not_there_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def capability(_: torch.device) -> tuple[int, int]:
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert not has_bf16("cuda:9")
