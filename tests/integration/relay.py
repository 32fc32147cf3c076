"""A TCP relay that does to connections what networks and servers do: delays, drips, cuts, resets, silence, half ends.

Strategy: the relay stands between the gateway and an origin and knows nothing of HTTP; a Fault says what happens to the bytes of one
connection in one direction, and is asked for when a connection is accepted, so that each may have its own. What is open can be
stopped (a partition) and let go on, or broken, at any time. Faults that are random take their numbers from a seed.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

from tests.integration.processes import PATIENCE, eventually

Ending = Literal["close", "reset", "half"]  # of the connection to the gateway: FIN and no more reading, RST, FIN of one direction


@dataclass(frozen=True)
class Fault:
    """What happens to one connection; by default nothing."""

    delay: float = 0.0  # seconds before each piece of the answer
    drip: tuple[int, float] | None = None  # the answer in pieces of so many bytes, so many seconds apart
    cut_answer: int | None = None  # after so many bytes of answers the connection ends ...
    cut_request: int | None = None  # after so many bytes of requests
    ending: Ending = "reset"  # ... in this way
    hole: bool = False  # accepted, and nothing is ever read or answered
    idle: tuple[float, float] | None = None  # closes when nothing came for a random time from this range after an answer


def untouched(number: int) -> Fault:
    return Fault()


@dataclass(eq=False)
class Link:
    """A connection from the gateway and the one to the origin that belongs to it."""

    near: socket.socket
    far: socket.socket
    fault: Fault
    chance: random.Random
    taken: int = 0  # bytes of requests
    given: int = 0  # bytes of answers
    lock: threading.Lock = field(default_factory=threading.Lock)
    awaiting: bool = False  # an answer
    halved: bool = False
    over: bool = False
    mute: bool = False  # nothing passes any more, and nobody is told

    def end(self, ending: Ending) -> bool:
        """End it once; true when it was not over before."""
        with self.lock:
            if self.over or (ending == "half" and self.halved):
                return False
            self.over = ending != "half"
            self.halved = True
        if ending == "half":
            with contextlib.suppress(OSError):
                self.near.shutdown(socket.SHUT_WR)
            return True
        # The thread that carries the bytes closes both, perhaps at this moment; the shutdown wakes it.
        with contextlib.suppress(OSError):
            if ending == "reset":
                self.near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.far.shutdown(socket.SHUT_RDWR)
        return True


class Relay:
    """Listens on `port` and passes bytes to `target` and back, with the fault that `plan` gives the nth connection."""

    def __init__(self, target: int, plan: Callable[[int], Fault] = untouched, seed: int = 1) -> None:
        self.target, self.plan, self.seed = target, plan, seed
        self.accepted = 0
        self.ended = 0  # connections that the relay ended by its own will
        self._flowing = threading.Event()
        self._flowing.set()
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._flowing.set()
        self.break_all("reset")
        eventually(lambda: not self._links, "the end of the relay's connections")

    # -- faults of all connections at once

    def partition(self) -> None:
        """Nothing passes any more, in either direction; connections are still accepted, by the kernel."""
        self._flowing.clear()

    def silence(self) -> None:
        """Nothing passes any more on the connections of now, as when a firewall on the way has forgotten them; new ones are as ever."""
        with self._lock:
            for link in self._links:
                link.mute = True

    def heal(self) -> None:
        self._flowing.set()

    def break_all(self, ending: Ending = "reset") -> None:
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end(ending)

    @property
    def open(self) -> int:
        return len(self._links)

    # -- the bytes

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                number = self.accepted
            threading.Thread(target=self._run, args=(near, number), daemon=True).start()

    def _run(self, near: socket.socket, number: int) -> None:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far = socket.socket()
        link = Link(near, far, self.plan(number), random.Random(self.seed * 1_000_003 + number))
        with self._lock:
            self._links.add(link)
        try:
            self._carry(link)
        except OSError:
            link.end("reset")
        finally:
            with self._lock:
                self._links.discard(link)
            near.close()
            far.close()

    def _carry(self, link: Link) -> None:
        if link.fault.hole:
            eventually(lambda: link.over or not self._listening_open(), "the end of the hole")
            return
        link.far.settimeout(PATIENCE)
        link.far.connect(("127.0.0.1", self.target))
        link.far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reading = [link.near, link.far]
        while reading and not link.over:
            idle = link.fault.idle if link.given and not link.awaiting else None
            wait = link.chance.uniform(*idle) if idle is not None else 0.05
            ready = select.select(reading, [], [], wait)[0]
            if not self._flowing.is_set():
                self._flowing.wait(PATIENCE)
                continue
            if link.mute:
                time.sleep(0.05)  # the fault itself
                continue
            if not ready and idle is not None:
                self._end(link)
                return
            for sock in ready:
                if not (self._request(link) if sock is link.near else self._answer(link)):
                    reading.remove(sock)
                if link.over:
                    return

    def _request(self, link: Link) -> bool:
        piece = link.near.recv(65536)
        if not piece:
            link.far.shutdown(socket.SHUT_WR)
            return False
        left = None if link.fault.cut_request is None else link.fault.cut_request - link.taken
        link.far.sendall(piece if left is None else piece[: max(left, 0)])
        link.taken += len(piece)
        link.awaiting = True
        if left is not None and len(piece) >= left:
            self._end(link)
        return True

    def _answer(self, link: Link) -> bool:
        fault = link.fault
        piece = link.far.recv(fault.drip[0] if fault.drip else 65536)
        if not piece:
            link.near.shutdown(socket.SHUT_WR)
            return False
        pause = fault.drip[1] if fault.drip else fault.delay
        if pause:
            time.sleep(pause)  # the fault itself
        left = None if fault.cut_answer is None else fault.cut_answer - link.given
        link.near.sendall(piece if left is None else piece[: max(left, 0)])
        link.given += len(piece)
        link.awaiting = False
        if left is not None and len(piece) >= left:
            self._end(link)
        return True

    def _end(self, link: Link) -> None:
        if link.end(link.fault.ending):
            self.ended += 1

    def _listening_open(self) -> bool:
        return self._listening.fileno() >= 0
