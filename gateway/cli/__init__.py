"""The command line: `crossway COMMAND`.

Strategy: a static table names every command, its help line and its module; the module is imported only when its command was
chosen, so that help and completion answer at once. A command's module has `register(subparsers)`, which adds a parser with
`set_defaults(run=...)`, a function of the parsed arguments that returns the exit code.

Exit codes: 0 done, 1 it did not work, 2 the command line or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "run": ("run the gateway", "gateway.cli.run"),
    "check": ("check a configuration file, bind nothing", "gateway.cli.check"),
    "routes": ("list the routes of a configuration", "gateway.cli.routes"),
    "explain": ("say which route takes a request, and why the next ones do not", "gateway.cli.explain"),
    "demo": ("show a small bank behind the gateway", "gateway.cli.demo"),
    "bench": ("measure an HTTP service, compare two measurements, choose the workers", "gateway.cli.bench"),
    "schema": ("print the JSON Schema of the configuration", "gateway.cli.schema"),
    "reload": ("make the running gateway read its configuration again", "gateway.cli.reload"),
    "mesh": ("the service mesh: control plane, sidecars, interception", "gateway.cli.mesh"),
    "workers": ("show the workers: pid, rps, connections, CPU, configuration", "gateway.cli.workers"),
    "upstreams": ("show upstreams and endpoints: state, load, failures, retries", "gateway.cli.upstreams"),
    "status": ("show what the running gateway runs", "gateway.cli.status"),
    "health": ("exit 0 when the gateway is ready, 1 when it is not", "gateway.cli.health"),
    "version": ("print the version, whether the core is compiled, and its libraries", "gateway.cli.version"),
}

Subparsers = Any  # argparse._SubParsersAction, which argparse does not export


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = _parser(arguments).parse_args(arguments)
        return int(parsed.run(parsed))
    except SystemExit as leaving:  # argparse, after it printed help or an error
        return leaving.code if isinstance(leaving.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`); Python would complain again while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class Lines(argparse.HelpFormatter):
    """Help as wide as the terminal. argparse would ask `shutil` for that at every option, which brings zlib, bz2 and lzma into a sidecar's memory."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, **{"width": _columns() - 2, **more})


def _columns() -> int:
    """Columns of the terminal: $COLUMNS, what the terminal says, or 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]  # None: closed, as below
    except (AttributeError, ValueError, OSError):
        return 80


class Parser(argparse.ArgumentParser):
    """A parser of a command; those of its subcommands are of this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Lines, **options})


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="crossway", description="API gateway and service mesh for payment traffic.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=lambda parsed: _no_command(parser, parsed))
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands", prog="crossway")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, (text, module) in COMMANDS.items():
        if name == chosen:
            import_module(module).register(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def _no_command(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    if parsed.version:
        from gateway.cli.version import show

        return show(parsed)
    parser.print_help(sys.stderr)
    print("\nNothing to do: name a command, for example `crossway run -c edge.yaml`.", file=sys.stderr)
    return 2
