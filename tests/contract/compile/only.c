/* One layer's outputs at level 2, as a hash: with a desc from the command line, or in a build for the one desc that it
 * exported.
 *
 *     only SYSTEM FIELDS [PLAN]   the hash; writes PLAN, to be compiled in: cc -include PLAN only.c
 *     only                        such a build: the same hash */
#define MOE_IMPLEMENTATION
#include "moe.h"

#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 70 };

static void must(moe_status status) {
    if (!status) return;
    printf("%s\n", moe_status_string(status));
    exit(1);
}
static float *numbers(unsigned stream, size_t n) {
    float *made = (float *)malloc((n + 1) * sizeof *made);
    if (!made) exit(1);
    must(moe_rand_uniform(3, stream, n, -1.0f, 1.0f, made));
    return made;
}
#ifndef MOE_ONLY_PLAN
static void write_plan(const moe_desc *desc, const char *path) {
    static char text[8192];
    size_t n = moe_desc_export(desc, text, sizeof text);
    FILE *file = fopen(path, "w");
    if (!n || n >= sizeof text || !file || fputs(text, file) < 0 || fclose(file)) exit(2);
}
#endif
int main(int argc, char **argv) {
    moe_tape *tape;
    size_t n_router, n_experts, d = 40;
#ifdef MOE_ONLY_PLAN
    const moe_desc *desc = NULL;
    (void)argc, (void)argv;
#else
    moe_desc given, *desc = &given;
    if (argc < 3) return 2;
    memset(&given, 0, sizeof given);
    given.d_model = 40, given.d_ff = 24, given.n_experts = 8;
    must(moe_desc_system(&given, argv[1]));
    must(moe_desc_parse(&given, argv[2], NULL));
    given.training = MOE_OFF;
    if (argc > 3) write_plan(desc, argv[3]);
#endif
    must(moe_router_count(desc, &n_router));
    must(moe_experts_count(desc, &n_experts));
    must(moe_tape_new(&tape, desc, TOKENS, MOE_OFF));
    float *router = numbers(0, n_router), *experts = numbers(1, n_experts), *x = numbers(2, TOKENS * d);
    float *y = numbers(3, TOKENS * d);
    must(moe_route(tape, router, x, TOKENS));
    must(moe_experts_forward(tape, experts, y));
    printf("%016llx\n", (unsigned long long)moe_hash(0, y, TOKENS * d * sizeof *y));
    moe_tape_free(tape);
    free(router), free(experts), free(x), free(y);
    return 0;
}
