/* Systems that differ by their selection, or by their losses: each has the property that defines it. */
#include "test.h"
#include "rows.h"

static float z[MAX_TOKENS * D]; /* outputs to compare with */

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
        for (size_t i = 0; i < 2; i++) CHECK_NEAR(b->weight[t * 2 + i], p[i] / (p[0] + p[1]), 6e-7);
        CHECK_NEAR(b->weight[t * 2] + b->weight[t * 2 + 1], 1, 5e-7);
    }
    moe_layer_free(raw), moe_layer_free(mixtral);
}

/* ---- GShard: the second choice at random, first choices before it ---- */
/* late: weights over those that stay, as in torchscale; else the first keeps g1 / (g1 + g2), and that of the second is
 * what is tested. */
static void check_random_second(const char *more, int late) {
    enum { T = 2000 };
    moe_layer *m = row("gshard", more);
    if (!m) return;
    tokens(T);
    scale(m, "router", 4);
    const moe_tape *t = go(m, T, 1);
    for (size_t i = 0; i < T; i++) CHECK(t->index[i * 2] >= 0 && t->index[i * 2 + 1] >= 0);
    float second[T], first[T];
    for (size_t i = 0; i < T; i++) {
        double g[2];
        for (size_t k = 0; k < 2; k++) g[k] = (double)t->prob[i * E + (size_t)t->index[i * 2 + k]];
        second[i] = (float)(late ? g[1] : g[1] / (g[0] + g[1]));
        first[i] = (float)(g[0] / (g[0] + g[1]));
    }
    uint64_t before = 0;
    for (int round = 0; round < 3; round++) {
        double n[2] = {0}, expected[2] = {0}, variance[2] = {0};
        t = go(m, T, 0);
        for (size_t i = 0; i < T; i++) { /* small and large probabilities apart */
            double q = fmin(1, 2 * (double)second[i]);
            int large = second[i] > 0.25f, stays = t->index[i * 2 + 1] >= 0;
            n[large] += stays, expected[large] += q, variance[large] += q * (1 - q);
            CHECK(t->index[i * 2] >= 0);
            CHECK_NEAR(t->weight[i * 2], late && !stays ? 1 : (double)first[i], 1e-6);
            CHECK_WITHIN(t->weight[i * 2 + 1], stays ? 1 - (double)first[i] : 0, 5e-7);
        }
        CHECK(variance[0] > 20 && variance[1] > 20);
        for (int large = 0; large < 2; large++) CHECK(fabs(n[large] - expected[large]) < 4.5 * sqrt(variance[large]));
        uint64_t hash = moe_hash(1, t->index, T * 2 * sizeof *t->index);
        CHECK(hash != before);
        before = hash;
    }
    moe_layer_free(m);
}
static void test_gshard(void) {
    check_random_second("capacity_factor=off", 0);
    check_random_second("capacity_factor=off gate=softmax-selected", 0);
    check_random_second("capacity_factor=off normalize_late=true", 1);
    moe_layer *m = row("gshard", "random_second=false");
    if (!m) return;
    enum { N = 64, CAPACITY = 16 }; /* 2 * ceil(64 / 8) */
    tokens(N);
    scale(m, "router", 2);
    lean(m, 2, 1);
    const moe_tape *t = go(m, N, 0);
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
        CHECK(!refused[0] || !have[1]); /* no second choice while a first one waits */
        CHECK(!(refused[0] + refused[1]) || have[0] + have[1] == CAPACITY); /* nobody is refused while there is room */
        overtaken += refused[1] && last_first > first_refused;
    }
    CHECK(overtaken > 0); /* a later token's first choice went before an earlier token's second */
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
                for (size_t o = 0; o < E; o++) /* none of these experts is better and left out */
                    CHECK(rank[o / WIDE] >= 2 || b[o] <= b[e] || (int32_t)o == t->index[i * 2] ||
                          (int32_t)o == t->index[i * 2 + 1]);
                /* weights are of the scores without the bias */
                CHECK_NEAR(t->weight[i * 2 + k], 2.5 * s[e] / sum, 1e-6);
                total += (double)t->weight[i * 2 + k];
                changed += t->index[i * 2 + k] != plain[i * 2 + k];
            }
            CHECK_NEAR(total, 2.5, 9e-7);
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
    for (size_t i = 0; i < T; i++)
        CHECK_NEAR(t->weight[i], sigmoid((double)t->logits[i * E + (size_t)t->index[i]]), 9e-7);
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
            CHECK_WITHIN(dot, a == b ? 0.01 : 0, 5e-9);
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
        CHECK_NEAR(t->weight[i], sigmoid((double)t->logits[i * E + (size_t)t->index[i]]), 8e-7);
        network(m, (size_t)t->index[i], NULL, x + i * D, 1, z);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], (double)t->weight[i] * (double)z[c], 5e-7);
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

/* -1: something that cannot be was */
static double chi_square(const double *count, const double *p, double n, double *freedom) {
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
    static const double v[E] = {3.9, -1, 4,   2.9,
                                3.3, 0,  3.5, 3.15}; /* 0.2 * 4 = 0.8 is the most below 4: not 2.9, 3.15 */
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
        if (a == 2) CHECK_NEAR(w, 1, 2e-7);
        else if (w > 0.9) CHECK_NEAR(w, 1, 3e-7), full++;
        else CHECK_NEAR(w, 1.0 / 3, 6e-7), thirds++;
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
        CHECK_NEAR(t->weight[i * 2], p[2], 2e-7);
        CHECK_NEAR(t->weight[i * 2 + 1], q[0], 7e-7);
    }
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
                CHECK_NEAR(t->weight[i * 7 + l],
                           exp((double)t->logits[i * E + (size_t)t->index[i * 7 + l]] - top) / sum, 1e-6);
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
        CHECK_OK(moe_route(t, R, x, E));
        n += t->dropped, follows += t->dropped && last, last = (uint64_t)t->dropped;
        t->side.draw++; /* another batch of the same step, */
        t->side.evaluate = 1;
        CHECK_OK(moe_route(t, R, x, E));
        CHECK(!t->dropped); /* and evaluation */
        t->side.evaluate = 0;
    }
    CHECK(fabs(n - 0.3 * MANY) < 4.5 * sqrt(0.21 * MANY));
    /* one step says nothing of the next */
    CHECK(fabs(follows - 0.09 * MANY) < 4.5 * sqrt((0.09 * 0.91 + 2 * (0.027 - 0.0081)) * MANY));
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
            for (size_t e = 0; e < E; e++)
                sum += exp(((double)t->logits[i * E + e] - (double)t->logits[i * E]) / (double)temperature);
            CHECK_NEAR(t->prob[i * E], 1 / sum, 3e-6);
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
        {"select=top-p top_p=0.4", {4, 4}}, {"select=threshold gate=relu", {0, 1}},
        {"select=threshold gate=sigmoid threshold=0.4", {8, 8}},
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

/* With one expert a token, weights that sum to 1 are 1: no gradient of the task would reach the router, and these rows
 * are refused until that is resolved as the examples' --top-k 1 does; then it does reach it. Not what cannot learn. */
static double router_gradient(const moe_desc *d) {
    moe_layer *m = NULL;
    double sum = 0;
    if (!CHECK_OK(moe_layer_new(&m, d))) return 0;
    size_t count = count_of(m, "router"); /* ermoe has none: its score is the experts' own */
    float *g = test_floats(count + 1);
    moe_layer_side(m)->evaluate = 1; /* no noise; the backward is the same */
    CHECK_OK(moe_forward(m, x, 24, y));
    CHECK_OK(moe_backward(m, dy, NULL));
    if (count) CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router", g, count));
    for (size_t i = 0; i < count; i++) sum += fabs((double)g[i]);
    moe_layer_free(m);
    free(g);
    return count ? sum : 1;
}
static void test_one_weight(void) {
    static const char *const rows[] = {"mixtral", "gshard", "noisy-topk", "deepseek-v3", "moe++", "simbal", "ermoe",
                                       "robust", "ecology", "growth", "vqmoe"};
    moe_desc out;
    tokens(24);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_desc d = row_desc(rows[i], "top_k=1");
        CHECK_STATUS(moe_desc_resolve(&d, &out), MOE_E_ONE_WEIGHT);
        d.freeze_router = MOE_ON;
        CHECK_OK(moe_desc_resolve(&d, &out));
        d.freeze_router = MOE_OFF, d.training = MOE_OFF;
        CHECK_OK(moe_desc_resolve(&d, &out));
        d.training = MOE_ON;
        for (int l = 0; l < MOE_LOSS_COUNT; l++) d.loss[l] = MOE_OFF; /* of the task alone */
        CHECK_STATUS(moe_desc_resolve(&d, &out), MOE_E_ONE_WEIGHT);
        d.normalize = MOE_OFF;
        if (d.gate == MOE_GATE_SOFTMAX_SELECTED) d.gate = MOE_GATE_SOFTMAX;
        if (d.combine == MOE_COMBINE_ROBUST) d.combine = MOE_COMBINE_SUM;
        if (!CHECK(router_gradient(&d) > 1e-3)) printf("        %s\n", rows[i]);
    }
    CHECK(!strcmp(moe_status_field(MOE_E_ONE_WEIGHT), "normalize"));
    static const char *const fine[] = {"n_experts=1", "score=hash top_k=1 normalize=true", "top_k=1",
                                       "select=expert-choice top_k=1 normalize=true", "select=sampled gate=sparsemixer",
                                       "select=all top_k=1 normalize=true", "top_k=2 top_k_min=1 schedule_steps=9"};
    for (size_t i = 0; i < sizeof fine / sizeof *fine; i++) {
        moe_desc d = row_desc(NULL, fine[i]);
        if (!CHECK_OK(moe_desc_resolve(&d, &out))) printf("        %s\n", fine[i]);
    }
}

static void test_nothing_is_left(void) { CHECK(test_live_blocks == 0); }

/* ---- LASER: balance at inference, over the batch and over batches ---- */
static double busiest(const moe_tape *t) {
    uint64_t most = 0;
    for (size_t e = 0; e < E; e++)
        if (t->routes.load[e] > most) most = t->routes.load[e];
    return (double)most * E / (double)(t->n_tokens * 2);
}
static void test_laser(void) {
    enum { T = 400, HALF = 170 };
    static int32_t first[T * 2], plain[T * 2], want[T * 2];
    float window[E] = {0};
    moe_layer *topk = row(NULL, ""), *m = row(NULL, "select=laser top_p=0.6 threshold=0.2 candidates=5");
    if (!topk || !m) return;
    tokens(T);
    lean(topk, 3, 1.0f), lean(m, 3, 1.0f);
    const moe_tape *t = go(topk, T, 1);
    memcpy(plain, t->index, sizeof plain);
    double before = busiest(t);
    t = go(m, T, 0);
    CHECK(!memcmp(t->index, plain, sizeof plain)); /* training: top-k */
    t = go(m, T, 1);
    memcpy(first, t->index, sizeof first);
    CHECK(busiest(t) < before / 1.3);
    CHECK_OK(moe_laser(T, E, 2, 0.6f, 0.2f, 5, t->scores, window, want, NULL, 0));
    CHECK(!memcmp(first, want, sizeof first) && memcmp(first, plain, sizeof first));
    for (size_t e = 0; e < E; e++) CHECK((uint64_t)window[e] == t->routes.load[e]);
    for (size_t i = 0; i < T; i++) { /* weights of the chosen, normalised */
        double p[2];
        for (size_t k = 0; k < 2; k++) p[k] = (double)t->prob[i * E + (size_t)t->index[i * 2 + k]];
        CHECK_NEAR(t->weight[i * 2], p[0] / (p[0] + p[1]), 1e-6);
    }
    memset(window, 0, sizeof window); /* cut in two with a window: as in one piece */
    moe_layer_side(m)->window = window;
    moe_layer_side(m)->evaluate = 1;
    CHECK_OK(moe_forward(m, x, HALF, y));
    CHECK(!memcmp(moe_layer_tape(m)->index, first, HALF * 2 * sizeof *first));
    CHECK_OK(moe_forward(m, x + HALF * D, T - HALF, y));
    CHECK(!memcmp(moe_layer_tape(m)->index, first + HALF * 2, (T - HALF) * 2 * sizeof *first));
    window[2] = NAN;
    CHECK_STATUS(moe_forward(m, x, T, y), MOE_E_WINDOW);
    moe_layer_free(topk), moe_layer_free(m);
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D;
    d.select = MOE_SELECT_LASER;
    CHECK_OK(moe_desc_resolve(&d, &d));
    CHECK(d.candidates == 4 && d.top_p == 0.8f);
    d.candidates = 1;
    CHECK_STATUS(moe_desc_resolve(&d, &d), MOE_E_CANDIDATES);
    m = row(NULL, "select=laser top_p=0.6 threshold=0.2 candidates=5 gate=softmax-selected"); /* by prob as well */
    if (!m) return;
    lean(m, 3, 1.0f);
    CHECK(!memcmp(go(m, T, 1)->index, first, sizeof first));
    moe_layer_free(m);
}

/* ---- pruning by SimBal's tau ---- */
static void check_prune(const char *more, float tau, int fallback) {
    enum { T = 200 };
    static int32_t all[T * 4];
    char fields[200];
    moe_layer *plain = row(NULL, more);
    snprintf(fields, sizeof fields, "%s prune=%g fallback=%s", more, (double)tau, fallback ? "true" : "false");
    moe_layer *m = row(NULL, fields);
    if (!plain || !m) return;
    size_t gone = 0, stay = 0, none = 0;
    tokens(T);
    memcpy(all, go(plain, T, 1)->index, sizeof all);
    const moe_tape *t = go(m, T, 0);
    CHECK(!memcmp(t->index, all, sizeof all)); /* training: nobody */
    t = go(m, T, 1);
    for (size_t i = 0; i < T; i++) {
        double sum = 0, kept = 0;
        for (size_t k = 0; k < 4; k++) {
            size_t e = (size_t)all[i * 4 + k];
            double p = strstr(more, "sigmoid") ? 1 / (1 + exp(-(double)t->logits[i * E + e])) : t->prob[i * E + e];
            int stays = p >= (double)tau || (fallback && k == 0);
            if (fabs(p - (double)tau) > 1e-6) CHECK(t->index[i * 4 + k] == (stays ? (int32_t)e : -1));
            if (t->index[i * 4 + k] < 0) CHECK(t->weight[i * 4 + k] == 0.0f);
            else kept += p;
            gone += t->index[i * 4 + k] < 0;
            sum += (double)t->weight[i * 4 + k];
        }
        none += kept <= 0;
        CHECK_NEAR(sum, kept > 0, 1e-6); /* normalised over those that stay */
        stay += choices(t, i);
    }
    CHECK(gone > 20 && stay > 20 && t->routes.n_routes == stay);
    if (fallback) CHECK(none == 0);
    moe_layer_free(plain), moe_layer_free(m);
}
static void test_prune(void) {
    check_prune("top_k=4", 0.12f, 1);
    check_prune("top_k=4", 0.2f, 0);
    check_prune("top_k=4 gate=softmax-selected", 0.12f, 1);
    check_prune("top_k=4 gate=sigmoid", 0.55f, 1);
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D;
    d.prune = 1.5f;
    CHECK_STATUS(moe_desc_resolve(&d, &d), MOE_E_PRUNE);
    d.prune = NAN;
    CHECK_STATUS(moe_desc_resolve(&d, &d), MOE_E_PRUNE);
}

int main(void) {
    RUN(test_softmax_topk);
    RUN(test_gshard);
    RUN(test_expert_choice);
    RUN(test_deepseek_v3);
    RUN(test_top_p);
    RUN(test_laser);
    RUN(test_prune);
    RUN(test_sinkhorn);
    RUN(test_base);
    RUN(test_sparsemixer);
    RUN(test_smoe_dropout);
    RUN(test_gating_dropout);
    RUN(test_equal_logits);
    RUN(test_ecology);
    RUN(test_growth);
    RUN(test_one_weight);
    RUN(test_nothing_is_left);
    return test_end();
}
