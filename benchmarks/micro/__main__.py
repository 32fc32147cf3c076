"""Run the micro benchmarks: python -m benchmarks.micro [--fast] [--only TEXT] [-o FILE.json] [--render]

Strategy: a round is pyperf's one process for each case, all cases in turn; rounds are repeated and their medians compared
round by round, so that a slow minute of the machine meets everything that is compared. FILE.json is pyperf's own format:
`python -m pyperf compare_to` reads it. --render puts the table into docs/micro-benchmarks.md, with where it comes from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pyperf

from benchmarks.load.machine import facts
from benchmarks.load.render import replace_between
from benchmarks.micro.cases import GROUPS
from benchmarks.micro.table import END, PAGE, START, lines, provenance, render

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, VALUES, MIN_TIME = 5, 5, 0.05  # seconds
FAST_ROUNDS, FAST_VALUES, FAST_MIN_TIME = 1, 3, 0.01


def run_round(out: Path, only: str, values: int, min_time: float) -> pyperf.BenchmarkSuite:
    """Run every case once in a process of its own. Raises CalledProcessError."""
    command = [sys.executable, "-m", "benchmarks.micro.suite", "--quiet", "-o", str(out), "--processes", "1"]
    command += ["--values", str(values), "--warmups", "1", "--min-time", str(min_time)]
    command += ["--only", only] if only else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return pyperf.BenchmarkSuite.load(str(out))


def main() -> int:
    """Measure the rounds, print the table, keep the runs; return the exit code: 0, or 2 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description="micro benchmarks of the engine's parts")
    parser.add_argument("--fast", action="store_true", help="one short round: does it work, roughly how fast")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name holds this text")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="keep every run in pyperf's format")
    parser.add_argument("--render", action="store_true", help="put the table into docs/micro-benchmarks.md")
    options = parser.parse_args()
    if options.render and options.only:
        parser.error("--render needs all cases, not --only some")
    plan = (FAST_ROUNDS, FAST_VALUES, FAST_MIN_TIME) if options.fast else (ROUNDS, VALUES, MIN_TIME)
    if not any(options.only in f"{group}: {name}" for group, cases in GROUPS.items() for name in cases):
        parser.error(f"no case's name holds {options.only!r}")
    suite: pyperf.BenchmarkSuite | None = None
    rounds: dict[str, list[float]] = {}
    about = facts()
    with tempfile.TemporaryDirectory(prefix="crossway-micro-") as folder:
        for number in range(plan[0]):
            print(f"round {number + 1} of {plan[0]}", file=sys.stderr, flush=True)
            try:
                found = run_round(Path(folder) / f"{number}.json", options.only, *plan[1:])
            except subprocess.CalledProcessError:
                return 2
            for benchmark in found.get_benchmarks():
                rounds.setdefault(benchmark.get_name(), []).append(benchmark.median())
            if suite is None:
                suite = found
            else:
                suite.add_runs(found)
    table = render(lines(rounds, {group: [f"{group}: {name}" for name in cases] for group, cases in GROUPS.items()}))
    print(table)
    if options.output and suite is not None:
        suite.dump(str(options.output), replace=True)
    if options.render:
        block = f"{provenance(about, plan[0])}\n\n{table}"
        PAGE.write_text(replace_between(PAGE.read_text("utf-8"), block, PAGE.name, START, END), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
