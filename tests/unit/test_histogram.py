"""Metric slots: what is observed is what is read, bucket by bucket; folding and overflow lose nothing."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from bisect import bisect_left, bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._speedups.histogram import (
    BIN_LOWS_US,
    CLASSIC_BOUNDS_US,
    COUNTER_NAMES,
    GAUGE_NAMES,
    NAMES_BYTES,
    NO_ROUTE,
    OVERFLOW,
    SLOT_BYTES,
    NameTable,
    WorkerSlot,
)


def slot() -> WorkerSlot:
    return WorkerSlot(mmap.mmap(-1, SLOT_BYTES))


def test_bins_are_log_linear() -> None:
    assert BIN_LOWS_US[:17] == (*range(16), 16) and len(BIN_LOWS_US) == 193
    assert BIN_LOWS_US[-1] == 1 << 26 and BIN_LOWS_US[1:] == tuple(sorted(set(BIN_LOWS_US[1:])))
    assert all(high - low <= low / 8 for low, high in itertools.pairwise(BIN_LOWS_US[8:]))


edges = sorted({max(0, value + d) for value in (*CLASSIC_BOUNDS_US, *BIN_LOWS_US, 1 << 40) for d in (-1, 0, 1)})


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.sampled_from(edges), st.integers(0, 1 << 63)), st.one_of(st.sampled_from(edges), st.integers(0, 1 << 63)))
def test_an_observation_lands_in_the_right_buckets(total: int, upstream: int) -> None:
    one = slot()
    one.record(5, 3, 201, total, upstream, 7, 11)
    overhead = max(0, total - upstream)
    [(route, method, status, buckets, sum_us, request, response)] = one.series()
    assert (route, method, status, sum_us, request, response) == (5, 3, 201, total, 7, 11)
    assert buckets.index(1) == bisect_left(CLASSIC_BOUNDS_US, total) and sum(buckets) == 1      # le: inclusive
    [(route, bins, overhead_bins, overhead_buckets, overhead_sum)] = one.routes()
    assert route == 5 and bins.index(1) == bisect_right(BIN_LOWS_US, total) - 1
    assert overhead_bins.index(1) == bisect_right(BIN_LOWS_US, overhead) - 1
    assert overhead_buckets.index(1) == bisect_left(CLASSIC_BOUNDS_US, overhead) and overhead_sum == overhead


def test_every_edge_of_every_bucket() -> None:
    for value in edges:
        one = slot()
        one.record(0, 0, 0, value)
        assert one.series()[0][3].index(1) == bisect_left(CLASSIC_BOUNDS_US, value), value
        assert one.routes()[0][1].index(1) == bisect_right(BIN_LOWS_US, value) - 1, value


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9), st.sampled_from([200, 201, 404, 500]), st.integers(0, 10**8))))
def test_series_are_kept_apart_and_sums_agree(observations) -> None:
    one = slot()
    expected: dict[tuple[int, int, int], list[int]] = {}
    for route, method, status, total in observations:
        one.record(route, method, status, total)
        expected.setdefault((route, method, status), []).append(total)
    assert {row[:3]: (sum(row[3]), row[4]) for row in one.series()} == {
        key: (len(values), sum(values)) for key, values in expected.items()
    }
    assert sum(sum(row[1]) for row in one.routes()) == sum(sum(row[3]) for row in one.series()) == len(observations)


def test_counters_and_gauges_by_name() -> None:
    one = slot()
    for number, name in enumerate(COUNTER_NAMES):
        one.add(name, number + 1)
    for number, name in enumerate(GAUGE_NAMES):
        one.set_gauge(name, number + 100)
    assert [one.counter(name) for name in COUNTER_NAMES] == list(range(1, len(COUNTER_NAMES) + 1))
    assert [one.gauge(name) for name in GAUGE_NAMES] == list(range(100, 100 + len(GAUGE_NAMES)))
    with pytest.raises(KeyError):
        one.counter("no such")


def test_too_many_series_go_to_one_overflow_series() -> None:
    one = slot()
    for number in range(2100):
        one.record(number, 1, 200, 10)
    one.record(2099, 1, 200, 10)
    one.record(0, 1, 200, 10)
    rows = one.series()
    assert len(rows) == 2001 and rows[-1][0] == OVERFLOW and sum(rows[-1][3]) == 101
    assert sum(rows[0][3]) == 2
    assert len(one.routes()) == 2001 and sum(one.routes()[-1][1]) == 101
    assert one.counter("series_overflow") == 101


def test_routes_without_an_id_are_counted_too() -> None:
    one = slot()
    one.record(OVERFLOW, 1, 200, 10)
    one.record(16384, 1, 200, 10)
    assert [row[0] for row in one.series()] == [OVERFLOW] and one.counter("series_overflow") == 2


def test_absorb_adds_and_clear_forgets() -> None:
    into, other = slot(), slot()
    for number in range(30):
        into.record(number % 3, 1, 200, number * 1000, 5)
        other.record(number % 5, 1, 200, number * 777, 5)
    other.record(OVERFLOW, 1, 200, 10)
    into.add("requests", 30)
    other.add("requests", 31)
    other.set_gauge("connections", 4)
    into.absorb(other)
    assert into.counter("requests") == 61 and into.gauge("connections") == 0
    assert sum(sum(row[3]) for row in into.series()) == 61 and len(into.series()) == 6
    assert sum(sum(row[1]) for row in into.routes()) == 61
    other.clear()
    assert other.series() == [] and other.routes() == [] and other.counter("requests") == 0 and other.gauge("connections") == 0
    other.record(1, 1, 200, 10)
    assert sum(sum(row[3]) for row in other.series()) == 1


def test_a_cleared_slot_is_all_zero() -> None:
    memory = mmap.mmap(-1, SLOT_BYTES)
    one = WorkerSlot(memory)
    for number in range(2100):
        one.record(number, 1, 200, 10)
    one.set_gauge("pid", 5)
    one.clear()
    assert memory[:].count(0) == SLOT_BYTES


def test_an_idle_slot_touches_few_pages() -> None:
    memory = mmap.mmap(-1, SLOT_BYTES)
    one = WorkerSlot(memory)
    one.set_gauge("pid", 1)
    one.add("requests")
    for status in (200, 404, 503):
        one.record(3, 1, status, 100)
    start = f"{ctypes.addressof(ctypes.c_char.from_buffer(memory)):x}-"
    with open("/proc/self/smaps", encoding="ascii") as maps:
        own = maps.read().split("\n" + start)[1]
    resident_kib = int(own.split("Rss:")[1].split()[0])
    assert 0 < resident_kib <= 64


def test_places_for_tunnels_are_counted_over_all_slots_that_belong_together() -> None:
    stride = -(-SLOT_BYTES // 64) * 64
    memory = mmap.mmap(-1, 3 * stride)
    one, two, other = (WorkerSlot(memory, index * stride) for index in range(3))
    for slot in (one, two):
        slot.join(0, stride, 2)
    assert [one.take_tunnel(7, 3), two.take_tunnel(7, 3), one.take_tunnel(7, 3)] == [True] * 3
    assert not two.take_tunnel(7, 3) and not one.take_tunnel(7, 3)
    assert two.take_tunnel(8, 3) and other.take_tunnel(7, 3)        # another route; a slot of its own
    assert (one.tunnels(), two.tunnels()) == ([(7, 2)], [(7, 1), (8, 1)])
    one.give_tunnel(7)
    assert two.take_tunnel(7, 3) and not two.take_tunnel(7, 3)
    two.clear()                                                     # its worker was killed
    assert two.tunnels() == [] and one.take_tunnel(7, 2) and not one.take_tunnel(7, 2)
    assert one.take_tunnel(OVERFLOW, 1) and not two.take_tunnel(OVERFLOW, 1)
    assert one.tunnels()[-1] == (OVERFLOW, 1)
    with pytest.raises(ValueError, match="do not lie in the buffer"):
        one.join(0, stride, 4)


def test_geometry_is_checked() -> None:
    memory = mmap.mmap(-1, SLOT_BYTES)
    for offset in (64, -64):
        with pytest.raises(ValueError):
            WorkerSlot(memory, offset)
    with pytest.raises(BufferError):
        WorkerSlot(bytes(SLOT_BYTES))
    with pytest.raises(ValueError):
        NameTable(mmap.mmap(-1, 4096))


def test_the_buffer_is_held_while_the_slot_lives() -> None:
    memory = mmap.mmap(-1, SLOT_BYTES)
    one = WorkerSlot(memory)
    with pytest.raises(BufferError):
        memory.close()
    del one
    memory.close()


def test_names_keep_their_ids() -> None:
    memory = mmap.mmap(-1, NAMES_BYTES)
    names = NameTable(memory)
    assert names.name(NO_ROUTE) == "" and len(names) == 1
    assert [names.add(name) for name in ("a", "bé", "a", "")] == [1, 2, 1, 0]
    reader = NameTable(memory)
    assert [reader.name(number) for number in range(3)] == ["", "a", "bé"]
    assert names.add("c") == 3 and reader.find("c") == 3 and reader.find("d") is None
    with pytest.raises(IndexError):
        reader.name(4)
    long = names.add("é" * 1000)
    assert names.name(long).endswith("é...") and names.add("é" * 1000) == long


def test_names_run_out_into_overflow() -> None:
    names = NameTable(mmap.mmap(-1, NAMES_BYTES))
    numbers = [names.add(f"r{n}") for n in range(16384)]
    assert numbers == [*range(1, 16384), OVERFLOW]
    assert names.add("r5") == 6
    crowded = NameTable(mmap.mmap(-1, NAMES_BYTES))
    given_ids = [crowded.add(f"{n:01000d}") for n in range(1100)]
    assert given_ids[-1] == OVERFLOW and given_ids.count(OVERFLOW) == 1100 - (1 << 20) // 1000
