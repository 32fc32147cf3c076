"""What Python sees of _speedups/load_tls.pyx."""

from typing import TypedDict

from gateway._speedups.tls import TlsUpstream

class TlsSession(TypedDict):
    version: str
    cipher: str
    handshakes: int

class TlsCounts(TypedDict):
    handshakes: int
    resumed: int
    failures: dict[str, int]
    sessions: list[TlsSession]

class LoadTls:
    def __init__(self, settings: TlsUpstream, host: str, connections: int, resume: bool) -> None: ...
    def counts(self) -> TlsCounts: ...
