"""Certificates that change under load, by SIGHUP and by themselves; tickets over workers' deaths and rotations."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from cryptography import x509

from tests.integration.bank import WatchedGateway
from tests.integration.faults import Payers, ScriptedOrigin, Stream, get
from tests.integration.pki import DAY, Authority
from tests.integration.processes import PATIENCE, eventually
from tests.integration.vault import TlsStream


class Shop:
    """A gateway with one TLS listener whose certificate the test replaces."""

    def __init__(self, folder: Path, origin: int, *, tls: str = "", workers: int = 2) -> None:
        self.folder = folder
        self.authority = Authority("Shop Root", number=80)
        self.renew("first.test")
        (folder / "shop.yaml").write_text(
            f"version: 1\nworkers: {workers}\nadmin: {{bind: 127.0.0.1:0}}\n"
            f"listeners: {{public: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: shop.crt, key: shop.key}}]{tls}}}}}}}\n"
            f"upstreams: {{origin: {{targets: [127.0.0.1:{origin}]}}}}\n"
            "routes: [{name: all, match: {prefix: /}, upstream: origin}]\n"
        )
        self.gateway = WatchedGateway(folder / "shop.yaml")

    def renew(self, name: str, **options: object) -> None:
        """Replace certificate and key as a careful job does: each by a rename."""
        issued = self.authority.issue("shop.test", subject=name, **options)  # type: ignore[arg-type]
        for suffix, content in (("crt", issued.pem), ("key", issued.key_pem)):
            (self.folder / f"next.{suffix}").write_bytes(content)
            (self.folder / f"next.{suffix}").rename(self.folder / f"shop.{suffix}")

    def context(self) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.load_verify_locations(cadata=self.authority.pem.decode())
        return made

    def connect(self, port: int = 0, context: ssl.SSLContext | None = None, session: ssl.SSLSession | None = None) -> TlsStream:
        sock = socket.create_connection(("127.0.0.1", port or self.gateway.port()), PATIENCE)
        wrapped = (context or self.context()).wrap_socket(
            sock, server_hostname="shop.test", suppress_ragged_eofs=False, session=session
        )
        return TlsStream(wrapped)

    def shown(self) -> str:
        """The common name of the certificate that a new connection gets."""
        with self.connect() as stream:
            der = stream.sock.getpeercert(binary_form=True)
        assert der is not None
        (name,) = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(name.value)

    def session(self, context: ssl.SSLContext) -> ssl.SSLSession:
        with self.connect(context=context) as stream:
            assert stream.ask(get()).status == 200
            found = stream.sock.session
        assert found is not None
        return found

    def resumes(self, context: ssl.SSLContext, session: ssl.SSLSession) -> bool:
        with self.connect(context=context, session=session) as stream:
            assert stream.ask(get()).status == 200
            return bool(stream.sock.session_reused)

    def __enter__(self) -> Self:
        self.gateway.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.gateway.__exit__(*error)


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    made = ScriptedOrigin()
    yield made
    made.close()


def test_certificates_are_replaced_under_load(tmp_path: Path, origin: ScriptedOrigin) -> None:
    """Ten reloads, a new certificate each: no payment fails, on connections that stay and on new ones."""
    with Shop(tmp_path, origin.port) as shop:

        def connect(port: int) -> Stream:
            return shop.connect(port)

        with Payers(shop.gateway.port(), 2, connect=connect) as staying, Payers(shop.gateway.port(), 2, fresh=True, connect=connect) as fresh:
            for turn in range(10):
                fresh.paid(3)
                shop.renew(f"turn-{turn}.test")
                status, body = shop.gateway.admin("/reload", "POST")
                assert status == 200, body
                assert shop.shown() == f"turn-{turn}.test"
            staying.paid(10)
        assert not staying.failed() and not fresh.failed()
        staying_and_fresh = {**staying.told, **fresh.told}
        assert origin.ledger.executed.keys() == staying_and_fresh.keys()
        assert max(origin.ledger.executed.values()) == 1


def test_sighup_takes_the_new_certificate_and_keeps_connections(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port) as shop, shop.connect() as before:
        assert before.ask(get()).status == 200
        shop.renew("second.test")
        shop.gateway.signal(signal.SIGHUP)
        eventually(lambda: shop.shown() == "second.test", "the new certificate")
        assert before.ask(get()).status == 200
        assert before.sock.getpeercert() is not None


def test_changed_files_are_noticed(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port) as shop:
        shop.renew("second.test")
        eventually(lambda: shop.shown() == "second.test", "the new certificate")
        assert any(line["event"] == "reload asked for" and line.get("by") == "changed files" for line in shop.gateway.log())
        # A key that is not the certificate's is refused; the old pair serves until the right one comes.
        good = (tmp_path / "shop.key").read_bytes()
        (tmp_path / "shop.key").write_bytes(Authority("Nobody", number=81).issue("x", number=82).key_pem)
        eventually(lambda: "reload refused, the old configuration serves" in shop.gateway.events(), "the refusal")
        assert shop.shown() == "second.test"
        (tmp_path / "shop.key").write_bytes(good)
        shop.renew("third.test")
        eventually(lambda: shop.shown() == "third.test", "the third certificate")


def test_a_secret_that_kubernetes_exchanges_is_noticed(tmp_path: Path, origin: ScriptedOrigin) -> None:
    """The files of a mounted Secret are links through one link that is exchanged; their own names never change."""
    with Shop(tmp_path, origin.port) as shop:

        def exchange(name: str) -> None:
            fresh = tmp_path / f"..{name}"
            fresh.mkdir()
            issued = shop.authority.issue("shop.test", subject=name)
            (fresh / "shop.crt").write_bytes(issued.pem)
            (fresh / "shop.key").write_bytes(issued.key_pem)
            (tmp_path / "..data_tmp").symlink_to(fresh.name)
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")

        exchange("one.test")
        for file in ("shop.crt", "shop.key"):
            (tmp_path / "link").symlink_to(f"..data/{file}")
            (tmp_path / "link").rename(tmp_path / file)
        eventually(lambda: shop.shown() == "one.test", "the linked certificate")
        exchange("two.test")
        shutil.rmtree(tmp_path / "..one.test")
        eventually(lambda: shop.shown() == "two.test", "the exchanged certificate")


def test_a_vanished_file_changes_nothing(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port) as shop:
        (tmp_path / "shop.crt").unlink()
        status, body = shop.gateway.admin("/reload", "POST")
        assert status == 422
        assert "cannot read the certificate" in body["text"]
        assert shop.shown() == "first.test"


def test_sessions_survive_every_worker(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port) as shop:
        context = shop.context()
        session = shop.session(context)
        old = shop.gateway.workers()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: (now := shop.gateway.workers()) and not set(now) & set(old), "new workers")
        for _ in range(8):
            assert shop.resumes(context, session)


def test_sessions_survive_a_reload_but_not_another_certificate_of_theirs(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port) as shop:
        context = shop.context()
        session = shop.session(context)
        assert shop.gateway.admin("/reload", "POST")[0] == 200
        assert shop.resumes(context, session)
        shop.renew("second.test")
        assert shop.gateway.admin("/reload", "POST")[0] == 200
        assert not shop.resumes(context, session)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_ticket_keys_rotate_in_all_workers(tmp_path: Path, origin: ScriptedOrigin, version: ssl.TLSVersion) -> None:
    with Shop(tmp_path, origin.port, tls=", tickets: {rotate: 1s}") as shop:
        context = shop.context()
        context.minimum_version = context.maximum_version = version
        session = shop.session(context)
        # Three keys later nobody can open it any more.
        eventually(lambda: not any(shop.resumes(context, session) for _ in range(6)), "the end of the ticket")
        eventually(lambda: shop.resumes(context, shop.session(context)), "a ticket of the new keys")


def test_no_tickets(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port, tls=", tickets: {enabled: false}") as shop:
        context = shop.context()
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context.maximum_version = version
            with shop.connect(context=context) as stream:
                assert stream.ask(get()).status == 200
                assert stream.sock.session is None or not stream.sock.session.has_ticket


def test_the_end_of_a_certificate_is_a_metric_and_a_warning(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port) as shop:
        shop.renew("soon.test", end=5 * DAY)
        assert shop.gateway.admin("/reload", "POST")[0] == 200
        name = f'crossway_certificate_not_after_timestamp_seconds{{file="{tmp_path}/shop.crt",owner="listener public",subject="CN=soon.test"}}'
        end = x509.load_pem_x509_certificate((tmp_path / "shop.crt").read_bytes()).not_valid_after_utc.timestamp()
        assert shop.gateway.metrics()[name] == end

        def warned() -> bool:
            return any(line["event"] == "a certificate expires soon" and line["subject"] == "CN=soon.test" for line in shop.gateway.log())

        eventually(warned, "the warning")


def test_a_drain_does_not_wait_for_who_says_nothing(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port, workers=1, tls=", handshake: 10m") as shop:
        with socket.create_connection(("127.0.0.1", shop.gateway.port()), PATIENCE) as silent:
            eventually(lambda: shop.gateway.metrics()["crossway_tls_handshakes_in_flight"] == 1, "the connection")
            shop.gateway.signal(signal.SIGTERM)
            assert silent.recv(1) == b""
        assert shop.gateway.wait() == 0


def test_a_drain_ends_tls_connections_cleanly(tmp_path: Path, origin: ScriptedOrigin) -> None:
    with Shop(tmp_path, origin.port, workers=1) as shop:
        idle = shop.connect()
        assert idle.ask(get()).status == 200
        shop.gateway.signal(signal.SIGTERM)
        assert idle.closed()
        assert shop.gateway.wait() == 0
        idle.close()

