// tokens_net.h - the small network in which the examples compare mixtures, and its training on the frozen tokens of
// features.h:  tokens x -> x + MoE(x) -> mean over the image's tokens -> linear -> class.
//
//     samples data = samples_make(&ops, &pictures, seed, quiet);
//     net *m = net_new(&plan, &desc);                      // desc NULL: no mixture
//     for (size_t step = 0; step < plan.total; step++)
//         if (net_step(m, &plan, &data, step, &loss)) break;   // numbers left their range
//     net_test(m, &plan, &data.test, data.test.count, &loss, &accuracy);
//
// Every network gets the same batches in the same order. Since position is a part of a token and the mean forgets
// order, nothing but the mixture can use where in an image something is.
#ifndef EX_TOKENS_NET_H
#define EX_TOKENS_NET_H

#include "cifar.h"
#include "features.h"
#include "nn.h"
#include "progress.h"

enum { NET_D = FEATURES_WIDTH, NET_T = FEATURES_TOKENS, NET_CLASSES = CIFAR_CLASSES };
static const double net_explosion = 20; // a mean loss of a batch above it counts as diverged; guessing gives 2.3

typedef struct samples {
    tokens train[2], test; // train: as they are, and mirrored
} samples;

EX_FUNC samples samples_make(nn *ops, const cifar *pictures, uint64_t seed, int quiet) {
    samples data;
    features *f = features_fit(ops, &pictures->train, seed);
    size_t images = pictures->train.count;
    progress p = progress_begin("tokens", "images", 2 * images + pictures->test.count, quiet);
    for (size_t k = 0; k < 2; k++) data.train[k] = features_make(ops, f, &pictures->train, (int)k, &p, k * images);
    data.test = features_make(ops, f, &pictures->test, 0, &p, 2 * images);
    progress_clear(&p);
    features_free(f);
    return data;
}

EX_FUNC void samples_free(samples *data) {
    for (int k = 0; k < 2; k++) tokens_free(&data->train[k]);
    tokens_free(&data->test);
}

// ---- the network ----

typedef struct net_plan {
    size_t total, batch, threads; // steps; images a step
    uint64_t seed;
    double lr; // the highest
    float smoothing, decay;
} net_plan;

typedef struct net {
    nn ops;
    nn_bank bank;
    size_t class_weight, class_bias;
    moe_layer *moe; // NULL: no mixture
    float *x, *y, *q, *dq, *dy, *logits, *prob, *dlogits;
    uint32_t *id, *order; // order: of the images in this epoch
    int32_t *teacher;     // of loss.oracle: an expert for each class
    unsigned char *label;
} net;

EX_FUNC net *net_new(const net_plan *o, const moe_desc *desc) {
    net *m = allocate(1, sizeof *m);
    nn *s = &m->ops;
    s->parallel.n_threads = o->threads;
    m->class_weight = nn_add(&m->bank, NET_D * NET_CLASSES, 1);
    m->class_bias = nn_add(&m->bank, NET_CLASSES, 0);
    nn_bank_alloc(s, &m->bank);
    float **token[] = {&m->x, &m->y, &m->dy}, **image[] = {&m->q, &m->dq};
    float **class[] = {&m->logits, &m->prob, &m->dlogits};
    for (int k = 0; k < 3; k++) *token[k] = nn_floats(s, o->batch * NET_T * NET_D);
    for (int k = 0; k < 2; k++) *image[k] = nn_floats(s, o->batch * NET_D);
    for (int k = 0; k < 3; k++) *class[k] = nn_floats(s, o->batch * NET_CLASSES);
    m->id = allocate(o->batch * NET_T, sizeof *m->id);
    m->teacher = allocate(o->batch * NET_T, sizeof *m->teacher);
    m->label = allocate(o->batch, 1);
    if (desc) nn_must(moe_layer_new(&m->moe, desc));
    return m;
}

EX_FUNC void net_free(net *m) {
    moe_layer_free(m->moe);
    nn_free(&m->ops);
    free(m->id);
    free(m->order);
    free(m->teacher);
    free(m->label);
    free(m);
}

EX_FUNC void net_take(net *m, size_t at, const tokens *from, size_t image) {
    memcpy(m->x + at * NET_T * NET_D, from->x + image * NET_T * NET_D, NET_T * NET_D * sizeof(float));
    memcpy(m->id + at * NET_T, from->id + image * NET_T, NET_T * sizeof *m->id);
    m->label[at] = from->label[image];
}

// Numbers that leave their range are a result (1 = diverged); anything else is the program's end.
EX_FUNC int net_trouble(moe_status s) {
    if (s != MOE_OK && moe_status_kind(s) != MOE_KIND_NUMBER) nn_must(s);
    return s != MOE_OK;
}

// m->x (n images) -> m->logits. 1: diverged.
EX_FUNC int net_forward(net *m, size_t n, int evaluate) {
    if (m->moe) {
        moe_side *side = moe_layer_side(m->moe);
        side->id = m->id;
        side->evaluate = evaluate;
        if (moe_layer_desc(m->moe)->loss[MOE_LOSS_ORACLE] > 0) {
            size_t experts = moe_layer_desc(m->moe)->n_experts;
            for (size_t t = 0; t < n * NET_T; t++) m->teacher[t] = (int32_t)(m->label[t / NET_T] % experts);
            side->teacher = m->teacher;
        }
        if (net_trouble(moe_forward(m->moe, m->x, n * NET_T, m->y))) return 1;
    } else {
        memset(m->y, 0, n * NET_T * NET_D * sizeof(float));
    }
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < NET_D; k++) {
            float sum = 0;
            for (size_t t = i * NET_T; t < (i + 1) * NET_T; t++) sum += m->x[t * NET_D + k] + m->y[t * NET_D + k];
            m->q[i * NET_D + k] = sum * (1.0f / NET_T);
        }
    nn_linear_forward(&m->ops, n, NET_D, NET_CLASSES, m->q, m->bank.value + m->class_weight,
                      m->bank.value + m->class_bias, m->logits);
    for (size_t i = 0; i < n * NET_CLASSES; i++)
        if (!isfinite(m->logits[i])) return 1;
    return 0;
}

// m->dlogits -> every gradient, and an update. 1: diverged.
EX_FUNC int net_learn(net *m, const net_plan *o, size_t n, size_t step) {
    float lr = moe_schedule_cosine(step, o->total / 10, o->total, (float)o->lr, 0);
    nn_linear_backward(&m->ops, n, NET_D, NET_CLASSES, m->q, m->bank.value + m->class_weight, m->dlogits, m->dq,
                       m->bank.grad + m->class_weight, m->bank.grad + m->class_bias);
    for (size_t i = 0; i < n * NET_T * NET_D; i++)
        m->dy[i] = m->dq[i / (NET_T * NET_D) * NET_D + i % NET_D] * (1.0f / NET_T);
    if (m->moe && net_trouble(moe_backward(m->moe, m->dy, NULL))) return 1;
    if (m->moe && net_trouble(moe_step(m->moe, lr))) return 1;
    nn_bank_step(&m->bank, (moe_optimizer_args){
                               .lr = lr, .weight_decay = o->decay, .step = step + 1, .parallel = &m->ops.parallel});
    return 0;
}

// Step `step` (from 0) of a training; each image is mirrored in every second epoch. *loss is the batch's mean.
// 1: diverged.
EX_FUNC int net_step(net *m, const net_plan *o, const samples *data, size_t step, double *loss) {
    size_t count = data->train->count, per_epoch = count / o->batch, epoch = step / per_epoch;
    if (!m->order) m->order = allocate(count, sizeof *m->order);
    if (step % per_epoch == 0) cifar_shuffle(m->order, count, o->seed, epoch);
    for (size_t i = 0; i < o->batch; i++) {
        uint32_t image = m->order[step % per_epoch * o->batch + i];
        net_take(m, i, &data->train[(moe_rand_u32(o->seed, 1000, image) + epoch) & 1], image);
    }
    *loss = NAN;
    if (net_forward(m, o->batch, 0)) return 1;
    *loss = nn_cross_entropy(&m->ops, o->batch, NET_CLASSES, o->smoothing, m->logits, m->label, m->prob, m->dlogits) /
            (double)o->batch;
    return !(*loss <= net_explosion) || net_learn(m, o, o->batch, step);
}

// Mean loss and accuracy on the first `count` images; the layer's health is that of these. 1: diverged.
EX_FUNC int net_test(net *m, const net_plan *o, const tokens *set, size_t count, double *loss, double *accuracy) {
    double sum = 0, right = 0;
    if (m->moe) nn_must(moe_layer_health_reset(m->moe));
    for (size_t first = 0, n; first < count; first += n) {
        n = count - first < o->batch ? count - first : o->batch;
        for (size_t i = 0; i < n; i++) net_take(m, i, set, first + i);
        if (net_forward(m, n, 1)) return 1;
        sum += nn_cross_entropy(&m->ops, n, NET_CLASSES, 0, m->logits, m->label, m->prob, NULL);
        right += (double)nn_count_right(n, NET_CLASSES, m->logits, m->label);
    }
    *loss = sum / (double)count;
    *accuracy = right / (double)count;
    return 0;
}

#endif
