"""What operators see of a real gateway's upstreams: `crossway upstreams`, the metrics and the log, while endpoints and workers die."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from tests.integration.processes import Gateway, Origin, eventually

Row = dict[str, Any]
EJECT = "health: {eject: {failures: 3, base: 300ms, max: 300ms}}, retries: {attempts: 2, on: [connect-failure, 502, 503]}"


def write(path: Path, upstream: str) -> Path:
    path.write_text(
        "version: 1\nworkers: 2\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0}}\n"
        f"upstreams: {{pay: {{{upstream}}}}}\nroutes:\n  - {{name: all, match: {{prefix: /}}, upstream: pay}}\n"
    )
    return path


def shown(gateway: Gateway) -> Row:
    """The upstream as `crossway upstreams --json` shows it."""
    done = gateway.command("upstreams", "pay", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    return dict(row)


def upstream(gateway: Gateway) -> Row:
    (row,) = gateway.admin("/upstreams")[1]["upstreams"]
    return dict(row)


def metric(gateway: Gateway, name: str, **labels: str) -> float:
    wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    text = gateway.admin("/metrics")[1]
    return float(next(line for line in text.splitlines() if line.startswith(f"crossway_{name}{{{wanted}}} ")).split()[1])


def free_port() -> int:
    """A port where nobody listens."""
    gone = Origin()
    gone.close()
    return gone.port


def test_an_endpoint_that_dies_is_seen(tmp_path: Path, origin: Origin) -> None:
    dead = f"127.0.0.1:{free_port()}"
    alive = f"127.0.0.1:{origin.port}"
    path = write(tmp_path / "edge.yaml", f"targets: ['{alive}', {{address: '{dead}', zone: eu-1b, weight: 2}}], {EJECT}")
    with Gateway(path) as gateway:

        def ejected() -> bool:
            assert gateway.get()[0] == 200, "a failed connect is tried elsewhere"
            return any(endpoint["state"] == "ejected" for endpoint in upstream(gateway)["endpoints"])

        eventually(ejected, "the ejection")
        row = shown(gateway)
        endpoints = {endpoint["address"]: endpoint for endpoint in row["endpoints"]}
        assert endpoints[alive]["state"] == "up" and endpoints[alive]["failures"] == 0
        assert endpoints[dead]["state"] != "up" and endpoints[dead]["zone"] == "eu-1b" and endpoints[dead]["weight"] == 2
        assert endpoints[dead]["counters"]["connect"] >= 3 and endpoints[dead]["counters"]["ejections"] >= 1
        assert row["effective"] == 1.0 and row["actual"] < 1.0
        assert row["counters"]["retries"] >= 3 and row["retry_budget"] > 0
        assert metric(gateway, "endpoint_available", endpoint=alive, upstream="pay") == 1
        assert metric(gateway, "endpoint_available", endpoint=dead, upstream="pay") == 0
        assert metric(gateway, "upstream_retries_total", upstream="pay") >= 3
        table = gateway.command("upstreams").stdout
        assert "success 100.00 % effective" in table and dead in table and "connect" in table
        out = next(line for line in gateway.log() if line["event"] == "endpoint ejected")
        assert (out["upstream"], out["endpoint"]) == ("pay", dead) and out["consecutive_failures"] >= 3 and out["seconds"] >= 0.3
        # A probe that fails is told, and counted.
        eventually(lambda: gateway.get() and "endpoint probe failed" in gateway.events(), "a failed probe")
        assert upstream(gateway)["endpoints"] and metric(gateway, "endpoint_probes_total", endpoint=dead, upstream="pay") >= 1


def test_an_endpoint_that_returns_is_told(tmp_path: Path, origin: Origin) -> None:
    """Ejected by answers that are failures, and back as soon as one probe is answered well."""
    bad = Origin()
    bad.status = 503
    targets = f"targets: ['127.0.0.1:{origin.port}', '127.0.0.1:{bad.port}']"
    path = write(tmp_path / "edge.yaml", f"{targets}, {EJECT}")
    try:
        with Gateway(path) as gateway:
            eventually(lambda: gateway.get()[0] == 200 and "endpoint ejected" in gateway.events(), "the ejection")
            bad.status = 200

            def returned() -> bool:
                assert gateway.get()[0] == 200
                return "endpoint returned" in gateway.events()

            eventually(returned, "the return")
            assert {endpoint["state"] for endpoint in upstream(gateway)["endpoints"]} == {"up"}
            back = next(line for line in gateway.log() if line["event"] == "endpoint returned")
            assert (back["upstream"], back["endpoint"]) == ("pay", f"127.0.0.1:{bad.port}")
    finally:
        bad.close()


def test_a_killed_worker_gives_its_places_back(tmp_path: Path, origin: Origin) -> None:
    """Six requests fill the limit of both workers; those of the killed one make room, and no place is lost for good."""
    path = write(
        tmp_path / "edge.yaml",
        f"targets: ['127.0.0.1:{origin.port}'], limits: {{requests: 6, pending: 0}}, retries: 0",
    )
    with Gateway(path) as gateway:

        def hold() -> None:
            try:
                gateway.get("/held")
            except OSError:
                pass                            # its worker was killed

        callers = [threading.Thread(target=hold, daemon=True) for _ in range(6)]
        for caller in callers:
            caller.start()
        eventually(lambda: upstream(gateway)["in_flight"] == 6, "the last place taken")
        assert gateway.get()[0] == 503

        def settled() -> list[Row]:
            rows = gateway.admin("/workers")[1]["workers"]
            return rows if sum(row["exchanges"] for row in rows) == 6 else []

        victim = max(eventually(settled, "the six of the two workers"), key=lambda row: row["exchanges"])
        held = victim["exchanges"]
        assert held >= 3
        os.kill(victim["pid"], signal.SIGKILL)
        eventually(lambda: upstream(gateway)["in_flight"] == 6 - held, "the places of the killed worker")
        assert gateway.get()[0] == 200
        origin.release.set()
        for caller in callers:
            caller.join()
        eventually(lambda: upstream(gateway)["in_flight"] == 0, "the last of them")
        assert upstream(gateway)["counters"]["requests_full"] >= 1
