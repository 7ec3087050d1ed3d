/* fuzz.h - what the targets share. A target NAME.c includes this first, defines
 *
 *     static int fuzz_NAME(const uint8_t *data, size_t size)      any bytes: nothing crashes, every promise is kept
 *     FUZZ_TARGET(fuzz_NAME)
 *
 * and is a libFuzzer program of its own, linked with the library (run.sh). With FUZZ_REPLAY it is a part of
 * tests/contract/replay.c, which gives it the bytes in corpus/NAME/, with any compiler. */
#ifndef FUZZ_H
#define FUZZ_H

#ifndef FUZZ_REPLAY
#define _POSIX_C_SOURCE 200809L
#define FUZZ_TARGET(target)                                         \
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);   \
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) { return target(data, size); }
#else
#define FUZZ_TARGET(target)
#endif
#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define require(ok) \
    do if (!(ok)) { fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #ok); abort(); } while (0)

/* What is left of an input. Past its end all is 0. */
typedef struct fuzz_input { const uint8_t *data; size_t size; } fuzz_input;
static inline unsigned fuzz_byte(fuzz_input *in) {
    if (!in->size) return 0;
    in->size--;
    return *in->data++;
}
/* n floats: three in four small numbers of one byte, the others any bits. */
static inline void fuzz_floats(fuzz_input *in, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) {
        unsigned b = fuzz_byte(in);
        uint32_t bits = 0;
        out[i] = ((float)b - 96) / 64;
        if (b < 192) continue;
        for (int k = 0; k < 4; k++) bits = bits << 8 | fuzz_byte(in);
        memcpy(out + i, &bits, sizeof bits);
    }
}
/* The text up to a line's end, NUL-terminated; the line's end is left out. */
static inline void fuzz_line(fuzz_input *in, char *text, size_t room) {
    size_t n = 0;
    for (unsigned b = 0; in->size && (b = fuzz_byte(in)) != '\n' && b;)
        if (n + 1 < room) text[n++] = (char)b;
    text[n] = 0;
}
/* A desc: a byte that names a system, then a line of fields over small sizes. */
static inline moe_status fuzz_desc_of(fuzz_input *in, moe_desc *d) {
    char text[512];
    memset(d, 0, sizeof *d);
    const moe_system *row = moe_system_at(fuzz_byte(in) % (moe_systems_count() + 1));
    d->d_model = 6, d->d_ff = 5, d->n_experts = 4, d->top_k = 2;
    moe_status status = row ? moe_desc_system(d, row->name) : MOE_OK;
    fuzz_line(in, text, sizeof text);
    return status ? status : moe_desc_parse(d, text, NULL);
}

#endif
