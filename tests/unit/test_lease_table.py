"""Leases in shared memory, on a clock of the test's own: each token is spent once, by whichever process; sizes follow demand."""

from __future__ import annotations

import mmap
import os
import random

import pytest

from gateway._speedups.lease_table import MAX_LEASE, LeaseTable
from gateway.policies.leases import IDLE, LIFE, LOCK, QUICK, SLOW, QuotaFigures, RateFigures, next_size

KEY = 0x1234_5678_9ABC_DEF1
NOW = 5_000_000_000


def table(slots: int = 64) -> LeaseTable:
    return LeaseTable(mmap.mmap(-1, LeaseTable.size_for(slots)), 0, slots)


def leased(made: LeaseTable, tokens: int, *, key: int = KEY, now: int = NOW, kept: bool = True, left: int = 0) -> int:
    claimed = made.begin(key, now, LOCK)
    assert claimed is not None
    assert made.enter(claimed[0], key, now, tokens, now + LIFE, kept, left, now + 7 * LIFE)
    made.end(claimed[0], now + LOCK)
    return claimed[0]


def spend(made: LeaseTable, now: int = NOW, key: int = KEY) -> int:
    return made.take_key(key, now)[0]


def test_each_token_is_spent_once_and_not_after_its_time() -> None:
    made = table()
    assert spend(made) == -1
    leased(made, 3)
    assert [spend(made) for _ in range(4)] == [1, 1, 1, -1]
    leased(made, 3)
    assert spend(made, NOW + LIFE - 16) == 1
    assert spend(made, NOW + LIFE) == -1, "a lease was spent after its end"
    assert spend(made, NOW + LIFE - 16) == 1, "the clock of another worker may be behind: the lease still lived then"


def test_another_key_has_nothing_of_it() -> None:
    made = table()
    leased(made, 3)
    assert spend(made, key=KEY + 1) == -1
    assert spend(made, key=KEY ^ 1 << 63) == -1


def test_the_next_lease_is_wanted_at_half_by_one_only() -> None:
    made = table()
    leased(made, 8)
    assert [made.take_key(KEY, NOW)[3] for _ in range(4)] == [False, False, False, True]
    claimed = made.begin(KEY, NOW, LOCK)
    assert claimed is not None and claimed[1] == 4 and claimed[3] == 8
    assert made.take_key(KEY, NOW)[3] is False, "somebody is at work on it"
    assert made.begin(KEY, NOW, LOCK) is None
    made.end(claimed[0], NOW + LOCK)
    assert made.take_key(KEY, NOW)[3] is True


def test_a_lease_of_one_is_not_followed_by_another_unasked() -> None:
    made = table()
    leased(made, 1)
    assert made.take_key(KEY, NOW) == (1, 0, 7 * LIFE, False)


def test_the_lock_of_a_dead_worker_runs_out_and_what_it_brings_late_is_dead() -> None:
    made = table()
    claimed = made.begin(KEY, NOW, LOCK)
    assert claimed is not None
    assert made.begin(KEY, NOW + LOCK - 1, LOCK) is None
    again = made.begin(KEY, NOW + LOCK, LOCK)
    assert again is not None
    assert not made.enter(claimed[0], KEY, NOW + LOCK, 5, NOW + LIFE, True, 0, 0)
    made.end(claimed[0], NOW + LOCK)            # the late one's: it must not open the other's
    assert made.begin(KEY, NOW + LOCK + 1, LOCK) is None
    assert spend(made, NOW + LOCK) == -1


def test_what_is_unspent_is_kept_or_dropped_as_redis_says() -> None:
    made = table()
    leased(made, 4)
    leased(made, 2)
    assert made.held(NOW) == 6
    leased(made, 3, kept=False)
    assert made.held(NOW) == 3


def test_a_refusal_stands_until_its_time_unless_there_are_tokens() -> None:
    made = table()
    leased(made, 0)
    assert made.refuse(KEY, NOW, NOW + 5000, NOW + 9000)
    status, remaining, wait, _ = made.take_key(KEY, NOW)
    assert (status, remaining) == (0, 0) and 8990 <= wait <= 9016
    assert spend(made, NOW + 4990) == 0
    assert spend(made, NOW + 5016) == -1
    leased(made, 2)
    assert not made.refuse(KEY, NOW, NOW + 5000, NOW + 5000)
    assert spend(made) == 1


def test_tokens_that_are_taken_out_cannot_be_spent() -> None:
    made = table()
    number = leased(made, 7)
    assert spend(made) == 1
    assert made.empty(number, KEY, NOW) == 6
    assert spend(made) == -1
    assert made.empty(number, KEY, NOW) == 0
    assert made.empty(number, KEY + 1, NOW) == 0


def test_a_full_set_leases_nothing_and_counts_it() -> None:
    made = table(8)                             # one set: every key lies in it
    for key in range(1, 9):
        leased(made, 2, key=key)
    assert made.begin(9, NOW, LOCK) is None
    assert made.full_count == 1
    assert made.begin(9, NOW + LIFE + 16, LOCK) is not None, "dead leases make room"


def test_a_slot_of_a_lease_under_way_is_not_given_away() -> None:
    made = table(8)
    for key in range(1, 9):
        assert made.begin(key, NOW, LOCK) is not None
    assert made.begin(9, NOW, LOCK) is None


def test_a_lease_is_never_larger_than_its_word_holds() -> None:
    made = table()
    leased(made, MAX_LEASE)
    leased(made, MAX_LEASE)
    assert made.held(NOW) == MAX_LEASE


@pytest.mark.parametrize("slots", [0, 7, 12, 1 << 27])
def test_only_powers_of_two_are_sizes(slots: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        LeaseTable(mmap.mmap(-1, 4096), 0, slots)


def test_a_table_must_fit_and_lie_on_a_cache_line() -> None:
    memory = mmap.mmap(-1, 4096)
    with pytest.raises(ValueError, match="does not fit"):
        LeaseTable(memory, 0, 128)
    with pytest.raises(ValueError, match="64 bytes"):
        LeaseTable(memory, 8, 8)
    with pytest.raises(IndexError):
        LeaseTable(memory, 0, 8).granted_at(8)


def test_processes_spend_no_token_twice() -> None:
    """Four processes spend and fetch over one set of slots; what they admitted is what was entered, less what is left."""
    memory = mmap.mmap(-1, LeaseTable.size_for(8) + 4096)
    pids = []
    for child in range(4):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                made, chance = LeaseTable(memory, 0, 8), random.Random(child)
                spent = entered = 0
                claimed = None
                for turn in range(30_000):
                    key = chance.randint(1, 3)
                    kind = chance.random()
                    if kind < 0.05:
                        amount, claimed = chance.randint(1, 50), made.begin(key, NOW + turn, 100_000)
                        if claimed is None:
                            continue
                        if made.enter(claimed[0], key, NOW + turn, amount, NOW + 10**7, True, 0, 0):
                            entered += amount
                        made.end(claimed[0], NOW + turn + 100_000)
                    elif kind < 0.07 and claimed is not None:
                        entered -= made.empty(claimed[0], key, NOW)
                    else:
                        spent += made.take_key(key, NOW + turn)[0] == 1
                start = LeaseTable.size_for(8) + child * 16
                memory[start:start + 16] = spent.to_bytes(8, "little") + entered.to_bytes(8, "little", signed=True)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    start = LeaseTable.size_for(8)
    spent = sum(int.from_bytes(memory[start + n * 16:start + n * 16 + 8], "little") for n in range(4))
    entered = sum(int.from_bytes(memory[start + n * 16 + 8:start + n * 16 + 16], "little", signed=True) for n in range(4))
    assert spent > 10_000
    assert spent + LeaseTable(memory, 0, 8).held(NOW) == entered


# -- sizes


def test_a_lease_grows_with_demand_and_shrinks_without() -> None:
    assert next_size(0, 0, NOW, 100) == 0, "nothing is known of the caller"
    assert next_size(50, NOW - LIFE, NOW, 100) == 0, "nor lately"
    assert next_size(0, NOW - 1, NOW, 100) == 2
    assert next_size(8, NOW - QUICK + 1, NOW, 100) == 16
    assert next_size(80, NOW - 1, NOW, 100) == 100
    assert next_size(8, NOW - QUICK, NOW, 100) == 8
    assert next_size(8, NOW - SLOW - 1, NOW, 100) == 4
    assert next_size(2, NOW - SLOW - 1, NOW, 100) == 2
    assert next_size(0, NOW - 1, NOW, 1) == 0, "too little may be held"


@pytest.mark.parametrize(
    ("count", "period", "burst", "most"), [(100, 1.0, 100, 20), (100, 1.0, 40, 10), (9, 1.0, 100, 1), (10**6, 1.0, 10**9, 200_000)]
)
def test_the_largest_lease_is_a_quarter_of_the_burst_or_200_ms_of_the_rate(count: int, period: float, burst: int, most: int) -> None:
    assert RateFigures.largest(count, period, burst) == most


def test_the_largest_lease_of_a_quota_is_a_hundredth() -> None:
    assert [QuotaFigures.largest(limit) for limit in (5, 199, 200, 10_000, 10**9)] == [1, 1, 2, 100, MAX_LEASE]


def test_a_lease_is_given_back_before_it_dies_and_its_lock_outlives_it() -> None:
    assert IDLE < LIFE < LOCK
