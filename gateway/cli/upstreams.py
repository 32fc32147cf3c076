"""`crossway upstreams`: what the machine knows of each upstream and its endpoints, and what retries hide.

Strategy: one question to the admin API; with --interval two, and what was counted in between instead of since the start.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from gateway.cli import Subparsers
from gateway.cli.client import Client, Unreachable, add_arguments, complain
from gateway.cli.tables import console_for

Row = dict[str, Any]
FAILURES = ("connect", "reset", "timeout", "status")
STYLES = {"up": "green", "ejected": "red", "unhealthy": "red", "probing": "yellow", "probe due": "yellow"}


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("upstreams", help="show upstreams and endpoints: state, load, failures, retries")
    add_arguments(parser)
    parser.add_argument("name", nargs="*", metavar="UPSTREAM", help="only these; default: all")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: table")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.add_argument(
        "--interval", type=float, default=0, metavar="SECONDS", help="count for so long; default: since the gateway started"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    try:
        client = Client.from_arguments(parsed)
        rows = _ask(client)
        if parsed.interval > 0:
            time.sleep(parsed.interval)
            rows = since(rows, _ask(client))
    except Unreachable as error:
        return complain(error)
    unknown = [name for name in parsed.name if name not in {row["name"] for row in rows}]
    if unknown:
        return complain(Unreachable(f"no upstream is called {', '.join(unknown)}; there are {_names(rows)}"))
    rows = [row for row in rows if not parsed.name or row["name"] in parsed.name]
    if parsed.output == "json":
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)
    return 0


def _names(rows: list[Row]) -> str:
    return ", ".join(str(row["name"]) for row in rows) or "none"


def _ask(client: Client) -> list[Row]:
    status, answer = client.call("GET", "/upstreams")
    if status != 200:
        raise Unreachable(f"{status}: {answer.get('detail', 'refused')}")
    return list(answer["upstreams"])


def since(before: list[Row], after: list[Row]) -> list[Row]:
    """Return the later report with what was counted between the two."""
    known = {row["name"]: row for row in before}
    for row in after:
        old = known.get(row["name"], {})
        started = row["in_flight"] - old.get("in_flight", 0)
        counters = row["counters"] = _less(row["counters"], old.get("counters", {}))
        row["effective"] = _share(counters["successes"], counters["requests"] - started)
        row["actual"] = _share(counters["attempt_successes"], counters["attempts"])
        endpoints = {endpoint["address"]: endpoint for endpoint in old.get("endpoints", [])}
        for endpoint in row["endpoints"]:
            earlier = endpoints.get(endpoint["address"], {})
            endpoint["counters"] = _less(endpoint["counters"], earlier.get("counters", {}))
            for figure in ("attempts", "failures"):
                endpoint[figure] = max(endpoint[figure] - earlier.get(figure, 0), 0)
    return after


def _less(counters: Row, earlier: Row) -> Row:
    return {name: max(value - earlier.get(name, 0), 0) for name, value in counters.items()}


def _share(part: int, whole: int) -> float | None:
    return round(min(part / whole, 1.0), 6) if whole > 0 else None


def _print(rows: list[Row]) -> None:
    tables = [_table(row["endpoints"]) for row in rows]
    console = console_for(*tables)
    for number, (row, table) in enumerate(zip(rows, tables, strict=True)):
        if number:
            console.print()
        console.print(headline(row), highlight=False, soft_wrap=True)
        console.print(table)
    if not rows:
        console.print("no upstreams: no worker has opened one yet")


def headline(row: Row) -> str:
    """An upstream's own figures, in two lines of rich's markup."""
    from rich.markup import escape

    counters = row["counters"]
    limit = f"{row['limit']}" if row["adaptive_limit"] is None else f"{row['adaptive_limit']} (adapted, at most {row['limit']})"
    refused = sum(counters[name] for name in ("pending_full", "queue_timeouts", "no_endpoint"))
    return (
        f"[bold]{escape(row['name'])}[/bold]   in flight {row['in_flight']} of {limit}, queue {row['queued']}, refused {refused}\n"
        f"  success {percent(row['effective'])} effective, {percent(row['actual'])} actual; "
        f"retries {counters['retries']}, denied {counters['budget_empty']}, budget left {row['retry_budget']}"
    )


def percent(share: float | None) -> str:
    """Two decimals, and never 100 % while anything failed."""
    if share is None:
        return "-"
    return f"{min(share * 100, 99.99) if share < 1 else 100:.2f} %"


def _table(endpoints: list[Row]) -> Any:
    from rich.markup import escape  # an IPv6 address looks like markup
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 2))
    titles = ("endpoint", "zone", "weight", "state", "in flight", "ewma", "attempts", "failures", "ejections", "retries")
    for title in titles:
        justify: Any = "left" if title in ("endpoint", "failures", "zone", "state") else "right"
        table.add_column(title, justify=justify, no_wrap=True)
    for endpoint in endpoints:
        counters = endpoint["counters"]
        name = endpoint["address"] if endpoint["target"] in (None, endpoint["address"]) else f"{endpoint['address']} {endpoint['target']}"
        table.add_row(
            escape(name), escape(endpoint["zone"] or "-"), str(endpoint["weight"]), state(endpoint), str(endpoint["in_flight"]),
            "-" if endpoint["ewma_seconds"] is None else f"{endpoint['ewma_seconds'] * 1000:.1f} ms",
            str(endpoint["attempts"]), failures(counters), str(counters["ejections"]), str(counters["retries"]),
        )  # fmt: skip
    return table


def state(endpoint: Row) -> str:
    """The state in a word, with how long an ejection lasts."""
    word = endpoint["state"]
    shown = f"{word} for {endpoint['ejected_for_seconds']:.1f} s" if word == "ejected" else word
    return f"[{STYLES[word]}]{shown}[/{STYLES[word]}]"


def failures(counters: Row) -> str:
    """Failures by kind: `3 timeout, 1 reset`."""
    return ", ".join(f"{counters[kind]} {kind}" for kind in FAILURES if counters[kind]) or "0"
