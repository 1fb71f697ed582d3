/* What watched processes used: CPU from their threads' run time, memory from their status.
 *
 * /proc/PID/task/TID/schedstat gives nanoseconds on the CPU, user and system together: the same
 * sum as utime+stime, without their 10 ms steps.
 */
#ifndef TIDEGATE_BENCH_WATCH_H
#define TIDEGATE_BENCH_WATCH_H

#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { WATCH_MAX_GROUPS = 8, WATCH_MAX_PIDS = 32 };

typedef struct {
    char label[32];
    int pids[WATCH_MAX_PIDS];
    int count;
    double cpu_start_s, cpu_end_s;
    long rss_start_kib, rss_end_kib, rss_peak_kib;
} Watch;

/* "label=1,2,3". False: malformed. */
static int watch_parse(Watch *w, const char *text) {
    const char *eq = strchr(text, '=');
    if (!eq || (size_t)(eq - text) >= sizeof w->label) return 0;
    memset(w, 0, sizeof *w);
    memcpy(w->label, text, (size_t)(eq - text));
    for (const char *at = eq + 1; *at && w->count < WATCH_MAX_PIDS;) {
        char *end;
        w->pids[w->count++] = (int)strtol(at, &end, 10);
        if (end == at) return 0;
        at = *end == ',' ? end + 1 : end;
    }
    return w->count > 0;
}

static double watch_cpu_s(const Watch *w) {
    double total_s = 0;
    for (int i = 0; i < w->count; i++) {
        char path[384];
        snprintf(path, sizeof path, "/proc/%d/task", w->pids[i]);
        DIR *tasks = opendir(path);
        if (!tasks) continue;
        for (struct dirent *entry; (entry = readdir(tasks));) {
            if (entry->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", w->pids[i], entry->d_name);
            FILE *f = fopen(path, "r");
            unsigned long long ns;
            if (!f) continue;
            if (fscanf(f, "%llu", &ns) == 1) total_s += (double)ns * 1e-9;
            fclose(f);
        }
        closedir(tasks);
    }
    return total_s;
}

static long watch_status_kib(const Watch *w, const char *field) {
    long total_kib = 0;
    for (int i = 0; i < w->count; i++) {
        char path[64], line[256];
        snprintf(path, sizeof path, "/proc/%d/status", w->pids[i]);
        FILE *f = fopen(path, "r");
        if (!f) continue;
        size_t len = strlen(field);
        while (fgets(line, sizeof line, f))
            if (strncmp(line, field, len) == 0) total_kib += strtol(line + len + 1, NULL, 10);
        fclose(f);
    }
    return total_kib;
}

/* Also resets the kernel's high-water mark of resident memory, so the peak is of this window. */
static void watch_start(Watch *w) {
    for (int i = 0; i < w->count; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/clear_refs", w->pids[i]);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd >= 0) {
            if (write(fd, "5", 1) < 0) perror("clear_refs");
            close(fd);
        }
    }
    w->rss_start_kib = watch_status_kib(w, "VmRSS");
    w->cpu_start_s = watch_cpu_s(w);
}

static void watch_end(Watch *w) {
    w->cpu_end_s = watch_cpu_s(w);
    w->rss_end_kib = watch_status_kib(w, "VmRSS");
    w->rss_peak_kib = watch_status_kib(w, "VmHWM");
}

#endif
