/* Experts: one network alone, shared ones, zero, copy and constant ones. */
#include "test.h"
#include "inside.h"
#include "rows.h"

static float z[MAX_TOKENS * D]; /* outputs to compare with */

/* ---- one plain network ---- */
static void test_dense(void) {
    moe_layer *m = row("dense", "");
    if (!m) return;
    tokens(9);
    go(m, 9, 0);
    float *w1 = get(m, "experts.w1"), *wu = get(m, "experts.wu"), *w2 = get(m, "experts.w2");
    for (size_t t = 0; t < 9; t++) {
        double out[D] = {0};
        for (size_t f = 0; f < F; f++) {
            double a = 0, u = 0;
            for (size_t i = 0; i < D; i++)
                a += (double)x[t * D + i] * (double)w1[i * F + f], u += (double)x[t * D + i] * (double)wu[i * F + f];
            for (size_t i = 0; i < D; i++) out[i] += a * sigmoid(a) * u * (double)w2[f * D + i];
        }
        for (size_t i = 0; i < D; i++) CHECK_WITHIN(y[t * D + i], out[i], 1e-7);
    }
    free(w1), free(wu), free(w2);
    moe_layer_free(m);
}

/* ---- DeepSeek ---- */
static void test_deepseek_moe(void) {
    enum { T = 24 };
    moe_layer *m = row("deepseek-moe", "");
    if (!m) return;
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    network(m, E, NULL, x, T, z); /* the shared expert stands last */
    float full[T * D], out[D];
    memcpy(full, y, sizeof full);
    for (size_t i = 0; i < T; i++) { /* y = shared + sum p f, p not renormalised */
        double want[D];
        for (size_t c = 0; c < D; c++) want[c] = (double)z[i * D + c];
        for (size_t k = 0; k < 2; k++) {
            size_t e = (size_t)t->index[i * 2 + k];
            network(m, e, NULL, x + i * D, 1, out);
            for (size_t c = 0; c < D; c++) want[c] += (double)t->prob[i * E + e] * (double)out[c];
        }
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c], 1e-7);
    }
    float *w2 = get(m, "experts.w2");
    memset(w2, 0, E * F * D * sizeof *w2); /* of the routed experts */
    set(m, "experts.w2", w2);
    for (size_t e = 0; e < E; e += 3) { /* whatever the router, what is left is the shared expert */
        lean(m, e, 20);
        go(m, T, 0);
        for (size_t i = 0; i < T * D; i++) CHECK_WITHIN(y[i], z[i], 1e-7);
    }
    moe_layer_free(m);
}

/* ---- MoE++: zero, copy, constant ---- */
static void only(moe_layer *m, size_t a, size_t b) { /* every token of tokens() takes a, then b */
    float *R = get(m, "router");
    memset(R, 0, D * E * sizeof *R);
    R[(D - 1) * E + a] = 3, R[(D - 1) * E + b] = 2.5f;
    set(m, "router", R);
}

static void test_moepp(void) {
    enum { T = 20, ZERO = 4, COPY = 5, CONSTANT = 6 };
    moe_layer *m = row("moe++", "score=linear input_scale=1"); /* its own router and scale: authors.c */
    if (!m) return;
    tokens(T);
    only(m, ZERO, 1);
    const moe_tape *t = go(m, T, 0);
    CHECK(inside_of(t).network_rows == T); /* the networks' work: expert 1 alone, though each token has two routes */
    CHECK(kept(t, ZERO) == T && kept(t, 1) == T);
    network(m, 1, NULL, x, T, z);
    for (size_t i = 0; i < T; i++) CHECK(t->weight[i * 2] == 0 && t->weight[i * 2 + 1] == 1 && t->index[i * 2] == ZERO);
    for (size_t i = 0; i < T * D; i++) CHECK_WITHIN(y[i], z[i], 1e-7);
    only(m, COPY, ZERO);
    t = go(m, T, 0);
    CHECK_SAME(y, x, T * D);
    CHECK(inside_of(t).network_rows == 0);
    float *gate = get(m, "experts.constant_gate");
    test_fill(gate, count_of(m, "experts.constant_gate"), -1, 1);
    set(m, "experts.constant_gate", gate);
    gate = get(m, "experts.constant_gate");
    float *v = get(m, "experts.constant");
    for (size_t n = 0; n < 2; n++) { /* a x + (1 - a) v, a by the softmax of two products */
        only(m, CONSTANT + n, ZERO);
        go(m, T, 0);
        double low = 1, high = 0;
        for (size_t i = 0; i < T; i++) {
            double s[2] = {0};
            for (size_t k = 0; k < 2; k++)
                for (size_t c = 0; c < D; c++) s[k] += (double)x[i * D + c] * (double)gate[(n * 2 + k) * D + c];
            double a = sigmoid(s[0] - s[1]);
            low = fmin(low, a), high = fmax(high, a);
            for (size_t c = 0; c < D; c++)
                CHECK_WITHIN(y[i * D + c], a * (double)x[i * D + c] + (1 - a) * (double)v[n * D + c], 1e-6);
        }
        CHECK(low < 0.4 && high > 0.6);
    }
    /* by a routing of one's own a zero expert may have a weight: half of 0 and half of x */
    moe_tape *own = NULL;
    float half[T * 2];
    int32_t both[T * 2];
    for (size_t i = 0; i < T * 2; i++) half[i] = 0.5f, both[i] = i % 2 ? COPY : ZERO;
    CHECK_OK(moe_tape_new(&own, moe_layer_desc(m), T, MOE_ON));
    CHECK_OK(moe_tape_tokens(own, x, T));
    CHECK_OK(moe_routes_fill(&own->routes, T, both, half, 0, MOE_ORDER_DEFAULT));
    CHECK_OK(moe_layer_experts(m, own, y));
    for (size_t i = 0; i < T * D; i++) CHECK(y[i] == 0.5f * x[i]);
    moe_tape_free(own);
    /* logits += previous A */
    float *A = get(m, "router.residual"), previous[T * E], old[T * E];
    memcpy(old, moe_layer_tape(m)->logits, sizeof old);
    test_fill(previous, T * E, -1, 1);
    moe_layer_side(m)->previous = previous;
    t = go(m, T, 0);
    for (size_t i = 0; i < T; i++)
        for (size_t e = 0; e < E; e++) {
            double sum = (double)old[i * E + e];
            for (size_t k = 0; k < E; k++) sum += (double)previous[i * E + k] * (double)A[k * E + e];
            CHECK_WITHIN(t->logits[i * E + e], sum, 2e-6);
        }
    free(gate), free(v), free(A);
    moe_layer_free(m);
}

int main(void) {
    RUN(test_dense);
    RUN(test_deepseek_moe);
    RUN(test_moepp);
    return test_end();
}
