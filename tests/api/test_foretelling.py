"""Estimates as people and programs read them, and when they are told."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from cli_helpers import here, on_terminal, series
from conftest import make_pico

from ditmoe_cli.api.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.model.effort import Effort, Estimate
from ditmoe_cli.model.throughput import Rate

RATE = Rate(1e10, 2, measured=True)
REFIT = Estimate("refitting 28 blocks", Effort(flops=0.7 * 1e10 * 720), 3.1e9)
WRITE = Estimate("writing", Effort(), 1e9)


def said(*estimates: Estimate) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        foretell(estimates, lambda: "cpu", lambda _: RATE)
    return err.getvalue()


def test_work_of_more_than_a_minute_is_foretold() -> None:
    assert said(REFIT, WRITE) == "ditmoe: about 12 min and 3.10 GB on 2 threads: refitting 28 blocks, writing\n"
    assert said(Estimate("short", Effort(flops=0.7 * 1e10 * 59), 1e9)) == said() == ""


def test_short_work_does_not_ask_for_the_device() -> None:
    def nobody() -> str:
        raise AssertionError("asked")

    foretell([WRITE], nobody)


def test_long_writing_is_foretold_without_measuring() -> None:
    def nobody() -> str:
        raise AssertionError("asked")

    with contextlib.redirect_stderr(io.StringIO()) as err:
        foretell([Estimate("writing", Effort(nbytes=1e12), 1e9)], nobody)
    assert "min" in err.getvalue() and err.getvalue().endswith(": writing\n")


def test_only_the_first_of_several_processes_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    assert said(REFIT) == ""


def test_json_has_every_phase_and_what_it_rests_on() -> None:
    assert estimate_of([REFIT, WRITE], RATE) == {
        "seconds": pytest.approx(720),
        "memory": 3_100_000_000,
        "phases": [
            {"what": "refitting 28 blocks", "seconds": pytest.approx(720), "memory": 3_100_000_000},
            {"what": "writing", "seconds": 0.0, "memory": 1_000_000_000},
        ],
        "flops_per_second": 1e10,
        "threads": 2,
        "measured": True,
    }
    assert estimate_row([REFIT], Rate(1e10, 1, measured=False)) == (
        "estimate",
        "about 12 min and 3.10 GB on 1 thread: refitting 28 blocks (assuming 10 GFLOP/s)",
    )


def test_dry_runs_estimate_without_torch(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    commands = [
        ("prune", "a.safetensors", "--keep", "0.5", "--dry-run"),
        ("convert", "a.safetensors", "--dry-run"),
        ("quantize", "a.safetensors", "--uniform", "--format", "nf4", "--rounding", "nearest", "--dry-run"),
    ]
    whats = []
    for outcome, heavy in series(commands, tmp_path):
        assert heavy == []
        estimate = outcome.result["estimate"]
        assert estimate["seconds"] > 0 and estimate["memory"] > 0
        whats.append([each["what"].split()[0] for each in estimate["phases"]])
    assert whats == [["profiling", "refitting", "writing"], ["writing"], ["writing"]]


def test_dry_runs_show_the_estimate(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    code, text = on_terminal("convert", "a.safetensors", "--dry-run", cwd=tmp_path, NO_COLOR="1")
    (line,) = (line for line in text.splitlines() if line.startswith("estimate"))
    assert code == 0 and line.split(None, 1)[1].startswith("about 0 s and ")
    assert here("convert", "a.safetensors", "--dry-run", cwd=tmp_path).result["estimate"]["phases"]
