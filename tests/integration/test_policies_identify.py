"""jwt, api_key, scopes, claims and ip through a real gateway: who gets in, who does not, and what each of them is told."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.integration.echo import (
    AUDIENCE,
    ISSUER,
    Echo,
    Told,
    bearer,
    claims,
    client,
    config,
    exchange,
    fields_of,
    jwks,
    metric,
    problem,
    rsa_key,
    segment,
    token,
)
from tests.integration.processes import Gateway, eventually

KEYS = {"RS256": "rs", "PS256": "ps", "ES256": "es", "EdDSA": "ed"}
API_KEY = "api-key-that-nobody-guesses-0123456789"
JWT = f"issuer: {ISSUER}, audience: {AUDIENCE}, keys: jwks.json, algorithms: [RS256, PS256, ES256, EdDSA]"
RULES = f"""
policies:
  bank: {{jwt: {{{JWT}, realm: bank}}}}
  exact: {{jwt: {{{JWT}, leeway: 0s}}}}
  silent: {{jwt: {{{JWT}, forward_token: false}}}}
  typed: {{jwt: {{{JWT}, typ: at+jwt}}}}
  named: {{jwt: {{{JWT}, headers: {{x-user-id: sub, bank-tenant-id: tenant, x-groups: groups}}}}}}
  partner:
    api_key:
      keys:
        - {{client: acme, hash: "sha256:{hashlib.sha256(API_KEY.encode()).hexdigest()}", scopes: ["payments:read"]}}
routes:
  - {{name: token, match: {{prefix: /token}}, policies: [bank], upstream: origin}}
  - {{name: exact, match: {{prefix: /exact}}, policies: [exact], upstream: origin}}
  - {{name: silent, match: {{prefix: /silent}}, policies: [silent], upstream: origin}}
  - {{name: typed, match: {{prefix: /typed}}, policies: [typed], upstream: origin}}
  - {{name: named, match: {{prefix: /named}}, policies: [named], upstream: origin}}
  - {{name: scoped, match: {{prefix: /scoped}}, policies: [{{scopes: ["payments:write", "payments:read"]}}, bank], upstream: origin}}
  - {{name: claimed, match: {{prefix: /claimed}}, policies: [bank, {{claims: {{acr: [high, 3], active: true}}}}], upstream: origin}}
  - {{name: key, match: {{prefix: /key}}, policies: [partner], upstream: origin}}
  - {{name: key-write, match: {{prefix: /key-write}}, policies: [partner, {{scopes: ["payments:write"]}}], upstream: origin}}
  - {{name: key-read, match: {{prefix: /key-read}}, policies: [partner, {{scopes: ["payments:read"]}}], upstream: origin}}
  - {{name: both, match: {{prefix: /both}}, policies: [partner, bank], upstream: origin}}
  - {{name: open, match: {{prefix: /open}}, upstream: origin}}
"""


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("identify")
    (folder / "jwks.json").write_text(jwks(*KEYS.items()))
    (folder / "edge.yaml").write_text(config(RULES, echo))
    with Gateway(folder / "edge.yaml") as running:
        yield running
        assert "Traceback" not in running.errors.read_text()
        assert len(running.workers()) == 1


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


def refused(http: httpx.Client, value: str, slug: str, path: str = "/token") -> str:
    """The token is refused with this reason; returns the challenge."""
    response = http.get(path, headers=bearer(value))
    said = problem(response, 401, slug)
    challenge = response.headers["www-authenticate"]
    assert challenge.endswith(f', error="invalid_token", error_description="{said["detail"]}"')
    assert value not in response.text
    return challenge


# -- tokens that are good


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_valid_token_of_each_algorithm_passes(http: httpx.Client, algorithm: str) -> None:
    good = token(algorithm, KEYS[algorithm])
    told = Told(http.get("/token/x", headers=bearer(good)))
    assert told.one("x-auth-subject") == "alice"
    assert told.one("authorization") == f"Bearer {good}"


def test_the_scheme_is_case_insensitive(http: httpx.Client) -> None:
    good = token()
    for scheme in ("bearer", "BEARER", "BeArEr"):
        assert http.get("/token", headers={"Authorization": f"{scheme} {good}"}).status_code == 200


def test_a_second_use_comes_from_the_cache(http: httpx.Client, gateway: Gateway) -> None:
    good = token(sub="cached")

    def counts() -> tuple[float, float, float]:
        results = ("verified", "cached", "refused")
        first, second, third = (metric(gateway, f'crossway_tokens_total{{result="{result}"}}') for result in results)
        return first, second, third

    verified, cached, bad = counts()
    for _ in range(4):
        assert Told(http.get("/token", headers=bearer(good))).one("x-auth-subject") == "cached"
    assert counts() == (verified + 1, cached + 3, bad)
    assert http.get("/token", headers=bearer(good + "A")).status_code == 401
    assert counts() == (verified + 1, cached + 3, bad + 1)


def test_a_token_of_one_policy_is_not_cached_for_another(http: httpx.Client) -> None:
    good = token()
    assert http.get("/token", headers=bearer(good)).status_code == 200
    refused(http, good, "token-type", "/typed")
    assert http.get("/typed", headers=bearer(token(header={"typ": "at+jwt"}))).status_code == 200


def test_the_token_is_kept_from_the_upstream_when_configured_so(http: httpx.Client) -> None:
    told = Told(http.get("/silent", headers=bearer(token())))
    assert told.all("authorization") == []
    assert told.one("x-auth-subject") == "alice"


def test_curl_reaches_the_service_with_its_token(gateway: Gateway) -> None:
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "-d", "{}", "-H", f"Authorization: Bearer {token()}", f"{gateway.addresses['public']}/token"],
        capture_output=True, text=True, check=True, timeout=20,
    )
    said = json.loads(done.stdout)
    assert (said["method"], said["body"]) == ("POST", "{}")


# -- tokens that are not


def test_no_token_at_all(http: httpx.Client) -> None:
    response = http.get("/token")
    problem(response, 401, "token-missing")
    assert response.headers["www-authenticate"] == 'Bearer realm="bank"'     # no error: none was made (RFC 6750 3.1)


def test_every_401_is_answered_without_asking_the_upstream(http: httpx.Client, echo: Echo) -> None:
    before = len(echo.seen)
    http.get("/token")
    http.get("/token", headers=bearer("x.y.z"))
    http.get("/key")
    assert echo.seen[before:] == []


BAD_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"exp": int(time.time()) - 3600}, "token-expired"),
    "no exp": ({"exp": None}, "token-claim"),
    "exp as text": ({"exp": str(int(time.time()) + 600)}, "token-claim"),
    "exp true": ({"exp": True}, "token-claim"),
    "exp in milliseconds": ({"exp": (int(time.time()) + 600) * 1000}, "token-claim"),
    "not yet": ({"nbf": int(time.time()) + 3600}, "token-early"),
    "issued in the future": ({"iat": int(time.time()) + 3600}, "token-early"),
    "another issuer": ({"iss": "https://evil.test"}, "token-issuer"),
    "the issuer's prefix": ({"iss": ISSUER + ".evil.test"}, "token-issuer"),
    "no issuer": ({"iss": None}, "token-issuer"),
    "another audience": ({"aud": "accounts"}, "token-audience"),
    "the audience within another": ({"aud": "payments-test"}, "token-audience"),
    "an empty audience": ({"aud": []}, "token-audience"),
    "nobody": ({"sub": None, "client_id": None}, "token-claim"),
    "a line end in the subject": ({"sub": "alice\r\nx-auth-subject: root"}, "token-claim"),
    "a key that is not proved": ({"cnf": {"x5t#S256": "x"}}, "token-bound"),
}


@pytest.mark.parametrize("case", BAD_CLAIMS)
def test_claims_that_are_wrong(http: httpx.Client, case: str) -> None:
    more, slug = BAD_CLAIMS[case]
    # PyJWT refuses to make some of these itself.
    message = segment({"alg": "RS256", "typ": "JWT", "kid": "rs"}) + "." + segment(claims(**more))
    assert refused(http, sign(message), slug).startswith('Bearer realm="bank", ')


def sign(message: str) -> str:
    from jwt.algorithms import RSAAlgorithm

    return f"{message}.{segment(RSAAlgorithm(RSAAlgorithm.SHA256).sign(message.encode(), rsa_key('rs')))}"


def test_tokens_whose_signature_is_wrong(http: httpx.Client) -> None:
    head, body, tail = token().split(".")
    other = token("RS256", "somebody-else", header={"kid": "rs"})
    refused(http, other, "token-signature")
    refused(http, f"{head}.{segment(claims(sub='root'))}.{tail}", "token-signature")
    refused(http, f"{head}.{body}.", "token-signature")
    refused(http, f"{head}.{body}.{tail}".replace(".", ".A", 1), "token-signature")


def test_the_algorithm_is_the_keys_never_the_tokens(http: httpx.Client) -> None:
    body = segment(claims())
    for name in ("none", "None", "NONE", "nOnE", ""):
        for tail in ("", segment(b"x" * 256)):
            refused(http, f"{segment({'alg': name, 'kid': 'rs'})}.{body}.{tail}", "token-algorithm")
    public = rsa_key("rs").public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), public.public_bytes(Encoding.DER, PublicFormat.PKCS1), b"",
    ):
        message = f"{segment({'alg': 'HS256', 'kid': 'rs'})}.{body}"
        refused(http, f"{message}.{segment(hmac.digest(secret, message.encode(), 'sha256'))}", "token-algorithm")
    refused(http, token("PS256", "ps", header={"kid": "rs"}), "token-key")
    refused(http, token("RS512", "rs"), "token-algorithm")


def test_a_key_that_the_token_brings_along_is_not_used(http: httpx.Client) -> None:
    for extra in ({"jwk": {"kty": "oct", "k": "eA"}}, {"jku": "http://127.0.0.1:9/"}, {"x5u": "http://127.0.0.1:9/"}, {"crit": ["exp"]}):
        refused(http, token(header=extra), "token-header")


@pytest.mark.parametrize("value", [
    ".", "x", "a.b", "a.b.c.d", "....", "a b.c.d", "e30.e30.e30", "%2e%2e", "\"quoted\"", "{}.{}.{}", "eyJ.eyJ.", "=.=.=", "null",
])
def test_what_is_no_token(http: httpx.Client, value: str) -> None:
    response = http.get("/token", headers=bearer(value))
    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["www-authenticate"]


def test_a_token_above_the_size_limit_is_not_even_decoded(http: httpx.Client) -> None:
    refused(http, token(more="x" * 9000), "token-too-large")


def test_a_token_is_taken_from_one_authorization_field_only(gateway: Gateway, http: httpx.Client) -> None:
    good = token()
    for fields in (
        f"Authorization: Bearer {good}\r\nAuthorization: Bearer {good}",
        f"Authorization: Bearer {good}\r\nauthorization: Basic eDp5",
        f"AUTHORIZATION: Basic eDp5\r\nAuthorization: Bearer {good}",
        f"Authorization: Bearer{good}",
        f"Authorization: Bearer {good}, Bearer {good}",
        "Authorization: Basic eDp5",
        "Authorization:",
    ):
        answer = exchange(gateway, f"GET /token HTTP/1.1\r\nHost: a\r\n{fields}\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 401 "), (fields, answer)
        assert len(fields_of(answer, "www-authenticate")) == 1
    problem(http.get(f"/token?access_token={good}"), 401, "token-missing")
    problem(http.get("/token", headers={"Cookie": f"token={good}"}), 401, "token-missing")


def test_a_cached_token_dies_when_it_expires(http: httpx.Client) -> None:
    good = token(exp=int(time.time()) + 2)
    assert http.get("/exact", headers=bearer(good)).status_code == 200
    assert http.get("/exact", headers=bearer(good)).status_code == 200
    eventually(lambda: http.get("/exact", headers=bearer(good)).status_code == 401, "the token's end")
    refused(http, good, "token-expired", "/exact")


# -- what callers may do


def test_scopes_are_demanded_all_and_whole(http: httpx.Client) -> None:
    response = http.get("/scoped", headers=bearer(token(scope="payments:write")))
    said = problem(response, 403, "insufficient-scope")
    assert said["detail"].endswith("payments:read")
    assert response.headers["www-authenticate"] == (
        'Bearer error="insufficient_scope", scope="payments:write payments:read"'
    )
    for scope in ("payments:writer payments:read", "payments:writepayments:read", "", "PAYMENTS:WRITE payments:read"):
        assert http.get("/scoped", headers=bearer(token(scope=scope))).status_code == 403
    assert http.get("/scoped", headers=bearer(token(scope="x payments:read payments:write"))).status_code == 200
    assert http.get("/scoped", headers=bearer(token(scope=["payments:read", "payments:write"]))).status_code == 200
    problem(http.get("/scoped"), 401, "token-missing")          # whatever the order in the file


def test_claims_are_compared_with_their_type(http: httpx.Client) -> None:
    for more, status in (
        ({"acr": "high", "active": True}, 200),
        ({"acr": 3, "active": True}, 200),
        ({"acr": ["low", "high"], "active": True}, 200),
        ({"acr": "3", "active": True}, 403),
        ({"acr": "highest", "active": True}, 403),
        ({"acr": "high", "active": 1}, 403),
        ({"acr": "high", "active": "true"}, 403),
        ({"acr": {"high": 1}, "active": True}, 403),
        ({"acr": [["high"]], "active": True}, 403),
        ({"acr": "high"}, 403),
        ({}, 403),
    ):
        response = http.get("/claimed", headers=bearer(token(**more)))
        assert response.status_code == status, (more, response.text)
    said = problem(http.get("/claimed", headers=bearer(token(acr="high"))), 403, "claim-not-allowed")
    assert "active" in said["detail"]


# -- API keys


def test_an_api_key_names_its_client(http: httpx.Client) -> None:
    told = Told(http.get("/key", headers={"X-API-Key": API_KEY, "X-Auth-Subject": "root"}))
    assert told.one("x-auth-subject") == "acme"
    assert http.get("/key-read", headers={"x-api-key": API_KEY}).status_code == 200
    problem(http.get("/key-write", headers={"x-api-key": API_KEY}), 403, "insufficient-scope")


def test_api_keys_that_are_refused(gateway: Gateway, http: httpx.Client) -> None:
    response = http.get("/key")
    problem(response, 401, "key-missing")
    assert response.headers["www-authenticate"] == 'ApiKey header="x-api-key"'
    for key in ("wrong", API_KEY[:-1], API_KEY + "0", API_KEY.upper(), hashlib.sha256(API_KEY.encode()).hexdigest()):
        response = http.get("/key", headers={"x-api-key": key})
        problem(response, 401, "key-invalid")
        assert response.headers["www-authenticate"] == 'ApiKey header="x-api-key"'
        assert key not in response.text
    for key in ("", "x" * 513):
        problem(http.get("/key", headers={"x-api-key": key}), 401, "key-malformed")
    twice = f"GET /key HTTP/1.1\r\nHost: a\r\nX-Api-Key: {API_KEY}\r\nx-api-key: wrong\r\nConnection: close\r\n\r\n"
    assert b"key-malformed" in exchange(gateway, twice.encode())
    problem(http.get(f"/key?x-api-key={API_KEY}"), 401, "key-missing")


def test_with_a_token_and_a_key_both_are_demanded_and_one_identity_is_forwarded(http: httpx.Client) -> None:
    assert http.get("/both", headers=bearer(token())).status_code == 401
    assert http.get("/both", headers={"x-api-key": API_KEY}).status_code == 401
    told = Told(http.get("/both", headers={**bearer(token()), "x-api-key": API_KEY}))
    assert told.one("x-auth-subject") == "alice"


# -- identity headers


SPELLINGS = ("X-User-Id", "x_user_id", "X-USER_ID", "x.user.id", "X-User.ID", "bank_tenant.id", "BANK-TENANT-ID", "Bank.Tenant_Id",
             "X-Auth-Subject", "x_auth_subject", "X-Groups", "x_groups")


@pytest.mark.parametrize("path", ["/named", "/open", "/key"])
def test_nobody_brings_an_identity_along(gateway: Gateway, path: str) -> None:
    forged = "".join(f"{name}: root\r\n" for name in SPELLINGS)
    request = (
        f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token(tenant='t1')}\r\nX-Api-Key: {API_KEY}\r\n"
        f"{forged}Connection: close, x-user-id, x-auth-subject\r\n\r\n"
    )
    answer = exchange(gateway, request.encode())
    fields = json.loads(answer.partition(b"\r\n\r\n")[2])["fields"]
    assert "root" not in [value for _, value in fields]
    found = {re.sub(r"[^a-z0-9]", "-", name.lower()): value for name, value in fields}
    expected = {"/named": {"x-user-id": "alice", "bank-tenant-id": "t1"}, "/open": {}, "/key": {"x-auth-subject": "acme"}}[path]
    assert {name: value for name, value in found.items() if "user" in name or "tenant" in name or "auth-" in name} == expected


def test_claims_become_headers(http: httpx.Client) -> None:
    told = Told(http.get("/named", headers=bearer(token(tenant=7, groups=["a", "b"]))))
    assert (told.one("x-user-id"), told.one("bank-tenant-id"), told.one("x-groups")) == ("alice", "7", "a,b")
    assert Told(http.get("/named", headers=bearer(token()))).all("bank-tenant-id") == []
    refused(http, token(tenant={"a": 1}), "token-claim", "/named")
    refused(http, token(groups=["a,b"]), "token-claim", "/named")


def test_nothing_secret_is_in_the_log(gateway: Gateway, http: httpx.Client) -> None:
    bad = token("RS256", "somebody-else", header={"kid": "rs"})
    refused(http, bad, "token-signature")
    http.get("/key", headers={"x-api-key": API_KEY})
    text = gateway.errors.read_text() + "".join(gateway.output)
    assert bad.split(".")[2] not in text
    assert API_KEY not in text


def test_the_hash_of_a_key_is_what_is_written_down(gateway: Gateway) -> None:
    assert API_KEY not in Path(gateway.path).read_text()
