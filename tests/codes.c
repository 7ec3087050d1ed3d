/* The discrete branch of VQMoE, in double. */
#include "test.h"
#include "inside.h"
#include "rows.h"

/* ---- VQMoE ---- */
static void layer_norm(const float *in, float *out) {
    double mean = 0, square = 0;
    for (size_t c = 0; c < D; c++) mean += (double)in[c] / D;
    for (size_t c = 0; c < D; c++) square += ((double)in[c] - mean) * ((double)in[c] - mean) / D;
    for (size_t c = 0; c < D; c++) out[c] = (float)(((double)in[c] - mean) / sqrt(square));
}

/* share: of the code in what the expert reads; 0: the code alone. */
static void check_vqmoe(const char *more, double share) {
    enum { T = 40, CODES = 16 };
    moe_layer *m = row("vqmoe", more);
    if (!m) return;
    tokens(T);
    float *C = get(m, "router.codebook"), *G = get(m, "router.branch");
    CHECK(largest(C, NULL, CODES * D) <= 1.0 / CODES && largest(C, NULL, CODES * D) > 0.9 / CODES);
    test_fill(C, CODES * D, -1, 1), test_fill(G, D * 2, -1, 1);
    set(m, "router.codebook", C), set(m, "router.branch", G);
    C = get(m, "router.codebook"), G = get(m, "router.branch");
    const moe_tape *t = go(m, T, 0);
    const inside in = inside_of(t);
    size_t used = 0, low = 0, high = 0;
    for (size_t i = 0; i < T; i++) {
        double best = INFINITY, want[D] = {0}, s[2] = {0};
        size_t code = 0;
        float q[D], out[D], v[D];
        for (size_t j = 0; j < CODES; j++) {
            double far = 0;
            for (size_t c = 0; c < D; c++) far += pow((double)x[i * D + c] - (double)C[j * D + c], 2);
            if (far < best) best = far, code = j;
        }
        CHECK(in.code[i] == (int32_t)code && in.code_expert[i] == (int32_t)(code % E));
        used |= (size_t)1 << code;
        for (size_t c = 0; c < D; c++)
            for (size_t k = 0; k < 2; k++) s[k] += (double)x[i * D + c] * (double)G[c * 2 + k];
        double g = sigmoid(s[0] - s[1]);
        CHECK_NEAR(in.code_gate[i * 2], g, 1e-6);
        CHECK_NEAR(in.code_gate[i * 2] + in.code_gate[i * 2 + 1], 1, 1e-6);
        low += g < 0.4, high += g > 0.6;
        for (size_t k = 0; k < 2; k++) {
            network(m, (size_t)t->index[i * 2 + k], NULL, x + i * D, 1, out);
            for (size_t c = 0; c < D; c++) want[c] += g * (double)t->weight[i * 2 + k] * (double)out[c];
        }
        for (size_t c = 0; c < D; c++) {
            double q_c = (double)C[code * D + c], x_c = (double)x[i * D + c];
            v[c] = (float)(share > 0 ? (1 - share) * x_c + share * (q_c - x_c) : q_c);
        }
        layer_norm(v, q);
        network(m, code % E, NULL, q, 1, out);
        layer_norm(out, v);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c] + (1 - g) * (double)v[c], 7e-6);
    }
    CHECK(low && high && (used >> E) != 0); /* some by code % E, not code */
    free(C), free(G);
    moe_layer_free(m);
}
static void test_vqmoe(void) {
    check_vqmoe("", 0.1); /* the row has the authors' form */
    check_vqmoe("code_share=off", 0);
    check_vqmoe("code_share=1", 1); /* nothing of x but -x */
}
static void test_code_share_is_a_share(void) {
    static const char *const bad[] = {"code_share=1.5", "code_share=-0.5"};
    for (size_t i = 0; i < 2; i++) {
        moe_desc d = row_desc("vqmoe", bad[i]);
        CHECK_STATUS(moe_desc_resolve(&d, &d), MOE_E_CODE_SHARE);
    }
}
/* Two tokens of two numbers at a code (0, 0): (1 + 4 + 9 + 16) / (2 tokens 2 numbers) times 1.25. */
static void test_codebook_by_hand(void) {
    static const float tokens2[4] = {1, 2, 3, 4}, codes[2] = {0, 0};
    static const int32_t index[2] = {0, 0};
    float dx[4] = {0}, d_codes[2] = {0};
    double value;
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = 2, a.d_model = 2, a.n_codes = 1, a.commitment = 0.25f;
    a.x = tokens2, a.codebook = codes, a.index = index, a.dx = dx, a.d_codebook = d_codes;
    CHECK_OK(moe_loss(MOE_LOSS_CODEBOOK, &a, 1, &value));
    CHECK_NEAR(value, 30 / 4.0 * 1.25, 2e-15);
    CHECK_NEAR(d_codes[0], -2 * (1 + 3) / 4.0, 1e-7); /* 2 (q - x) / (T d), summed over the tokens */
    CHECK_NEAR(d_codes[1], -2 * (2 + 4) / 4.0, 1e-7);
    for (size_t i = 0; i < 4; i++) CHECK_NEAR(dx[i], 0.25 * 2 * (double)tokens2[i] / 4, 1e-7);
}


/* The branch's tensors in a step: G decays as a matrix does, codes do not, and a frozen router keeps both. */
static void check_step(const char *more, int task, int moves, double decay) {
    enum { T = 24, CODES = 16 };
    moe_layer *m = row("vqmoe", more);
    if (!m) return;
    tokens(T);
    float *G = get(m, "router.branch"), *C = get(m, "router.codebook"), *first = get(m, "experts.w1");
    float grad[D * 2], d_codes[CODES * D];
    test_fill(G, D * 2, 0.5f, 1);
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router.branch", G, D * 2));
    if (!task) memset(dy, 0, sizeof dy);
    go(m, T, 0);
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router.branch", grad, D * 2));
    CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router.codebook", d_codes, CODES * D));
    CHECK((largest(grad, NULL, D * 2) > 0) == moves && (largest(d_codes, NULL, CODES * D) > 0) == moves);
    CHECK_OK(moe_step(m, 0.5f));
    float *after = get(m, "router.branch"), *codes = get(m, "router.codebook"), *w1 = get(m, "experts.w1");
    for (size_t i = 0; !moves && i < D * 2; i++) CHECK_NEAR(after[i], (1 - 0.5 * decay) * (double)G[i], 1e-7);
    CHECK((largest(codes, C, CODES * D) > 0) == moves);
    if (moves) CHECK(largest(after, G, D * 2) > 0.1);
    CHECK(largest(w1, first, count_of(m, "experts.w1")) > 0); /* the experts go on */
    free(G), free(C), free(first), free(after), free(codes), free(w1);
    moe_layer_free(m);
}
static void test_step_of_the_branch(void) {
    check_step("weight_decay=0.25 loss.codebook=off", 0, 0, 0.25);
    check_step("weight_decay=0.01 loss.codebook=off optimizer=sgd", 0, 0, 0.01);
    check_step("weight_decay=0.25 freeze_router=true", 1, 0, 0);
    check_step("weight_decay=0.25 freeze_router=true loss.codebook=1 loss.switch=1", 1, 0, 0);
    check_step("weight_decay=off", 1, 1, 0);
}

int main(void) {
    RUN(test_vqmoe);
    RUN(test_code_share_is_a_share);
    RUN(test_codebook_by_hand);
    RUN(test_step_of_the_branch);
    return test_end();
}
