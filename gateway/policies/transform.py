"""headers, rewrite, cors and grpc_web: what is changed on the way.

Strategy: edits become bytes when the snapshot is compiled; the composer copies them.
"""

import re
from collections.abc import Iterable

from gateway._speedups.grpc_web_step import GrpcWebStep
from gateway._speedups.steps import CorsStep
from gateway.config.policies import Cors, GrpcWeb, HeaderEdits, Headers, Rewrite
from gateway.policies.base import RouteParts, Use


def edit_lines(edits: HeaderEdits) -> tuple[list[bytes], list[bytes]]:
    """Return the names to remove, in lower case, and the lines to add."""
    remove = [name.lower().encode("ascii") for name in (*edits.remove, *edits.set)]
    add = [
        name.lower().encode("ascii") + b": " + str(value).encode("utf-8") + b"\r\n"
        for name, value in (*edits.set.items(), *edits.add.items())
    ]
    return remove, add


def compile_headers(settings: Headers, use: Use, parts: RouteParts) -> None:
    for edits, remove, add in (
        (settings.request, parts.request_remove, parts.request_add),
        (settings.response, parts.response_remove, parts.response_add),
    ):
        names, lines = edit_lines(edits)
        remove.extend(names)
        add.extend(lines)


def compile_rewrite(settings: Rewrite, use: Use, parts: RouteParts) -> None:
    if settings.prefix is not None:
        parts.rewrite_prefix = settings.prefix.rstrip("/").encode("ascii")
    if settings.path is not None:
        pieces = re.split(r"\{([^{}]*)\}", settings.path)
        parts.rewrite_path = tuple(
            use.parameters.index(piece) if number % 2 else piece.encode("ascii") for number, piece in enumerate(pieces)
        )
    if settings.host is not None:
        parts.rewrite_host = settings.host.encode("ascii")


# Whether a browser may read an answer is said by the policy alone; an origin's own word would contradict it, or double it.
CORS_ANSWER = (
    b"access-control-allow-origin", b"access-control-allow-credentials", b"access-control-expose-headers",
    b"access-control-allow-methods", b"access-control-allow-headers", b"access-control-max-age",
)


# What every client of gRPC-Web sends, and what it must be able to read when there is no body.
WEB_HEADERS = ("content-type", "x-grpc-web", "x-user-agent", "grpc-timeout")
WEB_EXPOSED = ("grpc-status", "grpc-message")


def _with(names: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*names, *more]))


def compile_cors(settings: Cors, use: Use, parts: RouteParts) -> None:
    headers, expose = settings.headers, settings.expose
    if parts.grpc_web:
        headers, expose = _with(headers, WEB_HEADERS), _with(expose, WEB_EXPOSED)
    parts.cors = CorsStep(
        use.name, settings.origins, settings.methods, headers, expose, settings.credentials, int(settings.max_age)
    )
    parts.response_remove.extend(CORS_ANSWER)
    parts.steps.insert(0, parts.cors)           # first of its phase: refusals by the others are marked as well


def compile_grpc_web(settings: GrpcWeb, use: Use, parts: RouteParts) -> None:
    parts.steps.append(GrpcWebStep(use.name, settings.request))
