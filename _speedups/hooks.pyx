"""What Python policies see: Request, Response, deny() and respond(), and the step that calls them.

Strategy: a Request is a view on its exchange and reads the head only when asked; it knows the exchange's generation, so that a
policy that keeps it beyond its call gets an error instead of another client's data. Python is called from here: per parked
request.
"""

from libc.stdint cimport int64_t, uint64_t
from gateway._speedups.exchange cimport *
from gateway._speedups.headers cimport *
from gateway._speedups.histogram cimport C_HOOK_ERRORS, C_HOOK_TIMEOUTS, C_HOOKS
from gateway._speedups.token_cache cimport Principal

import asyncio
import json
import logging
import traceback
from types import MappingProxyType

log = logging.getLogger("crossway.policies")

BODY_MAX = 98304            # of respond(): it is sent in one piece with its head

ending = set()              # tasks of on_end: a loop itself keeps no task alive


class Stopped(Exception):
    """A policy tried to end the process, or was cancelled by somebody but the gateway."""


class WrongResult(TypeError):
    """A policy returned what is no answer; the text is ours."""


class InvalidBody(ValueError):
    """The request body is not what the policy needs; uncaught, it answers 400."""


def _members(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidBody("the JSON body repeats a member")
    return found


def _constant(name):
    raise InvalidBody(f"the JSON body holds {name}")


cdef class Reply:
    """An answer that ends the exchange, as made by deny() and respond()."""

    cdef readonly int status
    cdef readonly bytes slug, detail, headers, body, content_type

    def __init__(self, int status, *, bytes slug=None, bytes detail=None, bytes headers=None, bytes body=None,
                 bytes content_type=None):
        if not 200 <= status <= 599:
            raise ValueError(f"status {status} is not a final status")
        self.status = status
        self.slug = slug
        self.detail = detail
        self.headers = headers
        self.body = body
        self.content_type = content_type

    def __eq__(self, other):
        return isinstance(other, Reply) and (self.status, self.slug, self.body) == (other.status, other.slug, other.body)

    def __repr__(self):
        return f"<Reply {self.status} {(self.slug or b'').decode()}>"


cdef bytes lines_of(headers):
    """Header lines of a mapping; what could end a line or shadow framing is refused."""
    if not headers:
        return None
    return b"".join([line_of(name, value) for name, value in headers.items()])


cdef bytes detail_of(str text, bytes default):
    """Text as it may stand in a problem's JSON and in a header: visible ASCII without quotes."""
    cdef bytes safe = text[:DETAIL_MAX].encode("ascii", "replace")
    safe = bytes([byte if 32 <= byte < 127 and byte not in b'"\\' else 63 for byte in safe])
    return safe or default


DETAIL_MAX = 512
TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
FORBIDDEN = frozenset({b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"upgrade", b"te", b"trailer",
                       b"host", b"proxy-connection", b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-accept"})
# An application server that folds these reads Content_Length as Content-Length.
FOLDED = bytes.maketrans(b"!#$%&'*+.^_`|~", b"-" * 14)


cdef bytes name_of(name):
    cdef bytes encoded = name.encode("ascii").lower()
    if not encoded or encoded.strip(TOKEN):
        raise ValueError(f"not a header name: {name!r}")
    if encoded.translate(FOLDED) in FORBIDDEN:
        raise ValueError(f"the header {name} belongs to the gateway")
    return encoded


cdef bytes line_of(name, value):
    cdef bytes encoded = str(value).encode("utf-8")
    if any([byte < 32 and byte != 9 or byte == 127 for byte in encoded]):
        raise ValueError(f"control character in the value of {name}")
    return name_of(name) + b": " + encoded.strip() + b"\r\n"


def deny(int status, str reason, str detail="", *, headers=None) -> Reply:
    """Refuse with problem+json (RFC 9457): `reason` ends its type and names the cause in logs, `detail` explains it."""
    if not reason or not all([char.isascii() and (char.isalnum() or char in "-_.") for char in reason]):
        raise ValueError(f"a reason is a slug such as amount-above-ceiling, not {reason!r}")
    if status < 400:
        raise ValueError(f"status {status} refuses nothing: use respond()")
    return Reply(status, slug=reason.encode("ascii"), detail=detail_of(detail, b"refused by a policy"), headers=lines_of(headers))


def respond(int status=200, body=b"", *, headers=None, str content_type="text/plain; charset=utf-8") -> Reply:
    """Answer instead of the upstream. `body` is bytes or str, at most 96 KiB; a content-type among `headers` counts."""
    if not isinstance(body, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"a body is bytes or str, not {type(body).__name__}")
    encoded = body.encode("utf-8") if isinstance(body, str) else bytes(body)
    if len(encoded) > BODY_MAX:
        raise ValueError(f"a policy's answer is at most {BODY_MAX} bytes")
    others = {}
    for name, value in (headers or {}).items():
        if name.lower() == "content-type":
            content_type = value
        else:
            others[name] = value
    return Reply(status, headers=lines_of(others), body=encoded, content_type=line_of("content-type", content_type)[14:-2])


class Policy:
    """Base of Python policies. Define any of on_request, on_response and on_end, plain or async.

    on_request(request)             before the upstream is chosen; return None, deny(...) or respond(...)
    on_response(request, response)  the upstream's answer is here, nothing of it sent; return None, deny(...) or respond(...)
    on_end(request, response)       the exchange is over; the result is ignored

    `body_limit` above 0 asks for the request body, at most this many bytes (413 above it).
    """

    body_limit = 0


cdef class Headers:
    """Request headers by name, case-insensitive; a repeated field's values are joined by a comma and a space."""

    cdef Request request

    def get(self, str name, default=None):
        found = self.getlist(name)
        return ", ".join(found) if found else default

    def getlist(self, str name) -> list:
        cdef bytes lower = name.lower().encode("ascii", "replace")
        cdef Exchange x = self.request.exchange()
        cdef int i = head_find(x.head, lower, len(lower), 0)
        found = []
        while i >= 0:
            found.append(x.head.base[x.head.fields[i].value:x.head.fields[i].value + x.head.fields[i].value_len].decode("latin-1"))
            i = head_find(x.head, lower, len(lower), i + 1)
        return found

    def __getitem__(self, name):
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name):
        return bool(self.getlist(name))

    def items(self) -> list:
        cdef Exchange x = self.request.exchange()
        cdef int i
        return [(x.head.base[x.head.fields[i].name:x.head.fields[i].name + x.head.fields[i].name_len].decode("ascii").lower(),
                 x.head.base[x.head.fields[i].value:x.head.fields[i].value + x.head.fields[i].value_len].decode("latin-1"))
                for i in range(x.head.count)]

    def __iter__(self):
        return iter([name for name, _ in self.items()])

    def __len__(self):
        return self.request.exchange().head.count


cdef class Request:
    """The request of one exchange. Valid while the policy's call runs; `state` is the policies' own to use."""

    cdef Exchange _x
    cdef uint64_t _generation
    cdef readonly Headers headers
    cdef public dict state
    cdef dict _kept             # after the end: what on_end may still see

    cdef Exchange exchange(self):
        if self._x is None or self._x.generation != self._generation:
            raise RuntimeError("this request is over: take what you need of it while your policy's call runs")
        return self._x

    cdef object fact(self, str name):
        return self._kept[name]

    @property
    def method(self) -> str:
        if self._kept is not None:
            return self.fact("method")
        x = self.exchange()
        return x.head.base[x.head.method_at:x.head.method_at + x.head.method_len].decode("ascii")

    @property
    def path(self) -> str:
        """The normalised path: the one that was matched and will be forwarded."""
        if self._kept is not None:
            return self.fact("path")
        x = self.exchange()
        return x.path()[:x.path_len].decode("ascii")

    @property
    def query(self) -> str:
        if self._kept is not None:
            return self.fact("query")
        x = self.exchange()
        return x.head.base[x.head.query_at:x.head.query_at + x.head.query_len].decode("ascii")

    @property
    def host(self) -> str:
        if self._kept is not None:
            return self.fact("host")
        x = self.exchange()
        return x.head.base[x.head.host_at:x.head.host_at + x.head.host_len].decode("ascii")

    @property
    def client(self) -> str:
        """The client's address, from behind trusted proxies if there are any."""
        if self._kept is not None:
            return self.fact("client")
        x = self.exchange()
        return x.client_text[:x.client_len].decode("ascii")

    @property
    def request_id(self) -> str:
        if self._kept is not None:
            return self.fact("request_id")
        return self.exchange().request_id[:36].decode("ascii")

    @property
    def route(self) -> str:
        if self._kept is not None:
            return self.fact("route")
        return self.exchange().route.name

    @property
    def params(self) -> dict:
        """The path's {name} segments."""
        if self._kept is not None:
            return self.fact("params")
        x = self.exchange()
        path = x.path()[:x.path_len]
        return {name: path[x.match.param_at[i]:x.match.param_at[i] + x.match.param_len[i]].decode("ascii")
                for i, name in enumerate(x.route.captures)}

    @property
    def principal(self):
        """Who calls, or None when no policy identified anyone."""
        if self._kept is not None:
            return self.fact("principal")
        return self.exchange().principal

    @property
    def client_certificate(self):
        """What the client showed in the TLS handshake, verified, or None: see ClientCertificate."""
        if self._kept is not None:
            return self.fact("client_certificate")
        return self.exchange().certificate

    @property
    def body(self) -> bytes:
        """The body, for policies with a body_limit."""
        x = self.exchange()
        if x.collected is None:
            raise RuntimeError("the body was not collected: set body_limit in the policy's class")
        return bytes(x.collected)

    def json(self):
        """The body as JSON (RFC 8259), strict: no repeated members, no NaN. Raises InvalidBody, which answers 400."""
        try:
            return json.loads(self.body.decode("utf-8"), object_pairs_hook=_members, parse_constant=_constant)
        except InvalidBody:
            raise
        except (ValueError, RecursionError) as error:
            raise InvalidBody("the body is not valid JSON") from error

    def set_header(self, str name, value) -> None:
        """Replace a header of the request to the upstream."""
        self.remove_header(name)
        self.add_header(name, value)

    def add_header(self, str name, value) -> None:
        x = self.exchange()
        line = line_of(name, value)
        x.request_set = [line] if x.request_set is None else x.request_set + [line]

    def remove_header(self, str name) -> None:
        x = self.exchange()
        lower = name_of(name)
        x.request_removed = [lower] if x.request_removed is None else x.request_removed + [lower]
        if x.request_set is not None:
            x.request_set = [line for line in x.request_set if not line.startswith(lower + b":")]

    cdef void keep(self):
        """Copies what on_end may ask for; the exchange itself is about to be used by another request."""
        if self._kept is None:
            self._kept = {name: getattr(self, name) for name in
                          ("method", "path", "query", "host", "client", "request_id", "route", "params", "principal",
                           "client_certificate")}


cdef class Response:
    """The answer: the upstream's, seen by on_response, or what became of the exchange, seen by on_end."""

    cdef Exchange _x
    cdef uint64_t _generation
    cdef readonly int status
    cdef readonly object headers        # lower-case name -> value, repeated fields joined by a comma and a space; read only
    cdef readonly object duration       # seconds, for on_end; None before
    cdef readonly object reason         # slug of a refusal, for on_end

    def set_header(self, str name, value) -> None:
        """Replace a header of the answer."""
        self.remove_header(name)
        line = line_of(name, value)
        self._x.response_set = [line] if self._x.response_set is None else self._x.response_set + [line]

    def remove_header(self, str name) -> None:
        if self._x is None or self._x.generation != self._generation:
            raise RuntimeError("this answer is over")
        lower = name_of(name)
        self._x.response_removed = [lower] if self._x.response_removed is None else self._x.response_removed + [lower]
        if self._x.response_set is not None:
            self._x.response_set = [line for line in self._x.response_set if not line.startswith(lower + b":")]


cdef list frames_of(error):
    """Where an exception came from and through what. Never its text: policies work on bodies and tokens, and what they
    could not read is what Python quotes."""
    found = []
    while error is not None and len(found) < 64:
        found.append(type(error).__name__)
        for frame in traceback.extract_tb(error.__traceback__, -16):
            found.append(f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


cdef class Guarded:
    """What a policy returned to be awaited, without what would end the worker.

    A task may be cancelled before its first step, and nobody awaits then: a coroutine is closed, or Python would complain of it.
    """

    cdef object awaitable

    def __await__(self):
        return guarded(self.awaitable).__await__()

    def __del__(self):
        if asyncio.iscoroutine(self.awaitable):
            self.awaitable.close()


cdef object guard(object awaitable):
    cdef Guarded made = Guarded.__new__(Guarded)
    made.awaitable = awaitable
    return made


async def guarded(awaitable):
    """Awaits without letting SystemExit out, which asyncio hands through the loop."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise Stopped from error
    except asyncio.CancelledError as error:
        if asyncio.current_task().cancelling():
            raise                       # the gateway's own: a timeout, or the exchange is over
        raise Stopped from error


cdef Request view_of(Exchange x):
    cdef Request request
    if x.view is not None:
        return <Request>x.view
    request = Request.__new__(Request)
    request._x = x
    request._generation = x.generation
    request.state = {}
    request.headers = Headers.__new__(Headers)
    request.headers.request = request
    x.view = request
    return request


cdef class HookStep(Step):
    """Calls one Python policy. An exception or a timeout answers 500, unless it is configured to go on."""

    cdef object policy, on_request, on_response, on_end
    cdef bint go_on

    def __init__(self, str name, policy, *, double timeout=1.0, bint go_on=False):
        self.phase = PHASE_VALIDATE
        self.name = name
        self.policy = policy
        self.on_request = getattr(policy, "on_request", None)
        self.on_response = getattr(policy, "on_response", None)
        self.on_end = getattr(policy, "on_end", None)
        self.body_limit = int(getattr(policy, "body_limit", 0) or 0)
        self.timeout = timeout
        self.go_on = go_on

    @property
    def sees_response(self) -> bool:
        return self.on_response is not None

    @property
    def sees_end(self) -> bool:
        return self.on_end is not None

    cdef int run(self, Exchange x) except -1:
        if self.on_request is None:
            return STEP_GO
        if x.collected is not None and self.body_limit > 0 and len(x.collected) > self.body_limit:
            x.keep_alive = False
            return x.refuse(413, b"body-too-large", b"the request body is larger than the policy's limit")
        return STEP_COLLECT if self.body_limit > 0 else STEP_PARK

    cdef object park(self, Exchange x):
        x.slot.counters[C_HOOKS] += 1
        return self.called(self.on_request(view_of(x)))

    cdef object called(self, object result):
        return guard(result) if hasattr(result, "__await__") else result

    cdef object park_answer(self, Exchange x):
        cdef Response response = Response.__new__(Response)
        cdef dict headers = {}
        x.slot.counters[C_HOOKS] += 1
        response._x = x
        response._generation = x.generation
        response.status = x.status
        for name, value in x.answer_fields:
            lower, text = name.decode("ascii").lower(), value.decode("latin-1")
            headers[lower] = headers[lower] + ", " + text if lower in headers else text
        response.headers = MappingProxyType(headers)
        return self.called(self.on_response(view_of(x), response))

    cdef int resumed(self, Exchange x, object result) except -1:
        cdef Reply reply
        if result is None:
            return STEP_GO
        if not isinstance(result, Reply):
            return self.failed(x, WrongResult(f"it returned {type(result).__name__}: return None, deny() or respond()"))
        reply = <Reply>result
        if reply.slug is not None:
            x.refuse(reply.status, reply.slug, reply.detail)
            x.reply_headers = reply.headers
            return STEP_ANSWERED
        return x.respond(reply.status, reply.headers, reply.body, reply.content_type)

    cdef int failed(self, Exchange x, object error) except -1:
        request_id = x.request_id[:36].decode("ascii")
        if isinstance(error, InvalidBody) and x.answer_fields is None:
            return x.refuse(400, b"invalid-body", detail_of(str(error), b"the body is not what the policy needs"))
        said = {"policy": self.name, "route": x.route.name, "request_id": request_id}
        if isinstance(error, asyncio.CancelledError):
            x.slot.counters[C_HOOK_TIMEOUTS] += 1
            log.error("a policy did not answer in time", extra={**said, "timeout": self.timeout})
        else:
            x.slot.counters[C_HOOK_ERRORS] += 1
            if isinstance(error, WrongResult):
                said["text"] = str(error)
            log.error("a policy failed", extra={**said, "error": type(error).__name__, "frames": frames_of(error)})
        if self.go_on:
            return STEP_GO
        if x.answer_fields is not None:             # the service has answered: nobody may take it for a payment that was not made
            return x.refuse(500, b"policy-failed", b"a policy failed on the answer; the request may have been executed")
        return x.refuse(500, b"policy-failed", b"a policy failed; the request was not completed")

    cdef int record(self, Exchange x, int64_t total_us) except -1:
        cdef Request request = view_of(x)
        cdef Response response = Response.__new__(Response)
        request.keep()
        response.status = x.status
        response.headers = MappingProxyType({})
        response.duration = total_us / 1e6
        response.reason = None if x.slug is None else x.slug.decode("ascii")
        x.slot.counters[C_HOOKS] += 1
        task = asyncio.get_running_loop().create_task(self.end(request, response))
        ending.add(task)
        task.add_done_callback(ending.discard)
        return 0

    async def end(self, request, response) -> None:
        try:
            result = self.on_end(request, response)
            if hasattr(result, "__await__"):
                await asyncio.wait_for(guard(result), self.timeout)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            log.error("a policy failed at the end of an exchange", extra={
                "policy": self.name, "route": request.route, "request_id": request.request_id, "error": type(error).__name__,
                "frames": frames_of(error)})


async def settle(double seconds) -> None:
    """Wait until the on_end calls of finished exchanges have returned, at most `seconds`."""
    if ending:
        await asyncio.wait(set(ending), timeout=seconds)
