"""TLS settings made into what the engine uses: contexts with their certificates, authorities and revocation lists.

Strategy: files are read here, in the worker, and everything that was read enters a digest: connections and sessions of other
content are never taken for equivalent. Whatever cannot be used raises, and the old configuration goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway._speedups.certificates import (
    PEM_MAX,
    Certificate,
    ClientCertificate,
    OcspResponse,
    PrivateKey,
    RevocationList,
    TlsError,
    parse_certificates,
    parse_key,
    parse_revocations,
)
from gateway._speedups.tls import TlsListener, TlsUpstream
from gateway.config.keyfile import read_file
from gateway.config.mesh_member import Mesh
from gateway.config.tls import ListenerTls, Pair, UpstreamTls
from gateway.workload.admission import Admit, Revoked, admission
from gateway.workload.authorities import system_authorities


class _Reader:
    """Reads files and remembers what they held."""

    def __init__(self, settings: str) -> None:
        self._total = hashlib.sha256(settings.encode())

    def read(self, path: Path) -> bytes:
        content = read_file(path, PEM_MAX + 1)
        self._total.update(hashlib.sha256(content).digest())
        return content

    def pair(self, pair: Pair) -> tuple[list[Certificate], PrivateKey]:
        chain, key = parse_certificates(self.read(pair.cert)), parse_key(self.read(pair.key))
        if not key.matches(chain[0]):
            raise TlsError(f"the key in {pair.key} does not belong to the certificate in {pair.cert}")
        return chain, key

    def authorities(self, path: Path | None) -> list[Certificate]:
        return [] if path is None else _authorities(self.read(path))

    def revocations(self, path: Path | None) -> list[RevocationList]:
        return [] if path is None else parse_revocations(self.read(path))

    def digest(self) -> bytes:
        return self._total.digest()


@functools.lru_cache(maxsize=4)
def _authorities(content: bytes) -> list[Certificate]:
    """Parsed once for all upstreams that trust the same: a machine's bundle holds 140."""
    return parse_certificates(content, strict=False)


def listener_tls(name: str, tls: ListenerTls, alpn: Sequence[str]) -> TlsListener:
    """Return what a listener's handshakes run on; it offers the protocols of `alpn`. Raises TlsError or OSError."""
    # What a resumed session rests on. A staple or a deadline that changes takes nobody's session away.
    reader = _Reader(f"{tls.min_version} {tls.client_auth}")
    pairs = [reader.pair(pair) for pair in tls.certificates]
    authorities, revocations = reader.authorities(tls.client_ca), reader.revocations(tls.crl)
    staples = [None if pair.ocsp is None else OcspResponse(read_file(pair.ocsp, PEM_MAX)) for pair in tls.certificates]
    return TlsListener(
        name, [(*pair, staple) for pair, staple in zip(pairs, staples, strict=True)], digest=reader.digest(), authorities=authorities, revocations=revocations, client_auth=tls.client_auth,
        min_version=tls.min_version, alpn=alpn, handshake=tls.handshake, handshakes=tls.handshakes, ktls=tls.ktls,
        tickets=tls.tickets.enabled, forward_certificate=tls.forward_client_certificate,
    )  # fmt: skip


def member_tls(tls: UpstreamTls, mesh: Mesh, alpn: tuple[str, ...] = ("http/1.1",)) -> TlsUpstream:
    """The same for a service of the mesh, whose certificate keeps the rules of members and is not on the deny list."""
    domain, said = mesh.joined, _deny_list(mesh)
    return upstream_tls(tls, alpn, None if domain is None else admission(domain, Revoked(said)), json.dumps(said))


def _deny_list(mesh: Mesh) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads(read_file(mesh.revoked, PEM_MAX + 1)))
    return {}


def shut_out(mesh: Mesh) -> Callable[[ClientCertificate], bool]:
    """Return whether a member's certificate is on the deny list of now."""
    revoked = Revoked(_deny_list(mesh))
    return lambda certificate: revoked.holds(certificate.leaf)


def upstream_tls(
    tls: UpstreamTls, alpn: tuple[str, ...] = ("http/1.1",), admit: Admit | None = None, more: str = ""
) -> TlsUpstream:
    """Return what the handshakes with an upstream run on; it is offered the protocols of `alpn`. Raises TlsError or OSError.

    `admit` has a word on a verified server's certificate; `more` is what that rests on.
    """
    reader = _Reader(f"{' '.join(alpn)} {tls.model_dump_json()}{more}")
    chain, key = (None, None) if tls.certificate is None else reader.pair(tls.certificate)
    path = tls.ca
    if path is None and not tls.insecure:
        path = system_authorities()
        if path is None:
            raise TlsError("this machine has no certificates of authorities; name a file in `ca`")
    authorities, revocations = reader.authorities(path), reader.revocations(tls.crl)
    return TlsUpstream(
        digest=reader.digest(), authorities=authorities, revocations=revocations, chain=chain, key=key,
        server_name=tls.server_name, sans=tls.sans, min_version=tls.min_version, verify=not tls.insecure,
        alpn=alpn, admit=admit,
    )  # fmt: skip
