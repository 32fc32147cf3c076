"""What the figures of a load benchmark mean: runs, medians, ratios and verdicts.

Strategy: pure functions over plain data, so that the numbers the README quotes come from code with unit tests. A ratio is
taken inside a round, where both programs met the same machine, and the median is taken over the rounds' ratios.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, log10
from statistics import median
from typing import Any

from benchmarks.load.scenarios import BEST, Requirement

RESULT_PREFIX = "result "
# What h2load prints at its end.
H2LOAD = {
    "protocol": re.compile(r"^Application protocol: (\S+)$", re.MULTILINE),
    "seconds": re.compile(r"^finished in ([\d.]+)(us|ms|s), ", re.MULTILINE),
    "requests": re.compile(
        r"^requests: (\d+) total, (\d+) started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout$", re.MULTILINE
    ),
    "statuses": re.compile(r"^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx$", re.MULTILINE),
    "data": re.compile(r"^traffic: .* \((\d+)\) data$", re.MULTILINE),
}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
# A share of a core used by strangers. On the proxy's core they spoil its caches; on the load's core they starve wrk and the
# origin, so that the proxy finds fewer events in a batch and pays more for each.
FOREIGN_LIMIT = 0.03
# The kernel counts a process's time in ticks too; more than this between the two clocks means that one of them is wrong.
CLOCK_TOLERANCE = 0.05
# Medians over rounds survive a few disturbed runs, not many.
NOISY_SHARE = 0.1
# The fixed rate is at most this share of what the slowest program can carry, and of what the load's core can drive: the
# open loop shares that core with the origin, and pays for each request about twice what wrk does at saturation.
FIXED_SHARE = 0.5
LOAD_SHARE = 0.25
# Above this the load's core, not the program, may be what the latencies show.
RESUMED_SHARE = 0.9  # of the handshakes, where they should resume
LOAD_BUSY = 0.8
IDLE_WORKER_BYTES = 40 * 2**20
CONNECTION_BYTES = 8 * 2**10


class InvalidRun(Exception):
    """A run that must not be counted; the message says what went wrong and what the programs printed."""


@dataclass(frozen=True)
class Load:
    """What the load counted in one run: requests answered, seconds, errors by kind, latency in microseconds (0: it does not tell)."""

    requests: int
    seconds: float
    errors: Mapping[str, int]
    p50_us: int
    p99_us: int


@dataclass(frozen=True)
class Latency:
    """What the open-loop generator counted in its window: the program's CPU time per request, and latencies counted from the
    intended time of sending. A percentile that too few samples carry is None.
    """

    us_per_request: float
    p50_us: float | None
    p99_us: float | None
    p999_us: float | None


@dataclass(frozen=True)
class FixedRun:
    """One interval of one program at a fixed rate; `foreign` is the share of a core that other programs used meanwhile."""

    round: int
    rate: int
    us_per_request: float
    p50_us: float | None
    p99_us: float | None
    p999_us: float | None
    foreign: float = 0.0


@dataclass(frozen=True)
class Run:
    """One measured interval of one program. Times are seconds; `cpu` is that of its whole process tree.

    `load_cpu` is that of wrk and the origin together; the `busy` fields are what the kernel counted on the two cores. `pss`
    is the memory of the tree right after the load, in bytes. Percentiles are those of a closed loop at saturation. `pace_us`
    is what a fixed piece of work took on the program's core just before: on a shared host the processor itself is not steady.
    """

    round: int
    requests: int
    seconds: float
    cpu: float
    core_busy: float
    load_cpu: float
    load_busy: float
    steal: float
    processes: int
    p50_us: int
    p99_us: int
    pss: int = 0
    pace_us: float = 0.0

    @property
    def us_per_request(self) -> float:
        """CPU time of the process tree for one request, in microseconds."""
        return self.cpu / self.requests * 1e6

    @property
    def rps(self) -> float:
        """Answers each second of wall-clock time."""
        return self.requests / self.seconds

    @property
    def foreign(self) -> float:
        """The larger share, of the two cores, of the interval that went to programs outside the benchmark (0 to 1)."""
        return foreign_share(self.core_busy - self.cpu, self.load_busy - self.load_cpu, self.seconds)

    @property
    def utilisation(self) -> float:
        """The share of one core that the program used; near 1 means that the proxy was the bottleneck."""
        return self.cpu / self.seconds

    def as_json(self) -> dict[str, float]:
        """The run as it stands in a result file."""
        derived = {"us_per_request": self.us_per_request, "rps": self.rps, "foreign": self.foreign}
        return {key: round(value, 6) for key, value in {**asdict(self), **derived}.items()}


def read_wrk(output: str) -> Load:
    """Return what load.lua printed at the end of wrk's output.

    Raises InvalidRun when the line is missing, when any request failed or was answered with 400 or more, or when nothing
    was answered.
    """
    lines = [line for line in output.splitlines() if line.startswith(RESULT_PREFIX)]
    if len(lines) != 1:
        raise InvalidRun(f"wrk printed no result line; it said:\n{output}")
    counts: dict[str, int] = json.loads(lines[0].removeprefix(RESULT_PREFIX))
    errors = {kind: counts[kind] for kind in ("connect", "read", "write", "timeout", "status") if counts[kind]}
    if errors:
        told = ", ".join(f"{count} x {kind}" for kind, count in errors.items())
        raise InvalidRun(f"wrk counted errors ({told}) among {counts['requests']} answers")
    if not counts["requests"]:
        raise InvalidRun("wrk got no answer at all")
    return Load(counts["requests"], counts["microseconds"] / 1e6, errors, counts["p50_us"], counts["p99_us"])


def read_h2load(output: str, in_flight: int, answer: int, protocol: str) -> Load:
    """Return what h2load printed; `answer` is the length of each answer's body.

    Raises InvalidRun when a line is missing, when it spoke another protocol, when anything but a success came back, or when the bytes
    of the bodies are not those of as many whole answers. The end of the time cuts off up to `in_flight` requests.
    """
    found = {name: pattern.search(output) for name, pattern in H2LOAD.items()}
    spoken, seconds, requests, statuses, data = found.values()
    if spoken is None or seconds is None or requests is None or statuses is None or data is None:
        raise InvalidRun(f"h2load did not tell its {', '.join(name for name, match in found.items() if match is None)}; it said:\n{output}")
    if spoken[1] != protocol:
        raise InvalidRun(f"h2load spoke {spoken[1]}, not {protocol}")
    _, started, done, succeeded, *failures = map(int, requests.groups())
    wrong = dict(zip(("3xx", "4xx", "5xx"), map(int, statuses.groups()[1:]), strict=True))
    errors = {kind: count for kind, count in (*zip(("failed", "errored", "timeout"), failures, strict=True), *wrong.items()) if count}
    if errors or succeeded != done:
        told = ", ".join(f"{count} x {kind}" for kind, count in errors.items())
        raise InvalidRun(f"h2load counted errors ({told}) among {done} answers")
    if not done:
        raise InvalidRun("h2load got no answer at all")
    if started - done > in_flight or not done * answer <= int(data[1]) <= (done + in_flight) * answer:
        raise InvalidRun(f"h2load got {int(data[1])} bytes of bodies with {done} of {started} answers of {answer} bytes each")
    return Load(done, float(seconds[1]) * UNITS[seconds[2]], {}, 0, 0)


def read_bench(document: Mapping[str, Any]) -> Latency:
    """Return what a document of `crossway bench run --json` says; raise InvalidRun when it calls itself invalid."""
    try:
        if not document["valid"]:
            raise InvalidRun("; ".join(document["reasons"]) or "the generator gave no reason")
        percentiles = document["latency"]["percentiles"]
        p50, p99, p999 = (percentiles[name]["us"] for name in ("p50", "p99", "p99.9"))
        return Latency(float(document["result"]["server_us_per_request"]), p50, p99, p999)
    except (KeyError, TypeError) as error:
        raise InvalidRun(f"the result of `crossway bench run` has no {error}") from None


def read_handshakes(document: Mapping[str, Any], resumed: bool) -> Load:
    """Return what a closed loop of `crossway bench run --no-keepalive` says; raise InvalidRun when a request failed, or when
    sessions were resumed where they should not be, or were not where they should.

    That the generator used its whole core makes no difference: what a handshake costs the program is measured, not latency.
    """
    result, latency = document["result"], document["latency"]
    made, again = result["tls"]["handshakes"], result["tls"]["resumed"]
    if result["errors_total"] or result["tls"]["failures"] or not result["answered"]:
        raise InvalidRun(f"`crossway bench run` counted errors: {result['errors']} {result['tls']['failures']}")
    if (resumed and again < RESUMED_SHARE * made) or (not resumed and again):
        raise InvalidRun(f"{again:,} of {made:,} handshakes resumed a session")
    p50, p99 = (latency["percentiles"][name]["us"] or latency["max"] for name in ("p50", "p99"))
    return Load(result["answered"], document["config"]["duration_s"], {}, p50, p99)


def fixed_rate(cells: Iterable[Sequence[Run]]) -> int:
    """Return one rate below everyone's saturation, the load's included, rounded down to two digits; 0 when there is none."""
    measured = [runs for runs in cells if runs]
    carried = min((median(run.rps for run in runs) for runs in measured), default=0.0)
    driven = min((median(run.requests / run.load_cpu for run in runs) for runs in measured), default=0.0)
    lowest = min(carried * FIXED_SHARE, driven * LOAD_SHARE)
    if lowest < 1:
        return 0
    step: int = 10 ** max(0, floor(log10(lowest)) - 1)
    return int(lowest // step) * step


def foreign_share(core: float, load: float, seconds: float) -> float:
    """Return the larger of two cores' seconds that went to programs outside the benchmark, as a share of the interval."""
    return max(0.0, core, load) / seconds


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return the CPU seconds that a process tree used between two readings, by process id.

    A process that started meanwhile counts from zero. Raises InvalidRun when one of the tree is gone: its time is lost.
    """
    gone = before.keys() - after.keys()
    if gone:
        raise InvalidRun(f"process {', '.join(map(str, sorted(gone)))} of the proxy ended during the run")
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def require_agreement(cpu: float, ticks: float, processes: int) -> None:
    """Raise InvalidRun when the nanosecond clock and the tick counters of a tree disagree beyond their resolution."""
    if abs(cpu - ticks) > max(CLOCK_TOLERANCE * cpu, 0.03 * processes):
        raise InvalidRun(f"two clocks disagree: {cpu:.3f} s by the CPU clock, {ticks:.3f} s by utime+stime")


def ratios(over: Iterable[Run], under: Iterable[Run]) -> list[float]:
    """Return CPU per request of `over` divided by that of `under`, one for each round that both have."""
    base = {run.round: run.us_per_request for run in under}
    return [run.us_per_request / base[run.round] for run in over if run.round in base]


def verdict(value: float, at_most: float | None) -> str:
    """Return 'met', 'missed', or '-' where nothing is required. A value equal to the bound meets it."""
    if at_most is None:
        return "-"
    return "met" if value <= at_most else "missed"


def middle(values: Iterable[float | None], digits: int = 1) -> float | None:
    """Return the median of the values that there are; None when there is none."""
    known = [value for value in values if value is not None]
    return round(median(known), digits) if known else None


def summarise(runs: Sequence[Run]) -> dict[str, object]:
    """Return the medians and the ranges of one cell at saturation, with its runs, as they stand in a result file."""
    costs, rates = [run.us_per_request for run in runs], [run.rps for run in runs]
    return {
        "median_us": round(median(costs), 3),
        "min_us": round(min(costs), 3),
        "max_us": round(max(costs), 3),
        "median_rps": round(median(rates), 1),
        "min_rps": round(min(rates), 1),
        "max_rps": round(max(rates), 1),
        "median_utilisation": round(median(run.utilisation for run in runs), 3),
        "pss_mib": round(median(run.pss for run in runs) / 2**20, 2),
        "processes": max(run.processes for run in runs),
        "runs": [run.as_json() for run in runs],
    }


def summarise_fixed(runs: Sequence[FixedRun]) -> dict[str, object]:
    """Return the medians of one cell at the fixed rate, with its runs, as they stand in a result file."""
    p99s = [run.p99_us for run in runs if run.p99_us is not None]
    return {
        "rate": runs[-1].rate,
        "us_per_request": middle(run.us_per_request for run in runs),
        "p50_us": middle(run.p50_us for run in runs),
        "p99_us": middle(p99s),
        "p999_us": middle(run.p999_us for run in runs),
        "p99_range_us": [round(min(p99s), 1), round(max(p99s), 1)] if p99s else None,
        "runs": [asdict(run) for run in runs],
    }


def cpu_ratios(requirement: Requirement, runs: Mapping[str, Sequence[Run]]) -> list[float]:
    """Return the ratios of CPU time per request, one for each round that both cells have."""
    return ratios(runs.get(requirement.of, ()), runs.get(requirement.to, ()))


def p99_ratios(requirement: Requirement, fixed: Mapping[str, Sequence[FixedRun]]) -> list[float]:
    """Return the one ratio of median p99 at the fixed rate; `SCENARIO/best` is the best of the other HTTP programs.

    Two programs are compared over the rounds that both have: one that lost a bad round must not look better for it.
    """
    known = {name: {run.round: run.p99_us for run in runs if run.p99_us} for name, runs in fixed.items()}
    scenario, _, program = requirement.to.partition("/")
    outside = {requirement.of, f"{scenario}/passthrough"}
    others = [name for name in known if name.startswith(f"{scenario}/") and name not in outside]
    if program != BEST:
        others = [requirement.to]
    ours, found = known.get(requirement.of, {}), []
    for name in others:
        theirs = known.get(name, {})
        if both := ours.keys() & theirs.keys():
            found.append(median(ours[number] for number in both) / median(theirs[number] for number in both))
    return [max(found)] if found else []


def judge(
    requirements: Iterable[Requirement], runs: Mapping[str, Sequence[Run]], fixed: Mapping[str, Sequence[FixedRun]]
) -> list[dict[str, object]]:
    """Return one row for each requirement whose two cells were both measured."""
    rows: list[dict[str, object]] = []
    for requirement in requirements:
        found = p99_ratios(requirement, fixed) if requirement.figure == "p99" else cpu_ratios(requirement, runs)
        if not found:
            continue
        value = median(found)
        rows.append(
            asdict(requirement)
            | {
                "title": requirement.title,
                "ratio": round(value, 4),
                "per_round": [round(ratio, 4) for ratio in found],
                "verdict": verdict(value, requirement.at_most),
            }
        )
    return rows


def listed(names: Sequence[str]) -> str:
    """Return a count of cells with the first names."""
    return f"{len(names)} cell{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def disturbed(runs: Mapping[str, Sequence[Run | FixedRun]]) -> list[str]:
    """Return the cells that other programs disturbed so often that a median does not help: in half of the runs or more."""
    return [name for name, each in runs.items() if each and sum(run.foreign > FOREIGN_LIMIT for run in each) * 2 >= len(each)]


def caveats(
    runs: Mapping[str, Sequence[Run]], fixed: Mapping[str, Sequence[FixedRun]], due: Mapping[str, int], clean_tree: bool
) -> list[str]:
    """Return why these figures must not be quoted, one sentence each; an empty list means that they may.

    `due` is how many rounds each measured cell should have.
    """
    found: list[str] = []
    if short := sorted(name for name, rounds in due.items() if len(runs.get(name, ())) < rounds):
        found.append(f"{listed(short)} with fewer rounds than scenarios.yaml asks for")
    every = [run for of_one in runs.values() for run in of_one]
    noisy = sum(run.foreign > FOREIGN_LIMIT for run in every)
    if noisy > NOISY_SHARE * len(every):
        found.append(f"in {noisy} of {len(every)} runs other programs used more than {FOREIGN_LIMIT:.0%} of a core")
    elif cells := disturbed(runs):
        found.append(f"other programs used more than {FOREIGN_LIMIT:.0%} of a core in half of the runs of {listed(cells)}")
    if cells := disturbed(fixed):
        found.append(f"at the fixed rate, other programs used more than {FOREIGN_LIMIT:.0%} in half of the runs of {listed(cells)}")
    stolen = median([run.steal / run.seconds for run in every]) if every else 0.0
    if stolen > FOREIGN_LIMIT:
        found.append(f"the hypervisor took {stolen:.0%} of the proxy's core")
    if not clean_tree:
        found.append("the working tree had changes that are not in the commit")
    return found


def memory_row(
    count: int,
    idle: Mapping[str, int],
    base: Mapping[str, int],
    silent: Mapping[str, int],
    served: Mapping[str, int],
    after: Mapping[str, int],
) -> dict[str, object]:
    """Return the memory figures of one program from five readings of its worker, in bytes, and judge them.

    `idle` is before any request, `base` after a warm-up, `silent` with `count` connections that said nothing, `served` with
    the same connections after one request each, `after` when they are closed.
    """
    per_silent = (silent["pss"] - base["pss"]) / count
    per_served = (served["pss"] - base["pss"]) / count
    return {
        "idle_pss_mib": round(idle["pss"] / 2**20, 2),
        "idle_rss_mib": round(idle["rss"] / 2**20, 2),
        "idle_uss_mib": round(idle["uss"] / 2**20, 2),
        "warm_pss_mib": round(base["pss"] / 2**20, 2),
        "connections": count,
        "silent_kib": round(per_silent / 1024, 3),
        "served_kib": round(per_served / 1024, 3),
        "closed_pss_mib": round(after["pss"] / 2**20, 2),
        "idle_verdict": verdict(idle["pss"], IDLE_WORKER_BYTES),
        "connection_verdict": verdict(max(per_silent, per_served), CONNECTION_BYTES),
    }
