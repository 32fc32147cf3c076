"""The stream from the control plane: assignments and deltas come in, acknowledgements and heartbeats go out.

Strategy: one WebSocket over mTLS for as long as it holds, a new one with a growing, random pause. An assignment is verified, tried, and
only then written down and acknowledged; what is refused leaves everything as it was, and the control plane is told why. Losing the stream
stops nothing: the member goes on with what it has, and counts how old that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

from gateway._speedups.certificates import parse_certificates
from gateway.mesh import clock
from gateway.mesh.assignment import Assignment, OtherBase, Refused, take
from gateway.mesh.clock import Clock
from gateway.mesh.contact import ANEW, EnrolError, address_of, check_control, control_context, tls_fault
from gateway.mesh.identity import Svid
from gateway.mesh.state import ASSIGNMENT, State
from gateway.mesh.websocket import WebSocket, WebSocketError, begin

log = logging.getLogger("crossway.mesh")

HEARTBEAT = 5.0  # seconds
FIRST, LONGEST = 0.2, 15.0  # seconds between two attempts to connect, at most; the pause is anything below
MESSAGE_MAX = 16 << 20  # bytes
OPEN, CLOSE = 10.0, 2.0  # seconds
SILENCE = 4 * HEARTBEAT  # seconds without an answer to a ping, after which the control plane is taken for gone
KEPT = 30 * 86400  # seconds that an assignment on the disk is believed, where the signer's certificate does not say so
REPLACED = 4001  # close code: another process has a stream of this instance now
APART = 60.0  # seconds at most until it is tried again after that, or two with one folder would take it from each other all the time
SERVICE_RESTART = 1012  # close code of RFC 6455's registry: we are back in a moment

Apply = Callable[[Assignment], Awaitable[None]]


def read_assignment(state: State, svid: Svid, kept_roots: bool = False) -> Assignment | None:
    """Return what was written down last, verified anew; None when there is nothing that can be used. `kept_roots`: by those of then."""
    content = state.read(ASSIGNMENT)
    if content is None:
        return None
    try:
        kept = json.loads(content)
        if kept_roots and "roots" in kept:
            return _as_it_came(kept, svid)
        return take(kept, None, svid.roots, svid.domain, svid.service)
    except (Refused, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.error("the assignment on disk is not used", extra={"file": str(state.folder / ASSIGNMENT), "reason": str(error)})
        return None


def _as_it_came(kept: dict[str, Any], svid: Svid) -> Assignment:
    """Verify by the roots and the time of then: certificates of SPIRE are over within hours, and the member goes on for longer without a word.

    Whoever can write this file can write the bundle beside it as well, so nothing is lost by it.
    """
    issued = int(kept["assignment"]["issued"])
    if time.time() - issued > KEPT:
        raise Refused(f"it is older than {KEPT // 86400} days")
    return take(kept, None, parse_certificates(str(kept["roots"]).encode("ascii")), svid.domain, svid.service, issued)


class Link:
    """Keeps the stream of one member. `apply` makes an assignment take effect or raises Refused, and then nothing has changed."""

    def __init__(self, state: State, control: str, instance: str, svid: Callable[[], Svid], apply: Apply) -> None:
        self.state = state
        self.control = control
        self.instance = instance
        self.svid = svid
        self.apply = apply
        self.current: Assignment | None = None
        self.connected = False
        self.clock = Clock()  # of the member: the control plane's time is heard here
        self.heard: float | None = None  # monotonic time of the last sign of life
        self.connects = 0
        self.refused = 0
        self.applied = 0
        self.acknowledged = 0
        self.healthy: Callable[[], bool] = lambda: True
        self.draining = False
        self.place: dict[str, Any] = {}  # where this instance is (inbound, labels, zone): said with every heartbeat
        self.keep_roots = False  # beside the assignment, since they may be gone before it
        self._whole = False  # ask for the whole assignment next time
        self._socket: WebSocket | None = None

    async def run(self) -> None:
        """Connect, follow, and connect again, for ever."""
        failures = 0
        while True:
            shortest = 0.0
            try:
                await self._follow()
                failures = 0
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the member lives on without the stream
                was, self.connected = self.connected, False
                failures = 0 if was else failures + 1
                if isinstance(error, WebSocketError) and error.code == REPLACED:
                    shortest = APART / 2
                    log.error("another process speaks for this instance: was its folder copied?", extra={"folder": str(self.state.folder), "instance": self.instance})
                elif was or failures in (1, 10) or failures % 100 == 0:
                    log.warning(
                        "the stream of the control plane is gone" if was else "the control plane cannot be reached",
                        extra={"error": _words(error), "failures": failures},
                    )
            self.connected = False
            self._socket = None
            await asyncio.sleep(random.uniform(shortest, 2 * shortest or min(LONGEST, FIRST * 2 ** min(failures, 10))))

    async def drain(self) -> None:
        """Tell the control plane at once that this instance takes no new requests. That, not the end of the stream, is leaving."""
        self.draining = True
        await self.beat()

    async def beat(self) -> None:
        """Say now, not at the next turn, how this instance is."""
        if self._socket is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._beat(self._socket), CLOSE)

    async def close(self) -> None:
        """End the stream in good order."""
        if self._socket is not None:
            with contextlib.suppress(Exception):
                await self._socket.close()

    def renewed(self) -> None:
        """The certificate is another: connect anew with it, so that the control plane sees the identity that is in use."""
        socket = self._socket
        if socket is not None:
            self.closing = asyncio.get_running_loop().create_task(socket.close(SERVICE_RESTART))

    async def _follow(self) -> None:
        host, port = address_of(self.control)
        svid = self.svid()
        context = control_context("".join(each.pem for each in svid.roots))
        context.load_cert_chain(self.state.svid)
        query = urlencode({"instance": self.instance, "version": 0 if self._whole or self.current is None else self.current.version})
        try:
            async with asyncio.timeout(OPEN):
                socket = await _open(host, port, f"/v1/stream?{query}", context, svid.domain)
        except TimeoutError:
            raise WebSocketError(f"no answer within {OPEN:g} s") from None
        self.connected, self._socket = True, socket
        self.connects += 1
        self.heard = time.monotonic()
        self.clock.hear(clock.read(socket.fields.get(clock.HEADER)))
        log.info("stream of the control plane open", extra={"control": self.control})
        beating = asyncio.create_task(self._beats(socket))
        try:
            async for text in socket:
                self.heard = time.monotonic()
                await self._heard(socket, text)
        finally:
            beating.cancel()
            await socket.close()

    async def _beats(self, socket: WebSocket) -> None:
        with contextlib.suppress(WebSocketError, OSError):  # who reads learns of the end as well, and with the reason
            while True:
                await self._beat(socket)
                socket.ping()
                await asyncio.sleep(HEARTBEAT)

    async def _beat(self, socket: WebSocket) -> None:
        await socket.send(json.dumps({"type": "heartbeat", "healthy": self.healthy(), "draining": self.draining, "time": round(time.time(), 3), **self.place}))

    async def _heard(self, socket: WebSocket, text: str) -> None:
        try:
            message = json.loads(text)
            kind = message["type"]
        except (ValueError, TypeError, KeyError):
            raise Refused("the control plane sent what is no message") from None
        if kind not in ("assignment", "delta"):
            return  # of a later version of the protocol
        version = message.get("version")
        try:
            await self.take(message)
        except OtherBase:
            self._whole = True
            raise
        except Refused as error:
            self.refused += 1
            log.error("an assignment is refused, the old one goes on", extra={"version": version, "reason": str(error)})
            await socket.send(json.dumps({"type": "nack", "version": version, "reason": str(error)[:500]}))
            return
        await socket.send(json.dumps({"type": "ack", "version": version}))
        self.acknowledged += 1

    async def take(self, message: dict[str, Any]) -> None:
        """Verify, apply and write down what came. Raises Refused."""
        svid = self.svid()
        fresh = take(message, self.current, svid.roots, svid.domain, svid.service)
        await self.apply(fresh)
        self.current = fresh
        self._whole = False
        self.applied += 1
        roots = "".join(each.pem for each in svid.roots) if self.keep_roots else None
        try:
            # A disk may take its time, and nobody's request should wait for it. The acknowledgement does: it also says "kept".
            await asyncio.get_running_loop().run_in_executor(None, self.state.write, ASSIGNMENT, fresh.dump(roots))
        except OSError as error:
            # It is in force; after a restart without the control plane the one before would be.
            log.error("the assignment cannot be written down", extra={"version": fresh.version, "error": error.strerror})
        log.info("assignment applied", extra={"version": fresh.version, "services": len(fresh.body["services"])})

    def age(self) -> float | None:
        """Seconds by which the assignment is older than it should get without a word; None while it is fresh."""
        if self.connected or self.current is None:
            return None
        silent = _since(self.current) if self.heard is None else time.monotonic() - self.heard
        over = silent - float(self.current.body.get("fresh", 0))
        return over if over > 0 else None


async def _open(host: str, port: int, target: str, context: ssl.SSLContext, domain: str) -> WebSocket:
    """Connect; nothing is said before the control plane is proved to be it."""
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    try:
        check_control(writer.get_extra_info("ssl_object"), domain)
        name = f"[{host}]" if ":" in host else host if host.isascii() else host.encode("idna").decode()
        return await begin(reader, writer, f"{name}:{port}", target, MESSAGE_MAX, SILENCE)
    except BaseException:
        writer.transport.abort()
        raise


def _since(kept: Assignment) -> float:
    """How old what came from the disk is: by this machine's clock alone, which may be wrong, unless that was set back meanwhile."""
    now, issued = time.time(), float(kept.body.get("issued", 0))
    written = issued if kept.kept is None or kept.kept > now else kept.kept
    return max(0.0, now - written)


def _words(error: Exception) -> str:
    if isinstance(error, WebSocketError):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            reason = str(json.loads(error.body)["error"])[:300]
            return f"the control plane refuses the stream: {reason}" + (f"; {ANEW}" if "no root" in reason else "")
    if isinstance(error, (EnrolError, Refused, WebSocketError)):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {tls_fault(error)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"[:300]
