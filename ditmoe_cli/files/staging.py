"""Atomic outputs: a target is replaced by a whole output, or left as it was.

An output is written beside its target under a hidden name, flushed to disk, and takes its target's place in one step:
at no moment is a target missing that was there before. What a killed run leaves under hidden names is deleted by the
next one that writes into that folder.
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
from ditmoe_cli.files.cleanup import Undoing
from ditmoe_cli.files.locks import locked, taken_over
from ditmoe_cli.files.overlaps import overlap
from ditmoe_cli.files.renaming import exchange, rename_to_new
from ditmoe_cli.progress import phase, readable_bytes

CHECKPOINT_FILES = re.compile(r"config\.json|diffusion_pytorch_model.*\.safetensors(\.index\.json)?")
_OURS_BEGIN = ".ditmoe-"  # of the endings of hidden names: no other program's files are taken for ours
_OURS = re.compile(rf"(?P<hidden>\..+){re.escape(_OURS_BEGIN)}(tmp|old)-(?P<run>\d+(-\d+)?)(\.lock)?", re.DOTALL)
_LONGEST_NAME = 200  # bytes, of 255 that most file systems allow: hidden names are longer than their target's
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNFLUSHED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that cannot be asked to bring a file to disk."""
_UNSYNCED = (*UNFLUSHED, errno.EBADF, errno.EACCES, errno.EPERM)
_OCTAL = re.compile(rb"\\([0-7]{3})")  # as the kernel spells blanks


def check_target(
    target: Path, force: bool, inputs: Iterable[Path] = (), contents: re.Pattern[str] = CHECKPOINT_FILES
) -> None:
    """Check that an output may and can be written to `target`, before any work.

    A folder is replaced only where all that it holds matches `contents`: files as ``config.json`` or
    ``vae/config.json``, folders as ``vae/``. Raises `OutputExistsError` where the target exists (without `force`), is
    an input or a folder around one, or is a link or a special file; `BadInputError` where the folder to write into is
    missing, or cannot be written.
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
    touched = next((source for source in inputs if overlap(target, source)), None)
    if touched is not None:
        what = "is the input itself" if target.exists() else f"would lie within the input {touched}"
        raise OutputExistsError(f"{target}: {what}; name another output")
    if not target.exists():
        return
    if not (target.is_file() or target.is_dir()):
        raise OutputExistsError(f"{target}: is neither a file nor a folder; name another output")
    if not force:
        raise _existing(target)
    if _is_mount_point(target):
        raise OutputExistsError(f"{target}: is a mount point, whose place nothing can take; name another output")
    if target.is_dir():
        _refuse_foreign_folder(target, contents, target)


def _existing(target: Path) -> OutputExistsError:
    return OutputExistsError(f"{target}: exists already; give ⟨force⟩ to replace it, or ⟨output⟩ for another name")


def _refuse_foreign_folder(folder: Path, contents: re.Pattern[str], named: Path) -> None:
    """Raise `OutputExistsError`, which calls it `named`, where a folder to be replaced holds files of others."""
    try:
        foreign = next((name for name in _held(folder) if not contents.fullmatch(name)), None)
    except PermissionError:
        raise BadInputError(f"{named}: cannot be read, so it is not replaced; name another output") from None
    if foreign is not None:
        raise OutputExistsError(
            f"{named}: holds {foreign.removesuffix('/')}, which is no part of such an output, so it is not replaced; "
            "name another output"
        )


def _held(folder: Path, before: str = "") -> Iterator[str]:
    """Yield the names of what a folder holds, ``sub/`` and then ``sub/file`` for one in it; links are files."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield f"{before}{child.name}/"
            yield from _held(child, f"{before}{child.name}/")
        else:
            yield f"{before}{child.name}"


def _is_mount_point(path: Path) -> bool:
    """Return whether something is mounted at a path, also one file or folder of the same disk."""
    if os.path.ismount(path):
        return True
    place = os.fsencode(path.resolve())
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
        return any(_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), mount.split()[4]) == place for mount in mounts)
    return False


def _require_writable(target: Path) -> None:
    """Raise `BadInputError` where no file can be made beside `target`, or the target cannot be replaced."""
    try:
        _try_to_make_a_file(target)
    except OSError as error:
        reason = "no place for files" if error.errno == errno.ENOENT else error.strerror  # as /proc says
        raise BadInputError(f"{target}: cannot be written there ({reason}); name an output elsewhere") from None
    if target.exists() and not _may_be_replaced(target):
        raise BadInputError(f"{target}: belongs to another user and cannot be replaced; name another output")
    if target.is_dir() and not os.access(target, os.R_OK | os.W_OK | os.X_OK):
        raise BadInputError(f"{target}: its files cannot be deleted, so it is not replaced; name another output")


def require_place(folder: Path, what: str) -> None:
    """Raise `BadInputError` where no file can be made in a folder, in which `what` would be kept."""
    try:
        _try_to_make_a_file(folder / "any")
    except OSError as error:
        raise BadInputError(f"{folder}: cannot be written ({error.strerror}), and {what} is kept there") from None


def _try_to_make_a_file(target: Path) -> None:
    """Make a file beside `target`, without a name where the system can, so that even a kill leaves none."""
    nameless = getattr(os, "O_TMPFILE", None)
    if nameless is not None:
        try:
            os.close(os.open(target.parent, nameless | os.O_WRONLY, 0o600))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    probe = hidden_beside(target, f"{_OURS_BEGIN}tmp-{os.getpid()}")
    with suppress(FileExistsError):  # of a killed run, or of a process with the same number in another container
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        probe.unlink()


def _may_be_replaced(target: Path) -> bool:
    """Return whether this user may rename something to `target`: in sticky folders such as /tmp only over their own."""
    folder = target.parent.stat()
    is_sticky = bool(folder.st_mode & stat.S_ISVTX)
    return not is_sticky or os.geteuid() in (0, target.stat().st_uid, folder.st_uid)


def check_space(target: Path, needed: int) -> None:
    """Raise `DitmoeError` where fewer than `needed` bytes are free for an output at `target`, before any work.

    What killed runs left in its folder is deleted where it takes the room.
    """
    free = _free_bytes(target.parent)
    if free is not None and needed > free:
        clean_leftovers(target)
        free = _free_bytes(target.parent)
    if free is not None and needed > free:
        raise DitmoeError(
            f"{target}: needs {readable_bytes(needed)}, and {target.parent} has {readable_bytes(free)} free; "
            "make room there, or name an output elsewhere"
        )


def _free_bytes(folder: Path) -> int | None:
    """Return the bytes that are free where a folder is; None where the file system does not tell."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


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
    """Yield a path beside `target` to write a file or folder at; on success it takes the place of `target`.

    Raises as `check_target` does, before anything is written and again before the target is touched. `OSError` of a
    full disk names the target.
    """
    inputs = tuple(inputs)
    target = target.absolute()
    check_target(target, force, inputs, contents)
    clean_leftovers(target)
    with _naming(target, hidden_beside(target, _OURS_BEGIN)), _own_staging(target) as staging:
        yield staging
        with phase(f"flushing {target.name} to disk"):
            _flush(staging)
        _refuse(target, force, inputs, contents)
        _take_place(staging, target, force, contents)
        _sync_folder(target.parent)


@contextmanager
def replaced_whole(path: Path, named: Path) -> Iterator[Path]:
    """Yield a path to write a file at, which then takes the place of `path`, on disk before it does.

    For files within a folder that only this process writes to. Errors of a full disk name the folder `named`.
    """
    new = path.with_name(f"{path.name}.new")
    with _naming(named, new), Undoing(lambda: new.unlink(missing_ok=True)):
        yield new
        _sync(new)
        new.replace(path)
        _sync_folder(path.parent)


@contextmanager
def _own_staging(target: Path) -> Iterator[Path]:
    """Yield a hidden path beside `target` that no other run has, also where containers give several one process id.

    The lock beside it shows others that this run lives. What stands at the path in the end is deleted: a half-written
    output, or the folder whose place a whole one took.
    """
    with ExitStack() as stack:
        for attempt in itertools.count():
            run = f"{os.getpid()}-{attempt}" if attempt else f"{os.getpid()}"
            staging = hidden_beside(target, f"{_OURS_BEGIN}tmp-{run}")
            with suppress(BlockingIOError):
                stack.enter_context(locked(staging.with_name(f"{staging.name}.lock"), guarded=staging))
                break
        stack.enter_context(Undoing(lambda: _remove(staging)))
        _remove(staging)
        yield staging


@contextmanager
def _naming(target: Path, hidden: Path) -> Iterator[None]:
    """Let errors of the system name `target` for files that begin as `hidden` does, and where they name none."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if (named is not None and named.startswith(str(hidden))) or (named is None and error.errno in _FULL):
            error.filename, error.filename2 = str(target), None
        raise


def clean_leftovers(target: Path) -> None:
    """Delete what killed runs left half-written in the folder of `target`; runs that live keep theirs.

    Where a run was killed while it replaced the folder `target`, which then is missing, the old one is put back.
    """
    target = target.absolute()
    with suppress(OSError):
        found = filter(None, (_OURS.fullmatch(path.name) for path in target.parent.iterdir()))
        for hidden, run in sorted({(name["hidden"], name["run"]) for name in found}):
            with suppress(OSError):  # one that belongs to another user keeps no other from being deleted
                _clean(target, hidden, run)


def _clean(target: Path, hidden: str, run: str) -> None:
    """Delete what the run `run` left of its output `hidden`, if its process has ended, as its lock tells.

    Without a lock, as on file systems that have none, it is deleted for its own target only, and if no process has its
    number. The lock goes last: a run that is killed here leaves it for the next one.
    """
    staging = target.with_name(f"{hidden}{_OURS_BEGIN}tmp-{run}")
    lock = staging.with_name(f"{staging.name}.lock")
    is_own = hidden == hidden_beside(target, "").name
    if lock.exists():
        with taken_over(lock, guarded=staging) as is_left:
            if is_left:
                _delete_leftovers(staging, target if is_own else None)
    elif is_own and not _is_running(int(run.partition("-")[0])):
        _delete_leftovers(staging, target)


def _delete_leftovers(staging: Path, target: Path | None) -> None:
    """Delete what a killed run left; an old folder only where a new one is in its place, else `target` gets it back."""
    _remove(staging)
    hidden, run = _parts(staging)
    old = staging.with_name(f"{hidden}{_OURS_BEGIN}old-{run}")
    if (target or staging.with_name(hidden.removeprefix("."))).exists():
        _remove(old)
    elif target is not None and old.exists():
        old.rename(target)


def _parts(staging: Path) -> tuple[str, str]:
    """Return the hidden name of an output, and the run that writes it, of a path that `_own_staging` made."""
    found = _OURS.fullmatch(staging.name)
    assert found is not None
    return found["hidden"], found["run"]


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
        _sync_folder(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    """Write a file to disk, where its file system has that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNFLUSHED:
            raise
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk, where its file system has that and the folder may be read."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise


def _take_place(staging: Path, target: Path, force: bool, contents: re.Pattern[str]) -> None:
    """Let `staging` take the place of `target` in one step; a folder that stood there is at `staging` then.

    Without `force` nothing may stand there. Raises `OutputExistsError` where that changed since it was checked.
    """
    if not force or not os.path.lexists(target):
        try:
            if rename_to_new(staging, target):
                return
        except FileExistsError:
            if not force:
                raise _existing(target) from None
    if not os.path.lexists(target) or (target.is_file() and staging.is_file()):
        staging.replace(target)
    elif not exchange(staging, target):
        _replace_in_two_steps(staging, target)
    elif staging.is_dir():
        try:
            _refuse_foreign_folder(staging, contents, target)
        except BaseException:
            exchange(staging, target)
            raise


def _replace_in_two_steps(staging: Path, target: Path) -> None:
    """Move `target` aside, rename `staging` to it and delete what was moved, where paths cannot be exchanged.

    Whatever comes between, the target is back afterwards; after a kill the next run puts it back.
    """
    hidden, run = _parts(staging)
    aside = staging.with_name(f"{hidden}{_OURS_BEGIN}old-{run}")

    def tidy() -> bool:
        if not os.path.lexists(target):
            aside.rename(target)
        return _remove(aside)

    _remove(aside)
    with Undoing(tidy):
        target.rename(aside)
        staging.rename(target)
        _sync_folder(target.parent)


def _remove(path: Path) -> bool:
    """Delete a file or a folder, and return whether nothing is left of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not os.path.lexists(path)
