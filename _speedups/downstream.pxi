# The client's side of the engine (included by engine.pyx): from the first byte of a request to the last of its answer.
#
# Strategy: one exchange at a time; what the client pipelines behind it stays in the read buffer, then in the kernel. The head
# of the present request stays where it was read until its exchange ends, so views into it are offsets. `advance` is the only
# loop; all else returns to it, so a client that sends ten thousand refusable requests costs no stack.


cdef class Downstream(Connection):
    """A client's connection."""

    cdef int on_events(self, uint32_t events) except -1:
        cdef int result
        if self.state == D_HANDSHAKE:
            return secure_client(self, events)
        if self.state == D_TUNNEL:
            return tunnel_events(self, self, events)
        if events & (EPOLLERR | EPOLLHUP):
            if self.state != D_LINGER:
                return self.gone()
            # Both sides have ended: what is unread has to be read, or close() would reset what the client has not got yet.
            if events & EPOLLHUP:
                self.ended = True
            return self.linger()
        if events & EPOLLRDHUP:
            self.ended = True
        if events & EPOLLOUT:
            self.writable = True
            if self.out.end > self.out.start:
                result = self.flush()
                if result < 0:
                    return self.gone()
                if result == 0:
                    self.arm(T_WRITE, self.listener.write_us)
                elif self.flushed() < 0:
                    return 0
            elif self.tls is not None:
                if self.state == D_LINGER:
                    if not self.shut_out:           # there was no room for the last word
                        self.shut_out = self.shut()
                elif self.tls is not None and self.tls.starved:
                    self.readable = True
        if events & (EPOLLIN | EPOLLRDHUP):
            self.wake()
        if self.fd >= 0:
            self.advance()
        return 0

    cdef int flushed(self) except -1:
        """All that waited is sent: go on with what it had stopped."""
        cdef UpstreamConnection upstream
        if self.state == D_FLUSH:
            return self.settle()
        if self.x is not None and self.x.upstream_connection is not None:
            upstream = <UpstreamConnection>self.x.upstream_connection
            if upstream.state == U_BODY:
                self.arm(T_UP_IDLE, self.x.route.idle_us)
                upstream.pump_answer()
            elif upstream.state == U_HEAD and not upstream.held:        # a 1xx had to wait
                if self.x.body.done:
                    self.arm_head()
                else:
                    self.arm(T_BODY, self.listener.body_us)
        return 0

    cdef int on_timeout(self) except -1:
        cdef uint8_t why = self.why
        cdef uint64_t* counters = self.engine.slot.counters
        if self.state == D_HANDSHAKE:
            counters[C_TLS_TIMEOUTS] += 1
            self.close()
            return 0
        if self.state == D_TUNNEL:
            return tunnel_silent(self)
        if self.state == D_ACTIVE:
            self.exchange_timeout(why)
            return self.advance()                   # what the client pipelined behind it has arrived already
        if self.state == D_HEAD:
            counters[C_TIMEOUTS_HEAD] += 1
            begin_unparsed(self)
            return self.refuse(408, b"head-timeout", b"the request head did not arrive in time")
        if why == T_WRITE:
            counters[C_TIMEOUTS_WRITE] += 1
            self.cut_short()
        elif why == T_KEEPALIVE:
            counters[C_TIMEOUTS_IDLE] += 1
        self.close()
        return 0

    cdef int exchange_timeout(self, uint8_t why) except -1:
        cdef Exchange x = self.x
        cdef UpstreamConnection upstream
        cdef uint64_t* counters = self.engine.slot.counters
        if why == T_BODY:
            upstream = x.upstream_connection
            if upstream is not None and upstream.out.end > upstream.out.start:
                counters[C_UPSTREAM_TIMEOUTS] += 1
                x.side = SIDE_UPSTREAM
                return self.abort(True) if x.answer_started else \
                    self.refuse(504, b"upstream-write-timeout", b"the upstream stopped reading the request")
            counters[C_TIMEOUTS_BODY] += 1
            x.side = SIDE_DOWNSTREAM
            return self.abort(True, 408) if x.answer_started else self.refuse(408, b"body-timeout", b"the request body stopped arriving")
        if why == T_WRITE:
            counters[C_TIMEOUTS_WRITE] += 1
            x.side = SIDE_DOWNSTREAM
            return self.abort(True)
        # A call that is answered while it is sent is a conversation: the client's silence is not to blame for its end.
        if why == T_TOTAL and not (x.grpc and x.answer_started) and self.waits_for_body():
            counters[C_TIMEOUTS_BODY] += 1
            x.side = SIDE_DOWNSTREAM
            return self.abort(True) if x.answer_started else \
                self.refuse(408, b"body-timeout", b"the request body did not arrive in the time for this request")
        if why == T_QUEUE:
            counters[C_UPSTREAM_QUEUE_TIMEOUTS] += 1
            x.upstream.state.count(U_QUEUE_TIMEOUTS)
            x.refuse(503, b"upstream-queue-timeout", b"no place at the upstream became free in time; this request was not sent")
            x.reply_headers = b"retry-after: 1\r\n"
            return self.reply()
        counters[C_UPSTREAM_TIMEOUTS] += 1
        upstream = x.upstream_connection
        if upstream is not None and (why == T_UP_HEAD or why == T_UP_IDLE or (why == T_TOTAL and x.sent)):
            if why == T_TOTAL and hurried(x):
                upstream.record(OUTCOME_GRPC, GRPC_DEADLINE_EXCEEDED, 0)
            else:
                upstream.record(OUTCOME_TIMEOUT, 0, 0)
            if upstream.link is not None:
                upstream.link.suspect(upstream.sent_at)
        if why == T_UP_HEAD and x.hedge is not None:
            promote_hedge(x, OUTCOME_TIMEOUT)
            return 0
        if why == T_UP_HEAD and try_again(self, RETRY_TIMEOUT, 0):
            return 0
        if why == T_CONNECT:                        # another attempt may go well: whose fault it was is said where there is none
            upstream = <UpstreamConnection>x.upstream_connection
            if upstream.link is not None and upstream.link.stands:
                upstream.link.retiring = True       # its SETTINGS never came: nobody shall wait for them again
            return upstream.connect_failed(504, b"upstream-connect-timeout", b"the upstream did not accept a connection in time; the request was not sent")
        x.side = SIDE_UPSTREAM
        if x.answer_started:
            return self.abort(True)
        if why == T_UP_HEAD:
            return self.refuse(504, b"upstream-head-timeout", b"the upstream did not answer in time; the request may have been executed")
        if why == T_UP_IDLE and not x.body.done:
            return self.refuse(504, b"upstream-idle-timeout", b"the upstream stopped taking the request; it did not get all of it")
        if why == T_UP_IDLE:
            return self.refuse(504, b"upstream-idle-timeout", b"the upstream's answer stopped; the request may have been executed")
        if not x.sent:
            return self.refuse(504, b"total-timeout", b"the time for this request is over; it was not sent to the upstream")
        return self.refuse(504, b"total-timeout", b"the time for this request is over; it may have been executed")

    cdef bint waits_for_body(self) noexcept:
        """Whether the request's next bytes are the client's to send, not the upstream's to take."""
        cdef UpstreamConnection upstream = self.x.upstream_connection
        if self.x.body.done:
            return False
        if upstream is None:
            return self.x.collecting
        return upstream.state != U_CONNECTING and upstream.out.end == upstream.out.start

    cdef void arm_body(self) noexcept:
        """Sets the deadline for the side that a request body waits for."""
        if self.waits_for_body():
            self.arm(T_BODY, self.listener.body_us)
        else:
            self.arm(T_UP_IDLE, self.x.route.idle_us)

    cdef void arm_head(self) noexcept:
        """Sets the deadline for the answer's head: that of one attempt while another may follow."""
        if self.x.upstream.per_try_us and may_try(self, RETRY_TIMEOUT):
            self.arm(T_UP_HEAD, self.x.upstream.per_try_us)
        else:
            self.arm(T_UP_HEAD, self.x.route.head_us)

    cdef void arm(self, uint8_t why, int64_t us) noexcept:
        """Sets the deadline for what is waited for now, cut by the exchange's total."""
        cdef int64_t at = self.engine.now + us
        if self.x is not None and self.x.total_at and self.x.total_at < at:
            at = self.x.total_at
            why = T_TOTAL
        self.engine.set_timer(self, why, at)

    cdef int advance(self) except -1:
        cdef int turns = 0
        while self.fd >= 0:
            if self.state == D_IDLE or self.state == D_HEAD:
                turns += 1
                if turns > PIECES:                  # requests answered here never wait: others have a turn too
                    return self.queue_up()
                if read_head(self) == 0:
                    return 0
            elif self.state == D_ACTIVE:
                if self.x.waiting:
                    admit_waiting(self)
                    if self.x is not None and self.x.waiting:
                        return 0
                elif self.x.body.done or self.pump_request() == 0:
                    return 0
            elif self.state == D_LINGER:
                return self.linger()
            else:
                return 0
        return 0

    cdef int queue_up(self) except -1:
        """Goes on after the others of this batch had their turn."""
        if not self.queued:
            self.queued = True
            self.engine.again.append(self)
        return 0

    # -- steps and answers of our own ---------------------------------------------------------------------------------

    cdef int run_steps(self) except -1:
        cdef Exchange x = self.x
        cdef Step step
        cdef int verdict
        while x.step < x.route.step_count:
            step = <Step>x.route.step[x.step]
            verdict = step.run(x)
            if verdict == STEP_GO:
                x.step += 1
                continue
            if verdict == STEP_ANSWERED:
                return self.reply()
            x.parked = step
            if verdict == STEP_COLLECT and x.collected is None:
                return self.collect()
            self.arm(T_TOTAL, x.route.total_us)
            self.engine.parked.append((x, x.generation))
            return 0
        return forward(self)

    cdef int collect(self) except -1:
        """Begins to gather the body for the parked step; pump_request() parks the exchange once it is complete."""
        cdef Exchange x = self.x
        x.collected = bytearray()
        if x.body.out == BODY_CHUNKED:
            x.body.out = BODY_LENGTH                # it leaves in one piece, framed by what was gathered
        if x.body.done:
            self.engine.parked.append((x, x.generation))
            return 0
        if x.body.mode == BODY_LENGTH and x.body.remaining > x.parked.body_limit:
            return self.refuse(413, b"body-too-large", b"the request body is larger than the policy's limit")
        x.collecting = True
        if x.head.expect and self.inb.end - self.inb.start == x.body_at and \
                self.put_message(b"HTTP/1.1 100 Continue\r\n\r\n", 25, False) < 0:
            return self.gone()
        self.arm(T_BODY, self.listener.body_us)
        return 0

    cdef int refuse(self, int status, bytes slug, bytes detail) except -1:
        """Ends the exchange with an answer of our own; an upstream that is at work for it is cut off."""
        cdef Exchange x = self.x
        self.drop_upstream()
        x.parked = None
        x.collecting = False
        x.refuse(status, slug, detail)
        if status == 408 or status == 413 or status == 414 or status == 431:
            x.keep_alive = False
        return self.reply()

    cdef bint body_at_hand(self) noexcept:
        """Takes the rest of the request body from the buffer, unread. False when it is not all there."""
        cdef Exchange x = self.x
        cdef uint32_t there = self.inb.end - self.inb.start - x.body_at
        cdef uint32_t used = 0
        if x.body.done:
            return True
        if x.body.mode == BODY_LENGTH and x.body.remaining <= there:
            x.body_at += <uint32_t>x.body.remaining
            x.body.done = True
        elif x.body.mode == BODY_CHUNKED and there:
            if chunked_decode(&x.body.chunked, self.inb.base + self.inb.start + x.body_at, there, &used) >= 0:
                x.body_at += used
                x.body.done = x.body.chunked.state == CHUNK_DONE
        return x.body.done

    cdef int reply(self) except -1:
        """Sends the local answer that x.refuse() or x.respond() prepared."""
        cdef Exchange x = self.x
        cdef int n
        if x.task is not None:
            task, x.task = x.task, None
            task.cancel()
        if x.side == SIDE_NONE:
            x.side = SIDE_GATEWAY
        if x.side == SIDE_UPSTREAM and x.trusted and x.upstream is not None:
            x.add_answer_header(b"x-crossway-attempts-left: %d\r\n" % max(x.attempts - x.tries, 0))
        if x.started == 0:                          # refused before its head was complete
            x.started = self.engine.now
            x.wall = cw_wall_us()
            make_request_id(x.request_id, x.wall)
            make_trace(x.trace)
            x.keep_alive = False
            x.snapshot = self.engine.snapshot
        if not self.body_at_hand():
            x.keep_alive = False
        n = compose_reply(x, self.engine.composed, COMPOSED, x.keep_alive)
        if n < 0:
            x.refuse(500, b"answer-too-large", b"a policy's answer is too large")
            n = compose_reply(x, self.engine.composed, COMPOSED, x.keep_alive)
        self.engine.slot.counters[C_RESPONSES_LOCAL] += 1
        if self.put_message(self.engine.composed, n, True) < 0:
            return self.gone()
        self.engine.slot.counters[C_BYTES_OUT] += n
        return self.answered()

    # -- the body -----------------------------------------------------------------------------------------------------

    cdef int pump_request(self) except -1:
        """Moves body bytes from the client to the upstream, or to the policy that asked for them. 0 when it has to wait."""
        cdef Exchange x = self.x
        cdef UpstreamConnection upstream = x.upstream_connection
        cdef int piece
        cdef uint32_t there, used, want
        cdef ssize_t n
        for piece in range(PIECES):
            if not x.collecting and (upstream is None or upstream.state == U_CONNECTING or upstream.broken or
                                     upstream.out.end > upstream.out.start):
                return 0
            used = 0
            there = self.inb.end - self.inb.start - x.body_at
            if there:
                if self.take_payload(self.inb.base + self.inb.start + x.body_at, there, &used):
                    return 1
                x.body_at += used
            elif not self.readable:
                return 0
            else:
                want = SCRATCH
                if x.body.mode == BODY_LENGTH and x.body.remaining < SCRATCH:
                    want = <uint32_t>x.body.remaining
                n = self.recv(self.engine.scratch, want)
                if n == -EAGAIN:
                    self.readable = False
                    return 0
                if n <= 0 and not (n == 0 and x.body.mode == BODY_CLOSE):
                    return self.truncated()
                if self.drained(n, want):
                    self.readable = False
                x.replayable = False
                if self.stream is None:
                    self.engine.slot.counters[C_BYTES_IN] += n
                if self.take_payload(self.engine.scratch, <uint32_t>n, &used):
                    return 1
                if used < n:
                    self.keep_behind(self.engine.scratch + used, <uint32_t>n - used)
            if x.body.done:
                if x.parked is not None:
                    x.collecting = False
                    self.arm(T_TOTAL, x.route.total_us)
                    self.engine.parked.append((x, x.generation))
                elif not x.answer_started:
                    self.arm_head()
                return 0
        return self.queue_up()

    cdef int keep_behind(self, const char* data, uint32_t n) except -1:
        """Keeps bytes that belong to the next request; the head before them may move, so its base is taken anew."""
        if buffer_append(&self.inb, data, n) < 0:
            raise MemoryError
        self.x.head.base = self.inb.base + self.inb.start
        return 0

    cdef int take_payload(self, char* data, uint32_t n, uint32_t* used) except -1:
        """Unframes data[0:n) and hands the payload on. 1 when that ended the exchange."""
        cdef Exchange x = self.x
        cdef UpstreamConnection upstream = x.upstream_connection
        cdef int64_t payload
        cdef int result = 0
        if x.body.mode == BODY_LENGTH:
            payload = n if n < x.body.remaining else x.body.remaining
            x.body.remaining -= payload
            used[0] = <uint32_t>payload
            x.body.done = x.body.remaining == 0
        elif x.body.mode == BODY_CLOSE:
            payload = used[0] = n
            x.body.done = self.stream.complete()
        else:
            payload = chunked_decode(&x.body.chunked, data, n, used)
            x.replayable = False
            if payload < 0:
                self.engine.slot.counters[C_BAD_REQUESTS] += 1
                x.keep_alive = False
                x.side = SIDE_DOWNSTREAM
                x.body.mode = BODY_NONE             # nothing behind it can be read
                return self.cut(400, <bytes>error_slug(<int>-payload), <bytes>error_detail(<int>-payload))
            x.body.done = x.body.chunked.state == CHUNK_DONE
        x.body.bytes += payload
        if x.body.bytes > <uint64_t>x.body_limit() or \
                (x.collecting and x.body.bytes > <uint64_t>x.parked.body_limit):
            x.body.done = False
            x.body.mode = BODY_NONE
            x.keep_alive = False
            return self.cut(413, b"body-too-large", b"the request body is larger than the limit")
        if x.tap is not None:
            x.tap.take(x, data, <uint32_t>payload)
        if x.collecting:
            x.collected += PyBytes_FromStringAndSize(data, payload)
        else:
            self.engine.slot.counters[C_UPSTREAM_BYTES_OUT] += payload
            if x.keeping:
                x.keep(data, <uint32_t>payload)
            if upstream.stream is not None:
                upstream.stream.last = x.body.done
                if x.body.done and self.stream is not None:
                    pass_trailers(self.stream, upstream.stream, x.route.request_edits, x.snapshot.identity_names)
                result = upstream.put(data, <uint32_t>payload)
                if result == 0 and x.body.done:
                    upstream.finish()
            elif x.body.out == BODY_CHUNKED:
                result = upstream.put_chunk(data, <uint32_t>payload)
                if result == 0 and x.body.done:
                    result = upstream.put(b"0\r\n\r\n", 5)
            else:
                result = upstream.put(data, <uint32_t>payload)
            if result < 0:
                upstream.broken = True              # its answer may be there all the same
                upstream.readable = True
                x.keep_alive = False                # body_at does not count these bytes: nothing behind it is a request
                upstream.pump_answer()
                return 1
        if not x.body.done:
            self.arm_body()
        return 0

    cdef int cut(self, int status, bytes slug, bytes detail) except -1:
        """The request turned out bad while its body streamed: the upstream never gets it whole."""
        if self.x.answer_started:
            self.x.side = SIDE_DOWNSTREAM
            self.x.slug = slug
            self.abort(True, status)
        else:
            self.refuse(status, slug, detail)
        return 1

    cdef int truncated(self) except -1:
        """The client left in the middle of its body."""
        self.engine.slot.counters[C_CLIENT_ABORTS] += 1
        self.x.side = SIDE_DOWNSTREAM
        self.abort(False)
        return 1

    # -- the upstream -------------------------------------------------------------------------------------------------

    cdef int attach(self, bint fresh) except -1:
        """Gives the exchange an upstream connection and sends the request as soon as it is connected."""
        cdef Exchange x = self.x
        cdef Endpoint endpoint, avoid = x.endpoint if x.tries else None
        cdef UpstreamConnection upstream = None
        cdef int event, full = 0
        while upstream is None:
            endpoint = x.upstream.pick(self.engine.now, balance_key(x), is_safe(x.head.method), avoid)
            if endpoint is None and full:
                return crowded_out(self)
            if endpoint is None:
                break
            x.endpoint = avoid = endpoint
            upstream = self.engine.obtain(x, endpoint, fresh)
            if upstream is None and self.engine.no_room:
                x.upstream.decline(endpoint, self.engine.now)
                full += 1                           # another one may have a connection that is free
                if full == CHOICES or full == <int>len(x.upstream.endpoints):
                    return crowded_out(self)
            elif upstream is None:
                x.upstream.start(endpoint, self.engine.now, x.tries > 0)
                event = x.upstream.finish(endpoint, endpoint.ticket, self.engine.now, OUTCOME_CONNECT, 0, 0, 0)
                x.upstream.stop(endpoint)
                if event:
                    self.engine.tell(endpoint, event)
                if not (may_try(self, RETRY_CONNECT) and x.upstream.pay(self.engine.now)):
                    break
                x.tries += 1
                self.engine.slot.counters[C_RETRIES] += 1
                fresh = True
        if upstream is None:
            unreachable(x, 503, b"upstream-unreachable", b"no endpoint of the upstream is available; the request was not sent"
                        if endpoint is None else b"no endpoint of the upstream accepts connections; the request was not sent")
            return self.reply()
        upstream.take_up(x)
        x.upstream_connection = upstream
        if upstream.state == U_CONNECTING:
            self.arm(T_CONNECT, x.upstream.connect_us)
            return 0
        upstream.state = U_HEAD
        return upstream.send_request()

    cdef void drop_upstream(self):
        """Cuts the upstream connection of this exchange: it is not reusable."""
        cdef UpstreamConnection upstream
        if self.x is not None:
            if self.x.hedge is not None:
                drop_hedge(self.x, OUTCOME_NONE)
            if self.x.upstream_connection is not None:
                upstream = <UpstreamConnection>self.x.upstream_connection
                upstream.detach()
                upstream.close()

    # -- the end ------------------------------------------------------------------------------------------------------

    cdef int answered(self) except -1:
        """The whole answer was handed to the socket or to `out`."""
        cdef Exchange x = self.x
        cdef uint32_t consumed = x.body_at
        cdef bint whole = x.body.done
        self.closing = not (x.keep_alive and whole)
        self.finish_exchange()
        if not whole:
            consumed = self.inb.end - self.inb.start        # nothing behind an unread body is a request
        if consumed:
            buffer_consume(&self.inb, consumed)
        return self.settle()

    cdef int settle(self) except -1:
        """After an answer: send what waits, then close, or turn to the next request."""
        if self.orphaned:
            bury(self)
            return 0
        if self.out.end > self.out.start:
            self.state = D_FLUSH
            self.arm(T_WRITE, self.listener.write_us)
            return 0
        if self.stream is not None:
            return self.stream_over()
        if self.closing or ((self.engine.draining or self.listener.leaving) and self.inb.end == self.inb.start):
            return self.leave()
        self.state = D_IDLE
        if self.inb.end == self.inb.start:
            buffer_release(&self.inb)
        self.arm(T_KEEPALIVE, self.listener.keepalive_us)
        return 0

    cdef int take_stream(self) except -1:
        """A request of an HTTP/2 connection: its head is here, as text."""
        begin_unparsed(self)
        if self.stream.too_long:
            parse_failed(self, E_TOO_LONG)
        elif parse_head(self) == 0:
            self.abort(True)                        # text that ends before its head does: not ours
        return self.advance()

    cdef int stream_over(self) except -1:
        """The answer is with its connection: so ends this stream's part."""
        self.finish()
        self.close()
        return 0

    cdef int leave(self) except -1:
        """Closes so that the answer arrives: end our side, then wait a little for the client's end (RFC 9112 9.6)."""
        buffer_release(&self.inb)
        self.state = D_LINGER
        self.lingered = 0
        self.shut_out = self.shut()                 # once: shutting an end again makes an event, which would do it again
        self.arm(T_LINGER, LINGER_US)
        return 0

    cdef int linger(self) except -1:
        cdef ssize_t n
        while True:
            n = cw_recv(self.fd, self.engine.scratch, SCRATCH)      # dropped as it came: nobody asks what it says
            if n == -EAGAIN:
                return 0
            if n <= 0:
                break
            self.lingered += <uint32_t>n
            if self.lingered > LINGER_BYTES:
                break
            if n < SCRATCH:                                         # all there is; after the client's end nothing follows
                if self.ended:
                    break
                return 0
        self.close()
        return 0

    cdef int gone(self) except -1:
        """The client's connection is broken."""
        if self.x is not None and self.state == D_ACTIVE:
            self.engine.slot.counters[C_CLIENT_ABORTS] += 1
            if self.x.side == SIDE_NONE:
                self.x.side = SIDE_DOWNSTREAM
            return 0 if orphan(self) else self.abort(False)
        self.close()
        return 0

    cdef int abort(self, bint reset, int status=502) except -1:
        """Ends the exchange without a (complete) answer. With `reset` the client sees a reset, never a clean end.

        `status` is what the client would be told if nothing had been said yet; calls of gRPC are told so at their end.
        """
        cdef Exchange x = self.x
        cdef bint grpc = x is not None and x.grpc and x.answer_started
        cdef bint told = x is not None and x.web is not None and reset and end_web_early(self)
        if x is not None:
            if grpc and x.total_at and self.engine.now + EARLY_US >= x.total_at:
                status = 504
            self.drop_upstream()
            if x.status == 0:
                x.status = 499                      # nginx's code for a client that left; only seen in records
            if x.route is not None or x.started:
                self.finish_exchange()
        if self.orphaned:
            bury(self)
            return 0
        if told:
            self.finish()
        elif reset and self.fd >= 0 and not (grpc and self.end_grpc(grpc_code(status))):
            self.cut_short()
        elif self.tls is not None:
            self.tls.broken = True                  # nobody may take what he got for all of it
        self.close()
        return 0

    cdef bint end_grpc(self, int code) except -1:
        """A gRPC answer under way fails as gRPC has it, by its trailers: no client takes that for an answer."""
        cdef bytes why = b"the time for this call is over" if code == GRPC_DEADLINE_EXCEEDED else \
            b"the request is larger than the limit" if code == GRPC_RESOURCE_EXHAUSTED else b"the answer stopped before its end"
        cdef bytes lines = b"grpc-status: %d\r\ngrpc-message: %b\r\n" % (code, why)
        if self.out.end > self.out.start or self.stream.done or self.stream.reset or \
                buffer_append(&self.stream.closing_lines, lines, <uint32_t>len(lines)) < 0:
            return False
        self.stream.end()
        return True

    cdef void finish_exchange(self):
        """Records the exchange and gives it back."""
        cdef Exchange x = self.x
        cdef int64_t total = (x.ended if x.ended else cw_monotonic_us()) - x.started
        cdef uint32_t metric
        self.x = None
        try:
            if x.task is not None:
                task, x.task = x.task, None
                task.cancel()
            if x.tunnel_from:
                x.upstream_us += cw_monotonic_us() - x.tunnel_from
            metric = x.snapshot.unrouted if x.route is None else x.route.metric
            self.engine.slot.observe(metric, x.head.method, x.status, total, x.upstream_us, x.body.bytes, x.answer.bytes)
            if x.side != SIDE_NONE:
                self.engine.notices.note(x, total, self.text, self.text_len)
            if x.route is not None:
                for step in x.route.audits:
                    (<Step>step).record(x, total)
                for step in x.route.end_hooks:
                    (<Step>step).record(x, total)
        except BaseException as error:
            self.engine.log.error("recording an exchange failed", exc_info=error)
        self.engine.give_exchange(x)

    cdef void close_now(self):
        """Our doing, not the client's: an answer under way is cut by a reset, never ended; the exchange is recorded."""
        cdef Exchange x = self.x
        if self.fd < 0 and not self.orphaned:
            return
        if self.state == D_TUNNEL:
            cut_tunnel(self)
            return
        if x is not None and self.state == D_ACTIVE:
            if x.status == 0:
                x.status = 500
            if x.side == SIDE_NONE:
                x.side = SIDE_GATEWAY
            self.abort(True)
            return
        if self.out.end > self.out.start:
            self.cut_short()
        self.close()

    cdef void close(self):
        cdef Exchange x
        if self.fd < 0:
            return
        if self.state == D_HANDSHAKE:
            self.engine.handshaking.pop(self, None)
        if self.x is not None:                      # before its head was complete, or an internal error
            if self.tls is not None and self.x.answer_started:
                self.tls.broken = True
            self.drop_upstream()
            x, self.x = self.x, None
            if x.task is not None:
                task, x.task = x.task, None
                task.cancel()
            self.engine.give_exchange(x)
        self.state = D_CLOSED
        if self.stream is None:
            self.engine.connections -= 1
            self.engine.slot.counters[C_CONNECTIONS_CLOSED] += 1
        Connection.close(self)

    def describe(self) -> dict:
        """The open exchange in words for the log: never its body, never its tokens."""
        cdef Exchange x = self.x
        return {
            "request_id": x.request_id[:36].decode("ascii") if x.started else None,
            "route": x.route.name if x.route is not None else None,
            "method": x.head.base[x.head.method_at:x.head.method_at + x.head.method_len].decode("ascii") if x.started else None,
            "client": self.text[:self.text_len].decode("ascii"),
            "sent": bool(x.sent),
            "tunnel": x.tunnel_from != 0,
        }
