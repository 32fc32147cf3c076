"""The ledger of payments: what origins received and executed, what clients were told, and what must hold between the two.

Strategy: every request has an id of its own, a UUID that travels as Idempotency-Key and as X-Request-Id, so that it is found again
in the origins' book, in the clients' records and in the gateway's audit file. Origins write a line to the book before they do
anything that another can see: the book is a file in append mode, so it is complete even when its writer is killed, and one book
serves origins in threads and in processes alike. check() compares the three after any fault.

    python -m tests.integration.ledger PORT BOOK NAME SECONDS     an origin that takes so long for each request
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import select
import socket
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.bank import WatchedGateway
from tests.integration.faults import (
    Cut,
    Message,
    OriginProcess,
    Payers,
    ScriptedOrigin,
    Stream,
    body_length,
    get,
    ok,
    post,
)
from tests.integration.processes import eventually

UNCERTAIN = (502, 504)  # may come after the request was sent
REFUSALS = (429, 503)  # say when to come back
FILLER = b"." * 8192


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]


# -- the origins' side


@dataclass(frozen=True)
class Line:
    """One event at an origin: `arrived` with the head, `executed` with the whole body, `completed` when the answer was written."""

    event: str
    payment: str
    digest: str
    origin: str
    connection: str


class Book:
    """What the origins did. Lines are short, and written by one call each: they never mix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, line: Line) -> None:
        os.write(self._file, f"{line.event} {line.payment} {line.digest} {line.origin} {line.connection}\n".encode())

    def lines(self, event: str) -> list[Line]:
        rows = (row.split(" ") for row in self.path.read_text("utf-8").splitlines())
        return [Line(*row) for row in rows if row[0] == event]

    def arrivals(self) -> Counter[str]:
        """How many requests each origin has seen."""
        return Counter(line.origin for line in self.lines("arrived"))

    def close(self) -> None:
        os.close(self._file)


@dataclass
class Order:
    """A request that an origin has read completely."""

    payment: str
    method: str
    digest: str
    connection: str


class Counting:
    """Scripts of an origin that enters everything in the book."""

    def __init__(self, book: Book, name: str, seconds: float = 0.0, size: int = 0) -> None:
        self.book, self.name, self.seconds, self.size = book, name, seconds, size
        self._numbers = itertools.count(1)

    def connection(self) -> str:
        return f"{self.name}/{next(self._numbers)}"

    def receive(self, stream: Stream, connection: str) -> Order:
        """The next whole request. Raises Cut, and then nothing is executed."""
        head = stream.head()
        payment = head.fields["x-request-id"]
        assert head.fields.get("idempotency-key", payment) == payment
        self.book.write(Line("arrived", payment, "-", self.name, connection))
        body = b"".join(stream.pieces(body_length(head)))
        return Order(payment, head.start.split()[0], digest(body), connection)

    def execute(self, order: Order) -> bytes:
        """Do it, and return the receipt as an answer; more bytes follow the id and the digest when the answers are large."""
        self.book.write(Line("executed", order.payment, order.digest, self.name, order.connection))
        return ok(f"{order.payment} {order.digest} ".encode() + b"." * self.size)

    def complete(self, order: Order) -> None:
        self.book.write(Line("completed", order.payment, order.digest, self.name, order.connection))

    def serve(self, origin: ScriptedOrigin, stream: Stream) -> None:
        """Execute and answer everything."""
        connection = self.connection()
        while True:
            order = self.receive(stream, connection)
            receipt = self.execute(order)
            if self.seconds:
                time.sleep(self.seconds)  # what the work takes
            stream.send(receipt)
            self.complete(order)


class CountingProcess(OriginProcess):
    """A counting origin that can be stopped and killed."""

    module = "tests.integration.ledger"

    def __init__(self, port: int, book: Book, name: str, seconds: float = 0.0) -> None:
        super().__init__(port, str(book.path), name, str(seconds))


# -- the clients' side


@dataclass
class Told:
    """What one client sent and was told. `status` 0: the connection ended without a whole answer."""

    method: str
    digest: str
    status: int = 0
    sent: bool = False  # completely
    receipt: bool = False  # the answer is this request's own
    fields: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""  # the slug of a refusal
    detail: str = ""


class Customers(Payers):
    """Clients that send payments and, now and then, questions (GET), and keep a record of each.

    `reads`: the share of GETs. `chunked`: the share of payments without a length. A connection whose answer is followed by
    anything unasked is a failure. A refusal makes a client wait for `pause` seconds, so that nobody storms.
    """

    def __init__(self, port: int, count: int, *, reads: float = 0.3, chunked: float = 0.3, pause: float = 0.01) -> None:
        super().__init__(port, count, "/pay")
        self.reads, self.chunked, self.pause = reads, chunked, pause
        self.records: dict[str, Told] = {}
        self.unasked: list[bytes] = []
        self._chance = [random.Random(number) for number in range(count)]
        self._local = threading.local()

    def name(self, number: int, turn: int) -> str:
        self._local.chance = self._chance[number]
        return str(uuid.UUID(int=self._chance[number].getrandbits(128), version=4))

    def ask(self, stream: Stream, payment: str) -> Message:
        chance: random.Random = self._local.chance
        if more := pending(stream):
            self.unasked.append(more)
        if chance.random() < self.reads:
            told = self.records[payment] = Told("GET", digest(b""))
            stream.send(get("/balance", f"x-request-id: {payment}"))
        else:
            body = json.dumps({"payment": payment, "amount": chance.randrange(1, 10**9)}).encode() + FILLER[: chance.randrange(8192)]
            told = self.records[payment] = Told("POST", digest(body))
            names = (f"idempotency-key: {payment}", f"x-request-id: {payment}")
            if chance.random() < self.chunked:
                middle = chance.randrange(1, len(body))
                stream.send(get("/pay", "transfer-encoding: chunked", *names, method="POST"))
                for piece in (body[:middle], body[middle:]):
                    stream.send(b"%x\r\n" % len(piece), piece, b"\r\n")
                stream.send(b"0\r\n\r\n")
            else:
                stream.send(post("/pay", body, *names))
        told.sent = True
        return stream.answer(told.method)

    def hear(self, payment: str, answer: Message) -> None:
        told = self.records[payment]
        told.fields = answer.fields
        if answer.status == 200:
            told.receipt = answer.clean and answer.body.split(b" ")[:2] == [payment.encode(), told.digest.encode()]
        elif answer.fields.get("content-type") == "application/problem+json":
            said = json.loads(answer.body)
            told.problem, told.detail = said["type"].rpartition(":")[2], said["detail"]
        told.status = answer.status
        self.told[payment] = answer.status
        if answer.status != 200:
            self._stop.wait(self.pause)

    def broke(self, payment: str, error: Exception) -> None:
        super().broke(payment, error)
        self._stop.wait(self.pause)

    def told_so(self, status: int, count: int) -> None:
        """Wait until so many were told this."""
        eventually(lambda: self.count(status) >= count, f"{count} answers of {status}")


def pending(stream: Stream) -> bytes:
    """Bytes that came after an answer, unasked; the connection's end is none."""
    if not stream.buffer and select.select([stream.sock], [], [], 0)[0]:
        with contextlib.suppress(ConnectionError):
            return stream.sock.recv(100, socket.MSG_PEEK)
    return stream.buffer


# -- what must hold


@dataclass
class Verdict:
    """What a run amounted to, once every invariant holds."""

    requests: int
    answered: int  # 200
    statuses: dict[int, int]
    problems: dict[str, int]
    arrivals: Counter[str]  # by origin

    @property
    def amplification(self) -> float:
        """Requests that origins saw, by request of a client."""
        return sum(self.arrivals.values()) / self.requests


def check(
    customers: Sequence[Customers], book: Book, gateway: WatchedGateway | None = None, audit: Path | None = None, *, cuts: bool = False
) -> Verdict:
    """Assert L1 to L7; `cuts`: the fault broke off answers, so a connection may have ended within one.

    L1 nothing that was confirmed is missing upstream. L2 no payment was executed twice. L3 every answer is its request's own, and the
    only one. L4 what did not arrive whole was not executed. L5 a refusal is a proper one, and "not sent" means not executed. L6 the
    gateway holds nothing afterwards and lost no worker. L7 the audit file has one record for each request.
    """
    told = {payment: record for some in customers for payment, record in some.records.items()}
    executed: defaultdict[str, list[Line]] = defaultdict(list)
    for line in book.lines("executed"):
        executed[line.payment].append(line)
    arrived = book.lines("arrived")
    lost = [payment for payment, record in told.items() if record.status == 200 and payment not in executed]
    assert not lost, f"L1: {len(lost)} confirmed and not executed: {lost[:3]}"
    doubled = {payment: lines for payment, lines in executed.items() if len(lines) > 1 and told[payment].method == "POST"}
    assert not doubled, f"L2: {len(doubled)} executed more than once: {list(doubled.items())[:2]}"
    foreign = [payment for payment, record in told.items() if record.status == 200 and not record.receipt]
    assert not foreign, f"L3: {len(foreign)} answers that are not the request's: {foreign[:3]}"
    unasked = [more for some in customers for more in some.unasked]
    assert not unasked, f"L3: more than one answer: {unasked[:3]}"
    broken = [payment for payment, record in told.items() if record.status == 0]
    assert cuts or not broken, f"L3: {len(broken)} without an answer: {[(payment, told[payment]) for payment in broken[:3]]}"
    altered = [line for lines in executed.values() for line in lines if line.payment not in told or line.digest != told[line.payment].digest]
    assert not altered, f"L4: executed and never sent like this: {altered[:3]}"
    for payment, record in told.items():
        judge(payment, record, payment in executed)
    if gateway is not None:
        gateway.calm()
    if audit is not None:
        recorded(audit, {payment for payment, record in told.items() if record.sent})
    return Verdict(
        len(told),
        sum(1 for record in told.values() if record.status == 200),
        dict(Counter(record.status for record in told.values() if record.status != 200)),
        dict(Counter(record.problem for record in told.values() if record.problem)),
        Counter(line.origin for line in arrived),
    )


def judge(payment: str, record: Told, executed: bool) -> None:
    """L5 for one request."""
    if record.status in (0, 200):
        return
    assert 400 <= record.status < 500 or record.status in (502, 503, 504), f"L5: {payment} was told {record}"
    if record.status in REFUSALS:
        assert record.fields.get("retry-after", "").isdigit(), f"L5: {payment} is not told when to come back: {record}"
    if not record.problem:
        return  # the origin's own refusal
    if "not sent" in record.detail:
        assert not executed, f"L5: {payment} was said not to be sent, and was executed: {record}"
    elif executed:
        assert record.status in UNCERTAIN, f"L5: {payment} was executed and is told {record}"


def recorded(audit: Path, sent: set[str]) -> None:
    """L7: exactly one record for each request, once the last ones are written."""

    def records() -> Counter[str]:
        rows = (json.loads(row) for row in audit.read_text("utf-8").splitlines(keepends=True) if row.endswith("\n"))
        return Counter(row["id"] for row in rows if "id" in row)

    eventually(lambda: sent <= records().keys(), "L7: a record of every request")
    twice = {payment: times for payment, times in records().items() if times > 1}
    assert not twice, f"L7: {len(twice)} requests with more than one record: {list(twice.items())[:3]}"


def main() -> None:
    book = Book(Path(sys.argv[2]))
    counting = Counting(book, sys.argv[3], float(sys.argv[4]))

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        with contextlib.suppress(Cut):
            counting.serve(origin, stream)

    print(ScriptedOrigin(script, int(sys.argv[1])).port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
