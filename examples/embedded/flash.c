// flash.c - inference from flash, level 2: router and experts are const arrays that are read where they lie; the tape
// is all the memory. No heap, no file. Built with one row of each table (docs/embedded.md).
#define MOE_STATIC
#define MOE_NO_SIMD
#define MOE_NO_STDIO
#define MOE_NO_TEXT
#define MOE_NO_TRAINING
#define MOE_NO_FORMATS
#define MOE_ONLY_SCORE MOE_SCORE_LINEAR
#define MOE_ONLY_NOISE MOE_NOISE_NONE
#define MOE_ONLY_GATE MOE_GATE_SOFTMAX
#define MOE_ONLY_SELECT MOE_SELECT_TOP_K
#define MOE_ONLY_COMBINE MOE_COMBINE_SUM
#define MOE_ONLY_EXPERT MOE_EXPERT_SWIGLU
#define MOE_MALLOC(bytes, ctx) ((void)(bytes), (void)(ctx), (void *)0) // no heap here
#define MOE_FREE(ptr, ctx) ((void)(ptr), (void)(ctx))
#include "model_of.h"

#include "weights.h"

int main(void) {
    static float memory[4096]; // moe_tape_size(&desc, TOKENS, MOE_OFF, &bytes) asks for less
    static float y[TOKENS * D];
    moe_desc desc = model_desc();
    moe_tape *tape = NULL;
    moe_status status = moe_tape_init(&tape, &desc, TOKENS, MOE_OFF, memory, sizeof memory);
    if (!status) status = moe_route(tape, router, tokens, TOKENS);
    if (!status) status = moe_experts_forward(tape, experts, y);
    if (!status) print_outputs(y);
    return (int)status;
}
