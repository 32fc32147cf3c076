"""What to do about a file that a configuration names and that cannot be used: a sentence for whoever reads it in a hurry.

Strategy: by the reason that the system gives, and by a look at how the content begins. Nothing of the content gets into a sentence.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

CERTIFICATE, KEY, LIST = "-----BEGIN CERTIFICATE-----", "PRIVATE KEY-----", "-----BEGIN X509 CRL-----"
DER = b"\x30"  # a SEQUENCE, with which all of these begin outside PEM
CONVERT = {
    "certificate": "openssl x509 -inform der -in {path} -out FILE", "certificates of authorities": "openssl x509 -inform der -in {path} -out FILE",
    "key": "openssl pkey -inform der -in {path} -out FILE", "revocation list": "openssl crl -inform der -in {path} -out FILE",
}  # fmt: skip


def unreadable(error: OSError, path: Path | str) -> str:
    """Return what to do about a file that could not be read."""
    if isinstance(error, FileNotFoundError):
        return f"put it there: {path}"
    if isinstance(error, IsADirectoryError):
        return f"this is a folder, name the file in it: {path}"
    if isinstance(error, PermissionError):
        return f"let the user {_user()} read it, as whom this runs: {path}"
    return f"the file is {path}"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def unfit(what: str, content: bytes, path: Path) -> str:
    """Return what to do about a file that was read and holds no such thing; `what` as messages call it."""
    text = content.decode("latin-1")
    pair = what in ("certificate", "key")
    if not content.strip():
        return f"the file is empty: {path}"
    if what == "key" and "ENCRYPTED" in text:
        return f"write it without a password, for this user alone: openssl pkey -in {path} -out FILE"
    if content.startswith(DER) and what in CONVERT:
        return f"it looks like DER or PKCS #12, and PEM is read: {CONVERT[what].format(path=path)}"
    if what != "key" and KEY in text and CERTIFICATE not in text:
        return f"it holds a private key{': are `cert` and `key` exchanged?' if pair else ''} {path}"
    if what != "certificate" and CERTIFICATE in text:
        return f"it holds a certificate{': are `cert` and `key` exchanged?' if pair else ''} {path}"
    if what != "revocation list" and LIST in text:
        return f"it holds a revocation list: {path}"
    return f"the file is {path}"
