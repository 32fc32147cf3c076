"""Signatures over assignments: a detached JWS (RFC 7515 appendix F) by a key whose certificate leads to the mesh's root.

Strategy: the key is made at each start and lives in this process only; its certificate travels in the header (x5c), so that a member needs
nothing but the bundle that it has, also when it reads an assignment from its disk weeks later.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from gateway.mesh.assignment import canonical
from gateway.mesh.ca import Ca
from gateway.mesh.spire_authority import SpireAuthority

LIFE = 30 * 86400.0  # seconds; an assignment on a member's disk is believed no longer


class Signer:
    """Signs with a key of its own, certified by the authority."""

    def __init__(self, ca: Ca | SpireAuthority) -> None:
        self._key, chain = ca.control_pair(LIFE)
        self.made = time.time()
        self.ends = chain[0].not_valid_after_utc.timestamp()
        x5c = [base64.b64encode(each.public_bytes(serialization.Encoding.DER)).decode("ascii") for each in chain]
        self._header = _text(json.dumps({"alg": "ES256", "x5c": x5c}).encode())

    @property
    def spent(self) -> bool:
        """Tell whether half of its life is over."""
        return time.time() > (self.made + self.ends) / 2

    def sign(self, body: dict[str, Any]) -> str:
        """Return the detached JWS over an assignment."""
        signed = f"{self._header}.{_text(canonical(body))}".encode("ascii")
        r, s = utils.decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return f"{self._header}..{_text(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
