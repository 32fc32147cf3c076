"""Origins and clients that misbehave, and the ledger of what was executed.

Strategy: both ends are plain sockets in threads, so that a test decides about every byte and every close. An origin runs a
script, a function of one connection; the ledger counts how often each payment was executed, and the payers remember what
they were told, so that a lost, a doubled and a mistaken answer can be told apart after any fault.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.integration.processes import PATIENCE, ROOT, environment, eventually

PIECE = 1 << 20
PATTERN = random.Random(20).randbytes(PIECE)  # bodies repeat it: a lost, doubled or swapped piece shows


class Cut(Exception):
    """The other side ended or broke the connection before its message was complete."""


@dataclass
class Message:
    """A request or an answer. `clean` is false for a body that ended by the end of the connection."""

    start: str
    fields: dict[str, str]
    body: bytes = b""
    clean: bool = True

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    @property
    def path(self) -> str:
        return self.start.split()[1]


class Stream:
    """A connection with a read buffer. Waits end after PATIENCE, as a failure."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self.buffer = b""
        self.dawdle = 0  # bytes that one recv() takes at most; 0: as many as it likes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- ends

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def closed(self) -> bool:
        """Wait for the other side's end; True when it was a clean one and nothing came before it."""
        try:
            return not self.buffer and self.sock.recv(1) == b""
        except ConnectionError:
            return False

    # -- bytes

    def send(self, *pieces: bytes) -> None:
        self.sock.sendall(b"".join(pieces))

    def _more(self) -> None:
        try:
            piece = self.sock.recv(self.dawdle or 1 << 18)
        except ConnectionError as error:
            raise Cut(str(error)) from None
        if not piece:
            raise Cut("end of stream")
        self.buffer += piece

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self._more()
        found, _, self.buffer = self.buffer.partition(mark)
        return found

    def exactly(self, n: int) -> bytes:
        while len(self.buffer) < n:
            self._more()
        found, self.buffer = self.buffer[:n], self.buffer[n:]
        return found

    def rest(self) -> tuple[bytes, bool]:
        """Everything until the end, and whether that was a clean one."""
        try:
            while True:
                self._more()
        except Cut as end:
            found, self.buffer = self.buffer, b""
            return found, str(end) == "end of stream"

    def pieces(self, length: int | None) -> Iterator[bytes]:
        """A body piece by piece: `length` bytes, or chunked when it is None."""
        if length is not None:
            while length:
                if not self.buffer:
                    self._more()
                piece, self.buffer = self.buffer[:length], self.buffer[length:]
                length -= len(piece)
                yield piece
            return
        while size := int(self.until(b"\r\n").partition(b";")[0], 16):
            yield self.exactly(size)
            assert self.exactly(2) == b"\r\n"
        while self.until(b"\r\n"):
            pass  # trailers

    # -- messages

    def head(self) -> Message:
        start, *lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        return Message(start, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)})

    def request(self) -> Message:
        """A whole request. Raises Cut."""
        message = self.head()
        message.body = b"".join(self.pieces(body_length(message)))
        return message

    def answer(self, method: str = "GET") -> Message:
        """A whole final answer. Raises Cut when it is not complete."""
        message = self.head()
        while message.status < 200:
            message = self.head()
        if method == "HEAD" or message.status in (204, 304):
            return message
        if "transfer-encoding" in message.fields or "content-length" in message.fields:
            message.body = b"".join(self.pieces(body_length(message)))
        else:
            message.body, message.clean = self.rest()
        return message

    def ask(self, request: bytes) -> Message:
        self.send(request)
        return self.answer(request.split(b" ", 1)[0].decode())


def body_length(message: Message) -> int | None:
    """None for chunked."""
    return None if "transfer-encoding" in message.fields else int(message.fields.get("content-length", 0))


def get(path: str = "/x", *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: bank.test", *lines, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    return get(path, f"content-length: {len(body)}", *lines, method="POST") + body


def ok(body: bytes = b"ok", *lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"content-length: {len(body)}", *lines, "", ""]).encode() + body


def connect(port: int, *, receive: int = 0) -> Stream:
    """A client's connection; `receive` is the size of its receive buffer."""
    sock = socket.socket()
    if receive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", port))
    return Stream(sock)


# -- the origin's side


@dataclass
class Ledger:
    """What was executed, and how often."""

    executed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def execute(self, payment: str) -> None:
        with self.lock:
            self.executed[payment] += 1


Script = Callable[["ScriptedOrigin", Stream], None]


def serve(origin: ScriptedOrigin, stream: Stream) -> None:
    """Executes every request: its body's bytes are the payment, and the answer."""
    while True:
        request = stream.request()
        payment = request.fields.get("idempotency-key")
        if payment is not None:
            assert request.body == payment.encode()
            origin.ledger.execute(payment)
        stream.send(ok(request.body or request.start.encode()))


class ScriptedOrigin:
    """A server that runs its script for each connection, in a thread."""

    def __init__(self, script: Script = serve, port: int = 0, address: str = "127.0.0.1") -> None:
        self.script = script
        self.ledger = Ledger()
        self.accepted = 0
        self.seen = threading.Semaphore(0)  # released by scripts at the moment a test waits for
        self.go = threading.Event()  # set by tests
        self.failures: list[BaseException] = []
        self._streams: set[Stream] = set()
        self._lock = threading.Lock()
        self._listening = socket.create_server((address, port), backlog=1024, reuse_port=port != 0)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.accepted += 1
                stream = Stream(sock)
                self._streams.add(stream)
            threading.Thread(target=self._run, args=(self.script, stream), daemon=True).start()

    def _run(self, script: Script, stream: Stream) -> None:
        try:
            script(self, stream)
        except (Cut, OSError):
            pass  # the gateway's right, or the test's doing
        except BaseException as error:  # noqa: BLE001 - shown by reset()
            self.failures.append(error)
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.close()

    def reset(self) -> None:
        """Break what is open and serve again."""
        self.script = serve
        self.go.set()
        with self._lock:
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.sock.shutdown(socket.SHUT_RDWR)
        eventually(lambda: not self._streams, "the end of the origin's scripts")
        self.go = threading.Event()
        self.seen = threading.Semaphore(0)
        self.ledger = Ledger()
        self.accepted = 0
        failures, self.failures = self.failures, []
        assert not failures, failures

    @property
    def open(self) -> int:
        """Connections that neither side has closed."""
        return len(self._streams)

    def saw(self) -> None:
        """Wait until the script has come to the moment that it marks with `seen`."""
        assert self.seen.acquire(timeout=PATIENCE)

    def refuse(self) -> None:
        """Accept no connection any more; those that are open stay."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def close(self) -> None:
        self.refuse()
        self.reset()


class OriginProcess:
    """An origin that can be stopped and killed: below /never nothing is answered, below /half half, all else at once."""

    module = "tests.integration.faults"

    def __init__(self, port: int, *words: str) -> None:
        command = [sys.executable, "-m", self.module, str(port), *words]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert int(self.process.stdout.readline()) == port

    def read(self) -> str:
        """The next request that it has read."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            state = Path(f"/proc/{self.process.pid}/stat")
            eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the stop")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _in_a_process(origin: ScriptedOrigin, stream: Stream) -> None:
    while True:
        request = stream.request()
        sys.stdout.write(request.start + "\n")
        sys.stdout.flush()
        if "/never" in request.path:
            threading.Event().wait()
        if "/half" in request.path:
            stream.send(ok(b"x" * 100)[:-50])
            threading.Event().wait()
        stream.send(ok())


# -- the clients' side


class Payers:
    """Clients that pay one after the other, each payment once, on a connection of their own that is renewed when it breaks."""

    def __init__(
        self, port: int, count: int, path: str = "/slow/pay", *, fresh: bool = False, connect: Callable[[int], Stream] = connect
    ) -> None:
        self.port = port
        self.connect = connect
        self.path = path
        self.fresh = fresh  # a new connection for each payment
        self.told: dict[str, int] = {}  # payment -> status, 0 when the connection broke
        self.mistaken: list[tuple[str, bytes]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._pay, args=(number,), daemon=True) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _pay(self, number: int) -> None:
        stream: Stream | None = None
        for turn in range(1_000_000):
            if self._stop.is_set():
                break
            payment = self.name(number, turn)
            try:
                if stream is None:
                    stream = self.connect(self.port)
                answer = self.ask(stream, payment)
            except (Cut, OSError) as error:
                self.broke(payment, error)
                if stream is not None:
                    stream.close()
                stream = None
                continue
            self.hear(payment, answer)
            if self.fresh or answer.fields.get("connection") == "close":
                stream.close()
                stream = None
        if stream is not None:
            stream.close()

    def name(self, number: int, turn: int) -> str:
        """The next payment's id."""
        return f"{number}-{turn}-{os.urandom(4).hex()}"

    def ask(self, stream: Stream, payment: str) -> Message:
        """Pay and wait for the whole answer. Raises Cut."""
        return stream.ask(post(self.path, payment.encode(), f"idempotency-key: {payment}"))

    def hear(self, payment: str, answer: Message) -> None:
        self.told[payment] = answer.status
        if answer.status == 200 and answer.body != payment.encode():
            self.mistaken.append((payment, answer.body))

    def broke(self, payment: str, error: Exception) -> None:
        """The connection ended without an answer, or within one."""
        self.told[payment] = 0

    def paid(self, more: int) -> None:
        """Wait for that many further answers of 200."""
        before = self.count(200)
        eventually(lambda: self.count(200) >= before + more, f"{more} payments")

    def count(self, status: int) -> int:
        return list(self.told.values()).count(status)

    def failed(self) -> dict[int, int]:
        """How many were told something else than 200, by status."""
        return dict(Counter(status for status in self.told.values() if status != 200))

    def check(self, ledger: Ledger) -> None:
        """Nothing lost, nothing doubled, nobody told another's answer."""
        assert not self.mistaken
        doubled = {payment: times for payment, times in ledger.executed.items() if times > 1}
        assert not doubled
        lost = [payment for payment, status in self.told.items() if status == 200 and not ledger.executed[payment]]
        assert not lost
        assert ledger.executed.keys() <= self.told.keys()


if __name__ == "__main__":
    print(ScriptedOrigin(_in_a_process, int(sys.argv[1])).port, flush=True)
    threading.Event().wait()
