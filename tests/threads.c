/* Every task once, on as many workers as were asked for; and all of a layer on a small stack. */
#ifndef _WIN32
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#endif
#include "test.h"
#include "cases.h"

/* ---- ways to run tasks ---- */
static void run_reversed(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg) {
    (void)user;
    for (size_t i = n_tasks; i-- > 0;) task(arg, i, i % n_threads);
}

/* moe_run calls each task once, with workers below moe_workers. */
static size_t ran[1000];
static size_t worst_worker;

static void count_task(void *arg, size_t i, size_t worker) {
    ((size_t *)arg)[i]++;
    if (worker > worst_worker) worst_worker = worker; /* a race could only hide a fault, not make one */
}

static void test_run_and_workers(void) {
    moe_parallel p = {0};
    CHECK(moe_workers(NULL) >= 1);
    for (p.n_threads = 0; p.n_threads < 5; p.n_threads++) {
        memset(ran, 0, sizeof ran), worst_worker = 0;
        moe_run(&p, 999, count_task, ran);
        for (size_t i = 0; i < 1000; i++) CHECK(ran[i] == (i < 999));
        CHECK(worst_worker < moe_workers(&p));
        if (p.n_threads == 1) CHECK(moe_workers(&p) == 1);
    }
    moe_run(&p, 0, count_task, NULL);
    moe_run(NULL, 3, count_task, ran);
    CHECK(ran[2] == 2 && ran[3] == 1);
    p.run = run_reversed, p.n_threads = 0; /* with a runner of one's own, 0 means 1 */
    CHECK(moe_workers(&p) == 1);
    moe_run(&p, 10, count_task, ran);
    CHECK(ran[9] == 2);
    p.n_threads = 7;
    CHECK(moe_workers(&p) == 7);
}

#ifndef _WIN32
/* A thread of 64 KB (a sanitizer's frames need more): a layer that is made, trained, quantised and run. */
static void *whole_layer(void *arg) {
    enum { T = 300, D = 40 };
    static float x[T * D], y[T * D], dy[T * D];
    moe_layer *m = NULL, *small = NULL;
    moe_desc d = {0};
    moe_layer_formats formats = {.format = MOE_FORMAT_INT8};
    d.d_model = D, d.d_ff = 72, d.n_experts = 64, d.top_k = 4;
    d.parallel.n_threads = 1;
    d.loss[MOE_LOSS_SWITCH] = 0.01f;
    d.loss[MOE_LOSS_PROTOTYPE_ORTHOGONALITY] = 0.01f;
    moe_rand_uniform(1, 0, T * D, -1, 1, x);
    moe_rand_uniform(1, 1, T * D, -1, 1, dy);
    moe_status s = moe_layer_new(&m, &d);
    if (!s) s = moe_forward(m, x, T, y);
    if (!s) s = moe_backward(m, dy, NULL);
    if (!s) s = moe_step(m, 1e-3f);
    if (!s) s = moe_layer_quantize(m, &formats, &small);
    if (!s) s = moe_forward(small, x, T, y);
    moe_layer_free(small);
    moe_layer_free(m);
    *(moe_status *)arg = s;
    return NULL;
}
static void test_small_stack(void) {
    pthread_attr_t attributes;
    pthread_t thread;
    moe_status s = MOE_STATUS_COUNT;
    CHECK(!pthread_attr_init(&attributes));
    CHECK(!pthread_attr_setstacksize(&attributes, TEST_SANITIZED ? 1 << 18 : 1 << 16));
    if (CHECK(!pthread_create(&thread, &attributes, whole_layer, &s))) CHECK(!pthread_join(thread, NULL));
    CHECK_OK(s);
    pthread_attr_destroy(&attributes);
}
#endif

int main(void) {
    RUN(test_run_and_workers);
#ifndef _WIN32
    RUN(test_small_stack);
#endif
    return test_end();
}
