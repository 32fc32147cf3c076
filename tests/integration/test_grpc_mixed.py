"""Calls of every kind by several clients at once, many of them given up half-way, while connections grow old and the gateway reloads.

Strategy: what a client does is drawn from a seeded generator, and every answer is checked against its call, so that messages of one never
reach another. At the end nothing is held, and no worker died.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.grpc_kit import Client, GrpcProcess, client_of, code_of, configure, hear, write_files
from tests.integration.grpc_service import message
from tests.integration.processes import PATIENCE, eventually

HOSTS, LISTENERS = ["bank.test", "tls.test", "narrow.test"], ["public", "secure", "narrow"]
OLD = "grpc.max_connection_age_ms=200", "grpc.max_connection_age_grace_ms=20000"


def books(client: Client, chance: random.Random) -> None:
    said = chance.randbytes(chance.choice([0, 1, 100, 20_000, 300_000]))
    assert client.book(said) == b"booked " + said


def lists(client: Client, chance: random.Random) -> None:
    """All of it, or the beginning alone."""
    stream = client.list(x_count="20", x_size="30000")
    for number in range(1, chance.choice([3, 21])):
        assert next(stream) == message(number, 30_000)
    stream.cancel()


def talks(client: Client, chance: random.Random) -> None:
    said = [chance.randbytes(chance.choice([1, 1000])) for _ in range(20)]
    assert hear(client.talk(said)) == ([b"%d:" % number + each for number, each in enumerate(said, 1)], "OK")


def refused(client: Client, chance: random.Random) -> None:
    code = chance.choice(["NOT_FOUND", "UNAVAILABLE", "INTERNAL"])
    with pytest.raises(grpc.RpcError) as told:
        client.book(x_code=code)
    assert code_of(told) == code


def late(client: Client, chance: random.Random) -> None:
    with pytest.raises(grpc.RpcError) as told:
        client.book(x_hold="0", timeout=chance.choice([0.02, 0.1, 0.3]))
    assert code_of(told) == "DEADLINE_EXCEEDED"


def given_up(client: Client, chance: random.Random) -> None:
    call: Any = client.booking(bytes(chance.choice([1, 100_000])), x_hold="0") if chance.random() < 0.5 else \
        client.collecting([bytes(chance.choice([10, 50_000])) for _ in range(30)])  # fmt: skip
    threading.Event().wait(chance.random() * 0.02)
    call.cancel()


KINDS: list[Callable[[Client, random.Random], None]] = [books, lists, talks, refused, late, given_up]


class Callers:
    """Threads that call until each has done `count` calls."""

    def __init__(self, gateway: WatchedGateway, root: bytes, seed: int, callers: int, count: int) -> None:
        self.gateway, self.root, self.count = gateway, root, count
        self.done = 0
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=self._run, args=(random.Random(seed + number),), daemon=True) for number in range(callers)]
        for thread in self.threads:
            thread.start()

    def _run(self, chance: random.Random) -> None:
        left = self.count
        while left:
            with client_of(self.gateway, chance.choice(HOSTS), chance.choice(LISTENERS), root=self.root) as client:
                for _ in range(min(left, chance.randrange(1, 20))):
                    kind = chance.choice(KINDS)
                    try:
                        kind(client, chance)
                    except Exception as error:  # noqa: BLE001 - shown by the test
                        self.wrong.append(f"{kind.__name__}: {error!r}")
                    left -= 1
                    self.done += 1


def test_calls_of_all_kinds_at_once(tmp_path: Path) -> None:
    root = write_files(tmp_path)
    with GrpcProcess(tmp_path, *OLD) as service, WatchedGateway(configure(tmp_path, service, workers=2)) as gateway:
        callers = Callers(gateway, root.pem, 7, callers=4, count=100)
        for share in (100, 200, 300):
            eventually(lambda share=share: callers.done >= share, f"{share} calls")
            gateway.signal(signal.SIGHUP)
        for thread in callers.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert callers.wrong == []
        gateway.calm()
        assert all(each["ended"] for each in service.seen())
