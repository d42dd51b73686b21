"""Patch maps: laid out to fit, every patch where it is in the image."""

from __future__ import annotations

import numpy as np
import pytest

from ditmoe_cli.routing.report.painters import WIDTH, Tiling, mosaic, patch_grid


@pytest.mark.parametrize("side", [1, 2, 4, 7, 16, 32])
def test_patches_lie_where_they_are_in_the_image(side: int) -> None:
    generator = np.random.default_rng(0)
    maps = [generator.normal(size=(3, side * side)), generator.normal(size=(2, side * side))]
    tiling = Tiling.of(side * side)
    picture = mosaic(maps, 3, 2)
    assert picture.shape == (2 * tiling.pitch - tiling.gap, 3 * tiling.pitch - tiling.gap)
    shown = np.zeros_like(picture, dtype=bool)
    for block, table in enumerate(maps):
        for expert, values in enumerate(table):
            y, x = block * tiling.pitch, expert * tiling.pitch
            width = side * tiling.zoom
            tile = picture[y : y + width, x : x + width]
            shown[y : y + width, x : x + width] = True
            assert np.array_equal(tile[:: tiling.zoom, :: tiling.zoom], values.reshape(side, side))
            assert np.array_equal(tile[tiling.zoom - 1 :: tiling.zoom, tiling.zoom - 1 :: tiling.zoom].ravel(), values)
            assert tiling.middle(expert) == pytest.approx(x + (width - 1) / 2)
    assert not picture[~shown].any(), "nothing between maps, nor where a block has fewer experts"


@pytest.mark.parametrize(("blocks", "experts"), [(1, 1), (4, 8), (6, 64), (12, 8), (28, 8), (28, 16), (40, 16)])
def test_maps_fit_a_screen(blocks: int, experts: int) -> None:
    columns, inches = patch_grid(blocks, experts)
    assert columns * experts * inches < WIDTH
    assert -(-blocks // columns) * inches <= 7.0 + 1e-9
    assert inches >= (0.12 if experts > 16 else 0.24)
