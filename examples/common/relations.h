// relations.h - what two sets of choices of the same tokens have to do with each other: router saturation, the way from
// a layer's expert to the next one's, experts and domains; and which experts are chosen together.
//
// index (T, k): choices, the first one first; a row without any is no token (padding), nor is a label below 0.
#ifndef EX_RELATIONS_H
#define EX_RELATIONS_H

#include "platform.h"

#include <math.h>

#include "moe.h"

// Of the tokens of both: how many of a token's experts are kept. As OLMoE's router saturation [K], there between a
// checkpoint and the last one.
typedef struct relation_overlap {
    size_t tokens;
    double top1, topk;               // share of the first choices; of all, mean over tokens of |A and B| / k
    double chance_top1, chance_topk; // the same of tokens shuffled: what the loads alone make
} relation_overlap;

EX_FUNC int relation_is_token(size_t k, const int32_t *index) {
    for (size_t i = 0; i < k; i++)
        if (index[i] >= 0) return 1;
    return 0;
}

EX_FUNC relation_overlap relation_overlap_of(size_t T, size_t E, size_t k, const int32_t *a, const int32_t *b) {
    relation_overlap o = {0, 0, 0, 0, 0};
    uint64_t *count = allocate(4 * E, sizeof *count); // a, b: all choices; a, b: first choices
    for (size_t t = 0; t < T; t++) {
        const int32_t *of[2] = {a + t * k, b + t * k};
        if (!relation_is_token(k, of[0]) || !relation_is_token(k, of[1])) continue;
        o.tokens++;
        o.top1 += of[0][0] >= 0 && of[0][0] == of[1][0];
        for (size_t i = 0; i < k; i++)
            for (size_t j = 0; j < k; j++) o.topk += of[0][i] >= 0 && of[0][i] == of[1][j];
        for (size_t s = 0; s < 2; s++)
            for (size_t i = 0; i < k; i++) {
                if (of[s][i] < 0) continue;
                count[s * E + (size_t)of[s][i]]++;
                if (i == 0) count[(2 + s) * E + (size_t)of[s][i]]++;
            }
    }
    double n = (double)o.tokens;
    for (size_t e = 0; e < E; e++) {
        o.chance_topk += (double)count[e] * (double)count[E + e];
        o.chance_top1 += (double)count[2 * E + e] * (double)count[3 * E + e];
    }
    free(count);
    o.top1 /= n, o.topk /= n * (double)k; // no tokens: NaN
    o.chance_top1 /= n * n, o.chance_topk /= n * n * (double)k;
    return o;
}

// ratio (E, E): tokens that choose i and j, over what is expected if experts had no preference for each other: a number
// in proportion to n_i n_j that has the same sum over all pairs [D]. NaN on the diagonal, and where none is expected.
EX_FUNC void relation_together(size_t T, size_t E, size_t k, const int32_t *index, uint64_t *count, double *expected,
                               double *ratio) {
    double seen = 0, product = 0;
    memset(count, 0, E * E * sizeof *count);
    if (moe_coselect(T, E, k, index, count)) die("co-selection");
    for (size_t i = 0; i < E; i++)
        for (size_t j = 0; j < i; j++) {
            seen += (double)count[i * E + j];
            product += (double)count[i * E + i] * (double)count[j * E + j];
        }
    for (size_t i = 0; i < E; i++)
        for (size_t j = 0; j < E; j++) {
            double e = product > 0 ? seen * (double)count[i * E + i] * (double)count[j * E + j] / product : 0;
            expected[i * E + j] = i == j ? NAN : e;
            ratio[i * E + j] = i != j && e > 0 ? (double)count[i * E + j] / e : NAN;
        }
}

// ---- mutual information ----

// In nats, of pairs (a, b): corrected by Miller and Madow's (cells - rows - columns + 1) / (2 n) [K], so that
// independent pairs give nearly 0 in the mean, now and then below it; share: of the entropy of b. lo, hi: 95%, by a
// bootstrap over batches, whose replicates are moved to have the estimate as their mean: a resampled sample has the
// bias of its own ties once more [D]. NaN without replicates.
typedef struct relation_information {
    size_t pairs;
    double nats, share, lo, hi;
} relation_information;

typedef struct relation_key {
    uint64_t key;
    size_t at;
} relation_key;
static int relation_by_key(const void *a, const void *b) {
    uint64_t x = ((const relation_key *)a)->key, y = ((const relation_key *)b)->key;
    return (x > y) - (x < y);
}

// id (n) = which of the different keys each one is, from 0; returns how many there are.
EX_FUNC size_t relation_number(size_t n, relation_key *key, uint32_t *id) {
    size_t ids = 0;
    qsort(key, n, sizeof *key, relation_by_key);
    for (size_t i = 0; i < n; i++) {
        ids += i == 0 || key[i].key != key[i - 1].key;
        id[key[i].at] = (uint32_t)(ids - 1);
    }
    return ids;
}

// Sum of c ln c over counts, and how many are not 0.
EX_FUNC double relation_sum(size_t n, const uint64_t *count, double *used) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        if (count[i]) ++*used;
        if (count[i] > 1) sum += (double)count[i] * log((double)count[i]);
    }
    return sum;
}

// id[3], ids[3]: of cells, rows and columns; weight (batches): how often each batch was drawn. count: all ids.
EX_FUNC double relation_nats(size_t n, uint32_t *const id[3], const size_t ids[3], const uint32_t *batch,
                             const uint32_t *weight, uint64_t *count, double *entropy) {
    double sum[3], used[3] = {0, 0, 0}, total = 0;
    uint64_t *of[3] = {count, count + ids[0], count + ids[0] + ids[1]};
    memset(count, 0, (ids[0] + ids[1] + ids[2]) * sizeof *count);
    for (size_t i = 0; i < n; i++) {
        total += weight[batch[i]];
        for (int k = 0; k < 3; k++) of[k][id[k][i]] += weight[batch[i]];
    }
    for (int k = 0; k < 3; k++) sum[k] = relation_sum(ids[k], of[k], &used[k]);
    *entropy = log(total) - sum[2] / total + (used[2] - 1) / (2 * total); // corrected in the same way
    double plain = log(total) + (sum[0] - sum[1] - sum[2]) / total;
    return plain - (used[0] - used[1] - used[2] + 1) / (2 * total);
}

// a (n, step_a), b (n, step_b): of each row the first; below 0 is no pair. batch (n) below batches.
EX_FUNC relation_information relation_inform(size_t n, const int32_t *a, size_t step_a, const int32_t *b, size_t step_b,
                                             const uint32_t *batch, size_t batches, size_t replicates, uint64_t seed) {
    relation_information r = {0, NAN, NAN, NAN, NAN};
    relation_key *key = allocate(n, sizeof *key);
    uint32_t *id[3], *where = allocate(n, sizeof *where), *weight = allocate(batches, sizeof *weight);
    uint64_t *value = allocate(3 * n, sizeof *value), *count = allocate(3 * n, sizeof *count);
    double *replicate = allocate(replicates, sizeof *replicate), entropy, ignored, mean = 0;
    size_t ids[3];
    for (size_t i = 0; i < n; i++) {
        int32_t x = a[i * step_a], y = b[i * step_b];
        if (x < 0 || y < 0) continue;
        size_t p = r.pairs++;
        value[p] = (uint64_t)x << 32 | (uint64_t)y, value[n + p] = (uint64_t)x, value[2 * n + p] = (uint64_t)y;
        where[p] = batch[i];
    }
    for (size_t k = 0; k < 3; k++) {
        id[k] = allocate(n, sizeof *id[k]);
        for (size_t p = 0; p < r.pairs; p++) key[p] = (relation_key){value[k * n + p], p};
        ids[k] = relation_number(r.pairs, key, id[k]);
    }
    for (size_t w = 0; w < batches; w++) weight[w] = 1;
    if (r.pairs) {
        r.nats = relation_nats(r.pairs, id, ids, where, weight, count, &entropy);
        r.share = entropy > 0 ? r.nats / entropy : NAN;
    }
    size_t done = 0;
    for (size_t k = 0; k < replicates && r.pairs && batches > 1; k++) {
        memset(weight, 0, batches * sizeof *weight);
        for (size_t w = 0; w < batches; w++)
            weight[(uint64_t)moe_rand_u32(seed, UINT64_C(0x6d69) << 32 | k, w) * batches >> 32]++;
        double nats = relation_nats(r.pairs, id, ids, where, weight, count, &ignored);
        if (isfinite(nats)) replicate[done++] = nats, mean += nats; // only batches without a pair were drawn
    }
    if (done) {
        for (size_t k = 0; k < done; k++) replicate[k] += r.nats - mean / (double)done;
        if (moe_interval(done, replicate, &r.lo, &r.hi)) die("interval");
    }
    for (size_t k = 0; k < 3; k++) free(id[k]);
    free(key), free(where), free(weight), free(value), free(count), free(replicate);
    return r;
}

// share (E, F): of the tokens whose first choice is row i in a, how many have first choice j in b; NaN rows: nobody.
EX_FUNC void relation_transitions(size_t n, size_t E, size_t k, const int32_t *a, size_t F, size_t m, const int32_t *b,
                                  double *share) {
    memset(share, 0, E * F * sizeof *share);
    for (size_t t = 0; t < n; t++)
        if (a[t * k] >= 0 && b[t * m] >= 0) share[(size_t)a[t * k] * F + (size_t)b[t * m]] += 1;
    for (size_t e = 0; e < E; e++) {
        double sum = 0;
        for (size_t f = 0; f < F; f++) sum += share[e * F + f];
        for (size_t f = 0; f < F; f++) share[e * F + f] = sum > 0 ? share[e * F + f] / sum : NAN;
    }
}

#endif
