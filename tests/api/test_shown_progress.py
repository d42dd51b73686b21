"""Phases as Python users see them: bars of tqdm where these can be drawn, else lines, or nothing."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from cli_helpers import _Terminal as Terminal

from ditmoe_cli.api import shown_progress
from ditmoe_cli.api.shown_progress import NotebookBar, shown_to_users
from ditmoe_cli.progress import BYTES, Phase, phase, watched_by

tqdm = pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DITMOE_PROGRESS", raising=False)
    monkeypatch.setattr(shown_progress, "SECONDS_BEFORE_A_BAR", 0.0)
    yield


def test_a_bar_follows_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    work = Phase("working", 4, "blocks", start=1, done=1)
    bar = NotebookBar(work)
    bar.look()
    assert bar.bar.total == 4 and bar.bar.n == bar.bar.initial == 1 and bar.bar.desc.startswith("working")
    work(2)
    work.inner = Phase("refitting", 3, "systems")
    bar.look()
    assert bar.bar.n == 3 and "refitting: 0 of 3 systems" in screen.getvalue()
    bar.end()
    assert "3/4" in screen.getvalue()


def test_bytes_are_counted_in_large_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = NotebookBar(Phase("reading", 5_000_000, BYTES, done=2_500_000))
    bar.look()
    assert "2.50M/5.00M" in str(bar.bar)
    bar.end()


@pytest.mark.parametrize(("stream", "drawn"), [(Terminal, True), (io.StringIO, False)])
def test_bars_are_drawn_on_terminals_alone(
    stream: type[io.StringIO], drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    seen: list[object] = []
    monkeypatch.setattr(NotebookBar, "end", lambda self: seen.append(self))
    with watched_by(shown_to_users), phase("working", 2):
        pass
    assert bool(seen) is drawn


def test_lines_stand_in_where_there_is_no_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(shown_progress, "find_spec", lambda _: None)
    monkeypatch.setattr(NotebookBar, "__init__", lambda *_: pytest.fail("a bar"))
    with watched_by(shown_to_users), phase("working"):
        pass


def test_nothing_is_shown_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITMOE_PROGRESS", "0")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with watched_by(shown_to_users), phase("working", 2):
        pass
    assert screen.getvalue() == ""
