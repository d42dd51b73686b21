"""The file with the weights of FID's Inception: where it is, and its download. Neither torch nor numpy."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.cache import cached_file
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.staging import staged
from ditmoe_cli.progress import BYTES, phase

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_DIGEST = "6726825d"  # how the SHA-256 of the file begins
WEIGHTS_VARIABLE = "DITMOE_INCEPTION"
_TIMEOUT_SECONDS = 20.0
_CHUNK = 1 << 20


def cached_weights() -> Path:
    """Return the path of the downloaded weights in the cache."""
    return cached_file(WEIGHTS_NAME)


def will_fetch(weights: Path | None = None) -> bool:
    """Return whether `find_weights` would download."""
    return weights is None and not os.environ.get(WEIGHTS_VARIABLE) and not cached_weights().is_file()


def checked_weights(weights: Path | None = None) -> tuple[Path, str]:
    """Return the file of `find_weights` and its SHA-256. Raises `BadInputError` where the cached one is damaged."""
    path = find_weights(weights)
    digest = file_digest(path)
    if path == cached_weights() and not digest.startswith(WEIGHTS_DIGEST):
        raise BadInputError(f"{path}: SHA-256 is {digest[:8]}…, not {WEIGHTS_DIGEST}…; delete the file and run again")
    return path, digest


def find_weights(weights: Path | None = None) -> Path:
    """Return the file of weights, downloaded if necessary. Raises `BadInputError` where there is none."""
    if weights is not None:
        return _existing(weights, "⟨weights⟩")
    named = os.environ.get(WEIGHTS_VARIABLE)
    if named:
        return _existing(Path(named).expanduser(), WEIGHTS_VARIABLE)
    cached = cached_weights()
    if not cached.is_file():
        _download(cached)
    return cached


def _existing(path: Path, source: str) -> Path:
    if not path.is_file():
        raise BadInputError(f"{path}: no such file, named by {source}; it should be {WEIGHTS_NAME}")
    return path


def _download(target: Path) -> None:
    """Download the weights to `target`, whole and with the right digest or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            staged(target, force=True) as staging,
            urllib.request.urlopen(WEIGHTS_URL, timeout=_TIMEOUT_SECONDS) as response,
            staging.open("wb") as file,
        ):
            hasher = hashlib.sha256()
            with phase(f"fetching {target.name}", int(response.headers.get("Content-Length") or 0), BYTES) as progress:
                while chunk := response.read(_CHUNK):
                    hasher.update(chunk)
                    file.write(chunk)
                    progress(len(chunk))
            if not hasher.hexdigest().startswith(WEIGHTS_DIGEST):
                raise OSError(f"what arrived has SHA-256 {hasher.hexdigest()[:8]}…")
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadInputError(
            f"{WEIGHTS_NAME}: not at {target}, and fetching {WEIGHTS_URL} failed ({reason}); "
            f"fetch it elsewhere and give ⟨weights⟩ PATH, or set {WEIGHTS_VARIABLE}; ⟨extractor⟩ pixels needs none"
        ) from None
