"""Counters, gauges and latency histograms in shared-memory slots, and the table of route names.

Strategy: an observation finds its series (route, method, status) by one comparison with the last one or one probe of a small
table inside the slot, and its bucket by counting leading zeros and one table look-up: no loop over bounds, no division.
Readers take arrays of counts; adding slots up is one function (`absorb`), used for a scrape and for folding a dead worker's
slot into the retired one alike. Stores are 8 bytes and aligned, which these processors never tear.

Python is called from here: never (observe), per scrape (everything else).
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from typing import Final

cdef extern from *:
    """
    #include <stdint.h>
    /* Log-linear bin of v microseconds: 0..7 exactly, then eight bins per power of two, the last for 2^26 us and more. */
    static inline unsigned cw_bin(uint64_t v) {
        unsigned e;
        if (v < 8) return (unsigned)v;
        if (v >> 26) return 192;
        e = 63u - (unsigned)__builtin_clzll(v);
        return (e - 2) * 8 + (unsigned)((v >> (e - 3)) & 7);
    }
    static inline uint64_t cw_bin_low(unsigned bin) {
        if (bin < 8) return bin;
        return (uint64_t)(8 + (bin & 7)) << ((bin >> 3) - 1);
    }
    static const uint64_t cw_bounds[21] = {50, 100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 75000, 100000, 250000,
        500000, 750000, 1000000, 2500000, 5000000, 7500000, 10000000, UINT64_MAX};
    /* The classic bucket of a bin's lowest value. No bin holds two bounds, so a value is in this bucket or in the next. */
    static uint8_t cw_base[193];
    static void cw_bins_init(void) {
        unsigned bin, b = 0;
        for (bin = 0; bin < 193; bin++) {
            while (cw_bin_low(bin) > cw_bounds[b]) b++;
            cw_base[bin] = (uint8_t)b;
        }
    }
    static inline unsigned cw_classic(uint64_t v, unsigned bin) {
        unsigned b = cw_base[bin];
        return b + (v > cw_bounds[b]);
    }
    static inline void cw_add(uint64_t *cell, uint64_t v) {
        __atomic_store_n(cell, *cell + v, __ATOMIC_RELAXED);
    }
    static inline uint64_t cw_read(const uint64_t *cell) { return __atomic_load_n(cell, __ATOMIC_ACQUIRE); }
    static inline void cw_publish(uint64_t *cell, uint64_t v) { __atomic_store_n(cell, v, __ATOMIC_RELEASE); }
    static inline uint64_t cw_bump(uint64_t *cell) { return __atomic_add_fetch(cell, 1, __ATOMIC_SEQ_CST); }
    static inline uint32_t cw_cell(const uint32_t *cell) { return __atomic_load_n(cell, __ATOMIC_SEQ_CST); }
    static inline void cw_move(uint32_t *cell, int by) { __atomic_add_fetch(cell, (uint32_t)by, __ATOMIC_SEQ_CST); }
    static inline void cw_read_fence(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    """
    unsigned cw_bin(uint64_t v) noexcept nogil
    uint64_t cw_bin_low(unsigned bin) noexcept nogil
    const uint64_t cw_bounds[21]
    void cw_bins_init() noexcept nogil
    unsigned cw_classic(uint64_t v, unsigned bin) noexcept nogil
    void cw_add(uint64_t* cell, uint64_t v) noexcept nogil
    uint64_t cw_read(const uint64_t* cell) noexcept nogil
    void cw_publish(uint64_t* cell, uint64_t v) noexcept nogil
    uint64_t cw_bump(uint64_t* cell) noexcept nogil
    uint32_t cw_cell(const uint32_t* cell) noexcept nogil
    void cw_move(uint32_t* cell, int by) noexcept nogil
    void cw_read_fence() noexcept nogil

cdef enum:
    INDEX_MASK = 4095           # twice MAX_SERIES and a bit: probes stay short, and the table is never full
    OVERFLOW_ROUTE = 0x7FFFFFFF

cdef uint64_t SERIES_MARK = <uint64_t>1 << 63
cdef uint64_t SERIES_HASH = 0x9E3779B97F4A7C15

cw_bins_init()

COUNTER_NAMES: Final = (
    "connections_accepted", "connections_closed", "requests", "responses_local", "bad_requests", "timeouts_head",
    "timeouts_body", "timeouts_idle", "timeouts_write", "client_aborts", "upstream_connects", "upstream_connect_failures",
    "upstream_reused", "upstream_discarded", "upstream_timeouts", "upstream_bad", "upstream_resets", "retries", "bytes_in",
    "bytes_out", "upstream_bytes_in", "upstream_bytes_out", "token_hits", "token_misses", "token_refused", "limited",
    "limit_table_full", "limit_local", "limit_denied", "limit_allowed", "limit_leases", "limit_leased",
    "limit_returned", "limit_waits", "limit_wait_us", "lease_table_full", "redis_trips", "redis_commands",
    "redis_errors", "audit_records", "audit_lost", "hooks", "hook_errors", "hook_timeouts", "mirrored_2xx",
    "mirrored_3xx", "mirrored_4xx", "mirrored_5xx", "mirror_failed", "mirror_dropped", "mirror_skipped", "fault_delays",
    "fault_aborts", "accept_paused", "loop_polls", "loop_events", "retries_denied", "hedges", "orphans",
    "upstream_overloaded", "upstream_queue_timeouts", "lookups", "lookup_failures", "files_rejected", "tls_handshakes", "tls_resumed", "tls_failed",
    "tls_timeouts", "tls_evicted", "upstream_tls_handshakes", "upstream_tls_resumed", "upstream_tls_failures", "tunnels",
    "tunnels_refused", "tunnels_idle", "tunnels_expired", "tunnels_cut", "tunnel_bytes_in", "tunnel_bytes_out", "h2_connections",
    "h2_streams", "h2_refused", "h2_resets_in", "h2_resets_out", "h2_malformed", "h2_frames_empty", "h2_errors", "h2_calmed",
    "upstream_h2_connections", "upstream_h2_pings", "upstream_h2_silent", "series_overflow",
)
GAUGE_NAMES: Final = (
    "connections", "exchanges", "upstream_active", "upstream_idle", "parked", "config_version", "ready", "draining", "cpu_us",
    "started", "pid", "rss", "buffers", "descriptors", "redis", "limit_wait_max_us", "tls_handshakes", "tunnels",
)
TCP_ENDS: Final = (
    "closed", "client-reset", "upstream-reset", "idle", "cut", "unreachable", "full", "forbidden", "unknown-name", "bad-hello",
    "handshake", "denied",
)
assert len(COUNTER_NAMES) == C_USED and len(GAUGE_NAMES) == G_USED and len(TCP_ENDS) == TCP_ENDINGS

CLASSIC_BOUNDS_US: Final = tuple([cw_bounds[i] for i in range(CLASSIC_BUCKETS - 1)])
BIN_LOWS_US: Final = tuple([cw_bin_low(i) for i in range(BINS)])
SLOT_BYTES: Final = sizeof(SlotLayout)
NO_ROUTE: Final = ROUTE_NONE
OVERFLOW: Final = OVERFLOW_ROUTE

cdef dict COUNTER_IDS = {name: number for number, name in enumerate(COUNTER_NAMES)}
cdef dict GAUGE_IDS = {name: number for number, name in enumerate(GAUGE_NAMES)}


cdef int hold(object buffer, Py_ssize_t offset, Py_ssize_t size, Py_buffer* view) except -1:
    """Take the buffer and check that [offset, offset + size) lies inside it, aligned to a cache line."""
    PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
    if offset < 0 or size > view.len or offset > view.len - size:
        raise ValueError(f"{size} bytes at {offset} do not fit into a buffer of {view.len}")
    if (<uintptr_t>view.buf + <uintptr_t>offset) % 64:
        raise ValueError("a shared area must start at a multiple of 64 bytes")
    return 0


@cython.final
cdef class WorkerSlot:
    """A worker's counters, gauges and histograms at `offset` of a writable buffer.

    Opening a slot does not clear it: a worker goes on where the last one stopped, until the supervisor folds the slot.
    """

    def __cinit__(self, buffer, Py_ssize_t offset=0):
        hold(buffer, offset, sizeof(SlotLayout), &self.view)
        self.slot = <SlotLayout*>(<char*>self.view.buf + offset)
        self.counters = self.slot.counters
        self.gauges = self.slot.gauges
        self.last_key = 0
        self.last_series = NULL
        self.last_route = NULL
        self.first = <char*>self.slot
        self.stride = 0
        self.count = 1

    def __dealloc__(self):
        PyBuffer_Release(&self.view)        # does nothing if the buffer was never taken

    cdef void observe(self, uint32_t route, uint8_t method, uint16_t status, uint64_t total_us, uint64_t upstream_us,
                      uint64_t request_bytes, uint64_t response_bytes) noexcept nogil:
        # cw_bin() < BINS and cw_classic() < CLASSIC_BUCKETS for every value: no index below can leave its array.
        cdef uint64_t key = SERIES_MARK | <uint64_t>route << 24 | <uint64_t>method << 16 | status
        cdef uint64_t overhead_us = total_us - upstream_us if total_us > upstream_us else 0
        cdef unsigned bin = cw_bin(total_us)
        cdef unsigned overhead_bin = cw_bin(overhead_us)
        if key != self.last_key:
            self.last_series = find_series(self.slot, key)
            self.last_route = find_route(self.slot, route)
            self.last_key = key
        if self.last_series == &self.slot.series[MAX_SERIES] or self.last_route == &self.slot.routes[MAX_SERIES]:
            cw_add(&self.counters[C_SERIES_OVERFLOW], 1)
        cw_add(&self.last_series.buckets[cw_classic(total_us, bin)], 1)
        cw_add(&self.last_series.sum_us, total_us)
        cw_add(&self.last_series.request_bytes, request_bytes)
        cw_add(&self.last_series.response_bytes, response_bytes)
        cw_add(&self.last_route.total[bin], 1)
        cw_add(&self.last_route.overhead[overhead_bin], 1)
        cw_add(&self.last_route.overhead_buckets[cw_classic(overhead_us, overhead_bin)], 1)
        cw_add(&self.last_route.overhead_sum_us, overhead_us)

    def join(self, Py_ssize_t first, Py_ssize_t stride, int count) -> None:
        """Count places for tunnels together with the slots at `first`, `first` + `stride` and so on of the same buffer."""
        if first < 0 or stride < 0 or count < 1 or first + stride * (count - 1) > self.view.len - <Py_ssize_t>sizeof(SlotLayout):
            raise ValueError("the slots do not lie in the buffer")
        self.first = <char*>self.view.buf + first
        self.stride = stride
        self.count = count

    cdef bint enter_tunnel(self, uint32_t route, uint32_t most) noexcept nogil:
        # Its own place first, then a look at all: of two workers that want the last one at once, at most one gets it.
        cdef uint32_t at = route if route < <uint32_t>MAX_ROUTES else <uint32_t>MAX_ROUTES
        cdef uint64_t total = 0
        cdef int i
        if self.slot.tunnels_used <= at:
            cw_publish(&self.slot.tunnels_used, <uint64_t>at + 1)
        cw_move(&self.slot.tunnels[at], 1)
        for i in range(self.count):
            total += cw_cell(&(<SlotLayout*>(self.first + i * self.stride)).tunnels[at])
        if total > most:
            cw_move(&self.slot.tunnels[at], -1)
            return False
        return True

    cdef void leave_tunnel(self, uint32_t route) noexcept nogil:
        cw_move(&self.slot.tunnels[route if route < <uint32_t>MAX_ROUTES else <uint32_t>MAX_ROUTES], -1)

    def take_tunnel(self, uint32_t route, uint32_t most) -> bool:
        """enter_tunnel() for Python and the tests."""
        return self.enter_tunnel(route, most)

    def give_tunnel(self, uint32_t route) -> None:
        """leave_tunnel() for Python and the tests."""
        self.leave_tunnel(route)

    def tunnels(self) -> list[tuple[int, int]]:
        """(route, tunnels that are open) of each route that had any."""
        cdef uint64_t i
        return [(i if i < <uint64_t>MAX_ROUTES else OVERFLOW_ROUTE, cw_cell(&self.slot.tunnels[i]))
                for i in range(min(cw_read(&self.slot.tunnels_used), <uint64_t>MAX_ROUTES + 1)) if cw_cell(&self.slot.tunnels[i])]

    cdef TcpSeries* tcp(self, uint32_t metric) noexcept nogil:
        return find_tcp(self.slot, metric)

    def tcp_series(self) -> list[tuple[int, int, tuple[int, ...], int, int, int, int, int]]:
        """(metric, opened, ended by TCP_ENDS, bytes_in, bytes_out, connect_failures, duration_us, closed) of each; OVERFLOW comes last."""
        cdef list found = []
        cdef TcpSeries* one
        cdef uint64_t i
        for i in range(<uint64_t>MAX_TCP + 1):
            one = &self.slot.tcp[i]
            if cw_read(&one.key):
                found.append((cw_read(&one.key) - 1, cw_read(&one.opened), counts(one.ended, TCP_ENDINGS), cw_read(&one.bytes_in),
                              cw_read(&one.bytes_out), cw_read(&one.connect_failures), cw_read(&one.duration_us), cw_read(&one.closed)))
            elif i < <uint64_t>MAX_TCP and i >= cw_read(&self.slot.tcp_used):
                if not cw_read(&self.slot.tcp[MAX_TCP].key):
                    break
        return found

    def record(self, uint32_t route, uint8_t method, uint16_t status, uint64_t total_us, uint64_t upstream_us=0,
               uint64_t request_bytes=0, uint64_t response_bytes=0) -> None:
        """observe() for Python: tests and the admin process."""
        self.observe(route, method, status, total_us, upstream_us, request_bytes, response_bytes)

    def add(self, str name not None, uint64_t amount=1) -> None:
        """Add to a counter by name (KeyError if there is none). The caller is the slot's one writer."""
        cw_add(&self.counters[<int>COUNTER_IDS[name]], amount)

    def counter(self, str name not None) -> int:
        return cw_read(&self.counters[<int>COUNTER_IDS[name]])

    def set_gauge(self, str name not None, uint64_t value) -> None:
        cw_publish(&self.gauges[<int>GAUGE_IDS[name]], value)

    def gauge(self, str name not None) -> int:
        return cw_read(&self.gauges[<int>GAUGE_IDS[name]])

    def series(self) -> list[tuple[int, int, int, tuple[int, ...], int, int, int]]:
        """(route, method, status, counts per classic bucket, sum_us, request_bytes, response_bytes) of each series.

        The overflow series, if it was used, comes last with route OVERFLOW.
        """
        cdef list found = []
        cdef Series* one
        cdef uint64_t i
        for i in range(min(cw_read(&self.slot.series_used), <uint64_t>MAX_SERIES)):
            one = &self.slot.series[i]
            found.append((<uint32_t>(one.key >> 24), one.key >> 16 & 0xFF, one.key & 0xFFFF, counts(one.buckets, CLASSIC_BUCKETS),
                          one.sum_us, one.request_bytes, one.response_bytes))
        one = &self.slot.series[MAX_SERIES]
        if cw_read(&one.key):
            found.append((OVERFLOW_ROUTE, 0, 0, counts(one.buckets, CLASSIC_BUCKETS), one.sum_us, one.request_bytes,
                          one.response_bytes))
        return found

    def routes(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]]:
        """(route, bins of the total, bins of the overhead, classic buckets of the overhead, sum_us of the overhead) each."""
        cdef list found = []
        cdef RouteSeries* one
        cdef uint64_t i, used = min(cw_read(&self.slot.routes_used), <uint64_t>MAX_SERIES)
        for i in range(used + 1):
            one = &self.slot.routes[i if i < used else MAX_SERIES]
            if i == used and not cw_read(&self.slot.route_overflow):
                break
            found.append((one.route if i < used else OVERFLOW_ROUTE, counts(one.total, BINS), counts(one.overhead, BINS),
                          counts(one.overhead_buckets, CLASSIC_BUCKETS), one.overhead_sum_us))
        return found

    def absorb(self, WorkerSlot other not None) -> None:
        """Add the other slot's counters and histograms to this one; gauges stay behind."""
        cdef uint64_t i
        cdef int n
        cdef Series* series
        with nogil:
            for n in range(COUNTER_COUNT):
                cw_add(&self.counters[n], cw_read(&other.counters[n]))
            for i in range(min(cw_read(&other.slot.series_used), <uint64_t>MAX_SERIES)):
                series = &other.slot.series[i]
                add_series(find_series(self.slot, series.key), series)
            if cw_read(&other.slot.series[MAX_SERIES].key):
                add_series(overflow_series(self.slot), &other.slot.series[MAX_SERIES])
            for i in range(min(cw_read(&other.slot.routes_used), <uint64_t>MAX_SERIES)):
                add_route(find_route(self.slot, <uint32_t>other.slot.routes[i].route), &other.slot.routes[i])
            for i in range(<uint64_t>MAX_TCP + 1):
                if cw_read(&other.slot.tcp[i].key):
                    add_tcp(find_tcp(self.slot, <uint32_t>(other.slot.tcp[i].key - 1)), &other.slot.tcp[i])
                elif i >= cw_read(&other.slot.tcp_used) and not cw_read(&other.slot.tcp[MAX_TCP].key):
                    break
            if cw_read(&other.slot.route_overflow):
                add_route(overflow_route(self.slot), &other.slot.routes[MAX_SERIES])

    def clear(self) -> None:
        """Zero everything that was used; pages never touched stay untouched. Nobody may be writing the slot."""
        cdef SlotLayout* slot = self.slot
        memset(slot.series, 0, <size_t>min(slot.series_used, <uint64_t>MAX_SERIES) * sizeof(Series))
        memset(slot.routes, 0, <size_t>min(slot.routes_used, <uint64_t>MAX_SERIES) * sizeof(RouteSeries))
        if slot.series[MAX_SERIES].key:
            memset(&slot.series[MAX_SERIES], 0, sizeof(Series))
        if slot.route_overflow:
            memset(&slot.routes[MAX_SERIES], 0, sizeof(RouteSeries))
        if slot.routes_used:
            memset(slot.route_index, 0, sizeof(slot.route_index))
        memset(slot.tunnels, 0, <size_t>min(slot.tunnels_used, <uint64_t>MAX_ROUTES + 1) * sizeof(uint32_t))
        memset(slot.tcp, 0, <size_t>min(slot.tcp_used, <uint64_t>MAX_TCP) * sizeof(TcpSeries))
        if slot.tcp[MAX_TCP].key:
            memset(&slot.tcp[MAX_TCP], 0, sizeof(TcpSeries))
        memset(slot, 0, <size_t>(<char*>slot.route_index - <char*>slot))
        self.last_key = 0
        self.last_series = NULL
        self.last_route = NULL


cdef inline tuple counts(const uint64_t* cells, int length):
    return tuple([cw_read(&cells[i]) for i in range(length)])


cdef inline Series* overflow_series(SlotLayout* slot) noexcept nogil:
    cw_publish(&slot.series[MAX_SERIES].key, SERIES_MARK | <uint64_t>OVERFLOW_ROUTE << 24)
    return &slot.series[MAX_SERIES]


cdef inline RouteSeries* overflow_route(SlotLayout* slot) noexcept nogil:
    cw_publish(&slot.route_overflow, 1)
    return &slot.routes[MAX_SERIES]


cdef Series* find_series(SlotLayout* slot, uint64_t key) noexcept nogil:
    """The key's series, made if it is new; the overflow series when there are MAX_SERIES or the route has no id."""
    cdef uint32_t at = <uint32_t>((key * SERIES_HASH) >> 52)
    cdef uint64_t used = slot.series_used
    cdef uint16_t entry
    if <uint32_t>(key >> 24) >= <uint32_t>MAX_ROUTES:
        return overflow_series(slot)
    # At most MAX_SERIES of 4096 entries are taken: an empty one ends every probe. Entries are at most MAX_SERIES.
    while slot.series_index[at]:
        entry = slot.series_index[at] - 1
        if slot.series[entry].key == key:
            return &slot.series[entry]
        at = (at + 1) & INDEX_MASK
    if used >= MAX_SERIES:
        return overflow_series(slot)
    slot.series[used].key = key
    slot.series_index[at] = <uint16_t>(used + 1)
    cw_publish(&slot.series_used, used + 1)
    return &slot.series[used]


cdef TcpSeries* find_tcp(SlotLayout* slot, uint32_t metric) noexcept nogil:
    """The metric's series, made if it is new; the overflow series when there are MAX_TCP or the metric has no id."""
    cdef uint64_t i, used = slot.tcp_used
    if metric < <uint32_t>MAX_ROUTES:
        for i in range(used):                       # a handful, and once per connection
            if slot.tcp[i].key == <uint64_t>metric + 1:
                return &slot.tcp[i]
        if used < <uint64_t>MAX_TCP:
            cw_publish(&slot.tcp[used].key, <uint64_t>metric + 1)
            cw_publish(&slot.tcp_used, used + 1)
            return &slot.tcp[used]
    cw_publish(&slot.tcp[MAX_TCP].key, <uint64_t>OVERFLOW_ROUTE + 1)
    return &slot.tcp[MAX_TCP]


cdef RouteSeries* find_route(SlotLayout* slot, uint32_t route) noexcept nogil:
    cdef uint64_t used = slot.routes_used
    if route >= <uint32_t>MAX_ROUTES:
        return overflow_route(slot)
    if slot.route_index[route]:
        return &slot.routes[slot.route_index[route] - 1]
    if used >= MAX_SERIES:
        return overflow_route(slot)
    slot.routes[used].route = route
    slot.route_index[route] = <uint16_t>(used + 1)
    cw_publish(&slot.routes_used, used + 1)
    return &slot.routes[used]


cdef void add_series(Series* into, const Series* more) noexcept nogil:
    cdef int i
    for i in range(CLASSIC_BUCKETS):
        cw_add(&into.buckets[i], cw_read(&more.buckets[i]))
    cw_add(&into.sum_us, cw_read(&more.sum_us))
    cw_add(&into.request_bytes, cw_read(&more.request_bytes))
    cw_add(&into.response_bytes, cw_read(&more.response_bytes))


cdef void add_tcp(TcpSeries* into, const TcpSeries* more) noexcept nogil:
    cdef int i
    cw_add(&into.opened, cw_read(&more.opened))
    for i in range(TCP_ENDINGS):
        cw_add(&into.ended[i], cw_read(&more.ended[i]))
    cw_add(&into.bytes_in, cw_read(&more.bytes_in))
    cw_add(&into.bytes_out, cw_read(&more.bytes_out))
    cw_add(&into.connect_failures, cw_read(&more.connect_failures))
    cw_add(&into.duration_us, cw_read(&more.duration_us))
    cw_add(&into.closed, cw_read(&more.closed))


cdef void add_route(RouteSeries* into, const RouteSeries* more) noexcept nogil:
    cdef int i
    for i in range(BINS):
        cw_add(&into.total[i], cw_read(&more.total[i]))
        cw_add(&into.overhead[i], cw_read(&more.overhead[i]))
    for i in range(CLASSIC_BUCKETS):
        cw_add(&into.overhead_buckets[i], cw_read(&more.overhead_buckets[i]))
    cw_add(&into.overhead_sum_us, cw_read(&more.overhead_sum_us))


cdef enum:
    NAME_BYTES = 1 << 20
    NAME_LONGEST = 1024

cdef struct NameLayout:
    uint64_t count              # published after the name is complete
    uint64_t used               # bytes
    uint64_t reserved[6]
    uint32_t ends[MAX_ROUTES]   # name i is bytes[ends[i - 1]:ends[i]]
    char bytes[NAME_BYTES]

NAMES_BYTES: Final = sizeof(NameLayout)


@cython.final
cdef class NameTable:
    """Route names and their ids: append-only, so an id means the same over reloads and in every process.

    The supervisor is the only writer; id NO_ROUTE is the empty name.
    """

    cdef Py_buffer view
    cdef NameLayout* names
    cdef dict ids

    def __cinit__(self, buffer, Py_ssize_t offset=0):
        hold(buffer, offset, sizeof(NameLayout), &self.view)
        self.names = <NameLayout*>(<char*>self.view.buf + offset)
        self.ids = {}
        if cw_read(&self.names.count) == 0:
            self.add("")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    def add(self, str name not None) -> int:
        """The name's id, given now if it is new; OVERFLOW when 16,384 names or 1 MiB of them are in use.

        A name longer than 1,024 bytes is cut (with an ellipsis).
        """
        cdef bytes text = name.encode("utf-8", "replace")
        cdef uint64_t count = cw_read(&self.names.count), used = self.names.used
        if len(text) > NAME_LONGEST:
            text = text[:NAME_LONGEST - 3].decode("utf-8", "ignore").encode() + b"..."
        known = self.find(text.decode())
        if known is not None:
            return known
        if count >= MAX_ROUTES or used + <uint64_t>len(text) > NAME_BYTES:
            return OVERFLOW_ROUTE
        memcpy(self.names.bytes + used, <const char*>text, <size_t>len(text))
        self.names.used = used + <uint64_t>len(text)
        self.names.ends[count] = <uint32_t>self.names.used
        cw_publish(&self.names.count, count + 1)
        return count

    def find(self, str name not None) -> int | None:
        """The name's id, None if it has none yet."""
        cdef uint64_t i
        for i in range(<uint64_t>len(self.ids), cw_read(&self.names.count)):
            self.ids[self.name(i)] = i
        return self.ids.get(name)

    def name(self, uint64_t number) -> str:
        """The name of an id; IndexError if it was never given."""
        cdef uint32_t start, end
        if number >= cw_read(&self.names.count):
            raise IndexError(f"no route has the id {number}")
        start = self.names.ends[number - 1] if number else 0
        end = self.names.ends[number]
        return self.names.bytes[start:end].decode("utf-8", "replace")

    def __len__(self) -> int:
        return cw_read(&self.names.count)


@cython.final
cdef class FoldGuard:
    """A sequence number that is odd while the supervisor moves counts from one slot to another.

    A reader that sums slots compares the number before and after, and starts again if it changed or was odd.
    """

    cdef Py_buffer view
    cdef uint64_t* sequence

    def __cinit__(self, buffer, Py_ssize_t offset=0):
        hold(buffer, offset, sizeof(uint64_t), &self.view)
        self.sequence = <uint64_t*>(<char*>self.view.buf + offset)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    def __enter__(self) -> None:
        cw_bump(self.sequence)

    def __exit__(self, *_error) -> None:
        cw_bump(self.sequence)

    def read(self) -> int:
        cdef uint64_t sequence
        cw_read_fence()
        sequence = cw_read(self.sequence)
        return sequence
