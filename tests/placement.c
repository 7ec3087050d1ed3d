/* Ranks hold blocks of consecutive experts and tokens, as even as they can be. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"

static void check_blocks(size_t (*rank_of)(size_t, size_t, size_t), size_t count, size_t ranks) {
    size_t last = 0, held[17] = {0};
    for (size_t i = 0; i < count; i++) {
        size_t rank = rank_of(i, count, ranks);
        if (!CHECK(rank < ranks && rank >= last)) return;
        last = rank;
        held[rank]++;
    }
    for (size_t rank = 0; rank < ranks; rank++) CHECK(held[rank] >= count / ranks && held[rank] <= count / ranks + 1);
}

static void test_blocks(void) {
    for (size_t ranks = 1; ranks <= 17; ranks++)
        for (size_t count = ranks; count < 70; count++) {
            check_blocks(moe__placement_of_expert, count, ranks);
            check_blocks(moe__placement_of_token, count, ranks);
        }
}

int main(void) {
    RUN(test_blocks);
    return test_end();
}
