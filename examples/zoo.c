// zoo.c - every routing system of moe.h's table learns the same real pictures with the same budget.
//
//     build/zoo                          all of them, on the sample of CIFAR-10 that the repository carries
//     build/zoo --system switch,base     some of them
//     build/zoo --data DIR               on the full data set
//     build/zoo --seeds 3                with three seeds: mean and standard deviation
//     build/zoo --as-is                  experts of one width, outputs as they begin
//
// A frozen extractor, fitted once without labels (common/features.h), turns an image into a sequence of 16 tokens of 64
// numbers. What learns:  tokens x -> x + MoE(x) -> mean over the image's tokens -> linear -> class. Every system gets
// the same batches in the same order, the same steps, learning rate and seed. A token's id, for systems that route by
// it, is its visual word. So that systems are compared and not sizes, the width of a row's experts is chosen so that a
// token uses as many parameters as in the row `dense`, and the experts' last matrices are scaled so that the mixture's
// output begins as large as there (--as-is: neither). What else is not alike stands in the table, as notes.
//
// Since position is a part of a token and the mean forgets order, nothing but the mixture can use where in an image
// something is; the same network without a mixture is printed for comparison.
#define MOE_IMPLEMENTATION
#include "common/dead.h"
#include "common/experiment.h"
#include "common/game.h"
#include "common/spread.h"

enum { D = NET_D, T = NET_T, D_FF = 32 };
enum { WINDOWS = 24 };                   // columns of a heat map: spans of training
static const size_t pes_images = 256;    // the experts' similarity is measured on that many test images
static const size_t train_images = 2000; // and the final training loss on that many

// ---- what one training leaves ----

typedef struct config {
    experiment e;
    const char *system, *set;
    size_t seeds;
    int as_is, markdown, list;
    double output; // root mean square of dense's output at the start over that of its input
} config;

// A mixture before its training, on a first batch.
typedef struct start {
    double output;   // as in config, with the factor
    double factor;   // of the experts' last matrices; 1: as the library makes them
    double p_max;    // mean over the tokens of the highest p; NaN: the row has no softmax of logits
    size_t params, active_params;
    double expert; // parameters of one expert
} start;

typedef struct result {
    const char *name, *source;
    const moe_system *system; // NULL: no mixture, as desc
    const moe_desc *desc;
    start start;
    uint64_t seed;
    size_t experts;
    double train_loss, test_loss, test_accuracy, tokens_per_s, pes; // NaN: could not be measured
    moe_health health;                                              // on the test images; its arrays are not kept
    double *load; // (experts, WINDOWS): in training, an expert's share of the routes times their number; NaN: none
    double *gamma, *lo, *hi, ecology; // (WINDOWS): gamma_eff with its interval, NaN: not identified; T H / (O + B)
    dead_note dead; // of the same
    double taken;   // experts that a token selects there
    double active;  // parameters that a token used there: as many experts as it selected, not as desc.top_k says
    int diverged;
    spread over_loss, over_accuracy, over_train; // over the seeds
    size_t n_diverged;                           // of the seeds
} result;

// ---- the start ----

// What is not as the library makes it in the zoo, and why; not with --as-is.
typedef struct mend {
    const char *system, *set, *note;
} mend;
static const mend mends[] = {
    {"smear", "temperature=8", "temperature 8 = sqrt(d): at 1 its softmax begins saturated"},
};
static const mend *mend_of(const config *o, const moe_system *row) {
    for (size_t i = 0; !o->as_is && row && i < sizeof mends / sizeof *mends; i++)
        if (strcmp(mends[i].system, row->name) == 0) return &mends[i];
    return NULL;
}

static void scale_output(moe_layer *m, double factor) {
    moe_tensor t;
    for (size_t i = 0; factor != 1 && moe_layer_tensor(m, i, &t) == MOE_OK; i++) {
        if (strcmp(t.name, "experts.w2") != 0) continue;
        float *w = allocate(t.count, sizeof *w);
        nn_must(moe_layer_get(m, MOE_PART_PARAMS, t.name, w, t.count));
        for (size_t k = 0; k < t.count; k++) w[k] = (float)((double)w[k] * factor);
        nn_must(moe_layer_set(m, MOE_PART_PARAMS, t.name, w, t.count));
        free(w);
    }
}

// Of p = softmax(logits / temperature), where that is what weights are made from.
static double highest_p(const moe_tape *t, const moe_desc *desc) {
    double sum = 0;
    if (desc->combine == MOE_COMBINE_SOFT || desc->gate == MOE_GATE_SIGMOID || desc->gate == MOE_GATE_RELU ||
        desc->gate == MOE_GATE_SIGN || desc->score == MOE_SCORE_HASH)
        return NAN;
    for (size_t i = 0; i < t->n_tokens; i++) {
        double top = 0;
        for (size_t e = 0; e < desc->n_experts; e++) top = fmax(top, (double)t->prob[i * desc->n_experts + e]);
        sum += top;
    }
    return sum / (double)t->n_tokens;
}

// Experts with parameters: the others stand behind them.
static size_t networks(const moe_desc *d) { return d->n_experts - d->n_zero - d->n_copy - d->n_constant; }
static double expert_params(const moe_layer *m) {
    const moe_desc *d = moe_layer_desc(m);
    moe_tensor t;
    size_t count = 0;
    for (size_t i = 0; moe_layer_tensor(m, i, &t) == MOE_OK; i++)
        if (strncmp(t.name, "experts.w", 9) == 0 || strncmp(t.name, "experts.b", 9) == 0) count += t.count;
    return (double)count / (double)(networks(d) + d->n_shared);
}
// What a token used in the test: the start's count has top_k experts in it, where a token's own choice decides.
static double measured_active(const result *r, const moe_desc *desc, size_t n_tokens) {
    uint64_t chosen = 0;
    if (desc->combine == MOE_COMBINE_SOFT || desc->combine == MOE_COMBINE_MERGE) return (double)r->start.active_params;
    for (size_t e = 0; e < networks(desc); e++) chosen += r->health.load[e];
    double counted = (double)(desc->top_k < networks(desc) ? desc->top_k : networks(desc));
    return (double)r->start.active_params + r->start.expert * ((double)chosen / (double)n_tokens - counted);
}

// A first batch through a new layer. What it cannot do with these shapes is known before anything is trained.
static start try_layer(const config *o, const char *name, const moe_desc *desc, double factor) {
    net *m = net_new(&o->e.plan, desc);
    size_t n = o->e.plan.batch * T, active = moe_layer_active_params(m->moe);
    start at = {NAN, factor, NAN, m->bank.count + moe_layer_params(m->moe), m->bank.count + active, 0};
    at.expert = expert_params(m->moe);
    scale_output(m->moe, factor);
    for (size_t i = 0; i < o->e.plan.batch; i++) net_take(m, i, &o->e.samples.train[0], i);
    moe_layer_side(m->moe)->id = m->id;
    moe_status s = moe_forward(m->moe, m->x, n, m->y);
    if (s != MOE_OK && moe_status_kind(s) != MOE_KIND_NUMBER)
        args_fail("zoo", "%s: %s", name, moe_status_string(s));
    if (!s) {
        at.output = sqrt(moe_sum_squares(NULL, n * D, m->y) / moe_sum_squares(NULL, n * D, m->x));
        at.p_max = highest_p(moe_layer_tape(m->moe), desc);
    }
    net_free(m);
    return at;
}

// The same with the output made as large as dense's, where it can be: one that begins at zero stays there, orthonormal
// bases have no scale, and what experts do not make (copies of tokens, a normed branch) keeps its own.
static start begin_layer(const config *o, const char *name, const moe_desc *desc) {
    start at = try_layer(o, name, desc, 1);
    if (o->as_is || !(at.output > 0) || desc->expert == MOE_EXPERT_ORTHONORMAL) return at;
    start scaled = try_layer(o, name, desc, o->output / at.output);
    return fabs(scaled.output / o->output - 1) < 0.1 ? scaled : at;
}

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
    json_whole(j, "seed", r->seed);
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
    if (desc) scale_output(m->moe, r->start.factor);
    r->seed = plan->seed;
    size_t count = data->train->count, steps = 0;
    double loss = 0, accuracy = 0, busy = 0;
    r->experts = desc ? desc->n_experts : 0;
    if (!desc) r->start = (start){0, 1, NAN, m->bank.count, m->bank.count, 0};
    r->active = (double)r->start.active_params;
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
        r->taken = (double)r->health.n_selected / (double)(data->test.count * T);
        r->active = measured_active(r, desc, data->test.count * T);
        if (r->experts > 1) nn_must(moe_layer_pes(m->moe, data->test.x, few * T, &r->pes));
    }
    if (r->diverged) r->train_loss = r->test_loss = r->test_accuracy = r->tokens_per_s = NAN;
    net_free(m);
}

// ---- the report ----

static void write_config(config *o, const moe_system *const *row, const moe_desc *desc, size_t n) {
    json *j = &o->e.lines;
    experiment_config(&o->e);
    json_whole(j, "seeds", o->seeds);
    json_raw(j, "as_is", o->as_is ? "true" : "false");
    json_object_begin(j, "layers");
    for (size_t i = 0; i < n; i++) experiment_layer(&o->e, row[i]->name, &desc[i]);
    json_object_end(j);
    json_end(j);
}

// What is not alike in this row's numbers, one sentence each; returns how many.
enum { NOTES = 8 };
static size_t notes_of(const config *o, const result *r, char note[NOTES][160]) {
    size_t n = 0;
    const moe_desc *desc = r->desc;
    const mend *own = mend_of(o, r->system);
    if (!desc) return 0;
    int varies = desc->select == MOE_SELECT_TOP_P || desc->select == MOE_SELECT_THRESHOLD;
    if (r->n_diverged) snprintf(note[n++], 160, "diverged with %zu of %zu seeds", r->n_diverged, o->seeds);
    if (r->dead.n) snprintf(note[n++], 160, "%zu of %zu experts dead", r->dead.n, r->experts);
    if (r->experts > 1 && r->start.p_max > 0.8)
        snprintf(note[n++], 160, "router saturated at the start: mean highest p %.2f", r->start.p_max);
    if (own) snprintf(note[n++], 160, "%s", own->note);
    if (desc->select == MOE_SELECT_AUCTION || desc->select == MOE_SELECT_SINKHORN)
        snprintf(note[n++], 160, "balanced over the batch in training only; the test takes the highest scores");
    if (desc->combine == MOE_COMBINE_SOFT)
        snprintf(note[n++], 160, "experts read mixtures of tokens; all of them count as active");
    if (varies && !r->diverged && fabs(r->taken - (double)desc->top_k) > 0.1)
        snprintf(note[n++], 160, "%.2f experts a token in the test, made as wide as if %zu", r->taken, desc->top_k);
    if (!varies && r->active < 0.95 * (double)r->start.active_params)
        snprintf(note[n++], 160, "experts without parameters take part of the choices");
    if (!o->as_is && r->experts > 1 && !(fabs(r->start.output / o->output - 1) < 0.1))
        snprintf(note[n++], 160, "output at the start %.3f, dense's %.3f", r->start.output, o->output);
    return n;
}

static void write_final(const config *o, json *j, const result *r) {
    char note[NOTES][160];
    json_begin(j);
    json_text(j, "event", "final");
    json_text(j, "system", r->name);
    json_text(j, "source", r->source);
    json_whole(j, "seed", r->seed);
    json_real(j, "train_loss", r->train_loss);
    json_real(j, "test_loss", r->test_loss);
    json_real(j, "test_accuracy", r->test_accuracy);
    json_whole(j, "params", r->start.params);
    json_whole(j, "active_params", r->start.active_params);
    json_real(j, "active_measured", r->active);
    json_real(j, "start_output", r->start.output);
    json_real(j, "start_p_max", r->start.p_max);
    json_real(j, "tokens_per_s", r->tokens_per_s);
    write_health(j, &r->health, &r->dead, !r->diverged);
    json_real(j, "experts_per_token", r->diverged ? NAN : r->taken);
    json_real(j, "pes", r->pes);
    json_raw(j, "diverged", r->diverged ? "true" : "false");
    size_t n = notes_of(o, r, note);
    json_list_begin(j, "notes");
    for (size_t i = 0; i < n; i++) json_text(j, NULL, note[i]);
    json_list_end(j);
    json_end(j);
}

static void write_spread(const config *o, json *j, const result *r) {
    json_begin(j);
    json_text(j, "event", "seeds");
    json_text(j, "system", r->name);
    json_whole(j, "seeds", o->seeds);
    spread_json(j, "test_loss", r->over_loss);
    spread_json(j, "test_accuracy", r->over_accuracy);
    spread_json(j, "train_loss", r->over_train);
    json_whole(j, "diverged", r->n_diverged);
    json_end(j);
}

// Spearman's: do the rows that use more parameters have the lower loss? NaN: fewer than two, or all alike.
static double *ranks_of(size_t n, const double *x) { // the middle of those that are equal; for free()
    double *rank = allocate(n, sizeof *rank);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < n; k++) rank[i] += (x[k] < x[i]) + 0.5 * (x[k] == x[i]);
    return rank;
}
static double rank_correlation(size_t n, const double *x, const double *y) {
    double r = NAN, *a = ranks_of(n, x), *b = ranks_of(n, y);
    if (n > 1 && moe_pearson(n, a, b, &r) != MOE_OK) r = NAN;
    free(a);
    free(b);
    return r;
}
typedef struct fairness {
    size_t n; // rows that did not diverge
    double counted, measured, low, high;
} fairness;
static fairness fairness_of(const result *r, size_t n, size_t seeds) {
    double *value = allocate(3 * n, sizeof *value), *counted = value + n, *active = counted + n;
    fairness f = {0, NAN, NAN, INFINITY, 0};
    for (size_t i = 0; i < n; i++) {
        const result *row = &r[i * seeds];
        if (!row->over_loss.n || row->diverged) continue;
        f.low = fmin(f.low, row->active);
        f.high = fmax(f.high, row->active);
        counted[f.n] = (double)row->start.active_params;
        active[f.n] = row->active;
        value[f.n++] = row->over_loss.mean;
    }
    f.counted = rank_correlation(f.n, counted, value);
    f.measured = rank_correlation(f.n, active, value);
    free(value);
    return f;
}

static void write_fairness(json *j, fairness f) {
    json_begin(j);
    json_text(j, "event", "fairness");
    json_whole(j, "systems", f.n);
    json_real(j, "active_params_correlation", f.counted);
    json_real(j, "active_measured_correlation", f.measured);
    json_real(j, "active_measured_low", f.n ? f.low : NAN);
    json_real(j, "active_measured_high", f.n ? f.high : NAN);
    json_end(j);
}
static void print_fairness(FILE *f, fairness fair) {
    if (fair.n < 2) return;
    fprintf(f, "\nactive parameters as used in the test: %.0f to %.0f; their rank correlation with the test loss: ",
            fair.low, fair.high);
    fprintf(f, "%.2f (%.2f as counted beforehand)\n", fair.measured, fair.counted);
}

// By mean test loss; what diverged with every seed stands at the end, in the order of the table.
static int compare(const void *a, const void *b) {
    const result *x = a, *y = b;
    double left = x->over_loss.n ? x->over_loss.mean : INFINITY, right = y->over_loss.n ? y->over_loss.mean : INFINITY;
    if (left != right) return left < right ? -1 : 1;
    return x->system < y->system ? -1 : x->system > y->system;
}

// The table's columns, with their widths on a terminal (negative: at the left). The last two have no width.
enum { COLUMNS = 16, NOTE = COLUMNS - 2, SOURCE = COLUMNS - 1, CELL = 512 };
static const char *const heading[COLUMNS] = {
    "system",   "test loss", "test accuracy", "train loss", "parameters", "active parameters", "output at start",
    "tokens/s", "MaxVio",    "CV",            "entropy",    "dead",       "dropped",           "PES",
    "notes",    "source"};
static const char *const heading_short[COLUMNS] = {"system",   "test loss", "accuracy", "train loss", "parameters",
                                                   "active",   "output",    "tokens/s", "MaxVio",     "CV",
                                                   "entropy",  "dead",      "dropped",  "PES",        "  notes"};
static const int width[COLUMNS] = {-18, 9, 10, 12, 12, 8, 8, 10, 8, 6, 9, 15, 9, 8, 0, 0};
static const int wide[COLUMNS] = {-18, 19, 18, 19, 12, 8, 8, 10, 8, 6, 9, 15, 9, 8, 0, 0}; // with several seeds

static void row_cells(const config *o, const result *r, char cell[COLUMNS][CELL]) {
    const moe_health *h = &r->health;
    double known = r->diverged || !r->experts ? NAN : 0; // makes what was not measured NaN
    char note[NOTES][160];
    spread accuracy = {r->over_accuracy.n, 100 * r->over_accuracy.mean, 100 * r->over_accuracy.sd};
    snprintf(cell[0], CELL, "%s", r->name);
    spread_text(r->over_loss, "%.4f", cell[1], CELL);
    if (!r->over_loss.n) snprintf(cell[1], CELL, "diverged");
    spread_text(accuracy, "%.1f%%", cell[2], CELL);
    spread_text(r->over_train, "%.4f", cell[3], CELL);
    snprintf(cell[4], CELL, "%zu", r->start.params);
    snprintf(cell[5], CELL, "%.0f", r->active);
    experiment_number(cell[6], "%.3f", r->start.output);
    experiment_number(cell[7], "%.0f", r->tokens_per_s);
    experiment_number(cell[8], "%.2f", h->maxvio + known);
    experiment_number(cell[9], "%.2f", h->load_cv + known);
    experiment_number(cell[10], "%.3f", h->load_entropy + known);
    dead_text(&r->dead, cell[11], 64);
    experiment_number(cell[12], "%.1f%%", 100 * h->drop_rate + known);
    experiment_number(cell[13], "%.3f", r->pes);
    size_t n = notes_of(o, r, note), at = 0;
    cell[NOTE][0] = 0;
    for (size_t i = 0; i < n && at < CELL; i++)
        at += (size_t)snprintf(cell[NOTE] + at, CELL - at, "%s%s", i ? "; " : "", note[i]);
    snprintf(cell[SOURCE], CELL, "%s", r->source);
}

static void print_table(const config *o, const result *r, size_t n) {
    char cell[COLUMNS][CELL];
    const char *at[COLUMNS];
    const int *column = o->seeds > 1 ? wide : width;
    fputc('\n', o->e.human);
    experiment_row(o->e.human, SOURCE, column, heading_short);
    for (size_t k = 0; k < n; k++) {
        row_cells(o, &r[k], cell);
        memmove(cell[NOTE] + 2, cell[NOTE], CELL - 2);
        memcpy(cell[NOTE], "  ", 2);
        cell[NOTE][CELL - 1] = 0;
        for (int i = 0; i < COLUMNS; i++) at[i] = cell[i];
        experiment_row(o->e.human, SOURCE, column, at);
    }
}

static void print_markdown(const config *o, const result *r, size_t n) {
    char cell[COLUMNS][CELL];
    FILE *f = o->e.human;
    for (int i = 0; i < COLUMNS; i++) fprintf(f, "| %s ", heading[i]);
    fputs("|\n", f);
    for (int i = 0; i < COLUMNS; i++) fputs(i == 0 || i >= NOTE ? "|---" : "|---:", f);
    fputs("|\n", f);
    for (size_t k = 0; k < n; k++) {
        row_cells(o, &r[k], cell);
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

// In how many windows the data tell gamma_eff.
static size_t told(const result *r) {
    size_t n = 0;
    for (size_t k = 0; k < WINDOWS; k++) n += isfinite(r->gamma[k]);
    return n;
}

// Each system's congestion over time, where it is told at all: docs/gamma.md.
static void draw_gamma(FILE *f, const result *r, size_t n) {
    enum { ACROSS = 3, W = 320, H = 190 };
    double time[WINDOWS];
    for (size_t i = 0; i < WINDOWS; i++) time[i] = (double)(i + 1);
    size_t panels = 0, at = 0;
    for (size_t i = 0; i < n; i++) panels += told(&r[i]) > 0;
    plot_begin(f, ACROSS * W, (double)((panels + ACROSS - 1) / ACROSS * H), "gamma_eff of the routing in training");
    for (size_t i = 0; i < n; i++) {
        char title[80];
        if (!told(&r[i])) continue;
        snprintf(title, sizeof title, "%s, E %.3g", r[i].name, r[i].ecology);
        plot_points(f, &(plot_point_chart){.box = {(double)(at % ACROSS) * W, (double)(at / ACROSS) * H, W, H},
                                           .title = title,
                                           .x_label = "time",
                                           .n = WINDOWS,
                                           .x = time,
                                           .y = r[i].gamma,
                                           .lo = r[i].lo,
                                           .hi = r[i].hi,
                                           .joined = 1});
        at++;
    }
    plot_end(f);
}
// Those that it leaves out.
static void page_untold(FILE *f, const result *r, size_t n) {
    char text[2048] = "Unidentified throughout, as mean logits differ by less than the noise of the loads tells:";
    size_t at = strlen(text), first = at;
    for (size_t i = 0; i < n && at < sizeof text; i++)
        if (!told(&r[i])) at += (size_t)snprintf(text + at, sizeof text - at, " %s", r[i].name);
    if (at > first) page_pre(f, text);
}

static void page_result(FILE *f, int head, const char *const *c) {
    page_row(f, head, "%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|<%s|<%s", c[0], c[1], c[2], c[3], c[4], c[5], c[6],
             c[7], c[8], c[9], c[10], c[11], c[12], c[13], c[14], c[15]);
}

static void write_page(const config *o, const result *r, size_t n) {
    char text[1024], cell[COLUMNS][CELL];
    const char *at[COLUMNS];
    const net_plan *plan = &o->e.plan;
    const samples *data = &o->e.samples;
    FILE *f = experiment_file(&o->e, "html");
    snprintf(text, sizeof text,
             "%zu systems, each %zu steps of %zu images (%zu for training, %zu for the test), %zu seed%s from %llu on. "
             "%s Losses and accuracies are means over the seeds; the rest is of the first: loads and PES of the test, "
             "output at start over input, root mean squares.",
             n, plan->total, plan->batch, data->train->count, data->test.count, o->seeds, o->seeds == 1 ? "" : "s",
             (unsigned long long)plan->seed,
             o->as_is ? "Experts have one width, and outputs begin as they do."
                      : "Widths are such that a token uses as many parameters in each, and outputs begin as large.");
    page_begin(f, "A zoo of routers", text);
    page_card(f);
    page_table_begin(f);
    page_result(f, 1, heading);
    for (size_t i = 0; i <= n; i++) {
        row_cells(o, &r[i], cell);
        for (int k = 0; k < COLUMNS; k++) at[k] = cell[k];
        page_result(f, 0, at);
    }
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
    page_untold(f, r, n);
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

enum { MOST_SYSTEMS = 128 }; // rows and aliases

// The rows that --system asks for, in the order of the table; then the aliases, each as a row of its name.
static size_t choose(const config *o, const moe_system **row) {
    static moe_system system[MOST_SYSTEMS];
    size_t n = 0, rows = moe_systems_count();
    unsigned char chosen[MOST_SYSTEMS] = {0};
    experiment_choose("zoo", "system", o->system, rows, moe_system_name, chosen);
    for (size_t i = 0; moe_system_name(NULL, i); i++) {
        if (!chosen[i]) continue;
        system[i] = *moe_system_find(moe_system_name(NULL, i));
        system[i].name = moe_system_name(NULL, i);
        row[n++] = &system[i];
    }
    return n;
}

// --list
static int list_systems(void) {
    const moe_alias *a;
    for (size_t i = 0; i < moe_systems_count(); i++)
        printf("%-18s %s\n", moe_system_at(i)->name, moe_system_at(i)->title);
    for (size_t i = 0; (a = moe_system_alias(i)) != NULL; i++)
        printf("%-18s = %s %s\n", a->name, a->system, a->choices);
    return 0;
}

static moe_desc layer_desc(const config *o, const moe_system *row, size_t d_ff) {
    moe_desc d = {0};
    char whose[40];
    moe_status s = moe_desc_system(&d, row->name);
    const mend *own = mend_of(o, row);
    d.d_model = D;
    d.sequence = T;
    if (!d.d_ff) d.d_ff = d_ff;
    if (own) nn_set("zoo", &d, own->set);
    if (o->e.experts && d.n_experts != 1) d.n_experts = o->e.experts;
    if (o->e.top_k && d.n_experts != 1) nn_top_k(&d, o->e.top_k);
    nn_set("zoo", &d, o->set);
    // k and temperature are at their ends for the last quarter of the training
    if (d.schedule_steps) d.schedule_steps = o->e.plan.total - o->e.plan.total / 4;
    d.weight_decay = o->e.plan.decay;
    d.seed = o->e.plan.seed + 1;
    d.parallel.n_threads = o->e.plan.threads;
    nn_must(s);
    snprintf(whose, sizeof whose, "%s: ", row->name);
    nn_resolve("zoo", whose, &d);
    return d;
}

static size_t active_params(const moe_desc *desc) {
    moe_layer *m = NULL;
    nn_must(moe_layer_new(&m, desc));
    size_t count = moe_layer_active_params(m);
    moe_layer_free(m);
    return count;
}

// The row with experts as wide as makes a token use as many parameters as one of dense: they grow evenly with the
// width.
static moe_desc even_desc(const config *o, const moe_system *row, size_t target) {
    moe_desc d = layer_desc(o, row, D_FF);
    if (o->as_is) return d.n_experts == 1 ? layer_desc(o, row, 2 * D_FF) : d;
    moe_desc wider = layer_desc(o, row, D_FF + 1);
    double at = (double)active_params(&d), slope = (double)active_params(&wider) - at;
    if (slope <= 0) return d; // --set gave the width
    double fit = floor(D_FF + ((double)target - at) / slope + 0.5);
    if (d.expert == MOE_EXPERT_ORTHONORMAL) fit = fmin(fit, D - 1);
    return layer_desc(o, row, fit > 1 ? (size_t)fit : 1);
}

// Trains them all, with one line of progress, with each seed; r (n + 1, seeds): the last is without a mixture.
static void train_all(config *o, result *r, size_t n) {
    size_t seeds = o->seeds, total = o->e.plan.total, each = n * seeds;
    uint64_t first = o->e.plan.seed;
    progress p = progress_begin("zoo", "steps", each * total, o->e.quiet);
    for (size_t i = n + 1; i-- > 0;)
        for (size_t s = 0; s < seeds; s++) {
            size_t which = i == n ? n : n - 1 - i; // without a mixture first, then in the order of the table
            result *one = &r[which * seeds + s];
            moe_desc desc = {0};
            char label[160];
            *one = r[which * seeds];
            if (one->desc) desc = *one->desc;
            o->e.plan.seed = first + s;
            desc.seed = first + s + 1;
            if (which == n) {
                train(one, o, NULL, NULL, 0, NULL);
                continue;
            }
            snprintf(label, sizeof label, "%s (%zu of %zu)", one->name, which * seeds + s + 1, each);
            train(one, o, &desc, &p, (which * seeds + s) * total, label);
        }
    progress_clear(&p);
    o->e.plan.seed = first;
}

// The spread over the seeds of row r (seeds), into its first.
static void spread_row(const config *o, result *r) {
    double *value = allocate(3 * o->seeds, sizeof *value);
    r->n_diverged = 0;
    for (size_t s = 0; s < o->seeds; s++) {
        value[s] = r[s].test_loss, value[o->seeds + s] = r[s].test_accuracy, value[2 * o->seeds + s] = r[s].train_loss;
        r->n_diverged += r[s].diverged != 0;
    }
    r->over_loss = spread_of(o->seeds, value);
    r->over_accuracy = spread_of(o->seeds, value + o->seeds);
    r->over_train = spread_of(o->seeds, value + 2 * o->seeds);
    free(value);
}

// Trains, sorts by the mean loss, and writes; what is shown of each row comes to r[0 .. n].
static void run(config *o, result *r, size_t n) {
    json *j = &o->e.lines;
    size_t seeds = o->seeds;
    train_all(o, r, n);
    for (size_t i = 0; i <= n; i++) spread_row(o, &r[i * seeds]);
    qsort(r, n, seeds * sizeof *r, compare);
    const result *without = &r[n * seeds];
    for (size_t s = 0; s < seeds; s++) {
        json_begin(j);
        json_text(j, "event", "baseline");
        json_whole(j, "seed", without[s].seed);
        json_real(j, "train_loss", without[s].train_loss);
        json_real(j, "test_loss", without[s].test_loss);
        json_real(j, "test_accuracy", without[s].test_accuracy);
        json_end(j);
    }
    write_fairness(j, fairness_of(r, n, seeds));
    for (size_t i = 0; i < n; i++) {
        for (size_t s = 0; s < seeds; s++) write_final(o, j, &r[i * seeds + s]);
        if (seeds > 1) write_spread(o, j, &r[i * seeds]);
    }
    for (size_t i = 0; i <= n; i++) {
        for (size_t s = 1; s < seeds; s++) free(r[i * seeds + s].load), dead_free(&r[i * seeds + s].dead);
        r[i] = r[i * seeds];
    }
}

static void report(config *o, const result *r, size_t n) {
    experiment_end(&o->e);
    FILE *svg = experiment_file(&o->e, "svg");
    draw(svg, r, n);
    experiment_close(&o->e, svg, "svg");
    write_page(o, r, n);
    (o->markdown ? print_markdown : print_table)(o, r, n + 1);
    print_fairness(o->e.human, fairness_of(r, n, 1));
    fprintf(o->e.human, "\n%.1f s; loads and PES on the test images", seconds_now() - o->e.begin);
    if (o->seeds > 1) fprintf(o->e.human, " of seed %llu", (unsigned long long)o->e.plan.seed);
    fprintf(o->e.human, "; see %s/zoo.html, .svg, .jsonl\n", o->e.out);
}

// The rows that are asked for, as wide and as loud as dense; r (n + 1, seeds).
static void prepare(config *o, const moe_system *const *row, moe_desc *desc, result *r, size_t n) {
    const moe_system *dense = moe_system_find("dense");
    moe_desc reference = layer_desc(o, dense, 2 * D_FF);
    size_t target = active_params(&reference);
    for (size_t i = 0; i < n; i++) desc[i] = even_desc(o, row[i], target);
    experiment_begin(&o->e);
    o->output = try_layer(o, dense->name, &reference, 1).output;
    for (size_t i = 0; i < n; i++)
        r[i * o->seeds] = (result){.name = row[i]->name,
                                   .source = row[i]->source,
                                   .system = row[i],
                                   .desc = &desc[i],
                                   .start = begin_layer(o, row[i]->name, &desc[i])};
    r[n * o->seeds] = (result){.name = "(no mixture)", .source = ""};
    write_config(o, row, desc, n);
}

int main(int argc, char **argv) {
    config o = {.e = experiment_defaults("zoo"), .system = "all", .seeds = 1};
    args_option options[] = {
        EXPERIMENT_OPTIONS(&o.e),
        ARGS_SYSTEM(&o.system, "a name of --list, or several with commas"),
        ARGS_SET(&o.set),
        ARGS_SEEDS(&o.seeds),
        {"as-is", ARGS_FLAG, &o.as_is, NULL, "experts of one width, outputs as they begin: rows of different size", 0,
         0},
        {"list", ARGS_FLAG, &o.list, NULL, "only name the systems, and the aliases with what they stand for", 0, 0},
        {"markdown", ARGS_FLAG, &o.markdown, NULL, "print the table as Markdown", 0, 0},
    };
    args_parse("zoo", "Trains every routing system on the same pictures with the same budget.", options,
               sizeof options / sizeof *options, argc, argv);
    if (o.list) return list_systems();
    const moe_system *row[MOST_SYSTEMS];
    size_t n = choose(&o, row);
    experiment_load(&o.e, argv[0], (experiment_by_data){{20, 5}, {2e-3, 4e-3}});
    moe_desc *desc = allocate(n, sizeof *desc);
    result *r = allocate((n + 1) * o.seeds, sizeof *r);
    prepare(&o, row, desc, r, n);
    run(&o, r, n);
    report(&o, r, n);
    for (size_t i = 0; i <= n; i++) free(r[i].load), dead_free(&r[i].dead);
    experiment_free(&o.e);
    free(r);
    free(desc);
    return 0;
}
