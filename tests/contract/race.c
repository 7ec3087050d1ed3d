/* What threads may do at the same time: run tasks of one call, use one set of parameters (each with a tape and
 * gradients of its own), and call the library first. tests/long/race.sh runs this under the thread sanitizer, which
 * sees what a result that happens to be right does not show. */
#include "test.h"
#include "pool.h"

enum { D = 24, F = 40, E = 6, T = 50, ROUNDS = 6, USERS = 2 };
static float x[USERS][T * D], dy[USERS][T * D];

static moe_desc desc_of(const moe_parallel *parallel) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.bias = MOE_ON, d.noise = MOE_NOISE_GAUSSIAN, d.noise_std = 0.1f;
    d.loss[MOE_LOSS_SWITCH] = 0.01f;
    if (parallel) d.parallel = *parallel;
    return d;
}

/* ---- who comes first chooses the kernels ---- */
static void *first_call(void *out) {
    moe_status *status = (moe_status *)out;
    float a[5] = {1, 2, 3, 4, 5};
    *status = moe_exp(5, a, a);
    return NULL;
}
static void test_first_calls(void) {
    pthread_t thread[4];
    moe_status status[4];
    for (size_t i = 0; i < 4; i++)
        if (pthread_create(&thread[i], NULL, first_call, &status[i]) != 0) abort();
    for (size_t i = 0; i < 4; i++) pthread_join(thread[i], NULL);
    for (size_t i = 0; i < 4; i++) CHECK_OK(status[i]);
}

/* ---- one layer trained by a pool ---- */
static uint64_t trained(const moe_parallel *parallel) {
    moe_desc d = desc_of(parallel);
    moe_layer *m = NULL;
    float y[T * D], dx[T * D];
    if (!CHECK_OK(moe_layer_new(&m, &d))) return 0;
    for (int step = 0; step < 3; step++) {
        CHECK_OK(moe_forward(m, x[0], T, y));
        CHECK_OK(moe_backward(m, dy[0], dx));
        CHECK_OK(moe_step(m, 0.01f));
    }
    uint64_t hash = moe_hash(moe_hash(moe_layer_hash(m), y, sizeof y), dx, sizeof dx);
    moe_layer_free(m);
    return hash;
}
static void test_trained_by_a_pool(void) {
    const moe_parallel alone = {NULL, NULL, 1};
    uint64_t want = trained(&alone);
    for (size_t n = 2; n <= POOL_MOST; n *= 4) {
        pool p;
        pool_start(&p, n);
        moe_parallel parallel = pool_parallel(&p);
        CHECK(trained(&parallel) == want);
        CHECK(p.calls > 10);
        pool_stop(&p);
    }
}

/* ---- two users of one set of parameters, each with a pool, a tape and gradients ---- */
typedef struct user {
    const moe_layer *layer;
    const float *router, *params, *x, *dy; /* level 2: forward and backward */
    moe_tape *plain, *tape;                /* of level 3 and of level 2 */
    float *d_params, *d_router, y[T * D], dx[T * D], d_weight[T * E];
    size_t n_params, n_router;
    uint64_t hash;
    moe_status status;
} user;

static void *use(void *p) {
    user *u = (user *)p;
    u->hash = 0, u->status = MOE_OK;
    for (uint64_t i = 0; i < ROUNDS && !u->status; i++) {
        moe_status s = moe_forward_tape(u->layer, u->plain, u->x, T, u->y);
        u->hash = moe_hash(u->hash, u->y, sizeof u->y);
        u->tape->side.draw = i;
        if (!s) s = moe_route(u->tape, u->router, u->x, T);
        if (!s) s = moe_experts_forward(u->tape, u->params, u->y);
        memset(u->dx, 0, sizeof u->dx);
        if (!s) s = moe_experts_backward(u->tape, u->params, u->dy, 1, u->d_params, u->d_weight, u->dx);
        if (!s) s = moe_route_backward(u->tape, u->router, u->d_weight, u->d_router, u->dx);
        u->hash = moe_hash(u->hash, u->y, sizeof u->y), u->hash = moe_hash(u->hash, u->dx, sizeof u->dx);
        u->hash = moe_hash(u->hash, u->d_params, u->n_params * sizeof(float));
        u->hash = moe_hash(u->hash, u->d_router, u->n_router * sizeof(float));
        u->status = s;
    }
    return NULL;
}
static void user_begin(user *u, size_t i, const moe_layer *layer, const moe_parallel *parallel) {
    moe_desc d = desc_of(parallel);
    memset(u, 0, sizeof *u);
    u->layer = layer, u->x = x[i], u->dy = dy[i];
    CHECK_OK(moe_tape_new(&u->plain, &d, T, MOE_OFF));
    CHECK_OK(moe_tape_new(&u->tape, &d, T, MOE_ON));
    CHECK_OK(moe_experts_count(&d, &u->n_params));
    CHECK_OK(moe_router_count(&d, &u->n_router));
    u->d_params = test_floats(u->n_params), u->d_router = test_floats(u->n_router);
}
static void user_end(user *u) {
    moe_tape_free(u->plain), moe_tape_free(u->tape);
    free(u->d_params), free(u->d_router);
}

static void test_two_users(void) {
    static user u[USERS], alone;
    const moe_parallel one = {NULL, NULL, 1};
    moe_desc d = desc_of(&one);
    moe_layer *layer = NULL;
    pthread_t thread[USERS];
    pool p[USERS];
    size_t n_params = 0, n_router = 0;
    if (!CHECK_OK(moe_layer_new(&layer, &d))) return;
    CHECK_OK(moe_experts_count(&d, &n_params));
    CHECK_OK(moe_router_count(&d, &n_router));
    float *params = test_floats(n_params), *router = test_floats(n_router);
    CHECK_OK(moe_rand_normal(1, 1, n_params, 0, 0.2f, params));
    CHECK_OK(moe_rand_normal(1, 2, n_router, 0, 0.2f, router));
    for (size_t i = 0; i < USERS; i++) {
        pool_start(&p[i], 3 + 2 * i);
        moe_parallel parallel = pool_parallel(&p[i]);
        user_begin(&u[i], i, layer, &parallel);
        u[i].params = params, u[i].router = router;
    }
    for (size_t i = 0; i < USERS; i++)
        if (pthread_create(&thread[i], NULL, use, &u[i]) != 0) abort();
    for (size_t i = 0; i < USERS; i++) pthread_join(thread[i], NULL);
    for (size_t i = 0; i < USERS; i++) { /* as each alone, in one thread */
        user_begin(&alone, i, layer, &one);
        alone.params = params, alone.router = router;
        (void)use(&alone);
        CHECK_OK(u[i].status);
        CHECK_OK(alone.status);
        CHECK(u[i].hash == alone.hash);
        CHECK(p[i].calls > 10);
        user_end(&alone), user_end(&u[i]);
        pool_stop(&p[i]);
    }
    CHECK(u[0].hash != u[1].hash);
    free(params), free(router);
    moe_layer_free(layer);
}

int main(void) {
    RUN(test_first_calls);
    for (size_t i = 0; i < USERS; i++) {
        CHECK_OK(moe_rand_normal(2, i, T * D, 0, 1, x[i]));
        CHECK_OK(moe_rand_normal(3, i, T * D, 0, 1, dy[i]));
    }
    RUN(test_trained_by_a_pool);
    RUN(test_two_users);
    return test_end();
}
