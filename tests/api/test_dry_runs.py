"""``dry_run=True`` returns what ``--dry-run`` tells, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import contents, here
from conftest import make_pico

import ditmoe_cli
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint
from ditmoe_cli.errors import BadInputError, OutputExistsError

FEW = {"calibration_images": 2, "calibration_steps": 2}
WORDS = ("--calibration-images", 2, "--calibration-steps", 2)
Case = tuple[Callable[[], Any], tuple[object, ...]]
CASES: dict[str, Case] = {
    "prune": (lambda: ditmoe_cli.plan_prune("a.safetensors", keep=2, dry_run=True, **FEW), ("--keep", 2, *WORDS)),  # type: ignore[arg-type]
    "merge": (lambda: ditmoe_cli.plan_merge("a.safetensors", groups=2, dry_run=True, **FEW), ("--groups", 2, *WORDS)),  # type: ignore[arg-type]
    "quantize": (
        lambda: ditmoe_cli.plan_quantize("a.safetensors", bits=4, uniform=True, dry_run=True),
        ("--bits", 4, "--uniform"),
    ),
    "heal": (
        lambda: ditmoe_cli.heal("q.safetensors", original="a.safetensors", steps=1, dry_run=True, **FEW),  # type: ignore[arg-type]
        ("--original", "a.safetensors", "--steps", 1, *WORDS),
    ),
    "distill": (
        lambda: ditmoe_cli.distill("q.safetensors", original="a.safetensors", iterations=2, dry_run=True),
        ("--original", "a.safetensors", "--iterations", 2),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    make_pico(sampler="rf", in_channels=1, input_size=4).save(folder / "a.safetensors")
    for words in (
        ("quantize", "a.safetensors", "--uniform", "--bits", 8, "-o", "q.safetensors"),
        ("profile-experts", "a.safetensors", "--images", 2, "--steps", 2, "--bins", 1, "-o", "p.safetensors"),
    ):
        done = here(*words, cwd=folder)
        assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize("command", CASES)
def test_a_dry_run_tells_what_the_command_s_does(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, words = CASES[command]
    monkeypatch.chdir(folder)
    before = contents(folder)
    found = call()
    assert isinstance(found, ForeseenCheckpoint) and contents(folder) == before
    source = "q.safetensors" if "--original" in words else "a.safetensors"
    done = here(command, source, *words, "--dry-run", cwd=folder)
    assert done.code == 0, done.err
    assert {**found.to_json(), "dry_run": True} == done.result
    assert found.ratio == done.result["ratio"] and found.estimate == done.result["estimate"]


def test_a_compression_is_foreseen_with_a_profile_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(BadInputError) as refused:
        ditmoe_cli.compress("a.safetensors", ratio=0.6, dry_run=True, **FEW)  # type: ignore[arg-type]
    message = here("compress", "a.safetensors", "--ratio", 0.6, *WORDS, "--dry-run", cwd=folder).error(3)
    assert message.replace("--profile", "profile").endswith(str(refused.value))


@pytest.mark.slow
def test_a_foreseen_compression_is_the_command_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = ditmoe_cli.compress("a.safetensors", ratio=0.6, profile="p.safetensors", dry_run=True)
    words = ("--ratio", 0.6, "--profile", "p.safetensors", "--dry-run")
    done = here("compress", "a.safetensors", *words, cwd=folder)
    assert {**found.to_json(), "dry_run": True} == done.result and not found.path.exists()


def test_a_plan_is_foreseen_whatever_stands_at_its_usual_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    foreseen = ditmoe_cli.plan_quantize("a.safetensors", bits=3, uniform=True, dry_run=True)
    plan = ditmoe_cli.plan_quantize("a.safetensors", bits=3, uniform=True)
    applied = ditmoe_cli.apply("a.safetensors", plan, output="b.safetensors", dry_run=True)
    assert isinstance(applied, ForeseenCheckpoint) and foreseen.bytes == applied.bytes
    made = ditmoe_cli.apply("a.safetensors", plan, output="b.safetensors")
    assert made.bytes == foreseen.bytes == made.path.stat().st_size
    assert ditmoe_cli.apply("a.safetensors", plan, output="b.safetensors", dry_run=True).up_to_date
    foreseen.path.write_text("in the way")
    again = ditmoe_cli.plan_quantize("a.safetensors", bits=3, uniform=True, dry_run=True)
    assert isinstance(again, ForeseenCheckpoint)
    with pytest.raises(OutputExistsError):
        ditmoe_cli.compress("a.safetensors", ratio=0.6, dry_run=True, output=foreseen.path, **FEW)  # type: ignore[arg-type]
