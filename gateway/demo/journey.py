"""One payment followed through every hop, by what each of them recorded of it.

Strategy: nothing else is going on, so what a sidecar has counted more afterwards than before is this one request: how long it took there, and
between which proven identities. The edge tells its part in its audit record, the services in their own logs. That all of it is
one payment is shown by the trace id, which the edge, payments and the ledger must have recorded alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway.demo.caller import Call
from gateway.demo.member import Hop, Member
from gateway.demo.processes import StageError
from gateway.demo.stage import Stage

PATIENCE = 30.0  # seconds for the last record to be written
MEMBER = "spiffe://bank.test/service/"


@dataclass(frozen=True, slots=True)
class Span:
    """What one place recorded: how deep it is in the call, what it knew of the other side, and how long it took, in milliseconds."""

    depth: int
    place: str
    knew: str
    status: str
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Journey:
    """A payment's way; `problem` is empty when every hop recorded it, under one trace."""

    payment: str
    trace: str
    spans: tuple[Span, ...]
    seconds: float
    problem: str


def follow(stage: Stage) -> Journey:
    """Make one payment and return its way."""
    order = {"creditor": "DE02500105170137075030", "amount": "250", "currency": "EUR"}
    call = Call("POST", "/v1/payments", stage.token("clerk", ["payments:write"]), body=json.dumps(order).encode())
    counted = {name: member.hops() for name, member in stage.members.items()}
    caller = stage.caller()
    answer = caller.call(call)
    caller.close()
    if answer.status != 201:
        return Journey("", "", (), answer.seconds, f"the payment was answered {answer.status} {answer.reason()}")
    payment = answer.json()
    payments, ledger = stage.members["payments"], stage.members[payment["ledger"]]
    found: dict[Any, Any] = {}

    def recorded() -> bool:
        found["edge"] = _audited(stage, answer.headers.get("x-request-id", ""))
        trace = found["edge"].get("trace", "?")
        for member in (payments, ledger):
            found[member.name] = next((line for line in stage.lines(member.name) if trace in line.get("traceparent", "")), None)
            found[member.name, "destination"] = _one_more(member, counted[member.name], "destination")
        found["out"] = _one_more(payments, counted["payments"], "source")
        return all(found.values())

    try:
        stage.until(recorded, "every hop's record of the payment", PATIENCE)
    except StageError as error:
        missing = ", ".join(str(name) for name, value in found.items() if not value)
        return Journey(payment["id"], found["edge"].get("trace", ""), (), answer.seconds, f"not recorded by {missing or error}")
    return Journey(payment["id"], found["edge"]["trace"], tuple(_spans(found, payments, ledger)), answer.seconds, "")


def _spans(found: dict[Any, Any], payments: Member, ledger: Member) -> Iterable[Span]:
    edge = found["edge"]
    yield Span(0, "edge", f"client {edge['client']}, by token", str(edge["status"]), edge["duration_us"] / 1000)
    into, out, there = found["payments", "destination"], found["out"], found[ledger.name, "destination"]
    yield Span(1, "payments' sidecar, in", f"caller {into.source}", into.status, into.milliseconds)
    yield _service(2, payments, found["payments"])
    yield Span(3, "payments' sidecar, out", f"callee {out.destination}", out.status, out.milliseconds)
    yield Span(4, f"{ledger.name}'s sidecar, in", f"caller {there.source}", there.status, there.milliseconds)
    yield _service(5, ledger, found[ledger.name])


def _service(depth: int, member: Member, line: dict[str, Any]) -> Span:
    _, _, span, _ = line["traceparent"].split("-")
    return Span(depth, member.name, f"span {span}", str(line["status"]), line["ms"])


def _audited(stage: Stage, request: str) -> dict[str, Any]:
    """The edge's audit record of a request; empty while there is none."""
    path = stage.folder / "audit.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((json.loads(line) for line in lines if request in line and line.endswith("}")), {})


def _one_more(member: Member, before: dict[str, Hop], reporter: str) -> Hop | None:
    """The one request that a sidecar has counted since; None unless there is exactly one."""
    more = []
    for key, hop in member.hops().items():
        was = before.get(key)
        hop.count -= was.count if was else 0
        hop.milliseconds -= was.milliseconds if was else 0.0
        if hop.reporter == reporter and hop.count:
            more.append(hop)
    return more[0] if len(more) == 1 and more[0].count == 1 else None
