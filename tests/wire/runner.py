"""Play a transcript against a gateway: both ends of every connection in one thread, without a single sleep.

Strategy: all sockets are non-blocking and pumped by one poll loop, which flushes what the ends have to say and collects
what they hear; a step waits for a condition over those buffers. FAILURE_AFTER only bounds a failing test. "Nothing
arrived" is made certain by a barrier: an exchange of its own through the same worker, which can only come back after the
worker has dealt with everything that was sent before it.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.wire.message import Malformed, Message, compare, read_message
from tests.wire.transcript import Step, Transcript, raw

FAILURE_AFTER = 5.0  # seconds; only a failing transcript waits this long
PROBE_HOST = b"barrier.test"
PROBE = b"GET /wire-barrier HTTP/1.1\r\nHost: barrier.test\r\n\r\n"
PROBE_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Mismatch(AssertionError):
    """The gateway did something that the transcript does not say."""


@dataclass
class End:
    """One scripted end of one connection."""

    name: str
    sock: socket.socket
    outgoing: bytearray = field(default_factory=bytearray)
    incoming: bytearray = field(default_factory=bytearray)
    ended: bool = False  # the gateway closed its sending side, or reset
    clean: bool = True  # by FIN
    open: bool = True

    def receive(self) -> None:
        """Take what has arrived."""
        while not self.ended and self.open:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                return
            except ConnectionError:
                self.ended, self.clean = True, False
                return
            self.incoming += data
            self.ended = not data

    def flush(self) -> None:
        """Send what fits; a gateway that has closed loses the rest, which is for later steps to judge."""
        try:
            while self.outgoing and self.open:
                del self.outgoing[: self.sock.send(self.outgoing[: 1 << 20])]
        except BlockingIOError:
            return
        except OSError:
            self.outgoing.clear()

    def close(self, *, reset: bool = False) -> None:
        """Close the connection, by RST when asked."""
        if reset and self.open:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.open = False
        self.incoming.clear()  # whoever leaves does not read
        self.sock.close()


def listen() -> socket.socket:
    """Return a listening socket on a free loopback port."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=256)
    sock.setblocking(False)
    return sock


class World:
    """The sockets around one gateway, kept for a whole session and cleared after each transcript."""

    def __init__(self, upstream: socket.socket, barrier: socket.socket) -> None:
        self.upstream = upstream
        self.barrier_socket = barrier
        self.listeners: dict[str, tuple[str, int]] = {}
        self.alive: Callable[[], None] = lambda: None  # raises when the gateway has died
        self.leaks: Callable[[], str] = str  # what the gateway holds though nobody is connected; empty when nothing
        self.clients: dict[int, End] = {}
        self.accepted: list[End] = []
        self.probes: list[End] = []

    # -- sockets -------------------------------------------------------------------------------------------------------

    def ends(self) -> list[End]:
        """Every open connection of either side."""
        return [end for end in (*self.clients.values(), *self.accepted, *self.probes) if end.open]

    def connect(self, listener: str, name: str) -> End:
        """Open a client connection to one of the gateway's listeners."""
        if listener not in self.listeners:
            raise Mismatch(f"the gateway has no listener {listener!r}, only {sorted(self.listeners)}")
        sock = socket.create_connection(self.listeners[listener], timeout=FAILURE_AFTER)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        return End(name, sock)

    def _accept(self, listener: socket.socket, into: list[End], name: str) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
                into.append(End(f"{name} {len(into) + 1}", sock))

    def _answer_probes(self) -> None:
        for probe in self.probes:
            while b"\r\n\r\n" in probe.incoming:
                del probe.incoming[: probe.incoming.index(b"\r\n\r\n") + 4]
                probe.outgoing += PROBE_ANSWER
                probe.flush()
            if probe.ended:
                probe.close()
        self.probes[:] = [probe for probe in self.probes if probe.open]

    def pump(self, more: list[End]) -> None:
        """Flush, collect and accept once, without waiting; also at ends that are no longer listed here."""
        self._round(0.0)
        for end in more:
            end.flush()
            end.receive()

    def _round(self, timeout: float) -> None:
        poll = select.poll()
        poll.register(self.upstream, select.POLLIN)
        poll.register(self.barrier_socket, select.POLLIN)
        for end in self.ends():
            events = (0 if end.ended else select.POLLIN) | (select.POLLOUT if end.outgoing else 0)
            if events:
                poll.register(end.sock, events)
        poll.poll(max(1, int(timeout * 1000)))
        self._accept(self.upstream, self.accepted, "upstream")
        self._accept(self.barrier_socket, self.probes, "barrier")
        for end in self.ends():
            end.flush()
            end.receive()
        self._answer_probes()

    def wait_for(self, what: str, condition: Callable[[], bool], *, look_every: float = FAILURE_AFTER) -> None:
        """Pump every socket until the condition holds; raises Mismatch after FAILURE_AFTER seconds.

        `look_every` (seconds) is for conditions that no socket of ours announces.
        """
        deadline = time.monotonic() + FAILURE_AFTER
        for end in self.ends():
            end.flush()
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                self.alive()
                raise Mismatch(f"waited {FAILURE_AFTER:g} s for {what}")
            self._round(min(left, look_every))

    def barrier(self) -> None:
        """Return after the gateway's worker has dealt with all that was sent to it before."""
        self.wait_for("everything to be sent", lambda: not any(end.outgoing for end in self.ends()))
        probe = self.connect("public", "barrier client")
        probe.outgoing += PROBE
        self.clients[-1] = probe
        try:
            self.wait_for("the answer to the barrier request", lambda: probe.incoming.endswith(b"\r\n\r\nok"))
        finally:
            probe.close()
            del self.clients[-1]

    # -- clearing up ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """End a transcript: nothing unexpected may be left, and the gateway's pool is emptied for the next one."""
        for name, end in self.clients.items():
            end.receive()
            if end.incoming:
                raise Mismatch(f"client {name} was sent more than the transcript expects: {bytes(end.incoming[:300])!r}")
            end.close()
        self.barrier()
        for end in self.accepted:
            if end.open and end.incoming:
                raise Mismatch(f"{end.name} was sent more than the transcript expects: {bytes(end.incoming[:300])!r}")
        self._drain_upstreams()

    def _drain_upstreams(self) -> None:
        for end in self.accepted:
            if end.open:
                with contextlib.suppress(OSError):
                    end.sock.shutdown(socket.SHUT_WR)
        self.wait_for(
            "the gateway to give up its upstream connections", lambda: all(end.ended or not end.open for end in self.accepted)
        )
        self.reset()
        try:
            self.wait_for("", lambda: not self.leaks(), look_every=0.001)
        except Mismatch:
            raise Mismatch(f"the gateway does not give back what it held: {self.leaks()}") from None

    def reset(self) -> None:
        """Drop every connection of a transcript."""
        for end in (*self.clients.values(), *self.accepted):
            end.close()
        self.clients.clear()
        self.accepted.clear()


class Play:
    """One run of one transcript (with one row) in a world."""

    def __init__(self, world: World, transcript: Transcript, row: dict[str, str]) -> None:
        self.world = world
        self.transcript = transcript
        self.row = row

    def run(self) -> None:
        """Play every step, then check that nothing is left over; raises Mismatch with file and line."""
        step: Step | None = None
        try:
            for step in self.transcript.with_row(self.row):
                self._step(step)
            step = None
            self.world.settle()
        except (Mismatch, Malformed) as error:
            self.world.reset()
            where = f"{self.transcript.path}:{step.line}: {step.title}" if step else f"{self.transcript.path}: after the last step"
            row = f"\n  row: {self.row}" if self.row else ""
            raise Mismatch(f"{where}{row}\n  {error}\n  rule: {self.transcript.rule}") from None

    def _step(self, step: Step) -> None:
        if step.end == "wait":
            self.world.barrier()
            return
        end = self._end(step)
        verb, _, argument = step.verb.partition(" ")
        if verb == "sends":
            end.outgoing += raw(step.block)
            end.flush()
        elif verb == "expects":
            self._expect(end, step, argument)
        else:
            self.world.wait_for("everything to be sent", lambda: not end.outgoing)
            if verb == "half-closes":
                end.sock.shutdown(socket.SHUT_WR)
            else:
                end.close(reset=verb == "resets")

    def _end(self, step: Step) -> End:
        world = self.world
        if step.end == "client":
            if step.number not in world.clients:
                world.clients[step.number] = world.connect(self.transcript.listener, f"client {step.number}")
            return world.clients[step.number]
        if step.verb in ("expects nothing", "expects nothing complete") and len(world.accepted) < step.number:
            world.barrier()
            if len(world.accepted) < step.number:
                return End("no upstream", socket.socket(), ended=True)
        world.wait_for(f"upstream connection {step.number}", lambda: len(world.accepted) >= step.number)
        return world.accepted[step.number - 1]

    def _expect(self, end: End, step: Step, argument: str) -> None:
        response = step.end == "client"
        kind, _, code = argument.partition(" ")
        if argument in ("", "without body"):
            message = self._message(end, response, body=not argument)
            self._compare(message, step, response, partial=False)
        elif argument == "partial":
            self._partial(end, step, response)
        elif argument == "bytes":
            wanted = raw(step.block)
            self.world.wait_for(f"{len(wanted)} bytes", lambda: len(end.incoming) >= len(wanted) or end.ended)
            if end.incoming[: len(wanted)] != wanted:
                raise Mismatch(f"got {bytes(end.incoming[:300])!r}")
            del end.incoming[: len(wanted)]
        elif argument in ("close", "truncated"):
            self._ended(end, response, truncated=argument == "truncated")
        elif kind == "nothing":
            self._nothing(end, complete=argument == "nothing complete")
        else:
            self._status(end, kind, int(code))

    def _message(self, end: End, response: bool, *, body: bool = True) -> Message:
        found: list[Message] = []

        def complete() -> bool:
            message = read_message(bytes(end.incoming), response=response, ended=end.ended, clean=end.clean, body=body)
            if message and message.complete:
                found.append(message)
            return bool(found) or end.ended

        self.world.wait_for("a complete message", complete)
        if not found:
            how = "closed" if end.clean else "was reset"
            raise Mismatch(f"{end.name} {how} before a complete message; got {bytes(end.incoming[:300])!r}")
        del end.incoming[: found[0].length]
        return found[0]

    def _compare(self, message: Message, step: Step, response: bool, *, partial: bool) -> None:
        difference = compare(message, step.block, response=response, partial=partial)
        if difference:
            raise Mismatch(difference)

    def _partial(self, end: End, step: Step, response: bool) -> None:
        """Wait until the message so far is what the block says; it stays unread."""
        difference = "nothing has arrived"

        def as_said() -> bool:
            nonlocal difference
            message = read_message(bytes(end.incoming), response=response)
            if message:
                difference = compare(message, step.block, response=response, partial=True) or ""
            return not difference or end.ended

        try:
            self.world.wait_for("the beginning of a message", as_said)
        except Mismatch as error:
            raise Mismatch(f"{error}: {difference}") from None
        if difference:
            raise Mismatch(difference)

    def _ended(self, end: End, response: bool, *, truncated: bool) -> None:
        self.world.wait_for(f"{end.name} to be closed", lambda: end.ended)
        if not truncated and end.incoming:
            raise Mismatch(f"bytes before the close: {bytes(end.incoming[:300])!r}")
        if truncated:
            message = read_message(bytes(end.incoming), response=response, ended=True, clean=end.clean)
            if message and message.complete:
                raise Mismatch(f"the message ended as if it were complete: {bytes(end.incoming[:300])!r}")
        end.incoming.clear()

    def _nothing(self, end: End, *, complete: bool) -> None:
        if end.name == "no upstream":
            return
        if not complete:
            self.world.barrier()
            if end.incoming:
                raise Mismatch(f"got {bytes(end.incoming[:300])!r}")
            return
        self.world.wait_for(f"{end.name} to be closed", lambda: end.ended)
        message = read_message(bytes(end.incoming), response=False)
        if message and message.complete:
            raise Mismatch(f"a complete request arrived: {bytes(end.incoming[:300])!r}")
        end.incoming.clear()

    def _status(self, end: End, kind: str, status: int) -> None:
        message = self._message(end, response=True)
        if message.status != status:
            raise Mismatch(f"status is {message.status}, expected {status}: {message.body[:300]!r}")
        if kind == "status":
            return
        for problem in _problem(message):
            raise Mismatch(problem)
        if kind == "refusal":
            if [value.lower() for value in message.values(b"connection")] != [b"close"]:
                raise Mismatch(f"no `connection: close` but {message.values(b'connection')}")
            self._ended(end, True, truncated=False)


def _problem(message: Message) -> Iterator[str]:
    """What keeps a local answer from being RFC 9457 problem details."""
    if message.values(b"content-type") != [b"application/problem+json"]:
        yield f"content-type is {message.values(b'content-type')}"
    try:
        body = json.loads(message.body)
    except ValueError as error:
        yield f"the body is not JSON ({error}): {message.body[:300]!r}"
        return
    missing = {"type", "title", "status", "detail", "request_id"} - set(body)
    if missing:
        yield f"the problem lacks {sorted(missing)}: {body}"
    elif body["status"] != message.status:
        yield f"the problem says {body['status']}, the status line {message.status}"
