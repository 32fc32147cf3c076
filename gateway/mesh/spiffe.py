"""Names of the mesh: trust domains, services, and the SPIFFE ids made of both.

Strategy: what a certificate must be is judged in one place for everybody (gateway.workload.admission); here is how ids are written and read.
"""

from __future__ import annotations

import re

from gateway.workload.admission import SERVICE

DOMAIN = re.compile(r"(?=.{1,255}\Z)[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")  # SPIFFE-ID 2.1, without leading or trailing punctuation
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")


def service_id(domain: str, service: str) -> str:
    """Return the id of a service's instances."""
    return f"spiffe://{domain}/service/{service}"


def control_id(domain: str) -> str:
    """Return the id of the control plane: not below /service/, so that no service's certificate can stand for it."""
    return f"spiffe://{domain}/control"


def authority_id(domain: str) -> str:
    """Return the id of a signing certificate: a trust domain without a path (X509-SVID 3.2)."""
    return f"spiffe://{domain}"


def service_of(identity: str, domain: str) -> str | None:
    """Return the service that an id names, None when it is of another trust domain or no service's."""
    match = SERVICE.fullmatch(identity)
    return match["name"] if match and match["domain"] == domain else None


def parse_domain(text: str) -> str:
    """Return a trust domain. Raises ValueError."""
    if not DOMAIN.fullmatch(text):
        raise ValueError("a trust domain is small letters, digits, dots, - and _, such as bank.internal")
    return text
