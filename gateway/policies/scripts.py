"""The scripts that Redis runs, from the .lua files beside this module.

Strategy: each works on one key, so it runs in a cluster as it is; the server's clock is the only one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text and the name under which a server that has seen it runs it."""

    text: str
    sha: str


def _load(name: str) -> Script:
    text = (files("gateway.policies") / f"{name}.lua").read_text("utf-8")
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


RATE, QUOTA, NODES = (_load(name) for name in ("rate", "quota", "nodes"))
SCRIPTS = (RATE, QUOTA, NODES)
