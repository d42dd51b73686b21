"""Runs that end early, at a chosen piece of their work folder, and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from ditmoe_cli.files.workfolder import WorkFolder

TWICE = "but for a result whose state was not kept, nothing is done twice"


class StoppedError(Exception):
    """What ends a run early."""


@contextmanager
def stopping_after(pieces: int, redone: str | None = None) -> Iterator[list[str]]:
    """Let a run end when it is about to keep one piece more than that many; yields the names of those it kept.

    A first piece named `redone` does not count.
    """
    kept: list[str] = []
    write = WorkFolder.write

    def until(self: WorkFolder, name: str, tensors: Mapping[str, Tensor], document: Any = None) -> None:
        if len(kept) - (kept[:1] == [redone]) == pieces:
            raise StoppedError
        write(self, name, tensors, document)
        kept.append(name)

    with mock.patch.object(WorkFolder, "write", until):
        yield kept


def redoable(pieces: Sequence[str], count: int) -> str | None:
    """The piece before the last of `count` ones, which a run that goes on behind it keeps again without its state."""
    return pieces[count - 2] if count > 1 and pieces[count - 2] != pieces[count - 1] else None


def goes_on_to_the_same_bytes(
    run: Callable[[Path], object], folder: Path, name: str = "x.safetensors", stops: Sequence[int] | None = None
) -> list[str]:
    """Stop ``run(target)`` after each piece, go on each time, and compare the bytes with those of a run of its own.

    With `stops` it stops after those numbers of pieces alone. Returns the names of the pieces that a whole run keeps. A
    run that goes on keeps only what was still to be done.
    """
    whole = folder / f"whole-{name}"
    with stopping_after(10**6) as pieces:
        run(whole)
    assert pieces, "nothing is kept"
    target = folder / f"stopped-{name}"
    before = 0
    for count in range(len(pieces)) if stops is None else stops:
        with pytest.raises(StoppedError), stopping_after(count - before, redoable(pieces, before + 1)) as kept:
            run(target)
        assert not target.exists()
        assert kept[-1:] == pieces[:count][-1:] and len(kept) <= count - before + 1, TWICE
        before = count
    with stopping_after(10**6) as kept:
        run(target)
    assert kept[-1] == pieces[-1] and len(kept) <= len(pieces) - before + 1, TWICE
    assert target.read_bytes() == whole.read_bytes()
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    assert left == [], "a whole target needs no work folder"
    return pieces
