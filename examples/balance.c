// balance.c - what keeps a mixture from collapsing, and what does it cost? The same network learns the same pictures
// once for each auxiliary loss, each controller and each routing that is balanced by construction.
//
//     build/balance                          all of them, on the sample of CIFAR-10 that the repository carries
//     build/balance --method switch,bias     some of them
//     build/balance --sweep                  each at five coefficients, over four decades
//
// The network is that of zoo (common/tokens_net.h), with one expert a token, and it is made to collapse: one number of
// every token is a constant, the router begins by looking at that for its first expert, and the learning rate is high.
// So nearly all tokens begin at one expert, the others are never trained, and nothing in the task brings them in. Loads
// are those of the test: MaxVio is 0 where they are even, and experts - 1 where all tokens go to one.
#define MOE_IMPLEMENTATION
#include "common/dead.h"
#include "common/experiment.h"
#include "common/loss_cases.h"

enum { CONSTANT = NET_D - 1, SWEEP = 5, D_FF = 32 }; // the weakest of a token's directions makes room for the constant
static const float constant = 4, head_start = 1;     // the first expert's logit begins at their product

// ---- the methods ----

typedef enum kind { NONE, LOSS, CONTROLLER, CONSTRUCTION } kind;
static const char *const kind_name[] = {"none", "loss", "controller", "by-construction"};

typedef struct method {
    const char *name;
    kind kind;
    const char *field; // of the desc: what --sweep varies; NULL = nothing
    double coef;
    const char *set;  // the other choices that it needs
    const char *about; // one line for the page
} method;

#define IN_LAYER(KIND, name, reads, set, coefficient, even, about) {name, LOSS, "loss." name, coefficient, set, about},
#define NO_LAYER(KIND, name, reads)
static const method methods[] = {
    {"unbalanced", NONE, NULL, 0, "", "the task's gradient alone"},
    {"random", NONE, NULL, 0, "score=random", "uniformly random: balance without knowledge"},
    LOSS_CASES(IN_LAYER, NO_LAYER)
    {"bias", CONTROLLER, "controller_rate", 0.05, "controller=bias", "against the sign of the overload"},
    {"quantile", CONTROLLER, NULL, 0, "controller=quantile", "the bias at which a fair share would win"},
    {"id", CONTROLLER, "controller_rate", 0.06, "controller=id", "integral and derivative of the error"},
    {"relu-lambda", CONTROLLER, "controller_rate", 1.2, "controller=relu-lambda loss.relu-l1=1e-4 " LOSS_CASES_RELU,
     "coefficient of relu-l1, towards a sparsity"},
    {"adaptive", CONTROLLER, "controller_rate", 0.2, "controller=adaptive loss.switch=0.01 capacity_factor=1.25",
     "coefficient of switch, by what is dropped"},
    {"usage-boost", CONTROLLER, "controller_rate", 0.4, "controller=usage-boost", "a boost for experts of little use"},
    {"base", CONSTRUCTION, NULL, 0, "gate=sigmoid select=auction",
     "an auction evens the training alone; the test takes the highest score: its loads are another routing's"},
    {"sinkhorn", CONSTRUCTION, NULL, 0, "gate=sigmoid select=sinkhorn",
     "a plan evens the training alone; the test takes the highest score: its loads are another routing's"},
    {"expert-choice", CONSTRUCTION, NULL, 0, "select=expert-choice", "experts choose tokens"},
    {"hash", CONSTRUCTION, NULL, 0, "score=hash", "by the token's visual word"},
};
enum { METHODS = sizeof methods / sizeof *methods };

// What makes a row's loads another routing's than the training's; "" where they are the same.
static const char *method_note(const method *m) {
    int mismatch = strstr(m->set, "select=auction") || strstr(m->set, "select=sinkhorn");
    return mismatch ? "balanced in training only: the test takes the highest score" : "";
}

typedef struct config {
    experiment e;
    const char *method;
    int sweep;
} config;

typedef struct result {
    const method *method;
    double coef; // NaN: it has none
    double test_loss, test_accuracy, maxvio, load_cv, train_maxvio;
    dead_note dead;
    int diverged;
} result;

// What a method's desc is at a coefficient.
static moe_desc layer_desc(const config *o, const method *m, double coef) {
    moe_desc d = {0};
    char text[64];
    d.d_model = NET_D;
    d.sequence = NET_T;
    d.d_ff = D_FF;
    d.n_experts = o->e.experts ? o->e.experts : 8;
    d.top_k = 1;
    nn_set("balance", &d, m->set);
    if (o->e.top_k) nn_top_k(&d, o->e.top_k);
    snprintf(text, sizeof text, "%.9g", coef);
    if (m->field) nn_must(moe_desc_set(&d, m->field, text));
    d.weight_decay = o->e.plan.decay;
    d.seed = o->e.plan.seed + 1;
    d.parallel.n_threads = o->e.plan.threads;
    snprintf(text, sizeof text, "%s: ", m->name);
    nn_resolve("balance", text, &d);
    return d;
}

// Coefficient `i` of a sweep: from a hundredth to a hundred times; of a factor (relu-lambda) its excess over 1.
static double sweep_coef(const method *m, size_t i) {
    double scale = pow(10, (double)i - 2);
    return strcmp(m->name, "relu-lambda") == 0 ? 1 + (m->coef - 1) * scale : m->coef * scale;
}

// ---- training ----

static void make_constant(tokens *t) {
    for (size_t i = 0; i < t->count * NET_T; i++) t->x[i * NET_D + CONSTANT] = constant;
}

// The router's first column looks at the constant and at nothing else.
static void prefer_first(moe_layer *m) {
    moe_tensor t;
    if (moe_layer_tensor(m, 0, &t) != MOE_OK || strcmp(t.name, "router") != 0) return; // hash and random have none
    size_t experts = t.dim[1];
    float *router = allocate(t.count, sizeof(float));
    nn_must(moe_layer_get(m, MOE_PART_PARAMS, "router", router, t.count));
    for (size_t r = 0; r < NET_D; r++) router[r * experts] = r == CONSTANT ? head_start : 0;
    nn_must(moe_layer_set(m, MOE_PART_PARAMS, "router", router, t.count));
    free(router);
}

static void train(result *r, const config *o, const moe_desc *desc, progress *p, size_t before) {
    const net_plan *plan = &o->e.plan;
    const samples *data = &o->e.samples;
    net *m = net_new(plan, desc);
    moe_health h;
    double loss;
    prefer_first(m->moe);
    for (size_t step = 0; step < plan->total && !r->diverged; step++) {
        if (step == plan->total - plan->total / 10) nn_must(moe_layer_health_reset(m->moe));
        r->diverged = net_step(m, plan, data, step, &loss);
        progress_update(p, before + step + 1, "%s  loss %.3f", r->method->name, loss);
    }
    r->test_loss = r->test_accuracy = r->maxvio = r->load_cv = r->train_maxvio = NAN;
    if (!r->diverged) {
        nn_must(moe_layer_health(m->moe, &h));
        r->train_maxvio = h.maxvio;
        r->diverged = net_test(m, plan, &data->test, data->test.count, &r->test_loss, &r->test_accuracy);
    }
    if (!r->diverged) {
        nn_must(moe_layer_health(m->moe, &h));
        r->maxvio = h.maxvio;
        r->load_cv = h.load_cv;
        r->dead = dead_take(&h);
    }
    net_free(m);
}

// ---- the report ----

static void write_config(config *o, const moe_desc *desc, const result *r, size_t n) {
    json *j = &o->e.lines;
    experiment_config(&o->e);
    json_raw(j, "sweep", o->sweep ? "true" : "false");
    json_object_begin(j, "layers");
    for (size_t i = 0; i < n; i++) {
        if (i && r[i].method == r[i - 1].method) continue; // the same but for its coefficient
        experiment_layer(&o->e, r[i].method->name, &desc[i]);
    }
    json_object_end(j);
    json_end(j);
}

static void write_final(json *j, const result *r) {
    json_begin(j);
    json_text(j, "event", "final");
    json_text(j, "method", r->method->name);
    json_text(j, "kind", kind_name[r->method->kind]);
    json_real(j, "coef", r->coef);
    json_real(j, "test_loss", r->test_loss);
    json_real(j, "test_accuracy", r->test_accuracy);
    json_real(j, "maxvio", r->maxvio);
    json_real(j, "load_cv", r->load_cv);
    dead_json(j, &r->dead);
    json_real(j, "train_maxvio", r->train_maxvio);
    json_text(j, "note", method_note(r->method));
    json_end(j);
}

enum { COLUMNS = 10 };
static const char *const heading[COLUMNS] = {"method", "kind", "coef",    "test loss",         "accuracy",
                                             "MaxVio", "CV",   "dead", "MaxVio in training", "  note"};
static const int width[COLUMNS] = {-25, -16, 9, 11, 10, 8, 7, 19, 20, 0};

static void row_cells(const result *r, char cell[COLUMNS][64]) {
    snprintf(cell[0], 64, "%s", r->method->name);
    snprintf(cell[1], 64, "%s", kind_name[r->method->kind]);
    experiment_number(cell[2], "%g", r->coef);
    experiment_number(cell[3], "%.4f", r->test_loss);
    if (r->diverged) snprintf(cell[3], 64, "diverged");
    experiment_number(cell[4], "%.1f%%", 100 * r->test_accuracy);
    experiment_number(cell[5], "%.2f", r->maxvio);
    experiment_number(cell[6], "%.2f", r->load_cv);
    dead_text(&r->dead, cell[7], 64);
    experiment_number(cell[8], "%.2f", r->train_maxvio);
    snprintf(cell[9], 64, "%s%s", *method_note(r->method) ? "  " : "", method_note(r->method));
}

static void print_table(FILE *f, const result *r, size_t n) {
    fputc('\n', f);
    experiment_row(f, COLUMNS, width, heading);
    for (size_t k = 0; k < n; k++) {
        char cell[COLUMNS][64];
        const char *at[COLUMNS];
        row_cells(&r[k], cell);
        for (int i = 0; i < COLUMNS; i++) at[i] = cell[i];
        experiment_row(f, COLUMNS, width, at);
    }
}

// The trade-off: one point a result, or with --sweep one curve a method.
static void draw(FILE *f, const config *o, const result *r, size_t n) {
    enum { W = 960, H = 620, CURVES_W = 320, CURVES_H = 240, ACROSS = 3 };
    static const char *const group[] = {"the two ends", "losses", "controllers", "by construction"};
    plot_point *point = allocate(n, sizeof *point);
    size_t points = 0, curves = 0, down;
    for (size_t i = 0; i < n; i++) {
        if (r[i].diverged) continue;
        int single = !o->sweep || !r[i].method->field || r[i].coef == r[i].method->coef;
        point[points++] = (plot_point){r[i].maxvio, r[i].test_loss, single ? r[i].method->name : NULL,
                                       (int)r[i].method->kind};
    }
    for (size_t i = 0; i < n; i += o->sweep && r[i].method->field ? SWEEP : 1)
        curves += o->sweep && r[i].method->field;
    down = (curves + ACROSS - 1) / ACROSS;
    plot_begin(f, W, H + (double)(down * CURVES_H), "Test loss against imbalance");
    plot_scatter(f, &(plot_cloud){.box = {0, 0, W, H},
                                  .title = "Test loss against imbalance",
                                  .x_label = "MaxVio on the test images (0 = even)",
                                  .y_label = "test loss",
                                  .point = point,
                                  .n_points = points,
                                  .group = group,
                                  .n_groups = 4});
    free(point);
    for (size_t i = 0, c = 0; c < curves; i++) {
        if (!r[i].method->field) continue;
        plot_point curve[SWEEP + 2];
        size_t k = 0;
        for (size_t s = 0; s < SWEEP; s++) {
            if (r[i + s].diverged) continue;
            curve[k++] = (plot_point){r[i + s].maxvio, r[i + s].test_loss, NULL, (int)r[i].method->kind};
        }
        size_t path = k;
        for (size_t e = 0; e < n; e++) // the two ends, for comparison
            if (r[e].method->kind == NONE && !r[e].diverged)
                curve[k++] = (plot_point){r[e].maxvio, r[e].test_loss, r[e].method->name, NONE};
        plot_scatter(f, &(plot_cloud){.box = {(double)(c % ACROSS) * CURVES_W, H + (double)(c / ACROSS) * CURVES_H,
                                              CURVES_W, CURVES_H},
                                      .title = r[i].method->name,
                                      .x_label = "MaxVio",
                                      .y_label = "test loss",
                                      .point = curve,
                                      .n_points = k,
                                      .n_path = path});
        i += SWEEP - 1;
        c++;
    }
    plot_end(f);
}

static void write_page(const config *o, const result *r, size_t n) {
    char text[768];
    const samples *data = &o->e.samples;
    FILE *f = experiment_file(&o->e, "html");
    snprintf(text, sizeof text,
             "One network, made to collapse, trained once for each way to balance it: %zu steps of %zu images (%zu for "
             "training, %zu for the test), seed %llu. MaxVio is the largest load over the mean load, less 1.",
             o->e.plan.total, o->e.plan.batch, data->train->count, data->test.count,
             (unsigned long long)o->e.plan.seed);
    page_begin(f, "The price of balance", text);
    page_card(f);
    draw(f, o, r, n);
    page_card_end(f);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "%s|<%s|%s|%s|%s|%s|%s|%s|%s|<%s", heading[0], heading[1], heading[2], heading[3], heading[4],
             heading[5], heading[6], heading[7], heading[8], "what it wants");
    for (size_t i = 0; i < n; i++) {
        char cell[COLUMNS][64];
        row_cells(&r[i], cell);
        page_row(f, 0, "%s|<%s|%s|%s|%s|%s|%s|%s|%s|<%s", cell[0], cell[1], cell[2], cell[3], cell[4], cell[5], cell[6],
                 cell[7], cell[8], r[i].method->about);
    }
    page_table_end(f);
    page_card_end(f);
    page_end(f);
    experiment_close(&o->e, f, "html");
}

// ---- the program ----

// The trainings that --method and --sweep ask for, in the order of the table; returns how many.
static const char *method_name(void *unused, size_t i) { // for experiment_choose
    (void)unused;
    return i < METHODS ? methods[i].name : NULL;
}
static size_t choose(const config *o, result *r) {
    unsigned char chosen[METHODS] = {0};
    size_t n = 0;
    experiment_choose("balance", "method", o->method, METHODS, method_name, chosen);
    for (size_t i = 0; i < METHODS; i++) {
        size_t count = o->sweep && methods[i].field ? SWEEP : 1;
        for (size_t k = 0; chosen[i] && k < count; k++, n++) {
            r[n].method = &methods[i];
            r[n].coef = methods[i].field ? methods[i].coef : NAN;
            if (count > 1) r[n].coef = sweep_coef(&methods[i], k);
        }
    }
    return n;
}

static void run(config *o, const moe_desc *desc, result *r, size_t n) {
    progress p = progress_begin("balance", "steps", n * o->e.plan.total, o->e.quiet);
    for (size_t i = 0; i < n; i++) {
        train(&r[i], o, &desc[i], &p, i * o->e.plan.total);
        write_final(&o->e.lines, &r[i]);
    }
    progress_clear(&p);
}

static void report(config *o, const result *r, size_t n) {
    experiment_end(&o->e);
    FILE *svg = experiment_file(&o->e, "svg");
    draw(svg, o, r, n);
    experiment_close(&o->e, svg, "svg");
    write_page(o, r, n);
    print_table(o->e.human, r, n);
    fprintf(o->e.human, "\n%zu steps each, %.1f s; loads on the test images; see %s/balance.html, .svg, .jsonl\n",
            o->e.plan.total, seconds_now() - o->e.begin, o->e.out);
}

int main(int argc, char **argv) {
    config o = {.e = experiment_defaults("balance"), .method = "all"};
    args_option options[] = {
        EXPERIMENT_OPTIONS(&o.e),
        {"method", ARGS_TEXT, &o.method, "NAME", "a name of the table, or several with commas between", 0, 0},
        {"sweep", ARGS_FLAG, &o.sweep, NULL, "five coefficients each, over four decades", 0, 0},
    };
    args_parse("balance", "Trains one network that collapses, once for each way to balance it.", options,
               sizeof options / sizeof *options, argc, argv);
    result *r = allocate(METHODS * SWEEP, sizeof *r);
    size_t n = choose(&o, r);
    experiment_load(&o.e, argv[0], (experiment_by_data){{10, 2}, {5e-3, 5e-3}});
    moe_desc *desc = allocate(n, sizeof *desc);
    for (size_t i = 0; i < n; i++) desc[i] = layer_desc(&o, r[i].method, r[i].coef);
    experiment_begin(&o.e);
    for (size_t k = 0; k < 2; k++) make_constant(&o.e.samples.train[k]);
    make_constant(&o.e.samples.test);
    write_config(&o, desc, r, n);
    run(&o, desc, r, n);
    report(&o, r, n);
    experiment_free(&o.e);
    free(desc);
    for (size_t i = 0; i < n; i++) dead_free(&r[i].dead);
    free(r);
    return 0;
}
