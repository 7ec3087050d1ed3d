/* The stages of the pipeline one by one: softmax, top-k, losses, routes with capacity, health. */
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
                CHECK_WITHIN(dz[r * C + c] - before[r * C + c], slope, 3e-7);
            }
    }
}

/* ---- top-k ---- */
static void topk_case(size_t rows, size_t cols, size_t k, int levels) {
    float *s = test_floats(rows * cols), *value = test_floats(rows * k);
    int32_t *index = (int32_t *)test_memory(rows * k, sizeof *index), *want = (int32_t *)test_memory(k, sizeof *want);
    double *row = test_doubles(cols);
    for (size_t i = 0; i < rows * cols; i++) { /* few levels: many ties; some -infinity */
        s[i] = levels ? (float)test_below((size_t)levels) - 2 : test_uniform(-1, 1);
        if (levels && test_below(9) == 0) s[i] = -INFINITY;
        if (levels && s[i] == 0 && test_below(2)) s[i] = -0.0f; /* equal to 0, so a tie */
    }
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_topk(rows, cols, k, s, index, value));
        for (size_t r = 0; r < rows; r++) {
            for (size_t c = 0; c < cols; c++) row[c] = s[r * cols + c];
            oracle_topk(cols, k, row, want);
            for (size_t j = 0; j < k; j++) {
                if (!CHECK(index[r * k + j] == want[j]))
                    printf("        cols %zu k %zu, choice %zu: %d, not %d, with %s\n", cols, k, j, (int)index[r * k + j],
                           (int)want[j], moe_isa_name(isa));
                CHECK_BITS(value[r * k + j], s[r * cols + (size_t)want[j]]);
            }
        }
    }
    CHECK_OK(moe_topk(rows, cols, k, s, index, NULL));
    free(s), free(value), free(index), free(want), free(row);
}

static void test_topk(void) {
    for (size_t cols = 1; cols <= 300; cols += cols < 70 ? 1 : 23) {
        size_t k[] = {1, 2, 1 + test_below(cols), cols};
        for (int i = 0; i < 4; i++) {
            if (k[i] > cols) continue;
            topk_case(2, cols, k[i], 0);
            topk_case(2, cols, k[i], 4);
        }
    }
    topk_case(5, 64, 8, 1000);
    topk_case(0, 4, 2, 0);
    float s[20];
    int32_t index[20];
    for (int i = 0; i < 20; i++) s[i] = -INFINITY;
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_topk(1, 20, 3, s, index, NULL));
        CHECK(index[0] == 0 && index[1] == 1 && index[2] == 2);
    }
}

static void test_topk_nan(void) {
    float s[40];
    int32_t index[80];
    FOR_EACH_ISA(isa) {
        for (size_t at = 0; at < 40; at++) { /* wherever it is, also among values that lose */
            test_fill(s, 40, -1, 1);
            s[at] = at % 2 ? NAN : -NAN;
            CHECK_STATUS(moe_topk(2, 20, 1, s, index, NULL), MOE_E_NAN_LOGITS);
            CHECK_STATUS(moe_topk(2, 20, 20, s, index, NULL), MOE_E_NAN_LOGITS);
        }
        test_fill(s, 40, -1, 1);
        s[7] = INFINITY;
        CHECK_OK(moe_topk(2, 20, 1, s, index, NULL));
        CHECK(index[0] == 7);
    }
}

/* ---- losses ---- */
static void test_loss_closed_forms(void) {
    enum { T = 6, E = 4 };
    float p[T * E], z[T * E] = {0};
    uint64_t load[E] = {3, 3, 3, 3};
    double value = 0;
    for (int i = 0; i < T * E; i++) p[i] = 0.25f;
    CHECK_OK(moe_loss_switch(T, E, 1, p, load, 0.5f, &value, NULL));
    CHECK_NEAR(value, 1, 1e-7);
    load[0] = 12, load[1] = load[2] = load[3] = 0; /* uniform p: the load does not matter */
    CHECK_OK(moe_loss_switch(T, E, 1, p, load, 0.5f, &value, NULL));
    CHECK_NEAR(value, 1, 1e-7);
    for (int i = 0; i < T * E; i++) p[i] = i % E == 0; /* all on one: E */
    CHECK_OK(moe_loss_switch(T, E, 1, p, load, 1, &value, NULL));
    CHECK_NEAR(value, 4, 1e-7);
    CHECK_OK(moe_loss_z(T, E, z, 0.5f, &value, NULL));
    CHECK_NEAR(value, log(4) * log(4), 1e-6);
    for (int i = 0; i < T * E; i++) z[i] = -(float)log(4);
    CHECK_OK(moe_loss_z(T, E, z, 1, &value, NULL));
    CHECK_WITHIN(value, 0, 1e-12);
    CHECK_OK(moe_loss_z(T, E, z, 1, NULL, NULL));
    CHECK_OK(moe_loss_switch(T, E, 1, p, load, 1, NULL, NULL));
    value = 7; /* no tokens: nothing to be said, and no division by zero */
    CHECK_OK(moe_loss_z(0, E, NULL, 1, &value, NULL));
    CHECK(value == 0);
    uint64_t none[E] = {0};
    CHECK_OK(moe_loss_switch(0, E, 1, NULL, none, 1, &value, NULL));
    CHECK(value == 0);
}

/* E sum f P with f = load / sum(load), in double; P from logits */
static double switch_of(size_t T, size_t E, double tau, const double *z, const uint64_t *load) {
    double sum = 0, total = 0, *p = test_doubles(E);
    for (size_t e = 0; e < E; e++) total += (double)load[e];
    for (size_t t = 0; t < T; t++) {
        oracle_softmax(E, z + t * E, tau, p);
        for (size_t e = 0; e < E; e++) sum += (double)E * (double)load[e] / total * p[e] / (double)T;
    }
    free(p);
    return sum;
}

static double z_of(size_t T, size_t E, const double *z) {
    double sum = 0, *p = test_doubles(E);
    for (size_t t = 0; t < T; t++) {
        double lse = oracle_softmax(E, z + t * E, 1, p);
        sum += lse * lse / (double)T;
    }
    free(p);
    return sum;
}

static void loss_case(size_t T, size_t E, double tau) {
    size_t n = T * E;
    const double h = 1e-4;
    float *z = test_floats(n), *p = test_floats(n), *ds = test_floats(n), *dz = test_floats(n);
    double *zd = test_doubles(n), value;
    uint64_t *load = (uint64_t *)test_memory(E, sizeof *load);
    test_fill(z, n, -2, 2);
    for (size_t i = 0; i < n; i++) zd[i] = z[i];
    for (size_t i = 0; i < 3 * T; i++) load[test_below(E)]++; /* any counts, also of other micro-batches */
    CHECK_OK(moe_softmax(T, E, (float)tau, z, p));
    FOR_EACH_ISA(isa) {
        memset(ds, 0, n * sizeof *ds), memset(dz, 0, n * sizeof *dz);
        CHECK_OK(moe_loss_switch(T, E, (float)tau, p, load, 0.5f, &value, ds));
        CHECK_NEAR(value, switch_of(T, E, tau, zd, load), 1e-6);
        CHECK_OK(moe_loss_z(T, E, z, 0.25f, &value, dz));
        CHECK_NEAR(value, z_of(T, E, zd), 1e-6);
        for (size_t i = 0; i < n; i++) {
            double keep = zd[i], slope[2] = {0, 0};
            for (int side = -1; side <= 1; side += 2) {
                zd[i] = keep + side * h;
                slope[0] += side * 0.5 * switch_of(T, E, tau, zd, load) / (2 * h);
                slope[1] += side * 0.25 * z_of(T, E, zd) / (2 * h);
            }
            zd[i] = keep;
            CHECK_WITHIN(ds[i], slope[0], 1e-6 / (double)T);
            CHECK_WITHIN(dz[i], slope[1], 2e-6 / (double)T);
        }
    }
    float *added = test_floats(n); /* added, not set */
    for (size_t i = 0; i < n; i++) added[i] = 1;
    CHECK_OK(moe_loss_z(T, E, z, 0.25f, NULL, added));
    for (size_t i = 0; i < n; i++) CHECK_WITHIN(added[i] - 1, dz[i], 0x1p-23);
    free(z), free(p), free(ds), free(dz), free(zd), free(load), free(added);
}

static void test_loss_gradients(void) {
    loss_case(1, 2, 1);
    loss_case(5, 3, 0.5);
    loss_case(4, 8, 2);
    loss_case(3, 17, 1);
    loss_case(2, 33, 1.5);
}

/* ---- routes ---- */
typedef struct routing { moe_routes r; void *memory; size_t T, k, E; int32_t *index; float *weight; } routing;

static routing routing_new(size_t T, size_t k, size_t E) {
    routing g;
    size_t bytes = 0;
    memset(&g, 0, sizeof g);
    g.T = T, g.k = k, g.E = E;
    CHECK_OK(moe_routes_size(T, k, E, &bytes));
    g.memory = test_memory(bytes + 1, 1);
    memset(g.memory, 0xff, bytes + 1);
    CHECK_OK(moe_routes_init(&g.r, T, k, E, (char *)g.memory + 1, bytes)); /* any alignment */
    CHECK(((unsigned char *)g.memory)[0] == 0xff);
    g.index = (int32_t *)test_memory(T * k, sizeof *g.index);
    g.weight = test_floats(T * k);
    return g;
}

static void routing_free(routing *g) { free(g->memory), free(g->index), free(g->weight); }

/* k different experts for each token, the low ones more often; `missing` in 16 choices are -1 */
static void routing_random(routing *g, size_t missing) {
    for (size_t t = 0; t < g->T; t++) {
        for (size_t j = 0; j < g->k; j++) {
            int again = 1;
            while (again) {
                size_t e = test_below(g->E);
                if (test_below(2)) e = e * e / g->E;
                g->index[t * g->k + j] = (int32_t)e, again = 0;
                for (size_t i = 0; i < j; i++) again |= g->index[t * g->k + i] == (int32_t)e;
            }
        }
        for (size_t j = 0; j < g->k; j++)
            if (test_below(16) < missing) g->index[t * g->k + j] = -1 - (int32_t)test_below(3);
    }
    for (size_t i = 0; i < g->T * g->k; i++) g->weight[i] = (float)(1 + test_below(20)) / 32; /* with ties */
}

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
    static const size_t shape[][3] = {{1, 1, 1}, {7, 1, 1}, {1, 3, 3}, {5, 2, 3}, {33, 2, 8}, {64, 8, 8}, {40, 3, 100}, {100, 4, 17}};
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
            for (int order = MOE_ORDER_DEFAULT; order < MOE__ORDER_COUNT; order++) {
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
    CHECK_STATUS(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE__ORDER_COUNT), MOE_E_CAPACITY_ORDER);
    CHECK_OK(moe_routes_fill(&g.r, 6, g.index, g.weight, 0, MOE_ORDER_TOKEN)); /* and it still works */
    check_routes(&g, g.weight, 0, MOE_ORDER_TOKEN);
    routing_free(&g);
}

/* ---- health ---- */
typedef struct health { moe_health h; void *memory; } health;

static health health_new(size_t E) {
    health x;
    size_t bytes = 0;
    memset(&x, 0, sizeof x);
    CHECK_OK(moe_health_size(E, &bytes));
    x.memory = test_memory(bytes + 1, 1);
    CHECK_OK(moe_health_init(&x.h, E, (char *)x.memory + 1, bytes));
    return x;
}

static void check_health(const moe_health *h, size_t E, const uint64_t *load, const uint64_t *top1, const double *prob) {
    double total = 0, top = 0, first = 0, square = 0, load_entropy = 0, entropy = 0, psum = 0;
    size_t dead = 0;
    for (size_t e = 0; e < E; e++) {
        CHECK(h->load[e] == load[e] && h->top1[e] == top1[e]);
        if (prob) CHECK_NEAR(h->prob[e], prob[e], 1e-12);
        total += (double)load[e], top = fmax(top, (double)load[e]), first += (double)top1[e];
        if (prob) psum += prob[e];
    }
    double mean = total / (double)E;
    for (size_t e = 0; e < E; e++) {
        double share = (double)load[e] / total, p = prob ? prob[e] / psum : 0;
        square += ((double)load[e] - mean) * ((double)load[e] - mean) / (double)E;
        if (share > 0) load_entropy -= share * log(share);
        if (p > 0) entropy -= p * log(p);
        dead += E > 1 && (double)top1[e] < 0.01 * first;
    }
    CHECK(h->n_selected == (uint64_t)total);
    CHECK_NEAR(h->maxvio, top / mean - 1, 1e-12);
    CHECK_NEAR(h->load_cv, sqrt(square) / mean, 1e-12);
    if (E > 1) CHECK_NEAR(h->load_entropy, load_entropy / log((double)E), 1e-12);
    if (prob) CHECK_NEAR(h->entropy, entropy, 1e-9);
    CHECK_NEAR(h->drop_rate, (double)h->n_dropped / total, 1e-12);
    CHECK(h->n_dead == dead);
}

enum { HE = 9, HT = 230, HK = 2 };

static void test_health(void) {
    health one = health_new(HE), first = health_new(HE), second = health_new(HE);
    uint64_t load[HE] = {0}, top1[HE] = {0}, n_dropped = 0;
    double prob[HE] = {0};
    static float p[HT * HE];
    for (int batch = 0; batch < 5; batch++) {
        routing g = routing_new(HT, HK, HE);
        routing_random(&g, 0);
        for (size_t i = 0; i < HT * HK; i++)
            if (g.index[i] == 3 && test_below(20)) g.index[i] = -1; /* an expert that nearly dies */
        CHECK_OK(moe_routes_fill(&g.r, HT, g.index, g.weight, 40, MOE_ORDER_TOKEN));
        for (size_t t = 0; t < HT; t++) {
            double sum = 0;
            for (size_t e = 0; e < HE; e++) sum += (double)(p[t * HE + e] = test_uniform(0, 1));
            for (size_t e = 0; e < HE; e++) p[t * HE + e] = (float)((double)p[t * HE + e] / sum), prob[e] += (double)p[t * HE + e];
            for (size_t j = 0; j < HK; j++)
                if (g.index[t * HK + j] >= 0) load[g.index[t * HK + j]]++, top1[g.index[t * HK + j]] += j == 0;
        }
        n_dropped += g.r.n_dropped;
        CHECK_OK(moe_health_add(&one.h, &g.r, p));
        CHECK_OK(moe_health_add(batch < 2 ? &first.h : &second.h, &g.r, p));
        routing_free(&g);
    }
    CHECK_OK(moe_health_update(&one.h));
    CHECK(one.h.n_batches == 5 && one.h.n_tokens == 5 * HT && one.h.n_dropped == n_dropped);
    check_health(&one.h, HE, load, top1, prob);

    CHECK_OK(moe_health_merge(&first.h, &second.h)); /* two halves = one pass */
    CHECK_OK(moe_health_update(&first.h));
    CHECK(first.h.n_batches == 5 && first.h.n_tokens == 5 * HT && first.h.n_dropped == n_dropped);
    check_health(&first.h, HE, load, top1, prob);

    CHECK_OK(moe_health_reset(&one.h)); /* empty: all metrics are finite */
    CHECK_OK(moe_health_update(&one.h));
    CHECK(one.h.n_tokens == 0 && one.h.n_selected == 0 && one.h.load[0] == 0 && one.h.prob[0] == 0);
    CHECK(isfinite(one.h.maxvio) && isfinite(one.h.load_cv) && isfinite(one.h.load_entropy) && isfinite(one.h.entropy));
    CHECK(one.h.drop_rate == 0);
    free(one.memory), free(first.memory), free(second.memory);
}

static void test_health_extremes(void) {
    health x = health_new(4);
    routing g = routing_new(8, 1, 4);
    float even[32];
    for (int i = 0; i < 32; i++) even[i] = 0.25f;
    for (int i = 0; i < 8; i++) g.index[i] = i % 4;
    CHECK_OK(moe_routes_fill(&g.r, 8, g.index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_OK(moe_health_add(&x.h, &g.r, even));
    CHECK_OK(moe_health_update(&x.h));
    CHECK_NEAR(x.h.maxvio, 0, 1e-12);
    CHECK_NEAR(x.h.load_cv, 0, 1e-12);
    CHECK_NEAR(x.h.load_entropy, 1, 1e-12);
    CHECK_NEAR(x.h.entropy, log(4), 1e-12);
    CHECK(x.h.n_dead == 0);
    CHECK_OK(moe_health_reset(&x.h));
    for (int i = 0; i < 8; i++) g.index[i] = 2;
    CHECK_OK(moe_routes_fill(&g.r, 8, g.index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_OK(moe_health_add(&x.h, &g.r, NULL)); /* without probabilities */
    CHECK_OK(moe_health_update(&x.h));
    CHECK_NEAR(x.h.maxvio, 3, 1e-12);
    CHECK_NEAR(x.h.load_cv, sqrt(3), 1e-12);
    CHECK_NEAR(x.h.load_entropy, 0, 1e-12);
    CHECK(x.h.n_dead == 3);
    routing_free(&g);
    free(x.memory);

    health single = health_new(1); /* one expert is even, and alive */
    routing alone = routing_new(5, 1, 1);
    CHECK_OK(moe_routes_fill(&alone.r, 5, alone.index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_OK(moe_health_add(&single.h, &alone.r, NULL));
    CHECK_OK(moe_health_update(&single.h));
    CHECK(single.h.n_dead == 0 && single.h.maxvio == 0 && single.h.load_cv == 0);
    CHECK_NEAR(single.h.load_entropy, 1, 1e-12);
    routing_free(&alone);
    free(single.memory);
}

int main(void) {
    RUN(test_softmax);
    RUN(test_softmax_backward);
    RUN(test_topk);
    RUN(test_topk_nan);
    RUN(test_loss_closed_forms);
    RUN(test_loss_gradients);
    RUN(test_routes);
    RUN(test_capacity);
    RUN(test_capacity_by_hand);
    RUN(test_routes_small_and_reused);
    RUN(test_routes_bad_input);
    RUN(test_health);
    RUN(test_health_extremes);
    return test_end();
}
