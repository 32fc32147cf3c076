"""Two pictures of a result as SVG: what a request costs, and how long it takes at a fixed rate.

Strategy: small multiples, one panel a scenario, each with its own scale and one line for each program, labelled with the
figure, so that a picture never says more than the table. Plain SVG with its own background: it needs nothing to be shown.
"""

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LINE, COLUMNS = 920, 19, 2
NAME, FIGURE = 90, 66  # room for a program's name, and for its figure
OURS, THEIRS, FLOOR = "#0b63c5", "#9aa4b2", "#d5dae1"
MARKS = (("p50_us", "#0b63c5", "p50"), ("p99_us", "#c2410c", "p99"), ("p999_us", "#7e22ce", "p99.9"))


def text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    """Return one SVG text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def colour(program: str) -> str:
    """Return a program's colour."""
    return OURS if program == "crossway" else FLOOR if program == "passthrough" else THEIRS


def number(value: float) -> str:
    """Return three digits at least, no more than are meant."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def page(title: str, panels: Sequence[tuple[int, Sequence[str]]]) -> str:
    """Return a document of panels, each (height, parts drawn from its own origin), in two columns."""
    rows = [panels[at : at + COLUMNS] for at in range(0, len(panels), COLUMNS)]
    parts, top = [text(16, 26, title, extra=' font-size="15" font-weight="bold"')], 40
    for row in rows:
        for column, (_, drawn) in enumerate(row):
            left = 16 + column * (WIDTH // COLUMNS)
            parts += [f'<g transform="translate({left} {top})">', *drawn, "</g>"]
        top += max(height for height, _ in row)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" font-family="sans-serif" '
        f'font-size="12" fill="#1f2937"><title>{escape(title)}</title><rect width="{WIDTH}" height="{top}" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def cost_panel(scenario: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return one scenario's bars: CPU microseconds per request, the range over the rounds as a thin line."""
    cells = {name: cell for name, cell in scenario["cells"].items() if "median_us" in cell}
    room = WIDTH / COLUMNS - 32 - NAME - FIGURE
    most = max(cell["max_us"] for cell in cells.values())
    parts = [text(0, 14, scenario["title"], extra=' font-weight="bold"')]
    for line, (name, cell) in enumerate(cells.items()):
        y = 24 + line * LINE
        long, low, high = (cell[key] / most * room for key in ("median_us", "min_us", "max_us"))
        parts.append(text(NAME - 6, y + 12, name, "end"))
        parts.append(f'<rect x="{NAME}" y="{y + 2}" width="{long:.1f}" height="13" fill="{colour(name)}"/>')
        parts.append(f'<path d="M{NAME + low:.1f} {y + 8.5}H{NAME + high:.1f}" stroke="#1f2937"/>')
        parts.append(text(NAME + high + 6, y + 12, number(cell["median_us"])))
    return 24 + len(cells) * LINE + 18, parts


def latency_panel(scenario: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return one scenario's percentiles at the fixed rate on a logarithmic axis of whole decades."""
    fixed = {name: cell["fixed"] for name, cell in scenario["cells"].items() if cell.get("fixed", {}).get("p50_us")}
    values = [one[key] for one in fixed.values() for key, _, _ in MARKS if one[key]]
    first, last = int(log10(max(min(values), 1.0))), int(log10(max(values))) + 1
    room = WIDTH / COLUMNS - 48 - NAME
    bottom = 24 + len(fixed) * LINE
    parts = [text(0, 14, f"{scenario['title']}, {scenario['rate']:,} a second", extra=' font-weight="bold"')]
    for decade in range(first, last + 1):
        x = NAME + (decade - first) / (last - first) * room
        parts.append(f'<path d="M{x:.1f} 22V{bottom}" stroke="#e5e7eb"/>')
        words = f"{10**decade:,} us" if decade < 3 else f"{10 ** (decade - 3):,} ms"
        parts.append(text(x, bottom + 14, words, "middle", ' fill="#6b7280"'))
    for line, (name, one) in enumerate(fixed.items()):
        y = 24 + line * LINE + 8
        parts.append(text(NAME - 6, y + 4, name, "end"))
        for key, fill, _ in MARKS:
            if one[key]:
                x = NAME + (log10(max(one[key], 1.0)) - first) / (last - first) * room
                parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{fill}"/>')
    return bottom + 30, parts


def cost_plot(result: Mapping[str, Any]) -> str:
    """Return the picture of CPU time per request; empty when nothing was measured."""
    measured = [one for one in result["scenarios"].values() if any("median_us" in cell for cell in one["cells"].values())]
    title = "CPU microseconds per request of the whole process tree (less is better)"
    return page(title, [cost_panel(one) for one in measured]) if measured else ""


def latency_plot(result: Mapping[str, Any]) -> str:
    """Return the picture of latency at the fixed rates; empty when none was measured."""
    measured = [
        one for one in result["scenarios"].values() if any(c.get("fixed", {}).get("p50_us") for c in one["cells"].values())
    ]
    if not measured:
        return ""
    legend = [
        part
        for at, (_, fill, words) in enumerate(MARKS)
        for part in (f'<circle cx="{at * 70 + 6}" cy="8" r="4" fill="{fill}"/>', text(at * 70 + 14, 12, words))
    ]
    title = "Latency at one fixed rate, from the intended time of sending (less is better)"
    return page(title, [(24, legend), (24, []), *(latency_panel(one) for one in measured)])
