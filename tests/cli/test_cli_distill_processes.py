"""`ditmoe distill` in two processes of one job: they distil as one does, and one of them writes and speaks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_helpers import here, in_two_processes
from healing import pair
from safetensors.torch import load_file

from ditmoe_cli import open_checkpoint

WORDS = ("distill", "s.safetensors", "--original", "a.safetensors", "--steps", 2, "--teacher-steps", 4, "--batch", 9)


@pytest.mark.slow
def test_two_processes_distil_as_one_does(tmp_path: Path) -> None:
    pair(tmp_path)
    words = (*WORDS, "--iterations", 12, "--progressive", "--teacher-steps", 8, "--states", "own", "--cfg", 1.5)
    first, second = in_two_processes(*words, "-o", "two.safetensors", cwd=tmp_path)
    assert first.code == second.code == 0, first.err + second.err
    assert second.out == second.err == "", "one process prints and speaks"
    one = here(*words, "-o", "one.safetensors", cwd=tmp_path).result
    assert first.result["paths"] == one["paths"] and first.result["iterations"] == one["iterations"] == 12
    assert one["held_error"][1] < one["held_error"][0]
    for name in ("held_error", "path_error_before", "path_error_after"):
        assert first.result[name] == pytest.approx(one[name], rel=1e-3)
    before, alone, together = (load_file(tmp_path / f"{name}.safetensors") for name in ("s", "one", "two"))
    moved = sum(float((alone[name] - before[name]).square().sum()) for name in before)
    differing = sum(float((alone[name] - together[name]).square().sum()) for name in before)
    assert moved > 0 and differing < 1e-3 * moved
    assert open_checkpoint(tmp_path / "two.safetensors").distilled is not None
    assert not list(tmp_path.glob(".*")), "nothing is left beside the output"


@pytest.mark.slow
def test_processes_agree_on_how_many_iterations_the_time_allows(tmp_path: Path) -> None:
    pair(tmp_path)
    first, second = in_two_processes(*WORDS, "--minutes", 0.05, "-o", "two.safetensors", cwd=tmp_path)
    assert first.code == second.code == 0, first.err + second.err
    assert first.result["iterations"] >= 1 and first.result["held_error"][1] <= first.result["held_error"][0]


def test_what_is_refused_is_refused_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path)
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setitem(os.environ, "RANK", rank)
        assert "--steps 25" in here(*WORDS[:4], "--steps", 25, cwd=tmp_path).error(2)
        dry = here(*WORDS, "--dry-run", cwd=tmp_path)
        assert dry.code == 0 and bool(dry.out) == (rank == "0"), "the first process prints"
    envelope = here("inspect", "a.safetensors", cwd=tmp_path).out
    assert "torchrun" in here("distill", cwd=tmp_path, stdin=envelope).error(2)
