"""Endpoints that exist as figures only: the balancer as tests, simulations and benchmarks use it."""

from gateway._speedups.balance cimport Balancer, Candidate

cdef class Fleet:
    cdef Candidate* candidates          # `size` of them, owned
    cdef int size
    cdef list members                   # which of them the balancer chooses from, in its order
    cdef Balancer balancer

    cdef Candidate* at(self, int index) except NULL
