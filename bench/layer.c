/* How fast is a whole Mixture-of-Experts layer (SwiGLU, float32)? Router, routes, experts and combine;
 * forward of an inference layer, and forward + backward (all gradients) of a training layer.
 *
 * GFLOP/s: 2 T k (3 d ff) flops forward, three times that with backward; the router is not counted, only timed.
 * For T <= 256 reading the weights is the limit: bytes of the experts that were hit (with backward three times:
 * read, read again, gradient written). For T = 1 successive tokens use other experts, in rotation over at least
 * 1 GB of weights, as decoding does; nothing is left in the caches from the last time.
 * Peers: a loop over experts (gather, gemm, activation, gemm, scatter) around a library's sgemm, or in PyTorch.
 * They are given the routing; their router is neither computed nor timed. */
#include <stddef.h>
static void trace(void (*body)(void), size_t worker, int end);
#define MOE_TRACE(body, worker, end) trace(body, worker, end)
#undef MOE_NO_IMPLEMENTATION
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "peers.h"
#include "peer_process.h"
#include <signal.h>

typedef struct layer_shape {
    const char *name;
    size_t T, d, ff, E, k;
} layer_shape;

static const layer_shape shapes[] = {
    {"small", 4096, 256, 512, 16, 2},
    {"small1", 1, 256, 512, 16, 2},
    {"switch", 4096, 512, 1408, 64, 1},
    {"mixtral", 4096, 1024, 2048, 8, 2},
    {"olmoe1", 1, 2048, 1024, 64, 8},
    {"olmoe32", 32, 2048, 1024, 64, 8},
    {"olmoe256", 256, 2048, 1024, 64, 8},
    {"olmoe", 4096, 2048, 1024, 64, 8},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static void print_shapes(FILE *f)
{
    fputs("\nshape       T     d    ff   E  k  weights\n", f);
    for (size_t i = 0; i < N_SHAPES; i++) {
        const layer_shape *s = &shapes[i];
        fprintf(f, "%-9s %4zu %5zu %5zu %3zu %2zu  %6.1f MB\n", s->name, s->T, s->d, s->ff, s->E, s->k,
                12e-6 * (double)(s->E * s->d * s->ff));
    }
}

/* Plain row-major weights or gradients of n experts: w1, wu (n, d, ff), w2 (n, ff, d). */
typedef struct plain { float *w1, *wu, *w2; } plain;

/* Layers of one size, and the same weights as the peers want them: expert e of layer l is number l * E + e. */
typedef struct model {
    size_t d, ff, E, k, n_layers;
    int training;
    moe_desc desc;
    moe_layer **layer;
    float *router; /* (d, E) of layer 0 */
    plain w, g;    /* g: gradients, if training */
} model;

/* A shape's tokens on a model. A call is one pass over T tokens of one layer; calls differ only for T = 1. */
typedef struct problem {
    layer_shape s;
    model *m;
    size_t n_calls, repeats; /* repeats of all calls in one timed run */
    int accumulate;
    moe_tape *tape;
    float *x;         /* (n_calls, T, d) */
    float *dy;        /* (T, d) */
    float *y, *dx;    /* (T, d) of moe.h */
    int32_t *index;   /* (n_calls, T, k): numbers of experts */
    float *weight;    /* (n_calls, T, k) */
    uint32_t *begin;  /* (n_calls, E + 1): the same grouped by expert */
    uint32_t *token;  /* (n_calls, T k) */
    float *route_weight; /* (n_calls, T k) */
} problem;

static size_t call_layer(const problem *p, size_t call)
{
    return call % p->m->n_layers;
}

/* ---- model ---------------------------------------------------------------------------------- */
static plain plain_new(const model *m)
{
    size_t n = m->n_layers * m->E * m->d * m->ff;
    plain p = {bench_floats(n), bench_floats(n), bench_floats(n)};
    return p;
}

static void plain_free(plain *p)
{
    free(p->w1), free(p->wu), free(p->w2);
    p->w1 = p->wu = p->w2 = NULL;
}

static void plain_get(const model *m, size_t layer, moe_part_kind part, const plain *out)
{
    size_t n = m->E * m->d * m->ff;
    bench_ok(moe_layer_get(m->layer[layer], part, "experts.w1", out->w1 + layer * n, n), "moe_layer_get");
    bench_ok(moe_layer_get(m->layer[layer], part, "experts.wu", out->wu + layer * n, n), "moe_layer_get");
    bench_ok(moe_layer_get(m->layer[layer], part, "experts.w2", out->w2 + layer * n, n), "moe_layer_get");
}

static size_t layers_for(const layer_shape *s)
{
    size_t bytes = 3 * s->E * s->d * s->ff * sizeof(float);
    return s->T > 1 ? 1 : (((size_t)1 << 30) + bytes - 1) / bytes;
}

static int model_fits(const model *m, const layer_shape *s, int training)
{
    return m->layer && m->d == s->d && m->ff == s->ff && m->E == s->E && m->k == s->k && m->training == training &&
           m->n_layers == layers_for(s);
}

static void model_free(model *m)
{
    if (m->layer == NULL) return;
    for (size_t i = 0; i < m->n_layers; i++) moe_layer_free(m->layer[i]);
    plain_free(&m->w);
    plain_free(&m->g);
    free(m->layer), free(m->router);
    m->layer = NULL;
}

static void model_make(model *m, const layer_shape *s, int training)
{
    memset(m, 0, sizeof *m);
    m->d = s->d, m->ff = s->ff, m->E = s->E, m->k = s->k;
    m->n_layers = layers_for(s);
    m->training = training;
    m->desc.d_model = s->d, m->desc.d_ff = s->ff, m->desc.n_experts = s->E, m->desc.top_k = s->k;
    m->desc.expert = MOE_EXPERT_SWIGLU;
    m->desc.training = training ? MOE_ON : MOE_OFF;
    m->desc.optimizer = MOE_OPTIMIZER_SGD; /* never timed; one moment less in memory */
    m->desc.weight_decay = MOE_OFF;
    m->layer = (moe_layer **)bench_array(m->n_layers, sizeof *m->layer);
    m->w = plain_new(m);
    if (training) m->g = plain_new(m);
    for (size_t i = 0; i < m->n_layers; i++) {
        m->desc.seed = i + 1;
        bench_ok(moe_layer_new(&m->layer[i], &m->desc), "moe_layer_new");
        plain_get(m, i, MOE_PART_PARAMS, &m->w);
    }
    m->router = bench_floats(s->d * s->E);
    bench_ok(moe_layer_get(m->layer[0], MOE_PART_PARAMS, "router", m->router, s->d * s->E), "moe_layer_get");
}

/* ---- problem -------------------------------------------------------------------------------- */

/* Tokens that go to the experts we want: noise plus the router's directions of these experts. */
static void aim_token(const problem *p, size_t call, float *x)
{
    const model *m = p->m;
    size_t layer = call_layer(p, call), first = call / m->n_layers * m->k, d = m->d, E = m->E;
    float *router = bench_floats(d * E);
    bench_ok(moe_layer_get(m->layer[layer], MOE_PART_PARAMS, "router", router, d * E), "moe_layer_get");
    bench_ok(moe_rand_normal(3, call, d, 0.0f, 0.02f, x), "moe_rand_normal");
    for (size_t j = 0; j < m->k; j++) {
        double size = 0;
        for (size_t i = 0; i < d; i++) size += (double)router[i * E + first + j] * (double)router[i * E + first + j];
        for (size_t i = 0; i < d; i++) x[i] += (float)((double)router[i * E + first + j] / sqrt(size));
    }
    free(router);
}

static void run_forward(problem *p, size_t call, const moe_layer *layer)
{
    bench_ok(moe_forward_tape(layer, p->tape, p->x + call * p->s.T * p->s.d, p->s.T, p->y), "moe_forward_tape");
}

static void make_tape(problem *p)
{
    moe_tape_free(p->tape);
    p->tape = NULL;
    bench_ok(moe_tape_new(&p->tape, &p->m->desc, p->s.T, p->m->training ? MOE_ON : MOE_OFF), "moe_tape_new");
}

/* Copies the routing of a call from the tape, and groups it by expert for the peers. */
static void keep_routing(problem *p, size_t call)
{
    size_t E = p->s.E, n = p->s.T * p->s.k, layer = call_layer(p, call);
    int32_t *index = p->index + call * n;
    uint32_t *begin = p->begin + call * (E + 1), *token = p->token + call * n, *next = begin + 1;
    memset(begin, 0, (E + 1) * sizeof *begin);
    for (size_t i = 0; i < n; i++) {
        index[i] = (int32_t)(layer * E) + p->tape->index[i];
        p->weight[call * n + i] = p->tape->weight[i];
        begin[p->tape->index[i] + 1]++;
    }
    for (size_t e = 0; e < E; e++) begin[e + 1] += begin[e];
    for (size_t e = E; e-- > 1;) next[e] = begin[e]; /* next[e]: where the next route of e goes, ends at begin[e + 1] */
    next[0] = 0;
    for (size_t i = 0; i < n; i++) {
        size_t at = next[p->tape->index[i]]++;
        token[at] = (uint32_t)(i / p->s.k);
        p->route_weight[call * n + at] = p->tape->weight[i];
    }
}

static void problem_free(problem *p)
{
    moe_tape_free(p->tape);
    free(p->x), free(p->dy), free(p->y), free(p->dx);
    free(p->index), free(p->weight), free(p->begin), free(p->token), free(p->route_weight);
    memset(p, 0, sizeof *p);
}

static void problem_make(problem *p, const layer_shape *s, model *m, int accumulate)
{
    size_t n = s->T * s->d, routes = s->T * s->k;
    memset(p, 0, sizeof *p);
    p->s = *s;
    p->m = m;
    p->accumulate = accumulate || s->T == 1; /* one token's gradient is always added to those of others */
    p->n_calls = s->T == 1 ? m->n_layers * (s->E / s->k) : 1;
    p->x = bench_floats(p->n_calls * n);
    p->dy = bench_floats(n), p->y = bench_floats(n), p->dx = bench_floats(n);
    p->index = (int32_t *)bench_array(p->n_calls * routes, sizeof(int32_t));
    p->weight = bench_floats(p->n_calls * routes);
    p->begin = (uint32_t *)bench_array(p->n_calls * (s->E + 1), sizeof(uint32_t));
    p->token = (uint32_t *)bench_array(p->n_calls * routes, sizeof(uint32_t));
    p->route_weight = bench_floats(p->n_calls * routes);
    bench_ok(moe_rand_normal(4, 0, n, 0, 1, p->dy), "moe_rand_normal");
    if (s->T == 1) {
        for (size_t c = 0; c < p->n_calls; c++) aim_token(p, c, p->x + c * n);
    } else {
        bench_ok(moe_rand_normal(2, 0, n, 0, 1, p->x), "moe_rand_normal");
    }
    make_tape(p);
    for (size_t c = p->n_calls; c-- > 0;) {
        run_forward(p, c, m->layer[call_layer(p, c)]);
        keep_routing(p, c);
        if (s->T > 1) continue;
        size_t first = c / m->n_layers * s->k; /* the rotation is what it is meant to be */
        if (p->begin[c * (s->E + 1) + first] != 0 || p->begin[c * (s->E + 1) + first + s->k] != s->k) {
            bench_die("%s: token %zu did not go to experts %zu to %zu", s->name, c, first, first + s->k - 1);
        }
    }
}

/* Experts that a call hits, on average over the calls. */
static double distinct_experts(const problem *p)
{
    size_t n = 0;
    for (size_t c = 0; c < p->n_calls; c++) {
        const uint32_t *begin = p->begin + c * (p->s.E + 1);
        for (size_t e = 0; e < p->s.E; e++) n += begin[e + 1] > begin[e];
    }
    return (double)n / (double)p->n_calls;
}

/* ---- moe.h ---------------------------------------------------------------------------------- */
static double run_moe(void *self)
{
    problem *p = (problem *)self;
    double seconds = 0;
    for (size_t r = 0; r < p->repeats; r++) {
        double start = bench_now();
        for (size_t c = 0; c < p->n_calls; c++) {
            moe_layer *layer = p->m->layer[call_layer(p, c)];
            run_forward(p, c, layer);
            if (p->m->training) bench_ok(moe_backward_tape(layer, p->tape, p->dy, p->dx), "moe_backward_tape");
        }
        seconds += bench_now() - start;
        for (size_t l = 0; p->m->training && !p->accumulate && l < p->m->n_layers; l++) {
            bench_ok(moe_step(p->m->layer[l], 0.0f), "moe_step"); /* changes nothing, but makes the gradients fresh */
        }
    }
    return seconds / (double)(p->repeats * p->n_calls);
}

/* ---- the peer: a loop over experts around a library's sgemm --------------------------------- */
typedef struct peer_loop {
    problem *p;
    peer_gemm *gemm;
    float *y, *dx;                 /* (T, d) */
    float *x, *g, *u, *h;          /* routes of an expert, or of all if training: (n, d), (n, ff) */
    float *out, *dh, *dg, *du;     /* of the routes of one expert: (n, d), (n, ff) */
    float *d_weight;               /* (n) */
} peer_loop;

static void peer_loop_make(peer_loop *l, problem *p, const peer_library *library)
{
    size_t rows = p->s.T * p->s.k, most = p->s.T, kept = p->m->training ? rows : most;
    memset(l, 0, sizeof *l);
    l->p = p;
    l->gemm = library->gemm;
    l->y = bench_floats(p->s.T * p->s.d), l->dx = bench_floats(p->s.T * p->s.d);
    l->x = bench_floats(kept * p->s.d), l->g = bench_floats(kept * p->s.ff);
    l->u = bench_floats(kept * p->s.ff), l->h = bench_floats(kept * p->s.ff);
    l->out = bench_floats(most * p->s.d);
    if (!p->m->training) return;
    l->dh = bench_floats(most * p->s.ff), l->dg = bench_floats(most * p->s.ff), l->du = bench_floats(most * p->s.ff);
    l->d_weight = bench_floats(rows);
}

static void peer_loop_free(peer_loop *l)
{
    free(l->y), free(l->dx), free(l->x), free(l->g), free(l->u), free(l->h);
    free(l->out), free(l->dh), free(l->dg), free(l->du), free(l->d_weight);
}

static void gather(size_t n, size_t d, const uint32_t *token, const float *from, float *to)
{
    BENCH_PARALLEL_FOR
    for (size_t r = 0; r < n; r++) memcpy(to + r * d, from + token[r] * d, d * sizeof *to);
}

/* to[token] += weight * from; weight NULL = 1. The tokens of an expert are distinct. */
static void scatter(size_t n, size_t d, const uint32_t *token, const float *weight, const float *from, float *to)
{
    BENCH_PARALLEL_FOR
    for (size_t r = 0; r < n; r++) {
        float w = weight ? weight[r] : 1.0f, *t = to + token[r] * d;
        const float *f = from + r * d;
        BENCH_SIMD
        for (size_t i = 0; i < d; i++) t[i] += w * f[i];
    }
}

/* h = silu(g) * u, with the library's own vector exp, so that the peer does not wait for expf. */
static void swiglu(size_t n, size_t ff, const float *g_all, const float *u_all, float *h_all)
{
    BENCH_PARALLEL_FOR
    for (size_t r = 0; r < n; r++) {
        const float *g = g_all + r * ff, *u = u_all + r * ff;
        float *h = h_all + r * ff;
        BENCH_SIMD
        for (size_t i = 0; i < ff; i++) h[i] = -g[i];
        moe_exp(ff, h, h);
        BENCH_SIMD
        for (size_t i = 0; i < ff; i++) h[i] = g[i] / (1.0f + h[i]) * u[i];
    }
}

/* From dh (the gradient by h of an unweighted output) to dg and du; h becomes weight * h; d_weight = h . dh. */
static void swiglu_backward(peer_loop *l, size_t n, size_t ff, size_t first, const float *weight)
{
    BENCH_PARALLEL_FOR
    for (size_t r = 0; r < n; r++) {
        size_t at = (first + r) * ff;
        const float *g = l->g + at, *u = l->u + at, *dh = l->dh + r * ff;
        float *h = l->h + at, *dg = l->dg + r * ff, *du = l->du + r * ff, w = weight[r], sum = 0;
        BENCH_SIMD
        for (size_t i = 0; i < ff; i++) dg[i] = -g[i];
        moe_exp(ff, dg, dg);
        BENCH_SIMD_SUM(sum)
        for (size_t i = 0; i < ff; i++) {
            float s = 1.0f / (1.0f + dg[i]), dhw = dh[i] * w;
            sum += h[i] * dh[i];
            h[i] *= w;
            dg[i] = dhw * u[i] * s * (1.0f + g[i] * (1.0f - s));
            du[i] = dhw * g[i] * s;
        }
        l->d_weight[first + r] = sum;
    }
}

static void peer_forward(peer_loop *l, size_t call)
{
    const problem *p = l->p;
    const model *m = p->m;
    size_t d = m->d, ff = m->ff, E = m->E, routes = p->s.T * p->s.k;
    const uint32_t *begin = p->begin + call * (E + 1);
    memset(l->y, 0, p->s.T * d * sizeof *l->y);
    for (size_t e = 0; e < E; e++) {
        size_t first = begin[e], n = begin[e + 1] - first, w = (call_layer(p, call) * E + e) * d * ff;
        size_t at = m->training ? first : 0;
        const uint32_t *token = p->token + call * routes + first;
        float *x = l->x + at * d, *g = l->g + at * ff, *u = l->u + at * ff, *h = l->h + at * ff;
        if (n == 0) continue;
        gather(n, d, token, p->x + call * p->s.T * d, x);
        l->gemm(0, 0, n, ff, d, x, d, m->w.w1 + w, ff, 0, g, ff);
        l->gemm(0, 0, n, ff, d, x, d, m->w.wu + w, ff, 0, u, ff);
        swiglu(n, ff, g, u, h);
        l->gemm(0, 0, n, d, ff, h, ff, m->w.w2 + w, d, 0, l->out, d);
        scatter(n, d, token, p->route_weight + call * routes + first, l->out, l->y);
    }
}

static void peer_backward(peer_loop *l, size_t call, float beta)
{
    const problem *p = l->p;
    const model *m = p->m;
    size_t d = m->d, ff = m->ff, E = m->E, routes = p->s.T * p->s.k;
    const uint32_t *begin = p->begin + call * (E + 1);
    memset(l->dx, 0, p->s.T * d * sizeof *l->dx);
    for (size_t e = 0; e < E; e++) {
        size_t first = begin[e], n = begin[e + 1] - first, w = (call_layer(p, call) * E + e) * d * ff;
        const uint32_t *token = p->token + call * routes + first;
        const float *x = l->x + first * d, *h = l->h + first * ff;
        if (n == 0) continue;
        gather(n, d, token, p->dy, l->out);
        l->gemm(0, 1, n, ff, d, l->out, d, m->w.w2 + w, d, 0, l->dh, ff);
        swiglu_backward(l, n, ff, first, p->route_weight + call * routes + first);
        l->gemm(1, 0, ff, d, n, h, ff, l->out, d, beta, m->g.w2 + w, d);
        l->gemm(1, 0, d, ff, n, x, d, l->dg, ff, beta, m->g.w1 + w, ff);
        l->gemm(1, 0, d, ff, n, x, d, l->du, ff, beta, m->g.wu + w, ff);
        l->gemm(0, 1, n, d, ff, l->dg, ff, m->w.w1 + w, ff, 0, l->out, d);
        l->gemm(0, 1, n, d, ff, l->du, ff, m->w.wu + w, ff, 1, l->out, d);
        scatter(n, d, token, NULL, l->out, l->dx);
    }
}

/* A gradient that is new: the experts that nobody went to have a zero one. */
static void peer_zero_unused(const peer_loop *l)
{
    const problem *p = l->p;
    size_t n = p->m->d * p->m->ff;
    for (size_t i = 0; i < p->m->n_layers * p->m->E; i++) {
        int used = p->s.T == 1; /* a rotation uses them all */
        if (!used) used = p->begin[i + 1] > p->begin[i];
        if (used) continue;
        memset(p->m->g.w1 + i * n, 0, n * sizeof(float));
        memset(p->m->g.wu + i * n, 0, n * sizeof(float));
        memset(p->m->g.w2 + i * n, 0, n * sizeof(float));
    }
}

static double run_peer(void *self)
{
    peer_loop *l = (peer_loop *)self;
    const problem *p = l->p;
    double start = bench_now();
    for (size_t r = 0; r < p->repeats; r++) {
        if (p->m->training && !p->accumulate) peer_zero_unused(l);
        for (size_t c = 0; c < p->n_calls; c++) {
            peer_forward(l, c);
            if (p->m->training) peer_backward(l, c, p->accumulate ? 1.0f : 0.0f);
        }
    }
    return (bench_now() - start) / (double)(p->repeats * p->n_calls);
}

/* ---- the peer: PyTorch, in a process of its own --------------------------------------------- */
typedef struct torch {
    problem *p;
    peer_process process;
    float *y, *dx;
    char path[64];
} torch;

static void torch_write(FILE *f, const void *data, size_t count)
{
    if (fwrite(data, sizeof(float), count, f) != count) bench_die("pytorch: its input cannot be written");
}

static void torch_stop(torch *t)
{
    peer_stop(&t->process);
    if (t->path[0]) unlink(t->path);
    free(t->y), free(t->dx);
    memset(t, 0, sizeof *t);
}

static double run_torch(void *self)
{
    torch *t = (torch *)self;
    double seconds = peer_ask(&t->process, "run", bench_threads, t->p->repeats);
    if (seconds <= 0) bench_die("pytorch: the process ended early");
    return seconds / (double)(t->p->repeats * t->p->n_calls);
}

static int torch_start(torch *t, problem *p)
{
    static const char script[] = "bench/peer_torch.py";
    const model *m = p->m;
    size_t n = p->s.T * p->s.d, routes = p->s.T * p->s.k, weights = m->n_layers * m->E * m->d * m->ff;
    const size_t numbers[] = {p->n_calls, p->s.T, m->d, m->ff, m->n_layers * m->E, m->k, (size_t)m->training,
                              (size_t)p->accumulate};
    enum { N_NUMBERS = sizeof numbers / sizeof numbers[0] };
    char text[N_NUMBERS][24], *args[3 + N_NUMBERS + 1] = {"/usr/bin/python3", (char *)(intptr_t)script, t->path};
    memset(t, 0, sizeof *t);
    if (access(script, R_OK) != 0) {
        fprintf(stderr, "bench: pytorch skipped: %s is not here; run it from the repository's root\n", script);
        return 0;
    }
    t->p = p;
    t->y = bench_floats(n), t->dx = bench_floats(n);
    for (size_t i = 0; i < N_NUMBERS; i++) snprintf(args[3 + i] = text[i], sizeof text[i], "%zu", numbers[i]);
    snprintf(t->path, sizeof t->path, "%s/moe-bench-%ld", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm",
             (long)getpid());
    FILE *f = fopen(t->path, "wb");
    if (f == NULL) bench_die("pytorch: '%s' cannot be written", t->path);
    torch_write(f, p->x, p->n_calls * n);
    torch_write(f, p->dy, n);
    torch_write(f, p->weight, p->n_calls * routes);
    torch_write(f, p->index, p->n_calls * routes);
    torch_write(f, m->w.w1, weights);
    torch_write(f, m->w.wu, weights);
    torch_write(f, m->w.w2, weights);
    torch_write(f, p->y, n); /* where its results go */
    torch_write(f, p->dx, n);
    if (fclose(f) != 0) bench_die("pytorch: no room for its input");
    peer_start(&t->process, args);
    if (peer_ask(&t->process, "check", 1, 0) < 0) { /* ends at once where PyTorch is not installed */
        torch_stop(t);
        return 0;
    }
    f = fopen(t->path, "rb");
    if (f == NULL || fseeko(f, -(off_t)(2 * n * sizeof(float)), SEEK_END) != 0 ||
        fread(t->y, sizeof(float), n, f) != n || fread(t->dx, sizeof(float), n, f) != n) {
        bench_die("pytorch: its results cannot be read");
    }
    fclose(f);
    unlink(t->path);
    t->path[0] = '\0';
    return 1;
}

/* ---- equal results: a naive layer in double, on a sample ------------------------------------ */
enum { SAMPLE_TOKENS = 6, SAMPLE_UNITS = 4 };
typedef struct reference {
    size_t n, token[SAMPLE_TOKENS];
    double *y, *dx, *dx_experts; /* (n, d); dx_experts: with the routing weights as constants, as peers see it */
    size_t n_units, expert[SAMPLE_UNITS], unit[SAMPLE_UNITS]; /* hidden units whose weight gradients are known: */
    double *dw1, *dwu, *dw2; /* (n_units, d): a column of dw1 and dwu, a row of dw2 */
    float *bits; /* (T, d): y of the first thread count and instruction set; all others give the same bits */
} reference;

static double *doubles(size_t n)
{
    double *v = (double *)bench_array(n, sizeof *v);
    memset(v, 0, n * sizeof *v);
    return v;
}

static void reference_free(reference *r)
{
    free(r->y), free(r->dx), free(r->dx_experts), free(r->dw1), free(r->dwu), free(r->dw2), free(r->bits);
}

static double silu(double v)
{
    return v / (1 + exp(-v));
}

static double silu_slope(double v)
{
    double s = 1 / (1 + exp(-v));
    return s * (1 + v * (1 - s));
}

/* One token through one expert: y += w out; dx += the gradient with w constant; returns dy . out. */
static double reference_expert(const model *m, size_t expert, double w, const float *x, const float *dy, double *y,
                               double *dx)
{
    size_t d = m->d, ff = m->ff;
    const float *w1 = m->w.w1 + expert * d * ff, *wu = m->w.wu + expert * d * ff, *w2 = m->w.w2 + expert * d * ff;
    double *g = doubles(2 * ff), *u = g + ff, d_weight = 0;
    for (size_t i = 0; i < d; i++) {
        for (size_t j = 0; j < ff; j++) {
            g[j] += (double)x[i] * (double)w1[i * ff + j];
            u[j] += (double)x[i] * (double)wu[i * ff + j];
        }
    }
    for (size_t j = 0; j < ff; j++) {
        double h = silu(g[j]) * u[j], dh = 0;
        for (size_t i = 0; i < d; i++) {
            y[i] += w * h * (double)w2[j * d + i];
            dh += (double)dy[i] * (double)w2[j * d + i];
        }
        d_weight += h * dh;
        dh *= w;
        u[j] *= dh * silu_slope(g[j]);
        g[j] = dh * silu(g[j]);
    }
    for (size_t i = 0; i < d; i++) { /* here u holds dg, and g holds du */
        for (size_t j = 0; j < ff; j++) {
            dx[i] += u[j] * (double)w1[i * ff + j] + g[j] * (double)wu[i * ff + j];
        }
    }
    free(g);
    return d_weight;
}

/* dx += through the router: the gate's softmax over all, or (top_k > 1: normalised) over the selected. */
static void reference_router(const problem *p, size_t token, const double *d_weight, double *dx)
{
    size_t E = p->s.E, k = p->s.k, d = p->s.d;
    const int32_t *index = p->index + token * k;
    const float *weight = p->weight + token * k, *x = p->x + token * d;
    double *dz = doubles(2 * E), *z = dz + E, mean = 0, top = 0, sum = 0;
    if (k > 1) {
        for (size_t j = 0; j < k; j++) mean += d_weight[j] * (double)weight[j];
        for (size_t j = 0; j < k; j++) dz[index[j]] = (double)weight[j] * (d_weight[j] - mean);
    } else {
        for (size_t e = 0; e < E; e++) {
            for (size_t i = 0; i < d; i++) z[e] += (double)x[i] * (double)p->m->router[i * E + e];
            if (z[e] > top) top = z[e];
        }
        for (size_t e = 0; e < E; e++) sum += exp(z[e] - top);
        for (size_t e = 0; e < E; e++) dz[e] = -(double)weight[0] * d_weight[0] * exp(z[e] - top) / sum;
        dz[index[0]] += (double)weight[0] * d_weight[0];
    }
    for (size_t i = 0; i < d; i++) {
        for (size_t e = 0; e < E; e++) dx[i] += dz[e] * (double)p->m->router[i * E + e];
    }
    free(dz);
}

/* Weight gradients of one hidden unit: all tokens of its expert, but only this unit. */
static void reference_unit(const problem *p, size_t expert, size_t unit, double *dw1, double *dwu, double *dw2)
{
    const model *m = p->m;
    size_t d = m->d, ff = m->ff, w = expert * d * ff;
    for (size_t r = p->begin[expert]; r < p->begin[expert + 1]; r++) {
        const float *x = p->x + p->token[r] * d, *dy = p->dy + p->token[r] * d;
        double g = 0, u = 0, dh = 0, weight = (double)p->route_weight[r];
        for (size_t i = 0; i < d; i++) {
            g += (double)x[i] * (double)m->w.w1[w + i * ff + unit];
            u += (double)x[i] * (double)m->w.wu[w + i * ff + unit];
            dh += (double)dy[i] * (double)m->w.w2[w + unit * d + i] * weight;
        }
        for (size_t i = 0; i < d; i++) {
            dw1[i] += (double)x[i] * dh * u * silu_slope(g);
            dwu[i] += (double)x[i] * dh * silu(g);
            dw2[i] += (double)dy[i] * weight * silu(g) * u;
        }
    }
}

/* Of the first call, with its routing. */
static reference reference_make(const problem *p)
{
    reference r;
    size_t d = p->s.d, k = p->s.k;
    memset(&r, 0, sizeof r);
    r.n = p->s.T < SAMPLE_TOKENS ? p->s.T : SAMPLE_TOKENS;
    r.y = doubles(r.n * d), r.dx = doubles(r.n * d), r.dx_experts = doubles(r.n * d);
    for (size_t s = 0; s < r.n; s++) {
        size_t t = r.token[s] = s * (p->s.T - 1) / (r.n > 1 ? r.n - 1 : 1);
        double *dx = r.dx_experts + s * d, *d_weight = doubles(k);
        for (size_t j = 0; j < k; j++) {
            d_weight[j] = reference_expert(p->m, (size_t)p->index[t * k + j], (double)p->weight[t * k + j],
                                           p->x + t * d, p->dy + t * d, r.y + s * d, dx);
        }
        memcpy(r.dx + s * d, dx, d * sizeof *dx);
        reference_router(p, t, d_weight, r.dx + s * d);
        free(d_weight);
    }
    if (!p->m->training) return r;
    r.n_units = SAMPLE_UNITS;
    r.dw1 = doubles(r.n_units * d), r.dwu = doubles(r.n_units * d), r.dw2 = doubles(r.n_units * d);
    for (size_t i = 0; i < r.n_units; i++) {
        r.expert[i] = (size_t)p->index[(p->s.T * k - 1) * i / (r.n_units - 1)]; /* one that has tokens */
        r.unit[i] = (p->s.ff - 1) * i / (r.n_units - 1);
        reference_unit(p, r.expert[i], r.unit[i], r.dw1 + i * d, r.dwu + i * d, r.dw2 + i * d);
    }
    return r;
}

/* n values `stride` apart against the truth, relative to its root mean square. */
static void check_values(const problem *p, const char *who, const char *what, size_t n, const float *v, size_t stride,
                         const double *truth)
{
    double size = 0, worst = 0;
    for (size_t i = 0; i < n; i++) size += truth[i] * truth[i];
    size = sqrt(size / (double)n);
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)v[i * stride] - truth[i]);
        if (!(error <= worst)) worst = error; /* NaN is worst */
    }
    if (!(worst <= 2e-4 * size)) {
        bench_die("%s: %s of %s is wrong: error %.3g, where values are about %.3g; nothing was timed", p->s.name, what,
                  who, worst, size);
    }
}

static void check_tokens(const problem *p, const reference *r, const char *who, const char *what, const float *v,
                         const double *truth)
{
    size_t d = p->s.d;
    for (size_t s = 0; s < r->n; s++) check_values(p, who, what, d, v + r->token[s] * d, 1, truth + s * d);
}

static void check_gradients(const problem *p, const reference *r, const char *who)
{
    size_t d = p->s.d, ff = p->s.ff;
    for (size_t i = 0; i < r->n_units; i++) {
        size_t w = r->expert[i] * d * ff, u = r->unit[i];
        check_values(p, who, "the gradient of w1", d, p->m->g.w1 + w + u, ff, r->dw1 + i * d);
        check_values(p, who, "the gradient of wu", d, p->m->g.wu + w + u, ff, r->dwu + i * d);
        check_values(p, who, "the gradient of w2", d, p->m->g.w2 + w + u * d, 1, r->dw2 + i * d);
    }
}

static void check_moe(problem *p, reference *r)
{
    size_t n = p->s.T * p->s.d;
    moe_layer *layer = p->m->layer[0];
    run_forward(p, 0, layer);
    check_tokens(p, r, "moe.h", "y", p->y, r->y);
    if (p->m->training) {
        bench_ok(moe_step(layer, 0.0f), "moe_step"); /* fresh gradients */
        bench_ok(moe_backward_tape(layer, p->tape, p->dy, p->dx), "moe_backward_tape");
        check_tokens(p, r, "moe.h", "dx", p->dx, r->dx);
        plain_get(p->m, 0, MOE_PART_GRADS, &p->m->g);
        check_gradients(p, r, "moe.h");
        if (!p->accumulate) bench_ok(moe_step(layer, 0.0f), "moe_step");
    }
    if (r->bits == NULL) {
        r->bits = bench_floats(n);
        memcpy(r->bits, p->y, n * sizeof(float));
    }
    if (memcmp(r->bits, p->y, n * sizeof(float)) != 0) {
        bench_die("%s: y has other bits than with another number of threads or instruction set", p->s.name);
    }
}

static void check_peer(peer_loop *l, const reference *r, const char *who)
{
    peer_forward(l, 0);
    check_tokens(l->p, r, who, "y", l->y, r->y);
    if (!l->p->m->training) return;
    peer_backward(l, 0, 0);
    check_tokens(l->p, r, who, "dx", l->dx, r->dx_experts);
    check_gradients(l->p, r, who);
}

/* ---- phases: the time of every task, by what it runs ---------------------------------------- */
/* matrices: products of T k rows by d ff */
typedef struct phase { const char *name; void (*body)(void); double matrices; } phase;
#define PHASE(name, body, matrices) {name, (void (*)(void))(body), matrices}
static const phase phases[] = {
    PHASE("pack, route", moe__pass_pack_and_route, 0), PHASE("gather", moe__experts_gather, 0),
    PHASE("up, activation", moe__experts_up, 2), PHASE("down", moe__experts_down, 1),
    PHASE("combine", moe__combine_mix, 0), PHASE("finite?", moe__pass_y_block, 0),
    PHASE("gather dy", moe__experts_gather_dy, 0), PHASE("down, activation back", moe__experts_down_back, 1),
    PHASE("weights back", moe__experts_weights_back, 0), PHASE("biases, unused", moe__experts_biases_back, 0),
    PHASE("gradient of w2", moe__experts_w2_back, 1), PHASE("gradient of w1, wu", moe__experts_w1_back, 2),
    PHASE("up back", moe__experts_x_back, 2), PHASE("combine back", moe__combine_mix_back, 0),
    PHASE("slots back", moe__pass_slots_back, 0), PHASE("gate back", moe__gate_weights_back, 0),
};
enum { N_PHASES = sizeof phases / sizeof phases[0], TRACE_WORKERS = 64 };
static int tracing;
static struct trace_worker { double start, seconds[N_PHASES]; char apart[64]; } traced[TRACE_WORKERS];

static void trace(void (*body)(void), size_t worker, int end)
{
    if (!tracing || worker >= TRACE_WORKERS) return;
    double now = bench_now();
    if (!end) traced[worker].start = now;
    for (size_t i = 0; i < N_PHASES && end; i++)
        if (phases[i].body == body) traced[worker].seconds[i] += now - traced[worker].start;
}

/* One line a phase: its share of the threads' time, and of the peak where it is a product. What is left is waiting, and
 * what one thread does alone: who goes where, and the products of the router's gradient. */
static void print_phases(const bench_options *o, const problem *p, double wall, double peak)
{
    const double products = 2 * (double)(p->s.T * p->s.k) * (double)(p->s.d * p->s.ff);
    static const struct { const char *name; size_t first, second; } kinds[] = {
        {"forward", 2, 3}, {"data gradient", 7, 12}, {"weight gradient", 10, 11},
    };
    double seconds[N_PHASES] = {0}, busy = 0;
    for (size_t i = 0; i < N_PHASES; i++)
        for (size_t w = 0; w < TRACE_WORKERS; w++) seconds[i] += traced[w].seconds[i];
    for (size_t i = 0; i < N_PHASES; i++) {
        busy += seconds[i];
        if (seconds[i] <= 0) continue;
        fprintf(o->human, "    %-22s %5.1f%% of the time", phases[i].name, 100 * seconds[i] / wall);
        if (phases[i].matrices > 0)
            fprintf(o->human, ", %5.1f%% of peak", 100 * phases[i].matrices * products / seconds[i] / peak);
        fputc('\n', o->human);
    }
    fprintf(o->human, "    %-22s %5.1f%%\n", "waiting, alone", 100 * (1 - busy / wall));
    for (size_t i = 0; i < (p->m->training ? 3u : 1u); i++)
        fprintf(o->human, "    the products of the %s: %.1f%% of peak\n", kinds[i].name,
                300 * products / (seconds[kinds[i].first] + seconds[kinds[i].second]) / peak);
}

static void measure_phases(const bench_options *o, problem *p)
{
    double wall = 0, peak = bench_peak();
    size_t runs = 0, repeats = p->repeats;
    memset(traced, 0, sizeof traced);
    tracing = 1;
    p->repeats = 1;
    while (runs < 3 || (wall < 0.5 && runs < 50)) wall += run_moe(p) * (double)p->n_calls, runs++;
    tracing = 0;
    p->repeats = repeats;
    for (size_t w = 0; w < TRACE_WORKERS; w++)
        for (size_t i = 0; i < N_PHASES; i++) traced[w].seconds[i] /= (double)(runs * p->n_calls);
    /* a share of the threads' time, of the peak of all threads */
    print_phases(o, p, wall / (double)(runs * p->n_calls) * (double)bench_threads, peak / (double)bench_threads);
}

/* ---- measure -------------------------------------------------------------------------------- */
static void choose_repeats(problem *p)
{
    p->repeats = 1;
    double seconds = run_moe(p) * (double)p->n_calls;
    if (seconds < 0.02) p->repeats = (size_t)(0.02 / seconds) + 1;
}

static void measure(const bench_options *o, problem *p, reference *r, peer_loop *loop, const peer_library *library,
                    size_t n_loops, torch *t)
{
    const layer_shape *s = &p->s;
    double passes = p->m->training ? 3 : 1, expert_bytes = 12.0 * (double)(s->d * s->ff), load = 0;
    bench_row row;
    bench_subject subject[1 + BENCH_MAX_PEERS] = {{"moe.h", run_moe, p}};
    size_t n = 1;
    memset(&row, 0, sizeof row);
    row.shape = s->name;
    row.pass = bench_pass_names[p->m->training];
    row.flops = passes * 6 * (double)(s->T * s->k) * (double)(s->d * s->ff);
    if (s->T <= 256) row.bytes = passes * expert_bytes * distinct_experts(p), row.writes = p->m->training;
    if (s->T == 1) {
        snprintf(row.note, sizeof row.note, "rotates over %.0f MB",
                 1e-6 * expert_bytes * (double)(s->E * p->m->n_layers));
    } else {
        for (size_t e = 0; e < s->E; e++) load = fmax(load, (double)(p->begin[e + 1] - p->begin[e]));
        snprintf(row.note, sizeof row.note, "load max/mean %.2f", load * (double)s->E / (double)(s->T * s->k));
    }
    make_tape(p);
    check_moe(p, r);
    for (size_t i = 0; i < n_loops; i++) {
        check_peer(&loop[i], r, library[i].name);
        subject[n++] = (bench_subject){library[i].name, run_peer, &loop[i]};
    }
    if (t->process.child) subject[n++] = (bench_subject){"pytorch", run_torch, t};
    choose_repeats(p);
    bench_measure(o, &row, subject, n);
    bench_print(o, &row);
    if (o->phases) measure_phases(o, p);
}

static void measure_shape(const bench_options *o, const layer_shape *s, model *m, const peer_library *library,
                          size_t n_loops)
{
    problem p;
    peer_loop loop[BENCH_MAX_PEERS];
    torch t = {0};
    problem_make(&p, s, m, o->accumulate);
    reference r = reference_make(&p);
    for (size_t i = 0; i < n_loops; i++) peer_loop_make(&loop[i], &p, &library[i]);
    if (bench_listed(o->peers, "pytorch") && torch_start(&t, &p)) {
        check_tokens(&p, &r, "pytorch", "y", t.y, r.y);
        if (m->training) check_tokens(&p, &r, "pytorch", "dx", t.dx, r.dx_experts);
    }
    for (int isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(o, (moe_isa_kind)isa)) continue;
        for (size_t i = 0; i < o->n_threads; i++) {
            if (bench_use_threads(o->threads[i])) measure(o, &p, &r, loop, library, n_loops, &t);
        }
    }
    for (size_t i = 0; i < n_loops; i++) peer_loop_free(&loop[i]);
    torch_stop(&t);
    reference_free(&r);
    problem_free(&p);
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES];
    peer_library library[BENCH_MAX_PEERS];
    model m = {0};
    for (size_t i = 0; i < N_SHAPES; i++) names[i] = shapes[i].name;
    bench_options o = bench_parse(argc, argv, "speed of a Mixture-of-Experts layer (SwiGLU, float32)", names, N_SHAPES,
                                  1, print_shapes);
    size_t n_loops = peer_load(&o, library);
    signal(SIGPIPE, SIG_IGN);
    bench_header(&o, n_loops + (size_t)bench_listed(o.peers, "pytorch"));
    for (int training = 0; training < 2; training++) {
        if (!bench_listed(o.pass, bench_pass_names[training])) continue;
        for (size_t i = 0; i < N_SHAPES; i++) {
            if (!bench_listed(o.shape, shapes[i].name)) continue;
            if (!model_fits(&m, &shapes[i], training)) {
                model_free(&m);
                model_make(&m, &shapes[i], training);
            }
            measure_shape(&o, &shapes[i], &m, library, n_loops);
        }
    }
    model_free(&m);
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}
