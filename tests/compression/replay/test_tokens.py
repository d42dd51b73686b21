"""Tokens in guided pairs: their energy by hand, and those that a profile keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compressing import opened
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st
from replaying import guided_by_hand, some_tokens

from ditmoe_cli.compression.replay.tokens import BlockTokens, ratio, reservoir_tokens
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.profile import RoutingProfile


def test_guided_pairs_by_hand() -> None:
    # the guided error is (3 · 2 · 1 - 2 · 1 · 4, 3 · 1 · 2 - 2 · 5 · 0) = (-2, 6); γ and v of both branches differ
    tokens = BlockTokens(
        inputs=torch.zeros(2, 2),
        gamma=torch.tensor([[2.0, 1.0], [1.0, 5.0]]),
        coefficients=torch.tensor([3.0, -2.0]),
        bins=torch.zeros(2, dtype=torch.int64),
        branches=2,
    )
    error = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    assert tokens.energy(error) == 40.0
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


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RoutingProfile]:
    where = tmp_path_factory.mktemp("profiles")
    checkpoint = opened(make_pico(hidden=16, input_size=4), where)

    def profile(cfg: float = 1.5, reservoir: int = 30, fast: bool = False) -> RoutingProfile:
        spec = SampleSpec(images=3, steps=4, cfg=cfg, seed=1, solver="ddim", classes=(0, 1))
        settings = Calibration(spec, bins=2, reservoir=reservoir, batch=2, fast=fast)
        found = calibrate(checkpoint, settings, Run("cpu"), where / "p.safetensors", force=True)
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
        tokens = reservoir_tokens(profile, block)
        assert tokens.branches == (1 if cfg == 1.0 else 2)
        assert (len(tokens.inputs), tokens.pairs) == (len(where), len(first))
        for branch, coefficient in enumerate((cfg, -(cfg - 1))[: tokens.branches]):
            for i, (_, state, position) in enumerate(first, start=branch * tokens.pairs):
                assert torch.equal(tokens.inputs[i], stored["inputs"][block, where[branch, state, position]].float())
                assert torch.equal(tokens.gamma[i], stored["gamma"][block, state, branch])
                assert tokens.bins[i] == profile.tensor("states.bin")[state]
                assert float(tokens.coefficients[i]) == coefficient


def test_a_profile_without_tokens_is_refused(profiled: Callable[..., RoutingProfile]) -> None:
    with pytest.raises(BadInputError, match=r"p\.safetensors: .*profile without fast"):
        reservoir_tokens(profiled(fast=True), 0)
    with pytest.raises(BadInputError, match="larger reservoir"):
        reservoir_tokens(profiled(reservoir=0), 0)


def test_ratios_to_nothing() -> None:
    assert (ratio(3.0, 2.0), ratio(0.0, 0.0), ratio(1.0, 0.0)) == (1.5, 0.0, math.inf)
