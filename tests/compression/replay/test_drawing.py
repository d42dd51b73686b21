"""Draws by importance: how often terms are drawn, what they count for, and that sums are right on average."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.compression.replay import drawing
from ditmoe_cli.compression.replay.drawing import drawn


def test_all_terms_are_drawn_once_where_there_are_no_more_than_draws() -> None:
    found = drawn(torch.tensor([3.0, 0.5, 1e-6, 7.0]), 9)
    assert found.terms.tolist() == [0, 1, 2, 3] and found.factors.tolist() == [1.0] * 4


def test_terms_of_size_0_count_for_nothing() -> None:
    found = drawn(torch.tensor([0.0, 2.0, 0.0, 5.0]), 4)
    assert [(t, f) for t, f in zip(found.terms.tolist(), found.factors.tolist(), strict=True) if f] == [(1, 1), (3, 1)]
    assert drawn(torch.zeros(5), 3).factors.tolist() == [0.0] * 3


def test_terms_are_drawn_in_proportion_to_their_size_and_large_ones_surely() -> None:
    """Sizes 1 to 4 share two draws as 1 : 2 : 3 : 4 of 10, and a term of half of all size is always drawn."""
    found = drawn(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    shares = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8}
    assert found.factors.tolist() == pytest.approx([1 / shares[t] for t in found.terms.tolist()])
    capped = drawn(torch.tensor([1.0, 1.0, 100.0, 1.0, 1.0]), 3)
    assert 2 in capped.terms.tolist()
    assert capped.factors.tolist() == pytest.approx([1.0 if t == 2 else 2.0 for t in capped.terms.tolist()])


def test_sums_are_right_on_average_and_exact_for_the_sizes_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of terms that have little to do with their expected sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes, terms = torch.rand(300, generator=generator) + 0.1, torch.rand(300, generator=generator)
    sums = []
    for seed in range(400):
        monkeypatch.setattr(drawing, "_SEED", seed)
        found = drawn(sizes, 50)
        assert found.terms.tolist() == sorted(found.terms.tolist())
        assert float((sizes[found.terms] * found.factors).sum()) == pytest.approx(float(sizes.sum()), rel=1e-3)
        sums.append(float((terms[found.terms] * found.factors).sum()))
    spread = torch.tensor(sums)
    assert abs(float(spread.mean()) - float(terms.sum())) < 4 * float(spread.std()) / 20
