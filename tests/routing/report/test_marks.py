"""What a report says of its own making: found in its own files, and in no other's."""

from __future__ import annotations

from pathlib import Path

import pytest
from reporting import Planted, even, report_of

from ditmoe_cli.routing.report.figures import draw
from ditmoe_cli.routing.report.marks import holds_figures, numbers_of
from ditmoe_cli.routing.report.page import page
from ditmoe_cli.routing.report.pictures import write_figures

pytest.importorskip("matplotlib")

REQUEST, OTHER = "a" * 64, "b" * 64


def test_a_page_keeps_its_numbers(tmp_path: Path) -> None:
    report = report_of(tmp_path, Planted(even(blocks=1, bins=1), images=2))
    file = tmp_path / "r.html"
    whole = page(report, (), REQUEST)
    file.write_text(whole, encoding="utf-8")
    assert numbers_of(file, REQUEST) == report.to_json()
    assert numbers_of(file, OTHER) is None
    for other in (whole[:-20], page(report, ()), whole.replace("{&quot;", "{{", 1), ""):
        file.write_text(other, encoding="utf-8")
        assert numbers_of(file, REQUEST) is None
    file.write_bytes(b"\xff")
    assert numbers_of(file, REQUEST) is None
    assert numbers_of(tmp_path, REQUEST) is None
    assert numbers_of(tmp_path / "absent.html", REQUEST) is None


def test_a_folder_of_figures_is_known_while_it_is_whole(tmp_path: Path) -> None:
    report = report_of(tmp_path, Planted(even(blocks=1, bins=1, positions=1, classes=1, branches=1), images=2))
    folder = tmp_path / "figures"
    write_figures(tuple(draw(report, svg=False, png=True, request=REQUEST)), folder, False)
    assert holds_figures(folder, REQUEST)
    assert not holds_figures(folder, OTHER)
    cut = (folder / "load.png").read_bytes()
    (folder / "load.png").write_bytes(cut[: len(cut) // 2])
    assert not holds_figures(folder, REQUEST)
    (folder / "load.png").unlink()
    assert not holds_figures(folder, REQUEST)
    (folder / "load.png").write_bytes(cut)
    assert holds_figures(folder, REQUEST)
    (folder / "mine.txt").write_text("")
    assert not holds_figures(folder, REQUEST)
    assert not holds_figures(tmp_path / "absent", REQUEST)
