"""What `crossway mesh can` says and what a sidecar does are the same, for rules and requests that nobody thought of."""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway._speedups.certificates import parse_certificates, parse_key
from gateway._speedups.testing import normalise_path
from gateway._speedups.token_cache import Principal
from gateway.config.mesh_load import load_mesh
from gateway.mesh.assign import reaches, rule_said
from gateway.mesh.decide import Call, decide
from gateway.workload.user import HEADER, Author
from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.processes import PATIENCE

ROUNDS, REQUESTS = 20, 30
SEGMENTS = ["v1", "v2", "a", "payments", "7", "..", ".", "%2e", "v1-old", "%76%31", "A"]
HEADERS = {"x-one": ["a", "b", "ab", ""], "x-two": ["a", "abc"]}
CLAIMS: dict[str, list[Any]] = {"scope": ["pay", "read", "admin"], "branch": ["zurich", "bern"], "limit": [1, 5, "5"], "staff": [1, "true"]}
USERS: list[dict[str, Any] | None] = [
    None, None, {}, {"scope": ["pay"]}, {"scope": ["pay", "read"], "branch": "bern"}, {"limit": 5}, {"limit": "5"}, {"limit": 1.0}, {"staff": True},
    {"branch": ["zurich", "basel"], "limit": [7, 1]},
]  # fmt: skip


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST = do_PURGE = do_get = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def app() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), App)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def some(draw: random.Random, what: list[Any], most: int = 2) -> list[Any]:
    return draw.sample(what, draw.randint(1, most))


def path_of(draw: random.Random, segments: list[str]) -> str:
    return "/" + "/".join(draw.choice(segments) for _ in range(draw.randint(0, 3)))


def rule_of(draw: random.Random, number: int, port: int) -> dict[str, Any]:
    said: dict[str, Any] = {"name": f"r{number}", "from": draw.choice([["payments"], ["edge", "payments"], ["edge"], ["*"]]), "to": draw.choice([["ledger"], ["*"], ["accounts"]])}
    if draw.random() < 0.3:
        said["methods"] = some(draw, ["GET", "POST", "PURGE"])
    if draw.random() < 0.3:
        said["prefix"] = path_of(draw, ["v1", "v2", "a", "7"])
    elif draw.random() < 0.3:
        said["path"] = draw.choice(["/", "/v1", "/v1/{x}", "/{x}", "/{x}/a", "/a/{x}/{y}"])
    if draw.random() < 0.25:
        said["headers"] = {name: draw.choice([*values[:2], {"present": True}, {"present": False}, {"prefix": "a"}]) for name, values in HEADERS.items() if draw.random() < 0.7}
    if draw.random() < 0.25:
        said["claims"] = {name: some(draw, values) for name, values in CLAIMS.items() if draw.random() < 0.4}
    if draw.random() < 0.2:
        said["ports"] = draw.choice([[port], [1, port], [1]])
    return said


def contexts(author: Author) -> list[bytes]:
    """The header line of each user of USERS."""
    lines = []
    for number, claims in enumerate(USERS):
        others = {name: value for name, value in (claims or {}).items() if name != "scope"}
        user = Principal(subject=f"u{number}", client="c", issuer="i", scopes=frozenset((claims or {}).get("scope", ())), claims=others, expires=1 << 40, seed=1)
        lines.append(b"" if claims is None else author.sign(user, ["spiffe://bank.test/service/ledger"])[0].partition(b": ")[2].strip())
    return lines


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
def test_can_says_what_a_sidecar_does(tmp_path: Path, app: int, seed: int) -> None:
    draw, control = random.Random(seed), Control(tmp_path)
    control.user_authors = ["payments"]
    pair = control.ca.pair(tmp_path, "caller", "spiffe://bank.test/service/payments")
    author = Author(parse_certificates(pair.read_bytes()), parse_key(pair.read_bytes()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(pair)
    answers = {True: 0, False: 0}
    try:
        with Sidecar(control, "ledger", app) as ledger:
            for _ in range(ROUNDS):
                rules = [rule_of(draw, number, app) for number in range(draw.randint(1, 5))]
                file = tmp_path / "mesh.yaml"
                services = {name: {} for name in ("edge", "payments", "ledger", "accounts")}
                file.write_text(json.dumps({"version": 1, "trust_domain": "bank.test", "services": services, "authorization": {"rules": rules}}))
                mesh = load_mesh(file)
                control.rules = [{**rule_said(rule, mesh), "to": "ledger"} for rule in mesh.authorization.rules if reaches(rule, "ledger")]
                control.change()
                control.settled()
                told = contexts(author)
                connection = http.client.HTTPSConnection("127.0.0.1", ledger.inbound, timeout=PATIENCE, context=context)
                for _ in range(REQUESTS):
                    method, path, user = draw.choice(["GET", "GET", "POST", "PURGE", "get"]), path_of(draw, SEGMENTS), draw.randrange(len(USERS))
                    query = draw.choice(["", "", "?x=/v2"])
                    headers = [(name, draw.choice(values)) for name, values in HEADERS.items() for _ in range(draw.choice([0, 1, 1, 2]))]
                    connection.putrequest(method, path + query, skip_accept_encoding=True)
                    for name, value in headers:
                        connection.putheader(name, value)
                    if told[user]:
                        connection.putheader(HEADER.decode(), told[user])
                    connection.endheaders()
                    answer = connection.getresponse()
                    answer.read()
                    seen: dict[str, list[str]] = {}
                    for name, value in headers:
                        seen.setdefault(name, []).append(value)
                    try:
                        plain = normalise_path(path.encode()).decode()
                    except ValueError:
                        assert answer.status == 400, path
                        continue
                    call = Call("payments", "ledger", method, plain, seen, USERS[user], app)
                    decision = decide(mesh, call)
                    assert answer.status == (200 if decision.allowed else 403), (rules, call, decision, answer.getheader("crossway-denied"))
                    answers[decision.allowed] += 1
                connection.close()
    finally:
        control.stop()
    assert min(answers.values()) > 50, "both answers are met"
