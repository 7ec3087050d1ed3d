// flash.c - inference from flash, level 2: router and experts are const arrays that are read where they lie; the tape
// is all the memory. No heap, no file. Built for the one desc that train.c exported (docs/embedded.md).
#define MOE_STATIC
#include "plan.h"
#define MOE_MALLOC(bytes, ctx) ((void)(bytes), (void)(ctx), (void *)0) // no heap here
#define MOE_FREE(ptr, ctx) ((void)(ptr), (void)(ctx))
#include "model_of.h"

#include "weights.h"

int main(void) {
    static float memory[4096]; // moe_tape_size(NULL, TOKENS, MOE_OFF, &bytes) asks for less
    static float y[TOKENS * D];
    moe_tape *tape = NULL;
    moe_status status = moe_tape_init(&tape, NULL, TOKENS, MOE_OFF, memory, sizeof memory);
    if (!status) status = moe_route(tape, router, tokens, TOKENS);
    if (!status) status = moe_experts_forward(tape, experts, y);
    if (!status) print_outputs(y);
    return (int)status;
}
