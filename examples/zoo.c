// zoo.c - every routing system of moe.h's table learns the same real pictures with the same budget.
//
//     build/zoo                          all of them, on the sample of CIFAR-10 that the repository carries
//     build/zoo --system switch,base     some of them
//     build/zoo --data DIR               on the full data set
//
// A frozen extractor, fitted once without labels (common/features.h), turns an image into a sequence of 16 tokens of 64
// numbers. What learns:  tokens x -> x + MoE(x) -> mean over the image's tokens -> linear -> class. Every system gets
// the same batches in the same order, the same steps, learning rate and seed. A token's id, for systems that route by
// it, is its visual word. Since position is a part of a token and the mean forgets order, nothing but the mixture can
// use where in an image something is; the same network without a mixture is printed for comparison.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/game.h"
#include "common/json.h"
#include "common/plot.h"
#include "common/tokens_net.h"

enum { D = NET_D, T = NET_T, D_FF = 32 };
enum { WINDOWS = 24 };                   // columns of a heat map: spans of training
static const size_t pes_images = 256;    // the experts' similarity is measured on that many test images
static const size_t train_images = 2000; // and the final training loss on that many

// ---- what one training leaves ----

typedef struct config {
    const char *data, *system, *set, *isa, *out;
    size_t epochs, steps, images, experts, top_k;
    int json, quiet, markdown;
    net_plan plan;
} config;

typedef struct result {
    const char *name, *source;
    const moe_system *system; // NULL: no mixture
    size_t experts, active_params;
    double train_loss, test_loss, test_accuracy, tokens_per_s, pes; // NaN: could not be measured
    moe_health health;                                              // on the test images; its arrays are not kept
    double *load; // (experts, WINDOWS): in training, an expert's share of the routes times their number; NaN: none
    double *gamma, *lo, *hi, ecology; // (WINDOWS): gamma_eff with its interval, NaN: not identified; T H / (O + B)
    int diverged;
} result;

// ---- training and testing ----

static void write_health(json *j, const moe_health *h, int measured) {
    json_real(j, "maxvio", measured ? h->maxvio : NAN);
    json_real(j, "load_cv", measured ? h->load_cv : NAN);
    json_real(j, "load_entropy", measured ? h->load_entropy : NAN);
    if (measured)
        json_whole(j, "dead", h->n_dead);
    else
        json_raw(j, "dead", "null");
    json_real(j, "dropped", measured ? h->drop_rate : NAN);
}

// The end of a window of training: its line, and its column of the heat map.
static void note_window(result *r, net *m, game *g, json *j, size_t window, size_t step, double loss) {
    moe_health h;
    game_note note = game_end(g, m->moe, &m->ops.parallel);
    r->gamma[window] = note.gamma;
    r->lo[window] = note.lo;
    r->hi[window] = note.hi;
    r->ecology = note.ecology;
    nn_must(moe_layer_health(m->moe, &h));
    json_begin(j);
    json_text(j, "event", "step");
    json_text(j, "system", r->name);
    json_whole(j, "step", step);
    json_real(j, "train_loss", loss);
    write_health(j, &h, 1);
    game_json(j, &note);
    json_list_begin(j, "load"); // 1 = an even share
    for (size_t e = 0; e < r->experts; e++) {
        double load = h.n_selected ? (double)h.load[e] * (double)r->experts / (double)h.n_selected : NAN;
        json_real(j, NULL, r->load[e * WINDOWS + window] = load);
    }
    json_list_end(j);
    json_end(j);
    nn_must(moe_layer_health_reset(m->moe));
}

// Trains and tests; desc NULL: without a mixture.
static void train(result *r, const config *o, const moe_desc *desc, const samples *data, json *j, progress *p,
                  size_t before, const char *label) {
    const net_plan *plan = &o->plan;
    net *m = net_new(plan, desc);
    size_t count = data->train->count, window = 0, steps = 0;
    double loss = 0, accuracy = 0, busy = 0;
    r->experts = desc ? desc->n_experts : 0;
    r->active_params = m->bank.count + (desc ? moe_layer_active_params(m->moe) : 0);
    r->train_loss = r->test_loss = r->test_accuracy = r->tokens_per_s = r->pes = NAN;
    r->load = allocate((r->experts + 3) * WINDOWS, sizeof(double));
    for (size_t i = 0; i < (r->experts + 3) * WINDOWS; i++) r->load[i] = NAN;
    r->gamma = r->load + r->experts * WINDOWS;
    r->lo = r->gamma + WINDOWS;
    r->hi = r->lo + WINDOWS;
    game played = {.taken = 0};
    if (desc) played = game_new(m->moe, plan->total / WINDOWS + 1);
    for (size_t step = 0; step < plan->total; step++) {
        double begin = seconds_now(), batch_loss;
        r->diverged = net_step(m, plan, data, step, &batch_loss);
        if (r->diverged) break;
        if (desc) game_take(&played, m->moe);
        loss += batch_loss;
        steps++;
        busy += seconds_now() - begin;
        if (desc && step + 1 >= (window + 1) * plan->total / WINDOWS) {
            note_window(r, m, &played, j, window, step + 1, loss / (double)steps);
            window = (step + 1) * WINDOWS / plan->total;
            loss = 0;
            steps = 0;
        }
        if (p) progress_update(p, before + step + 1, "%s  loss %.3f", label, batch_loss);
    }
    game_free(&played);
    if (busy > 0) r->tokens_per_s = (double)(plan->total * plan->batch * T) / busy;
    size_t some = count < train_images ? count : train_images, few = data->test.count;
    if (few > pes_images) few = pes_images;
    if (!r->diverged) r->diverged = net_test(m, plan, &data->train[0], some, &r->train_loss, &accuracy);
    if (!r->diverged) r->diverged = net_test(m, plan, &data->test, data->test.count, &r->test_loss, &r->test_accuracy);
    if (!r->diverged && desc) {
        nn_must(moe_layer_health(m->moe, &r->health));
        if (r->experts > 1) nn_must(moe_layer_pes(m->moe, data->test.x, few * T, &r->pes));
    }
    if (r->diverged) r->train_loss = r->test_loss = r->test_accuracy = r->tokens_per_s = NAN;
    net_free(m);
}

// ---- the report ----

static void write_config(json *j, const config *o, const samples *data, const moe_system *const *row,
                         const moe_desc *desc, size_t n) {
    char layer[4096];
    json_begin(j);
    json_text(j, "event", "config");
    json_text(j, "program", "zoo");
    json_text(j, "moe", MOE_VERSION);
    json_text(j, "data", o->data ? o->data : "sample");
    json_whole(j, "train_images", data->train->count);
    json_whole(j, "test_images", data->test.count);
    json_whole(j, "tokens_per_image", T);
    json_whole(j, "seed", o->plan.seed);
    json_whole(j, "epochs", o->epochs);
    json_whole(j, "steps", o->plan.total);
    json_whole(j, "batch", o->plan.batch);
    json_real(j, "lr", o->plan.lr);
    json_real(j, "weight_decay", (double)o->plan.decay);
    json_real(j, "label_smoothing", (double)o->plan.smoothing);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_whole(j, "threads", moe_workers(&(moe_parallel){.n_threads = o->plan.threads}));
    json_object_begin(j, "layers");
    for (size_t i = 0; i < n; i++) {
        moe_desc_json(&desc[i], layer, sizeof layer);
        json_raw(j, row[i]->name, layer);
    }
    json_object_end(j);
    json_end(j);
}

static void write_final(json *j, const result *r) {
    json_begin(j);
    json_text(j, "event", "final");
    json_text(j, "system", r->name);
    json_text(j, "source", r->source);
    json_real(j, "train_loss", r->train_loss);
    json_real(j, "test_loss", r->test_loss);
    json_real(j, "test_accuracy", r->test_accuracy);
    json_real(j, "tokens_per_s", r->tokens_per_s);
    write_health(j, &r->health, !r->diverged);
    json_real(j, "pes", r->pes);
    json_raw(j, "diverged", r->diverged ? "true" : "false");
    json_end(j);
}

// By test loss; what diverged stands at the end, in the order of the table.
static int compare(const void *a, const void *b) {
    const result *x = a, *y = b;
    if (x->diverged != y->diverged) return x->diverged - y->diverged;
    if (!x->diverged && x->test_loss != y->test_loss) return x->test_loss < y->test_loss ? -1 : 1;
    return x->system < y->system ? -1 : x->system > y->system;
}

// The table's columns, with their widths on a terminal (negative: at the left).
enum { COLUMNS = 13 };
static const char *const heading[COLUMNS] = {"system",  "test loss", "test accuracy", "train loss", "active parameters",
                                             "tokens/s", "MaxVio",   "CV",            "entropy",    "dead",
                                             "dropped",  "PES",      "source"};
static const char *const heading_short[COLUMNS] = {"system", "test loss", "accuracy", "train loss", "active",
                                                   "tokens/s", "MaxVio", "CV", "entropy", "dead", "dropped", "PES", ""};
static const int width[COLUMNS] = {-19, 9, 10, 12, 8, 10, 8, 7, 9, 6, 9, 7, 0};

static void number(char cell[64], const char *format, double v) {
    if (isfinite(v))
        snprintf(cell, 64, format, v);
    else
        snprintf(cell, 64, "-");
}

static void row_cells(const result *r, char cell[COLUMNS][64]) {
    const moe_health *h = &r->health;
    double known = r->diverged || !r->experts ? NAN : 0; // makes what was not measured NaN
    snprintf(cell[0], 64, "%s", r->name);
    number(cell[1], "%.4f", r->test_loss);
    if (r->diverged) snprintf(cell[1], 64, "diverged");
    number(cell[2], "%.1f%%", 100 * r->test_accuracy);
    number(cell[3], "%.4f", r->train_loss);
    number(cell[4], "%.0f", (double)r->active_params);
    number(cell[5], "%.0f", r->tokens_per_s);
    number(cell[6], "%.2f", h->maxvio + known);
    number(cell[7], "%.2f", h->load_cv + known);
    number(cell[8], "%.3f", h->load_entropy + known);
    number(cell[9], "%.0f", (double)h->n_dead + known);
    number(cell[10], "%.1f%%", 100 * h->drop_rate + known);
    number(cell[11], "%.3f", r->pes);
    snprintf(cell[12], 64, "%s", r->source);
}

static void print_row(FILE *f, const result *r) {
    char cell[COLUMNS][64];
    row_cells(r, cell);
    for (int i = 0; i < COLUMNS - 1; i++) fprintf(f, "%*s", width[i], cell[i]);
    fputc('\n', f);
}

static void print_table(FILE *f, const result *r, size_t n, const result *without) {
    fputc('\n', f);
    for (int i = 0; i < COLUMNS - 1; i++) fprintf(f, "%*s", width[i], heading_short[i]);
    fputc('\n', f);
    for (size_t i = 0; i < n; i++) print_row(f, &r[i]);
    print_row(f, without);
}

static void print_markdown(FILE *f, const result *r, size_t n, const result *without) {
    char cell[COLUMNS][64];
    for (int i = 0; i < COLUMNS; i++) fprintf(f, "| %s ", heading[i]);
    fputs("|\n", f);
    for (int i = 0; i < COLUMNS; i++) fputs(i == 0 || i == COLUMNS - 1 ? "|---" : "|---:", f);
    fputs("|\n", f);
    for (size_t k = 0; k <= n; k++) {
        row_cells(k < n ? &r[k] : without, cell);
        for (int i = 0; i < COLUMNS; i++) fprintf(f, "| %s ", cell[i]);
        fputs("|\n", f);
    }
}

// The load of each system's experts over time, on one scale.
static void draw(FILE *f, const result *r, size_t n) {
    enum { ACROSS = 3, W = 320, H = 200 };
    size_t down = (n + ACROSS - 1) / ACROSS;
    plot_begin(f, ACROSS * W, (double)(down * H), "Load of the experts in training");
    for (size_t i = 0; i < n; i++) {
        char title[80];
        snprintf(title, sizeof title, "%s%s", r[i].name, r[i].diverged ? " (diverged)" : "");
        plot_heat(f, &(plot_map){.box = {(double)(i % ACROSS) * W, (double)(i / ACROSS) * H, W, H},
                                 .title = title,
                                 .x_label = "time",
                                 .rows = r[i].experts,
                                 .cols = WINDOWS,
                                 .value = r[i].load,
                                 .hi = 2,
                                 .col_first = 1,
                                 .scale_format = "%.0f"});
    }
    plot_end(f);
}

// Each system's congestion over time: docs/gamma.md.
static void draw_gamma(FILE *f, const result *r, size_t n) {
    enum { ACROSS = 3, W = 320, H = 190 };
    double time[WINDOWS];
    for (size_t i = 0; i < WINDOWS; i++) time[i] = (double)(i + 1);
    plot_begin(f, ACROSS * W, (double)((n + ACROSS - 1) / ACROSS * H), "gamma_eff of the routing in training");
    for (size_t i = 0; i < n; i++) {
        char title[80];
        size_t told = 0;
        for (size_t k = 0; k < WINDOWS; k++) told += isfinite(r[i].gamma[k]);
        snprintf(title, sizeof title, "%s, E %.3g%s", r[i].name, r[i].ecology, told ? "" : ", unidentified");
        plot_points(f, &(plot_point_chart){.box = {(double)(i % ACROSS) * W, (double)(i / ACROSS) * H, W, H},
                                           .title = title,
                                           .x_label = "time",
                                           .n = WINDOWS,
                                           .x = time,
                                           .y = r[i].gamma,
                                           .lo = r[i].lo,
                                           .hi = r[i].hi,
                                           .joined = 1});
    }
    plot_end(f);
}

static void page_result(FILE *f, const result *r) {
    char cell[COLUMNS][64];
    row_cells(r, cell);
    page_row(f, 0, "%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|<%s", cell[0], cell[1], cell[2], cell[3], cell[4], cell[5],
             cell[6], cell[7], cell[8], cell[9], cell[10], cell[11], cell[12]);
}

static void write_page(const config *o, const result *r, size_t n, const result *without, const samples *data) {
    char text[512];
    FILE *f = open_output(o->out, "zoo.html");
    snprintf(text, sizeof text,
             "%zu systems, each %zu steps of %zu images (%zu for training, %zu for the test), seed %llu. Loads and PES "
             "are those of the test.",
             n, o->plan.total, o->plan.batch, data->train->count, data->test.count, (unsigned long long)o->plan.seed);
    page_begin(f, "A zoo of routers", text);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|<%s", heading[0], heading[1], heading[2], heading[3],
             heading[4], heading[5], heading[6], heading[7], heading[8], heading[9], heading[10], heading[11],
             heading[12]);
    for (size_t i = 0; i < n; i++) page_result(f, &r[i]);
    page_result(f, without);
    page_table_end(f);
    page_card_end(f);
    snprintf(text, sizeof text,
             "Load of the experts in training, %d spans of time: 1 = an even share, 2 = twice that or more", WINDOWS);
    page_heading(f, text);
    page_card(f);
    draw(f, r, n);
    page_card_end(f);
    page_heading(f,
                 "gamma_eff over the same time, with 95% intervals, where the data tell it; E is the ecology number");
    page_card(f);
    draw_gamma(f, r, n);
    page_card_end(f);
    page_heading(f, "The systems");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "name|<what it is|<what it is for|<what it cannot do, or needs|<source|mark");
    for (size_t i = 0; i < n; i++) {
        const moe_system *s = r[i].system;
        page_row(f, 0, "%s|<%s|<%s|<%s|<%s|%s", s->name, s->title, s->purpose, s->limits, s->source, s->mark);
    }
    page_table_end(f);
    page_card_end(f);
    page_end(f);
    close_output(f, "zoo.html");
}

// ---- the program ----

// The rows that --system asks for, in the order of the table.
static size_t choose(const config *o, const moe_system **row) {
    char name[128], near[512];
    unsigned char *chosen = allocate(moe_systems_count(), 1);
    int all = strcmp(o->system, "all") == 0;
    for (const char *at = o->system; !all; at++) {
        size_t length = strcspn(at, ","), i = 0;
        snprintf(name, sizeof name, "%.*s", (int)(length < 127 ? length : 127), at);
        while (i < moe_systems_count() && strcmp(moe_system_at(i)->name, name) != 0) i++;
        if (i == moe_systems_count()) {
            moe_system_near(name, near, sizeof near);
            args_fail("zoo", "--system: there is no '%s'%s%s", name, *near ? "; near: " : "", near);
        }
        chosen[i] = 1;
        at += length;
        if (!*at) break;
    }
    size_t n = 0;
    for (size_t i = 0; i < moe_systems_count(); i++)
        if (all || chosen[i]) row[n++] = moe_system_at(i);
    free(chosen);
    return n;
}

static moe_desc layer_desc(const config *o, const moe_system *row) {
    moe_desc d = {0};
    moe_status s = moe_desc_system(&d, row->name);
    d.d_model = D;
    d.sequence = T;
    if (!d.d_ff) d.d_ff = d.n_experts == 1 ? 2 * D_FF : D_FF; // dense: as much as two experts
    if (o->experts && d.n_experts != 1) d.n_experts = o->experts;
    if (o->top_k && d.n_experts != 1) d.top_k = o->top_k;
    size_t at = 0;
    if (!s && o->set && (s = moe_desc_parse(&d, o->set, &at)) != MOE_OK)
        args_fail("zoo", "--set: at '%s': %s", o->set + at, moe_status_string(s));
    // k and temperature are at their ends for the last quarter of the training
    if (d.schedule_steps) d.schedule_steps = o->plan.total - o->plan.total / 4;
    d.weight_decay = o->plan.decay;
    d.seed = o->plan.seed + 1;
    d.parallel.n_threads = o->plan.threads;
    if (!s) s = moe_desc_resolve(&d, &d);
    if (s) args_fail("zoo", "%s: %s", row->name, moe_status_string(s));
    return d;
}

// A first batch through a new layer: what it cannot do with these shapes is known before anything is trained.
static void try_layer(const config *o, const moe_system *row, const moe_desc *desc, const samples *data) {
    net *m = net_new(&o->plan, desc);
    for (size_t i = 0; i < o->plan.batch; i++) net_take(m, i, &data->train[0], i);
    moe_status s = moe_forward(m->moe, m->x, o->plan.batch * T, m->y);
    if (s != MOE_OK && moe_status_kind(s) != MOE_KIND_NUMBER)
        args_fail("zoo", "%s: %s", row->name, moe_status_string(s));
    net_free(m);
}

int main(int argc, char **argv) {
    config o = {.system = "all", .isa = "auto", .out = "out", .plan = {.seed = 1}};
    args_option options[] = {
        ARGS_DATA(&o.data),
        ARGS_EPOCHS(&o.epochs),
        ARGS_STEPS(&o.steps),
        ARGS_SEED(&o.plan.seed),
        ARGS_THREADS(&o.plan.threads),
        ARGS_ISA(&o.isa),
        ARGS_SYSTEM(&o.system, "a name, or several with commas between"),
        ARGS_EXPERTS(&o.experts),
        ARGS_TOP_K(&o.top_k),
        {"batch", ARGS_SIZE, &o.plan.batch, "N", "images a step (0: by the data)", 0, 8192},
        {"images", ARGS_SIZE, &o.images, "N", "only the first N of the training and of the test set (0: all)", 0, 0},
        {"lr", ARGS_REAL, &o.plan.lr, "X", "highest learning rate (0: by the data)", 0, 1e30},
        {"set", ARGS_TEXT, &o.set, "TEXT", "fields of the desc for every system: \"gate=sigmoid loss.z=0.01\"", 0, 0},
        {"markdown", ARGS_FLAG, &o.markdown, NULL, "print the table as Markdown", 0, 0},
        ARGS_OUT(&o.out),
        ARGS_JSON(&o.json),
        ARGS_QUIET(&o.quiet),
    };
    args_parse("zoo", "Trains every routing system on the same pictures with the same budget.", options,
               sizeof options / sizeof *options, argc, argv);
    if (!nn_use_isa(o.isa)) args_fail("zoo", "--isa: there is no '%s'", o.isa);
    const moe_system **row = allocate(moe_systems_count(), sizeof *row);
    size_t n = choose(&o, row);

    cifar pictures;
    samples data;
    cifar_load(&pictures, o.data, argv[0]);
    if (o.images && o.images < pictures.train.count) pictures.train.count = o.images;
    if (o.images && o.images < pictures.test.count) pictures.test.count = o.images;
    if (!o.epochs) o.epochs = pictures.sample ? 20 : 5;
    if (!o.plan.batch) o.plan.batch = pictures.sample ? 50 : 250;
    if (o.plan.lr <= 0) o.plan.lr = pictures.sample ? 2e-3 : 4e-3;
    o.plan.smoothing = 0.1f;
    o.plan.decay = 0.05f;
    if (o.plan.batch > pictures.train.count)
        args_fail("zoo", "--batch: only %zu training images", pictures.train.count);
    o.plan.total = pictures.train.count / o.plan.batch * o.epochs;
    if (o.steps && o.steps < o.plan.total) o.plan.total = o.steps;
    moe_desc *desc = allocate(n, sizeof *desc);
    for (size_t i = 0; i < n; i++) desc[i] = layer_desc(&o, row[i]);

    FILE *human = o.json ? stderr : stdout;
    nn ops = {.parallel = {.n_threads = o.plan.threads}};
    double begin = seconds_now();
    data = samples_make(&ops, &pictures, o.plan.seed, o.quiet);
    nn_free(&ops);
    for (size_t i = 0; i < n; i++) try_layer(&o, row[i], &desc[i], &data);
    json j = {{open_output(o.out, "zoo.jsonl"), o.json ? stdout : NULL}, 0};
    write_config(&j, &o, &data, row, desc, n);
    fprintf(human, "CIFAR-10%s: %zu training and %zu test images, %d tokens each (made in %.1f s); %s, %zu thread%s\n",
            pictures.sample ? " sample" : "", pictures.train.count, pictures.test.count, T, seconds_now() - begin,
            moe_isa_name(moe_active_isa()), moe_workers(&ops.parallel), moe_workers(&ops.parallel) == 1 ? "" : "s");
    fflush(human);
    cifar_free(&pictures);

    result without = {.name = "(no mixture)", .source = ""}, *r = allocate(n, sizeof *r);
    train(&without, &o, NULL, &data, &j, NULL, 0, NULL);
    json_begin(&j);
    json_text(&j, "event", "baseline");
    json_real(&j, "train_loss", without.train_loss);
    json_real(&j, "test_loss", without.test_loss);
    json_real(&j, "test_accuracy", without.test_accuracy);
    json_end(&j);
    progress p = progress_begin("zoo", "steps", n * o.plan.total, o.quiet);
    for (size_t i = 0; i < n; i++) {
        char label[160];
        snprintf(label, sizeof label, "%s (%zu of %zu)", row[i]->name, i + 1, n);
        r[i].name = row[i]->name;
        r[i].source = row[i]->source;
        r[i].system = row[i];
        train(&r[i], &o, &desc[i], &data, &j, &p, i * o.plan.total, label);
    }
    progress_clear(&p);
    qsort(r, n, sizeof *r, compare);
    for (size_t i = 0; i < n; i++) write_final(&j, &r[i]);
    close_output(j.file[0], "zoo.jsonl");
    FILE *svg = open_output(o.out, "zoo.svg");
    draw(svg, r, n);
    close_output(svg, "zoo.svg");
    write_page(&o, r, n, &without, &data);

    (o.markdown ? print_markdown : print_table)(human, r, n, &without);
    fprintf(human, "\n%.1f s; loads and PES on the test images; see %s/zoo.html, .svg, .jsonl\n", seconds_now() - begin,
            o.out);
    for (size_t i = 0; i < n; i++) free(r[i].load);
    samples_free(&data);
    free(without.load);
    free(r);
    free(row);
    free(desc);
    return 0;
}
