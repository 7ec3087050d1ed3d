// exp_lm.h - a small language model on WikiText-2 as the experiments train it: AdamW, a cosine after a warm-up.
//
//     exp_lm l = exp_lm_new(exp_text(e), &shape, &desc, rows, steps, lr);
//     for (size_t step = 0; step < steps; step++)
//         if (exp_lm_step(&l, step, &loss)) break;            // diverged
//     double nats = exp_lm_test(&l, CORPUS_VALID, 4096, NULL, NULL);      // a token
//     exp_lm_free(&l);
#ifndef EX_EXP_LM_H
#define EX_EXP_LM_H

#include "corpus.h"
#include "language.h"

typedef struct exp_lm {
    lm *m;
    corpus *text;
    size_t rows, steps;
    double lr, decay;
    size_t teacher_of; // > 0: loss.oracle's teacher is the next token modulo this
    int32_t *token;    // (3 rows): tokens, targets, teachers
} exp_lm;

static const double exp_lm_explosion = 20; // nats a token

EX_FUNC exp_lm exp_lm_new(corpus *text, const lm_shape *shape, const moe_desc *desc, size_t rows, size_t steps,
                          double lr) {
    exp_lm l = {.m = lm_new(shape, desc, rows), .text = text, .rows = rows, .steps = steps, .lr = lr};
    l.token = allocate(3 * rows, sizeof *l.token);
    return l;
}
EX_FUNC void exp_lm_free(exp_lm *l) {
    lm_free(l->m);
    free(l->token);
}

// 1: diverged.
EX_FUNC int exp_lm_step(exp_lm *l, size_t step, double *loss) {
    size_t T = l->m->shape.length, per_epoch = corpus_sequences(l->text, T) * T / l->rows;
    int32_t *target = l->token + l->rows, *teacher = target + l->rows;
    lm_moment now = {step};
    corpus_batch(l->text, l->m->shape.seed, step / per_epoch, step % per_epoch, l->rows / T, T, l->token, target);
    for (size_t i = 0; l->teacher_of && i < l->m->shape.layers; i++)
        moe_layer_side(l->m->layer[i].moe)->teacher = teacher;
    for (size_t t = 0; l->teacher_of && t < l->rows; t++) teacher[t] = target[t] % (int32_t)l->teacher_of;
    *loss = lm_forward(l->m, l->token, target, l->rows, &now) / (double)l->rows;
    if (!(*loss <= exp_lm_explosion)) return 1;
    lm_backward(l->m, l->rows, &now);
    lm_step(l->m, moe_schedule_cosine(step, l->steps / 10, l->steps, (float)l->lr, 0), (float)l->decay);
    return 0;
}

// Nats a token over about `tokens` tokens of a part; see(arg, l, n) after each forward of n rows.
EX_FUNC double exp_lm_test(exp_lm *l, int part, size_t tokens, void (*see)(void *, exp_lm *, size_t), void *arg) {
    size_t T = l->m->shape.length, batch = l->rows / T, k = batch;
    int32_t *target = l->token + l->rows;
    double nats = 0, counted = 0;
    for (size_t i = 0; i < l->m->shape.layers; i++) nn_must(moe_layer_health_reset(l->m->layer[i].moe));
    for (size_t at = 0; at * T < tokens && k == batch; at += k) {
        for (k = 0; k < batch; k++)
            if (!corpus_window(l->text, part, at + k, T, T, l->token + k * T, target + k * T)) break;
        if (!k) break;
        nats += lm_forward(l->m, l->token, target, k * T, NULL);
        for (size_t t = 0; t < k * T; t++)
            if (target[t] >= 0) counted++;
        if (see) see(arg, l, k * T);
    }
    return nats / counted;
}

#endif
