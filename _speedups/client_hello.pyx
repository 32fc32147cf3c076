"""The name in a TLS ClientHello; see client_hello.pxd.

Strategy: the records' payloads are put together in `work`, however they were cut, and the message is parsed only when it is whole:
so a name that lies in two records or in a hundred segments chooses the same upstream as one that came in a piece. Every
length must fit into what encloses it, and lists must end exactly where their length says (RFC 8446 4.1.2, 5.1; RFC 6066 3).
Python is called from here: never.

Safety: `Cursor` holds a base, a position and an end within [0, HELLO_MAX]; take() is the only function that moves the position,
and it fails instead of passing the end. `work` is filled by records whose sum is checked against HELLO_MAX first.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcpy

cdef enum:
    RECORD_HEAD = 5
    HANDSHAKE = 22              # ContentType
    CLIENT_HELLO = 1            # HandshakeType
    FRAGMENT_MAX = 16384        # RFC 8446 5.1
    SERVER_NAME = 0             # ExtensionType
    HOST_NAME = 0               # NameType

cdef struct Cursor:
    const uint8_t* base
    uint32_t at, end


cdef inline bint take(Cursor* c, uint32_t n, Cursor* part) noexcept nogil:
    """The next n bytes as a cursor of their own. False when there are fewer."""
    if n > c.end - c.at:
        return False
    part.base = c.base
    part.at = c.at
    part.end = c.at + n
    c.at += n
    return True


cdef inline int64_t number(Cursor* c, uint32_t size) noexcept nogil:
    """A big-endian number of `size` (at most 3) bytes; -1 when there are fewer."""
    cdef Cursor part
    cdef int64_t value = 0
    if not take(c, size, &part):
        return -1
    while part.at < part.end:
        value = value << 8 | part.base[part.at]
        part.at += 1
    return value


cdef inline bint vector(Cursor* c, uint32_t size, Cursor* part) noexcept nogil:
    """A vector behind a length of `size` bytes."""
    cdef int64_t length = number(c, size)
    return length >= 0 and take(c, <uint32_t>length, part)


cdef int parse_client_hello(const char* data, uint32_t length, char* work, char* name, uint32_t* name_length) noexcept nogil:
    cdef const uint8_t* p = <const uint8_t*>data
    cdef uint32_t at = 0, have = 0, fragment, promised, wanted
    cdef Cursor body
    name_length[0] = 0
    while True:
        # What is there of a record's head has to be right already: other protocols are told at once.
        if length > at and p[at] != HANDSHAKE:
            return -HELLO_NOT_TLS if at == 0 else -HELLO_MALFORMED
        if length > at + 1 and p[at + 1] != 3:
            return -HELLO_NOT_TLS if at == 0 else -HELLO_MALFORMED
        if length < at + RECORD_HEAD:
            return -HELLO_TOO_LONG if at + RECORD_HEAD > HELLO_MAX else 0
        fragment = <uint32_t>p[at + 3] << 8 | p[at + 4]
        if p[at + 2] > 4 or fragment == 0 or fragment > FRAGMENT_MAX:
            return -HELLO_MALFORMED
        at += RECORD_HEAD
        promised = have + fragment                  # of the message, once all of this record is here
        if fragment > length - at:                  # not all of it is here: what is there is looked at all the same
            fragment = length - at
        if at + fragment > HELLO_MAX or fragment > HELLO_MAX - have:
            return -HELLO_TOO_LONG
        memcpy(work + have, data + at, fragment)
        have += fragment
        at += fragment
        if have and <uint8_t>work[0] != CLIENT_HELLO:
            return -HELLO_MALFORMED
        if have >= 4:
            wanted = <uint32_t><uint8_t>work[1] << 16 | <uint32_t><uint8_t>work[2] << 8 | <uint8_t>work[3]
            if wanted > HELLO_MAX - 4:
                return -HELLO_TOO_LONG
            if promised > wanted + 4:
                return -HELLO_MALFORMED             # nothing may follow in its records: the client waits for the answer
            if have == wanted + 4:
                body.base = <const uint8_t*>work
                body.at = 4
                body.end = wanted + 4
                return 1 if parse_hello(&body, name, name_length) else -HELLO_MALFORMED
        if at >= length:
            return -HELLO_TOO_LONG if length >= HELLO_MAX else 0


cdef bint parse_hello(Cursor* body, char* name, uint32_t* name_length) noexcept nogil:
    """The message behind its head. False when it is malformed."""
    cdef Cursor part, extensions, one
    cdef int64_t version = number(body, 2), kind
    cdef bint named = False
    if version < 0x0300 or version > 0x03ff or not take(body, 32, &part):
        return False
    if not vector(body, 1, &part) or part.end - part.at > 32:                              # legacy_session_id
        return False
    if not vector(body, 2, &part) or part.at == part.end or (part.end - part.at) % 2:     # cipher_suites
        return False
    if not vector(body, 1, &part) or part.at == part.end:                                  # legacy_compression_methods
        return False
    if body.at == body.end:
        return True                                 # before TLS 1.3 extensions could be missing altogether (RFC 5246 7.4.1.2)
    if not vector(body, 2, &extensions) or body.at != body.end:
        return False
    while extensions.at < extensions.end:
        kind = number(&extensions, 2)
        if kind < 0 or not vector(&extensions, 2, &one):
            return False
        if kind == SERVER_NAME:
            if named or not parse_name(&one, name, name_length):        # twice: two readers may take different ones
                return False
            named = True
    return True


cdef bint parse_name(Cursor* extension, char* name, uint32_t* name_length) noexcept nogil:
    """The one host name of a server_name extension, in lower case."""
    cdef Cursor names, host
    cdef uint32_t i, label = 0
    cdef uint8_t c
    if not vector(extension, 2, &names) or extension.at != extension.end or number(&names, 1) != HOST_NAME or \
            not vector(&names, 2, &host) or names.at != names.end:
        return False
    if host.at == host.end or host.end - host.at > HELLO_NAME:
        return False
    for i in range(host.at, host.end):
        c = host.base[i]
        if 65 <= c <= 90:
            c += 32
        if c == 46:
            if label == 0 or i + 1 == host.end:     # RFC 6066 3: without a trailing dot
                return False
            label = 0
        elif 97 <= c <= 122 or 48 <= c <= 57 or c == 45 or c == 95:
            label += 1
            if label > 63:
                return False
        else:
            return False
        name[i - host.at] = <char>c
    name_length[0] = host.end - host.at
    return True
