"""Distances of weights against torch's own norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressing import opened, state
from conftest import Pico, make_pico
from families import FAMILIES, MATRIX, stored_in

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import split_name
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.checkpoint_differences import differences
from ditmoe_cli.model.weight_distances import Distance, distances


def measured(a: Checkpoint, b: Checkpoint) -> dict[str, Distance]:
    return distances(a, b, differences(a, b).pairs)


def moved(model: Pico, scale: float) -> Pico:
    generator = torch.Generator().manual_seed(1)
    noise = {n: scale * torch.randn(t.shape, generator=generator) for n, t in model.state.items()}
    return Pico(model.config, {name: tensor + noise[name] for name, tensor in model.state.items()})


def test_distances_are_relative_norms(tmp_path: Path) -> None:
    model = make_pico()
    a, b = opened(model, tmp_path), opened(moved(model, 0.01), tmp_path, "b.safetensors")
    found = measured(a, b)
    x, y = state(a), state(b)
    names = {
        "experts": [name for name in x if ".experts." in name],
        "shared": [name for name in x if "shared_experts" in name],
        "router": [name for name in x if name.endswith("moe.gate.weight")],
        "attn": [name for name in x if "attn." in name and name.endswith(".weight")],
    }
    for group, members in names.items():
        squares = sum(float((y[n] - x[n]).double().square().sum()) for n in members)
        norm = sum(float(x[n].double().square().sum()) for n in members)
        assert found[group].relative == pytest.approx((squares / norm) ** 0.5, rel=1e-5)
        assert found[group].weights == len(members)
        for block in range(model.config.depth):
            own = [n for n in members if split_name(n).block == block]
            expected = sum(float((y[n] - x[n]).double().square().sum()) for n in own)
            expected /= sum(float(x[n].double().square().sum()) for n in own)
            assert found[group].by_block[block] == pytest.approx(expected**0.5, rel=1e-5)
    assert sum(distance.weights for distance in found.values()) == len(model.state)


def test_the_same_weights_are_at_no_distance(tmp_path: Path) -> None:
    a = opened(make_pico(), tmp_path)
    assert {distance.relative for distance in measured(a, a).values()} == {0.0}


def test_weights_that_were_zero_are_at_an_infinite_distance(tmp_path: Path) -> None:
    model = make_pico()
    zero = {name: torch.zeros_like(t) if "moe.gate" in name else t for name, t in model.state.items()}
    a = opened(Pico(model.config, zero), tmp_path)
    assert measured(a, opened(model, tmp_path, "b.safetensors"))["router"].relative is None


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = make_pico()
    a = opened(model, tmp_path)
    model.state["pos_embed"][0, 0, 0] = torch.nan
    with pytest.raises(BadInputError, match="'pos_embed'"):
        measured(a, opened(model, tmp_path, "b.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_measured_whatever_they_are_stored_in(family: str, tmp_path: Path) -> None:
    plain = make_pico(dtype=torch.float16)
    a, b = opened(plain, tmp_path), opened(stored_in(family).model, tmp_path, "b.safetensors")
    found = differences(a, b)
    assert MATRIX in found.pairs
    measured = distances(a, b, {MATRIX: found.pairs[MATRIX]})["experts"]
    weight = b.weights[MATRIX]
    unpacked = weight.unpack({name: b.reader.tensor(name) for name in weight.members}).double()
    original = plain.state[MATRIX].double()
    assert measured.relative == pytest.approx(float((unpacked - original).norm() / original.norm()), rel=1e-5)
