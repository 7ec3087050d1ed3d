/* Controllers of the load: each update rule against a trace worked out by hand, quantiles against sorting, saturation,
 * saving and restoring, bad input; and the schedules. */
#include "test.h"

static moe_control control_new(moe_control_kind kind, size_t n_experts, void **memory) {
    moe_control c;
    size_t bytes = 0;
    memset(&c, 0xff, sizeof c);
    CHECK_OK(moe_control_size(kind, n_experts, &bytes));
    *memory = test_memory(bytes + 1, 1);
    CHECK_OK(moe_control_init(&c, kind, n_experts, (char *)*memory + 1, bytes)); /* any alignment */
    CHECK(c.kind == kind && c.n_experts == n_experts);
    return c;
}
static moe_control_input no_input(void) {
    moe_control_input in;
    memset(&in, 0, sizeof in);
    return in;
}
static void step_load(moe_control *c, uint64_t a, uint64_t b, uint64_t e, uint64_t f) {
    uint64_t load[4];
    moe_control_input in = no_input();
    load[0] = a, load[1] = b, load[2] = e, load[3] = f;
    in.load = load;
    CHECK_OK(moe_control_step(c, &in));
}
/* floats of a trace in decimal: a few roundings of numbers below 1 */
#define CHECK_4(v, a, b, c, d)                                                                  \
    do {                                                                                        \
        CHECK_WITHIN((v)[0], a, 2e-7), CHECK_WITHIN((v)[1], b, 2e-7);                           \
        CHECK_WITHIN((v)[2], c, 2e-7), CHECK_WITHIN((v)[3], d, 2e-7);                           \
    } while (0)

/* ---- traces by hand: E = 4, mean load 10 ---- */
static void test_bias(void) {
    void *memory;
    moe_control c = control_new(MOE_CONTROL_BIAS, 4, &memory);
    CHECK(c.rate == 0.001f && c.n_state == 4 && c.bias == c.state && c.error == NULL && c.coefficient == NULL);
    step_load(&c, 25, 10, 5, 0);
    CHECK_4(c.bias, -0.001, 0, 0.001, 0.001);
    step_load(&c, 20, 12, 8, 0);
    CHECK_4(c.bias, -0.002, -0.001, 0.002, 0.002);
    step_load(&c, 9, 9, 11, 11);
    CHECK_4(c.bias, -0.001, 0, 0.001, 0.001);
    step_load(&c, 0, 0, 0, 0); /* nobody came: nothing to learn */
    CHECK_4(c.bias, -0.001, 0, 0.001, 0.001);
    step_load(&c, 1000000, 1000000, 1000001, 999999); /* only the sign matters */
    CHECK_4(c.bias, -0.001, 0, 0, 0.002);
    free(memory);
}

/* b = rate sign(mean - load) less its mean: loads 0, 0, 8 move it by (1, 1, -1), mean 1 / 3; zeros change nothing. */
static void test_bias_recentred(void) {
    static const uint64_t load[3] = {0, 0, 8}, none[3] = {0, 0, 0};
    char memory[256];
    moe_control c;
    moe_control_input in;
    memset(&in, 0, sizeof in);
    CHECK_OK(moe_control_init(&c, MOE_CONTROL_BIAS, 3, memory, sizeof memory));
    CHECK(!c.recentre); /* the published form does not */
    c.recentre = 1, c.rate = 0.5f, in.load = load;
    for (int step = 1; step <= 3; step++) {
        CHECK_OK(moe_control_step(&c, &in));
        for (size_t e = 0; e < 3; e++) CHECK_NEAR(c.bias[e], step * (e < 2 ? 1 / 3.0 : -2 / 3.0), 2e-7);
    }
    c.bias[0] = 5, in.load = none;
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(c.bias[0] == 5);
    CHECK_OK(moe_control_init(&c, MOE_CONTROL_ID, 3, memory, sizeof memory));
    CHECK(c.recentre);
}
static void test_id(void) {
    void *memory;
    moe_control c = control_new(MOE_CONTROL_ID, 4, &memory);
    CHECK(c.rate == 0.006f && c.damping == 0.006f && c.n_state == 8);
    c.rate = 0.1f, c.damping = 0.2f;
    /* e = -1.5, 0, 0.5, 1; nothing before, so no derivative; the mean is 0 already */
    step_load(&c, 25, 10, 5, 0);
    CHECK_4(c.error, -1.5, 0, 0.5, 1);
    CHECK_4(c.bias, -0.15, 0, 0.05, 0.1);
    /* e = -2, 0, 1, 1; de = -0.5, 0, 0.5, 0: the error grew for experts 0 and 2, whose steps are -0.2 - 0.1 and 0.1 +
     * 0.1 */
    step_load(&c, 30, 10, 0, 0);
    CHECK_4(c.error, -2, 0, 1, 1);
    CHECK_4(c.bias, -0.45, 0, 0.25, 0.2);
    /* e = -1, 1, -0.5, 0.5; de = 1, 1, -1.5, -0.5: every error shrank or began at 0: no derivative */
    step_load(&c, 20, 0, 15, 5);
    CHECK_4(c.bias, -0.55, 0.1, 0.2, 0.25);
    /* e = -1.4, 1, -0.2, 0.6; de = -0.4, 0, 0.3, 0.1: derivative for experts 0 and 3: -0.55 - 0.14 - 0.08, 0.1 + 0.1,
     * 0.2 - 0.02, 0.25 + 0.06 + 0.02 = -0.77, 0.2, 0.18, 0.33, whose mean -0.015 is taken off */
    step_load(&c, 24, 0, 12, 4);
    CHECK_4(c.bias, -0.755, 0.215, 0.195, 0.345);
    float before[8];
    memcpy(before, c.state, sizeof before);
    step_load(&c, 0, 0, 0, 0);
    CHECK_SAME(before, c.state, 8);
    free(memory);
}

static void test_usage_boost(void) {
    void *memory;
    moe_control c = control_new(MOE_CONTROL_USAGE_BOOST, 4, &memory);
    CHECK(c.rate == 0.4f && c.damping == 0.9f && c.low == 0.35f && c.n_state == 8);
    CHECK_4(c.usage, 1, 1, 1, 1);
    CHECK_4(c.bias, 0, 0, 0, 0);
    c.damping = 0.5f;
    step_load(&c, 30, 10, 0, 0); /* in units of the mean: 3, 1, 0, 0 */
    CHECK_4(c.usage, 2, 1, 0.5, 0.5);
    CHECK_4(c.bias, 0, 0, 0, 0);
    step_load(&c, 20, 20, 0, 0);
    CHECK_4(c.usage, 2, 1.5, 0.25, 0.25);
    CHECK_4(c.bias, 0, 0, 0.4, 0.4);
    step_load(&c, 5, 5, 20, 10);
    CHECK_4(c.usage, 1.25, 1, 1.125, 0.625);
    CHECK_4(c.bias, 0, 0, 0, 0);
    free(memory);
}

static void test_relu_lambda(void) {
    void *memory;
    moe_control c = control_new(MOE_CONTROL_RELU_LAMBDA, 8, &memory);
    moe_control_input in = no_input();
    CHECK(c.n_state == 1 && c.coefficient == c.state && c.bias == NULL && c.rate == 1.2f);
    CHECK_NEAR(*c.coefficient * 1e8, 1, 1e-7);
    in.top_k = 2; /* wants 3/4 zeros */
    in.sparsity = 0.5;
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e8, 1.2, 1e-7);
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e8, 1.44, 2e-7);
    in.sparsity = 0.75; /* reached: not below */
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e8, 1.2, 1e-7);
    for (int i = 0; i < 1000; i++) CHECK_OK(moe_control_step(&c, &in)); /* never 0, from where there is no way back */
    CHECK(*c.coefficient == FLT_MIN);
    in.sparsity = 0;
    for (int i = 0; i < 2000; i++) CHECK_OK(moe_control_step(&c, &in));
    CHECK(*c.coefficient == FLT_MAX);
    c.high = 0.5f;
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(*c.coefficient == 0.5f);
    free(memory);
}

static void test_adaptive(void) {
    void *memory;
    moe_control c = control_new(MOE_CONTROL_ADAPTIVE, 8, &memory);
    moe_control_input in = no_input();
    CHECK(c.n_state == 1 && c.rate == 0.2f && c.damping == 0.99f && c.high == 0.01f && *c.coefficient == 0.01f);
    c.damping = 0.5f;
    in.drop_rate = 0.01; /* 0.2 * 0.01 = 0.002 */
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e3, 6, 1e-7);
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e3, 4, 4e-7);
    in.drop_rate = 0.9; /* capped at 0.01 */
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e3, 7, 3e-7);
    in.drop_rate = 0;
    CHECK_OK(moe_control_step(&c, &in));
    CHECK_NEAR(*c.coefficient * 1e3, 3.5, 3e-7);
    free(memory);
}

/* T = 3, E = 2, k = 1: the level is 1/2, so the quantile of three numbers is the middle one. */
static void test_quantile_by_hand(void) {
    static const float first[] = {3, 1, 5, 1, 2, 1}, second[] = {3, 1, 5, 6, 2, 1}, third[] = {0, 4, 0, 2, 0, 3};
    void *memory;
    moe_control c = control_new(MOE_CONTROL_QUANTILE, 2, &memory);
    moe_control_input in = no_input();
    in.n_tokens = 3, in.top_k = 1, in.scores = first;
    /* alpha, the second score: 1, 1, 1. s - alpha: 2, 4, 1 and 0, 0, 0: b = -2, 0 */
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(c.bias[0] == -2 && c.bias[1] == 0);
    /* biased (1, 1), (3, 6), (0, 1): alpha 1, 3, 0. s - alpha: 2, 2, 2 and 0, 3, 1: b = -2, -1 */
    in.scores = second;
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(c.bias[0] == -2 && c.bias[1] == -1);
    /* biased (-2, 3), (-2, 1), (-2, 2): alpha -2. s - alpha: 2, 2, 2 and 6, 4, 5: b = -2, -5 */
    in.scores = third;
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(c.bias[0] == -2 && c.bias[1] == -5);
    in.n_tokens = 0, in.scores = NULL;
    CHECK_OK(moe_control_step(&c, &in));
    in.n_tokens = 3, in.scores = first, in.top_k = 2; /* every expert gets every token */
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(c.bias[0] == -2 && c.bias[1] == -5);
    in.top_k = 1, in.scores = third, c.recentre = 1; /* -2, -5 again: biased (-2, -1), (-2, -3), (-2, -2) */
    CHECK_OK(moe_control_step(&c, &in));
    CHECK(c.bias[0] + c.bias[1] == 0); /* without loads: these are of its own scores */
    free(memory);
}
/* What a controller has nothing of stays away: a bias in the middle, averages of no load, scratch for no scores. */
static void test_nothing_to_move(void) {
    static const moe_control_kind kinds[2] = {MOE_CONTROL_RELU_LAMBDA, MOE_CONTROL_USAGE_BOOST};
    uint64_t none[6] = {0, 0, 0, 0, 0, 0};
    for (int i = 0; i < 2; i++) {
        float before[6], coefficient[2];
        size_t bytes = 7;
        for (int recentre = 0; recentre < 2; recentre++) {
            void *memory;
            moe_control c = control_new(kinds[i], 6, &memory);
            moe_control_input in = no_input();
            in.load = none, in.top_k = 2, in.sparsity = 0.25, c.recentre = recentre;
            if (c.usage) memcpy(before, c.usage, sizeof before);
            CHECK_OK(moe_control_step(&c, &in));
            if (c.usage) CHECK_SAME(before, c.usage, 6);
            if (c.usage) CHECK_SAME(c.bias, ((const float[6]){0, 0, 0, 0, 0, 0}), 6);
            if (c.coefficient) coefficient[recentre] = *c.coefficient;
            CHECK_OK(moe_control_scratch(&c, 10, &bytes));
            CHECK(bytes == 0);
            free(memory);
        }
        if (i == 0) CHECK_BITS(coefficient[0], coefficient[1]), CHECK(coefficient[0] > 1e-8f);
    }
}

static int compare(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}
/* Against sorting, with ties, negative numbers, and every size of scratch. */
static void test_quantile_by_sorting(void) {
    for (int round = 0; round < 40; round++) {
        size_t T = 1 + test_below(60), E = 2 + test_below(20), k = 1 + test_below(E - 1), bytes = 0;
        float *scores = test_floats(T * E), *alpha = test_floats(T), *v = test_floats(T > E ? T : E),
              *want = test_floats(E);
        void *memory;
        moe_control c = control_new(MOE_CONTROL_QUANTILE, E, &memory);
        moe_control_input in = no_input();
        for (size_t i = 0; i < T * E; i++)
            scores[i] = round % 2 ? test_uniform(-3, 3) : (float)((int)test_below(7) - 3);
        for (size_t e = 0; e < E; e++) c.bias[e] = (float)((int)test_below(9) - 4) / 4;
        for (size_t t = 0; t < T; t++) {
            for (size_t e = 0; e < E; e++) v[e] = scores[t * E + e] + c.bias[e];
            qsort(v, E, sizeof *v, compare);
            alpha[t] = v[E - 1 - k];
        }
        for (size_t e = 0; e < E; e++) {
            for (size_t t = 0; t < T; t++) v[t] = scores[t * E + e] - alpha[t];
            qsort(v, T, sizeof *v, compare);
            double at = (1 - (double)k / (double)E) * (double)(T - 1);
            size_t low = (size_t)at, high = low + 1 < T ? low + 1 : low;
            want[e] = -(float)((double)v[low] + (at - (double)low) * ((double)v[high] - (double)v[low]));
        }
        in.scores = scores, in.n_tokens = T, in.top_k = k;
        CHECK_OK(moe_control_scratch(&c, T, &bytes));
        in.scratch = round % 3 ? test_memory(bytes, 1) : NULL, in.scratch_bytes = bytes - 1;
        float *before = test_floats(E);
        memcpy(before, c.bias, E * sizeof *before);
        if (in.scratch) CHECK_STATUS(moe_control_step(&c, &in), MOE_E_SMALL_MEMORY);
        else {
            test_fail_at = 0;
            CHECK_STATUS(moe_control_step(&c, &in), MOE_E_NO_MEMORY);
            test_fail_at = -1;
        }
        CHECK_SAME(before, c.bias, E);
        in.scratch_bytes = bytes;
        CHECK_OK(moe_control_step(&c, &in));
        for (size_t e = 0; e < E; e++) CHECK_WITHIN(c.bias[e], want[e], 2e-7 * 6);
        CHECK(test_live_blocks == 0);
        free(scores), free(alpha), free(v), free(want), free(memory), free(in.scratch), free(before);
    }
}

/* Selecting on s + b with b from these very scores gives each expert about its share k / E of the tokens. */
static void test_quantile_balances(void) {
    enum { T = 2000, E = 8, K = 2 };
    float *scores = test_floats(T * E), s[E];
    int32_t top[K];
    void *memory;
    moe_control c = control_new(MOE_CONTROL_QUANTILE, E, &memory);
    moe_control_input in = no_input();
    for (size_t i = 0; i < T * E; i++) scores[i] = test_uniform(0, 1) + (i % E == 3 ? 2.0f : 0);
    in.scores = scores, in.n_tokens = T, in.top_k = K;
    size_t load[2][E];
    memset(load, 0, sizeof load);
    for (int after = 0; after < 2; after++) {
        for (int step = 0; after && step < 20; step++) CHECK_OK(moe_control_step(&c, &in));
        for (size_t t = 0; t < T; t++) {
            for (size_t e = 0; e < E; e++) s[e] = scores[t * E + e] + c.bias[e];
            CHECK_OK(moe_topk(1, E, K, s, top, NULL));
            for (size_t i = 0; i < K; i++) load[after][top[i]]++;
        }
    }
    CHECK(load[0][3] == T);
    for (size_t e = 0; e < E; e++) CHECK_WITHIN(load[1][e], T * K / E, T * K / E / 10);
    free(scores), free(memory);
}

/* ---- all kinds ---- */
static void some_input(moe_control_input *in, uint64_t load[6], float scores[60]) {
    for (int e = 0; e < 6; e++) load[e] = test_below(50);
    test_fill(scores, 60, 0, 1);
    in->load = load, in->scores = scores, in->n_tokens = 10, in->top_k = 2;
    in->sparsity = (double)test_uniform(0, 1), in->drop_rate = (double)test_uniform(0, 0.04f);
}
/* The state is all there is: a copy of it goes on as the first does. The same bits on every instruction set. */
static void test_state_is_everything(void) {
    for (int kind = 0; kind < MOE_CONTROL_COUNT; kind++) {
        void *m1, *m2;
        moe_control a = control_new((moe_control_kind)kind, 6, &m1), b = control_new((moe_control_kind)kind, 6, &m2);
        uint64_t load[6];
        float scores[60], last[13], *saved = test_floats(a.n_state);
        moe_control_input in = no_input();
        CHECK(a.n_state <= 13);
        CHECK((kind == MOE_CONTROL_NONE) == (a.n_state == 0));
        for (int step = 0; step < 5; step++) some_input(&in, load, scores), CHECK_OK(moe_control_step(&a, &in));
        memcpy(saved, a.state, a.n_state * sizeof *saved);
        some_input(&in, load, scores);
        int first = 1;
        FOR_EACH_ISA(isa) {
            memcpy(b.state, saved, a.n_state * sizeof *saved);
            CHECK_OK(moe_control_step(&b, &in));
            if (!first) CHECK_SAME(last, b.state, b.n_state);
            memcpy(last, b.state, b.n_state * sizeof *last);
            first = 0;
        }
        CHECK_OK(moe_control_step(&a, &in));
        CHECK_SAME(a.state, b.state, a.n_state);
        if (a.n_state) CHECK(memcmp(a.state, saved, a.n_state * sizeof *saved) != 0);
        free(m1), free(m2), free(saved);
    }
}

static void test_names(void) {
    for (int i = -2; i < MOE_CONTROL_COUNT + 2; i++) {
        const moe_info *info = moe_control_info((moe_control_kind)i);
        CHECK((info == NULL) == (i < 0 || i >= MOE_CONTROL_COUNT));
        CHECK((info == NULL) == (moe_control_name((moe_control_kind)i) == NULL));
        if (info == NULL) continue;
        CHECK(info->name == moe_control_name((moe_control_kind)i));
        CHECK(i == MOE_CONTROL_NONE ||
              (info->formula[0] && info->source[0] && strchr("PCSKD", info->mark[0]) && info->mark[0]));
        for (int j = 0; j < i; j++) CHECK(strcmp(info->name, moe_control_name((moe_control_kind)j)) != 0);
    }
    CHECK(!strcmp(moe_schedule_name(MOE_SCHEDULE_COSINE), "cosine") && moe_schedule_name(MOE_SCHEDULE_COUNT) == NULL);
}

static void test_bad_input(void) {
    size_t bytes = 0;
    moe_control c;
    char memory[512];
    static const float bad[] = {NAN, INFINITY, -1};
    CHECK_STATUS(moe_control_size(MOE_CONTROL_COUNT, 4, &bytes), MOE_E_CONTROL);
    CHECK_STATUS(moe_control_size((moe_control_kind)-1, 4, &bytes), MOE_E_CONTROL);
    CHECK_STATUS(moe_control_size(MOE_CONTROL_ID, 0, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_control_size(MOE_CONTROL_ID, ((size_t)1 << 20) + 1, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_control_size(MOE_CONTROL_ID, 4, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_control_size(MOE_CONTROL_ID, 4, &bytes));
    CHECK_STATUS(moe_control_init(NULL, MOE_CONTROL_ID, 4, memory, bytes), MOE_E_NULL_CONTROL);
    CHECK_STATUS(moe_control_init(&c, MOE_CONTROL_COUNT, 4, memory, bytes), MOE_E_CONTROL);
    CHECK_STATUS(moe_control_init(&c, MOE_CONTROL_ID, 4, NULL, bytes), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_control_init(&c, MOE_CONTROL_ID, 4, memory, bytes - 1), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_control_scratch(NULL, 4, &bytes), MOE_E_NULL_CONTROL);
    CHECK_STATUS(moe_control_step(NULL, NULL), MOE_E_NULL_CONTROL);
    memset(&c, 0, sizeof c);
    CHECK_STATUS(moe_control_step(&c, NULL), MOE_E_NULL_CONTROL);
    for (int kind = 1; kind < MOE_CONTROL_COUNT; kind++) {
        CHECK_OK(moe_control_size((moe_control_kind)kind, 6, &bytes));
        if (!CHECK(bytes <= sizeof memory)) return;
        CHECK_OK(moe_control_init(&c, (moe_control_kind)kind, 6, memory, bytes));
        moe_control fresh = c;
        uint64_t load[6];
        float scores[60], before[13];
        moe_control_input in = no_input(), good;
        some_input(&in, load, scores);
        good = in;
        memcpy(before, c.state, c.n_state * sizeof *before);
        CHECK_STATUS(moe_control_scratch(&c, 4, NULL), MOE_E_NULL_OUT);
        CHECK_STATUS(moe_control_step(&c, NULL), MOE_E_NULL_INPUT);
        for (int i = 0; i < 3; i++) {
            c.rate = bad[i], CHECK_STATUS(moe_control_step(&c, &in), MOE_E_RATE), c = fresh;
            c.damping = bad[i], CHECK_STATUS(moe_control_step(&c, &in), MOE_E_DAMPING), c = fresh;
            if (i < 2) c.high = bad[i], CHECK_STATUS(moe_control_step(&c, &in), MOE_E_BOUNDS), c = fresh;
            if (kind == MOE_CONTROL_RELU_LAMBDA)
                in.sparsity = (double)bad[i], CHECK_STATUS(moe_control_step(&c, &in), MOE_E_SPARSITY), in = good;
            if (kind == MOE_CONTROL_ADAPTIVE)
                in.drop_rate = (double)bad[i], CHECK_STATUS(moe_control_step(&c, &in), MOE_E_DROP_RATE), in = good;
            if (kind == MOE_CONTROL_QUANTILE && i < 2) {
                scores[7] = bad[i];
                CHECK_STATUS(moe_control_step(&c, &in), MOE_E_NAN_SCORES);
                scores[7] = 0;
            }
        }
        c.low = NAN, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_BOUNDS), c = fresh;
        if (kind == MOE_CONTROL_ADAPTIVE || kind == MOE_CONTROL_USAGE_BOOST) /* a share of what was */
            c.damping = 1.5f, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_DAMPING), c = fresh;
        if (kind == MOE_CONTROL_RELU_LAMBDA) {
            c.rate = 0.5f, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_RATE), c = fresh;
            c.low = 0, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_BOUNDS), c = fresh;
            c.low = 2, c.high = 1, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_BOUNDS), c = fresh;
        }
        if (kind == MOE_CONTROL_RELU_LAMBDA || kind == MOE_CONTROL_QUANTILE)
            for (size_t k = 0; k < 8; k += 7)
                in.top_k = k, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_TOP_K), in = good;
        if (kind == MOE_CONTROL_QUANTILE) {
            in.scores = NULL, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_NULL_SCORES), in = good;
            in.n_tokens = SIZE_MAX / 2, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_OVERFLOW), in = good;
            CHECK_STATUS(moe_control_scratch(&c, SIZE_MAX / 2, &bytes), MOE_E_OVERFLOW);
        }
        if (kind == MOE_CONTROL_BIAS || kind == MOE_CONTROL_ID || kind == MOE_CONTROL_USAGE_BOOST)
            in.load = NULL, CHECK_STATUS(moe_control_step(&c, &in), MOE_E_NULL_LOAD), in = good;
        CHECK_SAME(before, c.state, c.n_state); /* no error moved anything */
        c.kind = MOE_CONTROL_COUNT;
        CHECK_STATUS(moe_control_step(&c, &in), MOE_E_CONTROL);
        bytes = 7;
        CHECK_OK(moe_control_scratch(&c, 4, &bytes));
        CHECK(bytes == 0);
    }
}

/* Loads of two micro-batches, summed, are the load of the large batch: nothing else is to be done. */
static void test_loads_may_be_summed(void) {
    void *m1, *m2;
    moe_control a = control_new(MOE_CONTROL_ID, 4, &m1), b = control_new(MOE_CONTROL_ID, 4, &m2);
    static const int32_t index[8] = {0, 0, 1, 3, 0, 2, 0, 3};
    size_t bytes = 0;
    moe_routes r;
    moe_health h;
    CHECK_OK(moe_routes_size(8, 4, 1, &bytes));
    void *mr = test_memory(bytes, 1);
    CHECK_OK(moe_routes_init(&r, 8, 4, 1, mr, bytes));
    CHECK_OK(moe_health_size(4, &bytes));
    void *mh = test_memory(bytes, 1);
    CHECK_OK(moe_health_init(&h, 4, mh, bytes));
    for (int half = 0; half < 2; half++) {
        CHECK_OK(moe_routes_fill(&r, 4, index + 4 * half, NULL, 0, MOE_ORDER_DEFAULT));
        CHECK_OK(moe_health_add(&h, &r, NULL));
    }
    CHECK_OK(moe_routes_fill(&r, 8, index, NULL, 0, MOE_ORDER_DEFAULT));
    moe_control_input in = no_input();
    in.load = h.load, CHECK_OK(moe_control_step(&a, &in));
    in.load = r.load, CHECK_OK(moe_control_step(&b, &in));
    CHECK_SAME(a.state, b.state, a.n_state);
    CHECK(a.bias[0] < 0 && a.bias[1] > 0);
    free(m1), free(m2), free(mr), free(mh);
}

/* ---- schedules ---- */
static void test_schedules(void) {
    size_t k = 0;
    float t = 0;
    static const size_t linear[] = {8, 10, 12, 14, 16, 16}, cosine[] = {8, 9, 12, 15, 16, 16},
                        exponential[] = {2, 3, 4, 6, 8, 8};
    for (uint64_t i = 0; i < 6; i++) {
        CHECK(moe_schedule_k(MOE_SCHEDULE_LINEAR, i, 4, 8, 16, &k) == MOE_OK && k == linear[i]);
        CHECK(moe_schedule_k(MOE_SCHEDULE_DEFAULT, i, 4, 8, 16, &k) == MOE_OK && k == linear[i]);
        CHECK(moe_schedule_k(MOE_SCHEDULE_LINEAR, i, 4, 16, 8, &k) == MOE_OK && k == 24 - linear[i]);
        CHECK(moe_schedule_k(MOE_SCHEDULE_COSINE, i, 4, 8, 16, &k) == MOE_OK && k == cosine[i]);
        /* 2 2.83 4 5.66 8 */
        CHECK(moe_schedule_k(MOE_SCHEDULE_EXPONENTIAL, i, 4, 2, 8, &k) == MOE_OK && k == exponential[i]);
    }
    for (int kind = 1; kind < MOE_SCHEDULE_COUNT; kind++) {
        float last = 5;
        for (uint64_t i = 0; i <= 101; i++) {
            CHECK_OK(moe_schedule_temperature((moe_schedule_kind)kind, i, 100, 5, 0.1f, &t));
            double s = i < 100 ? (double)i / 100 : 1;
            double want = kind == MOE_SCHEDULE_EXPONENTIAL ? 5 * pow(0.1 / 5, s) : 5 + (0.1 - 5) * s;
            if (kind == MOE_SCHEDULE_COSINE) want = 5 + (0.1 - 5) * (1 - cos(acos(-1.0) * s)) / 2;
            CHECK_WITHIN(t, want, 5e-6);
            CHECK(t <= last && t >= 0.1f);
            last = t;
        }
        CHECK(t == 0.1f);
        CHECK_OK(moe_schedule_temperature((moe_schedule_kind)kind, 0, 0, 5, 0.1f, &t));
        CHECK(t == 0.1f);
        CHECK_OK(moe_schedule_temperature((moe_schedule_kind)kind, 1, 2, 1e-38f, 3e38f, &t));
        CHECK(t > 0 && t < 3e38f);
        CHECK_OK(moe_schedule_k((moe_schedule_kind)kind, UINT64_MAX - 1, UINT64_MAX, 1, 1 << 20, &k));
        CHECK(k >= (1 << 20) - 1 && k <= 1 << 20);
        uint32_t bits = 0;
        FOR_EACH_ISA(isa) {
            CHECK_OK(moe_schedule_temperature((moe_schedule_kind)kind, 3, 7, 2, 0.3f, &t));
            CHECK(bits == 0 || bits == test_bits(t));
            bits = test_bits(t);
        }
    }
    CHECK(moe_schedule_random(0, 0, 0) == 0 && moe_schedule_random(0, 15, 0) == 1 &&
          moe_schedule_random(14, 15, 0) == 1);
    CHECK(moe_schedule_random(15, 15, 0) == 0 && moe_schedule_random(15, 15, 4) == 1 &&
          moe_schedule_random(16, 15, 4) == 0.75f);
    CHECK(moe_schedule_random(18, 15, 4) == 0.25f && moe_schedule_random(19, 15, 4) == 0);
    static const float bad[] = {0, -1, NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        CHECK_STATUS(moe_schedule_temperature(MOE_SCHEDULE_LINEAR, 1, 2, bad[i], 1, &t), MOE_E_TEMPERATURE);
        CHECK_STATUS(moe_schedule_temperature(MOE_SCHEDULE_LINEAR, 1, 2, 1, bad[i], &t), MOE_E_TEMPERATURE);
    }
    CHECK_STATUS(moe_schedule_temperature(MOE_SCHEDULE_COUNT, 1, 2, 1, 1, &t), MOE_E_SCHEDULE);
    CHECK_STATUS(moe_schedule_temperature(MOE_SCHEDULE_LINEAR, 1, 2, 1, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_schedule_k(MOE_SCHEDULE_COUNT, 1, 2, 1, 1, &k), MOE_E_SCHEDULE);
    CHECK_STATUS(moe_schedule_k(MOE_SCHEDULE_LINEAR, 1, 2, 0, 1, &k), MOE_E_TOP_K);
    CHECK_STATUS(moe_schedule_k(MOE_SCHEDULE_LINEAR, 1, 2, 1, 0, &k), MOE_E_TOP_K);
    CHECK_STATUS(moe_schedule_k(MOE_SCHEDULE_LINEAR, 1, 2, 1, (size_t)-1, &k), MOE_E_TOP_K);
    CHECK_STATUS(moe_schedule_k(MOE_SCHEDULE_LINEAR, 1, 2, (size_t)-1, 1, &k), MOE_E_TOP_K);
    CHECK_STATUS(moe_schedule_k(MOE_SCHEDULE_LINEAR, 1, 2, 1, 1, NULL), MOE_E_NULL_OUT);
}

int main(void) {
    RUN(test_bias);
    RUN(test_bias_recentred);
    RUN(test_id);
    RUN(test_usage_boost);
    RUN(test_relu_lambda);
    RUN(test_adaptive);
    RUN(test_quantile_by_hand);
    RUN(test_nothing_to_move);
    RUN(test_quantile_by_sorting);
    RUN(test_quantile_balances);
    RUN(test_state_is_everything);
    RUN(test_names);
    RUN(test_bad_input);
    RUN(test_loads_may_be_summed);
    RUN(test_schedules);
    return test_end();
}
