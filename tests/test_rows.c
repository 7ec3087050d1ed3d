/* Each row of the table of systems has the property that defines it; bad input for every score and select; running out of
 * memory; saving and loading. Expected values come from the source's formula, in double, not from the library's own stages. */
#define MOE_IMPLEMENTATION
#define TEST_ALLOCATOR
#include "test.h"

enum { D = 16, F = 6, E = 8, SEQ = 4, MAX_TOKENS = 4096 };
static float x[MAX_TOKENS * D], y[MAX_TOKENS * D], dy[MAX_TOKENS * D], z[MAX_TOKENS * D];

/* ---- helpers ---- */
static moe_desc row_desc(const char *name, const char *more) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.sequence = SEQ, d.seed = 7;
    if (name) CHECK_OK(moe_desc_system(&d, name));
    if (!CHECK_OK(moe_desc_parse(&d, more, NULL))) printf("        %s\n", more);
    return d;
}
static moe_layer *row(const char *name, const char *more) {
    moe_desc d = row_desc(name, more);
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_layer_new(&m, &d))) printf("        %s %s\n", name ? name : "", more);
    return m;
}
static size_t count_of(const moe_layer *m, const char *name) { /* 0: no such tensor */
    moe_tensor t;
    for (size_t i = 0; i < moe_layer_tensors(m); i++) {
        CHECK_OK(moe_layer_tensor(m, i, &t));
        if (!strcmp(t.name, name)) return t.count;
    }
    return 0;
}
static float *get(const moe_layer *m, const char *name) {
    size_t n = count_of(m, name);
    float *p = test_floats(n);
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, name, p, n));
    return p;
}
static void set(moe_layer *m, const char *name, float *p) { /* p is freed */
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, name, p, count_of(m, name)));
    free(p);
}
static void scale(moe_layer *m, const char *name, float by) {
    float *p = get(m, name);
    for (size_t i = 0; i < count_of(m, name); i++) p[i] *= by;
    set(m, name, p);
}
/* Tokens whose last number is 1, so that a linear router can be given any mean logits. */
static void tokens(size_t n) {
    test_fill(x, n * D, -1, 1);
    for (size_t t = 0; t < n; t++) x[t * D + D - 1] = 1;
    test_fill(dy, n * D, -1, 1);
}
static void lean(moe_layer *m, size_t e, float amount) { /* logit e of every token of tokens() += amount */
    float *p = get(m, "router");
    p[(D - 1) * moe_layer_desc(m)->n_experts + e] += amount;
    set(m, "router", p);
}
static const moe_tape *go(moe_layer *m, size_t n, int evaluate) {
    moe_layer_side(m)->evaluate = evaluate;
    CHECK_OK(moe_forward(m, x, n, y));
    return moe_layer_tape(m);
}
static void back_and_step(moe_layer *m, float lr) {
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_step(m, lr));
}
/* out (n, d) = expert e of m alone, on in (n, d); with `weights` (experts) e is ignored: the weighted mean of the parameters */
static void network(const moe_layer *m, size_t e, const float *weights, const float *in, size_t n, float *out) {
    static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2", "experts.b1", "experts.bu", "experts.b2"};
    const moe_desc *from = moe_layer_desc(m);
    size_t F_ = from->n_experts - from->n_zero - from->n_copy - from->n_constant + from->n_shared;
    moe_desc d;
    moe_layer *one = NULL;
    memset(&d, 0, sizeof d);
    d.d_model = from->d_model, d.d_ff = from->d_ff, d.expert = from->expert, d.bias = from->bias, d.n_experts = 1;
    if (!CHECK_OK(moe_layer_new(&one, &d))) return;
    for (size_t i = 0; i < 6; i++) {
        size_t c = count_of(one, names[i]);
        if (!c) continue;
        float *all = get(m, names[i]), *p = test_floats(c);
        for (size_t k = 0; k < c; k++) {
            double sum = 0;
            for (size_t g = 0; weights && g < F_; g++) sum += (double)weights[g] * (double)all[g * c + k];
            p[k] = weights ? (float)sum : all[e * c + k];
        }
        set(one, names[i], p);
        free(all);
    }
    CHECK_OK(moe_forward(one, in, n, out));
    moe_layer_free(one);
}
static double largest(const float *a, const float *b, size_t n) { /* of |a - b|; b NULL: of |a| */
    double most = 0;
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs((double)a[i] - (b ? (double)b[i] : 0)));
    return most;
}
static double sigmoid(double v) { return 1 / (1 + exp(-v)); }
/* z_e of a linear router, in double */
static double linear(const moe_layer *m, size_t t, size_t e) {
    float *R = get(m, "router");
    double sum = 0;
    for (size_t i = 0; i < D; i++) sum += (double)x[t * D + i] * (double)R[i * moe_layer_desc(m)->n_experts + e];
    free(R);
    return sum;
}
/* index of token t holds the n highest of v (E), best first, and nothing else */
static int holds_best(const moe_tape *tape, size_t t, const float *v, size_t experts, size_t n) {
    const int32_t *index = tape->index + t * tape->n_slots;
    for (size_t i = 0; i < tape->n_slots; i++) {
        if (i >= n) {
            if (index[i] >= 0) return 0;
            continue;
        }
        if (index[i] < 0) return 0;
        for (size_t e = 0; e < experts; e++) {
            int before = 0;
            for (size_t l = 0; l < i; l++) before |= index[l] == (int32_t)e;
            if (before || (int32_t)e == index[i]) continue;
            if (v[e] > v[index[i]] || (v[e] == v[index[i]] && (int32_t)e < index[i])) return 0;
        }
    }
    return 1;
}
static size_t kept(const moe_tape *t, size_t e) { return t->routes.begin[e + 1] - t->routes.begin[e]; }

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
        for (size_t i = 0; i < D; i++) CHECK_WITHIN(y[t * D + i], out[i], 1e-6);
    }
    free(w1), free(wu), free(w2);
    moe_layer_free(m);
}

/* ---- softmax and top-k ---- */
static void test_softmax_topk(void) {
    enum { T = 40 };
    moe_layer *raw = row("softmax-topk", ""), *mixtral = row("mixtral", "");
    if (!raw || !mixtral) return;
    tokens(T);
    const moe_tape *a = go(raw, T, 0), *b = go(mixtral, T, 0);
    CHECK_SAME(a->logits, b->logits, T * E); /* the same router: only the weights differ */
    for (size_t t = 0; t < T; t++) {
        double p[2], all = 0, z0 = (double)a->logits[t * E + (size_t)a->index[t * 2]];
        CHECK(holds_best(a, t, a->logits + t * E, E, 2));
        for (size_t e = 0; e < E; e++) all += exp((double)a->logits[t * E + e] - z0);
        for (size_t i = 0; i < 2; i++) {
            p[i] = exp((double)a->logits[t * E + (size_t)a->index[t * 2 + i]] - z0) / all;
            CHECK(a->index[t * 2 + i] == b->index[t * 2 + i]);
            CHECK_NEAR(a->weight[t * 2 + i], p[i], 1e-6);
        }
        CHECK(a->weight[t * 2] + a->weight[t * 2 + 1] < 0.9f);
        for (size_t i = 0; i < 2; i++) CHECK_NEAR(b->weight[t * 2 + i], p[i] / (p[0] + p[1]), 1e-6);
        CHECK_NEAR(b->weight[t * 2] + b->weight[t * 2 + 1], 1, 1e-6);
    }
    moe_layer_free(raw), moe_layer_free(mixtral);
}

/* ---- Switch: one expert, exact capacity in token order, 0 for what is dropped, jitter ---- */
static void test_switch(void) {
    enum { T = 61, CAPACITY = 10 }; /* (size_t)(1.25 * ceil(61 / 8)) */
    moe_layer *m = row("switch", "");
    if (!m) return;
    tokens(T);
    lean(m, 3, 1);
    const moe_tape *t = go(m, T, 1);
    size_t seen[E] = {0}, dropped = 0;
    CHECK(t->n_slots == 1);
    for (size_t i = 0; i < T; i++) {
        size_t e = (size_t)t->index[i];
        int keep = seen[e]++ < CAPACITY;
        CHECK(holds_best(t, i, t->logits + i * E, E, 1));
        CHECK((t->routes.slot[i] != MOE_NONE) == keep);
        CHECK(keep ? largest(y + i * D, NULL, D) > 0 : largest(y + i * D, NULL, D) == 0);
        if (!keep) { dropped++; continue; }
        float out[D];
        network(m, e, NULL, x + i * D, 1, out);
        double p = 0;
        for (size_t k = 0; k < E; k++) p += exp((double)t->logits[i * E + k] - (double)t->logits[i * E + e]);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], (double)out[c] / p, 2e-6);
    }
    CHECK(dropped > 5 && t->routes.n_dropped == dropped && kept(t, 3) == CAPACITY);
    for (size_t e = 0; e < E; e++) CHECK(kept(t, e) == (seen[e] < CAPACITY ? seen[e] : CAPACITY));
    /* jitter: x is times something in [0.99, 1.01) */
    float clean[T * E], first[T * E];
    memcpy(clean, t->logits, sizeof clean);
    for (size_t i = 0; i < T; i++)
        for (size_t e = 0; e < E; e++) CHECK_WITHIN(clean[i * E + e], linear(m, i, e), 1e-6);
    memcpy(first, go(m, T, 0)->logits, sizeof first);
    t = go(m, T, 0);
    CHECK(largest(t->logits, first, T * E) > 1e-4); /* new numbers every time */
    float *R = get(m, "router");
    double used = 0;
    for (size_t i = 0; i < T; i++)
        for (size_t e = 0; e < E; e++) {
            double most = 1e-6, off = fabs((double)first[i * E + e] - (double)clean[i * E + e]);
            for (size_t c = 0; c < D; c++) most += 0.01 * fabs((double)x[i * D + c] * (double)R[c * E + e]);
            CHECK(off <= most);
            used = fmax(used, off / most);
        }
    CHECK(used > 0.3); /* and it does use its room */
    free(R);
    moe_layer_free(m);
}

/* ---- GShard: the second choice at random, first choices before it ---- */
static void test_gshard(void) {
    enum { T = 2000 };
    moe_layer *m = row("gshard", "capacity_factor=off");
    if (!m) return;
    tokens(T);
    scale(m, "router", 4);
    const moe_tape *t = go(m, T, 1);
    for (size_t i = 0; i < T; i++) CHECK(t->index[i * 2] >= 0 && t->index[i * 2 + 1] >= 0);
    float second[T];
    for (size_t i = 0; i < T; i++) second[i] = t->prob[i * E + (size_t)t->index[i * 2 + 1]];
    uint64_t before = 0;
    for (int round = 0; round < 3; round++) {
        double n[2] = {0}, expected[2] = {0}, variance[2] = {0};
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i++) { /* small and large probabilities apart */
            double q = fmin(1, 2 * (double)second[i]);
            int large = second[i] > 0.25f, stays = t->index[i * 2 + 1] >= 0;
            n[large] += stays, expected[large] += q, variance[large] += q * (1 - q);
            CHECK(t->index[i * 2] >= 0);
            CHECK_NEAR(t->weight[i * 2] + (stays ? t->weight[i * 2 + 1] : 0), 1, 1e-6); /* renormalised over what stays */
        }
        CHECK(variance[0] > 20 && variance[1] > 20);
        for (int large = 0; large < 2; large++) CHECK(fabs(n[large] - expected[large]) < 4.5 * sqrt(variance[large]));
        uint64_t hash = moe_hash(1, t->index, T * 2 * sizeof *t->index);
        CHECK(hash != before);
        before = hash;
    }
    moe_layer_free(m);
    m = row("gshard", "random_second=false");
    if (!m) return;
    enum { N = 64, CAPACITY = 16 }; /* 2 * ceil(64 / 8) */
    scale(m, "router", 2);
    lean(m, 2, 1);
    t = go(m, N, 0);
    size_t overtaken = 0;
    for (size_t e = 0; e < E; e++) {
        size_t have[2] = {0}, refused[2] = {0}, last_first = 0, first_refused = N;
        for (size_t i = 0; i < N; i++)
            for (size_t k = 0; k < 2; k++) {
                if (t->index[i * 2 + k] != (int32_t)e) continue;
                int stays = t->routes.slot[i * 2 + k] != MOE_NONE;
                have[k] += (size_t)stays, refused[k] += (size_t)!stays;
                if (k && !stays && first_refused == N) first_refused = i;
                if (!k && stays) last_first = i;
            }
        CHECK(have[0] + have[1] <= CAPACITY);
        CHECK(!refused[0] || !have[1]);                                    /* no second choice while a first one waits */
        CHECK(!(refused[0] + refused[1]) || have[0] + have[1] == CAPACITY); /* nobody is refused while there is room */
        overtaken += refused[1] && last_first > first_refused;
    }
    CHECK(overtaken > 0); /* a later token's first choice went before an earlier token's second */
    moe_layer_free(m);
}

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
        for (size_t e = 0; e < E; e++) CHECK_WITHIN(t->logits[i * E + e], linear(m, i, e), 1e-6); /* none in evaluation */
    for (int round = 0; round < ROUNDS; round++) {
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i++)
            for (size_t e = 0; e < E; e++, n++) {
                double raw = 0;
                for (size_t c = 0; c < D; c++) raw += (double)x[i * D + c] * (double)W[c * E + e];
                double g = ((double)t->logits[i * E + e] - (double)t->clean[i * E + e]) / log(1 + exp(raw));
                for (int k = 1; k < 5; k++) moment[k] += pow(g, k);
            }
    }
    CHECK(fabs(moment[1] / n) < 4.5 / sqrt(n));             /* of N(0, 1): 0, 1, 0, 3, */
    CHECK(fabs(moment[2] / n - 1) < 4.5 * sqrt(2 / n));     /* whose means over n have these variances */
    CHECK(fabs(moment[3] / n) < 4.5 * sqrt(15 / n));
    CHECK(fabs(moment[4] / n - 3) < 4.5 * sqrt(96 / n));
    for (size_t i = 0; i < T; i++) CHECK(holds_best(t, i, t->logits + i * E, E, 2)); /* the choice is by the noisy logits */
    free(W);
    moe_layer_free(m);
}

/* ---- expert choice ---- */
static void test_expert_choice(void) {
    moe_layer *m = row("expert-choice", "");
    if (!m) return;
    tokens(64);
    lean(m, 1, 3);
    const size_t counts[][2] = {{64, 16}, {50, 12}, {7, 1}}; /* T and (size_t)(T k / E) */
    for (size_t c = 0; c < 3; c++) {
        size_t T = counts[c][0];
        const moe_tape *t = go(m, T, 0);
        CHECK(t->n_slots == E && t->routes.n_dropped == 0);
        for (size_t e = 0; e < E; e++) {
            CHECK(kept(t, e) == counts[c][1]);
            double least = 2, most = -1;
            for (size_t i = 0; i < T; i++) {
                double p = (double)t->prob[i * E + e];
                int taken = 0;
                for (size_t r = t->routes.begin[e]; r < t->routes.begin[e + 1]; r++)
                    if (t->routes.token[r] == i) {
                        taken = 1;
                        CHECK_BITS(t->routes.weight[r], t->prob[i * E + e]);
                    }
                if (taken) least = fmin(least, p);
                else most = fmax(most, p);
            }
            CHECK(least >= most); /* it took its highest */
        }
    }
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
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c], 2e-6);
    }
    float *w2 = get(m, "experts.w2");
    memset(w2, 0, E * F * D * sizeof *w2); /* of the routed experts */
    set(m, "experts.w2", w2);
    for (size_t e = 0; e < E; e += 3) { /* whatever the router, what is left is the shared expert */
        lean(m, e, 20);
        go(m, T, 0);
        for (size_t i = 0; i < T * D; i++) CHECK_WITHIN(y[i], z[i], 1e-6);
    }
    moe_layer_free(m);
}

static void test_deepseek_v3(void) {
    enum { T = 200, GROUPS = 4, WIDE = E / GROUPS };
    moe_layer *m = row("deepseek-v3", "");
    if (!m) return;
    tokens(T);
    float *bias = moe_layer_control(m)->bias, *R = get(m, "router");
    size_t changed = 0;
    int32_t plain[T * 2];
    memcpy(plain, go(m, T, 0)->index, sizeof plain);
    for (int round = 0; round < 5; round++) {
        for (size_t e = 0; e < E; e++) bias[e] = round ? test_uniform(-0.3f, 0.3f) : 0;
        if (round == 4) bias[5] = 9;
        const moe_tape *t = go(m, T, 0);
        for (size_t i = 0; i < T; i++) {
            double s[E], b[E], group[GROUPS], sum = 0, total = 0;
            size_t rank[GROUPS] = {0};
            for (size_t e = 0; e < E; e++) {
                s[e] = 0;
                for (size_t c = 0; c < D; c++) s[e] += (double)x[i * D + c] * (double)R[c * E + e];
                s[e] = sigmoid(s[e]);
                b[e] = s[e] + (double)bias[e];
            }
            for (size_t g = 0; g < GROUPS; g++) group[g] = b[g * WIDE] + b[g * WIDE + 1];
            for (size_t g = 0; g < GROUPS; g++)
                for (size_t o = 0; o < GROUPS; o++) rank[g] += group[o] > group[g];
            for (size_t k = 0; k < 2; k++) sum += s[t->index[i * 2 + k]];
            for (size_t k = 0; k < 2; k++) {
                size_t e = (size_t)t->index[i * 2 + k];
                CHECK(rank[e / WIDE] < 2);                                         /* of the two best groups */
                for (size_t o = 0; o < E; o++)                                      /* none of these experts is better and left out */
                    CHECK(rank[o / WIDE] >= 2 || b[o] <= b[e] || (int32_t)o == t->index[i * 2] || (int32_t)o == t->index[i * 2 + 1]);
                CHECK_NEAR(t->weight[i * 2 + k], 2.5 * s[e] / sum, 1e-6);          /* weights are of the scores without the bias */
                total += (double)t->weight[i * 2 + k];
                changed += t->index[i * 2 + k] != plain[i * 2 + k];
            }
            CHECK_NEAR(total, 2.5, 1e-6);
            if (round == 4) CHECK(t->index[i * 2] == 5);
        }
        if (!round) CHECK(changed == 0);
    }
    CHECK(changed > T);
    /* the bias moves against the load, and only in moe_step */
    for (size_t e = 0; e < E; e++) bias[e] = 0.01f * (float)e;
    float old[E];
    memcpy(old, bias, sizeof old);
    const moe_tape *t = go(m, T, 0);
    uint64_t load[E];
    memcpy(load, t->routes.load, sizeof load);
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_SAME(bias, old, E);
    CHECK_OK(moe_step(m, 0));
    size_t up = 0, down = 0;
    for (size_t e = 0; e < E; e++) {
        double sign = load[e] * E < 2 * T ? 1 : load[e] * E > 2 * T ? -1 : 0;
        up += sign > 0, down += sign < 0;
        CHECK_WITHIN(bias[e], (double)old[e] + 0.001 * sign, 1e-8);
    }
    CHECK(up && down);
    memcpy(old, bias, sizeof old); /* a forward in evaluation, or one without backward, is not counted */
    go(m, T, 1);
    CHECK_OK(moe_step(m, 0));
    CHECK_SAME(bias, old, E);
    free(R);
    moe_layer_free(m);
}

/* ---- a number of experts that varies ---- */
static void test_top_p(void) {
    enum { T = 300 };
    moe_layer *m = row("top-p", "");
    if (!m) return;
    tokens(T);
    scale(m, "router", 3);
    const moe_tape *t = go(m, T, 0);
    size_t sizes[E + 1] = {0};
    for (size_t i = 0; i < T; i++) {
        size_t n = 0;
        double sum = 0;
        while (n < E && t->index[i * E + n] >= 0) n++;
        sizes[n]++;
        CHECK(n > 0 && holds_best(t, i, t->prob + i * E, E, n));
        for (size_t k = 0; k < n; k++) {
            double p = (double)t->prob[i * E + (size_t)t->index[i * E + k]];
            CHECK(sum <= (double)0.4f + 1e-6); /* without the last it is not above p */
            sum += p;
            CHECK_BITS(t->weight[i * E + k], t->prob[i * E + (size_t)t->index[i * E + k]]); /* not renormalised */
        }
        CHECK(sum > (double)0.4f - 1e-6);
    }
    CHECK(sizes[1] && sizes[2] && sizes[3]);
    moe_layer_free(m);
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
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c], 1e-6);
    }
    CHECK(per[2] && per[3] && per[4] && per[5]); /* their number varies */
    /* lambda: up by the factor while too few are zero, down while too many are */
    CHECK(1 - (double)active / (T * E) < 1 - 2.0 / E);
    CHECK_NEAR(moe_layer_control(m)->coefficient[0] / 1e-8f, 1, 1e-6);
    back_and_step(m, 0);
    CHECK_NEAR(moe_layer_control(m)->coefficient[0] / 1.2e-8f, 1, 1e-6);
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
    CHECK_NEAR(moe_layer_control(m)->coefficient[0] / 1e-8f, 1, 1e-6);
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
            CHECK_NEAR(t->weight[i * E + k], 1.0 / (double)n, 1e-6); /* the mean over the active */
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
    moe_layer *m = row("moe++", "");
    if (!m) return;
    tokens(T);
    only(m, ZERO, 1);
    const moe_tape *t = go(m, T, 0);
    size_t rows = 0;
    for (size_t g = 0; g < t->memory->n_groups; g++) rows += t->memory->group[g].rows;
    CHECK(rows == T); /* the networks' work: expert 1 alone, though each token has two routes */
    CHECK(kept(t, ZERO) == T && kept(t, 1) == T);
    network(m, 1, NULL, x, T, z);
    for (size_t i = 0; i < T; i++) CHECK(t->weight[i * 2] == 0 && t->weight[i * 2 + 1] == 1 && t->index[i * 2] == ZERO);
    for (size_t i = 0; i < T * D; i++) CHECK_WITHIN(y[i], z[i], 1e-6);
    only(m, COPY, ZERO);
    t = go(m, T, 0);
    CHECK_SAME(y, x, T * D);
    for (size_t g = 0, n = 0; g <= t->memory->n_groups; g++) {
        if (g == t->memory->n_groups) CHECK(n == 0);
        else n += t->memory->group[g].rows;
    }
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
            for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], a * (double)x[i * D + c] + (1 - a) * (double)v[n * D + c], 1e-6);
        }
        CHECK(low < 0.4 && high > 0.6);
    }
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
    double chi = 0, expected = (double)T * ROUNDS / (E * (E - 1));
    for (size_t a = 0; a < E; a++)
        for (size_t b = 0; b < E; b++)
            if (a != b) chi += (pair[a][b] - expected) * (pair[a][b] - expected) / expected;
    CHECK(chi < 55 + 4.5 * sqrt(2 * 55.0)); /* 56 - 1 degrees of freedom */
    moe_layer_free(m);
}

/* ---- balanced over the batch ---- */
static void test_sinkhorn(void) {
    enum { T = 256 };
    moe_layer *m = row("sinkhorn", "");
    if (!m) return;
    tokens(T);
    lean(m, 6, 1.5f), lean(m, 1, 0.7f);
    const moe_tape *t = go(m, T, 1);
    uint64_t most = 0;
    for (size_t i = 0; i < T; i++) CHECK(holds_best(t, i, t->logits + i * E, E, 1)); /* plain top-1 */
    CHECK(t->routes.load[6] > 4 * T / E);
    t = go(m, T, 0);
    for (size_t e = 0; e < E; e++) most = t->routes.load[e] > most ? t->routes.load[e] : most;
    CHECK(most <= T / E + T / E / 2); /* the plan is even; its highest entries are nearly so */
    for (size_t i = 0; i < T; i++) CHECK_NEAR(t->weight[i], sigmoid((double)t->logits[i * E + (size_t)t->index[i]]), 1e-6);
    moe_layer_free(m);
}

static void test_base(void) {
    enum { T = 64 };
    moe_layer *m = row("base", ""), *twin = row("base", "");
    if (!m || !twin) return;
    tokens(T);
    go(m, T, 0);
    CHECK(largest(y, NULL, T * D) == 0); /* the last matrices begin at 0 */
    go(twin, T, 0);
    float *R = get(m, "router"), *w2 = get(m, "experts.w2");
    for (size_t a = 0; a < E; a++)
        for (size_t b = 0; b < E; b++) { /* centroids orthogonal, of length 0.1 */
            double dot = 0;
            for (size_t c = 0; c < D; c++) dot += (double)R[c * E + a] * (double)R[c * E + b];
            CHECK_WITHIN(dot, a == b ? 0.01 : 0, 1e-7);
        }
    free(R);
    test_fill(w2, count_of(m, "experts.w2"), -1, 1);
    CHECK_OK(moe_layer_set(twin, MOE_PART_PARAMS, "experts.w2", w2, count_of(m, "experts.w2")));
    set(m, "experts.w2", w2);
    lean(m, 2, 1), lean(twin, 2, 1);
    const moe_tape *t = go(m, T, 0);
    go(twin, T, 0);
    size_t second_best = 0;
    for (size_t e = 0; e < E; e++) CHECK(t->routes.load[e] == T / E && kept(t, e) == T / E);
    for (size_t i = 0; i < T; i++) {
        second_best += !holds_best(t, i, t->logits + i * E, E, 1);
        CHECK_NEAR(t->weight[i], sigmoid((double)t->logits[i * E + (size_t)t->index[i]]), 1e-6);
        network(m, (size_t)t->index[i], NULL, x + i * D, 1, z);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], (double)t->weight[i] * (double)z[c], 2e-6);
    }
    CHECK(second_best > T / 2);
    /* what does not fit changes nothing */
    uint64_t hash = moe_layer_hash(m);
    moe_layer_side(m)->evaluate = 0;
    for (size_t i = 0; i < T * D; i++) y[i] = 7;
    CHECK_STATUS(moe_forward(m, x, T - 4, y), MOE_E_UNEVEN);
    for (size_t i = 0; i < T * D; i++) CHECK(y[i] == 7);
    CHECK_STATUS(moe_backward(m, dy, NULL), MOE_E_NO_FORWARD);
    CHECK(moe_layer_hash(m) == hash);
    go(m, T, 0), go(twin, T, 0);
    back_and_step(m, 0.01f), back_and_step(twin, 0.01f);
    CHECK(moe_layer_hash(m) == moe_layer_hash(twin) && moe_layer_hash(m) != hash);
    t = go(m, T - 4, 1); /* evaluation takes any number, each token its highest */
    for (size_t i = 0; i < T - 4; i++) CHECK(holds_best(t, i, t->logits + i * E, E, 1));
    CHECK(t->routes.load[2] > 2 * T / E);
    moe_layer_free(m), moe_layer_free(twin);
}

/* ---- soft slots ---- */
static void test_soft_moe(void) {
    enum { T = 24, N = 2 * E, LONG = 6 };
    moe_layer *m = row("soft-moe", "soft_slots=2 sequence=6");
    if (!m) return;
    tokens(T);
    const moe_tape *t = go(m, T, 0);
    for (size_t i = 0; i < T; i++) {
        double sum = 0;
        for (size_t n = 0; n < N; n++) sum += (double)t->memory->mix[i * N + n];
        CHECK_NEAR(sum, 1, 1e-6); /* a token's mixture of the slots */
    }
    for (size_t s = 0; s < T; s += LONG)
        for (size_t n = 0; n < N; n++) {
            double sum = 0;
            for (size_t i = s; i < s + LONG; i++) sum += (double)t->memory->dispatch[i * N + n];
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
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], old[from * D + c], 1e-6);
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

int main(void) {
    RUN(test_dense);
    RUN(test_softmax_topk);
    RUN(test_switch);
    RUN(test_gshard);
    RUN(test_noisy_topk);
    RUN(test_expert_choice);
    RUN(test_deepseek_moe);
    RUN(test_deepseek_v3);
    RUN(test_top_p);
    RUN(test_remoe);
    RUN(test_dynmoe);
    RUN(test_moepp);
    RUN(test_hash);
    RUN(test_random);
    RUN(test_sinkhorn);
    RUN(test_base);
    RUN(test_soft_moe);
    CHECK(test_live_blocks == 0);
    return test_end();
}
