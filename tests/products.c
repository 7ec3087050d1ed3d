/* moe_gemm against two oracles: a chain of fmaf in increasing k, bit for bit, and a double sum within the error bound
 * of such a chain. On every instruction set and with 1, 2 and 3 threads. */
#include "test.h"

typedef struct gemm_case { size_t m, n, k; int ta, tb, accumulate; size_t pad_a, pad_b, pad_c; } gemm_case;
static float *a, *b, *c, *c0; /* stored as the case says; c0: c before */
static size_t lda, ldb, ldc;
static float a_at(const gemm_case *g, size_t i, size_t p) { return g->ta ? a[p * lda + i] : a[i * lda + p]; }
static float b_at(const gemm_case *g, size_t p, size_t j) { return g->tb ? b[j * ldb + p] : b[p * ldb + j]; }

static void setup(const gemm_case *g) {
    size_t rows_a = g->ta ? g->k : g->m, rows_b = g->tb ? g->n : g->k;
    lda = (g->ta ? g->m : g->k) + g->pad_a, ldb = (g->tb ? g->k : g->n) + g->pad_b, ldc = g->n + g->pad_c;
    a = test_floats(rows_a * lda), b = test_floats(rows_b * ldb);
    c = test_floats(g->m * ldc), c0 = test_floats(g->m * ldc);
    test_fill(a, rows_a * lda, -1, 1);
    test_fill(b, rows_b * ldb, -1, 1);
    test_fill(c0, g->m * ldc, -1, 1);
}

static void teardown(void) { free(a), free(b), free(c), free(c0); }

static moe_gemm_args args_of(const gemm_case *g) {
    moe_gemm_args x;
    memset(&x, 0, sizeof x);
    x.m = g->m, x.n = g->n, x.k = g->k, x.ta = g->ta, x.tb = g->tb, x.accumulate = g->accumulate;
    x.a = a, x.lda = lda, x.b = b, x.ldb = ldb, x.c = c, x.ldc = ldc;
    return x;
}

/* The expected c, whole, with what lies between its rows untouched. */
static float *expected(const gemm_case *g) {
    float *want = test_floats(g->m * ldc);
    memcpy(want, c0, g->m * ldc * sizeof *want);
    for (size_t i = 0; i < g->m; i++)
        for (size_t j = 0; j < g->n; j++) {
            float chain = g->accumulate ? c0[i * ldc + j] : 0;
            for (size_t p = 0; p < g->k; p++) chain = fmaf(a_at(g, i, p), b_at(g, p, j), chain);
            want[i * ldc + j] = chain;
        }
    return want;
}

static void check_bound(const gemm_case *g) {
    for (size_t i = 0; i < g->m; i++)
        for (size_t j = 0; j < g->n; j++) {
            double sum = g->accumulate ? (double)c0[i * ldc + j] : 0, size = fabs(sum);
            for (size_t p = 0; p < g->k; p++) {
                double t = (double)a_at(g, i, p) * (double)b_at(g, p, j);
                sum += t, size += fabs(t);
            }
            CHECK_WITHIN(c[i * ldc + j], sum, (double)(g->k + 1) * 0x1p-24 * size);
        }
}

static void run_case(const gemm_case *g) {
    setup(g);
    moe_gemm_args x = args_of(g);
    float *want = expected(g);
    FOR_EACH_ISA(isa) {
        size_t most = TEST_SANITIZED && isa == MOE_ISA_SCALAR ? 1 : 3;
        for (size_t threads = 1; threads <= most; threads++) {
            moe_parallel parallel = {0};
            parallel.n_threads = threads;
            x.parallel = &parallel;
            memcpy(c, c0, g->m * ldc * sizeof *c);
            CHECK_OK(moe_gemm(&x));
            if (!CHECK_SAME(c, want, g->m * ldc))
                printf("        m %zu n %zu k %zu ta %d tb %d accumulate %d, %s, %zu threads\n", g->m, g->n, g->k,
                       g->ta, g->tb, g->accumulate, moe_isa_name(isa), threads);
        }
    }
    check_bound(g);
    free(want);
    teardown();
}

static void run_shape(size_t m, size_t n, size_t k) {
    for (int bits = 0; bits < 8; bits++) {
        gemm_case g = {m, n, k, bits & 1, bits >> 1 & 1, bits >> 2, 0, 0, 0};
        if (test_u32() & 1) g.pad_a = test_below(20), g.pad_b = test_below(20), g.pad_c = test_below(20);
        run_case(&g);
    }
}

static void test_tiny_shapes(void) {
    for (size_t m = 0; m <= 3; m++)
        for (size_t n = 0; n <= 3; n++)
            for (size_t k = 0; k <= 3; k++) run_shape(m, n, k);
}

static void test_around_blocks(void) {
    static const size_t edge[] = {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65};
    size_t count = sizeof edge / sizeof *edge;
    for (size_t i = 0; i < count; i++) {
        run_shape(edge[i], edge[(i * 5 + 3) % count], edge[(i * 7 + 1) % count]);
        run_shape(edge[(i * 3 + 2) % count], edge[i], edge[(i * 11 + 5) % count]);
        run_shape(edge[(i * 5 + 1) % count], edge[(i * 3 + 7) % count], edge[i]);
    }
}

static void test_large(void) {
    run_shape(5, 3, 5000);
    run_shape(1, 1, 3001);
    run_shape(1, 700, 300);
    run_shape(300, 1, 257);
    gemm_case wide = {130, 97, 513, 0, 1, 1, 3, 5, 7}, tall = {257, 129, 40, 1, 0, 0, 0, 1, 0},
              big = {301, 203, 260, 0, 0, 0, 3, 5, 7};
    run_case(&tall);
    if (TEST_SANITIZED) return;
    run_case(&wide);
    run_case(&big);
    run_shape(130, 97, 513);
}

/* Signed zeros, infinities, NaN and denormals go through the chain like any number. */
static void test_special_values(void) {
    gemm_case g = {20, 35, 9, 0, 0, 0, 0, 0, 0};
    static const float special[] = {0.0f, -0.0f, 1e-40f, -1e-42f, 1e-30f, 3e38f, -1.0f, 1.5f};
    setup(&g);
    for (size_t i = 0; i < g.m * lda; i++) a[i] = special[test_below(8)];
    for (size_t i = 0; i < g.k * ldb; i++) b[i] = special[test_below(8)];
    moe_gemm_args x = args_of(&g);
    float *want = expected(&g);
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_gemm(&x));
        for (size_t i = 0; i < g.m * ldc; i++)
            if (isnan(want[i])) CHECK(isnan(c[i]));
            else CHECK_BITS(c[i], want[i]);
    }
    free(want);
    teardown();

    gemm_case one = {3, 3, 3, 0, 0, 0, 0, 0, 0}; /* an infinity or a NaN stays in its row */
    setup(&one);
    a[0] = INFINITY, a[3] = NAN;
    x = args_of(&one);
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_gemm(&x));
        CHECK(isinf(c[0]) && isinf(c[2]) && isnan(c[3]) && isnan(c[5]) && isfinite(c[6]) && isfinite(c[8]));
    }
    teardown();
}

/* ---- a_fill: the same matrix by a function ---- */
static void fill_from_a(void *user, size_t row, size_t rows, size_t col, size_t cols, float *dst) {
    const gemm_case *g = (const gemm_case *)user;
    if (cols > 32) abort();
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < cols; j++) dst[r * 32 + j] = a_at(g, row + r, col + j);
}

static void test_a_fill(void) {
    static const size_t shape[][3] = {{1, 1, 1},    {5, 3, 40}, {33, 65, 31}, {100, 17, 33},
                                      {64, 48, 64}, {3, 2, 0},  {0, 3, 4}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
        for (int bits = 0; bits < 4; bits++) {
            gemm_case g = {shape[s][0], shape[s][1], shape[s][2], 0, bits & 1, bits >> 1, 0, 0, 0};
            setup(&g);
            float *want = expected(&g);
            moe_gemm_args x = args_of(&g);
            x.a = NULL, x.a_fill = fill_from_a, x.a_user = &g;
            FOR_EACH_ISA(isa) {
                for (size_t threads = 1; threads <= 3; threads += 2) {
                    moe_parallel parallel = {0};
                    parallel.n_threads = threads, x.parallel = &parallel;
                    memcpy(c, c0, g.m * ldc * sizeof *c);
                    CHECK_OK(moe_gemm(&x));
                    CHECK_SAME(c, want, g.m * ldc);
                }
            }
            free(want);
            teardown();
        }
    }
}

/* With ta the implicit operand is the stored matrix (k, m): as the gradient of a convolution's weights needs it. */
static void fill_stored(void *user, size_t row, size_t rows, size_t col, size_t cols, float *dst) {
    (void)user;
    if (cols > 32) abort();
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < cols; j++) dst[r * 32 + j] = a[(row + r) * lda + col + j];
}

static void test_a_fill_transposed(void) {
    gemm_case g = {37, 41, 70, 1, 0, 1, 0, 0, 0};
    setup(&g);
    float *want = expected(&g);
    moe_gemm_args x = args_of(&g);
    x.a = NULL, x.a_fill = fill_stored;
    FOR_EACH_ISA(isa) {
        memcpy(c, c0, g.m * ldc * sizeof *c);
        CHECK_OK(moe_gemm(&x));
        CHECK_SAME(c, want, g.m * ldc);
    }
    free(want);
    teardown();
}

/* ---- the same product however it is run ---- */
static void run_reversed(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg) {
    (void)n_threads;
    ++*(size_t *)user;
    for (size_t i = n_tasks; i-- > 0;) task(arg, i, 0);
}

static void test_own_runner_and_scratch(void) {
    gemm_case g = {150, 90, 77, 0, 1, 1, 0, 0, 0};
    setup(&g);
    float *want = expected(&g);
    size_t calls = 0, bytes = 0;
    moe_parallel parallel = {0};
    parallel.run = run_reversed, parallel.user = &calls, parallel.n_threads = 4;
    moe_gemm_args x = args_of(&g);
    x.parallel = &parallel;
    memcpy(c, c0, g.m * ldc * sizeof *c);
    CHECK_OK(moe_gemm(&x));
    CHECK(calls > 0);
    CHECK_SAME(c, want, g.m * ldc);

    CHECK_OK(moe_gemm_scratch(&x, &bytes));
    char *scratch = (char *)test_memory(bytes + 1, 1);
    long before = test_allocations;
    x.scratch = scratch + 1, x.scratch_bytes = bytes; /* any alignment */
    memcpy(c, c0, g.m * ldc * sizeof *c);
    CHECK_OK(moe_gemm(&x));
    CHECK(test_allocations == before);
    CHECK_SAME(c, want, g.m * ldc);
    if (bytes > 0) {
        x.scratch_bytes = bytes - 1;
        memcpy(c, c0, g.m * ldc * sizeof *c);
        CHECK_STATUS(moe_gemm(&x), MOE_E_SMALL_MEMORY);
        CHECK_SAME(c, c0, g.m * ldc);
    }
    free(scratch);

    x.scratch = NULL, x.scratch_bytes = 0, x.alloc_context = &g;
    test_last_context = NULL, test_fail_at = 0;
    moe_status s = moe_gemm(&x);
    test_fail_at = -1;
    if (bytes > 0) {
        CHECK_STATUS(s, MOE_E_NO_MEMORY);
        CHECK(test_last_context == &g);
        CHECK_SAME(c, c0, g.m * ldc);
    }
    CHECK(test_live_blocks == 0);
    free(want);
    teardown();
}

/* b packed once: the same bits as from b itself, all ways that b and a can lie, and added to what is there. */
static void test_packed(void) {
    static const size_t shapes[][3] = {{1, 1, 1}, {1, 70, 40}, {5, 33, 129}, {40, 64, 300}, {70, 31, 32}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int way = 0; way < 8; way++) {
            size_t m = shapes[i][0], n = shapes[i][1], k = shapes[i][2], count = (n + 31) / 32 * 32 * k;
            float *left = malloc(m * k * sizeof(float)), *right = malloc(n * k * sizeof(float));
            float *both = malloc(2 * m * n * sizeof(float)), *panels = malloc(count * sizeof(float));
            if (!CHECK(left && right && both && panels)) return;
            CHECK_OK(moe_rand_uniform(1, i, m * k, -1, 1, left));
            CHECK_OK(moe_rand_uniform(2, i, n * k, -1, 1, right));
            CHECK_OK(moe_rand_uniform(3, i, m * n, -1, 1, both));
            memcpy(both + m * n, both, m * n * sizeof(float));
            moe_gemm_args g = {0};
            g.m = m, g.n = n, g.k = k;
            g.a = left, g.b = right, g.c = both;
            g.ta = way & 1, g.tb = way >> 1 & 1, g.accumulate = way >> 2;
            CHECK_OK(moe_gemm_pack(&g, panels));
            CHECK_OK(moe_gemm(&g));
            g.b = NULL;
            g.b_panels = panels;
            g.c = both + m * n;
            CHECK_OK(moe_gemm(&g));
            CHECK(memcmp(both, both + m * n, m * n * sizeof(float)) == 0);
            CHECK(moe_gemm_pack(&g, panels) == MOE_E_NULL_B);
            g.b = right;
            CHECK(moe_gemm_pack(&g, NULL) == MOE_E_NULL_OUT);
            free(left), free(right), free(both), free(panels);
        }
    CHECK(moe_gemm_pack(NULL, NULL) == MOE_E_NULL_PARAMS);
    moe_gemm_args none;
    memset(&none, 0, sizeof none);
    none.k = 3, CHECK_OK(moe_gemm_pack(&none, NULL)); /* no columns, then no rows: nothing is read or written */
    none.k = 0, none.n = 3, CHECK_OK(moe_gemm_pack(&none, NULL));
}

static void test_bad_arguments(void) {
    gemm_case g = {4, 5, 6, 0, 0, 0, 0, 0, 0};
    size_t bytes;
    setup(&g);
    memcpy(c, c0, g.m * ldc * sizeof *c);
    const moe_gemm_args good = args_of(&g);
    moe_gemm_args x;
    CHECK(moe_gemm(NULL) != MOE_OK);
    CHECK_STATUS(moe_gemm_scratch(&good, NULL), MOE_E_NULL_OUT);
    CHECK(moe_gemm_scratch(NULL, &bytes) != MOE_OK);
    x = good, x.a = NULL;
    CHECK_STATUS(moe_gemm(&x), MOE_E_NULL_A);
    x = good, x.b = NULL;
    CHECK_STATUS(moe_gemm(&x), MOE_E_NULL_B);
    x = good, x.c = NULL;
    CHECK_STATUS(moe_gemm(&x), MOE_E_NULL_C);
    x = good, x.lda = 5;
    CHECK_STATUS(moe_gemm(&x), MOE_E_LD);
    x = good, x.ldb = 4;
    CHECK_STATUS(moe_gemm(&x), MOE_E_LD);
    x = good, x.ldc = 4;
    CHECK_STATUS(moe_gemm(&x), MOE_E_LD);
    x = good, x.ta = 1, x.lda = 3;
    CHECK_STATUS(moe_gemm(&x), MOE_E_LD);
    x = good, x.tb = 1, x.ldb = 5;
    CHECK_STATUS(moe_gemm(&x), MOE_E_LD);
    x = good, x.lda = x.ldb = x.ldc = 0; /* 0: the rows' lengths, which these are */
    CHECK_OK(moe_gemm(&x));
    float *want = expected(&g);
    CHECK_SAME(c, want, g.m * ldc);
    memcpy(c, c0, g.m * ldc * sizeof *c);

    /* sizes that no memory holds are refused before anything is touched */
    x = good, x.m = SIZE_MAX / 2, x.lda = x.ldb = x.ldc = 0;
    CHECK_STATUS(moe_gemm(&x), MOE_E_OVERFLOW);
    x = good, x.n = SIZE_MAX / 3, x.lda = x.ldb = x.ldc = 0;
    CHECK_STATUS(moe_gemm(&x), MOE_E_OVERFLOW);
    x = good, x.k = SIZE_MAX - 1, x.lda = x.ldb = x.ldc = 0;
    CHECK_STATUS(moe_gemm(&x), MOE_E_OVERFLOW);
    x = good, x.lda = SIZE_MAX / 2;
    CHECK_STATUS(moe_gemm(&x), MOE_E_OVERFLOW);
    x = good, x.m = x.n = x.k = (size_t)1 << (sizeof(size_t) * 4), x.lda = x.ldb = x.ldc = 0;
    CHECK_STATUS(moe_gemm_scratch(&x, &bytes), MOE_E_OVERFLOW);
    CHECK_SAME(c, c0, g.m * ldc);

    memset(&x, 0, sizeof x); /* nothing to do: nothing needed */
    CHECK_OK(moe_gemm(&x));
    x.m = 2, x.n = 5, x.c = c; /* k = 0 */
    CHECK_OK(moe_gemm(&x));
    for (size_t i = 0; i < 10; i++) CHECK_BITS(c[i], 0.0f);
    CHECK_SAME(c + 10, c0 + 10, 10);
    free(want);
    teardown();
}

int main(void) {
    RUN(test_tiny_shapes);
    RUN(test_around_blocks);
    RUN(test_large);
    RUN(test_special_values);
    RUN(test_a_fill);
    RUN(test_a_fill_transposed);
    RUN(test_own_runner_and_scratch);
    RUN(test_packed);
    RUN(test_bad_arguments);
    return test_end();
}
