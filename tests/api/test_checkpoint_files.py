"""Functions of a checkpoint's files are the commands: the same bytes, the same JSON, the same refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import here
from conftest import make_pico
from safetensors.numpy import load_file, save_file

import ditmoe_cli
from ditmoe_cli import DitmoeError
from ditmoe_cli.api.export_runs import ForeseenExport
from ditmoe_cli.api.inspection_runs import DifferingCheckpoints, InspectedCheckpoint, InspectedTensors
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint
from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_pico(sampler="rf", in_channels=1, input_size=4, experts=3).save(tmp_path / "a.safetensors")
    done = here("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "q.safetensors", cwd=tmp_path)
    assert done.code == 0, done.err
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_known_of_a_checkpoint_is_the_command_s(folder: Path) -> None:
    found = ditmoe_cli.inspect("q.safetensors", verify=True, tensors=True)
    assert isinstance(found, InspectedCheckpoint)
    theirs = here("inspect", "q.safetensors", "--verify", "--tensors", cwd=folder).result
    assert found.figures.keys() == theirs.keys()
    texts = ("upstream_obstacle", "notes", "assumptions", "warnings")  # name options there, and arguments here
    assert {k: v for k, v in found.figures.items() if k not in texts} == {
        k: v for k, v in theirs.items() if k not in texts
    }
    assert "--to upstream" in theirs["upstream_obstacle"] and "export to upstream" in found.figures["upstream_obstacle"]
    assert found.recipe == here("inspect", "q.safetensors", "--recipe", cwd=folder).out
    with pytest.raises(BadInputError):
        ditmoe_cli.inspect("a.safetensors").recipe  # type: ignore[union-attr]  # noqa: B018


def test_what_differs_is_the_command_s(folder: Path) -> None:
    found = ditmoe_cli.inspect("a.safetensors", "q.safetensors", values=True)
    assert isinstance(found, DifferingCheckpoints) and not found.same
    assert found.figures == here("inspect", "a.safetensors", "q.safetensors", "--values", cwd=folder).result
    same = ditmoe_cli.inspect("a.safetensors", folder / "a.safetensors")
    assert isinstance(same, DifferingCheckpoints) and same.same


def test_damage_and_other_tensors_are_told(folder: Path) -> None:
    data = bytearray(ditmoe_cli.convert("a.safetensors", dtype="bf16").path.read_bytes())
    data[-2] ^= 1
    (folder / "d.safetensors").write_bytes(data)
    for arguments in (("d.safetensors",), ("a.safetensors", "d.safetensors")):
        with pytest.raises(BadInputError, match="not what ditmoe wrote"):
            ditmoe_cli.inspect(*arguments, verify=True)
    save_file({"x": load_file("a.safetensors")["pos_embed"]}, folder / "x.safetensors")
    with pytest.raises(BadInputError):
        ditmoe_cli.inspect("x.safetensors")
    others = ditmoe_cli.inspect("x.safetensors", tensors=True)
    assert isinstance(others, InspectedTensors) and [each["name"] for each in others.figures["stored"]] == ["x"]


def test_cards_are_the_command_s(folder: Path) -> None:
    ditmoe_cli.inspect("q.safetensors", card="mine.md")
    assert here("inspect", "q.safetensors", "--card", "cli.md", cwd=folder).code == 0
    assert (folder / "mine.md").read_bytes() == (folder / "cli.md").read_bytes()
    (folder / "mine.md").write_text("mine")
    with pytest.raises(OutputExistsError):
        ditmoe_cli.inspect("q.safetensors", card="mine.md")
    for arguments in ({"force": True}, {"values": True}, {"other": "a.safetensors", "card": "x.md"}):
        with pytest.raises(UsageError, match="has no effect with"):
            ditmoe_cli.inspect("q.safetensors", **arguments)  # type: ignore[arg-type]


def test_a_conversion_is_the_command_s_file(folder: Path) -> None:
    foreseen = ditmoe_cli.convert("q.safetensors", dtype="bf16", dequantize=True, dry_run=True)
    assert isinstance(foreseen, ForeseenCheckpoint)
    made = ditmoe_cli.convert("q.safetensors", dtype="bf16", dequantize=True)
    done = here("convert", "q.safetensors", "--dtype", "bf16", "--dequantize", "-o", "cli.safetensors", cwd=folder)
    assert made.path.read_bytes() == (folder / "cli.safetensors").read_bytes()
    assert made.bytes == foreseen.bytes == done.result["bytes"] and made.path == foreseen.path
    assert ditmoe_cli.convert("q.safetensors", dtype="bf16", dequantize=True, dry_run=True).up_to_date
    with pytest.raises(UsageError, match="dtype 'int8': choose fp32, bf16, fp16"):
        ditmoe_cli.convert("q.safetensors", dtype="int8")  # type: ignore[arg-type]


def test_an_export_is_the_command_s_and_reads_back_as_the_folder_of_a_pipeline(folder: Path) -> None:
    foreseen = ditmoe_cli.export("q.safetensors", to="diffusers", output="mine", dry_run=True)
    assert isinstance(foreseen, ForeseenExport) and not (folder / "mine").exists()
    made = ditmoe_cli.export("q.safetensors", to="diffusers", output="mine")
    assert here("export", "q.safetensors", "--to", "diffusers", "-o", "cli", cwd=folder).code == 0
    for file in (folder / "cli").rglob("*"):
        if file.is_file() and file.name != "README.md":  # which names its folder
            assert file.read_bytes() == (folder / "mine" / file.relative_to(folder / "cli")).read_bytes()
    assert made.bytes == foreseen.bytes == sum(f.stat().st_size for f in made.path.rglob("*") if f.is_file())
    assert made.facts == foreseen.facts and made.facts["steps"] and not made.up_to_date
    again = ditmoe_cli.export("q.safetensors", to="diffusers", output="mine", dry_run=True)
    assert again.up_to_date and again.to_json()["diffusers"] == made.to_json()["diffusers"]
    read = ditmoe_cli.convert(made, from_diffusers=True, output="back.safetensors").open()
    assert read.fingerprint == ditmoe_cli.open_checkpoint("q.safetensors").fingerprint
    with pytest.raises(DitmoeError, match="from_diffusers has no effect on an opened checkpoint"):
        ditmoe_cli.convert(read, from_diffusers=True)
    with pytest.raises(UsageError, match="to 'ggml': choose upstream, diffusers"):
        ditmoe_cli.export("q.safetensors", to="ggml")


def test_cards_show_what_functions_found_and_draw_what_they_sampled(folder: Path) -> None:
    few = {"images": 2, "steps": 2}
    compared = ditmoe_cli.compare("a.safetensors", "q.safetensors", **few)  # type: ignore[arg-type]
    sampled = [ditmoe_cli.sample(f"{name}.safetensors", **few, output=f"{name}.s.safetensors") for name in "aq"]  # type: ignore[arg-type]
    scored = ditmoe_cli.score(sampled[1], ref=sampled[0], extractor="pixels")
    (folder / "compare.json").write_text(json.dumps(compared.to_json()))
    for name, scores in (("objects", [compared, scored]), ("files", ["compare.json", scored])):
        made = ditmoe_cli.export("q.safetensors", to="diffusers", output=name, scores=scores, samples=sampled)
        text = (made.path / "README.md").read_text()
        assert "relative error of the prediction" in text and "`frechet` (`pixels`)" in text
        assert "](images.png)" in text and (made.path / "images.png").is_file()
    with pytest.raises(BadInputError, match="scores: is a score of"):
        ditmoe_cli.export("a.safetensors", to="diffusers", scores=[compared])
    with pytest.raises(BadInputError, match="scores: is no score"):
        ditmoe_cli.inspect("q.safetensors", card="x.md", scores=[sampled[0]])
    with pytest.raises(UsageError, match="scores 3: give a list"):
        ditmoe_cli.inspect("q.safetensors", card="x.md", scores=3)  # type: ignore[arg-type]
