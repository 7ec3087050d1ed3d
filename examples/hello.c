// hello.c - four experts learn to copy the tokens that begin with a positive number and to negate the others.
#include <stdio.h>

#define MOE_IMPLEMENTATION
#include "moe.h"

int main(void) {
    enum { N = 256, D = 8 };
    static float x[N * D], y[N * D], dy[N * D]; // (N, D)
    moe_desc d = {.d_model = D, .n_experts = 4, .loss = {[MOE_LOSS_SWITCH] = 0.01f}}; // 0 = documented default
    moe_layer *m = NULL;
    moe_status s = moe_layer_new(&m, &d);
    for (unsigned step = 0; step < 500 && !s; step++) {
        moe_rand_uniform(1, step, N * D, -1, 1, x);
        s = moe_forward(m, x, N, y);
        for (int i = 0; i < N * D; i++) // the gradient of the mean squared error
            dy[i] = 2 * (y[i] - (x[i / D * D] > 0 ? x[i] : -x[i])) / (N * D);
        if (!s) s = moe_backward(m, dy, NULL); // gradients of the task and of the balance loss
        if (!s) s = moe_step(m, 1e-2f);
    }
    double error = moe_sum_squares(NULL, N * D, dy) * N * D / 4;
    moe_health h = {0};
    if (!s) s = moe_layer_health(m, &h);
    printf("error %.4f  entropy %.2f  load cv %.2f  dead experts %zu\n", error, h.entropy, h.load_cv, h.n_dead);
    moe_layer_free(m);
    return s != MOE_OK;
}
