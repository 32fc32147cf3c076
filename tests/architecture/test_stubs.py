"""The .pyi stubs say what the built native modules hold: no name too many, no public name too few, the same parameters."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = sorted((ROOT / "gateway" / "_speedups").glob("*.pyi"))
SOURCES = sorted(path.stem for path in (ROOT / "_speedups").glob("*.pyx"))


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The public names that a stub's module or class body declares."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign):
            found.update({name.id: node for name in node.targets if isinstance(name, ast.Name)})
    return {name: node for name, node in found.items() if not name.startswith("_")}


def is_type_alias(node: ast.stmt) -> bool:
    """Names that only the type checker knows."""
    if isinstance(node, ast.AnnAssign):
        return "TypeAlias" in ast.unparse(node.annotation)
    if isinstance(node, ast.ClassDef):
        return any(base in ast.unparse(part) for part in node.bases for base in ("Protocol", "TypedDict", "NamedTuple"))
    return isinstance(node, ast.Assign)


def is_internal(value: object) -> bool:
    """An extension type that shows nothing to Python: it is for other native modules."""
    return isinstance(value, type) and not any(not name.startswith("_") for name in vars(value))


def defined(module: ModuleType) -> set[str]:
    """The public names that a built module defines itself."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and not is_internal(value)
        and (getattr(value, "__module__", module.__name__) or module.__name__) == module.__name__
        and (callable(value) or isinstance(value, (int, str, bytes, tuple)))
    }


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """A stub function's parameter names."""
    given = node.args
    names = [*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else []), *given.kwonlyargs]
    return [argument.arg for argument in names if argument.arg not in ("self", "cls")]


def mismatches(stub: ast.Module, module: ModuleType) -> list[str]:
    """Every difference between a stub and its module, as a sentence."""
    names = declared(stub.body)
    found = [f"{name} is in the module, not in the stub" for name in sorted(defined(module) - set(names))]
    for name, node in names.items():
        value = getattr(module, name, None)
        if value is None and not hasattr(module, name):
            if not is_type_alias(node):
                found.append(f"{name} is in the stub, not in the module")
        elif isinstance(node, ast.ClassDef):
            members = declared(node.body)
            # Attributes that instances get in __init__ of a plain Python class are not on the class.
            found += [
                f"{name}.{member} is in the stub, not in the class"
                for member, inner in members.items()
                if not hasattr(value, member) and not (isinstance(inner, ast.AnnAssign) and hasattr(value, "__dict__") and _has_dict(value))
            ]
        elif isinstance(node, ast.FunctionDef):
            found += _signature(name, node, value)
    return found


def _has_dict(value: object) -> bool:
    return isinstance(value, type) and value.__dictoffset__ != 0


def _signature(name: str, node: ast.FunctionDef, value: object) -> list[str]:
    try:
        real = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    return [] if real == parameters(node) else [f"{name} takes {real}, the stub says {parameters(node)}"]


@pytest.mark.parametrize("path", STUBS, ids=lambda path: path.stem)
def test_the_stub_matches_the_built_module(path: Path) -> None:
    if path.stem == "__init__":
        return
    assert path.stem in SOURCES, f"{path.name} has no source in _speedups/"
    module = importlib.import_module(f"gateway._speedups.{path.stem}")
    assert mismatches(ast.parse(path.read_text("utf-8")), module) == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_native_module_with_a_python_face_has_a_stub(name: str) -> None:
    module = importlib.import_module(f"gateway._speedups.{name}")
    stubs = {path.stem for path in STUBS}
    assert name in stubs or not defined(module), f"it shows {sorted(defined(module))} and has no .pyi"


@pytest.mark.parametrize(
    ("stub", "reason"),
    [
        ("def parse_request(data, chunks=None, *, head=1, target=1, fields=1): ...", "is in the module, not in the stub"),
        ("def no_such_function(): ...", "no_such_function is in the stub, not in the module"),
        ("def normalise_path(other): ...", "normalise_path takes ['path'], the stub says ['other']"),
        ("class ParseError(ValueError):\n    def explode(self): ...", "ParseError.explode is in the stub, not in the class"),
    ],
)
def test_a_planted_mismatch_is_caught(stub: str, reason: str) -> None:
    module = importlib.import_module("gateway._speedups.testing")
    assert any(reason in found for found in mismatches(ast.parse(stub), module))
