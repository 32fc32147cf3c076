"""The process of a mesh's control plane: uvicorn with mutual TLS 1.3 for members, pages for the admin, signals, the way out.

Strategy: uvicorn does not tell an application who its client is, so the protocol that it makes for a connection asks the TLS layer once, when the
handshake is done, and puts the answer into the state that every scope of the connection carries, the WebSocket's too. Certificates are
optional for TLS and required by the application: only /v1/join opens without. No session tickets: a resumed session would not show its chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from gateway.config.web import Bind
from gateway.mesh.api import Api, Pages
from gateway.mesh.control import SERVER_LIFE, ControlPlane
from gateway.mesh.documents import MOST
from gateway.mesh.documents_api import PATH, who_is
from gateway.mesh.peers import Peers
from gateway.mesh.probe import load_pair
from gateway.mesh.stream import MESSAGE_MAX
from gateway.server import log as logs
from gateway.server.admin import BoundedProtocol, Server
from gateway.server.guard import Guard
from gateway.server.sockets import advice
from gateway.server.systemd import Notifier

log = logging.getLogger("crossway.mesh")

BACKLOG = 1024
GARBAGE = 20_000, 20, 50  # thresholds of the collector's generations
PIECE = 8 << 10  # bytes that the admin's parser gets at once
CONNECTIONS = 10_000  # and requests; 503 beyond
FRAGMENTS = 64  # of a message
FIRST = 10.0  # seconds that a connection has for the head of its request
LEAVE = 5  # seconds for what is in flight at the end


class CannotStart(Exception):
    """The control plane cannot serve; the text is for a person."""


class OneRequest(BoundedProtocol):
    """One request a connection. uvicorn waits for ever for a first one, and for the rest of whatever comes after an answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._first = self.loop.call_later(FIRST, transport.close)

    def on_headers_complete(self) -> None:
        self._first.cancel()
        super().on_headers_complete()
        if self.cycle is not None:  # None: a stream's
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._first.cancel()
        super().connection_lost(exc)


def members_protocol(peers: Peers) -> type[OneRequest]:
    """Return the protocol of members' connections."""

    class MembersProtocol(OneRequest):
        def connection_made(self, transport: Any) -> None:
            # A copy of this goes into the scope of each request, and the WebSocket protocol is made with it.
            self.app_state = {**self.app_state, "peer": peers.meet(transport)}
            super().connection_made(transport)

    return MembersProtocol


class StreamProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket with a way past ASGI, which costs a queue, a task's turn and a pause in reading for every message."""

    hear: Callable[[bytes], None] | None = None

    def send_receive_event_to_app(self) -> None:
        if self.hear is None or self.close_sent or self.curr_msg_data_type != "text":
            super().send_receive_event_to_app()
            return
        data = b"".join(self.frames)
        self.frames = []
        self.hear(data)

    def handle_ping(self) -> None:
        """Answer a ping, unless what was sent before waits to be read: of several, one answer is enough (RFC 6455 5.5.3)."""
        output = self.conn.data_to_send()
        if self.writable.is_set():
            self.transport.write(b"".join(output))

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= FRAGMENTS:  # empty ones count for no size
            self.transport.abort()
            return
        super().handle_cont(event)

    def write(self, frame: bytes) -> None:
        """Send a whole frame. Members have one unanswered message at most, so what waits here is bounded."""
        if not self.close_sent and not self.transport.is_closing():
            self.transport.write(frame)


class AdminProtocol(OneRequest):
    """The protocol of the admin's connections: who is there, as the kernel knows it, is told to the application."""

    def connection_made(self, transport: Any) -> None:
        self.app_state = {**self.app_state, "who": who_is(transport)}
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        # What comes at once may be a body, and larger than a head may be.
        for at in range(0, len(data), PIECE):
            if self.transport.is_closing():
                return
            super().data_received(data[at : at + PIECE])


class Tls:
    """The context of members' connections, whose certificate and roots follow the authority."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_OPTIONAL
        context.set_alpn_protocols(["http/1.1"])
        self.context = context
        self._from, self._until, self._roots = "", 0.0, ""
        self.refresh()

    def refresh(self) -> None:
        """Take what the authority has now. Roots are only added here: the application judges by those of now (mesh/peers.py)."""
        ca = self.plane.ca
        roots = ca.bundle + "".join(each.pem for each in self.plane.peers.bank)
        if roots != self._roots:
            self.context.load_verify_locations(cadata=roots)
            self._roots = roots
        mark = ca.fingerprint()
        if mark == self._from and time.time() < self._until:
            return
        pem, ends = ca.server_pem(SERVER_LIFE)
        load_pair(self.context, pem)
        self._from, self._until = mark, (time.time() + ends) / 2


def listen(name: str, bind: Bind) -> socket.socket:
    """Return a listening socket for a key of `control`. Raises CannotStart."""
    family = socket.AF_UNIX if bind.unix else socket.AF_INET6 if ":" in bind.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if bind.unix:
            Path(bind.path).unlink(missing_ok=True)
            mask = os.umask(0o177)
            try:
                sock.bind(bind.path)
            finally:
                os.umask(mask)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((bind.host, bind.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotStart(f"control.{name}: cannot bind {bind}: {advice(error, bind)}") from None
    sock.setblocking(False)
    return sock


def _name(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _server(app: Any, http: type[OneRequest], ws: Any, context: ssl.SSLContext | None) -> Server:
    config = uvicorn.Config(
        app, http=http, ws=ws, lifespan="off", log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=LEAVE, ws_max_size=MESSAGE_MAX, ws_per_message_deflate=False,
        ws_ping_interval=None,
    )  # fmt: skip
    config.load()
    config.ssl = context
    return Server(config)


async def _serve(path: Path) -> None:
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leaving.set)
    plane = await ControlPlane.open(path)
    loop.add_signal_handler(signal.SIGHUP, plane.look_again)
    try:
        sockets = [listen("bind", plane.mesh.control.bind)]
        tls = Tls(plane)
        plane.server_changed = tls.refresh
        servers = [_server(Api(plane).app, members_protocol(plane.peers), StreamProtocol, tls.context)]
        names, pages = ["control"], Pages(plane)
        for name, bind, app in (("probes", plane.mesh.control.probes, pages.probes), ("admin", plane.mesh.control.admin, pages.app)):
            if bind is not None:
                names.append(name)
                sockets.append(listen(name, bind))
                servers.append(_server(Guard(app, bind, None, {PATH: MOST}), AdminProtocol, "none", None))
        plane.announce()
        await _until(leaving, plane, dict(zip(names, sockets, strict=True)), servers)
    finally:
        await plane.close()


async def _until(leaving: asyncio.Event, plane: ControlPlane, sockets: dict[str, socket.socket], servers: list[Server]) -> None:
    serving = [asyncio.ensure_future(server.serve(sockets=[sock])) for server, sock in zip(servers, sockets.values(), strict=True)]
    working = asyncio.ensure_future(plane.run())
    waiting = asyncio.ensure_future(leaving.wait())
    for name, sock in sockets.items():
        print(f"{name:8} {'https' if name == 'control' else 'http'}://{_name(sock)}", flush=True)
    notifier = Notifier.from_environment()
    notifier.ready("serving members")
    # Members' streams are some dozens of objects each that live for days: looking at all of them often finds nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    try:
        await asyncio.wait([*serving, working, waiting], return_when=asyncio.FIRST_COMPLETED)
        log.info("the control plane ends; members go on with what they have")
        notifier.stopping("ending")
        await plane.hub.close()
    finally:
        waiting.cancel()
        for server in servers:
            server.leave()
        await asyncio.gather(*serving, return_exceptions=True)
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


def _not_refused(record: logging.LogRecord) -> bool:
    """uvicorn calls a handshake that was refused in good order an error of ours, so that anybody could fill the log with them."""
    return record.msg != "ASGI callable returned without completing handshake."


def run(path: Path, level: str) -> None:
    """Be the control plane until a signal. Raises ConfigError, CaError, StoreError or CannotStart when it cannot begin."""
    # Every member holds a connection; many systems give a process 1,024 unless it asks.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logs.set_up(level=level)
    logs.name_process("control")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it tells of its own start and end, and of every client that left
    logging.getLogger("uvicorn.error").addFilter(_not_refused)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a handshake that fails is the client's affair
    uvloop.run(_serve(path))
