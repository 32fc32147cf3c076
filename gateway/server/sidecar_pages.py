"""What a sidecar's pages say: /livez, /startz, /readyz, /metrics and /status.

Strategy: read when asked, from the sidecar's own attributes; nothing is kept for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.mesh import metrics
from gateway.server.pages import Page

if TYPE_CHECKING:
    from gateway.server.sidecar import Sidecar


class Answers:
    """The pages of one sidecar."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar

    def probes(self) -> Mapping[str, Page]:
        """Those for an orchestrator, by path."""
        return {
            "/livez": lambda: (200, "application/json", b'{"status":"alive"}\n'), "/startz": self.startz, "/readyz": self.readyz,
            "/metrics": self.metrics,
        }  # fmt: skip

    def ready(self) -> tuple[bool, str]:
        sidecar = self.sidecar
        if sidecar.draining or sidecar.left is not None:
            return False, "draining"
        if not sidecar.listening:
            return False, "no assignment yet"
        return (True, "serving") if sidecar.app_there or sidecar.setup.app is None else (False, "the app takes no connections")

    def startz(self) -> tuple[int, str, bytes]:
        """Whether the app may begin: its calls would be served."""
        sidecar = self.sidecar
        body = b'{"status":"started"}\n' if sidecar.listening else b'{"status":"starting"}\n'
        return 200 if sidecar.listening else 503, "application/json", body

    def readyz(self) -> tuple[int, str, bytes]:
        ready, detail = self.ready()
        body = json.dumps({"status": "ready" if ready else "not ready", "detail": detail}) + "\n"
        return 200 if ready else 503, "application/json", body.encode()

    def status(self) -> tuple[int, str, bytes]:
        sidecar = self.sidecar
        ready, detail = self.ready()
        svid = getattr(sidecar, "identity", None) and sidecar.identity.svid
        link = getattr(sidecar, "link", None)
        shown = {
            "ready": ready, "detail": detail, "service": sidecar.setup.service, "identity": svid and svid.identity,
            "certificate": svid and {"serial": svid.leaf.serial, "not_after": svid.leaf.not_after, "renewals": sidecar.identity.renewals,
                                     "failures": sidecar.identity.failures, "error": sidecar.identity.error},
            "assignment": link and link.current and {"version": link.current.version, "issued": link.current.body.get("issued"),
                                                     "services": sorted(link.current.body["services"]),
                                                     "external": sorted(link.current.body.get("external") or {}), "overdue": link.age()},
            "control": link and {"address": sidecar.setup.control, "connected": link.connected, "connects": link.connects,
                                 "applied": link.applied, "refused": link.refused, "clock_ahead": sidecar.identity.clock.ahead()},
            "revoked_connections_closed": sidecar.cut,
            "live": sidecar.engine.live(),
        }  # fmt: skip
        return 200, "application/json", (json.dumps(shown) + "\n").encode()

    def metrics(self) -> tuple[int, str, bytes]:
        sidecar = self.sidecar
        if not sidecar.listening:
            return 503, "text/plain", b"no assignment yet\n"
        rows = [
            *metrics.membership(sidecar.identity, sidecar.link),
            ("crossway_mesh_revoked_connections_closed_total", "counter", "Connections of members that were revoked.", sidecar.cut),
            ("crossway_http2_connections_total", "counter", "HTTP/2 connections of members and of the app.", sidecar.gauges.counter("h2_connections")),
            ("crossway_mesh_app_up", "gauge", "1 while the app takes connections.", sidecar.app_there),
            ("process_cpu_seconds_total", "counter", "Processor time.", time.process_time()),
        ]  # fmt: skip
        domain, version = sidecar.svid().domain, sidecar.setup.labels.get("version", "")

        def hop(route: str) -> dict[str, str] | None:
            return metrics.hop(route, sidecar.setup.service, domain, version)

        hops = [*metrics.istio(sidecar.memory, hop), *metrics.istio_tcp(sidecar.memory, hop)]
        tunnels = metrics.tunnels(sidecar.gauges, sidecar.memory.route_name)
        text = [*metrics.numbers(rows), *tunnels, *metrics.denied(sidecar.around.denials), *hops]
        return 200, metrics.MEDIA_TYPE, ("\n".join(text) + "\n").encode()
