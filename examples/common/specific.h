// specific.h - which tokens are an expert's own: of a token's occurrences, how many choose the expert (share), and how
// many times as often as an average token does (lift). As the vocabulary specialisation of OLMoE's analysis [K], which
// counts the first choice; here any of a token's choices counts [D].
#ifndef EX_SPECIFIC_H
#define EX_SPECIFIC_H

#include "platform.h"

#include <math.h>

#define SPECIFIC_MOST 10 // tokens an expert
#define SPECIFIC_LEAST 5 // occurrences, before a token may be one

typedef struct specific_token {
    int32_t token; // -1: no more
    uint64_t taken, seen;
    double share, lift; // taken / seen; share / (the expert's tokens / all tokens)
    double low; // of share, Wilson's 95% lower bound [K]: what they are ranked by, so that few occurrences weigh
                // less
} specific_token;

EX_FUNC int specific_by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}
EX_FUNC double specific_low(double taken, double seen) {
    const double z = 1.959963985, p = taken / seen;
    double middle = p + z * z / (2 * seen), wide = z * sqrt(p * (1 - p) / seen + z * z / (4 * seen * seen));
    return (middle - wide) / (1 + z * z / seen);
}
EX_FUNC void specific_put(specific_token *best, specific_token t) {
    for (size_t i = 0; i < SPECIFIC_MOST; i++)
        if (best[i].token < 0 || t.low > best[i].low) {
            specific_token keep = best[i];
            best[i] = t;
            t = keep;
            if (t.token < 0) return;
        }
}

// best (E, SPECIFIC_MOST), the most specific first. index (T, k): a row without a choice is no token. token (T) >= 0.
EX_FUNC void specific_tokens(size_t T, size_t E, size_t k, const int32_t *index, const int32_t *token,
                             specific_token *best) {
    size_t n = 0, all = 0, most = 0;
    for (size_t t = 0; t < T; t++)
        if ((size_t)token[t] >= most) most = (size_t)token[t] + 1;
    uint64_t *pair = allocate(T * k, sizeof *pair), *seen = allocate(most, sizeof *seen);
    uint64_t *taken = allocate(E, sizeof *taken);
    for (size_t t = 0; t < T; t++) {
        size_t before = n;
        for (size_t i = 0; i < k; i++)
            if (index[t * k + i] >= 0) pair[n++] = (uint64_t)token[t] * E + (uint64_t)index[t * k + i];
        for (size_t i = before; i < n; i++) taken[pair[i] % E]++;
        seen[token[t]] += n > before;
        all += n > before;
    }
    for (size_t i = 0; i < E * SPECIFIC_MOST; i++) best[i] = (specific_token){.token = -1};
    qsort(pair, n, sizeof *pair, specific_by_value);
    for (size_t i = 0, end; i < n; i = end) {
        uint64_t e = pair[i] % E, id = pair[i] / E;
        for (end = i; end < n && pair[end] == pair[i];) end++;
        if (seen[id] < SPECIFIC_LEAST) continue;
        specific_token t = {.token = (int32_t)id, .taken = end - i, .seen = seen[id]};
        t.share = (double)t.taken / (double)t.seen;
        t.lift = t.share / ((double)taken[e] / (double)all);
        t.low = specific_low((double)t.taken, (double)t.seen);
        specific_put(best + e * SPECIFIC_MOST, t);
    }
    free(pair), free(seen), free(taken);
}

#endif
