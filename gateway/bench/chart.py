"""Line charts as inline SVG, and pages around them that need nothing else.

Strategy: a chart is a list of named point lists with a scale for each axis; ticks are the decades of a logarithmic axis or
round steps of a linear one. Pages carry no script and fetch nothing, so they open from a mail or a CI artefact, and each
chart has a table with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 860, 380
LEFT, RIGHT, TOP, BOTTOM = 76, 150, 34, 52
COLOURS = ("#0b63c5", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 2")  # lines are told apart without colour, too

STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #8884}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto;background:#fff}
.invalid{border:3px solid #b91c1c;padding:.5rem 1rem;font-weight:bold}pre{overflow:auto}
"""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its title, its ends, whether it is logarithmic, and the texts at its ticks."""

    title: str
    low: float
    high: float
    logarithmic: bool = False
    ticks: Sequence[tuple[float, str]] = field(default_factory=tuple)

    def at(self, value: float) -> float:
        """Where a value lies, 0..1."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(max(value, self.low)), math.log10(low), math.log10(high)
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def linear(title: str, high: float, unit: str = "") -> Axis:
    """An axis from 0 to a round number at or above `high`."""
    high = high if high > 0 else 1.0
    step = 10 ** math.floor(math.log10(high))
    step = next(part for part in (step / 5, step / 2, step, step * 2) if high / part <= 8)
    count = math.ceil(high / step - 1e-9)
    return Axis(title, 0.0, count * step, False, [(i * step, f"{i * step:,.6g}{unit}") for i in range(count + 1)])


def decades(title: str, low: float, high: float, text: dict[int, str] | None = None) -> Axis:
    """A logarithmic axis over whole powers of ten; `text` replaces the number of an exponent."""
    first = math.floor(math.log10(max(low, 1e-9)))
    last = max(first + 1, math.ceil(math.log10(max(high, 1e-9)) - 1e-9))
    ticks = [(10.0**e, (text or {}).get(e, f"{10.0**e:,.6g}")) for e in range(first, last + 1)]
    return Axis(title, 10.0**first, 10.0**last, True, ticks)


def svg(title: str, x: Axis, y: Axis, lines: Sequence[tuple[str, Sequence[Point]]], level: tuple[str, float] | None = None) -> str:
    """A chart; `level` is a named horizontal line, such as an SLO."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(point: Point) -> str:
        return f"{LEFT + x.at(point[0]) * wide:.1f},{TOP + (1 - y.at(point[1])) * high:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for value, text in x.ticks:
        at = LEFT + x.at(value) * wide
        parts.append(f'<path d="M{at:.1f} {TOP}V{TOP + high}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{TOP + high + 18}" text-anchor="middle">{escape(text)}</text>')
    for value, text in y.ticks:
        at = TOP + (1 - y.at(value)) * high
        parts.append(f'<path d="M{LEFT} {at:.1f}H{LEFT + wide}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(f'<text transform="translate(16 {TOP + high / 2}) rotate(-90)" text-anchor="middle">{escape(y.title)}</text>')
    if level is not None:
        at = TOP + (1 - y.at(level[1])) * high
        parts.append(f'<path d="M{LEFT} {at:.1f}H{LEFT + wide}" stroke="#555" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{LEFT + wide + 6}" y="{at + 4:.1f}">{escape(level[0])}</text>')
    for number, (name, points) in enumerate(lines):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        at = TOP + 14 + 20 * number
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" '
            f'points="{" ".join(place(point) for point in points)}"/>'
        )
        if len(points) <= 40:
            for point in points:
                cx, _, cy = place(point).partition(",")
                parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>')
        right = LEFT + wide
        parts.append(f'<path d="M{right + 8} {at}h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{right + 40}" y="{at + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th scope=col>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, *parts: str) -> str:
    """A whole document; the parts are HTML already."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )
