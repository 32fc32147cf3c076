"""What each service's members are told, made from the mesh's file, the registry and the deny list; and the difference to what they know.

Strategy: an assignment depends on the service and its network alone, not on the instance, so it is made, signed and written as text once for all
of its members there, and a delta once for all that have the same version. It holds what the service may call and the rules about being called, nothing else.
Pure: whoever calls brings the world and the version.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.config.mesh_external import External
from gateway.config.mesh_file import EVERYBODY, MeshFile, Rule, Service
from gateway.config.mesh_traffic import traffic_said
from gateway.mesh.networks import (
    DEFAULT,
    all_gateways,
    is_gateway,
    let_through,
    network_of,
    place,
    scoped,
    seen_from,
    ways,
)
from gateway.mesh.revocation import DenyList

APART = {"split", "canary", "sticky", "hosts", "port", "tls", "addresses", "resolver"}  # settings that are said in another form
REMEMBERED = 8  # versions of a service that deltas can be based on
# What members of every version take as a delta; a change of anything else is sent as the whole.
DELTA_MEMBERS = frozenset({"services", "authorization", "revoked", "bundle", "version", "issued", "fresh"})
DELTA_SHARE = 0.8  # of the whole: a delta that is not smaller than that is sent as the whole


@dataclass(frozen=True)
class World:
    """Everything that assignments are made from."""

    mesh: MeshFile
    policy: int  # version of the authorization
    bundle: str
    endpoints: dict[str, list[dict[str, Any]]]
    deny: DenyList
    known: dict[str, frozenset[str]] = field(default_factory=dict)  # the networks in which each service has instances, up or not


def callers_of(rule: Rule, mesh: MeshFile) -> list[str]:
    return list(mesh.services) if EVERYBODY in rule.callers else list(dict.fromkeys(rule.callers))


def reaches(rule: Rule, service: str) -> bool:
    return EVERYBODY in rule.to or service in rule.to


def callable_by(service: str, mesh: MeshFile) -> list[str]:
    """Return the services that a service may call at all; in audit mode all, since calls that no rule allows pass."""
    others = [name for name in mesh.services if name != service and name not in all_gateways(mesh)]
    if mesh.authorization.default == "audit":
        return others
    rules = [rule for rule in mesh.authorization.rules if service in callers_of(rule, mesh)]
    return [name for name in others if any(reaches(rule, name) for rule in rules)]


def settings_of(service: Service | External) -> dict[str, Any]:
    """Return a service's settings as JSON, without what is not said: times in seconds, sizes in bytes, shares as fractions."""
    said: dict[str, Any] = json.loads(json.dumps(_plain(service.model_dump(exclude_unset=True, exclude=APART))))
    said |= traffic_said(service) if isinstance(service, Service) else {}
    said.setdefault("protocol", service.protocol)
    if service.timeout is not None:
        said["timeout"] = f"{service.timeout * 1000:.0f}ms"
    return said


def leaves(rule: Rule, name: str) -> bool:
    """Whether a rule lets somebody out to an external host: only by its name, never by a star."""
    return name in rule.to


def external_of(service: str, mesh: MeshFile) -> dict[str, Any]:
    """Return the external hosts that a rule lets a service call, each with the rules of this caller."""
    found = {}
    for name, each in mesh.external.items():
        rules = [rule for rule in mesh.authorization.rules if leaves(rule, name) and service in callers_of(rule, mesh)]
        if rules:
            found[name] = {
                **settings_of(each), "hosts": list(each.hosts), "port": each.port, "ca": each.authorities, "resolver": each.resolver,
                "addresses": None if each.addresses is None else [str(network) for network in each.addresses],
                "rules": [{**rule_said(rule, mesh), "from": [service]} for rule in rules],
            }  # fmt: skip
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def rule_said(rule: Rule, mesh: MeshFile) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    for name, match in rule.headers.items():
        _, kind, value = match.triple(name)
        headers[name] = {"present": kind == "present"} if kind in ("present", "absent") else {"prefix": value} if kind == "prefix" else value
    said = {
        "name": rule.name, "from": callers_of(rule, mesh), "methods": list(rule.methods) if rule.methods is not None else None,
        "prefix": rule.prefix, "headers": headers, "claims": {name: list(values) for name, values in rule.claims.items()},
    }  # fmt: skip
    # What is not said is left out: a member of an earlier version refuses a key that it does not know.
    return said | ({} if rule.path is None else {"path": rule.path}) | ({} if rule.ports is None else {"ports": list(rule.ports)})


def own(service: Service) -> dict[str, Any]:
    """Return what a service's own sidecars need to know of it."""
    said = settings_of(service)
    return {key: said[key] for key in ("protocol", "idle", "connections", "websocket") if key in said}


def endpoints_for(service: str, network: str, world: World) -> list[dict[str, Any]]:
    """Return where members of a network find a service. Without networks in the file everybody reaches everybody."""
    found = world.endpoints.get(service, [])
    return seen_from(network, found, ways(world.mesh, world.endpoints)) if world.mesh.networks else found


def passed_on(network: str, world: World) -> dict[str, Any]:
    """Return what a network's gateways lead to: the services that somebody elsewhere may call, and their instances here."""
    mesh = world.mesh
    names = let_through(network, mesh, world.known, {caller: callable_by(caller, mesh) for caller in mesh.services})
    # Instances say themselves where they are; one that names a gateway would have it call itself, and again, for each connection.
    gateways = {place(address) for found in ways(mesh, world.endpoints).values() for address in found}

    def here(each: dict[str, Any]) -> bool:
        return network_of(each["labels"]) == network and place(each["address"]) not in gateways

    return {name: {**own(mesh.services[name]), "endpoints": [each for each in world.endpoints.get(name, []) if here(each)]} for name in names}


def content_of(service: str, world: World, network: str = DEFAULT) -> dict[str, Any]:
    """Return an assignment for members of a service in a network, without its version and time."""
    mesh = world.mesh
    said_of_itself = own(mesh.services[service])
    if is_gateway(service, network, mesh):
        services, said_of_itself = passed_on(network, world), {**said_of_itself, "gateway": network}
    else:
        services = {name: {**settings_of(mesh.services[name]), "endpoints": endpoints_for(name, network, world)} for name in callable_by(service, mesh)}
    rules = [rule_said(rule, mesh) for rule in mesh.authorization.rules if reaches(rule, service)]
    return {
        "trust_domain": mesh.trust_domain, "service": service, "own": said_of_itself, "fresh": mesh.control.fresh, "bundle": world.bundle, "revoked": world.deny.said(),
        "external": external_of(service, mesh), "user_authors": list(mesh.authorization.user_authors),
        "services": services, "authorization": {"default": mesh.authorization.default, "version": world.policy, "rules": rules},
    }  # fmt: skip


@dataclass
class Prepared:
    """One version of a service's assignment, ready to be sent."""

    version: int
    content: dict[str, Any]
    body: dict[str, Any]
    signature: str
    whole: str  # the message
    seal: int  # by which of the keys it is signed
    deltas: dict[int, str] = field(default_factory=dict)  # by base
    frames: dict[int, bytes] = field(default_factory=dict)  # the same as WebSocket frames; 0: the whole


class Assignments:
    """The present assignment of each service (in each network: of each scope), and some before it."""

    def __init__(self, sign: Callable[[dict[str, Any]], str]) -> None:
        self.sign = sign
        self._kept: dict[str, OrderedDict[int, Prepared]] = {}
        self._seal = 0

    def sign_anew(self) -> None:
        """The key is another: what was made counts as changed, and goes out again as a small delta."""
        self._seal += 1

    def current(self, service: str) -> Prepared | None:
        kept = self._kept.get(service)
        return next(reversed(kept.values())) if kept else None

    def changed(self, service: str, content: dict[str, Any]) -> bool:
        now = self.current(service)
        return now is None or now.seal != self._seal or now.content != content

    def put(self, service: str, content: dict[str, Any], version: int) -> Prepared:
        """Make a version the present one."""
        body = {**content, "version": version, "issued": int(time.time())}
        signature = self.sign(body)
        message = {"type": "assignment", "version": version, "assignment": body, "signature": signature}
        prepared = Prepared(version, content, body, signature, _text(message), self._seal)
        kept = self._kept.setdefault(service, OrderedDict())
        kept[version] = prepared
        while len(kept) > REMEMBERED:
            kept.popitem(last=False)
        return prepared

    def message(self, service: str, base: int) -> str:
        """Return the present assignment as a delta on `base` when that is known and worth it, else whole."""
        now = self.current(service)
        assert now is not None
        before = self._kept[service].get(base)
        if before is None or before is now:
            return now.whole
        if base not in now.deltas:
            changed = changes(before.body, now.body)
            text = _text({"type": "delta", "version": now.version, "base": base, "changes": changed, "signature": now.signature})
            good = len(text) < DELTA_SHARE * len(now.whole) and DELTA_MEMBERS >= set(changed)
            now.deltas[base] = text if good else now.whole
        return now.deltas[base]

    def frame(self, service: str, base: int) -> bytes:
        """Return message() as the WebSocket frame that all who have `base` are sent."""
        now = self.current(service)
        assert now is not None
        if base not in now.frames:
            text = self.message(service, base)
            whole = text is now.whole  # members come with any base; they share one copy
            now.frames[base] = now.frames[0] if whole and 0 in now.frames else text_frame(text)
            if whole:
                now.frames[0] = now.frames[base]
        return now.frames[base]

    def forget(self, services: set[str], networks: set[str], used: set[str]) -> None:
        """Let go of services that are no more, and of networks that only members speak of, who are in another one by now."""
        for name in set(self._kept) - used:
            service, network = scoped(name)
            if service not in services or network not in networks:
                del self._kept[name]


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what turns one body into another: of `services` those that changed (None: gone), of the rest whole members."""
    found = {key: value for key, value in after.items() if key != "services" and before.get(key) != value}
    old, new = before["services"], after["services"]
    services = {name: new.get(name) for name in {**old, **new} if old.get(name) != new.get(name)}
    if services:
        found["services"] = services
    return found


def text_frame(text: str) -> bytes:
    """Return an unmasked text frame that is a message of its own (RFC 6455 5.2)."""
    data = text.encode()
    size = len(data)
    if size < 126:
        head = bytes((0x81, size))
    elif size < 1 << 16:
        head = b"\x81\x7e" + size.to_bytes(2, "big")
    else:
        head = b"\x81\x7f" + size.to_bytes(8, "big")
    return head + data


def _text(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False)
