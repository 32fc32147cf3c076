"""What a pod says of its app: ports, users, probes; and what that makes of the options.

Strategy: nothing is guessed that could leave a way around the sidecar. What cannot be known from the manifest has to be said in an annotation, and
the message says in which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ruamel.yaml.comments import CommentedMap

from gateway.mesh.asked import PATH, SERVICE, good_header
from gateway.mesh.inject_pod import INTERCEPT, SIDECAR, Options
from gateway.mesh.inject_read import LEVELS, NAME, OBJECT, PREFIX, PROTOCOLS, QUANTITY, UNPRIVILEGED, Place, Reader

if TYPE_CHECKING:
    from gateway.mesh.inject import Injection

PROBES = {"startupProbe": "start", "livenessProbe": "live", "readinessProbe": "ready"}
CALLS = ("httpGet", "tcpSocket", "grpc")
SPOKEN = (("grpc", "grpc"), ("http2", "http2"), ("h2c", "http2"), ("tcp", "tcp"))  # by how a port's name begins


def found_in(injection: Injection, workload: Any, template: Any, place: Place, spec: Any) -> Options | None:
    """Return the options of a pod; None when something essential is missing, which is reported."""
    annotations = ((template.get("metadata") or {}).get("annotations")) or {}
    read = Reader(injection, annotations, place.of(template, "metadata").of(template.get("metadata"), "annotations"))
    at = place.of(template, "spec")
    _possible(injection, spec, at)
    name = read.text("service") or _named(workload, template)
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        injection.report(read.place("service") if PREFIX + "service" in annotations else place.of(template, "metadata"), f"{name!r} is not the name of a service", 'set crossway.dev/service: "..."')
        return None
    ports = (_port(read, "inbound", 9101), _port(read, "outbound", 9102), _port(read, "admin", 9103), _port(read, "probes", 9104))
    app_port, protocol = _app_port(injection, read, spec, at)
    uid = read.number("sidecar-uid", 1, 2**31 - 1, 65101) or 65101
    explicit = read.choice("mode", ("intercept", "explicit"), "intercept") == "explicit"
    app_uid = _app_uid(injection, read, spec, at, uid, explicit)
    control = read.text("control")
    if not control or not re.fullmatch(r"https://[A-Za-z0-9.\[\]:-]+", control):
        injection.report(read.place("control"), "the control plane's address is missing or none", "https://host:port")
        return None
    taken = _taken(injection, spec, at, ports, app_port)
    join_cert, spire = read.joining()
    return Options(
        service=name, control=control, image=read.matching("image", r"[A-Za-z0-9][\w./:@-]*", "an image", "crossway:0.1.0"), app_port=app_port,
        app_protocol=read.choice("app-protocol", PROTOCOLS, protocol), app_uid=None if explicit else app_uid, sidecar_uid=uid, ports=ports,
        audience=read.matching("audience", r"[\x21-\x7e]{1,253}", "an audience", "crossway"), root=read.matching("root", OBJECT, "the name of a ConfigMap", "crossway-root"),
        join_cert=join_cert, spire=spire, exclude_ports=read.ports("exclude-ports"), exclude=read.networks("exclude-networks"), local=read.local(taken),
        labels=read.labels(template), zone=read.optional("zone", NAME, "the name of a zone"), network=read.optional("network", NAME, "the name of a network"),
        advertise=read.advertise(), external_certs=tuple(read.pairs("external-certs", OBJECT, "HOST=SECRET, with the name that the mesh's file has for the host")),
        authorities=read.optional("authorities", rf"{OBJECT}(/[A-Za-z0-9._-]+)?", "CONFIGMAP or CONFIGMAP/KEY"), egress_audit=read.audit(spec),
        requests=(_quantity(read, "cpu-request", "50m"), _quantity(read, "memory-request", "64Mi")), memory=_quantity(read, "memory-limit", "256Mi"),
        cpu_limit=read.optional("cpu-limit", QUANTITY, "a quantity such as 500m"), drain_delay=read.seconds("drain-delay", 2.0),
        drain_deadline=read.seconds("drain-deadline", 30.0), log_level=read.choice("log-level", LEVELS, "info"),
    )  # fmt: skip


def _possible(injection: Injection, spec: Any, at: Place) -> None:
    """Whether such a pod can have a sidecar at all."""
    if spec.get("hostNetwork"):
        injection.report(at.of(spec, "hostNetwork"), "a pod in the host's network cannot have a sidecar: it would redirect the host's connections", "remove it, or set crossway.dev/inject: disabled")
    if ((spec.get("os") or {}).get("name")) == "windows":
        injection.report(at.of(spec, "os"), "there is no sidecar for Windows", "set crossway.dev/inject: disabled")


def _port(read: Reader, which: str, default: int) -> int:
    return read.number(f"{which}-port", UNPRIVILEGED, 65535, default) or default


def _quantity(read: Reader, name: str, default: str) -> str:
    return read.matching(name, QUANTITY, "a quantity such as 64Mi or 50m", default)


def _named(workload: Any, template: Any) -> Any:
    """The name of a workload that says no service: its app label, else its own."""
    labels = ((template.get("metadata") or {}).get("labels")) or {}
    return labels.get("app.kubernetes.io/name") or labels.get("app") or (workload.get("metadata") or {}).get("name")


def _apps(spec: Any, at: Place) -> Iterator[tuple[Place, Any]]:
    """The containers that run as long as the app does: its own, and its native sidecars."""
    for key in ("containers", "initContainers"):
        for number, each in enumerate(spec.get(key) or ()):
            ours = isinstance(each, dict) and each.get("name") in (SIDECAR, INTERCEPT)
            if isinstance(each, dict) and not ours and (key == "containers" or each.get("restartPolicy") == "Always"):
                yield at.of(spec, key).of(spec[key], number), each


def _app_port(injection: Injection, read: Reader, spec: Any, at: Place) -> tuple[int | None, str]:
    """The port that the mesh leads to, and what the port's name says it speaks."""
    declared = [
        (each.get("containerPort"), str(each.get("name") or ""), where)
        for where, container in _apps(spec, at)
        for each in container.get("ports") or ()
        if isinstance(each, dict) and each.get("protocol", "TCP") == "TCP"
    ]
    if read.text("app-port") == "none":
        return None, "http1"
    port = read.number("app-port", 1, 65535)
    if port is None and read.text("app-port") is None:
        if len({number for number, _, _ in declared}) != 1:
            what = "no container has a TCP port" if not declared else f"there are several ports: {', '.join(str(number) for number, _, _ in declared)}"
            injection.report(at.of(spec, "containers"), what, 'set crossway.dev/app-port: "8080", or "none" for an app that only calls others')
            return None, "http1"
        port = declared[0][0]
    if not isinstance(port, int) or isinstance(port, bool):
        injection.report(at.of(spec, "containers"), f"containerPort {port!r} is no number")
        return None, "http1"
    name = next((name for number, name, _ in declared if number == port), "")
    for number, _, where in declared:
        if number != port:
            injection.report(where, f"port {number} stays reachable from outside the mesh", "a NetworkPolicy can close it", warning=True)
    return port, next((protocol for start, protocol in SPOKEN if name.startswith(start)), "http1")


def _app_uid(injection: Injection, read: Reader, spec: Any, at: Place, sidecar_uid: int, explicit: bool) -> int | None:
    """The user that every container of the app runs as; interception goes by it."""
    said = read.number("app-uid", 0, 2**31 - 1)
    pod = spec.get("securityContext") or {}
    found: dict[int, str] = {}
    for where, container in _apps(spec, at):
        own = (container.get("securityContext") or {}).get("runAsUser", pod.get("runAsUser"))
        uid = said if own is None else own
        if own is not None and said is not None and own != said:
            injection.report(where, f"it runs as user {own}, and crossway.dev/app-uid says {said}", "remove one of them")
        if uid == sidecar_uid:
            injection.report(where, f"it runs as user {uid}, as the sidecar does", 'set crossway.dev/sidecar-uid: "..." to another')
        elif uid is None and not explicit:
            injection.report(where, "which user it runs as is not known", 'set securityContext.runAsUser, or crossway.dev/app-uid: "..." if the image has a numeric USER')
        elif isinstance(uid, int) and not explicit:
            found.setdefault(uid, str(container.get("name")))
            if uid == 0:
                injection.report(where, "it runs as root, which can become any user and pass by the sidecar", "run it as another user", warning=True)
    if len(found) > 1:
        who = ", ".join(f"{name} as {uid}" for uid, name in found.items())
        injection.report(at.of(spec, "containers"), f"the containers run as several users ({who}): one of them would pass by the sidecar", "set the same runAsUser, or crossway.dev/mode: explicit")
    return next(iter(found), None)


def _taken(injection: Injection, spec: Any, at: Place, ours: tuple[int, ...], app_port: int | None) -> dict[int, str]:
    """Return whose each port of the pod is; what two would have is reported."""
    if len(set(ours)) != len(ours):
        injection.report(at, f"the sidecar's ports are not different: {', '.join(map(str, ours))}")
    taken = {port: f"the sidecar ({name}-port)" for port, name in zip(ours, ("inbound", "outbound", "admin", "probes"), strict=True)}
    for where, container in _apps(spec, at):
        for each in container.get("ports") or ():
            port = each.get("containerPort") if isinstance(each, dict) else None
            if port in ours:
                injection.report(where, f"port {port} is the sidecar's", "set crossway.dev/inbound-port, outbound-port, admin-port or probes-port to another")
            elif isinstance(port, int):
                taken[port] = f"container {container.get('name')}"
    if app_port is not None and app_port not in taken:
        taken[app_port] = "the app"
    return taken


def probes_moved(injection: Injection, spec: Any, options: Options, at: Place) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str], ...]]:
    """Have the kubelet's probes of the app's port asked by the sidecar: the port itself takes members only. Returns what to ask."""
    asked: list[tuple[str, str]] = []
    headers: list[tuple[str, str, str]] = []
    for where, container in _apps(spec, at):
        named = {each.get("name"): each.get("containerPort") for each in container.get("ports") or () if isinstance(each, dict)}
        for hook, does in (container.get("lifecycle") or {}).items():
            if isinstance(does, dict) and _leads(does, named) == options.app_port:
                injection.report(where.of(container, "lifecycle").of(container["lifecycle"], hook), "the kubelet cannot call the app's port, which takes members only", "use exec")
        for key, short in PROBES.items():
            probe = container.get(key)
            if not isinstance(probe, CommentedMap) or _leads(probe, named) != options.app_port:
                continue
            place, name = where.of(container, key), f"{container.get('name')}-{short}"
            kind = next(each for each in CALLS if each in probe)
            what = _asked(injection, probe[kind], kind, place.of(probe, kind), options.app_port)
            if what is None:
                continue
            asked.append((name, what))
            headers += _headers(injection, name, probe[kind], place.of(probe, kind))
            position = list(probe).index(kind)
            del probe[kind]
            probe.insert(position, "httpGet", {"path": f"/app/{name}", "port": options.ports[3]})
    return tuple(asked), tuple(headers)


def _asked(injection: Injection, call: Any, kind: str, at: Place, port: Any) -> str | None:
    """Return what the sidecar has to ask; None for what it cannot, which is reported."""
    if kind == "tcpSocket":
        return f"tcp:{port}"
    if kind == "grpc":
        service = str(call.get("service") or "")
        if not SERVICE.fullmatch(service):
            injection.report(at.of(call, "service"), f"{service!r} cannot be asked")
        return f"grpc:{port}{'/' if service else ''}{service}"
    if str(call.get("scheme", "HTTP")).upper() != "HTTP":
        injection.report(at, "the app has to speak clear text to its sidecar: an HTTPS probe cannot be asked")
        return None
    path = f"/{str(call.get('path') or '').removeprefix('/')}"
    if not PATH.fullmatch(path):
        injection.report(at.of(call, "path"), f"{path!r} cannot be asked", "write it percent-encoded")
    return f"http:{port}{path}"


def _headers(injection: Injection, name: str, http: Any, at: Place) -> Iterator[tuple[str, str, str]]:
    """Yield the headers of a probe."""
    for number, each in enumerate(http.get("httpHeaders") or ()):
        header, value = str(each.get("name") or ""), str(each.get("value") or "").strip()
        if not good_header(header, value):
            injection.report(at.of(http, "httpHeaders").of(http["httpHeaders"], number), f"a probe cannot have this header: {header}", "remove it")
        yield name, header, value


def _leads(probe: Any, named: Mapping[Any, Any]) -> Any:
    """The port that a probe or a hook goes to, of the pod itself."""
    for key in CALLS:
        what = probe.get(key)
        if isinstance(what, dict):
            if what.get("host"):
                return None
            port = what.get("port")
            return named.get(port, port)
    return None
