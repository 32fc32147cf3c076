"""`crossway mesh apply`: put a mesh's document in force on all control planes, by the Unix socket of one of them.

Strategy: the control plane checks the document and has the last word; its findings are shown as `crossway check` shows them. What was seen before
is said along (If-Match), so that a document that somebody else applied meanwhile is not overwritten unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import sys
from pathlib import Path
from typing import Any

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, guarded

PLACE = "/v1/mesh"
TIME = 30.0  # seconds


class Unanswered(Exception):
    """The control plane did not do it; the text says why."""


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "apply", help="put a mesh's document in force on all control planes (control.source: state)",
        epilog="exit status: 0, 1 when the control plane does not take it, 2 for mistakes in the document",
    )  # fmt: skip
    add_file(parser)
    parser.add_argument("--admin", metavar="unix:PATH", help="the admin's socket of a control plane; default: control.admin of FILE")
    parser.add_argument("--dry-run", action="store_true", help="check it and tell what would change")
    parser.add_argument("--if-match", metavar="VERSION", help="only when this one is in force, as --show and status tell it; default: the one of now")
    parser.add_argument("--show", action="store_true", help="print the document that is in force instead, and its version on standard error")
    parser.add_argument("--json", action="store_true", help="the control plane's answer as it is")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    def work() -> int:
        try:
            return _show(parsed) if parsed.show else _apply(parsed)
        except Unanswered as error:
            print(f"crossway: {error}", file=sys.stderr)
            return 1

    return guarded(work)


def _show(parsed: argparse.Namespace) -> int:
    status, mark, content = ask(_admin(parsed), "GET")
    if status != 200:
        raise Unanswered(_reason(content))
    sys.stdout.write(content.decode())
    print(f"version {mark}", file=sys.stderr)
    return 0


def _apply(parsed: argparse.Namespace) -> int:
    admin, content = _admin(parsed), Path(parsed.config).read_bytes()
    seen = parsed.if_match
    if seen is None:
        status, seen, said = ask(admin, "GET")
        if status != 200:
            raise Unanswered(_reason(said))
    status, _, body = ask(admin, "PUT", content, seen, PLACE + ("?dry-run" if parsed.dry_run else ""))
    if parsed.json:
        print(body.decode())
    if status == 422:
        if not parsed.json:
            print(_problems(body, parsed.config), file=sys.stderr)
        return 2
    if status != 200:
        raise Unanswered(_reason(body))
    if not parsed.json:
        said = json.loads(body)
        for note in said["notes"]:
            print(note.replace("mesh.yaml:", f"{parsed.config}:", 1), file=sys.stderr)
        print(_told(said, parsed.dry_run))
    return 0


def _told(said: dict[str, Any], trial: bool) -> str:
    if not said["changed"]:
        return f"nothing to do: this is version {said['etag']}"
    head = f"it would follow version {said['etag']}" if trial else f"version {said['etag']} is in force"
    return "\n".join([head, *(f"  {line}" for line in said["changes"] or ["nothing that matters"])])


def _admin(parsed: argparse.Namespace) -> str:
    """Return the path of the socket. Raises ConfigError, ValueError or Unanswered."""
    place = parsed.admin
    if place is None:
        from gateway.config.mesh_load import load_mesh

        bind = load_mesh(parsed.config).control.admin
        place = str(bind) if bind is not None else ""
    if not place.startswith("unix:"):
        raise ValueError(f"{place or 'no admin'}: a document is applied over a Unix socket, which its owner alone can use: --admin unix:PATH")
    return str(place.removeprefix("unix:"))


def ask(path: str, method: str, content: bytes | None = None, seen: str | None = None, target: str = PLACE) -> tuple[int, str, bytes]:
    """Return (status, version, body) of an answer. Raises Unanswered."""
    connection = http.client.HTTPConnection("localhost", timeout=TIME)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(TIME)
        connection.sock.connect(path)
        headers = {"content-type": "application/yaml"} | ({} if seen is None else {"if-match": seen if seen == "*" else f'"{seen.strip(chr(34))}"'})
        with contextlib.suppress(BrokenPipeError):  # it was answered before all was said
            connection.request(method, target, content, headers)
        answer = connection.getresponse()
        return answer.status, (answer.getheader("etag") or "").strip('"'), answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(f"unix:{path}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from None
    finally:
        connection.close()


def _problems(body: bytes, name: str) -> str:
    from gateway.errors import Problem

    said = json.loads(body)
    found = [Problem(**each) for each in said["problems"]]
    count = f"{len(found)} error{'s' if len(found) != 1 else ''}"
    return "\n\n".join([*(each.render().replace(each.file, name, 1) for each in found), f"{name}: {count}, nothing has changed"])


def _reason(body: bytes) -> str:
    try:
        said = json.loads(body)
        return str(said.get("error") or said.get("detail"))
    except (ValueError, AttributeError):
        return body.decode("utf-8", "replace")[:300]
