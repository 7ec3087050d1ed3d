/* Every task once, on as many workers as were asked for. */
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

int main(void) {
    RUN(test_run_and_workers);
    return test_end();
}
