"""`crossway status`: what runs, since when, where it listens, and how the last reload ended."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

from gateway.cli import Subparsers
from gateway.cli.client import Client, Unreachable, add_arguments, complain


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("status", help="show what the running gateway runs")
    add_arguments(parser)
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    try:
        code, answer = Client.from_arguments(parsed).call("GET", "/status")
    except Unreachable as error:
        return complain(error)
    if code != 200:
        return complain(Unreachable(f"{code}: {answer.get('detail', 'refused')}"))
    print(json.dumps(answer, indent=2) if parsed.output == "json" else describe(answer))
    return 0


def describe(answer: dict[str, Any]) -> str:
    """Return the text for a person."""
    config, reload = answer["config"], answer["reload"]
    lines = [
        f"crossway   {answer['crossway']}, {answer['phase']}: {answer['detail']}",
        f"config     {config['file']}, version {config['version']}, hash {config['hash'][:12]}",
    ]
    lines += [f"listener   {listener['name']} on {listener['address']}{' (raw TCP)' if listener.get('tcp') else ''}" for listener in answer["listeners"]]
    stale = [str(row["slot"]) for row in answer["workers"] if row["version"] != config["version"]]
    lines.append(f"workers    {len(answer['workers'])}, {answer['restarts']} restarted")
    if stale:
        lines.append(f"           not on this configuration: slot {', '.join(stale)}")
    when = datetime.fromtimestamp(reload["time"]).isoformat(sep=" ", timespec="seconds")
    if config["version"] > 1 or not reload["ok"]:
        lines.append(f"reload     {'done' if reload['ok'] else 'REFUSED'} at {when}")
    if not reload["ok"]:
        lines += [f"           {line}" for line in reload["text"].splitlines()]
    return "\n".join(lines)
