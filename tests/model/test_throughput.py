"""How fast a machine is: assumed, timed, and kept."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe_cli.model import throughput
from ditmoe_cli.model.throughput import ASSUMED_RATE, known_rate, likely_device, measured_rate, peak_rate, threads_of

SIDE = 64  # of the products here; those of a machine's own measurement take seconds in half precision


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(throughput, "_SIDE", SIDE)
    return tmp_path / "ditmoe" / "throughput.json"


def never() -> float:
    raise AssertionError("timed again")


def test_a_rate_is_assumed_until_it_was_timed_and_then_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products of 2 n³ operations, of which the shortest takes 10 ms."""
    assert known_rate("cpu") == throughput.Rate(3 * ASSUMED_RATE, 3, measured=False)
    shorter = itertools.accumulate([0.0, 0.05, 1.0, 0.03, 1.0, 0.01, 1.0, 0.02, 1.0, 0.04])
    timed = measured_rate("cpu", shorter.__next__)
    assert timed.measured and timed.flops == pytest.approx(2 * SIDE**3 / 0.01)
    assert measured_rate("cpu", never) == known_rate("cpu") == timed
    assert len(json.loads(cache.read_text())) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not known_rate("cpu").measured, "of another number of threads"


def ticking(seconds: float) -> Callable[[], float]:
    return (seconds * tick for tick in itertools.count()).__next__


def test_a_peak_is_the_highest_rate_that_was_ever_timed(cache: Path) -> None:
    fast, slow = 2 * SIDE**3 / 0.01, 2 * SIDE**3 / 0.04
    assert peak_rate("cpu", "fp32", 3, ticking(0.04)).flops == pytest.approx(slow)
    assert known_rate("cpu").flops == pytest.approx(slow), "estimates take it too"
    assert peak_rate("cpu", "fp32", 3, ticking(0.01)).flops == pytest.approx(fast)
    assert peak_rate("cpu", "fp32", 3, ticking(0.04)).flops == pytest.approx(fast), "the machine was busy this time"
    assert json.loads(cache.read_text()) == {key: pytest.approx(fast) for key in json.loads(cache.read_text())}


def test_peaks_are_those_of_a_dtype_and_a_number_of_threads(cache: Path) -> None:
    for part, (dtype, threads) in enumerate(itertools.product(("fp32", "bf16", "fp16"), (1, 2)), start=1):
        rate = peak_rate("cpu", dtype, threads, ticking(0.01 * part))  # type: ignore[arg-type]
        assert rate == throughput.Rate(pytest.approx(2 * SIDE**3 / (0.01 * part)), threads, measured=True)
    assert len(json.loads(cache.read_text())) == 6
    assert not known_rate("cpu").measured, "of three threads"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "fast"}'])
def test_a_broken_cache_is_none(text: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert not known_rate("cpu").measured
    assert measured_rate("cpu", itertools.count().__next__).measured
    assert known_rate("cpu").measured


def test_a_cache_that_cannot_be_written_costs_nothing_but_another_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert measured_rate("cpu", itertools.count().__next__).measured
    assert not known_rate("cpu").measured


def test_threads_are_those_of_the_environment() -> None:
    assert threads_of({"OMP_NUM_THREADS": "5"}.get) == 5
    assert threads_of({"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "4"}.get) == 4
    assert threads_of({"OMP_NUM_THREADS": "many"}.get) >= 1


def test_auto_is_a_gpu_where_its_driver_is(tmp_path: Path) -> None:
    assert [likely_device(name, tmp_path) for name in ("auto", "cpu", "cuda:1")] == ["cpu", "cpu", "cuda:1"]
    (tmp_path / "nvidiactl").touch()
    assert [likely_device(name, tmp_path) for name in ("auto", "cpu")] == ["cuda", "cpu"]
    assert known_rate("cuda").where == "on the GPU"
