"""Other routings of a model: the expert of one rank alone, with the weights that the model has, shared with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from torch import Tensor

from ditmoe_cli.model.acceleration import GraphedDiTMoE
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.rerouting import with_one_rank

DOWN = "moe.experts.{}.down_proj.weight"


def predicted(model: object, labels: tuple[int, ...] = (0, 2, 1)) -> Tensor:
    x = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.prepared([0.5], torch.tensor(labels))(x, 0.5)  # type: ignore[attr-defined, no-any-return]


def events(model: DiTMoE) -> list[MoEEvent]:
    seen: list[MoEEvent] = []
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model(x, torch.full((2,), 0.5), torch.tensor([0, 1]), seen.append)
    return seen


@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_go_to_their_expert_of_that_rank_with_its_weight(pico: Callable[..., Pico], rank: int) -> None:
    model = pico(sampler="rf").model()
    whole, alone = events(model)[0], events(with_one_rank(model, rank))[0]  # type: ignore[arg-type]
    kept = slice(rank, rank + 1)
    assert torch.equal(alone.inputs, whole.inputs), "the first block's mixture has the same inputs"
    for name in ("experts", "weights", "rows"):
        assert torch.equal(getattr(alone.routing, name), getattr(whole.routing, name)[:, kept])
    torch.testing.assert_close(alone.outputs, whole.outputs[:, kept])


def test_both_ranks_of_one_block_add_up_to_the_model(pico: Callable[..., Pico]) -> None:
    """Σ_k p_k f_k + f_shared: of a linear sum, both ranks give the whole and the shared expert once more."""
    model = pico(sampler="rf", depth=1).model()
    moe = model.blocks[0].moe
    u = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        first, second = (with_one_rank(model, rank).blocks[0].moe(u, 0, u[:, 0], None) for rank in (0, 1))  # type: ignore[attr-defined]
        torch.testing.assert_close(first + second, moe(u, 0, u[:, 0], None) + moe.shared_experts(u))


def test_where_routed_experts_give_nothing_every_routing_is_the_model(pico: Callable[..., Pico]) -> None:
    zeros = {f"blocks.{b}.{DOWN.format(e)}": torch.zeros(32, 64) for b in range(2) for e in range(4)}
    model = pico(sampler="rf").with_state(**zeros).model()
    for rank in (0, 1):
        torch.testing.assert_close(predicted(with_one_rank(model, rank)), predicted(model))


def test_where_the_second_expert_gives_nothing_the_first_alone_is_the_model(pico: Callable[..., Pico]) -> None:
    """Of tokens whose best expert is 0, where all others give zeros."""
    small = pico(sampler="rf", depth=1)
    model = small.with_state(**{f"blocks.0.{DOWN.format(e)}": torch.zeros(32, 64) for e in (1, 2, 3)}).model()
    u = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        best = model.blocks[0].moe.gate(u[0]).experts[:, 0]
        tokens = u[:, best == 0]
        assert tokens.shape[1] > 5
        found = with_one_rank(model, 0).blocks[0].moe(tokens, 0, tokens[:, 0], None)  # type: ignore[attr-defined]
        torch.testing.assert_close(found, model.blocks[0].moe(tokens, 0, tokens[:, 0], None))


def test_weights_are_shared_and_the_model_stays_as_it_is(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf").model()
    before = predicted(model)
    view = with_one_rank(model, 0)
    assert isinstance(view, DiTMoE) and not view.training
    mine = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in view.parameters()} == mine
    assert torch.equal(predicted(model), before)
    changed = predicted(view)
    model.blocks[0].attn.proj.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert not torch.allclose(predicted(view), changed)


def test_maps_constants_and_residuals_are_those_of_the_model(pico: Callable[..., Pico]) -> None:
    extras = {"constants": 1, "residual_constant": True}
    model = pico(sampler="rf", expert_of=((0, 1, -1, -2),) * 2, widths=((64, 64),) * 2, extras=extras).model()
    view = with_one_rank(model, 1)
    for block, its in zip(view.blocks, model.blocks, strict=True):  # type: ignore[attr-defined]
        assert block.moe.constants is its.moe.constants
        assert block.moe.residual_constant is its.moe.residual_constant
        assert block.moe.gate.expert_of is its.moe.gate.expert_of
    assert not torch.allclose(predicted(view), predicted(model))


def test_graphs_of_both_are_captured_each(pico: Callable[..., Pico]) -> None:
    captures: list[int] = []

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        captures.append(1)
        result = work()
        return lambda: result.copy_(work()), result

    model = pico(sampler="rf").model()
    graphed = GraphedDiTMoE(model, capture)
    view = with_one_rank(graphed, 1)
    assert isinstance(view, GraphedDiTMoE)
    for _ in range(2):
        assert torch.equal(predicted(graphed), predicted(model))
        assert torch.equal(predicted(view), predicted(with_one_rank(model, 1)))
    assert len(captures) == 2


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    with pytest.raises(TypeError, match="object is not in memory as a whole"):
        with_one_rank(object(), 0)  # type: ignore[arg-type]
