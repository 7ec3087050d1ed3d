// transformer_back.h - the operations of OLMoE's block for training: each forward keeps what its backward reads.
//
//     RMSNorm      y = x r w,  r = 1 / sqrt(mean(x^2) + eps)
//     queries      q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk)), v = x Wv; the norms are over the whole projection
//     attention    softmax(q k^T / sqrt(head)) v, each token sees itself and what is before it in its sequence
//     head         logits = x W^T and their cross-entropy, some rows at a time: all logits never stand in memory
//     dropout      of what a block adds to the residual stream
//
// The block is transformer.h's, and so are the norm of a row and the rotation; its attention goes token by token over a
// cache, here a head of a sequence is a few products, and the mixture is a moe_layer. Matrices are as checkpoints keep
// them, W (out, in). Attention keeps no probabilities: its backward makes them again, a block of queries at a time.
// Every backward sets the gradients of parameters, unless it says that it adds. Results have the same bits for any
// number of threads and every instruction set: products are moe_gemm, exp and log are the library's, other sums run in
// 16 lanes or in order, and work is cut by index. Nothing is allocated while it runs.
#ifndef EX_TRANSFORMER_BACK_H
#define EX_TRANSFORMER_BACK_H

#include "transformer.h"

enum { TB_QUERIES = 64, TB_HEAD_ROWS = 512, TB_HEAD_WORDS = 1024 };

// What runs the operations: threads, scratch of a worker, and partial sums over blocks of rows.
typedef struct tb_ops {
    const moe_parallel *parallel;
    size_t length, d, heads;          // tokens of a sequence, width, heads of d / heads
    float epsilon;                    // of the norms
    tf_rope rope;
    char *gemm;                       // scratch of the large products
    size_t gemm_bytes;
    float *worker;                    // scratch of each worker's attention
    size_t worker_floats, small_bytes; // of one worker; of its small products, at the end
    float *partial;                   // (blocks, 2 d): gradients of norms
} tb_ops;

TF_WIDE float tb_dot(size_t n, const float *restrict a, const float *restrict b) {
    float lane[TF_LANES] = {0};
    size_t i = 0;
    for (; i + TF_LANES <= n; i += TF_LANES)
        for (size_t k = 0; k < TF_LANES; k++) lane[k] += a[i + k] * b[i + k];
    for (size_t k = 0; i < n; i++, k++) lane[k] += a[i] * b[i];
    return tf_lanes_sum(lane);
}
TF_WIDE float tb_dot3(size_t n, const float *restrict a, const float *restrict b, const float *restrict c) {
    float lane[TF_LANES] = {0};
    size_t i = 0;
    for (; i + TF_LANES <= n; i += TF_LANES)
        for (size_t k = 0; k < TF_LANES; k++) lane[k] += a[i + k] * b[i + k] * c[i + k];
    for (size_t k = 0; i < n; i++, k++) lane[k] += a[i] * b[i] * c[i];
    return tf_lanes_sum(lane);
}

// ---- products ----

// c (m, n) = op(a) op(b), or += it; rows of a, b and c are lda, ldb, ldc apart
EX_FUNC void tb_product(const tb_ops *o, moe_gemm_args g) {
    g.parallel = o->parallel;
    g.scratch = o->gemm;
    g.scratch_bytes = o->gemm_bytes;
    nn_must(moe_gemm(&g));
}
// y (rows, out) = x (rows, in) w^T
EX_FUNC void tb_linear(const tb_ops *o, size_t rows, size_t in, size_t out, const float *x, const float *w, float *y) {
    tb_product(o, (moe_gemm_args){.m = rows, .n = out, .k = in, .a = x, .b = w, .tb = 1, .c = y});
}
// dx = dy w (NULL: not wanted), dw = dy^T x, or += it
EX_FUNC void tb_linear_back(const tb_ops *o, size_t rows, size_t in, size_t out, const float *x, const float *w,
                            const float *dy, float *dx, int add, float *dw) {
    if (dx) tb_product(o, (moe_gemm_args){.m = rows, .n = in, .k = out, .a = dy, .b = w, .c = dx});
    tb_product(o, (moe_gemm_args){
                      .m = out, .n = in, .k = rows, .a = dy, .ta = 1, .b = x, .c = dw, .accumulate = add});
}

// ---- norm ----

typedef struct tb_norm_job {
    const tb_ops *ops;
    nn_job rows; // c: the width
    const float *x, *w, *dy;
    float *r, *y, *dx; // r (rows)
    int add;
    float *partial; // (blocks, width)
} tb_norm_job;

// As tf_norm, a row; returns r, which the backward needs.
EX_FUNC float tb_norm_row(size_t d, float epsilon, const float *x, const float *w, float *y) {
    float r = tf_norm_scale(d, epsilon, x);
    tf_norm_apply(d, r, x, w, y);
    return r;
}
// dx = (or +=) the gradient by x; dw +=
TF_WIDE void tb_norm_row_back(size_t d, const float *restrict x, float r, const float *restrict w,
                              const float *restrict dy, int add, float *restrict dx, float *restrict dw) {
    float scale = r * r * r * tb_dot3(d, dy, w, x) / (float)d;
    for (size_t k = 0; k < d; k++) dw[k] += dy[k] * (x[k] * r);
    if (add)
        for (size_t k = 0; k < d; k++) dx[k] += r * (w[k] * dy[k]) - scale * x[k];
    else
        for (size_t k = 0; k < d; k++) dx[k] = r * (w[k] * dy[k]) - scale * x[k];
}

EX_FUNC void tb_norm_task(void *arg, size_t i, size_t worker) {
    const tb_norm_job *j = arg;
    size_t begin, end, d = j->rows.c;
    (void)worker;
    nn_block(&j->rows, i, &begin, &end);
    for (size_t t = begin; t < end; t++)
        j->r[t] = tb_norm_row(d, j->ops->epsilon, j->x + t * d, j->w, j->y + t * d);
}
EX_FUNC void tb_norm(const tb_ops *o, size_t rows, const float *x, const float *w, float *r, float *y) {
    tb_norm_job j = {.ops = o, .rows = {.rows = rows, .c = o->d}, .x = x, .w = w, .r = r, .y = y};
    moe_run(o->parallel, nn_blocks(rows, o->d), tb_norm_task, &j);
}

// width numbers, each the sum of those of the blocks, in order
EX_FUNC void tb_gather(size_t blocks, size_t width, const float *restrict partial, float *restrict sum) {
    memset(sum, 0, width * sizeof(float));
    for (size_t b = 0; b < blocks; b++)
        for (size_t k = 0; k < width; k++) sum[k] += partial[b * width + k];
}
EX_FUNC void tb_norm_back_task(void *arg, size_t i, size_t worker) {
    const tb_norm_job *j = arg;
    size_t begin, end, d = j->rows.c;
    float *dw = j->partial + i * d;
    (void)worker;
    nn_block(&j->rows, i, &begin, &end);
    memset(dw, 0, d * sizeof(float));
    for (size_t t = begin; t < end; t++)
        tb_norm_row_back(d, j->x + t * d, j->r[t], j->w, j->dy + t * d, j->add, j->dx + t * d, dw);
}
EX_FUNC void tb_norm_back(const tb_ops *o, size_t rows, const float *x, const float *w, float *r, const float *dy,
                          int add, float *dx, float *dw) {
    tb_norm_job j = {.ops = o, .rows = {.rows = rows, .c = o->d}, .x = x, .w = w, .r = r, .dy = dy, .dx = dx};
    j.add = add;
    j.partial = o->partial;
    moe_run(o->parallel, nn_blocks(rows, o->d), tb_norm_back_task, &j);
    tb_gather(nn_blocks(rows, o->d), o->d, o->partial, dw);
}

// ---- queries and keys: norm and rotation ----

typedef struct tb_query_job {
    const tb_ops *ops;
    nn_job rows;
    const float *qkv, *wq, *wk; // (rows, 3 d): projections; (d): of the norms
    float *r, *qk;              // (rows, 2), (rows, 2 d)
    float *dqk, *dqkv;          // dqk is used up
    float *partial;
} tb_query_job;

EX_FUNC void tb_query_task(void *arg, size_t i, size_t worker) {
    const tb_query_job *j = arg;
    const tb_ops *o = j->ops;
    size_t begin, end, d = o->d, head = d / o->heads;
    (void)worker;
    nn_block(&j->rows, i, &begin, &end);
    for (size_t t = begin; t < end; t++)
        for (size_t p = 0; p < 2; p++) {
            float *y = j->qk + (2 * t + p) * d;
            j->r[2 * t + p] = tb_norm_row(d, o->epsilon, j->qkv + (3 * t + p) * d, p ? j->wk : j->wq, y);
            tf_rope_turn(&o->rope, 1, t % o->length, o->heads, head, 0, y);
        }
}
EX_FUNC void tb_query(const tb_ops *o, size_t rows, const float *qkv, const float *wq, const float *wk, float *r,
                      float *qk) {
    tb_query_job j = {.ops = o, .rows = {.rows = rows, .c = o->d}, .qkv = qkv, .wq = wq, .wk = wk, .r = r, .qk = qk};
    moe_run(o->parallel, nn_blocks(rows, o->d), tb_query_task, &j);
}

EX_FUNC void tb_query_back_task(void *arg, size_t i, size_t worker) {
    const tb_query_job *j = arg;
    const tb_ops *o = j->ops;
    size_t begin, end, d = o->d, head = d / o->heads;
    float *dw = j->partial + i * 2 * d;
    (void)worker;
    nn_block(&j->rows, i, &begin, &end);
    memset(dw, 0, 2 * d * sizeof(float));
    for (size_t t = begin; t < end; t++)
        for (size_t p = 0; p < 2; p++) {
            size_t at = (3 * t + p) * d;
            float *dy = j->dqk + (2 * t + p) * d;
            tf_rope_turn(&o->rope, 1, t % o->length, o->heads, head, 1, dy);
            tb_norm_row_back(d, j->qkv + at, j->r[2 * t + p], p ? j->wk : j->wq, dy, 0, j->dqkv + at, dw + p * d);
        }
}
// dqk -> the first two thirds of dqkv; dw (2 d): of the queries' norm and the keys'
EX_FUNC void tb_query_back(const tb_ops *o, size_t rows, const float *qkv, const float *wq, const float *wk, float *r,
                           float *dqk, float *dqkv, float *dw) {
    tb_query_job j = {.ops = o, .rows = {.rows = rows, .c = o->d}, .qkv = qkv, .wq = wq, .wk = wk, .r = r};
    j.dqk = dqk;
    j.dqkv = dqkv;
    j.partial = o->partial;
    moe_run(o->parallel, nn_blocks(rows, o->d), tb_query_back_task, &j);
    tb_gather(nn_blocks(rows, o->d), 2 * o->d, o->partial, dw);
}

// ---- attention ----

typedef struct tb_attention_job {
    const tb_ops *ops;
    const float *qk, *v; // (rows, 2 d); v in rows of 3 d
    float *y;            // (rows, d)
    const float *dy;
    float *dqk, *dv; // as qk and v
} tb_attention_job;

// A worker's scratch: probabilities and their gradients of a block of queries, a head's keys and values in panels, once
// for all its blocks, and room for its products.
typedef struct tb_attention_room {
    float *p, *dp, *k, *v, *gemm;
    moe_parallel alone;
    size_t bytes;
} tb_attention_room;
EX_FUNC tb_attention_room tb_room(const tb_ops *o, size_t worker) {
    float *at = o->worker + worker * o->worker_floats;
    size_t square = (o->length < TB_QUERIES ? o->length : TB_QUERIES) * o->length;
    size_t panels = (o->length + 31) / 32 * 32 * (o->d / o->heads);
    float *k = at + 2 * square;
    return (tb_attention_room){at, at + square, k, k + panels, k + 2 * panels, {.n_threads = 1}, o->small_bytes};
}
// x^T of a head's rows (length, head), `apart` apart
EX_FUNC void tb_panels(const tb_ops *o, const tb_attention_room *room, const float *x, size_t apart, float *panels) {
    moe_gemm_args g = {.n = o->length, .k = o->d / o->heads, .b = x, .ldb = apart, .tb = 1, .parallel = &room->alone};
    nn_must(moe_gemm_pack(&g, panels));
}
EX_FUNC void tb_small(tb_attention_room *room, moe_gemm_args g) {
    g.parallel = &room->alone;
    g.scratch = room->gemm;
    g.scratch_bytes = room->bytes;
    nn_must(moe_gemm(&g));
}

// Of the scores: as who runs the model computes it.
EX_FUNC float tb_scale(size_t head) { return (float)(1 / sqrt((double)head)); }

TF_WIDE void tb_times(size_t n, float scale, float *x) {
    for (size_t i = 0; i < n; i++) x[i] *= scale;
}
// p (n, seen) of queries first ... first + n - 1, seen = first + n: their probabilities over the tokens that they see
EX_FUNC void tb_probabilities(const tb_ops *o, tb_attention_room *room, const float *q, size_t first, size_t n) {
    size_t seen = first + n, head = o->d / o->heads;
    float scale = tb_scale(head);
    tb_small(room, (moe_gemm_args){.m = n, .n = seen, .k = head, .a = q + first * 2 * o->d, .lda = 2 * o->d,
                                   .b_panels = room->k, .c = room->p});
    for (size_t i = 0; i < n; i++) {
        float *row = room->p + i * seen;
        size_t own = first + i + 1;
        tb_times(own, scale, row);
        nn_must(moe_softmax(1, own, 1, row, row));
        memset(row + own, 0, (seen - own) * sizeof(float));
    }
}

EX_FUNC void tb_attention_task(void *arg, size_t i, size_t worker) { // i: a sequence's head
    const tb_attention_job *j = arg;
    const tb_ops *o = j->ops;
    size_t d = o->d, head = d / o->heads, row = i / o->heads * o->length, at = i % o->heads * head;
    tb_attention_room room = tb_room(o, worker);
    const float *q = j->qk + row * 2 * d + at, *v = j->v + row * 3 * d + at;
    tb_panels(o, &room, q + d, 2 * d, room.k);
    for (size_t first = 0, n; first < o->length; first += n) {
        n = o->length - first < TB_QUERIES ? o->length - first : TB_QUERIES;
        tb_probabilities(o, &room, q, first, n);
        tb_small(&room, (moe_gemm_args){.m = n,
                                        .n = head,
                                        .k = first + n,
                                        .a = room.p,
                                        .b = v,
                                        .ldb = 3 * d,
                                        .c = j->y + (row + first) * d + at,
                                        .ldc = d});
    }
}
// y of the sequences of `rows` tokens
EX_FUNC void tb_attention(const tb_ops *o, size_t rows, const float *qk, const float *v, float *y) {
    tb_attention_job j = {.ops = o, .qk = qk, .v = v, .y = y};
    moe_run(o->parallel, rows / o->length * o->heads, tb_attention_task, &j);
}

// ds = p (dp - dot) scale, dot = sum of p dp over a row = dy . y, in place of dp
TF_WIDE void tb_attention_scores_back(size_t n, size_t seen, float scale, const float *p, float *dp) {
    for (size_t i = 0; i < n; i++) {
        const float *restrict a = p + i * seen;
        float *restrict b = dp + i * seen, dot = tb_dot(seen, a, b);
        for (size_t s = 0; s < seen; s++) b[s] = a[s] * (b[s] - dot) * scale;
    }
}
EX_FUNC void tb_attention_back_task(void *arg, size_t i, size_t worker) {
    const tb_attention_job *j = arg;
    const tb_ops *o = j->ops;
    size_t d = o->d, head = d / o->heads, row = i / o->heads * o->length, at = i % o->heads * head;
    size_t L = o->length, wide = 2 * d;
    tb_attention_room room = tb_room(o, worker);
    const float *q = j->qk + row * wide + at, *v = j->v + row * 3 * d + at, *dy = j->dy + row * d + at;
    float *dq = j->dqk + row * wide + at, *dv = j->dv + row * 3 * d + at;
    tb_panels(o, &room, q + d, wide, room.k);
    tb_panels(o, &room, v, 3 * d, room.v);
    // The last queries first: theirs are the products that reach every key, so that those set and the others add.
    for (size_t end = L, first; end; end = first) {
        first = (end - 1) / TB_QUERIES * TB_QUERIES;
        size_t n = end - first;
        int add = end < L;
        tb_probabilities(o, &room, q, first, n);
        tb_small(&room, (moe_gemm_args){.m = n, .n = end, .k = head, .a = dy + first * d, .lda = d,
                                        .b_panels = room.v, .c = room.dp});
        tb_small(&room, (moe_gemm_args){.m = end, .n = head, .k = n, .a = room.p, .ta = 1, .b = dy + first * d,
                                        .ldb = d, .c = dv, .ldc = 3 * d, .accumulate = add});
        tb_attention_scores_back(n, end, tb_scale(head), room.p, room.dp);
        tb_small(&room, (moe_gemm_args){.m = n, .n = head, .k = end, .a = room.dp, .b = q + d, .ldb = wide,
                                        .c = dq + first * wide, .ldc = wide});
        tb_small(&room, (moe_gemm_args){.m = end, .n = head, .k = n, .a = room.dp, .ta = 1, .b = q + first * wide,
                                        .ldb = wide, .c = dq + d, .ldc = wide, .accumulate = add});
    }
}
EX_FUNC void tb_attention_back(const tb_ops *o, size_t rows, const float *qk, const float *v, const float *dy,
                               float *dqk, float *dv) {
    tb_attention_job j = {.ops = o, .qk = qk, .v = v, .dy = dy, .dqk = dqk, .dv = dv};
    moe_run(o->parallel, rows / o->length * o->heads, tb_attention_back_task, &j);
}

// ---- residual stream ----

// Each number of what is added is left out with probability share / 256, and the others grow by 256 / (256 - share).
// The mask of (seed, stream) is made anew wherever it is needed.
typedef struct tb_dropout {
    uint64_t seed, stream;
    unsigned share; // 0: none
} tb_dropout;

typedef struct tb_add_job {
    nn_job rows;
    const float *x, *y; // x NULL: zeros
    float *out;
    tb_dropout drop;
} tb_add_job;

// 16 factors of 16 bytes drawn
TF_WIDE void tb_factors(const uint32_t draw[4], unsigned share, float keep, float factor[16]) {
    for (size_t word = 0; word < 4; word++)
        for (size_t byte = 0; byte < 4; byte++)
            factor[4 * word + byte] = (draw[word] >> 8 * byte & 255) < share ? 0 : keep;
}
EX_FUNC void tb_add_task(void *arg, size_t i, size_t worker) {
    const tb_add_job *j = arg;
    size_t begin, end, c = j->rows.c;
    float keep = 256.0f / (float)(256 - j->drop.share);
    (void)worker;
    nn_block(&j->rows, i, &begin, &end);
    for (size_t at = begin * c; at < end * c; at += 16) {
        size_t n = end * c - at < 16 ? end * c - at : 16;
        float factor[16];
        uint32_t draw[4] = {0};
        if (j->drop.share) moe_philox(j->drop.seed, at / 16, j->drop.stream, draw);
        tb_factors(draw, j->drop.share, keep, factor);
        if (j->x)
            for (size_t k = 0; k < n; k++) j->out[at + k] = j->x[at + k] + factor[k] * j->y[at + k];
        else
            for (size_t k = 0; k < n; k++) j->out[at + k] = factor[k] * j->y[at + k];
    }
}
// out (rows, d) = x + dropout(y); any of the three may be the same. A block of rows is a multiple of 16 numbers.
EX_FUNC void tb_add(const tb_ops *o, size_t rows, const float *x, const float *y, tb_dropout drop, float *out) {
    tb_add_job j = {.rows = {.rows = rows, .c = o->d}, .x = x, .y = y, .out = out, .drop = drop};
    moe_run(o->parallel, nn_blocks(rows, o->d), tb_add_task, &j);
}

// ---- embedding ----

typedef struct tb_embed_job {
    size_t rows, d;
    const int32_t *token;
    const float *x;
    float *out;
} tb_embed_job;

EX_FUNC void tb_embed(const tb_ops *o, size_t rows, const int32_t *token, const float *table, float *x) {
    for (size_t t = 0; t < rows; t++)
        memcpy(x + t * o->d, table + (size_t)token[t] * o->d, o->d * sizeof(float));
}
EX_FUNC void tb_embed_back_task(void *arg, size_t i, size_t worker) { // i: 32 columns
    const tb_embed_job *j = arg;
    size_t begin = 32 * i, n = j->d - begin < 32 ? j->d - begin : 32;
    (void)worker;
    for (size_t t = 0; t < j->rows; t++) {
        float *restrict out = j->out + (size_t)j->token[t] * j->d + begin;
        const float *restrict x = j->x + t * j->d + begin;
        for (size_t k = 0; k < n; k++) out[k] += x[k];
    }
}
// Adds.
EX_FUNC void tb_embed_back(const tb_ops *o, size_t rows, const int32_t *token, const float *dx, float *dtable) {
    tb_embed_job j = {rows, o->d, token, dx, dtable};
    moe_run(o->parallel, (o->d + 31) / 32, tb_embed_back_task, &j);
}

// ---- head ----

typedef struct tb_loss_job {
    nn_job rows; // c: the vocabulary
    float *logits;
    const int32_t *target; // below 0: this row does not count
    float *nats;           // (rows)
    float scale;           // of the gradient
} tb_loss_job;

// A row's logits become its gradient, (p - 1 at the target) scale.
EX_FUNC void tb_loss_task(void *arg, size_t i, size_t worker) {
    const tb_loss_job *j = arg;
    size_t begin, end, V = j->rows.c;
    (void)worker;
    nn_block(&j->rows, i, &begin, &end);
    for (size_t t = begin; t < end; t++) {
        float *row = j->logits + t * V, top, wanted, log_top;
        int32_t best;
        j->nats[t] = 0;
        if (j->target[t] < 0) {
            memset(row, 0, V * sizeof(float));
            continue;
        }
        nn_must(moe_topk(1, V, 1, row, &best, &top));
        wanted = row[j->target[t]];
        nn_must(moe_softmax(1, V, 1, row, row));
        nn_must(moe_log(1, row + best, &log_top));
        j->nats[t] = top - wanted - log_top; // -log p of the target, which itself may be too small for a float
        row[j->target[t]] -= 1;
        tb_times(V, j->scale, row);
    }
}

typedef struct tb_head {
    size_t rows, vocab, counted; // counted: what the mean is over
    const float *x, *w;          // (rows, d), (vocab, d)
    const int32_t *target;
    float *logits; // (TB_HEAD_ROWS, vocab): room
    float *nats;   // (rows)
    float *dx, *dw; // NULL: the loss alone
} tb_head;

// The products of rows `first` and on, some words of the vocabulary at a time: their weights are packed, read by all
// rows and left while they are near. back 0: the logits; 1: from their gradient those of x and w.
EX_FUNC void tb_head_products(const tb_ops *o, const tb_head *h, size_t first, size_t rows, int back) {
    const float *x = h->x + first * o->d;
    for (size_t word = 0, n; word < h->vocab; word += n) {
        n = h->vocab - word < TB_HEAD_WORDS ? h->vocab - word : TB_HEAD_WORDS;
        const float *w = h->w + word * o->d;
        float *logits = h->logits + word;
        if (!back) {
            tb_product(o, (moe_gemm_args){.m = rows, .n = n, .k = o->d, .a = x, .b = w, .tb = 1, .c = logits,
                                          .ldc = h->vocab});
            continue;
        }
        tb_product(o, (moe_gemm_args){.m = rows, .n = o->d, .k = n, .a = logits, .lda = h->vocab, .b = w,
                                      .c = h->dx + first * o->d, .accumulate = word > 0});
        tb_product(o, (moe_gemm_args){.m = n, .n = o->d, .k = rows, .a = logits, .lda = h->vocab, .ta = 1, .b = x,
                                      .c = h->dw + word * o->d, .accumulate = first > 0});
    }
}
EX_FUNC void tb_head_run(const tb_ops *o, const tb_head *h) {
    for (size_t first = 0, n; first < h->rows; first += n) {
        n = h->rows - first < TB_HEAD_ROWS ? h->rows - first : TB_HEAD_ROWS;
        tb_head_products(o, h, first, n, 0);
        tb_loss_job j = {.rows = {.rows = n, .c = h->vocab}, .logits = h->logits, .target = h->target + first};
        j.nats = h->nats + first;
        j.scale = 1 / (float)h->counted;
        moe_run(o->parallel, nn_blocks(n, h->vocab), tb_loss_task, &j);
        if (h->dx) tb_head_products(o, h, first, n, 1);
    }
}

// ---- making the operations ----

EX_FUNC size_t tb_bytes(moe_gemm_args g, const moe_parallel *parallel, size_t bytes) {
    size_t need = 0;
    g.parallel = parallel;
    nn_must(moe_gemm_scratch(&g, &need));
    return need > bytes ? need : bytes;
}

// For at most `rows` tokens and a vocabulary of `vocab`; memory lives until nn_free.
EX_FUNC tb_ops tb_make(nn *s, size_t rows, size_t vocab, size_t length, size_t d, size_t heads, double theta,
                       float epsilon) {
    tb_ops o = {.parallel = &s->parallel, .length = length, .d = d, .heads = heads};
    size_t head = d / heads, workers = moe_workers(o.parallel), n = TB_QUERIES < length ? TB_QUERIES : length;
    moe_parallel alone = {.n_threads = 1};
    const size_t product[][2] = {{3 * d, d}, {d, 3 * d}, {d, d}}; // what goes in, what comes out
    o.epsilon = epsilon;
    tf_rope_args turns = {.dim = head, .theta = theta};
    o.rope = tf_rope_new(s, &turns, length, 0);
    for (int i = 0; i < 3; i++) {
        size_t in = product[i][0], out = product[i][1];
        o.gemm_bytes = tb_bytes((moe_gemm_args){.m = rows, .n = out, .k = in, .tb = 1}, o.parallel, o.gemm_bytes);
        o.gemm_bytes = tb_bytes((moe_gemm_args){.m = out, .n = in, .k = rows, .ta = 1}, o.parallel, o.gemm_bytes);
    }
    size_t some = rows < TB_HEAD_ROWS ? rows : TB_HEAD_ROWS;
    const size_t words[] = {vocab < TB_HEAD_WORDS ? vocab : TB_HEAD_WORDS, vocab % TB_HEAD_WORDS}; // and the last ones
    for (int i = 0; i < 2; i++) {
        o.gemm_bytes = tb_bytes((moe_gemm_args){.m = some, .n = words[i], .k = d, .tb = 1}, o.parallel, o.gemm_bytes);
        o.gemm_bytes = tb_bytes((moe_gemm_args){.m = some, .n = d, .k = words[i]}, o.parallel, o.gemm_bytes);
        o.gemm_bytes = tb_bytes((moe_gemm_args){.m = words[i], .n = d, .k = some, .ta = 1}, o.parallel, o.gemm_bytes);
    }
    o.gemm = (char *)nn_floats(s, o.gemm_bytes / sizeof(float) + 1);
    for (size_t seen = n; seen <= length; seen++) {
        o.small_bytes = tb_bytes((moe_gemm_args){.m = n, .n = seen, .k = head, .tb = 1}, &alone, o.small_bytes);
        o.small_bytes = tb_bytes((moe_gemm_args){.m = n, .n = head, .k = seen}, &alone, o.small_bytes);
        o.small_bytes = tb_bytes((moe_gemm_args){.m = seen, .n = head, .k = n, .ta = 1}, &alone, o.small_bytes);
    }
    o.worker_floats = 2 * n * length + 2 * ((length + 31) / 32 * 32 * head) + o.small_bytes / sizeof(float) + 32;
    o.worker = nn_floats(s, workers * o.worker_floats);
    o.partial = nn_floats(s, nn_blocks(rows, d) * 2 * d);
    return o;
}

#endif
