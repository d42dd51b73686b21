"""Objects in brief: a line that fits a screen, and a table for notebooks in which every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

Fact = tuple[str, object]
_LONGEST = 120  # characters of one value
_LINE = 600  # characters of a line


class Brief:
    """What is shown by its facts, labels and values, in place of its fields."""

    def _brief(self) -> Sequence[Fact]:
        """Return what is to be shown, the most telling first."""
        raise NotImplementedError

    def __repr__(self) -> str:
        told = ", ".join(f"{label} {in_a_line(value)}".strip() for label, value in self._brief())
        line = f"<{type(self).__name__}: {told}>"
        return line if len(line) <= _LINE else f"{line[: _LINE - 2]}…>"

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self._brief())


def in_a_line(value: object) -> str:
    """Return a value in one line of at most 120 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def html_table(title: str, facts: Iterable[Fact]) -> str:
    """Return labels and values as a table of HTML with a title."""
    cell = '<td style="text-align:left">'
    rows = "".join(
        f"<tr>{cell}{escape(label)}</td>{cell}{escape(in_a_line(value))}</td></tr>" for label, value in facts
    )
    return f'<table><caption style="text-align:left"><b>{escape(title)}</b></caption><tbody>{rows}</tbody></table>'


def in_runs_of(values: Iterable[object]) -> str:
    """Return values with equal neighbours counted: ``8 x27, 4``."""
    runs = [(value, len(list(same))) for value, same in groupby(values)]
    return ", ".join(f"{value} x{count}" if count > 1 else f"{value}" for value, count in runs)


def shortened(number: float | None) -> str:
    """Return a number in four digits, n/a for none."""
    return "n/a" if number is None else f"{number:.4g}"


def span(numbers: Sequence[float]) -> str:
    """Return numbers by their range: ``64 to 128``, one number where all are equal."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def heat_map(title: str, rows: Sequence[Sequence[float]], row: str, column: str, middle: float) -> str:
    """Return rows of numbers as a picture in SVG: white where they are `middle`, red above and blue below.

    Each field tells its number, named by what its `row` and `column` count, when it is pointed at.
    """
    side, left, top = 18, 92, 44
    widest = max((len(values) for values in rows), default=0)
    reach = max((abs(value - middle) for values in rows for value in values), default=0.0) or 1.0
    fields = "".join(
        f'<rect x="{left + side * j}" y="{top + side * i}" width="{side}" height="{side}" stroke="#ccc" '
        f'fill="{_colour((value - middle) / reach)}">'
        f"<title>{escape(f'{row} {i}, {column} {j}: {value:.4g}')}</title></rect>"
        for i, values in enumerate(rows)
        for j, value in enumerate(values)
    )
    text = 'font-family="sans-serif" font-size="11" fill="#333"'
    numbers = "".join(
        f'<text x="{left - 6}" y="{top + side * i + 13}" text-anchor="end" {text}>{i}</text>' for i in range(len(rows))
    ) + "".join(
        f'<text x="{left + side * j + side // 2}" y="{top - 4}" text-anchor="middle" {text}>{j}</text>'
        for j in range(widest)
    )
    names = (
        f'<text x="2" y="{top - 4}" {text}>{escape(row)} \\ {escape(column)}</text>'
        f'<text x="2" y="14" font-weight="bold" {text}>{escape(title)}</text>'
    )
    width, height = max(left + side * widest + 4, 360), top + side * len(rows) + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" style="background:#fff">'
        f"{names}{numbers}{fields}</svg>"
    )


def _colour(share: float) -> str:
    """Return a colour between blue at -1, white at 0 and red at 1."""
    other = round(255 * (1 - min(abs(share), 1.0)))
    return f"#ff{other:02x}{other:02x}" if share >= 0 else f"#{other:02x}{other:02x}ff"
