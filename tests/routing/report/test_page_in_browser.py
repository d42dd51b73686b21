"""The report page in a real browser, where one is installed: it opens without a network, on light and dark screens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from reporting import Planted, by_position, by_step

from ditmoe_cli.routing.report.build import build_report
from ditmoe_cli.routing.report.figures import draw
from ditmoe_cli.routing.report.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")
SCHEMES = {"dark": 0, "light": 1}  # as Blink numbers them
MEASURE = """<script>
const seen = [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
document.body.dataset.measured = JSON.stringify({
  figures: document.querySelectorAll("figure").length,
  drawn: seen.filter(box => box.width > 200 && box.height > 50).length,
  sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  requests: performance.getEntriesByType("resource").length,
  page: getComputedStyle(document.body).backgroundColor,
  text: getComputedStyle(document.body).color,
});</script>"""

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    planted = Planted(by_step(blocks=2) * by_position(fading=True, blocks=2), images=10, fast=False)
    found = build_report(planted.save(folder / "p.safetensors"), 20, 0)
    (folder / "report.html").write_text(page(found, tuple(draw(found))).replace("</body>", MEASURE + "</body>"))
    return folder / "report.html"


def browse(report: Path, scheme: str, *what: str) -> str:
    """Run the browser without a network and return what it prints."""
    words = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *("--proxy-server=127.0.0.1:9", f"--user-data-dir={report.parent / 'user'}"),
        *(f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--window-size=1000,1400", *what),
        report.as_uri(),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_is_drawn_in_either_scheme(report: Path, scheme: str) -> None:
    dom = browse(report, scheme, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found is not None, "the page did not finish"
    measured = json.loads(unescape(found[1]))
    assert measured["drawn"] == measured["figures"] == 16
    assert measured["sideways"] <= 0, "nothing sticks out of the page"
    assert measured["requests"] == 0, "no request for anything else"
    page_colour, text_colour = (sum(map(int, re.findall(r"\d+", measured[name])[:3])) for name in ("page", "text"))
    assert page_colour < 150 < 600 < text_colour if scheme == "dark" else text_colour < 150 < 600 < page_colour


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_screen_shows_text_on_its_background(report: Path, scheme: str, tmp_path: Path) -> None:
    browse(report, scheme, f"--screenshot={tmp_path / 'shot.png'}")
    with Image.open(tmp_path / "shot.png") as shot:
        grey = shot.convert("L")
    tones = grey.histogram()
    background = grey.getpixel((2, 2))
    assert background == max(range(256), key=tones.__getitem__), "most of the screen is background"
    far = [tone for tone in range(256) if abs(tone - background) > 150]
    assert sum(tones[tone] for tone in far) > 2000, "text stands out"
