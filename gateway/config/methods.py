"""Methods that nobody sends: a slip of the finger in a list of methods refuses every request, and nothing else says why.

Strategy: any token may be a method (RFC 9110 9.1), so an unknown one is well; one that is nearly a usual one is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from gateway.config.source import Document, Path_

USUAL = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Those of IANA's registry, and what caches and UPnP know: nearly like a usual one, and meant.
KNOWN = frozenset(
    ["ACL", "BAN", "BASELINE-CONTROL", "BIND", "CHECKIN", "CHECKOUT", "CONNECT", "COPY", "LABEL", "LINK", "LOCK", "M-SEARCH", "MERGE", "MKACTIVITY", "MKCALENDAR", "MKCOL", "MKREDIRECTREF", "MKWORKSPACE", "MOVE", "MSEARCH", "NOTIFY", "ORDERPATCH", "PROPFIND", "PROPPATCH", "PURGE", "QUERY", "REBIND", "REPORT", "SEARCH", "SUBSCRIBE", "TRACE", "UNBIND", "UNCHECKOUT", "UNLINK", "UNLOCK", "UNSUBSCRIBE", "UPDATE", "UPDATEREDIRECTREF", "VERSION-CONTROL"]
)


def warn_methods(document: Document, at: Path_, methods: Iterable[str] | None) -> None:
    """Note methods that are nearly usual ones."""
    for index, method in enumerate(methods or ()):
        near = [] if method in USUAL or method in KNOWN else get_close_matches(method, USUAL, 1, 0.65)
        if near:
            document.warn((*at, index), f"{document.show((*at, index), method)} is no usual method: nobody may ever send it", f"did you mean '{near[0]}'?")
