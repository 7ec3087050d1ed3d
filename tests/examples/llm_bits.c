/* A model that build/wikitext2's code trains and writes, read back by build/llm: the logits of every token have the
 * same bits, so the perplexities are the same. In float32 as it trains; written as bfloat16, the bits of the rounded
 * model. */
#include "test.h"

#include "examples/common/checkpoint.h"

enum { V = 72, D = 32, LAYERS = 3, L = 40, E = 6, ROWS = 2 * L };
static const lm_shape shape = {V, D, 2, LAYERS, L, 0, LM_MUON, 0, 10000, 1e-5, 3};

static const char *folder(void) {
    static char path[200];
    snprintf(path, sizeof path, "%s/moe-llm-bits-test", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    return path;
}
static lm *trained(const char *choices, int tied) {
    static int32_t token[ROWS], target[ROWS];
    lm_shape s = shape;
    moe_desc d = {0};
    CHECK_OK(moe_desc_system(&d, "mixtral"));
    d.d_model = D, d.d_ff = 24, d.n_experts = E, d.top_k = 2;
    CHECK_OK(moe_desc_parse(&d, choices, NULL));
    CHECK_OK(moe_desc_resolve(&d, &d));
    s.tied = tied;
    lm *m = lm_new(&s, &d, ROWS);
    for (uint64_t step = 0; step < 4; step++) {
        lm_moment now = {step};
        for (size_t t = 0; t < ROWS; t++) {
            token[t] = (int32_t)(moe_rand_u32(5, step, t) % V);
            target[t] = (token[t] * 7 + 1) % V;
        }
        (void)lm_forward(m, token, target, ROWS, &now);
        lm_backward(m, ROWS, &now);
        lm_step(m, 0.02f, 0.1f);
    }
    return m;
}
/* build/llm's logits of the tokens. */
static int read_back(const int32_t *token, size_t n, const char *format, float *logits) {
    char command[1200], path[300];
    const char *build = getenv("BUILD") ? getenv("BUILD") : "build";
    size_t used, size;
    used = (size_t)snprintf(command, sizeof command,
                            "test -x %s/llm || make -s %s/llm; %s/llm --quiet --format %s "
                            "--batch 7 --model %s --dump %s/d --ids ",
                            build, build, build, format, folder(), folder());
    for (size_t t = 0; t < n; t++)
        used += (size_t)snprintf(command + used, sizeof command - used, "%s%d", t ? "," : "", (int)token[t]);
    if (!CHECK(system(command) == 0)) return 0;
    snprintf(path, sizeof path, "%s/d.logits.npy", folder());
    const unsigned char *bytes = file_view(path, &size);
    moe_npy npy;
    if (!CHECK(bytes) || !CHECK_OK(moe_npy_open(&npy, bytes, size)) || !CHECK(npy.count == n * V)) return 0;
    memcpy(logits, bytes + npy.data, n * V * sizeof *logits);
    return 1;
}
static void compare(lm *m, const char *format) {
    static float mine[L * V], theirs[L * V];
    static int32_t token[L];
    for (size_t t = 0; t < L; t++) token[t] = (int32_t)(moe_rand_u32(9, 1, t) % V);
    lm_body(m, token, L, NULL);
    tb_linear(&m->run, L, D, V, m->xf, m->bank.value + m->head, mine);
    if (!read_back(token, L, format, theirs)) return;
    CHECK(memcmp(mine, theirs, sizeof mine) == 0);
    CHECK(mine[0] != mine[1]);
}
static void test_float32(void) {
    static const char *const choices[] = {"gate=softmax-selected", "gate=softmax normalize=false"};
    for (int k = 0; k < 4; k++) {
        lm *m = trained(choices[k / 2], k % 2);
        checkpoint_save(m, NULL, 0, folder());
        compare(m, "f32");
        lm_free(m);
    }
}
/* every number of the file is a bfloat16, so the experts' bf16 format loses nothing more */
static void test_bfloat16(void) {
    lm *m = trained("gate=softmax-selected", 0);
    checkpoint_save(m, NULL, 1, folder());
    checkpoint_list l = checkpoint_tensors(m);
    for (size_t i = 0; i < LAYERS; i++) checkpoint_get_mixture(m, i, l.experts[i], 0);
    for (size_t i = 0; i < l.n; i++)
        for (size_t k = 0; k < l.tensor[i].rows * (l.tensor[i].cols ? l.tensor[i].cols : 1); k++) {
            uint32_t bits, rest; /* by hand: of two as near the even one */
            memcpy(&bits, l.tensor[i].to + k, 4);
            rest = bits & 0xffff;
            bits -= rest;
            if (rest > 0x8000 || (rest == 0x8000 && bits & 0x10000)) bits += 0x10000;
            memcpy(l.tensor[i].to + k, &bits, 4);
        }
    for (size_t i = 0; i < LAYERS; i++) checkpoint_get_mixture(m, i, l.experts[i], 1);
    checkpoint_free(&l);
    compare(m, "f32");
    compare(m, "bf16");
    lm_free(m);
}

int main(void) {
    RUN(test_float32);
    RUN(test_bfloat16);
    return test_end();
}
