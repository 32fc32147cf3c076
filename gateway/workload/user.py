"""The signed context in which members tell each other for which user a request is made: a JWT, one hop long.

Strategy: whoever has identified the user (an edge) signs for the service that it calls; that service's sidecar signs anew for the next,
with the context that it got inside as the proof. So each context has one audience and lives for a minute, nobody can use it elsewhere,
and no service can speak for a user who did not come through it: what it says of the user must be what it was told.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gateway._speedups.certificates import Certificate, PrivateKey, TlsError, chain_fault, parse_certificates
from gateway._speedups.token_cache import Principal

HEADER = b"crossway-user"
LIFE = 60  # seconds
LEEWAY = 30  # seconds that clocks may differ
DEPTH = 3  # contexts inside each other: hops from the edge
CLAIMS_MAX = 2048  # bytes of claims that travel, as JSON
TIMES = 1 << 40  # unix seconds below this are a time
TYPE = "crossway-user+jwt"
REGISTERED = frozenset({"iss", "aud", "exp", "nbf", "iat", "jti", "sub", "client_id", "azp", "scope", "scp", "cnf"})
PROOF = "crossway:context"  # the claim under which a sidecar keeps the context that it got, to pass it on


class UserError(ValueError):
    """A context that is not accepted; the text says why."""


@dataclass(frozen=True)
class Author:
    """Who signs: a member's certificate and its key."""

    chain: list[Certificate]
    key: PrivateKey

    def sign(self, principal: Principal, audiences: Collection[str], proof: str | None = None, now: float | None = None) -> tuple[bytes, int]:
        """Return the header line that tells `audiences` of the user, and until when it should be used."""
        issued = int(time.time() if now is None else now)
        header = {"alg": "ES256", "typ": TYPE, "x5c": [base64.b64encode(each.der).decode("ascii") for each in self.chain]}
        payload: dict[str, Any] = {
            "iss": self.chain[0].uris[0], "aud": sorted(audiences), "iat": issued, "exp": issued + LIFE, "sub": principal.subject,
            "client": principal.client, "scope": " ".join(sorted(principal.scopes)), "claims": travelling(principal.claims),
        }  # fmt: skip
        if proof is not None:
            payload["proof"] = proof
        signed = f"{_text(_dump(header))}.{_text(_dump(payload))}"
        token = f"{signed}.{_text(self.key.sign(signed.encode('ascii')))}"
        until = min(issued + LIFE // 2, principal.expires)
        return HEADER + b": " + token.encode("ascii") + b"\r\n", until


def travelling(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims that go along: flat ones, as many as there is room for, in the order of their names."""
    found: dict[str, Any] = {}
    room = CLAIMS_MAX
    for name in sorted(claims):
        value = list(claims[name]) if isinstance(claims[name], (tuple, list)) else claims[name]
        flat = value if isinstance(value, list) else [value]
        if name in REGISTERED or name == PROOF or not all(isinstance(each, (str, int, float, bool)) for each in flat):
            continue
        cost = len(_dump({name: value}))
        if cost <= room:
            room -= cost
            found[name] = value
    return found


@dataclass(frozen=True)
class Reader:
    """What a member needs to believe a context. `firsts`: SPIFFE ids of those who may identify users, the edges."""

    identity: str
    roots: list[Certificate]
    firsts: Collection[str]
    refused: Callable[[Certificate], str | None]  # as gateway.workload.admission makes it
    seed: int

    def check(self, token: bytes, now: float | None = None, *, keep: bool = False) -> Principal:
        """Return whom a context names. With `keep` the principal carries the context, to be passed on. Raises UserError."""
        try:
            text = token.decode("ascii")
        except UnicodeDecodeError:
            raise UserError("it is no token") from None
        said = self._verified(text, self.identity, time.time() if now is None else now, DEPTH)
        claims = {**said["claims"], **({PROOF: text} if keep else {})}
        return Principal(
            subject=said["sub"], client=said["client"], issuer=said["iss"], scopes=frozenset(said["scope"].split()), claims=claims,
            expires=said["exp"] + LEEWAY, seed=self.seed, headers=b"" if keep else HEADER + b": " + token + b"\r\n",
        )  # fmt: skip

    def _verified(self, token: str, audience: str, now: float, depth: int) -> dict[str, Any]:
        if depth == 0:
            raise UserError("it has come too far from the edge")
        header, said, signed, seal = _parts(token)
        chain = _chain(header)
        if fault := chain_fault(chain, self.roots) or self.refused(chain[0]):
            raise UserError(f"its author is no member: {fault}")
        if not chain[0].verify(signed, seal):
            raise UserError("its signature is wrong")
        if said["iss"] != chain[0].uris[0]:
            raise UserError("it names another author than its certificate")
        if audience not in said["aud"]:
            raise UserError("it is for somebody else")
        if said["exp"] - said["iat"] > LIFE:
            raise UserError("it lives for too long")
        if now < said["iat"] - LEEWAY:
            raise UserError(f"it is not valid yet, for {said['iat'] - now:.0f} s by this machine's clock: that one or its author's is wrong")
        if now >= said["exp"] + LEEWAY:
            raise UserError(f"it has expired, {now - said['exp']:.0f} s ago by this machine's clock; a new one is right only where the clocks are")
        if "proof" in said:
            # The author of this one was the audience of the one inside, and says the same of the user.
            inner = self._verified(said["proof"], said["iss"], now, depth - 1)
            # As text: 1, 1.0 and true are equal here, and are not the same to a rule.
            if any(json.dumps(said[name], sort_keys=True) != json.dumps(inner[name], sort_keys=True) for name in ("sub", "client", "scope", "claims")):
                raise UserError("it says more of the user than its author was told")
        elif said["iss"] not in self.firsts:
            raise UserError("its author may not identify users")
        return said


KINDS = {"iss": str, "aud": list, "sub": str, "client": str, "scope": str, "claims": dict, "iat": int, "exp": int}


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, payload, what is signed, the signature. Raises UserError."""
    try:
        first, second, third = token.split(".")
        header, said = json.loads(_bytes(first)), json.loads(_bytes(second))
        if header["alg"] != "ES256" or header["typ"] != TYPE or "crit" in header:
            raise UserError("it is of another kind")
        for name, kind in KINDS.items():
            if type(said[name]) is not kind:
                raise UserError(f"its {name} is not what it should be")
        if not all(0 <= said[name] < TIMES for name in ("iat", "exp")):
            raise UserError("its times are none")
        if not isinstance(said.get("proof", ""), str):
            raise UserError("its proof is not what it should be")
        return header, said, f"{first}.{second}".encode("ascii"), _bytes(third)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise error if isinstance(error, UserError) else UserError("it is no token") from None


def _chain(header: Mapping[str, Any]) -> list[Certificate]:
    try:
        encoded = header["x5c"]
        if not isinstance(encoded, list) or not 1 <= len(encoded) <= 4:
            raise UserError("its certificate is missing")
        pem = ""
        for each in encoded:
            base64.b64decode(each, validate=True)
            lines = "\n".join(each[at : at + 64] for at in range(0, len(each), 64))
            pem += f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"
        return parse_certificates(pem.encode("ascii"))
    except (KeyError, TypeError, TlsError, binascii.Error, UnicodeEncodeError):
        raise UserError("its certificate cannot be read") from None


def _dump(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
