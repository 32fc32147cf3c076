"""`crossway mesh status`: every proxy, the version it has applied, since when, and why it refused one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, with_store

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.store import Store

PIPE_COLUMNS = 200
STYLES = {"healthy": "green", "unhealthy": "red", "draining": "yellow", "gone": "dim"}


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "status", help="show the proxies: state, certificate, version applied, refusals",
        epilog="exit status: 0, or 1 with --check when a proxy has refused or not answered what it was sent, or no control plane is there",
    )  # fmt: skip
    parser.add_argument("service", nargs="*", metavar="SERVICE", help="only these; default: all")
    add_file(parser)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: table")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.add_argument("--check", action="store_true", help="exit 1 unless all is well")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    async def work(mesh: MeshFile, store: Store) -> int:
        from gateway.mesh.report import report

        unknown = [name for name in parsed.service if name not in mesh.services]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not in {parsed.config}, which has {', '.join(mesh.services)}")
        said = await report(store, mesh)
        said["instances"] = [row for row in said["instances"] if not parsed.service or row["service"] in parsed.service]
        if parsed.output == "json":
            print(json.dumps(said, indent=2))
        else:
            show(said)
        return 0 if not parsed.check or well(said) else 1

    return with_store(parsed, work)


def well(said: dict[str, Any]) -> bool:
    """Whether a control plane is there and every proxy that is there has what it was sent."""
    here = [row for row in said["instances"] if row["state"] != "gone"]
    return any(row["alive"] for row in said["control_planes"]) and not any(row["refused"] or row["seconds_waiting"] for row in here)


def show(said: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS)
    alive = [row["id"] for row in said["control_planes"] if row["alive"]]
    console.print(
        f"[bold]{escape(said['trust_domain'])}[/bold]   policy {said['policy']}, default {said['default']}; "
        f"control planes: {escape(', '.join(alive)) or '[red]none is running[/red]'}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 2))
    for title in ("service", "instance", "state", "inbound", "zone", "certificate", "version", "applied", "remark"):
        table.add_column(title, justify="right" if title == "version" else "left", no_wrap=title not in ("instance", "remark"), overflow="fold")
    for row in said["instances"]:
        table.add_row(
            row["service"], escape(row["instance"]), f"[{STYLES[row['state']]}]{row['state']}[/]", escape(row["inbound"] or "-"), escape(row["zone"] or "-"),
            _left(row["not_after"], said["time"]), str(row["applied"] or "-"), _since(row["applied_at"], said["time"]), escape(remark(row)),
        )  # fmt: skip
    console.print(table)
    if not said["instances"]:
        console.print("no instance has joined yet: `crossway mesh token SERVICE` makes a token for one")
    for row in said["revoked"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["made"]))
        console.print(f"revoked    {row['kind']} {row['value']} at {when}{escape(': ' + row['reason']) if row['reason'] else ''}", highlight=False)


def remark(row: dict[str, Any]) -> str:
    """What somebody should know of a proxy."""
    if row["refused"]:
        return f"REFUSED {row['refused']}: {row['reason']}"
    if row["seconds_waiting"] is not None:
        return f"sent {row['sent']} {row['seconds_waiting']:.1f} s ago, no answer yet"
    return ""


def _left(until: int | None, now: float) -> str:
    if until is None:
        return "-"
    return f"{span(until - now)} left" if until > now else "expired"


def _since(when: float | None, now: float) -> str:
    return "-" if when is None else f"{span(now - when)} ago"


def span(seconds: float) -> str:
    """A length of time in one or two units: 3 s, 12 min, 5 h 10 min, 3 d."""
    seconds = max(0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d"
