"""HPACK encoding (RFC 7541) of heads that the gateway composed as HTTP/1.1 text.

Strategy: literals without indexing, names by the static table, no Huffman code: an encoder without state that copies bytes.
What a dynamic table would save on the wire it would cost twice in CPU time, here and at the other side, for fields that differ
from request to request. Names become lower case; fields that only HTTP/1.1 knows are left out. Return convention: 0, or -1 when
memory is out.
"""

from libc.stdint cimport uint32_t
from gateway._speedups.buffers cimport Buffer

# Appends the header block of an answer's head, text[0:n); *length becomes that of the text's head with its empty line.
cdef int hpack_answer(Buffer* out, const char* text, uint32_t n, uint32_t* length) noexcept nogil
# The same of a request's; `te`: the client of this request understands trailers. `CONNECT /path` is an extended CONNECT for a WebSocket.
cdef int hpack_request(Buffer* out, const char* text, uint32_t n, bint secure, bint te, uint32_t* length) noexcept nogil
# Lines alone, for trailers.
cdef int hpack_lines(Buffer* out, const char* text, uint32_t n) noexcept nogil
