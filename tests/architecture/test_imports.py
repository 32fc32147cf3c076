"""Packages import downwards only, and the native modules' cimports have no cycle; planted violations must be caught."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architecture.layers import RELATIVE_CIMPORT, cimports, cycle, violations

ROOT = Path(__file__).resolve().parents[2]


def test_no_import_breaks_the_rule() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("config/x.py", "from gateway.edge import build", "config imports gateway.edge, which is above"),
        ("config/x.py", "import gateway.server.worker", "config imports gateway.server, which is above"),
        ("config/x.py", "from gateway import cli", "config imports gateway.cli, which is above"),
        ("config/x.py", "from ..telemetry import metrics", "config imports gateway.telemetry, which is above"),
        ("config/deep/x.py", "from ...snapshot import compile", "config imports gateway.snapshot, which is above"),
        ("telemetry/x.py", "def f():\n    from gateway.policies import jwt", "x.py:2: gateway.telemetry imports gateway.policies"),
        ("edge/x.py", "from gateway.mesh import identity", "do not know each other"),
        ("server/x.py", "from gateway.cli import main", "server imports gateway.cli, which is above"),
        ("_speedups/x.py", "from gateway.errors import Fault", "_speedups imports gateway.errors"),
        ("errors.py", "from gateway.telemetry import log", "errors imports gateway.telemetry, which is above"),
        ("policies/x.py", "from gateway import Policy", "imports Policy from the package's face"),
        ("shiny/x.py", "", "no layer for gateway.shiny"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, file: str, source: str, reason: str) -> None:
    path = tmp_path / "gateway" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")
    found = violations(tmp_path)
    assert len(found) == 1 and re.search(re.escape(reason), found[0]), found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("server/x.py", "from gateway.edge import build\nfrom gateway._speedups import http1\nimport gateway.config.load"),
        ("config/x.py", "from . import names\nfrom .names import Name\nfrom gateway.errors import Fault\nimport re"),
        ("snapshot/x.py", "from gateway.policies import base"),
        ("__init__.py", "from gateway.policies.base import Policy"),
    ],
)
def test_what_goes_downwards_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "gateway" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")
    assert violations(tmp_path) == []


def test_the_cimport_graph_has_no_cycle() -> None:
    graph = cimports(ROOT)
    assert "wire" in graph["http1"]
    assert cycle(graph) is None


def test_native_modules_import_nothing_from_gateway() -> None:
    for path in (ROOT / "_speedups").glob("*.pyx"):
        for name in re.findall(r"^\s*(?:from|import)\s+(gateway\.\S+)(?!.*\bcimport\b).*$", path.read_text("utf-8"), re.MULTILINE):
            assert name.startswith("gateway._speedups"), f"{path.name} imports {name}"


def test_cimports_are_absolute() -> None:
    for path in (ROOT / "_speedups").glob("*.p[yx][xd]"):
        assert not RELATIVE_CIMPORT.search(path.read_text("utf-8")), f"{path.name} cimports relatively"


def test_a_planted_cycle_is_caught(tmp_path: Path) -> None:
    folder = tmp_path / "_speedups"
    folder.mkdir()
    (folder / "a.pyx").write_text("from gateway._speedups.b cimport f\n")
    (folder / "b.pxd").write_text("from gateway._speedups.c cimport g\n")
    (folder / "c.pyx").write_text("cimport gateway._speedups.a\n")
    assert cycle(cimports(tmp_path)) == ["a", "b", "c", "a"]
