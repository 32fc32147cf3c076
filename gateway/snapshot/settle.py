"""When a started snapshot is as good as it will be: names resolved once, keys fetched once, or at least tried.

Strategy: a worker takes its first connection, or confirms a reload, only then, so that the first requests do not meet 503 and
401 for want of a moment. A name server or an issuer that does not answer must not keep the gateway down: the wait is short.
"""

from __future__ import annotations

import asyncio

from gateway._speedups.exchange import Snapshot

LONGEST = 3.0               # seconds


async def settled(snapshot: Snapshot, longest: float = LONGEST) -> bool:
    """Wait until every source of a started snapshot has made its first attempt; False when `longest` seconds did not suffice.

    Sources without `settled()` are ready when they are started.
    """
    waits = [source.settled() for source in snapshot.sources if hasattr(source, "settled")]
    if not waits:
        return True
    try:
        async with asyncio.timeout(longest):
            await asyncio.gather(*waits, return_exceptions=True)
    except TimeoutError:
        return False
    return True
