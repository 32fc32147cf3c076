"""The settings of Redis, in which limits of several machines are kept.

Strategy: the URL says where and nothing else: a password in it would be shown by whatever shows addresses, so it is
refused, and TLS is on exactly when the scheme says `rediss`. Whether the files can be read is looked at in `check`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, part, setting
from gateway.config.values import TEXT, Deadline, FilePath, Flag, Int, Secret, Text, described, fault, text_of
from gateway.config.web import is_ip, parse_host_pattern

PORT = 6379
LONGEST_COMMAND = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is: a host and port, with or without TLS, or the path of a Unix socket."""

    host: str = ""
    port: int = PORT
    tls: bool = False
    path: str = ""
    database: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.database}" if self.database else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    @property
    def local(self) -> bool:
        """Tell whether what is sent there stays on this machine."""
        return bool(self.path) or self.host in ("localhost", "::1") or self.host.startswith("127.")


def parse_redis_url(raw: Any) -> RedisAddress:
    """Return the RedisAddress of `redis://host:port/db`, `rediss://host:port/db` or `unix:///path?db=n`."""
    hint = "write redis://host:6379, rediss://host:6379 for TLS, or unix:///path"
    text = text_of(raw, "expected the URL of a Redis server", hint)
    if not text.isascii() or not text.isprintable() or " " in text:
        raise fault("expected the URL of a Redis server", hint)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise fault("not a URL", hint) from None
    if url.username is not None or url.password is not None:
        raise fault(
            "a user or password in the URL would be shown with it",
            'write `username: name` and `password: "${env:NAME}"` beside it',
        )
    if url.scheme not in ("redis", "rediss", "unix") or url.fragment:
        raise fault("not the URL of a Redis server", hint)
    if url.scheme == "unix":
        if url.netloc or not url.path.startswith("/") or len(url.path.encode()) > 107:
            raise fault("a Unix socket needs an absolute path of at most 107 bytes", "write unix:///run/redis.sock")
        return RedisAddress(path=url.path, database=_database(url.query.removeprefix("db=") or "0"))
    if not url.hostname or url.query:
        raise fault("the URL needs a host and nothing behind the database", hint)
    host = url.hostname if is_ip(url.hostname) else parse_host_pattern(url.hostname)
    if "*" in host or port == 0:
        raise fault("not the address of a server", hint)
    return RedisAddress(host, port or PORT, url.scheme == "rediss", "", _database(url.path.removeprefix("/") or "0"))


def _database(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise fault("the database is a number", "such as redis://host:6379/0")
    return int(text)


RedisUrl = Annotated[
    RedisAddress,
    PlainValidator(parse_redis_url),
    TEXT,
    described("URL", examples=["rediss://redis.bank.test:6379"]),
]


def _prefix(raw: Any) -> str:
    hint = "letters, digits and -_.: , at most 64"
    if not isinstance(raw, str) or not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", raw):
        raise fault("not a prefix for keys", hint)
    return raw


def _nodes(raw: Any) -> int | str:
    if raw == "auto":
        return "auto"
    hint = "write `auto` (as many as Redis was told of lately) or a number such as 3"
    if isinstance(raw, bool) or not re.fullmatch(r"[0-9]{1,5}", str(raw)) or not 1 <= int(raw) <= 10_000:
        raise fault("expected a number of gateways", hint)
    return int(raw)


def _at_most_a_second(seconds: float) -> float:
    if seconds > LONGEST_COMMAND:
        raise fault("a request waits at most 1s for its limit", "20ms is usual; what a dead Redis means is `on_failure`")
    return seconds


class RedisTls(Model):
    """How TLS to Redis is set up; it is on when the URL begins with rediss."""

    ca: FilePath | None = setting(None, "certificates to trust instead of the system's, PEM")
    cert: FilePath | None = setting(None, "our certificate, PEM, for servers that ask for one")
    key: FilePath | None = setting(None, "its key, PEM")

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert is None) != (self.key is None):
            have, lack = ("cert", "key") if self.key is None else ("key", "cert")
            raise fault(f"`{have}` without `{lack}`", "name both files", at=(have,))
        return self


class RedisTimeouts(Model):
    """How long Redis is waited for."""

    connect: Deadline = setting("200ms", "for a connection, TLS and login included; no request waits for one")
    command: Annotated[Deadline, AfterValidator(_at_most_a_second)] = setting(
        "20ms", "the most that a request waits for its limits, all of them together; `on_failure` decides after it"
    )


class Redis(Model):
    """A Redis or Valkey server, or cluster, that several gateways share. Nothing of it is loaded unless this is there."""

    url: RedisUrl = Field(description="redis://host:port/db, rediss:// for TLS, or unix:///path")
    cluster: Flag = setting(False, "it is a Redis Cluster; the URL is one of its nodes")
    username: Text | None = setting(None, "name to log in with")
    password: Secret | None = setting(None, "password to log in with")
    tls: RedisTls = part(RedisTls, "certificates, for rediss://")
    timeouts: RedisTimeouts = part(RedisTimeouts, "deadlines towards Redis")
    pool: Int = Field(default=2, ge=1, le=64, description="connections of each worker")
    prefix: Annotated[str, BeforeValidator(_prefix), WithJsonSchema({"type": "string", "x-is": "text"})] = setting(
        "crossway", "what its keys begin with; gateways that share limits use the same"
    )
    nodes: Annotated[
        int | str,
        PlainValidator(_nodes),
        WithJsonSchema({"type": ["string", "integer"], "x-is": "number or `auto`"}),
    ] = setting("auto", "how many gateways share a limit while Redis is away (`on_failure: local`)")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cluster and self.url.path:
            raise fault("a cluster cannot be reached through a Unix socket", "use redis:// or rediss://", at=("cluster",))
        if self.cluster and self.url.database:
            raise fault("a cluster has database 0 only", "remove the number from the URL", at=("url",))
        if not self.url.tls and (self.tls.ca is not None or self.tls.cert is not None):
            raise fault("certificates, but the URL is not rediss://", "write rediss:// to use TLS", at=("tls",))
        if self.username is not None and self.password is None:
            raise fault("`username` without `password`", 'add `password: "${env:NAME}"`', at=("username",))
        return self
