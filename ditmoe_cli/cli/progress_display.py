"""How phases are shown on stderr: a live bar on a terminal; off one a line when a phase begins, and one a minute.

Both follow the clock, not the work, so that a step which takes an hour still shows what is under way: a thread looks at
the phase (`ditmoe_cli.progress.Phase`) and draws. Phases of less than a second show nothing. Of torchrun's processes
only the first shows any, and with DITMOE_PROGRESS=0 none does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, TextIO

from ditmoe_cli.api.shown_progress import (
    SECONDS_BEFORE_A_BAR,
    SECONDS_BETWEEN_LOOKS,
    Pace,
    counted,
    in_lines,
    is_silent,
    looking,
    paced,
    parts_of,
)
from ditmoe_cli.cli.terminal import uses_colour
from ditmoe_cli.files.cleanup import Undoing
from ditmoe_cli.progress import Phase, duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


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
        if now - self.pace.start < SECONDS_BEFORE_A_BAR:
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


def shown(phase: Phase) -> AbstractContextManager[None]:
    """Show a phase on stderr while the context lasts."""
    if is_silent():
        return nullcontext()
    stream = sys.stderr
    return _drawn(Bar(phase, stream)) if stream.isatty() else in_lines(phase)


@contextmanager
def _drawn(bar: Bar) -> Iterator[None]:
    with Undoing(bar.end), looking(bar.look, SECONDS_BETWEEN_LOOKS):
        yield
