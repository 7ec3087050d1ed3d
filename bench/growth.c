/* What does growing cost? Splitting one of 64 experts of a layer of 1.6 GB (parameters, gradients, moments), and the
 * other operations on it, beside a copy of as many bytes into fresh memory by the same threads: in turns, medians, and
 * the ratio, which for a split is to be at most 1.2. --quick: a layer of 100 MB. */
#include "common.h"

enum { EXPERTS = 64, SPAN = 1 << 20, ROUNDS = 7 };
static void *bench_keep; /* so that no copy is left out */

typedef struct copy { const unsigned char *from; unsigned char *to; size_t bytes; } copy;
static void copy_span(void *arg, size_t i, size_t worker) {
    const copy *c = (const copy *)arg;
    size_t at = i * SPAN, n = c->bytes - at < SPAN ? c->bytes - at : SPAN;
    (void)worker;
    memcpy(c->to + at, c->from + at, n);
}
static double time_copy(const unsigned char *from, size_t bytes) {
    double begin = bench_now();
    copy c = {from, (unsigned char *)bench_malloc(bytes, NULL), bytes};
    if (!c.to) bench_die("no memory for a copy of %zu bytes\n", bytes);
    moe_run(NULL, (bytes + SPAN - 1) / SPAN, copy_span, &c);
    double seconds = bench_now() - begin;
    bench_keep = c.to;
    free(bench_keep);
    return seconds;
}
typedef moe_status operation(moe_layer **out, const moe_layer *layer);
static moe_status split(moe_layer **out, const moe_layer *layer) { return moe_layer_split(out, layer, 5, NULL); }
static moe_status prune(moe_layer **out, const moe_layer *layer) {
    const size_t expert = 5;
    return moe_layer_prune(out, layer, 1, &expert);
}
static moe_status clone(moe_layer **out, const moe_layer *layer) {
    return moe_layer_clone(out, layer, 5, 0.1f, 0.5f, 1);
}
static moe_status merge(moe_layer **out, const moe_layer *layer) { return moe_layer_merge(out, layer, 5, 6, NULL); }
static double time_operation(operation *run, const moe_layer *layer, const char *name) {
    moe_layer *out = NULL;
    double begin = bench_now();
    bench_ok(run(&out, layer), name);
    double seconds = bench_now() - begin;
    moe_layer_free(out);
    return seconds;
}

int main(int argc, char **argv) {
    static const struct { const char *name; operation *run; } rows[] = {
        {"split", split}, {"prune", prune}, {"clone", clone}, {"merge", merge}};
    enum { ROWS = sizeof rows / sizeof *rows };
    int quick = argc > 1 && !strcmp(argv[1], "--quick");
    double copied[ROUNDS], taken[ROWS][ROUNDS];
    moe_layer *layer = NULL;
    moe_desc d;
    size_t bytes = 0;
    if (argc > 1 + quick) return fprintf(stderr, "bench_growth [--quick]\n"), 2;
    memset(&d, 0, sizeof d);
    d.d_model = quick ? 256 : 1024, d.d_ff = quick ? 128 : 512, d.n_experts = EXPERTS;
    bench_ok(moe_layer_new(&layer, &d), "moe_layer_new");
    bench_ok(moe_layer_size(&d, &bytes), "moe_layer_size");
    unsigned char *from = (unsigned char *)bench_array(bytes, 1);
    memset(from, 1, bytes);
    for (int round = 0; round < ROUNDS; round++) {
        copied[round] = time_copy(from, bytes);
        for (size_t i = 0; i < ROWS; i++) taken[i][round] = time_operation(rows[i].run, layer, rows[i].name);
    }
    double base = bench_median(copied, ROUNDS);
    printf("a layer of %.2f GB with %d experts; %d rounds, medians\n\n", (double)bytes * 1e-9, EXPERTS, ROUNDS);
    printf("%-8s %10s %8s\n", "", "seconds", "copies");
    printf("%-8s %10.4f %8.2f\n", "copy", base, 1.0);
    for (size_t i = 0; i < ROWS; i++) {
        double median = bench_median(taken[i], ROUNDS);
        printf("%-8s %10.4f %8.2f\n", rows[i].name, median, median / base);
    }
    free(from);
    moe_layer_free(layer);
    return 0;
}
