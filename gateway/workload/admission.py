"""Who is a member: the rules of X.509-SVIDs and of revocation, as one function of a certificate that a handshake has verified.

Strategy: OpenSSL has checked signatures, dates and purpose; here is what SPIFFE adds (X509-SVID 2 to 5) and what the mesh's deny list
says. Called once per handshake, with the native Certificate; `cryptography` is not needed for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from gateway._speedups.certificates import Certificate

DIGITAL_SIGNATURE, CERT_SIGN, CRL_SIGN = 0x80, 0x04, 0x02  # KU_* of OpenSSL
SERVER, CLIENT = 0x1, 0x2  # XKU_SSL_*
SERVICE = re.compile(r"spiffe://(?P<domain>[a-z0-9._-]{1,255})/service/(?P<name>[A-Za-z0-9._-]{1,255})")

Admit = Callable[[Certificate], str | None]


def svid_fault(leaf: Certificate) -> str | None:
    """Why a certificate is no X.509-SVID of a workload; None when it is one."""
    if len(leaf.uris) != 1:
        return "not exactly one URI in the certificate"
    uri = leaf.uris[0]
    if len(uri) > 2048 or not re.fullmatch(r"spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+", uri) or re.search(r"/\.{1,2}(/|$)", uri):
        return "the certificate's URI is no SPIFFE id of a workload"
    if leaf.authority or leaf.marked_authority:
        return "the certificate is an authority's"
    usage = leaf.key_usage
    if usage < 0 or not leaf.key_usage_critical or not usage & DIGITAL_SIGNATURE:
        return "its key usage does not say, as critical, that it signs"
    if usage & (CERT_SIGN | CRL_SIGN):
        return "its key may sign certificates or revocation lists"
    if leaf.extended_key_usage >= 0 and leaf.extended_key_usage & (SERVER | CLIENT) != SERVER | CLIENT:
        return "its extended key usage does not hold for both sides"
    return None


def identity_of(leaf: Certificate) -> tuple[str, str]:
    """Return (trust domain, service) of a member's certificate. Raises ValueError when it is none."""
    fault = svid_fault(leaf)
    match = None if fault else SERVICE.fullmatch(leaf.uris[0])
    if match is None:
        raise ValueError(fault or "the certificate names no service of a mesh")
    return match["domain"], match["name"]


class Revoked:
    """The deny list of an assignment: serial numbers and SPIFFE ids."""

    def __init__(self, said: Mapping[str, Collection[str]]) -> None:
        self.serials = frozenset(text.lower().lstrip("0") for text in said.get("serials", ()))
        self.identities = frozenset(said.get("identities", ()))

    def holds(self, leaf: Certificate) -> bool:
        return leaf.serial.lower().lstrip("0") in self.serials or not self.identities.isdisjoint(leaf.uris)


def admission(domain: str, revoked: Revoked, visitor: str | None = None) -> Admit:
    """Return the function that says why a member of `domain` is not let in; "" for the `visitor`, who looks whether somebody answers, no more."""

    def admit(leaf: Certificate) -> str | None:
        if fault := svid_fault(leaf):
            return fault
        match = SERVICE.fullmatch(leaf.uris[0])
        if match is None or match["domain"] != domain:
            if leaf.uris[0] == visitor:
                return ""
            return f"{leaf.uris[0]} is of no service of {domain}"
        if revoked.holds(leaf):
            return f"{leaf.uris[0]} (serial {leaf.serial}) is revoked"
        return None

    return admit


def control_fault(leaf: Certificate, domain: str) -> str | None:
    """Why a certificate under the right root is not the control plane's: any service's is under that root as well, and with SPIRE anybody's."""
    if leaf.uris != (f"spiffe://{domain}/control",):
        return f"it is the certificate of {', '.join(leaf.uris) or 'nobody'}, not the control plane's"
    return svid_fault(leaf)
