"""The parts into which a mesh divides a service, as a gateway's upstreams: what its control plane said last, read with the configuration.

Strategy: a part is an upstream like the service's own, with a watched file of its instances alone; whoever looks at all upstreams finds
it there. The mesh's word is a file of the member, and its change reloads as one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.config.mesh_member import CARRIES
from gateway.errors import Problem

if TYPE_CHECKING:
    from gateway.config.schema import Config, Upstream

Triples = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class ServicePart:
    """Some of a service's instances. `name` is the upstream's, `label` what a sticky choice hashes."""

    name: str
    label: str
    version: str  # as metrics show it; empty: unknown
    weight: int = 0
    headers: Triples = ()  # of a canary
    cookies: Triples = ()


@dataclass(frozen=True)
class ServiceTraffic:
    """How the mesh deals a service's requests out."""

    canaries: tuple[ServicePart, ...]
    splits: tuple[ServicePart, ...]
    sticky: str | None

    @property
    def parts(self) -> tuple[ServicePart, ...]:
        """Return canaries, then splits, as a Chooser counts them."""
        return (*self.canaries, *self.splits)


def add_parts(config: Config) -> list[Problem]:
    """Give the configuration an upstream for each part of its services; return what is wrong with the mesh's word."""
    if config.mesh is None or config.mesh.joined is None:
        return []  # who has not joined, or may not read what another one holds, has no services
    path = config.mesh.traffic
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []  # nothing was said of it yet
    except OSError as error:
        return [Problem(str(path), 0, 0, f"cannot be read: {error.strerror}", "the mesh's word on splits, written by this gateway itself")]
    config.document.files[f"file:{path}"] = content
    try:
        said: dict[str, Any] = json.loads(content)
        for name, upstream in list(config.upstreams.items()):
            upstream._carries = said.get(CARRIES, {}).get(upstream.service)
            if upstream.service in said and upstream.discovery.file is not None:  # else it joined this moment
                _divide(config, name, upstream, said[upstream.service])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [Problem(str(path), 0, 0, f"cannot be used: {error!r}", "it is written by this gateway itself; remove it, and it is written anew")]
    return []


def _divide(config: Config, name: str, upstream: Upstream, said: dict[str, Any]) -> None:
    """All of a part may be ejected, since the other parts take its share; with all parts out, they are used as if none were."""
    assert config.mesh is not None
    files: dict[str, Path] = {}

    def part(each: dict[str, Any]) -> ServicePart:
        made = ServicePart(
            f"{name}/{each['label']}", each["label"], each["version"], int(each["weight"]), _triples(each["headers"]), _triples(each["cookies"])
        )
        files[made.name] = config.mesh.state / each["file"] if config.mesh else Path()
        return made

    upstream._traffic = ServiceTraffic(tuple(map(part, said["canary"])), tuple(map(part, said["split"])), said["sticky"])
    health = upstream.health.model_copy(update={
        "eject": upstream.health.eject.model_copy(update={"share": 1.0}), "when_all_bad": "panic",
    })  # fmt: skip
    for key, file in files.items():
        copied = upstream.model_copy(update={"discovery": upstream.discovery.model_copy(update={"file": file}), "health": health})
        copied._traffic, copied._part = None, True
        config.upstreams[key] = copied


def _triples(said: Any) -> Triples:
    return tuple((str(name), str(op), str(value)) for name, op, value in said)
