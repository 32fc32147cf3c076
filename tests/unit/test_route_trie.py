"""The route trie by example: what each kind of pattern matches, who wins, and what cannot be built."""

from __future__ import annotations

from typing import Any

import pytest

from gateway._speedups.route_trie import Route, RouteTrie
from gateway.snapshot.matching import RouteSpec


def build(**specs: RouteSpec) -> RouteTrie:
    return RouteTrie([(Route(name, index), spec) for index, (name, spec) in enumerate(specs.items())])


def found(trie: RouteTrie, path: str, method: str = "GET", host: str = "h.test", **more: Any) -> str | None:
    return trie.find(method, host, path, **more)[0]


def path(template: str, *methods: str, **more: Any) -> RouteSpec:
    return RouteSpec(path=template, methods=methods, **more)


def prefix(text: str, *methods: str, **more: Any) -> RouteSpec:
    return RouteSpec(prefix=text, methods=methods, **more)


# -- paths


def test_prefix_ends_on_a_segment_boundary() -> None:
    trie = build(v1=prefix("/v1"))
    assert [found(trie, each) for each in ("/v1", "/v1/", "/v1/x", "/v1/x/y")] == ["v1"] * 4
    assert [found(trie, each) for each in ("/v1x", "/v", "/", "/x/v1")] == [None] * 4


def test_trailing_slash_of_a_prefix_does_not_count() -> None:
    assert found(build(v1=prefix("/v1/")), "/v1") == "v1"


def test_root_prefix_takes_everything() -> None:
    trie = build(all=prefix("/"))
    assert [found(trie, each) for each in ("/", "/a", "/a/b/")] == ["all"] * 3


def test_path_longer_than_any_template_still_finds_its_prefix() -> None:
    assert found(build(v1=prefix("/v1"), t=path("/v1/{a}/{b}")), "/v1" + "/x" * 200) == "v1"


def test_template_matches_whole_paths_only() -> None:
    trie = build(t=path("/v1/{id}"))
    assert trie.find("GET", "h", "/v1/42") == ("t", {"id": "42"}, ())
    assert [found(trie, each) for each in ("/v1", "/v1/", "/v1/42/", "/v1/42/x")] == [None] * 4


def test_trailing_slash_is_a_segment_of_its_own_in_a_template() -> None:
    trie = build(bare=path("/a"), slash=path("/a/"))
    assert (found(trie, "/a"), found(trie, "/a/")) == ("bare", "slash")


def test_captures_come_in_template_order() -> None:
    trie = build(t=path("/{b}/x/{a}/{c}"))
    assert trie.find("GET", "h", "/1/x/22/333")[1] == {"b": "1", "a": "22", "c": "333"}


def test_captures_of_a_branch_that_failed_are_forgotten() -> None:
    trie = build(deep=path("/{a}/{b}/end"), prefix=prefix("/{p}"))
    assert trie.find("GET", "h", "/1/2/other") == ("prefix", {"p": "1"}, ())


def test_sixteen_captures_and_no_more() -> None:
    names = [f"p{number}" for number in range(17)]
    trie = build(t=path("".join(f"/{{{name}}}" for name in names[:16])))
    assert trie.find("GET", "h", "/" + "/".join(names[:16]))[1] == {name: name for name in names[:16]}
    with pytest.raises(ValueError, match="16 of them parameters"):
        build(t=path("".join(f"/{{{name}}}" for name in names)))


def test_depth_is_bounded_at_build_time() -> None:
    assert found(build(t=path("/a" * 64)), "/a" * 64) == "t"
    with pytest.raises(ValueError, match="at most 64 segments"):
        build(t=path("/a" * 65))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 300])
def test_labels_of_every_length_are_compared_whole(length: int) -> None:
    label = "x" * length
    rivals = {f"r{i}": path(f"/{label[:i]}y{label[i + 1 :]}") for i in range(length)}
    trie = build(same=path(f"/{label}"), longer=path(f"/{label}x"), **rivals)
    assert found(trie, f"/{label}") == "same"
    assert found(trie, f"/{label}x") == "longer"
    assert found(trie, f"/{label}xx") is None
    for name, spec in rivals.items():
        assert spec.path is not None and found(trie, spec.path) == name


def test_template_is_normalised_as_requests_are() -> None:
    trie = build(tilde=path("/%7euser"), accent=path("/caf\u00e9"), hexcase=path("/a%3ab"))
    assert found(trie, "/~user") == "tilde"
    assert found(trie, "/%7Euser") == "tilde"
    assert found(trie, "/caf%c3%a9") == "accent"
    assert found(trie, "/a%3Ab") == "hexcase"


def test_prefix_length_is_where_the_rest_begins() -> None:
    trie = build(all=prefix("/"), v1=prefix("/v1"), tenant=prefix("/t/{name}"), exact=path("/exact"))
    assert [trie._probe("GET", "h", each)[1] for each in ("/", "/x", "/v1", "/v1/x", "/t/ab/c", "/exact")] == [
        0, 0, 3, 3, 5, 0,
    ]  # fmt: skip


# -- precedence


def test_static_beats_parameter_beats_prefix() -> None:
    trie = build(prefix=prefix("/a"), param=path("/a/{x}"), static=path("/a/b"))
    assert [found(trie, each) for each in ("/a/b", "/a/c", "/a/b/c", "/a")] == ["static", "param", "prefix", "prefix"]


def test_the_leftmost_difference_decides() -> None:
    trie = build(late=path("/{x}/b/c"), early=path("/a/{y}/{z}"), guard=prefix("/a/b"))
    assert found(trie, "/a/b/c") == "guard"
    assert found(trie, "/a/x/c") == "early"
    assert found(trie, "/q/b/c") == "late"


def test_longest_prefix_wins() -> None:
    trie = build(all=prefix("/"), v1=prefix("/v1"), accounts=prefix("/v1/accounts"))
    assert [found(trie, each) for each in ("/v1/accounts/1", "/v1/x", "/y")] == ["accounts", "v1", "all"]


def test_backtracks_from_a_static_branch_that_fails_further_on() -> None:
    trie = build(static=path("/a/b/c"), param=path("/{x}/b/d"), fallback=prefix("/a"))
    assert found(trie, "/a/b/c") == "static"
    assert found(trie, "/q/b/d") == "param"
    # The static branch /a fails for its template, and its own prefix comes before the {x} branch.
    assert found(trie, "/a/b/d") == "fallback"
    assert found(build(static=path("/a/b/c"), param=path("/{x}/b/d")), "/a/b/d") == "param"


def test_backtracks_from_predicates() -> None:
    trie = build(
        static=path("/a/b", headers=(("x-env", "exact", "blue"),)),
        param=path("/a/{x}", "POST"),
        prefix=prefix("/a", query=(("v", "present", ""),)),
        any=prefix("/"),
    )
    assert found(trie, "/a/b", headers=[(b"X-Env", b"blue")]) == "static"
    assert found(trie, "/a/b", "POST") == "param"
    assert found(trie, "/a/b", query=b"v") == "prefix"
    assert found(trie, "/a/b") == "any"


def test_more_predicates_first_then_name() -> None:
    one, two = ("x-a", "present", ""), ("x-b", "present", "")
    trie = build(
        z=path("/a"), m=path("/a", "GET"), b=path("/a", headers=(one, two)), c=path("/a", "GET", headers=(one,)),
        a=path("/a", "GET", "POST", headers=(two,)),
    )  # fmt: skip
    both = [(b"x-a", b"1"), (b"x-b", b"1")]
    assert found(trie, "/a", headers=both) == "a"
    assert found(trie, "/a", headers=both[:1]) == "c"
    assert found(trie, "/a", "PUT", headers=both) == "b"
    assert found(trie, "/a") == "m"
    assert found(trie, "/a", "PUT") == "z"


# -- hosts


def test_host_precedence_and_fallback() -> None:
    trie = build(
        exact=prefix("/", hosts=("a.b.test",), headers=(("x", "present", ""),)),
        near=prefix("/", "POST", hosts=("*.b.test",)),
        far=prefix("/far", hosts=("*.test",)),
        any=prefix("/"),
    )
    assert found(trie, "/", host="A.B.test", headers=[(b"x", b"")]) == "exact"
    assert found(trie, "/", "POST", host="a.b.test") == "near"
    assert found(trie, "/far", host="a.b.test") == "far"
    assert found(trie, "/", host="a.b.test") == "any"
    assert found(trie, "/far", host="other") == "any"


def test_wildcard_needs_a_label_and_takes_several() -> None:
    trie = build(w=prefix("/", hosts=("*.B.test.",)))
    assert [found(trie, "/", host=each) for each in ("a.b.test", "a.a.b.test", "A.B.TEST.")] == ["w"] * 3
    assert [found(trie, "/", host=each) for each in ("b.test", "ab.test", "test", "a.b.test.x")] == [None] * 4


def test_host_longer_than_dns_allows_matches_only_any() -> None:
    host = ".".join(["a" * 60] * 5)
    assert found(build(w=prefix("/", hosts=("*.a",)), any=prefix("/")), "/", host=host) == "any"


def test_route_with_several_hosts() -> None:
    trie = build(r=prefix("/", hosts=("a.test", "*.b.test", "A.test.")))
    assert [found(trie, "/", host=each) for each in ("a.test", "x.b.test", "c.test")] == ["r", "r", None]


# -- methods


def test_get_includes_head_and_allow_says_so() -> None:
    trie = build(r=path("/a", "GET"), d=path("/a", "DELETE"))
    assert found(trie, "/a", "HEAD") == "r"
    assert trie.find("POST", "h", "/a") == (None, {}, ("GET", "HEAD", "DELETE"))
    assert trie._probe("POST", "h", "/a")[2] == b"GET, HEAD, DELETE"


def test_a_route_that_names_head_comes_before_one_that_implies_it() -> None:
    trie = build(a=path("/a", "GET"), b=path("/a", "HEAD"))
    assert (found(trie, "/a"), found(trie, "/a", "HEAD")) == ("a", "b")


def test_custom_methods_are_case_sensitive_and_listed() -> None:
    trie = build(purge=path("/a", "PURGE"), get=path("/a", "GET"), any=path("/b"))
    assert found(trie, "/a", "PURGE") == "purge"
    assert trie.find("purge", "h", "/a") == (None, {}, ("GET", "HEAD", "PURGE"))
    assert found(trie, "/b", "BREW") == "any"
    assert found(trie, "/a", "BREW") is None


def test_allow_names_only_methods_that_would_be_routed() -> None:
    trie = build(post=path("/a", "POST", headers=(("x", "present", ""),)), put=path("/a", "PUT"))
    assert trie.find("GET", "h", "/a")[2] == ("PUT",)
    assert trie.find("GET", "h", "/a", [(b"x", b"")])[2] == ("POST", "PUT")


def test_not_found_is_not_method_not_allowed() -> None:
    assert build(post=path("/a", "POST")).find("GET", "h", "/b") == (None, {}, ())


def test_a_less_specific_route_comes_before_405() -> None:
    assert found(build(post=path("/a", "POST"), any=prefix("/")), "/a") == "any"


# -- predicates


@pytest.mark.parametrize("name", ["x-env", "User-Agent"])
def test_header_predicates(name: str) -> None:
    key = name.encode()
    exact = build(r=path("/", headers=((name, "exact", "blue"),)))
    assert found(exact, "/", headers=[(key.upper(), b"blue")]) == "r"
    assert found(exact, "/", headers=[(key, b"green"), (b"other", b"blue"), (key.lower(), b"blue")]) == "r"
    for value in (b"Blue", b"blue2", b"blu", b""):
        assert found(exact, "/", headers=[(key, value)]) is None
    assert found(exact, "/") is None
    begins = build(r=path("/", headers=((name, "prefix", "bl"),)))
    assert [found(begins, "/", headers=[(key, value)]) for value in (b"bl", b"blue", b"b", b"xbl")] == [
        "r", "r", None, None,
    ]  # fmt: skip
    present = build(r=path("/", headers=((name, "present", ""),)), absent=path("/", headers=((name, "absent", ""),)))
    assert (found(present, "/", headers=[(key, b"")]), found(present, "/")) == ("r", "absent")


@pytest.mark.parametrize(
    ("query", "matches"),
    [
        (b"mode=a%20b", True),
        (b"x=1&mode=a b&y", None),  # a space never gets past the parser
        (b"mode=x&mode=a%20b", True),
        (b"m%6Fde=a%20%62", True),
        (b"mode=a+b", False),
        (b"mode=a%20", False),
        (b"mode=a%20bc", False),
        (b"mode", False),
        (b"Mode=a%20b", False),
        (b"=a%20b", False),
        (b"xmode=a%20b", False),
        (b"&&mode=a%20b&", True),
        (b"", False),
    ],
)
def test_query_value_is_compared_decoded(query: bytes, matches: bool | None) -> None:
    trie = build(r=path("/", query=(("mode", "exact", "a b"),)))
    if matches is None:
        with pytest.raises(ValueError, match="not a valid request"):
            found(trie, "/", query=query)
    else:
        assert found(trie, "/", query=query) == ("r" if matches else None)


def test_query_operators() -> None:
    trie = build(
        prefix=path("/", query=(("v", "prefix", "2."),)),
        present=path("/a", query=(("v", "present", ""),)),
        absent=path("/a", query=(("v", "absent", ""),)),
        percent=path("/p", query=(("v", "exact", "100%"),)),
        plus=path("/plus", query=(("v", "exact", "a+b"),)),
    )
    assert [found(trie, "/", query=each) for each in (b"v=2.", b"v=2.1", b"v=2", b"v=3.2.")] == [
        "prefix", "prefix", None, None,
    ]  # fmt: skip
    assert [found(trie, "/a", query=each) for each in (b"v", b"v=", b"w=1", b"")] == [
        "present", "present", "absent", "absent",
    ]  # fmt: skip
    assert found(trie, "/p", query=b"v=100%") == "percent"
    assert found(trie, "/plus", query=b"v=a+b") == "plus"


# -- what cannot be built


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (path("v1"), "must start with '/'"),
        (path("/a/x{id}"), "a parameter is a whole segment"),
        (path("/a/{}"), "does not name a parameter"),
        (path("/a/{b}/{b}"), "occurs twice"),
        (path("/a/../b"), "no request has the segment"),
        (path("/a//b"), "an empty segment"),
        (prefix("/a//"), "an empty segment"),
        (path("/a/%2f"), "no request has the segment"),
        (path("/a", "CONNECT"), "CONNECT is not offered"),
        (path("/a", "TRACE"), "TRACE is not offered"),
        (path("/a", "GE T"), "not a method name"),
        (path("/a", hosts=("a.*",)), "neither a name"),
        (path("/a", hosts=("*a",)), "neither a name"),
        (path("/a", hosts=("b\u00fccher.test",)), "xn--"),
        (RouteSpec(path="/a", prefix="/b"), "both a path and a prefix"),
    ],
)
def test_refuses_what_could_never_match(spec: RouteSpec, message: str) -> None:
    with pytest.raises(ValueError, match=rf"route 'bad'.*{message}"):
        build(bad=spec)


def test_refuses_identical_matches_by_both_names() -> None:
    with pytest.raises(ValueError, match="route 'two'.*same match as route 'one'"):
        build(one=path("/a/{x}", "GET"), two=path("/a/{y}", "GET", "HEAD"))
    build(one=path("/a", hosts=("a",)), two=path("/a", hosts=("b",)), three=prefix("/a"))


def test_refuses_more_custom_methods_than_there_are_bits() -> None:
    specs = {f"r{number}": path(f"/{number}", f"M{number}") for number in range(23)}
    with pytest.raises(ValueError, match="more than 22 methods"):
        build(**specs)
    specs.popitem()
    trie = build(**specs)
    assert [found(trie, f"/{number}", f"M{number}") for number in range(22)] == list(specs)


def test_empty_trie_routes_nothing() -> None:
    assert build().find("GET", "h", "/") == (None, {}, ())


# -- cost


def alternating(depth: int) -> dict[str, RouteSpec]:
    """Every mix of a static and a {parameter} segment: the worst that `depth` segments can hold."""
    return {
        f"r{bits}": path("".join("/a" if bits >> i & 1 else f"/{{p{i}}}" for i in range(depth)) + "/end")
        for bits in range(1 << depth)
    }


def test_backtracking_is_bounded_by_what_was_proved_at_build_time() -> None:
    trie = build(**alternating(8))
    steps = trie._probe("GET", "h", "/a" * 8 + "/miss")[0]
    assert 1 << 8 < steps <= trie.worst_case <= 4096
    assert found(trie, "/a" * 8 + "/end") == "r255"


def test_a_configuration_with_exponential_backtracking_is_refused() -> None:
    with pytest.raises(ValueError, match="may have to try [0-9]+ alternatives, more than 4096"):
        build(**alternating(11))


def test_depth_alone_costs_nothing_exponential() -> None:
    """Static and {parameter} children at each of 60 nodes: steps grow with the nodes, not as 2^60."""
    specs = {f"r{i}": path("/a" * i + "".join(f"/{{p{k}}}" for k in range(i, i + 3)) + "/x") for i in range(60)}
    trie = build(**specs)
    assert trie.worst_case <= 60 * 6
    assert trie._probe("GET", "h", "/a" * 64)[0] <= trie.worst_case


def test_rivals_at_one_pattern_are_bounded() -> None:
    specs = {f"r{i}": path("/", headers=(("x", "exact", str(i)),)) for i in range(4097)}
    with pytest.raises(ValueError, match="more than 4096|at most 4096"):
        build(**specs)


def test_steps_do_not_depend_on_the_number_of_routes() -> None:
    counts = set()
    for size in (10, 1000):
        trie = build(**{f"r{i}": path(f"/api/r{i}/{{id}}", "GET") for i in range(size)})
        counts |= {trie._probe("GET", "h", f"/api/r{i}/77")[0] for i in range(size)}
    assert len(counts) == 1


# -- explain


def test_explain_names_the_winner_and_why_the_others_lost() -> None:
    trie = build(
        create=path("/v1/payments", "POST"),
        read=path("/v1/payments/{id}", "GET"),
        env=path("/v1/payments", "GET", headers=(("x-env", "exact", "blue"),)),
        mode=path("/v1/payments", "GET", query=(("mode", "present", ""),)),
        all=prefix("/v1", "GET"),
        other=prefix("/", hosts=("other.test",)),
    )
    verdicts = {verdict.route: verdict for verdict in trie.explain("GET", "h", "/v1/payments")}
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == {
        "all": "won", "create": "method", "env": "header", "mode": "query", "read": "path", "other": "host",
    }  # fmt: skip
    assert verdicts["create"].detail == "takes POST"
    assert verdicts["env"].detail == "header x-env must be 'blue'"
    assert verdicts["mode"].detail == "query mode must be present"


def test_explain_keeps_the_winner_and_at_most_ten_losers() -> None:
    trie = build(**{f"r{i}": path(f"/a/{i}") for i in range(40)})
    verdicts = trie.explain("GET", "h", "/a/7")
    assert verdicts[0] == ("r7", "won", "")
    assert len(verdicts) == 11
