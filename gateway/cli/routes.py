"""`crossway routes`: list every route with what it matches, the policies it runs and where it goes.

Strategy: what is printed comes from the loaded configuration, so defaults and normalised paths are shown as the engine
sees them; a person gets a table, a program gets JSON with the same facts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gateway.cli.mesh_ways import cell_lines, divided, notes, share_texts
from gateway.cli.tables import console_for
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.config.conditions import ValueMatch, When
    from gateway.config.schema import Route

OK, NOT_LOADED = 0, 2
PROTOCOLS = {"http1": "HTTP/1.1", "http2": "HTTP/2", "grpc": "gRPC"}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "routes",
        help="list the routes of a configuration",
        description=__doc__.partition("\n")[0] if __doc__ else None,
    )
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="the configuration file")
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="how to print them (default: text)"
    )
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the routes; 0, or 2 when the configuration cannot be loaded."""
    from gateway.config import load  # the schema takes a moment to import: not for `crossway --help`

    try:
        config = load(args.config)
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        return NOT_LOADED
    facts = [describe(config, route) for route in config.routes]
    raw = raw_tcp(config)
    if args.output == "json":
        print(json.dumps([*facts, *raw], indent=2))
        return OK
    if facts or not raw:
        _print_table(facts)
    if facts and raw:
        print()
    if raw:
        _print_raw(raw)
    if not_known := notes(fact["mesh"] for fact in facts):
        print("\n" + "\n".join(not_known))
    return OK


def raw_tcp(config: Config) -> list[dict[str, Any]]:
    """Return where the listeners with `tcp` pass bytes: one fact for each server name, and one for all others."""
    found = []
    for name, listener in config.listeners.items():
        if (tcp := listener.tcp) is None:
            continue
        ways = [*tcp.sni.items(), *([(None, default)] if (default := tcp.upstream or tcp.default) is not None else [])]
        seen = "ended here" if listener.tls is not None else "passed on" if tcp.sni else "not looked at"
        found += [
            {"listener": name, "server_name": pattern, "tls": seen, "upstream": upstream, "connections": tcp.connections}
            for pattern, upstream in ways
        ]
    return found


def _print_raw(raw: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("RAW TCP", "SERVER NAME", "TLS", "CONNECTIONS", "UPSTREAM"):
        table.add_column(heading, overflow="fold")
    for each in raw:
        cells = (each["listener"], each["server_name"] or "any", each["tls"], f"at most {each['connections']}", each["upstream"])
        table.add_row(*(Text(cell) for cell in cells))
    console_for(table, fold=True).print(table)


def describe(config: Config, route: Route) -> dict[str, Any]:
    """Return what there is to say about a route, for JSON."""
    match = route.match
    return {
        "name": route.name,
        "hosts": list(match.host),
        "path": match.path,
        "prefix": match.prefix,
        "grpc": None if match.grpc is None else {"service": match.grpc.service, "method": match.grpc.method},
        "methods": list(match.methods or ()),
        "headers": {name: condition_text(each) for name, each in match.headers.items()},
        "query": {name: condition_text(each) for name, each in match.query.items()},
        "policies": [label for label, _ in policies_of(config, route)],
        "upstream": route.upstream,
        "split": [{"upstream": split.upstream, "weight": split.weight} for split in route.split or ()],
        "sticky": route.sticky,
        "canary": [{"when": conditions_of(canary.when), "upstream": canary.upstream} for canary in route.canary],
        "mirror": None if route.mirror is None else {"upstream": route.mirror.upstream, "percent": route.mirror.percent},
        "websocket": None if route.websocket is None else {"idle": route.websocket.idle, "tunnels": route.websocket.tunnels},
        "mesh": divided(config, route.upstreams),
        "protocols": {name: config.upstreams[name].protocol for name in route.upstreams},
        "listeners": list(route.listeners or config.http_listeners),
    }


def conditions_of(when: When) -> list[str]:
    """Return the conditions of a canary, each in a few words."""
    found = [f"header {name} {condition_text(each)}" for name, each in when.headers.items()]
    return found + [f"cookie {name} {condition_text(each)}" for name, each in when.cookies.items()]


def _upstream_cell(fact: Mapping[str, Any]) -> str:
    lines = share_texts(fact["split"]) if fact["split"] else [fact["upstream"]]
    spoken = {each for each in fact["protocols"].values() if each != "http1"}
    if spoken:
        lines[-1] += f" ({' and '.join(sorted(PROTOCOLS[each] for each in spoken))})"
    if fact["sticky"]:
        lines[-1] += f" (sticky by {fact['sticky']})"
    lines += [f"{each['upstream']} if {' and '.join(each['when'])}" for each in fact["canary"]]
    lines += cell_lines(fact["mesh"])
    if fact["mirror"] is not None:
        lines.append(f"{fact['mirror']['upstream']} gets copies, {fact['mirror']['percent']:g}%")
    if fact["websocket"] is not None:
        lines.append(f"WebSockets, at most {fact['websocket']['tunnels']}")
    return "\n".join(lines)


def policies_of(config: Config, route: Route) -> list[tuple[str, str]]:
    """Return (label, kind) of each policy of a route in file order; an inline one is labelled by its kind."""
    found = []
    for each in route.policies:
        if each.use is not None:
            found.append((each.use, config.policies[each.use].kind))
        elif each.inline is not None:
            found.append((each.inline.kind, each.inline.kind))
    return found


def condition_text(wanted: ValueMatch) -> str:
    """Return a condition as a person reads it behind the name of a header or query parameter."""
    if "value" in wanted._outside or "prefix" in wanted._outside:
        return "= (from outside the file)"
    if wanted.value is not None:
        return f"= {wanted.value}"
    if wanted.prefix is not None:
        return f"= {wanted.prefix}..."
    return "present" if wanted.present else "absent"


def _print_table(facts: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("ROUTE", "HOST", "PATH", "METHODS", "CONDITIONS", "POLICIES", "UPSTREAM"):
        table.add_column(heading, overflow="fold")
    for each in facts:
        conditions = [f"{name} {text}" for name, text in each["headers"].items()]
        conditions += [f"?{name} {text}" for name, text in each["query"].items()]
        cells = (
            each["name"],
            "\n".join(each["hosts"]),
            each["path"] if each["path"] is not None else below(each["prefix"]),
            ", ".join(each["methods"]) or "any",
            "\n".join(conditions) or "-",
            ", ".join(each["policies"]) or "-",
            _upstream_cell(each),
        )
        # Text: what stands in a configuration is never read as markup.
        table.add_row(*(Text(cell) for cell in cells))
    console_for(table, fold=True).print(table)


def below(prefix: str) -> str:
    """Return a prefix as a table shows it."""
    return f"{prefix.rstrip('/')}/... (prefix)"
