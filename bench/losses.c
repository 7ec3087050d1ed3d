/* What do the auxiliary losses cost? Each function's value and gradient as a share of one forward and backward of a
 * layer of middle size, and those that are usually on together. A batch's statistics count with the loss that needs
 * them. */
#include "common.h"
#include "../examples/common/loss_cases.h"

enum { T = 4096, D = 512, FF = 512, E = 64, K = 8, RANKS = 8, SEQUENCE = 512 };

typedef struct work {
    moe_layer *m;
    moe_loss_args args; /* all that does not change from loss to loss */
    float *x, *y, *dy, *dx;
    const float *weight;
    const int32_t *index;
    const uint64_t *load;
    int32_t *codes;
    uint64_t *more_load; /* (T / SEQUENCE, E) */
    double *mean, *rank_prob;
} work;

/* The statistics that a loss reads, made anew; then the loss. */
static void prepare(work *w, moe_loss_kind kind, moe_loss_args *a)
{
    a->load = w->load, a->mean = w->mean, a->index = w->index;
    switch (loss_case_reads(kind)) {
    case READS_MEAN_PROB:
    case READS_MEAN_SCORE: /* here the scores are prob */
    case READS_RANK_PROB:
        bench_ok(moe_mean_scores(T, E, w->args.prob, w->mean), "moe_mean_scores");
        if (loss_case_reads(kind) == READS_RANK_PROB)
            bench_ok(moe_rank_prob(E, RANKS, w->mean, w->rank_prob), "moe_rank_prob");
        break;
    case READS_MEAN_WEIGHT:
        bench_ok(moe_mean_weights(T, E, K, w->index, w->weight, w->mean), "moe_mean_weights");
        break;
    case READS_MEAN_SELECTION:
        bench_ok(moe_mean_selection(T, E, a->logits, a->noise_std, a->threshold, w->mean), "moe_mean_selection");
        break;
    case READS_SEQUENCE_LOAD:
        a->load = w->more_load;
        bench_ok(moe_sequence_load(T, E, K, SEQUENCE, w->index, w->more_load), "moe_sequence_load");
        break;
    case READS_RANK_LOAD:
        a->load = w->more_load;
        bench_ok(moe_rank_load(E, RANKS, w->load, w->more_load), "moe_rank_load");
        break;
    case READS_RANK_TOKENS:
        a->load = w->more_load;
        bench_ok(moe_rank_tokens(T, E, K, RANKS, w->index, w->more_load), "moe_rank_tokens");
        break;
    case READS_CODE: a->index = w->codes; break;
    case READS_NOTHING:
    case READS_LOAD: break;
    }
}
static void run_one(work *w, moe_loss_kind kind)
{
    double value;
    moe_loss_args a = w->args;
    prepare(w, kind, &a);
    if (kind == MOE_LOSS_VARIANCE) a.d_logits = NULL; /* by the scores alone */
    bench_ok(moe_loss(kind, &a, 0.01f, &value), moe_loss_name(kind));
}

/* Each loss, and those that are usually on together. */
enum { USUAL = MOE_LOSS_COUNT, ECOLOGY, LOSSES };
static const char *name_of(int loss)
{
    if (loss == USUAL) return "switch+z";
    return loss == ECOLOGY ? "ecology" : moe_loss_name((moe_loss_kind)loss);
}
static void run_any(work *w, int loss)
{
    static const moe_loss_kind usual[] = {MOE_LOSS_SWITCH, MOE_LOSS_Z};
    static const moe_loss_kind ecology[] = {MOE_LOSS_SWITCH, MOE_LOSS_KL_UNIFORM, MOE_LOSS_ENTROPY, MOE_LOSS_ORACLE,
                                            MOE_LOSS_PROTOTYPE_ORTHOGONALITY};
    if (loss < MOE_LOSS_COUNT) run_one(w, (moe_loss_kind)loss);
    for (size_t i = 0; loss == USUAL && i < sizeof usual / sizeof *usual; i++) run_one(w, usual[i]);
    for (size_t i = 0; loss == ECOLOGY && i < sizeof ecology / sizeof *ecology; i++) run_one(w, ecology[i]);
}

static void print_shapes(FILE *f)
{
    fprintf(f, "\nT %d, d %d, d_ff %d, E %d, k %d; ecology = switch + kl-uniform + entropy + oracle + orthogonality\n",
            T, D, FF, E, K);
}

static double run_layer(void *self)
{
    work *w = (work *)self;
    double start = bench_now();
    bench_ok(moe_forward(w->m, w->x, T, w->y), "moe_forward");
    bench_ok(moe_backward(w->m, w->dy, w->dx), "moe_backward");
    return bench_now() - start;
}

typedef struct one_loss { work *w; int loss; } one_loss;
static double run_loss(void *self)
{
    enum { REPEATS = 5 };
    one_loss *l = (one_loss *)self;
    double start = bench_now();
    for (int i = 0; i < REPEATS; i++) run_any(l->w, l->loss);
    return (bench_now() - start) / REPEATS;
}

static void measure(const bench_options *o, work *w)
{
    bench_subject layer = {"moe.h", run_layer, w};
    bench_row whole = {"layer", "forward+backward", 3 * 2.0 * T * K * 3 * D * FF, 0, "", 0, 0, 0, 0, 0, 0, {{NULL, 0}}};
    run_layer(w);
    bench_measure(o, &whole, &layer, 1);
    bench_print(o, &whole);
    for (int i = 0; i < LOSSES; i++) {
        if (!bench_listed(o->shape, name_of(i))) continue;
        one_loss l = {w, i};
        bench_subject subject = {"moe.h", run_loss, &l};
        bench_row row = {name_of(i), "loss", 0, 0, "", 0, 0, 0, 0, 0, 0, {{NULL, 0}}};
        bench_measure(o, &row, &subject, 1);
        snprintf(row.note, sizeof row.note, "%.3f%% of the layer", 100 * row.seconds / whole.seconds);
        bench_print(o, &row);
    }
}

int main(int argc, char **argv)
{
    const char *names[LOSSES];
    for (int i = 0; i < LOSSES; i++) names[i] = name_of(i);
    bench_options o =
        bench_parse(argc, argv, "the auxiliary losses as a share of a layer's step", names, LOSSES, 0, print_shapes);
    work w;
    moe_desc d;
    memset(&w, 0, sizeof w), memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = FF, d.n_experts = E, d.top_k = K;
    bench_ok(moe_layer_new(&w.m, &d), "moe_layer_new");
    w.x = bench_floats(T * D), w.y = bench_floats(T * D), w.dy = bench_floats(T * D), w.dx = bench_floats(T * D);
    float *router = bench_floats(D * E), *deviation = bench_floats(T * E), *outputs = bench_floats((size_t)T * K * D);
    w.codes = (int32_t *)bench_array(T, sizeof *w.codes);
    w.more_load = (uint64_t *)bench_array(T / SEQUENCE * E, sizeof *w.more_load);
    w.mean = (double *)bench_array(E, sizeof *w.mean), w.rank_prob = (double *)bench_array(E, sizeof *w.rank_prob);
    bench_ok(moe_rand_normal(1, 0, T * D, 0, 1, w.x), "moe_rand_normal");
    bench_ok(moe_rand_normal(1, 1, T * D, 0, 1, w.dy), "moe_rand_normal");
    bench_ok(moe_rand_normal(1, 2, (size_t)T * K * D, 0, 1, outputs), "moe_rand_normal");
    bench_ok(moe_rand_uniform(1, 3, T * E, 0.5f, 1, deviation), "moe_rand_uniform");
    bench_ok(moe_layer_get(w.m, MOE_PART_PARAMS, "router", router, D * E), "moe_layer_get");
    run_layer(&w);
    const moe_tape *t = moe_layer_tape(w.m);
    w.index = t->index, w.weight = t->weight, w.load = t->routes.load;
    for (size_t i = 0; i < T; i++) w.codes[i] = w.index[i * K];
    moe_loss_args *a = &w.args;
    a->n_tokens = a->counted = T, a->n_experts = a->n_codes = a->d_ff = E, a->top_k = K, a->d_model = D,
    a->sequence = SEQUENCE;
    a->n_ranks = a->rank_limit = RANKS, a->smoothing = 0.1f, a->commitment = 0.25f;
    a->prob = a->scores = t->prob, a->logits = t->logits, a->noise_std = deviation, a->threshold = bench_floats(T * E);
    a->teacher = w.codes, a->rank_prob = w.rank_prob, a->router = a->matrix = router,
    a->outputs = a->codebook = outputs;
    a->latent = a->x = w.x, a->log_var = w.dy;
    a->d_logits = a->d_scores = bench_floats(T * E), a->d_weight = bench_floats(T * K),
    a->d_router = a->d_matrix = bench_floats(D * E);
    a->d_latent = a->dx = w.dx, a->d_log_var = w.y, a->d_outputs = a->d_codebook = bench_floats((size_t)T * K * D);
    bench_header(&o, 0);
    for (int isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(&o, (moe_isa_kind)isa)) continue;
        for (size_t i = 0; i < o.n_threads; i++)
            if (bench_use_threads(o.threads[i])) measure(&o, &w);
    }
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}
