"""Plans as data: read back as written, refused with the field's name, compared line by line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe_cli.cli.plan_differences import plan_differences
from ditmoe_cli.compression.plan import (
    STAGE_SCHEMA,
    BlockPlan,
    CompressionPlan,
    Differences,
    Experts,
    Formats,
    PlanStage,
    Repair,
    Retraining,
    Rounding,
    parse_plan,
    read_plan,
)
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.registry import FORMATS

PIECES = "rows:int4-g64*64+int2-g64*192"
names = st.text(min_size=1, max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def blocks(draw: st.DrawFn) -> BlockPlan:
    experts = draw(st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True))
    keep = sorted(experts[: draw(st.integers(1, len(experts)))])
    merged = draw(st.sets(st.sampled_from(others))) if (others := experts[len(keep) :]) else ()
    widths = st.lists(st.integers(1, 4096), min_size=len(keep), max_size=len(keep))
    return BlockPlan(
        keep=tuple(keep),
        router=draw(st.sampled_from(["slice", "ghost", "mass"])),
        merged=tuple((expert, draw(st.sampled_from(keep))) for expert in sorted(merged)),
        widths=tuple(draw(st.just([]) | widths)),
        shared_width=draw(st.none() | st.integers(1, 4096)),
        constants=draw(st.booleans()),
        rank=draw(st.integers(0, 64)),
    )


repairs = st.builds(
    Repair,
    scale=st.booleans(),
    shared=st.booleans(),
    constant=st.booleans(),
    linear=st.booleans(),
    tokens=st.integers(0, 10**6),
)
roundings = st.builds(Rounding, tokens=st.integers(0, 10**6), smoothing=st.floats(0, 1))
differences = st.builds(Differences, st.sampled_from(["svd", "ternary"]), st.floats(0, 1, exclude_min=True))
retrainings = st.builds(Retraining, minutes=st.floats(0.1, 1e6), seed=st.integers(0, 2**63)) | st.builds(
    Retraining, steps=st.integers(1, 10**9), seed=st.integers(0, 2**63)
)
experts = st.builds(
    Experts,
    blocks=st.lists(blocks(), max_size=4).map(tuple),
    merging=st.none() | names,
    repair=st.none() | repairs,
)
formats = st.builds(
    Formats,
    formats=st.dictionaries(names, st.sampled_from([*FORMATS, PIECES]), max_size=4),
    rounding=st.none() | roundings,
    ordering=st.sampled_from([None, "camera"]),
)
plans = st.builds(
    CompressionPlan,
    command=st.from_regex(r"[a-z-]+", fullmatch=True),
    source=names,
    profile=st.none() | names,
    options=st.dictionaries(names, json_values, max_size=4),
    calibration=st.none() | st.dictionaries(names, json_values, max_size=2),
    stages=st.tuples(  # a stage that does nothing leaves no trace in JSON
        st.none() | experts.filter(lambda stage: stage != Experts()),
        st.none() | differences,
        st.none() | formats.filter(lambda stage: stage != Formats()),
        st.none() | retrainings,
    ).map(lambda stages: tuple(stage for stage in stages if stage is not None)),
)

PRUNED = Experts((BlockPlan((0, 2), "ghost"), BlockPlan((1, 3), "slice")))
QUANTISED = Formats({"blocks.0.attn.qkv.weight": "nf4"})
EXAMPLE = CompressionPlan(
    command="prune",
    source="a" * 64,
    profile="b" * 64,
    options={"keep": "0.5"},
    stages=(PRUNED, QUANTISED),
)


def changed(**fields: Any) -> dict[str, Any]:
    return {**EXAMPLE.to_json(), **fields}


@settings(max_examples=10)
@given(plans)
def test_a_plan_survives_json_and_an_editor(plan: CompressionPlan) -> None:
    edited = json.loads(json.dumps(plan.to_json(), indent=4, sort_keys=True))
    again = parse_plan(edited, "a plan")
    assert again == plan
    assert again.digest == plan.digest
    assert plan_differences(plan, again) == []


@given(plans)
def test_a_plan_is_signed_by_its_planner(plan: CompressionPlan) -> None:
    again = parse_plan(json.loads(json.dumps(plan.document())), "a plan")
    assert again == plan and not again.edited
    assert again.document() == plan.document()
    unsigned = parse_plan(plan.to_json(), "a plan")
    assert unsigned == plan and not unsigned.edited


@given(plans, plans)
def test_a_plan_that_was_changed_is_called_edited(plan: CompressionPlan, other: CompressionPlan) -> None:
    edited = parse_plan({**other.to_json(), "digest": plan.digest}, "a plan")
    assert edited.edited == (plan.digest != other.digest)
    assert parse_plan(edited.document(), "a plan").edited == edited.edited, "also after it was printed"


def test_fields_that_nobody_knows_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"^a plan: unknown field 'formts'"):
        parse_plan(changed(formts={}), "a plan")
    with pytest.raises(BadInputError, match=r"^a plan: field 'digest' is 7; expected a string"):
        parse_plan(changed(digest=7), "a plan")


@given(plans)
def test_the_digest_ignores_the_order_in_which_a_plan_was_put_together(plan: CompressionPlan) -> None:
    stages = tuple(
        replace(stage, formats=dict(reversed(stage.formats.items()))) if isinstance(stage, Formats) else stage
        for stage in plan.stages
    )
    shuffled = replace(plan, options=dict(reversed(plan.options.items())), stages=stages)
    assert shuffled.digest == plan.digest


@given(plans, plans)
def test_a_difference_is_found_exactly_where_there_is_one(a: CompressionPlan, b: CompressionPlan) -> None:
    assert bool(plan_differences(a, b)) == (a != b)
    assert (a.digest == b.digest) == (
        json.dumps(a.to_json(), sort_keys=True) == json.dumps(b.to_json(), sort_keys=True)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"command": "merge"},
        {"source": "c" * 64},
        {"profile": None},
        {"options": {}},
        {"calibration": {"cfg": 1.5}},
        {"stages": (Experts((BlockPlan((0, 2), "ghost"), BlockPlan((1, 2), "slice"))), QUANTISED)},
        {"stages": (Experts((BlockPlan((0, 2), "slice"), BlockPlan((1, 3), "slice"))), QUANTISED)},
        *(
            {"stages": (Experts((PRUNED.blocks[0], replace(PRUNED.blocks[1], **change))), QUANTISED)}
            for change in (
                {"merged": ((0, 1),)},
                {"widths": (8, 16)},
                {"shared_width": 8},
                {"constants": True},
                {"rank": 2},
            )
        ),
        {"stages": (PRUNED, Formats({"blocks.0.attn.qkv.weight": "int8"}))},
        {"stages": (replace(PRUNED, merging="m-smoe"), QUANTISED)},
        {"stages": (replace(PRUNED, repair=Repair()), QUANTISED)},
        {"stages": (PRUNED, Differences("svd", 0.5), QUANTISED)},
        {"stages": (PRUNED, replace(QUANTISED, rounding=Rounding()))},
        {"stages": (PRUNED, replace(QUANTISED, ordering="camera"))},
    ],
)
def test_every_part_of_a_plan_enters_its_digest(change: dict[str, Any]) -> None:
    other = replace(EXAMPLE, **change)
    assert other.digest != EXAMPLE.digest
    assert len(plan_differences(EXAMPLE, other)) == 1


@pytest.mark.parametrize("stages", [(QUANTISED, PRUNED), (PRUNED, PRUNED), (QUANTISED, Differences("svd", 0.5))])
def test_stages_that_this_schema_has_no_place_for_are_refused(stages: tuple[PlanStage, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"^ditmoe\.plan/1 holds experts, differences, formats and retraining, once each, in this"
    ):
        CompressionPlan("prune", "a" * 64, stages=stages)


def test_a_plan_gives_its_stages_by_type() -> None:
    assert EXAMPLE.stage(Experts) is PRUNED and EXAMPLE.stage(Formats) is QUANTISED
    with pytest.raises(LookupError, match="Differences"):
        EXAMPLE.stage(Differences)


@pytest.mark.parametrize("field", ["command", "source", "profile", "options", "blocks", "formats"])
def test_a_missing_field_is_named(field: str) -> None:
    document = EXAMPLE.to_json()
    del document[field]
    with pytest.raises(BadInputError, match=rf"^my\.json: .*'{field}'"):
        parse_plan(document, "my.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("command", None),
        ("command", 5),
        ("source", None),
        ("source", ["a"]),
        ("profile", 5),
        ("profile", {}),
        ("options", None),
        ("options", []),
        ("options", "keep"),
        ("options", {"keep": float("nan")}),
        ("calibration", 5),
        ("calibration", {"cfg": float("nan")}),
        ("blocks", None),
        ("blocks", {}),
        ("blocks", "01"),
        ("blocks", 2),
        ("formats", None),
        ("formats", []),
        ("formats", "nf4"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(field: str, value: object) -> None:
    with pytest.raises(BadInputError, match=rf"^my\.json: .*{field}"):
        parse_plan(changed(**{field: value}), "my.json")


@pytest.mark.parametrize(
    "keep",
    [None, 3, "01", [], [-1, 0], [2, 1], [1, 1], [0, "1"], [0, 1.0], [False, True], {"0": 1}],
)
def test_experts_that_are_no_ascending_numbers_are_refused_by_block(keep: object) -> None:
    document = changed(blocks=[{"keep": [0, 1], "router": "ghost"}, {"keep": keep, "router": "ghost"}])
    with pytest.raises(BadInputError, match=r"^my\.json: .*block 1"):
        parse_plan(document, "my.json")


@pytest.mark.parametrize("block", [None, 5, "keep", [], {}, {"keep": [0, 1]}, {"router": "ghost"}])
def test_a_block_that_is_no_block_is_refused_by_number(block: object) -> None:
    document = changed(blocks=[{"keep": [0, 1], "router": "ghost"}, block])
    with pytest.raises(BadInputError, match=r"^my\.json: .*block 1"):
        parse_plan(document, "my.json")


@pytest.mark.parametrize("router", [None, "", "auto", "Mass", "Ghost", 0, ["ghost"]])
def test_an_unknown_router_mode_is_refused_by_block(router: object) -> None:
    document = changed(blocks=[{"keep": [0, 1], "router": router}])
    with pytest.raises(BadInputError, match=r"^my\.json: block 0: field 'router'"):
        parse_plan(document, "my.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"merged": 1},
        {"merged": [1, 0]},
        {"merged": [[1]]},
        {"merged": [[1, 3]]},
        {"merged": [[2, 0]]},
        {"merged": [[1, 0], [1, 2]]},
        {"merged": [[-1, 0]]},
        {"merged": [["1", 0]]},
        {"widths": 8},
        {"widths": [8]},
        {"widths": [8, 0]},
        {"widths": [8, 8.0]},
        {"shared_width": -1},
        {"shared_width": True},
        {"constants": 1},
        {"constants": None},
        {"rank": -1},
        {"rank": "2"},
        {"ranks": 2},
    ],
    ids=str,
)
def test_what_a_block_cannot_become_is_refused_by_block_and_field(fields: dict[str, object]) -> None:
    document = changed(blocks=[{"keep": [0, 2], "router": "ghost", **fields}])
    (field,) = fields
    with pytest.raises(BadInputError, match=rf"^my\.json: block 0: .*'{field}'"):
        parse_plan(document, "my.json")


@pytest.mark.parametrize(
    "repair",
    [
        5,
        "refit",
        [],
        {},
        {"shared": True},
        {**asdict(Repair()), "more": 1},
        {**asdict(Repair()), "shared": 1},
        {**asdict(Repair()), "linear": None},
        {**asdict(Repair()), "tokens": -1},
        {**asdict(Repair()), "tokens": True},
        {**asdict(Repair()), "tokens": 1.5},
    ],
    ids=str,
)
def test_a_repair_that_is_none_is_refused(repair: object) -> None:
    with pytest.raises(BadInputError, match=r"^my\.json: field 'repair'"):
        parse_plan(changed(repair=repair), "my.json")


@pytest.mark.parametrize("merging", [5, ["m-smoe"], {}])
def test_a_merging_that_is_no_name_is_refused(merging: object) -> None:
    with pytest.raises(BadInputError, match=r"^my\.json: field 'merging'"):
        parse_plan(changed(merging=merging), "my.json")


@pytest.mark.parametrize("ordering", [5, "energy", ["camera"], True])
def test_an_ordering_that_is_none_is_refused(ordering: object) -> None:
    with pytest.raises(BadInputError, match=r"^my\.json: field 'ordering' .* one of null, camera"):
        parse_plan(changed(ordering=ordering), "my.json")


def test_plans_of_an_older_version_compute_nothing() -> None:
    document = EXAMPLE.to_json()
    for field in ("merging", "repair", "delta", "rounding", "ordering"):
        del document[field]
    assert parse_plan(document, "old.json") == EXAMPLE
    assert not EXAMPLE.computes


@pytest.mark.parametrize("fmt", [None, "NF4", "int4", "int7-g64", 4, ["nf4"]])
def test_an_unknown_format_is_refused_by_weight(fmt: object) -> None:
    with pytest.raises(BadInputError, match=r"^my\.json: format of some\.weight .*nf4, int8"):
        parse_plan(changed(formats={"some.weight": fmt}), "my.json")


@pytest.mark.parametrize("fmt", ["rows:nf4*4+nf4*4", "rows:int4-g64*4", "int4-g64*4+int2-g64*4:rows"])
def test_unknown_pieces_are_refused_by_weight(fmt: str) -> None:
    with pytest.raises(BadInputError, match=r"^my\.json: format of some\.weight .*two or more pieces"):
        parse_plan(changed(formats={"some.weight": fmt}), "my.json")


@pytest.mark.parametrize("document", [None, [], "plan", 5, {}, {"schema": "ditmoe.plan/2"}])
def test_what_is_no_plan_of_this_version_is_refused(document: object) -> None:
    with pytest.raises(BadInputError, match=r"^my\.json: .*ditmoe\.plan/1"):
        parse_plan(document, "my.json")


def test_a_plan_file_may_be_the_output_of_a_dry_run(tmp_path: Path) -> None:
    bare, enveloped = tmp_path / "plan.json", tmp_path / "stage.json"
    bare.write_text(json.dumps(EXAMPLE.to_json()))
    enveloped.write_text(json.dumps({"schema": STAGE_SCHEMA, "result": {"plan": EXAMPLE.to_json(), "bytes": 5}}))
    assert read_plan(bare) == read_plan(enveloped) == EXAMPLE


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"null",
        json.dumps({"schema": STAGE_SCHEMA}).encode(),
        json.dumps({"schema": STAGE_SCHEMA, "result": None}).encode(),
        json.dumps({"schema": STAGE_SCHEMA, "result": {"plan": None}}).encode(),
        json.dumps({"schema": STAGE_SCHEMA, "result": [1]}).encode(),
    ],
)
def test_a_file_without_a_plan_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"plan\.json: "):
        read_plan(path)


def test_a_missing_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nowhere\.json: no such file"):
        read_plan(tmp_path / "nowhere.json")
    with pytest.raises(BadInputError):
        read_plan(tmp_path)


@given(plans, st.booleans())
def test_only_a_plan_that_says_so_is_undecided(plan: CompressionPlan, undecided: bool) -> None:
    options = {key: value for key, value in plan.options.items() if key != "undecided"}
    if undecided:
        options["undecided"] = True
    assert replace(plan, options=options).decided is not undecided


@pytest.mark.parametrize("stage", [Retraining(minutes=2.5), Retraining(steps=100, seed=7)])
def test_retraining_is_read_as_it_was_written(stage: Retraining) -> None:
    plan = CompressionPlan("compress", "0" * 64, stages=(stage,))
    assert parse_plan(plan.to_json(), "here").stages == (stage,)
    assert parse_plan(plan.to_json(), "here").retraining == stage


@pytest.mark.parametrize(
    "value",
    [
        3,
        {},
        {"minutes": 0, "steps": None, "seed": 0},
        {"minutes": None, "steps": 0, "seed": 0},
        {"minutes": 1, "steps": 1, "seed": 0},
        {"minutes": None, "steps": None, "seed": 0},
        {"minutes": True, "steps": None, "seed": 0},
        {"minutes": float("inf"), "steps": None, "seed": 0},
        {"minutes": 1, "steps": None, "seed": "x"},
        {"minutes": 1, "steps": None},
    ],
)
def test_malformed_retraining_is_refused(value: object) -> None:
    document = {**CompressionPlan("compress", "0" * 64).to_json(), "retraining": value}
    with pytest.raises(BadInputError, match=r"^here: field 'retraining' is"):
        parse_plan(document, "here")


def test_plans_without_retraining_have_the_digest_that_they_had() -> None:
    assert "retraining" not in CompressionPlan("prune", "0" * 64).to_json()
