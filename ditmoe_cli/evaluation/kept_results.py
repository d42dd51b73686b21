"""Results that are kept in the cache, so that the same command need not measure again. Neither torch nor numpy.

A result is a JSON document under the digest of everything that it depends on: this package's version, the contents of
all inputs, and every setting. A cache that cannot be written costs a note, one that cannot be read costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ditmoe_cli.files.cache import cache_folder
from ditmoe_cli.files.fingerprint import canonical_json, digest
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.workfolder import work_key

KEPT_SCHEMA = "ditmoe.kept/1"


def result_key(command: str, conditions: Mapping[str, Any]) -> str:
    """Return the key of a command's result under conditions, given as JSON."""
    return work_key({"command": command, "conditions": dict(conditions)})


def read_kept(key: str) -> dict[str, Any] | None:
    """Return the document that is kept under a key; None where there is none, or a damaged one."""
    with suppress(OSError, ValueError, RuntimeError):
        document = read_json(_path(key), names=True)
        if isinstance(document, dict) and document.get("schema") == KEPT_SCHEMA and document.get("key") == key:
            kept = document.get("kept")
            return kept if isinstance(kept, dict) and document.get("digest") == digest(kept) else None
    return None


def keep(key: str, document: Mapping[str, Any], notify: Callable[[str], None]) -> None:
    """Keep a document under a key; notify instead of raising where that fails."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path, force=True) as staging:
            signed = {"schema": KEPT_SCHEMA, "key": key, "digest": digest(dict(document)), "kept": dict(document)}
            staging.write_text(canonical_json(signed))
    except Exception as error:  # whatever is wrong with a cache, the result is there
        notify(f"the result is not kept for another run: {getattr(error, 'strerror', None) or error}")


def _path(key: str) -> Path:
    return cache_folder("results") / f"{key[:40]}.json"
