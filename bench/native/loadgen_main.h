/* Second half of loadgen.c: reads the requests, keeps the schedule, prints the result. */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_quantiles(const char *name, double *values, size_t count) {
    qsort(values, count, sizeof *values, by_value);
    printf(",\"%s\":{\"count\":%zu", name, count);
    static const struct { const char *name; double q; } qs[] = {
        {"p50", .5}, {"p90", .9}, {"p99", .99}, {"p999", .999}, {"max", 1}};
    for (size_t i = 0; i < sizeof qs / sizeof *qs && count; i++) {
        size_t at = (size_t)(qs[i].q * (double)count);
        printf(",\"%s\":%.1f", qs[i].name, values[at < count ? at : count - 1]);
    }
    printf("}");
}

static void load_requests(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) { perror(path); exit(1); }
    const char *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (at == MAP_FAILED || st.st_size < 8 || memcmp(at, "TGB1", 4)) {
        fprintf(stderr, "%s: not a request file\n", path);
        exit(1);
    }
    const char *end = at + st.st_size;
    memcpy(&request_count, at + 4, 4);
    at += 8;
    if (request_count < 1 || request_count > MAX_REQUESTS) exit(1);
    for (uint32_t i = 0; i < request_count; i++) {
        uint32_t field[4];
        Request *r = &requests[i];
        if (end - at < (ptrdiff_t)sizeof field) { fprintf(stderr, "short file\n"); exit(1); }
        memcpy(field, at, sizeof field);
        at += sizeof field;
        *r = (Request){.bytes = at, .len = field[0], .kind = field[1], .tokens = field[2]};
        if (end - at < r->len || r->tokens > WIRE_MAX_TOKENS) exit(1);
        r->tail = malloc(WIRE_TAIL_CAP + WIRE_JSON_CAP);
        r->tail_len = r->kind ? wire_tail(r->tail, field[3], r->tokens)
                              : wire_json(r->tail, field[3], r->tokens);
        at += r->len;
    }
}

static void set_timer(double at_s) {
    static double set_s;
    if (at_s == set_s) return;
    set_s = at_s;
    struct itimerspec when = {.it_value = {.tv_sec = (time_t)at_s,
        .tv_nsec = (long)((at_s - (double)(time_t)at_s) * 1e9)}};
    if (when.it_value.tv_sec == 0 && when.it_value.tv_nsec == 0) when.it_value.tv_nsec = 1;
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

/* Runs the event loop until `until_s`, until every connection has had its one answer, or, while
 * stopping, until nothing is under way. */
static void run(double until_s, double *next_due_s, double *next_connect_s, int *connected) {
    struct epoll_event events[512];
    double gap_s = opt.spread_s / opt.connections;
    for (;;) {
        double now_s = clock_s();
        if (now_s >= until_s || (opt.once && finished >= opt.connections)) return;
        if (stopping) {
            int busy = 0;
            for (int i = 0; i < opt.connections; i++)
                busy += conns[i].phase == WAITING || conns[i].phase == BODY;
            if (!busy) return;
        }
        while (!stopping && *connected < opt.connections && now_s >= *next_connect_s) {
            connect_to(&conns[(*connected)++]);
            *next_connect_s += gap_s;
        }
        while (opt.rate > 0 && !stopping && now_s >= *next_due_s) {
            if (due_tail - due_head < MAX_DUE) due_queue[due_tail++ % MAX_DUE] = *next_due_s;
            else all.late++;
            *next_due_s += 1 / opt.rate;
        }
        serve_due();
        double wake_s = until_s;
        if (!stopping && opt.rate > 0 && *next_due_s < wake_s) wake_s = *next_due_s;
        if (!stopping && *connected < opt.connections && *next_connect_s < wake_s)
            wake_s = *next_connect_s;
        set_timer(wake_s);
        int n = epoll_wait(ep, events, 512, opt.spin ? 0 : 100);
        if (opt.spin && n == 0) sched_yield();
        for (int i = 0; i < n; i++) {
            if (events[i].data.u32 == UINT32_MAX) {
                uint64_t ticks;
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) perror("timer");
            } else {
                ready(&conns[events[i].data.u32], events[i].events);
            }
        }
    }
}

static void print_result(double window_s, Watch *watches, int watch_count, double self_cpu_s) {
    printf("{\"window_s\":%.6f,\"done\":%lu,\"events\":%lu,\"bytes\":%lu,\"reads\":%lu,"
           "\"peak_active\":%u,"
           "\"reconnects\":%lu,\"self_cpu_s\":%.6f", window_s, all.done, all.events,
           all.body_bytes, all.reads, all.peak_active, all.reconnects, self_cpu_s);
    printf(",\"errors\":{\"total\":%lu,\"status\":%lu,\"mismatch\":%lu,\"cut\":%lu,"
           "\"connect\":%lu,\"framing\":%lu,\"timeout\":%lu,\"late\":%lu},\"first_error\":\"%s\"",
           all.errors + all.timeouts + all.late, all.status_errors, all.mismatches, all.cut,
           all.connect_errors, all.framing, all.timeouts, all.late, all.first_error);
    print_quantiles("ttfb_us", ttfb_us, samples);
    print_quantiles("latency_us", total_us, samples);
    printf(",\"watch\":{");
    for (int i = 0; i < watch_count; i++) {
        Watch *w = &watches[i];
        printf("%s\"%s\":{\"cpu_s\":%.6f,\"rss_start_kib\":%ld,\"rss_end_kib\":%ld,"
               "\"rss_peak_kib\":%ld}", i ? "," : "", w->label, w->cpu_end_s - w->cpu_start_s,
               w->rss_start_kib, w->rss_end_kib, w->rss_peak_kib);
    }
    printf("}}\n");
}

static double own_cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

static int usage(void) {
    fprintf(stderr, "usage: loadgen --port P --requests FILE --connections N [--warmup-s S] "
                    "[--window-s S] [--rate R] [--once] [--spread-s S] [--drain-s S] "
                    "[--limit-s S] [--spin] [--watch LABEL=PID[,PID]]...\n");
    return 2;
}

int main(int argc, char **argv) {
    static Watch watches[WATCH_MAX_GROUPS];
    int watch_count = 0, connected = 0;
    const char *file = NULL;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--once")) { opt.once = true; continue; }
        if (!strcmp(name, "--spin")) { opt.spin = true; continue; }
        if (++i >= argc) return usage();
        double number = atof(argv[i]);
        if (!strcmp(name, "--port")) opt.port = (int)number;
        else if (!strcmp(name, "--requests")) file = argv[i];
        else if (!strcmp(name, "--connections")) opt.connections = (int)number;
        else if (!strcmp(name, "--warmup-s")) opt.warmup_s = number;
        else if (!strcmp(name, "--window-s")) opt.window_s = number;
        else if (!strcmp(name, "--rate")) opt.rate = number;
        else if (!strcmp(name, "--spread-s")) opt.spread_s = number;
        else if (!strcmp(name, "--drain-s")) opt.drain_s = number;
        else if (!strcmp(name, "--limit-s")) opt.limit_s = number;
        else if (!strcmp(name, "--watch") && watch_count < WATCH_MAX_GROUPS &&
                 watch_parse(&watches[watch_count], argv[i])) watch_count++;
        else return usage();
    }
    if (!opt.port || !file || opt.connections < 1 || opt.connections > MAX_CONNS) return usage();
    signal(SIGPIPE, SIG_IGN);
    wire_init();
    load_requests(file);
    conns = calloc((size_t)opt.connections, sizeof *conns);
    ttfb_us = malloc(MAX_SAMPLES * sizeof *ttfb_us);
    total_us = malloc(MAX_SAMPLES * sizeof *total_us);
    ep = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event ev = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(ep, EPOLL_CTL_ADD, timer, &ev);
    for (int i = 0; i < opt.connections; i++) {
        conns[i].fd = -1;
        conns[i].head = malloc(HEAD_CAP);
        if (!conns[i].head) abort();
    }
    double start_s = clock_s(), next_due_s = start_s + 0.1, next_connect_s = start_s;
    if (!opt.once) run(start_s + opt.warmup_s, &next_due_s, &next_connect_s, &connected);
    for (int i = 0; i < watch_count; i++) watch_start(&watches[i]);
    double from_s = clock_s(), self_s = own_cpu_s();
    in_window = true;
    run(from_s + (opt.once ? opt.limit_s : opt.window_s), &next_due_s, &next_connect_s,
        &connected);
    in_window = false;
    double to_s = clock_s();
    self_s = own_cpu_s() - self_s;
    for (int i = 0; i < watch_count; i++) watch_end(&watches[i]);
    if (opt.once) {
        all.timeouts = (unsigned long)(opt.connections - finished);
    } else if (opt.drain_s > 0) {
        stopping = true;
        run(to_s + opt.drain_s, &next_due_s, &next_connect_s, &connected);
        for (int i = 0; i < opt.connections; i++)
            all.timeouts += conns[i].phase == WAITING || conns[i].phase == BODY;
    }
    /* What was due and found no free connection: a few at the end are on their way, more is not. */
    if (due_tail - due_head > (unsigned)opt.connections) all.late += due_tail - due_head;
    stopping = true;
    for (int i = 0; i < opt.connections; i++) hang_up(&conns[i]);
    print_result(to_s - from_s, watches, watch_count, self_s);
    return 0;
}
