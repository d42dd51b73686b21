"""Cases of which the first are tested each time, and all others with what is slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def with_slow(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Parameters, one for each case, of several values where it is a tuple; behind the first `quick` ones are slow."""
    slow = pytest.mark.slow
    return [
        case if i < quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
        for i, case in enumerate(cases)
    ]
