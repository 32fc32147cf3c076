"""Connections of checks to upstreams with TLS: the same demands on the server as those of the traffic.

Strategy: Python's ssl, since a check is one connection now and then. The context is made at the first check and kept; a file that
cannot be read then is a failure of this machine, which judges no endpoint.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Sequence

from gateway.config.tls import UpstreamTls, system_authorities
from gateway.discovery import Found
from gateway.health.probe import MAX_HEAD, Connection, Inconclusive, Opener

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def opener_of(tls: UpstreamTls, protocol: str) -> Opener:
    """Return what opens the connections of checks; `protocol` is offered by ALPN."""
    context = functools.cache(lambda: _context(tls, protocol))

    async def open_tls(found: Found) -> Connection:
        try:
            made = context()
        except OSError as error:
            raise Inconclusive(f"a file of its TLS cannot be read: {error}") from None
        name = tls.server_name or found.host
        try:
            reader, writer = await asyncio.open_connection(
                found.address.host, found.address.port, limit=MAX_HEAD, ssl=made, server_hostname=name
            )
        except ssl.SSLCertVerificationError as error:
            raise OSError(f"TLS: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise OSError(f"TLS: {error.reason or error}") from None
        if tls.sans and not names_of(writer).intersection(tls.sans):
            writer.close()
            raise OSError("TLS: the certificate carries none of the expected names")
        return reader, writer

    return open_tls


def names_of(writer: asyncio.StreamWriter) -> set[str]:
    """Return the subjectAltNames of the server's certificate."""
    certificate = writer.get_extra_info("peercert") or {}
    names: Sequence[tuple[str, str]] = certificate.get("subjectAltName", ())
    return {value for _, value in names}


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
