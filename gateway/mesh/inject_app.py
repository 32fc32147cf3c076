"""What a pod says of its app: ports, users, probes; and what that makes of the options.

Strategy: nothing is guessed that could leave a way around the sidecar. What cannot be known from the manifest has to be said in an annotation, and
the message says in which.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ruamel.yaml.comments import CommentedMap

from gateway.mesh.inject_pod import INTERCEPT, SIDECAR, Options

if TYPE_CHECKING:
    from gateway.mesh.inject import Injection

PREFIX = "crossway.dev/"
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
LABEL = re.compile(r"[A-Za-z0-9._/-]{1,63}=[A-Za-z0-9._-]{0,63}")
KNOWN = (
    "inject", "injected", "service", "mode", "app-port", "app-protocol", "app-uid", "sidecar-uid", "control", "image", "audience", "root",
    "exclude-ports", "exclude-networks", "local", "labels", "zone", "inbound-port", "outbound-port", "admin-port", "probes-port", "cpu-request",
    "memory-request", "memory-limit", "drain-delay", "drain-deadline", "log-level",
)  # fmt: skip
PROTOCOLS = ("http1", "http2", "grpc")
LEVELS = ("debug", "info", "warning", "error")
PROBES = {"startupProbe": "start", "livenessProbe": "live", "readinessProbe": "ready"}


@dataclass(frozen=True)
class Place:
    """A line, a column, and the field there as kubectl would write it."""

    line: int
    column: int
    field: str
    offset: int = 0  # lines before the document

    def of(self, data: Any, key: Any) -> Place:
        """Return the place of a key or an item; that of its holder when the document has no such thing."""
        name = f"{self.field}[{key}]" if isinstance(key, int) else f"{self.field}.{key}".lstrip(".")
        try:
            line, column = data.lc.item(key) if isinstance(key, int) else data.lc.key(key)
        except (AttributeError, KeyError, TypeError, IndexError):
            return Place(self.line, self.column, name, self.offset)
        return Place(line + 1 + self.offset, column + 1, name, self.offset)


class _Reader:
    """The options of one pod, from its annotations and the command line; what is wrong is reported where it stands."""

    def __init__(self, injection: Injection, annotations: Mapping[str, Any], at: Place) -> None:
        self.injection, self.annotations, self.at = injection, annotations, at
        for name in annotations:
            if str(name).startswith(PREFIX) and str(name).removeprefix(PREFIX) not in KNOWN:
                injection.report(at.of(annotations, name), "this annotation is not known", f"there are: {', '.join(KNOWN)}")

    def place(self, name: str) -> Place:
        return self.at.of(self.annotations, PREFIX + name) if PREFIX + name in self.annotations else Place(0, 0, f"--{name}")

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.annotations.get(PREFIX + name, self.injection.given.get(name))
        if value is None:
            return default
        if not isinstance(value, str):
            self.injection.report(self.place(name), "the value of an annotation is text", f'write it in quotes: "{value}"')
        return str(value).strip()

    def words(self, name: str) -> tuple[str, ...]:
        return tuple(each.strip() for each in (self.text(name) or "").split(",") if each.strip())

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        text = self.text(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdecimal() or not low <= int(text) <= high:
            self.injection.report(self.place(name), f"{text!r} is not a number from {low} to {high}")
            return default
        return int(text)

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?", text) or float(text) > 3600:
            self.injection.report(self.place(name), f"{text!r} is not a number of seconds up to 3600")
            return default
        return float(text)

    def choice(self, name: str, among: tuple[str, ...], default: str) -> str:
        text = self.text(name) or default
        if text not in among:
            self.injection.report(self.place(name), f"{text!r} is none of {', '.join(among)}")
            return default
        return text

    def matching(self, name: str, pattern: str, what: str, default: str) -> str:
        text = self.text(name) or default
        if not re.fullmatch(pattern, text):
            self.injection.report(self.place(name), f"{text!r} is not {what}")
        return text


def found_in(injection: Injection, workload: Any, template: Any, place: Place, spec: Any) -> Options | None:
    """Return the options of a pod; None when something essential is missing, which is reported."""
    annotations = ((template.get("metadata") or {}).get("annotations")) or {}
    read = _Reader(injection, annotations, place.of(template, "metadata").of(template.get("metadata"), "annotations"))
    at = place.of(template, "spec")
    if spec.get("hostNetwork"):
        injection.report(at.of(spec, "hostNetwork"), "a pod in the host's network cannot have a sidecar: it would redirect the host's connections", "remove it, or set crossway.dev/inject: disabled")
    name = read.text("service") or _named(workload, template)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        injection.report(read.place("service") if PREFIX + "service" in annotations else place.of(template, "metadata"), f"{name!r} is not the name of a service", 'set crossway.dev/service: "..."')
        return None
    ports = tuple(
        read.number(f"{each}-port", 1024, 65535, default) or default
        for each, default in (("inbound", 9101), ("outbound", 9102), ("admin", 9103), ("probes", 9104))
    )
    app_port, protocol = _app_port(injection, read, spec, at)
    uid = read.number("sidecar-uid", 1, 2**31 - 1, 65101) or 65101
    explicit = read.choice("mode", ("intercept", "explicit"), "intercept") == "explicit"
    app_uid = _app_uid(injection, read, spec, at, uid, explicit)
    control = read.text("control")
    if not control or not re.fullmatch(r"https://[A-Za-z0-9.\[\]:-]+", control):
        injection.report(read.place("control"), "the control plane's address is missing or none", "https://host:port")
        return None
    _collisions(injection, spec, at, ports)
    return Options(
        service=name, control=control, image=read.matching("image", r"[A-Za-z0-9][\w./:@-]*", "an image", "crossway:0.1.0"), app_port=app_port,
        app_protocol=read.choice("app-protocol", PROTOCOLS, protocol), app_uid=None if explicit else app_uid, sidecar_uid=uid,
        ports=(ports[0], ports[1], ports[2], ports[3]), audience=read.matching("audience", r"[\x21-\x7e]{1,253}", "an audience", "crossway"),
        root=read.matching("root", r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "the name of a ConfigMap", "crossway-root"),
        exclude_ports=_ports(injection, read), exclude=_networks(injection, read), local=_local(injection, read), labels=_labels(injection, read, template),
        zone=read.text("zone"), requests=(_quantity(read, "cpu-request", "50m"), _quantity(read, "memory-request", "64Mi")),
        memory=_quantity(read, "memory-limit", "256Mi"), drain_delay=read.seconds("drain-delay", 2.0),
        drain_deadline=read.seconds("drain-deadline", 30.0), log_level=read.choice("log-level", LEVELS, "info"),
    )  # fmt: skip


def _named(workload: Any, template: Any) -> Any:
    """The name of a workload that says no service: its app label, else its own."""
    labels = ((template.get("metadata") or {}).get("labels")) or {}
    return labels.get("app.kubernetes.io/name") or labels.get("app") or (workload.get("metadata") or {}).get("name")


def _apps(spec: Any) -> list[tuple[int, Any]]:
    return [(number, each) for number, each in enumerate(spec["containers"]) if isinstance(each, dict) and each.get("name") not in (SIDECAR, INTERCEPT)]


def _app_port(injection: Injection, read: _Reader, spec: Any, at: Place) -> tuple[int | None, str]:
    """The port that the mesh leads to, and what the port's name says it speaks."""
    declared = [
        (each.get("containerPort"), str(each.get("name") or ""), at.of(spec, "containers").of(spec["containers"], number))
        for number, container in _apps(spec)
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
    return port, "grpc" if name.startswith("grpc") else "http2" if name.startswith(("http2", "h2c")) else "http1"


def _app_uid(injection: Injection, read: _Reader, spec: Any, at: Place, sidecar_uid: int, explicit: bool) -> int | None:
    """The user that every container of the app runs as; interception goes by it."""
    said = read.number("app-uid", 0, 2**31 - 1)
    pod = spec.get("securityContext") or {}
    found: dict[int, str] = {}
    for number, container in _apps(spec):
        where = at.of(spec, "containers").of(spec["containers"], number)
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


def _collisions(injection: Injection, spec: Any, at: Place, ours: tuple[int, ...]) -> None:
    if len(set(ours)) != len(ours):
        injection.report(at, f"the sidecar's ports are not different: {', '.join(map(str, ours))}")
    for number, container in _apps(spec):
        for each in container.get("ports") or ():
            if isinstance(each, dict) and each.get("containerPort") in ours:
                injection.report(at.of(spec, "containers").of(spec["containers"], number), f"port {each['containerPort']} is the sidecar's", "set crossway.dev/inbound-port, outbound-port, admin-port or probes-port to another")


def _ports(injection: Injection, read: _Reader) -> tuple[int, ...]:
    found = read.words("exclude-ports")
    for each in found:
        if not each.isascii() or not each.isdecimal() or not 1 <= int(each) <= 65535:
            injection.report(read.place("exclude-ports"), f"{each!r} is not a port")
            return ()
    return tuple(sorted({int(each) for each in found}))


def _networks(injection: Injection, read: _Reader) -> tuple[str, ...]:
    found = []
    for each in read.words("exclude-networks"):
        try:
            found.append(str(ipaddress.ip_network(each)))
        except ValueError:
            injection.report(read.place("exclude-networks"), f"{each!r} is not a network such as 10.0.0.0/8")
    return tuple(found)


def _local(injection: Injection, read: _Reader) -> tuple[tuple[str, int], ...]:
    found = []
    for each in read.words("local"):
        name, _, port = each.partition("=")
        if not NAME.fullmatch(name) or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
            injection.report(read.place("local"), f"{each!r} is not SERVICE=PORT")
            continue
        found.append((name, int(port)))
    return tuple(found)


def _labels(injection: Injection, read: _Reader, template: Any) -> tuple[tuple[str, str], ...]:
    """For splits and canaries: what the annotation says, else the pod's version."""
    found = read.words("labels")
    for each in found:
        if not LABEL.fullmatch(each):
            injection.report(read.place("labels"), f"{each!r} is not KEY=VALUE")
            return ()
    if not found:
        labels = ((template.get("metadata") or {}).get("labels")) or {}
        version = labels.get("app.kubernetes.io/version") or labels.get("version")
        found = (f"version={version}",) if version and LABEL.fullmatch(f"version={version}") else ()
    return tuple((each.partition("=")[0], each.partition("=")[2]) for each in found)


def _quantity(read: _Reader, name: str, default: str) -> str:
    return read.matching(name, r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi)?", "a quantity such as 64Mi or 50m", default)


def probes_moved(injection: Injection, spec: Any, options: Options, at: Place) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str], ...]]:
    """Have the kubelet's probes of the app's port asked by the sidecar: the port itself takes members only. Returns what to ask."""
    asked: list[tuple[str, str]] = []
    headers: list[tuple[str, str, str]] = []
    for number, container in _apps(spec):
        where = at.of(spec, "containers").of(spec["containers"], number)
        named = {each.get("name"): each.get("containerPort") for each in container.get("ports") or () if isinstance(each, dict)}
        for hook, does in (container.get("lifecycle") or {}).items():
            if isinstance(does, dict) and _leads(does, named) == options.app_port:
                injection.report(where.of(container, "lifecycle").of(container["lifecycle"], hook), "the kubelet cannot call the app's port, which takes members only", "use exec")
        for key, short in PROBES.items():
            probe = container.get(key)
            if not isinstance(probe, CommentedMap) or _leads(probe, named) != options.app_port:
                continue
            place, name = where.of(container, key), f"{container.get('name')}-{short}"
            http = probe.get("httpGet")
            if "grpc" in probe:
                injection.report(place, "the kubelet cannot call the app's port, which takes members only", "use exec, httpGet or tcpSocket")
                continue
            if http is not None and str(http.get("scheme", "HTTP")).upper() != "HTTP":
                injection.report(place.of(probe, "httpGet"), "the app has to speak clear text to its sidecar: an HTTPS probe cannot be asked")
                continue
            if http is not None:
                asked.append((name, f"http:{options.app_port}{http.get('path') or '/'}"))
                headers += [(name, str(each.get("name")), str(each.get("value"))) for each in http.get("httpHeaders") or ()]
            else:
                asked.append((name, f"tcp:{options.app_port}"))
            position = list(probe).index("httpGet" if http is not None else "tcpSocket")
            del probe["httpGet" if http is not None else "tcpSocket"]
            probe.insert(position, "httpGet", {"path": f"/app/{name}", "port": options.ports[3]})
    return tuple(asked), tuple(headers)


def _leads(probe: Any, named: Mapping[Any, Any]) -> Any:
    """The port that a probe or a hook goes to, of the pod itself."""
    for key in ("httpGet", "tcpSocket", "grpc"):
        what = probe.get(key)
        if isinstance(what, dict):
            if what.get("host"):
                return None
            port = what.get("port")
            return named.get(port, port)
    return None
