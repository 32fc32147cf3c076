"""The settings of every built-in policy.

Strategy: a policy is a mapping with exactly one key, its kind; Policy has one optional field per kind, so an unknown
kind or a mistake inside one is reported at its own place. What needs the file system or the route around it is in
`check`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, SecretStr, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import CoreSchema

from gateway.config.base import Model, Shorthand, listed, needed, part, setting
from gateway.config.conditions import Share, When
from gateway.config.grpc import GrpcWeb, widen_grpc_web
from gateway.config.identity import ALGORITHMS, ApiKey, ApiKeyEntry, Jwt, Scope, TokenCache
from gateway.config.limits import Quota, RateLimit
from gateway.config.values import (
    MAX_FIELDS,
    MAX_HEAD,
    Deadline,
    Duration,
    FilePath,
    Flag,
    Int,
    Rate,
    Size,
    Text,
    fault,
    parse_name,
)
from gateway.config.web import EditName, FieldName, FieldValue, HostPattern, Network, Prefix, Template

Scalar = str | int | float | bool


def _claim_values(raw: Any) -> tuple[Scalar, ...]:
    values = raw if isinstance(raw, (list, tuple)) else [raw]
    if not values or not all(isinstance(value, (str, int, float, bool)) for value in values):
        raise fault("expected a value or a list of allowed values", "such as `acr: high` or `region: [eu, uk]`")
    return tuple(values)


Scopes = Annotated[tuple[Scope, ...], listed("scope"), Field(min_length=1)]
ClaimValues = Annotated[
    tuple[Scalar, ...],
    BeforeValidator(_claim_values),
    WithJsonSchema({"type": ["string", "number", "boolean", "array"], "x-is": "value or list of allowed values"}),
]


class Ip(Model):
    """Allow or deny clients by address; deny wins, and with `allow` everyone else is refused."""

    kind: ClassVar[str] = "ip"

    allow: Annotated[tuple[Network, ...], listed("network")] = setting(
        [], "networks that may pass; empty: everyone not denied"
    )
    deny: Annotated[tuple[Network, ...], listed("network")] = setting([], "networks that may not")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.allow and not self.deny:
            raise fault("neither `allow` nor `deny`: this policy does nothing", "list networks such as 10.0.0.0/8")
        return self


class LimitsPolicy(Model):
    """Bounds of one exchange that are tighter, or wider, than the listener's."""

    kind: ClassVar[str] = "limits"

    body: Size | None = setting(None, "longest request body; 413 above it")
    head: Size | None = setting(None, "largest request head, within the listener's limit; 431 above it")
    fields: Int | None = Field(
        default=None, ge=1, le=MAX_FIELDS, description="most header fields, within the listener's limit; 431 above it"
    )
    time: Deadline | None = setting(None, "longest time of the whole exchange; 504 after it")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if all(each is None for each in (self.body, self.head, self.fields, self.time)):
            raise fault(
                "none of `body`, `head`, `fields` and `time`: this policy does nothing",
                "add `body: 64KiB`, `head: 8KiB`, `fields: 50` or `time: 5s`",
            )
        if self.head is not None and not 1 <= self.head <= MAX_HEAD:
            raise fault("a head is at most 64KiB", "what does not fit there belongs into a body", at=("head",))
        return self


class HeaderEdits(Model):
    """Changes to a message's headers: removals first, then `set`, then `add`."""

    set: dict[EditName, FieldValue] = setting({}, "replace the header, or add it")
    add: dict[EditName, FieldValue] = setting({}, "add another field of that name")
    remove: Annotated[tuple[EditName, ...], listed("header name")] = setting([], "remove every field of that name")


class Headers(Model):
    """Set, add and remove headers on the way in and out."""

    kind: ClassVar[str] = "headers"

    request: HeaderEdits = part(HeaderEdits, "on the request, before it is forwarded")
    response: HeaderEdits = part(HeaderEdits, "on the response, before it goes to the client")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any((edits.set or edits.add or edits.remove) for edits in (self.request, self.response)):
            raise fault("no change to any header: this policy does nothing", "add `request: {set: {name: value}}`")
        return self


class Rewrite(Model):
    """Change the path or the host that the upstream sees; matching and authorisation see the original."""

    kind: ClassVar[str] = "rewrite"

    prefix: Prefix | None = setting(None, "put this in place of the prefix that matched")
    path: Template | None = setting(None, "the whole path, with the parameters of the route's own template")
    host: HostPattern | None = setting(None, "the Host that the upstream sees")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.prefix is not None and self.path is not None:
            raise fault("both `prefix` and `path`", "keep one of them", at=("path",))
        if self.prefix is None and self.path is None and self.host is None:
            raise fault("nothing to rewrite", "add one of `prefix`, `path`, `host`")
        if self.host is not None and "*" in self.host:
            raise fault("a pattern cannot be sent as Host", "write the host itself", at=("host",))
        return self


class Fault(Model):
    """Delay or answer a share of the requests on purpose, to see what the callers make of it. Not for production traffic."""

    kind: ClassVar[str] = "fault"

    delay: Deadline | None = setting(None, "wait this long first; the exchange's total time goes on")
    abort: Int | None = Field(default=None, ge=400, le=599, description="answer with this status instead of the upstream")
    percent: Share = setting(100, "share of the matching requests")
    when: When | None = setting(None, "which requests; default: all of the route")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.delay is None and self.abort is None:
            raise fault("neither `delay` nor `abort`: this policy does nothing", "add `delay: 100ms` or `abort: 503`")
        return self


def _origin(raw: Any) -> str:
    from urllib.parse import urlsplit

    hint = "scheme and host as a browser sends them: https://app.bank.test, or *"
    if raw == "*":
        return "*"
    if not isinstance(raw, str):
        raise fault("expected an origin", hint)
    text = raw.lower()
    try:
        url = urlsplit(text)
        whole = f"{url.scheme}://{url.netloc}"
        url.port  # noqa: B018 - raises for a bad port
    except ValueError:
        raise fault("not an origin", hint) from None
    if not url.scheme or not url.hostname or "@" in url.netloc or whole != text or not text.isascii() or " " in text:
        raise fault("not an origin", hint)
    return text


Origin = Annotated[str, BeforeValidator(_origin), WithJsonSchema({"type": "string", "x-is": "origin or `*`"})]


class Cors(Model):
    """Answer preflights and mark responses for browsers of other origins."""

    kind: ClassVar[str] = "cors"

    origins: Annotated[tuple[Origin, ...], listed("origin or `*`"), Field(min_length=1)] = needed("who may call")
    methods: Annotated[tuple[Text, ...], listed("method")] = setting(
        ["GET", "HEAD", "POST"], "methods that a preflight allows"
    )
    headers: Annotated[tuple[FieldName, ...], listed("header name")] = setting(
        [], "request headers that a preflight allows"
    )
    expose: Annotated[tuple[FieldName, ...], listed("header name")] = setting(
        [], "response headers that a script may read"
    )
    credentials: Flag = setting(False, "allow cookies and Authorization")
    max_age: Duration = setting("10m", "how long a browser may keep a preflight's answer")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "*" in self.origins and self.credentials:
            raise fault(
                "every origin with credentials would open each user's account to every site",
                "list the origins",
                at=("origins",),
            )
        if "*" in self.origins and len(self.origins) > 1:
            raise fault("* beside other origins", "keep * alone, or remove it", at=("origins",))
        return self


# An inherited descriptor is written to as it is: opening these names again may be refused, or reach another file.
DESCRIPTORS = {Path("/dev/stdout"): 1, Path("/dev/stderr"): 2}


def _audit_file(raw: Any) -> Any:
    return f"/dev/{raw}" if raw in ("stdout", "stderr") else raw


AUDIT_FIELDS = (
    "time", "worker", "seq", "id", "client", "subject", "issuer", "method", "host", "path", "route", "upstream", "status",
    "outcome", "reason", "origin", "duration", "bytes_in", "bytes_out", "trace", "certificate", "thumbprint",
)  # fmt: skip


class Audit(Model):
    """Write a JSON line for each external call: who, what, when, outcome, origin, duration. Never a secret."""

    kind: ClassVar[str] = "audit"

    file: Annotated[FilePath, BeforeValidator(_audit_file)] = needed(
        "where the lines go, or stdout or stderr; reopened on SIGUSR1"
    )
    fields: Annotated[tuple[Text, ...], listed("text"), Field(min_length=1)] | None = setting(
        None, "which fields; default: all"
    )


def _class(raw: Any) -> str:
    hint = 'write "module:Class"; the module lies beside this file'
    if not isinstance(raw, str):
        raise fault("expected a class", hint)
    module, colon, name = raw.partition(":")
    if not colon or not all(part.isidentifier() for part in module.split(".")) or not name.isidentifier():
        raise fault("not a class", hint)
    return raw


class Python(Model):
    """Call a class of your own; every further key is passed to it by name."""

    kind: ClassVar[str] = "python"
    model_config = ConfigDict(extra="allow")

    class_: Annotated[str, BeforeValidator(_class), WithJsonSchema({"type": "string", "x-is": "module:Class"})] = Field(
        alias="class", description="the class; its module is looked up beside the configuration first"
    )
    timeout: Deadline = setting("1s", "longest time of one call")
    on_failure: Literal["deny", "continue"] = setting("deny", "after an exception or timeout: answer 500, or go on")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the class."""
        return dict(self.model_extra or {})

    @property
    def module(self) -> str:
        """Return the module's dotted name."""
        return self.class_.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Return the class's name in its module."""
        return self.class_.partition(":")[2]


Settings = (
    Jwt
    | ApiKey
    | Ip
    | RateLimit
    | Quota
    | LimitsPolicy
    | Headers
    | Rewrite
    | Cors
    | GrpcWeb
    | Fault
    | Audit
    | Python
    | tuple[Scope, ...]
    | dict[str, tuple[Scalar, ...]]
)

KINDS = (
    "jwt",
    "api_key",
    "ip",
    "scopes",
    "claims",
    "rate_limit",
    "quota",
    "limits",
    "headers",
    "rewrite",
    "cors",
    "grpc_web",
    "fault",
    "audit",
    "python",
)


class Policy(Model):
    """One policy: a mapping with a single key that says which."""

    jwt: Jwt | None = setting(None, "verify a bearer token")
    api_key: ApiKey | None = setting(None, "identify a client by a key")
    ip: Ip | None = setting(None, "allow or deny by address")
    scopes: Scopes | None = setting(None, "scopes that the caller must hold, all of them; 403 otherwise")
    claims: Annotated[dict[Text, ClaimValues], Field(min_length=1)] | None = setting(
        None, "claims that the token must carry: a value, or one of a list"
    )
    rate_limit: RateLimit | None = setting(None, "limit requests per time")
    quota: Quota | None = setting(None, "limit requests per hour, day or month, over all gateways")
    limits: LimitsPolicy | None = setting(None, "bound the body or the time")
    headers: Headers | None = setting(None, "edit headers")
    rewrite: Rewrite | None = setting(None, "rewrite path or host")
    cors: Cors | None = setting(None, "cross-origin resource sharing")
    grpc_web: Annotated[
        GrpcWeb | None, Shorthand(widen_grpc_web, {"type": "boolean", "x-is": "`true`"})
    ] = setting(None, "translate gRPC-Web for gRPC services; `true`: with the defaults")
    fault: Fault | None = setting(None, "delay or answer requests on purpose")
    audit: Audit | None = setting(None, "record each call")
    python: Python | None = setting(None, "call your own class")

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    @model_validator(mode="after")
    def _single(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise fault(
                "two policies in one mapping",
                "write each as a list item of its own",
                at=(given[1],),
                detail=" and ".join(given),
            )
        if not given:
            raise fault("no settings", f"a policy is one of: {', '.join(KINDS)}")
        return self

    @cached_property
    def kind(self) -> str:
        """Return the single key: jwt, scopes, rate_limit ..."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def settings(self) -> Settings:
        """Return the settings under that key."""
        settings: Settings = getattr(self, self.kind)
        return settings


def _widen_use(raw: Any) -> Any:
    return {"use": raw} if isinstance(raw, str) else {"inline": raw}


class PolicyUse(Model):
    """A policy in a route: the name of one under `policies`, or one written in place. Exactly one of both is set."""

    use: Annotated[str, BeforeValidator(parse_name)] | None = None
    inline: Policy | None = None

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "x-is": "policy name"}, handler(Policy.__pydantic_core_schema__)]}


PolicyRef = Annotated[PolicyUse, Shorthand(_widen_use, None)]

__all__ = [
    "ALGORITHMS", "AUDIT_FIELDS", "KINDS", "ApiKey", "ApiKeyEntry", "Audit", "Cors", "Fault", "GrpcWeb", "HeaderEdits", "Headers",
    "Ip", "Jwt", "LimitsPolicy", "Policy", "PolicyRef", "PolicyUse", "Python", "Quota", "Rate", "RateLimit", "Rewrite",
    "Scalar", "Scopes", "SecretStr", "Settings", "TokenCache",
]  # fmt: skip
