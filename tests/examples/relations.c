/* relations.h on what dumps rarely have: rows that are tokens in one dump alone, missing first choices, labels that are
 * none, batches. (Whole dumps: inspect.sh.) */
#include "test.h"

#include "examples/common/relations.h"

static void test_overlap(void) {
    /*                         both      neither    a alone    b alone   no first choice in both */
    static const int32_t a[] = {0, 1,    -1, -1,    2, 0,      -1, -1,   -1, 2};
    static const int32_t b[] = {1, 0,    -1, -1,    -1, -1,    2, 1,     -1, 2};
    relation_overlap o = relation_overlap_of(5, 3, 2, a, b);
    CHECK(o.tokens == 2);
    CHECK_NEAR(o.top1, 0, 1e-15); /* 0 and 1 differ, and no choice is no equal choice */
    CHECK_NEAR(o.topk, 3.0 / 4, 1e-15);
    CHECK_NEAR(o.chance_top1, 0, 1e-15);       /* first choices: 0 in one, 1 in the other */
    CHECK_NEAR(o.chance_topk, 3.0 / 8, 1e-15); /* each expert once in both: 3 / (2 x 2 x 2) */
    o = relation_overlap_of(5, 3, 2, a, a);
    CHECK(o.tokens == 3);
    CHECK_NEAR(o.top1, 2.0 / 3, 1e-15);
    CHECK_NEAR(o.topk, 5.0 / 6, 1e-15);
}

static void test_together(void) {
    static const int32_t index[] = {0, 1, 0, 1, 0, 2, -1, -1, 2, -1};
    uint64_t count[16];
    double expected[16], ratio[16]; /* n = 3, 2, 2, 0; pairs 2 + 1 = 3; products 6 + 6 + 4 = 16 */
    relation_together(5, 4, 2, index, count, expected, ratio);
    CHECK(count[1] == 2 && count[2] == 1 && count[10] == 2);
    CHECK_NEAR(expected[1], 18.0 / 16, 1e-15);
    CHECK_NEAR(ratio[1], 32.0 / 18, 1e-15);
    CHECK_NEAR(ratio[8], 16.0 / 18, 1e-15);
    CHECK_NEAR(ratio[6], 0, 1e-15);
    CHECK(isnan(ratio[0]) && isnan(ratio[3]));
}

enum { N = 2000, BATCHES = 40 };

static void test_information(void) {
    static int32_t a[N], b[N];
    static uint32_t batch[N];
    size_t held = 0, trials = 60;
    for (uint64_t seed = 0; seed < trials; seed++) { /* b = a with a chance of 1/2 + 1/2 x 1/4, else another of four */
        for (size_t i = 0; i < N; i++) {
            a[i] = (int32_t)(moe_rand_u32(seed, 1, i) % 4);
            b[i] = moe_rand_u32(seed, 2, i) % 2 ? a[i] : (int32_t)(moe_rand_u32(seed, 3, i) % 4);
            batch[i] = (uint32_t)(i * BATCHES / N);
        }
        double truth = log(4.0) + 0.625 * log(0.625) + 0.375 * log(0.125);
        relation_information r = relation_inform(N, a, 1, b, 1, batch, BATCHES, 200, seed);
        CHECK(r.pairs == N && fabs(r.nats - truth) < 0.08);
        CHECK(r.lo < r.nats && r.nats < r.hi);
        held += r.lo <= truth && truth <= r.hi;
    }
    CHECK(held * 100 >= trials * 85); /* 95% of many */
    for (size_t i = 0; i < N; i++) b[i] = i % 2 ? a[i] : -1;
    relation_information half = relation_inform(N, a, 1, b, 1, batch, BATCHES, 0, 1);
    CHECK(half.pairs == N / 2 && isnan(half.lo));
    CHECK_NEAR(half.share, 1, 1e-12); /* all of it */
    for (size_t i = 0; i < N; i++) b[i] = -1;
    CHECK(isnan(relation_inform(N, a, 1, b, 1, batch, BATCHES, 10, 1).nats));
}

/* Two batches, one with all of the information and one with none: drawn are one of them twice, or both. */
static void test_batches(void) {
    static int32_t a[N], b[N];
    static uint32_t batch[N];
    for (size_t i = 0; i < N; i++) {
        batch[i] = i >= N / 2;
        a[i] = i % 2;
        b[i] = batch[i] ? a[i] : (int32_t)(i / 2 % 2);
    }
    relation_information r = relation_inform(N, a, 1, b, 1, batch, 2, 400, 1);
    CHECK_NEAR(r.hi - r.lo, log(2.0), 2e-3); /* from nothing to ln 2, but for the correction */
}

/* Independent pairs: the correction makes the mean 0, which without it would be 9 / (2 N). */
static void test_no_information(void) {
    static int32_t a[N], b[N];
    static uint32_t batch[N];
    double mean = 0;
    for (uint64_t seed = 0; seed < 200; seed++) {
        for (size_t i = 0; i < N; i++) {
            a[i] = (int32_t)(moe_rand_u32(seed, 4, i) % 4);
            b[i] = (int32_t)(moe_rand_u32(seed, 5, i) % 4);
        }
        mean += relation_inform(N, a, 1, b, 1, batch, 1, 0, 1).nats / 200;
    }
    CHECK(fabs(mean) < 4.5 / N / 8); /* its deviation: sqrt(18) / (2 N sqrt(200)) = 0.15 / N */
}

int main(void) {
    RUN(test_overlap);
    RUN(test_together);
    RUN(test_information);
    RUN(test_batches);
    RUN(test_no_information);
    return test_end();
}
