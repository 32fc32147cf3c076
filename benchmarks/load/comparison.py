"""One comparison under way: every cell visited round by round, what was measured, and what could not be.

Strategy: a visit starts one program, proves once that it does the scenario's work, saturates it and, in a scenario's
last rounds, measures it at the fixed rate. A fault is noted and the visit tried once more; nothing a program does ends the
whole, and neither an interrupt nor the end of the time loses what was measured before.
"""

import http.client
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TypeVar

from rich.markup import escape

from benchmarks.load import machine
from benchmarks.load.arithmetic import (
    FOREIGN_LIMIT,
    LOAD_BUSY,
    FixedRun,
    InvalidRun,
    Run,
    caveats,
    fixed_rate,
    foreign_share,
    judge,
    require_agreement,
    spent,
    summarise,
    summarise_fixed,
)
from benchmarks.load.loads import bench_run, open_loop_missing, saturate, warm
from benchmarks.load.processes import Program, Unusable, core_times, cpu_clocks, pss, tick_clocks, tree
from benchmarks.load.programs import Bench, missing
from benchmarks.load.results import FORMAT
from benchmarks.load.scenarios import STREAMED, Catalogue, Cell, Scenario, configuration_hash

START = 0.3  # seconds that a start and a stop take, for the estimate
PROOFS = {"plain": 0, "routes": 1, "token": 2, "tls": 0, "tls-upstream": 0, **dict.fromkeys(STREAMED, 0)}  # starts that prove a cell
GENERATOR_START = 0.5
ATTEMPTS = 2  # at one visit
REPEATS = 2  # of an interval that other programs disturbed
QUICK_LATENCY = ("plain", "token")  # with one round the rate is known only after it: these start once more
FAULTS = (Unusable, InvalidRun, OSError, subprocess.SubprocessError, http.client.HTTPException)


@dataclass(frozen=True)
class Plan:
    """How long and how often. `seconds` is whole: wrk counts in them. `most` bounds the whole run in seconds, and `spare` the
    part of it that repeating disturbed intervals may take.
    """

    rounds: int | None  # None: as scenarios.yaml says
    seconds: int
    warm_up: float
    fixed_seconds: float
    fixed_warm_up: float
    most: float
    spare: float

    def due(self, scenario: Scenario) -> int:
        """Return how many rounds the scenario gets."""
        return scenario.rounds if self.rounds is None else self.rounds

    def measures_latency(self, scenario: Scenario, number: int) -> bool:
        """True when this round is one of the scenario's last ones that also run at the fixed rate; never the first."""
        return number > max(1, self.due(scenario) - scenario.latency)

    def afterwards(self, scenario: Scenario) -> bool:
        """True when latency takes a start of its own after the only round."""
        return self.due(scenario) == 1 and scenario.name in QUICK_LATENCY


FULL = Plan(rounds=None, seconds=2, warm_up=0.5, fixed_seconds=2, fixed_warm_up=0.5, most=19 * 60, spare=120)
QUICK = Plan(rounds=1, seconds=1, warm_up=0.5, fixed_seconds=2, fixed_warm_up=0.5, most=4.5 * 60, spare=20)
Interval = TypeVar("Interval", Run, FixedRun)


class Reading:
    """What the clocks of one proxy, of the load and of the two cores say at one moment."""

    def __init__(self, bench: Bench, proxy: Program, origins: Sequence[Program]) -> None:
        self.pids = tree(proxy.pid)
        self.at = time.monotonic()
        self.ticks, self.clocks = tick_clocks(self.pids), cpu_clocks(self.pids)
        self.origin = cpu_clocks([pid for origin in origins for pid in tree(origin.pid)])
        self.load = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        self.core_busy, self.stolen = core_times(bench.proxy_core)
        self.load_busy, _ = core_times(bench.load_core)

    def load_since(self, before: "Reading") -> float:
        """Return the CPU seconds of the load and the origin between two readings."""
        return spent(before.origin, self.origin) + self.load - before.load

    def foreign_since(self, before: "Reading") -> float:
        """Return the share of a core that programs outside the benchmark used between two readings."""
        core = self.core_busy - before.core_busy - spent(before.clocks, self.clocks)
        return foreign_share(core, self.load_busy - before.load_busy - self.load_since(before), self.at - before.at)


class Comparison:
    """One benchmark under way: what was measured so far, and what could not be."""

    def __init__(
        self, bench: Bench, origins: Sequence[Program], catalogue: Catalogue, chosen: list[Cell], plan: Plan
    ) -> None:
        self.bench, self.origins, self.catalogue, self.plan = bench, origins, catalogue, plan
        self.chosen = chosen
        self.runs: dict[str, list[Run]] = {}
        self.fixed: dict[str, list[FixedRun]] = {}
        self.rates: dict[str, int] = {}
        self.failures: Counter[str] = Counter()
        self.unstarted: Counter[str] = Counter()
        self.started: set[str] = set()
        self.reasons = {cell.name: cell.reason or missing(cell.software.name) for cell in chosen}
        self.no_latency = {cell.name: "" for cell in chosen}
        self.proven: set[str] = set()
        self.open_loop = open_loop_missing()
        self.ended = ""
        self.spare = plan.spare
        self.repeated = 0

    def visits(self) -> Iterator[tuple[int, Cell, bool, bool]]:
        """Yield (round, cell, whether to saturate, whether to measure at the fixed rate) in their order."""
        scenarios = list(dict.fromkeys(cell.scenario for cell in self.chosen))
        for number in range(1, 1 + max(self.plan.due(scenario) for scenario in scenarios)):
            for cell in self.chosen:
                if number <= self.plan.due(cell.scenario):
                    yield number, cell, True, self.plan.measures_latency(cell.scenario, number)
        for cell in self.chosen:
            if self.plan.afterwards(cell.scenario):
                yield 1, cell, False, True

    def estimate(self) -> float:
        """Return how many seconds the visits take when nothing fails."""
        total = 0.0
        fixed_seconds = GENERATOR_START + self.plan.fixed_warm_up + self.plan.fixed_seconds
        for number, cell, saturates, fixed in self.visits():
            if not self.reasons[cell.name]:
                total += START + saturates * (self.plan.warm_up + self.plan.seconds + cell.scenario.handshakes * GENERATOR_START)
                total += (number == 1 and saturates) * PROOFS[cell.scenario.kind] * START
                total += (fixed and not self.open_loop) * fixed_seconds
        return total

    def run(self, say: Callable[[str], None]) -> None:
        """Visit everything, until done, interrupted, or out of time."""
        deadline = time.monotonic() + self.plan.most
        try:
            for number, cell, saturates, fixed in self.visits():
                if self.reasons[cell.name] or (not saturates and self.open_loop):
                    continue
                if time.monotonic() > deadline:
                    self.ended = f"the {self.plan.most / 60:g} minutes ended in round {number}, at {cell.name}"
                    break
                self.visit(number, cell, saturates, fixed, say)
        except KeyboardInterrupt:
            self.ended = "interrupted"
        if self.ended:
            say(f"stopped: {self.ended}")

    def visit(self, number: int, cell: Cell, saturates: bool, fixed: bool, say: Callable[[str], None]) -> None:
        """Measure one cell, twice if need be: a fault is noted, and the second one in a row ends this visit."""
        for attempt in range(ATTEMPTS):
            try:
                self.measure(number, cell, saturates, fixed, say)
                return
            except FAULTS as error:
                say(f"[yellow]round {number}  {cell.name}: {escape(str(error))}[/]")
                self.failures[cell.name] += 1
                reason = str(error).splitlines()[0][:200]
                if isinstance(error, Unusable) and self.gives_up(cell, reason):
                    return
                if attempt == ATTEMPTS - 1 and not self.runs.get(cell.name):
                    self.reasons[cell.name] = reason

    def gives_up(self, cell: Cell, reason: str) -> bool:
        """True when the program never ran and has failed too often: waiting for it would cost the others their time."""
        name = cell.software.name
        self.unstarted[name] += 1
        if name in self.started or self.unstarted[name] <= ATTEMPTS:
            return False
        for other in self.chosen:
            if other.software.name == name and not self.reasons[other.name]:
                self.reasons[other.name] = reason
        return True

    def measure(self, number: int, cell: Cell, saturates: bool, fixed: bool, say: Callable[[str], None]) -> None:
        """Start one cell's program and measure it."""
        if cell.name not in self.proven:
            self.bench.prove(cell)
            self.proven.add(cell.name)
        with self.bench.proxy(cell) as (started, port):
            self.started.add(cell.software.name)
            if saturates:
                run = self.undisturbed(lambda: self.saturate(number, cell, started, port))
                self.runs.setdefault(cell.name, []).append(run)
                say(told(number, cell, run))
            if fixed:
                self.at_fixed_rate(number, cell, started, port, say)

    def undisturbed(self, take: Callable[[], Interval]) -> Interval:
        """Return an interval; while there is spare time, one that other programs disturbed is taken again. The least
        disturbed stays: what decides is what others did, never the figure itself.
        """
        found = take()
        for _ in range(REPEATS):
            if found.foreign <= FOREIGN_LIMIT or self.spare <= 0:
                break
            began = time.monotonic()
            self.repeated += 1
            with suppress(InvalidRun):
                found = min(found, take(), key=lambda one: one.foreign)
            self.spare -= time.monotonic() - began
        return found

    def saturate(self, number: int, cell: Cell, started: Program, port: int) -> Run:
        """Warm the program and measure one interval under as much as the load can give."""
        bench, scenario = self.bench, cell.scenario
        pace = machine.pace(bench.proxy_core)
        warm(bench, scenario, port, self.plan.warm_up)
        before = Reading(bench, started, self.origins)
        load = saturate(bench, scenario, port, self.plan.seconds)
        after = Reading(bench, started, self.origins)
        cpu = spent(before.clocks, after.clocks)
        require_agreement(cpu, spent(before.ticks, after.ticks), len(after.clocks))
        return Run(
            round=number,
            requests=load.requests,
            # The start of an interpreter is no part of the load.
            seconds=load.seconds if scenario.handshakes else after.at - before.at,
            cpu=cpu,
            core_busy=after.core_busy - before.core_busy,
            load_cpu=after.load_since(before),
            load_busy=after.load_busy - before.load_busy,
            steal=after.stolen - before.stolen,
            processes=len(after.clocks),
            p50_us=load.p50_us,
            p99_us=load.p99_us,
            pss=pss(after.pids),
            pace_us=pace,
        )

    def rate_of(self, scenario: Scenario) -> int:
        """Return the scenario's fixed rate, decided once, when every program has been saturated at least once."""
        if scenario.name not in self.rates:
            self.rates[scenario.name] = fixed_rate(self.runs.get(cell.name, ()) for cell in self.catalogue.cells(scenario))
        return self.rates[scenario.name]

    def at_fixed_rate(self, number: int, cell: Cell, started: Program, port: int, say: Callable[[str], None]) -> None:
        """Measure latency and CPU time at the scenario's fixed rate; why it failed is kept beside the cell."""
        rate = self.rate_of(cell.scenario)
        if self.open_loop or not rate:
            self.no_latency[cell.name] = self.open_loop or "no program could be saturated"
            return
        for _ in range(ATTEMPTS):
            try:
                run = self.undisturbed(lambda: self.open_loop_run(number, cell, started, port, rate))
                break
            except (InvalidRun, subprocess.SubprocessError) as error:
                self.no_latency[cell.name] = f"at {rate}/s: {str(error).splitlines()[0][:200]}"
                say(f"[yellow]round {number}  {cell.name}: {escape(self.no_latency[cell.name])}[/]")
        else:
            return
        self.fixed.setdefault(cell.name, []).append(run)
        p99 = f"{run.p99_us:,.0f} us" if run.p99_us is not None else "-"
        say(f"round {number}  {cell.name:<24} {run.us_per_request:8.2f} us/request at {rate:,}/s, p99 {p99}{others(run)}")

    def open_loop_run(self, number: int, cell: Cell, started: Program, port: int, rate: int) -> FixedRun:
        """Measure one interval at a fixed rate; raise InvalidRun when the generator says that it is not valid."""
        before = Reading(self.bench, started, self.origins)
        length = (self.plan.fixed_seconds, self.plan.fixed_warm_up)
        latency = bench_run(self.bench, cell.scenario, started, port, rate, *length)
        after = Reading(self.bench, started, self.origins)
        busy = after.load_since(before) / (after.at - before.at)
        if busy > LOAD_BUSY:
            raise InvalidRun(f"load and origin used {busy:.0%} of their core, {LOAD_BUSY:.0%} is the most: they may be what was measured")
        return FixedRun(number, rate, **asdict(latency), foreign=round(after.foreign_since(before), 6))

    def cell_result(self, cell: Cell) -> dict[str, object]:
        """Return the cell as it stands in a result file: figures, or the reason why there are none."""
        runs, fixed = self.runs.get(cell.name), self.fixed.get(cell.name)
        if not runs:
            return {"reason": self.reasons[cell.name] or self.ended or "not measured"}
        result = summarise(runs)
        if fixed:
            result["fixed"] = summarise_fixed(fixed)
        elif cell.scenario.latency:
            result["fixed"] = {"reason": self.no_latency[cell.name] or self.ended or "not part of this run"}
        if self.failures[cell.name]:
            result["failures"] = self.failures[cell.name]
        return result

    def result(self) -> dict[str, object]:
        """Return everything measured, for the result file."""
        facts = machine.facts()
        usable = [cell for cell in self.chosen if not (cell.reason or missing(cell.software.name))]
        doubts = caveats(self.runs, self.fixed, {cell.name: cell.scenario.rounds for cell in usable}, bool(facts["clean_tree"]))
        scenarios = dict.fromkeys(cell.scenario for cell in self.chosen)
        groups = {scenario.group for scenario in scenarios}
        paces = [run.pace_us for runs in self.runs.values() for run in runs]
        return facts | {
            "format": FORMAT,
            "group": groups.pop() if len(groups) == 1 else "",
            "options": {
                "rounds": self.plan.rounds,
                "seconds": self.plan.seconds,
                "warm_up": self.plan.warm_up,
                "fixed_seconds": self.plan.fixed_seconds,
                "fixed_warm_up": self.plan.fixed_warm_up,
                "proxy_core": self.bench.proxy_core,
                "load_core": self.bench.load_core,
            },
            "programs": {cell.software.name: cell.software.title for cell in self.chosen},
            "configurations": {cell.template.name: configuration_hash(cell.template) for cell in usable},
            "scenarios": {
                scenario.name: {
                    "title": scenario.title,
                    "detail": scenario.detail,
                    "connections": scenario.connections,
                    "rounds": self.plan.due(scenario),
                    "rate": self.rates.get(scenario.name),
                    "cells": {
                        cell.software.name: self.cell_result(cell) for cell in self.chosen if cell.scenario == scenario
                    },
                }
                for scenario in scenarios
            },
            "ratios": judge(self.catalogue.requirements, self.runs, self.fixed),
            "repeated": self.repeated,
            "pace_us": {"best": round(min(paces, default=0.0), 1), "worst": round(max(paces, default=0.0), 1)},
            "caveats": [*([self.ended] if self.ended else []), *doubts],
        }


def others(run: Run | FixedRun) -> str:
    """Return what is added to a line when other programs disturbed the interval."""
    return f"  [yellow]others {run.foreign:.0%}[/]" if run.foreign > FOREIGN_LIMIT else ""


def told(number: int, cell: Cell, run: Run) -> str:
    """Return the line that is printed when a run ends."""
    return (
        f"round {number}  {cell.name:<24} {run.us_per_request:8.2f} us/request  {run.rps:9,.0f} requests/s"
        f"  core {run.utilisation:4.0%}  {run.pss / 2**20:6.1f} MiB{others(run)}"
    )
