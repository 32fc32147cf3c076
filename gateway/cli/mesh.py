"""`crossway mesh COMMAND`: what belongs to the service mesh.

Strategy: as in gateway.cli, a command's module is imported when it was chosen.
"""

from __future__ import annotations

import sys
from importlib import import_module

from gateway.cli import Subparsers

COMMANDS = {
    "control": ("run the mesh's control plane", "gateway.cli.mesh_control"),
    "apply": ("put a mesh's document in force on all control planes", "gateway.cli.mesh_apply"),
    "token": ("make a token by which one instance of a service joins", "gateway.cli.mesh_token"),
    "status": ("show the proxies: state, version applied, refusals", "gateway.cli.mesh_status"),
    "can": ("say whether a service may call another, and why", "gateway.cli.mesh_can"),
    "revoke": ("shut out a service or a certificate", "gateway.cli.mesh_revoke"),
    "rotate-root": ("change the mesh's root without a restart", "gateway.cli.mesh_rotate"),
    "sidecar": ("run a service's sidecar", "gateway.cli.mesh_sidecar"),
    "inject": ("put the mesh into manifests of Kubernetes", "gateway.cli.mesh_inject"),
    "leave": ("take a sidecar out of service while it goes on serving", "gateway.cli.mesh_leave"),
    "gateway": ("let members of other networks reach the services of this one", "gateway.cli.mesh_gateway"),
    "intercept": ("redirect an app's connections to its sidecar (nftables)", "gateway.cli.mesh_intercept"),
}


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("mesh", help="the service mesh: control plane, sidecars, interception")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True, prog="crossway mesh")
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    chosen = words[1] if len(words) > 1 else None
    for name, (text, module) in COMMANDS.items():
        if name == chosen or chosen is None or chosen not in COMMANDS:
            import_module(module).register(commands)
        else:
            commands.add_parser(name, help=text)
