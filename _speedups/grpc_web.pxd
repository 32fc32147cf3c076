"""gRPC-Web and gRPC: two wire formats of the same calls, translated as they pass.

Strategy: both carry messages with a prefix of five bytes. gRPC-Web puts the trailers behind the messages, in a frame whose first bit
is set, because browsers see no others, and knows a second form, in base64, for browsers that can read only text while it arrives.
So bytes are passed on as they come, one base64 group or prefix at most is held back, and the prefixes are walked in both
directions: what is no message is refused, so that neither side can say in a message what only trailers may say.
Python is called from here: never.
"""

from libc.stdint cimport uint8_t, uint32_t
from gateway._speedups.buffers cimport Buffer

cdef enum:
    WEB_NOT = 0             # no gRPC-Web at all
    WEB_BINARY              # application/grpc-web, +proto and others
    WEB_TEXT                # application/grpc-web-text, likewise

# What a body can be refused for.
cdef enum:
    WEB_BAD_BASE64 = -1     # a byte outside the alphabet, padding in the wrong place, or bits set behind the last byte
    WEB_BAD_FRAME = -2      # a prefix that begins no message
    WEB_CUT = -3            # it ended in the middle of a message
    WEB_MEMORY = -4

cdef enum:
    WEB_TYPE_MAX = 64       # bytes of a content type that is written here

# One direction of one call. All zero (and `text` set) at its beginning.
cdef struct WebBody:
    bint text
    uint8_t held            # bytes of an incomplete group
    uint8_t hold[4]         # base64 digits that arrived, or bytes that are to be encoded
    uint8_t head_have       # bytes of an incomplete prefix
    uint8_t head[5]
    uint32_t left           # bytes of the present message to come

# A call whose client speaks gRPC-Web.
cdef class WebCall:
    cdef bint text              # what it sends is text
    cdef bint wants_text        # and what it wants to read
    cdef bint translating       # the answer is one of gRPC: its content type is changed
    cdef bint framed            # ... and its body, which ends with a frame of trailers that is still owed
    cdef WebBody answer
    cdef Buffer out             # translated and not handed on; empty between two events

# Of a content type; `suffix` becomes the offset of what follows "+", suffix_len its length, 0 without one.
cdef int web_kind(const char* value, uint32_t n, uint32_t* suffix, uint32_t* suffix_len) noexcept nogil
# Whether a client that sends this Accept wants text.
cdef bint web_wants_text(const char* value, uint32_t n) noexcept nogil
# The content types to send; `out` has room for WEB_TYPE_MAX bytes. Return the length.
cdef uint32_t web_request_type(const char* value, uint32_t n, char* out) noexcept nogil         # from the client's
cdef uint32_t web_answer_type(bint text, const char* value, uint32_t n, char* out) noexcept nogil    # from the service's

cdef void web_reset(WebBody* body, bint text) noexcept nogil
# gRPC-Web to gRPC and back, appended to `out`: at most 3/4 of n and 3 bytes more, 4/3 of n and 4 bytes more. 0, or WEB_* < 0.
cdef int web_decode(WebBody* body, const char* data, uint32_t n, Buffer* out) noexcept nogil
cdef int web_encode(WebBody* body, const char* data, uint32_t n, Buffer* out) noexcept nogil
# Whether a body may end here: 0, or WEB_* < 0.
cdef int web_finish(WebBody* body) noexcept nogil
# The frame with the trailers, lines[0:n) being "name: value\r\n" each; nothing may follow. 0, or WEB_* < 0.
cdef int web_trailers(WebBody* body, const char* lines, uint32_t n, Buffer* out) noexcept nogil
