"""The mixture equals a loop over tokens and slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from torch import Tensor

from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import MoEEvent, SparseMoE


def mixture(pico: Callable[..., Pico], **options: object) -> SparseMoE:
    return pico(**options).model().blocks[0].moe


def swiglu(expert: SwiGLU, u: Tensor) -> Tensor:
    gate = expert.gate_proj.weight @ u
    return expert.down_proj.weight @ (gate * gate.sigmoid() * (expert.up_proj.weight @ u))


def by_hand(moe: SparseMoE, u: Tensor) -> Tensor:
    """What upstream's definition says, one token at a time."""
    out = torch.zeros_like(u)
    expert_of = list(range(len(moe.experts))) if moe.gate.expert_of is None else moe.gate.expert_of.tolist()
    for n in range(u.shape[0]):
        for t in range(u.shape[1]):
            token = u[n, t]
            p = (moe.gate.weight @ token).softmax(dim=0)
            selectable = [row for row in range(len(p)) if expert_of[row] >= 0]
            best = sorted(selectable, key=lambda row: -float(p[row]))[: moe.gate.top_k]
            for row in best:
                out[n, t] += p[row] * swiglu(moe.experts[expert_of[row]], token)
            out[n, t] += swiglu(moe.shared_experts, token)
    return out


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


CASES = {
    "plain": {},
    "top-1": {"top_k": 1},
    "all experts": {"top_k": 4},
    "one expert": {"experts": 1, "top_k": 1},
    "many experts": {"experts": 16},
    "different widths": {"widths": ((8, 1, 40, 100), (8, 8)), "shared_width": 5},
    "ghosts": {"widths": ((8, 16), (8, 8)), "expert_of": ((-1, 0, 1, -1), (0, 1))},
    "merged": {"widths": ((8, 16), (8, 8)), "expert_of": ((1, 0, 0, 0, 1), (0, 1)), "top_k": 3},
    "all merged into one": {"widths": ((8,), (8,)), "expert_of": ((0, 0, 0), (0, 0, 0))},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_the_mixture_equals_a_loop(pico: Callable[..., Pico], case: str, shape: tuple[int, int]) -> None:
    moe, u = mixture(pico, **CASES[case]), tokens(*shape)
    found = moe(u, 0, torch.ones(shape[0], 32), None)
    torch.testing.assert_close(found, by_hand(moe, u), rtol=1e-4, atol=1e-5)


def test_an_expert_that_nobody_chooses_is_not_run(pico: Callable[..., Pico]) -> None:
    moe = mixture(pico)
    moe.gate.weight[2] = 0
    u = tokens(1, 50)
    u = u * torch.sign(u @ moe.gate.weight[0]).unsqueeze(-1)  # row 0 is always above row 2's logit of 0
    moe.gate.weight[1] = moe.gate.weight[3] = moe.gate.weight[0]
    for parameter in moe.experts[2].parameters():
        parameter.fill_(float("nan"))
    assert moe(u, 0, torch.ones(1, 32), None).isfinite().all()


@pytest.mark.parametrize("case", ["plain", "merged", "different widths"])
def test_watchers_see_what_happens(pico: Callable[..., Pico], case: str) -> None:
    moe, u, gamma = mixture(pico, **CASES[case]), tokens(2, 9), tokens(2)
    seen: list[MoEEvent] = []
    out = moe(u, 5, gamma, seen.append)
    assert torch.equal(out, moe(u, 5, gamma, None)), "watching changes nothing"
    (event,) = seen
    assert event.block == 5
    assert torch.equal(event.inputs, u.reshape(-1, 32))
    assert torch.equal(event.gamma, gamma)
    routed = (event.routing.weights.unsqueeze(-1) * event.outputs).sum(dim=1).reshape(u.shape)
    torch.testing.assert_close(out, routed + moe.shared_experts(u))
    for token in (0, 17):
        for slot, expert in enumerate(event.routing.experts[token].tolist()):
            expected = swiglu(moe.experts[expert], event.inputs[token])
            torch.testing.assert_close(event.outputs[token, slot], expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_tokens_does_not_matter(pico: Callable[..., Pico]) -> None:
    moe, u = mixture(pico, **CASES["different widths"]), tokens(1, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    gamma = torch.ones(1, 32)
    torch.testing.assert_close(moe(u[:, order], 0, gamma, None), moe(u, 0, gamma, None)[:, order])
