"""Progress of long work: code announces its phases, and whoever watches shows them.

A function that may take seconds says so, however far below the command it stands::

    with phase(f"measuring {path.name}", config.depth, "blocks") as progress:
        for block in blocks:
            with phase("rounding", len(matrices), "matrices", share=0.8) as inner:
                for matrix in matrices:
                    ...
                    inner(1)
            progress(1)

A phase within a phase is a part of it: the watcher is told of the outer one, and reads the parts off it. Nobody watches
until `watched_by` says who, nor in other threads; then a step costs an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")

BYTES = "bytes"
"""The unit of phases that read or write; shown as kB, MB and GB."""
_SIZES = ("B", "kB", "MB", "GB", "TB")


def readable_bytes(count: float, decimals: int = 1, largest: str = "TB") -> str:
    """Return a number of bytes in the largest decimal unit, at most `largest`, of which it has one; B are whole."""
    sizes = _SIZES[: _SIZES.index(largest) + 1]
    power = max((power for power in range(len(sizes)) if count >= 1000**power), default=0)
    return f"{count / 1000**power:.{decimals if power else 0}f} {sizes[power]}"


def human_bytes(count: float) -> str:
    """Return a byte count in decimal units, as file managers print it."""
    return readable_bytes(count, decimals=2, largest="GB")


def duration(seconds: float) -> str:
    """Return a duration for reading, in two digits or three."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass
class Phase:
    """Work under way. Called with a number of units, it counts them as done.

    Attributes:
        title: what is done to what, such as ``measuring x.pt``.
        total: how many units there are; 0 where nobody knows.
        unit: what is counted, in the plural.
        start: how many of them an earlier run had done.
        share: for a part: how much of one unit of the phase around it is this part, 0 (unknown) to 1; above 1 it is
            several units, such as the images of a batch.
        done: how many are done, `start` included.
        inner: the part under way.
        outer: the phase that this is a part of.
        behind: the shares of the parts of the current unit that are behind, at most 1 or one part's share.
    """

    title: str
    total: int = 0
    unit: str = ""
    start: int = 0
    share: float = 0.0
    done: int = 0
    inner: Phase | None = None
    behind: float = 0.0
    outer: Phase | None = field(default=None, repr=False)

    def __call__(self, done: int) -> None:
        """Count `done` more units as done."""
        self.done += done
        self.behind = 0.0

    @property
    def fraction(self) -> float:
        """How much is done, from 0 to 1: (done + shares of the parts behind + share of the part under way) / total."""
        if not self.total:
            return 0.0
        inner = self.inner
        within = self._behind(inner.share * inner.fraction, inner.share) if inner else self.behind
        return min(1.0, (self.done + within) / self.total)

    def end_part(self, part: Phase) -> None:
        """Count a part of the current unit as behind."""
        self.inner = None
        self.behind = self._behind(part.share, part.share)

    def _behind(self, more: float, share: float) -> float:
        return min(self.behind + more, max(1.0, share))


Watcher = Callable[[Phase], AbstractContextManager[None]]
"""Show a phase while the context lasts; an exception that ends it is the phase's."""


def _nobody(_: Phase) -> AbstractContextManager[None]:
    return nullcontext()


_watcher: ContextVar[Watcher] = ContextVar("watcher", default=_nobody)
_current: ContextVar[Phase | None] = ContextVar("current", default=None)


def is_watched() -> bool:
    """Return whether somebody watches the phases of this thread."""
    return _watcher.get() is not _nobody


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Have `watcher` show the phases of this thread while the context lasts."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def phase(title: str, total: int = 0, unit: str = "", *, start: int = 0, share: float = 0.0) -> Iterator[Phase]:
    """Announce a phase, or a part of the one under way, that lasts as long as the context; see `Phase`."""
    outer = _current.get()
    new = Phase(title, total, unit, start, share, done=start, outer=outer)
    _current.set(new)
    try:
        with _watcher.get()(new) if outer is None else _part(outer, new):
            yield new
    finally:
        # an error may leave a generator of `each` suspended for a while: a part then ends after what it is part of
        if any(known is new for known in _chain(_current.get())):
            _current.set(outer)


def each(items: Collection[Item], title: str, unit: str, *, share: float = 0.0) -> Iterator[Item]:
    """Yield items, each done when the next is asked for: a phase, or a part of one, that counts them."""
    with phase(title, len(items), unit, share=share) as progress:
        for item in items:
            yield item
            progress(1)


def _chain(innermost: Phase | None) -> Iterator[Phase]:
    """Yield a phase and those around it, the outermost last."""
    while innermost is not None:
        yield innermost
        innermost = innermost.outer


@contextmanager
def _part(outer: Phase, part: Phase) -> Iterator[None]:
    outer.inner = part
    try:
        yield
    finally:
        outer.end_part(part)
