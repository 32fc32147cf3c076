"""The schema of the configuration file, from its top level down to a route.

Strategy: one frozen model per mapping, defaults written as the file would write them; cross-field rules that need
nothing but the mapping itself live here, everything that looks further is in `check`. Names are a contract: extended,
never renamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from gateway.config.base import Model, Shorthand, listed, needed, part, setting
from gateway.config.check_tls import CertificateInfo, FileVersion
from gateway.config.conditions import Condition, ValueMatch
from gateway.config.discovery import Discovery
from gateway.config.grpc import CONTENT_TYPE, GrpcMatch
from gateway.config.health import Health
from gateway.config.http2 import ListenerHttp2, UpstreamHttp2, widen_http2
from gateway.config.mesh_member import Mesh, written_out
from gateway.config.mesh_parts import ServiceTraffic
from gateway.config.policies import Policy, PolicyRef
from gateway.config.redis import Redis
from gateway.config.resilience import Balance, BalanceSettings, Hedge, Retries, RetrySettings, UpstreamLimits
from gateway.config.shaping import Canary, Mirror, Split, StickyKey
from gateway.config.source import Document, Path_
from gateway.config.tcp import Tcp
from gateway.config.tls import ListenerTls, UpstreamTls, widen_upstream_tls
from gateway.config.values import (
    MAX_FIELDS,
    MAX_HEAD,
    Deadline,
    Duration,
    FilePath,
    Int,
    Name,
    Secret,
    Size,
    Text,
    Workers,
    base_of,
    fault,
)
from gateway.config.web import (
    Address,
    AddressText,
    BindText,
    FieldName,
    HostPattern,
    Method,
    Network,
    Prefix,
    Template,
    parameters,
    parse_address,
    parse_host_pattern,
)
from gateway.config.websocket import AS_TRUE, WebSocket


class Drain(Model):
    """How a worker stops: readiness off, wait, stop accepting, finish what is in flight."""

    delay: Duration = setting("0s", "time between readiness going off and the end of accepting; 5s in Kubernetes")
    deadline: Deadline = setting("30s", "longest time for what is in flight")


class Log(Model):
    """Where the gateway's own log goes."""

    level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is written")
    file: FilePath | None = setting(None, "file of the log, reopened on SIGUSR1; default: standard error")


class Admin(Model):
    """The admin endpoint: health, metrics, status, reload."""

    bind: BindText = setting(
        "127.0.0.1:9900", "where it listens; anything but loopback or a Unix socket demands a token"
    )
    token: Secret | None = setting(None, "bearer token that callers must present")


class ListenerTimeouts(Model):
    """How long a listener waits for its client."""

    head: Deadline = setting("10s", "for a complete request head; 408 after it")
    body: Deadline = setting("30s", "without a byte of the body; 408 after it")
    keepalive: Deadline = setting("75s", "for the next request on an idle connection")
    write: Deadline = setting("30s", "without the client taking a byte of the response")


class ListenerLimits(Model):
    """How much a client may send."""

    head: Size = setting("32KiB", "whole request head, at most 64KiB; 431 above it")
    fields: Int = Field(default=100, ge=1, le=MAX_FIELDS, description="header fields in a request; 431 above it")
    target: Size = setting("8KiB", "request target; 414 above it")
    body: Size = setting("1MiB", "request body unless the route says otherwise; 413 above it")
    requests: Int = Field(default=10_000, ge=1, description="requests on one connection before it is closed")
    connections: Int = Field(default=10_000, ge=1, description="open client connections in each worker")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not 1024 <= self.head <= MAX_HEAD:
            raise fault(
                "a head is between 1KiB and 64KiB",
                "what does not fit there belongs into a body",
                at=("head",),
            )
        if not 64 <= self.target <= self.head:
            raise fault(
                "a target is between 64 bytes and the limit of the head", "raise `head` as well", at=("target",)
            )
        return self


class Listener(Model):
    """A place where clients connect."""

    bind: BindText = needed("address:port to listen on (port 0: any free one), or unix:/path")
    timeouts: ListenerTimeouts = part(ListenerTimeouts, "deadlines towards the client")
    limits: ListenerLimits = part(ListenerLimits, "bounds of what a client may send")
    trusted_proxies: Annotated[tuple[Network, ...], listed("network")] = setting(
        [], "whose X-Forwarded-*, Forwarded and traceparent are believed"
    )
    proxy_protocol: Literal["off", "optional", "required"] = setting(
        "off", "PROXY protocol v1 or v2 before the first request"
    )
    tls: ListenerTls | None = setting(None, "TLS towards the clients; default: clear text")
    http2: Annotated[
        ListenerHttp2 | None, Shorthand(widen_http2, {"type": "boolean", "x-is": "`true` or `false`"})
    ] = setting(True, "HTTP/2: `true` with the defaults, `false` for HTTP/1.1 only, or settings")
    tcp: Tcp | None = setting(None, "raw TCP instead of HTTP: where its bytes go; default: HTTP")
    backlog: Int = Field(default=1024, ge=1, le=65535, description="connections that the kernel queues")

    @model_validator(mode="after")
    def _versions(self) -> Self:
        if self.http2 is None and self.tls is not None and "alpn" in self.tls.model_fields_set and "h2" in self.tls.alpn:
            raise fault(
                "`h2` is offered on a listener with `http2: false`", "remove h2 here, or remove `http2: false`", at=("tls", "alpn")
            )
        return self

    @property
    def alpn(self) -> tuple[str, ...]:
        """Return the protocols that are offered above TLS."""
        if self.tcp is not None:
            return self.tcp.alpn if self.tls is not None else ()
        offered = self.tls.alpn if self.tls is not None else ()
        return tuple(name for name in offered if name != "h2" or self.http2 is not None)

    @property
    def spoken_http2(self) -> ListenerHttp2 | None:
        """Return the settings of HTTP/2, or None when no client can come to speak it."""
        if self.http2 is None or ("h2" in self.alpn if self.tls is not None else self.http2.clear):
            return self.http2
        return None


def _widen_endpoint(raw: Any) -> Any:
    return {"address": raw} if isinstance(raw, str) else raw


class Endpoint(Model):
    """One server of an upstream."""

    address: AddressText = needed("host:port")
    weight: Int = Field(default=1, ge=1, le=256, description="share of the requests, relative to the others")
    zone: Name | None = setting(None, "where it is; those in the machine's own `zone` are preferred")


class UpstreamTimeouts(Model):
    """How long an exchange waits for its upstream; 504 names the phase."""

    connect: Deadline = setting("2s", "for the connection")
    head: Deadline = setting("15s", "for the head of the response, once the request is sent")
    idle: Deadline = setting("30s", "without a byte of the response")
    total: Deadline = setting("60s", "for the whole exchange, retries included")


class Keepalive(Model):
    """Idle connections kept for the next request."""

    # As many as `limits.requests` lets be in flight: with fewer, a busy endpoint is connected to anew all the time.
    connections: Int = Field(default=1024, ge=0, le=65535, description="per endpoint and worker")
    idle: Deadline = setting("55s", "after which one is closed; shorter than the server's own")
    age: Deadline = setting("1h", "after which one is not used again")


def _upstream_host(raw: Any) -> str:
    hint = "preserve (the client's), target (the endpoint's own) or a host name"
    if raw in ("preserve", "target"):
        return str(raw)
    if not isinstance(raw, str) or "*" in raw:
        raise fault("expected the Host to send", hint)
    return str(parse_address(raw)) if ":" in raw.strip("[]") and "]" != raw[-1] else parse_host_pattern(raw)


Target = Annotated[Endpoint, Shorthand(_widen_endpoint, {"type": "string", "x-is": "host:port"})]


def check_targets(targets: Sequence[Endpoint], at: tuple[str | int, ...] = ()) -> None:
    """Raise the fault of a list that names an endpoint twice."""
    seen: set[Address] = set()
    for number, endpoint in enumerate(targets):
        if endpoint.address in seen:
            raise fault("the same endpoint twice", "give it a `weight` instead", at=(*at, number))
        seen.add(endpoint.address)


class Upstream(Model):
    """A service behind the gateway: its endpoints and how they are called."""

    targets: tuple[Target, ...] = setting(
        [], "the endpoints: host:port, or {address, weight, zone}; every address of a host name is one"
    )
    discovery: Discovery = part(Discovery, "endpoints that are found at run time")
    service: Name | None = setting(None, "a service of the mesh, instead of `targets` and `tls`: the mesh says where and who it is")
    timeouts: UpstreamTimeouts = part(UpstreamTimeouts, "deadlines towards the upstream")
    keepalive: Keepalive = part(Keepalive, "idle connections")
    limits: UpstreamLimits = part(UpstreamLimits, "bounds of the load")
    host: Annotated[
        str,
        BeforeValidator(_upstream_host),
        WithJsonSchema({"type": "string", "x-is": "`preserve`, `target` or a host"}),
    ] = setting("preserve", "the Host that is sent: the client's, the endpoint's own, or this one")
    tls: Annotated[
        UpstreamTls | None, Shorthand(widen_upstream_tls, {"type": "boolean", "x-is": "`true`"})
    ] = setting(None, "TLS towards the endpoints; `true`: verified by this machine's authorities; default: clear text")
    protocol: Literal["http1", "http2", "grpc"] = setting(
        "http1", "what the endpoints speak: HTTP/1.1, HTTP/2, or gRPC, which is HTTP/2 whose grpc-status counts as the answer's status"
    )
    http2: UpstreamHttp2 | None = setting(None, "HTTP/2 connections, with `protocol: http2` or `grpc`; default: the defaults below")
    resolve: Deadline = setting("30s", "how long a name's addresses are used at most; the record's TTL if that is shorter")
    health: Health = part(Health, "how it is noticed that an endpoint does not serve")
    balance: BalanceSettings = part(Balance, "how the next endpoint is chosen")
    slow_start: Duration = setting("0s", "how long a new or returned endpoint takes until it gets its whole share; 0s: at once")
    retries: RetrySettings = part(Retries, "further attempts: a number, or settings")
    hedge: Hedge | None = setting(None, "a second request when the first takes long")
    abandoned: Literal["finish", "cancel"] | None = setting(
        None, "what is not safe to repeat and was sent completely, when its client leaves: let it finish, or cancel it; default: "
        "`finish`, with `protocol: grpc` `cancel`, since a call's client cancels it on purpose and its service is told"
    )

    _traffic: ServiceTraffic | None = PrivateAttr(default=None)
    _part: bool = PrivateAttr(default=False)
    _carries: bool | None = PrivateAttr(default=None)

    @property
    def traffic(self) -> ServiceTraffic | None:
        """Return how the mesh deals the service's requests out; None when all its instances are alike."""
        return self._traffic

    @property
    def carries_websockets(self) -> bool | None:
        """Tell whether the mesh lets the service carry WebSockets; None where that is not known, or no service's."""
        return self._carries

    @property
    def is_part(self) -> bool:
        """Tell whether this upstream is not the file's, but a part of one that is."""
        return self._part

    @model_validator(mode="after")
    def _endpoints(self) -> Self:
        found = "srv" if self.discovery.srv is not None else "file" if self.discovery.file is not None else None
        if found is None and not self.targets:
            raise fault(
                "no endpoints: neither `targets` nor a `discovery` nor a `service`",
                "add `targets: [host:port]`, or `discovery: {srv: NAME}` or `discovery: {file: FILE}`",
            )
        if found is not None and self.targets:
            raise fault(
                f"both `targets` and `discovery: {{{found}}}`", "keep one of them: they would contradict each other",
                at=("targets",),
            )
        check_targets(self.targets, ("targets",))
        if self.http2 is not None and self.protocol == "http1":
            raise fault(
                "settings of HTTP/2 for an upstream that is spoken to in HTTP/1.1",
                "add `protocol: http2` (or grpc), or remove them",
                at=("http2",),
            )
        return self

    @property
    def spoken_http2(self) -> UpstreamHttp2 | None:
        """Return the settings of HTTP/2, or None when HTTP/1.1 is spoken."""
        return None if self.protocol == "http1" else self.http2 or UpstreamHttp2()


class Match(Model):
    """Which requests a route takes. Order in the file does not matter: the most specific route wins."""

    host: Annotated[tuple[HostPattern, ...], listed("host"), Field(min_length=1)] = setting(
        ["*"], "hosts: a name, *.suffix, or * for any"
    )
    path: Template | None = setting(None, "a path template: /v1/payments/{id}")
    prefix: Prefix | None = setting(None, "a path and everything below it, on segment boundaries")
    grpc: GrpcMatch | None = setting(
        None, "calls of a gRPC service, instead of `path`, `prefix` and `methods`: {service: bank.v1.Payments, method: Transfer}"
    )
    methods: Annotated[tuple[Method, ...], listed("method"), Field(min_length=1)] | None = setting(
        None, "methods; default: any"
    )
    headers: dict[FieldName, Condition] = setting(
        {}, "headers that must match: a value, {present: true} or {prefix: text}"
    )
    query: dict[Text, Condition] = setting({}, "query parameters that must match, likewise")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.grpc is not None:
            self._calls(self.grpc)
        if self.path is not None and self.prefix is not None:
            raise fault("both `path` and `prefix`", "keep one of them", at=("prefix",))
        if self.path is None and self.prefix is None:
            raise fault(
                "neither `path` nor `prefix` nor `grpc`",
                "add `path: /v1/payments/{id}` or `prefix: /v1`; `prefix: /` matches everything",
            )
        for name in ("host", "methods"):
            values: tuple[str, ...] = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise fault(f"the same value twice in `{name}`", "remove one of them", at=(name,))
        if "host" in self.headers:
            raise fault("the header host is matched by `host`", "write `host: api.bank.test`", at=("headers", "host"))
        return self

    def _calls(self, grpc: GrpcMatch) -> None:
        """Say in a path, a method and a header what `grpc` says: all who read routes look at these."""
        for name in ("path", "prefix", "methods"):
            if getattr(self, name) is not None:
                raise fault(f"both `grpc` and `{name}`", "a call is a POST to /SERVICE/METHOD: keep `grpc` alone", at=(name,))
        if "content-type" in self.headers:
            raise fault(
                "both `grpc` and a condition on the content type",
                f"`grpc` demands {CONTENT_TYPE} by itself: remove it",
                at=("headers", "content-type"),
            )
        kind = {"content-type": ValueMatch(prefix=CONTENT_TYPE)}
        self.__dict__.update(path=grpc.path, methods=("POST",), headers={**self.headers, **kind})

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return the names of the template's parameters, in order."""
        return parameters(self.path or "")


class RouteTimeouts(Model):
    """Deadlines of one route; what is absent is the upstream's."""

    total: Deadline | None = setting(None, "for the whole exchange")
    head: Deadline | None = setting(None, "for the head of the response")
    idle: Deadline | None = setting(None, "without a byte of the response")


class RouteLimits(Model):
    """Bounds of one route; what is absent is the listener's."""

    body: Size | None = setting(None, "longest request body")


class Route(Model):
    """Requests of one kind, the policies they meet, and where they go."""

    name: Name = needed("unique name, used in metrics, logs and `crossway explain`")
    match: Match = needed("which requests it takes")
    policies: tuple[PolicyRef, ...] = setting(
        [], "policies by name or written in place; they run in the order of their phases"
    )
    upstream: Name | None = setting(None, "name of the upstream; this or `split`")
    split: Annotated[tuple[Split, ...], Field(min_length=1, max_length=64)] | None = setting(
        None, "several upstreams by weight, instead of `upstream`"
    )
    sticky: StickyKey | None = setting(
        None, "keeps a caller at one split: by an identity, an address, a header or a cookie; default: each request is drawn"
    )
    canary: Annotated[tuple[Canary, ...], Field(max_length=64)] = setting(
        [], "requests that go elsewhere; the first that matches counts, before `split` and `upstream`"
    )
    mirror: Mirror | None = setting(None, "copies for another upstream")
    websocket: Annotated[WebSocket | None, AS_TRUE] = setting(
        None, "lets WebSocket handshakes switch to a tunnel; `true`: with the defaults; default: Upgrade is stripped"
    )
    listeners: Annotated[tuple[Name, ...], listed("listener name"), Field(min_length=1)] | None = setting(
        None, "listeners that offer it; default: all"
    )
    timeouts: RouteTimeouts = part(RouteTimeouts, "deadlines that differ from the upstream's")
    limits: RouteLimits = part(RouteLimits, "bounds that differ from the listener's")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.upstream is None and self.split is None:
            raise fault("neither `upstream` nor `split`", "add `upstream: NAME`")
        if self.upstream is not None and self.split is not None:
            raise fault("both `upstream` and `split`", "keep one of them", at=("split",))
        if self.sticky is not None and self.split is None:
            raise fault("`sticky` without a `split`", "remove it, or write a split", at=("sticky",))
        if self.split is not None and not any(split.weight for split in self.split):
            raise fault("the weights add up to 0: no request could be sent anywhere", "give one a weight", at=("split",))
        seen: set[str] = set()
        for number, split in enumerate(self.split or ()):
            if split.upstream in seen:
                raise fault("the same upstream twice", "give it the sum of the weights", at=("split", number, "upstream"))
            seen.add(split.upstream)
        return self

    @property
    def splits(self) -> tuple[Split, ...]:
        """Return the splits; a route with one upstream is a split of one."""
        return self.split if self.split is not None else (Split(upstream=self.upstream or ""),)

    @property
    def choices(self) -> tuple[Canary | Split, ...]:
        """Return everything that a request may take: canaries, then splits."""
        return (*self.canary, *self.splits)

    @property
    def upstreams(self) -> tuple[str, ...]:
        """Return the names of the upstreams that requests may reach, each once; not that of the mirror."""
        names = [split.upstream for split in self.splits] + [canary.upstream for canary in self.canary]
        return tuple(dict.fromkeys(names))


def _nothing_is_empty(raw: Any) -> Any:
    return {} if raw is None else raw


def _no_fault(raw: Any) -> Any:
    """Raise what was found before the value's turn came, so that it hides nothing else."""
    if isinstance(raw, PydanticCustomError):
        raise raw
    return raw


class Config(Model):
    """A whole configuration. Made by `gateway.config.load`."""

    model_config = ConfigDict(title="Crossway configuration")

    version: Annotated[Literal[1], Field(description="version of this format")]
    workers: Workers = setting("auto", "worker processes; `auto` follows CPU affinity and the cgroup's quota")
    zone: Name | None = setting(None, "where this machine is; endpoints in the same zone are preferred")
    drain: Drain = part(Drain, "graceful stop")
    log: Log = part(Log, "the gateway's own log")
    admin: Admin = part(Admin, "the admin endpoint")
    listeners: Annotated[dict[Name, Listener], Field(min_length=1)] = needed("where clients connect, by name")
    redis: Redis | None = setting(None, "where limits of several gateways are kept")
    mesh: Mesh | None = setting(None, "the gateway as a member of a service mesh")
    upstreams: Annotated[dict[Name, Annotated[Upstream, BeforeValidator(_no_fault)]], Field(min_length=1)] = needed("services behind the gateway, by name")
    policies: Annotated[dict[Name, Policy], BeforeValidator(_nothing_is_empty)] = setting(
        {}, "policies that routes use, by name"
    )
    routes: tuple[Route, ...] = setting([], "what goes where; may be missing where all listeners pass raw TCP")

    @model_validator(mode="before")
    @classmethod
    def _services(cls, data: Any, info: ValidationInfo) -> Any:
        """Write out upstreams that are services of the mesh."""
        upstreams = data.get("upstreams") if isinstance(data, dict) else None
        if not isinstance(upstreams, dict) or not info.context:
            return data
        whole = dict(upstreams)
        for name, raw in upstreams.items():
            if isinstance(raw, dict) and raw.get("service") is not None:
                try:
                    whole[name] = written_out(raw, data.get("mesh"), base_of(info))
                except PydanticCustomError as error:
                    whole[name] = error  # told in its turn, with what else is wrong
                info.context["models"][id(raw)] = Upstream
        return {**data, "upstreams": whole}

    @model_validator(mode="after")
    def _preflights(self) -> Self:
        """A browser asks for leave with a request that has no content type: a route that answers it cannot demand one."""
        for route in self.routes:
            policies = [use.inline or self.policies.get(use.use or "") for use in route.policies]
            if route.match.grpc is not None and any(policy is not None and policy.kind == "cors" for policy in policies):
                route.match.headers.pop("content-type", None)
        return self

    _document: Document | None = PrivateAttr(default=None)
    _digest: str = PrivateAttr(default="")
    _certificates: tuple[CertificateInfo, ...] = PrivateAttr(default=())
    _watched: dict[str, FileVersion] = PrivateAttr(default_factory=dict)

    @property
    def document(self) -> Document:
        """Return the file that this was loaded from, with the places of its values."""
        if self._document is None:
            raise RuntimeError("this configuration was not loaded from a file")
        return self._document

    @property
    def path(self) -> Path:
        """Return the path of the file, as it was given."""
        return self.document.path

    @property
    def base(self) -> Path:
        """Return the folder of the file, absolute: what relative paths and Python policies are looked up in."""
        return self.document.base

    @property
    def digest(self) -> str:
        """Return the sha256, in hex, over the file and everything that was read because of it."""
        return self._digest

    @property
    def certificates(self) -> tuple[CertificateInfo, ...]:
        """Return the certificates that it uses, as they were when it was loaded."""
        return self._certificates

    @property
    def watched(self) -> dict[str, FileVersion]:
        """Return the files whose change is a reason to load it again, with the versions that were loaded."""
        return self._watched

    @property
    def tcp_upstreams(self) -> frozenset[str]:
        """Return the names of the upstreams to which listeners pass raw TCP."""
        return frozenset(name for each in self.listeners.values() if each.tcp is not None for name in each.tcp.upstreams)

    @property
    def http_listeners(self) -> tuple[str, ...]:
        """Return the names of the listeners that offer routes."""
        return tuple(name for name, each in self.listeners.items() if each.tcp is None)

    def where(self, path: Path_) -> tuple[int, int]:
        """Return (line, column), from 1, of the value at a path such as ("routes", 0, "match")."""
        return self.document.spot(path).mark[:2]
