// route.c - level 2, routes and tape: your own weights, somebody else's top-k. A program that has its parameters in
// plain arrays and the choice of experts from elsewhere (another router, a dump) runs only the experts, forward and
// backward.
#include <stdio.h>
#include <stdlib.h>

#define MOE_IMPLEMENTATION
#include "moe.h"

enum { T = 6, D = 4, F = 3, E = 4, K = 2 }; // tokens, their width, hidden width, experts, experts a token

// Expert e of plain arrays: gate, up (D, F) and down (F, D), as most checkpoints have them after a transpose.
static moe_status pack(const moe_desc *desc, float *params) {
    moe_status status = MOE_OK;
    for (size_t e = 0; e < E && !status; e++) {
        float gate[D * F], up[D * F], down[F * D];
        moe_rand_uniform(1, 3 * e, D * F, -1, 1, gate);
        moe_rand_uniform(1, 3 * e + 1, D * F, -1, 1, up);
        moe_rand_uniform(1, 3 * e + 2, F * D, -1, 1, down);
        moe_expert_weights weights = {.w1 = gate, .wu = up, .w2 = down};
        status = moe_expert_pack(desc, e, &weights, params);
    }
    return status;
}

int main(void) {
    static const int32_t index[T * K] = {0, 1, 1, 2, 3, 0, 2, 1, 0, 3, 2, 3}; // (T, K): the choices, best first
    static const float weight[T * K] = {.7f, .3f, .6f, .4f, .9f, .1f, .5f, .5f, .8f, .2f, .6f, .4f};
    float x[T * D], y[T * D], dy[T * D], dx[T * D] = {0}, d_weight[T * K];
    moe_desc desc = {.d_model = D, .d_ff = F, .n_experts = E, .top_k = K, .expert = MOE_EXPERT_SWIGLU};
    moe_tape *tape = NULL;
    size_t n_params = 0;
    moe_status status = moe_experts_count(&desc, &n_params);
    float *params = calloc(n_params, sizeof *params), *d_params = calloc(n_params, sizeof *d_params);
    if (!status && (!params || !d_params)) status = MOE_E_NO_MEMORY;
    if (!status) status = pack(&desc, params);
    if (!status) status = moe_tape_new(&tape, &desc, T, MOE_ON);
    moe_rand_uniform(2, 0, T * D, -1, 1, x);
    moe_rand_uniform(2, 1, T * D, -1, 1, dy);
    if (!status) status = moe_tape_tokens(tape, x, T);
    if (!status) status = moe_routes_fill(&tape->routes, T, index, weight, 0, MOE_ORDER_TOKEN); // 0: no capacity
    if (!status) status = moe_experts_forward(tape, params, y);
    if (!status) status = moe_experts_backward(tape, params, dy, 1, d_params, d_weight, dx);
    char why[300];
    if (status) moe_desc_explain(status, &desc, NULL, why, sizeof why), puts(why);
    for (size_t e = 0; e < E && !status; e++)
        printf("expert %zu: %u tokens\n", e, tape->routes.begin[e + 1] - tape->routes.begin[e]);
    for (size_t t = 0; t < T && !status; t++)
        printf("token %zu: y %6.3f %6.3f %6.3f %6.3f   dx %6.3f %6.3f %6.3f %6.3f\n", t, y[t * D], y[t * D + 1],
               y[t * D + 2], y[t * D + 3], dx[t * D], dx[t * D + 1], dx[t * D + 2], dx[t * D + 3]);
    moe_tape_free(tape);
    free(params);
    free(d_params);
    return status != MOE_OK;
}
