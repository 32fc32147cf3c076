"""Compare the balancers in simulated upstreams: python -m benchmarks.balancers [--only slow] [--render]

Strategy: every scenario with every algorithm, from one seed; figures go to benchmarks/results/balancers.json, and from there into
docs/balancing.md and docs/images/balancers.svg, so that no figure in the documentation is typed. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.balancers.scenarios import SCENARIOS, SEED, measure
from benchmarks.load.plots import MARKS, latency_panel, page, text
from benchmarks.load.render import table

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "balancers.json"
DOCUMENT = ROOT / "docs" / "balancing.md"
PICTURE = ROOT / "docs" / "images" / "balancers.svg"
START, END = "<!-- balancers:start -->", "<!-- balancers:end -->"


def milliseconds(us: int) -> str:
    """Return milliseconds with the digits that mean something."""
    return f"{us / 1000:,.0f}" if us >= 100_000 else f"{us / 1000:.1f}"


def tables(result: Mapping[str, Any]) -> str:
    """Return one Markdown table per scenario."""
    parts = []
    for scenario in result["scenarios"].values():
        rows = [
            [
                f"`{name}`" if name != "textbook" else "peak EWMA as published",
                *(milliseconds(cell[key]) for key, _, _ in MARKS),
                f"{cell['refused'] / cell['requests']:.2%}",
                f"{cell['odd_share']:.1%}",
                f"{cell['odd_peak']:,}",
                *([f"{cell['back_us'] / 1e6:.1f}"] if "back_us" in cell else []),
            ]
            for name, cell in scenario["cells"].items()
        ]
        headings = [scenario["title"], "p50 ms", "p99 ms", "p99.9 ms", "refused", "its share", "most at it"]
        headings += ["asked again after s"] if any("back_us" in cell for cell in scenario["cells"].values()) else []
        parts.append(table(headings, rows))
    return "\n\n".join(parts)


def picture(result: Mapping[str, Any]) -> str:
    """Return the percentiles as one picture."""
    legend = [
        part
        for at, (_, fill, words) in enumerate(MARKS)
        for part in (f'<circle cx="{at * 70 + 6}" cy="8" r="4" fill="{fill}"/>', text(at * 70 + 14, 12, words))
    ]
    panels = [
        latency_panel({**scenario, "cells": {name: {"fixed": cell} for name, cell in scenario["cells"].items()}})
        for scenario in result["scenarios"].values()
    ]
    return page("Latency of answered requests by balancer, simulated (less is better)", [(24, legend), (24, []), *panels])


def placed(document: str, figures: str) -> str:
    """Return the document with what stands between the markers replaced. Raises ValueError when it has none."""
    before, _, rest = document.partition(START)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"the document has no {START} ... {END}")
    return f"{before}{START}\n\n{figures}\n\n{END}{after}"


def render() -> None:
    """Put the kept figures into the documentation."""
    result = json.loads(RESULT.read_text("utf-8"))
    PICTURE.write_text(picture(result), "utf-8")
    DOCUMENT.write_text(placed(DOCUMENT.read_text("utf-8"), tables(result)), "utf-8")


def main() -> int:
    """Simulate, print, keep and render; with --only nothing is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balancers", description="the balancers, simulated")
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario, printed only")
    parser.add_argument("--render", action="store_true", help="only put the kept figures into the documentation")
    options = parser.parse_args()
    if options.render:
        render()
        return 0
    scenarios: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        if options.only in (None, name):
            cells = {}
            for algorithm in scenario.algorithms:
                print(f"{name}: {algorithm}", file=sys.stderr, flush=True)
                cells[algorithm] = measure(scenario, algorithm)
            scenarios[name] = {"title": scenario.title, "rate": scenario.rate, "cells": cells}
    result = {"format": 1, "seed": SEED, "scenarios": scenarios}
    print(tables(result))
    if options.only is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
