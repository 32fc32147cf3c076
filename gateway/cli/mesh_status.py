"""`crossway mesh status`: every proxy, the version it has applied and since when, and below them what somebody should look at.

Strategy: the table is for the eye, a line an instance; reasons are sentences and stand below it, whole.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, with_store
from gateway.cli.tables import console_for

if TYPE_CHECKING:
    from rich.table import Table

    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.store import Store

RECENT = 3600.0  # seconds that who is gone is shown
STYLES = {"healthy": "green", "silent": "yellow", "unreachable": "red", "unhealthy": "red", "draining": "yellow", "gone": "dim"}


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "status", help="show the proxies: state, certificate, version applied, refusals",
        epilog="exit status: 0, or 1 with --check when something is to be looked at, or no control plane is there",
    )  # fmt: skip
    parser.add_argument("service", nargs="*", metavar="SERVICE", help="only these; default: all")
    add_file(parser)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: table")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.add_argument("--all", action="store_true", help="also who is gone for longer than an hour")
    parser.add_argument("--check", action="store_true", help="exit 1 unless all is well")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    async def work(mesh: MeshFile, store: Store) -> int:
        from gateway.mesh.report import report

        unknown = [name for name in parsed.service if name not in mesh.services]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not in {parsed.config}, which has {', '.join(mesh.services)}")
        said = await report(store, mesh)
        if parsed.service:
            said["instances"] = [row for row in said["instances"] if row["service"] in parsed.service]
            said["services"] = parsed.service
        if parsed.output == "json":
            print(json.dumps(said, indent=2))
        else:
            show(said, parsed.all)
        return 0 if not parsed.check or well(said) else 1

    return with_store(parsed, work)


def well(said: dict[str, Any]) -> bool:
    """Whether a control plane is there and nothing is to be looked at."""
    return any(row["alive"] for row in said["control_planes"]) and not any(row["problems"] for row in said["instances"])


def show(said: dict[str, Any], every: bool) -> None:
    from rich.markup import escape

    from gateway.mesh.clock import span

    now, rows = said["time"], said["instances"]
    shown = [row for row in rows if every or row["state"] != "gone" or now - row["since"] < RECENT]
    table = table_of(shown, now)
    console = console_for(table)
    alive = [f"{row['id']} (up {span(now - row['started'])})" for row in said["control_planes"] if row["alive"]]
    console.print(f"[bold]{escape(said['trust_domain'])}[/bold]   policy {said['policy']}, default {said['default']}", highlight=False)
    console.print(f"control planes   {escape(', '.join(alive)) or '[red]none is running[/red]'}", highlight=False, soft_wrap=True)
    if (document := said["document"]) is not None:
        when = f"{_ago(document['applied'], now)} by {document['by']}"
        console.print(f"document         {document['version']}, applied {escape(when)}", highlight=False, soft_wrap=True)
    counts = {state: len([row for row in rows if row["state"] == state]) for state in STYLES}
    told = ", ".join(f"[{STYLES[state]}]{count} {state}[/]" for state, count in counts.items() if count)
    if rows:
        console.print(f"instances        {told}", highlight=False)
    if empty := [name for name in said["services"] if not any(row["service"] == name and row["state"] != "gone" for row in rows)]:
        console.print(f"no instance of   {', '.join(empty)}", highlight=False, soft_wrap=True)
    if shown:
        console.print()
        console.print(table)
    elif not rows:
        console.print("\nno instance has joined yet: `crossway mesh token SERVICE` makes a token for one")
    if hidden := len(rows) - len(shown):
        console.print(f"\n{hidden} more gone for longer than {span(RECENT)}: --all shows them", highlight=False)
    if any(row["problems"] for row in rows):
        console.print("\n[bold red]to be looked at[/bold red]")
        for row in rows:
            for problem in row["problems"]:
                console.print(f"  {escape(row['service'])}  {escape(row['instance'])}  {escape(problem)}", highlight=False, soft_wrap=True)
    for number, row in enumerate(said["revoked"]):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["made"]))
        begin = "" if number else "\n"
        console.print(f"{begin}revoked    {row['kind']} {row['value']} at {when}{escape(': ' + row['reason']) if row['reason'] else ''}", highlight=False, soft_wrap=True)


def table_of(rows: list[dict[str, Any]], now: float) -> Table:
    """One line an instance. A version that is not the newest that was sent, and a certificate that is late, are marked."""
    from rich.markup import escape
    from rich.table import Table

    labels = any(_labels(row) for row in rows)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("service", "instance", "state", "inbound", "zone", *(["labels"] if labels else []), "certificate", "version", "applied"):
        table.add_column(title, justify="right" if title == "version" else "left", no_wrap=True)
    for row in rows:
        state = f"{row['state']}, {_ago(row['since'], now)}" if row["state"] == "gone" else row["state"]
        behind = row["state"] != "gone" and (row["refused"] or row["seconds_waiting"] is not None)
        late = any("certificate" in problem for problem in row["problems"])
        table.add_row(
            row["service"], escape(row["instance"]), f"[{STYLES[row['state']]}]{state}[/]", escape(row["inbound"] or "-"), escape(row["zone"] or "-"),
            *([escape(_labels(row) or "-")] if labels else []), _marked(_left(row["not_after"], now), bool(late)),
            _marked(str(row["applied"] or "-"), bool(behind)), _ago(row["applied_at"], now),
        )  # fmt: skip
    return table


def _labels(row: dict[str, Any]) -> str:
    """Labels that a person gave."""
    return ", ".join(f"{name}={value}" for name, value in row["labels"].items() if name != "app-port")


def _marked(text: str, bad: bool) -> str:
    return f"[red]{text}[/red]" if bad else text


def _left(until: int | None, now: float) -> str:
    from gateway.mesh.clock import span

    if until is None:
        return "-"
    return f"{span(until - now)} left" if until > now else "expired"


def _ago(when: float | None, now: float) -> str:
    from gateway.mesh.clock import span

    return "-" if when is None else f"{span(now - when)} ago"
