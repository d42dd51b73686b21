"""From groups to a plan: how many, which member leads, what the bytes are before anything is known, what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from compressing import blocks_of, folder, opened, profile_of, pruned
from conftest import make_pico
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe_cli.compression.counts import Keep, parse_keep
from ditmoe_cli.compression.merge.merging import Merging, group_counts, plan_merge, undecided_merge
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Experts, Repair
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

EXPERTS = 6
PICO = make_pico(hidden=16, input_size=4, widths=((24,) * EXPERTS,) * 2)
Made = tuple[Checkpoint, RoutingProfile]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    checkpoint = opened(PICO, tmp_path_factory.mktemp("merge"))
    return checkpoint, profile_of(checkpoint)


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("groups", ["1", "2", "5", "6", "0.5"])
@pytest.mark.parametrize("router", ["ghost", "slice"])
def test_a_plan_merges_every_expert_into_the_most_selected_of_its_group(
    method: str, groups: str, router: str, made: Made
) -> None:
    checkpoint, profile = made
    merging = Merging(parse_keep(groups, "groups"), method, router, Repair())  # type: ignore[arg-type]
    if (groups, router) == ("1", "slice"):
        with pytest.raises(InfeasibleError, match="left with 2 to 6"):
            plan_merge(checkpoint, profile, merging)
        return
    plan = plan_merge(checkpoint, profile, merging)
    assert (plan.command, plan.source, plan.profile) == ("merge", checkpoint.fingerprint, profile.digest)
    experts = plan.stage(Experts)
    assert experts.merging == method and experts.repair == Repair() and plan.decided
    assert plan == plan_merge(checkpoint, profile, merging)
    wanted = 3 if groups == "0.5" else int(groups)
    selected = profile.tensor("selected").sum(dim=(1, 2))
    for index, block in enumerate(blocks_of(plan)):
        assert len(block.keep) == wanted and block.router == router
        assert sorted([*block.keep, *dict(block.merged)]) == list(range(EXPERTS))
        for expert, lead in block.merged:
            assert lead in block.keep
            assert (-selected[index, lead], lead) < (-selected[index, expert], expert)


def size(checkpoint: Checkpoint, plan: CompressionPlan) -> int:
    return planned_output(checkpoint, plan).predicted_bytes(Output(Path("out.safetensors")))


@settings(max_examples=6)
@given(
    groups=st.integers(1, EXPERTS),
    method=st.sampled_from(list(MERGES)),
    router=st.sampled_from(["ghost", "slice"]),
    repair=st.none() | st.just(Repair()) | st.just(Repair(constant=False, linear=False)),
    ghosts=st.booleans(),
)
def test_an_undecided_plan_has_the_bytes_of_the_decided_one(
    groups: int, method: str, router: str, repair: Repair | None, ghosts: bool
) -> None:
    groups = max(groups, 2) if router == "slice" else groups
    merging = Merging(Keep(count=groups), method, router, repair)  # type: ignore[arg-type]
    with folder() as where:
        checkpoint = opened(PICO, where)
        if ghosts:
            more = make_pico(hidden=16, input_size=4, widths=((24,) * 8,) * 2)
            keeps = [(0, 1, 3, 4, 6, 7), range(EXPERTS)]
            checkpoint = pruned(opened(more, where, "more.safetensors"), keeps, "ghost", where / "ghosted.safetensors")
        undecided = undecided_merge(checkpoint, merging)
        decided = plan_merge(checkpoint, profile_of(checkpoint), merging)
        assert not undecided.decided and decided.decided
        assert size(checkpoint, undecided) == size(checkpoint, decided)


@pytest.mark.parametrize(("groups", "said"), [("7", "1 to 6"), ("100", "1 to 6")])
def test_more_groups_than_experts_are_infeasible(groups: str, said: str, made: Made) -> None:
    merging = Merging(parse_keep(groups, "groups"))
    for attempt in (group_counts, undecided_merge):
        with pytest.raises(InfeasibleError, match=rf"groups {groups}: block 0 has 6 experts.*{said}"):
            attempt(made[0], merging)


def test_rows_that_share_an_expert_are_not_merged_again(tmp_path: Path) -> None:
    merged = make_pico(hidden=16, input_size=4, widths=((24,) * 3,) * 2, expert_of=((0, 1, 2, -1), (0, 1, 1, 2)))
    checkpoint = opened(merged, tmp_path)
    for attempt in (group_counts, undecided_merge):
        with pytest.raises(BadInputError, match="experts of block 1 are merged already"):
            attempt(checkpoint, Merging(Keep(count=2)))


def test_experts_of_different_widths_are_not_merged(tmp_path: Path) -> None:
    checkpoint = opened(make_pico(hidden=16, input_size=4, widths=((24, 24, 24), (24, 16, 24))), tmp_path)
    for attempt in (group_counts, undecided_merge):
        with pytest.raises(BadInputError, match="experts of block 1 differ in width"):
            attempt(checkpoint, Merging(Keep(count=2)))
    assert group_counts(checkpoint, Merging(Keep(ratio=1.0))) == [3, 3], "where nothing is merged they may"


@pytest.mark.parametrize("method", MERGES)
def test_a_fast_profile_is_enough_for_what_needs_no_outputs(method: str, tmp_path: Path) -> None:
    checkpoint = opened(PICO, tmp_path)
    fast, merging = profile_of(checkpoint, fast=True), Merging(Keep(count=3), method)
    if MERGES[method].needs_means:
        with pytest.raises(BadInputError, match=rf"method {method} .*without fast"):
            plan_merge(checkpoint, fast, merging)
    else:
        whole = plan_merge(checkpoint, profile_of(checkpoint, "whole"), merging)
        assert blocks_of(plan_merge(checkpoint, fast, merging)) == blocks_of(whole)


def test_the_profile_of_another_checkpoint_is_refused(made: Made, tmp_path: Path) -> None:
    other = opened(make_pico(hidden=16, input_size=4, widths=((24,) * EXPERTS,) * 2, seed=1), tmp_path)
    with pytest.raises(BadInputError, match="profile of another checkpoint"):
        plan_merge(other, made[1], Merging(Keep(count=3)))
