"""Splits, canaries, mirrors and faults; see shaping.pxd.

Strategy: a split without a key is a draw on the added-up weights. With a key it is weighted rendezvous hashing: split i scores
-ln(u) / weight with u a hash of (key, name of i) in (0, 1), and the lowest score wins. So a caller keeps its split while nothing
changes; a weight that grows only draws callers in, one that shrinks only lets them go, none move between the others, and the order in
the file means nothing. The hash has no secret: every worker, every gateway and every restart agree. Who chooses his key chooses his
split, as with any cookie. Python is called from here: per request that is copied to a mirror, delayed or answered by a fault.

Safety: `Wanted` borrows from the tuple `owned`, which lives as long. Request bytes are read through offsets of the Head that is
passed in, within the call. `upto`, `weights` and `salts` have split_count places, written once; every index is below it.
Mirror.room has ROOM bytes, which compose_request() is told; nothing points into it after take().
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.bytearray cimport PyByteArray_GET_SIZE
from libc.math cimport log
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp
from gateway._speedups.compose cimport compose_request
from gateway._speedups.exchange cimport *
from gateway._speedups.headers cimport *
from gateway._speedups.histogram cimport *
from gateway._speedups.http1 cimport Limits, parse_request
from gateway._speedups.pool cimport HOST_LITERAL, HOST_PRESERVE, HOST_TARGET, Endpoint, Upstream
from gateway._speedups.route_plan cimport OP_ABSENT, OP_EXACT, OP_PREFIX, OP_PRESENT
from gateway._speedups.sockets cimport cw_address_text, cw_monotonic_us
from gateway._speedups.wire cimport cw_hash

import asyncio
import ipaddress
import logging
import os

logger = logging.getLogger("crossway.shaping")

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* length) except NULL

cdef extern from *:
    """
    /* splitmix64: a draw costs a few cycles, and its state is one word. */
    static inline uint64_t cw_mix64(uint64_t z) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        return z ^ (z >> 31);
    }
    static inline uint64_t cw_draw(uint64_t *state) { return cw_mix64(*state += 0x9e3779b97f4a7c15ULL); }
    static inline uint64_t cw_scaled(uint64_t random, uint64_t bound) {
        return (uint64_t)(((__uint128_t)random * bound) >> 64);
    }
    /* Into (0, 1): 53 bits and a half, so that neither end is reached. */
    static inline double cw_unit(uint64_t v) { return ((double)(v >> 11) + 0.5) * 0x1p-53; }
    """
    uint64_t cw_mix64(uint64_t z) nogil
    uint64_t cw_draw(uint64_t* state) nogil
    uint64_t cw_scaled(uint64_t random, uint64_t bound) nogil
    double cw_unit(uint64_t v) nogil

cdef enum:
    ROOM = 131072               # what the engine gives a composed head, too
    SPLITS = 64                 # of a Shaper that spares
    HEAD_MAX = 65536            # of a request that explain() makes

cdef uint64_t CALLER = 0x63726f7373776179           # domains of cw_hash(): a caller's key and a split's name never meet
cdef uint64_t SPLIT = 0x73706c69742f7631

cdef dict OPS = {"exact": OP_EXACT, "prefix": OP_PREFIX, "present": OP_PRESENT, "absent": OP_ABSENT}


cdef uint64_t share(double percent) except? 0:
    """A percentage as a threshold for 64 random bits."""
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is no percentage")
    if percent == 100:
        return <uint64_t>-1
    return <uint64_t>(percent / 100 * 18446744073709551616.0)


# -- conditions -------------------------------------------------------------------------------------------------------

cdef bint next_cookie(const Head* head, const char* name, uint32_t length, CookieWalk* walk) noexcept nogil:
    """Finds the next cookie of that name (RFC 6265 4.2.1; names are case-sensitive) and leaves its value in `walk`."""
    cdef const Field* field
    cdef const char* p
    cdef const char* end
    cdef const char* stop
    cdef const char* equals
    while walk.field < head.count:
        field = &head.fields[walk.field]
        if field.id == F_COOKIE:
            end = head.base + field.value + field.value_len
            while walk.at < field.value_len:
                p = head.base + field.value + walk.at
                stop = <const char*>memchr(p, 59, end - p)
                if stop == NULL:
                    stop = end
                walk.at = <uint32_t>(stop - head.base) - field.value + 1
                while p < stop and (p[0] == 32 or p[0] == 9):
                    p += 1
                equals = <const char*>memchr(p, 61, stop - p)
                if equals == NULL or equals - p != length or memcmp(p, name, length) != 0:
                    continue
                while stop > equals + 1 and (stop[-1] == 32 or stop[-1] == 9):
                    stop -= 1
                walk.value = equals + 1
                walk.length = <uint32_t>(stop - equals) - 1
                return True
        walk.field += 1
        walk.at = 0
    return False


cdef inline bint matches(const Wanted* want, const char* value, uint32_t length) noexcept nogil:
    return (length == want.value_len or (want.op == OP_PREFIX and length > want.value_len)) and \
        memcmp(value, want.value, want.value_len) == 0


cdef bint cookie_holds(const Head* head, const Wanted* want) noexcept nogil:
    cdef CookieWalk walk
    walk.field = 0
    walk.at = 0
    while next_cookie(head, want.name, want.name_len, &walk):
        if want.op == OP_ABSENT or want.op == OP_PRESENT:
            return want.op == OP_PRESENT
        if matches(want, walk.value, walk.length):
            return True
    return want.op == OP_ABSENT


cdef bint header_holds(const Head* head, const Wanted* want, bint every) noexcept nogil:
    cdef int i = head.first[want.id] if want.id != F_OTHER else head_find(head, want.name, want.name_len, 0)
    if want.op == OP_ABSENT or want.op == OP_PRESENT:
        return (i < 0) == (want.op == OP_ABSENT)
    if i < 0:
        return False
    while i >= 0:
        if matches(want, head.base + head.fields[i].value, head.fields[i].value_len) != every:
            return not every
        i = head_find(head, want.name, want.name_len, i + 1)
    return every


cdef class Conditions:
    """What a request's headers and cookies must be: (name, op, value) each, as in a RouteSpec; every: in all fields of a header's name."""

    def __cinit__(self, headers=(), cookies=(), bint every=False):
        cdef int i = 0
        self.every = every
        cdef bytes name, value
        rows = [(False, *each) for each in headers] + [(True, *each) for each in cookies]
        self.wanted = <Wanted*>malloc(sizeof(Wanted) * (len(rows) + 1))
        if self.wanted == NULL:
            raise MemoryError
        owned = []
        for cookie, given, op, wanted in rows:
            name = given.encode() if cookie else given.lower().encode()
            value = wanted.encode()
            owned += [name, value]
            self.wanted[i] = Wanted(PyBytes_AS_STRING(name), PyBytes_AS_STRING(value), <uint32_t>PyBytes_GET_SIZE(name),
                                    <uint32_t>PyBytes_GET_SIZE(value), cookie, OPS[op],
                                    F_OTHER if cookie else field_id(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)))
            i += 1
        self.count = i
        self.owned = tuple(owned)

    def __dealloc__(self):
        free(self.wanted)

    cdef bint hold(self, Head* head) noexcept nogil:
        cdef int i
        for i in range(self.count):
            if not (cookie_holds(head, &self.wanted[i]) if self.wanted[i].cookie else header_holds(head, &self.wanted[i], self.every)):
                return False
        return True


# -- choosing ---------------------------------------------------------------------------------------------------------

cdef class Dice:
    """Random numbers; with a seed always the same ones."""

    def __init__(self, seed=None):
        self.state = int.from_bytes(os.urandom(8), "little") if seed is None else seed

    cdef uint64_t next(self) noexcept:
        return cw_draw(&self.state)

    cdef uint64_t below(self, uint64_t bound) noexcept:
        return cw_scaled(cw_draw(&self.state), bound)

    cdef bint hit(self, uint64_t threshold) noexcept:
        return threshold == <uint64_t>-1 or cw_draw(&self.state) < threshold


cdef class Chooser:
    """Chooses among canaries (Conditions) and splits ((name, weight) with a sum above 0).

    `sticky` is None, "header:NAME", "cookie:NAME", "client" or "source". Indexes count canaries first, then splits.
    """

    def __cinit__(self, canaries, splits, sticky=None, seed=None):
        cdef uint64_t total = 0
        cdef int i
        self.canaries = tuple(canaries)
        for each in self.canaries:
            if not isinstance(each, Conditions):
                raise TypeError(f"not conditions: {each!r}")
        self.canary_count = len(self.canaries)
        self.split_count = len(splits)
        self.upto = <uint64_t*>malloc(sizeof(uint64_t) * (self.split_count + 1))
        self.weights = <double*>malloc(sizeof(double) * (self.split_count + 1))
        self.salts = <uint64_t*>malloc(sizeof(uint64_t) * (self.split_count + 1))
        if self.upto == NULL or self.weights == NULL or self.salts == NULL:
            raise MemoryError
        for i, (name, weight) in enumerate(splits):
            encoded = name.encode()
            total += <uint32_t?>weight
            self.upto[i] = total
            self.weights[i] = weight
            self.salts[i] = cw_hash(encoded, len(encoded), SPLIT)
        if total == 0:
            raise ValueError("the weights of a split add up to 0")
        kind, _, name = (sticky or "").partition(":")
        self.sticky = {"": STICKY_NONE, "header": STICKY_HEADER, "cookie": STICKY_COOKIE, "client": STICKY_CLIENT,
                       "source": STICKY_SOURCE}[kind]
        self.name = name.lower().encode() if self.sticky == STICKY_HEADER else name.encode()
        self.id = field_id(self.name, len(self.name)) if self.sticky == STICKY_HEADER else F_OTHER
        self.dice = Dice(seed)

    def __dealloc__(self):
        free(self.upto)
        free(self.weights)
        free(self.salts)

    cdef int choose(self, Head* head, str client, const unsigned char* address) except -1:
        cdef int i = self.canary(head, 0) if self.canary_count else -1
        return i if i >= 0 else self.canary_count + self.split(head, client, address, NULL)

    cdef int split(self, Head* head, str client, const unsigned char* address, const uint8_t* open) except -2:
        cdef uint64_t key, point, weight, total = 0
        cdef int i
        if self.sticky != STICKY_NONE and self.key_of(head, client, address, &key):
            return self.by_key(key, open)
        if self.split_count == 1:
            return 0 if open == NULL or open[0] else -1
        for i in range(self.split_count):
            if open == NULL or open[i]:
                total += self.upto[i] - (self.upto[i - 1] if i else 0)
        if total == 0:
            return -1
        point = self.dice.below(total)
        for i in range(self.split_count):
            if open == NULL or open[i]:
                weight = self.upto[i] - (self.upto[i - 1] if i else 0)
                if point < weight:
                    return i
                point -= weight
        return -1                                       # not reached: point is below the sum

    cdef int canary(self, Head* head, int start) noexcept:
        """Index of the first canary from `start` on that takes the request, or -1."""
        cdef int i
        for i in range(start, self.canary_count):
            if (<Conditions>self.canaries[i]).hold(head):
                return i
        return -1

    cdef int by_key(self, uint64_t key, const uint8_t* open) noexcept:
        cdef int i, best = -1
        cdef double score, lowest = 0
        for i in range(self.split_count):
            if self.weights[i] > 0 and (open == NULL or open[i]):
                score = -log(cw_unit(cw_mix64(key ^ self.salts[i]))) / self.weights[i]
                if best < 0 or score < lowest:
                    lowest = score
                    best = i
        return best

    cdef bint key_of(self, Head* head, str client, const unsigned char* address, uint64_t* key) except -1:
        """The hash of what the caller is known by; False when the request does not say."""
        cdef CookieWalk walk
        cdef Py_ssize_t length = 0
        cdef const char* text
        cdef int i
        if self.sticky == STICKY_SOURCE:
            # One IPv6 customer has a /64: its addresses count as one.
            length = 16 if address[10] == 0xff and address[11] == 0xff and memcmp(address, b"\0\0\0\0\0\0\0\0\0\0", 10) == 0 else 8
            key[0] = cw_hash(<const char*>address, length, CALLER)
            return True
        if self.sticky == STICKY_CLIENT:
            if client is None:
                return False
            try:
                text = PyUnicode_AsUTF8AndSize(client, &length)
            except UnicodeEncodeError:              # a lone surrogate in a token's claim
                return False
            key[0] = cw_hash(text, length, CALLER)
            return True
        if self.sticky == STICKY_COOKIE:
            walk.field = 0
            walk.at = 0
            if not next_cookie(head, PyBytes_AS_STRING(self.name), <uint32_t>PyBytes_GET_SIZE(self.name), &walk) or walk.length == 0:
                return False
            key[0] = cw_hash(walk.value, walk.length, CALLER)
            return True
        i = head.first[self.id] if self.id != F_OTHER else \
            head_find(head, PyBytes_AS_STRING(self.name), PyBytes_GET_SIZE(self.name), 0)
        if i < 0 or head.fields[i].value_len == 0:
            return False
        key[0] = cw_hash(head.base + head.fields[i].value, head.fields[i].value_len, CALLER)
        return True

    def of_key(self, bytes key not None) -> int:
        """The split, from 0, of a caller known by these bytes."""
        return self.by_key(cw_hash(key, len(key), CALLER), NULL)

    def explain(self, list fields not None, str client=None, str source=None):
        """Where a request with these header fields (name and value, bytes) goes: ("canary" | "sticky", index), or ("weight", -1)
        when only chance decides. Raises ValueError for fields that are refused before it comes to that."""
        cdef Head head
        cdef Limits limits
        cdef unsigned char address[16]
        cdef uint64_t key
        cdef int i
        cdef bytes packed
        request = b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"
        limits.head = HEAD_MAX
        limits.target = 16
        limits.fields = MAX_FIELDS
        head_reset(&head)
        head.base = request
        if parse_request(request, <uint32_t>len(request), &head, &limits) != <int>len(request):
            raise ValueError("the headers are not valid")
        i = self.canary(&head, 0)
        if i >= 0:
            return "canary", i
        for i in range(16):
            address[i] = 0
        if self.sticky == STICKY_SOURCE:
            if source is None:
                return "weight", -1
            parsed = ipaddress.ip_address(source)
            packed = parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff\xff" + parsed.packed
            for i in range(16):
                address[i] = <unsigned char>packed[i]
        if self.sticky != STICKY_NONE and self.key_of(&head, client, address, &key):
            return "sticky", self.by_key(key, NULL)
        return "weight", -1

    def draw(self) -> int:
        """The split, from 0, of a request that does not say whose it is."""
        cdef Head head
        head_reset(&head)
        cdef int sticky = self.sticky, canaries = self.canary_count
        self.sticky, self.canary_count = STICKY_NONE, 0
        try:
            return self.choose(&head, None, NULL)
        finally:
            self.sticky, self.canary_count = sticky, canaries


cdef class Shaper(Shape):
    """A route's choice and its mirror. `entries` holds a RouteEntry per index of the chooser.

    `spare`: a choice without an endpoint that is up is passed over. A canary's request goes to the next canary that takes it, else by
    the splits; a split's share goes to the others that have a weight, in proportion. When none is up, the choice stays as it fell.
    """

    def __init__(self, Chooser chooser, tuple entries, Mirror mirror=None, *, bint spare=False):
        if chooser is not None and len(entries) != chooser.canary_count + chooser.split_count:
            raise ValueError("a route entry is needed for every canary and split")
        if spare and (chooser is None or chooser.split_count > SPLITS):
            raise ValueError(f"there is nothing to spare, or there are more than {SPLITS} splits")
        for entry in entries:
            if not isinstance(entry, RouteEntry):
                raise TypeError(f"not a route entry: {entry!r}")
        self.chooser = chooser
        self.entries = entries
        self.mirror = mirror
        self.spare = spare

    cdef int apply(self, Exchange x) except -1:
        cdef RouteEntry entry
        cdef str client = None
        cdef int64_t now
        cdef int chosen
        if self.chooser is not None:
            if self.chooser.sticky == STICKY_CLIENT and x.principal is not None:
                client = x.principal.client
            chosen = self.chooser.choose(x.head, client, x.client)
            if self.spare:
                now = cw_monotonic_us()
                if not (<RouteEntry>self.entries[chosen]).upstream.offers(now):
                    chosen = self.instead(x, client, chosen, now)
            entry = <RouteEntry>self.entries[chosen]
            entry.captures = x.route.captures
            x.route = entry
            x.total_at = x.started + entry.total_us
            if entry.shape is not None:
                entry.shape.apply(x)
        if self.mirror is not None:
            self.mirror.offer(x)
        return 0

    cdef int instead(self, Exchange x, str client, int chosen, int64_t now) except -1:
        # `open` has SPLITS places, and split_count was checked to be no more.
        cdef uint8_t open[SPLITS]
        cdef Chooser chooser = self.chooser
        cdef int i = chosen
        while 0 <= i < chooser.canary_count:
            i = chooser.canary(x.head, i + 1)
            if i >= 0 and (<RouteEntry>self.entries[i]).upstream.offers(now):
                return i
        for i in range(chooser.split_count):
            open[i] = (<RouteEntry>self.entries[chooser.canary_count + i]).upstream.offers(now)
        i = chooser.split(x.head, client, x.client, open)
        if i < 0 and chosen < chooser.canary_count:
            i = chooser.split(x.head, client, x.client, NULL)
        return chosen if i < 0 else chooser.canary_count + i


# -- mirrors ----------------------------------------------------------------------------------------------------------

cdef class Mirror:
    """Copies a share (percent) of a route's requests for another upstream.

    send: takes a whole Copy and sees to it that Copy.finish() is called once; what it raises is the copy's failure.
    """

    def __cinit__(self, Upstream upstream not None, *, send, methods, double percent=100.0, int64_t body=65536, int in_flight=64,
                  seed=None):
        self.room = <char*>malloc(ROOM)
        if self.room == NULL:
            raise MemoryError
        self.upstream = upstream
        self.send = send
        self.methods = frozenset(method.encode("ascii") for method in methods)
        self.threshold = share(percent)
        self.body_limit = body
        self.in_flight_max = in_flight
        self.dice = Dice(seed)

    def __dealloc__(self):
        free(self.room)

    cdef int offer(self, Exchange x) except -1:
        """Takes a copy of the request if it is one to be copied. Whatever goes wrong is the copy's loss."""
        cdef Endpoint endpoint
        cdef bint skip
        if not self.dice.hit(self.threshold):
            return 0
        if PyBytes_FromStringAndSize(x.head.base + x.head.method_at, x.head.method_len) not in self.methods:
            return 0
        if x.collected is not None:
            skip = PyByteArray_GET_SIZE(x.collected) > self.body_limit
        else:
            skip = not x.body.done and (x.body.mode != BODY_LENGTH or x.body.remaining > self.body_limit)
        if skip or x.upgrade:                       # a copy of a handshake would lead nowhere
            x.slot.counters[C_MIRROR_SKIPPED] += 1
            return 0
        if self.in_flight >= self.in_flight_max:
            x.slot.counters[C_MIRROR_DROPPED] += 1
            return 0
        endpoint = self.endpoint()
        if endpoint is None:                        # none was found yet
            x.slot.counters[C_MIRROR_FAILED] += 1
            return 0
        try:
            self.take(x, endpoint)
        except Exception as error:
            x.slot.counters[C_MIRROR_FAILED] += 1
            logger.error("a copy for a mirror could not be made", exc_info=error)
        return 0

    cdef int take(self, Exchange x, Endpoint endpoint) except -1:
        cdef Copy copy = Copy.__new__(Copy)
        cdef char text[48]
        cdef uint16_t port = 0
        cdef int n
        n = cw_address_text(&endpoint.sockaddr, text, sizeof(text), &port)
        copy.host = text[:n].decode("ascii")
        copy.name = endpoint.host
        copy.port = port
        x.upstream, x.endpoint = self.upstream, endpoint
        try:
            n = compose_request(x, self.room, ROOM, cw_monotonic_us())
        finally:
            x.upstream = x.endpoint = None
        if n < 0:
            raise ValueError("the head is too large")
        copy.mirror = self
        copy.slot = x.slot
        copy.head = PyBytes_FromStringAndSize(self.room, n)
        copy.bodiless = x.head.method == M_HEAD
        copy.body = bytearray() if x.collected is None else bytearray(x.collected)
        self.in_flight += 1
        if x.body.done or x.collected is not None:
            return copy.launch()
        copy.length = x.body.remaining
        x.tap = copy
        return 0

    cdef Endpoint endpoint(self):
        """The endpoints one after the other; None when there is none (yet)."""
        cdef int n = len(self.upstream.endpoints)
        if n == 0:
            return None
        self.turn = (self.turn + 1) % n
        return <Endpoint>self.upstream.endpoints[self.turn]

    @property
    def host(self):
        """The Host to send: None for that of the request, "" for the endpoint's own, else the name."""
        if self.upstream.host_mode == HOST_PRESERVE:
            return None
        return "" if self.upstream.host_mode == HOST_TARGET else self.upstream.host_literal.decode("ascii")


cdef class Copy(Tap):
    """A request on its way to a mirror: Mirror.send() gets it when it is whole, and calls finish() at its end."""

    cdef int take(self, Exchange x, const char* data, uint32_t n) except -1:
        """Gathers the body. A piece that was sent before (the upstream connection was lost, and another took over) is known
        by its place."""
        cdef int64_t at = <int64_t>x.body.bytes - n, have = PyByteArray_GET_SIZE(self.body)
        if self.launched or self.finished:
            return 0
        if at > have or at + n > self.length:
            self.end(C_MIRROR_FAILED)
            return 0
        if at + n > have:
            self.body += PyBytes_FromStringAndSize(data + (have - at), at + n - have)
        if PyByteArray_GET_SIZE(self.body) == self.length:
            self.launch()
        return 0

    cdef int launch(self) except -1:
        self.launched = True
        try:
            self.mirror.send(self)
        except Exception as error:
            logger.error("a copy for a mirror could not be sent", exc_info=error)
            self.end(C_MIRROR_FAILED)
        return 0

    cdef void give_up(self) noexcept:
        """The request never became whole: nothing is sent, nothing is counted."""
        if not self.launched and not self.finished:
            self.finished = True
            self.mirror.in_flight -= 1

    cdef void end(self, int counter) noexcept:
        if not self.finished:
            self.finished = True
            self.mirror.in_flight -= 1
            self.slot.counters[counter] += 1

    def finish(self, int status) -> None:
        """The copy was answered with `status`, or not at all (0)."""
        if 200 <= status <= 599:
            self.end(C_MIRRORED_2XX + status // 100 - 2)
        else:
            self.end(C_MIRROR_FAILED)


# -- faults -----------------------------------------------------------------------------------------------------------

cdef class FaultStep(Step):
    """Delays a share of the matching requests, then answers them instead of the upstream if `abort` is a status."""

    def __init__(self, str name, *, double delay=0.0, int abort=0, double percent=100.0, Conditions when=None, seed=None):
        self.phase = PHASE_TRANSFORM
        self.name = name
        self.delay = delay
        self.abort = abort
        self.when = when
        self.threshold = share(percent)
        self.dice = Dice(seed)

    cdef int run(self, Exchange x) except -1:
        if (self.when is not None and not self.when.hold(x.head)) or not self.dice.hit(self.threshold):
            return STEP_GO
        if self.delay > 0:
            x.slot.counters[C_FAULT_DELAYS] += 1
            return STEP_PARK
        return self.answer(x)

    cdef object park(self, Exchange x):
        return asyncio.sleep(self.delay)

    cdef int resumed(self, Exchange x, object result) except -1:
        if self.abort:
            return self.answer(x)
        x.add_answer_header(b"x-crossway-fault: delay\r\n")
        return STEP_GO

    cdef int answer(self, Exchange x) except -1:
        x.slot.counters[C_FAULT_ABORTS] += 1
        x.refuse(self.abort, b"fault-injected", b"a fault policy answered this request; it was not sent")
        x.reply_headers = b"x-crossway-fault: abort\r\n" if self.delay == 0 else b"x-crossway-fault: delay, abort\r\n"
        return STEP_ANSWERED
