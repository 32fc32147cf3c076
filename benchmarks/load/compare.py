"""Measure Crossway beside the gateways that people run: CPU time per request, saturation of one core, latency, memory.

Strategy: the proxy has one core, the load and the origin the other. Each round visits every cell (a program in a scenario)
once, from a fresh start, so that a slow minute of the machine meets all of them; the CPU time is that of the program's whole
process tree. A run with a single error is no run. A program that cannot be started, or fails twice, leaves an empty cell with
the reason; it never ends the benchmark (comparison.py). The time is bounded and told at the start.

    python -m benchmarks.load.compare                       all of scenarios.yaml, under 20 minutes
    python -m benchmarks.load.compare --quick               one short round, under 5 minutes
    python -m benchmarks.load.compare --scenarios plain,token --programs crossway,haproxy
    python -m benchmarks.load.compare --scenarios tls       a group of scenarios that a run of everything leaves out; so is http2
"""

import argparse
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.load.arithmetic import InvalidRun
from benchmarks.load.comparison import FULL, QUICK, Comparison, Plan
from benchmarks.load.processes import Unusable, raise_descriptor_limit, require_programs
from benchmarks.load.programs import Bench
from benchmarks.load.results import write_result
from benchmarks.load.scenarios import ROOT, STREAMED, STREAMED_UPSTREAM, Catalogue, Cell, declared


def choose(catalogue: Catalogue, scenarios: str, programs: str) -> list[Cell]:
    """Return the cells of the named scenarios (or groups of them) and programs, in the order of the declaration.

    When none is named: all programs, all scenarios without a group.
    """
    wanted = [{name.strip() for name in names.split(",") if name.strip()} for names in (scenarios, programs)]
    groups = {scenario.group for scenario in catalogue.scenarios.values()} - {""}
    for names, known in zip(wanted, ([*catalogue.scenarios, *sorted(groups)], [*catalogue.software]), strict=True):
        if names - set(known):
            raise Unusable(f"there is no {', '.join(sorted(names - set(known)))}; there are: {', '.join(known)}")
    return [
        cell
        for scenario in catalogue.scenarios.values()
        if (wanted[0] & {scenario.name, scenario.group} if wanted[0] else not scenario.group)
        for cell in catalogue.cells(scenario)
        if not wanted[1] or cell.software.name in wanted[1]
    ]


def show(result: dict[str, object], console: Console) -> None:
    """Print the summary and the verdicts."""
    scenarios, rows, doubts = result["scenarios"], result["ratios"], result["caveats"]
    assert isinstance(scenarios, dict) and isinstance(rows, list) and isinstance(doubts, list)
    for one in scenarios.values():
        table = Table(title=f"{one['title']} ({one['detail']})", title_justify="left")
        table.add_column("program")
        for heading in ("us CPU/request", "min-max", "requests/s", "core", "MiB PSS", f"p99 us at {one['rate'] or '-'}/s"):
            table.add_column(heading, justify="right")
        for name, cell in one["cells"].items():
            if "reason" in cell:
                table.add_row(name, "-", cell["reason"])
                continue
            p99 = cell.get("fixed", {}).get("p99_us")
            table.add_row(
                *(name, f"{cell['median_us']:.2f}", f"{cell['min_us']:.2f}-{cell['max_us']:.2f}"),
                *(f"{cell['median_rps']:,.0f}", f"{cell['median_utilisation']:.0%}", f"{cell['pss_mib']:.1f}"),
                "-" if p99 is None else f"{p99:,.0f}",
            )
        console.print(table)
    for row in rows:
        bound = f"required <= {row['at_most']}" if row["at_most"] is not None else "for information"
        console.print(f"{row['title']}: {row['ratio']:.3f}  ({bound}): {row['verdict']}", highlight=False)
    for doubt in doubts:
        console.print(f"not quotable: {doubt}", style="yellow", highlight=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one short round of everything, under 5 minutes")
    parser.add_argument("--scenarios", default="", help="only these (or groups of them, such as tls), separated by commas")
    parser.add_argument("--programs", default="", help="only these, separated by commas")
    parser.add_argument("--rounds", type=int, help="rounds (default: as scenarios.yaml says; --quick: 1)")
    parser.add_argument("--seconds", type=int, help="length of a measured interval (default 2; --quick: 1)")
    parser.add_argument("--minutes", type=float, help="stop after this time (default 20; --quick: 4.5)")
    parser.add_argument("--name", default="", help="name of the result file (default: date and commit)")
    cores = sorted(os.sched_getaffinity(0))
    parser.add_argument("--proxy-core", type=int, default=cores[-1], help="core of the program (default %(default)s)")
    parser.add_argument("--load-core", type=int, default=cores[0], help="core of the load (default %(default)s)")
    return parser.parse_args(argv)


def planned(options: argparse.Namespace) -> Plan:
    """Return the plan that the options ask for."""
    base = QUICK if options.quick else FULL
    plan = replace(
        base,
        rounds=base.rounds if options.rounds is None else options.rounds,
        seconds=base.seconds if options.seconds is None else options.seconds,
        most=base.most if options.minutes is None else options.minutes * 60,
    )
    if plan.seconds < 1 or (plan.rounds is not None and plan.rounds < 1):
        raise Unusable("--rounds and --seconds are at least 1")
    if options.proxy_core == options.load_core:
        raise Unusable("the program and the load need a core each; this process may use only one")
    return plan


def run(options: argparse.Namespace, console: Console) -> int:
    """Do the whole benchmark; return 0 when something was measured."""
    plan, catalogue = planned(options), declared()
    chosen = choose(catalogue, options.scenarios, options.programs)
    streamed = any(cell.scenario.kind in STREAMED for cell in chosen)
    require_programs(["wrk", "taskset", "cc", *(("h2load", "nghttp") if streamed else ())])
    raise_descriptor_limit(65536)
    if not chosen:
        raise Unusable("no program takes part in these scenarios")
    with tempfile.TemporaryDirectory(prefix="crossway-bench-") as directory:
        bench = Bench(Path(directory), options.proxy_core, options.load_core)
        with ExitStack() as stack:
            origins = [stack.enter_context(bench.origin())]
            if any(cell.scenario.kind == "tls-upstream" for cell in chosen):
                origins.append(stack.enter_context(bench.secure_origin()))
            if any(cell.scenario.kind in STREAMED_UPSTREAM for cell in chosen):
                origins.append(stack.enter_context(bench.streamed_origin()))
            comparison = Comparison(bench, origins, catalogue, chosen, plan)
            programs = len({cell.software.name for cell in chosen})
            console.print(
                f"{len({cell.scenario.name for cell in chosen})} scenarios, {programs} programs: about "
                f"{comparison.estimate() / 60:.0f} minutes, and at most {plan.most / 60:g}. Leave the machine alone.",
                highlight=False,
            )
            if comparison.open_loop:
                console.print(f"no latency at a fixed rate: {comparison.open_loop}", style="yellow", highlight=False)
            comparison.run(lambda line: console.print(line, highlight=False))
    result = comparison.result()
    show(result, console)
    name = options.name or "-".join(filter(None, (str(result["date"])[:10], str(result["commit"]), str(result["group"]))))
    console.print(f"written: {write_result(name, result).relative_to(ROOT)}", highlight=False)
    return 0 if comparison.runs else 2


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 measured (the ratios may be missed: they are in the result), 2 the benchmark could not run."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: stop what was started, keep the result
    try:
        return run(parse(argv), console)
    except (Unusable, InvalidRun) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
