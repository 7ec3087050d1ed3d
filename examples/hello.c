// hello.c - level 3, the layer: four experts learn to copy the tokens that begin with a positive number and to negate
// the others.
#include <stdio.h>

#define MOE_IMPLEMENTATION
#include "moe.h"

int main(void) {
    enum { N = 256, D = 8 };
    static float x[N * D], y[N * D], dy[N * D]; // (N, D)
    moe_desc desc = {.d_model = D, .n_experts = 4, .loss = {[MOE_LOSS_SWITCH] = 0.01f}}; // 0 = documented default
    moe_layer *layer = NULL;
    moe_status status = moe_layer_new(&layer, &desc);
    for (unsigned step = 0; step < 500 && !status; step++) {
        moe_rand_uniform(1, step, N * D, -1, 1, x);
        status = moe_forward(layer, x, N, y);
        for (int i = 0; i < N * D; i++) { // the gradient of the mean squared error
            float want = x[i / D * D] > 0 ? x[i] : -x[i];
            dy[i] = 2 * (y[i] - want) / (N * D);
        }
        if (!status) status = moe_backward(layer, dy, NULL); // gradients of the task and of the balance loss
        if (!status) status = moe_step(layer, 1e-2f);
    }
    double error = moe_sum_squares(NULL, N * D, dy) * N * D / 4;
    moe_health health = {0};
    if (!status) status = moe_layer_health(layer, &health);
    char why[300];
    if (status) moe_desc_explain(status, &desc, NULL, why, sizeof why), puts(why);
    printf("error %.4f  entropy %.2f  load cv %.2f  dead experts %zu\n", error, health.entropy, health.load_cv,
           health.n_dead);
    moe_layer_free(layer);
    return status != MOE_OK;
}
