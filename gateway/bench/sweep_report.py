"""A sweep's document as a table and as a page with two plots.

Strategy: rate against the judged percentile shows where each count bends upwards; rate against the number of workers, beside
the line of perfect scaling, shows what another worker brings.
"""

from __future__ import annotations

from html import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

from gateway.bench.chart import decades, linear, page, svg, table
from gateway.bench.percentiles import duration
from gateway.bench.runner import Document

HEAD = ("workers", "rate at SLO", "p50", "p99", "p99.9", "gateway CPU us/request", "efficiency", "imbalance", "saturation", "")


def rows(document: Document) -> list[tuple[str, ...]]:
    """The table's cells, a row a count."""
    found: list[tuple[str, ...]] = []
    for count in document["counts"]:
        best, note = count["best"], "" if count["trusted"] else "shares cores with the generator"
        saturation = f"{count['saturation_rate']:,.0f}/s"
        if best is None:
            why = count["points"][-1]["why"] if count["points"] else "not measured"
            found.append((str(count["workers"]), "none", "-", "-", "-", "-", "-", "-", saturation, why))
            continue
        found.append(
            (
                str(count["workers"]),
                f"{best['rate']:,.0f}/s",
                duration(best["p50"]),
                duration(best["p99"]),
                duration(best["p999"]),
                f"{best['gateway_us']:.1f}",
                "-" if count["efficiency"] is None else f"{count['efficiency']:.0%}",
                "-" if best["imbalance"] is None else f"{best['imbalance']:.2f}",
                saturation,
                note,
            )
        )
    return found


def surroundings(document: Document) -> str:
    """The processors in a sentence."""
    machine, pinned = document["machine"], document["pinned"]
    quota = "no cgroup quota" if machine["cpu_quota"] is None else f"a cgroup quota of {machine['cpu_quota']:g} CPUs"
    where = (
        "gateway and generator share all cores"
        if pinned is None
        else f"gateway on CPUs {pinned['gateway']}, generator on {pinned['generator']}"
    )
    return f"{machine['cpu']}: {machine['cores_allowed']} of {machine['cores']} cores allowed, {quota}; {where}."


def show(document: Document, console: Console) -> None:
    """Print a sweep for a person."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEAD:
        shown.add_column(name, justify="left" if name == "" else "right")
    for row in rows(document):
        shown.add_row(*(plain(cell) for cell in row))
    console.print(shown)
    console.print(plain(surroundings(document)), soft_wrap=True)
    style = "bold green" if document["conclusive"] else "bold yellow"
    console.print(f"[{style}]{plain(document['recommendation'])}[/]", soft_wrap=True)


def html(document: Document) -> str:
    """The whole page."""
    objective = document["objective"]
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    for count in document["counts"]:
        points = sorted((point["achieved"], point["judged"] / 1e3) for point in count["points"] if point["judged"] is not None)
        lines.append((f"{count['workers']} workers", points))
    parts = [f"<p><b>{escape(document['recommendation'])}</b></p>", f"<p>{escape(surroundings(document))}</p>", table(HEAD, rows(document))]
    values = [point for _, line in lines for point in line]
    if values:
        limit = objective["us"] / 1e3
        x = linear("requests a second", max(point[0] for point in values))
        y = decades("milliseconds", min(limit, *(point[1] for point in values)), max(limit, *(point[1] for point in values)))
        parts.append(svg(f"{objective['percentile']} by rate", x, y, lines, ("SLO", limit)))
    parts += _scaling(document["counts"])
    points_rows = [
        (str(count["workers"]), f"{point['rate']:,.0f}/s", f"{point['achieved']:,.0f}/s", duration(point["p50"]), duration(point["p99"]),
         duration(point["p999"]), f"{point['gateway_us']:.1f}", f"{point['generator_share']:.0%}", point["why"] or "holds")
        for count in document["counts"]
        for point in count["points"]
    ]  # fmt: skip
    parts.append(table(("workers", "rate", "achieved", "p50", "p99", "p99.9", "gateway us", "generator core", ""), points_rows))
    return page(f"Workers for {document['config']['url']}, {document['date']}", *parts)


def _scaling(counts: list[dict[str, Any]]) -> list[str]:
    carrying = sorted((float(count["workers"]), count["best"]["rate"]) for count in counts if count["best"])
    if len(carrying) < 2:
        return []
    first, last = carrying[0], carrying[-1]
    ideal = [first, (last[0], first[1] * last[0] / first[0])]
    x, y = linear("workers", last[0]), linear("requests a second", max(ideal[1][1], max(rate for _, rate in carrying)))
    return [svg("Rate at the objective by workers", x, y, [("measured", carrying), ("perfect", ideal)])]
