"""`/v1/mesh` of the admin's place: read the mesh's document, check another one, put it in force on all control planes.

Strategy: over a Unix socket only, by its owner or root, as the kernel says who is there (SO_PEERCRED); loopback asks nobody who he is, so over TCP
there is nothing here, not even to read. Writing says on which document it is based (If-Match), so that nobody undoes what he has not seen.
Who put what in force is a line of the log, and kept with the document.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pwd
import re
import socket
import struct
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gateway.config.mesh_load import mesh_findings
from gateway.errors import ConfigError
from gateway.mesh import documents
from gateway.mesh.store import StoreError

if TYPE_CHECKING:
    from gateway.mesh.control import ControlPlane

log = logging.getLogger("crossway.mesh")

PATH = "/v1/mesh"
NAME = "mesh.yaml"  # as messages call a document that has no number yet
MARK = re.compile(r'"?([0-9]{1,18})(?:-[0-9a-f]{12})?"?')
TCP = "the mesh's document is read and written over a Unix socket only: control.admin: unix:PATH"


def who_is(transport: Any) -> tuple[int, str] | None:
    """Return (uid, in words) of who is at the other end of a Unix socket; None for any other."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    with socket.socket(fileno=os.dup(sock.fileno())) as mine:
        pid, uid, _ = struct.unpack("3i", mine.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "?"
    return uid, f"{name} (uid {uid}, pid {pid})"


class Documents:
    """The answers of one control plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    async def answer(self, request: Request) -> Response:
        """GET or PUT."""
        who = request.scope["state"].get("who")
        if who is None:
            return _said({"error": TCP}, 403)
        if who[0] not in (0, os.geteuid()):
            return _said({"error": "only the control plane's own user and root may do this"}, 403)
        try:
            return await (self.show() if request.method == "GET" else self.put(request, who[1]))
        except StoreError as error:
            return _said({"error": str(error)}, 503)

    async def _present(self) -> tuple[int, str, bytes]:
        """Return (number, mark, text) of what counts now; number 0 is the file."""
        applied = await documents.newest(self.plane.store)
        if applied is not None and self.plane.own.control.source == "state":
            return applied.number, applied.mark, applied.content.encode()
        text = self.plane.own.source
        return 0, f"0-{hashlib.sha256(text).hexdigest()[:12]}", text

    async def show(self) -> Response:
        _, mark, text = await self._present()
        return Response(text, 200, {"etag": f'"{mark}"', "crossway-source": self.plane.own.control.source}, media_type="application/yaml")

    async def put(self, request: Request, who: str) -> Response:
        trial = "dry-run" in request.query_params
        plane = self.plane
        if plane.own.control.source != "state":
            return _said({"error": f"control.source of {plane.own.path} is file: change that file, or write `source: state` there"}, 409)
        present, mark, text = await self._present()
        headers = {"etag": f'"{mark}"'}
        wanted = request.headers.get("if-match")
        if wanted is None and not trial:
            return _said({"error": "If-Match is needed: the ETag of the document that this one is based on, or *"}, 428, headers)
        if wanted not in (None, "*"):
            match = MARK.fullmatch(wanted.strip())
            if match is None:
                return _said({"error": "If-Match is a number, as GET tells it in ETag, or *"}, 400)
            if int(match[1]) != present or ("-" in wanted and wanted.strip().strip('"') != mark):
                return _said({"error": f"the document is {mark} by now, not {wanted.strip()}: look at it, and base yours on it"}, 412, headers)
        try:
            content = await _body(request)
            fresh, notes = documents.read(content, plane.own, NAME)
        except ConfigError as error:
            return _said({"error": error.render(), "problems": [problem.as_dict() for problem in error.problems]}, 422)
        except ClientDisconnect:
            return _said({"error": "the document did not come"}, 408)
        notes += [problem.render() for problem in mesh_findings(fresh)]
        said: dict[str, Any] = {"version": present, "etag": mark, "changes": documents.changes(plane.mesh, fresh), "notes": notes, "changed": content != text}
        if trial or content == text:
            return _said(said, 200, headers)
        digest = hashlib.sha256(content).hexdigest()
        made = await documents.append(plane.store, content.decode("utf-8"), digest, who, present)
        if made is None:
            return _said({"error": f"another document came after {mark} meanwhile: look at it, and base yours on it"}, 412)
        log.info(
            "a document is applied to the mesh", extra={"version": made.number, "digest": digest, "by": who, "before": mark, "changes": said["changes"][:100]}
        )
        await plane.registry.touch()
        await plane.follow()
        return _said(said | {"version": made.number, "etag": made.mark, "digest": digest}, 200, {"etag": f'"{made.mark}"'})


async def _body(request: Request) -> bytes:
    """Return the text; its size was bounded by what stands before this."""
    return b"".join([part async for part in request.stream()])


def _said(said: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(said), status, headers, media_type="application/json")
