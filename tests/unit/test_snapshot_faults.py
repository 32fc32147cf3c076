"""What only building a snapshot finds reaches a person as file:line:column; `crossway check` finds it too and leaves no trace."""

import json
import os
from pathlib import Path

import pytest

from gateway import snapshot
from gateway.cli import main
from gateway.config import Config, load
from gateway.errors import ConfigError, Problem
from gateway.server import compiler
from gateway.server.store import new_store

HEAD = """\
version: 1
listeners:
  public: {bind: 127.0.0.1:0}
upstreams:
  origin: {targets: [127.0.0.1:9001]}
"""
FAILING = "class Picky:\n    def __init__(self, limit):\n        raise KeyError(f'no limit {limit}')\n    def on_request(self, request): ...\n"
LEAVING = "class Leaving:\n    def __init__(self):\n        raise SystemExit(3)\n    def on_request(self, request): ...\n"


class Names:
    """A name table that never fills."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def add(self, name: str) -> int:
        return self.known.setdefault(name, len(self.known) + 1)


def write(folder: Path, text: str, head: str = HEAD) -> Config:
    path = folder / "gateway.yaml"
    path.write_text(head + text)
    return load(path)


def problems_of_build(config: Config) -> list[Problem]:
    """The problems of a real build; those of check() must be the same."""
    with pytest.raises(ConfigError) as caught:
        snapshot.build(config, names=Names(), seed=1, version=1)
    found = list(caught.value.problems)
    assert [problem for problem in snapshot.check(config) if problem.severity == "error"] == found
    return found


def place(problem: Problem) -> str:
    """The text that the caret points at."""
    return problem.source[problem.column - 1 :][: problem.width]


def test_a_key_set_without_a_usable_key_is_shown_at_its_setting(tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}))
    config = write(tmp_path, (
        "policies:\n  token: {jwt: {issuer: i, audience: a, keys: jwks.json, algorithms: ES256}}\n"
        "routes:\n  - {name: a, match: {path: /a}, policies: [token], upstream: origin}\n"
        "  - {name: b, match: {path: /b}, policies: [token], upstream: origin}\n"
    ))
    (problem,) = problems_of_build(config)      # once, though two routes use it
    assert problem.line == 7 and place(problem) == "jwks.json"
    assert "no usable key: key 0: its kty is not RSA, EC or OKP" in problem.message
    assert "c2VjcmV0" not in problem.render()


def test_demands_that_only_the_verifier_knows(tmp_path: Path) -> None:
    config = write(tmp_path, (
        "routes:\n  - name: a\n    match: {path: /a}\n    upstream: origin\n    policies:\n"
        f"      - jwt: {{issuer: i, audience: a, algorithms: HS256, secret: {'x' * 40}}}\n"
    ))
    (problem,) = problems_of_build(config)
    assert (problem.line, place(problem)) == (11, "jwt") and "fewer than 8 different bytes" in problem.message


@pytest.mark.parametrize(
    ("module", "source", "reason", "line"),
    [
        ("picky", FAILING, "KeyError: 'no limit 5'", 3),
        ("leaving", LEAVING, "SystemExit: 3", 3),
    ],
)
def test_a_policy_whose_constructor_raises(tmp_path: Path, module: str, source: str, reason: str, line: int) -> None:
    (tmp_path / f"{module}.py").write_text(source)
    more = ", limit: 5" if module == "picky" else ""
    config = write(tmp_path, (
        "routes:\n  - name: a\n    match: {path: /a}\n    upstream: origin\n    policies:\n"
        f"      - python: {{class: '{module}:{module.title()}'{more}}}\n"
    ))
    (problem,) = problems_of_build(config)
    assert (problem.line, place(problem)) == (11, "python") and reason in problem.message
    assert problem.hint == f"it was raised at {tmp_path}/{module}.py:{line}"


def test_a_policy_that_repeats_a_secret_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICKY_LIMIT", "very-secret-value")
    (tmp_path / "picky_of_secret.py").write_text(FAILING)
    config = write(tmp_path, (
        "routes:\n  - {name: a, match: {path: /a}, upstream: origin, policies: [{python: "
        "{class: 'picky_of_secret:Picky', limit: '${env:PICKY_LIMIT}'}}]}\n"
    ))
    (problem,) = problems_of_build(config)
    assert "KeyError: 'no limit ***'" in problem.message and "very-secret-value" not in problem.render()
    compiler._forget_source(config)             # as workers get it: no text, no places, and still no secret
    with pytest.raises(ConfigError) as caught:
        snapshot.build(config, names=Names(), seed=1, version=1)
    assert "very-secret-value" not in str(caught.value)
    assert caught.value.problems[0].place == str(tmp_path / "gateway.yaml")


def test_the_route_with_which_the_trie_cannot_be_built(tmp_path: Path) -> None:
    lines = [f"  - {{name: r{i}, match: {{path: /{i}, methods: [M{i}]}}, upstream: origin}}\n" for i in range(30)]
    (problem,) = problems_of_build(write(tmp_path, "routes:\n" + "".join(lines)))
    assert "more than" in problem.message and "methods beside the usual ones" in problem.message
    limit = int(problem.message.partition("more than ")[2].partition(" ")[0])
    assert problem.line == 7 + limit            # the first route above the limit, and not the last of the file
    assert place(problem).startswith("{")


def test_a_template_that_is_too_deep(tmp_path: Path) -> None:
    deep = "/a" * 200
    config = write(tmp_path, (
        "routes:\n  - {name: good, match: {path: /a}, upstream: origin}\n"
        f"  - {{name: deep, match: {{path: {deep}}}, upstream: origin}}\n"
        "  - {name: after, match: {path: /b}, upstream: origin}\n"
    ))
    (problem,) = problems_of_build(config)
    assert problem.line == 8 and "route 'deep'" in problem.message and "is too long" in problem.message


def test_everything_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_text('{"keys": []}')
    (tmp_path / "picky_at_once.py").write_text(FAILING)
    config = write(tmp_path, (
        "routes:\n"
        "  - {name: a, match: {path: /a}, upstream: origin, policies: [{jwt: {issuer: i, audience: a, keys: jwks.json, algorithms: ES256}}]}\n"
        "  - {name: b, match: {path: /b}, upstream: origin, policies: [{python: {class: 'picky_at_once:Picky', limit: 1}}]}\n"
        f"  - {{name: c, match: {{path: {'/a' * 200}}}, upstream: origin}}\n"
    ))
    assert [problem.line for problem in problems_of_build(config)] == [7, 8, 9]


def test_an_audit_file_that_vanishes_between_check_and_build(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    config = write(tmp_path, (
        "policies:\n  journal: {audit: {file: logs/audit.log}}\n"
        "routes:\n  - {name: a, match: {path: /a}, upstream: origin, policies: [journal]}\n"
    ))
    (tmp_path / "logs").rmdir()
    with pytest.raises(ConfigError) as caught:
        snapshot.build(config, names=Names(), seed=1, version=1)
    (problem,) = caught.value.problems
    assert (problem.line, place(problem)) == (7, "audit")
    assert f"No such file or directory: {tmp_path}/logs/audit.log" in problem.message


def test_check_creates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fine_policy.py").write_text("class Fine:\n    def on_request(self, request): ...\n")
    write(tmp_path, (
        "routes:\n  - {name: a, match: {path: /a}, upstream: origin, policies: [{audit: {file: audit.log}}, "
        "{python: {class: 'fine_policy:Fine'}}]}\n"
    ))
    assert main(["check", "-c", str(tmp_path / "gateway.yaml")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine_policy.py", "gateway.yaml"]
    assert "ok, 1 listener" in capsys.readouterr().out


def test_check_prints_a_build_fault_with_a_caret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picky_cli.py").write_text(FAILING)
    write(tmp_path, (
        "routes:\n  - name: a\n    match: {path: /a}\n    upstream: origin\n    policies:\n"
        "      - python: {class: 'picky_cli:Picky', limit: 5}\n"
    ))
    assert main(["check", "-c", str(tmp_path / "gateway.yaml")]) == 2
    out = capsys.readouterr().out
    assert f"{tmp_path}/gateway.yaml:11:9: the python policy cannot be used: KeyError" in out
    assert "\n     |         ^~~~~~\n     = it was raised at " in out and "1 error" in out


def test_a_key_that_is_left_out_is_a_warning(tmp_path: Path) -> None:
    good = {"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [good, {**good, "kid": "b", "use": "enc"}]}))
    config = write(tmp_path, (
        "routes:\n  - {name: a, match: {path: /a}, upstream: origin, "
        "policies: [{jwt: {issuer: i, audience: a, keys: jwks.json, algorithms: EdDSA}}]}\n"
    ))
    (problem,) = snapshot.check(config)
    assert problem.severity == "warning" and "key 1: its use is not sig" in problem.message and place(problem) == "jwks.json"
    assert snapshot.build(config, names=Names(), seed=1, version=1).version == 1


def test_the_compiling_child_tells_the_place(tmp_path: Path) -> None:
    (tmp_path / "picky_child.py").write_text(FAILING)
    write(tmp_path, (
        "routes:\n  - {name: a, match: {path: /a}, upstream: origin, policies: [{python: {class: 'picky_child:Picky', limit: 5}}]}\n"
    ))
    ours, theirs = compiler.Channel.pair()
    store = new_store()
    try:
        assert compiler.compile_file(tmp_path / "gateway.yaml", 1, 1, Names(), theirs, store) == 0
        message = compiler._await_message(ours)
    finally:
        os.close(store)
        ours.close()
        theirs.close()
    assert message is not None and message["type"] == "refused"
    assert [problem["line"] for problem in message["problems"]] == [7]
