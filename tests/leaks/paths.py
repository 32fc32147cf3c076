"""One process with an engine, its client and its origin, and every way in which an exchange can fail, many times over.

Strategy: the engine is polled directly, so an exchange costs its system calls and nothing else, and nothing runs that could
hide a leak. Run as a module it goes one path COUNT times and prints what was held before and after, as JSON; see
test_leaks.py for what is expected.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import select
import socket
import ssl
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from gateway._speedups.engine import Engine
from gateway._speedups.pool import Endpoint
from gateway.config import load
from gateway.snapshot import build
from gateway.telemetry.shared import SharedState
from tests.integration.h2_kit import DATA, END_STREAM, EXTENDED_CONNECT, HEADERS, PREFACE, frame, headers, rst, settings
from tests.integration.pki import Authority

CONFIG = """
version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
listeners:
  public: {{bind: 127.0.0.1:0, timeouts: {{head: 1ms, body: 1ms}}, limits: {{requests: 100000000}}}}
  proxied: {{bind: 127.0.0.1:0, proxy_protocol: required}}
  secure:
    bind: 127.0.0.1:0
    timeouts: {{head: 1ms, body: 1ms}}
    tls: {{certificates: [{{cert: lab.crt, key: lab.key}}], client_ca: ca.crt, client_auth: optional, handshake: 1ms, handshakes: 50}}
upstreams:
  guarded: {{targets: [127.0.0.1:{origin}], tls: {{ca: ca.crt}}, retries: 0, health: {{eject: {{share: 0%}}}}}}
  origin: {{targets: [127.0.0.1:{origin}], timeouts: {{head: 1ms}}}}
  twin: {{targets: [127.0.0.1:{origin}]}}
  gone: {{targets: [127.0.0.1:{gone}]}}
  two: {{targets: [127.0.0.1:{origin}], protocol: http2, retries: 0, health: {{eject: {{share: 0%}}}}}}
policies:
  raises: {{python: {{class: "leaky:Raises"}}}}
  waits: {{python: {{class: "leaky:Waits"}}}}
  reads: {{python: {{class: "leaky:Reads"}}}}
  inside: {{ip: {{allow: [10.0.0.0/8]}}}}
routes:
  - {{name: x, match: {{path: /x}}, upstream: origin}}
  - {{name: guarded, match: {{path: /guarded}}, upstream: guarded}}
  - {{name: gone, match: {{path: /gone}}, upstream: gone}}
  - {{name: only, match: {{path: /only, methods: [GET]}}, upstream: origin}}
  - {{name: raises, match: {{path: /raises}}, upstream: origin, policies: [raises]}}
  - {{name: waits, match: {{path: /waits}}, upstream: origin, policies: [waits]}}
  - {{name: reads, match: {{path: /reads}}, upstream: origin, policies: [reads]}}
  - {{name: inside, match: {{path: /inside}}, upstream: origin, policies: [inside]}}
  - {{name: socket, match: {{prefix: /socket}}, upstream: origin, websocket: {{tunnels: 8}}}}
  - {{name: stream, match: {{path: /stream}}, upstream: two, websocket: {{tunnels: 8}}}}
  - {{name: silent, match: {{path: /silent}}, upstream: origin, websocket: {{idle: 1ms}}}}
  - name: shaped
    match: {{path: /shaped}}
    policies: [{{fault: {{delay: 1h, when: {{headers: {{x-chaos: {{present: true}}}}}}}}}}]
    split: [{{upstream: origin}}, {{upstream: twin, response_headers: {{set: {{x-twin: "1"}}}}}}]
    sticky: cookie:session
    canary: [{{when: {{headers: {{x-canary: "1"}}}}, upstream: twin}}]
    mirror: {{upstream: gone, methods: [GET, POST]}}
"""
POLICY = """
import asyncio
import contextlib
from gateway import Policy, deny

class Raises(Policy):
    def on_request(self, request):
        raise RuntimeError(request.path)

class Waits(Policy):
    async def on_request(self, request):
        await asyncio.sleep(3600)

class Reads(Policy):
    body_limit = 1024
    def on_request(self, request):
        return deny(403, "no", str(request.json()))
"""
HOST = b"host: b\r\n"
RST = struct.pack("ii", 1, 0)


class Lab:
    """The engine and both of its sides."""

    def __init__(self, folder: Path) -> None:
        self.loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.origin = socket.create_server(("127.0.0.1", 0), backlog=1024)
        gone = socket.socket()
        gone.bind(("127.0.0.1", 0))
        self.gone = gone  # bound, not listening: connects are refused
        authority = Authority("Leaks", number=95)
        authority.issue("127.0.0.1").write(folder, "lab")
        (folder / "ca.crt").write_bytes(authority.pem)
        self.clients = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.clients.load_verify_locations(folder / "ca.crt")
        self.clients.load_cert_chain(folder / "lab.crt", folder / "lab.key")
        self.servers = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.servers.load_cert_chain(folder / "lab.crt", folder / "lab.key")
        path = folder / "leaks.yaml"
        path.write_text(CONFIG.format(origin=self.origin.getsockname()[1], gone=gone.getsockname()[1]))
        (folder / "leaky.py").write_text(POLICY)
        shared = SharedState(1)
        self.shared = shared
        self.engine = Engine(0, shared.slot(0), shared.buckets)
        self.snapshot = build(load(path), names=shared.names, seed=1, version=1)
        self.engine.apply(self.snapshot)
        self.ports = {}
        for name in ("public", "proxied", "secure"):
            listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
            listening.setblocking(False)
            self.ports[name] = listening.getsockname()[1]
            self.engine.listen(name, listening.fileno())
            listening.close()
        self.engine.start(self.loop)

    def client(self, data: bytes, name: str = "public") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.ports[name]))
        if data:
            sock.send(data)
        self.engine.poll()
        return sock

    def secure(self, sock: socket.socket, *, server: bool) -> Secure | None:
        """The other end of a TLS connection, its handshake complete; None when the engine ended it."""
        made = Secure(self, sock, server=server)
        return made if made.turn(lambda: made.tls.do_handshake() or True) else None

    def accepted(self) -> socket.socket:
        """The connection that the engine has opened, nothing read of it."""
        self.poll_for(self.origin)
        return self.origin.accept()[0]

    def upstream(self) -> socket.socket:
        """The connection that the engine has opened, and the request that it sent."""
        self.poll_for(self.origin)
        sock, _ = self.origin.accept()
        self.poll_for(sock)
        sock.recv(65536)
        return sock

    def poll_for(self, sock: socket.socket) -> None:
        """Poll the engine, whose turns are bounded, until there is something to read."""
        for _ in range(100_000):
            if select.select([sock], [], [], 0)[0]:
                return
            self.engine.poll()
        raise AssertionError("nothing came")

    def turn(self, seconds: float = 0) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))


class Secure:
    """A TLS end without a thread: every wait polls the engine."""

    def __init__(self, lab: Lab, sock: socket.socket, *, server: bool) -> None:
        self.lab = lab
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = lab.servers if server else lab.clients
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server, None if server else "127.0.0.1")

    def turn(self, step: Callable[[], Any]) -> Any:
        """Do `step` until it wants nothing more; None when the connection ended first."""
        while True:
            try:
                done = step()
                self.flush()
                return done
            except ssl.SSLWantReadError:
                self.flush()
            self.lab.poll_for(self.sock)
            data = self.sock.recv(65536)
            if not data:
                return None
            self.incoming.write(data)

    def flush(self) -> None:
        if self.outgoing.pending:
            self.sock.sendall(self.outgoing.read())
        self.lab.engine.poll()

    def send(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    def read(self) -> bytes:
        return self.turn(lambda: self.tls.read(65536)) or b""


def answered(lab: Lab, sock: socket.socket, status: bytes) -> None:
    lab.poll_for(sock)
    got = sock.recv(65536)
    assert got[9:12] == status, got


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
    sock.close()


REFUSED = [
    (b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n", b"400"),
    (b"GET /%2e%2e/%2e%2e HTTP/1.1\r\n" + HOST + b"\r\n", b"400"),
    (b"POST /x HTTP/1.1\r\n" + HOST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", b"400"),
    (b"GET /unknown HTTP/1.1\r\n" + HOST + b"\r\n", b"404"),
    (b"POST /only HTTP/1.1\r\n" + HOST + b"content-length: 0\r\n\r\n", b"405"),
    (b"POST /x HTTP/1.1\r\n" + HOST + b"content-length: 99999999\r\n\r\n", b"413"),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", b"414"),
    (b"GET /x HTTP/1.1\r\n" + HOST + b"x-a: 1\r\n" * 101 + b"\r\n", b"431"),
    (b"GET /x HTTP/2.0\r\n" + HOST + b"\r\n", b"505"),
    (b"GET /inside HTTP/1.1\r\n" + HOST + b"\r\n", b"403"),
    (b"GET /raises HTTP/1.1\r\n" + HOST + b"\r\n", b"500"),
    (b'POST /reads HTTP/1.1\r\n' + HOST + b'content-length: 2\r\n\r\n{}', b"403"),
    (b'POST /reads HTTP/1.1\r\n' + HOST + b'content-length: 2000\r\n\r\n', b"413"),
]


def refused(lab: Lab, turn: int) -> None:
    data, status = REFUSED[turn % len(REFUSED)]
    sock = lab.client(data)
    answered(lab, sock, status)
    sock.close()
    lab.engine.poll()


def client_leaves(lab: Lab, turn: int) -> None:
    kind = turn % 6
    if kind == 0:
        sock = lab.client(b"GET /x HT")
    elif kind == 1:
        sock = lab.client(b"POST /reads HTTP/1.1\r\n" + HOST + b"content-length: 9\r\n\r\n{")
    elif kind == 2:
        sock = lab.client(b"")
    elif kind == 3:
        sock = lab.client(b"GET /waits HTTP/1.1\r\n" + HOST + b"\r\n")
    elif kind == 4:
        sock = lab.client(b"POST /x HTTP/1.1\r\n" + HOST + b"content-length: 9\r\n\r\n{")
        lab.upstream().close()
    else:
        sock = lab.client(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
        upstream = lab.upstream()
        upstream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
        lab.engine.poll()
        reset(sock)
        lab.engine.poll()
        upstream.close()
        return
    reset(sock) if turn % 2 else sock.close()
    lab.engine.poll()
    if turn % 32 == 0:
        lab.turn()  # cancelled tasks end in the loop


ANSWERS = [
    (b"", b"502"),
    (b"HTTP/1.1 2x0\r\n\r\n", b"502"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b"502"),
    (b"HTTP/1.1 101 Switching\r\n\r\n", b"502"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b"200"),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nz", b"502"),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", b"200"),
    (b"HTTP/1.1 200 OK\r\n\r\nabc", b"200"),
    (b"HTTP/1.1 100 Continue\r\n\r\n", b"502"),
]


def upstream_fails(lab: Lab, turn: int) -> None:
    data, status = ANSWERS[turn % len(ANSWERS)]
    sock = lab.client(b"POST /x HTTP/1.1\r\n" + HOST + b"content-length: 2\r\n\r\nab")
    upstream = lab.upstream()
    if data:
        upstream.send(data)
        lab.engine.poll()
    reset(upstream) if turn % 2 else upstream.close()
    lab.engine.poll()
    got = b""
    with contextlib.suppress(ConnectionError):  # a cut answer
        while got[9:12] not in (b"502", status):
            lab.poll_for(sock)
            piece = sock.recv(65536)
            if not piece:
                break
            got += piece
    assert got[9:12] in (status, b""), got
    sock.close()
    lab.engine.poll()


def unreachable(lab: Lab, turn: int) -> None:
    sock = lab.client(b"GET /gone HTTP/1.1\r\n" + HOST + b"\r\n")
    lab.engine.poll()
    answered(lab, sock, b"503")
    sock.close()
    lab.engine.poll()


def pooled(lab: Lab, turn: int) -> None:
    """A kept connection that speaks unasked, or ends, in its pool."""
    sock = lab.client(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
    upstream = lab.upstream()
    upstream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")
    lab.engine.poll()
    answered(lab, sock, b"200")
    if turn % 2:
        upstream.send(b"HTTP/1.1 408 Too late\r\n\r\n")
        lab.engine.poll()
    upstream.close()
    sock.close()
    lab.engine.poll()


def garbage(lab: Lab, turn: int) -> None:
    sock = lab.client(random.Random(turn).randbytes(turn % 3000), "proxied" if turn % 2 else "public")
    sock.close()
    lab.engine.poll()


def late(lab: Lab, turn: int) -> None:
    """Deadlines pass for a hundred exchanges at a time: heads, bodies, answers."""
    if turn % 100:
        return
    socks: list[tuple[socket.socket, socket.socket | None, bytes]] = []
    for number in range(100):
        kind = number % 3
        if kind == 0:
            socks.append((lab.client(b"GET /x HT"), None, b"408"))
        elif kind == 1:
            sock = lab.client(b"POST /x HTTP/1.1\r\n" + HOST + b"content-length: 9\r\n\r\n{")
            socks.append((sock, lab.upstream(), b"408"))
        else:
            sock = lab.client(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
            socks.append((sock, lab.upstream(), b"504"))
    lab.turn(0.22)  # two ticks
    for sock, upstream, status in socks:
        answered(lab, sock, status)
        sock.close()
        if upstream is not None:
            upstream.close()
    lab.engine.poll()


def shaped(lab: Lab, turn: int) -> None:
    """Splits, canaries and copies, whose mirror refuses connections; bodies that break off; delays that nobody waits for."""
    kind = turn % 4
    who = b"cookie: session=%d\r\n" % turn
    if kind == 0:
        sock = lab.client(b"POST /shaped HTTP/1.1\r\n" + HOST + who + b"content-length: 9\r\n\r\n{")
        lab.upstream().close()
    elif kind == 1:
        sock = lab.client(b"GET /shaped HTTP/1.1\r\nx-chaos: 1\r\n" + HOST + b"\r\n")
    else:
        who = who if kind == 2 else b"x-canary: 1\r\n"
        sock = lab.client(b"POST /shaped HTTP/1.1\r\n" + HOST + who + b"content-length: 2\r\n\r\na")
        upstream = lab.upstream()
        sock.send(b"b")
        lab.poll_for(upstream)
        upstream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc")
        answered(lab, sock, b"200")
        upstream.close()
    reset(sock) if kind == 1 else sock.close()
    lab.engine.poll()
    while asyncio.all_tasks(lab.loop):
        lab.turn()


HANDSHAKE = HOST + b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
PROVEN = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"


def tunnels(lab: Lab, turn: int) -> None:
    """Handshakes refused by either side, and tunnels that end in every way, with bytes on their way in both directions."""
    kind = turn % 8
    sock = lab.client(b"GET /%b HTTP/1.1\r\n" % (b"silent" if kind == 7 and turn % 64 == 7 else b"socket") + HANDSHAKE + b"early")
    upstream = lab.upstream()
    if kind == 0:
        reset(sock) if turn % 16 else sock.close()
    elif kind == 1:
        upstream.send(b"HTTP/1.1 101 Unproven\r\nupgrade: websocket\r\n\r\n")
        answered(lab, sock, b"502")
    elif kind == 2:
        upstream.send(b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno")
        answered(lab, sock, b"403")
    else:
        upstream.send(b"HTTP/1.1 101 Yes\r\n" + PROVEN + b"late")
        answered(lab, sock, b"101")
        lab.poll_for(upstream)
        assert upstream.recv(65536) == b"early"
        sock.send(b"up")
        upstream.send(b"down" * 5000)
        lab.engine.poll()
        if kind == 3:
            reset(sock)
        elif kind == 4:
            reset(upstream)
        elif kind == 5:                             # both ends, one after the other
            sock.shutdown(socket.SHUT_WR)
            lab.engine.poll()
        elif kind == 6:                             # a side that takes nothing while the other one leaves
            upstream.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    upstream.send(bytes(1 << 20))
                    lab.engine.poll()
            reset(sock)
        elif turn % 64 == 7:
            lab.turn(0.22)                          # silent for long enough
    for each in (sock, upstream):
        each.close()
        for _ in range(4):
            lab.engine.poll()


OFFER = settings((EXTENDED_CONNECT, 1))


def tunnels_on_streams(lab: Lab, turn: int) -> None:
    """The same to an upstream of HTTP/2: SETTINGS that do not come or offer nothing, answers that are none, tunnels that end in every way."""
    kind = turn % 10
    sock = lab.client(b"GET /stream HTTP/1.1\r\n" + HANDSHAKE + b"early")
    upstream = lab.accepted()
    if kind == 0:                                   # the client leaves before the SETTINGS
        reset(sock)
    elif kind == 1:                                 # the server does
        upstream.close()
        answered(lab, sock, b"503")
    elif kind == 2:
        upstream.send(settings())
        answered(lab, sock, b"502")
    else:
        upstream.send(OFFER)
        taken = b""
        while headers_of(taken) is None:
            lab.poll_for(upstream)
            taken += upstream.recv(65536)
        number = headers_of(taken) or 0
        if kind == 3:
            upstream.send(headers(number, [(":status", "403")], end=True))
            answered(lab, sock, b"403")
        elif kind == 4:
            upstream.send(rst(number))
            answered(lab, sock, b"502")
        else:
            upstream.send(headers(number, [(":status", "200")], end=False) + frame(DATA, 0, number, b"late"))
            answered(lab, sock, b"101")
            sock.send(b"up")
            upstream.send(frame(DATA, 0, number, b"down" * 4000) * 4)
            lab.engine.poll()
            if kind == 5:
                reset(sock)
            elif kind == 6:
                upstream.send(rst(number))
            elif kind == 7:                         # both ends, one after the other
                sock.shutdown(socket.SHUT_WR)
                lab.engine.poll()
                upstream.send(frame(DATA, END_STREAM, number))
            elif kind == 8:                         # a client that takes nothing, of a server that sends all it may and leaves
                upstream.send(frame(DATA, 0, number, b"x" * 16000) * 11)
                lab.engine.poll()
                upstream.send(frame(DATA, END_STREAM, number) + rst(number, 0))
    lab.engine.poll()
    for each in (sock, upstream):
        each.close()
    for _ in range(4):
        lab.engine.poll()


def headers_of(taken: bytes) -> int | None:
    """The stream of the first HEADERS in what a server has received; None when there are none yet."""
    at = len(PREFACE)
    while len(taken) >= at + 9:
        if taken[at + 3] == HEADERS:
            return int.from_bytes(taken[at + 5 : at + 9], "big")
        at += 9 + int.from_bytes(taken[at : at + 3], "big")
    return None


def tls_clients(lab: Lab, turn: int) -> None:
    """Handshakes begun, broken and complete; requests answered and cut; clients that leave in every way."""
    kind = turn % 8
    sock = lab.client(b"", "secure")
    if kind == 0:
        sock.send(b"GET /x HTTP/1.1\r\n\r\n")
    elif kind == 1:
        sock.send(random.Random(turn).randbytes(200))
    elif kind == 2:
        half = Secure(lab, sock, server=False)
        with contextlib.suppress(ssl.SSLWantReadError):
            half.tls.do_handshake()
        sock.send(half.outgoing.read()[: turn % 400])
    elif kind == 3:
        lab.engine.poll()
    else:
        client = lab.secure(sock, server=False)
        assert client is not None
        if kind == 4:
            client.send(b"GET /unknown HTTP/1.1\r\n" + HOST + b"\r\n")
            assert client.read()[9:12] == b"404"
        elif kind == 5:
            client.send(b"GET /x HT")
        elif kind == 6:
            client.send(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
            upstream = lab.upstream()
            upstream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
            lab.engine.poll()
            upstream.close()
        else:
            sock.send(b"\x17\x03\x03\x00\x10" + b"x" * 16)
    lab.engine.poll()
    reset(sock) if turn % 3 else sock.close()
    lab.engine.poll()
    if turn % 50 == 0:
        lab.turn(0.22)  # what lingers


def tls_upstreams(lab: Lab, turn: int) -> None:
    """Upstreams that leave in the handshake, speak in clear text, answer and break off."""
    kind = turn % 5
    sock = lab.client(b"GET /guarded HTTP/1.1\r\n" + HOST + b"\r\n")
    status = b"503"
    upstream = lab.accepted()
    if kind == 0:
        upstream.close()
    elif kind == 1:
        upstream.send(b"HTTP/1.1 200 OK\r\n\r\n")
        lab.engine.poll()
        upstream.close()
    else:
        server = lab.secure(upstream, server=True)
        assert server is not None
        assert server.read().startswith(b"GET /guarded")
        if kind == 2:
            status = b"502"
        elif kind == 3:
            server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")
            status = b"200"
        else:
            server.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
            status = b"200"
        reset(upstream) if turn % 2 else upstream.close()
    lab.engine.poll()
    lab.poll_for(sock)
    with contextlib.suppress(ConnectionError):
        assert sock.recv(65536)[9:12] in (status, b"502", b"503", b"")
    sock.close()
    lab.engine.poll()


def tls_moves(lab: Lab, turn: int) -> None:
    """An upstream behind TLS whose endpoint has another address each time, as where instances come and go."""
    with socket.create_server((f"127.{1 + turn // 60000}.{turn // 250 % 240}.{1 + turn % 250}", 0)) as listening:
        host, port = listening.getsockname()
        lab.snapshot.upstreams["guarded"].replace([Endpoint(f"{host}:{port}", target=f"127.0.0.1:{port}")])
        with lab.client(b"GET /guarded HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
            lab.poll_for(listening)
            upstream = listening.accept()[0]
            server = lab.secure(upstream, server=True)
            assert server is not None
            assert server.read().startswith(b"GET /guarded")
            server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")
            lab.poll_for(sock)
            assert sock.recv(65536)[9:12] == b"200"
        lab.engine.poll()
        upstream.close()
        lab.engine.poll()


PATHS: dict[str, Callable[[Lab, int], None]] = {
    path.__name__: path
    for path in (
        refused, client_leaves, upstream_fails, unreachable, pooled, garbage, late, shaped, tunnels, tunnels_on_streams, tls_clients,
        tls_upstreams, tls_moves,
    )
}  # fmt: skip


FIRST = {"tls_moves": 600}  # turns after which what is kept for a while is as much as ever


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def held(lab: Lab) -> dict[str, int]:
    lab.turn()
    lab.engine.poll()
    gc.collect()
    return {**lab.engine.live(), "files": len(os.listdir("/proc/self/fd")), "tasks": len(asyncio.all_tasks(lab.loop))}


def measure(path: Callable[[Lab, int], None], count: int, folder: Path) -> dict[str, object]:
    """What is held before and after `count` turns, resident bytes after each quarter, and what Python allocated meanwhile."""
    lab = Lab(folder)
    turns = iter(range(10_000_000))

    def go(times: int) -> None:
        for _ in range(times):
            path(lab, next(turns))

    before = held(lab)
    go(max(count // 10, FIRST.get(path.__name__, 0)))
    sizes = [resident()]
    for _ in range(4):
        go(count // 5)
        gc.collect()
        sizes.append(resident())
    tracemalloc.start()
    go(count // 20)
    held(lab)
    first = tracemalloc.get_traced_memory()[0]
    go(count // 20)
    after = held(lab)
    second = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    lab.engine.close()
    return {"before": before, "after": after, "sizes": sizes, "traced": second - first}


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)  # what a policy raises is logged with its traceback, which is not the subject here
    print(json.dumps(measure(PATHS[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3]))))
