/* A layer and a tape in the caller's memory: the same bits, nothing written outside, nothing allocated. */
#include "test.h"
#include "oracle.h"
#include "fixture.h"

/* ---- memory of the caller ---- */
static void test_in_memory(void) {
    moe_desc d = desc_of(13, 20, 4, 2);
    d.bias = MOE_ON, d.clip_norm = 1;
    fixture F;
    size_t layer_bytes = 0, tape_bytes = 0, small = 0, n = 15 * 13;
    if (!fixture_new(&F, &d, 15)) return;
    moe_layer_free(F.m), F.m = NULL;
    CHECK_OK(moe_layer_new(&F.m, &d));
    CHECK_OK(moe_layer_size(&d, &layer_bytes));
    CHECK_OK(moe_tape_size(&d, 15, MOE_ON, &tape_bytes));
    CHECK_OK(moe_tape_size(&d, 15, MOE_OFF, &small));
    CHECK(small < tape_bytes);
    for (size_t shift = 0; shift < 9; shift += 4) {
        unsigned char *a = (unsigned char *)test_memory(layer_bytes + 64, 1),
                      *b = (unsigned char *)test_memory(tape_bytes + 64, 1);
        memset(a, 0xab, layer_bytes + 64), memset(b, 0xab, tape_bytes + 64);
        moe_layer *m = NULL;
        moe_tape *t = NULL;
        long before = test_allocations;
        test_fail_at = 0; /* any allocation would fail */
        CHECK_OK(moe_layer_init(&m, &d, a + shift, layer_bytes));
        CHECK_OK(moe_tape_init(&t, &d, 15, MOE_ON, b + shift, tape_bytes));
        float *y = test_floats(n), *dx = test_floats(n);
        CHECK_OK(moe_forward_tape(m, t, F.x, 15, y));
        CHECK_OK(moe_backward_tape(m, t, F.dy, dx));
        CHECK_OK(moe_step(m, 0.01f));
        CHECK_STATUS(moe_forward(m, F.x, 15, y), MOE_E_NO_TAPE);
        CHECK_STATUS(moe_backward(m, F.dy, NULL), MOE_E_NO_TAPE);
        moe_layer_free(m);
        moe_tape_free(t);
        test_fail_at = -1;
        CHECK(test_allocations == before);
        for (size_t i = 0; i < shift; i++) CHECK(a[i] == 0xab && b[i] == 0xab);
        for (size_t i = layer_bytes + shift; i < layer_bytes + 64; i++) CHECK(a[i] == 0xab);
        for (size_t i = tape_bytes + shift; i < tape_bytes + 64; i++) CHECK(b[i] == 0xab);
        if (shift == 0) { /* the same bits as the layer that allocates */
            CHECK_OK(moe_forward(F.m, F.x, 15, F.y));
            CHECK_OK(moe_backward(F.m, F.dy, F.dx));
            CHECK_OK(moe_step(F.m, 0.01f));
        }
        CHECK_SAME(y, F.y, n);
        CHECK_SAME(dx, F.dx, n);
        m = NULL;
        CHECK_STATUS(moe_layer_init(&m, &d, a, layer_bytes - 1), MOE_E_SMALL_MEMORY);
        CHECK_STATUS(moe_tape_init(&t, &d, 15, MOE_ON, b, tape_bytes - 1), MOE_E_SMALL_MEMORY);
        free(a), free(b), free(y), free(dx);
    }
    fixture_free(&F);
    CHECK(test_live_blocks == 0);
}

/* What of a desc a tape was made for, and what may differ: base is the tape's, text the layer's. */
static void test_another_desc(void) {
    static const struct { const char *text; int fits; } rows[] = {
        {"d_model=12", 0}, {"d_ff=12", 0}, {"n_experts=5", 0}, {"top_k=1", 0}, {"n_shared=2", 0}, {"n_zero=1", 0},
        {"shared_gate=false", 0}, {"n_constant=1", 0}, {"sequence=8", 0}, {"n_ranks=2", 0}, {"score=tanh", 0},
        {"d_router=6", 0}, {"router_bias=false", 0}, {"route_sequence=true", 0}, {"jitter=0.1", 0},
        {"noise=gaussian", 0}, {"residual=true", 0}, {"gate=sigmoid", 0}, {"learn_temperature=true", 0},
        {"select=all", 0}, {"random_second=true", 0}, {"capacity_factor=1", 1}, {"expert=relu", 0},
        {"expert=geglu", 0}, {"bias=true", 0}, {"expert_norm=true", 0}, {"combine=merge select=all", 0},
        {"n_codes=4", 0}, {"loss.output-orthogonality=1", 0}, {"seed=9", 1},
        {"temperature=2", 1}, {"top_p=0.5", 1}, {"zero_output=true", 1}, {"loss.switch=1", 1}, {"weight_scale=2", 1},
        {"controller=bias", 1}, {"normalize=false", 1}, {"optimizer=sgd", 1}, {"mask_jitter=0.2", 1}};
    float x[2 * 13] = {0}, y[2 * 13];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_desc base = desc_of(13, 8, 4, 2), d;
        moe_layer *m = NULL;
        moe_tape *t = NULL;
        CHECK_OK(moe_desc_parse(&base, "score=mlp d_router=5 n_shared=1 shared_gate=true", NULL));
        d = base;
        CHECK_OK(moe_desc_parse(&d, rows[i].text, NULL));
        CHECK_OK(moe_tape_new(&t, &base, 2, MOE_ON));
        if (!CHECK_OK(moe_layer_new(&m, &d)) ||
            !CHECK_STATUS(moe_forward_tape(m, t, x, 2, y), rows[i].fits ? MOE_OK : MOE_E_TAPE_DESC))
            printf("        %s\n", rows[i].text);
        moe_tape_free(t), moe_layer_free(m);
    }
}
static void test_sizes(void) {
    moe_desc d = desc_of(1, 1, 1, 1);
    size_t bytes = 0;
    CHECK_OK(moe_tape_size(&d, (size_t)1 << 30, MOE_ON, &bytes));
    d.n_shared = 1; /* 2^31 rows of experts, though a token has one routed choice */
    CHECK_STATUS(moe_tape_size(&d, (size_t)1 << 30, MOE_ON, &bytes), MOE_E_OVERFLOW);
}

/* ---- systems ---- */
#include "rows.h"

/* A tape of several blocks of tokens, of which slots are few: nothing behind it changes, nor behind the last token. */
static void test_blocks(void) {
    enum { T = 300, BEHIND = 1 << 17 };
    static const char text[] = "n_experts=2 combine=soft select=all soft_slots=2 sequence=300 score=mlp d_router=32";
    moe_desc d = row_desc(NULL, text);
    moe_layer *m = row(NULL, text);
    moe_tape *t = NULL;
    size_t bytes = 0, changed = 0;
    tokens(T);
    CHECK_OK(moe_tape_size(&d, T + 1, MOE_OFF, &bytes));
    unsigned char *memory = (unsigned char *)test_memory(bytes + BEHIND, 1);
    memset(memory, 0xab, bytes + BEHIND);
    CHECK_OK(moe_tape_init(&t, &d, T + 1, MOE_OFF, memory, bytes));
    CHECK_OK(moe_forward_tape(m, t, x, T, y));
    for (size_t i = 0; i < BEHIND; i++) changed += memory[bytes + i] != 0xab;
    CHECK(changed == 0 && test_bits(t->logits[2 * T]) == 0xabababab);
    moe_tape_free(t), moe_layer_free(m), free(memory);
}

/* ---- the N-th allocation fails, for every N ---- */
static void test_no_memory(void) {
    enum { T = 24, SMALL = 8 };
    static const char *const names[] = {"soft-moe", "smear", "vqmoe",         "base",        "sinkhorn",
                                        "robust",   "ermoe", "expert-choice", "deepseek-v3", "moe++"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        moe_desc d = row_desc(names[i], "");
        moe_layer *m = NULL;
        tokens(T);
        float want[T * D];
        if (!CHECK_OK(moe_layer_new(&m, &d))) continue;
        CHECK_OK(moe_forward(m, x, SMALL, y));
        CHECK_OK(moe_forward(m, x, T, want));
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK_OK(moe_step(m, 0.01f));
        uint64_t hash = moe_layer_hash(m);
        moe_layer_free(m);
        CHECK(test_live_blocks == 0);
        for (long n = 0, failed = 1; failed && n < 100; n++) {
            failed = 0;
            /* each call is tried with n allocations left, and again with all */
            for (int stage = 0; stage < 5; stage++) {
                moe_status s = MOE_OK;
                for (int again = 0; again < 2; again++) {
                    uint64_t before = m && stage ? moe_layer_hash(m) : 0;
                    if (!again) test_fail_at = n;
                    if (stage == 0) s = moe_layer_new(&m, &d);
                    if (stage == 1) s = moe_forward(m, x, SMALL, y);
                    if (stage == 2) s = moe_forward(m, x, T, y); /* the tape grows */
                    if (stage == 3) s = moe_backward(m, dy, NULL);
                    if (stage == 4) s = moe_step(m, 0.01f);
                    test_fail_at = -1;
                    if (!s) break;
                    if (!CHECK(!again && moe_status_kind(s) == MOE_KIND_MEMORY))
                        printf("        %s: %s\n", names[i], moe_status_string(s));
                    CHECK(stage ? moe_layer_hash(m) == before : m == NULL);
                    if (stage == 2) CHECK_STATUS(moe_backward(m, dy, NULL), MOE_E_NO_FORWARD);
                    failed = 1;
                }
                if (!CHECK_OK(s)) break;
            }
            CHECK_SAME(y, want, T * D);
            CHECK(moe_layer_hash(m) == hash); /* as if nothing had happened */
            moe_layer_free(m);
            m = NULL;
            CHECK(test_live_blocks == 0);
            CHECK(n > 0 || failed);
        }
    }
}

int main(void) {
    RUN(test_in_memory);
    RUN(test_another_desc);
    RUN(test_sizes);
    RUN(test_blocks);
    RUN(test_no_memory);
    return test_end();
}
