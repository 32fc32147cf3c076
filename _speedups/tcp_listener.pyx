"""The settings of a raw TCP listener; see tcp_listener.pxd.

Strategy: names are looked up as a certificate would match them (RFC 9525 6.3): exactly, then by the one suffix behind the first
label, then the default. Python is called from here: per connection that names a host.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memchr


cdef class TcpTarget:
    """See tcp_listener.pxd."""

    def __init__(self, Upstream upstream not None, uint32_t metric):
        self.upstream = upstream
        self.metric = metric


cdef class TcpListener:
    """See tcp_listener.pxd; `idle` and `hello` in seconds. `sni` maps names and *.suffixes to targets; None: no name is read.

    connections: open at once, over all workers. allow: networks; None: everybody. postgres: TLS is asked for in clear text first, on both sides.
    policy: asked about each certificate; its callers' targets go before `default`.
    """

    def __init__(self, uint32_t metric, *, TcpTarget default=None, dict sni=None, double idle=3600, double hello=10,
                 uint32_t connections=1024, allow=None, bint announce=False, bint postgres=False, Authorization policy=None):
        self.metric = metric
        self.only = default
        self.exact = {}
        self.suffixes = {}
        self.reads_name = sni is not None
        for name, target in (sni or {}).items():
            if not isinstance(target, TcpTarget):
                raise TypeError(f"not a target: {target!r}")
            if name.startswith("*."):
                self.suffixes[name[1:].encode("ascii")] = target
            else:
                self.exact[name.encode("ascii")] = target
        if not self.reads_name and default is None:
            raise ValueError("a listener without a target")
        self.idle_us = <int64_t>(idle * 1e6)
        self.hello_us = <int64_t>(hello * 1e6)
        self.most = connections
        self.allow = None if allow is None else Networks(allow)
        self.announce = announce
        self.postgres = postgres
        self.policy = policy

    cdef TcpTarget choose(self, const char* name, uint32_t n):
        cdef const char* dot
        cdef bytes whole
        if n == 0:
            return self.only
        whole = name[:n]
        found = self.exact.get(whole)
        if found is None and self.suffixes:
            dot = <const char*>memchr(name, 46, n)
            if dot != NULL and dot > name:
                found = self.suffixes.get(whole[dot - name:])
        return <TcpTarget>found if found is not None else self.only
