"""What commands print: the result on stdout, everything else on stderr.

On a terminal a result is a short table; off a terminal, or with ``--json``, one JSON document; with ``-q`` the bare
path of the output. Progress is a bar on a terminal, and a line a minute off one; of torchrun's processes only the first
shows it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from ditmoe_cli.errors import named
from ditmoe_cli.processes import under_torchrun

Row = tuple[str, object]
_WORTH_TELLING = 5  # seconds that a job takes before its end is worth a line
_TELL_EVERY = 60  # seconds


@dataclass(frozen=True)
class Printing:
    """How a command was asked to print."""

    as_json: bool = False
    quiet: bool = False


def _uses_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def note(message: str) -> None:
    """Say something on stderr, in one line that is never wrapped."""
    print(f"ditmoe: {with_options(message)}", file=sys.stderr, flush=True)


def with_options(message: str) -> str:
    """Return a message with its settings named as options: ``⟨group_size⟩`` as ``--group-size``."""
    return named(message, lambda setting: "--" + setting.replace("_", "-"))


def emit(printing: Printing, document: dict[str, Any], rows: Sequence[Row], path: str | None) -> None:
    """Print a command's result: `document` for programs, `rows` for people, `path` under ``-q``."""
    if printing.quiet:
        text = path or ""
    elif printing.as_json or not sys.stdout.isatty():
        text = json.dumps(document, sort_keys=True)
    else:
        text = _table(rows)
    if text:
        print(text, flush=True)


def _table(rows: Sequence[Row]) -> str:
    """Return labels and values in two columns; values are never wrapped or cut."""
    width = max((len(label) for label, _ in rows), default=0)
    bold, plain = ("\033[1m", "\033[0m") if _uses_colour(sys.stdout) else ("", "")
    return "\n".join(f"{bold}{label:<{width}}{plain}  {value}" for label, value in rows)


def human_bytes(count: float) -> str:
    """Return a byte count in decimal units, as file managers print it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def rate(speed: float) -> str:
    """Return a rate for reading."""
    return f"{speed:,.0f}/s" if speed >= 1000 else f"{speed:.3g}/s"


def duration(seconds: float) -> str:
    """Return a duration for reading, in two digits or three."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Lines:
    """Tells of a job of `total` steps in lines: one a minute while it lasts, and one at its end if it took seconds."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.told = time.monotonic()

    def step(self, done: int) -> None:
        """Count steps that were done."""
        self.done += done
        now = time.monotonic()
        if now - self.told < _TELL_EVERY or not 0 < self.done < self.total:
            return
        self.told, speed = now, self.done / (now - self.start)
        left = duration((self.total - self.done) / speed)
        note(f"{self.what}: {self.done:,} of {self.total:,}, {rate(speed)}, {left} left")

    def end(self) -> None:
        """Tell how long all of it took."""
        passed = time.monotonic() - self.start
        if passed > _WORTH_TELLING:
            note(f"{self.what}: done in {duration(passed)} ({rate(self.done / passed)})")


def _tells_nothing() -> bool:
    """Whether this is one of torchrun's processes that leave it to the first."""
    return under_torchrun() and os.environ.get("RANK", "0") != "0"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how much more is done; shows how much, rate and time left on stderr.

    On a terminal that is a bar, else a line a minute.
    """
    if _tells_nothing():
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        lines = _Lines(what, total)
        yield lines.step
        lines.end()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """How much is done a second."""

        def render(self, task: Task) -> Text:
            """Return the rate so far; nothing before the first step."""
            speed = task.finished_speed or task.speed
            return Text(rate(speed) if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True, no_color=not _uses_colour(sys.stderr))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
