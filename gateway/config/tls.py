"""The settings of TLS: towards clients (`listeners.X.tls`) and towards upstreams (`upstreams.X.tls`).

Strategy: what a mapping can contradict in itself is checked here; the content of certificates, keys and lists is looked at in
`check_tls`. What is safe is the default; what is not says so in its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, listed, needed, part, setting
from gateway.config.values import Deadline, FilePath, Flag, Int, Text, fault
from gateway.config.web import parse_host_pattern


def _version(raw: Any) -> Any:
    return str(raw) if isinstance(raw, float) else raw  # 1.3 without quotes is a number in YAML


MinVersion = Annotated[Literal["1.2", "1.3"], BeforeValidator(_version)]


class Pair(Model):
    """A certificate and its key."""

    cert: FilePath = needed("the certificate, PEM; behind it the intermediates up to the root")
    key: FilePath = needed("its private key, PEM, not encrypted")


class ListenerPair(Pair):
    """A certificate that clients see. Which one is chosen by the name that the client asks for (SNI)."""

    ocsp: FilePath | None = setting(None, "an OCSP response to staple, DER, kept fresh by a job of yours")


class Tickets(Model):
    """Session tickets: a client that comes back needs no second full handshake."""

    enabled: Flag = setting(True, "offer them; listeners that ask for client certificates never do")
    rotate: Deadline = setting("8h", "how often all workers get a new key; tickets of the last two keys are still taken")


class ListenerTls(Model):
    """TLS 1.2 (ECDHE with AEAD) and 1.3 towards clients."""

    certificates: Annotated[tuple[ListenerPair, ...], Field(min_length=1)] = needed(
        "certificates with their keys; the first is for clients that name no host of the others"
    )
    client_auth: Literal["off", "optional", "required"] = setting(
        "off", "whether clients show a certificate; one that is shown must be valid"
    )
    client_ca: FilePath | None = setting(None, "who may have issued it: certificates, PEM")
    crl: FilePath | None = setting(None, "revocation lists, PEM, one of every authority in the chains")
    forward_client_certificate: Flag = setting(
        False, "tell the upstream in Client-Cert and Client-Cert-Chain (RFC 9440)"
    )
    min_version: MinVersion = setting("1.2", "oldest version of TLS")
    alpn: Annotated[tuple[Literal["http/1.1", "h2"], ...], listed("protocol"), Field(min_length=1)] = setting(
        ["h2", "http/1.1"], "protocols that are offered, the preferred one first; without h2 when the listener says `http2: false`"
    )
    handshake: Deadline = setting("10s", "for the handshake, PROXY header included")
    handshakes: Int = Field(
        default=1000, ge=1, le=1_000_000, description="handshakes under way in each worker; above it the oldest is dropped"
    )
    tickets: Tickets = part(Tickets, "session tickets")
    ktls: Flag = setting(False, "let the kernel encrypt, where it and OpenSSL can")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.client_auth != "off" and self.client_ca is None:
            raise fault(
                "client certificates without a `client_ca`",
                "name the file with the certificates of those who may issue them",
                at=("client_auth",),
            )
        if self.client_auth == "off":
            for name in ("client_ca", "crl"):
                if getattr(self, name) is not None:
                    raise fault(
                        f"`{name}` without `client_auth` is never used",
                        "add `client_auth: required` (or optional), or remove it",
                        at=(name,),
                    )
            if self.forward_client_certificate:
                raise fault(
                    "nothing to forward: clients are not asked for a certificate",
                    "add `client_auth: required` (or optional) and `client_ca`",
                    at=("forward_client_certificate",),
                )
        return self


def _authorities(raw: Any) -> Any:
    return None if raw == "system" else raw


def _server_name(raw: Any) -> str:
    if not isinstance(raw, str) or "*" in raw:
        raise fault("expected a host name", "write the name in the server's certificate, such as payments.internal")
    return parse_host_pattern(raw).strip("[]")


class UpstreamTls(Model):
    """TLS towards an upstream. The server's certificate is verified: who issued it, its dates, its name."""

    ca: Annotated[
        FilePath | None,
        BeforeValidator(_authorities),
        WithJsonSchema({"type": "string", "x-is": "file or `system`"}),
    ] = Field(default=None, description="who may have issued it: certificates, PEM; default: `system`, those of this machine")
    server_name: Annotated[
        str, BeforeValidator(_server_name), WithJsonSchema({"type": "string", "x-is": "host"})
    ] | None = setting(None, "the name that is asked for (SNI) and expected; default: the endpoint's host")
    sans: Annotated[tuple[Text, ...], listed("text")] = setting(
        [], "names of which the certificate must carry one, instead of the server name: DNS names, URIs (SPIFFE), addresses"
    )
    certificate: Pair | None = setting(None, "our own certificate, for upstreams that ask for one")
    crl: FilePath | None = setting(None, "revocation lists, PEM, one of every authority in the chains")
    min_version: MinVersion = setting("1.2", "oldest version of TLS")
    insecure: Flag = setting(False, "verify nothing: whoever answers is believed; a warning at every start")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.insecure:
            for name in ("ca", "sans", "crl"):
                if getattr(self, name):
                    raise fault(f"`insecure` verifies nothing, so `{name}` is never used", "remove `insecure`", at=(name,))
        return self


def widen_upstream_tls(raw: Any) -> Any:
    """`true` stands for all defaults, `false` for none."""
    if isinstance(raw, bool):
        return {} if raw else None
    return raw


def listener_files(tls: ListenerTls) -> Iterator[Path]:
    """Yield every file that a listener's TLS is made of."""
    for pair in tls.certificates:
        yield from (pair.cert, pair.key)
        if pair.ocsp is not None:
            yield pair.ocsp
    yield from (path for path in (tls.client_ca, tls.crl) if path is not None)


def upstream_files(tls: UpstreamTls) -> Iterator[Path]:
    """Yield every file that an upstream's TLS is made of."""
    if tls.certificate is not None:
        yield from (tls.certificate.cert, tls.certificate.key)
    yield from (path for path in (tls.ca, tls.crl) if path is not None)
