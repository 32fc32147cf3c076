"""TLS on raw TCP listeners: passed on by the name in its ClientHello, or ended here with client certificates."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import ScriptedOrigin, Stream, connect
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, eventually
from tests.integration.test_tcp_streams import echo, lines, reason

CONFIG = """
version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
listeners:
  names:
    bind: 127.0.0.1:0
    tcp: {{sni: {{db.bank.test: pg, "*.legacy.test": legacy}}, hello: 1s}}
  rest: {{bind: 127.0.0.1:0, proxy_protocol: optional, tcp: {{sni: {{db.bank.test: pg}}, default: other}}}}
  ended:
    bind: 127.0.0.1:0
    tls: {{certificates: [{{cert: edge.crt, key: edge.key}}], client_ca: ca.crt, client_auth: required, handshake: 1s}}
    tcp: {{upstream: raw}}
  again: {{bind: 127.0.0.1:0, tcp: {{upstream: verified}}}}
  doubted: {{bind: 127.0.0.1:0, tcp: {{upstream: doubted}}}}
upstreams:
  pg: {{targets: [127.0.0.1:{pg}]}}
  legacy: {{targets: [127.0.0.1:{legacy}]}}
  other: {{targets: [127.0.0.1:{other}]}}
  raw: {{targets: [127.0.0.1:{raw}]}}
  verified: {{targets: [127.0.0.1:{pg}], tls: {{ca: ca.crt, server_name: pg.test}}}}
  doubted: {{targets: [127.0.0.1:{pg}], retries: 0, tls: {{ca: ca.crt, server_name: someone-else.test}}}}
"""


class TlsOrigin:
    """A TLS server that says its name, then what it was sent; it asks for nothing and selects no protocol."""

    def __init__(self, folder: Path, name: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")

        def script(origin: ScriptedOrigin, stream: Stream) -> None:
            with contextlib.suppress(ssl.SSLError), context.wrap_socket(stream.sock, server_side=True) as secure:
                secure.sendall(name.encode() + b"\n")
                while piece := secure.recv(1 << 16):
                    secure.sendall(piece)

        self.origin = ScriptedOrigin(script)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("Raw", number=94)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[WatchedGateway]:
    folder = tmp_path_factory.mktemp("sni")
    (folder / "ca.crt").write_bytes(authority.pem)
    for name in ("pg", "legacy", "other"):
        authority.issue(f"{name}.test").write(folder, name)
    authority.issue("edge.test", "127.0.0.1").write(folder, "edge")
    authority.issue("spiffe://bank.test/payments", subject="payments").write(folder, "client")
    Authority("Stranger", number=95).issue("stranger.test").write(folder, "stranger")
    origins = {name: TlsOrigin(folder, name).origin for name in ("pg", "legacy", "other")}
    origins["raw"] = ScriptedOrigin(echo)
    path = folder / "edge.yaml"
    path.write_text(CONFIG.format(**{name: origin.port for name, origin in origins.items()}))
    with WatchedGateway(path) as gateway:
        yield gateway
    for origin in origins.values():
        origin.close()


@pytest.fixture(autouse=True)
def calm(gateway: WatchedGateway) -> Iterator[None]:
    yield
    gateway.calm()


def context(gateway: WatchedGateway, client: str = "") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(gateway.path.parent / "ca.crt"))
    made.check_hostname = False
    if client:
        made.load_cert_chain(gateway.path.parent / f"{client}.crt", gateway.path.parent / f"{client}.key")
    return made


def hello(name: str | None) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO, bytes]:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    session = made.wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return session, incoming, outgoing, outgoing.read()


def finish(stream: Stream, session: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> bytes:
    """Complete a handshake that hello() began; the line that the server then says."""
    said = b""
    while not said.endswith(b"\n"):
        try:
            session.do_handshake()
            said += session.read(1 << 16)
        except ssl.SSLWantReadError:
            stream.send(outgoing.read())
            incoming.write(stream.sock.recv(1 << 16))
    return said


def who(gateway: WatchedGateway, listener: str, name: str | None) -> str:
    """The server that a client with this name reaches, by what it says and by its certificate."""
    with (
        socket.create_connection(("127.0.0.1", gateway.port(listener)), PATIENCE) as sock,
        context(gateway).wrap_socket(sock, server_hostname=name) as secure,
    ):
        said = b""
        while not said.endswith(b"\n"):
            said += secure.recv(100)
        shown = secure.getpeercert()
        assert shown is not None and (("commonName", f"{said.decode().strip()}.test"),) in shown["subject"]
        secure.sendall(b"through")
        assert secure.recv(100) == b"through"
    return said.decode().strip()


def test_names_choose_their_upstream(gateway: WatchedGateway) -> None:
    assert who(gateway, "names", "db.bank.test") == "pg"
    assert who(gateway, "names", "DB.Bank.Test") == "pg"
    assert who(gateway, "names", "x.legacy.test") == "legacy"
    assert who(gateway, "rest", "db.bank.test") == "pg"
    assert who(gateway, "rest", "x.legacy.test") == "other"
    assert who(gateway, "rest", None) == "other"
    line = eventually(lambda: lines(gateway, "names"))[0]
    assert (line["server_name"], line["upstream"]) == ("db.bank.test", "pg")


@pytest.mark.parametrize("name", ["legacy.test", "a.b.legacy.test", "bank.test", "xdb.bank.test", None])
def test_other_names_are_refused_with_an_alert(gateway: WatchedGateway, name: str | None) -> None:
    with connect(gateway.port("names")) as stream:
        stream.send(hello(name)[3])
        assert stream.rest() == (b"\x15\x03\x03\x00\x02\x02\x70", True)  # fatal, unrecognized_name
        assert reason(gateway, stream, "names") == "unknown-name"


@pytest.mark.parametrize("pieces", ["bytes", "segments", "records", "one-byte records"])
def test_a_hello_in_pieces_chooses_the_same_upstream(gateway: WatchedGateway, pieces: str) -> None:
    session, incoming, outgoing, whole = hello("x.legacy.test")
    message = whole[5:]
    name_at = message.index(b"x.legacy.test")

    def record(piece: bytes) -> bytes:
        return whole[:3] + len(piece).to_bytes(2, "big") + piece

    cuts = {
        "bytes": [whole[i : i + 1] for i in range(len(whole))],
        "segments": [whole[: name_at + 10], whole[name_at + 10 :]],
        "records": [record(message[: name_at + 4]), record(message[name_at + 4 :])],
        "one-byte records": [b"".join(record(message[i : i + 1]) for i in range(len(message)))],
    }[pieces]
    with connect(gateway.port("names")) as stream:
        stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in cuts:
            stream.send(cut)
            if len(cuts) < 10:
                time.sleep(0.05)  # so that the gateway sees a part; that it did not only makes the test weaker
        if pieces == "one-byte records":
            # OpenSSL itself refuses so small fragments: what counts is whom it reached.
            stream.rest()
            stream.half_close()
            assert eventually(lambda: [
                line for line in lines(gateway, "names") if line["client_port"] == stream.sock.getsockname()[1]
            ])[0]["upstream"] == "legacy"  # fmt: skip
        else:
            assert finish(stream, session, incoming, outgoing) == b"legacy\n"


def test_what_is_no_hello_is_refused(gateway: WatchedGateway) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x08\x04\xd2\x16\x2f", b"\x16\x03\x01\x40\x00\x01\x00\xff\xff"):
        with connect(gateway.port("names")) as stream:
            stream.send(data)
            assert stream.rest() == (b"\x15\x03\x03\x00\x02\x02\x32", True)  # fatal, decode_error
            assert reason(gateway, stream, "names") == "bad-hello"
    with connect(gateway.port("names")) as stream:
        stream.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # and never more
        assert stream.rest()[0] == b""
        assert reason(gateway, stream, "names") == "handshake"


def test_many_unfinished_hellos_hold_bounded_memory_and_nobody_up(gateway: WatchedGateway) -> None:
    held = []
    for _ in range(300):
        stream = connect(gateway.port("names"))
        stream.send(b"\x16\x03\x01\x3f\x04\x01\x00\x3f\x00" + bytes(12000))
        held.append(stream)
    assert who(gateway, "names", "db.bank.test") == "pg"
    for stream in held:
        assert stream.rest()[0] == b""
        stream.close()


def test_a_proxy_header_comes_before_the_hello(gateway: WatchedGateway) -> None:
    session, incoming, outgoing, whole = hello("db.bank.test")
    with connect(gateway.port("rest")) as stream:
        stream.send(b"PROXY TCP4 10.9.8.7 10.0.0.1 4711 5432\r\n" + whole)
        assert finish(stream, session, incoming, outgoing) == b"pg\n"
    eventually(lambda: [line for line in lines(gateway, "rest") if line["client"] == "10.9.8.7"])


def test_openssl_itself(gateway: WatchedGateway) -> None:
    for name, common in (("db.bank.test", "pg.test"), ("old.legacy.test", "legacy.test")):
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{gateway.port('names')}", "-servername", name, "-alpn", "postgresql"],
            input=b"", capture_output=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert f"CN = {common}" in done.stdout.decode(), done


def test_client_certificates_where_tls_ends(gateway: WatchedGateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port("ended")), PATIENCE) as sock:
        made = context(gateway, "client")
        made.set_alpn_protocols(["postgresql"])  # what is spoken above TLS is no business of the gateway's
        with made.wrap_socket(sock, server_hostname="edge.test") as secure:
            assert secure.selected_alpn_protocol() is None
            port = secure.getsockname()[1]
            secure.sendall(b"x" * 100_000)
            got = b""
            while len(got) < 100_000:
                got += secure.recv(1 << 16)
            secure.unwrap()
    line = eventually(lambda: [line for line in lines(gateway, "ended") if line["client_port"] == port])[0]
    assert line["certificate"] == "CN=payments" and line["uris"] == ["spiffe://bank.test/payments"]
    assert (line["bytes_in"], line["reason"]) == (100_000, "closed")


def test_the_last_word_of_a_handshake_is_not_kept_back(gateway: WatchedGateway) -> None:
    """A client of TLS 1.2 says nothing before it has the server's Finished, which the kernel would keep for 200 ms, waiting for more."""
    took = []
    for _ in range(10):
        made = context(gateway, "client")
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", gateway.port("ended")), PATIENCE) as sock:
            began = time.monotonic()
            with made.wrap_socket(sock, server_hostname="edge.test") as secure:
                took.append(time.monotonic() - began)
                secure.sendall(b"hello")
                assert secure.recv(5) == b"hello"
    assert min(took) < 0.2, took                    # kept back, each takes that long, however fast the machine is


@pytest.mark.parametrize("client", ["", "stranger"])
def test_without_a_valid_certificate_nothing_reaches_the_upstream(gateway: WatchedGateway, client: str) -> None:
    opened = 'crossway_tcp_connections_opened_total{listener="ended",upstream="raw"}'
    before = gateway.metrics().get(opened, 0)
    with (
        socket.create_connection(("127.0.0.1", gateway.port("ended")), PATIENCE) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context(gateway, client).wrap_socket(sock, server_hostname="edge.test") as secure,
    ):
        secure.sendall(b"let me in")
        secure.recv(1)
    assert gateway.metrics().get(opened, 0) == before


def test_a_cut_tls_stream_is_a_reset_not_an_end(gateway: WatchedGateway) -> None:
    """A client that goes without saying so in TLS may have been cut off by anybody (RFC 8446 6.1)."""
    with socket.create_connection(("127.0.0.1", gateway.port("ended")), PATIENCE) as sock:
        secure = context(gateway, "client").wrap_socket(sock, server_hostname="edge.test", suppress_ragged_eofs=False)
        port = secure.getsockname()[1]
        secure.sendall(b"x")
        assert secure.recv(1) == b"x"
        secure.shutdown(socket.SHUT_WR)
        line = eventually(lambda: [line for line in lines(gateway, "ended") if line["client_port"] == port])[0]
        assert line["reason"] == "client-reset"
        secure.close()


def test_tls_to_the_upstream_is_verified(gateway: WatchedGateway) -> None:
    with connect(gateway.port("again")) as client:
        assert client.until(b"\n") == b"pg"
        client.send(b"in the clear")
        assert client.exactly(12) == b"in the clear"
    time.sleep(1.1)         # the tests before may have used up the lines of this second that strangers can cause
    with connect(gateway.port("doubted")) as client:
        assert client.rest() == (b"", False)
        assert reason(gateway, client, "doubted") == "unreachable"


def test_clients_that_come_together(gateway: WatchedGateway) -> None:
    found: list[str] = []

    def ask(number: int) -> None:
        name, wanted = (("db.bank.test", "pg"), (f"n{number}.legacy.test", "legacy"))[number % 2]
        found.append("" if who(gateway, "names", name) == wanted else name)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [""] * 40
