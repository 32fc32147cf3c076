"""What the documents claim about this tree: their links lead somewhere, their examples load, the tests they name exist."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gateway import snapshot
from gateway.config import findings, load
from tests.integration.pki import Authority

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
POLICIES = (ROOT / "docs" / "policies.md").read_text("utf-8")
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(#[^)\s]*)?\)")
SHAPING = (ROOT / "docs" / "traffic-shaping.md").read_text("utf-8")
QUOTED = re.compile(r"`((?:tests|gateway|docs|deploy|_speedups|script)/[\w./*-]+)`")

HEAD = """\
version: 1
admin: {bind: 127.0.0.1:9900}
listeners: {public: {bind: 127.0.0.1:0}}
upstreams: {origin: {targets: [127.0.0.1:9001]}}
policies:
"""
TOKEN = "  caller: {jwt: {issuer: i, audience: a, algorithms: HS256, secret: a-secret-of-32-bytes-for-the-examples}}\n"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def ids(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text("utf-8")
    targets = [target for target, _ in LINK.findall(text) if "://" not in target]
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_the_files_that_are_named_exist(document: Path) -> None:
    named = set(QUOTED.findall(document.read_text("utf-8")))
    assert sorted(name for name in named if not list(ROOT.glob(name.rstrip("/")))) == []


def test_a_dead_link_and_a_missing_file_would_be_found() -> None:
    assert LINK.findall("see [this](nowhere.md#part) and [that](a/b.md)") == [("nowhere.md", "#part"), ("a/b.md", "")]
    assert QUOTED.findall("in `tests/unit/nothing.py` and `docs/x`") == ["tests/unit/nothing.py", "docs/x"]


def test_every_decision_has_its_parts() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{number:04}" for number in range(1, len(decisions) + 1)]
    for path in decisions:
        text = path.read_text("utf-8")
        assert text.startswith(f"# {path.name[:4]}: ")
        places = [text.find(f"**{part}.**") for part in ("Context", "Decision", "Cost")]
        assert -1 < places[0] < places[1] < places[2], path.name


def modules(folder: Path) -> None:
    """Put the Python examples beside the configuration, under the names that the YAML examples use."""
    sources = blocks(POLICIES, "python")
    for name, source in zip(("policy", "marked"), sources, strict=True):
        (folder / f"{name}.py").write_text(source)


@pytest.mark.parametrize("example", blocks(POLICIES, "yaml"), ids=lambda text: text.partition(":")[0])
def test_every_example_of_a_policy_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    monkeypatch.setenv("PARTNER_SECRET", "0123456789abcdefghijklmnopqrstuv")
    modules(tmp_path)
    ((name, policy),) = YAML(typ="safe").load(example).items()
    rewrite: dict[str, Any] = policy.get("rewrite", {})
    match = "prefix: /api" if "prefix" in rewrite else "path: '/api/{id}'"
    redis = "redis: {url: redis://127.0.0.1:6379}\n" if "quota" in policy or "cluster" in example else ""
    head = HEAD.replace("9001]}", "9001], protocol: grpc}") if "grpc_web" in policy else HEAD
    caller = ["caller"] if not {"jwt", "api_key"} & set(policy) else []
    indented = "".join(f"  {line}" for line in example.splitlines(keepends=True))
    (tmp_path / "gateway.yaml").write_text(
        f"{redis}{head}{TOKEN if caller else ''}{indented}"
        f"routes: [{{name: r, match: {{{match}}}, policies: [{', '.join([*caller, name])}], upstream: origin}}]\n"
    )
    config = load(tmp_path / "gateway.yaml")
    found = [problem.render() for problem in [*findings(config), *snapshot.check(config)]]
    assert len(found) == ("fault" in policy), found     # of which every use is worth a warning


@pytest.mark.parametrize("number", range(len(blocks(SHAPING, "yaml"))))
def test_every_example_of_traffic_shaping_can_be_used(tmp_path: Path, number: int) -> None:
    names = ("payments", "payments-next", "accounts", "shadow")
    upstreams = "".join(f"  {name}: {{targets: [127.0.0.1:{9001 + port}]}}\n" for port, name in enumerate(names))
    head = HEAD.replace("upstreams: {origin: {targets: [127.0.0.1:9001]}}\n", f"upstreams:\n{upstreams}")
    routes = YAML(typ="safe").load(blocks(SHAPING, "yaml")[number])
    for route in routes["routes"]:
        route["policies"] = ["caller", *route.get("policies", [])]
    with (tmp_path / "gateway.yaml").open("w") as file:
        file.write(f"{head}{TOKEN}")
        YAML().dump(routes, file)
    assert load(tmp_path / "gateway.yaml").routes


def test_every_kind_of_policy_has_an_example() -> None:
    from gateway.config.policies import KINDS

    shown = {kind for block in blocks(POLICIES, "yaml") for policy in YAML(typ="safe").load(block).values() for kind in policy}
    assert shown == set(KINDS)


def test_the_python_examples_name_what_the_package_offers() -> None:
    import gateway

    for source in blocks(POLICIES, "python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module == "gateway":
                assert {alias.name for alias in node.names} <= set(gateway.__all__)
    assert "policy" not in sys.modules and "marked" not in sys.modules


GRPC = (ROOT / "docs" / "grpc.md").read_text("utf-8")
HTTP2 = (ROOT / "docs" / "http2.md").read_text("utf-8")


@pytest.mark.parametrize("example", [*blocks(GRPC, "yaml"), *blocks(HTTP2, "yaml")], ids=["calls", "tried", "browsers", "http2"])
def test_the_examples_of_http2_and_grpc_can_be_used(tmp_path: Path, example: str) -> None:
    """With what they leave out: policies that other pages show, upstreams of the page's first example, certificates."""
    authority = Authority("Docs", number=97)
    authority.issue("bank.test").write(tmp_path, "bank")
    (tmp_path / "internal-ca.crt").write_bytes(authority.pem)
    yaml = YAML(typ="safe")
    whole: dict[str, Any] = {
        "version": 1, "listeners": {"public": {"bind": "127.0.0.1:0", "http2": {"clear": True}}},
        "upstreams": yaml.load(blocks(GRPC, "yaml")[0])["upstreams"],
        "routes": [{"name": "all", "match": {"prefix": "/"}, "upstream": "payments"}],
    }  # fmt: skip
    given = yaml.load(example)
    policies = {
        "bank": {"jwt": {"issuer": "i", "audience": "a", "algorithms": "HS256", "secret": "a-secret-of-32-bytes-for-the-examples"}},
        "per-client": {"rate_limit": {"key": "client", "rate": "100/s"}},
        **given.pop("policies", {}),
    }
    used = {name for route in given.get("routes", []) for name in route["policies"]}
    whole |= {**given, "policies": {name: policy for name, policy in policies.items() if name in used}}
    with (tmp_path / "gateway.yaml").open("w") as file:
        yaml.dump(whole, file)
    config = load(tmp_path / "gateway.yaml")
    assert [*findings(config), *snapshot.check(config)] == []
