/* What a fragment of C in the documentation may take as given; see tests/contract/compile.sh. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe.h"

int exchange(void *context, const void *send, const size_t *send_bytes, void *receive, const size_t *receive_bytes);
int sum(void *context, uint64_t *values, size_t n);
int broadcast(void *context, size_t root, void *bytes, size_t n);
int more_to_learn(void);

#define FRAGMENT_GIVEN                                                                                            \
    moe_layer *m, moe_layer *layer, moe_tape *t, moe_tape *tape, moe_desc d, moe_desc desc, moe_status s,         \
        moe_status status, moe_routes r, moe_routes *routes, moe_health h, moe_health *health, size_t n, size_t T, \
        size_t E, size_t k, size_t n_tokens, size_t bytes, void *memory, float *x, float *y, float *dx, float *dy, \
        float *target, float *params, float *grads, float *router, float *logits, float *scores, float *weight,   \
        float *prob, float *out, int32_t *index, uint64_t *load, double *value, const char *path, float lr,      \
        int step, size_t i, size_t window, moe_health merged, moe_replicate_desc given, size_t rank, size_t size, \
        void *context
