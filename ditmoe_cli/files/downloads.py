"""One file over HTTP: resumed where an earlier run stopped, hashed as it arrives, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.progress import BYTES, phase

_CHUNK = 1 << 20
_WAITS = (1.0, 1.0, 2.0, 4.0, 8.0)  # seconds before each new try that follows one without a byte
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = 206
_OUT_OF_RANGE = 416
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that another try may not get


@dataclass(frozen=True)
class Download:
    """A file to fetch.

    Attributes:
        url: where it is.
        target: where it is to be.
        shown: its name, for messages.
        digest: its SHA-256 in hex; another text where it is not known.
        size: its bytes, None where they are not known.
        headers: sent with each request, such as a token's.
        seconds: that an answer may take.
    """

    url: str
    target: Path
    shown: str
    digest: str = ""
    size: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    seconds: float = 10.0

    @property
    def part(self) -> Path:
        """Where what has arrived is kept until it is whole."""
        return self.target.with_name(f"{self.target.name}.incomplete")

    @property
    def arrived(self) -> int:
        """The bytes that an earlier run has fetched, and that can be gone on from."""
        there = self.part.stat().st_size if self.part.is_file() else 0
        return there if self.size is not None and there <= self.size else 0


class BrokenDownloadError(Exception):
    """The connection failed, though not the disk; `cause` is the error of the HTTP library."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def fetch(download: Download, client: Any, progress: Callable[[int], None]) -> None:
    """Fetch a file with an httpx `client`, going on where an earlier run stopped; `progress` counts bytes.

    Raises `BrokenDownloadError` where the connection fails and further tries bring nothing: what has arrived is kept.
    Raises `BadInputError` where what arrived is not what the digest says, and deletes it; `OSError` of a full disk.
    """
    with download.part.open("ab+") as file:
        partial = _Partial(file, download, progress)
        partial.hash_what_arrived()
        tries = 0
        while not partial.is_whole:
            before = partial.position
            try:
                partial.receive(client)
            except BrokenDownloadError as error:
                tries = 0 if partial.position > before else tries + 1
                if tries >= len(_WAITS) or not _may_pass(error.cause):
                    raise
                time.sleep(_WAITS[tries])
        file.flush()
        os.fsync(file.fileno())
    _check(download, partial)
    download.part.replace(download.target)


@dataclass
class _Partial:
    """A file as it arrives: what is on disk, and the hash of that."""

    file: BinaryIO
    download: Download
    progress: Callable[[int], None]
    position: int = 0
    ended: bool = False  # as far as the server tells, for files of unknown size

    def __post_init__(self) -> None:
        self.hash = hashlib.sha256()

    @property
    def is_whole(self) -> bool:
        return self.position == self.download.size if self.download.size is not None else self.ended

    def hash_what_arrived(self) -> None:
        """Hash what an earlier run fetched; begin anew where that is no part of the file."""
        arrived = self.download.arrived
        if not arrived:
            return self.restart()
        self.file.seek(0)
        with phase("checking what an earlier run fetched", arrived, BYTES) as checked:
            while chunk := self.file.read(_CHUNK):
                self.hash.update(chunk)
                self.position += len(chunk)
                checked(len(chunk))
        return None

    def restart(self) -> None:
        """Drop what has arrived."""
        self.file.truncate(0)
        self.progress(-self.position)
        self.position, self.hash, self.ended = 0, hashlib.sha256(), False

    def receive(self, client: Any) -> None:
        """Receive the rest, as far as it comes. Raises `BrokenDownloadError` where the connection ends before it."""
        chunks = self._chunks(client)
        while (chunk := _next(chunks)) is not None:
            self.file.write(chunk)
            self.hash.update(chunk)
            self.position += len(chunk)
            self.progress(len(chunk))
        self.ended = True
        if self.download.size is not None and self.position < self.download.size:
            raise BrokenDownloadError(ConnectionError(f"the connection ended after {self.position:,} bytes"))
        if self.download.size is not None and self.position > self.download.size:
            self.restart()
            raise BrokenDownloadError(ConnectionError(f"more than the {self.download.size:,} bytes told arrived"))

    def _chunks(self, client: Any) -> Iterator[bytes]:
        """Yield what the server sends from this position on, or from the start where it sends no parts."""
        from huggingface_hub.utils import hf_raise_for_status

        asked = {"Accept-Encoding": "identity", **({"Range": f"bytes={self.position}-"} if self.position else {})}
        headers = {**self.download.headers, **asked}
        with client.stream("GET", self.download.url, headers=headers, timeout=self.download.seconds) as response:
            if self.position and response.status_code == _OUT_OF_RANGE:
                self.restart()
                raise ConnectionError("the server has no such part of the file")
            hf_raise_for_status(response)
            if self.position and response.status_code != _PARTIAL:
                self.restart()
            yield from response.iter_bytes()  # as they come: a chunk size would lose what came before a break


def _next(chunks: Iterator[bytes]) -> bytes | None:
    """Return the next chunk, None after the last. Raises `BrokenDownloadError` for whatever the HTTP library raises."""
    try:
        return next(chunks, None)
    except Exception as error:
        raise BrokenDownloadError(error) from None


def _may_pass(error: Exception) -> bool:
    """Return whether another try may go better: the server did not refuse."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in _PASSING


def _check(download: Download, partial: _Partial) -> None:
    """Raise `BadInputError` where the bytes are not those of the digest."""
    digest = partial.hash.hexdigest()
    if not _SHA256.fullmatch(download.digest) or digest == download.digest:
        return
    download.part.unlink()
    raise BadInputError(
        f"{download.shown}: what arrived has SHA-256 {digest[:12]}…, and the hub says {download.digest[:12]}…; it is "
        "deleted, fetch it again with the same command"
    )
