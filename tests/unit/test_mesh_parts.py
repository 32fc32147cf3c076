"""A member's parts without processes: who is admitted, what is believed, when is renewed, what a rule says."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway._speedups.certificates import Certificate, chain_fault, parse_certificates
from gateway._speedups.tls import TlsUpstream
from gateway.mesh import identity as life
from gateway.mesh.assignment import Assignment, OtherBase, Refused, take
from gateway.mesh.authorization import Denials, conditions, make_rule
from gateway.mesh.contact import EnrolError, address_of, read_token
from gateway.mesh.enrol import accept
from gateway.mesh.identity import Identity, due_at, pause
from gateway.mesh.metrics import hop, line
from gateway.mesh.proxy import Surroundings, destinations, endpoints_of, upstream_of
from gateway.mesh.spire import pick
from gateway.mesh.state import State, StateError, owner
from gateway.mesh.units import seconds, share, size
from gateway.mesh.workload_api import AgentError, Shown
from gateway.telemetry.shared import SharedState
from gateway.workload.admission import Revoked, admission, svid_fault
from tests.integration.mesh_kit import Ca, key_pem

ID = "spiffe://bank.test/service/payments"
CA = Ca()


def leaf(*uris: str, **options: Any) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    return parse_certificates(CA.pem(CA.issue(key.public_key(), *uris, **options)).encode())[0]


# -- who is admitted


def test_a_members_certificate_is_admitted() -> None:
    assert admission("bank.test", Revoked({}))(leaf(ID)) is None


@pytest.mark.parametrize(
    ("uris", "options", "why"),
    [
        ([], {}, "not exactly one URI"),
        ([ID, "spiffe://bank.test/service/edge"], {}, "not exactly one URI"),
        (["spiffe://bank.test"], {}, "no SPIFFE id of a workload"),
        (["spiffe://bank.test/"], {}, "no SPIFFE id of a workload"),
        (["spiffe://Bank.test/service/payments"], {}, "no SPIFFE id of a workload"),
        (["spiffe://bank.test/service//payments"], {}, "no SPIFFE id of a workload"),
        (["spiffe://bank.test/service/.."], {}, "no SPIFFE id of a workload"),
        (["spiffe://bank.test:443/service/payments"], {}, "no SPIFFE id of a workload"),
        (["spiffe://bank.test/service/a?b"], {}, "no SPIFFE id of a workload"),
        (["http://bank.test/service/payments"], {}, "no SPIFFE id of a workload"),
        (["spiffe://other.test/service/payments"], {}, "of no service of bank.test"),
        (["spiffe://bank.test/ns/x/sa/y"], {}, "of no service of bank.test"),
        ([ID], {"ca": True}, "an authority's"),
        ([ID], {"usage": False}, "key usage does not say"),
        ([ID], {"extended": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "both sides"),
    ],
)
def test_what_is_no_members_certificate(uris: list[str], options: dict[str, Any], why: str) -> None:
    assert why in (admission("bank.test", Revoked({}))(leaf(*uris, **options)) or "")


def test_no_extended_key_usage_is_no_limit() -> None:
    assert svid_fault(leaf(ID, extended=())) is None


def test_the_deny_list_goes_by_serial_and_by_identity() -> None:
    held = leaf(ID)
    assert Revoked({"serials": [held.serial.upper()]}).holds(held) and Revoked({"identities": [ID]}).holds(held)
    assert Revoked({"serials": ["000" + held.serial.lstrip("0")]}).holds(held)
    assert not Revoked({"serials": [held.serial + "0"], "identities": [ID + "x"]}).holds(held)
    assert "is revoked" in (admission("bank.test", Revoked({"identities": [ID]}))(held) or "")


def test_a_chain_leads_to_its_root_and_to_no_other() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    chain = parse_certificates(CA.pem(CA.issue(key.public_key(), ID)).encode())
    roots, others = parse_certificates(CA.bundle.encode()), parse_certificates(Ca().bundle.encode())
    assert chain_fault(chain, roots) is None
    assert chain_fault(chain, others) is not None and chain_fault(chain[:1], roots) is not None
    assert chain_fault(chain, [*others, *roots]) is None


# -- what is believed

ROOTS = parse_certificates(CA.bundle.encode())


def body(version: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "version": version, "trust_domain": "bank.test", "service": "payments", "issued": 1000 + version, "fresh": 60, "bundle": CA.bundle,
        "revoked": {"serials": [], "identities": []}, "services": {"ledger": {"endpoints": []}},
        "authorization": {"default": "deny", "version": 1, "rules": []}, **changes,
    }  # fmt: skip


def said(what: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "assignment", "version": what["version"], "assignment": what, "signature": CA.seal(what), **more}


def believe(message: dict[str, Any], before: Assignment | None = None) -> Assignment:
    return take(message, before, ROOTS, "bank.test", "payments")


def test_a_signed_assignment_and_a_delta_on_it() -> None:
    first = believe(said(body()))
    after = body(2, services={"fraud": {"endpoints": []}})
    changes = {"services": {"ledger": None, "fraud": {"endpoints": []}}, "issued": after["issued"]}
    delta = {"type": "delta", "version": 2, "base": 1, "changes": changes, "signature": CA.seal(after)}
    second = believe(delta, first)
    assert second.version == 2 and list(second.body["services"]) == ["fraud"]
    assert believe(json.loads(second.dump())).body == second.body
    whole = {**delta, "changes": {**changes, "services": {"fraud": {"endpoints": []}}}, "whole": ["services"]}
    assert believe(whole, first).body == second.body
    with pytest.raises(OtherBase):
        believe({**delta, "base": 7}, first)
    with pytest.raises(OtherBase):
        believe(delta)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda message: message | {"signature": "a.b.c"}, "signature"),
        (lambda message: message | {"signature": None}, "no assignment"),
        (lambda message: message | {"signature": CA.seal(message["assignment"] | {"fresh": 61})}, "signature is wrong"),
        (lambda message: message | {"signature": Ca().seal(message["assignment"])}, "not of this mesh"),
        (lambda message: message | {"version": 2}, "carries an assignment of version 1"),
        (lambda message: {"type": "assignment", "version": 1}, "no assignment"),
        (lambda message: message | {"assignment": []}, "no assignment"),
    ],
)
def test_what_is_not_believed(change: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        believe(change(said(body())))


@pytest.mark.parametrize("changes", [{"service": "edge"}, {"trust_domain": "other.test"}, {"bundle": "nothing"}])
def test_what_is_signed_but_not_for_us(changes: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        believe(said(body(**changes)))


def test_a_service_cannot_sign() -> None:
    what = body()
    issue = CA.issue
    try:
        CA.issue = lambda key, *uris, **options: issue(key, ID, **options)  # type: ignore[method-assign]
        message = said(what)
    finally:
        CA.issue = issue  # type: ignore[method-assign]
    with pytest.raises(Refused, match="not the control plane's"):
        believe(message)


def test_a_version_goes_back_only_when_it_was_issued_later() -> None:
    now = believe(said(body(9)))
    with pytest.raises(Refused, match="older"):
        believe(said(body(3)), now)
    assert believe(said(body(3, issued=5000)), now).version == 3


# -- certificates through their life


class Held:
    """A certificate of which only its dates matter."""

    def __init__(self, begin: int, end: int) -> None:
        self.leaf = type("Leaf", (), {"not_before": begin, "not_after": end, "serial": "1", "uris": [ID]})()
        self.identity = ID

    spent = life.Svid.spent


def test_renewal_is_due_at_half_life_give_or_take_a_tenth() -> None:
    held: Any = Held(0, 86400)
    assert due_at(held, 0) == 43200 and due_at(held, -1) == 38880 and due_at(held, 1) == 47520


def test_pauses_grow_and_are_bounded() -> None:
    assert [pause(failures, 0) for failures in (1, 2, 3, 8, 9, 500)] == [1, 2, 4, 128, 150, 150]
    assert pause(9, 1) == 180 and pause(9, -1) == 120


def test_a_late_renewal_is_told_once_at_each_mark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Identity(State(tmp_path / "s"), {}, lambda svid: None, Held(0, 1000))  # type: ignore[arg-type]
    levels = []
    for now in (100, 599, 600, 650, 700, 900, 1001):
        kept.look(now)
        levels.append(kept.alarm)
    assert levels == [0, 0, 1, 1, 2, 2, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


def test_the_program_that_fails_is_told(tmp_path: Path) -> None:
    outcome = asyncio.run(life.run_enrol({"kind": "renew", "state": str(tmp_path / "s"), "control": "https://127.0.0.1:1", "service": "x"}))
    assert "bundle" in outcome["error"] and outcome["lasting"]


def test_of_several_identities_the_services_own_is_taken() -> None:
    """An agent may hold others for this process, some of them ending alike."""
    others = ("spiffe://bank.test/ns/shop/service/payments", "spiffe://bank.test/service/ledger", ID)
    shown = [Shown(identity, (), b"", ()) for identity in others]
    assert pick(shown, "payments").identity == ID
    with pytest.raises(AgentError, match="not spiffe://TRUST_DOMAIN/service/edge"):
        pick(shown, "edge")


def test_a_full_disk_is_not_called_an_unreachable_control_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    answer = {"svid": CA.pem(CA.issue(key.public_key(), ID)), "bundle": CA.bundle}

    def full(self: State, name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(State, "write", full)
    with pytest.raises(EnrolError, match=r"cannot be written to .*: No space left on device"):
        accept(State(tmp_path / "s"), answer, key_pem(key), "payments")


def test_a_program_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No process to be had, or a new version is just being installed: nothing that a member should end for."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "gone"))
    kept = Identity(State(tmp_path / "s"), {}, lambda svid: None, Held(0, 1000))  # type: ignore[arg-type]
    assert asyncio.run(kept.join({})) is False
    assert "cannot be started: No such file" in kept.error and not kept.lasting and kept.failures == 1


# -- its folder


def test_files_are_their_owners_and_whole(tmp_path: Path) -> None:
    state = State(tmp_path / "a" / "b.state")
    state.write("svid.pem", b"one")
    state.write("svid.pem", b"two")
    assert state.read("svid.pem") == b"two" and state.read("nothing") is None
    assert state.svid.stat().st_mode & 0o777 == 0o600 and state.folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in state.folder.iterdir()] == ["svid.pem"]
    state.svid.chmod(0o640)
    with pytest.raises(StateError, match="others may read"):
        state.read("svid.pem")


def test_a_full_disk_keeps_nobody_from_serving(tmp_path: Path) -> None:
    """What was written before is there: certificate and assignment. Who has the folder is all that is said anew."""
    first, second = State(tmp_path / "state"), State(tmp_path / "state")
    first.lock("sidecar")
    first.unlock()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        second.lock("sidecar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.raises(StateError, match="another process uses it"):
        first.lock("sidecar")
    assert owner(tmp_path / "state", "sidecar") is None, "not the one of before"
    second.unlock()


def test_a_lock_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    (state.folder / "lock").mkdir()
    with pytest.raises(StateError, match="directory"):
        state.lock()


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    os.chmod(tmp_path / "s", 0o755)
    with pytest.raises(StateError, match="chmod 0700"):
        State(tmp_path / "s")


def test_key_and_certificate_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = State(tmp_path / "s")
    mine, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = CA.pem(CA.issue(mine.public_key(), ID)).encode()
    state.write("bundle.pem", CA.bundle.encode())
    state.write("svid.pem", chain + key_pem(other))
    with pytest.raises(StateError, match="not the certificate's"):
        life.load(state)
    state.write("svid.pem", chain + key_pem(mine))
    held = life.load(state)
    assert held is not None and (held.domain, held.service, held.identity) == ("bank.test", "payments", ID)


# -- what is written by people


@pytest.mark.parametrize("text", ["", "nonsense", "e30", "eyJzZXJ2aWNlIjogImEifQ"])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(EnrolError):
        read_token(text)


@pytest.mark.parametrize("text", ["http://a:1", "https://", "a:1", "https://a:1:2", "https://[::1", "https://a:99999", "https://u@a:1", "https://a:0", "https://a:1/path", "https://a:1?x"])
def test_what_is_no_control_plane(text: str) -> None:
    with pytest.raises(EnrolError):
        address_of(text)


def test_where_the_control_plane_is() -> None:
    assert address_of("https://control.bank.test:9700") == ("control.bank.test", 9700) and address_of("https://[::1]:1/") == ("::1", 1)


def test_units() -> None:
    assert [seconds(each) for each in (2, 0.5, "2s", "500ms", "1.5m", "1h")] == [2, 0.5, 2, 0.5, 90, 3600]
    assert [share(each) for each in ("20%", 0.2, "12.5%")] == [0.2, 0.2, 0.125]
    assert [size(each) for each in (5, "64KiB", "1MiB")] == [5, 65536, 1048576]
    for parse in (seconds, share, size):
        for wrong in ("", "x", None, True, "-1s", "1 week"):
            with pytest.raises(ValueError, match="is no "):
                parse(wrong)


def test_settings_of_a_service_as_its_file_says_them() -> None:
    table = SharedState(1, 1024)
    around = Surroundings("127.0.0.1:1", {}, table)
    tls: Any = TlsUpstream(digest=b"x", verify=False)
    one = {"address": "10.0.0.1:1", "weight": 2, "zone": None, "labels": {}}
    for number, said in enumerate((
        {}, {"retries": 2}, {"retries": {"attempts": 2, "on": ["connect-failure", 503], "budget": "20%", "per_try": "1s", "body": "64KiB"}},
        {"retries": {"on": ["reset"], "budget": 0.2, "backoff": {"base": 0.01, "max": 0.1}, "reserve": 5, "idempotency_key": True}},
        {"balance": "round_robin"}, {"balance": {"algorithm": "least_request"}}, {"timeout": "1500ms"},
        {"balance": {"algorithm": "maglev", "maglev": {"key": "client", "load": 150}}}, {"balance": {"maglev": {"key": "source", "load": "125%"}}},
    )):  # fmt: skip
        made = upstream_of(f"s{number}", {"protocol": "http", "endpoints": [one], **said}, tls, around)
        assert [endpoint.address for endpoint in made.endpoints] == ["10.0.0.1:1"]
    for wrong in ({"retries": {"moon": 1}}, {"balance": "moon"}, {"timeout": "soon"}, {"moon": 1}):
        with pytest.raises((ValueError, KeyError)):
            upstream_of("wrong", {"endpoints": [], **wrong}, tls, around)
    assert endpoints_of("s", [one, one, {"address": "ledger.internal:1"}])[0].weight == 2 and len(endpoints_of("s", [one, one])) == 1


def test_rules_that_are_not_understood_are_no_rules() -> None:
    make_rule({"name": "a", "from": ["b"], "methods": ["GET", "PURGE"], "prefix": "/x", "headers": {"a": "b"}, "claims": {"scope": "x"}})
    for wrong in ({"ports": [True]}, {"ports": []}, {"port": 1}, {"methods": []}, {"headers": {"a": 1}}, {"headers": {"a": {"regex": "x"}}}):
        with pytest.raises(ValueError, match=r"."):
            make_rule({"name": "a", "from": ["b"], **wrong})
    assert conditions({"a": "b", "c": {"present": True}, "d": {"present": False}, "e": {"prefix": "f"}}) == [
        ("a", "exact", "b"), ("c", "present", ""), ("d", "absent", ""), ("e", "prefix", "f")
    ]  # fmt: skip


def test_denials_are_counted_within_bounds(caplog: pytest.LogCaptureFixture) -> None:
    kept = Denials()
    for number in range(2000):
        kept.record(f"spiffe://bank.test/service/s{number}", (), "id", "GET", "/", False, 1)
    assert len(kept.counts) == 501 and sum(kept.counts.values()) == 2000
    assert len(caplog.records) < 200


def test_where_an_apps_own_connections_go() -> None:
    found = destinations({"ledger": {"endpoints": [{"address": "10.0.0.7:9101", "labels": {"app-port": "9001"}}, {"address": "[fd00::1]:5"}]}})
    assert found == {("10.0.0.7", 9101): "outbound:ledger", ("10.0.0.7", 9001): "outbound:ledger", ("fd00::1", 5): "outbound:ledger"}


def test_what_two_services_say_of_one_address_leads_to_neither(caplog: pytest.LogCaptureFixture) -> None:
    """Or whoever has one instance of a service could say that another service's app is his, and get its calls."""
    ledger = {"address": "10.0.0.7:9101", "labels": {"app-port": "9001"}}
    mallory = [{"address": "10.0.0.7:9199", "labels": {"app-port": "9001"}}, {"address": "10.0.0.66:9101", "labels": {"app-port": "9001"}}]
    found = destinations({"ledger": {"endpoints": [ledger]}, "payments": {"endpoints": mallory}})
    assert ("10.0.0.7", 9001) not in found
    assert found[("10.0.0.7", 9101)] == "outbound:ledger" and found[("10.0.0.66", 9001)] == "outbound:payments"
    assert [record.services for record in caplog.records] == [["ledger", "payments"]]  # type: ignore[attr-defined]


def test_labels_of_hops() -> None:
    inbound, outbound = hop("inbound>edge", "payments", "bank.test"), hop("outbound>ledger", "payments", "bank.test")
    assert inbound is not None and (inbound["reporter"], inbound["source_workload"], inbound["destination_workload"]) == ("destination", "edge", "payments")
    assert outbound is not None and outbound["destination_principal"] == "spiffe://bank.test/service/ledger"
    assert hop("inbound", "payments", "bank.test") is None and hop("other>x", "payments", "bank.test") is None
    unknown = hop("inbound>unknown", "payments", "bank.test")
    assert unknown is not None and unknown["source_principal"] == "unknown"
    assert line("a", {"b": 'c"\\\n'}, 1) == 'a{b="c\\"\\\\\\n"} 1'
