"""The bytes of a figure: SVG for a page, PNG for a file. Equal figures give equal bytes."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.files.staging import staged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#7f7f7e"  # of text and lines; a page replaces it by its own colour
PIXELS_PER_INCH = 150
DESCRIPTION = "Description"  # the field of a PNG for what it shows


@dataclass(frozen=True)
class Drawing:
    """One figure: its file name without suffix, title, caption, and picture as SVG and PNG."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def svg_of(figure: Figure) -> str:
    """Return a figure as an SVG element for use inside HTML: no prologue, no metadata, no reference to anywhere.

    Coordinates are rounded to a hundredth of a point. Fonts are left to the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace("font-family: 'DejaVu Sans'; ", "")
    text = re.sub(r'<g id="[a-zA-Z0-9.]+_\d+">', "<g>", text)
    text = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", text)
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: _rounded(found[0]), text)
    text = re.sub(r"base64,\s*([^\"]+)", lambda found: "base64," + _with_palette(found[1]), text)
    return re.sub(r"\n\s*", "\n", text)


def _rounded(attribute: str) -> str:
    """Return an attribute of coordinates on one line, each rounded to two decimals."""
    short = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", attribute)
    return re.sub(r"\s*\n", " ", short).replace(' "', '"')


def _with_palette(encoded: str) -> str:
    """Return a PNG in base64 with the same pixels, one byte each, where it has no more than 256 colours."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))
    colours, indices = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    buffer = io.BytesIO()
    if len(colours) <= 256:
        picture = Image.fromarray(indices.reshape(pixels.shape[:2]).astype(np.uint8), "P")
        picture.putpalette(colours.tobytes(), "RGBA")
    else:
        picture = Image.fromarray(pixels)
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def png_of(figure: Figure, about: str = "") -> bytes:
    """Return a figure as PNG with a transparent background, and the text `about` where PNG keeps its description."""
    buffer = io.BytesIO()
    metadata = {"Software": None, **({DESCRIPTION: about} if about else {})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # letters that no font here has
        figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


def write_figures(drawings: Sequence[Drawing], folder: Path, replace: bool) -> None:
    """Write PNG files into a new `folder`, or `replace` all figures of an old one.

    A new folder appears whole or not at all. In an old one each file is replaced whole, and stale figures are deleted.
    """
    if not replace:
        with staged(folder) as staging:
            staging.mkdir()
            for drawing in drawings:
                (staging / f"{drawing.name}.png").write_bytes(drawing.png)
        return
    names = {f"{drawing.name}.png" for drawing in drawings}
    for drawing in drawings:
        with staged(folder / f"{drawing.name}.png", force=True) as staging:
            staging.write_bytes(drawing.png)
    for stale in sorted(file for file in folder.iterdir() if file.name not in names):
        stale.unlink()
