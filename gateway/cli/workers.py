"""`crossway workers`: one line a worker: pid, requests per second, connections, CPU, configuration, uptime."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from gateway.cli import Subparsers
from gateway.cli.client import Client, Unreachable, add_arguments, complain
from gateway.cli.tables import console_for

Row = dict[str, Any]


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("workers", help="show the workers: pid, rps, connections, CPU, configuration")
    add_arguments(parser)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: table")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between the two samples; default: 1"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    try:
        client = Client.from_arguments(parsed)
        before = _sample(client)
        time.sleep(parsed.interval)
        after = _sample(client)
    except Unreachable as error:
        return complain(error)
    rows = compare(before, after)
    if parsed.output == "json":
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return 0


def _sample(client: Client) -> Row:
    status, answer = client.call("GET", "/workers")
    if status != 200:
        raise Unreachable(f"{status}: {answer.get('detail', 'refused')}")
    return dict(answer)


def compare(before: Row, after: Row) -> list[Row]:
    """Return a row a worker with the rates between two samples; None where a worker is new or gone."""
    seconds = max(after["monotonic"] - before["monotonic"], 1e-9)
    earlier = {row["pid"]: row for row in before["workers"] if row["pid"] is not None}
    rows = []
    for row in after["workers"]:
        old = earlier.get(row["pid"])
        rows.append(
            {
                "slot": row["slot"],
                "pid": row["pid"],
                "state": row["state"],
                "rps": _rate(old, row, "requests", seconds),
                "connections": row["connections"],
                "cpu_percent": _rate(old, row, "cpu_seconds", seconds / 100),
                "config_version": row["version"],
                "uptime": None if row["started"] is None else round(after["time"] - row["started"], 1),
            }
        )
    return rows


def _rate(old: Row | None, new: Row, key: str, seconds: float) -> float | None:
    if old is None or old[key] is None or new[key] is None:
        return None
    return round(float(new[key] - old[key]) / seconds, 1)


def _print_table(rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("slot", "pid", "state", "rps", "connections", "cpu %", "config", "uptime"):
        table.add_column(title, justify="left" if title == "state" else "right")
    for row in rows:
        cells = [
            row["slot"],
            row["pid"],
            row["state"],
            row["rps"],
            row["connections"],
            row["cpu_percent"],
            row["config_version"],
        ]
        table.add_row(*("-" if cell is None else str(cell) for cell in cells), _duration(row["uptime"]))
    console_for(table).print(table)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    words = [f"{value}{unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")) if value]
    return " ".join(words[:2]) or "0s"
