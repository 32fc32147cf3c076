"""The name in a TLS ClientHello, read without decrypting anything.

Strategy: see client_hello.pyx.
"""

from libc.stdint cimport uint32_t

cdef enum:
    HELLO_MAX = 16384           # bytes of records; OpenSSL's own bound of a ClientHello is 131 KiB, browsers send 2 KiB
    HELLO_NAME = 253            # longest name (RFC 1035)

cdef enum:
    HELLO_NOT_TLS = 1           # the first bytes begin no handshake
    HELLO_TOO_LONG
    HELLO_MALFORMED

# Reads the records in data[0:length). 1: the ClientHello is complete, and name[0:name_length[0]) is the host that it names, in lower
# case (length 0: none). 0: more bytes are needed. -HELLO_*: it is none. `work` and `name` have HELLO_MAX and HELLO_NAME bytes.
cdef int parse_client_hello(const char* data, uint32_t length, char* work, char* name, uint32_t* name_length) noexcept nogil
