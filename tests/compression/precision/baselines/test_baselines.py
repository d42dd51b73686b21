"""Methods beside our own: what each measures against counts and brute force, and budgets kept to the byte."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import network, opened, profile_of, quantising
from conftest import REPOSITORY, Pico, make_pico
from hypothesis import given
from hypothesis import strategies as st
from rounding import states_for
from torch import Tensor, nn

from ditmoe_cli.cli.app import run as run_program
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MIXES
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.precision.baselines import block_score, outlier, pmq
from ditmoe_cli.compression.precision.budget import Budget, budget_bytes
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.program import Group, Option
from ditmoe_cli.compression.precision.task import Task, settle, widened
from ditmoe_cli.compression.replay import amplification as probes
from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.moe import MoEEvent, SwiGLU
from ditmoe_cli.model.opened import Checkpoint, weight_group
from ditmoe_cli.progress import silent_bar
from ditmoe_cli.routing.profile import RoutingProfile, RoutingTables

WHERE = Output(Path("/nowhere/out.safetensors"))
TOKENS = 512
EXPERTS = 3
SMALL: dict[str, Any] = {"hidden": 32, "input_size": 4, "experts": EXPERTS}
BASELINES = [name for name in MIXES if name != DEFAULT_METHODS["quantize"]]
Given = tuple[Checkpoint, RoutingProfile]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "TOKENS", TOKENS)
    monkeypatch.setattr(probes, "PROBED_TOKENS", TOKENS)


def profiled(pico: Pico, folder: Path, **settings: Any) -> Given:
    checkpoint = opened(pico, folder)
    return checkpoint, profile_of(checkpoint, **settings)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Blocks of different numbers of experts, of different widths, one too narrow for any format."""
    pico = make_pico(hidden=32, input_size=4, widths=((64, 32, 64, 96, 16), (64,) * 3))
    return profiled(pico, tmp_path_factory.mktemp("uneven"))


def task_of(asked: Given, limit: int = 10**9, **fields: Any) -> Task:
    checkpoint, profile = asked
    candidates = Candidates(**fields)
    formats = candidate_formats(checkpoint, candidates)
    return Task(checkpoint, profile, candidates, formats, limit, WHERE, "cpu", silent_bar)


def within(asked: Given, bits: float, **fields: Any) -> Task:
    limit = budget_bytes(asked[0], Budget(bits=bits), Candidates(**fields), WHERE)
    return task_of(asked, limit, **fields)


def size_of(checkpoint: Checkpoint, formats: Mapping[str, str]) -> int:
    plan = quantising(checkpoint, formats)
    return planned_output(checkpoint, plan).predicted_bytes(WHERE)


def experts_of(formats: Mapping[str, str], width: str) -> set[str]:
    """The matrices of routed experts at a width."""
    return {name for name, fmt in formats.items() if ".experts." in name and fmt.startswith(f"int{width}-")}


# the outlier score


def test_the_outlier_score_is_the_worst_columns() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [1.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    assert outlier.outlier_score(weight) == pytest.approx(3 / (4 / 3))  # 4 / 2 in the first column
    assert outlier.outlier_score(weight[:, :1]) == pytest.approx(2.0)
    assert outlier.outlier_score(torch.zeros(3, 2)) == 0.0


@given(rows=st.integers(1, 6), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_outlier_score_is_that_of_a_loop(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = outlier.outlier_score(weight)
    by_column = [[abs(v) for v in column] for column in weight.T.tolist()]
    assert found == pytest.approx(max(max(column) / (sum(column) / rows) for column in by_column))
    assert 1 - 1e-9 <= found <= rows + 1e-9
    assert outlier.outlier_score(weight * torch.arange(1.0, columns + 1)) == pytest.approx(found, rel=1e-5)


def with_outlier(name: str, row: int = 3, column: int = 5) -> Pico:
    pico = make_pico(**SMALL)
    weight = pico.state[name].clone()
    weight[row, column] = 50.0
    return pico.with_state(**{name: weight})


@pytest.mark.parametrize(
    ("matrix", "tied"), [("up", ()), ("down", ()), ("gate", ("gate", "up")), ("up", ("gate", "up"))], ids=str
)
def test_the_matrix_with_an_outlier_gets_the_wide_format(matrix: str, tied: tuple[str, ...], tmp_path: Path) -> None:
    asked = profiled(with_outlier(in_expert(1, 2, f"{matrix}_proj.weight")), tmp_path, fast=True)
    planted = {in_expert(1, 2, f"{each}_proj.weight") for each in tied or (matrix,)}
    free = task_of(asked, tied=tied)
    fixed, experts = settle(free)
    narrow, wide = free.at(experts, "2"), free.at(experts, "3")
    limit = size_of(asked[0], {**fixed, **narrow, **{n: wide[n] for n in planted}})
    formats = outlier.choose(task_of(asked, limit, tied=tied)).formats
    assert experts_of(formats, "3") == planted and experts_of(formats, "2") == set(experts) - planted
    assert size_of(asked[0], formats) == limit
    assert not experts_of(outlier.choose(task_of(asked, limit - 1, tied=tied)).formats, "3")


# the score of a block


def test_the_cosine_is_the_mean_over_tokens() -> None:
    x, up = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    assert block_score.cosine([x], [x + up / 3]) == pytest.approx(math.sqrt(0.5))
    assert block_score.cosine([x, torch.cat([x, x])], [up, torch.cat([5 * x, -x])]) == pytest.approx(0.0)
    assert block_score.cosine([torch.cat([x, x, x])], [torch.cat([x, up, x])]) == pytest.approx(2 / 3)


def events_of(asked: Given) -> tuple[list[MoEEvent], list[Tensor]]:
    """What the mixtures see of the calibration states in a whole model, and what they return."""
    model = network(asked[0])
    states, _ = states_for(*asked, TOKENS)
    null = torch.full_like(states.labels, model.config.num_classes)
    events: list[MoEEvent] = []
    with torch.no_grad():
        labels = torch.cat([states.labels, null])
        model(torch.cat([states.z] * 2), torch.cat([states.t] * 2), labels, events.append)
        mixed = []
        for event, block in zip(events, model.blocks, strict=True):
            routed = (event.routing.weights.unsqueeze(-1) * event.outputs).sum(dim=1)
            mixed.append(routed + block.moe.shared_experts(event.inputs))
    return events, mixed


def test_scores_are_those_of_the_residual_stream(small: Given) -> None:
    found = block_score.scores(task_of(small))
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
    free = task_of(asked)
    fixed, experts = settle(free)
    narrow, wide = free.at(experts, "3"), free.at(experts, "4")
    mine = {n for n in experts if n.startswith(f"blocks.{block}.")}
    limit = size_of(asked[0], {**fixed, **narrow, **{n: wide[n] for n in mine}})
    formats = block_score.choose(task_of(asked, limit)).formats
    assert experts_of(formats, "4") == mine and experts_of(formats, "3") == set(experts) - mine
    assert not experts_of(block_score.choose(task_of(asked, limit - 1)).formats, "4")


# two widths


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("allowed", [("2", "3", "8"), ("3", "16")], ids=str)
def test_as_many_get_the_wider_width_as_fit(allowed: tuple[str, ...], seed: int, uneven: Given) -> None:
    free = task_of(uneven, allowed=allowed)
    fixed, names = settle(free)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    units = [[names[i] for i in order[start : start + 3]] for start in range(0, len(order), 3)]
    least, most = (free.size(fixed, free.at(names, width)) for width in (allowed[-2], allowed[-1]))
    for tenths in (0, 3, 9):
        limit = least + (most - least) * tenths // 10
        formats = widened(task_of(uneven, limit, allowed=allowed), fixed, units).formats
        sizes = []
        for n in range(len(units) + 1):
            wide = {name for unit in units[:n] for name in unit}
            parts = (
                free.at([n for n in names if n in wide], allowed[-1]),
                free.at([n for n in names if n not in wide], allowed[-2]),
            )
            sizes.append((free.size(fixed, *parts), {**fixed, **parts[0], **parts[1]}))
        best = max(n for n, (size, _) in enumerate(sizes) if size <= limit)
        assert formats == sizes[best][1]
        assert tenths == 0 or 0 < best < len(units)
    assert widened(free, fixed, units).formats == {**fixed, **free.at(names, allowed[-1])}


def test_attention_and_shared_get_4_bits_unless_that_leaves_too_little(small: Given) -> None:
    floors = {"attn": 2.0, "shared": 3.0}
    free = task_of(small, floors=floors)
    fixed, names = settle(free)
    groups = {weight_group(small[0].weights[name].info) for name in fixed}
    assert groups == {"attn", "shared"} and all(fmt == "int4-g64" for fmt in fixed.values())
    limit = free.size(fixed, free.at(names, "2"))
    assert settle(task_of(small, limit, floors=floors)) == (fixed, names)
    nothing, everything = settle(task_of(small, limit - 1, floors=floors))
    assert nothing == {} and sorted(everything) == sorted([*fixed, *names])
    for method in ("outlier", "block-score"):
        formats = MIXES[method].choose(task_of(small, limit - 1, floors=floors)).formats
        assert size_of(small[0], formats) < limit
        assert {formats[name] for name in formats if ".attn." in name} <= {"int2-g64", "int3-g64"}
        assert {formats[name] for name in formats if ".shared_experts." in name} == {"int3-g64"}, "their floor"


def test_a_weight_takes_the_next_width_that_it_may(uneven: Given) -> None:
    task = task_of(uneven, allowed=("2", "4", "16"), floors={"experts": 3})
    wide, narrow = (in_expert(0, e, "down_proj.weight") for e in (0, 4))
    assert [task.format_at(wide, width) for width in ("2", "3", "4", "5", "16")] == ["int4-g64"] * 3 + [None] * 2
    assert task.format_at(narrow, "2") is None, "16 columns suit no format"
    assert task_of(uneven, allowed=("2", "4")).format_at(wide, "8") == "int4-g64"
    assert task.at([wide, narrow], "2") == {wide: "int4-g64"}


# what PMQ measures


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


def members_of(task: Task) -> dict[tuple[int, int], list[str]]:
    blocks = range(task.checkpoint.config.depth)
    names = [f"{matrix}.weight" for matrix in MATRICES]
    return {(b, e): [in_expert(b, e, name) for name in names] for b in blocks for e in range(EXPERTS)}


def test_changes_are_those_of_the_blocks_outputs(small: Given) -> None:
    task = task_of(small)
    members = members_of(task)
    found = pmq.output_changes(task, members, ("2", "4", "16"))
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


# what PMQ chooses


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
    chosen = pmq.block_choice(groups, budget, ("1", "2", "3"))

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


@pytest.mark.parametrize("bits", [2.8, 3, 3.4])
def test_pmq_gives_every_block_the_same_bytes(bits: float, crowded: Given) -> None:
    checkpoint, _ = crowded
    task = within(crowded, bits)
    formats = pmq.choose(task).formats
    blocks = []
    for block in range(checkpoint.config.depth):
        of_expert = [{formats[in_expert(block, e, f"{m}.weight")] for m in MATRICES} for e in range(8)]
        assert all(len(mine) == 1 for mine in of_expert), "a width each"
        taken = sorted(int(fmt[3]) for (fmt,) in of_expert)
        assert taken[-1] > taken[0] and taken[-1] - 1 in taken, "the two widest are both there"
        blocks.append(sum(taken))
    # room for one more expert's bits is left at most, in each block; the two widest may cost that much
    assert max(blocks) - min(blocks) <= 2
    assert size_of(checkpoint, formats) <= task.limit
    one = 3 * 32 * 64 // 8 + 200
    assert task.limit - size_of(checkpoint, formats) < 2 * one * checkpoint.config.depth
    others = {name: fmt for name, fmt in formats.items() if ".experts." not in name}
    assert set(others.values()) == {"int4-g64"}
    assert {weight_group(checkpoint.weights[name].info) for name in others} == {"attn", "shared"}


def test_pmq_keeps_any_budget(uneven: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    free = task_of(uneven, allowed=("2", "3", "4"))
    members = pmq._members(free)
    heat = {expert: float(n) for n, expert in enumerate(members)}
    stub = {expert: {w: heat[expert] * 2.0 ** -int(w) for w in free.widths} for expert in members}
    monkeypatch.setattr(pmq, "output_changes", lambda *_: stub)
    fixed, names = settle(free)
    least, most = (free.size(fixed, free.at(names, width)) for width in ("2", "4"))
    sizes = []
    for limit in range(least, most, (most - least) // 40):
        formats = pmq.choose(task_of(uneven, limit, allowed=("2", "3", "4"))).formats
        sizes.append(size_of(uneven[0], formats))
        assert sizes[-1] <= limit
    assert sizes[0] == least and len(set(sizes)) > 10


def test_experts_that_nobody_uses_get_the_narrowest_width(crowded: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {(b, e): (1e-3 if e < 5 else 0.0, 1.0) for b in range(2) for e in range(8)}
    monkeypatch.setattr(pmq, "usage", lambda *_: used)
    formats = pmq.choose(within(crowded, 3)).formats
    width = {e: formats[in_expert(0, e, "up_proj.weight")] for e in range(8)}
    assert all(width[e] == "int2-g64" for e in (5, 6, 7)) and "int4-g64" in width.values()


def test_cost_is_use_times_weight_times_the_square_of_the_change(small: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(small)
    members = members_of(task)
    used = {expert: (0.5 + expert[0], 0.25 + expert[1]) for expert in members}
    changes = {expert: {"2": 3.0, "3": 1.0 + expert[1]} for expert in members}
    monkeypatch.setattr(pmq, "usage", lambda *_: used)
    monkeypatch.setattr(pmq, "output_changes", lambda *_: changes)
    costs = pmq._costs(task, members, ("2", "3"))
    for (b, e), found in costs.items():
        assert found == pytest.approx([(0.5 + b) * (0.25 + e) * 9.0, (0.5 + b) * (0.25 + e) * (1.0 + e) ** 2])


# all of them


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("bits", [3, 4.5, 8])
def test_the_file_is_within_its_budget(name: str, bits: float, uneven: Given) -> None:
    task = within(uneven, bits)
    choice = MIXES[name].choose(task)
    assert size_of(uneven[0], choice.formats) <= task.limit
    assert choice.found == {}, "nothing is predicted"
    groups = {weight_group(uneven[0].weights[n].info) for n in choice.formats}
    assert groups == {"attn", "shared", "experts"}, "all else stays as it is"


@pytest.mark.parametrize("name", MIXES)
def test_the_least_is_told_and_enough(name: str, small: Given) -> None:
    with pytest.raises(InfeasibleError, match="the budget is 1,000 bytes") as refused:
        MIXES[name].choose(task_of(small, 1000))
    least = int(str(refused.value).split(" take ")[1].split(";")[0].replace(",", ""))
    assert size_of(small[0], MIXES[name].choose(task_of(small, least)).formats) == least
    with pytest.raises(InfeasibleError, match=f"{least:,}"):
        MIXES[name].choose(task_of(small, least - 1))


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_protected_stays(name: str, small: Given) -> None:
    formats = MIXES[name].choose(task_of(small, protected=("experts", "attn"))).formats
    assert formats and all(".shared_experts." in weight for weight in formats)


@pytest.mark.parametrize("name", ["pmq", "block-score"])
def test_profiles_without_states_are_refused(name: str, tmp_path: Path) -> None:
    asked = profiled(make_pico(**SMALL), tmp_path, fast=True)
    with pytest.raises(BadInputError, match="keeps no states"):
        MIXES[name].choose(within(asked, 4))


@pytest.mark.parametrize("name", MIXES)
def test_equal_input_gives_equal_choices(name: str, small: Given) -> None:
    task = within(small, 3.5)
    assert MIXES[name].choose(task).formats == MIXES[name].choose(task).formats


# the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("files"))


@pytest.fixture
def quantize(files: Given, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        checkpoint, profile = files
        given = ("quantize", checkpoint.path, "--profile", profile.path, *words)
        code = run_program([str(word) for word in given])
        said = capsys.readouterr()
        return code, json.loads(said.out)["result"] if said.out else {}, said.err

    return run


@pytest.mark.parametrize(
    ("name", "rounding"), [*((name, ("nearest",)) for name in MIXES), ("pmq", ("gptq", "--tokens", 256))], ids=str
)
def test_dry_runs_tell_the_bytes(
    name: str, rounding: tuple[object, ...], quantize: Callable[..., tuple[int, dict[str, Any], str]], tmp_path: Path
) -> None:
    target = tmp_path / "out.safetensors"
    words = ("--bits", 3.5, "--method", name, "--rounding", *rounding, "-o", target)
    code, planned, _ = quantize(*words, "--dry-run")
    assert code == 0 and not target.exists()
    code, result, _ = quantize(*words)
    assert code == 0 and result["bytes"] == target.stat().st_size == planned["bytes"]
    assert result["plan_digest"]
    options = planned["plan"]["options"]
    assert options["method"] == result["method"] == name
    assert 0 < options["tried_error"] == result["tried_error"] < 1
    assert ("predicted_error" in options) == ("predicted_error" in result) == (name == "replay")


def test_methods_are_listed_without_torch() -> None:
    script = (
        "import sys; from ditmoe_cli.cli.app import run; code = run(['quantize', '--list-methods']); "
        "sys.exit(code or (9 if {'torch', 'numpy'} & set(sys.modules) else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)["result"]["methods"]
    assert listed == {name: {"summary": m.summary, "source": m.source} for name, m in MIXES.items()}
    assert "2410.06270" in listed["pmq"]["source"] and "2406.08155" in listed["outlier"]["source"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", 3, "--method", "hawq"), "--method hawq"),
        (("--bits", 4, "--method", "pmq", "--uniform"), "leave out --uniform"),
    ],
    ids=str,
)
def test_unknown_methods_are_refused(
    words: tuple[object, ...], said: str, quantize: Callable[..., tuple[int, dict[str, Any], str]]
) -> None:
    code, _, err = quantize(*words)
    assert code == 2 and said in err


def test_the_outputs_name_tells_the_method(
    quantize: Callable[..., tuple[int, dict[str, Any], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("--method", "outlier"), ()):
        code, result, _ = quantize("--bits", 4, "--allow", "2,3,4,6", "--rounding", "nearest", *words)
        assert code == 0 and set(result["formats"]) <= {"int2-g64", "int3-g64", "int4-g64", "int6-g64"}
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"original.quantize-bits4-outlier.safetensors", "original.quantize-bits4.safetensors"}
