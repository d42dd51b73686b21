"""Candidates of a mix: which weights may take which formats, floors, ties and protected groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compressing import opened, quantised
from conftest import make_pico

from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats, ties
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pico = make_pico(hidden=64, heads=2, input_size=4, widths=((64, 32, 64, 96), (64,) * 4))
    return opened(pico, tmp_path_factory.mktemp("planner"))


def test_ties_name_decisions_of_their_own() -> None:
    names = [f"blocks.0.moe.experts.{e}.{m}_proj.weight" for e in (0, 1) for m in ("gate", "up", "down")]
    assert len(set(ties(names, ("gate", "up")).values())) == 4
    assert len(set(ties(names, ("gate", "up", "down")).values())) == 2
    assert ties(names, ()) == {name: name for name in names}
    attention = "blocks.0.attn.qkv.weight"
    assert ties([attention], ("gate", "up")) == {attention: attention}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"allowed": ("2", "7")}, "allow 7"),
        ({"floors": {"router": 8}}, "floor router"),
        ({"protected": ("gate",)}, "protect gate"),
        ({"tied": ("gate", "side")}, "tie side"),
        ({"tied": ("gate",)}, "at least two"),
        ({"group_size": 48}, "group_size 48"),
    ],
    ids=str,
)
def test_unknown_names_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(Candidates(), **fields)


def test_floors_that_leave_nothing_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="attn=8"):
        candidate_formats(checkpoint, Candidates(allowed=("2", "3"), floors={"attn": 8}))


def test_what_is_packed_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = quantised(checkpoint, 8, tmp_path / "packed.safetensors")
    with pytest.raises(BadInputError, match="is int8 already"):
        candidate_formats(packed, Candidates())
    with pytest.raises(BadInputError, match="is int8 already"):
        plan_uniform(packed, "nf4")


def test_router_norms_and_tables_are_never_planned(checkpoint: Checkpoint) -> None:
    planned = candidate_formats(checkpoint, Candidates())
    left = {name.split(".")[-2] for name in checkpoint.weights if name not in planned and name.endswith(".weight")}
    assert left == {"gate", "proj", "embedding_table"}  # router, patch embedding, label table
    assert "blocks.0.moe.gate.weight" not in planned and "x_embedder.proj.weight" not in planned


@pytest.mark.parametrize(
    ("target", "shape", "offered"),
    [
        (None, (64, 96), ("int2-g64", "int4-g64", "int8-g64", None)),
        ("compressed-tensors", (64, 96), (None,)),
        ("compressed-tensors", (64, 128), ("int2-g64", "int4-g64", "int8-g64", None)),
        ("sdnq", (64, 96), ("int2-g64", "int4-g64", "int8-g64", None)),
        ("bitsandbytes", (64, 96), ("int8", None)),
        ("bitsandbytes", (64, 128), ("nf4-dq", "nf4", "int8", None)),
    ],
)
def test_a_target_offers_what_it_holds(
    target: str | None, shape: tuple[int, int], offered: tuple[str | None, ...]
) -> None:
    candidates = Candidates(target=target)
    info = TensorInfo("blocks.0.moe.experts.0.down_proj.weight", "F32", shape)
    formats = [fmt for width in ("2", "4", "8", "16") for fmt in candidates.formats_of(width)]
    assert tuple(fmt for fmt in formats if fmt is None or candidates.take(info, fmt)) == offered


def test_a_target_is_an_option_and_part_of_the_name() -> None:
    assert Candidates(target="sdnq").options() == {"target": "sdnq"}
    assert "sdnq" in Candidates(target="sdnq").labels() and not any(Candidates().labels())
    with pytest.raises(UsageError, match="target nobody: choose from upstream"):
        Candidates(target="nobody")


@pytest.mark.parametrize(("target", "width"), [("bitsandbytes", "3"), ("compressed-tensors", "1.58")])
def test_widths_that_a_target_has_no_format_for_are_refused(target: str, width: str) -> None:
    with pytest.raises(UsageError, match=f"allow {width} has no effect with target {target}"):
        Candidates(allowed=("4", width, "16"), target=target)
    assert Candidates(allowed=("4", "1.58", "16"), target="sdnq").formats_of("1.58") == ("ternary-g64",)
