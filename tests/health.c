/* Health: every metric against its definition, merged counters against one pass, what changed between windows. */
#include "test.h"
#include "routing.h"

typedef struct health {
    moe_health h;
    void *memory;
} health;

static health health_new(size_t E) {
    health x;
    size_t bytes = 0;
    memset(&x, 0, sizeof x);
    CHECK_OK(moe_health_size(E, &bytes));
    x.memory = test_memory(bytes + 1, 1);
    CHECK_OK(moe_health_init(&x.h, E, (char *)x.memory + 1, bytes));
    return x;
}

/* ---- the counters' metrics ---- */
static void check_metrics(const moe_health *h) {
    size_t E = h->n_experts, dead = 0;
    double total = 0, low = INFINITY, top = 0, pairs = 0, entropy = 0;
    for (size_t e = 0; e < E; e++)
        total += (double)h->load[e], low = fmin(low, (double)h->load[e]), top = fmax(top, (double)h->load[e]);
    double mean = total / (double)E;
    for (size_t i = 0; i < E; i++) {
        double share = (double)h->load[i] / total;
        for (size_t j = 0; j < E; j++) pairs += fabs((double)h->load[i] - (double)h->load[j]);
        if (share > 0) entropy -= share * log(share);
        dead += E > 1 && share < (h->dead_fraction > 0 ? h->dead_fraction : 0.1) / (double)E;
    }
    CHECK_NEAR(h->maxvio, (top - mean) / mean, 1e-12);
    CHECK_NEAR(h->minvio, (mean - low) / mean, 1e-12);
    CHECK_NEAR(h->gini, pairs / (2 * (double)E * (double)E * mean), 1e-12);
    CHECK_NEAR(h->min_max, low / top, 1e-12);
    CHECK_NEAR(h->effective_experts, exp(entropy), 1e-12);
    CHECK(h->n_dead == dead);
}

static void test_metrics(void) {
    for (int round = 0; round < 200; round++) {
        size_t E = 1 + test_below(40);
        health x = health_new(E);
        int sparse = round % 3;
        for (size_t e = 0; e < E; e++) {
            x.h.load[e] = sparse && test_below(2) ? test_below(3) : test_below(1000);
            x.h.top1[e] = x.h.load[e] / 2;
        }
        x.h.load[test_below(E)] += 1;
        if (round % 4 == 0) x.h.dead_fraction = 0.5;
        uint64_t first = x.h.load[0];
        CHECK_OK(moe_health_update(&x.h));
        CHECK(x.h.load[0] == first); /* sorting is not done in place */
        check_metrics(&x.h);
        CHECK_OK(moe_health_reset(&x.h));
        CHECK(x.h.dead_fraction == (round % 4 == 0 ? 0.5 : 0) && x.h.load[0] == 0);
        CHECK_OK(moe_health_update(&x.h));
        CHECK(x.h.gini == 0 && x.h.minvio == 0 && x.h.min_max == 0 && x.h.effective_experts == 0 &&
              x.h.n_dead == 0);
        free(x.memory);
    }
    health x = health_new(4); /* the extremes */
    for (int e = 0; e < 4; e++) x.h.load[e] = 7;
    CHECK_OK(moe_health_update(&x.h));
    CHECK(x.h.gini == 0 && x.h.minvio == 0 && x.h.min_max == 1 && x.h.n_dead == 0);
    CHECK_NEAR(x.h.effective_experts, 4, 1e-12);
    for (int e = 1; e < 4; e++) x.h.load[e] = 0;
    CHECK_OK(moe_health_update(&x.h));
    CHECK_NEAR(x.h.gini, 0.75, 1e-12);
    CHECK(x.h.minvio == 1 && x.h.min_max == 0 && x.h.n_dead == 3);
    CHECK_NEAR(x.h.effective_experts, 1, 1e-12);
    free(x.memory);
}

static void test_merge(void) {
    enum { E = 11, T = 100, K = 3 };
    static int32_t index[T * K];
    static float prob[T * E];
    health one = health_new(E), a = health_new(E), b = health_new(E);
    moe_routes r;
    size_t bytes = 0;
    CHECK_OK(moe_routes_size(T, E, K, &bytes));
    void *memory = test_memory(bytes, 1);
    CHECK_OK(moe_routes_init(&r, T, E, K, memory, bytes));
    for (int batch = 0; batch < 6; batch++) {
        random_index(index, T, E, K, 9);
        test_fill(prob, T * E, 0, 1);
        CHECK_OK(moe_routes_fill(&r, T, index, NULL, batch % 2 ? 20 : 0, MOE_ORDER_TOKEN));
        CHECK_OK(moe_health_add(&one.h, &r, prob));
        CHECK_OK(moe_health_add(batch < 2 ? &a.h : &b.h, &r, prob));
    }
    CHECK_OK(moe_health_merge(&a.h, &b.h));
    CHECK_OK(moe_health_update(&a.h));
    CHECK_OK(moe_health_update(&one.h));
    check_metrics(&a.h);
    CHECK(!memcmp(a.h.load, one.h.load, E * sizeof *a.h.load) && !memcmp(a.h.top1, one.h.top1, E * sizeof *a.h.top1));
    CHECK(a.h.gini == one.h.gini && a.h.minvio == one.h.minvio && a.h.min_max == one.h.min_max &&
          a.h.drop_rate == one.h.drop_rate);
    CHECK(a.h.effective_experts == one.h.effective_experts && a.h.n_dead == one.h.n_dead);
    free(memory), free(one.memory), free(a.memory), free(b.memory);
}

/* A token without a choice is not a token whose choices were refused: 8 tokens of 2 choices, the odd ones padding, all
 * to expert 1 of capacity 3 first, and 0 to 2 second. */
static void test_without_choice(void) {
    enum { E = 3, T = 8, K = 2 };
    static const int32_t with[T / 2 * K] = {1, 0, 1, 2, 1, -1, -1, 1};
    int32_t index[T * K];
    float prob[T * E] = {0};
    health all = health_new(E), plain = health_new(E), sum = health_new(E);
    moe_routes r;
    size_t bytes = 0;
    CHECK_OK(moe_routes_size(T, E, K, &bytes));
    void *memory = test_memory(bytes, 1);
    CHECK_OK(moe_routes_init(&r, T, E, K, memory, bytes));
    CHECK(r.n_chosen == 0);
    for (int t = 0; t < T; t++)
        for (int k = 0; k < K; k++) index[t * K + k] = t % 2 ? -1 : with[t / 2 * K + k];
    for (int i = 0; i < T * E; i++) prob[i] = i / E % 2 ? 0 : 0.25f * (float)(1 + (i % E == 1));
    CHECK_OK(moe_routes_fill(&r, T, index, NULL, 1, MOE_ORDER_TOKEN));
    CHECK(r.n_tokens == 8 && r.n_chosen == 4 && r.n_dropped == 3 && r.n_routes == 3);
    CHECK(r.slot[4 * K] == MOE_NONE && r.slot[6 * K + 1] == MOE_NONE); /* refused whole, and yet chosen */
    CHECK_OK(moe_health_add(&all.h, &r, prob));
    CHECK_OK(moe_health_merge(&sum.h, &all.h));
    CHECK_OK(moe_health_merge(&sum.h, &all.h));
    CHECK(sum.h.n_chosen == 8 && sum.h.n_tokens == 16);
    for (int t = 1; t < T / 2; t++) memcpy(prob + t * E, prob + 2 * t * E, E * sizeof *prob);
    CHECK_OK(moe_routes_fill(&r, T / 2, with, NULL, 1, MOE_ORDER_TOKEN));
    CHECK_OK(moe_health_add(&plain.h, &r, prob));
    CHECK_OK(moe_health_update(&all.h));
    CHECK_OK(moe_health_update(&plain.h));
    CHECK(plain.h.n_chosen == 4 && all.h.n_chosen == 4 && plain.h.n_tokens == 4 && all.h.n_tokens == 8);
    CHECK(!memcmp(all.h.load, plain.h.load, E * sizeof *plain.h.load) && all.h.maxvio == plain.h.maxvio);
    CHECK(!memcmp(all.h.top1, plain.h.top1, E * sizeof *plain.h.top1) && all.h.entropy == plain.h.entropy);
    CHECK(all.h.drop_rate == plain.h.drop_rate && all.h.drop_rate == 0.5);
    CHECK_OK(moe_routes_fill(&r, 0, with, NULL, 1, MOE_ORDER_TOKEN));
    CHECK(r.n_chosen == 0);
    CHECK_OK(moe_health_reset(&all.h));
    CHECK(all.h.n_chosen == 0);
    free(memory), free(all.memory), free(plain.memory), free(sum.memory);
}

static void test_compare(void) {
    static const uint64_t top0[] = {50, 0, 49, 1, 100}, top1[] = {50, 60, 0, 0, 90}, load0[] = {10, 1, 4, 5, 0},
                          load1[] = {0, 1, 4, 5, 10};
    health a = health_new(5), b = health_new(5), c = health_new(4);
    moe_health_change d;
    memcpy(a.h.top1, top0, sizeof top0), memcpy(b.h.top1, top1, sizeof top1);
    memcpy(a.h.load, load0, sizeof load0), memcpy(b.h.load, load1, sizeof load1);
    CHECK_OK(moe_health_compare(&a.h, &b.h, &d)); /* 3 was dead: 1 of 200 < 1% */
    CHECK(d.newly_dead_first == 1 && d.revived_first == 1 && d.newly_dead == 1 && d.revived == 1);
    CHECK_NEAR(d.load_moved, 0.5, 1e-12);
    b.h.dead_fraction = 0.3; /* one of 20 is under 0.3 / 5 */
    CHECK_OK(moe_health_compare(&b.h, &b.h, &d));
    CHECK(d.newly_dead == 0 && d.revived == 0 && d.newly_dead_first == 0 && d.revived_first == 0 &&
          d.load_moved == 0);
    CHECK_OK(moe_health_update(&b.h));
    CHECK(b.h.n_dead == 2 && b.h.n_dead_first == 2);
    CHECK(b.h.dead[0] == 0 && b.h.dead[1] == 1); /* loads 0 1 4 5 10 */
    CHECK_OK(moe_health_reset(&a.h)); /* nothing counted: nobody was dead */
    CHECK_OK(moe_health_compare(&a.h, &b.h, &d));
    CHECK(d.newly_dead == 2 && d.newly_dead_first == 2 && d.revived == 0 && d.load_moved == 0);
    CHECK_STATUS(moe_health_compare(&a.h, &c.h, &d), MOE_E_MERGE);
    CHECK_STATUS(moe_health_compare(NULL, &c.h, &d), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_health_compare(&a.h, &b.h, NULL), MOE_E_NULL_OUT);
    free(a.memory), free(b.memory), free(c.memory);
}

/* ---- counters ---- */
static void check_health(const moe_health *h, size_t E, const uint64_t *load, const uint64_t *top1,
                         const double *prob) {
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
    CHECK(h->n_dead_first == dead);
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
            for (size_t e = 0; e < HE; e++)
                p[t * HE + e] = (float)((double)p[t * HE + e] / sum), prob[e] += (double)p[t * HE + e];
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
    CHECK(x.h.n_dead == 3 && x.h.n_dead_first == 3 && x.h.dead[0] == 0 && x.h.dead[1] == 1 && x.h.dead[2] == 3);
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

/* The borders: an expert with exactly a tenth of an even share is alive, with one less it is dead; the same for one of
 * a hundred first choices. E experts, the mean load a multiple of 10, one expert at the border, another makes up. */
static void test_dead_borders(void) {
    for (size_t E = 2; E <= 130; E += 1 + E / 9) {
        for (uint64_t border = 1; border < 3000; border = border * 3 + 1) {
            health x = health_new(E);
            for (size_t e = 0; e < E; e++) x.h.load[e] = x.h.top1[e] = 10 * border;
            size_t low = E / 2;
            x.h.load[low] = border, x.h.load[0] = 19 * border;
            CHECK_OK(moe_health_update(&x.h));
            CHECK(x.h.n_dead == 0);
            x.h.load[low]--, x.h.load[0]++;
            CHECK_OK(moe_health_update(&x.h));
            CHECK(x.h.n_dead == 1 && x.h.dead[0] == low);
            CHECK(x.h.n_dead_first == (E > 100 ? E : 0)); /* an even router: dead by the paper's word, not by ours */
            x.h.top1[low] = border, x.h.top1[0] = 99 * border;
            for (size_t e = 1; e < E; e++)
                if (e != low) x.h.top1[e] = 0;
            CHECK_OK(moe_health_update(&x.h));
            CHECK(x.h.n_dead_first == E - 2);
            x.h.top1[low]--, x.h.top1[0]++;
            CHECK_OK(moe_health_update(&x.h));
            CHECK(x.h.n_dead_first == E - 1);
            free(x.memory);
        }
    }
}

/* An expert of second choices only lives: loads 6 6 0, first choices 6 0 0. */
static void test_dead_second(void) {
    static const uint64_t load[] = {6, 6, 0}, top1[] = {6, 0, 0};
    health x = health_new(3);
    memcpy(x.h.load, load, sizeof load), memcpy(x.h.top1, top1, sizeof top1);
    CHECK_OK(moe_health_update(&x.h));
    CHECK(x.h.n_dead == 1 && x.h.dead[0] == 2 && x.h.n_dead_first == 2);
    free(x.memory);
}

/* No health, and one that was never begun. */
static void test_missing(void) {
    unsigned char memory[4096];
    moe_health none, good;
    moe_health_change change;
    moe_routes routes;
    memset(&none, 0, sizeof none), memset(&routes, 0, sizeof routes);
    CHECK_OK(moe_health_init(&good, 3, memory, sizeof memory));
    CHECK_STATUS(moe_health_init(&none, 0, memory, sizeof memory), MOE_E_N_EXPERTS);
    moe_health *const given[] = {NULL, &none};
    for (int i = 0; i < 2; i++) {
        CHECK_STATUS(moe_health_reset(given[i]), MOE_E_NULL_HEALTH);
        CHECK_STATUS(moe_health_add(given[i], &routes, NULL), MOE_E_NULL_HEALTH);
        CHECK_STATUS(moe_health_update(given[i]), MOE_E_NULL_HEALTH);
        CHECK_STATUS(moe_health_merge(given[i], &good), MOE_E_NULL_HEALTH);
        CHECK_STATUS(moe_health_merge(&good, given[i]), MOE_E_NULL_HEALTH);
        CHECK_STATUS(moe_health_compare(given[i], &good, &change), MOE_E_NULL_HEALTH);
        CHECK_STATUS(moe_health_compare(&good, given[i], &change), MOE_E_NULL_HEALTH);
    }
    CHECK_STATUS(moe_health_compare(&good, &good, NULL), MOE_E_NULL_OUT);
}

int main(void) {
    RUN(test_missing);
    RUN(test_metrics);
    RUN(test_dead_borders);
    RUN(test_dead_second);
    RUN(test_merge);
    RUN(test_without_choice);
    RUN(test_compare);
    RUN(test_health);
    RUN(test_health_extremes);
    return test_end();
}
