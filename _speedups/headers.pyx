"""The header table's search, known names, and which fields may travel on.

Strategy: a name is looked up by its length and first letter, then compared once (field_names.pxd); that happens while a head is
parsed, so that later phases work with small integers. Python is called from here: never.

Safety: every function reads only p[0:length) as passed, or offsets that the parser stored while it saw the bytes in
question inside the same buffer; Head.base is set by the caller to where that buffer is now.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset
from gateway._speedups.wire cimport cw_class, cw_equals_folded, cw_equals_name, cw_lower, cw_fold_name, CW_TOKEN
from gateway._speedups.field_names cimport CW_FIELD_COUNT, cw_field_id, cw_field_names

cdef extern from *:
    """
    /* Who the client is, or where it came from, as other software spells it. Compared after folding '_' and its like. */
    static const char *const cw_identity_names[] = {
        "forwarded", "x-real-ip", "x-client-ip", "true-client-ip", "x-cluster-client-ip", "cf-connecting-ip",
        "l5d-client-id", "client-cert", "client-cert-chain", "x-original-url", "x-rewrite-url", "x-original-host",
        "x-original-forwarded-for", "x-remote-user", "remote-user", "x-host",
    };
    static const char *const cw_identity_prefixes[] = {
        "x-forwarded-", "x-auth-", "x-crossway-", "x-envoy-", "x-client-cert", "x-ssl-client-", "l5d-",
    };
    static int cw_is_identity(const char *p, size_t n) {
        uint8_t c = cw_lower((uint8_t)p[0]);
        if (c != 'x' && c != 'f' && c != 'l' && c != 'c' && c != 't' && c != 'r') return 0;
        for (size_t i = 0; i < sizeof(cw_identity_prefixes) / sizeof(char *); i++) {
            size_t m = strlen(cw_identity_prefixes[i]);
            if (n >= m && cw_equals_name(p, cw_identity_prefixes[i], m)) return 1;
        }
        for (size_t i = 0; i < sizeof(cw_identity_names) / sizeof(char *); i++) {
            size_t m = strlen(cw_identity_names[i]);
            if (n == m && cw_equals_name(p, cw_identity_names[i], m)) return 1;
        }
        return 0;
    }
    """
    bint cw_is_identity(const char* p, size_t n) nogil
    size_t strlen(const char* s) nogil


cdef int check_names() except -1:
    """Raise ImportError unless every known name is found, and as itself."""
    cdef int known
    if CW_FIELD_COUNT != F_KNOWN:
        raise ImportError("field_names.pxd and headers.pxd name a different number of fields")
    for known in range(1, F_KNOWN):
        if cw_field_id(cw_field_names[known], strlen(cw_field_names[known])) != known:
            raise ImportError(f"the field {cw_field_names[known].decode()} is not in its slot of field_names.pxd")
    return 0

check_names()


cdef uint8_t field_id(const char* name, size_t length) noexcept nogil:
    return cw_field_id(name, length)


cdef bint field_is_identity(const char* name, size_t length) noexcept nogil:
    return length > 0 and cw_is_identity(name, length)


cdef bint field_is_framing_lookalike(const char* name, size_t length) noexcept nogil:
    """Names that an application server folds into a framing field, such as Content_Length."""
    if length == 14:
        return cw_equals_name(name, b"content-length", 14)
    if length == 17:
        return cw_equals_name(name, b"transfer-encoding", 17)
    return False


cdef void head_reset(Head* head) noexcept nogil:
    # All but the field table, which `count` guards.
    memset(head, 0, <size_t>(<char*>&head.fields[0] - <char*>head))
    memset(head.first, 0xff, sizeof(head.first))
    head.content_length = -1


cdef int head_find(const Head* head, const char* lower, size_t length, int start) noexcept nogil:
    cdef int i = start
    while i < head.count:
        if head.fields[i].name_len == length and cw_equals_folded(head.base + head.fields[i].name, lower, length):
            return i
        i += 1
    return -1


cdef bint removable_by_connection(const Head* head, const Field* field) noexcept nogil:
    """Connection may not name what routing, framing or identity rest on (CVE-2024-45410, CVE-2026-29054)."""
    if field.flags & FIELD_IDENTITY:
        return False            # dropped or kept by the identity rules, never by the client
    return field.id not in (F_HOST, F_CONTENT_LENGTH, F_TRANSFER_ENCODING, F_AUTHORIZATION, F_X_REQUEST_ID, F_TRACEPARENT,
                            F_X_API_KEY, F_IDEMPOTENCY_KEY, F_COOKIE, F_CONTENT_TYPE, F_CONTENT_ENCODING, F_ORIGIN)


cdef void drop_listed(Head* head, uint32_t at, uint32_t end) noexcept nogil:
    """Marks the fields that the list base[at:end) of a Connection field names."""
    cdef uint32_t start
    cdef int i
    cdef Field* field
    while at < end:
        while at < end and not (cw_class[<uint8_t>head.base[at]] & CW_TOKEN):
            at += 1
        start = at
        while at < end and (cw_class[<uint8_t>head.base[at]] & CW_TOKEN):
            at += 1
        if at == start:
            continue
        for i in range(head.count):
            field = &head.fields[i]
            if field.name_len == at - start and removable_by_connection(head, field) and \
                    equal_folded(head.base + field.name, head.base + start, at - start):
                field.flags |= FIELD_DROP


cdef bint equal_folded(const char* a, const char* b, size_t length) noexcept nogil:
    cdef size_t i
    for i in range(length):
        if cw_lower(<uint8_t>a[i]) != cw_lower(<uint8_t>b[i]):
            return False
    return True


cdef void head_mark_hop_by_hop(Head* head) noexcept nogil:
    """RFC 9110 7.6.1, plus Proxy (httpoxy) and the framing fields, which are written anew."""
    cdef int i
    cdef uint8_t known
    cdef Field* field
    for i in range(head.count):
        field = &head.fields[i]
        known = field.id
        if known == F_CONNECTION:
            field.flags |= FIELD_DROP
            # `close` and `keep-alive`, by far the most frequent values, name no field.
            if not ((field.value_len == 5 and head.close) or (field.value_len == 10 and head.keep_alive)):
                drop_listed(head, field.value, field.value + field.value_len)
        elif known != F_OTHER and (F_CONTENT_LENGTH <= known <= F_HTTP2_SETTINGS):
            field.flags |= FIELD_DROP
