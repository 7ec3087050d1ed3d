/* AdamW, SGD, weight decay, clipping and the schedule against arithmetic written out here in double. */
#include "test.h"

static moe_optimizer_args adamw(float lr, uint64_t step) {
    moe_optimizer_args o;
    memset(&o, 0, sizeof o);
    o.kind = MOE_OPTIMIZER_ADAMW, o.lr = lr, o.step = step;
    return o;
}

/* One weight, three steps, by hand:
 *     m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay
 * p) with p = 1, g = 0.5, -0.25, 1, lr = 0.1, b1 = 0.9, b2 = 0.999, eps = 1e-8, decay = 0.01: t = 1: m = 0.05,   v =
 * 0.00025,       m^ = 0.5,          v^ = 0.25,           p = 1 - 0.1 (1 + 0.01) t = 2: m = 0.02,   v = 0.00031225, m^ =
 * 0.105263158,  v^ = 0.156203102,    p = 0.899 - 0.1 (0.266337 + 0.00899) t = 3: m = 0.118,  v = 0.00131193775, m^ =
 * 0.435424354,  v^ = 0.437750188,    p = 0.871467 - 0.1 (0.658112 + 0.00871467) The numbers below are these lines
 * carried out in exact decimal arithmetic. */
static void test_adamw_trace(void) {
    static const float g[] = {0.5f, -0.25f, 1.0f};
    static const double m_want[] = {0.05, 0.02, 0.118};
    static const double v_want[] = {0.00025, 0.00031225, 0.00131193775};
    static const double p_want[] = {0.899000002000, 0.871467298706, 0.804784672376};
    FOR_EACH_ISA(isa) {
        float p = 1, m = 0, v = 0;
        for (int t = 0; t < 3; t++) {
            moe_optimizer_args o = adamw(0.1f, (uint64_t)t + 1);
            CHECK_OK(moe_optimizer_step(&o, 1, &p, g + t, &m, &v));
            CHECK_WITHIN(m, m_want[t], 3e-7 * m_want[t]); /* 1 - 0.9f = 0.10000002 */
            CHECK_WITHIN(v, v_want[t], 2e-5 * v_want[t]); /* 1 - 0.999f = 0.00099998713 */
            CHECK_WITHIN(p, p_want[t], 3e-7);
        }
    }
}

/* v = mu v + g;  p -= lr (v + decay p): p = 1, g = 0.5, -0.25, 1, lr = 0.1, mu = 0.9, decay = 0.01:
 *     v = 0.5    p = 1       - 0.05   - 0.001     = 0.949
 *     v = 0.2    p = 0.949   - 0.02   - 0.000949  = 0.928051
 *     v = 1.18   p = 0.928051 - 0.118 - 0.000928051 = 0.809122949 */
static void test_sgd_trace(void) {
    static const float g[] = {0.5f, -0.25f, 1.0f};
    static const double v_want[] = {0.5, 0.2, 1.18}, p_want[] = {0.949, 0.928051, 0.809122949};
    FOR_EACH_ISA(isa) {
        float p = 1, m = 0;
        for (int t = 0; t < 3; t++) {
            moe_optimizer_args o = adamw(0.1f, (uint64_t)t + 1);
            o.kind = MOE_OPTIMIZER_SGD;
            CHECK_OK(moe_optimizer_step(&o, 1, &p, g + t, &m, NULL));
            CHECK_WITHIN(m, v_want[t], 2e-7);
            CHECK_WITHIN(p, p_want[t], 2e-7);
        }
    }
}

/* Any settings over many elements and steps, in double; every instruction set and thread count gives the same bits. */
static void long_run(moe_optimizer_kind kind, float beta1, float beta2, float momentum, float decay, float scale,
                     size_t n) {
    enum { STEPS = 12 };
    float *p = test_floats(n), *m = test_floats(n), *v = test_floats(n), *g = test_floats(n * STEPS),
          *p0 = test_floats(n);
    float *first = test_floats(3 * n);
    double *want = test_doubles(n);
    int begun = 0;
    test_fill(p0, n, -1, 1);
    test_fill(g, n * STEPS, -1, 1);
    double b1 = beta1 < 0    ? 0
                : beta1 == 0 ? (double)0.9f
                             : (double)beta1,
           b2 = beta2 < 0    ? 0
                : beta2 == 0 ? (double)0.999f
                             : (double)beta2;
    double mu = momentum < 0 ? 0 : momentum == 0 ? (double)0.9f : (double)momentum;
    double wd = decay < 0 ? 0 : decay == 0 ? (double)0.01f : (double)decay, s = scale == 0 ? 1 : (double)scale;
    for (size_t i = 0; i < n; i++) {
        double md = 0, vd = 0, lr = 0.0125;
        want[i] = p0[i];
        for (int t = 1; t <= STEPS; t++) {
            double gd = s * (double)g[(size_t)(t - 1) * n + i];
            if (kind == MOE_OPTIMIZER_SGD) {
                md = mu * md + gd;
                want[i] -= lr * (md + wd * want[i]);
            } else {
                md = b1 * md + (1 - b1) * gd, vd = b2 * vd + (1 - b2) * gd * gd;
                want[i] -= lr * (md / (1 - pow(b1, t)) / (sqrt(vd / (1 - pow(b2, t))) + 1e-6) + wd * want[i]);
            }
        }
    }
    FOR_EACH_ISA(isa) {
        for (size_t threads = 1; threads <= 3; threads++) {
            moe_parallel parallel = {0};
            parallel.n_threads = threads;
            memcpy(p, p0, n * sizeof *p), memset(m, 0, n * sizeof *m), memset(v, 0, n * sizeof *v);
            for (int t = 1; t <= STEPS; t++) {
                moe_optimizer_args o = adamw(0.0125f, (uint64_t)t);
                o.kind = kind, o.beta1 = beta1, o.beta2 = beta2, o.momentum = momentum, o.weight_decay = decay,
                o.scale = scale;
                o.epsilon = 1e-6f, o.parallel = &parallel;
                CHECK_OK(
                    moe_optimizer_step(&o, n, p, g + (size_t)(t - 1) * n, m, kind == MOE_OPTIMIZER_SGD ? NULL : v));
            }
            if (!begun)
                memcpy(first, p, n * sizeof *p), memcpy(first + n, m, n * sizeof *p),
                    memcpy(first + 2 * n, v, n * sizeof *p);
            begun = 1;
            CHECK_SAME(p, first, n);
            CHECK_SAME(m, first + n, n);
            CHECK_SAME(v, first + 2 * n, n);
        }
    }
    for (size_t i = 0; i < n; i++) CHECK_WITHIN(p[i], want[i], 2e-6);
    free(p), free(m), free(v), free(g), free(p0), free(first), free(want);
}

static void test_long_runs(void) {
    static const size_t n[] = {1, 15, 16, 17, 100, 1001, 70000};
    for (size_t i = 0; i < sizeof n / sizeof *n; i++) {
        if (TEST_SANITIZED && n[i] > 10000) continue;
        long_run(MOE_OPTIMIZER_ADAMW, 0, 0, 0, 0, 0, n[i]);
        if (n[i] > 1000) continue;
        long_run(MOE_OPTIMIZER_ADAMW, 0.8f, 0.99f, 0, 0.1f, 0.5f, n[i]);
        long_run(MOE_OPTIMIZER_ADAMW, MOE_OFF, 0.9f, 0, MOE_OFF, 2, n[i]);
        long_run(MOE_OPTIMIZER_ADAMW, 0.9f, MOE_OFF, 0, MOE_OFF, 0, n[i]);
        long_run(MOE_OPTIMIZER_SGD, 0, 0, 0, 0, 0, n[i]);
        long_run(MOE_OPTIMIZER_SGD, 0, 0, 0.5f, 0.1f, 3, n[i]);
        long_run(MOE_OPTIMIZER_SGD, 0, 0, MOE_OFF, MOE_OFF, 0, n[i]);
    }
}

/* ---- through the layer ---- */
typedef struct snapshot { size_t n; float *p, *g; } snapshot; /* one tensor before a step */

static snapshot take(const moe_layer *m, const char *name, size_t n) {
    snapshot s;
    s.n = n, s.p = test_floats(n), s.g = test_floats(n);
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, name, s.p, n));
    CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, name, s.g, n));
    return s;
}

static void layer_step(moe_optimizer_kind kind, float clip, float decay) {
    enum { D = 5, F = 7, E = 3, T = 11 };
    moe_desc d = {0};
    moe_layer *m = NULL;
    float x[T * D], y[T * D], dy[T * D];
    double norm = 0;
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.top_k = 2, d.bias = MOE_ON, d.optimizer = kind;
    d.clip_norm = clip, d.weight_decay = decay;
    test_fill(x, T * D, -1, 1);
    test_fill(dy, T * D, -3, 3);
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    float b1[E * F];
    test_fill(b1, E * F, -1, 1);
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.b1", b1, E * F));
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_layer_grad_norm(m, &norm));
    CHECK(norm > 2);
    double scale = clip > 0 && norm > (double)clip ? (double)clip / norm : 1, wd = decay < 0    ? 0
                                                                                   : decay == 0 ? 0.01
                                                                                                : (double)decay;
    size_t tensors = moe_layer_tensors(m), seen_bias = 0;
    snapshot before[8];
    moe_tensor t[8];
    if (!CHECK(tensors == 7)) return;
    for (size_t i = 0; i < tensors; i++) {
        CHECK_OK(moe_layer_tensor(m, i, t + i));
        before[i] = take(m, t[i].name, t[i].count);
    }
    CHECK_OK(moe_step(m, 0.05f));
    for (size_t i = 0; i < tensors; i++) {
        snapshot after = take(m, t[i].name, t[i].count);
        int bias = strncmp(t[i].name, "experts.b", 9) == 0; /* biases take no weight decay */
        seen_bias += (size_t)bias;
        for (size_t j = 0; j < after.n; j++) {
            double g = scale * (double)before[i].g[j], p = before[i].p[j];
            double change = kind == MOE_OPTIMIZER_SGD ? g : g / (fabs(g) + 1e-8); /* the first step of Adam */
            if (g == 0) change = 0;
            CHECK_WITHIN(after.p[j], p - 0.05 * (change + (bias ? 0 : wd * p)), fabs(g) < 1e-5 && g != 0 ? 1e-5 : 3e-7);
            CHECK(after.g[j] == 0);
        }
        free(after.p), free(after.g), free(before[i].p), free(before[i].g);
    }
    CHECK(seen_bias == 3);
    moe_layer_free(m);
}

static void test_layer_step(void) {
    for (int kind = MOE_OPTIMIZER_ADAMW; kind < MOE_OPTIMIZER_COUNT; kind++) {
        layer_step((moe_optimizer_kind)kind, MOE_OFF, MOE_OFF);
        layer_step((moe_optimizer_kind)kind, 0, 0);
        layer_step((moe_optimizer_kind)kind, 0.25f, MOE_OFF);
        layer_step((moe_optimizer_kind)kind, 0.25f, 0.5f);
        layer_step((moe_optimizer_kind)kind, 1e6f, 0.5f); /* longer than the gradient: no clipping */
    }
}

/* The step count and the moments go on from step to step: the layer against its own gradients in double. */
static void test_layer_steps_continue(void) {
    enum { D = 4, F = 6, E = 2, T = 9, N = E * D * F, STEPS = 5 };
    moe_desc d = {0};
    moe_layer *m = NULL;
    float x[T * D], y[T * D], dy[T * D], g[N], p[N];
    double want[N], md[N] = {0}, vd[N] = {0};
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.top_k = 1;
    test_fill(x, T * D, -1, 1);
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "experts.w1", p, N));
    for (int i = 0; i < N; i++) want[i] = p[i];
    for (int t = 1; t <= STEPS; t++) {
        test_fill(dy, T * D, -1, 1);
        CHECK_OK(moe_forward(m, x, T, y));
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "experts.w1", g, N));
        CHECK_OK(moe_step(m, 0.01f));
        for (int i = 0; i < N; i++) {
            md[i] = 0.9 * md[i] + 0.1 * (double)g[i], vd[i] = 0.999 * vd[i] + 0.001 * (double)g[i] * (double)g[i];
            want[i] -= 0.01 * (md[i] / (1 - pow(0.9, t)) / (sqrt(vd[i] / (1 - pow(0.999, t))) + 1e-8) + 0.01 * want[i]);
        }
    }
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "experts.w1", p, N));
    for (int i = 0; i < N; i++) CHECK_WITHIN(p[i], want[i], 1e-6);
    CHECK_OK(moe_layer_get(m, MOE_PART_MOMENT1, "experts.w1", p, N));
    for (int i = 0; i < N; i++) CHECK_WITHIN(p[i], md[i], 1e-7);
    CHECK_OK(moe_layer_get(m, MOE_PART_MOMENT2, "experts.w1", p, N));
    for (int i = 0; i < N; i++) CHECK_WITHIN(p[i], vd[i], 1e-7);
    moe_layer_free(m);
}

/* ---- the rest ---- */
static void test_sum_squares(void) {
    for (size_t n = 0; n < 200000; n = n * 3 + 1) {
        float *x = test_floats(n);
        test_fill(x, n, -2, 2);
        double sum = 0, first = moe_sum_squares(NULL, n, x);
        for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
        CHECK_WITHIN(first, sum, 2 * (double)n * 0x1p-53 * sum); /* either order of n additions */
        FOR_EACH_ISA(isa) {
            for (size_t threads = 1; threads <= 3; threads++) {
                moe_parallel parallel = {0};
                parallel.n_threads = threads;
                CHECK(moe_sum_squares(&parallel, n, x) == first);
            }
        }
        free(x);
    }
    float big[3] = {1e30f, 1e30f, 1e-30f};
    CHECK_NEAR(moe_sum_squares(NULL, 3, big), 2 * (double)1e30f * (double)1e30f, 1e-15);
    big[1] = NAN;
    CHECK(isnan(moe_sum_squares(NULL, 3, big)));
}

static void test_schedule(void) {
    for (uint64_t total = 1; total < 200; total = total * 2 + 3)
        for (uint64_t warmup = 0; warmup <= total; warmup += 1 + total / 3) {
            for (uint64_t step = warmup; step < total; step++) { /* half a cosine from peak to floor */
                double at = (double)(step - warmup) / (double)(total - warmup);
                double want = 0.125 + (2 - 0.125) * 0.5 * (1 + cos(3.14159265358979323846 * at));
                CHECK_NEAR(moe_schedule_cosine(step, warmup, total, 2, 0.125f), want, 1e-6);
            }
            for (uint64_t step = 0; step < warmup; step++) /* in equal steps, from peak / warmup to the peak */
                CHECK_NEAR(moe_schedule_cosine(step, warmup, total, 2, 0.125f), 2 * (double)(step + 1) / (double)warmup,
                           1e-7);
            CHECK_NEAR(moe_schedule_cosine(total, warmup, total, 2, 0.125f), 0.125, 1e-7);
            CHECK_BITS(moe_schedule_cosine(total + 1, warmup, total, 2, 0.125f), 0.125f);
            CHECK_BITS(moe_schedule_cosine(UINT64_MAX, warmup, total, 2, 0.125f), 0.125f);
        }
}

static void test_bad_arguments(void) {
    float p[4] = {1, 1, 1, 1}, g[4] = {1, 1, 1, 1}, m[4] = {0}, v[4] = {0};
    const moe_optimizer_args good = adamw(0.1f, 1);
    moe_optimizer_args o = good;
    CHECK_OK(moe_optimizer_step(&o, 0, NULL, NULL, NULL, NULL));
    CHECK(moe_optimizer_step(NULL, 4, p, g, m, v) != MOE_OK);
    CHECK_STATUS(moe_optimizer_step(&o, 4, NULL, g, m, v), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_optimizer_step(&o, 4, p, NULL, m, v), MOE_E_NULL_GRADS);
    CHECK_STATUS(moe_optimizer_step(&o, 4, p, g, NULL, v), MOE_E_NULL_MOMENTS);
    CHECK_STATUS(moe_optimizer_step(&o, 4, p, g, m, NULL), MOE_E_NULL_MOMENTS);
#define BAD(field, value, status) o = good, o.field = value; CHECK_STATUS(moe_optimizer_step(&o, 4, p, g, m, v), status)
    BAD(kind, MOE_OPTIMIZER_COUNT, MOE_E_OPTIMIZER);
    BAD(lr, -1, MOE_E_LR);
    BAD(lr, NAN, MOE_E_LR);
    BAD(lr, INFINITY, MOE_E_LR);
    BAD(beta1, 1, MOE_E_BETA1);
    BAD(beta1, -0.5f, MOE_E_BETA1);
    BAD(beta2, 1, MOE_E_BETA2);
    BAD(beta2, NAN, MOE_E_BETA2);
    BAD(epsilon, -1e-8f, MOE_E_EPSILON);
    BAD(epsilon, INFINITY, MOE_E_EPSILON);
    BAD(weight_decay, -0.5f, MOE_E_WEIGHT_DECAY);
    BAD(momentum, 1.5f, MOE_E_MOMENTUM);
    BAD(momentum, -0.5f, MOE_E_MOMENTUM);
    BAD(momentum, NAN, MOE_E_MOMENTUM);
    BAD(weight_decay, INFINITY, MOE_E_WEIGHT_DECAY);
    BAD(scale, INFINITY, MOE_E_COEFFICIENT);
    CHECK(moe_sum_squares(NULL, 0, NULL) == 0 && moe_sum_squares(NULL, 3, NULL) == 0);
    BAD(step, 0, MOE_E_STEP);
#undef BAD
    for (int i = 0; i < 4; i++) CHECK(p[i] == 1 && m[i] == 0 && v[i] == 0);
}

int main(void) {
    RUN(test_adamw_trace);
    RUN(test_sgd_trace);
    RUN(test_long_runs);
    RUN(test_layer_step);
    RUN(test_layer_steps_continue);
    RUN(test_sum_squares);
    RUN(test_schedule);
    RUN(test_bad_arguments);
    return test_end();
}
