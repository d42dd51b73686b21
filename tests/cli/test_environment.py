"""The environment that commands meet: streams, encodings, names that are no text, folders that are gone."""

from __future__ import annotations

import codecs
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from cli_helpers import Outcome, command, contents, environment, here, outside, shell
from conftest import make_pico

from ditmoe_cli.cli.app import run
from ditmoe_cli.cli.terminal import print_anything

NO_TEXT = os.fsdecode(b"caf\xe9")  # Latin-1, no UTF-8
HEADS = make_pico(sampler="rf", in_channels=1).config.num_heads
SAMPLING = ("--images", 4, "--steps", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    pico = make_pico(sampler="rf", in_channels=1)
    pico.save(folder / "a.safetensors")
    pico.save(folder / f"{NO_TEXT}.safetensors")
    pico.save_pt(folder / f"{NO_TEXT}.pt", "ema")
    return folder


# stdin


def with_stdin(stdin: io.IOBase | None, *words: str) -> Outcome:
    """Run a command in this process with another stdin."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.multiple(sys, stdin=stdin, stdout=out, stderr=err):
        code = run(list(words))
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("words", [("inspect",), ("prune", "--keep", "2"), ("fid",), ("compare",), ("bench",)])
def test_without_a_pipe_no_checkpoint_was_given(words: tuple[str, ...], tmp_path: Path) -> None:
    """As in a script (/dev/null), under a supervisor (closed), with an empty file."""
    (tmp_path / "empty").touch()
    for name in ("/dev/null", tmp_path / "empty"):
        with open(name) as stdin:  # noqa: PTH123
            assert with_stdin(stdin, *words).error(2).startswith("no checkpoint: give a CHECKPOINT (a file, a folder")
    assert with_stdin(stdin, *words).error(2).startswith("no checkpoint"), "closed"
    assert with_stdin(None, *words).error(2).startswith("no checkpoint")


def test_a_report_misses_its_profile() -> None:
    with open("/dev/null") as stdin:  # noqa: PTH123
        assert with_stdin(stdin, "report", "profile").error(2).startswith("no profile: give a profile FILE")


def test_an_empty_pipe_is_that_of_a_command_that_failed() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with open(reading) as stdin:  # noqa: PTH123
        said = with_stdin(stdin, "inspect").error(3)
    assert said.startswith("stdin is empty: the command before this one in the pipe failed") and "CHECKPOINT" in said


def test_an_envelope_may_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "envelope").write_text(here("inspect", "a.safetensors", cwd=folder).out)
    with open(tmp_path / "envelope") as stdin:  # noqa: PTH123
        assert with_stdin(stdin, "inspect").code == 0


# names and encodings


def encoded(text: str, encoding: str) -> bytes:
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    print_anything(stream)
    stream.write(text)
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "encoding", "printed"),
    [
        ("é ± —", "utf-8", "é ± —".encode()),
        ("é ± —", "ascii", rb"\xe9 \xb1 \u2014"),
        ("é ± —", "latin-1", b"\xe9 \xb1 \\u2014"),
        (NO_TEXT, "utf-8", b"caf\xe9"),
        (NO_TEXT, "ascii", b"caf\xe9"),
        (f"é {NO_TEXT}", "ascii", b"\\xe9 caf\xe9"),
    ],
)
def test_streams_print_everything(text: str, encoding: str, printed: bytes) -> None:
    assert encoded(text, encoding) == printed


def test_other_streams_are_left_alone() -> None:
    print_anything(io.StringIO())
    assert codecs.lookup_error("ditmoe")


def raw(*words: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*words), cwd=cwd, env=environment(**changes), stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )


def test_an_output_with_an_accent_is_written_where_only_ascii_prints(folder: Path, tmp_path: Path) -> None:
    done = raw(
        "convert", folder / "a.safetensors", "-o", "né.safetensors", "-q", cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/n\\xe9.safetensors\n".encode())
    assert [file.name for file in tmp_path.iterdir()] == ["né.safetensors"]


ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_quiet_command_prints_the_bytes_of_a_name(folder: Path, tmp_path: Path) -> None:
    """They are what a script finds the file by, also where the locale knows ASCII alone."""
    done = raw("convert", folder / f"{NO_TEXT}.pt", "--heads", HEADS, "-q", cwd=tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr
    assert Path(os.fsdecode(done.stdout).rstrip("\n")).is_file()
    assert done.stdout == os.fsencode(tmp_path) + b"/caf\xe9.converted.safetensors\n"


def test_names_that_are_no_text_pass_through_a_pipe(folder: Path) -> None:
    profiled = here("profile-experts", f"{NO_TEXT}.safetensors", *SAMPLING, "--bins", 2, cwd=folder)
    pruned = here("prune", "--keep", 2, "--refit-tokens", 64, cwd=folder, stdin=profiled.out)
    sampled = here("sample", *SAMPLING, "--grid", f"{NO_TEXT}.png", cwd=folder, stdin=pruned.out)
    scored = here(
        "fid",
        "--ref",
        f"{NO_TEXT}.pt",
        "--heads",
        HEADS,
        *SAMPLING,
        "--extractor",
        "pixels",
        cwd=folder,
        stdin=sampled.out,
    )
    assert [outcome.code for outcome in (profiled, pruned, sampled, scored)] == [0, 0, 0, 0], scored.err
    assert pruned.path.name.startswith(NO_TEXT) and pruned.path.is_file()
    assert pruned.out.isascii() and (folder / f"{NO_TEXT}.png").is_file()


def test_pickles_are_read_by_names_that_are_no_text(folder: Path) -> None:
    described = here("inspect", f"{NO_TEXT}.pt", "--heads", HEADS, cwd=folder).result
    assert "ema" in described["layout"] and described["config"]["depth"] == 2


# streams that are closed, folders that are gone


def test_every_stream_may_be_closed(folder: Path, tmp_path: Path) -> None:
    """Nothing that is printed may land in a file that was opened in the place of a stream."""
    line = f"ditmoe convert {shlex.quote(str(folder / 'a.safetensors'))} -o"
    assert shell(f"{line} one.safetensors <&- >&- 2>&-", tmp_path).code == 0
    assert here("convert", folder / "a.safetensors", "-o", "two.safetensors", cwd=tmp_path).code == 0
    (first, second) = contents(tmp_path).values()
    assert first == second


def test_a_working_directory_that_is_gone_is_said(folder: Path, tmp_path: Path) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && ditmoe convert {shlex.quote(str(folder / 'a.safetensors'))}"
    absolute = f"{script} -o {shlex.quote(str(tmp_path / 'b.safetensors'))}"  # torch cannot load its libraries there
    for line in (script, absolute):
        said = shell(line, tmp_path).error(3)
        assert said == "the working directory is not there any more; change into one that is"


def test_numbers_have_points_whatever_the_locale(folder: Path) -> None:
    outcome = outside("inspect", "a.safetensors", cwd=folder, LC_ALL="de_DE.UTF-8", LC_NUMERIC="de_DE.UTF-8")
    assert (
        outcome.code == 0 and json.loads(outcome.out)["result"] == here("inspect", "a.safetensors", cwd=folder).result
    )


def test_outputs_follow_the_umask(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert here("convert", folder / "a.safetensors", "-o", "o.safetensors", cwd=tmp_path).code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "o.safetensors").stat().st_mode & 0o777 == 0o640
