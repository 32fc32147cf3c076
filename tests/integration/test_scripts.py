"""The scripts that a newcomer runs: script/setup does each step once, says what a machine lacks, and names no registry.

Strategy: setup runs on a copy of what it reads, with a stand-in for Python that answers questions through the real one, and
records (instead of doing) what takes minutes: the venv, pip and the build. So every step can be provoked and counted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config import load
from gateway.demo.files import POLICY
from gateway.demo.issuer import Issuer

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "script").iterdir() if path.is_file())

STAND_IN = """\
#!/bin/sh
case "$1" in -c|-|--version) exec {real} "$@" ;; esac
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m venv .venv") echo venv >>calls; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *" install -r "*) echo requirements >>calls; cp build/requirements.txt requirements.seen ;;
    *" -e .") echo package >>calls ;;
    *build_ext*)
        echo build "$CROSSWAY_BUILD" >>calls
        [ ! -e broken ] || {{ echo 'one.pyx:1:1: nonsense' ; exit 1; }}
        mkdir -p gateway/_speedups
        for each in _speedups/*.pyx; do
            each=${{each#_speedups/}}
            : >gateway/_speedups/"${{each%.pyx}}".stand-in.so
        done ;;
    *) echo "unexpected $*" >>calls; exit 9 ;;
esac
"""


class Clone:
    """A fresh clone, as far as script/setup can see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "script").mkdir()
        (folder / "_speedups").mkdir()
        (folder / "bin").mkdir()
        shutil.copy(ROOT / "script" / "setup", folder / "script" / "setup")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "_speedups" / "one.pyx").write_text("# one\n")
        self.program("python", STAND_IN.format(real=sys.executable))
        self.program("gcc", "#!/bin/sh\nexit 0\n")

    def program(self, name: str, text: str) -> None:
        """Put a program in front of everything that PATH has."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run script/setup from another folder, as people do."""
        base = {name: value for name, value in os.environ.items() if not name.startswith("CROSSWAY_") and name != "CC"}
        return subprocess.run(
            ["sh", str(self.folder / "script" / "setup"), *arguments],
            cwd="/",
            env={
                **base,
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "CROSSWAY_PYTHON": str(self.folder / "bin" / "python"),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def calls(self) -> list[str]:
        """Return the steps that were taken since the last time of asking."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.strip() for line in lines]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_second_call_does_and_says_nothing(clone: Clone) -> None:
    first = clone.setup()
    assert first.returncode == 0, first.stderr
    assert clone.calls() == ["venv", "requirements", "package", "build"]
    second = clone.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert clone.calls() == []


def test_a_changed_source_is_built_and_nothing_else_is_repeated(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    (clone.folder / "_speedups" / "one.pyx").write_text("# another\n")
    assert clone.setup().returncode == 0
    assert clone.calls() == ["build"]


def test_a_touched_but_equal_source_is_not_built(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    os.utime(clone.folder / "_speedups" / "one.pyx", (2_000_000_000, 2_000_000_000))
    assert clone.setup().returncode == 0
    assert clone.calls() == []


def test_a_new_declaration_or_a_lost_module_is_built(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    (clone.folder / "_speedups" / "one.pxd").write_text("# contract\n")
    clone.setup()
    assert clone.calls() == ["build"]
    (clone.folder / "gateway" / "_speedups" / "one.stand-in.so").unlink()
    clone.setup()
    assert clone.calls() == ["build"]


def test_another_flavour_is_built_from_nothing(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    stale = clone.folder / "build" / "lib.linux" / "one.so"
    stale.parent.mkdir()
    stale.touch()
    assert clone.setup(CROSSWAY_BUILD="debug").returncode == 0
    assert clone.calls() == ["build debug"]
    assert not stale.exists()
    assert clone.setup(CROSSWAY_BUILD="debug").stderr == ""


def test_changed_requirements_are_installed_into_the_same_venv(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    project = clone.folder / "pyproject.toml"
    project.write_text(project.read_text() + "\n[tool.other]\n")
    assert clone.setup().returncode == 0
    assert clone.calls() == ["requirements", "package", "build"]


def test_the_tests_needs_are_installed_only_when_asked_for(clone: Clone) -> None:
    clone.setup()
    seen = clone.folder / "requirements.seen"
    assert "uvloop" in seen.read_text()
    assert "cython" in seen.read_text()
    assert "pytest" not in seen.read_text()
    clone.calls()
    clone.program("curl", "#!/bin/sh\n")
    assert clone.setup("--test").returncode == 0
    assert "requirements" in clone.calls()
    assert "pytest" in seen.read_text()
    assert clone.setup("--test").stderr == ""
    assert clone.setup().stderr == ""


def test_a_failed_build_shows_its_log_and_is_tried_again(clone: Clone) -> None:
    (clone.folder / "broken").touch()
    failed = clone.setup()
    assert failed.returncode == 1
    assert "the build failed" in failed.stderr
    assert "one.pyx:1:1: nonsense" in failed.stderr
    clone.calls()
    (clone.folder / "broken").unlink()
    assert clone.setup().returncode == 0
    assert clone.calls() == ["build"]


def test_without_root_the_missing_packages_are_one_line_to_type(clone: Clone) -> None:
    clone.program("gcc", "#!/bin/sh\nexit 127\n")
    clone.program("id", "#!/bin/sh\necho 1000\n")
    clone.program("apt-get", '#!/bin/sh\necho apt-get "$@" >>calls\n')
    refused = clone.setup()
    assert refused.returncode == 1
    line = "    sudo apt-get update && sudo apt-get install -y --no-install-recommends gcc libc6-dev"
    assert line in refused.stderr.splitlines()
    assert clone.calls() == []


def test_a_compiler_of_several_words_is_a_compiler(clone: Clone) -> None:
    clone.program("wrapper", '#!/bin/sh\n[ "$1" = gcc ]\n')
    clone.program("id", "#!/bin/sh\necho 1000\n")
    done = clone.setup(CC="wrapper gcc")
    assert done.returncode == 0, done.stderr


def test_as_root_the_missing_packages_are_installed(clone: Clone) -> None:
    clone.program("gcc", "#!/bin/sh\n[ -e installed ]\n")
    clone.program("id", "#!/bin/sh\necho 0\n")
    clone.program(
        "apt-get",
        '#!/bin/sh\necho "apt-get $DEBIAN_FRONTEND" "$@" >>calls\ncase "$*" in *install*) : >installed ;; esac\n',
    )
    assert clone.setup().returncode == 0
    assert clone.calls()[:3] == [
        "apt-get noninteractive -qq -o DPkg::Lock::Timeout=300 update",
        "apt-get noninteractive -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends gcc libc6-dev",
        "venv",
    ]


def test_a_python_that_is_too_old_is_refused_by_name(clone: Clone) -> None:
    for minor in range(11, 20):
        clone.program(f"python3.{minor}", "#!/bin/sh\nexit 1\n")
    clone.program("python3", "#!/bin/sh\nexit 1\n")
    refused = clone.setup(CROSSWAY_PYTHON="")
    assert refused.returncode == 1
    assert "Python 3.11 or newer" in refused.stderr


def test_an_unknown_argument_is_refused(clone: Clone) -> None:
    refused = clone.setup("--tset")
    assert refused.returncode == 2
    assert "usage" in refused.stderr
    assert clone.calls() == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_posix_shell_and_say_what_they_do(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert path.stat().st_mode & stat.S_IXUSR
    assert lines[0] == "#!/bin/sh"
    assert re.match(r"# [A-Z].{20,}", lines[1])
    assert "set -eu" in lines
    checked = subprocess.run(["sh", "-n", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run", ROOT / "Dockerfile"], ids=lambda path: path.name)
def test_no_registry_is_named(path: Path) -> None:
    assert not re.search(r"https?://|index-url", path.read_text())


README = (ROOT / "README.md").read_text()


def test_the_configuration_of_the_readme_is_ten_lines_that_load(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert len(block[1].splitlines()) == 10
    (tmp_path / "jwks.json").write_text(json.dumps(Issuer().jwks()))
    (tmp_path / "edge.yaml").write_text(block[1])
    assert [route.name for route in load(tmp_path / "edge.yaml").routes] == ["create-payment"]


def test_the_policy_of_the_readme_is_the_one_that_the_demo_runs() -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert block[1] == POLICY.partition("\n\n")[2]


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    named = re.findall(r"`((?:_speedups|gateway|script|docs|tests)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
