"""Which known field a name is: one slot by its length and first letter, one comparison.

Strategy: a table from (length, first letter) to the one known name that has both, in 128 slots without a collision; headers.pyx refuses to be
imported when that stops being true of the names. Inline, because the parser asks for every field. Python is called from here: never.
"""

from libc.stdint cimport uint8_t

cdef extern from *:
    """
    #ifndef CROSSWAY_FIELD_NAMES_H
    #define CROSSWAY_FIELD_NAMES_H
    /* Names by FieldId; the order is that of the enum in headers.pxd. Letters, digits and '-' only. */
    static const char *const cw_field_names[] = {
        "", "host", "content-length", "transfer-encoding", "connection", "keep-alive", "proxy-connection",
        "proxy-authenticate", "proxy-authorization", "proxy", "te", "trailer", "upgrade", "http2-settings", "expect",
        "authorization", "content-type", "content-encoding", "cookie", "origin", "access-control-request-method",
        "access-control-request-headers", "forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host",
        "x-request-id", "traceparent", "tracestate", "baggage", "x-api-key", "idempotency-key", "user-agent", "via",
        "server", "date", "retry-after", "x-crossway-deadline-ms", "x-crossway-attempts-left", "grpc-timeout",
        "grpc-status",
    };
    enum { CW_FIELD_COUNT = sizeof(cw_field_names) / sizeof(cw_field_names[0]), CW_FIELD_LONGEST = 30 };
    typedef struct { uint8_t id, length; } cw_field_slot;
    #define CW_SLOT(length, first) (((length) * 3 + (first) * 47) & 127)
    #define CW_AT(id, length, first) [CW_SLOT(length, first)] = {id, length}
    static const cw_field_slot cw_field_slots[128] = {
        CW_AT(1, 4, 'h'), CW_AT(2, 14, 'c'), CW_AT(3, 17, 't'), CW_AT(4, 10, 'c'), CW_AT(5, 10, 'k'), CW_AT(6, 16, 'p'),
        CW_AT(7, 18, 'p'), CW_AT(8, 19, 'p'), CW_AT(9, 5, 'p'), CW_AT(10, 2, 't'), CW_AT(11, 7, 't'), CW_AT(12, 7, 'u'),
        CW_AT(13, 14, 'h'), CW_AT(14, 6, 'e'), CW_AT(15, 13, 'a'), CW_AT(16, 12, 'c'), CW_AT(17, 16, 'c'), CW_AT(18, 6, 'c'),
        CW_AT(19, 6, 'o'), CW_AT(20, 29, 'a'), CW_AT(21, 30, 'a'), CW_AT(22, 9, 'f'), CW_AT(23, 15, 'x'), CW_AT(24, 17, 'x'),
        CW_AT(25, 16, 'x'), CW_AT(26, 12, 'x'), CW_AT(27, 11, 't'), CW_AT(28, 10, 't'), CW_AT(29, 7, 'b'), CW_AT(30, 9, 'x'),
        CW_AT(31, 15, 'i'), CW_AT(32, 10, 'u'), CW_AT(33, 3, 'v'), CW_AT(34, 6, 's'), CW_AT(35, 4, 'd'), CW_AT(36, 11, 'r'),
        CW_AT(37, 22, 'x'), CW_AT(38, 24, 'x'), CW_AT(39, 12, 'g'), CW_AT(40, 11, 'g'),
    };
    /* The FieldId of p[0..n), 0 for one that is not known. The slot's own length is compared first: nothing past either name is read. */
    static inline uint8_t cw_field_id(const char *p, size_t n) {
        const cw_field_slot *slot;
        if (n == 0 || n > CW_FIELD_LONGEST) return 0;
        slot = &cw_field_slots[CW_SLOT((unsigned)n, (unsigned)((uint8_t)p[0] | 0x20))];
        return slot->length == n && cw_equals_word(p, cw_field_names[slot->id], n) ? slot->id : 0;
    }
    #endif
    """
    const char* cw_field_names[0]
    int CW_FIELD_COUNT
    uint8_t cw_field_id(const char* p, size_t n) nogil
