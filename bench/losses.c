/* What do the auxiliary losses cost? Each function's value and gradient as a share of one forward and backward of a layer
 * of middle size, and those that are usually on together. A batch's statistics count with the loss that needs them. */
#include "common.h"

enum { T = 4096, D = 512, FF = 512, E = 64, K = 8, DEVICES = 8, SEQUENCE = 512 };

typedef struct work {
    moe_layer *m;
    float *x, *y, *dy, *dx;
    float *logits, *prob, *router, *d_logits, *d_router, *noise, *threshold, *outputs, *d_outputs, *d_weight;
    const float *weight;
    const int32_t *index;
    const uint64_t *load;
    int32_t *teacher;
    uint64_t *more_load; /* (T / SEQUENCE, E) */
    double *mean, *other;
} work;

/* prob and its means in some losses, on one line each */
#define SOFT T, E, 1, w->prob
#define OUT 0.01f, &value, w->d_logits
#define MEAN bench_ok(moe_mean_scores(T, E, w->prob, w->mean), "moe_mean_scores")
#define LOSS(name, prepare, call)                       \
    static void run_##name(work *w)                     \
    {                                                   \
        double value;                                   \
        prepare;                                        \
        bench_ok(moe_loss_##name call, #name);          \
    }
#define NOTHING ((void)0)
LOSS(switch, NOTHING, (SOFT, w->load, OUT))
LOSS(z, NOTHING, (T, E, w->logits, OUT))
LOSS(importance, MEAN, (SOFT, w->mean, OUT))
LOSS(importance_selected, bench_ok(moe_mean_weights(T, K, E, w->index, w->weight, w->mean), "moe_mean_weights"),
     (T, K, E, w->index, w->mean, 0.01f, &value, w->d_weight))
LOSS(load, bench_ok(moe_mean_selection(T, E, w->logits, w->noise, w->threshold, w->mean), "moe_mean_selection"),
     (T, E, w->logits, w->noise, w->threshold, w->mean, 0.01f, &value, w->d_logits, NULL, NULL))
LOSS(entropy, NOTHING, (SOFT, OUT))
LOSS(certainty, NOTHING, (SOFT, OUT))
LOSS(kl_uniform, MEAN, (SOFT, w->mean, OUT))
LOSS(kl_reverse, MEAN, (SOFT, w->mean, OUT))
LOSS(mutual_information, MEAN, (SOFT, w->mean, OUT))
LOSS(l2_uniform, MEAN, (SOFT, w->mean, OUT))
LOSS(sequence, bench_ok(moe_sequence_load(T, E, K, SEQUENCE, w->index, w->more_load), "moe_sequence_load"),
     (T, E, SEQUENCE, w->prob, w->more_load, OUT))
LOSS(device, bench_ok(moe_device_load(E, DEVICES, w->load, w->more_load), "moe_device_load"),
     (T, E, DEVICES, 1, w->prob, w->more_load, OUT))
LOSS(communication, bench_ok(moe_device_tokens(T, E, DEVICES, K, w->index, w->more_load), "moe_device_tokens"),
     (T, E, DEVICES, DEVICES, 1, w->prob, w->more_load, T, OUT))
LOSS(locality, MEAN; bench_ok(moe_device_prob(E, DEVICES, w->mean, w->other), "moe_device_prob"),
     (T, E, DEVICES, 0, 0.1f, 1, w->prob, w->other, OUT))
LOSS(relu_l1, NOTHING, (T, E, K, w->prob, w->load, T, OUT))
LOSS(variance, MEAN, (T, E, w->prob, w->mean, OUT))
LOSS(oracle, NOTHING, (SOFT, w->teacher, OUT))
LOSS(simbal, NOTHING, (D, E, w->router, 0.01f, &value, w->d_router))
LOSS(diverse_simple, NOTHING, (D, E, w->router, 0.01f, &value, w->d_router))
LOSS(prototype_orthogonality, NOTHING, (D, E, w->router, 0.01f, &value, w->d_router))
LOSS(prototype_diversity, NOTHING, (D, E, w->router, 0.01f, &value, w->d_router))
LOSS(prototype_alignment, NOTHING, (T, D, E, K, w->x, w->router, w->index, 0.01f, &value, w->dx, w->d_router))
LOSS(latent_kl, NOTHING, (T, D, w->x, w->dy, 0.01f, &value, w->dx, w->y))
LOSS(redundancy, NOTHING, (T, E, w->logits, OUT))
LOSS(output_orthogonality, NOTHING, (T, K, D, w->outputs, 0.01f, &value, w->d_outputs))
LOSS(orthonormal, NOTHING, (D, E, w->router, 0.01f, &value, w->d_router))
LOSS(codebook, NOTHING, (T, D, E, w->x, w->outputs, w->teacher, 0.25f, 0.01f, &value, w->dx, w->d_outputs))

static void run_usual(work *w) { run_switch(w), run_z(w); }
static void run_ecology(work *w) { run_switch(w), run_kl_uniform(w), run_entropy(w), run_oracle(w), run_prototype_orthogonality(w); }

static const struct { const char *name; void (*run)(work *); } losses[] = {
    {"switch", run_switch}, {"z", run_z}, {"importance", run_importance},
    {"importance-selected", run_importance_selected}, {"load", run_load}, {"entropy", run_entropy},
    {"certainty", run_certainty}, {"kl-uniform", run_kl_uniform}, {"kl-reverse", run_kl_reverse},
    {"mutual-information", run_mutual_information}, {"l2-uniform", run_l2_uniform}, {"sequence", run_sequence},
    {"device", run_device}, {"communication", run_communication}, {"locality", run_locality},
    {"relu-l1", run_relu_l1}, {"variance", run_variance}, {"oracle", run_oracle}, {"simbal", run_simbal},
    {"diverse-simple", run_diverse_simple}, {"prototype-orthogonality", run_prototype_orthogonality},
    {"prototype-diversity", run_prototype_diversity}, {"prototype-alignment", run_prototype_alignment},
    {"latent-kl", run_latent_kl}, {"redundancy", run_redundancy}, {"output-orthogonality", run_output_orthogonality},
    {"orthonormal", run_orthonormal}, {"codebook", run_codebook}, {"switch+z", run_usual}, {"ecology", run_ecology},
};
enum { LOSSES = sizeof losses / sizeof losses[0] };

static void print_shapes(FILE *f)
{
    fprintf(f, "\nT %d, d %d, d_ff %d, E %d, k %d; ecology = switch + kl-uniform + entropy + oracle + orthogonality\n", T, D, FF, E, K);
}

static double run_layer(void *self)
{
    work *w = (work *)self;
    double start = bench_now();
    bench_ok(moe_forward(w->m, w->x, T, w->y), "moe_forward");
    bench_ok(moe_backward(w->m, w->dy, w->dx), "moe_backward");
    return bench_now() - start;
}

typedef struct one_loss { work *w; void (*run)(work *); } one_loss;
static double run_loss(void *self)
{
    enum { REPEATS = 5 };
    one_loss *l = (one_loss *)self;
    double start = bench_now();
    for (int i = 0; i < REPEATS; i++) l->run(l->w);
    return (bench_now() - start) / REPEATS;
}

static void measure(const bench_options *o, work *w)
{
    bench_subject layer = {"moe.h", run_layer, w};
    bench_row whole = {"layer", "forward+backward", 3 * 2.0 * T * K * 3 * D * FF, 0, "", 0, 0, 0, 0, 0, 0, {{NULL, 0}}};
    run_layer(w);
    bench_measure(o, &whole, &layer, 1);
    bench_print(o, &whole);
    for (size_t i = 0; i < LOSSES; i++) {
        if (!bench_listed(o->shape, losses[i].name)) continue;
        one_loss l = {w, losses[i].run};
        bench_subject subject = {"moe.h", run_loss, &l};
        bench_row row = {losses[i].name, "loss", 0, 0, "", 0, 0, 0, 0, 0, 0, {{NULL, 0}}};
        bench_measure(o, &row, &subject, 1);
        snprintf(row.note, sizeof row.note, "%.3f%% of the layer", 100 * row.seconds / whole.seconds);
        bench_print(o, &row);
    }
}

int main(int argc, char **argv)
{
    const char *names[LOSSES];
    for (size_t i = 0; i < LOSSES; i++) names[i] = losses[i].name;
    bench_options o = bench_parse(argc, argv, "the auxiliary losses as a share of a layer's step", names, LOSSES, 0, print_shapes);
    work w;
    moe_desc d;
    memset(&w, 0, sizeof w), memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = FF, d.n_experts = E, d.top_k = K;
    bench_ok(moe_layer_new(&w.m, &d), "moe_layer_new");
    w.x = bench_floats(T * D), w.y = bench_floats(T * D), w.dy = bench_floats(T * D), w.dx = bench_floats(T * D);
    w.router = bench_floats(D * E), w.d_router = bench_floats(D * E), w.d_logits = bench_floats(T * E), w.d_weight = bench_floats(T * K);
    w.noise = bench_floats(T * E), w.threshold = bench_floats(T * E);
    w.outputs = bench_floats((size_t)T * K * D), w.d_outputs = bench_floats((size_t)T * K * D);
    w.teacher = (int32_t *)bench_array(T, sizeof *w.teacher);
    w.more_load = (uint64_t *)bench_array(T / SEQUENCE * E, sizeof *w.more_load);
    w.mean = (double *)bench_array(E, sizeof *w.mean), w.other = (double *)bench_array(E, sizeof *w.other);
    bench_ok(moe_rand_normal(1, 0, T * D, 0, 1, w.x), "moe_rand_normal");
    bench_ok(moe_rand_normal(1, 1, T * D, 0, 1, w.dy), "moe_rand_normal");
    bench_ok(moe_rand_normal(1, 2, (size_t)T * K * D, 0, 1, w.outputs), "moe_rand_normal");
    bench_ok(moe_rand_uniform(1, 3, T * E, 0.5f, 1, w.noise), "moe_rand_uniform");
    bench_ok(moe_layer_get(w.m, MOE_PART_PARAMS, "router", w.router, D * E), "moe_layer_get");
    run_layer(&w);
    const moe_tape *t = moe_layer_tape(w.m);
    w.logits = t->logits, w.prob = t->prob, w.index = t->index, w.weight = t->weight, w.load = t->routes.load;
    for (size_t i = 0; i < T; i++) w.teacher[i] = w.index[i * K];
    bench_header(&o, 0);
    for (int isa = MOE_ISA_AUTO; isa < MOE__ISA_COUNT; isa++) {
        if (!bench_use_isa(&o, (moe_isa)isa)) continue;
        for (size_t i = 0; i < o.n_threads; i++)
            if (bench_use_threads(o.threads[i])) measure(&o, &w);
    }
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}
