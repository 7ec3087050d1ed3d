/* The library for all suites that do not have it in themselves (see test.h), and what some of them see of its inside
 * (inside.h). */
#include <assert.h>
#include <stddef.h>
void *test_moe_malloc(size_t bytes, const void *context);
void test_moe_free(void *p, const void *context);
#define MOE_MALLOC(bytes, context) test_moe_malloc(bytes, context)
#define MOE_FREE(p, context) test_moe_free(p, context)
#define MOE_ASSERT(x) assert(x) /* what cannot be, by the library's own word */
#define MOE_IMPLEMENTATION
#include "moe.h"

#include "inside.h"

inside inside_of(const moe_tape *tape) {
    const moe__run_memory *memory = tape->memory;
    inside in = {.training = memory->now.training, .k = memory->now.k, .prob_t = memory->now.prob_t,
                 .before = memory->gate.before, .noise = memory->noise.draw, .mix = memory->combine.mix,
                 .dispatch = memory->combine.dispatch};
    for (size_t g = 0; g < memory->experts.n_groups; g++) in.network_rows += memory->experts.group[g].rows;
    if (!memory->codes) return in;
    in.code = memory->codes->code, in.code_expert = memory->codes->expert;
    in.code_gate = memory->codes->gate, in.code_x = memory->codes->x;
    return in;
}

int inside_jitter(const moe_tape *tape, size_t n, float low, float high, float *out) {
    moe__run run;
    if (moe__pass_run(&run, &tape->memory->plan, (moe_tape *)(uintptr_t)tape)) return 0;
    moe__run_uniforms(&run, MOE__USE_JITTER, 0, n, low, high, out);
    return 1;
}

const float *inside_params(const moe_layer *layer) { return layer->part[MOE_PART_PARAMS]; }
