/* Fresh memory and values that enter. Whatever memory holds before it is used, a training step gives the same bits;
 * a number from a setter, `side` or a caller's array is refused where it enters if it could make a score NaN; and
 * whatever fails, every entry of tape.index is a choice or -1. */
#include "test.h"
#include "rows.h"

enum { T = 70 }; /* more than a block of tokens */
static const int patterns[] = {0x00, 0xaa, 0xbe, 0xff};

static void choices_are_defined(const moe_tape *t, size_t n) {
    for (size_t i = 0; i < n * t->n_slots; i++)
        if (!CHECK(t->index[i] >= -1 && t->index[i] < (int32_t)t->routes.n_experts)) return;
}

/* ---- memory ---- */
static uint64_t two_steps(const char *system, const char *more) {
    static float dx[T * D];
    uint64_t hash = 0;
    moe_layer *m = row(system, more);
    if (!m) return 0;
    for (int step = 0; step < 2; step++) {
        moe_status s = moe_forward(m, x, T, y);
        if (!s) s = moe_backward(m, dy, dx);
        if (!s) s = moe_step(m, 0.01f);
        if (!CHECK_OK(s)) printf("        %s %s\n", system ? system : "", more);
        hash = moe_hash(hash, y, sizeof(float) * T * D);
        hash = moe_hash(hash, dx, sizeof dx);
        choices_are_defined(moe_layer_tape(m), T);
    }
    hash ^= moe_layer_hash(m);
    moe_layer_free(m);
    return hash;
}
static void same_with_every_pattern(const char *system, const char *more) {
    uint64_t first = 0;
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        test_pattern = patterns[i];
        uint64_t hash = two_steps(system, more);
        if (i == 0) first = hash;
        if (!CHECK(hash == first)) printf("        %s %s with %02x\n", system ? system : "", more, patterns[i]);
    }
    test_pattern = -1;
}
static void test_patterns(void) {
    tokens(T);
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const char *name = moe_system_at(i)->name;
        same_with_every_pattern(name, strcmp(name, "base") ? "" : "n_experts=7"); /* 7 divides 70 */
    }
    for (size_t i = 0; i < STAGES; i++)
        if (!strstr(stages[i], "auction")) same_with_every_pattern(NULL, stages[i]);
}

/* ---- values ---- */
/* A forward of this layer, over memory with every pattern: `want`, and no wild index. */
static void forward_gives(moe_layer *m, const moe_side *side, moe_status want, const char *what) {
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        moe_tape *t = NULL;
        test_pattern = patterns[i];
        CHECK_OK(moe_tape_new(&t, moe_layer_desc(m), T, MOE_ON));
        test_pattern = -1;
        if (side) t->side = *side;
        if (!CHECK_STATUS(moe_forward_tape(m, t, x, T, y), want)) printf("        %s\n", what);
        if (!want || want == MOE_E_NAN_X) choices_are_defined(t, T);
        for (size_t k = 0; !want && k < T * E; k++)
            if (!CHECK(isfinite(t->scores[k]) && isfinite(t->prob[k]))) break;
        if (want) CHECK_STATUS(moe_backward_tape(m, t, dy, NULL), MOE_E_NO_FORWARD);
        moe_tape_free(t);
    }
}
static void test_log_scale(void) { /* any finite one is as its nearest in [-20, 20] */
    static const float values[] = {-20, -21, -87, -88, -104, -3e38f, 20, 89, 3e38f};
    static const char *const gates[] = {"gate=softmax", "gate=sigmoid", "gate=softmax-selected", "gate=relu"};
    tokens(T);
    for (size_t g = 0; g < 4; g++)
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            char more[80];
            snprintf(more, sizeof more, "learn_temperature=true %s", gates[g]);
            moe_layer *m = row(NULL, more);
            if (!m) return;
            CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router.log_scale", &values[i], 1));
            forward_gives(m, NULL, MOE_OK, more);
            moe_layer_free(m);
        }
    moe_layer *m = row("dynmoe", "");
    if (!m) return;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router.log_scale", &values[2], 1));
    forward_gives(m, NULL, MOE_OK, "dynmoe");
    moe_layer_free(m);
}
static void test_side(void) {
    static const float wrong[] = {1e-39f, 1e-45f, INFINITY, -INFINITY, NAN, -1}, right[] = {1e-37f, 0.5f, 3e38f};
    static float bias[E];
    moe_desc d = row_desc(NULL, "");
    moe_side side;
    moe_layer *m = row(NULL, "");
    tokens(T);
    if (!m) return;
    memset(&side, 0, sizeof side);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        side.temperature = wrong[i];
        forward_gives(m, &side, MOE_E_TEMPERATURE, "temperature");
    }
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        side.temperature = right[i];
        forward_gives(m, &side, MOE_OK, "temperature");
    }
    float *router = get(m, "router");
    for (int k = 0; k < 3; k++) { /* level 2: the caller's bias */
        moe_tape *t = NULL;
        CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON));
        bias[3] = k == 0 ? NAN : k == 1 ? -INFINITY : INFINITY;
        t->side.bias = bias;
        CHECK_STATUS(moe_route(t, router, x, T), MOE_E_NAN_BIAS);
        bias[3] = -3e38f;
        CHECK_OK(moe_route(t, router, x, T));
        choices_are_defined(t, T);
        moe_tape_free(t);
    }
    free(router);
    moe_layer_free(m);
}

/* level 1: NaN among the scores leaves no entry as it was */
static void test_arrays(void) {
    enum { ROWS = 40 };
    static float s[ROWS * E], value[ROWS * 2];
    static int32_t index[ROWS * E];
    for (int way = 0; way < 6; way++)
        for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
            size_t entries = ROWS * (way == 4 ? E : way == 5 ? 1 : 2);
            moe_status status = MOE_OK;
            memset(index, patterns[i], sizeof index);
            test_fill(s, ROWS * E, 0, 1);
            s[17 * E + 3] = NAN;
            if (way == 0) status = moe_topk(ROWS, E, 2, s, index, value);
            if (way == 1) status = moe_topk_groups(ROWS, E, 2, 2, 1, s, index);
            if (way == 2) status = moe_topk_threshold(ROWS, E, 2, 0.5f, NULL, 1, s, index);
            if (way == 3) status = moe_top_p(ROWS, E, 2, 0.5f, s, index);
            if (way == 4) status = moe_expert_choice(ROWS, E, 4, E, s, index, NULL, 0);
            if (way == 5) status = moe_auction(ROWS, E, s, index, NULL, 0);
            CHECK_STATUS(status, MOE_E_NAN_LOGITS);
            for (size_t k = 0; k < entries; k++)
                if (!CHECK(index[k] == -1)) break;
        }
    /* a plan whose sums overflow is no plan: either it is finite, or the status says that it is not */
    static const float far[] = {3e38f, -3e38f, 1e38f, -1e38f};
    int refused = 0;
    static float plan[ROWS * E];
    for (int round = 0; round < 100; round++) {
        for (size_t i = 0; i < ROWS * E; i++) s[i] = far[(size_t)test_uniform(0, 3.999f)];
        moe_status status = moe_sinkhorn(ROWS, E, 1, 5, s, plan, NULL, 0);
        if (status) CHECK_STATUS(status, MOE_E_NAN_LOGITS);
        CHECK(finite_all(plan, ROWS * E) == !status);
        refused += status != MOE_OK;
    }
    CHECK(refused > 0 && refused < 100);
}

/* ---- what comes out, and what is kept ---- */
static void test_outputs(void) {
    static const size_t where[] = {0, 5, 63, 64, 69};
    moe_layer *m = row(NULL, "expert=swiglu");
    if (!m) return;
    for (size_t i = 0; i < sizeof where / sizeof *where; i++) { /* the logits are finite, the outputs are not */
        tokens(T);
        x[where[i] * D + 2] = 1e30f;
        CHECK_STATUS(moe_forward(m, x, T, y), MOE_E_NAN_Y);
        CHECK(moe_layer_tape(m)->bad_token == where[i]);
        CHECK_STATUS(moe_backward(m, dy, NULL), MOE_E_NO_FORWARD);
        x[where[i] * D + 2] = NAN;
        CHECK_STATUS(moe_forward(m, x, T, y), MOE_E_NAN_X);
        CHECK(moe_layer_tape(m)->bad_token == where[i]);
    }
    tokens(T);
    whole_step("expert=swiglu", "after", T, m, 0);
    moe_layer_free(m);
}
static void test_parameters(void) {
    static const float odd[] = {NAN, INFINITY, -INFINITY};
    size_t bytes;
    moe_layer *m = row(NULL, "");
    if (!m) return;
    uint64_t hash = moe_layer_hash(m);
    size_t n = count_of(m, "router");
    float *p = get(m, "router");
    for (int k = 0; k < 3; k++) {
        p[5] = odd[k];
        for (int part = 0; part < MOE_PART_COUNT; part++) /* gradients are looked at in a step */
            CHECK_STATUS(moe_layer_set(m, (moe_part_kind)part, "router", p, n),
                         part == MOE_PART_GRADS ? MOE_OK : MOE_E_NAN_PARAMS);
        CHECK_STATUS(moe_step(m, 0.1f), MOE_E_NAN_GRADS);
    }
    p[5] = -1e-9f;
    CHECK_STATUS(moe_layer_set(m, MOE_PART_MOMENT2, "router", p, n), MOE_E_NAN_PARAMS);
    CHECK(moe_layer_hash(m) == hash);
    free(p);
    /* a step that is too long: what cannot be loaded is not saved */
    p = get(m, "router");
    for (size_t i = 0; i < n; i++) p[i] = 3e38f;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", p, n));
    for (size_t i = 0; i < n; i++) p[i] = -1;
    CHECK_OK(moe_layer_scale_grads(m, 0));
    CHECK_OK(moe_layer_set(m, MOE_PART_GRADS, "router", p, n));
    free(p);
    CHECK_OK(moe_step(m, 3e38f));
    CHECK_OK(moe_layer_save_size(m, 1, &bytes));
    void *to = malloc(bytes);
    CHECK_STATUS(moe_layer_save_memory(m, 1, to, bytes), MOE_E_SAVE_NAN);
    free(to);
    moe_layer_free(m);
}

int main(void) {
    RUN(test_patterns);
    RUN(test_log_scale);
    RUN(test_side);
    RUN(test_arrays);
    RUN(test_outputs);
    RUN(test_parameters);
    return test_end();
}
