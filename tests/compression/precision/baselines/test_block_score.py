"""The score of a block against the residual stream of a whole model, and the block that it picks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from compressing import calibrated, measure_few_tokens
from conftest import make_pico
from mixing import (
    SMALL,
    TOKENS,
    Given,
    chosen,
    events_of,
    experts_of,
    profiled,
    request_for,
    size_of,
)

from ditmoe_cli.compression.precision.baselines import block_score
from ditmoe_cli.compression.precision.few_widths import settle


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, TOKENS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("small"))


def test_the_cosine_is_the_mean_over_tokens() -> None:
    x, up = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    assert block_score.cosine([x], [x + up / 3]) == pytest.approx(math.sqrt(0.5))
    assert block_score.cosine([x, torch.cat([x, x])], [up, torch.cat([5 * x, -x])]) == pytest.approx(0.0)
    assert block_score.cosine([torch.cat([x, x, x])], [torch.cat([x, up, x])]) == pytest.approx(2 / 3)


def test_scores_are_those_of_the_residual_stream(small: Given) -> None:
    found = block_score.scores(calibrated(*small))
    for score, event, mixed in zip(found, *events_of(small), strict=True):
        assert event.residual is not None
        before = event.residual
        after = before + event.gamma.unsqueeze(1) * mixed.reshape(before.shape)
        norms = before.norm(dim=-1) * after.norm(dim=-1)
        assert score == pytest.approx(float(((before * after).sum(dim=-1) / norms).mean()), abs=1e-5)
        assert -1 <= score < 0.999


@pytest.mark.parametrize("block", [0, 1])
def test_the_block_that_changes_most_gets_the_wide_format(block: int, tmp_path: Path) -> None:
    pico = make_pico(**SMALL)
    name = f"blocks.{block}.moe.shared_experts.down_proj.weight"
    asked = profiled(pico.with_state(**{name: 100 * pico.state[name]}), tmp_path)
    free = request_for(asked)
    fixed, experts = settle(free)
    narrow, wide = free.formats_at(experts, "3"), free.formats_at(experts, "4")
    mine = {n for n in experts if n.startswith(f"blocks.{block}.")}
    limit = size_of(asked[0], {**fixed, **narrow, **{n: wide[n] for n in mine}})
    formats = chosen(block_score, asked, request_for(asked, limit)).formats
    assert experts_of(formats, "4") == mine and experts_of(formats, "3") == set(experts) - mine
    assert not experts_of(chosen(block_score, asked, request_for(asked, limit - 1)).formats, "4")
