"""The settings of the policies that count: rate_limit and quota.

Strategy: what Redis is needed for is plain from the mapping alone (`scope: cluster`, any quota); that `redis:` is there
is looked at in `check`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, needed, setting
from gateway.config.values import Flag, Int, RateText, Text, fault
from gateway.config.web import parse_field_name

OnFailure = Literal["local", "deny", "allow"]
MOST_QUOTA = 1_000_000_000_000


def _rate_key(raw: Any) -> str:
    hint = "one of client, ip, route, or header:NAME such as header:x-tenant"
    if isinstance(raw, str) and raw.startswith("header:"):
        return f"header:{parse_field_name(raw[7:])}"
    if raw not in ("client", "ip", "route"):
        raise fault("expected what to count by", hint)
    return str(raw)


LimitKey = Annotated[
    str,
    BeforeValidator(_rate_key),
    WithJsonSchema({"type": "string", "x-is": "`client`, `ip`, `route` or `header:NAME`"}),
]


class RateLimit(Model):
    """A token bucket, exact over all workers, or over all gateways; refusals are 429 with Retry-After."""

    kind: ClassVar[str] = "rate_limit"

    key: LimitKey = needed("whose requests are counted together")
    rate: RateText = needed("how many requests in what time")
    burst: Int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="how many may come at once; default: the rate's count"
    )
    name: Text | None = setting(None, "name in the RateLimit fields; default: the policy's name")
    scope: Literal["machine", "cluster"] = setting(
        "machine", "count over the workers of this machine, or over every gateway on the same `redis`"
    )
    exact: Flag = setting(
        False, "ask Redis for each request instead of spending tokens leased in advance; `scope: cluster` only"
    )
    on_failure: OnFailure = setting(
        "local",
        "while Redis is away: hold this machine to its share, answer 503, or let everything pass; `scope: cluster` only",
    )

    @model_validator(mode="after")
    def _cluster(self) -> Self:
        if self.scope == "machine":
            for name in ("exact", "on_failure"):
                if name in self.model_fields_set:
                    raise fault(f"`{name}` is about Redis", "add `scope: cluster`, or remove it", at=(name,))
        return self

    @property
    def burst_size(self) -> int:
        """Return the burst, which is the rate's count unless it is given."""
        return self.rate.count if self.burst is None else self.burst


class Quota(Model):
    """So many requests in an hour, day or month, over every gateway, kept in Redis; refusals are 429 until the window ends."""

    kind: ClassVar[str] = "quota"

    key: LimitKey = needed("whose requests are counted together")
    limit: Int = Field(ge=1, le=MOST_QUOTA, description="how many requests in one window")
    per: Literal["hour", "day", "month"] = needed("the window")
    window: Literal["calendar", "rolling"] = setting(
        "calendar", "windows of the calendar, in UTC, or the last 1 hour, 24 hours or 30 days at any moment"
    )
    name: Text | None = setting(None, "name in the RateLimit fields; default: the policy's name")
    exact: Flag = setting(False, "ask Redis for each request instead of spending requests leased in advance")
    on_failure: OnFailure = setting(
        "local", "while Redis is away: hold this machine to its share of the average pace, answer 503, or let all pass"
    )

    @property
    def seconds(self) -> int:
        """Return the length of the window; of a calendar's month, the longest."""
        month = 31 if self.window == "calendar" else 30
        return {"hour": 3600, "day": 86400, "month": month * 86400}[self.per]
