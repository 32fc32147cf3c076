"""`crossway health`: exit 0 when the gateway is ready for traffic, 1 when it is not; for health checks of containers."""

from __future__ import annotations

import argparse

from gateway.cli import Subparsers
from gateway.cli.client import Client, Unreachable, add_arguments, complain


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("health", help="exit 0 when the gateway is ready, 1 when it is not")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    try:
        status, answer = Client.from_arguments(parsed).call("GET", "/readyz")
    except Unreachable as error:
        return complain(error)
    print(f"{answer.get('status', 'refused')}: {answer.get('detail', '')}")
    return 0 if status == 200 else 1
