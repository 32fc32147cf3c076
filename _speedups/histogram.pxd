"""Counters, gauges and latency histograms in a worker's slot of shared memory.

Strategy: one writer per slot (its worker), so every update is a plain aligned 8-byte store: no lock, no atomic
read-modify-write. Readers (admin, supervisor) add slots up. Histograms are arrays of counts, so a histogram's count is the
sum of its buckets by construction.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

# The order is that of the names in histogram.pyx.
cdef enum:                      # counters; anonymous, so that a member indexes an array
    C_CONNECTIONS_ACCEPTED = 0
    C_CONNECTIONS_CLOSED
    C_REQUESTS
    C_RESPONSES_LOCAL           # answered by the gateway itself
    C_BAD_REQUESTS
    C_TIMEOUTS_HEAD
    C_TIMEOUTS_BODY
    C_TIMEOUTS_IDLE
    C_TIMEOUTS_WRITE
    C_CLIENT_ABORTS
    C_UPSTREAM_CONNECTS
    C_UPSTREAM_CONNECT_FAILURES
    C_UPSTREAM_REUSED
    C_UPSTREAM_DISCARDED
    C_UPSTREAM_TIMEOUTS
    C_UPSTREAM_BAD
    C_UPSTREAM_RESETS
    C_RETRIES
    C_BYTES_IN
    C_BYTES_OUT
    C_UPSTREAM_BYTES_IN
    C_UPSTREAM_BYTES_OUT
    C_TOKEN_HITS
    C_TOKEN_MISSES
    C_TOKEN_REFUSED
    C_LIMITED
    C_LIMIT_TABLE_FULL
    C_LIMIT_LOCAL               # Redis was away: counted on this machine alone
    C_LIMIT_DENIED              # ... refused
    C_LIMIT_ALLOWED             # ... let pass
    C_LIMIT_LEASES              # leases entered
    C_LIMIT_LEASED              # their tokens
    C_LIMIT_RETURNED            # tokens given back unspent
    C_LIMIT_WAITS               # requests that waited for Redis
    C_LIMIT_WAIT_US
    C_LEASE_TABLE_FULL
    C_REDIS_TRIPS
    C_REDIS_COMMANDS
    C_REDIS_ERRORS
    C_AUDIT_RECORDS
    C_AUDIT_LOST
    C_HOOKS
    C_HOOK_ERRORS
    C_HOOK_TIMEOUTS
    C_MIRRORED_2XX              # copies by the class of their answer's status
    C_MIRRORED_3XX
    C_MIRRORED_4XX
    C_MIRRORED_5XX
    C_MIRROR_FAILED             # no answer
    C_MIRROR_DROPPED            # too many in flight
    C_MIRROR_SKIPPED            # the body was too long, or of unknown length
    C_FAULT_DELAYS
    C_FAULT_ABORTS
    C_ACCEPT_PAUSED
    C_LOOP_POLLS
    C_LOOP_EVENTS
    C_RETRIES_DENIED            # the budget was spent
    C_HEDGES
    C_ORPHANS                   # exchanges that went on without their clients
    C_UPSTREAM_OVERLOADED       # refused: the upstream's queue was full
    C_UPSTREAM_QUEUE_TIMEOUTS
    C_LOOKUPS                   # names asked for by discovery
    C_LOOKUP_FAILURES
    C_FILES_REJECTED            # versions of watched files of endpoints that could not be used
    C_TLS_HANDSHAKES            # of clients, completed
    C_TLS_RESUMED               # those of them that resumed a session
    C_TLS_FAILED
    C_TLS_TIMEOUTS
    C_TLS_EVICTED               # the oldest, to make room
    C_UPSTREAM_TLS_HANDSHAKES
    C_UPSTREAM_TLS_RESUMED
    C_UPSTREAM_TLS_FAILURES
    C_TUNNELS                   # opened
    C_TUNNELS_REFUSED           # the route had as many as it may
    C_TUNNELS_IDLE              # ended for being silent
    C_TUNNELS_EXPIRED           # their token did
    C_TUNNELS_CUT               # ended by us otherwise: the end of a drain
    C_TUNNEL_BYTES_IN           # from clients
    C_TUNNEL_BYTES_OUT
    C_H2_CONNECTIONS            # of clients
    C_H2_STREAMS                # opened, on both sides
    C_H2_REFUSED                # above the limit of a connection
    C_H2_RESETS_IN              # streams that the other side gave up
    C_H2_RESETS_OUT
    C_H2_MALFORMED              # messages that are no HTTP
    C_H2_FRAMES_EMPTY           # frames that carried nothing
    C_H2_ERRORS                 # connections ended by GOAWAY with an error
    C_H2_CALMED                 # those of them for a flood
    C_UPSTREAM_H2_CONNECTIONS
    C_UPSTREAM_H2_PINGS         # sent to silent ones
    C_UPSTREAM_H2_SILENT        # ended because they did not answer
    C_SERIES_OVERFLOW           # observations that found no free series; written by observe() only
    C_USED                      # how many there are
    COUNTER_COUNT = 128         # room in the slot

cdef enum:                      # gauges
    G_CONNECTIONS = 0
    G_EXCHANGES
    G_UPSTREAM_ACTIVE
    G_UPSTREAM_IDLE
    G_PARKED
    G_CONFIG_VERSION
    G_READY
    G_DRAINING
    G_CPU_US                    # user and system time of the process
    G_STARTED                   # seconds since 1970
    G_PID
    G_RSS                       # bytes
    G_BUFFERS                   # blocks that connections hold
    G_DESCRIPTORS               # sockets that the engine watches
    G_REDIS                     # 0 not configured, 1 away, 2 there
    G_LIMIT_WAIT_MAX_US         # the longest that a request has waited for Redis
    G_HANDSHAKES                # of TLS with clients, under way
    G_TUNNELS                   # open
    G_USED
    GAUGE_COUNT = 32

# How a raw TCP connection ended. The order is that of TCP_ENDS in histogram.pyx.
cdef enum:
    END_CLOSED = 0              # both sides said their end
    END_CLIENT                  # the client broke it off
    END_UPSTREAM                # the upstream did
    END_IDLE                    # no byte for too long
    END_CUT                     # by us: the end of a drain, or an error of ours
    END_UNREACHABLE             # no endpoint could be connected to
    END_FULL                    # as many as there may be
    END_FORBIDDEN               # the client's address is not allowed
    END_NO_NAME                 # no upstream for the server name, or none was given
    END_BAD_HELLO               # what came was no ClientHello
    END_HANDSHAKE               # no PROXY header, TLS or ClientHello in time, or none that is valid
    END_DENIED                  # no rule of the mesh lets the client connect
    TCP_ENDINGS

cdef enum:
    ROUTE_NONE = 0              # no route matched; NameTable's first name is ""
    MAX_ROUTES = 16384          # ids at or above it are counted in the overflow series
    MAX_SERIES = 2000           # per slot; likewise for routes with histograms
    CLASSIC_BUCKETS = 21
    MAX_TCP = 512               # pairs of TCP listener and upstream; likewise
    BINS = 193                  # log-linear: 8 per power of two, 1 us to 67 s, then one for the rest

cdef struct Series:
    uint64_t key                # SERIES_MARK | route << 24 | method << 16 | status; 0 unused
    uint64_t buckets[CLASSIC_BUCKETS]
    uint64_t sum_us
    uint64_t request_bytes
    uint64_t response_bytes

cdef struct RouteSeries:
    uint64_t route
    uint64_t total[BINS]
    uint64_t overhead[BINS]
    uint64_t overhead_buckets[CLASSIC_BUCKETS]
    uint64_t overhead_sum_us

# Raw TCP connections of one listener to one upstream, or of one listener that reached none.
cdef struct TcpSeries:
    uint64_t key                # the metric's id plus 1; 0 unused
    uint64_t opened             # upstream connected
    uint64_t ended[TCP_ENDINGS]
    uint64_t bytes_in           # from clients
    uint64_t bytes_out
    uint64_t connect_failures   # attempts
    uint64_t duration_us        # of those that ended
    uint64_t closed             # of those that were opened

# Untouched pages of a slot stay unmapped: series and routes are handed out from the front, so a slot costs what it uses.
cdef struct SlotLayout:
    uint64_t counters[COUNTER_COUNT]
    uint64_t gauges[GAUGE_COUNT]
    uint64_t series_used        # published after the series is complete
    uint64_t routes_used
    uint64_t route_overflow     # 1 when the last RouteSeries is in use
    uint64_t tunnels_used       # cells of `tunnels` that may hold something
    uint64_t tcp_used
    uint64_t reserved[3]
    uint16_t series_index[4096]     # open addressing: position in `series` plus one
    uint16_t route_index[MAX_ROUTES]
    Series series[MAX_SERIES + 1]   # the last one takes the overflow
    RouteSeries routes[MAX_SERIES + 1]
    uint32_t tunnels[MAX_ROUTES + 16]       # open tunnels by route id; all routes without an id share the one at MAX_ROUTES
    TcpSeries tcp[MAX_TCP + 1]  # the last one takes the overflow

cdef class WorkerSlot:
    cdef Py_buffer view         # held for the life of the object: keeps the mapping in place
    cdef SlotLayout* slot
    cdef uint64_t* counters
    cdef uint64_t* gauges
    cdef uint64_t last_key      # the series found last, of this process; 0 none
    cdef Series* last_series
    cdef RouteSeries* last_route
    # -- the slots of all workers, this one's among them: `count` of them from `first` on, `stride` bytes apart
    cdef char* first
    cdef Py_ssize_t stride
    cdef int count

    # A place for a tunnel of the route, `most` of them over all workers; the caller owes one leave_tunnel() for a True.
    cdef bint enter_tunnel(self, uint32_t route, uint32_t most) noexcept nogil
    cdef void leave_tunnel(self, uint32_t route) noexcept nogil
    # The counts of raw TCP connections under this metric. Valid as long as the slot.
    cdef TcpSeries* tcp(self, uint32_t metric) noexcept nogil
    # One finished exchange. upstream_us: the part of total_us spent waiting for the upstream, 0 for a local answer.
    cdef void observe(self, uint32_t route, uint8_t method, uint16_t status, uint64_t total_us, uint64_t upstream_us,
                      uint64_t request_bytes, uint64_t response_bytes) noexcept nogil
