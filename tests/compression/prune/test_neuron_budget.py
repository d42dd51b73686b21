"""Neurons shared by the experts of all blocks, against energies and choices made by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from compressing import blocks_of, network, opened, profile_of
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.prune.neuron_budget import pooled_widths
from ditmoe_cli.compression.prune.pruning import Pruning, check_pruning, plan_prune, plan_replayed
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

Made = tuple[Checkpoint, RoutingProfile]
WIDTHS = ((24, 24, 16, 24), (24,) * 4, (8, 24, 24, 24))
POOLED = Pruning(Keep(ratio=1.0), shared_budget=True, neurons=0.5, multiple=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    pico = make_pico(hidden=16, input_size=4, widths=WIDTHS, depth=3)
    checkpoint = opened(pico, tmp_path_factory.mktemp("pooled"))
    return checkpoint, profile_of(checkpoint)


def ranked(made: Made) -> list[tuple[float, int, int]]:
    """Energies of all neurons with their block and expert, highest first, from the profile's tables by definition."""
    checkpoint, profile = made
    found = []
    for b, block in enumerate(network(checkpoint).blocks):
        reach = profile.block_tensor("gamma.square", b).sum(dim=(0, 1)) / profile.tensor("gamma.images").sum()
        for e, expert in enumerate(block.moe.experts):
            for i in range(expert.down_proj.weight.shape[1]):
                active = 0.1 * profile.block_tensor("neuron.energy", b)[e, i]
                active += 0.9 * profile.block_tensor("neuron.max", b)[e, i]
                found.append((float((reach * expert.down_proj.weight[:, i].detach() ** 2).sum() * active), b, e))
    return sorted(found, reverse=True)


def planned(made: Made, pruning: Pruning) -> CompressionPlan:
    return plan_replayed(Calibrated(*made, "cpu"), pruning)


def test_the_pool_spans_blocks_and_holds_the_highest_energies(made: Made) -> None:
    plan = planned(made, replace(POOLED, keep=Keep(), multiple=1))
    total = sum(map(sum, WIDTHS)) // 2
    counted = [[0] * 4 for _ in WIDTHS]
    for _, block, expert in ranked(made)[:total]:
        counted[block][expert] += 1
    assert all(sum(1 for n in widths if n) >= 2 for widths in counted), "or else top-k would change what is counted"
    assert [block.keep for block in blocks_of(plan)] == [tuple(e for e in range(4) if w[e]) for w in counted]
    assert [block.widths for block in blocks_of(plan)] == [tuple(n for n in w if n) for w in counted]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_every_expert_stays_and_the_budget_is_kept(ratio: float, made: Made) -> None:
    plan = planned(made, replace(POOLED, neurons=ratio))
    total = int(ratio * sum(map(sum, WIDTHS)))
    assert total - 4 < sum(sum(block.widths) for block in blocks_of(plan)) <= total
    for block, own in zip(blocks_of(plan), WIDTHS, strict=True):
        assert block.keep == (0, 1, 2, 3)
        assert all(w % 4 == 0 and 4 <= w <= most for w, most in zip(block.widths, own, strict=True))


def test_a_block_keeps_as_many_as_its_tokens_choose(made: Made) -> None:
    plan = planned(made, replace(POOLED, keep=Keep(), neurons=0.1, multiple=4))
    assert [len(block.keep) for block in blocks_of(plan)] == [2, 2, 2]
    assert [block.widths for block in blocks_of(plan)] == [(4, 4)] * 3


def test_experts_are_chosen_before_their_neurons(made: Made) -> None:
    plan = planned(made, replace(POOLED, keep=Keep(count=3), method="random"))
    chosen = planned(made, Pruning(Keep(count=3), "random", shared_budget=True))
    assert [block.keep for block in blocks_of(plan)] == [block.keep for block in blocks_of(chosen)]
    kept = sum(WIDTHS[b][e] for b, block in enumerate(blocks_of(plan)) for e in block.keep)
    assert kept // 2 - 4 < sum(sum(block.widths) for block in blocks_of(plan)) <= kept // 2


def test_constants_stand_in_for_experts_that_went(made: Made) -> None:
    plan = planned(made, replace(POOLED, keep=Keep(), neurons=0.1, constants=True, rank=2))
    assert all(block.constants and block.rank == 2 for block in blocks_of(plan))
    plan = planned(made, replace(POOLED, constants=True, rank=2))
    assert not any(block.constants or block.rank for block in blocks_of(plan))


def test_uniform_widths_are_other_ones(made: Made) -> None:
    uniform = plan_prune(*made, replace(POOLED, shared_budget=False))
    assert [block.widths for block in blocks_of(uniform)] == [(12, 12, 8, 12), (12,) * 4, (4, 12, 12, 12)]
    pooled = planned(made, POOLED)
    assert [block.widths for block in blocks_of(pooled)] != [block.widths for block in blocks_of(uniform)]


def test_too_few_neurons_are_infeasible(made: Made) -> None:
    with pytest.raises(InfeasibleError, match=r"26 neurons are too few for 12 experts, which need 48.*multiple"):
        planned(made, replace(POOLED, neurons=0.1))


def test_a_fast_profile_has_no_energies(made: Made) -> None:
    with pytest.raises(BadInputError, match=r"no 'neuron.energy'.*fast"):
        planned((made[0], profile_of(made[0], "fast", fast=True)), POOLED)


@pytest.mark.parametrize("more", [{"neurons": 1.0}, {"shared_budget": False}, {"router": None}], ids=str)
def test_an_open_number_of_experts_needs_neurons_to_share(more: dict[str, object], made: Made) -> None:
    with pytest.raises(UsageError, match=r"keep auto.*allocate global"):
        check_pruning(made[0], replace(POOLED, keep=Keep(), **more))  # type: ignore[arg-type]


# the pool

# few different values, so that ties are common
pools = st.lists(
    st.lists(st.integers(0, 6), min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    min_size=1,
    max_size=4,
)
seldom_equal = st.integers(0, 2**31).map(lambda seed: torch.rand(3, 8, generator=seeded(seed)).square())


@given(pools, st.integers(0, 90), st.integers(1, 6), st.data())
def test_pooled_widths_respect_budget_multiple_and_least(
    pool: list[Tensor], total: int, multiple: int, data: st.DataObject
) -> None:
    least = [data.draw(st.integers(0, 8)) for _ in pool]
    needed = sum(min(-(-each // multiple) * multiple, len(own)) for own, each in zip(pool, least, strict=True))
    if total < needed:
        with pytest.raises(InfeasibleError, match=f"{total} neurons .* need {needed} "):
            pooled_widths(pool, total, multiple, least)
        return
    widths = pooled_widths(pool, total, multiple, least)
    assert sum(widths) <= total
    for each, width, floor in zip(pool, widths, least, strict=True):
        assert width % multiple == 0 or width == len(each)
        assert width >= min(floor, len(each))
    # nothing that would fit is left out
    room = total - sum(widths)
    for each, width in zip(pool, widths, strict=True):
        assert width == len(each) or min(multiple, len(each) - width) > room


def held(pool: list[Tensor], widths: tuple[int, ...]) -> float:
    """The energy of each expert's best neurons, by plain sorting."""
    return sum(sum(sorted(each.tolist(), reverse=True)[:width]) for each, width in zip(pool, widths, strict=True))


@given(seldom_equal, st.integers(0, 24), st.sampled_from([1, 2, 4]), st.booleans())
def test_no_other_widths_hold_more_energy(rows: Tensor, total: int, multiple: int, may_go: bool) -> None:
    pool, floor = list(rows), 0 if may_go else multiple
    total = max(total, len(pool) * floor)
    best = max(
        held(pool, widths)
        for widths in itertools.product(range(floor, 9, multiple), repeat=len(pool))
        if sum(widths) <= total
    )
    assert held(pool, pooled_widths(pool, total, multiple, [floor] * len(pool))) == pytest.approx(best, rel=1e-6)


@given(pools)
def test_a_multiple_of_one_pools_neurons_as_the_paper_does(pool: list[Tensor]) -> None:
    total = sum(map(len, pool)) // 2
    widths = pooled_widths(pool, total, 1, [0] * len(pool))
    assert held(pool, widths) == float(torch.cat(pool).sort(descending=True).values[:total].sum())


def test_energy_decides_between_experts_and_ties_fall_to_the_lower_number() -> None:
    loud, quiet = torch.tensor([9.0, 9.0, 8.0, 8.0, 1.0, 1.0]), torch.tensor([2.0, 7.0, 2.0, 2.0])
    assert pooled_widths([loud, quiet], 6, 2, [2, 2]) == (4, 2)
    assert pooled_widths([loud, quiet], 4, 2, [0, 0]) == (4, 0)
    assert pooled_widths([torch.ones(4), torch.ones(4)], 6, 2, [2, 2]) == (4, 2)


def test_a_last_small_group_waits_for_the_one_before_it() -> None:
    # 5 neurons in groups of 2, 2, 1: with room for 3 the single last one must not make a width of 3
    assert pooled_widths([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])], 3, 2, [2]) == (2,)
    assert pooled_widths([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])], 5, 2, [2]) == (5,)
