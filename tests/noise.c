/* Noise and jitter: the systems that explore by it. */
#include "test.h"
#include "rows.h"

/* ---- noisy top-k ---- */
static void test_noisy_topk(void) {
    enum { T = 512, ROUNDS = 8 };
    moe_layer *m = row("noisy-topk", "");
    if (!m) return;
    tokens(T);
    float *R = get(m, "router");
    CHECK(largest(R, NULL, D * E) == 0); /* starts at 0 */
    test_fill(R, D * E, -0.3f, 0.3f);
    set(m, "router", R);
    float *W = get(m, "router.noise");
    CHECK(largest(W, NULL, D * E) == 0);
    test_fill(W, D * E, -1, 1);
    set(m, "router.noise", W);
    W = get(m, "router.noise");
    double moment[5] = {0}, n = 0;
    const moe_tape *t = go(m, T, 1);
    for (size_t i = 0; i < T; i++)
        /* none in evaluation */
        for (size_t e = 0; e < E; e++) CHECK_WITHIN(t->logits[i * E + e], linear(m, i, e), 1e-6);
    for (int round = 0; round < ROUNDS; round++) {
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i++)
            for (size_t e = 0; e < E; e++, n++) {
                double raw = 0;
                for (size_t c = 0; c < D; c++) raw += (double)x[i * D + c] * (double)W[c * E + e];
                double g = ((double)t->logits[i * E + e] - (double)t->clean[i * E + e]) /
                    (log(1 + exp(raw)) + 0.01);
                for (int k = 1; k < 5; k++) moment[k] += pow(g, k);
            }
    }
    CHECK(fabs(moment[1] / n) < 4.5 / sqrt(n));             /* of N(0, 1): 0, 1, 0, 3, */
    CHECK(fabs(moment[2] / n - 1) < 4.5 * sqrt(2 / n));     /* whose means over n have these variances */
    CHECK(fabs(moment[3] / n) < 4.5 * sqrt(15 / n));
    CHECK(fabs(moment[4] / n - 3) < 4.5 * sqrt(96 / n));
    /* the choice is by the noisy logits */
    for (size_t i = 0; i < T; i++) CHECK(holds_best(t, i, t->logits + i * E, E, 2));
    free(W);
    moe_layer_free(m);
}

/* ---- a sequence goes one way ---- */
static void test_mot(void) {
    enum { T = 64 + 2 }; /* the last sequence is shorter */
    moe_layer *m = row("mot", "");
    if (!m) return;
    tokens(T);
    for (int evaluate = 0; evaluate < 2; evaluate++) {
        const moe_tape *t = go(m, T, evaluate);
        uint64_t most = 0;
        for (size_t i = 0; i < T; i++) {
            size_t begin = i / SEQ * SEQ, end = begin + SEQ < T ? begin + SEQ : T;
            CHECK(t->n_slots == 1 && t->index[i] == t->index[begin]);
            for (size_t e = 0; e < E; e++) { /* logits of the sequence's mean; in training uniform noise in [0, 0.1) */
                double mean = 0;
                for (size_t k = begin; k < end; k++) mean += linear(m, k, e) / (double)(end - begin);
                double noise = (double)t->logits[i * E + e] - mean;
                CHECK(noise > -1e-6 && noise < (evaluate ? 1e-6 : 0.1 + 1e-6));
            }
        }
        for (size_t e = 0; e < E; e++) most = t->routes.load[e] > most ? t->routes.load[e] : most;
        CHECK(most < T); /* but not all sequences the same */
    }
    moe_layer_free(m);
}

int main(void) {
    RUN(test_noisy_topk);
    RUN(test_mot);
    return test_end();
}
