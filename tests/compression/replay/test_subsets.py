"""Replayed errors against closed forms, and against mixtures that are really rebuilt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from compressing import opened
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st
from replaying import error_by_hand, guided_by_hand, mixture, output, plain, reduced, some_tokens
from torch.testing import assert_close

from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.replay import subsets as replay
from ditmoe_cli.compression.replay.subsets import (
    BlockTokens,
    SubsetReplay,
    block_tokens,
    fixed_gate_errors,
    relative_error,
    replay_error,
)
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.profile import RoutingProfile

MODES: tuple[RouterMode, ...] = ("ghost", "slice", "mass")
WIDTHS = (6, 7, 8, 6, 7)
# blocks that may have been compressed before: their configuration and router map
BLOCKS: dict[str, tuple[BlockConfig, tuple[int, ...]]] = {
    "plain": (BlockConfig(5, WIDTHS, 12), ()),
    "ghosts": (BlockConfig(7, WIDTHS, 12, mapped=True), (0, -1, 1, 2, 3, -1, 4)),
    "merged": (BlockConfig(8, WIDTHS, 12, mapped=True), (3, 0, 1, 2, 3, 0, 4, -1)),
    "mass": (BlockConfig(7, WIDTHS, 12, mapped=True, mass=True), (0, -1, 1, 2, 3, -1, 4)),
    "constants": (BlockConfig(7, WIDTHS, 12, mapped=True, constants=2, rank=1), (0, -2, 1, 2, 3, -3, 4)),
    "refitted": (
        BlockConfig(7, WIDTHS, 12, mapped=True, residual_constant=True, residual_linear=True),
        (0, 1, -1, 2, 3, 4, -1),
    ),
}


def test_guided_pairs_by_hand() -> None:
    # the guided error is (3 · 2 · 1 - 2 · 1 · 4, 3 · 1 · 2 - 2 · 5 · 0) = (-2, 6); γ and v of both branches differ
    tokens = BlockTokens(
        inputs=torch.zeros(2, 2),
        gamma=torch.tensor([[2.0, 1.0], [1.0, 5.0]]),
        coefficients=torch.tensor([3.0, -2.0]),
        bins=torch.zeros(2, dtype=torch.int64),
        branches=2,
    )
    error, routed = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert tokens.energy(error) == 40.0
    assert relative_error(tokens, error, routed) == pytest.approx(40 / 13)
    # alone, each token counts for itself
    single = replace(tokens, coefficients=torch.ones(2), branches=1)
    assert single.energy(error) == pytest.approx(2**2 + 2**2 + 4**2)


def test_errors_that_agree_between_branches_count_once() -> None:
    tokens = some_tokens(cfg=4.0)
    same = replace(tokens, gamma=tokens.gamma[: tokens.pairs].repeat(2, 1))
    error = torch.randn(tokens.pairs, 8)
    assert same.energy(error.repeat(2, 1)) == pytest.approx(float((same.gamma[: len(error)] * error).square().sum()))


@given(st.integers(1, 9), st.sampled_from([1, 2]), st.integers(1, 12), st.integers(0, 99))
def test_chunks_keep_pairs_together(pairs: int, branches: int, size: int, seed: int) -> None:
    tokens = some_tokens(pairs, branches, seed=seed)
    values = torch.randn(len(tokens.inputs), 8)
    assert tokens.energy(values) == pytest.approx(float(guided_by_hand(tokens, values).square().sum()), rel=1e-5)
    parts = list(tokens.chunks(size, torch.device("cpu")))
    assert max(part.pairs for part in parts) == min(size, pairs)
    for name in ("inputs", "gamma", "coefficients", "bins"):
        whole = torch.cat([part.paired(getattr(part, name)) for part in parts])
        assert torch.equal(whole, tokens.paired(getattr(tokens, name)))


@contextmanager
def no_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    del title, total
    yield lambda _: None


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RoutingProfile]:
    where = tmp_path_factory.mktemp("profiles")
    checkpoint = opened(make_pico(hidden=16, input_size=4), where)

    def profile(cfg: float = 1.5, reservoir: int = 30, fast: bool = False) -> RoutingProfile:
        spec = SampleSpec(images=3, steps=4, cfg=cfg, seed=1, solver="ddim", classes=(0, 1))
        settings = Calibration(spec, bins=2, reservoir=reservoir, batch=2, fast=fast)
        found = calibrate(checkpoint, settings, Run("cpu", no_bar), where / "p.safetensors", force=True)
        assert found is not None
        return found

    return profile


@pytest.mark.parametrize("cfg", [1.0, 1.5, 0.0])
def test_a_profiles_tokens_come_in_pairs(cfg: float, profiled: Callable[..., RoutingProfile]) -> None:
    profile = profiled(cfg)
    stored = {name: profile.tensor(f"reservoir.{name}") for name in ("state", "branch", "position", "inputs", "gamma")}
    where = {
        key: i
        for i, key in enumerate(zip(*(stored[name].tolist() for name in ("branch", "state", "position")), strict=True))
    }
    first = [key for key in where if key[0] == 0]
    for block in range(2):
        tokens = block_tokens(profile, block)
        assert tokens.branches == (1 if cfg == 1.0 else 2)
        assert (len(tokens.inputs), tokens.pairs) == (len(where), len(first))
        for branch, coefficient in enumerate((cfg, -(cfg - 1))[: tokens.branches]):
            for i, (_, state, position) in enumerate(first, start=branch * tokens.pairs):
                assert torch.equal(tokens.inputs[i], stored["inputs"][block, where[branch, state, position]].float())
                assert torch.equal(tokens.gamma[i], stored["gamma"][block, state, branch])
                assert tokens.bins[i] == profile.tensor("states.bin")[state]
                assert float(tokens.coefficients[i]) == coefficient


def test_a_profile_without_tokens_is_refused(profiled: Callable[..., RoutingProfile]) -> None:
    with pytest.raises(BadInputError, match=r"p\.safetensors: .*profile without --fast"):
        block_tokens(profiled(fast=True), 0)
    with pytest.raises(BadInputError, match="larger --reservoir"):
        block_tokens(profiled(reservoir=0), 0)


@given(st.floats(-1.0, 1.0), st.sampled_from([1, 2]))
def test_the_error_of_scaling_experts_is_the_square_of_the_scale(scale: float, branches: int) -> None:
    tokens, original, changed = some_tokens(branches=branches), plain(), plain()
    for expert in changed.experts:
        expert.down_proj.weight.mul_(1 + scale)
    assert replay_error(tokens, original, changed) == pytest.approx(scale**2, rel=1e-4, abs=1e-9)


def test_a_changed_shared_expert_counts_too() -> None:
    tokens, original, changed = some_tokens(), plain(), plain()
    shared = original.shared_experts(tokens.inputs)
    changed.shared_experts.down_proj.weight.mul_(0.5)
    expected = relative_error(tokens, 0.5 * shared, output(original, tokens) - shared)
    assert replay_error(tokens, original, changed) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("kind", BLOCKS)
@given(keep=st.sets(st.integers(0, 4), min_size=2), top_k=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_a_subsets_error_is_that_of_the_rebuilt_mixture(
    kind: str, branches: int, keep: set[int], top_k: int, seed: int
) -> None:
    config, selects = BLOCKS[kind]
    moe, tokens = mixture(config, top_k, selects, seed), some_tokens(branches=branches, seed=seed)
    subset, subsets = tuple(sorted(keep)), SubsetReplay(tokens, moe)
    for mode in MODES:
        rebuilt = reduced(moe, config, subset, mode)
        (found,) = subsets.errors([subset], mode).tolist()
        assert found == pytest.approx(error_by_hand(tokens, moe, rebuilt), rel=1e-4, abs=1e-9)
        assert replay_error(tokens, moe, rebuilt) == pytest.approx(found, rel=1e-4, abs=1e-9)


def test_mass_by_its_formula() -> None:
    moe, tokens, keep = plain(top_k=2), some_tokens(), (0, 2, 3)
    change = torch.zeros(len(tokens.inputs), 8)
    for i, u in enumerate(tokens.inputs):
        p = (moe.gate.weight @ u).softmax(dim=0)
        before = sorted(range(5), key=lambda e: -float(p[e]))[:2]
        after = sorted(keep, key=lambda e: -float(p[e]))[:2]
        scale = p[before].sum() / p[after].sum()
        change[i] = sum(scale * p[e] * moe.experts[e](u) for e in after) - sum(p[e] * moe.experts[e](u) for e in before)
    routed = output(moe, tokens) - moe.shared_experts(tokens.inputs)
    (found,) = SubsetReplay(tokens, moe).errors([keep], "mass").tolist()
    assert found == pytest.approx(relative_error(tokens, change, routed), rel=1e-4)


def test_many_candidates_and_tokens_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = plain(experts=6), some_tokens(pairs=11)
    subsets = [s for n in (2, 3, 4, 6) for s in itertools.combinations(range(6), n)]
    whole = {mode: SubsetReplay(tokens, moe).errors(subsets, mode) for mode in MODES}
    alone = replay_error(tokens, moe, plain(experts=6, seed=1))
    monkeypatch.setattr(replay, "_OUTPUTS", 4 * 6 * 8)  # two pairs at a time
    monkeypatch.setattr(replay, "_GATES", 100)
    parts = SubsetReplay(tokens, moe)
    for mode in MODES:
        assert_close(parts.errors(subsets, mode), whole[mode], rtol=1e-5, atol=1e-10)
    assert replay_error(tokens, moe, plain(experts=6, seed=1)) == pytest.approx(alone)


@pytest.mark.parametrize("mode", MODES)
def test_keeping_everything_costs_nothing(mode: RouterMode) -> None:
    tokens, moe = some_tokens(), plain()
    assert replay_error(tokens, moe, moe) == 0.0
    assert float(SubsetReplay(tokens, moe).errors([range(5)], mode)) < 1e-12


def test_experts_that_no_token_chose_are_free_where_gates_stay() -> None:
    tokens, moe = some_tokens(pairs=3, branches=1), plain(experts=8)
    chosen = sorted(set(moe.gate(tokens.inputs).experts.flatten().tolist()))
    assert len(chosen) < 8
    subsets = SubsetReplay(tokens, moe)
    assert float(subsets.errors([chosen], "ghost")) == 0.0
    assert float(subsets.errors([chosen], "mass")) < 1e-12
    assert float(subsets.errors([chosen], "slice")) > 1e-3


def test_a_block_that_adds_nothing_loses_nothing() -> None:
    tokens, moe = some_tokens(), plain()
    closed = replace(tokens, gamma=torch.zeros_like(tokens.gamma))
    assert SubsetReplay(closed, moe).errors([(0, 1), (2, 4)], "ghost").tolist() == [0.0, 0.0]
    assert replay_error(closed, moe, plain(seed=1)) == 0.0
    assert relative_error(tokens, tokens.inputs, torch.zeros_like(tokens.inputs)) == float("inf")


def test_fewer_rows_than_top_k_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="top-2"):
        SubsetReplay(some_tokens(), plain()).errors([(0, 1), (3,)], "ghost")
    merged = mixture(BlockConfig(3, (6, 6), 12, mapped=True), 2, (0, 0, 1))
    assert len(SubsetReplay(some_tokens(), merged).errors([(0,)], "ghost")) == 1  # both of its rows


@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=6), st.sampled_from([1, 2]), st.integers(0, 99))
def test_with_gates_fixed_the_gram_tells_the_error(keeps: list[set[int]], branches: int, seed: int) -> None:
    tokens, moe = some_tokens(branches=branches, seed=seed), plain(seed=seed)
    gated = gated_outputs(moe, tokens)
    guided = torch.stack([guided_by_hand(tokens, gated[:, e]) for e in range(5)])
    gram = torch.einsum("ind,jnd->ij", guided, guided)
    expected = [tokens.energy(gated[:, [e for e in range(5) if e not in keep]].sum(dim=1)) for keep in keeps]
    found = fixed_gate_errors(gram, [sorted(keep) for keep in keeps])
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def gated_outputs(moe: SparseMoE, tokens: BlockTokens) -> torch.Tensor:
    """g f of every expert, 0 where it was not selected, (T, E, D)."""
    routing = moe.gate(tokens.inputs)
    gates = torch.zeros(len(tokens.inputs), len(moe.experts)).scatter_(1, routing.experts, routing.weights)
    return gates.unsqueeze(-1) * torch.stack([expert(tokens.inputs) for expert in moe.experts], dim=1)
