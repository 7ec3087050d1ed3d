/* Bad arguments: every public function answers each kind of them with the right status, whose sentence names the
 * argument; nothing crashes and nothing is half done. (moe_gemm: products.c; optimisers:
 * optimiser.c; elementary functions: kernels.c; random ones: random.c; routes_fill: routes.c; files: save.c.) */
#include "test.h"

#include <limits.h>

static moe_desc small_desc(void) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = 4, d.d_ff = 6, d.n_experts = 3, d.top_k = 2;
    return d;
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
    NAME_CHECK(moe_score_name, moe_score_kind, 1, MOE_SCORE_COUNT)
    NAME_CHECK(moe_gate_name, moe_gate_kind, 1, MOE_GATE_COUNT)
    NAME_CHECK(moe_select_name, moe_select_kind, 1, MOE_SELECT_COUNT)
    NAME_CHECK(moe_order_name, moe_order_kind, 1, MOE_ORDER_COUNT)
    NAME_CHECK(moe_round_name, moe_round_kind, 1, MOE_ROUND_COUNT)
    NAME_CHECK(moe_noise_name, moe_noise_kind, 1, MOE_NOISE_COUNT)
    NAME_CHECK(moe_combine_name, moe_combine_kind, 1, MOE_COMBINE_COUNT)
    NAME_CHECK(moe_schedule_name, moe_schedule_kind, 1, MOE_SCHEDULE_COUNT)
    NAME_CHECK(moe_init_name, moe_init_kind, 1, MOE_INIT_COUNT)
    NAME_CHECK(moe_expert_name, moe_expert_kind, 1, MOE_EXPERT_COUNT)
    NAME_CHECK(moe_loss_name, moe_loss_kind, 0, MOE_LOSS_COUNT)
    NAME_CHECK(moe_optimizer_name, moe_optimizer_kind, 1, MOE_OPTIMIZER_COUNT)
    NAME_CHECK(moe_isa_name, moe_isa_kind, 1, MOE_ISA_COUNT)
    CHECK(!strcmp(moe_gate_name(MOE_GATE_SOFTMAX), "softmax"));
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
            CHECK_STATUS(moe_routes_size(huge[i], 4, 2, &bytes), MOE_E_OVERFLOW);
            if (SIZE_MAX > UINT32_MAX)
                CHECK_STATUS(moe_routes_size((size_t)UINT32_MAX / 2 + 1, 4, 2, &bytes), MOE_E_OVERFLOW);
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

/* ---- level 1 ---- */
static void test_array_functions(void) {
    float a[12] = {0}, b[12] = {0};
    int32_t index[12];
    uint64_t load[3] = {1, 1, 1};
    double value;
    moe_loss_args loss, wrong;
    memset(&loss, 0, sizeof loss);
    loss.n_tokens = 2, loss.n_experts = 3, loss.prob = loss.logits = a, loss.load = load, loss.d_logits = b;
    CHECK_STATUS(moe_softmax(2, 3, 1, NULL, b), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_softmax(2, 3, 1, a, NULL), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_softmax_backward(2, 3, 1, NULL, a, b), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_softmax_backward(2, 3, 1, a, NULL, b), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_softmax_backward(2, 3, 1, a, a, NULL), MOE_E_NULL_LOGITS);
    static const float cold[] = {0, -1, NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 5; i++) {
        CHECK_STATUS(moe_softmax(2, 3, cold[i], a, b), MOE_E_TEMPERATURE);
        CHECK_STATUS(moe_softmax_backward(2, 3, cold[i], a, a, b), MOE_E_TEMPERATURE);
        wrong = loss, wrong.temperature = cold[i]; /* 0 is 1 here */
        if (i) CHECK_STATUS(moe_loss(MOE_LOSS_SWITCH, &wrong, 1, &value), MOE_E_TEMPERATURE);
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
        CHECK_STATUS(moe_loss(MOE_LOSS_Z, &loss, 1, &value), MOE_E_NAN_LOGITS);
        a[4] = 0;
        CHECK_STATUS(moe_loss(MOE_LOSS_SWITCH, &loss, bad[i], &value), MOE_E_COEFFICIENT);
        CHECK_STATUS(moe_loss(MOE_LOSS_Z, &loss, bad[i], &value), MOE_E_COEFFICIENT);
    }
    double lo, hi;
    for (int i = 0; i < 5; i++)
        if (i) CHECK_STATUS(moe_rand_normal(1, 0, 3, 0, cold[i], b), MOE_E_STD);
    CHECK_STATUS(moe_rand_normal(1, 0, 3, NAN, 1, b), MOE_E_STD);
    CHECK_STATUS(moe_interval(0, &value, &lo, &hi), MOE_E_REPLICATES);
    CHECK_STATUS(moe_interval(1, NULL, &lo, &hi), MOE_E_NULL_X);
    CHECK_STATUS(moe_interval(1, &value, NULL, &hi), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_topk(2, 3, 0, a, index, b), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk(2, 3, 4, a, index, b), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk(2, 3, 2, NULL, index, b), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_topk(2, 3, 2, a, NULL, b), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_topk(SIZE_MAX / 2, 3, 2, a, index, b), MOE_E_OVERFLOW);
    CHECK(moe_topk(2, 0, 1, a, index, b) != MOE_OK);
    wrong = loss, wrong.prob = NULL;
    CHECK(!strcmp(moe_status_field(moe_loss(MOE_LOSS_SWITCH, &wrong, 1, &value)), "prob"));
    wrong = loss, wrong.load = NULL, CHECK_STATUS(moe_loss(MOE_LOSS_SWITCH, &wrong, 1, &value), MOE_E_NULL_LOAD);
    wrong = loss, wrong.logits = NULL, CHECK_STATUS(moe_loss(MOE_LOSS_Z, &wrong, 1, &value), MOE_E_NULL_LOGITS);
    wrong = loss, wrong.n_experts = 0;
    CHECK_STATUS(moe_loss(MOE_LOSS_SWITCH, &wrong, 1, &value), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_loss(MOE_LOSS_Z, &wrong, 1, &value), MOE_E_N_EXPERTS);
    for (int i = 0; i < 12; i++) CHECK(b[i] == 0); /* nothing was added */
}

/* ---- level 2 ---- */
static void test_routes_and_health(void) {
    moe_routes r;
    moe_health h, other;
    size_t bytes = 0, more = 0;
    char *memory, *memory2, *memory3;
    CHECK_STATUS(moe_routes_size(4, 3, 2, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_routes_size(4, 0, 2, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_routes_size(4, ((size_t)1 << 20) + 1, 2, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_routes_size(4, 3, 0, &bytes), MOE_E_TOP_K);
    CHECK_OK(moe_routes_size(4, 3, 2, &bytes));
    memory = (char *)test_memory(bytes, 1);
    CHECK_STATUS(moe_routes_init(NULL, 4, 3, 2, memory, bytes), MOE_E_NULL_ROUTES);
    CHECK_STATUS(moe_routes_init(&r, 4, 3, 2, NULL, bytes), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_routes_init(&r, 4, 3, 2, memory, bytes - 1), MOE_E_SMALL_MEMORY);
    memset(memory, 0xff, bytes);
    CHECK_OK(moe_routes_init(&r, 4, 3, 2, memory, bytes));
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
    moe_desc d = small_desc();
    moe_tape *t = NULL, *bare = NULL;
    size_t bytes = 0, n_params = 0;
    float x[12], y[12], router[12], weight[6];
    const uint64_t load[3] = {1, 2, 3};
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
    moe_expert_arrays arrays = {w, w, w, NULL, NULL, NULL};
    CHECK_STATUS(moe_expert_pack(&d, 3, &weights, params), MOE_E_INDEX);
    CHECK_STATUS(moe_expert_unpack(&d, SIZE_MAX, params, &arrays), MOE_E_INDEX);
    CHECK_STATUS(moe_expert_pack(&d, 0, &weights, NULL), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_expert_unpack(&d, 0, NULL, &arrays), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_expert_pack(&d, 0, NULL, params), MOE_E_NULL_WEIGHT);
    CHECK_STATUS(moe_expert_unpack(&d, 0, params, NULL), MOE_E_NULL_WEIGHT);
    for (size_t e = 0; e < 3; e++) CHECK_OK(moe_expert_pack(&d, e, &weights, params));

    /* out of order */
    CHECK_STATUS(moe_experts_forward(t, params, y), MOE_E_NO_ROUTES);
    CHECK_STATUS(moe_experts_backward(t, params, x, 1, grads, NULL, NULL), MOE_E_NO_FORWARD);
    CHECK_STATUS(moe_route_backward(t, router, NULL, router, NULL), MOE_E_NO_FORWARD);
    /* missing pieces */
    CHECK_STATUS(moe_route(t, NULL, x, 3), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_route(t, router, NULL, 3), MOE_E_NULL_X);
    CHECK_STATUS(moe_route(NULL, router, x, 3), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_route(t, router, x, 4), MOE_E_N_TOKENS);
    CHECK_STATUS(moe_tape_tokens(NULL, x, 3), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_tape_tokens(t, NULL, 3), MOE_E_NULL_X);
    CHECK_STATUS(moe_tape_tokens(t, x, 4), MOE_E_N_TOKENS);
    CHECK_OK(moe_route(t, router, x, 3));
    CHECK_STATUS(moe_experts_forward(t, NULL, y), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_experts_forward(NULL, params, y), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_experts_forward(t, params, NULL), MOE_E_NULL_Y);
    CHECK_STATUS(moe_experts_backward(t, params, x, 1, grads, weight, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_experts_forward(t, params, y));
    CHECK_STATUS(moe_experts_backward(t, NULL, x, 1, grads, weight, NULL), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_experts_backward(NULL, params, x, 1, grads, weight, NULL), MOE_E_NULL_TAPE);
    CHECK_STATUS(moe_experts_backward(t, params, NULL, 1, grads, weight, NULL), MOE_E_NULL_DY);
    CHECK_STATUS(moe_experts_backward(t, params, x, 1, NULL, weight, NULL), MOE_E_NULL_GRADS);
    CHECK_OK(moe_experts_backward(t, params, x, 1, grads, weight, NULL));
    CHECK_STATUS(moe_route_backward(t, NULL, weight, router, NULL), MOE_E_NULL_PARAMS);
    CHECK_STATUS(moe_route_backward(NULL, router, weight, router, NULL), MOE_E_NULL_TAPE);
    t->side.load = load;
    CHECK_OK(moe_route_backward(t, router, weight, NULL, NULL));
    t->side.load = NULL;
    /* numbers */
    x[7] = NAN;
    CHECK_STATUS(moe_route(t, router, x, 3), MOE_E_NAN_X);
    CHECK_STATUS(moe_experts_forward(t, params, y), MOE_E_NO_ROUTES); /* not with the routes of before */
    x[7] = 3e38f;
    for (int i = 0; i < 12; i++) router[i] = 3e38f;
    CHECK_STATUS(moe_route(t, router, x, 3), MOE_E_NAN_X);
    /* a tape without backward */
    test_fill(x, 12, -1, 1);
    test_fill(router, 12, -1, 1);
    CHECK_OK(moe_route(bare, router, x, 3));
    CHECK_OK(moe_experts_forward(bare, params, y));
    CHECK_STATUS(moe_experts_backward(bare, params, x, 1, grads, weight, NULL), MOE_E_NO_FORWARD);
    CHECK_STATUS(moe_route_backward(bare, router, weight, router, NULL), MOE_E_NO_FORWARD);
    /* routes filled for other tokens than the tape was told of */
    int32_t index[6] = {0, 1, 0, 1, 0, 1};
    CHECK_OK(moe_tape_tokens(t, x, 3));
    CHECK_OK(moe_routes_fill(&t->routes, 2, index, NULL, 0, MOE_ORDER_TOKEN));
    CHECK_STATUS(moe_experts_forward(t, params, y), MOE_E_NO_ROUTES);
    /* no tokens: no arrays */
    CHECK_OK(moe_route(t, router, NULL, 0));
    CHECK_OK(moe_experts_forward(t, params, NULL));
    CHECK_OK(moe_experts_backward(t, params, NULL, 1, grads, NULL, NULL));
    CHECK_OK(moe_route_backward(t, router, NULL, NULL, NULL));
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
    CHECK(!strcmp(moe_status_field(moe_layer_get(m, (moe_part_kind)9, "router", r, 12)), "part"));
    CHECK(!strcmp(moe_status_field(moe_layer_get(m, (moe_part_kind)-1, "router", r, 12)), "part"));
    CHECK_STATUS(moe_layer_set(NULL, MOE_PART_PARAMS, "router", r, 12), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_set(m, MOE_PART_PARAMS, NULL, r, 12), MOE_E_NULL_NAME);
    CHECK(moe_status_kind(moe_layer_set(m, MOE_PART_PARAMS, "router", NULL, 12)) == MOE_KIND_ARGUMENT);
    CHECK_STATUS(moe_layer_set(m, MOE_PART_PARAMS, "nothing", r, 12), MOE_E_NAME);
    CHECK_STATUS(moe_layer_set(m, MOE_PART_PARAMS, "router", r, 13), MOE_E_TENSOR_SIZE);
    CHECK(!strcmp(moe_status_field(moe_layer_set(m, (moe_part_kind)4, "router", r, 12)), "part"));
    CHECK(moe_layer_hash(m) == before);
    moe_layer_free(m);
    CHECK(test_live_blocks == 0);
}

int main(void) {
    RUN(test_names);
    RUN(test_overflows);
    RUN(test_array_functions);
    RUN(test_routes_and_health);
    RUN(test_level_two);
    RUN(test_layer_functions);
    return test_end();
}
