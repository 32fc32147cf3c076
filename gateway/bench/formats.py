"""A run's document as a table, as JSON and as an .hgrm file.

Strategy: each writer takes the document, fresh or read back from a file, and nothing else. An invalid run is written like any
other, but says so first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gateway.bench.percentiles import PERCENTILES, duration, spectrum
from gateway.bench.runner import SCHEMA, VERSION, Document
from gateway.bench.settings import UsageError


def write_json(document: Document, path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def read_json(path: Path) -> Document:
    """Read a run back. Raises UsageError when the file is none."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{path}: this is not a result of `crossway bench run --json`")
    if document.get("version") != VERSION:
        raise UsageError(f"{path}: schema version {document.get('version')}; this program reads version {VERSION}")
    return document


def hgrm(latency: dict[str, Any]) -> str:
    """A histogram in the percentile format of HdrHistogram, which its plotters read; values in milliseconds."""
    lines = [f"{'Value':>12} {'Percentile':>17} {'TotalCount':>10} {'1/(1-Percentile)':>17}", ""]
    for us, share, seen in spectrum(latency):
        rest = f"{1 / (1 - share):17.2f}" if share < 1 else f"{'inf':>17}"
        lines.append(f"{us / 1e3:12.6f} {share:17.12f} {seen:10d} {rest}")
    lines += [
        f"#[Mean    = {latency['mean'] / 1e3:12.6f}, StdDeviation   = {latency['stdev'] / 1e3:12.6f}]",
        f"#[Max     = {latency['max'] / 1e3:12.6f}, Total count    = {latency['count']:12d}]",
        f"#[Buckets = {28:12d}, SubBuckets     = {2048:12d}]",
    ]
    return "\n".join(lines) + "\n"


def banner(document: Document) -> Panel | None:
    """The loud part of an invalid run; None when the run is valid."""
    if document["valid"]:
        return None
    text = "\n".join(f"- {reason}" for reason in document["reasons"])
    return Panel(Text(f"Do not use these figures:\n{text}"), title="INVALID RUN", style="bold red")


def label(document: Document) -> str:
    """What kind of loop the figures come from."""
    config = document["config"]
    if document["loop"] == "closed":
        return f"closed loop, {config['connections']} connections"
    return f"open loop, {config['rate']:,.6g}/s {config['arrivals']}, {config['connections']} connections"


def percentile_table(document: Document) -> Table:
    closed = document["loop"] == "closed"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("percentile")
    table.add_column("service time\n(closed loop)" if closed else "latency\nfrom intended", justify="right")
    if not closed:
        table.add_column("service time\nfrom sent", justify="right")
    table.add_column("samples\nbeyond", justify="right")
    for name in PERCENTILES:
        row = document["latency"]["percentiles"][name]
        inner = document["service"]["percentiles"][name]
        if row["us"] is None:
            cells = [f"needs {row['samples_needed']:,} samples", *([] if closed else ["-"])]
        else:
            cells = [duration(row["us"]), *([] if closed else [duration(inner["us"])])]
        table.add_row(name, *cells, f"{row['samples_beyond']:,}")
    extremes = [duration(document["latency"]["max"]), *([] if closed else [duration(document["service"]["max"])])]
    table.add_row("max", *extremes, "0")
    return table


def facts(document: Document) -> list[tuple[str, str]]:
    """What else a person wants to know, as (name, text)."""
    result, config = document["result"], document["config"]
    generator = result["generator"]
    failures = ", ".join(f"{number:,} {kind}" for kind, number in result["errors"].items() if number)
    answers = ", ".join(f"{number:,} x {status}" for status, number in result["statuses"].items())
    reached = "" if result["achieved_share"] is None else f" ({result['achieved_share']:.2%} of what was scheduled)"
    rows = [
        ("request", f"{config['method']} {config['url']}"),
        ("load", f"{label(document)}, {config['duration_s']:g} s after {config['warmup_s']:g} s"),
        ("answers", f"{result['answered']:,} of {result['requests']:,} requests: {answers or 'none'}"),
        ("rate", f"{result['achieved_rate']:,.1f}/s{reached}"),
        ("errors", failures or "none"),
        ("generator", f"{generator['core_share']:.0%} of a core, {generator['us_per_request']:.1f} us a request"),
    ]
    if result["server_us_per_request"] is not None:
        rows.append(("server", f"{result['server_us_per_request']:.1f} us of CPU a request"))
    if (tls := result.get("tls")) is not None:
        rows += _tls_facts(tls, document["handshake"])
    if document["loop"] == "open":
        waited = f"at most {result['backlog_max']:,} requests waited for a connection"
        rows.append(("schedule", f"{waited}; the generator was at most {generator['late_max_ms']:.1f} ms late"))
    return rows


def _tls_facts(tls: dict[str, Any], handshake: dict[str, Any]) -> list[tuple[str, str]]:
    spoken = ", ".join(f"{each['version']} {each['cipher']}" for each in tls["sessions"])
    rows = [("TLS", f"{spoken or 'no session'}; {tls['handshakes']:,} handshakes, {tls['resumed']:,} of them resumed")]
    if handshake["count"]:
        known = [(name, row["us"]) for name, row in handshake["percentiles"].items() if row["us"] is not None]
        said = [f"{name} {duration(us)}" for name, us in known if name in ("p50", "p99")] or [f"mean {duration(handshake['mean'])}"]
        rows.append(("handshake", f"{', '.join(said)}, max {duration(handshake['max'])}"))
    if tls["failures"]:
        rows.append(("no handshake", ", ".join(f"{number:,} x {why}" for why, number in tls["failures"].items())))
    return rows


def show(document: Document, console: Console) -> None:
    """Print a run for a person."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in facts(document):
        table.add_row(name, escape(text))
    loud = banner(document)
    parts = [loud] if loud is not None else []
    console.print(Group(*parts, table, percentile_table(document)))
    for warning in document["warnings"]:
        console.print(f"[yellow]note:[/] {escape(warning)}")
