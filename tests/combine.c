/* Robust weights and aggregates against naive forms; soft slots, merged experts, the robust layer. */
#include "test.h"
#include "inside.h"

/* ---- robust weights ---- */
static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_of(double *v, size_t n) {
    qsort(v, n, sizeof *v, compare_doubles);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

static void naive_robust(size_t k, size_t d, const float *const *u, const float *g, double tau, double *reliability,
                         double *out) {
    double *v = test_doubles(k), *far = test_doubles(k), sum = 0;
    for (size_t c = 0; c < d; c++) {
        for (size_t e = 0; e < k; e++) v[e] = (double)u[e][c];
        double med = median_of(v, k);
        for (size_t e = 0; e < k; e++) far[e] += ((double)u[e][c] - med) * ((double)u[e][c] - med);
    }
    for (size_t e = 0; e < k; e++) v[e] = far[e] = sqrt(far[e]);
    double mad = median_of(v, k);
    for (size_t e = 0; e < k; e++) {
        reliability[e] = mad > 0 ? exp(-far[e] / (tau * mad)) : far[e] > 0 ? 0 : 1;
        sum += out[e] = (double)g[e] * reliability[e];
    }
    for (size_t e = 0; e < k; e++) out[e] /= sum;
    free(v), free(far);
}

static void test_robust_weights(void) {
    for (int i = 0; i < 60; i++) {
        enum { MAX = 12 };
        size_t k = 1 + test_below(MAX), d = 1 + test_below(70), bytes = 0;
        float *u = test_floats(k * d), g[MAX], r[MAX], out[MAX], other[MAX], tau = test_uniform(0.5f, 3);
        const float *row[MAX];
        double want[MAX], want_out[MAX];
        test_fill(u, k * d, -1, 1);
        for (size_t e = 0; e < k; e++) row[e] = u + e * d, g[e] = test_uniform(0.1f, 1);
        CHECK_OK(moe_robust_weights_scratch(k, d, &bytes));
        void *scratch = test_memory(bytes, 1);
        naive_robust(k, d, row, g, (double)tau, want, want_out);
        CHECK_OK(moe_robust_weights(k, d, row, g, tau, r, out, NULL, 0));
        for (size_t e = 0; e < k && k > 2; e++) { /* with one or two all distances are equal but for rounding */
            CHECK_NEAR(r[e], want[e], 5e-6);
            CHECK_NEAR(out[e], want_out[e], 5e-6);
        }
        FOR_EACH_ISA(isa) {
            CHECK_OK(moe_robust_weights(k, d, row, g, tau, r, other, scratch, bytes));
            CHECK_SAME(other, out, k);
        }
        CHECK_STATUS(moe_robust_weights(k, d, row, g, tau, r, out, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
        free(u), free(scratch);
    }
}

/* n of K outputs are the truth and a little noise, the others far away. How far the weighted sum ends
 * from the truth. */
static double damage(size_t corrupted, int robust, float lie) {
    enum { K = 10, D = 32 };
    float u[K * D], truth[D], g[K], r[K], out[K];
    const float *row[K];
    double far = 0;
    test_fill(truth, D, -1, 1);
    for (size_t e = 0; e < K; e++) {
        row[e] = u + e * D;
        g[e] = 1.0f / K;
        for (size_t c = 0; c < D; c++) u[e * D + c] = e < corrupted ? lie : truth[c] + test_uniform(-0.05f, 0.05f);
    }
    CHECK_OK(moe_robust_weights(K, D, row, g, 1, r, out, NULL, 0));
    for (size_t c = 0; c < D; c++) {
        double sum = 0;
        for (size_t e = 0; e < K; e++)
            if (!robust || out[e] > 0) sum += (double)(robust ? out[e] : g[e]) * (double)u[e * D + c];
        far += (sum - (double)truth[c]) * (sum - (double)truth[c]);
    }
    return sqrt(far / D);
}

static void test_robust_breakdown(void) {
    CHECK(damage(0, 1, 0) < 0.05);        /* clean: no worse */
    CHECK(damage(4, 0, 100) > 30);        /* 40% corrupted: the plain sum is lost, */
    CHECK(damage(4, 1, 100) < 0.05);      /* the robust one is not, */
    CHECK(damage(4, 1, NAN) < 0.05);      /* nor by what is not a number, */
    CHECK(damage(9, 1, -INFINITY) < 0.06);/* which is seen as such and has no vote; */
    CHECK(damage(6, 1, 100) > 30);        /* at 60% the liars are the majority. */
    CHECK(damage(5, 1, 100) > 1);         /* at 50% the median is half a lie. */
    float a[2] = {1, 2}, b[2] = {1, 2}, c[2] = {5, 5}, bad[2] = {NAN, 0}, g[3] = {0.2f, 0.2f, 0.6f}, r[3], out[3];
    const float *row[3] = {a, b, c}, *none[3] = {bad, bad, bad}, *missing[3] = {a, NULL, c};
    CHECK_OK(moe_robust_weights(3, 2, row, g, 1, r, out, NULL, 0)); /* the median distance is 0 */
    CHECK(r[0] == 1 && r[1] == 1 && r[2] == 0 && out[0] == 0.5f && out[1] == 0.5f && out[2] == 0);
    CHECK_OK(moe_robust_weights(3, 2, none, g, 1, r, out, NULL, 0));
    for (int e = 0; e < 3; e++) CHECK(r[e] == 0 && out[e] == 0);
    CHECK_OK(moe_robust_weights(1, 2, row, g, 1, r, out, NULL, 0));
    CHECK(r[0] == 1 && out[0] == 1);
    CHECK_OK(moe_robust_weights(3, 2, row, g, 1e-38f, r, out, NULL, 0));
    c[0] = 3e38f, c[1] = -3e38f; /* the distance overflows: far, not an error */
    CHECK_OK(moe_robust_weights(3, 2, row, g, 1, r, out, NULL, 0));
    CHECK(out[0] == 0.5f && out[2] == 0);
    const float *middle[3] = {a, bad, b}, below[3] = {-1, 5, -3}, against[2] = {1, -1}, shares[2] = {0.25f, 0.75f};
    CHECK_OK(moe_robust_weights(3, 2, middle, below, 1, r, out, NULL, 0)); /* shares of what has a vote */
    CHECK(r[0] == 1 && r[1] == 0 && out[0] == 0.25f && out[1] == 0 && out[2] == 0.75f);
    CHECK_OK(moe_robust_weights(2, 2, row, against, 1, r, out, NULL, 0));
    CHECK(out[0] == 0 && out[1] == 0); /* of nothing there are none */
    CHECK_OK(moe_robust_weights(2, 0, (const float *const[]){NULL, NULL}, shares, 1, r, out, NULL, 0));
    CHECK(out[0] == 0.25f && out[1] == 0.75f); /* outputs without numbers agree */
    CHECK_STATUS(moe_robust_weights(0, 2, row, g, 1, r, out, NULL, 0), MOE_E_NO_OUTPUTS);
    CHECK_STATUS(moe_robust_weights(3, 2, NULL, g, 1, r, out, NULL, 0), MOE_E_NULL_OUTPUTS);
    CHECK_STATUS(moe_robust_weights(3, 2, missing, g, 1, r, out, NULL, 0), MOE_E_NULL_OUTPUTS);
    CHECK_STATUS(moe_robust_weights(3, 2, row, NULL, 1, r, out, NULL, 0), MOE_E_NULL_WEIGHT);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 0, r, out, NULL, 0), MOE_E_TAU);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, NAN, r, out, NULL, 0), MOE_E_TAU);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, INFINITY, r, out, NULL, 0), MOE_E_TAU);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 1, NULL, out, NULL, 0), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 1, r, NULL, NULL, 0), MOE_E_NULL_OUT);
    g[1] = NAN;
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 1, r, out, NULL, 0), MOE_E_NAN_WEIGHT);
}

/* ---- aggregates ---- */
static double distances(size_t n, size_t d, const float *x, const double *y) {
    double total = 0;
    for (size_t r = 0; r < n; r++) {
        double sum = 0;
        for (size_t c = 0; c < d; c++) sum += ((double)x[r * d + c] - y[c]) * ((double)x[r * d + c] - y[c]);
        total += sqrt(sum);
    }
    return total;
}

static void aggregate_case(size_t n, size_t d, float trim, size_t cut) { /* so many at each end */
    size_t bytes = 0;
    float *x = test_floats(n * d), *out = test_floats(d), *other = test_floats(d);
    double *v = test_doubles(n), *y = test_doubles(d);
    test_fill(x, n * d, -1, 1);
    CHECK_OK(moe_aggregate_scratch(n, d, &bytes));
    void *scratch = test_memory(bytes, 1);
    for (int kind = 0; kind < MOE_AGGREGATE_COUNT; kind++) {
        CHECK_OK(moe_aggregate((moe_aggregate_kind)kind, n, d, x, trim, out, NULL, 0));
        for (size_t c = 0; c < d && kind < MOE_AGGREGATE_GEOMETRIC; c++) {
            double want = 0;
            size_t from = kind == MOE_AGGREGATE_TRIMMED ? cut : 0;
            for (size_t r = 0; r < n; r++) v[r] = (double)x[r * d + c];
            double median = median_of(v, n);
            for (size_t r = from; r < n - from; r++) want += v[r] / (double)(n - 2 * from);
            CHECK_WITHIN(out[c], kind == MOE_AGGREGATE_MEDIAN ? median : want, 2e-7);
        }
        if (kind == MOE_AGGREGATE_GEOMETRIC) { /* no point near it, nor any of the rows, has a lower sum of distances */
            for (size_t c = 0; c < d; c++) y[c] = (double)out[c];
            double least = distances(n, d, x, y), slack = 1e-6 * (double)n;
            for (size_t r = 0; r < n; r++) {
                for (size_t c = 0; c < d; c++) y[c] = (double)x[r * d + c];
                CHECK(distances(n, d, x, y) >= least - slack);
            }
            for (int i = 0; i < 60; i++) {
                double step = pow(10, -1 - i % 3);
                for (size_t c = 0; c < d; c++) y[c] = (double)out[c] + step * (double)test_uniform(-1, 1);
                CHECK(distances(n, d, x, y) >= least - slack);
            }
        }
        FOR_EACH_ISA(isa) {
            CHECK_OK(moe_aggregate((moe_aggregate_kind)kind, n, d, x, trim, other, scratch, bytes));
            CHECK_SAME(other, out, d);
        }
    }
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, n, d, x, 0, out, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
    free(x), free(out), free(other), free(v), free(y), free(scratch);
}

static void test_aggregate(void) {
    aggregate_case(1, 5, 0.2f, 0);
    aggregate_case(2, 17, 0.4f, 0);
    aggregate_case(5, 1, 0.25f, 1);
    aggregate_case(8, 33, 0.25f, 2);
    aggregate_case(9, 16, 0.49f, 4);
    aggregate_case(40, 7, 0, 0);
    float same[6] = {1, 2, 1, 2, 1, 2}, line[3] = {0, 1, 10}, square[8] = {0, 0, 0, 1, 1, 0, 1, 1}, out[2];
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_GEOMETRIC, 3, 2, same, 0, out, NULL, 0));
    CHECK(out[0] == 1 && out[1] == 2);
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_GEOMETRIC, 3, 1, line, 0, out, NULL, 0)); /* a point itself: the middle one */
    CHECK_WITHIN(out[0], 1, 1e-7);
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_GEOMETRIC, 4, 2, square, 0, out, NULL, 0));
    CHECK_WITHIN(out[0], 0.5, 1e-7);
    CHECK_WITHIN(out[1], 0.5, 1e-7);
    float squares[20];
    for (int r = 0; r < 20; r++) squares[r] = (float)(r * r);
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_TRIMMED, 20, 1, squares, 0.45f, out, NULL, 0));
    CHECK(out[0] == 90.5f); /* of 81 and 100: 9 are cut at each end, though 0.45f is below 0.45 */
    /* 40% at a distance of a million: the mean follows, the others do not */
    float crowd[20];
    for (int r = 0; r < 10; r++)
        for (int c = 0; c < 2; c++) crowd[r * 2 + c] = r < 4 ? 1e6f : test_uniform(-0.1f, 0.1f);
    for (int kind = 0; kind < MOE_AGGREGATE_COUNT; kind++) {
        CHECK_OK(moe_aggregate((moe_aggregate_kind)kind, 10, 2, crowd, 0.45f, out, NULL, 0));
        CHECK((fabsf(out[0]) < 0.3f) == (kind != MOE_AGGREGATE_MEAN));
    }
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_COUNT, 3, 1, line, 0, out, NULL, 0), MOE_E_AGGREGATE);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_TRIMMED, 3, 1, line, 0.5f, out, NULL, 0), MOE_E_TRIM);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_TRIMMED, 3, 1, line, -0.1f, out, NULL, 0), MOE_E_TRIM);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_TRIMMED, 3, 1, line, NAN, out, NULL, 0), MOE_E_TRIM);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 0, 1, line, 0, out, NULL, 0), MOE_E_NO_OUTPUTS);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 1, NULL, 0, out, NULL, 0), MOE_E_NULL_OUTPUTS);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 1, line, 0, NULL, NULL, 0), MOE_E_NULL_OUT);
    out[0] = 7;
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 0, NULL, 0, out, NULL, 0));
    CHECK(out[0] == 7);
    if (sizeof(size_t) == 8)
        CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, (size_t)1 << 30, SIZE_MAX / 64, line, 0, out, NULL, 0),
                     MOE_E_OVERFLOW);
    line[1] = NAN;
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 1, line, 0, out, NULL, 0), MOE_E_NAN_OUTPUTS);
    CHECK_STATUS(moe_aggregate_scratch(SIZE_MAX / 8, 1, &(size_t){0}), MOE_E_OVERFLOW);
}

/* ---- systems ---- */
#include "rows.h"

static float z[MAX_TOKENS * D]; /* outputs to compare with */

/* ---- soft slots ---- */
static void test_soft_moe(void) {
    enum { T = 24, N = 2 * E, LONG = 6 };
    moe_layer *m = row("soft-moe", "soft_slots=2 sequence=6");
    if (!m) return;
    tokens(T);
    inside in = inside_of(go(m, T, 0));
    for (size_t i = 0; i < T; i++) {
        double sum = 0;
        for (size_t n = 0; n < N; n++) sum += (double)in.mix[i * N + n];
        CHECK_NEAR(sum, 1, 1e-6); /* a token's mixture of the slots */
    }
    for (size_t s = 0; s < T; s += LONG)
        for (size_t n = 0; n < N; n++) {
            double sum = 0;
            for (size_t i = s; i < s + LONG; i++) sum += (double)in.dispatch[i * N + n];
            CHECK_NEAR(sum, 1, 1e-6); /* a slot's mixture of its sequence's tokens */
        }
    float old[T * D];
    const size_t order[LONG] = {3, 5, 0, 1, 4, 2};
    memcpy(old, y, sizeof old), memcpy(z, x, T * D * sizeof *x);
    for (size_t i = 0; i < LONG; i++) memcpy(x + (LONG + i) * D, z + (LONG + order[i]) * D, D * sizeof *x);
    go(m, T, 0);
    CHECK(largest(old, NULL, T * D) > 0.01);
    for (size_t i = 0; i < T; i++) {
        size_t from = i >= LONG && i < 2 * LONG ? LONG + order[i - LONG] : i;
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], old[from * D + c], 7e-8);
    }
    test_fill(x + LONG * D, LONG * D, -1, 1);
    go(m, T, 0);
    for (size_t i = 0; i < T; i += LONG) { /* sequences do not mix */
        if (i != LONG) CHECK_SAME(y + i * D, old + i * D, LONG * D);
        else CHECK(largest(y + i * D, old + i * D, LONG * D) > 0.001);
    }
    memcpy(x, z, T * D * sizeof *x);
    x[0] += 0.5f; /* but within one, every token sees it */
    go(m, T, 0);
    for (size_t i = 0; i < LONG; i++) CHECK(largest(y + i * D, old + i * D, D) > 0);
    moe_layer_free(m);
}

/* ---- losses through soft slots ----
 * An expert's logit is l_e = tau ln sum exp(z_n / tau) over its slots: values in double, of the router's columns. */
enum { SOFT_T = 9, SOFT_N = 3 * E };
static double soft_loss(moe_loss_kind kind, const double *R, size_t slots, double tau) {
    double l[SOFT_T][E], sum[SOFT_T], P[E] = {0}, value = 0;
    for (size_t t = 0; t < SOFT_T; t++) {
        double all = 0, lse = 0, entropy = 0;
        for (size_t e = 0; e < E; e++) {
            double own = 0;
            for (size_t n = e * slots; n < (e + 1) * slots; n++) {
                double logit = 0;
                for (size_t i = 0; i < D; i++) logit += (double)x[t * D + i] * R[i * E * slots + n];
                own += exp(logit / tau);
            }
            l[t][e] = tau * log(own), all += own, lse += exp(l[t][e]);
        }
        sum[t] = all;
        for (size_t e = 0; e < E; e++) {
            double p = exp(l[t][e] / tau) / sum[t];
            P[e] += p / SOFT_T, entropy -= p * log(p);
        }
        if (kind == MOE_LOSS_Z) value += log(lse) * log(lse) / SOFT_T;
        if (kind == MOE_LOSS_ENTROPY) value -= entropy / SOFT_T;
    }
    for (size_t e = 0; kind == MOE_LOSS_KL_UNIFORM && e < E; e++) value += P[e] * log(P[e] * E);
    for (size_t e = 0; kind == MOE_LOSS_REDUNDANCY && e < E; e++)
        for (size_t j = 0; j < e; j++) {
            double dot = 0, a = 0, b = 0;
            for (size_t t = 0; t < SOFT_T; t++)
                dot += l[t][e] * l[t][j], a += l[t][e] * l[t][e], b += l[t][j] * l[t][j];
            value += fmax(0, dot / sqrt(a * b)) * 2 / (E * (E - 1));
        }
    return value;
}
static void check_soft_loss(moe_loss_kind kind, size_t slots, double tau) {
    char set_[160];
    double R[D * SOFT_N], top = 0, off = 0;
    snprintf(set_, sizeof set_, "combine=soft select=all gate=softmax soft_slots=%zu temperature=%g loss.%s=1", slots,
             tau, moe_loss_name(kind));
    moe_layer *m = row(NULL, set_);
    if (!m) return;
    size_t count = count_of(m, "router");
    CHECK(count == D * E * slots);
    tokens(SOFT_T);
    memset(dy, 0, sizeof dy); /* no task: the loss alone */
    const moe_tape *t = go(m, SOFT_T, 0);
    CHECK_OK(moe_backward(m, dy, NULL));
    float *now = get(m, "router"), *got = test_floats(count);
    CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router", got, count));
    for (size_t i = 0; i < count; i++) R[i] = (double)now[i];
    double want = soft_loss(kind, R, slots, tau);
    CHECK_WITHIN(t->loss[kind], want, 1.9e-6 * fmax(fabs(want), 0.1));
    for (size_t i = 0; i < count; i++) {
        double h = 1e-5, keep = R[i], side[2];
        for (int k = 0; k < 2; k++) R[i] = keep + (k ? h : -h), side[k] = soft_loss(kind, R, slots, tau);
        R[i] = keep;
        double slope = (side[1] - side[0]) / (2 * h);
        top = fmax(top, fabs(slope)), off = fmax(off, fabs((double)got[i] - slope));
    }
    if (!CHECK(top > 1e-3) || !CHECK_WITHIN(off / top, 0, 4e-6)) printf("    %s: %.3g of %.3g\n", set_, off, top);
    moe_tape *alone = NULL; /* the same of the router's own backward without d_weight, in memory that is not zero */
    float *same = test_floats(count);
    test_pattern = 0xaa;
    CHECK_OK(moe_tape_new(&alone, moe_layer_desc(m), SOFT_T, MOE_ON));
    test_pattern = -1;
    CHECK_OK(moe_route(alone, now, x, SOFT_T));
    CHECK_OK(moe_route_backward(alone, now, NULL, same, NULL));
    CHECK_SAME(same, got, count);
    moe_tape_free(alone);
    free(now), free(got), free(same), moe_layer_free(m);
}
static void test_soft_losses(void) {
    static const moe_loss_kind kinds[] = {MOE_LOSS_Z, MOE_LOSS_ENTROPY, MOE_LOSS_KL_UNIFORM, MOE_LOSS_REDUNDANCY};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        check_soft_loss(kinds[i], 1, 1);
        check_soft_loss(kinds[i], 2, 0.5);
        check_soft_loss(kinds[i], 3, 2);
    }
}

/* ---- SMEAR ---- */
static void test_smear(void) {
    enum { T = 24 };
    moe_layer *m = row("smear", "bias=true");
    if (!m) return;
    tokens(T);
    float *b = get(m, "router.bias"), out[SEQ * D];
    CHECK(b != NULL && count_of(m, "router.bias") == E);
    b[5] = 200;
    set(m, "router.bias", b);
    go(m, T, 1);
    network(m, 5, NULL, x, T, z); /* p = (0, .., 1, .., 0): that expert */
    for (size_t i = 0; i < T * D; i++) CHECK_WITHIN(y[i], z[i], 1e-7);
    b = get(m, "router.bias");
    b[5] = 0;
    set(m, "router.bias", b);
    scale(m, "experts.w1", 3), scale(m, "experts.wu", 3);
    const moe_tape *t = go(m, T, 1);
    double away = 0;
    for (size_t s = 0; s < T; s += SEQ) {
        const float *p = t->prob + s * E;
        double sum = 0;
        for (size_t e = 0; e < E; e++) sum += (double)p[e];
        CHECK_NEAR(sum, 1, 7e-7);
        for (size_t i = s; i < s + SEQ; i++) CHECK_SAME(t->prob + i * E, p, E); /* one for the sequence */
        network(m, 0, p, x + s * D, SEQ, out); /* the network of the mean parameters, */
        for (size_t i = 0; i < SEQ * D; i++) CHECK_WITHIN(y[s * D + i], out[i], 5e-6);
        double ensemble[SEQ * D] = {0};
        for (size_t e = 0; e < E; e++) {
            network(m, e, NULL, x + s * D, SEQ, out);
            for (size_t i = 0; i < SEQ * D; i++) ensemble[i] += (double)p[e] * (double)out[i];
        }
        /* not the mean of the outputs */
        for (size_t i = 0; i < SEQ * D; i++) away = fmax(away, fabs(ensemble[i] - (double)y[s * D + i]));
    }
    CHECK(away > 0.05);
    CHECK(largest(t->prob, t->prob + SEQ * E, E) > 1e-3); /* another mixture for another sequence */
    /* expert dropout in training: about a tenth of the experts of a sequence, the rest renormalised */
    size_t gone = 0, n = 0;
    for (int round = 0; round < 20; round++) {
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i += SEQ) {
            double sum = 0;
            for (size_t k = 0; k < E; k++) {
                n++, gone += t->index[i * E + k] < 0;
                sum += (double)t->weight[i * E + k];
            }
            CHECK_NEAR(sum, 1, 1e-6);
        }
    }
    CHECK(fabs((double)gone - 0.1 * (double)n) < 4.5 * sqrt(0.09 * (double)n));
    moe_layer_free(m);
}

/* ---- robust combination ---- */
static void test_robust(void) {
    enum { T = 64 };
    static const size_t sizes[] = {5, 10}; /* of which 40 %: 2 and 4 */
    for (size_t n = 0; n < 2; n++) {
        size_t k = sizes[n];
        char all[64];
        float clean[2][T * D], broken[2][T * D];
        snprintf(all, sizeof all, "n_experts=%d top_k=%d", (int)k, (int)k);
        for (int plain = 0; plain < 2; plain++) {
            moe_layer *m = row("robust", all);
            if (!m) return;
            if (plain) {
                moe_desc d = *moe_layer_desc(m);
                moe_layer_free(m);
                d.combine = MOE_COMBINE_SUM;
                if (!CHECK_OK(moe_layer_new(&m, &d))) return;
            }
            test_seed = 77; /* the same tokens and experts for both */
            tokens(T);
            static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2"};
            for (size_t i = 0; i < 3; i++) { /* experts that have learned nearly the same */
                float *p = get(m, names[i]);
                for (size_t e = 1; e < k; e++)
                    for (size_t c = 0; c < D * F; c++) p[e * D * F + c] = p[c] * test_uniform(0.9f, 1.1f);
                set(m, names[i], p);
            }
            go(m, T, 0);
            memcpy(clean[plain], y, sizeof clean[plain]);
            for (size_t i = 0; i < 3; i++) { /* 40 % of them become noise */
                float *p = get(m, names[i]);
                for (size_t e = 0; e < k * 2 / 5; e++) test_fill(p + (e * 2 + 1) * D * F, D * F, -3, 3);
                set(m, names[i], p);
            }
            go(m, T, 0);
            memcpy(broken[plain], y, sizeof broken[plain]);
            moe_layer_free(m);
        }
        double size = largest(clean[1], NULL, T * D), hardly = largest(clean[0], clean[1], T * D) / size;
        double robust = largest(broken[0], clean[0], T * D) / size, plain = largest(broken[1], clean[1], T * D) / size;
        printf(
            "    robust, %d of %d experts are noise: y is off by %.2g of its largest, plain by %.2g; none: by %.2g\n",
            (int)(k * 2 / 5), (int)k, robust, plain, hardly);
        CHECK(hardly < 0.1 && robust < 0.2 && plain > 5);
    }
}

int main(void) {
    CHECK(test_live_blocks == 0);
    RUN(test_robust_weights);
    RUN(test_robust_breakdown);
    RUN(test_aggregate);
    RUN(test_soft_moe);
    RUN(test_soft_losses);
    RUN(test_smear);
    RUN(test_robust);
    return test_end();
}
