"""What a written report says of its own making, so that the same report is not made twice.

A page holds the digest of its request and, as JSON, all numbers of the report; each figure the same digest, and the
names of the figures that were written with it. A request is the profile's bytes and name, the settings and the version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

from ditmoe_cli.files.json_text import parse_json

_REQUEST = re.compile(r'<meta name="ditmoe-request" content="([0-9a-f]{64})">')
_NUMBERS = re.compile(r'<template id="numbers">(.*?)</template>', re.DOTALL)


def printable(name: str) -> str:
    """Return a file's name for reading: � for bytes that are no UTF-8 and for what cannot be printed."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def numbers_element(numbers: dict[str, Any]) -> str:
    """Return the element that keeps a report's numbers in its page; nothing of it is shown."""
    return f'<template id="numbers">{escape(json.dumps(numbers, sort_keys=True, allow_nan=False))}</template>'


def numbers_of(page: Path, request: str) -> dict[str, Any] | None:
    """Return the numbers in a page that was made of this request; None for another page, and for any other file."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    made, numbers = _REQUEST.search(text), _NUMBERS.search(text)
    if made is None or made[1] != request or numbers is None or not text.endswith("</html>\n"):
        return None
    try:
        document = parse_json(unescape(numbers[1]))
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def description(request: str, names: Sequence[str]) -> str:
    """Return what each of the figures `names` says of its making."""
    return json.dumps({"request": request, "figures": list(names)})


def holds_figures(folder: Path, request: str) -> bool:
    """Return whether a folder holds the figures of this request, all of them and nothing else."""
    from PIL import Image, UnidentifiedImageError

    from ditmoe_cli.routing.report.pictures import DESCRIPTION

    try:
        files = sorted(folder.iterdir())
        said = set()
        for file in files:
            with Image.open(file) as picture:
                picture.load()
                said.add(str(picture.info.get(DESCRIPTION)))
        document = parse_json(said.pop()) if len(said) == 1 else {}
        names = [f"{name}.png" for name in document["figures"]]
        return document["request"] == request and sorted(names) == [file.name for file in files]
    except (OSError, UnidentifiedImageError, ValueError, TypeError, KeyError):
        return False
