/* Sizes that do not fit, the bits of a float, and what counts as a number. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"

static void test_sizes(void) {
    size_t product = 5;
    CHECK(moe__mul(3, 4, &product) && product == 12);
    CHECK(moe__mul(0, SIZE_MAX, &product) && product == 0);
    CHECK(moe__mul(SIZE_MAX, 1, &product) && product == SIZE_MAX);
    CHECK(!moe__mul(SIZE_MAX / 2 + 1, 2, &product) && product == SIZE_MAX); /* left alone */
    CHECK(!moe__mul(SIZE_MAX, SIZE_MAX, &product));
    for (size_t i = 0; i < 1000; i++) {
        size_t a = test_below(100), b = 1 + test_below(10);
        CHECK(moe__ceil_div(a, b) * b >= a && (a == 0 || (moe__ceil_div(a, b) - 1) * b < a));
        CHECK(moe__min(a, b) + moe__max(a, b) == a + b && moe__min(a, b) <= moe__max(a, b));
    }
    CHECK(moe__ceil_div(SIZE_MAX, 2) == SIZE_MAX / 2 + 1);
}

static void test_bits_of_a_float(void) {
    CHECK(moe__bits_of(1.0f) == 0x3f800000u && moe__bits_of(-0.0f) == 0x80000000u);
    for (size_t i = 0; i < 10000; i++) {
        uint32_t bits = test_u32();
        float value = moe__float_of(bits);
        if (value == value) CHECK(moe__bits_of(value) == bits);
        CHECK(moe__finite(value) == (isfinite(value) != 0));
    }
}

static void test_finite(void) {
    float x[40];
    test_fill(x, 40, -1e30f, 1e30f);
    CHECK(moe__all_finite(40, x) && moe__all_finite(0, x) && !moe__any_nan(40, x));
    for (size_t i = 0; i < 40; i++) { /* wherever it stands */
        float keep = x[i];
        x[i] = i % 2 ? INFINITY : -INFINITY;
        CHECK(!moe__all_finite(40, x) && !moe__any_nan(40, x));
        x[i] = NAN;
        CHECK(!moe__all_finite(40, x) && moe__any_nan(40, x));
        x[i] = keep;
    }
    CHECK(moe__finite_double(-DBL_MAX) && !moe__finite_double((double)INFINITY) && !moe__finite_double((double)NAN));
}

static void test_logarithm_of_one(void) { /* the bits of moe_log */
    float x[500], y[500];
    for (size_t i = 0; i < 500; i++) x[i] = ldexpf(1 + test_uniform(0, 1), (int)test_below(250) - 125);
    CHECK_OK(moe_log(500, x, y));
    for (size_t i = 0; i < 500; i++) CHECK_BITS(moe__logf1(x[i]), y[i]);
}

int main(void) {
    RUN(test_sizes);
    RUN(test_bits_of_a_float);
    RUN(test_finite);
    RUN(test_logarithm_of_one);
    return test_end();
}
