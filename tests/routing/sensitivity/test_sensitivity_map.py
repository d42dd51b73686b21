"""Maps as data: sums over bins, JSON there and back, and what is no map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.sensitivity.sensitivity_map import SensitivityMap, parse_map, read_map

FOUND = SensitivityMap(
    "abc",
    {"steps": 5, "images": 2, "solver": "euler", "cfg": 1.0},
    (1.0, 0.5),
    (2.0, 4.0),
    {"skip": ((0.5, 0.1), (0.25, 0.2)), "top1": ((0.0, 0.0), (0.01, 0.02))},
)


def test_errors_over_all_steps_weigh_bins_by_steps_and_size() -> None:
    """The bins have 3 and 2 of 5 steps."""
    assert FOUND.by_block("skip") == pytest.approx([(3 * 2 * 0.5 + 2 * 4 * 0.25) / 14, (6 * 0.1 + 8 * 0.2) / 14])
    assert FOUND.grouped("skip", 1) == [FOUND.by_block("skip")]
    assert FOUND.grouped("skip", 9) == [pytest.approx([0.5, 0.1]), pytest.approx([0.25, 0.2])]
    assert (FOUND.bins, FOUND.blocks) == (2, 2)


def test_a_map_shows_itself() -> None:
    assert "most without block 0.3571 in block 0" in repr(FOUND)
    assert FOUND._repr_html_().count("<svg") == 2


def test_a_map_survives_json(tmp_path: Path) -> None:
    text = json.dumps(FOUND.to_json(), sort_keys=True)
    assert parse_map(json.loads(text)) == FOUND
    (tmp_path / "s.json").write_text(text)
    assert list(read_map(tmp_path / "s.json").errors) == ["skip", "top1"]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "ditmoe.plan/1"},
        {"times": []},
        {"times": [1.0, None]},
        {"reference": [1.0]},
        {"reference": [1.0, -1.0]},
        {"errors": {}},
        {"errors": {"skip": [[0.5, 0.1]]}},
        {"errors": {"skip": [[0.5, 0.1], [0.2]]}},
        {"errors": {"skip": [[], []]}},
        {"errors": {"skip": [[True, 0.1], [0.2, 0.1]]}},
        {"errors": {"other": [[0.5, 0.1], [0.2, 0.1]]}},
        {"errors": [1]},
        {"sampling": None},
        {"sampling": {"steps": 1}},
        {"sampling": {"steps": "5"}},
    ],
    ids=str,
)
def test_what_is_no_map_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "s.json").write_text(json.dumps({**FOUND.to_json(), **change}))
    with pytest.raises(BadInputError, match=r"s\.json: is no map of sensitivity \("):
        read_map(tmp_path / "s.json")


@pytest.mark.parametrize("contents", ["", "{", "[]", "3"])
def test_other_files_are_refused(tmp_path: Path, contents: str) -> None:
    (tmp_path / "s.json").write_text(contents)
    with pytest.raises(BadInputError, match="is no map of sensitivity"):
        read_map(tmp_path / "s.json")
    with pytest.raises(BadInputError, match="no such file; make it with ditmoe report sensitivity"):
        read_map(tmp_path / "none.json")
