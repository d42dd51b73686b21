"""Captions: they speak of what a figure shows, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from reporting import Planted, even, report_of, unequal

from ditmoe_cli.routing.report import captions
from ditmoe_cli.routing.report.contents import ProfileReport
from ditmoe_cli.routing.report.figures import planned


def captions_of(report: ProfileReport) -> dict[str, str]:
    return {figure.name: figure.caption for figure in planned(report)}


def test_lists_are_prose() -> None:
    assert [captions.listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize("branches", [1, 2])
def test_only_branches_that_ran_are_named(branches: int, tmp_path: Path) -> None:
    report = report_of(tmp_path, Planted(even(blocks=2, branches=branches), images=5, cfg=float(branches)))
    figures = list(planned(report))
    assert any("branch" in figure.title + figure.caption for figure in figures) == (branches > 1)
    maps = [figure.name for figure in figures if figure.name.startswith("map-")]
    assert len(maps) == 3 * branches
    assert ("map-position" in maps) == (branches == 1)


def test_only_what_is_grey_or_cut_is_explained(tmp_path: Path) -> None:
    chances = even(blocks=2)
    plain = captions_of(report_of(tmp_path, Planted(chances, images=40)))
    assert not any("Grey" in text or "dead" in text for text in plain.values())
    chances[1, ..., 2] = 0
    chances[0, :, :, 0, :, 0] = 60
    marked = captions_of(report_of(tmp_path, Planted(chances, images=40)))
    assert "Values beyond its end are cut. Grey: experts never chosen." in marked["map-position-conditional"]
    assert "(crosses: dead)" in marked["load"]
    assert "fewer experts" not in marked["load"]


def test_blocks_of_unequal_size_are_explained(tmp_path: Path) -> None:
    texts = captions_of(unequal(tmp_path))
    assert texts["load"].endswith("Grey: the block has fewer experts.")
    assert texts["saliency"].endswith("Grey: the block has fewer experts.")


def test_one_block_shares_nothing_with_others(tmp_path: Path) -> None:
    texts = captions_of(report_of(tmp_path, Planted(even(blocks=1, branches=1, positions=1), images=5)))
    assert texts["map-step"].count("All variables share one scale.") == 1
    assert "thin lines" not in texts["concentration"]
    assert "map-position" not in texts
    assert "transitions" not in texts
    assert "coactivation" not in texts, "one expert a token has no pairs"


def test_positions_that_fill_no_square_stay_a_table(tmp_path: Path) -> None:
    texts = captions_of(report_of(tmp_path, Planted(even(blocks=2, positions=6), images=5)))
    assert "patch" not in texts["map-position-conditional"]
    square = captions_of(report_of(tmp_path, Planted(even(blocks=2, positions=9), images=5)))
    assert "each of its cells a patch" in square["map-position-conditional"]
