"""What is put into a pod: the sidecar, the container that redirects, two volumes, and the app's probes asked by another way.

Strategy: plain data, made from the options alone, so that the same options give the same pod. The sidecar is a native one (an init container that
is restarted): it has started before the app's own init containers, and ends after the app. Each container has what it needs and no more.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SIDECAR, INTERCEPT = "crossway-sidecar", "crossway-intercept"
STATE, JOIN, AGENT = "crossway-state", "crossway-join", "crossway-agent"  # volumes
EXTERNAL, AUTHORITIES = "crossway-external", "crossway-authorities"
STATE_AT, JOIN_AT, AGENT_AT = "/var/run/crossway", "/var/run/secrets/crossway", "/run/crossway-agent"
EXTERNAL_AT, AUTHORITIES_AT, AUDIT_AT = "/var/run/secrets/crossway-external", "/etc/crossway-authorities", "/var/log/crossway"
TOKEN_LIFE = 600  # seconds: the least that Kubernetes gives; the kubelet renews it in time
NAME_SERVICE = 53  # its port is never redirected


@dataclass(frozen=True)
class Options:
    """All that decides what a pod gets."""

    service: str
    control: str
    image: str
    app_port: int | None  # None: it only calls others
    app_protocol: str = "http1"
    app_uid: int | None = None  # None: explicit mode
    sidecar_uid: int = 65101
    ports: tuple[int, int, int, int] = (9101, 9102, 9103, 9104)  # inbound, outbound, admin, probes
    audience: str = "crossway"
    root: str = "crossway-root"  # ConfigMap whose root.crt is the mesh's root
    join_cert: str | None = None  # instead of the pod's token: a Secret with tls.crt and tls.key
    spire: str | None = None  # instead of both: the agent's socket, on the node or as csi/NAME
    exclude_ports: tuple[int, ...] = ()
    exclude: tuple[str, ...] = ()
    local: tuple[tuple[str, int], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    zone: str | None = None
    network: str | None = None
    advertise: str | None = None  # `node`, or host:port
    external_certs: tuple[tuple[str, str], ...] = ()  # external host -> a Secret with tls.crt and tls.key
    authorities: str | None = None  # ConfigMap, or ConfigMap/KEY
    egress_audit: str | None = None  # stdout, stderr or VOLUME/FILE
    requests: tuple[str, str] = ("50m", "64Mi")  # cpu, memory
    memory: str = "256Mi"  # limit
    cpu_limit: str | None = None
    drain_delay: float = 2.0
    drain_deadline: float = 30.0
    log_level: str = "info"
    app_probes: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # found in the pod, so no option
    app_headers: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)

    def said(self) -> dict[str, Any]:
        """Return the options as they are kept in the pod's annotation: those that say something."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ()) and name not in ("app_probes", "app_headers")}


def _confined(user: int, *capabilities: str) -> dict[str, Any]:
    """Return a container's securityContext; a new one each time, since one that is written twice becomes an alias in YAML."""
    return {
        "runAsNonRoot": user != 0, "runAsUser": user, "runAsGroup": user, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"}, "capabilities": {"drop": ["ALL"], **({"add": list(capabilities)} if capabilities else {})},
    }  # fmt: skip


def sidecar(options: Options) -> dict[str, Any]:
    """Return the sidecar's container."""
    inbound, _, _, probes = options.ports
    by_node = options.advertise == "node"
    fields = {"POD_IP": "status.podIP"} | ({"NODE_IP": "status.hostIP"} if by_node else {})
    env: list[dict[str, Any]] = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    if options.authorities is not None:
        env.append({"name": "SSL_CERT_FILE", "value": f"{AUTHORITIES_AT}/ca.crt"})
    return {
        "name": SIDECAR,
        "image": options.image,
        "restartPolicy": "Always",
        "args": _words(options),
        "env": env,
        "ports": [
            {"name": "crossway-in", "containerPort": inbound, **({"hostPort": inbound} if by_node else {}), "protocol": "TCP"},
            {"name": "crossway-probes", "containerPort": probes, "protocol": "TCP"},
        ],
        "startupProbe": {"httpGet": {"path": "/startz", "port": probes}, "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 120},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": probes}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": probes}, "periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 2},
        "lifecycle": {"preStop": {"exec": {"command": ["crossway", "mesh", "leave", "--state", f"{STATE_AT}/member"]}}},
        "resources": _resources(options, *options.requests, options.memory),
        "securityContext": _confined(options.sidecar_uid),
        "volumeMounts": _mounts(options),
    }  # fmt: skip


def _words(options: Options) -> list[str]:
    """The sidecar's command line."""
    inbound, outbound, admin, probes = options.ports
    words = ["mesh", "sidecar", "--service", options.service, "--app", "none" if options.app_port is None else f"127.0.0.1:{options.app_port}"]
    # In brackets, which are right for addresses of both families.
    words += ["--inbound", f"[$(POD_IP)]:{inbound}", "--outbound", f"127.0.0.1:{outbound}", "--admin", f"127.0.0.1:{admin}"]
    words += ["--probes", f"[$(POD_IP)]:{probes}", "--control", options.control, "--state", f"{STATE_AT}/member", *_joining(options)]
    words += ["--drain-delay", f"{options.drain_delay:g}", "--drain-deadline", f"{options.drain_deadline:g}", "--log-level", options.log_level]
    if options.app_protocol != "http1":
        words += ["--app-protocol", options.app_protocol]
    if options.app_uid is not None:
        words.append("--intercept")
    for name, port in options.local:
        words += ["--local", f"{name}=127.0.0.1:{port}"]
    for name, value in options.labels:
        words += ["--label", f"{name}={value}"]
    words += [] if options.zone is None else ["--zone", options.zone]
    words += [] if options.network is None else ["--network", options.network]
    if options.advertise is not None:
        words += ["--advertise", f"[$(NODE_IP)]:{inbound}" if options.advertise == "node" else options.advertise]
    for name, _ in options.external_certs:
        words += ["--external-cert", f"{name}={EXTERNAL_AT}/{name}.crt", "--external-key", f"{name}={EXTERNAL_AT}/{name}.key"]
    if options.egress_audit is not None:
        _, slash, file = options.egress_audit.partition("/")
        words += ["--egress-audit", f"{AUDIT_AT}/{file}" if slash else options.egress_audit]
    for name, what in options.app_probes:
        words += ["--app-probe", f"{name}={what}"]
    for name, header, value in options.app_headers:
        words += ["--app-probe-header", f"{name}={header}:{value}"]
    return words


def _joining(options: Options) -> list[str]:
    if options.spire is not None:
        return ["--spire", f"unix:{AGENT_AT}/{options.spire.rpartition('/')[2]}"]
    if options.join_cert is not None:
        return ["--join-cert", f"{JOIN_AT}/tls.crt", "--join-key", f"{JOIN_AT}/tls.key", "--control-ca", f"{JOIN_AT}/root.crt"]
    return ["--join-kubernetes", f"{JOIN_AT}/token", "--control-ca", f"{JOIN_AT}/root.crt"]


def _resources(options: Options, cpu: str, memory: str, most: str) -> dict[str, Any]:
    limits = {"memory": most} | ({} if options.cpu_limit is None else {"cpu": options.cpu_limit})
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": limits}


def _mounts(options: Options) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": STATE, "mountPath": STATE_AT}]
    found.append({"name": JOIN, "mountPath": JOIN_AT, "readOnly": True} if options.spire is None else {"name": AGENT, "mountPath": AGENT_AT, "readOnly": True})
    if options.external_certs:
        found.append({"name": EXTERNAL, "mountPath": EXTERNAL_AT, "readOnly": True})
    if options.authorities is not None:
        found.append({"name": AUTHORITIES, "mountPath": AUTHORITIES_AT, "readOnly": True})
    volume, slash, _ = (options.egress_audit or "").partition("/")
    return [*found, *([{"name": volume, "mountPath": AUDIT_AT}] if slash else [])]


def intercept(options: Options) -> dict[str, Any]:
    """Return the container that redirects the app's connections, once, before anything else of the pod runs."""
    inbound, outbound, _, _ = options.ports
    words = ["mesh", "intercept", "up", "--service", options.service, "--app-uid", str(options.app_uid), "--sidecar-uid", str(options.sidecar_uid)]
    words += ["--outbound-port", str(outbound)]
    if options.app_port is not None:
        words += ["--inbound-port", str(inbound), "--app-port", str(options.app_port)]
    for port in sorted({NAME_SERVICE, *options.exclude_ports}):
        words += ["--exclude-port", str(port)]
    for network in options.exclude:
        words += ["--exclude", network]
    return {
        "name": INTERCEPT,
        "image": options.image,
        "args": words,
        "resources": _resources(options, "10m", "32Mi", "128Mi"),
        # Capabilities of a user that is not root are not effective; nothing but nft's one is left of root's.
        "securityContext": _confined(0, "NET_ADMIN"),
    }  # fmt: skip


def volumes(options: Options) -> list[dict[str, Any]]:
    """Return the pod's volumes: a state that lives as long as the pod and never touches a disk, what it joins with, and what it shows outside."""
    found: list[dict[str, Any]] = [{"name": STATE, "emptyDir": {"medium": "Memory", "sizeLimit": "32Mi"}}]
    if options.spire is None:
        root = {"configMap": {"name": options.root, "items": [{"key": "root.crt", "path": "root.crt"}]}}
        token = {"serviceAccountToken": {"path": "token", "audience": options.audience, "expirationSeconds": TOKEN_LIFE}}
        found.append({"name": JOIN, "projected": {"sources": [token if options.join_cert is None else _pair(options.join_cert, "tls"), root]}})
    elif options.spire.startswith("csi/"):
        found.append({"name": AGENT, "csi": {"driver": "csi.spiffe.io", "readOnly": True}})
    else:
        found.append({"name": AGENT, "hostPath": {"path": options.spire.rpartition("/")[0], "type": "Directory"}})
    if options.external_certs:
        found.append({"name": EXTERNAL, "projected": {"sources": [_pair(secret, name) for name, secret in options.external_certs]}})
    if options.authorities is not None:
        name, _, key = options.authorities.partition("/")
        found.append({"name": AUTHORITIES, "configMap": {"name": name, "items": [{"key": key or "ca.crt", "path": "ca.crt"}]}})
    return found


def _pair(secret: str, name: str) -> dict[str, Any]:
    """A certificate and its key, of a Secret of the type kubernetes.io/tls."""
    return {"secret": {"name": secret, "items": [{"key": f"tls.{each}", "path": f"{name}.{each}"} for each in ("crt", "key")]}}


def pause(options: Options) -> dict[str, Any]:
    """Return the app's preStop: it goes on while its callers learn that it leaves."""
    return {"sleep": {"seconds": math.ceil(options.drain_delay) + 1}}
