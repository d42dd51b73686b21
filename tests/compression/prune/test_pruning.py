"""From scores to experts kept: how many, which, and what cannot be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compressing import blocks_of, folder, opened, pruned, quantised
from conftest import make_pico
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe_cli.compression.counts import Keep, parse_keep
from ditmoe_cli.compression.methods import SALIENCIES
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Repair
from ditmoe_cli.compression.prune.pruning import (
    Pruning,
    best,
    check_pruning,
    kept_counts,
    plan_prune,
    undecided_plan,
)
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.profile import empty_tables

EXPERTS = 5
PICO = make_pico(hidden=16, input_size=4, widths=((24,) * EXPERTS,) * 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return opened(PICO, tmp_path_factory.mktemp("planner"))


@pytest.mark.parametrize("router", ["slice", "ghost"])
def test_kept_counts_follow_each_block(router: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    uneven = pruned(checkpoint, [(0, 1, 4), range(EXPERTS)], router, tmp_path / "uneven.safetensors")
    assert kept_counts(uneven, Keep(ratio=0.7)) == [3, 4]
    assert kept_counts(uneven, Keep(count=2)) == [2, 2]
    for keep in (4, 5):
        with pytest.raises(InfeasibleError, match=rf"keep {keep}: block 0 has only 3 experts"):
            kept_counts(uneven, Keep(count=keep))


@pytest.mark.parametrize("keep", ["1", "0.1", "0.2"])
def test_keeping_fewer_than_top_k_is_infeasible(keep: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(InfeasibleError, match=rf"keep {keep} leaves 1 of 5 experts in block 0.*top-2"):
        kept_counts(checkpoint, parse_keep(keep))
    with pytest.raises(InfeasibleError):
        plan_prune(checkpoint, None, Pruning(parse_keep(keep), "random"))
    with pytest.raises(InfeasibleError):
        undecided_plan(checkpoint, Pruning(parse_keep(keep)))


def test_top_k_is_the_checkpoints_own(tmp_path: Path) -> None:
    one = opened(make_pico(hidden=16, input_size=4, top_k=1), tmp_path)
    assert kept_counts(one, Keep(count=1)) == [1, 1]
    three = opened(make_pico(hidden=16, input_size=4, top_k=3), tmp_path, "three.safetensors")
    with pytest.raises(InfeasibleError, match="top-3"):
        kept_counts(three, Keep(count=2))


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=7), min_size=1, max_size=3),
    st.data(),
)
def test_the_best_are_kept_and_ties_fall_to_the_lower_number(scores: list[list[float]], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, len(block))) for block in scores]
    for block, count, keep in zip(scores, counts, best(scores, counts), strict=True):
        # of all subsets of this size with the highest total, the first in lexicographic order
        total = max(sum(block[e] for e in s) for s in itertools.combinations(range(len(block)), count))
        subsets = itertools.combinations(range(len(block)), count)
        assert keep == next(s for s in subsets if sum(block[e] for e in s) == total)


def test_a_plan_tells_how_it_was_made(checkpoint: Checkpoint) -> None:
    plan = plan_prune(checkpoint, None, Pruning(parse_keep("0.5"), "random", "slice", seed=7))
    assert (plan.command, plan.source, plan.profile) == ("prune", checkpoint.fingerprint, None)
    assert plan.options == {
        "keep": "0.5",
        "method": "random",
        "router": "slice",
        "seed": 7,
        "no_refit": True,
    }
    scores = SALIENCIES["random"].score(empty_tables((EXPERTS, EXPERTS)), 7)
    assert blocks_of(plan) == tuple(BlockPlan(keep, "slice") for keep in best(scores, [3, 3]))
    assert plan.decided
    assert plan == plan_prune(checkpoint, None, Pruning(parse_keep("0.5"), "random", "slice", seed=7))
    others = {blocks_of(plan_prune(checkpoint, None, Pruning(Keep(count=3), "random", seed=seed))) for seed in range(8)}
    assert len(others) > 4


def size(checkpoint: Checkpoint, plan: CompressionPlan, shard_bytes: int | None) -> int:
    output = Output(Path("out") if shard_bytes else Path("out.safetensors"), shard_bytes=shard_bytes or 1)
    return planned_output(checkpoint, plan).predicted_bytes(output)


@settings(max_examples=8)
@given(
    count=st.integers(2, EXPERTS) | st.just(11),
    router=st.sampled_from(["slice", "ghost", "mass"]),
    more=st.fixed_dictionaries(
        {},
        optional={
            "neurons": st.sampled_from([0.1, 0.5]),
            "narrow_shared": st.booleans(),
            "constants": st.booleans(),
            "rank": st.integers(0, 3),
            "repair": st.sampled_from([Repair(), Repair(constant=False, linear=False)]),
        },
    ),
    before=st.sampled_from(["plain", "nf4", "int8", "ghosted"]),
    shard_bytes=st.none() | st.integers(1_000, 40_000),
    data=st.data(),
)
def test_an_undecided_plan_has_the_bytes_of_every_decided_one(
    count: int, router: str, more: dict[str, Any], before: str, shard_bytes: int | None, data: st.DataObject
) -> None:
    with folder() as where:
        source = opened(make_pico(hidden=16, input_size=4, widths=((24,) * 12,) * 2), where)
        if before in ("nf4", "int8"):
            source = quantised(source, 4 if before == "nf4" else 8, where / "packed.safetensors")
        if before == "ghosted":
            source = pruned(source, [range(1, 12), range(0, 12, 2)], "ghost", where / "ghosted.safetensors")
        more = {} if before in ("nf4", "int8") else more  # what is packed is not computed
        more = more if more.get("constants") else {name: value for name, value in more.items() if name != "rank"}
        count = min(count, min(len(block.expert_widths) for block in source.config.blocks))
        pruning = Pruning(Keep(count=count), "random", router, multiple=8, **more)  # type: ignore[arg-type]
        for seed in data.draw(st.lists(st.integers(), min_size=3, max_size=3)):
            seeded = replace(pruning, seed=seed)
            undecided = undecided_plan(source, seeded)
            assert not undecided.decided
            expected = size(source, undecided, shard_bytes)
            assert size(source, plan_prune(source, None, seeded), shard_bytes) == expected


def test_bytes_that_depend_on_the_choice_need_a_decision(tmp_path: Path) -> None:
    pruning = Pruning(Keep(count=2))
    uneven = opened(make_pico(hidden=16, input_size=4, widths=((24, 24, 24), (24, 16, 24))), tmp_path)
    with pytest.raises(BadInputError, match=r"experts of block 1 differ in size.*profile"):
        undecided_plan(uneven, pruning)
    # rows that share an expert go with it: how many, only the choice tells
    merged = make_pico(hidden=16, input_size=4, widths=((24,) * 3,) * 2, expert_of=((0, 1, 2, -1), (0, 0, 1, 2)))
    source = open_checkpoint(merged.save(tmp_path / "merged.safetensors"))
    assert blocks_of(undecided_plan(source, pruning)) == (BlockPlan((0, 1), "ghost"),) * 2
    with pytest.raises(BadInputError, match=r"router rows of block 1.*profile"):
        undecided_plan(source, replace(pruning, router="slice"))


def test_an_expert_stored_in_another_dtype_needs_a_decision(tmp_path: Path) -> None:
    pico = make_pico(hidden=16, input_size=4, widths=((24, 24, 12), (24,) * 3))
    names = [f"blocks.0.moe.experts.{e}.{m}_proj.weight" for e in (0, 1) for m in ("gate", "up", "down")]
    mixed = pico.with_state(**{name: pico.state[name].bfloat16() for name in names})
    with pytest.raises(BadInputError, match="block 0 differ in size"):
        undecided_plan(opened(mixed, tmp_path), Pruning(Keep(count=2)))


@pytest.mark.parametrize(
    ("more", "said"),
    [({"shared_budget": True}, "measured errors"), ({"router": None}, "measured errors")],
    ids=str,
)
def test_what_is_replayed_needs_a_decision(more: dict[str, Any], said: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInputError, match=rf"{said}.*profile"):
        undecided_plan(checkpoint, replace(Pruning(Keep(count=2)), **more))


@pytest.mark.parametrize(
    "more",
    [{"repair": Repair()}, {"constants": True}, {"neurons": 0.5}],
    ids=str,
)
def test_what_is_packed_is_refused_before_a_profile_is_made(
    more: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    packed = quantised(checkpoint, 8, tmp_path / "packed.safetensors")
    check_pruning(packed, Pruning(Keep(count=2)))
    with pytest.raises(BadInputError, match=r"int8 already.*refit=False"):
        check_pruning(packed, Pruning(Keep(count=2), **more))


def test_a_rank_above_the_width_is_refused(checkpoint: Checkpoint) -> None:
    width = checkpoint.config.hidden_size
    check_pruning(checkpoint, Pruning(Keep(count=2), constants=True, rank=width))
    with pytest.raises(UsageError, match=rf"residual_rank {width + 1}.*{width}"):
        check_pruning(checkpoint, Pruning(Keep(count=2), constants=True, rank=width + 1))


def test_only_the_most_plain_pruning_needs_no_profile() -> None:
    plain = Pruning(Keep(count=2), "random")
    assert not plain.needs_profile
    for more in (
        {"method": "reap"},
        {"method": "naee"},
        {"router": None},
        {"shared_budget": True},
        {"repair": Repair()},
        {"constants": True},
        {"neurons": 0.9},
    ):
        assert replace(plain, **more).needs_profile, more  # type: ignore[arg-type]


def test_what_a_block_becomes_is_in_its_plan(checkpoint: Checkpoint) -> None:
    pruning = Pruning(Keep(count=3), "random", "mass", neurons=0.5, multiple=5, narrow_shared=True, rank=2)
    plan = plan_prune(checkpoint, None, replace(pruning, constants=True, repair=Repair(tokens=7)))
    keeps = blocks_of(plan_prune(checkpoint, None, Pruning(Keep(count=3), "random")))
    # half of 24 is 12, which rounds up to 15; half of the shared expert's 32 is 16, and that to 20
    assert blocks_of(plan) == tuple(BlockPlan(b.keep, "mass", (), (15,) * 3, 20, True, 2) for b in keeps)
    assert plan.stage(Experts).repair == Repair(tokens=7)
    assert plan.options == {
        "keep": "3",
        "method": "random",
        "router": "mass",
        "seed": 0,
        "neurons": 0.5,
        "multiple": 5,
        "narrow_shared": True,
        "residual_rank": 2,
        "refit_tokens": 7,
    }
    everything = plan_prune(checkpoint, None, replace(pruning, keep=Keep(ratio=1.0), constants=True))
    assert not blocks_of(everything)[0].constants and blocks_of(everything)[0].rank == 0, "there is nothing to replace"
