"""The figures that the README quotes: arithmetic, refusal of bad runs, the plan of a comparison, and rendering."""

import copy
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import h2.connection
import h2.events
import pytest

from benchmarks.load import arithmetic, compare, comparison, plots, render, results
from benchmarks.load.arithmetic import FixedRun, InvalidRun, Run
from benchmarks.load.certificates import KINDS, make_certificates
from benchmarks.load.comparison import FULL, QUICK, Comparison
from benchmarks.load.processes import Unusable, cpu_clocks, pss, tick_clocks
from benchmarks.load.programs import fill
from benchmarks.load.scenarios import ANSWER, Requirement, Scenario, configuration_hash, declared, parse


def a_run(number: int, us: float, **changes: float) -> Run:
    """Return a clean run of 5 s and 100,000 requests that cost `us` microseconds each."""
    cpu = us / 10
    values: dict[str, float] = {
        "round": number,
        "requests": 100_000,
        "seconds": 5.0,
        "cpu": cpu,
        "core_busy": cpu,
        "load_cpu": 4.0,
        "load_busy": 4.0,
        "steal": 0.0,
        "processes": 1,
        "p50_us": 1000,
        "p99_us": 3000,
        "pss": 8 * 2**20,
    }
    return Run(**(values | changes))  # type: ignore[arg-type]


def a_fixed_run(number: int, p99: float | None = 2500.0) -> FixedRun:
    return FixedRun(number, 9000, 18.0, 400.0, p99, None)


def wrk_line(**changes: int) -> str:
    counts = dict.fromkeys(("connect", "read", "write", "timeout", "status"), 0)
    counts |= {"requests": 120_000, "microseconds": 5_000_000, "bytes": 1, "p50_us": 900, "p99_us": 2500} | changes
    return f"Running 5s test\n  1 threads and 64 connections\nresult {json.dumps(counts)}\n"


def test_a_run_is_cpu_over_requests() -> None:
    run = a_run(1, 16.5)
    assert run.us_per_request == pytest.approx(16.5)
    assert run.rps == pytest.approx(20_000)
    assert run.utilisation == pytest.approx(0.33)


def test_wrk_output_is_read() -> None:
    load = arithmetic.read_wrk(wrk_line())
    assert (load.requests, load.seconds, load.p50_us, load.p99_us) == (120_000, 5.0, 900, 2500)


@pytest.mark.parametrize("kind", ["connect", "read", "write", "timeout", "status"])
def test_a_single_error_makes_a_run_invalid(kind: str) -> None:
    with pytest.raises(InvalidRun, match=f"1 x {kind}"):
        arithmetic.read_wrk(wrk_line(**{kind: 1}))


def test_a_run_without_answers_is_invalid() -> None:
    with pytest.raises(InvalidRun, match="no answer"):
        arithmetic.read_wrk(wrk_line(requests=0))


def test_wrk_output_without_a_result_is_invalid() -> None:
    with pytest.raises(InvalidRun, match="unable to connect"):
        arithmetic.read_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_cpu_time_is_summed_over_the_tree() -> None:
    assert arithmetic.spent({10: 1.0, 11: 2.0}, {10: 1.5, 11: 2.25}) == pytest.approx(0.75)


def test_a_process_that_started_meanwhile_counts_from_zero() -> None:
    assert arithmetic.spent({10: 1.0}, {10: 1.5, 12: 0.25}) == pytest.approx(0.75)


def test_a_process_that_ended_meanwhile_makes_the_run_invalid() -> None:
    with pytest.raises(InvalidRun, match="process 11"):
        arithmetic.spent({10: 1.0, 11: 2.0}, {10: 1.5})


def test_clocks_must_agree_within_their_resolution() -> None:
    arithmetic.require_agreement(4.0, 3.81, processes=3)
    arithmetic.require_agreement(0.1, 0.045, processes=2)
    with pytest.raises(InvalidRun, match="clocks disagree"):
        arithmetic.require_agreement(4.0, 3.7, processes=3)


def test_both_clocks_of_this_process_advance_and_agree() -> None:
    pid = os.getpid()
    before = cpu_clocks([pid])[pid]
    sum(range(200_000))
    assert cpu_clocks([pid])[pid] > before
    assert tick_clocks([pid])[pid] == pytest.approx(cpu_clocks([pid])[pid], abs=0.05)


def test_a_process_that_does_not_exist_has_no_clock() -> None:
    assert cpu_clocks([2**22 + 1]) == {} == tick_clocks([2**22 + 1])


def test_ratios_pair_runs_of_the_same_round() -> None:
    over = [a_run(1, 20.0), a_run(2, 30.0), a_run(3, 99.0)]
    under = [a_run(2, 20.0), a_run(1, 25.0)]
    assert arithmetic.ratios(over, under) == pytest.approx([0.8, 1.5])


def open_loop(**changes: object) -> dict[str, object]:
    """Return what `crossway bench run --json` writes, as much of it as is read."""
    percentiles = {"p50": {"us": 120.0}, "p99": {"us": 900.5}, "p99.9": {"us": None}}
    document = {"valid": True, "reasons": [], "result": {"server_us_per_request": 17.5}}
    return {**document, "latency": {"percentiles": percentiles}, **changes}


def test_a_document_of_the_open_loop_is_read_and_a_percentile_of_too_few_samples_stays_unknown() -> None:
    latency = arithmetic.read_bench(open_loop())
    assert (latency.us_per_request, latency.p50_us, latency.p99_us, latency.p999_us) == (17.5, 120.0, 900.5, None)


def test_an_invalid_open_loop_run_is_refused_with_the_generators_reasons() -> None:
    with pytest.raises(InvalidRun, match="not enough; too many"):
        arithmetic.read_bench(open_loop(valid=False, reasons=["not enough", "too many"]))


def test_a_document_without_figures_is_an_invalid_run() -> None:
    with pytest.raises(InvalidRun, match="latency"):
        arithmetic.read_bench({"valid": True})


def a_cell(rps: float, load_us: float = 1.0) -> list[Run]:
    """Return the one run of a program that carries `rps`, where the load and the origin need `load_us` for a request."""
    return [a_run(1, 1.0, requests=int(rps * 5), load_cpu=rps * 5 * load_us / 1e6)]


@pytest.mark.parametrize(("rps", "rate"), [([52_446, 25_606, 12_999], 6400), ([780], 390), ([15], 7), ([], 0), ([1], 0)])
def test_the_fixed_rate_is_half_of_the_slowest_in_two_digits(rps: list[float], rate: int) -> None:
    assert arithmetic.fixed_rate([*(a_cell(one) for one in rps), []]) == rate


def test_the_fixed_rate_leaves_the_loads_core_room_too() -> None:
    # 20 us each: the core drives 50,000 a second at most, a quarter of that is offered.
    assert arithmetic.fixed_rate([a_cell(40_000, 20.0), a_cell(45_000, 19.0)]) == 12_000


CPU = Requirement("plain/crossway", "plain/haproxy", at_most=0.85)
P99 = Requirement("plain/crossway", "plain/best", at_most=1.0, figure="p99")


def test_the_result_is_the_median_of_the_ratios_not_the_ratio_of_the_medians() -> None:
    runs = {
        "plain/crossway": [a_run(1, 10.0), a_run(2, 30.0), a_run(3, 16.0)],
        "plain/haproxy": [a_run(1, 20.0), a_run(2, 40.0), a_run(3, 16.0)],
    }
    (row,) = arithmetic.judge([CPU], runs, {})
    assert row["per_round"] == [0.5, 0.75, 1.0]
    assert (row["ratio"], row["verdict"]) == (0.75, "met")


def test_latency_is_judged_against_the_best_http_program_of_the_scenario() -> None:
    fixed = {
        "plain/crossway": [a_fixed_run(1, 90.0), a_fixed_run(2, 300.0), a_fixed_run(3, 110.0)],
        "plain/haproxy": [a_fixed_run(1, 200.0)],
        "plain/envoy": [a_fixed_run(1, 100.0)],
        "plain/caddy": [a_fixed_run(1, None)],
        "plain/passthrough": [a_fixed_run(1, 10.0)],
        "token/envoy": [a_fixed_run(1, 1.0)],
    }
    (row,) = arithmetic.judge([P99], {}, fixed)
    # envoy: 90 / 100 in the round that both have; haproxy: 90 / 200.
    assert (row["ratio"], row["verdict"]) == (0.9, "met")
    fixed["plain/envoy"] += [a_fixed_run(2, 100.0), a_fixed_run(3, 100.0)]
    (row,) = arithmetic.judge([P99], {}, fixed)
    assert (row["ratio"], row["verdict"]) == (1.1, "missed")
    assert arithmetic.judge([P99], {}, {"plain/crossway": fixed["plain/crossway"]}) == []


def test_a_round_that_only_one_program_survived_does_not_count_against_it() -> None:
    fixed = {
        "plain/crossway": [a_fixed_run(4, 255.0), a_fixed_run(5, 38_600.0)],
        "plain/haproxy": [a_fixed_run(4, 418.0)],
    }
    (row,) = arithmetic.judge([P99], {}, fixed)
    assert row["ratio"] == pytest.approx(0.61, abs=0.001)


@pytest.mark.parametrize(
    ("value", "at_most", "expected"), [(0.85, 0.85, "met"), (0.86, 0.85, "missed"), (1.2, 1.2, "met"), (5.0, None, "-")]
)
def test_verdicts(value: float, at_most: float | None, expected: str) -> None:
    assert arithmetic.verdict(value, at_most) == expected


def test_nothing_is_judged_without_both_sides() -> None:
    assert arithmetic.judge([CPU], {"plain/crossway": [a_run(1, 10.0)], "plain/nginx": [a_run(1, 20.0)]}, {}) == []


DUE = {"plain/haproxy": 5}


def test_a_quiet_benchmark_with_all_its_rounds_has_no_caveats() -> None:
    runs = {"plain/haproxy": [a_run(number, 18.0) for number in range(5)]}
    assert arithmetic.caveats(runs, {}, DUE, clean_tree=True) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"core_busy": 2.2}, "in 5 of 5 runs other programs"),
        ({"load_busy": 4.5}, "in 5 of 5 runs other programs"),
        ({"steal": 0.5}, "hypervisor took 10%"),
    ],
)
def test_a_busy_machine_is_a_caveat(changes: dict[str, float], words: str) -> None:
    runs = {"plain/haproxy": [a_run(number, 18.0, **changes) for number in range(5)]}
    (found,) = arithmetic.caveats(runs, {}, DUE, clean_tree=True)
    assert words in found


def test_one_disturbed_run_among_many_is_what_medians_are_for() -> None:
    runs = {"plain/haproxy": [a_run(1, 18.0, core_busy=4.0), *(a_run(number, 18.0) for number in range(2, 20))]}
    assert arithmetic.caveats(runs, {}, DUE, clean_tree=True) == []


def test_one_cell_that_was_mostly_disturbed_is_a_caveat_among_many_quiet_ones() -> None:
    runs = {"plain/haproxy": [a_run(number, 18.0) for number in range(40)]}
    runs["token/haproxy"] = [a_run(1, 18.0, core_busy=4.0), a_run(2, 18.0, core_busy=4.0), a_run(3, 18.0)]
    (found,) = arithmetic.caveats(runs, {}, DUE, clean_tree=True)
    assert "in half of the runs of 1 cell (token/haproxy)" in found


def test_a_disturbed_run_at_the_fixed_rate_is_a_caveat_unless_the_median_outvotes_it() -> None:
    noisy, quiet = FixedRun(1, 9000, 18.0, 400.0, 9e4, None, foreign=0.4), FixedRun(2, 9000, 18.0, 400.0, 2500.0, None, foreign=0.01)
    assert arithmetic.caveats({}, {"plain/crossway": [noisy, quiet, quiet]}, {}, clean_tree=True) == []
    (found,) = arithmetic.caveats({}, {"plain/crossway": [noisy, quiet], "plain/envoy": [quiet]}, {}, clean_tree=True)
    assert "at the fixed rate, other programs used more than 3% in half of the runs of 1 cell (plain/crossway)" in found


def test_missing_rounds_and_a_changed_tree_are_caveats() -> None:
    found = arithmetic.caveats({"plain/haproxy": [a_run(1, 18.0)]}, {}, {**DUE, "plain/envoy": 5}, clean_tree=False)
    assert len(found) == 2 and "2 cells (plain/envoy, plain/haproxy) with fewer rounds" in found[0] and "not in the commit" in found[1]


def memory_reading(pss: float) -> dict[str, int]:
    return {"pss": int(pss), "rss": int(pss), "uss": int(pss)}


def test_memory_is_growth_over_the_warm_worker_and_the_worse_state_is_judged() -> None:
    base = 30 * 2**20
    readings = [memory_reading(size) for size in (base, base, base + 10_000 * 1024, base + 10_000 * 9 * 1024, base)]
    row = arithmetic.memory_row(10_000, *readings)
    assert (row["silent_kib"], row["served_kib"]) == (1.0, 9.0)
    assert (row["idle_verdict"], row["connection_verdict"]) == ("met", "missed")


def test_an_idle_worker_above_40_mib_is_missed() -> None:
    row = arithmetic.memory_row(1, *[memory_reading(40 * 2**20 + 4096)] * 5)
    assert row["idle_verdict"] == "missed"


def a_result(rounds: int = 5) -> dict[str, object]:
    runs = {
        "haproxy": [a_run(number, 20.0) for number in range(rounds)],
        "crossway": [a_run(number, 16.0, cpu=1.6, seconds=1.65, core_busy=1.6, load_busy=4.0) for number in range(rounds)],
    }
    names = {f"plain/{name}": of_one for name, of_one in runs.items()}
    fixed = {"plain/crossway": [a_fixed_run(1), a_fixed_run(2, 2700.0)]}
    cells: dict[str, object] = {name: arithmetic.summarise(of_one) for name, of_one in runs.items()}
    cells["crossway"] |= {"fixed": arithmetic.summarise_fixed(fixed["plain/crossway"])}  # type: ignore[operator]
    cells["haproxy"] |= {"fixed": {"reason": "the generator was too slow"}}  # type: ignore[operator]
    cells["caddy"] = {"reason": "it would not start"}
    return {
        "format": 2,
        "date": "2030-01-02T03:04:05Z",
        "commit": "0123456789ab",
        "clean_tree": True,
        "machine": {"kernel": "6.1", "cpu": "a processor", "cores": 2, "virtual": True},
        "versions": dict.fromkeys(("haproxy", "crossway", "wrk", "python", "uvloop"), "1.2"),
        "options": {"seconds": 2},
        "programs": {"crossway": "Crossway", "haproxy": "HAProxy", "caddy": "Caddy"},
        "configurations": {"haproxy.cfg": "abcd"},
        "scenarios": {
            "plain": {"title": "Plain", "detail": "GET", "rounds": rounds, "rate": 9000, "cells": cells},
            "token": {
                "title": "Token",
                "detail": "POST",
                "rounds": rounds,
                "rate": None,
                "cells": {"crossway": arithmetic.summarise(runs["crossway"]), "caddy": {"reason": "no JWT"}},
            },
        },
        "ratios": arithmetic.judge([CPU], names, fixed),
        "caveats": arithmetic.caveats(names, fixed, {"plain/haproxy": 5}, clean_tree=True),
        "repeated": 2,
        "pace_us": {"best": 201.04, "worst": 255.5},
    }


def test_the_short_block_has_costs_latency_and_why_a_cell_is_empty_but_not_the_verdicts() -> None:
    text = render.block(a_result(), None, full=False)
    assert "| us CPU / request | Plain | Token | p99 us, plain proxy at 9,000/s |" in text
    assert "| Crossway 1.2 | 16.0 | 16.0 | 2,600 |" in text
    assert "| HAProxy 1.2 | 20.0 | - | - |" in text
    assert "- Caddy, Token: no JWT" in text
    assert "0.85" not in text and "Not for quoting" not in text
    assert "2-core virtual machine (a processor), Linux 6.1" in text
    assert "(docs/images/benchmarks-cpu.svg)" in text
    assert "2 intervals that other programs disturbed were repeated. A fixed piece of work took 201 to 256 us" in text


def test_the_full_block_has_ranges_saturation_latency_verdicts_and_reasons() -> None:
    text = render.block(a_result(), None, full=True)
    assert "| Crossway 1.2 | 16.0 | 16.0-16.0 | 0.80 | 60,606 | 60,606-60,606 | 97% | 8.0 | 18.0 | 400 | 2,600 | - |" in text
    assert "| HAProxy 1.2 | 20.0 | 20.0-20.0 | 1.00 | >= 20,000 |" in text
    assert "- Caddy, Plain: it would not start" in text
    assert "- no latency of HAProxy: the generator was too slow" in text
    assert "| plain/crossway / plain/haproxy | 0.800 | <= 0.85 | met |" in text
    assert "`haproxy.cfg` abcd" in text and "(images/benchmarks-latency.svg)" in text


def test_a_missed_ratio_says_by_how_much() -> None:
    result = a_result()
    result["ratios"] = arithmetic.judge([replace(CPU, at_most=0.5)], {"plain/crossway": [a_run(1, 16.0)], "plain/haproxy": [a_run(1, 20.0)]}, {})
    assert "| plain/crossway / plain/haproxy | 0.800 | <= 0.50 | missed by 60.0% |" in render.block(result, None, full=True)


def test_plots_are_well_formed_and_show_what_was_measured() -> None:
    for drawn in (plots.cost_plot(a_result()), plots.latency_plot(a_result())):
        words = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]
        assert "crossway" in words and "caddy" not in words
    result = a_result()
    for one in result["scenarios"].values():  # type: ignore[attr-defined]
        one["cells"] = {"caddy": {"reason": "none"}}
    assert plots.cost_plot(result) == plots.latency_plot(result) == ""


def test_memory_stands_in_both_blocks() -> None:
    base = 30 * 2**20
    row = arithmetic.memory_row(10_000, *[memory_reading(base + extra) for extra in (0, 0, 5_120_000, 10_240_000, 0)])
    row |= {
        "title": "Crossway",
        "other_processes_pss": 2**20,
        "kernel_growth_both_ends": {"slab": 10_240_000},
    }
    memory = {"connections": 10_000, "configurations": {}, "programs": {"crossway": row}}
    assert "| Crossway | 30.0 | 0.50 | 1.00 |\n" in render.block(a_result(), memory, full=False) + "\n"
    assert "| Crossway | 30.0 | 0.50 | 1.00 | 30.0 | 30.0 | 1.0 | 1.0 |" in render.block(
        a_result(), memory, full=True
    )


def test_caveats_are_printed_with_the_figures() -> None:
    assert "**Not for quoting:** 1 cell (plain/haproxy) with fewer rounds" in render.block(a_result(rounds=2), None, full=False)


def test_only_the_text_between_the_markers_is_replaced_and_twice_is_once() -> None:
    page = f"before\n{render.START}\nold\n{render.END}\nafter\n"
    once = render.replace_between(page, "new", "page.md")
    assert once == f"before\n{render.START}\n\nnew\n\n{render.END}\nafter\n"
    assert render.replace_between(once, "new", "page.md") == once


@pytest.mark.parametrize("page", ["", render.START, f"{render.END}\n{render.START}", f"{render.START}{render.END}" * 2])
def test_a_page_without_one_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(render.Unrenderable, match="page.md"):
        render.replace_between(page, "new", "page.md")


def test_a_result_with_caveats_is_not_rendered_unasked(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "README.md").write_text(f"{render.START}\n{render.END}\n")
    (tmp_path / "r.json").write_text(json.dumps(a_result(rounds=2)))
    monkeypatch.setattr(render, "ROOT", tmp_path)
    command = [str(tmp_path / "r.json"), "--only", "README.md"]
    assert render.main(command) == 2
    assert "fewer rounds" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == f"{render.START}\n{render.END}\n"
    assert render.main([*command, "--preliminary"]) == 0
    assert "Not for quoting" in (tmp_path / "README.md").read_text()


def test_without_a_name_the_newest_result_is_rendered(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    assert render.main(["--only", "README.md"]) == 2 and "measure first" in capsys.readouterr().err
    (tmp_path / "README.md").write_text(f"{render.START}\n{render.END}\n")
    for name, date in (("a", "2031-01-02T03:04:05Z"), ("b", "2030-01-02T03:04:05Z")):
        (tmp_path / f"{name}.json").write_text(json.dumps(a_result() | {"date": date}))
    (tmp_path / "z-memory.json").write_text(json.dumps({"date": "2032-01-01T00:00:00Z", "format": 1}))
    assert render.main(["--only", "README.md"]) == 0
    assert "2031-01-02, commit" in (tmp_path / "README.md").read_text()


def test_memory_of_another_commit_is_refused(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "r.json").write_text(json.dumps(a_result()))
    (tmp_path / "r-memory.json").write_text(json.dumps({"commit": "ba9876543210", "clean_tree": True}))
    assert render.main([str(tmp_path / "r.json")]) == 2
    assert "commit ba9876543210" in capsys.readouterr().err


def test_one_bad_document_leaves_the_others_alone(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    page = f"{render.START}\n{render.END}\n"
    (tmp_path / "README.md").write_text(page)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text("no markers\n")
    (tmp_path / "r.json").write_text(json.dumps(a_result()))
    monkeypatch.setattr(render, "ROOT", tmp_path)
    assert render.main([str(tmp_path / "r.json")]) == 2
    assert (tmp_path / "README.md").read_text() == page


def test_rendering_does_not_change_the_result() -> None:
    result = a_result()
    kept = copy.deepcopy(result)
    render.block(result, None, full=True)
    assert result == kept


def test_the_answer_has_the_documented_size() -> None:
    assert len(ANSWER) == 119 and json.loads(ANSWER)["status"] == "accepted"


CATALOGUE = declared()
CELLS = [cell for scenario in CATALOGUE.scenarios.values() for cell in CATALOGUE.cells(scenario)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_cell_has_a_file_or_a_reason(cell) -> None:  # type: ignore[no-untyped-def]
    assert cell.reason or (cell.template.is_file() and len(configuration_hash(cell.template)) == 16)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.reason], ids=lambda cell: cell.name)
def test_every_configuration_fills(cell) -> None:  # type: ignore[no-untyped-def]
    names = ("DIRECTORY", "PORT", "ADMIN", "ORIGIN", "LIMIT", "ISSUER", "AUDIENCE", "SCOPE")
    names += ("SECURE", "AUTHORITY", "CERTIFICATE", "KEY", "BOTH")
    if cell.template.suffix != ".c":
        filled = fill(cell.template.read_text(), dict.fromkeys(names, "7"), cell.scenario.routes)
        assert "@@" not in filled
        # HAProxy keeps its routes in a file of their own.
        if cell.scenario.routes == 1000 and not cell.software.name.startswith("haproxy"):
            assert "resource-000" in filled and "resource-999" in filled


def test_a_name_without_a_value_is_refused() -> None:
    assert fill("bind 127.0.0.1:@PORT@", {"PORT": 81}) == "bind 127.0.0.1:81"
    with pytest.raises(Unusable, match="@ORIGIN@"):
        fill("bind @PORT@ to @ORIGIN@", {"PORT": 81})


def test_a_block_is_repeated_for_each_route() -> None:
    assert fill("a\n@@each route\n@ROUTE@;\n@@end\nb\n", {}, routes=2) == "a\n000;\n001;\nb\n"
    assert fill("a\n@@each route\n@ROUTE@;\n@@end\nb\n", {}) == "a\nb\n"


def test_the_same_paths_are_asked_for_with_one_route_and_with_a_thousand() -> None:
    one, many = CATALOGUE.scenarios["routes-1"].paths(), CATALOGUE.scenarios["routes-1000"].paths()
    assert len(one) == len(many) == len(set(many)) == 20_000
    assert {path.split("/")[2] for path in one} == {"resource-000"}
    assert len({path.split("/")[2] for path in many}) == 1000


def a_declaration(**scenario: object) -> dict[str, object]:
    return {
        "programs": {"haproxy": {"title": "HAProxy", "configurations": {"plain": "haproxy.cfg"}}},
        "scenarios": {"one": {"title": "One", "detail": "", "kind": "plain", **scenario}},
        "ratios": [],
    }


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ({"kind": "token"}, "one/haproxy has neither a configuration nor a reason"),
        ({"kind": "magic"}, "one names a kind"),
        ({"only": ["squid"]}, "a program that does not exist"),
        ({"speed": 9}, "speed"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused(scenario: dict[str, object], words: str) -> None:
    with pytest.raises(Unusable, match=words):
        parse(a_declaration(**scenario))


def test_a_ratio_of_cells_that_do_not_exist_is_refused() -> None:
    document = a_declaration() | {"ratios": [{"of": "one/haproxy", "to": "two/haproxy"}]}
    with pytest.raises(Unusable, match="two/haproxy"):
        parse(document)


def handshakes(made: int, resumed: int, **errors: int) -> dict[str, object]:
    """A closed loop of `crossway bench run` with a connection for each request."""
    row = {"us": 900.0}
    return {
        "config": {"duration_s": 2.0},
        "latency": {"percentiles": {"p50": row, "p99": {"us": None}}, "max": 1500.0},
        "result": {
            "answered": made, "errors": errors, "errors_total": sum(errors.values()),
            "tls": {"handshakes": made, "resumed": resumed, "failures": {}},
        },
    }  # fmt: skip


def test_handshakes_are_counted_when_all_are_of_the_kind_that_is_due() -> None:
    full = arithmetic.read_handshakes(handshakes(2000, 0), resumed=False)
    assert (full.requests, full.seconds, full.p50_us, full.p99_us) == (2000, 2.0, 900.0, 1500.0)
    assert arithmetic.read_handshakes(handshakes(2000, 1936), resumed=True).requests == 2000


@pytest.mark.parametrize(
    ("document", "resumed"),
    [(handshakes(2000, 1), False), (handshakes(2000, 1000), True), (handshakes(2000, 0, reset=1), False), (handshakes(0, 0), False)],
)
def test_handshakes_of_another_kind_and_errors_are_no_run(document: dict[str, object], resumed: bool) -> None:
    with pytest.raises(InvalidRun):
        arithmetic.read_handshakes(document, resumed)


H2LOAD = """\
starting benchmark...
Application protocol: h2c
Main benchmark duration is started for thread #0. Warm-up time is 0s.

finished in 2.01s, 12340.50 req/s, 1.90MB/s
requests: 24681 total, 24841 started, 24681 done, 24681 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 24683 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 3.80MB (3984588) total, 241.03KB (246812) headers (space savings 92.65%), 2.80MB (2937396) data
                     min         max         mean         sd        +/- sd
"""


def h2load(**changes: str) -> str:
    """What h2load says of 24,681 answers of 119 bytes each, and of 3 more whose last bytes did not arrive in time."""
    assert all(words in H2LOAD for words in changes)
    said = H2LOAD
    for words, others in changes.items():
        said = said.replace(words, others)
    return said


def test_h2load_output_is_read() -> None:
    load = arithmetic.read_h2load(H2LOAD, 160, 119, "h2c")
    assert (load.requests, load.seconds) == (24_681, 2.01)
    assert arithmetic.read_h2load(h2load(**{"2.01s": "987.65ms"}), 160, 119, "h2c").seconds == pytest.approx(0.98765)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"h2c": "http/1.1"}, "spoke http/1.1, not h2c"),
        ({"0 failed": "3 failed"}, "3 x failed"),
        ({"0 timeout": "1 timeout"}, "1 x timeout"),
        ({"24681 succeeded": "24680 succeeded"}, "counted errors"),
        ({"0 4xx": "9 4xx"}, "9 x 4xx"),
        ({"0 5xx": "9 5xx"}, "9 x 5xx"),
        ({"24681 done, 24681 succeeded": "0 done, 0 succeeded"}, "no answer"),
        ({"24841 started": "24842 started"}, "24681 of 24842 answers"),
        ({"(2937396) data": "(2937038) data"}, "2937038 bytes of bodies"),  # one answer had no body: of gRPC, a call that failed
        ({"(2937396) data": "(2956080) data"}, "2956080 bytes of bodies"),  # more than all that were asked for
        ({"traffic:": "trafic:"}, "did not tell its data"),
        ({"Application protocol": "Protocol"}, "did not tell its protocol"),
    ],
)
def test_a_run_of_h2load_that_is_not_wholly_right_is_no_run(changes: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRun, match=words):
        arithmetic.read_h2load(h2load(**changes), 160, 119, "h2c")


def test_a_group_is_asked_for_by_its_name_and_no_part_of_everything() -> None:
    everything = {cell.scenario.name for cell in compare.choose(CATALOGUE, "", "")}
    tls, http2 = ({cell.scenario.name for cell in compare.choose(CATALOGUE, name, "")} for name in ("tls", "http2"))
    assert tls and all(CATALOGUE.scenarios[name].group == "tls" for name in tls)
    assert http2 and all(CATALOGUE.scenarios[name].group == "http2" for name in http2)
    assert everything | tls | http2 == set(CATALOGUE.scenarios) and not everything & (tls | http2)
    assert {cell.scenario.name for cell in compare.choose(CATALOGUE, "tls-full-rsa,plain", "nginx")} == {"tls-full-rsa", "plain"}
    with pytest.raises(Unusable, match="there are: .*tls"):
        compare.choose(CATALOGUE, "tsl", "")


@pytest.mark.parametrize("scenario", [{"kind": "tls"}, {"certificate": "rsa"}, {"kind": "tls", "certificate": "dsa"}, {"group": "one"}])
def test_a_scenario_whose_certificate_or_group_cannot_be_is_refused(scenario: dict[str, str]) -> None:
    with pytest.raises(Unusable, match="certificate or its group"):
        parse(a_declaration(**scenario))


@pytest.mark.parametrize("scenario", [{"kind": "grpc"}, {"kind": "http2", "streams": -1}, {"streams": 10}])
def test_a_scenario_whose_streams_cannot_be_is_refused(scenario: dict[str, object]) -> None:
    with pytest.raises(Unusable, match="its streams cannot be"):
        parse(a_declaration(**scenario))


def test_the_certificates_are_believed_by_their_authority_alone(tmp_path: Path) -> None:
    ours, theirs = (make_certificates(folder) for folder in (tmp_path / "a", tmp_path / "b") if folder.mkdir() is None)
    for kind in KINDS:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(ours.values(kind)["BOTH"])
        for client, good in ((ours.client(), True), (theirs.client(), False)):
            for name in ("127.0.0.1", "origin.test"):
                assert shakes_hands(server, client, name) is good


def shakes_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """Whether a client believes a server, in memory."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=name), server.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return ends[0].version() == "TLSv1.3"


def test_a_group_is_rendered_between_markers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text("<!-- benchmarks:start -->\nall\n<!-- benchmarks:end -->\n<!-- benchmarks-tls:start -->\nold\n<!-- benchmarks-tls:end -->\n")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    written = render.pages({**a_result(), "group": "tls"}, None, ["README.md"])
    assert list(written) == [page]
    assert "\nall\n" in written[page] and "\nold\n" not in written[page] and "![" not in written[page]


class FakeBench:
    """Programs that start or do not, without starting anything."""

    proxy_core, load_core = 1, 0

    def __init__(self, broken: dict[str, int]) -> None:
        self.broken = broken  # program: how many of its starts fail
        self.starts: list[str] = []

    def prove(self, cell: comparison.Cell) -> None:
        pass

    @contextmanager
    def proxy(self, cell: comparison.Cell) -> Iterator[tuple[object, int]]:
        self.starts.append(cell.name)
        if self.broken.get(cell.software.name, 0) > 0:
            self.broken[cell.software.name] -= 1
            raise Unusable("it ended with status 1 before it listened:\nand this is its log")
        yield SimpleNamespace(name=cell.name, pid=os.getpid()), 1


@pytest.fixture
def compared(monkeypatch):  # type: ignore[no-untyped-def]
    """Return a function that makes a comparison of two scenarios with a fake bench."""
    monkeypatch.setattr(comparison, "missing", lambda name: "")
    monkeypatch.setattr(comparison, "open_loop_missing", lambda: "")
    monkeypatch.setattr(comparison.machine, "facts", lambda: {"clean_tree": True})
    monkeypatch.setattr(Comparison, "saturate", lambda self, number, cell, started, port: a_run(number, 18.0))
    monkeypatch.setattr(comparison, "bench_run", lambda *_: arithmetic.read_bench(open_loop()))
    # An interval of no length: its shares of a core mean nothing.
    monkeypatch.setattr(comparison.Reading, "load_since", lambda self, before: 0.0)
    monkeypatch.setattr(comparison.Reading, "foreign_since", lambda self, before: 0.0)

    def make(plan: comparison.Plan, programs: str = "haproxy,nginx", **broken: int) -> Comparison:
        chosen = compare.choose(CATALOGUE, "plain,download-16k", programs)
        return Comparison(FakeBench(broken), [SimpleNamespace(pid=os.getpid())], CATALOGUE, chosen, plan)  # type: ignore[arg-type]

    return make


def test_a_disturbed_interval_is_repeated_and_the_least_disturbed_stays(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    # The quiet run is the dearest: what decides is what other programs did, not the figure.
    taken = iter([a_run(1, 18.0, core_busy=4.0), a_run(1, 17.0, core_busy=3.0), a_run(1, 19.0)])
    monkeypatch.setattr(Comparison, "saturate", lambda self, *_: next(taken, a_run(1, 20.0)))
    under_way = compared(replace(FULL, rounds=1), programs="haproxy")
    under_way.run(lambda line: None)
    assert under_way.runs["plain/haproxy"] == [a_run(1, 19.0)]
    assert under_way.repeated == under_way.result()["repeated"] == 2


def test_without_spare_time_a_disturbed_interval_stays_and_is_a_caveat(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(Comparison, "saturate", lambda self, number, *_: a_run(number, 18.0, core_busy=4.0))
    under_way = compared(replace(FULL, spare=0), programs="haproxy")
    under_way.run(lambda line: None)
    assert under_way.repeated == 0
    assert any("other programs" in doubt for doubt in under_way.result()["caveats"])


def test_a_run_at_the_fixed_rate_that_fails_is_tried_once_more(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    answers = iter([open_loop(valid=False, reasons=["a stall"])])
    monkeypatch.setattr(comparison, "bench_run", lambda *_: arithmetic.read_bench(next(answers, open_loop())))
    under_way = compared(FULL, programs="haproxy")
    under_way.run(lambda line: None)
    assert [run.round for run in under_way.fixed["plain/haproxy"]] == [3, 4, 5]


def test_latency_is_not_taken_where_the_loads_core_is_what_is_measured(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(comparison.Reading, "load_since", lambda self, before: 0.9 * (self.at - before.at))
    under_way = compared(FULL, programs="haproxy")
    under_way.run(lambda line: None)
    assert "load and origin used 90% of their core" in under_way.result()["scenarios"]["plain"]["cells"]["haproxy"]["fixed"]["reason"]


def test_rounds_are_interleaved_and_the_last_ones_measure_latency(compared) -> None:  # type: ignore[no-untyped-def]
    under_way = compared(FULL)
    under_way.run(lambda line: None)
    assert under_way.bench.starts[:5] == [
        *("plain/haproxy", "plain/nginx", "download-16k/haproxy", "download-16k/nginx", "plain/haproxy"),
    ]
    assert {name: len(runs) for name, runs in under_way.runs.items()} == {
        "plain/haproxy": 5,
        "plain/nginx": 5,
        "download-16k/haproxy": 3,
        "download-16k/nginx": 3,
    }
    assert [run.round for run in under_way.fixed["plain/haproxy"]] == [3, 4, 5]
    assert [run.round for run in under_way.fixed["download-16k/nginx"]] == [3]
    assert under_way.rates == {"plain": 6200, "download-16k": 6200}  # a quarter of what the load drives


def test_with_one_round_latency_comes_after_it_for_the_headline_only(compared) -> None:  # type: ignore[no-untyped-def]
    under_way = compared(QUICK)
    under_way.run(lambda line: None)
    assert under_way.bench.starts[-2:] == ["plain/haproxy", "plain/nginx"] and len(under_way.bench.starts) == 6
    assert set(under_way.fixed) == {"plain/haproxy", "plain/nginx"}
    result = under_way.result()
    cell = result["scenarios"]["download-16k"]["cells"]["nginx"]
    assert cell["median_us"] == 18.0 and cell["fixed"] == {"reason": "not part of this run"}


def test_a_program_that_never_starts_leaves_reasons_and_the_others_go_on(compared) -> None:  # type: ignore[no-untyped-def]
    under_way = compared(FULL, nginx=100)
    under_way.run(lambda line: None)
    assert set(under_way.runs) == {"plain/haproxy", "download-16k/haproxy"}
    assert sum(name.endswith("nginx") for name in under_way.bench.starts) == 3
    cells = under_way.result()["scenarios"]["download-16k"]["cells"]
    assert cells["nginx"] == {"reason": "it ended with status 1 before it listened:"}


def test_a_program_that_fails_once_is_started_again(compared) -> None:  # type: ignore[no-untyped-def]
    under_way = compared(FULL, nginx=1)
    under_way.run(lambda line: None)
    assert len(under_way.runs["plain/nginx"]) == 5
    assert under_way.result()["scenarios"]["plain"]["cells"]["nginx"]["failures"] == 1


def test_the_end_of_the_time_keeps_what_was_measured_and_is_a_caveat(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    clock = iter(range(0, 100_000, 300))
    monkeypatch.setattr(comparison.time, "monotonic", lambda: next(clock))
    under_way = compared(replace(FULL, most=20 * 60))
    under_way.run(lambda line: None)
    assert under_way.ended == "the 20 minutes ended in round 2, at plain/haproxy"
    assert set(under_way.runs) == {"plain/haproxy", "plain/nginx", "download-16k/haproxy", "download-16k/nginx"}
    assert under_way.result()["caveats"][0] == under_way.ended


def test_an_interrupt_keeps_what_was_measured(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    under_way = compared(FULL)
    visits = iter(range(3))

    def saturate(*_: object) -> Run:
        if next(visits) == 2:
            raise KeyboardInterrupt
        return a_run(1, 18.0)

    monkeypatch.setattr(Comparison, "saturate", saturate)
    under_way.run(lambda line: None)
    assert under_way.ended == "interrupted" and len(under_way.runs) == 2
    assert under_way.result()["scenarios"]["download-16k"]["cells"]["nginx"] == {"reason": "interrupted"}


def test_without_an_open_loop_the_reason_stands_where_latency_would(compared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(comparison, "open_loop_missing", lambda: "no generator")
    under_way = compared(FULL)
    under_way.run(lambda line: None)
    assert under_way.result()["scenarios"]["plain"]["cells"]["nginx"]["fixed"] == {"reason": "no generator"}


def test_the_full_plan_fits_its_time_and_so_does_the_quick_one(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(comparison, "missing", lambda name: "")
    monkeypatch.setattr(comparison, "open_loop_missing", lambda: "")
    chosen = compare.choose(CATALOGUE, "", "")
    for plan in (FULL, QUICK):
        under_way = Comparison(FakeBench({}), SimpleNamespace(pid=0), CATALOGUE, chosen, plan)  # type: ignore[arg-type]
        assert under_way.estimate() < plan.most
    assert FULL.most <= 20 * 60 and QUICK.most < 5 * 60


def test_unknown_names_are_told_with_the_known_ones() -> None:
    with pytest.raises(Unusable, match="there is no squid; there are: passthrough, crossway"):
        compare.choose(CATALOGUE, "", "squid")


def test_the_memory_of_this_process_is_known_and_of_none_is_nothing() -> None:
    assert pss([os.getpid()]) > 2**20
    assert pss([2**22 + 1]) == 0


@contextmanager
def running(folder: Path, name: str, *libraries: str) -> Iterator[int]:
    """Compile one of the origins, run it, and yield its port."""
    source = Path(render.ROOT) / "benchmarks" / "load" / f"{name}.c"
    binary = folder / name
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(binary), str(source), *libraries], check=True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    process = subprocess.Popen([str(binary), str(port), ANSWER])
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Iterator[int]:  # type: ignore[no-untyped-def]
    """Run origin.c and yield its port."""
    with running(tmp_path_factory.mktemp("origin"), "origin") as port:
        yield port


@pytest.fixture(scope="module")
def streamed_origin(tmp_path_factory) -> Iterator[int]:  # type: ignore[no-untyped-def]
    """Run origin-http2.c and yield its port."""
    with running(tmp_path_factory.mktemp("origin"), "origin-http2", "-lnghttp2") as port:
        yield port


def exchange(port: int, request: bytes) -> bytes:
    """Send a request and return everything that comes back until the origin closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        sender = threading.Thread(target=connection.sendall, args=(request,))
        sender.start()
        received = b""
        while part := connection.recv(65536):
            received += part
        sender.join()
    return received


@pytest.mark.parametrize(
    "scenario",
    [CATALOGUE.scenarios[name] for name in ("plain", "download-1m", "upload-16k", "upload-1m", "token")],
    ids=lambda scenario: scenario.name,
)
def test_the_origin_answers_as_the_scenarios_expect(origin: int, scenario: Scenario) -> None:
    body = scenario.payload() or b""
    head = f"{scenario.method} {scenario.path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"\r\n" + body
    last = head.encode() + b"Connection: close\r\n\r\n" + body
    received = exchange(origin, request + last)
    first, _, rest = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n") and b"Connection: close" not in first
    assert rest.startswith(scenario.answer())
    second = rest[len(scenario.answer()) :]
    assert second.startswith(b"HTTP/1.1 200 OK\r\n") and b"Connection: close" in second
    assert second.endswith(scenario.answer())


@pytest.mark.parametrize("line", [b"Transfer-Encoding: chunked", b"Expect: 100-continue"])
def test_the_origin_refuses_what_it_was_not_made_for(origin: int, line: bytes) -> None:
    assert exchange(origin, b"POST /upload HTTP/1.1\r\n" + line + b"\r\n\r\n").startswith(b"HTTP/1.1 501 ")


def called(port: int, fields: list[tuple[str, str]], bodies: list[bytes]) -> list[tuple[dict[str, str], bytes, dict[str, str]]]:
    """Send requests on one HTTP/2 connection at a time; return the fields, the body and the trailers of each answer."""
    client = h2.connection.H2Connection()
    client.initiate_connection()
    answers: dict[int, tuple[dict[str, str], bytes, dict[str, str]]] = {}
    streams = []
    for body in bodies:
        streams.append(stream := client.get_next_available_stream_id())
        method = "POST" if body else "GET"
        head = [(":method", method), (":scheme", "http"), (":authority", "a"), (":path", "/x"), *fields]
        client.send_headers(stream, head, end_stream=not body)
        if body:
            client.send_data(stream, body, end_stream=True)
        answers[stream] = ({}, b"", {})
    ended: set[int] = set()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(client.data_to_send())
        while ended != set(streams):
            received = connection.recv(65536)
            assert received, "the origin closed the connection"
            for event in client.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    answers[event.stream_id][0].update((name.decode(), value.decode()) for name, value in event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    head_, body_, trailers = answers[event.stream_id]
                    answers[event.stream_id] = (head_, body_ + event.data, trailers)
                    client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.TrailersReceived):
                    answers[event.stream_id][2].update((name.decode(), value.decode()) for name, value in event.headers)
                elif isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id)
            connection.sendall(client.data_to_send())
    return [answers[stream] for stream in streams]


def test_the_origin_of_http2_answers_many_streams_of_one_connection(streamed_origin: int) -> None:
    for fields, body, trailers in called(streamed_origin, [], [b""] * 90):
        assert fields == {":status": "200", "content-type": "application/json", "content-length": "119"}
        assert body == CATALOGUE.scenarios["http2-upstream"].answer() and not trailers


def test_the_origin_of_http2_answers_a_call_with_its_message_and_then_its_status(streamed_origin: int) -> None:
    scenario = CATALOGUE.scenarios["grpc"]
    payload = scenario.payload() or b""
    assert payload[:5] == b"\0\0\0\0\x70" and len(payload) == 5 + 112
    calls = called(streamed_origin, [("content-type", "application/grpc"), ("te", "trailers")], [payload] * 90)
    for fields, body, trailers in calls:
        assert fields == {":status": "200", "content-type": "application/grpc"}
        assert body == scenario.answer() and trailers == {"grpc-status": "0"}


@pytest.mark.parametrize("body", [b"\0\0\0\0\x04abc", b"\0\0\0\0\x02abc", b"\1\0\0\0\x03abc", b"abc"])
def test_the_origin_of_http2_fails_a_call_whose_message_is_not_whole(streamed_origin: int, body: bytes) -> None:
    ((fields, answer, _),) = called(streamed_origin, [("content-type", "application/grpc")], [body])
    assert fields["grpc-status"] == "13" and not answer


def test_the_script_is_posix_shell_and_tells_its_options() -> None:
    script = Path(render.ROOT) / "script" / "bench"
    assert script.read_text().startswith("#!/bin/sh\n") and os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", str(script)], check=True)
    command = [sys.executable, "-m", "benchmarks.load.compare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=render.ROOT, check=True)
    assert "--quick" in done.stdout and "--scenarios" in done.stdout
