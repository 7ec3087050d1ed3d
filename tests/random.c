/* Philox against its published answers, the distributions, the hash. */
#include "test.h"

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
    /* of the bytes 1, 2, 3 ... and seed 5, computed in Python from the description; checksums stand in documents */
    static const struct { size_t n; uint64_t hash; } known[] = {
        {0, UINT64_C(0x89f5054dbb632d80)}, {1, UINT64_C(0xe95a38f9aee93af4)}, {7, UINT64_C(0x350c99315a2bfd6a)},
        {31, UINT64_C(0x4ef6b685e9b0c1b9)}, {47, UINT64_C(0xc20c1e921be51fe2)}};
    for (size_t i = 0; i < N; i++) text[i] = (unsigned char)(i + 1);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) CHECK(moe_hash(5, text, known[i].n) == known[i].hash);
}

/* levels 0: uniform; else few values, so many ties, 0 of both signs, and some -infinity */
static float log_of(float x) { /* as the generator does it */
    CHECK_OK(moe_log(1, &x, &x));
    return x;
}

/* ---- Gumbel ---- */
static void test_gumbel(void) {
    enum { N = 200000 };
    float *g = test_floats(N), part[5];
    double mean = 0, square = 0;
    CHECK_OK(moe_gumbel(5, 9, N, g));
    CHECK_OK(moe_gumbel(5, 9, 5, part));
    CHECK_SAME(part, g, 5); /* number i is number i */
    for (size_t i = 0; i < N; i++) {
        double u = ((double)(moe_rand_u32(5, 9, i) >> 9) + 0.5) / 8388608.0;
        CHECK_WITHIN(g[i], -log(-log(u)), 2e-6);
        mean += (double)g[i] / N, square += (double)g[i] * (double)g[i] / N;
    }
    CHECK_WITHIN(mean, 0.5772156649, 0.01);                       /* Euler's constant */
    CHECK_WITHIN(square - mean * mean, 1.644934067, 0.03);        /* pi^2 / 6 */
    /* the ends of its range, computed as it does */
    CHECK(isfinite(-log_of(-log_of(0x1p-24f))) && isfinite(-log_of(-log_of(1 - 0x1p-24f))));
    CHECK_WITHIN(-log_of(-log_of(1 - 0x1p-24f)), -log(-log(1 - 0x1p-24)), 2e-6);
    CHECK_STATUS(moe_gumbel(1, 1, 1, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_gumbel(1, 1, 0, NULL));
    /* argmax of logits + gumbel samples the softmax */
    const float logit[3] = {0, 1, 2};
    double count[3] = {0}, total = exp(0) + exp(1) + exp(2);
    for (size_t i = 0; i + 3 <= N; i += 3) {
        size_t best = 0;
        for (size_t e = 1; e < 3; e++)
            if (logit[e] + g[i + e] > logit[best] + g[i + best]) best = e;
        count[best]++;
    }
    for (int e = 0; e < 3; e++) CHECK_WITHIN(count[e] * 3 / N, exp((double)logit[e]) / total, 0.01);
    free(g);
}

int main(void) {
    CHECK(test_live_blocks == 0);
    RUN(test_philox_known_answers);
    RUN(test_uniform_statistics);
    RUN(test_normal_statistics);
    RUN(test_random_order);
    RUN(test_random_arguments);
    RUN(test_hash);
    RUN(test_gumbel);
    return test_end();
}
