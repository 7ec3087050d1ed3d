/* Each row of the table of systems has the property that defines it; bad input for every score and select; running out of
 * memory; saving and loading. Expected values come from the source's formula, in double, not from the library's own stages. */
#define MOE_IMPLEMENTATION
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
    memcpy(before, go(m, T, 1)->index, sizeof before);
    CHECK(!memcmp(before, go(m, T, 1)->index, sizeof before)); /* evaluation can be repeated */
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

/* ---- SparseMixer: samples of the softmax over what is not masked ---- */
/* p (E): of choice number `i` of a token whose logits are v, when `first` (or -1) is gone */
static void sparse_softmax(const double *v, int first, double *p) {
    double top = -INFINITY, sum = 0;
    for (int e = 0; e < E; e++)
        if (e != first) top = fmax(top, v[e]);
    for (int e = 0; e < E; e++) {
        p[e] = e == first || (top - v[e]) / fmax(fabs(v[e]), top) > 0.2 ? 0 : exp(v[e] - top);
        sum += p[e];
    }
    for (int e = 0; e < E; e++) p[e] /= sum;
}
static double chi_square(const double *count, const double *p, double n, double *freedom) { /* -1: something that cannot be was */
    double chi = 0;
    *freedom = -1;
    for (size_t e = 0; e < E; e++) {
        if (p[e] == 0 && count[e] > 0) return -1;
        if (p[e] > 0) chi += (count[e] - n * p[e]) * (count[e] - n * p[e]) / (n * p[e]), ++*freedom;
    }
    return chi;
}
static void test_sparsemixer(void) {
    enum { T = 4000 };
    static const double v[E] = {3.9, -1, 4, 2.9, 3.3, 0, 3.5, 3.15}; /* 0.2 * 4 = 0.8 is the most below 4: not 2.9, 3.15 */
    moe_layer *m = row("sparsemixer", "");
    if (!m) return;
    tokens(T);
    float *R = get(m, "router");
    memset(R, 0, D * E * sizeof *R);
    for (size_t e = 0; e < E; e++) R[(D - 1) * E + e] = (float)v[e];
    set(m, "router", R);
    double p[E], q[E], first[E] = {0}, second[E][E] = {{0}}, freedom, thirds = 0, full = 0, others = 0;
    sparse_softmax(v, -1, p);
    CHECK(p[0] > 0 && p[4] > 0 && p[6] > 0 && p[3] == 0 && p[7] == 0 && p[1] == 0);
    const moe_tape *t = go(m, T, 0);
    for (size_t i = 0; i < T; i++) {
        int32_t a = t->index[i * 2], b = t->index[i * 2 + 1];
        CHECK(a != b && a >= 0 && b >= 0);
        first[a]++, second[a][b]++;
        double w = (double)t->weight[i * 2] / p[a]; /* 1, or 1/3 for three quarters of those that are not the highest */
        if (a == 2) CHECK_NEAR(w, 1, 1e-5);
        else if (w > 0.9) CHECK_NEAR(w, 1, 1e-5), full++;
        else CHECK_NEAR(w, 1.0 / 3, 1e-5), thirds++;
        others += a != 2;
    }
    CHECK(fabs(full - others / 4) < 4.5 * sqrt(others * 3 / 16) && thirds > 0);
    double chi = chi_square(first, p, T, &freedom);
    CHECK(chi >= 0 && chi < freedom + 4.5 * sqrt(2 * freedom));
    for (int a = 0; a < E; a++) {
        if (first[a] < 200) continue;
        sparse_softmax(v, a, q);
        chi = chi_square(second[a], q, first[a], &freedom);
        CHECK(chi >= 0 && chi < freedom + 4.5 * sqrt(2 * freedom));
    }
    t = go(m, T, 1);
    sparse_softmax(v, 2, q);
    for (size_t i = 0; i < T; i++) { /* evaluation: the highest, then the highest of the rest */
        CHECK(t->index[i * 2] == 2 && t->index[i * 2 + 1] == 0);
        CHECK_NEAR(t->weight[i * 2], p[2], 1e-5);
        CHECK_NEAR(t->weight[i * 2 + 1], q[0], 1e-5);
    }
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
        for (size_t i = 0; i < T * E; i++) CHECK_WITHIN(t->logits[i], old[i], 2e-6);
        float *R = get(m, "router"); /* each prototype of another length */
        for (size_t i = 0; i < count_of(m, "router"); i++) R[i] *= 0.1f + 3 * (float)(i % E);
        set(m, "router", R);
        t = go(m, T, 1);
        for (size_t i = 0; i < T * E; i++) CHECK_WITHIN(t->logits[i], old[i], 2e-6);
        if (n == 0) { /* the weight of the selected: sigmoid of the cosine over the temperature */
            for (size_t i = 0; i < T; i++)
                CHECK_NEAR(t->weight[i], sigmoid((double)t->logits[i * E + (size_t)t->index[i]] / (double)0.07f), 2e-5);
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
    CHECK_NEAR(value[MOE_LOSS_SIMBAL], before, 1e-5);
    CHECK_OK(moe_step(m, 0.003f));
    for (int i = 0; i < 150; i++) go(m, T, 0), back_and_step(m, 0.003f * (float)(150 - i) / 150);
    CHECK(before > 5 && off_orthogonal(m) < before / 10);
    moe_layer_free(m);
}

/* ---- ERMoE: bases stay orthonormal ---- */
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
                CHECK_WITHIN(vv, a == b, 1e-5);
                if (a != b) CHECK_WITHIN(ww / sqrt(wa * wb), 0, 1e-5);
            }
    for (size_t i = 0; i < T; i++) { /* the score: the share of the token that lies in the basis */
        const moe_tape *t = i ? moe_layer_tape(m) : go(m, T, 1);
        for (size_t e = 0; e < N; e++) {
            double in = 0, all = 0;
            for (size_t f = 0; f < F; f++) {
                double p = 0;
                for (size_t c = 0; c < D; c++) p += (double)x[i * D + c] * (double)V[(e * D + c) * F + f];
                in += p * p;
            }
            for (size_t c = 0; c < D; c++) all += (double)x[i * D + c] * (double)x[i * D + c];
            CHECK_WITHIN(t->logits[i * N + e], sqrt(in / all), 1e-6);
        }
    }
    free(first), free(V), free(W);
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

/* ---- VQMoE ---- */
static void layer_norm(const float *in, float *out) {
    double mean = 0, square = 0;
    for (size_t c = 0; c < D; c++) mean += (double)in[c] / D;
    for (size_t c = 0; c < D; c++) square += ((double)in[c] - mean) * ((double)in[c] - mean) / D;
    for (size_t c = 0; c < D; c++) out[c] = (float)(((double)in[c] - mean) / sqrt(square));
}
static void test_vqmoe(void) {
    enum { T = 40, CODES = 16 };
    moe_layer *m = row("vqmoe", "");
    if (!m) return;
    tokens(T);
    float *C = get(m, "router.codebook"), *G = get(m, "router.branch");
    CHECK(largest(C, NULL, CODES * D) <= 1.0 / CODES && largest(C, NULL, CODES * D) > 0.9 / CODES);
    test_fill(C, CODES * D, -1, 1), test_fill(G, D * 2, -1, 1);
    set(m, "router.codebook", C), set(m, "router.branch", G);
    C = get(m, "router.codebook"), G = get(m, "router.branch");
    const moe_tape *t = go(m, T, 0);
    size_t used = 0, low = 0, high = 0;
    for (size_t i = 0; i < T; i++) {
        double best = INFINITY, want[D] = {0}, s[2] = {0};
        size_t code = 0;
        float q[D], out[D], v[D];
        for (size_t j = 0; j < CODES; j++) {
            double far = 0;
            for (size_t c = 0; c < D; c++) far += pow((double)x[i * D + c] - (double)C[j * D + c], 2);
            if (far < best) best = far, code = j;
        }
        CHECK(t->memory->branch->code[i] == (int32_t)code && t->memory->branch->expert[i] == (int32_t)(code % E));
        used |= (size_t)1 << code;
        for (size_t c = 0; c < D; c++)
            for (size_t k = 0; k < 2; k++) s[k] += (double)x[i * D + c] * (double)G[c * 2 + k];
        double g = sigmoid(s[0] - s[1]);
        CHECK_NEAR(t->memory->branch->g[i * 2], g, 1e-6);
        CHECK_NEAR(t->memory->branch->g[i * 2] + t->memory->branch->g[i * 2 + 1], 1, 1e-6);
        low += g < 0.4, high += g > 0.6;
        for (size_t k = 0; k < 2; k++) {
            network(m, (size_t)t->index[i * 2 + k], NULL, x + i * D, 1, out);
            for (size_t c = 0; c < D; c++) want[c] += g * (double)t->weight[i * 2 + k] * (double)out[c];
        }
        layer_norm(C + code * D, q);
        network(m, code % E, NULL, q, 1, out);
        layer_norm(out, v);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c] + (1 - g) * (double)v[c], 1e-5);
    }
    CHECK(low && high && (used >> E) != 0); /* some by code % E, not code */
    free(C), free(G);
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
            float mean = (x[i * D + e * WIDE] + x[i * D + e * WIDE + 1]) / WIDE; /* of two numbers: one rounding, exactly this */
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
    for (size_t i = 0; i < T * D; i++) CHECK_WITHIN(y[i], z[i], 1e-6);
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
        CHECK_NEAR(sum, 1, 1e-6);
        for (size_t i = s; i < s + SEQ; i++) CHECK_SAME(t->prob + i * E, p, E); /* one for the sequence */
        network(m, 0, p, x + s * D, SEQ, out); /* the network of the mean parameters, */
        for (size_t i = 0; i < SEQ * D; i++) CHECK_WITHIN(y[s * D + i], out[i], 1e-5);
        double ensemble[SEQ * D] = {0};
        for (size_t e = 0; e < E; e++) {
            network(m, e, NULL, x + s * D, SEQ, out);
            for (size_t i = 0; i < SEQ * D; i++) ensemble[i] += (double)p[e] * (double)out[i];
        }
        for (size_t i = 0; i < SEQ * D; i++) away = fmax(away, fabs(ensemble[i] - (double)y[s * D + i])); /* not the mean of the outputs */
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

/* ---- SMoE-Dropout ---- */
static size_t choices(const moe_tape *t, size_t token) {
    size_t n = 0;
    for (size_t k = 0; k < t->n_slots; k++) n += t->index[token * t->n_slots + k] >= 0;
    return n;
}
static void test_smoe_dropout(void) {
    enum { T = 20, STEPS = 17 };
    moe_layer *m = row("smoe-dropout", "top_k=7 top_k_min=2 schedule_steps=17");
    if (!m) return;
    tokens(T);
    float *R = get(m, "router"), *w = get(m, "experts.w1"), *now;
    for (int step = 0; step < STEPS + 8; step++) {
        double share = step < STEPS ? (double)step / STEPS : 1;
        size_t k = (size_t)floor(5 * share + 0.5) + 2; /* round((kmax - kmin) t / T) + kmin; no tie with 17 steps */
        const moe_tape *t = go(m, T, 1);
        for (size_t i = 0; i < T; i++) CHECK(choices(t, i) == 7); /* evaluation: all of them */
        moe_layer_side(m)->top_k = 3;
        t = go(m, T, 1);
        for (size_t i = 0; i < T; i++) CHECK(holds_best(t, i, t->logits + i * E, E, 3)); /* or as many as asked for */
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i++) CHECK(choices(t, i) == 3);
        moe_layer_side(m)->top_k = 0;
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i++) {
            double sum = 0, top = (double)t->logits[i * E + (size_t)t->index[i * 7]];
            CHECK(holds_best(t, i, t->logits + i * E, E, k));
            for (size_t l = 0; l < k; l++) sum += exp((double)t->logits[i * E + (size_t)t->index[i * 7 + l]] - top);
            for (size_t l = 0; l < k; l++) /* softmax over the selected */
                CHECK_NEAR(t->weight[i * 7 + l], exp((double)t->logits[i * E + (size_t)t->index[i * 7 + l]] - top) / sum, 1e-6);
        }
        back_and_step(m, 0.05f);
    }
    now = get(m, "router");
    CHECK_SAME(now, R, D * E);
    free(now);
    now = get(m, "experts.w1");
    CHECK(largest(now, w, count_of(m, "experts.w1")) > 0.1);
    free(now), free(w), free(R);
    moe_layer_free(m);
}

/* ---- gating dropout: one draw a step ---- */
static void test_gating_dropout(void) {
    enum { T = 64, P = 4, STEPS = 60, MANY = 4000 };
    moe_layer *m = row("gating-dropout", "capacity_factor=off capacity_factor_eval=off");
    if (!m) return;
    tokens(T);
    size_t dropped = 0;
    for (int step = 0; step < STEPS; step++) {
        int first = 0;
        for (int micro = 0; micro < 3; micro++) { /* all forwards of a step share it, as all ranks do */
            const moe_tape *t = go(m, T, 0);
            if (!micro) first = t->dropped;
            CHECK(t->dropped == first);
            for (size_t i = 0; i < T; i++) {
                CHECK(t->index[i] >= 0);
                if (t->dropped) CHECK((size_t)t->index[i] * P / E == i * P / T); /* at home */
                else CHECK(holds_best(t, i, t->logits + i * E, E, 1));
            }
            if (t->dropped) /* the best that is at home */
                for (size_t i = 0; i < T; i++)
                    for (size_t e = 0; e < E; e++)
                        CHECK(e * P / E != i * P / T || t->logits[i * E + e] <= t->logits[i * E + (size_t)t->index[i]]);
        }
        dropped += (size_t)first;
        CHECK(!go(m, T, 1)->dropped);
        go(m, T, 0);
        back_and_step(m, 0.001f);
    }
    CHECK(dropped > 5 && dropped < 35);
    /* the frequency, at level 2 */
    moe_desc d = *moe_layer_desc(m);
    moe_tape *t = NULL;
    float *R = get(m, "router");
    double n = 0, follows = 0;
    CHECK_OK(moe_tape_new(&t, &d, E, MOE_ON));
    for (uint64_t step = 0, last = 0; step < MANY; step++) {
        t->side.step = step, t->side.draw = step * 7;
        CHECK_OK(moe_route(&d, R, x, E, t));
        n += t->dropped, follows += t->dropped && last, last = (uint64_t)t->dropped;
        t->side.draw++; /* another batch of the same step, */
        t->side.evaluate = 1;
        CHECK_OK(moe_route(&d, R, x, E, t));
        CHECK(!t->dropped); /* and evaluation */
        t->side.evaluate = 0;
    }
    CHECK(fabs(n - 0.3 * MANY) < 4.5 * sqrt(0.21 * MANY));
    CHECK(fabs(follows - 0.09 * MANY) < 4.5 * sqrt((0.09 * 0.91 + 2 * (0.027 - 0.0081)) * MANY)); /* one step says nothing of the next */
    moe_tape_free(t);
    free(R);
    moe_layer_free(m);
    /* capacity 1 in training, 2 in evaluation */
    m = row("gating-dropout", "gate_drop=0");
    if (!m) return;
    lean(m, 1, 5);
    CHECK(kept(go(m, T, 0), 1) == T / E && kept(go(m, T, 1), 1) == 2 * T / E);
    moe_layer_free(m);
    /* with gate_drop_experts no expert runs at all then */
    m = row("gating-dropout", "gate_drop=1 gate_drop_experts=true");
    if (!m) return;
    CHECK(go(m, T, 0)->routes.n_routes == 0 && largest(y, NULL, T * D) == 0);
    go(m, T, 1);
    CHECK(largest(y, NULL, T * D) > 0);
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
        printf("    robust, %d of %d experts are noise: y is off by %.2g of its largest, plain by %.2g; none: by %.2g\n",
               (int)(k * 2 / 5), (int)k, robust, plain, hardly);
        CHECK(hardly < 0.1 && robust < 0.2 && plain > 5);
    }
}

/* ---- ecology, growth: entropy ---- */
static double token_entropy(const moe_tape *t) {
    size_t n = t->routes.n_experts;
    double sum = 0;
    for (size_t i = 0; i < t->n_tokens * n; i++)
        if (t->prob[i] > 0) sum -= (double)t->prob[i] * log((double)t->prob[i]) / (double)t->n_tokens;
    return sum;
}
static void test_ecology(void) {
    enum { T = 100 };
    moe_layer *m = row("ecology", "");
    if (!m) return;
    tokens(T);
    scale(m, "router", 5);
    CHECK(count_of(m, "router.proj") == D * D / 2 && count_of(m, "router") == D / 2 * E); /* an MLP, d / 2 wide */
    double last = 0;
    for (float temperature = 0.25f; temperature < 20; temperature *= 2) {
        moe_layer_side(m)->temperature = temperature;
        const moe_tape *t = go(m, T, 1);
        double h = token_entropy(t);
        CHECK(h > last + 0.001 && h < log(E));
        last = h;
        for (size_t i = 0; i < T; i++) { /* softmax(z / temperature) */
            double sum = 0;
            for (size_t e = 0; e < E; e++) sum += exp(((double)t->logits[i * E + e] - (double)t->logits[i * E]) / (double)temperature);
            CHECK_NEAR(t->prob[i * E], 1 / sum, 1e-5);
        }
    }
    CHECK(last > 0.99 * log(E));
    moe_layer_free(m);
}
static void test_growth(void) {
    enum { T = 64 };
    double end[2] = {0, 0}, begin = 0;
    for (int without = 0; without < 2; without++) {
        moe_layer *m = row("growth", without ? "loss.entropy=0" : "");
        if (!m) return;
        test_seed = 5;
        tokens(T);
        CHECK(moe_layer_desc(m)->n_experts == 3 && moe_layer_desc(m)->top_k == 2);
        scale(m, "router", 6);
        begin = token_entropy(go(m, T, 1));
        memset(dy, 0, T * D * sizeof *dy);
        for (int i = 0; i < 50; i++) go(m, T, 0), back_and_step(m, 0.01f);
        end[without] = token_entropy(go(m, T, 1));
        moe_layer_free(m);
    }
    CHECK(end[0] > begin + 0.2 && end[0] < log(3) + 1e-6 && end[1] < begin + 0.02);
}

/* ---- bad input, for every score and every selection ---- */
static const char *const stages[] = { /* each score, and each selection with the gates and combinations that it goes with */
    "score=linear", "score=unit", "score=mlp", "score=mlp d_router=1", "score=cosine", "score=projected", "score=normed", "score=prototype",
    "score=slice", "score=subspace expert=orthonormal", "score=hash", "score=random",
    "select=top-k threshold=0.3", "select=groups", "select=top-p", "select=threshold gate=relu",
    "select=threshold gate=sigmoid threshold=0.5",
    "select=threshold gate=sign score=cosine", "select=expert-choice", "select=sinkhorn", "select=auction gate=sigmoid",
    "select=sampled gate=sparsemixer", "select=all", "select=all gate=softmax-selected", "combine=soft select=all score=cosine",
    "combine=soft select=all", "combine=merge select=all", "combine=merge select=all score=normed", "combine=robust", "n_codes=16",
    "noise=learned", "route_sequence=true", "jitter=0.1", "gate_drop=1", "gate_drop=1 n_ranks=1 gate_drop_experts=true",
    "random_steps=9"};
enum { STAGES = sizeof stages / sizeof *stages };
static int is_auction(const char *stage) { return strstr(stage, "auction") != NULL; }
static int finite_all(const float *v, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(v[i])) return 0;
    return 1;
}
/* Forward, and in training backward and step: everything stays finite. */
static void whole_step(const char *stage, const char *more, size_t T, moe_layer *m, int evaluate) {
    static float back[MAX_TOKENS * D];
    double norm = NAN;
    moe_layer_side(m)->evaluate = evaluate;
    moe_status s = moe_forward(m, x, T, y);
    if (!s) s = moe_backward(m, dy, back);
    if (!s) s = moe_layer_grad_norm(m, &norm);
    int ok = CHECK_OK(s) && CHECK(finite_all(y, T * D)) && CHECK(finite_all(back, T * D)) && CHECK(isfinite(norm)) &&
             CHECK_OK(moe_step(m, 0.01f));
    if (!ok) printf("        %s %s, %d tokens, evaluate %d\n", stage, more, (int)T, evaluate);
}
static void test_odd_sizes(void) {
    static const char *const sizes[] = {"", "n_experts=1 top_k=1", "n_experts=8 top_k=8", "n_experts=2 top_k=1 d_model=2", "sequence=1",
        "sequence=0"};
    tokens(64);
    for (size_t i = 0; i < STAGES; i++)
        for (size_t k = 0; k < 6; k++) {
            char more[200];
            if (is_auction(stages[i]) && k == 2) continue;
            if (strstr(stages[i], "n_codes") && k == 1) snprintf(more, sizeof more, "%s %s", stages[i], "n_experts=1 top_k=1 n_codes=1");
            else snprintf(more, sizeof more, "%s %s", stages[i], sizes[k]);
            if (k == 3) strncat(more, " d_ff=1", sizeof more - strlen(more) - 1);
            moe_layer *m = row(NULL, more);
            if (!m) continue;
            for (size_t T = 0; T <= 24; T += T < 2 ? 1 : 22)
                for (int evaluate = 0; evaluate < 2; evaluate++) {
                    if (is_auction(stages[i]) && !evaluate && T % moe_layer_desc(m)->n_experts) {
                        moe_layer_side(m)->evaluate = 0;
                        CHECK_STATUS(moe_forward(m, x, T, y), MOE_E_UNEVEN);
                    } else whole_step(stages[i], sizes[k], T, m, evaluate);
                }
            moe_layer_free(m);
        }
}
static void test_too_many(void) { /* k > E, and what does not fit */
    static const struct { const char *more; moe_status status; } bad[] = {
        {"n_experts=4 top_k=5", MOE_E_TOP_K}, {"n_experts=1 top_k=2", MOE_E_TOP_K}, {"score=slice d_model=17", MOE_E_SLICE},
        {"score=slice d_model=4", MOE_E_SLICE}, {"score=subspace", MOE_E_SUBSPACE}, {"select=auction top_k=2", MOE_E_TOP_K},
        {"select=groups n_groups=3", MOE_E_GROUPS}, {"select=groups n_groups=4 top_groups=1 top_k=3", MOE_E_TOP_GROUPS},
        {"select=groups n_groups=4 top_groups=5", MOE_E_TOP_GROUPS}};
    for (size_t i = 0; i < STAGES; i++) {
        moe_desc d = row_desc(NULL, stages[i]), r;
        moe_layer *m = NULL;
        d.n_experts = 4, d.top_k = 5;
        CHECK_STATUS(moe_layer_new(&m, &d), MOE_E_TOP_K);
        CHECK_STATUS(moe_desc_resolve(&d, &r), MOE_E_TOP_K);
        CHECK(m == NULL);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        moe_desc d = row_desc(NULL, bad[i].more), r;
        if (!CHECK_STATUS(moe_desc_resolve(&d, &r), bad[i].status)) printf("        %s\n", bad[i].more);
    }
}
static void test_not_finite(void) {
    enum { T = 40 };
    static const float odd[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < STAGES; i++) {
        moe_layer *m = row(NULL, stages[i]);
        if (!m) continue;
        uint64_t hash = moe_layer_hash(m);
        for (size_t k = 0; k < 3; k++)
            for (size_t at = 0; at < T * D; at += 7 * D + 5) {
                tokens(T);
                for (size_t c = 0; c < T * D; c++) y[c] = 7;
                x[at] = odd[k];
                moe_layer_side(m)->evaluate = at % 2 == 1;
                moe_status s = moe_forward(m, x, T, y);
                if (!CHECK_STATUS(s, MOE_E_NAN_X)) printf("        %s, %g\n", stages[i], (double)odd[k]);
                for (size_t c = 0; c < T * D && s; c++)
                    if (!CHECK(y[c] == 7)) break;
                CHECK_STATUS(moe_backward(m, dy, NULL), MOE_E_NO_FORWARD);
            }
        CHECK(moe_layer_hash(m) == hash);
        tokens(T);
        whole_step(stages[i], "after NaN", T, m, 0);
        moe_layer_free(m);
    }
}
static void zero_router(moe_layer *m) {
    moe_tensor t;
    for (size_t i = 0; i < moe_layer_tensors(m); i++) {
        CHECK_OK(moe_layer_tensor(m, i, &t));
        if (!strncmp(t.name, "router", 6)) set(m, t.name, test_floats(t.count));
    }
}
static void test_equal_logits(void) {
    enum { T = 40 };
    tokens(T);
    for (size_t i = 0; i < STAGES; i++) { /* nothing breaks */
        moe_layer *m = row(NULL, stages[i]);
        if (!m) continue;
        for (int evaluate = 0; evaluate < 2; evaluate++) {
            zero_router(m);
            whole_step(stages[i], "zero router", T, m, evaluate);
        }
        memset(x, 0, T * D * sizeof *x); /* nor with tokens that have no direction */
        whole_step(stages[i], "zero tokens", T, m, 0);
        tokens(T);
        moe_layer_free(m);
    }
    /* what is chosen: the lowest index */
    static const struct { const char *more; size_t n[2]; } rows[] = {
        {"", {2, 2}}, {"gate=sigmoid top_k=5", {5, 5}}, {"gate=softmax-selected top_k=8", {8, 8}},
        {"select=groups n_groups=4 top_groups=2 top_k=3", {3, 3}},
        {"select=top-p top_p=0.4", {4, 4}}, {"select=threshold gate=relu", {0, 1}}, {"select=threshold gate=sigmoid threshold=0.4", {8, 8}},
        {"select=sinkhorn top_k=3", {3, 3}}, {"select=all", {8, 8}}, {"score=unit", {2, 2}}, {"score=cosine", {2, 2}},
        {"score=mlp", {2, 2}},
        {"score=projected", {2, 2}}, {"score=normed", {2, 2}}, {"score=prototype", {2, 2}}, {"n_codes=9", {2, 2}},
        {"combine=robust top_k=3", {3, 3}}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_layer *m = row(NULL, rows[i].more);
        if (!m) continue;
        zero_router(m);
        for (int evaluate = 0; evaluate < 2; evaluate++) {
            const moe_tape *t = go(m, T, evaluate);
            size_t wrong = 0;
            for (size_t a = 0; a < T; a++) {
                wrong += choices(t, a) != rows[i].n[evaluate];
                for (size_t k = 0; k < rows[i].n[evaluate]; k++) wrong += t->index[a * t->n_slots + k] != (int32_t)k;
            }
            if (!CHECK(wrong == 0)) printf("        %s\n", rows[i].more);
        }
        moe_layer_free(m);
    }
    moe_layer *m = row(NULL, "select=expert-choice top_k=2");
    if (!m) return;
    zero_router(m);
    const moe_tape *t = go(m, T, 0);
    for (size_t a = 0; a < T; a++) CHECK(choices(t, a) == (a < T / 4 ? E : 0)); /* T k / E = the first ten tokens */
    moe_layer_free(m);
    m = row(NULL, "select=auction");
    if (!m) return;
    zero_router(m);
    t = go(m, T, 0);
    for (size_t e = 0; e < E; e++) CHECK(t->routes.load[e] == T / E);
    CHECK(go(m, T, 1)->routes.load[0] == T);
    moe_layer_free(m);
}
static void test_one_huge_logit(void) {
    enum { T = 40 };
    static const char *const selects[] = {"", "gate=softmax-selected", "gate=sigmoid", "select=groups n_groups=4 top_groups=1",
        "select=top-p",
        "select=threshold gate=sigmoid threshold=0.5", "select=threshold gate=sign", "select=expert-choice", "select=sinkhorn",
        "select=auction",
        "select=sampled gate=sparsemixer", "select=all", "combine=soft select=all", "combine=merge select=all", "combine=robust top_k=3",
        "n_codes=8",
        "noise=gaussian", "random_second=true", "learn_temperature=true", "temperature=0.01"};
    tokens(T);
    for (size_t i = 0; i < sizeof selects / sizeof *selects; i++)
        for (int sign = -1; sign <= 1; sign += 2)
            for (int evaluate = 0; evaluate < 2; evaluate++) {
                moe_layer *m = row(NULL, selects[i]);
                if (!m) continue;
                lean(m, 3, (float)sign * 1e30f);
                whole_step(selects[i], sign > 0 ? "1e30" : "-1e30", T, m, evaluate);
                const moe_tape *t = moe_layer_tape(m);
                int per_token = !strstr(selects[i], "auction") && !strstr(selects[i], "combine=soft") &&
                                !strstr(selects[i], "expert-choice") && !(strstr(selects[i], "sinkhorn") && !evaluate);
                for (size_t a = 0; a < T && per_token && sign > 0; a++)
                    if (!CHECK(t->index[a * t->n_slots] == 3)) { printf("        %s\n", selects[i]); break; }
                for (size_t a = 0; a < T; a++) CHECK_WITHIN(t->prob[a * E + 3], sign > 0, 0);
                moe_layer_free(m);
            }
    for (int sign = -1; sign <= 1; sign += 2) { /* too large: said, not computed with */
        moe_layer *m = row(NULL, "");
        if (!m) return;
        float *R = get(m, "router");
        for (size_t c = 0; c < D; c++) R[c * E + 3] = (float)sign * 3e38f;
        set(m, "router", R);
        for (size_t k = 0; k < T * D; k++) x[k] = 1;
        CHECK_STATUS(moe_forward(m, x, T, y), MOE_E_NAN_X);
        moe_layer_free(m);
    }
}
/* level 1: NaN, everything equal, and all -infinity but one */
static void test_one_finite(void) {
    enum { T = 5 };
    float s[T * E];
    int32_t index[T * E];
    for (size_t i = 0; i < T * E; i++) s[i] = i % E == 6 ? 0.5f : -INFINITY;
    for (int way = 0; way < 3; way++) { /* of groups every sum of two is -infinity, so the first two are the best */
        size_t k = 2;
        if (way == 0) CHECK_OK(moe_topk(T, E, k, s, index, NULL));
        if (way == 1) CHECK_OK(moe_topk_groups(T, E, k, 4, 2, s, index));
        if (way == 2) CHECK_OK(moe_topk_threshold(T, E, k, -1, NULL, 0, s, index));
        for (size_t i = 0; i < T; i++) CHECK(index[i * k] == (way == 1 ? 0 : 6) && index[i * k + 1] == (way == 2 ? -1 : way == 1 ? 1 : 0));
    }
    CHECK_OK(moe_expert_choice(T, E, 2, E, s, index, NULL, 0));
    CHECK_STATUS(moe_sinkhorn(T, E, 1, 5, s, x, NULL, 0), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_auction(E, E, x, NULL, NULL, 0), MOE_E_NULL_INDEX);
    for (size_t i = 0; i < T * E; i++) s[i] = i == 17 ? NAN : 0;
    CHECK_STATUS(moe_topk(T, E, 2, s, index, NULL), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_topk_groups(T, E, 2, 4, 2, s, index), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_topk_threshold(T, E, 2, 0, NULL, 0, s, index), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_top_p(T, E, E, 0.5f, s, index), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_expert_choice(T, E, 2, E, s, index, NULL, 0), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_sinkhorn(T, E, 1, 5, s, x, NULL, 0), MOE_E_NAN_LOGITS);
}
static void test_level_two(void) {
    enum { T = 24 };
    for (size_t i = 0; i < STAGES; i++) {
        moe_layer *m = row(NULL, stages[i]), *other = row(NULL, "d_model=32");
        if (!m || !other) return;
        moe_desc d = *moe_layer_desc(m);
        moe_tape *t = NULL;
        size_t n = 0, most = 0;
        CHECK_OK(moe_router_count(&d, &n));
        float *router = test_floats(n);
        CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON));
        tokens(T + 1);
        for (size_t k = 0; k < n; k++) router[k] = NAN;
        t->side.experts = m->part[MOE_PART_PARAMS];
        if (n) CHECK_STATUS(moe_route(&d, NULL, x, T, t), MOE_E_NULL_PARAMS);
        CHECK_STATUS(moe_route(&d, router, NULL, T, t), MOE_E_NULL_X);
        CHECK_STATUS(moe_route(&d, router, x, T, NULL), MOE_E_NULL_TAPE);
        CHECK_STATUS(moe_route(NULL, router, x, T, t), MOE_E_NULL_DESC);
        CHECK_STATUS(moe_route(&d, router, x, T + 1, t), MOE_E_N_TOKENS);
        CHECK_STATUS(moe_route(moe_layer_desc(other), router, x, T, t), MOE_E_TAPE_DESC);
        CHECK_STATUS(moe_route_backward(&d, router, t, NULL, NULL, NULL, NULL), MOE_E_NO_FORWARD);
        if (count_of(m, "router") && !strstr(stages[i], "n_codes")) /* the router is NaN */
            if (!CHECK_STATUS(moe_route(&d, router, x, T, t), MOE_E_NAN_X)) printf("        %s\n", stages[i]);
        if (d.score == MOE_SCORE_SUBSPACE) {
            t->side.experts = NULL;
            CHECK_STATUS(moe_route(&d, router, x, T, t), MOE_E_NULL_EXPERTS);
        }
        t->side.experts = m->part[MOE_PART_PARAMS];
        memset(router, 0, n * sizeof *router);
        CHECK_OK(moe_route(&d, router, x, T, t));
        for (size_t e = 0; e < E; e++) most += kept(t, e);
        CHECK(most == t->routes.n_routes);
        CHECK_OK(moe_route(&d, router, NULL, 0, t)); /* no tokens need no memory */
        CHECK(t->routes.n_routes == 0);
        free(router);
        moe_tape_free(t);
        moe_layer_free(m), moe_layer_free(other);
    }
    CHECK(moe_layer_side(NULL) == NULL && moe_layer_control(NULL) == NULL && moe_layer_step_load(NULL) == NULL);
    double pes;
    moe_layer *m = row("switch", "");
    if (!m) return;
    CHECK_STATUS(moe_layer_pes(NULL, x, 1, &pes), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_pes(m, NULL, 1, &pes), MOE_E_NULL_X);
    CHECK_STATUS(moe_layer_pes(m, x, 1, NULL), MOE_E_NULL_OUT);
    moe_layer_free(m);
}

/* ---- fields of the desc out of range: each its own status, whose field is the one that is wrong ---- */
static void bad_field(const moe_desc *d, const char *field, moe_status want) {
    moe_desc r, before;
    moe_layer *m = NULL;
    memset(&r, 0x5a, sizeof r);
    memcpy(&before, &r, sizeof r);
    moe_status s = moe_desc_resolve(d, &r);
    if (!CHECK_STATUS(s, want)) printf("        %s\n", field);
    CHECK(!memcmp(&r, &before, sizeof r)); /* nothing was written */
    if (!CHECK(strstr(moe_status_field(s), field) != NULL)) printf("        %s: \"%s\"\n", field, moe_status_field(s));
    CHECK_STATUS(moe_layer_new(&m, d), want);
    CHECK(m == NULL);
}
static void test_fields(void) {
    static const struct { const char *field, *text; moe_status status; } by_text[] = {
        {"n_zero", "n_zero=8", MOE_E_SPECIAL_EXPERTS}, {"n_zero", "n_zero=3 n_copy=3 n_constant=2", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_zero=18446744073709551615 n_copy=1", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_copy=1 combine=robust", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_constant=1 combine=merge select=all", MOE_E_SPECIAL_EXPERTS},
        {"n_ranks", "n_ranks=9", MOE_E_N_RANKS}, {"d_ff", "expert=orthonormal d_ff=16", MOE_E_D_FF},
        {"score", "score=subspace", MOE_E_SUBSPACE}, {"score", "score=subspace expert=orthonormal n_copy=1", MOE_E_SUBSPACE},
        {"d_model", "score=slice d_model=12", MOE_E_SLICE}, {"gate", "gate=sparsemixer", MOE_E_GATE_SELECT},
        {"gate", "select=sampled", MOE_E_GATE_SELECT},
        {"gate", "gate=sign", MOE_E_GATE_SELECT}, {"select", "combine=soft", MOE_E_SELECT_COMBINE},
        {"select", "combine=merge", MOE_E_SELECT_COMBINE},
        {"select", "combine=merge select=all gate=sigmoid", MOE_E_SELECT_COMBINE},
        {"select", "combine=soft select=all score=hash", MOE_E_SELECT_COMBINE},
        {"select", "combine=soft select=all noise=gaussian", MOE_E_SELECT_COMBINE},
        {"select", "combine=soft select=all capacity_factor=1", MOE_E_SELECT_COMBINE},
        {"route_sequence", "combine=merge select=all route_sequence=false", MOE_E_ROUTE_SEQUENCE},
        {"route_sequence", "combine=soft select=all route_sequence=true", MOE_E_ROUTE_SEQUENCE},
        {"residual", "combine=soft select=all residual=true", MOE_E_RESIDUAL},
        {"n_codes", "n_codes=7", MOE_E_N_CODES}, {"n_codes", "n_codes=8 jitter=0.1", MOE_E_N_CODES},
        {"n_codes", "n_codes=8 combine=robust", MOE_E_N_CODES},
        {"n_codes", "n_codes=8 n_zero=1", MOE_E_N_CODES}, {"soft_slots", "soft_slots=2", MOE_E_SOFT_SLOTS},
        {"soft_slots", "combine=soft select=all soft_slots=131073", MOE_E_SOFT_SLOTS}, {"n_groups", "n_groups=3", MOE_E_GROUPS},
        {"n_groups", "n_groups=512 n_experts=512", MOE_E_GROUPS}, {"top_groups", "n_groups=4 top_groups=5", MOE_E_TOP_GROUPS},
        {"top_groups", "select=groups n_groups=8 top_groups=1 top_k=2", MOE_E_TOP_GROUPS},
        {"top_k_min", "top_k_min=3 schedule_steps=5", MOE_E_TOP_K_MIN},
        {"top_k_min", "top_k_min=1", MOE_E_TOP_K_MIN}, {"temperature_end", "temperature_end=2", MOE_E_TEMPERATURE_END},
        {"gate_drop", "gate_drop=0.3 select=sinkhorn", MOE_E_GATE_DROP}, {"gate_drop", "gate_drop=0.3 select=auction", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=sampled gate=sparsemixer", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=all combine=soft", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=all combine=merge", MOE_E_GATE_DROP},
        {"top_k", "select=auction top_k=2", MOE_E_TOP_K}, {"controller", "controller=relu-lambda", MOE_E_CONTROLLER},
        {"controller", "controller=relu-lambda gate=relu", MOE_E_CONTROLLER}, {"controller", "controller=adaptive", MOE_E_CONTROLLER},
        {"loss", "loss.load=1", MOE_E_LOSS_STAGE}, {"loss", "loss.codebook=1", MOE_E_LOSS_STAGE},
        {"loss", "loss.orthonormal=1", MOE_E_LOSS_STAGE}};
    for (size_t i = 0; i < sizeof by_text / sizeof *by_text; i++) {
        moe_desc d = row_desc(NULL, by_text[i].text);
        bad_field(&d, by_text[i].field, by_text[i].status);
    }
#define BAD(member, value, status)                                                                           \
    do {                                                                                                     \
        moe_desc bad_ = row_desc(NULL, "");                                                                  \
        bad_.member = value;                                                                                 \
        bad_field(&bad_, #member, status);                                                                   \
    } while (0)
    static const int past[] = {-1, -2, 50, 1 << 30};
    for (int i = 0; i < 4; i++) {
        BAD(noise, (moe_noise_kind)past[i], MOE_E_NOISE);
        BAD(combine, (moe_combine_kind)past[i], MOE_E_COMBINE);
        BAD(schedule, (moe_schedule_kind)past[i], MOE_E_SCHEDULE);
        BAD(router_init, (moe_init_kind)past[i], MOE_E_ROUTER_INIT);
        BAD(controller, (moe_control_kind)past[i], MOE_E_CONTROLLER);
        int odd = i ? past[i] : 2;
        BAD(route_sequence, odd, MOE_E_ROUTE_SEQUENCE);
        BAD(freeze_router, odd, MOE_E_FREEZE_ROUTER);
        BAD(residual, odd, MOE_E_RESIDUAL);
        BAD(learn_temperature, odd, MOE_E_LEARN_TEMPERATURE);
        BAD(fallback, odd, MOE_E_FALLBACK);
        BAD(random_second, odd, MOE_E_RANDOM_SECOND);
        BAD(gate_drop_experts, odd, MOE_E_GATE_DROP_EXPERTS);
        BAD(zero_output, odd, MOE_E_ZERO_OUTPUT);
    }
    static const float wrong[] = {NAN, INFINITY, -INFINITY, -0.5f, -1, 1, 1.5f};
    for (int i = 0; i < 7; i++) {
        float v = wrong[i];
        if (i != 5) { /* 1 itself is a probability */
            BAD(gate_drop, v, MOE_E_GATE_DROP);
            BAD(top_p, v, MOE_E_TOP_P);
        }
        BAD(expert_drop, v, MOE_E_EXPERT_DROP);
        BAD(jitter, v, MOE_E_JITTER);
        if (i >= 5) continue;
        BAD(router_gain, v, MOE_E_ROUTER_GAIN);
        BAD(noise_std, v, MOE_E_NOISE_STD);
        BAD(weight_scale, v, MOE_E_WEIGHT_SCALE);
        BAD(mask_jitter, v, MOE_E_MASK_JITTER);
        BAD(sinkhorn_epsilon, v, MOE_E_SINKHORN);
        BAD(robust_tau, v, MOE_E_ROBUST_TAU);
        BAD(controller_rate, v, MOE_E_CONTROLLER_RATE);
        BAD(temperature_end, v, MOE_E_TEMPERATURE_END);
        if (i < 3) BAD(threshold, v, MOE_E_THRESHOLD);
        if (i == 4) continue; /* MOE_OFF */
        BAD(controller_damping, v, MOE_E_CONTROLLER_DAMPING);
        BAD(capacity_factor_eval, v, MOE_E_CAPACITY_FACTOR_EVAL);
    }
#undef BAD
}

/* ---- the N-th allocation fails, for every N ---- */
static void test_no_memory(void) {
    enum { T = 24, SMALL = 8 };
    static const char *const names[] = {"soft-moe", "smear", "vqmoe", "base", "sinkhorn", "robust", "ermoe", "expert-choice",
        "deepseek-v3", "moe++"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        moe_desc d = row_desc(names[i], "");
        moe_layer *m = NULL;
        tokens(T);
        float want[T * D];
        if (!CHECK_OK(moe_layer_new(&m, &d))) continue;
        CHECK_OK(moe_forward(m, x, SMALL, y));
        CHECK_OK(moe_forward(m, x, T, want));
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK_OK(moe_step(m, 0.01f));
        uint64_t hash = moe_layer_hash(m);
        moe_layer_free(m);
        CHECK(test_live_blocks == 0);
        for (long n = 0, failed = 1; failed && n < 100; n++) {
            failed = 0;
            for (int stage = 0; stage < 5; stage++) { /* each call is tried with n allocations left, and again with all */
                moe_status s = MOE_OK;
                for (int again = 0; again < 2; again++) {
                    uint64_t before = m && stage ? moe_layer_hash(m) : 0;
                    if (!again) test_fail_at = n;
                    if (stage == 0) s = moe_layer_new(&m, &d);
                    if (stage == 1) s = moe_forward(m, x, SMALL, y);
                    if (stage == 2) s = moe_forward(m, x, T, y); /* the tape grows */
                    if (stage == 3) s = moe_backward(m, dy, NULL);
                    if (stage == 4) s = moe_step(m, 0.01f);
                    test_fail_at = -1;
                    if (!s) break;
                    if (!CHECK(!again && moe_status_kind(s) == MOE_KIND_MEMORY)) printf("        %s: %s\n", names[i], moe_status_string(s));
                    CHECK(stage ? moe_layer_hash(m) == before : m == NULL);
                    if (stage == 2) CHECK_STATUS(moe_backward(m, dy, NULL), MOE_E_NO_FORWARD);
                    failed = 1;
                }
                if (!CHECK_OK(s)) break;
            }
            CHECK_SAME(y, want, T * D);
            CHECK(moe_layer_hash(m) == hash); /* as if nothing had happened */
            moe_layer_free(m);
            m = NULL;
            CHECK(test_live_blocks == 0);
            CHECK(n > 0 || failed);
        }
    }
}

/* ---- saving and loading: the same layer, the same next step ---- */
static void test_save_load(void) {
    enum { T = 24, STEPS = 3 };
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const char *name = moe_system_at(i)->name;
        moe_layer *m = row(name, ""), *back = NULL;
        float again[T * D];
        size_t bytes = 0;
        if (!m) continue;
        for (int step = 0; step < STEPS; step++) {
            tokens(T);
            go(m, T, 0), go(m, T, 0); /* one forward more than steps: draws are not steps */
            back_and_step(m, 0.01f);
        }
        CHECK_OK(moe_layer_save_size(m, 1, &bytes));
        unsigned char *file = (unsigned char *)test_memory(bytes, 1);
        moe_desc surroundings = row_desc(name, "");
        moe_status s = moe_layer_save_memory(m, 1, file, bytes);
        if (!s) s = moe_layer_load_memory(&back, file, bytes, &surroundings);
        free(file);
        if (!CHECK_OK(s)) { printf("        %s\n", name); moe_layer_free(m); continue; }
        int same = CHECK(moe_layer_hash(m) == moe_layer_hash(back));
        const moe_control *a = moe_layer_control(m), *b = moe_layer_control(back);
        same &= CHECK(a->n_state == b->n_state && a->kind == b->kind);
        if (same && a->n_state) CHECK_SAME(a->state, b->state, a->n_state);
        for (int step = 0; step < 2; step++) {
            tokens(T);
            go(back, T, 0);
            memcpy(again, y, sizeof again);
            go(m, T, 0);
            same &= CHECK_SAME(y, again, T * D);
            back_and_step(m, 0.01f), back_and_step(back, 0.01f);
            same &= CHECK(moe_layer_hash(m) == moe_layer_hash(back));
            if (a->n_state) same &= CHECK_SAME(a->state, b->state, a->n_state);
        }
        for (int l = 0; l < MOE_LOSS_COUNT; l++) CHECK_BITS(moe_layer_desc(m)->loss[l], moe_layer_desc(back)->loss[l]);
        if (!same) printf("        %s\n", name);
        moe_layer_free(m), moe_layer_free(back);
    }
}

static void test_nothing_is_left(void) { CHECK(test_live_blocks == 0); }

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
    RUN(test_sparsemixer);
    RUN(test_spheres);
    RUN(test_simbal);
    RUN(test_ermoe);
    RUN(test_mot);
    RUN(test_vqmoe);
    RUN(test_locmoe);
    RUN(test_smear);
    RUN(test_smoe_dropout);
    RUN(test_gating_dropout);
    RUN(test_robust);
    RUN(test_ecology);
    RUN(test_growth);
    RUN(test_odd_sizes);
    RUN(test_too_many);
    RUN(test_not_finite);
    RUN(test_equal_logits);
    RUN(test_one_huge_logit);
    RUN(test_one_finite);
    RUN(test_level_two);
    RUN(test_fields);
    RUN(test_no_memory);
    RUN(test_save_load);
    RUN(test_nothing_is_left);
    return test_end();
}
