"""States that become garbage together with their table give back their places while the mapping is still there."""

import gc
import mmap

from gateway._speedups.upstream_table import UpstreamTable
from gateway.telemetry.shared import SharedState


def test_a_table_and_its_states_in_one_cycle_of_garbage() -> None:
    for _ in range(20):
        table: UpstreamTable = SharedState(workers=1).upstreams
        cycle: list[object] = [table.endpoint(0, "pay", "192.0.2.1:1"), table.upstream(0, "pay"), table]
        cycle.append(cycle)
        del table, cycle
        gc.collect(0)


def test_states_for_which_the_table_was_full_are_garbage_alone() -> None:
    table = UpstreamTable(mmap.mmap(-1, UpstreamTable.size_for(1, 1, 1)), 0, 1, 1, 1)
    kept = [table.endpoint(0, "pay", "192.0.2.1:1"), table.upstream(0, "pay")]
    for _ in range(20):
        cycle: list[object] = [table.endpoint(0, "pay", "192.0.2.2:1"), table.upstream(0, "other")]
        assert not any(state.shared for state in cycle)  # type: ignore[attr-defined]
        cycle.append(cycle)
        del cycle
        gc.collect(0)
    assert all(state.shared for state in kept)
