"""What a listener or an upstream allows on its HTTP/2 connections.

Strategy: C fields that the engine reads without asking Python; one object for each listener and upstream of a snapshot, never
changed. Python is called from here: while a snapshot is built.
"""

from libc.stdint cimport int64_t, uint32_t

# Bounds that RFC 9113 sets, or that an HTTP/2 connection needs to work at all.
cdef enum:
    STREAMS_MAX = 10000             # concurrent streams of one connection
    WINDOW_DEFAULT = 65535          # both windows before anybody says otherwise, section 6.9.2
    WINDOW_MIN = 16384              # of a stream: less than one frame of the default size would crawl
    WINDOW_MAX = 2147483647         # section 6.9.1
    BURST_MAX = 1000000
    PING_LEAST_MS = 1000
    PING_TIMEOUT_LEAST_MS = 100
    PING_MOST_MS = 3600000

cdef class Http2:
    # Concurrent streams. A listener announces it; an upstream's connection carries that many at most, fewer when its server says so.
    cdef readonly uint32_t streams
    # Bytes that the other side may send unasked, on one stream and on the whole connection: what bounds memory.
    # Invariant: WINDOW_MIN <= window, WINDOW_DEFAULT <= connection_window, both <= WINDOW_MAX.
    cdef readonly uint32_t window, connection_window
    # Bursts, of streams that are cancelled and of frames that carry nothing, before the connection is ended.
    cdef readonly uint32_t resets, frames
    cdef readonly bint clear        # a listener without TLS takes HTTP/2 by prior knowledge
    # An upstream's connection that has said nothing for ping_us (0: never) is asked, and is at its end when it does not answer in time.
    cdef readonly int64_t ping_us, ping_timeout_us
