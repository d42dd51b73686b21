"""Routing: softmax over all rows, top-k, not renormalised; ghosts and shared experts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.router import Router, Routing

WIDTH = 6


def router(rows: int, top_k: int, expert_of: list[int] | None = None, seed: int = 0) -> Router:
    made = Router(WIDTH, BlockConfig(rows, (), 0, expert_of is not None), top_k).requires_grad_(False)
    made.weight.copy_(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)))
    if expert_of is not None:
        made.expert_of = torch.tensor(expert_of, dtype=torch.int32)
    return made


def tokens(count: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def as_dense(routing: Routing, experts: int) -> torch.Tensor:
    """(T, experts): the summed weight that each expert gets."""
    dense = torch.zeros(len(routing.weights), experts)
    return dense.scatter_add_(1, routing.experts, routing.weights)


@given(rows=st.integers(1, 9), top_k=st.integers(1, 9), seed=st.integers(0, 99))
def test_weights_are_the_softmax_and_are_not_renormalised(rows: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, rows)
    gate, u = router(rows, top_k, seed=seed), tokens()
    found = gate(u)
    logits = torch.stack([gate.weight @ token for token in u])
    expected = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.probabilities, expected)
    ranked = expected.sort(dim=1, descending=True)
    torch.testing.assert_close(found.weights, ranked.values[:, :top_k])
    assert torch.equal(found.experts, ranked.indices[:, :top_k])
    assert torch.equal(found.rows, found.experts)
    if top_k < rows:
        assert found.weights.sum(dim=1).mean() < 1


@given(rows=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_ghosts_leave_the_survivors_weights_exactly_as_they_were(rows: int, seed: int, data: st.DataObject) -> None:
    ghosts = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    top_k = data.draw(st.integers(1, rows - len(ghosts)))
    survivors = [row for row in range(rows) if row not in ghosts]
    expert_of = [survivors.index(row) if row in survivors else -1 for row in range(rows)]
    full, ghosted = router(rows, rows, seed=seed)(tokens()), router(rows, top_k, expert_of, seed=seed)(tokens())
    assert torch.equal(ghosted.probabilities, full.probabilities)
    assert not torch.isin(ghosted.rows, torch.tensor(sorted(ghosts))).any()
    assert torch.equal(ghosted.weights, full.probabilities.gather(1, ghosted.rows))
    assert torch.equal(torch.tensor(expert_of)[ghosted.rows], ghosted.experts)
    best = full.probabilities[:, survivors].sort(dim=1, descending=True).values[:, :top_k]
    assert torch.equal(ghosted.weights, best)


def test_slicing_raises_every_survivor() -> None:
    """What ghosts are there to avoid: with a row gone the softmax shares its mass among the others."""
    full = router(5, 5)
    sliced = router(4, 4)
    sliced.weight.copy_(full.weight[:4])
    before, after = as_dense(full(tokens()), 5)[:, :4], as_dense(sliced(tokens()), 4)
    assert (after > before).all()
    torch.testing.assert_close(after, before / before.sum(dim=1, keepdim=True))


@given(seed=st.integers(0, 99), data=st.data())
def test_rows_that_share_an_expert_each_take_a_slot_and_add(seed: int, data: st.DataObject) -> None:
    rows, experts = 6, data.draw(st.integers(1, 4))
    expert_of = data.draw(st.lists(st.integers(0, experts - 1), min_size=rows, max_size=rows))
    top_k = data.draw(st.integers(1, rows))
    plain, merged = router(rows, top_k, seed=seed)(tokens()), router(rows, top_k, expert_of, seed=seed)(tokens())
    assert torch.equal(merged.rows, plain.rows)
    assert torch.equal(merged.weights, plain.weights)
    by_row = as_dense(plain, rows)
    expected = torch.zeros(len(by_row), experts)
    for row, expert in enumerate(expert_of):
        expected[:, expert] += by_row[:, row]
    torch.testing.assert_close(as_dense(merged, experts), expected)


def test_the_identity_map_changes_nothing() -> None:
    plain, mapped = router(5, 2)(tokens()), router(5, 2, [0, 1, 2, 3, 4])(tokens())
    assert torch.equal(plain.experts, mapped.experts)
    assert torch.equal(plain.weights, mapped.weights)


def test_a_ghost_is_passed_over_however_likely_it_is() -> None:
    gate = router(3, 2, [-1, 0, 1])
    gate.weight.zero_()
    gate.weight[0] = 100.0  # row 0 takes all the mass; the others' probabilities underflow to 0
    found = gate(torch.ones(4, WIDTH))
    assert torch.equal(found.experts.sort(dim=1).values, torch.tensor([[0, 1]] * 4))
    assert torch.equal(found.weights, torch.zeros(4, 2))
