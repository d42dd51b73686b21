"""Licences as the files around a checkpoint name them: front matter of a hub's card, and texts of licences.

Names are those that the Hugging Face hub takes (https://huggingface.co/docs/hub/repositories-licenses).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ditmoe_cli.files.json_text import read_file

CARD = "README.md"
UNKNOWN = "other"
"""What the hub calls licences that it has no name for."""
_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
_KEYS = ("license", "licence", "modelspec.license")
_LONGEST = 1_000_000  # bytes
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9.+-]{1,60}")
_CREATIVE_COMMONS = re.compile(
    r"attribution(?P<nc>-noncommercial)?(?P<rest>-sharealike|-noderivatives)? (?P<version>\d\.\d)", re.IGNORECASE
)
_SHORT = {"-sharealike": "-sa", "-noderivatives": "-nd"}
_PHRASES = (
    ("GNU AFFERO GENERAL PUBLIC LICENSE", "agpl-3.0"),
    ("GNU LESSER GENERAL PUBLIC LICENSE Version 2.1", "lgpl-2.1"),
    ("GNU LESSER GENERAL PUBLIC LICENSE", "lgpl-3.0"),
    ("GNU GENERAL PUBLIC LICENSE Version 2", "gpl-2.0"),
    ("GNU GENERAL PUBLIC LICENSE", "gpl-3.0"),
    ("Apache License Version 2.0", "apache-2.0"),
    ("Mozilla Public License Version 2.0", "mpl-2.0"),
    ("CC0 1.0 Universal", "cc0-1.0"),
    ("Open RAIL++-M", "openrail++"),
    ("Open RAIL-M", "creativeml-openrail-m"),
    ("Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    ("Neither the name of", "bsd-3-clause"),
    ("Redistribution and use in source and binary forms", "bsd-2-clause"),
    ("This is free and unencumbered software released into the public domain", "unlicense"),
)
"""What texts of licences hold, the more special ones first; blanks of any length count as one."""


def checked_name(name: object) -> str | None:
    """Return the name of a licence; None for what is none."""
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def licence_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """Return the licence that the metadata of a safetensors file names; None where it names none."""
    return next((name for key in _KEYS if (name := checked_name(metadata.get(key))) is not None), None)


def licence_on_card(card: Path) -> str | None:
    """Return the licence that the front matter of a card names; None where there is none."""
    from ditmoe_cli.files.yaml_text import parse_yaml  # which nothing else of a header takes

    with suppress(OSError, ValueError):
        front = _FRONT.match(read_file(card, _LONGEST).decode())
        document = parse_yaml(front[1]) if front else None
        return checked_name(document.get("license")) if isinstance(document, dict) else None
    return None


def licence_in_text(text: str) -> str:
    """Return the name of a licence by its text, `UNKNOWN` where it is none of those known here."""
    plain = " ".join(text.split())
    named = next((name for phrase, name in _PHRASES if phrase.lower() in plain.lower()), None)
    if named is not None:
        return named
    found = _CREATIVE_COMMONS.search(plain) if "creative commons" in plain.lower() else None
    if found is None:
        return UNKNOWN
    parts = "-nc" if found["nc"] else ""
    return f"cc-by{parts}{_SHORT.get((found['rest'] or '').lower(), '')}-{found['version']}"


def licence_in_folder(folder: Path) -> tuple[str, Path] | None:
    """Return the licence that a folder's card names or a text in it is, and that file; None where neither is there."""
    card = licence_on_card(folder / CARD)
    if card is not None:
        return card, folder / CARD
    for name in _NAMES:
        with suppress(OSError, ValueError):
            return licence_in_text(read_file(folder / name, _LONGEST).decode()), folder / name
    return None
