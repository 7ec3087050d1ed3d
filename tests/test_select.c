/* The selections, the auction and the robust aggregates against naive forms of them. */
#include "test.h"

/* levels 0: uniform; else few values, so many ties, 0 of both signs, and some -infinity */
static float log_of(float x) { /* as the generator does it */
    CHECK_OK(moe_log(1, &x, &x));
    return x;
}

static void fill_scores(float *s, size_t n, int levels) {
    for (size_t i = 0; i < n; i++) {
        s[i] = levels ? (float)test_below((size_t)levels) - 2 : test_uniform(-1, 1);
        if (levels && test_below(7) == 0) s[i] = -INFINITY;
        if (s[i] == 0 && test_below(2)) s[i] = -0.0f;
    }
}
static int32_t *test_ints(size_t n) { return (int32_t *)test_memory(n, sizeof(int32_t)); }

/* Naive: the k best of the columns that may[] lets, by v, each found by a search of its own; -1 after the last. */
static void naive_topk(size_t n, size_t k, const float *v, const char *may, int32_t *index) {
    char *used = (char *)test_memory(n, 1);
    for (size_t i = 0; i < k; i++) {
        size_t best = n;
        for (size_t e = 0; e < n; e++)
            if (!used[e] && (may == NULL || may[e]) && (best == n || v[e] > v[best])) best = e;
        index[i] = best == n ? -1 : (int32_t)best;
        if (best < n) used[best] = 1;
    }
    free(used);
}

static int same_ints(const int32_t *a, const int32_t *b, size_t n) { return n == 0 || memcmp(a, b, n * sizeof *a) == 0; }

/* ---- top-k: the ways that the kernel takes (rows side by side, the filter, its overflow, single rows) ---- */
static void topk_case(size_t rows, size_t cols, size_t k, int levels) {
    float *s = test_floats(rows * cols), *value = test_floats(rows * k);
    int32_t *index = test_ints(rows * k), *want = test_ints(rows * k);
    fill_scores(s, rows * cols, levels);
    if (rows > 2 && cols > 1) { /* one row all equal, one all -infinity but one */
        for (size_t e = 0; e < cols; e++) s[e] = 0.5f, s[cols + e] = e == cols / 2 ? -3.0f : -INFINITY;
    }
    for (size_t r = 0; r < rows; r++) naive_topk(cols, k, s + r * cols, NULL, want + r * k);
    FOR_EACH_ISA(isa) {
        memset(index, 0x55, rows * k * sizeof *index);
        memset(value, 0x55, rows * k * sizeof *value);
        CHECK_OK(moe_topk(rows, cols, k, s, index, value));
        if (!CHECK(same_ints(index, want, rows * k)))
            printf("        rows %zu cols %zu k %zu levels %d, %s\n", rows, cols, k, levels, moe_isa_name(isa));
        for (size_t i = 0; i < rows * k; i++) CHECK_BITS(value[i], s[i / k * cols + (size_t)index[i]]);
    }
    free(s), free(value), free(index), free(want);
}

static void test_topk(void) {
    static const size_t cols[] = {1, 2, 3, 5, 8, 10, 15, 16, 17, 31, 32, 33, 40, 48, 63, 64, 65, 100, 128, 256, 300, 512, 513, 600};
    for (size_t c = 0; c < sizeof cols / sizeof cols[0]; c++) {
        size_t n = cols[c], k[] = {1, 2, 3, 8, 16, 17, 1 + test_below(n), n};
        for (size_t i = 0; i < sizeof k / sizeof k[0]; i++) {
            if (k[i] > n || (n > 64 && k[i] > 40)) continue;
            for (int levels = 0; levels <= 40; levels = levels ? levels * 10 : 4) topk_case(31 + test_below(70), n, k[i], levels);
        }
    }
    topk_case(300, 4, 2, 3); /* several short rows in one lane, with a rest of every kind */
    topk_case(131, 1, 1, 0);
}

static void test_topk_nan(void) {
    enum { ROWS = 70 };
    static const size_t cols[] = {4, 16, 30, 64, 129, 600};
    float *s = test_floats(ROWS * 600);
    int32_t *index = test_ints(ROWS * 8);
    FOR_EACH_ISA(isa)
        for (size_t c = 0; c < 6; c++) {
            size_t n = ROWS * cols[c];
            for (int i = 0; i < 40; i++) { /* wherever it is, also among values that lose or are passed over */
                size_t at = test_below(n);
                test_fill(s, n, -1, 1);
                CHECK_OK(moe_topk(ROWS, cols[c], 1 + test_below(4), s, index, NULL));
                s[at] = i % 2 ? NAN : -NAN;
                if (i % 3 == 0) s[at / cols[c] * cols[c]] = INFINITY; /* and beside the highest that there is */
                if (s[at] != s[at]) CHECK_STATUS(moe_topk(ROWS, cols[c], 1 + test_below(4), s, index, NULL), MOE_E_NAN_LOGITS);
            }
        }
    free(s), free(index);
}

/* ---- groups ---- */
static void groups_case(size_t rows, size_t cols, size_t k, size_t n_groups, size_t top_groups, int levels) {
    size_t width = cols / n_groups;
    float *s = test_floats(rows * cols), *group = test_floats(n_groups);
    int32_t *index = test_ints(rows * k), *want = test_ints(k), *chosen = test_ints(top_groups);
    char *may = (char *)test_memory(cols, 1);
    fill_scores(s, rows * cols, levels);
    CHECK_OK(moe_topk_groups(rows, cols, k, n_groups, top_groups, s, index));
    for (size_t r = 0; r < rows; r++) {
        const float *row = s + r * cols;
        for (size_t g = 0; g < n_groups; g++) {
            int32_t two[2];
            naive_topk(width, width < 2 ? 1 : 2, row + g * width, NULL, two);
            group[g] = row[g * width + (size_t)two[0]];
            if (width > 1) group[g] += row[g * width + (size_t)two[1]];
        }
        naive_topk(n_groups, top_groups, group, NULL, chosen);
        memset(may, 0, cols);
        for (size_t i = 0; i < top_groups; i++) memset(may + (size_t)chosen[i] * width, 1, width);
        naive_topk(cols, k, row, may, want);
        CHECK(same_ints(index + r * k, want, k));
        for (size_t i = 0; i < k; i++) CHECK(index[r * k + i] >= 0 && may[index[r * k + i]]); /* never outside its groups */
    }
    free(s), free(group), free(index), free(want), free(chosen), free(may);
}

static void test_groups(void) {
    for (int levels = 0; levels <= 4; levels += 4) {
        groups_case(20, 256, 8, 8, 4, levels); /* DeepSeek-V3 */
        groups_case(50, 12, 3, 4, 2, levels);
        groups_case(50, 12, 6, 4, 2, levels); /* all of them */
        groups_case(50, 6, 2, 6, 3, levels);  /* groups of one */
        groups_case(50, 6, 2, 1, 1, levels);
        groups_case(5, 512, 4, 256, 9, levels);
        groups_case(3, 1, 1, 1, 1, levels);
        groups_case(0, 4, 1, 2, 1, levels);
    }
    float s[4] = {0, 1, 2, 3};
    int32_t index[4];
    CHECK_STATUS(moe_topk_groups(1, 4, 1, 3, 1, s, index), MOE_E_GROUPS);
    CHECK_STATUS(moe_topk_groups(1, 4, 1, 0, 1, s, index), MOE_E_GROUPS);
    CHECK_STATUS(moe_topk_groups(1, 514, 1, 257, 1, s, index), MOE_E_GROUPS);
    CHECK_STATUS(moe_topk_groups(1, 4, 1, 2, 0, s, index), MOE_E_TOP_GROUPS);
    CHECK_STATUS(moe_topk_groups(1, 4, 1, 2, 3, s, index), MOE_E_TOP_GROUPS);
    CHECK_STATUS(moe_topk_groups(1, 4, 3, 2, 1, s, index), MOE_E_TOP_GROUPS);
    CHECK_STATUS(moe_topk_groups(1, 4, 5, 2, 2, s, index), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk_groups(1, 4, 1, 2, 1, NULL, index), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_topk_groups(1, 4, 1, 2, 1, s, NULL), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_topk_groups(SIZE_MAX / 2, 4, 1, 2, 1, s, index), MOE_E_OVERFLOW);
    for (int i = 0; i < 4; i++) {
        float kept = s[i];
        s[i] = NAN;
        CHECK_STATUS(moe_topk_groups(1, 4, 1, 2, 1, s, index), MOE_E_NAN_LOGITS);
        s[i] = INFINITY;
        CHECK_STATUS(moe_topk_groups(1, 4, 1, 2, 1, s, index), MOE_E_NAN_LOGITS);
        s[i] = kept;
    }
}

/* ---- threshold ---- */
static void threshold_case(size_t rows, size_t cols, size_t k, float threshold, int with_col, int fallback, int levels) {
    float *s = test_floats(rows * cols), *col = test_floats(cols), *margin = test_floats(cols);
    int32_t *index = test_ints(rows * k), *want = test_ints(k);
    char *may = (char *)test_memory(cols, 1);
    fill_scores(s, rows * cols, levels);
    for (size_t e = 0; e < cols; e++) col[e] = with_col ? (float)test_below(4) * 0.25f : 0; /* sums and differences are exact */
    CHECK_OK(moe_topk_threshold(rows, cols, k, threshold, with_col ? col : NULL, fallback, s, index));
    for (size_t r = 0; r < rows; r++) {
        int any = 0;
        for (size_t e = 0; e < cols; e++) {
            margin[e] = s[r * cols + e] - col[e];
            may[e] = s[r * cols + e] > threshold + col[e];
            any |= may[e];
        }
        naive_topk(cols, k, margin, may, want);
        if (!any && fallback) naive_topk(cols, 1, margin, NULL, want);
        CHECK(same_ints(index + r * k, want, k));
        if (fallback) CHECK(index[r * k] >= 0);
    }
    free(s), free(col), free(margin), free(index), free(want), free(may);
}

static void test_threshold(void) {
    for (int i = 0; i < 200; i++) {
        size_t cols = 1 + test_below(20), k = 1 + test_below(cols);
        threshold_case(test_below(9), cols, k, (float)test_below(5) * 0.5f - 1, i & 1, i >> 1 & 1, i >> 2 & 1 ? 5 : 0);
    }
    threshold_case(9, 6, 6, 100, 1, 1, 4); /* none is above */
    threshold_case(9, 6, 6, -100, 0, 0, 4);
    float s[3] = {-INFINITY, -INFINITY, -INFINITY}, col[3] = {0, 0, NAN};
    int32_t index[3];
    CHECK_OK(moe_topk_threshold(1, 3, 2, 0, NULL, 1, s, index));
    CHECK(index[0] == 0 && index[1] == -1);
    CHECK_OK(moe_topk_threshold(1, 3, 2, 0, NULL, 0, s, index));
    CHECK(index[0] == -1 && index[1] == -1);
    CHECK_STATUS(moe_topk_threshold(1, 3, 2, 0, col, 1, s, index), MOE_E_THRESHOLD);
    CHECK_STATUS(moe_topk_threshold(1, 3, 2, NAN, NULL, 1, s, index), MOE_E_THRESHOLD);
    CHECK_STATUS(moe_topk_threshold(1, 3, 2, INFINITY, NULL, 1, s, index), MOE_E_THRESHOLD);
    CHECK_STATUS(moe_topk_threshold(1, 3, 4, 0, NULL, 1, s, index), MOE_E_TOP_K);
    CHECK_STATUS(moe_topk_threshold(1, 3, 1, 0, NULL, 1, NULL, index), MOE_E_NULL_SCORES);
    s[2] = NAN;
    CHECK_STATUS(moe_topk_threshold(1, 3, 2, 0, NULL, 1, s, index), MOE_E_NAN_LOGITS);
}

/* ---- top-p ---- */
static void test_top_p(void) {
    enum { ROWS = 40 };
    for (int i = 0; i < 200; i++) {
        size_t cols = 1 + test_below(70), k = 1 + test_below(cols);
        float *s = test_floats(ROWS * cols), p = i % 10 == 0 ? 0.0f : i % 10 == 1 ? 1.0f : test_uniform(0, 1);
        int32_t *index = test_ints(ROWS * k), *want = test_ints(cols);
        fill_scores(s, ROWS * cols, 0);
        for (size_t j = 0; i % 3 == 0 && j < ROWS * cols; j++) s[j] = (float)test_below(3); /* ties */
        CHECK_OK(moe_softmax(ROWS, cols, 0.3f, s, s));
        FOR_EACH_ISA(isa) {
            CHECK_OK(moe_top_p(ROWS, cols, k, p, s, index));
            for (size_t r = 0; r < ROWS; r++) {
                size_t n = 0;
                float sum = 0;
                naive_topk(cols, cols, s + r * cols, NULL, want);
                while (n < k && index[r * k + n] >= 0) n++;
                CHECK(n >= 1 && same_ints(index + r * k, want, n));
                for (size_t j = n; j < k; j++) CHECK(index[r * k + j] == -1);
                /* the smallest set above p: without its last it is not, with it it is (or there is no room, or nothing left) */
                for (size_t j = 0; j + 1 < n; j++) sum += s[r * cols + (size_t)want[j]];
                CHECK(sum <= p || n == 1);
                sum += s[r * cols + (size_t)want[n - 1]];
                CHECK(sum > p || n == k);
            }
        }
        free(s), free(index), free(want);
    }
    float s[2] = {0.5f, 0.5f};
    int32_t index[2];
    CHECK_STATUS(moe_top_p(1, 2, 2, -0.1f, s, index), MOE_E_TOP_P);
    CHECK_STATUS(moe_top_p(1, 2, 2, 1.1f, s, index), MOE_E_TOP_P);
    CHECK_STATUS(moe_top_p(1, 2, 2, NAN, s, index), MOE_E_TOP_P);
    CHECK_STATUS(moe_top_p(1, 2, 3, 0.5f, s, index), MOE_E_TOP_K);
    CHECK_STATUS(moe_top_p(1, 2, 2, 0.5f, NULL, index), MOE_E_NULL_PROB);
    CHECK_OK(moe_top_p(1, 2, 2, 0.5f, s, index));
    CHECK(index[0] == 0 && index[1] == 1); /* 0.5 does not exceed 0.5 */
    CHECK_OK(moe_top_p(0, 2, 2, 0.5f, NULL, NULL));
    s[1] = NAN;
    CHECK_STATUS(moe_top_p(1, 2, 2, 0.5f, s, index), MOE_E_NAN_LOGITS);
}

/* ---- expert choice ---- */
static void choice_case(size_t rows, size_t cols, size_t capacity, size_t slots, int levels) {
    float *s = test_floats(rows * cols), *column = test_floats(rows);
    size_t taken = capacity < rows ? capacity : rows, *load = (size_t *)test_memory(cols, sizeof *load), bytes = 0;
    int32_t *index = test_ints(rows * slots), *again = test_ints(rows * slots), *rank = test_ints(taken), *want = test_ints(cols);
    char *has = (char *)test_memory(rows * cols, 1);
    fill_scores(s, rows * cols, levels);
    for (size_t e = 0; e < cols; e++) {
        for (size_t r = 0; r < rows; r++) column[r] = s[r * cols + e];
        naive_topk(rows, taken, column, NULL, rank);
        for (size_t i = 0; i < taken; i++) has[(size_t)rank[i] * cols + e] = 1;
    }
    CHECK_OK(moe_expert_choice(rows, cols, capacity, slots, s, index, NULL, 0));
    for (size_t r = 0; r < rows; r++) {
        naive_topk(cols, cols, s + r * cols, has + r * cols, want);
        CHECK(same_ints(index + r * slots, want, cols));
        for (size_t i = cols; i < slots; i++) CHECK(index[r * slots + i] == -1);
        for (size_t i = 0; i < slots; i++)
            if (index[r * slots + i] >= 0) load[index[r * slots + i]]++;
    }
    for (size_t e = 0; e < cols; e++) CHECK(load[e] == taken); /* every expert is full */
    CHECK_OK(moe_expert_choice_scratch(rows, cols, &bytes));
    void *scratch = test_memory(bytes, 1);
    CHECK_OK(moe_expert_choice(rows, cols, capacity, slots, s, again, scratch, bytes));
    CHECK(same_ints(index, again, rows * slots));
    if (rows) CHECK_STATUS(moe_expert_choice(rows, cols, capacity, slots, s, again, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
    free(s), free(column), free(load), free(index), free(again), free(rank), free(want), free(has), free(scratch);
}

static void test_expert_choice(void) {
    for (int levels = 0; levels <= 4; levels += 2) {
        choice_case(64, 8, 16, 8, levels);
        choice_case(57, 5, 9, 7, levels);
        choice_case(100, 1, 10, 1, levels);
        choice_case(7, 3, 100, 3, levels); /* more than there are */
        choice_case(7, 3, 7, 3, levels);
        choice_case(1, 4, 1, 4, levels);
        choice_case(0, 4, 1, 4, levels);
        choice_case(1000, 4, 250, 4, levels);
    }
    float s[4] = {0, 1, 2, NAN};
    int32_t index[4];
    size_t bytes;
    CHECK_STATUS(moe_expert_choice(2, 2, 0, 2, s, index, NULL, 0), MOE_E_CAPACITY);
    CHECK_STATUS(moe_expert_choice(2, 2, 1, 1, s, index, NULL, 0), MOE_E_SLOTS);
    CHECK_STATUS(moe_expert_choice(2, 2, 1, 2, s, index, NULL, 0), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_expert_choice(2, 0, 1, 2, s, index, NULL, 0), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_expert_choice(2, 2, 1, SIZE_MAX / 2 + 1, s, index, NULL, 0), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_expert_choice_scratch(SIZE_MAX / 4, 8, &bytes), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_expert_choice_scratch(2, 2, NULL), MOE_E_NULL_OUT);
}

/* ---- Sinkhorn ---- */
/* The largest distance of a marginal from what it should be, in shares of it. */
static void marginals(size_t rows, size_t cols, const float *plan, double *by_row, double *by_col) {
    *by_row = *by_col = 0;
    for (size_t r = 0; r < rows; r++) {
        double sum = 0;
        for (size_t c = 0; c < cols; c++) sum += (double)plan[r * cols + c];
        *by_row = fmax(*by_row, fabs(sum - 1));
    }
    for (size_t c = 0; c < cols; c++) {
        double sum = 0;
        for (size_t r = 0; r < rows; r++) sum += (double)plan[r * cols + c];
        *by_col = fmax(*by_col, fabs(sum * (double)cols / (double)rows - 1));
    }
}

static void sinkhorn_case(size_t rows, size_t cols, float epsilon, size_t iterations, double limit) {
    size_t n = rows * cols, bytes = 0;
    float *s = test_floats(n), *plan = test_floats(n), *other = test_floats(n);
    double *u = test_doubles(rows), *v = test_doubles(cols), by_row, by_col, before = INFINITY;
    test_fill(s, n, -2, 2);
    for (size_t r = 0; r < rows; r++) s[r * cols] += 1.5f; /* a popular column */
    for (size_t i = 1; i <= 64; i *= 2) { /* more iterations never make the columns worse; the rows are always right */
        CHECK_OK(moe_sinkhorn(rows, cols, epsilon, i, s, plan, NULL, 0));
        marginals(rows, cols, plan, &by_row, &by_col);
        CHECK(by_row < 1e-5);
        if (!CHECK(by_col <= before + 1e-5)) printf("        %zu iterations: %g after %g\n", i, by_col, before);
        before = by_col;
    }
    CHECK_OK(moe_sinkhorn(rows, cols, epsilon, iterations, s, plan, NULL, 0));
    marginals(rows, cols, plan, &by_row, &by_col);
    CHECK_WITHIN(by_row, 0, 1e-4);
    CHECK_WITHIN(by_col, 0, limit);
    /* the same scaling in doubles, not in the log domain */
    for (size_t r = 0; r < rows; r++) u[r] = 1;
    for (size_t i = 0; i < iterations; i++) {
        for (size_t c = 0; c < cols; c++) {
            double sum = 0;
            for (size_t r = 0; r < rows; r++) sum += exp((double)s[r * cols + c] / (double)epsilon) * u[r];
            v[c] = (double)rows / (double)cols / sum;
        }
        for (size_t r = 0; r < rows; r++) {
            double sum = 0;
            for (size_t c = 0; c < cols; c++) sum += exp((double)s[r * cols + c] / (double)epsilon) * v[c];
            u[r] = 1 / sum;
        }
    }
    for (size_t i = 0; i < n; i++)
        CHECK_WITHIN(plan[i], u[i / cols] * exp((double)s[i] / (double)epsilon) * v[i % cols], 2e-5);
    CHECK_OK(moe_sinkhorn_scratch(rows, cols, &bytes));
    void *scratch = test_memory(bytes, 1);
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_sinkhorn(rows, cols, epsilon, iterations, s, other, scratch, bytes));
        CHECK_SAME(other, plan, n);
    }
    CHECK_STATUS(moe_sinkhorn(rows, cols, epsilon, 1, s, other, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
    free(s), free(plan), free(other), free(u), free(v), free(scratch);
}

static void test_sinkhorn(void) {
    sinkhorn_case(128, 8, 1.0f, 60, 1e-4);
    sinkhorn_case(33, 5, 0.5f, 200, 1e-4);
    sinkhorn_case(8, 64, 1.0f, 60, 1e-4);
    sinkhorn_case(20, 1, 1.0f, 3, 1e-4);
    sinkhorn_case(1, 20, 1.0f, 60, 1e-4);
    float s[4] = {1, 1, 1, 1}, plan[4];
    CHECK_OK(moe_sinkhorn(2, 2, 0.05f, 1, s, plan, NULL, 0));
    for (int i = 0; i < 4; i++) CHECK_NEAR(plan[i], 0.5, 1e-6);
    s[0] = 1e4f; /* exp(1e4) is far out of range: the log domain is not */
    CHECK_OK(moe_sinkhorn(2, 2, 1.0f, 100, s, plan, NULL, 0));
    for (int i = 0; i < 4; i++) CHECK(isfinite(plan[i]));
    CHECK_OK(moe_sinkhorn(0, 4, 1.0f, 1, NULL, NULL, NULL, 0));
    CHECK_STATUS(moe_sinkhorn(2, 2, 0, 1, s, plan, NULL, 0), MOE_E_EPSILON);
    CHECK_STATUS(moe_sinkhorn(2, 2, INFINITY, 1, s, plan, NULL, 0), MOE_E_EPSILON);
    CHECK_STATUS(moe_sinkhorn(2, 2, 1, 0, s, plan, NULL, 0), MOE_E_ITERATIONS);
    CHECK_STATUS(moe_sinkhorn(2, 2, 1, 1, NULL, plan, NULL, 0), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_sinkhorn(2, 2, 1, 1, s, NULL, NULL, 0), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_sinkhorn(2, 2, 1e-38f, 1, s, plan, NULL, 0), MOE_E_NAN_LOGITS); /* the quotient overflows */
    CHECK_STATUS(moe_sinkhorn_scratch(2, 2, NULL), MOE_E_NULL_OUT);
    s[3] = -INFINITY;
    CHECK_STATUS(moe_sinkhorn(2, 2, 1, 1, s, plan, NULL, 0), MOE_E_NAN_LOGITS);
    s[3] = NAN;
    CHECK_STATUS(moe_sinkhorn(2, 2, 1, 1, s, plan, NULL, 0), MOE_E_NAN_LOGITS);
}

/* ---- the auction ---- */
/* The highest sum of a balanced assignment: Hungarian, shortest augmenting paths over rows and rows / cols copies of each column. */
static double best_assignment(size_t n, size_t cols, const float *s) {
    size_t k = n / cols, *match = (size_t *)test_memory(n + 1, sizeof *match), *way = (size_t *)test_memory(n + 1, sizeof *way);
    double *u = test_doubles(n + 1), *v = test_doubles(n + 1), *low = test_doubles(n + 1), total = 0;
    char *seen = (char *)test_memory(n + 1, 1);
    for (size_t i = 1; i <= n; i++) { /* numbers from 1; match[j]: the row at place j; place 0: the row to be placed */
        size_t j = 0;
        match[0] = i;
        for (size_t p = 0; p <= n; p++) low[p] = INFINITY, seen[p] = 0;
        do {
            size_t row = match[j], next = 0;
            double step = INFINITY;
            seen[j] = 1;
            for (size_t p = 1; p <= n; p++) {
                if (seen[p]) continue;
                double cost = -(double)s[(row - 1) * cols + (p - 1) / k] - u[row] - v[p];
                if (cost < low[p]) low[p] = cost, way[p] = j;
                if (low[p] < step) step = low[p], next = p;
            }
            for (size_t p = 0; p <= n; p++)
                if (seen[p]) u[match[p]] += step, v[p] -= step;
                else low[p] -= step;
            j = next;
        } while (match[j]);
        for (; j; j = way[j]) match[j] = match[way[j]];
    }
    for (size_t p = 1; p <= n; p++) total += (double)s[(match[p] - 1) * cols + (p - 1) / k];
    free(match), free(way), free(u), free(v), free(low), free(seen);
    return total;
}

/* Balanced? The sum of its scores. */
static double auction_sum(size_t rows, size_t cols, const float *s, const int32_t *index) {
    size_t *load = (size_t *)test_memory(cols, sizeof *load);
    double sum = 0;
    for (size_t r = 0; r < rows; r++) {
        if (!CHECK(index[r] >= 0 && (size_t)index[r] < cols)) break;
        load[index[r]]++;
        sum += (double)s[r * cols + (size_t)index[r]];
    }
    for (size_t e = 0; e < cols; e++) CHECK(load[e] == rows / cols);
    free(load);
    return sum;
}

static void test_hungarian(void) { /* the oracle itself, against every assignment of 4 rows to 2 columns */
    for (int i = 0; i < 100; i++) {
        float s[8];
        double best = -INFINITY;
        test_fill(s, 8, -1, 1);
        for (int set = 0; set < 16; set++) {
            double sum = 0;
            int ones = 0;
            for (int r = 0; r < 4; r++) sum += (double)s[r * 2 + (set >> r & 1)], ones += set >> r & 1;
            if (ones == 2 && sum > best) best = sum;
        }
        CHECK_WITHIN(best_assignment(4, 2, s), best, 1e-12);
    }
}

/* The same auction in doubles, from the authors' description: who gets each row, and how many rounds each row was held
 * without interruption by who has it at the end, summed. */
static size_t plain_auction(size_t rows, size_t cols, const float *s, double eps, int32_t *owner) {
    size_t k = rows / cols, held_rounds = 0;
    double *price = test_doubles(rows), *bid = test_doubles(rows), *value = test_doubles(rows);
    size_t *held = (size_t *)test_memory(rows, sizeof *held);
    int32_t *holder = test_ints(rows);
    char *taken = (char *)test_memory(rows, 1);
    for (size_t r = 0; r < rows; r++) price[r] = 0, holder[r] = -1, held[r] = 0;
    for (int round = 0, missing = 1; missing && round < 100; round++) {
        for (size_t r = 0; r < rows; r++) bid[r] = 0, owner[r] = -1;
        for (size_t e = 0; e < cols; e++) {
            for (size_t r = 0; r < rows; r++) {
                value[r] = holder[r] == (int32_t)e ? INFINITY : (double)s[r * cols + e] - price[r];
                taken[r] = 0;
            }
            double last = -INFINITY;
            for (size_t i = 0; i <= k && i < rows; i++) { /* the k best, the lowest row first among equals; then the next */
                size_t best = rows;
                for (size_t r = 0; r < rows; r++)
                    if (!taken[r] && (best == rows || value[r] > value[best])) best = r;
                if (i == k) last = value[best];
                else taken[best] = 1;
            }
            for (size_t r = 0; r < rows; r++) {
                double mine = holder[r] == (int32_t)e ? eps : value[r] - last + eps;
                if (taken[r] && mine > bid[r]) bid[r] = mine, owner[r] = (int32_t)e;
            }
        }
        missing = 0;
        for (size_t r = 0; r < rows; r++) missing |= owner[r] < 0;
        for (size_t r = 0; r < rows; r++) {
            if (owner[r] != holder[r]) held[r] = 0;
            else if (owner[r] >= 0) held[r]++;
            price[r] += bid[r], holder[r] = owner[r];
        }
        if (missing && round == 99) held_rounds = SIZE_MAX; /* beyond the authors' 100 rounds there is no bound */
    }
    for (size_t r = 0; r < rows && held_rounds != SIZE_MAX; r++) held_rounds += held[r];
    free(price), free(bid), free(value), free(held), free(holder), free(taken);
    return held_rounds;
}

/* How far the auction may be from the optimum (docs/math.md has the proof): eps for each round that a row was held. */
static void auction_case(size_t rows, size_t cols, const float *s) {
    float low = INFINITY, high = -INFINITY;
    int32_t *index = test_ints(rows), *again = test_ints(rows);
    size_t bytes = 0;
    for (size_t i = 0; i < rows * cols; i++) low = fminf(low, s[i]), high = fmaxf(high, s[i]);
    CHECK_OK(moe_auction(rows, cols, s, index, NULL, 0));
    float step = high / 50.0f - low / 50.0f;
    double sum = auction_sum(rows, cols, s, index), best = best_assignment(rows, cols, s);
    double eps = step < 1e-4f ? (double)1e-4f : (double)step;
    size_t held = plain_auction(rows, cols, s, eps, again);
    if (held != SIZE_MAX && !CHECK(sum <= best + 1e-6 && sum >= best - (double)held * eps - 1e-6))
        printf("        rows %zu cols %zu: %g of %g, eps %g, held %zu\n", rows, cols, sum, best, eps, held);
    CHECK_OK(moe_auction_scratch(rows, cols, &bytes));
    void *scratch = test_memory(bytes, 1);
    FOR_EACH_ISA(isa) {
        CHECK_OK(moe_auction(rows, cols, s, again, scratch, bytes));
        CHECK(same_ints(index, again, rows));
    }
    CHECK_STATUS(moe_auction(rows, cols, s, again, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
    free(index), free(again), free(scratch);
}

/* Scores of a stream of their own, so that a case is the same on every machine; levels: how many different ones, 0 = all. */
static void auction_drawn(size_t rows, size_t cols, int levels, uint64_t stream) {
    float *s = test_floats(rows * cols);
    CHECK_OK(moe_rand_uniform(7, stream, rows * cols, -1, 1, s));
    for (size_t i = 0; i < rows * cols && levels; i++) s[i] = floorf((s[i] + 1) / 2 * (float)levels);
    auction_case(rows, cols, s);
    free(s);
}

static void test_auction(void) {
    uint64_t stream = 0;
    for (int levels = 0; levels <= 3; levels++)
        for (size_t i = 0; i < (levels ? 8 : 40); i++, stream++)
            auction_drawn((1 + stream % 8) * (1 + stream / 8 % 7), 1 + stream % 8, levels, stream);
    for (uint64_t i = 0; i < 2000; i++) auction_drawn(10, 5, 0, 1000 + i); /* some are 2.4 times rows * eps off */
    auction_drawn(64, 8, 0, stream++);
    auction_drawn(96, 4, 0, stream++);
    auction_drawn(96, 4, 2, stream++);
    auction_drawn(64, 64, 0, stream++);
    auction_drawn(64, 64, 1, stream++); /* constant */
    auction_drawn(7, 1, 0, stream);
}

/* Where scores are whole numbers and eps is a power of two, both auctions compute exactly: the same owner for every row. */
static void test_auction_owner(void) {
    enum { ROWS = 24, COLS = 4 };
    float s[ROWS * COLS];
    int32_t index[ROWS], plain[ROWS];
    size_t finished = 0;
    for (uint64_t i = 0; i < 200; i++) {
        CHECK_OK(moe_rand_uniform(11, i, ROWS * COLS, 0, 401, s));
        for (size_t p = 0; p < ROWS * COLS; p++) s[p] = floorf(s[p]);
        s[0] = 0, s[1] = 400; /* eps = 400 / 50 = 8 */
        CHECK_OK(moe_auction(ROWS, COLS, s, index, NULL, 0));
        if (plain_auction(ROWS, COLS, s, 8, plain) == SIZE_MAX) continue;
        finished++;
        CHECK(same_ints(index, plain, ROWS));
    }
    CHECK(finished > 150);
}

static void test_auction_hard(void) { /* whatever the scores, and they need not be separable: balanced */
    enum { T = 512, E = 32 };
    float *s = test_floats(T * E);
    int32_t *index = test_ints(T);
    for (int kind = 0; kind < 7; kind++) {
        for (size_t i = 0; i < T * E; i++) {
            size_t e = i % E, r = i / E;
            if (kind == 0) s[i] = 0.25f;
            if (kind == 1) s[i] = e == 3 ? 1.0f : 0.0f;           /* all want one */
            if (kind == 2) s[i] = (float)(e * r) * 1e-3f;
            if (kind == 3) s[i] = i == 77 ? 1e30f : test_uniform(0, 1);
            if (kind == 4) s[i] = i % 2 ? FLT_MAX : -FLT_MAX;      /* the range is not a float */
            if (kind == 5) s[i] = r < T / 2 ? s[i] : s[i % (T / 2 * E)]; /* every row twice */
            if (kind == 6) s[i] = (float)test_below(2) * 1e-6f;
        }
        CHECK_OK(moe_auction(T, E, s, index, NULL, 0));
        auction_sum(T, E, s, index);
    }
    CHECK_STATUS(moe_auction(T - 1, E, s, index, NULL, 0), MOE_E_UNEVEN);
    CHECK_STATUS(moe_auction(T, E, NULL, index, NULL, 0), MOE_E_NULL_SCORES);
    CHECK_STATUS(moe_auction(T, E, s, NULL, NULL, 0), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_auction(T, 0, s, index, NULL, 0), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_auction_scratch(T, E, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_auction(0, E, NULL, NULL, NULL, 0));
    s[100] = NAN;
    CHECK_STATUS(moe_auction(T, E, s, index, NULL, 0), MOE_E_NAN_LOGITS);
    s[100] = -INFINITY;
    CHECK_STATUS(moe_auction(T, E, s, index, NULL, 0), MOE_E_NAN_LOGITS);
    free(s), free(index);
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

/* ---- robust weights ---- */
static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median_of(double *v, size_t n) {
    qsort(v, n, sizeof *v, compare_doubles);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

static void naive_robust(size_t k, size_t d, const float *const *u, const float *g, double tau, double *reliability, double *out) {
    double *v = test_doubles(k), *far = test_doubles(k), sum = 0;
    for (size_t c = 0; c < d; c++) {
        for (size_t e = 0; e < k; e++) v[e] = (double)u[e][c];
        double med = median_of(v, k);
        for (size_t e = 0; e < k; e++) far[e] += ((double)u[e][c] - med) * ((double)u[e][c] - med);
    }
    for (size_t e = 0; e < k; e++) v[e] = far[e] = sqrt(far[e]);
    double mad = median_of(v, k);
    for (size_t e = 0; e < k; e++) {
        reliability[e] = mad > 0 ? exp(-far[e] / (tau * mad)) : far[e] > 0 ? 0 : 1;
        sum += out[e] = (double)g[e] * reliability[e];
    }
    for (size_t e = 0; e < k; e++) out[e] /= sum;
    free(v), free(far);
}

static void test_robust_weights(void) {
    for (int i = 0; i < 60; i++) {
        enum { MAX = 12 };
        size_t k = 1 + test_below(MAX), d = 1 + test_below(70), bytes = 0;
        float *u = test_floats(k * d), g[MAX], r[MAX], out[MAX], other[MAX], tau = test_uniform(0.5f, 3);
        const float *row[MAX];
        double want[MAX], want_out[MAX];
        test_fill(u, k * d, -1, 1);
        for (size_t e = 0; e < k; e++) row[e] = u + e * d, g[e] = test_uniform(0.1f, 1);
        CHECK_OK(moe_robust_weights_scratch(k, d, &bytes));
        void *scratch = test_memory(bytes, 1);
        naive_robust(k, d, row, g, (double)tau, want, want_out);
        CHECK_OK(moe_robust_weights(k, d, row, g, tau, r, out, NULL, 0));
        for (size_t e = 0; e < k && k > 2; e++) { /* with one or two all distances are equal but for rounding */
            CHECK_NEAR(r[e], want[e], 1e-5);
            CHECK_NEAR(out[e], want_out[e], 1e-5);
        }
        FOR_EACH_ISA(isa) {
            CHECK_OK(moe_robust_weights(k, d, row, g, tau, r, other, scratch, bytes));
            CHECK_SAME(other, out, k);
        }
        CHECK_STATUS(moe_robust_weights(k, d, row, g, tau, r, out, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
        free(u), free(scratch);
    }
}

/* n of K outputs are the truth and a little noise, the others far away. How far the weighted sum ends from the truth. */
static double damage(size_t corrupted, int robust, float lie) {
    enum { K = 10, D = 32 };
    float u[K * D], truth[D], g[K], r[K], out[K];
    const float *row[K];
    double far = 0;
    test_fill(truth, D, -1, 1);
    for (size_t e = 0; e < K; e++) {
        row[e] = u + e * D;
        g[e] = 1.0f / K;
        for (size_t c = 0; c < D; c++) u[e * D + c] = e < corrupted ? lie : truth[c] + test_uniform(-0.05f, 0.05f);
    }
    CHECK_OK(moe_robust_weights(K, D, row, g, 1, r, out, NULL, 0));
    for (size_t c = 0; c < D; c++) {
        double sum = 0;
        for (size_t e = 0; e < K; e++)
            if (!robust || out[e] > 0) sum += (double)(robust ? out[e] : g[e]) * (double)u[e * D + c];
        far += (sum - (double)truth[c]) * (sum - (double)truth[c]);
    }
    return sqrt(far / D);
}

static void test_robust_breakdown(void) {
    CHECK(damage(0, 1, 0) < 0.05);        /* clean: no worse */
    CHECK(damage(4, 0, 100) > 30);        /* 40% corrupted: the plain sum is lost, */
    CHECK(damage(4, 1, 100) < 0.05);      /* the robust one is not, */
    CHECK(damage(4, 1, NAN) < 0.05);      /* nor by what is not a number, */
    CHECK(damage(9, 1, -INFINITY) < 0.06);/* which is seen as such and has no vote; */
    CHECK(damage(6, 1, 100) > 30);        /* at 60% the liars are the majority. */
    CHECK(damage(5, 1, 100) > 1);         /* at 50% the median is half a lie. */
    float a[2] = {1, 2}, b[2] = {1, 2}, c[2] = {5, 5}, bad[2] = {NAN, 0}, g[3] = {0.2f, 0.2f, 0.6f}, r[3], out[3];
    const float *row[3] = {a, b, c}, *none[3] = {bad, bad, bad}, *missing[3] = {a, NULL, c};
    CHECK_OK(moe_robust_weights(3, 2, row, g, 1, r, out, NULL, 0)); /* the median distance is 0 */
    CHECK(r[0] == 1 && r[1] == 1 && r[2] == 0 && out[0] == 0.5f && out[1] == 0.5f && out[2] == 0);
    CHECK_OK(moe_robust_weights(3, 2, none, g, 1, r, out, NULL, 0));
    for (int e = 0; e < 3; e++) CHECK(r[e] == 0 && out[e] == 0);
    CHECK_OK(moe_robust_weights(1, 2, row, g, 1, r, out, NULL, 0));
    CHECK(r[0] == 1 && out[0] == 1);
    CHECK_OK(moe_robust_weights(3, 2, row, g, 1e-38f, r, out, NULL, 0));
    c[0] = 3e38f, c[1] = -3e38f; /* the distance overflows: far, not an error */
    CHECK_OK(moe_robust_weights(3, 2, row, g, 1, r, out, NULL, 0));
    CHECK(out[0] == 0.5f && out[2] == 0);
    CHECK_STATUS(moe_robust_weights(0, 2, row, g, 1, r, out, NULL, 0), MOE_E_NO_OUTPUTS);
    CHECK_STATUS(moe_robust_weights(3, 2, NULL, g, 1, r, out, NULL, 0), MOE_E_NULL_OUTPUTS);
    CHECK_STATUS(moe_robust_weights(3, 2, missing, g, 1, r, out, NULL, 0), MOE_E_NULL_OUTPUTS);
    CHECK_STATUS(moe_robust_weights(3, 2, row, NULL, 1, r, out, NULL, 0), MOE_E_NULL_WEIGHT);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 0, r, out, NULL, 0), MOE_E_TAU);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, NAN, r, out, NULL, 0), MOE_E_TAU);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 1, NULL, out, NULL, 0), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 1, r, NULL, NULL, 0), MOE_E_NULL_OUT);
    g[1] = NAN;
    CHECK_STATUS(moe_robust_weights(3, 2, row, g, 1, r, out, NULL, 0), MOE_E_NAN_WEIGHT);
}

/* ---- aggregates ---- */
static double distances(size_t n, size_t d, const float *x, const double *y) {
    double total = 0;
    for (size_t r = 0; r < n; r++) {
        double sum = 0;
        for (size_t c = 0; c < d; c++) sum += ((double)x[r * d + c] - y[c]) * ((double)x[r * d + c] - y[c]);
        total += sqrt(sum);
    }
    return total;
}

static void aggregate_case(size_t n, size_t d, float trim) {
    size_t cut = (size_t)((double)trim * (double)n), bytes = 0;
    float *x = test_floats(n * d), *out = test_floats(d), *other = test_floats(d);
    double *v = test_doubles(n), *y = test_doubles(d);
    test_fill(x, n * d, -1, 1);
    CHECK_OK(moe_aggregate_scratch(n, d, &bytes));
    void *scratch = test_memory(bytes, 1);
    for (int kind = 0; kind < MOE__AGGREGATE_COUNT; kind++) {
        CHECK_OK(moe_aggregate((moe_aggregate_kind)kind, n, d, x, trim, out, NULL, 0));
        for (size_t c = 0; c < d && kind < MOE_AGGREGATE_GEOMETRIC; c++) {
            double want = 0;
            size_t from = kind == MOE_AGGREGATE_TRIMMED ? cut : 0;
            for (size_t r = 0; r < n; r++) v[r] = (double)x[r * d + c];
            double median = median_of(v, n);
            for (size_t r = from; r < n - from; r++) want += v[r] / (double)(n - 2 * from);
            CHECK_WITHIN(out[c], kind == MOE_AGGREGATE_MEDIAN ? median : want, 1e-6);
        }
        if (kind == MOE_AGGREGATE_GEOMETRIC) { /* no point near it, nor any of the rows, has a lower sum of distances */
            for (size_t c = 0; c < d; c++) y[c] = (double)out[c];
            double least = distances(n, d, x, y), slack = 1e-6 * (double)n;
            for (size_t r = 0; r < n; r++) {
                for (size_t c = 0; c < d; c++) y[c] = (double)x[r * d + c];
                CHECK(distances(n, d, x, y) >= least - slack);
            }
            for (int i = 0; i < 60; i++) {
                double step = pow(10, -1 - i % 3);
                for (size_t c = 0; c < d; c++) y[c] = (double)out[c] + step * (double)test_uniform(-1, 1);
                CHECK(distances(n, d, x, y) >= least - slack);
            }
        }
        FOR_EACH_ISA(isa) {
            CHECK_OK(moe_aggregate((moe_aggregate_kind)kind, n, d, x, trim, other, scratch, bytes));
            CHECK_SAME(other, out, d);
        }
    }
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, n, d, x, 0, out, scratch, bytes - 1), MOE_E_SMALL_MEMORY);
    free(x), free(out), free(other), free(v), free(y), free(scratch);
}

static void test_aggregate(void) {
    aggregate_case(1, 5, 0.2f);
    aggregate_case(2, 17, 0.4f);
    aggregate_case(5, 1, 0.25f);
    aggregate_case(8, 33, 0.25f);
    aggregate_case(9, 16, 0.49f);
    aggregate_case(40, 7, 0);
    float same[6] = {1, 2, 1, 2, 1, 2}, line[3] = {0, 1, 10}, square[8] = {0, 0, 0, 1, 1, 0, 1, 1}, out[2];
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_GEOMETRIC, 3, 2, same, 0, out, NULL, 0));
    CHECK(out[0] == 1 && out[1] == 2);
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_GEOMETRIC, 3, 1, line, 0, out, NULL, 0)); /* a point itself: the middle one */
    CHECK_WITHIN(out[0], 1, 1e-5);
    CHECK_OK(moe_aggregate(MOE_AGGREGATE_GEOMETRIC, 4, 2, square, 0, out, NULL, 0));
    CHECK_WITHIN(out[0], 0.5, 1e-5);
    CHECK_WITHIN(out[1], 0.5, 1e-5);
    /* 40% at a distance of a million: the mean follows, the others do not */
    float crowd[20];
    for (int r = 0; r < 10; r++)
        for (int c = 0; c < 2; c++) crowd[r * 2 + c] = r < 4 ? 1e6f : test_uniform(-0.1f, 0.1f);
    for (int kind = 0; kind < MOE__AGGREGATE_COUNT; kind++) {
        CHECK_OK(moe_aggregate((moe_aggregate_kind)kind, 10, 2, crowd, 0.45f, out, NULL, 0));
        CHECK((fabsf(out[0]) < 0.3f) == (kind != MOE_AGGREGATE_MEAN));
    }
    CHECK_STATUS(moe_aggregate(MOE__AGGREGATE_COUNT, 3, 1, line, 0, out, NULL, 0), MOE_E_AGGREGATE);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_TRIMMED, 3, 1, line, 0.5f, out, NULL, 0), MOE_E_TRIM);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_TRIMMED, 3, 1, line, -0.1f, out, NULL, 0), MOE_E_TRIM);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_TRIMMED, 3, 1, line, NAN, out, NULL, 0), MOE_E_TRIM);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 0, 1, line, 0, out, NULL, 0), MOE_E_NO_OUTPUTS);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 1, NULL, 0, out, NULL, 0), MOE_E_NULL_OUTPUTS);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 1, line, 0, NULL, NULL, 0), MOE_E_NULL_OUT);
    line[1] = NAN;
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEAN, 3, 1, line, 0, out, NULL, 0), MOE_E_NAN_OUTPUTS);
    CHECK_STATUS(moe_aggregate_scratch(SIZE_MAX / 8, 1, &(size_t){0}), MOE_E_OVERFLOW);
}

/* ---- scratch of our own: an allocation that fails is said, and nothing is left ---- */
static void test_alloc(void) {
    float s[8] = {0, 1, 2, 3, 4, 5, 6, 7}, out[8], r[4];
    const float *row[2] = {s, s + 4};
    int32_t index[8];
    long live = test_live_blocks;
    test_fail_at = 0;
    CHECK_STATUS(moe_expert_choice(4, 2, 2, 2, s, index, NULL, 0), MOE_E_NO_MEMORY);
    CHECK_STATUS(moe_sinkhorn(4, 2, 1, 2, s, out, NULL, 0), MOE_E_NO_MEMORY);
    CHECK_STATUS(moe_auction(4, 2, s, index, NULL, 0), MOE_E_NO_MEMORY);
    CHECK_STATUS(moe_robust_weights(2, 4, row, s, 1, r, out, NULL, 0), MOE_E_NO_MEMORY);
    CHECK_STATUS(moe_aggregate(MOE_AGGREGATE_MEDIAN, 4, 2, s, 0, out, NULL, 0), MOE_E_NO_MEMORY);
    /* and these allocate nothing */
    CHECK_OK(moe_topk(1, 8, 3, s, index, out));
    CHECK_OK(moe_topk_groups(1, 8, 3, 4, 2, s, index));
    CHECK_OK(moe_topk_threshold(1, 8, 3, 2, NULL, 1, s, index));
    CHECK_OK(moe_top_p(1, 8, 3, 0.5f, s, index));
    test_fail_at = -1;
    CHECK(test_live_blocks == live);
}

int main(void) {
    RUN(test_topk);
    RUN(test_topk_nan);
    RUN(test_groups);
    RUN(test_threshold);
    RUN(test_top_p);
    RUN(test_expert_choice);
    RUN(test_sinkhorn);
    RUN(test_hungarian);
    RUN(test_auction);
    RUN(test_auction_owner);
    RUN(test_auction_hard);
    RUN(test_gumbel);
    RUN(test_robust_weights);
    RUN(test_robust_breakdown);
    RUN(test_aggregate);
    RUN(test_alloc);
    CHECK(test_live_blocks == 0);
    return test_end();
}
