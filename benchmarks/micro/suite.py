"""One round of the micro benchmarks under pyperf; started by __main__.py, which repeats it.

Strategy: pyperf starts a fresh process for each case, calibrates and warms it up; a case is prepared only in the process
that measures it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import cache

import pyperf

from benchmarks.micro.cases import CASES, Timer


def late(prepare: Callable[[], Timer]) -> Timer:
    """Return a time function that prepares its case at its first call, which only the measuring process makes."""
    made = cache(prepare)
    return lambda loops: made()(loops)


def main() -> None:
    """Run the cases whose name holds the text given by --only, or all."""

    def pass_on(command: list[str], options: Namespace) -> None:
        if options.only:
            command.extend(("--only", options.only))

    runner = pyperf.Runner(program_args=("-m", "benchmarks.micro.suite"), add_cmdline_args=pass_on)
    runner.argparser.add_argument("--only", default="")
    runner.parse_args()
    for name, prepare in CASES.items():
        if runner.args.only in name:
            runner.bench_time_func(name, late(prepare))


if __name__ == "__main__":
    main()
