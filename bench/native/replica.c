/* Mock replicas: one process, N listening ports, each an OpenAI-compatible engine that answers
 * at once with fixed bytes (wire.h). It costs far less than any router, which is its only virtue:
 * it is not the simulated engine, it has no model, no batching and no queue.
 *
 * usage: replica --ports N [--spin]   prints "ports P1 P2 ... " once it listens, on 127.0.0.1
 *   --spin   do not sleep while there is traffic: see loadgen.c
 *
 * What the body asks for:
 *   "stream": true     server-sent events, one HTTP chunk each, else one JSON document
 *   "max_tokens": M    M content events (or "max_completion_tokens")
 *   "seed": I          I milliseconds between two events; without stream, before the answer
 *
 * Ends on SIGTERM, and when its standard input closes (so it cannot outlive its starter).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tokenize.h"
#include "wire.h"

enum {
    MAX_PORTS = 64, MAX_FD = 65536, WHEEL_MS = 4096,
    SPIN_MS = 20, IN_CAP = 16384, MAX_BODY = 64 << 20, MAX_OUT = 1 << 20, KNOB_HEAD = 1536, KNOB_TAIL = 1536,
};

typedef struct Conn {
    int fd;
    char *in;
    size_t in_len, in_cap;
    char *out;
    size_t out_len, out_off, out_cap;
    bool want_write, closing;
    /* the answer under way */
    bool busy, stream;
    unsigned tokens, sent, interval_ms, prompt;
    /* timer wheel */
    struct Conn *next, **prev;
    uint64_t due_ms;
} Conn;

static int ep;
static Conn *conns[MAX_FD];
static Conn *wheel[WHEEL_MS];
static uint64_t now_ms, wheel_ms;
static unsigned timers;

static uint64_t clock_ms(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static void disarm(Conn *c) {
    if (!c->prev) return;
    *c->prev = c->next;
    if (c->next) c->next->prev = c->prev;
    c->prev = NULL;
    c->next = NULL;
    timers--;
}

static void arm(Conn *c, uint64_t due) {
    if (due <= wheel_ms) due = wheel_ms + 1;
    if (due >= wheel_ms + WHEEL_MS) due = wheel_ms + WHEEL_MS - 1;
    Conn **slot = &wheel[due % WHEEL_MS];
    c->due_ms = due;
    c->next = *slot;
    if (c->next) c->next->prev = &c->next;
    c->prev = slot;
    *slot = c;
    timers++;
}

static void drop(Conn *c) {
    disarm(c);
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void put(Conn *c, const char *data, size_t len) {
    if (c->out_len + len > c->out_cap) {
        size_t cap = c->out_cap ? c->out_cap : 4096;
        while (cap < c->out_len + len) cap *= 2;
        c->out = realloc(c->out, cap);
        if (!c->out) abort();
        c->out_cap = cap;
    }
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
}

/* Sends what is queued. False: the connection is gone. */
static bool flush(Conn *c) {
    while (c->out_off < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_off, c->out_len - c->out_off, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) { drop(c); return false; }
            if (!c->want_write) {
                struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.fd = c->fd};
                epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &ev);
                c->want_write = true;
            }
            return true;
        }
        c->out_off += (size_t)n;
    }
    c->out_off = c->out_len = 0;
    if (c->want_write) {
        struct epoll_event ev = {.events = EPOLLIN, .data.fd = c->fd};
        epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &ev);
        c->want_write = false;
    }
    if (c->closing) { drop(c); return false; }
    return true;
}

static void put_chunk(Conn *c, const char *data, size_t len) {
    char size[16];
    put(c, size, (size_t)snprintf(size, sizeof size, "%zx\r\n", len));
    put(c, data, len);
    put(c, "\r\n", 2);
}

/* The next event, or the last three and the end of the body. */
static void put_next_event(Conn *c) {
    if (c->sent < c->tokens) {
        put_chunk(c, wire_events + c->sent * wire_event_len, wire_event_len);
        c->sent++;
        return;
    }
    char tail[WIRE_TAIL_CAP], *at = tail, *end;
    wire_tail(tail, c->prompt, c->tokens);
    while ((end = strstr(at, "\n\n"))) {
        put_chunk(c, at, (size_t)(end + 2 - at));
        at = end + 2;
    }
    put(c, "0\r\n\r\n", 5);
    c->busy = false;
}

static void put_document(Conn *c, const char *status, const char *body, size_t len) {
    char head[256];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %s\r\ndate: Mon, 02 Nov 2026 08:00:00 GMT\r\nserver: uvicorn\r\n"
                     "content-length: %zu\r\ncontent-type: application/json\r\n\r\n", status, len);
    put(c, head, (size_t)n);
    put(c, body, len);
}

static void put_answer(Conn *c) {
    char json[WIRE_JSON_CAP];
    put_document(c, "200 OK", json, wire_json(json, c->prompt, c->tokens));
    c->busy = false;
}

static bool find_flag(const char *in, size_t len, const char *key, long *value) {
    const char *at = memmem(in, len, key, strlen(key)), *end = in + len;
    if (!at) return false;
    for (at += strlen(key); at < end && (*at == ' ' || *at == ':'); at++) {}
    *value = at + 4 <= end && memcmp(at, "true", 4) == 0;
    for (; at < end && *at >= '0' && *at <= '9'; at++) *value = *value * 10 + (*at - '0');
    return true;
}

/* The fields this replica obeys stand before or after the messages, never inside them. */
static long knob(const char *body, size_t len, const char *key, long otherwise) {
    long value = otherwise;
    size_t tail = len < KNOB_TAIL ? len : KNOB_TAIL;
    if (find_flag(body, len < KNOB_HEAD ? len : KNOB_HEAD, key, &value)) return value;
    find_flag(body + len - tail, tail, key, &value);
    return value;
}

static void answer(Conn *c, const char *head, const char *body, size_t body_len) {
    static const char models[] =
        "{\"object\":\"list\",\"data\":[{\"id\":\"bench-model\",\"object\":\"model\","
        "\"created\":1700000000,\"owned_by\":\"bench\",\"root\":\"bench-model\",\"parent\":null,"
        "\"max_model_len\":1048576}]}";
    if (strncmp(head, "GET /health", 11) == 0) { put_document(c, "200 OK", "", 0); return; }
    if (strncmp(head, "GET /v1/models", 14) == 0) {
        put_document(c, "200 OK", models, sizeof models - 1);
        return;
    }
    if (strncmp(head, "POST /tokenize ", 15) == 0) {
        const TokenizeAnswer *ids = tokenize_answer(body_len);
        put_document(c, "200 OK", ids->text, ids->len);
        return;
    }
    if (strncmp(head, "POST /v1/chat/completions ", 26) != 0) {
        static const char missing[] = "{\"detail\":\"Not Found\"}";
        put_document(c, "404 Not Found", missing, sizeof missing - 1);
        return;
    }
    c->busy = true;
    c->sent = 0;
    c->stream = knob(body, body_len, "\"stream\"", 0) == 1;
    /* Some routers write the old name of this limit as the new one. */
    long tokens = knob(body, body_len, "\"max_tokens\"", -1);
    if (tokens < 0) tokens = knob(body, body_len, "\"max_completion_tokens\"", 16);
    c->tokens = tokens > WIRE_MAX_TOKENS ? WIRE_MAX_TOKENS : (unsigned)tokens;
    c->interval_ms = (unsigned)knob(body, body_len, "\"seed\"", 0);
    c->prompt = wire_prompt_tokens(body_len);
    if (c->stream) {
        static const char stream_head[] =
            "HTTP/1.1 200 OK\r\ndate: Mon, 02 Nov 2026 08:00:00 GMT\r\nserver: uvicorn\r\n"
            "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
        put(c, stream_head, sizeof stream_head - 1);
        if (c->interval_ms) put_next_event(c);
        else while (c->busy && c->out_len < MAX_OUT) put_next_event(c);
    } else if (!c->interval_ms) {
        put_answer(c);
    }
    if (c->busy) arm(c, now_ms + (c->interval_ms ? c->interval_ms : 1));
}

static bool header(const char *head, const char *end, const char *name, const char **value) {
    size_t len = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line && line < end;
         line = strstr(line + 2, "\r\n"))
        if (strncasecmp(line + 2, name, len) == 0 && line[2 + len] == ':') {
            for (*value = line + 3 + len; **value == ' '; (*value)++) {}
            return true;
        }
    return false;
}

/* Answers every complete request in the buffer. False: the connection is gone. */
static bool advance(Conn *c) {
    while (!c->busy && c->in_len) {
        c->in[c->in_len] = 0;
        char *blank = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!blank) break;
        const char *value;
        size_t body_len = 0, head_len = (size_t)(blank - c->in) + 4;
        if (header(c->in, blank, "content-length", &value)) body_len = strtoul(value, NULL, 10);
        else if (header(c->in, blank, "transfer-encoding", &value)) {
            put_document(c, "411 Length Required", "", 0);
            c->closing = true;
            return flush(c);
        }
        if (body_len > MAX_BODY) { drop(c); return false; }
        size_t need = head_len + body_len;
        if (c->in_len < need) {
            if (c->in_cap < need + 1) {
                c->in = realloc(c->in, need + 1);
                if (!c->in) abort();
                c->in_cap = need + 1;
            }
            break;
        }
        answer(c, c->in, c->in + head_len, body_len);
        memmove(c->in, c->in + need, c->in_len - need);
        c->in_len -= need;
        if (c->in_cap > (1 << 20) && c->in_len < IN_CAP) {
            c->in = realloc(c->in, IN_CAP);
            c->in_cap = IN_CAP;
        }
        if (!flush(c)) return false;
    }
    return true;
}

static void readable(Conn *c) {
    for (;;) {
        if (c->in_cap - c->in_len < 2) {
            if (c->in_cap >= MAX_BODY) { drop(c); return; }
            c->in_cap = c->in_cap ? c->in_cap * 2 : IN_CAP;
            c->in = realloc(c->in, c->in_cap);
            if (!c->in) abort();
        }
        size_t room = c->in_cap - c->in_len - 1;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) { drop(c); return; }
        if (n < 0) return;
        c->in_len += (size_t)n;
        if (!advance(c)) return;
        if ((size_t)n < room) return;
    }
}

static void tick(Conn *c) {
    if (!c->busy) return;
    if (!c->stream) put_answer(c);
    else if (c->interval_ms) {
        if (c->out_len < MAX_OUT) put_next_event(c);
    } else {
        while (c->busy && c->out_len < MAX_OUT) put_next_event(c);
    }
    /* From when it was due, not from now: a late tick must not slow the stream down. */
    if (c->busy) arm(c, c->due_ms + (c->interval_ms ? c->interval_ms : 1));
    if (flush(c) && !c->busy) advance(c);
}

static void run_wheel(void) {
    for (; wheel_ms < now_ms; ) {
        wheel_ms++;
        Conn **slot = &wheel[wheel_ms % WHEEL_MS];
        while (*slot) {
            Conn *c = *slot;
            disarm(c);
            tick(c);
        }
    }
}

static int listen_on(uint16_t port, uint16_t *bound) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096) ||
        getsockname(fd, (struct sockaddr *)&at, &len)) {
        perror("listen");
        exit(1);
    }
    *bound = ntohs(at.sin_port);
    return fd;
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;
        if (fd < 0) return;
        if (fd >= MAX_FD) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        Conn *c = calloc(1, sizeof *c);
        if (!c) abort();
        c->fd = fd;
        conns[fd] = c;
        struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
    }
}

int main(int argc, char **argv) {
    int ports = argc >= 3 && strcmp(argv[1], "--ports") == 0 ? atoi(argv[2]) : 0;
    bool spin = argc == 4 && strcmp(argv[3], "--spin") == 0;
    if (ports < 1 || ports > MAX_PORTS || argc > 4) {
        fprintf(stderr, "usage: %s --ports N [--spin]   (1..%d)\n", argv[0], MAX_PORTS);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    wire_init();
    ep = epoll_create1(EPOLL_CLOEXEC);
    int first = -1, last = -1;
    printf("ports");
    for (int i = 0; i < ports; i++) {
        uint16_t bound;
        int fd = listen_on(0, &bound);
        if (first < 0) first = fd;
        last = fd;
        struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
        printf(" %u", bound);
    }
    printf("\n");
    fflush(stdout);
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = 0}, events[512];
    epoll_ctl(ep, EPOLL_CTL_ADD, 0, &ev);
    wheel_ms = now_ms = clock_ms();
    uint64_t spin_until_ms = 0;
    for (;;) {
        bool spinning = spin && now_ms < spin_until_ms;
        int n = epoll_wait(ep, events, 512, spinning ? 0 : timers ? 1 : 1000);
        now_ms = clock_ms();
        if (n > 0) spin_until_ms = now_ms + SPIN_MS;
        else if (spinning) sched_yield();
        if (!timers) wheel_ms = now_ms;
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            char byte;
            if (fd == 0) {
                if (read(0, &byte, 1) <= 0) return 0;
            } else if (fd >= first && fd <= last) {
                accept_all(fd);
            } else if (conns[fd]) {
                if (events[i].events & EPOLLOUT && !flush(conns[fd])) continue;
                if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(conns[fd]);
            }
        }
        run_wheel();
    }
}
