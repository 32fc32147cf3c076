"""`crossway check`: say everything that is wrong with a configuration, and bind nothing.

Strategy: the same `load` that `crossway run` uses, then the same build (thrown away), then the warnings; what a person
reads and the JSON list go to standard output, the exit code says the rest.
"""

from __future__ import annotations

import argparse
import json
import logging
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
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="the configuration file")
    parser.add_argument("--strict", action="store_true", help="exit 1 when there are warnings")
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="how to print the findings (default: text)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the file; return 0 for a good one, 1 with --strict for warnings, 2 for errors."""
    from gateway import snapshot  # these take a moment to import: not for `crossway --help`
    from gateway.config import findings, load

    # What a policy has to say is among the findings; logging would print it a second time.
    logging.getLogger("gateway").addHandler(logging.NullHandler())
    summary = ""
    problems: Sequence[Problem]
    try:
        config = load(args.config)
        problems = sorted([*findings(config), *snapshot.check(config)], key=lambda problem: (problem.line, problem.column))
        parts = [_count(len(getattr(config, name)), name) for name in ("listeners", "upstreams", "policies", "routes")]
        if not any(problem.severity == "error" for problem in problems):
            summary = f"{args.config}: ok, {', '.join(parts)}, digest {config.digest[:12]}"
    except ConfigError as error:
        problems = error.problems
    if args.output == "json":
        print(json.dumps([problem.as_dict() for problem in problems], indent=2))
    else:
        for problem in problems:
            print(problem.render(), end="\n\n")
        print(summary or f"{args.config}: {_tally(problems)}")
    if any(problem.severity == "error" for problem in problems):
        return ERRORS
    return WARNINGS if problems and args.strict else OK


def _count(number: int, plural: str) -> str:
    singular = "policy" if plural == "policies" else plural[:-1]
    return f"{number} {singular if number == 1 else plural}"


def _tally(problems: Sequence[Problem]) -> str:
    errors = sum(problem.severity == "error" for problem in problems)
    return ", ".join(
        _count(number, name) for number, name in ((errors, "errors"), (len(problems) - errors, "warnings")) if number
    )
