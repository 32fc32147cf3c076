"""Splits, canaries and mirrors before a request meets them: who goes where, what moves when weights change, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import snapshot
from gateway._speedups.shaping import Chooser, Conditions
from gateway.cli import explain, routes
from gateway.config import findings, load
from gateway.config.policies import HeaderEdits
from gateway.errors import ConfigError, Problem
from gateway.policies.mirror import Sender
from gateway.snapshot.shaping import edits
from tests.unit.test_cli_routes import answer, call

KEYS = [b"caller-%d" % number for number in range(4000)]
HEADERS = [(b"Cookie", b"a=1; session=s%3D1;empty="), (b"X-Tenant", b"north"), (b"x-tenant", b"south"), (b"cookie", b" b = 2; c=3 ")]


def within(count: int, total: int, share: float) -> bool:
    """Whether `count` of `total` is within six standard deviations of `share`."""
    return abs(count - total * share) <= 6 * (total * share * (1 - share)) ** 0.5


# -- drawing


@pytest.mark.parametrize("weights", [(90, 10), (1, 1, 1), (1, 0, 3), (1_000_000, 999_999, 1), (7,)])
def test_requests_are_drawn_by_weight(weights: tuple[int, ...]) -> None:
    chooser = Chooser([], [(str(number), weight) for number, weight in enumerate(weights)], seed=7)
    drawn = Counter(chooser.draw() for _ in range(20_000))
    for number, weight in enumerate(weights):
        assert within(drawn[number], 20_000, weight / sum(weights)), drawn


def test_a_seed_repeats_the_draws_and_none_does_not() -> None:
    def drawn(seed: int | None) -> list[int]:
        chooser = Chooser([], [("a", 1), ("b", 1)], seed=seed)
        return [chooser.draw() for _ in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_weights_that_add_up_to_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 0"):
        Chooser([], [("a", 0), ("b", 0)])


# -- sticking

weight = st.integers(0, 1000)
weights = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), weight, min_size=1, max_size=6).filter(lambda found: any(found.values()))


def homes(found: dict[str, int]) -> list[str]:
    """The split of every caller in KEYS."""
    chooser, names = Chooser([], list(found.items()), "client"), list(found)
    return [names[chooser.of_key(key)] for key in KEYS[:400]]


def test_callers_are_shared_out_by_weight() -> None:
    chooser = Chooser([], [("v1", 70), ("v2", 20), ("v3", 10)], "client")
    found = Counter(chooser.of_key(key) for key in KEYS)
    for number, percent in enumerate((70, 20, 10)):
        assert within(found[number], len(KEYS), percent / 100), found


@given(weights, st.integers(1, 50))
def test_a_caller_stays_whatever_the_order_and_the_scale(found: dict[str, int], factor: int) -> None:
    before = homes(found)
    assert homes(dict(reversed(found.items()))) == before
    assert homes({name: each * factor for name, each in found.items()}) == before
    assert all(found[name] for name in before)


@given(weights, st.data())
def test_a_change_of_one_weight_moves_callers_only_to_it_or_from_it(found: dict[str, int], data: st.DataObject) -> None:
    changed = data.draw(st.sampled_from(sorted(found)))
    after = {**found, changed: data.draw(weight)}
    if not any(after.values()):
        return
    for old, new in zip(homes(found), homes(after), strict=True):
        if old != new:
            assert (new if after[changed] > found[changed] else old) == changed


@given(weights, st.integers(1, 1000))
def test_a_new_split_takes_callers_and_moves_no_others(found: dict[str, int], share: int) -> None:
    for old, new in zip(homes(found), homes({**found, "new": share}), strict=True):
        assert new in (old, "new")


@given(weights, st.data())
def test_a_change_of_all_weights_moves_no_more_than_the_stated_bound(found: dict[str, int], data: st.DataObject) -> None:
    after = {name: data.draw(weight) for name in found}
    if not any(after.values()):
        return
    total, total_after = sum(found.values()), sum(after.values())
    needed = sum(abs(found[name] / total - after[name] / total_after) for name in found) / 2
    bound = 2 * needed / (1 + needed)
    before, now = homes(found), homes(after)
    moved = sum(old != new for old, new in zip(before, now, strict=True))
    assert moved <= bound * len(before) + 6 * (bound * (1 - bound) * len(before)) ** 0.5


def test_a_rollout_moves_no_more_callers_than_it_must() -> None:
    def beta(percent: int) -> set[bytes]:
        chooser = Chooser([], [("v1", 100 - percent), ("v2", percent)], "client")
        return {key for key in KEYS if chooser.of_key(key) == 1}

    for low, high in ((0, 1), (1, 10), (10, 50), (50, 100)):
        assert beta(low) <= beta(high)
        assert within(len(beta(high)), len(KEYS), high / 100)


@pytest.mark.parametrize(
    ("sticky", "same", "none"),
    [
        ("cookie:session", [(b"cookie", b"session=s%3D1")], [(b"cookie", b"Session=s%3D1")]),
        ("cookie:c", [(b"Cookie", b"c=3; c=4")], [(b"cookie", b"xc=3")]),
        ("header:x-tenant", [(b"X-TENANT", b"north")], [(b"x-tenants", b"north")]),
        ("header:cookie", [(b"cookie", b"a=1; session=s%3D1;empty=")], [(b"x-cookie", b"a=1")]),
    ],
)
def test_what_a_caller_is_known_by(sticky: str, same: list[tuple[bytes, bytes]], none: list[tuple[bytes, bytes]]) -> None:
    chooser = Chooser([], [(str(number), 1) for number in range(64)], sticky)
    found = chooser.explain(HEADERS)
    assert found[0] == "sticky"
    assert chooser.explain(same) == found
    assert chooser.explain(none) == ("weight", -1)


def test_an_empty_value_makes_nobody_known() -> None:
    assert Chooser([], [("a", 1), ("b", 1)], "cookie:empty").explain(HEADERS) == ("weight", -1)
    assert Chooser([], [("a", 1), ("b", 1)], "header:x-a").explain([(b"x-a", b"")]) == ("weight", -1)


def test_client_and_source() -> None:
    splits = [(str(number), 1) for number in range(64)]
    by_client = Chooser([], splits, "client")
    assert by_client.explain([], client="batch") == ("sticky", by_client.of_key(b"batch"))
    assert by_client.explain([], client="\ud800") == by_client.explain([]) == ("weight", -1)
    by_source = Chooser([], splits, "source")
    assert by_source.explain([], source="2001:db8::1") == by_source.explain([], source="2001:db8::ffff:2")
    assert len({by_source.explain([], source=f"192.0.2.{number}")[1] for number in range(100)}) > 20
    assert len({by_source.explain([], source=f"2001:db8:0:{number}::1")[1] for number in range(100)}) > 20


# -- conditions


@pytest.mark.parametrize(
    ("headers", "cookies", "holds"),
    [
        ([("x-tenant", "exact", "north")], [], True),
        ([("X-Tenant", "exact", "south")], [], True),
        ([("x-tenant", "exact", "nort")], [], False),
        ([("x-tenant", "prefix", "sou")], [], True),
        ([("x-tenant", "prefix", "southern")], [], False),
        ([("x-tenant", "present", "")], [], True),
        ([("x-tenant", "absent", "")], [], False),
        ([("x-other", "absent", "")], [], True),
        ([("x-other", "present", "")], [], False),
        ([], [("a", "exact", "1")], True),
        ([], [("A", "exact", "1")], False),
        ([], [("session", "prefix", "s%3D")], True),
        ([], [("session", "exact", "s=1")], False),
        ([], [("c", "exact", "3")], True),
        ([], [("empty", "present", "")], True),
        ([], [("empty", "exact", "")], True),
        ([], [("essio", "present", "")], False),
        ([], [("d", "absent", "")], True),
        ([], [("c", "absent", "")], False),
        ([("x-tenant", "exact", "north")], [("c", "exact", "4")], False),
        ([("x-tenant", "exact", "north")], [("c", "exact", "3"), ("a", "present", "")], True),
    ],
)
def test_a_canary_takes_what_meets_all_its_conditions(
    headers: list[tuple[str, str, str]], cookies: list[tuple[str, str, str]], holds: bool
) -> None:
    chooser = Chooser([Conditions([("x-never", "present", "")]), Conditions(headers, cookies)], [("v1", 1), ("v2", 1)], "header:x-tenant")
    assert chooser.explain(HEADERS)[0] == ("canary" if holds else "sticky")
    if holds:
        assert chooser.explain(HEADERS)[1] == 1


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "ab"]), st.text("ab01%\"", max_size=4)), max_size=8), st.sampled_from(["; ", ";", " ; ", ";;"]))
def test_cookies_are_found_as_they_were_joined(pairs: list[tuple[str, str]], between: str) -> None:
    field = between.join(f"{name}={value}" for name, value in pairs).encode()
    for name in ("a", "b", "ab"):
        for value in {"", "0", *(each for _, each in pairs)}:
            chooser = Chooser([Conditions((), [(name, "exact", value)])], [("v1", 1)])
            assert (chooser.explain([(b"cookie", field)])[0] == "canary") is ((name, value) in pairs)


# -- the configuration

HEAD = """\
version: 1
workers: 1
admin: {bind: 127.0.0.1:9900}
listeners: {public: {bind: 127.0.0.1:8080}}
upstreams:
  v1: {targets: [127.0.0.1:9001]}
  v2: {targets: [127.0.0.1:9002, 127.0.0.1:9004]}
  beta: {targets: [127.0.0.1:9003]}
  twin: {targets: [127.0.0.1:9004]}
routes:
"""
USED = "  - {name: used, match: {prefix: /used}, split: [{upstream: v1}, {upstream: v2}, {upstream: beta}, {upstream: twin}]}\n"


def write(folder: Path, *settings: str) -> Path:
    file = folder / "edge.yaml"
    file.write_text(HEAD + USED + "  - {name: pay, match: {prefix: /}, " + ", ".join(settings) + "}\n")
    return file


def problems(folder: Path, *settings: str) -> list[Problem]:
    try:
        config = load(write(folder, *settings))
        return [*findings(config), *snapshot.check(config)]
    except ConfigError as error:
        return list(error.problems)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("name: pay", "neither `upstream` nor `split`"),
        ("upstream: v1, split: [{upstream: v2}]", "both `upstream` and `split`"),
        ("split: []", "must not be empty"),
        ("split: [{upstream: v1, weight: 0}, {upstream: v2, weight: 0}]", "add up to 0"),
        ("split: [{upstream: v1, weight: -1}]", "must be at least 0"),
        ("split: [{upstream: v1}, {upstream: v1}]", "the same upstream twice"),
        ("split: [{upstream: v9}]", "unknown upstream 'v9'"),
        ("split: [{upstream: v1, request_headers: {set: {host: a}}}]", "the header host is not edited here"),
        ("upstream: v1, sticky: source", "`sticky` without a `split`"),
        ("split: [{upstream: v1}], sticky: ip", "expected what a caller is known by"),
        ("split: [{upstream: v1}], sticky: 'cookie:a b'", "not the name of a cookie"),
        ("split: [{upstream: v1}], sticky: client", "sticky by client without a policy that says who calls"),
        ("upstream: v1, canary: [{when: {}, upstream: v2}]", "neither `headers` nor `cookies`"),
        ("upstream: v1, canary: [{when: {headers: {host: a}}, upstream: v2}]", "matched by a route's `host`"),
        ("upstream: v1, canary: [{when: {headers: {a: {}}}, upstream: v2}]", "expected a value, {present: true} or {prefix: text}"),
        ("upstream: v1, canary: [{when: {headers: {a: b}}, upstream: v9}]", "unknown upstream 'v9'"),
        ("upstream: v1, mirror: {upstream: v9}", "unknown upstream 'v9'"),
        ("upstream: v1, mirror: {upstream: v1}", "an upstream of the route itself"),
        ("split: [{upstream: v1}, {upstream: v2}], mirror: {upstream: v2}", "an upstream of the route itself"),
        ("upstream: v1, canary: [{when: {headers: {a: b}}, upstream: beta}], mirror: {upstream: beta}", "an upstream of the route itself"),
        ("upstream: v2, mirror: {upstream: twin}", "an endpoint of the route's own upstream 'v2'"),
        ("upstream: v1, mirror: {upstream: v2, percent: 0}", "expected a percentage"),
        ("upstream: v1, mirror: {upstream: v2, percent: 101}", "expected a percentage"),
        ("upstream: v1, mirror: {upstream: v2, percent: nan}", "expected a percentage"),
        ("upstream: v1, mirror: {upstream: v2, body: 2MiB}", "at most 1MiB"),
        ("upstream: v1, policies: [{fault: {percent: 10}}]", "neither `delay` nor `abort`"),
        ("upstream: v1, policies: [{fault: {abort: 200}}]", "must be at least 400"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    found = [problem for problem in problems(tmp_path, settings.removeprefix("name: pay")) if problem.severity == "error"]
    assert len(found) == 1, [problem.render() for problem in found]
    assert message in found[0].message
    assert found[0].line == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("upstream: v1, canary: [{when: {headers: {a: b}}, upstream: v2}, {when: {headers: {a: b}, cookies: {c: d}}, upstream: beta}]", "takes them all before"),
        ("upstream: v1, canary: [{when: {headers: {a: {prefix: b}}}, upstream: v2}, {when: {headers: {a: bc}}, upstream: beta}]", "takes them all before"),
        ("upstream: v1, canary: [{when: {cookies: {a: {present: true}}}, upstream: v2}, {when: {cookies: {a: b}}, upstream: beta}]", "takes them all before"),
        ("upstream: v1, mirror: {upstream: v2, methods: [GET, POST]}", "POST requests are executed a second time"),
        ("upstream: v1, policies: [{fault: {abort: 503, percent: 1}}]", "faults are injected into the route 'pay'"),
    ],
)
def test_what_is_doubtful(tmp_path: Path, settings: str, message: str) -> None:
    (found,) = problems(tmp_path, settings)
    assert found.severity == "warning"
    assert message in found.message


@pytest.mark.parametrize(
    "settings",
    [
        "split: [{upstream: v1, weight: 1}, {upstream: v2, weight: 0}], sticky: source",
        "upstream: v1, canary: [{when: {headers: {a: b}, cookies: {c: d}}, upstream: v2}, {when: {headers: {a: b}}, upstream: beta}]",
        "upstream: v1, canary: [{when: {headers: {a: {present: false}}}, upstream: v2}, {when: {headers: {a: b}}, upstream: beta}]",
        "upstream: v1, canary: [{when: {headers: {a: b}}, upstream: v1, response_headers: {set: {x-canary: '1'}}}]",
        "upstream: v1, mirror: {upstream: v2, percent: 0.5}",
        "upstream: v1, mirror: {upstream: v2, percent: 10%, strip: []}",
    ],
)
def test_what_is_fine(tmp_path: Path, settings: str) -> None:
    assert problems(tmp_path, settings) == []


# -- headers


def test_what_a_split_sets_replaces_what_the_routes_policies_set() -> None:
    more = HeaderEdits(set={"x-a": "split"}, add={"x-b": "split"}, remove=("x-c",))
    found = edits([b"x-a"], [b"x-a: route\r\n", b"x-b: route\r\n", b"x-c: route\r\n"], more)
    assert found is not None
    assert found.add == b"x-b: route\r\nx-a: split\r\nx-b: split\r\n"
    assert set(found.remove) == {b"x-a", b"x-c"}
    assert edits([], []) is None


def head_for(lines: str, host: str | None = None, strip: tuple[str, ...] = ("authorization", "cookie"), address: str = "127.0.0.1") -> str:
    copy: Any = SimpleNamespace(head=f"GET /a HTTP/1.1\r\n{lines}\r\n".encode(), host=address, port=9)
    return Sender(strip=strip, host=host, timeout=1, keep=1, idle=1).edited(copy).decode()


@pytest.mark.parametrize(
    ("given", "sent"),
    [("api.bank.test", "api.bank.test-shadow"), ("api.bank.test:8443", "api.bank.test-shadow:8443"), ("[::1]:80", "[::1]:80"), ("", "")],
)
def test_a_copy_is_marked(given: str, sent: str) -> None:
    assert head_for(f"host: {given}\r\nX-A: 1\r\n") == f"GET /a HTTP/1.1\r\nhost: {sent}\r\nX-A: 1\r\nx-crossway-mirror: 1\r\n\r\n"


def test_a_copy_goes_to_the_host_that_its_upstream_asks_for() -> None:
    assert "host: shadow.test\r\n" in head_for("host: a\r\n", host="shadow.test")
    assert "host: 127.0.0.1:9\r\n" in head_for("host: a\r\n", host="")
    assert "host: [::1]:9\r\n" in head_for("host: a\r\n", host="", address="::1")


def test_a_copy_goes_without_what_is_stripped() -> None:
    lines = "host: a\r\nAuthorization: Bearer s\r\nCOOKIE: a=b\r\nexpect: 100-continue\r\nauthorization-info: x\r\n"
    assert head_for(lines) == "GET /a HTTP/1.1\r\nhost: a-shadow\r\nauthorization-info: x\r\nx-crossway-mirror: 1\r\n\r\n"
    assert "Authorization: Bearer s\r\nCOOKIE: a=b\r\n" in head_for(lines, strip=())


# -- the command line

SHAPED = (
    "split: [{upstream: v1, weight: 3}, {upstream: v2, weight: 1}]",
    "sticky: 'cookie:session'",
    "canary: [{when: {headers: {x-canary: always}, cookies: {beta: {present: true}}}, upstream: beta}]",
    "mirror: {upstream: twin, percent: 5}",
)


@pytest.fixture
def shaped(tmp_path: Path) -> Path:
    return write(tmp_path, *SHAPED[:3], "listeners: [public]")


def test_explain_says_what_decides(shaped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("explain", "GET", "/x", "-c", str(shaped))
    code, found = answer(capsys, *words)
    assert (code, found["upstream"], found["without"]) == (0, None, "cookie:session")
    assert [(each["upstream"], each["weight"]) for each in found["split"]] == [("v1", 3), ("v2", 1)]
    _, found = answer(capsys, *words, "-H", "x-canary: always", "-H", "cookie: beta=1; session=a")
    assert (found["upstream"], found["canary"]) == ("beta", ["header x-canary = always", "cookie beta present"])
    _, found = answer(capsys, *words, "-H", "cookie: session=a")
    assert found["sticky"] == "cookie:session"
    assert found["upstream"] == ("v1", "v2")[Chooser([], [("v1", 3), ("v2", 1)], "client").of_key(b"a")]
    assert call(*words) == 0
    assert "split     v1 75%   (127.0.0.1:9001)" in capsys.readouterr().out


def test_explain_takes_a_client_and_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, SHAPED[0], "sticky: source", "mirror: {upstream: beta, percent: 5}")
    words = ("explain", "GET", "/x", "-c", str(config))
    _, found = answer(capsys, *words, "--source", "192.0.2.1")
    assert found["upstream"] in ("v1", "v2")
    assert found["mirror"] == {"upstream": "beta", "percent": 5.0}
    assert answer(capsys, *words)[1]["without"] == "source"
    assert call(*words, "--source", "here") == explain.UNUSABLE


def test_routes_shows_where_requests_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, SHAPED[0], *SHAPED[1:3], "mirror: {upstream: beta2, percent: 5}")
    config.write_text(config.read_text().replace("  twin:", "  beta2: {targets: [127.0.0.1:9005]}\n  twin:"))
    _, facts = answer(capsys, "routes", "-c", str(config))
    pay = facts[1]
    assert (pay["upstream"], pay["sticky"]) == (None, "cookie:session")
    assert pay["split"] == [{"upstream": "v1", "weight": 3}, {"upstream": "v2", "weight": 1}]
    assert pay["canary"] == [{"when": ["header x-canary = always", "cookie beta present"], "upstream": "beta"}]
    assert pay["mirror"] == {"upstream": "beta2", "percent": 5.0}
    assert call("routes", "-c", str(config)) == routes.OK
    text = capsys.readouterr().out
    for each in ("v1 75%", "v2 25% (sticky by cookie:session)", "beta if header x-canary = always and cookie beta present", "beta2 gets copies, 5%"):
        assert each in text
