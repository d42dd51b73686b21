"""A watcher of phases for tests: it remembers which began and which ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ditmoe_cli.progress import Phase


class Seen:
    """The outermost phases that began, and the titles of those that ended."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.ended: list[str] = []

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        self.phases.append(phase)
        try:
            yield
        finally:
            self.ended.append(phase.title)

    def phase(self, word: str) -> Phase:
        """The one phase whose title has a word."""
        (found,) = (phase for phase in self.phases if word in phase.title)
        return found
