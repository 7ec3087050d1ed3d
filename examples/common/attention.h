// attention.h - a small attention layer for mixtures that route whole sequences: one matrix an expert, no more.
//
//     q = x W_e            scores = q x^T / sqrt(d)            p = softmax of each row            y = p x
//
// W_e (d, d) is the product of an expert's query and key matrices, and a token is its own value, as theory likes it: at
// W = 0 every token gets the mean of its sequence. Each sequence goes to the expert that it was given. Sums run in one
// order, whatever the number of threads.
#ifndef EX_ATTENTION_H
#define EX_ATTENTION_H

#include "nn.h"

typedef struct attention {
    size_t n, length, d, experts; // n sequences of `length` tokens of d numbers
    const int32_t *expert;        // (n): whose matrix a sequence uses
    const float *x, *weight;      // (n, length, d); (experts, d, d)
    float *q, *p, *y;             // (n, length, d), (n, length, length), (n, length, d): made by the forward
    const float *dy;              // (n, length, d)
    float *dp, *ds, *dq;          // room of the backward: as p, as p, as q
    float *dweight, *dx;          // set; dx (n, length, d) may be NULL
} attention;

// The arrays of the forward, and with `train` those of the backward but for dweight and dx; they live until nn_free.
EX_FUNC attention attention_new(nn *s, size_t n, size_t length, size_t d, size_t experts, int train) {
    attention a = {.n = n, .length = length, .d = d, .experts = experts};
    float **wide[] = {&a.q, &a.y, &a.dq}, **square[] = {&a.p, &a.dp, &a.ds};
    for (int k = 0; k < (train ? 3 : 2); k++) *wide[k] = nn_floats(s, n * length * d);
    for (int k = 0; k < (train ? 3 : 1); k++) *square[k] = nn_floats(s, n * length * length);
    return a;
}

// c (m, n) = scale op(a) b (k, n), or += it; with ta a is (k, m). For a few rows.
EX_FUNC void attention_product(size_t m, size_t n, size_t k, const float *a, int ta, const float *restrict b,
                               float scale, int add, float *restrict c) {
    if (!add) memset(c, 0, m * n * sizeof(float));
    for (size_t i = 0; i < m; i++)
        for (size_t l = 0; l < k; l++) {
            float v = scale * (ta ? a[l * m + i] : a[i * k + l]);
            for (size_t j = 0; j < n; j++) c[i * n + j] += v * b[l * n + j];
        }
}
// c (m, n) = scale a (m, k) b^T, b (n, k), or += it: inner products, each in the order of k
EX_FUNC void attention_inner(size_t m, size_t n, size_t k, const float *a, const float *b, float scale, int add,
                             float *c) {
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            float sum = 0;
            for (size_t l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
            c[i * n + j] = add ? c[i * n + j] + scale * sum : scale * sum;
        }
}

EX_FUNC void attention_forward_task(void *arg, size_t i, size_t worker) { // i: a sequence
    const attention *a = arg;
    size_t l = a->length, d = a->d, wide = i * l * d, square = i * l * l;
    const float *w = a->weight + (size_t)a->expert[i] * d * d;
    (void)worker;
    attention_product(l, d, d, a->x + wide, 0, w, 1, 0, a->q + wide);
    attention_inner(l, l, d, a->q + wide, a->x + wide, 1 / sqrtf((float)d), 0, a->p + square);
    nn_must(moe_softmax(l, l, 1, a->p + square, a->p + square));
    attention_product(l, d, l, a->p + square, 0, a->x + wide, 1, 0, a->y + wide);
}
EX_FUNC void attention_forward(nn *s, attention *a) { moe_run(&s->parallel, a->n, attention_forward_task, a); }

EX_FUNC void attention_backward_task(void *arg, size_t i, size_t worker) { // i: a sequence; all but dweight
    attention *a = arg;
    size_t l = a->length, d = a->d, wide = i * l * d, square = i * l * l;
    const float *x = a->x + wide, *w = a->weight + (size_t)a->expert[i] * d * d;
    float *dq = a->dq + wide, *ds = a->ds + square, scale = 1 / sqrtf((float)d);
    (void)worker;
    attention_inner(l, l, d, a->dy + wide, x, 1, 0, a->dp + square);
    memset(ds, 0, l * l * sizeof(float));
    nn_must(moe_softmax_backward(l, l, 1, a->p + square, a->dp + square, ds));
    attention_product(l, d, l, ds, 0, x, scale, 0, dq);
    if (!a->dx) return; // as value, as key, as query
    attention_product(l, d, l, a->p + square, 1, a->dy + wide, 1, 0, a->dx + wide);
    attention_product(l, d, l, ds, 1, a->q + wide, scale, 1, a->dx + wide);
    attention_inner(l, d, d, dq, w, 1, 1, a->dx + wide);
}
EX_FUNC void attention_weight_task(void *arg, size_t e, size_t worker) { // e: an expert; its sequences in order
    attention *a = arg;
    size_t l = a->length, d = a->d;
    float *dw = a->dweight + e * d * d;
    (void)worker;
    memset(dw, 0, d * d * sizeof(float));
    for (size_t i = 0; i < a->n; i++)
        if ((size_t)a->expert[i] == e) attention_product(d, d, l, a->x + i * l * d, 1, a->dq + i * l * d, 1, 1, dw);
}
EX_FUNC void attention_backward(nn *s, attention *a) {
    moe_run(&s->parallel, a->n, attention_backward_task, a);
    moe_run(&s->parallel, a->experts, attention_weight_task, a);
}

#endif
