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

/* ---- what is given and not needed, or needed in part ---- */
static moe_layer *layer_of(const char *text) {
    moe_desc d = small_desc();
    moe_layer *m = NULL;
    d.n_experts = 4, d.parallel.n_threads = 1;
    if (!CHECK_OK(moe_desc_parse(&d, text, NULL)) || !CHECK_OK(moe_layer_new(&m, &d))) printf("        %s\n", text);
    return m;
}
static void test_given_in_part(void) {
    enum { T = 6 };
    float x[T * 4], y[T * 4], dx[T * 4], grads[2][4 * 4];
    const unsigned char mask[T] = {1, 0, 1, 1, 0, 1};
    const uint64_t load[4] = {3, 3, 3, 3};
    const double mean[4] = {0.25, 0.25, 0.25, 0.25};
    const int32_t beyond[T] = {9, 9, 9, 9, 9, 9};
    int32_t index[T * 2];
    test_fill(x, T * 4, -1, 1);
    moe_layer *m = layer_of("switch_load=first");
    moe_side *side = moe_layer_side(m);
    side->teacher = beyond, side->load = load; /* of losses that are off */
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_backward(m, x, NULL));
    moe_layer_free(m);
    m = layer_of("switch_load=first loss.switch=0.5");
    side = moe_layer_side(m);
    side->load = side->first = load, side->mean = mean, side->counted = T;
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_backward(m, x, NULL));
    CHECK_WITHIN(moe_layer_tape(m)->loss[MOE_LOSS_SWITCH], 1, 1e-6); /* as even as can be */
    moe_layer_free(m);
    for (int wanted = 0; wanted < 2; wanted++) { /* with a mask, with dx and without */
        m = layer_of("");
        moe_layer_side(m)->mask = mask;
        CHECK_OK(moe_forward(m, x, T, y));
        CHECK_OK(moe_backward(m, x, wanted ? dx : NULL));
        CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router", grads[wanted], 16));
        moe_layer_free(m);
    }
    CHECK_SAME(grads[0], grads[1], 16);
    CHECK(grads[0][0] != 0);
    moe_desc d = small_desc();
    moe_tape *t = NULL;
    CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON));
    t->side.temperature = -1;
    CHECK_STATUS(moe_tape_tokens(t, x, T), MOE_E_TEMPERATURE);
    t->side.temperature = 0;
    CHECK_OK(moe_route(t, y, NULL, 0));
    CHECK_OK(moe_tape_index(t, NULL)); /* of no tokens */
    moe_tape_free(t);
    m = layer_of("n_codes=4"); /* routes of a router, the experts, but no codes */
    float router[200] = {0};
    size_t n = 0;
    CHECK_OK(moe_router_count(moe_layer_desc(m), &n));
    CHECK(n <= 200);
    CHECK_OK(moe_tape_new(&t, moe_layer_desc(m), T, MOE_ON));
    CHECK_OK(moe_forward_tape(m, t, x, T, y));
    CHECK_OK(moe_route(t, router, x, T));
    CHECK_OK(moe_layer_experts(m, t, y));
    CHECK_STATUS(moe_backward_tape(m, t, x, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_tape_index(t, index));
    moe_tape_free(t);
    moe_layer_free(m);
}
/* Worth by gradients where some have none, of experts that are no floats; a part that an optimiser does not keep; usage
 * that is given. */
static void test_worth_in_part(void) {
    float x[6 * 4], y[6 * 4], numbers[16];
    double worth[5], usage[5] = {1, 2, 3, 4, 5};
    size_t none = 0;
    moe_layer_formats int8;
    memset(&int8, 0, sizeof int8);
    int8.format = MOE_FORMAT_INT8, int8.train_router = MOE_ON;
    test_fill(x, 6 * 4, -1, 1);
    moe_layer *m = layer_of("sparse_step=true"), *other = NULL;
    CHECK_OK(moe_forward(m, x, 1, y));
    CHECK_OK(moe_backward(m, x, NULL));
    CHECK_OK(moe_layer_worth(m, MOE_WORTH_GRADIENT, NULL, 0, worth));
    for (int e = 0; e < 4; e++) none += worth[e] == 0;
    CHECK(none == 2); /* one token, two experts of four */
    CHECK_OK(moe_step(m, 0.1f));
    if (CHECK_OK(moe_layer_quantize(m, &int8, &other))) {
        CHECK(moe_layer_desc(other)->training == MOE_ON);
        CHECK_STATUS(moe_layer_worth(other, MOE_WORTH_GRADIENT, NULL, 0, worth), MOE_E_QUANTISED);
        moe_layer_free(other);
    }
    moe_layer_free(m);
    m = layer_of("optimizer=sgd");
    CHECK_STATUS(moe_layer_get(m, MOE_PART_MOMENT2, "router", numbers, 16), MOE_E_PART);
    if (CHECK_OK(moe_layer_merge_to(&other, m, 2, x, 6, usage))) CHECK(moe_layer_desc(other)->n_experts == 2);
    moe_layer_free(other);
    moe_layer_free(m);
    m = layer_of("n_experts=5 n_zero=1"); /* special experts have no usage */
    usage[4] = NAN;
    if (CHECK_OK(moe_layer_merge(&other, m, 1, 2, usage))) CHECK(moe_layer_desc(other)->n_experts == 4);
    moe_layer_free(other), moe_layer_free(m);
}

/* Gradients that no cache holds are written past it where that is all that a few rows do: the same bits. */
static void test_large_gradients(void) {
    enum { T = 4, WIDE = 256 };
    moe_desc d = small_desc();
    moe_tape *t = NULL;
    size_t n = 0;
    d.d_model = WIDE, d.d_ff = 1024, d.n_experts = 16, d.parallel.n_threads = 1;
    float *x = test_floats(T * WIDE), *y = test_floats(T * WIDE), *router = test_floats(WIDE * 16);
    test_fill(x, T * WIDE, -1, 1), test_fill(router, WIDE * 16, -1, 1);
    if (!CHECK_OK(moe_experts_count(&d, &n)) || !CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON))) return;
    unsigned char *memory = (unsigned char *)test_memory(n + 16, sizeof(float));
    float *params = test_floats(n), *added = test_floats(n);
    float *fresh = (float *)(void *)(memory + (64 - (uintptr_t)memory % 64) % 64);
    for (size_t i = 0; i < n; i++) params[i] = (float)(i % 13) / 13 - 0.5f;
    for (int once = 0; once < 2; once++) {
        CHECK_OK(moe_route(t, router, x, T));
        CHECK_OK(moe_experts_forward(t, params, y));
        CHECK_OK(moe_experts_backward(t, params, x, once, once ? fresh : added, NULL, NULL));
    }
    CHECK_SAME(fresh, added, n);
    moe_tape_free(t);
    free(memory), free(params), free(added), free(x), free(y), free(router);
}

/* Robust weights of what capacity leaves: of nothing none, of one output all of it. */
static void test_robust_dropped(void) {
    enum { T = 24 };
    float x[T * 4], y[T * 4];
    size_t left[3] = {0, 0, 0};
    double norm = 0;
    moe_layer *m = layer_of("combine=robust capacity_factor=0.5");
    test_fill(x, T * 4, 0.5f, 1.5f);
    CHECK_OK(moe_forward(m, x, T, y));
    const moe_tape *t = moe_layer_tape(m);
    for (size_t token = 0; token < T; token++) {
        size_t n = 0;
        float most = 0;
        for (size_t s = 0; s < 2; s++) n += t->routes.slot[token * 2 + s] != MOE_NONE;
        for (size_t i = 0; i < 4; i++) most = fmaxf(most, fabsf(y[token * 4 + i]));
        CHECK((most > 0) == (n > 0));
        left[n]++;
    }
    CHECK(left[0] > 0 && left[1] > 0 && left[2] > 0);
    CHECK_OK(moe_backward(m, x, y));
    CHECK_OK(moe_layer_grad_norm(m, &norm));
    CHECK(norm > 0 && norm < 1e6);
    moe_layer_free(m);
}

/* Scores by the experts' own matrices: of a token that is nothing none, without their gradient, without a backward. */
static void test_subspace_in_part(void) {
    enum { T = 5 };
    float x[T * 4], dx[2][T * 4], d_weight[T * 2], scores[2][T * 4];
    moe_desc d = small_desc();
    moe_tape *t = NULL;
    size_t n = 0;
    d.d_ff = 2, d.n_experts = 4;
    CHECK_OK(moe_desc_parse(&d, "score=subspace expert=orthonormal", NULL));
    CHECK_OK(moe_experts_count(&d, &n));
    float *params = test_floats(n), *grads = test_floats(n);
    test_fill(x, T * 4, -1, 1), test_fill(d_weight, T * 2, -1, 1), test_fill(params, n, -1, 1);
    for (size_t i = 0; i < 4; i++) x[4 + i] = 0;
    for (int part = 0; part < 2; part++) {
        CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON));
        t->side.experts = params, t->side.d_experts = part ? grads : NULL;
        CHECK_OK(moe_route(t, NULL, x, T));
        for (size_t e = 0; e < 4; e++) CHECK(t->logits[4 + e] == 0);
        memset(dx[part], 0, sizeof dx[part]);
        CHECK_OK(moe_route_backward(t, NULL, d_weight, NULL, dx[part]));
        memcpy(scores[0], t->scores, sizeof scores[0]);
        moe_tape_free(t);
    }
    CHECK_SAME(dx[0], dx[1], T * 4);
    CHECK(dx[0][0] != 0 && dx[0][4] == 0);
    CHECK_OK(moe_tape_new(&t, &d, T, MOE_OFF));
    t->side.experts = params;
    CHECK_OK(moe_route(t, NULL, x, T));
    memcpy(scores[1], t->scores, sizeof scores[1]);
    CHECK_SAME(scores[0], scores[1], T * 4);
    moe_tape_free(t);
    free(params), free(grads);
}
static void test_sizes_of_arrays(void) {
    float a[4] = {0};
    int32_t index[4];
    size_t bytes = 0;
    CHECK_STATUS(moe_sinkhorn_scratch(3, 0, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_topk(SIZE_MAX / 8, 4, 1, a, index, NULL), MOE_E_OVERFLOW);
    if (sizeof(size_t) < 8) return;
    CHECK_STATUS(moe_sinkhorn_scratch(3, SIZE_MAX / 8, &bytes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_topk(1, SIZE_MAX / 8, 1, a, index, NULL), MOE_E_N_EXPERTS);
}

int main(void) {
    RUN(test_names);
    RUN(test_overflows);
    RUN(test_array_functions);
    RUN(test_routes_and_health);
    RUN(test_level_two);
    RUN(test_layer_functions);
    RUN(test_given_in_part);
    RUN(test_worth_in_part);
    RUN(test_large_gradients);
    RUN(test_robust_dropped);
    RUN(test_subspace_in_part);
    RUN(test_sizes_of_arrays);
    return test_end();
}
