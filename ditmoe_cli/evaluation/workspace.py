"""Arrays on disk that are filled row by row, by any number of processes, over any number of runs.

A workspace is a folder. Each array is an ``.npy`` file of its full size from the start; an empty file
``NAME.FIRST-STOP.done`` marks rows that are whole, and is created once they are on disk. An interrupted run leaves its
workspace behind, and the next run with the same key fills in the missing rows.
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
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, DitmoeError, first_line
from ditmoe_cli.files.cleanup import Undoing
from ditmoe_cli.files.locks import locked

_MARK = re.compile(r"(?P<name>.+)\.(?P<first>\d+)-(?P<stop>\d+)\.done")


@dataclass(frozen=True)
class Workspace:
    """A folder of arrays with `rows` rows each."""

    folder: Path
    rows: int

    def create(self, name: str, shape: Sequence[int], dtype: type[np.generic]) -> None:
        """Create the array (rows, *shape) unless it exists. One process calls this, before any other opens the array.

        Raises `BadInputError` where it exists with another shape or dtype.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, full_shape = self._path(name), (self.rows, *shape)
        if not path.exists():
            for mark in self._marks(name):  # of an array that is gone
                mark.unlink(missing_ok=True)
            staging = path.with_suffix(".new")
            np.lib.format.open_memmap(staging, mode="w+", dtype=dtype, shape=full_shape).flush()
            staging.replace(path)
        array = self.array(name)
        if array.shape != full_shape or array.dtype != np.dtype(dtype):
            raise BadInputError(f"{path}: left by another run in another form; delete {self.folder}")

    def array(self, name: str) -> NDArray[Any]:
        """Return an array, mapped from disk, read-only. Raises `BadInputError` where it is missing or damaged."""
        path = self._path(name)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BadInputError(f"{path}: cannot be read ({first_line(error)}); delete {self.folder}") from None
        if not isinstance(array, np.memmap):
            raise BadInputError(f"{path}: is no plain array; delete {self.folder}")
        return array

    def put(self, name: str, first: int, values: NDArray[Any]) -> None:
        """Write the rows from `first` on, and mark them as done.

        They are not copied into a memory map, which on a full disk would end the process by a signal.
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
        """Return whether each row is whole, (rows,)."""
        done = np.zeros(self.rows, dtype=np.bool_)
        for found in self._marks(name).values():
            done[int(found["first"]) : int(found["stop"])] = True
        return done

    def _marks(self, name: str) -> dict[Path, re.Match[str]]:
        """Return the marks of an array's rows."""
        found = {child: _MARK.fullmatch(child.name) for child in self.folder.glob(f"{name}.*.done")}
        return {child: mark for child, mark in found.items() if mark and mark["name"] == name}

    def missing(self, names: Sequence[str], batch: int) -> list[range]:
        """Return the rows that are not done in every one of the arrays `names`, in ranges of at most `batch`."""
        missing = np.flatnonzero(~np.logical_and.reduce([self.done(name) for name in names]))
        runs = np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1) if len(missing) else []
        return [
            range(int(start), min(int(start) + batch, int(run[-1]) + 1))
            for run in runs
            for start in range(int(run[0]), int(run[-1]) + 1, batch)
        ]

    def require_whole(self, names: Sequence[str]) -> None:
        """Raise `DitmoeError` where a row of one of the arrays `names` is not done."""
        missing = self.missing(names, self.rows)
        if missing:
            raise DitmoeError(
                f"{self.folder}: rows {missing[0].start} to {missing[0].stop - 1} were not made; run it again"
            )

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def locked(self, notify: Callable[[str], None] | None) -> Iterator[None]:
        """Keep other runs out of the workspace inside the ``with`` block, and notify before waiting for another run.

        A workspace in which no row is done is deleted at the end. The lock is released with the process, however it
        ends. Raises `BlockingIOError` instead of waiting where `notify` is None.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._lock, notify), Undoing(self._remove_if_empty):
            yield

    def discard(self) -> None:
        """Delete the workspace unless another run uses it, which will delete it itself.

        Open arrays stay readable.
        """
        if self.folder.exists() or self._lock.exists():
            with suppress(BlockingIOError), self.locked(None):
                self.remove()

    def _remove_if_empty(self) -> None:
        """Delete the folder if no row is done."""
        if not any(self.folder.glob("*.done")):
            self.remove()

    @property
    def nbytes(self) -> int:
        """Bytes that the folder takes on the disk."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.glob("*") if file.is_file())

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def make_room(folder: Path, limit: int, used: Sequence[Workspace]) -> None:
    """Delete workspaces in a folder, those that were used longest ago first, until they take at most `limit` bytes.

    Those in `used` are taken for the latest; others that a run uses are left alone.
    """
    if not folder.is_dir():
        return
    for work in used:
        with suppress(OSError):
            os.utime(work.folder)
    kept = [Workspace(child, 0) for child in folder.iterdir() if child.is_dir()]
    sizes = {work: work.nbytes for work in sorted(kept, key=lambda work: work.folder.stat().st_mtime)}
    total = sum(sizes.values())
    for work, size in sizes.items():
        if total <= limit:
            return
        work.discard()
        total -= size
