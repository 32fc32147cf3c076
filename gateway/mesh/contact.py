"""Whom a member of the mesh speaks to: the control plane's address, how it is known by its certificate, and the token that names both.

Strategy: what enrol.py and the stream share, and nothing that makes keys or speaks HTTP: a sidecar keeps this in memory.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gateway.mesh.clock import doubt

ANEW = "if the mesh's root was changed while it was away, it joins anew: remove svid.pem from its folder and start it with a token of `crossway mesh token`"


class EnrolError(Exception):
    """It did not work; `lasting` when trying again will not help without somebody's doing."""

    def __init__(self, text: str, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


@dataclass(frozen=True)
class Token:
    """What `crossway mesh token` wrote."""

    text: str
    service: str
    control_ca: str  # SHA-256 of the root's DER, hexadecimal
    expires: float


def read_token(text: str) -> Token:
    """Parse the line of a token file. Raises EnrolError."""
    line = text.strip()
    try:
        data = json.loads(base64.urlsafe_b64decode(line + "=" * (-len(line) % 4)))
        token = Token(line, str(data["service"]), str(data["control_ca"]).lower(), float(data["expires"]))
    except (ValueError, KeyError, TypeError):
        raise EnrolError("the token is none: one line as `crossway mesh token SERVICE` prints it", True) from None
    if not re.fullmatch("[0-9a-f]{64}", token.control_ca):
        raise EnrolError("the token does not name the control plane's root", True)
    return token


def address_of(control: str) -> tuple[str, int]:
    """Return host and port of the control plane's URL. Raises EnrolError."""
    try:
        parts = urlsplit(control)
        host, port = parts.hostname, parts.port
        good = parts.scheme == "https" and host and port != 0 and not parts.path.strip("/") and not parts.query and parts.username is None
    except ValueError:
        good = False
    if not good or host is None:
        raise EnrolError(f"{control} is not the control plane's address: write https://host:port", True)
    return host, port or 443


def control_context(roots: str) -> ssl.SSLContext:
    """TLS 1.3 towards the control plane, verified by the mesh's roots; its name is checked by check_control()."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # it is found by any address; who it is says its certificate's URI
    context.load_verify_locations(cadata=roots)
    return context


def check_control(secure: Any, domain: str | None = None) -> None:
    """Raise EnrolError when the verified server is not the control plane, of a trust domain if that is known. `secure` has getpeercert()."""
    uris = [value for kind, value in (secure.getpeercert() or {}).get("subjectAltName", ()) if kind == "URI"]
    who = re.fullmatch(r"spiffe://([a-z0-9._-]+)/control", uris[0]) if len(uris) == 1 else None
    if who is None or domain not in (None, who[1]):
        raise EnrolError(f"who answers at the control plane's address is {', '.join(uris) or 'nobody of a mesh'}", True)


def tls_fault(error: ssl.SSLError) -> str:
    """Why TLS with the control plane did not come about."""
    fault = str(getattr(error, "verify_message", "") or error.reason or error)
    if "self-signed" in fault or "unable to get" in fault:
        fault += f": its root is not in this member's bundle; {ANEW}"
    return fault + doubt(fault)
