"""Progress off a terminal and under torchrun, numbers for reading, and rows that tell the cost of sampling."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from cli_helpers import here, on_terminal
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.cli import terminal as output
from ditmoe_cli.cli.commands.fid import rows
from ditmoe_cli.cli.terminal import duration, indented, progress, rate
from ditmoe_cli.evaluation.fid_score import Score


@pytest.fixture(autouse=True)
def with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITMOE_PROGRESS")


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(output, "time", found)
    return found


def told(clock: Clock, total: int, step: int, seconds: float) -> list[str]:
    """What a job says on stderr that takes `seconds` for every `step` of its `total`."""
    with contextlib.redirect_stderr(io.StringIO()) as err, progress("sampling x", total) as done:
        for start in range(0, total, step):
            clock.now += seconds
            done(min(step, total - start))
    return err.getvalue().splitlines()


def test_a_long_job_tells_how_far_it_is_once_a_minute(clock: Clock) -> None:
    """60 images in 2 s are 30 a second: 50,000 take 28 minutes, and every minute does 1,800."""
    lines = told(clock, 50_000, 60, 2.0)
    assert lines[0] == "ditmoe: sampling x: 1,800 of 50,000, 30/s, 27 min left"
    assert lines[1] == "ditmoe: sampling x: 3,600 of 50,000, 30/s, 26 min left"
    assert lines[-2] == "ditmoe: sampling x: 48,600 of 50,000, 30/s, 47 s left"
    assert lines[-1] == "ditmoe: sampling x: done in 28 min (30/s)"
    assert len(lines) == 27 + 1


def test_steps_that_take_longer_than_a_minute_are_told_one_by_one(clock: Clock) -> None:
    lines = told(clock, 3, 1, 100.0)
    assert [line.split(": ")[2] for line in lines] == [
        "1 of 3, 0.01/s, 3 min left",
        "2 of 3, 0.01/s, 2 min left",
        "done in 5 min (0.01/s)",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(1.0, []), (12.0, ["ditmoe: sampling x: done in 48 s (0.167/s)"])])
def test_jobs_of_less_than_a_minute_tell_their_end_at_most(clock: Clock, seconds: float, said: list[str]) -> None:
    assert told(clock, 8, 2, seconds) == said


def test_a_job_that_fails_does_not_say_that_it_is_done(clock: Clock) -> None:
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(ValueError, match="broken"),
        progress("sampling x", 10),
    ):
        clock.now += 3600
        raise ValueError("broken")
    assert err.getvalue() == ""


@pytest.mark.parametrize(("rank", "lines"), [("0", 28), ("1", 0), ("7", 0)])
def test_of_several_processes_the_first_tells(
    rank: str, lines: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert len(told(clock, 50_000, 60, 2.0)) == 28, "a rank without torchrun is somebody else's variable"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert len(told(clock, 50_000, 60, 2.0)) == lines


@pytest.mark.parametrize(("switch", "lines"), [("0", 0), ("1", 28), ("", 28)])
def test_progress_can_be_switched_off(switch: str, lines: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITMOE_PROGRESS", switch)
    assert len(told(clock, 50_000, 60, 2.0)) == lines


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_draws(rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with progress("sampling x", 2) as done:
        done(2)
    assert bool(stream.getvalue()) is shown


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
