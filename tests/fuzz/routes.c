/* Anybody's choices and weights: routes, counters and the measures of plain arrays. */
#include "fuzz.h"

enum { FUZZ_ROWS = 12, FUZZ_EXPERTS = 9, FUZZ_SLOTS = 4 };

static void fuzz_routes_health(moe_routes *r, size_t E, const float *prob) {
    static uint64_t memory[2][256];
    moe_health a, b;
    moe_health_change change;
    size_t bytes = 0;
    require(moe_health_size(E, &bytes) == MOE_OK && bytes <= sizeof memory[0]);
    require(moe_health_init(&a, E, memory[0], bytes) == MOE_OK && moe_health_init(&b, E, memory[1], bytes) == MOE_OK);
    moe_status status = moe_health_add(&a, r, prob);
    if (status) {
        require(a.n_batches == 0 && a.n_tokens == 0 && a.n_selected == 0);
        return;
    }
    require(moe_health_merge(&b, &a) == MOE_OK && moe_health_merge(&b, &a) == MOE_OK);
    require(b.n_tokens == 2 * a.n_tokens && b.n_selected == 2 * a.n_selected);
    if (moe_health_update(&a) || moe_health_update(&b)) return;
    require(a.n_dead == b.n_dead && a.n_dead <= E && a.gini >= -1e-12 && a.gini <= 1 && isfinite(a.entropy));
    require(a.load_cv == b.load_cv && a.effective_experts <= (double)E + 1e-9);
    require(moe_health_compare(&a, &b, &change) == MOE_OK && change.newly_dead == 0 && change.load_moved <= 1e-12);
}
static void fuzz_routes_measures(fuzz_input *in, size_t T, size_t E, size_t k, const int32_t *index,
                                 const float *weight) {
    static double mean[FUZZ_EXPERTS];
    static uint64_t load[FUZZ_ROWS * FUZZ_EXPERTS];
    uint64_t count[FUZZ_EXPERTS * FUZZ_EXPERTS] = {0};
    double share = 0;
    size_t ranks = fuzz_byte(in) % 5, sequence = fuzz_byte(in) % 8;
    if (moe_churn(T, k, index, index, &share) == MOE_OK) require(share == 0);
    if (moe_coselect(T, E, k, index, count) == MOE_OK)
        for (size_t a = 0; a < E; a++)
            for (size_t b = 0; b < E; b++) require(count[a * E + b] == count[b * E + a]);
    memset(load, 0, sizeof load), memset(mean, 0, sizeof mean);
    (void)moe_sequence_load(T, E, k, sequence, index, load);
    (void)moe_rank_tokens(T, E, k, ranks, index, load);
    (void)moe_mean_weights(T, E, k, index, weight, mean);
}
static int fuzz_routes(const uint8_t *data, size_t size) {
    static uint64_t memory[1024];
    int32_t index[FUZZ_ROWS * FUZZ_SLOTS];
    float weight[FUZZ_ROWS * FUZZ_SLOTS], prob[FUZZ_ROWS * FUZZ_EXPERTS];
    fuzz_input in = {data, size};
    size_t T = fuzz_byte(&in) % (FUZZ_ROWS + 1), E = 1 + fuzz_byte(&in) % FUZZ_EXPERTS, bytes = 0;
    size_t k = 1 + fuzz_byte(&in) % FUZZ_SLOTS, capacity = fuzz_byte(&in) % 8;
    moe_order_kind order = (moe_order_kind)(fuzz_byte(&in) % (MOE_ORDER_COUNT + 1));
    moe_routes r;
    for (size_t i = 0; i < T * k; i++) index[i] = (int32_t)(fuzz_byte(&in) % 16) - 2; /* now and then past the last */
    fuzz_floats(&in, T * k, weight);
    fuzz_floats(&in, T * E, prob);
    moe_status sized = moe_routes_size(T, E, k, &bytes);
    if (sized) return 0;
    require(bytes <= sizeof memory && moe_routes_init(&r, T, E, k, memory, bytes) == MOE_OK);
    moe_status status = moe_routes_fill(&r, T, index, capacity & 1 ? weight : NULL, capacity, order);
    if (status) {
        require(r.n_routes == 0);
    } else {
        size_t chosen = 0;
        for (size_t i = 0; i < T * k; i++) chosen += index[i] >= 0;
        require(r.n_routes + r.n_dropped == chosen && r.begin[E] == r.n_routes);
        for (size_t e = 0; capacity && e < E; e++) require(r.begin[e + 1] - r.begin[e] <= capacity);
        for (size_t i = 0; i < T * k; i++)
            if (r.slot[i] != MOE_NONE) require(r.slot[i] < r.n_routes && r.token[r.slot[i]] == i / k);
        fuzz_routes_health(&r, E, capacity & 2 ? prob : NULL);
    }
    fuzz_routes_measures(&in, T, E, k, index, weight);
    return 0;
}
FUZZ_TARGET(fuzz_routes)
