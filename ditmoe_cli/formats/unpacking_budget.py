"""The bytes in which models of this process keep unpacked weights, where none are given; without torch and numpy."""

from __future__ import annotations

_budget: int | None = None


def default_budget() -> int | None:
    """Return the bytes that a model may keep; None for a share of the memory that is free."""
    return _budget


def set_default_budget(budget: int | None) -> None:
    """Have models that are loaded from now on keep at most `budget` bytes; None for a share of what is free."""
    global _budget
    _budget = budget
