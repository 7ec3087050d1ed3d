/* Scores, by the systems that have them; expected values in double, from the source's formula. */
#include "test.h"
#include "rows.h"

/* ---- by id, at random ---- */
static void test_hash(void) {
    enum { T = 64 };
    moe_layer *m = row("hash", "");
    if (!m) return;
    uint32_t id[T];
    float logits[T * E];
    int32_t expert[T];
    for (uint32_t i = 0; i < T; i++) id[i] = 800 + i;
    moe_layer_side(m)->id = id;
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    memcpy(logits, t->logits, sizeof logits), memcpy(expert, t->index, sizeof expert);
    CHECK(count_of(m, "router") == 0);
    for (size_t e = 0; e < E; e++) CHECK(t->routes.load[e] == T / E); /* consecutive ids are even */
    for (size_t i = 0; i < T; i++) CHECK(t->weight[i] == 1);
    tokens(T);
    t = go(m, T, 0);
    CHECK_SAME(t->logits, logits, T * E); /* x is not looked at */
    CHECK(!memcmp(t->index, expert, sizeof expert));
    for (uint32_t i = 0; i < T; i++) id[i] = 800 + (i * 37 + 5) % T;
    t = go(m, T, 1);
    for (size_t i = 0; i < T; i++) CHECK(t->index[i] == expert[id[i] - 800]); /* the id is, wherever it stands */
    moe_layer_side(m)->id = NULL;
    t = go(m, T, 0);
    for (size_t i = SEQ; i < T; i++) CHECK(t->index[i] == t->index[i - SEQ]); /* positions in the sequence */
    size_t same = 0;
    for (size_t i = 1; i < SEQ; i++) same += t->index[i] == t->index[0];
    CHECK(same == 0);
    moe_layer_free(m);
    moe_layer *other = row("hash", "seed=8"); /* another table */
    if (!other) return;
    for (uint32_t i = 0; i < T; i++) id[i] = 800 + i;
    moe_layer_side(other)->id = id;
    CHECK(memcmp(go(other, T, 0)->index, expert, sizeof expert) != 0);
    moe_layer_free(other);
}

static void test_random(void) {
    enum { T = 1024, ROUNDS = 4 };
    moe_layer *m = row("random", "");
    if (!m) return;
    tokens(T);
    double pair[E][E] = {{0}};
    int32_t before[T * 2] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        const moe_tape *t = go(m, T, 0);
        size_t same = 0;
        for (size_t i = 0; i < T; i++) {
            CHECK(t->index[i * 2] != t->index[i * 2 + 1]);
            pair[t->index[i * 2]][t->index[i * 2 + 1]]++;
            same += t->index[i * 2] == before[i * 2];
        }
        if (round) CHECK(same < T / E * 2); /* new ones: about one in E repeats */
        memcpy(before, t->index, sizeof before);
    }
    memcpy(before, go(m, T, 1)->index, sizeof before);
    CHECK(!memcmp(before, go(m, T, 1)->index, sizeof before)); /* evaluation can be repeated */
    double chi = 0, expected = (double)T * ROUNDS / (E * (E - 1));
    for (size_t a = 0; a < E; a++)
        for (size_t b = 0; b < E; b++)
            if (a != b) chi += (pair[a][b] - expected) * (pair[a][b] - expected) / expected;
    CHECK(chi < 55 + 4.5 * sqrt(2 * 55.0)); /* 56 - 1 degrees of freedom */
    moe_layer_free(m);
}

/* ---- scores on a sphere ---- */
static void test_spheres(void) {
    enum { T = 50 };
    static const char *const names[] = {"xmoe", "latent-prototype", "dynmoe"};
    for (size_t n = 0; n < 3; n++) {
        moe_layer *m = row(names[n], "");
        float old[T * E];
        if (!m) continue;
        tokens(T);
        const moe_tape *t = go(m, T, 1);
        memcpy(old, t->logits, sizeof old);
        CHECK(largest(old, NULL, T * E) <= 1 + 1e-6 && largest(old, NULL, T * E) > 0.5);
        for (size_t i = 0; i < T * D; i++) x[i] *= i / D % 2 ? 37 : 0.02f; /* of any length */
        t = go(m, T, 1);
        for (size_t i = 0; i < T * E; i++) CHECK_WITHIN(t->logits[i], old[i], 1e-6);
        float *R = get(m, "router"); /* each prototype of another length */
        for (size_t i = 0; i < count_of(m, "router"); i++) R[i] *= 0.1f + 3 * (float)(i % E);
        set(m, "router", R);
        t = go(m, T, 1);
        for (size_t i = 0; i < T * E; i++) CHECK_WITHIN(t->logits[i], old[i], 2e-6);
        if (n == 0) { /* the weight of the selected: sigmoid of the cosine over the temperature */
            for (size_t i = 0; i < T; i++)
                CHECK_NEAR(t->weight[i], sigmoid((double)t->logits[i * E + (size_t)t->index[i]] / (double)0.07f), 8e-7);
            CHECK(count_of(m, "router") == E / 2 * E); /* width E / 2 */
        }
        moe_layer_free(m);
    }
}

/* ---- SimBal: orthogonal at first, and pulled back ---- */
static double off_orthogonal(const moe_layer *m) { /* sum abs(R^T R - I) */
    float *R = get(m, "router");
    double sum = 0;
    for (size_t a = 0; a < E; a++)
        for (size_t b = 0; b < E; b++) {
            double dot = 0;
            for (size_t c = 0; c < D; c++) dot += (double)R[c * E + a] * (double)R[c * E + b];
            sum += fabs(dot - (a == b));
        }
    free(R);
    return sum;
}

static void test_simbal(void) {
    enum { T = 16 };
    moe_layer *m = row("simbal", "weight_decay=off");
    if (!m) return;
    CHECK(off_orthogonal(m) < 1e-5);
    float *R = get(m, "router");
    for (size_t i = 0; i < D * E; i++) R[i] += test_uniform(-0.2f, 0.2f);
    set(m, "router", R);
    double before = off_orthogonal(m), value[MOE_LOSS_COUNT];
    tokens(T);
    memset(dy, 0, T * D * sizeof *dy);
    go(m, T, 0);
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_layer_losses(m, value, NULL));
    CHECK_NEAR(value[MOE_LOSS_SIMBAL], before, 3e-7);
    CHECK_OK(moe_step(m, 0.003f));
    for (int i = 0; i < 150; i++) go(m, T, 0), back_and_step(m, 0.003f * (float)(150 - i) / 150);
    CHECK(before > 5 && off_orthogonal(m) < before / 10);
    moe_layer_free(m);
}

/* ---- ERMoE: bases stay orthonormal ---- */
/* The scores of an evaluation of x (n, d): the share of each token that lies in an expert's basis. */
static void check_subspace(moe_layer *m, size_t d, size_t n) {
    size_t f = moe_layer_desc(m)->d_ff, N = moe_layer_desc(m)->n_experts;
    const moe_tape *t = go(m, n, 1);
    float *V = get(m, "experts.w1");
    for (size_t i = 0; i < n * N; i++) {
        double in = 0, all = 0;
        for (size_t k = 0; k < f; k++) {
            double p = 0;
            for (size_t c = 0; c < d; c++) p += (double)x[i / N * d + c] * (double)V[(i % N * d + c) * f + k];
            in += p * p;
        }
        for (size_t c = 0; c < d; c++) all += (double)x[i / N * d + c] * (double)x[i / N * d + c];
        CHECK_WITHIN(t->logits[i], sqrt(in / all), 1e-6);
    }
    free(V);
}
static void test_ermoe(void) {
    enum { T = 16, N = 4 };
    moe_layer *m = row("ermoe", "n_experts=4");
    if (!m) return;
    float *first = get(m, "experts.w1");
    for (int step = 0; step < 1000; step++) {
        tokens(T);
        const moe_tape *t = go(m, T, 0);
        for (size_t i = 0; i < T * N; i++) CHECK(t->logits[i] >= 0 && t->logits[i] <= 1 + 1e-6f);
        back_and_step(m, 0.01f);
    }
    float *V = get(m, "experts.w1"), *W = get(m, "experts.w2");
    CHECK(largest(V, first, N * D * F) > 0.1); /* they did move */
    for (size_t e = 0; e < N; e++)
        for (size_t a = 0; a < F; a++)
            for (size_t b = 0; b < F; b++) {
                double vv = 0, ww = 0, wa = 0, wb = 0;
                for (size_t c = 0; c < D; c++) {
                    double u = (double)W[(e * F + a) * D + c], w = (double)W[(e * F + b) * D + c];
                    vv += (double)V[(e * D + c) * F + a] * (double)V[(e * D + c) * F + b];
                    ww += u * w, wa += u * u, wb += w * w;
                }
                CHECK_WITHIN(vv, a == b, 5e-7);
                if (a != b) CHECK_WITHIN(ww / sqrt(wa * wb), 0, 1e-7);
            }
    check_subspace(m, D, T);
    free(first), free(V), free(W);
    moe_layer_free(m);
    m = row("ermoe", "n_experts=4 d_model=40 d_ff=36"); /* panels of 32 and of 8, of 32 and of 4 */
    if (!m) return;
    test_fill(x, T * 40, -1, 1);
    check_subspace(m, 40, T);
    moe_layer_free(m);
}

/* ---- LocMoE ---- */
static void test_locmoe(void) {
    enum { T = 40, WIDE = D / E };
    moe_layer *m = row("locmoe", "");
    size_t floats = 1;
    if (!m) return;
    CHECK_OK(moe_router_count(moe_layer_desc(m), &floats));
    CHECK(floats == 0 && count_of(m, "router") == 0);
    tokens(T);
    for (size_t i = 0; i < T; i++) x[i * D + D - 1] = test_uniform(-1, 1);
    const moe_tape *t = go(m, T, 1);
    for (size_t i = 0; i < T; i++)
        for (size_t e = 0; e < E; e++) {
            /* of two numbers: one rounding, exactly this */
            float mean = (x[i * D + e * WIDE] + x[i * D + e * WIDE + 1]) / WIDE;
            CHECK_BITS(t->logits[i * E + e], mean > 0 ? mean : 0.0f);
        }
    CHECK(t->n_slots == 1);
    for (size_t i = 0; i < T; i++) CHECK(holds_best(t, i, t->logits + i * E, E, 1));
    float clean[T * E];
    memcpy(clean, t->logits, sizeof clean);
    t = go(m, T, 0); /* the noise goes inside the ReLU */
    double square = 0, n = 0;
    for (size_t i = 0; i < T * E; i++) {
        CHECK(t->logits[i] >= 0);
        if (clean[i] > 0.06f) square += pow((double)t->logits[i] - (double)clean[i], 2), n++;
    }
    CHECK(n > 50 && fabs(square / n / 1e-4 - 1) < 4.5 * sqrt(2 / n));
    moe_layer_free(m);
    m = row("locmoe", "d_model=40");
    if (!m) return;
    test_fill(x, T * 40, -1, 1);
    t = go(m, T, 1);
    for (size_t i = 0; i < T; i++)
        for (size_t e = 0; e < E; e++) {
            double mean = 0;
            for (size_t c = 0; c < 5; c++) mean += (double)x[i * 40 + e * 5 + c] / 5;
            CHECK_WITHIN(t->logits[i * E + e], fmax(mean, 0), 1e-7);
        }
    moe_layer_free(m);
}

int main(void) {
    RUN(test_hash);
    RUN(test_random);
    RUN(test_spheres);
    RUN(test_simbal);
    RUN(test_ermoe);
    RUN(test_locmoe);
    return test_end();
}
