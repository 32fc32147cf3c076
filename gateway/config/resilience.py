"""How an upstream is called so that it survives, and what is done when an endpoint does not answer.

Strategy: the defaults are those a bank can live with: one further attempt, only where nothing was sent, paid from a budget that
is always on; seven failures in a row eject an endpoint. What may be repeated although it was sent is said explicitly.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, Shorthand, listed, needed, part, setting
from gateway.config.values import Deadline, Duration, Flag, Int, Percent, Size, fault
from gateway.config.web import parse_field_name

FAILURES = ("connect-failure", "reset", "timeout", "429", "500", "502", "503", "504")


def _failure(raw: Any) -> Any:
    return str(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw


Failure = Annotated[
    Literal["connect-failure", "reset", "timeout", "429", "500", "502", "503", "504"], BeforeValidator(_failure)
]


class Backoff(Model):
    """The pause before a further attempt: anything between 0 and base x 2^n, at most max (full jitter)."""

    base: Duration = setting("25ms", "longest pause before the first one")
    max: Duration = setting("250ms", "longest pause before any")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max < self.base:
            raise fault("`max` is shorter than `base`", "raise it", at=("max",))
        if self.max > 60:
            raise fault("a back-off is at most 60s", "the client waits all that time", at=("max",))
        return self


class Retries(Model):
    """Further attempts. What was sent is repeated only when its method is idempotent, or its key says so and `idempotency_key`."""

    attempts: Int = Field(default=1, ge=0, le=10, description="after the first; the first hop of several has the say")
    on: Annotated[tuple[Failure, ...], listed("failure"), Field(min_length=1)] = setting(
        ["connect-failure"], "which failures: connect-failure, reset, timeout, 429, 500, 502, 503, 504"
    )
    per_try: Deadline | None = setting(
        None, "for the head of the response while another attempt may follow; default: the upstream's `head`"
    )
    backoff: Backoff = part(Backoff, "pauses between attempts")
    budget: Percent = setting("20%", "further attempts by requests, over all workers of the machine")
    reserve: Int = Field(default=10, ge=0, le=10_000, description="further attempts per second that are always allowed")
    body: Size = setting("64KiB", "longest request body that is kept for another attempt; larger ones are sent once")
    idempotency_key: Flag = setting(
        False, "the service executes each Idempotency-Key once: requests that carry one may be repeated"
    )

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if len(set(self.on)) < len(self.on):
            raise fault("the same failure twice", "remove one of them", at=("on",))
        if self.body > 16 << 20:
            raise fault("at most 16MiB of a body are kept", "larger ones are sent once", at=("body",))
        return self


def _widen_retries(raw: Any) -> Any:
    return {"attempts": raw} if isinstance(raw, (int, str)) and not isinstance(raw, bool) else raw


RetrySettings = Annotated[Retries, Shorthand(_widen_retries, {"type": "integer", "x-is": "number of attempts"})]


class Hedge(Model):
    """A second endpoint is asked when the first takes long: GET and HEAD only, paid from the retry budget."""

    after: Deadline = needed("how long the first one is waited for")


ALGORITHMS = ("p2c_ewma", "least_request", "round_robin", "random", "maglev")


def parse_key(raw: Any) -> str:
    """Return what a request is told apart by: client, source, header:NAME or cookie:NAME."""
    hint = "write client, source, header:NAME or cookie:NAME"
    if raw in ("client", "source"):
        return str(raw)
    kind, _, name = raw.partition(":") if isinstance(raw, str) else ("", "", "")
    if kind == "header":
        return f"header:{parse_field_name(name)}"
    if kind == "cookie" and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}", name):
        return f"cookie:{name}"
    raise fault("expected what to hash", hint)


class Maglev(Model):
    """The same key goes to the same endpoint, as long as that is well and not overloaded."""

    key: Annotated[
        str, BeforeValidator(parse_key), WithJsonSchema({"type": "string", "x-is": "client, source, header:NAME or cookie:NAME"})
    ] = needed("what a request is told apart by; without it a request goes anywhere")
    load: Annotated[
        int, BeforeValidator(lambda raw: _load(raw)), WithJsonSchema({"type": "string", "x-is": "percentage", "examples": ["125%"]})
    ] = setting("125%", "of the mean load, above which a key goes to the next endpoint")


def _load(raw: Any) -> int:
    match = re.fullmatch(r"([0-9]{3,4}) ?%", raw) if isinstance(raw, str) else None
    if not match or not 101 <= int(match[1]) <= 1000:
        raise fault("expected a percentage from 101% to 1000%", "write 125%")
    return int(match[1])


class Balance(Model):
    """How the next endpoint is chosen."""

    algorithm: Literal["p2c_ewma", "least_request", "round_robin", "random", "maglev"] = setting(
        "p2c_ewma", "p2c_ewma, least_request, round_robin, random or maglev"
    )
    maglev: Maglev | None = setting(None, "settings of maglev")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.algorithm == "maglev") != (self.maglev is not None):
            raise fault("maglev needs a key", "write `balance: {maglev: {key: client}}`")
        return self


def _widen_balance(raw: Any) -> Any:
    if isinstance(raw, dict) and "maglev" in raw and "algorithm" not in raw:
        return {"algorithm": "maglev", **raw}
    return {"algorithm": raw} if isinstance(raw, str) else raw


BalanceSettings = Annotated[Balance, Shorthand(_widen_balance, {"enum": [*ALGORITHMS]})]


class Eject(Model):
    """Failures that take an endpoint out for a while; afterwards one real request tries it."""

    failures: Int = Field(default=7, ge=0, le=1000, description="in a row; 0: never for that reason")
    ratio: Percent | None = setting(None, "of failures among the requests of 10 s; default: not looked at")
    minimum: Int = Field(default=5, ge=1, le=1_000_000, description="requests in 10 s before the ratio counts")
    base: Deadline = setting("1s", "the first time; it doubles with each further one")
    max: Deadline = setting("60s", "longest time")
    share: Percent = setting("50%", "of the endpoints that may be out at once; of several one always may, a single one only with 100%")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max < self.base:
            raise fault("`max` is shorter than `base`", "raise it", at=("max",))
        if self.ratio == 0:
            raise fault("a ratio of 0% would eject every endpoint", "leave it out, or write for example 50%", at=("ratio",))
        return self


class Adaptive(Model):
    """A limit of requests in flight that follows the latency (gradient): below `limits.requests`, which stays the upper bound."""

    lowest: Int = Field(default=10, ge=1, le=1_000_000, description="the limit never goes below it")
    update: Deadline = setting("100ms", "how often the limit is adapted")
    measure: Deadline = setting("30s", "how often the latency without load is measured anew, with few requests in flight")
    samples: Int = Field(default=50, ge=1, le=10_000, description="requests of such a measurement")
    buffer: Percent = setting("25%", "by how much latency may grow before that counts as queueing")


class UpstreamLimits(Model):
    """How much an upstream is given at once, over all workers of the machine; what is above waits in a queue, then gets 503."""

    requests: Int = Field(default=1024, ge=1, le=1_000_000, description="requests in flight")
    endpoint_requests: Int | None = Field(default=None, ge=1, le=1_000_000, description="requests in flight at each endpoint")
    connections: Int | None = Field(default=None, ge=1, le=1_000_000, description="open connections")
    pending: Int = Field(default=256, ge=0, le=100_000, description="requests that wait for a place; 503 at once above it")
    queue: Deadline = setting("1s", "longest time in the queue; 503 after it")
    adaptive: Adaptive | None = setting(None, "a limit that follows the latency; {} for its defaults")
