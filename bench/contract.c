/* What does the contract of the same bits cost? The library beside the fastest forward of SwiGLU experts that we can
 * write for the same shapes in any order of sums (bench/free.h), and beside free reductions: softmax, its gradient, a
 * sum of squares, means of columns. Both in turns in one process, with the same routing, which is not timed; ratio: the
 * library's time over the free way's, so that 1.00 is a contract for nothing. The median of the runs' ratios, and from
 * the least to the most. They must agree as floats do, or it ends with status 1.
 *
 * --peers: also the time of the three products alone, expert by expert in a library's sgemm, over the free way's: a
 * free way that is slower than products alone would say nothing about the contract. */
#include "peers.h"

typedef struct free_way {
    void (*pack)(size_t k, size_t n, const float *w, const float *other, float *panel);
    void (*expert)(size_t d, size_t ff, size_t n, const uint32_t *token, const float *weight, const float *x,
                   const float *up, const float *down, const float *after, float *room, float *y);
    void (*softmax)(size_t rows, size_t n, const float *x, float *y);
    void (*softmax_back)(size_t rows, size_t n, const float *p, const float *dy, float *dx);
    double (*squares)(size_t n, const float *x);
    void (*means)(size_t rows, size_t n, const float *x, double *mean);
} free_way;

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic push /* gcc bug 105593: its own intrinsics start from an undefined vector */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "free.h"
#define FREE_AVX512
#include "free.h"
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

static const free_way free_avx2 = {free256_pack,         free256_expert,  free256_softmax,
                                   free256_softmax_back, free256_squares, free256_means};
static const free_way free_avx512 = {free512_pack,         free512_expert,  free512_softmax,
                                     free512_softmax_back, free512_squares, free512_means};
static const free_way *active_way(void)
{
    if (moe_active_isa() == MOE_ISA_AVX512) return &free_avx512;
    return moe_active_isa() == MOE_ISA_AVX2 ? &free_avx2 : NULL;
}
#else
static const free_way *active_way(void) { return NULL; } /* it is written for AVX2 and AVX-512, with gcc or clang */
#endif

typedef struct contract_shape { const char *name; size_t T, d, ff, E, k; } contract_shape;
static const contract_shape shapes[] = {
    {"small", 4096, 256, 512, 16, 2},       {"mixtral", 4096, 1024, 2048, 8, 2},
    {"olmoe256", 256, 2048, 1024, 64, 8},   {"olmoe1", 1, 2048, 1024, 64, 8},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], N_REDUCTIONS = 6, MOST_WORKERS = 64 };
static const char *const reduction_names[N_REDUCTIONS] = {"softmax-64", "softmax-256", "softmax-gradient-64",
                                                          "softmax-gradient-2048", "sum-of-squares", "means-64"};

static void print_shapes(FILE *f)
{
    fputs("\nshape        T     d    ff   E  k\n", f);
    for (size_t i = 0; i < N_SHAPES; i++) {
        const contract_shape *s = &shapes[i];
        fprintf(f, "%-9s %4zu %5zu %5zu %3zu %2zu\n", s->name, s->T, s->d, s->ff, s->E, s->k);
    }
    fputs("and reductions, one thread, over 1 MB:", f);
    for (size_t i = 0; i < N_REDUCTIONS; i++) fprintf(f, " %s", reduction_names[i]);
    fputc('\n', f);
}

/* ---- experts: a problem in both layouts ---- */
typedef struct part { size_t call, expert, first, n; } part; /* of an expert's routes: what one task computes */
typedef struct problem {
    contract_shape s;
    const free_way *way;
    moe_desc desc;
    moe_tape *tape;
    float *params, *up, *down; /* panels: the library's, and ours by expert */
    float *x, *weight;         /* (T, d), (calls, T, k) */
    int32_t *index;            /* (calls, T, k) */
    size_t n_calls;            /* of one run; more than one where T = 1, so that weights are not in the caches */
    moe_routes *routes;        /* (calls) */
    void **routes_memory;
    part *parts;
    size_t n_parts, *parts_begin; /* (calls + 1) */
    float *y, *free_y;            /* (T, d) */
    float *worker_y[MOST_WORKERS], *room[MOST_WORKERS];
    size_t call;
} problem;

static size_t rows_of_a_part(const contract_shape *s)
{
    enum { CACHED = 512 << 10, MOST = 252 };
    size_t rows = CACHED / (s->d * sizeof(float));
    return rows > MOST ? MOST : rows;
}

/* k different experts a token, in a random order, weights that sum to 1; of one token those whose turn it is. */
static void make_routing(problem *p)
{
    size_t T = p->s.T, E = p->s.E, k = p->s.k;
    for (size_t i = 0; i < p->n_calls * T; i++) {
        int32_t *index = p->index + i * k;
        for (size_t j = 0; j < k; j++) {
            size_t again = 0;
            do {
                index[j] = (int32_t)(moe_rand_u32(7, i, j * 64 + again++) % E);
                for (size_t q = 0; q < j; q++)
                    if (index[q] == index[j]) { index[j] = -1; break; }
            } while (index[j] < 0 && again < 64);
            if (T == 1) index[j] = (int32_t)((i * k + j) % E);
            if (index[j] < 0) bench_die("no expert is left");
            p->weight[i * k + j] = (float)(j + 1) * 2.0f / (float)(k * (k + 1));
        }
    }
}

static void make_weights(problem *p)
{
    size_t d = p->s.d, ff = p->s.ff, n = d * ff, count;
    float *w = bench_floats(3 * n);
    bench_ok(moe_experts_count(&p->desc, &count), "moe_experts_count");
    p->params = bench_floats(count);
    p->up = bench_floats(2 * n * p->s.E), p->down = bench_floats(n * p->s.E);
    for (size_t e = 0; e < p->s.E; e++) {
        moe_expert_weights plain = {.w1 = w, .wu = w + n, .w2 = w + 2 * n};
        bench_ok(moe_rand_normal(5, e, 2 * n, 0, 1 / sqrtf((float)d), w), "moe_rand_normal");
        bench_ok(moe_rand_normal(6, e, n, 0, 1 / sqrtf((float)ff), w + 2 * n), "moe_rand_normal");
        bench_ok(moe_expert_pack(&p->desc, e, &plain, p->params), "moe_expert_pack");
        p->way->pack(d, ff, w, w + n, p->up + 2 * n * e);
        p->way->pack(ff, d, w + 2 * n, NULL, p->down + n * e);
    }
    free(w);
}

static void make_routes(problem *p)
{
    size_t bytes, most = rows_of_a_part(&p->s), pairs = p->s.T * p->s.k;
    p->routes = (moe_routes *)bench_array(p->n_calls, sizeof *p->routes);
    p->routes_memory = (void **)bench_array(p->n_calls, sizeof *p->routes_memory);
    p->parts = (part *)bench_array(p->n_calls * (pairs / most + p->s.E + 1), sizeof *p->parts);
    p->parts_begin = (size_t *)bench_array(p->n_calls + 1, sizeof *p->parts_begin);
    bench_ok(moe_routes_size(p->s.T, p->s.E, p->s.k, &bytes), "moe_routes_size");
    for (size_t c = 0; c < p->n_calls; c++) {
        moe_routes *r = &p->routes[c];
        p->routes_memory[c] = bench_array(bytes, 1);
        bench_ok(moe_routes_init(r, p->s.T, p->s.E, p->s.k, p->routes_memory[c], bytes), "moe_routes_init");
        bench_ok(moe_routes_fill(r, p->s.T, p->index + c * pairs, p->weight + c * pairs, 0, MOE_ORDER_DEFAULT),
                 "moe_routes_fill");
        p->parts_begin[c] = p->n_parts;
        for (size_t e = 0; e < p->s.E; e++) {
            size_t n = r->begin[e + 1] - r->begin[e], pieces = (n + most - 1) / most;
            for (size_t i = 0; i < pieces; i++) {
                size_t first = i * n / pieces;
                p->parts[p->n_parts++] = (part){c, e, r->begin[e] + first, (i + 1) * n / pieces - first};
            }
        }
    }
    p->parts_begin[p->n_calls] = p->n_parts;
}

static void problem_make(problem *p, const contract_shape *s)
{
    size_t floats = s->T * s->d, most = rows_of_a_part(s);
    memset(p, 0, sizeof *p);
    p->s = *s;
    p->way = active_way();
    p->n_calls = s->T == 1 ? s->E / s->k : 1;
    p->desc.d_model = s->d, p->desc.d_ff = s->ff, p->desc.n_experts = s->E, p->desc.top_k = s->k;
    p->desc.expert = MOE_EXPERT_SWIGLU;
    p->desc.training = MOE_OFF;
    p->x = bench_floats(floats), p->y = bench_floats(floats), p->free_y = bench_floats(floats);
    p->index = (int32_t *)bench_array(p->n_calls * s->T * s->k, sizeof *p->index);
    p->weight = bench_floats(p->n_calls * s->T * s->k);
    bench_ok(moe_rand_normal(2, 0, floats, 0, 1, p->x), "moe_rand_normal");
    make_routing(p);
    make_weights(p);
    make_routes(p);
    for (size_t i = 0; i < bench_threads; i++) {
        p->worker_y[i] = i ? bench_floats(floats) : p->free_y;
        p->room[i] = bench_floats(most * (s->d + s->ff));
    }
    bench_ok(moe_tape_new(&p->tape, &p->desc, s->T, MOE_OFF), "moe_tape_new");
    bench_ok(moe_tape_tokens(p->tape, p->x, s->T), "moe_tape_tokens");
}

static void problem_free(problem *p)
{
    for (size_t i = 0; i < bench_threads; i++) {
        if (i) free(p->worker_y[i]);
        free(p->room[i]);
    }
    for (size_t c = 0; c < p->n_calls; c++) free(p->routes_memory[c]);
    moe_tape_free(p->tape);
    free(p->params), free(p->up), free(p->down), free(p->x), free(p->weight), free(p->index);
    free(p->routes), free(p->routes_memory), free(p->parts), free(p->parts_begin), free(p->y), free(p->free_y);
}

static double run_library(problem *p, size_t call)
{
    size_t pairs = p->s.T * p->s.k;
    bench_ok(moe_routes_fill(&p->tape->routes, p->s.T, p->index + call * pairs, p->weight + call * pairs, 0,
                             MOE_ORDER_DEFAULT), "moe_routes_fill");
    double start = bench_now();
    bench_ok(moe_experts_forward(p->tape, p->params, p->y), "moe_experts_forward");
    return bench_now() - start;
}

static void free_task(void *arg, size_t i, size_t worker)
{
    problem *p = (problem *)arg;
    const part *q = &p->parts[p->parts_begin[p->call] + i], *last = p->parts + p->parts_begin[p->call + 1] - 1;
    const moe_routes *r = &p->routes[p->call];
    size_t n = p->s.d * p->s.ff, after = q < last ? q[1].expert : q->expert;
    p->way->expert(p->s.d, p->s.ff, q->n, r->token + q->first, r->weight + q->first, p->x, p->up + 2 * n * q->expert,
                   p->down + n * q->expert, p->up + 2 * n * after, p->room[worker], p->worker_y[worker]);
}
static void free_sum_task(void *arg, size_t i, size_t worker)
{
    problem *p = (problem *)arg;
    size_t d = p->s.d, begin = i * p->s.T / bench_threads * d, end = (i + 1) * p->s.T / bench_threads * d;
    (void)worker;
    for (size_t w = 1; w < bench_threads; w++) {
        float *to = p->free_y, *from = p->worker_y[w];
        BENCH_SIMD
        for (size_t j = begin; j < end; j++) to[j] += from[j];
    }
}
static void free_clear_task(void *arg, size_t i, size_t worker)
{
    problem *p = (problem *)arg;
    (void)worker;
    memset(p->worker_y[i], 0, p->s.T * p->s.d * sizeof(float));
}
static double run_free(problem *p, size_t call)
{
    p->call = call;
    double start = bench_now();
    moe_run(NULL, bench_threads, free_clear_task, p);
    moe_run(NULL, p->parts_begin[call + 1] - p->parts_begin[call], free_task, p);
    if (bench_threads > 1) moe_run(NULL, bench_threads, free_sum_task, p);
    return bench_now() - start;
}

/* The three products of each expert alone, as a library has them. */
static double run_products(problem *p, const peer_library *library, size_t call)
{
    size_t d = p->s.d, ff = p->s.ff, most = 1;
    const moe_routes *r = &p->routes[call];
    for (size_t e = 0; e < p->s.E; e++)
        if (r->begin[e + 1] - r->begin[e] > most) most = r->begin[e + 1] - r->begin[e];
    float *a = bench_floats(most * d), *h = bench_floats(most * ff), *g = bench_floats(most * ff);
    memset(a, 0, most * d * sizeof *a);
    double start = bench_now();
    for (size_t e = 0; e < p->s.E; e++) {
        size_t n = r->begin[e + 1] - r->begin[e], at = e * d * ff;
        if (!n) continue;
        library->gemm(0, 0, n, ff, d, a, d, p->up + 2 * at, ff, 0, h, ff);
        library->gemm(0, 0, n, ff, d, a, d, p->up + 2 * at + d * ff, ff, 0, g, ff);
        library->gemm(0, 0, n, d, ff, h, ff, p->down + at, d, 0, a, d);
    }
    double seconds = bench_now() - start;
    free(a), free(h), free(g);
    return seconds;
}

/* ---- what is common ---- */
typedef struct ratios { double ratio[BENCH_MAX_RUNS], ours[BENCH_MAX_RUNS], other[BENCH_MAX_RUNS]; } ratios;

static void print_ratios(const bench_options *o, const char *name, ratios *r, size_t runs, const char *note)
{
    double median = bench_median(r->ratio, runs); /* sorts */
    double ours = bench_median(r->ours, runs) * 1e3, other = bench_median(r->other, runs) * 1e3;
    const char *isa = moe_isa_name(moe_active_isa());
    double least = r->ratio[0], most = r->ratio[runs - 1];
    fprintf(o->human, "%-22s %-6s %3zu %10.4g %10.4g   %5.3f  %5.3f to %5.3f%s\n", name, isa, bench_threads, ours,
            other, median, least, most, note);
    if (o->json) {
        printf("{\"shape\":\"%s\",\"isa\":\"%s\",\"threads\":%zu,\"ms\":%.6g,\"free_ms\":%.6g,\"ratio\":%.4g,"
               "\"least\":%.4g,\"most\":%.4g}\n", name, isa, bench_threads, ours, other, median, least, most);
    }
    if (o->csv) {
        fprintf(o->csv, "%s,%s,%zu,%.6g,%.6g,%.4g,%.4g,%.4g\n", name, isa, bench_threads, ours, other, median, least,
                most);
    }
    fflush(stdout), fflush(o->human);
}

/* Do n floats agree but for the rounding of sums: differences below `share` of the largest magnitude? */
static void must_agree(const char *what, size_t n, const float *a, const float *b, double share)
{
    double size = 0, worst = 0;
    for (size_t i = 0; i < n; i++) {
        double apart = fabs((double)a[i] - (double)b[i]);
        if (!(apart <= worst)) worst = apart; /* NaN too */
        if (fabs((double)b[i]) > size) size = fabs((double)b[i]);
    }
    if (!(worst <= share * size)) bench_die("%s: the two ways differ by %g of %g", what, worst, size);
}

static void bench_shape(const bench_options *o, const contract_shape *s, const peer_library *peer, size_t n_peers)
{
    enum { LEAST_MS = 30 };
    static ratios r;
    problem p;
    char note[96] = "";
    double products[BENCH_MAX_RUNS], first = 0;
    size_t runs = o->runs ? o->runs : 9, repeats = 1, used = 0;
    problem_make(&p, s);
    for (size_t c = 0; c < p.n_calls; c++) { /* a warm-up of both */
        first += run_library(&p, c);
        run_free(&p, c);
        must_agree(s->name, s->T * s->d, p.y, p.free_y, 2e-5);
    }
    if (first * 1e3 < LEAST_MS) repeats = (size_t)(LEAST_MS / (first * 1e3)) + 1;
    for (size_t i = 0; i < runs; i++) {
        double ours = 0, other = 0;
        for (size_t c = 0; c < repeats * p.n_calls; c++) ours += run_library(&p, c % p.n_calls);
        for (size_t c = 0; c < repeats * p.n_calls; c++) other += run_free(&p, c % p.n_calls);
        r.ours[i] = ours / (double)(repeats * p.n_calls), r.other[i] = other / (double)(repeats * p.n_calls);
        r.ratio[i] = ours / other;
    }
    double other = bench_median(r.other, runs);
    for (size_t q = 0; q < n_peers; q++) {
        for (size_t i = 0; i < runs; i++) {
            products[i] = 0;
            for (size_t c = 0; c < p.n_calls; c++) products[i] += run_products(&p, &peer[q], c) / (double)p.n_calls;
        }
        used += (size_t)snprintf(note + used, sizeof note - used, "   %s %.2f", peer[q].name,
                                 bench_median(products, runs) / other);
    }
    print_ratios(o, s->name, &r, runs, note);
    problem_free(&p);
}

/* ---- reductions ---- */
enum { FLOATS = 1 << 18 };
typedef struct reduction {
    float *x, *p, *a, *b;
    double mean_a[64], mean_b[64], sum_a, sum_b;
    const free_way *way;
} reduction;

/* Reduction `which` once over FLOATS floats, the library's way or the free one. */
static void reduce(reduction *r, size_t which, int freely)
{
    static const size_t width[N_REDUCTIONS] = {64, 256, 64, 2048, FLOATS, 64};
    size_t n = width[which], rows = FLOATS / n;
    if (which < 2) {
        if (freely) r->way->softmax(rows, n, r->x, r->b);
        else bench_ok(moe_softmax(rows, n, 1.0f, r->x, r->a), "moe_softmax");
    } else if (which < 4) {
        if (freely) r->way->softmax_back(rows, n, r->p, r->x, r->b);
        else bench_ok(moe_softmax_backward(rows, n, 1.0f, r->p, r->x, r->a), "moe_softmax_backward");
    } else if (which == 4) {
        if (freely) r->sum_b = r->way->squares(n, r->x);
        else r->sum_a = moe_sum_squares(NULL, n, r->x);
    } else {
        if (freely) r->way->means(rows, n, r->p, r->mean_b);
        else bench_ok(moe_mean_scores(rows, n, r->p, r->mean_a), "moe_mean_scores");
    }
}

static void reductions_agree(reduction *r, size_t which)
{
    const char *name = reduction_names[which];
    memset(r->a, 0, FLOATS * sizeof(float)), memset(r->b, 0, FLOATS * sizeof(float));
    reduce(r, which, 0);
    reduce(r, which, 1);
    if (which < 4) must_agree(name, FLOATS, r->a, r->b, 1e-5);
    if (which == 4 && !(fabs(r->sum_a - r->sum_b) <= 1e-12 * r->sum_a)) bench_die("%s: the two ways differ", name);
    for (size_t i = 0; which == 5 && i < 64; i++)
        if (!(fabs(r->mean_a[i] - r->mean_b[i]) <= 1e-12)) bench_die("%s: the two ways differ", name);
}

static void bench_reductions(const bench_options *o)
{
    enum { REPEATS = 40 };
    static ratios times;
    static reduction r;
    size_t runs = o->runs ? o->runs : 15;
    r.x = bench_floats(FLOATS), r.p = bench_floats(FLOATS), r.a = bench_floats(FLOATS), r.b = bench_floats(FLOATS);
    r.way = active_way();
    bench_use_threads(1);
    bench_ok(moe_rand_normal(8, 0, FLOATS, 0, 1, r.x), "moe_rand_normal");
    for (size_t which = 0; which < N_REDUCTIONS; which++) {
        if (!bench_listed(o->shape, reduction_names[which])) continue;
        bench_ok(moe_softmax(FLOATS / 64, 64, 1.0f, r.x, r.p), "moe_softmax");
        reductions_agree(&r, which);
        for (size_t i = 0; i < runs; i++) {
            for (int freely = 0; freely < 2; freely++) {
                double start = bench_now();
                for (int j = 0; j < REPEATS; j++) reduce(&r, which, freely);
                double *seconds = freely ? &times.other[i] : &times.ours[i];
                *seconds = (bench_now() - start) / REPEATS;
            }
            times.ratio[i] = times.ours[i] / times.other[i];
        }
        print_ratios(o, reduction_names[which], &times, runs, "");
    }
    free(r.x), free(r.p), free(r.a), free(r.b);
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES + N_REDUCTIONS];
    peer_library peer[BENCH_MAX_PEERS];
    for (size_t i = 0; i < N_SHAPES; i++) names[i] = shapes[i].name;
    for (size_t i = 0; i < N_REDUCTIONS; i++) names[N_SHAPES + i] = reduction_names[i];
    bench_options o =
        bench_parse(argc, argv, "what the same bits cost", names, N_SHAPES + N_REDUCTIONS, 0, print_shapes);
    size_t n_peers = peer_load(&o, peer);
    fprintf(o.human, "shape                  isa    thr         ms    free ms   ratio  least to most%s\n",
            n_peers ? "   products alone / free" : "");
    if (o.csv) fprintf(o.csv, "shape,isa,threads,ms,free_ms,ratio,least,most\n");
    for (int isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(&o, (moe_isa_kind)isa)) continue;
        if (!active_way()) {
            fprintf(stderr, "bench: skipped: no free way for %s\n", moe_isa_name(moe_active_isa()));
            continue;
        }
        for (size_t i = 0; i < N_SHAPES; i++) {
            if (!bench_listed(o.shape, shapes[i].name)) continue;
            for (size_t t = 0; t < o.n_threads; t++)
                if (o.threads[t] <= MOST_WORKERS && bench_use_threads(o.threads[t]))
                    bench_shape(&o, &shapes[i], peer, n_peers);
        }
        bench_reductions(&o);
    }
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}
