"""The interface of progress bars: long work reports to one, whether or not anything is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int], None]
"""Advance a bar by a number of units."""

ProgressBar = Callable[[str, int], AbstractContextManager[Progress]]
"""Open a bar with a title and a total number of units; it is closed when the context ends."""


@contextmanager
def silent_bar(title: str, total: int) -> Iterator[Progress]:
    """Yield a `Progress` that shows nothing."""
    del title, total
    yield lambda _: None
