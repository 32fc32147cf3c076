"""Put the figures of a result file into README.md and docs/benchmarks.md.

Strategy: the prose is written by hand; what stands between the two markers is replaced as a whole, so that no figure in the
documentation is typed. A result with caveats is refused unless asked for, and then the caveats are printed with it.

    python -m benchmarks.load.render benchmarks/results/NAME.json
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.scenarios import ROOT

START = "<!-- benchmarks:start -->"
END = "<!-- benchmarks:end -->"
DOCUMENTS = {"README.md": False, "docs/benchmarks.md": True}  # path: whether it gets everything


class Unrenderable(Exception):
    """A result or a document that cannot be used; the message says what to do."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    line = "|" + "|".join(" --- " if number == 0 else " ---: " for number in range(len(headings))) + "|"
    return "\n".join(["| " + " | ".join(headings) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])


def cost_table(scenarios: Mapping[str, Any], group: str, full: bool) -> str:
    """Return the table of one group: everybody in it does the same job, and is divided by the same baseline."""
    headings = ["program", "us CPU / request", "of HAProxy"]
    if full:
        headings += ["min-max", "requests/s", "core used", "p50 / p99 us", "processes"]
    rows = []
    for one in scenarios.values():
        if one["group"] != group:
            continue
        base = scenarios.get(one["baseline"])
        ratio = f"{one['median_us'] / base['median_us']:.2f}" if base else "-"
        row = [one["title"], f"{one['median_us']:.1f}", ratio]
        if full:
            row += [
                f"{one['min_us']:.1f}-{one['max_us']:.1f}",
                f"{one['median_rps']:,.0f}",
                f"{one['median_utilisation']:.0%}",
                f"{one['median_p50_us']:,} / {one['median_p99_us']:,}",
                str(one["processes"]),
            ]
        rows.append(row)
    return table(headings, rows) if rows else ""


def ratio_table(result: Mapping[str, Any]) -> str:
    """Return what issue 2 requires beside what was measured."""
    rows = []
    for row in result["ratios"]:
        bound = "-" if row["required"] is None else f"<= {row['required']:.2f}"
        aim = "-" if row["aim"] is None else f"<= {row['aim']:.2f}"
        name = f"{row['scenario']} / {row['against']}" + (f" ({row['note']})" if row["note"] else "")
        rows.append([name, f"{row['ratio']:.3f}", bound, aim, row["verdict"]])
    return (
        table(["CPU per request", "median of the rounds' ratios", "required", "aim", "verdict"], rows) if rows else ""
    )


def memory_table(memory: Mapping[str, Any], full: bool) -> str:
    """Return the memory figures: an idle worker, and an idle connection before and after its first request."""
    headings = ["program", "idle worker, MiB PSS", "silent connection, KiB", "connection served once, KiB"]
    if full:
        headings += ["warm worker, MiB", "after closing, MiB", "other processes, MiB", "kernel, both ends, KiB each"]
    rows = []
    for one in memory["programs"].values():
        row = [one["title"], f"{one['idle_pss_mib']:.1f}", f"{one['silent_kib']:.2f}", f"{one['served_kib']:.2f}"]
        if full:
            kernel = sum(one["kernel_growth_both_ends"].values()) / one["connections"] / 1024
            row += [f"{one['warm_pss_mib']:.1f}", f"{one['closed_pss_mib']:.1f}"]
            row += [f"{one['other_processes_pss'] / 2**20:.1f}", f"{kernel:.1f}"]
        rows.append(row)
    return table(headings, rows)


def provenance(result: Mapping[str, Any]) -> str:
    """Return one paragraph: when, where, with what."""
    machine, versions, options = result["machine"], result["versions"], result["options"]
    kind = "virtual machine" if machine["virtual"] else "machine"
    programs = ", ".join(f"{name} {versions[name]}" for name in ("haproxy", "nginx", "wrk", "python", "uvloop"))
    return (
        f"{result['date'][:10]}, commit {result['commit']}: {machine['cores']}-core {kind} ({machine['cpu']}), "
        f"Linux {machine['kernel']}; {programs}. Median of {options['rounds']} interleaved rounds of {options['seconds']:g} s, "
        f"{options['connections']} keep-alive connections, the proxy on one core, wrk and the origin on another."
    )


def block(result: Mapping[str, Any], memory: Mapping[str, Any] | None, full: bool) -> str:
    """Return the Markdown that belongs between the markers."""
    parts = [provenance(result)]
    if result["caveats"]:
        parts.append("**Not for quoting:** " + "; ".join(result["caveats"]) + ".")
    scenarios = result["scenarios"]
    plain, token = cost_table(scenarios, "plain", full), cost_table(scenarios, "token", full)
    if plain:
        parts += ["Plain proxying:", plain]
    if token:
        parts += ["One route with a token, a scope, a limit and a log line:", token]
    ratios = ratio_table(result) if full else ""
    if ratios:
        parts += ["What is required, and what was measured:", ratios]
    if memory is not None:
        parts += [f"Memory, with {memory['connections']:,} idle client connections:", memory_table(memory, full)]
    if full:
        hashes = {**result["configurations"], **(memory["configurations"] if memory else {})}
        parts.append(
            "Configurations: " + ", ".join(f"`{name}` {digest}" for name, digest in sorted(hashes.items())) + "."
        )
    return "\n\n".join(parts)


def replace_between(text: str, new: str, where: str) -> str:
    """Return the text with what stands between the markers replaced.

    Raises Unrenderable unless there is exactly one START and, after it, exactly one END.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise Unrenderable(f"{where}: put one line `{START}` and, below it, one line `{END}` where the figures belong")
    head, _, rest = text.partition(START)
    return f"{head}{START}\n\n{new}\n\n{END}{rest.partition(END)[2]}"


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a result and, when NAME-memory.json lies beside it, its memory figures."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if "scenarios" not in result:
            raise Unrenderable(f"{path} is no result of benchmarks.load.compare")
        beside = path.with_name(f"{path.stem}-memory.json")
        memory: dict[str, Any] | None = json.loads(beside.read_text()) if beside.exists() else None
    except (OSError, json.JSONDecodeError) as error:
        raise Unrenderable(f"{path}: {error}") from error
    if memory is not None and (memory["commit"], memory["clean_tree"]) != (result["commit"], result["clean_tree"]):
        raise Unrenderable(
            f"{beside.name} was taken with commit {memory['commit']}, {path.name} with {result['commit']}: measure again"
        )
    return result, memory


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 when every document holds the figures, 2 when one could not be written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.render", description="Put a result into the documentation."
    )
    parser.add_argument(
        "result", type=Path, help="benchmarks/results/NAME.json; NAME-memory.json beside it is used too"
    )
    parser.add_argument("--only", choices=list(DOCUMENTS), action="append", help="write this document only")
    parser.add_argument(
        "--preliminary", action="store_true", help="accept a result with caveats, and print them with it"
    )
    options = parser.parse_args(argv)
    try:
        result, memory = load(options.result)
        if result["caveats"] and not options.preliminary:
            told = "\n  ".join(result["caveats"])
            raise Unrenderable(
                f"{options.result} must not be quoted:\n  {told}\nMeasure again on a quiet machine, or pass --preliminary."
            )
        written = {}
        for name in options.only or DOCUMENTS:
            path = ROOT / name
            if not path.exists():
                raise Unrenderable(f"{name} does not exist")
            written[path] = replace_between(path.read_text(), block(result, memory, DOCUMENTS[name]), name)
    except Unrenderable as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    for path, text in written.items():
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
