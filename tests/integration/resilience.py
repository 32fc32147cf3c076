"""An upstream of several counting origins behind a real gateway of two workers, with the audit file that the ledger compares.

Strategy: what the resilience tests share: ports that stay reserved while their origin is dead, the configuration, and a run, which is
customers at work while a fault happens, then the check of every invariant.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.bank import WatchedGateway
from tests.integration.ledger import Book, CountingProcess, Customers, Verdict, check
from tests.integration.processes import eventually

CONFIG = """\
version: 1
workers: 2
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: 5s}}
listeners: {{public: {{bind: 127.0.0.1:0, limits: {{requests: 100000000}}}}}}
upstreams:
  payments:
    targets: [{targets}]
    timeouts: {{connect: 500ms, head: 700ms, idle: 700ms, total: 10s}}
{more}policies: {{trail: {{audit: {{file: audit.jsonl}}}}}}
routes:
  - {{name: all, match: {{prefix: /}}, upstream: payments, policies: [trail]}}
"""


@dataclass
class Payments:
    """The gateway, the book of its origins and the customers that were let loose on it."""

    gateway: WatchedGateway
    book: Book
    audit: Path
    customers: list[Customers] = field(default_factory=list)

    @contextlib.contextmanager
    def trade(self, count: int = 8, **options: Any) -> Iterator[Customers]:
        """Customers at work while the block runs."""
        with Customers(self.gateway.port(), count, **options) as customers:
            self.customers.append(customers)
            yield customers

    def verdict(self, *, cuts: bool = False) -> Verdict:
        """Every invariant holds, from the first request to the last."""
        return check(self.customers, self.book, self.gateway, self.audit, cuts=cuts)

    def counter(self, name: str) -> float:
        return self.gateway.counter(name)


@contextlib.contextmanager
def payments(folder: Path, ports: Sequence[int], *more: str) -> Iterator[Payments]:
    """A gateway before origins on these ports; `more` are further lines of the upstream."""
    lines = "".join(f"    {line}\n" for line in more)
    path = folder / "edge.yaml"
    path.write_text(CONFIG.format(targets=", ".join(f"127.0.0.1:{port}" for port in ports), more=lines))
    book = Book(folder / "book")
    with WatchedGateway(path) as gateway:
        yield Payments(gateway, book, folder / "audit.jsonl")
    book.close()


class Site:
    """A place for one origin process: its port is kept when the process is gone, and refuses connections then."""

    def __init__(self, book: Callable[[], Book], name: str, seconds: float = 0.0) -> None:
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._kept.bind(("127.0.0.1", 0))
        self.port: int = self._kept.getsockname()[1]
        self.book, self.name, self.seconds = book, name, seconds
        self.process: CountingProcess | None = None

    def start(self) -> CountingProcess:
        self.process = CountingProcess(self.port, self.book(), self.name, self.seconds)
        return self.process

    def stop(self) -> None:
        """Kill it, whatever it is at."""
        if self.process is not None:
            self.process.__exit__()
            self.process = None

    def close(self) -> None:
        self.stop()
        self._kept.close()


@dataclass
class Estate(Payments):
    """Payments whose origins are processes."""

    sites: list[Site] = field(default_factory=list)

    def arrivals(self, site: int) -> int:
        return self.book.arrivals()[self.sites[site].name]

    def served_by(self, site: int, more: int = 20) -> None:
        """Wait until the site has seen so many further requests."""
        before = self.arrivals(site)
        eventually(lambda: self.arrivals(site) >= before + more, f"requests at {self.sites[site].name}")


@contextlib.contextmanager
def estate(folder: Path, seconds: Sequence[float], *more: str) -> Iterator[Estate]:
    """A gateway before one origin process for each of `seconds`, which is how long that one takes for a request."""
    book = Book(folder / "book")
    sites = [Site(lambda: book, f"site-{number}", each) for number, each in enumerate(seconds)]
    try:
        for site in sites:
            site.start()
        with payments(folder, [site.port for site in sites], *more) as made:
            yield Estate(made.gateway, made.book, made.audit, sites=sites)
    finally:
        for site in sites:
            site.close()
        book.close()
