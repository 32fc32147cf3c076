"""What is wrong with `redis:` and the limits that need it, beyond one mapping.

Strategy: certificates are loaded as the connection will load them; nothing is connected to.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path

from gateway.config.keyfile import read_file
from gateway.config.policies import Policy
from gateway.config.redis import Redis
from gateway.config.source import Document, Key

MAX_PEM = 4 << 20  # bytes; a system's whole store of authorities is a quarter of a MiB

Place = tuple[Key, ...]


def check_redis(redis: Redis | None, policies: Iterable[tuple[Place, Policy]], document: Document) -> None:
    """Report limits without a Redis, a Redis without limits, and certificates that cannot be used."""
    needed = False
    for place, policy in policies:
        clustered = policy.rate_limit is not None and policy.rate_limit.scope == "cluster"
        if not clustered and policy.quota is None:
            continue
        needed = True
        if redis is None:
            at = (*place, "rate_limit", "scope") if clustered else (*place, "quota")
            what = "a limit over several gateways" if clustered else "a quota"
            document.report(
                at, f"{what}, but no Redis to keep it in", "add `redis: {url: redis://host:6379}` at the top level"
            )
    if redis is None:
        return
    if not needed:
        document.warn(("redis",), "no policy uses Redis", "use `scope: cluster` or a quota, or remove it", key=True)
    if redis.password is not None and not redis.url.tls and not redis.url.local:
        document.warn(
            ("redis", "url"), "the password and every key travel unencrypted to another machine", "use rediss://"
        )
    _certificates(redis, document)


def _certificates(redis: Redis, document: Document) -> None:
    tls = redis.tls
    usable = True
    for name, path in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key)):
        usable = (path is None or _readable(path, ("redis", "tls", name), document)) and usable
    if not usable:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca is not None:
        try:
            context.load_verify_locations(tls.ca)
        except (ssl.SSLError, OSError):
            document.report(("redis", "tls", "ca"), "there is no certificate in this file", "put PEM certificates in it")
    if tls.cert is not None and tls.key is not None:
        try:
            context.load_cert_chain(tls.cert, tls.key, password=_no_password)
        except ValueError:
            document.report(("redis", "tls", "key"), "the key is encrypted", "store it decrypted, readable by this user only")
        except (ssl.SSLError, OSError):
            document.report(
                ("redis", "tls", "cert"), "the certificate and the key do not make a pair", "put matching PEM files there"
            )


def _readable(path: Path, at: Place, document: Document) -> bool:
    try:
        document.files[f"file:{path}"] = read_file(path, MAX_PEM)
    except OSError as error:
        document.report(at, f"cannot read this file: {error.strerror}", f"put a PEM file there: {path}")
        return False
    return True


def _no_password() -> str:
    raise ValueError("encrypted")
