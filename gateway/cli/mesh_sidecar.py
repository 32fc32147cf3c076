"""`crossway mesh sidecar`: stand beside one instance of a service, and speak for it in the mesh.

Strategy: addresses are numeric, so that nothing about who is reached rests on a name server; all mistakes of the command line are told
before anything is bound.
"""

from __future__ import annotations

import argparse
import re
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
from gateway.server.app_probe import AppProbe, parse_header, parse_probe


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("sidecar", help="run a service's sidecar")
    parser.add_argument("--service", required=True, type=parse_name, metavar="NAME", help="the service, as the mesh's file names it")
    parser.add_argument("--app", required=True, type=_app, metavar="HOST:PORT", help="where the app listens, in clear text; `none` for one that only calls others")
    parser.add_argument("--app-protocol", default="http1", choices=["http1", "http2", "grpc", "tcp"], help="what the app speaks, in clear text (http1)")
    parser.add_argument("--inbound", required=True, type=parse_address, metavar="HOST:PORT", help="where members of the mesh call it (mutual TLS)")
    parser.add_argument("--outbound", required=True, type=parse_loopback, metavar="HOST:PORT", help="where the app calls services, whose name is the Host")
    parser.add_argument("--control", required=True, type=parse_control, metavar="URL", help="the control plane, https://host:port")
    parser.add_argument("--state", required=True, metavar="FOLDER", help="certificate, key and last assignment; made when it is not there")
    add_ways(parser)
    parser.add_argument("--local", action="append", default=[], type=_local, metavar="SERVICE=HOST:PORT", help="a port of its own for one service; may be repeated")
    parser.add_argument("--admin", type=parse_loopback, metavar="HOST:PORT", help="/livez, /readyz, /metrics and /status, on loopback")
    parser.add_argument("--probes", type=parse_address, metavar="HOST:PORT", help="/livez, /startz, /readyz and /metrics for an orchestrator, on any address")
    parser.add_argument("--app-probe", action="append", default=[], type=_probe, metavar="NAME=http:PORT/PATH", help="/app/NAME of --probes asks the app this, NAME=grpc:PORT/SERVICE or NAME=tcp:PORT; may be repeated")
    parser.add_argument("--app-probe-header", action="append", default=[], type=_probe_header, metavar="NAME=HEADER:VALUE", help="a header of such a probe; may be repeated")
    parser.add_argument("--advertise", type=parse_address, metavar="HOST:PORT", help="how others reach --inbound, when that is another address")
    parser.add_argument("--zone", type=parse_name, metavar="NAME", help="where this instance is; endpoints of the same zone are preferred")
    parser.add_argument("--network", type=parse_name, metavar="NAME", help="which network this is, when the mesh has several; others are reached through their gateways")
    parser.add_argument("--label", action="append", default=[], type=_label, metavar="KEY=VALUE", help="for splits and canaries; may be repeated")
    parser.add_argument("--intercept", action="store_true", help="--outbound gets connections that `crossway mesh intercept` redirects")
    parser.add_argument("--external-cert", action="append", default=[], type=_pair, metavar="NAME=FILE", help="our certificate (PEM) towards an external host, with its key; may be repeated")
    parser.add_argument("--external-key", action="append", default=[], type=_pair, metavar="NAME=FILE", help="the key of such a certificate; default: in its file; may be repeated")
    parser.add_argument("--egress-audit", metavar="FILE", help="a record of each call to an external host: a file, stdout or stderr")
    parser.add_argument("--drain-delay", default=2.0, type=parse_seconds, metavar="SECONDS", help="from leaving the registry to closing inbound (2)")
    parser.add_argument("--drain-deadline", default=30.0, type=parse_seconds, metavar="SECONDS", help="for what is in flight, and for the app to end (30)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="least severe line of the log (info)")
    parser.set_defaults(run=run)


def _app(text: str) -> tuple[str, int] | None:
    if text == "none":
        return None
    host, port = parse_address(text)
    if port == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: name the port on which the app listens")
    return host, port


def _local(text: str) -> tuple[str, tuple[str, int]]:
    service, _, where = text.partition("=")
    return parse_name(service), parse_loopback(where)


def _pair(text: str) -> tuple[str, str]:
    host, equals, path = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return parse_name(host), path


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9._/-]{1,63}", key) or not re.fullmatch(r"[A-Za-z0-9._-]{0,63}", value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _probe(text: str) -> tuple[str, AppProbe]:
    try:
        return parse_probe(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=http:PORT/PATH, NAME=grpc:PORT/SERVICE or NAME=tcp:PORT") from None


def _probe_header(text: str) -> tuple[str, str, str]:
    try:
        return parse_header(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=HEADER:VALUE, or the header is not one to set") from None


def run(parsed: argparse.Namespace) -> int:
    way = way_of(parsed)
    if way is None:
        return 2
    if not {each[0] for each in parsed.app_probe_header} <= set(dict(parsed.app_probe)) or (parsed.app_probe and parsed.probes is None):
        print("crossway: --app-probe-header belongs to an --app-probe, and that to --probes", file=sys.stderr)
        return 2
    keys = dict(parsed.external_key)
    if not set(keys) <= set(dict(parsed.external_cert)):
        print("crossway: --external-key belongs to an --external-cert of the same name", file=sys.stderr)
        return 2
    certificates = {host: (file, *([keys[host]] if host in keys else [])) for host, file in parsed.external_cert}
    if parsed.app is not None and nowhere(parsed.inbound, parsed.advertise, "--inbound"):
        return 2
    for probe, header, value in parsed.app_probe_header:
        dict(parsed.app_probe)[probe].headers[header] = value
    from gateway.server import log as logs
    from gateway.server.sidecar import run as sidecar
    from gateway.server.sidecar_setup import Setup
    from gateway.server.sidecar_setup import address as address_text

    logs.set_up(level=parsed.log_level)
    return sidecar(
        Setup(
            service=parsed.service, app=parsed.app, inbound=parsed.inbound, outbound=parsed.outbound, control=parsed.control,
            state=parsed.state, ports=dict(parsed.local), admin=parsed.admin, zone=parsed.zone,
            probes=parsed.probes, app_probes=dict(parsed.app_probe),
            labels=dict(parsed.label) | ({} if parsed.network is None else {"network": parsed.network}),
            external_certs=certificates, egress_audit=parsed.egress_audit,
            advertise=None if parsed.advertise is None else address_text(*parsed.advertise),
            intercept=parsed.intercept, app_protocol=parsed.app_protocol, drain_delay=parsed.drain_delay, drain_deadline=parsed.drain_deadline, **way,
        )
    )  # fmt: skip
