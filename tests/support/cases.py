"""Cases of which a few are tested each time, and all others with what is slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def with_slow(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Parameters, one for each case, of several values where it is a tuple; behind the first `quick` ones are slow."""
    return [case if i < quick else _slow(case) for i, case in enumerate(cases)]


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters, one for each case, of several values where it is a tuple; all that are not `quick` are slow."""
    quick, cases = list(quick), list(cases)
    assert all(case in cases for case in quick), f"no such case among {cases}"
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
