"""Fingerprints follow bytes, names, shapes and configuration, not containers; digests follow values."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.files.fingerprint import canonical_json, digest, fingerprint
from ditmoe_cli.files.provenance import Card, Provenance, Step
from ditmoe_cli.model.checkpoint import open_checkpoint

TEXT = st.text(max_size=8)


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
    hashes = {info.name: sha256(bytes(info.nbytes)).hexdigest() for info in infos}
    forward = fingerprint(infos, hashes, {"a": 1})
    assert forward == fingerprint(reversed(infos), hashes, {"a": 1})
    assert forward != fingerprint(infos[:2], hashes, {"a": 1})
    assert forward != fingerprint(infos, hashes, {"a": 2})
