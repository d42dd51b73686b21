"""The page: there for every shape of profile, equal for equal reports, and needing nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest
from reporting import Planted, even, full_report, report_of

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.report.build import build_report
from ditmoe_cli.routing.report.claims import Claim
from ditmoe_cli.routing.report.contents import ProfileReport
from ditmoe_cli.routing.report.figures import draw
from ditmoe_cli.routing.report.page import page, require_jinja
from ditmoe_cli.routing.report.pictures import Drawing

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "br", "link", "img"}


class Reader(HTMLParser):
    """Follows the tags of a page, which must close in order, and keeps what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.references: list[str] = []
        self.labels: list[str] = []
        self.boxes: list[int] = []
        self.boxed = {"svg": 0, "table": 0}
        self.title = ""

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["title"] and "svg" not in self.open:
            self.title += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]
        if tag in self.boxed:
            assert self.boxes and self.boxes[-1] == len(self.open), f"{tag} outside a box that scrolls"
            self.boxed[tag] += 1
        if tag == "div" and ("class", "scroll") in attrs:
            self.boxes.append(len(self.open) + 1)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if self.boxes and len(self.open) < self.boxes[-1]:
            self.boxes.pop()


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ProfileReport:
    return full_report(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def drawings(full: ProfileReport) -> list[Drawing]:
    return list(draw(full))


@pytest.fixture(scope="module")
def text(full: ProfileReport, drawings: list[Drawing]) -> str:
    return page(full, drawings)


def test_the_page_needs_nothing_else(text: str) -> None:
    reader = read(text)
    assert {"figure", "svg", "table", "style"} <= reader.seen
    assert not {"script", "link", "iframe", "img", "object"} & reader.seen
    assert all(ref.startswith(("#", "data:")) for ref in reader.references)
    assert "http" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    ids = re.findall(r' id="([^"]+)"', text.replace("\n", " "))
    figures = re.findall(r'<figure id="([^"]+)"', text)
    assert len(figures) == len(set(figures)) == 16
    assert set(figures) <= set(ids)


def test_figures_and_tables_scroll_in_their_own_boxes(text: str) -> None:
    reader = read(text)
    assert reader.boxed == {"svg": 16, "table": text.count("<table>")}
    assert not reader.boxes
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", text)
    assert re.search(r"svg \{[^}]*min-width: \d+rem", text)


def test_titles_name_the_profile(full: ProfileReport, text: str) -> None:
    assert read(text).title == "p.safetensors: routing profile"
    assert "<h1>Routing profile p.safetensors</h1>" in text
    assert text.count("<small>p.safetensors</small></h3>") == 16
    assert all(label.endswith(": p.safetensors") for label in read(text).labels)
    named = page(replace(full, source="ckpt.pt"), ())
    assert read(named).title == "p.safetensors: routing profile of ckpt.pt"
    assert f"checkpoint ckpt.pt <code>{full.checkpoint}" in named


def test_names_that_are_no_utf_8_can_be_written(tmp_path: Path) -> None:
    planted = Planted(even(blocks=1, bins=1), images=2).save(tmp_path / "p.safetensors")
    odd = replace(planted, path=tmp_path / "caf\udce9\n.safetensors")
    text = page(build_report(odd, 20, 0), ())
    text.encode("utf-8")
    assert read(text).title.startswith("caf\ufffd\ufffd.safetensors: ")


def test_settings_are_told_in_words(full: ProfileReport) -> None:
    def told(**changes: object) -> str:
        return page(replace(full, calibration={**full.calibration, **changes}), ())

    assert "10 images of 5 classes, 24 steps in 6 bins, guidance 2, solver ddim (DDPM);" in told(solver="ddim")
    assert "solver euler (rectified flow)" in told(solver="euler")
    assert "10 noised images of 5 classes, 24 steps in one bin" in told(source="data", bins=1)
    assert "computed in bf16" in told(dtype="bf16") and "computed in" not in told(dtype="fp32")


def test_a_profile_without_a_tensor_of_today_is_not_called_fast(full: ProfileReport) -> None:
    text = page(replace(full, missing=("output.cka",)), ())
    assert "similarity of outputs. It was made by an earlier version; profile again" in text
    assert "fast profile" not in text


def test_the_page_says_what_was_found(full: ProfileReport, text: str) -> None:
    assert all(claim.sentence in text for claim in full.claims)
    assert "block 1 expert 2" in text
    assert "fast profile" not in text
    estimate = full.blocks[0].information["step"]
    assert f"{100 * estimate.corrected:.2f} [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]" in text


def test_equal_reports_give_equal_bytes(full: ProfileReport, drawings: list[Drawing], text: str) -> None:
    assert page(full, drawings) == text
    assert list(islice(draw(full), 2)) == drawings[:2]


@pytest.mark.slow
def test_all_figures_of_equal_reports_have_equal_bytes(full: ProfileReport, drawings: list[Drawing]) -> None:
    assert list(draw(full)) == drawings


def test_text_is_escaped(full: ProfileReport) -> None:
    claim = Claim("<b>", "<script>", "holds", "a & b")
    hostile = replace(
        full,
        name="\"'</title><i>.safetensors",
        source="<b>&amp;",
        checkpoint="<script>",
        calibration={**full.calibration, "solver": "<i>"},
        claims=(claim,),
    )
    drawing = Drawing("load", "Load", "<i>", "<svg></svg>", b"")
    reader = read(page(hostile, (drawing,)))
    assert not {"script", "i", "b"} & reader.seen
    assert reader.title == "\"'</title><i>.safetensors: routing profile of <b>&amp;"
    assert reader.labels == ["Load: \"'</title><i>.safetensors"]


def test_a_fast_profile_says_what_it_lacks(tmp_path: Path) -> None:
    report = report_of(tmp_path, Planted(even(blocks=1, bins=1, classes=2), images=4))
    drawings = list(draw(report))
    assert not [d for d in drawings if d.name.startswith("similarity")]
    text = page(report, drawings)
    read(text)
    assert "It is a fast profile" in text


@pytest.mark.parametrize(
    "sizes",
    [
        {"blocks": 1, "experts": 1, "positions": 1, "bins": 1, "classes": 1, "branches": 1},
        pytest.param({"blocks": 3, "experts": 24, "positions": 144, "bins": 3, "branches": 1}, marks=pytest.mark.slow),
    ],
    ids=["least", "large"],
)
def test_figures_adapt(sizes: dict[str, int], tmp_path: Path) -> None:
    report = report_of(tmp_path, Planted(even(**sizes), images=3, cfg=1.0))
    text = page(report, draw(report))
    read(text)
    assert not re.search(r"\bbranch|\bconditional|unconditional", re.sub(r"<template.*?</template>", "", text))
    if sizes["blocks"] == 1:
        assert set(re.findall(r'<figure id="([^"]+)"', text)) == {"load", "agreement", "saliency"}
        assert "choices have nothing to depend on" in text
        assert "All blocks" not in text


def test_a_missing_jinja_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_jinja()
    monkeypatch.setattr("ditmoe_cli.routing.report.page.find_spec", lambda _: None)
    with pytest.raises(BadInputError, match=r"jinja2.*pip install 'ditmoe\[report\]'"):
        require_jinja()
