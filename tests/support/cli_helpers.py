"""Running the command line: in a process of its own, in this process, in a shell, on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import REPOSITORY

from ditmoe_cli.cli.app import run as run_program
from ditmoe_cli.files.header import read_safetensors_header

PATHS = ("checkpoint", "original", "profile", "samples")
FIELDS = {*PATHS, "schema", "result", "history", "given"}


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: ours, with the package on its path."""
    search = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name not in ("DITMOE_TRACEBACK", "NO_COLOR")}
    return {**kept, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **changes}


def start(words: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    """Start a program in a folder, with pipes for its output."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        """The one JSON document on stdout, in one line unless it holds a plan; anything else there fails."""
        assert self.code in (0, 6), f"exit {self.code}: {self.err}"
        document = json.loads(self.out)
        assert isinstance(document, dict)
        one_line = self.out.count("\n") == 1 or "plan" in document["result"]
        assert self.out.endswith("\n") and one_line, f"stdout is not one line: {self.out!r}"
        return document

    @property
    def result(self) -> dict[str, Any]:
        """The command's own answer."""
        result = self.envelope["result"]
        assert isinstance(result, dict)
        return result

    @property
    def path(self) -> Path:
        """The checkpoint in the envelope."""
        return Path(self.envelope["checkpoint"])

    @property
    def notes(self) -> list[str]:
        """The lines on stderr, none of which may be an error."""
        lines = self.err.splitlines()
        assert all(line.startswith("ditmoe: ") for line in lines), self.err
        assert not any(line.startswith("ditmoe: error: ") for line in lines), self.err
        return lines

    def error(self, code: int) -> str:
        """The one error line, the last on stderr after any notes; the exit code must be `code`, stdout empty."""
        assert self.code == code, f"exit {self.code}, expected {code}: {self.err or self.out}"
        assert self.out == ""
        *notes, last = self.err.splitlines()
        assert last.startswith("ditmoe: error: "), self.err
        assert all(note.startswith("ditmoe: ") and not note.startswith("ditmoe: error") for note in notes), self.err
        assert "internal error" not in last, self.err
        return last.removeprefix("ditmoe: error: ")


class _Untouchable(io.StringIO):
    """A stdin that nobody may read."""

    def read(self, size: int | None = -1, /) -> str:
        raise AssertionError(f"stdin was read ({size})")

    @property
    def buffer(self) -> io.BytesIO:
        raise AssertionError("stdin was read")


@contextlib.contextmanager
def threads_as_before() -> Iterator[None]:
    """Leave torch's threads and the environment as they were: ``--threads`` sets both for the whole process."""
    count = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            torch.set_num_threads(count)


def here(*args: object, cwd: Path, stdin: str | None = None) -> Outcome:
    """Run a command inside this process, off a terminal; without `stdin` it must not read any."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin
    sys.stdin = _Untouchable() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    try:
        with (
            threads_as_before(),
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = run_program([str(arg) for arg in args])
    finally:
        sys.stdin = before
    return Outcome(code, out.getvalue(), err.getvalue())


def piped(line: str, cwd: Path) -> Outcome:
    """Run the commands of a pipe one after the other in this process: each reads what the one before printed.

    Ends at the first command that fails. What the commands say on stderr is put together.
    """
    stdin, err = None, ""
    for stage in line.split("|"):
        program, *words = shlex.split(stage)
        assert program == "ditmoe"
        outcome = here(*words, cwd=cwd, stdin=stdin)
        stdin, err = outcome.out, err + outcome.err
        if outcome.code:
            break
    return Outcome(outcome.code, outcome.out, err)


class _Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(*args: object, cwd: Path, **env: str) -> tuple[int, str]:
    """Run a command in this process on streams that say they are a terminal; return exit code and text."""
    screen = _Terminal()
    with (
        threads_as_before(),
        mock.patch.dict(os.environ, env),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
    ):
        code = run_program([str(arg) for arg in args])
    return code, screen.getvalue()


def command(*args: object) -> list[str]:
    """The words that start ditmoe as a program."""
    return [sys.executable, "-m", "ditmoe_cli", *map(str, args)]


def outside(*args: object, cwd: Path, stdin: str = "", timeout: float = 120, **env: str) -> Outcome:
    """Run a command in a process of its own, its streams being pipes."""
    done = subprocess.run(
        command(*args), cwd=cwd, input=stdin, env=environment(**env), text=True, capture_output=True, timeout=timeout
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def in_two_processes(*args: object, cwd: Path, threads: Sequence[int] = (1, 1)) -> list[Outcome]:
    """Run a command in two processes of one job, as torchrun does, whose own start takes as long as theirs.

    They meet at a store of this process, on a port that the system gave it: none that others may take meanwhile.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {
        "TORCHELASTIC_RUN_ID": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    children = [
        start(command(*args), cwd, **job, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS=str(count))
        for rank, count in enumerate(threads)
    ]
    try:
        said = [child.communicate(timeout=600) for child in children]
    finally:
        for child in children:
            child.kill()
    return [Outcome(child.returncode, *streams) for child, streams in zip(children, said, strict=True)]


_SERIES = """
import contextlib, io, json, sys
from ditmoe_cli.cli.app import run
outcomes = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    heavy = [name for name in ("torch", "numpy", "rich", "safetensors", "PIL", "sklearn") if name in sys.modules]
    outcomes.append([code, out.getvalue(), err.getvalue(), heavy])
json.dump(outcomes, sys.stdout)
"""


def series(commands: Sequence[Sequence[object]], cwd: Path, **env: str) -> list[tuple[Outcome, list[str]]]:
    """Run commands one after the other in one fresh process, each with the heavy modules imported by its end."""
    words = [[str(word) for word in one] for one in commands]
    done = subprocess.run(
        [sys.executable, "-c", _SERIES],
        cwd=cwd,
        input=json.dumps(words),
        env=environment(**env),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [(Outcome(code, out, err), heavy) for code, out, err, heavy in json.loads(done.stdout)]


def shell(script: str, cwd: Path, timeout: float = 240, **env: str) -> Outcome:
    """Run a bash script with pipefail, in which `ditmoe` is the command."""
    words = shlex.join(command())
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail\nditmoe() {{ {words} "$@"; }}\n{script}'],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=timeout,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def terminal(*args: object, cwd: Path, columns: int = 80, **env: str) -> tuple[int, str]:
    """Run a command on a pseudo-terminal; return its exit code and all that it printed there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = environment(COLUMNS=str(columns), TERM="xterm-256color", **env)
    child = subprocess.Popen(command(*args), cwd=cwd, stdin=slave, stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    chunks = []
    with contextlib.suppress(OSError):  # the other end closed: EIO
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
    os.close(master)
    return child.wait(timeout=60), b"".join(chunks).decode().replace("\r\n", "\n")


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, hidden ones too, by relative name."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def outputs(folder: Path) -> dict[str, str]:
    """`contents` without the measurements that are kept beside profiles, by dry runs too."""
    return {name: digest for name, digest in contents(folder).items() if not name.endswith(".measured.json")}


def bytes_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in a safetensors file."""
    return {name: stored.info.shape for name, stored in read_safetensors_header(path).tensors.items()}
