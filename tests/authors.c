/* What the authors' own layers have beside their system's row: fields and rows, each against the author's formula in
 * double, with the same bits everywhere, saved and loaded. Their gradients are in systems.c, by central differences. */
#include "test.h"
#include "rows.h"

enum { T = 40 };

/* A layer that was trained a little, so that no parameter is 0 any more. */
static moe_layer *trained(const char *more, size_t threads) {
    moe_desc d = row_desc(NULL, more);
    moe_layer *m = NULL;
    d.parallel.n_threads = threads;
    if (!CHECK_OK(moe_layer_new(&m, &d))) {
        printf("        %s\n", more);
        return NULL;
    }
    for (int step = 0; step < 3; step++) {
        CHECK_OK(moe_rand_uniform(3, (uint64_t)step, T * D, -2, 2, x));
        CHECK_OK(moe_rand_uniform(4, (uint64_t)step, T * D, -1, 1, dy));
        go(m, T, 0);
        back_and_step(m, 0.05f);
    }
    return m;
}
/* The same bits for every instruction set and number of threads; and after a file. */
static void everywhere(const char *more) {
    static float back[T * D], first[T * D];
    uint64_t want = 0;
    FOR_EACH_ISA(isa)
        for (size_t threads = 1; threads <= 3; threads += 2) {
            moe_layer *m = trained(more, threads);
            if (!m) return;
            uint64_t hash = moe_hash(moe_layer_hash(m), y, T * D * sizeof *y);
            if (want && !CHECK(hash == want))
                printf("        %s, %s, %d threads\n", more, moe_isa_name(isa), (int)threads);
            want = hash;
            moe_layer_free(m);
        }
    moe_layer *m = trained(more, 1), *again = NULL;
    size_t bytes = 0;
    if (!m || !CHECK_OK(moe_layer_save_size(m, 1, &bytes))) return;
    unsigned char *file = (unsigned char *)test_memory(bytes, 1);
    CHECK_OK(moe_layer_save_memory(m, 1, file, bytes));
    if (!CHECK_OK(moe_layer_load_memory(&again, file, bytes, NULL))) return;
    CHECK(moe_layer_hash(again) == moe_layer_hash(m));
    go(m, T, 0);
    CHECK_OK(moe_backward(m, dy, back));
    memcpy(first, y, sizeof first);
    go(again, T, 0);
    CHECK_SAME(y, first, T * D);
    CHECK_OK(moe_backward(again, dy, first));
    CHECK_SAME(first, back, T * D);
    free(file);
    moe_layer_free(m), moe_layer_free(again);
}
static void refused(const char *more, moe_status status) {
    moe_desc d = row_desc(NULL, more), resolved;
    if (!CHECK_STATUS(moe_desc_resolve(&d, &resolved), status)) printf("        %s\n", more);
}

/* ---- GPT-OSS: the k highest of x W + b, and a softmax over them ---- */
static void test_router_bias(void) {
    moe_layer *m = row(NULL, "router_bias=true gate=softmax-selected top_k=3");
    if (!m) return;
    float *b = get(m, "router.bias"), bias[E];
    for (size_t e = 0; e < E; e++) CHECK(b[e] == 0); /* begins at 0 */
    test_fill(b, E, -2, 2);
    memcpy(bias, b, sizeof bias);
    set(m, "router.bias", b);
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    size_t moved = 0;
    for (size_t i = 0; i < T; i++) {
        double z[E], top = 0, sum = 0;
        float logits[E];
        for (size_t e = 0; e < E; e++) {
            z[e] = linear(m, i, e) + (double)bias[e];
            logits[e] = (float)z[e];
            CHECK_WITHIN(t->logits[i * E + e], z[e], 1e-6);
            moved += fabs(z[e] - linear(m, i, e)) > 0.1;
        }
        CHECK(holds_best(t, i, logits, E, 3));
        top = z[t->index[i * 3]];
        for (size_t k = 0; k < 3; k++) sum += exp(z[t->index[i * 3 + k]] - top);
        for (size_t k = 0; k < 3; k++)
            CHECK_WITHIN(t->weight[i * 3 + k], exp(z[t->index[i * 3 + k]] - top) / sum, 8e-7);
    }
    CHECK(moved > T);
    moe_layer_free(m);
    everywhere("router_bias=true");
    everywhere("router_bias=true score=projected gate=sigmoid");
    everywhere("router_bias=true combine=soft select=all soft_slots=2");
    refused("router_bias=true score=slice", MOE_E_ROUTER_BIAS);
    refused("router_bias=true score=hash", MOE_E_ROUTER_BIAS);
    static const struct { const char *more; size_t count; } has[] = { /* by default as the score has it */
        {"", 0}, {"score=mlp", E}, {"score=normed", E}, {"score=mlp router_bias=false", 0}, {"score=cosine", 0},
        {"score=cosine router_bias=true", E}, {"router_bias=true combine=soft select=all soft_slots=2", 2 * E}};
    for (size_t i = 0; i < sizeof has / sizeof *has; i++) {
        m = row(NULL, has[i].more);
        if (m) CHECK(count_of(m, "router.bias") == has[i].count);
        moe_layer_free(m);
    }
}

/* ---- Qwen2-MoE: y += sigmoid(x . w) shared(x) ---- */
static void test_shared_gate(void) {
    static float routed[T * D], shared[2][T * D];
    for (size_t n = 1; n <= 2; n++) {
        moe_layer *m = row(NULL, n == 1 ? "n_shared=1 shared_gate=true bias=true" : "n_shared=2 shared_gate=true");
        moe_layer *plain = row(NULL, n == 1 ? "bias=true" : "");
        if (!m || !plain) return;
        size_t active = moe_layer_active_params(m);
        float *w = get(m, "experts.shared_gate"), *b2 = n == 1 ? get(m, "experts.b2") : NULL;
        for (size_t i = 0; i < D; i++) CHECK(fabsf(w[i]) <= 0.25f && w[i] != 0); /* within 1 / sqrt(d) */
        test_fill(w, D, -1, 1);
        float gate[D];
        memcpy(gate, w, sizeof gate);
        set(m, "experts.shared_gate", w);
        if (b2) test_fill(b2, count_of(m, "experts.b2"), -1, 1), set(m, "experts.b2", b2);
        static const char *const names[] = {"router", "experts.w1", "experts.wu", "experts.w2",
                                            "experts.b1", "experts.bu", "experts.b2"};
        for (size_t i = 0; i < 7; i++) /* the routed experts, which stand first, alone */
            if (count_of(plain, names[i])) {
                float *all = get(m, names[i]);
                CHECK_OK(moe_layer_set(plain, MOE_PART_PARAMS, names[i], all, count_of(plain, names[i])));
                free(all);
            }
        tokens(T);
        go(plain, T, 0);
        memcpy(routed, y, sizeof routed);
        go(m, T, 0);
        for (size_t s = 0; s < n; s++) network(m, E + s, NULL, x, T, shared[s]);
        double low = 1, high = 0;
        for (size_t i = 0; i < T; i++) {
            double z = 0, g;
            for (size_t c = 0; c < D; c++) z += (double)x[i * D + c] * (double)gate[c];
            g = sigmoid(z), low = fmin(low, g), high = fmax(high, g);
            for (size_t c = 0; c < D; c++) {
                double want = (double)routed[i * D + c];
                for (size_t s = 0; s < n; s++) want += g * (double)shared[s][i * D + c];
                CHECK_WITHIN(y[i * D + c], want, 1e-6);
            }
        }
        CHECK(low < 0.3 && high > 0.7);
        CHECK(active == moe_layer_active_params(plain) + n * (count_of(plain, "experts.w2") / E * 3 +
              (n == 1 ? 2 * F + D : 0)) + D);
        moe_layer_free(m), moe_layer_free(plain);
    }
    everywhere("shared_gate=true n_shared=1");
    everywhere("shared_gate=true n_shared=2 n_constant=2 bias=true d_model=16");
    everywhere("shared_gate=true n_shared=1 combine=merge select=all optimizer=sgd");
    refused("shared_gate=true", MOE_E_SHARED_GATE);
}

/* ---- DeepSeek-V2, V3, Megatron: a group's score is the sum of 1, 2, any number of its best ---- */
static void test_group_best(void) {
    static const char *const fields[] = {"group_best=1", "", "group_best=3", "group_best=200"};
    size_t differ = 0;
    int32_t before[T * 2] = {0};
    for (size_t n = 0; n < 4; n++) {
        char more[160];
        size_t best = n < 3 ? n + 1 : 4;
        snprintf(more, sizeof more, "select=groups n_groups=2 normalize=false weight_scale=16 %s", fields[n]);
        moe_layer *m = row(NULL, more);
        if (!m) return;
        scale(m, "router", 4);
        test_seed = 9; /* the same tokens */
        tokens(T);
        const moe_tape *t = go(m, T, 0);
        for (size_t i = 0; i < T; i++) {
            double score[2] = {0}; /* of two groups of four */
            float may[E];
            const float *p = t->prob + i * E;
            for (size_t g = 0; g < 2; g++) {
                char used[4] = {0};
                for (size_t b = 0; b < best; b++) {
                    size_t top = 4;
                    for (size_t e = 0; e < 4; e++)
                        if (!used[e] && (top == 4 || p[g * 4 + e] > p[g * 4 + top])) top = e;
                    used[top] = 1;
                    score[g] += (double)p[g * 4 + top];
                }
            }
            size_t kept_group = score[1] > score[0];
            for (size_t e = 0; e < E; e++) may[e] = e / 4 == kept_group ? p[e] : 0;
            CHECK(holds_best(t, i, may, E, 2));
            for (size_t k = 0; k < 2; k++)
                CHECK_NEAR(t->weight[i * 2 + k], 16 * (double)p[t->index[i * 2 + k]], 1e-7);
        }
        if (n) differ += memcmp(before, t->index, sizeof before) != 0;
        memcpy(before, t->index, sizeof before);
        moe_layer_free(m);
    }
    CHECK(differ == 3); /* each is another selection */
    everywhere("select=groups n_groups=4 top_groups=2 group_best=1");
    refused("group_best=257", MOE_E_GROUP_BEST);
}

/* ---- activations: one expert alone, with numbers that reach the limits ---- */
static double gelu_tanh(double z) { return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z))); }
/* (up + 1) * glu, gate and up clamped, as GptOssExperts._apply_gate writes it */
static double gpt_oss(double gate, double up) {
    gate = gate > 7 ? 7 : gate;
    up = up > 7 ? 7 : up < -7 ? -7 : up;
    return (up + 1) * (gate * sigmoid(gate * 1.702));
}
static double geglu_tanh(double gate, double up) { return gelu_tanh(gate) * up; }
typedef struct form { const char *name; double (*plain)(double), (*gated)(double, double); } form;
/* sum dy y of one expert on one token, in double */
static double expert_of(const form *f, const float *const *p, const double *in, const float *gradient, double *out) {
    double sum = 0, h[F];
    for (size_t k = 0; k < F; k++) {
        double z = (double)p[3][k], u = 0;
        if (f->gated) u = (double)p[4][k];
        for (size_t i = 0; i < D; i++) {
            z += in[i] * (double)p[0][i * F + k];
            if (f->gated) u += in[i] * (double)p[1][i * F + k];
        }
        h[k] = f->gated ? f->gated(z, u) : f->plain(z);
    }
    for (size_t i = 0; i < D; i++) {
        out[i] = (double)p[5][i];
        for (size_t k = 0; k < F; k++) out[i] += h[k] * (double)p[2][k * D + i];
        sum += out[i] * (double)gradient[i];
    }
    return sum;
}
static void test_activations(void) {
    static const form forms[] = {{"gelu-tanh", gelu_tanh, NULL}, {"geglu-tanh", NULL, geglu_tanh},
                                 {"swiglu-clamped", NULL, gpt_oss}};
    static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2",
                                        "experts.b1", "experts.bu", "experts.b2"};
    static float dx[T * D];
    for (size_t n = 0; n < 3; n++) {
        const form *f = &forms[n];
        char more[160];
        snprintf(more, sizeof more, "n_experts=1 top_k=1 bias=true expert=%s", f->name);
        moe_layer *m = row(NULL, more);
        const float *p[6] = {NULL};
        if (!m) return;
        for (size_t i = 0; i < 6; i++) {
            size_t count = count_of(m, names[i]);
            float *v = count ? get(m, names[i]) : NULL, most = i == 2 ? 0.3f : i < 2 ? 2 : 4;
            test_fill(v, count, -most, most);
            if (count) CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, names[i], v, count));
            p[i] = v;
        }
        test_fill(x, T * D, -2, 2), test_fill(dy, T * D, -1, 1);
        go(m, T, 0);
        CHECK_OK(moe_backward(m, dy, dx));
        for (size_t t = 0; t < T; t++) {
            double in[D], out[D], other[D], top = 0;
            for (size_t i = 0; i < D; i++) in[i] = (double)x[t * D + i];
            expert_of(f, p, in, dy + t * D, out);
            for (size_t i = 0; i < D; i++) top = fmax(top, fabs(out[i]));
            for (size_t i = 0; i < D; i++) CHECK_WITHIN(y[t * D + i], out[i], 2e-6 * top);
            for (size_t i = 0; i < D; i++) {
                double keep = in[i], up, down;
                in[i] = keep + 1e-6, up = expert_of(f, p, in, dy + t * D, other);
                in[i] = keep - 1e-6, down = expert_of(f, p, in, dy + t * D, other);
                in[i] = keep;
                CHECK_WITHIN(dx[t * D + i], (up - down) / 2e-6, 6e-5);
            }
        }
        for (size_t i = 0; i < 6; i++) free((void *)(uintptr_t)p[i]);
        moe_layer_free(m);
        snprintf(more, sizeof more, "expert=%s bias=true", f->name);
        everywhere(more);
    }
    for (float z = -40; z <= 40; z += 0.125f) { /* far out, by kernel: nothing is NaN, nothing overflows */
        moe_layer *m = row(NULL, "d_model=1 d_ff=1 n_experts=1 top_k=1 bias=true expert=swiglu-clamped");
        if (!m) return;
        float one = 1, zero = 0, out, grad, up = -z * 1e30f;
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.w1", &one, 1));
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.wu", &zero, 1));
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.bu", &up, 1));
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.b1", &zero, 1));
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.b2", &zero, 1));
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.w2", &one, 1));
        CHECK_OK(moe_forward(m, &z, 1, &out));
        CHECK_OK(moe_backward(m, &one, &grad));
        CHECK_WITHIN(out, gpt_oss((double)z, (double)up), 1e-6 * fmax(1, fabs((double)out)));
        CHECK(isfinite(grad) && (z <= 7 || grad == 0));
        moe_layer_free(m);
    }
}

/* ---- MoE++: its two-layer router, no biases, and experts that see twice the token ---- */
static void test_moepp(void) {
    moe_layer *m = row("moe++", "sequence=0");
    if (!m) return;
    CHECK(count_of(m, "router.proj") == D * 8 * E && count_of(m, "router") == 8 * E * E);
    CHECK(!count_of(m, "router.proj_bias") && !count_of(m, "router.bias"));
    scale(m, "router.proj", 3), scale(m, "router", 3);
    float *gates = get(m, "experts.constant_gate");
    test_fill(gates, count_of(m, "experts.constant_gate"), -1, 1);
    set(m, "experts.constant_gate", gates);
    float *W = get(m, "router.proj"), *R = get(m, "router"), *A = get(m, "router.residual");
    float *g = get(m, "experts.constant_gate"), *v = get(m, "experts.constant"), previous[T * E];
    static float twice[T * D], expert[4][T * D];
    tokens(T);
    test_fill(previous, T * E, -1, 1);
    moe_layer_side(m)->previous = previous;
    for (size_t i = 0; i < T * D; i++) twice[i] = 2 * x[i];
    const moe_tape *t = go(m, T, 0);
    moe_layer *plain = row(NULL, "n_experts=4"); /* the four networks, by a layer that knows nothing of this */
    if (!plain) return;
    static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2"};
    for (size_t n = 0; n < 3; n++) set(plain, names[n], get(m, names[n]));
    for (size_t e = 0; e < 4; e++) network(plain, e, NULL, twice, T, expert[e]);
    for (size_t i = 0; i < T; i++) {
        double z[E], h[8 * E], p[E], top = -INFINITY, all = 0, sum = 0, want[D] = {0};
        float logits[E];
        for (size_t k = 0; k < 8 * E; k++) {
            h[k] = 0;
            for (size_t c = 0; c < D; c++) h[k] += (double)x[i * D + c] * (double)W[c * 8 * E + k];
            h[k] = tanh(h[k]);
        }
        for (size_t e = 0; e < E; e++) {
            z[e] = 0;
            for (size_t k = 0; k < 8 * E; k++) z[e] += h[k] * (double)R[k * E + e];
            for (size_t k = 0; k < E; k++) z[e] += (double)previous[i * E + k] * (double)A[k * E + e];
            CHECK_WITHIN(t->logits[i * E + e], z[e], 4e-6);
            logits[e] = t->logits[i * E + e], top = fmax(top, z[e]);
        }
        for (size_t e = 0; e < E; e++) all += p[e] = exp(z[e] - top);
        CHECK(holds_best(t, i, logits, E, 2));
        for (size_t k = 0; k < 2; k++) sum += t->index[i * 2 + k] == 4 ? 0 : p[t->index[i * 2 + k]] / all;
        for (size_t k = 0; k < 2; k++) {
            size_t e = (size_t)t->index[i * 2 + k];
            double w = e == 4 ? 0 : p[e] / all / sum, s[2] = {0, 1};
            for (size_t c = 0; c < D && e > 5; c++)
                s[0] += (double)twice[i * D + c] *
                        ((double)g[(e - 6) * 2 * D + c] - (double)g[((e - 6) * 2 + 1) * D + c]);
            for (size_t c = 0; c < D; c++) {
                double out = e < 4 ? (double)expert[e][i * D + c] : (double)twice[i * D + c];
                if (e > 5) out = sigmoid(s[0]) * out + (1 - sigmoid(s[0])) * (double)v[(e - 6) * D + c];
                want[c] += w * out;
            }
        }
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c], 3e-6);
    }
    free(W), free(R), free(A), free(g), free(v);
    moe_layer_free(m), moe_layer_free(plain);
    everywhere("score=tanh input_scale=2 n_copy=1 n_constant=2 n_zero=1");
    everywhere("score=tanh combine=soft select=all");
    refused("input_scale=-1", MOE_E_INPUT_SCALE);
    refused("input_scale=2 n_codes=9", MOE_E_INPUT_SCALE);
}

/* ---- BASE: x + a ff2(relu(ff1(norm(x)))), of which a layer gives what is added to x ---- */
static void test_expert_norm(void) {
    moe_layer *m = row("base", "zero_output=false");
    if (!m) return;
    float *b1 = get(m, "experts.b1"), *b2 = get(m, "experts.b2");
    test_fill(b1, count_of(m, "experts.b1"), -1, 1), test_fill(b2, count_of(m, "experts.b2"), -1, 1);
    set(m, "experts.b1", b1), set(m, "experts.b2", b2);
    float *w1 = get(m, "experts.w1"), *w2 = get(m, "experts.w2");
    b1 = get(m, "experts.b1"), b2 = get(m, "experts.b2");
    tokens(T);
    for (size_t c = 0; c < D; c++) x[c] = 3, x[D + c] *= 1e-3f; /* without variance, and with as little as the 1e-5 */
    for (int evaluate = 0; evaluate < 2; evaluate++) {
        const moe_tape *t = go(m, T, evaluate);
        for (size_t i = 0; i < T; i++) {
            size_t e = (size_t)t->index[i];
            double mean = 0, square = 0, alpha = sigmoid(linear(m, i, e)), out[D];
            for (size_t c = 0; c < D; c++) mean += (double)x[i * D + c] / D;
            for (size_t c = 0; c < D; c++) square += pow((double)x[i * D + c] - mean, 2) / D;
            for (size_t c = 0; c < D; c++) out[c] = (double)b2[e * D + c];
            for (size_t k = 0; k < F; k++) {
                double h = (double)b1[e * F + k];
                for (size_t c = 0; c < D; c++)
                    h += ((double)x[i * D + c] - mean) / sqrt(square + 1e-5) * (double)w1[(e * D + c) * F + k];
                for (size_t c = 0; c < D; c++) out[c] += fmax(h, 0) * (double)w2[(e * F + k) * D + c];
            }
            for (size_t c = 0; c < D; c++) /* the router sees the raw token; a f(x) + (1 - a) x, less x, is the rest */
                CHECK_WITHIN(y[i * D + c], alpha * out[c], 1e-6);
        }
    }
    free(w1), free(w2), free(b1), free(b2);
    moe_layer_free(m);
    everywhere("expert_norm=true expert=relu bias=true");
    everywhere("expert_norm=true input_scale=2 combine=merge select=all n_shared=1");
    refused("expert_norm=true combine=soft select=all", MOE_E_EXPERT_NORM);
    refused("expert_norm=true n_copy=1", MOE_E_EXPERT_NORM);
    refused("expert_norm=true n_codes=9", MOE_E_EXPERT_NORM);
    /* level 2: the experts may run twice on one routing */
    moe_desc d = row_desc(NULL, "expert_norm=true input_scale=3");
    moe_tape *tape = NULL;
    size_t n = 0, r = 0;
    CHECK_OK(moe_experts_count(&d, &n));
    CHECK_OK(moe_router_count(&d, &r));
    float *params = test_floats(n), *router = test_floats(r);
    static float once[T * D];
    test_fill(params, n, -1, 1), test_fill(router, r, -1, 1);
    if (!CHECK_OK(moe_tape_new(&tape, &d, T, MOE_OFF))) return;
    CHECK_OK(moe_route(tape, router, x, T));
    CHECK_OK(moe_experts_forward(tape, params, once));
    CHECK_OK(moe_experts_forward(tape, params, y));
    CHECK_SAME(y, once, T * D);
    moe_tape_free(tape);
    free(params), free(router);
}

/* ---- torchscale's X-MoE: the reduced token is not scaled to length 1, the gate is a softmax ---- */
static void test_half_cosine(void) {
    moe_layer *m = row(NULL, "score=half-cosine top_k=1 gate=softmax router_init=orthogonal router_gain=0.32");
    if (!m) return;
    CHECK(count_of(m, "router") == 16 * E && count_of(m, "router.proj") == D * 16);
    CHECK(!count_of(m, "router.bias") && !count_of(m, "router.proj_bias"));
    scale(m, "router.proj", 3);
    float *W = get(m, "router.proj"), *R = get(m, "router");
    for (size_t i = 0; i < 16 * E; i++) R[i] *= 0.2f + (float)(i % E); /* of any length */
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", R, 16 * E));
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    double longest = 0;
    for (size_t i = 0; i < T; i++) {
        double z[E], all = 0;
        for (size_t e = 0; e < E; e++) {
            double dot = 0, square = 0;
            for (size_t k = 0; k < 16; k++) {
                double h = 0, w = (double)R[k * E + e];
                for (size_t c = 0; c < D; c++) h += (double)x[i * D + c] * (double)W[c * 16 + k];
                dot += h * w, square += w * w;
            }
            z[e] = dot / sqrt(square);
            longest = fmax(longest, fabs(z[e]));
            CHECK_WITHIN(t->logits[i * E + e], z[e], 4e-6);
        }
        for (size_t e = 0; e < E; e++) all += exp(z[e] - z[t->index[i]]);
        CHECK(holds_best(t, i, t->logits + i * E, E, 1));
        CHECK_WITHIN(t->weight[i], 1 / all, 1e-6);
    }
    CHECK(longest > 1.5); /* a cosine could not */
    free(W), free(R);
    moe_layer_free(m);
    everywhere("score=half-cosine loss.switch=0.01");
    everywhere("score=half-cosine d_router=40 router_bias=true gate=sigmoid");
}

/* ---- torchscale's policy `sampling`: the second expert is drawn, by p among those that are not the first ---- */

static void test_gumbel_second(void) {
    enum { N = MAX_TOKENS };
    static const char *const fields[] = {"top_k=2", "top_k=2 temperature=0.5", "top_k=3"};
    for (size_t n = 0; n < 3; n++) {
        char more[96];
        snprintf(more, sizeof more, "select=gumbel gate=softmax normalize=true %s", fields[n]);
        moe_layer *m = row(NULL, more);
        if (!m) return;
        size_t k = moe_layer_desc(m)->top_k, first = 0, count[E] = {0};
        scale(m, "router", 2);
        tokens(1);
        for (size_t i = D; i < N * D; i++) x[i] = x[i - D]; /* one token, many times */
        const moe_tape *t = go(m, N, 0);
        const float *p = t->prob;
        double chi = 0, rest = 0;
        for (size_t e = 0; e < E; e++) first = p[e] > p[first] ? e : first;
        for (size_t e = 0; e < E; e++) rest += e == first ? 0 : (double)p[e];
        for (size_t i = 0; i < N; i++) {
            const int32_t *index = t->index + i * k;
            double sum = 0;
            CHECK(index[0] == (int32_t)first && index[1] != index[0]);
            if (k == 3) CHECK(index[2] != index[0] && index[2] != index[1]);
            for (size_t j = 0; j < k; j++) sum += (double)p[index[j]];
            for (size_t j = 0; j < k; j++) CHECK_WITHIN(t->weight[i * k + j], (double)p[index[j]] / sum, 6e-7);
            count[index[1]]++;
        }
        for (size_t e = 0; e < E; e++) {
            double want = N * (double)p[e] / rest;
            if (e == first) CHECK(count[e] == 0);
            else chi += ((double)count[e] - want) * ((double)count[e] - want) / want;
        }
        CHECK(chi < 6 + 4.5 * sqrt(2 * 6.0)); /* six degrees of freedom */
        t = go(m, N, 1); /* evaluation: plainly the highest */
        CHECK(holds_best(t, 0, t->logits, E, k) && holds_best(t, N - 1, t->logits, E, k));
        moe_layer_free(m);
    }
    everywhere("select=gumbel top_k=3");
    everywhere("select=gumbel route_sequence=true gate=sigmoid");
    refused("select=gumbel threshold=0.5", MOE_E_THRESHOLD);
    moe_layer *m = row(NULL, "select=gumbel route_sequence=true");
    if (!m) return;
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    for (size_t i = 0; i < T * 2; i++) /* a sequence goes one way */
        CHECK(t->index[i] == t->index[i / 2 / SEQ * SEQ * 2 + i % 2]);
    moe_layer_free(m);
}

/* ---- capacity in each sequence: as if each came alone ---- */
static void test_capacity_sequence(void) {
    static const char *const orders[] = {"token", "choice", "weight", "pair"};
    static float whole[T * D], z[T * D];
    for (size_t n = 0; n < sizeof orders / sizeof *orders; n++) {
        char more[160];
        snprintf(more, sizeof more, "n_experts=4 sequence=12 capacity_factor=0.7 capacity_sequence=true "
                 "capacity_order=%s", orders[n]);
        moe_layer *m = row(NULL, more);
        if (!m) return;
        scale(m, "router", 3);
        tokens(T);
        const moe_tape *t = go(m, T, 0);
        size_t dropped = t->routes.n_dropped, each = 0;
        memcpy(whole, y, sizeof whole);
        if (n == 0) /* an expert takes the first int(0.7 2 ceil(12 / 4)) = 4 pairs of a sequence */
            for (size_t e = 0; e < 4; e++)
                for (size_t i = 0, taken = 0; i < T * 2; i++) {
                    if (i % 24 == 0) taken = 0;
                    if (t->index[i] != (int32_t)e) continue;
                    CHECK((t->routes.slot[i] != MOE_NONE) == (taken < 4));
                    taken++;
                }
        CHECK(dropped > 0);
        memcpy(z, x, T * D * sizeof *x);
        for (size_t t0 = 0; t0 < 36; t0 += 12) {
            memcpy(x, z + t0 * D, 12 * D * sizeof *x);
            each += go(m, 12, 0)->routes.n_dropped;
            CHECK_SAME(y, whole + t0 * D, 12 * D);
        }
        CHECK(each <= dropped && each > 0);
        moe_layer_free(m);
    }
    everywhere("sequence=8 capacity_factor=0.5 capacity_sequence=true capacity_order=choice n_experts=4");
    moe_layer *m = row(NULL, "n_experts=4 sequence=0 capacity_factor=0.7 capacity_sequence=true");
    moe_layer *plain = row(NULL, "n_experts=4 sequence=0 capacity_factor=0.7");
    if (!m || !plain) return;
    tokens(T);
    go(m, T, 0);
    memcpy(whole, y, sizeof whole);
    go(plain, T, 0);
    CHECK_SAME(whole, y, T * D); /* the batch is one sequence */
    moe_layer_free(m), moe_layer_free(plain);
}

int main(void) {
    RUN(test_router_bias);
    RUN(test_shared_gate);
    RUN(test_group_best);
    RUN(test_activations);
    RUN(test_moepp);
    RUN(test_half_cosine);
    RUN(test_capacity_sequence);
    RUN(test_gumbel_second);
    RUN(test_expert_norm);
    return test_end();
}
