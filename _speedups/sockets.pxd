"""Every C declaration of the operating system that the engine uses, in one place.

Strategy: thin; a few inline wrappers that take care of EINTR and of the flags that are always wanted. Python is called from
here: never.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef CROSSWAY_SOCKETS_H
    #define CROSSWAY_SOCKETS_H
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <stdint.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <arpa/inet.h>
    #include <sys/un.h>
    static inline int64_t cw_monotonic_us(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    }
    static inline int64_t cw_wall_us(void) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    }
    /* Bytes received, 0 at the end of the stream, -errno otherwise (-EAGAIN when nothing is there). */
    static inline ssize_t cw_recv(int fd, void *p, size_t n) {
        ssize_t r;
        do r = recv(fd, p, n, 0); while (r < 0 && errno == EINTR);
        return r < 0 ? -errno : r;
    }
    static inline ssize_t cw_peek(int fd, void *p, size_t n) {
        ssize_t r;
        do r = recv(fd, p, n, MSG_PEEK | MSG_DONTWAIT); while (r < 0 && errno == EINTR);
        return r < 0 ? -errno : r;
    }
    static inline ssize_t cw_send(int fd, const void *p, size_t n) {
        ssize_t r;
        do r = send(fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT); while (r < 0 && errno == EINTR);
        return r < 0 ? -errno : r;
    }
    static inline ssize_t cw_sendv(int fd, struct iovec *v, int count) {
        struct msghdr m;
        ssize_t r;
        memset(&m, 0, sizeof m);
        m.msg_iov = v;
        m.msg_iovlen = (size_t)count;
        do r = sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT); while (r < 0 && errno == EINTR);
        return r < 0 ? -errno : r;
    }
    /* 1 when an idle connection is silent and open, 0 when the other side closed it or said something unasked. */
    static inline int cw_silent(int fd) {
        char c;
        ssize_t r;
        do r = recv(fd, &c, 1, MSG_PEEK | MSG_DONTWAIT); while (r < 0 && errno == EINTR);
        return r < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
    static inline void cw_nodelay(int fd) {
        int one = 1;
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    /* The next close() sends RST, so that a cut answer cannot be taken for a complete one. */
    static inline void cw_reset_on_close(int fd) {
        struct linger l = {1, 0};
        (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
    }
    static inline int cw_socket_error(int fd) {
        int e = 0;
        socklen_t n = sizeof e;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &n) < 0 ? errno : e;
    }
    /* Where a connection was going before netfilter redirected it: 0, or -1 when it was not. SO_ORIGINAL_DST and its IPv6 twin are 80. */
    static inline int cw_original(int fd, struct sockaddr_storage *out) {
        socklen_t n = sizeof *out;
        struct sockaddr_storage own;
        memset(out, 0, sizeof *out);
        if (getsockname(fd, (struct sockaddr *)&own, &n) < 0) return -1;
        n = sizeof *out;
        if (own.ss_family == AF_INET) return getsockopt(fd, IPPROTO_IP, 80, out, &n);
        if (own.ss_family != AF_INET6) return -1;
        if (getsockopt(fd, IPPROTO_IPV6, 80, out, &n) == 0) return 0;
        n = sizeof *out;
        return getsockopt(fd, IPPROTO_IP, 80, out, &n);     /* IPv4 over a socket for both */
    }
    static inline int cw_watch(int epoll, int fd, uint32_t events, uint64_t data) {
        struct epoll_event e;
        e.events = events;
        e.data.u64 = data;
        return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
    }
    static inline int cw_rewatch(int epoll, int fd, uint32_t events, uint64_t data) {
        struct epoll_event e;
        e.events = events;
        e.data.u64 = data;
        return epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &e) < 0 ? -errno : 0;
    }
    /* inet_ntop() of IPv4 is a printf. Room for 16 bytes; returns the length, which a NUL follows. */
    static inline int cw_ipv4_text(const void *address, char *out) {
        unsigned char b[4];
        char *p = out;
        memcpy(b, address, 4);
        for (int i = 0; i < 4; i++) {
            if (b[i] >= 100) *p++ = (char)('0' + b[i] / 100);
            if (b[i] >= 10) *p++ = (char)('0' + b[i] / 10 % 10);
            *p++ = (char)('0' + b[i] % 10);
            *p++ = (char)(i < 3 ? '.' : 0);
        }
        return (int)(p - out) - 1;
    }
    /* Numeric text of an address without its port; IPv4-mapped IPv6 as IPv4; "unix" for a Unix socket. */
    static inline int cw_address_text(const struct sockaddr_storage *a, char *out, size_t room, uint16_t *port) {
        *port = 0;
        if (a->ss_family == AF_INET) {
            const struct sockaddr_in *v4 = (const struct sockaddr_in *)a;
            *port = ntohs(v4->sin_port);
            return room < 16 ? 0 : cw_ipv4_text(&v4->sin_addr, out);
        } else if (a->ss_family == AF_INET6) {
            const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)a;
            *port = ntohs(v6->sin6_port);
            if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
                return room < 16 ? 0 : cw_ipv4_text(&v6->sin6_addr.s6_addr[12], out);
            } else if (!inet_ntop(AF_INET6, &v6->sin6_addr, out, (socklen_t)room)) return 0;
        } else {
            strncpy(out, "unix", room);
        }
        return (int)strlen(out);
    }
    /* The address as 16 bytes (IPv4 mapped into ::ffff:0:0/96), zeroes for anything else. */
    static inline void cw_address_bytes(const struct sockaddr_storage *a, unsigned char out[16]) {
        memset(out, 0, 16);
        if (a->ss_family == AF_INET6) memcpy(out, &((const struct sockaddr_in6 *)a)->sin6_addr, 16);
        else if (a->ss_family == AF_INET) {
            out[10] = out[11] = 0xff;
            memcpy(out + 12, &((const struct sockaddr_in *)a)->sin_addr, 4);
        }
    }
    /* Reads text into an address. 1 when it is a numeric IPv4 or IPv6 address. */
    static inline int cw_parse_address(const char *text, uint16_t port, struct sockaddr_storage *out, socklen_t *length) {
        struct sockaddr_in *v4 = (struct sockaddr_in *)out;
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
        memset(out, 0, sizeof *out);
        if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
            v4->sin_family = AF_INET; v4->sin_port = htons(port); *length = sizeof *v4;
            return 1;
        }
        memset(out, 0, sizeof *out);
        if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
            v6->sin6_family = AF_INET6; v6->sin6_port = htons(port); *length = sizeof *v6;
            return 1;
        }
        return 0;
    }
    static inline void cw_set_port(struct sockaddr_storage *a, uint16_t port) {
        if (a->ss_family == AF_INET) ((struct sockaddr_in *)a)->sin_port = htons(port);
        else if (a->ss_family == AF_INET6) ((struct sockaddr_in6 *)a)->sin6_port = htons(port);
    }
    /* An address from 4 or 16 bytes in network order. */
    static inline void cw_put_address(struct sockaddr_storage *out, int size, const char *bytes, uint16_t port) {
        memset(out, 0, sizeof *out);
        if (size == 4) {
            struct sockaddr_in *v4 = (struct sockaddr_in *)out;
            v4->sin_family = AF_INET; v4->sin_port = htons(port);
            memcpy(&v4->sin_addr, bytes, 4);
        } else {
            struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
            v6->sin6_family = AF_INET6; v6->sin6_port = htons(port);
            memcpy(&v6->sin6_addr, bytes, 16);
        }
    }
    #endif
    """
    ctypedef unsigned int socklen_t
    cdef struct sockaddr:
        pass
    cdef struct sockaddr_storage:
        uint16_t ss_family
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    cdef struct epoll_event:
        uint32_t events
        uint64_t cw_data "data.u64"
    int errno
    int EAGAIN, EINPROGRESS, EMFILE, ENFILE, ENOBUFS, ENOMEM, ECONNABORTED, EINTR, EPIPE, ECONNRESET
    int AF_INET, AF_INET6, AF_UNIX, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, SHUT_WR, SHUT_RDWR
    uint32_t EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLHUP, EPOLLERR, EPOLLET
    int EPOLL_CLOEXEC
    int epoll_create1(int flags) nogil
    int epoll_wait(int epoll, epoll_event* events, int count, int timeout) nogil
    int accept4(int fd, sockaddr* address, socklen_t* length, int flags) nogil
    int cw_socket "socket"(int family, int kind, int protocol) nogil
    int cw_connect "connect"(int fd, const sockaddr* address, socklen_t length) nogil
    int cw_shutdown "shutdown"(int fd, int how) nogil
    int cw_close "close"(int fd) nogil
    int cw_getsockname "getsockname"(int fd, sockaddr* address, socklen_t* length) nogil
    int64_t cw_monotonic_us() nogil
    int64_t cw_wall_us() nogil
    ssize_t cw_recv(int fd, void* p, size_t n) nogil
    ssize_t cw_peek(int fd, void* p, size_t n) nogil
    ssize_t cw_send(int fd, const void* p, size_t n) nogil
    ssize_t cw_sendv(int fd, iovec* v, int count) nogil
    bint cw_silent(int fd) nogil
    void cw_nodelay(int fd) nogil
    void cw_reset_on_close(int fd) nogil
    int cw_socket_error(int fd) nogil
    int cw_original(int fd, sockaddr_storage* out) nogil
    int cw_watch(int epoll, int fd, uint32_t events, uint64_t data) nogil
    int cw_rewatch(int epoll, int fd, uint32_t events, uint64_t data) nogil
    int cw_address_text(const sockaddr_storage* a, char* out, size_t room, uint16_t* port) nogil
    void cw_address_bytes(const sockaddr_storage* a, unsigned char* out) nogil
    void cw_put_address(sockaddr_storage* out, int size, const char* data, uint16_t port) nogil
    void cw_set_port(sockaddr_storage* a, uint16_t port) nogil
    bint cw_parse_address(const char* text, uint16_t port, sockaddr_storage* out, socklen_t* length) nogil
