"""A hub on this machine, with the routes that fetching takes, and what real ones do wrong."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ditmoe_cli.files import downloads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOCAL = ("127.0.0.1", "::1", "localhost")
_LARGE = 1000  # bytes from which a file is stored by its SHA-256, as weights are
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Faults:
    """What goes wrong: `status` and `code` answer all requests of a `kind` (``api``, ``HEAD``, ``GET``)."""

    kind: str = ""
    status: int = 0
    code: str = ""
    times: int = 10**6  # as often the fault shows
    cut_after: int | None = None  # bytes after which the connection of a GET is closed
    no_ranges: bool = False
    digest: str = ""  # the digest that is told instead of the right one
    seconds: float = 0.0  # that an answer takes
    garbage: bool = False  # other bytes than those of the digest


@dataclass
class FakeHub:
    """Repositories by ``OWNER/REPO``: the files of each commit, and the commits of branches.

    `asked` lists the requests: method, path, the Range, and whether a token came along.
    """

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)
    token: str = ""  # without which nothing is told, where it is set
    elsewhere: str = ""  # the address of another server that has the bytes
    url: str = ""

    def add(self, repository: str, files: dict[str, bytes], commit: str = COMMIT, branch: str = "main") -> None:
        """Add a commit, to which the branch moves."""
        self.repositories.setdefault(repository, {})[commit] = files
        self.branches[repository, branch] = commit

    def add_folder(self, repository: str, folder: Path, prefix: str = "", **where: str) -> None:
        """Add a commit with the files of a folder."""
        files = {prefix + str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*"))}
        self.add(repository, files, **where)

    def fetched(self) -> list[str]:
        """Return the files whose bytes were asked for, in order."""
        return [match["file"] for method, path, *_ in self.asked if method == "GET" and (match := _FILE.match(path))]

    def commit_of(self, repository: str, revision: str) -> str | None:
        """Return the commit of a revision, None where there is none."""
        commits = self.repositories[repository]
        return revision if revision in commits else self.branches.get((repository, revision))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.asked.append((method, unquote(path), self.headers.get("Range", ""), token))
        api = _API.fullmatch(path)
        kind = "api" if api else method
        if kind == hub.faults.kind and hub.faults.times > 0:
            hub.faults.times -= 1
            time.sleep(hub.faults.seconds)
            if hub.faults.status:
                return self._send(hub.faults.status, {"X-Error-Code": hub.faults.code} if hub.faults.code else {})
        match = api or _FILE.fullmatch(path)
        if match is None:
            return self._send(404, {})
        if hub.token and token != hub.token:
            message = "Invalid credentials in Authorization header" if token else "Invalid username or password."
            return self._send(401, {"X-Error-Message": message})
        if match["repo"] not in hub.repositories:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        commit = hub.commit_of(match["repo"], unquote(match["revision"] or "main"))
        if commit is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = hub.repositories[match["repo"]][commit]
        if api:
            siblings = [{"rfilename": name} for name in files]
            return self._send(200, {}, json.dumps({"id": match["repo"], "sha": commit, "siblings": siblings}).encode())
        name = unquote(match["file"])
        if name not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        return self._file(method, commit, files[name])

    def _file(self, method: str, commit: str, content: bytes) -> None:
        faults = self.hub.faults
        large = len(content) >= _LARGE
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        digest = faults.digest or (hashlib.sha256(content).hexdigest() if large else git)
        told = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
        if self.hub.elsewhere and large:
            return self._send(302, {**told, "Location": f"{self.hub.elsewhere}{self.path}?Signature=secret"})
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and not faults.no_ranges and method == "GET":
            start, status = int(wanted[1]), 206
            told["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                return self._send(416, {})
        body = bytes(len(content)) if faults.garbage else content
        cut = faults.cut_after if method == "GET" and large and faults.times > 0 else None
        return self._send(status, {**told, "ETag": f'"{digest}"'}, body[start:], method == "HEAD", cut)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes = b"", head: bool = False, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or head:
            return
        if cut is not None and cut < len(body):
            self.hub.faults.times -= 1
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            return
        with suppress(OSError):  # who asked has not waited
            self.wfile.write(body)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a hub while the context lasts; its address is `hub.url`."""
    from huggingface_hub import close_session

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        close_session()  # whose connections keep threads of the server waiting
        server.shutdown()
        server.server_close()


def stay_here(patch: pytest.MonkeyPatch) -> None:
    """Fail what would connect to another machine, or ask for one's address; broken downloads go on without a wait."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in LOCAL:
            raise AssertionError(f"a test connects to {address}")
        connect(self, address)

    def look_up_here(host: Any, *args: Any, **named: Any) -> Any:
        if host not in LOCAL:
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(host, *args, **named)

    patch.setattr(socket.socket, "connect", connect_here)
    patch.setattr(socket, "getaddrinfo", look_up_here)
    patch.setattr(downloads, "_WAITS", (0.0, 0.0))


def point_client(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Have huggingface_hub, imported before, take a hub and a cache, as HF_ENDPOINT and HF_HUB_CACHE would."""
    import huggingface_hub
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    huggingface_hub.close_session()


def environment_of(hub: FakeHub, cache: Path, **more: str) -> dict[str, str]:
    """Return the variables by which a child takes a hub and a cache."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home"), **more}
