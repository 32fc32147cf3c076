# gRPC-Web on the client's side of an exchange (included by engine.pyx).
#
# Strategy: which calls are meant is known at the head (take_web), so that every refusal speaks the client's language. The request's
# body is translated by its step; the answer's passes through put_answer() piece by piece, and ends with a frame that holds its
# trailers. An answer that is no gRPC (an error page of something between) passes as it is. Python is called from here: never.

# How an answer under way ends when it cannot go on.
cdef bytes TIME_OVER = b"grpc-status: 4\r\ngrpc-message: the time for this call is over\r\n"
cdef bytes STOPPED = b"grpc-status: 14\r\ngrpc-message: the upstream's answer stopped\r\n"


cdef bint take_web(Exchange x) except -1:
    """Notes how the client of a route with grpc_web speaks. False when it is not gRPC-Web."""
    cdef int i = x.head.first[F_CONTENT_TYPE]
    cdef uint32_t suffix, suffix_len
    cdef int kind
    cdef WebCall web
    cdef bytes accept
    if i < 0:
        return False
    kind = web_kind(x.head.base + x.head.fields[i].value, x.head.fields[i].value_len, &suffix, &suffix_len)
    if kind == WEB_NOT:
        return False
    web = WebCall.__new__(WebCall)
    web.text = kind == WEB_TEXT
    accept = x.named(b"accept")
    web.wants_text = web.text if accept is None or b"grpc-web" not in accept else web_wants_text(accept, <uint32_t>len(accept))
    x.web = web
    return True


cdef void begin_web_answer(UpstreamConnection u, Head* head) noexcept:
    """The final head is here: whether it begins a gRPC answer, and how the translated one ends."""
    cdef Exchange x = u.x
    cdef bint over = x.answer.done and grpc_status_of(head) >= 0        # all of it is in the head
    x.web.translating = head.status == 200 and u.stream is not None and is_grpc(head)
    x.web.framed = x.web.translating and not over and x.head.method != M_HEAD
    web_reset(&x.web.answer, x.web.wants_text)
    if x.web.framed:                            # whatever its length is: there will be a frame behind it
        x.answer.done = False
        x.answer.mode = BODY_CLOSE
        x.answer.out = BODY_CHUNKED
        head.content_length = -1


cdef int put_answer(UpstreamConnection u, Downstream d, const char* data, uint32_t n) except -999:
    """Payload of the answer towards the client, framed as its side is. < 0: the client is gone, or (TROUBLE) the payload is no gRPC."""
    cdef Exchange x = u.x
    cdef WebCall web = x.web
    cdef int result
    if web is not None and web.framed:
        result = web_encode(&web.answer, data, n, &web.out)
        if result < 0:
            return TROUBLE
        return put_web(u, d)
    return d.put_chunk(data, n) if x.answer.out == BODY_CHUNKED else d.put(data, n)


cdef int put_web(UpstreamConnection u, Downstream d) noexcept:
    """What was translated goes out."""
    cdef Buffer* out = &u.x.web.out
    cdef uint32_t n = out.end - out.start
    cdef int result
    if n == 0:
        return 0
    result = d.put_chunk(out.base + out.start, n) if u.x.answer.out == BODY_CHUNKED else d.put(out.base + out.start, n)
    u.engine.slot.counters[C_BYTES_OUT] += n
    buffer_release(out)
    return result


cdef int end_web_answer(UpstreamConnection u, Downstream d) except -999:
    """The trailers, as the last frame. As put_answer()."""
    cdef WebCall web = u.x.web
    cdef const char* lines = b"grpc-status: 13\r\ngrpc-message: the service ended its answer without a status\r\n"
    cdef uint32_t n = <uint32_t>strlen(lines)
    if u.stream is not None:
        thin_out(&u.stream.trailers, u.x.route.response_edits, ())
    if u.stream is not None and grpc_status_in(u.stream.trailers.base + u.stream.trailers.start,
                                               u.stream.trailers.end - u.stream.trailers.start) >= 0:
        lines = u.stream.trailers.base + u.stream.trailers.start
        n = u.stream.trailers.end - u.stream.trailers.start
    if web_trailers(&web.answer, lines, n, &web.out) < 0:
        return TROUBLE
    if d.stream is not None:
        d.stream.last = True
    web.framed = False                          # said, once
    return put_web(u, d)


cdef bint end_web_early(Downstream d) noexcept:
    """An answer that cannot go on gets trailers that say so, between two messages. False: cut it."""
    cdef Exchange x = d.x
    cdef Buffer* out = &x.web.out
    cdef bytes lines = TIME_OVER if x.total_at and d.engine.now + EARLY_US >= x.total_at else STOPPED
    cdef uint32_t n
    cdef int result
    if not x.answer_started or not x.web.framed or d.fd < 0 or d.out.end > d.out.start or \
            web_trailers(&x.web.answer, lines, <uint32_t>len(lines), out) < 0:
        return False
    n = out.end - out.start
    if x.answer.out == BODY_CHUNKED:
        result = d.put_chunk(out.base + out.start, n)
        if result == 0:
            result = d.put(b"0\r\n\r\n", 5)
    else:
        result = d.put(out.base + out.start, n)
    buffer_release(out)
    return result == 0 and d.out.end == d.out.start         # it is closed now: nothing can wait
