"""``ditmoe report sensitivity`` as a program: what it prints, writes, keeps and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import FIELDS, contents, here, on_terminal
from conftest import make_pico
from distilling import SMALL, save_distilled

from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, read_map

QUICK = ("--images", 2, "--steps", 2)
MAPPING = ("report", "sensitivity", "a.safetensors", *QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints and a map of the first; not to be written to."""
    folder = tmp_path_factory.mktemp("sensitivity")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    make_pico(sampler="rf", in_channels=1, seed=1).save(folder / "b.safetensors")
    outcome = here(*MAPPING, "-o", "s.json", cwd=folder)
    (folder / "envelope.json").write_text(outcome.out)
    return folder


def test_the_envelope_and_the_file_hold_the_map(folder: Path) -> None:
    envelope = json.loads((folder / "envelope.json").read_text())
    assert envelope.keys() == FIELDS
    assert envelope["history"][-1]["command"] == "report sensitivity"
    result, document = envelope["result"], json.loads((folder / "s.json").read_text())
    assert document == {name: value for name, value in result.items() if name not in ("output", "png")}
    assert document["schema"] == "ditmoe.sensitivity/1"
    assert document.keys() == {"schema", "checkpoint", "sampling", "times", "reference", "errors", "by_block"}
    assert set(document["errors"]) == set(PARTS)
    assert all(len(rows) == 2 and len(row) == 2 for rows in document["errors"].values() for row in rows)
    assert document["sampling"]["images"] == 2
    assert result["output"] == str(folder / "s.json")


def test_a_checkpoint_comes_through_a_pipe(folder: Path) -> None:
    words = ("quantize", "a.safetensors", "--uniform", "--bits", 8, "--rounding", "nearest", "--dry-run")
    envelope = json.loads(here(*words, cwd=folder).out)
    envelope["checkpoint"] = str(folder / "a.safetensors")
    outcome = here("report", "sensitivity", *QUICK, cwd=folder, stdin=json.dumps(envelope))
    assert outcome.result["errors"] == json.loads((folder / "envelope.json").read_text())["result"]["errors"]
    assert any("kept from an earlier run" in line for line in outcome.notes)
    assert here("report", "sensitivity", cwd=folder, stdin="").error(3).startswith("stdin is empty")


def test_a_terminal_shows_tables(folder: Path) -> None:
    code, shown = on_terminal(*MAPPING, "--parts", "top1,skip", cwd=folder, NO_COLOR="1")
    assert code == 0
    lines = [line.split() for line in shown.splitlines() if not line.startswith("ditmoe:")]
    assert lines[0] == ["all", "steps", "without", "block", "without", "slot", "2"]
    assert lines[1][:2] == ["block", "0"]
    assert ["without", "slot", "2", "bin", "0", "bin", "1"] in lines
    assert "ab2, 2 steps, cfg 1, 2 NFE an image" in shown


@pytest.mark.slow
def test_a_map_is_kept_and_files_are_up_to_date(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    shutil.copy(folder / "a.safetensors", tmp_path)
    words = (*MAPPING, "-o", "s.json", "--png", "s.png")
    assert here(*words, "-q", cwd=tmp_path).out == f"{tmp_path / 's.json'}\n"
    first = contents(tmp_path)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "s.json").read_bytes() == (folder / "s.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("ditmoe_cli.routing.sensitivity.left_out_parts.measured_map", None)  # nothing is measured
        again = here(*words, cwd=tmp_path)
        assert [line for line in again.notes if "up to date" in line] == [
            "ditmoe: s.json is up to date",
            "ditmoe: s.png is up to date",
        ]
        (tmp_path / "s.json").write_text("else")
        assert "s.json: exists already" in here(*words, cwd=tmp_path).error(5)
    assert here(*words, "--force", cwd=tmp_path).code == 0
    assert contents(tmp_path) == first
    taken = (*MAPPING, "--seed", 1, "-o", "s.json")
    monkeypatch.setattr("ditmoe_cli.routing.sensitivity.left_out_parts.measured_map", None)  # refused before work
    assert "s.json: exists already" in here(*taken, cwd=tmp_path).error(5)


def test_a_picture_without_matplotlib_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe_cli.routing.report.figures.find_spec", lambda _: None)
    told = here(*MAPPING, "--png", "s.png", cwd=folder).error(3)
    assert told.endswith("install it: pip install 'ditmoe[report]'")


def test_a_dry_run_tells_what_a_map_takes(folder: Path) -> None:
    result = here("report", "sensitivity", "demo:digits", "--dry-run", cwd=folder).result
    assert result["bins"] == 16
    assert result["estimate"]["phases"][0]["what"] == "leaving out 5 parts of 4 blocks at 256 states"
    assert result["estimate"]["seconds"] > 0


def test_a_distilled_checkpoint_is_followed_by_its_own_steps(tmp_path: Path) -> None:
    save_distilled(make_pico(sampler="rf", **SMALL), tmp_path / "few.safetensors", "0" * 64)  # type: ignore[arg-type]
    outcome = here("report", "sensitivity", "few.safetensors", "--images", 2, "--parts", "skip", cwd=tmp_path)
    assert (outcome.result["sampling"]["steps"], len(outcome.result["times"])) == (4, 4)
    assert "--cfg 2" in here("report", "sensitivity", "few.safetensors", "--cfg", 2, cwd=tmp_path).error(2)


@pytest.mark.slow
def test_the_page_of_a_profile_shows_the_map(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few = {"depth": 1, "experts": 2, "input_size": 2, "num_classes": 1}  # so that there are few figures
    make_pico(sampler="rf", in_channels=1, **few).save(tmp_path / "a.safetensors")  # type: ignore[arg-type]
    profiling = ("profile-experts", "a.safetensors", "--images", 2, "--steps", 2, "--bins", 1, "--fast")
    assert here(*profiling, "-o", "p.safetensors", cwd=tmp_path).code == 0
    assert here(*MAPPING, "-o", "s.json", cwd=tmp_path).code == 0
    words = ("report", "profile", "p.safetensors", "--replicates", 20)
    shown = (*words, "--sensitivity", "s.json")
    result = here(*shown, "-o", "r.html", cwd=tmp_path).result
    assert result["sensitivity"] == read_map(tmp_path / "s.json").to_json()
    page = (tmp_path / "r.html").read_text()
    assert '<figure id="sensitivity">' in page
    assert "What predictions need" in page
    assert "r.html is up to date" in here(*shown, "-o", "r.html", cwd=tmp_path).err
    assert "exists already" in here(*words, "-o", "r.html", cwd=tmp_path).error(5), "another report"
    assert "sensitivity" not in here(*words, cwd=tmp_path).result
    assert here("report", "sensitivity", folder / "b.safetensors", *QUICK, "-o", "b.json", cwd=tmp_path).code == 0
    told = here(*words, "--sensitivity", "b.json", cwd=tmp_path).error(3)
    assert told.startswith("b.json: is a map of another checkpoint (")
    assert "is no map of sensitivity" in here(*words, "--sensitivity", "p.safetensors", cwd=tmp_path).error(3)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--parts", "skip,all"), 2, "--parts skip,all: give some of skip, skip-attention"),
        (("--parts", ""), 2, "--parts"),
        (("--bins", 3), 2, "--bins 3: must be between 1 and the 2 steps"),
        (("--bins", 0), 2, "--bins 0"),
        (("--images", 0), 2, "--images 0"),
        (("--solver", "heun"), 2, "evaluates the model twice"),
        (("--solver", "ddim"), 2, "ddim"),
        (("--batch", 0), 2, "--batch 0"),
        (("--classes", "9"), 2, "--classes 9"),
        (("--cfg", "nan"), 2, "--cfg"),
        (("-o", "s.txt"), 2, "ends in .json"),
        (("--png", "s.svg"), 2, "ends in .png"),
        (("-o", "no/s.json"), 3, "no"),
        (("--device", "tpu"), 2, "--device tpu"),
    ],
    ids=str,
)
def test_bad_input_takes_one_line(folder: Path, words: tuple[object, ...], code: int, told: str) -> None:
    assert told in here(*MAPPING, *words, cwd=folder).error(code)


def test_the_word_goes_first(folder: Path, tmp_path: Path) -> None:
    told = here("report", "--seed", 1, "sensitivity", "a.safetensors", cwd=folder).error(2)
    assert told == "sensitivity has options of its own and goes before them: ditmoe report sensitivity CHECKPOINT …"
    assert "choose profile or sensitivity" in here("report", "routing", cwd=folder).error(2)
    assert "no such" in here("report", "sensitivity", "none.safetensors", cwd=folder).error(3)
    shutil.copy(folder / "a.safetensors", tmp_path / "sensitivity")
    assert "no profile of it lies here" in here("report", "profile", "sensitivity", cwd=tmp_path).error(3)
    help_ = here("report", "sensitivity", "--help", cwd=folder).out
    assert help_.startswith("Usage: ditmoe report sensitivity [OPTIONS] [CHECKPOINT]")
