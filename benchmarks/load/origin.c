/* The origin behind every program: fixed answers over HTTP/1.1, cheap enough to leave the load's core to the load.
 *
 * Strategy: one thread over epoll; a head is searched for its end, its method's path and Content-Length, and nothing else. A
 * body is counted and thrown away, and the answer comes after its last byte. What it was not made for (chunked bodies, a head
 * above 16 KiB) is answered 501 and closed, so that a benchmark fails instead of measuring something else.
 *
 *   /bytes/N   N bytes
 *   /upload    {"bytes":N}, how long the request's body was
 *   otherwise  the text given as the second argument
 *
 * Usage: origin PORT ANSWER      (on 127.0.0.1)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { HEAD = 16384, WINDOW = 262144, BATCH = 256, LARGEST = 8 << 20 };

struct connection {
    int fd;
    int body;            /* the head is read, its body is not */
    int closing;         /* close after the answer */
    int writing;         /* EPOLLOUT is watched: an answer is not sent yet */
    size_t used;         /* bytes of `head` */
    size_t left;         /* bytes of the body still to come */
    size_t length;       /* of the whole body */
    size_t sent, total;  /* of the answer: its head, then its body */
    size_t head_length;
    const char *answer;
    char path[64];
    char small[64];
    char reply[256];
    char head[HEAD + 1];
};

static int poller;
static const char *text;
static char *bytes;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void drop(struct connection *c)
{
    close(c->fd);
    free(c);
}

static void watch(struct connection *c, int writing)
{
    struct epoll_event event = {.events = writing ? EPOLLOUT : EPOLLIN, .data.ptr = c};
    if (c->writing != writing && epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event) < 0)
        fail("origin: epoll_ctl");
    c->writing = writing;
}

/* Send what is left of the answer: 1 all sent, 0 the socket is full, -1 the connection is of no use any more. */
static int push(struct connection *c)
{
    while (c->sent < c->total) {
        struct iovec parts[2];
        int count = 0;
        size_t done = c->sent;
        if (done < c->head_length)
            parts[count++] = (struct iovec){c->reply + done, c->head_length - done};
        size_t from = done > c->head_length ? done - c->head_length : 0;
        if (c->head_length + from < c->total)
            parts[count++] = (struct iovec){(char *)c->answer + from, c->total - c->head_length - from};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno == EAGAIN ? 0 : -1;
        c->sent += (size_t)sent;
    }
    return 1;
}

static int answer(struct connection *c, const char *status)
{
    size_t length = strlen(text);
    c->answer = text;
    if (!strncmp(c->path, "/bytes/", 7)) {
        length = strtoul(c->path + 7, NULL, 10);
        c->answer = bytes;
        if (length > LARGEST)
            length = LARGEST;
    } else if (!strcmp(c->path, "/upload")) {
        length = (size_t)snprintf(c->small, sizeof c->small, "{\"bytes\":%zu}", c->length);
        c->answer = c->small;
    }
    c->head_length = (size_t)snprintf(c->reply, sizeof c->reply,
        "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n%s\r\n", status, length,
        c->closing ? "Connection: close\r\n" : "");
    c->sent = 0;
    c->total = c->head_length + length;
    return push(c);
}

/* Read the head that ends at `end`: 1 good, 0 not for this origin. */
static int read_head(struct connection *c, char *end)
{
    *end = 0;
    char *path = strchr(c->head, ' ');
    char *after = path ? strchr(path + 1, ' ') : NULL;
    c->length = 0;
    c->closing = 0;
    c->path[0] = 0;
    if (!after)
        return 0;
    size_t length = (size_t)(after - path - 1);
    if (length < sizeof c->path) {
        memcpy(c->path, path + 1, length);
        c->path[length] = 0;
    }
    if (!strncmp(after + 1, "HTTP/1.0", 8))
        c->closing = 1;
    for (char *line = strstr(after, "\r\n"); line; line = strstr(line, "\r\n")) {
        line += 2;
        switch (*line | 0x20) {
        case 'c':
            if (!strncasecmp(line, "content-length:", 15))
                c->length = strtoul(line + 15, NULL, 10);
            else if (!strncasecmp(line, "connection:", 11) && !strncasecmp(line + 11 + strspn(line + 11, " "), "close", 5))
                c->closing = 1;
            break;
        case 't':
            if (!strncasecmp(line, "transfer-encoding:", 18))
                return 0;
            break;
        case 'e':
            if (!strncasecmp(line, "expect:", 7))
                return 0;
        }
    }
    return 1;
}

/* Answer every complete request in the buffer: 1 go on reading, 0 wait until the answer can be sent, -1 close. */
static int serve(struct connection *c)
{
    for (;;) {
        if (!c->body) {
            c->head[c->used] = 0;
            char *end = c->used ? memmem(c->head, c->used, "\r\n\r\n", 4) : NULL;
            if (!end && c->used < HEAD)
                return 1;
            if (!end || !read_head(c, end)) {
                c->closing = 1;
                return answer(c, "501 Not Implemented") == 0 ? 0 : -1;
            }
            size_t length = (size_t)(end + 4 - c->head);
            c->used -= length;
            memmove(c->head, end + 4, c->used);
            c->body = 1;
            c->left = c->length;
        }
        size_t taken = c->used < c->left ? c->used : c->left;
        c->left -= taken;
        c->used -= taken;
        memmove(c->head, c->head + taken, c->used);
        if (c->left)
            return 1;
        c->body = 0;
        int state = answer(c, "200 OK");
        if (state == 0)
            return 0;
        if (state < 0 || c->closing)
            return -1;
    }
}

static int take(struct connection *c)
{
    static char window[WINDOW];
    for (;;) {
        /* A body goes straight to the bin; what follows it belongs to the next head and is not asked for yet. */
        int bin = c->body && !c->used;
        size_t room = bin ? (c->left < WINDOW ? c->left : WINDOW) : HEAD - c->used;
        ssize_t got = recv(c->fd, bin ? window : c->head + c->used, room, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN ? 1 : -1;
        if (got == 0)
            return -1;
        if (bin)
            c->left -= (size_t)got;
        else
            c->used += (size_t)got;
        int state = serve(c);
        if (state != 1 || (size_t)got < room)
            return state;
    }
}

static void on_event(struct connection *c, unsigned events)
{
    int state = 1;
    if (c->writing && (events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) {
        state = push(c);
        if (state == 1)
            state = c->closing ? -1 : serve(c);
    }
    if (state == 1)
        state = take(c);
    if (state < 0)
        drop(c);
    else
        watch(c, state == 0);
}

static void accept_all(int listener)
{
    for (;;) {
        int on = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        struct connection *c = calloc(1, sizeof *c);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (!c)
            fail("origin: calloc");
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0)
            fail("origin: epoll_ctl");
    }
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: origin PORT ANSWER\n");
        return 2;
    }
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[1]))};
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    text = argv[2];
    bytes = malloc(LARGEST);
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (!bytes || listener < 0)
        fail("origin");
    memset(bytes, 'x', LARGEST);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) < 0 || listen(listener, 4096) < 0)
        fail("origin: bind");
    struct epoll_event events[BATCH], listening = {.events = EPOLLIN, .data.ptr = NULL};
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listening) < 0)
        fail("origin: epoll");
    for (;;) {
        int count = epoll_wait(poller, events, BATCH, -1);
        if (count < 0 && errno != EINTR)
            fail("origin: epoll_wait");
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr)
                on_event(events[i].data.ptr, events[i].events);
            else
                accept_all(listener);
        }
    }
}
