// arrays.c - level 1, plain arrays: route a batch by hand, price its imbalance, and read its health. No layer, no tape,
// nothing is allocated behind your back.
#include <stdio.h>

#define MOE_IMPLEMENTATION
#include "moe.h"

enum { T = 256, E = 8, K = 2 }; // tokens, experts, experts a token

int main(void) {
    static float logits[T * E], prob[T * E], weight[T * K], d_logits[T * E];
    static int32_t index[T * K];
    static unsigned char memory[1 << 16];
    moe_rand_normal(1, 0, T * E, 0, 1, logits);
    for (int t = 0; t < T; t++) logits[t * E] += 1; // everybody likes expert 0
    moe_status status = moe_softmax(T, E, 1, logits, prob);
    if (!status) status = moe_topk(T, E, K, prob, index, weight);

    moe_routes routes; // who goes where: the tokens of each expert
    size_t bytes = 0;
    if (!status) status = moe_routes_size(T, E, K, &bytes);
    if (!status) status = moe_routes_init(&routes, T, E, K, memory, bytes);
    if (!status) status = moe_routes_fill(&routes, T, index, weight, 0, MOE_ORDER_TOKEN);

    double loss = 0; // the Switch loss, and its gradient by the logits
    moe_loss_args args = {.n_tokens = T, .n_experts = E, .prob = prob, .load = routes.load, .d_logits = d_logits};
    if (!status) status = moe_loss(MOE_LOSS_SWITCH, &args, 0.01f, &loss);

    moe_health health;
    if (!status) status = moe_health_init(&health, E, memory + bytes, sizeof memory - bytes);
    if (!status) status = moe_health_add(&health, &routes, prob);
    if (!status) status = moe_health_update(&health);
    if (status) {
        puts(moe_status_string(status));
        return 1;
    }
    for (int e = 0; e < E; e++) printf("expert %d: %3u tokens\n", e, (unsigned)routes.load[e]);
    printf("switch loss %.3f (1 = even)  MaxVio %.2f  load cv %.2f  effective experts %.1f\n", loss, health.maxvio,
           health.load_cv, health.effective_experts);
    return 0;
}
