"""The shape of what inject reads in a manifest: mappings, lists and plain values, judged before anything is made of them.

Strategy: a table of the fields that are read here and no others; Kubernetes judges the rest, by the schema of its own version. A field that is there and
empty counts as missing, as it does there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.mesh.inject_read import Place

ANY: Any = object()
_CALL = {"httpGet": {"path": str, "port": (int, str), "host": str, "scheme": str, "httpHeaders": [{"name": str, "value": ANY}]},
         "tcpSocket": {"port": (int, str), "host": str}, "grpc": {"port": int, "service": str}}  # fmt: skip
_CONTAINER = {
    "name": str, "restartPolicy": str, "securityContext": {"runAsUser": int}, "ports": [{"name": str, "containerPort": int, "protocol": str}],
    "lifecycle": {"preStop": _CALL, "postStart": _CALL}, "startupProbe": _CALL, "livenessProbe": _CALL, "readinessProbe": _CALL,
}  # fmt: skip
POD = {
    "metadata": {"labels": {}, "annotations": {}, "name": str},
    "spec": {
        "hostNetwork": bool, "os": {"name": str}, "securityContext": {"runAsUser": int}, "terminationGracePeriodSeconds": int, "volumes": [{"name": str}],
        "containers": [_CONTAINER], "initContainers": [_CONTAINER],
    },
}  # fmt: skip
NAMES = {int: "a number", str: "text", bool: "true or false", (int, str): "a number or a name"}


def misshapen(data: Any, shape: Any, at: Place) -> Iterator[tuple[Place, str]]:
    """Yield (place, what was expected there) for each value that is of another kind."""
    if isinstance(shape, dict):
        if not isinstance(data, dict):
            yield at, "a mapping"
            return
        for key, kind in shape.items():
            if data.get(key) is not None:
                yield from misshapen(data[key], kind, at.of(data, key))
    elif isinstance(shape, list):
        if not isinstance(data, list):
            yield at, "a list"
            return
        for number, each in enumerate(data):
            yield from misshapen(each, shape[0], at.of(data, number))
    elif shape is not ANY and (not isinstance(data, shape) or (isinstance(data, bool) and shape is not bool)):
        yield at, NAMES[shape]
