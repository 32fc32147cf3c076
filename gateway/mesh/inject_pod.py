"""What is put into a pod: the sidecar, the container that redirects, two volumes, and the app's probes asked by another way.

Strategy: plain data, made from the options alone, so that the same options give the same pod. The sidecar is a native one (an init container that
is restarted): it has started before the app's own init containers, and ends after the app. Each container has what it needs and no more.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SIDECAR, INTERCEPT = "crossway-sidecar", "crossway-intercept"
STATE, JOIN = "crossway-state", "crossway-join"  # volumes
STATE_AT, JOIN_AT = "/var/run/crossway", "/var/run/secrets/crossway"
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
    exclude_ports: tuple[int, ...] = ()
    exclude: tuple[str, ...] = ()
    local: tuple[tuple[str, int], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    zone: str | None = None
    requests: tuple[str, str] = ("50m", "64Mi")  # cpu, memory
    memory: str = "256Mi"  # limit
    drain_delay: float = 2.0
    drain_deadline: float = 30.0
    log_level: str = "info"
    app_probes: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # found in the pod, so no option
    app_headers: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)

    def said(self) -> dict[str, Any]:
        """Return the options as they are kept in the pod's annotation."""
        kept = asdict(self)
        for name in ("app_probes", "app_headers"):
            del kept[name]
        return kept


def _confined(user: int, *capabilities: str) -> dict[str, Any]:
    """Return a container's securityContext; a new one each time, since one that is written twice becomes an alias in YAML."""
    return {
        "runAsNonRoot": user != 0, "runAsUser": user, "runAsGroup": user, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"}, "capabilities": {"drop": ["ALL"], **({"add": list(capabilities)} if capabilities else {})},
    }  # fmt: skip


def sidecar(options: Options) -> dict[str, Any]:
    """Return the sidecar's container."""
    inbound, outbound, admin, probes = options.ports
    words = ["mesh", "sidecar", "--service", options.service, "--app", "none" if options.app_port is None else f"127.0.0.1:{options.app_port}"]
    # In brackets, which are right for addresses of both families.
    words += ["--inbound", f"[$(POD_IP)]:{inbound}", "--outbound", f"127.0.0.1:{outbound}", "--admin", f"127.0.0.1:{admin}"]
    words += ["--probes", f"[$(POD_IP)]:{probes}", "--control", options.control, "--state", f"{STATE_AT}/member"]
    words += ["--join-kubernetes", f"{JOIN_AT}/token", "--control-ca", f"{JOIN_AT}/root.crt"]
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
    for name, what in options.app_probes:
        words += ["--app-probe", f"{name}={what}"]
    for name, header, value in options.app_headers:
        words += ["--app-probe-header", f"{name}={header}:{value}"]
    return {
        "name": SIDECAR,
        "image": options.image,
        "restartPolicy": "Always",
        "args": words,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [{"name": "crossway-in", "containerPort": inbound, "protocol": "TCP"}, {"name": "crossway-probes", "containerPort": probes, "protocol": "TCP"}],
        "startupProbe": {"httpGet": {"path": "/startz", "port": probes}, "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 120},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": probes}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": probes}, "periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 2},
        "lifecycle": {"preStop": {"exec": {"command": ["crossway", "mesh", "leave", "--state", f"{STATE_AT}/member"]}}},
        "resources": {"requests": {"cpu": options.requests[0], "memory": options.requests[1]}, "limits": {"memory": options.memory}},
        "securityContext": _confined(options.sidecar_uid),
        "volumeMounts": [{"name": STATE, "mountPath": STATE_AT}, {"name": JOIN, "mountPath": JOIN_AT, "readOnly": True}],
    }  # fmt: skip


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
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
        # Capabilities of a user that is not root are not effective; nothing but nft's one is left of root's.
        "securityContext": _confined(0, "NET_ADMIN"),
    }  # fmt: skip


def volumes(options: Options) -> list[dict[str, Any]]:
    """Return the pod's volumes: a state that lives as long as the pod and never touches a disk, and what it joins with."""
    sources = [
        {"serviceAccountToken": {"path": "token", "audience": options.audience, "expirationSeconds": TOKEN_LIFE}},
        {"configMap": {"name": options.root, "items": [{"key": "root.crt", "path": "root.crt"}]}},
    ]
    return [{"name": STATE, "emptyDir": {"medium": "Memory", "sizeLimit": "32Mi"}}, {"name": JOIN, "projected": {"sources": sources}}]


def pause(options: Options) -> dict[str, Any]:
    """Return the app's preStop: it goes on while its callers learn that it leaves."""
    return {"sleep": {"seconds": math.ceil(options.drain_delay) + 1}}
