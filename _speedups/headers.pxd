"""The header table: one message head as offsets into the buffer it was read into.

Strategy: no Python object per header. A Head is a plain C struct that lives in its exchange's memory; its offsets are
relative to `base`, which stays put while the exchange lives (the read buffer's head part is pinned). Fields whose name the
gateway knows carry its id, found once while parsing, and `first[id]` leads to them without a search.
"""

from libc.stdint cimport int16_t, int64_t, uint8_t, uint16_t, uint32_t

cdef enum:
    MAX_FIELDS = 256            # hard cap of the table; the configured limit (default 100) is at most this

# Known field names. The order is that of the names in field_names.pxd.
cdef enum:                      # FieldId
    F_OTHER = 0
    F_HOST
    F_CONTENT_LENGTH
    F_TRANSFER_ENCODING
    F_CONNECTION
    F_KEEP_ALIVE
    F_PROXY_CONNECTION
    F_PROXY_AUTHENTICATE
    F_PROXY_AUTHORIZATION
    F_PROXY
    F_TE
    F_TRAILER
    F_UPGRADE
    F_HTTP2_SETTINGS
    F_EXPECT
    F_AUTHORIZATION
    F_CONTENT_TYPE
    F_CONTENT_ENCODING
    F_COOKIE
    F_ORIGIN
    F_ACR_METHOD                # access-control-request-method
    F_ACR_HEADERS               # access-control-request-headers
    F_FORWARDED
    F_X_FORWARDED_FOR
    F_X_FORWARDED_PROTO
    F_X_FORWARDED_HOST
    F_X_REQUEST_ID
    F_TRACEPARENT
    F_TRACESTATE
    F_BAGGAGE
    F_X_API_KEY
    F_IDEMPOTENCY_KEY
    F_USER_AGENT
    F_VIA
    F_SERVER
    F_DATE
    F_RETRY_AFTER
    F_CROSSWAY_DEADLINE         # x-crossway-deadline-ms
    F_CROSSWAY_ATTEMPTS         # x-crossway-attempts-left
    F_GRPC_TIMEOUT
    F_GRPC_STATUS
    F_KNOWN                     # how many there are

cdef enum:                      # FieldFlag
    FIELD_DROP = 1              # not forwarded: hop-by-hop, framing, named by Connection, or removed by an edit
    FIELD_IDENTITY = 2          # asserts an identity in some spelling (X-Forwarded-*, X_Auth_Subject, ...)

cdef struct Field:
    uint32_t name               # offsets from Head.base
    uint32_t value              # without surrounding OWS
    uint32_t value_len
    uint32_t line_len           # name to CRLF inclusive, starting at `name`
    uint16_t name_len
    uint8_t id                  # FieldId
    uint8_t flags               # FieldFlag

cdef enum:                      # Method
    M_OTHER = 0
    M_GET
    M_HEAD
    M_POST
    M_PUT
    M_DELETE
    M_PATCH
    M_OPTIONS
    M_TRACE
    M_CONNECT
    M_COUNT

cdef struct Head:
    const char* base            # where the head starts; set by the caller before each use
    uint32_t length             # the whole head with its final CRLF CRLF; 0 while incomplete
    uint32_t line               # where the next unparsed line starts (parsing resumes here)
    uint32_t scanned            # up to here no LF was found in that line
    uint16_t count              # fields in use
    uint16_t status             # responses
    uint8_t minor               # HTTP/1.minor
    uint8_t method              # Method
    bint chunked
    bint close                  # Connection: close
    bint keep_alive             # Connection: keep-alive
    bint upgrade                # Connection: upgrade and an Upgrade field
    bint expect                 # Expect: 100-continue
    bint path_plain             # the path needs no normalisation: only unescaped, unambiguous bytes
    bint has_query
    int64_t content_length      # -1: no Content-Length
    uint32_t method_at, method_len
    uint32_t path_at, path_len      # the target's path, as received
    uint32_t query_at, query_len    # without the '?'
    uint32_t host_at, host_len      # Host's value, or the authority of an absolute-form target
    uint32_t reason_at, reason_len
    int16_t first[64]           # FieldId -> index of its first field, -1 when absent
    Field fields[MAX_FIELDS]

cdef uint8_t field_id(const char* name, size_t length) noexcept nogil
cdef bint field_is_identity(const char* name, size_t length) noexcept nogil
cdef bint field_is_framing_lookalike(const char* name, size_t length) noexcept nogil
cdef void head_reset(Head* head) noexcept nogil
# Index of the next field named like `lower` (lower case) at or after `start`, -1 when there is none.
cdef int head_find(const Head* head, const char* lower, size_t length, int start) noexcept nogil
# Marks every field FIELD_DROP that must not be forwarded: hop-by-hop, framing, and those that Connection names.
cdef void head_mark_hop_by_hop(Head* head) noexcept nogil
