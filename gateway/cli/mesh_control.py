"""`crossway mesh control`: run the mesh's control plane."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, guarded


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("control", help="run the mesh's control plane: identities, registry, authorization")
    add_file(parser)
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="least severe line of the log (info)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from gateway.server.control import CannotStart
    from gateway.server.control import run as serve

    def work() -> int:
        try:
            serve(Path(parsed.config), parsed.log_level)
        except CannotStart as error:
            print(f"crossway: {error}", file=sys.stderr)
            return 1
        return 0

    return guarded(work)
