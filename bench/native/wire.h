/* What a mock replica answers, byte for byte.
 *
 * The replica sends these bytes and the load generator compares what the router delivered with
 * them, so a router that drops, repeats, reorders or rewrites a byte is caught. Every event has
 * the same length, which makes "how many events arrived" a division.
 */
#ifndef TIDEGATE_BENCH_WIRE_H
#define TIDEGATE_BENCH_WIRE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WIRE_MAX_TOKENS = 4096, WIRE_TAIL_CAP = 1024, WIRE_JSON_CAP = 1024 };

static const char WIRE_EVENT[] =
    "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"bench-model\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" t%06u\"},"
    "\"logprobs\":null,\"finish_reason\":null}]}\n\n";

static const char WIRE_TAIL[] =
    "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"bench-model\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},"
    "\"logprobs\":null,\"finish_reason\":\"length\"}]}\n\n"
    "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"bench-model\",\"choices\":[],\"usage\":{\"prompt_tokens\":%7u,"
    "\"total_tokens\":%7u,\"completion_tokens\":%6u}}\n\n"
    "data: [DONE]\n\n";

static const char WIRE_JSON[] =
    "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,"
    "\"model\":\"bench-model\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
    "\"content\":\"The tide comes in, the tide goes out, and the gate counts every drop.\"},"
    "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":%7u,"
    "\"total_tokens\":%7u,\"completion_tokens\":%6u}}";

/* All content events one after the other, and the length of one. */
static char *wire_events;
static size_t wire_event_len;

static void wire_init(void) {
    char one[512];
    wire_event_len = (size_t)snprintf(one, sizeof one, WIRE_EVENT, 0u);
    wire_events = malloc(wire_event_len * WIRE_MAX_TOKENS + 1);
    if (!wire_events) abort();
    for (unsigned i = 0; i < WIRE_MAX_TOKENS; i++)
        snprintf(wire_events + i * wire_event_len, wire_event_len + 1, WIRE_EVENT, i);
}

/* Prompt tokens that a replica reports for a body of this many bytes. By size class, not exactly:
 * routers that parse and write the body again change its length, which must not fail the check. */
static inline unsigned wire_prompt_tokens(size_t body_bytes) {
    if (body_bytes < 4096) return 128;
    if (body_bytes < 65536) return 8000;
    if (body_bytes < 500000) return 55000;
    return 220000;
}

static inline size_t wire_tail(char out[WIRE_TAIL_CAP], unsigned prompt, unsigned tokens) {
    return (size_t)snprintf(out, WIRE_TAIL_CAP, WIRE_TAIL, prompt, prompt + tokens, tokens);
}

static inline size_t wire_json(char out[WIRE_JSON_CAP], unsigned prompt, unsigned tokens) {
    return (size_t)snprintf(out, WIRE_JSON_CAP, WIRE_JSON, prompt, prompt + tokens, tokens);
}

#endif
