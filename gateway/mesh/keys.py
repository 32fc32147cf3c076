"""Where the authority's private keys are: in files of its folder, or in a token behind PKCS #11, of which the files then hold the address only.

Strategy: a file is read for what it is, a key or an address (RFC 7512), so that a folder may hold both, and moving into a token is a rotation like any
other. A file that names a key in a token needs `control.keys` to be read, and never shows more than its name.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile, Pkcs11
    from gateway.mesh.hsm import Token

Key = ec.EllipticCurvePrivateKey
Which = Literal["root", "issuing"]
ADDRESS = b"pkcs11:"


class CaError(Exception):
    """The authority cannot do this; the text says why."""


def key_pem(key: Key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Keys:
    """Makes and reads the authority's keys as `settings` say; without any, in files."""

    def __init__(self, settings: Pkcs11 | None = None) -> None:
        self.settings = settings
        self._token: Token | None = None

    def make(self, which: Which) -> tuple[Key, bytes]:
        """Return a new key and what its file holds. Raises CaError."""
        if self.settings is None or which not in self.settings.holds:
            key = ec.generate_private_key(ec.SECP256R1())
            return key, key_pem(key)
        made = self._open().make(f"crossway-{which}-{secrets.token_hex(6)}")
        return made, f"{made.address}\n".encode("ascii")

    def read(self, path: Path) -> Key:
        """Return the key that a file holds or names. Raises CaError or OSError."""
        if path.stat().st_mode & 0o077:
            raise CaError(f"{path}: others may read it; chmod 0600 {path}")
        content = path.read_bytes()
        address = next((line for line in content.splitlines() if line.startswith(ADDRESS)), None)
        if address is not None:
            if self.settings is None:
                raise CaError(f"{path}: the key is in a token, and the mesh's file has no control.keys to reach it")
            return self._open().key(address.decode("ascii", "replace"))
        key = serialization.load_pem_private_key(content, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CaError(f"{path}: not an ECDSA key")
        return key

    def _open(self) -> Token:
        if self._token is None:
            assert self.settings is not None
            try:
                from gateway.mesh.hsm import Token
            except ImportError:
                raise CaError("control.keys.pkcs11 needs python-pkcs11: pip install 'crossway[pkcs11]'") from None
            self._token = Token(self.settings.module, self.settings.token, self.settings.pin_file)
        return self._token


def keys_of(mesh: MeshFile) -> Keys:
    """Return where the keys of a mesh's authority are."""
    return Keys(mesh.control.keys.pkcs11 if mesh.control.keys is not None else None)


def read_pin(path: Path) -> str:
    """Return the PIN in a file that nobody else may read. Raises CaError."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise CaError(f"{path}: others may read it; it holds a PIN: chmod 0600 {path}")
            return file.read(1024).decode().strip("\r\n")
    except OSError as error:
        raise CaError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CaError(f"{path}: not a PIN: it is no UTF-8") from None
