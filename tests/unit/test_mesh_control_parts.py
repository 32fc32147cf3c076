"""Parts of the control plane: the file, the authority, assignments and deltas, limits, the store."""

from __future__ import annotations

import asyncio
import itertools
import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from gateway._speedups.certificates import chain_fault, parse_certificates, parse_key
from gateway.config.mesh_load import is_mesh, load_mesh, mesh_findings, mesh_schema
from gateway.config.values import Rate
from gateway.errors import ConfigError
from gateway.mesh import revocation
from gateway.mesh.assign import Assignments, World, content_of, text_frame
from gateway.mesh.assignment import Refused, take
from gateway.mesh.ca import BadRequest, Ca, CaError, read_request
from gateway.mesh.enrol import make_request
from gateway.mesh.identity import Svid, due_at
from gateway.mesh.limit import ADDRESSES, Bucket, Buckets
from gateway.mesh.registry import BadInstance, Registry, judge, read_instance, read_place
from gateway.mesh.report import problems, span
from gateway.mesh.revocation import DenyList, read
from gateway.mesh.sign import Signer
from gateway.mesh.spiffe import control_id, parse_domain, service_id, service_of
from gateway.mesh.store import StoreError, numbered, open_store
from gateway.mesh.traffic import read as read_traffic
from gateway.workload.admission import identity_of, svid_fault

MESH = """\
version: 1
trust_domain: bank.test
services: {edge: {}, payments: {}, ledger: {timeout: 1.5s}, accounts: {}}
authorization:
  rules:
    - {name: edge-to-payments, from: [edge], to: payments}
    - {name: payments-to-ledger, from: [payments], to: ledger, methods: [GET]}
"""


def write(folder: Path, text: str = MESH) -> Path:
    path = folder / "mesh.yaml"
    path.write_text(text)
    return path


# -- the file


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("bank.test", "Bank Test", "2:15", "not a trust domain"),
        ("to: ledger,", "to: leger,", "7:56", "unknown service 'leger'"),
        ("name: payments-to-ledger", "name: edge-to-payments", "7:14", "duplicate rule name"),
        ("from: [edge]", "form: [edge]", "6:32", "unknown key 'form'"),
        ("methods: [GET]", "methods: []", "7:73", "must not be empty"),
        ("methods: [GET]", "path: '/v1/{id}', prefix: /v1", "7:90", "both `path` and `prefix`"),
        ("methods: [GET]", "path: v1", "7:70", "a path template starts with /"),
        ("timeout: 1.5s", "timeout: 1.5", "3:54", "duration without a unit"),
        ("payments: {}", "payments: {split: []}", "3:40", "must not be empty"),
        ("payments: {}", "payments: {split: [{weight: 1}]}", "3:41", "missing key 'labels'"),
        ("payments: {}", "payments: {split: [{labels: {}, weight: 1}]}", "3:50", "must not be empty"),
        ("payments: {}", "payments: {split: [{labels: {version: 2}}]}", "3:60", "expected the value of a label"),
        ("payments: {}", "payments: {split: [{labels: {app-port: '1'}}]}", "3:51", "this label is the mesh's own"),
        ("payments: {}", "payments: {split: [{labels: {version: v1}, weight: 0}]}", "3:40", "the weights add up to 0"),
        ("payments: {}", "payments: {split: [{labels: {version: v1}, weight: -1}]}", "3:73", "must be at least 0"),
        ("payments: {}", "payments: {split: [{labels: {a: b}}, {labels: {a: b}}]}", "3:68", "the same labels twice"),
        ("payments: {}", "payments: {split: [{labels: {a: b}, upstream: x}]}", "3:58", "unknown key 'upstream'"),
        ("payments: {}", "payments: {sticky: client}", "3:41", "`sticky` without a `split`"),
        ("payments: {}", "payments: {split: [{labels: {a: b}}], sticky: me}", "3:68", "expected what a caller is known by"),
        ("payments: {}", "payments: {canary: [{labels: {a: b}, when: {}}]}", "3:65", "neither `headers` nor `cookies`"),
        ("payments: {}", "payments: {canary: [{when: {headers: {x: y}}}]}", "3:42", "missing key 'labels'"),
        ("payments: {}", "payments: {protocol: tcp, split: [{labels: {a: b}}]}", "3:55", "`split` for a service that speaks tcp"),
        ("authorization:", "authorization:\n  user_authors: [edge, egde]", "5:24", "unknown service 'egde'"),
        ("authorization:", "authorization:\n  user_authors: {edge: {}}", "5:17", "expected a list"),
        ("edge: {}", "Edge: {}", "3:12", "not the name of a service"),
        ("ledger: {timeout: 1.5s}", "ledger: {protocol: tcp}", "7:73", "`methods` looks into requests, and ledger speaks tcp"),
        ("ledger: {timeout: 1.5s}", "ledger: {timeout: 1.5s, protocol: tcp}", "3:54", "a tcp service has no answers to wait for"),
        ("ledger: {timeout: 1.5s}", "ledger: {idle: 5m}", "3:51", "`idle` is of tcp services"),
        ("ledger: {timeout: 1.5s}", "ledger: {connections: 5}", "3:58", "`connections` is of tcp services"),
        ("ledger: {timeout: 1.5s}", "ledger: {protocol: detect}", "3:55", "protocols are declared, not detected"),
        ("to: payments}", "to: payments, ports: [0]}", "6:68", "must be at least 1"),
        ("to: payments}", "to: payments, ports: []}", "6:67", "must not be empty"),
        ("authorization:", "certificates: {lifetime: 30d}\nauthorization:", "4:26", "between 1m and 7d"),
        ("authorization:", "networks: {west: {gateway: wset}}\nauthorization:", "4:28", "unknown service 'wset'"),
        ("authorization:", 'revoked: {serials: ["xyz"]}\nauthorization:', "4:21", "not a serial number"),
        ("authorization:", "control: {admin: 0.0.0.0:9}\nauthorization:", "4:18", "not on loopback"),
        ("authorization:", 'control: {state: "mysql://x"}\nauthorization:', "4:18", "not a file or a postgresql:// URL"),
    ],
)
def test_mistakes_have_places(tmp_path: Path, old: str, new: str, place: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_mesh(write(tmp_path, MESH.replace(old, new)))
    found = {f"{problem.line}:{problem.column}": problem.message for problem in raised.value.problems}
    assert place in found and message in found[place], found


def test_one_mistake_is_not_told_as_many(tmp_path: Path) -> None:
    """A mesh's file without its first key is still one; services that are no mapping do not make every rule's names unknown; a gateway's key is known as one."""
    for old, new, message, hint in (
        (MESH.splitlines()[1] + "\n", "", "missing key 'trust_domain'", "add `trust_domain:`"),
        ("authorization:", "listeners: {a: {bind: 127.0.0.1:1}}\nauthorization:", "unknown key 'listeners'", "it is a key of a gateway's file; known here:"),
        (MESH.splitlines()[2], "services: [edge, payments, ledger]", "services: expected a mapping", "write `key: value`"),
    ):
        assert old in MESH
        path = write(tmp_path, MESH.replace(old, new))
        assert is_mesh(path)
        with pytest.raises(ConfigError) as raised:
            load_mesh(path)
        (problem,) = raised.value.problems
        assert message in problem.message and problem.hint.startswith(hint), problem.render()


def test_a_method_that_nobody_sends_is_told(tmp_path: Path) -> None:
    (problem,) = mesh_findings(load_mesh(write(tmp_path, MESH.replace("methods: [GET]", "methods: [GTE, MERGE-ALL]"))))
    assert "'GTE' is no usual method" in problem.message and problem.hint == "did you mean 'GET'?" and problem.line == 7


def test_files_are_beside_the_meshs_file_also_when_nothing_is_said(tmp_path: Path) -> None:
    mesh = load_mesh(write(tmp_path))
    assert mesh.control.ca == tmp_path / "ca" and mesh.control.state == str(tmp_path / "mesh.db")


def test_doubts_are_told(tmp_path: Path) -> None:
    more = "    - {name: again, from: [edge], to: payments, methods: [GET]}\n  default: audit\n"
    more = "    - {name: gets, from: [ledger], to: '*', methods: [GET]}\n" + more
    text = MESH.replace("accounts: {}", "accounts: {protocol: tcp}") + more
    said = [problem.message for problem in mesh_findings(load_mesh(write(tmp_path, text)))]
    assert any("again allows nothing that edge-to-payments" in each for each in said)
    assert any("speaks tcp" in each for each in said) and any(each.startswith("audit") for each in said)


def test_doubts_about_splits_are_told(tmp_path: Path) -> None:
    said = (
        "payments: {split: [{labels: {a: b}}, {labels: {a: b, c: d}}], canary: ["
        "{when: {headers: {x: {present: true}}}, labels: {c: d}}, {when: {headers: {x: y}}, labels: {a: b}}]}"
    )
    found = mesh_findings(load_mesh(write(tmp_path, MESH.replace("payments: {}", said))))
    assert [each.message.partition(":")[0].partition(",")[0] for each in found] == [
        "instances with these labels belong to another split as well", "no request gets here",
    ]  # fmt: skip


def test_members_are_told_of_splits_in_plain_words_that_they_read_back(tmp_path: Path) -> None:
    said = (
        "ledger: {split: [{labels: {version: v1}, weight: 3}, {labels: {version: v2}}], sticky: 'header:X-Tenant',"
        " canary: [{when: {headers: {x-canary: always}, cookies: {beta: {present: true}}}, labels: {version: v2}}]}"
    )
    mesh = load_mesh(write(tmp_path, MESH.replace("ledger: {timeout: 1.5s}", said)))
    content = content_of("payments", World(mesh, 1, "", {}, DenyList()))
    traffic = read_traffic(json.loads(json.dumps(content["services"]["ledger"])))
    assert traffic is not None and [(part.name, part.weight) for part in traffic.splits] == [("version=v1", 3), ("version=v2", 1)]
    assert traffic.sticky == "header:x-tenant"
    assert traffic.canaries[0].headers == (("x-canary", "exact", "always"),) and traffic.canaries[0].cookies == (("beta", "present", ""),)
    assert read_traffic({"protocol": "http"}) is None


def test_a_meshs_file_is_told_from_a_gateways(tmp_path: Path) -> None:
    assert is_mesh(write(tmp_path))
    assert not is_mesh(write(tmp_path, "version: 1\nlisteners: {}\n"))


def test_the_schema_names_everything() -> None:
    schema = mesh_schema()
    assert set(schema["properties"]) == {"version", "trust_domain", "control", "certificates", "services", "external", "authorization", "revoked", "networks"}
    assert "from" in schema["$defs"]["Rule"]["properties"]
    json.dumps(schema)


def test_a_password_is_not_dumped(tmp_path: Path) -> None:
    mesh = load_mesh(write(tmp_path, MESH.replace("authorization:", 'control: {state: "postgresql://me:hunter2@db/mesh"}\nauthorization:')))
    assert "hunter2" not in mesh.model_dump_json() and "hunter2" in mesh.control.state


# -- ids


def test_ids() -> None:
    assert service_of(service_id("bank.test", "payments"), "bank.test") == "payments"
    assert service_of(service_id("other.test", "payments"), "bank.test") is None
    assert service_of(control_id("bank.test"), "bank.test") is None
    with pytest.raises(ValueError, match="trust domain"):
        parse_domain("Bank")


# -- the authority


@pytest.mark.parametrize("lifetime", [60, 600, 86400])
def test_a_certificate_of_any_life_is_renewed_at_about_half_of_it(tmp_path: Path, lifetime: int) -> None:
    ca = Ca(tmp_path / "ca", "bank.test").open()
    text, key = make_request("payments")
    issued, now = parse_certificates(ca.issue(text, "payments", lifetime).chain.encode()), time.time()
    assert issued[0].not_before < now - 1  # another clock may be behind
    svid = Svid(issued, parse_key(key), parse_certificates(ca.bundle.encode()), "bank.test", "payments")
    for draw in (-1, 0, 1):
        assert 0.35 * lifetime < due_at(svid, draw) - now < 0.6 * lifetime


def test_rotation_keeps_every_path_valid_while_generations_overlap(tmp_path: Path) -> None:
    ca = Ca(tmp_path / "ca", "bank.test").open()

    def issued() -> Any:
        return parse_certificates(ca.issue(make_request("payments")[0], "payments", 3600).chain.encode())

    old, old_roots = issued(), parse_certificates(ca.bundle.encode())
    assert identity_of(old[0]) == ("bank.test", "payments") and svid_fault(old[0]) is None
    ca.prepare()
    both = parse_certificates(ca.bundle.encode())
    ca.activate()
    new = issued()
    assert chain_fault(new, old_roots) is None  # by the cross certificate
    assert chain_fault(new, both) is None and chain_fault(old, both) is None
    ca.retire()
    only_new = parse_certificates(ca.bundle.encode())
    assert chain_fault(new, only_new) is None and chain_fault(issued(), only_new) is None
    assert chain_fault(old, only_new) is not None
    assert ca.generations.keys() == {2}
    with pytest.raises(CaError, match="only generation"):
        ca.retire()


def test_the_authority_refuses_what_others_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    Ca(folder, "bank.test").open()
    (folder / "1/issuing.key").chmod(0o640)
    with pytest.raises(CaError, match="chmod 0600"):
        Ca(folder, "bank.test").open()
    (folder / "1/issuing.key").chmod(0o600)
    folder.chmod(0o755)
    with pytest.raises(CaError, match="chmod 0700"):
        Ca(folder, "bank.test").open()


def test_the_authority_is_of_one_trust_domain(tmp_path: Path) -> None:
    Ca(tmp_path / "ca", "bank.test").open()
    with pytest.raises(CaError, match=r"other\.test|the file says"):
        Ca(tmp_path / "ca", "other.test").open()


def test_a_key_in_a_request_is_proved(tmp_path: Path) -> None:
    text, _ = make_request("payments")
    other, _ = make_request("payments")
    read_request(text)
    body, wrong = text.splitlines(), other.splitlines()
    with pytest.raises(BadRequest):
        read_request("\n".join([*body[:-2], wrong[-2], body[-1]]))
    with pytest.raises(BadRequest):
        read_request("x" * 20_000)


# -- assignments


def world(folder: Path, text: str = MESH, *, endpoints: Any = None, deny: DenyList | None = None, policy: int = 1) -> World:
    ca = Ca(folder / "ca", "bank.test").open()
    return World(load_mesh(write(folder, text)), policy, ca.bundle, endpoints or {}, deny or DenyList())


def test_a_delta_makes_the_whole_that_was_signed(tmp_path: Path) -> None:
    ca = Ca(tmp_path / "ca", "bank.test").open()
    roots = parse_certificates(ca.bundle.encode())
    signer = Signer(ca)
    assignments = Assignments(signer.sign)
    at = [{"address": "127.0.0.1:1", "weight": 1, "zone": None, "labels": {}}]
    worlds = [
        world(tmp_path), world(tmp_path, endpoints={"ledger": at}), world(tmp_path, endpoints={"ledger": at * 2}, policy=2),
        world(tmp_path, deny=DenyList(("ab",), ()), endpoints={"ledger": at}),
        world(tmp_path, MESH.replace("from: [payments], to: ledger", "from: [payments], to: accounts")),
    ]  # fmt: skip
    held = None
    kinds = []
    for version, each in enumerate(worlds, 1):
        assignments.put("payments", content_of("payments", each), version)
        message = json.loads(assignments.message("payments", version - 1))
        kinds.append(message["type"])
        held = take(message, held, roots, "bank.test", "payments")
        now = assignments.current("payments")
        assert now is not None and held.body == now.body
    assert kinds[0] == "assignment" and "delta" in kinds
    assert held is not None and set(held.body["services"]) == {"accounts"}
    with pytest.raises(Refused, match="signature is wrong"):
        take({**json.loads(now.whole), "assignment": {**held.body, "fresh": 1e9}}, None, roots, "bank.test", "payments")


def test_who_may_name_users_is_said_and_changes_as_members_of_every_version_take_it(tmp_path: Path) -> None:
    ca = Ca(tmp_path / "ca", "bank.test").open()
    assignments = Assignments(Signer(ca).sign)
    before = content_of("payments", world(tmp_path))
    text = MESH.replace("authorization:", "authorization:\n  user_authors: [accounts]")
    after = content_of("payments", world(tmp_path, text))
    nobody = content_of("payments", world(tmp_path, text.replace("[accounts]", "[]")))
    assert (before["user_authors"], after["user_authors"], nobody["user_authors"]) == (["edge"], ["accounts"], [])
    for version, content in enumerate((before, after), 1):
        assignments.put("payments", content, version)
    message = json.loads(assignments.message("payments", 1))
    assert message["type"] == "assignment" and message["assignment"]["user_authors"] == ["accounts"]


def test_unknown_bases_get_the_whole(tmp_path: Path) -> None:
    assignments = Assignments(lambda body: "x")
    for version in range(1, 20):
        assignments.put("payments", {**content_of("payments", world(tmp_path)), "fresh": version}, version)
    assert json.loads(assignments.message("payments", 0))["type"] == "assignment"
    assert json.loads(assignments.message("payments", 2))["type"] == "assignment"  # forgotten by now
    assert len(assignments.message("payments", 18)) < len(assignments.message("payments", 0))


def test_only_what_concerns_a_service_changes_its_assignment(tmp_path: Path) -> None:
    assignments = Assignments(lambda body: "x")
    before = world(tmp_path)
    for service in ("edge", "payments", "accounts"):
        assignments.put(service, content_of(service, before), 1)
    after = world(tmp_path, endpoints={"ledger": [{"address": "127.0.0.1:1", "weight": 1, "zone": None, "labels": {}}]})
    changed = {service for service in ("edge", "payments", "accounts") if assignments.changed(service, content_of(service, after))}
    assert changed == {"payments"}


def test_audit_shows_every_service(tmp_path: Path) -> None:
    said = content_of("accounts", world(tmp_path, MESH.replace("authorization:", "authorization:\n  default: audit")))
    assert set(said["services"]) == {"edge", "payments", "ledger"} and said["authorization"]["default"] == "audit"


# -- limits, what instances say, revocation


def test_a_bucket_refills() -> None:
    now = [0.0]
    bucket = Bucket(Rate(3, 1.0), lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.34
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] = 100.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_addresses_are_told_apart_and_bounded() -> None:
    buckets = Buckets(Rate(1, 10.0), lambda: 0.0)
    assert buckets.take("a") and not buckets.take("a") and buckets.take("b")
    for number in range(ADDRESSES + 10):
        buckets.take(str(number))
    assert len(buckets._kept) == ADDRESSES


@pytest.mark.parametrize(
    "said",
    [
        {"inbound": "ledger:1"}, {"inbound": "0.0.0.0:1"}, {"inbound": "127.0.0.1"}, {"inbound": 5}, {"labels": []}, {"labels": {"a b": "c"}},
        {"labels": {"a": "x\n"}}, {"labels": {"a": 1}}, {"labels": {str(n): "" for n in range(33)}}, {"zone": "a b"}, {"zone": 3},
    ],
)  # fmt: skip
def test_what_an_instance_says_is_checked(said: dict[str, Any]) -> None:
    with pytest.raises(BadInstance):
        read_place(said)


def test_places_of_instances() -> None:
    assert read_place({"inbound": "[::1]:9", "labels": {"app-port": "9001"}, "zone": "a"}) == ("[::1]:9", {"app-port": "9001"}, "a")
    assert read_place({}) == (None, {}, None)
    assert read_place({"inbound": "0.0.0.0:0"})[0] is None  # an edge: nobody calls it
    for name in ("", "a/b", "x" * 200, None):
        with pytest.raises(BadInstance):
            read_instance(name)


def test_what_can_be_revoked(tmp_path: Path) -> None:
    mesh = load_mesh(write(tmp_path))
    assert read("payments", mesh) == ("service", "payments")
    assert read("spiffe://bank.test/service/ledger", mesh) == ("service", "ledger")
    assert read("0A:BC:DE:F0:12:34", mesh) == ("serial", "abcdef01234")
    for wrong in ("paymnts", "spiffe://other.test/service/ledger", "12"):
        with pytest.raises(ValueError, match="neither|no service"):
            read(wrong, mesh)


# -- the store


def test_the_state_is_the_owners_alone_and_lasting(tmp_path: Path) -> None:
    place = tmp_path / "mesh.db"

    async def use() -> tuple[str, int]:
        store = await open_store(str(place))
        mode = (await store.rows("PRAGMA journal_mode"))[0]["journal_mode"], (await store.rows("PRAGMA synchronous"))[0]["synchronous"]
        with pytest.raises(StoreError):
            await store.many("INSERT INTO replicas (id, started, seen) VALUES (?, 0, 0)", [("a",), ("b",), ("a",)])
        assert await store.rows("SELECT id FROM replicas") == []  # all or none
        await store.close()
        with pytest.raises((StoreError, RuntimeError)):
            await store.rows("SELECT 1")
        return mode

    assert asyncio.run(use()) == ("wal", 2)  # 2: FULL
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_a_clock_that_is_wrong_for_a_while_forgets_no_revocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        store = await open_store(str(tmp_path / "mesh.db"))
        try:
            mesh = load_mesh(write(tmp_path))
            now = time.time()
            await store.run("INSERT INTO certificates VALUES ('abcdef01', 'ledger', 'ledger-1', ?, ?, 1, 'token')", int(now), int(now) + 3600)
            await revocation.revoke(store, revocation.SERIAL, "abcdef01", "stolen")
            monkeypatch.setattr(time, "time", lambda: now + 3 * 86400)
            await Registry(store, "one", 15).clean()
            monkeypatch.setattr(time, "time", lambda: now)
            assert (await revocation.load(store, mesh)).serials == ("abcdef01",)
        finally:
            await store.close()

    asyncio.run(work())


def test_question_marks_are_numbered() -> None:
    assert numbered("a = ? AND b IN (?, ?)") == "a = $1 AND b IN ($2, $3)"


def test_spans_of_time() -> None:
    assert [span(each) for each in (0.4, 61, 600, 7200, 200_000)] == ["0 s", "61 s", "10 min", "2 h 0 min", "2 d"]


# -- who is offered


PORTS = itertools.count(1)


def instances(*unreachable: bool, **more: Any) -> list[dict[str, Any]]:
    row = {"service": "ledger", "present": True, "connected": 1, "draining": 0, "healthy": 1, "labels": "{}", "since": 0.0, "not_after": 0, **more}
    return [{**row, "inbound": f"127.0.0.1:{next(PORTS)}", "instance": "", "unreachable": "no answer" if each else None} for each in unreachable]


def placed(connected: int, since: float, **more: Any) -> dict[str, Any]:
    """An instance at an address at which others may be too."""
    return {**instances(False)[0], "connected": connected, "since": since, "inbound": "127.0.0.1:9", **more}


@pytest.mark.parametrize(
    ("rows", "offered", "states"),
    [
        ([placed(2, 1.0)], [True], ["silent"]),
        ([placed(2, 1.0), placed(1, 2.0)], [False, True], ["gone", "healthy"]),
        ([placed(2, 3.0), placed(1, 2.0)], [False, True], ["gone", "healthy"]),  # who has a stream is there, whoever was heard later
        ([placed(2, 1.0), placed(1, 2.0, healthy=0)], [False, False], ["gone", "unhealthy"]),  # it is that one who would answer
        ([placed(2, 1.0), placed(1, 2.0, unreachable="no answer")], [False, True], ["gone", "unreachable"]),
        ([placed(2, 1.0), placed(2, 2.0)], [False, True], ["gone", "silent"]),
        ([placed(2, 1.0), placed(2, 1.0, not_after=1)], [False, True], ["gone", "silent"]),
        ([placed(1, 1.0), placed(1, 2.0)], [False, True], ["healthy", "healthy"]),
        ([placed(1, 1.0), placed(1, 2.0, healthy=0)], [True, False], ["healthy", "unhealthy"]),  # his word alone takes nobody else out
        ([placed(2, 1.0), placed(1, 2.0, present=False)], [True, False], ["silent", "gone"]),
        ([placed(2, 1.0), placed(1, 2.0, service="accounts")], [True, True], ["silent", "healthy"]),  # looking says who is there
        ([placed(2, 1.0, labels='{"network": "b"}'), placed(1, 2.0)], [True, True], ["silent", "healthy"]),
        ([placed(2, 1.0, inbound=None), placed(1, 2.0, inbound=None)], [False, False], ["silent", "healthy"]),
        ([placed(2, 1.0, unreachable="no answer"), placed(1, 2.0, inbound="127.0.0.1:8")], [False, True], ["unreachable", "healthy"]),
    ],
)
def test_an_address_is_offered_once_and_by_whom_is_there(rows: list[dict[str, Any]], offered: list[bool], states: list[str]) -> None:
    judge(rows, 0.5)
    assert [row["offered"] for row in rows] == offered
    assert [row["state"] for row in rows] == states


def test_a_control_plane_that_went_without_a_word_is_waited_for_until_its_members_can_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member notices by its pings, after 5 s and 15 s more. Taken from its callers before, half of a mesh would be gone for a machine's power."""
    now = 1000.0
    monkeypatch.setattr("gateway.mesh.registry.time.monotonic", lambda: now)

    class Rows:
        async def rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
            return [{"id": "other", "seen": 1.0}]

    async def play() -> list[tuple[float, bool]]:
        nonlocal now
        registry = Registry(Rows(), "own", 15.0)  # type: ignore[arg-type]
        now += 3600
        found = []
        for after in range(200):
            now = 4600.0 + after
            found.append((after, (await registry.hearing())["other"]))
        return found

    found = asyncio.run(play())
    # It gave everybody time first, since it did not listen before.
    assert [after for after, heard in found if heard] == list(range(45))


def test_who_did_not_listen_takes_nobody_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that was away for a minute: all signs are old when it is back, and none of it is their fault."""
    now = 1000.0
    monkeypatch.setattr("gateway.mesh.registry.time.monotonic", lambda: now)

    class Rows:
        async def rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
            return [{"id": "other", "seen": 1.0}]

    async def play() -> list[bool]:
        nonlocal now
        registry = Registry(Rows(), "own", 15.0)  # type: ignore[arg-type]
        found = []
        for step in [1.0] * 44 + [60.0] + [1.0] * 46:
            now += step
            found.append((await registry.hearing())["other"])
        return found

    found = asyncio.run(play())
    assert found == [True] * (44 + 45) + [False] * 2


def test_who_is_not_where_he_says_is_out_however_many_they_are() -> None:
    """A wall does not answer as somebody else: one instance that says many addresses does not make the control plane doubt itself."""
    rows = instances(True, True, True, False, True)
    for row in rows[:3]:
        row["unreachable"] = "there is spiffe://bank.test/service/payments at 127.0.0.1:1"
    assert judge(rows, 0.5) == set()
    assert [row["offered"] for row in rows] == [False, False, False, True, False]
    assert judge(rows[:3], 0.5) == set() and not any(row["offered"] for row in rows[:3])
    assert judge(rows, None) == set() and all(row["offered"] for row in rows), "nobody looks"


@pytest.mark.parametrize(
    ("rows", "most", "offered", "spared"),
    [
        (instances(True, False), 0.5, [False, True], False),
        (instances(True, True, False), 0.5, [True, True, True], True),
        (instances(True), 0.5, [True], True),
        (instances(True), 1.0, [False], False),
        (instances(True, False, False, False), 0.2, [True] * 4, True),
        (instances(True, False), None, [True, True], False),
        (instances(True, True, healthy=0) + instances(True, False), 0.5, [False, False, False, True], False),  # who is ill anyway does not count
    ],
)
def test_never_more_than_a_part_of_a_service_is_taken_out(rows: list[dict[str, Any]], most: float | None, offered: list[bool], spared: bool) -> None:
    assert judge(rows, most) == ({"ledger"} if spared else set())
    assert [row["offered"] for row in rows] == offered
    if most is not None:
        assert [row["state"] == "unreachable" for row in rows] == [row["unreachable"] is not None and bool(row["healthy"]) for row in rows]


# -- frames


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
def test_a_frame_is_read_by_another_library_as_the_text(size: int) -> None:
    from websockets.frames import Frame, Opcode
    from websockets.streams import StreamReader

    text = "x" * size if size < 126 else "ä" + "x" * (size - 2)  # as many bytes
    stream = StreamReader()
    stream.feed_data(text_frame(text))
    stream.feed_eof()
    reading = Frame.parse(stream.read_exact, mask=False)
    with pytest.raises(StopIteration) as done:
        next(reading)
    frame = done.value.value
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.TEXT, True, text.encode())


def test_all_that_are_told_the_same_share_one_frame() -> None:
    made = Assignments(lambda body: "signature")
    body = {"trust_domain": "bank.test", "services": {f"s{number}": {"endpoints": [{"address": f"127.0.0.1:{number}"}]} for number in range(20)}}
    made.put("payments", body, 1)
    made.put("payments", {**body, "services": {**body["services"], "s1": {"endpoints": []}}}, 2)
    assert made.frame("payments", 1) is made.frame("payments", 1) and len(made.frame("payments", 1)) < len(made.frame("payments", 0)) / 2
    assert made.frame("payments", 77) is made.frame("payments", 0)  # unknown here: the whole
    assert made.message("payments", 1).encode() in made.frame("payments", 1)


# -- what somebody should look at


WELL = {"state": "healthy", "offered": True, "refused": None, "reason": None, "seconds_waiting": None, "sent": 7, "not_after": 3600, "unreachable": None, "unreachable_since": None, "seconds_ahead": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"state": "gone", "refused": 7, "not_after": 1}, []),
        ({"refused": 7, "reason": "no such protocol"}, ["REFUSED 7: no such protocol"]),
        ({"seconds_waiting": 12.3}, ["sent 7 12 s ago, no answer yet"]),
        ({"state": "unhealthy"}, ["says that its app does not answer"]),
        ({"not_after": 900}, ["the certificate has expired"]),
        ({"not_after": 1300}, ["the certificate is not renewed: 5 min left"]),
        ({"seconds_ahead": 600}, ["its machine's clock is 10 min ahead of the control plane's"]),
        ({"seconds_ahead": -90000}, ["its machine's clock is 25 h 0 min behind the control plane's"]),
        ({"state": "silent", "since": 700}, ["no stream for 5 min, but it can be reached: offered as it was last. How its app is is not known, and what it was told may be old"]),
        ({"state": "unreachable", "offered": False, "unreachable": "Connection refused", "unreachable_since": 940}, ["cannot be reached: Connection refused (for 60 s)"]),
    ],
)
def test_what_is_to_be_looked_at(change: dict[str, Any], said: list[str]) -> None:
    assert problems({**WELL, **change}, 1000, 0) == said
    if not said:
        assert problems({**WELL, **change}, 1000, None) == []


def test_the_life_of_another_authoritys_certificate_is_not_guessed() -> None:
    assert problems({**WELL, "not_after": 1010}, 1000, None) == []
