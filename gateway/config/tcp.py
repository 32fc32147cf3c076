"""Raw TCP on a listener (`listeners.X.tcp`): bytes for databases and legacy protocols, to one upstream or by the server name.

Strategy: what the mapping can contradict in itself is checked here; what contradicts the rest of the file in `check_tcp`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator
from pydantic.functional_validators import BeforeValidator

from gateway.config.base import Model, listed, setting
from gateway.config.values import Deadline, Int, Name, described, fault
from gateway.config.web import Network, is_ip, parse_host_pattern


def parse_server_name(raw: Any) -> str:
    """Return a name as a ClientHello carries it, in lower case: `db.bank.test`, or `*.bank.test` for exactly one label more."""
    text = parse_host_pattern(raw)
    if text == "*":
        raise fault("a star alone is no server name", "write `default: UPSTREAM` for all other names")
    if is_ip(text.removeprefix("*.").strip("[]")):
        raise fault("a server name is never an address (RFC 6066)", "clients of an address name nobody: write `default: UPSTREAM`")
    return text


def _distinct(raw: Any) -> Any:
    """Two spellings of one name would be one entry, and the other upstream silently lost."""
    if isinstance(raw, dict):
        seen: set[str] = set()
        for name in raw:
            if isinstance(name, str):
                folded = name.lower().removesuffix(".")
                if folded in seen:
                    raise fault("the same server name twice", "names are compared without regard to case; remove one", at=(name,))
                seen.add(folded)
    return raw


ServerName = Annotated[str, PlainValidator(parse_server_name), described("server name")]


class Tcp(Model):
    """Bytes pass as they come, in both directions; nothing of them is understood."""

    upstream: Name | None = setting(None, "where connections go; this or `sni`")
    sni: Annotated[dict[ServerName, Name], BeforeValidator(_distinct)] = setting(
        {}, "upstreams by the name in the client's TLS handshake, which is not decrypted: NAME or *.SUFFIX (one label)"
    )
    default: Name | None = setting(None, "with `sni`: for other names and for none; default: such connections are refused")
    idle: Deadline = setting("1h", "without a byte in either direction; closed after it")
    hello: Deadline = setting("10s", "for the PROXY header and the ClientHello; with `tls`, its `handshake` counts")
    connections: Int = Field(default=1024, ge=1, le=10_000_000, description="open at once, over all workers; refused above it")
    allow: Annotated[tuple[Network, ...], listed("network"), Field(min_length=1)] | None = setting(
        None, "who may connect; default: everybody who can reach it"
    )
    starttls: Literal["off", "postgres"] = setting(
        "off", "how clients ask for TLS before they begin it: `postgres` answers SSLRequest, and asks the upstream's servers with it"
    )
    proxy_protocol: Literal["off", "v2"] = setting("off", "tell the upstream who the client is: PROXY protocol v2, before all else")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.upstream is None and not self.sni:
            raise fault("neither `upstream` nor `sni`", "add `upstream: NAME`")
        if self.upstream is not None and self.sni:
            raise fault("both `upstream` and `sni`", "keep one; for other names than those of `sni` write `default`", at=("upstream",))
        if self.default is not None and not self.sni:
            raise fault("`default` without `sni`", "write `upstream: NAME` instead", at=("default",))
        return self

    @property
    def alpn(self) -> tuple[str, ...]:
        """Return what is spoken above TLS, as far as it is known; PostgreSQL 17's clients that begin with TLS insist on being told."""
        return ("postgresql",) if self.starttls == "postgres" else ()

    @property
    def upstreams(self) -> tuple[str, ...]:
        """Return the names of the upstreams that connections may reach, each once."""
        names = [self.upstream, *self.sni.values(), self.default]
        return tuple(dict.fromkeys(name for name in names if name is not None))
