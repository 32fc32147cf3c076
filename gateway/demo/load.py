"""Payments at a steady pace from several clients of the edge, each answer counted: what goes on while something happens to the mesh.

Strategy: a thread per client with a connection and a token of its own. A payment counts as booked when the answer is 201 and says so;
everything else is a failure, and its reason is kept.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway.demo.caller import Answer, Call, Caller
from gateway.demo.stage import Stage

CLIENTS = 4
PACE = 40.0  # payments a second, of all clients together, if the machine can


@dataclass(frozen=True, slots=True)
class Paid:
    """One payment as its client saw it: when it was answered, by the monotonic clock; what it was named and who entered it, or why not."""

    at: float
    seconds: float
    payment: str
    ledger: str
    version: str
    problem: str


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of some payments."""

    booked: int
    failed: Counter[str]
    slowest: float
    ledgers: Counter[str]
    versions: Counter[str]

    @property
    def problem(self) -> str:
        """Why some failed, with numbers; empty when none did."""
        return "; ".join(f"{count} failed: {why}" for why, count in self.failed.most_common(3))

    def __str__(self) -> str:
        if failed := self.failed.total():
            return f"{self.booked + failed} sent, {self.booked} booked, {failed} failed"
        return f"{self.booked} sent, {self.booked} booked, 0 failed; the slowest took {self.slowest * 1000:.0f} ms"


class Load:
    """A context manager: payments are made until it is left."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._paid: list[Paid] = []
        self._threads = [
            threading.Thread(target=self._client, args=(stage.token(f"till-{number}", ["payments:write"]),), daemon=True)
            for number in range(CLIENTS)
        ]

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Make no more payments; return when the last is answered."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def since(self, when: float = 0.0) -> Tally:
        """Return what became of the payments that were answered since then, by the monotonic clock."""
        with self._lock:
            paid = [each for each in self._paid if each.at >= when]
        booked = [each for each in paid if not each.problem]
        return Tally(
            len(booked),
            Counter(each.problem for each in paid if each.problem),
            max((each.seconds for each in paid), default=0.0),
            Counter(each.ledger for each in booked),
            Counter(each.version for each in booked),
        )

    def payments(self) -> set[str]:
        """The names of all that were booked."""
        with self._lock:
            return {each.payment for each in self._paid if not each.problem}

    def _client(self, token: str) -> None:
        caller, due = self._stage.caller(), time.monotonic()
        order = {"creditor": "DE02500105170137075030", "amount": "1.00", "currency": "EUR"}
        call = Call("POST", "/v1/payments", token, body=json.dumps(order).encode())
        while not self._over.is_set():
            paid = _pay(caller, call)
            with self._lock:
                self._paid.append(paid)
            due = max(time.monotonic(), due + CLIENTS / PACE)  # what was late is not made up for by a burst
            self._over.wait(due - time.monotonic())
        caller.close()


def _pay(caller: Caller, call: Call) -> Paid:
    began = time.monotonic()
    try:
        answer = caller.call(call)
    except (OSError, http.client.HTTPException) as error:
        now = time.monotonic()
        return Paid(now, now - began, "", "", "", f"no answer: {error or type(error).__name__}")
    problem, made = _judged(answer)
    return Paid(time.monotonic(), answer.seconds, made.get("id", ""), made.get("ledger", ""), made.get("version", ""), problem)


def _judged(answer: Answer) -> tuple[str, dict[str, str]]:
    try:
        made = answer.json()
    except ValueError:
        made = {}
    if answer.status == 201 and made.get("status") == "booked":
        return "", made
    why = answer.reason() or made.get("why") or ""
    return f"{answer.status} {why}".strip()[:200], {}
