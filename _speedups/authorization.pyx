"""The mesh's authorization as a step; see authorization.pxd.

Strategy: a caller is its certificate's one SPIFFE id, which the handshake has proved; the answer to "who is it" is kept on the
connection's certificate until the policy changes. A denial tells an authenticated caller why, in a header; whoever showed no identity
learns nothing. Python is called from here: per connection, and per denial.

Safety: request bytes are read through Head offsets of the exchange that is passed in, within the call.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memcmp
from gateway._speedups.exchange cimport *
from gateway._speedups.headers cimport M_OTHER, Head
from gateway._speedups.http1 cimport method_id

cdef enum:
    STRANGERS = 256             # callers without a rule that are remembered; the certificates of one trust domain bound them as well


cdef bytes plain(str text):
    """A name that was checked when it was configured, made safe for a quoted string all the same."""
    return text.encode("ascii", "replace").replace(b'"', b"'").replace(b"\\", b"/")


cdef bint fits(const char* pattern, uint32_t n, const char* path, uint32_t length) noexcept nogil:
    """Whether a path is a rule's; a NUL takes one segment, which is not empty. Both are read within their lengths only."""
    cdef uint32_t i, at = 0
    for i in range(n):
        if at == length:
            return False
        if pattern[i] != 0:
            if path[at] != pattern[i]:
                return False
            at += 1
        elif path[at] == 47:
            return False
        else:
            while at < length and path[at] != 47:
                at += 1
    return at == length


cdef class Rule:
    """Allows what its methods, path (a template, `{name}` is one segment), prefix, headers ((name, op, value) as in a RouteSpec) and claims all accept; None and () are anything.

    elsewhere: its ports are those of other apps.
    """

    def __init__(self, str name not None, *, methods=None, str path=None, str prefix=None, headers=(), claims=(), bint elsewhere=False):
        cdef bytes method
        self.name = name
        self.elsewhere = elsewhere
        others = []
        for text in methods or ():
            method = text.encode("ascii")
            number = method_id(method, <uint32_t>len(method))
            if number == M_OTHER:
                others.append(method)
            else:
                self.methods |= <uint32_t>1 << number
        self.others = tuple(others)
        if methods is not None and not methods:
            raise ValueError("a rule without a method allows nothing")
        self.path = None if path is None else b"/".join([
            b"\0" if segment.startswith("{") else segment.encode("ascii").replace(b"\0", b"") for segment in path.split("/")])
        self.prefix = None if prefix is None else prefix.encode("ascii").rstrip(b"/")
        self.headers = Conditions(headers, every=True) if headers else None
        self.claims = tuple((claim, frozenset((type(each), each) for each in accepted)) for claim, accepted in claims)
        self.layer7 = methods is not None or path is not None or prefix is not None or bool(headers) or bool(self.claims)

    cdef bint allows(self, Exchange x) except -1:
        cdef Head* head = x.head
        cdef uint32_t n
        cdef bytes method
        if self.elsewhere:
            return False
        if self.methods or self.others:
            if head.method != M_OTHER:
                if not self.methods >> head.method & 1:
                    return False
            else:
                for method in self.others:
                    if PyBytes_GET_SIZE(method) == head.method_len and \
                            memcmp(PyBytes_AS_STRING(method), head.base + head.method_at, head.method_len) == 0:
                        break
                else:
                    return False
        if self.path is not None and \
                not fits(PyBytes_AS_STRING(self.path), <uint32_t>PyBytes_GET_SIZE(self.path), x.path(), x.path_len):
            return False
        if self.prefix is not None:
            n = <uint32_t>PyBytes_GET_SIZE(self.prefix)
            if x.path_len < n or memcmp(x.path(), PyBytes_AS_STRING(self.prefix), n) != 0 or \
                    (x.path_len > n and x.path()[n] != 47):
                return False
        if self.headers is not None and not self.headers.hold(head):
            return False
        return not self.claims or self.user(x)

    def user(self, Exchange x) -> bool:
        """Whether the end user for whom the caller acts has all the claims."""
        if x.principal is None:
            return False
        for claim, accepted in self.claims:
            value = x.principal.scopes if claim == "scope" else x.principal.claims.get(claim)
            values = value if isinstance(value, (tuple, list, frozenset)) else (value,)
            if not any([isinstance(each, (str, int, float)) and (type(each), each) in accepted for each in values]):
                return False
        return True


cdef class Caller:
    """A caller, the rules that name it, the RouteEntry that its requests get, and the TcpTarget of its raw connections."""

    def __init__(self, str identity not None, rules=(), RouteEntry entry=None, target=None):
        self.identity = identity
        self.rules = tuple(rules)
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"not a rule: {rule!r}")
        self.entry = entry
        self.target = target


cdef class Authorization:
    """A service's policy. `record(identity, rules, request_id, method, path, audit, version)` is called for each denial.

    Of a raw connection request_id, method and path are empty.
    """

    def __init__(self, int version, record, *, bint audit=False, entry_of=None, target_of=None):
        self.version = version
        self.audit = audit
        self.callers = {}
        self.record = record
        self.entry_of = entry_of
        self.target_of = target_of

    def add(self, Caller caller not None) -> None:
        """Name a caller and its rules; before the policy is used."""
        self.callers[caller.identity] = caller

    cdef Caller who(self, ClientCertificate certificate):
        cdef Caller caller
        if certificate.caller_by is self:
            return <Caller>certificate.caller
        names = [uri for uri in certificate.leaf.uris if uri.startswith("spiffe://")]
        if len(names) != 1:
            return None
        caller = self.callers.get(names[0])
        if caller is None:
            caller = Caller(names[0], (), None if self.entry_of is None else self.entry_of(names[0]),
                            None if self.target_of is None else self.target_of(names[0]))
            if self.strangers < STRANGERS:
                self.strangers += 1
                self.callers[names[0]] = caller
        certificate.caller = caller
        certificate.caller_by = self
        return caller

    def admits(self, ClientCertificate certificate not None) -> bool:
        """Tell whether a raw connection of the certificate's holder may stay; nothing is recorded."""
        return self.audit or self.connects(self.who(certificate), False)

    cdef bint stays(self, Exchange x) except -1:
        cdef Caller caller = None if x.certificate is None else self.who(x.certificate)
        cdef Rule rule
        if self.audit:
            return True
        if caller is not None:
            for rule in caller.rules:
                if rule.allows(x):
                    return True
        return False

    cdef bint connects(self, Caller caller, bint recorded) except -1:
        cdef Rule rule
        if caller is not None:
            for rule in caller.rules:
                if not rule.elsewhere and not rule.layer7:
                    return True
        if not recorded:
            return False
        self.record("" if caller is None else caller.identity, () if caller is None else tuple([rule.name for rule in caller.rules]),
                    "", "", "", self.audit, self.version)
        return self.audit

    cdef int deny(self, Exchange x, Caller caller) except -1:
        """Records a denial. STEP_GO in audit mode, else the answer is 403."""
        cdef Head* head = x.head
        identity = "" if caller is None else caller.identity
        rules = () if caller is None else tuple([rule.name for rule in caller.rules])
        self.record(identity, rules, x.request_id[:36].decode("ascii"),
                    head.base[head.method_at:head.method_at + head.method_len].decode("ascii", "replace"),
                    x.path()[:min(x.path_len, 256)].decode("ascii", "replace"), self.audit, self.version)
        if caller is not None:
            why = b'caller="' + plain(identity) + b'", rule=none, considered="' + b" ".join([plain(name) for name in rules]) + \
                b'", policy=%d\r\n' % self.version
        if self.audit:
            if caller is not None:
                x.add_answer_header(b"crossway-would-deny: " + why)
            return STEP_GO
        x.refuse(403, b"not-authorized", b"no rule lets this caller do this")
        if caller is not None:
            x.reply_headers = b"crossway-denied: " + why
        return STEP_ANSWERED


cdef class AuthorizationStep(Step):
    """Lets pass what a rule of the caller allows; `caller` when that is the same one for every request."""

    def __init__(self, str name not None, Authorization policy not None, Caller caller=None):
        self.phase = PHASE_AUTHORISE
        self.name = name
        self.policy = policy
        self.caller = caller

    cdef int run(self, Exchange x) except -1:
        cdef Caller caller = self.caller
        cdef Rule rule
        if caller is None and x.certificate is not None:
            caller = self.policy.who(x.certificate)
        if caller is not None:
            if caller.entry is not None:
                x.route = caller.entry              # of the same steps: the next one is where it was
            for rule in caller.rules:
                if rule.allows(x):
                    return STEP_GO
        return self.policy.deny(x, caller)
