/* In evaluation a token's output has the same bits whatever else is in the batch, in whatever order, and however the
 * batch is cut, for every system of the table. A system that routes or mixes whole sequences promises it of a sequence
 * (and says "sequence" in its limits); one that cannot promise it says "not batch-invariant" there, and must be seen to
 * break it. */
#include "test.h"
#include "pool.h"

enum { E = 8, SEQ = 4, MAX_TOKENS = 120, MAX_D = 264 };
static float x[MAX_TOKENS * MAX_D], whole[MAX_TOKENS * MAX_D], x2[MAX_TOKENS * MAX_D], y[MAX_TOKENS * MAX_D];
static float dy[MAX_TOKENS * MAX_D];
static uint32_t id[MAX_TOKENS], id2[MAX_TOKENS];

typedef struct shape { size_t d, f, n_tokens, threads; } shape; /* more than two threads: a pool's */
static pool threads;
typedef struct batch_case {
    const moe_system *system;
    moe_layer *layer;
    size_t d, n_tokens, unit; /* unit: tokens that stay together */
    int with_ids;
} batch_case;

static void forward(const batch_case *c, const float *in, const uint32_t *ids, size_t n, float *out) {
    moe_side *side = moe_layer_side(c->layer);
    side->evaluate = 1;
    side->id = c->with_ids ? ids : NULL;
    if (!CHECK_OK(moe_forward(c->layer, in, n, out))) printf("        %s\n", c->system->name);
}

/* place[i]: the token of x that stands at i of the batch, n of them, cut into pieces. Returns how many outputs are not
 * those of `whole`. */
static size_t differ(const batch_case *c, const size_t *place, size_t n, size_t piece) {
    size_t d = c->d, bad = 0;
    for (size_t i = 0; i < n; i++) {
        memcpy(x2 + i * d, x + place[i] * d, d * sizeof *x);
        id2[i] = id[place[i]];
    }
    for (size_t i = 0; i < n; i += piece) {
        size_t rows = n - i < piece ? n - i : piece;
        forward(c, x2 + i * d, id2 + i, rows, y + i * d);
    }
    for (size_t i = 0; i < n; i++) bad += memcmp(y + i * d, whole + place[i] * d, d * sizeof *y) != 0;
    return bad;
}

static size_t differ_in_all_ways(const batch_case *c) {
    size_t place[MAX_TOKENS], n = c->n_tokens, units = n / c->unit, bad = 0, some = 0;
    static const size_t pieces[] = {1, 3, 7, 32};
    forward(c, x, id, n, whole);
    for (size_t i = 0; i < n; i++) place[i] = i;
    for (size_t p = 0; p < sizeof pieces / sizeof *pieces; p++) bad += differ(c, place, n, pieces[p] * c->unit);
    for (size_t u = 0; u < units; u++) /* another order */
        for (size_t i = 0; i < c->unit; i++) place[u * c->unit + i] = u * 7 % units * c->unit + i;
    bad += differ(c, place, n, n);
    bad += differ(c, place, n, 3 * c->unit);
    for (size_t u = 0; u < units; u += 3) /* every third, with one token again and again around it */
        for (size_t i = 0; i < 3 * c->unit; i++) place[some++] = (i < c->unit ? u : 0) * c->unit + i % c->unit;
    if (some > n) some = n;
    bad += differ(c, place, some, some);
    return bad;
}

/* A layer of the system after two steps of training, so that nothing is still zero or symmetric. */
static moe_layer *trained(const moe_system *system, const shape *s) {
    moe_desc desc;
    moe_layer *layer = NULL;
    memset(&desc, 0, sizeof desc);
    desc.d_model = s->d, desc.d_ff = s->f, desc.sequence = SEQ, desc.seed = 3, desc.parallel.n_threads = s->threads;
    if (s->threads > 2) desc.parallel = pool_parallel(&threads);
    CHECK_OK(moe_desc_system(&desc, system->name));
    if (!CHECK_OK(moe_layer_new(&layer, &desc))) return NULL;
    for (int step = 0; step < 2; step++) {
        moe_layer_side(layer)->id = id;
        CHECK_OK(moe_forward(layer, x, s->n_tokens, y));
        CHECK_OK(moe_backward(layer, dy, NULL));
        CHECK_OK(moe_step(layer, 0.02f));
    }
    return layer;
}

static int says(const moe_system *system, const char *words) { return strstr(system->limits, words) != NULL; }

static void check_system(const moe_system *system, const shape *s) {
    batch_case c = {system, trained(system, s), s->d, s->n_tokens, 1, 1};
    if (!c.layer) return;
    const moe_desc *desc = moe_layer_desc(c.layer);
    int sequence =
        desc->route_sequence == MOE_ON || desc->combine == MOE_COMBINE_SOFT || desc->combine == MOE_COMBINE_MERGE;
    if (sequence) c.unit = SEQ;
    size_t bad = differ_in_all_ways(&c);
    if (!CHECK((bad > 0) == says(system, "not batch-invariant")))
        printf("        %s, d %zu, %zu threads: %zu outputs differ; limits: %s\n", system->name, s->d, s->threads, bad,
               system->limits);
    CHECK(memcmp(whole, whole + c.unit * s->d, s->d * sizeof *whole) != 0); /* the output is not one and the same */
    if (sequence) { /* of its tokens it cannot be true */
        c.unit = 1;
        if (!CHECK(differ_in_all_ways(&c) > 0 && says(system, "sequence"))) printf("        %s\n", system->name);
    }
    if (desc->score == MOE_SCORE_HASH) { /* without ids, by position */
        c.with_ids = 0;
        CHECK(differ_in_all_ways(&c) > 0 && says(system, "ids"));
    }
    moe_layer_free(c.layer);
}

/* Under the sanitizers each shape takes every third system, from `first` on: what they look for is the same in all. */
static void check_systems(const shape *s, size_t first) {
    test_seed = 11;
    test_fill(x, s->n_tokens * s->d, -0.5f, 1); /* a mean that is not 0: the experts' loads are uneven */
    test_fill(dy, s->n_tokens * s->d, -1, 1);
    for (size_t t = 0; t < s->n_tokens; t++) id[t] = test_u32() % 1000;
    for (size_t i = TEST_SANITIZED ? first : 0; i < moe_systems_count(); i += TEST_SANITIZED ? 3 : 1)
        check_system(moe_system_at(i), s);
    CHECK(test_live_blocks == 0);
}

static void test_every_instruction_set(void) {
    FOR_EACH_ISA(isa) {
        shape small = {32, 24, 72, 1};
        check_systems(&small, 0);
    }
}
static void test_two_threads(void) {
    shape s = {32, 24, 104, 2};
    check_systems(&s, 1);
}
static void test_many_threads(void) {
    shape s = {32, 24, 72, POOL_MOST};
    pool_start(&threads, POOL_MOST);
    check_systems(&s, 2);
    pool_stop(&threads);
}
static void test_over_blocks(void) { /* widths beyond a block of the products */
    shape s = {MAX_D, 260, TEST_SANITIZED ? 72 : 104, 2};
    check_systems(&s, 1);
}

int main(void) {
    RUN(test_every_instruction_set);
    RUN(test_two_threads);
    RUN(test_many_threads);
    RUN(test_over_blocks);
    return test_end();
}
