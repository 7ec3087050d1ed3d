// moe.c - the library as the examples link it: large blocks in huge pages.
#include "platform.h"

#define MOE_MALLOC(bytes, context) huge_malloc(bytes)
#define MOE_FREE(p, context) free(p)
#define MOE_IMPLEMENTATION
#include "moe.h"
