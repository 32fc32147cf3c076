"""The policy grpc_web: what a browser sent becomes a gRPC request.

Strategy: gRPC-Web has calls with one request message only (unary ones, and streams of the server), so the request's body is
gathered, within a limit, and translated in one piece: what cannot be translated is refused before anything is sent, and the
request can be sent again like any other. Answers are translated as they pass, in grpc_web.pxi.
Python is called from here: per parked request, for its body.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset
from gateway._speedups.buffers cimport Buffer, buffer_length, buffer_release
from gateway._speedups.exchange cimport PHASE_TRANSFORM, STEP_COLLECT, STEP_GO, Exchange, Step
from gateway._speedups.grpc cimport is_grpc
from gateway._speedups.grpc_web cimport WEB_BAD_BASE64, WEB_CUT, WEB_MEMORY, WebBody, web_decode, web_finish, web_reset


cdef class GrpcWebStep(Step):
    """`body_limit`: bytes of a request."""

    def __init__(self, str name not None, int64_t body_limit):
        self.phase = PHASE_TRANSFORM
        self.name = name
        self.body_limit = body_limit

    cdef int run(self, Exchange x) except -1:
        if x.web is None:
            if is_grpc(x.head):
                return STEP_GO
            return x.refuse(415, b"not-grpc", b"this route takes application/grpc, application/grpc-web and application/grpc-web-text")
        if x.collected is None:
            return STEP_COLLECT
        return self.translate(x)

    cdef int resumed(self, Exchange x, object result) except -1:
        return self.translate(x)

    cdef int translate(self, Exchange x) except -1:
        """x.collected as the client sent it becomes what the service reads."""
        cdef WebBody body
        cdef Buffer out
        cdef const unsigned char[:] whole = x.collected
        cdef int result
        if len(x.collected) > self.body_limit:
            x.keep_alive = False
            return x.refuse(413, b"body-too-large", b"the request body is larger than the policy's limit")
        memset(&out, 0, sizeof(Buffer))
        web_reset(&body, x.web.text)
        try:
            # An empty memoryview has no first byte to point to.
            result = web_decode(&body, <const char*>&whole[0], <unsigned int>whole.shape[0], &out) if whole.shape[0] else 0
            if result == 0:
                result = web_finish(&body)
            if result == WEB_MEMORY:
                raise MemoryError
            if result == WEB_BAD_BASE64:
                return x.refuse(400, b"bad-grpc-web", b"the body is not base64")
            if result == WEB_CUT:
                return x.refuse(400, b"bad-grpc-web", b"the body ends in the middle of a message")
            if result < 0:
                return x.refuse(400, b"bad-grpc-web", b"the body is no sequence of messages")
            x.collected = bytearray(out.base[out.start:out.end]) if buffer_length(&out) else bytearray()
        finally:
            buffer_release(&out)
        return STEP_GO
