"""TLS towards clients: what is offered, which certificate is shown, sessions, PROXY headers, and what the upstream is told."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable

import httpx
import pytest

from tests.integration.echo import Told
from tests.integration.faults import PATTERN, ScriptedOrigin, Stream, get, ok, post
from tests.integration.processes import PATIENCE, eventually
from tests.integration.vault import TlsStream, Vault, client_hello

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
AEAD = [
    "ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305",
]  # fmt: skip
REFUSED = ["AES128-GCM-SHA256", "AES128-SHA", "ECDHE-RSA-AES128-SHA256", "ECDHE-RSA-AES256-SHA", "DHE-RSA-AES128-GCM-SHA256"]


# -- what is offered


@pytest.mark.parametrize("version", [V12, V13])
def test_both_versions_serve(vault: Vault, version: ssl.TLSVersion) -> None:
    with vault.connect(version=version) as stream:
        assert stream.sock.version() == version.name.replace("_", ".")
        assert stream.ask(get()).status == 200


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_older_versions_are_refused(vault: Vault, version: str) -> None:
    said = vault.openssl(version, "-cipher", "ALL:@SECLEVEL=0")
    assert "Cipher is (NONE)" in said
    assert "alert protocol version" in said


def test_min_version_refuses_tls12(vault: Vault) -> None:
    with pytest.raises(ssl.SSLError, match="(?i)protocol.version"):
        vault.connect("modern", version=V12)
    with vault.connect("modern", version=V13) as stream:
        assert stream.ask(get()).status == 200


@pytest.mark.parametrize("suite", AEAD)
def test_ecdhe_with_aead_is_offered(vault: Vault, suite: str) -> None:
    assert f"Cipher is {suite}" in vault.openssl("-tls1_2", "-cipher", suite)


@pytest.mark.parametrize("suite", REFUSED)
def test_other_suites_are_not(vault: Vault, suite: str) -> None:
    said = vault.openssl("-tls1_2", "-cipher", f"{suite}:@SECLEVEL=0")
    assert "Cipher is (NONE)" in said
    assert "alert handshake failure" in said


@pytest.mark.parametrize("group", ["X25519", "P-256", "P-384"])
def test_groups(vault: Vault, group: str) -> None:
    assert "Verification: OK" in vault.openssl("-groups", group)


def test_renegotiation_is_refused_and_the_connection_lives_no_longer_than_its_client(vault: Vault) -> None:
    said = vault.openssl("-tls1_2", "-msg", said="R\n")
    assert "no_renegotiation" in said or "no renegotiation" in said


def test_a_flood_of_key_updates_ends_the_connection(vault: Vault) -> None:
    """They cost work and carry nothing (CVE-2026-32283)."""
    command = ["openssl", "s_client", "-tls1_3", "-connect", f"127.0.0.1:{vault.gateway.port()}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        assert client.stdin is not None

        def ended() -> bool:
            with contextlib.suppress(BrokenPipeError):
                client.stdin.write(b"k\n")  # one key update for each read of it
                client.stdin.flush()
            return client.poll() is not None

        eventually(ended, "the end of the client")
        with contextlib.suppress(BrokenPipeError):
            client.stdin.close()


def test_alpn(vault: Vault) -> None:
    for offered, selected in ((["h2", "http/1.1"], "h2"), (["http/1.1", "h2"], "h2"), (["http/1.1"], "http/1.1")):
        with vault.connect(alpn=offered) as stream:
            assert stream.sock.selected_alpn_protocol() == selected
    with vault.connect() as stream:
        assert stream.sock.selected_alpn_protocol() is None
    with pytest.raises(ssl.SSLError, match="(?i)no.application.protocol"):
        vault.connect(alpn=["h3"])


def test_no_early_data(vault: Vault) -> None:
    assert "Max Early Data: 0" in vault.openssl("-tls1_3", "-ign_eof", said="GET /x HTTP/1.1\r\nhost: bank.test\r\nconnection: close\r\n\r\n")


# -- which certificate


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("bank.test", "bank.test"),
        ("BANK.Test", "bank.test"),
        ("v1.api.test", "bank.test"),
        ("other.test", "other.test"),
        ("OTHER.test", "other.test"),
        ("a.b.api.test", "bank.test"),
        ("unknown.test", "bank.test"),
        ("sub.other.test", "bank.test"),
        (None, "bank.test"),
    ],
)
def test_the_certificate_is_chosen_by_the_name(vault: Vault, host: str | None, names: str) -> None:
    assert names in vault.names(host)


@pytest.mark.parametrize(("algorithms", "kind"), [("RSA-PSS+SHA256", "RSA-PSS"), ("ECDSA+SHA256", "ECDSA")])
def test_rsa_and_ecdsa_side_by_side(vault: Vault, algorithms: str, kind: str) -> None:
    assert f"Peer signature type: {kind}" in vault.openssl("-sigalgs", algorithms)


def test_the_chain_is_sent(vault: Vault) -> None:
    said = vault.openssl()
    assert "Verification: OK" in said
    assert "CN = Test Issuing" in said


def test_a_chain_that_the_file_lacks_is_taken_from_the_authorities(vault: Vault) -> None:
    said = vault.openssl(name="leaf")
    assert "Verification: OK" in said
    assert "CN = Test Issuing" in said


def test_a_stapled_ocsp_response(vault: Vault) -> None:
    said = vault.openssl("-status", "-sigalgs", "RSA-PSS+SHA256")
    assert "OCSP Response Status: successful" in said
    assert "Cert Status: good" in said
    assert "no response sent" in vault.openssl("-status", host="other.test")


def test_a_client_hello_in_small_pieces_gets_its_own_certificate(vault: Vault) -> None:
    """Two records, byte by byte: the name is read as if it had come in one (CVE-2026-32305)."""
    hello = client_hello("other.test")
    body = hello[5:]
    at = len(body) // 2
    split = b"".join(hello[:3] + len(part).to_bytes(2, "big") + part for part in (body[:at], body[at:]))
    with socket.create_connection(("127.0.0.1", vault.gateway.port()), PATIENCE) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in split:
            sock.sendall(bytes([byte]))
        assert sock.recv(5)[:1] == b"\x16"  # a ServerHello, no alert


# -- requests


def test_the_upstream_is_told_https(vault: Vault) -> None:
    with httpx.Client(verify=vault.context(), trust_env=False, timeout=PATIENCE) as client:
        told = Told(client.get(f"https://localhost:{vault.gateway.port()}/x", headers={"x-forwarded-proto": "http"}))
    assert told.one("x-forwarded-proto") == "https"
    assert told.one("forwarded").endswith(";proto=https")


def test_keep_alive_and_pipelining(vault: Vault) -> None:
    before = vault.counter("tls_handshakes_total")
    with vault.connect() as stream:
        stream.send(*[get(f"/x?body={n}") for n in range(50)])
        assert [stream.answer().body for _ in range(50)] == [str(n).encode() for n in range(50)]
        for n in range(20):
            assert stream.ask(post("/x", b"p" * n)).status == 200
    assert vault.counter("tls_handshakes_total") == before + 1


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("listener", ["public", "kernel"])
def test_bodies_both_ways_arrive_whole(vault: Vault, listener: str, version: ssl.TLSVersion) -> None:
    """`kernel` asks for kTLS, which the machine may have or not."""
    size = 24 if listener == "public" else 1

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        request = stream.head()
        total = hashlib.sha256()
        for piece in stream.pieces(int(request.fields["content-length"])):
            total.update(piece)
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nx-hash: %s\r\n\r\n" % (size << 20, total.hexdigest().encode()))
        for _ in range(size):
            stream.send(PATTERN)

    vault.origin.script = script
    expected = hashlib.sha256(PATTERN * size).hexdigest()
    with vault.connect(listener, version=version) as stream:
        stream.send(get("/scripted/big", f"content-length: {size << 20}", method="POST"))
        for _ in range(size):
            stream.send(PATTERN)
        answer = stream.answer()
    assert answer.fields["x-hash"] == expected
    assert hashlib.sha256(answer.body).hexdigest() == expected


def test_a_chunked_answer(vault: Vault) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for n in (1, 100, 20_000, 70_000):
            stream.send(b"%x\r\n" % n, PATTERN[:n], b"\r\n")
        stream.send(b"0\r\n\r\n")

    vault.origin.script = script
    with vault.connect() as stream:
        assert stream.ask(get("/scripted/x")).body == b"".join(PATTERN[:n] for n in (1, 100, 20_000, 70_000))


def test_curl(vault: Vault) -> None:
    url = f"https://bank.test:{vault.gateway.port()}/x?body=hello"
    command = ["curl", "-sS", "--fail", "--cacert", str(vault.folder / "root.crt"), "--resolve", f"bank.test:{vault.gateway.port()}:127.0.0.1"]
    done = subprocess.run([*command, url, url], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "hellohello"


# -- PROXY


HEADER = b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 443\r\n"


def test_a_proxy_header_comes_before_the_handshake(vault: Vault) -> None:
    with vault.connect("proxied", before=HEADER) as stream:
        answer = stream.ask(get())
    assert b'["x-forwarded-for", "192.0.2.7"]' in answer.body


def test_a_proxy_header_in_pieces_and_together_with_the_hello(vault: Vault) -> None:
    for pieces in ([HEADER[:5], HEADER[5:30], HEADER[30:]], [HEADER + client_hello("bank.test")]):
        with socket.create_connection(("127.0.0.1", vault.gateway.port("proxied")), PATIENCE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                sock.sendall(piece)
                assert len(pieces) == 1 or eventually(lambda: vault.counter("tls_handshakes_in_flight") == 1, "the connection")
            if len(pieces) > 1:
                sock.sendall(client_hello("bank.test"))
            assert sock.recv(5)[:1] == b"\x16"


def test_without_its_proxy_header_a_handshake_ends(vault: Vault) -> None:
    with pytest.raises(OSError):
        vault.connect("proxied")


# -- sessions


def session_of(stream: TlsStream) -> ssl.SSLSession:
    """A session that can be resumed: the ticket of TLS 1.3 comes with the first answer."""
    assert stream.ask(get()).status == 200
    found = stream.sock.session
    assert found is not None
    return found


@pytest.mark.parametrize("version", [V12, V13])
def test_sessions_are_resumed_by_every_worker(vault: Vault, version: ssl.TLSVersion) -> None:
    context = vault.context(version=version)
    with vault.connect(context=context) as stream:
        assert not stream.sock.session_reused
        session = session_of(stream)
    before = by_worker(vault)

    def everyone() -> bool:
        with vault.connect(context=context, session=session) as stream:
            assert stream.sock.session_reused
            assert stream.ask(get()).status == 200
        now = by_worker(vault)
        return all(now[worker] > before[worker] for worker in ("0", "1"))

    eventually(everyone, "a handshake with each worker")


def by_worker(vault: Vault) -> dict[str, float]:
    text: str = vault.gateway.admin("/metrics?by=worker")[1]
    found = {}
    for line in text.splitlines():
        if line.startswith("crossway_tls_sessions_resumed_total{"):
            found[line.partition('worker="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    return found


def test_a_client_certificate_is_asked_for_every_time(vault: Vault) -> None:
    """Listeners that ask for certificates resume nothing: chain and revocation are looked at anew (CVE-2025-23419)."""
    context = vault.context(show="good")
    with vault.connect("mutual", context=context) as stream:
        session = session_of(stream)
    with vault.connect("mutual", context=context, session=session) as stream:
        assert not stream.sock.session_reused


def test_a_session_of_another_listener_is_not_taken(vault: Vault) -> None:
    context = vault.context(version=V13)
    with vault.connect("public", context=context) as stream:
        session = session_of(stream)
    with vault.connect("modern", context=context, session=session) as stream:
        assert not stream.sock.session_reused
        assert stream.ask(get()).status == 200


# -- ends


def data_segments(sock: socket.socket) -> int:
    """Segments with data that the kernel received on a connection (tcpi_data_segs_in)."""
    found: int = struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 152)[0]
    return found


def await_ticket(stream: TlsStream) -> None:
    """Wait until the client has a ticket, while no data comes."""
    stream.sock.settimeout(0.05)

    def come() -> bool:
        with contextlib.suppress(TimeoutError):
            raise AssertionError(f"data came first: {stream.sock.recv(1)!r}")
        return stream.sock.session is not None and stream.sock.session.has_ticket

    eventually(come, "a ticket")


def test_a_complete_answer_ends_with_close_notify(vault: Vault) -> None:
    with vault.connect() as stream:
        assert stream.ask(get("/x", "connection: close")).status == 200
        assert stream.closed()


def test_tickets_answer_and_end_travel_together(vault: Vault) -> None:
    """Segments cost more than bytes: the server's flight, then (unless the request came along) tickets, then all the rest."""
    with vault.connect(version=V13) as stream:
        assert stream.ask(get("/x", "connection: close")).status == 200
        assert stream.closed()
        assert data_segments(stream.sock) <= 3


def test_tickets_do_not_wait_for_a_request(vault: Vault) -> None:
    with vault.connect(version=V13) as stream:
        await_ticket(stream)


def test_tickets_do_not_wait_for_an_answer_that_takes_long(vault: Vault) -> None:
    ticket = threading.Event()

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        assert ticket.wait(PATIENCE)
        stream.send(ok(b"late"))

    vault.origin.script = script
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = vault.context(version=V13).wrap_bio(incoming, outgoing, server_hostname="bank.test")
    with socket.create_connection(("127.0.0.1", vault.gateway.port()), PATIENCE) as sock:

        def until(step: Callable[[], object]) -> object:
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    return step()
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(1 << 16))

        until(client.do_handshake)
        client.write(get("/scripted/x"))
        sock.sendall(outgoing.read())  # the end of the handshake and a request, in one segment
        while client.session is None or not client.session.has_ticket:
            incoming.write(sock.recv(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                raise AssertionError(f"data came first: {client.read()!r}")
        ticket.set()
        answer = until(client.read)
        assert isinstance(answer, bytes)
        assert answer.endswith(b"late")


@pytest.mark.parametrize("length", [0, 1, 16_384, 50_000, len(PATTERN)])
def test_an_answer_of_any_length_is_whole_before_the_end(vault: Vault, length: int) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length, PATTERN[:length])

    vault.origin.script = script
    with vault.connect() as stream:
        assert stream.ask(get("/scripted/x", "connection: close")).body == PATTERN[:length]
        assert stream.closed()


def test_an_answer_that_ends_with_the_connection_has_a_clean_end(vault: Vault) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 200 OK\r\n\r\n", b"whole")

    vault.origin.script = script
    with vault.connect() as stream:
        stream.send(b"GET /scripted/x HTTP/1.0\r\nhost: bank.test\r\n\r\n")
        answer = stream.answer()
    assert answer.body == b"whole"
    assert answer.clean


@pytest.mark.parametrize("version", [V12, V13])
def test_a_cut_answer_has_none(vault: Vault, version: ssl.TLSVersion) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(ok(b"x" * 1000)[:-500])

    vault.origin.script = script
    with vault.connect(version=version) as stream:
        stream.send(b"GET /scripted/x HTTP/1.0\r\nhost: bank.test\r\n\r\n")
        stream.head()
        body, clean = stream.rest()
        assert len(body) <= 500
        assert not clean
