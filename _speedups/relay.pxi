# Bytes from one connection to another as they come (included by engine.pyx): under WebSockets and raw TCP alike.
#
# Strategy: a side is read only while the other one has taken everything, so two connections hold at most RELAY_PIECE bytes each
# way. An end of one side is passed on as such, once all it said is delivered. Python is called from here: never.

cdef enum:
    RELAY_PIECE = 65536             # one recv(), and what waits for a side that does not read


cdef bint relay_events(Connection c, uint32_t events):
    """Notes an event of one of the two, and sends what waits. True when some of that moved, or could not."""
    cdef bint moved = False
    if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        c.ended = True
    if events & EPOLLOUT:
        c.writable = True
        if c.out.end > c.out.start:
            moved = True
            if c.flush() < 0:
                sink_lost(c)
        if c.tls is not None and c.tls.starved:
            c.readable = True
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        c.wake()
    return moved


cdef ssize_t relay(Connection source, Connection sink) noexcept:
    """One piece. The bytes read; 0 when nothing goes now, or the source has ended; -errno when it broke."""
    cdef ssize_t n
    if source.finished or not source.readable or sink.out.end > sink.out.start:
        return 0
    n = source.recv(source.engine.scratch, RELAY_PIECE)
    if n == -EAGAIN:
        source.readable = False
        return 0
    if n <= 0:
        source.finished = n == 0
        return n
    if source.drained(n, RELAY_PIECE):
        source.readable = False
    if sink.put(source.engine.scratch, <uint32_t>n) < 0:
        source.finished = True                      # nobody takes what it says
        sink_lost(sink)
    return n


cdef void sink_lost(Connection sink):
    """It takes nothing any more. What it said before is still read, to its end."""
    sink.shut_out = True
    sink.readable = True
    sink.broken_off = not sink.finished             # who has said its end need not listen
    buffer_release(&sink.out)


cdef void pass_end(Connection source, Connection sink):
    """The source has ended and all it said is delivered: so ends our side towards the sink."""
    if source.finished and not sink.shut_out and sink.out.end == sink.out.start and sink.shut():
        sink.shut_out = True
