/* specific.h by hand: shares, lifts, the order, padding. */
#include "test.h"

#include "examples/common/specific.h"

static void test_by_hand(void) {
    /* tokens 4 (6 times), 7 (6 times), 9 (4: too few); two choices each, -1 = none; the row of token 8 is padding */
    static const int32_t token[] = {4, 4, 4, 4, 4, 4, 7, 7, 7, 7, 7, 7, 9, 9, 9, 9, 8};
    static const int32_t index[] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 2, 1, 2, 1, 2, 0,
                                    2, -1, 1, 2, 1, -1, 2, 1, 2, 1, 2, 1, 2, 1, -1, -1};
    specific_token best[3 * SPECIFIC_MOST], *one = best + SPECIFIC_MOST, *two = one + SPECIFIC_MOST;
    specific_tokens(17, 3, 2, index, token, best);
    CHECK(best[0].token == 4 && best[0].taken == 6 && best[0].seen == 6);
    CHECK_NEAR(best[0].share, 1, 1e-15);
    CHECK_NEAR(best[0].lift, 16.0 / 7, 1e-12); /* expert 0 has 7 of 16 tokens */
    CHECK(best[1].token == 7 && best[1].taken == 1 && best[2].token == -1);
    CHECK_NEAR(best[1].lift, 1.0 / 6 * 16 / 7, 1e-12);
    CHECK(one[0].token == 4 && one[0].taken == 5 && one[1].token == 7 && one[1].taken == 4 && one[2].token == -1);
    CHECK_NEAR(one[1].lift, 4.0 / 6 * 16 / 13, 1e-12);
    CHECK(two[0].token == 7 && two[0].taken == 5 && two[1].token == 4 && two[1].taken == 1);
    /* Wilson's lower bound of 6 of 6: n / (n + z^2) */
    CHECK_NEAR(best[0].low, 6 / (6 + 1.959963985 * 1.959963985), 1e-12);
}
/* 12 of 13 come before 5 of 5: the second may be chance */
static void test_order(void) {
    int32_t token[18], index[18];
    specific_token best[2 * SPECIFIC_MOST];
    for (int t = 0; t < 18; t++) token[t] = t < 5 ? 3 : 2, index[t] = t == 17;
    specific_tokens(18, 2, 1, index, token, best);
    CHECK(best[0].token == 2 && best[0].taken == 12 && best[1].token == 3 && best[1].taken == 5);
    CHECK(best[0].share < best[1].share);
    for (int t = 0; t < 18; t++) index[t] = -1; /* nothing but padding */
    specific_tokens(18, 2, 1, index, token, best);
    CHECK(best[0].token == -1 && best[SPECIFIC_MOST].token == -1);
}

int main(void) {
    RUN(test_by_hand);
    RUN(test_order);
    return test_end();
}
