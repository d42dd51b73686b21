"""Runs that are interrupted: the n-th piece that they keep is the last thing they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from interrupting import redoable

from ditmoe_cli.files import pacing
from ditmoe_cli.files.workfolder import WorkFolder

T = TypeVar("T")


class Interrupted(BaseException):
    """What ends a run, as a KeyboardInterrupt would."""


@contextmanager
def keeping_all(stop_after: int | None = None, redone: str | None = None) -> Iterator[list[str]]:
    """Keep work whenever it can be, and interrupt the run behind its piece number `stop_after`; yields their names.

    A first piece named `redone` does not count.
    """
    written: list[str] = []
    write = WorkFolder.write

    def counted(self: WorkFolder, name: str, tensors: Mapping[str, Any], document: Any = None) -> None:
        write(self, name, tensors, document)
        written.append(name)
        if len(written) - (written[:1] == [redone]) == stop_after:
            raise Interrupted

    with mock.patch.object(pacing, "WORK_PER_KEEPING", 0.0), mock.patch.object(WorkFolder, "write", counted):
        yield written


def result_after_interrupts(run: Callable[[], T]) -> T:
    """Interrupt a run behind each of its pieces in turn, going on each time, and return what comes out of it."""
    with keeping_all() as pieces:
        run()
    assert pieces, "nothing was kept"
    for stop, name in enumerate(pieces, 1):
        with keeping_all(1, redoable(pieces, stop)) as written:
            try:
                run()
            except Interrupted:
                assert written[-1] == name, "what was kept before is not kept again"
            else:
                raise AssertionError(f"the run ended before its piece {stop} ({name})")
    with keeping_all() as after:
        result = run()
    assert len(after) <= 1, f"nothing was gone on from behind {pieces[-1]}"
    return result
