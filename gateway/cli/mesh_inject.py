"""`crossway mesh inject`: read manifests of Kubernetes, write them with the mesh put in.

Strategy: a filter, so that it stands between any tool that makes manifests and kubectl. What is written is complete or nothing; problems and
warnings go to stderr. Options of the command hold for all pods that do not say otherwise in an annotation `crossway.dev/NAME`.
"""

from __future__ import annotations

import argparse
import sys

from gateway.cli import Subparsers

OPTIONS = {
    "control": ("URL", "the control plane, https://host:port, as pods reach it"),
    "image": ("IMAGE", "of Crossway (crossway:0.1.0)"),
    "app-port": ("PORT", "of the app; `none` for one that only calls others; default: its only containerPort"),
    "app-protocol": ("NAME", "http1, http2, grpc or tcp, what the app speaks (by the port's name, else http1)"),
    "app-uid": ("UID", "the user of the app's containers, for those without runAsUser"),
    "sidecar-uid": ("UID", "the user of the sidecar (65101)"),
    "audience": ("TEXT", "of the token by which pods join (crossway)"),
    "root": ("CONFIGMAP", "that holds the mesh's root as root.crt (crossway-root)"),
    "join-cert": ("SECRET", "instead of that token: tls.crt and tls.key of the bank's PKI, by which pods join"),
    "spire": ("SOCKET", "instead of both: `csi`, `csi/NAME.sock`, or the path of the SPIFFE agent's socket on the node"),
    "local": ("SERVICE=PORT", "a port of its own for one service; several with commas between"),
    "exclude-ports": ("PORTS", "not redirected, with commas between, such as a database's; 53 never is"),
    "exclude-networks": ("NETWORKS", "not redirected, with commas between"),
    "zone": ("NAME", "where the pods are; endpoints of the same zone are preferred"),
    "network": ("NAME", "which network of the mesh the pods are in"),
    "labels": ("KEY=VALUE", "for splits and canaries, with commas between (version= of the pod's label)"),
    "advertise": ("WHERE", "how others reach the pods: `node`, by the node's address and a hostPort, or HOST:PORT (the pod's address)"),
    "external-certs": ("HOST=SECRET", "tls.crt and tls.key towards an external host; several with commas between"),
    "authorities": ("CONFIGMAP", "with authorities of external hosts as ca.crt, or as CONFIGMAP/KEY (the image's)"),
    "egress-audit": ("WHERE", "a record of each call to an external host: stdout, stderr, or VOLUME/FILE of the pod's"),
    "inbound-port": ("PORT", "of the sidecar, for members (9101)"),
    "outbound-port": ("PORT", "of the sidecar, for the app (9102)"),
    "admin-port": ("PORT", "of the sidecar, on loopback (9103)"),
    "probes-port": ("PORT", "of the sidecar, for the kubelet and Prometheus (9104)"),
    "cpu-request": ("QUANTITY", "of the sidecar (50m)"),
    "cpu-limit": ("QUANTITY", "of the sidecar and of what redirects (none)"),
    "memory-request": ("QUANTITY", "of the sidecar (64Mi)"),
    "memory-limit": ("QUANTITY", "of the sidecar (256Mi)"),
    "drain-delay": ("SECONDS", "that callers have to learn that a pod leaves (2)"),
    "drain-deadline": ("SECONDS", "for what is in flight then (30)"),
    "log-level": ("LEVEL", "of the sidecar (info)"),
}


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("inject", help="put the mesh into manifests of Kubernetes")
    parser.add_argument("-f", "--file", metavar="FILE", help="the manifests; default: stdin")
    parser.add_argument("--service", metavar="NAME", help="of the only workload; default: the label app.kubernetes.io/name or app, else the workload's name")
    parser.add_argument("--explicit", action="store_true", help="no interception: apps call 127.0.0.1 and the outbound port, with the service as Host")
    for name, (what, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=what, help=text)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from gateway.errors import ConfigError
    from gateway.mesh.inject import MOST, Injection

    name = parsed.file or "stdin"
    try:
        if parsed.file is None:
            content = sys.stdin.buffer.read(MOST + 1)
        else:
            with open(parsed.file, "rb") as file:
                content = file.read(MOST + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print(f"crossway: {name}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}", file=sys.stderr)
        return 1
    if len(content) > MOST:
        print(f"crossway: {name}: more than {MOST >> 20} MiB", file=sys.stderr)
        return 1
    given = {option: getattr(parsed, option.replace("-", "_")) for option in ("service", *OPTIONS)}
    injection = Injection(name, {option: value for option, value in given.items() if value is not None} | ({"mode": "explicit"} if parsed.explicit else {}))
    try:
        made = injection.run(text)
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        return 2
    for problem in injection.problems:
        print(problem.render(), file=sys.stderr)
    sys.stdout.write(made)
    return 0
