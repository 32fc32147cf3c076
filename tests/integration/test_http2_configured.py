"""What the configuration says of HTTP/2, seen on the wire: which version is spoken where, and who is refused."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import httpx
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, ROOT, Origin, eventually


class Http2Server:
    """A server of the h2 library, in clear text or over TLS, that says what it was asked. `alpn`: what it selects from."""

    def __init__(self, folder: Path | None = None, *, alpn: tuple[str, ...] = ("h2",)) -> None:
        self.context: ssl.SSLContext | None = None
        if folder is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(folder / "server.crt", folder / "server.key")
            self.context.load_verify_locations(folder / "internal-ca.crt")
            self.context.verify_mode = ssl.CERT_REQUIRED
            if alpn:
                self.context.set_alpn_protocols(list(alpn))
        self.connections = 0
        self.requests: list[dict[str, str]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self.connections += 1
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
            if self.context is not None:
                sock = self.context.wrap_socket(sock, server_side=True)
            connection.initiate_connection()
            sock.sendall(connection.data_to_send())
            while data := sock.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        self.requests.append(dict(event.headers))
                    elif isinstance(event, h2.events.StreamEnded):
                        connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "text/plain")])
                        connection.send_data(event.stream_id, b"from HTTP/2", end_stream=True)
                sock.sendall(connection.data_to_send())
        sock.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root, internal, tpp = (Authority(name, number=200 + i) for i, name in enumerate(("Root", "Internal", "TPP")))
    (tmp_path / "root.crt").write_bytes(root.pem)
    (tmp_path / "internal-ca.crt").write_bytes(internal.pem)
    (tmp_path / "tpp-ca.crt").write_bytes(tpp.pem)
    root.issue("bank.test", "127.0.0.1").write(tmp_path, "bank")
    internal.issue("payments.internal").write(tmp_path, "server")
    internal.issue("edge.internal", number=1).write(tmp_path, "edge")
    return tmp_path


def client(folder: Path, *, http2: bool = True) -> httpx.Client:
    context = ssl.create_default_context(cafile=folder / "root.crt")
    return httpx.Client(http1=True, http2=http2, verify=context, timeout=PATIENCE)


def contract(folder: Path, port: int) -> Path:
    """The contract's file with a server that is here, and ports that are free."""
    shutil.copy(ROOT / "tests/data/contract/tls.yaml", folder)
    text = (folder / "tls.yaml").read_text()
    for old, new in (("payments.internal:9443", f"127.0.0.1:{port}"), ("127.0.0.1:8443", "127.0.0.1:0"), ("127.0.0.1:9900", "127.0.0.1:0")):
        assert old in text
        text = text.replace(old, new)
    (folder / "tls.yaml").write_text(text.replace("workers: auto", "workers: 1"))
    return folder / "tls.yaml"


@contextlib.contextmanager
def running(path: Path) -> Iterator[WatchedGateway]:
    with WatchedGateway(path) as gateway:
        yield gateway


def test_the_contract_file_runs(folder: Path) -> None:
    with contextlib.closing(Http2Server(folder)) as server, running(contract(folder, server.port)) as gateway:
        url = f"https://127.0.0.1:{gateway.port()}/v1/payments/7"
        for http2, version in ((True, "HTTP/2"), (False, "HTTP/1.1")):
            with client(folder, http2=http2) as caller:
                answer = caller.get(url)
            assert (answer.status_code, answer.text, answer.http_version) == (200, "from HTTP/2", version)
        assert [(each[":path"], each[":scheme"]) for each in server.requests] == [("/v1/payments/7", "https")] * 2
        assert server.connections == 1
        gateway.calm()


@pytest.mark.parametrize("alpn", [(), ("http/1.1",)])
def test_a_server_that_does_not_select_http2_gets_no_request(folder: Path, alpn: tuple[str, ...]) -> None:
    with contextlib.closing(Http2Server(folder, alpn=alpn)) as server, running(contract(folder, server.port)) as gateway:
        with client(folder) as caller:
            answer = caller.post(f"https://127.0.0.1:{gateway.port()}/v1/payments", content=b"1 EUR")
        assert answer.status_code == 503
        assert answer.json()["type"].endswith("upstream-tls-failed") and "was not sent" in answer.json()["detail"]
        assert not server.requests
        assert gateway.counter("upstream_tls_failures") >= 1
        (line,) = [line for line in gateway.log() if line["event"] == "the TLS handshake with an upstream failed"]
        assert "ALPN" in line["reason"] or "alpn" in line["reason"].lower()


def plain(folder: Path, port: int, listeners: str, protocol: str = "http1") -> Path:
    path = folder / "edge.yaml"
    path.write_text(
        f"version: 1\nworkers: 1\nadmin: {{bind: 127.0.0.1:0}}\nlisteners: {{{listeners}}}\n"
        f"upstreams: {{origin: {{targets: ['127.0.0.1:{port}'], protocol: {protocol}}}}}\n"
        "routes: [{name: all, match: {prefix: /}, upstream: origin}]\n"
    )
    return path


CERTIFICATES = "certificates: [{cert: bank.crt, key: bank.key}]"


@pytest.mark.parametrize(
    ("settings", "offered", "selected"),
    [
        (f"tls: {{{CERTIFICATES}}}", ["h2", "http/1.1"], "h2"),
        (f"tls: {{{CERTIFICATES}}}, http2: true", ["http/1.1", "h2"], "h2"),
        (f"tls: {{{CERTIFICATES}, alpn: [http/1.1, h2]}}", ["h2", "http/1.1"], "http/1.1"),
        (f"tls: {{{CERTIFICATES}}}, http2: false", ["h2", "http/1.1"], "http/1.1"),
        (f"tls: {{{CERTIFICATES}}}, http2: false", ["h2"], None),
        (f"tls: {{{CERTIFICATES}, alpn: h2}}", ["http/1.1"], None),
    ],
)
def test_what_a_listener_selects(folder: Path, settings: str, offered: list[str], selected: str | None) -> None:
    origin = Origin()
    context = ssl.create_default_context(cafile=folder / "root.crt")
    context.set_alpn_protocols(offered)
    path = plain(folder, origin.port, f"public: {{bind: 127.0.0.1:0, {settings}}}")
    with contextlib.closing(origin), running(path) as gateway, socket.create_connection(("127.0.0.1", gateway.port()), PATIENCE) as sock:
        if selected is None:
            with pytest.raises(ssl.SSLError, match="(?i)no.application.protocol"):
                context.wrap_socket(sock, server_hostname="bank.test")
            return
        with context.wrap_socket(sock, server_hostname="bank.test") as wrapped:
            assert wrapped.selected_alpn_protocol() == selected


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-sS", "--max-time", str(PATIENCE), "-w", "%{http_version} %{http_code}", "-o", "/dev/null", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)


def test_prior_knowledge_is_taken_where_it_is_allowed(folder: Path) -> None:
    origin = Origin()
    listeners = "public: {bind: 127.0.0.1:0, http2: {clear: true}}, closed: {bind: 127.0.0.1:0}"
    with contextlib.closing(origin), running(plain(folder, origin.port, listeners)) as gateway:
        clear, closed = (f"http://127.0.0.1:{gateway.port(name)}/x" for name in ("public", "closed"))
        assert curl("--http2-prior-knowledge", clear).stdout == "2 200"
        assert curl(clear).stdout == "1.1 200"
        assert curl("--http2", clear).stdout == "1.1 200"          # Upgrade: h2c is stripped
        assert curl("--http2", closed).stdout == "1.1 200"
        assert curl("--http2-prior-knowledge", closed).returncode != 0
        gateway.calm()


def test_a_reload_to_another_protocol_makes_new_connections(folder: Path) -> None:
    """And a request that is under way in the old one ends there."""
    origin = Origin()
    with contextlib.closing(origin), contextlib.closing(Http2Server()) as server:
        path = plain(folder, origin.port, "public: {bind: 127.0.0.1:0}")
        with running(path) as gateway:
            assert gateway.get() == (200, b'{"from": "origin"}')
            held: list[tuple[int, bytes]] = []
            waiting = threading.Thread(target=lambda: held.append(gateway.get("/held")))
            waiting.start()
            assert origin.held.acquire(timeout=PATIENCE)
            plain(folder, server.port, "public: {bind: 127.0.0.1:0}", "http2")
            assert gateway.admin("/reload", "POST")[0] == 200
            eventually(lambda: gateway.get() == (200, b"from HTTP/2"), "the new protocol")
            origin.release.set()
            waiting.join(PATIENCE)
            assert held == [(200, b'{"from": "origin"}')]
            gateway.calm()


def test_an_upstream_that_does_not_speak_http2_is_a_bad_one(folder: Path) -> None:
    origin = Origin()
    with contextlib.closing(origin), running(plain(folder, origin.port, "public: {bind: 127.0.0.1:0}", "http2")) as gateway:
        status, body = gateway.get()
        assert status in (502, 503), body
        assert b"urn:crossway:problem:upstream-" in body
        gateway.calm()
