"""gRPC in a route's match (a service, or one method of it), and the policy for browsers that call it.

Strategy: a call is a POST to /SERVICE/METHOD with a content type of its own (gRPC over HTTP/2), so this is a shorter spelling
of a path, a method and a header, which is what everything that reads routes sees.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator

from gateway.config.base import Model, needed, setting
from gateway.config.values import Size, described, fault, text_of

CONTENT_TYPE = "application/grpc"
_WORD = r"[A-Za-z_][A-Za-z0-9_]*"


def parse_service(raw: Any) -> str:
    """Return the full name of a service: its package and its name, with dots."""
    hint = "write the package and the service, such as bank.v1.Payments"
    text = text_of(raw, "expected the name of a gRPC service", hint)
    if not re.fullmatch(rf"{_WORD}(?:\.{_WORD})*", text) or len(text) > 255:
        raise fault("not the name of a gRPC service", hint)
    return text


def parse_method_name(raw: Any) -> str:
    """Return the name of a service's method."""
    hint = "write it as in the .proto file, such as Transfer"
    text = text_of(raw, "expected the name of a method", hint)
    if not re.fullmatch(_WORD, text) or len(text) > 255:
        raise fault("not the name of a gRPC method", hint)
    return text


Service = Annotated[str, PlainValidator(parse_service), described("package.Service")]
MethodName = Annotated[str, PlainValidator(parse_method_name), described("method")]


class GrpcMatch(Model):
    """The calls of a gRPC service."""

    service: Service = needed("its full name: bank.v1.Payments")
    method: MethodName | None = setting(None, "one method of it; default: all of them")

    @property
    def path(self) -> str:
        """Return the template of the paths of these calls."""
        return f"/{self.service}/{self.method or '{method}'}"


class GrpcWeb(Model):
    """Let browsers call gRPC services: gRPC-Web, in binary and in text, becomes gRPC and back. gRPC itself passes as it is."""

    kind: ClassVar[str] = "grpc_web"

    request: Size = setting("1MiB", "longest request; it is held until it is complete")


def widen_grpc_web(raw: Any) -> Any:
    """`true` stands for all defaults."""
    return {} if raw is True else raw
