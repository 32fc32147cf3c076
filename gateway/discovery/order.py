"""Of more endpoints than are used, which: the same ones in every process, and after every answer.

Strategy: those whose hash with this machine's name is least; others on other machines. Without the configuration's schema, which a
sidecar does not hold in memory.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from typing import TypeVar

MOST = 256  # endpoints of an upstream, as gateway.config.discovery has it
Item = TypeVar("Item")
_HERE = socket.gethostname().encode("utf-8", "replace")[:64]


def chosen(items: Sequence[Item], most: int = MOST) -> tuple[Item, ...]:
    """Return `items`, or `most` of them, in an order that depends on their values only."""
    distinct = {repr(item).encode(): item for item in items}
    keys = sorted(distinct)
    if len(keys) > most:
        keys = sorted(sorted(keys, key=lambda key: hashlib.blake2b(key, key=_HERE, digest_size=8).digest())[:most])
    return tuple(distinct[key] for key in keys)
