"""Strict HTTP/1.1 (RFC 9112): heads and chunked framing over (pointer, length, state), no Python object anywhere.

Strategy: a head is parsed line by line as bytes arrive, so that dripping bytes costs linear work; each line is looked at
once. Whatever is ambiguous is an error with its own code; there is no lenient mode. Return convention: below 0 an error
(negated ParseError), 0 more bytes needed, above 0 the length of what was parsed.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from gateway._speedups.headers cimport Head

cdef enum:              # ParseError
    E_NONE = 0
    E_METHOD            # 400
    E_TARGET            # 400
    E_VERSION           # 505
    E_LINE_END          # 400 bare CR or LF
    E_FIELD_NAME        # 400 no colon, empty or non-token name, space before the colon
    E_FIELD_VALUE       # 400 control bytes
    E_FOLD              # 400 obs-fold
    E_HOST              # 400 absent, repeated or invalid Host
    E_LENGTH            # 400 bad or repeated Content-Length
    E_CODING            # 501 a transfer coding other than chunked
    E_CODING_FRAMING    # 400 Transfer-Encoding with Content-Length, in HTTP/1.0, repeated, or not last
    E_TOO_LONG          # 431 head over its limit
    E_TARGET_LONG       # 414
    E_TOO_MANY          # 431 fields over the limit
    E_FRAMING_NAME      # 400 Content_Length and its like
    E_EXPECT            # 417
    E_CONNECT           # 501 CONNECT is not offered
    E_STATUS            # 502 (responses) bad status line
    E_CHUNK_SIZE        # 400
    E_CHUNK_END         # 400 chunk data not followed by CRLF
    E_CHUNK_EXT         # 400 chunk extensions over their limit
    E_TRAILER           # 400 bad or too many trailers
    E_PATH              # 400 path that can be read in two ways
    E_COUNT

cdef struct Limits:
    uint32_t head       # bytes of a whole head
    uint32_t target     # bytes of the request target
    uint32_t fields     # number of fields, at most MAX_FIELDS

cdef int parse_request(const char* base, uint32_t length, Head* head, const Limits* limits) noexcept nogil
cdef int parse_response(const char* base, uint32_t length, Head* head, const Limits* limits) noexcept nogil
# 1 when the comma-separated list of tokens holds `lower`, 0 when not, -1 when an element is not a token.
cdef int list_has(const char* p, uint32_t length, const char* lower, uint32_t size) noexcept nogil
cdef uint8_t method_id(const char* p, uint32_t n) noexcept nogil
cdef int error_status(int error) noexcept nogil
cdef const char* error_slug(int error) noexcept nogil
cdef const char* error_detail(int error) noexcept nogil

# Normalises a path once: unreserved bytes unescaped, hex upper-cased, dot segments resolved. `out` holds at least `length`
# bytes. Returns the new length, or a negated ParseError for what can be read in two ways.
cdef int normalise_path(const char* path, uint32_t length, char* out) noexcept nogil

cdef enum:              # ChunkState
    CHUNK_SIZE = 0      # first digit of a size
    CHUNK_SIZE_MORE
    CHUNK_EXT           # inside extensions
    CHUNK_EXT_QUOTED
    CHUNK_EXT_ESCAPE
    CHUNK_SIZE_LF
    CHUNK_DATA
    CHUNK_DATA_CR
    CHUNK_DATA_LF
    CHUNK_TRAILER       # at the start of a trailer line
    CHUNK_TRAILER_LINE
    CHUNK_TRAILER_LF
    CHUNK_END_LF
    CHUNK_DONE

cdef struct Chunked:
    uint8_t state       # ChunkState
    uint8_t digits      # significant hex digits seen in this size
    bint colon          # the trailer line has its colon
    uint32_t overhead   # bytes of extensions and trailers so far, capped
    uint16_t trailers   # trailer lines
    uint64_t remaining  # of the current chunk's data

cdef enum:
    CHUNK_OVERHEAD_MAX = 8192   # extensions and trailers of a whole body, together

cdef void chunked_reset(Chunked* state) noexcept nogil
# Decodes data[0:length) in place: the payload is moved to the front. Returns the payload's length and sets *consumed, or a
# negated ParseError. state.state is CHUNK_DONE once the last CRLF was read; bytes behind it are not consumed.
cdef int64_t chunked_decode(Chunked* state, char* data, uint32_t length, uint32_t* consumed) noexcept nogil
