/* What does routing cost?
 *
 * topk: moe_topk alone, on rows of E scores, 4096 of them (in cache) and 64 MB of them: bytes of scores read a second,
 * the share of the read bandwidth of the same thread (a plain sum), and how many times longer two naive ways take:
 * insertion into the k best so far, and a partial sort of every row (quickselect, then qsort of the k best).
 *
 * layer: from tokens to routes (moe_route) as a share of the layer's whole forward, E = 64, k = 8, d = 2048, d_ff =
 * 1024, and where the time of routing goes: the softmax, the selection, moe_routes_fill, and the rest, which is the
 * scores' product. */
#include "common.h"

static const char *const shapes[] = {"topk", "layer"};
enum { N_SHAPES = 2 };
static size_t n_tokens = 4096;

static void print_shapes(FILE *f)
{
    fputs("  --tokens N       tokens of the layer (default 4096)\n\n"
          "shape\n"
          "topk         moe_topk for E in 8 16 64 128 256 and k in 1 2 8: one thread\n"
          "layer        moe_route and moe_forward_tape, E 64, k 8, d 2048, d_ff 1024\n", f);
}

/* ---- the selection alone ---- */
typedef struct selection {
    size_t rows, cols, k, repeats;
    const float *scores;
    int32_t *index;
    float *value;
    int (*row)(size_t n, size_t k, const float *s, int32_t *index); /* NULL: moe_topk */
} selection;

static int insertion_row(size_t n, size_t k, const float *s, int32_t *index)
{
    size_t have = 0;
    for (size_t e = 0; e < n; e++) {
        if (have == k && !(s[e] > s[index[k - 1]])) continue;
        size_t i = have < k ? have++ : k - 1;
        for (; i > 0 && s[e] > s[index[i - 1]]; i--) index[i] = index[i - 1];
        index[i] = (int32_t)e;
    }
    return 1;
}

typedef struct pair { float score; int32_t index; } pair;
static int before(const pair *a, const pair *b)
{
    return a->score > b->score || (a->score == b->score && a->index < b->index);
}
static int compare_pairs(const void *a, const void *b)
{
    return before((const pair *)b, (const pair *)a) - before((const pair *)a, (const pair *)b);
}
/* nth_element, then sort */
static int sort_row(size_t n, size_t k, const float *s, int32_t *index)
{
    pair p[256];
    for (size_t e = 0; e < n; e++) p[e] = (pair){s[e], (int32_t)e};
    for (size_t lo = 0, hi = n; hi - lo > 1 && k < n;) { /* p[k - 1] and what goes before it come to the front */
        pair pivot = p[lo + (hi - lo - 1) / 2];
        size_t i = lo, j = hi - 1;
        for (;;) {
            while (before(&p[i], &pivot)) i++;
            while (before(&pivot, &p[j])) j--;
            if (i >= j) break;
            pair t = p[i];
            p[i++] = p[j];
            p[j--] = t;
        }
        if (k - 1 <= j) hi = j + 1;
        else lo = j + 1;
    }
    qsort(p, k, sizeof *p, compare_pairs);
    for (size_t i = 0; i < k; i++) index[i] = p[i].index;
    return 1;
}

static double run_selection(void *self)
{
    const selection *p = (const selection *)self;
    double start = bench_now();
    for (size_t i = 0; i < p->repeats; i++) {
        if (p->row == NULL) {
            bench_ok(moe_topk(p->rows, p->cols, p->k, p->scores, p->index, p->value), "moe_topk");
            continue;
        }
        for (size_t r = 0; r < p->rows; r++) p->row(p->cols, p->k, p->scores + r * p->cols, p->index + r * p->k);
    }
    return (bench_now() - start) / (double)p->repeats / (double)p->rows; /* of one row */
}

static void repeat_for(selection *p)
{
    p->repeats = 1;
    double seconds = run_selection(p) * (double)p->rows;
    p->repeats = seconds >= 0.01 ? 1 : (size_t)(0.01 / seconds) + 1;
}

static void measure_topk(const bench_options *o, const float *scores, size_t cols, size_t k, size_t rows, int in_cache)
{
    enum { MAX_NAIVE = 16384 };
    size_t runs = o->runs ? o->runs : 7;
    double ours[BENCH_MAX_RUNS], insertion[BENCH_MAX_RUNS], sort[BENCH_MAX_RUNS], share[BENCH_MAX_RUNS];
    selection p = {rows, cols, k, 1, scores, NULL, NULL, NULL};
    p.index = (int32_t *)bench_array(rows * k, sizeof *p.index);
    p.value = bench_floats(rows * k);
    selection naive = p;
    naive.rows = rows < MAX_NAIVE ? rows : MAX_NAIVE;
    naive.index = (int32_t *)bench_array(naive.rows * k, sizeof *naive.index);
    repeat_for(&p);
    for (int which = 0; which < 2; which++) { /* all three agree */
        naive.row = which ? sort_row : insertion_row;
        repeat_for(&naive);
        if (memcmp(naive.index, p.index, naive.rows * k * sizeof *p.index) != 0)
            bench_die("E %zu k %zu: two ways differ", cols, k);
    }
    for (size_t i = 0; i < runs; i++) {
        double bandwidth = bench_read();
        ours[i] = run_selection(&p);
        double after = bench_read();
        if (after > bandwidth) bandwidth = after;
        share[i] = (double)(cols * sizeof(float)) / ours[i] / bandwidth;
        naive.row = insertion_row, insertion[i] = run_selection(&naive);
        naive.row = sort_row, sort[i] = run_selection(&naive);
    }
    double row = bench_median(ours, runs), gbytes = (double)(cols * sizeof(float)) / row * 1e-9;
    double by_insertion = bench_median(insertion, runs) / row, by_sort = bench_median(sort, runs) / row;
    double read_share = bench_median(share, runs);
    const char *where = in_cache ? "cache" : "memory", *isa = moe_isa_name(moe_active_isa());
    fprintf(o->human, "topk   %-6s %4zu %2zu %9zu %-6s %8.2f %7.2f %6.1f%% %9.1fx %9.1fx\n", isa, cols, k, rows, where,
            row * 1e9, gbytes, 100 * read_share, by_insertion, by_sort);
    if (o->json) {
        printf("{\"shape\":\"topk\",\"isa\":\"%s\",\"experts\":%zu,\"k\":%zu,\"tokens\":%zu,\"where\":\"%s\",\"ns_a_"
               "row\":%.5g,"
               "\"gbytes_per_s\":%.5g,\"read_share\":%.4g,\"insertion_ratio\":%.4g,\"sort_ratio\":%.4g}\n",
               isa, cols, k, rows, where, row * 1e9, gbytes, read_share, by_insertion, by_sort);
    }
    if (o->csv) {
        fprintf(o->csv, "topk,%s,1,%zu,%zu,%zu,%s,%.6g,%.5g,%.4g,%.4g,%.4g,%.4g\n", isa, cols, k, rows, where,
                row * (double)rows * 1e3, gbytes, read_share, by_insertion, by_sort, 0.0);
    }
    fflush(stdout), fflush(o->human);
    free(p.index), free(p.value), free(naive.index);
}

static void bench_topk(const bench_options *o)
{
    static const size_t experts[] = {8, 16, 64, 128, 256}, ks[] = {1, 2, 8};
    const size_t floats = (size_t)64 << 18;
    float *scores = bench_floats(floats);
    bench_ok(moe_rand_uniform(1, 0, floats, -1, 1, scores), "moe_rand_uniform");
    bench_use_threads(1);
    fprintf(o->human, "shape  isa       E  k      rows scores   ns/row    GB/s   read  insertion      sort\n");
    for (size_t e = 0; e < 5; e++)
        for (size_t k = 0; k < 3; k++)
            for (int big = 0; big < 2; big++)
                measure_topk(o, scores, experts[e], ks[k], big ? floats / experts[e] : 4096, !big);
    free(scores);
}

/* ---- routing in the layer ---- */
typedef struct stage { const char *name; double seconds[BENCH_MAX_RUNS], median; } stage;
enum { FORWARD, ROUTE, SOFTMAX, SELECT, FILL, N_STAGES };

static void bench_layer_share(const bench_options *o, size_t threads)
{
    stage s[N_STAGES] = {
        {"forward", {0}, 0}, {"route", {0}, 0}, {"softmax", {0}, 0}, {"topk", {0}, 0}, {"routes_fill", {0}, 0}};
    size_t runs = o->runs ? o->runs : 5, bytes;
    moe_desc d;
    moe_layer *layer;
    moe_tape *tape;
    moe_routes routes;
    memset(&d, 0, sizeof d);
    d.d_model = 2048, d.d_ff = 1024, d.n_experts = 64, d.top_k = 8, d.training = MOE_OFF;
    d.parallel.n_threads = threads;
    bench_ok(moe_desc_resolve(&d, &d), "moe_desc_resolve");
    bench_ok(moe_layer_new(&layer, &d), "moe_layer_new");
    bench_ok(moe_tape_new(&tape, &d, n_tokens, MOE_OFF), "moe_tape_new");
    bench_ok(moe_routes_size(n_tokens, d.n_experts, d.top_k, &bytes), "moe_routes_size");
    void *memory = bench_array(bytes, 1);
    bench_ok(moe_routes_init(&routes, n_tokens, d.n_experts, d.top_k, memory, bytes), "moe_routes_init");
    size_t floats = n_tokens * d.d_model, pairs = n_tokens * d.top_k;
    float *x = bench_floats(floats), *y = bench_floats(floats), *router = bench_floats(d.d_model * d.n_experts);
    float *prob = bench_floats(n_tokens * d.n_experts);
    int32_t *index = (int32_t *)bench_array(pairs, sizeof *index);
    bench_ok(moe_rand_normal(2, 0, floats, 0, 1, x), "moe_rand_normal");
    bench_ok(moe_layer_get(layer, MOE_PART_PARAMS, "router", router, d.d_model * d.n_experts), "moe_layer_get");
    for (size_t i = 0; i <= runs; i++) { /* the first is a warm-up */
        double t[N_STAGES + 1];
        t[0] = bench_now();
        bench_ok(moe_forward_tape(layer, tape, x, n_tokens, y), "moe_forward_tape");
        t[1] = bench_now();
        bench_ok(moe_route(tape, router, x, n_tokens), "moe_route");
        t[2] = bench_now();
        bench_ok(moe_softmax(n_tokens, d.n_experts, d.temperature, tape->logits, prob), "moe_softmax");
        t[3] = bench_now();
        bench_ok(moe_topk(n_tokens, d.n_experts, d.top_k, prob, index, NULL), "moe_topk");
        t[4] = bench_now();
        bench_ok(moe_routes_fill(&routes, n_tokens, index, tape->weight, 0, MOE_ORDER_DEFAULT), "moe_routes_fill");
        t[5] = bench_now();
        if (memcmp(index, tape->index, pairs * sizeof *index) != 0)
            bench_die("the parts do not select what the whole does");
        for (int j = 0; j < N_STAGES && i > 0; j++) s[j].seconds[i - 1] = t[j + 1] - t[j];
    }
    for (int j = 0; j < N_STAGES; j++) s[j].median = bench_median(s[j].seconds, runs);
    for (int j = 0; j < N_STAGES; j++) {
        double share = s[j].median / s[FORWARD].median;
        const char *isa = moe_isa_name(moe_active_isa());
        fprintf(o->human, "layer  %-6s %3zu %8zu %-12s %10.3f %7.2f%% %7.2f%%%s\n", isa, threads, n_tokens, s[j].name,
                s[j].median * 1e3, 100 * share, 100 * s[j].median / s[ROUTE].median,
                j == ROUTE                 ? share < 0.06 ? "   under 6%" : "   OVER 6%"
                : j > ROUTE && threads > 1 ? "   alone, one thread"
                                           : "");
        if (o->json) {
            printf("{\"shape\":\"layer\",\"isa\":\"%s\",\"threads\":%zu,\"tokens\":%zu,\"stage\":\"%s\",\"ms\":%.6g,"
                   "\"forward_share\":%.4g}\n", isa, threads, n_tokens, s[j].name, s[j].median * 1e3, share);
        }
        if (o->csv) {
            fprintf(o->csv, "layer-%s,%s,%zu,64,8,%zu,,%.6g,,,,,%.4g\n", s[j].name, isa, threads, n_tokens,
                    s[j].median * 1e3, share);
        }
    }
    fflush(stdout), fflush(o->human);
    moe_tape_free(tape);
    moe_layer_free(layer);
    free(memory), free(x), free(y), free(router), free(prob), free(index);
}

int main(int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i++) { /* the one option of our own */
        const char *end;
        if (strcmp(argv[i], "--tokens") != 0) continue;
        n_tokens = bench_number("--tokens", argv[i + 1], 1, 1 << 20, &end);
        if (*end != '\0') bench_die("--tokens: '%s' is not a number", argv[i + 1]);
        for (int j = i; j + 2 <= argc; j++) argv[j] = argv[j + 2];
        argc -= 2;
        break;
    }
    bench_options o = bench_parse(argc, argv, "the cost of routing, float32", shapes, N_SHAPES, 0, print_shapes);
    if (o.csv) {
        fprintf(o.csv,
                "shape,isa,threads,experts,k,tokens,scores,ms,gbytes_per_s,read_share,insertion_ratio,sort_ratio,"
                "forward_share\n");
    }
    for (int isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(&o, (moe_isa_kind)isa)) continue;
        if (bench_listed(o.shape, "topk")) bench_topk(&o);
        if (!bench_listed(o.shape, "layer")) continue;
        fprintf(o.human, "shape  isa    thr   tokens stage                ms  forward    route\n");
        for (size_t i = 0; i < o.n_threads; i++)
            if (bench_use_threads(o.threads[i])) bench_layer_share(&o, o.threads[i]);
    }
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}
