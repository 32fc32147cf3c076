"""The issuer's keys by URL, through a real gateway: an issuer that is late, rotates, falls over, lies and takes keys back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.integration.echo import AUDIENCE, ISSUER, Echo, Told, bearer, client, config, jwks, problem, token
from tests.integration.processes import PATIENCE, Gateway, eventually


class Issuer:
    """Serves key sets by path; can be down, slow or wrong. Its port is its own before it listens."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.server: ThreadingHTTPServer | None = None
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))          # refuses connections until start()
        self.port: int = self._place.getsockname()[1]

    def start(self) -> None:
        issuer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                issuer.go_on.wait(PATIENCE)
                document = issuer.documents.get(self.path)
                body = (document or "nothing here").encode()
                self.send_response(404 if document is None else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._place.close()
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Answer)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def count(self, path: str) -> int:
        return self.asked.count(path)


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.go_on.set()
    made.stop()


def rules(port: int) -> str:
    def policy(name: str, times: str) -> str:
        place = f"http://127.0.0.1:{port}/{name}"
        return f"  {name}: {{jwt: {{issuer: {ISSUER}, audience: {AUDIENCE}, keys: '{place}', algorithms: [ES256], {times}}}}}\n"

    names = {"late": "refresh: 1h, cooldown: 100ms", "rotated": "refresh: 1h, cooldown: 1h", "fresh": "refresh: 100ms, cooldown: 1h",
             "lying": "refresh: 50ms, cooldown: 1h"}
    routes = "".join(f"  - {{name: {name}, match: {{prefix: /{name}}}, policies: [{name}], upstream: origin}}\n" for name in names)
    return "policies:\n" + "".join(policy(*item) for item in names.items()) + "routes:\n" + routes


@pytest.fixture(scope="module")
def gateway(echo: Echo, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    path = tmp_path_factory.mktemp("keys") / "edge.yaml"
    path.write_text(config(rules(issuer.port), echo))
    with Gateway(path) as running:
        with client(running) as made:
            # Nobody has a key yet: the gateway serves, and refuses what it cannot verify.
            problem(made.get("/late", headers=bearer(token("ES256", "one"))), 401, "token-key")
        for name in ("late", "rotated", "fresh", "lying"):
            issuer.documents[f"/{name}"] = jwks(("ES256", "one"))
        issuer.start()
        yield running
        assert "Traceback" not in running.errors.read_text()


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


def passes(http: httpx.Client, path: str, value: str) -> bool:
    return http.get(path, headers=bearer(value)).status_code == 200


def test_an_issuer_that_comes_up_later_is_found(http: httpx.Client) -> None:
    good = token("ES256", "one", sub="early")
    eventually(lambda: passes(http, "/late", good), "the issuer's keys")
    assert Told(http.get("/late", headers=bearer(good))).one("x-auth-subject") == "early"


def test_an_unknown_key_is_asked_for_once_and_waited_for(gateway: Gateway, issuer: Issuer, http: httpx.Client) -> None:
    eventually(lambda: passes(http, "/late", token("ES256", "one")), "the issuer's keys")
    issuer.documents["/late"] = jwks(("ES256", "one"), ("ES256", "two"))
    issuer.go_on.clear()
    before = issuer.count("/late")

    def call(number: int) -> None:
        with client(gateway) as made:               # 401 within the cool-down of the question before
            eventually(lambda: passes(made, "/late", token("ES256", "two", jti=str(number))), "the new key")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: issuer.count("/late") > before, "the question")
    assert passes(http, "/late", token("ES256", "one", jti="meanwhile"))     # nobody else waits for it
    issuer.go_on.set()
    for thread in threads:
        thread.join()
    assert issuer.count("/late") == before + 1      # shared by all who waited; who came later needed none


def test_invented_keys_cost_the_issuer_nothing(issuer: Issuer, http: httpx.Client) -> None:
    eventually(lambda: passes(http, "/rotated", token("ES256", "one")), "the issuer's keys")
    before = issuer.count("/rotated")
    for number in range(30):
        response = http.get("/rotated", headers=bearer(token("ES256", "one", header={"kid": f"invented-{number}"})))
        problem(response, 401, "token-key")
        assert 'error="invalid_token"' in response.headers["www-authenticate"]
    assert issuer.count("/rotated") <= before + 1


def test_a_key_that_is_taken_back_takes_cached_tokens_along(issuer: Issuer, http: httpx.Client) -> None:
    good, other = token("ES256", "one", sub="revoked"), token("ES256", "two", sub="staying")
    eventually(lambda: passes(http, "/fresh", good), "the issuer's keys")
    issuer.documents["/fresh"] = jwks(("ES256", "one"), ("ES256", "two"))
    eventually(lambda: passes(http, "/fresh", other), "the second key")
    assert passes(http, "/fresh", good)                                      # cached by now
    issuer.documents["/fresh"] = jwks(("ES256", "two"))
    eventually(lambda: not passes(http, "/fresh", good), "the end of the first key")
    problem(http.get("/fresh", headers=bearer(good)), 401, "token-key")
    assert passes(http, "/fresh", other)


def test_what_is_no_key_set_changes_nothing(issuer: Issuer, http: httpx.Client) -> None:
    good = token("ES256", "one")
    eventually(lambda: passes(http, "/lying", good), "the issuer's keys")
    for lie in ("<html>maintenance</html>", '{"keys": []}', '{"keys": 7}', "{" * 10_000, '{"keys": [], "keys": []}', "x" * (2 << 20)):
        issuer.documents["/lying"] = lie
        seen = issuer.count("/lying")
        eventually(lambda seen=seen: issuer.count("/lying") > seen, "the next question")
        assert passes(http, "/lying", good)
        assert passes(http, "/lying", token("ES256", "one", sub=f"new-{len(lie)}"))
    issuer.documents["/lying"] = jwks(("ES256", "two"))
    eventually(lambda: passes(http, "/lying", token("ES256", "two")), "the next good answer")


def test_an_issuer_that_is_gone_keeps_its_keys(gateway: Gateway, issuer: Issuer, http: httpx.Client) -> None:
    """The last of this file: the issuer stays down."""
    eventually(lambda: passes(http, "/fresh", token("ES256", "two")), "the issuer's keys")
    issuer.stop()
    eventually(lambda: any(f"{issuer.port}/fresh" in event and "stay in use" in event for event in gateway.events()), "the outage")
    for number in range(3):
        assert passes(http, "/fresh", token("ES256", "two", jti=f"down-{number}"))
        assert passes(http, "/rotated", token("ES256", "one", jti=f"down-{number}"))
    # A reload takes the keys along: it must not need the issuer either.
    assert gateway.admin("/reload", "POST")[0] == 200
    assert passes(http, "/fresh", token("ES256", "two", jti="after the reload"))
