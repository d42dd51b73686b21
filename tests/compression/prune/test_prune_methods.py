"""The table of pruning methods."""

from __future__ import annotations

from ditmoe_cli.compression.methods import DEFAULT_METHODS, SALIENCIES
from ditmoe_cli.routing.profile import empty_tables


def test_the_table_of_methods_says_where_each_comes_from() -> None:
    assert DEFAULT_METHODS["prune"] in SALIENCIES
    assert all(method.summary and method.source for method in SALIENCIES.values())
    for method in SALIENCIES.values():
        if not method.needs_profile:
            assert method.score(empty_tables((3, 2)), 0)
