/* test.h - the tests' own small harness. A suite is one file:
 *
 *     #include "test.h"                      // includes moe.h
 *     static void test_sum(void) { CHECK(1 + 1 == 2); CHECK_NEAR(0.1 + 0.2, 0.3, 1e-15); }
 *     int main(void) { RUN(test_sum); RUN_IF(has_gpu(), test_gpu, "no GPU"); return test_end(); }
 *
 * It is linked with the library as tests/lib/moe.c compiles it, once for all suites. A suite that reads private parts
 * defines MOE_IMPLEMENTATION first and has the library in itself. Either way the library allocates through a counting
 * allocator that fills memory with several patterns and fails when told to.
 *
 * Every CHECK has the value of its condition, so `if (!CHECK(p != NULL)) return;` leaves a test early. */
#ifndef TEST_H
#define TEST_H

#if !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L /* for examples/common, where a suite includes that */
#endif
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *test_name = "(no test)";
static int test_passed, test_failed, test_skipped, test_errors; /* test_errors: of the running test */

/* TEST_SANITIZED: 1 under the address or memory sanitizer or valgrind, where the scalar kernels are some 20 times
 * slower: fewer rounds do. TEST_FRESH: 1 where fresh memory is not filled, so that who looks for its use can see it. */
#if defined(__SANITIZE_ADDRESS__)
#define TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer)
#define TEST_SANITIZED 1
#endif
#if __has_feature(memory_sanitizer)
#define TEST_FRESH 1
#endif
#endif
#ifndef TEST_SANITIZED
#define TEST_SANITIZED 0
#endif
#ifndef TEST_FRESH
#define TEST_FRESH 0
#endif

#define TEST_MAX_MESSAGES 10 /* for each test */
#define TEST_FLOOR 1e-3      /* CHECK_NEAR: below this size the tolerance no longer shrinks with the value */

/* ---- an allocator that counts, and fails when told to ---- */
static long test_live_blocks;         /* allocated and not freed */
static long test_allocations;         /* since the program began */
static long test_fail_at = -1;        /* n >= 0: n more succeed, then every one fails */
static const void *test_last_context; /* the ctx of the last call */
static const void *test_want_context; /* unless NULL, what it should be; how often it was not */
static long test_other_contexts;
static int test_pattern = -1;         /* the byte that fills fresh memory; -1: several in turn */

static inline void *test_malloc(size_t bytes, const void *context) {
    test_last_context = context;
    test_other_contexts += test_want_context && context != test_want_context;
    if (test_fail_at == 0) return NULL;
    if (test_fail_at > 0) test_fail_at--;
    void *p = malloc(bytes ? bytes : 1);
    if (p == NULL) return NULL;
    static const int patterns[] = {0xff, 0x00, 0xaa, 0xbe}; /* memory that is used before it is written shows */
    if (!TEST_FRESH) memset(p, test_pattern >= 0 ? test_pattern : patterns[test_allocations % 4], bytes);
    test_live_blocks++;
    test_allocations++;
    return p;
}

static inline void test_free(void *p, const void *context) {
    test_last_context = context;
    test_other_contexts += test_want_context && context != test_want_context;
    if (p != NULL) test_live_blocks--;
    free(p);
}

#ifdef MOE_H
#error "include test.h before moe.h"
#endif
#ifdef MOE_IMPLEMENTATION
#define MOE_MALLOC(bytes, context) test_malloc(bytes, context)
#define MOE_FREE(p, context) test_free(p, context)
#else /* what tests/lib/moe.c calls */
void *test_moe_malloc(size_t bytes, const void *context);
void test_moe_free(void *p, const void *context);
void *test_moe_malloc(size_t bytes, const void *context) { return test_malloc(bytes, context); }
void test_moe_free(void *p, const void *context) { test_free(p, context); }
#endif
#include "moe.h"

/* ---- checks ---- */
/* Counts an error and says whether its message should be printed. */
static inline int test_error(const char *file, int line) {
    if (getenv("TEST_ONLY")) exit(1);
    if (++test_errors > TEST_MAX_MESSAGES + 1) return 0;
    if (test_errors == TEST_MAX_MESSAGES + 1) printf("    ... and more of %s\n", test_name);
    else printf("    %s:%d: %s: ", file, line, test_name);
    return test_errors <= TEST_MAX_MESSAGES;
}

static inline int test_check(int ok, const char *text, const char *file, int line) {
    if (!ok && test_error(file, line)) printf("failed: %s\n", text);
    return ok;
}

static inline int test_check_status(moe_status got, moe_status want, const char *text, const char *file, int line) {
    if (got != want && test_error(file, line))
        printf("%s\n        gave \"%s\",\n        not  \"%s\"\n", text, moe_status_string(got),
               moe_status_string(want));
    return got == want;
}

/* -DTEST_WORST: how much of each tolerance is used is printed at the end, as tests/NAME.c:LINE: SHARE of LIMIT. None
 * should be under a tenth: a tolerance is at most ten times the worst error that was seen. */
#ifdef TEST_WORST
typedef struct test_use { const char *file; int line; double share, limit; } test_use;
static test_use test_worst[2000];
static inline void test_used(double error, double limit, const char *file, int line) {
    test_use *use = test_worst, *end = test_worst + sizeof test_worst / sizeof *test_worst - 1;
    while (use < end && use->file && (use->line != line || strcmp(use->file, file) != 0)) use++;
    if (use == end || !(limit > 0)) return;
    if (!use->file || !(error / limit <= use->share)) use->share = error / limit, use->limit = limit;
    use->file = file, use->line = line;
}
#else
#define test_used(error, limit, file, line) ((void)0)
#endif

/* limit: the largest |a - b| allowed; infinities are near only themselves, NaN is near nothing */
static inline int test_check_within(double a, double b, double limit, const char *text, const char *file, int line) {
    int ok = a == b || (isfinite(a) && isfinite(b) && fabs(a - b) <= limit);
    test_used(a == b ? 0 : fabs(a - b), limit, file, line);
    if (!ok && test_error(file, line))
        printf("%s: %.9g and %.9g differ by %.3g, over %.3g\n", text, a, b, fabs(a - b), limit);
    return ok;
}

static inline int test_check_near(double a, double b, double rel, const char *text, const char *file, int line) {
    return test_check_within(a, b, rel * fmax(fabs(b), TEST_FLOOR), text, file, line);
}

static inline uint32_t test_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline int test_check_bits(float a, float b, const char *text, const char *file, int line) {
    int ok = test_bits(a) == test_bits(b);
    if (!ok && test_error(file, line))
        printf("%s: %a (0x%08x) is not %a (0x%08x)\n", text, (double)a, test_bits(a), (double)b, test_bits(b));
    return ok;
}

/* Arrays: one message with the first difference. */
static inline int test_check_same(const float *a, const float *b, size_t n, const char *text, const char *file,
                                  int line) {
    size_t i = 0, different = 0, first = 0;
    for (i = n; i-- > 0;)
        if (test_bits(a[i]) != test_bits(b[i])) different++, first = i;
    if (different && test_error(file, line))
        printf("%s: %zu of %zu differ, the first at [%zu]: %a and %a\n", text, different, n, first, (double)a[first],
               (double)b[first]);
    return different == 0;
}

#define CHECK(cond) test_check((cond) ? 1 : 0, #cond, __FILE__, __LINE__)
#define CHECK_STATUS(expr, status) test_check_status((expr), (status), #expr, __FILE__, __LINE__)
#define CHECK_OK(expr) CHECK_STATUS(expr, MOE_OK)
#define CHECK_NEAR(a, b, rel) test_check_near((double)(a), (double)(b), (rel), #a " ~ " #b, __FILE__, __LINE__)
#define CHECK_WITHIN(a, b, limit) test_check_within((double)(a), (double)(b), (limit), #a " ~ " #b, __FILE__, __LINE__)
#define CHECK_BITS(a, b) test_check_bits((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_SAME(a, b, n) test_check_same((a), (b), (n), #a " == " #b, __FILE__, __LINE__)

/* ---- running ---- */
/* TEST_ONLY in the environment: this test alone, to its first error. */
static inline void test_run(const char *name, void (*test)(void)) {
    const char *only = getenv("TEST_ONLY");
    if (only && strcmp(only, name) != 0) return;
    test_name = name;
    test_errors = 0;
    test();
    if (test_errors == 0) { test_passed++; return; }
    test_failed++;
    printf("FAILED %s (%d)\n", name, test_errors);
    fflush(stdout);
}

static inline void test_skip(const char *name, const char *reason) {
    test_skipped++;
    printf("skipped %s: %s\n", name, reason);
}

#define RUN(test) test_run(#test, test)
#define RUN_IF(cond, test, reason) do { if (cond) RUN(test); else test_skip(#test, reason); } while (0)

/* The suite's last line; the value is for main to return. */
static inline int test_end(void) {
#ifdef TEST_WORST
    for (const test_use *use = test_worst; use->file; use++)
        printf("%s:%d: %.3g of %.3g\n", use->file, use->line, use->share, use->limit);
#endif
    printf("%d passed, %d failed", test_passed, test_failed);
    if (test_skipped) printf(", %d skipped", test_skipped);
    printf("\n");
    return test_failed != 0;
}

/* ---- data: the same in every run ---- */
static uint64_t test_seed = 1;

static inline uint32_t test_u32(void) { /* splitmix64, independent of the generator under test */
    uint64_t z = test_seed += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)(z >> 32);
}

static inline size_t test_below(size_t n) { return test_u32() % n; }
static inline float test_uniform(float lo, float hi) { return lo + (hi - lo) * (float)(test_u32() >> 8) / 16777216.0f; }

static inline void test_fill(float *x, size_t n, float lo, float hi) {
    for (size_t i = 0; i < n; i++) x[i] = test_uniform(lo, hi);
}

/* Memory that must be there; the tests' own, never through MOE_MALLOC. n = 0 gives a block of no length. */
static inline void *test_memory(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (p == NULL) { printf("    out of memory in the test itself\n0 passed, 1 failed\n"); exit(1); }
    return p;
}
static inline float *test_floats(size_t n) { return (float *)test_memory(n, sizeof(float)); }
static inline double *test_doubles(size_t n) { return (double *)test_memory(n, sizeof(double)); }

/* n elements between this machine's order of bytes and little-endian, which is what files have: the same both ways. */
static inline void test_little_endian(void *elements, size_t n, size_t size) {
    const uint32_t one = 1;
    unsigned char *p = (unsigned char *)elements, low;
    memcpy(&low, &one, 1);
    for (; !low && n > 0; n--, p += size)
        for (size_t i = 0; i < size / 2; i++) {
            unsigned char t = p[i];
            p[i] = p[size - 1 - i], p[size - 1 - i] = t;
        }
}

/* ---- FOR_EACH_ISA(isa) { ... }: every instruction set that works here, forced; AUTO again afterwards ---- */
static inline moe_isa_kind test_next_isa(moe_isa_kind after) {
    for (int i = (int)after + 1; i < MOE_ISA_COUNT; i++)
        if (moe_force_isa((moe_isa_kind)i) == MOE_OK) return (moe_isa_kind)i;
    moe_force_isa(MOE_ISA_AUTO);
    return MOE_ISA_COUNT;
}
#define FOR_EACH_ISA(isa) \
    for (moe_isa_kind isa = test_next_isa(MOE_ISA_AUTO); isa != MOE_ISA_COUNT; isa = test_next_isa(isa))

#endif
