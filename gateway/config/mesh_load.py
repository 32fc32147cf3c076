"""Read a mesh's file and return it, or every problem that it has, with places.

Strategy: as `load` does it, with the same translation of pydantic's errors. Names that rules use are looked up on the raw data, so that
they are reported together with mistakes of the schema.
"""

from __future__ import annotations

import ssl
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway._speedups.certificates import TlsError, parse_certificates
from gateway.config.kinds import kind_of, refuse_other
from gateway.config.load import _sorted, _translate
from gateway.config.mesh_file import EVERYBODY, KubernetesJoin, MeshFile, Pkcs11
from gateway.config.mesh_traffic import warn_traffic
from gateway.config.methods import warn_methods
from gateway.config.source import Document, Path_
from gateway.config.unusable import unfit, unreadable
from gateway.errors import ConfigError, Problem

TCP_RULE = "who connects to a tcp service is decided by `from` and `ports`, before the first byte passes"
LAYER7 = ("methods", "path", "prefix", "headers", "claims")  # what a rule may say of requests


def is_mesh(path: str | Path) -> bool:
    """Tell whether a file is a mesh's rather than a gateway's."""
    document = Document(path)
    document.read()
    return kind_of(document.data) == "mesh"


def load_mesh(path: str | Path, content: bytes | None = None, name: str = "") -> MeshFile:
    """Return the mesh in the file at `path`, or in `content` as if it stood there. Raises ConfigError with every problem, sorted by place."""
    document = Document(path, content, name)
    document.read()
    if document.data is None:
        raise ConfigError(document.problems or [Problem(document.name, 1, 1, "empty: there is no mesh in it")])
    refuse_other(document, "mesh")
    context: dict[str, Any] = {"base": document.base, "models": {}, "documents": []}
    mesh: MeshFile | None = None
    try:
        mesh = MeshFile.model_validate(document.data, context=context)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            _translate(document, details, context["models"])
    _check_names(document)
    if mesh is not None:
        _check_layers(document, mesh)
    if mesh is not None and mesh.control.join is not None:
        if mesh.control.join.ca is not None:
            _check_roots(document, ("control", "join", "ca"), mesh.control.join.ca)
        for number, cluster in enumerate(mesh.control.join.kubernetes):
            _check_cluster(document, number, cluster)
    if mesh is not None:
        _check_external(document, mesh)
    if mesh is not None and mesh.control.keys is not None:
        _check_token(document, mesh.control.keys.pkcs11)
    if mesh is None or any(problem.severity == "error" for problem in document.problems):
        raise ConfigError(_sorted(document.problems))
    mesh._document = document
    mesh._digest = document.digest()
    return mesh


def mesh_findings(mesh: MeshFile) -> list[Problem]:
    """Return what is legal and yet hardly meant."""
    document = mesh._document
    assert document is not None
    kept, document.problems = document.problems, []
    for name, service in mesh.services.items():
        warn_traffic(document, name, service)
        if service.websocket is not None:
            _warn_websocket(document, mesh, name)
    for number, rule in enumerate(mesh.authorization.rules):
        at = ("authorization", "rules", number)
        warn_methods(document, (*at, "methods"), rule.methods)
        tcp = [name for name, service in mesh.services.items() if service.protocol == "tcp"]
        if tcp and rule.layer7 and EVERYBODY in rule.to:
            document.warn(at, f"rule {rule.name} looks into requests, and {tcp[0]} speaks tcp: it allows nothing there", TCP_RULE)
        for other in mesh.authorization.rules[:number]:
            ports = other.ports is None or (rule.ports is not None and set(rule.ports) <= set(other.ports))
            if not other.layer7 and ports and set(rule.callers) <= set(other.callers) and set(rule.to) <= set(other.to):
                document.warn(at, f"rule {rule.name} allows nothing that {other.name} does not allow", "remove one of them")
                break
    for name in mesh.external:
        if not any(name in rule.to for rule in mesh.authorization.rules):
            document.warn(("external", name), f"nobody may call {name}: no rule names it in `to`", "add a rule, or remove it", key=True)
    admin = mesh.control.admin
    if mesh.control.source == "state" and (admin is None or not admin.unix):
        document.warn(("control", "source"), "state: nobody can apply a document to this control plane", "add `admin: unix:PATH` under control")
    gateways = {network.gateway for network in mesh.networks.values()}
    for number, rule in enumerate(mesh.authorization.rules):
        if called := sorted(gateways.intersection(rule.to)):
            document.warn(("authorization", "rules", number, "to"), f"{called[0]} is a mesh gateway: nobody calls it", "name the services behind it")
    if mesh.authorization.default == "audit":
        document.warn(("authorization", "default"), "audit: what no rule allows passes", "write deny when the record shows nothing more")
    found, document.problems = document.problems, kept
    return _sorted(found)


def _warn_websocket(document: Document, mesh: MeshFile, name: str) -> None:
    """Note that nobody can open what a service offers: a handshake is a GET."""
    rules = [rule for rule in mesh.authorization.rules if name in rule.to or EVERYBODY in rule.to]
    if mesh.authorization.default == "deny" and rules and not any(rule.methods is None or "GET" in rule.methods for rule in rules):
        at = ("services", name, "websocket")
        document.warn(at, f"WebSockets, but a handshake is a GET, which no rule allows at {name}", "add GET to the `methods` of a rule, or remove it")


def mesh_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a mesh's file."""
    schema = MeshFile.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _check_layers(document: Document, mesh: MeshFile) -> None:
    """Report rules that look into requests of services that have none."""
    for number, rule in enumerate(mesh.authorization.rules):
        tcp = [name for name in rule.to if name in mesh.services and mesh.services[name].protocol == "tcp"]
        if tcp and rule.layer7:
            said = [key for key in LAYER7 if getattr(rule, key) not in (None, {})]
            document.report(
                ("authorization", "rules", number, said[0]),
                f"rule {rule.name}: `{said[0]}` looks into requests, and {tcp[0]} speaks tcp, in which there are none", TCP_RULE,
            )  # fmt: skip


def _check_cluster(document: Document, number: int, cluster: KubernetesJoin) -> None:
    """Its files are there; whether the keys can serve is seen, and told, where tokens are verified."""
    at = ("control", "join", "kubernetes", number)
    if cluster.keys_ca is not None:
        _check_roots(document, (*at, "keys_ca"), cluster.keys_ca)
    if "://" in cluster.keys:
        return
    path = document.base / cluster.keys
    try:
        document.files[f"file:{path}"] = path.read_bytes()
    except OSError as error:
        document.report(
            (*at, "keys"), f"cannot read the keys: {error.strerror}", f"kubectl get --raw /openid/v1/jwks > {path}"
        )


def _check_roots(document: Document, at: Path_, path: Path) -> str | None:
    """Return the certificates in a file of them, as text without what stands around; None when it is reported."""
    try:
        content = path.read_bytes()
        document.files[f"file:{path}"] = content
        return "".join(ssl.DER_cert_to_PEM_cert(each.der) for each in parse_certificates(content))
    except OSError as error:
        document.report(at, f"cannot read the certificates of authorities: {error.strerror}", unreadable(error, path))
    except TlsError as error:
        document.report(at, f"the certificates of authorities cannot be used: {error}", unfit("certificates of authorities", content, path))
    return None


def _check_external(document: Document, mesh: MeshFile) -> None:
    """Report names and hosts that mean two things, and read the authorities of external hosts."""
    taken = {each: f"the service {name}" for name in mesh.services for each in (name, f"{name}.{mesh.trust_domain}")}
    for name, external in mesh.external.items():
        if name in mesh.services:
            document.report(("external", name), f"{name} is a service already", "rules would mean both: give it another name", key=True)
        for number, host in enumerate(external.hosts):
            if host in taken:
                document.report(("external", name, "hosts", number), f"the host {host} is {taken[host]} already", "a Host leads to one place")
            taken.setdefault(host, f"of external {name}")
        if external.tls.ca is not None:
            external._authorities = _check_roots(document, ("external", name, "tls", "ca"), external.tls.ca)


def _check_token(document: Document, settings: Pkcs11) -> None:
    """Report files that are not there or that others may read; nobody logs in for a check."""
    at = ("control", "keys", "pkcs11")
    for key, path in (("module", settings.module), ("pin_file", settings.pin_file)):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            document.report((*at, key), f"cannot be read: {error.strerror}", "the vendor's library" if key == "module" else "a file that holds the PIN, 0600")
            continue
        if key == "pin_file" and mode & 0o077:
            document.report((*at, key), "others may read it, and it holds a PIN", f"chmod 0600 {path}")


def _check_names(document: Document) -> None:
    """Report services that rules, `revoked` and `join` name and that are not there, and rule names that are used twice."""
    data = document.data if isinstance(document.data, dict) else {}
    services = data.get("services")
    if not isinstance(services, dict):
        return  # which is told, and then every name would be unknown
    known = [str(name) for name in services]
    outside = data.get("external")
    called = [*known, *(str(name) for name in outside)] if isinstance(outside, dict) else known
    section = data.get("authorization")
    rules = section.get("rules") if isinstance(section, dict) else None
    seen: dict[str, int] = {}
    for number, rule in enumerate(rules if isinstance(rules, list) else []):
        if not isinstance(rule, dict):
            continue
        at = ("authorization", "rules", number)
        name = rule.get("name")
        if isinstance(name, str) and name in seen:
            line = document.spot(("authorization", "rules", seen[name], "name")).line
            document.report((*at, "name"), f"duplicate rule name {name!r}", f"it is already at line {line}")
        elif isinstance(name, str):
            seen[name] = number
        for key in ("from", "to"):
            _check_list(document, (*at, key), rule.get(key), [*(called if key == "to" else known), EVERYBODY])
    if isinstance(section, dict):
        _check_list(document, ("authorization", "user_authors"), section.get("user_authors"), known)
    revoked = data.get("revoked")
    if isinstance(revoked, dict):
        _check_list(document, ("revoked", "services"), revoked.get("services"), known)
    networks = data.get("networks")
    for name, network in networks.items() if isinstance(networks, dict) else ():
        gateway = network.get("gateway") if isinstance(network, dict) else None
        if isinstance(gateway, str):
            _known(document, ("networks", name, "gateway"), gateway, known)
    control = data.get("control")
    join = control.get("join") if isinstance(control, dict) else None
    if not isinstance(join, dict):
        return
    clusters = join.get("kubernetes")
    places: list[tuple[Path_, Any]] = [(("control", "join"), join), (("control", "join", "kubernetes"), clusters)]
    places += [(("control", "join", "kubernetes", at), each) for at, each in enumerate(clusters if isinstance(clusters, list) else [])]
    for place, holder in places:
        named = holder.get("services") if isinstance(holder, dict) else None
        for name in named if isinstance(named, dict) else []:
            _known(document, (*place, "services", name), name, known)


def _check_list(document: Document, at: Path_, value: Any, known: list[str]) -> None:
    for index, name in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(name, str):
            _known(document, (*at, index) if isinstance(value, list) else at, name, known)


def _known(document: Document, at: Path_, name: str, known: list[str]) -> None:
    if name not in known:
        close = get_close_matches(name, known, 1, 0.6)
        names = [each for each in known if each != EVERYBODY]
        hint = f"did you mean '{close[0]}'?" if close else f"defined under `services`: {', '.join(names[:20]) or 'none'}"
        document.report(at, f"unknown service {document.show(at, name)}", hint)
