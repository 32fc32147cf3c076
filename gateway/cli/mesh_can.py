"""`crossway mesh can CALLER SERVICE METHOD PATH`: whether a call is allowed, by which rule, and if not, what did not hold."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, guarded

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.decide import Call, Decision

ALLOWED, DENIED = 0, 1


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "can", help="say whether a service may call another, by which rule, and why not",
        epilog="exit status: 0 allowed, 1 denied (or, with `default: audit`, recorded as to be denied), 2 the file or the question cannot be read",
    )  # fmt: skip
    parser.add_argument("caller", metavar="CALLER", help="the service that calls")
    parser.add_argument("service", metavar="SERVICE", help="the service that is called")
    parser.add_argument("method", metavar="METHOD", nargs="?", default="GET", help="default: GET")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/", help="default: /")
    add_file(parser)
    parser.add_argument("-H", "--header", metavar="'NAME: VALUE'", dest="headers", action="append", default=[], help="of the request; may be repeated")
    parser.add_argument("--claim", metavar="NAME=VALUE", dest="claims", action="append", default=[], help="of the end user; may be repeated")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    def work() -> int:
        import asyncio

        from gateway.config.mesh_load import load_mesh
        from gateway.mesh.decide import decide

        mesh = load_mesh(parsed.config)
        for name in (parsed.caller, parsed.service):
            if name not in mesh.services:
                raise ValueError(f"{name} is not a service of {parsed.config}: there are {', '.join(mesh.services)}")
        call = read_call(parsed)
        revoked, policy = asyncio.run(_known(mesh))
        decision = decide(mesh, call, revoked)
        answer = described(mesh, call, decision, policy)
        print(json.dumps(answer, indent=2) if parsed.output == "json" else text_of(answer))
        return ALLOWED if decision.allowed and not decision.audited else DENIED

    return guarded(work)


def read_call(parsed: argparse.Namespace) -> Call:
    """Return the call that the command line asks about. Raises ValueError."""
    from gateway._speedups.testing import normalise_path
    from gateway.mesh.decide import Call

    headers: dict[str, list[str]] = {}
    for text in parsed.headers:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise ValueError(f"{text!r} is no header: write -H 'name: value'")
        headers.setdefault(name.strip().lower(), []).append(value.strip())
    claims: dict[str, Any] = {}
    for text in parsed.claims:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{text!r} is no claim: write --claim name=value")
        claims.setdefault(name, []).append(_value(value))
    if not parsed.path.startswith("/"):
        raise ValueError(f"{parsed.path!r} is no path: it begins with /")
    path = normalise_path(parsed.path.partition("?")[0].encode()).decode()
    return Call(parsed.caller, parsed.service, parsed.method, path, headers, claims or None)


def _value(text: str) -> str | int:
    return int(text) if text.isascii() and text.removeprefix("-").isdecimal() else text


async def _known(mesh: MeshFile) -> tuple[frozenset[str], int | None]:
    """Return who is revoked, and the version of the policy, as the state has them; of a state that is not there, what the file says."""
    from pathlib import Path

    from gateway.mesh import revocation
    from gateway.mesh.store import is_postgres, open_store

    if not is_postgres(mesh.control.state) and not Path(mesh.control.state).exists():
        return frozenset(mesh.revoked.services), None
    store = await open_store(mesh.control.state)
    try:
        deny = await revocation.load(store, mesh)
        return deny.services, int((await store.rows("SELECT value FROM counters WHERE name = 'policy'"))[0]["value"])
    finally:
        await store.close()


def described(mesh: MeshFile, call: Call, decision: Decision, policy: int | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "allowed": decision.allowed, "audited": decision.audited, "caller": call.caller, "service": call.to, "method": call.method,
        "path": call.path, "reason": decision.reason, "rule": decision.rule, "policy": policy or None,
    }  # fmt: skip
    if decision.number is not None:
        answer["place"] = f"{mesh.path}:{mesh.line(decision.number)}"
    answer["considered"] = [{"rule": name, "unmet": why} for name, why in decision.considered]
    return answer


def text_of(answer: dict[str, Any]) -> str:
    """Return the answer for a person."""
    word = "AUDIT: allowed, and recorded as to be denied" if answer["audited"] else "ALLOWED" if answer["allowed"] else "DENIED"
    policy = f", policy {answer['policy']}" if answer["policy"] else ""
    lines = [f"{word}: {answer['caller']} -> {answer['service']} {answer['method']} {answer['path']}", f"  {answer['reason']}{policy}"]
    if "place" in answer:
        lines.append(f"  at {answer['place']}")
    lines += [f"  rule {each['rule']}: {each['unmet']}" for each in answer["considered"]]
    return "\n".join(lines)
