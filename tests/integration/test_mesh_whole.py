"""The whole mesh: a real control plane and real sidecars, which believe, obey and outlive it."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.control_kit import ControlProcess
from tests.integration.mesh_kit import Sidecar
from tests.integration.processes import Gateway, eventually, request


@pytest.fixture
def app() -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps({"caller": self.headers.get("x-crossway-caller")}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", token: {token}, state: edge.state}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  payments: {{service: payments}}
routes:
  - {{name: pay, match: {{prefix: /}}, upstream: payments}}
"""


def call(sidecar: Sidecar, service: str, path: str = "/v1/x") -> tuple[int, dict[str, str], bytes]:
    """Status 0: the connection was cut, as that of a revoked caller is."""
    try:
        return request(sidecar.outbound, path, headers={"host": service})
    except (ConnectionError, http.client.HTTPException):
        return 0, {}, b""


def test_services_call_each_other_through_the_mesh(tmp_path: Path, app: int) -> None:
    with ControlProcess(tmp_path) as control, Sidecar(control, "ledger", app) as ledger, Sidecar(control, "payments", app) as payments:  # type: ignore[arg-type]
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        assert json.loads(call(payments, "ledger")[2]) == {"caller": "spiffe://bank.test/service/payments"}
        assert call(payments, "accounts")[0] == 404  # no rule: not even its name
        eventually(lambda: control.command("status", "--check").returncode == 0, "all well")
        eventually(lambda: all(row["applied"] for row in control.status()["instances"]), "everybody's acknowledgement")
        rows = {row["service"]: row for row in control.status()["instances"]}
        assert rows["ledger"]["state"] == "healthy" and rows["ledger"]["inbound"] == f"127.0.0.1:{ledger.inbound}"
        assert rows["payments"]["applied"] == payments.status()["assignment"]["version"]
        # A rule is narrowed: the same call is denied, and says by which policy.
        before = control.status()["policy"]
        control.edit("from: [payments], to: ledger}", "from: [payments], to: ledger, prefix: /v2}")
        eventually(lambda: call(payments, "ledger")[0] == 403, "the denial")
        assert f"policy={before + 1}" in call(payments, "ledger")[1]["crossway-denied"]
        assert call(payments, "ledger", "/v2/x")[0] == 200
        assert control.command("can", "payments", "ledger", "GET", "/v1/x").returncode == 1
        assert control.command("can", "payments", "ledger", "GET", "/v2/x").returncode == 0
        # Without the control plane everything goes on.
        control.kill()
        assert call(payments, "ledger", "/v2/x")[0] == 200


def test_a_revoked_service_is_shut_out_by_its_callers(tmp_path: Path, app: int) -> None:
    with ControlProcess(tmp_path) as control, Sidecar(control, "ledger", app), Sidecar(control, "payments", app) as payments:  # type: ignore[arg-type]
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        assert control.command("revoke", "payments").returncode == 0
        eventually(lambda: call(payments, "ledger")[0] != 200, "the end of it")
        assert control.command("revoke", "payments", "--undo").returncode == 0
        eventually(lambda: call(payments, "ledger")[0] == 200, "its return")


def test_roots_change_under_sidecars(tmp_path: Path, app: int) -> None:
    with ControlProcess(tmp_path, lifetime="1m") as control, Sidecar(control, "ledger", app), Sidecar(control, "payments", app) as payments:  # type: ignore[arg-type]
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        assert control.command("rotate-root", "prepare").returncode == 0
        eventually(lambda: control.command("rotate-root", "activate").returncode == 0, "everybody's acknowledgement")
        assert call(payments, "ledger")[0] == 200
        with Sidecar(control, "accounts", app):  # type: ignore[arg-type]
            eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
            eventually(lambda: len([row for row in control.status()["instances"] if row["state"] == "healthy"]) == 3, "all three")


def test_an_edge_joins_and_is_no_endpoint(tmp_path: Path, app: int) -> None:
    with ControlProcess(tmp_path) as control, Sidecar(control, "payments", app):  # type: ignore[arg-type]
        path = tmp_path / "edge.yaml"
        path.write_text(EDGE.format(control=control.url, token=control.token("edge")))
        with Gateway(path) as gateway:
            eventually(lambda: gateway.get("/v1/payments/7")[0] == 200, "a call through the edge")
            assert json.loads(gateway.get("/v1/payments/7")[1]) == {"caller": "spiffe://bank.test/service/edge"}
            assert gateway.get("/v2/other")[0] == 403  # the rule says /v1/payments
            rows = {row["service"]: row for row in control.status()["instances"]}
            assert rows["edge"]["inbound"] is None and rows["edge"]["state"] == "healthy"
            # What the command says is what the mesh does.
            assert control.command("can", "edge", "payments", "GET", "/v1/payments/7").returncode == 0
            denied = control.command("can", "edge", "payments", "GET", "/v2/other")
            assert denied.returncode == 1 and "edge-to-payments: path /v2/other is not below /v1/payments" in denied.stdout


def test_a_sidecar_that_starts_again_elsewhere_is_found_there(tmp_path: Path, app: int) -> None:
    with ControlProcess(tmp_path) as control, Sidecar(control, "payments", app) as payments:  # type: ignore[arg-type]
        with Sidecar(control, "ledger", app, "--zone", "a", "--label", "version=1") as before:  # type: ignore[arg-type]
            eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        # The same folder, hence the same instance and certificate; another port, zone and label.
        with Sidecar(control, "ledger", app, "--zone", "b", "--label", "version=2") as after:  # type: ignore[arg-type]
            assert after.inbound != before.inbound
            eventually(lambda: call(payments, "ledger")[0] == 200, "the call to the new place")
            row = eventually(
                lambda: next((row for row in control.status()["instances"] if row["inbound"] == f"127.0.0.1:{after.inbound}"), None), "the new place"
            )
            assert (row["service"], row["zone"], row["labels"]["version"]) == ("ledger", "b", "2")
            assert len([row for row in control.status()["instances"] if row["service"] == "ledger"]) == 1


def test_two_with_one_folder_do_not_take_the_stream_from_each_other_all_the_time(tmp_path: Path, app: int) -> None:
    """A machine that was cloned with its state: each change of place is told to all callers, so they must be few, and somebody must say why."""
    with ControlProcess(tmp_path) as control, Sidecar(control, "payments", app) as first:  # type: ignore[arg-type]
        eventually(lambda: [row["state"] for row in control.status()["instances"]] == ["healthy"], "the first one")
        copied = tmp_path / "copied.state"
        shutil.copytree(first.state, copied)
        with Sidecar(control, "payments", app, state=str(copied)):  # type: ignore[arg-type]
            said = eventually(lambda: first.logged("another process speaks for this instance: was its folder copied?"), "the line in its log")
            assert said[0]["folder"] == str(first.state) and said[0]["instance"].startswith("payments-")
            assert len(control.logged("a member's stream is replaced by another one")) == 1
            time.sleep(2)
            assert len(first.logged("stream of the control plane open")) == 2, "one of each"


def test_a_member_is_told_why_its_stream_is_refused(tmp_path: Path, app: int) -> None:
    with ControlProcess(tmp_path) as control, Sidecar(control, "payments", app) as first:  # type: ignore[arg-type]
        eventually(lambda: [row["state"] for row in control.status()["instances"]] == ["healthy"], "the first one")
        copied = tmp_path / "copied.state"
        shutil.copytree(first.state, copied)
        (copied / "instance").unlink()
        with Sidecar(control, "payments", app, state=str(copied)) as second:  # type: ignore[arg-type]
            said = eventually(lambda: second.logged("the control plane cannot be reached"), "the line in its log")
            assert "refuses the stream" in said[0]["error"] and "was issued to the instance payments-" in said[0]["error"]
