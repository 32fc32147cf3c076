"""Which of the two kinds of file one is: a gateway's, or a mesh's.

Strategy: by the keys of the top level, of which the two have none in common but `version`; the majority decides, so that one key that is missing or in the wrong
file does not make a gateway's of a mesh's. Who is given the other kind says that, instead of everything that is not in it.
"""

from __future__ import annotations

from typing import Any

from gateway.config.source import Document
from gateway.errors import ConfigError

MESH = ("trust_domain", "control", "services", "authorization", "external", "certificates", "revoked", "networks")
GATEWAY = ("listeners", "upstreams", "routes", "policies", "mesh", "admin", "workers", "drain", "log", "redis", "zone")
RUN = {"gateway": "`crossway run -c {0}` starts it, `crossway check {0}` checks it", "mesh": "`crossway mesh control -c {0}` starts it, `crossway check {0}` checks it"}


def kind_of(data: Any) -> str | None:
    """Return `gateway` or `mesh`; None when the keys do not say."""
    if not isinstance(data, dict):
        return None
    mesh, gateway = len(data.keys() & set(MESH)), len(data.keys() & set(GATEWAY))
    return None if mesh == gateway else "mesh" if mesh > gateway else "gateway"


def refuse_other(document: Document, wanted: str) -> None:
    """Raise ConfigError for a file that is plainly of the other kind."""
    kind = kind_of(document.data)
    if kind in (None, wanted):
        return
    first = next(key for key in (MESH if kind == "mesh" else GATEWAY) if key in document.data)
    document.report((first,), f"this is a {kind}'s file (`{first}`), and a {wanted}'s is wanted", RUN[str(kind)].format(document.name), key=True)
    raise ConfigError(document.problems)
