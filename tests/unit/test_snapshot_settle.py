"""A worker serves, and a reload is confirmed, only when names were resolved and keys fetched once, or that was tried."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from gateway import snapshot
from gateway._speedups.pool import Upstream
from gateway.config import load
from gateway.discovery.book import book_of
from gateway.discovery.dns import Unanswered
from gateway.discovery.names import Answer, Wanted
from gateway.policies.identify import RunningSource
from gateway.policies.jwt_source import UrlSource

KEYS = {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}
PATIENCE = 20.0  # seconds, used up by a failure only


class Names:
    def add(self, name: str) -> int:
        return 1


def build(folder: Path, upstream: str, policies: str = "") -> snapshot.Snapshot:
    path = folder / "gateway.yaml"
    path.write_text(
        f"version: 1\nlisteners: {{public: {{bind: 127.0.0.1:0}}}}\nupstreams: {{origin: {{targets: ['{upstream}']}}}}\n"
        f"routes: [{{name: all, match: {{prefix: /}}, upstream: origin, policies: [{policies}]}}]\n"
    )
    return snapshot.build(load(path), names=Names(), seed=1, version=1)


class Issuer:
    """Publishes a key set, when it is let."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.requests = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        self.asked.set()
        await self.may_answer.wait()
        body = json.dumps(KEYS).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    @property
    def policy(self) -> str:
        return f"{{jwt: {{issuer: i, audience: a, keys: 'http://127.0.0.1:{self.port}/keys', algorithms: EdDSA}}}}"


@asynccontextmanager
async def issuing() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    server = await asyncio.start_server(issuer.serve, "127.0.0.1", 0)
    issuer.port = server.sockets[0].getsockname()[1]
    try:
        yield issuer
    finally:
        issuer.may_answer.set()
        server.close()
        await server.wait_closed()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(bounded())


def test_a_name_is_resolved_when_the_snapshot_has_settled(tmp_path: Path) -> None:
    async def test() -> None:
        built = build(tmp_path, "localhost:9001")
        upstream: Upstream = built.upstreams["origin"]
        assert upstream.endpoints == [] and upstream.unresolved == {"localhost:9001"}
        built.start(asyncio.get_running_loop())
        assert await snapshot.settled(built, PATIENCE)
        assert {endpoint.target for endpoint in upstream.endpoints} == {"localhost:9001"}
        assert {endpoint.address for endpoint in upstream.endpoints} <= {"127.0.0.1:9001", "[::1]:9001"}
        assert upstream.unresolved == set()
        built.stop()

    run(test)


def test_numeric_upstreams_have_nothing_to_wait_for(tmp_path: Path) -> None:
    async def test() -> None:
        built = build(tmp_path, "127.0.0.1:9001")
        built.start(asyncio.get_running_loop())
        assert await snapshot.settled(built, 0)
        built.stop()

    run(test)


def test_a_late_issuer_is_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with issuing() as issuer:
            built = build(tmp_path, "127.0.0.1:9001", issuer.policy)
            built.start(asyncio.get_running_loop())
            waiting = asyncio.create_task(snapshot.settled(built, PATIENCE))
            await issuer.asked.wait()
            assert not waiting.done()
            issuer.may_answer.set()
            assert await waiting
            assert len(built.sources[0].source.keys.keys) == 1
            assert issuer.requests == 1                 # the wait joins the attempt that start() began
            built.stop()

    run(test)


def test_an_issuer_that_never_answers_is_not_waited_for_forever(tmp_path: Path) -> None:
    async def test() -> None:
        async with issuing() as issuer:
            built = build(tmp_path, "127.0.0.1:9001", issuer.policy)
            built.start(asyncio.get_running_loop())
            await issuer.asked.wait()
            assert not await snapshot.settled(built, 0.05)
            issuer.may_answer.set()                     # the attempt went on: giving up the wait did not end it
            assert await snapshot.settled(built, PATIENCE)
            assert built.sources[0].source.keys.keys
            built.stop()

    run(test)


def test_an_issuer_that_is_down_is_tried_once(tmp_path: Path) -> None:
    async def test() -> None:
        with socket.socket() as closed:                 # bound and not listening: connections are refused
            closed.bind(("127.0.0.1", 0))
            source = RunningSource(UrlSource(f"http://127.0.0.1:{closed.getsockname()[1]}/keys", ["EdDSA"]))
            source.start(asyncio.get_running_loop())
            await source.settled()
            assert (source.source.fetches, source.source.failures) == (1, 1)
            source.stop()

    run(test)


def test_a_name_that_nobody_knows_is_asked_for_once(tmp_path: Path) -> None:
    async def test() -> None:
        asked = []

        class Down:
            """A name server that is down."""

            async def ask(self, wanted: Wanted) -> Answer:
                asked.append(wanted.name)
                raise Unanswered("SERVFAIL")

        book_of(asyncio.get_running_loop()).source = Down()
        built = build(tmp_path, "origin.bank.test:443")
        built.start(asyncio.get_running_loop())
        assert await snapshot.settled(built, PATIENCE)
        upstream: Upstream = built.upstreams["origin"]
        assert asked == ["origin.bank.test"]
        assert upstream.endpoints == [] and upstream.unresolved == {"origin.bank.test:443"}
        built.stop()

    run(test)
