"""What an orchestrator asks of a sidecar and of a control plane: started, ready, the app's own probes, and leaving in time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest

from tests.integration.control_kit import ControlProcess
from tests.integration.mesh_kit import Sidecar, free_port
from tests.integration.processes import PATIENCE, environment, eventually, request
from tests.integration.test_mesh_whole import app, call

__all__ = ["app"]


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    headers = {"host": "10.1.2.3:9104", "x-crossway-caller": "spiffe://bank.test/service/edge", "x-wanted": "theirs"}
    status, _, body = request(port, path, method, headers)
    return status, body.decode()


class Health:
    """An app that answers its probes as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.asked: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def health() -> Iterator[Health]:
    made = Health()
    yield made
    made.close()


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    with ControlProcess(tmp_path, control="  probes: 0.0.0.0:0\n") as process:
        yield process


def leave(state: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "gateway", "mesh", "leave", "--state", str(state)]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_sidecar_has_started_when_calls_would_be_served(tmp_path: Path, control: ControlProcess) -> None:
    probes, nobody = free_port(), free_port()
    token = control.token("payments")
    control.process.send_signal(signal.SIGSTOP)
    with Sidecar(control, "payments", nobody, "--probes", f"127.0.0.1:{probes}", token=token, wait=False):  # type: ignore[arg-type]
        eventually(lambda: answers(probes), "the probes")
        assert ask(probes, "/livez")[0] == 200
        assert ask(probes, "/startz")[0] == 503 and ask(probes, "/readyz")[0] == 503
        control.process.send_signal(signal.SIGCONT)
        eventually(lambda: ask(probes, "/startz")[0] == 200, "the start")
        # The app is not there, and may begin now.
        assert "takes no connections" in ask(probes, "/readyz")[1]
        assert ask(probes, "/metrics")[0] == 200
        assert ask(probes, "/status")[0] == 404  # for loopback only


def answers(port: int) -> bool:
    try:
        return ask(port, "/livez")[0] == 200
    except OSError:
        return False


def test_the_apps_own_probes_are_asked_on_its_behalf(control: ControlProcess, health: Health) -> None:
    probes, dead = free_port(), free_port()
    options = ["--probes", f"127.0.0.1:{probes}", "--app-probe", f"main-live=http:{health.port}/health?full=1", "--app-probe", f"main-ready=tcp:{health.port}",
               "--app-probe", f"dead=tcp:{dead}", "--app-probe", f"deaf=http:{dead}/", "--app-probe-header", "main-live=X-Wanted:ours"]  # fmt: skip
    with Sidecar(control, "payments", health.port, *options):  # type: ignore[arg-type]
        assert ask(probes, "/app/main-live")[0] == 200
        path, headers = health.asked[-1]
        assert path == "/health?full=1" and headers["x-wanted"] == "ours"
        assert "x-crossway-caller" not in headers  # who asks has nothing sent on
        health.status = 404
        status, body = ask(probes, "/app/main-live")
        assert status == 503 and "404" in body
        health.status = 302
        assert ask(probes, "/app/main-live")[0] == 200  # as the kubelet judges
        assert ask(probes, "/app/main-ready")[0] == 200
        assert ask(probes, "/app/dead")[0] == 503 and ask(probes, "/app/deaf")[0] == 503
        assert ask(probes, "/app/other")[0] == 404
        assert ask(probes, "/app/main-live", "POST")[0] == 405


def test_a_grpc_app_is_asked_by_its_health_protocol(control: ControlProcess) -> None:
    """The service is grpcio's, the messages are written here by hand."""
    serving, probes = {"": 1, "bank.Ledger": 1}, free_port()

    def check(request: bytes, context: grpc.ServicerContext) -> bytes:
        name = request[2:].decode()
        if name not in serving:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return bytes([0x08, serving[name]])

    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(check)})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    asked = {"whole": f"grpc:{port}", "one": f"grpc:{port}/bank.Ledger", "other": f"grpc:{port}/bank.Other"}
    options = [word for name, what in asked.items() for word in ("--app-probe", f"{name}={what}")]
    try:
        with Sidecar(control, "payments", port, "--app-protocol", "grpc", "--probes", f"127.0.0.1:{probes}", *options):  # type: ignore[arg-type]
            assert [ask(probes, f"/app/{name}")[0] for name in asked] == [200, 200, 503]
            assert "NOT_FOUND" in ask(probes, "/app/other")[1]
            serving["bank.Ledger"] = 2
            assert ask(probes, "/app/one") == (503, "the app answers NOT_SERVING\n") and ask(probes, "/app/whole")[0] == 200
            server.stop(0).wait(PATIENCE)
            assert ask(probes, "/app/whole")[0] == 503
    finally:
        server.stop(0).wait(PATIENCE)


def test_who_leaves_is_no_endpoint_and_still_answers(control: ControlProcess, app: int) -> None:
    with Sidecar(control, "ledger", app, "--drain-delay", "0.1") as ledger, Sidecar(control, "payments", app) as payments:  # type: ignore[arg-type]
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        assert leave(ledger.state).returncode == 0
        eventually(lambda: [each["state"] for each in control.status()["instances"] if each["service"] == "ledger"] == ["draining"], "the leaving")
        assert ledger.status()["detail"] == "draining"
        # Whoever still knows the address gets an answer: here by a member who has heard nothing since.
        assert ledger.process.poll() is None and ledger.page("/livez").startswith('{"status":"alive"')
        ledger.process.send_signal(signal.SIGTERM)
        eventually(lambda: ledger.logged("inbound closed"), "the end of inbound")


def test_leaving_what_is_not_there_is_told(tmp_path: Path) -> None:
    done = leave(tmp_path / "nothing")
    assert done.returncode == 1 and "no sidecar uses" in done.stderr
    # A lock of one who has ended, whose number may be anybody's by now.
    state = tmp_path / "old"
    state.mkdir(0o700)
    (state / "lock").write_text("sidecar 1\n")
    assert leave(state).returncode == 1


def test_a_member_that_only_calls_others(control: ControlProcess, app: int) -> None:
    with Sidecar(control, "ledger", app) as _ledger, Sidecar(control, "payments", app, "--app", "none") as batch:  # type: ignore[arg-type]
        eventually(lambda: call(batch, "ledger")[0] == 200, "the call")
        rows = {each["service"]: each for each in control.status()["instances"]}
        assert rows["payments"]["state"] != "healthy"
        batch.process.send_signal(signal.SIGTERM)
        assert batch.process.wait(PATIENCE) == 0


def test_a_control_planes_probes_tell_no_more_than_they_must(control: ControlProcess) -> None:
    port = int(control.addresses["probes"].rpartition(":")[2])
    assert json.loads(ask(port, "/readyz")[1])["status"] == "ready"
    assert ask(port, "/livez")[0] == 200 and "crossway_control_" in ask(port, "/metrics")[1]
    assert ask(port, "/status")[0] == 404 and ask(port, "/crl")[0] == 404
    assert control.page("/status")[0] == 200
