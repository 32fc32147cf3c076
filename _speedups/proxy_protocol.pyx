"""The PROXY protocol header; see proxy_protocol.pxd.

Strategy: version 1 is a line of at most 107 bytes, version 2 a 16-byte prefix with a length; the TLVs behind the addresses are
passed over by that length. Python is called from here: never.

Safety: only data[0:length) is read; the version 2 length is compared with `length` before anything behind the prefix is.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memchr, memcmp, memcpy, memset
from gateway._speedups.sockets cimport cw_parse_address, cw_put_address, sockaddr_storage, socklen_t

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
    """PROXY TCP4 source destination sport dport, or PROXY UNKNOWN with anything behind it."""
    cdef uint32_t limit = length if length < V1_MAX else V1_MAX
    cdef const char* end = <const char*>memchr(data, 10, limit)
    cdef char text[48]
    cdef uint32_t i, n, at = 6
    cdef socklen_t size = 0
    kind[0] = 3
    if end == NULL:
        return -1 if length >= V1_MAX else 0
    n = <uint32_t>(end - data)
    if data[n - 1] != 13:
        return -1
    if n >= 14 and memcmp(data + 6, b"UNKNOWN", 7) == 0:
        kind[0] = 2
        return <int>n + 1
    if n < 20 or (memcmp(data + 6, b"TCP4 ", 5) != 0 and memcmp(data + 6, b"TCP6 ", 5) != 0):
        return -1
    at = 11
    i = at
    while i < n and data[i] != 32:
        i += 1
    if i == n or i - at >= sizeof(text) or i == at:
        return -1
    memcpy(text, data + at, i - at)
    text[i - at] = 0
    if not cw_parse_address(text, 0, address, &size):
        return -1
    kind[0] = 1
    return <int>n + 1
