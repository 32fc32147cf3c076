"""TLS towards upstreams: whom the gateway believes, what it shows, and how it takes an end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.integration.bank import WatchedGateway
from tests.integration.faults import PATTERN, Cut, Script, ScriptedOrigin, Stream, connect, get, ok, post, serve
from tests.integration.pki import DAY, Authority
from tests.integration.processes import PATIENCE, eventually
from tests.integration.vault import TlsOrigin, server_context

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


class Lab:
    """An authority, certificates for origins, and gateways whose one upstream has given TLS settings."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.root = Authority("Internal Root", number=60)
        self.issuing = Authority("Internal Issuing", self.root, number=61)
        self.good = self.issuing.issue("payments.internal", "localhost", "127.0.0.1").write(folder, "good")
        self.issuing.issue("edge.internal", number=62).write(folder, "edge")
        (folder / "ca.crt").write_bytes(self.root.pem)
        self.origin: ScriptedOrigin

    def serve(self, name: str = "good", script: Script = serve, *, client_ca: bytes = b"", version: ssl.TLSVersion | None = None) -> TlsOrigin:
        origin = TlsOrigin(server_context(self.folder, name, client_ca=client_ca, version=version), script)
        self.stack.callback(origin.close)
        self.origin = origin
        return origin

    def write(self, tls: str = "{ca: ca.crt}", *, more: str = "", host: str = "127.0.0.1") -> Path:
        path = self.folder / "edge.yaml"
        path.write_text(
            "version: 1\nworkers: 1\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0, limits: {body: 1GiB}}}\n"
            f"upstreams: {{origin: {{targets: ['{host}:{self.origin.port}'], tls: {tls}{more}}}}}\n"
            "routes: [{name: all, match: {prefix: /}, upstream: origin}]\n"
        )
        return path

    def gateway(self, tls: str = "{ca: ca.crt}", *, more: str = "", host: str = "127.0.0.1") -> WatchedGateway:
        return self.stack.enter_context(WatchedGateway(self.write(tls, more=more, host=host)))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(tmp_path, stack)


def status(gateway: WatchedGateway, request: bytes | None = None) -> int:
    with connect(gateway.port()) as stream:
        return stream.ask(request or get()).status


def refused(gateway: WatchedGateway, origin: ScriptedOrigin) -> None:
    """503 that says the request was not sent, and truly was not."""
    seen: list[str] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        seen.append(stream.request().start)
        stream.send(ok())

    origin.script = script
    with connect(gateway.port()) as stream:
        answer = stream.ask(post("/pay", b"1 EUR"))
    assert answer.status == 503, answer
    assert b"upstream-tls-failed" in answer.body
    assert b"was not sent" in answer.body
    assert not seen
    assert gateway.counter("upstream_tls_failures") >= 1
    assert gateway.counter("upstream_tls_handshakes") == 0
    assert [line for line in gateway.log() if line["event"] == "the TLS handshake with an upstream failed"]


# -- whom it believes


@pytest.mark.parametrize("version", [V12, V13])
def test_a_server_of_the_authority_is_believed(lab: Lab, version: ssl.TLSVersion) -> None:
    origin = lab.serve(version=version)
    gateway = lab.gateway()
    assert status(gateway, post("/pay", b"x")) == 200
    assert gateway.counter("upstream_tls_handshakes") == 1
    assert origin.handshakes == 1
    gateway.calm()


def test_an_unknown_authority_is_not(lab: Lab) -> None:
    Authority("Elsewhere", number=70).issue("localhost", "127.0.0.1").write(lab.folder, "strange")
    origin = lab.serve("strange")
    refused(lab.gateway(), origin)


def test_the_machines_authorities_are_the_default(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = lab.serve()
    monkeypatch.setenv("SSL_CERT_FILE", str(lab.folder / "ca.crt"))
    assert status(lab.gateway("true")) == 200
    Authority("Others", number=71).issue("x").write(lab.folder, "others")
    monkeypatch.setenv("SSL_CERT_FILE", str(lab.folder / "others.crt"))
    refused(lab.gateway("true"), origin)


def test_another_name_is_not(lab: Lab) -> None:
    lab.issuing.issue("other.internal").write(lab.folder, "other")
    origin = lab.serve("other")
    refused(lab.gateway(), origin)


def test_an_expired_certificate_is_not(lab: Lab) -> None:
    lab.issuing.issue("127.0.0.1", begin=-9 * DAY, end=-DAY).write(lab.folder, "old")
    origin = lab.serve("old")
    refused(lab.gateway(), origin)


def test_a_clients_certificate_is_not(lab: Lab) -> None:
    lab.issuing.issue("127.0.0.1", usage=[ExtendedKeyUsageOID.CLIENT_AUTH]).write(lab.folder, "client")
    origin = lab.serve("client")
    refused(lab.gateway(), origin)


def test_a_revoked_certificate_is_not(lab: Lab) -> None:
    (lab.folder / "ca.crl").write_bytes(lab.root.revocations() + lab.issuing.revocations(lab.good))
    origin = lab.serve()
    refused(lab.gateway("{ca: ca.crt, crl: ca.crl}"), origin)
    (lab.folder / "ca.crl").write_bytes(lab.root.revocations() + lab.issuing.revocations())
    assert status(lab.gateway("{ca: ca.crt, crl: ca.crl}")) == 200


def test_a_chain_without_its_intermediate_is_not(lab: Lab) -> None:
    (lab.folder / "short.crt").write_bytes(lab.good.pem[: lab.good.pem.index(b"-----END CERTIFICATE-----") + 26])
    (lab.folder / "short.key").write_bytes(lab.good.key_pem)
    origin = lab.serve("short")
    refused(lab.gateway(), origin)


def test_old_versions_are_not(lab: Lab) -> None:
    origin = lab.serve(version=V12)
    refused(lab.gateway("{ca: ca.crt, min_version: 1.3}"), origin)


def test_insecure_believes_everyone_and_says_so_at_every_start(lab: Lab) -> None:
    Authority("Elsewhere", number=70).issue("whatever.test").write(lab.folder, "strange")
    lab.serve("strange")
    gateway = lab.gateway("{insecure: true}")
    assert status(gateway) == 200
    said = [line for line in gateway.log() if "not verified" in line["event"]]
    assert said and said[0]["level"] == "warning" and said[0]["upstream"] == "origin"


@pytest.mark.parametrize(
    ("tls", "good"),
    [
        ("{ca: ca.crt, server_name: payments.internal}", True),
        ("{ca: ca.crt, server_name: PAYMENTS.internal}", True),
        ("{ca: ca.crt, server_name: other.internal}", False),
        ("{ca: ca.crt, server_name: internal}", False),
        ("{ca: ca.crt, sans: payments.internal}", True),
        ("{ca: ca.crt, sans: [spiffe://bank.test/pay, payments.internal]}", True),
        ("{ca: ca.crt, sans: spiffe://bank.test/pay}", False),
        ("{ca: ca.crt, server_name: other.internal, sans: payments.internal}", True),
    ],
)
def test_the_expected_name(lab: Lab, tls: str, good: bool) -> None:
    origin = lab.serve()
    gateway = lab.gateway(tls)
    if good:
        assert status(gateway) == 200
    else:
        refused(gateway, origin)


def test_a_uri_as_the_expected_name(lab: Lab) -> None:
    lab.issuing.issue("x.internal", "spiffe://bank.test/ns/pay").write(lab.folder, "spiffe")
    lab.serve("spiffe")
    assert status(lab.gateway("{ca: ca.crt, sans: spiffe://bank.test/ns/pay}")) == 200


def test_the_name_that_is_asked_for(lab: Lab) -> None:
    asked: list[str | None] = []
    origin = lab.serve()
    origin.context.sni_callback = lambda connection, name, context: asked.append(name)
    assert status(lab.gateway("{ca: ca.crt, server_name: payments.internal}")) == 200
    assert status(lab.gateway(host="localhost")) == 200
    assert status(lab.gateway()) == 200
    assert asked == ["payments.internal", "localhost", None]  # an address is not asked for (RFC 6066 3)


# -- what it shows


def test_our_own_certificate(lab: Lab) -> None:
    origin = lab.serve(client_ca=lab.root.pem)
    assert status(lab.gateway("{ca: ca.crt, certificate: {cert: edge.crt, key: edge.key}}")) == 200
    (peer,) = origin.peers
    assert peer is not None and ("DNS", "edge.internal") in peer["subjectAltName"]


def test_a_chain_that_its_file_lacks_is_taken_from_the_authorities(lab: Lab) -> None:
    replace(lab.issuing.issue("edge.internal", number=63), chain=()).write(lab.folder, "leaf")
    (lab.folder / "both.crt").write_bytes(lab.root.pem + lab.issuing.pem)
    origin = lab.serve(client_ca=lab.root.pem)
    assert status(lab.gateway("{ca: both.crt, certificate: {cert: leaf.crt, key: leaf.key}}")) == 200
    assert len(origin.peers) == 1 and origin.peers[0] is not None


@pytest.mark.parametrize("version", [V12, V13])
def test_without_the_certificate_that_it_wants_nothing_is_answered(lab: Lab, version: ssl.TLSVersion) -> None:
    origin = lab.serve(client_ca=lab.root.pem, version=version)
    assert status(lab.gateway(), post("/pay", b"x")) == (503 if version is V12 else 502)
    assert origin.handshakes == 0


# -- sessions and pools


@pytest.mark.parametrize("version", [V12, V13])
def test_sessions_are_resumed(lab: Lab, version: ssl.TLSVersion) -> None:
    origin = lab.serve(version=version)
    gateway = lab.gateway(more=", keepalive: {connections: 0}")
    for _ in range(6):
        assert status(gateway) == 200
    eventually(lambda: origin.handshakes == 6, "six connections")
    assert origin.resumed == 5
    assert gateway.counter("upstream_tls_sessions_resumed") == 5


@pytest.mark.parametrize("version", [V12, V13])
def test_tickets_behind_the_handshake_are_no_unasked_answer(lab: Lab, version: ssl.TLSVersion) -> None:
    origin = lab.serve(version=version)
    gateway = lab.gateway()
    with connect(gateway.port()) as stream:
        for n in range(30):
            assert stream.ask(get() if n % 2 else post("/pay", b"x")).status == 200
    assert origin.handshakes == 1
    assert gateway.counter("upstream_discarded") == 0


def test_bytes_on_an_idle_connection_are(lab: Lab) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(ok(b"one"))
        origin.go.wait(PATIENCE)
        stream.send(ok(b"nobody asked"))
        assert stream.closed()
        origin.seen.release()

    origin = lab.serve(script=script)
    gateway = lab.gateway()
    with connect(gateway.port()) as stream:
        assert stream.ask(get()).body == b"one"
        origin.script = serve
        origin.go.set()
        origin.saw()
        assert stream.ask(post("/pay", b"two")).body == b"two"


def test_a_reload_with_other_settings_uses_new_connections(lab: Lab) -> None:
    origin = lab.serve()
    gateway = lab.gateway()
    assert status(gateway) == 200
    lab.write("{ca: ca.crt, server_name: payments.internal}")
    assert gateway.admin("/reload", "POST")[0] == 200
    assert status(gateway) == 200
    assert origin.handshakes == 2
    assert origin.resumed == 0
    assert gateway.admin("/reload", "POST")[0] == 200  # the same again: the pool stays
    assert status(gateway) == 200
    assert origin.handshakes == 2


def test_an_attempt_that_comes_too_late_does_not_hide_the_one_before_it(lab: Lab) -> None:
    """The first attempt was read. The time is over just when the second one could be sent, while the worker sleeps."""
    secure = lab.serve().context

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        if origin.accepted > 1:
            stream.sock.recv(1, socket.MSG_PEEK)        # its ClientHello: without that the worker would have no step to take
            origin.seen.release()
            origin.go.wait(PATIENCE)
        with secure.wrap_socket(stream.sock, server_side=True) as sock:
            sock.recv(65536)

    lab.origin = origin = ScriptedOrigin(script)
    lab.stack.callback(origin.close)
    gateway = lab.gateway(more=", retries: {attempts: 1, on: [reset], backoff: {base: 1ms, max: 1ms}}, timeouts: {total: 2500ms}")
    with connect(gateway.port()) as stream:
        stream.send(post("/pay", b"1 EUR").replace(b"POST", b"PUT", 1))
        origin.saw()
        os.kill(gateway.pids[0], signal.SIGSTOP)
        origin.go.set()
        time.sleep(3)                                   # the deadline, and the handshake's next step, are there when it wakes
        os.kill(gateway.pids[0], signal.SIGCONT)
        answer = stream.answer()
    assert answer.status == 504, answer
    assert b"may have been executed" in answer.body, answer


# -- ends


def test_close_notify_is_a_clean_end(lab: Lab) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 200 OK\r\n\r\n", PATTERN[:100_000])
        assert isinstance(stream.sock, ssl.SSLSocket)
        with contextlib.suppress(OSError):
            stream.sock.unwrap()

    lab.serve(script=script)
    with connect(lab.gateway().port()) as stream:
        assert stream.ask(get()).body == PATTERN[:100_000]


@pytest.mark.parametrize("version", [V12, V13])
def test_an_end_without_it_is_a_cut_answer(lab: Lab, version: ssl.TLSVersion) -> None:
    """Anybody on the way can end a TCP connection; only the server can say that the answer is whole."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 200 OK\r\n\r\n", PATTERN[:100_000])
        stream.sock.shutdown(socket.SHUT_WR)
        stream.closed()

    lab.serve(script=script, version=version)
    gateway = lab.gateway()
    with connect(gateway.port()) as stream, pytest.raises(Cut):
        stream.ask(get())
    with connect(gateway.port()) as stream:
        stream.send(b"GET /x HTTP/1.0\r\nhost: bank.test\r\n\r\n")
        stream.head()
        assert not stream.rest()[1]


def test_an_answer_of_a_length_that_is_cut(lab: Lab) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(ok(b"x" * 1000)[:-1])

    lab.serve(script=script)
    with connect(lab.gateway().port()) as stream, pytest.raises(Cut):
        stream.ask(get())


def test_bodies_both_ways(lab: Lab) -> None:
    size = 16

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        request = stream.head()
        got = b"".join(stream.pieces(int(request.fields["content-length"])))
        assert got == PATTERN * size
        stream.send(ok(got))

    lab.serve(script=script)
    with connect(lab.gateway().port()) as stream:
        sender = threading.Thread(target=stream.send, args=(post("/big", PATTERN * size),))
        sender.start()
        assert stream.answer().body == PATTERN * size
        sender.join(PATIENCE)


# -- servers that misbehave


def plain_origin(lab: Lab, script: Script) -> ScriptedOrigin:
    origin = ScriptedOrigin(script)
    lab.stack.callback(origin.close)
    lab.origin = origin
    return origin


@pytest.mark.parametrize("said", [ok(b"in clear text"), b"SSH-2.0-x\r\n", b"\x15\x03\x03\x00\x02\x02\x28"])
@pytest.mark.parametrize("when", ["at once", "after the hello"])
def test_clear_text_from_a_tls_upstream_is_no_answer(lab: Lab, said: bytes, when: str) -> None:
    """CVE-2026-1642: what comes before the handshake is complete is nobody's answer."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        if when == "after the hello":
            stream.exactly(5)
        stream.send(said)
        stream.rest()

    plain_origin(lab, script)
    gateway = lab.gateway()
    with connect(gateway.port()) as stream:
        answer = stream.ask(post("/pay", b"x"))
    assert answer.status in (502, 503)
    assert b"was not sent" in answer.body
    gateway.calm()


def test_a_handshake_that_stalls_is_504_and_not_sent(lab: Lab) -> None:
    plain_origin(lab, lambda origin, stream: stream.rest() and None)
    gateway = lab.gateway(more=", timeouts: {connect: 300ms}, retries: 0")
    with connect(gateway.port()) as stream:
        answer = stream.ask(post("/pay", b"x"))
    assert answer.status == 504
    assert b"not sent" in answer.body
    gateway.calm()


@pytest.mark.parametrize("end", [Stream.close, Stream.reset])
def test_a_server_that_leaves_in_the_handshake(lab: Lab, end: Callable[[Stream], None]) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.exactly(50)
        end(stream)

    origin = plain_origin(lab, script)
    gateway = lab.gateway()
    with connect(gateway.port()) as stream:
        answer = stream.ask(post("/pay", b"x"))
    assert answer.status == 503
    assert b"upstream-tls-failed" in answer.body
    assert origin.accepted == 2  # a second attempt is safe: nothing had been sent
    gateway.calm()


# -- what Python sends


CHECK = ", health: {check: {http: {path: /healthz}, interval: 100ms, healthy: 1, unhealthy: 1}}"


def test_checks_connect_as_the_traffic_does(lab: Lab) -> None:
    asked: list[str] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        asked.append(stream.head().path)
        stream.send(ok(b"", "connection: close"))

    lab.serve(script=script)
    gateway = lab.gateway("{ca: ca.crt, sans: payments.internal}", more=CHECK)
    eventually(lambda: asked.count("/healthz") >= 2, "two checks")
    assert status(gateway) == 200
    assert not [line for line in gateway.log() if "failed its checks" in line["event"]]


@pytest.mark.parametrize("tls", ["{ca: ca.crt}", "{ca: ca.crt, server_name: other.internal}", "{ca: ca.crt, sans: other.internal}"])
def test_checks_demand_the_same_of_the_server(lab: Lab, tls: str) -> None:
    Authority("Elsewhere", number=70).issue("127.0.0.1").write(lab.folder, "strange")
    lab.serve("strange" if tls == "{ca: ca.crt}" else "good")
    gateway = lab.gateway(tls, more=CHECK)

    def failed() -> list[str]:
        return [line["reason"] for line in gateway.log() if "failed its checks" in line["event"]]

    assert "TLS: " in eventually(failed, "the verdict")[0]


def test_copies_for_a_mirror_go_out_over_tls(lab: Lab) -> None:
    copied: list[str] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        copied.append(stream.request().fields["x-crossway-mirror"])
        stream.send(ok())

    shadow = lab.serve(script=script)
    shadow_port = shadow.port
    lab.serve()
    path = lab.write()
    text = path.read_text().replace("upstreams: {", f"upstreams: {{shadow: {{targets: ['127.0.0.1:{shadow_port}'], tls: {{ca: ca.crt}}}}, ")
    path.write_text(text.replace("upstream: origin}]", "upstream: origin, mirror: {upstream: shadow}}]"))
    gateway = lab.stack.enter_context(WatchedGateway(path))
    assert status(gateway) == 200
    eventually(lambda: copied == ["1"], "the copy")
    assert shadow.handshakes == 1
