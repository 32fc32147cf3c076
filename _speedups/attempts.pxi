# Attempts: from admission to an answer, however often it takes (included by engine.pyx).
#
# Strategy: a request is admitted to its upstream or waits in a bounded queue; then it is sent. Whether it may be sent again is
# one question, asked in one place (try_again): the configuration names the failures, the money rules say which requests may be
# repeated, and the number of attempts, the deadline and the shared budget bound it. Python is called from here: for a back-off,
# a hedge or a full upstream only.

cdef enum:
    QUEUE_LOOK_MS = 5           # how often a full upstream is looked at: another worker may have made room
    HEDGE_ATTEMPTS = 1
    CHOICES = 4                 # endpoints that are asked for a free connection where no new one may be made

cdef inline bint is_safe(uint8_t method) noexcept nogil:
    """RFC 9110 9.2.1."""
    return method == M_GET or method == M_HEAD or method == M_OPTIONS or method == M_TRACE


cdef inline bint is_idempotent(uint8_t method) noexcept nogil:
    """RFC 9110 9.2.2."""
    return is_safe(method) or method == M_PUT or method == M_DELETE


cdef uint32_t retry_bit(int status) noexcept nogil:
    if status == 503:
        return RETRY_503
    if status == 502:
        return RETRY_502
    if status == 504:
        return RETRY_504
    if status == 500:
        return RETRY_500
    return RETRY_429 if status == 429 else 0


cdef int64_t number_of(const Head* head, int known) noexcept nogil:
    """The value of a known field when it is a decimal number of at most 9 digits, else -1."""
    cdef int i = head.first[known]
    cdef int64_t value = 0
    cdef uint32_t k
    cdef uint8_t c
    if i < 0 or head.fields[i].value_len == 0 or head.fields[i].value_len > 9:
        return -1
    for k in range(head.fields[i].value_len):
        c = <uint8_t>head.base[head.fields[i].value + k]
        if c < 48 or c > 57:
            return -1
        value = value * 10 + (c - 48)
    return value


cdef uint64_t balance_key(Exchange x):
    """What consistent hashing goes by, hashed; 0 for every other way to balance."""
    cdef bytes value = None
    if x.upstream.key_kind == KEY_NONE or x.balance_key:
        return x.balance_key
    if x.upstream.key_kind == KEY_HEADER:
        value = x.named(x.upstream.key_name)
    elif x.upstream.key_kind == KEY_COOKIE:
        value = cookie_of(x, x.upstream.key_name)
    elif x.upstream.key_kind == KEY_CLIENT and x.principal is not None:
        value = (x.principal.client or x.principal.subject or "").encode("utf-8", "surrogatepass")
    if x.upstream.key_kind <= KEY_SOURCE and not value:
        value = x.client[:16]
    if value:
        x.balance_key = hash_key(value, len(value)) or 1
    else:                                           # nothing to go by: anywhere
        x.balance_key = (<uint64_t>x.generation * <uint64_t>0x9E3779B97F4A7C15) ^ <uint64_t>x.started or 1
    return x.balance_key


cdef bytes cookie_of(Exchange x, bytes name):
    """The value of the first cookie of that name (RFC 6265 5.4), None without one."""
    cdef bytes line = x.field(F_COOKIE)
    if line is not None:
        for pair in line.split(b";"):
            key, equals, value = pair.strip(b" \t").partition(b"=")
            if equals and key == name:
                return value
    return None


cdef bint keyed(Exchange x) except -1:
    """Whether the service will see an Idempotency-Key. One that is empty, or that a policy takes away, makes nothing safe."""
    cdef int i = x.head.first[F_IDEMPOTENCY_KEY]
    cdef Edits edits = x.route.request_edits
    cdef list removed = x.request_removed or [], lines = x.request_set or []
    if i < 0 or x.head.fields[i].value_len == 0:
        return False
    if edits is not None:
        removed, lines = [*removed, *edits.remove], [*lines, *edits.add.splitlines()]
    for name in removed:
        if fold(name) == b"idempotency-key":
            return any([line.startswith(b"idempotency-key: ") and line.strip() != b"idempotency-key:" for line in lines])
    return True


# -- admission --------------------------------------------------------------------------------------------------------

cdef int forward(Downstream d) except -1:
    """The steps let it pass: what earlier hops allow, then a place at the upstream."""
    cdef Exchange x = d.x
    cdef Upstream upstream
    cdef int64_t allowed
    if x.route.shape is not None:
        x.route.shape.apply(x)
    x.upstream = upstream = x.route.upstream
    if upstream.protocol == PROTOCOL_GRPC and d.stream is None and x.web is None and is_grpc(x.head):
        # Trailers do not come through HTTP/1.1, and with them the status would be lost: a refused payment would look like one that was made.
        x.side = SIDE_DOWNSTREAM
        return d.refuse(505, b"grpc-over-http1", b"gRPC needs HTTP/2; this call was not sent to the upstream")
    x.attempts = upstream.attempts
    if x.trusted:
        allowed = number_of(x.head, F_CROSSWAY_ATTEMPTS)
        if 0 <= allowed < x.attempts:
            x.attempts = <int>allowed
        allowed = number_of(x.head, F_CROSSWAY_DEADLINE)
        if allowed >= 0 and (x.total_at == 0 or x.started + allowed * 1000 < x.total_at):
            x.total_at = x.started + allowed * 1000
        if x.total_at and d.engine.now >= x.total_at:
            return expired(d)
    if x.upgrade and not take_place(d):
        return d.reply()
    x.repeatable = not x.upgrade and (is_idempotent(x.head.method) or (upstream.honours_key and keyed(x)))
    # An HTTP/2 server may refuse a stream unread: whatever the method, that may be sent again.
    x.keeping = x.body.mode != BODY_NONE and x.collected is None and not x.upgrade and \
        (upstream.protocol != PROTOCOL_HTTP1 or
         (x.repeatable and x.attempts and (upstream.retry_on & ~<uint32_t>RETRY_CONNECT) != 0))
    if x.body.mode == BODY_LENGTH and x.body.remaining > upstream.replay_max:
        x.keeping = False
    if x.body.mode != BODY_NONE and x.collected is None and not x.keeping:
        x.repeatable = False
    if not upstream.waiting and has_way(d.engine, upstream) and upstream.enter(d.engine.now):
        x.entered = True
        return d.attach(x.upgrade and upstream.protocol == PROTOCOL_HTTP1)
    return wait(d)


cdef bint has_way(Engine engine, Upstream upstream):
    """Whether a request could go out now, on a connection that there is or on a new one. Else it waits like one that has no place."""
    cdef Endpoint endpoint
    cdef BackLink link
    if upstream.connections_max == 0 or upstream.state.connections() < upstream.connections_max:
        return True
    for endpoint in upstream.endpoints:
        if endpoint.idle:
            return True
        for link in endpoint.links:
            if link.usable(engine.now):
                return True
    return False


cdef bint make_room(Upstream upstream):
    """A new connection is needed where the upstream has as many as it may: an idle one makes room."""
    cdef Endpoint endpoint
    cdef BackLink link
    for endpoint in upstream.endpoints:
        if endpoint.idle:
            (<UpstreamConnection>endpoint.idle[0]).leave_pool()
            return True
        for link in endpoint.links:
            if link.resting:
                link.close()
                return True
    return False


cdef int crowded_out(Downstream d) except -1:
    """No connection is free and there are as many as there may be: nobody's fault."""
    cdef Exchange x = d.x
    d.engine.slot.counters[C_UPSTREAM_OVERLOADED] += 1
    if x.sent:
        unreachable(x, 503, None, None)
    else:
        x.refuse(503, b"upstream-overloaded", b"as many connections to the upstream as there may be are in use; this request was not sent")
        x.reply_headers = b"retry-after: 1\r\n"
    return d.reply()


cdef int expired(Downstream d) except -1:
    """Nobody waits for it any more: it is not sent, or not once more."""
    d.engine.slot.counters[C_UPSTREAM_TIMEOUTS] += 1
    d.refuse(504, b"total-timeout", b"the time for this request is over; an earlier attempt may have been executed" if d.x.sent else
             b"the time for this request is over; it was not sent to the upstream")
    return 0


cdef int wait(Downstream d) except -1:
    """No room at the upstream: into its queue, if there is room in that."""
    cdef Exchange x = d.x
    if not x.upstream.queue(x):
        d.engine.slot.counters[C_UPSTREAM_OVERLOADED] += 1
        x.refuse(503, b"upstream-overloaded", b"too many requests to the upstream are under way; this one was not sent")
        x.reply_headers = b"retry-after: 1\r\n"
        return d.reply()
    x.waiting = True
    d.engine.full.add(x.upstream)
    d.arm(T_QUEUE, x.upstream.queue_us)
    d.engine.look_soon()
    return 0


cdef int admit_waiting(Downstream d) except -1:
    """Its turn in the queue has come, perhaps."""
    cdef Exchange x = d.x
    if not has_way(d.engine, x.upstream) or not x.upstream.enter(d.engine.now):
        return 0
    x.upstream.unqueue(x)
    x.waiting = False
    x.entered = True
    return d.attach(x.upgrade and x.upstream.protocol == PROTOCOL_HTTP1)


cdef void let_in(Engine engine, Upstream upstream):
    """Room was made at an upstream: those that waited longest have their turn after the present batch."""
    cdef Exchange x
    cdef int room = upstream.room()
    for x in upstream.waiting:
        if room <= 0:
            break
        room -= 1
        (<Downstream>x.connection).queue_up()
    engine.go_on()


cdef void leave_upstream(Engine engine, Exchange x):
    """The exchange is over: give back its place, in flight or in the queue."""
    if x.waiting:
        x.waiting = False
        x.upstream.unqueue(x)
    if x.entered:
        x.entered = False
        x.upstream.leave(x.status != 0 and x.side != SIDE_UPSTREAM and classify_status(x.status) <= OUT_NEUTRAL)
        if x.upstream.waiting:
            let_in(engine, x.upstream)
    if x.timer is not None:
        timer, x.timer = x.timer, None
        timer.cancel()


# -- another attempt --------------------------------------------------------------------------------------------------

cdef bint may_try(Downstream d, uint32_t why) noexcept:
    """Whether the configuration and the money rules would have it sent again after such a failure."""
    cdef Exchange x = d.x
    return (x.upstream.retry_on & why) != 0 and x.tries < x.attempts and not x.answer_started and x.informational == 0 and \
        not d.orphaned and (why == RETRY_CONNECT or x.repeatable)


cdef bint try_again(Downstream d, uint32_t why, int64_t at_least) except -1:
    """Gives up the present attempt for another one, at once or after a back-off. False when there may be none."""
    cdef Exchange x = d.x
    cdef int64_t delay = 0
    if not may_try(d, why):
        return False
    if why != RETRY_CONNECT or x.tries:
        delay = x.upstream.backoff(x.tries)
    if delay < at_least:
        delay = at_least
    if x.total_at and d.engine.now + delay >= x.total_at:
        return False
    if not x.upstream.pay(d.engine.now):
        d.engine.slot.counters[C_RETRIES_DENIED] += 1
        return False
    x.tries += 1
    d.engine.slot.counters[C_RETRIES] += 1
    d.drop_upstream()
    if x.timer is not None:
        timer, x.timer = x.timer, None
        timer.cancel()
    if delay == 0:
        d.attach(True)
    else:
        d.arm(T_TOTAL, x.route.total_us)
        x.timer = d.engine.loop.call_later(delay / 1e6, d.engine.on_backoff, x, x.generation)
    return True


cdef object unreachable(Exchange x, int status, bytes slug, bytes detail):
    """The last attempt reached nobody; `detail` says that nothing was sent, which must be true of the attempts before it too."""
    x.side = SIDE_UPSTREAM
    if x.sent:
        x.refuse(502, b"upstream-unreachable", b"no endpoint could be reached once more; an earlier attempt may have been executed")
        return
    x.refuse(status, slug, detail)
    x.reply_headers = b"retry-after: 1\r\n"


cdef bint race_again(UpstreamConnection u) except -1:
    """The keep-alive race: a pooled connection turned out to be closed, and what it carried is safe to repeat. Once, at once."""
    cdef Exchange x = u.x
    cdef Downstream d = <Downstream>x.connection
    if x.raced or not x.upstream.pay(d.engine.now):
        return False
    x.raced = True
    d.engine.slot.counters[C_RETRIES] += 1
    u.record(OUTCOME_NONE, 0, 0)
    d.drop_upstream()
    d.attach(True)
    return True


# -- hedging ----------------------------------------------------------------------------------------------------------

cdef void plan_hedge(UpstreamConnection u):
    """A safe request without a body may ask a second endpoint when the first one takes long."""
    cdef Exchange x = u.x
    if x.tries or x.upgrade or x.hedge is not None or x.timer is not None or x.attempts < HEDGE_ATTEMPTS or not x.body.done or \
            x.body.mode != BODY_NONE or not (x.head.method == M_GET or x.head.method == M_HEAD):
        return
    x.timer = u.engine.loop.call_later(x.upstream.hedge_us / 1e6, u.engine.on_hedge, x, x.generation)


cdef int hedge(Engine engine, Exchange x) except -1:
    """The moment has come: the same request to another endpoint, paid from the budget of retries."""
    cdef UpstreamConnection second, first = x.upstream_connection
    cdef Endpoint other
    if first is None or first.state != U_HEAD or first.held or x.answer_started or x.informational or x.tries >= x.attempts or \
            len(x.upstream.endpoints) < 2 or not x.upstream.pay(engine.now):
        return 0
    x.tries += 1
    engine.slot.counters[C_HEDGES] += 1
    other = x.upstream.pick(engine.now, balance_key(x), True, x.endpoint)
    if other is None:
        return 0
    second = None if other is x.endpoint else engine.obtain(x, other, False)
    if second is None:                              # nobody else is well: one question is enough
        x.upstream.decline(other, engine.now)
        return 0
    x.upstream.state.count(U_HEDGES)
    second.take_up(x)
    x.hedge = second
    if second.state == U_CONNECTING:
        return 0
    second.state = U_HEAD
    return send_hedge(second)


cdef int send_hedge(UpstreamConnection u) except -1:
    cdef Exchange x = u.x
    cdef Endpoint endpoint = x.endpoint
    cdef int n
    x.endpoint = u.endpoint
    n = compose_request(x, u.engine.composed, HEAD_ROOM, u.engine.now)
    x.endpoint = endpoint
    u.sent_at = u.engine.now
    if u.stream is not None:
        dress_stream(u, <Downstream>x.connection)
    if n < 0 or u.put_message(u.engine.composed, n, True) < 0:
        drop_hedge(x, OUTCOME_RESET)
    return 0


cdef void drop_hedge(Exchange x, int outcome):
    cdef UpstreamConnection u = x.hedge
    if u is not None:
        u.record(outcome, 0, 0)
        u.detach()
        u.close()


cdef void promote_hedge(Exchange x, int outcome):
    """The hedge goes on as the exchange's connection; the first one ended so, or lost the race."""
    cdef UpstreamConnection first = x.upstream_connection
    cdef UpstreamConnection second = x.hedge
    x.hedge = None
    if first is not None:
        first.record(outcome, 0, 0)
        first.detach()
        first.close()
    x.upstream_connection = second
    x.endpoint = second.endpoint
    (<Downstream>x.connection).arm(T_UP_HEAD, x.route.head_us)


# -- clients that leave -----------------------------------------------------------------------------------------------

cdef bint orphan(Downstream d) except -1:
    """The client is gone, but what it asked for was sent completely and must not be cut: it goes on without it. False: cut it."""
    cdef Exchange x = d.x
    cdef UpstreamConnection u = <UpstreamConnection>x.upstream_connection      # held: the answer's end lets go of it
    if u is None or not x.sent or not x.body.done or not x.upstream.finish_abandoned or is_safe(x.head.method):
        return False
    d.engine.slot.counters[C_ORPHANS] += 1
    x.keep_alive = False
    d.orphaned = True
    d.engine.orphans.add(d)
    if d.stream is None:
        d.engine.unregister(d)
        d.engine.connections -= 1
        d.engine.slot.counters[C_CONNECTIONS_CLOSED] += 1
    elif d.stream.session is not None and d.stream.counted:
        d.stream.counted = False                    # its work goes on: it keeps its place on the connection
        d.held = d.stream.session
    d.hang_up()
    buffer_release(&d.out)
    if u.state == U_BODY:
        d.arm(T_UP_IDLE, x.route.idle_us)
        u.pump_answer()
    elif d.why == T_WRITE:
        d.arm(T_UP_HEAD, x.route.head_us)
    return True


cdef bint goes_on(UpstreamConnection u, Downstream d) except -1:
    """A part of the answer could not be written. True: the exchange is finished without its client, and who asks goes on as if it had been.

    What is behind that part has to be taken by who asks: no event tells of it any more.
    """
    cdef bint held = u.held
    u.held = True                                   # nothing is read in the midst of what is being handed on
    try:
        d.gone()
    finally:
        u.held = held
    return d.orphaned and u.x is not None


cdef void bury(Downstream d):
    """The orphaned exchange is over."""
    d.orphaned = False
    d.engine.closed.append(d)
    d.engine.unlink_timer(d)
    d.engine.orphans.discard(d)
    d.state = D_CLOSED
    if d.held is not None:
        give_stream(d)
    buffer_release(&d.inb)
    buffer_release(&d.out)
