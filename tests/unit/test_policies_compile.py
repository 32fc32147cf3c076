"""From settings to steps: what compiling a policy decides, and what `check` finds before it is compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gateway._speedups.steps import AUDIT_FIELDS
from gateway.config import load
from gateway.config.policies import AUDIT_FIELDS as CONFIGURED_FIELDS
from gateway.config.policies import KINDS, Audit
from gateway.errors import ConfigError
from gateway.policies import COMPILERS, PHASES
from gateway.snapshot import build

ROOT = Path(__file__).resolve().parents[2]


class Names:
    """A table of metric names."""

    def __init__(self) -> None:
        self.names = [""]

    def add(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1


def configuration(folder: Path, policies: str) -> Path:
    path = folder / "edge.yaml"
    path.write_text(
        "version: 1\nlisteners: {public: {bind: 127.0.0.1:0}}\nupstreams: {origin: {targets: [127.0.0.1:9]}}\n"
        f"routes:\n  - name: all\n    match: {{prefix: /}}\n    upstream: origin\n    policies: {policies}\n"
    )
    return path


def steps(folder: Path, policies: str) -> list[str]:
    snapshot = build(load(configuration(folder, policies)), names=Names(), seed=1, version=1)
    found: list[str] = snapshot.routes[0].step_names
    return found


def problems(folder: Path, policies: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(configuration(folder, policies))
    return [problem.render() for problem in caught.value.problems]


def test_every_kind_has_a_compiler() -> None:
    assert set(COMPILERS) == set(KINDS)
    assert PHASES == ("identify", "authorise", "limit", "validate", "transform", "record")


def test_steps_run_in_the_order_of_their_phases(tmp_path: Path) -> None:
    found = steps(tmp_path, (
        "[{rate_limit: {key: ip, rate: 1/s}}, {ip: {deny: [10.0.0.0/8]}}, {scopes: [a]}, {cors: {origins: '*'}}, "
        f"{{api_key: {{keys: [{{client: a, hash: 'sha256:{'0' * 64}'}}]}}}}, {{ip: {{deny: [11.0.0.0/8]}}}}]"
    ))
    assert [name.partition("#")[2] for name in found] == ["3:cors", "4:api_key", "1:ip", "2:scopes", "5:ip", "0:rate_limit"]


def test_the_step_and_the_configuration_know_the_same_fields() -> None:
    assert AUDIT_FIELDS == CONFIGURED_FIELDS


def test_an_unknown_field_is_found_before_it_is_compiled(tmp_path: Path) -> None:
    found = problems(tmp_path, "[{audit: {file: a.jsonl, fields: [time, statsu, whatever]}}]")
    assert len(found) == 2
    assert "did you mean 'status'?" in found[0]
    assert "one of time, worker, seq" in found[1]
    assert all(":8:" in text for text in found)


@pytest.mark.parametrize(("written", "meant"), [
    ("stdout", "/dev/stdout"), ("stderr", "/dev/stderr"), ("/dev/stdout", "/dev/stdout"), ("./stdout", "BASE/stdout"), ("a.jsonl", "BASE/a.jsonl"),
])
def test_the_names_of_descriptors(tmp_path: Path, written: str, meant: str) -> None:
    config = load(configuration(tmp_path, f"[{{audit: {{file: {written}}}}}]"))
    inline = config.routes[0].policies[0].inline
    assert inline is not None
    assert isinstance(inline.settings, Audit)
    assert str(inline.settings.file) == meant.replace("BASE", str(tmp_path))


def test_a_claims_header_is_checked_at_its_place(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/data/contract/jwks.json", tmp_path)
    (found,) = problems(
        tmp_path, "[{jwt: {issuer: a, audience: b, keys: jwks.json, algorithms: [RS256, ES256, EdDSA], headers: {x_user: sub}}}]"
    )
    assert ":8:" in found
    assert "a header for a claim has letters, digits and - only, got 'x_user'" in found


@pytest.mark.parametrize("policy", ["{scopes: [a]}", "{claims: {a: b}}", "{rate_limit: {key: client, rate: 1/s}}"])
def test_a_hook_identifies_nobody(tmp_path: Path, policy: str) -> None:
    """It runs after these, and has no way to say who calls."""
    (tmp_path / "hook_that_looks.py").write_text("class Looks:\n    def on_request(self, request): ...\n")
    (found,) = problems(tmp_path, f"[{{python: {{class: 'hook_that_looks:Looks'}}}}, {policy}]")
    assert ":8:" in found
    assert "without a" in found
