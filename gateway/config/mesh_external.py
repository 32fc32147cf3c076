"""Hosts outside the mesh that its services may call: named ones only, over TLS that the caller's sidecar begins and verifies.

Strategy: as `mesh_file`. Who may call is said by the rules whose `to` names the entry; what is written here opens nothing by itself.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, PrivateAttr, model_validator

from gateway.config.base import Model, listed, needed, part, setting
from gateway.config.discovery import NameServer
from gateway.config.resilience import BalanceSettings, RetrySettings
from gateway.config.values import Deadline, FilePath, Int, described, fault, text_of

MOST = 32  # hosts of an entry
_HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")


def _host(raw: Any) -> str:
    hint = "a whole name such as api.cards.example; every host is named, a * would open more than anybody reads"
    if not _HOST.fullmatch(text := text_of(raw, "expected a host name", hint).lower().removesuffix(".")):
        raise fault("not a host name", hint)
    return text


def _network(raw: Any) -> IPv4Network | IPv6Network:
    hint = "an address or a network such as 10.20.0.0/16"
    try:
        return ipaddress.ip_network(text_of(raw, "expected a network", hint))
    except ValueError:
        raise fault("not a network", hint) from None


HostName = Annotated[str, PlainValidator(_host), described("host name")]
Network = Annotated[
    IPv4Network | IPv6Network, PlainValidator(_network), described("network"), PlainSerializer(str, return_type=str)
]  # fmt: skip


class ExternalTls(Model):
    """TLS towards an external host: 1.2 or later, always verified, by chain and by the host's name."""

    ca: FilePath | None = setting(None, "authorities that are trusted, PEM; default: those of the machine on which the caller runs")


class External(Model):
    """Hosts outside the mesh, and how they are called."""

    hosts: Annotated[tuple[HostName, ...], listed("host name"), Field(min_length=1, max_length=MOST)] = needed(
        "names; the Host by which an app asks, what is looked up, and what the certificate must name"
    )
    port: Int = Field(default=443, ge=1, le=65535, description="where they listen")
    protocol: Literal["http", "http2"] = setting("http", "what they speak, in TLS")
    tls: ExternalTls = part(ExternalTls, "who they have to be")
    addresses: Annotated[tuple[Network, ...], listed("network"), Field(min_length=1)] | None = setting(
        None, "networks in which their addresses have to lie; default: public addresses, none of this machine, of its links or private"
    )
    resolver: NameServer | None = setting(None, "the name server to ask; default: those of the caller's /etc/resolv.conf")
    timeout: Deadline | None = setting(None, "for an answer, retries included; default: that of `upstreams`")
    retries: RetrySettings | None = setting(None, "further attempts, as in `upstreams`")
    balance: BalanceSettings | None = setting(None, "how an address is chosen, as in `upstreams`")

    _authorities: str | None = PrivateAttr(default=None)

    @property
    def authorities(self) -> str | None:
        """Return what `tls.ca` held when the file was loaded."""
        return self._authorities

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for number, host in enumerate(self.hosts):
            if host in self.hosts[:number]:
                raise fault("the same host twice", "remove one of them", at=("hosts", number))
        return self
