"""What the app may be asked on an orchestrator's behalf: the names, paths and headers of its probes.

Strategy: one judgement for whoever writes a probe down (inject) and whoever asks it (the sidecar), so that nothing is put into a manifest that the
sidecar in it would refuse.
"""

from __future__ import annotations

import re

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,126}[a-z0-9])?")
PATH = re.compile(r"/[\x21-\x7e]*")
SERVICE = re.compile(r"[\x21-\x7e]{0,255}")  # of a gRPC health check; empty: the whole server
HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OURS = ("connection", "content-length", "transfer-encoding", "x-crossway-caller", "crossway-user")


def good_header(name: str, value: str) -> bool:
    """Whether a probe may carry a header."""
    return HEADER.fullmatch(name) is not None and value.isprintable() and value.isascii() and name.lower() not in OURS
