"""Lines for people on what is done: whoever listens shows them, and they go to stderr where nobody does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ditmoe_cli.errors import named

Listener = Callable[[str], None]


def _to_stderr(message: str) -> None:
    sys.stderr.write(f"ditmoe: {named(message)}\n")
    sys.stderr.flush()


_listeners: list[Listener] = [_to_stderr]  # the last one listens, in all threads


def note(message: str) -> None:
    """Tell people a line, in which settings are marked as `errors.named` reads them."""
    _listeners[-1](message)


def note_nothing(message: str) -> None:
    """Take a line and show it to nobody."""
    del message


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Have `listener` take all notes while the context lasts."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
