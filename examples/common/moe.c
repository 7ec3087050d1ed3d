// moe.c - the library as the examples link it. Large blocks are asked for in huge pages, where the system has them: a
// checkpoint's gigabytes are then some thousand page faults, not millions.
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE // madvise
#endif
#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

static void *example_malloc(size_t bytes) {
#ifdef MADV_HUGEPAGE
    const size_t page = (size_t)1 << 21;
    void *p = NULL;
    if (bytes >= 4 * page && bytes <= SIZE_MAX - page) {
        if (posix_memalign(&p, page, bytes)) return NULL;
        madvise(p, bytes / page * page, MADV_HUGEPAGE); // a wish: without it the pages are small
        return p;
    }
#endif
    return malloc(bytes);
}
#define MOE_MALLOC(bytes, context) example_malloc(bytes)
#define MOE_FREE(p, context) free(p)
#define MOE_IMPLEMENTATION
#include "moe.h"
