"""The form of a progress bar: what long work reports to, without knowing whether or where anything is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int], None]
"""Takes how much more is done."""

ProgressBar = Callable[[str, int], AbstractContextManager[Progress]]
"""Takes a title and the total, and is open while the work runs."""


@contextmanager
def silent_bar(title: str, total: int) -> Iterator[Progress]:
    """Show nothing."""
    del title, total
    yield lambda _: None
