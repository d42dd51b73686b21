"""Figures: transparent, equal for equal reports, on one scale."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from reporting import full_report

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.report.contents import ProfileReport
from ditmoe_cli.routing.report.figures import draw, require_matplotlib, shared_limit
from ditmoe_cli.routing.report.painters import LARGEST_DEVIATION, SMALLEST_DEVIATION

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ProfileReport:
    return full_report(tmp_path_factory.mktemp("full"))


def test_pngs_are_transparent_pictures(full: ProfileReport) -> None:
    first, again = (list(islice(draw(full, svg=False, png=True), 2)) for _ in range(2))
    assert first == again
    for drawing in first:
        assert not drawing.svg
        with Image.open(BytesIO(drawing.png)) as image:
            assert image.mode == "RGBA"
            assert image.getchannel("A").getpixel((0, 0)) == 0
            assert image.width == 9.6 * 150


def test_one_scale_is_shared_and_kept_within_bounds(full: ProfileReport) -> None:
    assert shared_limit(full) == LARGEST_DEVIATION
    flat = np.ones((2, 4, 4))
    block = replace(full.blocks[0], maps=dict.fromkeys(("position", "step", "class"), flat))
    assert shared_limit(replace(full, blocks=(block,))) == SMALLEST_DEVIATION


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib()
    monkeypatch.setattr("ditmoe_cli.routing.report.figures.find_spec", lambda _: None)
    with pytest.raises(BadInputError, match=r"pip install 'ditmoe\[report\]'"):
        require_matplotlib()
