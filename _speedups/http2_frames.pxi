# What each frame that arrives does to a session and its streams (included by http2.pyx).
#
# Strategy: feed() hands over one complete frame after the other. What a frame breaks is its stream (stream_error()) or the connection
# (Http2Session.fail()), as RFC 9113 says at each rule; the section is named where it is not that of the frame type.
# Python is called from here: per stream, for its objects.
#
# Safety: p[0:n) is the payload within `inb`, which nobody else appends to while feed() runs; every read is behind a comparison with n.


cdef int take_frame(Http2Session session, uint8_t kind, uint8_t flags, uint32_t id, const char* p, uint32_t n) except -1:
    if session.block_id and (kind != CONTINUATION or id != session.block_id):
        return session.fail(H2_PROTOCOL_ERROR, b"a head block was interrupted")
    if not session.peer_settings and (kind != SETTINGS or flags & ACK):
        return session.fail(H2_PROTOCOL_ERROR, b"the first frame is not SETTINGS")
    if kind == DATA:
        return on_data(session, flags, id, p, n)
    if kind == HEADERS:
        return on_headers(session, flags, id, p, n)
    if kind == WINDOW_UPDATE:
        return on_window(session, id, p, n)
    if kind == RST_STREAM:
        return on_reset(session, id, p, n)
    if kind == SETTINGS:
        return on_settings(session, flags, id, p, n)
    if kind == PING:
        return on_ping(session, flags, id, p, n)
    if kind == CONTINUATION:
        if session.block_id == 0:
            return session.fail(H2_PROTOCOL_ERROR, b"CONTINUATION without HEADERS")
        return on_continuation(session, flags, p, n)
    if kind == GOAWAY:
        return on_goaway(session, id, p, n)
    if kind == PUSH_PROMISE:
        return session.fail(H2_PROTOCOL_ERROR, b"PUSH_PROMISE is not offered")
    if kind == PRIORITY:
        if id == 0:
            return session.fail(H2_PROTOCOL_ERROR, b"PRIORITY of no stream")
        if n != 5:
            return session.fail(H2_FRAME_SIZE_ERROR, b"PRIORITY of a wrong size")
    session.pay_frame()                            # PRIORITY, and what nobody knows: passed over (RFC 9113 4.1, 5.3.2)
    return 0


cdef bint is_idle(Http2Session session, uint32_t id) noexcept:
    """Whether the stream was never opened."""
    if session.client:
        return not id & 1 or id >= session.next_id
    return not id & 1 or id > session.last_id


cdef int of_past_stream(Http2Session session, uint32_t id) noexcept:
    """A frame of a stream that is no more. 0 when we gave it up, and the other side may not know that yet."""
    cdef uint32_t past = session.recent[(id >> 1) & (RECENT - 1)]
    if past == (id | 0x80000000):
        session.pay_frame()
        return 0
    if session.client and past != id:
        return 0                                # too long ago to tell
    if past == id:
        return session.fail(H2_STREAM_CLOSED, b"a frame of a stream that was closed")
    return session.fail(H2_PROTOCOL_ERROR, b"a frame of a stream that cannot be opened any more")


cdef int stream_error(Http2Session session, Http2Stream stream, uint32_t error) except -1:
    """The other side broke the rules within one stream."""
    stream.give_up(error)
    session.pay_reset()
    session.stirred(stream, STIR_RESET)            # also when that was one too many: lost() passes over what is reset
    return 0


# DATA ............................................................................................................

cdef int on_data(Http2Session session, uint8_t flags, uint32_t id, const char* p, uint32_t n) except -1:
    cdef Http2Stream stream
    cdef uint32_t framed = n, pad = 0
    if id == 0 or is_idle(session, id):
        return session.fail(H2_PROTOCOL_ERROR, b"DATA of no stream")
    if flags & PADDED:
        if n == 0 or <uint8_t>p[0] >= n:
            return session.fail(H2_PROTOCOL_ERROR, b"more padding than frame")
        pad = 1 + <uint8_t>p[0]
        p += 1
        n -= pad
    if framed > session.window:
        return session.fail(H2_FLOW_CONTROL_ERROR, b"DATA beyond the connection's window")
    session.window -= framed
    session.asks = 0
    stream = session.find(id)
    if stream is None or stream.reset:
        session.owed += framed                     # nobody will take it
        if session.owed >= session.settings.connection_window >> 1:
            session.put_word(WINDOW_UPDATE, 0, session.owed)
            session.window += session.owed
            session.owed = 0
        return of_past_stream(session, id) if stream is None else 0
    if stream.ended:
        session.owed += framed
        return stream_error(session, stream, H2_STREAM_CLOSED)
    if framed > stream.window:
        session.owed += framed
        return stream_error(session, stream, H2_FLOW_CONTROL_ERROR)
    stream.window -= framed
    stream.received += n
    if (stream.expected >= 0 and stream.received > stream.expected) or (session.client and not stream.headed) or \
            (stream.bodiless and n and stream.headed):
        session.owed += framed
        session.counters[C_H2_MALFORMED] += 1
        return stream_error(session, stream, H2_PROTOCOL_ERROR)
    if pad:
        stream.taken(pad)
    if n == 0 and not flags & END_STREAM:
        session.pay_frame()
        return 0
    if n:
        session.earn(1)
    if flags & END_STREAM:
        stream.ended = True
        if stream.expected >= 0 and stream.received != stream.expected and not stream.bodiless:
            stream.ended = False
            session.owed += n
            session.counters[C_H2_MALFORMED] += 1
            return stream_error(session, stream, H2_PROTOCOL_ERROR)
    if n and stream.inb.end > stream.inb.start:
        if buffer_append(&stream.inb, p, n) < 0:
            return session.fail(H2_INTERNAL_ERROR, b"out of memory")
        session.stirred(stream, STIR_READ)
        return 0
    stream.at = p
    stream.at_left = n
    session.stirred(stream, STIR_READ)
    if stream.at_left and stream.session is not None:
        n = stream.at_left
        stream.at_left = 0
        if buffer_append(&stream.inb, stream.at, n) < 0:
            return session.fail(H2_INTERNAL_ERROR, b"out of memory")
    stream.at = NULL
    stream.at_left = 0
    return 0

# HEADERS, CONTINUATION ...........................................................................................


cdef int on_headers(Http2Session session, uint8_t flags, uint32_t id, const char* p, uint32_t n) except -1:
    cdef uint32_t pad
    if id == 0 or not id & 1:
        return session.fail(H2_PROTOCOL_ERROR, b"HEADERS of a stream that cannot be")
    if session.client and id >= session.next_id:
        return session.fail(H2_PROTOCOL_ERROR, b"an answer to no request")
    session.asks = 0
    if flags & PADDED:
        if n == 0 or <uint8_t>p[0] >= n:
            return session.fail(H2_PROTOCOL_ERROR, b"more padding than frame")
        pad = <uint8_t>p[0]
        p += 1
        n -= 1 + pad
    if flags & PRIORITISED:
        if n < 5:
            return session.fail(H2_FRAME_SIZE_ERROR, b"HEADERS without its priority")
        if (word_at(p) & 0x7fffffff) == id:
            return session.fail(H2_PROTOCOL_ERROR, b"a stream that depends on itself")
        p += 5
        n -= 5
    if flags & END_HEADERS:
        return on_block(session, flags, id, p, n)
    session.block_id = id
    session.block_flags = flags
    session.block_frames = 0
    if buffer_append(&session.block, p, n) < 0:
        return session.fail(H2_INTERNAL_ERROR, b"out of memory")
    return 0


cdef int on_continuation(Http2Session session, uint8_t flags, const char* p, uint32_t n) except -1:
    cdef uint32_t id = session.block_id
    session.block_frames += 1
    if session.block_frames > BLOCK_FRAMES or session.block.end - session.block.start + n > BLOCK_MAX:
        return session.fail(H2_ENHANCE_YOUR_CALM, b"a head without end")
    if buffer_append(&session.block, p, n) < 0:
        return session.fail(H2_INTERNAL_ERROR, b"out of memory")
    if flags & END_HEADERS:
        session.block_id = 0
        on_block(session, session.block_flags, id, session.block.base + session.block.start, session.block.end - session.block.start)
        buffer_release(&session.block)
    return 0


cdef int on_block(Http2Session session, uint8_t flags, uint32_t id, const char* p, uint32_t n) except -1:
    cdef Http2Stream stream = session.find(id)
    cdef bint fresh = stream is None and not session.client and id > session.last_id
    if stream is not None and not stream.reset:
        if stream.ended:
            if session.decode(NOTHING, NULL, None, p, n) >= BROKEN:
                return 0
            return stream_error(session, stream, H2_STREAM_CLOSED)
        return on_answer(session, stream, flags, p, n) if session.client and not stream.headed else on_trailers(session, stream, flags, p, n)
    if fresh and id <= session.refuse_above:
        return on_request(session, flags, id, p, n)
    if session.decode(NOTHING, NULL, None, p, n) >= BROKEN:
        return 0
    if fresh:                                       # it crossed our GOAWAY, and so may what follows it (RFC 9113 6.8): passed over
        session.last_id = id
        session.recent[(id >> 1) & (RECENT - 1)] = id | 0x80000000
    elif stream is None:
        return of_past_stream(session, id)
    return 0


cdef int on_request(Http2Session session, uint8_t flags, uint32_t id, const char* p, uint32_t n) except -1:
    cdef Http2Stream stream
    cdef int found
    session.last_id = id
    session.earn(PREPAID)
    if session.active >= <int>session.settings.streams:
        session.recent[(id >> 1) & (RECENT - 1)] = id | 0x80000000
        if session.decode(NOTHING, NULL, None, p, n) >= BROKEN:
            return 0
        session.counters[C_H2_REFUSED] += 1
        session.put_word(RST_STREAM, id, H2_REFUSED_STREAM)
        session.pay_reset()
        return 0
    stream = Http2Stream.__new__(Http2Stream)
    stream.session = session
    stream.id = id
    stream.window = session.settings.window
    stream.send_window = session.peer_window
    session.enter(stream)
    found = session.decode(REQUEST, &stream.inb, stream, p, n, (flags & END_STREAM) != 0)
    if found >= BROKEN:
        stream.close()
        return 0
    stream.ended = (flags & END_STREAM) != 0
    if found == SOUND and stream.ended and stream.expected > 0:
        found = MALFORMED
    if found == MALFORMED:
        session.counters[C_H2_MALFORMED] += 1
        stream.give_up(H2_PROTOCOL_ERROR)
        stream.close()
        session.pay_reset()
        return 0
    stream.text_left = stream.inb.end - stream.inb.start
    session.opened(stream)
    return 0


cdef int on_answer(Http2Session session, Http2Stream stream, uint8_t flags, const char* p, uint32_t n) except -1:
    """A head from the server: an informational one, or the answer's."""
    cdef uint32_t before = stream.inb.end - stream.inb.start
    cdef int found = session.decode(ANSWER, &stream.inb, stream, p, n, (flags & END_STREAM) != 0)
    if found >= BROKEN:
        return 0
    if found == SOUND and flags & END_STREAM:
        stream.ended = True
        if not stream.headed or (stream.expected > 0 and not stream.bodiless):
            found = MALFORMED
    if found == MALFORMED or stream.too_long:
        session.counters[C_H2_MALFORMED] += 1
        stream.ended = False
        return stream_error(session, stream, H2_PROTOCOL_ERROR)
    stream.text_left += stream.inb.end - stream.inb.start - before
    session.stirred(stream, STIR_READ)
    return 0


cdef int on_trailers(Http2Session session, Http2Stream stream, uint8_t flags, const char* p, uint32_t n) except -1:
    cdef int found = session.decode(TRAILERS, &stream.trailers, stream, p, n)
    if found >= BROKEN:
        return 0
    if found == MALFORMED or not flags & END_STREAM or stream.connects or \
            (stream.expected >= 0 and stream.received != stream.expected and not stream.bodiless):
        session.counters[C_H2_MALFORMED] += 1
        return stream_error(session, stream, H2_PROTOCOL_ERROR)
    stream.ended = True
    session.stirred(stream, STIR_READ)
    return 0

# The others ......................................................................................................


cdef int on_reset(Http2Session session, uint32_t id, const char* p, uint32_t n) except -1:
    cdef Http2Stream stream
    if n != 4:
        return session.fail(H2_FRAME_SIZE_ERROR, b"RST_STREAM of a wrong size")
    if id == 0 or is_idle(session, id):
        return session.fail(H2_PROTOCOL_ERROR, b"RST_STREAM of no stream")
    session.counters[C_H2_RESETS_IN] += 1
    stream = session.find(id)
    if stream is None or stream.reset:
        session.pay_frame()
        return 0
    if not session.pay_reset():
        return 0
    stream.error = word_at(p)
    stream.reset = True
    stream.refused = stream.error == H2_REFUSED_STREAM
    session.stirred(stream, STIR_RESET)
    return 0


cdef int on_settings(Http2Session session, uint8_t flags, uint32_t id, const char* p, uint32_t n) except -1:
    cdef uint32_t which, value
    cdef int64_t change
    cdef Http2Stream stream
    cdef void* at
    cdef int i
    if id != 0:
        return session.fail(H2_PROTOCOL_ERROR, b"SETTINGS of a stream")
    if flags & ACK:
        if n:
            return session.fail(H2_FRAME_SIZE_ERROR, b"an acknowledgement with a payload")
        if session.acknowledged:                   # there was one SETTINGS of ours
            session.pay_frame()
        session.acknowledged = True
        return 0
    if n % 6:
        return session.fail(H2_FRAME_SIZE_ERROR, b"SETTINGS of a wrong size")
    if session.peer_settings and not session.pay_frame():
        return 0
    while n:
        which = word_at(p) >> 16
        value = word_at(p + 2)
        p += 6
        n -= 6
        if which == INITIAL_WINDOW_SIZE:
            if value > WINDOW_MAX:
                return session.fail(H2_FLOW_CONTROL_ERROR, b"a window that is too large")
            change = <int64_t>value - session.peer_window
            session.peer_window = value
            for i in range(64):
                at = session.table[i]
                while at != NULL:
                    stream = <Http2Stream>at
                    stream.send_window += change
                    if stream.send_window > WINDOW_MAX:
                        return session.fail(H2_FLOW_CONTROL_ERROR, b"a window that is too large")
                    at = stream.following
        elif which == MAX_CONCURRENT_STREAMS:
            session.peer_streams = value
        elif which == ENABLE_PUSH and (value > 1 or (session.client and value)):
            return session.fail(H2_PROTOCOL_ERROR, b"a setting that cannot be")
        elif which == MAX_FRAME_SIZE and (value < FRAME_MAX or value > 16777215):
            return session.fail(H2_PROTOCOL_ERROR, b"a frame size that cannot be")
        elif which == ENABLE_CONNECT_PROTOCOL:
            if value > 1 or (session.client and session.peer_connects and not value):       # it may not be taken back (RFC 8441 3)
                return session.fail(H2_PROTOCOL_ERROR, b"a setting that cannot be")
            session.peer_connects = value
    session.put_frame(0, SETTINGS, ACK, 0)
    session.peer_settings = True
    session.wake()
    return 0


cdef int on_ping(Http2Session session, uint8_t flags, uint32_t id, const char* p, uint32_t n) noexcept:
    if id != 0:
        return session.fail(H2_PROTOCOL_ERROR, b"PING of a stream")
    if n != 8:
        return session.fail(H2_FRAME_SIZE_ERROR, b"PING of a wrong size")
    if flags & ACK:
        if session.pinged and memcmp(p, b"draining", 8) == 0:
            session.drained()
        elif session.asked and memcmp(p, b"crossway", 8) == 0:
            session.asked = False
        else:
            session.pay_frame()
        return 0
    if session.pay_frame():
        session.put_frame(8, PING, ACK, 0)
        memcpy(session.out.base + session.out.end, p, 8)
        session.out.end += 8
    return 0


cdef int on_goaway(Http2Session session, uint32_t id, const char* p, uint32_t n) except -1:
    cdef Http2Stream stream
    cdef uint32_t highest
    cdef int i
    cdef void* at
    if id != 0:
        return session.fail(H2_PROTOCOL_ERROR, b"GOAWAY of a stream")
    if n < 8:
        return session.fail(H2_FRAME_SIZE_ERROR, b"GOAWAY of a wrong size")
    session.peer_leaves = True
    if not session.client:
        session.pay_frame()
        return 0
    highest = word_at(p) & 0x7fffffff
    streams = []
    for i in range(64):
        at = session.table[i]
        while at != NULL:
            stream = <Http2Stream>at
            if stream.id > highest and not stream.reset:
                streams.append(stream)
            at = stream.following
    for stream in streams:
        stream.refused = True
        stream.reset = True
        stream.error = H2_REFUSED_STREAM
        session.stirred(stream, STIR_RESET)
    return 0


cdef int on_window(Http2Session session, uint32_t id, const char* p, uint32_t n) except -1:
    cdef Http2Stream stream
    cdef uint32_t more
    if n != 4:
        return session.fail(H2_FRAME_SIZE_ERROR, b"WINDOW_UPDATE of a wrong size")
    more = word_at(p) & 0x7fffffff
    if id == 0:
        if more == 0:
            return session.fail(H2_PROTOCOL_ERROR, b"WINDOW_UPDATE of nothing")
        session.send_window += more
        if session.send_window > WINDOW_MAX:
            return session.fail(H2_FLOW_CONTROL_ERROR, b"a window that is too large")
        if more >= SMALL_UPDATE or session.pay_frame():
            session.wake()
        return 0
    if is_idle(session, id):
        return session.fail(H2_PROTOCOL_ERROR, b"WINDOW_UPDATE of no stream")
    stream = session.find(id)
    if stream is None or stream.reset:
        session.pay_frame()                        # it may have crossed our end
        return 0
    if more == 0:
        return stream_error(session, stream, H2_PROTOCOL_ERROR)
    stream.send_window += more
    if stream.send_window > WINDOW_MAX:
        return stream_error(session, stream, H2_FLOW_CONTROL_ERROR)
    if more < SMALL_UPDATE and not session.pay_frame():
        return 0
    if stream in session.blocked and session.send_window > 0 and session.out.end - session.out.start < OUT_HIGH:
        session.blocked.pop(stream, None)
        session.stirred(stream, STIR_WRITE)
    return 0
