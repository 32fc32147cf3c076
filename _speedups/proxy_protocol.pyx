"""The PROXY protocol header; see proxy_protocol.pxd.

Strategy: version 1 is a line of at most 107 bytes, version 2 a 16-byte prefix with a length; the TLVs behind the addresses are
passed over by that length. Python is called from here: never.

Safety: only data[0:length) is read; the version 2 length is compared with `length` before anything behind the prefix is.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memchr, memcmp, memcpy, memset
from gateway._speedups.sockets cimport AF_INET, AF_INET6, cw_address_bytes, cw_address_text, cw_parse_address, cw_put_address, cw_set_port, sockaddr_storage, socklen_t

cdef enum:
    V1_MAX = 107
    V2_MAX = 4096               # addresses and TLVs; a certificate's TLVs stay far below


cdef int parse_proxy_header(const char* data, uint32_t length, sockaddr_storage* address, int* kind) noexcept nogil:
    cdef const char* signature = b"\r\n\r\n\0\r\nQUIT\n"
    cdef uint32_t n = length if length < 12 else 12
    kind[0] = 0
    if memcmp(data, signature, n) == 0:
        return 0 if length < 16 else version2(data, length, address, kind)
    n = length if length < 6 else 6
    if memcmp(data, b"PROXY ", n) == 0:
        return 0 if length < 6 else version1(data, length, address, kind)
    return -1


cdef int version2(const char* data, uint32_t length, sockaddr_storage* address, int* kind) noexcept nogil:
    cdef uint32_t size = (<uint32_t><uint8_t>data[14] << 8) | <uint8_t>data[15]
    cdef uint8_t command = <uint8_t>data[12]
    cdef uint8_t family = <uint8_t>data[13] >> 4
    kind[0] = 3
    if command != 0x20 and command != 0x21 or size > V2_MAX:
        return -1
    if length < 16 + size:
        return 0
    kind[0] = 2
    if command == 0x21 and family == 1:
        if size < 12:
            kind[0] = 3
            return -1
        cw_put_address(address, 4, data + 16, (<uint16_t><uint8_t>data[24] << 8) | <uint8_t>data[25])
        kind[0] = 1
    elif command == 0x21 and family == 2:
        if size < 36:
            kind[0] = 3
            return -1
        cw_put_address(address, 16, data + 16, (<uint16_t><uint8_t>data[48] << 8) | <uint8_t>data[49])
        kind[0] = 1
    return 16 + <int>size


cdef int version1(const char* data, uint32_t length, sockaddr_storage* address, int* kind) noexcept nogil:
    """PROXY TCP4|TCP6 source destination source-port destination-port, or PROXY UNKNOWN with anything behind it."""
    cdef uint32_t limit = length if length < V1_MAX else V1_MAX
    cdef const char* end = <const char*>memchr(data, 10, limit)
    cdef sockaddr_storage destination
    cdef uint16_t port = 0, unused = 0
    cdef int family
    cdef uint32_t n, at = 11
    kind[0] = 3
    if end == NULL:
        return -1 if length >= V1_MAX else 0
    n = <uint32_t>(end - data) - 1              # where CR has to be; `end` is behind "PROXY "
    if data[n] != 13:
        return -1
    if n >= 13 and memcmp(data + 6, b"UNKNOWN", 7) == 0 and (n == 13 or data[13] == 32):
        kind[0] = 2
        return <int>n + 2
    if n < 11 or memcmp(data + 6, b"TCP", 3) != 0 or data[10] != 32:
        return -1
    family = AF_INET if data[9] == 52 else AF_INET6 if data[9] == 54 else -1
    if not take_address(data, n, &at, family, address) or not take_address(data, n, &at, family, &destination) or \
            not take_port(data, n, &at, &port) or not take_port(data, n, &at, &unused) or at != n + 1:
        return -1
    cw_set_port(address, port)
    kind[0] = 1
    return <int>n + 2


cdef uint32_t word_end(const char* data, uint32_t n, uint32_t at) noexcept nogil:
    while at < n and data[at] != 32:
        at += 1
    return at


cdef bint take_address(const char* data, uint32_t n, uint32_t* at, int family, sockaddr_storage* address) noexcept nogil:
    """Reads the word at `at` as an address of the family, and passes over it and the byte behind it."""
    cdef uint32_t end = word_end(data, n, at[0])
    cdef char text[48]
    cdef socklen_t size = 0
    if end <= at[0] or end - at[0] >= sizeof(text):
        return False
    memcpy(text, data + at[0], end - at[0])
    text[end - at[0]] = 0
    at[0] = end + 1
    return cw_parse_address(text, 0, address, &size) and address.ss_family == family


cdef bint take_port(const char* data, uint32_t n, uint32_t* at, uint16_t* found) noexcept nogil:
    cdef uint32_t end = word_end(data, n, at[0])
    cdef uint32_t i, port = 0
    if end <= at[0] or end - at[0] > 5:
        return False
    for i in range(at[0], end):
        if data[i] < 48 or data[i] > 57:
            return False
        port = port * 10 + <uint32_t>(data[i] - 48)
    at[0] = end + 1
    found[0] = <uint16_t>port
    return port <= 65535


cdef int compose_proxy_header(char* out, const sockaddr_storage* source, const sockaddr_storage* destination) noexcept nogil:
    cdef const char* signature = b"\r\n\r\n\0\r\nQUIT\n"
    cdef const unsigned char* mapped = b"\0\0\0\0\0\0\0\0\0\0\xff\xff"
    cdef unsigned char ends[32]
    cdef char text[48]
    cdef uint16_t ports[2]
    cdef int size, i
    memcpy(out, signature, 12)
    if (source.ss_family != AF_INET and source.ss_family != AF_INET6) or \
            (destination.ss_family != AF_INET and destination.ss_family != AF_INET6):
        memcpy(out + 12, b"\x20\0\0\0", 4)       # LOCAL: nothing is known of the client
        return 16
    cw_address_bytes(source, ends)
    cw_address_bytes(destination, ends + 16)
    cw_address_text(source, text, sizeof(text), &ports[0])
    cw_address_text(destination, text, sizeof(text), &ports[1])
    # Of two families, IPv4 is written as IPv6.
    size = 4 if memcmp(ends, mapped, 12) == 0 and memcmp(ends + 16, mapped, 12) == 0 else 16
    out[12] = 0x21
    out[13] = 0x11 if size == 4 else 0x21
    out[14] = 0
    out[15] = <char>(2 * size + 4)
    memcpy(out + 16, ends + 16 - size, size)
    memcpy(out + 16 + size, ends + 32 - size, size)
    for i in range(2):
        out[16 + 2 * size + 2 * i] = <char>(ports[i] >> 8)
        out[17 + 2 * size + 2 * i] = <char>(ports[i] & 0xff)
    return 20 + 2 * size
