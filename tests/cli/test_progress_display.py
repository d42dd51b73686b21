"""Phases on stderr: lines off a terminal, a bar on one, by a clock that the test sets."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from ditmoe_cli.api import shown_progress
from ditmoe_cli.api.shown_progress import Pace, bytes_of, counted, looking, paced, parts_of
from ditmoe_cli.cli import progress_display as display
from ditmoe_cli.cli.app import run
from ditmoe_cli.cli.progress_display import clock, shown
from ditmoe_cli.cli.terminal import note
from ditmoe_cli.progress import BYTES, Phase, each, phase, watched_by


class Clock:
    """A clock that is set by hand; whoever looks at a phase looks when it is set."""

    now = 1000.0
    look: Callable[[], None] | None = None

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        """Let time pass, and those look who look."""
        self.now += seconds
        if self.look is not None:
            self.look()

    @contextlib.contextmanager
    def looking(self, look: Callable[[], None], every: float) -> Iterator[None]:
        assert every < 1
        self.look = look
        try:
            yield
        finally:
            self.look = None


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (display, shown_progress):
        monkeypatch.setattr(module, "time", found)
        monkeypatch.setattr(module, "looking", found.looking)
    monkeypatch.delenv("DITMOE_PROGRESS")
    return found


@contextlib.contextmanager
def seen(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "stderr", stream)
    with watched_by(shown):
        yield


def told(time: Clock, monkeypatch: pytest.MonkeyPatch, total: int, step: int, seconds: float) -> list[str]:
    """What a phase says on stderr that takes `seconds` for every `step` of its `total` images."""
    with seen(err := io.StringIO(), monkeypatch), phase("sampling x", total, "images") as progress:
        for start in range(0, total, step):
            time.wait(seconds)
            progress(min(step, total - start))
    return err.getvalue().splitlines()


# ------------------------------------------------------------------ lines


def test_a_long_phase_tells_its_start_and_then_how_far_it_is_once_a_minute(
    time: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 images in 2 s are 30 a second: 50,000 take 28 minutes."""
    lines = told(time, monkeypatch, 50_000, 60, 2.0)
    assert lines[0] == "ditmoe: sampling x: 50,000 images"
    assert lines[1] == "ditmoe: sampling x: 1,740 of 50,000 images in 60 s, 29/s, 28 min left"
    assert lines[-1] == "ditmoe: sampling x: done in 28 min (30/s)"
    assert len(lines) == 1 + 27 + 1


def test_one_long_step_is_told_by_the_clock(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three blocks takes five minutes: a line a minute, with the part under way and no guess."""
    with seen(err := io.StringIO(), monkeypatch), phase("refitting x", 3, "blocks") as progress:
        with phase("solving", 9, "systems") as part:
            for _ in range(5):
                time.wait(60)
                part(1)
        progress(1)
        time.wait(60)
    assert err.getvalue().splitlines() == [
        "ditmoe: refitting x: 0 of 3 blocks (solving: 0 of 9 systems) in 60 s",
        "ditmoe: refitting x: 0 of 3 blocks (solving: 1 of 9 systems) in 2 min",
        "ditmoe: refitting x: 0 of 3 blocks (solving: 2 of 9 systems) in 3 min",
        "ditmoe: refitting x: 0 of 3 blocks (solving: 3 of 9 systems) in 4 min",
        "ditmoe: refitting x: 0 of 3 blocks (solving: 4 of 9 systems) in 5 min",
        "ditmoe: refitting x: 1 of 3 blocks in 6 min, 6 min each, 12 min left",
        "ditmoe: refitting x: done in 6 min (6 min each)",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.9, []),
        (1.1, ["ditmoe: sampling x: 64 images"]),
        (9.0, ["ditmoe: sampling x: 64 images", "ditmoe: sampling x: done in 9 s (7.1/s)"]),
    ],
)
def test_a_short_phase_is_quiet(seconds: float, said: list[str], time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(time, monkeypatch, 64, 64, seconds) == said


def test_a_phase_that_fails_does_not_say_that_it_is_done(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="broken"), seen(err := io.StringIO(), monkeypatch), phase("sampling x"):
        time.wait(30)
        raise ValueError("broken")
    assert err.getvalue() == "ditmoe: sampling x\n"


def test_what_an_earlier_run_did_is_told_and_not_part_of_the_pace(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with seen(err := io.StringIO(), monkeypatch), phase("refitting x", 28, "blocks", start=12) as progress:
        time.wait(2)
        time.wait(38)
        progress(1)
        time.wait(20)
        time.wait(0)
    assert err.getvalue().splitlines() == [
        "ditmoe: refitting x: 28 blocks, 12 of them done before",
        "ditmoe: refitting x: 13 of 28 blocks in 60 s, 60 s each, 15 min left",
        "ditmoe: refitting x: done in 60 s (60 s each)",
    ]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize(
    ("rank", "elastic", "switch", "shows"),
    [
        ("0", True, "1", True),
        ("1", True, "1", False),
        ("7", True, "", False),
        ("1", False, "", True),
        ("0", False, "0", False),
    ],
)
def test_of_several_processes_the_first_shows_progress_unless_it_is_off(
    rank: str,
    elastic: bool,
    switch: str,
    shows: bool,
    stream: type[io.StringIO],
    time: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank without torchrun is somebody else's variable."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("DITMOE_PROGRESS", switch)
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with seen(err := stream(), monkeypatch), phase("sampling x", 2, "images"):
        time.wait(3)
    assert bool(err.getvalue()) is shows


def test_a_closed_stderr_does_not_end_the_work(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with seen(Gone(), monkeypatch), phase("sampling x", 1) as progress:
        time.wait(61)
        progress(1)
    assert progress.done == 1


# ------------------------------------------------------------------ bars


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, ValueError])
def test_a_bar_shows_the_part_and_is_wiped_off(
    ends: type[BaseException] | None, time: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Terminal()
    with (
        pytest.raises(ends) if ends else contextlib.nullcontext(),
        seen(screen, monkeypatch),
        phase("refitting x", 4, "blocks") as progress,
    ):
        time.wait(0.3)
        assert screen.getvalue() == "", "a moment is not worth a bar"
        with phase("solving", 9, "systems") as part:
            part(2)
            time.wait(80)
            drawn = screen.getvalue()
        assert "refitting x" in drawn and "0 of 4 blocks  1:20" in drawn and "solving: 2 of 9 systems" in drawn
        progress(1)
        time.wait(0)
        assert "1 of 4 blocks  80 s each  1:20  4 min left" in screen.getvalue()
        if ends:
            raise ends
    assert screen.getvalue().endswith("\033[2K\033[1A\033[2K") or screen.getvalue().endswith("\033[2K"), "wiped off"
    assert "\033[?25h" in screen.getvalue(), "the cursor shows again"


def test_what_is_printed_beside_a_bar_goes_where_it_belongs(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes stand on lines of their own above the bar; results stay on stdout, which may be a pipe."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with seen(screen, monkeypatch), phase("refitting x", 4, "blocks"):
        time.wait(2)
        note("going on with block 2")
        sys.stdout.write("result\n")
        time.wait(1)
    assert pipe.getvalue() == "result\n"
    (line,) = (line for line in screen.getvalue().splitlines() if "going on with block 2" in line)
    assert line.split("\033")[-1].split("K")[-1].strip("\r ") == "ditmoe: going on with block 2"
    assert sys.stderr is screen, "the stream is the same again"


def test_an_interrupt_amid_a_counted_phase_leaves_the_terminal_clean(
    time: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error keeps the phase alive until it is handled: what is said meanwhile stands above the bar that goes."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    def work() -> None:
        scores = each([1, 2], "scoring x", "scores")
        for _ in scores:
            time.wait(2)
            note("kept 1 of 2 scores; the same command goes on from there")
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setattr("ditmoe_cli.cli.app.load_program", lambda: Interrupted(work))
    assert run([]) == 130
    drawn = screen.getvalue()
    assert "scoring x" in drawn and drawn.count("\033[?25l") == drawn.count("\033[?25h") == 1
    said = [line.split("K")[-1].strip("\r ") for line in drawn.splitlines() if "ditmoe:" in line]
    assert said == [*("ditmoe: kept 1 of 2 scores; the same command goes on from there", "ditmoe: error: interrupted")]
    assert "scoring x" not in drawn.split("\033[2K")[-1], "nothing of the bar is left"
    assert sys.stderr is screen and time.look is None


class Interrupted:
    """A program whose one command does some work."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def make_context(self, _name: str, _arguments: list[str]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def invoke(self, _: None) -> None:
        self.work()


# ------------------------------------------------------------------ words


def test_bytes_are_told_in_the_unit_of_the_whole() -> None:
    assert counted(Phase("reading", 33_000_000_000, BYTES, done=12_340_000_000)) == "12.3 of 33.0 GB"
    assert [bytes_of(1, total) for total in (500, 5000, 5e6, 5e12)] == [
        *("1 of 500 B", "0.0 of 5.0 kB", "0.0 of 5.0 MB", "0.0 of 5000.0 GB")
    ]
    assert counted(Phase("sampling", 50_000, "images", done=1800)) == "1,800 of 50,000 images"
    assert counted(Phase("loading torch")) == ""


def test_paces_are_told_as_people_say_them() -> None:
    assert [paced(rate, "images") for rate in (None, 0.025, 1.5, 30.4, 1800.0)] == [
        *("", "40 s each", "1.5/s", "30/s", "1,800/s")
    ]
    assert paced(212e6, BYTES) == "212.00 MB/s"
    assert [clock(seconds) for seconds in (0.9, 80, 3620)] == ["0:00", "1:20", "1:00:20"]


def test_parts_are_named_from_the_outer_to_the_inner() -> None:
    inner = Phase("solving", 9, "systems", done=3)
    assert parts_of(Phase("refitting", 3, "blocks", inner=Phase("expert 2", inner=inner))) == (
        "expert 2, solving: 3 of 9 systems"
    )
    assert parts_of(Phase("refitting", 3, "blocks")) == ""


def test_time_left_follows_parts_and_counts_down_between_steps() -> None:
    """A quarter of the work in 10 s leaves 30 s; 4 s later, with nothing done meanwhile, 26 s."""
    work = Phase("refitting", 2, "blocks")
    pace = Pace(work, 100.0)
    assert pace.left(105.0) is None
    work.inner = Phase("solving", 4, "systems", share=1.0, done=2)
    pace.look(110.0)
    assert pace.left(110.0) == pytest.approx(30.0)
    assert pace.left(114.0) == pytest.approx(26.0)
    assert pace.left(200.0) == 0.0
    assert pace.rate() is None, "no whole block yet"


# ------------------------------------------------------------------ the thread, and the program


def test_a_thread_looks_until_the_phase_ends() -> None:
    twice = Event()
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 2:
            twice.set()

    with looking(look, 0.001):
        assert twice.wait(60)
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_the_program_is_watched(tmp_path: Path, time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs under the display; outside of it phases are silent."""
    begun: list[str] = []

    @contextlib.contextmanager
    def watcher(work: Phase) -> Iterator[None]:
        begun.append(work.title)
        yield

    monkeypatch.setattr("ditmoe_cli.cli.app.shown", watcher)
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(["convert", "demo:digits", "-o", str(tmp_path / "copy.safetensors")]) == 0
    assert "writing copy.safetensors" in begun
    assert time.look is None
