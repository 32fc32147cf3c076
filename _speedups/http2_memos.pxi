# What blocks said that nothing but a change of HPACK's table can make say something else (included by http2.pyx).
#
# Strategy: clients repeat their heads. Once all fields of one stand in the tables, its block is a few bytes, each of which names an entry. Such a
# block changes no table, and decodes to the same text for as long as no other block is decoded: so the text is kept, and found by the block's
# bytes. Any other block makes a session forget all: whether it entered something need not be known.
# Python is called from here: never.
#
# Safety: `memos` holds blocks of malloc() of sizeof(Memo) + size bytes, or NULL; they are freed by forget(), which release() calls, and when another
# one takes their place. What depends on more than the block is in the key: what it is for, and whether a body follows; that the text fits behind
# what waits before it is looked at each time.

cdef struct Memo:
    uint8_t block[24]           # MEMO_BLOCK
    uint32_t n                  # bytes of it
    int what
    bint open
    bint trailing
    bint grpc
    int status
    int64_t expected
    uint32_t size               # of the text, which follows


cdef inline char* memo_text(Memo* memo) noexcept nogil:
    return <char*>memo + sizeof(Memo)


cdef bint only_indexed(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether each byte of a block is an entry's index (RFC 7541 6.1; of 126 or less, and none is 0)."""
    cdef uint32_t i
    if n == 0 or n > MEMO_BLOCK:
        return False
    for i in range(n):
        if p[i] <= 0x80 or p[i] == 0xff:
            return False
    return True


cdef Memo* recall(Http2Session session, int what, bint open, const uint8_t* p, uint32_t n) noexcept:
    cdef Memo* memo
    cdef int i
    for i in range(MEMOS):
        memo = <Memo*>session.memos[i]
        if memo != NULL and memo.n == n and memo.what == what and memo.open == open and memcmp(memo.block, p, n) == 0:
            return memo
    return NULL


cdef void keep(Http2Session session, Block* b, const uint8_t* p, uint32_t n, const char* text, uint32_t size) noexcept:
    """Remembers what a block of only_indexed() said, in the oldest one's place; without memory, or when it is long, not at all."""
    cdef Memo* memo
    if size == 0 or size > MEMO_TEXT:
        return
    memo = <Memo*>malloc(sizeof(Memo) + size)
    if memo == NULL:
        return
    memcpy(memo.block, p, n)
    memo.n = n
    memo.what = b.what
    memo.open = b.open
    memo.trailing = b.trailing
    memo.grpc = b.grpc
    memo.status = b.status
    memo.expected = b.expected
    memo.size = size
    memcpy(memo_text(memo), text, size)
    free(session.memos[session.memo_next])
    session.memos[session.memo_next] = <void*>memo
    session.memo_next = (session.memo_next + 1) & (MEMOS - 1)


cdef void forget(Http2Session session) noexcept:
    cdef int i
    for i in range(MEMOS):
        free(session.memos[i])
        session.memos[i] = NULL


cdef void said(Http2Stream stream, int what, int status, int64_t expected, bint trailing, bint grpc) noexcept:
    """What a sound head says of its stream."""
    if what == REQUEST:
        stream.expected = expected
        stream.trailing = trailing
        stream.grpc = grpc
    elif what == ANSWER and status >= 200:
        stream.headed = True
        if status == 204 or status == 304:
            stream.bodiless = True
        stream.expected = expected
