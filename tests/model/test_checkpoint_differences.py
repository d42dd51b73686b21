"""What two checkpoints differ in, told by descriptions, hashes and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import applied, opened, pruning, quantising
from conftest import Pico, make_pico
from families import without_metadata
from torch import Tensor

from ditmoe_cli.files.names import MATRICES, in_block, in_expert
from ditmoe_cli.files.reader import SafetensorsReader
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.checkpoint_differences import Change, Differences, Group, Stored, differences, grouped

ROUTER = in_block(0, "moe.gate.weight")
QKV = in_block(1, "attn.qkv.weight")


@pytest.fixture
def model() -> Pico:
    return make_pico(dtype=torch.float16)


def foreign(state: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """A file of another program, without hashes."""
    return open_checkpoint(without_metadata(state, path), num_heads=2)


def changed(model: Pico, **tensors: Tensor | None) -> Pico:
    return model.with_state(**tensors)


def test_a_checkpoint_is_the_same_as_itself_in_any_container(model: Pico, tmp_path: Path) -> None:
    model.save(tmp_path / "one.safetensors")
    shards = open_checkpoint(model.save(tmp_path / "shards", shard_bytes=60_000))
    pickled = open_checkpoint(model.save_pt(tmp_path / "x.pt", num_heads=2), num_heads=2, top_k=2, sampler="ddpm")
    for other, evidence in ((shards, "metadata"), (pickled, "bytes")):
        one = open_checkpoint(tmp_path / "one.safetensors")
        found = differences(one, other)
        assert found.same and found.equal == len(model.state) and not found.changes
        assert found.evidence == {"a": {evidence}, "b": {evidence}}
        assert found.kin.relation == ("same" if evidence == "metadata" else "unknown")
        assert differences(one, other, read=True).evidence == {"a": {"bytes"}, "b": {"bytes"}}
        assert differences(one, other, read=True).kin.relation == "same"


def no_reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    monkeypatch.setattr(SafetensorsReader, "raw", lambda _, name: read.append(name))
    return read


def test_hashes_of_both_are_compared_without_reading(
    model: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = opened(model, tmp_path)
    b = opened(model.with_state(**{ROUTER.replace(".", "__"): model.state[ROUTER] + 1}), tmp_path, "b.safetensors")
    read = no_reading(monkeypatch)
    found = differences(a, b)
    assert [(change.name, change.kind) for change in found.changes] == [(ROUTER, "other bytes")]
    assert not found.same and found.equal == len(model.state) - 1 and not read


@pytest.mark.parametrize("place", [0, -1])
def test_bytes_are_compared_where_hashes_are_unknown(place: int, model: Pico, tmp_path: Path) -> None:
    other = model.state[QKV].clone()
    other.view(-1)[place] += 1
    a, b = (
        foreign(model.state, tmp_path / "a.safetensors"),
        foreign({**model.state, QKV: other}, tmp_path / "b.safetensors"),
    )
    found = differences(a, b)
    assert [(change.name, change.kind) for change in found.changes] == [(QKV, "other bytes")]
    assert found.evidence == {"a": {"bytes"}, "b": {"bytes"}} and found.kin.relation == "unknown"


def test_a_stale_hash_is_found_by_reading(model: Pico, tmp_path: Path) -> None:
    """Where another program changed a tensor and kept the metadata, hashes say what was written."""
    a, b = opened(model, tmp_path), model.save(tmp_path / "b.safetensors")
    data = bytearray(b.read_bytes())
    data[-1] ^= 1
    b.write_bytes(data)
    assert differences(a, open_checkpoint(b)).same
    read = differences(a, open_checkpoint(b), read=True)
    assert len(read.changes) == 1 and not read.same


def test_formats_shapes_and_presence(model: Pico, tmp_path: Path) -> None:
    a = opened(model, tmp_path)
    name = in_expert(0, 1, "up_proj.weight")
    b = applied(a, quantising(a, {name: "nf4", QKV: "int4-g32"}), tmp_path / "b.safetensors")
    found = differences(a, b)
    assert {change.name: (change.kind, change.a, change.b) for change in found.changes} == {
        name: ("stored otherwise", Stored("F16", (64, 32)), Stored("nf4", (64, 32))),
        QKV: ("stored otherwise", Stored("F16", (96, 32)), Stored("int4-g32", (96, 32))),
    }
    assert not found.configuration and found.kin.relation == "ancestor"
    assert found.pairs.keys() == model.state.keys()
    without = foreign({n: t for n, t in model.state.items() if n != "pos_embed"}, tmp_path / "c.safetensors")
    assert [change.kind for change in differences(a, without).changes] == ["only in A"]
    assert [change.kind for change in differences(without, a).changes] == ["only in B"]


def test_equally_quantised_weights_are_compared_by_all_their_parts(model: Pico, tmp_path: Path) -> None:
    a = opened(model, tmp_path)
    packed = applied(a, quantising(a, {QKV: "nf4"}), tmp_path / "p.safetensors")
    again = applied(a, quantising(a, {QKV: "nf4"}), tmp_path / "q.safetensors")
    assert differences(packed, again).same
    other = opened(model.with_state(**{QKV.replace(".", "__"): 2 * model.state[QKV]}), tmp_path, "o.safetensors")
    doubled = applied(other, quantising(other, {QKV: "nf4"}), tmp_path / "r.safetensors")
    assert [change.name for change in differences(packed, doubled).changes] == [QKV], "only their scales differ"


def pruned(a: Checkpoint, keeps: tuple[tuple[int, ...], ...], path: Path) -> Checkpoint:
    return applied(a, pruning(a, keeps), path)


def test_experts_are_compared_with_what_they_were(model: Pico, tmp_path: Path) -> None:
    a = opened(model, tmp_path)
    b = pruned(a, ((1, 3), (0, 2, 3)), tmp_path / "b.safetensors")
    for found, kind in ((differences(a, b), "only in A"), (differences(b, a), "only in B")):
        gone = {(change.name, change.kind) for change in found.changes if ".experts." in change.name}
        assert gone == {
            (in_expert(block, expert, f"{matrix}.weight"), kind)
            for block, expert in ((0, 0), (0, 2), (1, 1))
            for matrix in MATRICES
        }
        assert found.configuration == {"num_experts": (4, [2, 3]) if kind == "only in A" else ([2, 3], 4)}
    found = differences(a, b)
    assert found.kept == (None, ((1, 3), (0, 2, 3)))
    c = pruned(a, ((0, 3), (0, 1)), tmp_path / "c.safetensors")
    siblings = differences(b, c)
    assert siblings.kin.relation == "siblings" and siblings.kept == (((1, 3), (0, 2, 3)), ((0, 3), (0, 1)))
    kinds = {change.name: change.kind for change in siblings.changes if change.name.endswith("up_proj.weight")}
    assert kinds == {
        in_expert(0, 1, "up_proj.weight"): "only in A",
        in_expert(0, 0, "up_proj.weight"): "only in B",
        in_expert(1, 2, "up_proj.weight"): "only in A",
        in_expert(1, 3, "up_proj.weight"): "only in A",
        in_expert(1, 1, "up_proj.weight"): "only in B",
    }


def test_a_file_without_hashes_is_known_as_the_ancestor_by_its_bytes(model: Pico, tmp_path: Path) -> None:
    b = pruned(opened(model, tmp_path), ((1, 3), (0, 2)), tmp_path / "b.safetensors")
    pickled = open_checkpoint(model.save_pt(tmp_path / "a.pt"), num_heads=2, top_k=2, sampler="ddpm")
    found = differences(pickled, b)
    assert found.kin.relation == "ancestor"
    assert found.evidence == {"a": {"bytes"}, "b": {"metadata"}}
    assert {change.kind for change in found.changes if "proj" in change.name} == {"only in A"}


def change(name: str, kind: Any = "other bytes", a: str = "F16", b: str | None = "F16") -> Change:
    return Change(name, kind, Stored(a, (4, 8)), Stored(b, (4, 8)) if b else None)


def matrices(blocks: range, experts: range, **fields: Any) -> list[Change]:
    return [
        change(in_expert(i, e, f"{matrix}.weight"), **fields) for i in blocks for e in experts for matrix in MATRICES
    ]


def test_weights_that_differ_alike_are_one_group() -> None:
    found = grouped(matrices(range(28), range(8), kind="stored otherwise", b="nf4"))
    (group,) = found
    assert group.blocks == ((0, 27),) and group.experts == tuple(range(8)) and len(group.names) == 28 * 8 * 3
    assert set(group.rests) == {f"{matrix}.weight" for matrix in MATRICES}
    assert (group.kind, group.a, group.b) == ("stored otherwise", "F16", "nf4")


def test_runs_of_blocks_are_groups_and_many_runs_are_one() -> None:
    two = grouped([*matrices(range(3), range(2)), *matrices(range(5, 9), range(1, 3))])
    assert [(group.blocks, group.experts) for group in two] == [(((0, 2),), (0, 1)), (((5, 8),), (1, 2))]
    many = grouped([c for i in range(10) for c in matrices(range(i, i + 1), range(i % 3 + 1))])
    assert [(group.blocks, group.experts) for group in many] == [(((0, 9),), None)]
    odd = grouped([c for i in (0, 2, 4, 6, 7) for c in matrices(range(i, i + 1), range(2))])
    assert [(g.blocks, g.experts) for g in odd] == [(((0, 0), (2, 2), (4, 4), (6, 7)), (0, 1))]


def test_other_formats_kinds_and_places_are_other_groups() -> None:
    outside = change("pos_embed")
    found = grouped([*matrices(range(2), range(2)), *matrices(range(2), range(2), kind="stored otherwise", b="nf4")])
    assert [group.kind for group in found] == ["other bytes", "stored otherwise"]
    groups = grouped([outside, change(ROUTER), change(QKV)])
    assert [(group.blocks, group.rests) for group in groups] == [
        (((0, 0),), ("moe.gate.weight",)),
        (((1, 1),), ("attn.qkv.weight",)),
        ((), ("pos_embed",)),
    ]


def test_shapes_that_differ_are_told_by_their_ranges() -> None:
    changes = [
        Change(in_expert(0, e, "up_proj.weight"), "stored otherwise", Stored("F16", (64, 32)), Stored("F16", (w, 32)))
        for e, w in enumerate((24, 96, 48))
    ]
    (group,) = grouped(changes)
    assert (group.a, group.b) == ("F16 64 x 32", "F16 24-96 x 32")
    assert isinstance(group, Group)


def test_every_change_is_in_one_group(model: Pico, tmp_path: Path) -> None:
    a = opened(model, tmp_path)
    found: Differences = differences(pruned(a, ((1, 3), (0, 2, 3)), tmp_path / "b.safetensors"), a)
    names = sorted(name for group in grouped(found.changes) for name in group.names)
    assert names == sorted(change.name for change in found.changes)
