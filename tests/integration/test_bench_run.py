"""The load generator against a server that stalls on a schedule and one that answers wrongly: are its figures true?"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gateway._speedups.load import Load
from gateway.bench.runner import LATE_WARNING, CannotConnect, run
from gateway.bench.settings import Allowance, Settings
from gateway.cli import main
from tests.integration.bench_server import BenchServer
from tests.integration.processes import write_config

MANY = Allowance(100, True)


@pytest.fixture(scope="module")
def server() -> Iterator[BenchServer]:
    with BenchServer() as running:
        yield running


def short(url: str, **more: Any) -> Settings:
    return Settings(**{"url": url, "rate": 200.0, "connections": 4, "duration": 0.4, "warmup": 0.1, "timeout": 1.0, **more})


# -- coordinated omission

PERIOD, STALL = 1.0, 0.2


def analytic(q: float, period: float = PERIOD, stall: float = STALL) -> float:
    """Latency at q in seconds: the share stall/period of all arrivals waits for a time that is uniform between 0 and stall."""
    above = (1 - q) * period / stall
    return stall * max(0.0, 1 - above)


@pytest.mark.parametrize(("period", "stall", "seconds"), [(PERIOD, STALL, 4), (10.0, 1.0, 10)])
def test_a_stalling_server_looks_as_bad_as_it_is(period: float, stall: float, seconds: int) -> None:
    rate = 500.0
    with BenchServer(period, stall) as stalling:
        request = Settings(url=stalling.url(), rate=rate).request()
        load = Load("127.0.0.1", stalling.port, request, connections=8, rate=rate)
        assert load.connect() == 8
        start, end = load.start(0, seconds * 10**9)
        while not load.run(end + 10**9):
            pass
        answered = stalling.answered()
    assert load.counters()["measured"] == load.latency.count == len(answered) == rate * seconds
    # The server's own clock is the oracle: on a busy machine it stalls longer than it means to, never shorter.
    truth = sorted(at - (start + int(i * 1e9 / rate)) for i, at in enumerate(sorted(answered)))
    for q in (0.90, 0.95, 0.99):
        measured = load.latency.value_at(q) / 1e9
        assert measured == pytest.approx(truth[int(q * len(truth)) - 1] / 1e9, abs=0.03), q
        assert measured > analytic(q, period, stall) - 0.02, q
    # Eight requests are all that a stall finds under way, so the service times look fine where it hurts.
    assert load.service.value_at(0.95) / 1e9 < analytic(0.95, period, stall) / 2
    assert load.counters()["backlog_max"] >= 0.5 * stall * rate


def test_a_closed_loop_does_not_see_the_stall_and_says_so() -> None:
    with BenchServer(PERIOD, STALL) as stalling:
        closed = run(Settings(url=stalling.url(), rate=None, connections=8, duration=2.0, warmup=0.2))
    assert closed["loop"] == "closed"
    assert closed["latency"]["percentiles"]["p99"]["us"] / 1e6 < analytic(0.99) / 2
    assert any("closed loop" in warning for warning in closed["warnings"])


# -- what is counted

@pytest.mark.parametrize("path", ["/", "/chunked", "/early", "/empty", "/pieces", "/eof", "/closing", "/large"])
def test_a_good_answer_of_any_framing_is_an_answer(server: BenchServer, path: str) -> None:
    document = run(short(server.url(path), rate=100.0))
    assert document["result"]["errors_total"] == 0
    assert document["result"]["answered"] == document["result"]["requests"] == 40
    assert document["latency"]["count"] == document["service"]["count"] == 40


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/reset", "reset"), ("/short", "closed"), ("/bad", "bad"), ("/long", "bad"), ("/unavailable", "status")],
)
def test_a_wrong_answer_is_an_error_of_its_kind(server: BenchServer, path: str, kind: str) -> None:
    document = run(short(server.url(path)))
    errors = {name: number for name, number in document["result"]["errors"].items() if number}
    assert errors == {kind: 80}
    assert document["latency"]["count"] == 0
    assert not document["valid"] and any("failed" in reason for reason in document["reasons"])


def test_an_answer_that_never_comes_is_a_timeout_and_the_rest_unfinished(server: BenchServer) -> None:
    document = run(short(server.url("/never"), timeout=0.2, duration=0.5, warmup=0.0))
    errors = document["result"]["errors"]
    assert errors["timeout"] > 0 and errors["unfinished"] > 0
    assert errors["timeout"] + errors["unfinished"] == document["result"]["requests"] == 100


def test_answers_to_head_have_no_body(server: BenchServer) -> None:
    document = run(short(server.url("/head"), method="HEAD"))
    assert document["result"]["answered"] == 80


def test_a_status_can_be_accepted(server: BenchServer) -> None:
    document = run(short(server.url("/unavailable"), accepted="503"))
    assert document["result"]["errors_total"] == 0 and document["result"]["statuses"] == {"503": 80}


def test_a_large_body_is_sent_whole(server: BenchServer) -> None:
    document = run(short(server.url(), method="POST", body=bytes(3_000_000), rate=20.0))
    assert document["result"]["answered"] == document["result"]["requests"] == 8


def test_a_connection_for_each_request(server: BenchServer) -> None:
    document = run(short(server.url(), keep_alive=False))
    assert document["result"]["errors_total"] == 0
    assert document["result"]["reconnects"] >= document["result"]["answered"] == 80


def test_a_server_that_goes_away_gives_connection_errors() -> None:
    with BenchServer() as server:
        settings = short(server.url("/closing"))
        assert run(settings)["result"]["errors_total"] == 0
        server.process.kill()
        server.process.wait()
        with pytest.raises(CannotConnect, match="no connection"):
            run(settings)
        gone = run(short(server.url(), keep_alive=False))
    assert gone["result"]["errors"]["connect"] == gone["result"]["requests"] == 80


def test_poisson_arrivals_are_seeded_and_have_the_rate(server: BenchServer) -> None:
    settings = short(server.url(), rate=1000.0, poisson=True, duration=1.0, warmup=0.0, max_errors=MANY)
    first, second = run(settings), run(settings)
    other = run(short(server.url(), rate=1000.0, poisson=True, duration=1.0, warmup=0.0, seed=7, max_errors=MANY))
    assert first["result"]["requests"] == second["result"]["requests"] != other["result"]["requests"]
    assert first["result"]["requests"] == pytest.approx(1000, abs=150)


def test_the_cpu_time_of_a_watched_process_is_reported(server: BenchServer) -> None:
    document = run(short(server.url()), watch=server.process.pid)
    assert document["result"]["server_us_per_request"] > 1


# -- the command

def command(*words: str) -> int:
    return main(["bench", *words])


TIMES = ("--warmup", "100ms", "--duration", "500ms", "--connections", "4", "--quiet")


def test_a_valid_run_writes_every_file_and_exits_0(server: BenchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "hgrm", "html")}
    words = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    secret = "Authorization: Bearer very-secret"
    assert command("run", server.url(), "--rate", "100", "-H", secret, *TIMES, "--duration", "3s", *words) == 0
    document = json.loads(files["json"].read_text())
    assert document["valid"] is True and document["schema"] == "crossway-bench-run" and document["version"] == 1
    assert document["config"]["header_names"] == ["Authorization"]
    assert document["machine"]["cpu"] and document["machine"]["kernel"] == os.uname().release
    assert "300 of 300 requests" in capsys.readouterr().out
    rows = [line.split() for line in files["hgrm"].read_text().splitlines()[2:] if not line.startswith("#")]
    assert rows[-1][1:] == ["1.000000000000", "300", "inf"]
    assert [float(row[0]) for row in rows] == sorted(float(row[0]) for row in rows)
    page = files["html"].read_text()
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    assert "<svg" in page and "<script" not in page and not re.search(r'(?:src|href)=', page)
    assert not any("very-secret" in path.read_text() for path in files.values())


def test_too_high_a_rate_is_invalid_exit_3_with_files(server: BenchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    assert command("run", server.url("/never"), "--rate", "100", "--timeout", "100ms", *TIMES, "--json", str(path)) == 3
    document = json.loads(path.read_text())
    assert document["valid"] is False
    assert any("inside the window" in reason for reason in document["reasons"])
    assert "INVALID RUN" in capsys.readouterr().out


def test_errors_up_to_the_allowance_are_borne(server: BenchServer) -> None:
    base = ("run", server.url("/unavailable"), "--rate", "max", *TIMES)
    assert command(*base) == 3
    # Closed loop, so that only the errors can make it invalid or valid; its CPU share is small against a Python server.
    assert command(*base, "--max-errors", "100%") == 0


@pytest.mark.parametrize(
    "words",
    [
        ("run", "http://127.0.0.1/", "--rate", "1", "--insecure"),
        ("run", "https://127.0.0.1/", "--rate", "1", "--cacert", __file__),
        ("run", "https://127.0.0.1/", "--rate", "1", "--cacert", "/does/not/exist"),
        ("run", "https://127.0.0.1/", "--rate", "1", "--cacert", __file__, "--insecure"),
        ("run", "https://127.0.0.1/", "--rate", "1", "--key", __file__),
        ("run", "https://127.0.0.1/", "--rate", "1", "--server-name", "two names"),
        ("run", "ftp://127.0.0.1/", "--rate", "1"),
        ("run", "http://127.0.0.1/", "--rate", "fast"),
        ("run", "http://127.0.0.1/", "--rate", "0"),
        ("run", "http://127.0.0.1/", "--rate", "max", "--poisson"),
        ("run", "http://127.0.0.1/", "--rate", "1", "-H", "no colon"),
        ("run", "http://127.0.0.1/", "--rate", "1", "-H", "Content-Length: 5"),
        ("run", "http://127.0.0.1/", "--rate", "1", "--body", "/does/not/exist"),
        ("run", "http://127.0.0.1/"),
        ("sweep", "/x", "-c", "/does/not/exist", "--slo", "p99=5ms"),
        ("sweep", "/x", "-c", __file__, "--slo", "p98=5ms"),
        (),
    ],
)
def test_wrong_words_exit_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words) == 2
    assert capsys.readouterr().err


def test_no_server_exits_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert command("run", f"http://127.0.0.1:{taken.getsockname()[1]}/", "--rate", "10", *TIMES) == 1


# -- the sweep

def test_a_sweep_finds_a_rate_and_says_what_to_use(server: BenchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "edge.yaml", server.port)
    path, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
    words = ("--workers", "1", "--slo", "p50=500ms", "--rates", "100,150", "--json", str(path), "--html", str(page))
    code = command("sweep", "/x", "-c", str(config), *words, *TIMES, "--duration", "2s")
    document = json.loads(path.read_text())
    enough = document["machine"]["cpus_available"] >= 2
    [count] = document["counts"]
    # A busy machine makes the generator late, which is told and not believed.
    late = any(point["late"] > LATE_WARNING for point in count["points"])
    assert code == (0 if enough and not late else 3)
    assert [point["rate"] for point in count["points"]] == [100, 150]
    # A busy machine may fail one of them; what holds is found, and its highest is the answer.
    assert count["best"]["rate"] == max(point["rate"] for point in count["points"] if point["holds"])
    assert count["best"]["gateway_us"] > 1
    assert count["best"]["connections"] == [4] and count["best"]["imbalance"] == 1.0
    assert count["efficiency"] == 1.0
    assert ("Use 1 worker" if enough else "too small") in document["recommendation"]
    assert document["recommendation"].split(":")[0] in capsys.readouterr().out
    assert "<svg" in page.read_text()


def test_a_configuration_that_does_not_start_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text("version: 1\nroutes: []\nlisteners: 5\n")
    assert command("sweep", "/x", "-c", str(path), "--slo", "p99=5ms", *TIMES) == 1
    assert "did not start" in capsys.readouterr().err
