// experiment.h - what the programs that compare many trainings of one network share (zoo, balance): their flags, the
// data, the names that a flag lists, the table on the terminal, and the files that they write.
//
//     experiment e = experiment_defaults("zoo");
//     args_option options[] = {EXPERIMENT_OPTIONS(&e), {"sweep", ...}};
//     args_parse(...);
//     experiment_load(&e, argv[0], defaults);         // pictures, steps: what a desc needs to know
//     experiment_begin(&e);                           // tokens
//     experiment_config(&e);                          // the file of JSON lines
//     ... train and write ...
//     experiment_end(&e);
#ifndef EX_EXPERIMENT_H
#define EX_EXPERIMENT_H

#include "args.h"
#include "json.h"
#include "plot.h"
#include "tokens_net.h"

typedef struct experiment {
    const char *program;
    const char *data, *isa, *out;
    size_t epochs, steps, images, experts, top_k;
    int json, quiet;
    net_plan plan;
    // from experiment_load on
    cifar pictures;
    FILE *human; // where the table goes
    double begin;
    samples samples; // from experiment_begin on
    json lines;      // from experiment_config on
} experiment;

// What the data decide unless a flag does: for the sample, and for the full set.
typedef struct experiment_by_data {
    size_t epochs[2];
    double lr[2];
} experiment_by_data;

// clang-format off
#define EXPERIMENT_OPTIONS(e)                                                                                          \
    ARGS_DATA(&(e)->data), ARGS_EPOCHS(&(e)->epochs), ARGS_STEPS(&(e)->steps), ARGS_SEED(&(e)->plan.seed),             \
    ARGS_THREADS(&(e)->plan.threads), ARGS_ISA(&(e)->isa), ARGS_EXPERTS(&(e)->experts), ARGS_TOP_K(&(e)->top_k),       \
    {"batch", ARGS_SIZE, &(e)->plan.batch, "N", "images a step (0: by the data)", 0, 8192},                            \
    {"images", ARGS_SIZE, &(e)->images, "N", "only the first N of the training and of the test set (0: all)", 0, 0},   \
    {"lr", ARGS_REAL, &(e)->plan.lr, "X", "highest learning rate (0: by the data)", 0, 1e30},                          \
    ARGS_OUT(&(e)->out), ARGS_JSON(&(e)->json), ARGS_QUIET(&(e)->quiet)
// clang-format on

EX_FUNC experiment experiment_defaults(const char *program) {
    experiment e = {.program = program, .isa = "auto", .out = "out", .plan = {.seed = 1}};
    return e;
}

// The pictures, and the plan of a training on them.
EX_FUNC void experiment_load(experiment *e, const char *argv0, experiment_by_data by_data) {
    net_plan *plan = &e->plan;
    nn_isa(e->program, e->isa);
    cifar_load(&e->pictures, e->data, argv0);
    size_t *train = &e->pictures.train.count, *test = &e->pictures.test.count;
    int full = !e->pictures.sample;
    if (e->images && e->images < *train) *train = e->images;
    if (e->images && e->images < *test) *test = e->images;
    if (!e->epochs) e->epochs = by_data.epochs[full];
    if (!plan->batch) plan->batch = full ? 250 : 50;
    if (plan->lr <= 0) plan->lr = by_data.lr[full];
    plan->smoothing = 0.1f;
    plan->decay = 0.05f;
    if (plan->batch > *train) args_fail(e->program, "--batch: only %zu training images", *train);
    plan->total = *train / plan->batch * e->epochs;
    if (e->steps && e->steps < plan->total) plan->total = e->steps;
    e->human = e->json ? stderr : stdout;
    e->begin = seconds_now();
}

EX_FUNC void experiment_begin(experiment *e) {
    nn ops = {.parallel = {.n_threads = e->plan.threads}};
    e->samples = samples_make(&ops, &e->pictures, e->plan.seed, e->quiet);
    nn_free(&ops);
    fprintf(e->human,
            "CIFAR-10%s: %zu training and %zu test images, %d tokens each (made in %.1f s); %s, threads: %zu\n",
            e->pictures.sample ? " sample" : "", e->pictures.train.count, e->pictures.test.count, NET_T,
            seconds_now() - e->begin, moe_isa_name(moe_active_isa()), moe_workers(&ops.parallel));
    fflush(e->human);
}

// Opens the file of JSON lines, and begins the line of the configuration; the caller adds the layers.
EX_FUNC void experiment_config(experiment *e) {
    char file[80];
    json *j = &e->lines;
    snprintf(file, sizeof file, "%s.jsonl", e->program);
    *j = (json){{open_output(e->out, file), e->json ? stdout : NULL}, 0};
    json_config(j, e->program);
    json_text(j, "data", e->data ? e->data : "sample");
    json_whole(j, "train_images", e->samples.train->count);
    json_whole(j, "test_images", e->samples.test.count);
    json_whole(j, "tokens_per_image", NET_T);
    json_whole(j, "seed", e->plan.seed);
    json_whole(j, "epochs", e->epochs);
    json_whole(j, "steps", e->plan.total);
    json_whole(j, "batch", e->plan.batch);
    json_real(j, "lr", e->plan.lr);
    json_real(j, "weight_decay", (double)e->plan.decay);
    json_real(j, "label_smoothing", (double)e->plan.smoothing);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_whole(j, "threads", moe_workers(&(moe_parallel){.n_threads = e->plan.threads}));
}
EX_FUNC void experiment_layer(experiment *e, const char *name, const moe_desc *desc) {
    char text[4096];
    moe_desc_json(desc, text, sizeof text);
    json_raw(&e->lines, name, text);
}

// Closes the file of JSON lines; what the experiment holds stays until experiment_free.
EX_FUNC void experiment_end(experiment *e) {
    char file[80];
    snprintf(file, sizeof file, "%s.jsonl", e->program);
    close_output(e->lines.file[0], file);
}
EX_FUNC void experiment_free(experiment *e) {
    cifar_free(&e->pictures);
    samples_free(&e->samples);
}

// Which names a list with commas asks for ("all": the first `count`): chosen becomes 1 there. A word that is none of
// them ends the program.
EX_FUNC void experiment_choose(const char *program, const char *option, const char *list, size_t count,
                               moe_names *name, unsigned char *chosen) {
    char wrong[128];
    if (strcmp(list, "all") == 0) {
        memset(chosen, 1, count);
        return;
    }
    for (const char *at = list;; at++) {
        size_t length = strcspn(at, ","), i = 0;
        const char *is;
        while ((is = name(NULL, i)) != NULL && (strlen(is) != length || strncmp(is, at, length) != 0)) i++;
        snprintf(wrong, sizeof wrong, "%.*s", (int)length, at);
        if (!is) args_unknown(program, option, wrong, name, NULL);
        chosen[i] = 1;
        at += length;
        if (!*at) return;
    }
}

// ---- a table on the terminal ----

// A number as a cell; "-" where it is not known.
EX_FUNC void experiment_number(char cell[64], const char *format, double v) {
    if (isfinite(v))
        snprintf(cell, 64, format, v);
    else
        snprintf(cell, 64, "-");
}
// n cells, each as wide as its column (negative: at the left).
EX_FUNC void experiment_row(FILE *f, size_t n, const int *width, const char *const *cell) {
    for (size_t i = 0; i < n; i++) fprintf(f, "%*s", width[i], cell[i]);
    fputc('\n', f);
}

// An open page or picture of this experiment: zoo.svg, zoo.html.
EX_FUNC FILE *experiment_file(const experiment *e, const char *ending) {
    char file[80];
    snprintf(file, sizeof file, "%s.%s", e->program, ending);
    return open_output(e->out, file);
}
EX_FUNC void experiment_close(const experiment *e, FILE *f, const char *ending) {
    char file[80];
    snprintf(file, sizeof file, "%s.%s", e->program, ending);
    close_output(f, file);
}

#endif
