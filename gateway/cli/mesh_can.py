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
APP_PORT = "app-port"  # the label by which a sidecar says where its app listens


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "can", help="say whether a service may call another, by which rule, and why not",
        epilog="exit status: 0 allowed, 1 denied (or, with `default: audit`, recorded as to be denied), 2 the file or the question cannot be read",
    )  # fmt: skip
    parser.add_argument("caller", metavar="CALLER", help="the service that calls")
    parser.add_argument("service", metavar="SERVICE", help="the service or external host that is called, by its name in the file")
    parser.add_argument("method", metavar="METHOD", nargs="?", help="default: GET; not of a service that speaks tcp")
    parser.add_argument("path", metavar="PATH", nargs="?", help="default: /")
    add_file(parser)
    parser.add_argument("-H", "--header", metavar="'NAME: VALUE'", dest="headers", action="append", default=[], help="of the request; may be repeated")
    parser.add_argument("--claim", metavar="NAME=VALUE", dest="claims", action="append", default=[], help="of the end user; may be repeated")
    parser.add_argument("--port", type=int, help="on which the service's app listens; default: as its instances say, where they agree")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    def work() -> int:
        import asyncio
        from dataclasses import replace

        from gateway.cli.mesh_file import load_in_force
        from gateway.mesh.decide import decide

        mesh = load_in_force(parsed.config)
        for name, known in ((parsed.caller, [*mesh.services]), (parsed.service, [*mesh.services, *mesh.external])):
            if name not in known:
                raise ValueError(f"{name} is not a service of {parsed.config}: there are {', '.join(known)}")
        call = read_call(parsed, parsed.service in mesh.services and mesh.services[parsed.service].protocol == "tcp")
        revoked, policy, ports = asyncio.run(_known(mesh, parsed.service))
        if call.port is None and len(ports) == 1:
            call = replace(call, port=min(ports))
        decision = decide(mesh, call, revoked)
        answer = described(mesh, call, decision, policy)
        print(json.dumps(answer, indent=2) if parsed.output == "json" else text_of(answer))
        return ALLOWED if decision.allowed and not decision.audited else DENIED

    return guarded(work)


def read_call(parsed: argparse.Namespace, tcp: bool = False) -> Call:
    """Return the call that the command line asks about; `tcp`: a connection to a service that knows no requests. Raises ValueError."""
    from gateway._speedups.testing import normalise_path
    from gateway.mesh.decide import Call

    if tcp and (parsed.method is not None or parsed.headers or parsed.claims):
        raise ValueError(f"{parsed.service} speaks tcp: there are no methods, paths, headers or claims to ask about")
    if tcp:
        return Call(parsed.caller, parsed.service, "", "", port=parsed.port)
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
    asked = "/" if parsed.path is None else parsed.path
    if not asked.startswith("/"):
        raise ValueError(f"{asked!r} is no path: it begins with /")
    path = normalise_path(asked.partition("?")[0].encode()).decode()
    return Call(parsed.caller, parsed.service, parsed.method or "GET", path, headers, claims or None, parsed.port)


def _value(text: str) -> str | int:
    return int(text) if text.isascii() and text.removeprefix("-").isdecimal() else text


async def _known(mesh: MeshFile, service: str) -> tuple[frozenset[str], int | None, set[int]]:
    """Return who is revoked, the version of the policy, and the ports of a service's apps, as the state has them.

    Of a state that is not there, what the file says.
    """
    from pathlib import Path

    from gateway.mesh import revocation
    from gateway.mesh.store import is_postgres, open_store

    if not is_postgres(mesh.control.state) and not Path(mesh.control.state).exists():
        return frozenset(mesh.revoked.services), None, set()
    store = await open_store(mesh.control.state)
    try:
        deny = await revocation.load(store, mesh)
        policy = int((await store.rows("SELECT value FROM counters WHERE name = 'policy'"))[0]["value"])
        said = [json.loads(row["labels"]).get(APP_PORT, "") for row in await store.rows("SELECT labels FROM instances WHERE service = ?", service)]
        return deny.services, policy, {int(port) for port in said if port.isdecimal()}
    finally:
        await store.close()


def described(mesh: MeshFile, call: Call, decision: Decision, policy: int | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "allowed": decision.allowed, "audited": decision.audited, "caller": call.caller, "service": call.to, "method": call.method or None,
        "path": call.path or None, "port": call.port, "reason": decision.reason, "rule": decision.rule, "policy": policy or None,
    }  # fmt: skip
    if decision.number is not None:
        answer["place"] = f"{mesh.name}:{mesh.line(decision.number)}"
    answer["considered"] = [{"rule": name, "unmet": why} for name, why in decision.considered]
    return answer


def text_of(answer: dict[str, Any]) -> str:
    """Return the answer for a person."""
    word = "AUDIT: allowed, and recorded as to be denied" if answer["audited"] else "ALLOWED" if answer["allowed"] else "DENIED"
    policy = f", policy {answer['policy']}" if answer["policy"] else ""
    if answer["method"] is not None:
        asked = f"{answer['method']} {answer['path']}"
    else:
        asked = "(tcp)" if answer["port"] is None else f"(tcp, port {answer['port']})"
    lines = [f"{word}: {answer['caller']} -> {answer['service']} {asked}", f"  {answer['reason']}{policy}"]
    if "place" in answer:
        lines.append(f"  at {answer['place']}")
    lines += [f"  rule {each['rule']}: {each['unmet']}" for each in answer["considered"]]
    return "\n".join(lines)
