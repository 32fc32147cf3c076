"""What shapes a route's traffic: splits, canaries and mirrors.

Strategy: as in `schema`, whose Route holds them; what looks beyond the mapping is in `check`.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, listed, needed, part, setting
from gateway.config.conditions import Share, When, parse_cookie_name
from gateway.config.policies import HeaderEdits
from gateway.config.values import Deadline, Int, Name, Size, fault
from gateway.config.web import FieldName, Method, parse_field_name

MAX_MIRRORED = 1 << 20  # bytes of a body; times `in_flight` it is held in each worker


def parse_sticky(raw: Any) -> str:
    """Return `header:NAME`, `cookie:NAME`, `client` or `source`."""
    if isinstance(raw, str) and raw.startswith("header:"):
        return f"header:{parse_field_name(raw[7:])}"
    if isinstance(raw, str) and raw.startswith("cookie:"):
        return f"cookie:{parse_cookie_name(raw[7:])}"
    if raw not in ("client", "source"):
        raise fault("expected what a caller is known by", "one of client, source, header:NAME or cookie:NAME")
    return str(raw)


StickyKey = Annotated[
    str,
    BeforeValidator(parse_sticky),
    WithJsonSchema({"type": "string", "x-is": "`client`, `source`, `header:NAME` or `cookie:NAME`"}),
]


class Split(Model):
    """One of several upstreams, and its share of a route's requests."""

    upstream: Name = needed("name of the upstream")
    weight: Int = Field(default=1, ge=0, le=1_000_000, description="share of the requests, relative to the others; 0: none")
    request_headers: HeaderEdits = part(HeaderEdits, "changes to its requests, after those of the route's policies")
    response_headers: HeaderEdits = part(HeaderEdits, "changes to its responses, likewise")


class Canary(Model):
    """Requests that go to an upstream of their own, whatever the split says."""

    when: When = needed("which requests")
    upstream: Name = needed("name of the upstream")
    request_headers: HeaderEdits = part(HeaderEdits, "changes to its requests, after those of the route's policies")
    response_headers: HeaderEdits = part(HeaderEdits, "changes to its responses, likewise")


class Mirror(Model):
    """Copies of a route's requests for another upstream, whose answers nobody sees."""

    upstream: Name = needed("name of the upstream that gets the copies; none that the route itself uses")
    percent: Share = setting(100, "share of the requests that are copied")
    methods: Annotated[tuple[Method, ...], listed("method"), Field(min_length=1)] = setting(
        ["GET", "HEAD", "OPTIONS"], "methods that are copied; a copied payment is executed by the mirror, too"
    )
    strip: Annotated[tuple[FieldName, ...], listed("header name")] | None = setting(
        None, "headers that a copy goes without; default: authorization, cookie and the header of an api_key policy"
    )
    timeout: Deadline = setting("5s", "longest time of one copy, connecting included")
    body: Size = setting("64KiB", "longest body that is copied, at most 1MiB; requests with a longer one are not")
    in_flight: Int = Field(default=64, ge=1, le=4096, description="copies under way in each worker; above it they are dropped")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.body > MAX_MIRRORED:
            raise fault("at most 1MiB of a body is copied", "it is kept in memory until the mirror has it", at=("body",))
        return self
