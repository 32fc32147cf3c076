"""An assignment made into the snapshot that a sidecar's engine runs: who may come in, and where the app's calls go.

Strategy: the same native objects that an edge's configuration compiles to, built from the assignment directly: a sidecar keeps neither
the schema nor the YAML reader in memory. Inbound: mutual TLS, authorization, then the app. Outbound: the Host names the service, or the
listener does; then mutual TLS to one of the service's endpoints. Whatever cannot be built raises, and the old snapshot goes on.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from gateway._speedups.exchange import Edits, ListenerEntry, RouteEntry, Shape, Snapshot, Step, Tunnels
from gateway._speedups.http2_settings import Http2
from gateway._speedups.journal import Journal
from gateway._speedups.pool import SHARED_WINDOW, Endpoint, Upstream
from gateway._speedups.route_trie import RouteTrie
from gateway._speedups.shaping import Chooser, Conditions, Shaper
from gateway._speedups.tcp_listener import TcpListener
from gateway._speedups.tls import TlsListener, TlsUpstream
from gateway._speedups.token_cache import Principal, TokenCache
from gateway._speedups.user_context import TellUserStep, UserStep
from gateway.mesh.assignment import Assignment, canonical
from gateway.mesh.authorization import Denials, make_step
from gateway.mesh.egress import EXTERNAL, Destination, Leaving, Way, ways
from gateway.mesh.egress import PROTOCOLS as EXTERNAL_PROTOCOLS
from gateway.mesh.identity import Svid
from gateway.mesh.networks import server_name
from gateway.mesh.raw import places, way_in, way_out
from gateway.mesh.spiffe import control_id
from gateway.mesh.traffic import Dealer, Traffic, read
from gateway.mesh.tunnels import SPOKEN, WEBSOCKET, tunnels_of, unspoken, untold
from gateway.mesh.units import seconds, share, size
from gateway.workload.admission import Admit, Revoked, admission
from gateway.workload.user import HEADER, PROOF, Author, Reader

Made = TypeVar("Made")

log = logging.getLogger("crossway.mesh")

INBOUND, OUTBOUND = "inbound", "outbound"
CALLER = b"x-crossway-caller"  # tells the app who called; nobody else can
EVERYBODY = ("0.0.0.0/0", "::/0")  # inbound the handshake has proved a member, outbound it is our own app
BODY = 1 << 30  # bytes; bodies stream, and the app has the say
PROTOCOLS = {"http": "http1", "http1": "http1", "http2": "http2", "grpc": "grpc"}  # of a service, and as the engine calls it
TCP = "tcp"
HERE = "here"  # the zone of a member that says none, when others are behind gateways: its own network goes first
USER_AUTHORS = ("edge",)  # services that may say who the user is, unless the assignment names others
CONTEXTS = 1 << 20  # bytes of user contexts that are remembered, for each direction
EJECT: dict[str, Any] = {"failures": 7, "ratio": 0, "minimum": 5, "base": 1, "maximum": 60}  # as `upstreams` has it by default
CALLERS = 200  # whose requests are counted apart
APP_TIMES: dict[str, Any] = {"connect": 2.0, "head": 60.0, "idle": 60.0, "total": 300.0}  # seconds; the caller's own are shorter


class Spec(NamedTuple):
    """Which requests a route takes, in the trie's form."""

    hosts: tuple[str, ...] = ()
    path: str | None = None
    prefix: str | None = "/"
    methods: tuple[str, ...] = ()
    headers: tuple[Any, ...] = ()
    query: tuple[Any, ...] = ()


@dataclass
class Surroundings:
    """What a sidecar's snapshots have in common."""

    app: str  # host:port, numeric
    ports: Mapping[str, str]  # service -> name of its own outbound listener
    memory: Any  # SharedState
    intercepts: bool = False  # the outbound listener gets what the kernel redirects
    zone: str | None = None
    app_protocol: str = "http1"  # or tcp: connections are passed on, not requests
    denials: Denials = field(default_factory=Denials)
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    versions: int = 0
    callers: set[str] = field(default_factory=set)
    split: Dealer = field(default_factory=Dealer)
    external_certs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # external host -> files of our certificate towards it and its key
    journal: Journal | None = None  # of calls to external hosts
    outside: list[Destination] = field(default_factory=list)  # external hosts of the last snapshot
    kept: dict[Any, Any] = field(default_factory=dict)  # parts of the last snapshot, by all that they were made of

    @property
    def raw(self) -> bool:
        """Whether connections are passed on to the app, not requests."""
        return self.app_protocol == TCP

    @property
    def port(self) -> int:
        """The app's."""
        return int(self.app.rpartition(":")[2])

    def named(self, identity: str, domain: str) -> str:
        """The name under which what a caller sends is counted; callers beyond the first CALLERS share one, and "" is nobody known."""
        caller = identity.removeprefix(f"spiffe://{domain}/service/") or "unknown"
        if identity and caller not in self.callers:
            if len(self.callers) >= CALLERS:
                caller = "others"
            self.callers.add(caller)
        return f"{INBOUND}>{caller}"


class Parts:
    """Parts of a snapshot: what would be made of the same as in the one before is taken over, with its pools and its caches.

    An endpoint that comes or goes is a new assignment; it must not cost a TLS context for each service, nor what is known of users.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._fresh: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Made]) -> Made:
        """Return the part of this key, `make` it if the last snapshot had none."""
        made: Made = self._around.kept[key] if key in self._around.kept else make()
        self._fresh[key] = made
        return made

    def commit(self) -> None:
        """The snapshot was built: the next one goes by its parts."""
        self._around.kept = self._fresh


def build(assignment: Assignment, svid: Svid, around: Surroundings) -> Snapshot:
    """Return the snapshot of an assignment. Raises ValueError, KeyError, TypeError or TlsError for what cannot be made."""
    around.versions += 1
    parts = Parts(around)
    body = assignment.body
    revoked = Revoked(body.get("revoked") or {})
    authors = body.get("user_authors", USER_AUTHORS)
    if isinstance(authors, str) or not all(isinstance(name, str) for name in authors):
        raise ValueError("user_authors is no list of services")
    firsts = frozenset(f"spiffe://{svid.domain}/service/{name}" for name in authors)
    rests = repr((sorted(revoked.serials), sorted(revoked.identities), sorted(firsts))).encode()
    digest = hashlib.sha256(b"".join(each.der for each in (svid.leaf, *svid.roots)) + rests).digest()
    admit = admission(svid.domain, revoked)
    own = body.get("own") or {}
    app = parts.get(("app", places(own) if around.raw else None), lambda: Upstream(
        "app", [Endpoint(around.app)], **APP_TIMES, host="preserve", table=around.memory.upstreams, attempts=1,
        retry_on=("connect-failure",), **({"requests": places(own)} if around.raw else {"protocol": around.app_protocol}),
    ))  # fmt: skip
    upstreams, routes = {"app": app}, []
    reader = Reader(svid.identity, svid.roots, firsts, admit, around.seed)
    user = parts.get(("user", digest), lambda: UserStep("user", reader.check, TokenCache(CONTEXTS), from_caller=True))
    heard = parts.get(
        ("heard", digest), lambda: UserStep("user", partial(reader.check, keep=True), TokenCache(CONTEXTS), from_caller=False)
    )
    rules = ("rules", digest, canonical(body["authorization"]), canonical(own) if around.raw or own.get(WEBSOCKET) is not None else None)
    inbound: RouteEntry | TcpListener
    if around.raw:
        inbound = parts.get(rules, lambda: way_in(
            body["authorization"], svid.domain, around.denials, own, app, around.memory.names.add,
            lambda identity: around.named(identity, svid.domain), around.port,
        ))  # fmt: skip
    else:
        inbound = parts.get(rules, lambda: _inbound(body["authorization"], svid, app, around, user, own))
    services = {name: settings for name, settings in body["services"].items() if spoken(name, settings)}
    dealt: dict[str, Traffic | None] = {}
    carried: dict[str, Tunnels | None] = {}
    for name, settings in services.items():
        try:
            alpn = () if settings.get("protocol") == TCP else ("http/1.1",) if _protocol(settings) == "http1" else ("h2",)
            tls = parts.get(("tls", name, digest, alpn), partial(_tls, name, svid, digest, admit, alpn))
            dealt[name] = traffic = read(settings)
            carried[name] = tunnels_of(settings, partial(around.memory.names.add, f"{OUTBOUND}>{name}"))
            for label, some in around.split.of(name, settings, traffic):
                made = ("service", name, label, digest, canonical(some))
                upstreams[upstream_name(name, label)] = parts.get(made, partial(upstream_of, name, some, tls, around, label))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"service {name}: {error}") from None
    for name, settings in services.items():
        if settings.get("protocol") == TCP:
            continue
        told = parts.get(("tell", name, digest), partial(_teller, svid, name))
        routes.append(_outbound(name, upstreams, dealt[name], around, (heard, told), carried[name]))
    out = _ways_out(body, svid, around, parts, heard)
    listeners = _listeners(
        inbound, routes, services, upstreams, out, svid.domain, around,
        parts.get(("inbound", digest), lambda: TlsListener(
            INBOUND, [(svid.chain, svid.key, None)], digest=digest, authorities=svid.roots, client_auth="required", tickets=False,
            admit=admission(svid.domain, revoked, control_id(svid.domain)), alpn=() if around.raw else ("h2", "http/1.1"),
        )),
    )  # fmt: skip
    parts.commit()
    upstreams |= {way.destination.upstream.name: way.destination.upstream for way in out}
    around.outside = [way.destination for way in out]
    ins = [inbound] if isinstance(inbound, RouteEntry) else []
    snapshot = Snapshot(around.versions, f"{assignment.version}", listeners, upstreams, [*ins, *routes, *(way.route for way in out)])
    snapshot.identity_names = (CALLER, HEADER)
    return snapshot


def _ways_out(body: Mapping[str, Any], svid: Svid, around: Surroundings, parts: Parts, heard: Step) -> list[Way]:
    """The external hosts that this service may call. An upstream is taken over with its pools while nothing about it changes."""

    def upstream(name: str, said: Mapping[str, Any], tls: TlsUpstream, host: str) -> Upstream:
        key = (EXTERNAL, name, host, canonical({key: each for key, each in said.items() if key != "rules"}), tls.digest)
        return parts.get(key, lambda: Upstream(
            f"{EXTERNAL}:{name}/{host}", [], host=host, table=around.memory.upstreams, tls=tls, foreign=True,
            protocol=EXTERNAL_PROTOCOLS[said.get("protocol", "http")][0], eject={**EJECT, "share": 0.5}, keep_connections=64,
            **_retries(said.get("retries")), **_balance(said.get("balance")), **_total(said.get("timeout")),
        ))  # fmt: skip

    said, version = body.get("external") or {}, int(body["authorization"]["version"])
    audits: tuple[Step, ...] = ()
    if around.journal is not None:
        from gateway._speedups.steps import AuditStep  # loaded for those who audit: a quarter MiB of policies' steps

        audits = (AuditStep("egress-audit", around.journal),)
    return ways(Leaving(said, version, svid.identity, around.external_certs), around.denials, (heard,), audits, parts.get, upstream, around.memory.names.add)


def _total(timeout: Any) -> dict[str, Any]:
    return {} if timeout is None else dict.fromkeys(("total", "head", "idle"), seconds(timeout))


def _protocol(settings: Mapping[str, Any]) -> str:
    protocol = settings.get("protocol", "http")
    return "http1" if protocol == TCP else PROTOCOLS[protocol]  # the engine asks for one, and bytes that pass have none


def _tls(name: str, svid: Svid, digest: bytes, admit: Admit, alpn: tuple[str, ...]) -> TlsUpstream:
    return TlsUpstream(
        digest=hashlib.sha256(digest + f"{name} {' '.join(alpn)}".encode()).digest(), authorities=svid.roots, chain=svid.chain,
        key=svid.key, server_name=server_name(name, svid.domain), sans=[f"spiffe://{svid.domain}/service/{name}"], admit=admit, alpn=alpn,
    )  # fmt: skip


def _teller(svid: Svid, name: str) -> TellUserStep:
    return TellUserStep("tell-user", partial(_tell, Author(svid.chain, svid.key), f"spiffe://{svid.domain}/service/{name}"))


def _tell(author: Author, audience: str, user: Principal) -> tuple[bytes, int]:
    """Tell the next service of the user, with what was told to us as the proof."""
    return author.sign(user, (audience,), user.claims[PROOF])


def _inbound(said: Mapping[str, Any], svid: Svid, app: Upstream, around: Surroundings, user: Step, own: Mapping[str, Any]) -> RouteEntry:
    """The way in: authorization, then the app. Each caller's requests are counted as its own; tunnels share the places of the app."""
    tunnels = tunnels_of(own, partial(around.memory.names.add, INBOUND))
    unswitched = untold(svid.service)
    if tunnels is not None and around.app_protocol not in SPOKEN:
        tunnels, unswitched = None, unspoken(svid.service, around.app_protocol)
    ways: dict[str, Any] = {"tunnels": tunnels, "unswitched": unswitched}

    def entry(identity: str, step: Step) -> RouteEntry | None:
        name = around.named(identity, svid.domain)
        told = Edits((CALLER,), CALLER + b": " + identity.encode("ascii") + b"\r\n")
        return RouteEntry(name, 0, upstream=app, metric=around.memory.names.add(name), steps=(user, step), request_edits=told, **ways)

    step = make_step(said, svid.domain, around.denials, entry, around.port)
    return RouteEntry(
        INBOUND, 0, upstream=app, metric=around.memory.names.add(around.named("", svid.domain)), steps=(user, step),
        request_edits=Edits((CALLER,)), **ways,
    )  # fmt: skip


def _outbound(
    name: str, upstreams: Mapping[str, Upstream], traffic: Traffic | None, around: Surroundings, steps: tuple[Step, ...], tunnels: Tunnels | None
) -> RouteEntry:
    """The way to a service; with splits or canaries one for each part, which the same native choice leads to as in a route."""

    def entry(label: str, version: str, shape: Shape | None = None) -> RouteEntry:
        metric = around.memory.names.add(f"{OUTBOUND}>{name}" + (f">{version}" if version else ""))
        return RouteEntry(
            f"{OUTBOUND}>{name}", 1, upstream=upstreams[upstream_name(name, label)], metric=metric, steps=steps, shape=shape, tunnels=tunnels,
            unswitched=untold(name),
        )  # fmt: skip

    if traffic is None:
        return entry("", "")
    chooser = Chooser(
        [Conditions(part.headers, part.cookies) for part in traffic.canaries], [(part.name, part.weight) for part in traffic.splits], traffic.sticky
    )
    shape = Shaper(chooser, tuple(entry(part.name, part.version) for part in traffic.parts), spare=True)
    return entry(traffic.splits[0].name, "", shape)


def upstream_name(service: str, part: str) -> str:
    return f"service:{service}/{part}" if part else f"service:{service}"


def _listeners(
    inbound: RouteEntry | TcpListener, routes: list[RouteEntry], services: Mapping[str, Any], upstreams: Mapping[str, Upstream],
    out: list[Way], domain: str, around: Surroundings, tls: TlsListener,
) -> dict[str, ListenerEntry]:  # fmt: skip
    """Every service has an outbound listener of its own as well: for its own port, and for connections redirected on their way to it."""

    def listener(name: str, trie: RouteTrie, **more: Any) -> ListenerEntry:
        return ListenerEntry(name, trie, body_limit=BODY, trusted=EVERYBODY, requests=1_000_000, **more)

    spoken_to = [name for name, settings in services.items() if settings.get("protocol") != TCP]
    by_host = [(route, Spec(hosts=(name, f"{name}.{domain}"))) for route, name in zip(routes, spoken_to, strict=True)]
    by_host += [(way.route, Spec(hosts=(way.destination.host,))) for way in out]
    originals = destinations(services) if around.intercepts else None
    found = {
        INBOUND: listener(INBOUND, RouteTrie([]), tls=tls, tcp=inbound) if isinstance(inbound, TcpListener)
        else listener(INBOUND, RouteTrie([(inbound, Spec())]), tls=tls, http2=Http2(connection_window=SHARED_WINDOW)),
        OUTBOUND: listener(OUTBOUND, RouteTrie(by_host), originals=originals, http2=Http2(clear=True)),
    }
    for route, name in zip(routes, spoken_to, strict=True):
        own = RouteTrie([(route, Spec(hosts=("*",)))])
        found[f"{OUTBOUND}:{name}"] = listener(f"{OUTBOUND}:{name}", own, http2=Http2(clear=True))
    for name in set(services) - set(spoken_to):
        tcp = way_out(name, services[name], upstreams[f"service:{name}"], around.memory.names.add)
        found[f"{OUTBOUND}:{name}"] = listener(f"{OUTBOUND}:{name}", RouteTrie([]), tcp=tcp)
    for name in around.ports.values():
        if name not in found:  # its service is not in the assignment now: nothing is there
            found[name] = listener(name, RouteTrie([]))
    return found


def spoken(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether the engine speaks a service's protocol; one that it does not is left out, since guessing would pass by the policy."""
    protocol = settings.get("protocol", "http")
    if protocol in PROTOCOLS or protocol == TCP:
        return True
    log.warning("a service is left out: its protocol is not in this version", extra={"service": name, "protocol": protocol})
    return False


def destinations(services: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Where an app's own connections go, by the address it dials: a service's app ports, and its sidecars' own addresses.

    Instances say themselves where they are. What those of two services say leads to neither, or one service could draw the calls of another.
    """
    found: dict[tuple[str, int], str] = {}
    contested: dict[tuple[str, int], set[str]] = {}
    for name, settings in services.items():
        for each in settings.get("endpoints", ()):
            if each.get("network"):
                continue  # a gateway's address is that of many services
            host, _, port = each["address"].rpartition(":")
            app = str((each.get("labels") or {}).get("app-port", ""))
            for at in ((host.strip("[]"), int(number)) for number in (port, app) if number.isdecimal()):
                if found.setdefault(at, f"{OUTBOUND}:{name}") != f"{OUTBOUND}:{name}":
                    contested.setdefault(at, {found[at].partition(":")[2]}).add(name)
    for at, names in contested.items():
        log.error("two services say that they are at one address; nothing leads there", extra={"address": f"{at[0]} port {at[1]}", "services": sorted(names)})
        del found[at]
    return found


def upstream_of(name: str, said: Mapping[str, Any], tls: TlsUpstream, around: Surroundings, part: str = "") -> Upstream:
    """Return the upstream of a service, or of a part of it. Raises ValueError or TypeError for settings that are not understood.

    All of a part may be ejected, since the other parts take its share; with all parts out, they are used as if none were.
    """
    unknown = set(said) - {"protocol", "timeout", "retries", "balance", "endpoints", "labels", "zone", "http2", "idle", "connections", WEBSOCKET}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is not known to this version")
    options: dict[str, Any] = {**_retries(said.get("retries")), **_balance(said.get("balance")), **_total(said.get("timeout"))}
    if said.get("protocol") == TCP:
        options["requests"] = places(said)
    endpoints, far = said.get("endpoints", ()), any(each.get("network") for each in said.get("endpoints", ()))
    return Upstream(
        upstream_name(name, part), endpoints_of(name, endpoints, around.zone), host="preserve", table=around.memory.upstreams,
        tls=tls, protocol=_protocol(said), zone=HERE if far and around.zone is None else around.zone,
        eject={**EJECT, "share": 1.0 if part else 0.5}, panic=bool(part),
        keep_connections=1024, **options,
    )  # fmt: skip


def endpoints_of(name: str, said: Iterable[Mapping[str, Any]], zone: str | None = None) -> list[Endpoint]:
    """Return the endpoints that can be used; one whose address is no number is left out, and told.

    zone: the member's own. Without one its network is its zone, and gateways of others are elsewhere.
    """
    found: dict[str, Endpoint] = {}
    for each in said:
        at = f"{each['network']}.network" if each.get("network") else each.get("zone") if zone is not None else None
        try:
            found.setdefault(each["address"], Endpoint(each["address"], int(each.get("weight") or 1), zone=at))
        except ValueError as error:
            log.error("an endpoint is left out", extra={"service": name, "error": str(error)})
    return list(found.values())


def _retries(said: Any) -> dict[str, Any]:
    """As `upstreams.retries` of a gateway's file: a number, or settings."""
    if said is None:
        return {}
    if isinstance(said, int):
        return {"attempts": said}
    read: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "attempts": ("attempts", int), "on": ("retry_on", lambda on: tuple(map(str, [on] if isinstance(on, (str, int)) else on))),
        "per_try": ("per_try", seconds), "budget": ("budget", share), "reserve": ("reserve", int), "body": ("replay", size),
        "idempotency_key": ("honours_key", bool),
    }  # fmt: skip
    options: dict[str, Any] = {}
    for key, value in said.items():
        if key == "backoff":
            options |= {"backoff": seconds(value.get("base", 0.025)), "backoff_max": seconds(value.get("max", 0.25))}
        elif key not in read:
            raise ValueError(f"retries.{key} is not known to this version")
        elif value is not None:
            option, parse = read[key]
            options[option] = parse(value)
    return options


def _balance(said: Any) -> dict[str, Any]:
    """As `upstreams.balance` of a gateway's file: an algorithm, or maglev with its key."""
    if said is None:
        return {}
    if isinstance(said, str):
        return {"balance": said}
    maglev = said.get("maglev")
    if maglev:
        load = maglev.get("load")  # a percentage above 100, as text or as its number
        percent = {} if load is None else {"load": load if isinstance(load, int) else round(share(load) * 100)}
        return {"balance": "maglev", "key": maglev["key"], **percent}
    return {"balance": said["algorithm"]}
