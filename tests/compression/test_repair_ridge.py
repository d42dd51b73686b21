"""Ridge regression from sums: against dense algebra, and where there is nothing to learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.compression.repair.ridge import Normal, fit


def rows(seed: int, n: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator) for width in widths]


def sums_of(parts: list[Tensor], targets: Tensor, weights: Tensor) -> Normal:
    found = Normal.empty(sum(part.shape[1] for part in parts), targets.shape[1], torch.device("cpu"))
    for start in range(0, len(targets), 7):
        some = slice(start, start + 7)
        found.add([part[some] for part in parts], targets[some], weights[some])
    return found


@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_sums_in_parts_are_those_of_the_whole(seed: int, widths: list[int]) -> None:
    *parts, targets = rows(seed, 20, *widths, 3)
    for index, part in enumerate(parts):
        part[index::2] = 0  # rows that a part has nothing in
    weights = torch.rand(20, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = sums_of(parts, targets, weights)
    p, w = torch.cat(parts, dim=1).double(), weights.double().unsqueeze(1)
    torch.testing.assert_close(found.whole, p.T @ (w * p), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cross, p.T @ (w * targets), rtol=1e-5, atol=1e-5)
    solution = torch.randn(p.shape[1], 3, dtype=torch.float64)
    direct = float((w * (targets - p @ solution).square()).sum())
    assert found.error(solution) == pytest.approx(direct, rel=1e-4)
    ridge = 0.3 * float(found.whole.diagonal().mean())
    expected = torch.linalg.solve(p.T @ (w * p) + ridge * torch.eye(p.shape[1]), p.T @ (w * targets))
    torch.testing.assert_close(found.solve(0.3), expected, rtol=1e-3, atol=1e-4)


def test_a_planted_map_is_found() -> None:
    p, planted, noise = rows(0, 400, 6)[0], torch.randn(6, 3), rows(1, 400, 3)[0]
    ones = torch.ones(400)
    clean = fit(sums_of([p[:300]], p[:300] @ planted, ones[:300]), sums_of([p[300:]], p[300:] @ planted, ones[300:]))
    assert clean is not None and clean.error < 1e-8
    torch.testing.assert_close(clean.solution.float(), planted, rtol=1e-3, atol=1e-3)
    noisy = p @ planted * 0.05 + noise
    found = fit(sums_of([p[:300]], noisy[:300], ones[:300]), sums_of([p[300:]], noisy[300:], ones[300:]))
    assert found is None or found.strength > clean.strength, "noise asks for a stronger ridge"


def test_what_cannot_be_learnt_is_not_fitted() -> None:
    p, unrelated = rows(2, 40, 30, 2)
    ones = torch.ones(40)
    train = sums_of([p], unrelated, ones)
    opposite = sums_of([p], -unrelated, ones)
    assert fit(train, opposite) is None, "held-out rows say the contrary"
    assert fit(train, sums_of([p[:0]], unrelated[:0], ones[:0])) is None, "nothing is held out"


def test_features_of_zeros_and_twins_are_no_harm() -> None:
    p, targets = rows(3, 50, 4, 2)
    ones = torch.ones(50)
    nothing = sums_of([torch.zeros(50, 4)], targets, ones)
    assert not nothing.solve(1e-3).any() and fit(nothing, nothing) is None
    twins = sums_of([p, p], p @ torch.ones(4, 2), ones)
    found = fit(twins, twins)
    assert found is not None and bool(found.solution.isfinite().all()) and found.error < 1e-4
