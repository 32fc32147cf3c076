"""Endpoints and upstreams; see pool.pxd.

Strategy: an endpoint is one address; a name with several addresses is several endpoints. When discovery finds other addresses,
those that stay keep their pools and those that go are retired: their idle connections are closed, exchanges under way finish.
What the endpoints' states allow is looked at every few milliseconds and after each event of this worker; the state itself has the
last word when a request is admitted. Python is called from here: while a snapshot is built and when endpoints change.

Safety: the balancer's pointers lead into the Endpoint objects of `endpoints`, and rebuild() gives it that list as their owner;
the list is replaced, never changed in place, while the balancer holds it.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from gateway._speedups.balance cimport (SAMPLE_ABANDONED, SAMPLE_BAD, SAMPLE_GOOD, Balancer, Candidate, candidate_reset,
                                        hash_key)
from gateway._speedups.sockets cimport cw_monotonic_us, cw_parse_address
from gateway._speedups.upstream_state cimport *

import mmap
import os

from gateway._speedups import balance as _balance
from gateway._speedups.upstream_table import UpstreamTable

cdef enum:
    LOOK_US = 5000              # how old a look at the endpoints' states may be
    PROBE_US = 30000000         # a probe whose process was killed blocks the next one so long
    OVERDUE_US = 1000000        # an endpoint that waits so long for a safe request to try it gets any

cdef dict RETRY_BITS = {"connect-failure": RETRY_CONNECT, "reset": RETRY_RESET, "timeout": RETRY_TIMEOUT, "429": RETRY_429,
                        "500": RETRY_500, "502": RETRY_502, "503": RETRY_503, "504": RETRY_504}
cdef dict KEY_KINDS = {"": KEY_NONE, "client": KEY_CLIENT, "source": KEY_SOURCE, "header": KEY_HEADER, "cookie": KEY_COOKIE}

SHARED_WINDOW = 100 << 18               # of a connection that carries many clients' streams: as much as all of theirs, so that none waits for another
cdef dict PROTOCOLS = {"http1": PROTOCOL_HTTP1, "http2": PROTOCOL_HTTP2, "grpc": PROTOCOL_GRPC}


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
        self.host = self.target.rpartition(":")[0].removeprefix("[").removesuffix("]")
        self.weight = weight
        self.zone = zone
        self.idle = []
        self.links = []
        self.streams_said = 100
        encoded = address.encode("ascii")
        candidate_reset(&self.candidate, hash_key(encoded, len(encoded)), weight, 1)
        self.candidate.usable = True

    @property
    def idle_connections(self) -> int:
        return len(self.idle)


cdef object succeed(Endpoint endpoint, Endpoint before, Upstream upstream, bint equivalent):
    """Take over the pool of the endpoint that is replaced, unless it is reached in another way now, and what is known of its speed."""
    if not equivalent:
        retire(before)
    before.retired = True
    endpoint.idle, before.idle = before.idle, []
    endpoint.links, before.links = before.links, []
    for connection in [*endpoint.idle, *endpoint.links]:
        connection.moved(endpoint, upstream)
    endpoint.streams_said = before.streams_said
    endpoint.candidate.ewma_us = before.candidate.ewma_us
    endpoint.candidate.ewma_at = before.candidate.ewma_at
    endpoint.candidate.penalty_until = before.candidate.penalty_until
    endpoint.candidate.hold_until = before.candidate.hold_until
    endpoint.candidate.trial_until = before.candidate.trial_until
    endpoint.candidate.tried_until = before.candidate.tried_until


cdef object retire(Endpoint endpoint):
    """Nobody will draw from this pool any more."""
    endpoint.retired = True
    idle, endpoint.idle = endpoint.idle, []
    for connection in [*idle, *endpoint.links]:
        connection.discard()


def private_table() -> UpstreamTable:
    """A table of this process alone, for an upstream that is tried out or tested."""
    size = UpstreamTable.size_for(1, 1, 64)
    return UpstreamTable(mmap.mmap(-1, size), 0, 1, 1, 64)


cdef class Upstream:
    """A named group of endpoints with its timeouts (seconds), limits, and rules for further attempts.

    `table` is the UpstreamTable that all processes share, `worker` this process's index in it; None: a table of its own.
    """

    def __init__(self, str name not None, list endpoints not None, *, double connect=2, double head=15, double idle=30,
                 double total=60, int keep_connections=64, double keep_idle=55, double keep_age=3600, str host="preserve",
                 uint32_t requests=1024, uint32_t endpoint_requests=0, uint32_t connections=0, uint32_t pending=256,
                 double queue=1, dict adaptive=None, str balance="p2c_ewma", str key="", int load=125, double slow_start=0,
                 str zone=None, int attempts=1, retry_on=("connect-failure",), double per_try=0, double backoff=0.025,
                 double backoff_max=0.25, int64_t replay=65536, bint honours_key=False, double budget=0.2, int reserve=10,
                 double hedge=0, bint finish_abandoned=True, dict eject=None, bint panic=False, table=None, int worker=0,
                 TlsUpstream tls=None, str protocol="http1", Http2 http2=None, bint foreign=False):
        self.name = name
        self.tls = tls
        self.protocol = PROTOCOLS[protocol]
        self.http2 = None if self.protocol == PROTOCOL_HTTP1 else Http2(connection_window=SHARED_WINDOW) if http2 is None else http2
        self.unresolved = set()
        self.zone = zone
        self.table = private_table() if table is None else table
        self.worker = 0 if table is None else worker
        self.state = self.table.upstream(self.worker, name)
        self.state.configure(limit=requests, panic=panic, budget=budget, reserve=reserve, **(eject or {}))
        self.adaptive = adaptive is not None
        if adaptive is not None:
            self.state.adapt(highest=requests, **adaptive)
        else:
            self.state.fixed()
        self.balancer = Balancer(_balance.ALGORITHMS.index(balance), slow_start_us=round(slow_start * 1e6), load_percent=load)
        kind, _, name_of_key = key.partition(":")
        self.key_kind = KEY_KINDS[kind]
        self.key_name = name_of_key.lower().encode("ascii") if kind == "header" else name_of_key.encode("ascii")
        self.panic = panic
        self.connect_us = <int64_t>(connect * 1e6)
        self.head_us = <int64_t>(head * 1e6)
        self.idle_us = <int64_t>(idle * 1e6)
        self.total_us = <int64_t>(total * 1e6)
        self.keep_max = keep_connections
        self.keep_idle_us = <int64_t>(keep_idle * 1e6)
        self.keep_age_us = <int64_t>(keep_age * 1e6)
        self.requests_max = requests
        self.endpoint_max = endpoint_requests
        self.connections_max = connections
        self.pending_max = pending
        self.queue_us = <int64_t>(queue * 1e6)
        self.waiting = {}
        self.foreign = foreign
        self.host_literal = host.encode("ascii")
        self.host_mode = HOST_PRESERVE if host == "preserve" else HOST_TARGET if host == "target" else HOST_LITERAL
        self.attempts = attempts
        for failure in retry_on:
            self.retry_on |= <uint32_t>RETRY_BITS[failure]
        self.random = int.from_bytes(os.urandom(8), "little") | 1
        self.per_try_us = <int64_t>(per_try * 1e6)
        self.backoff_us = <int64_t>(backoff * 1e6)
        self.backoff_max_us = <int64_t>(backoff_max * 1e6)
        self.replay_max = replay
        self.honours_key = honours_key
        self.hedge_us = <int64_t>(hedge * 1e6)
        self.finish_abandoned = finish_abandoned
        self.endpoints = []
        self.replace(endpoints)

    # -- endpoints come and go ----------------------------------------------------------------------------------------

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
        self.rebuild()
        for endpoint in known.values():
            self.dismiss(endpoint)
        return added, list(known.values())

    def adopt(self, Upstream old not None) -> None:
        """Take over what the same upstream of the snapshot before knew: pools, and addresses that are not found anew yet."""
        cdef Endpoint endpoint, before
        cdef bint same = self.equivalent(old)
        known = {(endpoint.address, endpoint.target): endpoint for endpoint in old.endpoints}
        kept = []
        if same and self.tls is not None:
            self.tls.adopt(old.tls)
        for endpoint in self.endpoints:
            before = known.pop((endpoint.address, endpoint.target), None)
            if before is not None and before is not endpoint:
                succeed(endpoint, before, self, same)
            kept.append(endpoint)
        for before in known.values():
            if before.target in self.unresolved:
                endpoint = Endpoint(before.address, before.weight, target=before.target, zone=before.zone)
                succeed(endpoint, before, self, same)
                kept.append(endpoint)
            else:
                self.dismiss(before)
        self.endpoints = kept
        self.rebuild()

    cdef object dismiss(self, Endpoint endpoint):
        """It is none of ours any more."""
        retire(endpoint)
        if self.tls is not None:
            self.tls.forget(endpoint.address, endpoint.host)

    def equivalent(self, Upstream other not None) -> bool:
        """Whether connections made for one can serve the other's requests."""
        if self.protocol != other.protocol or self.http2 != other.http2:
            return False
        if self.tls is None or other.tls is None:
            return self.tls is other.tls
        return self.tls.digest == other.tls.digest

    @property
    def protocol_name(self) -> str:
        """http1, http2 or grpc."""
        return ("http1", "http2", "grpc")[self.protocol]

    def abandon(self) -> None:
        """The upstream is in no snapshot any more."""
        for endpoint in self.endpoints:
            retire(endpoint)

    cdef object join(self, Endpoint endpoint):
        """Give an endpoint its place in what all processes know, and its candidate what the configuration says."""
        if endpoint.state is None:
            endpoint.state = self.table.endpoint(self.worker, self.name, endpoint.address, target=endpoint.target,
                                                 zone=endpoint.zone, weight=endpoint.weight)
        endpoint.retired = False
        endpoint.candidate.weight = endpoint.weight
        endpoint.candidate.local = self.zone is None or endpoint.zone is None or endpoint.zone == self.zone

    cdef object rebuild(self):
        """The balancer chooses among the present endpoints from now on."""
        cdef Py_ssize_t count = len(self.endpoints), i
        cdef Candidate** candidates = <Candidate**>malloc((count + 1) * sizeof(Candidate*))
        if candidates == NULL:
            raise MemoryError
        try:
            for i in range(count):
                self.join(self.endpoints[i])
                candidates[i] = &(<Endpoint>self.endpoints[i]).candidate
            self.balancer.rebuild(candidates, <int>count, self.endpoints)
        finally:
            free(candidates)
        self.state.set_members([(<Endpoint>endpoint).state for endpoint in self.endpoints])
        self.look_at = 0

    # -- places -------------------------------------------------------------------------------------------------------

    cdef bint enter(self, int64_t now) noexcept:
        if self.connections_max and self.state.connections() >= self.connections_max and not self.has_idle():
            return False
        if not self.state.enter(self.state.allowed(self.requests_max) if self.adaptive else self.requests_max):
            return False
        self.state.deposit(now)
        return True

    cdef bint has_idle(self) noexcept:
        cdef Endpoint endpoint
        for endpoint in self.endpoints:
            if endpoint.idle or endpoint.links:
                return True
        return False

    cdef void leave(self, bint good) noexcept:
        self.state.leave()
        if good:
            self.state.count(U_SUCCESSES)

    cdef int room(self) noexcept:
        cdef uint32_t limit = self.state.allowed(self.requests_max) if self.adaptive else self.requests_max
        cdef uint32_t there = self.state.in_flight()
        return <int>(limit - there) if there < limit else 0

    cdef bint queue(self, object x) except -1:
        if self.pending_max == 0 or not self.state.enqueue(self.pending_max):
            return False
        self.waiting[x] = None
        return True

    cdef void unqueue(self, object x):
        if self.waiting.pop(x, self) is None:
            self.state.dequeue()

    cdef bint open_one(self) noexcept:
        return self.state.connect(self.connections_max)

    cdef bint may_open(self) noexcept:
        return self.connections_max == 0 or self.state.connections() < self.connections_max

    cdef void close_one(self) noexcept:
        self.state.disconnect()

    # -- attempts -----------------------------------------------------------------------------------------------------

    cdef bint pay(self, int64_t now) noexcept:
        return self.state.withdraw(now)

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

    cdef void look(self, int64_t now) noexcept:
        """Take over what all processes know of the endpoints by now."""
        cdef Endpoint endpoint
        cdef int found
        cdef bint usable
        self.look_at = now + LOOK_US
        self.usable = 0
        self.probes = 0
        for endpoint in self.endpoints:
            found = endpoint.state.availability(now)
            usable = found == USABLE
            self.probes += found == MAY_PROBE
            self.usable += usable
            endpoint.candidate.elsewhere = <int32_t>(endpoint.state.in_flight() - endpoint.state.own_in_flight())
            endpoint.candidate.born = endpoint.state.usable_since()
            endpoint.candidate.usable = usable
            endpoint.state.set_ewma(<int64_t>self.balancer.expected_us(&endpoint.candidate, now))
        self.balancer.changed()

    cdef bint offers(self, int64_t now) noexcept:
        if now >= self.look_at:
            self.look(now)
        return self.usable > 0 or self.probes > 0

    cdef Endpoint probe(self, int64_t now, bint safe):
        """An endpoint whose time out is over, if this request may be the one to try it."""
        cdef Endpoint endpoint
        for endpoint in self.endpoints:
            if endpoint.state.availability(now) != MAY_PROBE:
                continue
            if not safe and self.usable and now - endpoint.state.ejected_until() < OVERDUE_US:
                continue
            endpoint.ticket = endpoint.state.admit(now, PROBE_US)
            if endpoint.ticket:
                endpoint.state.enter(0)             # no limit: always
                self.look_at = 0
                return endpoint
        return None

    cdef Endpoint pick(self, int64_t now, uint64_t key, bint safe, Endpoint avoid):
        cdef Endpoint endpoint
        cdef int at, turn, avoided = -1
        if now >= self.look_at:
            self.look(now)
        if self.probes:
            endpoint = self.probe(now, safe)
            if endpoint is not None:
                return endpoint
        if avoid is not None:
            avoided = self.index_of(avoid)
        if self.key_kind != KEY_NONE:               # the bound on the load goes by what is in flight now, not at the last look
            for endpoint in self.endpoints:
                endpoint.candidate.elsewhere = <int32_t>(endpoint.state.in_flight() - endpoint.state.own_in_flight())
        for turn in range(8):
            at = self.balancer.choose(now, key, avoided, safe)
            if at < 0:
                break
            endpoint = <Endpoint>self.endpoints[at]
            endpoint.ticket = endpoint.state.admit(now, PROBE_US)
            if endpoint.ticket:
                if endpoint.state.enter(self.endpoint_max):
                    return endpoint
                endpoint.state.report(self.state, OUT_CANCELLED, endpoint.ticket, now)      # it may have been the probe
            endpoint.candidate.usable = False       # until the next look: out since the last one, or full
            self.balancer.changed()
        if self.panic and self.endpoints:
            at = <int>(<uint64_t>(now + avoided) % <uint64_t>len(self.endpoints))
            endpoint = <Endpoint>self.endpoints[at]
            if endpoint.state.enter(self.endpoint_max):
                endpoint.ticket = endpoint.state.ticket()
                return endpoint
        self.state.count(U_NO_ENDPOINT)
        return None

    cdef int index_of(self, Endpoint wanted) noexcept:
        cdef int i
        for i in range(<int>len(self.endpoints)):
            if self.endpoints[i] is wanted:
                return i
        return -1

    cdef void decline(self, Endpoint endpoint, int64_t now) noexcept:
        endpoint.state.report(self.state, OUT_CANCELLED, endpoint.ticket, now)
        endpoint.state.leave()

    cdef void start(self, Endpoint endpoint, int64_t now, bint again) noexcept:
        self.balancer.started(&endpoint.candidate, now)
        if again:
            endpoint.state.count(E_RETRIES)

    cdef int finish(self, Endpoint endpoint, uint32_t ticket, int64_t now, int outcome, int status, int64_t us,
                    int64_t retry_after_us) noexcept:
        cdef int out = OUT_CANCELLED, sample = SAMPLE_BAD, event
        if outcome == OUTCOME_NONE:
            sample = SAMPLE_ABANDONED
        elif outcome == OUTCOME_ANSWERED:
            out = classify_status(status)
            if out == OUT_OK:
                sample = SAMPLE_GOOD
        elif outcome == OUTCOME_GRPC:
            out = classify_grpc(status)
            if out == OUT_OK:
                sample = SAMPLE_GOOD
        elif outcome == OUTCOME_CONNECT:
            out = OUT_CONNECT
        elif outcome == OUTCOME_TIMEOUT:
            out = OUT_TIMEOUT
        else:
            out = OUT_RESET
        self.balancer.finished(&endpoint.candidate, now, us if us > 0 else 0, sample, retry_after_us)
        if self.adaptive and (outcome == OUTCOME_ANSWERED or outcome == OUTCOME_GRPC):
            self.state.sampled(now - us, now)
        event = endpoint.state.report(self.state, out, ticket, now)
        if event:
            self.look_at = 0
        return event

    cdef void stop(self, Endpoint endpoint) noexcept:
        endpoint.state.leave()
