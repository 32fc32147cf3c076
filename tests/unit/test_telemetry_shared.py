"""Shared state: the layout, folding dead workers, and sums that never go back."""

from __future__ import annotations

import mmap
import os
import signal
import struct

import pytest

from gateway._speedups.lease_table import LeaseTable
from gateway._speedups.token_bucket import RateLimit
from gateway.telemetry.percentiles import bins_quantile, quantile, summary
from gateway.telemetry.shared import LEASE_SLOTS, Layout, SharedState


def test_areas_lie_apart_on_pages() -> None:
    layout = Layout(3, 64)
    offsets = [0, layout.names, layout.buckets, *(layout.slot(index) for index in range(5))]
    assert all(offset % mmap.PAGESIZE == 0 for offset in offsets) and offsets == sorted(set(offsets))
    assert offsets[-1] == layout.upstreams < layout.leases and layout.leases % mmap.PAGESIZE == 0
    assert layout.size - layout.leases == LeaseTable.size_for(LEASE_SLOTS)


@pytest.mark.parametrize("workers", [0, -1, 1025])
def test_a_bad_number_of_workers_is_refused(workers: int) -> None:
    with pytest.raises(ValueError, match="number of workers"):
        SharedState(workers)


def test_slots_out_of_range() -> None:
    shared = SharedState(2, 8)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            shared.slot(index)


def test_children_and_parent_see_the_same() -> None:
    shared = SharedState(2, 64)
    route = shared.names.add("create-payment")
    limit = RateLimit("x", 1, 1_000_000, 1)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        shared.slot(1).record(route, 3, 201, 1500)
        shared.slot(1).set_gauge("config_version", 7)
        shared.buckets.take_key(limit, b"k", 1_000_000)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert shared.slot(1).gauge("config_version") == 7
    assert shared.total().series()[0][:3] == (route, 3, 201)
    assert shared.buckets.take_key(limit, b"k", 1_000_000)[0] == 0


def test_folding_keeps_the_sum_and_drops_the_gauges() -> None:
    shared = SharedState(2, 8)
    for index in range(2):
        shared.slot(index).add("requests", 10)
        shared.slot(index).record(1, 1, 200, 500)
        shared.slot(index).set_gauge("pid", 100 + index)
    assert shared.alive() == [0, 1]
    shared.fold(0)
    shared.fold(0)
    assert shared.alive() == [1] and shared.slot(0).counter("requests") == 0
    assert shared.total().counter("requests") == 20 and shared.retired.counter("requests") == 10
    assert sum(shared.total().series()[0][3]) == 2


def test_a_reader_never_sees_the_sum_go_back_while_workers_are_folded() -> None:
    """A child reads sums all the time while the parent counts and folds."""
    shared = SharedState(2, 8)
    notes = mmap.mmap(-1, 4096)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        last = reads = 0
        while not notes[0]:
            total = shared.total()
            now = total.counter("requests")
            # Counted before the observation: a reader in between may see one observation less, never more.
            observed = sum(sum(row[3]) for row in total.series())
            if now < last or observed > now + 1:
                os._exit(1)
            last, reads = now, reads + 1
            struct.pack_into("q", notes, 8, reads)
        os._exit(0 if last else 2)
    done = 0
    while struct.unpack_from("q", notes, 8)[0] < 200 and done < 2_000_000:
        for index in range(2):
            shared.slot(index).add("requests")
            shared.slot(index).record(1, 1, 200, 500)
        if done % 5 == 0:
            shared.fold(done % 2)
        done += 1
    notes[0] = 1
    assert os.waitpid(pid, 0)[1] == 0
    assert shared.total().counter("requests") == 2 * done


def test_quantiles_are_right_to_within_a_bin() -> None:
    shared = SharedState(2, 8)
    for value in range(1, 10_001):
        shared.slot(value % 2).record(4, 1, 200, value * 10)
    for q in (0.01, 0.5, 0.9, 0.99, 1.0):
        got = quantile([shared.slot(0), shared.slot(1)], 4, q)
        assert got == pytest.approx(q * 0.1, rel=0.13)
    assert quantile([shared.slot(0)], 5, 0.5) is None
    assert bins_quantile([0] * 193, 0.5) is None
    with pytest.raises(ValueError):
        bins_quantile([1], 1.5)


def test_the_summary_of_workers_and_routes() -> None:
    shared = SharedState(3, 8)
    pay, read = shared.names.add("create-payment"), shared.names.add("read-payment")
    worker = shared.slot(1)
    worker.set_gauge("pid", 4711)
    worker.set_gauge("connections", 12)
    worker.set_gauge("cpu_us", 1_500_000)
    worker.set_gauge("config_version", 3)
    worker.add("requests", 11)
    for number in range(8):
        worker.record(pay, 3, 503 if number < 2 else 201, 1000, 900)
    worker.record(read, 1, 404, 100)
    worker.record(0, 1, 404, 100)
    shared.slot(0).record(pay, 3, 201, 1000)
    shared.fold(0)
    result = summary(shared)
    [one] = result.workers
    assert (one.index, one.pid, one.connections, one.cpu_seconds, one.config_version, one.requests) == (1, 4711, 12, 1.5, 3, 11)
    assert [(r.route, r.count, r.server_errors, r.client_errors) for r in result.routes] == [
        ("create-payment", 9, 2, 0), ("(no route)", 1, 0, 1), ("read-payment", 1, 0, 1)
    ]
    busiest = result.routes[0]
    assert busiest.error_share == pytest.approx(2 / 9)
    assert busiest.p50 == pytest.approx(0.001, rel=0.13) and busiest.overhead_p50 == pytest.approx(0.0001, rel=0.13)
