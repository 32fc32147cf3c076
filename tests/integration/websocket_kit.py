"""A gateway with routes for WebSockets, ends that speak raw bytes behind the handshake, and a server of the `websockets` library.

Strategy: what a frame holds is no business of the gateway's, so tests about bytes use plain sockets; that real clients and servers
understand each other through it is for the library, which nobody here wrote.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets import ConnectionClosed, Subprotocol
from websockets.asyncio.server import Server, ServerConnection, serve

from tests.integration.bank import WatchedGateway
from tests.integration.echo import ISSUER, jwks
from tests.integration.faults import ScriptedOrigin, Stream, connect
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, eventually

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONFIG = """
version: 1
workers: {workers}
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: {drain}}}
listeners:
  public: {{bind: 127.0.0.1:0, http2: {{clear: true}}}}
  secure: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: edge.crt, key: edge.key}}]}}}}
upstreams:
  raw: {{targets: [127.0.0.1:{raw}]}}
  lib: {{targets: [127.0.0.1:{lib}], limits: {{requests: 2, queue: 20s}}}}
  lone: {{targets: [127.0.0.1:{raw}], limits: {{connections: 1}}}}
  tls: {{targets: [127.0.0.1:{tls}], tls: {{ca: root.crt}}}}
policies:
  trail: {{audit: {{file: audit.jsonl}}}}
  bank: {{jwt: {{issuer: {issuer}, audience: payments, keys: jwks.json, algorithms: [RS256], leeway: 0s}}}}
  nosy: {{python: {{class: "nosy:Nosy"}}}}
routes:
  - {{name: raw, match: {{prefix: /raw}}, upstream: raw, policies: [trail], websocket: {websocket}}}
  - {{name: lib, match: {{prefix: /lib}}, upstream: lib, policies: [trail], websocket: {websocket}}}
  - {{name: tls, match: {{prefix: /tls}}, upstream: tls, policies: [trail], websocket: {websocket}}}
  - {{name: lone, match: {{prefix: /lone}}, upstream: lone, policies: [trail], websocket: true}}
  - {{name: bank, match: {{prefix: /bank}}, upstream: raw, policies: [trail, bank], websocket: true}}
  - {{name: lax, match: {{prefix: /lax}}, upstream: raw, policies: [trail, bank], websocket: {{expiry: ignore}}}}
  - {{name: few, match: {{prefix: /few}}, upstream: raw, policies: [trail], websocket: {{tunnels: 5}}}}
  - {{name: idle, match: {{prefix: /idle}}, upstream: raw, policies: [trail], websocket: {{idle: 500ms}}}}
  - {{name: nosy, match: {{prefix: /nosy}}, upstream: raw, policies: [trail, nosy], websocket: true}}
  - {{name: plain, match: {{prefix: /plain}}, upstream: raw, policies: [trail]}}
"""
NOSY = """
from gateway import Policy, deny

class Nosy(Policy):
    def on_response(self, request, response):
        assert response.status == 101
        if request.path == "/nosy/no":
            return deny(403, "not-this-one")
        response.set_header("x-seen", str(response.status))
"""
Handler = Callable[[ServerConnection], Awaitable[None]]


async def echo(connection: ServerConnection) -> None:
    """Sends back what it gets; `close CODE` closes with that code."""
    with contextlib.suppress(ConnectionClosed):
        async for message in connection:
            if isinstance(message, str) and message.startswith("close "):
                await connection.close(int(message.split()[1]), "as asked")
                return
            await connection.send(message)


class Servers:
    """Servers of the library on a loop in a thread: one in clear text, one with TLS. Their handler can be changed."""

    def __init__(self, folder: Path) -> None:
        self.handler: Handler = echo
        self.seen: list[ServerConnection] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "edge.crt", folder / "edge.key")
        self.clear = self.do(self._open(None)).result(PATIENCE)
        self.secure = self.do(self._open(context)).result(PATIENCE)

    def do(self, what: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(what, self.loop)

    async def _open(self, context: ssl.SSLContext | None) -> Server:
        return await serve(
            self._handle, "127.0.0.1", 0, ssl=context, max_size=None, ping_interval=None, backlog=1024,
            select_subprotocol=lambda _, offered: Subprotocol("pay.v2") if "pay.v2" in offered else None,
        )  # fmt: skip

    async def _handle(self, connection: ServerConnection) -> None:
        self.seen.append(connection)
        await self.handler(connection)

    def port(self, server: Server) -> int:
        return int(server.sockets[0].getsockname()[1])

    def close(self) -> None:
        async def end() -> None:
            for server in (self.clear, self.secure):
                server.close()
                await server.wait_closed()

        self.do(end()).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()


@dataclass
class Between:
    """A gateway that carries tunnels, and what it writes down of them."""

    folder: Path
    root: Authority
    gateway: WatchedGateway = field(init=False)

    def trust(self) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.load_verify_locations(cadata=self.root.pem.decode())
        return made

    def url(self, path: str, name: str = "public") -> str:
        return f"{'wss' if name == 'secure' else 'ws'}://127.0.0.1:{self.gateway.port(name)}{path}"

    def options(self, name: str) -> dict[str, Any]:
        """For connect() of the library."""
        more = {"ssl": self.trust()} if name == "secure" else {}
        return {"max_size": None, "ping_interval": None, "proxy": None, "open_timeout": PATIENCE, **more}

    def open(self, path: str = "/raw", *lines: str, receive: int = 0) -> Stream:
        """A raw tunnel: the client's end, its 101 read."""
        stream = connect(self.gateway.port(), receive=receive)
        stream.send(handshake(path, *lines))
        assert stream.head().status == 101
        return stream

    def records(self, path: str) -> list[dict[str, Any]]:
        """The audit records of requests for `path`."""
        trail = self.folder / "audit.jsonl"
        text = trail.read_text() if trail.exists() else ""
        return [each for each in map(json.loads, text.splitlines()) if each["path"] == path]

    def record(self, path: str) -> dict[str, Any]:
        """The one record of `path`, waited for."""
        found = eventually(lambda: self.records(path), f"a record of {path}")
        assert len(found) == 1, found
        record: dict[str, Any] = found[0]
        return record

    def number(self, name: str) -> float:
        return self.gateway.metrics().get(f"crossway_{name}", 0)


@dataclass
class Tunnels(Between):
    """The gateway between servers in HTTP/1.1."""

    servers: Servers
    origin: ScriptedOrigin

    def configure(self, **changes: Any) -> Path:
        known = {
            "workers": 2, "drain": "20s", "websocket": "true", "raw": self.origin.port, "issuer": ISSUER,
            "lib": self.servers.port(self.servers.clear), "tls": self.servers.port(self.servers.secure),
        }  # fmt: skip
        path = self.folder / "edge.yaml"
        path.write_text(CONFIG.format(**{**known, **changes}))
        return path


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Tunnels]:
    """Both ends without a gateway."""
    root = Authority("Tunnels", number=96)
    root.issue("127.0.0.1", "localhost").write(folder, "edge")
    (folder / "root.crt").write_bytes(root.pem)
    (folder / "nosy.py").write_text(NOSY)
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    made = Tunnels(folder, root, Servers(folder), ScriptedOrigin())
    try:
        yield made
    finally:
        made.origin.close()
        made.servers.close()


@contextlib.contextmanager
def tunnels_at(folder: Path, **changes: Any) -> Iterator[Tunnels]:
    """The whole."""
    with prepared(folder) as made, WatchedGateway(made.configure(**changes)) as made.gateway:
        yield made


def handshake(path: str, *more: str) -> bytes:
    text = base64.b64encode(os.urandom(16)).decode()
    lines = [f"GET {path} HTTP/1.1", "host: bank.test", "connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13", *more]
    return "\r\n".join([*lines, f"sec-websocket-key: {text}", "", ""]).encode()


def switch(stream: Stream) -> str:
    """The origin's side of a handshake; returns the path."""
    head = stream.head()
    proof = base64.b64encode(hashlib.sha1((head.fields["sec-websocket-key"] + GUID).encode()).digest()).decode()
    lines = ["HTTP/1.1 101 Switching Protocols", "connection: Upgrade", "upgrade: websocket", f"sec-websocket-accept: {proof}", "", ""]
    stream.send("\r\n".join(lines).encode())
    return head.path
