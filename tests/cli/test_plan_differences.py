"""What changed between two plans is told by blocks and groups of weights, neighbours that differ alike in one row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cli_helpers import here
from conftest import make_pico

from ditmoe_cli.cli.plan_differences import plan_differences
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Differences, Experts, Formats, Repair, Rounding


def told(a: CompressionPlan, b: CompressionPlan) -> list[tuple[str, str]]:
    return [(each.what, each.text) for each in plan_differences(a, b)]


def of_experts(*blocks: BlockPlan, repair: Repair | None = None) -> CompressionPlan:
    return CompressionPlan("prune", "a" * 64, "b" * 64, {"keep": "0.5"}, (Experts(blocks, repair=repair),))


def of_formats(formats: dict[str, str], rounding: Rounding | None = None) -> CompressionPlan:
    return CompressionPlan("quantize", "a" * 64, "b" * 64, {"bits": 3}, (Formats(formats, rounding),))


def test_blocks_are_told_by_what_differs_in_them() -> None:
    plain, narrow = BlockPlan((0, 2, 5), "ghost"), BlockPlan((0, 2, 6), "ghost", widths=(64, 64, 32))
    old = of_experts(plain, plain, plain, plain)
    assert told(old, of_experts(plain, plain, narrow, narrow)) == [
        ("blocks 2-3", "keeps 0 2 5; all neurons | keeps 0 2 6; widths 64 x2, 32")
    ]
    assert told(old, of_experts(plain, replace(plain, router="slice"), plain)) == [
        ("block 1", "router ghost | router slice"),
        ("block 3", "keeps 0 2 5 | not planned"),
    ]


def test_settings_are_told_in_words() -> None:
    block = BlockPlan((0,), "ghost")
    old = of_experts(block, repair=Repair(tokens=64))
    new = replace(old, profile=None, options={"keep": "0.5", "method": "ean"}, stages=(Experts((block,)),))
    assert told(old, new) == [
        ("profile", "b" * 64 + " | none"),
        ("option method", "not given | ean"),
        ("refit", "routed experts, shared expert, constant, linear map, on 64 tokens | none"),
    ]
    assert told(old, replace(old, stages=(*old.stages, Differences("svd", 0.5)))) == [("differences", "none | svd 0.5")]


def test_formats_are_counted_by_blocks_and_groups() -> None:
    names = [f"blocks.{i}.moe.experts.{e}.{m}_proj.weight" for i in range(4) for e in (0, 1) for m in ("up", "down")]
    old, new = dict.fromkeys(names, "int3-g64"), dict.fromkeys(names, "int4-g64")
    new |= {name: "int3-g64" for name in names if ".1.moe" in name} | {"final_layer.linear.weight": "int8-g64"}
    assert told(of_formats(old), of_formats(new, Rounding(tokens=512))) == [
        ("rounding", "to the nearest | gptq, on 512 tokens"),
        ("block 0 routed experts", "int3-g64 → int4-g64 (4 matrices)"),
        ("blocks 2-3 routed experts", "int3-g64 → int4-g64 (8 matrices)"),
        ("embedders", "unchanged → int8-g64 (1 matrix)"),
    ]


def test_bytes_stand_beside_plans_that_dry_runs_printed(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1, input_size=4).save(tmp_path / "a.safetensors")
    sizes = []
    for name, kind in (("a", "nf4"), ("b", "int8")):
        words = ("quantize", "a.safetensors", "--uniform", "--format", kind, "--dry-run")
        done = here(*words, cwd=tmp_path)
        (tmp_path / f"{name}.json").write_text(done.out)
        sizes.append(done.result["bytes"])
    found = here("plan", "a.json", "b.json", cwd=tmp_path).result
    assert found["bytes"] == sizes and not found["same"]
    assert {(each["a"], each["b"]) for each in found["differences"] if each["matrices"]} == {("nf4", "int8")}
    shown = here("plan", "a.json", "b.json", "--text", cwd=tmp_path).out
    assert f"{sizes[0]:,} | {sizes[1]:,}" in shown
    assert f"{sizes[0]:,} (" in here("plan", "a.json", "--text", cwd=tmp_path).out


def test_an_edited_plan_is_called_so_by_apply_inspect_and_plan(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1, input_size=4).save(tmp_path / "a.safetensors")
    words = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "--dry-run")
    document = here(*words, cwd=tmp_path).envelope
    document["result"]["plan"]["blocks"][0]["keep"] = [1, 2]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert here("plan", "plan.json", cwd=tmp_path).result["edited"]
    assert here("plan", "plan.json", cwd=tmp_path).result["bytes"] is None, "they are those of another plan"
    applied = here("apply", "a.safetensors", "--plan", "plan.json", cwd=tmp_path)
    assert applied.code == 0 and "the plan was edited since it was planned" in applied.err
    assert "(by an edited plan)" in here("inspect", applied.path, "--text", cwd=tmp_path).out
