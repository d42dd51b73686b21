"""Work folders: what an unfinished run has done, kept beside its target until that is written whole.

A work folder ``.NAME.work`` stands beside the target ``NAME``. It is bound to a key, the digest of everything that
determines the result, and holds pieces: safetensors files, each whole or absent, with a JSON document and the SHA-256
of each tensor in their metadata. A run that ends early leaves its folder behind; the next run with the same key goes on
from there, and one with another key starts a new folder. One run at a time has the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.errors import BadInputError, DitmoeError, InfeasibleError, OutputExistsError, UsageError
from ditmoe_cli.files.cleanup import Undoing
from ditmoe_cli.files.fingerprint import canonical_json, digest
from ditmoe_cli.files.header import FileHeader, TensorInfo, read_safetensors_header
from ditmoe_cli.files.json_text import parse_json, read_json
from ditmoe_cli.files.locks import locked
from ditmoe_cli.files.provenance import check_schema
from ditmoe_cli.files.staging import clean_leftovers, hidden_beside, replaced_whole
from ditmoe_cli.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

WORK_SCHEMA = "ditmoe.work/1"
_KEY = "key.json"
_ENDING = ".safetensors"

Notify = Callable[[str], None]


def work_key(request: Mapping[str, Any]) -> str:
    """Return the key of a run: the SHA-256 of `request` and of this package's version, as canonical JSON.

    `request` names everything that determines the result, as digests and settings.
    """
    return digest({"version": __version__, "request": dict(request)})


@dataclass(frozen=True)
class Piece:
    """A whole piece of a work folder: its document, and its tensors, read one at a time."""

    path: Path
    header: FileHeader
    document: Mapping[str, Any]

    @cached_property
    def _reader(self) -> Any:
        from ditmoe_cli.files.reader import SafetensorsReader

        return SafetensorsReader(self.header.tensors)

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self.header.tensors)

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor, as a view of the mapped file."""
        info = self.header.tensors[name].info
        view: memoryview = self._reader.raw(name) if info.numel else memoryview(b"")
        return view

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the CPU, copied out of the file."""
        tensor: Tensor = self._reader.tensor(name)
        return tensor


@dataclass
class WorkFolder:
    """A folder of pieces that belong to one key; see `open_work`.

    Attributes:
        folder: the folder.
        key: the digest of what determines the result.
        notify: takes lines about what is kept and gone on with.
        kept: returns the line that is said where the run ends early; None for none.
    """

    folder: Path
    key: str
    notify: Notify
    kept: Callable[[], str | None] = field(default=lambda: None, repr=False)
    _opened: set[str] = field(default_factory=set, repr=False)  # loops of this run: what they keep is its own

    def write(self, name: str, tensors: Mapping[str, Tensor], document: Mapping[str, Any] | None = None) -> None:
        """Keep a piece: on return it is on disk, and before that absent or as it was.

        Raises `OSError` that names the folder where there is no room.
        """
        from ditmoe_cli.files.reader import dtype_code, tensor_bytes
        from ditmoe_cli.files.writer import write_safetensors

        infos = [TensorInfo(n, dtype_code(t.dtype, n), tuple(t.shape)) for n, t in sorted(tensors.items())]

        def metadata(hashes: Mapping[str, str]) -> dict[str, str]:
            fields = {"schema": WORK_SCHEMA, "key": self.key, "document": dict(document or {}), "tensors": dict(hashes)}
            return {"format": "pt", "ditmoe": canonical_json(fields)}

        with replaced_whole(self._path(name), named=self.folder) as path:
            write_safetensors(path, infos, lambda info: tensor_bytes(tensors[info.name]), metadata)

    def read(self, name: str) -> Piece | None:
        """Return a piece; None where it is absent, of another key, or damaged, and so has to be made again.

        Reads and hashes all of its bytes.
        """
        path = self._path(name)
        try:
            header = read_safetensors_header(path)
            fields = check_schema(parse_json(header.metadata["ditmoe"]), WORK_SCHEMA, str(path))
            piece = Piece(path, header, dict(fields["document"]))
            is_whole = fields["key"] == self.key and all(
                sha256(piece.raw(tensor)).hexdigest() == fields["tensors"][tensor] for tensor in piece.names
            )
        except (BadInputError, OSError, ValueError, KeyError, TypeError):
            return None
        return piece if is_whole else None

    def made(self, name: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Piece:
        """Return a piece, whose tensors and document `make` returns where it is not kept yet."""
        piece = self.read(name)
        if piece is None:
            self.write(name, *make())
            piece = self.read(name)
        if piece is None:
            raise BadInputError(f"{self.folder}: the piece {name} is gone; run it again")
        return piece

    def has(self, name: str) -> bool:
        """Return whether a piece is there, whole or damaged."""
        return self._path(name).exists()

    def drop(self, name: str) -> None:
        """Delete a piece that is needed no more."""
        self._path(name).unlink(missing_ok=True)

    def clear(self, but: str = "") -> None:
        """Delete all pieces, except for those of the loop `but`."""
        for piece in self.folder.glob(f"*{_ENDING}"):
            if not but or not piece.name.startswith(f"{but}."):
                piece.unlink(missing_ok=True)

    def drop_loop(self, name: str) -> None:
        """Delete all pieces of a loop."""
        for piece in self.folder.glob(f"{name}.*{_ENDING}"):
            piece.unlink(missing_ok=True)

    def loop(self, name: str, total: int, unit: str = "block") -> KeptLoop:
        """Return the loop `name` of `total` steps, at the step where an earlier run has left it.

        Notifies where an earlier run has left it behind its start. `unit` is what a step does, for people.
        """
        loop = KeptLoop(self, name, total, unit)
        is_own = name in self._opened
        self._opened.add(name)
        if loop.start and not is_own:
            first = f"{unit} {loop.start + 1} of {total}" if loop.start < total else f"all {total} {unit}s done"
            self.notify(f"going on with {first} (kept in {self.folder})")
        return loop

    def has_steps(self, name: str, total: int) -> bool:
        """Return whether all steps of a loop are kept, whole or damaged."""
        return all(self.has(f"{name}.{step}") for step in range(total))

    def tell(self, kept: Callable[[], str | None]) -> None:
        """Set what is said where the run ends early, as ``kept 12 of 28 blocks; the same command goes on …``.

        It is asked for at the end, since a signal may come between keeping and counting.
        """
        self.kept = kept

    @property
    def is_empty(self) -> bool:
        """Whether no piece is kept."""
        return not any(self.folder.glob(f"*{_ENDING}"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_ENDING}"


@dataclass
class FollowedFolder(WorkFolder):
    """The work folder of a job of several processes, as others than the first see it: they read it and leave it alone.

    They wait for the first one where it writes what they read.
    """

    def write(self, name: str, tensors: Mapping[str, Tensor], document: Mapping[str, Any] | None = None) -> None:
        """Leave it to the first process."""

    def made(self, name: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Piece:
        """Return a piece that the first process has made. Raises `DitmoeError` where it is not to be seen."""
        del make
        piece = self.read(name)
        if piece is None:
            raise DitmoeError(
                f"{self.folder}: what the first process keeps there is not to be seen from this one; name an output in "
                "a folder that all of them share"
            )
        return piece

    def drop(self, name: str) -> None:
        """Leave it to the first process."""

    def clear(self, but: str = "") -> None:
        """Leave it to the first process."""

    def drop_loop(self, name: str) -> None:
        """Leave it to the first process."""


class KeptLoop:
    """A loop over steps, each of which leaves a result, and hands state on to the next.

    A result is kept for each step, the state only behind the last one, so that going on takes no earlier step again.

    Attributes:
        total: number of steps.
        start: the first step that is still to be done.
    """

    def __init__(self, work: WorkFolder, name: str, total: int, unit: str) -> None:
        self.work, self.name, self.total, self.unit = work, name, total, unit
        self._results: dict[int, Piece] = {}
        self._state: Piece | None = None
        self.start = self._find_start()
        for step in range(self.start, total):  # states behind a damaged result tell of steps that are done again
            work.drop(self._state_name(step))
        work.tell(self._told)

    def _find_start(self) -> int:
        """Return the step behind the last whole state that all results before it are there for."""
        while len(self._results) < self.total:
            step = len(self._results)
            result = self.work.read(self._result_name(step))
            if result is None:
                break
            self._results[step] = result
        for done in range(len(self._results), 0, -1):
            self._state = self.work.read(self._state_name(done - 1))
            if self._state is not None:
                return done
        return 0

    @property
    def state(self) -> Piece | None:
        """What the step before `start` handed on; None at the start."""
        return self._state

    def result(self, step: int) -> Piece:
        """Return the result of a step that is done."""
        if step not in self._results:
            piece = self.work.read(self._result_name(step))
            if piece is None:
                raise BadInputError(f"{self.work.folder}: the result of {self.unit} {step + 1} is gone; run it again")
            self._results[step] = piece
        return self._results[step]

    def keep(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        document: Mapping[str, Any] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep a step's result, and the `state` that it hands on."""
        self._results.pop(step, None)
        self.work.write(self._result_name(step), tensors, document)
        self.work.write(self._state_name(step), state or {})
        if step:
            self.work.drop(self._state_name(step - 1))

    def _told(self) -> str | None:
        """Return how many steps are kept, and what the next run does."""
        done = next((step + 1 for step in reversed(range(self.total)) if self.work.has(self._state_name(step))), 0)
        if not done:
            return None
        then = f"{self.unit} {done + 1}" if done < self.total else "the writing"
        return f"kept {done} of {self.total} {self.unit}s; the same command goes on with {then}"

    def _result_name(self, step: int) -> str:
        return f"{self.name}.{step}"

    def _state_name(self, step: int) -> str:
        return f"{self.name}.state.{step}"


def work_folder(target: Path) -> Path:
    """Return where the work folder of a target stands."""
    return hidden_beside(target.absolute(), ".work")


@contextmanager
def open_work(target: Path, key: str, notify: Notify, keep_refused: bool = False) -> Iterator[WorkFolder]:
    """Yield the work folder of a target, with what an earlier run with the same key left in it.

    What killed runs left beside the target is cleaned. Where the block ends normally, nothing is kept, or the input or
    the request is refused, which going on would not change unless it is another (`keep_refused`), the folder is
    deleted; otherwise it stays, and `notify` takes a line that says what is kept. Raises `OutputExistsError` where
    another run is writing the same target, and `BadInputError` where the place is taken by other files.
    """
    folder = work_folder(target)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(_lock_of(folder)))
        except BlockingIOError:
            raise OutputExistsError(
                f"{target}: another run is writing it; wait for that one, or name another output"
            ) from None
        clean_leftovers(target)
        work = WorkFolder(folder, key, notify)
        stack.enter_context(Undoing(lambda: _delete_if_empty(work)))
        _claim(work)
        try:
            yield work
        except BaseException as error:
            if isinstance(error, (UsageError, BadInputError, InfeasibleError)) and not keep_refused:
                _delete(folder)
            elif not work.is_empty and (kept := work.kept()) is not None:
                notify(kept)
            raise
        _delete(folder)


def followed_work(target: Path, key: str) -> FollowedFolder:
    """Return the work folder of a target that another process of this job has opened."""
    return FollowedFolder(work_folder(target), key, lambda _: None)


def discard_work(target: Path) -> None:
    """Delete the work folder of a target that is whole, unless another run has it or it is none of ours."""
    folder = work_folder(target)
    is_ours = folder.is_dir() and _key_of(folder) is not None
    if is_ours or (not folder.exists() and _lock_of(folder).exists()):  # the lock of a run that was killed at the end
        with suppress(BlockingIOError), locked(_lock_of(folder)):
            _delete(folder)


def _claim(work: WorkFolder) -> None:
    """Make the folder ready for its key: what was kept under another key will never go on, and is deleted."""
    folder = work.folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadInputError(f"{folder}: stands where unfinished work is kept; move it away")
    if folder.is_dir():
        key = _key_of(folder)
        if key == work.key:
            _drop_unfinished(folder)
            return
        if key is None and not all(_is_no_piece(child) for child in folder.iterdir()):
            raise BadInputError(f"{folder}: stands where unfinished work is kept, and is not ditmoe's; move it away")
        if key is not None and any(folder.glob(f"*{_ENDING}")):
            work.notify(f"deleting what an unfinished run of another request kept in {folder}")
        _delete(folder)
    folder.mkdir()
    with replaced_whole(folder / _KEY, named=folder) as path:
        path.write_text(canonical_json({"schema": WORK_SCHEMA, "key": work.key}))


def _key_of(folder: Path) -> str | None:
    """Return the key of a work folder; None where it has none."""
    with suppress(OSError, ValueError, BadInputError):
        return str(check_schema(read_json(folder / _KEY), WORK_SCHEMA, str(folder)).get("key"))
    return None


def _drop_unfinished(folder: Path) -> None:
    """Delete pieces that a killed run was writing."""
    for child in folder.glob("*.new"):
        child.unlink(missing_ok=True)


def _delete(folder: Path) -> None:
    """Delete a work folder; its key goes last, so that what a killed run leaves of it is known as ours."""
    with suppress(OSError):
        for child in folder.iterdir():
            if child.name != _KEY:
                child.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _delete_if_empty(work: WorkFolder) -> None:
    """Delete a work folder in which nothing is kept, unless it is none of ours."""
    folder = work.folder
    if folder.is_dir() and not folder.is_symlink() and all(_is_no_piece(child) for child in folder.iterdir()):
        _delete(folder)


def _is_no_piece(child: Path) -> bool:
    """Return whether a file of a work folder keeps nothing: its key, and what was being written."""
    return child.name == _KEY or child.name.endswith(".new")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
