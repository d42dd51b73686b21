"""Atomic outputs: a target is replaced by a whole output, or left as it was.

An output is written beside its target under a hidden name, flushed to disk and renamed. A failure before the rename
leaves the target absent, or the old one in place.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ditmoe_cli.errors import BadInputError, OutputExistsError

CHECKPOINT_FILES = re.compile(r"config\.json|diffusion_pytorch_model.*\.safetensors(\.index\.json)?")


def check_target(
    target: Path, force: bool, inputs: Iterable[Path] = (), contents: re.Pattern[str] = CHECKPOINT_FILES
) -> None:
    """Check that an output may be written to `target`; a folder is replaced only where all its files match `contents`.

    Raises `OutputExistsError` where the target exists (without `force`), is an input or a folder around one, or is a
    link or a special file; `BadInputError` where the folder to write into is missing.
    """
    if target.is_symlink():
        raise OutputExistsError(f"{target}: is a symbolic link; name the file itself as output")
    if not target.parent.is_dir():
        raise BadInputError(f"{target.parent}: no such folder to write {target.name} into")
    if any(_holds(target, source) for source in inputs):
        raise OutputExistsError(f"{target}: is the input itself; name another output")
    if not target.exists():
        return
    if not (target.is_file() or target.is_dir()):
        raise OutputExistsError(f"{target}: is neither a file nor a folder; name another output")
    if not force:
        raise OutputExistsError(f"{target}: exists already; give ⟨force⟩ to replace it, or -o for another name")
    if target.is_dir():
        _refuse_foreign_folder(target, contents)


def _refuse_foreign_folder(folder: Path, contents: re.Pattern[str]) -> None:
    """Raise `OutputExistsError` where a folder, which is replaced as a whole, holds files of others."""
    foreign = next((c for c in sorted(folder.iterdir()) if c.is_dir() or not contents.fullmatch(c.name)), None)
    if foreign is not None:
        raise OutputExistsError(
            f"{folder}: holds {foreign.name}, which is no part of such an output, so it is not replaced; "
            "name another output"
        )


def _holds(target: Path, source: Path) -> bool:
    """Return whether writing `target` would touch `source`: it is the same file or folder, or one lies in the other."""
    target, source = target.resolve(), source.resolve()
    same_file = target.exists() and source.exists() and target.samefile(source)
    return same_file or target in source.parents or (source.is_dir() and source in target.parents)


@contextmanager
def staged(
    target: Path, force: bool = False, inputs: Iterable[Path] = (), contents: re.Pattern[str] = CHECKPOINT_FILES
) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder at; on success it is renamed to `target`.

    Raises as `check_target` does, before anything is written and again before the rename.
    """
    inputs = tuple(inputs)
    target = target.absolute()
    check_target(target, force, inputs, contents)
    staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    _remove(staging)  # of a killed run with this process id, as happens in containers
    try:
        yield staging
        _flush(staging)
        check_target(target, force, inputs, contents)
        _rename(staging, target)
        _sync(target.parent)
    finally:
        _remove(staging)


def _flush(path: Path) -> None:
    if path.is_dir():
        for child in sorted(path.iterdir()):
            _flush(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`. An existing folder is moved aside first and removed afterwards."""
    if not target.exists() or (target.is_file() and staging.is_file()):
        staging.replace(target)
        return
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    _remove(aside)
    target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
