"""Audit and access records: appended to a buffer, written to a file by a thread that never holds the GIL.

Strategy: append() copies into memory and returns; it never waits for a disk, a reader or another worker. What does not fit
is counted, and the count itself becomes a record.
"""

from libc.stdint cimport int64_t, uint64_t
from posix.time cimport timespec
from posix.types cimport pid_t

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    TIMESTAMP_BYTES = 27            # 2026-01-31T23:59:59.123456Z
    ESCAPE_FACTOR = 6               # json_escape() writes at most this many bytes per byte

cdef class Journal:
    cdef object __weakref__
    # Shared with the flusher thread, under `lock`:
    cdef pthread_mutex_t lock
    cdef pthread_cond_t wake        # the flusher waits for work
    cdef pthread_cond_t done        # flush() waits for the flusher
    cdef char* fill                 # records not yet taken by the flusher: whole lines
    cdef Py_ssize_t fill_len
    cdef uint64_t fill_records
    cdef bint busy                  # `out` is the flusher's; it holds bytes [out_at, out_len) still to write
    cdef int rest                   # what the flusher does: 0 works, RESTS_* otherwise
    cdef bint hurry                 # somebody waits in flush()
    cdef bint reopening
    cdef bint closing
    cdef bint ended                 # no flusher runs
    cdef uint64_t written           # records handed to the kernel
    cdef uint64_t failures          # failed attempts to open or write
    cdef int last_errno
    # The flusher's own while it runs:
    cdef char* out
    cdef Py_ssize_t out_len
    cdef Py_ssize_t out_at
    cdef uint64_t out_records
    cdef int fd                     # -1: not open
    cdef int tail_fd                # for reading the file's last byte; -1: not a regular file of ours
    cdef bint regular
    # Constant:
    cdef char* memory               # both buffers
    cdef Py_ssize_t half            # bytes of one buffer
    cdef bytes path_bytes           # empty: a descriptor was given
    cdef const char* path           # into path_bytes
    cdef long worker
    cdef pid_t pid
    # The appending thread's own:
    cdef uint64_t sequence
    cdef uint64_t lost              # since the last record about losses
    cdef uint64_t lost_total
    cdef uint64_t accepted
    cdef object thread              # None until the first record: a process that only forks has no thread

    # One record without a line end: 1 when it is in the buffer, 0 when it is lost (and counted). Never blocks.
    cdef int append(self, const char* line, Py_ssize_t length) noexcept
    cdef int put(self, const char* line, Py_ssize_t length) noexcept
    cdef void put_lost(self) noexcept
    cdef int start(self) except -1
    cdef bint note_lost(self) noexcept
    cdef bint drain(self, const timespec* until) noexcept
    # The number of the next record, from 1. Draw it for every record, lost ones included: a gap is a loss.
    cdef uint64_t next_sequence(self) noexcept

    # The flusher thread.
    cdef bint settled(self) noexcept nogil              # nothing left to write or reopen; under the lock
    cdef void flusher(self) noexcept nogil
    cdef void nap(self, int rest, int64_t milliseconds) noexcept nogil
    cdef bint step(self) noexcept nogil
    cdef void classify(self, int fd) noexcept nogil
    cdef int open_path(self) noexcept nogil
    cdef void abandon(self) noexcept nogil
    cdef int write_batch(self) noexcept nogil
    cdef int write_locked(self) noexcept nogil
    cdef int write_pieces(self) noexcept nogil

# The text as the inside of a JSON string; returns the length, at most ESCAPE_FACTOR * n. Bytes that are no UTF-8 become
# \ufffd (one per maximal subpart, as Unicode recommends), control characters (C1 and DEL included) \u00xx.
cdef Py_ssize_t json_escape(char* out, const char* data, Py_ssize_t n) noexcept nogil
# RFC 3339 in UTC, TIMESTAMP_BYTES long, not terminated; returns the length. Needs the GIL: it remembers the last second.
cdef int put_timestamp(char* out, int64_t unix_us) noexcept
