"""Result files: benchmarks/results/NAME.json.

Strategy: one place that knows the folder and the format's number, so that writers and readers cannot disagree.
"""

import json
from pathlib import Path

from benchmarks.load.scenarios import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FORMAT = 2


def write_result(name: str, result: dict[str, object]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
