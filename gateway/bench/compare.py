"""Two runs beside each other, and the rules that decide whether the second is worse than it may be.

Strategy: a rule is METRIC, a comparison, a limit: `p99>+5%` is a change from A to B, `p99>5ms` is B alone. A metric that one
of the runs cannot give fails the rule: a gate that cannot see must not say yes.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from gateway.bench.percentiles import PERCENTILES, duration
from gateway.bench.runner import Document
from gateway.bench.settings import UNITS, UsageError

METRICS = (*PERCENTILES, "max", "rate", "cpu", "errors")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
RULE = re.compile(r"\s*(?P<metric>[a-z0-9.]+)\s*(?P<how>>=|<=|>|<)\s*(?P<sign>[+-]?)(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|us|ms|s|)\s*")


def metric(document: Document, name: str) -> float | None:
    """A run's metric: microseconds, a rate a second, microseconds of the server's CPU a request, or the share of errors."""
    if name in PERCENTILES:
        value = document["latency"]["percentiles"][name]["us"]
    elif name == "max":
        value = document["latency"]["max"]
    elif name == "rate":
        value = document["result"]["achieved_rate"]
    elif name == "cpu":
        value = document["result"]["server_us_per_request"]
    else:
        value = document["result"]["errors_share"] * 100
    return None if value is None else float(value)


def shown(name: str, value: float | None) -> str:
    """A metric's value for people."""
    if value is None:
        return "not measured" if name == "cpu" else "too few samples"
    if name == "rate":
        return f"{value:,.1f}/s"
    return f"{value:.4g} %" if name == "errors" else duration(value)


@dataclass(frozen=True, slots=True)
class Rule:
    """One --fail-if: it fails when the comparison is true."""

    text: str
    metric: str
    comparison: str
    relative: bool  # a change from A to B, else B's own value
    percent: bool
    limit: float  # %, us, a second

    @classmethod
    def read(cls, text: str) -> Rule:
        match = RULE.fullmatch(text)
        if match is None or match["metric"] not in METRICS:
            raise UsageError(f"{text!r} is not a rule such as 'p99>+5%' or 'p99>5ms'; metrics: {', '.join(METRICS)}")
        unit, relative, name = match["unit"], bool(match["sign"]), match["metric"]
        timed = name not in ("rate", "errors")
        if timed and unit == "":
            raise UsageError(f"{text!r}: {name} is a time; write a limit such as 5ms, or a change such as +5%")
        if not timed and unit in UNITS:
            raise UsageError(f"{text!r}: {name} is not a time")
        if unit == "%" and not relative and name != "errors":
            raise UsageError(f"{text!r}: a change in percent takes a sign, as in '{name}{match['how']}+5%'")
        # errors are a share already: +1% means one percent point, not a hundredth more of almost nothing.
        percent = unit == "%" and name != "errors"
        scale = UNITS[unit] * 1e6 if unit in UNITS else 1.0
        limit = float(f"{match['sign']}{match['number']}") * scale
        return cls(text.strip(), name, match["how"], relative, percent, limit)

    def verdict(self, a: Document, b: Document) -> tuple[bool, str]:
        """Return (failed, why) for runs A and B."""
        before, after = metric(a, self.metric), metric(b, self.metric)
        if after is None or (self.relative and before is None):
            return True, f"{self.metric}: {'watch the server with --pid' if self.metric == 'cpu' else 'too few samples'}"
        if self.relative and a["loop"] != b["loop"] and self.metric not in ("cpu", "errors"):
            return True, f"{self.metric} of a closed loop cannot be compared with that of an open one"
        value = after
        if self.relative and before is not None:
            if self.percent and before == 0:
                return True, f"{self.metric} was 0, a change in percent means nothing"
            value = (after - before) / before * 100 if self.percent else after - before
        failed = COMPARISONS[self.comparison](value, self.limit)
        if not self.relative:
            said = shown(self.metric, value)
        else:
            said = f"{value:+.2f} %" if self.percent else f"{value:+,.6g}"
        return failed, f"{self.metric} {said}"


def differences(a: Document, b: Document) -> list[str]:
    """What makes two runs hard to compare, as sentences."""
    found = []
    for key in ("method", "rate", "arrivals", "connections", "keep_alive", "duration_s", "body_bytes"):
        before, after = a["config"].get(key), b["config"].get(key)
        if before != after:
            found.append(f"{key} differs: {before} and {after}")
    spoken = [_spoken(document) for document in (a, b)]
    if spoken[0] != spoken[1]:
        found.append(f"TLS differs: {spoken[0]} and {spoken[1]}")
    for key in ("cpu", "cpus_available", "kernel"):
        before, after = a["machine"].get(key), b["machine"].get(key)
        if before != after:
            found.append(f"the machine's {key} differs: {before} and {after}")
    return found


def _spoken(document: Document) -> str:
    """The versions and ciphers of a run, and whether handshakes were resumed."""
    tls = document["result"].get("tls")
    if tls is None:
        return "none"
    kinds = sorted({f"{each['version']} {each['cipher']}" for each in tls["sessions"]})
    return ", ".join(kinds) + (" resumed" if tls["resumed"] else "")


def rows(a: Document, b: Document) -> list[tuple[str, str, str, str]]:
    """(metric, A, B, change) of all metrics."""
    found = []
    for name in METRICS:
        before, after = metric(a, name), metric(b, name)
        if before is None or after is None:
            change = "-"
        elif name == "errors":
            change = f"{after - before:+.4g} points"
        else:
            change = f"{(after - before) / before * 100:+.2f} %" if before else "-"
        found.append((name, shown(name, before), shown(name, after), change))
    return found
