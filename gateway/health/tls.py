"""Connections of checks to upstreams with TLS.

Strategy: a file that cannot be read when it is needed is a failure of this machine, which judges no endpoint.
"""

from __future__ import annotations

import asyncio
import ssl

from gateway.config.client_tls import ClientTls
from gateway.config.tls import UpstreamTls
from gateway.discovery.found import Found
from gateway.health.probe import MAX_HEAD, Connection, Inconclusive, Opener


def opener_of(tls: UpstreamTls, protocol: str) -> Opener:
    """Return what opens the connections of checks."""
    client = ClientTls(tls, protocol)

    async def open_tls(found: Found) -> Connection:
        try:
            context = client.context()
        except OSError as error:
            raise Inconclusive(f"a file of its TLS cannot be read: {error}") from None
        try:
            reader, writer = await asyncio.open_connection(
                found.address.host, found.address.port, limit=MAX_HEAD, ssl=context, server_hostname=client.server_name(found.host)
            )
        except ssl.SSLCertVerificationError as error:
            raise OSError(f"TLS: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise OSError(f"TLS: {error.reason or error}") from None
        try:
            client.check(writer.transport)
        except OSError:
            writer.close()
            raise
        return reader, writer

    return open_tls
