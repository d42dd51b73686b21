"""Trained tensors in models: predictions before training, gradients, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import with_slow
from compressing import network, opened
from conftest import Pico, make_pico
from packed import KINDS, same_bytes
from stored_parts import wholly_packed
from torch import Tensor

from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.trained_tensors import TrainedTensor, tensors_to_train
from ditmoe_cli.compression.training.trained_weights import TrainedTensors, rounded_as_stored
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.offload import OffloadedDiTMoE

NAMES = ["x_embedder.proj.weight", "blocks.1.moe.gate.weight", "blocks.0.moe.experts.2.up_proj.weight"]
CPU = torch.device("cpu")


def trained(checkpoint: Checkpoint, *groups: str, codes: bool = False) -> TrainedTensors:
    return TrainedTensors(checkpoint, tensors_to_train(checkpoint, groups or GROUPS, codes))


def plain(checkpoint: Checkpoint, names: list[str]) -> TrainedTensors:
    weights = {name: checkpoint.weights[name] for name in names}
    return TrainedTensors(
        checkpoint, {n: TrainedTensor(weight, None, weight.info.numel) for n, weight in weights.items()}
    )


def predicted(model: DiTMoE) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    config = model.config
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size, generator=generator)
    out: Tensor = model(x, torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 1, 2]))
    return out


def with_differences(pico: Pico) -> Pico:
    """The pico with up projections stored as differences: of low rank in block 0, ternary elsewhere."""
    state = dict(pico.state)
    generator = torch.Generator().manual_seed(4)
    for name, matrix in pico.state.items():
        if ".experts." in name and name.endswith("up_proj.weight"):
            block, _, expert = name.split(".")[1], *name.split(".")[3:5]
            del state[name]
            base = state.setdefault(f"blocks.{block}.moe.base.up_proj.weight", matrix.clone())
            rows, columns = matrix.shape
            if block == "0":
                state[f"{name}.delta_left"] = 0.1 * torch.randn(rows, 2, generator=generator)
                state[f"{name}.delta_right"] = torch.randn(2, columns, generator=generator)
            else:
                count = -(-base.numel() // 5)
                state[f"{name}.delta_ternary"] = torch.randint(243, (count,), generator=generator).to(torch.uint8)
                state[f"{name}.delta_scale"] = torch.tensor(0.02 * (int(expert) + 1))
    return Pico(pico.config, state)


PICOS = {
    **{fmt: lambda fmt=fmt: wholly_packed(make_pico(), fmt) for fmt in KINDS},
    "differences": lambda: with_differences(make_pico()),
}
SOME = with_slow(sorted(PICOS, key=lambda kind: kind not in ("nf4", "int4-g64", "differences")), quick=3)


def test_the_weights_that_are_named_record_gradients_and_no_others(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf")
    checkpoint = opened(pico, tmp_path)
    model = network(checkpoint)
    weights = plain(checkpoint, NAMES).in_model(model)
    assert list(weights) == NAMES
    assert all(weight.is_leaf for weight in weights.values())
    z, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 1.0]), torch.tensor([0, 1, 2])
    torch.testing.assert_close(model(z, t, y).detach(), pico.model()(z, t, y))
    model(z, t, y).square().sum().backward()
    recording = {name for name, value in model.named_parameters() if value.grad is not None}
    assert recording == set(NAMES)
    assert all(weights[name].grad is not None for name in NAMES)
    with torch.no_grad():
        weights[NAMES[0]].zero_()
    assert not torch.equal(model(z, t, y), pico.model()(z, t, y)), "they are the model's own"


def test_weights_of_a_block_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = opened(make_pico(sampler="rf"), tmp_path)
    block = network(checkpoint).blocks[1]
    assert list(plain(checkpoint, NAMES).in_model(block, "blocks.1.")) == ["blocks.1.moe.gate.weight"]


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    checkpoint = opened(make_pico(sampler="rf", dtype=torch.float16), tmp_path)
    model = build_model(checkpoint, CPU, torch.bfloat16)
    weights = plain(checkpoint, [*NAMES, "blocks.0.attn.qkv.weight"]).in_model(model)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {weight.dtype for name, weight in model.named_parameters() if "experts.3" in name} == {torch.bfloat16}


def test_rounding_is_that_of_what_is_written() -> None:
    weights = {"a": torch.tensor([1.0001, 3.0], requires_grad=True), "b": torch.tensor([1.0001], requires_grad=True)}
    rounded_as_stored(weights, lambda name, value: value.half().float() if name == "a" else value)
    assert weights["a"].tolist() == [1.0, 3.0]
    assert weights["b"].tolist() == [torch.tensor(1.0001).item()]
    assert weights["a"].is_leaf
    assert weights["a"].requires_grad


@pytest.mark.parametrize("kind", SOME)
def test_predictions_before_training_are_those_of_the_checkpoint(kind: str, tmp_path: Path) -> None:
    """Of a whole model, and of a block in memory; those of layers that are not trained too."""
    checkpoint = open_checkpoint(PICOS[kind]().save(tmp_path / "x.safetensors"))
    model = build_model(checkpoint, CPU)
    with torch.no_grad():
        before = predicted(model)
        weights = trained(checkpoint, "router", "experts").in_model(model)
        torch.testing.assert_close(predicted(model), before, rtol=1e-5, atol=1e-5)
    assert set(weights) == set(tensors_to_train(checkpoint, ["router", "experts"]))
    offloaded = OffloadedDiTMoE(checkpoint, CPU)
    x, c = torch.randn(3, model.config.num_patches, model.config.hidden_size), torch.randn(3, model.config.hidden_size)
    with torch.no_grad(), offloaded.resident(1) as block:
        before = block(x, c, 1, None)
        own = trained(checkpoint).in_model(block, "blocks.1.")
        torch.testing.assert_close(block(x, c, 1, None), before, rtol=1e-5, atol=1e-5)
    assert set(own) == {name for name in tensors_to_train(checkpoint, GROUPS) if name.startswith("blocks.1.")}


@pytest.mark.parametrize("kind", SOME)
def test_gradients_reach_every_trained_tensor(kind: str, tmp_path: Path) -> None:
    """Also through packed layers that are not trained, which unpack into memory that others have used."""
    checkpoint = open_checkpoint(PICOS[kind]().save(tmp_path / "x.safetensors"))
    for groups in (GROUPS, ("embedders",)):
        model = build_model(checkpoint, CPU)
        weights = trained(checkpoint, *groups).in_model(model)
        predicted(model).square().sum().backward()  # type: ignore[no-untyped-call]
        missing = {name for name, value in weights.items() if value.grad is None or not bool(value.grad.any())}
        assert not {name for name in missing if ".experts." not in name}, "experts may be chosen by no token"
        assert len(missing) < len(weights) / 4


@pytest.mark.parametrize("kind", SOME)
def test_what_is_written_predicts_what_was_judged(kind: str, tmp_path: Path) -> None:
    pico = PICOS[kind]()
    checkpoint = open_checkpoint(pico.save(tmp_path / "x.safetensors"))
    model, tensors = build_model(checkpoint, CPU), trained(checkpoint, codes=True)
    weights = tensors.in_model(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in weights.values():
            value.add_(0.1 * value.std(correction=0).clamp_min(0.3) * torch.randn(value.shape, generator=generator))
    rounded_as_stored(weights, tensors.rounded)
    state = {**pico.state, **{name: tensors.stored(name, value.detach()) for name, value in weights.items()}}
    assert all(
        state[name].dtype == value.dtype and state[name].shape == value.shape for name, value in pico.state.items()
    )
    other = open_checkpoint(Pico(pico.config, state).save(tmp_path / "y.safetensors"))
    with torch.no_grad():
        expected = predicted(build_model(other, CPU))
        torch.testing.assert_close(predicted(model), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, predicted(build_model(checkpoint, CPU)), rtol=1e-2, atol=1e-2)


def test_values_that_are_not_changed_are_written_as_they_were(tmp_path: Path) -> None:
    pico = wholly_packed(make_pico(), "int3-g32")
    checkpoint = open_checkpoint(pico.save(tmp_path / "x.safetensors"))
    tensors = trained(checkpoint, codes=True)
    for name, value in tensors.in_model(build_model(checkpoint, CPU)).items():
        assert same_bytes(tensors.stored(name, value.detach()), pico.state[name])
        assert torch.equal(tensors.rounded(name, value.detach()), value.detach())


def test_experts_share_the_values_of_their_base(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(with_differences(make_pico()).save(tmp_path / "x.safetensors"))
    model = build_model(checkpoint, CPU)
    weights = trained(checkpoint).in_model(model)
    base = weights["blocks.0.moe.base.up_proj.weight"]
    layers = [expert.up_proj for expert in model.blocks[0].moe.experts]
    assert all(layer.base is base for layer in layers)
    assert trained(checkpoint).size.values == sum(value.numel() for value in weights.values())
