"""Active health checks of an upstream: what is asked, how often, and how many answers change the verdict.

Strategy: one mapping a protocol, exactly one of them; what a check sends is plain values here, so that the checker needs no
second look at the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, part, setting
from gateway.config.resilience import Eject
from gateway.config.values import TEXT, Deadline, Int, Percent, Text, fault, text_of
from gateway.config.web import parse_address, parse_host_pattern


@dataclass(frozen=True, slots=True)
class Statuses:
    """A set of status codes, as ranges with both ends in them."""

    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, status: int) -> bool:
        return any(low <= status <= high for low, high in self.ranges)

    def __str__(self) -> str:
        return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ranges)


def parse_statuses(raw: Any) -> Statuses:
    """Return the Statuses of `200`, `200-299`, or a list of such."""
    if isinstance(raw, Statuses):
        return raw
    hint = "write 200, 200-299 or a list such as [200, 204, 401]"
    found = []
    for item in raw if isinstance(raw, list) else str(raw).split(","):
        match = re.fullmatch(r"\s*([1-5][0-9]{2})(?:\s*-\s*([1-5][0-9]{2}))?\s*", str(item))
        if isinstance(item, bool) or not match:
            raise fault("expected status codes from 100 to 599", hint)
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise fault("a range of status codes that ends before it begins", hint)
        found.append((low, high))
    if not found:
        raise fault("no status code would ever be healthy", hint)
    return Statuses(tuple(found))


def parse_check_path(raw: Any) -> str:
    """Return the request target of a check: a path, with a query if it has one."""
    hint = "write it from the root: /healthz or /ready?deep=1"
    text = text_of(raw, "expected a path", hint)
    if not text.startswith("/") or not re.fullmatch(r"[!-~]{1,2048}", text) or "#" in text:
        raise fault("a path starts with / and holds no space, no # and nothing outside ASCII", hint)
    return text


def _host(raw: Any) -> str:
    hint = "write the host, with its port if that is not 80: api.bank.test or api.bank.test:8080"
    text = text_of(raw, "expected a host", hint)
    if "*" in text:
        raise fault("expected one host", hint)
    return str(parse_address(text)) if re.search(r"[^:\]]:[0-9]+$|\]:[0-9]+$", text) else parse_host_pattern(text)


class HttpCheck(Model):
    """A GET on a connection of its own, in HTTP/2 when that is what the upstream speaks."""

    path: Annotated[
        str, PlainValidator(parse_check_path), WithJsonSchema({"type": "string", "x-is": "path"})
    ] = setting("/", "the request target")
    status: Annotated[
        Statuses, PlainValidator(parse_statuses), TEXT,
        WithJsonSchema({"type": ["string", "integer", "array"], "x-is": "status codes", "examples": ["200-299"]}),
    ] = setting("200-299", "statuses of a healthy answer: 200, 200-299 or a list")
    body: Text | None = setting(None, "text that a healthy answer's first 64KiB contain")
    host: Annotated[
        str, BeforeValidator(_host), WithJsonSchema({"type": "string", "x-is": "host"})
    ] | None = setting(None, "the Host that is sent; default: the endpoint's own")


class TcpCheck(Model):
    """A connection that is accepted."""


class GrpcCheck(Model):
    """grpc.health.v1.Health/Check over HTTP/2, which must answer SERVING."""

    service: Annotated[str, Field(max_length=1024)] = setting("", "the service asked about; empty: the server as a whole")


class Check(Model):
    """Endpoints are asked whether they are well, by one process on each machine. Exactly one of `http`, `tcp` and `grpc`."""

    http: HttpCheck | None = setting(None, "an HTTP request; {} asks for /")
    tcp: TcpCheck | None = setting(None, "a connection: {}")
    grpc: GrpcCheck | None = setting(None, "the gRPC health protocol: {}")
    interval: Deadline = setting("5s", "between two checks of an endpoint, at least 100ms")
    timeout: Deadline = setting("1s", "for the whole check")
    jitter: Percent = setting("10%", "by how much of it an interval varies, at most 50%")
    healthy: Int = Field(default=2, ge=1, le=100, description="successes in a row that bring an endpoint back")
    unhealthy: Int = Field(default=3, ge=1, le=100, description="failures in a row that take an endpoint out")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        """`tcp:` with nothing after it means `tcp: {}`."""
        if isinstance(data, dict):
            for kind in ("http", "tcp", "grpc"):
                if kind in data and data[kind] is None:
                    data[kind] = {}
        return data

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(each is not None for each in (self.http, self.tcp, self.grpc)) != 1:
            raise fault("expected one of `http`, `tcp` and `grpc`", "write for example `http: {path: /healthz}`")
        if self.interval < 0.1:
            raise fault("an interval is at least 100ms", "a check is a load of its own", at=("interval",))
        if self.timeout > 60:
            raise fault("a timeout of a check is at most 60s", at=("timeout",))
        if self.jitter > 0.5:
            raise fault("the jitter is at most 50%", at=("jitter",))
        return self


class Health(Model):
    """How it is noticed that an endpoint does not serve."""

    check: Check | None = setting(None, "active checks")
    eject: Eject = part(Eject, "failures of real requests")
    when_all_bad: Literal["fail", "panic"] = setting(
        "fail", "with every endpoint out: answer 503 at once, or send to any of them as if none were"
    )
