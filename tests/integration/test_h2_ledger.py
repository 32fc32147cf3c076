"""Money over HTTP/2: whatever an upstream does to streams and connections, no payment is lost, doubled or told to another.

Strategy: clients of both versions pay at once through one gateway, those of HTTP/2 with many streams at a time. The upstream's fault
strikes some of the requests, before or after it has entered them in the book, and ledger.check() compares the book with what the
clients were told.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import Cut
from tests.integration.h2_kit import REFUSED_STREAM, Answer, H2Client, connect_h2, frame, head, headers
from tests.integration.h2_origin import Call, TwinOrigin
from tests.integration.ledger import FILLER, Book, Customers, Line, Told, check, digest
from tests.integration.processes import PATIENCE, eventually

CONFIG = """
version: 1
workers: 2
admin: {{bind: 127.0.0.1:0}}
listeners:
  one: {{bind: 127.0.0.1:0, limits: {{requests: 1000000}}}}
  two: {{bind: 127.0.0.1:0, http2: {{clear: true}}, limits: {{requests: {requests}}}}}
upstreams:
  bank: {{targets: [127.0.0.1:{port}], protocol: {protocol}}}
policies:
  trail: {{audit: {{file: audit.jsonl}}}}
routes:
  - {{name: all, match: {{prefix: /}}, upstream: bank, policies: [trail]}}
"""


class Crowd:
    """Clients in HTTP/2, each with a connection of its own and many payments on it at once; records as Customers keep them."""

    def __init__(self, port: int, count: int, streams: int = 8) -> None:
        self.port, self.streams = port, streams
        self.records: dict[str, Told] = {}
        self.unasked: list[bytes] = []
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(random.Random(1000 + number),), daemon=True) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not self._failures, self._failures

    def count(self, status: int) -> int:
        return [told.status for told in list(self.records.values())].count(status)

    def paid(self, more: int) -> None:
        before = self.count(200)
        eventually(lambda: self._failures or self.count(200) >= before + more, f"{more} payments")

    def _run(self, chance: random.Random) -> None:
        client: H2Client | None = None
        try:
            while not self._stop.is_set():
                client = client or connect_h2(self.port)
                try:
                    self._batch(client, chance)
                except (Cut, OSError):
                    client.end = client.end or "broken"
                if client.end or client.gone:
                    client.close()
                    client = None
                self._stop.wait(0.005)
        except BaseException as error:  # noqa: BLE001 - told at the end
            self._failures.append(error)

    def _batch(self, client: H2Client, chance: random.Random) -> None:
        """Some payments at once, their DATA mixed."""
        asked: dict[str, int] = {}
        out = []
        for _ in range(self.streams):
            payment, stream = str(uuid.UUID(int=chance.getrandbits(128), version=4)), client.stream()
            asked[payment] = stream
            if chance.random() < 0.3:
                self.records[payment] = Told("GET", digest(b""), sent=True)
                out.append([headers(stream, head("/balance", "GET", ("x-request-id", payment)))])
            else:
                body = json.dumps({"payment": payment, "amount": chance.randrange(1, 10**9)}).encode() + FILLER[: chance.randrange(4096)]
                self.records[payment] = Told("POST", digest(body), sent=True)
                names = [("x-request-id", payment), ("idempotency-key", payment)]
                if chance.random() < 0.5:
                    names.append(("content-length", str(len(body))))
                middle = chance.randrange(len(body))
                out.append([headers(stream, head("/pay", "POST", *names), end=False), frame(0, 0, stream, body[:middle]), frame(0, 1, stream, body[middle:])])
        for frames in out:                              # heads in the order of their streams, DATA in any
            client.send(frames.pop(0))
        while any(out):
            frames = chance.choice([each for each in out if each])
            client.send(frames.pop(0))
        for payment, stream in asked.items():
            client.window = 1 << 20                     # the batches are small: no bookkeeping
            self._hear(payment, client.answer(stream))

    def _hear(self, payment: str, answer: Answer) -> None:
        told = self.records[payment]
        if not answer.ended:
            return                                      # a cut answer confirms nothing
        told.fields = dict(answer.fields)
        if answer.status == 200:
            told.receipt = bytes(answer.body).split(b" ")[:2] == [payment.encode(), told.digest.encode()]
        elif answer.get("content-type") == "application/problem+json":
            said = json.loads(bytes(answer.body))
            told.problem, told.detail = said["type"].rpartition(":")[2], said["detail"]
        told.status = answer.status


@dataclass
class Tills:
    """The upstream: enters everything in the book, and lets one fault at a time strike some of the requests."""

    book: Book
    fault: str = ""
    share: float = 0.1

    def __post_init__(self) -> None:
        self.chance = random.Random(7)
        self.struck: Counter[str] = Counter()
        self.left: dict[int, int] = {}                  # connections that were told to go, and the last stream that is done there

    async def __call__(self, call: Call) -> None:
        payment, number = call.get("x-request-id"), call.link.origin.links.index(call.link)
        self.book.write(Line("arrived", payment, "-", "till", str(number)))
        body = await call.body()
        if call.stream > self.left.get(number, call.stream):
            call.done = True                            # nothing is done, and nothing said
            return
        strikes = self.fault and self.chance.random() < self.share
        if strikes and await self.before(call, number):
            return
        order = Line("executed", payment, digest(body), "till", str(number))
        self.book.write(order)
        if strikes and await self.after(call):
            return
        await call.answer(f"{payment} {digest(body)} ".encode() + b"." * 2000)
        return

    async def before(self, call: Call, number: int) -> bool:
        """Faults that leave the payment undone."""
        if self.fault == "refused":
            await call.reset(REFUSED_STREAM)
        elif self.fault == "reset before":
            await call.reset()
        elif self.fault == "abort before":
            call.link.abort()
            call.done = True
        elif self.fault == "goaway" and number not in self.left:
            # All that was begun is finished; what may be on its way is not.
            self.left[number] = max(call.link.calls)
            await call.link.goaway(self.left[number])  # type: ignore[attr-defined]
            self.struck[self.fault] += 1
            return False
        else:
            return False
        self.struck[self.fault] += 1
        return True

    async def after(self, call: Call) -> bool:
        """Faults that come when it is done."""
        if self.fault == "reset after":
            await call.reset()
        elif self.fault == "abort after":
            call.link.abort()
            call.done = True
        elif self.fault == "reset within":
            await call.head(200, [("content-length", "3000")])
            await call.write(b"half")
            await call.reset()
        else:
            return False
        self.struck[self.fault] += 1
        return True


FAULTS = ["refused", "reset before", "abort before", "reset after", "abort after", "reset within", "goaway"]


@contextlib.contextmanager
def branch(folder: Path, protocol: str, requests: int = 1_000_000) -> Iterator[tuple[WatchedGateway, TwinOrigin, Tills]]:
    with TwinOrigin() as origin:
        book = Book(folder / "book")
        origin.script = tills = Tills(book)
        path = folder / "edge.yaml"
        path.write_text(CONFIG.format(port=origin.one if protocol == "http1" else origin.two, protocol=protocol, requests=requests))
        with WatchedGateway(path) as gateway:
            yield gateway, origin, tills
        book.close()
        assert not origin.failures, origin.failures


def pay_through(folder: Path, protocol: str, faults: list[str], meanwhile: Callable[[WatchedGateway], None] | None = None) -> None:
    with branch(folder, protocol) as (gateway, _, tills):
        with Customers(gateway.port("one"), 4) as ones, Crowd(gateway.port("two"), 4) as crowd:
            crowd.paid(50)
            eventually(lambda: ones.count(200) >= 20, "payments in HTTP/1.1")
            for fault in faults:
                tills.fault = fault
                eventually(lambda fault=fault: tills.struck[fault] >= 8, f"the fault {fault!r}")
            tills.fault = ""
            crowd.paid(50)
            if meanwhile is not None:
                meanwhile(gateway)
                crowd.paid(50)
        verdict = check([ones, crowd], tills.book, gateway, folder / "audit.jsonl", cuts=True)  # type: ignore[list-item]
        assert verdict.answered > 150


@pytest.mark.parametrize("protocol", ["http2", "http1"])
def test_no_fault_of_an_upstream_loses_or_doubles_a_payment(tmp_path: Path, protocol: str) -> None:
    faults = FAULTS if protocol == "http2" else [fault for fault in FAULTS if fault not in ("refused", "goaway")]
    pay_through(tmp_path, protocol, faults)


@pytest.mark.parametrize("protocol", ["http2", "http1"])
def test_reloads_lose_and_double_nothing(tmp_path: Path, protocol: str) -> None:
    def reload(gateway: WatchedGateway) -> None:
        for _ in range(5):
            done = gateway.command("reload")
            assert done.returncode == 0, done

    pay_through(tmp_path, protocol, [], reload)


def test_refusals_alone_cost_no_payment(tmp_path: Path) -> None:
    """REFUSED_STREAM and GOAWAY are promises that nothing was done: every payment goes through in the end, once."""
    with branch(tmp_path, "http2") as (gateway, _, tills):
        tills.share = 0.02
        with Crowd(gateway.port("two"), 4) as crowd:
            crowd.paid(20)
            for fault in ("refused", "goaway"):
                tills.fault = fault
                eventually(lambda fault=fault: tills.struck[fault] >= 8, f"the fault {fault!r}")
            tills.fault = ""
            crowd.paid(50)
        verdict = check([crowd], tills.book, gateway, tmp_path / "audit.jsonl", cuts=False)  # type: ignore[list-item]
        assert not verdict.statuses, verdict


def test_connections_that_are_drained_all_the_time_lose_nothing(tmp_path: Path) -> None:
    """A client's connection is told to go after 20 requests, in the middle of a batch; what it refuses is not done."""
    with branch(tmp_path, "http2", requests=20) as (gateway, _, tills):
        with Crowd(gateway.port("two"), 4) as crowd:
            crowd.paid(300)
        check([crowd], tills.book, gateway, None, cuts=True)  # type: ignore[list-item]
