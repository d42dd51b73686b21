"""``ditmoe compress``: a size that is kept to, ties with their price, what upstream loads, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import bytes_of, here, outputs, piped
from compressing import measure_few_tokens
from conftest import make_pico

from ditmoe_cli.cli.costs import error_rows
from ditmoe_cli.compression.joint import choosing
from ditmoe_cli.compression.replay import states
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.upstream import obstacle

SETTINGS = ("--images", 8, "--steps", 2, "--bins", 2)
SMALL: dict[str, Any] = {"sampler": "rf", "in_channels": 1, "input_size": 4, "hidden": 32}
COMPRESS = ("compress", "a.safetensors", "--profile", "p.safetensors")
UNEVEN = ((64, 32, 64, 96), (64,) * 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with their profiles, beside them: one of even experts, and one of several widths."""
    folder = tmp_path_factory.mktemp("compress")
    make_pico(**SMALL, experts=3, widths=((64,) * 3,) * 2).save(folder / "a.safetensors")
    make_pico(**SMALL, widths=UNEVEN).save(folder / "uneven.safetensors")
    for name, profile in (("a", "p"), ("uneven", "uneven.profile")):
        words = ("profile-experts", f"{name}.safetensors", *SETTINGS, "-o", f"{profile}.safetensors")
        assert here(*words, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands in this process."""
    measure_few_tokens(monkeypatch, 256)
    monkeypatch.setattr(states, "FEWEST_TOKENS", 256)
    monkeypatch.setattr(states, "MOST_TOKENS", 512)
    monkeypatch.setattr(choosing, "SEARCH_TOKENS", 256)


def alike(checkpoint: Checkpoint) -> list[tuple[set[int], list[set[str]]]]:
    """Of each block, the widths of its experts, and the formats of each kind of matrix, from headers."""
    found = []
    for index, block in enumerate(checkpoint.config.blocks):
        of_matrices = []
        for matrix in MATRICES:
            names = [in_expert(index, number, f"{matrix}.weight") for number in range(len(block.expert_widths))]
            weights = [checkpoint.weights[name] for name in names]
            of_matrices.append({str(weight.format or weight.info.dtype) for weight in weights})
        found.append((set(block.expert_widths), of_matrices))
    return found


def test_a_size_is_kept_to_and_the_file_is_what_the_dry_run_said(folder: Path) -> None:
    predicted = here(*COMPRESS, "--ratio", 0.3, "--dry-run", cwd=folder)
    assert predicted.result["bytes"] <= 0.3 * (folder / "a.safetensors").stat().st_size
    written = here(*COMPRESS, "--ratio", 0.3, cwd=folder)
    assert written.result["bytes"] == predicted.result["bytes"] == bytes_of(written.path)
    assert written.path.name == "a.compress-ratio0.3.safetensors"
    assert 0 < written.result["tried_error"] < 1 and 0 < written.result["prediction_error"] < 1
    assert "untied_error" not in written.result
    sampled = here("sample", written.path, "--images", 2, "--steps", 2, "-o", "s.safetensors", cwd=folder)
    assert sampled.code == 0, sampled.err
    again = here(*COMPRESS, "--ratio", 0.3, cwd=folder)
    assert again.result["up_to_date"] is True and again.result["kept"] == written.result["kept"]
    assert again.result["widths"] == written.result["widths"]
    counted, known = (
        {group: sum(counts.values()) for group, counts in each.result["formats_by_group"].items()}
        for each in (again, written)
    )
    assert counted == known
    notes = written.notes
    assert len(notes) == len(set(notes)) and not any("going on" in note for note in notes), notes


@pytest.mark.parametrize("name", ["a", "uneven"])
def test_stacked_experts_are_alike_in_each_block(name: str, folder: Path) -> None:
    words = ("compress", f"{name}.safetensors", "--ratio", 0.3)
    given = ("--profile", "p.safetensors") if name == "a" else ()
    written = here(*words, *given, "--tie", "stack", cwd=folder)
    result = written.result
    assert 0 < result["untied_error"] <= result["predicted_error"]
    for widths, formats in alike(open_checkpoint(written.path)):
        assert len(widths) == 1 and all(len(each) == 1 for each in formats)
    assert written.path.name == f"{name}.compress-ratio0.3-stack.safetensors"
    assert dict(error_rows(result))["price of --tie"].startswith("predicted ")


def test_tied_matrices_take_one_format(folder: Path) -> None:
    written = here(*COMPRESS, "--ratio", 0.25, "--tie", "gate,up", cwd=folder)
    assert 0 < written.result["untied_error"] <= written.result["predicted_error"]
    weights = open_checkpoint(written.path).weights
    gates = {name: weight.format for name, weight in weights.items() if name.endswith("gate_proj.weight")}
    assert gates and all(weights[name.replace("gate", "up")].format == fmt for name, fmt in gates.items())


def test_experts_of_several_dtypes_are_not_stacked(folder: Path) -> None:
    pico = make_pico(**SMALL)
    pico.state["blocks.1.moe.experts.2.up_proj.weight"] = pico.state["blocks.1.moe.experts.2.up_proj.weight"].half()
    pico.save(folder / "mixed.safetensors")
    said = here("compress", "mixed.safetensors", "--ratio", 0.3, "--tie", "stack", cwd=folder).error(3)
    assert "block 1" in said and "F16 and F32" in said


def test_what_upstream_loads(folder: Path) -> None:
    words = ("compress", "a.safetensors", "--ratio", 0.8, "--upstream", "-o", "u.safetensors")
    written = here(*words, "--profile", "p.safetensors", cwd=folder)
    before, after = (open_checkpoint(folder / name) for name in ("a.safetensors", "u.safetensors"))
    assert obstacle(after.config) is None and written.result["bytes"] <= 0.8 * before.header.file_bytes
    assert all(weight.format is None for weight in after.weights.values())
    assert {len(block.expert_widths) for block in after.config.blocks} == {written.result["experts"]}
    assert {width for block in after.config.blocks for width in block.expert_widths} == {written.result["width"]}
    assert 0 < written.result["tried_error"] < 2
    converted = here("convert", "u.safetensors", "--to-upstream", "-o", "u.pt", cwd=folder)
    assert converted.code == 0, converted.err
    assert (folder / "u.pt").stat().st_size > 0
    assert here(*words, "--profile", "p.safetensors", cwd=folder).result["up_to_date"] is True


@pytest.mark.parametrize("option", [("--allow", "4"), ("--floor", "attn=4"), ("--tie", "stack"), ("--protect", "attn")])
def test_upstream_takes_no_formats(option: tuple[str, str], folder: Path) -> None:
    said = here(*COMPRESS, "--ratio", 0.8, "--upstream", *option, cwd=folder).error(2)
    assert said.startswith(option[0]) and "--upstream" in said


def test_what_upstream_cannot_load_in_any_case(folder: Path) -> None:
    make_pico(**SMALL, shared_width=32).save(folder / "b.safetensors")
    assert "shared expert" in here("compress", "b.safetensors", "--ratio", 0.8, "--upstream", cwd=folder).error(3)


def refused(folder: Path, code: int, *words: object) -> str:
    """The line that refuses a command, which leaves everything as it was."""
    before = outputs(folder)
    said = here(*words, cwd=folder).error(code)
    assert outputs(folder) == before
    return said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--size"),
        (("--size", "1MB", "--ratio", 0.5), 2, "--ratio"),
        (("--ratio", 0), 2, "above 0"),
        (("--ratio", 1), 2, "below 1"),
        (("--ratio", "nan"), 2, "above 0"),
        (("--size", "1GB"), 4, "nothing to do"),
        (("--size", "9KB"), 4, "smallest file takes"),
        (("--ratio", 0.1, "--upstream"), 4, "the smallest file that upstream's code loads takes"),
        (("--ratio", 0.5, "--tie", "gate"), 2, "--tie"),
        (("--ratio", 0.5, "--tie", "stack,left"), 2, "--tie left"),
        (("--ratio", 0.5, "--protect", "experts,shared,attn,modulation,embedders"), 2, "--protect"),
        (("--ratio", 0.5, "--floor", "attn=4", "--protect", "attn"), 2, "--floor"),
    ],
)
def test_what_cannot_be_asked_for(words: tuple[object, ...], code: int, said: str, folder: Path) -> None:
    assert said in refused(folder, code, *COMPRESS, *words)


def test_the_smallest_size_that_is_named_does(folder: Path) -> None:
    said = refused(folder, 4, *COMPRESS, "--size", "9KB")
    least = int(said.split(" takes ")[1].split(" ")[0].replace(",", ""))
    written = here(*COMPRESS, "--size", f"{least}B", cwd=folder)
    assert written.result["bytes"] <= least


def test_a_dry_run_without_a_profile_names_the_sizes_within_reach(folder: Path) -> None:
    (folder / "p.safetensors").unlink()
    said = refused(folder, 3, "compress", "a.safetensors", "--ratio", 0.5, "--dry-run")
    assert "--profile" in said and "can be reached" in said


def test_a_quantised_checkpoint_is_asked_for_its_original(folder: Path) -> None:
    assert here("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "q.safetensors", cwd=folder).code == 0
    said = refused(folder, 3, "compress", "q.safetensors", "--ratio", 0.5)
    assert "compress the checkpoint that it came from" in said


def test_a_fast_profile_does_not_do(folder: Path) -> None:
    fast = ("profile-experts", "a.safetensors", *SETTINGS, "--fast", "-o", "f.safetensors")
    assert here(*fast, cwd=folder).code == 0
    said = refused(folder, 3, "compress", "a.safetensors", "--ratio", 0.5, "--profile", "f.safetensors")
    assert "--fast" in said


def test_values_that_are_not_finite(folder: Path) -> None:
    pico = make_pico(**SMALL)
    pico.state["blocks.1.moe.experts.0.up_proj.weight"][0, 0] = torch.nan
    pico.save(folder / "nan.safetensors")
    said = here("compress", "nan.safetensors", "--ratio", 0.5, cwd=folder).error(3)
    assert "blocks.1.moe.experts.0.up_proj.weight" in said or "NaN" in said


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": "ddpm"},
        {"depth": 1},
        {"widths": ((4, 6, 7), (3, 5, 4))},
        {"widths": UNEVEN},
        {"expert_of": ((0, 1, 2, -1, 3), (0, 0, 1, 2, 3))},
        {"widths": ((64,) * 2, (64,) * 4), "expert_of": ((0, 1, -2, -3), (0, 1, 2, 3)), "extras": {"constants": 2}},
    ],
    ids=["ddpm", "one block", "narrow", "uneven", "ghosts and merged", "constants"],
)
def test_checkpoints_of_all_kinds(fields: dict[str, Any], tmp_path: Path) -> None:
    make_pico(**{**SMALL, **fields}).save(tmp_path / "m.safetensors")
    outcome = piped(
        f"ditmoe profile-experts m.safetensors {' '.join(map(str, SETTINGS))} | ditmoe compress --ratio 0.5", tmp_path
    )
    assert outcome.result["bytes"] <= 0.5 * (tmp_path / "m.safetensors").stat().st_size
    assert here("inspect", outcome.path, cwd=tmp_path).code == 0
