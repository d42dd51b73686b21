"""The ditmoe metadata and the fingerprint."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.provenance import (
    CHECKPOINT_SCHEMA,
    Card,
    Distilled,
    Provenance,
    Step,
    check_schema,
    read_provenance,
    recorded_hashes,
)

TEXT = st.text(max_size=8)
SETTINGS = st.none() | st.dictionaries(TEXT, st.integers() | TEXT, max_size=3)
OPTIONS = st.dictionaries(TEXT, st.integers() | TEXT | st.booleans(), max_size=3)
PROVENANCES = st.builds(
    Provenance,
    st.dictionaries(TEXT, st.integers() | TEXT | st.lists(st.integers(), max_size=3), max_size=4),
    st.lists(
        st.builds(Step, TEXT, TEXT, TEXT, OPTIONS, calibration=SETTINGS),
        max_size=3,
    ).map(tuple),
    st.builds(Card, st.none() | TEXT, st.integers(1, 255)),
    st.none()
    | st.builds(
        Distilled,
        TEXT,
        st.integers(1, 999),
        st.floats(0, 9),
        st.none() | TEXT,
        st.floats(-2, 2),
        st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
        TEXT,
        st.integers(0, 999),
    ),
)


@given(provenance=PROVENANCES, hashes=st.dictionaries(TEXT, TEXT, max_size=3))
def test_metadata_round_trips(provenance: Provenance, hashes: dict[str, str]) -> None:
    metadata = provenance.to_metadata(hashes)
    assert metadata["format"] == "pt"
    assert read_provenance(metadata, "x") == provenance
    assert json.loads(metadata["ditmoe"])["tensors"] == hashes


def test_the_last_calibration_is_that_of_the_newest_step_that_has_one() -> None:
    steps = (
        Step("prune", "a", "b", calibration={"cfg": 4.0}),
        Step("merge", "c", "d", calibration={"cfg": 1.5}),
        Step("quantize", "e", "f"),
    )
    assert Provenance({}, steps).calibration == {"cfg": 1.5}
    assert Provenance({}, steps[2:]).calibration is None
    assert "calibration" not in steps[2].to_json()


OWN = {"solver": "euler", "steps": 4}
TEACHERS = {"solver": "euler", "steps": 20}


@pytest.mark.parametrize(
    ("commands", "calibration"),
    [
        ([("prune", TEACHERS), ("distill", None)], None),
        ([("prune", OWN), ("distill", None)], None),
        ([("prune", TEACHERS), ("distill", TEACHERS)], None),
        ([("prune", TEACHERS), ("distill", OWN)], OWN),
        ([("distill", OWN), ("distill", None)], None),
        ([("prune", TEACHERS), ("distill", None), ("quantize", {**TEACHERS, "cfg": 1.0})], {**TEACHERS, "cfg": 1.0}),
        ([("compress", TEACHERS)], None),
        ([("compress", TEACHERS), ("quantize", {**OWN, "seed": 5})], {**OWN, "seed": 5}),
        ([("prune", TEACHERS)], None),
        ([("prune", OWN)], OWN),
    ],
)
def test_of_a_distilled_checkpoint_no_calibration_from_before_counts(
    commands: list[tuple[str, dict[str, Any] | None]], calibration: dict[str, Any] | None
) -> None:
    history = tuple(Step(name, name, "", {"steps": 4}, calibration=settings) for name, settings in commands)
    assert Provenance({}, history, distilled=Distilled("euler", 4)).calibration == calibration


def test_the_teachers_of_a_distilled_checkpoint_are_all_up_to_the_last_distilling() -> None:
    history = (
        Step("prune", "a", ""),
        Step("distill", "b", "", {"original": "a"}),
        Step("distill", "c", "", {"original": "x"}),
        Step("quantize", "d", ""),
    )
    assert Provenance({}, history, distilled=Distilled("euler", 4)).teachers == ("a", "b", "c", "x")
    assert Provenance({}, history[:2], distilled=Distilled("euler", 4)).teachers == ("a", "b")
    assert Provenance({}, history).teachers == ()
    compressed = (Step("compress", "a", "", {"steps": 4}), Step("quantize", "b", ""))
    assert Provenance({}, compressed, distilled=Distilled("euler", 4)).teachers == ("a",)
    plain = (Step("compress", "a", "", {"heal": True}),)
    assert Provenance({}, plain, distilled=Distilled("euler", 4)).teachers == ()
    assert Provenance({}, history[:1], distilled=Distilled("euler", 4)).teachers == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": 4.0},
        {"solver": None},
        {"cfg": "x"},
        {"cfg": float("inf")},
        {"guide": 5},
        {"guide_interval": [0.1]},
        {"guide_interval": None},
        {"unknown": 1},
    ],
)
def test_malformed_words_on_distilling_are_refused_by_file(changes: dict[str, Any]) -> None:
    document = json.dumps({**GOOD, "distilled": {"solver": "euler", "steps": 4, **changes}})
    with pytest.raises(BadInputError, match=r"x\.safetensors"):
        read_provenance({"ditmoe": document}, "x.safetensors")


def test_nothing_is_said_of_distilling_where_there_was_none() -> None:
    assert "distilled" not in json.loads(Provenance({}).to_metadata({})["ditmoe"])


def test_other_peoples_files_have_no_provenance() -> None:
    assert read_provenance({"format": "pt"}, "x") is None


GOOD = json.loads(Provenance({}).to_metadata({})["ditmoe"])


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        canonical_json({**GOOD, "schema": "ditmoe.checkpoint/2"}),
        canonical_json({k: v for k, v in GOOD.items() if k != "config"}),
        canonical_json({**GOOD, "config": 5}),
        canonical_json({**GOOD, "history": [{"unknown": 1}]}),
        canonical_json({**GOOD, "history": None}),
        canonical_json({**GOOD, "history": [{"command": "a", "source": "b", "plan": "c", "calibration": 5}]}),
        *(
            canonical_json({**GOOD, "history": [{"command": "a", "source": "b", "plan": "c", "experts": [fates]}]})
            for fates in ("", "0" * 11, "0x", "03", "--5", " 0")
        ),
        canonical_json({**GOOD, "card": {"unknown": 1}}),
        canonical_json({**GOOD, "card": "x"}),
    ],
)
def test_malformed_metadata_is_refused_by_file(text: str) -> None:
    with pytest.raises(BadInputError, match=r"x\.safetensors"):
        read_provenance({"ditmoe": text}, "x.safetensors")


@pytest.mark.parametrize("tensors", [5, ["x"], {"x": 5}, {"x": None}])
def test_malformed_hashes_are_refused_by_file(tensors: object) -> None:
    with pytest.raises(BadInputError, match=r"x\.safetensors"):
        recorded_hashes({"ditmoe": canonical_json({**GOOD, "tensors": tensors})}, "x.safetensors")


def test_hashes_are_those_that_were_written() -> None:
    assert recorded_hashes(Provenance({}).to_metadata({"x": "0f"}), "x.safetensors") == {"x": "0f"}
    assert recorded_hashes({"format": "pt"}, "x.safetensors") == {}
    assert recorded_hashes({"ditmoe": canonical_json({"schema": CHECKPOINT_SCHEMA})}, "x.safetensors") == {}


def test_schemas_are_checked() -> None:
    document = {"schema": CHECKPOINT_SCHEMA}
    assert check_schema(document, CHECKPOINT_SCHEMA, "x") is document
    for bad in ({}, {"schema": "other/1"}, [document], None):
        with pytest.raises(BadInputError, match=CHECKPOINT_SCHEMA):
            check_schema(bad, CHECKPOINT_SCHEMA, "x")
