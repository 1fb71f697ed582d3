/* Answers to POST /tokenize, which some routers ask of the engine before every request.
 *
 * As many token ids as the prompt has tokens (by size class, wire_prompt_tokens), made once. The
 * ids are the same for every prompt of a class: cheaper for a prefix index than real ones.
 */
#ifndef TIDEGATE_BENCH_TOKENIZE_H
#define TIDEGATE_BENCH_TOKENIZE_H

#include "wire.h"

typedef struct {
    unsigned tokens;
    char *text;
    size_t len;
} TokenizeAnswer;

static const TokenizeAnswer *tokenize_answer(size_t body_bytes) {
    static TokenizeAnswer made[8];
    unsigned tokens = wire_prompt_tokens(body_bytes), at = 0;
    while (made[at].text && made[at].tokens != tokens) at++;
    TokenizeAnswer *answer = &made[at];
    if (answer->text) return answer;
    size_t cap = (size_t)tokens * 8 + 256;
    answer->tokens = tokens;
    answer->text = malloc(cap);
    if (!answer->text) abort();
    size_t len = (size_t)snprintf(answer->text, cap,
                                  "{\"count\":%u,\"max_model_len\":1048576,\"tokens\":[", tokens);
    for (unsigned i = 0, id = 12345; i < tokens; i++) {
        id = id * 1103515245u + 12345u;
        len += (size_t)snprintf(answer->text + len, cap - len, "%s%u", i ? "," : "",
                                (id >> 8) % 49152);
    }
    len += (size_t)snprintf(answer->text + len, cap - len, "],\"token_strs\":null}");
    answer->len = len;
    return answer;
}

#endif
