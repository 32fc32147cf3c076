"""One instance of a service on the demo's stage: the plain app under uvicorn, and the sidecar that speaks for it.

Strategy: both are started as anybody would start them, by command line. The app learns of its sidecar what any program learns of a proxy,
`http_proxy`; the sidecar learns the app's port.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.demo.caller import Call, ask, responds
from gateway.demo.processes import HOST, Child, Ports

SUM = "istio_request_duration_milliseconds_sum"
COUNT = "istio_request_duration_milliseconds_count"
SAMPLE = re.compile(r"([a-z_]+)\{(.*)\} ([0-9.e+-]+)")
LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


class Hop:
    """What one side of a hop has counted: requests, and the milliseconds that they took together."""

    def __init__(self, key: str) -> None:
        labels = dict(LABEL.findall(key))
        self.reporter, self.status = labels["reporter"], labels["response_code"]
        self.source, self.destination = labels["source_principal"], labels["destination_principal"]
        self.count, self.milliseconds = 0, 0.0


class Member:
    """An app and its sidecar. `name` is the instance's, such as ledger-1."""

    def __init__(self, name: str, service: str, version: str, folder: Path, ports: Ports, control: int) -> None:
        self.name, self.service, self.version = name, service, version
        self.app_port, self.inbound, self.outbound, self.admin = (ports.take() for _ in range(4))
        self._folder, self._control = folder, control
        self.app: Child | None = None
        self.sidecar: Child | None = None

    def start_app(self, extra: Mapping[str, str]) -> Child:
        """Start the app under uvicorn."""
        environment = {"INSTANCE": self.name, "VERSION": self.version, "BOOK": str(self._folder / "book.db"), **extra}
        self.app = Child(self.name, self._folder, serving(f"services:{self.service}", self.app_port), environment)
        return self.app

    def start_sidecar(self) -> Child:
        """Start the sidecar, which joins by the token that lies ready."""
        self.sidecar = Child(f"{self.name}'s sidecar", self._folder, [
            "gateway", "mesh", "sidecar", "--service", self.service, "--app", f"{HOST}:{self.app_port}",
            "--inbound", f"{HOST}:{self.inbound}", "--outbound", f"{HOST}:{self.outbound}", "--admin", f"{HOST}:{self.admin}",
            "--control", f"https://{HOST}:{self._control}", "--token", str(self._folder / f"{self.name}.token"),
            "--state", str(self._folder / f"{self.name}.state"), "--label", f"version={self.version}",
            "--drain-delay", "0.1", "--drain-deadline", "5",
        ])  # fmt: skip
        return self.sidecar

    @property
    def children(self) -> list[Child]:
        """Those of its processes that were started."""
        return [child for child in (self.app, self.sidecar) if child is not None]

    def ready(self) -> bool:
        """Whether the sidecar serves and the app takes connections."""
        return responds(self.admin, "/readyz")

    def status(self) -> dict[str, Any]:
        """What the sidecar says of itself; raises OSError or http.client.HTTPException when it says nothing."""
        return ask(self.admin, Call("GET", "/status")).json()

    def hops(self) -> dict[str, Hop]:
        """What the sidecar has counted, by callers, services called and outcome, as the labels say them."""
        found: dict[str, Hop] = {}
        for line in ask(self.admin, Call("GET", "/metrics")).body.decode().splitlines():
            sample = SAMPLE.fullmatch(line)
            if sample is None or sample[1] not in (SUM, COUNT):
                continue
            hop = found.setdefault(sample[2], Hop(sample[2]))
            if sample[1] == SUM:
                hop.milliseconds = float(sample[3])
            else:
                hop.count = int(float(sample[3]))
        return found


def serving(app: str, port: int) -> list[str]:
    """The command line of a uvicorn that serves one of the demo's applications."""
    return [
        "uvicorn", "--factory", f"gateway.demo.{app}", "--host", HOST, "--port", str(port), "--log-level", "warning",
        "--no-access-log", "--timeout-keep-alive", "75", "--timeout-graceful-shutdown", "2",
    ]  # fmt: skip
