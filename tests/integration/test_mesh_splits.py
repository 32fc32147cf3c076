"""Splits and canaries of a service by its instances' labels, as sidecars and an edge deal requests out."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

from gateway.cli import main
from tests.integration.control_kit import ControlProcess
from tests.integration.mesh_kit import Control, Sidecar, free_port
from tests.integration.processes import PATIENCE, Gateway, QuietServer, eventually, request

V1, V2 = {"labels": {"version": "v1"}}, {"labels": {"version": "v2"}}
LABELS: dict[str, dict[str, str]] = {"one": {"version": "v1"}, "two": {"version": "v2", "tier": "gold"}, "bare": {}}
ASKED = {"when": {"headers": [["x-canary", "exact", "always"]], "cookies": []}}


class Named:
    """An app that answers with its name."""

    def __init__(self, name: str) -> None:
        self.paths: list[str] = []
        paths = self.paths

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                paths.append(self.path)
                body = json.dumps({"app": name}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = QuietServer(("127.0.0.1", 0), Answer)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def ask(port: int, host: str = "ledger", path: str = "/v1/x", **headers: str) -> tuple[int, str]:
    """Status and the name of the app that answered."""
    status, _, body = request(port, path, headers={"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}})
    return status, str(json.loads(body)["app"]) if status == 200 else ""


def many(port: int, count: int = 60, **options: str) -> Counter[str]:
    """Who answered how many of `count` requests, none of which failed."""
    found = [ask(port, **options) for _ in range(count)]
    assert {status for status, _ in found} == {200}, Counter(found)
    return Counter(name for _, name in found)


class Estate:
    """payments, which calls, and instances of ledger with and without labels."""

    def __init__(self, control: Control, stack: contextlib.ExitStack) -> None:
        self.control = control
        self.ledgers: dict[str, Sidecar] = {}
        for name, labels in (("one", ("version=v1",)), ("two", ("version=v2", "tier=gold")), ("bare", ())):
            app = stack.enter_context(Named(name))
            options = [word for label in labels for word in ("--label", label)]
            self.ledgers[name] = stack.enter_context(Sidecar(control, "ledger", app.port, *options, state=f"{name}.state"))
        own = stack.enter_context(Named("payments"))
        self.tell(["one", "two", "bare"])
        self.payments = stack.enter_context(Sidecar(control, "payments", own.port, "--label", "version=p7"))

    def tell(self, there: list[str], **settings: Any) -> None:
        """Say which instances there are and how requests are dealt out."""
        rows = [{"address": f"127.0.0.1:{self.ledgers[name].inbound}", "weight": 1, "zone": None, "labels": LABELS[name]} for name in there]
        self.control.services["ledger"] = {"protocol": "http", "timeout": "5s", "balance": "round_robin", "endpoints": rows, **settings}
        self.control.change()
        self.control.settled()


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    made.rules = [{"name": "all", "from": ["payments", "edge"], "to": "ledger"}]
    yield made
    made.stop()


@pytest.fixture
def estate(control: Control) -> Iterator[Estate]:
    with contextlib.ExitStack() as stack:
        yield Estate(control, stack)


def test_a_split_deals_by_labels_and_follows_its_weights_without_a_failed_request(estate: Estate) -> None:
    port = estate.payments.outbound
    assert set(many(port)) == {"one", "two", "bare"}  # no split: all instances are alike
    estate.tell(["one", "two", "bare"], split=[{**V1, "weight": 50}, {**V2, "weight": 50}])
    assert set(many(port)) == {"one", "two"}  # who carries no label of a split gets nothing
    stop, failed, asked = threading.Event(), [], 0

    def load() -> None:
        nonlocal asked
        while not stop.is_set():
            status, _ = ask(port)
            asked += 1
            if status != 200:
                failed.append(status)

    thread = threading.Thread(target=load)
    thread.start()
    for weights in ((100, 0), (1, 99), (0, 1), (50, 50), (100, 0)):
        estate.tell(["one", "two", "bare"], split=[{**V1, "weight": weights[0]}, {**V2, "weight": weights[1]}])
        before = asked
        eventually(lambda before=before: asked >= before + 20, "requests under these weights")  # type: ignore[misc]
    stop.set()
    thread.join(PATIENCE)
    assert not failed and many(port) == {"one": 60}
    estate.tell(["one", "two", "bare"])
    assert set(many(port)) == {"one", "two", "bare"}


def test_a_caller_sticks_to_his_part(estate: Estate) -> None:
    estate.tell(["one", "two"], split=[{**V1, "weight": 50}, {**V2, "weight": 50}], sticky="header:x-tenant")
    port = estate.payments.outbound
    homes = {}
    for tenant in ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"):
        found = many(port, 6, x_tenant=tenant)
        assert len(found) == 1, found
        homes[tenant] = next(iter(found))
    assert set(homes.values()) == {"one", "two"}
    # A part that grows only draws callers in.
    estate.tell(["one", "two"], split=[{**V1, "weight": 50}, {**V2, "weight": 100}], sticky="header:x-tenant")
    for tenant, home in homes.items():
        if home == "two":
            assert many(port, 3, x_tenant=tenant) == {"two": 3}


def test_a_canary_takes_what_asks_for_it_and_the_rest_goes_elsewhere(estate: Estate) -> None:
    estate.tell(["one", "two", "bare"], canary=[{**V2, **ASKED}])
    port = estate.payments.outbound
    assert many(port, 20, x_canary="always") == {"two": 20}
    assert set(many(port)) == {"one", "bare"}
    # Without an instance of its own its requests go where the others go; nobody else gets instances that are the canary's.
    estate.tell(["one", "bare"], canary=[{**V2, **ASKED}])
    assert set(many(port, 40, x_canary="always")) == {"one", "bare"}
    estate.tell(["two"], canary=[{**V2, **ASKED}])
    assert ask(port, x_canary="always") == (200, "two") and ask(port)[0] == 503


def test_the_share_of_a_part_without_instances_goes_to_the_others(estate: Estate) -> None:
    port = estate.payments.outbound
    halves = [{**V1, "weight": 1}, {**V2, "weight": 1}]
    estate.tell(["one", "bare"], split=halves)
    assert many(port) == {"one": 60}
    line = eventually(lambda: estate.payments.logged("a part of a service has no instance: what would go there goes to the other parts"), "the log")[0]
    assert (line["service"], line["part"]) == ("ledger", "version=v2")
    estate.tell(["two", "bare"], split=halves)
    assert many(port) == {"two": 60}
    # Whoever was given no share gets none, also when nobody else is there.
    estate.tell(["two", "bare"], split=[{**V1, "weight": 1}, {**V2, "weight": 0}])
    assert ask(port)[0] == 503
    estate.tell(["one", "two"], split=halves)
    assert set(many(port)) == {"one", "two"}


def test_a_part_whose_instances_do_not_answer_loses_its_share_though_they_are_registered(estate: Estate) -> None:
    port = estate.payments.outbound
    estate.tell(["one", "two"], split=[{**V1, "weight": 1}, {**V2, "weight": 1}])
    assert set(many(port)) == {"one", "two"}
    estate.ledgers["two"].stop(9)
    eventually(lambda: all(ask(port) == (200, "one") for _ in range(20)), "twenty answers in a row")


def test_metrics_name_the_versions(estate: Estate) -> None:
    estate.tell(["one", "two"], split=[{**V1, "weight": 1}, {**V2, "weight": 0}], canary=[{**V2, **ASKED}])
    many(estate.payments.outbound, 3)
    many(estate.payments.outbound, 2, x_canary="always")

    def counted(sidecar: Sidecar, *wanted: str) -> float:
        lines = [line for line in sidecar.page("/metrics").splitlines() if line.startswith("istio_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(each in line for each in wanted))

    eventually(lambda: counted(estate.payments, 'source_version="p7"', 'destination_version="v1"') == 3, "the requests to v1")
    eventually(lambda: counted(estate.payments, 'source_version="p7"', 'destination_version="v2"') == 2, "the requests to v2")
    eventually(lambda: counted(estate.ledgers["two"], 'reporter="destination"', 'destination_version="v2"') == 2, "what v2 counts itself")


def test_what_a_member_does_not_understand_refuses_the_assignment(estate: Estate) -> None:
    port = estate.payments.outbound
    estate.control.settled()
    before = estate.control.version
    estate.control.services["ledger"]["split"] = [{**V1, "weight": 1, "moon": "full"}]
    estate.control.change()
    refused = eventually(lambda: estate.control.of("payments", "nack"), "the refusal")
    assert "moon" in refused[-1]["reason"] and estate.control.acked("payments") == before
    assert set(many(port)) == {"one", "two", "bare"}


EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", token: {token}, state: edge.state}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  ledger: {{service: ledger, balance: round_robin}}
  other: {{targets: ["127.0.0.1:{other}"]}}
routes:
  - {{name: books, match: {{prefix: /v1}}, upstream: ledger}}
  - {{name: copied, match: {{prefix: /v3}}, upstream: ledger, mirror: {{upstream: other}}}}
  - {{name: both, match: {{prefix: /v2}}, split: [{{upstream: ledger, weight: 1}}, {{upstream: other, weight: 1}}]}}
"""


def test_an_edge_deals_out_as_the_mesh_says(estate: Estate) -> None:
    control = estate.control
    split = [{**V1, "weight": 1}, {**V2, "weight": 1}]
    with Named("other") as other:
        path = control.folder / "edge.yaml"
        path.write_text(EDGE.format(control=control.url, token=control.token("edge"), other=other.port))
        with Gateway(path) as edge:
            port, admin = urlsplit(edge.addresses["public"]).port or 0, urlsplit(edge.addresses["admin"]).port or 0
            eventually(lambda: control.acked("edge") == control.version, "the edge's acknowledgement")
            assert set(many(port)) == {"one", "two", "bare"}
            estate.tell(["one", "two", "bare"], split=split, canary=[{"labels": {"tier": "gold"}, **ASKED}])
            eventually(lambda: many(port, 10, x_canary="always") == {"two": 10} and set(many(port, 20)) <= {"one", "two"}, "the split")
            assert set(many(port)) == {"one", "two"}
            # Behind a split of the route's own, the mesh's is one step further.
            assert set(many(port, 120, path="/v2/x")) == {"one", "two", "other"}
            assert set(many(port, path="/v3/x")) == {"one", "two"}
            eventually(lambda: other.paths.count("/v3/x") == 60, "the copies")

            def versions() -> set[str]:
                lines = request(admin, "/metrics")[2].decode().splitlines()
                found = [line for line in lines if line.startswith("istio_requests_total{") and 'destination_workload="ledger"' in line]
                return {line.partition('destination_version="')[2].partition('"')[0] for line in found}

            eventually(lambda: {"v1", "v2"} <= versions(), "the versions in the edge's metrics")
            # An instance that leaves takes nobody's requests with it; weights move without one that fails.
            estate.tell(["one", "bare"], split=split)
            eventually(lambda: many(port, 30) == {"one": 30}, "v1 alone")
            estate.tell(["one", "two"], split=[{**V1, "weight": 0}, {**V2, "weight": 1}])
            eventually(lambda: many(port, 30) == {"two": 30}, "v2 alone")
        with Gateway(path) as edge:  # it begins with what it knew
            assert many(urlsplit(edge.addresses["public"]).port or 0, 20) == {"two": 20}


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command prints."""
    monkeypatch.setattr("sys.argv", ["crossway", *words])
    capsys.readouterr()
    assert main() == 0
    return capsys.readouterr().out


def test_routes_and_explain_show_the_meshs_choice(estate: Estate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    control, file = estate.control, estate.control.folder / "edge.yaml"
    file.write_text(EDGE.format(control=control.url, token=control.token("edge"), other=1))

    def explain(path: str, *more: str) -> list[str]:
        return shown(capsys, monkeypatch, "explain", "GET", path, "-c", str(file), *more).splitlines()

    # Before it has joined, and wherever its state is not, nobody can know.
    assert "how it divides ledger is not known here: " in "\n".join(explain("/v1/x")) and "edge.state holds no certificate" in shown(capsys, monkeypatch, "routes", "-c", str(file))
    with Gateway(file):
        eventually(lambda: control.acked("edge") == control.version, "the edge's acknowledgement")
        assert "mesh      service ledger, all instances alike" in explain("/v1/x")
        split = [{**V1, "weight": 19}, {**V2, "weight": 1}]
        estate.tell(["one", "bare"], split=split, sticky="header:x-tenant", canary=[{"labels": {"tier": "gold"}, **ASKED}])
        # The edge joins by one stream and goes on by another one: between the two it hears nothing.
        eventually(lambda: any("version=v1 95%" in line for line in explain("/v1/x")), "the word of the split")
        table = shown(capsys, monkeypatch, "routes", "-c", str(file))
        assert "ledger in the mesh: version=v1 95%, version=v2 5% (sticky by header:x-tenant)" in table
        assert "ledger in the mesh: tier=gold if header x-canary = always" in table and "not known" not in table
        one = f"127.0.0.1:{estate.ledgers['one'].inbound}"
        drawn = explain("/v1/x")
        assert f"mesh      ledger: version=v1 95%   ({one})" in drawn
        assert "mesh      ledger: version=v2 5%   (no instance: what would go there goes to the other parts)" in drawn
        assert "mesh      ledger: sticky by header:x-tenant, which this request does not say: it is drawn" in drawn
        assert "mesh      ledger: tier=gold, header x-canary = always   (no instance: what would go there goes to the other parts)" in explain("/v1/x", "-H", "x-canary: always")
        # Of two upstreams of the route's own split, one is divided by the mesh; the other is none of its business.
        both = explain("/v2/x")
        assert [line.split()[0] for line in both if line.startswith(("split", "mesh"))] == ["split", "split", "mesh", "mesh", "mesh"]
        # Who sticks is told where, and comes there.
        estate.tell(["one", "two"], split=[{**V1, "weight": 1}, {**V2, "weight": 1}], sticky="header:x-tenant")
        eventually(lambda: any("version=v1 50%" in line for line in explain("/v1/x")), "the word of the new weights")
        for tenant in ("a", "b", "c", "d", "e"):
            (line,) = [line for line in explain("/v1/x", "-H", f"x-tenant: {tenant}") if line.startswith("mesh")]
            part = re.fullmatch(r"mesh      ledger: (version=v[12]), sticky by header:x-tenant   \(.*\)", line)
            assert part is not None, line
            eventually(lambda: set(many(estate.payments.outbound, 5, x_tenant=tenant)) == {{"version=v1": "one", "version=v2": "two"}[part[1]]}, "the same part")  # noqa: B023
        facts = json.loads(shown(capsys, monkeypatch, "routes", "--json", "-c", str(file)))
        said = next(each for each in facts if each["name"] == "both")["mesh"]
        assert set(said) == {"ledger"} and [each["labels"] for each in said["ledger"]["split"]] == ["version=v1", "version=v2"]


def test_the_control_plane_says_what_its_file_says(tmp_path: Path) -> None:
    with (
        Named("one") as one, Named("two") as two, ControlProcess(tmp_path) as control,
        Sidecar(control, "ledger", one.port, "--label", "version=v1", state="one.state"),  # type: ignore[arg-type]
        Sidecar(control, "ledger", two.port, "--label", "version=v2", state="two.state"),  # type: ignore[arg-type]
        Sidecar(control, "payments", free_port(), wait=False) as payments,  # type: ignore[arg-type]
    ):  # fmt: skip
        def answered(**headers: str) -> Counter[str]:
            with contextlib.suppress(OSError):
                return Counter(name for _, name in (ask(payments.outbound, **headers) for _ in range(20)))
            return Counter()

        eventually(lambda: set(answered()) == {"one", "two"}, "both instances")
        line = "  ledger: {protocol: http, timeout: 2s, retries: {on: [connect-failure], budget: 20%}}"
        control.edit(line, line[:-1] + ", balance: round_robin, split: [{labels: {version: v1}}], canary: [{when: {headers: {x-canary: {present: true}}}, labels: {version: v2}}]}")
        eventually(lambda: answered() == {"one": 20}, "v1 alone")
        assert answered(x_canary="1") == {"two": 20}
        control.edit("split: [{labels: {version: v1}}]", "split: [{labels: {version: v1}, weight: 0}, {labels: {version: v2}, weight: 100}]")
        eventually(lambda: answered() == {"two": 20}, "v2 alone")
        control.edit("weight: 100", "weight: 0")
        refused = eventually(lambda: control.logged("the mesh's file is refused, the old one goes on"), "the refusal of a file without a weight")
        assert "the weights add up to 0" in str(refused[-1])
        assert answered() == {"two": 20}
