/* The library for all suites that do not read its private parts: see test.h. */
#include <stddef.h>
void *test_moe_malloc(size_t bytes, const void *context);
void test_moe_free(void *p, const void *context);
#define MOE_MALLOC(bytes, context) test_moe_malloc(bytes, context)
#define MOE_FREE(p, context) test_moe_free(p, context)
#define MOE_IMPLEMENTATION
#include "moe.h"
