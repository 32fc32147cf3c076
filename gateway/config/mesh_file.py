"""The schema of a mesh's file (mesh.yaml): the control plane, the services, who may call whom, who is shut out.

Strategy: the same base, values and messages as a gateway's file. Retries and balancing of a service are those of `upstreams`. Default
deny: what no rule allows is refused, and `audit` must be written to change that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)

from gateway.config.base import Model, Shorthand, listed, needed, part, setting
from gateway.config.conditions import Condition
from gateway.config.mesh_external import External
from gateway.config.mesh_member import SpireText
from gateway.config.mesh_traffic import MOST, ServiceCanary, ServiceSplit, check_traffic
from gateway.config.resilience import BalanceSettings, RetrySettings
from gateway.config.shaping import StickyKey
from gateway.config.source import Document, Key, Spot
from gateway.config.values import (
    Deadline,
    FilePath,
    Int,
    Percent,
    RateText,
    Text,
    base_of,
    described,
    fault,
    parse_int,
    text_of,
)
from gateway.config.web import BindText, FieldName, KeySource, Method, Prefix, Template
from gateway.config.websocket import AS_TRUE, ServiceWebSocket

EVERYBODY = "*"
_DOMAIN = re.compile(r"(?=.{1,255}\Z)[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_DNS = re.compile(r"(?:\*\.)?(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ACCOUNT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?/[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
MIN_LIFETIME, MAX_LIFETIME = 60, 7 * 86400  # seconds


def _domain(raw: Any) -> str:
    hint = "small letters, digits, dots, - and _, such as bank.internal"
    if not _DOMAIN.fullmatch(text := text_of(raw, "expected a trust domain", hint)):
        raise fault("not a trust domain", hint)
    return text


def _service(raw: Any) -> str:
    hint = "small letters, digits, dots, - and _, beginning and ending with a letter or digit, at most 63"
    if not _NAME.fullmatch(text := text_of(raw, "expected the name of a service", hint)):
        raise fault("not the name of a service", hint)
    return text


def _service_or_all(raw: Any) -> str:
    return EVERYBODY if raw == EVERYBODY else _service(raw)


def _dns(raw: Any) -> str:
    hint = "a name such as app7.bank.internal, or *.payments.bank.internal for any one label"
    if not _DNS.fullmatch(text := text_of(raw, "expected a DNS name", hint).lower()):
        raise fault("not a DNS name", hint)
    return text


def _account(raw: Any) -> str:
    hint = "namespace/name, such as shop/payments"
    if not _ACCOUNT.fullmatch(text := text_of(raw, "expected a service account", hint)):
        raise fault("not a service account", hint)
    return text


def _serial(raw: Any) -> str:
    hint = "as `crossway mesh status` and openssl show it, in hexadecimal and quoted"
    text = text_of(raw, "expected a serial number", hint).lower().replace(":", "").lstrip("0")
    if not re.fullmatch("[0-9a-f]{1,40}", text):
        raise fault("not a serial number", hint)
    return text


def _state(raw: Any, info: ValidationInfo) -> str:
    hint = "a file such as mesh.db (SQLite), or postgresql://user@host/database"
    text = text_of(raw, "expected the state's place", hint)
    if text.startswith(("postgresql://", "postgres://")):
        return str(text)
    if not text or "\0" in text or "://" in text:
        raise fault("not a file or a postgresql:// URL", hint)
    return str(base_of(info) / text)


class _OrOff:
    """Writes `off`, where the model has None, into the JSON Schema."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        kinds = [each for each in handler(core)["anyOf"] if each.get("type") != "null"]
        return {"anyOf": [*kinds, {"const": "off"}]}


def _probe(raw: Any) -> Any:
    if raw == "off":
        return None
    if not isinstance(raw, (Mapping, Model)):
        raise fault("expected a mapping or `off`", "such as {interval: 5s, timeout: 1s, failures: 3}")
    return raw


ServiceName = Annotated[str, PlainValidator(_service), described("service")]
ServiceOrAll = Annotated[str, PlainValidator(_service_or_all), described("service or `*`")]
TrustDomain = Annotated[str, PlainValidator(_domain), described("trust domain")]
DnsName = Annotated[str, PlainValidator(_dns), described("DNS name")]
Account = Annotated[str, PlainValidator(_account), described("service account")]
Serial = Annotated[str, PlainValidator(_serial), described("serial number")]
StatePlace = Annotated[
    str, PlainValidator(_state), described("file or postgresql:// URL"),
    PlainSerializer(lambda place: re.sub(r"://[^/@]*@", "://***@", place), return_type=str),
]  # fmt: skip


class KubernetesJoin(Model):
    """Joining by the token that Kubernetes gives a pod: of a service account, for this audience, bound to the pod."""

    issuer: Text = needed("`iss` of the cluster's tokens, as `kubectl get --raw /.well-known/openid-configuration` says it")
    keys: KeySource = needed("the cluster's public keys: a file of `kubectl get --raw /openid/v1/jwks`, or an https URL")
    keys_ca: FilePath | None = setting(None, "roots by which that URL is verified, PEM; default: the system's")
    keys_token: FilePath | None = setting(None, "a bearer token that the URL asks for; read anew each time")
    audience: Text = setting("crossway", "whom the token must be meant for")
    services: Annotated[dict[ServiceName, Annotated[tuple[Account, ...], listed("service account"), Field(min_length=1)]], Field(min_length=1)] = needed(
        "which service accounts, as namespace/name, may join as which service"
    )

    @model_validator(mode="after")
    def _for_urls(self) -> Self:
        for key in ("keys_ca", "keys_token"):
            if getattr(self, key) is not None and not self.keys.startswith("https://"):
                raise fault(f"`{key}` is for keys at an https URL", "remove it, or write the URL in `keys`", at=(key,))
        return self


class Join(Model):
    """Joining by something else than a token of `crossway mesh token`."""

    ca: FilePath | None = setting(None, "roots of another PKI, PEM, whose certificates may join (x509pop)")
    services: dict[ServiceName, Annotated[tuple[DnsName, ...], listed("DNS name"), Field(min_length=1)]] = setting(
        {}, "which DNS names in such a certificate may join as which service"
    )
    kubernetes: Annotated[tuple[KubernetesJoin, ...], Shorthand(lambda raw: [raw] if isinstance(raw, dict) else raw, None)] = setting(
        [], "joining by the token of a pod: a cluster, or a list of them"
    )

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if (self.ca is None) != (not self.services):
            missing = "services" if self.ca is not None else "ca"
            raise fault(f"`ca` and `services` belong together: `{missing}` is missing", "whose certificates, and who may join as what")
        if self.ca is None and not self.kubernetes:
            raise fault("nothing to join by", "name `ca` and `services`, or `kubernetes`, or leave `join` out")
        return self


class Probe(Model):
    """Active health of instances: the control plane shakes hands with each one (TCP and mutual TLS) where its callers would."""

    interval: Deadline = setting("5s", "between two looks at one instance, give or take a tenth; longer where there are more than 500")
    timeout: Deadline = setting("1s", "for one of them")
    failures: Annotated[Int, Field(ge=1, le=100)] = setting(3, "in a row until the instance is not offered; one success brings it back")
    most: Percent = setting("50%", "of a service's instances that may be out; when more cannot be reached, none of them is taken out")

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if self.interval < 0.1:
            raise fault("an interval is at least 100ms", "5s is usual", at=("interval",))
        if self.timeout > self.interval:
            raise fault(f"longer than the interval of {self.interval:g}s", "lower it, or raise `interval`", at=("timeout",))
        return self


class Pkcs11(Model):
    """A token behind PKCS #11."""

    module: FilePath = needed("the vendor's library, such as /usr/lib/softhsm/libsofthsm2.so")
    token: Text = needed("the token's label")
    pin_file: FilePath = needed("a file that holds the user's PIN, 0600")
    holds: Annotated[tuple[Literal["root", "issuing"], ...], listed("root or issuing"), Field(min_length=1)] = setting(
        ["root", "issuing"], "which keys are made there; others are files"
    )


class KeySettings(Model):
    """Where the authority's private keys are."""

    pkcs11: Pkcs11 = needed("in a token behind PKCS #11 (an HSM); `pip install 'crossway[pkcs11]'`")


class Control(Model):
    """The control plane itself."""

    bind: BindText = setting("127.0.0.1:9700", "where members connect (mutual TLS)")
    admin: BindText | None = setting(None, "/livez, /readyz, /metrics, /status and /crl, on loopback or a Unix socket")
    probes: BindText | None = setting(None, "/livez, /readyz and /metrics for an orchestrator, on any address; they ask nobody who he is")
    state: StatePlace = setting("mesh.db", "SQLite file, or postgresql:// URL when several control planes share it")
    ca: FilePath = setting("ca", "folder of the authority's certificates and keys; made at the first start")
    source: Literal["file", "state"] = setting("file", "what counts: this file, or the document of `crossway mesh apply` in the state (all but `control`)")
    keys: KeySettings | None = setting(None, "where the authority's new keys are made; default: files in `ca`")
    join: Join | None = setting(None, "joining by a certificate of the bank's PKI or as a pod; default: by token only")
    spire: SpireText | None = setting(None, "certificates of members and of the control plane come from SPIRE: the agent's socket, unix:PATH or env; default: from `ca`")
    requests: RateText = setting("50/s", "certificate requests that are answered; 429 above it")
    heartbeat: Deadline = setting("15s", "without a word of an instance: out of the registry, unless it can be reached")
    network: ServiceName = setting("default", "of `networks`, where this control plane is: of others it looks at the gateways only")
    health: Annotated[Probe | None, BeforeValidator(_probe), _OrOff()] = setting({}, "looking whether instances can be reached, or `off`")
    fresh: Deadline = setting("1h", "how old an assignment may get before members say so")

    @model_validator(mode="after")
    def _places(self) -> Self:
        if self.bind.unix:
            raise fault("members of a mesh connect over TCP", "write address:port", at=("bind",))
        if self.probes is not None and self.probes.unix:
            raise fault("an orchestrator asks over TCP", "write address:port", at=("probes",))
        if self.spire is not None and (other := next((name for name in ("join", "ca", "keys") if name in self.model_fields_set), None)):
            raise fault(f"both `spire` and `{other}`", "with SPIRE nobody joins and nothing is issued here", at=(other,))
        if self.admin is not None and not self.admin.unix and not self.admin.loopback:
            raise fault("not on loopback", "these pages ask nobody who he is: 127.0.0.1:PORT or unix:PATH", at=("admin",))
        return self


class Certificates(Model):
    """Certificates of members."""

    lifetime: Deadline = setting("24h", "of a member's certificate; it renews at half of it")

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if not MIN_LIFETIME <= self.lifetime <= MAX_LIFETIME:
            raise fault("a lifetime is between 1m and 7d", "24h is usual: revocation reaches everybody at once anyway", at=("lifetime",))
        return self


class Service(Model):
    """One service: how it is called by every member that may."""

    protocol: Literal["http", "http2", "grpc", "tcp"] = setting("http", "what its instances speak; declared, never guessed")
    timeout: Deadline | None = setting(None, "for an answer, retries included; default: that of `upstreams`")
    retries: RetrySettings | None = setting(None, "further attempts, as in `upstreams`")
    balance: BalanceSettings | None = setting(None, "how an instance is chosen, as in `upstreams`")
    split: Annotated[tuple[ServiceSplit, ...], Field(min_length=1, max_length=MOST)] | None = setting(
        None, "shares of the requests by labels of instances; default: all instances alike"
    )
    sticky: StickyKey | None = setting(None, "keeps a caller at one split, as in routes; default: each request is drawn")
    canary: Annotated[tuple[ServiceCanary, ...], Field(max_length=MOST)] = setting(
        [], "requests that go to instances of their own; the first that matches counts, before `split`"
    )
    websocket: Annotated[ServiceWebSocket | None, AS_TRUE] = setting(
        None, "with http: lets WebSocket handshakes switch to a tunnel; `true`: with the defaults; default: Upgrade is stripped"
    )
    idle: Deadline | None = setting(None, "with tcp: without a byte in either direction; default: 1h")
    connections: Annotated[int, BeforeValidator(parse_int), Field(ge=1, le=10_000_000)] | None = setting(
        None, "with tcp: open at once at each sidecar, its app's side and each caller's; default: 1024"
    )

    @model_validator(mode="before")
    @classmethod
    def _declared(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("protocol") in ("detect", "auto"):
            hint = "http, http2, grpc or tcp: a guess could be wrong, and a policy about requests would be passed by"
            raise fault("protocols are declared, not detected", hint, at=("protocol",))
        return raw

    @model_validator(mode="after")
    def _of_its_protocol(self) -> Self:
        if self.protocol == "tcp" and self.timeout is not None:
            raise fault("a tcp service has no answers to wait for", "write `idle`, the time without a byte", at=("timeout",))
        for name in ("idle", "connections"):
            if self.protocol != "tcp" and getattr(self, name) is not None:
                raise fault(f"`{name}` is of tcp services", "requests have `timeout`, and limits of their own", at=(name,))
        if self.protocol != "http" and self.websocket is not None:
            hint = "tcp carries them as any other bytes: remove it" if self.protocol == "tcp" else (
                "between members they pass over HTTP/1.1: write `protocol: http`; whoever opens one may speak HTTP/2 to an edge or his own sidecar"
            )
            raise fault(f"`websocket` for a service that speaks {self.protocol}", hint, at=("websocket",))
        return self

    @model_validator(mode="after")
    def _traffic(self) -> Self:
        check_traffic(self)
        return self


AppPort = Annotated[int, BeforeValidator(parse_int), Field(ge=1, le=65535)]
ClaimValue = Annotated[
    str | int | float, PlainValidator(lambda raw: _claim(raw)), described("text or number", kind="string")
]


def _claim(raw: Any) -> str | int | float:
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise fault("expected a text or a number", "write the value, or a list of values of which one is enough")
    return raw


class Rule(Model):
    """Allows: whoever is in `from` may do this at `to`. Everything said must hold; what is not said is open."""

    name: ServiceName = needed("unique; named in logs, metrics and by `crossway mesh can`")
    callers: Annotated[tuple[ServiceOrAll, ...], listed("service"), Field(min_length=1)] = needed(
        "services that call; `*`: every service of this file", alias="from"
    )
    to: Annotated[tuple[ServiceOrAll, ...], listed("service"), Field(min_length=1)] = needed("the service or external host that is called; `*`: every service")
    methods: Annotated[tuple[Method, ...], listed("method"), Field(min_length=1)] | None = setting(None, "default: any")
    path: Template | None = setting(None, "one path, `{name}` in it is any one segment: /v1/payments/{id}; default: any")
    prefix: Prefix | None = setting(None, "a path and everything below it, instead of `path`; default: any")
    headers: dict[FieldName, Condition] = setting({}, "headers: a value, {present: true} or {prefix: text}")
    ports: Annotated[tuple[AppPort, ...], listed("port"), Field(min_length=1)] | None = setting(
        None, "ports on which the apps of `to` listen (a sidecar's --app); default: any"
    )
    claims: dict[Text, Annotated[tuple[ClaimValue, ...], listed("value"), Field(min_length=1)]] = setting(
        {}, "claims of the end user for whom the caller acts, verified at the edge; one of the values is enough"
    )

    @model_validator(mode="after")
    def _one_path(self) -> Self:
        if self.path is not None and self.prefix is not None:
            raise fault("both `path` and `prefix`", "keep one of them", at=("prefix",))
        return self

    @property
    def layer7(self) -> bool:
        """Tell whether the rule looks into requests."""
        return self.methods is not None or self.path is not None or self.prefix is not None or bool(self.headers) or bool(self.claims)


class Authorization(Model):
    """Who may call whom."""

    default: Literal["deny", "audit"] = setting("deny", "what no rule allows: deny, or audit: let pass and record what would be denied")
    rules: tuple[Rule, ...] = setting([], "each allows something")
    user_authors: Annotated[tuple[ServiceName, ...], listed("service")] = setting(
        ["edge"], "services, edges by nature, that may say for which user a request is made; []: none"
    )


class Revoked(Model):
    """Who is shut out, beside those of `crossway mesh revoke`."""

    services: Annotated[tuple[ServiceName, ...], listed("service")] = setting([], "all instances of these services")
    serials: Annotated[tuple[Serial, ...], listed("serial number")] = setting([], "single certificates")


class Network(Model):
    """One of several networks that reach each other through mesh gateways only."""

    gateway: ServiceName = needed("the service whose instances in this network are its gateways: `crossway mesh gateway`")


class MeshFile(Model):
    """A whole mesh. Made by `gateway.config.mesh_load.load_mesh`."""

    model_config = ConfigDict(title="Crossway mesh")

    version: Annotated[Literal[1], Field(description="version of this format")]
    trust_domain: TrustDomain = needed("the mesh's own name, the first part of every identity")
    # Validated also when it is absent: its files are beside this one, wherever the command runs.
    control: Control = setting({}, "the control plane")
    certificates: Certificates = part(Certificates, "certificates of members")
    services: Annotated[dict[ServiceName, Service], Field(min_length=1)] = needed("who there is, by name")
    external: dict[ServiceName, External] = setting({}, "hosts outside the mesh that rules may name in `to`, by name")
    authorization: Authorization = part(Authorization, "who may call whom; default: nobody anybody")
    revoked: Revoked = part(Revoked, "who is shut out")
    networks: dict[ServiceName, Network] = setting(
        {}, "networks that reach each other through gateways only, as sidecars say them by --network; `default`: of those who say none"
    )

    _document: Document | None = PrivateAttr(default=None)
    _digest: str = PrivateAttr(default="")

    @property
    def digest(self) -> str:
        """Return the sha256 of the file and what it references, in hex."""
        return self._digest

    @property
    def path(self) -> Path:
        """Return the path of the file, as it was given."""
        if self._document is None:
            raise RuntimeError("this mesh was not loaded from a file")
        return self._document.path

    @property
    def name(self) -> str:
        """Return what messages call it: the path, or the document of the state."""
        return self._document.name if self._document is not None else ""

    @property
    def source(self) -> bytes:
        """Return the text."""
        return self._document.content if self._document is not None else b""

    def spot(self, *at: Key) -> Spot:
        """Return where something stands."""
        assert self._document is not None
        return self._document.spot(at)

    def line(self, rule: int) -> int:
        """Return the line of the rule with that number, counted from 0."""
        return self._document.spot(("authorization", "rules", rule)).line if self._document else 0
