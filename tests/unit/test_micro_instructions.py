"""Instruction counts: reading callgrind's file, the table by commit, and what a new count means."""

import pytest

from benchmarks.instructions.callgrind import costs, readable_name, readable_object, top
from benchmarks.instructions.record import Row, added, comparison, dearer, read, report, write

# Callers' lines are inclusive and must not count; names are spelled out once, also inside cfn= and cob=.
FILE = """\
# callgrind format
version: 1
creator: callgrind-3.19.0
positions: line
events: Ir
summary: 1234

ob=(1) /x/gateway/_speedups/engine.cpython-311-x86_64-linux-gnu.so
fl=(1) engine.c
fn=(1) __pyx_pf_7gateway_9_speedups_6engine_6Engine_26poll
10 100
+3 20
cob=(2) /usr/lib/libc.so.6
cfi=(2) memchr.S
cfn=(2) __memchr_avx2
calls=7 0
* 70
fi=(3) inlined.h
-2 5
fe=(1)
ob=(2)
fl=(2)
fn=(2)
0 70

totals: 195
"""
ENGINE = "/x/gateway/_speedups/engine.cpython-311-x86_64-linux-gnu.so"


def a_row(
    commit: str = "aaaaaaaaaaaa", bare: float = 9800.0, edge: float = 22400.0, compiler: str = "cc 12.2.0", grpc: float | None = None
) -> Row:
    return Row(commit, "2026-01-01", bare, edge, "3.11.7", compiler, grpc=grpc)


def test_own_instructions_count_and_calls_do_not() -> None:
    assert costs(FILE.splitlines(True)) == {
        (ENGINE, "__pyx_pf_7gateway_9_speedups_6engine_6Engine_26poll"): 125,
        ("/usr/lib/libc.so.6", "__memchr_avx2"): 70,
    }


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="no events: line"):
        costs(["fn=(1) main\n", "1 2\n"])
    with pytest.raises(ValueError, match="not Ir"):
        costs(["events: Dr Ir\n"])


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("__pyx_f_7gateway_9_speedups_6engine_10Downstream_advance", "engine.Downstream.advance"),
        ("__pyx_pf_7gateway_9_speedups_6engine_6Engine_26poll", "engine.Engine.poll"),
        ("__pyx_f_7gateway_9_speedups_5http1_parse_request.constprop.0", "http1.parse_request"),
        ("cw_json_escape", "cw_json_escape"),
        ("__memcpy_avx_unaligned_erms'2", "__memcpy_avx_unaligned_erms"),
        ("__pyx_tp_new_odd", "__pyx_tp_new_odd"),
    ],
)
def test_a_symbol_is_shown_as_the_name_in_the_source(symbol: str, name: str) -> None:
    assert readable_name(symbol) == name


def test_an_object_is_shown_as_its_module() -> None:
    assert readable_object(ENGINE) == "engine"
    assert readable_object("/usr/lib/x86_64-linux-gnu/libc.so.6") == "libc"
    assert readable_object("") == "?"


def test_parts_of_one_function_are_added_up() -> None:
    found = {(ENGINE, "f.part.0"): 100, (ENGINE, "f"): 60, (ENGINE, "g"): 150}
    assert top(found, 10, 1) == [("f", "engine", 16.0)]


def test_the_table_survives_a_round_trip() -> None:
    rows = [a_row(), a_row("bbbbbbbbbbbb", 9000.5), a_row("cccccccccccc", grpc=35_727.5)]
    assert read(write(rows)) == rows
    assert read("") == []


def test_a_table_with_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="the columns must be commit, date"):
        read("commit,instructions\nx,1\n")


def test_a_commit_measured_again_has_its_last_count_at_the_end() -> None:
    rows = added([a_row("a"), a_row("b")], a_row("a", 1.0))
    assert [(row.commit, row.bare) for row in rows] == [("b", 9800.0), ("a", 1.0)]


def test_a_slower_commit_is_seen() -> None:
    said = comparison(a_row(), a_row("b", 10_290.0, 22_400.0)).splitlines()
    assert said == [
        "bare: 10,290 instructions per request, 9,800 at aaaaaaaaaaaa: 1.0500x",
        "edge: 22,400 instructions per request, 22,400 at aaaaaaaaaaaa: 1.0000x",
    ]


def test_a_scenario_that_the_last_row_lacks_is_compared_with_nothing() -> None:
    said = comparison(a_row(), a_row("b", grpc=35_000.0)).splitlines()
    assert said[2:] == ["grpc: 35,000 instructions per request; nothing is recorded yet"]
    assert dearer(a_row(), a_row("b", grpc=35_000.0), 1.03) == []
    assert dearer(a_row(grpc=30_000.0), a_row("b", grpc=35_000.0), 1.03) == ["grpc"]


def test_another_compiler_is_named_beside_the_ratio() -> None:
    assert "not comparable: aaaaaaaaaaaa was built with cc 12.2.0" in comparison(a_row(), a_row("b", compiler="cc 14.1.0"))


def test_the_first_row_has_nothing_to_be_compared_with() -> None:
    assert "nothing is recorded yet" in comparison(None, a_row())


def test_the_page_gives_each_function_its_share() -> None:
    page = report(a_row(), {"bare": [("http1.fields", "http1", 2450.0)], "edge": []})
    assert "| `http1.fields` | http1 | 2,450 | 25.0% |" in page
    assert "## edge: 22,400" in page and "## grpc" not in page


def test_a_dearer_request_is_seen_by_the_scenario_that_became_it() -> None:
    assert dearer(a_row(), a_row(bare=10_100.0, edge=22_500.0), 1.03) == ["bare"]
    assert dearer(a_row(), a_row(bare=10_090.0, edge=20_000.0), 1.03) == []


def test_counts_of_another_compiler_are_judged_by_nobody() -> None:
    assert dearer(a_row(), a_row(bare=20_000.0, compiler="cc 13.1.0"), 1.03) == []
