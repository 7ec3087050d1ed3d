/* The allocator that tests/lib/moe.c asks for, where a program is no suite: malloc's. */
#include <stdlib.h>
void *test_moe_malloc(size_t bytes, const void *context);
void test_moe_free(void *p, const void *context);
void *test_moe_malloc(size_t bytes, const void *context) {
    (void)context;
    return malloc(bytes);
}
void test_moe_free(void *p, const void *context) {
    (void)context;
    free(p);
}
