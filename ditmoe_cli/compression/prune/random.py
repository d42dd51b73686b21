"""A random choice of experts: the baseline that every criterion has to beat."""

from __future__ import annotations

import random

from ditmoe_cli.routing.profile import RoutingTables


def scores(tables: RoutingTables, seed: int) -> list[list[float]]:
    """Return independent uniform scores per block and expert, the same for the same seed."""
    generator = random.Random(seed)
    return [[generator.random() for _ in range(n)] for n in tables.experts]
