// transformer.h - a decoder's forward around Mixture-of-Experts layers: normalisation, linear maps, rotary positions,
// attention over a key-value cache, and the block that they make. One definition for training and for inference: who
// trains gives every layer its own tf_acts and keeps them, who generates uses one for all.
//
//     x (T, d) -> norm -> q, k, v -> norm, clip, rotate -> cache -> attention -> o --+--> norm -> mixture or MLP --+-->
//       +---------------------------------------------------------------------------+ +---------------------------+
//
// All arrays are row-major floats, a row a token. A token's result depends on the tokens before it alone, to the last
// bit: not on how a text is cut into batches, nor on threads and instruction sets. Products are moe_gemm (one chain of
// fused multiply-adds an element), softmax is moe_softmax, the other sums run in 16 lanes by index. Compile with
// -ffp-contract=off. Formulas as in the models' public code [C]: docs/llm.md.
#ifndef EX_TRANSFORMER_H
#define EX_TRANSFORMER_H

#include "nn.h"

#define TF_LANES 16

// Loops over lanes are compiled for wider registers too: the bits are the same.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define TF_WIDE __attribute__((target_clones("avx512f", "avx2", "default"), unused)) static
#else
#define TF_WIDE EX_FUNC
#endif
#if defined(__GNUC__)
#define TF_INLINE static inline __attribute__((always_inline, unused))
#else
#define TF_INLINE static inline
#endif

// ---- linear maps ----

// y = x W^T + b. W lies as checkpoints have it, or packed once for many products (moe_gemm_pack): the same bits.
typedef struct tf_linear {
    size_t in, out;
    const float *weight; // (out, in)
    const float *panels; // instead of it
    const float *bias;   // (out) or NULL
} tf_linear;

EX_FUNC void tf_linear_forward(const moe_parallel *parallel, const tf_linear *l, size_t rows, const float *x,
                               float *y) {
    moe_gemm_args g = {0};
    g.m = rows, g.n = l->out, g.k = l->in;
    g.a = x, g.b = l->weight, g.tb = 1, g.c = y;
    g.b_panels = l->panels;
    g.parallel = parallel;
    nn_must(moe_gemm(&g));
    if (!l->bias) return;
    for (size_t r = 0; r < rows; r++, y += l->out)
        for (size_t k = 0; k < l->out; k++) y[k] += l->bias[k];
}

// y += scale * x
EX_FUNC void tf_add(size_t n, float scale, const float *x, float *y) {
    for (size_t i = 0; i < n; i++) y[i] += scale * x[i];
}

// ---- normalisation ----

// The sum of 16 lanes, by halves.
TF_INLINE float tf_lanes_sum(float s[TF_LANES]) {
    for (size_t half = TF_LANES / 2; half; half /= 2)
        for (size_t j = 0; j < half; j++) s[j] += s[j + half];
    return s[0];
}
// 1 / root of the mean square of d numbers: what tf_norm multiplies a row with.
TF_WIDE float tf_norm_scale(size_t d, float eps, const float *x) {
    float s[TF_LANES] = {0};
    size_t k = 0;
    for (; k + TF_LANES <= d; k += TF_LANES)
        for (size_t j = 0; j < TF_LANES; j++) s[j] += x[k + j] * x[k + j];
    for (size_t j = 0; k + j < d; j++) s[j] += x[k + j] * x[k + j];
    return 1 / sqrtf(tf_lanes_sum(s) / (float)d + eps);
}
TF_WIDE void tf_norm_apply(size_t d, float scale, const float *x, const float *w, float *y) {
    for (size_t k = 0; k < d; k++) y[k] = x[k] * scale * w[k];
}
// y = x / rms(x) * w, each of `rows` rows of d; y may be x.
EX_FUNC void tf_norm(size_t rows, size_t d, float eps, const float *x, const float *w, float *y) {
    for (size_t r = 0; r < rows; r++, x += d, y += d) tf_norm_apply(d, tf_norm_scale(d, eps, x), x, w, y);
}

// ---- rotary positions ----

typedef enum tf_scaling { TF_ROPE_PLAIN, TF_ROPE_LINEAR, TF_ROPE_LLAMA3, TF_ROPE_YARN } tf_scaling;
typedef struct tf_rope_args {
    size_t dim; // numbers of a head that are turned, even
    double theta;
    tf_scaling scaling;
    double factor, original; // all but plain: by how much contexts are longer than the `original` length
    double low, high;        // llama3: low_freq_factor, high_freq_factor; yarn: beta_slow, beta_fast
    double attention;        // yarn: cos and sin times this; 0: 0.1 ln(factor) + 1
    int truncate;            // yarn: the bounds of the ramp are whole numbers
} tf_rope_args;

typedef struct tf_rope {
    size_t dim, positions;
    int interleaved;  // pairs (2i, 2i + 1), as DeepSeek; else (i, i + dim / 2)
    float *cos, *sin; // (positions, dim / 2)
} tf_rope;

// Where in the frequencies a wave turns `turns` times in the original length.
EX_FUNC double tf_rope_at(const tf_rope_args *a, double turns) {
    return (double)a->dim * log(a->original / (turns * 6.283185307179586)) / (2 * log(a->theta));
}
// Radians a position of pair i.
EX_FUNC double tf_rope_frequency(const tf_rope_args *a, size_t i) {
    double f = pow(a->theta, -2.0 * (double)i / (double)a->dim), share = 0; // share: of f that stays as it is
    if (a->scaling == TF_ROPE_PLAIN) return f;
    if (a->scaling == TF_ROPE_LLAMA3) share = (a->original * f / 6.283185307179586 - a->low) / (a->high - a->low);
    if (a->scaling == TF_ROPE_YARN) {
        double low = tf_rope_at(a, a->high), high = tf_rope_at(a, a->low);
        if (a->truncate) low = floor(low), high = ceil(high);
        low = fmax(low, 0);
        high = fmin(high, (double)a->dim - 1);
        if (low == high) high += 0.001;
        share = 1 - ((double)i - low) / (high - low);
    }
    share = fmin(fmax(share, 0), 1);
    return f * share + f / a->factor * (1 - share);
}
// Turns of positions 0 .. positions - 1, in memory of nn_floats.
EX_FUNC tf_rope tf_rope_new(nn *s, const tf_rope_args *a, size_t positions, int interleaved) {
    size_t half = a->dim / 2;
    tf_rope r = {a->dim, positions, interleaved, nn_floats(s, positions * half), nn_floats(s, positions * half)};
    double size = 1;
    if (a->scaling == TF_ROPE_YARN) {
        size = a->attention;
        if (size == 0) size = a->factor > 1 ? 0.1 * log(a->factor) + 1 : 1;
    }
    for (size_t i = 0; i < half; i++) {
        double f = tf_rope_frequency(a, i);
        for (size_t p = 0; p < positions; p++) {
            r.cos[p * half + i] = (float)(cos((double)p * f) * size);
            r.sin[p * half + i] = (float)(sin((double)p * f) * size);
        }
    }
    return r;
}
// Pairs (i, i + half) of a head; sign -1: back.
TF_WIDE void tf_rope_halves(size_t half, const float *restrict c, const float *restrict s, float sign,
                            float *restrict x, float *restrict y) {
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = y[i], turn = sign * s[i];
        x[i] = a * c[i] - b * turn;
        y[i] = b * c[i] + a * turn;
    }
}
// Turns x (rows, heads, width) in place: the last r->dim numbers of each head; row i stands at `position` + i. back:
// the other way round, which is the gradient's way.
EX_FUNC void tf_rope_turn(const tf_rope *r, size_t rows, size_t position, size_t heads, size_t width, int back,
                          float *x) {
    size_t half = r->dim / 2;
    float sign = back ? -1.0f : 1.0f;
    for (size_t t = 0; t < rows; t++) {
        const float *c = r->cos + (position + t) * half, *s = r->sin + (position + t) * half;
        for (size_t h = 0; h < heads; h++, x += width) {
            float *y = x + width - r->dim;
            if (!r->interleaved) tf_rope_halves(half, c, s, sign, y, y + half);
            for (size_t i = 0; r->interleaved && i < half; i++, y += 2)
                tf_rope_halves(1, c + i, s + i, sign, y, y + 1);
        }
    }
}

// ---- attention over a cache ----
// Keys and values lie in panels as moe_gemm reads them: keys transposed in blocks of 32 positions, values in panels of
// 32 columns:   k (n_kv, capacity / 32, k_dim, 32)      v (n_kv, panels of v_dim, capacity, 32)

#define TF_PANEL 32
typedef struct tf_cache {
    size_t capacity, n_kv, k_dim, v_dim, v_panels; // capacity in positions, a multiple of 32
    float *k, *v;
} tf_cache;

EX_FUNC size_t tf_panels(size_t n) { return (n + TF_PANEL - 1) / TF_PANEL; }
EX_FUNC tf_cache tf_cache_new(nn *s, size_t positions, size_t n_kv, size_t k_dim, size_t v_dim) {
    tf_cache c = {tf_panels(positions) * TF_PANEL, n_kv, k_dim, v_dim, tf_panels(v_dim), NULL, NULL};
    c.k = nn_floats(s, n_kv * c.capacity * k_dim);
    c.v = nn_floats(s, n_kv * c.capacity * c.v_panels * TF_PANEL);
    return c;
}
// Keys (rows, n_kv, k_dim) and values (rows, n_kv, v_dim) of positions `position` and on.
EX_FUNC void tf_cache_put(tf_cache *c, size_t position, size_t rows, const float *k, const float *v) {
    for (size_t t = 0; t < rows; t++)
        for (size_t g = 0; g < c->n_kv; g++, k += c->k_dim, v += c->v_dim) {
            size_t at = position + t, lane = at % TF_PANEL;
            float *keys = c->k + (g * c->capacity + at - lane) * c->k_dim + lane;
            float *values = c->v + (g * c->v_panels * c->capacity + at) * TF_PANEL;
            for (size_t i = 0; i < c->k_dim; i++) keys[i * TF_PANEL] = k[i];
            for (size_t i = 0; i < c->v_dim; i++) values[i / TF_PANEL * c->capacity * TF_PANEL + i % TF_PANEL] = v[i];
        }
}

typedef struct tf_attention {
    size_t heads, n_kv, k_dim, v_dim;
    size_t window;      // a query sees itself and the window - 1 keys before it; 0 = all before it
    float scale;        // of the scores
    const float *sinks; // (heads): a score that joins the softmax and has no value; or NULL
} tf_attention;

// A task: one head of up to 64 rows. The keys of a pass are those that any of its rows sees; what one of them does not
// see has probability 0, which changes no bit of its sum.
#define TF_ROWS 64
typedef struct tf_attend_job {
    const tf_attention *a;
    const tf_cache *cache;
    size_t rows, position, room;
    const float *q;
    float *o, *scratch; // scratch: (workers, TF_ROWS, room)
} tf_attend_job;

EX_FUNC void tf_attend_product(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *panels, float *c,
                               size_t ldc) {
    static const moe_parallel alone = {.n_threads = 1};
    moe_gemm_args g = {.m = m, .n = n, .k = k, .a = a, .lda = lda, .b_panels = panels, .c = c, .ldc = ldc};
    g.parallel = &alone;
    nn_must(moe_gemm(&g));
}
EX_FUNC size_t tf_attend_first(const tf_attention *a, size_t position) {
    return a->window && position >= a->window ? position + 1 - a->window : 0;
}
// The scores s of keys `from` and on, `count` of them, of the query at `position` become probabilities. A sink is one
// score more, whose probability is dropped.
EX_FUNC void tf_attend_softmax(const tf_attention *a, size_t position, const float *sink, size_t from, size_t count,
                               float *s) {
    size_t first = tf_attend_first(a, position) - from, end = position + 1 - from, all = end - first;
    for (size_t t = first; t < end; t++) s[t] *= a->scale;
    if (sink) s[first + all++] = *sink;
    nn_must(moe_softmax(1, all, 1, s + first, s + first));
    for (size_t t = 0; t < first; t++) s[t] = 0;
    for (size_t t = end; t < count; t++) s[t] = 0;
}
EX_FUNC void tf_attend_task(void *arg, size_t i, size_t worker) {
    const tf_attend_job *j = arg;
    const tf_attention *a = j->a;
    const tf_cache *c = j->cache;
    size_t head = i % a->heads, begin = i / a->heads * TF_ROWS, group = head / (a->heads / a->n_kv);
    size_t rows = j->rows - begin < TF_ROWS ? j->rows - begin : TF_ROWS, at = j->position + begin;
    size_t from = tf_attend_first(a, at) / TF_PANEL * TF_PANEL, count = at + rows - from, room = j->room;
    float *s = j->scratch + worker * TF_ROWS * room, *o = j->o + (begin * a->heads + head) * a->v_dim;
    tf_attend_product(rows, count, a->k_dim, j->q + (begin * a->heads + head) * a->k_dim, a->heads * a->k_dim,
                      c->k + (group * c->capacity + from) * a->k_dim, s, room);
    for (size_t t = 0; t < rows; t++)
        tf_attend_softmax(a, at + t, a->sinks ? a->sinks + head : NULL, from, count, s + t * room);
    for (size_t p = 0; p < c->v_panels; p++) {
        size_t left = a->v_dim - p * TF_PANEL;
        tf_attend_product(rows, left < TF_PANEL ? left : TF_PANEL, count, s, room,
                          c->v + ((group * c->v_panels + p) * c->capacity + from) * TF_PANEL, o + p * TF_PANEL,
                          a->heads * a->v_dim);
    }
}
// o (rows, heads, v_dim) = attention of q (rows, heads, k_dim), row i at `position` + i, over the cache, which has the
// keys and values of these positions already.
EX_FUNC void tf_attend(nn *s, const tf_attention *a, const tf_cache *cache, size_t rows, size_t position,
                       const float *q, float *o) {
    size_t room = tf_panels(position + rows + 1) * TF_PANEL; // one more, for a sink
    tf_attend_job j = {a, cache, rows, position, room, q, o, NULL};
    j.scratch = nn_scratch(s, moe_workers(&s->parallel) * TF_ROWS * room);
    moe_run(&s->parallel, (rows + TF_ROWS - 1) / TF_ROWS * a->heads, tf_attend_task, &j);
}

// ---- a block ----

// MLA's: queries over a latent (or not), keys and values from another that all heads share.
typedef struct tf_latent {
    size_t rank;               // of keys and values; 0 = no MLA
    tf_linear q_down, kv_down; // q_down.out 0: queries straight from x, by tf_block.q
    const float *q_norm, *kv_norm;
    tf_linear kv_up; // (heads, k_dim - rope.dim + v_dim)
} tf_latent;

typedef struct tf_block {
    size_t d;
    float eps, residual;        // residual: what is added to x is times this
    const float *norm1, *norm2; // (d)
    tf_linear q, k, v, o;
    const float *q_norm, *k_norm; // over the whole projection, or (norm_heads) over each head; or NULL
    int norm_heads;
    float clip; // q, k and v to +-clip; 0 = not
    tf_latent latent;
    const tf_rope *rope;
    tf_attention attention;
    moe_layer *mixture;       // or NULL, and then
    tf_linear gate, up, down; // down(silu(gate x) * up x)
} tf_block;

// What a block's forward writes, in its order; who trains keeps one for each layer. Rows of T tokens.
typedef struct tf_acts {
    float *norm1, *q0, *k0, *q, *k, *v; // (T, d); q0, k0: before norm, clip and turn; the others after
    float *latent;                      // MLA's
    float *o, *x, *norm2, *y;           // attention before its last map; x + attention; its norm; what is added last
    float *gate, *up;                   // the MLP's, where a block has one
    moe_tape *tape;                     // the mixture's
    const int32_t *index;               // (T, slots) who goes where, if not the router decides, and
    const float *weight;                // (T, slots) with which weights
} tf_acts;

EX_FUNC size_t tf_max(size_t a, size_t b) { return a > b ? a : b; }
// Room for all but the tape, for `rows` tokens of any of `many` blocks; until nn_free.
EX_FUNC tf_acts tf_acts_new(nn *s, const tf_block *b, size_t many, size_t rows) {
    size_t d = 0, q = 0, k = 0, v = 0, o = 0, latent = 0, q0 = 0, k0 = 0, inner = 0;
    for (const tf_block *end = b + many; b < end; b++) {
        const tf_attention *a = &b->attention;
        const tf_latent *m = &b->latent;
        d = tf_max(d, b->d);
        q = tf_max(q, a->heads * a->k_dim);
        k = tf_max(k, a->n_kv * a->k_dim);
        v = tf_max(v, a->n_kv * a->v_dim);
        o = tf_max(o, a->heads * a->v_dim);
        latent = tf_max(latent, tf_max(m->q_down.out, m->kv_down.out));
        q0 = tf_max(q0, m->rank ? m->rank : b->q.out);
        k0 = tf_max(k0, m->rank ? m->kv_up.out : b->k.out);
        inner = tf_max(inner, b->gate.out);
    }
    tf_acts f = {0};
    float **to[] = {&f.norm1, &f.x, &f.norm2, &f.y, &f.q0, &f.k0, &f.q, &f.k, &f.v, &f.o, &f.latent, &f.gate, &f.up};
    size_t width[] = {d, d, d, d, q0, k0, q, k, v, o, latent, inner, inner};
    for (size_t i = 0; i < sizeof to / sizeof *to; i++)
        if (width[i]) *to[i] = nn_floats(s, rows * width[i]);
    return f;
}

EX_FUNC void tf_clip(size_t n, float bound, float *x) {
    for (size_t i = 0; i < n; i++) x[i] = x[i] > bound ? bound : x[i] < -bound ? -bound : x[i];
}
EX_FUNC void tf_qk(const tf_block *b, size_t rows, size_t heads, const float *norm, const float *from, float *to) {
    size_t width = heads * b->attention.k_dim;
    if (norm && b->norm_heads)
        tf_norm(rows * heads, b->attention.k_dim, b->eps, from, norm, to);
    else if (norm)
        tf_norm(rows, width, b->eps, from, norm, to);
    else if (to != from)
        memcpy(to, from, rows * width * sizeof(float));
    if (b->clip > 0) tf_clip(rows * width, b->clip, to);
}
EX_FUNC void tf_turn(const tf_block *b, size_t sequences, size_t length, size_t position, size_t heads, size_t width,
                     float *x) {
    for (size_t i = 0; i < sequences; i++)
        tf_rope_turn(b->rope, length, position, heads, width, 0, x + i * length * heads * width);
}

// Queries, keys and values of acts->norm1, ready for the cache.
EX_FUNC void tf_project(nn *s, const tf_block *b, tf_acts *acts, size_t sequences, size_t length, size_t position) {
    const tf_attention *a = &b->attention;
    const moe_parallel *p = &s->parallel;
    size_t rows = sequences * length;
    tf_linear_forward(p, &b->q, rows, acts->norm1, acts->q0);
    tf_linear_forward(p, &b->k, rows, acts->norm1, acts->k0);
    tf_linear_forward(p, &b->v, rows, acts->norm1, acts->v);
    tf_qk(b, rows, a->heads, b->q_norm, acts->q0, acts->q);
    tf_qk(b, rows, a->n_kv, b->k_norm, acts->k0, acts->k);
    if (b->clip > 0) tf_clip(rows * a->n_kv * a->v_dim, b->clip, acts->v);
    tf_turn(b, sequences, length, position, a->heads, a->k_dim, acts->q);
    tf_turn(b, sequences, length, position, a->n_kv, a->k_dim, acts->k);
}
// MLA: a head's query and key are [not turned | turned]; the key's turned part is one for all heads.
EX_FUNC void tf_project_latent(nn *s, const tf_block *b, tf_acts *acts, size_t sequences, size_t length,
                               size_t position) {
    const tf_attention *a = &b->attention;
    const tf_latent *m = &b->latent;
    const moe_parallel *p = &s->parallel;
    size_t rows = sequences * length, turned = b->rope->dim, plain = a->k_dim - turned, rank = m->rank;
    size_t wide = plain + a->v_dim, all = rank + turned;
    const float *from = acts->norm1;
    if (m->q_down.out) {
        tf_linear_forward(p, &m->q_down, rows, from, acts->latent);
        tf_norm(rows, m->q_down.out, 1e-6f, acts->latent, m->q_norm, acts->latent);
        from = acts->latent;
    }
    tf_linear_forward(p, &b->q, rows, from, acts->q);
    tf_turn(b, sequences, length, position, a->heads, a->k_dim, acts->q);
    tf_linear_forward(p, &m->kv_down, rows, acts->norm1, acts->latent);
    tf_turn(b, sequences, length, position, 1, all, acts->latent);
    for (size_t t = 0; t < rows; t++) tf_norm(1, rank, 1e-6f, acts->latent + t * all, m->kv_norm, acts->q0 + t * rank);
    tf_linear_forward(p, &m->kv_up, rows, acts->q0, acts->k0);
    for (size_t t = 0; t < rows; t++)
        for (size_t h = 0; h < a->heads; h++) {
            const float *both = acts->k0 + (t * a->heads + h) * wide;
            float *k = acts->k + (t * a->heads + h) * a->k_dim;
            memcpy(k, both, plain * sizeof(float));
            memcpy(k + plain, acts->latent + t * all + rank, turned * sizeof(float));
            memcpy(acts->v + (t * a->heads + h) * a->v_dim, both + plain, a->v_dim * sizeof(float));
        }
}

// gate = silu(gate) * up
EX_FUNC void tf_swiglu(size_t n, float *gate, const float *up) {
    float e[256];
    for (size_t i = 0; i < n; i += 256) {
        size_t count = n - i < 256 ? n - i : 256;
        for (size_t k = 0; k < count; k++) e[k] = -gate[i + k];
        nn_must(moe_exp(count, e, e));
        for (size_t k = 0; k < count; k++) gate[i + k] = gate[i + k] / (1 + e[k]) * up[i + k];
    }
}
EX_FUNC void tf_feed_forward(nn *s, const tf_block *b, tf_acts *acts, size_t rows) {
    const moe_parallel *p = &s->parallel;
    if (b->mixture && acts->index) {
        nn_must(moe_tape_tokens(acts->tape, acts->norm2, rows));
        nn_must(moe_routes_fill(&acts->tape->routes, rows, acts->index, acts->weight, 0, MOE_ORDER_DEFAULT));
        nn_must(moe_layer_experts(b->mixture, acts->tape, acts->y));
        return;
    }
    if (b->mixture) {
        nn_must(moe_forward_tape(b->mixture, acts->tape, acts->norm2, rows, acts->y));
        return;
    }
    tf_linear_forward(p, &b->gate, rows, acts->norm2, acts->gate);
    tf_linear_forward(p, &b->up, rows, acts->norm2, acts->up);
    tf_swiglu(rows * b->gate.out, acts->gate, acts->up);
    tf_linear_forward(p, &b->down, rows, acts->gate, acts->y);
}

// The block: x (sequences, length, d) becomes y. Each sequence begins at `position` and has a cache of its own, in
// which the positions before are; y may be x.
EX_FUNC void tf_block_forward(nn *s, const tf_block *b, tf_acts *acts, size_t sequences, size_t length, size_t position,
                              tf_cache *caches, const float *x, float *y) {
    const tf_attention *a = &b->attention;
    size_t rows = sequences * length, d = b->d, q = a->heads * a->k_dim, k = a->n_kv * a->k_dim;
    size_t v = a->n_kv * a->v_dim, o = a->heads * a->v_dim;
    tf_norm(rows, d, b->eps, x, b->norm1, acts->norm1);
    if (b->latent.rank)
        tf_project_latent(s, b, acts, sequences, length, position);
    else
        tf_project(s, b, acts, sequences, length, position);
    for (size_t i = 0; i < sequences; i++) {
        size_t at = i * length;
        tf_cache_put(&caches[i], position, length, acts->k + at * k, acts->v + at * v);
        tf_attend(s, a, &caches[i], length, position, acts->q + at * q, acts->o + at * o);
    }
    tf_linear_forward(&s->parallel, &b->o, rows, acts->o, acts->x);
    for (size_t i = 0; i < rows * d; i++) acts->x[i] = x[i] + b->residual * acts->x[i];
    tf_norm(rows, d, b->eps, acts->x, b->norm2, acts->norm2);
    tf_feed_forward(s, b, acts, rows);
    for (size_t i = 0; i < rows * d; i++) y[i] = acts->x[i] + b->residual * acts->y[i];
}

#endif
