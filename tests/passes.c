/* Level 2 gives the bits of the layer, and runs over a routing of the caller's own; sizes and numbers of every kind. */
#include "test.h"
#include "inside.h"
#include "oracle.h"
#include "fixture.h"

/* ---- level 2 gives the bits of the layer ---- */
static void get_expert(const fixture *F, size_t e, moe_expert_arrays *w) {
    size_t d = F->d.d_model, f = F->d.d_ff, each[ORACLE_PARTS] = {0, d * f, d * f, f * d, f, f, d};
    float *out[ORACLE_PARTS] = {NULL};
    for (int i = ORACLE_W1; i < ORACLE_PARTS; i++) {
        if (F->o->count[i] == 0) continue;
        out[i] = test_floats(each[i]);
        for (size_t j = 0; j < each[i]; j++) out[i][j] = (float)F->o->p[i][e * each[i] + j];
    }
    w->w1 = out[ORACLE_W1], w->wu = out[ORACLE_WU], w->w2 = out[ORACLE_W2];
    w->b1 = out[ORACLE_B1], w->bu = out[ORACLE_BU], w->b2 = out[ORACLE_B2];
}

static moe_expert_weights weights_of(const moe_expert_arrays *w) {
    moe_expert_weights weights = {w->w1, w->wu, w->w2, w->b1, w->bu, w->b2};
    return weights;
}
static void free_expert(moe_expert_arrays *w) {
    free(w->w1), free(w->wu), free(w->w2), free(w->b1), free(w->bu), free(w->b2);
}

static void level_two(const moe_desc *desc, size_t T) {
    fixture F;
    if (!fixture_new(&F, desc, T)) return;
    const moe_desc *d = &F.d;
    size_t n_params = 0, n_grads, n = T * d->d_model, router = F.o->count[ORACLE_ROUTER];
    CHECK_OK(moe_forward(F.m, F.x, T, F.y));
    CHECK_OK(moe_backward(F.m, F.dy, F.dx));
    float *grads = grads_of(F.m, F.o->count, &n_grads);

    CHECK_OK(moe_experts_count(d, &n_params));
    float *params = test_floats(n_params), *d_params = test_floats(n_params), *R = test_floats(router),
          *dR = test_floats(router);
    for (size_t i = 0; i < router; i++) R[i] = (float)F.o->p[ORACLE_ROUTER][i];
    for (size_t i = 0; i < n_params; i++) params[i] = NAN; /* pack writes the padding too */
    for (size_t e = 0; e < F.o->G; e++) {
        moe_expert_arrays w, back;
        get_expert(&F, e, &w), get_expert(&F, e, &back);
        moe_expert_weights weights = weights_of(&w);
        CHECK_OK(moe_expert_pack(d, e, &weights, params));
        if (w.w1) memset(back.w1, 0, d->d_model * d->d_ff * sizeof(float));
        if (w.w2) memset(back.w2, 0, d->d_model * d->d_ff * sizeof(float));
        CHECK_OK(moe_expert_unpack(d, e, params, &back));
        CHECK_SAME(back.w1, w.w1, d->d_model * d->d_ff);
        CHECK_SAME(back.w2, w.w2, d->d_model * d->d_ff);
        if (w.wu) CHECK_SAME(back.wu, w.wu, d->d_model * d->d_ff);
        if (w.b1) CHECK_SAME(back.b1, w.b1, d->d_ff);
        if (w.b2) CHECK_SAME(back.b2, w.b2, d->d_model);
        free_expert(&w), free_expert(&back);
    }
    moe_tape *t = NULL;
    CHECK_OK(moe_tape_new(&t, d, T + 3, MOE_ON));
    if (!CHECK(t != NULL)) return;
    float *y = test_floats(n), *dx = test_floats(n);
    CHECK_OK(moe_route(t, R, F.x, T));
    CHECK_OK(moe_experts_forward(t, params, y));
    CHECK_SAME(y, F.y, n);
    float *d_weight = test_floats(t->routes.n_routes);
    for (size_t i = 0; i < n_params; i++) d_params[i] = NAN; /* fresh: set, not added */
    CHECK_OK(moe_experts_backward(t, params, F.dy, 1, d_params, d_weight, dx));
    CHECK_OK(moe_route_backward(t, R, d_weight, dR, dx));
    CHECK_SAME(dx, F.dx, n);
    CHECK_SAME(dR, grads, router);
    size_t dd = d->d_model, f = d->d_ff, each[ORACLE_PARTS] = {0, dd * f, dd * f, f * dd, f, f, dd};
    for (size_t e = 0; e < F.o->G; e++) { /* the experts' gradients have the parameters' layout */
        moe_expert_arrays w;
        get_expert(&F, e, &w);
        CHECK_OK(moe_expert_unpack(d, e, d_params, &w));
        const float *part[ORACLE_PARTS] = {NULL, w.w1, w.wu, w.w2, w.b1, w.bu, w.b2}, *at = grads + router;
        for (int i = ORACLE_W1; i < ORACLE_PARTS; at += F.o->count[i++])
            if (part[i]) CHECK_SAME(part[i], at + e * each[i], each[i]);
        free_expert(&w);
    }
    for (int l = 0; l < MOE_LOSS_COUNT; l++)
        if (d->loss[l] > 0) CHECK(t->loss[l] == moe_layer_tape(F.m)->loss[l]);
    moe_tape_free(t);
    free(grads), free(params), free(d_params), free(R), free(dR), free(y), free(dx), free(d_weight);
    fixture_free(&F);
}

static void test_level_two(void) {
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++)
        for (int capacity = 0; capacity < 2; capacity++) {
            moe_desc d = desc_of(18, 27, 6, 2);
            d.expert = (moe_expert_kind)expert, d.bias = expert % 2 ? MOE_OFF : MOE_ON, d.n_shared = capacity ? 1 : 0;
            d.capacity_factor = capacity ? 1 : 0, d.loss[MOE_LOSS_SWITCH] = 0.2f, d.loss[MOE_LOSS_Z] = 0.1f;
            d.gate = capacity ? MOE_GATE_SOFTMAX_SELECTED : MOE_GATE_SOFTMAX;
            level_two(&d, 31);
        }
    CHECK(test_live_blocks == 0);
}

/* Experts over a routing of the caller's own, with tokens that choose nobody and weights of any sign. */
static void test_own_routing(void) {
    moe_desc d = desc_of(11, 17, 5, 3);
    fixture F;
    enum { T = 26, K = 3 };
    int32_t index[T * K];
    float weight[T * K];
    size_t n_params = 0;
    if (!fixture_new(&F, &d, T)) return;
    for (size_t t = 0; t < T; t++)
        for (size_t j = 0; j < K; j++) {
            index[t * K + j] = (t + j) % 4 == 3 ? -1 : (int32_t)((t * 7 + j * 2) % 5);
            weight[t * K + j] = test_uniform(-2, 2);
        }
    CHECK_OK(moe_experts_count(&F.d, &n_params));
    float *params = test_floats(n_params), *d_params = test_floats(n_params);
    for (size_t e = 0; e < 5; e++) {
        moe_expert_arrays w;
        get_expert(&F, e, &w);
        moe_expert_weights weights = weights_of(&w);
        CHECK_OK(moe_expert_pack(&F.d, e, &weights, params));
        free_expert(&w);
    }
    moe_tape *t = NULL;
    CHECK_OK(moe_tape_new(&t, &F.d, T, MOE_ON));
    if (!CHECK(t != NULL)) return;
    CHECK_OK(moe_tape_tokens(t, F.x, T));
    CHECK_OK(moe_routes_fill(&t->routes, T, index, weight, 0, MOE_ORDER_TOKEN));
    CHECK_OK(moe_experts_forward(t, params, F.y));
    float d_weight[T * K];
    CHECK_OK(moe_experts_backward(t, params, F.dy, 0, d_params, d_weight, F.dx));
    oracle *o = F.o; /* by the oracle's expert, pair by pair */
    double z[17], u[17], h[17], out[11], dout[11], want = 0;
    for (size_t i = 0; i < T * K; i++) {
        if (index[i] < 0) continue;
        const double *x = o->x + i / K * 11, *dy = o->dy + i / K * 11;
        oracle_expert(o, (size_t)index[i], x, z, u, h, out);
        want = 0;
        for (size_t j = 0; j < 11; j++) {
            o->y[i / K * 11 + j] += (double)weight[i] * out[j];
            want += dy[j] * out[j];
            dout[j] = dy[j] * (double)weight[i];
        }
        CHECK_WITHIN(d_weight[t->routes.slot[i]], want, 2e-6);
        oracle_expert_backward(o, (size_t)index[i], x, z, u, h, dout, o->dx + i / K * 11);
    }
    CHECK_WITHIN(worst_error(F.y, o->y, T * 11), 0, 0.7 * limit_for(28));
    CHECK_WITHIN(worst_error(F.dx, o->dx, T * 11), 0, limit_for(28));
    size_t each = 11 * 17;
    for (size_t e = 0; e < 5; e++) {
        moe_expert_arrays w;
        get_expert(&F, e, &w);
        CHECK_OK(moe_expert_unpack(&F.d, e, d_params, &w));
        CHECK_WITHIN(worst_error(w.w1, o->g[ORACLE_W1] + e * each, each), 0, 1.6 * limit_for(54));
        CHECK_WITHIN(worst_error(w.wu, o->g[ORACLE_WU] + e * each, each), 0, 0.9 * limit_for(54));
        CHECK_WITHIN(worst_error(w.w2, o->g[ORACLE_W2] + e * each, each), 0, 1.2 * limit_for(54));
        free_expert(&w);
    }
    moe_tape_free(t);
    free(params), free(d_params);
    fixture_free(&F);
}

/* The loads that the Switch loss sees may come from elsewhere: here, from two halves of one batch. */
static void test_loads_over_micro_batches(void) {
    moe_desc d = desc_of(10, 12, 6, 2);
    d.loss[MOE_LOSS_SWITCH] = 0.7f;
    fixture F;
    size_t router;
    if (!fixture_new(&F, &d, 40)) return;
    router = F.o->count[ORACLE_ROUTER];
    float *R = test_floats(router), *whole = test_floats(router), *parts = test_floats(router);
    uint64_t load[6] = {0};
    moe_tape *t = NULL;
    for (size_t i = 0; i < router; i++) R[i] = (float)F.o->p[ORACLE_ROUTER][i];
    CHECK_OK(moe_tape_new(&t, &F.d, 40, MOE_ON));
    if (!CHECK(t != NULL)) return;
    CHECK_OK(moe_route(t, R, F.x, 40));
    memcpy(load, t->routes.load, sizeof load);
    CHECK_OK(moe_route_backward(t, R, NULL, whole, NULL));
    double value = t->loss[MOE_LOSS_SWITCH], mean = 0;
    for (size_t half = 0; half < 2; half++) {
        CHECK_OK(moe_route(t, R, F.x + half * 200, 20));
        t->side.load = load;
        CHECK_OK(moe_route_backward(t, R, NULL, parts, NULL));
        t->side.load = NULL;
        mean += t->loss[MOE_LOSS_SWITCH] / 2;
    }
    CHECK_NEAR(mean, value, 2e-15);
    for (size_t i = 0; i < router; i++) CHECK_WITHIN(parts[i] / 2, whole[i], 1e-7);
    moe_tape_free(t);
    free(R), free(whole), free(parts);
    fixture_free(&F);
}

/* ---- systems ---- */
#include "rows.h"

static int is_auction(const char *stage) { return strstr(stage, "auction") != NULL; }

static void test_odd_sizes(void) {
    static const char *const sizes[] = {
        "", "n_experts=1 top_k=1", "n_experts=8 top_k=8", "n_experts=2 top_k=1 d_model=2", "sequence=1", "sequence=0"};
    tokens(64);
    for (size_t i = 0; i < STAGES; i++)
        for (size_t k = 0; k < 6; k++) {
            char more[200];
            if (is_auction(stages[i]) && k == 2) continue;
            if (strstr(stages[i], "n_codes") && k == 1)
                snprintf(more, sizeof more, "%s %s", stages[i], "n_experts=1 top_k=1 n_codes=1");
            else snprintf(more, sizeof more, "%s %s", stages[i], sizes[k]);
            if (k == 3) strncat(more, " d_ff=1", sizeof more - strlen(more) - 1);
            if (k == 3 && strstr(more, "robust")) /* one weight of one: nothing to learn */
                strncat(more, " freeze_router=true", sizeof more - strlen(more) - 1);
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
        {"n_experts=4 top_k=5", MOE_E_TOP_K}, {"n_experts=1 top_k=2", MOE_E_TOP_K},
        {"score=slice d_model=17", MOE_E_SLICE},
        {"score=slice d_model=4", MOE_E_SLICE}, {"score=subspace", MOE_E_SUBSPACE},
        {"select=auction top_k=2", MOE_E_ONE_CHOICE},
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

static void test_one_huge_logit(void) {
    enum { T = 40 };
    static const char *const selects[] = {"",
                                          "gate=softmax-selected",
                                          "gate=sigmoid",
                                          "select=groups n_groups=4 top_groups=1",
                                          "select=top-p",
                                          "select=threshold gate=sigmoid threshold=0.5",
                                          "select=threshold gate=sign",
                                          "select=expert-choice",
                                          "select=sinkhorn",
                                          "select=auction",
                                          "select=sampled gate=sparsemixer",
                                          "select=all",
                                          "combine=soft select=all",
                                          "combine=merge select=all",
                                          "combine=robust top_k=3",
                                          "n_codes=8",
                                          "noise=gaussian",
                                          "random_second=true",
                                          "learn_temperature=true",
                                          "temperature=0.01"};
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
        for (size_t i = 0; i < T; i++)
            CHECK(index[i * k] == (way == 1 ? 0 : 6) && index[i * k + 1] == (way == 2 ? -1 : way == 1 ? 1 : 0));
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

static void test_level_two_statuses(void) {
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
        t->side.experts = inside_params(m);
        if (n) CHECK_STATUS(moe_route(t, NULL, x, T), MOE_E_NULL_PARAMS);
        CHECK_STATUS(moe_route(t, router, NULL, T), MOE_E_NULL_X);
        CHECK_STATUS(moe_route(NULL, router, x, T), MOE_E_NULL_TAPE);
        CHECK_STATUS(moe_route(t, router, x, T + 1), MOE_E_N_TOKENS);
        CHECK_STATUS(moe_route_backward(t, router, NULL, NULL, NULL), MOE_E_NO_FORWARD);
        if (count_of(m, "router") && !strstr(stages[i], "n_codes")) /* the router is NaN */
            if (!CHECK_STATUS(moe_route(t, router, x, T), MOE_E_NAN_X)) printf("        %s\n", stages[i]);
        if (d.score == MOE_SCORE_SUBSPACE) {
            t->side.experts = NULL;
            CHECK_STATUS(moe_route(t, router, x, T), MOE_E_NULL_EXPERTS);
        }
        t->side.experts = inside_params(m);
        memset(router, 0, n * sizeof *router);
        CHECK_OK(moe_route(t, router, x, T));
        for (size_t e = 0; e < E; e++) most += kept(t, e);
        CHECK(most == t->routes.n_routes);
        CHECK_OK(moe_route(t, router, NULL, 0)); /* no tokens need no memory */
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

/* ---- what holds for one forward ---- */
static moe_desc small_desc(const char *text) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.n_experts = E;
    if (!CHECK_OK(moe_desc_parse(&d, text, NULL))) printf("        %s\n", text);
    return d;
}
/* The temperature goes linearly from 2 to 0.5 in 10 steps: prob is the softmax of the logits over it. */
static void test_temperature_by_step(void) {
    moe_desc d = small_desc("temperature=2 temperature_end=0.5 schedule_steps=10");
    moe_tape *t = NULL;
    float router[D * E];
    tokens(4);
    test_fill(router, D * E, -1, 1);
    CHECK_OK(moe_tape_new(&t, &d, 4, MOE_ON));
    for (uint64_t step = 0; step <= 12; step += 3) {
        double temperature = 2 - 1.5 * (step < 10 ? (double)step : 10) / 10;
        t->side.step = step;
        CHECK_OK(moe_route(t, router, x, 4));
        for (size_t i = 0; i < 4 * E; i += E) {
            double sum = 0;
            for (size_t e = 0; e < E; e++) sum += exp((double)t->logits[i + e] / temperature);
            for (size_t e = 0; e < E; e++)
                CHECK_WITHIN(t->prob[i + e], exp((double)t->logits[i + e] / temperature) / sum, 1e-6);
        }
    }
    moe_tape_free(t);
}
/* Expert dropout that would leave a token nothing leaves it all. */
static void test_expert_drop_of_all(void) {
    moe_layer *m = row(NULL, "expert_drop=0.999999 sequence=1");
    float keep[24 * 2];
    if (!m) return;
    tokens(24);
    const moe_tape *t = go(m, 24, 1);
    memcpy(keep, t->weight, sizeof keep);
    t = go(m, 24, 0);
    CHECK_SAME(t->weight, keep, 24 * 2);
    CHECK(t->routes.n_routes == 48);
    moe_layer_free(m);
}
/* SparseMixer samples by softmax(logits / temperature) of those it does not mask: here of 1 and 0.9. */
static void test_sampling_temperature(void) {
    static const char *const text[] = {"temperature=0.1", "temperature=1", "temperature=0.05"};
    for (int i = 0; i < 3; i++) {
        char more[100];
        const double temperature[] = {0.1, 1, 0.05}, p = 1 / (1 + exp(-0.1 / temperature[i])), n = MAX_TOKENS;
        snprintf(more, sizeof more, "gate=sparsemixer select=sampled top_k=1 %s", text[i]);
        moe_layer *m = row(NULL, more);
        if (!m) return;
        tokens(MAX_TOKENS);
        float *router = get(m, "router");
        for (size_t j = 0; j < D * E; j++) router[j] = 0;
        for (size_t e = 0; e < E; e++) router[(D - 1) * E + e] = e == 2 ? 1 : e == 5 ? 0.9f : -1;
        set(m, "router", router);
        const moe_tape *t = go(m, MAX_TOKENS, 0);
        CHECK(fabs((double)t->routes.load[2] - n * p) < 5 * sqrt(n * p * (1 - p)));
        CHECK(t->routes.load[2] + t->routes.load[5] == MAX_TOKENS);
        moe_layer_free(m);
    }
}
/* Warm-up: every token has draws of its own. Of 4,095 pairs of neighbours an eighth chooses alike. */
static void test_warm_up_draws(void) {
    const double n = MAX_TOKENS - 1, p = 1.0 / E;
    double alike = 0;
    moe_layer *m = row(NULL, "random_steps=1 top_k=1");
    tokens(MAX_TOKENS);
    const moe_tape *t = go(m, MAX_TOKENS, 0);
    for (size_t i = 1; i < MAX_TOKENS; i++) alike += t->index[i] == t->index[i - 1];
    CHECK(fabs(alike - n * p) < 5 * sqrt(n * p * (1 - p)));
    for (size_t e = 0; e < E; e++) CHECK(fabs((double)t->routes.load[e] - n * p) < 5 * sqrt(n * p * (1 - p)));
    moe_layer_free(m);
}
/* d_previous is added to. */
static void test_d_previous_is_added_to(void) {
    static float previous[24 * E], once[24 * E], twice[24 * E];
    for (int again = 0; again < 2; again++) {
        moe_layer *m = row(NULL, "residual=true");
        if (!m) return;
        if (!again) tokens(24), test_fill(previous, 24 * E, -1, 1);
        float *matrix = get(m, "router.residual");
        for (size_t i = 0; i < E * E; i++) matrix[i] = 0.1f * (float)(i % 7);
        set(m, "router.residual", matrix);
        for (size_t i = 0; i < 24 * E; i++) twice[i] = 64; /* a sum that is exact to 2^-18 */
        moe_layer_side(m)->previous = previous, moe_layer_side(m)->d_previous = again ? twice : once;
        (void)go(m, 24, 0);
        CHECK_OK(moe_backward(m, dy, NULL));
        moe_layer_free(m);
    }
    double all = 0;
    for (size_t i = 0; i < 24 * E; i++) {
        CHECK_WITHIN((double)twice[i] - 64, (double)once[i], 0x1p-16);
        all += fabs((double)once[i]);
    }
    CHECK(all > 0.1);
}
/* An expert of weight 0 takes no part, whatever it gives; and routes that changed since the forward are refused. */
static void test_weight_zero(void) {
    static const int32_t both[2] = {0, 1}, first[2] = {0, -1};
    static const float weight[2] = {1, 0};
    moe_desc d = small_desc("expert=relu n_experts=2 top_k=2");
    moe_tape *t = NULL;
    size_t n = 0;
    CHECK_OK(moe_experts_count(&d, &n));
    float *params = test_floats(n), *d_params = test_floats(n), w1[D * F], w2[F * D];
    for (size_t e = 0; e < 2; e++) {
        const moe_expert_weights w = {w1, NULL, w2, NULL, NULL, NULL};
        test_fill(w1, D * F, -1, 1), test_fill(w2, F * D, -1, 1);
        if (e) w2[3] = NAN;
        CHECK_OK(moe_expert_pack(&d, e, &w, params));
    }
    tokens(1);
    CHECK_OK(moe_tape_new(&t, &d, 1, MOE_ON));
    float only[D];
    CHECK_OK(moe_tape_tokens(t, x, 1));
    CHECK_OK(moe_routes_fill(&t->routes, 1, first, weight, 0, MOE_ORDER_DEFAULT));
    CHECK_OK(moe_experts_forward(t, params, only));
    CHECK_OK(moe_routes_fill(&t->routes, 1, both, weight, 0, MOE_ORDER_DEFAULT));
    CHECK_STATUS(moe_experts_backward(t, params, dy, 1, d_params, NULL, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_tape_tokens(t, x, 1));
    CHECK_OK(moe_routes_fill(&t->routes, 1, both, weight, 0, MOE_ORDER_DEFAULT));
    CHECK_OK(moe_experts_forward(t, params, y));
    CHECK_SAME(y, only, D);
    moe_tape_free(t);
    free(params), free(d_params);
}
/* A forward that is refused for a number names its token, as the caller counts them. */
static void test_error_names_the_token(void) {
    static const char *const text[] = {"", "score=hash", "score=slice", "combine=soft select=all", "noise=gaussian",
                                       "score=mlp", "combine=soft select=all soft_slots=2 score=projected"};
    static unsigned char mask[200];
    test_pattern = 0xff; /* NaN */
    for (size_t i = 0; i < sizeof text / sizeof *text; i++)
        for (size_t at = 0; at < 200; at += 66) {
            moe_layer *m = row(NULL, text[i]);
            if (!m) return;
            tokens(200);
            memset(mask, 1, sizeof mask);
            if (at % 4 == 0) { /* else in memory that no forward has written */
                (void)go(m, 200, 0);
                CHECK(moe_layer_tape(m)->bad_token == SIZE_MAX);
            }
            x[at * D + 3] = i % 2 ? NAN : INFINITY;
            x[199 * D] = NAN;
            CHECK_STATUS(moe_forward(m, x, 200, y), MOE_E_NAN_X);
            CHECK(moe_layer_tape(m)->bad_token == at);
            moe_layer_side(m)->mask = mask;
            mask[at] = mask[at / 2] = 0;
            CHECK_STATUS(moe_forward(m, x, 200, y), MOE_E_NAN_X);
            CHECK(moe_layer_tape(m)->bad_token == 199);
            moe_layer_free(m);
        }
    test_pattern = -1;
}
/* Used by one token: its two experts and the branch's, and the router with codes and branch. */
static void test_active_params_of_the_branch(void) {
    moe_desc d = small_desc("expert=relu n_experts=4 n_codes=8");
    moe_layer *m = NULL;
    CHECK_OK(moe_layer_new(&m, &d));
    CHECK(moe_layer_active_params(m) == 3 * (2 * D * F) + D * 4 + 8 * D + D * 2);
    moe_layer_free(m);
}

/* Routing kept of one forward and given to the experts of the layer, in float32 and stored otherwise: the same bits. */
static void test_layer_experts(void) {
    enum { TOKENS = 9, WIDTH = 8, SLOTS = 2, ALL = TOKENS * WIDTH };
    float in[ALL], out[ALL], again[ALL], weight[TOKENS * SLOTS];
    int32_t index[TOKENS * SLOTS];
    moe_layer *m = row("mixtral", "d_model=8 n_experts=5 d_ff=40"), *stored = NULL;
    moe_layer_formats formats = {.format = MOE_FORMAT_INT4};
    moe_tape *t = NULL;
    if (!m) return;
    test_fill(in, ALL, -1, 1);
    CHECK_OK(moe_layer_quantize(m, &formats, &stored));
    CHECK_OK(moe_tape_new(&t, moe_layer_desc(m), TOKENS, MOE_OFF));
    for (int k = 0; k < 2; k++) {
        const moe_layer *layer = k ? stored : m;
        CHECK_OK(moe_forward_tape(layer, t, in, TOKENS, out));
        memcpy(index, t->index, sizeof index);
        memcpy(weight, t->weight, sizeof weight);
        CHECK_OK(moe_forward_tape(layer, t, out, TOKENS, again)); /* something else between */
        CHECK_OK(moe_tape_tokens(t, in, TOKENS));
        t->routes.n_tokens = 0;
        CHECK_STATUS(moe_layer_experts(layer, t, again), MOE_E_NO_ROUTES);
        CHECK_OK(moe_routes_fill(&t->routes, TOKENS, index, weight, 0, MOE_ORDER_TOKEN));
        CHECK_STATUS(moe_layer_experts(layer, t, NULL), MOE_E_NULL_Y);
        CHECK_OK(moe_layer_experts(layer, t, again));
        CHECK(memcmp(out, again, sizeof out) == 0);
        CHECK_STATUS(moe_layer_experts(NULL, t, out), MOE_E_NULL_LAYER);
        CHECK_STATUS(moe_layer_experts(layer, NULL, out), MOE_E_NULL_TAPE);
    }
    moe_tape_free(t);
    moe_layer_free(stored), moe_layer_free(m);
}

/* What stands beside a batch is looked at: before a forward, and before a backward changes anything. */
static void test_side(void) {
    enum { N = 6, R = D * E + 1 };
    static const float bad[] = {-1, NAN, INFINITY};
    static float router[R], grad[R], half[R], weights[2][4][N * 2], params[1], d_weight[N * 2];
    const uint64_t load[E] = {9, 9, 9, 9, 9, 9, 9, 9};
    double mean[E];
    float bias[E] = {0};
    int32_t index[N * 2];
    moe_desc d = small_desc("learn_temperature=true switch_load=first loss.switch=0.5 top_k=2");
    moe_tape *t = NULL;
    CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON));
    tokens(N);
    test_fill(router, R - 1, -1, 1);
    CHECK_STATUS(moe_tape_index(NULL, index), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_tape_index(t, index), MOE_E_NO_ROUTES);
    for (int i = 0; i < 3; i++) {
        t->side.temperature = bad[i];
        CHECK_STATUS(moe_route(t, router, x, N), MOE_E_TEMPERATURE);
        t->side.temperature = 0;
        bias[3] = bad[i];
        t->side.bias = bias;
        CHECK_STATUS(moe_route(t, router, x, N), i ? MOE_E_NAN_BIAS : MOE_OK);
        t->side.bias = NULL;
    }
    for (int i = 0; i < 4; i++) { /* a temperature that is given counts, not the learned one, which has its limits */
        static const float scale[4] = {20, 31, -20, -31};
        router[R - 1] = scale[i];
        for (int given = 0; given < 2; given++) {
            t->side.temperature = given ? 2 : 0;
            CHECK_OK(moe_route(t, router, x, N));
            memcpy(weights[given][i], t->weight, sizeof weights[given][i]);
        }
        CHECK_SAME(weights[1][i], weights[1][0], N * 2);
        if (i % 2) CHECK_SAME(weights[0][i], weights[0][i - 1], N * 2);
    }
    CHECK(weights[0][0][0] == 1 && weights[0][2][0] != 1);
    t->side.temperature = 0;
    router[R - 1] = NAN;
    CHECK_STATUS(moe_route(t, router, x, N), MOE_E_NAN_ROUTER);
    router[R - 1] = 0;
    CHECK_OK(moe_route(t, router, x, N));
    CHECK_STATUS(moe_tape_index(t, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_tape_index(t, index));
    CHECK(!memcmp(index, t->index, sizeof index));
    for (int i = 0; i < 3; i++) {
        t->side.loss_weight = bad[i];
        CHECK_STATUS(moe_route_backward(t, router, d_weight, grad, NULL), MOE_E_LOSS_WEIGHT);
        t->side.loss_weight = 0;
        for (size_t e = 0; e < E; e++) mean[e] = e == 5 ? (double)bad[i] : 0.125;
        t->side.mean = mean;
        CHECK_STATUS(moe_route_backward(t, router, d_weight, grad, NULL), MOE_E_NAN_MEAN);
        t->side.mean = NULL;
    }
    t->side.load = load;
    CHECK_STATUS(moe_route_backward(t, router, d_weight, grad, NULL), MOE_E_NULL_LOAD);
    t->side.load = NULL;
    CHECK_STATUS(moe_route_backward(t, NULL, d_weight, grad, NULL), MOE_E_NULL_PARAMS);
    for (size_t i = 0; i < R; i++) CHECK(grad[i] == 0);
    CHECK_OK(moe_route_backward(t, router, d_weight, grad, NULL));
    CHECK_OK(moe_route(t, router, x, N));
    t->side.loss_weight = 0.5f;
    CHECK_OK(moe_route_backward(t, router, d_weight, half, NULL));
    for (size_t i = 0; i < R; i++) CHECK(half[i] == 0.5f * grad[i]);
    CHECK(half[0] != 0);
    moe_tape_free(t);
    d = small_desc("score=random"); /* no router: none is needed */
    CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON));
    CHECK_OK(moe_route(t, NULL, x, N));
    CHECK_OK(moe_route_backward(t, NULL, d_weight, params, NULL));
    moe_tape_free(t);
}
/* A bias so large that a finite score has no sum with it: whatever selects says so, and gives no routes. */
static void test_bias_too_large(void) {
    static const char *const selects[] = {"gate=softmax-selected select=groups n_groups=4 top_groups=2",
                                          "select=sinkhorn", "select=auction top_k=1"};
    float bias[E], router[D * E];
    tokens(E);
    for (size_t i = 0; i < D * E; i++) router[i] = 0;
    for (size_t e = 0; e < E; e++) bias[e] = FLT_MAX, router[(D - 1) * E + e] = 1e38f;
    for (size_t i = 0; i < sizeof selects / sizeof *selects; i++) {
        moe_desc d = row_desc(NULL, selects[i]);
        moe_tape *t = NULL;
        if (!CHECK_OK(moe_tape_new(&t, &d, E, MOE_ON))) return;
        t->side.bias = bias;
        moe_status status = moe_route(t, router, x, E);
        if (!CHECK(moe_status_kind(status) == MOE_KIND_NUMBER)) printf("        %s\n", selects[i]);
        if (status) CHECK_STATUS(moe_experts_forward(t, router, y), MOE_E_NO_ROUTES);
        moe_tape_free(t);
    }
}
/* The load that LASER balances by goes on from forward to forward where the caller keeps it, and must be one. */
static void test_laser_window(void) {
    moe_desc d = small_desc("select=laser gate=softmax top_k=2 candidates=4 top_p=1 threshold=0 training=false");
    float router[D * E], window[E] = {0};
    int32_t once[E * 2];
    moe_tape *t = NULL;
    double sum = 0;
    tokens(E);
    test_fill(router, D * E, -1, 1);
    CHECK_OK(moe_tape_new(&t, &d, E, MOE_OFF));
    CHECK_OK(moe_route(t, router, x, E));
    memcpy(once, t->index, sizeof once);
    t->side.window = window;
    for (int round = 1; round <= 2; round++) {
        CHECK_OK(moe_route(t, router, x, E));
        CHECK((memcmp(once, t->index, sizeof once) == 0) == (round == 1));
        sum = 0;
        for (size_t e = 0; e < E; e++) sum += (double)window[e];
        CHECK(sum == round * (double)(E * 2));
    }
    window[1] = NAN;
    CHECK_STATUS(moe_route(t, router, x, E), MOE_E_WINDOW);
    moe_tape_free(t);
}
/* Routes that are not those of the tape's tokens any more. */
static void test_other_routes(void) {
    enum { N = 6, S = 4 };
    int32_t index[N * S];
    moe_desc d = small_desc("top_k=2"), soft = small_desc("combine=soft select=all");
    moe_tape *t = NULL;
    moe_routes more, own;
    size_t bytes = 0, n_params = 0;
    float router[D * E];
    test_fill(router, D * E, -1, 1);
    tokens(N);
    CHECK_OK(moe_experts_count(&d, &n_params));
    float *params = test_floats(n_params), *grads = test_floats(n_params);
    CHECK_OK(moe_routes_size(N, E, S, &bytes));
    void *memory = test_memory(bytes, 1);
    CHECK_OK(moe_routes_init(&more, N, E, S, memory, bytes));
    for (size_t i = 0; i < N * S; i++) index[i] = (int32_t)(i % S);
    CHECK_OK(moe_routes_fill(&more, N, index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON));
    CHECK_OK(moe_route(t, router, x, N));
    own = t->routes, t->routes = more; /* twice as many as there is room for */
    CHECK_STATUS(moe_experts_forward(t, params, y), MOE_E_N_TOKENS);
    t->routes = own;
    CHECK_OK(moe_experts_forward(t, params, y));
    for (size_t i = 0; i < N * 2; i++) index[i] = (int32_t)(i % 2) - 1; /* one a token */
    CHECK_OK(moe_routes_fill(&t->routes, N, index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_STATUS(moe_experts_backward(t, params, x, 1, grads, NULL, NULL), MOE_E_NO_FORWARD);
    moe_tape_free(t);
    CHECK_OK(moe_tape_new(&t, &soft, N, MOE_ON));
    CHECK_OK(moe_route(t, router, x, N));
    CHECK_OK(moe_tape_tokens(t, x, N)); /* of the slots' weights nothing is left */
    CHECK_STATUS(moe_experts_forward(t, params, y), MOE_E_NO_ROUTES);
    moe_tape_free(t);
    free(params), free(grads), free(memory);
}
/* The same bits whether or not somebody asks for the weights' gradients; a second backward adds as much again. */
static void test_backward_parts(void) {
    enum { N = 8 };
    static const char *const texts[] = {"loss.output-orthogonality=0.25", "combine=robust top_k=3",
                                        "combine=merge select=all sequence=4", "n_copy=1 n_constant=1", "bias=true",
                                        "combine=input", "combine=soft select=all"};
    float *router = test_floats(10000), d_weight[N * E];
    test_fill(router, 10000, -1, 1);
    tokens(N);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        moe_desc d = small_desc(texts[i]);
        moe_tape *t = NULL;
        size_t n = 0;
        if (!CHECK_OK(moe_experts_count(&d, &n)) || !CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON))) {
            printf("        %s\n", texts[i]);
            continue;
        }
        float *params = test_floats(n), *grads[3] = {test_floats(n), test_floats(n), test_floats(n)}, w[D * F];
        moe_expert_weights weights = {w, w, w, w, w, w};
        for (size_t e = 0; e < E; e++) {
            test_fill(w, D * F, -1, 1);
            (void)moe_expert_pack(&d, e, &weights, params);
        }
        for (int round = 0; round < 4; round++) { /* unwanted, wanted, and twice over */
            CHECK_OK(moe_route(t, router, x, N));
            CHECK_OK(moe_experts_forward(t, params, y));
            CHECK_OK(moe_experts_backward(t, params, x, round < 3, grads[round < 2 ? round : 2],
                                          round == 1 ? d_weight : NULL, NULL));
        }
        int ok = CHECK_SAME(grads[0], grads[1], n);
        double top = 0, off = 0;
        for (size_t k = 0; k < n; k++) {
            top = fmax(top, fabs((double)grads[2][k]));
            off = fmax(off, fabs((double)grads[2][k] - 2 * (double)grads[0][k]));
        }
        ok &= CHECK(top > 0.1 && off <= 1e-6 * top);
        if (!ok) printf("        %s\n", texts[i]);
        moe_tape_free(t);
        for (int k = 0; k < 3; k++) free(grads[k]);
        free(params);
    }
    free(router);
}
/* Biases given where there is no place for them are left out; sizes of descs that are none. */
static void test_what_is_not_wanted(void) {
    moe_desc d = small_desc("top_k=2"), bad = d;
    moe_tensor tensor;
    size_t n = 0;
    float w[D * F], ones[D] = {1};
    moe_expert_weights with = {w, w, w, w, w, w}, without = {w, w, w, NULL, NULL, NULL};
    moe_expert_arrays back = {NULL, NULL, NULL, ones, ones, ones};
    test_fill(w, D * F, -1, 1);
    CHECK_OK(moe_experts_count(&d, &n));
    float *params = test_floats(n), *other = test_floats(n);
    for (size_t e = 0; e < E; e++) CHECK_OK(moe_expert_pack(&d, e, &without, other));
    for (size_t e = 0; e < E; e++) CHECK_OK(moe_expert_pack(&d, e, &with, params));
    CHECK_SAME(params, other, n);
    CHECK_OK(moe_expert_unpack(&d, 0, params, &back)); /* nothing there, nothing written */
    CHECK(ones[0] == 1);
    bad.d_model = 0;
    CHECK_STATUS(moe_router_count(&d, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_desc_tensor(&d, 0, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_desc_tensor(&bad, 0, &tensor), MOE_E_D_MODEL);
    CHECK_STATUS(moe_router_count(&bad, &n), MOE_E_D_MODEL);
    free(params), free(other);
}

/* Pruned in evaluation, a choice is there if its score is; while gating dropout keeps tokens on their ranks, no more
 * than the rank's experts are. */
static void test_choices_taken_away(void) {
    enum { N = 24 };
    float router[D * E];
    int32_t index[N * E];
    moe_tape *t = NULL;
    static const char *const texts[] = {"select=threshold fallback=false threshold=0.2",
                                        "select=threshold fallback=false threshold=0.05 prune=0.2"};
    test_fill(router, D * E, -1, 1);
    tokens(N);
    for (int i = 0; i < 2; i++) {
        moe_desc d = small_desc(texts[i]);
        if (!CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON))) return;
        t->side.evaluate = 1;
        CHECK_OK(moe_route(t, router, x, N));
        size_t chosen = 0;
        for (size_t k = 0; k < N * E; k++) chosen += t->index[k] >= 0;
        CHECK(chosen > 0 && chosen < N * 4);
        if (i == 0) memcpy(index, t->index, sizeof index);
        for (size_t k = 0; k < N; k++) /* as a set: the same experts */
            for (size_t e = 0; e < E; e++) {
                int there = 0, was = 0;
                for (size_t c = 0; c < E; c++) {
                    there |= t->index[k * E + c] == (int32_t)e;
                    was |= index[k * E + c] == (int32_t)e;
                }
                CHECK(there == was);
            }
        moe_tape_free(t);
    }
    moe_desc d = small_desc("gate_drop=1 n_ranks=4 top_k=3");
    if (!CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON))) return;
    CHECK_OK(moe_route(t, router, x, N));
    CHECK(t->dropped == 1 && t->routes.n_routes == N * 2);
    for (size_t k = 0; k < N * 3; k++)
        CHECK(t->index[k] < 0 ? k % 3 == 2 : (size_t)t->index[k] / 2 == k / 3 * 4 / N);
    moe_tape_free(t);
}
/* The same dx whether or not the router's gradient is wanted; slots whose weights nobody has a gradient by. */
static void test_router_not_wanted(void) {
    enum { N = 8 };
    static const char *const texts[] = {"gate=sign select=threshold", "learn_temperature=true", "residual=true",
                                        "score=mlp", "noise=learned", "combine=soft select=all loss.z=0.5"};
    static float router[20000], grads[20000], dx[2][N * D], previous[N * E];
    float d_weight[N * E];
    moe_tape *t = NULL;
    size_t n = 0;
    test_fill(previous, N * E, -1, 1), test_fill(d_weight, N * E, -1, 1);
    tokens(N);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        moe_desc d = small_desc(texts[i]);
        int soft = d.combine == MOE_COMBINE_SOFT;
        CHECK_OK(moe_router_count(&d, &n));
        if (!CHECK(n <= 20000) || !CHECK_OK(moe_tape_new(&t, &d, N, MOE_ON))) return;
        test_fill(router, n, -1, 1);
        t->side.previous = previous;
        for (int wanted = 0; wanted < 2; wanted++) {
            memset(dx[wanted], 0, sizeof dx[wanted]), memset(grads, 0, sizeof grads);
            CHECK_OK(moe_route(t, router, x, N));
            CHECK_OK(moe_route_backward(t, router, soft ? NULL : d_weight, wanted ? grads : NULL, dx[wanted]));
        }
        float top = 0;
        for (size_t k = 0; k < n; k++) top = fmaxf(top, fabsf(grads[k]));
        if (!CHECK(top > 0) | !CHECK_SAME(dx[0], dx[1], N * D)) printf("        %s\n", texts[i]);
        moe_tape_free(t);
    }
}
/* What no index of 31 bits reaches; routes that were never made; a merged expert counts as one. */
static void test_sizes_of_descs(void) {
    moe_desc shared = small_desc("n_shared=4 top_k=1");
    size_t bytes = 0;
    moe_routes none;
    memset(&none, 0, sizeof none);
    CHECK_STATUS(moe_tape_size(&shared, (size_t)1 << 30, MOE_OFF, &bytes), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_routes_fill(&none, 0, NULL, NULL, 0, MOE_ORDER_TOKEN), MOE_E_NULL_ROUTES);
    moe_layer *merged = row(NULL, "combine=merge select=all"), *one = row(NULL, "top_k=1");
    CHECK(moe_layer_active_params(merged) == moe_layer_active_params(one) && moe_layer_active_params(one) > 0);
    moe_layer_free(merged), moe_layer_free(one);
}

int main(void) {
    RUN(test_level_two);
    RUN(test_own_routing);
    RUN(test_loads_over_micro_batches);
    RUN(test_odd_sizes);
    RUN(test_temperature_by_step);
    RUN(test_expert_drop_of_all);
    RUN(test_sampling_temperature);
    RUN(test_warm_up_draws);
    RUN(test_d_previous_is_added_to);
    RUN(test_weight_zero);
    RUN(test_error_names_the_token);
    RUN(test_active_params_of_the_branch);
    RUN(test_too_many);
    RUN(test_not_finite);
    RUN(test_one_huge_logit);
    RUN(test_one_finite);
    RUN(test_level_two_statuses);
    RUN(test_layer_experts);
    RUN(test_side);
    RUN(test_bias_too_large);
    RUN(test_laser_window);
    RUN(test_other_routes);
    RUN(test_backward_parts);
    RUN(test_what_is_not_wanted);
    RUN(test_choices_taken_away);
    RUN(test_router_not_wanted);
    RUN(test_sizes_of_descs);
    return test_end();
}
