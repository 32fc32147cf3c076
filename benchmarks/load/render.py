"""Put the figures of a result file into README.md and docs/benchmarks.md.

Strategy: the prose is written by hand; what stands between the two markers is replaced as a whole, so that no figure in the
documentation is typed. The plots go to docs/images. A result with caveats is refused unless asked for, and then the caveats are printed with it.

    python -m benchmarks.load.render                                    the newest result
    python -m benchmarks.load.render benchmarks/results/NAME.json       that one; a group's goes to its own place
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.plots import cost_plot, latency_plot
from benchmarks.load.results import FORMAT, newest
from benchmarks.load.scenarios import ROOT

START = "<!-- benchmarks:start -->"
END = "<!-- benchmarks:end -->"
GROUP_PAGE = "docs/benchmarks.md"  # where a group of scenarios stands, between the same markers with -GROUP behind the word
# Below this share of its core a program was waiting for the load, and could have done more.
SATURATED = 0.95
HEADLINE = ("plain", "token", "routes-1000", "connect", "download-16k", "download-1m", "upload-1m")  # of the README
COST, LATENCY = "benchmarks-cpu.svg", "benchmarks-latency.svg"
PLOTS = {
    COST: (cost_plot, "CPU time per request by scenario and program"),
    LATENCY: (latency_plot, "latency percentiles at a fixed rate by scenario and program"),
}
LOADS = {"http2": "h2load"}  # of a group's closed loops, where it is not wrk
DOCUMENTS = {"README.md": False, "docs/benchmarks.md": True}  # path: whether it gets everything


class Unrenderable(Exception):
    """A result or a document that cannot be used; the message says what to do."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    line = "|" + "|".join(" --- " if number == 0 else " ---: " for number in range(len(headings))) + "|"
    return "\n".join(["| " + " | ".join(headings) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(value: float | None) -> str:
    """Return a figure with as many digits as it carries."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def rps(cell: Mapping[str, Any]) -> str:
    """Return the requests a second; at least that many where the load was spent before the program's core was."""
    return ("" if cell["median_utilisation"] >= SATURATED else ">= ") + f"{cell['median_rps']:,.0f}"


def titled(result: Mapping[str, Any], name: str) -> str:
    """Return a program's title with its version."""
    version = result["versions"].get(name, "")
    return f"{result['programs'][name]} {version}".rstrip()


def reasons(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return why cells of these scenarios are empty, one list item each."""
    lines = []
    for name in names:
        scenario = result["scenarios"][name]
        for program, cell in scenario["cells"].items():
            if "reason" in cell:
                lines.append(f"- {result['programs'][program]}, {scenario['title']}: {cell['reason']}")
    return "\n".join(lines)


def short_table(result: Mapping[str, Any]) -> str:
    """Return the README's table: CPU time per request of every program in the headline scenarios, and one p99."""
    scenarios = {name: result["scenarios"][name] for name in HEADLINE if name in result["scenarios"]}
    rate = scenarios.get("plain", {}).get("rate")
    headings = ["us CPU / request", *(one["title"] for one in scenarios.values())]
    headings += [f"p99 us, plain proxy at {rate:,}/s"] if rate else []
    rows = []
    for program in result["programs"]:
        cells = [one["cells"].get(program, {}) for one in scenarios.values()]
        row = [titled(result, program), *(figure(cell.get("median_us")) for cell in cells)]
        if rate:
            row.append(figure(scenarios["plain"]["cells"].get(program, {}).get("fixed", {}).get("p99_us")))
        rows.append(row)
    return table(headings, rows)


def scenario_table(result: Mapping[str, Any], scenario: Mapping[str, Any]) -> str:
    """Return everything of one scenario: cost, saturation, memory, and latency at its fixed rate."""
    cells = scenario["cells"]
    base = cells.get("haproxy", {}).get("median_us")
    headings = ["program", "us CPU / request", "min-max", "of HAProxy", "requests/s, one core", "min-max", "core used", "MiB PSS"]
    if scenario["rate"]:
        headings += [f"us CPU at {scenario['rate']:,}/s", "p50 us", "p99 us", "p99.9 us"]
    rows = []
    for program, cell in cells.items():
        if "reason" in cell:
            rows.append([titled(result, program), *["-"] * (len(headings) - 1)])
            continue
        row = [titled(result, program), figure(cell["median_us"])]
        row.append(f"{figure(cell['min_us'])}-{figure(cell['max_us'])}")
        row.append(f"{cell['median_us'] / base:.2f}" if base else "-")
        row += [rps(cell), f"{cell['min_rps']:,.0f}-{cell['max_rps']:,.0f}"]
        row += [f"{cell['median_utilisation']:.0%}", figure(cell["pss_mib"])]
        if scenario["rate"]:
            fixed = cell.get("fixed", {})
            row += [figure(fixed.get(key)) for key in ("us_per_request", "p50_us", "p99_us", "p999_us")]
        rows.append(row)
    return table(headings, rows)


def latency_reasons(scenario: Mapping[str, Any], programs: Mapping[str, str]) -> str:
    """Return why measured cells have no latency; programs with the same reason stand together."""
    found: dict[str, list[str]] = {}
    for program, cell in scenario["cells"].items():
        if "reason" in cell.get("fixed", {}):
            found.setdefault(cell["fixed"]["reason"], []).append(programs[program])
    return "\n".join(f"- no latency of {', '.join(names)}: {reason}" for reason, names in found.items())


def full_tables(result: Mapping[str, Any]) -> list[str]:
    """Return the scenarios of docs/benchmarks.md, each with its table and the reasons of its empty cells."""
    parts = []
    for name, scenario in result["scenarios"].items():
        rounds = f"{scenario['rounds']} round" + ("s" if scenario["rounds"] > 1 else "")
        parts.append(f"### {scenario['title']}\n\n{scenario['detail']}; {rounds}.")
        parts.append(scenario_table(result, scenario))
        why = "\n".join(filter(None, [reasons(result, [name]), latency_reasons(scenario, result["programs"])]))
        if why:
            parts.append(why)
    return parts


def ratio_table(result: Mapping[str, Any]) -> str:
    """Return what is asked for beside what was measured."""
    rows = []
    for row in result["ratios"]:
        bound = "-" if row["at_most"] is None else f"<= {row['at_most']:.2f}"
        told = row["verdict"]
        if told == "missed":
            told += f" by {row['ratio'] / row['at_most'] - 1:.1%}"
        rows.append([row["title"] + (f" ({row['note']})" if row["note"] else ""), f"{row['ratio']:.3f}", bound, told])
    return table(["ratio", "measured", "asked for", "verdict"], rows) if rows else ""


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
    programs = ", ".join(f"{name} {versions[name]}" for name in (LOADS.get(result.get("group", ""), "wrk"), "python", "uvloop"))
    return (
        f"{result['date'][:10]}, commit {result['commit']}: {machine['cores']}-core {kind} ({machine['cpu']}), "
        f"Linux {machine['kernel']}; {programs}. Medians over interleaved rounds of {options['seconds']:g} s, the program on "
        "one core, the load and the origin on another. CPU time is that of the whole process tree." + steadiness(result)
    )


def steadiness(result: Mapping[str, Any]) -> str:
    """Return how steady the machine was: what was repeated, and how the processor's own speed varied."""
    said, pace = "", result.get("pace_us", {})
    if repeated := result.get("repeated"):
        said += f" {repeated} interval{'s' if repeated > 1 else ''} that other programs disturbed {'were' if repeated > 1 else 'was'} repeated."
    if pace.get("best"):
        said += f" A fixed piece of work took {pace['best']:,.0f} to {pace['worst']:,.0f} us on the program's core, timed before each run."
    return said


def block(result: Mapping[str, Any], memory: Mapping[str, Any] | None, full: bool, pictures: bool = True) -> str:
    """Return the Markdown that belongs between the markers."""
    parts = [provenance(result)]
    if result["caveats"]:
        parts.append("**Not for quoting:** " + "; ".join(result["caveats"]) + ".")
    ratios = ratio_table(result)
    if full:
        if ratios:
            parts += ["### What is asked for, and what was measured", ratios]
        parts += [f"![{words}](images/{name})" for name, (_, words) in PLOTS.items() if pictures and PLOTS[name][0](result)]
        parts += full_tables(result)
    else:
        parts.append(short_table(result))
        empty = reasons(result, [name for name in HEADLINE if name in result["scenarios"] and name != "plain"])
        parts += ["Empty cells:\n\n" + empty] if empty else []
        parts += [f"![{PLOTS[COST][1]}](docs/images/{COST})"] if cost_plot(result) else []
    if memory is not None:
        heading = f"Memory with {memory['connections']:,} idle client connections"
        parts += [f"### {heading}" if full else f"{heading}:", memory_table(memory, full)]
    if full:
        hashes = {**result["configurations"], **(memory["configurations"] if memory else {})}
        told = ", ".join(f"`{name}` {digest}" for name, digest in sorted(hashes.items()))
        parts.append(f"Configurations, with the start of their SHA-256: {told}.")
    return "\n\n".join(parts)


def draw(result: Mapping[str, Any]) -> dict[Path, str]:
    """Return the pictures of a result by the path that they belong at."""
    return {ROOT / "docs" / "images" / name: drawn for name, (plot, _) in PLOTS.items() if (drawn := plot(result))}


def replace_between(text: str, new: str, where: str, start: str = START, end: str = END) -> str:
    """Return the text with what stands between the markers replaced.

    Raises Unrenderable unless there is exactly one `start` and, after it, exactly one `end`.
    """
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise Unrenderable(f"{where}: put one line `{start}` and, below it, one line `{end}` where the figures belong")
    head, _, rest = text.partition(start)
    return f"{head}{start}\n\n{new}\n\n{end}{rest.partition(end)[2]}"


def pages(result: Mapping[str, Any], memory: Mapping[str, Any] | None, names: Sequence[str]) -> dict[Path, str]:
    """Return the documents of a result by path, its figures between their markers; raise Unrenderable when one has no place."""
    group = result.get("group")
    written = {}
    for name in [GROUP_PAGE] if group else names:
        page = ROOT / name
        if not page.exists():
            raise Unrenderable(f"{name} does not exist")
        if group:
            markers = [marker.replace("benchmarks:", f"benchmarks-{group}:") for marker in (START, END)]
            text = replace_between(page.read_text(), block(result, None, full=True, pictures=False), name, *markers)
        else:
            text = replace_between(page.read_text(), block(result, memory, DOCUMENTS[name]), name)
        written[page] = text
    return written


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a result and, when NAME-memory.json lies beside it, its memory figures."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if "scenarios" not in result or result.get("format") != FORMAT:
            raise Unrenderable(f"{path} is no result of benchmarks.load.compare in format {FORMAT}: measure again")
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
        "result",
        type=Path,
        nargs="?",
        help="benchmarks/results/NAME.json (default: the newest); NAME-memory.json beside it is used too",
    )
    parser.add_argument("--only", choices=list(DOCUMENTS), action="append", help="write this document only")
    parser.add_argument(
        "--preliminary", action="store_true", help="accept a result with caveats, and print them with it"
    )
    options = parser.parse_args(argv)
    try:
        path = options.result or newest()
        if path is None:
            raise Unrenderable("benchmarks/results holds no result: measure first, with script/bench")
        result, memory = load(path)
        if result["caveats"] and not options.preliminary:
            told = "\n  ".join(result["caveats"])
            raise Unrenderable(
                f"{path} must not be quoted:\n  {told}\nMeasure again on a quiet machine, or pass --preliminary."
            )
        written = pages(result, memory, options.only or list(DOCUMENTS))
    except Unrenderable as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    if not options.only and not result.get("group"):
        written |= draw(result)
    print(f"from {path}")
    for page, text in written.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
        print(f"written: {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
