"""`crossway reload`: the running gateway reads its file again; exit 0 only if every worker changed."""

from __future__ import annotations

import argparse
import sys

from gateway.cli import Subparsers
from gateway.cli.client import Client, Unreachable, add_arguments, complain
from gateway.errors import Problem

PATIENCE = 190.0  # seconds; a reload of very many routes


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("reload", help="make the running gateway read its configuration again")
    add_arguments(parser)
    parser.add_argument("--expect", metavar="HASH", help="only if this is the hash of the running configuration")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    headers = {"If-Match": f'"{parsed.expect}"'} if parsed.expect else {}
    try:
        status, answer = Client.from_arguments(parsed, PATIENCE).call("POST", "/reload", headers)
    except Unreachable as error:
        return complain(error)
    if status == 200 and answer.get("ok"):
        print(f"configuration {answer['version']} ({answer['hash'][:12]}) is active in all workers")
        return 0
    problems = [Problem(**problem) for problem in answer.get("problems", [])]
    text = "\n\n".join(problem.render() for problem in problems) or answer.get("text") or answer.get("detail", "")
    print(text, file=sys.stderr)
    print("\ncrossway: not reloaded; the gateway keeps the configuration it has", file=sys.stderr)
    return 1
