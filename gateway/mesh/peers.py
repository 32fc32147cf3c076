"""Who is at the other end of a connection to the control plane, by the certificate of the handshake.

Strategy: TLS has proved that the other side holds the key; the chain is judged here against the roots of now, and again at every request, because
roots and the deny list change while connections live. A certificate of the bank's PKI opens /v1/join only. Whoever falls out of favour has his
connections cut.
"""

from __future__ import annotations

import ssl
import time
import weakref
from typing import Any

from gateway._speedups.certificates import Certificate, TlsError, chain_fault, parse_certificates
from gateway.mesh.revocation import DenyList
from gateway.mesh.spiffe import service_of
from gateway.workload.admission import svid_fault


class Peer:
    """One connection and what its certificate says; `chain` is empty when it showed none."""

    def __init__(self, transport: Any, chain: list[Certificate]) -> None:
        self.transport = transport
        self.chain = chain
        address = transport.get_extra_info("peername")
        self.address = str(address[0]) if isinstance(address, (tuple, list)) and address else ""
        self.judged: tuple[object, str | None] = (None, None)  # the roots by which its chain was judged last, and how

    @property
    def leaf(self) -> Certificate:
        return self.chain[0]

    @property
    def serial(self) -> str:
        return self.leaf.serial.lower().lstrip("0") if self.chain else ""

    def cut(self) -> None:
        """End the connection without a word."""
        self.transport.abort()


class Peers:
    """The connections of now and the rules by which they are judged."""

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.roots: list[Certificate] = []
        self.bank: list[Certificate] = []  # roots by whose certificates one may join
        self.deny = DenyList()
        self._known: weakref.WeakSet[Peer] = weakref.WeakSet()

    def meet(self, transport: Any) -> Peer:
        """Return the peer of a connection whose handshake is done."""
        peer = Peer(transport, chain_of(transport.get_extra_info("ssl_object")))
        self._known.add(peer)
        return peer

    def fault(self, peer: Peer) -> str | None:
        """Why a peer is no member; None when it is one."""
        if not peer.chain:
            return "a certificate is required"
        if peer.judged[0] is not self.roots:  # signatures cost most, and change with the roots only
            fault = chain_fault(peer.chain, self.roots)
            unknown = fault is not None and ("self-signed" in fault or "unable to get" in fault)
            peer.judged = self.roots, f"{fault}: the certificate leads to no root of this mesh" if unknown else fault or svid_fault(peer.leaf)
        if peer.judged[1] is not None:
            return peer.judged[1]
        if service_of(peer.leaf.uris[0], self.domain) is None:
            return f"{peer.leaf.uris[0]} is of no service of {self.domain}"
        if peer.serial in self.deny.serials or peer.leaf.uris[0] in self.deny.identities:
            return f"{peer.leaf.uris[0]} (serial {peer.serial}) is revoked"
        if peer.leaf.not_after < time.time():
            return "the certificate has expired"
        return None

    def service(self, peer: Peer) -> str:
        """Return the service of a peer without a fault."""
        name = service_of(peer.leaf.uris[0], self.domain)
        assert name is not None
        return name

    def bank_names(self, peer: Peer) -> tuple[str, ...]:
        """Return the DNS names of a certificate of the bank's PKI; none for any other."""
        if not peer.chain or not self.bank or chain_fault(peer.chain, self.bank) is not None:
            return ()
        return peer.leaf.dns

    def cut_the_fallen(self) -> list[Peer]:
        """Cut the connections of members that are members no more; return them."""
        fallen = []
        for peer in list(self._known):
            if peer.chain and not peer.transport.is_closing() and self.fault(peer) is not None and not self.bank_names(peer):
                peer.cut()
                fallen.append(peer)
        return fallen


def chain_of(secure: Any) -> list[Certificate]:
    """Return the certificates that the other side showed, its own first."""
    if secure is None or secure.getpeercert(binary_form=True) is None:
        return []
    if hasattr(secure, "get_unverified_chain"):  # 3.13 and newer
        shown = [each if isinstance(each, bytes) else each.public_bytes(2) for each in secure.get_unverified_chain() or ()]
        pem = "".join(ssl.DER_cert_to_PEM_cert(each) for each in shown)
    else:
        pem = "".join(each.public_bytes(1) for each in secure._sslobj.get_unverified_chain() or ())
    try:
        return parse_certificates(pem.encode("ascii"))
    except (TlsError, UnicodeEncodeError):
        return []
