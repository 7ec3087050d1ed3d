/* Softmax and its backward against double; the gates of systems that have another. */
#include "test.h"
#include "oracle.h"

/* ---- softmax ---- */
static void softmax_case(size_t rows, size_t cols, float temperature, float spread) {
    float *z = test_floats(rows * cols), *p = test_floats(rows * cols), *first = test_floats(rows * cols);
    double *exact = test_doubles(cols), *zd = test_doubles(cols);
    int begun = 0;
    test_fill(z, rows * cols, -spread, spread);
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_softmax(rows, cols, temperature, z, p));
        if (!begun) memcpy(first, p, rows * cols * sizeof *p);
        CHECK_SAME(p, first, rows * cols);
        begun = 1;
    }
    for (size_t r = 0; r < rows; r++) {
        double sum = 0;
        for (size_t c = 0; c < cols; c++) zd[c] = z[r * cols + c];
        oracle_softmax(cols, zd, (double)temperature, exact);
        double top = -INFINITY;
        for (size_t c = 0; c < cols; c++) top = fmax(top, zd[c]);
        /* the argument of exp is rounded up to three times, an error as large as itself of the result, which
         * has a few roundings of its own; below -86.5 exp is 0 */
        for (size_t c = 0; c < cols; c++) {
            double limit = (8 + 3 * (top - zd[c]) / (double)temperature) * 0x1p-24 * exact[c] + exp(-86.5);
            CHECK_WITHIN(p[r * cols + c], exact[c], limit);
            sum += (double)p[r * cols + c];
        }
        if (cols) CHECK_WITHIN(sum, 1, 1e-6);
    }
    memcpy(p, z, rows * cols * sizeof *p); /* in place */
    CHECK_OK(moe_softmax(rows, cols, temperature, p, p));
    CHECK_SAME(p, first, rows * cols);
    free(z), free(p), free(first), free(exact), free(zd);
}

static void test_softmax(void) {
    static const size_t cols[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 255, 300};
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) {
        softmax_case(3, cols[i], 1, 3);
        softmax_case(2, cols[i], 0.25f, 10);
        softmax_case(2, cols[i], 5, 40);
        softmax_case(1, cols[i], 0.1f, 60);
    }
    softmax_case(0, 5, 1, 1);
    float z[3] = {3e38f, -3e38f, 0}, p[3];
    CHECK_OK(moe_softmax(1, 3, 1, z, p)); /* no overflow on the way */
    CHECK(p[0] == 1 && p[1] == 0 && p[2] == 0);
    for (int i = 0; i < 3; i++) z[i] = -1e30f;
    CHECK_OK(moe_softmax(1, 3, 1, z, p));
    CHECK_WITHIN(p[0], 1 / 3.0, 1e-7);
    z[1] = NAN;
    CHECK_STATUS(moe_softmax(1, 3, 1, z, p), MOE_E_NAN_LOGITS);
}

static void test_softmax_backward(void) {
    enum { R = 3, C = 21 };
    const double tau = 0.75, h = 1e-5;
    float z[R * C], p[R * C], dp[R * C], dz[R * C], before[R * C];
    test_fill(z, R * C, -2, 2);
    test_fill(dp, R * C, -1, 1);
    test_fill(before, R * C, -1, 1);
    CHECK_OK(moe_softmax(R, C, (float)tau, z, p));
    FOR_EACH_ISA(isa) {
        memcpy(dz, before, sizeof dz);
        CHECK_OK(moe_softmax_backward(R, C, (float)tau, p, dp, dz));
        for (size_t r = 0; r < R; r++)
            for (size_t c = 0; c < C; c++) {
                double slope = 0, zd[C], pd[C];
                for (int side = -1; side <= 1; side += 2) {
                    for (size_t i = 0; i < C; i++) zd[i] = (double)z[r * C + i] + (i == c ? side * h : 0);
                    oracle_softmax(C, zd, tau, pd);
                    for (size_t i = 0; i < C; i++) slope += side * pd[i] * (double)dp[r * C + i] / (2 * h);
                }
                CHECK_WITHIN(dz[r * C + c] - before[r * C + c], slope, 2e-7);
            }
    }
}

/* ---- systems ---- */
#include "rows.h"

/* ---- scores that underflow ---- */
/* One token of the number 1 through a linear router, so that its row is the logits; bias makes the selection 0, 1 (and
 * what `more` adds). Weights and gradient against the softmax of the chosen, which is what they are there. */
static void tiny_case(const char *more, const float *logits, const float *bias, double inv_t, double tolerance) {
    enum { N = 4, K = 2 };
    moe_desc d;
    moe_tape *t = NULL;
    float one = 1, d_weight[K] = {0.75f, -0.5f}, d_router[N + 1] = {0};
    float router[N + 1] = {logits[0], logits[1], logits[2], logits[3], 0};
    memset(&d, 0, sizeof d);
    d.d_model = 1, d.n_experts = N, d.top_k = K, d.normalize = MOE_ON;
    CHECK_OK(moe_desc_parse(&d, more, NULL));
    if (!CHECK_OK(moe_tape_new(&t, &d, 1, MOE_ON))) return;
    t->side.bias = bias;
    CHECK_OK(moe_route(t, router, &one, 1));
    CHECK(t->index[0] + t->index[1] == 1); /* 0 and 1, in some order */
    double w0 = 1 / (1 + exp(((double)logits[1] - (double)logits[0]) * inv_t)), want[K] = {w0, 1 - w0};
    double g[K] = {0}, mean = 0;
    for (size_t i = 0; i < K; i++) {
        size_t e = (size_t)t->index[i], route = t->routes.slot[i];
        CHECK_WITHIN(t->weight[i], want[e], tolerance);
        g[e] = (double)d_weight[route];
        mean += want[e] * g[e];
    }
    CHECK_OK(moe_route_backward(t, router, d_weight, d_router, NULL));
    for (size_t e = 0; e < N; e++) {
        double slope = e < K ? inv_t * want[e] * (g[e] - mean) : 0;
        CHECK_WITHIN(d_router[e], slope, tolerance * inv_t);
    }
    moe_tape_free(t);
}
static void test_tiny_scores(void) {
    static const float force[4] = {9, 9, 0, 0};
    static const float far[4] = {-100, -101, -300, -300}, near[4] = {-86, -87, -200, -200}, under[4] = {-87, -89, 0, 3};
    static const float equal[4] = {-150, -150, 5, 0}, apart[4] = {-100, -250, -90, 0}, cold[4] = {-2, -1.875f, 0, 0};
    tiny_case("gate=sigmoid", far, force, 1, 1e-6);  /* 0.7311, 0.2689 */
    tiny_case("gate=sigmoid", near, force, 1, 1e-6); /* only one of them underflows */
    tiny_case("gate=sigmoid", equal, force, 1, 1e-6);
    tiny_case("gate=sigmoid", apart, force, 1, 1e-6);
    tiny_case("gate=sigmoid temperature=0.0078125", cold, force, 128, 1e-6);
    tiny_case("gate=softmax", under, force, 1, 1e-6); /* 90 below the highest */
    tiny_case("gate=softmax", equal, force, 1, 1e-6);
    tiny_case("gate=softmax temperature=0.0078125", cold, force, 128, 1e-6);
    tiny_case("gate=softmax learn_temperature=true", under, force, 1, 1e-6);
    /* the first of the chosen is a zero expert's or not: only experts have shares */
    moe_tape *t = NULL;
    moe_desc d;
    float one = 1, router[4] = {-100, -101, -300, -50};
    static const float last[4] = {9, 0, 0, 9};
    memset(&d, 0, sizeof d);
    CHECK_OK(moe_desc_parse(&d, "d_model=1 n_experts=4 top_k=2 n_zero=1 gate=sigmoid normalize=true", NULL));
    if (!CHECK_OK(moe_tape_new(&t, &d, 1, MOE_ON))) return;
    t->side.bias = last;
    CHECK_OK(moe_route(t, router, &one, 1));
    for (int i = 0; i < 2; i++) CHECK(t->weight[i] == (t->index[i] == 0 ? 1.0f : 0.0f));
    moe_tape_free(t);
}
/* loss.sequence is of shares: a common shift of the logits changes nothing */
static void test_tiny_shares(void) {
    enum { N = 4, TOKENS = 3 };
    static const float shift[] = {0, -20, -40, -69, -75, -86, -95, -300};
    static const float z[N] = {1, 0.25f, -0.5f, -2};
    for (size_t i = 0; i < sizeof shift / sizeof *shift; i++) {
        moe_desc d;
        moe_tape *t = NULL;
        float tokens_[TOKENS] = {1, 1, 1}, router[N], d_router[N] = {0};
        double sum = 0, q[N], c[N] = {2, 2, 0, 0}, along = 0; /* E load / all loads */
        for (size_t e = 0; e < N; e++) router[e] = z[e] + shift[i];
        memset(&d, 0, sizeof d);
        CHECK_OK(moe_desc_parse(&d, "d_model=1 n_experts=4 top_k=2 gate=sigmoid loss.sequence=1", NULL));
        if (!CHECK_OK(moe_tape_new(&t, &d, TOKENS, MOE_ON))) return;
        CHECK_OK(moe_route(t, router, tokens_, TOKENS));
        CHECK_OK(moe_route_backward(t, router, NULL, d_router, NULL));
        for (size_t e = 0; e < N; e++) sum += q[e] = 1 / (1 + exp(-(double)router[e]));
        for (size_t e = 0; e < N; e++) along += c[e] * q[e] / sum;
        if (shift[i] <= -40) { /* there the shares no longer depend on the shift, in double either */
            sum = along = 0;
            for (size_t e = 0; e < N; e++) sum += q[e] = exp((double)z[e]);
            for (size_t e = 0; e < N; e++) along += c[e] * q[e] / sum;
        }
        CHECK_NEAR(t->loss[MOE_LOSS_SEQUENCE], along, 6e-7);
        for (size_t e = 0; e < N; e++) { /* d log s / dz = 1 - s */
            double s = shift[i] <= -40 ? 0 : q[e];
            CHECK_WITHIN(d_router[e], (c[e] - along) * q[e] / sum * (1 - s), 6e-7);
        }
        moe_tape_free(t);
    }
}

static void test_remoe(void) {
    enum { T = 64 };
    moe_layer *m = row("remoe", "");
    if (!m) return;
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    size_t active = 0, per[E + 1] = {0};
    for (size_t i = 0; i < T; i++) {
        double want[D] = {0};
        float out[D];
        size_t n = 0;
        for (size_t e = 0; e < E; e++) {
            double s = linear(m, i, e);
            float w = 0;
            int chosen = 0;
            for (size_t k = 0; k < E; k++)
                if (t->index[i * E + k] == (int32_t)e) chosen = 1, w = t->weight[i * E + k];
            if (fabs(s) > 1e-5) CHECK(chosen == (s > 0)); /* selected means above 0, */
            CHECK_WITHIN(w, fmax(s, 0), 1e-6);            /* and the weight is the ReLU */
            if (!chosen) continue;
            active++, n++;
            network(m, e, NULL, x + i * D, 1, out);
            for (size_t c = 0; c < D; c++) want[c] += (double)w * (double)out[c];
        }
        per[n]++;
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c], 1e-7);
    }
    CHECK(per[2] && per[3] && per[4] && per[5]); /* their number varies */
    /* lambda: up by the factor while too few are zero, down while too many are */
    CHECK(1 - (double)active / (T * E) < 1 - 2.0 / E);
    CHECK_NEAR(moe_layer_control(m)->coefficient[0] / 1e-8f, 1, 1e-7);
    back_and_step(m, 0);
    CHECK_NEAR(moe_layer_control(m)->coefficient[0] / 1.2e-8f, 1, 1e-7);
    float *R = get(m, "router");
    for (size_t i = 0; i < D * E; i++) R[i] = i < (D - 1) * E ? 0 : -1;
    R[(D - 1) * E] = 0; /* a logit of 0 is no choice either */
    set(m, "router", R);
    t = go(m, T, 0);
    CHECK(t->routes.n_routes == 0 && largest(y, NULL, T * D) == 0);
    go(m, T, 1);
    CHECK(largest(y, NULL, T * D) == 0); /* and none is taken instead */
    go(m, T, 0);
    back_and_step(m, 0);
    CHECK_NEAR(moe_layer_control(m)->coefficient[0] / 1e-8f, 1, 1e-7);
    moe_layer_free(m);
}

static void test_dynmoe(void) {
    enum { T = 128 };
    moe_layer *m = row("dynmoe", "");
    if (!m) return;
    tokens(T);
    for (size_t t = 0; t < T; t++) x[t * D + D - 1] = test_uniform(-1, 1);
    const moe_tape *t = go(m, T, 0);
    size_t sizes[E + 1] = {0};
    for (size_t i = 0; i < T; i++) {
        size_t n = 0, above = 0;
        for (size_t e = 0; e < E; e++) above += t->logits[i * E + e] > 0; /* thresholds begin at 0 */
        while (n < E && t->index[i * E + n] >= 0) n++;
        CHECK(n == above);
        sizes[n]++;
        for (size_t k = 0; k < n; k++) {
            CHECK(t->logits[i * E + (size_t)t->index[i * E + k]] > 0);
            CHECK_NEAR(t->weight[i * E + k], 1.0 / (double)n, 2e-7); /* the mean over the active */
        }
    }
    size_t kinds = 0;
    for (size_t n = 0; n <= E; n++) kinds += sizes[n] > 0;
    CHECK(kinds >= 3);
    float *G = get(m, "router.threshold");
    CHECK(t->routes.load[2] > 0);
    G[2] = 1.5f; /* above every cosine */
    set(m, "router.threshold", G);
    t = go(m, T, 0);
    CHECK(t->routes.load[2] == 0);
    for (size_t e = 0; e < E; e++) CHECK(e == 2 || t->routes.load[e] > 0);
    G = get(m, "router.threshold");
    for (size_t e = 0; e < E; e++) G[e] = 1.5f;
    set(m, "router.threshold", G);
    t = go(m, T, 0);
    CHECK(t->routes.n_routes == 0 && largest(y, NULL, T * D) == 0); /* none: in training */
    t = go(m, T, 1);
    CHECK(t->routes.n_routes == T); /* in evaluation the highest */
    for (size_t i = 0; i < T; i++) {
        CHECK(holds_best(t, i, t->logits + i * E, E, 1));
        CHECK(t->weight[i * E] == 1);
    }
    /* thresholds that differ and that nobody reaches: still the highest cosine, for many not the one least below */
    size_t otherwise = 0;
    G = get(m, "router.threshold");
    for (size_t e = 0; e < E; e++) G[e] = 1.1f + 0.4f * (float)e;
    set(m, "router.threshold", G);
    t = go(m, T, 1);
    CHECK(t->routes.n_routes == T);
    for (size_t i = 0; i < T; i++) {
        const float *z = t->logits + i * E;
        size_t best = (size_t)t->index[i * E], least = 0;
        for (size_t e = 1; e < E; e++)
            if (z[e] - 0.4f * (float)e > z[least] - 0.4f * (float)least) least = e;
        CHECK(holds_best(t, i, z, E, 1));
        otherwise += least != best;
    }
    CHECK(otherwise > T / 4);
    moe_layer_free(m);
}

int main(void) {
    RUN(test_softmax);
    RUN(test_softmax_backward);
    RUN(test_tiny_scores);
    RUN(test_tiny_shares);
    RUN(test_remoe);
    RUN(test_dynmoe);
    return test_end();
}
