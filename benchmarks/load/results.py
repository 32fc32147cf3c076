"""Result files: benchmarks/results/NAME.json.

Strategy: one place that knows the folder and the format's number, so that writers and readers cannot disagree.
"""

import json
from pathlib import Path

from benchmarks.load.scenarios import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FORMAT = 2


def newest() -> Path | None:
    """Return the latest comparison by the date inside it; None when there is none. Results of a group of scenarios, memory and
    other files do not count.
    """
    dated = []
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        if "scenarios" in result and result.get("format") == FORMAT and not result.get("group"):
            dated.append((result["date"], path))
    return max(dated)[1] if dated else None


def write_result(name: str, result: dict[str, object]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
