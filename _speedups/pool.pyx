"""Choosing endpoints (smooth weighted round robin) and holding the connections that wait at each.

Strategy: see pool.pxd. An endpoint is one address; a name with several addresses is several endpoints. When discovery finds
other addresses, those that stay keep their pools and those that go are retired: their idle connections are closed, exchanges
under way finish. Python is called from here: while a snapshot is built and when endpoints change.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from gateway._speedups.sockets cimport cw_parse_address

import os

cdef dict RETRY_BITS = {"connect-failure": RETRY_CONNECT, "reset": RETRY_RESET, "timeout": RETRY_TIMEOUT, "429": RETRY_429,
                        "500": RETRY_500, "502": RETRY_502, "503": RETRY_503, "504": RETRY_504}


cdef class Endpoint:
    """One address of an upstream: `address` is numeric, host:port or [host]:port; `target` is the name that it was found by.

    Raises ValueError when the address is not numeric.
    """

    def __init__(self, str address not None, int weight=1, *, str target=None, str zone=None):
        host, _, port = address.rpartition(":")
        encoded = host.removeprefix("[").removesuffix("]").encode("ascii", "replace")
        if not cw_parse_address(encoded, int(port), &self.sockaddr, &self.length):
            raise ValueError(f"not a numeric address: {address}")
        self.address = address
        self.target = address if target is None else target
        self.host_field = self.target.encode("ascii")
        self.weight = weight
        self.zone = zone
        self.idle = []

    @property
    def idle_connections(self) -> int:
        return len(self.idle)

    cdef object succeed(self, Endpoint before, Upstream upstream):
        """Take over the pool of the endpoint that this one replaces."""
        self.idle, before.idle = before.idle, []
        for connection in self.idle:
            connection.moved(self, upstream)
        self.down_until = before.down_until
        self.current = before.current

    cdef void begin(self, int64_t now) noexcept:
        self.active += 1

    cdef void leave(self) noexcept:
        self.active -= 1

    cdef void finish(self, Upstream upstream, int64_t now, int outcome, int status, int64_t us, int64_t retry_after_us):
        if outcome == OUTCOME_CONNECT:
            self.down_until = now + 1000000
        elif outcome == OUTCOME_ANSWERED:
            self.down_until = 0


cdef object retire(Endpoint endpoint):
    """Nobody will draw from this pool any more."""
    endpoint.retired = True
    idle, endpoint.idle = endpoint.idle, []
    for connection in idle:
        connection.discard()


cdef class Upstream:
    """A named group of endpoints with its timeouts (seconds) and pool limits."""

    def __init__(self, str name not None, list endpoints not None, *, double connect=2, double head=15, double idle=30,
                 double total=60, int keep_connections=64, double keep_idle=55, double keep_age=3600, int requests=1024,
                 str host="preserve", int attempts=1, retry_on=("connect-failure",), double per_try=0, double backoff=0.025,
                 double backoff_max=0.25, int64_t replay=65536, bint honours_key=False, double hedge=0,
                 bint finish_abandoned=True, int pending=256, double queue=1):
        self.name = name
        self.endpoints = endpoints
        self.unresolved = set()
        self.connect_us = <int64_t>(connect * 1e6)
        self.head_us = <int64_t>(head * 1e6)
        self.idle_us = <int64_t>(idle * 1e6)
        self.total_us = <int64_t>(total * 1e6)
        self.keep_max = keep_connections
        self.keep_idle_us = <int64_t>(keep_idle * 1e6)
        self.keep_age_us = <int64_t>(keep_age * 1e6)
        self.requests_max = requests
        self.host_literal = host.encode("ascii")
        self.host_mode = HOST_PRESERVE if host == "preserve" else HOST_TARGET if host == "target" else HOST_LITERAL
        self.attempts = attempts
        for name in retry_on:
            self.retry_on |= <uint32_t>RETRY_BITS[name]
        self.random = int.from_bytes(os.urandom(8), "little") | 1
        self.per_try_us = <int64_t>(per_try * 1e6)
        self.backoff_us = <int64_t>(backoff * 1e6)
        self.backoff_max_us = <int64_t>(backoff_max * 1e6)
        self.replay_max = replay
        self.honours_key = honours_key
        self.hedge_us = <int64_t>(hedge * 1e6)
        self.finish_abandoned = finish_abandoned
        self.waiting = {}
        self.pending_max = pending
        self.queue_us = <int64_t>(queue * 1e6)

    def replace(self, list endpoints not None) -> tuple:
        """Let these be the endpoints from now on; returns (those that are new, those that are gone), as lists.

        What stays, by address and target, keeps its object, its pool and its history; its weight and zone are renewed.
        """
        cdef Endpoint endpoint, before
        known = {(endpoint.address, endpoint.target): endpoint for endpoint in self.endpoints}
        added, kept = [], []
        for endpoint in endpoints:
            before = known.pop((endpoint.address, endpoint.target), None)
            if before is None:
                added.append(endpoint)
                before = endpoint
            elif before is not endpoint:
                before.weight = endpoint.weight
                before.zone = endpoint.zone
            kept.append(before)
        self.endpoints = kept
        for endpoint in known.values():
            retire(endpoint)
        return added, list(known.values())

    def adopt(self, Upstream old not None) -> None:
        """Take over what the same upstream of the snapshot before knew: pools, and addresses that are not found anew yet."""
        cdef Endpoint endpoint, before
        known = {(endpoint.address, endpoint.target): endpoint for endpoint in old.endpoints}
        for endpoint in self.endpoints:
            before = known.pop((endpoint.address, endpoint.target), None)
            if before is not None and before is not endpoint:
                before.retired = True
                endpoint.succeed(before, self)
        for before in list(known.values()):
            if before.target in self.unresolved:
                endpoint = Endpoint(before.address, before.weight, target=before.target, zone=before.zone)
                before.retired = True
                endpoint.succeed(before, self)
                self.endpoints.append(endpoint)
            else:
                retire(before)

    def abandon(self) -> None:
        """The upstream is in no snapshot any more."""
        for endpoint in self.endpoints:
            retire(endpoint)

    cdef bint enter(self, int64_t now) noexcept:
        if self.active >= self.requests_max:
            return False
        self.active += 1
        return True

    cdef void leave(self) noexcept:
        self.active -= 1

    cdef int room(self, int64_t now) noexcept:
        return self.requests_max - self.active

    cdef bint queue(self, object x) except -1:
        if len(self.waiting) >= self.pending_max:
            return False
        self.waiting[x] = None
        return True

    cdef void unqueue(self, object x):
        self.waiting.pop(x, None)

    cdef bint pay(self, int64_t now) noexcept:
        return True

    cdef int64_t backoff(self, int tries) noexcept:
        """Full jitter: anything up to base x 2^tries, capped."""
        cdef int64_t most = self.backoff_us << (tries if tries < 20 else 20)
        if most > self.backoff_max_us:
            most = self.backoff_max_us
        if most <= 0:
            return 0
        self.random ^= self.random << 13
        self.random ^= self.random >> 7
        self.random ^= self.random << 17
        return <int64_t>(self.random % <uint64_t>(most + 1))

    cdef Endpoint pick(self, int64_t now, object x, Endpoint avoid):
        cdef Endpoint endpoint, best = None, fallback = None
        cdef int total = 0
        if len(self.endpoints) == 1:
            return <Endpoint>self.endpoints[0]
        for endpoint in self.endpoints:
            if endpoint.down_until > now or endpoint is avoid:
                # All down: the one that comes back first is tried rather than nothing.
                if fallback is None or endpoint.down_until < fallback.down_until:
                    fallback = endpoint
                continue
            endpoint.current += endpoint.weight
            total += endpoint.weight
            if best is None or endpoint.current > best.current:
                best = endpoint
        if best is None:
            return fallback
        best.current -= total
        return best
