"""How often work in progress is kept: so rarely that keeping takes a small share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

WORK_PER_KEEPING = 20.0
"""Seconds of work for each second that keeping takes."""


class Pace:
    """Tells when it is time to keep work again: after `WORK_PER_KEEPING` times as long as it took the last time.

    The clock decides how much of the work has to be done again, never what comes out of it.
    """

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time to keep; always at first."""
        return time.monotonic() >= self._next

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Time what is kept within the context."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self._next = end + WORK_PER_KEEPING * (end - start)
