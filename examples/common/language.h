// language.h - a language model of OLMoE's architecture, to train: every feed-forward block is a moe_layer.
//
//     x = embed(token);  each layer: x += attention(norm(x)), x += mixture(norm(x));  logits = norm(x) W^T
//
//     lm *m = lm_new(&shape, &desc, rows);        // rows: tokens of a batch
//     double nats = lm_forward(m, token, target, rows, &step);      // sum; step NULL: evaluation
//     lm_backward(m, &step);
//     lm_step(m, lr);
//     lm_free(m);
//
// What runs it is transformer_back.h; its weights stand as the public checkpoints have them (common/checkpoint.h).
// Matrices take Muon, all else (embedding, head, norms, routers) AdamW; or AdamW takes the experts' too, or all.
#ifndef EX_LANGUAGE_H
#define EX_LANGUAGE_H

#include "muon.h"

enum { LM_MAX_LAYERS = 12 };
typedef enum lm_optimizer { LM_MUON, LM_MIXED, LM_ADAMW } lm_optimizer; // what Muon has: matrices, attention's, none

typedef struct lm_shape {
    size_t vocab, d, heads, layers, length;
    int tied;
    lm_optimizer optimizer;
    double dropout, theta, epsilon;
    uint64_t seed;
} lm_shape;

// What a step's time goes into, for who asks (lm_mark); forward and backward of a part are counted apart.
#define LM_PHASES(X) X(EMBED, "embedding") X(NORM, "norms") X(LINEAR, "attention's matrices")                          \
    X(QUERY, "norm, rotation of q, k") X(ATTENTION, "attention") X(ADD, "residual, dropout") X(MIXTURE, "mixture")     \
    X(HEAD, "head, loss") X(MUON, "Muon") X(ADAMW, "AdamW, layers")
#define LM_PHASE(name, text) LM_PHASE_##name,
typedef enum lm_phase { LM_PHASES(LM_PHASE) LM_PHASE_COUNT } lm_phase;
#undef LM_PHASE
typedef struct lm_watch {
    double (*now)(void);
    double last, seconds[LM_PHASE_COUNT][2]; // forward or step; backward
} lm_watch;

// A training step: its number, which decides the masks of dropout.
typedef struct lm_moment {
    uint64_t step;
} lm_moment;

typedef struct lm_layer {
    size_t norm1, norm2, query, qkv, out;                 // in the bank; query: norms of queries and keys
    float *x, *r1, *n1, *qkv_out, *rq, *qk, *o, *mid, *r2, *z; // kept by the forward
    moe_layer *moe;
    float *expert_value, *expert_grad; // (3, experts, d, d_ff): what Muon steps
} lm_layer;

typedef struct lm {
    lm_shape shape;
    size_t rows, expert_floats; // of a layer
    nn ops;
    tb_ops run;
    nn_bank bank;
    size_t embed, norm, head; // head == embed: tied
    lm_layer layer[LM_MAX_LAYERS];
    muon muon;
    float *x, *r, *xf, *dx, *dy, *dqk, *dqkv, *logits, *nats;
    const int32_t *token;
    uint64_t steps; // done
    lm_watch *watch; // NULL: nobody asks for the time
} lm;

// What was since the last mark belongs to this part.
EX_FUNC void lm_mark(lm *m, lm_phase phase, int back) {
    if (!m->watch) return;
    double now = m->watch->now();
    m->watch->seconds[phase][back] += now - m->watch->last;
    m->watch->last = now;
}

static const char *const lm_expert_tensor[3] = {"experts.w1", "experts.wu", "experts.w2"};

EX_FUNC void lm_declare(lm *m) {
    const lm_shape *s = &m->shape;
    size_t d = s->d;
    m->embed = m->head = nn_add(&m->bank, s->vocab * d, 1);
    for (size_t i = 0; i < s->layers; i++) {
        lm_layer *l = &m->layer[i];
        l->norm1 = nn_add(&m->bank, d, 0);
        l->query = nn_add(&m->bank, 2 * d, 0);
        l->qkv = nn_add(&m->bank, 3 * d * d, 1);
        l->out = nn_add(&m->bank, d * d, 1);
        l->norm2 = nn_add(&m->bank, d, 0);
    }
    m->norm = nn_add(&m->bank, d, 0);
    if (!s->tied) m->head = nn_add(&m->bank, s->vocab * d, 1);
    nn_bank_alloc(&m->ops, &m->bank);
}

EX_FUNC void lm_init(lm *m) { // normal numbers, 1 / sqrt(inputs) for matrices; norms 1
    const lm_shape *s = &m->shape;
    float *w = m->bank.value, wide = 1 / sqrtf((float)s->d);
    for (size_t i = 0; i < m->bank.n_tensors; i++) {
        size_t at = m->bank.tensor[i].at, count = m->bank.tensor[i].count;
        for (size_t k = 0; !m->bank.tensor[i].decay && k < count; k++) w[at + k] = 1;
        float deviation = at == m->embed ? 0.02f : at == m->head ? 0.5f * wide : wide;
        if (m->bank.tensor[i].decay) nn_must(moe_rand_normal(s->seed, 100 + i, count, 0, deviation, w + at));
    }
    for (size_t i = 0; i < s->layers; i++) { // what a block adds begins small
        float *out = w + m->layer[i].out, shrink = 1 / sqrtf(2 * (float)s->layers);
        for (size_t k = 0; k < s->d * s->d; k++) out[k] *= shrink;
    }
}

EX_FUNC void lm_layer_new(lm *m, size_t i, const moe_desc *desc) {
    lm_layer *l = &m->layer[i];
    size_t rows = m->rows, d = m->shape.d;
    moe_desc own = *desc;
    own.seed = desc->seed + i;
    nn_must(moe_layer_new(&l->moe, &own));
    struct {
        float **at;
        size_t width;
    } kept[] = {{&l->x, d}, {&l->r1, 1}, {&l->n1, d}, {&l->qkv_out, 3 * d}, {&l->rq, 2},
                {&l->qk, 2 * d}, {&l->o, d}, {&l->mid, d}, {&l->r2, 1}, {&l->z, d}};
    for (size_t k = 0; k < sizeof kept / sizeof *kept; k++) *kept[k].at = nn_floats(&m->ops, rows * kept[k].width);
}

// The experts' matrices, and those of attention, as Muon has them.
EX_FUNC void lm_muon(lm *m) {
    size_t d = m->shape.d;
    for (size_t i = 0; i < m->shape.layers && m->shape.optimizer != LM_ADAMW; i++) {
        lm_layer *l = &m->layer[i];
        float *value = m->bank.value, *grad = m->bank.grad;
        for (size_t k = 0; k < 3; k++)
            muon_add(&m->muon, value + l->qkv + k * d * d, grad + l->qkv + k * d * d, d, d);
        muon_add(&m->muon, value + l->out, grad + l->out, d, d);
        if (m->shape.optimizer == LM_MIXED) continue;
        l->expert_value = nn_floats(&m->ops, m->expert_floats);
        l->expert_grad = nn_floats(&m->ops, m->expert_floats);
        size_t at = 0;
        moe_tensor t;
        for (size_t k = 0; moe_layer_tensor(l->moe, k, &t) == MOE_OK; k++)
            for (int e = 0; e < 3; e++)
                for (size_t g = 0; strcmp(t.name, lm_expert_tensor[e]) == 0 && g < t.dim[0]; g++) {
                    muon_add(&m->muon, l->expert_value + at, l->expert_grad + at, t.dim[1], t.dim[2]);
                    at += t.dim[1] * t.dim[2];
                }
    }
    if (m->shape.optimizer != LM_ADAMW) muon_begin(&m->muon, &m->ops);
}

// desc: of every layer, resolved; its seed is the first layer's.
EX_FUNC lm *lm_new(const lm_shape *shape, const moe_desc *desc, size_t rows) {
    lm *m = allocate(1, sizeof *m);
    nn *s = &m->ops;
    size_t d = shape->d;
    moe_tensor t;
    m->shape = *shape;
    m->rows = rows;
    s->parallel = desc->parallel;
    lm_declare(m);
    lm_init(m);
    for (size_t i = 0; i < shape->layers; i++) lm_layer_new(m, i, desc);
    for (size_t k = 0; moe_layer_tensor(m->layer[0].moe, k, &t) == MOE_OK; k++)
        for (int e = 0; e < 3; e++)
            if (strcmp(t.name, lm_expert_tensor[e]) == 0) m->expert_floats += t.count;
    lm_muon(m);
    m->run = tb_make(s, rows, shape->vocab, shape->length, d, shape->heads, shape->theta,
                     (float)shape->epsilon);
    float **wide[] = {&m->x, &m->xf, &m->dx, &m->dy};
    for (int k = 0; k < 4; k++) *wide[k] = nn_floats(s, rows * d);
    m->dqk = nn_floats(s, rows * 2 * d);
    m->dqkv = nn_floats(s, rows * 3 * d);
    m->r = nn_floats(s, rows);
    m->nats = nn_floats(s, rows);
    m->logits = nn_floats(s, (rows < TB_HEAD_ROWS ? rows : TB_HEAD_ROWS) * shape->vocab);
    return m;
}

EX_FUNC void lm_free(lm *m) {
    for (size_t i = 0; m && i < m->shape.layers; i++) moe_layer_free(m->layer[i].moe);
    if (m) nn_free(&m->ops), muon_free(&m->muon);
    free(m);
}

EX_FUNC size_t lm_params(const lm *m, int active) {
    size_t sum = m->bank.count;
    if (active && !m->shape.tied) sum -= m->shape.vocab * m->shape.d; // a token reads one row of the embedding
    for (size_t i = 0; i < m->shape.layers; i++)
        sum += active ? moe_layer_active_params(m->layer[i].moe) : moe_layer_params(m->layer[i].moe);
    return sum;
}
EX_FUNC uint64_t lm_hash(const lm *m) {
    uint64_t hash = moe_hash(0, m->bank.value, m->bank.count * sizeof(float));
    for (size_t i = 0; i < m->shape.layers; i++) {
        uint64_t one = moe_layer_hash(m->layer[i].moe);
        hash = moe_hash(hash, &one, sizeof one);
    }
    return hash;
}

EX_FUNC tb_dropout lm_drop(const lm *m, const lm_moment *now, size_t place) {
    tb_dropout drop = {m->shape.seed, now ? now->step * 64 + place : 0, 0};
    if (now) drop.share = (unsigned)(256 * m->shape.dropout + 0.5);
    return drop;
}

// ---- forward ----

// Up to the last norm: m->xf. rows: a multiple of the length. now NULL: evaluation, without dropout.
EX_FUNC void lm_body(lm *m, const int32_t *token, size_t rows, const lm_moment *now) {
    const tb_ops *o = &m->run;
    const float *w = m->bank.value;
    size_t d = m->shape.d, layers = m->shape.layers;
    m->token = token;
    tb_embed(o, rows, token, w + m->embed, m->layer[0].x);
    tb_add(o, rows, NULL, m->layer[0].x, lm_drop(m, now, 0), m->layer[0].x);
    lm_mark(m, LM_PHASE_EMBED, 0);
    for (size_t i = 0; i < layers; i++) {
        lm_layer *l = &m->layer[i];
        float *next = i + 1 < layers ? m->layer[i + 1].x : m->x;
        tb_norm(o, rows, l->x, w + l->norm1, l->r1, l->n1);
        lm_mark(m, LM_PHASE_NORM, 0);
        tb_linear(o, rows, d, 3 * d, l->n1, w + l->qkv, l->qkv_out);
        lm_mark(m, LM_PHASE_LINEAR, 0);
        tb_query(o, rows, l->qkv_out, w + l->query, w + l->query + d, l->rq, l->qk);
        lm_mark(m, LM_PHASE_QUERY, 0);
        tb_attention(o, rows, l->qk, l->qkv_out + 2 * d, l->o);
        lm_mark(m, LM_PHASE_ATTENTION, 0);
        tb_linear(o, rows, d, d, l->o, w + l->out, l->mid);
        lm_mark(m, LM_PHASE_LINEAR, 0);
        tb_add(o, rows, l->x, l->mid, lm_drop(m, now, 1 + 2 * i), l->mid);
        lm_mark(m, LM_PHASE_ADD, 0);
        tb_norm(o, rows, l->mid, w + l->norm2, l->r2, l->z);
        lm_mark(m, LM_PHASE_NORM, 0);
        moe_layer_side(l->moe)->evaluate = !now;
        nn_must(moe_forward(l->moe, l->z, rows, next));
        lm_mark(m, LM_PHASE_MIXTURE, 0);
        tb_add(o, rows, l->mid, next, lm_drop(m, now, 2 + 2 * i), next);
        lm_mark(m, LM_PHASE_ADD, 0);
    }
    tb_norm(o, rows, m->x, w + m->norm, m->r, m->xf);
    lm_mark(m, LM_PHASE_NORM, 0);
}

// The head's part; with `learn` its gradients too, of the mean over the targets that count.
EX_FUNC double lm_loss(lm *m, const int32_t *target, size_t rows, int learn) {
    tb_head h = {.rows = rows, .vocab = m->shape.vocab, .x = m->xf, .w = m->bank.value + m->head, .target = target,
                 .logits = m->logits, .nats = m->nats};
    for (size_t t = 0; t < rows; t++) h.counted += target[t] >= 0;
    if (learn) h.dx = m->dy, h.dw = m->bank.grad + m->head;
    if (h.counted) tb_head_run(&m->run, &h);
    double nats = 0;
    for (size_t t = 0; t < rows; t++) nats += (double)m->nats[t];
    lm_mark(m, LM_PHASE_HEAD, 0);
    return nats;
}

// The sum of the nats of the targets (below 0: does not count), and with `now` all that the backward needs.
EX_FUNC double lm_forward(lm *m, const int32_t *token, const int32_t *target, size_t rows, const lm_moment *now) {
    lm_body(m, token, rows, now);
    return lm_loss(m, target, rows, now != NULL);
}

// ---- backward ----

EX_FUNC void lm_layer_back(lm *m, lm_layer *l, size_t i, size_t rows, const lm_moment *now) {
    const tb_ops *o = &m->run;
    const float *w = m->bank.value;
    float *g = m->bank.grad, *dx = m->dx, *dy = m->dy;
    size_t d = m->shape.d;
    tb_add(o, rows, NULL, dx, lm_drop(m, now, 2 + 2 * i), dy);
    lm_mark(m, LM_PHASE_ADD, 1);
    nn_must(moe_backward(l->moe, dy, m->dqk)); // m->dqk: room still
    lm_mark(m, LM_PHASE_MIXTURE, 1);
    tb_norm_back(o, rows, l->mid, w + l->norm2, l->r2, m->dqk, 1, dx, g + l->norm2);
    lm_mark(m, LM_PHASE_NORM, 1);
    tb_add(o, rows, NULL, dx, lm_drop(m, now, 1 + 2 * i), dy);
    lm_mark(m, LM_PHASE_ADD, 1);
    tb_linear_back(o, rows, d, d, l->o, w + l->out, dy, l->mid, 0, g + l->out); // l->mid: room now
    lm_mark(m, LM_PHASE_LINEAR, 1);
    tb_attention_back(o, rows, l->qk, l->qkv_out + 2 * d, l->mid, m->dqk, m->dqkv + 2 * d);
    lm_mark(m, LM_PHASE_ATTENTION, 1);
    tb_query_back(o, rows, l->qkv_out, w + l->query, w + l->query + d, l->rq, m->dqk, m->dqkv, g + l->query);
    lm_mark(m, LM_PHASE_QUERY, 1);
    tb_linear_back(o, rows, d, 3 * d, l->n1, w + l->qkv, m->dqkv, dy, 0, g + l->qkv);
    lm_mark(m, LM_PHASE_LINEAR, 1);
    tb_norm_back(o, rows, l->x, w + l->norm1, l->r1, dy, 1, dx, g + l->norm1);
    lm_mark(m, LM_PHASE_NORM, 1);
}

// After lm_forward with `now`: every gradient.
EX_FUNC void lm_backward(lm *m, size_t rows, const lm_moment *now) {
    const tb_ops *o = &m->run;
    float *g = m->bank.grad;
    tb_norm_back(o, rows, m->x, m->bank.value + m->norm, m->r, m->dy, 0, m->dx, g + m->norm);
    lm_mark(m, LM_PHASE_NORM, 1);
    for (size_t i = m->shape.layers; i-- > 0;) lm_layer_back(m, &m->layer[i], i, rows, now);
    tb_add(o, rows, NULL, m->dx, lm_drop(m, now, 0), m->dx);
    if (m->head != m->embed) memset(g + m->embed, 0, m->shape.vocab * m->shape.d * sizeof(float));
    tb_embed_back(o, rows, m->token, m->dx, g + m->embed);
    lm_mark(m, LM_PHASE_EMBED, 1);
}

// ---- step ----

typedef struct lm_move {
    lm *m;
    int back; // 0: from the layers to Muon's arrays; 1: the new values into the layers, whose gradients become zero
} lm_move;
EX_FUNC void lm_move_task(void *arg, size_t i, size_t worker) { // i: a layer
    const lm_move *v = arg;
    lm_layer *l = &v->m->layer[i];
    moe_tensor t;
    size_t at = 0;
    (void)worker;
    for (size_t k = 0; moe_layer_tensor(l->moe, k, &t) == MOE_OK; k++)
        for (int e = 0; e < 3; e++) {
            if (strcmp(t.name, lm_expert_tensor[e]) != 0) continue;
            float *value = l->expert_value + at, *grad = l->expert_grad + at;
            if (!v->back) {
                nn_must(moe_layer_get(l->moe, MOE_PART_PARAMS, t.name, value, t.count));
                nn_must(moe_layer_get(l->moe, MOE_PART_GRADS, t.name, grad, t.count));
            } else {
                memset(grad, 0, t.count * sizeof(float));
                nn_must(moe_layer_set(l->moe, MOE_PART_PARAMS, t.name, value, t.count));
                nn_must(moe_layer_set(l->moe, MOE_PART_GRADS, t.name, grad, t.count));
            }
            at += t.count;
        }
}

// AdamW for what Muon does not have.
EX_FUNC void lm_adamw(lm *m, float lr, float decay) {
    nn_bank *b = &m->bank;
    moe_optimizer_args o = {.lr = lr, .beta2 = 0.95f, .step = m->steps, .parallel = &m->ops.parallel};
    for (size_t i = 0; i < b->n_tensors; i++) {
        size_t at = b->tensor[i].at;
        int matrix = b->tensor[i].decay && at != m->embed && at != m->head;
        if (matrix && m->shape.optimizer != LM_ADAMW) continue;
        o.weight_decay = matrix ? decay : MOE_OFF;
        nn_must(moe_optimizer_step(&o, b->tensor[i].count, b->value + at, b->grad + at, b->moment1 + at,
                                   b->moment2 + at));
    }
}

// Muon takes weight decay off the experts' matrices: their desc says none where it has them.
EX_FUNC void lm_step(lm *m, float lr, float decay) {
    lm_move out = {m, 0}, back = {m, 1};
    m->steps++;
    int experts = m->shape.optimizer == LM_MUON;
    if (experts) moe_run(&m->ops.parallel, m->shape.layers, lm_move_task, &out);
    if (m->shape.optimizer != LM_ADAMW) muon_step(&m->muon, lr, decay);
    if (experts) moe_run(&m->ops.parallel, m->shape.layers, lm_move_task, &back);
    lm_mark(m, LM_PHASE_MUON, 0);
    lm_adamw(m, lr, decay);
    for (size_t i = 0; i < m->shape.layers; i++) nn_must(moe_step(m->layer[i].moe, lr));
    lm_mark(m, LM_PHASE_ADAMW, 0);
}

// ---- operations ----

// Of a training step of `rows` tokens in products, without the optimiser's: forward, and twice that for the backward.
EX_FUNC double lm_flops(const lm *m, size_t rows) {
    const lm_shape *s = &m->shape;
    const moe_desc *desc = moe_layer_desc(m->layer[0].moe);
    double d = (double)s->d, used = (double)(desc->top_k + desc->n_shared), gated = 3; // SwiGLU: three matrices
    if (desc->expert != MOE_EXPERT_SWIGLU && desc->expert != MOE_EXPERT_GEGLU) gated = 2;
    double layer = 4 * d * d + gated * d * (double)desc->d_ff * used + d * (double)desc->n_experts;
    double seen = ((double)s->length + 1) / 2; // tokens that one sees, on average
    double one = 2 * ((double)s->layers * (layer + 2 * d * seen) + (double)s->vocab * d);
    return 3 * one * (double)rows;
}
EX_FUNC double lm_step_flops(const lm *m) { return m->shape.optimizer == LM_ADAMW ? 0 : muon_flops(&m->muon); }

#endif
