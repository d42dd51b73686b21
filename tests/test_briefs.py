"""Objects in brief: lines that fit a screen, tables that hold no markup of others."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from compressing import opened, profile_of
from conftest import make_pico

import ditmoe_cli
from ditmoe_cli.briefs import Brief, Fact, heat_map, in_runs_of, span
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts

EVIL = '<script>alert("x")</script>'
SCREEN = 700  # characters


class Told(Brief):
    """Something with given facts."""

    def __init__(self, *facts: Fact) -> None:
        self.facts = facts

    def _brief(self) -> Sequence[Fact]:
        return self.facts


class Tags(HTMLParser):
    """The tags of a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_line_tells_labels_and_values() -> None:
    assert repr(Told(("", "x.pt"), ("blocks", 4))) == "<Told: x.pt, blocks 4>"


def test_a_line_fits_a_screen_whatever_the_values() -> None:
    many = Told(*((f"label {i}", "x" * 1000 + "\n" * 50) for i in range(1000)))
    assert len(repr(many)) <= SCREEN and "\n" not in repr(many)


def test_a_table_escapes_everything() -> None:
    found = Tags(Told((EVIL, EVIL), ("&", "<b>"))._repr_html_())
    assert set(found.tags) == {"table", "caption", "b", "tbody", "tr", "td"} and found.tags.count("b") == 1
    assert EVIL in found.texts and "<b>" in found.texts


def test_a_heat_map_is_white_in_the_middle_and_red_above() -> None:
    picture = heat_map(EVIL, [[0.25, 0.5], [0.0]], "block", "expert", 0.25)
    assert set(Tags(picture).tags) == {"svg", "text", "rect", "title"}
    assert Tags(picture).tags.count("rect") == 3
    assert [f'fill="{colour}"' in picture for colour in ("#ffffff", "#ff0000", "#0000ff")] == [True] * 3
    assert "block 0, expert 1: 0.5" in picture


def test_equal_numbers_make_no_colours() -> None:
    assert heat_map("x", [[0.5, 0.5]], "a", "b", 0.5).count("#ffffff") == 2
    assert Tags(heat_map("x", [], "a", "b", 0.0)).tags[0] == "svg"


def test_runs_are_counted() -> None:
    assert in_runs_of([8, 8, 4]) == "8 x2, 4" and in_runs_of([]) == ""
    assert span([64, 128, 64]) == "64 to 128" and span([64]) == "64" and span([]) == "0"


def test_all_objects_of_the_api_fit_a_screen(tmp_path: Path) -> None:
    checkpoint = opened(make_pico(depth=2), tmp_path)
    profile = profile_of(checkpoint)
    blocks = tuple(BlockPlan(tuple(range(0, 64, 2)), "ghost", widths=tuple(range(32))) for _ in range(40))
    plan = CompressionPlan("prune", "a" * 64, options={"keep": "0.5"}, stages=(Experts(blocks),))
    for each in (checkpoint, checkpoint.config, profile, plan, profile.arrays, profile.arrays["counts"]):
        assert len(repr(each)) <= SCREEN * 2 and "\n" not in repr(each)
        assert Tags(each._repr_html_()).tags[0] == "table"
    assert "svg" in Tags(profile._repr_html_()).tags


def test_a_name_with_markup_is_shown_as_text(tmp_path: Path) -> None:
    path = make_pico().save(tmp_path / "<b>x<b>.safetensors")
    found = Tags(ditmoe_cli.open_checkpoint(path)._repr_html_())
    assert found.tags.count("b") == 1 and "<b>x<b>.safetensors" in found.texts


@pytest.mark.parametrize("depth", [2, 40])
def test_the_line_of_a_checkpoint_does_not_grow_with_it(depth: int, tmp_path: Path) -> None:
    assert len(repr(opened(make_pico(depth=depth), tmp_path))) < 300
