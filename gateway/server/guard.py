"""What stands before every page of the admin endpoint: who may call, from where, and how much they may send.

Strategy: plain ASGI, so that nothing behind it runs for a refused request. A token is compared in constant time. Without a
token the endpoint is reachable from this machine only, and then the danger is the operator's own browser: a page may
resolve its name to 127.0.0.1 (so Host must be ours) or post a form to us (so Origin must be ours).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

import orjson

from gateway.config.web import Bind

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 16 * 1024  # bytes; no request of this API needs one
PROBES = frozenset({"/livez", "/readyz"})  # answered without a token: what they tell, a connect tells as well
HEADERS = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
]
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")


class Guard:
    """ASGI middleware around the admin application."""

    def __init__(self, app: App, bind: Bind, token: str | None, most: Mapping[str, int] | None = None) -> None:
        """`most`: bytes of a body on paths that take more than the others."""
        self.app = app
        self.bind = bind
        self.most = most or {}
        self.token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in HEADERS if pair[0] not in own)]
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _refusal(
        self, scope: Scope, headers: dict[bytes, list[bytes]]
    ) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """Return (status, detail, extra headers) of the answer to a request that goes no further."""
        hosts = headers.get(b"host", [])
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        if self.bind.loopback and not self.bind.unix and not self._is_ours(host):
            return 421, "this Host is not the admin endpoint; call it by its address", []
        if not _same_origin(headers, host):
            return 403, "requests from other origins are refused", []
        most = self.most.get(scope["path"], MAX_BODY)
        if b"transfer-encoding" in headers or _length(headers) > most:
            return 413, f"no request here has a body above {most} bytes", [(b"connection", b"close")]
        if self.token is not None and scope["path"] not in PROBES:
            given = headers.get(b"authorization", [])
            scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(credentials.strip(), self.token):
                return 401, "a bearer token is needed", [(b"www-authenticate", b'Bearer realm="crossway admin"')]
        return None

    def _is_ours(self, host: str) -> bool:
        """Tell whether a Host names this machine itself: localhost or a loopback address."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]")
        if name == "localhost":
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _same_origin(headers: dict[bytes, list[bytes]], host: str) -> bool:
    """Tell whether a browser sent this from a page of our own; programs send neither header."""
    if any(value not in (b"same-origin", b"none") for value in headers.get(b"sec-fetch-site", [])):
        return False
    allowed = {f"http://{host}".encode(), f"https://{host}".encode()}
    return all(value.lower() in allowed for value in headers.get(b"origin", []))


def _length(headers: dict[bytes, list[bytes]]) -> int:
    lengths = headers.get(b"content-length", [b"0"])
    return int(lengths[0]) if len(lengths) == 1 and re.fullmatch(rb"[0-9]{1,9}", lengths[0]) else 1 << 62


async def _refuse(send: Send, status: int, detail: str, extra: Iterable[tuple[bytes, bytes]]) -> None:
    body = orjson.dumps({"status": status, "detail": detail})
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        *HEADERS,
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
