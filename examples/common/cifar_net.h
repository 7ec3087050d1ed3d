// cifar_net.h - a convolutional network with a Mixture-of-Experts layer, forward, backward and step.
//
//     image -> convolutions (stem, three residual blocks) -> 256 features -> x + MoE(x) -> class
#ifndef EX_CIFAR_NET_H
#define EX_CIFAR_NET_H

#include "cifar.h"
#include "muon.h"
#include "winograd.h"

enum { CIFAR_STEM = 24, CIFAR_FEATURES = 256, CIFAR_BLOCKS = 3 };

// With Muon, of AdamW's rate for the rest: the angle that a convolution turns by in a step, and the mixture's rate.
static const float cifar_angle = 5, cifar_mixture = 0.2f;

// convolution, pooling, normalisation, activation; then x + activation(normalisation(convolution(x)))
typedef struct cifar_block {
    nn_conv conv1, conv2;
    nn_pool pool;
    nn_norm norm1, norm2;
    size_t weight1, weight2;                // in the bank
    float *c1, *p1, *x1, *c2, *y, *dy, *d2; // after convolution 1, pooling, normalisation; ...; gradients
    float *given1, *given2;                 // what GELU was given; NULL: ReLU
} cifar_block;

// What cannot change once there is a network.
typedef struct cifar_shape {
    size_t batch, width[CIFAR_BLOCKS];
    uint64_t seed;
    int muon, gelu, tokens; // Muon has the convolutions; GELU, not ReLU; the mixture sees positions, not images
    int winograd;           // the blocks' convolutions by fewer multiplications, where there is room for tiles
    float decay;
} cifar_shape;

typedef struct cifar_net {
    cifar_shape shape;
    nn ops;
    size_t positions; // tokens an image has for the mixture
    nn_bank bank;
    nn_conv stem;
    cifar_block block[CIFAR_BLOCKS];
    muon muon; // of the blocks' convolutions, unless AdamW has them
    nn_norm head_norm;
    nn_pool pool; // of the last feature map, or of the tokens after the mixture
    size_t stem_weight, class_weight, class_bias;
    moe_layer *moe;
    float *image, *x0; // input and output of the stem
    float *f, *z, *y, *q, *dz, *dy, *dq, *logits, *prob, *dlogits;
    unsigned char *label;
} cifar_net;

EX_FUNC void cifar_init_normal(cifar_net *m, uint64_t seed, size_t at, size_t count, float variance) {
    nn_must(moe_rand_normal(seed, 1 + at, count, 0, sqrtf(variance), m->bank.value + at));
}

// The stem whitens patches of 2 x 2 pixels, measured on the first training images, and is not trained: its gradient
// stays zero.
EX_FUNC void cifar_init_stem(cifar_net *m, const cifar *data) {
    cifar_batch b = {.set = &data->train, .count = data->train.count < 1000 ? data->train.count : 1000};
    b.x = allocate(b.count * 3 * CIFAR_PIXELS, sizeof(float));
    b.label = allocate(b.count, 1);
    cifar_batch_make(&b, &m->ops.parallel);
    nn_conv v = m->stem;
    v.n = b.count;
    nn_whiten(&v, b.x, m->bank.value + m->stem_weight);
    free(b.x);
    free(b.label);
}

// A convolution is a matrix of (its taps and channels, its filters).
EX_FUNC void cifar_net_muon(cifar_net *m) {
    float *value = m->bank.value, *grad = m->bank.grad;
    for (int i = 0; i < CIFAR_BLOCKS; i++) {
        cifar_block *b = &m->block[i];
        size_t filters = b->conv1.filters;
        muon_add(&m->muon, value + b->weight1, grad + b->weight1, 9 * b->conv1.c, filters);
        muon_add(&m->muon, value + b->weight2, grad + b->weight2, 9 * filters, filters);
    }
    m->muon.turns = 1;
    m->muon.rounds = 3; // as in the record program: directions of hardly any gradient stay short
    muon_begin(&m->muon, &m->ops);
}

// The stages' sizes and arrays, and the parameters' places.
EX_FUNC void cifar_net_lay(cifar_net *m) {
    const cifar_shape *o = &m->shape;
    nn *s = &m->ops;
    size_t n = o->batch, side = CIFAR_SIDE - 1, channels = CIFAR_STEM;
    m->stem = (nn_conv){n, CIFAR_SIDE, CIFAR_SIDE, 3, 2, 1, 0, CIFAR_STEM};
    m->stem_weight = nn_add(&m->bank, nn_conv_weights(&m->stem), 0);
    m->image = nn_floats(s, n * 3 * CIFAR_PIXELS);
    m->x0 = nn_floats(s, n * side * side * CIFAR_STEM);
    for (int i = 0; i < CIFAR_BLOCKS; i++) {
        cifar_block *b = &m->block[i];
        size_t width = o->width[i];
        b->conv1 = (nn_conv){n, side, side, channels, 3, 1, 1, width};
        b->pool = (nn_pool){n, side, side, width, 2, 0};
        b->c1 = nn_floats(s, n * side * side * width);
        side /= 2;
        b->conv2 = (nn_conv){n, side, side, width, 3, 1, 1, width};
        b->weight1 = nn_add(&m->bank, nn_conv_weights(&b->conv1), o->muon ? NN_ELSEWHERE : 1);
        b->weight2 = nn_add(&m->bank, nn_conv_weights(&b->conv2), o->muon ? NN_ELSEWHERE : 1);
        nn_norm_declare(&b->norm1, &m->bank, width, 0.9f);
        nn_norm_declare(&b->norm2, &m->bank, width, 0.9f);
        float **small[] = {&b->p1, &b->x1, &b->c2, &b->y, &b->dy, &b->d2};
        for (int k = 0; k < 6; k++) *small[k] = nn_floats(s, n * side * side * width);
        if (o->gelu) b->given1 = nn_floats(s, n * side * side * width);
        if (o->gelu) b->given2 = nn_floats(s, n * side * side * width);
        channels = width;
    }
    m->positions = o->tokens ? side * side : 1;
    m->pool = (nn_pool){n, side, side, CIFAR_FEATURES, side, 1};
    nn_norm_declare(&m->head_norm, &m->bank, CIFAR_FEATURES, 0.9f);
    m->class_weight = nn_add(&m->bank, CIFAR_FEATURES * CIFAR_CLASSES, 1);
    m->class_bias = nn_add(&m->bank, CIFAR_CLASSES, 0);
    float **token[] = {&m->f, &m->z, &m->y, &m->dz, &m->dy}, **image[] = {&m->q, &m->dq};
    float **class[] = {&m->logits, &m->prob, &m->dlogits};
    for (int k = 0; k < 5; k++) *token[k] = nn_floats(s, n * m->positions * CIFAR_FEATURES);
    for (int k = 0; k < 2; k++) *image[k] = nn_floats(s, n * CIFAR_FEATURES);
    for (int k = 0; k < 3; k++) *class[k] = nn_floats(s, n * CIFAR_CLASSES);
    m->label = allocate(n, 1);
}

// data: for the stem
EX_FUNC void cifar_net_init(cifar_net *m, const cifar *data) {
    const cifar_shape *o = &m->shape;
    nn *s = &m->ops;
    nn_bank_alloc(s, &m->bank);
    nn_norm_alloc(s, &m->head_norm, &m->bank);
    cifar_init_stem(m, data);
    for (int i = 0; i < CIFAR_BLOCKS; i++) {
        cifar_block *b = &m->block[i];
        nn_norm_alloc(s, &b->norm1, &m->bank);
        nn_norm_alloc(s, &b->norm2, &m->bank);
        cifar_init_normal(m, o->seed, b->weight1, nn_conv_weights(&b->conv1), 2.0f / (float)(9 * b->conv1.c));
        cifar_init_normal(m, o->seed, b->weight2, nn_conv_weights(&b->conv2), 2.0f / (float)(9 * b->conv2.c));
        for (size_t c = 0; c < b->conv1.c && c < b->conv1.filters; c++) // the first filters pass their input on
            for (size_t k = 0; k < 9 * b->conv1.c; k++)
                m->bank.value[b->weight1 + k * b->conv1.filters + c] = k == 4 * b->conv1.c + c;
    }
    cifar_init_normal(m, o->seed, m->class_weight, CIFAR_FEATURES * CIFAR_CLASSES, 1.0f / CIFAR_FEATURES);
}

EX_FUNC cifar_net *cifar_net_new(const cifar_shape *o, const moe_desc *desc, const cifar *data) {
    cifar_net *m = allocate(1, sizeof *m);
    m->shape = *o;
    m->ops.parallel = desc->parallel;
    cifar_net_lay(m);
    cifar_net_init(m, data);
    if (o->muon) cifar_net_muon(m);
    nn_must(moe_layer_new(&m->moe, desc));
    return m;
}

EX_FUNC void cifar_net_free(cifar_net *m) {
    moe_layer_free(m->moe);
    nn_free(&m->ops);
    muon_free(&m->muon);
    free(m->label);
    free(m);
}

// Whether a convolution of the blocks takes fewer multiplications.
EX_FUNC int cifar_fewer(const cifar_net *m, const nn_conv *v) { return m->shape.winograd && winograd_fits(v); }
EX_FUNC void cifar_convolve(cifar_net *m, const nn_conv *v, const float *x, size_t weight, float *y) {
    const float *w = m->bank.value + weight;
    if (cifar_fewer(m, v)) winograd_forward(&m->ops, v, x, w, y);
    else nn_conv_forward(&m->ops, v, x, w, y);
}
// The weight's gradient, and dx, or += it, unless that is NULL.
EX_FUNC void cifar_convolve_back(cifar_net *m, const nn_conv *v, const float *x, const float *dy, size_t weight,
                                 int accumulate, float *dx) {
    const float *w = m->bank.value + weight;
    float *g = m->bank.grad + weight;
    if (cifar_fewer(m, v)) {
        winograd_backward(&m->ops, v, x, dy, w, g, accumulate, dx);
        return;
    }
    nn_conv_backward_weight(&m->ops, v, x, dy, g);
    if (dx) nn_conv_backward_data(&m->ops, v, dy, w, accumulate, dx);
}

// m->image (n, 32, 32, 3) -> m->logits (n, CIFAR_CLASSES)
EX_FUNC void cifar_net_forward(cifar_net *m, size_t n, int training) {
    nn *s = &m->ops;
    const float *w = m->bank.value, *x = m->x0;
    m->stem.n = m->pool.n = n;
    moe_layer_side(m->moe)->evaluate = !training;
    nn_conv_forward(s, &m->stem, m->image, w + m->stem_weight, m->x0);
    size_t side = nn_conv_out(&m->stem, CIFAR_SIDE), stem = n * side * side * CIFAR_STEM;
    if (m->block[0].given1)
        nn_gelu_forward(s, stem, m->x0, m->x0);
    else
        nn_relu_forward(s, stem, m->x0, m->x0);
    for (int i = 0; i < CIFAR_BLOCKS; i++) {
        cifar_block *b = &m->block[i];
        size_t rows = n * b->conv2.h * b->conv2.w;
        b->conv1.n = b->conv2.n = b->pool.n = n;
        cifar_convolve(m, &b->conv1, x, b->weight1, b->c1);
        nn_pool_forward(s, &b->pool, b->c1, b->p1);
        nn_norm_act(s, &b->norm1, &m->bank, training, rows, b->p1, NULL, b->given1, b->x1);
        cifar_convolve(m, &b->conv2, b->x1, b->weight2, b->c2);
        nn_norm_act(s, &b->norm2, &m->bank, training, rows, b->c2, b->x1, b->given2, b->y);
        x = b->y;
    }
    size_t tokens = n * m->positions;
    if (m->positions == 1)
        nn_pool_forward(s, &m->pool, x, m->f);
    else
        memcpy(m->f, x, tokens * CIFAR_FEATURES * sizeof(float));
    nn_norm_apply(s, &m->head_norm, &m->bank, training, tokens, 0, m->f, NULL, m->z);
    nn_must(moe_forward(m->moe, m->z, tokens, m->y));
    nn_add_to(s, tokens * CIFAR_FEATURES, m->z, m->y);
    if (m->positions == 1)
        memcpy(m->q, m->y, n * CIFAR_FEATURES * sizeof(float));
    else
        nn_pool_forward(s, &m->pool, m->y, m->q);
    nn_linear_forward(s, n, CIFAR_FEATURES, CIFAR_CLASSES, m->q, w + m->class_weight, w + m->class_bias, m->logits);
}

// m->dlogits -> every gradient. Overwrites what the forward kept.
EX_FUNC void cifar_net_backward(cifar_net *m, size_t n) {
    nn *s = &m->ops;
    const float *w = m->bank.value;
    float *g = m->bank.grad;
    size_t tokens = n * m->positions;
    cifar_block *last = &m->block[CIFAR_BLOCKS - 1];
    nn_linear_backward(s, n, CIFAR_FEATURES, CIFAR_CLASSES, m->q, w + m->class_weight, m->dlogits, m->dq,
                       g + m->class_weight, g + m->class_bias);
    if (m->positions == 1)
        memcpy(m->dy, m->dq, n * CIFAR_FEATURES * sizeof(float));
    else
        nn_pool_backward(s, &m->pool, m->y, m->q, m->dq, m->dy);
    nn_must(moe_backward(m->moe, m->dy, m->dz));
    nn_add_to(s, tokens * CIFAR_FEATURES, m->dy, m->dz);
    nn_norm_gradient(s, &m->head_norm, &m->bank, tokens, 0, m->f, m->dz, m->dz);
    if (m->positions == 1)
        nn_pool_backward(s, &m->pool, last->y, m->f, m->dz, last->dy);
    else
        memcpy(last->dy, m->dz, tokens * CIFAR_FEATURES * sizeof(float));
    for (int i = CIFAR_BLOCKS - 1; i >= 0; i--) {
        cifar_block *b = &m->block[i];
        size_t rows = n * b->conv2.h * b->conv2.w;
        const float *x = i ? m->block[i - 1].y : m->x0;
        nn_norm_act_gradient(s, &b->norm2, &m->bank, rows, b->c2, b->given2, b->dy, b->d2);
        cifar_convolve_back(m, &b->conv2, b->x1, b->d2, b->weight2, 1, b->dy); // dy holds the residual's part
        nn_norm_act_gradient(s, &b->norm1, &m->bank, rows, b->p1, b->given1, b->dy, b->d2);
        nn_pool_backward(s, &b->pool, b->c1, b->p1, b->d2, b->c1);
        cifar_convolve_back(m, &b->conv1, x, b->c1, b->weight1, 0, i ? m->block[i - 1].dy : NULL);
    }
}

EX_FUNC void cifar_net_step(cifar_net *m, float lr, size_t step) {
    const cifar_shape *o = &m->shape;
    moe_optimizer_args a = {.lr = lr, .weight_decay = o->decay, .step = step, .parallel = &m->ops.parallel};
    if (o->muon) muon_step(&m->muon, cifar_angle * lr, 0);
    nn_bank_step(&m->bank, a);
    nn_must(moe_step(m->moe, o->muon ? cifar_mixture * lr : lr));
}

// Operations of one pass of a convolution over a batch.
EX_FUNC double cifar_conv_flops(const cifar_net *m, nn_conv v) {
    size_t n = v.n = m->shape.batch;
    if (cifar_fewer(m, &v)) return winograd_flops(&v);
    return 2 * (double)(n * nn_conv_out(&v, v.h) * nn_conv_out(&v, v.w) * nn_conv_weights(&v));
}

// Operations of a training step in products, as they are made: each forward once, and for both gradients as often again
// (the stem has neither, the first block none by its input); and Muon's.
EX_FUNC double cifar_net_flops(const cifar_net *m) {
    const moe_desc *desc = moe_layer_desc(m->moe);
    double n = (double)m->shape.batch, d = CIFAR_FEATURES, gated = 2, sum = cifar_conv_flops(m, m->stem);
    for (int i = 0; i < CIFAR_BLOCKS; i++)
        sum += (i ? 3 : 2) * cifar_conv_flops(m, m->block[i].conv1) + 3 * cifar_conv_flops(m, m->block[i].conv2);
    if (desc->expert == MOE_EXPERT_SWIGLU || desc->expert == MOE_EXPERT_GEGLU) gated = 3;
    double used = (double)(desc->top_k + desc->n_shared);
    double token = d * (gated * used * (double)desc->d_ff + (double)desc->n_experts);
    sum += 6 * n * ((double)m->positions * token + d * CIFAR_CLASSES);
    return sum + (m->shape.muon ? muon_flops(&m->muon) : 0);
}

#endif
