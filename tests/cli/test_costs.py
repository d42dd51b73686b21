"""What a stage tells of its cost: experts, widths, formats by group, errors; and a step of a history in one line."""

from __future__ import annotations

from itertools import pairwise

import pytest
from compressing import opened
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.api.plan_facts import formats_by_group
from ditmoe_cli.api.step_texts import step_text
from ditmoe_cli.cli.costs import block_text, blockwise, error_rows, in_runs, plan_rows, range_text, widths_text
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Repair, Rounding
from ditmoe_cli.files.provenance import Step


@given(st.sets(st.integers(0, 200)))
def test_runs_hold_the_same_numbers(numbers: set[int]) -> None:
    text = in_runs(sorted(numbers))
    found = [range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1) for run in text.split()]
    assert [number for run in found for number in run] == sorted(numbers)
    assert all(a.stop < b.start for a, b in pairwise(found)), "runs are joined"


def test_numbers_and_widths_are_told_compactly() -> None:
    assert in_runs([0, 2, 3, 4, 7]) == "0 2-4 7"
    assert widths_text([128, 128, 64]) == "128 x2, 64"
    assert widths_text([16, 8] * 9) == "8 to 16, 12 on average"


def test_what_becomes_of_a_block() -> None:
    plain = BlockPlan((0, 2, 3), "ghost")
    assert block_text(plain, 8) == "keeps 0 2-3 of 8; router ghost"
    assert block_text(plain, None) == "keeps 0 2-3; router ghost"
    assert block_text(BlockPlan((0, 1), "mass", widths=(64, 64), shared_width=32), 2) == (
        "keeps all of 2; widths 64 x2; shared expert 32"
    )
    assert block_text(BlockPlan((0, 3), "slice", merged=((1, 0), (2, 3), (4, 0))), 5) == (
        "keeps 0 3 of 5; merges 1 4 into 0; merges 2 into 3; router slice"
    )
    assert block_text(BlockPlan((0,), "ghost", constants=True, rank=4), 2) == (
        "keeps 0 of 2; constants of rank 4; router ghost"
    )


def test_neighbouring_blocks_that_are_alike_take_one_row() -> None:
    assert blockwise(["a", "a", "b", "a"]) == [("blocks 0-1", "a"), ("block 2", "b"), ("block 3", "a")]


FORMATS = {
    "blocks.0.moe.experts.0.up_proj.weight": "int3-g64",
    "blocks.0.moe.experts.1.up_proj.weight": "int4-g64",
    "blocks.1.moe.experts.0.up_proj.weight": "int3-g64",
    "blocks.1.moe.shared_experts.up_proj.weight": "rows:int4-g64*64+int2-g64*192",
    "blocks.1.attn.qkv.weight": "int6-g64",
    "final_layer.linear.weight": "int8-g64",
}


def test_formats_are_counted_by_group_and_by_block() -> None:
    plan = CompressionPlan("quantize", "a" * 64, stages=(Formats(FORMATS, Rounding("gptq", 512)),))
    assert plan_rows(plan) == [
        ("routed experts", "int3-g64 x2, int4-g64 x1"),
        ("shared experts", "rows:int4-g64+int2-g64 x1"),
        ("attention", "int6-g64 x1"),
        ("embedders", "int8-g64 x1"),
        ("rounding", "gptq, on 512 tokens"),
    ]
    assert plan_rows(plan, by_block=True) == [
        ("block 0", "routed experts int3-g64 x1, int4-g64 x1"),
        ("block 1", "routed experts int3-g64 x1; shared experts rows:int4-g64+int2-g64 x1; attention int6-g64 x1"),
        ("outside blocks", "embedders int8-g64 x1"),
        ("rounding", "gptq, on 512 tokens"),
    ]


def test_with_the_checkpoint_every_matrix_is_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = opened(make_pico(), tmp_path_factory.mktemp("pico"))
    counts = formats_by_group({"blocks.0.attn.qkv.weight": "int6-g64"}, checkpoint)
    assert counts["attn"] == {"int6-g64": 1, "F32": 3}
    assert sum(map(sum, (each.values() for each in counts.values()))) == sum(
        1
        for weight in checkpoint.weights.values()
        if formats_by_group({weight.info.name: "nf4"}, None) and len(weight.info.shape) == 2
    )


def test_refits_and_errors_are_told_by_their_range_and_worst_block() -> None:
    assert range_text([0.5, 0.5], 0) == "0.5 in each block"
    assert range_text([0.9999, 1.0], 0) == "1 in each block", "no range from 1 to 1"
    assert range_text([0.25], 0) == "0.25"
    facts = {
        "refit_error": [0.01, 0.25, 0.02],
        "top_k_agreement": [1.0, 0.9, 0.95],
        "predicted_error": 0.001,
        "tried_error": 0.0012,
        "prediction_error": 0.0009,
        "gap": 1e-5,
        "solver": "cbc",
    }
    assert error_rows(facts) == [
        ("refit error", "0.01 to 0.25, worst in block 1 (held out, of that before)"),
        ("prediction error", "predicted 0.001, tried 0.0012, after rounding 0.0009, gap 1e-05 by cbc"),
        ("top-k agreement", "0.9 to 1, worst in block 1"),
    ]
    assert error_rows({}) == []
    pruned = CompressionPlan(
        "prune", "a" * 64, stages=(Experts((BlockPlan((0,), "ghost"),), repair=Repair(tokens=64)),)
    )
    assert plan_rows(pruned)[-1] == ("refit", "routed experts, shared expert, constant, linear map, on 64 tokens")


def test_a_step_is_told_as_the_command_that_made_it() -> None:
    options = {"keep": "0.5", "method": "reap", "constants": True, "floor": ["attn=4", "shared=3"]}
    step = Step("prune", "a", "b", options, {"refit_error": ["3.000e-02", "4.000e-02"], "gap": ["1.000e-05"]})
    assert step_text(step) == (
        "prune ⟨keep⟩ 0.5 ⟨method⟩ reap ⟨constants⟩ ⟨floor⟩ attn=4 ⟨floor⟩ shared=3, refit error 0.03 to 0.04"
    )
    assert step_text(Step("quantize", "a", "b", edited=True)) == "quantize (by an edited plan)"
