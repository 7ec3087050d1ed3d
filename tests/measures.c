/* Measures of index arrays, tiers and labels, ecology, similarity of outputs, one pass over logits, the scan of
 * temperatures. */
#include "test.h"
#include "routing.h"

/* ---- measures of index arrays ---- */
/* By hand: 7 tokens at home on ranks 0 0 0 1 1 2 2; of 6 experts 0, 1 on rank 0, 2, 3 on 1, 4, 5 on 2. */
static void test_crossing_uneven(void) {
    static const int32_t home[7] = {0, 1, 0, 2, 3, 4, 5}, third[7] = {0, 0, 0, 0, 0, 0, 0};
    static const int32_t two[14] = {0, 2, 1, -1, 4, 5, 2, 3, 1, 3, -1, -1, 5, 0}; /* 5 of 11 leave */
    static const int32_t five[5] = {0, 1, 1, 2, 2};
    double share;
    CHECK_OK(moe_crossing(7, 6, 1, 3, home, &share));
    CHECK(share == 0);
    CHECK_OK(moe_crossing(7, 6, 1, 3, third, &share));
    CHECK_NEAR(share, 4 / 7.0, 1e-15);
    CHECK_OK(moe_crossing(7, 6, 2, 3, two, &share));
    CHECK_NEAR(share, 5 / 11.0, 1e-15);
    CHECK_OK(moe_crossing(5, 4, 1, 2, five, &share)); /* ranks 0 0 0 1 1; experts 0, 1 on rank 0 */
    CHECK(share == 0);
    CHECK_OK(moe_crossing(2, 3, 1, 3, five, &share)); /* fewer tokens than ranks: on ranks 0 and 1 */
    CHECK(share == 0);
}
/* A choice that is no expert, by every function that counts choices; nothing is counted then. */
static void refused(void) {
    uint32_t work[8] = {0}, label[1] = {0};
    uint64_t count[64] = {0}, wide[8];
    uint8_t correct[1] = {1};
    float loss[1] = {1};
    double number = -1, sum[8] = {0};
    moe_repeats repeats;
    int32_t beyond[2] = {0, 7};
    CHECK_STATUS(moe_seu(1, 7, 2, 1, beyond, work, &number), MOE_E_INDEX);
    CHECK_STATUS(moe_seu(1, 8, 2, 1, beyond, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_coselect(1, 7, 2, beyond, count), MOE_E_INDEX);
    CHECK_STATUS(moe_coselect(1, 8, 2, beyond, NULL), MOE_E_NULL_COUNT);
    CHECK_STATUS(moe_crossing(1, 7, 2, 7, beyond, &number), MOE_E_INDEX);
    CHECK_STATUS(moe_crossing(1, 8, 2, 8, beyond, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_loss_by_expert(1, 7, 2, beyond, loss, sum), MOE_E_INDEX);
    CHECK_STATUS(moe_loss_by_expert(1, 8, 2, beyond, loss, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_right_by_expert(1, 7, 2, beyond, correct, count), MOE_E_INDEX);
    CHECK_STATUS(moe_right_by_expert(1, 8, 2, beyond, NULL, count), MOE_E_NULL_LABEL);
    CHECK_STATUS(moe_label_by_expert(1, 7, 2, 1, beyond, label, count), MOE_E_INDEX);
    CHECK_STATUS(moe_label_by_expert(1, 8, 2, 1, beyond, NULL, count), MOE_E_NULL_LABEL);
    CHECK_STATUS(moe_label_by_expert(1, 8, 2, 1, beyond, label, NULL), MOE_E_NULL_COUNT);
    CHECK_STATUS(moe_repetition(1, 7, 2, 7, beyond, wide, &repeats), MOE_E_INDEX);
    CHECK_STATUS(moe_repetition(1, 8, 2, 8, beyond, wide, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_churn(1, 2, beyond, NULL, &number), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_churn(1, 2, NULL, beyond, &number), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_churn(1, 2, beyond, beyond, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_churn(1, 0, beyond, beyond, &number), MOE_E_TOP_K);
    CHECK(number == -1 && count[0] == 0 && sum[0] == 0);
    const int32_t nobody[4] = {-1, -1, -1, -1}, some[4] = {-1, 3, 3, -1};
    CHECK_STATUS(moe_crossing(2, 8, 2, 2, nobody, &number), MOE_E_NO_TOKENS);
    CHECK_OK(moe_crossing(0, 8, 2, 2, NULL, &number));
    CHECK(number == 0);
    CHECK_OK(moe_crossing(2, 8, 2, 2, some, &number)); /* expert 3 is on rank 0, where token 0 is and 1 is not */
    CHECK(number == 0.5);
    CHECK_OK(moe_churn(2, 2, some, some, &number)); /* no choice is the same as no other */
    CHECK(number == 0);
    CHECK_OK(moe_repetition(2, 8, 2, 2, some, wide, &repeats));
    CHECK(wide[0] == 2 && wide[1] == 0 && repeats.jaccard == 1 && repeats.longest == 2);
}
static void test_index_measures(void) {
    enum { T = 60, E = 9, K = 3 };
    int32_t index[T * K], after[T * K];
    uint32_t work[E];
    uint64_t count[E * E] = {0}, ref[E * E] = {0};
    double seu, share;
    for (int round = 0; round < 50; round++) {
        size_t sequence = 1 + test_below(T + 5), ranks = 1 + test_below(4), sequences = 0, crossed = 0, routes = 0,
               changed = 0, tokens = 0;
        double used = 0;
        random_index(index, T, E, K, round % 2 ? 6 : 0);
        CHECK_OK(moe_seu(T, E, K, sequence, index, work, &seu));
        for (size_t begin = 0; begin < T; begin += sequence, sequences++)
            for (int e = 0; e < E; e++) {
                int seen = 0;
                for (size_t t = begin; t < begin + sequence && t < T; t++)
                    for (int i = 0; i < K; i++) seen |= index[t * K + (size_t)i] == e;
                used += seen;
            }
        CHECK_NEAR(seu, used / (double)(sequences * E), 2e-15);
        CHECK_OK(moe_coselect(T, E, K, index, count));
        for (int t = 0; t < T; t++)
            for (int a = 0; a < E; a++)
                for (int b = 0; b < E; b++) {
                    int has_a = 0, has_b = 0;
                    for (int i = 0; i < K; i++) has_a |= index[t * K + i] == a, has_b |= index[t * K + i] == b;
                    ref[a * E + b] += (uint64_t)(has_a && has_b);
                }
        CHECK(!memcmp(count, ref, sizeof ref));
        size_t n = T - test_below(10); /* ranks need not divide the tokens, nor the experts */
        CHECK_OK(moe_crossing(n, E, K, ranks, index, &share));
        for (size_t t = 0; t < n; t++)
            for (int i = 0; i < K; i++) {
                int32_t e = index[t * K + (size_t)i];
                if (e < 0) continue;
                routes++;
                crossed += t * ranks / n != (size_t)e * ranks / E;
            }
        CHECK_NEAR(share, (double)crossed / (double)routes, 2e-15);
        if (ranks == 1) CHECK(share == 0);
        memcpy(after, index, sizeof index); /* churn: some tokens are shuffled only, some get another set */
        for (size_t t = 0; t < T; t++) {
            size_t a = t * K + test_below(K), b = t * K + test_below(K), chosen = 0;
            int32_t keep = after[a];
            after[a] = after[b], after[b] = keep;
            for (size_t i = 0; i < K; i++) chosen |= index[t * K + i] >= 0;
            tokens += chosen;
            if (test_below(3) || !chosen) continue;
            int32_t other = (int32_t)test_below(E), known = 0;
            for (size_t i = 0; i < K; i++) known |= after[t * K + i] == other;
            if (known) continue;
            after[a] = other;
            changed++;
        }
        CHECK_OK(moe_churn(T, K, index, after, &share));
        CHECK_NEAR(share, (double)changed / (double)tokens, 2e-15);
        CHECK_OK(moe_churn(T, K, after, index, &share));
        CHECK_NEAR(share, (double)changed / (double)tokens, 2e-15);
    }
    static const int32_t full[] = {0, 1}, half[] = {0, -1}; /* one fewer is another set, both ways */
    CHECK_OK(moe_churn(1, 2, full, half, &share));
    CHECK(share == 1);
    CHECK_OK(moe_churn(1, 2, half, full, &share));
    CHECK(share == 1);
    static const int32_t twice[2] = {3, 3}, once[2] = {3, -1}, other[2] = {3, 5}; /* a set: how often does not count */
    CHECK_OK(moe_churn(1, 2, twice, once, &share));
    CHECK(share == 0);
    CHECK_OK(moe_churn(1, 2, twice, twice, &share));
    CHECK(share == 0);
    CHECK_OK(moe_churn(1, 2, twice, other, &share));
    CHECK(share == 1);
    CHECK_OK(moe_churn(1, 2, other, twice, &share));
    CHECK(share == 1);
    CHECK_OK(moe_churn(0, 2, NULL, NULL, &share));
    CHECK(share == 0);
    CHECK_OK(moe_seu(0, E, K, 4, NULL, work, &seu));
    CHECK(seu == 0);
    index[0] = index[1] = 2;
    CHECK_STATUS(moe_coselect(1, E, K, index, count), MOE_E_INDEX_TWICE);
    index[1] = E;
    CHECK_STATUS(moe_coselect(1, E, K, index, count), MOE_E_INDEX);
    CHECK_STATUS(moe_coselect(1, E, E + 1, index, count), MOE_E_TOP_K);
    CHECK_STATUS(moe_coselect(1, 0, 1, index, count), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_coselect(SIZE_MAX, E, K, index, count), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_coselect(1, E, K, NULL, count), MOE_E_NULL_INDEX);
    refused();
    CHECK_STATUS(moe_seu(T, E, K, 0, after, work, &seu), MOE_E_SEQUENCE);
    CHECK_STATUS(moe_seu(T, E, K, 1, after, NULL, &seu), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_crossing(T, E, K, 0, after, &share), MOE_E_N_RANKS);
}

/* Rows without a choice are no tokens: the measures are those of the other rows. */
static void test_padding(void) {
    enum { T = 90, E = 6, K = 2, S = 3 };
    int32_t before[T * K], after[T * K], padded[2][2 * T * K], none[T * K];
    uint32_t label[T], wide[2 * T], work[E];
    uint64_t count[E * 4], other[E * 4];
    double plain, with;
    for (int i = 0; i < T * K; i++) none[i] = -1 - i % 3;
    for (int round = 0; round < 20; round++) {
        size_t n = 0;
        random_index(before, T, E, K, 0);
        random_index(after, T, E, K, round % 2 ? 5 : 0);
        memset(count, 0, sizeof count), memset(other, 0, sizeof other);
        memset(padded, 0xff, sizeof padded);
        for (size_t t = 0; t < T; t++) {
            label[t] = (uint32_t)test_below(4);
            for (; n < T + t && (round < 3 || test_below(2)); n++) wide[n] = (uint32_t)-100; /* padding's usual label */
            memcpy(padded[0] + n * K, before + t * K, K * sizeof *before);
            memcpy(padded[1] + n * K, after + t * K, K * sizeof *after);
            wide[n++] = label[t];
        }
        CHECK_OK(moe_churn(T, K, before, after, &plain));
        CHECK_OK(moe_churn(n, K, padded[0], padded[1], &with));
        CHECK(n > T && plain == with && plain > 0.5);
        CHECK_OK(moe_label_by_expert(T, E, K, 4, before, label, count));
        CHECK_OK(moe_label_by_expert(n, E, K, 4, padded[0], wide, other));
        CHECK(!memcmp(count, other, sizeof count));
        /* sequences of S rows keep their places: whole ones of padding do not count */
        memset(padded[1], 0xff, sizeof padded[1]);
        for (size_t t = 0; t < T; t++)
            memcpy(padded[1] + (t / S * 2 * S + t % S) * K, before + t * K, K * sizeof *before);
        CHECK_OK(moe_seu(T, E, K, S, before, work, &plain));
        CHECK_OK(moe_seu(2 * T, E, K, S, padded[1], work, &with));
        CHECK(plain == with);
    }
    with = 7;
    CHECK_STATUS(moe_churn(T, K, none, none, &with), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_seu(T, E, K, S, none, work, &with), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_crossing(T, E, K, S, none, &with), MOE_E_NO_TOKENS);
    CHECK(with == 7);
    CHECK_OK(moe_churn(T, K, none, before, &with)); /* what appears has changed */
    CHECK(with == 1);
}

/* ---- tiers, labels, ecology ---- */
static void test_tiers_and_labels(void) {
    static const uint32_t tier[] = {0, 0, 1, 2}, label[] = {1, 1, 0, 2, 1, 0};
    static const uint64_t load[] = {10, 20, 30, 40};
    static const int32_t index[] = {0, 1, 0, 2, 0, 3, 1, 0, 1, 2, -1, 2};
    static const uint8_t correct[] = {1, 0, 1, 1, 1, 1};
    static const float loss[] = {1, 2, 3, 4, 5, 6};
    uint64_t right[4] = {0}, count[12] = {0}, most[4];
    double share[4], sum[4] = {0};
    CHECK_OK(moe_tier_usage(4, 4, tier, load, share));
    CHECK_NEAR(share[0], 0.3, 2e-15);
    CHECK_NEAR(share[1], 0.3, 2e-15);
    CHECK_NEAR(share[2], 0.4, 2e-15);
    CHECK(share[3] == 0);
    CHECK_STATUS(moe_tier_usage(4, 2, tier, load, share), MOE_E_TIER);
    CHECK_OK(moe_right_by_expert(6, 4, 2, index, correct, right));
    CHECK(right[0] == 2 && right[1] == 2 && right[2] == 0 && right[3] == 0);
    CHECK_OK(moe_label_by_expert(6, 4, 2, 3, index, label, count));
    CHECK(count[0] == 1 && count[1] == 2 && count[2] == 0 && count[3] == 0 && count[4] == 1 && count[5] == 1 &&
          count[6] == 0);
    CHECK_OK(moe_label_majority(4, 3, count, most));
    CHECK(most[0] == 2 && most[1] == 1 && most[2] == 0);
    CHECK_STATUS(moe_label_by_expert(6, 4, 2, 2, index, label, count), MOE_E_LABEL);
    CHECK(count[1] == 2); /* nothing was added */
    static const uint32_t partly[6] = {0, (uint32_t)-100, (uint32_t)-1, 2, (uint32_t)INT32_MIN, 1};
    uint64_t labelled[12] = {0}, all = 0;
    CHECK_OK(moe_label_by_expert(6, 4, 2, 3, index, partly, labelled)); /* negative: no label */
    for (size_t i = 0; i < 12; i++) all += labelled[i];
    CHECK(labelled[(size_t)index[0] * 3] == 1 && all == (uint64_t)(1 + (index[6] >= 0) + (index[10] >= 0)));
    CHECK_OK(moe_loss_by_expert(6, 4, 2, index, loss, sum));
    CHECK(sum[0] == 1 + 2 + 3 + 4 && sum[1] == 1 + 4 + 5 && sum[2] == 2 + 5 + 6 && sum[3] == 3);
    CHECK_STATUS(moe_loss_by_expert(6, 4, 2, index, NULL, sum), MOE_E_NULL_LABEL);
    CHECK_STATUS(moe_right_by_expert(6, 4, 2, index, correct, NULL), MOE_E_NULL_COUNT);
}

static void test_ecology(void) {
    /* of 10000 first choices; borders belong to the better kind */
    static const uint64_t top1[] = {99, 100, 299, 100, 300, 300, 300, 300, 8202, 0},
                          right[] = {99, 24, 74, 25, 89, 90, 149, 150, 8202, 0};
    static const moe_ecology_kind want[] = {MOE_ECOLOGY_DEAD,       MOE_ECOLOGY_NOISE,     MOE_ECOLOGY_NOISE,
                                            MOE_ECOLOGY_EDGE,       MOE_ECOLOGY_WEAK_CORE, MOE_ECOLOGY_BROAD_CORE,
                                            MOE_ECOLOGY_BROAD_CORE, MOE_ECOLOGY_PURE_CORE, MOE_ECOLOGY_PURE_CORE,
                                            MOE_ECOLOGY_DEAD};
    moe_ecology_kind got[10];
    CHECK_OK(moe_ecology_classes(10, top1, right, got));
    for (int e = 0; e < 10; e++) CHECK(got[e] == want[e]);
    static const uint64_t none[10] = {0};
    CHECK_OK(moe_ecology_classes(10, none, none, got));
    CHECK(got[3] == MOE_ECOLOGY_DEAD);
    CHECK(!strcmp(moe_ecology_name(MOE_ECOLOGY_PURE_CORE), "PURE_CORE") &&
          !strcmp(moe_ecology_name(MOE_ECOLOGY_DEAD), "DEAD"));
    CHECK(moe_ecology_name(MOE_ECOLOGY_COUNT) == NULL && moe_ecology_name((moe_ecology_kind)-1) == NULL);
    CHECK_STATUS(moe_ecology_classes(10, top1, NULL, got), MOE_E_NULL_COUNT);

    CHECK_NEAR(moe_ecology_number(2, 0.3, 0.25, 0.85), 0.6 / 1.1, 1e-15);
    CHECK(moe_ecology_number(1, 0, 0, 0.4) == 0);
    CHECK(moe_ecology_number(1, 0.1, 0, 0) == INFINITY && moe_ecology_number(1, 0, 0, 0) == INFINITY);
    CHECK(isnan(moe_ecology_number(-1, 1, 1, 1)) && isnan(moe_ecology_number(1, 1, -1, 2)) &&
          isnan(moe_ecology_number(NAN, 1, 1, 1)));
    CHECK(isnan(moe_ecology_number(1, INFINITY, 1, 1)));
}

/* ---- similarity ---- */
static void test_pes(void) {
    enum { T = 7, E = 5, D = 6 };
    float o[T * E * D];
    double work[E], pes, want = 0;
    test_fill(o, T * E * D, -1, 1);
    for (int i = 0; i < D; i++) o[(2 * E + 3) * D + i] = 0; /* a zero expert for one token */
    for (int t = 0; t < T; t++)
        for (int i = 0; i < E; i++)
            for (int j = 0; j < i; j++) {
                double a = 0, b = 0, c = 0;
                for (int d = 0; d < D; d++) {
                    double x = (double)o[(t * E + i) * D + d], y = (double)o[(t * E + j) * D + d];
                    a += x * x, b += y * y, c += x * y;
                }
                want += a > 0 && b > 0 ? c / sqrt(a * b) * 2 / (E * (E - 1)) / T : 0;
            }
    CHECK_OK(moe_pes(T, E, D, o, work, &pes));
    CHECK_WITHIN(pes, want, 2e-15);
    for (int e = 0; e < E; e++)
        for (int d = 0; d < D; d++) o[e * D + d] = (float)(e + 1) * 1e-30f; /* all alike, whatever their length */
    CHECK_OK(moe_pes(1, E, D, o, work, &pes));
    CHECK_WITHIN(pes, 1, 5e-15);
    CHECK_OK(moe_pes(T, 1, D, o, work, &pes));
    CHECK(pes == 0);
    CHECK_OK(moe_pes(0, E, D, NULL, work, &pes));
    CHECK(pes == 0);
    o[3] = NAN;
    CHECK_STATUS(moe_pes(T, E, D, o, work, &pes), MOE_E_NAN_X);
    CHECK_STATUS(moe_pes(T, E, 0, o, work, &pes), MOE_E_D_MODEL);
    CHECK_STATUS(moe_pes(SIZE_MAX, E, D, o, work, &pes), MOE_E_OVERFLOW);
}

/* ---- one pass over logits ---- */
static void test_topk_count(void) {
    enum { MOST = 200, WIDE = 150 };
    static float z[MOST * WIDE];
    static int32_t index[MOST * WIDE];
    uint64_t load[WIDE], top1[WIDE], want[WIDE], first[WIDE];
    double sum[WIDE], total[WIDE], first_sum[WIDE];
    for (int round = 0; round < (TEST_SANITIZED ? 60 : 300); round++) {
        size_t T = test_below(MOST + 1), E = 1 + test_below(round % 2 ? WIDE : 40), k = 1 + test_below(E < 12 ? E : 12),
               bytes = 0;
        if (round % 7 == 0) k = E;
        if (round % 5 == 0) T = 64;
        /* many ties */
        for (size_t i = 0; i < T * E; i++) z[i] = round % 3 ? test_uniform(-4, 4) : (float)test_below(6) / 4 - 1;
        memset(want, 0, sizeof want), memset(first, 0, sizeof first), memset(total, 0, sizeof total);
        CHECK_OK(moe_topk(T, E, k, z, index, NULL));
        for (size_t t = 0; t < T; t++) {
            for (size_t i = 0; i < k; i++) want[index[t * k + i]]++;
            first[index[t * k]]++;
            for (size_t e = 0; e < E; e++) total[e] += (double)z[t * E + e];
        }
        CHECK_OK(moe_topk_count_scratch(E, k, &bytes));
        void *work = test_memory(bytes, 1);
        int isa = 0;
        FOR_EACH_ISA(i) {
            (void)i;
            for (size_t e = 0; e < E; e++) load[e] = 3, top1[e] = 5, sum[e] = 0;
            CHECK_OK(moe_topk_count(T, E, k, z, load, top1, sum, work, bytes));
            int bad = 0;
            for (size_t e = 0; e < E; e++)
                bad += load[e] != want[e] + 3 || top1[e] != first[e] + 5 ||
                       !CHECK_WITHIN(sum[e], total[e], 2e-15 * (1 + fabs(total[e])));
            if (!CHECK(bad == 0)) printf("        T %zu E %zu k %zu\n", T, E, k);
            if (!isa++)
                memcpy(first_sum, sum, sizeof sum); /* the same bits of the sums on every instruction set */
            else
                CHECK(!memcmp(first_sum, sum, E * sizeof *sum));
        }
        free(work);
    }
    size_t bytes = 0;
    CHECK_OK(moe_topk_count_scratch(4, 2, &bytes));
    void *work = test_memory(bytes, 1);
    for (int i = 0; i < 8; i++) z[i] = (float)i;
    z[6] = INFINITY;
    memset(load, 0, sizeof load);
    CHECK_STATUS(moe_topk_count(2, 4, 2, z, load, NULL, NULL, work, bytes), MOE_E_NAN_LOGITS);
    CHECK(load[3] == 0);
    CHECK_STATUS(moe_topk_count(2, 4, 2, z, load, NULL, NULL, work, bytes - 1), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_topk_count(2, 4, 2, z, load, NULL, NULL, NULL, bytes), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_topk_count(2, 4, 5, z, load, NULL, NULL, work, bytes), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk_count(2, 4, 2, NULL, load, NULL, NULL, work, bytes), MOE_E_NULL_LOGITS);
    CHECK_OK(moe_topk_count(1, 4, 2, z, load, NULL, NULL, work, bytes));
    CHECK(load[3] == 1 && load[2] == 1);
    memset(sum, 0, sizeof sum);
    CHECK_OK(moe_topk_count(1, 4, 2, z, NULL, NULL, sum, work, bytes)); /* sums alone */
    CHECK(sum[1] == 1 && sum[3] == 3);
    free(work);
}

/* ---- the temperature scan ---- */
static void test_temperature_scan(void) {
    enum { T = 90, E = 12, K = 2, N = 6 };
    static const float temperature[N] = {0.1f, 0.5f, 1, 2, 5, 0.001f};
    float z[T * E], p[T * E];
    int32_t plain[T * K], index[T * K];
    moe_temperature_row row[N];
    size_t bytes = 0;
    CHECK_OK(moe_temperature_scan_scratch(E, K, &bytes));
    void *work = test_memory(bytes, 1);
    test_fill(z, T * E, -3, 3);
    for (int e = 0; e < 3; e++) z[e] = 3 + (float)e * 1e-6f; /* told apart at 1, and at 1000 times that */
    CHECK_OK(moe_topk(T, E, K, z, plain, NULL));
    CHECK_OK(moe_temperature_scan(T, E, K, z, N, temperature, row, work, bytes));
    for (int n = 0; n < N; n++) {
        double mean[E] = {0}, entropy = 0, token = 0, top = 0, first = 0, changed = 0, load[E] = {0}, most = 0,
               square = 0, top1[E] = {0};
        CHECK_OK(moe_softmax(T, E, temperature[n], z, p));
        CHECK_OK(moe_topk(T, E, K, p, index, NULL));
        for (int t = 0; t < T; t++) {
            for (int e = 0; e < E; e++) {
                double v = (double)p[t * E + e];
                mean[e] += v / T;
                if (v > 0) token -= v * log(v) / T;
            }
            for (int i = 0; i < K; i++) top += (double)p[t * E + index[t * K + i]] / T, load[index[t * K + i]]++;
            first += (double)p[t * E + index[t * K]] / T;
            top1[index[t * K]]++;
        }
        CHECK_OK(moe_churn(T, K, plain, index, &changed));
        size_t dead = 0, dead_first = 0;
        for (int e = 0; e < E; e++) {
            entropy -= mean[e] > 0 ? mean[e] * log(mean[e]) : 0;
            most = fmax(most, load[e]), square += pow(load[e] - T * K / (double)E, 2);
            dead_first += top1[e] < 0.01 * T;
            dead += 10 * E * load[e] < T * K;
        }
        CHECK(row[n].temperature == (double)temperature[n] && row[n].n_dead == dead);
        CHECK(row[n].n_dead_first == dead_first);
        CHECK_NEAR(row[n].entropy, entropy, 2e-15);
        CHECK_NEAR(row[n].token_entropy, token, 2e-15);
        CHECK_NEAR(row[n].top_mass, top, 2e-15);
        CHECK_NEAR(row[n].first_mass, first, 2e-15);
        CHECK_NEAR(row[n].changed, changed, 7e-15);
        CHECK_NEAR(row[n].maxvio, most / (T * K / (double)E) - 1, 2e-15);
        CHECK_NEAR(row[n].load_cv, sqrt(square / E) / (T * K / (double)E), 2e-15);
    }
    for (int n = 1; n < 5; n++) { /* what changes, and what stays */
        CHECK(row[n].token_entropy > row[n - 1].token_entropy && row[n].top_mass < row[n - 1].top_mass);
        if (n > 1) CHECK(row[n].maxvio == row[1].maxvio);
    }
    CHECK(row[5].changed > 0.1); /* so cold that second choices round to 0, and ties decide */
    float bad = 0;
    CHECK_STATUS(moe_temperature_scan(T, E, K, z, 1, &bad, row, work, bytes), MOE_E_TEMPERATURE);
    CHECK_STATUS(moe_temperature_scan(T, E, K, z, 1, temperature, row, work, bytes - 1), MOE_E_SMALL_MEMORY);
    z[5] = NAN;
    CHECK_STATUS(moe_temperature_scan(T, E, K, z, 1, temperature, row, work, bytes), MOE_E_NAN_LOGITS);
    CHECK_OK(moe_temperature_scan(0, E, K, NULL, N, temperature, row, work, bytes));
    CHECK(row[0].entropy == 0 && row[0].load_cv < 2);
    free(work);
}

/* ---- repetition, by hand: experts 0 1 | 2 3 | 4 5 | 6 7 on four ranks ---- */
static void test_repetition(void) {
    static const int32_t index[12] = {0, 1, 1, 0, 0, 1, -1, -1, 1, 2, 7, 4}; /* sets 01 01 01 (padding) 12 47 */
    static const int32_t same[8] = {5, 3, 3, 5, 5, 3, 5, 3};
    uint64_t work[8];
    moe_repeats got, before;
    CHECK_OK(moe_repetition(6, 8, 2, 4, index, work, &got));
    CHECK_NEAR(got.tmi, 4, 1e-15); /* both choices on one rank: 2 of a mean of 1/2 */
    CHECK_NEAR(got.imbalance, 7 * 4 / 10.0, 1e-15); /* rank 0 has 2 + 2 + 2 + 1 of the 10 */
    CHECK_NEAR(got.jaccard, (1 + 1 + 1 / 3.0 + 0) / 4, 1e-15);
    CHECK(got.longest == 3);
    CHECK_OK(moe_repetition(4, 8, 2, 8, same, work, &got));
    CHECK_NEAR(got.tmi, 4, 1e-15); /* one choice a rank: 1 of 1/4; the published example */
    CHECK_NEAR(got.imbalance, 4, 1e-15);
    CHECK(got.jaccard == 1 && got.longest == 4);
    CHECK_OK(moe_repetition(1, 8, 2, 1, same, work, &got));
    CHECK(got.tmi == 1 && got.imbalance == 1 && got.jaccard == 0 && got.longest == 1);
    CHECK_OK(moe_repetition(0, 8, 2, 2, NULL, work, &got));
    CHECK(got.imbalance == 0 && got.jaccard == 0 && got.longest == 0);
    before = got;
    CHECK_STATUS(moe_repetition(6, 8, 2, 3, index, work, &got), MOE_E_RANKS);
    CHECK_STATUS(moe_repetition(6, 8, 2, 0, index, work, &got), MOE_E_RANKS);
    CHECK_STATUS(moe_repetition(6, 7, 2, 7, index, work, &got), MOE_E_INDEX);
    CHECK_STATUS(moe_repetition(6, 8, 2, 4, index, NULL, &got), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_repetition(6, 8, 2, 4, index, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_repetition(1, 8, 2, 4, index + 6, work, &got), MOE_E_NO_TOKENS);
    CHECK(!memcmp(&got, &before, sizeof got));
}

/* ---- Replicate-and-Quantize ---- */
static void test_replicate_plan(void) {
    static const uint64_t load[6] = {10, 51, 5, 21, 4, 9}; /* 100: mean 16.67 */
    static const double importance[6] = {3, 0, 2, 1, 9, 2};
    moe_format_kind formats[12];
    size_t replica[6];
    moe_replicate got;
    moe_replicate_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_experts = 6, desc.load = load, desc.full = MOE_FORMAT_F32, desc.small = MOE_FORMAT_INT8;
    desc.full_bytes = 100, desc.small_bytes = 30;
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got)); /* 630 with the replica: one more saves 70 */
    CHECK(replica[0] == 1 && got.n_replicas == 1 && got.n_small == 1 && got.bytes_before == 600 && got.bytes == 560);
    CHECK_NEAR(got.imbalance_before, 51 * 6 / 100.0, 1e-15);
    CHECK_NEAR(got.imbalance, 26 * 6 / 100.0, 1e-15);
    for (int e = 0; e < 7; e++) CHECK(formats[e] == (e == 4 || e == 6 ? MOE_FORMAT_INT8 : MOE_FORMAT_F32));
    desc.importance = importance, desc.budget = 480; /* three: 3, then 2 and 5, not the 1 that is replicated */
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK(got.n_small == 3 && got.bytes == 420);
    for (int e = 0; e < 7; e++) CHECK(formats[e] == (e == 1 || e == 0 || e == 4 ? MOE_FORMAT_F32 : MOE_FORMAT_INT8));
    desc.budget = 280;
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK(got.n_small == 5 && got.bytes == 280 && formats[1] == MOE_FORMAT_F32);
    desc.budget = 279;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_BUDGET);
    desc.budget = 0, desc.n_replicas = 2; /* 1, then 3: 660, one more saves 70; 4 has 9, of the others 2 the least */
    desc.importance = NULL;
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK(replica[0] == 1 && replica[1] == 3 && got.n_replicas == 2 && got.n_small == 1 && got.bytes == 590);
    CHECK_NEAR(got.imbalance, 26 * 6 / 100.0, 1e-15);
    for (int e = 0; e < 8; e++) CHECK(formats[e] == (e == 4 || e > 5 ? MOE_FORMAT_INT8 : MOE_FORMAT_F32));
    desc.n_replicas = 6, desc.budget = 780; /* all, and none may be small */
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK(got.n_small == 0 && got.bytes == 780 && replica[2] == 0 && replica[3] == 5 && replica[5] == 4);
    desc.budget = 779;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_BUDGET);
    desc.n_replicas = 7;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_REPLICA);
    desc.n_replicas = 0;
    desc.budget = 1000;
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK(got.n_small == 0 && got.bytes == 630);
    const uint64_t flat[6] = {9, 20, 19, 1, 1, 0}; /* the second decides */
    desc.load = flat;
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK_NEAR(got.imbalance, 19 * 6 / 50.0, 1e-15);
    const uint64_t one[6] = {0, 0, 1, 0, 0, 0}; /* a mean of 1/6; of one token there is no half */
    desc.load = one;
    CHECK_OK(moe_replicate_plan(&desc, replica, formats, &got));
    CHECK_NEAR(got.imbalance_before, 6, 1e-15);
    CHECK_NEAR(got.imbalance, 6, 1e-15);
    desc.small = MOE_FORMAT_F32;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_FORMAT);
    desc.small = MOE_FORMAT_INT8, desc.small_bytes = 100;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_BUDGET);
    desc.small_bytes = 30, desc.full_bytes = SIZE_MAX / 6;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_OVERFLOW);
    desc.full_bytes = 100, desc.load = NULL;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_NULL_LOAD);
    const double bad[6] = {0, 0, 0, NAN, 0, 0};
    desc.load = load, desc.importance = bad;
    CHECK_STATUS(moe_replicate_plan(&desc, replica, formats, &got), MOE_E_IMPORTANCE);
}
/* Applied: what the layer then is, and that its tokens are divided by turns. */
typedef struct replicated {
    moe_layer *layer, *made;
    moe_replicate plan;
    moe_replicate_desc desc;
    float *x, *y, *z;
} replicated;
enum { RQ_D = 32, RQ_E = 6, RQ_T = 601 };
static int replicated_begin(replicated *r, const char *set) {
    moe_desc d;
    memset(r, 0, sizeof *r), memset(&d, 0, sizeof d);
    r->x = test_floats(RQ_T * RQ_D), r->y = test_floats(RQ_T * RQ_D), r->z = test_floats(RQ_T * RQ_D);
    test_fill(r->x, RQ_T * RQ_D, -1, 1);
    d.d_model = RQ_D, d.n_experts = RQ_E;
    r->desc.small = MOE_FORMAT_INT8;
    if (!CHECK_OK(moe_desc_parse(&d, set, NULL)) || !CHECK_OK(moe_layer_new(&r->layer, &d))) return 0;
    return CHECK_OK(moe_forward(r->layer, r->x, RQ_T, r->y));
}
static double replicated_error(const replicated *r) { /* of z by y, of y's size */
    double error = 0, size = 0;
    for (size_t i = 0; i < RQ_T * RQ_D; i++) {
        error += pow((double)r->z[i] - (double)r->y[i], 2);
        size += pow((double)r->y[i], 2);
    }
    return error / size;
}
static uint32_t replicated_routes(const moe_layer *layer, size_t expert) { /* what capacity left */
    const uint32_t *begin = moe_layer_tape((moe_layer *)layer)->routes.begin;
    return begin[expert + 1] - begin[expert];
}
static void replicated_end(replicated *r) {
    moe_layer_free(r->layer), moe_layer_free(r->made);
    free(r->x), free(r->y), free(r->z);
}
static void test_replicate_layer(void) {
    replicated r;
    if (!replicated_begin(&r, "n_shared=1 bias=true")) return;
    const uint64_t *load = moe_layer_tape(r.layer)->routes.load;
    size_t heaviest = 0, bytes = 0;
    for (size_t e = 1; e < RQ_E; e++)
        if (load[e] > load[heaviest]) heaviest = e;
    if (!CHECK_OK(moe_layer_replicate(r.layer, &r.desc, &r.made, &r.plan))) return;
    for (size_t e = 0; e <= RQ_E; e++) bytes += moe_layer_expert_bytes(r.made, e);
    CHECK(bytes == r.plan.bytes && bytes <= r.plan.bytes_before);
    CHECK(r.plan.bytes_before == RQ_E * moe_layer_expert_bytes(r.layer, 0));
    CHECK(moe_layer_format(r.made, RQ_E) == MOE_FORMAT_INT8 && moe_layer_format(r.made, heaviest) == MOE_FORMAT_F32);
    CHECK(moe_layer_format(r.made, RQ_E + 1) == MOE_FORMAT_F32);
    CHECK(moe_layer_format(r.made, RQ_E + 2) == MOE_FORMAT_COUNT);
    CHECK_OK(moe_forward(r.made, r.x, RQ_T, r.z));
    uint64_t whole = moe_layer_tape(r.made)->routes.load[heaviest], child = moe_layer_tape(r.made)->bound[0];
    CHECK(whole == load[heaviest] && child == whole / 2);
    double error = replicated_error(&r);
    CHECK(error > 0 && error < 1e-4);
    replicated_end(&r);
}
/* A replica in its original's format changes no bit, whatever weighs and combines; tokens all the same are divided. */
static void test_replicate_bits(void) {
    static const char *const set[] = {"n_shared=1", "gate=sigmoid n_zero=1 bias=true top_k=3", "select=all",
                                      "combine=robust score=cosine", "capacity_factor=0.5 select=laser"};
    static const size_t twice[2] = {3, 3}, special[1] = {RQ_E - 1};
    for (size_t i = 0; i < sizeof set / sizeof *set; i++) {
        replicated r;
        size_t replica[3] = {4, 0, 2};
        moe_layer_formats into;
        memset(&into, 0, sizeof into);
        if (!replicated_begin(&r, set[i])) continue;
        into.n_replicas = 3, into.replica = replica;
        if (!CHECK_OK(moe_layer_quantize(r.layer, &into, &r.made))) continue;
        moe_layer_side(r.layer)->evaluate = 1;
        CHECK_OK(moe_forward(r.layer, r.x, RQ_T, r.y));
        CHECK_OK(moe_forward(r.made, r.x, RQ_T, r.z));
        CHECK(memcmp(r.y, r.z, RQ_T * RQ_D * sizeof(float)) == 0);
        for (size_t k = 0; k < 3; k++)
            CHECK(moe_layer_tape(r.made)->bound[k] == replicated_routes(r.layer, replica[k]) / 2);
        for (size_t t = 1; t < 64; t++) memcpy(r.x + t * RQ_D, r.x, RQ_D * sizeof(float));
        CHECK_OK(moe_forward(r.made, r.x, 64, r.z)); /* 64 times one token: half of each that has a replica */
        for (size_t k = 0; k < 3; k++)
            CHECK(moe_layer_tape(r.made)->bound[k] == replicated_routes(r.made, replica[k]) / 2);
        moe_layer *none = NULL;
        into.replica = twice, into.n_replicas = 2;
        CHECK_STATUS(moe_layer_quantize(r.layer, &into, &none), MOE_E_REPLICA);
        into.n_replicas = RQ_E + 1;
        CHECK_STATUS(moe_layer_quantize(r.layer, &into, &none), MOE_E_REPLICA);
        into.n_replicas = 1, into.replica = NULL;
        CHECK_STATUS(moe_layer_quantize(r.layer, &into, &none), MOE_E_REPLICA);
        into.replica = special;
        if (i == 1) CHECK_STATUS(moe_layer_quantize(r.layer, &into, &none), MOE_E_REPLICA);
        CHECK(none == NULL);
        replicated_end(&r);
    }
}
/* Beside a pair that growth bound, which keeps its plane; and through a file. */
static void test_replicate_pair(void) {
    replicated r;
    moe_layer *pair = NULL, *back = NULL;
    unsigned char *file = NULL;
    size_t size = 0;
    if (!replicated_begin(&r, "n_shared=1")) return;
    const uint64_t *load = moe_layer_tape(r.layer)->routes.load;
    size_t order[2] = {0, 0};
    for (size_t e = 1; e < RQ_E; e++)
        if (load[e] > load[order[0]]) order[0] = e;
    order[1] = order[0] == 0;
    for (size_t e = 0; e < RQ_E; e++)
        if (e != order[0] && load[e] > load[order[1]]) order[1] = e;
    moe_growth_data data;
    memset(&data, 0, sizeof data);
    data.x = r.x, data.n_tokens = RQ_T;
    if (!CHECK_OK(moe_layer_split(&pair, r.layer, order[1], &data))) return;
    r.desc.load = load;
    CHECK_OK(moe_layer_replicate(pair, &r.desc, &r.made, NULL));
    CHECK(moe_layer_format(r.made, RQ_E) == MOE_FORMAT_F32 && moe_layer_format(r.made, RQ_E + 1) == MOE_FORMAT_INT8);
    CHECK(moe_layer_format(r.made, RQ_E + 2) == MOE_FORMAT_F32);
    CHECK_OK(moe_forward(pair, r.x, RQ_T, r.y));
    CHECK_OK(moe_forward(r.made, r.x, RQ_T, r.z));
    CHECK(moe_layer_tape(r.made)->bound[0] == moe_layer_tape(pair)->bound[0]);
    CHECK(moe_layer_tape(r.made)->bound[1] == load[order[0]] / 2 && replicated_error(&r) < 1e-4);
    CHECK_OK(moe_layer_save_size(r.made, 0, &size));
    file = (unsigned char *)malloc(size);
    CHECK_OK(moe_layer_save_memory(r.made, 0, file, size));
    CHECK_OK(moe_layer_load_memory(&back, file, size, NULL));
    CHECK_OK(moe_forward(back, r.x, RQ_T, r.y));
    CHECK(memcmp(r.y, r.z, RQ_T * RQ_D * sizeof(float)) == 0);
    r.desc.n_replicas = 2; /* the second heaviest is paired */
    moe_layer *none = NULL;
    CHECK_STATUS(moe_layer_replicate(pair, &r.desc, &none, NULL), MOE_E_REPLICA);
    r.desc.n_replicas = RQ_E + 1;
    CHECK_STATUS(moe_layer_replicate(pair, &r.desc, &none, NULL), MOE_E_REPLICA);
    r.desc.n_replicas = 1, r.desc.n_experts = RQ_E + 1;
    CHECK_STATUS(moe_layer_replicate(pair, &r.desc, &none, NULL), MOE_E_N_EXPERTS);
    r.desc.n_experts = 0, r.desc.small = MOE_FORMAT_COUNT;
    CHECK_STATUS(moe_layer_replicate(pair, &r.desc, &none, NULL), MOE_E_FORMAT);
    r.desc.small = MOE_FORMAT_INT8;
    CHECK_STATUS(moe_layer_replicate(back, &r.desc, &none, NULL), MOE_E_QUANTISED);
    CHECK_STATUS(moe_layer_replicate(NULL, &r.desc, &none, NULL), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_replicate(pair, NULL, &none, NULL), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_layer_replicate(pair, &r.desc, NULL, NULL), MOE_E_NULL_OUT);
    CHECK(none == NULL);
    moe_layer_free(pair), moe_layer_free(back), free(file);
    replicated_end(&r);
}

/* ---- what is not given, one thing at a time; what cannot be counted ---- */
static void test_missing_arguments(void) {
    enum { MANY = (1 << 20) + 1 }; /* experts, and tokens at one time */
    static float logits[MANY];
    static uint64_t load[4], count[8];
    static const int32_t index[8] = {0, 1, 2, 3, 0, 1, 2, 3};
    static const uint32_t label[4] = {0, 1, 1, 9};
    static const uint8_t right[4] = {1, 0, 1, 0};
    static double x, sum[40];
    uint32_t work[8];
    float temperature = 1, z[8] = {0};
    uint64_t many[32];
    moe_ecology_kind classes[4];
    moe_temperature_row row;
    moe_repeats repeats;
    CHECK_STATUS(moe_churn(2, 0, index, index, &x), MOE_E_TOP_K);
    CHECK_STATUS(moe_churn(SIZE_MAX, 2, index, index, &x), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_churn(2, 2, index, index, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_churn(2, 2, NULL, index, &x), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_churn(2, 2, index, NULL, &x), MOE_E_NULL_INDEX);
    CHECK_OK(moe_churn(0, 2, NULL, NULL, &x));
    CHECK_STATUS(moe_coselect(1, MANY, 2, index, count), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_coselect(1, 4, 0, index, count), MOE_E_TOP_K);
    CHECK_STATUS(moe_coselect(1, 4, 2, index, NULL), MOE_E_NULL_COUNT);
    CHECK_STATUS(moe_seu(1, 0, 2, 1, index, work, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_seu(1, 4, 2, 1, index, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_crossing(1, 0, 2, 2, index, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_crossing(1, 4, 2, 2, index, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_crossing(1, 4, 2, SIZE_MAX, index, &x), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_tier_usage(0, 2, label, load, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_tier_usage(MANY, 2, label, load, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_tier_usage(3, 2, label, NULL, &x), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_tier_usage(3, 2, label, load, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_tier_usage(3, 2, NULL, load, &x), MOE_E_NULL_LABEL);
    sum[0] = sum[1] = 7;
    CHECK_OK(moe_tier_usage(3, 2, label, load, sum)); /* no load: no shares */
    CHECK(!(sum[0] > 0) && !(sum[1] > 0));
    CHECK_STATUS(moe_loss_by_expert(2, 0, 2, index, z, sum), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_loss_by_expert(2, 4, 2, index, z, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_loss_by_expert(0, 4, 2, NULL, NULL, sum));
    CHECK_STATUS(moe_right_by_expert(2, 0, 2, index, right, count), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_right_by_expert(2, 4, 2, index, NULL, count), MOE_E_NULL_LABEL);
    CHECK_OK(moe_right_by_expert(0, 4, 2, NULL, NULL, count));
    CHECK_STATUS(moe_label_by_expert(2, 0, 2, 2, index, label, count), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_label_by_expert(2, 4, 2, 2, index, NULL, count), MOE_E_NULL_LABEL);
    CHECK_STATUS(moe_label_by_expert(2, 4, 2, 2, index, label, NULL), MOE_E_NULL_COUNT);
    CHECK_OK(moe_label_by_expert(0, 4, 2, 2, NULL, NULL, count));
    static const int32_t last_none[4] = {0, 1, 2, -1};
    CHECK_OK(moe_label_by_expert(4, 4, 1, 2, last_none, label, count)); /* no token, so its label is none */
    CHECK_STATUS(moe_label_majority(0, 2, count, load), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_label_majority(MANY, 2, count, load), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_label_majority(4, 2, NULL, load), MOE_E_NULL_COUNT);
    CHECK_STATUS(moe_label_majority(4, 2, count, NULL), MOE_E_NULL_COUNT);
    CHECK_STATUS(moe_ecology_classes(0, load, count, classes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_ecology_classes(MANY, load, count, classes), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_ecology_classes(4, NULL, count, classes), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_ecology_classes(4, load, count, NULL), MOE_E_NULL_OUT);
    CHECK(isnan(moe_ecology_number(1, 1, 1, -1)) && isnan(moe_ecology_number(1, 1, 1, (double)INFINITY)));
    CHECK_STATUS(moe_pes(1, 0, 2, z, sum, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_pes(1, MANY, 2, z, sum, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_pes(1, 4, SIZE_MAX, z, sum, &x), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_pes(1, 4, 2, NULL, sum, &x), MOE_E_NULL_X);
    CHECK_STATUS(moe_pes(1, 4, 2, z, NULL, &x), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_pes(1, 4, 2, z, sum, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_pes(0, 4, 2, NULL, sum, &x));
    CHECK_STATUS(moe_topk_count(SIZE_MAX, 4, 2, z, load, NULL, NULL, many, sizeof many), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_temperature_scan(SIZE_MAX, 4, 2, z, 1, &temperature, &row, many, sizeof many), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_temperature_scan(2, 4, 2, z, 1, NULL, &row, many, sizeof many), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_temperature_scan(2, 4, 2, z, 1, &temperature, NULL, many, sizeof many), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_temperature_scan(2, 4, 2, z, 1, &temperature, &row, NULL, sizeof many), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_repetition(1, 0, 2, 2, index, many, &repeats), MOE_E_N_EXPERTS);
    /* more tokens than one piece: counted whole, and not at all if a number in the last is none */
    size_t bytes = 0;
    uint64_t first[1] = {0}, all[1] = {0};
    CHECK_OK(moe_topk_count_scratch(1, 1, &bytes));
    void *room = test_memory(bytes, 1);
    CHECK_OK(moe_topk_count(MANY, 1, 1, logits, all, first, sum, room, bytes));
    CHECK(all[0] == MANY && first[0] == MANY);
    logits[MANY - 1] = NAN;
    CHECK_STATUS(moe_topk_count(MANY, 1, 1, logits, all, first, sum, room, bytes), MOE_E_NAN_LOGITS);
    CHECK(all[0] == MANY && first[0] == MANY);
    free(room);
}
static void test_missing_of_plan(void) {
    static const uint64_t load[4] = {4, 3, 2, 1};
    moe_replicate_desc good, d;
    size_t replica[4];
    moe_format_kind formats[8];
    moe_replicate out;
    memset(&good, 0, sizeof good);
    good.n_experts = 4, good.n_replicas = 1, good.load = load, good.full_bytes = 8, good.small_bytes = 2;
    good.full = MOE_FORMAT_F32, good.small = MOE_FORMAT_INT8;
    CHECK_OK(moe_replicate_plan(&good, replica, formats, &out));
    CHECK_STATUS(moe_replicate_plan(NULL, replica, formats, &out), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_replicate_plan(&good, NULL, formats, &out), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_replicate_plan(&good, replica, NULL, &out), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_replicate_plan(&good, replica, formats, NULL), MOE_E_NULL_OUT);
    d = good, d.n_experts = 0;
    CHECK_STATUS(moe_replicate_plan(&d, replica, formats, &out), MOE_E_N_EXPERTS);
    d = good, d.n_experts = SIZE_MAX;
    CHECK_STATUS(moe_replicate_plan(&d, replica, formats, &out), MOE_E_N_EXPERTS);
    d = good, d.full = MOE_FORMAT_COUNT;
    CHECK_STATUS(moe_replicate_plan(&d, replica, formats, &out), MOE_E_FORMAT);
    d = good, d.small = MOE_FORMAT_COUNT;
    CHECK_STATUS(moe_replicate_plan(&d, replica, formats, &out), MOE_E_FORMAT);
    d = good, d.small_bytes = 0;
    CHECK_STATUS(moe_replicate_plan(&d, replica, formats, &out), MOE_E_BUDGET);
}

int main(void) {
    RUN(test_missing_arguments);
    RUN(test_missing_of_plan);
    RUN(test_crossing_uneven);
    RUN(test_index_measures);
    RUN(test_padding);
    RUN(test_tiers_and_labels);
    RUN(test_ecology);
    RUN(test_repetition);
    RUN(test_replicate_plan);
    RUN(test_replicate_layer);
    RUN(test_replicate_bits);
    RUN(test_replicate_pair);
    RUN(test_pes);
    RUN(test_topk_count);
    RUN(test_temperature_scan);
    return test_end();
}
