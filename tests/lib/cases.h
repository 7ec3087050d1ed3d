/* cases.h - layers trained for a few steps on data of the library's own generator, reduced to one hash: for
 * contract/bits.c (equal in every run) and contract/golden.c (equal to what is written in contract/golden/golden.txt).
 */
#ifndef CASES_H
#define CASES_H

typedef struct layer_case {
    const char *name;
    size_t d_model, d_ff, n_experts, top_k, n_shared, n_tokens;
    moe_expert_kind expert;
    moe_gate_kind gate;
    moe_order_kind order;
    moe_optimizer_kind optimizer;
    int normalize, bias;
    float temperature, capacity_factor, loss_switch, loss_z, clip_norm;
} layer_case;

static const layer_case layer_cases[] = {
    {"relu", 16, 32, 4, 2, 0, 40,
     MOE_EXPERT_RELU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_ON, 0, 0, 0.01f, 0, 0},
    {"gelu", 24, 40, 5, 2, 1, 33,
     MOE_EXPERT_GELU, MOE_GATE_SOFTMAX_SELECTED, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_ON, 0.5f, 0, 0, 0.01f, 1},
    {"silu", 33, 47, 3, 1, 0, 50,
     MOE_EXPERT_SILU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_SGD, 0, MOE_OFF, 2, 0, 0.1f, 0.1f, 0.5f},
    {"swiglu", 32, 48, 8, 2, 0, 64,
     MOE_EXPERT_SWIGLU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_OFF, 0, 0, 0.01f, 0.001f, 1},
    {"geglu", 17, 31, 6, 3, 2, 45,
     MOE_EXPERT_GEGLU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_SGD, MOE_OFF, MOE_ON, 0, 0, 0.01f, 0, 0},
    {"capacity-token", 20, 30, 4, 2, 0, 60,
     MOE_EXPERT_SWIGLU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_OFF, 0, 0.5f, 0.01f, 0, 0},
    {"capacity-choice", 20, 30, 4, 2, 0, 60,
     MOE_EXPERT_RELU, MOE_GATE_SOFTMAX, MOE_ORDER_CHOICE, MOE_OPTIMIZER_ADAMW, 0, MOE_OFF, 0, 1, 0, 0, 0},
    {"capacity-weight", 20, 30, 4, 2, 0, 60,
     MOE_EXPERT_GELU, MOE_GATE_SOFTMAX, MOE_ORDER_WEIGHT, MOE_OPTIMIZER_ADAMW, 0, MOE_ON, 0, 0.75f, 0, 0, 0},
    {"one-token", 65, 129, 9, 4, 1, 1,
     MOE_EXPERT_SWIGLU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_ON, 0, 0, 0.01f, 0, 0},
    {"one-expert", 7, 5, 1, 1, 0, 19,
     MOE_EXPERT_SILU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_OFF, 0, 0, 0, 0.01f, 0},
    {"all-experts", 12, 20, 16, 16, 0, 9,
     MOE_EXPERT_GEGLU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_OFF, 0, 0, 0, 0, 0},
    {"width-one", 1, 1, 3, 2, 0, 11,
     MOE_EXPERT_SWIGLU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_ADAMW, 0, MOE_ON, 0, 0, 0, 0, 0},
    {"many-experts", 16, 16, 130, 3, 0, 70,
     MOE_EXPERT_RELU, MOE_GATE_SOFTMAX, MOE_ORDER_TOKEN, MOE_OPTIMIZER_SGD, 0, MOE_OFF, 0, 0, 0.01f, 0, 1}};
enum { LAYER_CASES = sizeof layer_cases / sizeof *layer_cases };

static inline moe_desc case_desc(const layer_case *c, const moe_parallel *parallel) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = c->d_model, d.d_ff = c->d_ff, d.n_experts = c->n_experts, d.top_k = c->top_k, d.n_shared = c->n_shared;
    d.expert = c->expert, d.gate = c->gate, d.capacity_order = c->order, d.optimizer = c->optimizer;
    d.normalize = c->normalize, d.bias = c->bias, d.temperature = c->temperature,
    d.capacity_factor = c->capacity_factor;
    d.loss[MOE_LOSS_SWITCH] = c->loss_switch, d.loss[MOE_LOSS_Z] = c->loss_z, d.clip_norm = c->clip_norm;
    d.seed = 42;
    if (parallel) d.parallel = *parallel;
    return d;
}

enum { HASH_START, HASH_Y, HASH_DX, HASH_GRADS, HASH_END, HASHES };

/* hash: of the first parameters; of all outputs; of all input gradients; of all gradients; of the last parameters
 * and moments. y: the first four outputs of the last step, for people to look at. Returns whether all went well. */
static inline int run_layer_case(const layer_case *c, const moe_parallel *parallel, int steps, uint64_t hash[HASHES],
                                 float y4[4]) {
    moe_desc d = case_desc(c, parallel);
    moe_layer *m = NULL;
    size_t n = c->n_tokens * c->d_model;
    for (int i = 0; i < HASHES; i++) hash[i] = 0;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return 0;
    float *x = test_floats(n), *y = test_floats(n), *dy = test_floats(n), *dx = test_floats(n);
    int ok = 1;
    hash[HASH_START] = moe_layer_hash(m);
    for (int step = 0; step < steps && ok; step++) {
        ok &= CHECK_OK(moe_rand_normal(1, (uint64_t)step, n, 0, 1, x));
        ok &= CHECK_OK(moe_rand_uniform(2, (uint64_t)step, n, -1, 1, dy));
        ok &= CHECK_OK(moe_forward(m, x, c->n_tokens, y));
        ok &= CHECK_OK(moe_backward(m, dy, dx));
        hash[HASH_Y] = moe_hash(hash[HASH_Y], y, n * sizeof *y);
        hash[HASH_DX] = moe_hash(hash[HASH_DX], dx, n * sizeof *dx);
        for (size_t i = 0; i < moe_layer_tensors(m); i++)
            for (int last = step == steps - 1, part = MOE_PART_GRADS;
                 part <= (last ? MOE_PART_MOMENT2 : MOE_PART_GRADS); part++) {
                if (part == MOE_PART_MOMENT2 && d.optimizer == MOE_OPTIMIZER_SGD) continue;
                moe_tensor t;
                ok &= CHECK_OK(moe_layer_tensor(m, i, &t));
                float *v = test_floats(t.count);
                ok &= CHECK_OK(moe_layer_get(m, (moe_part_kind)part, t.name, v, t.count));
                int to = part == MOE_PART_GRADS ? HASH_GRADS : HASH_END;
                hash[to] = moe_hash(hash[to], v, t.count * sizeof *v);
                free(v);
            }
        ok &= CHECK_OK(moe_step(m, 0.01f));
    }
    hash[HASH_END] ^= moe_layer_hash(m);
    for (size_t i = 0; i < 4; i++) y4[i] = i < n ? y[i] : 0;
    free(x), free(y), free(dy), free(dx);
    moe_layer_free(m);
    return ok;
}

#endif
