"""Matrices that are trained by updates of low rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from torch import Tensor, nn

from ditmoe_cli.compression.training.low_rank_updates import DOWN, UP, Updates, low_rank_updates
from ditmoe_cli.compression.training.trained_groups import has_low_rank_update, trained_groups
from ditmoe_cli.compression.training.training_loop import Course, Objective, train
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.linear import Linear


def as_it_is(_: str, value: Tensor) -> Tensor:
    return value


def halved(_: str, value: Tensor) -> Tensor:
    return value.bfloat16().float()


def leaves(model: nn.Module, prefix: str, names: list[str]) -> dict[str, Tensor]:
    """Some parameters of a model, recording gradients."""
    return {name: model.get_parameter(name.removeprefix(prefix)).requires_grad_() for name in names}


def layer(rank: int = 3, seed: int = 0, stored: Callable[[str, Tensor], Tensor] = as_it_is) -> tuple[Linear, Updates]:
    """A linear layer of 12 inputs and 10 outputs in a model, and its update."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear(12, 10))
    own = model[0]
    assert isinstance(own, Linear)
    names = ["part.0.weight", "part.0.bias"]
    weights = leaves(model, "part.", names)
    updates = low_rank_updates(model, "part.", weights, {names[0]: rank}, stored, seed)
    assert model[0] is updates.layers[names[0]]
    return own, updates


def updated(pico: Pico, rank: int) -> tuple[DiTMoE, Updates]:
    model = pico.model()
    names = [name for name in pico.state if trained_groups(name)]
    infos = [TensorInfo(name, "F32", tuple(pico.state[name].shape)) for name in names]
    low = {info.name: rank for info in infos if has_low_rank_update(info, rank)}
    return model, low_rank_updates(model, "", leaves(model, "", names), low, as_it_is, 0)


def inputs(model: DiTMoE) -> tuple[Tensor, Tensor, Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(6, config.in_channels, config.input_size, config.input_size, generator=generator)
    return z, torch.linspace(0.1, 0.9, 6), torch.arange(6) % (config.num_classes + 1)


# one layer


def test_an_update_begins_at_nothing() -> None:
    own, updates = layer()
    low = updates.layers["part.0.weight"]
    x = torch.randn(4, 12)
    expected = nn.functional.linear(x, own.weight, own.bias)
    torch.testing.assert_close(low(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(low(x), expected)
    assert torch.equal(low.matrix(), own.weight)


def test_what_is_trained_is_what_is_written() -> None:
    own, updates = layer()
    low = updates.layers["part.0.weight"]
    with torch.no_grad():
        low.up.normal_()
    merged = own.weight + low.up @ low.down
    assert torch.equal(low.matrix(), updates.written()["part.0.weight"]) and not low.matrix().requires_grad
    torch.testing.assert_close(low.matrix(), merged.detach())
    x = torch.randn(2, 3, 12)
    trained = low(x)
    with torch.no_grad():
        judged = low(x)
    torch.testing.assert_close(trained, judged)
    torch.testing.assert_close(judged, nn.functional.linear(x, low.matrix(), own.bias))


def test_what_is_judged_is_rounded_to_what_is_written() -> None:
    own, updates = layer(stored=halved)
    low = updates.layers["part.0.weight"]
    with torch.no_grad():
        low.up.normal_()
        own.bias.add_(1e-4)
        exact = (own.weight + low.up @ low.down).bfloat16().float()
        assert torch.equal(low.matrix(), exact)
        updates.round()
        assert torch.equal(own.bias, own.bias.bfloat16().float()), "what is trained itself is rounded in place"
        x = torch.randn(5, 12)
        torch.testing.assert_close(low(x), nn.functional.linear(x, exact, own.bias))
    assert torch.equal(updates.written()["part.0.weight"], exact)


def test_products_are_of_the_dtype_of_the_tokens() -> None:
    _, updates = layer()
    low = updates.layers["part.0.weight"]
    x = torch.randn(4, 12).bfloat16()
    with torch.no_grad():
        assert low(x).dtype == torch.bfloat16
    out = low(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert low.up.grad is not None and low.up.grad.dtype == torch.float32


def test_only_the_update_and_the_bias_get_gradients() -> None:
    own, updates = layer()
    assert set(updates.trained()) == {f"part.0.weight.{UP}", f"part.0.weight.{DOWN}", "part.0.bias"}
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in updates.trained().values())
    updates.layers["part.0.weight"](torch.randn(4, 12)).square().sum().backward()
    assert own.weight.grad is None and own.bias.grad is not None


def test_values_are_drawn_by_seed_and_name() -> None:
    drawn = [layer(seed=seed)[1].layers["part.0.weight"].down.detach() for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    wide = low_rank_updates(
        (model := nn.ModuleDict({"a": Linear(400, 500), "b": Linear(400, 500)})),
        "",
        leaves(model, "", ["a.weight", "b.weight"]),
        {"a.weight": 50, "b.weight": 50},
        as_it_is,
        0,
    )
    first, second = (each.down.detach() for each in wide.layers.values())
    assert not torch.equal(first, second)
    assert float(first.square().mean()) == pytest.approx(1 / 400, rel=0.03)


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_a_step_changes_a_matrix_as_much_as_if_it_were_trained_itself(rank: int) -> None:
    """The first step of AdamW changes each trained value by the rate; gradients here have random signs."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"a": Linear(256, 200, bias=False)})
    own = model["a"]
    assert isinstance(own, Linear)
    nn.init.normal_(own.weight, std=2.0**-4)
    x, y = torch.randn(300, 256), torch.randn(300, 200)
    updates = low_rank_updates(model, "", leaves(model, "", ["a.weight"]), {"a.weight": rank}, as_it_is, 0)
    judged = iter([2.0, 1.0])
    objective = Objective(300, lambda rows: (model["a"](x[rows]) - y[rows]).square().sum(dim=1), lambda: next(judged))
    course = Course(steps=1, batch=300, rate=0.01, checks=1)
    train(updates.trained(), objective, course, "fitting", stepping=updates.stepping())
    change = float((updates.written()["a.weight"] - own.weight).square().mean().sqrt())
    averaged = 1 - 2 / 11  # of the step, by the averaging of weights behind the first one
    assert change == pytest.approx(0.01 * 2.0**-4 * averaged, rel=0.5)


# a whole model


@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_gradients_of_an_update_are_those_of_its_matrix(pico: Callable[..., Pico], attention: str) -> None:
    """At B = 0 the gradient of B is that of W times Aᵀ, and that of A is 0."""
    made = pico(sampler="rf", in_channels=1, attention=attention)
    model = made.model()
    weights = leaves(model, "", [name for name in made.state if trained_groups(name)])
    model(*inputs(model)).square().mean().backward()
    low_model, updates = updated(made, 4)
    low_model(*inputs(low_model)).square().mean().backward()
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in updates.layers} >= {
        *("gate_proj", "up_proj", "down_proj", "linear", "1", "0"),
        *(("Wqkv", "out_proj") if attention == "flash" else ("qkv", "proj")),
    }
    for name, low in updates.layers.items():
        gradient = weights[name].grad
        if gradient is None:  # of an expert that no token chose
            assert low.up.grad is None
            continue
        assert low.up.grad is not None and low.down.grad is not None and low.layer.weight.grad is None
        torch.testing.assert_close(low.up.grad, gradient @ low.down.detach().T, rtol=1e-3, atol=1e-6)
        assert not low.down.grad.any()
    for name, weight in updates.whole.items():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, weights[name].grad, rtol=1e-3, atol=1e-6)


def test_a_model_of_written_weights_predicts_what_was_judged(pico: Callable[..., Pico]) -> None:
    made = pico(sampler="rf", in_channels=1)
    model, updates = updated(made, 2)
    with torch.no_grad():
        for low in updates.layers.values():
            low.up.normal_(std=0.1)
        judged = model(*inputs(model))
        state = {name.replace(".", "__"): value for name, value in updates.written().items()}
        expected = made.with_state(**state).model()(*inputs(model))
    torch.testing.assert_close(judged, expected, rtol=1e-4, atol=1e-5)
    recorded = model(*inputs(model))
    torch.testing.assert_close(recorded.detach(), expected, rtol=1e-3, atol=1e-4)


def test_routers_tables_vectors_and_small_matrices_are_trained_themselves(pico: Callable[..., Pico]) -> None:
    made = pico(sampler="rf", in_channels=1)
    for rank, small in ((4, False), (7, True)):
        _, updates = updated(made, rank)
        kept = {name.removeprefix("blocks.0.") for name in updates.whole}
        assert {"moe.gate.weight", "y_embedder.embedding_table.weight", "x_embedder.proj.weight"} <= kept
        assert "attn.qkv.bias" in kept and "attn.qkv.weight" not in kept
        assert ("final_layer.linear.weight" in kept) == small, "7 (8 + 32) values are more than 8 · 32"
