"""Files of weights whose parts are missing, of another kind, or too many are refused by name, by every command."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from cli_helpers import here
from families import BASE, CHANGES, FAMILIES, MATRIX, Stored, changed, stored_in, with_metadata_of, without_metadata

from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.model.checkpoint import open_checkpoint

COMMANDS = (
    ("inspect",),
    ("convert",),
    ("sample", "--images", 1, "--steps", 1),
    ("quantize", "--uniform", "--bits", 8),
    ("heal", "--original", "whole.safetensors", "--steps", 1),
    ("distill", "--original", "whole.safetensors", "--iterations", 1),
)

stored = cache(stored_in)


def cases() -> Iterator[object]:
    for family in FAMILIES:
        for member in stored(family).members:
            short = member.removeprefix("blocks.0.moe.experts.1.gate_proj.")
            for change in CHANGES:
                yield pytest.param(family, member, change, id=f"{family}-{short}-{change}")


@pytest.mark.parametrize(("family", "member", "change"), list(cases()))
def test_a_wrong_part_is_named(family: str, member: str, change: str, tmp_path: Path) -> None:
    state = dict(stored(family).model.state)
    new = changed(state.pop(member), change)
    path = without_metadata(state if new is None else {**state, member: new}, tmp_path / "x.safetensors")
    if change == "missing" and member.endswith("zero_point"):
        weight = open_checkpoint(path, num_heads=2).weights[MATRIX]
        assert weight.format is not None and "int3-g32-sym" in weight.format, "nothing in such a file tells"
        return
    said = here("inspect", "x.safetensors", cwd=tmp_path).error(3)
    assert "x.safetensors: " in said and f"'{member}'" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_that_the_metadata_lists_has_to_be_there(family: str, tmp_path: Path) -> None:
    whole = stored(family)
    source = whole.model.save(tmp_path / "whole.safetensors")
    assert here("inspect", "whole.safetensors", cwd=tmp_path).code == 0
    for member in whole.members:
        state = {name: tensor for name, tensor in whole.model.state.items() if name != member}
        with_metadata_of(source, state, tmp_path / "x.safetensors")
        said = here("inspect", "x.safetensors", cwd=tmp_path).error(3)
        assert f"'{member}'" in said and "missing" in said, said


@pytest.mark.parametrize("family", FAMILIES)
def test_no_command_takes_a_file_with_a_missing_part(family: str, tmp_path: Path) -> None:
    whole = stored(family)
    source = whole.model.save(tmp_path / "whole.safetensors")
    member = whole.members[-2] if family.startswith("int3") else whole.members[-1]  # its zero points
    state = {name: tensor for name, tensor in whole.model.state.items() if name != member}
    with_metadata_of(source, state, tmp_path / "x.safetensors")
    before = sorted(tmp_path.iterdir())
    for command, *options in COMMANDS:
        assert f"'{member}'" in here(command, "x.safetensors", *options, cwd=tmp_path).error(3), command
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_too_many_is_named(family: str, tmp_path: Path) -> None:
    whole = dict(stored(family).model.state)
    kinds = {member: tensor for other in FAMILIES for member, tensor in stored(other).model.state.items()}
    others = {member for other in FAMILIES for member in stored(other).members} - set(stored(family).members)
    for member in sorted(others - {BASE}):
        if family == "int4-g32-sym" and member.endswith("weight_zero_point"):
            continue  # of which an integer format has some or has none
        without_metadata({**whole, member: kinds[member].clone()}, tmp_path / "x.safetensors")
        said = here("inspect", "x.safetensors", cwd=tmp_path).error(3)
        piece = ".".join(member.split(".")[:-1])  # of which other parts are missing
        assert any(f"'{name}" in said for name in (member, MATRIX, piece)), (member, said)


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_missing_piece_is_named(gap: int, tmp_path: Path) -> None:
    whole: Stored = stored("pieces")
    source = whole.model.save(tmp_path / "whole.safetensors")
    kept = {name: t for name, t in whole.model.state.items() if f"gate_proj.pieces.{gap}." not in name}
    without_metadata(kept, tmp_path / "x.safetensors")
    said = here("inspect", "x.safetensors", cwd=tmp_path).error(3)
    piece = MATRIX.replace(".weight", f".pieces.{gap}.weight")
    assert piece in said or (gap == 2 and in_expert(0, 1, "up_proj.weight") in said), said  # the last leaves no gap
    with_metadata_of(source, kept, tmp_path / "y.safetensors")
    assert piece in here("inspect", "y.safetensors", cwd=tmp_path).error(3)


def test_experts_that_are_narrower_by_a_piece_are_told_by_the_metadata(tmp_path: Path) -> None:
    """Without metadata, an expert whose three matrices all end a piece earlier is a narrower expert."""
    from ditmoe_cli.files.header import TensorInfo
    from ditmoe_cli.formats.registry import pack

    plain = stored("nf4").model
    state = {name: tensor for name, tensor in plain.state.items() if not name.startswith(MATRIX)}
    for matrix in MATRICES:
        name, axis = in_expert(0, 1, f"{matrix}.weight"), "columns" if matrix == "down_proj" else "rows"
        state.pop(name, None)
        shape = (32, 64) if axis == "columns" else (64, 32)
        fmt = f"{axis}:int3-g32*32+int4-g32*32"
        state |= pack(torch.randn(shape), TensorInfo(name, "F16", shape), fmt)
    source = type(plain)(plain.config, state).save(tmp_path / "whole.safetensors")
    assert here("inspect", "whole.safetensors", cwd=tmp_path).result["expert_widths"][0] == [64] * 4
    kept = {name: tensor for name, tensor in state.items() if ".pieces.1." not in name}
    with_metadata_of(source, kept, tmp_path / "x.safetensors")
    assert ".pieces.1.weight" in here("inspect", "x.safetensors", cwd=tmp_path).error(3)


def test_a_prefix_of_names_hides_no_missing_part(tmp_path: Path) -> None:
    whole = stored("int3-g32")
    source = whole.model.save(tmp_path / "whole.safetensors")
    state = {f"model.{name}": tensor for name, tensor in whole.model.state.items()}
    with_metadata_of(source, state, tmp_path / "x.safetensors")
    assert here("inspect", "x.safetensors", cwd=tmp_path).code == 0
    member = next(name for name in whole.members if name.endswith("zero_point"))
    del state[f"model.{member}"]
    with_metadata_of(source, state, tmp_path / "y.safetensors")
    assert f"'{member}'" in here("inspect", "y.safetensors", cwd=tmp_path).error(3)
