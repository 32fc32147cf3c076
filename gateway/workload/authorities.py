"""The authorities that this machine trusts.

Strategy: where OpenSSL and distributions keep them, or where SSL_CERT_FILE says; one file, read by whoever verifies.
"""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_AUTHORITIES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",
)


def system_authorities() -> Path | None:
    """Return the file with the authorities that this machine trusts, or None when there is none."""
    named = os.environ.get("SSL_CERT_FILE")
    candidates = [named] if named else list(SYSTEM_AUTHORITIES)
    return next((Path(path) for path in candidates if os.path.isfile(path)), None)
