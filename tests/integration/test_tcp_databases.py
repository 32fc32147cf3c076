"""Databases and their own clients through raw TCP listeners: PostgreSQL with psql and asyncpg, Redis with redis-cli."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator

import asyncpg
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import ScriptedOrigin, Stream, connect
from tests.integration.pki import Authority
from tests.integration.postgres_kit import open_postgres, program
from tests.integration.processes import PATIENCE, eventually
from tests.integration.redis_kit import RedisServer, free_port
from tests.integration.test_tcp_streams import lines

CONFIG = """
version: 1
workers: 2
admin: {{bind: 127.0.0.1:0}}
listeners:
  clear: {{bind: 127.0.0.1:0, tcp: {{upstream: pg}}}}
  secure:
    bind: 127.0.0.1:{secure}
    tls: {{certificates: [{{cert: db.crt, key: db.key}}], client_ca: ca.crt, client_auth: required}}
    tcp: {{upstream: pg}}
  names: {{bind: 127.0.0.1:0, tcp: {{sni: {{db.bank.test: onward}}}}}}
  asked: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: db.crt, key: db.key}}]}}, tcp: {{upstream: pg, starttls: postgres}}}}
  again: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: db.crt, key: db.key}}]}}, tcp: {{upstream: encrypted, starttls: postgres}}}}
  passed: {{bind: 127.0.0.1:0, tcp: {{sni: {{db.bank.test: pg}}, starttls: postgres}}}}
  strange: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: db.crt, key: db.key}}]}}, tcp: {{upstream: stranger, starttls: postgres}}}}
  redis: {{bind: 127.0.0.1:0, tcp: {{upstream: redis}}}}
upstreams:
  pg: {{targets: [127.0.0.1:{pg}], health: {{check: {{tcp: {{}}, interval: 500ms}}}}}}
  onward: {{targets: [127.0.0.1:{secure}]}}
  encrypted: {{targets: [127.0.0.1:{pg}], tls: {{ca: ca.crt, server_name: db.bank.test}}}}
  stranger: {{targets: [127.0.0.1:{stranger}], retries: 0, tls: {{ca: ca.crt, server_name: db.bank.test}}}}
  redis: {{targets: [127.0.0.1:{redis}]}}
"""
USER = "postgres"


@pytest.fixture(scope="module")
def stranger() -> Iterator[ScriptedOrigin]:
    """A server that may answer anything to whoever asks for TLS."""
    origin = ScriptedOrigin(lambda origin, stream: None)
    yield origin
    origin.close()


@pytest.fixture(scope="module")
def gateway(stranger: ScriptedOrigin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedGateway]:
    folder = tmp_path_factory.mktemp("databases")
    authority = Authority("Databases", number=96)
    (folder / "ca.crt").write_bytes(authority.pem)
    authority.issue("db.bank.test").write(folder, "db")
    authority.issue("teller.bank.test").write(folder, "client")
    redis = RedisServer(folder / "redis")
    path = folder / "edge.yaml"
    try:
        with open_postgres(owner=USER, identity=authority.issue("db.bank.test")) as pg:
            path.write_text(CONFIG.format(pg=pg.port, redis=redis.port, secure=free_port(), stranger=stranger.port))
            with WatchedGateway(path) as gateway:
                yield gateway
    finally:
        redis.kill()


def run_psql(gateway: WatchedGateway, listener: str, sql: str, **options: str) -> subprocess.CompletedProcess[str]:
    settings = {"host": "127.0.0.1", "port": str(gateway.port(listener)), "user": USER, "dbname": "postgres", **options}
    return subprocess.run(
        [program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", " ".join(f"{name}={value}" for name, value in settings.items()), "-c", sql],
        capture_output=True, text=True, timeout=PATIENCE * 2, check=False,
    )  # fmt: skip


def psql(gateway: WatchedGateway, listener: str, sql: str, **options: str) -> str:
    done = run_psql(gateway, listener, sql, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_psql_in_clear_text_and_with_its_own_tls_from_end_to_end(gateway: WatchedGateway) -> None:
    in_use = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
    assert psql(gateway, "clear", in_use, sslmode="disable") == "f\n"
    # The client and the server agree on TLS by themselves; the gateway passes it on.
    assert psql(gateway, "clear", in_use, sslmode="require") == "t\n"
    big = psql(gateway, "clear", "select repeat('0123456789', 1000000)", sslmode="disable")
    assert big == "0123456789" * 1_000_000 + "\n"


@pytest.mark.parametrize(("listener", "towards_server"), [("asked", "f"), ("again", "t"), ("passed", "t")])
def test_psql_asks_for_tls_and_is_answered(gateway: WatchedGateway, listener: str, towards_server: str) -> None:
    """TLS ends at the gateway; it ends and begins anew towards the server; it is passed on by the name that the client verifies."""
    ca = gateway.path.parent / "ca.crt"
    verified = {"host": "db.bank.test", "hostaddr": "127.0.0.1", "sslmode": "verify-full", "sslrootcert": str(ca)}
    in_use = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
    assert psql(gateway, listener, in_use, **verified) == f"{towards_server}\n"
    big = psql(gateway, listener, "select repeat('0123456789', 1000000)", **verified)
    assert big == "0123456789" * 1_000_000 + "\n"
    if listener != "passed":  # there it is the server's word, and the name in the handshake is missing
        refused = run_psql(gateway, listener, in_use, **{**verified, "host": "other.bank.test"})
        assert refused.returncode != 0 and 'does not match host name "other.bank.test"' in refused.stderr


@pytest.mark.parametrize("listener", ["asked", "passed"])
def test_a_client_that_wants_no_tls_is_told_as_postgresql_would(gateway: WatchedGateway, listener: str) -> None:
    refused = run_psql(gateway, listener, "select 1", sslmode="disable")
    assert refused.returncode != 0
    assert "FATAL:  this address takes TLS only: connect with sslmode=require or stricter" in refused.stderr


SSL, GSS, CANCEL = (struct.pack("!II", 16 if code == 80877102 else 8, code) for code in (80877103, 80877104, 80877102))


def test_requests_before_tls(gateway: WatchedGateway) -> None:
    context = ssl.create_default_context(cafile=str(gateway.path.parent / "ca.crt"))
    context.set_alpn_protocols(["postgresql"])
    for requests in ([], [SSL], [GSS, SSL]):
        with connect(gateway.port("asked")) as client:
            for request in requests:  # in two pieces
                client.send(request[:3])
                client.send(request[3:])
                assert client.exactly(1) == (b"S" if request == SSL else b"N")
            with context.wrap_socket(client.sock, server_hostname="db.bank.test") as secure:
                assert secure.selected_alpn_protocol() == "postgresql"
                secure.sendall(struct.pack("!IIBB", 9, 196608, 0, 0)[:9])  # a startup message without a user
                assert secure.recv(1) == b"E"
    for bad, answer in (GSS + GSS, b"NE"), (CANCEL + bytes(8), b""), (SSL[:5], b""), (b"GET / HTTP/1.1\r\n\r\n", b"E"):
        with connect(gateway.port("asked")) as client:
            with contextlib.suppress(OSError):  # refused, it may be gone before we end
                client.send(bad)
                client.half_close()
            assert client.rest()[0][:2].rstrip(b"\0") == answer


def test_clear_text_behind_the_request_never_counts_as_said_within_tls(gateway: WatchedGateway) -> None:
    """CVE-2021-23214: what somebody else put behind the client's request."""
    startup = b"user\0postgres\0\0"
    with connect(gateway.port("asked")) as client:
        client.send(SSL, struct.pack("!II", 8 + len(startup), 196608), startup)
        heard = client.rest()[0]
    assert heard[:1] == b"S" and (heard[1:2] in (b"", b"\x15")), heard  # nothing, or an alert
    with connect(gateway.port("asked")) as client:
        port = client.sock.getsockname()[1]
        client.send(SSL + b"\x16")
        client.half_close()
        client.rest()
    line = eventually(lambda: [line for line in lines(gateway, "asked") if line["client_port"] == port])[0]
    assert line["reason"] == "handshake" and "upstream" not in line


@pytest.mark.parametrize("answer", [b"N", b"", b"E\0\0\0\x0aFATAL", b"SE\0\0\0\x0aFATAL"])
def test_a_server_that_does_not_take_tls_is_not_spoken_to(gateway: WatchedGateway, stranger: ScriptedOrigin, answer: bytes) -> None:
    """The last one puts clear text behind its yes (CVE-2021-23222)."""
    heard: list[bytes] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        heard.append(stream.exactly(8))
        if answer:
            stream.send(answer)
        heard.append(stream.rest()[0][:1] if answer else b"")

    stranger.script = script
    with connect(gateway.port("strange")) as client:
        port = client.sock.getsockname()[1]
        client.send(SSL)
        assert client.exactly(1) == b"S"
        context = ssl.create_default_context(cafile=str(gateway.path.parent / "ca.crt"))
        with contextlib.suppress(OSError), context.wrap_socket(client.sock, server_hostname="db.bank.test") as secure:
            secure.sendall(b"secret")
            assert secure.recv(1) == b""
    line = eventually(lambda: [line for line in lines(gateway, "strange") if line["client_port"] == port])[0]
    assert line["reason"] == "unreachable"
    eventually(lambda: len(heard) == 2)
    assert heard[0] == SSL and heard[1] in (b"", b"\x16")  # at most the beginning of a handshake


async def _query(gateway: WatchedGateway, listener: str, *, name: str | None = None) -> tuple[int, int, str]:
    options = {}
    if name is not None:
        context = ssl.create_default_context(cafile=str(gateway.path.parent / "ca.crt"))
        context.load_cert_chain(gateway.path.parent / "client.crt", gateway.path.parent / "client.key")
        options = {"ssl": context, "direct_tls": True}
    connection = await asyncpg.connect(
        host=name or "127.0.0.1", port=gateway.port(listener), user=USER, database="postgres", timeout=PATIENCE, **options
    )
    try:
        await connection.execute("create temp table t (n int, text text)")
        await connection.copy_records_to_table("t", records=[(n, "x" * 1000) for n in range(5000)])
        rows = await connection.fetch("select * from t order by n")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetch("select 1 / 0")
        return len(rows), sum(row["n"] for row in rows), rows[-1]["text"]
    finally:
        await connection.close()


@pytest.mark.parametrize("listener", ["clear", "secure", "names", "asked"])
def test_asyncpg(gateway: WatchedGateway, listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In clear text; with TLS that ends at the gateway; with TLS passed on by its name to a listener where it ends."""
    found = socket.getaddrinfo

    def resolve(host: object, *arguments: object, **options: object) -> object:
        return found("127.0.0.1" if host == "db.bank.test" else host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    name = None if listener == "clear" else "db.bank.test"

    async def many() -> list[tuple[int, int, str]]:
        return await asyncio.gather(*(_query(gateway, listener, name=name) for _ in range(4)))

    assert asyncio.run(many()) == [(5000, 5000 * 4999 // 2, "x" * 1000)] * 4
    ended = eventually(lambda: [line for line in lines(gateway, listener) if line.get("bytes_in", 0) > 5_000_000])
    # asyncpg says goodbye, and both sides drop their sockets at once: which of the ends is seen first is not ours to say.
    assert {line["reason"] for line in ended} <= {"closed", "client-reset", "upstream-reset"}, ended
    if listener == "secure":
        assert ended[0]["certificate"] == "CN=teller.bank.test"


def test_a_query_that_is_cancelled_on_a_second_connection(gateway: WatchedGateway) -> None:
    """PostgreSQL's clients cancel by a connection of their own, to the same address."""

    async def cancel() -> None:
        connection = await asyncpg.connect(host="127.0.0.1", port=gateway.port("clear"), user=USER, database="postgres")
        try:
            with pytest.raises(TimeoutError):
                await connection.fetch("select pg_sleep(60)", timeout=0.5)
            assert await connection.fetchval("select 7") == 7
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(cancel(), PATIENCE))


def test_redis_cli(gateway: WatchedGateway) -> None:
    command = ["redis-cli", "-h", "127.0.0.1", "-p", str(gateway.port("redis"))]
    commands = "".join(f"set key{n} value{n}\n" for n in range(500)) + "get key499\n"
    done = subprocess.run(command, input=commands, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.splitlines() == ["OK"] * 500 + ["value499"]
    raw = b"".join(b"*3\r\n$3\r\nSET\r\n$4\r\nk%03d\r\n$5\r\nhello\r\n" % n for n in range(1000))
    piped = subprocess.run([*command, "--pipe"], input=raw, capture_output=True, timeout=PATIENCE, check=True)
    assert b"errors: 0, replies: 1000" in piped.stdout
