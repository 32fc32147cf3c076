"""The command line: help without a word, lazy commands, and how a running gateway is found and asked."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gateway.cli import COMMANDS, main
from gateway.cli.client import Client, Unreachable
from gateway.cli.workers import compare


class Pages(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, tuple[int, Any]]] = {}
    seen: ClassVar[list[tuple[str, str, dict[str, str]]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.command, self.path, dict(self.headers)))
        status, body = self.answers[self.path]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def admin() -> Iterator[str]:
    Pages.answers, Pages.seen = {}, []
    server = http.server.HTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "crossway run -c" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start"]) == 2
    assert "invalid choice: 'start'" in capsys.readouterr().err


def test_only_the_chosen_command_is_imported() -> None:
    code = "import sys; from gateway.cli import main; main(['--help']); print(sorted(m for m in sys.modules if m.startswith('gateway.cli.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["run", "reload", "workers", "status", "health", "version"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"crossway {name}" in capsys.readouterr().out


def test_version_names_the_libraries_and_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    tls, http2 = capsys.readouterr().out.splitlines()[2:]
    for line, name, count in ((tls, "OpenSSL 3.", 2), (http2, "nghttp2 1.", 1)):
        assert line.startswith(name)
        files = line.partition("(")[2].removesuffix(")").split(", ")
        assert len(files) == count and all(Path(file).is_file() for file in files), line


def test_run_without_its_file_says_so_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-c", str(tmp_path / "absent.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "absent.yaml" in line


def test_health_follows_readyz(admin: str, capsys: pytest.CaptureFixture[str]) -> None:
    Pages.answers["/readyz"] = (200, {"status": "ready", "detail": "2 of 2"})
    assert main(["health", "--admin", admin]) == 0
    Pages.answers["/readyz"] = (503, {"status": "not ready", "detail": "draining"})
    assert main(["health", "--admin", admin]) == 1
    assert "draining" in capsys.readouterr().out


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--admin", "http://127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Is the gateway running?" in line


def test_reload_prints_the_problems(admin: str, capsys: pytest.CaptureFixture[str]) -> None:
    problem = {
        "file": "e.yaml",
        "line": 3,
        "column": 5,
        "message": "unknown key",
        "source": "    frob: 1",
        "hint": "",
        "severity": "error",
        "width": 4,
    }
    Pages.answers["/reload"] = (422, {"ok": False, "text": "", "problems": [problem]})
    assert main(["reload", "--admin", admin, "--expect", "abc"]) == 1
    assert Pages.seen[0][0] == "POST"
    assert Pages.seen[0][2]["If-Match"] == '"abc"'
    text = capsys.readouterr().err
    assert "e.yaml:3:5: unknown key" in text
    assert "keeps the configuration" in text
    Pages.answers["/reload"] = (200, {"ok": True, "version": 2, "hash": "f" * 64})
    assert main(["reload", "--admin", admin]) == 0


def test_the_token_and_the_address_come_from_the_file(
    tmp_path: Path, admin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_TOKEN", "s3cret")
    file = tmp_path / "edge.yaml"
    # Not a valid configuration: what `crossway reload` has to cope with.
    file.write_text(f"admin: {{bind: '{admin.removeprefix('http://')}', token: '${{env:THE_TOKEN}}'}}\nroutes: 5\n")
    Pages.answers["/readyz"] = (200, {"status": "ready", "detail": ""})
    assert main(["health", "-c", str(file)]) == 0
    assert Pages.seen[0][2]["Authorization"] == "Bearer s3cret"


def test_something_else_at_that_address(admin: str) -> None:
    Pages.answers["/x"] = (200, "text")
    assert Client(admin).call("GET", "/x") == (200, "text")
    with pytest.raises(Unreachable, match="not http://HOST:PORT"):
        Client("http://[::1").call("GET", "/x")


def test_rates_come_from_two_samples() -> None:
    row = {
        "slot": 0,
        "pid": 7,
        "state": "ready",
        "version": 1,
        "started": 100.0,
        "requests": 50,
        "connections": 3,
        "cpu_seconds": 1.0,
    }
    before = {"monotonic": 10.0, "time": 200.0, "workers": [row, {**row, "slot": 1, "pid": 8}]}
    later = {**row, "requests": 150, "cpu_seconds": 1.5}
    after = {"monotonic": 12.0, "time": 202.0, "workers": [later, {**later, "slot": 1, "pid": 9}]}
    first, second = compare(before, after)
    assert (first["rps"], first["cpu_percent"], first["uptime"]) == (50.0, 25.0, 102.0)
    assert (second["rps"], second["cpu_percent"]) == (None, None)
