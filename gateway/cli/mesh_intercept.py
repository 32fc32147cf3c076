"""`crossway mesh intercept up|down`: an app's connections go through its sidecar without the app knowing.

Strategy: the rules are made in gateway.mesh.intercept; `--print` shows them instead of applying them.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys

from gateway.cli import Subparsers


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("intercept", help="redirect an app's connections to its sidecar (nftables)")
    actions = parser.add_subparsers(metavar="up|down", required=True)
    up = actions.add_parser("up", help="put the rules of a service in place")
    down = actions.add_parser("down", help="take the rules of a service away")
    for each in (up, down):
        each.add_argument("--service", required=True, metavar="NAME", help="whose rules: a table of its own")
        each.add_argument("--print", action="store_true", dest="show", help="show the rules for nft, and change nothing")
    up.add_argument("--app-uid", required=True, metavar="USER", help="the user that the app runs as: its connections are redirected")
    up.add_argument("--sidecar-uid", required=True, metavar="USER", help="the user that the sidecar runs as: its connections never are")
    up.add_argument("--outbound-port", required=True, type=_port, metavar="PORT", help="of the sidecar, started with --intercept")
    up.add_argument("--inbound-port", type=_port, metavar="PORT", help="of the sidecar: what comes for --app-port goes there")
    up.add_argument("--app-port", type=_port, metavar="PORT", help="of the app")
    up.add_argument("--exclude-port", action="append", default=[], type=_port, metavar="PORT", help="left alone, such as a database's; may be repeated")
    up.add_argument("--exclude", action="append", default=[], type=_network, metavar="NETWORK", help="left alone; may be repeated")
    up.set_defaults(run=run_up)
    down.set_defaults(run=run_down)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a network such as 10.0.0.0/8") from None


def run_up(parsed: argparse.Namespace) -> int:
    from gateway.mesh.intercept import InterceptError, Interception, rules, user_id

    try:
        script = rules(
            Interception(
                parsed.service, user_id(parsed.app_uid), user_id(parsed.sidecar_uid), parsed.outbound_port, parsed.inbound_port,
                parsed.app_port, tuple(parsed.exclude_port), tuple(parsed.exclude),
            )
        )  # fmt: skip
    except InterceptError as error:
        print(f"crossway: {error}", file=sys.stderr)
        return 2
    return _apply(script, parsed.show)


def run_down(parsed: argparse.Namespace) -> int:
    from gateway.mesh.intercept import InterceptError, removal

    try:
        script = removal(parsed.service)
    except InterceptError as error:
        print(f"crossway: {error}", file=sys.stderr)
        return 2
    return _apply(script, parsed.show)


def _apply(script: str, show: bool) -> int:
    from gateway.mesh.intercept import InterceptError, nft

    if show:
        print(script, end="")
        return 0
    try:
        nft(script)
    except InterceptError as error:
        print(f"crossway: {error}", file=sys.stderr)
        return 1
    return 0
