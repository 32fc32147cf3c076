"""Measure CPU time per proxied request: Crossway, HAProxy, nginx and a byte pass-through, side by side.

Strategy: the proxy has one core, wrk and the origin the other. Each round runs every scenario once, from a fresh start, so
that a slow minute of the machine meets all of them; the CPU time is that of the program's whole process tree. A run with a
single error is no run: it ends the benchmark instead of entering a median.

    python -m benchmarks.load.compare --rounds 5 --seconds 5
    python -m benchmarks.load.compare --rounds 2 --seconds 2 --only haproxy,nginx
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.load import machine
from benchmarks.load.arithmetic import (
    FOREIGN_LIMIT,
    InvalidRun,
    Load,
    Run,
    caveats,
    judge,
    read_wrk,
    require_agreement,
    spent,
    summarise,
)
from benchmarks.load.processes import (
    Program,
    Unusable,
    core_times,
    cpu_clocks,
    program,
    raise_descriptor_limit,
    require_programs,
    tick_clocks,
    tree,
)
from benchmarks.load.scenarios import (
    BY_NAME,
    HERE,
    PATH,
    PAYMENT,
    ROOT,
    SCENARIOS,
    Bench,
    Scenario,
    configuration_hash,
    template_path,
)

RESULTS = ROOT / "benchmarks" / "results"
CONNECTIONS = 64
FORMAT = 1


def wrk(bench: Bench, scenario: Scenario, port: int, seconds: float) -> Load:
    """Load the program for some seconds from one thread; raise InvalidRun when anything but a success came back."""
    command = [
        *(program("taskset"), "-c", str(bench.load_core), program("wrk")),
        *("-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(HERE / "load.lua")),
        *(f"http://127.0.0.1:{port}{PATH}", "--"),
        *(("POST", PAYMENT, bench.token) if scenario.posts else ("GET",)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
    if done.returncode:
        raise InvalidRun(f"wrk ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return read_wrk(done.stdout)


class Reading:
    """What the clocks of one proxy, of the load and of the two cores say at one moment."""

    def __init__(self, bench: Bench, proxy: Program, origin: Program) -> None:
        pids = tree(proxy.pid)
        self.at = time.monotonic()
        self.ticks, self.clocks = tick_clocks(pids), cpu_clocks(pids)
        self.origin = cpu_clocks(tree(origin.pid))
        self.wrk = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        self.core_busy, self.stolen = core_times(bench.proxy_core)
        self.load_busy, _ = core_times(bench.load_core)


def measure(bench: Bench, origin: Program, scenario: Scenario, number: int, seconds: float, warm_up: float) -> Run:
    """Start the program, warm it, and measure one interval."""
    with bench.proxy(scenario) as (started, port):
        try:
            wrk(bench, scenario, port, warm_up)
            before = Reading(bench, started, origin)
            load = wrk(bench, scenario, port, seconds)
            after = Reading(bench, started, origin)
            cpu = spent(before.clocks, after.clocks)
            require_agreement(cpu, spent(before.ticks, after.ticks), len(after.clocks))
        except InvalidRun as error:
            raise InvalidRun(f"{scenario.name}, round {number}: {error}\n{started.tail()}") from None
    return Run(
        round=number,
        requests=load.requests,
        seconds=after.at - before.at,
        cpu=cpu,
        core_busy=after.core_busy - before.core_busy,
        load_cpu=spent(before.origin, after.origin) + after.wrk - before.wrk,
        load_busy=after.load_busy - before.load_busy,
        steal=after.stolen - before.stolen,
        processes=len(after.clocks),
        p50_us=load.p50_us,
        p99_us=load.p99_us,
    )


def all_rounds(
    bench: Bench, origin: Program, chosen: list[Scenario], options: argparse.Namespace, console: Console
) -> dict[str, list[Run]]:
    """Run the scenarios round by round, each once a round, and print each run as it ends."""
    runs: dict[str, list[Run]] = {scenario.name: [] for scenario in chosen}
    for number in range(1, options.rounds + 1):
        for scenario in chosen:
            run = measure(bench, origin, scenario, number, options.seconds, options.warm_up)
            runs[scenario.name].append(run)
            console.print(
                f"round {number}  {scenario.name:<20} {run.us_per_request:7.2f} us/request  {run.rps:9,.0f} requests/s"
                f"  core {run.utilisation:4.0%}",
                f"[yellow]others {run.foreign:.0%}[/]" if run.foreign > FOREIGN_LIMIT else "",
                highlight=False,
            )
    return runs


def choose(names: str) -> list[Scenario]:
    """Return the scenarios named in --only, in the order of the table; all when it is empty."""
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = wanted - BY_NAME.keys()
    if unknown:
        raise Unusable(f"--only names {', '.join(sorted(unknown))}; there are: {', '.join(BY_NAME)}")
    return [scenario for scenario in SCENARIOS if not wanted or scenario.name in wanted]


def show(result: dict[str, object], console: Console) -> None:
    """Print the summary and the verdicts."""
    scenarios, rows, doubts = result["scenarios"], result["ratios"], result["caveats"]
    assert isinstance(scenarios, dict) and isinstance(rows, list) and isinstance(doubts, list)
    table = Table(title=f"CPU time per request, {result['date']}, commit {result['commit']}")
    for heading in ("scenario", "us/request", "min-max", "requests/s", "core", "processes"):
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    for name, one in scenarios.items():
        spread = f"{one['min_us']:.2f}-{one['max_us']:.2f}"
        core = f"{one['median_utilisation']:.0%}"
        table.add_row(name, f"{one['median_us']:.2f}", spread, f"{one['median_rps']:,.0f}", core, str(one["processes"]))
    console.print(table)
    for row in rows:
        bound = f"required <= {row['required']}" if row["required"] is not None else "for information"
        aim = f", aim <= {row['aim']}" if row["aim"] is not None else ""
        console.print(
            f"{row['scenario']} / {row['against']}: {row['ratio']:.3f}  ({bound}{aim}): {row['verdict']}",
            highlight=False,
        )
    for doubt in doubts:
        console.print(f"not quotable: {doubt}", style="yellow", highlight=False)


def write_result(name: str, result: dict[str, object]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.compare", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each runs every scenario once (default 5)")
    parser.add_argument("--seconds", type=float, default=5, help="length of a measured interval (default 5)")
    parser.add_argument("--warm-up", type=float, default=1, help="seconds of load before it (default 1)")
    parser.add_argument("--only", default="", help="scenarios, separated by commas: " + ", ".join(BY_NAME))
    parser.add_argument("--name", default="", help="name of the result file (default: date and commit)")
    parser.add_argument("--proxy-core", type=int, default=1, help="core of the program under test (default 1)")
    parser.add_argument("--load-core", type=int, default=0, help="core of wrk and the origin (default 0)")
    parser.add_argument(
        "--no-proof", action="store_true", help="skip the proof that guarded programs refuse what they must"
    )
    return parser.parse_args(argv)


def run(options: argparse.Namespace, console: Console) -> int:
    """Do the whole benchmark; return 0, or 1 when a required ratio was missed."""
    chosen = choose(options.only)
    if options.rounds < 1 or options.seconds < 1 or options.warm_up < 1:
        raise Unusable("--rounds, --seconds and --warm-up are at least 1: wrk counts in whole seconds")
    require_programs(["wrk", "nginx", "taskset", *{one.program for one in chosen} & {"haproxy"}])
    if any(one.program == "passthrough" for one in chosen):
        require_programs(["cc"])
    raise_descriptor_limit(65536)
    facts = machine.facts()
    with tempfile.TemporaryDirectory(prefix="crossway-bench-") as directory:
        bench = Bench(Path(directory), options.proxy_core, options.load_core)
        with bench.origin() as origin:
            for scenario in chosen:
                if scenario.guarded and not options.no_proof:
                    bench.prove_guard(scenario)
                    console.print(f"{scenario.name} refuses bad tokens and limits", style="dim", highlight=False)
            runs = all_rounds(bench, origin, chosen, options, console)
    result = facts | {
        "format": FORMAT,
        "options": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "warm_up": options.warm_up,
            "connections": CONNECTIONS,
            "proxy_core": options.proxy_core,
            "load_core": options.load_core,
        },
        "configurations": {one.template: configuration_hash(template_path(one)) for one in chosen},
        "scenarios": {
            one.name: {"title": one.title, "group": one.group, "baseline": one.baseline} | summarise(runs[one.name])
            for one in chosen
        },
        "ratios": judge(runs),
        "caveats": caveats(runs, bool(facts["clean_tree"])),
    }
    show(result, console)
    name = options.name or f"{str(facts['date'])[:10]}-{facts['commit']}"
    console.print(f"written: {write_result(name, result).relative_to(ROOT)}", highlight=False)
    return int(any(row["verdict"] == "missed" for row in judge(runs)))


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 done, 1 a required ratio was missed, 2 the benchmark could not run or a run was invalid."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        return run(parse(argv), console)
    except (Unusable, InvalidRun) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
