"""The ditmoe metadata and the fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import canonical_json, digest, fingerprint
from ditmoe_cli.files.provenance import CHECKPOINT_SCHEMA, Card, Provenance, Step, check_schema, read_provenance
from ditmoe_cli.model.checkpoint import open_checkpoint

TEXT = st.text(max_size=8)
PROVENANCES = st.builds(
    Provenance,
    st.dictionaries(TEXT, st.integers() | TEXT | st.lists(st.integers(), max_size=3), max_size=4),
    st.lists(st.builds(Step, TEXT, TEXT, TEXT), max_size=3).map(tuple),
    st.builds(Card, st.none() | TEXT, st.integers(1, 255)),
)


@given(provenance=PROVENANCES, hashes=st.dictionaries(TEXT, TEXT, max_size=3))
def test_metadata_round_trips(provenance: Provenance, hashes: dict[str, str]) -> None:
    metadata = provenance.to_metadata(hashes)
    assert metadata["format"] == "pt"
    assert read_provenance(metadata, "x") == provenance
    assert json.loads(metadata["ditmoe"])["tensors"] == hashes


def test_other_peoples_files_have_no_provenance() -> None:
    assert read_provenance({"format": "pt"}, "x") is None


GOOD = json.loads(Provenance({}).to_metadata({})["ditmoe"])


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        canonical_json({**GOOD, "schema": "ditmoe.checkpoint/2"}),
        canonical_json({k: v for k, v in GOOD.items() if k != "config"}),
        canonical_json({**GOOD, "config": 5}),
        canonical_json({**GOOD, "history": [{"unknown": 1}]}),
        canonical_json({**GOOD, "history": None}),
        canonical_json({**GOOD, "card": {"unknown": 1}}),
        canonical_json({**GOOD, "card": "x"}),
    ],
)
def test_malformed_metadata_is_refused_by_file(text: str) -> None:
    with pytest.raises(BadInputError, match=r"x\.safetensors"):
        read_provenance({"ditmoe": text}, "x.safetensors")


def test_schemas_are_checked() -> None:
    document = {"schema": CHECKPOINT_SCHEMA}
    assert check_schema(document, CHECKPOINT_SCHEMA, "x") is document
    for bad in ({}, {"schema": "other/1"}, [document], None):
        with pytest.raises(BadInputError, match=CHECKPOINT_SCHEMA):
            check_schema(bad, CHECKPOINT_SCHEMA, "x")


@given(value=st.dictionaries(TEXT, st.integers() | TEXT))
def test_digest_does_not_see_the_order_of_keys(value: dict[str, Any]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


def test_canonical_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_fingerprint_does_not_depend_on_the_container(pico: Callable[..., Any], tmp_path: Path, attention: str) -> None:
    model = pico(attention=attention, heads=4)
    paths = [
        model.save(tmp_path / "one.safetensors"),
        model.save(tmp_path / "folder"),
        model.save(tmp_path / "shards", shard_bytes=20_000),
        model.save_pt(tmp_path / "bare.pt"),
        model.save_pt(tmp_path / "legacy.pt", legacy=True),
        model.save_pt(tmp_path / "train.pt", "train", num_experts=4),
        model.save_pt(tmp_path / "deepspeed", "deepspeed"),
    ]
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({f"module.{n}": t for n, t in reversed(model.state.items())}, foreign)
    found = {path.name: open_checkpoint(path, num_heads=4).fingerprint for path in [*paths, foreign]}
    assert len(set(found.values())) == 1, found


def test_fingerprint_sees_a_byte_a_name_a_shape_and_the_configuration(pico: Callable[..., Any], tmp_path: Path) -> None:
    model = pico()
    seen = {open_checkpoint(model.save(tmp_path / "a.safetensors"), num_heads=2).fingerprint}
    name = "blocks.1.moe.experts.3.down_proj.weight"
    touched = model.state[name].clone()
    touched.view(torch.uint8)[-1, -1] ^= 1
    changed = model.with_state(**{name: touched})
    seen.add(open_checkpoint(changed.save(tmp_path / "b.safetensors"), num_heads=2).fingerprint)
    seen.add(open_checkpoint(model.save_pt(tmp_path / "c.pt"), num_heads=4).fingerprint)
    seen.add(open_checkpoint(model.save_pt(tmp_path / "d.pt"), num_heads=2, top_k=1).fingerprint)
    assert len(seen) == 4


def test_fingerprint_does_not_see_history_or_card(pico: Callable[..., Any], tmp_path: Path) -> None:
    model = pico()
    steps = (Step("prune", "grandparent", "digest"), Step("quantize", "parent", "digest"))
    other = Provenance(model.config.to_json(), steps, Card("inception", 16))
    one = open_checkpoint(model.save(tmp_path / "a.safetensors"))
    two = open_checkpoint(model.save(tmp_path / "b.safetensors", provenance=other))
    assert one.fingerprint == two.fingerprint
    assert two.provenance() == other
    assert two.card == Card("inception", 16)
    assert two.ancestors == ("grandparent", "parent")
    assert one.ancestors == ()


def test_fingerprint_is_what_its_docstring_says(pico: Callable[..., Any]) -> None:
    infos = pico().infos()[:3]
    content = {info.name: memoryview(bytes(info.nbytes)) for info in infos}
    forward = fingerprint(infos, content.__getitem__, {"a": 1})
    assert forward == fingerprint(reversed(infos), content.__getitem__, {"a": 1})
    assert forward != fingerprint(infos[:2], content.__getitem__, {"a": 1})
    assert forward != fingerprint(infos, content.__getitem__, {"a": 2})
