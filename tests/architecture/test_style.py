"""House style that a program can judge: what every module begins with, words that are not used, nothing left undone.

Sizes are reported (pytest -rP), not enforced: they are habits, with one marked exception each.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "dist", ".venv", ".git", ".demo", "node_modules", ".hypothesis"}
# Written in pieces, so that this file does not find itself.
UNDONE = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK", "NotImplemented" + "Error"]) + r")\b")
ISSUE = re.compile(r"issue \d+", re.IGNORECASE)
PYTHON_LINES, NATIVE_LINES, FUNCTION_LINES = 400, 700, 40


def files(*suffixes: str) -> list[Path]:
    """The repository's files with these suffixes: as git lists them, else by walking."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=False, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        found = [path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in found if path.suffix in suffixes and path.is_file())


def undone(text: str) -> list[int]:
    """Lines that leave something undone without naming the issue where it is done."""
    return [number for number, line in enumerate(text.splitlines(), 1) if UNDONE.search(line) and not ISSUE.search(line)]


def test_nothing_is_left_undone() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files(".py", ".pyx", ".pxd", ".pyi") for line in undone(path.read_text("utf-8"))]
    assert found == []


def test_undone_work_would_be_found() -> None:
    word = "TO" + "DO"
    assert undone(f"x = 1\n# {word}: later\n# {word} (issue 12): then\n") == [2]


def header(path: Path) -> str:
    """A module's docstring."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    match = re.match(r'(?:#[^\n]*\n|\s)*"""(.*?)"""', text, re.DOTALL)
    return match[1] if match else ""


@pytest.mark.parametrize("path", [p for p in files(".py", ".pyx", ".pxd") if p.name != "__init__.pxd"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_in_a_sentence_what_it_is(path: Path) -> None:
    if not path.read_text("utf-8").strip():
        return
    assert header(path).strip(), "no docstring at the top"


@pytest.mark.parametrize("path", files(".pyx"), ids=lambda p: p.name)
def test_native_modules_say_when_python_is_called(path: Path) -> None:
    text = " ".join(header(path).split())
    assert "Strategy:" in text
    assert "Python is called from here:" in text


def test_sizes_are_reported() -> None:
    for path in files(".py", ".pyx"):
        lines = len(path.read_text("utf-8").splitlines())
        most = NATIVE_LINES if path.suffix == ".pyx" else PYTHON_LINES
        if lines > most:
            print(f"{path.relative_to(ROOT)}: {lines} lines, the habit is {most}")
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                    length = node.end_lineno - node.lineno + 1
                    if length > FUNCTION_LINES:
                        print(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines, the habit is {FUNCTION_LINES}")


def test_scripts_are_posix_shell() -> None:
    folder = ROOT / "script"
    assert folder.is_dir()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            assert path.read_text("utf-8").startswith("#!/bin/sh\n"), f"script/{path.name} is not /bin/sh"
            assert path.stat().st_mode & 0o111, f"script/{path.name} is not executable"
            subprocess.run(["sh", "-n", str(path)], check=True)
