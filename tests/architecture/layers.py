"""The import rule as data, and the code that reads imports out of source files.

Strategy: sources are parsed, never imported, so that a planted violation in a temporary tree is judged by the same code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# Bottom to top: a package may import from packages of a lower layer and from itself.
LAYERS: list[set[str]] = [
    {"_speedups"},
    {"config", "errors", "workload"},
    {"telemetry", "discovery", "health"},
    {"policies", "snapshot"},
    {"edge", "mesh", "openbanking"},
    {"server", "dashboard", "demo", "bench"},
    {"cli"},
]
# Of one layer, but not of each other's business.
APART = {"edge", "mesh", "openbanking"}
# The public face (gateway/__init__.py, gateway/__main__.py) may show what is below it.
FACE = {"__init__", "__main__"}
CIMPORT = re.compile(r"^\s*(?:from\s+gateway\._speedups\.(\w+)\s+cimport|cimport\s+gateway\._speedups\.(\w+))", re.MULTILINE)
RELATIVE_CIMPORT = re.compile(r"^\s*from\s+\.\S*\s+cimport", re.MULTILINE)


def level(package: str) -> int | None:
    """The layer of a package of gateway, None when the rule does not know it."""
    return next((number for number, names in enumerate(LAYERS) if package in names), None)


def imported(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) for every import in a file, relative ones made absolute; `package` is the file's own."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if module == "gateway":
                # `from gateway import edge` imports a package, `from gateway import Policy` the face.
                for alias in node.names:
                    yield node.lineno, f"gateway.{alias.name}"
            else:
                yield node.lineno, module


def violations(root: Path) -> list[str]:
    """Every import in root/gateway that goes upwards, sideways where it must not, or to a package the rule does not know."""
    found = []
    for path in sorted((root / "gateway").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        own = parts[1]
        package = ".".join(parts[:-1])
        where = path.relative_to(root)
        if own in FACE:
            continue
        if level(own) is None:
            found.append(f"{where}: the import rule has no layer for gateway.{own}; add it to tests/architecture/layers.py")
            continue
        for line, module in imported(path, package):
            names = module.split(".")
            if names[0] == "gateway" and len(names) > 1:
                found += [f"{where}:{line}: {problem}" for problem in _judge(own, names[1])]
    return found


def _judge(own: str, other: str) -> Iterator[str]:
    theirs, ours = level(other), level(own)
    if theirs is None or ours is None:
        # A name of the public face, such as Policy: hooks may use it, the packages below it may not.
        yield f"gateway.{own} imports {other} from the package's face; import it from where it is defined"
    elif theirs > ours:
        yield f"gateway.{own} imports gateway.{other}, which is above it"
    elif own != other and {own, other} <= APART:
        yield f"gateway.{own} imports gateway.{other}; edge, mesh and openbanking do not know each other"
    elif own == "_speedups" and other != "_speedups":
        yield f"gateway._speedups imports gateway.{other}; it imports nothing from gateway"


def cimports(root: Path) -> dict[str, set[str]]:
    """Which native module cimports which, from both .pyx and .pxd."""
    graph: dict[str, set[str]] = {}
    for path in sorted((root / "_speedups").glob("*.p[yx][xd]")):
        if path.stem != "__init__":
            names = {a or b for a, b in CIMPORT.findall(path.read_text("utf-8"))}
            graph.setdefault(path.stem, set()).update(names - {path.stem})
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A cycle of the graph as the names along it, None when there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)
