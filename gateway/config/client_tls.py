"""TLS of the connections that Python opens to upstreams (checks, mirrors): the same demands on the server as the traffic's.

Strategy: Python's ssl, since these are few. The context is made when it is first needed and kept.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from gateway.config.tls import UpstreamTls
from gateway.workload.authorities import system_authorities

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class ClientTls:
    """An upstream's settings for Python's connections; `protocol` is offered by ALPN."""

    def __init__(self, tls: UpstreamTls, protocol: str) -> None:
        self._tls = tls
        self._protocol = protocol
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Return what connections are made with. Raises OSError when a file cannot be read."""
        if self._context is None:
            self._context = _context(self._tls, self._protocol)
        return self._context

    def server_name(self, host: str) -> str:
        """Return the name that is asked for and expected, of the server found as `host`."""
        return self._tls.server_name or host

    def check(self, transport: asyncio.BaseTransport) -> None:
        """Compare the certificate with the expected names, where there are any. Raises OSError."""
        certificate: Any = transport.get_extra_info("peercert") or {}
        names = {value for _, value in certificate.get("subjectAltName", ())}
        if self._tls.sans and not names.intersection(self._tls.sans):
            raise OSError("TLS: the certificate carries none of the expected names")


def _context(tls: UpstreamTls, protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = VERSIONS[tls.min_version]
    context.set_alpn_protocols([protocol])
    if tls.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.check_hostname = not tls.sans
        context.load_verify_locations(tls.ca or system_authorities())
    if tls.crl is not None:
        context.load_verify_locations(tls.crl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate.cert, tls.certificate.key)
    return context
