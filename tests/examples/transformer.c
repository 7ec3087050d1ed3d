/* transformer.h: attention against double precision, and the same bits however its rows are cut; frequencies and the
 * rotation by hand. */
#include "test.h"

#include "examples/common/transformer.h"

static nn s = {.parallel = {.n_threads = 2}};

typedef struct shape {
    size_t rows, before, heads, n_kv, k, v, window;
    int sink;
} shape;
static double wanted(const shape *c, const float *q, const float *k, const float *v, float sink, size_t t, size_t h,
                     size_t i) {
    size_t at = c->before + t, group = h / (c->heads / c->n_kv), j = 0;
    double sum = c->sink ? exp((double)sink) : 0, o = 0;
    if (c->window && at >= c->window) j = at - c->window + 1;
    for (; j <= at; j++) {
        double score = 0;
        for (size_t n = 0; n < c->k; n++)
            score += (double)q[(t * c->heads + h) * c->k + n] * (double)k[(j * c->n_kv + group) * c->k + n];
        sum += exp(score * (double)0.3f);
        o += exp(score * (double)0.3f) * (double)v[(j * c->n_kv + group) * c->v + i];
    }
    return o / sum;
}
static void test_attention(void) {
    static const shape cases[] = {{13, 5, 4, 2, 16, 16, 0, 0},
                                  {40, 0, 4, 4, 24, 20, 8, 1},
                                  {70, 7, 6, 2, 32, 48, 0, 1},
                                  {9, 100, 3, 1, 64, 64, 33, 0}};
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        const shape *c = &cases[n];
        size_t all = c->before + c->rows, wide = c->heads * c->v;
        float *q = nn_floats(&s, c->rows * c->heads * c->k), *k = nn_floats(&s, all * c->n_kv * c->k), sinks[8];
        float *v = nn_floats(&s, all * c->n_kv * c->v), *o = nn_floats(&s, c->rows * wide);
        float *one = nn_floats(&s, c->rows * wide);
        CHECK_OK(moe_rand_uniform(1, n, c->rows * c->heads * c->k, -1, 1, q));
        CHECK_OK(moe_rand_uniform(2, n, all * c->n_kv * c->k, -1, 1, k));
        CHECK_OK(moe_rand_uniform(3, n, all * c->n_kv * c->v, -1, 1, v));
        CHECK_OK(moe_rand_uniform(4, n, 8, -1, 1, sinks));
        tf_cache cache = tf_cache_new(&s, all, c->n_kv, c->k, c->v), slow = tf_cache_new(&s, all, c->n_kv, c->k, c->v);
        tf_attention a = {c->heads, c->n_kv, c->k, c->v, c->window, 0.3f, c->sink ? sinks : NULL};
        tf_cache_put(&cache, 0, all, k, v);
        tf_attend(&s, &a, &cache, c->rows, c->before, q, o);
        for (size_t t = 0; t < all; t++) { /* token by token, the later ones not yet there */
            tf_cache_put(&slow, t, 1, k + t * c->n_kv * c->k, v + t * c->n_kv * c->v);
            if (t < c->before) continue;
            size_t r = t - c->before;
            tf_attend(&s, &a, &slow, 1, t, q + r * c->heads * c->k, one + r * wide);
        }
        CHECK(memcmp(o, one, c->rows * wide * sizeof(float)) == 0);
        double worst = 0;
        for (size_t i = 0; i < c->rows * wide; i++) {
            size_t h = i / c->v % c->heads;
            worst = fmax(worst, fabs((double)o[i] - wanted(c, q, k, v, sinks[h], i / wide, h, i % c->v)));
        }
        CHECK(worst < 1e-6);
    }
}
static void test_rotation(void) {
    tf_rope_args a = {.dim = 4, .theta = 100, .factor = 4, .original = 1000, .low = 1, .high = 4};
    CHECK_NEAR(tf_rope_frequency(&a, 0), 1, 1e-12);
    CHECK_NEAR(tf_rope_frequency(&a, 1), 0.1, 1e-12); /* 100^(-2/4) */
    a.scaling = TF_ROPE_LINEAR;
    CHECK_NEAR(tf_rope_frequency(&a, 1), 0.025, 1e-12);
    a.scaling = TF_ROPE_LLAMA3; /* 1000 * 0.1 / 2 pi = 15.9 turns: above high, as it is */
    CHECK_NEAR(tf_rope_frequency(&a, 1), 0.1, 1e-12);
    a.original = 100; /* 1.5915 turns: (1.5915 - 1) / 3 = 0.19718 stays, the rest is a quarter */
    CHECK_NEAR(tf_rope_frequency(&a, 1), 0.1 * 0.1971831 + 0.025 * (1 - 0.1971831), 1e-6);
    a.original = 10; /* 0.159 turns: below low */
    CHECK_NEAR(tf_rope_frequency(&a, 1), 0.025, 1e-12);
    a.scaling = TF_ROPE_PLAIN;
    for (int interleaved = 0; interleaved < 2; interleaved++) {
        tf_rope r = tf_rope_new(&s, &a, 8, interleaved);
        float x[5] = {9, 1, 2, 3, 4}, y[5]; /* one head of 5, of which 4 are turned */
        size_t i = 1, j = interleaved ? 2 : 3;
        memcpy(y, x, sizeof y);
        tf_rope_turn(&r, 1, 7, 1, 5, 0, y);
        CHECK(y[0] == 9);
        CHECK_NEAR((double)y[i], (double)x[i] * cos(7) - (double)x[j] * sin(7), 1e-6);
        CHECK_NEAR((double)y[j], (double)x[j] * cos(7) + (double)x[i] * sin(7), 1e-6);
        tf_rope_turn(&r, 1, 7, 1, 5, 1, y);
        for (int n = 0; n < 5; n++) CHECK_NEAR((double)y[n], (double)x[n], 1e-6);
    }
}

int main(void) {
    RUN(test_attention);
    RUN(test_rotation);
    nn_free(&s);
    return test_end();
}
