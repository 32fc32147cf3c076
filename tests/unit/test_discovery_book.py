"""What is remembered about names: times, failures, one look-up at once; and what of an answer becomes endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway.config.discovery import MAX_ENDPOINTS
from gateway.config.web import Address
from gateway.discovery import book as books
from gateway.discovery.book import Book
from gateway.discovery.dns import Missing, Unanswered
from gateway.discovery.dns_wire import Service
from gateway.discovery.found import Target, merge, targets_of_services
from gateway.discovery.names import Answer, HostsFile, Lookups, Wanted, usable
from gateway.discovery.order import MOST, chosen

assert MOST == MAX_ENDPOINTS, "one number in two modules, since one of them is without the schema"

PATIENCE = 20.0  # seconds, used up by a failure only


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(bounded())


class Script:
    """Answers one after the other; the last one again and again."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.at_once = self.most_at_once = 0

    async def ask(self, wanted: Wanted) -> Answer:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def delays(monkeypatch: pytest.MonkeyPatch, script: Script, count: int, resolve: float = 30.0) -> list[float]:
    """The first waits between look-ups, without their jitter."""
    waited: list[float] = []
    enough = asyncio.Event()
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            waited.append(seconds)
            if len(waited) == count:
                enough.set()
        await real(0)

    async def test() -> None:
        monkeypatch.setattr(books.random, "uniform", lambda low, high: high)
        monkeypatch.setattr(books.asyncio, "sleep", sleep)
        book = Book(asyncio.get_running_loop(), script)
        user = book.watch(Wanted("a.test"), resolve, lambda: None)
        await enough.wait()
        user.stop()

    run(test)
    return waited[:count]


@pytest.mark.parametrize(("ttl", "delay"), [(0, 1.0), (1, 1.0), (7, 7.0), (30, 30.0), (86400, 30.0), (None, 30.0)])
def test_an_answer_is_used_for_its_ttl_within_bounds(monkeypatch: pytest.MonkeyPatch, ttl: int | None, delay: float) -> None:
    assert delays(monkeypatch, Script(Answer(("192.0.2.1",), ttl)), 3) == [delay] * 3


def test_failures_are_asked_about_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(*[Unanswered("SERVFAIL")] * 8, Answer(("192.0.2.1",), 9), Unanswered("SERVFAIL"), Answer(("192.0.2.1",), 9))
    assert delays(monkeypatch, script, 10) == [0.5, 1, 2, 4, 8, 16, 30, 30, 9, 0.5]


def test_half_an_answer_is_completed_by_what_was_known_and_asked_for_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(Answer(("192.0.2.1", "2001:db8::1"), 20), Answer(("192.0.2.2",), 20, unknown=(6,)))
    assert delays(monkeypatch, script, 2) == [20, 2]

    async def test() -> None:
        script = Script(Answer(("192.0.2.1", "2001:db8::1"), 0), Answer(("192.0.2.2",), 0, unknown=(6,)))
        changed = asyncio.Event()
        user = Book(asyncio.get_running_loop(), script).watch(Wanted("a.test"), 0.001, changed.set)
        while user.values != ("192.0.2.2", "2001:db8::1"):
            await changed.wait()
            changed.clear()
        user.stop()

    monkeypatch.undo()
    run(test)


def test_many_users_of_a_name_cause_one_look_up() -> None:
    async def test() -> None:
        script = Script(Answer(("192.0.2.1",), 60))
        told: list[int] = []
        book = Book(asyncio.get_running_loop(), script)
        users = [book.watch(Wanted("a.test"), 30, lambda number=number: told.append(number)) for number in range(50)]
        while len(told) < 50:
            await asyncio.sleep(0)
        assert script.asked == script.most_at_once == 1
        assert {user.values for user in users} == {("192.0.2.1",)}
        late = book.watch(Wanted("a.test"), 30, lambda: told.append(-1))
        assert late.tried and late.values == ("192.0.2.1",)
        for user in [*users, late]:
            user.stop()

    run(test)


def test_what_was_known_is_there_for_the_next_user() -> None:
    async def test() -> None:
        script = Script(Answer(("192.0.2.1",), 60), Unanswered("no answer in time"))
        known = asyncio.Event()
        book = Book(asyncio.get_running_loop(), script)
        first = book.watch(Wanted("a.test"), 30, known.set)
        await known.wait()
        first.stop()
        second = book.watch(Wanted("a.test"), 30, lambda: None)
        while script.asked < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert second.values == ("192.0.2.1",)
        second.stop()

    run(test)


def test_names_nobody_uses_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(books, "MAX_IDLE", 3)
        book = Book(asyncio.get_running_loop(), Script(Missing("NXDOMAIN")))
        for number in range(20):
            book.watch(Wanted(f"{number}.test"), 30, lambda: None).stop()
        assert len(book._watches) == 3

    run(test)


def test_the_same_of_too_many_are_chosen_whatever_their_order() -> None:
    addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(1000)]
    kept = chosen(addresses, 256)
    assert len(kept) == 256 == len(set(kept)) and set(kept) <= set(addresses)
    assert chosen(addresses[::-1] * 2, 256) == kept
    fewer = [address for address in addresses if address != kept[0]]
    assert len(set(chosen(fewer, 256)) - set(kept)) == 1  # one goes, one comes, 255 keep their connections
    assert chosen(["b", "a", "b"], 256) == ("a", "b")


def test_priorities_and_weights_of_services() -> None:
    targets = targets_of_services([Service(10, 65535, 1, "a"), Service(10, 0, 2, "b"), Service(20, 60, 3, "c")])
    assert [(target.address.host, target.weight, target.priority) for target in targets] == [("b", 1, 10), ("a", 256, 10), ("c", 1, 20)]

    def hosts(**addresses: tuple[str, ...]) -> list[str]:
        return [str(found.address) for found in merge(targets, addresses)]

    assert hosts(a=("192.0.2.1",), b=("192.0.2.1", "192.0.2.2"), c=("192.0.2.3",)) == ["192.0.2.1:2", "192.0.2.2:2", "192.0.2.1:1"]
    assert hosts(c=("192.0.2.3",)) == ["192.0.2.3:3"]
    assert hosts() == []


def test_an_address_found_twice_is_one_endpoint() -> None:
    targets = [Target(Address("192.0.2.1", 80), 3), Target(Address("a.test", 80), 5), Target(Address("b.test", 80))]
    found = merge(targets, {"a.test": ("192.0.2.1", "192.0.2.2"), "b.test": ("192.0.2.2",)})
    assert [(str(each.address), each.weight, each.host) for each in found] == [
        ("192.0.2.1:80", 3, "192.0.2.1:80"), ("192.0.2.2:80", 5, "a.test:80")
    ]


def test_addresses_that_lead_nowhere_are_left_out() -> None:
    assert usable(["0.0.0.0", "224.0.0.1", "255.255.255.255", "127.0.0.1", "ff02::1", "::"]) == ("127.0.0.1",)
    with pytest.raises(Missing):
        usable(["0.0.0.0"])


def test_names_of_this_machine_are_not_asked_of_name_servers(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n192.0.2.1\tLedger.Bank.test alias # not.this\n")
    file = HostsFile(hosts)
    assert "ledger.bank.test" in file and "alias" in file and "not.this" not in file
    lookups = Lookups(file)
    local = {name: lookups._is_local(Wanted(name)) for name in ("pay", "localhost", "printer.local", "ledger.bank.test", "pay.bank.test")}
    assert local == {"pay": True, "localhost": True, "printer.local": True, "ledger.bank.test": True, "pay.bank.test": False}
    asked = {name: lookups._is_local(Wanted(name, resolver="127.0.0.1:53")) for name in ("pay", "ledger.bank.test", "localhost")}
    assert asked == {"pay": False, "ledger.bank.test": False, "localhost": True}
    hosts.write_text("192.0.2.1 other.bank.test\n")
    assert "ledger.bank.test" not in file and "other.bank.test" in file


class Clock:
    """A loop of which only the time is asked."""

    now = 100.0

    def time(self) -> float:
        return self.now


def test_what_is_looked_at_in_turns_shares_them() -> None:
    clock = Clock()
    book = Book(clock)  # type: ignore[arg-type]
    first = clock.now + book.until_look(1.0)
    for _ in range(40):
        clock.now += 0.37
        wait = book.until_look(1.0)
        assert 0.1 < wait <= 1.1
        turns = clock.now + wait - first
        assert turns == pytest.approx(round(turns), abs=1e-6)
