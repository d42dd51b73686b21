"""What commands print: the result on stdout, everything else on stderr.

On a terminal a result is a short table; off a terminal, or with ``--json``, one JSON document; with ``-q`` the bare
path of the output. Progress bars show on a terminal only.
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

Row = tuple[str, object]
_WORTH_TELLING = 5  # seconds that a job takes before its end is worth a line


@dataclass(frozen=True)
class Printing:
    """How a command was asked to print."""

    as_json: bool = False
    quiet: bool = False


def _uses_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def note(message: str) -> None:
    """Say something on stderr, in one line that is never wrapped."""
    print(f"ditmoe: {message}", file=sys.stderr, flush=True)


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
    return f"{speed:.3g}/s"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how much more is done; shows a bar, rate and time left on a terminal's stderr."""
    if not sys.stderr.isatty():
        start, steps = time.monotonic(), [0]
        yield steps.append
        passed = time.monotonic() - start
        if passed > _WORTH_TELLING:
            note(f"{what}: done in {passed:.0f} s ({rate(sum(steps) / passed)})")
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
