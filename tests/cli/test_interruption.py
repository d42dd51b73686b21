"""Signals end the program in one line and their exit code, wherever it stands, and let what it undoes be undone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import Outcome, environment
from conftest import Pico, heed_signals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LINES = {130: "interrupted", 143: "ended by SIGTERM", 129: "ended by SIGHUP"}


def said(code: int) -> str:
    return f"ditmoe: error: {LINES[code]}\n"


def ran(script: str, *words: object, cwd: Path, ignoring: signal.Signals | None = None) -> Outcome:
    """Run Python lines as the program; `ignoring` is a signal that is ignored when it starts, as by nohup."""

    def prepare() -> None:
        heed_signals()
        if ignoring is not None:
            signal.signal(ignoring, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", f"import signal, sys\n{script}", *map(str, words)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=prepare,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


HAMMERED = """
from pathlib import Path
from ditmoe_cli.cli.interruption import EndedBySignals
number = int(sys.argv[1])
def clean():
    for _ in range(100):
        signal.raise_signal(number)
    Path("half").unlink()
with EndedBySignals():
    try:
        Path("half").touch()
        signal.raise_signal(number)
    finally:
        try:
            clean()
        finally:
            signal.raise_signal(signal.SIGTERM)
            Path("cleaned").touch()
"""


@pytest.mark.parametrize("number", CODES)
def test_further_signals_do_not_keep_anything_from_being_undone(number: signal.Signals, tmp_path: Path) -> None:
    ended = ran(HAMMERED, int(number), cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (CODES[number], "", said(CODES[number]))
    assert [path.name for path in tmp_path.iterdir()] == ["cleaned"]


SWALLOWED = """
import time, weakref
from ditmoe_cli.cli.interruption import EndedBySignals
class Thing:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
with EndedBySignals():
    if sys.argv[1] == "__del__":
        Thing()
        signal.raise_signal(signal.SIGINT)  # while the first one is on its way
    else:
        whole = type("Other", (), {})()
        kept = weakref.ref(whole, lambda _: signal.raise_signal(signal.SIGINT))
        del whole
    print("goes on", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["__del__", "weakref"])
def test_a_signal_that_python_swallows_is_sent_again(where: str, tmp_path: Path) -> None:
    ended = ran(SWALLOWED, where, cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (130, "goes on\n", said(130))


AMID_IMPORT = """
import os
from ditmoe_cli.cli.interruption import EndedBySignals, ending_at_once
from ditmoe_cli.files.cleanup import Undoing
with EndedBySignals():
    with Undoing(lambda: print("undone", flush=True)), ending_at_once():
        try:
            signal.raise_signal(signal.SIGHUP)
        except BaseException:
            os.abort()  # as C++ does that cannot have an exception there
"""


def test_no_exception_meets_a_library_that_is_imported(tmp_path: Path) -> None:
    ended = ran(AMID_IMPORT, cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (129, "undone\n", said(129))


TURNED = """
from ditmoe_cli.cli import app
def run(name, arguments):
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        raise ImportError("initialization failed")
app.load_program = lambda: type("Program", (), {"make_context": staticmethod(run)})
sys.argv[1:] = ["inspect"]
app.main()
"""


def test_errors_that_come_of_a_signal_are_not_told(tmp_path: Path) -> None:
    """As of extension modules, whose import a signal cuts off."""
    ended = ran(TURNED, cwd=tmp_path)
    assert (ended.code, ended.err) == (143, said(143))


IGNORED = """
from ditmoe_cli.cli.interruption import EndedBySignals
with EndedBySignals():
    signal.raise_signal(int(sys.argv[1]))
    print("goes on")
"""


@pytest.mark.parametrize("number", CODES)
def test_what_was_ignored_from_the_start_stays_ignored(number: signal.Signals, tmp_path: Path) -> None:
    ended = ran(IGNORED, int(number), cwd=tmp_path, ignoring=number)
    assert (ended.code, ended.out, ended.err) == (0, "goes on\n", "")


IMPORTING = """
class Finder:
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(finder)
            signal.raise_signal(signal.SIGINT)
module, sys.argv[1:] = sys.argv[1], sys.argv[2:]
from ditmoe_cli.__main__ import main
sys.meta_path.insert(0, finder := Finder())
main()
"""


@pytest.mark.parametrize("module", ["typer", "ditmoe_cli.cli.commands.quantize", "torch.autograd", "filelock"])
def test_a_signal_amid_imports(module: str, tmp_path: Path, pico: Callable[..., Pico]) -> None:
    source = pico().save(tmp_path / "a.safetensors")
    before = source.read_bytes(), source.stat().st_mtime_ns
    words = ("quantize", source, "--uniform", "--bits", 4, "-o", "x.safetensors")
    ended = ran(IMPORTING, module, *words, cwd=tmp_path)
    assert (ended.code, ended.out) == (130, "")
    *notes, last = ended.err.splitlines(keepends=True)
    assert last == said(130) and all(line.startswith("ditmoe: ") for line in notes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before


PHASES = """
from ditmoe_cli.files import staging, streaming, workfolder
from ditmoe_cli.__main__ import main
place, number, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
def then(module, name, before=False):
    real = getattr(module, name)
    def call(*args, **named):
        if before:
            signal.raise_signal(number)
        result = real(*args, **named)
        signal.raise_signal(number)
        return result
    setattr(module, name, call)
then(*{"write": (streaming, "write_at"), "flush": (staging, "_flush"), "exchange": (staging, "exchange")}[place])
from ditmoe_cli.files import writer
writer.write_at = streaming.write_at
sys.argv[1:] = words
main()
"""


PLACES = ("write", "flush", "exchange")


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *zip(PLACES, CODES, strict=True),
        *(
            pytest.param(place, number, marks=pytest.mark.slow)
            for place, usual in zip(PLACES, CODES, strict=True)
            for number in CODES
            if number != usual
        ),
    ],
)
def test_a_signal_in_each_phase_of_a_write(
    place: str, number: signal.Signals, tmp_path: Path, pico: Callable[..., Pico]
) -> None:
    """While threads write, in the last flush, and between the exchange and the deletion of the old folder."""
    source = pico().save(tmp_path / "a.safetensors")
    pico(seed=1).save(tmp_path / "x")
    old = (tmp_path / "x" / "config.json").stat().st_ino
    words = ("convert", source, "-o", "x", "--force", "--threads", 2)
    ended = ran(PHASES, place, int(number), *words, cwd=tmp_path)
    assert (ended.code, ended.out) == (CODES[number], "") and ended.err.endswith(said(CODES[number]))
    assert "Traceback" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "x"]
    is_new = (tmp_path / "x" / "config.json").stat().st_ino != old
    assert is_new == (place == "exchange")
