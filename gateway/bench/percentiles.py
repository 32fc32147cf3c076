"""Percentiles that the samples can carry, and the words for durations.

Strategy: a percentile is decided by the samples beyond it. With fewer than ten of them it is an anecdote, so it is left out,
with the number of samples it would have needed; p99.99 thus needs 100,000 requests.
"""

from __future__ import annotations

from typing import Any

from gateway._speedups.load import LatencyHistogram

PERCENTILES = ("p50", "p75", "p90", "p95", "p99", "p99.9", "p99.99")
BEYOND = 10  # samples that must lie above a percentile


def share(name: str) -> float:
    """p99.9 -> 0.999."""
    return round(float(name[1:]) / 100, 6)


def needed(name: str) -> int:
    """How many samples a percentile takes."""
    return round(BEYOND / (1 - share(name)))


def summary(histogram: LatencyHistogram) -> dict[str, Any]:
    """A histogram as it stands in a result, microseconds."""
    count = histogram.count
    values: dict[str, Any] = {}
    for name in PERCENTILES:
        enough = count >= needed(name)
        values[name] = {
            "us": histogram.value_at(share(name)) / 1e3 if enough else None,
            "samples_beyond": count - round(count * share(name)),
            "samples_needed": needed(name),
        }
    return {
        "unit": "us",
        "count": count,
        "min": histogram.minimum / 1e3,
        "mean": histogram.mean / 1e3,
        "stdev": histogram.deviation / 1e3,
        "max": histogram.maximum / 1e3,
        "percentiles": values,
        "bins": [[top / 1e3, number] for top, number in histogram.filled()],
    }


def spectrum(latency: dict[str, Any]) -> list[tuple[float, float, int]]:
    """(value in us, share of samples up to it, samples up to it) of each bin of a result's histogram."""
    total, seen, rows = latency["count"], 0, []
    for top, number in latency["bins"]:
        seen += number
        rows.append((float(top), seen / total, seen))
    return rows


def duration(us: float | None) -> str:
    """A duration for people, three or four digits."""
    if us is None:
        return "-"
    for limit, unit, factor in ((1e3, "us", 1.0), (1e6, "ms", 1e3)):
        if us < limit:
            value = us / factor
            break
    else:
        value, unit = us / 1e6, "s"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
