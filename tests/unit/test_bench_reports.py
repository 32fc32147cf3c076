"""The histogram's precision, and everything that reads a result: percentiles, comparisons, objectives, recommendations."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway._speedups.load import LatencyHistogram, Load
from gateway.bench.chart import decades, linear, svg
from gateway.bench.compare import Rule, differences
from gateway.bench.formats import hgrm, read_json
from gateway.bench.percentiles import duration, needed, summary
from gateway.bench.runner import judge
from gateway.bench.settings import Allowance, Settings, TlsOptions, UsageError, seconds, statuses
from gateway.bench.sweep import Count, Objective, Point, efficiency, recommend
from gateway.cli import main

TOP = 2**37


@given(st.lists(st.integers(0, TOP - 1), min_size=1, max_size=200), st.floats(0, 1))
def test_a_percentile_is_right_to_a_thousandth(values: list[int], q: float) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    exact = sorted(values)[max(0, math.ceil(q * len(values) * (1 - 1e-12)) - 1)]
    assert exact <= histogram.value_at(q) <= exact + exact / 1000
    assert (histogram.minimum, histogram.maximum, histogram.count) == (min(values), max(values), len(values))
    filled = histogram.filled()
    assert sum(number for _, number in filled) == len(values)
    assert [top for top, _ in filled] == sorted({top for top, _ in filled})


def test_what_is_beyond_the_top_keeps_its_maximum() -> None:
    histogram = LatencyHistogram()
    for value in (1, TOP - 1, TOP, 10 * TOP, -5):
        histogram.record(value)
    assert histogram.maximum == histogram.value_at(1.0) == 10 * TOP
    assert histogram.minimum == 0 and histogram.count == 5


def test_mean_and_deviation() -> None:
    histogram = LatencyHistogram()
    assert histogram.mean == histogram.deviation == 0.0 and histogram.value_at(0.5) == 0
    for value in (2, 4, 4, 4, 5, 5, 7, 9):
        histogram.record(value)
    assert histogram.mean == 5.0 and histogram.deviation == pytest.approx(2.0)


@pytest.mark.parametrize(("count", "last"), [(19, None), (20, "p50"), (999, "p95"), (1000, "p99"), (99_999, "p99.9"), (100_000, "p99.99")])
def test_a_percentile_with_too_few_samples_is_left_out(count: int, last: str | None) -> None:
    histogram = LatencyHistogram()
    for i in range(count):
        histogram.record(i)
    known = [name for name, row in summary(histogram)["percentiles"].items() if row["us"] is not None]
    assert (known[-1] if known else None) == last
    assert needed("p99.99") == 100_000


def test_the_hgrm_file_has_the_percentile_format() -> None:
    histogram = LatencyHistogram()
    for i in range(1, 1001):
        histogram.record(i * 1_000_000)
    lines = hgrm(summary(histogram)).splitlines()
    assert lines[0].split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"] and lines[1] == ""
    value, share, seen, inverse = lines[2 + 499].split()
    assert float(value) == pytest.approx(500, rel=1e-3) and (share, seen, inverse) == ("0.500000000000", "500", "2.00")
    assert lines[-3].startswith("#[Mean    =") and "StdDeviation" in lines[-3]
    assert float(lines[-2].split("=")[1].split(",")[0]) == 1000


# -- words


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("250ms", 0.25), ("1.5s", 1.5), ("2m", 120), ("5us", 5e-6)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "5 parsecs", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError):
        seconds(text)


def test_allowances_and_statuses() -> None:
    assert not Allowance.read("3").exceeded(3, 10) and Allowance.read("3").exceeded(4, 10)
    assert not Allowance.read("1%").exceeded(10, 1000) and Allowance.read("1%").exceeded(11, 1000)
    assert statuses("2xx,404") == frozenset([*range(200, 300), 404])
    for text in ("1.5", "x"):
        with pytest.raises(UsageError):
            Allowance.read(text)
    with pytest.raises(UsageError):
        statuses("700")


def test_the_request_is_what_was_asked_for() -> None:
    settings = Settings("http://h:81/a?b=c", 1.0, method="POST", headers=(("X-A", "1"),), body=b"hi")
    head, _, body = settings.request().partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [b"POST /a?b=c HTTP/1.1", b"Host: h:81", b"X-A: 1", b"Content-Length: 2"] and body == b"hi"
    own_host = Settings("http://h:81", 1.0, headers=(("host", "other"),), keep_alive=False).request()
    assert own_host == b"GET / HTTP/1.1\r\nhost: other\r\nConnection: close\r\n\r\n"
    for headers in ((("A\r\nB", "x"),), (("A", "x\r\nB: y"),), (("Transfer-Encoding", "chunked"),)):
        with pytest.raises(UsageError):
            Settings("http://h/", 1.0, headers=headers).request()


@pytest.mark.parametrize("change", [{"host": "name"}, {"request": b""}, {"connections": 0}, {"rate": -1.0}, {"accepted": [99]}])
def test_the_generator_refuses_nonsense(change: dict[str, Any]) -> None:
    words = {"host": "127.0.0.1", "port": 1, "request": b"x", "connections": 1, "rate": 1.0, **change}
    with pytest.raises(ValueError):
        Load(**words)
    with pytest.raises(RuntimeError, match="start"):
        Load("127.0.0.1", 1, b"x", connections=1, rate=1.0).run(0)


# -- verdicts


@pytest.mark.parametrize(
    ("offered", "share", "core", "failed", "words"),
    [
        (1000, 0.995, 0.5, 0, []),
        (1000, 0.985, 0.5, 0, ["inside the window"]),
        (1000, 1.0, 0.81, 0, ["81% of its core"]),
        (1000, 1.0, 0.5, 1, ["1 of 1,000 requests failed"]),
        (1000, 0.5, 0.9, 9, ["inside", "core", "failed"]),
        (0, 0.0, 0.1, 0, ["no request"]),
    ],
)
def test_when_a_run_is_invalid(offered: int, share: float, core: float, failed: int, words: list[str]) -> None:
    reasons = judge(Settings("http://h/", 500.0), offered, share, core, failed)
    assert len(reasons) == len(words) and all(word in reason for word, reason in zip(words, reasons, strict=True))


def document(scale: float = 1.0, *, valid: bool = True, count: int = 2000, loop: str = "open", errors: float = 0.0) -> dict[str, Any]:
    histogram = LatencyHistogram()
    source = random.Random(1)
    for _ in range(count):
        histogram.record(int(source.uniform(1e6, 2e6) * scale))
    return {
        "schema": "crossway-bench-run",
        "version": 1,
        "valid": valid,
        "reasons": [] if valid else ["because"],
        "warnings": [],
        "loop": loop,
        "config": {"url": "http://h/", "method": "GET", "rate": None if loop == "closed" else 100.0, "arrivals": "constant", "connections": 1},
        "machine": {"cpu": "c", "kernel": "k", "cpus_available": 2},
        "result": {"achieved_rate": 100.0 / scale, "errors_share": errors, "server_us_per_request": 10.0 * scale},
        "latency": summary(histogram),
        "service": summary(histogram),
    }


@pytest.mark.parametrize(
    ("rule", "failed"),
    [
        ("p99>+5%", True),
        ("p99>+15%", False),
        ("p99 > 1ms", True),
        ("p99>5ms", False),
        ("p99>+100us", True),
        ("p99>+10ms", False),
        ("rate<-5%", True),
        ("rate<-20%", False),
        ("rate<95", True),
        ("cpu>+5%", True),
        ("cpu>20us", False),
        ("max>=1ms", True),
        ("errors>0", True),
        ("errors>2%", False),
        ("errors>+0.5%", True),
        ("p99.99>5s", True),  # not enough samples: a gate that cannot see must not pass
    ],
)
def test_rules(rule: str, failed: bool) -> None:
    assert Rule.read(rule).verdict(document(), document(1.1, errors=0.01))[0] is failed


@pytest.mark.parametrize("text", ["p98>1ms", "p99=1ms", "p99>5", "p99>5%", "rate>5ms", "errors>1s", "p99>+5furlongs", ""])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(UsageError):
        Rule.read(text)


def test_open_and_closed_loops_are_not_compared() -> None:
    failed, why = Rule.read("p99>+500%").verdict(document(), document(loop="closed"))
    assert failed and "closed loop" in why
    assert any("rate differs" in text for text in differences(document(), document(loop="closed")))


def spoken(cipher: str, resumed: int = 0) -> dict[str, Any]:
    made = document()
    made["result"] = {
        **made["result"],
        "tls": {"handshakes": 4, "resumed": resumed, "failures": {}, "sessions": [{"version": "TLSv1.3", "cipher": cipher, "handshakes": 4}]},
    }
    return made


def test_what_was_spoken_is_a_difference() -> None:
    assert not any("TLS" in text for text in differences(spoken("A"), spoken("A")))
    assert "TLS differs: none and TLSv1.3 A" in differences(document(), spoken("A"))
    assert "TLS differs: TLSv1.3 A and TLSv1.3 B resumed" in differences(spoken("A"), spoken("B", resumed=3))


def test_a_file_of_before_tls_was_spoken_can_still_be_compared() -> None:
    old = document()
    old["result"].pop("tls", None)
    assert not any("TLS" in text for text in differences(old, document()))


@pytest.mark.parametrize(
    ("url", "port"), [("https://bank.example/x", 443), ("https://bank.example:8443/x", 8443), ("http://bank.example/x", 80)]
)
def test_the_port_is_that_of_the_scheme(url: str, port: int) -> None:
    assert Settings(url=url, rate=1.0).address() == ("bank.example", port, url.split("/")[2], "/x")


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("http://a/", TlsOptions(insecure=True), "about https"),
        ("http://a/", TlsOptions(resume=True), "about https"),
        ("https://a/", TlsOptions(insecure=True, cacert=Path("ca")), "never used"),
        ("https://a/", TlsOptions(key=Path("k")), "without --cert"),
        ("https://a/", TlsOptions(server_name="a b"), "not a host name"),
    ],
)
def test_options_of_tls_that_contradict_themselves_are_refused(url: str, options: TlsOptions, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Settings(url=url, rate=1.0, tls=options).check()


def test_a_result_names_how_tls_was_verified_and_no_key() -> None:
    described = Settings(url="https://a/", rate=1.0, tls=TlsOptions(cert=Path("c"), key=Path("secret"))).described()
    assert described["tls"] == {
        "verify": True, "cacert": "system", "client_certificate": True, "server_name": None, "resume": False,
    }  # fmt: skip
    assert Settings(url="http://a/", rate=1.0).described()["tls"] is None


def test_compare_exits_as_its_rules_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, one in {"a": document(), "b": document(1.1), "bad": document(valid=False)}.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(one))
    a, b, bad = (str(paths[name]) for name in ("a", "b", "bad"))
    assert main(["bench", "compare", a, b]) == 0
    assert main(["bench", "compare", a, b, "--fail-if", "p99>+50%"]) == 0
    assert main(["bench", "compare", a, b, "--fail-if", "p99>+50%", "--fail-if", "p50>+5%"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  p50>+5%" in out and "ok  p99>+50%" in out
    assert main(["bench", "compare", a, bad, "--fail-if", "p99>+50%"]) == 1
    assert main(["bench", "compare", a, b, "--fail-if", "nonsense"]) == 2
    assert main(["bench", "compare", a, str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("change", [{"schema": "other"}, {"version": 2}, None])
def test_foreign_files_are_refused(tmp_path: Path, change: dict[str, Any] | None) -> None:
    path = tmp_path / "x.json"
    path.write_text("{" if change is None else json.dumps({**document(), **change}))
    with pytest.raises(UsageError):
        read_json(path)


# -- sweeps


def found(workers: int, rate: float | None, *, trusted: bool = True, connections: tuple[int, ...] = (8, 8), late: float = 0.0) -> Count:
    point = Point(rate or 10.0, rate is not None, "p99 was bad", rate or 10.0, 1.0, 2.0, 3.0, 2.0, 20.0, 0.3, connections, late)
    return Count(workers, 1e5, trusted, [point])


def test_objectives() -> None:
    objective = Objective.read("p99=5ms")
    assert (objective.name, objective.us) == ("p99", pytest.approx(5000))
    assert Objective.read("p99.9<=1s").us == pytest.approx(1e6)
    for text in ("p99", "p98=1ms", "p99=quick"):
        with pytest.raises(UsageError):
            Objective.read(text)


@pytest.mark.parametrize(
    ("counts", "conclusive", "words"),
    [
        ([found(1, 1000), found(2, 1900), found(4, 1950)], True, ["Use 2 workers", "+90%", "4 change that by +3% only"]),
        ([found(1, 1000), found(2, 1050)], True, ["Use 1 worker:", "2 change that by +5% only"]),
        ([found(1, 1000), found(2, 800, trusted=False)], False, ["Use 1 worker:", "2 CPUs", "so 2 cannot be told here"]),
        ([found(1, 1000, trusted=False)], False, ["too small to tell"]),
        ([found(1, None)], True, ["No rate held", "p99 was bad"]),
        ([found(1, None, late=0.38)], False, ["No rate held", "380 ms late", "quiet machine"]),
        ([found(1, 1000), found(2, 1900, late=0.2)], False, ["Use 2 workers", "200 ms late"]),
        ([found(1, 1000), found(2, 900, trusted=False, late=0.2)], False, ["Use 1 worker:", "so 2 cannot be told here"]),
        ([found(2, 1000, connections=(15, 1))], True, ["uneven, 1.9 times"]),
    ],
)
def test_recommendations(counts: list[Count], conclusive: bool, words: list[str]) -> None:
    told, sentence = recommend(counts, Objective("p99", 5000), 2)
    assert told is conclusive
    assert all(word in sentence for word in words), sentence


def test_efficiency_is_against_the_smallest_count() -> None:
    counts = [found(1, 1000), found(2, 1500), found(4, None)]
    assert [efficiency(counts, count) for count in counts] == [1.0, 0.75, None]


def test_charts_are_well_formed() -> None:
    chart = svg("a < b", linear("x", 950), decades("y & z", 0.2, 30), [("one", [(1.0, 0.5), (900.0, 20.0)])], ("SLO", 5.0))
    root = ElementTree.fromstring(chart)
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "SLO", "0.1", "100", "1,000"} <= set(texts)
    assert copy.copy(linear("x", 0).ticks)


@pytest.mark.parametrize(("us", "text"), [(None, "-"), (0.5, "0.50 us"), (12.34, "12.3 us"), (999, "999 us"), (5000, "5.00 ms"), (2.5e6, "2.50 s")])
def test_durations_for_people(us: float | None, text: str) -> None:
    assert duration(us) == text
