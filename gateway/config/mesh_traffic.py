"""Splits and canaries of a mesh's service: as those of a route, by labels of instances instead of upstreams.

Strategy: as in `shaping`, whose words and conditions these are. Labels are said by sidecars when they join, so which of them exist is
not known here; what can be wrong in the file itself is.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from gateway.config.base import Model, needed
from gateway.config.conditions import When, triples
from gateway.config.source import Document
from gateway.config.values import Int, described, fault, text_of

MOST = 64  # splits, and canaries, of a service
_KEY = re.compile(r"[A-Za-z0-9._/-]{1,63}")
_VALUE = re.compile(r"[A-Za-z0-9._-]{0,63}")


def _key(raw: Any) -> str:
    hint = "letters, digits, . _ / and -, at most 63, as in `--label version=v2`"
    if not _KEY.fullmatch(text := text_of(raw, "expected the key of a label", hint)):
        raise fault("not the key of a label", hint)
    if text == "app-port":
        raise fault("this label is the mesh's own", "choose by a label that a sidecar was given with --label")
    return text


def _value(raw: Any) -> str:
    hint = 'letters, digits, . _ and -, at most 63; quote what looks like a number: "2"'
    if not isinstance(raw, str):
        raise fault("expected the value of a label", hint)
    if not _VALUE.fullmatch(raw):
        raise fault("not the value of a label", hint)
    return raw


LabelKey = Annotated[str, PlainValidator(_key), described("label")]
LabelValue = Annotated[str, PlainValidator(_value), described("text")]
Labels = Annotated[dict[LabelKey, LabelValue], Field(min_length=1)]


class ServiceSplit(Model):
    """Instances with these labels, and their share of a service's requests."""

    labels: Labels = needed("what its instances carry, as `--label` of their sidecars said; an instance may carry more")
    weight: Int = Field(default=1, ge=0, le=1_000_000, description="share of the requests, relative to the others; 0: none")


class ServiceCanary(Model):
    """Requests that go to instances of their own, whatever the split says."""

    when: When = needed("which requests")
    labels: Labels = needed("what those instances carry")


def check_traffic(service: Any) -> None:
    """Raise the fault of a service whose splits and canaries contradict each other. `service` is a mesh_file.Service."""
    if service.protocol == "tcp":
        key = next((key for key in ("split", "canary", "sticky") if getattr(service, key)), None)
        if key:
            raise fault(f"`{key}` for a service that speaks tcp", "requests are dealt out, and tcp has none: remove it", at=(key,))
    if service.sticky is not None and service.split is None:
        raise fault("`sticky` without a `split`", "remove it, or write a split", at=("sticky",))
    if service.split is None:
        return
    if not any(each.weight for each in service.split):
        raise fault("the weights add up to 0: no request could be sent anywhere", "give one a weight", at=("split",))
    seen: list[dict[str, str]] = []
    for number, each in enumerate(service.split):
        if each.labels in seen:
            raise fault("the same labels twice", "give them the sum of the weights", at=("split", number, "labels"))
        seen.append(each.labels)


def warn_traffic(document: Document, name: str, service: Any) -> None:
    """Note what is legal and hardly meant."""
    at = ("services", name)
    for index, canary in enumerate(service.canary):
        for earlier, other in enumerate(service.canary[:index]):
            if canary.when.implies(other.when):
                line = document.spot((*at, "canary", earlier)).line
                document.warn(
                    (*at, "canary", index), f"no request gets here: the canary at line {line} takes them all before",
                    "put the one with more conditions first",
                )  # fmt: skip
                break
    splits = service.split or ()
    for index, each in enumerate(splits):
        for other in splits:
            if each is not other and other.labels.items() < each.labels.items():
                document.warn(
                    (*at, "split", index, "labels"), "instances with these labels belong to another split as well, and get shares of both",
                    "tell them apart by one label",
                )  # fmt: skip
                break


def traffic_said(service: Any) -> dict[str, Any]:
    """Return a service's splits and canaries as members are told: plain data, conditions as (name, op, value)."""
    said: dict[str, Any] = {}
    if service.split is not None:
        said["split"] = [{"labels": dict(each.labels), "weight": each.weight} for each in service.split]
    if service.sticky is not None:
        said["sticky"] = service.sticky
    if service.canary:
        said["canary"] = [
            {
                "labels": dict(each.labels),
                "when": {"headers": [list(one) for one in triples(each.when.headers)], "cookies": [list(one) for one in triples(each.when.cookies)]},
            }
            for each in service.canary
        ]  # fmt: skip
    return said
