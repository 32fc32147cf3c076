"""Audit and access records: a bounded buffer and a flusher that appends whole lines to a file.

Strategy: two halves. append() fills one under a mutex that the flusher takes only to swap them; the flusher, a thread that
runs no Python and holds no GIL, writes the other. A disk that is full or slow, a pipe without a reader: the flusher tries
again, the buffer fills, then records are lost and counted, and the first record that fits again is preceded by
{"event":"lost","count":N,...}. Nothing is ever waited for by the caller.

Why lines of several workers never mix. A batch is whole lines in as few write() calls as possible, on a file opened with
O_APPEND; the kernel puts each write() at the end in one piece. What remains is a write() cut short (disk full): each batch is
written under flock(), and what follows the last whole line is cut off again before the lock is released. A worker killed in
the middle of that leaves a line without an end: whoever writes next sees the missing newline and adds it, so the torn
line stays alone. Pipes: a write() up to PIPE_BUF bytes is one piece, so whole lines are grouped up to that; a longer line
may be mixed when several workers share one pipe. An inherited descriptor (standard output) is written the same way as a pipe.

A journal may be made before a fork. The flusher starts with the first record; a child forgets what its parent had not
written yet (the parent writes it) and opens the path by itself, because a lock belongs to the open file that a fork shares.

Python is called from here: never (append, but for the very first one), at construction and at the end (everything else).
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, ENXIO, EPIPE, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy
from posix.fcntl cimport O_APPEND, O_CLOEXEC, O_CREAT, O_NOCTTY, O_NONBLOCK, O_RDONLY, O_WRONLY, open as c_open
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.types cimport off_t
from posix.unistd cimport close as c_close, ftruncate, getpid, write as c_write

import os
import threading
import weakref

cdef extern from "fcntl.h" nogil:
    int O_NOFOLLOW

cdef extern from "sys/file.h" nogil:
    int LOCK_EX, LOCK_UN
    int flock(int fd, int operation)

cdef extern from "unistd.h" nogil:
    ssize_t pread(int fd, void* buffer, size_t count, off_t offset)

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLOUT
    int poll(pollfd* fds, unsigned long count, int timeout_ms)

cdef extern from "signal.h" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_BLOCK
    int sigfillset(sigset_t* signals)

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_condattr_init(pthread_condattr_t* attributes)
    int pthread_condattr_setclock(pthread_condattr_t* attributes, int clock)
    int pthread_condattr_destroy(pthread_condattr_t* attributes)
    int pthread_cond_init(pthread_cond_t* condition, pthread_condattr_t* attributes)
    int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex)
    int pthread_cond_timedwait(pthread_cond_t* condition, pthread_mutex_t* mutex, const timespec* until)
    int pthread_cond_signal(pthread_cond_t* condition)
    int pthread_cond_broadcast(pthread_cond_t* condition)
    int pthread_sigmask(int how, const sigset_t* signals, sigset_t* old)

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* Length of the well-formed UTF-8 sequence at p (n >= 1, p[0] >= 0x80); or minus the length of its maximal subpart
       (Unicode 15, table 3-7 and section 3.9, U+FFFD substitution). */
    static int cw_utf8(const uint8_t *p, ptrdiff_t n) {
        uint8_t c = p[0], low = 0x80, high = 0xBF;
        int need, i;
        if (c >= 0xC2 && c <= 0xDF) need = 1;
        else if ((c & 0xF0) == 0xE0) { need = 2; if (c == 0xE0) low = 0xA0; if (c == 0xED) high = 0x9F; }
        else if (c >= 0xF0 && c <= 0xF4) { need = 3; if (c == 0xF0) low = 0x90; if (c == 0xF4) high = 0x8F; }
        else return -1;
        for (i = 1; i <= need; i++) {
            if (i >= n || p[i] < low || p[i] > high) return -i;
            low = 0x80; high = 0xBF;
        }
        return need + 1;
    }
    /* Whether one of eight bytes may have to be escaped: above 0x7e, below 0x20, a quote, a backslash. */
    #define CW_ZERO(v) (((v) - 0x0101010101010101ULL) & ~(v))
    #define CW_ODD(v) (((v) | (((v) - 0x2020202020202020ULL) & ~(v)) | CW_ZERO((v) ^ 0x2222222222222222ULL) | \\
                        CW_ZERO((v) ^ 0x5c5c5c5c5c5c5c5cULL) | CW_ZERO((v) ^ 0x7f7f7f7f7f7f7f7fULL)) & 0x8080808080808080ULL)
    static ptrdiff_t cw_json_escape(char *out, const char *data, ptrdiff_t n) {
        static const char hex[] = "0123456789abcdef";
        const uint8_t *p = (const uint8_t *)data, *end = p + n;
        char *o = out;
        while (p < end) {
            int verbatim = 0;                   /* the eight bytes before p stand before o as they are */
            uint8_t c;
            /* Runs without anything to escape, eight bytes a step. */
            while (end - p >= 8) {
                uint64_t v;
                memcpy(&v, p, 8);
                if (CW_ODD(v)) break;
                memcpy(o, &v, 8);
                o += 8; p += 8;
                verbatim = 1;
            }
            if (p >= end) break;
            if (verbatim && end - p < 8) {      /* what is left, in one more step that goes over some of those again */
                ptrdiff_t left = end - p;
                uint64_t v;
                memcpy(&v, end - 8, 8);
                if (!CW_ODD(v)) {
                    memcpy(o + left - 8, &v, 8);
                    o += left;
                    break;
                }
            }
            c = *p;
            if (c >= 0x80) {
                int length = cw_utf8(p, end - p);
                if (length < 0) { memcpy(o, "\\\\ufffd", 6); o += 6; p -= length; continue; }
                if (c != 0xC2 || p[1] >= 0xA0) { memcpy(o, p, (size_t)length); o += length; p += length; continue; }
                c = p[1];                       /* U+0080 to U+009F: terminals obey them */
                p++;
            } else if (c >= 0x20 && c != '"' && c != '\\\\' && c != 0x7F) {
                *o++ = (char)c; p++;
                continue;
            }
            p++;
            *o++ = '\\\\';
            switch (c) {
                case '"': case '\\\\': *o++ = (char)c; break;
                case '\\n': *o++ = 'n'; break;
                case '\\r': *o++ = 'r'; break;
                case '\\t': *o++ = 't'; break;
                default: memcpy(o, "u00", 3); o[3] = hex[c >> 4]; o[4] = hex[c & 15]; o += 5;
            }
        }
        return o - out;
    }
    static void cw_digits(char *out, int width, unsigned v) {
        while (width--) { out[width] = (char)('0' + v % 10); v /= 10; }
    }
    /* "YYYY-MM-DDTHH:MM:SS." for seconds since 1970; days to a civil date after H. Hinnant's chrono algorithms. */
    static void cw_civil(char *out, int64_t seconds) {
        int64_t z = seconds / 86400 + 719468;
        unsigned day = (unsigned)(seconds % 86400), era_day = (unsigned)(z % 146097);
        unsigned year = (era_day - era_day / 1460 + era_day / 36524 - era_day / 146096) / 365;
        unsigned doy = era_day - (365 * year + year / 4 - year / 100), mp = (5 * doy + 2) / 153;
        unsigned month = mp < 10 ? mp + 3 : mp - 9;
        memcpy(out, "0000-00-00T00:00:00.", 20);
        cw_digits(out, 4, year + (unsigned)(z / 146097) * 400 + (month <= 2));
        cw_digits(out + 5, 2, month);
        cw_digits(out + 8, 2, doy - (153 * mp + 2) / 5 + 1);
        cw_digits(out + 11, 2, day / 3600);
        cw_digits(out + 14, 2, day / 60 % 60);
        cw_digits(out + 17, 2, day % 60);
    }
    """
    Py_ssize_t cw_json_escape(char* out, const char* data, Py_ssize_t n) noexcept nogil
    void cw_digits(char* out, int width, unsigned v) noexcept nogil
    void cw_civil(char* out, int64_t seconds) noexcept nogil

from gateway._speedups.wire cimport cw_put_decimal

cdef enum:
    LOST_RECORD_BYTES = 192         # the longest record about losses, line end included
    PIPE_PIECE = 4096               # PIPE_BUF on Linux
    BATCH_MS = 20                   # how long the flusher gathers records before it writes
    RETRY_MS = 250                  # pause after a failed attempt
    PIPE_WAIT_MS = 100              # how long one attempt waits for a pipe's reader
    RESTS_IDLE = 1                  # until it is signalled
    RESTS_BATCHING = 2              # for BATCH_MS, or until half a buffer is full
    RESTS_AFTER_FAILURE = 3         # for RETRY_MS, or until flush(), reopen() or close()

cdef int64_t LAST_SECOND = 253402300799         # 9999-12-31T23:59:59Z
cdef char[20] second_text
cdef int64_t second_known = -1


cdef Py_ssize_t json_escape(char* out, const char* data, Py_ssize_t n) noexcept nogil:
    return cw_json_escape(out, data, n)


cdef int put_timestamp(char* out, int64_t unix_us) noexcept:
    global second_known
    cdef int64_t second
    if unix_us < 0:
        unix_us = 0
    second = unix_us // 1_000_000
    if second > LAST_SECOND:
        second = LAST_SECOND
    if second != second_known:
        cw_civil(second_text, second)
        second_known = second
    memcpy(out, second_text, 20)
    cw_digits(out + 20, 6, <unsigned>(unix_us % 1_000_000))
    out[26] = c'Z'
    return TIMESTAMP_BYTES


def escape(bytes data not None) -> bytes:
    """json_escape() for Python and the tests."""
    cdef char* out = <char*>malloc(<size_t>(len(data) * ESCAPE_FACTOR + 1))
    if out == NULL:
        raise MemoryError
    try:
        return out[:json_escape(out, data, len(data))]
    finally:
        free(out)


def timestamp(int64_t unix_us) -> str:
    """put_timestamp() for Python and the tests."""
    cdef char[TIMESTAMP_BYTES] out
    return out[:put_timestamp(out, unix_us)].decode("ascii")


cdef inline void deadline(timespec* until, int64_t milliseconds) noexcept nogil:
    clock_gettime(CLOCK_MONOTONIC, until)
    until.tv_sec += milliseconds // 1000
    until.tv_nsec += (milliseconds % 1000) * 1_000_000
    if until.tv_nsec >= 1_000_000_000:
        until.tv_nsec -= 1_000_000_000
        until.tv_sec += 1


cdef inline Py_ssize_t line_start(const char* text, Py_ssize_t at) noexcept nogil:
    """Where the line that contains position `at` starts."""
    while at > 0 and text[at - 1] != c'\n':
        at -= 1
    return at


@cython.final
cdef class Journal:
    """A file (path) or an inherited descriptor (int) that records are appended to.

    capacity: bytes of memory, both halves; a record longer than a half is lost. worker: shown in records about losses.
    A file is created with mode 0640, never through a symbolic link, and opened again by reopen().
    Raises OSError when the file cannot be opened (a FIFO without a reader is no error), ValueError for a small capacity.
    """

    def __cinit__(self, target, *, Py_ssize_t capacity=4 << 20, long worker=-1):
        self.fd = self.tail_fd = -1
        self.memory = NULL
        if capacity < 4096:
            raise ValueError("a journal needs a capacity of at least 4096 bytes")
        self.half = capacity // 2
        self.worker = worker
        self.memory = <char*>malloc(<size_t>self.half * 2)      # pages are given when they are first written
        if self.memory == NULL:
            raise MemoryError
        self._reset()

    def __init__(self, target, *, capacity=4 << 20, worker=-1):
        cdef int error
        if isinstance(target, int):
            self.path_bytes = b""
            self.path = NULL
            self.fd = os.dup(target)
            self.classify(self.fd)
        else:
            self.path_bytes = os.fsencode(target)
            self.path = self.path_bytes
            error = self.open_path()
            if error and error != ENXIO:
                raise OSError(error, os.strerror(error), os.fsdecode(target))
        _journals.add(self)

    def _reset(self) -> None:
        """The state of a journal that nothing was appended to, without a flusher."""
        cdef pthread_condattr_t attributes
        pthread_mutex_init(&self.lock, NULL)
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(&self.wake, &attributes)
        pthread_cond_init(&self.done, &attributes)
        pthread_condattr_destroy(&attributes)
        self.pid = getpid()
        self.thread = None
        self.ended = True
        self.fill, self.out = self.memory, self.memory + self.half
        self.fill_len = self.out_len = self.out_at = 0
        self.fill_records = self.out_records = 0
        self.busy = self.hurry = self.reopening = False
        self.rest = self.last_errno = 0
        self.sequence = self.lost = self.lost_total = self.accepted = self.written = self.failures = 0

    def _forked(self) -> None:
        """In a child: the parent's thread, its lock and its records are the parent's."""
        self._reset()
        if self.path != NULL and not self.closing:
            self.abandon()
            self.open_path()            # a failure is tried again with the first record

    cdef int start(self) except -1:
        thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self.ended = False
        try:
            thread.start()
        except BaseException:
            self.ended = True
            raise
        self.thread = thread
        return 0

    def __dealloc__(self):
        # The running thread holds a reference, so it has ended (or the process is going away) when this is reached.
        if self.fd >= 0:
            c_close(self.fd)
        if self.tail_fd >= 0:
            c_close(self.tail_fd)
        free(self.memory)               # the lock and the conditions hold no resources on Linux

    cdef int append(self, const char* line, Py_ssize_t length) noexcept:
        # fill_len + what is written <= half, checked first: every store lies inside the buffer.
        cdef int kept
        if self.thread is None and not self.closing:
            try:
                self.start()
            except BaseException:       # no thread to be had: the record waits in the buffer, the next one tries again
                pass
        pthread_mutex_lock(&self.lock)
        kept = self.put(line, length)
        if kept and (self.rest == RESTS_IDLE or (self.rest == RESTS_BATCHING and self.fill_len > self.half // 2)):
            pthread_cond_signal(&self.wake)
        pthread_mutex_unlock(&self.lock)
        return kept

    cdef int put(self, const char* line, Py_ssize_t length) noexcept:
        cdef Py_ssize_t room = self.half - self.fill_len - (LOST_RECORD_BYTES if self.lost else 0)
        cdef char* at
        cdef char* end
        if length < 0 or length >= room or self.closing:
            self.lost += 1
            self.lost_total += 1
            return 0
        if self.lost:
            self.put_lost()
        at = self.fill + self.fill_len
        memcpy(at, line, <size_t>length)
        end = at + length
        end[0] = c'\n'
        self.fill_len += length + 1
        self.fill_records += 1
        self.accepted += 1
        while True:             # a line end inside a record would make two of one; JSON allows a space wherever it allows LF
            at = <char*>memchr(at, c'\n', <size_t>(end - at))
            if at == NULL:
                return 1
            at[0] = c' '

    cdef void put_lost(self) noexcept:
        """The record about losses; the caller has made sure of LOST_RECORD_BYTES."""
        cdef timespec now
        cdef char* at = self.fill + self.fill_len
        clock_gettime(CLOCK_REALTIME, &now)
        memcpy(at, b'{"time":"', 9)
        at += 9
        at += put_timestamp(at, <int64_t>now.tv_sec * 1_000_000 + now.tv_nsec // 1000)
        memcpy(at, b'","event":"lost","count":', 25)
        at += 25
        at += cw_put_decimal(at, self.lost)
        memcpy(at, b',"lost_total":', 14)
        at += 14
        at += cw_put_decimal(at, self.lost_total)
        memcpy(at, b',"pid":', 7)
        at += 7
        at += cw_put_decimal(at, <uint64_t>self.pid)
        if self.worker >= 0:
            memcpy(at, b',"worker":', 10)
            at += 10
            at += cw_put_decimal(at, <uint64_t>self.worker)
        at[0] = c'}'
        at[1] = c'\n'
        self.fill_len = at + 2 - self.fill
        self.lost = 0

    cdef uint64_t next_sequence(self) noexcept:
        self.sequence += 1
        return self.sequence

    def write(self, bytes line not None) -> bool:
        """append() for Python: False when the record is lost."""
        return self.append(line, len(line)) == 1

    def sequence_number(self) -> int:
        """next_sequence() for Python."""
        return self.next_sequence()

    @property
    def statistics(self) -> dict[str, int]:
        """accepted, written and lost records; failed attempts; the last errno (0 when the last attempt succeeded)."""
        pthread_mutex_lock(&self.lock)
        result = {"accepted": self.accepted, "written": self.written, "lost": self.lost_total, "failures": self.failures,
                  "errno": self.last_errno, "buffered": self.fill_len}
        pthread_mutex_unlock(&self.lock)
        return result

    def reopen(self) -> None:
        """Open the path again before the next write (log rotation); returns at once. Nothing happens for a descriptor."""
        if self.path == NULL:
            return
        pthread_mutex_lock(&self.lock)
        self.reopening = True
        pthread_cond_signal(&self.wake)
        pthread_mutex_unlock(&self.lock)

    def flush(self, double timeout=5.0) -> bool:
        """Wait until everything appended so far is written and a reopening is done; False after `timeout` seconds."""
        cdef timespec until
        cdef bint clean
        deadline(&until, <int64_t>(timeout * 1000))
        self.note_lost()
        if self.thread is None and not self.closing and not self.settled():
            self.start()
        clean = self.drain(&until)
        if clean and self.note_lost():          # there was no room for it before
            clean = self.drain(&until)
        return clean

    cdef bint note_lost(self) noexcept:
        """Record losses that no later record has reported; true when a record was made."""
        cdef bint noted = False
        pthread_mutex_lock(&self.lock)
        if self.lost and not self.closing and self.half - self.fill_len >= LOST_RECORD_BYTES:
            self.put_lost()
            noted = True
        pthread_mutex_unlock(&self.lock)
        return noted

    cdef bint drain(self, const timespec* until) noexcept:
        """Wait until the flusher has nothing left; false when the time is up."""
        cdef int error = 0
        cdef bint clean
        with nogil:                     # never take the GIL while holding the lock: append() takes them the other way round
            pthread_mutex_lock(&self.lock)
            self.hurry = True
            pthread_cond_signal(&self.wake)
            while not self.ended and error == 0 and not self.settled():
                error = pthread_cond_timedwait(&self.done, &self.lock, until)
            clean = self.settled()
            self.hurry = False
            pthread_mutex_unlock(&self.lock)
        return clean

    def close(self, double timeout=5.0) -> bool:
        """Flush, end the flusher and close the file; False when records could not be written within `timeout` seconds.

        Records appended afterwards are lost and counted.
        """
        clean = self.flush(timeout)
        pthread_mutex_lock(&self.lock)
        self.closing = True
        pthread_cond_signal(&self.wake)
        pthread_mutex_unlock(&self.lock)
        if self.thread is not None:
            self.thread.join(max(0.1, min(timeout, 1.0)))
        if self.ended:
            self.abandon()
        return clean

    def _run(self) -> None:
        """The flusher's thread: gives the GIL back at once and takes it again only to end."""
        with nogil:
            self.flusher()

    cdef bint settled(self) noexcept nogil:
        return self.fill_len == 0 and not self.busy and self.out_len == 0 and not self.reopening

    cdef void flusher(self) noexcept nogil:
        cdef sigset_t signals
        cdef bint failed
        sigfillset(&signals)            # signals are the main thread's
        pthread_sigmask(SIG_BLOCK, &signals, NULL)
        pthread_mutex_lock(&self.lock)
        while True:
            while self.settled() and not self.closing:
                self.rest = RESTS_IDLE
                pthread_cond_wait(&self.wake, &self.lock)
            self.rest = 0
            if self.settled():
                break
            if self.out_len == 0 and not self.hurry and not self.closing and not self.reopening:
                self.nap(RESTS_BATCHING, BATCH_MS)
            failed = self.step()
            if failed:
                self.failures = self.failures + 1     # the checked build refuses += here
                if self.closing:
                    break               # what could not be written within close()'s patience stays unwritten
                self.nap(RESTS_AFTER_FAILURE, RETRY_MS)
        self.ended = True
        pthread_cond_broadcast(&self.done)
        pthread_mutex_unlock(&self.lock)

    cdef void nap(self, int rest, int64_t milliseconds) noexcept nogil:
        cdef timespec until
        deadline(&until, milliseconds)
        self.rest = rest
        pthread_cond_timedwait(&self.wake, &self.lock, &until)
        self.rest = 0

    cdef bint step(self) noexcept nogil:
        """Take what was appended if the last batch is out, reopen if asked, write; true when it failed. Holds the lock."""
        cdef char* taken
        cdef bint reopen = self.reopening
        cdef int open_error = 0, write_error = 0
        if self.out_len == 0 and self.fill_len:
            taken = self.fill
            self.fill, self.out = self.out, taken
            self.out_len, self.out_records = self.fill_len, self.fill_records
            self.out_at = 0
            self.fill_len = 0
            self.fill_records = 0
        self.busy = True
        self.reopening = False
        pthread_mutex_unlock(&self.lock)
        if (reopen or self.fd < 0) and self.path != NULL:
            open_error = self.open_path()
        if self.fd >= 0 and self.out_len:           # a failed reopening goes on with the old file
            write_error = self.write_batch()
        pthread_mutex_lock(&self.lock)
        self.busy = False
        if reopen and open_error:
            self.reopening = True
        if self.out_at >= self.out_len:
            self.written = self.written + self.out_records     # the checked build refuses += here
            self.out_len = self.out_at = 0
            self.out_records = 0
        self.last_errno = write_error or open_error
        pthread_cond_broadcast(&self.done)
        return self.last_errno != 0

    cdef void classify(self, int fd) noexcept nogil:
        cdef struct_stat status
        self.regular = fstat(fd, &status) == 0 and S_ISREG(status.st_mode) and self.path != NULL

    cdef int open_path(self) noexcept nogil:
        """Open the path and only then give the old descriptor up; 0 or an errno."""
        cdef int fd = c_open(self.path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0o640)
        if fd < 0:
            return errno
        self.abandon()
        self.fd = fd
        self.classify(fd)
        if self.regular:
            self.tail_fd = c_open(self.path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY)
        return 0

    cdef void abandon(self) noexcept nogil:
        """Close the file; a line that was begun there is written again from its start in the next one."""
        if self.fd >= 0:
            c_close(self.fd)
        if self.tail_fd >= 0:
            c_close(self.tail_fd)
        self.fd = self.tail_fd = -1
        self.out_at = line_start(self.out, self.out_at)

    cdef int write_batch(self) noexcept nogil:
        """Write [out_at, out_len); 0 or an errno, out_at then at the first byte that is still to be written."""
        cdef int error
        if not self.regular:
            error = self.write_pieces()
            if error == EPIPE and self.path != NULL:
                self.abandon()
            return error
        while flock(self.fd, LOCK_EX) < 0 and errno == EINTR:
            pass                        # a file system without locks: O_APPEND alone must do
        error = self.write_locked()
        flock(self.fd, LOCK_UN)
        return error

    cdef int write_locked(self) noexcept nogil:
        cdef struct_stat before, after
        cdef char last = c'\n'
        cdef Py_ssize_t start = self.out_at, whole
        cdef ssize_t n
        cdef int error = 0
        if fstat(self.fd, &before) < 0:
            return errno
        if self.tail_fd >= 0 and before.st_size > 0 and pread(self.tail_fd, &last, 1, before.st_size - 1) == 1 and last != c'\n':
            if c_write(self.fd, b"\n", 1) != 1:
                return errno
            before.st_size += 1
        while self.out_at < self.out_len:
            n = c_write(self.fd, self.out + self.out_at, <size_t>(self.out_len - self.out_at))
            if n > 0:
                self.out_at = self.out_at + n     # the checked build refuses += here
            elif n < 0 and errno != EINTR:
                error = errno
                break
        if error == 0:
            return 0
        whole = line_start(self.out, self.out_at)
        if whole < start:
            whole = start
        if self.out_at > whole and fstat(self.fd, &after) == 0 and after.st_size == before.st_size + (self.out_at - start):
            if ftruncate(self.fd, before.st_size + (whole - start)) == 0:
                self.out_at = whole
        return error

    cdef int write_pieces(self) noexcept nogil:
        """Pipes, devices and inherited descriptors: whole lines up to PIPE_PIECE at a time, a longer line by itself."""
        cdef Py_ssize_t end, limit
        cdef pollfd wanted
        cdef ssize_t n
        while self.out_at < self.out_len:
            limit = self.out_at + PIPE_PIECE
            end = self.out_len if limit >= self.out_len else line_start(self.out, limit)
            if end <= self.out_at:
                end = <const char*>memchr(self.out + self.out_at, c'\n', <size_t>(self.out_len - self.out_at)) - self.out + 1
            n = c_write(self.fd, self.out + self.out_at, <size_t>(end - self.out_at))
            if n > 0:
                self.out_at = self.out_at + n     # the checked build refuses += here
            elif n < 0 and errno == EAGAIN:
                wanted.fd, wanted.events, wanted.revents = self.fd, POLLOUT, 0
                if poll(&wanted, 1, PIPE_WAIT_MS) == 0:
                    return EAGAIN
            elif n < 0 and errno != EINTR:
                return errno
        return 0


_journals = weakref.WeakSet()


def _after_fork() -> None:
    for journal in list(_journals):
        (<Journal>journal)._forked()


os.register_at_fork(after_in_child=_after_fork)
