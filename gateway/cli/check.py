"""`crossway check`: say everything that is wrong with a configuration, and bind nothing.

Strategy: the same `load` that `crossway run` (or `crossway mesh control`) uses, then the same build (thrown away), then the warnings; what a person
reads and the JSON list go to standard output, the exit code says the rest.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from gateway.errors import ConfigError, Problem

OK, WARNINGS, ERRORS = 0, 1, 2


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="check a configuration and bind nothing",
        description=__doc__.partition("\n")[0] if __doc__ else None,
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="the file of a gateway or of a mesh")
    parser.add_argument("-c", "--config", metavar="FILE", help="the same")
    parser.add_argument("--strict", action="store_true", help="exit 1 when there are warnings")
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="how to print the findings (default: text)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the file; return 0 for a good one, 1 with --strict for warnings, 2 for errors."""
    path = args.config or args.file
    if path is None or (args.config and args.file):
        print("crossway check: name one file", file=sys.stderr)
        return ERRORS
    # What a policy has to say is among the findings; logging would print it a second time.
    logging.getLogger("gateway").addHandler(logging.NullHandler())
    summary = ""
    problems: Sequence[Problem]
    try:
        from gateway.config.mesh_load import is_mesh  # the schema takes a moment to import: not for `crossway --help`

        problems, parts, digest = _mesh(path) if is_mesh(path) else _gateway(path)
        if not any(problem.severity == "error" for problem in problems):
            summary = f"{path}: ok, {', '.join(parts)}, digest {digest[:12]}"
    except ConfigError as error:
        problems = error.problems
    if args.output == "json":
        print(json.dumps([problem.as_dict() for problem in problems], indent=2))
    else:
        for problem in problems:
            print(problem.render(), end="\n\n")
        print(summary or f"{path}: {_tally(problems)}")
    if any(problem.severity == "error" for problem in problems):
        return ERRORS
    return WARNINGS if problems and args.strict else OK


def _gateway(path: str) -> tuple[list[Problem], list[str], str]:
    """Return (problems, what is in it, digest) of a gateway's file. Raises ConfigError."""
    from gateway import snapshot
    from gateway.config import findings, load

    config = load(path)
    problems = sorted([*findings(config), *snapshot.check(config)], key=lambda problem: (problem.line, problem.column))
    numbers = {name: len(getattr(config, name)) for name in ("listeners", "upstreams", "policies", "routes")}
    numbers["upstreams"] -= sum(upstream.is_part for upstream in config.upstreams.values())
    parts = [_count(number, name) for name, number in numbers.items()]
    return problems, parts, config.digest


def _mesh(path: str) -> tuple[list[Problem], list[str], str]:
    """The same of a mesh's file."""
    from gateway.config.mesh_load import load_mesh, mesh_findings

    mesh = load_mesh(path)
    parts = [_count(len(mesh.services), "services"), _count(len(mesh.authorization.rules), "rules")]
    return mesh_findings(mesh), [f"mesh {mesh.trust_domain}", *parts], mesh.digest


def _count(number: int, plural: str) -> str:
    singular = "policy" if plural == "policies" else plural[:-1]
    return f"{number} {singular if number == 1 else plural}"


def _tally(problems: Sequence[Problem]) -> str:
    errors = sum(problem.severity == "error" for problem in problems)
    return ", ".join(
        _count(number, name) for number, name in ((errors, "errors"), (len(problems) - errors, "warnings")) if number
    )
