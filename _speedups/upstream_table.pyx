"""The table of upstreams and endpoints in shared memory: who has which slot, and what is in all of them.

Strategy: two arrays of slots, each with an array of keys before it (a hash of the labels; 0 is free), so that looking for one
touches no page of the others. Opening a slot takes the table's lock: a word with the index of the process that holds it, for
microseconds, while a snapshot is built. The supervisor takes it back from a process that it has reaped, so the lock is never
held by nobody; whoever does not get it in time counts alone, as with a full table, and traffic is served.

A slot is in use while a process has it open (its `uses` cells). One that nobody uses keeps what it knows, and is found again by
its labels, until another endpoint (ten minutes later at the earliest, unless the table is full) or another upstream needs the place: so a
table holds the endpoints of ten minutes, not all those of a long life, of which every one would be 2 KiB of memory. Process 0 is the active checker, worker n is process n + 1.
Python is called from here: while a snapshot is built, per reaped process, per scrape.

Safety: size_for() of the same three figures is checked against the buffer, and slots lie at multiples of their size in it.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from gateway._speedups.shared_words cimport sw_add, sw_load, sw_load32, sw_look, sw_put, sw_put32, sw_store, sw_swap
from gateway._speedups.upstream_state cimport (
    ACTIVE_UNHEALTHY, E_COUNTERS, EndpointBlock, EndpointSlot, EndpointState, GENERATION_MASK, OPEN, OUT, PROBING, Places,
    SECONDS, TEXT_BYTES, Tally, U_COUNTERS, UpstreamBlock, UpstreamSlot, UpstreamState, endpoint_at, exponent_of,
    generation_after, health_word, prober, read_text, ring_total, state_of, upstream_at,
)
from gateway._speedups import upstream_state as names

import mmap
import time

cdef enum:
    HEADER_BYTES = 64
    H_MAGIC = 0
    H_CELLS = 1
    H_UPSTREAMS = 2
    H_ENDPOINTS = 3
    H_LOCK = 4                  # 0 free, 1 the supervisor, process + 1 of any other
    H_PROCESSES = 5             # cells in use: never falls, so what lies beyond was never written
    H_FULL = 6
    SUPERVISOR = 1
    USES = 1                    # the second kind of cells; before it: in flight
    UPSTREAM_CELLS = 4
    ENDPOINT_CELLS = 2
    LOOKED_AT = 8               # places, for each new endpoint: while more than one in eight is forgotten, no other is begun

cdef uint64_t MAGIC = 0x3153505557435243        # "CRCWUPS1", little-endian
LOCK_PATIENCE = 0.25            # seconds; a holder needs microseconds, unless it was stopped or killed

CHECKER = -1                    # the index of the process that checks actively


cdef int64_t monotonic_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000 + now.tv_nsec // 1000


cdef uint64_t hash_labels(bytes labels) noexcept:
    """FNV-1a and a finish; the labels come from the configuration and from name servers it names, and are compared besides."""
    cdef uint64_t h = <uint64_t>0xcbf29ce484222325
    cdef const unsigned char* text = labels
    cdef Py_ssize_t i
    for i in range(len(labels)):
        h = (h ^ text[i]) * <uint64_t>0x100000001b3
    h ^= h >> 33
    h *= <uint64_t>0xff51afd7ed558ccd
    h ^= h >> 33
    return h if h else 1


cdef bytes clipped(str text):
    """The text as it is kept: at most TEXT_BYTES - 1 bytes, no half characters."""
    return text.encode("utf-8", "replace")[:TEXT_BYTES - 1].decode("utf-8", "ignore").encode().replace(b"\0", b"")


cdef void write_text(char* into, bytes text) noexcept:
    memset(into, 0, TEXT_BYTES)
    memcpy(into, <const char*>text, <size_t>len(text))         # clipped(): shorter than TEXT_BYTES


cdef bint same_text(const char* kept, bytes text) noexcept:
    return memcmp(kept, <const char*>text, <size_t>len(text) + 1) == 0


cdef inline size_t lines(size_t size) noexcept nogil:
    return (size + 63) // 64 * 64


@cython.final
@cython.no_gc_clear          # states that are garbage together with it still write into its buffer
cdef class UpstreamTable:
    """The table at `offset` of a writable buffer; formatted by the first one that opens it, before the workers are forked.

    Raises ValueError when the buffer is too small or was formatted for other figures.
    """

    cdef Py_buffer view                     # held for the life of the object: keeps the mapping in place
    cdef uint64_t* header                   # magic, cells, upstreams, endpoints, lock, cells in use, full
    cdef uint64_t* upstream_keys
    cdef uint64_t* endpoint_keys
    cdef char* upstream_slots
    cdef char* endpoint_slots
    cdef size_t upstream_bytes, endpoint_bytes, stride
    cdef readonly int workers, upstreams_max, endpoints_max
    cdef public int64_t remembered_us       # how long an endpoint that nobody uses has its place for itself
    cdef Py_ssize_t hand                    # the place of an endpoint that is looked at next

    def __cinit__(self, buffer, Py_ssize_t offset, int workers, int upstreams, int endpoints):
        cdef uint64_t cells = <uint64_t>workers + 1
        size = self.size_for(workers, upstreams, endpoints)
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        if offset < 0 or offset + size > self.view.len:
            raise ValueError("the table of upstreams does not fit into the buffer")
        if (<uintptr_t>self.view.buf + <uintptr_t>offset) % 64:
            raise ValueError("the table of upstreams must start at a multiple of 64 bytes")
        self.workers, self.upstreams_max, self.endpoints_max = workers, upstreams, endpoints
        self.remembered_us = 600_000_000
        self.stride = lines(<size_t>cells * sizeof(uint32_t))
        self.upstream_bytes = sizeof(UpstreamSlot) + UPSTREAM_CELLS * self.stride + <size_t>(cells + 1) * sizeof(UpstreamBlock)
        self.endpoint_bytes = sizeof(EndpointSlot) + ENDPOINT_CELLS * self.stride + <size_t>(cells + 1) * sizeof(EndpointBlock)
        self.header = <uint64_t*>(<char*>self.view.buf + offset)
        self.upstream_keys = self.header + HEADER_BYTES // 8
        self.endpoint_keys = self.upstream_keys + upstreams
        self.upstream_slots = <char*>self.header + HEADER_BYTES + lines((<size_t>upstreams + <size_t>endpoints) * 8)
        self.endpoint_slots = self.upstream_slots + <size_t>upstreams * self.upstream_bytes
        if sw_load(&self.header[H_MAGIC]) != MAGIC:
            self.header[H_CELLS], self.header[H_UPSTREAMS], self.header[H_ENDPOINTS] = cells, <uint64_t>upstreams, <uint64_t>endpoints
            sw_store(&self.header[H_MAGIC], MAGIC)
        elif (self.header[H_CELLS] != cells or self.header[H_UPSTREAMS] != <uint64_t>upstreams
              or self.header[H_ENDPOINTS] != <uint64_t>endpoints):
            raise ValueError("the table of upstreams was made for other figures")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)        # does nothing if the buffer was never taken

    @staticmethod
    def size_for(int workers, int upstreams, int endpoints) -> int:
        """Bytes that such a table takes. Raises ValueError unless there is at least one of each, and at most 1,024 workers."""
        cdef size_t cells = <size_t>workers + 1, stride = lines(cells * sizeof(uint32_t))
        if not (1 <= workers <= 1024 and 1 <= upstreams <= 65_536 and 1 <= endpoints <= 65_536):
            raise ValueError("a table of upstreams is for 1 to 1024 workers and up to 65,536 upstreams and endpoints")
        return (HEADER_BYTES + lines((<size_t>upstreams + <size_t>endpoints) * 8)
                + <size_t>upstreams * (sizeof(UpstreamSlot) + UPSTREAM_CELLS * stride + (cells + 1) * sizeof(UpstreamBlock))
                + <size_t>endpoints * (sizeof(EndpointSlot) + ENDPOINT_CELLS * stride + (cells + 1) * sizeof(EndpointBlock)))

    @property
    def full_count(self) -> int:
        """How often an upstream or endpoint found no place and is counted by its process alone."""
        return sw_load(&self.header[H_FULL])

    # -- opening

    def upstream(self, int worker, str name not None) -> UpstreamState:
        """The upstream's state for one process: worker 0 and up, or CHECKER."""
        cdef UpstreamState state = self.open_upstream(worker, clipped(name), name)
        if state is None:
            self.note_full()
            return alone().alone_upstream(name)
        return state

    def endpoint(self, int worker, str upstream not None, str address not None, *, str target=None, str zone=None,
                 uint32_t weight=1, int64_t now_us=0) -> EndpointState:
        """The state of an upstream's endpoint at `address`; target, zone and weight are only shown.

        A new endpoint counts as in use since `now_us`, by default the monotonic clock's time.
        """
        cdef EndpointState state
        cdef int64_t now = now_us if now_us else monotonic_us()
        cdef tuple labels = (clipped(upstream), clipped(address), clipped(target or ""), clipped(zone or ""))
        state = self.open_endpoint(worker, labels, weight, now, address)
        if state is None:
            self.note_full()
            return alone().alone_endpoint(<bytes>labels[0], address, now)
        return state

    cdef UpstreamState open_upstream(self, int worker, bytes text, str name):
        """The state over the slot of these labels; None when there is none to be had."""
        cdef Places places
        cdef UpstreamSlot* slot
        cdef uint64_t key = hash_labels(b"u\0" + text)
        cdef Py_ssize_t at
        if not self.lock(worker):
            return None
        try:
            at = self.find_upstream(key, text)
            if at < 0:
                at = self.free_place(self.upstream_keys, self.upstreams_max, True)
                if at < 0:
                    return None
                self.upstream_places(at, worker, &places)
                slot = <UpstreamSlot*>places.slot
                sw_store(&self.upstream_keys[at], 0)
                self.wipe(places.slot, sizeof(UpstreamSlot), UPSTREAM_CELLS, sizeof(UpstreamBlock))
                memcpy(slot.name, <const char*>text, <size_t>len(text))     # clipped(): shorter than TEXT_BYTES
            self.upstream_places(at, worker, &places)
            slot = <UpstreamSlot*>places.slot
            slot.touched = <uint64_t>monotonic_us()
            state = upstream_at(self, name, &places, True)
            sw_store(&self.upstream_keys[at], key)
            return state
        finally:
            sw_store(&self.header[H_LOCK], 0)

    cdef EndpointState open_endpoint(self, int worker, tuple labels, uint32_t weight, int64_t now, str address):
        cdef Places places
        cdef EndpointSlot* slot
        cdef bytes name = labels[0], text = labels[1]
        cdef uint64_t key = hash_labels(b"e\0" + name + b"\0" + text)
        cdef Py_ssize_t at
        if not self.lock(worker):
            return None
        try:
            at = self.find_endpoint(key, name, text)
            if at < 0:
                at = self.forgotten_place()
                if at < 0:
                    at = self.free_place(self.endpoint_keys, self.endpoints_max, False)
                if at < 0:
                    return None
                self.endpoint_places(at, worker, &places)
                slot = <EndpointSlot*>places.slot
                sw_store(&self.endpoint_keys[at], 0)
                self.wipe(places.slot, sizeof(EndpointSlot), ENDPOINT_CELLS, sizeof(EndpointBlock))
                write_text(slot.upstream, name)
                write_text(slot.address, text)
                first_health(slot, now)
            self.endpoint_places(at, worker, &places)
            slot = <EndpointSlot*>places.slot
            relabel(slot, <bytes>labels[2], <bytes>labels[3], weight)
            sw_store(&slot.touched, <uint64_t>monotonic_us())
            state = endpoint_at(self, address, &places, True)
            sw_store(&self.endpoint_keys[at], key)
            return state
        finally:
            sw_store(&self.header[H_LOCK], 0)

    cdef UpstreamState alone_upstream(self, str name):
        """The first upstream of a table that one process has for itself, whatever it is called."""
        cdef Places places
        sw_store(&self.header[H_PROCESSES], 2)
        self.upstream_places(0, 0, &places)
        return upstream_at(self, name, &places, False)

    cdef EndpointState alone_endpoint(self, bytes upstream, str address, int64_t now_us):
        """The first endpoint of such a table."""
        cdef Places places
        sw_store(&self.header[H_PROCESSES], 2)
        self.endpoint_places(0, 0, &places)
        first_health(<EndpointSlot*>places.slot, now_us)
        write_text((<EndpointSlot*>places.slot).upstream, upstream)
        return endpoint_at(self, address, &places, False)

    # -- places; `at` is always less than upstreams_max or endpoints_max

    cdef void upstream_places(self, Py_ssize_t at, int worker, Places* places) noexcept nogil:
        places.slot = self.upstream_slots + <size_t>at * self.upstream_bytes
        places.cells = places.slot + sizeof(UpstreamSlot)
        places.blocks = places.cells + UPSTREAM_CELLS * self.stride + sizeof(UpstreamBlock)
        places.stride, places.processes, places.index = self.stride, &self.header[H_PROCESSES], <uint32_t>(worker + 1)

    cdef void endpoint_places(self, Py_ssize_t at, int worker, Places* places) noexcept nogil:
        places.slot = self.endpoint_slots + <size_t>at * self.endpoint_bytes
        places.cells = places.slot + sizeof(EndpointSlot)
        places.blocks = places.cells + ENDPOINT_CELLS * self.stride + sizeof(EndpointBlock)
        places.stride, places.processes, places.index = self.stride, &self.header[H_PROCESSES], <uint32_t>(worker + 1)

    cdef Py_ssize_t find_upstream(self, uint64_t key, bytes name) noexcept:
        cdef Py_ssize_t at
        cdef Places places
        for at in range(self.upstreams_max):
            if sw_look(&self.upstream_keys[at]) == key:
                self.upstream_places(at, 0, &places)
                if same_text((<UpstreamSlot*>places.slot).name, name):
                    return at
        return -1

    cdef Py_ssize_t find_endpoint(self, uint64_t key, bytes name, bytes address) noexcept:
        cdef Py_ssize_t at
        cdef Places places
        for at in range(self.endpoints_max):
            if sw_look(&self.endpoint_keys[at]) == key:
                self.endpoint_places(at, 0, &places)
                if same_text((<EndpointSlot*>places.slot).upstream, name) and same_text(
                        (<EndpointSlot*>places.slot).address, address):
                    return at
        return -1

    cdef Py_ssize_t forgotten_place(self) noexcept:
        """The place of an endpoint that nobody has used for a while, among the next few; -1: of none of them."""
        cdef int64_t long_ago = monotonic_us() - self.remembered_us
        cdef Py_ssize_t at
        cdef Places places
        cdef int i
        for i in range(LOOKED_AT):
            if self.hand >= self.endpoints_max or sw_look(&self.endpoint_keys[self.hand]) == 0:
                self.hand = 0               # places are taken from the first on: what lies beyond was never used
            at = self.hand
            self.hand += 1
            if sw_look(&self.endpoint_keys[at]) == 0:
                return -1
            self.endpoint_places(at, 0, &places)
            if self.users(&places) == 0 and <int64_t>sw_load(&(<EndpointSlot*>places.slot).touched) < long_ago:
                return at
        return -1

    cdef Py_ssize_t free_place(self, const uint64_t* keys, int count, bint upstream) noexcept:
        """A place that was never used, else the one that nobody uses and that was opened longest ago; -1: none."""
        cdef Py_ssize_t at, best = -1
        cdef uint64_t touched, oldest = 0
        cdef Places places
        for at in range(count):
            if sw_look(&keys[at]) == 0:
                return at
        for at in range(count):
            if upstream:
                self.upstream_places(at, 0, &places)
                touched = (<UpstreamSlot*>places.slot).touched
            else:
                self.endpoint_places(at, 0, &places)
                touched = (<EndpointSlot*>places.slot).touched
            if self.users(&places) == 0 and (best < 0 or touched < oldest):
                best, oldest = at, touched
        return best

    cdef uint32_t users(self, const Places* places) noexcept nogil:
        """By how many states of all processes the slot is open."""
        cdef uint32_t found = 0
        cdef uint64_t i
        for i in range(sw_load(&self.header[H_PROCESSES])):
            found += sw_load32(<const uint32_t*>(places.cells + places.stride) + i)
        return found

    cdef void wipe(self, char* slot, size_t head, size_t cells, size_t block) noexcept nogil:
        """Zero a slot, as far as any process has ever written: those that never ran have not."""
        cdef size_t processes = <size_t>sw_load(&self.header[H_PROCESSES])
        memset(slot, 0, head + cells * self.stride + (processes + 1) * block)

    # -- the lock

    cdef bint lock(self, int worker) except -1:
        """Take the table for a moment; False when its holder does not give it back."""
        if not -1 <= worker < self.workers:
            raise ValueError(f"there is no worker {worker}")
        if not self.try_lock(<uint64_t>(worker + 2)):
            return False
        if sw_load(&self.header[H_PROCESSES]) < <uint64_t>(worker + 2):
            sw_store(&self.header[H_PROCESSES], <uint64_t>(worker + 2))
        return True

    cdef bint try_lock(self, uint64_t who) except -1:
        give_up = None
        while not sw_swap(&self.header[H_LOCK], 0, who):
            if give_up is None:
                give_up = time.monotonic() + LOCK_PATIENCE
            elif time.monotonic() > give_up:
                return False
            time.sleep(0.0005)
        return True

    cdef void note_full(self) noexcept nogil:
        cdef uint64_t before = sw_load(&self.header[H_FULL])
        while not sw_swap(&self.header[H_FULL], before, before + 1):
            before = sw_load(&self.header[H_FULL])

    # -- the end of a process

    def bury(self, int worker) -> None:
        """Clear the cells of a process that was reaped (CHECKER or a worker) and move its counts to those of the ended.

        Only the supervisor may call it, after waitpid() has returned the process.
        """
        cdef Py_ssize_t at
        cdef Places places
        if not -1 <= worker < self.workers:
            raise ValueError(f"there is no worker {worker}")
        sw_swap(&self.header[H_LOCK], <uint64_t>(worker + 2), 0)
        # Whoever holds the lock and was stopped will find slots that nobody uses; it does no harm to go on without it.
        locked = self.try_lock(SUPERVISOR)
        for at in range(self.upstreams_max):
            if sw_look(&self.upstream_keys[at]):
                self.upstream_places(at, worker, &places)
                bury_upstream(&places)
        for at in range(self.endpoints_max):
            if sw_look(&self.endpoint_keys[at]):
                self.endpoint_places(at, worker, &places)
                bury_endpoint(&places)
        if locked:
            sw_store(&self.header[H_LOCK], 0)

    # -- what there is

    def upstreams(self, int64_t now_us) -> list[dict[str, object]]:
        """All upstreams that a process uses, as figures of all processes together."""
        cdef Py_ssize_t at
        cdef Places places
        found = []
        for at in range(self.upstreams_max):
            if sw_load(&self.upstream_keys[at]):
                self.upstream_places(at, 0, &places)
                if self.users(&places):
                    found.append(self.upstream_row(&places, now_us))
        return found

    def endpoints(self, int64_t now_us) -> list[dict[str, object]]:
        """All endpoints that a process uses."""
        cdef Py_ssize_t at
        cdef Places places
        found = []
        for at in range(self.endpoints_max):
            if sw_load(&self.endpoint_keys[at]):
                self.endpoint_places(at, 0, &places)
                if self.users(&places):
                    row = self.endpoint_row(&places, now_us)
                    if row is not None:
                        found.append(row)
        return found

    cdef uint32_t cells(self, const Places* places, int kind) noexcept nogil:
        cdef uint32_t found = 0
        cdef uint64_t i
        for i in range(sw_load(&self.header[H_PROCESSES])):
            found += sw_load32(<const uint32_t*>(places.cells + kind * places.stride) + i)
        return found

    cdef dict upstream_row(self, const Places* places, int64_t now_us):
        cdef const UpstreamSlot* slot = <const UpstreamSlot*>places.slot
        cdef const UpstreamBlock* blocks = <const UpstreamBlock*>places.blocks - 1
        cdef uint64_t good = 0, bad = 0, i, processes = sw_load(&self.header[H_PROCESSES])
        cdef uint64_t[U_COUNTERS] sums
        cdef int n
        cdef int64_t left
        memset(sums, 0, sizeof(sums))
        for i in range(processes + 1):
            ring_total(blocks[i].budget, <uint64_t>now_us // 1000000, 0, &good, &bad)
            for n in range(U_COUNTERS):
                sums[n] += sw_look(&blocks[i].counters[n])
        left = (<int64_t>(good * slot.budget_ratio) + <int64_t>slot.budget_reserve * SECONDS * 1000 - <int64_t>bad * 1000)
        return {
            "name": read_text(slot.name),
            "limit": slot.limit,
            "adaptive_limit": slot.adaptive.limit or None,
            "min_rtt_us": slot.adaptive.min_rtt_us or None,
            "in_flight": self.cells(places, 0),
            "queued": self.cells(places, 2),
            "connections": self.cells(places, 3),
            "budget_left": max(left, 0) // 1000,
            "counters": {name: sums[number] for number, name in enumerate(names.UPSTREAM_COUNTERS)},
        }

    cdef dict endpoint_row(self, const Places* places, int64_t now_us):
        """None when the labels were being changed, which lasts less than a microsecond unless the process was killed in it."""
        cdef const EndpointSlot* slot = <const EndpointSlot*>places.slot
        cdef const EndpointBlock* blocks = <const EndpointBlock*>places.blocks - 1
        cdef uint64_t good = 0, bad = 0, ewma = 0, known = 0, i, version = sw_load(&slot.version)
        cdef uint64_t processes = sw_load(&self.header[H_PROCESSES]), health = sw_load(&slot.health)
        cdef uint64_t[E_COUNTERS] sums
        cdef int n
        memset(sums, 0, sizeof(sums))
        for i in range(processes + 1):
            ring_total(blocks[i].window, <uint64_t>now_us // 1000000, health & GENERATION_MASK, &good, &bad)
            for n in range(E_COUNTERS):
                sums[n] += sw_look(&blocks[i].counters[n])
            if sw_look(&blocks[i].ewma_us):
                ewma += sw_look(&blocks[i].ewma_us)
                known += 1
        row = {
            "upstream": read_text(slot.upstream),
            "address": read_text(slot.address),
            "target": read_text(slot.target),
            "zone": read_text(slot.zone),
            "weight": slot.weight,
            "state": state_name(health, slot.active, now_us),
            "active": ("unknown", "healthy", "unhealthy", "unknown")[slot.active & 3 if slot.active >> 2 > <uint64_t>now_us else 0],
            "ejected_for_us": max(<int64_t>(health >> 24) * 1000 - now_us, 0) if state_of(health) == OUT else 0,
            "in_flight": self.cells(places, 0),
            "ewma_us": ewma // known if known else None,
            "window": (good, bad),
            "counters": {name: sums[number] for number, name in enumerate(names.ENDPOINT_COUNTERS) if name},
        }
        return row if version % 2 == 0 and sw_load(&slot.version) == version else None


cdef UpstreamTable alone():
    """A table of one process, for what found no place."""
    return UpstreamTable(mmap.mmap(-1, UpstreamTable.size_for(1, 1, 1)), 0, 1, 1, 1)


cdef str state_name(uint64_t health, uint64_t active, int64_t now_us):
    if state_of(health) == PROBING and health >> 24 > <uint64_t>now_us // 1000:
        return "probing"
    if state_of(health) >= OUT:
        return "ejected" if health >> 24 > <uint64_t>now_us // 1000 else "probe due"
    return "unhealthy" if active & 3 == ACTIVE_UNHEALTHY and active >> 2 > <uint64_t>now_us else "up"


cdef void first_health(EndpointSlot* slot, int64_t now_us) noexcept nogil:
    sw_put(&slot.opened, <uint64_t>now_us)
    sw_put(&slot.health, health_word(0, OPEN, 0, 1))


cdef void relabel(EndpointSlot* slot, bytes target, bytes zone, uint32_t weight) noexcept:
    if not (slot.version % 2 == 0 and same_text(slot.target, target) and same_text(slot.zone, zone) and slot.weight == weight):
        sw_store(&slot.version, slot.version | 1)
        write_text(slot.target, target)
        write_text(slot.zone, zone)
        slot.weight = weight
        sw_store(&slot.version, slot.version + 1)


cdef void fold_ring(Tally* ended, Tally* dead) noexcept nogil:
    """Move the seconds of a dead process: retries are counted twice rather than not at all meanwhile, requests the reverse."""
    cdef Tally* into
    cdef uint32_t good
    cdef int i
    for i in range(SECONDS):
        into = &ended[i]
        if dead[i].stamp > into.stamp:
            sw_store(&into.stamp, 0)
            sw_put32(&into.good, 0)
            sw_put32(&into.bad, 0)
            sw_store(&into.stamp, dead[i].stamp)
        if dead[i].stamp == into.stamp:
            sw_put32(&into.bad, into.bad + dead[i].bad)
            good = dead[i].good
            sw_put32(&dead[i].good, 0)
            sw_put32(&into.good, into.good + good)


cdef void clear_cells(const Places* places, int kinds) noexcept nogil:
    """All cells of the process; its use of the slot last, since that keeps the slot its own."""
    cdef int kind
    for kind in range(kinds):
        if kind != USES:
            sw_put32(<uint32_t*>(places.cells + kind * places.stride) + places.index, 0)
    sw_put32(<uint32_t*>(places.cells + USES * places.stride) + places.index, 0)


cdef void bury_upstream(const Places* places) noexcept nogil:
    cdef UpstreamBlock* blocks = <UpstreamBlock*>places.blocks
    cdef UpstreamBlock* dead = blocks + places.index
    cdef int n
    for n in range(U_COUNTERS):
        sw_add(&(blocks - 1).counters[n], dead.counters[n])
    fold_ring((blocks - 1).budget, dead.budget)
    memset(dead, 0, sizeof(UpstreamBlock))
    clear_cells(places, UPSTREAM_CELLS)


cdef void bury_endpoint(const Places* places) noexcept nogil:
    cdef EndpointBlock* blocks = <EndpointBlock*>places.blocks
    cdef EndpointBlock* dead = blocks + places.index
    cdef EndpointSlot* slot = <EndpointSlot*>places.slot
    cdef uint64_t word = sw_load(&slot.health)
    cdef int n
    if state_of(word) == PROBING and sw_load(&slot.run) == prober(word & GENERATION_MASK, places.index):
        sw_swap(&slot.health, word, health_word(0, OUT, exponent_of(word), generation_after(word)))     # the next may probe
    for n in range(E_COUNTERS):
        sw_add(&(blocks - 1).counters[n], dead.counters[n])
    memset(dead, 0, sizeof(EndpointBlock))
    clear_cells(places, ENDPOINT_CELLS)
