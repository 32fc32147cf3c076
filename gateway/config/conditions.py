"""Conditions on a request's headers, query parameters and cookies, and percentages: what routes, canaries and faults share.

Strategy: a condition is a value, {present: ...} or {prefix: ...}, written the same wherever it stands; `triples` gives it to the
native modules as plain (name, op, value).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import PlainValidator, model_validator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, Shorthand, setting
from gateway.config.values import Flag, described, fault, text_of
from gateway.config.web import TOKEN, FieldName, MatchValue

Op = Literal["exact", "prefix", "present", "absent"]
Triple = tuple[str, Op, str]


def _widen_value(raw: Any) -> Any:
    return raw if isinstance(raw, dict) else {"value": raw}


class ValueMatch(Model):
    """What a header, cookie or query parameter must be: exactly one of the three."""

    value: MatchValue | None = setting(None, "equal to this")
    present: Flag | None = setting(None, "there (true) or absent (false)")
    prefix: MatchValue | None = setting(None, "beginning with this")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(each is not None for each in (self.value, self.present, self.prefix)) != 1:
            raise fault("expected a value, {present: true} or {prefix: text}", "write exactly one of them")
        return self

    def triple(self, name: str) -> Triple:
        """Return the condition on `name` as (name, op, value); no value for "present" and "absent"."""
        if self.value is not None:
            return name, "exact", self.value
        if self.prefix is not None:
            return name, "prefix", self.prefix
        return name, "present" if self.present else "absent", ""

    def implies(self, other: ValueMatch) -> bool:
        """Tell whether whatever meets this condition meets the other as well."""
        if other.present is not None:
            return (self.present is not False) is other.present
        if self.value is not None:
            return self.value == other.value or (other.prefix is not None and self.value.startswith(other.prefix))
        return self.prefix is not None and other.prefix is not None and self.prefix.startswith(other.prefix)


Condition = Annotated[ValueMatch, Shorthand(_widen_value, {"type": ["string", "number"], "x-is": "text"})]


def triples(wanted: Mapping[str, ValueMatch]) -> tuple[Triple, ...]:
    """Return each condition as (name, op, value)."""
    return tuple(each.triple(name) for name, each in wanted.items())


def parse_cookie_name(raw: Any) -> str:
    """Return a cookie's name (RFC 6265 4.1.1: a token; case matters)."""
    text = text_of(raw, "expected the name of a cookie", "such as session")
    if not TOKEN.fullmatch(text) or len(text) > 256:
        raise fault("not the name of a cookie", "letters, digits and - as in beta-tester")
    return text


def parse_share(raw: Any) -> float:
    """Return the percentage of `10`, `0.5` or `10%`: above 0, at most 100."""
    hint = "a number above 0 and at most 100, such as 10 or 0.5"
    text = raw.removesuffix("%") if isinstance(raw, str) else raw
    try:
        value = float(text) if not isinstance(text, bool) else -1.0
    except (TypeError, ValueError):
        raise fault("expected a percentage", hint) from None
    if not 0 < value <= 100:
        raise fault("expected a percentage", hint)
    return value


CookieName = Annotated[str, PlainValidator(parse_cookie_name), described("cookie name")]
Share = Annotated[
    float,
    PlainValidator(parse_share),
    WithJsonSchema({"type": ["number", "string"], "x-is": "percentage, with or without %", "examples": [10]}),
]


class When(Model):
    """Which requests: all of these conditions hold."""

    headers: dict[FieldName, Condition] = setting({}, "headers: a value, {present: true} or {prefix: text}")
    cookies: dict[CookieName, Condition] = setting({}, "cookies, likewise")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.headers and not self.cookies:
            raise fault("neither `headers` nor `cookies`", "add a condition, such as `headers: {x-canary: always}`")
        if "host" in self.headers:
            raise fault("the header host is matched by a route's `host`", "write a route of its own", at=("headers", "host"))
        return self

    def implies(self, other: When) -> bool:
        """Tell whether every request that these conditions take is taken by the others, too."""
        return all(
            name in ours and ours[name].implies(wanted)
            for ours, theirs in ((self.headers, other.headers), (self.cookies, other.cookies))
            for name, wanted in theirs.items()
        )
