"""Writes heads: the request to the upstream, its answer to the client, and the gateway's own answers.

Strategy: once, into one output area, in the order of the wire. Unchanged header lines are copied as bytes, adjacent ones in
one go; framing is written anew from what was parsed. Return convention: the length written, or -1 when `room` is too small.
"""

from libc.stdint cimport int64_t, uint32_t
from gateway._speedups.exchange cimport Exchange
from gateway._speedups.headers cimport Head

cdef int compose_request(Exchange x, char* out, int room, int64_t now) except -2
cdef int compose_answer(Exchange x, Head* head, char* out, int room) except -2
cdef int compose_reply(Exchange x, char* out, int room, bint keep_alive) except -2
# 101 for a WebSocket: the upstream's fields, and `accept` as the proof.
cdef int compose_switch(Exchange x, Head* head, bytes accept, char* out, int room) except -2
cdef int compose_informational(Head* head, char* out, int room) noexcept
# 36 bytes of UUIDv7 text (RFC 9562 5.7) and 55 bytes of traceparent (W3C Trace Context level 2)
cdef void make_request_id(char* out, int64_t wall_us) noexcept nogil
cdef void make_trace(char* out) noexcept nogil
cdef bint valid_request_id(const char* p, uint32_t n) noexcept nogil
cdef bint valid_trace(const char* p, uint32_t n) noexcept nogil
cdef void continue_trace(char* out, const char* received) noexcept nogil
