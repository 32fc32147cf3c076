"""What the micro benchmarks' figures mean: medians over rounds, ratios inside a group, and the table.

Strategy: pure functions over plain data, so that what is printed comes from code with unit tests. A group's rows do the same
job; the first is ours, and the others are divided by it round by round, where both met the same machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "micro-benchmarks.md"
START, END = "<!-- micro:start -->", "<!-- micro:end -->"
BUSY = 0.5  # load average at the start, for each core: above it somebody else was at work
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


@dataclass(frozen=True)
class Line:
    """One benchmark of a group, in seconds per operation; `ratio` is to the group's first row."""

    group: str
    name: str
    median: float
    low: float
    high: float
    ratio: float


def duration(seconds: float) -> str:
    """Return a duration with three digits and its unit: 1.25e-7 is '125 ns'."""
    for size, unit in UNITS:
        if seconds >= size * 0.9995:
            break
    value = seconds / size
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{decimals}f} {unit}"


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the rounds' ratios. Raises ValueError when the rounds are not the same ones."""
    if len(over) != len(under) or not over:
        raise ValueError(f"{len(over)} rounds cannot be compared with {len(under)}")
    return median(a / b for a, b in zip(over, under, strict=True))


def lines(rounds: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[str]]) -> list[Line]:
    """Return a line for each benchmark that was measured; `rounds` holds seconds per operation, one for each round."""
    found = []
    for group, names in groups.items():
        measured = [name for name in names if name in rounds]
        for name in measured:
            values = rounds[name]
            found.append(Line(group, name, median(values), min(values), max(values), ratio(values, rounds[measured[0]])))
    return found


def provenance(facts: Mapping[str, Any], rounds: int) -> str:
    """Return the sentences above the table: commit, machine, rounds, and whether the figures are more than a look."""
    machine = facts["machine"]
    kind = "virtual machine" if machine["virtual"] else "machine"
    changed = "" if facts["clean_tree"] else " with changes that are not in it"
    text = (
        f"{facts['date'][:10]}, commit {facts['commit']}{changed}: {rounds} round{'s' if rounds > 1 else ''} on a "
        f"{machine['cores']}-core {kind} ({machine['cpu']}), Linux {machine['kernel']}, Python {facts['versions']['python']}."
    )
    if machine["load_average"] > BUSY * machine["cores"]:
        text += f" The machine was busy (load average {machine['load_average']}): good for orders of magnitude; ratios near 1 mean nothing."
    elif rounds == 1:
        text += " One short round: good for orders of magnitude."
    return text


def render(found: Sequence[Line]) -> str:
    """Return the table as Markdown; a group of one has no ratio."""
    sizes: dict[str, int] = {}
    for line in found:
        sizes[line.group] = sizes.get(line.group, 0) + 1
    rows = [("what", "which", "median", "range of rounds", "ratio"), ("---", "---", "---:", "---:", "---:")]
    shown = ""
    for line in found:
        own = f"{line.ratio:,.2f}x" if sizes[line.group] > 1 else ""
        span = f"{duration(line.low)} - {duration(line.high)}"
        rows.append(("" if line.group == shown else line.group, line.name.removeprefix(f"{line.group}: "), duration(line.median), span, own))
        shown = line.group
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    text = []
    for row in rows:
        cells = [row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(5)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)
