/* exp, log, tanh, erf against libm's double functions, on every instruction set. */
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
            if (begun && !CHECK_SAME(y, first, n))
                printf("        with %s, from x = %a\n", moe_isa_name(isa), (double)x[0]);
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

int main(void) {
    RUN(test_exp);
    RUN(test_log);
    RUN(test_tanh);
    RUN(test_erf);
    RUN(test_array_forms);
    return test_end();
}
