"""`crossway mesh gateway`: be the one port by which members of other networks reach the services of this one.

Strategy: the arguments are those of a sidecar as far as they mean the same.
"""

from __future__ import annotations

import argparse
import sys

from gateway.cli import Subparsers
from gateway.cli.mesh_member import (
    add_ways,
    nowhere,
    parse_address,
    parse_control,
    parse_loopback,
    parse_name,
    parse_seconds,
    way_of,
)


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("gateway", help="let members of other networks reach the services of this one")
    parser.add_argument("--network", required=True, type=parse_name, metavar="NAME", help="the network whose services it leads to")
    parser.add_argument("--bind", required=True, type=parse_address, metavar="HOST:PORT", help="where members of other networks come in (their mutual TLS is not ended here)")
    parser.add_argument("--service", default="gateway", type=parse_name, metavar="NAME", help="the service that the mesh's file names as the network's gateway (gateway)")
    parser.add_argument("--connections", default=10_000, type=int, metavar="NUMBER", help="that may pass at once (10000)")
    parser.add_argument("--advertise", type=parse_address, metavar="HOST:PORT", help="how other networks reach --bind, when that is another address")
    parser.add_argument("--control", required=True, type=parse_control, metavar="URL", help="the control plane, https://host:port")
    parser.add_argument("--state", required=True, metavar="FOLDER", help="certificate, key and last assignment; made when it is not there")
    add_ways(parser)
    parser.add_argument("--admin", type=parse_loopback, metavar="HOST:PORT", help="/livez, /readyz, /metrics and /status, on loopback")
    parser.add_argument("--probes", type=parse_address, metavar="HOST:PORT", help="/livez, /startz, /readyz and /metrics for an orchestrator, on any address")
    parser.add_argument("--drain-delay", default=2.0, type=parse_seconds, metavar="SECONDS", help="from leaving the registry to taking no more connections (2)")
    parser.add_argument("--drain-deadline", default=30.0, type=parse_seconds, metavar="SECONDS", help="for connections that are open (30)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="least severe line of the log (info)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    way = way_of(parsed)
    if way is None:
        return 2
    if not 1 <= parsed.connections <= 1_000_000:
        print("crossway: --connections is a number from 1 to 1000000", file=sys.stderr)
        return 2
    if nowhere(parsed.bind, parsed.advertise, "--bind"):
        return 2
    from gateway.server import log as logs
    from gateway.server.mesh_gateway import GatewaySetup
    from gateway.server.mesh_gateway import run as be_gateway
    from gateway.server.sidecar_setup import address as address_text

    logs.set_up(level=parsed.log_level)
    return be_gateway(
        GatewaySetup(
            service=parsed.service, inbound=parsed.bind, network=parsed.network, connections=parsed.connections, control=parsed.control,
            state=parsed.state, admin=parsed.admin, probes=parsed.probes,
            advertise=None if parsed.advertise is None else address_text(*parsed.advertise),
            drain_delay=parsed.drain_delay, drain_deadline=parsed.drain_deadline, **way,
        )
    )  # fmt: skip
