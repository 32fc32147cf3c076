"""What is legal for the schema and still cannot be meant, or cannot work."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from gateway import snapshot
from gateway.cli import check, schema
from gateway.config import findings, load
from gateway.config.document import json_schema, markdown
from gateway.errors import ConfigError, Problem

ROOT = Path(__file__).parent.parent.parent
CONTRACT = ROOT / "tests" / "data" / "contract"

HEAD = """\
version: 1
workers: 1
admin: {bind: 127.0.0.1:9900}
listeners:
  public: {bind: 127.0.0.1:8080}
upstreams:
  origin: {targets: [127.0.0.1:9001]}
"""
KEY = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
JWKS = {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": KEY}]}
JWT = "{jwt: {issuer: i, audience: a, keys: jwks.json, algorithms: EdDSA}}"


def write(folder: Path, routes: str, head: str = HEAD, jwks: object = JWKS) -> Path:
    (folder / "jwks.json").write_text(jwks if isinstance(jwks, str) else json.dumps(jwks))
    path = folder / "gateway.yaml"
    path.write_text(head + routes)
    return path


def found(path: Path) -> list[Problem]:
    """Return errors and warnings alike."""
    try:
        config = load(path)
        return [*findings(config), *snapshot.check(config)]
    except ConfigError as error:
        return list(error.problems)


def route(name: str, match: str, policies: str = "", more: str = "") -> str:
    more += f", policies: [{policies}]" if policies else ""
    return f"  - {{name: {name}, match: {{{match}}}, upstream: origin{more}}}\n"


def only(problems: list[Problem], severity: str, message: str, hint: str = "") -> Problem:
    assert [problem.severity for problem in problems] == [severity], [problem.render() for problem in problems]
    assert message in problems[0].message and hint in problems[0].hint, problems[0].render()
    return problems[0]


@pytest.mark.parametrize(
    ("first", "second", "severity", "message"),
    [
        (
            "path: '/a/{x}'",
            "path: '/a/{x}'",
            "error",
            "unreachable: it takes exactly the requests of route 'r0' (line 9)",
        ),
        (
            "path: '/a/{x}', methods: [GET, POST]",
            "path: '/a/{x}', methods: POST",
            "error",
            "POST is also taken by route 'r0'",
        ),
        ("prefix: /a", "prefix: /a/", "error", "unreachable"),
        ("path: /%61", "path: /a", "error", "unreachable"),
        (
            "path: '/a/{x}', methods: GET",
            "path: '/a/{y}', methods: POST",
            "warning",
            "another parameter name: {y} here, {x} in route 'r0'",
        ),
        (
            "prefix: /a, headers: {x-a: 1}",
            "prefix: /a, headers: {x-b: 1}",
            "warning",
            "may meet the conditions of route 'r0'",
        ),
        ("prefix: /a, host: [A.test, b.test]", "prefix: /a, host: a.test", "error", "unreachable"),
        ("prefix: /a", "path: /a", "", ""),
        ("path: '/a/{x}'", "path: /a/b", "", ""),
        ("prefix: /a, methods: GET", "prefix: /a", "", ""),
        ("prefix: /a, methods: GET", "prefix: /a, methods: POST", "", ""),
        ("prefix: /a, host: a.test", "prefix: /a", "", ""),
        ("prefix: /a, headers: {x-a: 1}", "prefix: /a, headers: {x-a: 2}", "", ""),
        ("prefix: /a, headers: {x-a: {present: true}}", "prefix: /a, headers: {x-a: {present: false}}", "", ""),
        ("prefix: /a, query: {v: {prefix: a}}", "prefix: /a, query: {v: {prefix: b}}", "", ""),
        ("prefix: /a, query: {v: 1}", "prefix: /a", "", ""),
    ],
)
def test_routes_that_compete(tmp_path: Path, first: str, second: str, severity: str, message: str) -> None:
    problems = found(write(tmp_path, "routes:\n" + route("r0", first) + route("r1", second)))
    if severity:
        assert only(problems, severity, message).line == 10
    else:
        assert problems == []


def test_a_method_that_nobody_sends_is_a_warning(tmp_path: Path) -> None:
    """One of a protocol of its own is none of the gateway's business."""
    (problem,) = found(write(tmp_path, "routes: [{name: a, match: {prefix: /, methods: [GET, PSOT, BASELINE-CONTROL, QUERY]}, upstream: origin}]\n"))
    assert (problem.severity, problem.line, problem.hint) == ("warning", 8, "did you mean 'POST'?") and "'PSOT' is no usual method" in problem.message


def test_routes_of_different_listeners_do_not_compete(tmp_path: Path) -> None:
    head = HEAD.replace("  public:", "  private: {bind: 127.0.0.1:8081}\n  public:")
    routes = (
        "routes:\n"
        + route("a", "prefix: /", more=", listeners: public")
        + route("b", "prefix: /", more=", listeners: [private]")
    )
    assert found(write(tmp_path, routes, head)) == []


@pytest.mark.parametrize(
    ("match", "policies", "message", "hint"),
    [
        ("prefix: /", "{scopes: a}", "scopes without a policy that says who calls", "add a jwt or api_key policy"),
        ("prefix: /", "{claims: {acr: high}}", "claims without a token", "add a jwt policy"),
        ("prefix: /", "{rate_limit: {key: client, rate: 1/s}}", "a limit by client without", "use `key: ip`"),
        ("prefix: /", f"{JWT}, {JWT}", "a second jwt policy", "keep one"),
        ("path: /a", "{rewrite: {prefix: /b}}", "this route matches by `path`", "match by `prefix`"),
        ("path: '/a/{id}'", "{rewrite: {path: '/b/{idd}'}}", "uses a parameter {idd}", "it has: id"),
        ("prefix: /", "{audit: {file: nowhere/audit.jsonl}}", "the folder of this file does not exist", "mkdir -p"),
        ("prefix: /", "{audit: {file: .}}", "this is a folder", "name a file"),
    ],
)
def test_policies_that_make_no_sense_in_their_route(
    tmp_path: Path, match: str, policies: str, message: str, hint: str
) -> None:
    problem = only(found(write(tmp_path, "routes:\n" + route("r", match, policies))), "error", message, hint)
    assert problem.line == 9


@pytest.mark.parametrize(
    "policies",
    [
        f"{JWT}, {{scopes: a}}, {{claims: {{acr: [x, y]}}}}, {{rate_limit: {{key: client, rate: 1/s}}}}",
        "{rate_limit: {key: 'header:X-Tenant', rate: 1/s}}, {rate_limit: {key: ip, rate: 100/m}}",
        "{ip: {allow: 10.0.0.0/8}}, {headers: {response: {remove: via}}}, {cors: {origins: '*'}}",
    ],
)
def test_policies_that_make_sense(tmp_path: Path, policies: str) -> None:
    assert found(write(tmp_path, "routes:\n" + route("r", "path: '/a/{id}'", policies))) == []


def test_cors_needs_no_options_in_its_route(tmp_path: Path) -> None:
    """A preflight is answered by the route of the method to come."""
    text = "routes:\n" + route("r", "path: /a, methods: [POST]", "{cors: {origins: https://app.test}}")
    assert found(write(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("match", "policies", "more", "severity", "message"),
    [
        ("prefix: /ws, methods: [POST]", "{cors: {origins: [https://a.test]}}", "", "error", "a handshake is a GET"),
        ("prefix: /ws", "", "", "warning", "nothing looks at Origin"),
        ("prefix: /ws, headers: {x-a: b}", "{rate_limit: {rate: 5/s, key: ip}}", "", "warning", "nothing looks at Origin"),
        (
            "prefix: /ws",
            "{cors: {origins: [https://a.test]}}",
            ", mirror: {upstream: copies}",
            "warning",
            "handshakes are not mirrored",
        ),
    ],
)
def test_websockets_that_cannot_be_meant(
    tmp_path: Path, match: str, policies: str, more: str, severity: str, message: str
) -> None:
    head = HEAD + ("  copies: {targets: [127.0.0.1:9002]}\n" if more else "")
    routes = "routes:\n" + route("ws", match, policies, more + ", websocket: true")
    only(found(write(tmp_path, routes, head)), severity, message)


@pytest.mark.parametrize(
    "text",
    [
        route("ws", "prefix: /ws", "{cors: {origins: [https://a.test]}}", ", websocket: true"),
        route("ws", "prefix: /ws, headers: {origin: https://a.test}", "", ", websocket: {idle: 1h, tunnels: 10}"),
        route("ws", "prefix: /ws", "", ", websocket: false"),
    ],
)
def test_websockets_that_are_well(tmp_path: Path, text: str) -> None:
    assert found(write(tmp_path, "routes:\n" + text)) == []


def test_the_handshake_s_own_fields_belong_to_the_gateway(tmp_path: Path) -> None:
    text = route("ws", "prefix: /ws", "{headers: {request: {set: {Sec-WebSocket-Key: x}}}}")
    assert "a header that frames the message" in found(write(tmp_path, "routes:\n" + text))[0].message


@pytest.mark.parametrize(
    ("policy", "column", "message"),
    [
        ("{cors: {origins: '*', credentials: true}}", None, "every origin with credentials"),
        ("{cors: {origins: app.test}}", None, "not an origin"),
        ("{headers: {request: {set: {Transfer-Encoding: x}}}}", None, "frames the message"),
        ('{headers: {request: {set: {a: "b\\r\\nc: d"}}}}', None, "control or non-ASCII character"),
        ("{headers: {}}", None, "does nothing"),
        ("{limits: {}}", None, "does nothing"),
        ("{limits: {head: 65KiB}}", None, "a head is at most 64KiB"),
        ("{limits: {fields: 257}}", None, "at most 256"),
        ("{ip: {}}", None, "does nothing"),
        ("{rewrite: {prefix: /a, path: /b}}", None, "both `prefix` and `path`"),
        ("{jwt: {issuer: i, audience: a, keys: jwks.json, algorithms: [none]}}", None, "expected one of RS256"),
        ("{jwt: {issuer: i, audience: a, algorithms: RS256}}", None, "missing key 'keys'"),
        ("{jwt: {issuer: i, audience: a, algorithms: HS256}}", None, "HS algorithms need a secret"),
        ("{jwt: {issuer: i, audience: a, algorithms: HS256, secret: short}}", None, "at least 32 bytes"),
        (
            f"{{jwt: {{issuer: i, audience: a, algorithms: EdDSA, keys: jwks.json, secret: {'x' * 32}}}}}",
            None,
            "never used",
        ),
        ("{jwt: {issuer: i, audience: a, algorithms: EdDSA, keys: 'http://auth.test/k'}}", None, "plain http"),
        ("{jwt: {issuer: i, audience: a, algorithms: EdDSA, keys: jwks.json, leeway: 3m}}", None, "at most 120s"),
        ("{api_key: {keys: [{client: a, hash: abc}]}}", None, "not the hash of a key"),
        ("{scopes: []}", None, "must not be empty"),
        ("{scopes: ['a b']}", None, "not a scope"),
        ("{}", None, "no settings"),
        ("{jwt: }", None, "no settings"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, policy: str, column: int | None, message: str) -> None:
    problem = only(found(write(tmp_path, "routes:\n" + route("r", "prefix: /", policy))), "error", message)
    assert problem.line == 9 and problem.source and problem.hint


@pytest.mark.parametrize(
    ("jwks", "severity", "message"),
    [
        ("<html>", "error", "the JWK set is not JSON"),
        ("[]", "error", "the JWK set is not a JSON object"),
        ({"keys": []}, "error", "the JWK set has no usable key"),
        ({"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]}, "error", "RSA modulus has 17 bits"),
        ({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}]}, "error", "its OKP parameters are invalid"),
        ({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "!!"}]}, "error", "its x is not canonical base64url"),
        ({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": KEY, "use": "enc"}]}, "error", "its use is not sig"),
        ({"keys": [{**JWKS["keys"][0], "d": KEY}]}, "error", "it holds private members"),
        ({"keys": [*JWKS["keys"], {"kty": "oct", "k": "AAAA"}]}, "warning", "key 1: its kty is not RSA, EC or OKP"),
    ],
)
def test_key_files_that_cannot_serve(tmp_path: Path, jwks: object, severity: str, message: str) -> None:
    problem = only(found(write(tmp_path, "routes:\n" + route("r", "prefix: /", JWT), jwks=jwks)), severity, message)
    assert problem.source[problem.column - 1 :].startswith("jwks.json")
    assert KEY not in problem.render()


def test_a_missing_key_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "routes:\n" + route("r", "prefix: /", JWT))
    (tmp_path / "jwks.json").unlink()
    only(found(path), "error", "cannot read the keys: No such file", str(tmp_path / "jwks.json"))


def test_api_keys_from_a_file_have_places_in_it(tmp_path: Path) -> None:
    path = write(tmp_path, "routes:\n" + route("r", "prefix: /", "{api_key: {keys: keys.yaml}}"))
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{client: a, hash: 'sha256:{'0' * 64}', scopes: [x]}}\n")
    policy = load(path).routes[0].policies[0].inline
    assert policy is not None and policy.api_key is not None
    assert policy.api_key.keys[0].client == "a" and policy.api_key.keys[0].digest == bytes(32)
    keys.write_text("- {client: a\n")
    problems = found(path)
    assert [(Path(problem.file).name, problem.line) for problem in problems] == [("gateway.yaml", 9), ("keys.yaml", 1)]
    keys.unlink()
    assert "no such file" in " ".join(problem.render() for problem in found(path))


@pytest.mark.parametrize(
    ("old", "new", "severity", "message"),
    [
        ("8080}", "9900}", "error", "'127.0.0.1:9900' is taken by admin (line 3)"),
        (
            "8080}",
            "8080}\n  other: {bind: 0.0.0.0:8080}",
            "error",
            "'0.0.0.0:8080' is taken by listeners.public (line 5)",
        ),
        ("bind: 127.0.0.1:9900", "bind: 0.0.0.0:9900", "error", "open to the network without a token"),
        (
            "bind: 127.0.0.1:9900",
            "bind: unix:nowhere/admin.sock",
            "error",
            "the folder of the Unix socket does not exist",
        ),
        ("8080}", "8080, trusted_proxies: 0.0.0.0/0}", "warning", "every client is trusted"),
        ("8080}", "8080, proxy_protocol: optional}", "warning", "any client can claim any address"),
        ("workers: 1", "workers: 999", "warning", "999 workers on"),
        ("9001]}", "9001]}\n  spare: {targets: [127.0.0.1:9002]}", "warning", "upstream 'spare' is used by no route"),
        ("upstreams:", "policies:\n  spare: {scopes: a}\nupstreams:", "warning", "policy 'spare' is used by no route"),
        ("workers: 1", "workers: 1\nlog: {file: nowhere/x.log}", "error", "the folder of this file does not exist"),
        ("9001]}", "9001, 127.0.0.1:9001]}", "error", "the same endpoint twice"),
        ("8080}", "8080, limits: {target: 1MiB}}", "error", "limit of the head"),
        ("8080}", "8080, limits: {head: 65537}}", "error", "a head is between 1KiB and 64KiB"),
    ],
)
def test_listeners_admin_and_leftovers(tmp_path: Path, old: str, new: str, severity: str, message: str) -> None:
    only(found(write(tmp_path, "routes:\n" + route("r", "prefix: /"), HEAD.replace(old, new))), severity, message)


def test_addresses_that_do_not_conflict(tmp_path: Path) -> None:
    head = HEAD.replace(
        "8080}",
        "8080}\n  b: {bind: '[::]:8080'}\n  c: {bind: 127.0.0.1:0}\n  d: {bind: 127.0.0.1:0}\n"
        "  e: {bind: 127.0.0.2:8080}",
    )
    assert found(write(tmp_path, "routes:\n" + route("r", "prefix: /"), head)) == []


def test_unknown_names_are_reported_beside_other_mistakes(tmp_path: Path) -> None:
    routes = (
        "routes:\n"
        + route("r", "prefix: /", "nope", ", listeners: [publik]")
        + route("r", "prefx: /").replace("origin", "orign")
    )
    messages = [(problem.message, problem.hint) for problem in found(write(tmp_path, routes))]
    assert ("unknown policy 'nope'", "defined under `policies`: none") in messages
    assert ("unknown listener 'publik'", "did you mean 'public'?") in messages
    assert ("unknown upstream 'orign'", "did you mean 'origin'?") in messages
    assert ("duplicate route name 'r'", "it is already at line 9") in messages
    assert ("unknown key 'prefx' in routes[1].match", "did you mean 'prefix'?") in messages


GOOD_HOOK = """\
import sibling_of_hook

class Ceiling:
    def __init__(self, ceiling: int, currency: str = "EUR") -> None: ...
    async def on_request(self, request): ...

class Empty: ...
VALUE = 1
"""


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ("class: 'hook_of_test:Ceiling', ceiling: 5", "", ""),
        ("class: 'hook_of_test:Ceiling', ceiling: 5, currency: GBP, timeout: 2s, on_failure: continue", "", ""),
        ("class: 'hook_of_test:Ceiling'", "Ceiling needs the setting 'ceiling'", "add `ceiling:`"),
        (
            "class: 'hook_of_test:Ceiling', ceiling: 5, curency: GBP",
            "Ceiling takes no setting 'curency'",
            "did you mean 'currency'?",
        ),
        ("class: 'hook_of_test:Celing', ceiling: 5", "hook_of_test has no Celing", "did you mean 'Ceiling'?"),
        ("class: 'hook_of_test:Empty'", "Empty has no phase to call", "on_request"),
        ("class: 'hook_of_test:VALUE'", "does not define a class", "classes there"),
        ("class: 'absent_hook:X'", "cannot import absent_hook: ModuleNotFoundError", "it is looked up in"),
        ("class: 'broken_hook:X'", "cannot import broken_hook: ZeroDivisionError", "repair the module"),
        ("class: 'leaving_hook:X'", "ends the process", "__main__"),
        ("class: hook_of_test", "not a class", 'write "module:Class"'),
    ],
)
def test_python_policies(tmp_path: Path, settings: str, message: str, hint: str) -> None:
    (tmp_path / "hook_of_test.py").write_text(GOOD_HOOK)
    (tmp_path / "sibling_of_hook.py").write_text("")
    (tmp_path / "broken_hook.py").write_text("1 / 0\n")
    (tmp_path / "leaving_hook.py").write_text("raise SystemExit(0)\n")
    path = write(
        tmp_path,
        "routes:\n"
        + route("r", "prefix: /", f"{{python: {{{settings}}}}}, {{rate_limit: {{key: ip, rate: 1/s}}}}"),
    )
    before = list(sys.path)
    problems = found(path)
    if message:
        only(problems, "error", message, hint)
    else:
        assert problems == []
    # A check leaves no trace: the next one sees changed code.
    assert sys.path == before and not {"hook_of_test", "sibling_of_hook", "broken_hook"} & set(sys.modules)
    assert not (tmp_path / "__pycache__").exists()


def test_changed_code_of_a_policy_is_seen_and_changes_the_digest(tmp_path: Path) -> None:
    hook = tmp_path / "hook_of_test.py"
    hook.write_text("class A:\n    def on_end(self, request): ...\n")
    path = write(tmp_path, "routes:\n" + route("r", "prefix: /", "{python: {class: 'hook_of_test:A'}}"))
    first = load(path).digest
    hook.write_text("class A:\n    def on_end(self, request): 1\n")
    assert load(path).digest != first
    hook.write_text("class B: ...\n")
    assert "has no A" in found(path)[0].message


def run(path: Path, *, strict: bool = False, output: str = "text") -> int:
    parser = argparse.ArgumentParser()
    check.register(parser.add_subparsers())
    args = parser.parse_args(["check", "-c", str(path), "-o", output, *(["--strict"] if strict else [])])
    result = args.run(args)
    assert isinstance(result, int)
    return result


def test_check_says_a_friendly_line_about_a_good_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CONTRACT / "edge.yaml", strict=True) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{CONTRACT / 'edge.yaml'}: ok, 1 listener, 2 upstreams, 3 policies, 4 routes, digest ")
    assert len(out.splitlines()) == 1


def test_check_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doubtful = write(tmp_path, "routes:\n" + route("r", "prefix: /"), HEAD.replace("workers: 1", "workers: 999"))
    assert run(doubtful) == 0 and "warning: 999 workers" in capsys.readouterr().out
    assert run(doubtful, strict=True) == 1
    assert run(tmp_path / "absent.yaml") == 2 and "absent.yaml: no such file" in capsys.readouterr().out
    doubtful.write_text("version: 1\nworkers: 999\n")
    assert run(doubtful) == 2
    assert capsys.readouterr().out.endswith("gateway.yaml: 2 errors\n")


def test_check_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "routes:\n" + route("r", "prefx: /"))
    assert run(path, output="json") == 2
    data = json.loads(capsys.readouterr().out)
    assert {(item["line"], item["column"], item["severity"]) for item in data} >= {(9, 23, "error")}
    assert set(data[0]) == {"file", "line", "column", "message", "hint", "source", "severity", "width"}
    assert run(CONTRACT / "bare.yaml", output="json") == 0 and json.loads(capsys.readouterr().out) == []


def test_schema_prints_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.run(argparse.Namespace(mesh=False)) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json_schema()
    assert data["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert data["additionalProperties"] is False
    assert set(data["required"]) == {"version", "listeners", "upstreams"}
    references = [part.split('"')[0] for part in json.dumps(data).split('"#/$defs/')[1:]]
    assert references and set(references) <= set(data["$defs"])
    assert data["$defs"]["Policy"]["maxProperties"] == 1


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), (
        "run: python -m gateway.config.document > docs/configuration.md"
    )


def test_the_reference_names_every_key() -> None:
    text = markdown()
    for definition in json_schema()["$defs"].values():
        for key in definition.get("properties", {}):
            assert f"| `{key}` |" in text
