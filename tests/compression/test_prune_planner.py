"""From scores to experts kept: how many, which, and what cannot be."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from compressing import folder, opened, pruned, quantised
from conftest import make_pico
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe_cli.checkpoint.writer import Output
from ditmoe_cli.compression.apply import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan
from ditmoe_cli.compression.prune.methods import METHODS
from ditmoe_cli.compression.prune.planner import (
    Keep,
    Pruning,
    best,
    kept_counts,
    parse_keep,
    plan_prune,
    undecided_plan,
)
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.profile import empty_tables

EXPERTS = 5
PICO = make_pico(hidden=16, input_size=4, widths=((24,) * EXPERTS,) * 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return opened(PICO, tmp_path_factory.mktemp("planner"))


@given(st.integers(1, 10**6), st.integers(1, 256))
def test_a_ratio_is_rounded_up_exactly(millionths: int, experts: int) -> None:
    text = f"{millionths / 10**6:.6f}"
    exact = Fraction(text) * experts
    assert parse_keep(text).of(experts) == math.ceil(exact)
    assert parse_keep(text).count is None


def test_no_ratio_of_two_digits_suffers_from_binary_fractions() -> None:
    # 0.28 * 25 is 7.000000000000001 in floating point
    for hundredths, experts in itertools.product(range(1, 101), range(1, 65)):
        text = f"{hundredths / 100:.2f}"
        assert parse_keep(text).of(experts) == math.ceil(Fraction(text) * experts), (text, experts)


@given(st.integers(1, 64).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))))
def test_a_ratio_that_means_a_whole_number_gives_it(case: tuple[int, int]) -> None:
    experts, kept = case
    assert parse_keep(repr(kept / experts) if kept < experts else "1.0").of(experts) == kept


@given(st.integers(1, 10**4), st.integers(1, 256))
def test_a_count_is_a_count_whatever_the_block_has(count: int, experts: int) -> None:
    assert parse_keep(str(count)) == Keep(count=count)
    assert parse_keep(str(count)).of(experts) == count


def test_a_decimal_point_tells_one_from_all() -> None:
    assert parse_keep("1").of(8) == 1
    assert parse_keep("1.0").of(8) == 8
    assert [str(parse_keep(text)) for text in ("4", "0.5", "1.0")] == ["4", "0.5", "1.0"]


@pytest.mark.parametrize(
    "text",
    ["", " ", "half", "0", "-1", "+0", "0.0", "-0.5", "1.5", "8.0", "nan", "inf", "-inf", "--4", "1/2", "50%", "²"],
)
def test_what_is_neither_ratio_nor_count_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--keep"):
        parse_keep(text)


@pytest.mark.parametrize("router", ["slice", "ghost"])
def test_kept_counts_follow_each_block(router: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    uneven = pruned(checkpoint, [(0, 1, 4), range(EXPERTS)], router, tmp_path / "uneven.safetensors")
    assert kept_counts(uneven, Keep(ratio=0.7)) == [3, 4]
    assert kept_counts(uneven, Keep(count=2)) == [2, 2]
    for keep in (4, 5):
        with pytest.raises(InfeasibleError, match=rf"--keep {keep}: block 0 has only 3 experts"):
            kept_counts(uneven, Keep(count=keep))


@pytest.mark.parametrize("keep", ["1", "0.1", "0.2"])
def test_keeping_fewer_than_top_k_is_infeasible(keep: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(InfeasibleError, match=rf"--keep {keep} leaves 1 of 5 experts in block 0.*top-2"):
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
    assert plan.options == {"keep": "0.5", "method": "random", "router": "slice", "seed": 7}
    scores = METHODS["random"].score(empty_tables((EXPERTS, EXPERTS)), 7)
    assert plan.blocks == tuple(BlockPlan(keep, "slice") for keep in best(scores, [3, 3]))
    assert plan.decided
    assert plan == plan_prune(checkpoint, None, Pruning(parse_keep("0.5"), "random", "slice", seed=7))
    others = {plan_prune(checkpoint, None, Pruning(Keep(count=3), "random", seed=seed)).blocks for seed in range(8)}
    assert len(others) > 4


def size(checkpoint: Checkpoint, plan: CompressionPlan, shard_bytes: int | None) -> int:
    output = Output(Path("out") if shard_bytes else Path("out.safetensors"), shard_bytes=shard_bytes or 1)
    return planned_output(checkpoint, plan).predicted_bytes(output)


@settings(max_examples=12)
@given(
    count=st.integers(2, EXPERTS),
    router=st.sampled_from(["slice", "ghost"]),
    before=st.sampled_from(["plain", "nf4", "int8", "ghosted"]),
    shard_bytes=st.none() | st.integers(1_000, 40_000),
    data=st.data(),
)
def test_an_undecided_plan_has_the_bytes_of_every_decided_one(
    count: int, router: str, before: str, shard_bytes: int | None, data: st.DataObject
) -> None:
    with folder() as where:
        source = opened(make_pico(hidden=16, input_size=4, widths=((24,) * 12,) * 2), where)
        if before in ("nf4", "int8"):
            source = quantised(source, 4 if before == "nf4" else 8, where / "packed.safetensors")
        if before == "ghosted":
            source = pruned(source, [range(1, 12), range(0, 12, 2)], "ghost", where / "ghosted.safetensors")
        pruning = Pruning(Keep(count=count), "random", router)  # type: ignore[arg-type]
        undecided = undecided_plan(source, pruning)
        assert not undecided.decided
        expected = size(source, undecided, shard_bytes)
        for seed in data.draw(st.lists(st.integers(), min_size=3, max_size=3)):
            assert size(source, plan_prune(source, None, replace(pruning, seed=seed)), shard_bytes) == expected


def test_bytes_that_depend_on_the_choice_need_a_decision(tmp_path: Path) -> None:
    pruning = Pruning(Keep(count=2))
    uneven = opened(make_pico(hidden=16, input_size=4, widths=((24, 24, 24), (24, 16, 24))), tmp_path)
    with pytest.raises(BadInputError, match=r"experts of block 1 differ in size.*--profile"):
        undecided_plan(uneven, pruning)
    # rows that share an expert go with it: how many, only the choice tells
    merged = make_pico(hidden=16, input_size=4, widths=((24,) * 3,) * 2, expert_of=((0, 1, 2, -1), (0, 0, 1, 2)))
    source = open_checkpoint(merged.save(tmp_path / "merged.safetensors"))
    assert undecided_plan(source, pruning).blocks == (BlockPlan((0, 1), "ghost"),) * 2
    with pytest.raises(BadInputError, match=r"router rows of block 1.*--profile"):
        undecided_plan(source, replace(pruning, router="slice"))


def test_an_expert_stored_in_another_dtype_needs_a_decision(tmp_path: Path) -> None:
    pico = make_pico(hidden=16, input_size=4, widths=((24, 24, 12), (24,) * 3))
    names = [f"blocks.0.moe.experts.{e}.{m}_proj.weight" for e in (0, 1) for m in ("gate", "up", "down")]
    mixed = pico.with_state(**{name: pico.state[name].bfloat16() for name in names})
    with pytest.raises(BadInputError, match="block 0 differ in size"):
        undecided_plan(opened(mixed, tmp_path), Pruning(Keep(count=2)))
