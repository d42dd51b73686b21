"""PMQ: use and change of experts against counts and whole models, its choices against brute force."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import with_slow
from compressing import calibrated, measure_few_tokens, network
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st
from mixing import (
    EXPERTS,
    SMALL,
    TOKENS,
    Given,
    chosen,
    events_of,
    profiled,
    request_for,
    size_of,
    uneven_pico,
    within,
)
from torch import nn

from ditmoe_cli.compression.precision.baselines import pmq
from ditmoe_cli.compression.precision.few_widths import settle
from ditmoe_cli.compression.precision.lagrange import Group, Option
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.parameters import weight_group
from ditmoe_cli.routing.profile import RoutingTables


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, TOKENS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(uneven_pico(), tmp_path_factory.mktemp("uneven"))


def test_usage_is_counted_over_all_steps_and_branches() -> None:
    selected = [[[[4.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [0.0, 0.0]]]]
    mass = [[[[1.0, 0.0], [0.5, 0.25]], [[0.0, 1.25], [0.0, 0.0]]]]
    tables = RoutingTables((2,), 2, 1.5, selected, mass, mass)
    assert pmq.usage(tables, 10) == {(0, 0): (0.6, 0.15), (0, 1): (0.4, 0.15)}


def test_usage_of_a_profile_counts_every_slot(small: Given) -> None:
    checkpoint, profile = small
    used = pmq.usage(profile.tables, int(profile.tensor("tokens").sum()))
    for block in range(checkpoint.config.depth):
        mine = [used[block, e] for e in range(EXPERTS)]
        assert sum(share for share, _ in mine) == pytest.approx(checkpoint.config.top_k)
        assert 0.5 < sum(weight for _, weight in mine) < 1
        assert all(weight <= share for share, weight in mine)


def members_of(request: MixRequest) -> dict[tuple[int, int], list[str]]:
    blocks = range(request.checkpoint.config.depth)
    names = [f"{matrix}.weight" for matrix in MATRICES]
    return {(b, e): [in_expert(b, e, name) for name in names] for b in blocks for e in range(EXPERTS)}


def test_changes_are_those_of_the_blocks_outputs(small: Given) -> None:
    request = request_for(small)
    members = members_of(request)
    found = pmq.output_changes(request, calibrated(*small), members, ("2", "4", "16"))
    model = network(small[0])
    events, wanted = events_of(small)
    assert found.keys() == members.keys()
    for (b, e), changes in found.items():
        for width in ("2", "4"):
            moe = copy.deepcopy(model.blocks[b].moe)
            for matrix in MATRICES:
                layer = moe.experts[e].get_submodule(matrix)
                layer.weight.copy_(nearest(layer.weight, f"int{width}-g64"))
            with torch.no_grad():
                output = moe(events[b].inputs, b, events[b].gamma, None)
            expected = float((output - wanted[b]).double().norm())
            assert changes[width] == pytest.approx(expected, rel=1e-3)
        assert changes["2"] > changes["4"] > changes["16"] == 0


@pytest.mark.parametrize("copies", [1, 3])
def test_evenly_spaced_tokens_stand_for_all(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    expert = SwiGLU(32, 32).requires_grad_(False)
    u, gates = torch.randn(40, 32, generator=generator), torch.rand(40, generator=generator)
    gates[::4] = 0
    layers: dict[nn.Linear, str] = {expert.gate_proj: "int2-g32", expert.down_proj: "int3-g32"}
    exact = list(pmq.changes_of(expert, u, gates, [layers, {}]))
    assert exact[0] > 0 and exact[1] == 0
    monkeypatch.setattr(pmq, "EXPERT_TOKENS", 30)
    many = u.repeat_interleave(copies, dim=0), gates.repeat_interleave(copies)
    found = list(pmq.changes_of(expert, *many, [layers, {}]))
    assert found == pytest.approx([error * copies**0.5 for error in exact])
    assert list(pmq.changes_of(expert, u, torch.zeros(40), [layers])) == [0.0]


@pytest.mark.parametrize(
    ("widths", "fits", "found"),
    [
        (("1.58", "2", "3", "4"), 1, ("1.58", "2", "3")),
        (("1.58", "2", "3", "4"), 0, ("1.58", "2", "3")),
        (("2", "3", "4", "8", "16"), 1, ("2", "3", "4")),
        (("2", "3", "4", "8", "16"), 2, ("3", "4", "8")),
        (("2", "3", "4", "8", "16"), 4, ("4", "8", "16")),
        (("2", "4"), 0, ("2", "4")),
        (("3",), 0, ("3",)),
    ],
)
def test_three_widths_around_the_budget_are_offered(widths: tuple[str, ...], fits: int, found: tuple[str, ...]) -> None:
    assert pmq.offered(widths, fits) == found


def drawn_groups(experts: int, seed: int) -> list[Group]:
    """Experts of different sizes and sensitivities, some of which nobody uses."""
    generator = torch.Generator().manual_seed(seed)
    size = (10 * torch.randint(1, 4, (experts,), generator=generator)).tolist()
    heat = (torch.rand(experts, generator=generator) * torch.randint(0, 3, (experts,), generator=generator)).tolist()
    return [
        Group(f"e{e}", tuple(Option(str(b), size[e] * b, heat[e] * 4.0**-b) for b in (1, 2, 3))) for e in range(experts)
    ]


@given(experts=st.integers(1, 5), seed=st.integers(0, 500), share=st.floats(0, 1))
def test_a_blocks_choice_is_the_best_that_meets_the_demands(experts: int, seed: int, share: float) -> None:
    groups = drawn_groups(experts, seed)
    least = sum(group.options[0].bytes for group in groups)
    budget = least + int(2 * least * share)
    chosen = pmq.block_choice(groups, budget, ("1", "2", "3")).choice

    def sums(choice: tuple[int, ...]) -> tuple[float, int]:
        taken = [group.options[o] for group, o in zip(groups, choice, strict=True)]
        return sum(option.error for option in taken), sum(option.bytes for option in taken)

    fitting = [choice for choice in itertools.product(range(3), repeat=experts) if sums(choice)[1] <= budget]
    meeting = [choice for choice in fitting if {1, 2} <= set(choice)]
    assert chosen in (meeting or fitting)
    assert sums(chosen)[0] <= min(sums(choice)[0] for choice in meeting or fitting) * (1 + 2e-4) + 1e-12


@given(seed=st.integers(0, 99), budget=st.integers(0, 2000))
def test_blocks_share_a_budget_by_what_they_can_use(seed: int, budget: int) -> None:
    blocks = [drawn_groups(2, seed), drawn_groups(4, seed + 1), drawn_groups(2, seed)]
    least, most = (sum(group.options[o].bytes for groups in blocks for group in groups) for o in (0, 2))
    parts = pmq.shares(blocks, budget)
    assert parts[0] == parts[2], "equal blocks"
    assert max(budget, least) - len(blocks) < sum(parts) <= max(budget, least) or sum(parts) == most
    for groups, part in zip(blocks, parts, strict=True):
        assert sum(g.options[0].bytes for g in groups) <= part <= sum(g.options[2].bytes for g in groups)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Eight experts a block, as PMQ is made for."""
    return profiled(make_pico(hidden=32, input_size=4, experts=8), tmp_path_factory.mktemp("crowded"))


@pytest.mark.parametrize("bits", with_slow([2.8, 3, 3.4]))
def test_pmq_gives_every_block_the_same_bytes(bits: float, crowded: Given) -> None:
    checkpoint, _ = crowded
    request = within(crowded, bits)
    formats = chosen(pmq, crowded, request).formats
    blocks = []
    for block in range(checkpoint.config.depth):
        of_expert = [{formats[in_expert(block, e, f"{m}.weight")] for m in MATRICES} for e in range(8)]
        assert all(len(mine) == 1 for mine in of_expert), "a width each"
        taken = sorted(int(fmt[3]) for (fmt,) in of_expert)
        assert taken[-1] > taken[0] and taken[-1] - 1 in taken, "the two widest are both there"
        blocks.append(sum(taken))
    # room for one more expert's bits is left at most, in each block; the two widest may cost that much
    assert max(blocks) - min(blocks) <= 2
    assert size_of(checkpoint, formats) <= request.limit
    one = 3 * 32 * 64 // 8 + 200
    assert request.limit - size_of(checkpoint, formats) < 2 * one * checkpoint.config.depth
    others = {name: fmt for name, fmt in formats.items() if ".experts." not in name}
    assert set(others.values()) == {"int4-g64"}
    assert {weight_group(checkpoint.weights[name].info) for name in others} == {"attn", "shared"}


def test_pmq_keeps_any_budget(uneven: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    free = request_for(uneven, allowed=("2", "3", "4"))
    members = pmq._members(free)
    heat = {expert: float(n) for n, expert in enumerate(members)}
    stub = {expert: {w: heat[expert] * 2.0 ** -int(w) for w in free.widths} for expert in members}
    monkeypatch.setattr(pmq, "output_changes", lambda *_: stub)
    fixed, names = settle(free)
    least, most = (free.size(fixed, free.formats_at(names, width)) for width in ("2", "4"))
    sizes = []
    for limit in range(least, most, (most - least) // 20):
        formats = chosen(pmq, uneven, request_for(uneven, limit, allowed=("2", "3", "4"))).formats
        sizes.append(size_of(uneven[0], formats))
        assert sizes[-1] <= limit
    assert sizes[0] == least and len(set(sizes)) > 10


def test_experts_that_nobody_uses_get_the_narrowest_width(crowded: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {(b, e): (1e-3 if e < 5 else 0.0, 1.0) for b in range(2) for e in range(8)}
    monkeypatch.setattr(pmq, "usage", lambda *_: used)
    formats = chosen(pmq, crowded, within(crowded, 3)).formats
    width = {e: formats[in_expert(0, e, "up_proj.weight")] for e in range(8)}
    assert all(width[e] == "int2-g64" for e in (5, 6, 7)) and "int4-g64" in width.values()


def test_cost_is_use_times_weight_times_the_square_of_the_change(small: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for(small)
    members = members_of(request)
    used = {expert: (0.5 + expert[0], 0.25 + expert[1]) for expert in members}
    changes = {expert: {"2": 3.0, "3": 1.0 + expert[1]} for expert in members}
    monkeypatch.setattr(pmq, "usage", lambda *_: used)
    monkeypatch.setattr(pmq, "output_changes", lambda *_: changes)
    costs = pmq._costs(request, calibrated(*small), members, ("2", "3"))
    for (b, e), found in costs.items():
        assert found == pytest.approx([(0.5 + b) * (0.25 + e) * 9.0, (0.5 + b) * (0.25 + e) * (1.0 + e) ** 2])
