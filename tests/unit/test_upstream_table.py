"""Slots of the table of upstreams: found again, taken over when nobody uses them, and enough when there are none."""

from __future__ import annotations

import mmap
import os

import pytest

from gateway._speedups.upstream_state import EndpointState, UpstreamState
from gateway._speedups.upstream_table import CHECKER, UpstreamTable
from tests.unit.upstream_memory import CONNECT, EJECTED, PROBE, SECOND, START, UNHEALTHY, USABLE, seen_by, send, table


def test_the_same_labels_are_the_same_slot_and_others_are_not() -> None:
    shared = table()
    upstream, (one,) = seen_by(shared, 0)
    other, (apart,) = seen_by(shared, 1, name="other")
    again, (same,) = seen_by(shared, 1)
    assert upstream.enter(1) and one.enter(1)
    assert (again.in_flight(), same.in_flight(), other.in_flight(), apart.in_flight()) == (1, 1, 0, 0)


def test_labels_are_shown_and_renewed() -> None:
    shared = table()
    kept = [shared.endpoint(0, "pay", "10.0.0.1:80", target="pay.test:80", zone="eu-1a", weight=3)]
    row = shared.endpoints(START)[0]
    assert [row[key] for key in ("upstream", "address", "target", "zone", "weight")] == [
        "pay", "10.0.0.1:80", "pay.test:80", "eu-1a", 3,
    ]
    kept.append(shared.endpoint(1, "pay", "10.0.0.1:80", target="pay.test:80", zone="eu-1b", weight=5))
    row = shared.endpoints(START)[0]
    assert (row["zone"], row["weight"]) == ("eu-1b", 5)


def test_long_names_are_cut_between_characters() -> None:
    shared = table()
    upstream = shared.upstream(0, "ü" * 300)
    row = shared.upstreams(START)[0]
    assert row["name"] == "ü" * 127 and shared.upstream(1, "ü" * 300).in_flight() == upstream.in_flight() == 0


def test_what_nobody_uses_is_not_listed_but_remembered() -> None:
    shared = table()
    upstream, endpoints = seen_by(shared, 0, 2)
    for _ in range(7):
        send(upstream, endpoints[0], CONNECT, START)
    upstream.deposit(START)
    del upstream, endpoints
    assert shared.upstreams(START) == shared.endpoints(START) == []
    _, endpoints = seen_by(shared, 1, 2)
    assert endpoints[0].availability(START) == EJECTED, "a restart of the only worker forgets nothing"
    assert shared.upstreams(START)[0]["counters"]["requests"] == 1


def test_a_slot_that_nobody_uses_is_given_to_another() -> None:
    shared = table(upstreams=2, endpoints=2)
    upstream, (first,) = seen_by(shared, 0, name="first")
    first.checked(False, START, SECOND, unhealthy=1)
    assert first.enter(5)
    del upstream, first
    second = [seen_by(shared, 0, name="second")]
    third = [seen_by(shared, 0, name="third")]
    assert {row["name"] for row in shared.upstreams(START)} == {"second", "third"}
    (upstream, (endpoint,)), _ = third[0], second
    assert endpoint.shared and endpoint.in_flight() == 0 and endpoint.availability(START) == USABLE
    assert upstream.shared and shared.full_count == 0


def test_a_long_life_of_changes_takes_no_more_places_than_it_needs() -> None:
    memory = mmap.mmap(-1, UpstreamTable.size_for(1, 4, 200))
    shared = UpstreamTable(memory, 0, 1, 4, 200)
    shared.remembered_us = -1  # forgotten at once
    held = [shared.endpoint(0, "pay", f"10.0.0.{number}:80") for number in range(20)]
    for number in range(2000):
        held[number % 20] = shared.endpoint(0, "pay", f"10.1.{number // 250}.{number % 250}:80")
        assert held[number % 20].shared
    rows = shared.endpoints(START)
    assert sorted(row["address"] for row in rows) == sorted(each.address for each in held) and shared.full_count == 0
    last = (len(memory) - UpstreamTable.size_for(1, 4, 100)) // 100 * 160  # bytes of the places behind the fortieth
    assert not any(memory[-last:]), "a place was begun although others were free to take"


def test_what_was_in_use_a_moment_ago_is_not_given_to_another() -> None:
    shared = table()
    upstream, (endpoint,) = seen_by(shared, 0)
    endpoint.checked(False, START, 60 * SECOND, unhealthy=1)
    del upstream, endpoint
    kept = [shared.endpoint(0, "other", address) for address in (f"10.2.0.{number}:80" for number in range(12))]
    _, (endpoint,) = seen_by(shared, 0)
    assert endpoint.availability(START) == UNHEALTHY and len(kept) == 12


def test_a_full_table_serves_without_sharing() -> None:
    shared = table(upstreams=1, endpoints=1)
    kept = seen_by(shared, 0)
    upstream, (one, two) = seen_by(shared, 0, 2, name="more")
    assert not (upstream.shared or one.shared or two.shared) and shared.full_count == 3
    assert upstream.enter(1) and not upstream.enter(1) and one.enter(1) and not one.enter(1)
    assert upstream.withdraw(START) and upstream.balance(START) == 99_000
    ticket = one.admit(START, PROBE)
    assert [one.report(upstream, CONNECT, ticket, START) for _ in range(7)][-1] == 1
    assert one.explain(1)["upstream"] == "more"
    assert one.availability(START) == EJECTED and two.availability(START) == USABLE
    assert [row["name"] for row in shared.upstreams(START)] == ["pay"] and kept


def test_the_checker_has_cells_of_its_own() -> None:
    shared = table(workers=1)
    _, (mine,) = seen_by(shared, 0)
    checker = shared.endpoint(CHECKER, "pay", "10.0.0.1:80")
    checker.checked(False, START, 60 * SECOND, unhealthy=1)
    assert mine.availability(START) == UNHEALTHY
    assert checker.enter(1) and mine.in_flight() == 1
    shared.bury(CHECKER)
    assert mine.in_flight() == 0 and mine.availability(START) == UNHEALTHY, "its verdict holds until it expires"
    del checker


def test_a_forked_child_does_not_give_back_what_its_parent_uses() -> None:
    shared = table()
    kept = seen_by(shared, 0)
    pid = os.fork()
    if pid == 0:
        del kept
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert [row["name"] for row in shared.upstreams(START)] == ["pay"]


@pytest.mark.parametrize("worker", [-2, 4, 1000])
def test_a_worker_that_does_not_exist_is_refused(worker: int) -> None:
    shared = table()
    for wrong in (lambda: shared.upstream(worker, "a"), lambda: shared.endpoint(worker, "a", "b"), lambda: shared.bury(worker)):
        with pytest.raises(ValueError, match="no worker"):
            wrong()
    assert shared.upstream(0, "a").shared, "the lock is free"


def test_bad_geometry_is_refused() -> None:
    for figures in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1025, 1, 1), (1, 70_000, 1)):
        with pytest.raises(ValueError, match="a table of upstreams"):
            UpstreamTable.size_for(*figures)
    size = UpstreamTable.size_for(2, 2, 2)
    memory = mmap.mmap(-1, size + 64)
    for offset in (-64, 8, 128, size):
        with pytest.raises(ValueError):
            UpstreamTable(memory, offset, 2, 2, 2)
    UpstreamTable(memory, 64, 2, 2, 2)
    with pytest.raises(ValueError, match="other figures"):
        UpstreamTable(memory, 64, 2, 2, 1)


def test_states_are_made_by_the_table_only() -> None:
    for kind in (UpstreamState, EndpointState):
        with pytest.raises(TypeError, match="made by UpstreamTable"):
            kind()
