"""An origin that says what it received, keys that sign, and a client: what the tests of policies share.

Strategy: the origin answers with JSON (method, target, fields in order, body) and can be told, in the query of a request, what else
to answer. Tokens are signed with keys that are made once, by PyJWT's own algorithms, so valid ones come from another implementation.
"""

from __future__ import annotations

import base64
import functools
import json
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tests.integration.processes import PATIENCE, Gateway, QuietServer

ISSUER = "https://auth.bank.test"
AUDIENCE = "payments"


class Echo:
    """An HTTP/1.1 server in threads. `?status=`, `?set=name:value` and `?body=` shape its answer; below /held it waits."""

    def __init__(self) -> None:
        self.seen: list[str] = []                   # targets, in order
        self.release = threading.Event()
        self.held = threading.Semaphore(0)
        echo = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1                           # head and body in one piece

            def answer(self) -> None:
                echo.seen.append(self.path)
                body = self.read()
                if self.path.startswith("/held"):
                    echo.held.release()
                    echo.release.wait(PATIENCE)
                asked = parse_qsl(urlsplit(self.path).query)
                fields = [(name, value) for name, value in self.headers.items()]
                said = {"method": self.command, "target": self.path, "fields": fields, "body": body.decode("latin-1")}
                content = dict(asked).get("body", json.dumps(said)).encode()
                self.send_response_only(int(dict(asked).get("status", "200")))
                for name, value in asked:
                    if name == "set":
                        self.send_header(*value.split(":", 1))
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer

            def read(self) -> bytes:
                if "chunked" not in self.headers.get("transfer-encoding", ""):
                    return self.rfile.read(int(self.headers.get("content-length", "0")))
                pieces = []
                while size := int(self.rfile.readline().strip(), 16):
                    pieces.append(self.rfile.read(size))
                    assert self.rfile.readline() == b"\r\n"
                assert self.rfile.readline() == b"\r\n"
                return b"".join(pieces)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = QuietServer(("127.0.0.1", 0), Answer)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


class Told:
    """What the origin received, as it said."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, (response.status_code, response.text)
        said = response.json()
        self.method: str = said["method"]
        self.target: str = said["target"]
        self.body: str = said["body"]
        self.fields: list[tuple[str, str]] = [(name.lower(), value) for name, value in said["fields"]]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key == name]

    def one(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    def names(self) -> set[str]:
        return {name for name, _ in self.fields}


# -- the gateway


HEAD = "version: 1\nworkers: {workers}\nadmin: {{bind: 127.0.0.1:0}}\n"
LISTENER = "listeners: {public: {bind: 127.0.0.1:0}}\n"


def config(rest: str, echo: Echo, *, workers: int = 1, listeners: str = LISTENER) -> str:
    """A configuration in which `rest` gives policies and routes; their upstream is called origin."""
    upstreams = f"upstreams: {{origin: {{targets: [127.0.0.1:{echo.port}]}}}}\n"
    return HEAD.format(workers=workers) + listeners + upstreams + rest


def client(gateway: Gateway, name: str = "public") -> httpx.Client:
    """A client that adds as little as possible of its own, and follows no proxy settings."""
    made = httpx.Client(base_url=f"http://127.0.0.1:{gateway.port(name)}", timeout=PATIENCE, trust_env=False)
    made.headers.clear()
    return made


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """Assert that the answer is this refusal (RFC 9457) and return its members."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["type"] == f"urn:crossway:problem:{slug}", body
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["title"] and body["detail"]
    return body


def raw(gateway: Gateway, data: bytes, name: str = "public") -> socket.socket:
    """A connection on which `data` was sent."""
    connection = socket.create_connection(("127.0.0.1", gateway.port(name)), PATIENCE)
    connection.sendall(data)
    return connection


def exchange(gateway: Gateway, data: bytes, name: str = "public") -> bytes:
    """Send `data`, which asks for the connection's end, and return everything that comes back."""
    with raw(gateway, data, name) as connection:
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def metric(gateway: Gateway, series: str) -> float:
    """A series of /metrics by its whole name with labels; 0 when it is not there."""
    for line in gateway.admin("/metrics")[1].splitlines():
        name, _, value = line.rpartition(" ")
        if name == series:
            return float(value)
    return 0.0


# -- tokens


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@functools.cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def ed_key(name: str) -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def key_of(algorithm: str, name: str) -> Any:
    if algorithm == "EdDSA":
        return ed_key(name)
    return ec_key(name) if algorithm.startswith("ES") else rsa_key(name)


def jwk(algorithm: str, name: str) -> dict[str, Any]:
    """The public key in a JWK set, pinned to its algorithm."""
    kind = {"RS": RSAAlgorithm, "PS": RSAAlgorithm, "ES": ECAlgorithm, "Ed": OKPAlgorithm}[algorithm[:2]]
    public: dict[str, Any] = kind.to_jwk(key_of(algorithm, name).public_key(), as_dict=True)
    public.pop("key_ops", None)
    return {**public, "kid": name, "alg": algorithm, "use": "sig"}


def jwks(*keys: tuple[str, str]) -> str:
    return json.dumps({"keys": [jwk(algorithm, name) for algorithm, name in keys]})


def claims(**more: Any) -> dict[str, Any]:
    """Claims of a good token; a value of None leaves the claim out."""
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "client_id": "app", "iat": now, "exp": now + 6 * 3600}  # longer than any run of the suite: some are made when it is collected
    return {name: value for name, value in {**good, **more}.items() if value is not None}


def token(algorithm: str = "RS256", name: str = "rs", /, *, header: dict[str, Any] | None = None, **more: Any) -> str:
    return jwt.encode(claims(**more), key_of(algorithm, name), algorithm, {"kid": name, **(header or {})})


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def bearer(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def fields_of(answer: bytes, name: str) -> list[str]:
    """The values of a field in a raw answer's head."""
    lines: Sequence[str] = answer.split(b"\r\n\r\n", 1)[0].decode("latin-1").split("\r\n")[1:]
    pairs: Iterable[tuple[str, str, str]] = (line.partition(":") for line in lines)
    return [value.strip() for key, _, value in pairs if key.lower() == name]
