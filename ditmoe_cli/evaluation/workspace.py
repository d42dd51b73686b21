"""Arrays on disk that are filled row by row, by any number of processes, over any number of runs.

A workspace is a folder. Each array is an ``.npy`` file of its full size from the start; rows that are whole are told by
empty files ``NAME.FIRST-STOP.done``, which are made after the rows are on disk. A run that was cut off leaves its
workspace behind, and the next one with the same key fills in what is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, DitmoeError, first_line

_MARK = re.compile(r"(?P<name>.+)\.(?P<first>\d+)-(?P<stop>\d+)\.done")


@dataclass(frozen=True)
class Workspace:
    """A folder of arrays with `rows` rows each."""

    folder: Path
    rows: int

    def create(self, name: str, shape: Sequence[int], dtype: type[np.generic]) -> None:
        """Make the array (rows, *shape) unless it is there. One process does this, before any other looks.

        Raises `BadInputError` where it is there in another form.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, wanted = self._path(name), (self.rows, *shape)
        if not path.exists():
            made = path.with_suffix(".new")
            np.lib.format.open_memmap(made, mode="w+", dtype=dtype, shape=wanted).flush()
            made.replace(path)
        found = self.array(name)
        if found.shape != wanted or found.dtype != np.dtype(dtype):
            raise BadInputError(f"{path}: left by another run in another form; delete {self.folder}")

    def array(self, name: str) -> NDArray[Any]:
        """Return an array, mapped from disk, read-only. Raises `BadInputError` where it is missing or damaged."""
        path = self._path(name)
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BadInputError(f"{path}: cannot be read ({first_line(error)}); delete {self.folder}") from None
        if not isinstance(found, np.memmap):
            raise BadInputError(f"{path}: is no plain array; delete {self.folder}")
        return found

    def put(self, name: str, first: int, values: NDArray[Any]) -> None:
        """Store the rows from `first` on, and mark them as done.

        They are written, not copied into a map of the file, which on a full disk would end in a signal.
        """
        whole = self.array(name)
        assert isinstance(whole, np.memmap)
        stop = first + len(values)
        rows = np.ascontiguousarray(values, dtype=whole.dtype)
        if rows.shape[1:] != whole.shape[1:] or not 0 <= first <= stop <= self.rows:
            raise ValueError(f"rows {first} to {stop} of shape {rows.shape[1:]} do not go into {whole.shape}")
        with self._path(name).open("r+b") as file:
            file.seek(whole.offset + first * whole[0].nbytes)
            file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())
        (self.folder / f"{name}.{first}-{stop}.done").touch()

    def done(self, name: str) -> NDArray[np.bool_]:
        """Return for each row (rows,) whether it is whole."""
        found = np.zeros(self.rows, dtype=np.bool_)
        for child in self.folder.glob(f"{name}.*.done"):
            mark = _MARK.fullmatch(child.name)
            if mark and mark["name"] == name:
                found[int(mark["first"]) : int(mark["stop"])] = True
        return found

    def missing(self, names: Sequence[str], batch: int) -> list[range]:
        """Return the rows that are not done in all of some arrays, in runs of at most `batch`."""
        left = np.flatnonzero(~np.logical_and.reduce([self.done(name) for name in names]))
        runs = np.split(left, np.flatnonzero(np.diff(left) != 1) + 1) if len(left) else []
        return [
            range(int(start), min(int(start) + batch, int(run[-1]) + 1))
            for run in runs
            for start in range(int(run[0]), int(run[-1]) + 1, batch)
        ]

    def require_whole(self, names: Sequence[str]) -> None:
        """Raise `DitmoeError` where a row of some arrays is not done."""
        left = self.missing(names, self.rows)
        if left:
            raise DitmoeError(f"{self.folder}: rows {left[0].start} to {left[0].stop - 1} were not made; run it again")

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def held(self, say: Callable[[str], None] | None) -> Iterator[None]:
        """Keep other runs out of the workspace until it is left, waiting for one that is at work, which `say` is told.

        A workspace in which no row is done is deleted at the end. The lock goes with the process, however it ends.
        Without `say` nobody is waited for: raises `BlockingIOError` where another has it.
        """
        lock = self.folder.with_name(f"{self.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = _locked(lock, say)
        try:
            yield
        finally:
            if not any(self.folder.glob("*.done")):
                self.remove()
            lock.unlink(missing_ok=True)
            held.release()

    def discard(self) -> None:
        """Delete the workspace, unless another run has it, which has a use for it and deletes it in its turn.

        Arrays that are open stay readable.
        """
        if self.folder.exists():
            with suppress(BlockingIOError), self.held(None):
                self.remove()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def _locked(path: Path, say: Callable[[str], None] | None) -> BaseFileLock:
    """Return the acquired lock of the file at `path`. Raises `BlockingIOError` where it is taken and `say` is None."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False).lock
    except Timeout:
        if say is None:
            raise BlockingIOError(f"{path}: another run has the lock") from None
    say(f"waiting for another run that has {path}")
    return lock.acquire().lock
