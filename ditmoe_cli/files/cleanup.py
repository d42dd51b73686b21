"""What must not outlive a run is undone at the end of its block, or else at the end of the process.

A signal is raised as an exception between any two steps of Python, also between making a file and entering the clause
that deletes it, and within that clause. What is entered here before it is made is undone in any case but SIGKILL.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache

_waiting: dict[int, Undoing] = {}


class Undoing:
    """A ``with`` block at whose end `undo` is called; at the process's end if it was cut off or returned False."""

    def __init__(self, undo: Callable[[], object]) -> None:
        self.undo, self.process = undo, os.getpid()

    def __enter__(self) -> None:
        _waiting[id(self)] = self

    def __exit__(self, *_: object) -> None:
        if self.undo() is not False:
            _waiting.pop(id(self), None)


@atexit.register
def undo_all() -> None:
    """Undo what was cut off before it was undone, the last first; what a process was forked with is its parent's."""
    for waiting in reversed(list(_waiting.values())):
        if waiting.process == os.getpid():
            with suppress(Exception):
                waiting.undo()
    _waiting.clear()


@cache
def undo_first() -> None:
    """Undo before libraries that are imported by now do their own at the process's end: the last entry goes first."""
    atexit.register(undo_all)
