"""How the demo looks: the picture of the layout, the table of requests, the way of a payment, findings, verdicts.

Strategy: functions from what was found to what rich prints, for any width from 80 columns; colours say nothing that a sign or a word does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gateway.demo.chapters import Finding
from gateway.demo.journey import MEMBER, Journey
from gateway.demo.story import Outcome

WIDE = 110  # columns from which on nothing is shortened
ROOMY = 96  # columns from which on a finding's title has room for itself
PICTURE = """\
                  [control plane] ┄┄ certificates, rules and endpoints
                                   for the edge and every ◈

 client ──▶ [edge] ══╦══▶ ◈ [payments] ◈ ══╦══▶ ◈ [ledger-1]
                   ╚══▶ ◈ [accounts] ◈ ══╩══▶ ◈ [ledger-2]

 ◈ a sidecar    ══ mutual TLS, both ends have proved who they are"""
PARTS = ("control plane", "edge", "payments", "accounts", "ledger-1", "ledger-2")


def picture(ready: Collection[str]) -> RenderableType:
    """The layout; parts that are not ready are dim."""
    text = Text(no_wrap=True)
    rest = PICTURE
    for part in ("control plane", "edge", "payments", "ledger-1", "accounts", "ledger-2"):
        before, _, rest = rest.partition(f"[{part}]")
        text.append(before).append(part, "bold green" if part in ready else "dim")
    text.append(rest)
    missing = [part for part in PARTS if part not in ready]
    state = Text(f" starting: {', '.join(missing)}", "yellow") if missing else Text(" everything is up", "green")
    return Panel(Group(text, Text(), state), title="Crossway: a small bank, from its edge to its ledger", width=76)


def heading(number: int, text: str) -> RenderableType:
    return Group(Text(), Rule(f"[bold]{number}  {text}[/]", align="left"))


def requests(outcomes: Sequence[Outcome], width: int) -> RenderableType:
    """The requests to the edge, and what became of each."""
    table = _table()
    table.add_column("", no_wrap=True)
    table.add_column("request", no_wrap=True)
    if width >= WIDE:
        table.add_column("sent", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("what came back", ratio=1)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("saw", justify="right", no_wrap=True)
    for outcome in outcomes:
        mark, colour = ("[green]✓[/]", "green" if outcome.status.startswith("2") else "yellow")
        if not outcome.good:
            mark, colour = "[red]✗[/]", "red"
        reason = escape(outcome.reason)
        if outcome.problem:
            reason = f"[red]{escape(outcome.problem)}[/] {reason}"
        sent = [outcome.sent] if width >= WIDE else []
        table.add_row(
            mark, outcome.title, *sent, f"[{colour}]{outcome.status}[/]", reason, f"{outcome.seconds * 1000:.1f}", str(outcome.reached or "-")
        )
    right = sum(outcome.good for outcome in outcomes)
    middle = statistics.median(outcome.seconds for outcome in outcomes) * 1000
    style = "green" if right == len(outcomes) else "red"
    note = Text("saw: requests that the services behind the edge have logged meanwhile", "dim")
    return Group(table, note, Text(f"{right} of {len(outcomes)} requests did what they should, median {middle:.1f} ms as the client sees it", style))


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")


def journey(found: Journey, width: int) -> RenderableType:
    """The way of a payment, as a tree with a bar for each hop's time."""
    if found.problem:
        return Text(f"✗ {found.problem}", "red")
    table = _table()
    for title in ("where", "the other side", "status"):
        table.add_column(title, no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    bars = max(8, min(40, width - (96 if width >= WIDE else 72)))
    table.add_column("", no_wrap=True)
    longest = max(span.milliseconds for span in found.spans)
    for span in found.spans:
        place = f"{' ' * (span.depth - 1)}└ {span.place}" if span.depth else span.place
        knew = span.knew if width >= WIDE else span.knew.replace(MEMBER, "…/")
        style = "cyan" if "'s sidecar" in span.place or not span.depth else "green"
        bar = Text("█" * max(1, round(bars * span.milliseconds / longest)), style)
        table.add_row(place, escape(knew), span.status, f"{span.milliseconds:.1f}", bar)
    said = f"payment {found.payment}: {found.seconds * 1000:.1f} ms; trace {found.trace}"
    notes = "Recorded by each: the edge's audit record, the sidecars' metrics, the services' own logs; one trace id in all."
    short = "" if width >= WIDE else f" …/ is {MEMBER}"
    return Group(table, Text(f"✓ {said}", "green"), Text(notes + short, "dim"))


def finding(found: Finding, width: int) -> RenderableType:
    """One finding: its sign, what it is, and what was seen."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=1)
    grid.add_column(width=33 if width >= ROOMY else 25)
    grid.add_column(ratio=1)
    mark = Text("✗", "red") if found.problem else Text("✓", "green")
    seen = Text()
    if found.problem:
        seen.append(found.problem, "red").append(" " if found.evidence else "")
    seen.append(found.evidence)
    grid.add_row(mark, Text(found.title, "bold"), seen)
    return grid


def verdict(right: int, total: int, seconds: float) -> RenderableType:
    """The last word."""
    style = "green" if right == total else "red"
    return Panel(f"[bold {style}]{right} of {total} steps did what they should[/], in {seconds:.0f} s", border_style=style, expand=False)
