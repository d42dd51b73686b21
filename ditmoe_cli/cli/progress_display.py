"""How phases are shown on stderr: a live bar on a terminal; off one a line when a phase begins, and one a minute.

Both follow the clock, not the work, so that a step which takes an hour still shows what is under way: a thread looks at
the phase (`ditmoe_cli.progress.Phase`) and draws. Phases of less than a second show nothing. Of torchrun's processes
only the first shows any, and with DITMOE_PROGRESS=0 none does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, TextIO

from ditmoe_cli.cli.terminal import uses_colour
from ditmoe_cli.files.cleanup import Undoing
from ditmoe_cli.processes import first_process
from ditmoe_cli.progress import BYTES, Phase, duration, human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_LEAST_SECONDS = 5  # of a phase whose end is worth a line
_SECONDS_BETWEEN = 60  # lines of a phase that lasts
_SECONDS_BEFORE_A_LINE = 1.0
_SECONDS_BEFORE_A_BAR = 0.5
_SECONDS_BETWEEN_LOOKS = 0.25


class Pace:
    """How fast a phase goes: what was done since it began, over the time that it took."""

    def __init__(self, phase: Phase, now: float) -> None:
        self.phase, self.start, self.at = phase, now, now
        self._first = self._last = phase.fraction

    def look(self, now: float) -> None:
        """Note when the phase was last seen to get on."""
        if self.phase.fraction != self._last:
            self._last, self.at = self.phase.fraction, now

    def left(self, now: float) -> float | None:
        """Return the seconds that the rest takes at the pace so far, counting down between steps; None before one."""
        gone = self._last - self._first
        if gone <= 0 or self.at <= self.start:
            return None
        return max(0.0, (1 - self._last) / gone * (self.at - self.start) - (now - self.at))

    def rate(self) -> float | None:
        """Return the units done a second; None before the first."""
        done = self.phase.done - self.phase.start
        return done / (self.at - self.start) if done > 0 and self.at > self.start else None


def counted(phase: Phase) -> str:
    """Return how much of a phase is done: ``12.3 of 33.0 GB``, ``3 of 28 blocks``; empty where nobody counts."""
    if not phase.total:
        return ""
    if phase.unit == BYTES:
        return bytes_of(min(phase.done, phase.total), phase.total)
    return f"{phase.done:,} of {phase.total:,} {phase.unit}".rstrip()


def bytes_of(done: float, total: float) -> str:
    """Return a part of a number of bytes in the unit of the whole: ``12.3 of 33.0 GB``."""
    power = max((power for power in range(4) if total >= 1000**power), default=0)
    digits = 0 if power == 0 else 1
    return f"{done / 1000**power:.{digits}f} of {total / 1000**power:.{digits}f} {('B', 'kB', 'MB', 'GB')[power]}"


def paced(rate: float | None, unit: str) -> str:
    """Return a pace for reading: ``30/s``, ``212.00 MB/s``, and ``40 s each`` below one a second."""
    if rate is None:
        return ""
    if unit == BYTES:
        return f"{human_bytes(rate)}/s"
    if rate < 1:
        return f"{duration(1 / rate)} each"
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"


def parts_of(phase: Phase) -> str:
    """Return the parts of a phase that are under way, the innermost last: ``refitting: 3 of 9 systems``."""
    parts, inner = [], phase.inner
    while inner is not None:
        parts.append(": ".join(filter(None, (inner.title, counted(inner)))))
        inner = inner.inner
    return ", ".join(parts)


def begun(phase: Phase) -> str:
    """Return the line that says what begins: ``refitting x.pt: 28 blocks``, with what an earlier run had done."""
    if not phase.total:
        return phase.title
    whole = human_bytes(phase.total) if phase.unit == BYTES else f"{phase.total:,} {phase.unit}".rstrip()
    return f"{phase.title}: {whole}" + (f", {phase.start:,} of them done before" if phase.start else "")


def under_way(pace: Pace, now: float) -> str:
    """Return the line on a phase: ``sampling x.pt: 30 of 64 images (block 3 of 28) in 2 min, 4 s each, 3 min left``."""
    phase, left = pace.phase, pace.left(now)
    parts, done = parts_of(phase), counted(phase)
    what = " ".join(filter(None, (done, f"({parts})" if parts else ""))) + f" in {duration(now - pace.start)}"
    rest = (paced(pace.rate(), phase.unit), f"{duration(left)} left" if left is not None else "")
    return f"{phase.title}: " + ", ".join(filter(None, (what.strip(), *rest)))


class Lines:
    """A phase in lines."""

    def __init__(self, phase: Phase, stream: TextIO) -> None:
        self.phase, self.stream = phase, stream
        self.pace = Pace(phase, time.monotonic())
        self.last = self.pace.start
        self.has_begun = False

    def look(self) -> None:
        """Say what is under way: once it has lasted a second, and every minute."""
        now = time.monotonic()
        self.pace.look(now)
        if now - self.last >= _SECONDS_BETWEEN:
            self.last, self.has_begun = now, True
            self._say(under_way(self.pace, now))
        elif not self.has_begun and now - self.pace.start >= _SECONDS_BEFORE_A_LINE:
            self.has_begun = True
            self._say(begun(self.phase))

    def end(self) -> None:
        """Say how long the phase took, if it took seconds."""
        passed = time.monotonic() - self.pace.start
        if passed > _LEAST_SECONDS:
            done = self.phase.done - self.phase.start
            pace = paced(done / passed if done else None, self.phase.unit)
            self._say(f"{self.phase.title}: done in {duration(passed)}" + (f" ({pace})" if pace else ""))

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads stderr any more: the work goes on
            self.stream.write(f"ditmoe: {line}\n")
            self.stream.flush()


class Bar:
    """A phase as a live bar: what is done, how much of it, since when and for how long; below it the part under way."""

    def __init__(self, phase: Phase, stream: TextIO) -> None:
        self.phase, self.stream = phase, stream
        self.pace = Pace(phase, time.monotonic())
        self.live: Live | None = None

    def look(self) -> None:
        """Draw the bar anew, once the phase has lasted a moment."""
        now = time.monotonic()
        self.pace.look(now)
        if now - self.pace.start < _SECONDS_BEFORE_A_BAR:
            return
        with suppress(OSError, ValueError):
            if self.live is None:
                self.live = self._begin()
            self.live.refresh()

    def end(self) -> None:
        """Wipe the bar off."""
        if self.live is not None:
            with suppress(OSError, ValueError):
                self.live.stop()

    def _begin(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self.stream, no_color=not uses_colour(self.stream))
        live = Live(
            get_renderable=self.drawn, console=console, auto_refresh=False, transient=True, redirect_stdout=False
        )
        live.start()
        return live

    def drawn(self) -> RenderableType:
        """Return the bar as it is now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, phase = time.monotonic(), self.phase
        left = self.pace.left(now)
        numbers = (counted(phase), paced(self.pace.rate(), phase.unit), clock(now - self.pace.start))
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_column(width=24)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_row(
            Text(phase.title),
            ProgressBar(total=1.0, completed=phase.fraction, pulse=not phase.total, animation_time=now),
            Text("  ".join(filter(None, (*numbers, f"{duration(left)} left" if left is not None else "")))),
        )
        parts = parts_of(phase)
        return Group(row, Text(f"  {parts}", no_wrap=True, overflow="ellipsis")) if parts else row


def clock(seconds: float) -> str:
    """Return a time that passed as a clock shows it: ``1:20``, ``1:00:20``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def looking(look: Callable[[], None], every: float) -> Iterator[None]:
    """Call `look` every so many seconds, in a thread, while the context lasts."""
    over = Event()

    def loop() -> None:
        while not over.wait(every):
            look()

    thread = Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_silent() -> bool:
    """Return whether to show nothing: it is switched off, or this is not the first of torchrun's processes."""
    return os.environ.get("DITMOE_PROGRESS") == "0" or not first_process()


def shown(phase: Phase) -> AbstractContextManager[None]:
    """Show a phase on stderr while the context lasts."""
    if _is_silent():
        return nullcontext()
    stream = sys.stderr
    return _drawn(Bar(phase, stream)) if stream.isatty() else _told(Lines(phase, stream))


@contextmanager
def _told(lines: Lines) -> Iterator[None]:
    with looking(lines.look, _SECONDS_BETWEEN_LOOKS):
        yield
    lines.end()


@contextmanager
def _drawn(bar: Bar) -> Iterator[None]:
    with Undoing(bar.end), looking(bar.look, _SECONDS_BETWEEN_LOOKS):
        yield
