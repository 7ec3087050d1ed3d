/* What would experts on thousands of ranks do? Plans of moe_ep_plan, standard and LLEP, for up to 4,096 ranks and
 * 65,536 experts: makespan, tokens and weights that move, planning time; and what nodes of three kinds would make of
 * them. The loads are synthetic, or drawn from real routing: an index array (layers, tokens, k) as build/llm --dump
 * writes it.
 *
 *     build/bench_scale [--experts FILE.experts.npy] [--tokens N] [--quick]
 *
 * A load from real routing is the quantile function of its experts' shares, all layers together, read at E places and
 * given to experts in random order [D]; every load has the noise of counting. Loads, plans and nodes are simulated;
 * planning is measured. */
#include "common.h"

enum { TOP_K = 8, TIMES = 5, MOST_SHARES = 1 << 20 };
typedef struct shares { size_t n; double *share; } shares; /* ascending; mean 1 */
typedef struct place { size_t experts, ranks; } place;
typedef enum load_kind { UNIFORM, ZIPF, REAL, ONE, LOADS } load_kind;
static const char *const load_name[LOADS] = {"uniform", "zipf", "real", "95% on one"};

/* A node: what one rank has. An expert as DeepSeek-V3's: d 7168, f 2048, three matrices, a byte a weight; a token goes
 * there in a byte a number and comes back in two. */
typedef struct node { const char *name; double flops, memory, network; } node;
static const node nodes[] = {
    {"CPU server, 25 GbE", 2e12, 256e9, 3e9},
    {"accelerator, 400 Gb/s", 4e14, 80e9, 50e9},
    {"accelerator, in one rack", 4e14, 80e9, 450e9},
};
enum { NODES = sizeof nodes / sizeof *nodes };
static const double expert_bytes = 3.0 * 7168 * 2048, token_flops = 6.0 * 7168 * 2048, token_bytes = 3.0 * 7168;

/* -- loads -- */
static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static shares read_shares(const char *path) {
    shares s = {0, NULL};
    moe_npy npy;
    FILE *f = fopen(path, "rb");
    size_t most = (size_t)1 << 28, size;
    if (!f) bench_die("cannot read %s\n", path);
    unsigned char *bytes = (unsigned char *)bench_array(most, 1);
    size = fread(bytes, 1, most, f);
    fclose(f);
    bench_ok(moe_npy_open(&npy, bytes, size), path);
    if (npy.n_dims != 3) bench_die("%s: not an array (layers, tokens, k)\n", path);
    int32_t *index = (int32_t *)bench_array(npy.count, sizeof *index);
    bench_ok(moe_to_index(npy.dtype, npy.count, npy.elements, index, NULL), path);
    size_t layers = npy.dim[0], each = npy.count / (layers + !layers), experts = 0;
    for (size_t i = 0; i < npy.count; i++)
        if (index[i] >= 0 && (size_t)index[i] >= experts) experts = (size_t)index[i] + 1;
    s.n = layers * experts;
    if (!s.n || s.n > MOST_SHARES) bench_die("%s: no choices, or too many experts\n", path);
    s.share = (double *)bench_array(s.n, sizeof(double));
    memset(s.share, 0, s.n * sizeof(double));
    for (size_t i = 0; i < npy.count; i++)
        if (index[i] >= 0) s.share[i / each * experts + (size_t)index[i]] += (double)experts / (double)each;
    qsort(s.share, s.n, sizeof(double), ascending);
    free(bytes);
    free(index);
    return s;
}
/* Of place i of E, by the kind; what they sum to does not matter. */
static double share_of(load_kind kind, const shares *real, size_t i, size_t E) {
    if (kind == ZIPF) return 1.0 / (double)(i + 1);
    if (kind == ONE) return i ? 0.05 / (double)(E - 1) : 0.95;
    if (kind == REAL) return real->share[(size_t)(((double)i + 0.5) / (double)E * (double)real->n)];
    return 1.0;
}
static void make_load(load_kind kind, const shares *real, size_t E, double routes, uint64_t *load) {
    float *noise = bench_floats(2 * E);
    double sum = 0;
    moe_rand_normal(1, (uint64_t)kind, E, 0, 1, noise);
    for (size_t i = 0; i < E; i++) sum += share_of(kind, real, i, E);
    for (size_t i = 0; i < E; i++) { /* counting's noise: of a Poisson's deviation */
        double mean = routes * share_of(kind, real, i, E) / sum, with = mean + sqrt(mean) * (double)noise[i];
        load[i] = with > 0 ? (uint64_t)(with + 0.5) : 0;
    }
    for (size_t i = E; i > 1; i--) { /* in random order */
        size_t other = moe_rand_u32(2, (uint64_t)kind, i) % i;
        uint64_t held = load[i - 1];
        load[i - 1] = load[other], load[other] = held;
    }
    free(noise);
}

/* -- plans -- */
typedef struct outcome {
    moe_ep plan;
    double seconds;                   /* to plan */
    double received, sent;            /* most weights that a rank gets and gives */
    size_t bytes;                     /* of the plan's memory */
    void *memory;
} outcome;
static outcome make_plan(place at, const uint64_t *load, int llep, uint64_t min_tokens) {
    moe_ep_desc desc;
    outcome r;
    double taken[TIMES];
    memset(&r, 0, sizeof r), memset(&desc, 0, sizeof desc);
    desc.n_experts = at.experts, desc.n_ranks = at.ranks, desc.llep = llep, desc.min_tokens = min_tokens;
    bench_ok(moe_ep_plan_size(&desc, &r.bytes), "moe_ep_plan_size");
    r.memory = bench_array(r.bytes, 1);
    memset(r.memory, 1, r.bytes); /* its pages are there */
    for (int i = 0; i < TIMES; i++) {
        double begin = bench_now();
        bench_ok(moe_ep_plan(&desc, load, &r.plan, r.memory, r.bytes), "moe_ep_plan");
        taken[i] = bench_now() - begin;
    }
    r.seconds = bench_median(taken, TIMES);
    uint32_t *count = (uint32_t *)bench_array(2 * at.ranks, sizeof *count);
    memset(count, 0, 2 * at.ranks * sizeof *count);
    for (size_t e = 0; e < at.experts; e++)
        for (uint32_t i = 0; i < r.plan.count[e]; i++) {
            size_t home = e * at.ranks / at.experts, rank = r.plan.part[r.plan.first[e] + i].rank;
            if (rank != home) count[rank]++, count[at.ranks + home]++;
        }
    for (size_t p = 0; p < at.ranks; p++) {
        if (count[p] > r.received) r.received = count[p];
        if (count[at.ranks + p] > r.sent) r.sent = count[at.ranks + p];
    }
    free(count);
    return r;
}
/* Seconds of a layer: the busiest rank computes; its tokens come and go; weights arrive: passed on by those who have
 * them, so that what a rank receives decides, or all from their home, where what it sends does. Nothing overlaps. */
static double layer_seconds(const outcome *r, const node *n, int from_home) {
    double tokens = (double)r->plan.makespan, weights = r->received;
    if (from_home && r->sent > weights) weights = r->sent;
    return tokens * token_flops / n->flops + (tokens * token_bytes + weights * expert_bytes) / n->network;
}

/* -- tables -- */
static void print_plans(const place *at, size_t count, const shares *real, double tokens) {
    printf("| E | P | load | standard | LLEP | tokens away | weights moved | most to a rank | TB moved | plan, ms | "
           "MB |\n| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (size_t i = 0; i < count; i++)
        for (load_kind kind = UNIFORM; kind < LOADS; kind = (load_kind)(kind + 1)) {
            double routes = tokens * (double)at[i].ranks * TOP_K;
            if (kind == REAL && !real->n) continue;
            uint64_t *load = (uint64_t *)bench_array(at[i].experts, sizeof *load);
            make_load(kind, real, at[i].experts, routes, load);
            outcome plain = make_plan(at[i], load, 0, 0), llep = make_plan(at[i], load, 1, 0);
            double moved = (double)llep.plan.n_moved * expert_bytes + (double)llep.plan.n_away * token_bytes;
            printf("| %zu | %zu | %s | %.2f | %.2f | %.1f%% | %zu | %.0f | %.3f | %.3f | %.1f |\n", at[i].experts,
                   at[i].ranks, load_name[kind], plain.plan.imbalance, llep.plan.imbalance,
                   100 * (double)llep.plan.n_away / (double)llep.plan.n_tokens, llep.plan.n_moved, llep.received,
                   moved * 1e-12, llep.seconds * 1e3, (double)llep.bytes * 1e-6);
            fflush(stdout);
            free(load), free(plain.memory), free(llep.memory);
        }
}
static void print_nodes(place at, const shares *real, double tokens) {
    printf("\n| node | load | standard, ms | LLEP | all from home | m | LLEP with it | GB received | experts that fit "
           "|\n"
           "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (size_t i = 0; i < NODES; i++)
        for (load_kind kind = UNIFORM; kind < LOADS; kind = (load_kind)(kind + 1)) {
            const node *n = &nodes[i];
            if (kind == REAL && !real->n) continue;
            uint64_t *load = (uint64_t *)bench_array(at.experts, sizeof *load);
            make_load(kind, real, at.experts, tokens * (double)at.ranks * TOP_K, load);
            /* tokens for which sending an expert takes as long as computing them */
            double even = expert_bytes / n->network * n->flops / token_flops;
            uint64_t m = (uint64_t)(even + 1);
            outcome plain = make_plan(at, load, 0, 0), llep = make_plan(at, load, 1, 0);
            outcome own = make_plan(at, load, 1, m);
            printf("| %s | %s | %.1f | %.1f | %.1f | %llu | %.1f | %.2f | %.0f |\n", n->name, load_name[kind],
                   1e3 * layer_seconds(&plain, n, 0), 1e3 * layer_seconds(&llep, n, 0),
                   1e3 * layer_seconds(&llep, n, 1), (unsigned long long)m, 1e3 * layer_seconds(&own, n, 0),
                   own.received * expert_bytes * 1e-9, n->memory / expert_bytes);
            free(load), free(plain.memory), free(llep.memory), free(own.memory);
        }
}

int main(int argc, char **argv) {
    static const place places[] = {{64, 8},      {256, 8},     {256, 64},     {1024, 256},   {4096, 256},
                                   {4096, 1024}, {16384, 4096}, {65536, 1024}, {65536, 4096}};
    shares real = {0, NULL};
    double tokens = 4096;
    size_t count = sizeof places / sizeof *places;
    for (int i = 1; i < argc; i++) {
        const char *end = "";
        if (!strcmp(argv[i], "--quick")) count = 3;
        else if (!strcmp(argv[i], "--experts") && i + 1 < argc) real = read_shares(argv[++i]);
        else if (!strcmp(argv[i], "--tokens") && i + 1 < argc)
            tokens = (double)bench_number("--tokens", argv[++i], 1, 1 << 20, &end);
        else return fprintf(stderr, "bench_scale [--experts FILE] [--tokens N] [--quick]\n"), 2;
    }
    printf("%.0f tokens a rank, top-%d; an expert of %.1f MB, %.1f MFLOP and %.1f KB a token; m 1024, alpha 1, lambda "
           "1.3\n\n",
           tokens, TOP_K, expert_bytes * 1e-6, token_flops * 1e-6, token_bytes * 1e-3);
    print_plans(places, count, &real, tokens);
    place shown = {256, 64};
    print_nodes(shown, &real, tokens);
    free(real.share);
    return 0;
}
