"""What a group becomes: exact where the members are the same function, and what each method's formula says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import HIDDEN, WIDTH, moved, tokens_for
from swiglu import neurons_of, outputs_of, random_expert, seeded
from torch import Tensor

from ditmoe_cli.compression.algebra.matching import aligned
from ditmoe_cli.compression.algebra.means import mean_expert
from ditmoe_cli.compression.algebra.neurons import narrowed
from ditmoe_cli.compression.merge import mergemoe
from ditmoe_cli.compression.merge.inputs import MergeTokens
from ditmoe_cli.compression.merge.sub_moe import Subspace
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights

MATRICES = ("gate", "up", "down")
ALIGNING = ("m-smoe", "sub-moe", "uncurl")
MEANS = ("hc-smoe", "average")

every_method = pytest.mark.parametrize("method", MERGES)


def members(count: int, seed: int = 0) -> list[ExpertWeights]:
    return [random_expert(HIDDEN, WIDTH, 10 * seed + j) for j in range(count)]


def assert_same(a: ExpertWeights, b: ExpertWeights, tolerance: float = 1e-5) -> None:
    for name in MATRICES:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def same_to_the_bit(a: ExpertWeights, b: ExpertWeights) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in MATRICES)


def error(
    merged: ExpertWeights, experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens
) -> float:
    """Σ_t (Σ_j g_j)² w ‖Σ_j α_j f_j - f‖²."""
    wanted = sum(share * outputs_of(expert, tokens.inputs) for share, expert in zip(shares, experts, strict=True))
    missing = (wanted - outputs_of(merged, tokens.inputs)).square().sum(dim=1)
    return float((tokens.gates.sum(dim=1) ** 2 * tokens.weights * missing).sum())


@every_method
def test_equal_experts_stay_as_they_are(method: str) -> None:
    expert = random_expert(HIDDEN, WIDTH, 1)
    merged = MERGES[method].merge([expert] * 3, [0.5, 0.2, 0.3], tokens_for(3))
    assert_same(merged, expert)
    assert method == "mergemoe" or same_to_the_bit(merged, expert)


@every_method
def test_a_single_expert_stays_to_the_bit(method: str) -> None:
    expert = random_expert(HIDDEN, WIDTH, 1)
    assert same_to_the_bit(MERGES[method].merge([expert], [1.0], tokens_for(1)), expert)


@pytest.mark.parametrize("method", ALIGNING)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_copies_with_their_neurons_in_another_order_merge_exactly(method: str, seed: int) -> None:
    expert = random_expert(HIDDEN, WIDTH, seed)
    generator = seeded(seed)
    copies = [narrowed(expert, torch.randperm(WIDTH, generator=generator).tolist()) for _ in range(3)]
    merged = MERGES[method].merge(copies, [0.2, 0.5, 0.3], tokens_for(3))
    inputs = torch.randn(20, HIDDEN, generator=generator)
    torch.testing.assert_close(outputs_of(merged, inputs), outputs_of(expert, inputs))
    assert same_to_the_bit(merged, copies[1]), "in the order of the dominant one"


@every_method
def test_experts_that_are_never_selected_weigh_the_same(method: str) -> None:
    experts, tokens = members(3), tokens_for(3)
    merged = MERGES[method].merge(experts, [0.0] * 3, tokens)
    assert_same(merged, MERGES[method].merge(experts, [1 / 3] * 3, tokens))
    assert all(bool(getattr(merged, name).isfinite().all()) for name in MATRICES)


@every_method
def test_widths_have_to_be_equal(method: str) -> None:
    experts = [random_expert(HIDDEN, width, 0) for width in (8, 4, 8)]
    with pytest.raises(BadInputError, match="experts of widths 4 and 8 cannot be merged"):
        MERGES[method].merge(experts, [0.5, 0.2, 0.3], tokens_for(3))


@every_method
def test_members_are_not_written_to(method: str) -> None:
    experts = members(3)
    MERGES[method].merge(experts, [0.5, 0.2, 0.3], tokens_for(3))
    assert all(same_to_the_bit(before, after) for before, after in zip(members(3), experts, strict=True))


@every_method
def test_tokens_are_needed_by_those_that_say_so(method: str) -> None:
    experts, shares = members(2), [0.5, 0.5]
    if MERGES[method].needs_tokens:
        with pytest.raises(BadInputError, match="profile without fast"):
            MERGES[method].merge(experts, shares, None)
    else:
        merged = MERGES[method].merge(experts, shares, None)
        assert same_to_the_bit(merged, MERGES[method].merge(experts, shares, tokens_for(2)))


# means


@pytest.mark.parametrize("method", ["m-smoe", "hc-smoe", "uncurl"])
def test_means_are_weighted_by_frequency(method: str) -> None:
    expert = random_expert(HIDDEN, WIDTH, 0)
    doubled = ExpertWeights(expert.gate * 2, expert.up * 2, expert.down * 2)
    merged = MERGES[method].merge([expert, doubled], [0.75, 0.25], None)
    assert_same(merged, ExpertWeights(expert.gate * 1.25, expert.up * 1.25, expert.down * 1.25))


def test_average_is_not() -> None:
    first, second = members(2)
    merged = MERGES["average"].merge([first, second], [0.9, 0.1], None)
    assert_same(merged, mean_expert([first, second], [0.5, 0.5]))
    torch.testing.assert_close(merged.up, (first.up + second.up) / 2)


@given(
    shares=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None)
def test_the_mean_against_its_formula(shares: list[float], seed: int) -> None:
    experts = [random_expert(2, 3, seed + j) for j in range(len(shares))]
    total = sum(shares)
    weights = [share / total for share in shares] if total else [1 / len(shares)] * len(shares)
    merged = mean_expert(experts, shares)
    for name in MATRICES:
        expected = sum(w * getattr(expert, name).double() for w, expert in zip(weights, experts, strict=True))
        torch.testing.assert_close(getattr(merged, name).double(), expected, rtol=1e-5, atol=1e-5)


# Sub-MoE

SHARES = [0.5, 0.2, 0.3]


def in_subspace(experts: list[ExpertWeights], rank: int, tokens: MergeTokens) -> tuple[ExpertWeights, ExpertWeights]:
    """The mean of aligned experts, and the same in the subspace of a rank that they share."""
    shares = SHARES[: len(experts)]
    members_ = aligned(experts, shares)
    mean = mean_expert(members_, shares)
    return mean, Subspace.shared_by(members_, tokens).projected(mean, rank)


def ranks_of(expert: ExpertWeights) -> set[int]:
    return {int(torch.linalg.matrix_rank(getattr(expert, name), rtol=1e-4)) for name in MATRICES}


def noisy_copies(count: int, noise: float) -> list[ExpertWeights]:
    """Experts of four of their eight neurons in common, of which each has noise of its own in all."""
    common = random_expert(HIDDEN, WIDTH, 7)
    kept = (torch.arange(WIDTH) < 4).float()
    base = ExpertWeights(common.gate * kept[:, None], common.up * kept[:, None], common.down * kept)
    return [moved(base, noise, 50 + j) for j in range(count)]


@pytest.mark.parametrize("tokens", [tokens_for(3), tokens_for(3, count=2)], ids=["many", "few"])
@pytest.mark.parametrize("rank", [WIDTH, 1000])
def test_at_full_rank_the_subspace_is_all(rank: int, tokens: MergeTokens) -> None:
    mean, projected = in_subspace(members(3), rank, tokens)
    assert_same(projected, mean, 1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_subspace_is_the_formula_of_its_paper(rank: int) -> None:
    """U_r Σ_r (Σ_j α_j V_j / Σ α)ᵀ of the members side by side."""
    experts = aligned(members(3), SHARES)
    u, s, vh = torch.linalg.svd(torch.cat([expert.down.T for expert in experts], dim=1), full_matrices=False)
    parts = vh.split(HIDDEN, dim=1)
    merged_v = sum(share * part for share, part in zip(SHARES, parts, strict=True))
    expected = u[:, :rank] @ torch.diag(s[:rank]) @ merged_v[:rank]
    _, projected = in_subspace(members(3), rank, tokens_for(3))
    torch.testing.assert_close(projected.down.T, expected, rtol=1e-4, atol=1e-4)
    assert ranks_of(projected) == {rank}


def test_a_subspace_holds_what_members_share() -> None:
    """Neurons of all members vary in two directions of their own space only, so rank 2 loses nothing."""
    generator = seeded(0)
    basis = torch.randn(WIDTH, 2, generator=generator)
    parts = torch.randn(3, 2, HIDDEN, generator=seeded(7))
    expert = ExpertWeights(basis @ parts[0], basis @ parts[1], (basis @ parts[2]).T)
    _, projected = in_subspace([expert, expert], 2, tokens_for(2))
    assert_same(projected, expert, 1e-4)


def test_whitening_spends_the_rank_on_inputs_that_occur() -> None:
    expert = random_expert(HIDDEN, WIDTH, 3)
    tokens = tokens_for(1, count=200)
    skewed = replace(tokens, inputs=tokens.inputs * torch.tensor([30.0, 10.0, 1.0, 0.1, 0.1, 0.1]))

    def lost(merged: ExpertWeights) -> Tensor:
        out = (merged.gate - expert.gate) @ (skewed.inputs * skewed.importance.sqrt().unsqueeze(1)).T
        return out.square().sum()

    assert lost(in_subspace([expert], 2, skewed)[1]) < 0.1 * lost(in_subspace([expert], 2, tokens)[1])


def test_sub_moe_is_not_m_smoe_and_lies_in_its_subspace() -> None:
    """Noise of the members' own adds up outside of the directions that they share, which held-out tokens show."""
    experts, tokens = noisy_copies(3, 0.3), tokens_for(3, count=400)
    merged = MERGES["sub-moe"].merge(experts, SHARES, tokens)
    plain = MERGES["m-smoe"].merge(experts, SHARES, tokens)
    assert not same_to_the_bit(merged, plain)
    (rank,) = ranks_of(merged)
    assert rank < WIDTH and ranks_of(plain) == {HIDDEN}
    held = tokens.part(tokens.held)
    assert lost_output(merged, experts, held) < lost_output(plain, experts, held)


@given(seed=st.integers(0, 10**6), noise=st.floats(0.0, 2.0))
@settings(max_examples=30, deadline=None)
def test_no_other_rank_is_better_on_held_out_tokens(seed: int, noise: float) -> None:
    experts, tokens = noisy_copies(3, noise), tokens_for(3, count=60, seed=seed)
    held = tokens.part(tokens.held)
    least = lost_output(MERGES["sub-moe"].merge(experts, SHARES, tokens), experts, held)
    for rank in range(1, WIDTH + 1):
        _, projected = in_subspace(experts, rank, tokens.part(~tokens.held))
        # ranks are chosen by sums in another order: among nearly equal ones another may be better by some 1e-3
        assert least <= lost_output(projected, experts, held) * (1 + 1e-2) + 1e-4


def lost_output(merged: ExpertWeights, experts: Sequence[ExpertWeights], tokens: MergeTokens) -> float:
    """Σ_t w ‖Σ_j g_j f_j - (Σ_j g_j) f‖²."""
    wanted = sum(g.unsqueeze(1) * outputs_of(e, tokens.inputs) for g, e in zip(tokens.gates.T, experts, strict=True))
    lost = wanted - tokens.gates.sum(dim=1, keepdim=True) * outputs_of(merged, tokens.inputs)
    return float((tokens.weights * lost.square().sum(dim=1)).sum())


@pytest.mark.parametrize("held", [True, False])
def test_where_none_or_all_tokens_are_held_out_sub_moe_still_merges(held: bool) -> None:
    tokens = tokens_for(3)
    merged = MERGES["sub-moe"].merge(members(3), SHARES, replace(tokens, held=torch.full_like(tokens.held, held)))
    mean = mean_expert(aligned(members(3), SHARES), SHARES)
    assert all(bool(getattr(merged, name).isfinite().all()) for name in MATRICES)
    assert held or same_to_the_bit(merged, mean), "nothing to choose by"


# MergeMoE


@given(seed=st.integers(0, 10**6), count=st.integers(2, 4), tokens=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_least_squares_beat_the_mean_on_their_tokens(seed: int, count: int, tokens: int) -> None:
    experts, shares = members(count, seed), [1 / count] * count
    seen = tokens_for(count, tokens, seed)
    fitted = error(mergemoe.merge(experts, shares, seen), experts, shares, seen)
    mean = error(mean_expert(experts, shares), experts, shares, seen)
    assert fitted <= mean * (1 + 1e-5)
    assert fitted < 0.9 * mean or tokens < WIDTH


def test_experts_that_differ_in_their_down_projection_alone_merge_exactly() -> None:
    first, second, third = members(3)
    experts = [first, replace(first, down=second.down), replace(first, down=third.down)]
    shares = [0.5, 0.2, 0.3]
    merged = mergemoe.merge(experts, shares, tokens_for(3))
    inputs = torch.randn(20, HIDDEN, generator=seeded(5))
    wanted = sum(share * outputs_of(expert, inputs) for share, expert in zip(shares, experts, strict=True))
    torch.testing.assert_close(outputs_of(merged, inputs), wanted, rtol=1e-4, atol=1e-4)


def test_outputs_that_cancel_are_merged_to_nothing() -> None:
    """f and -f, the weights of which have a mean that is far from 0."""
    expert = random_expert(HIDDEN, WIDTH, 0)
    opposite = ExpertWeights(expert.gate, expert.up * 0.5, expert.down * -2.0)
    merged = mergemoe.merge([expert, opposite], [0.5, 0.5], tokens_for(2))
    inputs = torch.randn(20, HIDDEN, generator=seeded(5))
    mean = mean_expert([expert, opposite], [0.5, 0.5])
    assert outputs_of(merged, inputs).norm() < 0.2 * outputs_of(mean, inputs).norm()


@pytest.mark.parametrize("at_once", [3, 4096])
def test_the_down_projection_against_its_formula(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(mergemoe, "_TOKENS", at_once)
    experts, shares, tokens = members(2), [0.75, 0.25], tokens_for(2)
    mean = mean_expert(experts, shares)
    phi = neurons_of(mean, tokens.inputs).double().T
    wanted = sum(s * outputs_of(e, tokens.inputs).double().T for s, e in zip(shares, experts, strict=True))
    importance = torch.diag(tokens.gates.sum(dim=1).square() * tokens.weights).double()
    gram = phi @ importance @ phi.T
    damped = gram + mergemoe.RIDGE * gram.diagonal().mean() * torch.eye(WIDTH)
    down = mean.down.double()
    expected = down + (wanted - down @ phi) @ importance @ phi.T @ torch.linalg.inv(damped)
    merged = mergemoe.merge(experts, shares, tokens)
    torch.testing.assert_close(merged.down.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(merged.gate, mean.gate) and torch.equal(merged.up, mean.up)


def test_tokens_that_do_not_count_change_nothing() -> None:
    experts, shares, tokens = members(2), [0.5, 0.5], tokens_for(2)
    unrouted = MergeTokens(
        torch.full((5, HIDDEN), 1e20), torch.zeros(5, 2), torch.ones(5), torch.zeros(5, dtype=torch.bool)
    )
    weightless = replace(unrouted, gates=torch.ones(5, 2), weights=torch.zeros(5))
    joined = MergeTokens(
        *(
            torch.cat([getattr(part, name) for part in (tokens, unrouted, weightless)])
            for name in ("inputs", "gates", "weights", "held")
        )
    )
    assert_same(mergemoe.merge(experts, shares, joined), mergemoe.merge(experts, shares, tokens))


@pytest.mark.parametrize("count", [0, 3])
def test_without_tokens_that_count_mergemoe_is_the_mean(count: int) -> None:
    experts, shares = members(2), [0.75, 0.25]
    tokens = MergeTokens(torch.ones(count, HIDDEN), torch.zeros(count, 2), torch.ones(count), torch.zeros(count).bool())
    assert same_to_the_bit(mergemoe.merge(experts, shares, tokens), mean_expert(experts, shares))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_tokens_weights_does_not_matter(scale: float) -> None:
    experts, shares, tokens = members(2), [0.75, 0.25], tokens_for(2)
    scaled = replace(tokens, weights=tokens.weights * scale)
    assert_same(mergemoe.merge(experts, shares, scaled), mergemoe.merge(experts, shares, tokens), 1e-4)
