"""What Python sees of _speedups/tls.pyx."""

from collections.abc import Callable, Sequence

from gateway._speedups.certificates import Certificate, ClientCertificate, OcspResponse, PrivateKey, RevocationList

def rotate_ticket_keys() -> None: ...
def libraries() -> list[str]: ...

class TlsListener:
    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> bytes: ...
    def __init__(
        self,
        name: str,
        pairs: list[tuple[list[Certificate], PrivateKey, OcspResponse | None]],
        *,
        digest: bytes,
        authorities: Sequence[Certificate] = (),
        revocations: Sequence[RevocationList] = (),
        client_auth: str = "off",
        min_version: str = "1.2",
        alpn: Sequence[str] = ("http/1.1",),
        handshake: float = 10,
        handshakes: int = 1000,
        ktls: bool = False,
        tickets: bool = True,
        forward_certificate: bool = False,
        admit: Callable[[Certificate], str | None] | None = None,
    ) -> None: ...
    @property
    def server_names(self) -> list[str]: ...

class TlsUpstream:
    @property
    def digest(self) -> bytes: ...
    def __init__(
        self,
        *,
        digest: bytes,
        authorities: Sequence[Certificate] = (),
        revocations: Sequence[RevocationList] = (),
        chain: list[Certificate] | None = None,
        key: PrivateKey | None = None,
        server_name: str | None = None,
        sans: Sequence[str] = (),
        min_version: str = "1.2",
        verify: bool = True,
        alpn: Sequence[str] = ("http/1.1",),
        admit: Callable[[Certificate], str | None] | None = None,
    ) -> None: ...
    @property
    def alpn(self) -> tuple[str, ...]: ...
    def adopt(self, before: TlsUpstream) -> None: ...
    def forget(self, address: str, host: str) -> None: ...

class Tls:
    @property
    def reason(self) -> str | None: ...
    @property
    def resumed(self) -> bool: ...
    @property
    def certificate(self) -> ClientCertificate | None: ...
    @property
    def version(self) -> str: ...
    @property
    def cipher(self) -> str: ...
