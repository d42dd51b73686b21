"""Checkpoints on the Hugging Face hub, fetched into the hub's own cache.

huggingface_hub says what a repository holds, who may read it, and where its cache is; its settings hold (HF_TOKEN,
HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT). The bytes are fetched here: over plain HTTP, going on where an
earlier run stopped, and compared with the SHA-256 that the hub tells, none of which it does.
The cache's layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from ditmoe_cli.errors import BadInputError, DitmoeError, first_line
from ditmoe_cli.files.containers import INDEX, files_to_fetch, locate, stands_alone
from ditmoe_cli.files.downloads import BrokenDownloadError, Download, fetch
from ditmoe_cli.files.hub_names import HubName, parse_hub_name
from ditmoe_cli.files.locks import locked
from ditmoe_cli.files.staging import replaced_whole
from ditmoe_cli.progress import BYTES, phase, readable_bytes

Notify = Callable[[str], None]
_OLDEST = 1  # huggingface_hub's version: before, it spoke HTTP through another library
_HASH = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # names a file of the cache
_MOST_NAMES = 6  # of a repository's files, in a message
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ELSEWHERE = "or fetch it elsewhere and give its path"


@dataclass(frozen=True)
class Contents:
    """What is read of a file or folder of a repository.

    Attributes:
        choose: return those files of a listing that are read of a path, and notes, given a function that fetches one.
        is_whole: return whether all that is read of a path is on disk.
    """

    choose: Callable[[Path, Sequence[Path], Callable[[Path], None]], tuple[tuple[Path, ...], tuple[str, ...]]]
    is_whole: Callable[[Path], bool]


def _is_checkpoint(path: Path) -> bool:
    """Return whether all files of a checkpoint are on disk; of a single file nothing else is asked."""
    if path.is_file() and not INDEX.fullmatch(path.name):
        return True
    try:
        locate(path)
    except (BadInputError, OSError):
        return False
    return True


CHECKPOINT = Contents(files_to_fetch, _is_checkpoint)


def fetched(text: str, notify: Notify = lambda _: None, contents: Contents = CHECKPOINT) -> Path:
    """Return the path of a file or folder that is named on the hub; see `ditmoe_cli.files.hub_names`.

    It lies in the hub's cache, where what is missing of its `contents` is fetched to: of a repository or folder, the
    files that a checkpoint there is read from. Where the hub cannot be reached, all is taken from the cache. `notify`
    takes a line that says which commit was read.

    Raises `BadInputError` where the name is malformed, or huggingface_hub is not installed; where the hub cannot be
    reached, has no such thing, or refuses it; where what arrives is damaged. Raises `DitmoeError` for a full disk.
    """
    name = parse_hub_name(text)
    _require_client(name)
    cache = _RepositoryCache(name, contents)
    if name.commit and (known := cache.file(name.commit)) is not None:
        return known
    with silenced():
        try:
            commit, listing = _listed(name)
        except Exception as error:  # of the HTTP library, the client, and the system
            return _without_hub(name, cache, error, notify)
        with _explaining(name, cache):
            return _all_fetched(name, cache, commit, listing, notify)


def kept_commit(text: str) -> Path | None:
    """Return the folder in the hub's cache of the commit that a name tells; None where nothing of it is there.

    The hub is not asked. Raises `BadInputError` for a malformed name.
    """
    name = parse_hub_name(text)
    if name.commit is None or find_spec("huggingface_hub") is None:
        return None
    folder = _RepositoryCache(name, CHECKPOINT).snapshot(name.commit)
    return folder if folder.is_dir() else None


def _require_client(name: HubName) -> None:
    """Raise `BadInputError` where huggingface_hub is not here, or too old."""
    install = "install it: pip install 'ditmoe[hub]'"
    try:
        import huggingface_hub
    except ImportError as error:
        state = "is not here" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({first_line(error)})"
        raise BadInputError(f"{name.text}: names on the hub need huggingface_hub, which {state}; {install}") from None
    version = str(huggingface_hub.__version__)
    if int(version.partition(".")[0]) < _OLDEST:
        raise BadInputError(f"{name.text}: names on the hub need huggingface_hub 1.0, here is {version}; {install}")


@dataclass(frozen=True)
class _RepositoryCache:
    """The part of the hub's cache that belongs to a repository, and what is read of it."""

    name: HubName
    contents: Contents

    @property
    def root(self) -> Path:
        """The hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser()

    @property
    def folder(self) -> Path:
        """The repository's folder."""
        return self.root / self.name.folder

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a commit, whose files are links."""
        return self.folder / "snapshots" / commit

    def path(self, commit: str) -> Path:
        """Return where what is named lies at a commit."""
        return self.snapshot(commit) / self.name.path

    def blob(self, etag: str) -> Path:
        """Return the file that a snapshot's link names."""
        return self.folder / "blobs" / etag

    def lock(self, etag: str) -> Path:
        """Return the lock that huggingface_hub takes for a file too."""
        return self.root / ".locks" / self.name.folder / f"{etag}.lock"

    @property
    def reference(self) -> Path:
        """The file that says which commit a branch or tag was."""
        return self.folder / "refs" / self.name.revision

    def known_commit(self) -> str | None:
        """Return the commit that the revision is, or was when the hub was last asked."""
        if self.name.commit is not None or not self.reference.is_file():
            return self.name.commit
        commit = self.reference.read_text(errors="replace").strip()
        return commit if _HASH.fullmatch(commit) else None

    def remember(self, commit: str) -> None:
        """Write down which commit a branch or tag is, one process at a time."""
        if self.name.commit is not None or self.known_commit() == commit:
            return
        lock = self.lock(f"refs--{self.name.revision.replace('/', '--')}")
        for folder in (lock.parent, self.reference.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(lock, lambda _: None), replaced_whole(self.reference, self.reference) as new:
            new.write_text(commit)

    def file(self, commit: str) -> Path | None:
        """Return the file that is named where it is here, and no other is read with it."""
        path = self.path(commit)
        return path if path.is_file() and stands_alone(path) else None

    def whole(self, commit: str) -> Path | None:
        """Return what is named where all that is read of it is here."""
        path = self.path(commit)
        return path if self.contents.is_whole(path) else None


def _listed(name: HubName) -> tuple[str, list[str]]:
    """Return the commit that a revision is, and the paths of all files in it."""
    from huggingface_hub import HfApi, constants

    with phase(f"asking {_host()} for {name.repository}"):
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    commit = str(info.sha)
    if not _HASH.fullmatch(commit):
        raise BadInputError(f"{name.text}: {_host()} answers as no hub does (commit {commit[:40]!r}); see HF_ENDPOINT")
    files = [str(sibling.rfilename) for sibling in info.siblings or ()]
    return commit, [file for file in files if not {"", ".", ".."} & set(file.split("/"))]


def _without_hub(name: HubName, cache: _RepositoryCache, error: Exception, notify: Notify) -> Path:
    """Return what the cache holds where the hub cannot be reached. Raises what `error` means where that is not so."""
    commit = cache.known_commit() if _is_out_of_reach(error) else None
    found = cache.whole(commit) if commit else None
    if commit is None or found is None:
        raise _explained(name, cache, error) from None
    if name.commit is None:
        notify(f"{name.text}: read from the cache, commit {commit}, since {_reason(error)}")
    return found


def _all_fetched(name: HubName, cache: _RepositoryCache, commit: str, files: Sequence[str], notify: Notify) -> Path:
    snapshot = cache.snapshot(commit)

    def bring(paths: Sequence[Path]) -> None:
        _bring(name, cache, commit, [str(PurePosixPath(path.relative_to(snapshot))) for path in paths], notify)

    listing = [snapshot / file for file in files]
    try:
        wanted, notes = cache.contents.choose(cache.path(commit), listing, lambda path: bring([path]))
    except BadInputError as error:  # which names folders of the cache
        raise BadInputError(error.message.replace(str(cache.path(commit)), name.text)) from None
    if not wanted:
        raise BadInputError(f"{name.text}: {name.repository} has no {name.path!r} at {_revision(name)}{_held(files)}")
    bring(wanted)
    cache.remember(commit)
    if name.commit is None:
        notify(f"{name.text}: reading commit {commit}; end the name in @COMMIT to read the same another time")
    for text in notes:
        notify(f"{name.text}: {text}")
    return cache.path(commit)


def _held(files: Sequence[str]) -> str:
    """Return the files that a repository has, for a message."""
    shown = [file for file in files if not file.startswith(".")]
    if not shown:
        return ", nor anything else"
    return f"; it has {', '.join(shown[:_MOST_NAMES])}{', …' if len(shown) > _MOST_NAMES else ''}"


def _bring(name: HubName, cache: _RepositoryCache, commit: str, files: Sequence[str], notify: Notify) -> None:
    """Fetch files into the cache that are not there, counting their bytes in one phase."""
    missing = {file: None for file in files if not (cache.snapshot(commit) / file).is_file()}
    if not missing:
        return
    with phase(f"asking {_host()} for {len(missing)} files"):
        downloads = {file: _download(name, cache, commit, file) for file in missing}
    absent = [download for download in downloads.values() if not download.target.is_file()]
    total, arrived = sum(d.size or 0 for d in absent), sum(d.arrived for d in absent)
    _check_room(name, cache, total - arrived)
    with phase(f"fetching {name.text}", total, BYTES, start=arrived) as progress:
        for file, download in downloads.items():
            _fetch_one(cache, commit, file, download, progress, notify)


def _download(name: HubName, cache: _RepositoryCache, commit: str, file: str) -> Download:
    """Return how a file is fetched, as the hub tells."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(name.repository, file, revision=commit)
    told = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if told.etag is None or not _ETAG.fullmatch(told.etag):
        raise BadInputError(f"{name.text}: {_host()} tells no usable digest of {file} (ETag {told.etag!r})")
    return Download(
        url=url,
        target=cache.blob(told.etag),
        shown=f"{name.text}: {file}",
        digest=told.etag,
        size=told.size,
        headers=build_hf_headers(),
        seconds=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )


def _fetch_one(
    cache: _RepositoryCache, commit: str, file: str, download: Download, progress: Callable[[int], None], notify: Notify
) -> None:
    """Fetch a file into the cache, once for all processes, and link it into the snapshot."""
    from huggingface_hub import get_session, hf_hub_download

    lock = cache.lock(download.target.name)
    for folder in (lock.parent, download.target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock, notify):
        if not download.target.is_file():
            fetch(download, get_session(), progress)
    hf_hub_download(cache.name.repository, file, revision=commit)  # finds the file there, and links it


def _check_room(name: HubName, cache: _RepositoryCache, needed: int) -> None:
    """Raise `DitmoeError` where the disk of the cache has not that much room."""
    there = next(path for path in (cache.root, *cache.root.absolute().parents) if path.is_dir())
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and needed > free:
        raise DitmoeError(
            f"{name.text}: needs {readable_bytes(needed)}, and the hub's cache in {cache.root} has "
            f"{readable_bytes(free)} free; make room there, or set HF_HOME to a folder elsewhere"
        )


@contextmanager
def silenced() -> Iterator[None]:
    """Silence the log messages of libraries; problems are raised as errors."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _explaining(name: HubName, cache: _RepositoryCache) -> Iterator[None]:
    """Turn the errors of libraries and of the system into ours."""
    try:
        yield
    except DitmoeError:
        raise
    except Exception as error:
        raise _explained(name, cache, error) from None


def _explained(name: HubName, cache: _RepositoryCache, error: Exception) -> DitmoeError:
    """Return our error for one of a library or of the system, with what to do."""
    if isinstance(error, BrokenDownloadError):
        if not _status(error.cause):
            return BadInputError(
                f"{name.text}: fetching it broke off ({_reason(error.cause)}); what has arrived is kept, and the same "
                "command goes on from there"
            )
        error = error.cause
    if isinstance(error, DitmoeError):
        return error
    if isinstance(error, OSError) and error.errno in _FULL:
        return DitmoeError(
            f"{name.text}: no space left in the hub's cache in {cache.root}; what has arrived is kept there, so make "
            "room and run the command again, or set HF_HOME to a folder elsewhere"
        )
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return BadInputError(
            f"{name.text}: the hub's cache in {cache.root} cannot be written ({error.strerror}); set HF_HOME to a "
            "folder that can"
        )
    return BadInputError(f"{name.text}: {_reason(error)}; {_remedy(name, error)}")


def _status(error: Exception) -> int:
    """Return the HTTP status of an answer that refuses, 0 for any other error."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _is_out_of_reach(error: Exception) -> bool:
    """Return whether an error is the connection's or the server's own, and not an answer to what was asked."""
    if isinstance(error, DitmoeError | ValueError):
        return False
    return _status(error) in (0, 429) or _status(error) >= 500


def _is_absent(error: Exception) -> bool:
    """Return whether the hub says that a repository is not there, as it does of private ones to strangers."""
    from huggingface_hub import errors, get_token

    return isinstance(error, errors.RepositoryNotFoundError) or (_status(error) == 401 and get_token() is None)


def _reason(error: Exception) -> str:
    """Return what went wrong, without the address that was asked for, which may hold a signature."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if _is_absent(error):
        return "there is no such repository, or it is private"
    if _status(error):
        return f"{_host()} answers with HTTP {_status(error)}"
    if isinstance(error, ValueError):
        return f"no name on the hub ({first_line(error)})"
    if "Timeout" in type(error).__name__ or isinstance(error, TimeoutError):
        return f"{_host()} does not answer"
    return f"{_host()} cannot be reached: {first_line(error)}"


def _remedy(name: HubName, error: Exception) -> str:
    """Return what to do about an error."""
    from huggingface_hub import constants, errors

    log_in = "log in with hf auth login or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"ask for access at {constants.ENDPOINT}/{name.repository}, and {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"name a branch, a tag or a whole commit after the @, not {name.revision!r}"
    if _is_absent(error):
        return f"check {name.repository!r}, and for a private one {log_in}"
    if _status(error) == 401:
        return f"the token is not valid: {log_in} anew"
    if _status(error) == 403:
        return f"{log_in} of somebody who may read {name.repository}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"the hub's cache does not hold it: unset HF_HUB_OFFLINE to fetch it, {_ELSEWHERE}"
    if isinstance(error, ValueError):
        return f"check {name.repository!r}"
    return f"try again later, {_ELSEWHERE}"


def _revision(name: HubName) -> str:
    return f"commit {name.commit[:12]}" if name.commit else name.revision


def _host() -> str:
    """Return the hub's address, without the scheme of the usual one."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT).removeprefix("https://")
