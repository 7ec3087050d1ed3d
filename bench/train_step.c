/* How much of the machine does a whole training step use? Forward, backward and optimiser of a model, all of it,
 * against a loop of fused multiply-adds. Operations are those of products alone: the model's (three times its
 * forward's) and Muon's; the note says what a language model's are without Muon's.
 *
 *     wikitext2    the default of build/wikitext2 --data: 4 layers of width 192, 8 experts of 192, two a token
 *     dense        the same with one feed-forward network of as many active parameters
 *     gpt2-124m    GPT-2's sizes at batch 4 x 64 tokens, AdamW, as llm.c's CPU program is timed: the same products, but
 *                  OLMoE's norms and rotation in place of LayerNorm, biases and learned positions
 *     cifar10      build/cifar10 --data, 250 images a step; the pictures are those of the sample
 *     cifar10-wide the same with --wide
 *     wide-direct  that with --convolution direct: three times the operations
 *
 * --peers pytorch times the same step of gpt2-124m in PyTorch (bench/peer_train.py) in turns with it: the same network
 * of random weights, plain PyTorch as one writes it.
 *
 * --phases prints what a language model's time goes into instead, in processor time of all threads, which neighbours on
 * the machine do not lengthen as they do the clock on the wall; and the share of the peak by the same clock. */
#include "peer_process.h"
#include <signal.h>

#include "examples/common/cifar_net.h"
#include "examples/common/language.h"

typedef struct train_shape {
    const char *name, *choices;
    size_t batch, hidden;
    lm_shape shape;
} train_shape;

static const train_shape shapes[] = {
    {"wikitext2", "mixtral", 16, 192, {4096, 192, 3, 4, 256, 1, LM_MUON, 0.05, 10000, 1e-5, 1}},
    {"dense", "dense", 16, 384, {4096, 192, 3, 4, 256, 1, LM_MUON, 0.05, 10000, 1e-5, 1}},
    {"gpt2-124m", "dense", 4, 3072, {50257, 768, 12, 12, 64, 1, LM_ADAMW, 0, 10000, 1e-5, 1}},
};
static const struct image_shape {
    const char *name;
    cifar_shape shape;
} image_shapes[] = {
    {"cifar10", {250, {32, 96, CIFAR_FEATURES}, 1, 1, 1, 0, 1, 0.05f}},
    {"cifar10-wide", {250, {64, 256, CIFAR_FEATURES}, 1, 1, 1, 0, 1, 0.05f}},
    {"wide-direct", {250, {64, 256, CIFAR_FEATURES}, 1, 1, 1, 0, 0, 0.05f}},
};
enum { N_LANGUAGE = sizeof shapes / sizeof shapes[0], N_IMAGES = sizeof image_shapes / sizeof image_shapes[0] };
enum { N_SHAPES = N_LANGUAGE + N_IMAGES };

static void print_shapes(FILE *f)
{
    fputs("\nshape       batch  length  width  layers  vocabulary\n", f);
    for (size_t i = 0; i < N_LANGUAGE; i++) {
        const lm_shape *s = &shapes[i].shape;
        fprintf(f, "%-11s %5zu %7zu %6zu %7zu %11zu\n", shapes[i].name, shapes[i].batch, s->length, s->d, s->layers,
                s->vocab);
    }
    fputs("\nshape        images  filters of the three blocks\n", f);
    for (size_t i = 0; i < N_IMAGES; i++) {
        const cifar_shape *s = &image_shapes[i].shape;
        fprintf(f, "%-12s %6zu  %zu %zu %zu\n", image_shapes[i].name, s->batch, s->width[0], s->width[1], s->width[2]);
    }
}

typedef struct trained {
    lm *m;
    int32_t *token;
} trained;

static double run_step(void *self)
{
    trained *t = (trained *)self;
    lm_moment now = {t->m->steps};
    double start = bench_now(), nats = lm_forward(t->m, t->token, t->token + 1, t->m->rows, &now);
    lm_backward(t->m, t->m->rows, &now);
    lm_step(t->m, 1e-4f, 0.1f);
    if (!(nats / (double)t->m->rows < 50)) bench_die("the loss is %g", nats / (double)t->m->rows);
    return bench_now() - start;
}

static double run_peer(void *self)
{
    double seconds = peer_ask((peer_process *)self, "run", bench_threads, 1);
    if (seconds <= 0) bench_die("pytorch: the process ended early");
    return seconds;
}

/* Starts the peer of a dense shape and takes its first step, whose loss has to be about that of our random weights. */
static int start_peer(peer_process *p, const train_shape *s, double nats)
{
    static const char script[] = "bench/peer_train.py";
    const size_t numbers[] = {s->batch, s->shape.length, s->shape.d, s->shape.layers, s->shape.heads, s->shape.vocab,
                              s->hidden};
    enum { N_NUMBERS = sizeof numbers / sizeof numbers[0] };
    char text[N_NUMBERS][24], *args[2 + N_NUMBERS + 1] = {"/usr/bin/python3", (char *)(intptr_t)script};
    if (access(script, R_OK) != 0) {
        fprintf(stderr, "bench: pytorch skipped: %s is not here; run it from the repository's root\n", script);
        return 0;
    }
    signal(SIGPIPE, SIG_IGN); /* it ends at once where PyTorch is not installed */
    for (size_t i = 0; i < N_NUMBERS; i++) snprintf(args[2 + i] = text[i], sizeof text[i], "%zu", numbers[i]);
    peer_start(p, args);
    double loss = peer_ask(p, "loss", 1, 0);
    if (loss < 0) {
        peer_stop(p);
        return 0;
    }
    if (fabs(loss - nats) > 0.2) bench_die("pytorch: its first loss is %g, ours %g", loss, nats);
    return 1;
}

static void measure_step(const bench_options *o, const train_shape *s, trained *t, double nats)
{
    peer_process peer = {0, NULL, NULL};
    bench_subject subject[] = {{"moe.h", run_step, t}, {"pytorch", run_peer, &peer}};
    int peers = s->shape.optimizer == LM_ADAMW && bench_listed(o->peers, "pytorch") && start_peer(&peer, s, nats);
    double model = lm_flops(t->m, t->m->rows);
    bench_row r = {.shape = s->name, .pass = "training step", .flops = model + lm_step_flops(t->m)};
    bench_measure(o, &r, subject, 1 + (size_t)peers);
    snprintf(r.note, sizeof r.note, "%.0f tokens/s; the model's products alone %.1f%%", (double)t->m->rows / r.seconds,
             100 * r.peak_share * model / r.flops);
    bench_print(o, &r);
    if (peers) peer_stop(&peer);
}

/* ---- phases --------------------------------------------------------------------------------- */
static double processor_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Operations of a thread in a second of processor time: the best of a few bursts. */
static double processor_peak(void)
{
    enum { BURSTS = 8, STEPS = 400000 };
    bench_loops l = bench_loops_of(moe_active_isa());
    double best = 0;
    for (int burst = 0; burst < BURSTS; burst++) {
        double start = processor_now();
        l.fma(STEPS);
        double flops = 24.0 * STEPS * (double)l.width / (processor_now() - start);
        if (flops > best) best = flops;
    }
    return best;
}

static void print_phases(const bench_options *o, const train_shape *s, const lm_watch *watch, double flops, double peak)
{
#define PHASE_NAME(name, text) text,
    static const char *const names[] = {LM_PHASES(PHASE_NAME)};
    double sum = 0;
    for (int i = 0; i < LM_PHASE_COUNT; i++) sum += watch->seconds[i][0] + watch->seconds[i][1];
    fprintf(o->human, "%s, %s, %zu thread%s: %.1f ms of processor time a step, %.1f%% of the peak of %.1f GFLOP/s\n",
            s->name, moe_isa_name(moe_active_isa()), bench_threads, bench_threads == 1 ? "" : "s", 1e3 * sum,
            100 * flops / sum / peak, 1e-9 * peak);
    for (int i = 0; i < LM_PHASE_COUNT; i++) {
        const double *t = watch->seconds[i];
        fprintf(o->human, "    %-24s %8.1f ms forward or step, %8.1f ms backward  %5.1f%%\n", names[i], 1e3 * t[0],
                1e3 * t[1], 100 * (t[0] + t[1]) / sum);
        if (o->json)
            printf("{\"shape\":\"%s\",\"threads\":%zu,\"phase\":\"%s\",\"ms\":%.6g,\"backward_ms\":%.6g}\n", s->name,
                   bench_threads, names[i], 1e3 * t[0], 1e3 * t[1]);
    }
}

/* The median over the runs of each part. */
static void measure_phases(const bench_options *o, const train_shape *s, trained *t)
{
    enum { PARTS = 2 * LM_PHASE_COUNT };
    double part[PARTS][BENCH_MAX_RUNS], peak = processor_peak();
    size_t runs = o->runs ? o->runs : 7;
    lm_watch watch = {processor_now, 0, {{0}}};
    for (size_t i = 0; i < runs; i++) {
        memset(watch.seconds, 0, sizeof watch.seconds);
        watch.last = processor_now();
        t->m->watch = &watch;
        run_step(t);
        t->m->watch = NULL;
        for (size_t k = 0; k < PARTS; k++) part[k][i] = watch.seconds[k / 2][k % 2];
        peak = fmax(peak, processor_peak());
    }
    for (size_t k = 0; k < PARTS; k++) watch.seconds[k / 2][k % 2] = bench_median(part[k], runs);
    print_phases(o, s, &watch, lm_flops(t->m, t->m->rows) + lm_step_flops(t->m), peak);
}

/* ---- images --------------------------------------------------------------------------------- */
typedef struct trained_images {
    cifar_net *m;
    const cifar *data;
    size_t steps;
} trained_images;

static double run_image_step(void *self)
{
    trained_images *t = (trained_images *)self;
    cifar_net *m = t->m;
    size_t n = m->shape.batch;
    double start = bench_now();
    cifar_batch b = {.set = &t->data->train, .first = 0, .count = n, .shift = 2, .flip = 1, .seed = 1,
                     .epoch = t->steps, .x = m->image, .label = m->label};
    cifar_batch_make(&b, &m->ops.parallel);
    cifar_net_forward(m, n, 1);
    double nats = nn_cross_entropy(&m->ops, n, CIFAR_CLASSES, 0.2f, m->logits, m->label, m->prob, m->dlogits);
    cifar_net_backward(m, n);
    cifar_net_step(m, 1e-3f, ++t->steps);
    if (!(nats / (double)n < 50)) bench_die("the loss is %g", nats / (double)n);
    return bench_now() - start;
}

static void measure_images(const bench_options *o, const struct image_shape *s, const char *program)
{
    cifar data;
    moe_desc desc = {0};
    bench_ok(moe_desc_system(&desc, "mixtral"), "moe_desc_system");
    desc.d_model = CIFAR_FEATURES;
    desc.d_ff = CIFAR_FEATURES;
    bench_ok(moe_desc_resolve(&desc, &desc), "moe_desc_resolve");
    cifar_load(&data, NULL, program);
    trained_images t = {cifar_net_new(&s->shape, &desc, &data), &data, 0};
    bench_subject subject[] = {{"moe.h", run_image_step, &t}};
    bench_row r = {.shape = s->name, .pass = "training step", .flops = cifar_net_flops(t.m)};
    run_image_step(&t);
    bench_measure(o, &r, subject, 1);
    snprintf(r.note, sizeof r.note, "%.0f images/s", (double)s->shape.batch / r.seconds);
    bench_print(o, &r);
    cifar_net_free(t.m);
    cifar_free(&data);
}

/* ---- the program ---------------------------------------------------------------------------- */
static void measure(const bench_options *o, const train_shape *s, int phases)
{
    moe_desc desc = {0};
    bench_ok(moe_desc_system(&desc, s->choices), "moe_desc_system");
    desc.d_model = s->shape.d;
    desc.d_ff = s->hidden;
    if (s->shape.optimizer == LM_ADAMW) desc.expert = MOE_EXPERT_GELU_TANH;
    bench_ok(moe_desc_resolve(&desc, &desc), "moe_desc_resolve");
    size_t rows = s->batch * s->shape.length;
    trained t = {lm_new(&s->shape, &desc, rows), (int32_t *)bench_array(rows + 1, sizeof *t.token)};
    for (size_t i = 0; i <= rows; i++) t.token[i] = (int32_t)(moe_rand_u32(1, 0, i) % s->shape.vocab);
    double nats = lm_forward(t.m, t.token, t.token + 1, rows, NULL) / (double)rows;
    run_step(&t);
    if (phases) measure_phases(o, s, &t);
    else measure_step(o, s, &t, nats);
    lm_free(t.m);
    free(t.token);
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES];
    int phases = 0, kept = 1;
    for (size_t i = 0; i < N_LANGUAGE; i++) names[i] = shapes[i].name;
    for (size_t i = 0; i < N_IMAGES; i++) names[N_LANGUAGE + i] = image_shapes[i].name;
    for (int i = 1; i < argc; i++) { /* the one option that the other benchmarks have not */
        if (strcmp(argv[i], "--phases") == 0) phases = 1;
        else argv[kept++] = argv[i];
    }
    argc = kept;
    bench_options o = bench_parse(argc, argv, "a whole training step", names, N_SHAPES, 0,
                                  print_shapes);
    if (!phases) bench_header(&o, (size_t)bench_listed(o.peers, "pytorch"));
    for (moe_isa_kind isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(&o, isa)) continue;
        for (size_t k = 0; k < o.n_threads; k++) {
            if (!bench_use_threads(o.threads[k])) continue;
            for (size_t i = 0; i < N_LANGUAGE; i++)
                if (bench_listed(o.shape, shapes[i].name)) measure(&o, &shapes[i], phases);
            for (size_t i = 0; i < N_IMAGES && !phases; i++)
                if (bench_listed(o.shape, image_shapes[i].name)) measure_images(&o, &image_shapes[i], argv[0]);
        }
    }
    return 0;
}
