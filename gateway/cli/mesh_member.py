"""What the commands of members have in common: how addresses and names are written, and how one joins.

Strategy: sidecars and mesh gateways are members alike. They join by a token, the bank's PKI, Kubernetes or SPIRE, by exactly one of them; whatever contradicts
itself is told before anything is bound.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys
from typing import Any

WAYS = ("token", "join_cert", "join_kubernetes", "spire")
LASTING = (["join_cert"], ["join_kubernetes"])  # those that do not bring the control plane's root


def add_ways(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command's parser."""
    parser.add_argument("--token", metavar="FILE", help="a token of `crossway mesh token`, needed the first time")
    parser.add_argument("--join-cert", metavar="FILE", help="instead of a token: a certificate of the bank's PKI that may join as this service")
    parser.add_argument("--join-key", metavar="FILE", help="its key; default: in the file of --join-cert")
    parser.add_argument("--join-kubernetes", metavar="FILE", help="instead of a token: this pod's service account token, from a projected volume")
    parser.add_argument("--control-ca", metavar="FILE", help="the root of the mesh, for --join-cert and --join-kubernetes")
    parser.add_argument("--spire", nargs="?", const="", metavar="SOCKET", help="instead of both: certificate and roots come from the SPIFFE agent there (unix:PATH); without SOCKET: at $SPIFFE_ENDPOINT_SOCKET")


def way_of(parsed: argparse.Namespace) -> dict[str, Any] | None:
    """Return what a Setup knows of joining; None when it makes no sense, which is told on stderr."""
    ways = [name for name in WAYS if getattr(parsed, name) is not None]
    if len(ways) > 1:
        print(f"crossway: {' and '.join('--' + each.replace('_', '-') for each in ways)}: one way to join is enough", file=sys.stderr)
        return None
    if (parsed.control_ca is None) != (ways not in LASTING) or (parsed.join_key is not None and parsed.join_cert is None):
        print("crossway: --control-ca belongs to --join-cert or --join-kubernetes: who we are, and who the control plane is", file=sys.stderr)
        return None
    agent = None
    if parsed.spire is not None:
        from gateway.mesh.workload_api import agent_at

        try:
            agent = agent_at(parsed.spire)
        except ValueError as error:
            print(f"crossway: {error}", file=sys.stderr)
            return None
    pair = None if parsed.join_cert is None else (parsed.join_cert, parsed.join_key or parsed.join_cert)
    return {"token": parsed.token, "pair": pair, "pod": parsed.join_kubernetes, "control_ca": parsed.control_ca, "agent": agent}


def parse_address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
    try:
        if match is None or int(match[3]) > 65535:
            raise ValueError
        return str(ipaddress.ip_address(match[1] or match[2])), int(match[3])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a numeric address and a port, such as 127.0.0.1:9001") from None


def parse_control(text: str) -> str:
    from gateway.mesh.contact import EnrolError, address_of

    try:
        address_of(text)
    except EnrolError:
        raise argparse.ArgumentTypeError(f"{text!r} is not the control plane's address, such as https://10.0.0.2:9700") from None
    return text


def nowhere(bound: tuple[str, int], advertised: tuple[str, int] | None, option: str) -> bool:
    """Tell, and say so, that what is bound is every address, and none that others could be told."""
    if advertised is None and ipaddress.ip_address(bound[0]).is_unspecified:
        print(f"crossway: {option} {bound[0]} is every address of this machine: name the one by which others reach it with --advertise", file=sys.stderr)
        return True
    return False


def parse_loopback(text: str) -> tuple[str, int]:
    host, port = parse_address(text)
    if not ipaddress.ip_address(host).is_loopback:
        raise argparse.ArgumentTypeError(f"{text!r} is not on loopback: whoever reaches it speaks for the service")
    return host, port


def parse_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: small letters, digits, . _ and -")
    return text


def parse_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 3600")
    return value
