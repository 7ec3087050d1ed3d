/* Bad arguments: every public function answers each kind of them with the right status, whose sentence names the
 * argument; nothing crashes and nothing is half done. (moe_gemm: test_gemm.c; optimisers: test_optim.c; elementary
 * and random functions: test_math.c; routes_fill: test_stages.c; files: test_files.c.) */
#include "test.h"

#include <limits.h>

static moe_desc small_desc(void) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = 4, d.d_ff = 6, d.n_experts = 3, d.top_k = 2;
    return d;
}

/* ---- statuses ---- */
static void test_status_strings(void) {
    for (int i = 0; i < MOE__STATUS_COUNT; i++) {
        moe_status s = (moe_status)i;
        const char *text = moe_status_string(s), *field = moe_status_field(s);
        if (!CHECK(text && field && text[0])) continue;
        CHECK((s == MOE_OK) == (moe_status_kind(s) == MOE_KIND_OK));
        CHECK((s == MOE_OK) == (field[0] == 0));
        size_t n = strlen(field); /* "field: what is wrong" */
        if (s != MOE_OK && !CHECK(!strncmp(text, field, n) && (text[n] == ':' || text[n] == ','))) printf("        %s\n", text);
        for (int j = 0; j < i; j++) /* each code has a sentence of its own */
            if (!CHECK(strcmp(text, moe_status_string((moe_status)j)))) printf("        twice: %s\n", text);
    }
    static const int other[] = {-1, -2, -1000, INT_MIN, MOE__STATUS_COUNT, MOE__STATUS_COUNT + 1, 1000, INT_MAX};
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        int kind = (int)moe_status_kind((moe_status)other[i]);
        CHECK(moe_status_string((moe_status)other[i]) != NULL && moe_status_string((moe_status)other[i])[0]);
        CHECK(moe_status_field((moe_status)other[i]) != NULL);
        CHECK(kind > MOE_KIND_OK && kind <= MOE_KIND_SUPPORT);
    }
    CHECK(!strcmp(moe_status_string(MOE_OK), "ok"));
}

#define NAME_CHECK(function, type, first, count)                                              \
    for (int i = -3; i < (int)(count) + 3; i++) {                                             \
        const char *name = function((type)i);                                                 \
        if (i < (int)(first) || i >= (int)(count)) {                                          \
            if (i != 0) CHECK(name == NULL);                                                  \
            continue;                                                                         \
        }                                                                                     \
        if (!CHECK(name != NULL && name[0])) continue;                                        \
        for (int j = (int)(first); j < i; j++) CHECK(strcmp(name, function((type)j)) != 0);   \
    }

static void test_names(void) {
    NAME_CHECK(moe_score_name, moe_score_kind, 1, MOE__SCORE_COUNT)
    NAME_CHECK(moe_gate_name, moe_gate_kind, 1, MOE__GATE_COUNT)
    NAME_CHECK(moe_select_name, moe_select_kind, 1, MOE__SELECT_COUNT)
    NAME_CHECK(moe_order_name, moe_order_kind, 1, MOE__ORDER_COUNT)
    NAME_CHECK(moe_noise_name, moe_noise_kind, 1, MOE__NOISE_COUNT)
    NAME_CHECK(moe_combine_name, moe_combine_kind, 1, MOE__COMBINE_COUNT)
    NAME_CHECK(moe_schedule_name, moe_schedule_kind, 1, MOE__SCHEDULE_COUNT)
    NAME_CHECK(moe_init_name, moe_init_kind, 1, MOE__INIT_COUNT)
    NAME_CHECK(moe_expert_name, moe_expert_kind, 1, MOE__EXPERT_COUNT)
    NAME_CHECK(moe_loss_name, moe_loss_kind, 0, MOE_LOSS_COUNT)
    NAME_CHECK(moe_optimizer_name, moe_optimizer_kind, 1, MOE__OPTIMIZER_COUNT)
    NAME_CHECK(moe_isa_name, moe_isa, 1, MOE__ISA_COUNT)
    CHECK(!strcmp(moe_gate_name(MOE_GATE_SOFTMAX), "softmax"));
}

/* ---- desc ---- */
static void test_desc_defaults(void) {
    moe_desc d, r;
    memset(&d, 0, sizeof d);
    CHECK_STATUS(moe_desc_resolve(&d, &r), MOE_E_D_MODEL);
    d.d_model = 10;
    CHECK_OK(moe_desc_resolve(&d, &r));
    CHECK(r.d_model == 10 && r.d_ff == 40 && r.n_experts == 8 && r.top_k == 2 && r.n_shared == 0);
    CHECK(r.score == MOE_SCORE_LINEAR && r.gate == MOE_GATE_SOFTMAX && r.select == MOE_SELECT_TOP_K && r.expert == MOE_EXPERT_SWIGLU);
    CHECK(r.capacity_order == MOE_ORDER_TOKEN && r.optimizer == MOE_OPTIMIZER_ADAMW && r.training == MOE_ON);
    CHECK(r.normalize == MOE_ON && r.bias == MOE_OFF && r.temperature == 1 && !(r.capacity_factor > 0) && !(r.clip_norm > 0));
    CHECK(r.beta1 == 0.9f && r.beta2 == 0.999f && r.epsilon == 1e-8f && r.momentum == 0.9f && r.weight_decay == 0.01f && r.seed == 1);
    d.n_experts = 1;
    CHECK_OK(moe_desc_resolve(&d, &r));
    CHECK(r.top_k == 1 && r.normalize == MOE_OFF);
}

static int same_desc(const moe_desc *a, const moe_desc *b) {
    int same = a->d_model == b->d_model && a->d_ff == b->d_ff && a->n_experts == b->n_experts && a->top_k == b->top_k;
    same &= a->n_shared == b->n_shared && a->score == b->score && a->gate == b->gate && a->select == b->select;
    same &= a->expert == b->expert && a->capacity_order == b->capacity_order && a->normalize == b->normalize && a->bias == b->bias;
    same &= test_bits(a->temperature) == test_bits(b->temperature) && test_bits(a->capacity_factor) == test_bits(b->capacity_factor);
    for (int l = 0; l < MOE_LOSS_COUNT; l++) same &= test_bits(a->loss[l]) == test_bits(b->loss[l]);
    same &= a->training == b->training && a->optimizer == b->optimizer && test_bits(a->beta1) == test_bits(b->beta1);
    same &= test_bits(a->beta2) == test_bits(b->beta2) && test_bits(a->epsilon) == test_bits(b->epsilon);
    same &= test_bits(a->momentum) == test_bits(b->momentum) && test_bits(a->weight_decay) == test_bits(b->weight_decay);
    same &= test_bits(a->clip_norm) == test_bits(b->clip_norm) && a->seed == b->seed && a->alloc_context == b->alloc_context;
    same &= a->parallel.run == b->parallel.run && a->parallel.user == b->parallel.user;
    return same && a->parallel.n_threads == b->parallel.n_threads;
}

static void test_desc_resolve_is_idempotent(void) {
    int resolved = 0;
    for (int i = 0; i < 1500; i++) {
        moe_desc d = small_desc(), once, twice;
        static const float value[] = {0, MOE_OFF, 0.5f, 0.25f};
        d.d_ff = test_below(3) * 7, d.n_experts = test_below(2) * 5, d.top_k = test_below(3), d.n_shared = test_below(3);
        d.score = (moe_score_kind)test_below(MOE__SCORE_COUNT), d.gate = (moe_gate_kind)test_below(MOE__GATE_COUNT);
        d.select = (moe_select_kind)test_below(MOE__SELECT_COUNT), d.expert = (moe_expert_kind)test_below(MOE__EXPERT_COUNT);
        d.capacity_order = (moe_order_kind)test_below(MOE__ORDER_COUNT), d.optimizer = (moe_optimizer_kind)test_below(MOE__OPTIMIZER_COUNT);
        d.normalize = (int)test_below(3) - 1, d.bias = (int)test_below(3) - 1, d.training = (int)test_below(3) - 1;
        d.temperature = test_below(2) ? 0 : 2, d.capacity_factor = value[test_below(4)];
        for (int l = 0; l <= MOE_LOSS_IMPORTANCE; l++) d.loss[l] = value[test_below(4)];
        d.beta1 = value[test_below(4)], d.beta2 = value[test_below(4)], d.momentum = value[test_below(4)];
        d.weight_decay = value[test_below(4)], d.clip_norm = value[test_below(4)], d.epsilon = test_below(2) ? 0 : 1e-6f;
        d.seed = test_below(3), d.parallel.n_threads = test_below(4), d.alloc_context = &d;
        moe_status fits = moe_desc_resolve(&d, &once); /* not every choice goes with every other */
        CHECK(!fits || moe_status_kind(fits) == MOE_KIND_ARGUMENT || fits == MOE_E_LOSS_STAGE);
        if (fits) continue;
        resolved++;
        CHECK_OK(moe_desc_resolve(&once, &twice));
        CHECK(same_desc(&once, &twice));
        CHECK(once.alloc_context == &d && once.parallel.n_threads == d.parallel.n_threads);
        CHECK_OK(moe_desc_resolve(&d, &d)); /* in place */
        d.alloc_context = once.alloc_context;
        CHECK(same_desc(&once, &d));
        CHECK(d.weight_decay == (float)MOE_OFF || d.weight_decay > 0); /* off stays off */
    }
    CHECK(resolved > 100);
}

/* Each bad value gives `want` from every function that takes a desc, and none of them touches its result. */
static void bad_desc(const moe_desc *d, moe_status want) {
    size_t bytes = 77;
    moe_layer *m = NULL;
    moe_tape *t = NULL;
    static float memory[4096];
    moe_desc out = small_desc(), keep = out;
    CHECK_STATUS(moe_desc_resolve(d, &out), want);
    CHECK(same_desc(&out, &keep));
    CHECK_STATUS(moe_layer_size(d, &bytes), want);
    CHECK_STATUS(moe_layer_new(&m, d), want);
    CHECK_STATUS(moe_layer_init(&m, d, memory, sizeof memory), want);
    CHECK_STATUS(moe_tape_size(d, 3, MOE_ON, &bytes), want);
    CHECK_STATUS(moe_tape_new(&t, d, 3, MOE_ON), want);
    CHECK_STATUS(moe_tape_init(&t, d, 3, MOE_ON, memory, sizeof memory), want);
    CHECK_STATUS(moe_experts_count(d, &bytes), want);
    moe_expert_weights none = {NULL, NULL, NULL, NULL, NULL, NULL};
    CHECK_STATUS(moe_expert_pack(d, 0, &none, memory), want);
    CHECK_STATUS(moe_expert_unpack(d, 0, memory, &none), want);
    CHECK(m == NULL && t == NULL && bytes == 77);
    moe_desc good = small_desc();
    CHECK_OK(moe_tape_new(&t, &good, 3, MOE_ON));
    CHECK_STATUS(moe_route(d, memory, memory, 1, t), want);
    CHECK_STATUS(moe_tape_tokens(d, t, memory, 1), want);
    CHECK_STATUS(moe_experts_forward(d, memory, t, memory), want);
    CHECK_STATUS(moe_experts_backward(d, memory, t, memory, 1, memory, NULL, NULL), want);
    CHECK_STATUS(moe_route_backward(d, memory, t, NULL, NULL, memory, NULL), want);
    moe_tape_free(t);
    CHECK(test_live_blocks == 0);
}

#define BAD(field, value, status) do { moe_desc x = small_desc(); x.field = value; bad_desc(&x, status); } while (0)

static void test_desc_fields(void) {
    bad_desc(NULL, MOE_E_NULL_DESC);
    BAD(d_model, 0, MOE_E_D_MODEL);
    BAD(n_experts, ((size_t)1 << 20) + 1, MOE_E_N_EXPERTS);
    BAD(n_experts, SIZE_MAX, MOE_E_N_EXPERTS);
    BAD(top_k, 4, MOE_E_TOP_K);
    BAD(top_k, SIZE_MAX, MOE_E_TOP_K);
    static const int past[] = {-1, 50, INT_MAX, INT_MIN};
    for (int i = 0; i < 4; i++) {
        BAD(score, (moe_score_kind)past[i], MOE_E_SCORE);
        BAD(gate, (moe_gate_kind)past[i], MOE_E_GATE);
        BAD(select, (moe_select_kind)past[i], MOE_E_SELECT);
        BAD(expert, (moe_expert_kind)past[i], MOE_E_EXPERT);
        BAD(optimizer, (moe_optimizer_kind)past[i], MOE_E_OPTIMIZER);
        BAD(capacity_order, (moe_order_kind)past[i], MOE_E_CAPACITY_ORDER);
        int odd = i == 0 ? 2 : i == 1 ? -2 : past[i];
        BAD(normalize, odd, MOE_E_NORMALIZE);
        BAD(bias, odd, MOE_E_BIAS);
        BAD(training, odd, MOE_E_TRAINING);
    }
    BAD(score, MOE__SCORE_COUNT, MOE_E_SCORE);
    BAD(gate, MOE__GATE_COUNT, MOE_E_GATE);
    BAD(select, MOE__SELECT_COUNT, MOE_E_SELECT);
    BAD(expert, MOE__EXPERT_COUNT, MOE_E_EXPERT);
    BAD(optimizer, MOE__OPTIMIZER_COUNT, MOE_E_OPTIMIZER);
    BAD(capacity_order, MOE__ORDER_COUNT, MOE_E_CAPACITY_ORDER);
    static const float wrong[] = {-0.5f, -2, NAN, INFINITY, -INFINITY, 1, 1.5f};
    for (int i = 0; i < 7; i++) {
        BAD(beta1, wrong[i], MOE_E_BETA1);
        BAD(beta2, wrong[i], MOE_E_BETA2);
        BAD(momentum, wrong[i], MOE_E_MOMENTUM);
        if (i >= 5) continue; /* the others may be 1 and more */
        BAD(temperature, wrong[i], MOE_E_TEMPERATURE);
        BAD(capacity_factor, wrong[i], MOE_E_CAPACITY_FACTOR);
        for (int l = 0; l < MOE_LOSS_COUNT; l++) BAD(loss[l], wrong[i], MOE_E_LOSS);
        BAD(epsilon, wrong[i], MOE_E_EPSILON);
        BAD(weight_decay, wrong[i], MOE_E_WEIGHT_DECAY);
        BAD(clip_norm, wrong[i], MOE_E_CLIP_NORM);
    }
    BAD(temperature, MOE_OFF, MOE_E_TEMPERATURE); /* has no off */
    BAD(epsilon, MOE_OFF, MOE_E_EPSILON);
    moe_desc d = small_desc();
    CHECK_STATUS(moe_desc_resolve(&d, NULL), MOE_E_NULL_OUT);
}

/* Sizes that no memory holds: refused in the arithmetic, not by a huge allocation. */
static void test_overflows(void) {
    static const size_t huge[] = {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 4, SIZE_MAX / 64};
    long before = test_allocations;
    for (int i = 0; i < 4; i++)
        for (int which = 0; which < 4; which++) {
            moe_desc d = small_desc();
            moe_layer *m = NULL;
            moe_tape *t = NULL;
            size_t bytes, tokens = 3;
            if (which == 0) d.d_model = huge[i];
            if (which == 1) d.d_ff = huge[i];
            if (which == 2) d.n_shared = huge[i];
            if (which == 3) tokens = huge[i];
            if (which < 3) {
                CHECK_STATUS(moe_layer_size(&d, &bytes), MOE_E_OVERFLOW);
                CHECK_STATUS(moe_layer_new(&m, &d), MOE_E_OVERFLOW);
                CHECK_STATUS(moe_experts_count(&d, &bytes), MOE_E_OVERFLOW);
            }
            CHECK_STATUS(moe_tape_size(&d, tokens, MOE_ON, &bytes), MOE_E_OVERFLOW);
            CHECK_STATUS(moe_tape_new(&t, &d, tokens, MOE_ON), MOE_E_OVERFLOW);
            CHECK(m == NULL && t == NULL);
            CHECK_STATUS(moe_routes_size(huge[i], 2, 4, &bytes), MOE_E_OVERFLOW);
            if (SIZE_MAX > UINT32_MAX) CHECK_STATUS(moe_routes_size((size_t)UINT32_MAX / 2 + 1, 2, 4, &bytes), MOE_E_OVERFLOW);
        }
    moe_desc d = small_desc(); /* d_ff = 4 d_model */
    size_t bytes;
    d.d_model = SIZE_MAX / 3, d.d_ff = 0;
    CHECK_STATUS(moe_layer_size(&d, &bytes), MOE_E_OVERFLOW);
    CHECK(test_allocations == before);
    d = small_desc();
    moe_layer *m = NULL;
    float x[8] = {0}, y[8];
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    CHECK_STATUS(moe_forward(m, x, SIZE_MAX / 2, y), MOE_E_OVERFLOW);
    CHECK_OK(moe_forward(m, x, 2, y));
    moe_layer_free(m);
}

static void test_desc_json(void) {
    moe_desc d = small_desc();
    char text[3000], part[3000];
    size_t n = moe_desc_json(&d, text, sizeof text);
    CHECK(moe_desc_json(NULL, text, 10) == 0);
    n = moe_desc_json(&d, text, sizeof text);
    CHECK(n > 20 && n < sizeof text && strlen(text) == n && text[0] == '{' && text[n - 1] == '}');
    CHECK(strstr(text, "\"d_model\":4") != NULL && strstr(text, "\"top_k\":2") != NULL);
    CHECK(moe_desc_json(&d, NULL, 0) == n);
    for (size_t size = 1; size <= n + 1; size++) {
        memset(part, '#', sizeof part);
        CHECK(moe_desc_json(&d, part, size) == n);
        CHECK(part[size] == '#' && strlen(part) == (size - 1 < n ? size - 1 : n) && !memcmp(part, text, strlen(part)));
    }
}

/* ---- level 1 ---- */
static void test_array_functions(void) {
    float a[12] = {0}, b[12] = {0};
    int32_t index[12];
    uint64_t load[3] = {1, 1, 1};
    double value;
    CHECK_STATUS(moe_softmax(2, 3, 1, NULL, b), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_softmax(2, 3, 1, a, NULL), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_softmax_backward(2, 3, 1, NULL, a, b), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_softmax_backward(2, 3, 1, a, NULL, b), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_softmax_backward(2, 3, 1, a, a, NULL), MOE_E_NULL_LOGITS);
    static const float cold[] = {0, -1, NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 5; i++) {
        CHECK_STATUS(moe_softmax(2, 3, cold[i], a, b), MOE_E_TEMPERATURE);
        CHECK_STATUS(moe_softmax_backward(2, 3, cold[i], a, a, b), MOE_E_TEMPERATURE);
        CHECK_STATUS(moe_loss_switch(2, 3, cold[i], a, load, 1, &value, b), MOE_E_TEMPERATURE);
    }
    float hot[3] = {1, 2, 3}, out[3] = {0};
    moe_status s = moe_softmax(1, 3, 1e-39f, hot, out); /* 1 / temperature is not a float */
    CHECK(s == MOE_E_TEMPERATURE || (out[0] >= 0 && out[2] <= 1));
    CHECK_STATUS(moe_softmax(SIZE_MAX / 2, 3, 1, a, b), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_softmax_backward(SIZE_MAX / 2, 3, 1, a, a, b), MOE_E_OVERFLOW);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        a[4] = bad[i];
        CHECK_STATUS(moe_softmax(2, 3, 1, a, b), MOE_E_NAN_LOGITS);
        CHECK_STATUS(moe_loss_z(2, 3, a, 1, &value, b), MOE_E_NAN_LOGITS);
        a[4] = 0;
        CHECK_STATUS(moe_loss_switch(2, 3, 1, a, load, bad[i], &value, b), MOE_E_COEFFICIENT);
        CHECK_STATUS(moe_loss_z(2, 3, a, bad[i], &value, b), MOE_E_COEFFICIENT);
    }
    CHECK_STATUS(moe_topk(2, 3, 0, a, index, b), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk(2, 3, 4, a, index, b), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk(2, 3, 2, NULL, index, b), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_topk(2, 3, 2, a, NULL, b), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_topk(SIZE_MAX / 2, 3, 2, a, index, b), MOE_E_OVERFLOW);
    CHECK(moe_topk(2, 0, 1, a, index, b) != MOE_OK);
    CHECK(!strcmp(moe_status_field(moe_loss_switch(2, 3, 1, NULL, load, 1, &value, b)), "prob"));
    CHECK_STATUS(moe_loss_switch(2, 3, 1, a, NULL, 1, &value, b), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_loss_switch(2, 0, 1, a, load, 1, &value, b), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_loss_z(2, 3, NULL, 1, &value, b), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_loss_z(2, 0, a, 1, &value, b), MOE_E_N_EXPERTS);
    for (int i = 0; i < 12; i++) CHECK(b[i] == 0); /* nothing was added */
}

/* ---- level 2 ---- */
static void test_routes_and_health(void) {
    moe_routes r;
    moe_health h, other;
    size_t bytes = 0, more = 0;
    char *memory, *memory2, *memory3;
    CHECK_STATUS(moe_routes_size(4, 2, 3, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_routes_size(4, 2, 0, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_routes_size(4, 2, ((size_t)1 << 20) + 1, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_routes_size(4, 0, 3, &bytes), MOE_E_TOP_K);
    CHECK_OK(moe_routes_size(4, 2, 3, &bytes));
    memory = (char *)test_memory(bytes, 1);
    CHECK_STATUS(moe_routes_init(NULL, 4, 2, 3, memory, bytes), MOE_E_NULL_ROUTES);
    CHECK_STATUS(moe_routes_init(&r, 4, 2, 3, NULL, bytes), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_routes_init(&r, 4, 2, 3, memory, bytes - 1), MOE_E_SMALL_MEMORY);
    memset(memory, 0xff, bytes);
    CHECK_OK(moe_routes_init(&r, 4, 2, 3, memory, bytes));
    CHECK_STATUS(moe_routes_fill(NULL, 0, NULL, NULL, 0, MOE_ORDER_TOKEN), MOE_E_NULL_ROUTES);
    CHECK_STATUS(moe_routes_fill(&r, 2, NULL, NULL, 0, MOE_ORDER_TOKEN), MOE_E_NULL_INDEX);

    CHECK_STATUS(moe_health_size(3, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_health_size(0, &more), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_health_size(SIZE_MAX, &more), MOE_E_N_EXPERTS);
    CHECK_OK(moe_health_size(3, &more));
    memory2 = (char *)test_memory(more, 1), memory3 = (char *)test_memory(more * 2, 1);
    CHECK_STATUS(moe_health_init(NULL, 3, memory2, more), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_health_init(&h, 3, NULL, more), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_health_init(&h, 3, memory2, more - 1), MOE_E_SMALL_MEMORY);
    memset(memory2, 0xff, more);
    CHECK_OK(moe_health_init(&h, 3, memory2, more));
    CHECK_OK(moe_health_add(&h, &r, NULL)); /* routes that were never filled: an empty batch */
    CHECK(h.n_tokens == 0 && h.n_batches == 1 && h.load[2] == 0 && h.top1[0] == 0 && h.top1[2] == 0 && h.prob[1] == 0);
    CHECK_STATUS(moe_health_add(NULL, &r, NULL), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_health_add(&h, NULL, NULL), MOE_E_NULL_ROUTES);
    CHECK_OK(moe_health_init(&other, 4, memory3, more * 2));
    CHECK_STATUS(moe_health_merge(&h, &other), MOE_E_MERGE);
    CHECK_STATUS(moe_health_add(&other, &r, NULL), MOE_E_MERGE);
    CHECK_STATUS(moe_health_merge(NULL, &h), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_health_merge(&h, NULL), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_health_update(NULL), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_health_reset(NULL), MOE_E_NULL_HEALTH);
    free(memory), free(memory2), free(memory3);
}

static void test_level_two(void) {
    moe_desc d = small_desc(), wider = d;
    moe_tape *t = NULL, *bare = NULL;
    size_t bytes = 0, n_params = 0;
    float x[12], y[12], router[12], weight[6];
    uint64_t load[3] = {1, 2, 3};
    wider.d_model = 5;
    test_fill(x, 12, -1, 1);
    test_fill(router, 12, -1, 1);
    CHECK_STATUS(moe_tape_size(&d, 3, MOE_ON, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_tape_size(&d, 3, 7, &bytes), MOE_E_TRAINING);
    CHECK_STATUS(moe_tape_new(NULL, &d, 3, MOE_ON), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_tape_new(&t, &d, 3, -2), MOE_E_TRAINING);
    CHECK_OK(moe_tape_size(&d, 3, MOE_ON, &bytes));
    CHECK_STATUS(moe_tape_init(NULL, &d, 3, MOE_ON, x, bytes), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_tape_init(&t, &d, 3, MOE_ON, NULL, bytes), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_tape_init(&t, &d, 3, MOE_ON, x, 12), MOE_E_SMALL_MEMORY);
    CHECK(t == NULL);
    moe_tape_free(NULL);
    CHECK_OK(moe_tape_new(&t, &d, 3, MOE_ON));
    CHECK_OK(moe_tape_new(&bare, &d, 3, MOE_OFF));
    if (!CHECK(t && bare)) return;

    CHECK_STATUS(moe_experts_count(&d, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_experts_count(&d, &n_params));
    float *params = test_floats(n_params), *grads = test_floats(n_params);
    float w[24] = {0};
    moe_expert_weights weights = {w, w, w, NULL, NULL, NULL};
    CHECK_STATUS(moe_expert_pack(&d, 3, &weights, params), MOE_E_INDEX);
    CHECK_STATUS(moe_expert_unpack(&d, SIZE_MAX, params, &weights), MOE_E_INDEX);
    CHECK_STATUS(moe_expert_pack(&d, 0, &weights, NULL), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_expert_unpack(&d, 0, NULL, &weights), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_expert_pack(&d, 0, NULL, params), MOE_E_NULL_WEIGHT);
    CHECK_STATUS(moe_expert_unpack(&d, 0, params, NULL), MOE_E_NULL_WEIGHT);
    for (size_t e = 0; e < 3; e++) CHECK_OK(moe_expert_pack(&d, e, &weights, params));

    /* out of order */
    CHECK_STATUS(moe_experts_forward(&d, params, t, y), MOE_E_NO_ROUTES);
    CHECK_STATUS(moe_experts_backward(&d, params, t, x, 1, grads, NULL, NULL), MOE_E_NO_FORWARD);
    CHECK_STATUS(moe_route_backward(&d, router, t, NULL, NULL, router, NULL), MOE_E_NO_FORWARD);
    /* missing pieces */
    CHECK_STATUS(moe_route(&d, NULL, x, 3, t), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_route(&d, router, NULL, 3, t), MOE_E_NULL_X);
    CHECK_STATUS(moe_route(&d, router, x, 3, NULL), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_route(&d, router, x, 4, t), MOE_E_N_TOKENS);
    CHECK_STATUS(moe_route(&wider, router, x, 1, t), MOE_E_TAPE_DESC);
    CHECK_STATUS(moe_tape_tokens(&d, NULL, x, 3), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_tape_tokens(&d, t, NULL, 3), MOE_E_NULL_X);
    CHECK_STATUS(moe_tape_tokens(&d, t, x, 4), MOE_E_N_TOKENS);
    CHECK_STATUS(moe_tape_tokens(&wider, t, x, 1), MOE_E_TAPE_DESC);
    CHECK_OK(moe_route(&d, router, x, 3, t));
    CHECK_STATUS(moe_experts_forward(&d, NULL, t, y), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_experts_forward(&d, params, NULL, y), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_experts_forward(&d, params, t, NULL), MOE_E_NULL_Y);
    CHECK_STATUS(moe_experts_forward(&wider, params, t, y), MOE_E_TAPE_DESC);
    CHECK_STATUS(moe_experts_backward(&d, params, t, x, 1, grads, weight, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_experts_forward(&d, params, t, y));
    CHECK_STATUS(moe_experts_backward(&d, NULL, t, x, 1, grads, weight, NULL), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_experts_backward(&d, params, NULL, x, 1, grads, weight, NULL), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_experts_backward(&d, params, t, NULL, 1, grads, weight, NULL), MOE_E_NULL_DY);
    CHECK_STATUS(moe_experts_backward(&d, params, t, x, 1, NULL, weight, NULL), MOE_E_NULL_GRADS);
    CHECK_STATUS(moe_experts_backward(&wider, params, t, x, 1, grads, weight, NULL), MOE_E_TAPE_DESC);
    CHECK_OK(moe_experts_backward(&d, params, t, x, 1, grads, weight, NULL));
    CHECK_STATUS(moe_route_backward(&d, NULL, t, weight, load, router, NULL), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_route_backward(&d, router, NULL, weight, load, router, NULL), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_route_backward(&wider, router, t, weight, load, router, NULL), MOE_E_TAPE_DESC);
    CHECK_OK(moe_route_backward(&d, router, t, weight, load, NULL, NULL));
    /* numbers */
    x[7] = NAN;
    CHECK_STATUS(moe_route(&d, router, x, 3, t), MOE_E_NAN_X);
    CHECK_STATUS(moe_experts_forward(&d, params, t, y), MOE_E_NO_ROUTES); /* not with the routes of before */
    x[7] = 3e38f;
    for (int i = 0; i < 12; i++) router[i] = 3e38f;
    CHECK_STATUS(moe_route(&d, router, x, 3, t), MOE_E_NAN_X);
    /* a tape without backward */
    test_fill(x, 12, -1, 1);
    test_fill(router, 12, -1, 1);
    CHECK_OK(moe_route(&d, router, x, 3, bare));
    CHECK_OK(moe_experts_forward(&d, params, bare, y));
    CHECK_STATUS(moe_experts_backward(&d, params, bare, x, 1, grads, weight, NULL), MOE_E_NO_FORWARD);
    CHECK_STATUS(moe_route_backward(&d, router, bare, weight, NULL, router, NULL), MOE_E_NO_FORWARD);
    /* routes filled for other tokens than the tape was told of */
    int32_t index[6] = {0, 1, 0, 1, 0, 1};
    CHECK_OK(moe_tape_tokens(&d, t, x, 3));
    CHECK_OK(moe_routes_fill(&t->routes, 2, index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_STATUS(moe_experts_forward(&d, params, t, y), MOE_E_NO_ROUTES);
    /* no tokens: no arrays */
    CHECK_OK(moe_route(&d, router, NULL, 0, t));
    CHECK_OK(moe_experts_forward(&d, params, t, NULL));
    CHECK_OK(moe_experts_backward(&d, params, t, NULL, 1, grads, NULL, NULL));
    CHECK_OK(moe_route_backward(&d, router, t, NULL, NULL, NULL, NULL));
    moe_tape_free(t), moe_tape_free(bare);
    free(params), free(grads);
    CHECK(test_live_blocks == 0);
}

/* ---- level 3 ---- */
static void test_layer_functions(void) {
    moe_desc d = small_desc(), wider = d;
    moe_layer *m = NULL;
    moe_tape *t = NULL, *other = NULL;
    moe_health h;
    moe_tensor tensor;
    size_t bytes = 0;
    double number;
    float x[12], y[12], r[12];
    wider.d_model = 5;
    test_fill(x, 12, -1, 1);
    moe_layer_free(NULL);
    CHECK_STATUS(moe_layer_new(NULL, &d), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_init(NULL, &d, x, 12), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_size(&d, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_layer_size(&d, &bytes));
    CHECK_STATUS(moe_layer_init(&m, &d, NULL, bytes), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_layer_init(&m, &d, x, 12), MOE_E_SMALL_MEMORY);
    CHECK(m == NULL);
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    uint64_t before = moe_layer_hash(m);

    CHECK(moe_layer_tape(m) == NULL && moe_layer_desc(NULL) == NULL && moe_layer_tape(NULL) == NULL);
    CHECK(moe_layer_params(NULL) == 0 && moe_layer_active_params(NULL) == 0 && moe_layer_tensors(NULL) == 0);
    CHECK(moe_layer_hash(NULL) == 0);
    CHECK_STATUS(moe_forward(NULL, x, 3, y), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_forward(m, NULL, 3, y), MOE_E_NULL_X);
    CHECK_STATUS(moe_forward(m, x, 3, NULL), MOE_E_NULL_Y);
    CHECK_STATUS(moe_backward(NULL, x, NULL), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_backward(m, x, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_forward(m, NULL, 0, NULL));
    CHECK_OK(moe_backward(m, NULL, NULL));
    CHECK_OK(moe_forward(m, x, 3, y));
    CHECK_STATUS(moe_backward(m, NULL, NULL), MOE_E_NULL_DY);
    CHECK_OK(moe_backward(m, x, NULL)); /* a refused backward does not use up the forward */
    CHECK_STATUS(moe_step(NULL, 0.1f), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_step(m, -0.1f), MOE_E_LR);
    CHECK_STATUS(moe_step(m, NAN), MOE_E_LR);
    CHECK_STATUS(moe_step(m, INFINITY), MOE_E_LR);

    CHECK_OK(moe_tape_new(&t, &d, 3, MOE_ON));
    CHECK_OK(moe_tape_new(&other, &wider, 3, MOE_ON));
    CHECK_STATUS(moe_forward_tape(NULL, t, x, 3, y), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_forward_tape(m, NULL, x, 3, y), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_forward_tape(m, t, NULL, 3, y), MOE_E_NULL_X);
    CHECK_STATUS(moe_forward_tape(m, t, x, 3, NULL), MOE_E_NULL_Y);
    CHECK_STATUS(moe_forward_tape(m, t, x, 4, y), MOE_E_N_TOKENS);
    CHECK_STATUS(moe_forward_tape(m, other, x, 2, y), MOE_E_TAPE_DESC);
    CHECK_STATUS(moe_backward_tape(m, t, x, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_forward_tape(m, t, x, 3, y));
    CHECK_STATUS(moe_backward_tape(NULL, t, x, NULL), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_backward_tape(m, NULL, x, NULL), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_backward_tape(m, t, NULL, NULL), MOE_E_NULL_DY);
    moe_tape_free(t), moe_tape_free(other);

    CHECK_STATUS(moe_layer_health(NULL, &h), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_health(m, NULL), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_layer_health_reset(NULL), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_losses(NULL, NULL, NULL), MOE_E_NULL_LAYER);
    CHECK_OK(moe_layer_losses(m, NULL, NULL));
    CHECK_STATUS(moe_layer_grad_norm(NULL, &number), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_grad_norm(m, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_scale_grads(NULL, 1), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_scale_grads(m, NAN), MOE_E_COEFFICIENT);
    CHECK_STATUS(moe_layer_scale_grads(m, INFINITY), MOE_E_COEFFICIENT);

    CHECK_STATUS(moe_layer_tensor(NULL, 0, &tensor), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_tensor(m, 0, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_tensor(m, moe_layer_tensors(m), &tensor), MOE_E_NAME);
    CHECK_STATUS(moe_layer_tensor(m, SIZE_MAX, &tensor), MOE_E_NAME);
    CHECK_STATUS(moe_layer_get(NULL, MOE_PART_PARAMS, "router", r, 12), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, NULL, r, 12), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, "router", NULL, 12), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, "nothing", r, 12), MOE_E_NAME);
    CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, "", r, 12), MOE_E_NAME);
    CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, "experts.b1", r, 12), MOE_E_NAME); /* without biases */
    CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, "router", r, 11), MOE_E_TENSOR_SIZE);
    CHECK(!strcmp(moe_status_field(moe_layer_get(m, (moe_part)9, "router", r, 12)), "part"));
    CHECK(!strcmp(moe_status_field(moe_layer_get(m, (moe_part)-1, "router", r, 12)), "part"));
    CHECK_STATUS(moe_layer_set(NULL, MOE_PART_PARAMS, "router", r, 12), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_set(m, MOE_PART_PARAMS, NULL, r, 12), MOE_E_NULL_NAME);
    CHECK(moe_status_kind(moe_layer_set(m, MOE_PART_PARAMS, "router", NULL, 12)) == MOE_KIND_ARGUMENT);
    CHECK_STATUS(moe_layer_set(m, MOE_PART_PARAMS, "nothing", r, 12), MOE_E_NAME);
    CHECK_STATUS(moe_layer_set(m, MOE_PART_PARAMS, "router", r, 13), MOE_E_TENSOR_SIZE);
    CHECK(!strcmp(moe_status_field(moe_layer_set(m, (moe_part)4, "router", r, 12)), "part"));
    CHECK(moe_layer_hash(m) == before);
    moe_layer_free(m);
    CHECK(test_live_blocks == 0);
}

int main(void) {
    RUN(test_status_strings);
    RUN(test_names);
    RUN(test_desc_defaults);
    RUN(test_desc_resolve_is_idempotent);
    RUN(test_desc_fields);
    RUN(test_overflows);
    RUN(test_desc_json);
    RUN(test_array_functions);
    RUN(test_routes_and_health);
    RUN(test_level_two);
    RUN(test_layer_functions);
    return test_end();
}
