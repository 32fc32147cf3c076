"""A run as a page with a plot, and as a PNG.

Strategy: latency over the percentile, the percentile drawn by the number of nines, so that the tail has as much room as the
middle. The curve ends where fewer than ten samples remain. The PNG is drawn by matplotlib, which is an extra.
"""

from __future__ import annotations

import json
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from gateway.bench.chart import Point, decades, page, svg, table
from gateway.bench.formats import facts, label
from gateway.bench.percentiles import BEYOND, PERCENTILES, duration, spectrum
from gateway.bench.runner import Document
from gateway.bench.settings import UsageError

NINES = {0: "0%", 1: "90%", 2: "99%", 3: "99.9%", 4: "99.99%", 5: "99.999%", 6: "99.9999%"}


def curves(document: Document) -> list[tuple[str, list[Point]]]:
    """(name, [(1/(1-share), milliseconds)]) of latency and, in an open loop, service time."""
    wanted = [("service time", "service")]
    if document["loop"] == "open":
        wanted.insert(0, ("latency", "latency"))
    found = []
    for name, key in wanted:
        measured = document[key]
        total, points = measured["count"], []
        for us, _, seen in spectrum(measured):
            if total - seen >= BEYOND:
                points.append((total / (total - seen), us / 1e3))
        found.append((name, _thinned(points)))
    return found


def _thinned(points: list[Point]) -> list[Point]:
    """At most one point for each half percent of the horizontal axis' length."""
    kept: list[Point] = []
    for point in points:
        if not kept or point[0] >= kept[-1][0] * 1.02 or point is points[-1]:
            kept.append(point)
    return kept


def html(document: Document) -> str:
    """The whole page."""
    lines = curves(document)
    points = [point for _, line in lines for point in line]
    parts = []
    if not document["valid"]:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in document["reasons"])
        parts.append(f'<div class="invalid">INVALID RUN: do not use these figures<ul>{reasons}</ul></div>')
    parts += [f"<p>Note: {escape(warning)}</p>" for warning in document["warnings"]]
    parts.append(table(("", ""), facts(document)))
    if points:
        x = decades("percentile", 1, max(point[0] for point in points), NINES)
        y = decades("milliseconds", min(point[1] for point in points), max(point[1] for point in points))
        parts.append(svg(f"Latency by percentile ({label(document)})", x, y, lines))
    rows = []
    for name in PERCENTILES:
        outer, inner = document["latency"]["percentiles"][name], document["service"]["percentiles"][name]
        shown = duration(outer["us"]) if outer["us"] is not None else f"needs {outer['samples_needed']:,} samples"
        rows.append((name, shown, duration(inner["us"]), f"{outer['samples_beyond']:,}"))
    rows.append(("max", duration(document["latency"]["max"]), duration(document["service"]["max"]), "0"))
    parts.append(table(("percentile", "latency", "service time", "samples beyond"), rows))
    parts.append(table(("machine", ""), [(name, str(value)) for name, value in document["machine"].items()]))
    slim = {**document, **{key: {k: v for k, v in document[key].items() if k != "bins"} for key in ("latency", "service")}}
    parts.append(f"<details><summary>JSON</summary><pre>{escape(json.dumps(slim, indent=1))}</pre></details>")
    return page(f"{document['config']['method']} {document['config']['url']}, {document['date']}", *parts)


def write_png(document: Document, path: Path) -> None:
    """Draw the plot. Raises UsageError without matplotlib."""
    plot = import_pyplot()
    figure, axes = plot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, points in curves(document):
        axes.plot([x for x, _ in points], [y for _, y in points], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = {10.0**e: text for e, text in NINES.items() if 10.0**e <= max(10.0, axes.get_xlim()[1])}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("percentile")
    axes.set_ylabel("milliseconds")
    axes.set_title(("" if document["valid"] else "INVALID RUN: ") + label(document))
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)
    plot.close(figure)


def import_pyplot() -> Any:
    """matplotlib's pyplot, without a display. Raises UsageError when it is not installed."""
    try:
        matplotlib = import_module("matplotlib")
    except ImportError:
        raise UsageError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    return import_module("matplotlib.pyplot")
