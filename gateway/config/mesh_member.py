"""A gateway as a member of a mesh: its own identity, and upstreams that are services of the mesh.

Strategy: an upstream `{service: payments}` becomes what anybody could have written by hand: endpoints from a watched file, TLS with the
member's own certificate, and the service's SPIFFE id expected. The files are the member's, kept current by the admin process; so all
that works for other upstreams works here.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway._speedups.certificates import TlsError, parse_certificates
from gateway.config.base import Model, needed, setting
from gateway.config.tls import Pair
from gateway.config.values import FilePath, Name, fault, text_of

# Below the state folder, written by gateway.mesh.
SVID, BUNDLE, ENDPOINTS, REVOKED, TRAFFIC = "svid.pem", "bundle.pem", "endpoints", "revoked.json", "traffic.json"
CARRIES = "~websocket"  # in TRAFFIC, beside services (whose names have no ~): service -> whether it carries WebSockets
SERVICE = re.compile(r"spiffe://([a-z0-9._-]+)/service/([A-Za-z0-9._-]+)")
# What a mesh gateway is asked by; a service of another name is reached within its own network only.
HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
NOBODY = "not-joined.invalid"  # the trust domain of those who have none: no certificate carries it
FIXED = ("targets", "discovery", "tls")  # what `service` decides


def parse_control(raw: Any) -> str:
    hint = "write the address of the mesh's control plane: https://host:port"
    text = text_of(raw, "expected an https address", hint)
    try:
        parts = urlsplit(text)
        good = parts.scheme == "https" and parts.hostname and (parts.port is None or parts.port) and not parts.path.strip("/")
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise fault("expected an https address", hint)
    return text.rstrip("/")



def parse_spire(raw: Any) -> str:
    """Return the address of a SPIFFE agent; `env` stands for SPIFFE_ENDPOINT_SOCKET, read when it is needed."""
    hint = "write unix:/run/spire/agent.sock, tcp://127.0.0.1:PORT, or env for SPIFFE_ENDPOINT_SOCKET"
    text = text_of(raw, "expected the address of a SPIFFE agent", hint)
    if text == "env" or re.fullmatch(r"unix:(?://)?/[^\0?#]+", text):
        return text
    match = re.fullmatch(r"tcp://(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})/?", text)
    try:
        if match is None or not 0 < int(match[3]) < 65536:
            raise ValueError
        ipaddress.ip_address(match[1] or match[2])
    except ValueError:
        raise fault("not the address of a SPIFFE agent", hint) from None
    return text


SpireText = Annotated[str, BeforeValidator(parse_spire), WithJsonSchema({"type": "string", "x-is": "unix:PATH or env"})]


class Mesh(Model):
    """The gateway as a member of a service mesh."""

    service: Name = needed("who this gateway is in the mesh, as the mesh's file names it")
    control: Annotated[
        str, BeforeValidator(parse_control), WithJsonSchema({"type": "string", "x-is": "https://host:port"})
    ] = needed("the mesh's control plane")
    network: Name | None = setting(None, "where this gateway is, when the mesh has several networks; default: `default`")
    state: FilePath = needed("folder of the certificate, its key and what the control plane said last; made when it is not there")
    token: FilePath | None = setting(None, "a token of `crossway mesh token`, needed the first time")
    certificate: Pair | None = setting(None, "instead of a token: a certificate of the bank's PKI that may join as this service")
    kubernetes: FilePath | None = setting(None, "instead of a token: this pod's service account token, from a projected volume")
    control_ca: FilePath | None = setting(None, "the root of the mesh, for `certificate` and `kubernetes`")

    spire: SpireText | None = setting(None, "instead of all of these: certificate and roots come from the SPIFFE agent at this socket, unix:PATH or env (SPIFFE_ENDPOINT_SOCKET)")

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        ways = [name for name in ("certificate", "token", "kubernetes", "spire") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise fault(f"both `{ways[0]}` and `{ways[1]}`", "keep one of them", at=(ways[1],))
        if self.control_ca is None and ways in (["certificate"], ["kubernetes"]):
            raise fault(f"`{ways[0]}` and `control_ca` belong together: `control_ca` is missing", "who we are, and who the control plane is")
        if self.control_ca is not None and ways not in (["certificate"], ["kubernetes"]):
            raise fault("`certificate` and `control_ca` belong together: `certificate` is missing", "who we are, and who the control plane is")
        return self

    @property
    def svid(self) -> Path:
        """Return the file of the certificate and its key."""
        return self.state / SVID

    @property
    def revoked(self) -> Path:
        """Return the file of the deny list."""
        return self.state / REVOKED

    @property
    def traffic(self) -> Path:
        """Return the file of the services' splits and canaries."""
        return self.state / TRAFFIC

    @property
    def joined(self) -> str | None:
        """Return the trust domain of the certificate that is held; None while there is none."""
        return domain_of(self.state)


def domain_of(state: Path) -> str | None:
    """Return the trust domain of the certificate in a state folder, None when there is none that can be read."""
    try:
        (uri,) = parse_certificates((state / SVID).read_bytes())[0].uris
    except (OSError, TlsError, ValueError):
        return None
    match = SERVICE.fullmatch(uri)
    return match[1] if match else None


def endpoints_file(state: Path, service: str) -> Path:
    return state / ENDPOINTS / f"{service}.yaml"


def written_out(upstream: dict[str, Any], mesh: Any, base: Path) -> dict[str, Any]:
    """Return an upstream's mapping with what its `service` stands for. Raises a fault for what contradicts it."""
    for key in FIXED:
        if key in upstream:
            raise fault(
                f"both `service` and `{key}`", f"remove `{key}`: the mesh says where the service is and who it is", at=(key,)
            )
    if not isinstance(mesh, dict) or not isinstance(mesh.get("state"), str):
        raise fault(
            "a service of a mesh, of which this gateway is no member", "add `mesh: {service: edge, control: https://..., state: edge.state}`",
            at=("service",),
        )
    state, service = base / mesh["state"], str(upstream["service"])
    domain = domain_of(state)
    if domain is None:
        # Checked before it has joined: this upstream reaches nobody, and trusts nobody who would be there.
        return {**upstream, "targets": ["127.0.0.1:9"], "tls": {"sans": [f"spiffe://{NOBODY}/service/{service}"]}}
    own = str(state / SVID)
    return {
        **upstream,
        "discovery": {"file": str(endpoints_file(state, service))},
        "tls": {
            "ca": str(state / BUNDLE), "sans": [f"spiffe://{domain}/service/{service}"], "certificate": {"cert": own, "key": own},
            **({"server_name": f"{service}.{domain}"} if HOST.fullmatch(f"{service}.{domain}") else {}),
        },
    }  # fmt: skip
