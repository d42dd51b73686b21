"""Printing of commands: the result on stdout, everything else on stderr.

On a terminal, or with ``--text``, a result is a short table; off a terminal, or with ``--json``, one JSON document;
with ``-q`` the bare path of the output.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TextIO

import typer

from ditmoe_cli.errors import UsageError, as_option, named

Row = tuple[str, object]
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONGEST = 4000  # characters of a line
_TAKEN: ContextVar[list[dict[str, Any]] | None] = ContextVar("taken", default=None)


@dataclass(frozen=True)
class JsonPrinting:
    """How a command prints that writes no file."""

    panel: ClassVar[str] = "Printing"

    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on a terminal too.")] = False
    as_text: Annotated[bool, typer.Option("--text", help="Print tables off a terminal too.")] = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.as_json and self.as_text:
            raise UsageError("--json and --text exclude each other: a result is printed once")

    @property
    def is_text(self) -> bool:
        """Whether results are printed for people: with ``--text``, and on a terminal without ``--json``."""
        return self.as_text or (sys.stdout.isatty() and not self.as_json)


@dataclass(frozen=True)
class Printing(JsonPrinting):
    """How a command prints."""

    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path of the output.")] = False


def uses_colour(stream: TextIO) -> bool:
    """Return whether to print a stream in colour and bold."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def print_anything(*streams: TextIO) -> None:
    """Let streams print every text: what their encoding lacks as an escape, and names that are no text as they are.

    Names of files may be any bytes. Python keeps those that it cannot read as text in characters that nothing can
    encode (https://peps.python.org/pep-0383/); the bytes themselves are what a script finds the file by.
    """
    codecs.register_error("ditmoe", _as_bytes)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ditmoe")


def _as_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the bytes, or else the escapes, of characters that cannot be encoded, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    one = error.object[error.start]
    if 0xDC80 <= ord(one) <= 0xDCFF:
        return bytes([ord(one) - 0xDC00]), error.start + 1
    return one.encode("ascii", "backslashreplace"), error.start + 1


def note(message: str) -> None:
    """Print a note on stderr, in one line that is never wrapped."""
    sys.stderr.write(
        f"ditmoe: {printable(clipped(with_options(message)))}\n"
    )  # at once, whatever a thread writes meanwhile
    sys.stderr.flush()


def printable(text: str) -> str:
    """Return a text with escapes in place of characters that steer a terminal, as names in a file may hold them."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def clipped(message: str) -> str:
    """Return a message without its middle where it is longer than a screen, as values of a damaged file make it."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"


def with_options(message: str) -> str:
    """Return a message with its settings named as options: ``⟨group_size⟩`` as ``--group-size``."""
    return named(message, as_option)


def emit(
    printing: JsonPrinting, document: dict[str, Any], rows: Sequence[Row], path: str | None, editable: bool = False
) -> None:
    """Print a command's result: `document` for programs, `rows` for people, `path` under ``-q``.

    A document that may be edited, as a plan, is indented; others take one line. `taken_results` takes what is printed.
    """
    taken = _TAKEN.get()
    if taken is not None:
        taken.append(document)
        return
    if printing.quiet:
        text = path or ""
    elif printing.is_text:
        text = _table(rows)
    else:
        text = indented(document) if editable else json.dumps(document, sort_keys=True)
    if text:
        print(text, flush=True)


@contextmanager
def taken_results() -> Iterator[list[dict[str, Any]]]:
    """Yield the list that takes the documents of commands that are called, in place of stdout."""
    documents: list[dict[str, Any]] = []
    before = _TAKEN.set(documents)
    try:
        yield documents
    finally:
        _TAKEN.reset(before)


def _table(rows: Sequence[Row]) -> str:
    """Return labels and values in two columns; values are never wrapped or cut."""
    width = max((len(label) for label, _ in rows), default=0)
    bold, plain = ("\033[1m", "\033[0m") if uses_colour(sys.stdout) else ("", "")
    return "\n".join(f"{bold}{printable(label):<{width}}{plain}  {printable(str(value))}" for label, value in rows)


def indented(value: object, depth: int = 0, room: int = 100) -> str:
    """Return JSON for an editor, keys sorted: on one line what fits `room` characters or is a list of plain values."""
    line = json.dumps(value, sort_keys=True)
    is_plain_list = isinstance(value, list) and not any(isinstance(each, dict | list) for each in value)
    if not isinstance(value, dict | list) or is_plain_list or len(line) <= room - 2 * depth:
        return line
    inner = "  " * (depth + 1)
    if isinstance(value, dict):
        entries = [f"{json.dumps(name)}: {indented(value[name], depth + 1, room)}" for name in sorted(value)]
        opening, closing = "{}"
    else:
        entries = [indented(each, depth + 1, room) for each in value]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(entries) + f"\n{'  ' * depth}{closing}"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells with equal columns, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def rate(speed: float) -> str:
    """Return a rate for reading."""
    return f"{speed:,.0f}/s" if speed >= 1000 else f"{speed:.3g}/s"
