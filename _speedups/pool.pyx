"""Choosing endpoints (smooth weighted round robin) and holding their addresses.

Strategy: see pool.pxd. Python is called from here: while a snapshot is built and when a name was resolved.
"""

from gateway._speedups.sockets cimport AF_INET6, cw_parse_address, sockaddr_storage, socklen_t


cdef class Endpoint:
    """One address of an upstream: `host:port`, host a numeric address or a name that is resolved in the background."""

    def __init__(self, str address not None, int weight=1):
        host, _, port = address.rpartition(":")
        self.address = address
        self.host = host.removeprefix("[").removesuffix("]")
        self.port = int(port)
        self.host_field = address.encode("ascii")
        self.weight = weight
        self.idle = []
        self.set_addresses([self.host])

    def set_addresses(self, hosts) -> int:
        """Replace the addresses by the numeric ones of `hosts`; what is no numeric address is passed over.

        Keeps the old ones when none is left. Returns how many are in use.
        """
        cdef sockaddr_storage parsed
        cdef socklen_t length = 0
        cdef int n = 0
        for text in hosts:
            encoded = text.encode("ascii", "replace")
            if n < ADDRESSES_MAX and cw_parse_address(encoded, self.port, &parsed, &length):
                self.addresses[n] = parsed
                self.lengths[n] = length
                n += 1
        if n:
            self.count = n
            if self.turn >= n:
                self.turn = 0
        return self.count

    @property
    def numeric(self) -> bool:
        """Whether the configured host needs no resolution."""
        cdef sockaddr_storage parsed
        cdef socklen_t length = 0
        encoded = self.host.encode("ascii", "replace")
        return bool(cw_parse_address(encoded, self.port, &parsed, &length))

    @property
    def idle_connections(self) -> int:
        return len(self.idle)


cdef class Upstream:
    """A named group of endpoints with its timeouts (seconds) and pool limits."""

    def __init__(self, str name not None, list endpoints not None, *, double connect=2, double head=15, double idle=30,
                 double total=60, int keep_connections=64, double keep_idle=55, double keep_age=3600, int requests=1024,
                 bint retry_connect=True, str host="preserve"):
        self.name = name
        self.endpoints = endpoints
        self.total_weight = sum(endpoint.weight for endpoint in endpoints)
        self.connect_us = <int64_t>(connect * 1e6)
        self.head_us = <int64_t>(head * 1e6)
        self.idle_us = <int64_t>(idle * 1e6)
        self.total_us = <int64_t>(total * 1e6)
        self.keep_max = keep_connections
        self.keep_idle_us = <int64_t>(keep_idle * 1e6)
        self.keep_age_us = <int64_t>(keep_age * 1e6)
        self.requests_max = requests
        self.retry_connect = retry_connect
        self.host_literal = host.encode("ascii")
        self.host_mode = HOST_PRESERVE if host == "preserve" else HOST_TARGET if host == "target" else HOST_LITERAL

    cdef Endpoint pick(self, int64_t now, Endpoint avoid):
        cdef Endpoint endpoint, best = None, fallback = None
        cdef int total = 0
        if len(self.endpoints) == 1:
            endpoint = <Endpoint>self.endpoints[0]
            return endpoint if endpoint.count else None
        for endpoint in self.endpoints:
            if endpoint.count == 0:
                continue
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
