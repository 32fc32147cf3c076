"""`crossway version`: the version, whether the core that serves requests is compiled, and the libraries beneath it."""

from __future__ import annotations

import argparse
import platform
import sys

import gateway
from gateway.cli import Subparsers


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("version", help="print the version, whether the core is compiled, and its libraries")
    parser.set_defaults(run=show)


def show(parsed: argparse.Namespace) -> int:
    """Print; exit 1 when the native modules are missing, because nothing runs without them."""
    print(f"crossway {gateway.__version__} (Python {platform.python_version()}, {platform.machine()})")
    try:
        from gateway._speedups import engine, http2, tls
    except ImportError as error:
        print("core: not built", file=sys.stderr)
        print(error, file=sys.stderr)
        return 1
    print(f"core: compiled ({engine.__file__})")
    for name, *files in (tls.libraries(), http2.libraries()):
        print(f"{name} ({', '.join(files)})")
    return 0
