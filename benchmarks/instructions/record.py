"""The table of instruction counts, a row for each commit, and what a new count means beside the last row.

Strategy: pure functions over rows, so that the ratio that script/instructions --check prints comes from code with unit tests.
Counts of two toolchains cannot be compared, so each row names the compiler and the interpreter that it was taken with.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

SCENARIOS = {
    "bare": "bare.yaml, GET: one route, plain proxy",
    "edge": "edge.yaml, POST: token in the cache, scope, limit, audit line",
    "http2": "http2.yaml, GET: as bare, for clients with 10 streams a connection; the origin speaks HTTP/1.1",
    "grpc": "grpc.yaml: a unary call, HTTP/2 on both sides, a message each way, trailers",
}
Function = tuple[str, str, float]  # name, object, instructions per request


@dataclass(frozen=True)
class Row:
    """One commit's counts, in user-space instructions per request inside Engine.poll(); None where they were not taken yet."""

    commit: str
    date: str
    bare: float
    edge: float
    python: str
    compiler: str
    http2: float | None = None
    grpc: float | None = None

    def count(self, scenario: str) -> float | None:
        """Return the count of a scenario."""
        found: float | None = getattr(self, scenario)
        return found


def read(text: str) -> list[Row]:
    """Return the rows of a table. Raises ValueError when its columns are others, or a count is no number."""
    reader = csv.DictReader(io.StringIO(text))
    expected = [field.name for field in fields(Row)]
    if reader.fieldnames is None:
        return []
    if list(reader.fieldnames) != expected:
        raise ValueError(f"the columns must be {', '.join(expected)}, not {', '.join(reader.fieldnames)}")
    return [
        Row(
            *(row["commit"], row["date"], float(row["bare"]), float(row["edge"]), row["python"], row["compiler"]),
            *(float(row[name]) if row[name] else None for name in ("http2", "grpc")),
        )
        for row in reader
    ]


def write(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        counts = {name: row.count(name) for name in SCENARIOS}
        writer.writerow(asdict(row) | {name: "" if count is None else f"{count:.1f}" for name, count in counts.items()})
    return out.getvalue()


def added(rows: Sequence[Row], new: Row) -> list[Row]:
    """Return the rows with `new` at their end; a commit that is measured again has its last count only."""
    return [*(row for row in rows if row.commit != new.commit), new]


def comparison(last: Row | None, new: Row) -> str:
    """Return what a person reads after --check: each count, and its ratio to the last recorded one."""
    lines = []
    for name in SCENARIOS:
        now, before = new.count(name), last.count(name) if last is not None else None
        if now is None:
            continue
        if last is None or before is None:
            lines.append(f"{name}: {now:,.0f} instructions per request; nothing is recorded yet")
        else:
            lines.append(f"{name}: {now:,.0f} instructions per request, {before:,.0f} at {last.commit}: {now / before:.4f}x")
    if last is not None and (last.python, last.compiler) != (new.python, new.compiler):
        lines.append(
            f"not comparable: {last.commit} was built with {last.compiler} for Python {last.python}, "
            f"this with {new.compiler} for Python {new.python}"
        )
    return "\n".join(lines)


def dearer(last: Row, new: Row, most: float) -> list[str]:
    """Return the scenarios whose count rose above `most` times the last one; none where the two cannot be compared."""
    if (last.python, last.compiler) != (new.python, new.compiler):
        return []
    pairs = {name: (new.count(name), last.count(name)) for name in SCENARIOS}
    return [name for name, (now, before) in pairs.items() if now is not None and before is not None and now > most * before]


def report(row: Row, functions: Mapping[str, Sequence[Function]]) -> str:
    """Return the page beside the table: where the instructions of one commit are spent."""
    taken = f"Commit {row.commit}, {row.date}, Python {row.python}, {row.compiler}."
    rule = "What is counted is said in docs/micro-benchmarks.md. Own instructions of each function, inlined ones included."
    lines = ["# Instructions per request, by function", "", f"{taken} Written by `script/instructions`. {rule}"]
    for name, title in SCENARIOS.items():
        total = row.count(name)
        if total is None:
            continue
        lines += ["", f"## {name}: {total:,.0f}", "", f"{title}.", ""]
        lines += ["| function | in | instructions | share |", "| --- | --- | ---: | ---: |"]
        lines += [f"| `{function}` | {path} | {count:,.0f} | {count / total:.1%} |" for function, path, count in functions[name]]
    return "\n".join(lines) + "\n"
