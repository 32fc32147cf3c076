"""`crossway mesh revoke WHAT`: shut out a service or one certificate, everywhere within seconds; `--undo` lets it in again."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, with_store

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.store import Store


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("revoke", help="shut out a service or a certificate; connections are cut")
    parser.add_argument("what", metavar="WHAT", help="a service, its SPIFFE id, or the serial number of a certificate")
    add_file(parser)
    parser.add_argument("--reason", default="", help="kept with it")
    parser.add_argument("--undo", action="store_true", help="let it in again")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    async def work(mesh: MeshFile, store: Store) -> int:
        from gateway.mesh import revocation

        kind, value = revocation.read(parsed.what, mesh)
        if parsed.undo:
            if not await revocation.admit(store, kind, value):
                by_file = value in mesh.revoked.services or value in mesh.revoked.serials
                print(f"crossway: {kind} {value} is not revoked{' here, but in the file under `revoked`' if by_file else ''}", file=sys.stderr)
                return 1
            done = "is let in again; certificates from before are good again too" if kind == revocation.SERVICE else "is good again"
        else:
            others = await revocation.revoke(store, kind, value, parsed.reason)
            done = "is revoked: it gets no certificate, and its connections are cut" if kind == revocation.SERVICE else "is revoked"
            if others:
                done += f", and so {'is another one' if others == 1 else f'are {others} others'} of its instance"
        await store.run("UPDATE counters SET value = value + 1 WHERE name = 'changes'")
        print(f"{kind} {value} {done}")
        return 0

    return with_store(parsed, work)
