"""What distilling an XL and a G is foretold to take, by updates of low rank and in several processes."""

from __future__ import annotations

import pytest
from real_sizes import of_g, of_xl, trained

from ditmoe_cli.compression.distill.distilling_memory import distilling_bytes

HALF = {"XL": of_xl(2304), "G": of_g(2816)}


# docs/distill.md shows these
@pytest.mark.parametrize(
    ("name", "rank", "millions", "alone", "of_eight"),
    [
        ("XL", None, 2384, 68.0, 26.3),
        ("XL", 32, 99, 13.2, 11.5),
        ("XL", 8, 26, 11.4, 11.0),
        ("G", None, 8891, 251.2, 95.6),
        ("G", 32, 302, 45.0, 39.7),
        ("G", 8, 78, 39.7, 38.3),
    ],
)
def test_memory_falls_with_the_rank_and_with_processes(
    name: str, rank: int | None, millions: int, alone: float, of_eight: float
) -> None:
    size = trained(HALF[name], rank)
    assert round(size.values / 1e6) == millions
    found = [distilling_bytes(HALF[name], size, 1, processes) / 1e9 for processes in (1, 8)]
    assert found == pytest.approx([alone, of_eight], abs=0.05)
