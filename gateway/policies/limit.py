"""rate_limit, quota and limits: how often, how large, how long.

Strategy: a bucket's name is the policy's, so that routes which use one named policy count together; with `key: route` each
route counts for itself. What several machines count together is in `cluster`, imported only where a policy asks for it.
"""

import math

from gateway._speedups.steps import HeadLimitsStep, RateLimitStep
from gateway._speedups.token_bucket import RateLimit as Bucket
from gateway.config.policies import LimitsPolicy, Quota, RateLimit
from gateway.policies.base import RouteParts, Use


def compile_rate_limit(settings: RateLimit, use: Use, parts: RouteParts) -> None:
    name = counted_as(use, settings.key)
    bucket = Bucket(name, settings.rate.count, round(settings.rate.period * 1_000_000), settings.burst_size)
    # Seconds in which an empty bucket fills: the window in which `burst` requests are what a caller may count on.
    window = max(1, math.ceil(settings.burst_size * settings.rate.period / settings.rate.count))
    label = settings.name or use.name
    if settings.scope == "machine":
        parts.steps.append(RateLimitStep(use.name, bucket, settings.key, window=window, label=label))
    else:
        from gateway.policies import cluster

        cluster.compile_rate(settings, use, parts, name, bucket, window)


def compile_quota(settings: Quota, use: Use, parts: RouteParts) -> None:
    from gateway.policies import cluster

    cluster.compile_quota(settings, use, parts, counted_as(use, settings.key))


def counted_as(use: Use, key: str) -> str:
    """Return the name under which a use counts."""
    return f"{use.name}@{use.route}" if key == "route" else use.name


def compile_limits(settings: LimitsPolicy, use: Use, parts: RouteParts) -> None:
    if settings.body is not None:
        parts.body_limit = settings.body
    if settings.time is not None:
        parts.total = settings.time
    if settings.head is not None or settings.fields is not None:
        parts.steps.append(HeadLimitsStep(use.name, head=settings.head or 0, fields=settings.fields or 0))
