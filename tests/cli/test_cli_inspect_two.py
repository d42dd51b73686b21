"""``ditmoe inspect A B``: what differs between two checkpoints, as people and programs read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import make_pico
from families import without_metadata

from ditmoe_cli.files.header import read_safetensors_header


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a pickle of it, what was pruned from it, and that in fewer bits."""
    folder = tmp_path_factory.mktemp("two")
    model = make_pico(sampler="rf", in_channels=1, dtype=torch.float16)
    model.save(folder / "a.safetensors")
    model.save_pt(folder / "a.pt", "train", num_heads=2)
    pruning = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "-o", "p.safetensors")
    assert here(*pruning, cwd=folder).code == 0
    packing = ("quantize", "p.safetensors", "--uniform", "--format", "nf4", "-o", "q.safetensors")
    assert here(*packing, cwd=folder).code == 0
    other = make_pico(sampler="rf", in_channels=1, dtype=torch.float16, seed=1)
    other.save(folder / "b.safetensors")
    return folder


def table(*words: object, cwd: Path) -> dict[str, list[str]]:
    outcome = here("inspect", *words, "--text", cwd=cwd)
    assert outcome.code == 0, outcome.err
    rows: dict[str, list[str]] = {}
    for line in outcome.out.splitlines():
        label, _, text = line.partition("  ")
        rows.setdefault(label, []).append(text.strip())
    return rows


def test_the_same_model_in_another_container(folder: Path) -> None:
    result = here("inspect", "a.pt", "a.safetensors", cwd=folder).result
    assert result["same"] and not result["groups"] and not result["configuration"] and result["differing"] == 0
    assert result["compared_by"] == {"a": ["bytes"], "b": ["bytes"]}
    assert here("inspect", "a.pt", "a.safetensors", "--same", cwd=folder).code == 0


def test_what_pruning_and_packing_changed(folder: Path) -> None:
    result = here("inspect", "a.safetensors", "q.safetensors", cwd=folder).result
    assert result["relation"] == "ancestor" and not result["same"]
    assert [step["command"] for step in result["steps"]["b"]] == ["prune", "quantize"]
    assert result["configuration"] == {"num_experts": {"a": 4, "b": 2}}
    assert result["a"]["parameters"]["total"] > result["b"]["parameters"]["total"]
    kept = result["kept"]["b"]
    assert [len(block) for block in kept] == [2, 2] and result["kept"]["a"] is None
    gone = [group for group in result["groups"] if group["kind"] == "only in A"]
    assert sum(group["weights"] for group in gone) == 2 * 2 * 3
    packed = [group for group in result["groups"] if group["kind"] == "stored otherwise"]
    assert {(group["a"], group["b"]) for group in packed} == {("F16", "nf4")}
    assert result["compared_by"] == {"a": ["metadata"], "b": ["metadata"]}
    rows = table("a.safetensors", "q.safetensors", cwd=folder)
    assert rows["history"] == ["B was made from A"]
    assert rows["num_experts"] == ["4 | 2"]
    assert any("F16 → nf4" in text for texts in rows.values() for text in texts)
    assert rows["equal"][0].endswith("by the hashes in the metadata of both (--verify reads the bytes)")


def test_experts_that_both_have_are_told_once(folder: Path) -> None:
    """Two outputs of one choice: the second is in fewer bits of another plan of the same checkpoint."""
    again = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "--router", "slice")
    assert here(*again, "-o", "s.safetensors", cwd=folder).code == 0
    rows = table("p.safetensors", "s.safetensors", cwd=folder)
    told = [
        text for name, texts in rows.items() if name.startswith("block") for text in texts if "have experts" in text
    ]
    assert told and all(text.startswith("both have experts ") for text in told)
    assert not any("A has" in text or "B has" in text for texts in rows.values() for text in texts)


def test_the_other_way_round(folder: Path) -> None:
    rows = table("q.safetensors", "p.safetensors", cwd=folder)
    assert rows["history"] == ["A was made from B, after 1 step that they share"]
    assert [text for text in rows["made A"] if text.startswith("quantize")]


def test_a_pickle_is_known_as_what_a_file_was_made_from(folder: Path) -> None:
    result = here("inspect", "a.pt", "p.safetensors", "--sampler", "rf", cwd=folder).result
    assert result["relation"] == "ancestor"
    assert result["compared_by"] == {"a": ["bytes"], "b": ["metadata"]}
    assert not [group for group in result["groups"] if group["kind"] == "other bytes"]


def test_unrelated_checkpoints_are_compared_by_name(folder: Path) -> None:
    rows = table("a.safetensors", "b.safetensors", cwd=folder)
    assert rows["history"] == ["neither history names the other, or a checkpoint that both come from"]
    assert any("F16, other bytes" in text for text in rows["blocks 0-1"])


def test_each_weight_that_differs_is_listed_if_asked(folder: Path) -> None:
    words = ("inspect", "a.safetensors", "q.safetensors", "--tensors")
    changes = here(*words, cwd=folder).result["changes"]
    name = "blocks.0.attn.qkv.weight"
    assert {"name": name, "kind": "stored otherwise"}.items() <= next(c for c in changes if c["name"] == name).items()
    assert f"{name} " in here(*words, "--text", cwd=folder).out
    assert "changes" not in here(*words[:-1], cwd=folder).result


def test_how_far_weights_are_apart(folder: Path) -> None:
    values = here("inspect", "a.safetensors", "q.safetensors", "--values", cwd=folder).result["values"]
    assert 0.05 < values["experts"]["relative"] < 0.2, "of four bits"
    assert values["experts"]["weights"] == 2 * 2 * 3 and set(values["experts"]["blocks"]) == {"0", "1"}
    assert values["modulation"]["relative"] == 0
    rows = table("a.safetensors", "q.safetensors", "--values", cwd=folder)
    assert any(text.startswith("routed experts 0.") for text in rows["|B - A| / |A|"])
    assert here("inspect", "a.safetensors", "q.safetensors", cwd=folder).result["values"] is None


def test_differences_end_in_exit_code_6_only_if_they_are_not_allowed(folder: Path) -> None:
    assert here("inspect", "a.safetensors", "p.safetensors", cwd=folder).code == 0
    outcome = here("inspect", "a.safetensors", "p.safetensors", "--same", cwd=folder)
    assert outcome.code == 6 and not outcome.result["same"]
    assert "--same" in outcome.err.splitlines()[-1] and "weights differ" in outcome.err.splitlines()[-1]


def test_verifying_both_finds_what_hashes_hide(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "a.safetensors").read_bytes())
    name = "blocks.1.moe.gate.weight"
    data[read_safetensors_header(folder / "a.safetensors").tensors[name].start] ^= 1
    (tmp_path / "c.safetensors").write_bytes(data)
    words = ("inspect", folder / "a.safetensors", "c.safetensors")
    assert here(*words, cwd=tmp_path).result["same"]
    outcome = here(*words, "--verify", cwd=tmp_path)
    assert outcome.code == 3 and f"'{name}'" in outcome.err.splitlines()[-1]
    document = json.loads(outcome.out)
    assert document["checkpoint"] is None and not document["result"]["same"]
    assert [each["sound"] for each in document["result"]["verified"]] == [True, False]
    whole = here("inspect", "a.safetensors", "q.safetensors", "--verify", cwd=folder).result
    assert whole["compared_by"] == {"a": ["bytes"], "b": ["bytes"]} and whole["relation"] == "ancestor"


def test_heads_that_one_file_does_not_tell_are_unknown(folder: Path) -> None:
    model = make_pico(sampler="rf", in_channels=1, dtype=torch.float16)
    without_metadata(model.state, folder / "f.safetensors")
    result = here("inspect", "f.safetensors", "a.safetensors", cwd=folder).result
    assert result["configuration"]["num_heads"] == {"a": None, "b": 2} and result["differing"] == 0
    assert table("f.safetensors", "a.safetensors", cwd=folder)["num_heads"] == ["unknown | 2"]
    told = ("--heads", 2, "--num-classes", 3, "--top-k", 2, "--sampler", "rf")
    assert here("inspect", "f.safetensors", "a.safetensors", *told, "--same", cwd=folder).result["same"]


def test_the_pipe_goes_on_with_both(folder: Path) -> None:
    outcome = here("inspect", "a.safetensors", "p.safetensors", cwd=folder)
    assert outcome.envelope["original"] == str(folder / "a.safetensors")
    assert outcome.path == folder / "p.safetensors"


def test_options_of_two_need_two_and_three_are_refused(folder: Path) -> None:
    for option in ("--values", "--same"):
        assert option in here("inspect", "a.safetensors", option, cwd=folder).error(2)
    three = here("inspect", "a.safetensors", "p.safetensors", "q.safetensors", cwd=folder)
    assert three.code == 2 and "q.safetensors" in three.err
    assert "absent" in here("inspect", "a.safetensors", "absent", cwd=folder).error(3)
