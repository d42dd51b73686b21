"""Weights of models as leaves that are trained."""

from __future__ import annotations

from pathlib import Path

import torch
from compressing import network, opened, quantised
from conftest import make_pico

from ditmoe_cli.compression.training.trained_weights import rounded_as_stored, trainable
from ditmoe_cli.model.loading import build_model

NAMES = ["x_embedder.proj.weight", "blocks.1.moe.gate.weight", "blocks.0.moe.experts.2.up_proj.weight"]


def test_the_weights_that_are_named_record_gradients_and_no_others(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf")
    model = network(opened(pico, tmp_path))
    weights = trainable(model, "", NAMES)
    assert list(weights) == NAMES and all(weight.is_leaf for weight in weights.values())
    z, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 1.0]), torch.tensor([0, 1, 2])
    torch.testing.assert_close(model(z, t, y).detach(), pico.model()(z, t, y))
    model(z, t, y).square().sum().backward()
    recording = {name for name, value in model.named_parameters() if value.grad is not None}
    assert recording == set(NAMES) and all(weights[name].grad is not None for name in NAMES)
    with torch.no_grad():
        weights[NAMES[0]].zero_()
    assert not torch.equal(model(z, t, y), pico.model()(z, t, y)), "they are the model's own"


def test_weights_of_a_block_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    model = network(opened(make_pico(sampler="rf"), tmp_path))
    assert list(trainable(model.blocks[1], "blocks.1.", NAMES)) == ["blocks.1.moe.gate.weight"]


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    checkpoint = opened(make_pico(sampler="rf", dtype=torch.float16), tmp_path)
    model = build_model(checkpoint, torch.device("cpu"), torch.bfloat16)
    names = [*NAMES, "blocks.0.attn.qkv.weight"]
    weights = trainable(model, "", names)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {weight.dtype for name, weight in model.named_parameters() if "experts.3" in name} == {torch.bfloat16}


def test_packed_weights_are_left_out(tmp_path: Path) -> None:
    checkpoint = quantised(opened(make_pico(sampler="rf"), tmp_path), 4, tmp_path / "q.safetensors")
    assert list(trainable(network(checkpoint), "", NAMES)) == NAMES[:2]


def test_rounding_is_that_of_what_is_written() -> None:
    weights = {"a": torch.tensor([1.0001, 3.0], requires_grad=True), "b": torch.tensor([1.0001], requires_grad=True)}
    rounded_as_stored(weights, lambda name, value: value.half().float() if name == "a" else value)
    assert weights["a"].tolist() == [1.0, 3.0] and weights["b"].tolist() == [torch.tensor(1.0001).item()]
    assert weights["a"].is_leaf and weights["a"].requires_grad
