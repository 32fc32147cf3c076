/* A byte pass-through over epoll: what a proxy costs before it knows any HTTP.
 *
 * Strategy: one upstream connection for each downstream connection, opened at accept, so that nothing is parsed, pooled or
 * matched. A small exchange costs the four calls no proxy can avoid (receive and send on each side) plus its share of
 * epoll_wait. Bytes that cannot be sent at once are kept (16 KiB a direction), and reading stops until they are gone.
 *
 * Usage: passthrough LISTEN_PORT UPSTREAM_PORT      (both on 127.0.0.1)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { WINDOW = 16384, BATCH = 256 };

struct pair;

struct side {
    struct pair *pair;
    struct side *other;
    int fd;
    int ended;        /* it sent its FIN: nothing more will be read from it */
    int told;         /* the FIN of the other side was passed on to it */
    uint32_t watched;
    size_t pending;   /* bytes that this side sent and that the other has not taken yet */
    size_t offset;
    char *kept;       /* allocated at the first short write only */
};

struct pair {
    struct side down, up;
    int dead;
    struct pair *next_dead;
};

static int poller;
static struct pair *graveyard;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static struct sockaddr_in loopback(const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

/* The descriptors are closed now; the memory goes after the batch, because later events of the batch may still name it. */
static void bury(struct pair *pair)
{
    if (pair->dead)
        return;
    pair->dead = 1;
    close(pair->down.fd);
    close(pair->up.fd);
    pair->next_dead = graveyard;
    graveyard = pair;
}

static void watch(struct side *side)
{
    uint32_t wanted = 0;
    if (!side->ended && !side->pending)
        wanted |= EPOLLIN;
    if (side->other->pending)
        wanted |= EPOLLOUT;
    if (wanted == side->watched)
        return;
    struct epoll_event event = {.events = wanted, .data.ptr = side};
    side->watched = wanted;
    if (epoll_ctl(poller, EPOLL_CTL_MOD, side->fd, &event) < 0)
        bury(side->pair);
}

/* Return 0 when the pair must be closed. */
static int flush_from(struct side *from)
{
    while (from->pending) {
        ssize_t sent = send(from->other->fd, from->kept + from->offset, from->pending, MSG_NOSIGNAL);
        if (sent < 0)
            return errno == EAGAIN || errno == EINTR;
        from->offset += (size_t)sent;
        from->pending -= (size_t)sent;
    }
    if (from->ended && !from->other->told) {
        from->other->told = 1;
        shutdown(from->other->fd, SHUT_WR);
    }
    return !(from->ended && from->other->ended && !from->other->pending);
}

static int move_from(struct side *from)
{
    static char window[WINDOW];
    ssize_t got = recv(from->fd, window, sizeof window, 0);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    if (got == 0) {
        from->ended = 1;
        return flush_from(from);
    }
    ssize_t sent = send(from->other->fd, window, (size_t)got, MSG_NOSIGNAL);
    if (sent == got)
        return 1;
    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR)
            return 0;
        sent = 0;
    }
    if (!from->kept && !(from->kept = malloc(WINDOW)))
        return 0;
    from->offset = 0;
    from->pending = (size_t)(got - sent);
    memcpy(from->kept, window + sent, from->pending);
    return 1;
}

static void on_event(struct side *side, uint32_t events)
{
    struct pair *pair = side->pair;
    if (pair->dead)
        return;
    int alive = 1;
    if (events & EPOLLERR)
        alive = 0;
    if (alive && (events & EPOLLOUT))
        alive = flush_from(side->other);
    if (alive && (events & (EPOLLIN | EPOLLHUP)) && !side->ended && !side->pending)
        alive = move_from(side);
    if (!alive) {
        bury(pair);
        return;
    }
    watch(side);
    if (!pair->dead)
        watch(side->other);
}

static void add(struct side *side, struct side *other, struct pair *pair, int fd)
{
    int on = 1;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = side};
    side->pair = pair;
    side->other = other;
    side->fd = fd;
    side->watched = EPOLLIN;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0)
        fail("epoll_ctl");
}

static void accept_one(int listener, const struct sockaddr_in *upstream)
{
    int down = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (down < 0)
        return;
    int up = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct pair *pair = calloc(1, sizeof *pair);
    /* The connect blocks: on the loopback it returns at once, and it happens once a connection, not once a request. */
    if (up < 0 || !pair || connect(up, (const struct sockaddr *)upstream, sizeof *upstream) < 0
        || fcntl(up, F_SETFL, O_NONBLOCK) < 0) {
        perror("passthrough: upstream");
        free(pair);
        close(down);
        if (up >= 0)
            close(up);
        return;
    }
    add(&pair->down, &pair->up, pair, down);
    add(&pair->up, &pair->down, pair, up);
}

static int listen_on(const struct sockaddr_in *address)
{
    int on = 1;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0)
        fail("passthrough: socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (const struct sockaddr *)address, sizeof *address) < 0)
        fail("passthrough: bind");
    if (listen(listener, 1024) < 0)
        fail("passthrough: listen");
    return listener;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: passthrough LISTEN_PORT UPSTREAM_PORT\n");
        return 2;
    }
    struct sockaddr_in here = loopback(argv[1]), upstream = loopback(argv[2]);
    int listener = listen_on(&here);
    struct epoll_event events[BATCH], listening = {.events = EPOLLIN, .data.ptr = NULL};
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listening) < 0)
        fail("passthrough: epoll");
    for (;;) {
        int count = epoll_wait(poller, events, BATCH, -1);
        if (count < 0 && errno != EINTR)
            fail("passthrough: epoll_wait");
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == NULL)
                accept_one(listener, &upstream);
            else
                on_event(events[i].data.ptr, events[i].events);
        }
        while (graveyard) {
            struct pair *pair = graveyard;
            graveyard = pair->next_dead;
            free(pair->down.kept);
            free(pair->up.kept);
            free(pair);
        }
    }
}
