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
#include "common/dead.h"
#include "common/experiment.h"
#include "common/game.h"

enum { D = NET_D, T = NET_T, D_FF = 32 };
enum { WINDOWS = 24 };                   // columns of a heat map: spans of training
static const size_t pes_images = 256;    // the experts' similarity is measured on that many test images
static const size_t train_images = 2000; // and the final training loss on that many

// ---- what one training leaves ----

typedef struct config {
    experiment e;
    const char *system, *set;
    int markdown;
} config;

typedef struct result {
    const char *name, *source;
    const moe_system *system; // NULL: no mixture
    size_t experts, active_params;
    double train_loss, test_loss, test_accuracy, tokens_per_s, pes; // NaN: could not be measured
    moe_health health;                                              // on the test images; its arrays are not kept
    double *load; // (experts, WINDOWS): in training, an expert's share of the routes times their number; NaN: none
    double *gamma, *lo, *hi, ecology; // (WINDOWS): gamma_eff with its interval, NaN: not identified; T H / (O + B)
    dead_note dead; // of the same
    int diverged;
} result;

// ---- training and testing ----

static void write_health(json *j, const moe_health *h, const dead_note *dead, int measured) {
    json_real(j, "maxvio", measured ? h->maxvio : NAN);
    json_real(j, "load_cv", measured ? h->load_cv : NAN);
    json_real(j, "load_entropy", measured ? h->load_entropy : NAN);
    dead_json(j, dead);
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
    json_whole(j, "batches", h.n_batches); // what the loads of this line rest on
    json_real(j, "train_loss", loss);
    dead_note dead = dead_take(&h);
    write_health(j, &h, &dead, 1);
    dead_free(&dead);
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
static void train(result *r, config *o, const moe_desc *desc, progress *p, size_t before, const char *label) {
    const net_plan *plan = &o->e.plan;
    const samples *data = &o->e.samples;
    net *m = net_new(plan, desc);
    size_t count = data->train->count, steps = 0;
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
        size_t window = step * WINDOWS / plan->total, next = (step + 1) * WINDOWS / plan->total;
        if (desc && next > window) { // each step is in one window; below WINDOWS steps some have none
            note_window(r, m, &played, &o->e.lines, window, step + 1, loss / (double)steps);
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
        r->dead = dead_take(&r->health);
        if (r->experts > 1) nn_must(moe_layer_pes(m->moe, data->test.x, few * T, &r->pes));
    }
    if (r->diverged) r->train_loss = r->test_loss = r->test_accuracy = r->tokens_per_s = NAN;
    net_free(m);
}

// ---- the report ----

static void write_config(config *o, const moe_system *const *row, const moe_desc *desc, size_t n) {
    json *j = &o->e.lines;
    experiment_config(&o->e);
    json_object_begin(j, "layers");
    for (size_t i = 0; i < n; i++) experiment_layer(&o->e, row[i]->name, &desc[i]);
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
    write_health(j, &r->health, &r->dead, !r->diverged);
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
static const int width[COLUMNS] = {-19, 9, 10, 12, 8, 10, 8, 7, 9, 17, 9, 7, 0};

static void row_cells(const result *r, char cell[COLUMNS][64]) {
    const moe_health *h = &r->health;
    double known = r->diverged || !r->experts ? NAN : 0; // makes what was not measured NaN
    snprintf(cell[0], 64, "%s", r->name);
    experiment_number(cell[1], "%.4f", r->test_loss);
    if (r->diverged) snprintf(cell[1], 64, "diverged");
    experiment_number(cell[2], "%.1f%%", 100 * r->test_accuracy);
    experiment_number(cell[3], "%.4f", r->train_loss);
    experiment_number(cell[4], "%.0f", (double)r->active_params);
    experiment_number(cell[5], "%.0f", r->tokens_per_s);
    experiment_number(cell[6], "%.2f", h->maxvio + known);
    experiment_number(cell[7], "%.2f", h->load_cv + known);
    experiment_number(cell[8], "%.3f", h->load_entropy + known);
    dead_text(&r->dead, cell[9], 64);
    experiment_number(cell[10], "%.1f%%", 100 * h->drop_rate + known);
    experiment_number(cell[11], "%.3f", r->pes);
    snprintf(cell[12], 64, "%s", r->source);
}

static void print_row(FILE *f, const result *r) {
    char cell[COLUMNS][64];
    const char *at[COLUMNS];
    row_cells(r, cell);
    for (int i = 0; i < COLUMNS; i++) at[i] = cell[i];
    experiment_row(f, COLUMNS - 1, width, at);
}

static void print_table(FILE *f, const result *r, size_t n, const result *without) {
    fputc('\n', f);
    experiment_row(f, COLUMNS - 1, width, heading_short);
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

static void write_page(const config *o, const result *r, size_t n, const result *without) {
    char text[512];
    const net_plan *plan = &o->e.plan;
    const samples *data = &o->e.samples;
    FILE *f = experiment_file(&o->e, "html");
    snprintf(text, sizeof text,
             "%zu systems, each %zu steps of %zu images (%zu for training, %zu for the test), seed %llu. Loads and PES "
             "are those of the test.",
             n, plan->total, plan->batch, data->train->count, data->test.count, (unsigned long long)plan->seed);
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
    experiment_close(&o->e, f, "html");
}

// ---- the program ----

// The rows that --system asks for, in the order of the table.
static const char *system_name(size_t i) { return moe_system_at(i)->name; }
static size_t choose(const config *o, const moe_system **row) {
    char wrong[128], near[512];
    size_t n = 0, count = moe_systems_count();
    unsigned char *chosen = allocate(count, 1);
    if (experiment_choose(o->system, count, system_name, chosen, wrong)) {
        moe_system_near(wrong, near, sizeof near);
        args_fail("zoo", "--system: there is no '%s'%s%s", wrong, *near ? "; near: " : "", near);
    }
    for (size_t i = 0; i < count; i++)
        if (chosen[i]) row[n++] = moe_system_at(i);
    free(chosen);
    return n;
}

static moe_desc layer_desc(const config *o, const moe_system *row) {
    moe_desc d = {0};
    moe_status s = moe_desc_system(&d, row->name);
    d.d_model = D;
    d.sequence = T;
    if (!d.d_ff) d.d_ff = d.n_experts == 1 ? 2 * D_FF : D_FF; // dense: as much as two experts
    if (o->e.experts && d.n_experts != 1) d.n_experts = o->e.experts;
    if (o->e.top_k && d.n_experts != 1) nn_top_k(&d, o->e.top_k);
    size_t at = 0;
    if (!s && o->set && (s = moe_desc_parse(&d, o->set, &at)) != MOE_OK)
        args_fail("zoo", "--set: at '%s': %s", o->set + at, moe_status_string(s));
    // k and temperature are at their ends for the last quarter of the training
    if (d.schedule_steps) d.schedule_steps = o->e.plan.total - o->e.plan.total / 4;
    d.weight_decay = o->e.plan.decay;
    d.seed = o->e.plan.seed + 1;
    d.parallel.n_threads = o->e.plan.threads;
    if (!s) s = moe_desc_resolve(&d, &d);
    if (s) args_fail("zoo", "%s: %s", row->name, moe_status_string(s));
    return d;
}

// A first batch through a new layer: what it cannot do with these shapes is known before anything is trained.
static void try_layer(const config *o, const moe_system *row, const moe_desc *desc) {
    net *m = net_new(&o->e.plan, desc);
    for (size_t i = 0; i < o->e.plan.batch; i++) net_take(m, i, &o->e.samples.train[0], i);
    moe_status s = moe_forward(m->moe, m->x, o->e.plan.batch * T, m->y);
    if (s != MOE_OK && moe_status_kind(s) != MOE_KIND_NUMBER)
        args_fail("zoo", "%s: %s", row->name, moe_status_string(s));
    net_free(m);
}

// Trains them all, with one line of progress; r (n) in the order of the losses at the end.
static void run(config *o, const moe_system *const *row, const moe_desc *desc, result *r, size_t n, result *without) {
    json *j = &o->e.lines;
    train(without, o, NULL, NULL, 0, NULL);
    json_begin(j);
    json_text(j, "event", "baseline");
    json_real(j, "train_loss", without->train_loss);
    json_real(j, "test_loss", without->test_loss);
    json_real(j, "test_accuracy", without->test_accuracy);
    json_end(j);
    progress p = progress_begin("zoo", "steps", n * o->e.plan.total, o->e.quiet);
    for (size_t i = 0; i < n; i++) {
        char label[160];
        snprintf(label, sizeof label, "%s (%zu of %zu)", row[i]->name, i + 1, n);
        r[i].name = row[i]->name;
        r[i].source = row[i]->source;
        r[i].system = row[i];
        train(&r[i], o, &desc[i], &p, i * o->e.plan.total, label);
    }
    progress_clear(&p);
    qsort(r, n, sizeof *r, compare);
    for (size_t i = 0; i < n; i++) write_final(j, &r[i]);
}

static void report(config *o, const result *r, size_t n, const result *without) {
    experiment_end(&o->e);
    FILE *svg = experiment_file(&o->e, "svg");
    draw(svg, r, n);
    experiment_close(&o->e, svg, "svg");
    write_page(o, r, n, without);
    (o->markdown ? print_markdown : print_table)(o->e.human, r, n, without);
    fprintf(o->e.human, "\n%.1f s; loads and PES on the test images; see %s/zoo.html, .svg, .jsonl\n",
            seconds_now() - o->e.begin, o->e.out);
}

int main(int argc, char **argv) {
    config o = {.e = experiment_defaults("zoo"), .system = "all"};
    args_option options[] = {
        EXPERIMENT_OPTIONS(&o.e),
        ARGS_SYSTEM(&o.system, "a name, or several with commas between"),
        {"set", ARGS_TEXT, &o.set, "TEXT", "fields of the desc for every system: \"gate=sigmoid loss.z=0.01\"", 0, 0},
        {"markdown", ARGS_FLAG, &o.markdown, NULL, "print the table as Markdown", 0, 0},
    };
    args_parse("zoo", "Trains every routing system on the same pictures with the same budget.", options,
               sizeof options / sizeof *options, argc, argv);
    const moe_system **row = allocate(moe_systems_count(), sizeof *row);
    size_t n = choose(&o, row);
    experiment_load(&o.e, argv[0], (experiment_by_data){{20, 5}, {2e-3, 4e-3}});
    moe_desc *desc = allocate(n, sizeof *desc);
    for (size_t i = 0; i < n; i++) desc[i] = layer_desc(&o, row[i]);
    experiment_begin(&o.e);
    for (size_t i = 0; i < n; i++) try_layer(&o, row[i], &desc[i]);
    write_config(&o, row, desc, n);

    result without = {.name = "(no mixture)", .source = ""}, *r = allocate(n, sizeof *r);
    run(&o, row, desc, r, n, &without);
    report(&o, r, n, &without);
    for (size_t i = 0; i < n; i++) free(r[i].load), dead_free(&r[i].dead);
    free(without.load);
    experiment_free(&o.e);
    free(r);
    free(row);
    free(desc);
    return 0;
}
