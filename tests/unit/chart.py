"""The Helm chart, rendered by Helm itself: its engine as a library, or the program `helm` where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "crossway"
KUBERNETES = "1.31.0"


class ChartError(Exception):
    """Helm refuses the values or the templates."""


def render(values: dict[str, Any] | None = None, *, name: str = "crossway", namespace: str = "mesh") -> dict[str, str]:
    """Return what each template makes, by its file's name. Raises ChartError."""
    try:
        import helm_python
    except ImportError:
        return _by_program(values, name, namespace)
    try:
        with helm_python.Chart.load(str(CHART)) as chart:
            return {path.rpartition("/")[2]: text for path, text in chart.render(values or {}, name=name, namespace=namespace).items()}
    except helm_python.HelmError as error:
        raise ChartError(str(error)) from None


def _by_program(values: dict[str, Any] | None, name: str, namespace: str) -> dict[str, str]:
    program = shutil.which("helm")
    if program is None:
        pytest.skip("neither helm nor its library (helm-python-sdk) is here: the library has no build for this machine")
    done = subprocess.run(
        [program, "template", name, str(CHART), "-n", namespace, "--kube-version", KUBERNETES, "-f", "-"],
        input=json.dumps(values or {}), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise ChartError(done.stderr)
    found: dict[str, str] = {}
    for part in done.stdout.split("\n---\n"):
        source = next((line for line in part.splitlines() if line.startswith("# Source: ")), "# Source: /none")
        file = source.rpartition("/")[2]
        found[file] = found.get(file, "") + "\n---\n" + part
    return found


def documents(values: dict[str, Any] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the manifests by (kind, name). Raises ChartError."""
    found = {}
    for file, text in render(values).items():
        if file.endswith(".yaml"):
            for data in YAML(typ="safe").load_all(text):
                if data is not None:
                    key = data["kind"], data["metadata"]["name"]
                    assert key not in found, f"{key} is made twice"
                    found[key] = data
    return found
