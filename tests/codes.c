/* The discrete branch of VQMoE, in double. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"
#include "rows.h"

/* ---- VQMoE ---- */
static void layer_norm(const float *in, float *out) {
    double mean = 0, square = 0;
    for (size_t c = 0; c < D; c++) mean += (double)in[c] / D;
    for (size_t c = 0; c < D; c++) square += ((double)in[c] - mean) * ((double)in[c] - mean) / D;
    for (size_t c = 0; c < D; c++) out[c] = (float)(((double)in[c] - mean) / sqrt(square));
}

static void test_vqmoe(void) {
    enum { T = 40, CODES = 16 };
    moe_layer *m = row("vqmoe", "");
    if (!m) return;
    tokens(T);
    float *C = get(m, "router.codebook"), *G = get(m, "router.branch");
    CHECK(largest(C, NULL, CODES * D) <= 1.0 / CODES && largest(C, NULL, CODES * D) > 0.9 / CODES);
    test_fill(C, CODES * D, -1, 1), test_fill(G, D * 2, -1, 1);
    set(m, "router.codebook", C), set(m, "router.branch", G);
    C = get(m, "router.codebook"), G = get(m, "router.branch");
    const moe_tape *t = go(m, T, 0);
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
        CHECK(t->memory->codes->code[i] == (int32_t)code && t->memory->codes->expert[i] == (int32_t)(code % E));
        used |= (size_t)1 << code;
        for (size_t c = 0; c < D; c++)
            for (size_t k = 0; k < 2; k++) s[k] += (double)x[i * D + c] * (double)G[c * 2 + k];
        double g = sigmoid(s[0] - s[1]);
        CHECK_NEAR(t->memory->codes->gate[i * 2], g, 1e-6);
        CHECK_NEAR(t->memory->codes->gate[i * 2] + t->memory->codes->gate[i * 2 + 1], 1, 1e-6);
        low += g < 0.4, high += g > 0.6;
        for (size_t k = 0; k < 2; k++) {
            network(m, (size_t)t->index[i * 2 + k], NULL, x + i * D, 1, out);
            for (size_t c = 0; c < D; c++) want[c] += g * (double)t->weight[i * 2 + k] * (double)out[c];
        }
        layer_norm(C + code * D, q);
        network(m, code % E, NULL, q, 1, out);
        layer_norm(out, v);
        for (size_t c = 0; c < D; c++) CHECK_WITHIN(y[i * D + c], want[c] + (1 - g) * (double)v[c], 1e-5);
    }
    CHECK(low && high && (used >> E) != 0); /* some by code % E, not code */
    free(C), free(G);
    moe_layer_free(m);
}

int main(void) {
    RUN(test_vqmoe);
    return test_end();
}
