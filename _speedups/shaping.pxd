"""Which upstream a request goes to when its route has several, who gets a copy of it, and faults on purpose.

Strategy: all of it is settled when the snapshot is compiled. A route with several upstreams owns one RouteEntry per choice, with that
upstream's timeouts and that split's header edits; choosing is an index, and whatever runs later reads x.route as ever. A copy for a
mirror is composed at once and sent by Python, outside the exchange: nothing that becomes of it reaches the exchange.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from gateway._speedups.exchange cimport Exchange, Shape, Step, Tap
from gateway._speedups.headers cimport Head
from gateway._speedups.histogram cimport WorkerSlot
from gateway._speedups.pool cimport Endpoint, Upstream

# By what a caller sticks to a split.
cdef enum:
    STICKY_NONE = 0
    STICKY_HEADER
    STICKY_COOKIE
    STICKY_CLIENT       # the identity that a policy established
    STICKY_SOURCE       # the client's address; an IPv6 /64 counts as one

cdef struct Wanted:
    const char* name                    # borrowed from Conditions.owned
    const char* value
    uint32_t name_len
    uint32_t value_len
    uint8_t cookie                      # of a cookie, else of a header field
    uint8_t op                          # PredicateOp
    uint8_t id                          # FieldId, F_OTHER when the header is not a known one

cdef struct CookieWalk:
    int field                           # where to go on
    uint32_t at
    const char* value                   # what was found last
    uint32_t length

# All of them have to hold; a header or cookie condition holds when any field or cookie of that name does, with `every` when all fields do.
cdef class Conditions:
    cdef Wanted* wanted
    cdef readonly int count
    cdef bint every                     # to allow by any would let the app read another value than the one that was judged
    cdef tuple owned
    cdef bint hold(self, Head* head) noexcept nogil

# A generator of its own per object, so that a test can seed it.
cdef class Dice:
    cdef uint64_t state
    cdef uint64_t next(self) noexcept
    cdef uint64_t below(self, uint64_t bound) noexcept
    cdef bint hit(self, uint64_t threshold) noexcept    # true in threshold / 2^64 of the calls; always for 2^64 - 1

cdef class Chooser:
    cdef tuple canaries                 # Conditions, in the order of the file
    cdef int canary_count
    cdef int split_count
    cdef uint64_t* upto                 # weights added up: split i has [upto[i - 1], upto[i])
    cdef double* weights
    cdef uint64_t* salts                # of the splits' names
    cdef readonly int sticky            # STICKY_*
    cdef bytes name                     # of the header (lower case) or cookie
    cdef uint8_t id
    cdef Dice dice
    # Index of a canary, else canary_count plus the index of a split.
    cdef int choose(self, Head* head, str client, const unsigned char* address) except -1
    cdef int canary(self, Head* head, int start) noexcept
    # Index of a split, one of those whose byte in `open` is not 0 (NULL: all); -1 when none of these has a weight.
    cdef int split(self, Head* head, str client, const unsigned char* address, const uint8_t* open) except -2
    cdef int by_key(self, uint64_t key, const uint8_t* open) noexcept
    cdef bint key_of(self, Head* head, str client, const unsigned char* address, uint64_t* key) except -1

cdef class Shaper(Shape):
    cdef readonly Chooser chooser       # None: one upstream
    cdef readonly tuple entries         # a RouteEntry per canary and split; one may have a Shape of its own
    cdef readonly Mirror mirror         # None: no mirror
    cdef readonly bint spare            # what leads to no endpoint that is up goes to the other choices
    cdef int instead(self, Exchange x, str client, int chosen, int64_t now) except -1

cdef class Mirror:
    cdef readonly Upstream upstream
    cdef readonly object send           # called with each Copy once it is whole
    cdef frozenset methods              # bytes
    cdef uint64_t threshold             # of 2^64
    cdef int64_t body_limit
    cdef readonly int in_flight         # taken and not finished
    cdef int in_flight_max
    cdef int turn
    cdef char* room                     # where heads are composed
    cdef Dice dice
    cdef int offer(self, Exchange x) except -1
    cdef int take(self, Exchange x, Endpoint endpoint) except -1
    cdef Endpoint endpoint(self)

cdef class Copy(Tap):
    cdef readonly Mirror mirror
    cdef readonly bytes head            # as the upstream's own would be, with its final empty line
    cdef readonly bytearray body
    cdef readonly str host              # numeric
    cdef readonly str name              # by which it was found: what TLS expects
    cdef readonly int port
    cdef readonly bint bodiless         # the answer to HEAD
    cdef WorkerSlot slot
    cdef int64_t length                 # of the body
    cdef bint launched, finished
    cdef int launch(self) except -1
    cdef void end(self, int counter) noexcept

cdef class FaultStep(Step):
    cdef readonly double delay          # seconds
    cdef readonly int abort             # status, 0: none
    cdef Conditions when
    cdef uint64_t threshold
    cdef Dice dice
    cdef int answer(self, Exchange x) except -1
