"""Checks of single arguments, and of those that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ditmoe_cli.errors import UsageError

T = TypeVar("T")


def refuse_idle(group: Any, why: str, *names: str) -> None:
    """Raise `UsageError` for the first of the named options of a group that is given though it has no effect.

    `why` goes on after "has no effect", as "without ``⟨neurons⟩``". An option at its default counts as not given.
    """
    given = next((f for f in fields(group) if f.name in names and getattr(group, f.name) != f.default), None)
    if given is not None:
        raise UsageError(f"⟨{'no_' if given.default is True else ''}{given.name}⟩ has no effect {why}")


def seed_of_64_bits(value: int) -> int:
    """Return a seed. Raises `ValueError` where it takes more than 64 bits, as other programs' seeds do not."""
    if not -(2**63) <= value < 2**64:
        raise ValueError("must fit 64 bits")
    return value


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return whole numbers that are separated by commas. Raises `ValueError`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise ValueError("give whole numbers separated by commas, as a recipe has them")
    return tuple(map(int, parts))


def tuple_of(values: Iterable[T] | None) -> tuple[T, ...] | None:
    """Return values as a tuple; None for none."""
    return None if values is None else tuple(values)


def at_least(least: int) -> Callable[[int], int]:
    """Return a callback that refuses numbers below `least`."""

    def checked(value: int) -> int:
        if value < least:
            raise ValueError(f"must be at least {least}")
        return value

    return checked


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a callback that refuses words that are none of the choices."""

    def checked(value: str) -> str:
        if value not in choices:
            raise ValueError(f"choose {' or '.join(choices) if len(choices) == 2 else ', '.join(choices)}")
        return value

    return _completing(checked, choices)


def known(*names: str) -> Callable[[str], str]:
    """Return a callback that refuses names that are none of those known, of which there are many."""

    def checked(value: str) -> str:
        if value not in names:
            raise ValueError(f"unknown; choose {', '.join(names)}")
        return value

    return _completing(checked, names)


def _completing(check: Callable[[str], str], choices: tuple[str, ...]) -> Callable[[str], str]:
    """Return a check with the words that it lets pass, which shells complete."""
    check.choices = choices  # type: ignore[attr-defined]
    return check


def ending(*endings: str) -> Callable[[str | Path], Path]:
    """Return a callback that refuses paths with other endings."""

    def checked(path: str | Path) -> Path:
        path = Path(path)
        if path.suffix not in endings:
            raise ValueError(f"give a name that ends in {' or '.join(endings)}")
        return path

    return checked
