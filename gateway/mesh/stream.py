"""The streams to members: each is sent the newest assignment of its service, one at a time, and says what it made of it.

Strategy: a stream that has not answered gets nothing further, so whatever changes meanwhile is one message afterwards, as a delta on what
it acknowledged. A refusal is remembered and the same version is not sent again. What members say is kept here and written to the store in batches.

A change of a popular endpoint is a message to every stream and an answer from each, so both go past ASGI: a frame is made once for all that are
told the same and written as it is, and what comes is heard in the moment in which it comes. No task and no timer is made for a message.

Who said goodbye is gone. Who vanished has time to come back, and after that stays an endpoint for as long as he can be reached (gateway.mesh.probe): a
way to the control plane that is broken says nothing of the way of calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway.config.values import Rate
from gateway.mesh.assign import Assignments
from gateway.mesh.clock import DIFFERS, compared, read
from gateway.mesh.limit import Bucket
from gateway.mesh.networks import DEFAULT, network_of, scope
from gateway.mesh.peers import Peer
from gateway.mesh.registry import COMEBACK, HEARD, REACHED, STALL, BadInstance, Registry, read_place
from gateway.mesh.store import Row, StoreError, Value

if TYPE_CHECKING:
    from gateway.mesh.probe import Target

log = logging.getLogger("crossway.mesh")

ANSWER = 30.0  # seconds that a member has for an assignment
MESSAGE_MAX = 64 << 10  # bytes from a member
REASON = 500  # characters of a refusal
CHANGES = Rate(20, 10.0)  # of an instance's state or place: each one is told to all of its callers
MOST_AHEAD = 10**10  # seconds of difference that are written down
AGAIN = 1.0  # seconds until what could not be written down is tried again
TURN = 100  # streams that are sent something before others have their turn
GOING, REPLACED, SILENT, WRONG = 1001, 4001, 4002, 4400  # close codes


class Wire(Protocol):
    """What a stream needs of its connection, below ASGI."""

    hear: Callable[[bytes], None] | None

    def write(self, frame: bytes) -> None:
        """Send a frame as it is."""


class Stream:
    """One member's stream."""

    def __init__(self, hub: Hub, socket: WebSocket, peer: Peer, service: str, instance: str, base: int, network: str = DEFAULT) -> None:
        """Made before the handshake is answered: from then on every message is heard."""
        self.hub = hub
        self.socket = socket
        self.peer = peer
        self.service = service
        self.instance = instance
        self.network = network
        self.have = base  # what the member has applied
        self.sent: int | None = None
        self.sent_at: float | None = None
        self.applied: int | None = base or None
        self.applied_at: float | None = None
        self.refused: int | None = None
        self.reason: str | None = None
        self.heard = self.began = time.monotonic()
        self.until: float | None = None  # monotonic, until when an answer is waited for; None when none is outstanding
        self.state: tuple[bool, bool] | None = None  # healthy, draining, as it was said last
        self.changes = Bucket(CHANGES)
        self.ahead = 0  # seconds, of the member's clock; 0 while it agrees
        self._off = 0  # heartbeats in a row by which it does not
        self.code = GOING
        self.wire: Wire = peer.transport.get_protocol()
        self.wire.hear = self.hear
        self._running = False  # it is entered in the registry, and may be sent something
        self._place: tuple[Any, ...] | None = None  # as it was said last
        self._where: tuple[Any, ...] | None = None  # the same, read
        self._written: tuple[Any, Any] = None, None  # state and place, as the registry has them
        self._news = asyncio.Event()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def key(self) -> tuple[str, str]:
        return self.service, self.instance

    @property
    def scope(self) -> str:
        """What it is told depends on this."""
        return scope(self.service, self.network)

    @property
    def draining(self) -> bool:
        return self.state is not None and self.state[1]

    async def run(self) -> None:
        """Serve the stream until it ends."""
        self._running = True
        self.push()
        tasks = [asyncio.create_task(self._write_down()), asyncio.create_task(self._until_gone())]
        try:
            done, _ = await asyncio.wait([*tasks, self._over], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is not None and not isinstance(error, (WebSocketDisconnect, RuntimeError, OSError)):
                    raise error
        finally:
            self.wire.hear, self._running = None, False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self.socket.close(self.code)

    def end(self, code: int) -> None:
        """Have the stream closed with this code."""
        self.code = code
        if not self._over.done():
            self._over.set_result(None)

    def push(self) -> None:
        """Send what is new, unless an answer is outstanding: that will look here again."""
        current = self.hub.assignments.current(self.scope)
        if not self._running or self.until is not None or current is None or current.version in (self.have, self.refused):
            return
        frame = self.hub.assignments.frame(self.scope, self.have)
        self.sent, self.sent_at, self.until = current.version, time.time(), time.monotonic() + ANSWER
        self.wire.write(frame)
        self.hub.pushed(self, len(frame))

    def hear(self, text: bytes) -> None:
        """Take a message, in the moment in which it comes."""
        self.heard = time.monotonic()
        try:
            message = orjson.loads(text)
            kind = message["type"]
            if kind == "heartbeat":
                self._beat(message)
            elif kind in ("ack", "nack") and message["version"] == self.sent and self.until is not None:
                self._answered(message)
        except (ValueError, KeyError, TypeError, AttributeError, BadInstance, RecursionError) as error:
            log.warning("a member sent what is no message", extra=self.told() | {"error": repr(error)[:200]})
            self.end(WRONG)

    def _answered(self, message: dict[str, Any]) -> None:
        good = message["type"] == "ack"
        self.until = None
        if good:
            assert self.sent is not None
            self.have = self.applied = self.sent
            self.applied_at, self.refused, self.reason = time.time(), None, None
        else:
            self.refused, self.reason = self.sent, str(message.get("reason", ""))[:REASON]
            log.error("a member refuses an assignment", extra=self.told() | {"version": self.sent, "reason": self.reason})
        self.hub.answered(self, good)
        self.push()  # what changed meanwhile

    def _beat(self, message: dict[str, Any]) -> None:
        self._compare(message.get("time"))
        state = (message["healthy"] is True, message["draining"] is True)
        said = (message["inbound"], message.get("labels"), message.get("zone")) if "inbound" in message else self._place
        if (state, said) == (self.state, self._place):
            return  # as nearly always
        # What cannot be written down takes its share all the same: tries are bounded too.
        if not self.changes.take():
            raise BadInstance("its state changes too often")
        if said is not None and said != self._place:
            self._where = read_place(message)
        self.state, self._place = state, said
        self._news.set()

    def _compare(self, said: Any) -> None:
        """Note how the member's clock is. Twice in a row, since one heartbeat may have lain somewhere."""
        if (theirs := read(said)) is None:
            return  # a member of an older version
        ahead = max(-MOST_AHEAD, min(MOST_AHEAD, theirs - time.time()))
        self._off = 0 if abs(ahead) < DIFFERS else self._off + 1
        now = 0 if self._off < 2 else round(ahead)
        if (now == 0) != (self.ahead == 0) or abs(now - self.ahead) > max(DIFFERS, abs(self.ahead) / 10):
            if now and not self.ahead:
                log.warning("a member's clock is not this machine's", extra=self.told() | {"clock": compared(now), "seconds_ahead": now})
            self.ahead = now
            self.hub.clock_changed(self)

    async def _write_down(self) -> None:
        """Bring the registry up to what the member said last."""
        while True:
            await self._news.wait()
            self._news.clear()
            wanted, where = self.state, self._where
            try:
                if where is not None and where != self._written[1]:
                    await self.hub.registry.moved(self.service, self.instance, *where)
                    self._written = self._written[0], where
                    self.hub.changed()
                    if network_of(where[1]) != self.network:
                        # What is told there may be older than what it has; its next stream sees to that.
                        self.end(GOING)
                if wanted is not None and wanted != self._written[0]:
                    await self.hub.registry.is_now(self.service, self.instance, *wanted)
                    self._written = wanted, self._written[1]
                    self.hub.changed()
            except StoreError:  # streams outlive the state: what was not written down is tried again
                await asyncio.sleep(AGAIN)
                self._news.set()

    async def enter(self) -> None:
        """Have the registry know that this stream is open here, and all that was heard on it."""
        await self.hub.registry.connected(self.service, self.instance, self.peer.serial, self.peer.leaf.not_after)
        self._written = None, None
        self._news.set()

    async def _until_gone(self) -> None:
        while (await self.socket.receive())["type"] != "websocket.disconnect":
            self.end(WRONG)  # no text: that is heard at once

    def told(self) -> dict[str, Any]:
        """Who this is, for the log."""
        return {"service": self.service, "instance": self.instance, "serial": self.peer.serial}


@dataclass
class Lost:
    """A member whose stream has ended."""

    heard: float  # monotonic, its last word
    until: float  # it may come back until then
    goodbye: bool = False
    kept: bool = False  # it did not, and can be reached


class Hub:
    """All streams of this control plane. `changed()` is called when the registry did, `pushed` and `answered` for the metrics."""

    def __init__(self, assignments: Assignments, registry: Registry, changed: Callable[[], None]) -> None:
        self.assignments = assignments
        self.registry = registry
        self.changed = changed
        self.streams: dict[tuple[str, str], Stream] = {}
        self.on_push: Callable[[int], None] = lambda size: None
        self.on_answer: Callable[[float, bool], None] = lambda seconds, good: None
        self._due: deque[Stream] = deque()  # to be sent something
        self._unwritten: dict[tuple[str, str], Stream] = {}
        self._looked = time.monotonic()
        self._patience = 0.0  # monotonic, until when nobody is taken for dead, because nobody was listened to before
        self._clocks: dict[tuple[str, str], int] = {}  # of members, to be written
        self.found: Callable[[tuple[str, str]], Target | None] = lambda key: None  # what looks at an instance found, when it can be reached
        self._lingering: dict[tuple[str, str], Lost] = {}

    async def serve(self, stream: Stream) -> None:
        """Run a stream from its first to its last moment."""
        before = self.streams.pop(stream.key, None)
        self.streams[stream.key] = stream
        self._lingering.pop(stream.key, None)
        if before is not None:
            # A member that came back over a new path never reads this; one whose folder was copied to another machine is told.
            log.warning("a member's stream is replaced by another one", extra=before.told() | {"address": before.peer.address, "by": stream.peer.address})
            before.end(REPLACED)
        try:
            self._clocks[stream.key] = 0  # its heartbeats will say
            await stream.enter()
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
                self._lingering[stream.key] = Lost(stream.heard, max(stream.heard + self.registry.heartbeat, self._patience), stream.draining)
                log.info("a member's stream has ended", extra=stream.told() | {"draining": stream.draining})

    def scopes(self) -> set[str]:
        return {stream.scope for stream in self.streams.values()}

    def tell(self, scopes: Iterable[str]) -> None:
        """Have the streams of these scopes look at their assignment again."""
        wanted = set(scopes)
        waiting = bool(self._due)
        self._due.extend(stream for stream in self.streams.values() if stream.scope in wanted)
        if self._due and not waiting:
            self._push_some()

    def _push_some(self) -> None:
        for _ in range(min(TURN, len(self._due))):
            stream = self._due.popleft()
            if self.streams.get(stream.key) is stream:
                stream.push()
        if self._due:
            asyncio.get_running_loop().call_soon(self._push_some)

    def pushed(self, stream: Stream, size: int) -> None:
        self._unwritten[stream.key] = stream
        self.on_push(size)

    def answered(self, stream: Stream, good: bool) -> None:
        self._unwritten[stream.key] = stream
        assert stream.sent_at is not None
        self.on_answer(time.time() - stream.sent_at, good)

    def clock_changed(self, stream: Stream) -> None:
        self._clocks[stream.key] = stream.ahead

    async def look(self) -> None:
        """Take who is silent for dead."""
        now = time.monotonic()
        gone, self._looked = now - self._looked, now
        if gone > STALL:
            self._stood_still(gone)
        for stream in list(self.streams.values()):
            if now - stream.heard > self.registry.heartbeat:
                log.warning("a member is silent", extra=stream.told())
                stream.code = SILENT
                stream.peer.cut()
            elif stream.until is not None and now > stream.until:
                log.warning("a member does not answer an assignment", extra=stream.told() | {"version": stream.sent})
                stream.end(SILENT)
        await self._see_others(now)
        for key, lost in list(self._lingering.items()):
            if key not in self.streams and not await self._stays(key, lost, now):
                await self.registry.left(*key)
                self._lingering.pop(key, None)
                self.changed()

    async def _see_others(self, now: float) -> None:
        """Take note of what other control planes wrote: instances of one that is over are ours now, and one that took us for over has ours."""
        for key, row in self.registry.known.items():
            stream = self.streams.get(key)
            if stream is None:
                if row["connected"] and row["replica"] == self.registry.replica and key not in self._lingering:
                    self._lingering[key] = Lost(now, now + self.registry.heartbeat, kept=row["connected"] == REACHED)
            elif row["connected"] != HEARD and now - stream.began > STALL and time.time() - (now - stream.heard) > row["since"]:
                log.warning("a member that was taken for lost has its stream here", extra=stream.told() | {"by": row["replica"]})
                await stream.enter()
                self.changed()

    async def _stays(self, key: tuple[str, str], lost: Lost, now: float) -> bool:
        """Whether an instance without a stream is still there: it may be back in a moment, or can be reached."""
        row = self.registry.known.get(key)
        if lost.goodbye:
            return False
        if row is None or row["replica"] != self.registry.replica:
            return now < lost.until  # not read yet, or another control plane's by now
        if row["replaced"]:
            return False
        if now < lost.until:
            return True
        found = self.found(key) if self.registry.keeps(row) else None
        if found is not None and found.seen > lost.heard and (row["connected"], row["serial"]) != (REACHED, found.serial):
            await self._keep(row, lost, found, now)
        return found is not None

    async def _keep(self, row: Row, lost: Lost, found: Target, now: float) -> None:
        key = row["service"], row["instance"]
        await self.registry.silent(*key, time.time() - (now - lost.heard), found.serial, found.not_after)
        if not lost.kept:
            log.warning("a member has no stream but can be reached: it goes on being offered", extra={"service": key[0], "instance": key[1], "inbound": row["inbound"]})
        lost.kept = True
        self.changed()

    def _stood_still(self, seconds: float) -> None:
        """Nobody was heard because nobody listened (a machine that was paused or moved, a state that was away): who was there may come back, as after a start."""
        log.error("the control plane stood still; members have time to come back", extra={"seconds": round(seconds, 1)})
        self.registry.wait()
        now = time.monotonic()
        for stream in self.streams.values():
            stream.heard = now
        self._patience = now + COMEBACK
        for lost in self._lingering.values():
            lost.until = lost.until if lost.kept else max(lost.until, self._patience)

    async def write(self) -> None:
        """Write down what members were told and what they said."""
        clocks, self._clocks = self._clocks, {}
        if clocks:
            try:
                await self.registry.clocks([(*key, ahead) for key, ahead in clocks.items()])
            except StoreError:
                self._clocks = {**clocks, **self._clocks}
                raise
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
