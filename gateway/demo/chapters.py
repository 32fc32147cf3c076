"""What the demo shows of the mesh: a denied call, a ledger that dies, a canary, certificates that are renewed, and the books at the end.

Strategy: each chapter does something to the running mesh and yields findings as they come, each from what the mesh itself says: answers, logs,
`crossway mesh status`. A finding with a problem is one that did not do what it should; nothing is assumed to have worked.
"""

from __future__ import annotations

import contextlib
import http.client
import sqlite3
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.demo.caller import Answer, Call, Caller
from gateway.demo.load import Load
from gateway.demo.processes import StageError
from gateway.demo.stage import SHORT, USUAL, Stage

IBAN = "DE02120300000000202051"
WARM = 20  # payments that the load has made before anything happens to it
AGAIN = 3  # payments that the one that came back has entered
UNSPLIT = "  ledger:\n"
SPLIT = """\
  ledger:
    split:
      - {labels: {version: v1}, weight: 90}
      - {labels: {version: v2}, weight: 10}
"""
SAMPLE = 250  # payments by which the canary's share is judged; it is drawn for each, so that
LEAST, MOST = 0.02, 0.20  # a share outside of this comes by chance once in 30,000 times


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was seen. `problem` is empty when it is as it should be."""

    title: str
    evidence: str
    problem: str = ""


def denied(stage: Stage) -> Iterator[Finding]:
    """accounts may read the balance of the ledger, and nothing else of it."""
    token = stage.token("auditor", [])
    allowed = _call(stage, Call("GET", "/v1/accounts", token))
    yield _expect("accounts reads the balance", allowed, 200, f"GET /balance of the ledger, {allowed.json().get('accounts', [{}])[0].get('balance')} EUR")
    answer = _call(stage, Call("GET", f"/v1/accounts/{IBAN}/entries", token))
    yield _expect("accounts asks for the entries", answer, 403, f"the answer, passed on by accounts: {answer.reason()}")
    caller = Caller(stage.members["accounts"].outbound, "ledger")  # as accounts itself calls, so that the answer's head is seen
    why = caller.call(Call("GET", "/entries")).headers.get("crossway-denied", "")
    caller.close()
    yield Finding("the ledger's sidecar says why", f"crossway-denied: {why}", "" if why else "the answer has no crossway-denied")
    ledgers = [member for member in stage.members.values() if member.service == "ledger"]
    told = [line for each in ledgers for line in stage.lines(f"{each.name}'s sidecar") if line.get("event") == "a call was denied"]
    line = told[-1] if told else {}
    yield Finding(
        "and has it in its log",
        f"\"{line.get('event')}\": {line.get('method')} {line.get('path')}, policy {line.get('policy')}, request {line.get('request_id')}",
        "" if len(told) == 2 and why.startswith(f'caller="{line["caller"]}"') else f"{len(told)} lines in the log for 2 calls",
    )
    seen = [each for member in ledgers for each in stage.lines(member.name) if each.get("path") == "/entries" and each.get("method") == "GET"]
    yield Finding("the ledger itself", "has no such request in its log", f"it was reached {len(seen)} times" if seen else "")
    status, said = stage.registry.command("can", "accounts", "ledger", "GET", "/entries")
    agrees = status == 1 and all(name in said for name in line.get("considered", ["?"]))
    yield Finding("$ crossway mesh can accounts ledger GET /entries", said, "" if agrees else f"it ended with {status}")


def killed(stage: Stage, load: Load) -> Iterator[Finding]:
    """An instance of the ledger dies at once, app and sidecar, and is started again."""
    victim = stage.members["ledger-1"]
    stage.until(lambda: load.since().booked >= WARM and load.since().ledgers["ledger-1"] > 0, "payments by ledger-1")
    began = time.monotonic()
    for child in victim.children:
        child.kill()
    address = f"127.0.0.1:{victim.inbound}"
    yield Finding("SIGKILL to ledger-1", "its app and its sidecar at once, as if the machine had lost its power")

    def state() -> str:
        return str(stage.registry.instances().get(address, {}).get("state"))

    stage.until(lambda: state() == "gone", "the control plane misses ledger-1")
    other = sum(row["state"] == "healthy" for row in stage.registry.report()["instances"] if row["service"] == "ledger")
    took = time.monotonic() - began
    yield Finding("crossway mesh status", f"ledger-1 gone after {took:.1f} s (heartbeat: 8s); {other} ledger healthy", "" if other else "no ledger is left")
    again = time.monotonic()
    for child in victim.children:
        child.start()
    stage.until(lambda: state() == "healthy", "ledger-1 is healthy again")
    healthy = time.monotonic() - again
    stage.until(lambda: load.since(again).ledgers["ledger-1"] >= AGAIN, "ledger-1 takes payments again")
    yield Finding(
        "started again",
        f"healthy after {healthy:.1f} s, with the certificate that it had; takes payments after {time.monotonic() - again:.1f} s",
    )
    tally = load.since(began)
    yield Finding("payments meanwhile", f"{tally}; by ledger-1 {tally.ledgers['ledger-1']}, by ledger-2 {tally.ledgers['ledger-2']}", tally.problem)


def canary(stage: Stage, load: Load) -> Iterator[Finding]:
    """A new version of the ledger gets a share of the payments, by one change of the mesh's file."""
    stage.registry.edit(UNSPLIT, SPLIT)
    yield Finding("in mesh.yaml", textwrap.dedent(SPLIT).rstrip())
    stage.add("ledger-3", "ledger", "v2")
    stage.until(lambda: load.since().versions["v2"] > 0, "a payment by v2")
    began = time.monotonic()
    yield Finding("ledger-3 joins", "by a token, with --label version=v2; it takes payments")
    stage.until(lambda: load.since(began).booked >= SAMPLE, f"{SAMPLE} payments")
    tally = load.since(began)
    share = tally.versions["v2"] / tally.booked
    yield Finding(
        "a tenth of the payments",
        f"{tally.versions['v2']} of {tally.booked} by v2, {share:.0%}; v1 as before: ledger-1 {tally.ledgers['ledger-1']}, ledger-2 {tally.ledgers['ledger-2']}",
        "" if LEAST < share < MOST else f"{share:.1%} is no tenth",
    )
    yield Finding("payments meanwhile", str(tally), tally.problem)


def serials(stage: Stage) -> dict[str, str]:
    """The serial of the certificate that each member holds, by its name."""
    rows = stage.registry.instances()
    found = {name: rows.get(f"127.0.0.1:{member.inbound}") for name, member in stage.members.items()}
    return {name: str(row["serial"]) for name, row in {"edge": rows.get("edge"), **found}.items() if row and row["serial"]}


def renewed(stage: Stage, load: Load, before: dict[str, str]) -> Iterator[Finding]:
    """Every member has another key and certificate than when the load began."""
    now: dict[str, str] = {}

    def all_renewed() -> bool:
        now.update(serials(stage))
        return all(now.get(name) not in (None, serial) for name, serial in before.items())

    stage.until(all_renewed, "a new certificate of every member")
    changes = ", ".join(f"{name} {serial[:6]}→{now[name][:6]}" for name, serial in before.items())
    yield Finding("a new key for each member", f"they live {SHORT} here, and are renewed at half of it; serials: {changes}")
    mark = time.monotonic()
    stage.until(lambda: load.since(mark).booked >= WARM, "payments by the new certificates")
    tally = load.since()
    yield Finding("payments meanwhile", f"{tally}, in {time.monotonic() - load.began:.0f} s", tally.problem)
    stage.registry.edit(f"lifetime: {SHORT}", f"lifetime: {USUAL}")


def books(stage: Stage, load: Load) -> Iterator[Finding]:
    """What was said to be booked is in the book, once, and nothing else is."""
    with contextlib.closing(sqlite3.connect(f"file:{stage.folder / 'book.db'}?mode=ro", uri=True)) as book:
        entries = [row[0] for row in book.execute("SELECT key FROM entries")]
    answered = sum(line.get("status") == 201 for line in stage.lines("payments"))
    lost = load.payments() - set(entries)
    problem = f"{len(lost)} payments are not in the book" if lost else ""
    if not problem and len(entries) != answered:
        problem = f"{len(entries)} entries for {answered} payments"
    yield Finding("the ledger's book", f"{answered} payments booked since the start, {len(entries)} entries: none lost, none twice", problem)


def guarded(chapter: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a chapter; what keeps it from going on becomes its last."""
    try:
        yield from chapter
    except (StageError, OSError, http.client.HTTPException, ValueError, KeyError) as error:
        yield Finding("it could not go on", "", str(error) or type(error).__name__)


def _call(stage: Stage, call: Call) -> Answer:
    caller = stage.caller()
    try:
        return caller.call(call)
    finally:
        caller.close()


def _expect(title: str, answer: Answer, status: int, evidence: str) -> Finding:
    if answer.status == status:
        return Finding(title, f"{status}: {evidence}")
    return Finding(title, "", f"expected {status}, not {answer.status} {answer.reason()}")
