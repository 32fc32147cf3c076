"""The streams to members: each is sent the newest assignment of its service, one at a time, and says what it made of it.

Strategy: a stream that has not answered gets nothing further, so whatever changes meanwhile is one message afterwards, as a delta on what
it acknowledged. A refusal is remembered and the same version is not sent again. What members say is kept here and written to the store in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway.config.values import Rate
from gateway.mesh.assign import Assignments
from gateway.mesh.limit import Bucket
from gateway.mesh.peers import Peer
from gateway.mesh.registry import BadInstance, Registry, read_place
from gateway.mesh.store import StoreError, Value

log = logging.getLogger("crossway.mesh")

ANSWER = 30.0  # seconds that a member has for an assignment
MESSAGE_MAX = 64 << 10  # bytes from a member
REASON = 500  # characters of a refusal
CHANGES = Rate(20, 10.0)  # of an instance's state or place: each one is told to all of its callers
GOING, REPLACED, SILENT, WRONG = 1001, 4001, 4002, 4400  # close codes


class Stream:
    """One member's stream."""

    def __init__(self, hub: Hub, socket: WebSocket, peer: Peer, service: str, instance: str, base: int) -> None:
        self.hub = hub
        self.socket = socket
        self.peer = peer
        self.service = service
        self.instance = instance
        self.have = base  # what the member has applied
        self.sent: int | None = None
        self.sent_at: float | None = None
        self.applied: int | None = base or None
        self.applied_at: float | None = None
        self.refused: int | None = None
        self.reason: str | None = None
        self.heard = time.monotonic()
        self.state: tuple[bool, bool] | None = None  # healthy, draining
        self.place: tuple[Any, ...] | None = None  # as it was said last
        self.changes = Bucket(CHANGES)
        self.code = GOING
        self.wake = asyncio.Event()
        self.wake.set()
        self._answered = asyncio.Event()
        self._answered.set()

    @property
    def key(self) -> tuple[str, str]:
        return self.service, self.instance

    @property
    def draining(self) -> bool:
        return self.state is not None and self.state[1]

    async def run(self) -> None:
        """Serve the stream until it ends."""
        sending = asyncio.create_task(self._send())
        hearing = asyncio.create_task(self._hear())
        try:
            done, _ = await asyncio.wait([sending, hearing], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is not None and not isinstance(error, (WebSocketDisconnect, RuntimeError, OSError)):
                    raise error
        finally:
            for task in (sending, hearing):
                task.cancel()
            await asyncio.gather(sending, hearing, return_exceptions=True)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self.socket.close(self.code)

    async def _send(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            current = self.hub.assignments.current(self.service)
            if current is None or current.version in (self.have, self.refused):
                continue
            text = self.hub.assignments.message(self.service, self.have)
            self._answered.clear()
            self.sent, self.sent_at = current.version, time.time()
            await self.socket.send_text(text)
            self.hub.pushed(self, len(text))
            try:
                await asyncio.wait_for(self._answered.wait(), ANSWER)
            except TimeoutError:
                log.warning("a member does not answer an assignment", extra=self.told() | {"version": self.sent})
                self.code = SILENT
                return
            self.wake.set()  # what changed meanwhile

    async def _hear(self) -> None:
        while True:
            text = await self.socket.receive_text()
            self.heard = time.monotonic()
            try:
                await self._take(json.loads(text))
            except (ValueError, KeyError, TypeError, AttributeError, BadInstance) as error:
                log.warning("a member sent what is no message", extra=self.told() | {"error": repr(error)[:200]})
                self.code = WRONG
                return

    async def _take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "heartbeat":
            with contextlib.suppress(StoreError):  # streams outlive the state: what was not written down, the next heartbeat says again
                await self._beat(message)
        elif kind in ("ack", "nack") and message["version"] == self.sent and not self._answered.is_set():
            if kind == "ack":
                assert self.sent is not None
                self.have = self.applied = self.sent
                self.applied_at, self.refused, self.reason = time.time(), None, None
            else:
                self.refused, self.reason = self.sent, str(message.get("reason", ""))[:REASON]
                log.error("a member refuses an assignment", extra=self.told() | {"version": self.sent, "reason": self.reason})
            self.hub.answered(self, kind == "ack")
            self._answered.set()

    async def _beat(self, message: dict[str, Any]) -> None:
        state = (message["healthy"] is True, message["draining"] is True)
        said = (message["inbound"], message.get("labels"), message.get("zone")) if "inbound" in message else self.place
        if said != self.place:  # most heartbeats say what the one before said, and that was checked
            place = read_place(message)
            self._may_change()
            await self.hub.registry.moved(self.service, self.instance, *place)
            self.place = said
            self.hub.changed()
        if state != self.state:
            self._may_change()
            await self.hub.registry.is_now(self.service, self.instance, *state)
            self.state = state
            self.hub.changed()

    def _may_change(self) -> None:
        """Takes a change from the member's allowance. One that cannot be written down takes its share all the same: tries are bounded too."""
        if not self.changes.take():
            raise BadInstance("its state changes too often")

    def told(self) -> dict[str, Any]:
        """Who this is, for the log."""
        return {"service": self.service, "instance": self.instance, "serial": self.peer.serial}


class Hub:
    """All streams of this control plane. `changed()` is called when the registry did, `pushed` and `answered` for the metrics."""

    def __init__(self, assignments: Assignments, registry: Registry, changed: Callable[[], None]) -> None:
        self.assignments = assignments
        self.registry = registry
        self.changed = changed
        self.streams: dict[tuple[str, str], Stream] = {}
        self.on_push: Callable[[int], None] = lambda size: None
        self.on_answer: Callable[[float, bool], None] = lambda seconds, good: None
        self._unwritten: dict[tuple[str, str], Stream] = {}
        self._lingering: dict[tuple[str, str], float] = {}  # gone without a word; monotonic time when they are taken for dead

    async def serve(self, stream: Stream) -> None:
        """Run a stream from its first to its last moment."""
        before = self.streams.pop(stream.key, None)
        self.streams[stream.key] = stream
        self._lingering.pop(stream.key, None)
        if before is not None:
            before.code = REPLACED
            before.peer.cut()
        try:
            await self.registry.connected(stream.service, stream.instance, stream.peer.serial, stream.peer.leaf.not_after)
            if stream.applied is not None and await self.registry.applied(*stream.key) != stream.applied:
                # It came with an assignment whose acknowledgement was lost with the connection before.
                stream.sent, stream.sent_at, stream.applied_at = stream.applied, time.time(), time.time()
                self._unwritten[stream.key] = stream
            self.changed()
            log.info("a member's stream is open", extra=stream.told() | {"version": stream.have})
            await stream.run()
        finally:
            if self.streams.get(stream.key) is stream:
                del self.streams[stream.key]
                # Who said goodbye is gone; who vanished may be back in a moment, with a new certificate or over a new path.
                wait = 0.0 if stream.draining else max(0.0, self.registry.heartbeat - (time.monotonic() - stream.heard))
                self._lingering[stream.key] = time.monotonic() + wait
                log.info("a member's stream has ended", extra=stream.told() | {"draining": stream.draining})

    def services(self) -> set[str]:
        return {service for service, _ in self.streams}

    def tell(self, services: Iterable[str]) -> None:
        """Have the streams of these services look at their assignment again."""
        wanted = set(services)
        for stream in self.streams.values():
            if stream.service in wanted:
                stream.wake.set()

    def pushed(self, stream: Stream, size: int) -> None:
        self._unwritten[stream.key] = stream
        self.on_push(size)

    def answered(self, stream: Stream, good: bool) -> None:
        self._unwritten[stream.key] = stream
        assert stream.sent_at is not None
        self.on_answer(time.time() - stream.sent_at, good)

    async def look(self) -> None:
        """Take who is silent for dead."""
        now = time.monotonic()
        for stream in list(self.streams.values()):
            if now - stream.heard > self.registry.heartbeat:
                log.warning("a member is silent", extra=stream.told())
                stream.code = SILENT
                stream.peer.cut()
        for key, when in list(self._lingering.items()):
            if now >= when and key not in self.streams:
                await self.registry.left(*key)
                self._lingering.pop(key, None)
                self.changed()

    async def write(self) -> None:
        """Write down what members were told and what they said."""
        streams, self._unwritten = self._unwritten, {}
        rows: list[tuple[Value, ...]] = [
            (each.sent, each.sent_at, each.applied, each.applied_at, each.refused, each.reason, *each.key) for each in streams.values()
        ]
        if rows:
            try:
                await self.registry.told(rows)
            except StoreError:
                self._unwritten = {**streams, **self._unwritten}
                raise

    async def close(self) -> None:
        """End all streams in good order."""
        for stream in list(self.streams.values()):
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
                await stream.socket.close(GOING)
