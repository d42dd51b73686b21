"""SHA-256 fingerprints of checkpoints, and digests of files and JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.progress import BYTES, phase

_CHUNK = 2**20  # bytes read at a time


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; for a folder, of the names and digests of its files."""
    if path.is_dir():
        return digest([[file.name, file_digest(file)] for file in sorted(path.iterdir()) if file.is_file()])
    found, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as opened, phase(f"hashing {path.name}", path.stat().st_size, BYTES) as progress:
        while count := opened.readinto(buffer):
            found.update(buffer[:count])
            progress(count)
    return found.hexdigest()


def fingerprint(tensors: Iterable[TensorInfo], hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all tensors' sorted (name, dtype, shape, SHA-256 of the bytes) and the configuration.

    It does not depend on container, sharding or tensor order. `hashes` has a tensor's SHA-256 by its name.
    """
    entries = [
        [info.name, info.dtype, list(info.shape), hashes[info.name]]
        for info in sorted(tensors, key=lambda info: info.name)
    ]
    return digest({"tensors": entries, "config": dict(config)})
