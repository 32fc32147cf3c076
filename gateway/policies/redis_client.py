"""Opening the redis package's asyncio client for what the configuration says.

Strategy: no retries and no waits of the client's own: the store decides how long anything may take, and starts afresh after a
failure. Only a cluster's redirections are followed. The nodes that a cluster had last are asked before the one in the URL, which may
be the one that died.
"""

from __future__ import annotations

import ssl
from typing import Any

from redis.asyncio import Redis as Client
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.config.redis import Redis

REDIRECTIONS = 3

_nodes: dict[Redis, list[tuple[str, int]]] = {}     # of each cluster, as this process saw it last


async def connect(settings: Redis) -> Any:
    """Return a client that has a connection. Raises RedisError, OSError or TimeoutError."""
    url = settings.url
    options: dict[str, Any] = {
        "username": settings.username,
        "password": None if settings.password is None else settings.password.get_secret_value(),
        "socket_connect_timeout": settings.timeouts.connect,
        "socket_timeout": max(settings.timeouts.connect, 2 * settings.timeouts.command),
        "protocol": 2,
        "health_check_interval": 0,
    }
    if url.tls:
        options |= {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            "ssl_ca_certs": None if settings.tls.ca is None else str(settings.tls.ca),
            "ssl_certfile": None if settings.tls.cert is None else str(settings.tls.cert),
            "ssl_keyfile": None if settings.tls.key is None else str(settings.tls.key),
        }
    if settings.cluster:
        return await _connect_cluster(settings, options)
    place = {"unix_socket_path": url.path} if url.path else {"host": url.host, "port": url.port}
    client = Client(**place, **options, db=url.database, max_connections=settings.pool + 1, retry=Retry(NoBackoff(), 0))
    try:
        await client.ping()
    except BaseException:
        await client.aclose()
        raise
    return client


async def _connect_cluster(settings: Redis, options: dict[str, Any]) -> RedisCluster:
    known = [ClusterNode(host, port) for host, port in _nodes.get(settings, ()) if (host, port) != (settings.url.host, settings.url.port)]
    cluster = RedisCluster(
        startup_nodes=[*known, ClusterNode(settings.url.host, settings.url.port)], **options, max_connections=settings.pool + 2,
        retry=Retry(NoBackoff(), REDIRECTIONS),
    )
    try:
        await cluster.initialize()
        await cluster.ping(target_nodes=RedisCluster.PRIMARIES)     # one that is down is reason enough to count as away
    except BaseException:
        await cluster.aclose()
        raise
    _nodes[settings] = [(node.host, int(node.port)) for node in cluster.get_nodes()]
    return cluster
