/* What does a step cost that few experts are used in? One token, two of 64 experts: forward, backward and step of a
 * layer with desc.sparse_step, and without it, where momentum and decay move all experts: in turns, medians, the bytes
 * of the experts that a step goes over, and the share of the read bandwidth that these make. --quick: a small layer. */
#include "common.h"

enum { EXPERTS = 64, USED = 2, ROUNDS = 9, D_MOST = 1024 };
static float x[D_MOST], y[D_MOST];

static double time_step(moe_layer *layer, double *backward) {
    bench_ok(moe_forward(layer, x, 1, y), "moe_forward");
    double begin = bench_now();
    bench_ok(moe_backward(layer, y, NULL), "moe_backward");
    double middle = bench_now();
    bench_ok(moe_step(layer, 1e-4f), "moe_step");
    *backward = middle - begin;
    return bench_now() - middle;
}

int main(int argc, char **argv) {
    static const char *const names[] = {"all experts", "sparse"};
    int quick = argc > 1 && !strcmp(argv[1], "--quick");
    double step[2][ROUNDS], backward[2][ROUNDS];
    moe_layer *layer[2] = {NULL, NULL};
    moe_desc d;
    if (argc > 1 + quick) return fprintf(stderr, "bench_step [--quick]\n"), 2;
    memset(&d, 0, sizeof d);
    d.d_model = quick ? 256 : D_MOST, d.d_ff = quick ? 128 : 512, d.n_experts = EXPERTS, d.top_k = USED;
    for (int sparse = 0; sparse < 2; sparse++) {
        d.sparse_step = sparse ? MOE_ON : MOE_OFF;
        bench_ok(moe_layer_new(&layer[sparse], &d), "moe_layer_new");
    }
    for (int round = -1; round < ROUNDS; round++) { /* the first touches all memory */
        double first;
        bench_ok(moe_rand_normal(1, (uint64_t)(round + 1), d.d_model, 0, 1, x), "moe_rand_normal");
        for (int sparse = 0; sparse < 2; sparse++) {
            double seconds = time_step(layer[sparse], &first);
            if (round >= 0) step[sparse][round] = seconds, backward[sparse][round] = first;
        }
    }
    double read = bench_read(), expert = 4.0 * (double)(moe_layer_params(layer[0]) / EXPERTS);
    printf("a layer of %d experts, %d used, %.1f MB an expert; reads %.1f GB/s\n", EXPERTS, USED, 1e-6 * expert,
           1e-9 * read);
    puts("               backward ms  step ms  step goes over MB  of the read bandwidth");
    for (int sparse = 0; sparse < 2; sparse++) {
        double seconds = bench_median(step[sparse], ROUNDS), bytes = expert * (sparse ? USED : EXPERTS) * 5;
        printf("%-12s %11.3f %10.3f %16.1f %17.1f%%\n", names[sparse], 1e3 * bench_median(backward[sparse], ROUNDS),
               1e3 * seconds, 1e-6 * bytes, 100 * bytes / seconds / read); /* the norm, and four arrays */
    }
    printf("sparse: %.1f times faster\n", bench_median(step[0], ROUNDS) / bench_median(step[1], ROUNDS));
    for (int sparse = 0; sparse < 2; sparse++) moe_layer_free(layer[sparse]);
    return 0;
}
