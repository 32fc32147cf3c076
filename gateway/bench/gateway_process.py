"""A gateway of our own to measure: started from a file, asked for its addresses, its CPU time and its connections.

Strategy: it runs exactly as a user runs it, `crossway run -c FILE --workers N`, in a process group of its own. It is
asked only what an operator can ask: the lines that it prints, /status and /metrics.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

START = 30.0  # seconds until it must have said where it listens
ADMIN = re.compile(r"^admin +http://(\S+)$")
CONNECTIONS = re.compile(r'^crossway_connections\{worker="(\d+)"\} ([0-9.e+]+)$', re.MULTILINE)


class GatewayError(Exception):
    """The gateway cannot be measured; the text says why."""


class MeasuredGateway:
    """A context manager around a running gateway; leaving it ends every process of it."""

    def __init__(self, config: Path, workers: int, cpus: set[int] | None = None) -> None:
        self.config, self.workers, self.cpus = config, workers, cpus
        self.admin = ""
        self.listeners: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        own = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, self.cpus or own)  # the child inherits it
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "run", "-c", str(self.config), "--workers", str(self.workers)],
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, own)
        try:
            self._read_addresses()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_addresses(self) -> None:
        """Wait for the lines that it prints once it is ready, then ask its status for the listeners."""
        text, end = b"", time.monotonic() + START
        output = self._process.stdout
        assert output is not None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not re.search(rb"^workers +\d+$", text, re.MULTILINE):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise GatewayError(f"{self.config}: the gateway was not ready after {START:g} s")
                piece = os.read(output.fileno(), 65536)
                if not piece:
                    self._process.wait()
                    raise GatewayError(f"{self.config}: the gateway did not start:\n{self.said()}")
                text += piece
        for line in text.decode("utf-8", "replace").splitlines():
            if match := ADMIN.match(line):
                self.admin = match[1]
        if not self.admin:
            raise GatewayError(f"{self.config}: a sweep reads the admin listener over TCP, set admin: {{bind: 127.0.0.1:0}}")
        status = json.loads(self.get("/status"))
        self.listeners = {row["name"]: row["address"] for row in status["listeners"] if row["name"] != "admin"}

    def said(self) -> str:
        """The end of what it logged."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-2000:]

    def get(self, path: str) -> str:
        """Return a page of the admin listener. Raises GatewayError."""
        host, _, port = self.admin.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=5)
        token = os.environ.get("CROSSWAY_ADMIN_TOKEN")
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            response = connection.getresponse()
            body = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise GatewayError(f"the admin listener {self.admin} does not answer: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise GatewayError(f"the admin listener answers {response.status} to {path}; $CROSSWAY_ADMIN_TOKEN is sent if set")
        return body

    def url(self, listener: str | None, path: str, scheme: str = "http") -> str:
        """The URL of a path on a listener, by name when there are several. Raises GatewayError."""
        tcp = {name: address for name, address in self.listeners.items() if not address.startswith("unix:")}
        if listener is None and len(tcp) == 1:
            listener = next(iter(tcp))
        if listener not in tcp:
            raise GatewayError(f"--listener must name one of: {', '.join(tcp) or 'none that takes TCP'}")
        host, _, port = tcp[listener].rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        return f"{scheme}://{host}:{port}{path}"

    def connections(self) -> list[int]:
        """Open client connections of each worker, by slot."""
        found = {int(slot): int(float(number)) for slot, number in CONNECTIONS.findall(self.get("/metrics?by=worker"))}
        return [found.get(slot, 0) for slot in range(self.workers)]

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._process.pid

    def close(self) -> None:
        process = self._process
        # Without the grace that clients deserve: nobody but us is connected.
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()
