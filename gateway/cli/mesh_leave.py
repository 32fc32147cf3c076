"""`crossway mesh leave`: take a sidecar out of service while it goes on serving.

Strategy: the first step of its drain, on its own: callers learn that they should go elsewhere, while whoever has not learned it yet is still
answered. An orchestrator calls it before it tells the app to end; SIGTERM does the rest later.
"""

from __future__ import annotations

import argparse
import sys

from gateway.cli import Subparsers
from gateway.cli.mesh_member import parse_seconds


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("leave", help="have a running sidecar leave the registry, and go on serving")
    parser.add_argument("--state", required=True, metavar="FOLDER", help="the sidecar's, as it was started")
    parser.add_argument("--wait", default=0.0, type=parse_seconds, metavar="SECONDS", help="return only after this time, in which callers learn of it (0)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    import os
    import signal
    import time

    from gateway.mesh.state import owner

    pid = owner(parsed.state, "sidecar")
    if pid is None:
        print(f"crossway: no sidecar uses {parsed.state}", file=sys.stderr)
        return 1
    try:
        os.kill(pid, signal.SIGUSR2)
    except OSError as error:
        print(f"crossway: the sidecar (process {pid}): {error.strerror}", file=sys.stderr)
        return 1
    time.sleep(parsed.wait)
    return 0
