/* rates.h: series made from each law with noise are judged by the law that made them; and the fits by hand. */
#include "test.h"

#include "examples/common/rates.h"

enum { N = 25 };
static double step_at[N], loss[N];

static double noise(uint64_t seed, size_t i, float size) {
    float z;
    if (moe_rand_normal(seed, i, 1, 0, size, &z) != MOE_OK) exit(1);
    return exp((double)z);
}

static void steps(double total) {
    for (size_t i = 0; i < N; i++) step_at[i] = (double)(i + 1) * total / N;
}

/* Each law at several numbers and seeds, with a noise of 1% to 5%. */
static void test_laws(void) {
    static const double fall[] = {2, 5, 12}, begin[] = {0, 20, 100, 300}; /* nats in all; t0 */
    steps(1000);
    for (uint64_t seed = 0; seed < 40; seed++) {
        float size = 0.01f * (float)(1 + seed % 5);
        for (int k = 0; k < 3; k++) {
            for (size_t i = 0; i < N; i++) loss[i] = 0.4 * exp(-fall[k] * step_at[i] / 1000) * noise(seed, i, size);
            verdict r = rate_judge(step_at, loss, N);
            CHECK(r.linear && strstr(r.why, "yes: "));
            CHECK(fabs(r.slope + fall[k] / 1000) < 5 * (double)size / 1443); /* the slope's deviation */
        }
        for (int k = 0; k < 4; k++) {
            for (size_t i = 0; i < N; i++) loss[i] = 30 / (begin[k] + step_at[i]) * noise(seed + 100, i, size);
            verdict r = rate_judge(step_at, loss, N);
            CHECK(!r.linear && strstr(r.why, "no: "));
            CHECK(r.slow > 0.95);
        }
    }
}

/* A slow law that a line explains to over 95%, better than a power of the step does: what R^2 against a power called
 * linear. */
static void test_slow_but_straight(void) {
    steps(1000);
    for (size_t i = 0; i < N; i++) loss[i] = 300 / (800 + step_at[i]);
    verdict r = rate_judge(step_at, loss, N);
    CHECK(r.line > 0.95 && r.slow > r.line && !r.linear && strstr(r.why, "the slower law fits better"));
    CHECK_NEAR(r.slow, 1, 1e-6);
    CHECK(fabs(r.t0 - 800) < 10); /* of the grid */
}

/* What decides is named; a series that both laws fit alike is not told. */
static void test_reasons(void) {
    steps(100);
    for (size_t i = 0; i < N; i++) loss[i] = 0.1 * exp(0.02 * step_at[i]);
    CHECK(strstr(rate_judge(step_at, loss, N).why, "does not fall"));
    for (size_t i = 0; i < N; i++) loss[i] = 0.3;
    verdict r = rate_judge(step_at, loss, N);
    CHECK(!r.linear && strstr(r.why, "does not fall"));
    for (size_t i = 0; i < N; i++) loss[i] = exp(-0.0005 * step_at[i]) * noise(5, i, 0.3f);
    r = rate_judge(step_at, loss, N);
    CHECK(!r.linear && r.line < 0.95 && (strstr(r.why, "not over 95%") || strstr(r.why, "does not fall")));
    for (size_t i = 0; i < N; i++) loss[i] = exp(-0.001 * step_at[i]) * noise(7, i, 0.003f); /* a tenth of a nat */
    r = rate_judge(step_at, loss, N);
    CHECK(!r.linear && r.line > 0.95 && strstr(r.why, "not told"));
    for (size_t i = 0; i < N; i++) loss[i] = 0; /* below any number: no trouble */
    CHECK(!rate_judge(step_at, loss, N).linear);
}

/* Three points by hand: log loss 0, -1, -4 at 1, 2, 3. The line: slope -2, leaves 2/3 of 26/3. */
static void test_by_hand(void) {
    static const double at[] = {1, 2, 3};
    double value[] = {1, exp(-1), exp(-4)}, about, slope, log_loss[] = {0, -1, -4};
    CHECK_NEAR(rate_line_left(at, log_loss, 3, &slope, &about), 2.0 / 3, 1e-12);
    CHECK_NEAR(slope, -2, 1e-12);
    CHECK_NEAR(about, 26.0 / 3, 1e-12);
    CHECK_NEAR(rate_judge(at, value, 3).line, 12.0 / 13, 1e-12);
    double two[] = {log(1.0 / 6), log(1.0 / 7), log(1.0 / 8)}; /* 1 / (5 + step) */
    CHECK_NEAR(rate_slow_left(at, two, 3, 5), 0, 1e-20);
}

int main(void) {
    RUN(test_laws);
    RUN(test_slow_but_straight);
    RUN(test_reasons);
    RUN(test_by_hand);
    return test_end();
}
