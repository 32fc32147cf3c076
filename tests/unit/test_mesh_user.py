"""User contexts: what is told, what is believed, and what is not."""

from __future__ import annotations

import base64
import itertools
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gateway._speedups.certificates import parse_certificates, parse_key
from gateway._speedups.token_cache import Principal
from gateway.workload.admission import Revoked, admission
from gateway.workload.user import DEPTH, HEADER, LEEWAY, LIFE, PROOF, Author, Reader, UserError, travelling
from tests.integration.mesh_kit import Ca, key_pem

CA = Ca()
ROOTS = parse_certificates(CA.bundle.encode())
NOW = int(time.time())


def name(service: str) -> str:
    return f"spiffe://bank.test/service/{service}"


def author(service: str, ca: Ca = CA) -> Author:
    key = ec.generate_private_key(ec.SECP256R1())
    return Author(parse_certificates(ca.pem(ca.issue(key.public_key(), name(service))).encode()), parse_key(key_pem(key)))


def reader(service: str, *revoked: str) -> Reader:
    return Reader(name(service), ROOTS, {name("edge")}, admission("bank.test", Revoked({"identities": revoked})), 1)


def user(**changes: Any) -> Principal:
    given: dict[str, Any] = {"subject": "alice", "client": "app", "issuer": "https://auth", "scopes": {"a", "b"}, "claims": {"branch": "zurich", "limit": 5}}
    return Principal(**{**given, "expires": NOW + 3600, "seed": 1, **changes})


EDGE = author("edge")


def token(who: Author = EDGE, to: str = "payments", about: Principal | None = None, proof: str | None = None, now: float = NOW) -> str:
    line, until = who.sign(about or user(), [name(to)], proof, now)
    assert line.startswith(HEADER + b": ") and line.endswith(b"\r\n") and until <= now + LIFE // 2
    return line[len(HEADER) + 2 : -2].decode()


def altered(text: str, **changes: Any) -> str:
    head, payload, seal = text.split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "===")) | changes
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b'=').decode()}.{seal}"


def test_what_is_told_is_believed() -> None:
    found = reader("payments").check(token().encode(), NOW)
    assert (found.subject, found.client, found.issuer, found.scopes) == ("alice", "app", name("edge"), frozenset({"a", "b"}))
    assert dict(found.claims) == {"branch": "zurich", "limit": 5} and found.headers == HEADER + b": " + token_of(found) + b"\r\n"
    assert PROOF in reader("payments").check(token().encode(), NOW, keep=True).claims


def token_of(found: Principal) -> bytes:
    return found.headers.split(b": ")[1].strip()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no token"),
        ("a.b.c", "no token"),
        ("e30.e30.", "no token"),
        (token(to="ledger"), "for somebody else"),
        (token(author("payments")), "may not identify users"),
        (token(author("edge", Ca())), "no member"),
        (token(now=NOW - LIFE - LEEWAY), "has expired"),
        (token(now=NOW + LEEWAY + 1), "not valid yet"),
        (altered(token(), sub="mallory"), "signature is wrong"),
        (altered(token(), exp="soon"), "not what it should be"),
        (altered(token(), iat=True), "not what it should be"),
        (token()[:-3] + "AAA", "signature is wrong"),
        (token(author("other"), proof=token(to="else")), "for somebody else"),
        (token(author("other"), proof=token(to="other"), about=user(subject="mallory")), "more of the user"),
        (token(author("other"), proof=token(to="other"), about=user(scopes={"a", "b", "admin"})), "more of the user"),
        (token(author("other"), proof=token(to="other"), about=user(claims={})), "more of the user"),
        (token(author("other"), proof=token(to="other"), about=user(claims={"branch": "zurich", "limit": 5.0})), "more of the user"),
        (token(author("other"), proof=token(to="other", about=user(claims={"staff": True})), about=user(claims={"staff": 1})), "more of the user"),
        (token(author("other"), proof=token(to="other", now=NOW - LIFE - LEEWAY)), "has expired"),
    ],
)  # fmt: skip
def test_what_is_not_believed(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        reader("payments").check(text.encode(), NOW)


def test_what_is_nested_too_deeply_is_no_token() -> None:
    deep = base64.urlsafe_b64encode(b"[" * 6000).rstrip(b"=").decode()
    with pytest.raises(UserError, match="it is no token"):
        reader("payments").check(f"{deep}.e30.e30".encode(), NOW)


@pytest.mark.parametrize("issued", [10**400, -(10**400)], ids=["ahead", "behind"])
def test_times_that_are_none_are_refused_as_such(issued: int) -> None:
    """Any member can sign these."""
    with pytest.raises(UserError, match="its times are none"):
        reader("payments").check(token(author("other"), now=issued).encode(), NOW)


def test_it_travels_hop_by_hop_and_not_for_ever() -> None:
    hops = [f"s{number}" for number in range(DEPTH + 1)]
    told = token(to=hops[0])
    for here, there in itertools.pairwise(hops):
        reader(here).check(told.encode(), NOW)
        told = token(author(here), to=there, proof=told)
    with pytest.raises(UserError, match="too far"):
        reader(hops[DEPTH]).check(told.encode(), NOW)


def test_a_revoked_author_is_none() -> None:
    with pytest.raises(UserError, match="revoked"):
        reader("payments", name("edge")).check(token().encode(), NOW)


def test_a_context_is_used_no_longer_than_its_user_is_known() -> None:
    assert EDGE.sign(user(expires=NOW + 5), [name("payments")], None, NOW)[1] == NOW + 5


def test_claims_that_travel_are_flat_and_few() -> None:
    claims = {"a": 1, "b": ["x", "y"], "c": {"deep": 1}, "d": [{"deep": 1}], "e": "z" * 3000, "f": None, "sub": "x", "exp": 5, "g": True}
    assert travelling(claims) == {"a": 1, "b": ["x", "y"], "g": True}
