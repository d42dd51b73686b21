"""Runs that end early, at a chosen piece of their work folder, and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from ditmoe_cli.files.workfolder import WorkFolder


class StoppedError(Exception):
    """What ends a run early."""


@contextmanager
def stopping_after(pieces: int) -> Iterator[list[str]]:
    """Let a run end when it is about to keep one piece more than that many; yields the names of those it kept."""
    kept: list[str] = []
    write = WorkFolder.write

    def until(self: WorkFolder, name: str, tensors: Mapping[str, Tensor], document: Any = None) -> None:
        if len(kept) == pieces:
            raise StoppedError
        write(self, name, tensors, document)
        kept.append(name)

    with mock.patch.object(WorkFolder, "write", until):
        yield kept


def goes_on_to_the_same_bytes(run: Callable[[Path], object], folder: Path, name: str = "x.safetensors") -> list[str]:
    """Stop ``run(target)`` after each number of pieces, go on, and compare the bytes with those of a run of its own.

    Returns the names of the pieces that a whole run keeps. A run that goes on keeps only what was still to be done.
    """
    whole = folder / f"whole-{name}"
    with stopping_after(10**6) as pieces:
        run(whole)
    assert pieces, "nothing is kept"
    for count in range(len(pieces)):
        target = folder / f"{count}-{name}"
        with pytest.raises(StoppedError), stopping_after(count):
            run(target)
        assert not target.exists()
        with stopping_after(10**6) as rest:
            run(target)
        assert target.read_bytes() == whole.read_bytes(), f"stopped after {pieces[:count]}"
        assert len(rest) <= len(pieces) - count + 1, "but for a result whose state was not kept, nothing is done twice"
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    assert left == [], "a whole target needs no work folder"
    return pieces
