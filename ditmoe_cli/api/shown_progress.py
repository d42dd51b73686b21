"""How phases are shown to whoever calls from Python: a bar of tqdm in notebooks and on terminals, where
tqdm is installed, else lines on stderr.

Both follow the clock, not the work, so that a step which takes an hour still shows what is under way: a thread looks at
the phase (`ditmoe_cli.progress.Phase`). A line is written when a phase has lasted a second, and one a minute. Of
torchrun's processes only the first shows any, and with DITMOE_PROGRESS=0 none does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import copy_context
from importlib.util import find_spec
from threading import Event, Thread
from typing import Any, TextIO

from ditmoe_cli.processes import first_process
from ditmoe_cli.progress import BYTES, Phase, duration, human_bytes

_LEAST_SECONDS = 5  # of a phase whose end is worth a line
_SECONDS_BETWEEN = 60  # lines of a phase that lasts
_SECONDS_BEFORE_A_LINE = 1.0
SECONDS_BEFORE_A_BAR = 0.5
SECONDS_BETWEEN_LOOKS = 0.25


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


@contextmanager
def looking(look: Callable[[], None], every: float) -> Iterator[None]:
    """Call `look` every so many seconds, in a thread, while the context lasts."""
    over = Event()

    def loop() -> None:
        while not over.wait(every):
            look()

    # a notebook knows by the context which cell an output belongs to
    thread = Thread(target=copy_context().run, args=(loop,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_silent() -> bool:
    """Return whether to show nothing: it is switched off, or this is not the first of torchrun's processes."""
    return os.environ.get("DITMOE_PROGRESS") == "0" or not first_process()


@contextmanager
def in_lines(phase: Phase) -> Iterator[None]:
    """Show a phase in lines on stderr while the context lasts."""
    lines = Lines(phase, sys.stderr)
    with looking(lines.look, SECONDS_BETWEEN_LOOKS):
        yield
    lines.end()


class NotebookBar:
    """A phase as a bar of tqdm, which notebooks draw as a widget."""

    def __init__(self, phase: Phase) -> None:
        self.phase, self.start = phase, time.monotonic()
        self.bar: Any = None

    def look(self) -> None:
        """Draw the bar anew, once the phase has lasted a moment."""
        if self.bar is None and time.monotonic() - self.start < SECONDS_BEFORE_A_BAR:
            return
        with suppress(OSError, ValueError):
            self._draw()

    def end(self) -> None:
        """Draw the bar as the phase left it, which stays where the phase took seconds."""
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self._draw()
                self.bar.leave = time.monotonic() - self.start > _LEAST_SECONDS
                self.bar.close()

    def _draw(self) -> None:
        phase = self.phase
        if self.bar is None:
            from tqdm.auto import tqdm

            in_bytes = phase.unit == BYTES
            self.bar = tqdm(
                desc=phase.title,
                total=phase.total or None,
                initial=phase.start,
                unit="B" if in_bytes else f" {phase.unit}",
                unit_scale=in_bytes,
                mininterval=0,
            )
            self.bar.start_t -= time.monotonic() - self.start
        parts = parts_of(phase)
        if parts != (self.bar.postfix or ""):
            self.bar.set_postfix_str(parts, refresh=False)
        self.bar.n = min(phase.done, phase.total) if phase.total else phase.done
        self.bar.refresh()


def shown_nowhere(_: Phase) -> AbstractContextManager[None]:
    """Show nothing of a phase."""
    return nullcontext()


def shown_to_users(phase: Phase) -> AbstractContextManager[None]:
    """Show a phase while the context lasts: as a bar of tqdm where that can be drawn, else in lines on stderr."""
    if is_silent():
        return nullcontext()
    draws = "ipykernel" in sys.modules or sys.stderr.isatty()  # a notebook, or a terminal
    return _as_bar(phase) if draws and find_spec("tqdm") is not None else in_lines(phase)


@contextmanager
def _as_bar(phase: Phase) -> Iterator[None]:
    bar = NotebookBar(phase)
    try:
        with looking(bar.look, SECONDS_BETWEEN_LOOKS):
            yield
    finally:
        bar.end()
