"""Keys in a token behind PKCS #11 (an HSM, a smart card, SoftHSM): made there, used there, never out of it.

Strategy: a key here is an EllipticCurvePrivateKey that can sign and nothing else, so `cryptography` builds certificates with it as with any other. One
session for the process, opened when it is needed and anew after whatever goes wrong with it; objects are found by their id each time a session is new. The
PIN is read from its file at each login, and not tried when the token says that one more mistake would lock it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import pkcs11
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from pkcs11.util.ec import encode_ec_public_key, encode_named_curve_parameters

from gateway.mesh.keys import CaError, read_pin

WORDS = {
    "PinIncorrect": "the PIN is wrong", "PinLocked": "the PIN is locked after too many wrong ones", "NoSuchToken": "there is no such token",
    "MultipleTokensReturned": "there are several tokens of that name", "NoSuchKey": "there is no such key in it",
    "DeviceRemoved": "the device has gone", "TokenNotPresent": "the token is not there",
}  # fmt: skip
SIZE = 32  # bytes of a coordinate, and of half a signature, on P-256
Result = TypeVar("Result")


class Token:
    """One token of a module, by its label. Raises CaError."""

    def __init__(self, module: Path, label: str, pin_file: Path) -> None:
        self.label = label
        self.pin_file = pin_file
        self._lock = threading.Lock()
        self._session: Any = None
        try:
            self._module = pkcs11.lib(str(module))
        except Exception as error:  # noqa: BLE001 - a library that is none shows in as many ways as there are loaders
            raise CaError(f"{module}: not a PKCS #11 module that can be used: {_words(error)}") from None

    def make(self, label: str) -> TokenKey:
        """Make a key pair there: the private half sensitive, never extractable, good for signatures alone."""
        identity = secrets.token_bytes(16)

        def work(session: Any) -> bytes:
            curve = session.create_domain_parameters(
                pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
            )
            private = {pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False, pkcs11.Attribute.SIGN: True, pkcs11.Attribute.DERIVE: False}
            public, _ = curve.generate_keypair(
                id=identity, label=label, store=True, capabilities=pkcs11.MechanismFlag.SIGN | pkcs11.MechanismFlag.VERIFY,
                private_template=private,
            )  # fmt: skip
            return bytes(encode_ec_public_key(public))

        return TokenKey(self, label, identity, self.use(work))

    def key(self, address: str) -> TokenKey:
        """Return the key with the address that make() gave it (RFC 7512)."""
        said = dict(re.findall(r"(?:^pkcs11:|;)([a-z-]+)=([^;]*)", address))
        identity = bytes.fromhex(said.get("id", "").replace("%", "")) if re.fullmatch("(%[0-9a-f]{2})+", said.get("id", "")) else b""
        if not identity:
            raise CaError(f"{address}: not the address of a key: pkcs11:token=...;object=...;id=%..")
        if said.get("token") != quote(self.label, safe=""):
            raise CaError(f"{address}: in another token than {self.label}, which control.keys names")

        def work(session: Any) -> bytes:
            return bytes(encode_ec_public_key(session.get_key(pkcs11.ObjectClass.PUBLIC_KEY, id=identity)))

        return TokenKey(self, said.get("object", ""), identity, self.use(work))

    def sign(self, identity: bytes, digest: bytes) -> bytes:
        """Return r and s, of 32 bytes each, over a digest."""

        def work(session: Any) -> bytes:
            return bytes(session.get_key(pkcs11.ObjectClass.PRIVATE_KEY, id=identity).sign(digest, mechanism=pkcs11.Mechanism.ECDSA))

        return self.use(work)

    def use(self, work: Callable[[Any], Result]) -> Result:
        """Do something with the session; a session that has died meanwhile is opened anew, once."""
        with self._lock:
            fresh = self._session is None
            try:
                return work(self._opened())
            except pkcs11.PKCS11Error as error:
                self._close()
                if isinstance(error, (pkcs11.PinIncorrect, pkcs11.PinLocked)) or (fresh and isinstance(error, pkcs11.NoSuchKey)):
                    raise self._failed(error) from None
            try:
                self._module.reinitialize()  # a device that came back is another slot; nobody else uses the module here
                return work(self._opened())
            except pkcs11.PKCS11Error as error:
                self._close()
                raise self._failed(error) from None

    def _opened(self) -> Any:
        if self._session is None:
            token = self._module.get_token(token_label=self.label)
            if token.flags & (pkcs11.TokenFlag.USER_PIN_FINAL_TRY | pkcs11.TokenFlag.USER_PIN_LOCKED):
                raise CaError(f"token {self.label}: one more wrong PIN would lock it, so none is tried: log in once by its own tools")
            pin = read_pin(self.pin_file)
            try:
                self._session = token.open(rw=True, user_pin=pin)
            except pkcs11.UserAlreadyLoggedIn:  # a login is the process's: that of a session which has failed goes on
                self._session = token.open(rw=True)
        return self._session

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(pkcs11.PKCS11Error):
                session.close()

    def _failed(self, error: Exception) -> CaError:
        return CaError(f"token {self.label}: {_words(error)}")


class TokenKey(ec.EllipticCurvePrivateKey):
    """A private key that stays where it is."""

    def __init__(self, token: Token, label: str, identity: bytes, public: bytes) -> None:
        found = serialization.load_der_public_key(public)
        if not isinstance(found, ec.EllipticCurvePublicKey) or not isinstance(found.curve, ec.SECP256R1):
            raise CaError(f"token {token.label}: {label} is not an ECDSA P-256 key")
        self.token, self.label, self.identity, self._public = token, label, identity, found

    @property
    def address(self) -> str:
        return f"pkcs11:token={quote(self.token.label, safe='')};object={quote(self.label, safe='')};id={''.join(f'%{byte:02x}' for byte in self.identity)}"

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """Return an ECDSA signature in DER; SHA-256 is the only digest."""
        if not isinstance(signature_algorithm.algorithm, hashes.SHA256):
            raise CaError("a key in a token signs by SHA-256")
        raw = self.token.sign(self.identity, hashlib.sha256(data).digest())
        return utils.encode_dss_signature(int.from_bytes(raw[:SIZE], "big"), int.from_bytes(raw[SIZE:], "big"))

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> NoReturn:
        raise CaError("a key in a token signs, and nothing else")

    def private_numbers(self) -> NoReturn:
        raise CaError("a key in a token does not leave it")

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> NoReturn:
        raise CaError("a key in a token does not leave it")

    def __copy__(self) -> TokenKey:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> TokenKey:
        return self


def _words(error: Exception) -> str:
    """What went wrong, in words: errors of the library have a name and mostly no text."""
    name = type(error).__name__
    return WORDS.get(name) or (f"{name}: {error}"[:200] if str(error) else name)
