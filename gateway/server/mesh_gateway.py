"""A mesh gateway: the one port by which members of other networks reach the services of its own.

Strategy: a member like a sidecar, with the same life, and without an app: it takes connections by the name in their handshakes and passes
them on. Leaving is in order as well: out of the registry first, then no new connections, then the end of those that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gateway._speedups.exchange import Snapshot
from gateway._speedups.histogram import TCP_ENDS
from gateway.mesh import metrics
from gateway.mesh.assignment import Assignment
from gateway.mesh.identity import Svid
from gateway.mesh.networks import LABEL
from gateway.mesh.passage import ITSELF, PASSAGE, Post, build_passage
from gateway.mesh.proxy import INBOUND
from gateway.server.sidecar import Sidecar, run_member
from gateway.server.sidecar_drain import Drain
from gateway.server.sidecar_pages import Answers
from gateway.server.sidecar_setup import Setup, address

log = logging.getLogger("crossway.mesh")

NO_APP = ("127.0.0.1", 0)  # and any port of loopback


@dataclass(frozen=True, kw_only=True)
class GatewaySetup(Setup):
    """What the command line says."""

    app: tuple[str, int] = NO_APP
    outbound: tuple[str, int] = NO_APP
    network: str
    connections: int = 10_000


class GatewayAnswers(Answers):
    """The pages of a mesh gateway: a sidecar's, with other metrics."""

    def metrics(self) -> tuple[int, str, bytes]:
        sidecar = self.sidecar
        if not sidecar.listening:
            return 503, "text/plain", b"no assignment yet\n"
        rows = [
            *metrics.membership(sidecar.identity, sidecar.link),
            ("process_cpu_seconds_total", "counter", "Processor time.", time.process_time()),
        ]
        text = [*metrics.numbers(rows), *self._passed()]
        return 200, metrics.MEDIA_TYPE, ("\n".join(text) + "\n").encode()

    def _passed(self) -> Iterator[str]:
        """What passed, by service, and what did not, by why."""
        opened, closed, refused, passed = [], [], [], []
        mark = f"{PASSAGE}>"
        for metric, began, ends, bytes_in, bytes_out, _failures, _duration, over in self.sidecar.memory.total().tcp_series():
            name = self.sidecar.memory.route_name(metric)
            service = name.removeprefix(mark) if name.startswith(mark) else ""
            if service:
                opened.append(metrics.line("crossway_mesh_gateway_connections_opened_total", {"service": service}, began))
                closed.append(metrics.line("crossway_mesh_gateway_connections_closed_total", {"service": service}, over))
                for way, number in (("in", bytes_in), ("out", bytes_out)):
                    passed.append(metrics.line("crossway_mesh_gateway_bytes_total", {"service": service, "direction": way}, number))
            for reason, number in zip(TCP_ENDS, ends, strict=True):
                if number and reason in ("unreachable", "full", "unknown-name", "bad-hello", "handshake"):
                    refused.append(metrics.line("crossway_mesh_gateway_refused_total", {"service": service, "reason": reason}, number))
        yield from metrics.family("crossway_mesh_gateway_connections_opened_total", "counter", "Connections that reached an instance.", opened)
        yield from metrics.family("crossway_mesh_gateway_connections_closed_total", "counter", "Those of them that ended.", closed)
        yield from metrics.family("crossway_mesh_gateway_bytes_total", "counter", "Bytes that passed: in from other networks, out to them.", passed)
        yield from metrics.family("crossway_mesh_gateway_refused_total", "counter", "Connections that reached nobody, by why.", refused)


class MeshGateway(Sidecar):
    """The life of one mesh gateway."""

    setup: GatewaySetup
    answers = GatewayAnswers

    def _wanted(self) -> dict[str, tuple[str, int]]:
        return {INBOUND: self.setup.inbound, ITSELF: NO_APP}

    def _job(self) -> dict[str, Any]:
        job = super()._job()
        return {**job, "labels": {**self.setup.labels, LABEL: self.setup.network}}

    def _build(self, assignment: Assignment, svid: Svid) -> Snapshot:
        self.around.versions += 1
        itself = address(*self.sockets[ITSELF].getsockname()[:2])
        host, port = self.sockets[INBOUND].getsockname()[:2]
        return build_passage(assignment, svid, Post(self.setup.network, self.memory, self.setup.connections, itself, (host, port)), self.around.versions)

    def _declared(self, own: dict[str, Any]) -> None:
        """Nothing to compare: build_passage() has."""

    def _announce(self) -> None:
        host, port = self.sockets[INBOUND].getsockname()[:2]
        with contextlib.suppress(OSError):
            print(f"gateway   tcp://{address(host, port)}\nnetwork   {self.setup.network}\nidentity  {self.svid().identity}", flush=True)

    async def _watch_app(self) -> None:
        self.app_there = True  # who is behind it says so himself
        await self.link.beat()
        await asyncio.Event().wait()

    async def _drain(self) -> None:
        way = Drain(self)
        await way.leave()
        await way.close_inbound()
        await way.finish("connection")


def run(setup: GatewaySetup) -> int:
    """Be a mesh gateway; return the exit code."""
    return run_member("mesh-gateway", lambda loop: MeshGateway(setup, loop))
