/* What one forward carries: its bodies run once for every block and item, its random numbers depend on their
 * place alone. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"

enum { MOST = 300 };
static size_t seen[MOST];

static void count_tokens(const moe__run *run, size_t t0, size_t t1) {
    if (t0 < t1 && t1 <= run->tape->n_tokens)
        for (size_t t = t0; t < t1; t++) seen[t]++;
}
static void count_item(const moe__run *run, size_t i) {
    if (run->tape && i < MOST) seen[i]++;
}

static void test_bodies(void) {
    for (size_t threads = 1; threads < 4; threads++) {
        moe_desc desc;
        moe_tape *tape = NULL;
        moe__run run;
        memset(&desc, 0, sizeof desc);
        desc.d_model = 64, desc.n_experts = 4, desc.parallel.n_threads = threads;
        if (!CHECK_OK(moe_tape_new(&tape, &desc, MOST, MOE_ON))) return;
        CHECK_OK(moe__pass_run(&run, &tape->memory->plan, tape));
        for (size_t n = 0; n <= MOST; n += n < 3 || n > 60 ? 1 + n / 5 : 1) {
            tape->n_tokens = n;
            memset(seen, 0, sizeof seen);
            moe__run_over_blocks(&run, count_tokens);
            for (size_t t = 0; t < MOST; t++) CHECK(seen[t] == (t < n));
            memset(seen, 0, sizeof seen);
            moe__run_over(&run, n, n % 2 ? 1 : (size_t)1 << 20, count_item); /* little work, and much */
            for (size_t i = 0; i < MOST; i++) CHECK(seen[i] == (i < n));
        }
        moe_tape_free(tape);
    }
    CHECK(test_live_blocks == 0);
}

static void test_random_numbers(void) {
    moe_desc desc;
    moe_tape *tape = NULL;
    moe__run run;
    float all[200], part[200], other[200];
    memset(&desc, 0, sizeof desc);
    desc.d_model = 8;
    if (!CHECK_OK(moe_tape_new(&tape, &desc, 4, MOE_ON))) return;
    CHECK_OK(moe__pass_run(&run, &tape->memory->plan, tape));
    tape->memory->now.draw = 3;
    moe__run_uniforms(&run, MOE__USE_NOISE, 0, 200, -1, 1, all);
    for (size_t at = 0; at < 200; at += 37) { /* any piece of the stream */
        size_t n = at + 37 > 200 ? 200 - at : 37;
        moe__run_uniforms(&run, MOE__USE_NOISE, at, n, -1, 1, part);
        CHECK_SAME(part, all + at, n);
    }
    moe__run_uniforms(&run, MOE__USE_JITTER, 0, 200, -1, 1, other); /* each use has its own */
    size_t same = 0;
    for (size_t i = 0; i < 200; i++) same += other[i] == all[i];
    CHECK(same < 3);
    tape->memory->now.draw = 4; /* and each forward */
    moe__run_uniforms(&run, MOE__USE_NOISE, 0, 200, -1, 1, other);
    for (size_t i = same = 0; i < 200; i++) same += other[i] == all[i];
    CHECK(same < 3);
    moe_tape_free(tape);
}

int main(void) {
    RUN(test_bodies);
    RUN(test_random_numbers);
    return test_end();
}
