/* Routes with and without capacity; Switch, which drops. */
#include "test.h"
#include "routing.h"
#include "oracle.h"

static void check_routes(const routing *g, const float *weight, size_t capacity, moe_order_kind order) {
    const moe_routes *r = &g->r;
    size_t n = g->T * g->k, selected = 0, kept_count = 0;
    double *w = test_doubles(n);
    char *kept = (char *)test_memory(n, 1), *seen = (char *)test_memory(n, 1);
    uint64_t *load = (uint64_t *)test_memory(g->E, sizeof *load);
    for (size_t i = 0; i < n; i++) {
        w[i] = weight ? (double)weight[i] : 1 / (double)g->k;
        if (g->index[i] >= 0) selected++, load[g->index[i]]++;
    }
    size_t dropped = oracle_capacity(g->T, g->k, g->E, g->index, w, capacity, order, kept);
    for (size_t i = 0; i < n; i++) kept_count += kept[i] != 0;
    CHECK(r->n_tokens == g->T && r->n_experts == g->E && r->n_slots == g->k);
    CHECK(r->n_dropped == dropped && r->n_routes == kept_count && r->n_routes + r->n_dropped == selected);
    CHECK(r->begin[0] == 0 && r->begin[g->E] == r->n_routes);
    for (size_t e = 0; e < g->E; e++) {
        CHECK(r->load[e] == load[e]);
        if (!CHECK(r->begin[e] <= r->begin[e + 1])) break;
        if (capacity) CHECK(r->begin[e + 1] - r->begin[e] <= capacity);
        for (size_t i = r->begin[e] + 1; i < r->begin[e + 1]; i++) CHECK(r->token[i - 1] < r->token[i]);
    }
    for (size_t i = 0; i < n; i++) { /* slot is the inverse of token, and the weights came along */
        uint32_t at = r->slot[i];
        if (!kept[i]) {
            CHECK(at == MOE_NONE);
            continue;
        }
        if (!CHECK(at < r->n_routes)) continue;
        CHECK(!seen[at]);
        seen[at] = 1;
        size_t e = (size_t)g->index[i];
        CHECK(at >= r->begin[e] && at < r->begin[e + 1] && r->token[at] == i / g->k);
        CHECK_BITS(r->weight[at], weight ? weight[i] : 1.0f / (float)g->k);
    }
    free(w), free(kept), free(seen), free(load);
}

static void test_routes(void) {
    static const size_t shape[][3] = {{1, 1, 1},  {7, 1, 1},  {1, 3, 3},    {5, 2, 3},
                                      {33, 2, 8}, {64, 8, 8}, {40, 3, 100}, {100, 4, 17}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
        for (size_t missing = 0; missing < 8; missing += 3) {
            routing g = routing_new(shape[s][0], shape[s][1], shape[s][2]);
            routing_random(&g, missing);
            CHECK_OK(moe_routes_fill(&g.r, g.T, g.index, g.weight, 0, MOE_ORDER_DEFAULT));
            check_routes(&g, g.weight, 0, MOE_ORDER_TOKEN);
            CHECK_OK(moe_routes_fill(&g.r, g.T, g.index, NULL, 0, MOE_ORDER_DEFAULT));
            check_routes(&g, NULL, 0, MOE_ORDER_TOKEN);
            routing_free(&g);
        }
    }
}

static void test_capacity(void) {
    static const size_t shape[][3] = {{1, 1, 1}, {9, 1, 2}, {20, 2, 3}, {33, 3, 8}, {64, 4, 9}, {50, 6, 6}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
        routing g = routing_new(shape[s][0], shape[s][1], shape[s][2]);
        for (size_t capacity = 1; capacity < 24; capacity += 1 + capacity / 4)
            for (int order = MOE_ORDER_DEFAULT; order < MOE_ORDER_COUNT; order++) {
                routing_random(&g, capacity % 3);
                CHECK_OK(moe_routes_fill(&g.r, g.T, g.index, g.weight, capacity, (moe_order_kind)order));
                moe_order_kind effective = order == MOE_ORDER_DEFAULT ? MOE_ORDER_TOKEN : (moe_order_kind)order;
                check_routes(&g, g.weight, capacity, effective);
            }
        routing_free(&g);
    }
}

/* Three tokens want expert 0, which has two places: who stays, by each order. */
static void test_capacity_by_hand(void) {
    routing g = routing_new(3, 2, 3);
    static const int32_t index[] = {1, 0, 0, 1, 0, 2};
    static const float weight[] = {0.6f, 0.4f, 0.5f, 0.5f, 0.9f, 0.1f};
    memcpy(g.index, index, sizeof index);
    memcpy(g.weight, weight, sizeof weight);
    CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, 2, MOE_ORDER_TOKEN));
    CHECK(g.r.n_dropped == 1 && g.r.slot[4] == MOE_NONE); /* the last token */
    CHECK(g.r.n_routes == 5 && g.r.token[0] == 0 && g.r.token[1] == 1);
    CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, 2, MOE_ORDER_CHOICE));
    CHECK(g.r.n_dropped == 1 && g.r.slot[1] == MOE_NONE); /* the only second choice */
    CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, 2, MOE_ORDER_WEIGHT));
    CHECK(g.r.n_dropped == 1 && g.r.slot[1] == MOE_NONE); /* the lowest weight */
    CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, 1, MOE_ORDER_WEIGHT));
    CHECK(g.r.n_dropped == 3 && g.r.slot[4] == 0 && g.r.slot[0] == 1 && g.r.slot[5] == 2);
    routing_free(&g);
}

/* Three tokens want expert 0: with its second choice, its first, its second. The first choice comes first though its
 * weight is not the highest, then the second choice whose token is surest of its first, though its weight is the
 * lowest. */
static void test_batch_prioritised(void) {
    routing g = routing_new(3, 2, 3);
    int32_t index[] = {1, 0, 0, 2, 2, 0};
    float weight[] = {0.55f, 0.45f, 0.4f, 0.3f, 0.8f, 0.2f};
    static const struct { moe_order_kind order; size_t capacity; int stays[3]; } want[] = {
        {MOE_ORDER_WEIGHT, 1, {0, 1, 0}}, {MOE_ORDER_PAIR, 1, {1, 0, 0}}, {MOE_ORDER_CHOICE, 1, {0, 1, 0}},
        {MOE_ORDER_WEIGHT, 2, {0, 1, 1}}, {MOE_ORDER_PAIR, 2, {1, 1, 0}}, {MOE_ORDER_CHOICE, 2, {1, 1, 0}}};
    static const size_t wants[] = {1, 2, 5}; /* the pairs of expert 0 */
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, want[i].capacity, want[i].order));
        for (size_t t = 0; t < 3; t++) CHECK((g.r.slot[wants[t]] != MOE_NONE) == want[i].stays[t]);
    }
    /* the last two are both first choices: 0.8 before 0.4 */
    index[4] = 0, index[5] = 2;
    CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, 1, MOE_ORDER_WEIGHT));
    CHECK(g.r.slot[4] != MOE_NONE && g.r.slot[2] == MOE_NONE && g.r.slot[1] == MOE_NONE);
    /* a token's first choice is the first that it has: 0.6 before 0.55, and what stands beside no choice is not read */
    index[2] = -1, index[3] = 0, weight[2] = NAN, weight[3] = 0.6f, index[4] = -1, index[5] = -1;
    CHECK_OK(moe_routes_fill(&g.r, 3, index, weight, 1, MOE_ORDER_WEIGHT));
    CHECK(g.r.slot[3] != MOE_NONE && g.r.slot[1] == MOE_NONE);
    /* without weights all weigh the same */
    CHECK_OK(moe_routes_fill(&g.r, 3, index, NULL, 1, MOE_ORDER_WEIGHT));
    CHECK(g.r.slot[3] == MOE_NONE && g.r.slot[1] != MOE_NONE);
    routing_free(&g);
}

static void test_routes_small_and_reused(void) {
    routing g = routing_new(10, 2, 4);
    g.T = 0;
    CHECK_OK(moe_routes_fill(&g.r, 0, NULL, NULL, 0, MOE_ORDER_TOKEN));
    check_routes(&g, NULL, 0, MOE_ORDER_TOKEN);
    for (g.T = 1; g.T <= 10; g.T += 3) { /* fewer tokens than it was made for, again and again */
        routing_random(&g, 2);
        CHECK_OK(moe_routes_fill(&g.r, g.T, g.index, g.weight, 2, MOE_ORDER_CHOICE));
        check_routes(&g, g.weight, 2, MOE_ORDER_CHOICE);
    }
    for (size_t i = 0; i < 20; i++) g.index[i] = -1; /* nobody goes anywhere */
    g.T = 10;
    CHECK_OK(moe_routes_fill(&g.r, 10, g.index, g.weight, 2, MOE_ORDER_WEIGHT));
    check_routes(&g, g.weight, 2, MOE_ORDER_WEIGHT);
    routing_free(&g);
}

static void test_routes_bad_input(void) {
    routing g = routing_new(6, 2, 4);
    routing_random(&g, 0);
    CHECK_OK(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_TOKEN));
    int32_t keep = g.index[7];
    g.index[7] = 4;
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_TOKEN), MOE_E_INDEX);
    CHECK(g.r.n_routes == 0);
    g.index[7] = INT32_MAX;
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 3, MOE_ORDER_WEIGHT), MOE_E_INDEX);
    g.index[7] = g.index[6];
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_TOKEN), MOE_E_INDEX_TWICE);
    CHECK(g.r.n_routes == 0);
    g.index[7] = keep;
    g.weight[3] = NAN;
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_TOKEN), MOE_E_NAN_WEIGHT);
    g.weight[3] = -INFINITY;
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 2, MOE_ORDER_WEIGHT), MOE_E_NAN_WEIGHT);
    g.weight[3] = 0.5f;
    CHECK_STATUS(moe_routes_fill(&g.r, 7, g.index, g.weight, 0, MOE_ORDER_TOKEN), MOE_E_N_TOKENS);
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_COUNT), MOE_E_CAPACITY_ORDER);
    CHECK_OK(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_TOKEN)); /* and it still works */
    check_routes(&g, g.weight, 0, MOE_ORDER_TOKEN);
    routing_free(&g);
}

/* ---- systems ---- */
#include "rows.h"

/* ---- Switch: one expert, exact capacity in token order, 0 for what is dropped, jitter ---- */
static void test_switch(void) {
    enum { T = 61, CAPACITY = 9 }; /* int(1.25 * 61 / 8): 9.53 */
    moe_layer *m = row("switch", "");
    if (!m) return;
    tokens(T);
    lean(m, 3, 1);
    const moe_tape *t = go(m, T, 1);
    size_t seen[E] = {0}, dropped = 0, answered = 0;
    CHECK(t->n_slots == 1);
    for (size_t i = 0; i < T; i++) {
        size_t e = (size_t)t->index[i];
        int keep = seen[e]++ < CAPACITY;
        CHECK(holds_best(t, i, t->logits + i * E, E, 1));
        CHECK((t->routes.slot[i] != MOE_NONE) == keep);
        answered += keep && largest(y + i * D, NULL, D) > 0; /* all of a ReLU's arguments may be below 0 */
        CHECK(keep || largest(y + i * D, NULL, D) == 0);
        if (!keep) { dropped++; continue; }
        float out[D];
        network(m, e, NULL, x + i * D, 1, out);
        double p = 0;
        for (size_t k = 0; k < E; k++) p += exp((double)t->logits[i * E + k] - (double)t->logits[i * E + e]);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], (double)out[c] / p, 2e-6);
    }
    CHECK(answered > (T - dropped) / 2);
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

/* ---- how many places: every token wants the lowest experts, since a router of zeros makes all equal ---- */
static void check_places(const char *more, size_t n, int evaluate, size_t want) {
    moe_layer *m = row(NULL, more);
    if (!m) return;
    scale(m, "router", 0);
    tokens(n);
    const moe_tape *t = go(m, n, evaluate);
    for (size_t e = 0; e < moe_layer_desc(m)->top_k; e++)
        if (!CHECK(kept(t, e) == want)) printf("        %s, %zu tokens: %zu, not %zu\n", more, n, kept(t, e), want);
    moe_layer_free(m);
}

static void test_places(void) {
    static const char *const rounds[] = {"share", "down", "nearest", "up"};
    static const struct { const char *more; size_t n, want[4]; } cases[] = {
        {"top_k=1 normalize=false n_experts=4 capacity_factor=1.25", 9, {3, 2, 3, 3}},      /* of 3.75; 2.8125 */
        {"top_k=1 normalize=false n_experts=4 capacity_factor=1", 9, {3, 2, 2, 3}},         /* of 3; 2.25 */
        {"top_k=1 normalize=false n_experts=4 capacity_factor=1", 10, {3, 2, 2, 3}},        /* of 3; 2.5, to even */
        {"top_k=1 normalize=false n_experts=4 capacity_factor=1", 14, {4, 3, 4, 4}},        /* of 4; 3.5, to even */
        {"top_k=2 n_experts=8 capacity_factor=1.5", 10, {6, 3, 4, 4}},                      /* of 6; 3.75 */
        {"top_k=1 normalize=false n_experts=2 capacity_factor=1.1", 20, {11, 11, 11, 11}},  /* 1.1f is above 1.1 */
        {"top_k=1 normalize=false n_experts=2 capacity_factor=0.7", 20, {7, 7, 7, 7}},      /* 0.7f is below 0.7 */
        {"top_k=1 normalize=false n_experts=8 capacity_factor=0.1", 9, {1, 1, 1, 1}},       /* of 0.2; 0.1125 */
        {"top_k=1 normalize=false n_experts=8 capacity_factor=1 min_capacity=4", 17, {4, 4, 4, 4}},
        {"top_k=1 normalize=false n_experts=8 capacity_factor=1 min_capacity=4", 37, {5, 4, 5, 5}}, /* of 5; 4.625 */
        {"top_k=1 normalize=false n_experts=8 capacity_factor=1 min_capacity=99", 37, {37, 37, 37, 37}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t r = 0; r < 4; r++) {
            char more[160];
            snprintf(more, sizeof more, "%s capacity_round=%s", cases[i].more, rounds[r]);
            check_places(more, cases[i].n, 0, cases[i].want[r]);
        }
    /* without a factor no floor makes a capacity; in each of 3 sequences its own: 2 of 4, at least 3 */
    check_places("top_k=1 normalize=false min_capacity=2", 37, 0, 37);
    check_places("top_k=1 normalize=false n_experts=2 sequence=4 capacity_sequence=true capacity_factor=1", 12, 0, 6);
    check_places("top_k=1 normalize=false n_experts=2 sequence=4 capacity_sequence=true capacity_factor=1 "
                 "min_capacity=3", 12, 0, 9);
    /* and in evaluation */
    check_places("top_k=1 normalize=false n_experts=4 capacity_factor=9 capacity_factor_eval=1 capacity_round=up", 9, 1,
                 3);
    /* Switch: never under 4 */
    moe_layer *m = row("switch", "");
    if (!m) return;
    scale(m, "router", 0);
    tokens(37);
    CHECK(kept(go(m, 8, 0), 0) == 4 && kept(go(m, 3, 0), 0) == 3 && kept(go(m, 31, 0), 0) == 4);
    CHECK(kept(go(m, 32, 0), 0) == 5 && kept(go(m, 37, 1), 0) == 5); /* int(5.78), in evaluation too */
    moe_layer_free(m);
}

int main(void) {
    RUN(test_routes);
    RUN(test_capacity);
    RUN(test_capacity_by_hand);
    RUN(test_routes_small_and_reused);
    RUN(test_routes_bad_input);
    RUN(test_switch);
    RUN(test_places);
    RUN(test_batch_prioritised);
    return test_end();
}
