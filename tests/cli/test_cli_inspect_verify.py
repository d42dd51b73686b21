"""``ditmoe inspect --verify``: all bytes are read, and whatever is not as the files say is named."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Outcome, here, series
from conftest import Pico, make_pico
from families import with_metadata_of, without_metadata

from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.model.checkpoint import open_checkpoint

ROUTER = "blocks.0.moe.gate.weight"


def flip(path: Path, name: str, byte: int = 5) -> None:
    """Change one bit of a tensor in a safetensors file."""
    stored = read_safetensors_header(path).tensors[name]
    flip_at(path, stored.start + byte)


def flip_at(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def refused(outcome: Outcome) -> str:
    """The one error of a checkpoint that is not what was written, whose result names no checkpoint to go on with."""
    assert outcome.code == 3, outcome.err
    document = json.loads(outcome.out)
    assert document["checkpoint"] is None and not document["result"]["verified"]["sound"]
    *_, last = outcome.err.splitlines()
    assert last.startswith("ditmoe: error: ") and "internal" not in last
    return last


def problems(outcome: Outcome) -> list[tuple[str, str]]:
    found: list[dict[str, Any]] = json.loads(outcome.out)["result"]["verified"]["problems"]
    return [(problem["kind"], problem["name"]) for problem in found]


@pytest.mark.parametrize(
    "line",
    [
        "convert x.safetensors -o y.safetensors",
        "convert x.safetensors -o y --dtype bf16",
        "prune x.safetensors --keep 2 --method random --no-refit -o y.safetensors",
        "quantize x.safetensors --uniform --bits 4 -o y",
    ],
)
def test_commands_that_read_damaged_tensors_say_so(model: Pico, tmp_path: Path, line: str) -> None:
    """The output is hashed anew, so that it does not tell any more that the input was damaged."""
    model.save(tmp_path / "x.safetensors")
    assert "warning" not in here(*line.split(), cwd=tmp_path).err
    flip(tmp_path / "x.safetensors", ROUTER)
    outcome = here(*line.split(), "--force", cwd=tmp_path)
    said = [text for text in outcome.err.splitlines() if "warning" in text]
    assert outcome.code == 0 and len(said) == 1
    assert f"x.safetensors: tensor '{ROUTER}' is not what ditmoe wrote" in said[0]


@pytest.fixture
def model() -> Pico:
    return make_pico(sampler="rf", in_channels=1)


def test_what_was_written_is_verified_without_torch(model: Pico, tmp_path: Path) -> None:
    model.save(tmp_path / "x.safetensors")
    model.save(tmp_path / "shards", shard_bytes=60_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    commands = [("inspect", name, "--verify") for name in ("x.safetensors", "shards", "demo:digits")]
    for outcome, heavy in series(commands, tmp_path):
        verified = outcome.result["verified"]
        assert verified["sound"] and not verified["problems"] and not heavy
        assert verified["hashes"] == verified["tensors"] == outcome.result["tensors"]
        assert verified["bytes"] == outcome.result["tensor_bytes"]
        assert verified["fingerprint"] == outcome.result["fingerprint"]
    assert here("inspect", "x.safetensors", cwd=tmp_path).result["verified"] is None


def test_the_fingerprint_as_written_is_that_of_the_bytes(model: Pico, tmp_path: Path) -> None:
    path = model.save(tmp_path / "x.safetensors")
    shown = here("inspect", "x.safetensors", cwd=tmp_path).result["fingerprint"]
    assert shown == open_checkpoint(path).fingerprint
    flip(path, ROUTER)
    assert here("inspect", "x.safetensors", cwd=tmp_path).result["fingerprint"] == shown
    changed = json.loads(here("inspect", "x.safetensors", "--verify", cwd=tmp_path).out)["result"]["verified"]
    assert changed["fingerprint"] == open_checkpoint(path).fingerprint != shown
    without_metadata(model.state, tmp_path / "y.safetensors")
    assert here("inspect", "y.safetensors", "--heads", 2, cwd=tmp_path).result["fingerprint"] is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tensors_that_differ_are_named(count: int, model: Pico, tmp_path: Path) -> None:
    path = model.save(tmp_path / "x.safetensors")
    names = list(model.state)[:count]
    for name in names:
        flip(path, name)
    outcome = here("inspect", "x.safetensors", "--verify", cwd=tmp_path)
    said = refused(outcome)
    assert sorted(problems(outcome)) == sorted(("changed", name) for name in names)
    assert "SHA-256" in said and any(f"'{name}'" in said for name in names)
    assert (f"and {count - 1} more" in said) == (count > 1)
    text = here("inspect", "x.safetensors", "--verify", "--text", cwd=tmp_path)
    assert text.code == 3 and all(f"'{name}'" in text.out for name in names)
    assert "names no checkpoint" in here("convert", cwd=tmp_path, stdin=outcome.out).error(3)


def test_each_shard_is_compared_with_its_own_hashes(model: Pico, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "shards", shard_bytes=60_000)
    for shard in sorted(folder.glob("*.safetensors")):
        before = shard.read_bytes()
        name = next(iter(read_safetensors_header(shard).tensors))
        flip(shard, name)
        outcome = here("inspect", "shards", "--verify", cwd=tmp_path)
        assert problems(outcome) == [("changed", name)] and f"'{name}'" in refused(outcome)
        shard.write_bytes(before)
    assert here("inspect", "shards", "--verify", cwd=tmp_path).code == 0


def test_a_tensor_that_ditmoe_did_not_write_is_named(model: Pico, tmp_path: Path) -> None:
    some = {name: tensor for name, tensor in model.state.items() if name != "pos_embed"}
    source = Pico(model.config, some).save(tmp_path / "some.safetensors")
    with_metadata_of(source, model.state, tmp_path / "x.safetensors")
    outcome = here("inspect", "x.safetensors", "--verify", cwd=tmp_path)
    assert problems(outcome) == [("unrecorded", "pos_embed")] and "'pos_embed'" in refused(outcome)
    assert json.loads(outcome.out)["result"]["fingerprint"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_pico(dtype=dtype)
    model.state[ROUTER][1, 2] = value
    model.save(tmp_path / "x.safetensors")
    model.save_pt(tmp_path / "x.pt")
    without_metadata(model.state, tmp_path / "y.safetensors")
    for file in ("x.safetensors", "x.pt", "y.safetensors"):
        outcome = here("inspect", file, "--heads", 2, "--verify", cwd=tmp_path)
        assert problems(outcome) == [("not finite", ROUTER)] and f"'{ROUTER}'" in refused(outcome)


def test_files_of_other_programs_have_no_hashes_and_are_read(model: Pico, tmp_path: Path) -> None:
    without_metadata(model.state, tmp_path / "x.safetensors")
    words = ("inspect", "x.safetensors", "--heads", 2, "--verify")
    verified = here(*words, cwd=tmp_path).result["verified"]
    assert verified["sound"] and verified["hashes"] == 0 and verified["tensors"] == len(model.state)
    assert "no hashes to compare with" in here(*words, "--text", cwd=tmp_path).out


def test_doubles_are_verified_as_they_are_stored(tmp_path: Path) -> None:
    model = make_pico(dtype=torch.float64)
    path = model.save(tmp_path / "x.safetensors")
    outcome = here("inspect", "x.safetensors", "--verify", cwd=tmp_path)
    assert outcome.result["verified"]["hashes"] == len(model.state)
    assert outcome.result["verified"]["fingerprint"] == open_checkpoint(path).fingerprint
    assert outcome.result["fingerprint"] is None, "that of the values in fp32 is not in the metadata"
    flip(path, ROUTER)
    assert problems(here("inspect", "x.safetensors", "--verify", cwd=tmp_path)) == [("changed", ROUTER)]


@pytest.mark.parametrize("container", ["bare", "train", "deepspeed"])
def test_archives_are_compared_with_their_checksums(container: str, model: Pico, tmp_path: Path) -> None:
    path = model.save_pt(tmp_path / "x.pt", container, num_heads=2)
    file = path / "global_step7" / "mp_rank_00_model_states.pt" if container == "deepspeed" else path
    outcome = here("inspect", "x.pt", "--heads", 2, "--verify", cwd=tmp_path)
    verified = outcome.result["verified"]
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        largest = max(members, key=lambda member: member.file_size)
    assert verified["sound"] and verified["archive_members"] == len(members)
    assert verified["fingerprint"] == open_checkpoint(path, num_heads=2).fingerprint
    flip_at(file, largest.header_offset + largest.file_size // 2 // 64 * 64 + 64)
    damaged = here("inspect", "x.pt", "--heads", 2, "--verify", cwd=tmp_path)
    assert ("damaged", largest.filename) in problems(damaged)
    assert repr(largest.filename) in refused(damaged) and "CRC-32" in refused(damaged)


def test_archives_without_checksums_and_old_pickles_are_read(model: Pico, tmp_path: Path) -> None:
    from torch.serialization import set_crc32_options

    set_crc32_options(False)
    try:
        model.save_pt(tmp_path / "x.pt")
    finally:
        set_crc32_options(True)
    model.save_pt(tmp_path / "old.pt", legacy=True)
    for file in ("x.pt", "old.pt"):
        verified = here("inspect", file, "--heads", 2, "--verify", cwd=tmp_path).result["verified"]
        assert verified["sound"] and verified["archive_members"] == 0
        assert "no hashes" in here("inspect", file, "--heads", 2, "--verify", "--text", cwd=tmp_path).out


def told_by(field: str, value: object) -> Callable[[Pico, Path], Path]:
    """Write a checkpoint whose metadata say something else of its configuration than its tensors."""

    def write(model: Pico, path: Path) -> Path:
        return model.save(path, provenance=Provenance({**model.config.to_json(), field: value}))

    return write


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", 8), ("depth", 3), ("expert_width", [64, 32]), ("null_class", False), ("input_size", 16)],
)
def test_a_configuration_that_the_tensors_contradict_is_named(
    field: str, value: object, model: Pico, tmp_path: Path
) -> None:
    told_by(field, value)(model, tmp_path / "x.safetensors")
    outcome = here("inspect", "x.safetensors", "--verify", cwd=tmp_path)
    assert problems(outcome) == [("configuration", field)]
    assert field in refused(outcome)


def test_settings_that_were_asked_for_are_no_contradiction(model: Pico, tmp_path: Path) -> None:
    model.save(tmp_path / "x.safetensors")
    assert here("inspect", "x.safetensors", "--top-k", 1, "--verify", cwd=tmp_path).code == 0


def test_what_stands_beside_shards_is_compared_with_them(model: Pico, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "shards", shard_bytes=60_000)
    index = next(folder.glob("*.index.json"))
    whole = json.loads(index.read_text())
    name, file = next(iter(whole["weight_map"].items()))
    other = next(found for found in whole["weight_map"].values() if found != file)
    changes: dict[str, dict[str, Any]] = {
        "another shard": {**whole, "weight_map": {**whole["weight_map"], name: other}},
        "absent": {**whole, "weight_map": {**whole["weight_map"], "absent": file}},
        "not listed": {**whole, "weight_map": {k: v for k, v in whole["weight_map"].items() if k != name}},
    }
    for document in changes.values():
        index.write_text(json.dumps(document))
        outcome = here("inspect", "shards", "--verify", cwd=tmp_path)
        if outcome.out:
            assert [kind for kind, _ in problems(outcome)] == ["index"]
            assert index.name in refused(outcome)
        else:
            assert index.name in outcome.error(3)
    index.write_text(json.dumps({**whole, "metadata": {"total_size": 5}}))
    assert "total_size 5" in refused(here("inspect", "shards", "--verify", cwd=tmp_path))
    index.write_text(json.dumps(whole))
    assert here("inspect", "shards", "--verify", cwd=tmp_path).code == 0
    assert here("inspect", f"shards/{index.name}", "--verify", cwd=tmp_path).code == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_heads": 4}))
    outcome = here("inspect", "shards", "--verify", cwd=tmp_path)
    assert ("configuration", "num_heads") in problems(outcome) and "config.json" in refused(outcome)


def test_a_pipe_goes_on_from_what_was_verified(model: Pico, tmp_path: Path) -> None:
    model.save(tmp_path / "x.safetensors")
    outcome = here("inspect", "x.safetensors", "--verify", cwd=tmp_path)
    assert here("convert", "-o", "y.safetensors", cwd=tmp_path, stdin=outcome.out).code == 0
    assert (
        here("inspect", "y.safetensors", "--verify", cwd=tmp_path).result["fingerprint"]
        == outcome.result["fingerprint"]
    )


def test_tensors_of_another_model_are_verified_where_they_are_listed(tmp_path: Path) -> None:
    without_metadata({"conv.weight": torch.tensor([[1.0, float("nan")]])}, tmp_path / "x.safetensors")
    outcome = here("inspect", "x.safetensors", "--tensors", "--verify", cwd=tmp_path)
    assert problems(outcome) == [("not finite", "conv.weight")] and "'conv.weight'" in refused(outcome)
    assert "not a DiT-MoE" in here("inspect", "x.safetensors", "--verify", cwd=tmp_path).error(3)
    without_metadata({"conv.weight": torch.ones(2, 3)}, tmp_path / "y.safetensors")
    verified = here("inspect", "y.safetensors", "--tensors", "--verify", cwd=tmp_path).result["verified"]
    assert verified["sound"] and verified["bytes"] == 24 and verified["fingerprint"] is None
    assert here("inspect", "y.safetensors", "--tensors", cwd=tmp_path).result["verified"] is None
