// digits_net.h - a small network for MNIST with a mixture in its middle, whose layer may be exchanged for a grown one:
//
//     pixels (784) -> linear, ReLU (width) -> MoE -> linear -> 10 digits
//
// Nothing goes around the mixture, so what its experts cannot do the network cannot.
//
//     digits_net *m = digits_new(&plan, &desc);
//     digits_epoch(m, &plan, &data.train, epoch);
//     digits_test(m, &plan, &data.test, &accuracy);    // the layer's health is then that of the test
//     digits_exchange(m, grown);                       // the old layer is freed
#ifndef EX_DIGITS_NET_H
#define EX_DIGITS_NET_H

#include "cifar.h" // cifar_shuffle
#include "mnist.h"
#include "nn.h"

enum { DIGITS_PAIRS = 128 };

typedef struct digits_plan {
    size_t epochs, batch, width, threads; // width: of what the mixture sees
    uint64_t seed;
    double lr; // for six tenths of the steps; then it falls to nothing along half a cosine
} digits_plan;

typedef struct digits_net {
    nn ops;
    nn_bank bank;
    size_t first, first_bias, last, last_bias; // tensors of the bank
    moe_layer *moe;
    float *pixels, *x, *y, *dy, *dx, *logits, *prob, *dlogits;
    unsigned char *label;
    uint32_t *order;
    size_t step, rows; // steps made; rows of the last batch
    // of bound pairs (moe_layer_split): the child's selections in the last test; set parent[] when you make one
    uint64_t bound[DIGITS_PAIRS];
    size_t parent[DIGITS_PAIRS];
} digits_net;

EX_FUNC digits_net *digits_new(const digits_plan *o, const moe_desc *desc) {
    digits_net *m = allocate(1, sizeof *m);
    nn *s = &m->ops;
    size_t wide = o->batch * o->width, classes = o->batch * MNIST_CLASSES;
    s->parallel.n_threads = o->threads;
    m->first = nn_add(&m->bank, MNIST_PIXELS * o->width, 1);
    m->first_bias = nn_add(&m->bank, o->width, 0);
    m->last = nn_add(&m->bank, o->width * MNIST_CLASSES, 1);
    m->last_bias = nn_add(&m->bank, MNIST_CLASSES, 0);
    nn_bank_alloc(s, &m->bank);
    float bound = sqrtf(3.0f / MNIST_PIXELS);
    nn_must(moe_rand_uniform(o->seed, 0, MNIST_PIXELS * o->width, -bound, bound, m->bank.value + m->first));
    m->pixels = nn_floats(s, o->batch * MNIST_PIXELS);
    m->x = nn_floats(s, wide), m->y = nn_floats(s, wide), m->dy = nn_floats(s, wide), m->dx = nn_floats(s, wide);
    m->logits = nn_floats(s, classes), m->prob = nn_floats(s, classes), m->dlogits = nn_floats(s, classes);
    m->label = allocate(o->batch, 1);
    nn_must(moe_layer_new(&m->moe, desc));
    return m;
}

EX_FUNC void digits_free(digits_net *m) {
    moe_layer_free(m->moe);
    nn_free(&m->ops);
    free(m->label);
    free(m->order);
    free(m);
}

EX_FUNC void digits_exchange(digits_net *m, moe_layer *grown) {
    moe_layer_free(m->moe);
    m->moe = grown;
}

// Picture `which` becomes row i of the batch, with mean 0 and variance 1 over the training set.
EX_FUNC void digits_take(digits_net *m, size_t i, const mnist_set *set, size_t which) {
    for (size_t k = 0; k < MNIST_PIXELS; k++)
        m->pixels[i * MNIST_PIXELS + k] = ((float)set->pixel[which * MNIST_PIXELS + k] / 255 - 0.1307f) / 0.3081f;
    m->label[i] = set->label[which];
}

EX_FUNC void digits_forward(digits_net *m, const digits_plan *o, size_t n, int evaluate) {
    nn_linear_forward(&m->ops, n, MNIST_PIXELS, o->width, m->pixels, m->bank.value + m->first,
                      m->bank.value + m->first_bias, m->x);
    nn_relu_forward(&m->ops, n * o->width, m->x, m->x);
    moe_layer_side(m->moe)->evaluate = evaluate;
    m->rows = n;
    nn_must(moe_forward(m->moe, m->x, n, m->y));
    nn_linear_forward(&m->ops, n, o->width, MNIST_CLASSES, m->y, m->bank.value + m->last, m->bank.value + m->last_bias,
                      m->logits);
}

EX_FUNC void digits_backward(digits_net *m, const digits_plan *o, size_t n) {
    nn_linear_backward(&m->ops, n, o->width, MNIST_CLASSES, m->y, m->bank.value + m->last, m->dlogits, m->dy,
                       m->bank.grad + m->last, m->bank.grad + m->last_bias);
    nn_must(moe_backward(m->moe, m->dy, m->dx));
    nn_relu_backward(&m->ops, n * o->width, m->x, m->dx, m->dx);
    nn_linear_backward(&m->ops, n, MNIST_PIXELS, o->width, m->pixels, m->bank.value + m->first, m->dx, NULL,
                       m->bank.grad + m->first, m->bank.grad + m->first_bias);
}

EX_FUNC void digits_step(digits_net *m, float lr) {
    nn_must(moe_step(m->moe, lr));
    nn_bank_step(&m->bank, (moe_optimizer_args){
                               .lr = lr, .weight_decay = 0.01f, .step = ++m->step, .parallel = &m->ops.parallel});
}

// One epoch; the mean loss of its batches.
EX_FUNC double digits_epoch(digits_net *m, const digits_plan *o, const mnist_set *set, size_t epoch) {
    size_t per_epoch = set->count / o->batch, total = per_epoch * o->epochs, hold = total / 10 * 6;
    double loss = 0;
    if (!m->order) m->order = allocate(set->count, sizeof *m->order);
    cifar_shuffle(m->order, set->count, o->seed, epoch);
    for (size_t k = 0; k < per_epoch; k++) {
        for (size_t i = 0; i < o->batch; i++) digits_take(m, i, set, m->order[k * o->batch + i]);
        digits_forward(m, o, o->batch, 0);
        loss += nn_cross_entropy(&m->ops, o->batch, MNIST_CLASSES, 0, m->logits, m->label, m->prob, m->dlogits);
        digits_backward(m, o, o->batch);
        digits_step(m, m->step < hold ? (float)o->lr
                                      : moe_schedule_cosine(m->step - hold, 0, total - hold, (float)o->lr, 0));
    }
    return loss / (double)(per_epoch * o->batch);
}

EX_FUNC double digits_test(digits_net *m, const digits_plan *o, const mnist_set *set) {
    size_t right = 0;
    memset(m->bound, 0, sizeof m->bound);
    nn_must(moe_layer_health_reset(m->moe));
    for (size_t first = 0, n; first < set->count; first += n) {
        n = set->count - first < o->batch ? set->count - first : o->batch;
        for (size_t i = 0; i < n; i++) digits_take(m, i, set, first + i);
        digits_forward(m, o, n, 1);
        for (size_t b = 0; b < moe_layer_desc(m->moe)->n_bound && b < DIGITS_PAIRS; b++)
            m->bound[b] += moe_layer_tape(m->moe)->bound[b];
        right += nn_count_right(n, MNIST_CLASSES, m->logits, m->label);
    }
    return (double)right / (double)set->count;
}

#endif
