"""JSON from files and pipes that nobody vouches for.

`json.loads` alone takes two values of one key, numbers that JSON does not know, texts that no file can hold, and
nesting that a later step fails at. It also makes some hundred bytes of memory of three bytes of text.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

_LONGEST = 100_000_000  # bytes of a file, as of a safetensors header
_PART = 2**20  # bytes read at a time
_MOST_VALUES = 2_000_000  # in one text; a checkpoint's header has some 10 a tensor
_DEEPEST = 64
_LONGEST_NUMBER = 300  # digits of whole numbers; those of more are beyond floats
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, finite: bool = True, names: bool = False) -> Any:
    """Return the value of the JSON file at `path`, or of what another program writes into a pipe; see `parse_json`.

    A pipe that nobody writes into counts as empty. Raises `OSError` where it cannot be read, and `ValueError` where it
    is no JSON, longer than 100 MB, or neither a file nor a pipe.
    """
    return parse_json(read_file(path), finite, names)


def read_file(path: Path, longest: int = _LONGEST) -> bytes:
    """Return the bytes of a file or a pipe, at most `longest`; raises as `read_json`."""
    data = bytearray()
    with open(path, "rb", buffering=0, opener=_at_once) as file:
        if not any(kind(os.fstat(file.fileno()).st_mode) for kind in (stat.S_ISREG, stat.S_ISFIFO)):
            raise ValueError("it is no file")
        os.set_blocking(file.fileno(), True)
        while part := file.read(_PART):
            data += part
            if len(data) > longest:
                raise ValueError(f"it is longer than {longest} bytes")
    return bytes(data)


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for a writer, which a pipe may never get."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse_json(data: bytes | str, finite: bool = True, names: bool = False) -> Any:
    """Return the value of a JSON text, UTF-8, UTF-16 or UTF-32 in bytes.

    Raises `ValueError` with one line for what is no JSON, holds a key twice, half a character or a whole number of more
    than 300 digits, nests more than 64 deep or holds millions of values; with `finite` also for numbers that are not
    finite. With `names` texts may be names of files whose bytes are no text, as Python holds them (PEP 383).
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
    if sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    constant, number = (_refuse_constant, _finite_float) if finite else (None, None)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=constant, parse_float=number, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    _check_depth(value)
    if _SURROGATE.search(text):
        for part in _texts(value):
            part.encode(
                errors="surrogateescape" if names else "strict"
            )  # raises UnicodeEncodeError, a ValueError, for half a character
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _whole(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"{text[:60]}… is out of range")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:60]} is out of range")
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError("nested too deep")


def _inside(value: object) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _texts(value: object) -> Iterator[str]:
    """Yield all keys and texts of a value of limited depth."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        yield from value
    for inner in _inside(value):
        yield from _texts(inner)
