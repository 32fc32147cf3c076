"""The figures that the README quotes: arithmetic, refusal of bad runs, and rendering."""

import copy
import json
import os

import pytest

from benchmarks.load import arithmetic, render
from benchmarks.load.arithmetic import InvalidRun, Run
from benchmarks.load.processes import Unusable, cpu_clocks, tick_clocks
from benchmarks.load.scenarios import ANSWER, SCENARIOS, fill, template_path


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
    }
    return Run(**(values | changes))  # type: ignore[arg-type]


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


def test_the_result_is_the_median_of_the_ratios_not_the_ratio_of_the_medians() -> None:
    runs = {
        "crossway-bare": [a_run(1, 10.0), a_run(2, 30.0), a_run(3, 16.0)],
        "haproxy": [a_run(1, 20.0), a_run(2, 40.0), a_run(3, 16.0)],
    }
    (row,) = arithmetic.judge(runs)
    assert row["per_round"] == [0.5, 0.75, 1.0]
    assert (row["ratio"], row["verdict"]) == (0.75, "aim met")


@pytest.mark.parametrize(
    ("value", "required", "aim", "expected"),
    [
        (0.85, 1.0, 0.85, "aim met"),
        (0.86, 1.0, 0.85, "met"),
        (1.0, 1.0, 0.85, "met"),
        (1.01, 1.0, 0.85, "missed"),
        (1.2, 1.2, None, "met"),
        (5.0, None, None, "-"),
    ],
)
def test_verdicts(value: float, required: float | None, aim: float | None, expected: str) -> None:
    assert arithmetic.verdict(value, required, aim) == expected


def test_nothing_is_judged_without_both_sides() -> None:
    assert arithmetic.judge({"crossway-bare": [a_run(1, 10.0)], "nginx": [a_run(1, 20.0)]}) == []


def test_a_quiet_benchmark_of_five_rounds_has_no_caveats() -> None:
    assert arithmetic.caveats({"haproxy": [a_run(number, 18.0) for number in range(5)]}, clean_tree=True) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"core_busy": 2.2}, "in 5 of 5 runs other programs"),
        ({"load_busy": 4.5}, "in 5 of 5 runs other programs"),
        ({"steal": 0.5}, "hypervisor took up to 10%"),
    ],
)
def test_a_busy_machine_is_a_caveat(changes: dict[str, float], words: str) -> None:
    runs = {"haproxy": [a_run(number, 18.0, **changes) for number in range(5)]}
    (found,) = arithmetic.caveats(runs, clean_tree=True)
    assert words in found


def test_few_rounds_and_a_changed_tree_are_caveats() -> None:
    found = arithmetic.caveats({"haproxy": [a_run(1, 18.0)]}, clean_tree=False)
    assert len(found) == 2 and "only 1 rounds" in found[0] and "not in the commit" in found[1]


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
        "crossway-bare": [a_run(number, 16.0) for number in range(rounds)],
    }
    titles = {scenario.name: scenario for scenario in SCENARIOS}
    return {
        "date": "2030-01-02T03:04:05Z",
        "commit": "0123456789ab",
        "clean_tree": True,
        "machine": {"kernel": "6.1", "cpu": "a processor", "cores": 2, "virtual": True},
        "versions": dict.fromkeys(("haproxy", "nginx", "wrk", "python", "uvloop"), "1.2"),
        "options": {"rounds": rounds, "seconds": 5.0, "connections": 64},
        "configurations": {"haproxy.cfg": "abcd"},
        "scenarios": {
            name: {"title": titles[name].title, "group": titles[name].group, "baseline": titles[name].baseline}
            | arithmetic.summarise(of_one)
            for name, of_one in runs.items()
        },
        "ratios": arithmetic.judge(runs),
        "caveats": arithmetic.caveats(runs, clean_tree=True),
    }


def test_the_short_block_has_the_cost_and_the_ratio_but_not_the_verdicts() -> None:
    text = render.block(a_result(), None, full=False)
    assert "| Crossway, bare.yaml | 16.0 | 0.80 |" in text
    assert "| HAProxy, plain proxy | 20.0 | 1.00 |" in text
    assert "aim met" not in text and "Not for quoting" not in text
    assert "2-core virtual machine (a processor), Linux 6.1" in text


def test_the_full_block_has_the_spread_and_the_verdicts() -> None:
    text = render.block(a_result(), None, full=True)
    assert "| Crossway, bare.yaml | 16.0 | 0.80 | 16.0-16.0 | 20,000 | 32% | 1,000 / 3,000 | 1 |" in text
    assert "| crossway-bare / haproxy | 0.800 | <= 1.00 | <= 0.85 | aim met |" in text
    assert "`haproxy.cfg` abcd" in text


def test_memory_stands_in_both_blocks() -> None:
    base = 30 * 2**20
    row = arithmetic.memory_row(10_000, *[memory_reading(base + extra) for extra in (0, 0, 5_120_000, 10_240_000, 0)])
    row |= {
        "title": "Crossway, bare.yaml",
        "other_processes_pss": 2**20,
        "kernel_growth_both_ends": {"slab": 10_240_000},
    }
    memory = {"connections": 10_000, "configurations": {}, "programs": {"crossway-bare": row}}
    assert "| Crossway, bare.yaml | 30.0 | 0.50 | 1.00 |\n" in render.block(a_result(), memory, full=False) + "\n"
    assert "| Crossway, bare.yaml | 30.0 | 0.50 | 1.00 | 30.0 | 30.0 | 1.0 | 1.0 |" in render.block(
        a_result(), memory, full=True
    )


def test_caveats_are_printed_with_the_figures() -> None:
    assert "**Not for quoting:** only 2 rounds" in render.block(a_result(rounds=2), None, full=False)


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
    assert "only 2 rounds" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == f"{render.START}\n{render.END}\n"
    assert render.main([*command, "--preliminary"]) == 0
    assert "Not for quoting" in (tmp_path / "README.md").read_text()


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


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_scenario_has_its_file_and_a_baseline(scenario) -> None:  # type: ignore[no-untyped-def]
    assert template_path(scenario).is_file()
    assert scenario.baseline in {one.name for one in SCENARIOS}


def test_a_name_without_a_value_is_refused() -> None:
    assert fill("bind 127.0.0.1:@PORT@", {"PORT": 81}) == "bind 127.0.0.1:81"
    with pytest.raises(Unusable, match="@ORIGIN@"):
        fill("bind @PORT@ to @ORIGIN@", {"PORT": 81})
