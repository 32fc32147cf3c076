"""Databases and their own clients through raw TCP listeners: PostgreSQL with psql and asyncpg, Redis with redis-cli."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Iterator

import asyncpg
import pytest

from tests.integration.bank import WatchedGateway
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
  redis: {{bind: 127.0.0.1:0, tcp: {{upstream: redis}}}}
upstreams:
  pg: {{targets: [127.0.0.1:{pg}], health: {{check: {{tcp: {{}}, interval: 500ms}}}}}}
  onward: {{targets: [127.0.0.1:{secure}]}}
  redis: {{targets: [127.0.0.1:{redis}]}}
"""
USER = "postgres"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedGateway]:
    folder = tmp_path_factory.mktemp("databases")
    authority = Authority("Databases", number=96)
    (folder / "ca.crt").write_bytes(authority.pem)
    authority.issue("db.bank.test").write(folder, "db")
    authority.issue("teller.bank.test").write(folder, "client")
    redis = RedisServer(folder / "redis")
    path = folder / "edge.yaml"
    try:
        with open_postgres(owner=USER, identity=authority.issue("db.bank.test")) as pg:
            path.write_text(CONFIG.format(pg=pg.port, redis=redis.port, secure=free_port()))
            with WatchedGateway(path) as gateway:
                yield gateway
    finally:
        redis.kill()


def psql(gateway: WatchedGateway, listener: str, sql: str, **options: str) -> str:
    settings = {"host": "127.0.0.1", "port": str(gateway.port(listener)), "user": USER, "dbname": "postgres", **options}
    done = subprocess.run(
        [program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", " ".join(f"{name}={value}" for name, value in settings.items()), "-c", sql],
        capture_output=True, text=True, timeout=PATIENCE * 2, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_psql_in_clear_text_and_with_its_own_tls_from_end_to_end(gateway: WatchedGateway) -> None:
    in_use = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
    assert psql(gateway, "clear", in_use, sslmode="disable") == "f\n"
    # The client and the server agree on TLS by themselves; the gateway passes it on.
    assert psql(gateway, "clear", in_use, sslmode="require") == "t\n"
    big = psql(gateway, "clear", "select repeat('0123456789', 1000000)", sslmode="disable")
    assert big == "0123456789" * 1_000_000 + "\n"


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


@pytest.mark.parametrize("listener", ["clear", "secure", "names"])
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
    ended = eventually(lambda: [line for line in lines(gateway, listener) if line["bytes_in"] > 5_000_000])
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
