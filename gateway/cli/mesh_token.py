"""`crossway mesh token SERVICE`: a token by which one instance of a service joins, on standard output."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, with_store

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.store import Store

LONGEST = 86400.0  # seconds


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("token", help="make a token by which one instance of a service joins, once")
    parser.add_argument("service", metavar="SERVICE", help="a service of the mesh's file")
    add_file(parser)
    parser.add_argument("--life", default="10m", metavar="TIME", help="how long it can be used, at most 1d (10m)")
    parser.add_argument("--out", metavar="FILE", help="write it there, 0600, instead of standard output")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    async def work(mesh: MeshFile, store: Store) -> int:
        from gateway.config.values import parse_duration
        from gateway.mesh import tokens
        from gateway.mesh.ca import Ca
        from gateway.mesh.keys import keys_of

        if parsed.service not in mesh.services:
            raise ValueError(f"{parsed.service} is not a service of {parsed.config}: there are {', '.join(mesh.services)}")
        if mesh.control.spire is not None:
            raise ValueError("certificates of this mesh come from SPIRE: a registration entry lets an instance join, not a token")
        life = parse_duration(parsed.life)
        if not 1 <= life <= LONGEST:
            raise ValueError("--life is between 1s and 1d")
        ca = Ca(mesh.control.ca, mesh.trust_domain, keys_of(mesh)).open()
        line = await tokens.make(store, parsed.service, ca.root_digest, life)
        if parsed.out:
            handle = os.open(parsed.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.write(handle, f"{line}\n".encode("ascii"))
            os.close(handle)
        else:
            print(line)
        if sys.stdout.isatty() and not parsed.out:
            print(f"It lets one instance of {parsed.service} join, once, within {parsed.life}.", file=sys.stderr)
        return 0

    return with_store(parsed, work)
