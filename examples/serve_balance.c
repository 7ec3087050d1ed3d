// serve_balance.c - one trained mixture, served in many ways: what balancing at inference gives, and what it costs.
//
//     build/serve_balance                          trains on the sample of CIFAR-10, then one table; seconds
//     build/serve_balance --model DIR --text FILE  a language model from its published folder, as build/llm reads it
//     build/serve_balance --set loss.switch=0.01   a balanced one; the default is trained with next to no balancing
//
// The methods are common/serve.h's: top-k as trained, LASER with the row's two thresholds and with those that a sweep
// on the calibration picks, Replicate-and-Quantize, pruning, and merging as SMEAR. Nothing is trained again. Imbalance
// is the work of the busiest expert (or replica) by the mean of the experts, in each batch, and its mean over batches:
// what a server waits for. The calibration is a fifth of the training images (at most 2,000), which the training does
// not see; of a text the first tenth, which is not scored. bytes: of all experts' weights, replicas among them.
#define MOE_IMPLEMENTATION
#include "common/experiment.h"
#include "common/serve_llm.h"

enum { SIZES = 4, MASSES = 8, THRESHOLDS = 6, LIVE = 256 };

typedef struct config {
    experiment e;
    llm_options llm;
    const char *system, *set, *text; // text: of a language model
    size_t hidden, candidates, calibrate, most_tokens, size[SIZES]; // size: items a batch, the last is the table's
    moe_desc desc;
    int language;
    double lost;     // of the accuracy, or of the nats a token, that a setting of the sweep may cost
    char tuned[160]; // LASER's fields, as the sweep picks them
} config;

// What one pass over the test data gives: quality is the accuracy or the perplexity.
typedef struct score {
    double quality, imbalance, tokens_per_s;
    size_t bytes, made;
    moe_status status; // why there is none
} score;
typedef struct sweep {
    double mass[MASSES], threshold[THRESHOLDS], imbalance[THRESHOLDS * MASSES], quality[THRESHOLDS * MASSES];
} sweep;

// What is served: the pictures' network or the language model, and its data.
typedef struct subject {
    config *o;
    net *pictures;
    moe_layer *trained[LIVE]; // of each layer
    size_t layers;
    uint64_t *load; // (layers, E) of the calibration
    double plain;   // and the quality there
    llm *text;
    token_list ids;
    served live[LIVE];
} subject;

// ---- pictures ----

static void pictures_train(subject *s) {
    config *o = s->o;
    net_plan *plan = &o->e.plan;
    double loss;
    s->pictures = net_new(plan, &o->desc);
    progress p = progress_begin("training", "steps", plan->total, o->e.quiet);
    for (size_t step = 0; step < plan->total; step++) {
        if (net_step(s->pictures, plan, &o->e.samples, step, &loss)) die("the training left the range of numbers");
        progress_update(&p, step + 1, "loss %.3f", loss);
    }
    progress_clear(&p);
    s->layers = 1;
    s->trained[0] = s->pictures->moe;
}
static score pictures_pass(subject *s, const tokens *set, size_t first, size_t count, size_t batch) {
    net *m = s->pictures;
    served *live = &s->live[0];
    score r = {0};
    double right = 0, spent = 0, batches = 0;
    for (size_t end = first + count; first < end; first += batch) {
        size_t n = end - first < batch ? end - first : batch;
        for (size_t i = 0; i < n; i++) net_take(m, i, set, first + i);
        double begin = seconds_now();
        m->moe = live->layer;
        if (net_forward(m, n, 1)) die("the forward left the range of numbers");
        serve_after(live, moe_layer_tape(m->moe));
        spent += seconds_now() - begin;
        right += (double)nn_count_right(n, NET_CLASSES, m->logits, m->label);
        if (live->layer == m->moe) r.imbalance += serve_imbalance(live, moe_layer_tape(m->moe)), batches++;
    }
    m->moe = s->trained[0];
    r.quality = right / (double)count;
    r.imbalance /= batches;
    r.tokens_per_s = (double)(count * NET_T) / spent;
    return r;
}

// ---- a language model ----

typedef struct listener {
    subject *s;
    double imbalance, batches;
    llm_nats read;
} listener;
static void listen_layer(void *user, const llm *m, const llm_routed *r) {
    listener *l = user;
    l->imbalance += serve_imbalance(&l->s->live[r->mixture], m->acts.tape);
    l->batches++;
}
static void listen_rows(void *user, const llm *m, size_t first, size_t rows) {
    llm_nats_rows(&((listener *)user)->read, m, first, rows);
}
// Perplexity of ids [first, first + count), in windows that do not overlap, `batch` tokens at a time.
static score text_pass(subject *s, size_t first, size_t count, size_t batch) {
    listener l = {.s = s};
    llm_taker take = {listen_layer, listen_rows, &l, 0};
    llm *m = s->text;
    score r = {0};
    double spent = 0;
    s->o->llm.batch = batch;
    serve_llm_place(m, s->live);
    for (size_t at = first, end = first + count; at + 1 < end; at += m->positions) {
        l.read.ids = s->ids.id + at;
        l.read.n = end - at < m->positions ? end - at : m->positions;
        l.read.from = 1;
        for (size_t i = 0, n; i < l.read.n; i += n) {
            n = l.read.n - i < batch ? l.read.n - i : batch;
            double begin = seconds_now();
            llm_forward_batch(m, l.read.ids + i, n, i, &take, i);
            serve_llm_after(m, s->live);
            spent += seconds_now() - begin;
        }
    }
    r.quality = exp(l.read.sum / (double)l.read.counted);
    r.imbalance = l.imbalance / l.batches;
    r.tokens_per_s = (double)count / spent;
    return r;
}
static void text_open(subject *s, config *o) {
    llm *m = s->text = llm_open(&o->llm);
    size_t n = 0;
    const char *text = file_view(o->text, &n);
    if (!text) refuse(o->text, "cannot be read: %s", strerror(errno));
    s->ids = tokenizer_encode(llm_tokenizer(o->llm.model), text, n, 0);
    if (o->most_tokens && s->ids.n > o->most_tokens) s->ids.n = o->most_tokens;
    if (s->ids.n < 64) refuse(o->text, "fewer than 64 tokens");
    o->llm.batch = o->size[SIZES - 1];
    llm_load(m, o->llm.context);
    s->layers = serve_llm_layers(m, s->trained, LIVE);
}

// ---- what both are ----

static score pass(subject *s, int calibration, size_t batch) {
    config *o = s->o;
    size_t tenth = s->ids.n / 10;
    if (o->language) return calibration ? text_pass(s, 0, tenth, batch) : text_pass(s, tenth, s->ids.n - tenth, batch);
    const tokens *train = &o->e.samples.train[0];
    if (calibration) return pictures_pass(s, train, train->count, o->calibrate, batch); // behind what was trained on
    return pictures_pass(s, &o->e.samples.test, 0, o->e.samples.test.count, batch);
}
static score serve(subject *s, const serve_method *method, int calibration, size_t batch) {
    size_t E = moe_layer_desc(s->trained[0])->n_experts, begun = 0;
    moe_status status = MOE_OK;
    score r = {0};
    for (; begun < s->layers && !status; begun++)
        s->live[begun] = serve_begin(s->trained[begun], method, s->load + begun * E, &status);
    if (!status) r = pass(s, calibration, batch);
    for (size_t i = 0; i < begun; i++) {
        if (!status) r.bytes += serve_bytes(&s->live[i]);
        r.made += s->live[i].made;
        serve_end(&s->live[i]);
    }
    r.status = status;
    return r;
}
// The loads of the calibration: what the trained layers choose there.
static void calibrate(subject *s) {
    size_t E = moe_layer_desc(s->trained[0])->n_experts;
    s->load = allocate(s->layers * E, sizeof *s->load);
    moe_status status = MOE_OK;
    for (size_t i = 0; i < s->layers; i++) {
        s->live[i] = serve_begin(s->trained[i], &serve_methods[0], NULL, &status);
        nn_must(status);
    }
    s->plain = pass(s, 1, s->o->size[SIZES - 1]).quality;
    for (size_t i = 0; i < s->layers; i++) {
        memcpy(s->load + i * E, s->live[i].load, E * sizeof *s->load);
        serve_end(&s->live[i]);
    }
}

// ---- LASER's two thresholds ----

static sweep laser_sweep(subject *s) {
    sweep w;
    config *o = s->o;
    double best = INFINITY;
    progress p = progress_begin("LASER", "settings", THRESHOLDS * MASSES, o->e.quiet);
    for (size_t i = 0; i < THRESHOLDS * MASSES; i++) {
        double *mass = &w.mass[i % MASSES], *threshold = &w.threshold[i / MASSES], lost;
        char set[160];
        *mass = 0.3 + 0.1 * (double)(i % MASSES), *threshold = 0.15 * (double)(i / MASSES);
        snprintf(set, sizeof set, "select=laser top_p=%.2f threshold=%.2f candidates=%zu", *mass, *threshold,
                 o->candidates);
        score r = serve(s, &(serve_method){"", set, 0, 0, ""}, 1, o->size[SIZES - 1]);
        nn_must(r.status);
        w.imbalance[i] = r.imbalance;
        w.quality[i] = r.quality;
        lost = o->language ? log(r.quality / s->plain) : s->plain - r.quality;
        if (lost <= o->lost && r.imbalance < best) best = r.imbalance, memcpy(o->tuned, set, sizeof set);
        progress_update(&p, i + 1, "imbalance %.3f", r.imbalance);
    }
    progress_clear(&p);
    if (!*o->tuned) snprintf(o->tuned, sizeof o->tuned, "%s", serve_methods[SERVE_LASER].set);
    return w;
}

// ---- the report ----

static const char *quality_name(const config *o) { return o->language ? "perplexity" : "accuracy"; }
static void write_score(config *o, const char *event, const char *method, const score *r, size_t batch) {
    json *j = &o->e.lines;
    json_begin(j);
    json_text(j, "event", event);
    json_text(j, "method", method);
    if (batch) json_whole(j, "batch", batch);
    json_real(j, "imbalance", r->imbalance);
    json_real(j, quality_name(o), r->quality);
    json_whole(j, "bytes", r->bytes);
    json_real(j, "tokens_per_s", r->tokens_per_s);
    json_end(j);
}
static void write_sweep(config *o, const sweep *w) {
    json *j = &o->e.lines;
    for (size_t i = 0; i < THRESHOLDS * MASSES; i++) {
        json_begin(j);
        json_text(j, "event", "sweep");
        json_real(j, "top_p", w->mass[i % MASSES]);
        json_real(j, "threshold", w->threshold[i / MASSES]);
        json_real(j, "imbalance", w->imbalance[i]);
        json_real(j, quality_name(o), w->quality[i]);
        json_end(j);
    }
}
static void write_config(config *o, const subject *s) {
    json *j = &o->e.lines;
    if (!o->language)
        experiment_config(&o->e);
    else {
        *j = (json){{open_output(o->e.out, "serve_balance.jsonl"), o->e.json ? stdout : NULL}, 0};
        json_config(j, "serve_balance");
        json_text(j, "model", o->llm.model);
        json_text(j, "text", o->text);
        json_whole(j, "seed", o->e.plan.seed);
        json_whole(j, "tokens", s->ids.n);
        json_whole(j, "context", o->llm.context);
    }
    experiment_layer(&o->e, "layer", moe_layer_desc(s->trained[0]));
    json_whole(j, "layers", s->layers);
    json_end(j);
}
static void draw(FILE *f, const config *o, const sweep *w) {
    static char name[MASSES + THRESHOLDS][16];
    const char *mass[MASSES], *threshold[THRESHOLDS], *labels[] = {"LASER: imbalance", "LASER: "};
    char title[64];
    double lo[2] = {INFINITY, INFINITY}, hi[2] = {-INFINITY, -INFINITY};
    const double *value[2] = {w->imbalance, w->quality};
    for (size_t i = 0; i < MASSES + THRESHOLDS; i++)
        snprintf(name[i], sizeof name[i], "%.2f", i < MASSES ? w->mass[i] : w->threshold[i - MASSES]);
    for (size_t i = 0; i < MASSES; i++) mass[i] = name[i];
    for (size_t i = 0; i < THRESHOLDS; i++) threshold[i] = name[MASSES + i];
    plot_begin(f, 960, 320, "LASER's two thresholds");
    for (size_t k = 0; k < 2; k++) {
        for (size_t i = 0; i < THRESHOLDS * MASSES; i++) {
            lo[k] = fmin(lo[k], value[k][i]);
            hi[k] = fmax(hi[k], value[k][i]);
        }
        snprintf(title, sizeof title, "%s%s on the calibration; rows: threshold", labels[k], k ? quality_name(o) : "");
        plot_heat(f, &(plot_map){.box = {480 * (double)k, 0, 480, 310},
                                 .title = title,
                                 .x_label = "mass from which top-k stands",
                                 .rows = THRESHOLDS,
                                 .cols = MASSES,
                                 .value = value[k],
                                 .lo = lo[k],
                                 .hi = hi[k],
                                 .row_name = threshold,
                                 .col_name = mass,
                                 .format = "%.3g",
                                 .scale_format = "%.3g"});
    }
    plot_end(f);
}
typedef struct table {
    const char *name, *what;
    score at[SIZES];
} table;
static void write_page(const config *o, const sweep *w, const table *row, size_t n) {
    FILE *f = experiment_file(&o->e, "html");
    page_begin(f, "Balance at inference", "One trained mixture, served in many ways; nothing is trained again.");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "method|<what|batch|imbalance|%s|expert bytes|tokens/s", quality_name(o));
    for (size_t i = 0; i < n * SIZES; i++) {
        const table *t = &row[i / SIZES];
        const score *r = &t->at[i % SIZES];
        if (r->status) continue;
        page_row(f, 0, "%s|<%s|%zu|%.3f|%.4f|%zu|%.0f", t->name, t->what, o->size[i % SIZES], r->imbalance, r->quality,
                 r->bytes, r->tokens_per_s);
    }
    page_table_end(f);
    page_card_end(f);
    page_card(f);
    draw(f, o, w);
    page_card_end(f);
    page_end(f);
    experiment_close(&o->e, f, "html");
}
static void print_table(const config *o, const table *row, size_t n) {
    FILE *f = o->e.human;
    fprintf(f, "\n%-31s", "imbalance by batch of");
    for (size_t k = 0; k < SIZES; k++) fprintf(f, "%8zu", o->size[k]);
    fprintf(f, "%12s%12s%12s\n", quality_name(o), "bytes", "tokens/s");
    for (size_t i = 0; i < n; i++) {
        const score *r = row[i].at;
        fprintf(f, "%-31s", row[i].name);
        if (r->status) {
            fprintf(f, "  %s\n", moe_status_string(r->status));
            continue;
        }
        for (size_t k = 0; k < SIZES; k++) fprintf(f, "%8.3f", r[k].imbalance);
        r += SIZES - 1;
        fprintf(f, "%12.4f%12zu%12.0f\n", r->quality, r->bytes, r->tokens_per_s);
    }
    fprintf(f, "laser-swept: %s\n", o->tuned);
}

// ---- the program ----

static void prepare(subject *s) {
    config *o = s->o;
    if (o->language)
        text_open(s, o);
    else {
        experiment_begin(&o->e);
        for (int k = 0; k < 2; k++) o->e.samples.train[k].count -= o->calibrate;
        pictures_train(s);
    }
    if (!o->candidates) o->candidates = 2 * moe_layer_desc(s->trained[0])->top_k;
    size_t experts = moe_layer_desc(s->trained[0])->n_experts;
    if (o->candidates > experts) args_fail("serve_balance", "--candidates: there are only %zu experts", experts);
    write_config(o, s);
}
static void run_all(subject *s) {
    config *o = s->o;
    table row[SERVE_METHODS + 1] = {{0}};
    size_t n = 0;
    prepare(s);
    calibrate(s);
    sweep w = laser_sweep(s);
    write_sweep(o, &w);
    progress p = progress_begin("serving", "methods", SERVE_METHODS + 1, o->e.quiet);
    for (size_t i = 0; i <= SERVE_METHODS; i++) {
        serve_method method = {"laser-swept", o->tuned, 0, 0, "the thresholds of the least imbalance at --lost"};
        if (i != SERVE_LASER + 1) method = serve_methods[i - (i > SERVE_LASER)];
        if (o->language && strstr(method.set, "merge")) continue; // it sees what comes after a token
        row[n].name = method.name, row[n].what = method.what;
        for (size_t k = 0; k < SIZES; k++) {
            row[n].at[k] = serve(s, &method, 0, o->size[k]);
            if (!row[n].at[k].status) write_score(o, "batch", method.name, &row[n].at[k], o->size[k]);
        }
        progress_update(&p, i + 1, "%s", method.name);
        n++;
    }
    progress_clear(&p);
    for (size_t i = 0; i < n; i++)
        if (!row[i].at[0].status) write_score(o, "final", row[i].name, &row[i].at[SIZES - 1], 0);
    experiment_end(&o->e);
    FILE *svg = experiment_file(&o->e, "svg");
    draw(svg, o, &w);
    experiment_close(&o->e, svg, "svg");
    write_page(o, &w, row, n);
    print_table(o, row, n);
    fprintf(o->e.human, "see %s/serve_balance.html, .svg, .jsonl\n", o->e.out);
}

static void quarters(config *o, size_t most) { // the sizes of batches
    for (size_t k = SIZES; k-- > 0; most = most > 4 ? most / 4 : 1) o->size[k] = most;
}
// What the flags ask for, and the layer to train.
static void settle(config *o, const char *argv0) {
    o->language = o->llm.model != NULL;
    if (o->language != (o->text != NULL)) args_fail("serve_balance", "--model and --text go together");
    o->llm.threads = o->e.plan.threads;
    o->llm.quiet = o->e.quiet;
    if (o->language) {
        nn_isa("serve_balance", o->e.isa);
        o->e.human = o->e.json ? stderr : stdout;
        quarters(o, o->llm.context);
        return;
    }
    experiment_load(&o->e, argv0, (experiment_by_data){{20, 5}, {2e-3, 4e-3}});
    size_t most = o->e.plan.batch, images = o->e.pictures.train.count;
    o->calibrate = images / 5 < 2000 ? images / 5 : 2000;
    if (images - o->calibrate < most || !o->calibrate) args_fail("serve_balance", "--batch: only %zu images", images);
    o->e.plan.total = (images - o->calibrate) / most * o->e.epochs;
    if (o->e.steps && o->e.steps < o->e.plan.total) o->e.plan.total = o->e.steps;
    quarters(o, most);
    nn_system("serve_balance", &o->desc, o->system);
    o->desc.d_model = NET_D, o->desc.d_ff = o->hidden, o->desc.sequence = NET_T;
    if (o->e.experts) o->desc.n_experts = o->e.experts;
    if (o->e.top_k) nn_top_k(&o->desc, o->e.top_k);
    nn_set("serve_balance", &o->desc, o->set);
    o->desc.seed = o->e.plan.seed, o->desc.parallel.n_threads = o->e.plan.threads;
    nn_resolve("serve_balance", "", &o->desc);
}

int main(int argc, char **argv) {
    static config o;
    static subject s;
    o = (config){.e = experiment_defaults("serve_balance"), .system = "mixtral", .set = "loss.switch=0", .hidden = 32};
    o.lost = 0.01;
    o.llm.context = 128;
    args_option flags[] = {
        EXPERIMENT_OPTIONS(&o.e),
        ARGS_SYSTEM(&o.system, "the row of moe.h's table that is trained"),
        ARGS_SET(&o.set),
        {"hidden", ARGS_SIZE, &o.hidden, "N", "width of an expert", 1, 65536},
        {"lost", ARGS_REAL, &o.lost, "X", "accuracy (or nats) that LASER's swept thresholds may cost", 0, 1},
        {"candidates", ARGS_SIZE, &o.candidates, "N", "LASER's, in the sweep (0: 2 top_k)", 0, 1 << 20},
        {"model", ARGS_TEXT, &o.llm.model, "DIR", "a language model instead: its published folder", 0, 0},
        {"text", ARGS_TEXT, &o.text, "FILE", "and a text", 0, 0},
        {"tokens", ARGS_SIZE, &o.most_tokens, "N", "only so many of it (0: all)", 0, 0},
        {"context", ARGS_SIZE, &o.llm.context, "N", "tokens of a window", 2, 1 << 20},
    };
    args_parse("serve_balance", "Serves one trained mixture in many ways.", flags, sizeof flags / sizeof *flags, argc,
               argv);
    settle(&o, argv[0]);
    s.o = &o;
    run_all(&s);
    if (s.pictures) net_free(s.pictures);
    if (!o.language) experiment_free(&o.e);
    free(s.load);
    return 0;
}
