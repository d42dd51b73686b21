"""How programs spell the arrays of feature statistics in their files. Neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ditmoe_cli.errors import BadInputError

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "mu": ("mu", "mean"),
    "sigma": ("sigma", "cov", "covariance"),
    "mu_s": ("mu_s",),
    "sigma_s": ("sigma_s",),
    "n": ("n",),
}
_PREFIXES = ("", "ref_", "reference_")


def are_statistics(names: Iterable[str]) -> bool:
    """Return whether a file with arrays of these names holds a mean and a covariance."""
    held = set(names)
    return all(held & set(_candidates(name)) for name in ("mu", "sigma"))


def spelled(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return which of a file's arrays are `mu`, `sigma`, `mu_s`, `sigma_s` and `n`, those that it has.

    Raises `BadInputError` where a file lacks the plain name and holds two other spellings of it.
    """
    held, found = set(names), {}
    for name in _SPELLINGS:
        candidates = [name] if name in held else [other for other in _candidates(name) if other in held]
        if len(candidates) > 1:
            raise BadInputError(f"{path}: holds {' and '.join(candidates)}; store the one to compare with as {name}")
        if candidates:
            found[name] = candidates[0]
    return found


def _candidates(name: str) -> list[str]:
    return [prefix + spelling for prefix in _PREFIXES for spelling in _SPELLINGS[name]]
