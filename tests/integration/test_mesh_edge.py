"""A gateway as a member of a mesh: it joins, its upstreams are services, and it keeps its certificate."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import jwt
import pytest

from tests.integration.faults import ScriptedOrigin, connect
from tests.integration.mesh_kit import Control, Sidecar, key_pem
from tests.integration.processes import Gateway, Origin, environment, eventually, request
from tests.integration.test_tcp_streams import echo

EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", token: {token}, state: edge.state}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  payments: {{service: payments}}
routes:
  - {{name: pay, match: {{prefix: /v1/payments}}, upstream: payments}}
"""


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    made.rules = [{"name": "edge-to-payments", "from": ["edge"], "to": "payments", "methods": ["GET", "POST"], "prefix": "/v1/payments"}]
    yield made
    made.stop()


def register(control: Control, *sidecars: Sidecar) -> None:
    rows = [{"address": f"127.0.0.1:{each.inbound}", "weight": 1, "zone": None, "labels": {}} for each in sidecars]
    control.services["payments"] = {"protocol": "http", "endpoints": rows}


@pytest.fixture
def payments(control: Control, origin: Origin) -> Iterator[Sidecar]:
    with Sidecar(control, "payments", origin.port) as made:
        register(control, made)
        yield made


def write_edge(control: Control, token: Path | None = None) -> Path:
    path = control.folder / "edge.yaml"
    path.write_text(EDGE.format(control=control.url, token=token or control.token("edge")))
    return path


def ask(url: str, path: str = "/v1/payments/1", **headers: str) -> int:
    parts = urlsplit(url)
    return request(parts.port or 80, path, headers=headers, host=parts.hostname or "")[0]


def page(url: str, path: str) -> str:
    parts = urlsplit(url)
    return request(parts.port or 80, path, host=parts.hostname or "")[2].decode()


def test_an_edge_calls_a_service_with_its_own_identity(control: Control, payments: Sidecar) -> None:
    with Gateway(write_edge(control)) as edge:
        assert ask(edge.addresses["public"]) == 200
        counted = 'istio_requests_total{reporter="source",source_workload="edge",'
        lines = eventually(
            lambda: [line for line in page(edge.addresses["admin"], "/metrics").splitlines() if line.startswith(counted)], "the count"
        )
        assert 'destination_workload="payments"' in lines[0] and lines[0].endswith(" 1")
        assert payments.metric('istio_requests_total{reporter="destination",source_workload="edge"') == 1
        eventually(lambda: control.acked("edge") == control.version, "the acknowledgement")


def test_an_edge_follows_the_registry_down_to_nothing_and_back(control: Control, payments: Sidecar) -> None:
    with Gateway(write_edge(control)) as edge:
        assert ask(edge.addresses["public"]) == 200
        eventually(lambda: control.acked("edge"), "the stream of the admin process")
        register(control)
        control.change()
        eventually(lambda: ask(edge.addresses["public"]) == 503, "no endpoint")
        register(control, payments)
        control.change()
        eventually(lambda: ask(edge.addresses["public"]) == 200, "the endpoint")


def test_an_edge_starts_without_the_control_plane_once_it_has_joined(control: Control, payments: Sidecar) -> None:
    path = write_edge(control)
    with Gateway(path) as edge:
        assert ask(edge.addresses["public"]) == 200
    control.stop()
    with Gateway(path) as edge:
        assert ask(edge.addresses["public"]) == 200


def test_an_edges_certificate_is_renewed_without_a_failed_request(tmp_path: Path, origin: Origin) -> None:
    control = Control(tmp_path, life=20)
    control.rules = [{"name": "all", "from": ["edge"], "to": "payments"}]
    try:
        with Sidecar(control, "payments", origin.port) as payments:
            register(control, payments)
            with Gateway(write_edge(control)) as edge:
                first = (tmp_path / "edge.state" / "svid.pem").read_bytes()
                serials = {line for line in page(edge.addresses["admin"], "/metrics").splitlines() if "renewals_total " in line}
                assert serials

                def renewed() -> bool:
                    assert ask(edge.addresses["public"]) == 200
                    status = page(edge.addresses["admin"], "/status")
                    return (tmp_path / "edge.state" / "svid.pem").read_bytes() != first and '"version":2' in status.replace(" ", "")

                eventually(renewed, "the reload with the new certificate")
                assert ask(edge.addresses["public"]) == 200
    finally:
        control.stop()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_an_edge_whose_certificate_has_ended_joins_again_by_what_lasts(tmp_path: Path, payments: Sidecar, control: Control) -> None:
    """As a sidecar does: the control plane was away for longer than the certificate lives, and nobody restarts the edge."""
    bank = control.ca.pair(tmp_path, "bank", "urn:edge-1")
    (tmp_path / "mesh-root.pem").write_text(control.ca.bundle)
    path = write_edge(control)
    path.write_text(re.sub("token: [^,]+", f"certificate: {{cert: {bank}, key: {bank}}}, control_ca: mesh-root.pem", path.read_text()))
    control.life = 6
    with Gateway(path) as edge:
        assert ask(edge.addresses["public"]) == 200
        eventually(lambda: control.acked("edge"), "the stream of the admin process")
        control.stop()
        ends = control.issued[-1].not_valid_after_utc.timestamp()
        time.sleep(max(0.0, ends - time.time() + 0.5))
        joined = len(control.joined)
        control.life = 3600
        control.start()
        eventually(lambda: len(control.joined) > joined, "its joining")
        eventually(lambda: ask(edge.addresses["public"]) == 200, "calls with the new certificate")


def test_an_edge_tells_that_another_has_its_folder(control: Control, payments: Sidecar) -> None:
    path = write_edge(control)
    other = path.parent / "other" / path.name
    other.parent.mkdir()
    with Gateway(path):
        eventually(lambda: control.acked("edge"), "the stream of the admin process")
        other.write_text(path.read_text().replace("state: edge.state", f"state: {path.parent / 'edge.state'}"))
        with Gateway(other) as second:
            eventually(lambda: "another process uses it" in second.errors.read_text(), "the line in its log")
            assert ask(second.addresses["public"]) == 200


def test_without_a_token_it_does_not_start_and_says_why(control: Control, tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(EDGE.format(control=control.url, token="none.token").replace("token: none.token, ", ""))
    done = run("run", "-c", str(path), cwd=tmp_path)
    assert done.returncode == 2 and "holds no valid certificate" in done.stderr and "edge.yaml:4:" in done.stderr


def test_what_contradicts_a_service_is_told_at_its_place(control: Control, tmp_path: Path) -> None:
    path = write_edge(control)
    path.write_text(path.read_text().replace("{service: payments}", "{service: payments, targets: [127.0.0.1:1]}"))
    done = run("check", "-c", str(path), cwd=tmp_path)
    assert done.returncode != 0 and "both `service` and `targets`" in done.stdout + done.stderr
    path.write_text(path.read_text().replace("mesh:", "# mesh:").replace(", targets: [127.0.0.1:1]", ""))
    done = run("check", "-c", str(path), cwd=tmp_path)
    assert done.returncode != 0 and "this gateway is no member" in done.stdout + done.stderr


def test_a_file_can_be_checked_before_it_has_joined(control: Control, tmp_path: Path) -> None:
    done = run("check", "-c", str(write_edge(control)), cwd=tmp_path)
    assert done.returncode == 0 and "has not joined the mesh yet" in done.stdout + done.stderr
    assert "cannot read" not in done.stdout
    path = write_edge(control, tmp_path / "nowhere.token")
    done = run("check", "-c", str(path), cwd=tmp_path)
    assert done.returncode == 0 and "warning: cannot read what it joins with: No such file" in done.stdout and f"put it there: {tmp_path}/nowhere.token" in done.stdout


def test_keys_of_an_edge_are_its_owners_alone(control: Control, payments: Sidecar) -> None:
    with Gateway(write_edge(control)):
        state = control.folder / "edge.state"
        assert [path.name for path in state.iterdir() if path.is_file() and path.stat().st_mode & 0o077] == []
        assert key_pem(control.ca.key) not in (state / "svid.pem").read_bytes()


def test_an_edge_does_not_speak_to_a_server_that_is_revoked(control: Control, payments: Sidecar) -> None:
    with Gateway(write_edge(control)) as edge:
        assert ask(edge.addresses["public"]) == 200
        eventually(lambda: control.acked("edge"), "the stream of the admin process")
        serial = control.issued[[each["service"] for each in map(token_text, control.joined)].index("payments")].serial_number
        control.revoked["serials"] = [f"{serial:x}"]
        control.change()
        eventually(lambda: ask(edge.addresses["public"]) == 503, "the refusal")
        control.revoked["serials"] = []
        control.change()
        eventually(lambda: ask(edge.addresses["public"]) == 200, "the service again")


def test_an_edge_ends_raw_connections_to_a_server_that_is_revoked(control: Control) -> None:
    origin = ScriptedOrigin(echo)
    control.rules = [{"name": "edge-to-db", "from": ["edge"], "to": "db"}]
    control.own["db"] = {"protocol": "tcp"}
    with Sidecar(control, "db", origin.port, "--app-protocol", "tcp") as db:
        control.services["db"] = {"protocol": "tcp", "endpoints": [{"address": f"127.0.0.1:{db.inbound}", "weight": 1, "zone": None, "labels": {}}]}
        control.change()
        path = write_edge(control)
        text = path.read_text().replace("listeners: {", "listeners: {db: {bind: 127.0.0.1:0, tcp: {upstream: db}}, ")
        path.write_text(text.replace("upstreams:\n", "upstreams:\n  db: {service: db}\n"))
        with Gateway(path) as edge:
            eventually(lambda: control.acked("edge") == control.version, "the stream of the admin process")
            with connect(edge.port("db")) as client:
                client.send(b"hello")
                assert client.exactly(5) == b"hello"
                control.revoked["identities"] = ["spiffe://bank.test/service/db"]
                control.change()
                with contextlib.suppress(ConnectionError):
                    assert client.sock.recv(1) == b""
    origin.close()


def token_text(joined: dict[str, str]) -> dict[str, str]:
    """What is in the token of a member that joined."""
    return dict(json.loads(base64.urlsafe_b64decode(joined["token"] + "===")))


# -- the user behind the calls

SIGNED = """policies:
  token: {{jwt: {{issuer: https://auth.bank.test, audience: payments, secret: "{secret}", algorithms: [HS256]}}}}
"""
SECRET = "0123456789abcdef0123456789abcdef"


def token_of(**claims: object) -> str:
    body = {"iss": "https://auth.bank.test", "aud": "payments", "sub": "alice", "exp": int(time.time()) + 600, "scope": "payments:write", **claims}
    return jwt.encode(body, SECRET, algorithm="HS256")


def authenticated(control: Control) -> Path:
    path = write_edge(control)
    text = path.read_text().replace("upstream: payments}", "upstream: payments, policies: [token]}")
    path.write_text(text.replace("routes:", SIGNED.format(secret=SECRET) + "routes:"))
    return path


def test_a_rule_can_ask_for_the_user_behind_the_caller(control: Control) -> None:
    control.rules[0] |= {"claims": {"scope": "payments:write", "branch": ["zurich", "geneva"]}}
    with Heads() as app, Sidecar(control, "payments", app.port) as payments:
        register(control, payments)
        with Gateway(authenticated(control)) as edge:
            url = edge.addresses["public"]
            good = token_of(branch="geneva")
            for _ in range(3):
                assert ask(url, authorization=f"Bearer {good}") == 200
            assert ask(url, authorization=f"Bearer {token_of(branch='basel')}") == 403
            assert ask(url, authorization=f"Bearer {token_of(branch='geneva', scope='payments:read')}") == 403
            # Nobody can bring a context of his own, in any spelling.
            forged = app.contexts[0]
            assert ask(url, authorization=f"Bearer {token_of()}", **{"crossway-user": forged}) == 403
            assert ask(url, authorization=f"Bearer {token_of()}", Crossway_User=forged) == 403
            assert len(set(app.contexts)) == 1, "signed once for a user, and used again"


def test_the_user_travels_on_and_no_further_than_his_context(control: Control) -> None:
    control.rules.append({"name": "to-ledger", "from": ["payments"], "to": "ledger", "claims": {"scope": "payments:write"}})
    with Heads() as first, Heads() as second, Sidecar(control, "ledger", second.port) as ledger, Sidecar(control, "payments", first.port) as payments:
        register(control, payments)
        control.services["ledger"] = {"protocol": "http", "endpoints": [{"address": f"127.0.0.1:{ledger.inbound}", "weight": 1}]}
        control.change()
        control.settled()
        with Gateway(authenticated(control)) as edge:
            assert ask(edge.addresses["public"], authorization=f"Bearer {token_of()}") == 200
            context = first.contexts[0]
            out = f"http://127.0.0.1:{payments.outbound}"
            assert ask(out, host="ledger") == 403, "the service alone may not"
            assert ask(out, host="ledger", **{"crossway-user": context}) == 200, "for the user it may"
            told = json.loads(base64.urlsafe_b64decode(second.contexts[0].split(".")[1] + "==="))
            assert told["iss"] == "spiffe://bank.test/service/payments" and told["aud"] == ["spiffe://bank.test/service/ledger"]
            assert told["sub"] == "alice" and told["proof"] == context
            # What the ledger got is for the ledger: neither the app of payments nor payments' sidecar can use it.
            assert ask(out, host="ledger", **{"crossway-user": second.contexts[0]}) == 403
            assert ask(out, host="ledger", **{"crossway-user": context[:-4] + "AAAA"}) == 403


@pytest.mark.parametrize("deltas", [True, False])
def test_only_those_who_are_named_may_begin_a_context(control: Control, deltas: bool) -> None:
    control.deltas = deltas
    control.rules[0] |= {"claims": {"scope": "payments:write"}}
    with Heads() as app, Sidecar(control, "payments", app.port) as payments:
        register(control, payments)
        with Gateway(authenticated(control)) as edge:
            url, token = edge.addresses["public"], f"Bearer {token_of()}"
            assert ask(url, authorization=token) == 200
            for authors, status in ((["branch"], 403), ([], 403), (["branch", "edge"], 200)):
                control.user_authors = authors
                control.change()
                control.settled()
                assert ask(url, authorization=token) == status, authors


class Heads:
    """An app that answers 200 and keeps the user contexts that it got."""

    def __init__(self) -> None:
        self.contexts: list[str] = []
        heads = self

        class Answer(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                heads.contexts += self.headers.get_all("crossway-user") or []
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
