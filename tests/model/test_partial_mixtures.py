"""Mixtures in part: against sums written token by token, and the whole mixture to the bit where nothing is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.model.block_choices import SlotRule
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.partial_mixtures import (
    SlotStatistics,
    left_out,
    mixed_from_before,
    mixed_in_part,
    protected_tokens,
)

TOKENS = 40
MAP = ((0, 1, -2, -1, 1), (1, -3, 0, -2, -1))
EXTENDED = {"widths": ((24, 8), (16, 24)), "expert_of": MAP, "extras": {"constants": 2, "residual_linear": True}}


def mixture(pico: Callable[..., Pico], **asked: object) -> SparseMoE:
    return pico(**asked).model().blocks[0].moe  # type: ignore[return-value]


def tokens(seed: int = 0, width: int = 32) -> Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed))


def whole(moe: SparseMoE, u: Tensor) -> Tensor:
    return moe(u[None], 0, u[None, 0], None)[0]  # type: ignore[no-any-return]


def naive(moe: SparseMoE, u: Tensor, kept: Tensor) -> Tensor:
    """The mixture in which each token adds up the slots that are kept (T, k), and the shared expert."""
    routing = moe.gate(u)
    rows = []
    for token, experts, weights, keeps in zip(u, routing.experts, routing.weights, kept, strict=True):
        total = moe.shared_experts(token[None])[0]
        for e, p, keep in zip(experts.tolist(), weights, keeps, strict=True):
            total = total + (p * moe.expert_outputs(token[None], torch.tensor([[e]]))[0, 0] if keep else 0)
        rows.append(total)
    mixed = torch.stack(rows)
    rest = moe.left_over(u, routing.weights * kept)
    return mixed if rest is None else mixed + rest


@pytest.mark.parametrize("asked", [{}, {"top_k": 3}, EXTENDED, {"attention": "flash", "sampler": "rf"}])
@pytest.mark.parametrize("rule", [None, SlotRule("top-p", 1.0), SlotRule("odp", 0.0), SlotRule("saliency", 0.0)])
def test_a_mixture_without_anything_left_out_is_the_mixture_to_the_bit(
    pico: Callable[..., Pico], asked: dict[str, object], rule: SlotRule | None
) -> None:
    moe, u = mixture(pico, **asked), tokens()
    mixed = mixed_in_part(moe, u, rule, SlotStatistics(energy=torch.ones(8)))
    assert torch.equal(mixed.output, whole(moe, u))
    selected = moe.gate(u).experts
    assert mixed.computed.tolist() == [int((selected == e).sum()) for e in range(len(moe.experts))]


@pytest.mark.parametrize("asked", [{}, {"top_k": 3}, EXTENDED])
@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (SlotRule("top1"), lambda p, _: torch.arange(p.shape[1]).expand(p.shape) < 1),
        (SlotRule("top-p", 0.5), lambda p, _: p.cumsum(1) - p <= 0.5),
        (SlotRule("top-p", 0.0), lambda p, _: torch.arange(p.shape[1]).expand(p.shape) < 1),
        (SlotRule("odp", 0.6), lambda p, _: p >= 0.6 * p[:, :1]),
        (SlotRule("saliency", 0.05), lambda p, energy: p.square() * energy >= 0.05),
    ],
)
def test_slots_that_a_rule_leaves_out_are_neither_added_nor_computed(
    pico: Callable[..., Pico], asked: dict[str, object], rule: SlotRule, kept: Callable[[Tensor, Tensor], Tensor]
) -> None:
    moe, u = mixture(pico, **asked), tokens()
    routing, energy = moe.gate(u), torch.linspace(0.2, 2, 5)
    keeps = kept(routing.weights, energy[routing.rows])
    keeps[:, 0] = True
    assert 0 < int((~keeps).sum()) < keeps.numel()
    mixed = mixed_in_part(moe, u, rule, SlotStatistics(energy=energy))
    assert_close(mixed.output, naive(moe, u, keeps), rtol=1e-4, atol=1e-5)
    assert mixed.computed.tolist() == [int(((routing.experts == e) & keeps).sum()) for e in range(len(moe.experts))]


def test_protected_tokens_keep_their_slots(pico: Callable[..., Pico]) -> None:
    moe, u = mixture(pico), tokens()
    attended = torch.rand(2, TOKENS // 2, generator=torch.Generator().manual_seed(3))
    protected = protected_tokens(attended)
    assert protected.sum(dim=1).tolist() == [1, 1], "2 % of 20 tokens, one at the least"
    assert protected.float().argmax(dim=1).tolist() == attended.argmax(dim=1).tolist()
    dropped = left_out(SlotRule("odp", 1.1), moe.gate(u), SlotStatistics(), protected.reshape(-1))
    assert torch.equal(~dropped.any(dim=1), protected.reshape(-1))


@pytest.mark.parametrize("top_k", [2, 3])
def test_a_regressed_expert_is_the_first_one_scaled_and_shifted(pico: Callable[..., Pico], top_k: int) -> None:
    moe, u = mixture(pico, top_k=top_k), tokens()
    generator = torch.Generator().manual_seed(1)
    scale, constant = (torch.randn(4, 32, generator=generator) for _ in range(2))
    routing = moe.gate(u)
    f = moe.expert_outputs(u, routing.experts[:, :1])[:, 0]
    expected = moe.shared_experts(u) + routing.weights[:, :1] * f
    for slot in range(1, top_k):
        rows = routing.rows[:, slot]
        expected = expected + routing.weights[:, slot : slot + 1] * (scale[rows] * f + constant[rows])
    mixed = mixed_in_part(moe, u, SlotRule("regressed"), SlotStatistics(scale=scale, constant=constant))
    assert_close(mixed.output, expected)
    assert int(mixed.computed.sum()) == TOKENS


def test_rules_that_lack_their_statistics_are_refused(pico: Callable[..., Pico]) -> None:
    moe, u = mixture(pico), tokens()
    with pytest.raises(ValueError, match="energies"):
        mixed_in_part(moe, u, SlotRule("saliency", 0.1))
    with pytest.raises(ValueError, match="coefficients"):
        mixed_in_part(moe, u, SlotRule("regressed"))


def test_without_the_shared_expert_only_routed_ones_are_added(pico: Callable[..., Pico]) -> None:
    moe, u = mixture(pico), tokens()
    assert_close(mixed_in_part(moe, u, shared=False).output + moe.shared_experts(u), whole(moe, u))


@pytest.mark.parametrize("asked", [{}, {"top_k": 3}, EXTENDED])
def test_reused_slots_of_the_same_tokens_are_the_mixture(pico: Callable[..., Pico], asked: dict[str, object]) -> None:
    moe, u = mixture(pico, **asked), tokens()
    kept = mixed_in_part(moe, u, keep=True).kept
    assert kept is not None
    again = mixed_from_before(moe, u, kept)
    assert_close(again.output, whole(moe, u))
    assert int(again.computed.sum()) == 0


def test_only_experts_that_a_token_did_not_choose_before_are_computed(pico: Callable[..., Pico]) -> None:
    moe, before, u = mixture(pico), tokens(), tokens() + 0.4 * tokens(1)
    kept = mixed_in_part(moe, before, keep=True).kept
    assert kept is not None
    old, new = moe.gate(before), moe.gate(u)
    total = moe.shared_experts(before)
    fresh = 0
    for token in range(TOKENS):
        for row, p in zip(new.rows[token], new.weights[token], strict=True):
            reused = bool((old.rows[token] == row).any())
            source = before if reused else u
            fresh += not reused
            total[token] += p * moe.expert_outputs(source[token][None], row.reshape(1, 1))[0, 0]
    assert 0 < fresh < TOKENS
    mixed = mixed_from_before(moe, u, kept)
    assert_close(mixed.output, total, rtol=1e-4, atol=1e-5)
    assert int(mixed.computed.sum()) == fresh
    assert mixed.kept is not None and torch.equal(mixed.kept.rows, new.rows)
