"""Where the control plane remembers: SQLite on one machine, PostgreSQL for several control planes, behind one small interface.

Strategy: every decision that must be taken once (a token is spent, a version is drawn) is a single statement, so no transaction spans a
wait. SQLite runs in a thread of its own, WAL and synchronous FULL: what was answered is on the disk. Statements are written with `?`; for
PostgreSQL they are numbered. A place with a password is never part of a message.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

Value = str | int | float | None
Row = dict[str, Any]
T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY, hash TEXT NOT NULL, service TEXT NOT NULL, expires BIGINT NOT NULL, made BIGINT NOT NULL, used BIGINT, instance TEXT);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY, service TEXT NOT NULL, instance TEXT NOT NULL, not_before BIGINT NOT NULL, not_after BIGINT NOT NULL,
    generation BIGINT NOT NULL, how TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS certificates_by_service ON certificates (service, not_after);
CREATE TABLE IF NOT EXISTS revocations (
    kind TEXT NOT NULL, value TEXT NOT NULL, made BIGINT NOT NULL, until BIGINT, reason TEXT NOT NULL, PRIMARY KEY (kind, value));
CREATE TABLE IF NOT EXISTS instances (
    service TEXT NOT NULL, instance TEXT NOT NULL, inbound TEXT, labels TEXT NOT NULL, zone TEXT, replica TEXT NOT NULL,
    connected BIGINT NOT NULL, healthy BIGINT NOT NULL, draining BIGINT NOT NULL, since DOUBLE PRECISION NOT NULL,
    serial TEXT, not_after BIGINT, sent BIGINT, sent_at DOUBLE PRECISION, applied BIGINT, applied_at DOUBLE PRECISION,
    refused BIGINT, reason TEXT, PRIMARY KEY (service, instance));
CREATE TABLE IF NOT EXISTS unreachable (
    service TEXT NOT NULL, instance TEXT NOT NULL, since DOUBLE PRECISION NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (service, instance));
CREATE TABLE IF NOT EXISTS clocks (
    service TEXT NOT NULL, instance TEXT NOT NULL, ahead BIGINT NOT NULL, PRIMARY KEY (service, instance));
CREATE TABLE IF NOT EXISTS documents (
    number BIGINT PRIMARY KEY, digest TEXT NOT NULL, content TEXT NOT NULL, applied DOUBLE PRECISION NOT NULL, who TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replicas (id TEXT PRIMARY KEY, started DOUBLE PRECISION NOT NULL, seen DOUBLE PRECISION NOT NULL);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL, digest TEXT NOT NULL);
INSERT INTO counters (name, value, digest) VALUES ('version', 0, ''), ('changes', 0, ''), ('policy', 0, '') ON CONFLICT DO NOTHING;
"""
BUSY = 10.0  # seconds that SQLite waits for another process's write
POOL = 8  # connections to PostgreSQL
COMMAND = 10.0  # seconds for one statement there


class StoreError(Exception):
    """The state cannot be read or written; the text says why, without a password."""


class Store(Protocol):
    """What the control plane needs of a database."""

    async def run(self, statement: str, *values: Value) -> int:
        """Execute; return how many rows changed. Raises StoreError."""

    async def rows(self, statement: str, *values: Value) -> list[Row]:
        """Return what a statement finds or, with RETURNING, did. Raises StoreError."""

    async def many(self, statement: str, rows: Sequence[Sequence[Value]]) -> None:
        """Execute for each row, all or none. Raises StoreError."""

    async def close(self) -> None:
        """Let go of it."""


def is_postgres(place: str) -> bool:
    return place.startswith(("postgresql://", "postgres://"))


async def open_store(place: str) -> Store:
    """Open (and make, the first time) the state at a file or a postgresql:// URL. Raises StoreError."""
    try:
        store: Store = await PostgresStore.open(place) if is_postgres(place) else await SqliteStore.open(place)
    except StoreError as error:
        raise StoreError(f"control.state: {error}{'' if is_postgres(place) else _remedy(place)}") from None
    return store


def _remedy(place: str) -> str:
    """What to do about a file that cannot be opened."""
    if os.path.isdir(place):
        return ": name a file, which is made when it is not there"
    if not os.path.isdir(os.path.dirname(place) or "."):
        return ": make its folder first"
    return ""


class SqliteStore:
    """One file, one connection, one thread."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._thread = ThreadPoolExecutor(1, "mesh-state")
        self._connection: sqlite3.Connection | None = None

    @classmethod
    async def open(cls, place: str) -> SqliteStore:
        store = cls(place)
        try:
            await store._do(store._connect)
        except StoreError:
            store._thread.shutdown(wait=False)
            raise
        return store

    def _connect(self) -> None:
        # The file holds hashes of tokens and who runs where: nobody else's business. Its companions get the same mode.
        os.close(os.open(self._place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._place, timeout=BUSY, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(SCHEMA)
        self._connection = connection

    async def run(self, statement: str, *values: Value) -> int:
        return await self._do(lambda: self._open().execute(statement, values).rowcount)

    async def rows(self, statement: str, *values: Value) -> list[Row]:
        return await self._do(lambda: [dict(row) for row in self._open().execute(statement, values).fetchall()])

    async def many(self, statement: str, rows: Sequence[Sequence[Value]]) -> None:
        def work() -> None:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(statement, rows)
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

        await self._do(work)

    async def close(self) -> None:
        def work() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await self._do(work)
        self._thread.shutdown(wait=False)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError("the state is closed")
        return self._connection

    async def _do(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self._place}: {getattr(error, 'strerror', None) or error}") from None


class PostgresStore:
    """A pool of connections to PostgreSQL."""

    def __init__(self, pool: Any, where: str) -> None:
        self._pool = pool
        self._where = where

    @classmethod
    async def open(cls, place: str) -> PostgresStore:
        try:
            import asyncpg
        except ImportError:
            raise StoreError("postgresql:// needs the package asyncpg: pip install 'crossway[postgres]'") from None
        where = re.sub(r"://[^/@]*@", "://", place).partition("?")[0]
        try:
            pool = await asyncpg.create_pool(place, min_size=1, max_size=POOL, command_timeout=COMMAND, timeout=COMMAND)
            store = cls(pool, where)
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(7203411)")  # two that start at once do not both make the tables
                await connection.execute(SCHEMA)
        except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise StoreError(f"{where}: {_words(error)}") from None
        return store

    async def run(self, statement: str, *values: Value) -> int:
        done = await self._do(lambda connection: connection.execute(numbered(statement), *values))
        last = str(done).rpartition(" ")[2]
        return int(last) if last.isdecimal() else 0

    async def rows(self, statement: str, *values: Value) -> list[Row]:
        return [dict(row) for row in await self._do(lambda connection: connection.fetch(numbered(statement), *values))]

    async def many(self, statement: str, rows: Sequence[Sequence[Value]]) -> None:
        await self._do(lambda connection: connection.executemany(numbered(statement), rows))

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self._pool.close(), COMMAND)
        except TimeoutError:
            self._pool.terminate()

    async def _do(self, work: Callable[[Any], Any]) -> Any:
        import asyncpg

        try:
            async with self._pool.acquire(timeout=COMMAND) as connection:
                try:
                    return await work(connection)
                except asyncpg.InternalClientError:
                    connection.terminate()  # a server that went away in the middle leaves asyncpg's own state in disorder
                    raise
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise StoreError(f"{self._where}: {_words(error)}") from None


def numbered(statement: str) -> str:
    """Return a statement with $1, $2, ... for its question marks; none of ours has one inside a text."""
    number = 0

    def place(_: re.Match[str]) -> str:
        nonlocal number
        number += 1
        return f"${number}"

    return re.sub(r"\?", place, statement)


def _words(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
