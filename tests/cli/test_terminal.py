"""Numbers for reading, and rows that tell the cost of sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import here, on_terminal
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.cli.commands.fid import rows
from ditmoe_cli.cli.terminal import indented, rate
from ditmoe_cli.evaluation.fid_score import Score
from ditmoe_cli.progress import duration


def test_numbers_for_reading() -> None:
    assert [rate(speed) for speed in (0.0123, 34.0, 999.4, 1000.0, 3.456e7)] == [
        *("0.0123/s", "34/s", "999/s", "1,000/s", "34,560,000/s")
    ]
    assert [duration(seconds) for seconds in (0.4, 99.4, 100, 5940, 6000, 36_000)] == [
        *("0 s", "99 s", "2 min", "99 min", "1.7 h", "10.0 h")
    ]


# ------------------------------------------------------------------ tables and JSON

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=9), inner, max_size=9),
    max_leaves=60,
)


@given(json_values)
def test_indented_json_is_the_same_json(value: object) -> None:
    assert json.loads(indented(value)) == value


def test_json_for_an_editor_breaks_what_is_long_and_keeps_numbers_together() -> None:
    document = {"blocks": [{"keep": list(range(40)), "router": "ghost"}, {"keep": [1], "router": "ghost"}], "a": {}}
    numbers = ", ".join(map(str, range(40)))
    assert indented(document).splitlines() == [
        "{",
        '  "a": {},',
        '  "blocks": [',
        "    {",
        f'      "keep": [{numbers}],',
        '      "router": "ghost"',
        "    },",
        '    {"keep": [1], "router": "ghost"}',
        "  ]",
        "}",
    ]


@pytest.mark.parametrize("name", ["inspect", "convert", "plan"])
def test_text_gives_the_table_off_a_terminal_too(name: str, tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    dry_run = here("prune", "a.safetensors", "--keep", 3, "--method", "random", "--no-refit", "--dry-run", cwd=tmp_path)
    (tmp_path / "plan.json").write_text(dry_run.out)
    words = (name, "plan.json" if name == "plan" else "a.safetensors")
    told = here(*words, "--text", cwd=tmp_path)
    (tmp_path / "a.converted.safetensors").unlink(missing_ok=True)
    code, screen = on_terminal(*words, cwd=tmp_path, NO_COLOR="1")
    assert told.code == code == 0
    rows = [row for row in told.out.splitlines() if not row.startswith("seconds")]
    assert rows and all(row in screen for row in rows), "beside what progress draws"
    assert here(*words, "--text", "--json", cwd=tmp_path).error(2).startswith("--json and --text exclude each other")


# ------------------------------------------------------------------ the cost of sampling


@pytest.mark.parametrize("sampled", [True, False])
def test_a_score_tells_what_its_images_cost(sampled: bool) -> None:
    sampling = {"solver": "heun", "steps": 10, "cfg": 1.5, "nfe": 38}
    conditions = {
        "extractor": {"name": "pixels"},
        "subject": {"path": "a", "sampling": sampling if sampled else None},
        "reference": {"path": "b", "sampling": {**sampling, "nfe": 7}},
        "original": {"path": "b", "sampling": None},
    }
    found = dict(rows(Score("frechet", 1.0, 8, 8, None, conditions=conditions)))
    assert found.get("solver") == ("heun, 10 steps, cfg 1.5, 38 NFE an image" if sampled else None)


def test_tables_tell_solver_and_nfe(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    settings = ("--images", 2, "--steps", 3, "--cfg", 2)
    for words in (
        ("sample", "a.safetensors", *settings),
        ("compare", "a.safetensors", "a.safetensors", *settings, "--bins", 1),
        ("fid", "a.safetensors", "--ref", "a.safetensors", "--extractor", "pixels", *settings),
    ):
        code, text = on_terminal(*words, cwd=tmp_path, NO_COLOR="1")
        assert code == 0, text
        (line,) = (line for line in text.splitlines() if line.startswith("solver"))
        assert line.split(None, 1)[1] == "ab2, 3 steps, cfg 2, 6 NFE an image"
