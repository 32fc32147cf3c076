"""Certificates, keys, revocation lists and OCSP responses that a configuration names: can they be used, and for how long.

Strategy: every file is read and parsed as a worker will; what cannot work is an error at the path's place, what will end soon
a warning. Private keys enter the digest as a hash; nothing of them is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gateway._speedups.certificates import (
    PEM_MAX,
    Certificate,
    OcspResponse,
    PrivateKey,
    RevocationList,
    TlsError,
    parse_certificates,
    parse_key,
    parse_revocations,
)
from gateway.config.keyfile import read_file
from gateway.config.source import Document, Key
from gateway.config.tls import ListenerTls, Pair, UpstreamTls, listener_files, upstream_files
from gateway.config.unusable import unfit, unreadable
from gateway.workload.authorities import system_authorities

if TYPE_CHECKING:
    from gateway.config.schema import Config

Place = tuple[Key, ...]
Made = TypeVar("Made")
FileVersion = list[int] | None  # inode, size, time of change in nanoseconds

SOON = 21 * 86400  # seconds before the end of a certificate from which on it is told


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """A certificate in use, for metrics and reminders."""

    owner: str  # such as "listener public"
    file: str
    subject: str
    not_after: int  # unix seconds


def check_tls(config: Config, document: Document) -> list[CertificateInfo]:
    """Report what is wrong with the TLS of listeners and upstreams; return the certificates that they use."""
    files = _Files(document)
    for name, listener in config.listeners.items():
        if listener.tls is not None:
            _listener(listener.tls, ("listeners", name, "tls"), f"listener {name}", files)
    for name, upstream in config.upstreams.items():
        place: Place = ("upstreams", name)
        if upstream.tls is not None:
            _upstream(upstream.tls, (*place, "tls"), f"upstream {name}", files, upstream.service is not None)
    return files.used


class _Files:
    """Reads files once, reports at the place that names them."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.used: list[CertificateInfo] = []
        self.now = time.time()
        self.renewed = False  # what is read now lives for hours and is renewed by itself: its end is no news

    def read(self, path: Path, place: Place, what: str, parse: Callable[[bytes], Made], *, secret: bool = False) -> Made | None:
        try:
            content = read_file(path, PEM_MAX + 1)
        except OSError as error:
            self.document.report(place, f"cannot read the {what}: {error.strerror}", unreadable(error, path))
            return None
        self.document.files[f"file:{path}"] = hashlib.sha256(content).digest() if secret else content
        try:
            return parse(content)
        except TlsError as error:
            self.document.report(place, f"the {what} cannot be used: {error}", unfit(what, content, path))
            return None

    def pair(self, pair: Pair, place: Place, owner: str) -> list[Certificate] | None:
        """Return the chain of a certificate whose key is its own."""
        chain: list[Certificate] | None = self.read(pair.cert, (*place, "cert"), "certificate", parse_certificates)
        key: PrivateKey | None = self.read(pair.key, (*place, "key"), "key", parse_key, secret=True)
        if chain is None:
            return None
        if key is not None and not key.matches(chain[0]):
            own = next((number for number, each in enumerate(chain) if key.matches(each)), 0)
            if own:
                self.document.report(
                    (*place, "cert"),
                    f"the chain is out of order: {chain[own].subject}, whose key this is, is certificate {own + 1} of {len(chain)} in it",
                    f"put it first, then its issuer, and so on: {pair.cert}",
                )
                return None
            self.document.report(
                (*place, "key"),
                "this key does not belong to the certificate",
                f"the certificate is that of {chain[0].subject}",
            )
        self.dates(chain, (*place, "cert"))
        if not self.renewed:
            self.used.append(CertificateInfo(owner, str(pair.cert), chain[0].subject, chain[0].not_after))
        for one, issuer in itertools.pairwise(chain):
            if one.issuer != issuer.subject:
                there = any(each.subject == one.issuer for each in chain)
                self.document.warn(
                    (*place, "cert"),
                    f"the chain is {'out of order' if there else 'broken'}: {one.issuer} should follow {one.subject}, and {issuer.subject} does",
                    "put the certificate first, then each one's issuer; clients may refuse it as it is",
                )
                break
        return chain

    def dates(self, certificates: Sequence[Certificate], place: Place) -> None:
        for certificate in certificates:
            day = time.strftime("%Y-%m-%d", time.gmtime(certificate.not_after))
            if self.renewed and certificate.not_after >= self.now:
                continue
            if certificate.not_after < self.now:
                self.document.warn(
                    place, f"expired on {day}: {certificate.subject}", "get a new one; whoever verifies it refuses it"
                )
            elif certificate.not_after < self.now + SOON:
                self.document.warn(place, f"expires soon, on {day}: {certificate.subject}", "get a new one")
            if certificate.not_before > self.now:
                begin = time.strftime("%Y-%m-%d %H:%M", time.gmtime(certificate.not_before))
                self.document.warn(
                    place, f"not valid before {begin} UTC: {certificate.subject}", "is this machine's clock right?"
                )

    def authorities(self, path: Path, place: Place) -> list[Certificate]:
        def lenient(content: bytes) -> list[Certificate]:
            return parse_certificates(content, strict=False)

        found = self.read(path, place, "certificates of authorities", lenient)
        for certificate in found or ():
            if not certificate.authority:
                self.document.warn(
                    place, f"this is no authority's certificate: {certificate.subject}", "it cannot vouch for others"
                )
        if found:
            self.dates(found, place)
        return found or []

    def revocations(self, path: Path, place: Place, authorities: Sequence[Certificate]) -> None:
        lists: list[RevocationList] | None = self.read(path, place, "revocation list", parse_revocations)
        for each in lists or ():
            if each.next_update and each.next_update < self.now:
                self.document.warn(
                    place,
                    f"the revocation list of {each.issuer} is out of date",
                    "get the present one: no certificate of this authority is accepted with it",
                )
        issuers = {each.issuer for each in lists or ()}
        for authority in authorities:
            if lists is not None and authority.authority and authority.subject not in issuers:
                self.document.warn(
                    place,
                    f"no list of {authority.subject} is in it; there are: {', '.join(sorted(issuers))}",
                    "add the list of that authority: no certificate that leads to it is accepted without",
                )


def _listener(tls: ListenerTls, place: Place, owner: str, files: _Files) -> None:
    seen: dict[tuple[object, ...], int] = {}  # names and kind of key -> which certificate of the list
    for index, pair in enumerate(tls.certificates):
        at: Place = (*place, "certificates", index)
        chain = files.pair(pair, at, owner)
        if chain is not None and not chain[0].dns and not chain[0].addresses:
            files.document.warn(
                (*at, "cert"), "the certificate carries no subjectAltName", "clients look for their host's name there"
            )
        elif chain is not None:
            same = seen.setdefault((frozenset(chain[0].dns), frozenset(chain[0].addresses), chain[0].kind), index)
            if same != index:
                files.document.warn(
                    (*at, "cert"), f"the same names and kind of key as certificates[{same}]: one of the two is never used", "remove it, or name another file"
                )
        if pair.ocsp is not None:
            staple: OcspResponse | None = files.read(pair.ocsp, (*at, "ocsp"), "OCSP response", OcspResponse)
            if staple is not None and chain is not None:
                _staple(staple, chain[0], (*at, "ocsp"), files)
    authorities = [] if tls.client_ca is None else files.authorities(tls.client_ca, (*place, "client_ca"))
    if tls.crl is not None:
        files.revocations(tls.crl, (*place, "crl"), authorities)


def _staple(staple: OcspResponse, certificate: Certificate, place: Place, files: _Files) -> None:
    if not staple.answers(certificate):
        files.document.report(place, "the OCSP response is about another certificate", f"it must name {certificate.serial}")
    elif staple.status != "good":
        files.document.warn(place, f"the OCSP response says: {staple.status}", "clients will refuse this certificate")
    elif staple.next_update and staple.next_update < files.now:
        files.document.warn(place, "the OCSP response is out of date and is not sent", "fetch a fresh one")


def _upstream(tls: UpstreamTls, place: Place, owner: str, files: _Files, member: bool) -> None:
    files.renewed = member
    authorities: list[Certificate] = []
    if tls.insecure:
        files.document.warn(
            (*place, "insecure"),
            "the upstream's certificate is not verified: whoever answers there gets the requests",
            "name its authority in `ca`, and remove `insecure`",
        )
    elif tls.ca is None:
        if system_authorities() is None:
            files.document.report(
                place, "this machine has no certificates of authorities", "install ca-certificates, or name a file in `ca`", key=True
            )
    else:
        authorities = files.authorities(tls.ca, (*place, "ca"))
    if tls.certificate is not None:
        files.pair(tls.certificate, (*place, "certificate"), owner)
    if tls.crl is not None:
        files.revocations(tls.crl, (*place, "crl"), authorities)


def watched_files(config: Config) -> list[str]:
    """Return the files whose change reloads the configuration: all that TLS is made of, and what the mesh says of it."""
    found = [str(path) for each in config.listeners.values() if each.tls for path in listener_files(each.tls)]
    found += [str(path) for each in config.upstreams.values() if each.tls for path in upstream_files(each.tls)]
    if config.mesh is not None:
        found += [str(config.mesh.revoked), str(config.mesh.traffic)]
    return list(dict.fromkeys(found))


def file_versions(paths: Iterable[str]) -> dict[str, FileVersion]:
    """Return what tells two versions of a file apart, through symbolic links; None for one that cannot be looked at."""
    seen: dict[str, FileVersion] = {}
    for path in paths:
        try:
            found = os.stat(path)
            seen[path] = [found.st_ino, found.st_size, found.st_mtime_ns]
        except OSError:
            seen[path] = None
    return seen
