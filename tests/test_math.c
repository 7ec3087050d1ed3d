/* exp, log, tanh, erf against libm's double functions; Philox against its published answers; the hash. */
#include "test.h"

/* |y - exact| in units of the last place of a float of exact's size */
static double ulps(float y, double exact) {
    if (exact == 0) return y == 0 ? 0 : INFINITY;
    int exponent = ilogb(exact) - 23;
    return fabs((double)y - exact) / ldexp(1, exponent < -149 ? -149 : exponent);
}

typedef moe_status array_function(size_t n, const float *x, float *y);

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

enum { SAMPLE = 4099 };

/* Every `step`-th float from lo to hi (of one sign) on every instruction set: equal bits, within `limit` ulps. The
 * limits below are the largest errors that moe.h states, rounded up. */
static void scan(array_function *f, double (*exact)(double), float lo, float hi, uint32_t step, double limit) {
    static float x[SAMPLE], first[SAMPLE], y[SAMPLE];
    uint32_t bits = test_bits(lo), end = test_bits(hi);
    double worst = 0;
    float worst_x = 0;
    CHECK(bits < end && (bits >> 31) == (end >> 31));
    while (bits <= end) {
        size_t n = 0;
        for (; n < SAMPLE && bits <= end; bits += TEST_SANITIZED ? 8 * step : step) x[n++] = float_of(bits);
        int begun = 0;
        FOR_EACH_ISA(isa) {
            CHECK_OK(f(n, x, begun ? y : first));
            if (begun && !CHECK_SAME(y, first, n)) printf("        with %s, from x = %a\n", moe_isa_name(isa), (double)x[0]);
            begun = 1;
        }
        for (size_t i = 0; i < n; i++) {
            double u = ulps(first[i], exact((double)x[i]));
            if (u > worst) worst = u, worst_x = x[i];
        }
    }
    if (!CHECK(worst <= limit)) printf("        worst error %.3f ulps at x = %a\n", worst, (double)worst_x);
}

static float value(array_function *f, float x) {
    float y = 0;
    CHECK_OK(f(1, &x, &y));
    return y;
}

static void test_exp(void) {
    scan(moe_exp, exp, 1e-38f, 88.7f, 1009, 0.9);
    scan(moe_exp, exp, -1e-38f, -86.5f, 1009, 0.9);
    scan(moe_exp, exp, 80.0f, 88.7f, 61, 0.9);
    scan(moe_exp, exp, -80.0f, -86.5f, 61, 0.9);
    FOR_EACH_ISA(isa) {
        CHECK_BITS(value(moe_exp, 0.0f), 1.0f);
        CHECK_BITS(value(moe_exp, -0.0f), 1.0f);
        CHECK_BITS(value(moe_exp, 1e-40f), 1.0f);
        CHECK_BITS(value(moe_exp, -INFINITY), 0.0f);
        CHECK_BITS(value(moe_exp, INFINITY), INFINITY);
        CHECK_BITS(value(moe_exp, -86.51f), 0.0f);
        CHECK_BITS(value(moe_exp, -100.0f), 0.0f);
        CHECK_BITS(value(moe_exp, -3e38f), 0.0f);
        CHECK_BITS(value(moe_exp, 88.73f), INFINITY);
        CHECK_BITS(value(moe_exp, 3e38f), INFINITY);
        CHECK(isnan(value(moe_exp, NAN)));
    }
}

static void test_log(void) {
    scan(moe_log, log, 1.17549435e-38f, 3.4e38f, 2003, 0.93);
    scan(moe_log, log, 0.9f, 1.1f, 17, 0.93);
    FOR_EACH_ISA(isa) CHECK_BITS(value(moe_log, 1.0f), 0.0f);
}

static void check_ends(array_function *f) { /* of an odd function that goes to 1 */
    FOR_EACH_ISA(isa) {
        CHECK_BITS(value(f, INFINITY), 1.0f);
        CHECK_BITS(value(f, -INFINITY), -1.0f);
        CHECK_BITS(value(f, 3e38f), 1.0f);
        CHECK(value(f, 0.0f) == 0);
        CHECK(isnan(value(f, NAN)));
    }
}

static void test_tanh(void) {
    scan(moe_tanh, tanh, 1e-38f, 30.0f, 1009, 1.37);
    scan(moe_tanh, tanh, 0.3f, 1.2f, 61, 1.37);
    check_ends(moe_tanh);
}

static void test_erf(void) {
    scan(moe_erf, erf, 1e-37f, 10.0f, 1009, 1.42);
    scan(moe_erf, erf, 0.5f, 2.5f, 61, 1.42);
    check_ends(moe_erf);
}

/* tanh and erf are odd; every function works in place, at any length, on any alignment, and stays inside. */
static void test_array_forms(void) {
    static array_function *const all[] = {moe_exp, moe_log, moe_tanh, moe_erf};
    float x[104], y[104], one;
    for (size_t f = 0; f < 4; f++) {
        FOR_EACH_ISA(isa) {
            for (size_t n = 0; n <= 100; n++) {
                test_fill(x, 104, 0.01f, 9);
                memcpy(y, x, sizeof x);
                CHECK_OK(all[f](n, y + 1, y + 1));
                CHECK_BITS(y[0], x[0]);
                CHECK_SAME(y + n + 1, x + n + 1, 103 - n);
                for (size_t i = 1; i <= n; i++) {
                    CHECK_OK(all[f](1, x + i, &one));
                    CHECK_BITS(y[i], one);
                    if (f < 2) continue;
                    float minus = -x[i];
                    CHECK_OK(all[f](1, &minus, &minus));
                    CHECK_BITS(minus, -one);
                }
            }
        }
        CHECK_OK(all[f](0, NULL, NULL));
        CHECK_STATUS(all[f](1, NULL, y), MOE_E_NULL_X);
        CHECK_STATUS(all[f](1, x, NULL), MOE_E_NULL_Y);
    }
}

/* ---- random ---- */

/* Known answers of Random123 1.14 (kat_vectors, philox4x32 with 10 rounds). */
static void test_philox_known_answers(void) {
    static const struct { uint64_t key, lo, hi; uint32_t out[4]; } known[] = {
        {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {UINT64_C(0x299f31d0a4093822), UINT64_C(0x85a308d3243f6a88), UINT64_C(0x0370734413198a2e),
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    for (size_t i = 0; i < 3; i++) {
        uint32_t out[4];
        moe_philox(known[i].key, known[i].lo, known[i].hi, out);
        for (int j = 0; j < 4; j++) CHECK(out[j] == known[i].out[j]);
    }
}

enum { DRAWS = 200000 };
static float draw[DRAWS], again[DRAWS];

static void moments(const float *x, size_t n, double out[4]) {
    double mean = 0;
    for (size_t i = 0; i < n; i++) mean += (double)x[i] / (double)n;
    out[0] = mean, out[1] = out[2] = out[3] = 0;
    for (size_t i = 0; i < n; i++)
        for (int p = 1; p < 4; p++) out[p] += pow((double)x[i] - mean, p + 1) / (double)n;
}

/* Within five standard errors of the exact moments. */
static void test_uniform_statistics(void) {
    double m[4], n = DRAWS;
    CHECK_OK(moe_rand_uniform(7, 3, DRAWS, -1, 3, draw));
    moments(draw, DRAWS, m);
    CHECK_WITHIN(m[0], 1, 5 * sqrt(16 / 12.0 / n));
    CHECK_WITHIN(m[1], 16 / 12.0, 5 * sqrt((256 / 80.0 - 16 / 9.0) / n));
    size_t bin[64] = {0};
    for (size_t i = 0; i < DRAWS; i++) {
        if (!CHECK(draw[i] >= -1 && draw[i] < 3)) return;
        bin[(size_t)((draw[i] + 1) * 16)]++;
    }
    double chi2 = 0, serial = 0;
    for (int i = 0; i < 64; i++) chi2 += ((double)bin[i] - n / 64) * ((double)bin[i] - n / 64) / (n / 64);
    CHECK(chi2 > 63 - 5 * sqrt(126) && chi2 < 63 + 5 * sqrt(126));
    for (size_t i = 1; i < DRAWS; i++) serial += ((double)draw[i] - 1) * ((double)draw[i - 1] - 1) / n;
    CHECK_WITHIN(serial, 0, 5 * 16 / 12.0 / sqrt(n));
    CHECK_OK(moe_rand_uniform(7, 3, 4, 2.5f, 2.5f, draw));
    CHECK_BITS(draw[3], 2.5f);
}

static void test_normal_statistics(void) {
    double m[4], n = DRAWS, tail = 0;
    CHECK_OK(moe_rand_normal(8, 1, DRAWS, 2, 0.5f, draw));
    moments(draw, DRAWS, m);
    CHECK_WITHIN(m[0], 2, 5 * 0.5 / sqrt(n));
    CHECK_WITHIN(m[1], 0.25, 5 * 0.25 * sqrt(2 / n));
    CHECK_WITHIN(m[2] / pow(m[1], 1.5), 0, 5 * sqrt(6 / n));
    CHECK_WITHIN(m[3] / (m[1] * m[1]), 3, 5 * sqrt(24 / n));
    for (size_t i = 0; i < DRAWS; i++) tail += fabs((double)draw[i] - 2) > 1.5;
    CHECK_WITHIN(tail / n, 0.0026998, 5 * sqrt(0.0026998 / n));
    double serial = 0;
    for (size_t i = 1; i < DRAWS; i++) serial += ((double)draw[i] - 2) * ((double)draw[i - 1] - 2) / n;
    CHECK_WITHIN(serial, 0, 5 * 0.25 / sqrt(n));
}

/* Number i does not depend on how many are asked for, on the instruction set or on what came before. */
static void test_random_order(void) {
    static float prefix[DRAWS];
    CHECK_OK(moe_rand_uniform(5, 2, 1000, 0, 1, draw));
    CHECK_OK(moe_rand_normal(5, 2, 1000, 0, 1, again));
    FOR_EACH_ISA(isa) {
        for (size_t n = 0; n < 70; n++) {
            CHECK_OK(moe_rand_uniform(5, 2, n, 0, 1, prefix));
            CHECK_SAME(prefix, draw, n);
            CHECK_OK(moe_rand_normal(5, 2, n, 0, 1, prefix));
            CHECK_SAME(prefix, again, n);
        }
    }
    uint32_t early = moe_rand_u32(9, 9, 123456789);
    CHECK(moe_rand_u32(9, 9, 5) != moe_rand_u32(9, 9, 6));
    CHECK(moe_rand_u32(9, 9, 123456789) == early);
    CHECK(moe_rand_u32(9, 10, 5) != moe_rand_u32(9, 9, 5));
    CHECK(moe_rand_u32(10, 9, 5) != moe_rand_u32(9, 9, 5));
    CHECK(moe_rand_u32(9, 9, 5 + ((uint64_t)1 << 40)) != moe_rand_u32(9, 9, 5));
    CHECK(moe_rand_u32((uint64_t)1 << 40, 9, 5) != moe_rand_u32(0, 9, 5));
    CHECK(moe_rand_u32(9, (uint64_t)1 << 40, 5) != moe_rand_u32(9, 0, 5));
    /* streams are not shifted copies of each other */
    size_t equal = 0;
    for (uint64_t i = 0; i < 300; i++)
        for (uint64_t j = 0; j < 300; j++) equal += moe_rand_u32(1, 0, i) == moe_rand_u32(1, 1, j);
    CHECK(equal == 0);
}

static void test_random_arguments(void) {
    CHECK_OK(moe_rand_uniform(1, 1, 0, 0, 1, NULL));
    CHECK_OK(moe_rand_normal(1, 1, 0, 0, 1, NULL));
    CHECK_STATUS(moe_rand_uniform(1, 1, 3, 0, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_rand_normal(1, 1, 3, 0, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_rand_uniform(1, 1, 3, 1, 0, draw), MOE_E_RANGE);
    CHECK_STATUS(moe_rand_uniform(1, 1, 3, NAN, 0, draw), MOE_E_RANGE);
    CHECK_STATUS(moe_rand_uniform(1, 1, 3, 0, INFINITY, draw), MOE_E_RANGE);
    CHECK(moe_rand_normal(1, 1, 3, 0, NAN, draw) != MOE_OK);
    CHECK(moe_rand_normal(1, 1, 3, INFINITY, 1, draw) != MOE_OK);
}

/* ---- hash ---- */
static int compare_u64(const void *x, const void *y) {
    uint64_t p = *(const uint64_t *)x, q = *(const uint64_t *)y;
    return p < q ? -1 : p > q;
}

static void test_hash(void) {
    enum { N = 300 };
    unsigned char text[N + 8];
    uint64_t h[N * 8 + N + 3];
    size_t count = 0;
    double flips = 0;
    for (size_t i = 0; i < N + 8; i++) text[i] = (unsigned char)test_u32();
    h[count++] = moe_hash(0, text, 200);
    h[count++] = moe_hash(1, text, 200);
    h[count++] = moe_hash((uint64_t)1 << 63, text, 200);
    for (size_t bit = 0; bit < 200 * 8; bit++) { /* every single bit matters, and turns about half of the bits over */
        text[bit / 8] ^= (unsigned char)(1 << bit % 8);
        h[count] = moe_hash(0, text, 200);
        for (uint64_t d = h[count] ^ h[0]; d; d &= d - 1) flips++;
        count++;
        text[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    CHECK_WITHIN(flips / 1600, 32, 0.5);
    unsigned char zero[N] = {0};
    for (size_t n = 0; n < N; n++) h[count++] = moe_hash(0, zero, n); /* the length matters */
    qsort(h, count, sizeof *h, compare_u64);
    for (size_t i = 1; i < count; i++) CHECK(h[i] != h[i - 1]);

    unsigned char moved[N + 8]; /* alignment and instruction set do not */
    uint64_t whole = moe_hash(3, text, N);
    for (size_t shift = 0; shift < 8; shift++) {
        memcpy(moved + shift, text, N);
        FOR_EACH_ISA(isa) CHECK(moe_hash(3, moved + shift, N) == whole);
    }
    CHECK(moe_hash(3, NULL, 0) == moe_hash(3, text, 0));
}

int main(void) {
    RUN(test_exp);
    RUN(test_log);
    RUN(test_tanh);
    RUN(test_erf);
    RUN(test_array_forms);
    RUN(test_philox_known_answers);
    RUN(test_uniform_statistics);
    RUN(test_normal_statistics);
    RUN(test_random_order);
    RUN(test_random_arguments);
    RUN(test_hash);
    return test_end();
}
