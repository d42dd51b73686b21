"""Atomic outputs: a target is replaced by a whole output, or left as it was.

An output is written beside its target under a hidden name, flushed to disk and renamed. A failure before the rename
leaves the target absent, or the old one in place. What a killed run leaves under hidden names is deleted by the next
one in that folder.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from ditmoe_cli.errors import BadInputError, DitmoeError, OutputExistsError
from ditmoe_cli.files.containers import INDEX, shard_names
from ditmoe_cli.files.locks import is_abandoned, locked
from ditmoe_cli.progress import phase, readable_bytes

CHECKPOINT_FILES = re.compile(r"config\.json|diffusion_pytorch_model.*\.safetensors(\.index\.json)?")
_LEFTOVER = re.compile(r"(?P<hidden>\..+)\.(tmp|old)-(?P<run>(?P<process>\d+)(-\d+)?)(\.lock)?", re.DOTALL)
_LONGEST_NAME = 200  # bytes, of 255 that most file systems allow: hidden names are longer than their target's
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(
    target: Path, force: bool, inputs: Iterable[Path] = (), contents: re.Pattern[str] = CHECKPOINT_FILES
) -> None:
    """Check that an output may and can be written to `target`, before any work.

    A folder is replaced only where all its files match `contents`. Raises `OutputExistsError` where the target exists
    (without `force`), is an input or a folder around one, or is a link or a special file; `BadInputError` where the
    folder to write into is missing, or cannot be written.
    """
    _refuse(target, force, inputs, contents)
    _require_writable(target)


def _refuse(target: Path, force: bool, inputs: Iterable[Path], contents: re.Pattern[str]) -> None:
    """Raise where an output may not be written to `target`; see `check_target`."""
    try:
        is_link = target.is_symlink()
    except OSError as error:  # a name that is too long
        raise BadInputError(f"{target}: cannot be written ({error.strerror}); name another output") from None
    if is_link:
        raise OutputExistsError(f"{target}: is a symbolic link; name the file itself as output")
    if not target.parent.is_dir():
        what = "is a file, and no folder" if target.parent.is_file() else "no such folder"
        raise BadInputError(f"{target.parent}: {what} to write {target.name} into")
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
    is_there = target.exists() and source.exists()
    is_one_of_them = is_there and any(target.samefile(file) for file in _files_of(source) if file.exists())
    target, source = target.resolve(), source.resolve()
    return is_one_of_them or target in source.parents or (source.is_dir() and source in target.parents)


def _files_of(source: Path) -> Iterator[Path]:
    """Yield the files of an input: shards may be links to elsewhere, as in the cache of the Hugging Face hub."""
    yield source
    if source.is_dir():
        yield from source.iterdir()
    elif INDEX.fullmatch(source.name):
        yield from (source.parent / name for name in shard_names(source))


def _require_writable(target: Path) -> None:
    """Raise `BadInputError` where no file can be made beside `target`, or the target cannot be replaced."""
    probe = hidden_beside(target, f".tmp-{os.getpid()}")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        probe.unlink()
    except FileExistsError:  # of a killed run, or of a process with the same number in another container
        pass
    except OSError as error:
        reason = "no place for files" if error.errno == errno.ENOENT else error.strerror  # as /proc says
        raise BadInputError(f"{target}: cannot be written there ({reason}); name an output elsewhere") from None
    if target.exists() and not _may_be_replaced(target):
        raise BadInputError(f"{target}: belongs to another user and cannot be replaced; name another output")


def _may_be_replaced(target: Path) -> bool:
    """Return whether this user may rename something to `target`: in sticky folders such as /tmp only over their own."""
    folder = target.parent.stat()
    is_sticky = bool(folder.st_mode & stat.S_ISVTX)
    return not is_sticky or os.geteuid() in (0, target.stat().st_uid, folder.st_uid)


def check_space(target: Path, needed: int) -> None:
    """Raise `DitmoeError` where fewer than `needed` bytes are free for an output at `target`, before any work."""
    try:
        disk = os.statvfs(target.parent)
    except OSError:
        return
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and needed > free:  # some file systems tell no size
        raise DitmoeError(
            f"{target}: needs {readable_bytes(needed)}, and {target.parent} has {readable_bytes(free)} free; "
            "make room there, or name an output elsewhere"
        )


def hidden_beside(target: Path, ending: str) -> Path:
    """Return the path of a hidden file or folder beside `target`, named after it; long names are cut and hashed."""
    name = os.fsencode(target.name)
    if len(name) <= _LONGEST_NAME:
        return target.with_name(f".{target.name}{ending}")
    return target.with_name(f".{target.name[:32]}~{sha256(name).hexdigest()[:16]}{ending}")


@contextmanager
def staged(
    target: Path, force: bool = False, inputs: Iterable[Path] = (), contents: re.Pattern[str] = CHECKPOINT_FILES
) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder at; on success it is renamed to `target`.

    Raises as `check_target` does, before anything is written and again before the rename. `OSError` of a full disk
    names the target.
    """
    inputs = tuple(inputs)
    target = target.absolute()
    check_target(target, force, inputs, contents)
    clean_leftovers(target)
    with _own_staging(target) as staging, _naming(target, staging):
        try:
            yield staging
            with phase(f"flushing {target.name} to disk"):
                _flush(staging)
            _refuse(target, force, inputs, contents)
            _rename(staging, target)
            _sync(target.parent)
        finally:
            _remove(staging)


@contextmanager
def replaced_whole(path: Path, named: Path) -> Iterator[Path]:
    """Yield a path to write a file at, which then takes the place of `path`, on disk before it does.

    For files within a folder that only this process writes to. Errors of a full disk name the folder `named`.
    """
    new = path.with_name(f"{path.name}.new")
    with _naming(named, new):
        try:
            yield new
            _sync(new)
            new.replace(path)
            _sync(path.parent)
        finally:
            new.unlink(missing_ok=True)


@contextmanager
def _own_staging(target: Path) -> Iterator[Path]:
    """Yield a hidden path beside `target` that no other run has, also where containers give several one process id.

    The lock beside it shows others that this run lives.
    """
    with ExitStack() as stack:
        for attempt in itertools.count():
            staging = hidden_beside(target, f".tmp-{os.getpid()}" + (f"-{attempt}" if attempt else ""))
            with suppress(BlockingIOError):
                stack.enter_context(locked(staging.with_name(f"{staging.name}.lock")))
                break
        _remove(staging)
        yield staging


@contextmanager
def _naming(target: Path, hidden: Path) -> Iterator[None]:
    """Let errors of the system name `target` in the place of a hidden file, and where they name none."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        is_ours = named is not None and (named == str(hidden) or named.startswith(f"{hidden}{os.sep}"))
        if is_ours or (named is None and error.errno in _FULL):
            error.filename, error.filename2 = str(target), None
        raise


def clean_leftovers(target: Path) -> None:
    """Delete what killed runs left half-written in the folder of `target`; runs that live keep theirs.

    Where a run was killed while it replaced the folder `target`, which then is missing, the old one is put back.
    """
    target = target.absolute()
    with suppress(OSError):
        for path in list(target.parent.glob(".*")):
            found = _LEFTOVER.fullmatch(path.name)
            if found and _is_left(path, found, target):
                _clean(path, found, target)


def _is_left(path: Path, found: re.Match[str], target: Path) -> bool:
    """Return whether the process that a hidden file belongs to has ended.

    Its lock tells. Without one, as earlier versions left them, it is cleaned for its own target only, and if no process
    has its number.
    """
    lock = path.with_name(f"{found['hidden']}.tmp-{found['run']}.lock")
    if lock.exists():
        return is_abandoned(lock)
    return path != lock and _is_of(found, target) and not _is_running(int(found["process"]))


def _is_of(found: re.Match[str], target: Path) -> bool:
    return found["hidden"] == hidden_beside(target, "").name


def _clean(path: Path, found: re.Match[str], target: Path) -> None:
    """Delete what a killed run left; an old folder only where the new one is in its place."""
    for kind in ("tmp", "old"):
        left = path.with_name(f"{found['hidden']}.{kind}-{found['run']}")
        replaced = path.with_name(found["hidden"].removeprefix("."))
        if kind == "tmp" or replaced.exists():
            _remove(left)
        elif left.exists() and _is_of(found, target):
            left.rename(target)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


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
    aside = hidden_beside(target, f".old-{staging.name.rpartition('.tmp-')[2]}")
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
