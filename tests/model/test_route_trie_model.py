"""The route trie against a naive oracle: every route is tried with regular expressions, the best by specificity wins.

Strategy: small alphabets, so that generated routes and requests collide all the time; whatever the trie answers (route,
captures, Allow, the order in which explain() lists what was tried) must be what the oracle answers, in any file order.
"""

from __future__ import annotations

import random
import re
from urllib.parse import unquote_to_bytes

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._speedups.route_trie import Route, RouteTrie
from gateway.config.conditions import Op, Triple
from gateway.snapshot.matching import RouteSpec

Headers = list[tuple[bytes, bytes]]
Asked = tuple[str, str, str, Headers, bytes]

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PURGE", "LOCK", "UNKNOWN"]
HOSTS = ["a.test", "b.a.test", "c.b.a.test", "*.a.test", "*.b.a.test", "*.test", "*"]

segment = st.sampled_from(["a", "b", "ab", "a-long-segment-of-more-than-32-bytes-", "{}", "{}"])
OPS: list[Op] = ["exact", "prefix", "present", "absent"]
condition = st.tuples(st.sampled_from(OPS), st.sampled_from(["1", "12", "x y"]))


def conditions(drawn: dict[str, tuple[Op, str]]) -> tuple[Triple, ...]:
    return tuple((name, op, "" if op in ("present", "absent") else value) for name, (op, value) in drawn.items())


@st.composite
def specs(draw: st.DrawFn) -> RouteSpec:
    parts = draw(st.lists(segment, max_size=5))
    text = "".join(f"/{{p{index}}}" if part == "{}" else f"/{part}" for index, part in enumerate(parts))
    is_prefix = draw(st.booleans())
    if not is_prefix and (not parts or draw(st.integers(0, 9)) == 0):
        text += "/"
    headers = draw(st.dictionaries(st.sampled_from(["x-a", "User-Agent"]), condition, max_size=2))
    query = draw(st.dictionaries(st.sampled_from(["q", "r"]), condition, max_size=1))
    return RouteSpec(
        hosts=tuple(draw(st.lists(st.sampled_from(HOSTS), max_size=3, unique=True))),
        path=None if is_prefix else text,
        prefix=(text or "/") if is_prefix else None,
        methods=tuple(draw(st.lists(st.sampled_from(METHODS[:-1]), max_size=2, unique=True))),
        headers=conditions(headers),
        query=conditions(query),
    )


asked = st.tuples(
    st.sampled_from(METHODS),
    st.sampled_from(["a.test", "B.a.test", "c.b.a.test.", "z.b.a.test", "test", "x.test", "elsewhere"]),
    st.tuples(
        st.lists(st.sampled_from(["a", "b", "ab", "c", "a-long-segment-of-more-than-32-bytes-"]), max_size=6),
        st.sampled_from(["", "/"]),
    ).map(lambda parts: "".join(f"/{part}" for part in parts[0]) + parts[1] or "/"),
    st.lists(
        st.tuples(st.sampled_from([b"X-A", b"user-agent", b"x-b"]), st.sampled_from([b"1", b"12", b"x y", b""])),
        max_size=3,
    ),
    st.lists(
        st.sampled_from([b"q=1", b"q", b"r=12", b"q=x%20y", b"r=x+y", b"", b"%71=1", b"q=%", b"r=1&q=12"]), max_size=2
    ).map(b"&".join),
)  # fmt: skip


def host_rank(pattern: str, host: str) -> tuple[int, int] | None:
    host = host.lower().removesuffix(".")
    if pattern == "*":
        return 2, 0
    if pattern.startswith("*."):
        return (1, -len(pattern)) if re.fullmatch(r".+" + re.escape(pattern[1:]), host) else None
    return (0, 0) if pattern == host else None


def path_rank(spec: RouteSpec, path: str) -> tuple[tuple[int, ...], dict[str, str]] | None:
    pattern = spec.path if spec.path is not None else (spec.prefix or "").rstrip("/")
    regex = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(pattern)) + ("" if spec.path is not None else "(?:/.*)?")
    match = re.fullmatch(regex, path)
    if match is None:
        return None
    kinds = [1 if part.startswith("{") else 0 for part in pattern.split("/")[1:]]
    return (*kinds, *(() if spec.path is not None else (2,))), match.groupdict()


def holds(op: str, want: str, values: list[bytes]) -> bool:
    if op in ("present", "absent"):
        return bool(values) == (op == "present")
    return any(value == want.encode() if op == "exact" else value.startswith(want.encode()) for value in values)


def predicates_hold(spec: RouteSpec, headers: Headers, query: bytes) -> bool:
    pairs = [pair.partition(b"=") for pair in query.split(b"&")]
    return all(
        holds(op, want, [value for key, value in headers if key.lower() == name.lower().encode()])
        for name, op, want in spec.headers
    ) and all(
        holds(op, want, [unquote_to_bytes(value) for key, _, value in pairs if unquote_to_bytes(key) == name.encode()])
        for name, op, want in spec.query
    )


def takes(spec: RouteSpec, method: str) -> bool:
    return not spec.methods or method in spec.methods or (method == "HEAD" and "GET" in spec.methods)


def on_the_way(routes: dict[str, RouteSpec], host: str, path: str) -> list[tuple[str, dict[str, str]]]:
    """Routes whose host and path match, the most specific first."""
    ranked = []
    for name, spec in routes.items():
        where = path_rank(spec, path)
        ranks = [rank for each in spec.hosts or ("*",) if (rank := host_rank(each, host)) is not None]
        if where is not None and ranks:
            rest = (not spec.methods, -len(spec.headers) - len(spec.query), "HEAD" not in spec.methods, name)
            ranked.append((min(ranks), where[0], rest, name, where[1]))
    return [(name, captures) for _, _, _, name, captures in sorted(ranked, key=lambda each: each[:3])]


def oracle(routes: dict[str, RouteSpec], question: Asked) -> tuple[str | None, dict[str, str], set[str]]:
    method, host, path, headers, query = question
    ranked = on_the_way(routes, host, path)
    able = [(name, captures) for name, captures in ranked if predicates_hold(routes[name], headers, query)]
    for name, captures in able:
        if takes(routes[name], method):
            return name, captures, set()
    return None, {}, {each for name, _ in able for each in METHODS if takes(routes[name], each)}


def identity(spec: RouteSpec, host: str) -> tuple[object, ...]:
    methods = set(spec.methods) | ({"HEAD"} if "GET" in spec.methods else set())
    shape = re.sub(r"\{\w+\}", "{}", spec.path if spec.path is not None else (spec.prefix or "/"))
    headers = frozenset((name.lower(), op, value) for name, op, value in spec.headers)
    return host, spec.path is None, shape, frozenset(methods), headers, frozenset(spec.query)


def distinct(found: list[RouteSpec]) -> tuple[dict[str, RouteSpec], bool]:
    """The specs that may stand beside each other by name, and whether any had to be left out."""
    seen: set[tuple[object, ...]] = set()
    kept: dict[str, RouteSpec] = {}
    for index, spec in enumerate(found):
        mine = {identity(spec, host) for host in spec.hosts or ("*",)}
        if not mine & seen:
            seen |= mine
            kept[f"r{index:02}"] = spec
    return kept, len(kept) < len(found)


def build(routes: dict[str, RouteSpec]) -> RouteTrie:
    return RouteTrie([(Route(name, index), spec) for index, (name, spec) in enumerate(routes.items())])


@settings(max_examples=150, deadline=None)
@given(st.lists(specs(), max_size=14), st.lists(asked, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_trie_answers_as_the_oracle_in_any_order(
    found: list[RouteSpec], questions: list[Asked], shuffler: random.Random
) -> None:
    routes, _ = distinct(found)
    names = list(routes)
    shuffler.shuffle(names)
    trie, shuffled = build(routes), build({name: routes[name] for name in names})
    for question in questions:
        name, captures, allowed = trie.find(*question)
        assert (name, captures, set(allowed)) == oracle(routes, question)
        assert shuffled.find(*question)[:2] == (name, captures)
        assert set(shuffled.find(*question)[2]) == set(allowed)
        assert trie._probe(*question)[0] <= trie.worst_case


@settings(max_examples=100, deadline=None)
@given(st.lists(specs(), max_size=14), asked)
def test_explain_agrees_with_the_match(found: list[RouteSpec], question: Asked) -> None:
    routes, _ = distinct(found)
    method, host, path, headers, query = question
    trie = build(routes)
    verdicts = trie.explain(*question, limit=100)
    assert sorted(verdict.route for verdict in verdicts) == sorted(routes)
    assert [verdict.route for verdict in verdicts if verdict.outcome == "won"] == [
        name for name in [trie.find(*question)[0]] if name is not None
    ]
    tried = [name for name, _ in on_the_way(routes, host, path)]
    assert [verdict.route for verdict in verdicts if verdict.outcome not in ("host", "path")] == tried
    for verdict in verdicts:
        spec = routes[verdict.route]
        fits = any(host_rank(each, host) is not None for each in spec.hosts or ("*",))
        expected = {
            "host": not fits,
            "path": fits and path_rank(spec, path) is None,
            "method": not takes(spec, method),
            "header": not predicates_hold(spec, headers, query),
            "query": not predicates_hold(spec, headers, query),
            "won": takes(spec, method) and predicates_hold(spec, headers, query),
            "less specific": takes(spec, method) and predicates_hold(spec, headers, query),
        }
        assert expected[verdict.outcome]


@settings(max_examples=60, deadline=None)
@given(st.lists(specs(), max_size=8))
def test_exactly_the_identical_matches_are_refused(found: list[RouteSpec]) -> None:
    _, clash = distinct(found)
    try:
        build({f"r{index:02}": spec for index, spec in enumerate(found)})
        refused = False
    except ValueError as error:
        refused = "same match" in str(error)
    assert refused == clash
