"""A balancer and its candidates as a Python object, for tests, simulations and benchmarks only.

Strategy: the fleet owns the candidates that an upstream's endpoints own otherwise, and passes every call on; clock and seed are
the caller's, so what it does can be repeated. Nothing of the gateway imports this module.
Python is called from here: per call.

Safety: candidates[0..size) live as long as this object. The balancer's `owner` is None, for this object outlives its balancer: it
holds the only reference and never hands it out.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from gateway._speedups.balance cimport Balancer, Candidate, candidate_reset, hash_key as hash_bytes

SAMPLES = ("good", "bad", "abandoned")


def hash_key(bytes key not None) -> int:
    """Return the 64-bit hash of a key or an address, as the balancer is given it."""
    return hash_bytes(key, <size_t>len(key))


@cython.final
cdef class Fleet:
    """Endpoints with these weights, born long ago, all usable and local; `names` are what their ids are made of."""

    def __cinit__(self, int algorithm, weights, *, names=None, int64_t slow_start_us=0, int load_percent=125, uint64_t seed=1):
        cdef int i
        weights = list(weights)
        names = [f"10.0.0.{n}:80" for n in range(len(weights))] if names is None else list(names)
        self.size = <int>len(weights)
        self.candidates = <Candidate*>malloc((<size_t>self.size + 1) * sizeof(Candidate))
        if self.candidates == NULL:
            raise MemoryError
        for i in range(self.size):
            candidate_reset(&self.candidates[i], <uint64_t>hash_key(names[i].encode()), <int>weights[i], -(<int64_t>1 << 48))
        self.balancer = Balancer(algorithm, slow_start_us=slow_start_us, load_percent=load_percent, seed=seed)
        self.join(range(self.size))

    def __dealloc__(self):
        free(self.candidates)

    cdef Candidate* at(self, int index) except NULL:
        if not 0 <= index < self.size:
            raise IndexError(f"there is no endpoint {index}")
        return &self.candidates[index]

    def join(self, members) -> None:
        """Let the balancer choose from these endpoints (numbers of the fleet) from now on."""
        cdef Candidate** chosen
        cdef int i
        members = list(members)
        chosen = <Candidate**>malloc((<size_t>len(members) + 1) * sizeof(Candidate*))
        if chosen == NULL:
            raise MemoryError
        try:
            for i in range(<int>len(members)):
                chosen[i] = self.at(members[i])
            self.balancer.rebuild(chosen, <int>len(members), None)
        finally:
            free(chosen)
        self.members = members

    def choose(self, int64_t now, uint64_t key=0, int avoid=-1, bint safe=True) -> int:
        """Return the number of the endpoint to take, -1 for none; `avoid` is a number of the fleet too."""
        cdef int found = self.balancer.choose(now, key, self.members.index(avoid) if avoid >= 0 else -1, safe)
        return -1 if found < 0 else <int>self.members[found]

    def count(self, int choices, int64_t now, uint64_t step=0) -> list[int]:
        """Choose so many times, the clock standing still and nothing in flight; return how often each endpoint was taken.

        The keys are 0, step, 2 * step and so on.
        """
        cdef list taken = [0] * self.size
        cdef uint64_t key = 0
        cdef int i, found
        for i in range(choices):
            found = self.balancer.choose(now, key, -1, True)
            key += step
            if found >= 0:
                taken[self.members[found]] += 1
        return taken

    def start(self, int index, int64_t now=0) -> None:
        """A request goes out to the endpoint; without a time it is not one that tries an endpoint which has failed."""
        self.balancer.started(self.at(index), now or <int64_t>1 << 62)

    def finish(self, int index, int64_t now, int64_t rtt_us, str sample="good", int64_t retry_after_us=0) -> None:
        """A request that was started is over."""
        self.balancer.finished(self.at(index), now, rtt_us, SAMPLES.index(sample), retry_after_us)

    def set(self, int index, *, usable=None, local=None, weight=None, born=None, elsewhere=None, bint tell=True) -> None:
        """Change what the pool sets; `tell`: say that something changed, as the pool should."""
        cdef Candidate* candidate = self.at(index)
        if usable is not None:
            candidate.usable = bool(usable)
        if local is not None:
            candidate.local = bool(local)
        if weight is not None:
            candidate.weight = weight
        if born is not None:
            candidate.born = born
        if elsewhere is not None:
            candidate.elsewhere = elsewhere
        if tell:
            self.balancer.changed()

    def expected_us(self, int index, int64_t now) -> float:
        """Return what a request to the endpoint is expected to take, penalties included."""
        return self.balancer.expected_us(self.at(index), now)

    def in_flight(self, int index) -> int:
        return self.at(index).in_flight

    @property
    def typical_us(self) -> float:
        return self.balancer.typical_us

    @property
    def places(self) -> list[int]:
        """Maglev's table: the endpoint of each place; empty for another algorithm."""
        cdef uint64_t i
        if self.balancer.table == NULL:
            return []
        return [self.members[self.balancer.table[i]] for i in range(self.balancer.table_size)]
