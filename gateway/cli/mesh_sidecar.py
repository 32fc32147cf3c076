"""`crossway mesh sidecar`: stand beside one instance of a service, and speak for it in the mesh.

Strategy: addresses are numeric, so that nothing about who is reached rests on a name server; all mistakes of the command line are told
before anything is bound.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys

from gateway.cli import Subparsers
from gateway.server.app_probe import AppProbe, parse_header, parse_probe


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("sidecar", help="run a service's sidecar")
    parser.add_argument("--service", required=True, type=_name, metavar="NAME", help="the service, as the mesh's file names it")
    parser.add_argument("--app", required=True, type=_app, metavar="HOST:PORT", help="where the app listens, in clear text; `none` for one that only calls others")
    parser.add_argument("--app-protocol", default="http1", choices=["http1", "http2", "grpc", "tcp"], help="what the app speaks, in clear text (http1)")
    parser.add_argument("--inbound", required=True, type=_address, metavar="HOST:PORT", help="where members of the mesh call it (mutual TLS)")
    parser.add_argument("--outbound", required=True, type=_loopback, metavar="HOST:PORT", help="where the app calls services, whose name is the Host")
    parser.add_argument("--control", required=True, type=_control, metavar="URL", help="the control plane, https://host:port")
    parser.add_argument("--state", required=True, metavar="FOLDER", help="certificate, key and last assignment; made when it is not there")
    parser.add_argument("--token", metavar="FILE", help="a token of `crossway mesh token`, needed the first time")
    parser.add_argument("--join-cert", metavar="FILE", help="instead of a token: a certificate of the bank's PKI that may join as this service")
    parser.add_argument("--join-key", metavar="FILE", help="its key; default: in the file of --join-cert")
    parser.add_argument("--join-kubernetes", metavar="FILE", help="instead of a token: this pod's service account token, from a projected volume")
    parser.add_argument("--control-ca", metavar="FILE", help="the root of the mesh, for --join-cert and --join-kubernetes")
    parser.add_argument("--spire", nargs="?", const="", metavar="SOCKET", help="instead of both: certificate and roots come from the SPIFFE agent there (unix:PATH); without SOCKET: at $SPIFFE_ENDPOINT_SOCKET")
    parser.add_argument("--local", action="append", default=[], type=_local, metavar="SERVICE=HOST:PORT", help="a port of its own for one service; may be repeated")
    parser.add_argument("--admin", type=_loopback, metavar="HOST:PORT", help="/livez, /readyz, /metrics and /status, on loopback")
    parser.add_argument("--probes", type=_address, metavar="HOST:PORT", help="/livez, /startz, /readyz and /metrics for an orchestrator, on any address")
    parser.add_argument("--app-probe", action="append", default=[], type=_probe, metavar="NAME=http:PORT/PATH", help="/app/NAME of --probes asks the app this, or NAME=tcp:PORT; may be repeated")
    parser.add_argument("--app-probe-header", action="append", default=[], type=_probe_header, metavar="NAME=HEADER:VALUE", help="a header of such a probe; may be repeated")
    parser.add_argument("--advertise", type=_address, metavar="HOST:PORT", help="how others reach --inbound, when that is another address")
    parser.add_argument("--zone", type=_name, metavar="NAME", help="where this instance is; endpoints of the same zone are preferred")
    parser.add_argument("--network", type=_name, metavar="NAME", help="which network this is, when the mesh has several; others are reached through their gateways")
    parser.add_argument("--label", action="append", default=[], type=_label, metavar="KEY=VALUE", help="for splits and canaries; may be repeated")
    parser.add_argument("--intercept", action="store_true", help="--outbound gets connections that `crossway mesh intercept` redirects")
    parser.add_argument("--external-cert", action="append", default=[], type=_pair, metavar="NAME=FILE", help="our certificate with its key, PEM, towards an external host; may be repeated")
    parser.add_argument("--egress-audit", metavar="FILE", help="a record of each call to an external host: a file, stdout or stderr")
    parser.add_argument("--drain-delay", default=2.0, type=_seconds, metavar="SECONDS", help="from leaving the registry to closing inbound (2)")
    parser.add_argument("--drain-deadline", default=30.0, type=_seconds, metavar="SECONDS", help="for what is in flight, and for the app to end (30)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="least severe line of the log (info)")
    parser.set_defaults(run=run)


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
    try:
        if match is None or int(match[3]) > 65535:
            raise ValueError
        return str(ipaddress.ip_address(match[1] or match[2])), int(match[3])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a numeric address and a port, such as 127.0.0.1:9001") from None


def _control(text: str) -> str:
    from gateway.mesh.enrol import EnrolError, address_of

    try:
        address_of(text)
    except EnrolError:
        raise argparse.ArgumentTypeError(f"{text!r} is not the control plane's address, such as https://10.0.0.2:9700") from None
    return text


def _app(text: str) -> tuple[str, int] | None:
    if text == "none":
        return None
    host, port = _address(text)
    if port == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: name the port on which the app listens")
    return host, port


def nowhere(bound: tuple[str, int], advertised: tuple[str, int] | None, option: str) -> bool:
    """Tell, and say so, that what is bound is every address, and none that others could be told."""
    if advertised is None and ipaddress.ip_address(bound[0]).is_unspecified:
        print(f"crossway: {option} {bound[0]} is every address of this machine: name the one by which others reach it with --advertise", file=sys.stderr)
        return True
    return False


def _loopback(text: str) -> tuple[str, int]:
    host, port = _address(text)
    if not ipaddress.ip_address(host).is_loopback:
        raise argparse.ArgumentTypeError(f"{text!r} is not on loopback: whoever reaches it speaks for the service")
    return host, port


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: small letters, digits, . _ and -")
    return text


def _local(text: str) -> tuple[str, tuple[str, int]]:
    name, _, where = text.partition("=")
    return _name(name), _loopback(where)


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return _name(name), path


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9._/-]{1,63}", key) or not re.fullmatch(r"[A-Za-z0-9._-]{0,63}", value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _probe(text: str) -> tuple[str, AppProbe]:
    try:
        return parse_probe(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=http:PORT/PATH or NAME=tcp:PORT") from None


def _probe_header(text: str) -> tuple[str, str, str]:
    try:
        return parse_header(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=HEADER:VALUE, or the header is not one to set") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 3600")
    return value


def run(parsed: argparse.Namespace) -> int:
    ways = [name for name in ("token", "join_cert", "join_kubernetes", "spire") if getattr(parsed, name) is not None]
    if len(ways) > 1:
        print(f"crossway: {' and '.join('--' + each.replace('_', '-') for each in ways)}: one way to join is enough", file=sys.stderr)
        return 2
    if (parsed.control_ca is None) != (ways not in (["join_cert"], ["join_kubernetes"])) or (parsed.join_key is not None and parsed.join_cert is None):
        print("crossway: --control-ca belongs to --join-cert or --join-kubernetes: who we are, and who the control plane is", file=sys.stderr)
        return 2
    if not {each[0] for each in parsed.app_probe_header} <= set(dict(parsed.app_probe)) or (parsed.app_probe and parsed.probes is None):
        print("crossway: --app-probe-header belongs to an --app-probe, and that to --probes", file=sys.stderr)
        return 2
    if parsed.app is not None and nowhere(parsed.inbound, parsed.advertise, "--inbound"):
        return 2
    for name, header, value in parsed.app_probe_header:
        dict(parsed.app_probe)[name].headers[header] = value
    from gateway.server import log as logs
    from gateway.server.sidecar import run as sidecar
    from gateway.server.sidecar_setup import Setup, address

    agent = None
    if parsed.spire is not None:
        from gateway.mesh.workload_api import agent_at

        try:
            agent = agent_at(parsed.spire)
        except ValueError as error:
            print(f"crossway: {error}", file=sys.stderr)
            return 2
    logs.set_up(level=parsed.log_level)
    return sidecar(
        Setup(
            service=parsed.service, app=parsed.app, inbound=parsed.inbound, outbound=parsed.outbound, control=parsed.control,
            state=parsed.state, token=parsed.token, ports=dict(parsed.local), admin=parsed.admin, zone=parsed.zone,
            pair=None if parsed.join_cert is None else (parsed.join_cert, parsed.join_key or parsed.join_cert), control_ca=parsed.control_ca, agent=agent,
            pod=parsed.join_kubernetes, probes=parsed.probes, app_probes=dict(parsed.app_probe),
            labels=dict(parsed.label) | ({} if parsed.network is None else {"network": parsed.network}),
            external_certs=dict(parsed.external_cert), egress_audit=parsed.egress_audit,
            advertise=None if parsed.advertise is None else address(*parsed.advertise),
            intercept=parsed.intercept, app_protocol=parsed.app_protocol, drain_delay=parsed.drain_delay, drain_deadline=parsed.drain_deadline,
        )
    )  # fmt: skip
