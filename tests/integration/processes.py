"""A real gateway and a small origin behind it, for tests of processes.

The gateway binds port 0 and says on stdout where it listens; the origin answers at once, or, below /held, when the test lets
it. Conditions are awaited, with a patience that only a failure uses up.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0  # seconds
ADDRESS = re.compile(r"^(?P<name>[\w-]+) +(?P<url>(?:https?://|tcp://|unix:)\S+)")


def eventually(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Return the first true value of `condition`; fail when it never comes."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.01)
    return value


def request(port: int, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, host: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """One request over a connection of its own: status, headers by small names, body. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


class QuietServer(ThreadingHTTPServer):
    """Takes many at once, and says nothing of connections that are broken on purpose."""

    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Origin:
    """An HTTP server in threads; requests below /held wait for `release`."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.held = threading.Semaphore(0)
        self.status = 200
        origin = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path.startswith("/held"):
                    origin.held.release()
                    origin.release.wait(PATIENCE)
                body = b'{"from": "origin"}'
                self.send_response(origin.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = QuietServer(("127.0.0.1", 0), Answer)
        self.port = self.server.server_port
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def write_config(
    path: Path, origin: int, *, workers: int = 2, listeners: str = "public: {bind: 127.0.0.1:0}", more: str = ""
) -> Path:
    path.write_text(
        f"version: 1\nworkers: {workers}\nadmin: {{bind: 127.0.0.1:0}}\nlisteners: {{{listeners}}}\n"
        f"upstreams: {{origin: {{targets: [127.0.0.1:{origin}]}}}}\n"
        f"routes:\n  - {{name: all, match: {{prefix: /}}, upstream: origin}}\n{more}"
    )
    return path


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # tables as in a pipe
    path = [os.environ.get("PYTHONPATH", ""), str(ROOT)]  # script/sanitize puts its own build in front
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, path)), **more}


class Gateway:
    """A `crossway run` of its own; a context manager that ends it and its children whatever happened."""

    def __init__(
        self, path: Path, *arguments: str, pass_fds: Sequence[int] = (), wrapper: Sequence[str] = (), **variables: str
    ) -> None:
        self.path = path
        self.errors = path.parent / "stderr.log"
        self.addresses: dict[str, str] = {}
        self.output: list[str] = []
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "gateway", "run", "-c", str(path), *arguments],
                cwd=path.parent,
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pass_fds=pass_fds,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if match := ADDRESS.match(line):
                self.addresses[match["name"]] = match["url"]
            if line.startswith("workers"):
                break
        else:
            self.process.wait(PATIENCE)
            raise RuntimeError(f"it did not start ({self.process.returncode}): {self.errors.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        children = self.children()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        for pid in children:
            eventually(lambda pid=pid: not alive(pid) or os.kill(pid, signal.SIGKILL), f"the end of {pid}")
        assert self.process.stdout is not None
        self.process.stdout.close()

    # -- the processes

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def workers(self) -> list[int]:
        """Process ids of the ready workers, by slot; empty until all are ready."""
        rows = self.admin("/status")[1]["workers"]
        return [row["pid"] for row in rows] if all(row["state"] == "ready" for row in rows) else []

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log so far; anything but complete JSON is an error."""
        return [json.loads(line) for line in self.errors.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def events(self) -> list[str]:
        return [line["event"] for line in self.log()]

    # -- its pages

    def port(self, name: str = "public") -> int:
        return int(self.addresses[name].rpartition(":")[2])

    def connect(self, name: str = "public") -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port(name), timeout=PATIENCE)

    def get(self, path: str = "/x", name: str = "public") -> tuple[int, bytes]:
        connection = self.connect(name)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def admin(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
        connection = self.connect("admin")
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
            return response.status, json.loads(body) if body.startswith(b"{") else body.decode()
        finally:
            connection.close()

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run another `crossway` command against this gateway."""
        done = [sys.executable, "-m", "gateway", *words, "--admin", self.addresses["admin"]]
        return subprocess.run(done, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)


class Callers:
    """Threads that call something for as long as a `with` lasts: `call`, each with a number of its own, until `over`."""

    def __init__(self, count: int) -> None:
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self.call, args=(number,), daemon=True) for number in range(count)]

    def call(self, number: int) -> None:
        raise AssertionError("a class of its own says what is called")

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for each in self._threads:
            each.join(PATIENCE)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
