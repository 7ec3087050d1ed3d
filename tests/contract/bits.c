/* The contract of the same bits: five training steps give one result for every instruction set, every number of
 * threads and every order in which the tasks may run. (Across compilers and processors: golden.c.) */
#include "test.h"
#include "cases.h"
#include "pool.h"

/* ---- ways to run tasks ---- */
static void run_reversed(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg) {
    (void)user;
    for (size_t i = n_tasks; i-- > 0;) task(arg, i, i % n_threads);
}

typedef struct crew { size_t worker, n_threads, n_tasks, stride, offset; moe_task *task; void *arg; } crew;

static void *crew_work(void *p) { /* a worker's share, in a scattered order */
    crew *c = (crew *)p;
    for (size_t i = c->worker; i < c->n_tasks; i += c->n_threads)
        c->task(c->arg, (i * c->stride + c->offset) % c->n_tasks, c->worker);
    return NULL;
}

static size_t common_divisor(size_t a, size_t b) { return b ? common_divisor(b, a % b) : a; }

static void run_on_threads(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg) {
    enum { MOST = 8 };
    pthread_t thread[MOST];
    crew c[MOST] = {{0, 1, 0, 0, 0, NULL, NULL}};
    size_t n = n_threads < MOST ? n_threads : MOST, stride = n_tasks / 2 + 1;
    ++*(size_t *)user;
    if (n_tasks == 0) return;
    if (n > n_tasks) n = n_tasks;
    while (common_divisor(stride, n_tasks) != 1) stride++;
    for (size_t w = 0; w < n; w++) {
        crew one = {w, n, n_tasks, stride, *(size_t *)user, task, arg};
        c[w] = one;
        if (w > 0 && pthread_create(&thread[w], NULL, crew_work, &c[w]) != 0) abort();
    }
    crew_work(&c[0]);
    for (size_t w = 1; w < n; w++) pthread_join(thread[w], NULL);
}

/* On 32 threads that wait for work: the first `steps` steps give the same as on one. */
static void check_many_threads(const layer_case *c, int steps) {
    uint64_t one[HASHES], many[HASHES];
    float y[4];
    pool p;
    const moe_parallel alone = {NULL, NULL, 1};
    pool_start(&p, POOL_MOST);
    moe_parallel parallel = pool_parallel(&p);
    run_layer_case(c, &alone, steps, one, y);
    run_layer_case(c, &parallel, steps, many, y);
    for (int i = 0; i < HASHES; i++)
        if (!CHECK(one[i] == many[i])) printf("        case %s, 32 threads, hash %d\n", c->name, i);
    CHECK(p.calls > 0);
    pool_stop(&p);
}

static void check_everywhere(const layer_case *c, int steps) {
    uint64_t first[HASHES], hash[HASHES];
    float y[4];
    size_t calls = 0;
    moe_parallel way[6];
    memset(way, 0, sizeof way);
    for (size_t i = 0; i < 3; i++) way[i].n_threads = i + 1; /* OpenMP, or one after the other */
    way[3].run = run_reversed, way[3].n_threads = 4;
    way[4].run = run_on_threads, way[4].user = &calls, way[4].n_threads = 2;
    way[5].run = run_on_threads, way[5].user = &calls, way[5].n_threads = 5;
    int begun = 0;
    moe_isa_kind best = (moe_force_isa(MOE_ISA_AUTO), moe_active_isa());
    FOR_EACH_ISA(isa) {
        for (size_t w = 0; w < 6; w++) {
            /* slow: not every way */
            if (isa == MOE_ISA_SCALAR && best != isa && w != 0 && (w != 5 || TEST_SANITIZED)) continue;
            run_layer_case(c, &way[w], steps, begun ? hash : first, y);
            for (int i = 0; i < HASHES && begun; i++)
                if (!CHECK(hash[i] == first[i]))
                    printf("        case %s, %s, way %zu, hash %d\n", c->name, moe_isa_name(isa), w, i);
            begun = 1;
        }
    }
    CHECK(calls > 0);
}

static void test_cases(void) {
    for (size_t i = 0; i < LAYER_CASES; i++) check_everywhere(&layer_cases[i], TEST_SANITIZED ? 2 : 5);
}

static void test_many_threads(void) {
    for (size_t i = 0; i < LAYER_CASES; i++) check_many_threads(&layer_cases[i], 2);
    layer_case c = layer_cases[3];
    c.d_model = 130, c.d_ff = 70, c.n_tokens = 300, c.n_experts = 40; /* tasks for all of them */
    check_many_threads(&c, 1);
}

/* Shapes by chance, small to middling: every edge of blocks and panels turns up. */
static void test_random_shapes(void) {
    for (int i = 0; i < (TEST_SANITIZED ? 6 : 25); i++) {
        layer_case c = layer_cases[test_below(LAYER_CASES)];
        c.d_model = 1 + test_below(70), c.d_ff = 1 + test_below(110), c.n_experts = 1 + test_below(20);
        c.top_k = 1 + test_below(c.n_experts < 5 ? c.n_experts : 5), c.n_shared = test_below(3),
        c.n_tokens = test_below(90);
        int errors = test_errors;
        check_everywhere(&c, 2);
        if (test_errors > errors)
            printf("        d %zu f %zu E %zu k %zu shared %zu T %zu\n", c.d_model, c.d_ff, c.n_experts, c.top_k,
                   c.n_shared, c.n_tokens);
    }
}

/* Large enough for several blocks in every direction. */
static void test_large(void) {
    layer_case c = layer_cases[3];
    c.d_model = 130, c.d_ff = TEST_SANITIZED ? 70 : 200, c.n_tokens = TEST_SANITIZED ? 60 : 300, c.n_experts = 4;
    check_everywhere(&c, 1);
    c.n_experts = 1, c.top_k = 1, c.n_tokens = TEST_SANITIZED ? 80 : 400, c.expert = MOE_EXPERT_GELU;
    check_everywhere(&c, 1);
    c.d_model = TEST_SANITIZED ? 260 : 520, c.d_ff = 40, c.n_experts = 3, c.n_tokens = 50;
    check_everywhere(&c, 1);
}

/* Many threads may run forward on one layer, each with its own tape. */
enum { READERS = 4, READER_TOKENS = 50, READER_D = 24 };
typedef struct reader {
    const moe_layer *m;
    float x[READER_TOKENS * READER_D], y[READER_TOKENS * READER_D];
    moe_status status;
} reader;

static void *read_layer(void *p) {
    reader *r = (reader *)p;
    moe_tape *t = NULL;
    moe_desc d = *moe_layer_desc(r->m);
    r->status = moe_tape_new(&t, &d, READER_TOKENS, MOE_OFF);
    for (int i = 0; i < 20 && !r->status; i++) r->status = moe_forward_tape(r->m, t, r->x, READER_TOKENS, r->y);
    moe_tape_free(t);
    return NULL;
}

static void test_readers_of_one_layer(void) {
    static reader r[READERS];
    pthread_t thread[READERS];
    moe_desc d = {0};
    moe_layer *m = NULL;
    d.d_model = READER_D, d.d_ff = 50, d.n_experts = 6, d.parallel.n_threads = 1;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    for (size_t i = 0; i < READERS; i++) {
        test_fill(r[i].x, READER_TOKENS * READER_D, -1, 1);
        r[i].m = m;
        if (pthread_create(&thread[i], NULL, read_layer, &r[i]) != 0) abort();
    }
    for (size_t i = 0; i < READERS; i++) pthread_join(thread[i], NULL);
    for (size_t i = 0; i < READERS; i++) {
        float y[READER_TOKENS * READER_D];
        CHECK_OK(r[i].status);
        CHECK_OK(moe_forward(m, r[i].x, READER_TOKENS, y));
        CHECK_SAME(r[i].y, y, READER_TOKENS * READER_D);
    }
    moe_layer_free(m);
}

int main(void) {
    RUN(test_cases);
    RUN(test_many_threads);
    RUN(test_random_shapes);
    RUN(test_large);
    RUN(test_readers_of_one_layer);
    return test_end();
}
