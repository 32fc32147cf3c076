"""The Helm chart, rendered by Helm itself: its engine as a library, or the program `helm` where there is one.

Strategy: the library is Go, with threads and signal handlers of its own, so it lives in a process of its own that is asked line by line.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "crossway"
KUBERNETES = "1.31.0"


class ChartError(Exception):
    """Helm refuses the values or the templates."""


# What values have to say when there is an edge; nothing of it is loaded.
EDGE = {"upstreams": {"payments": {"service": "payments"}}, "routes": [{"name": "pay", "match": {"prefix": "/"}, "upstream": "payments"}]}


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return values as Helm merges them."""
    both = {key: merged(base[key], more[key]) for key in base.keys() & more.keys() if isinstance(base[key], dict) and isinstance(more[key], dict)}
    return {**base, **more, **both}


def sensible(values: dict[str, Any] | None) -> dict[str, Any]:
    """Return values with which there is something behind the edge."""
    return merged({"edge": {"config": EDGE}}, values or {})


def render(values: dict[str, Any] | None = None, *, name: str = "crossway", namespace: str = "mesh") -> dict[str, str]:
    """Return what each template makes, by its file's name. Raises ChartError."""
    asked = json.dumps({"values": values or {}, "name": name, "namespace": namespace}, sort_keys=True)
    answer = json.loads(_by_library(asked) if importlib.util.find_spec("helm_python") else _by_program(asked))
    if "error" in answer:
        raise ChartError(answer["error"])
    return dict(answer)


@functools.cache
def _library() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


@functools.cache
def _by_library(asked: str) -> str:
    process = _library()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(asked + "\n")
    process.stdin.flush()
    return process.stdout.readline()


@functools.cache
def _by_program(asked: str) -> str:
    program = shutil.which("helm")
    if program is None:
        pytest.skip("neither helm nor its library (helm-python-sdk) is here: the library has no build for this machine")
    wanted = json.loads(asked)
    done = subprocess.run(
        [program, "template", wanted["name"], str(CHART), "-n", wanted["namespace"], "--kube-version", KUBERNETES, "-f", "-"],
        input=json.dumps(wanted["values"]), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        return json.dumps({"error": done.stderr})
    found: dict[str, str] = {}
    for part in done.stdout.split("\n---\n"):
        source = next((line for line in part.splitlines() if line.startswith("# Source: ")), "# Source: /none")
        file = source.rpartition("/")[2]
        found[file] = found.get(file, "") + "\n---\n" + part
    return json.dumps(found)


def documents(values: dict[str, Any] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the manifests by (kind, name), for values that have something behind the edge. Raises ChartError."""
    found = {}
    for file, text in render(sensible(values)).items():
        if file.endswith(".yaml"):
            for data in YAML(typ="safe").load_all(text):
                if data is not None:
                    key = data["kind"], data["metadata"]["name"]
                    assert key not in found, f"{key} is made twice"
                    found[key] = data
    return found


def serve() -> None:
    """Answer each line of stdin: what to render, and what it became."""
    import helm_python

    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            with helm_python.Chart.load(str(CHART)) as chart:
                made = chart.render(wanted["values"], name=wanted["name"], namespace=wanted["namespace"])
            answer = {path.rpartition("/")[2]: text for path, text in made.items()}
        except helm_python.HelmError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
