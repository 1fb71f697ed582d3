/* A library with the entry points of NVML that Tidegate uses: two GPUs whose figures are made up, and
   which fail as they are told to. Layouts are those of nvml.h. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, GPU_IS_LOST = 15 };

static struct gpu { u32 index; } gpus[2] = {{0}, {1}};
static volatile int hanging, lost = -1, plain, driver_gone, opened;
static struct { struct gpu *gpu; u64 xid; } events[64];
static volatile int event_first, event_last;
static int samples;

/* What a test does with it. */
void fake_reset(void) {
    hanging = plain = driver_gone = event_first = event_last = 0;
    lost = -1;
}
void fake_hang(int on) { hanging = on; }
void fake_lose(int index) { lost = index; }
void fake_plain(int on) { plain = on; } /* an old GPU: it has only what each has */
void fake_drop_driver(int on) { driver_gone = on; }
void fake_xid(int index, u64 xid) {
    events[event_last % 64].gpu = &gpus[index];
    events[event_last++ % 64].xid = xid;
}
int fake_opened(void) { return opened; }
int fake_samples(void) { return samples; }

static int state(struct gpu *gpu) {
    while (hanging) usleep(1000);
    if (driver_gone) return 9; /* NVML_ERROR_DRIVER_NOT_LOADED */
    return gpu && (int)gpu->index == lost ? GPU_IS_LOST : SUCCESS;
}
#define CHECK(gpu) do { int s = state(gpu); if (s) return s; } while (0)
#define NEWER(gpu) do { CHECK(gpu); if (plain) return NOT_SUPPORTED; } while (0)

int nvmlInitWithFlags(u32 flags) { (void)flags; CHECK(NULL); opened++; return SUCCESS; }
int nvmlShutdown(void) { opened--; return SUCCESS; }
const char *nvmlErrorString(int result) { return result == GPU_IS_LOST ? "GPU is lost" : "an error"; }
int nvmlSystemGetDriverVersion(char *text, u32 size) {
    CHECK(NULL);
    snprintf(text, size, "580.1");
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(u32 *count) { CHECK(NULL); *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(u32 index, struct gpu **gpu) {
    CHECK(NULL);
    *gpu = &gpus[index];
    return SUCCESS;
}
int nvmlDeviceGetUUID(struct gpu *gpu, char *text, u32 size) {
    CHECK(gpu);
    snprintf(text, size, "GPU-%u", gpu->index);
    return SUCCESS;
}
int nvmlDeviceGetName(struct gpu *gpu, char *text, u32 size) {
    CHECK(gpu);
    snprintf(text, size, "NVIDIA Fake");
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(struct gpu *gpu, u64 *memory) {
    CHECK(gpu);
    memory[0] = 80ull << 30, memory[1] = 60ull << 30, memory[2] = 20ull << 30;
    return SUCCESS;
}
struct memory { u32 version; u64 total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(struct gpu *gpu, struct memory *m) {
    NEWER(gpu);
    m->total = 80ull << 30, m->reserved = 1ull << 30, m->free = 60ull << 30, m->used = 19ull << 30;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(struct gpu *gpu, u32 *use) {
    CHECK(gpu);
    use[0] = 87, use[1] = 43;
    return SUCCESS;
}
int nvmlDeviceGetBAR1MemoryInfo(struct gpu *gpu, u64 *bar1) {
    NEWER(gpu);
    bar1[0] = 128ull << 30, bar1[1] = 127ull << 30, bar1[2] = 1ull << 30;
    return SUCCESS;
}
#define FIGURE(name, value) \
    int name(struct gpu *gpu, u32 *figure) { NEWER(gpu); *figure = value; return SUCCESS; }
FIGURE(nvmlDeviceGetPowerUsage, 312500)
FIGURE(nvmlDeviceGetEnforcedPowerLimit, 700000)
FIGURE(nvmlDeviceGetFanSpeed, 30)
FIGURE(nvmlDeviceGetPerformanceState, 2)
FIGURE(nvmlDeviceGetCurrPcieLinkGeneration, 5)
FIGURE(nvmlDeviceGetCurrPcieLinkWidth, 16)
#define FIGURE_OF(name, value) \
    int name(struct gpu *gpu, u32 kind, u32 *figure) { NEWER(gpu); *figure = value; return SUCCESS; }
FIGURE_OF(nvmlDeviceGetTemperature, 61 + kind)
FIGURE_OF(nvmlDeviceGetTemperatureThreshold, kind == 0 ? 95 : 90)
FIGURE_OF(nvmlDeviceGetClockInfo, 1000 + kind)
FIGURE_OF(nvmlDeviceGetMaxClockInfo, 2000 + kind)
#define ENGINE(name, value) \
    int name(struct gpu *gpu, u32 *use, u32 *period) { NEWER(gpu); *use = value, *period = 1; return SUCCESS; }
ENGINE(nvmlDeviceGetEncoderUtilization, 11)
ENGINE(nvmlDeviceGetDecoderUtilization, 12)
int nvmlDeviceGetCurrentClocksEventReasons(struct gpu *gpu, u64 *reasons) {
    NEWER(gpu);
    *reasons = 0x1 | 0x4 | 0x40;
    return SUCCESS;
}

struct field {
    u32 id, scope;
    long long at, latency;
    u32 type, result;
    union { double real; u32 small; u64 large; } value;
};
int nvmlDeviceGetFieldValues(struct gpu *gpu, int count, struct field *fields) {
    NEWER(gpu);
    for (int n = 0; n < count; n++) {
        struct field *f = &fields[n];
        f->result = SUCCESS, f->type = 3, f->value.large = 1000000 + f->id;
        if (f->id == 82) f->type = 1, f->value.small = 71;                /* memory temperature */
        else if (f->id == 230) f->type = 1, f->value.small = gpu->index; /* 1 asks for a reset */
        else if (f->id == 144 || f->id == 145) f->value.large = 0;
        else if (f->id == 94) f->result = NOT_SUPPORTED;
        else if ((f->id == 138 || f->id == 139) && f->scope != 0xFFFFFFFF) f->result = 2;
    }
    return SUCCESS;
}

struct process { u32 pid; u64 memory; u32 instance, part; };
int nvmlDeviceGetComputeRunningProcesses_v3(struct gpu *gpu, u32 *count, struct process *found) {
    NEWER(gpu);
    if (gpu->index == 1) return *count = 0, SUCCESS;
    if (*count < 2) return *count = 2, INSUFFICIENT_SIZE;
    found[0].pid = 4711, found[0].memory = 18ull << 30;
    found[1].pid = 4712, found[1].memory = (u64)-1; /* not available */
    *count = 2;
    return SUCCESS;
}

int nvmlEventSetCreate(void **set) {
    CHECK(NULL);
    const char *xid = getenv("FAKE_NVML_XID"); /* of GPU 0, of another process */
    if (xid) fake_xid(0, strtoull(xid, NULL, 10));
    *set = &events;
    return SUCCESS;
}
int nvmlEventSetFree(void *set) { (void)set; return SUCCESS; }
int nvmlDeviceRegisterEvents(struct gpu *gpu, u64 kinds, void *set) {
    (void)kinds, (void)set;
    NEWER(gpu);
    return SUCCESS;
}
struct event { struct gpu *gpu; u64 kind, data; u32 instance, part; };
int nvmlEventSetWait_v2(void *set, struct event *event, u32 timeout_ms) {
    (void)set, (void)timeout_ms;
    CHECK(NULL);
    if (event_first == event_last) return TIMEOUT;
    event->gpu = events[event_first % 64].gpu, event->kind = 8;
    event->data = events[event_first++ % 64].xid;
    return SUCCESS;
}

int nvmlGpmQueryDeviceSupport(struct gpu *gpu, u32 *support) {
    CHECK(gpu);
    support[1] = !plain;
    return SUCCESS;
}
int nvmlGpmSampleAlloc(void **sample) { samples++; *sample = &samples; return SUCCESS; }
int nvmlGpmSampleFree(void *sample) { (void)sample; samples--; return SUCCESS; }
int nvmlGpmSampleGet(struct gpu *gpu, void *sample) { (void)sample; CHECK(gpu); return SUCCESS; }
struct metric { u32 id, result; double value; const char *names[3]; };
struct asked { u32 version, count; void *one, *other; struct metric metrics[]; };
int nvmlGpmMetricsGet(struct asked *asked) {
    for (u32 n = 0; n < asked->count; n++) {
        asked->metrics[n].result = asked->metrics[n].id == 11 ? NOT_SUPPORTED : SUCCESS;
        asked->metrics[n].value = asked->metrics[n].id;
    }
    return SUCCESS;
}
