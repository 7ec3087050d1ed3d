// hello.c - trains a Mixture-of-Experts layer of four experts to copy half of the numbers and negate the others.
#include <stdio.h>

#define MOE_IMPLEMENTATION
#include "moe.h"

int main(void) {
    enum { N = 256, D = 8 };
    static float x[N * D], y[N * D], dy[N * D];
    moe_desc d = {.d_model = D, .n_experts = 4, .loss = {[MOE_LOSS_SWITCH] = 0.01f}}; // 0 = documented default
    moe_layer *m = NULL;
    moe_status s = moe_layer_new(&m, &d);
    for (unsigned step = 0; step < 500 && !s; step++) {
        double loss = 0;
        moe_rand_uniform(1, step, N * D, -1, 1, x);
        if (!s) s = moe_forward(m, x, N, y);
        for (int i = 0; i < N * D; i++) {
            float error = y[i] - (x[i / D * D] > 0 ? x[i] : -x[i]); // the first number of a token decides
            loss += (double)(error * error) / (N * D);
            dy[i] = 2 * error / (N * D);
        }
        if (!s) s = moe_backward(m, dy, NULL); // the gradients of the task and of the balance loss
        if (!s) s = moe_step(m, 1e-2f);
        if (step % 100 == 99) printf("step %3u  loss %.4f\n", step + 1, loss);
    }
    moe_health h = {0};
    if (!s) s = moe_layer_health(m, &h);
    printf("entropy %.2f  load cv %.2f  dead experts %zu  (%s)\n", h.entropy, h.load_cv, h.n_dead,
           moe_status_string(s));
    moe_layer_free(m);
    return s != MOE_OK;
}
