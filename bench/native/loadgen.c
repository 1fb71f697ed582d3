/* Load generator: keeps connections to one HTTP endpoint, sends prepared requests, compares every
 * byte of every answer with what the mock replica sends (wire.h), and prints one JSON document.
 *
 * usage: loadgen --port P --requests FILE --connections N [options]
 *   --warmup-s S --window-s S   only what ends inside the window is counted (0.3, 2)
 *   --rate R                    requests/s on a fixed schedule; latency counts from when a request
 *                               was due, so a slow router cannot slow the questions down
 *   --once                      every connection asks once; ends when all have their answer
 *   --spread-s S                first requests are spread over S seconds (streams: their length)
 *   --drain-s S                 let answers finish after the window (1); then connections close
 *   --limit-s S                 with --once: give up after this long (30)
 *   --spin                      never sleep: a router that writes to a sleeping process pays for
 *                               waking it, the more often the slower it is; on a network it would not
 *   --watch LABEL=PID[,PID]     report CPU and memory of these processes over the window
 *
 * FILE (made by bench/workload.py): "TGB1", count, then for each request: bytes, kind (0 document,
 * 1 stream), tokens, prompt tokens, all uint32 little-endian, and the request itself.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>

#include "watch.h"
#include "wire.h"

enum { HEAD_CAP = 16384, READ_CAP = 262144, MAX_REQUESTS = 4096, MAX_CONNS = 16384,
       MAX_SAMPLES = 2000000, LINE_CAP = 32, MAX_DUE = 65536, MAX_ERRORS = 10000 };

typedef struct {
    const char *bytes;
    uint32_t len, kind, tokens;
    char *tail; /* the whole document, or what follows the content events of a stream */
    size_t tail_len;
} Request;

typedef enum { CLOSED, CONNECTING, IDLE, WAITING, BODY } Phase;
typedef enum { SIZE_LINE, CHUNK, CHUNK_END, TRAILER } Framing;

typedef struct {
    int fd;
    Phase phase;
    const Request *req;
    size_t sent, got; /* request bytes sent, answer body bytes seen */
    bool want_write, chunked, close_after, asked_once;
    Framing framing;
    uint64_t left; /* of the chunk, or of the body */
    char line[LINE_CAP];
    unsigned line_len;
    char *head;
    size_t head_len;
    double due_s, ttfb_us;
} Conn;

typedef struct {
    unsigned long done, events, errors, status_errors, mismatches, cut, connect_errors, framing;
    unsigned long timeouts, reconnects, body_bytes, late, reads;
    unsigned active, peak_active;
    char first_error[160];
} Totals;

static struct {
    int port, connections;
    double warmup_s, window_s, rate, spread_s, drain_s, limit_s;
    bool once, spin;
} opt = {.connections = 1, .warmup_s = 0.3, .window_s = 2, .drain_s = 1, .limit_s = 30};

static Request requests[MAX_REQUESTS];
static uint32_t request_count, next_request;
static Conn *conns;
static int ep, timer = -1, idle_stack[MAX_CONNS], idle_count, finished;
static Totals all;
static bool in_window, stopping;
static double *ttfb_us, *total_us, due_queue[MAX_DUE];
static size_t samples;
static unsigned due_head, due_tail;

static double clock_s(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void fail(Conn *c, unsigned long *kind, const char *what);

static void interest(Conn *c, bool write) {
    if (c->want_write == write) return;
    struct epoll_event ev = {.events = EPOLLIN | (write ? EPOLLOUT : 0),
                             .data.u32 = (uint32_t)(c - conns)};
    epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &ev);
    c->want_write = write;
}

static void hang_up(Conn *c) {
    if (c->phase == BODY) all.active--;
    for (int i = 0; c->phase == IDLE && i < idle_count; i++)
        if (idle_stack[i] == (int)(c - conns)) idle_stack[i] = idle_stack[--idle_count];
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->phase = CLOSED;
    c->req = NULL;
}

static void connect_to(Conn *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) { perror("socket"); exit(1); }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->phase = CONNECTING;
    c->want_write = true;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
        fail(c, &all.connect_errors, strerror(errno));
        return;
    }
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.u32 = (uint32_t)(c - conns)};
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &ev);
}

static void send_request(Conn *c) {
    while (c->sent < c->req->len) {
        ssize_t n = send(c->fd, c->req->bytes + c->sent, c->req->len - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) { interest(c, true); return; }
        if (n < 0) { fail(c, &all.cut, strerror(errno)); return; }
        c->sent += (size_t)n;
    }
    interest(c, false);
}

static void ask(Conn *c, double due_s) {
    c->req = &requests[next_request++ % request_count];
    c->sent = c->got = c->head_len = 0;
    c->phase = WAITING;
    c->asked_once = true;
    c->due_s = due_s;
    send_request(c);
}

/* Due requests go out on idle connections; what finds none waits and its latency keeps counting. */
static void serve_due(void) {
    while (due_head != due_tail && idle_count) {
        Conn *c = &conns[idle_stack[--idle_count]];
        if (c->phase == IDLE) ask(c, due_queue[due_head++ % MAX_DUE]);
    }
}

static void become_idle(Conn *c) {
    c->phase = IDLE;
    c->req = NULL;
    interest(c, false);
    if (stopping) return;
    if (opt.rate > 0) {
        idle_stack[idle_count++] = (int)(c - conns);
        serve_due();
    } else if (!(opt.once && c->asked_once)) {
        ask(c, clock_s());
    }
}

static void fail(Conn *c, unsigned long *kind, const char *what) {
    ++*kind;
    all.errors++;
    if (!all.first_error[0]) snprintf(all.first_error, sizeof all.first_error, "%s", what);
    if (opt.once) finished++;
    hang_up(c);
    if (stopping || opt.once) return;
    if (all.errors < MAX_ERRORS) connect_to(c);
}

static void answered(Conn *c, double now_s) {
    size_t expected = c->req->tail_len +
                      (c->req->kind ? c->req->tokens * wire_event_len : 0);
    all.active--;
    if (c->got != expected) { c->phase = WAITING; fail(c, &all.mismatches, "short body"); return; }
    if (in_window) {
        all.done++;
        if (samples < MAX_SAMPLES) {
            ttfb_us[samples] = c->ttfb_us;
            total_us[samples++] = (now_s - c->due_s) * 1e6;
        }
    }
    if (opt.once) finished++;
    if (c->close_after) {
        all.reconnects++;
        c->phase = IDLE;
        hang_up(c);
        if (!opt.once && !stopping) connect_to(c);
        return;
    }
    become_idle(c);
}

/* Compares body bytes with what the replica sent. False: they differ. */
static bool body_is_right(Conn *c, const char *data, size_t len) {
    size_t events_len = c->req->kind ? c->req->tokens * wire_event_len : 0;
    if (c->got + len > events_len + c->req->tail_len) return false;
    size_t before = c->got / wire_event_len;
    if (c->got < events_len) {
        size_t part = events_len - c->got < len ? events_len - c->got : len;
        if (memcmp(data, wire_events + c->got, part)) return false;
        c->got += part;
        if (in_window && c->req->kind) all.events += c->got / wire_event_len - before;
        data += part;
        len -= part;
    }
    if (len && memcmp(data, c->req->tail + (c->got - events_len), len)) return false;
    c->got += len;
    return true;
}

/* One step of the chunked framing. Returns bytes used, or -1. Sets *end at the end of the body. */
static ssize_t unchunk(Conn *c, const char *data, size_t len, bool *end) {
    if (c->framing == CHUNK) {
        size_t part = c->left < len ? c->left : len;
        if (!body_is_right(c, data, part)) return -1;
        c->left -= part;
        if (!c->left) { c->framing = CHUNK_END; c->line_len = 0; }
        return (ssize_t)part;
    }
    for (size_t i = 0; i < len; i++) {
        if (c->line_len >= LINE_CAP) return -1;
        c->line[c->line_len++] = data[i];
        if (data[i] != '\n') continue;
        if (c->line_len < 2 || c->line[c->line_len - 2] != '\r') return -1;
        c->line[c->line_len - 2] = 0;
        bool blank = c->line_len == 2;
        c->line_len = 0;
        if (c->framing == CHUNK_END) {
            if (!blank) return -1;
            c->framing = SIZE_LINE;
        } else if (c->framing == TRAILER) {
            if (!blank) return -1;
            *end = true;
        } else {
            char *stop;
            c->left = strtoull(c->line, &stop, 16);
            if (blank || *stop) return -1;
            c->framing = c->left ? CHUNK : TRAILER;
        }
        return (ssize_t)(i + 1);
    }
    return (ssize_t)len;
}

static void body(Conn *c, const char *data, size_t len, double now_s) {
    if (c->chunked) {
        while (len) {
            bool end = false;
            ssize_t used = unchunk(c, data, len, &end);
            if (used < 0) { fail(c, &all.mismatches, "stream differs from the replica's"); return; }
            data += used;
            len -= (size_t)used;
            if (end) {
                if (len) fail(c, &all.framing, "bytes after the answer");
                else answered(c, now_s);
                return;
            }
        }
        return;
    }
    if (len > c->left || !body_is_right(c, data, len)) {
        fail(c, &all.mismatches, "document differs from the replica's");
        return;
    }
    c->left -= len;
    if (!c->left) answered(c, now_s);
}

static const char *head_value(const char *head, const char *name) {
    size_t len = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
        if (strncasecmp(line + 2, name, len) == 0 && line[2 + len] == ':') {
            const char *value = line + 3 + len;
            while (*value == ' ') value++;
            return value;
        }
    return NULL;
}

/* Adds bytes to the head; once it is whole, starts the body with what follows it. */
static void head(Conn *c, const char *data, size_t len, double now_s) {
    size_t had = c->head_len, part = len < HEAD_CAP - 1 - had ? len : HEAD_CAP - 1 - had;
    memcpy(c->head + had, data, part);
    c->head_len += part;
    c->head[c->head_len] = 0;
    char *blank = strstr(c->head, "\r\n\r\n");
    if (!blank) {
        if (c->head_len >= HEAD_CAP - 1) fail(c, &all.framing, "head too long");
        return;
    }
    size_t head_len = (size_t)(blank - c->head) + 4;
    blank[2] = 0;
    if (strncmp(c->head, "HTTP/1.1 200", 12) != 0) {
        char what[128];
        snprintf(what, sizeof what, "%.40s | %.70s", c->head, c->head + head_len);
        for (char *at = what; *at; at++) if (*at < ' ' || *at == '"' || *at == '\\') *at = '.';
        fail(c, &all.status_errors, what);
        return;
    }
    c->ttfb_us = (now_s - c->due_s) * 1e6;
    const char *value = head_value(c->head, "transfer-encoding");
    c->chunked = value && strncasecmp(value, "chunked", 7) == 0;
    c->framing = SIZE_LINE;
    c->line_len = 0;
    value = head_value(c->head, "content-length");
    if (!c->chunked && !value) { fail(c, &all.framing, "answer without a length"); return; }
    c->left = value ? strtoull(value, NULL, 10) : 0;
    value = head_value(c->head, "connection");
    c->close_after = value && strncasecmp(value, "close", 5) == 0;
    c->phase = BODY;
    if (++all.active > all.peak_active) all.peak_active = all.active;
    body(c, data + (head_len - had), len - (head_len - had), now_s);
}

static void readable(Conn *c) {
    static char buf[READ_CAP];
    ssize_t n = recv(c->fd, buf, sizeof buf, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        if (c->phase == IDLE) { /* the router closed a connection it had no use for */
            all.reconnects++;
            hang_up(c);
            if (!opt.once && !stopping) connect_to(c);
        } else {
            fail(c, &all.cut, n < 0 ? strerror(errno) : "closed before the answer ended");
        }
        return;
    }
    if (in_window) {
        all.body_bytes += (unsigned long)n;
        all.reads += c->phase == BODY;
    }
    double now_s = clock_s();
    if (c->phase == WAITING) head(c, buf, (size_t)n, now_s);
    else if (c->phase == BODY) body(c, buf, (size_t)n, now_s);
    else fail(c, &all.framing, "an unrequested answer");
}

static void ready(Conn *c, uint32_t events) {
    if (c->phase == CLOSED) return;
    if (c->phase == CONNECTING) {
        int error = 0;
        socklen_t len = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
        if (error) fail(c, &all.connect_errors, strerror(error));
        else if (events & EPOLLOUT) become_idle(c);
        return;
    }
    if (events & EPOLLOUT && c->phase == WAITING && c->sent < c->req->len) send_request(c);
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && c->phase != CLOSED) readable(c);
}

#include "loadgen_main.h"
