"""Loading: what a good file becomes, and that every mistake of a bad one is reported at its place, all at once."""

import json
import re
from pathlib import Path

import pytest

from gateway.config import Config, findings, load
from gateway.config.values import Rate
from gateway.config.web import Address, Bind
from gateway.errors import ConfigError, Problem

CONTRACT = Path(__file__).parent.parent / "data" / "contract"

GOOD = """\
version: 1
workers: 1
listeners:
  public: {bind: 127.0.0.1:8080}
upstreams:
  origin: {targets: [127.0.0.1:9001]}
routes:
  - name: everything
    match: {prefix: /}
    upstream: origin
"""


def write(folder: Path, text: str, name: str = "gateway.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text))
    return list(caught.value.problems)


def places(found: list[Problem]) -> list[tuple[int, int, str]]:
    return [(problem.line, problem.column, problem.message) for problem in found]


def test_the_smallest_contract_file_loads_with_all_defaults() -> None:
    config = load(CONTRACT / "bare.yaml")
    assert findings(config) == []
    listener = config.listeners["public"]
    assert listener.bind == Bind("127.0.0.1", 8080)
    assert (listener.limits.head, listener.limits.fields, listener.limits.target, listener.limits.body) == (
        32768,
        100,
        8192,
        1048576,
    )
    assert (listener.timeouts.head, listener.timeouts.body, listener.timeouts.keepalive, listener.timeouts.write) == (
        10,
        30,
        75,
        30,
    )
    upstream = config.upstreams["origin"]
    assert upstream.targets[0].address == Address("127.0.0.1", 9001)
    assert (upstream.timeouts.connect, upstream.timeouts.head, upstream.timeouts.idle, upstream.timeouts.total) == (
        2,
        15,
        30,
        60,
    )
    assert (upstream.keepalive.connections, upstream.keepalive.idle, upstream.keepalive.age) == (1024, 55, 3600)
    assert (upstream.host, upstream.retries.attempts, upstream.limits.requests) == ("preserve", 1, 1024)
    assert config.drain.deadline == 30 and config.drain.delay == 0
    assert config.routes[0].match.host == ("*",)


def test_the_edge_contract_file_loads() -> None:
    config = load(CONTRACT / "edge.yaml")
    assert findings(config) == []
    assert config.workers == "auto"
    assert [endpoint.weight for endpoint in config.upstreams["accounts"].targets] == [1, 2]
    jwt = config.policies["bank-token"].jwt
    assert jwt is not None
    assert jwt.keys_file == CONTRACT.resolve() / "jwks.json" and jwt.keys_url is None
    assert jwt.issuer == ("https://auth.bank.test",) and jwt.audience == ("payments",)
    assert (jwt.leeway, jwt.refresh, jwt.cooldown, jwt.token_size, jwt.cache.bytes) == (30, 300, 30, 8192, 16 << 20)
    assert jwt.headers == {"x-auth-subject": "sub"} and jwt.require == ("exp",)
    limit = config.policies["per-client"].rate_limit
    assert limit is not None and limit.rate == Rate(100, 1.0) and limit.burst_size == 200
    assert config.policies["trail"].audit is not None
    assert config.policies["trail"].audit.file == CONTRACT.resolve() / "audit.jsonl"
    uses = config.routes[0].policies
    assert [use.use for use in uses] == ["bank-token", None, "per-client", "trail"]
    assert (
        uses[1].inline is not None
        and uses[1].inline.kind == "scopes"
        and uses[1].inline.settings == ("payments:write",)
    )
    assert config.routes[1].match.parameters == ("id",)


def test_a_value_knows_where_it_stands() -> None:
    config = load(CONTRACT / "edge.yaml")
    lines = (CONTRACT / "edge.yaml").read_text().splitlines()
    line, column = config.where(("policies", "bank-token", "jwt", "issuer"))
    assert lines[line - 1][column - 1 :].startswith("https://auth.bank.test")
    line, column = config.where(("routes", 1, "match"))
    assert lines[line - 1][column - 1 :].startswith('{path: "/v1/payments/{id}"')
    # A block mapping is shown by its key.
    line, column = config.where(("listeners", "public"))
    assert lines[line - 1][column - 1 :] == "public:"


def test_the_models_are_frozen() -> None:
    config = load(CONTRACT / "bare.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.workers = 3


MANY = """\
version: 2
workrs: 3
listeners:
  public:
    bind: 127.0.0.1
    timeouts: {head: 10, bodi: 3s}
    limits: {fields: 300, head: 32KB}
    trusted_proxies: [10.0.0.1/8]
    proxy_protocol: requird
  bad name: {bind: 127.0.0.1:80}
upstreams:
  a:
    targets: [127.0.0.1:9001, {adress: x}]
    keepalive:
      connections: many
      idle: 0s
  a: {targets: []}
  b:
policies:
  t: {jwt: {issuer: x, audience: y, algorithms: [RS265]}}
  u: {scopes: [a], claims: {x: 1}}
  v: {ratelimit: {}}
routes:
  - name: r1
    match: {path: /v1/x, prefix: /v1}
    policies: [tt]
    upstream: aa
  - name: r1
    match: {path: "/v1/{id}x", methods: [get]}
    upstream: a
  - nonsense
"""

EXPECTED = """\
1:10 version: expected 1, got 2 | write 1
2:1 unknown key 'workrs' in the top level | did you mean 'workers'?
5:11 listeners.public.bind: expected host:port, got '127.0.0.1' | write address:port
6:22 listeners.public.timeouts.head: a duration without a unit, got 10 | write a number with its unit
6:26 unknown key 'bodi' in listeners.public.timeouts | did you mean 'body'?
7:22 listeners.public.limits.fields: must be at most 256 | write a number that is at most 256
7:33 listeners.public.limits.head: expected a size, got '32KB' | write bytes as 512
8:23 listeners.public.trusted_proxies[0]: an address with bits set below its prefix length | write
9:21 listeners.public.proxy_protocol: expected one of off, optional, required, got 'requird' | did you mean 'required'?
10:3 listeners.bad name: not a name, got 'bad name' | letters, digits
13:31 missing key 'address' in upstreams.a.targets[1] | add `address:` host:port
13:32 unknown key 'adress' in upstreams.a.targets[1] | did you mean 'address'?
15:20 upstreams.a.keepalive.connections: expected a whole number, got 'many' | write a number
16:13 upstreams.a.keepalive.idle: must be longer than 0, got '0s' | a wait without an end
17:3 duplicate key 'a' | it is already at line 12
18:3 upstreams.b: expected a mapping, got nothing | write `key: value` lines
20:50 policies.t.jwt.algorithms[0]: expected one of RS256, RS384, | did you mean 'RS256'?
21:28 policies.u.claims: two policies in one mapping (scopes and claims) | write each as a list item of its own
22:7 unknown key 'ratelimit' in policies.v | did you mean 'rate_limit'?
25:34 routes[0].match.prefix: both `path` and `prefix` | keep one of them
26:16 unknown policy 'tt' | did you mean 't'?
27:15 unknown upstream 'aa' | did you mean 'a'?
28:11 duplicate route name 'r1' | it is already at line 24
29:19 routes[1].match.path: a parameter is a whole segment, a name in braces | write /v1/payments/{id}
29:42 routes[1].match.methods[0]: methods are case-sensitive, got 'get' | write it in upper case
31:5 routes[2]: expected a mapping, got 'nonsense' | write `key: value` lines
"""


def test_every_mistake_is_reported_at_its_place_with_what_to_do(tmp_path: Path) -> None:
    found = problems(tmp_path, MANY)
    expected = []
    for line in EXPECTED.splitlines():
        match = re.fullmatch(r"(\d+):(\d+) (.*) \| (.*)", line)
        assert match
        expected.append((int(match[1]), int(match[2]), match[3], match[4]))
    assert [place[:2] for place in places(found)] == [each[:2] for each in expected]
    for problem, (_, _, message, hint) in zip(found, expected, strict=True):
        assert problem.message.startswith(message)
        assert problem.hint.startswith(hint)


MISPLACED = """\
version: 1
listeners: {public: {bind: 127.0.0.1:8080, tls: {certificates: [{cert: a, key: b}], min_version: "1.1"}}}
upstreams: {edge: {service: ledger}, other: {targets: [127.0.0.1:1], connect: 3s}}
routes:
  - {name: calls, match: {service: bank.Payments, method: Pay}, upstream: other}
  - {name: paths, path: /v1, upstream: other}
"""


def test_a_service_without_a_mesh_hides_nothing_else_and_a_key_on_the_wrong_level_is_told_where_it_belongs(tmp_path: Path) -> None:
    found = [(problem.line, problem.message, problem.hint) for problem in problems(tmp_path, MISPLACED)]
    assert found == [
        (2, "listeners.public.tls.min_version: expected one of 1.2, 1.3, got '1.1'", "write one of 1.2, 1.3"),
        (3, "upstreams.edge.service: a service of a mesh, of which this gateway is no member, got 'ledger'",
         "add `mesh: {service: edge, control: https://..., state: edge.state}`"),
        (3, "unknown key 'connect' in upstreams.other", "it belongs below `timeouts`: timeouts: {connect: ...}"),
        (5, "unknown key 'service' in routes[0].match", "it belongs below `grpc`: grpc: {service: ...}"),
        (5, "unknown key 'method' in routes[0].match", "did you mean 'methods'?"),
        (6, "missing key 'match' in routes[1]", "add `match:` which requests it takes"),
        (6, "unknown key 'path' in routes[1]", "it belongs below `match`: match: {path: ...}"),
    ]


def test_each_problem_has_its_source_line_and_a_caret(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD.replace("workers: 1", "workers: none"))
    path = tmp_path / "gateway.yaml"
    assert found.render() == (
        f"{path}:2:10: workers: expected a number of workers, got 'none'\n"
        "  2 | workers: none\n"
        "    |          ^~~~\n"
        "    = write `auto` (CPU affinity and cgroup quota) or a number such as 2"
    )


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        (
            "a: {b: ${env:X}}\n",
            (1, 9),
            "expected ',' or '}'",
            'inside { } or [ ] a reference needs quotes: "${env:NAME}"',
        ),
        ("a: {path: /v1/{id}}\n", (1, 15), "expected ',' or '}'", 'needs quotes: path: "/v1/payments/{id}"'),
        ("a: [1,\nb: 2\n", (1, 4), "expected ',' or ']'", "it is never closed"),
        ("a: 'x\n", (1, 4), "unexpected end of stream", "it is never closed"),
        ("version: 1\n\tworkers: 1\n", (2, 1), "a tab cannot indent YAML", "indent with spaces"),
        ("a: 1\n---\nb: 2\n", (2, 1), "another document", "remove the line ---"),
        ("a: *nope\n", (1, 4), "undefined alias", "check the indentation"),
        ("a: 1\n  b: 2\n", (2, 4), "mapping values are not allowed", "check the indentation"),
        ("a: 1\nb: \x07\n", (2, 4), "a character that YAML does not allow", "remove the control character"),
    ],
)
def test_syntax_errors_have_a_place(tmp_path: Path, text: str, place: tuple[int, int], message: str, hint: str) -> None:
    (found,) = problems(tmp_path, text)
    assert message in found.message and hint in found.hint
    assert (found.line, found.column) == place


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("", "empty"), ("# nothing\n", "empty"), ("---\n", "empty"), ("null\n", "empty")],
)
def test_a_file_that_holds_nothing_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "gateway.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_folder_and_other_encodings_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a directory"):
        load(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"version: 1\n# caf\xe9\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    (found,) = caught.value.problems
    assert (found.line, found.column, found.message) == (2, 6, "not UTF-8 text")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "5\n"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    found = problems(tmp_path, text)
    assert "expected a mapping" in found[0].message


def test_anchors_and_merge_keys_work_and_keep_their_places(tmp_path: Path) -> None:
    text = GOOD.replace(
        "upstreams:\n  origin: {targets: [127.0.0.1:9001]}",
        "upstreams:\n  origin: &base\n    targets: [127.0.0.1:9001]\n    retries: 0\n"
        "  other:\n    <<: *base\n    targets: [127.0.0.1:9002]",
    )
    config = load(write(tmp_path, text))
    assert config.upstreams["other"].retries.attempts == 0
    assert config.upstreams["other"].targets[0].address.port == 9002
    assert config.where(("upstreams", "other", "targets"))[0] == 11


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nworkers: &x {a: *x}\n",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{name}: &{name} [{','.join(['*' + below] * 10)}]\n"
            for below, name in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a: " + "[" * 200 + "]" * 200 + "\n",
    ],
    ids=["anchor in itself", "exponential aliases", "deep nesting"],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str) -> None:
    found = problems(tmp_path, text)
    assert any(re.search("itself|too many nested|too deep", problem.message) for problem in found)


def test_tags_and_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + "drain: !!python/object:os.system {}\n1: x\n")
    messages = " ".join(problem.message for problem in found)
    assert "unknown YAML tag" in messages and "a key must be text" in messages


def test_digest_covers_the_file_references_and_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jwks = (CONTRACT / "jwks.json").read_text()
    write(tmp_path, jwks, "jwks.json")
    policy = "policies:\n  t: {jwt: {issuer: i, audience: a, keys: jwks.json, algorithms: EdDSA}}\n"
    policy += 'admin: {token: "${env:T}"}\n'
    text = GOOD.replace("    upstream: origin", "    policies: [t]\n    upstream: origin") + policy
    path = write(tmp_path, text)
    digests = set()
    monkeypatch.setenv("T", "one-token")
    digests.add(load(path).digest)
    assert digests == {load(path).digest}
    monkeypatch.setenv("T", "another-token")
    digests.add(load(path).digest)
    write(tmp_path, jwks.replace("test-1", "test-2"), "jwks.json")
    digests.add(load(path).digest)
    write(tmp_path, text + "# changed\n")
    digests.add(load(path).digest)
    assert len(digests) == 4 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_json_is_yaml(tmp_path: Path) -> None:
    data = {
        "version": 1,
        "listeners": {"l": {"bind": "[::1]:0"}},
        "upstreams": {"u": {"targets": ["a.test:1"]}},
        "routes": [{"name": "r", "match": {"prefix": "/v1/"}, "upstream": "u"}],
    }
    config = load(write(tmp_path, json.dumps(data)))
    assert isinstance(config, Config)
    assert config.listeners["l"].bind == Bind("::1", 0)
    assert config.routes[0].match.prefix == "/v1"


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("bind: 127.0.0.1:8080", "bind: 127.0.0.1:8080, websocket: true", "it is a key of a route; known here: bind,"),
        ("bind: 127.0.0.1:8080", "bind: 127.0.0.1:8080, retries: 2", "it is a key of an upstream; known here: bind,"),
        ("bind: 127.0.0.1:8080", "bind: 127.0.0.1:8080, protocol: http2", "it is a key of an upstream; known here: bind,"),
        ("bind: 127.0.0.1:8080", "bind: 127.0.0.1:8080, tls: {certs: []}", "did you mean 'certificates'?"),
        ("bind: 127.0.0.1:8080", "bind: 127.0.0.1:8080, tls: {cert: a.crt}", "it belongs below `certificates`: certificates: [{cert: ...}]"),
        ("version: 1", "version: 1\ntls: {}", "it belongs below `listeners`: listeners: {NAME: {tls: ...}}"),
        ("targets: [127.0.0.1:9001]", "targets: [127.0.0.1:9001], protocol: h2c", "did you mean 'http2'?"),
        ("targets: [127.0.0.1:9001]", "targets: [127.0.0.1:9001], protocol: HTTP/1.1", "did you mean 'http1'?"),
        ("bind: 127.0.0.1:8080", "bind: 127.0.0.1:8080, tls: {certificates: [], alpn: [http2]}", "did you mean 'h2'?"),
        ("targets: [127.0.0.1:9001]", "targets: [127.0.0.1:9001], services: 1", "did you mean 'service'?"),
    ],
)
def test_a_key_of_another_place_and_a_word_of_another_program_are_understood(tmp_path: Path, old: str, new: str, hint: str) -> None:
    text = "version: 1\nlisteners: {public: {bind: 127.0.0.1:8080}}\nupstreams: {a: {targets: [127.0.0.1:9001]}}\nroutes: [{name: a, match: {prefix: /}, upstream: a}]\n"
    (tmp_path / "gateway.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "gateway.yaml")
    assert any(each.hint.startswith(hint) for each in raised.value.problems), raised.value.render()
