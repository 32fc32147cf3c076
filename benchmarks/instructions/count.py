"""Instructions per request, counted by callgrind: a figure that a busy machine cannot change.

Strategy: workload.py runs under valgrind once for each scenario. Collecting is switched on and off by entering and leaving
Engine.poll(), and what the warm-up collected is forgotten at measured_from_here(), so the total divided by the number of
requests is the cost of one. What the kernel does in system calls is not in it: benchmarks/load measures that.

    script/instructions            measure this commit and add it to benchmarks/results/instructions.csv
    script/instructions --check    measure the working tree and print its ratio to the last row; writes nothing, and fails
                                   when a request became dearer than --most allows
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.instructions.callgrind import costs, top
from benchmarks.instructions.record import SCENARIOS, Function, Row, added, comparison, dearer, read, report, write
from benchmarks.load.machine import commit, printed

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "instructions.csv"
PAGE = TABLE.with_suffix(".md")
REQUESTS = 1280
MOST = 1.03
SHOWN = 15
# Cython numbers methods, hence the star. The names must match one function each: a nested match would switch collecting off.
POLL = "__pyx_pw_7gateway_9_speedups_6engine_6Engine_*poll"
MARK = "__pyx_pw_7gateway_9_speedups_6timing_*measured_from_here"


class CannotCount(Exception):
    """No figure could be taken; the message says why and what to do."""


def count(scenario: str, requests: int, folder: Path) -> tuple[float, list[Function]]:
    """Return instructions per request of a scenario, and its most expensive functions. Raises CannotCount."""
    out = folder / f"{scenario}.callgrind"
    command = [
        "valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no",
        f"--toggle-collect={POLL}", f"--zero-before={MARK}",
        sys.executable, "-m", "benchmarks.instructions.workload", scenario, "--requests", str(requests),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        raise CannotCount(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    with out.open(encoding="utf-8", errors="replace") as lines:
        found = costs(lines)
    if not found:
        raise CannotCount(f"callgrind met no function called {POLL}: are the native modules stripped?")
    return sum(found.values()) / requests, top(found, requests, SHOWN)


def compiler() -> str:
    """Return the C compiler's name and version, as its first line ends."""
    match = re.search(r"^(\S+).*?(\d+\.\d+\.\d+)", printed(["cc", "--version"]))
    return f"{match.group(1)} {match.group(2)}" if match else "unknown"


def measure(requests: int) -> tuple[Row, dict[str, list[Function]]]:
    """Return this tree's row and its functions. Raises CannotCount."""
    if shutil.which("valgrind") is None:
        raise CannotCount("valgrind is not installed; on Debian and Ubuntu: apt-get install valgrind")
    counts: dict[str, float] = {}
    functions: dict[str, list[Function]] = {}
    with tempfile.TemporaryDirectory(prefix="crossway-instructions-") as folder:
        for scenario in SCENARIOS:
            counts[scenario], functions[scenario] = count(scenario, requests, Path(folder))
    version = ".".join(map(str, sys.version_info[:3]))
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Row(commit()[0], date, python=version, compiler=compiler(), **counts), functions


def main() -> int:
    """Measure; compare or record. Return the exit code: 0, 1 when --check finds a scenario dearer, 2 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="script/instructions", description="instructions per request under callgrind")
    parser.add_argument("--check", action="store_true", help="compare with the last row instead of adding one")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"measured requests (default {REQUESTS})")
    parser.add_argument("--most", type=float, default=MOST, metavar="RATIO", help=f"what --check bears (default {MOST})")
    options = parser.parse_args()
    rows = read(TABLE.read_text("utf-8")) if TABLE.exists() else []
    if not options.check and not commit()[1]:
        print("instructions: the working tree differs from its commit; commit first, or use --check", file=sys.stderr)
        return 2
    try:
        row, functions = measure(options.requests)
    except CannotCount as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 2
    before = [known for known in rows if known.commit != row.commit] if not options.check else rows
    print(comparison(before[-1] if before else None, row))
    if not options.check:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(write(added(rows, row)), "utf-8")
        PAGE.write_text(report(row, functions), "utf-8")
    elif rows and (worse := dearer(rows[-1], row, options.most)):
        print(f"instructions: dearer than {options.most}x: {', '.join(worse)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
