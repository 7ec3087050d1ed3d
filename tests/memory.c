/* Allocations aligned to 64 bytes; an arena that measures and lays out with one function, and says when a
 * size overflows. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"

static void test_alignment(void) {
    unsigned char *blocks[50];
    for (size_t i = 0; i < 50; i++) {
        blocks[i] = (unsigned char *)moe__alloc(blocks, i * 7);
        if (!CHECK(blocks[i] != NULL && (uintptr_t)blocks[i] % 64 == 0)) return;
        memset(blocks[i], (int)i, i * 7); /* a sanitizer sees a block that is too short */
    }
    CHECK(test_live_blocks == 50 && test_last_context == blocks);
    for (size_t i = 0; i < 50; i++) {
        for (size_t k = 0; k < i * 7; k++) CHECK(blocks[i][k] == i);
        moe__free(blocks, blocks[i]);
    }
    moe__free(blocks, NULL);
    CHECK(test_live_blocks == 0);
    CHECK(moe__alloc(NULL, SIZE_MAX) == NULL && moe__alloc(NULL, SIZE_MAX - 60) == NULL);
    test_fail_at = 0;
    CHECK(moe__alloc(NULL, 1) == NULL);
    test_fail_at = -1;
}

static void lay_out(moe__arena *arena, float **floats, unsigned char **bytes) {
    floats[0] = moe__take_floats(arena, 3, 5);
    bytes[0] = (unsigned char *)moe__take(arena, 1, 1);
    floats[1] = moe__take_floats(arena, 0, 9);
    bytes[1] = (unsigned char *)moe__take(arena, 65, 1);
}
static void test_arena(void) {
    moe__arena measure, arena;
    float *floats[2];
    unsigned char *bytes[2];
    size_t needed = 0;
    memset(&measure, 0, sizeof measure);
    lay_out(&measure, floats, bytes);
    CHECK(!floats[0] && !bytes[0] && measure.used == 64 + 64 + 0 + 128 && !measure.overflow);
    CHECK_OK(moe__arena_bytes(&measure, &needed));
    CHECK(needed == measure.used + 64);
    for (size_t shift = 0; shift < 64; shift += 7) { /* whatever the caller's alignment */
        unsigned char *memory = (unsigned char *)test_memory(needed + shift, 1);
        CHECK_OK(moe__arena_over(&arena, memory + shift, needed, needed));
        lay_out(&arena, floats, bytes);
        CHECK(arena.used == measure.used && arena.base >= memory + shift);
        CHECK(arena.base + arena.used <= memory + shift + needed);
        CHECK((uintptr_t)floats[0] % 64 == 0 && (uintptr_t)bytes[0] % 64 == 0 && (uintptr_t)bytes[1] % 64 == 0);
        CHECK((unsigned char *)floats[0] + 64 == bytes[0] && bytes[0] + 64 == bytes[1]);
        free(memory);
    }
    CHECK_STATUS(moe__arena_over(&arena, NULL, needed, needed), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe__arena_over(&arena, bytes, needed - 1, needed), MOE_E_SMALL_MEMORY);
}

static void test_overflow(void) {
    static const size_t bad[][2] = {{SIZE_MAX, 2}, {SIZE_MAX / 4, 5}, {SIZE_MAX - 10, 1}, {SIZE_MAX / 2, 2}};
    size_t bytes = 7;
    for (size_t i = 0; i < 4; i++) {
        moe__arena arena;
        memset(&arena, 0, sizeof arena);
        moe__take(&arena, 1, 100);
        moe__take(&arena, bad[i][0], bad[i][1]);
        CHECK(arena.overflow && arena.used == 128);
        moe__take(&arena, 1, 1);
        CHECK_STATUS(moe__arena_bytes(&arena, &bytes), MOE_E_OVERFLOW); /* it is not forgotten */
        memset(&arena, 0, sizeof arena);
        moe__take_floats(&arena, SIZE_MAX / 2, 3);
        CHECK(arena.overflow);
    }
    CHECK(bytes == 7);
    moe__file_cursor none;
    memset(&none, 0, sizeof none);
    CHECK(!moe__file_index_new(&none, SIZE_MAX / 4, 0, NULL) && test_live_blocks == 0);
}

int main(void) {
    RUN(test_alignment);
    RUN(test_arena);
    RUN(test_overflow);
    return test_end();
}
