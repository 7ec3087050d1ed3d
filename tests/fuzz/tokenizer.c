/* Any bytes as a tokenizer.json, and, after a NUL, as a text for it. What the example programs end with (a refusal)
 * goes back to the target, which frees what was allocated until then. */
#include "fuzz.h"

#include <setjmp.h>

#include "examples/common/unicode.h" /* its tables stay */

static jmp_buf fuzz_left;
static const void *fuzz_json;
static size_t fuzz_json_size;
static void **fuzz_kept; /* every block begins with the one before it and the one after it */

static void *fuzz_allocate(size_t count, size_t size) {
    size_t bytes = count * size;
    void **p = count && bytes / count != size ? NULL : (void **)calloc(1, bytes + 4 * sizeof *p);
    if (bytes > (size_t)1 << 28 || !p) abort(); /* in proportion to the file */
    p[0] = fuzz_kept, p[1] = NULL, p[2] = (void *)(uintptr_t)bytes;
    if (fuzz_kept) fuzz_kept[1] = p;
    return (fuzz_kept = p) + 4;
}
static void fuzz_release(void *at) {
    if (!at) return;
    void **p = (void **)at - 4;
    if (p[1]) ((void **)p[1])[0] = p[0];
    else fuzz_kept = (void **)p[0];
    if (p[0]) ((void **)p[0])[1] = p[1];
    free(p);
}
static void *fuzz_again(void *at, size_t size) {
    void *p = fuzz_allocate(1, size);
    size_t had = at ? (size_t)(uintptr_t)((void **)at)[-2] : 0;
    if (had) memcpy(p, at, had < size ? had : size);
    fuzz_release(at);
    return p;
}
static const void *fuzz_view(const char *path, size_t *size) {
    (void)path;
    *size = fuzz_json_size;
    return fuzz_json;
}
EX_PRINTF(1, 2) static void fuzz_die(const char *format, ...) {
    (void)format;
    longjmp(fuzz_left, 1);
}
EX_PRINTF(2, 3) static void fuzz_refuse(const char *file, const char *format, ...) {
    (void)file, (void)format;
    longjmp(fuzz_left, 1);
}

#define file_view fuzz_view
#define allocate fuzz_allocate
#define malloc(size) fuzz_allocate(1, size)
#define calloc fuzz_allocate
#define realloc fuzz_again
#define free fuzz_release
#define refuse fuzz_refuse
#define die fuzz_die
#include "examples/common/tokenizer.h"
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef allocate
#undef refuse
#undef die
#undef file_view

static void fuzz_text(const tokenizer *t, const char *text, size_t n) {
    token_list ids = tokenizer_encode(t, text, n, 1);
    for (size_t i = 0; i < ids.n; i++) require(ids.id[i] >= 0 && (size_t)ids.id[i] < t->n_tokens);
    text_buffer back = tokenizer_decode(t, ids.id, ids.n, 0);
    require(back.length == 0 || back.text[back.length] == 0);
}
static int fuzz_tokenizer(const uint8_t *data, size_t size) {
    const uint8_t *end = size ? (const uint8_t *)memchr(data, 0, size) : NULL;
    fuzz_json = data;
    fuzz_json_size = end ? (size_t)(end - data) : size;
    if (!setjmp(fuzz_left)) {
        const tokenizer *t = tokenizer_open("x");
        if (end) fuzz_text(t, (const char *)end + 1, size - fuzz_json_size - 1);
    }
    while (fuzz_kept) fuzz_release(fuzz_kept + 4);
    return 0;
}
FUZZ_TARGET(fuzz_tokenizer)
