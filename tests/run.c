/* What one forward carries: its bodies run once for every block and item, its random numbers depend on their
 * place alone. */
#ifndef _WIN32
#define _POSIX_C_SOURCE 200809L
#include <time.h>
#endif
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"
#ifndef _WIN32
#include "pool.h"
#endif

enum { MOST = 300 };
static size_t seen[MOST];

static void count_tokens(const moe__run *run, size_t t0, size_t t1) {
    if (t0 < t1 && t1 <= run->tape->n_tokens)
        for (size_t t = t0; t < t1; t++) seen[t]++;
}
static void count_item(const moe__run *run, size_t i) {
    if (run->tape && i < MOST) seen[i]++;
}

static void test_bodies(void) {
    for (size_t threads = 1; threads < 4; threads++) {
        moe_desc desc;
        moe_tape *tape = NULL;
        moe__run run;
        memset(&desc, 0, sizeof desc);
        desc.d_model = 64, desc.n_experts = 4, desc.parallel.n_threads = threads;
        if (!CHECK_OK(moe_tape_new(&tape, &desc, MOST, MOE_ON))) return;
        CHECK_OK(moe__pass_run(&run, &tape->memory->plan, tape));
        for (size_t n = 0; n <= MOST; n += n < 3 || n > 60 ? 1 + n / 5 : 1) {
            tape->n_tokens = n;
            memset(seen, 0, sizeof seen);
            moe__run_over_blocks(&run, count_tokens);
            for (size_t t = 0; t < MOST; t++) CHECK(seen[t] == (t < n));
            memset(seen, 0, sizeof seen);
            moe__run_over(&run, n, n % 2 ? 1 : (size_t)1 << 20, count_item); /* little work, and much */
            for (size_t i = 0; i < MOST; i++) CHECK(seen[i] == (i < n));
        }
        moe_tape_free(tape);
    }
    CHECK(test_live_blocks == 0);
}

static void test_random_numbers(void) {
    moe_desc desc;
    moe_tape *tape = NULL;
    moe__run run;
    float all[200], part[200], other[200];
    memset(&desc, 0, sizeof desc);
    desc.d_model = 8;
    if (!CHECK_OK(moe_tape_new(&tape, &desc, 4, MOE_ON))) return;
    CHECK_OK(moe__pass_run(&run, &tape->memory->plan, tape));
    tape->memory->now.draw = 3;
    moe__run_uniforms(&run, MOE__USE_NOISE, 0, 200, -1, 1, all);
    for (size_t at = 0; at < 200; at += 37) { /* any piece of the stream */
        size_t n = at + 37 > 200 ? 200 - at : 37;
        moe__run_uniforms(&run, MOE__USE_NOISE, at, n, -1, 1, part);
        CHECK_SAME(part, all + at, n);
    }
    moe__run_uniforms(&run, MOE__USE_JITTER, 0, 200, -1, 1, other); /* each use has its own */
    size_t same = 0;
    for (size_t i = 0; i < 200; i++) same += other[i] == all[i];
    CHECK(same < 3);
    tape->memory->now.draw = 4; /* and each forward */
    moe__run_uniforms(&run, MOE__USE_NOISE, 0, 200, -1, 1, other);
    for (size_t i = same = 0; i < 200; i++) same += other[i] == all[i];
    CHECK(same < 3);
    moe_tape_free(tape);
}

/* ---- steps in one region: each begins when the one before has ended, whoever runs them ---- */
enum { N_STEPS = 5 };
static const size_t step_tasks[N_STEPS] = {1, 37, 0, 64, 5};
static unsigned char step_ran[N_STEPS][64];
static int step_early;
typedef struct step_number { int number; } step_number;
static void step_task(void *arg, size_t i, size_t worker) {
    int number = ((const step_number *)arg)->number;
    (void)worker;
    for (int before = 0; before < number; before++)
        for (size_t task = 0; task < step_tasks[before]; task++) step_early |= step_ran[before][task] != 1;
#ifndef _WIN32
    struct timespec little = {0, 300000};
    if (i + 1 == step_tasks[number]) nanosleep(&little, NULL); /* the others are at the step's end long before */
#endif
    step_ran[number][i]++;
}
static size_t n_regions;
static void run_backwards(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg) {
    (void)user;
    n_regions++;
    for (size_t i = n_tasks; i-- > 0;) task(arg, i, i % n_threads);
}
static void test_steps(void) {
    step_number number[N_STEPS];
    moe__threads_step step[N_STEPS];
#ifndef _WIN32
    pool together;
    pool_start(&together, 8);
#endif
    for (size_t threads = 1; threads < 9; threads++)
        for (int way = 0; way < 3; way++) {
            moe_parallel parallel = {NULL, NULL, threads};
            if (way == 1) parallel.run = run_backwards;
#ifndef _WIN32
            if (way == 2) parallel = pool_parallel(&together), parallel.n_threads = threads;
#endif
            memset(step_ran, 0, sizeof step_ran);
            for (int i = 0; i < N_STEPS; i++) {
                number[i].number = i;
                moe__threads_step one = {step_task, &number[i], step_tasks[i], 0, 0};
                step[i] = one;
            }
            moe__threads_steps(&parallel, step, N_STEPS);
            CHECK(!step_early);
            for (int i = 0; i < N_STEPS; i++)
                for (size_t task = 0; task < 64; task++) CHECK(step_ran[i][task] == (task < step_tasks[i]));
        }
#ifndef _WIN32
    pool_stop(&together);
#endif
}
/* More steps than a list has room for, collected: they run in their order all the same. */
static size_t order[3 * MOE__STEPS], n_order;
static void note_item(const moe__run *run, size_t i) {
    if (!i && n_order < 3 * MOE__STEPS) order[n_order++] = run->n_away;
}
static void test_collected(void) {
    moe_desc desc;
    moe_tape *tape = NULL;
    moe__run run[2 * MOE__STEPS + 1];
    memset(&desc, 0, sizeof desc);
    desc.d_model = 8, desc.parallel.n_threads = 3;
    if (!CHECK_OK(moe_tape_new(&tape, &desc, 4, MOE_ON))) return;
    for (size_t i = 0; i < sizeof run / sizeof *run; i++) {
        CHECK_OK(moe__pass_run(&run[i], &tape->memory->plan, tape));
        if (!i) moe__run_collect(run);
        run[i].n_away = i;
        moe__run_over(&run[i], 5, 1 << 20, note_item);
    }
    CHECK(n_order == 2 * MOE__STEPS);
    moe__run_flush(run);
    CHECK(n_order == 2 * MOE__STEPS + 1);
    for (size_t i = 0; i < n_order; i++) CHECK(order[i] == i);
    moe_tape_free(tape);
}
/* Regions that a caller's threads see: a forward is router and experts, a backward experts, gate and score. */
static void test_regions(void) {
    enum { T = 300, D = 32 };
    static float x[T * D], y[T * D];
    static const struct { const char *set; size_t forward, backward; } cases[] = {
        {"top_k=2", 2, 3}, {"top_k=2 expert=swiglu n_shared=1", 2, 3}, {"top_k=2 bias=true gate=sigmoid", 2, 3},
        {"top_k=1", 2, 3}, {"n_experts=64 top_k=8 capacity_factor=1", 2, 3},
    };
    moe_rand_uniform(1, 0, T * D, -1, 1, x);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe_desc desc;
        moe_layer *layer = NULL;
        memset(&desc, 0, sizeof desc);
        CHECK_OK(moe_desc_parse(&desc, cases[i].set, NULL));
        desc.d_model = D, desc.parallel.run = run_backwards, desc.parallel.n_threads = 4;
        if (!CHECK_OK(moe_layer_new(&layer, &desc))) return;
        for (int step = 0; step < 2; step++) {
            n_regions = 0;
            CHECK_OK(moe_forward(layer, x, T, y));
            CHECK(n_regions <= cases[i].forward);
            n_regions = 0;
            CHECK_OK(moe_backward(layer, y, x));
            CHECK(n_regions <= cases[i].backward);
        }
        moe_layer_free(layer);
    }
}

int main(void) {
    RUN(test_bodies);
    RUN(test_random_numbers);
    RUN(test_steps);
    RUN(test_collected);
    RUN(test_regions);
    return test_end();
}
