/* The origin of the HTTP/2 benchmarks: one thread, epoll, libnghttp2, clear text by prior knowledge. It answers from memory and never waits.
 *
 * A request with content-type application/grpc is a unary call: its body must be one uncompressed message, or the call fails with
 * grpc-status 13; the answer is the text given as the second argument, as a message, and the trailer grpc-status 0. What has another
 * content-type, or none, is answered with the same text as JSON. A program that passes on something else fails instead of being measured.
 *
 * Usage: origin-http2 PORT ANSWER      (on 127.0.0.1)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BATCH = 256, READ = 262144, OUT = 65536, STREAMS = 1024, WINDOW = 1 << 30, PREFIX = 5 };

struct stream {
    int grpc;
    unsigned char prefix[PREFIX]; /* of the call's message */
    size_t received;              /* of the request's body */
    size_t sent;                  /* of the answer's */
};

struct connection {
    int fd;
    int writing; /* EPOLLOUT is watched: something is not sent yet */
    nghttp2_session *session;
    size_t from, used; /* of what is not sent yet */
    unsigned char out[OUT];
};

static int poller;
static nghttp2_session_callbacks *callbacks;
static const unsigned char *text;
static size_t text_length;
static unsigned char *reply; /* the text as a message: its prefix, then the text */
static char digits[24];

#define FIELD(name, value) {(uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void drop(struct connection *c)
{
    nghttp2_session_del(c->session);
    close(c->fd);
    free(c);
}

static int on_begin(nghttp2_session *session, const nghttp2_frame *frame, void *data)
{
    (void)data;
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    struct stream *s = calloc(1, sizeof *s);
    return s ? nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, s) : NGHTTP2_ERR_CALLBACK_FAILURE;
}

static int on_field(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length, const uint8_t *value,
                    size_t value_length, uint8_t flags, void *data)
{
    (void)flags, (void)data;
    if (name_length == 12 && value_length >= 16 && !memcmp(name, "content-type", 12) && !memcmp(value, "application/grpc", 16)) {
        struct stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
        if (s)
            s->grpc = 1;
    }
    return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *bytes, size_t length, void *data)
{
    (void)flags, (void)data;
    struct stream *s = nghttp2_session_get_stream_user_data(session, id);
    if (!s)
        return 0;
    for (size_t i = 0; i < length && s->received + i < PREFIX; i++)
        s->prefix[s->received + i] = bytes[i];
    s->received += length;
    return 0;
}

static int on_close(nghttp2_session *session, int32_t id, uint32_t code, void *data)
{
    (void)code, (void)data;
    free(nghttp2_session_get_stream_user_data(session, id));
    return 0;
}

static ssize_t body(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *flags, nghttp2_data_source *source,
                    void *data)
{
    (void)data;
    struct stream *s = source->ptr;
    const unsigned char *from = s->grpc ? reply : text;
    size_t total = s->grpc ? text_length + PREFIX : text_length;
    size_t length = total - s->sent < room ? total - s->sent : room;
    memcpy(buffer, from + s->sent, length);
    s->sent += length;
    if (s->sent < total)
        return (ssize_t)length;
    *flags |= NGHTTP2_DATA_FLAG_EOF;
    if (s->grpc) {
        nghttp2_nv trailer = FIELD("grpc-status", "0");
        *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
        if (nghttp2_submit_trailer(session, id, &trailer, 1))
            return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    return (ssize_t)length;
}

/* True when the body was exactly one message that is not compressed. */
static int whole_message(const struct stream *s)
{
    const unsigned char *p = s->prefix;
    return s->received >= PREFIX && !p[0]
        && s->received - PREFIX == ((size_t)p[1] << 24 | (size_t)p[2] << 16 | (size_t)p[3] << 8 | (size_t)p[4]);
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *data)
{
    (void)data;
    if ((frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
        return 0;
    struct stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    if (!s)
        return 0;
    nghttp2_data_provider provider = {.source.ptr = s, .read_callback = body};
    if (!s->grpc) {
        nghttp2_nv fields[] = {FIELD(":status", "200"), FIELD("content-type", "application/json"), FIELD("content-length", "")};
        fields[2].value = (uint8_t *)digits;
        fields[2].valuelen = strlen(digits);
        return nghttp2_submit_response(session, frame->hd.stream_id, fields, 3, &provider);
    }
    nghttp2_nv fields[] = {FIELD(":status", "200"), FIELD("content-type", "application/grpc"), FIELD("grpc-status", "13")};
    if (!whole_message(s))
        return nghttp2_submit_response(session, frame->hd.stream_id, fields, 3, NULL);
    return nghttp2_submit_response(session, frame->hd.stream_id, fields, 2, &provider);
}

/* Send what there is: 0 good, the rest when the socket has room; -1 the connection is of no use any more. */
static int push(struct connection *c)
{
    for (;;) {
        while (c->used < OUT - 32768) {
            const uint8_t *bytes;
            ssize_t length = nghttp2_session_mem_send(c->session, &bytes);
            if (length < 0)
                return -1;
            if (!length)
                break;
            memcpy(c->out + c->used, bytes, (size_t)length); /* one frame: at most 16,384 bytes and its head */
            c->used += (size_t)length;
        }
        if (c->from == c->used)
            break;
        ssize_t sent = send(c->fd, c->out + c->from, c->used - c->from, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno != EAGAIN)
            return -1;
        if (sent < 0)
            break;
        c->from += (size_t)sent;
        if (c->from == c->used)
            c->from = c->used = 0;
    }
    int writing = c->from < c->used;
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = c};
    if (writing != c->writing && epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event) < 0)
        fail("origin-http2: epoll_ctl");
    c->writing = writing;
    return nghttp2_session_want_read(c->session) || nghttp2_session_want_write(c->session) ? 0 : -1;
}

static int take(struct connection *c)
{
    static unsigned char window[READ];
    for (;;) {
        ssize_t got = recv(c->fd, window, READ, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN ? 0 : -1;
        if (got == 0 || nghttp2_session_mem_recv(c->session, window, (size_t)got) != got)
            return -1;
        if (got < READ)
            return 0;
    }
}

static void accept_all(int listener)
{
    for (;;) {
        int on = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        struct connection *c = calloc(1, sizeof *c);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, STREAMS}, {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW}};
        if (!c || nghttp2_session_server_new(&c->session, callbacks, c))
            fail("origin-http2: no memory");
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (nghttp2_submit_settings(c->session, NGHTTP2_FLAG_NONE, settings, 2)
            || nghttp2_session_set_local_window_size(c->session, NGHTTP2_FLAG_NONE, 0, WINDOW))
            fail("origin-http2: settings");
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0)
            fail("origin-http2: epoll_ctl");
        if (push(c) < 0)
            drop(c);
    }
}

static void prepare(const char *answer)
{
    text = (const unsigned char *)answer;
    text_length = strlen(answer);
    snprintf(digits, sizeof digits, "%zu", text_length);
    reply = malloc(text_length + PREFIX);
    if (!reply || nghttp2_session_callbacks_new(&callbacks))
        fail("origin-http2: no memory");
    for (int i = 0; i < 4; i++)
        reply[1 + i] = (unsigned char)(text_length >> (24 - 8 * i));
    reply[0] = 0;
    memcpy(reply + PREFIX, text, text_length);
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_field);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: origin-http2 PORT ANSWER\n");
        return 2;
    }
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[1]))};
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    prepare(argv[2]);
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0)
        fail("origin-http2");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) < 0 || listen(listener, 4096) < 0)
        fail("origin-http2: bind");
    struct epoll_event events[BATCH], listening = {.events = EPOLLIN, .data.ptr = NULL};
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listening) < 0)
        fail("origin-http2: epoll");
    for (;;) {
        int count = epoll_wait(poller, events, BATCH, -1);
        if (count < 0 && errno != EINTR)
            fail("origin-http2: epoll_wait");
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c)
                accept_all(listener);
            else if (((events[i].events & ~(unsigned)EPOLLOUT) && take(c) < 0) || push(c) < 0)
                drop(c);
        }
    }
}
