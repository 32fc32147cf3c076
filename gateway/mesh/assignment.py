"""What the control plane tells a member: verified, brought up to date by deltas, kept on disk.

Strategy: nothing unsigned is believed, whoever sent it and wherever it lay. The signature is a JWS (ES256) whose certificate leads to a
root of the bundle that the member has, so that a snapshot read from disk is worth as much as one from the stream. A version never
goes back, except by a whole assignment that was issued later: a control plane restored from a backup counts anew.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from dataclasses import dataclass
from typing import Any

from gateway._speedups.certificates import Certificate, TlsError, chain_fault, parse_certificates
from gateway.mesh.clock import doubt, read
from gateway.workload.admission import control_fault

REPLACED = ("services", "authorization", "revoked", "bundle", "own", "user_authors", "external")  # members that a delta may change
MOST_CERTIFICATES = 6


class Refused(Exception):
    """What came cannot be used; the text is the reason that the control plane is told."""


class OtherBase(Refused):
    """A delta on a version that is not ours: the whole assignment is needed."""


@dataclass(frozen=True)
class Assignment:
    """One version of what a member does, with the signature over it."""

    version: int
    body: dict[str, Any]
    signature: str
    kept: float | None = None  # when it was written down, by this machine's clock; only of what was read from the disk

    @property
    def bundle(self) -> bytes:
        return str(self.body["bundle"]).encode("ascii")

    def dump(self, roots: str | None = None) -> bytes:
        """Return it as it is kept; with the roots by which it was verified, where those and the signer's certificate may be gone before it."""
        kept = {"version": self.version, "assignment": self.body, "signature": self.signature, "kept": time.time()}
        return json.dumps(kept if roots is None else kept | {"roots": roots}).encode()


def canonical(body: dict[str, Any]) -> bytes:
    """The bytes that are signed: sorted, without blanks, UTF-8."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def take(message: dict[str, Any], before: Assignment | None, roots: list[Certificate], domain: str, service: str, at: int = 0) -> Assignment:
    """Return the assignment that a message of the stream (or the file of one) makes of `before`, verified now or `at` a unix time. Raises Refused."""
    try:
        version = message["version"]
        if message.get("type") == "delta":
            if before is None or message["base"] != before.version:
                raise OtherBase(f"a delta on version {message['base']}, here is {before.version if before else 'none'}")
            unknown = set(message["changes"]) - {*REPLACED, "version", "issued", "fresh"}
            if unknown:
                raise Refused(f"a delta changes {', '.join(sorted(unknown))}")
            body = _merged(before.body, message["changes"], version, message.get("whole", ()))
        else:
            body = message["assignment"]
        signature = message["signature"]
        if not isinstance(version, int) or not isinstance(body, dict) or not isinstance(signature, str):
            raise Refused("the message is no assignment")
        verify(body, signature, roots, domain, at)
        _check(body, version, before, domain, service)
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"the message is no assignment: {error!r}") from None
    return Assignment(version, body, signature, read(message.get("kept")))


def _merged(body: dict[str, Any], changes: dict[str, Any], version: int, whole: Any) -> dict[str, Any]:
    """`services` is changed service by service (null: gone) unless it is `whole`, the other members as wholes."""
    merged = {**body, **changes, "version": version}
    if "services" in changes and "services" not in whole:
        services = {**body.get("services", {}), **changes["services"]}
        merged["services"] = {name: service for name, service in services.items() if service is not None}
    return merged


def _check(body: dict[str, Any], version: int, before: Assignment | None, domain: str, service: str) -> None:
    if body["version"] != version:
        raise Refused(f"version {version} carries an assignment of version {body['version']}")
    if body["trust_domain"] != domain or body["service"] != service:
        raise Refused(f"it is for {body['service']} of {body['trust_domain']}, this is {service} of {domain}")
    if before is not None and version < before.version and body["issued"] <= before.body["issued"]:
        raise Refused(f"version {version} is older than {before.version}, which is in force")
    try:
        parse_certificates(body["bundle"].encode("ascii"))
    except (TlsError, UnicodeEncodeError) as error:
        raise Refused(f"the bundle cannot be used: {error}") from None


def verify(body: dict[str, Any], signature: str, roots: list[Certificate], domain: str, at: int = 0) -> None:
    """Check the detached JWS over an assignment against the roots. Raises Refused."""
    try:
        protected, empty, seal = signature.split(".")
        header = json.loads(_bytes(protected))
        certificates = header["x5c"]
        if header.get("alg") != "ES256" or header.get("crit") or empty or not 1 <= len(certificates) <= MOST_CERTIFICATES:
            raise Refused("the signature is not of the kind that is used here")
        pem = "".join(f"-----BEGIN CERTIFICATE-----\n{_lines(each)}-----END CERTIFICATE-----\n" for each in certificates)
        chain = parse_certificates(pem.encode("ascii"))
        signed = f"{protected}.{_text(canonical(body))}".encode("ascii")
        raw = _bytes(seal)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise Refused(f"the signature cannot be read: {error}") from None
    if fault := chain_fault(chain, roots, at):
        raise Refused(f"the signature's certificate is not of this mesh: {fault}{doubt(fault)}")
    if fault := control_fault(chain[0], domain):
        raise Refused(f"the signature is not the control plane's: {fault}")
    if not chain[0].verify(signed, raw):
        raise Refused("the signature is wrong")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _lines(encoded: str) -> str:
    base64.b64decode(encoded, validate=True)
    return "".join(f"{encoded[at : at + 64]}\n" for at in range(0, len(encoded), 64))
