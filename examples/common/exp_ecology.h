// exp_ecology.h - the ecology number E = T H / (O + B): does E >= 0.5 keep all experts alive?
//
// After arXiv 2605.06415 (docs/math.md): 16 experts, top-2, the router an MLP; T its temperature, H the weight of the
// entropy loss, O of the oracle's, B of the balance losses (KL from uniform and the Switch loss, one weight). Dead, by
// the paper's word: under 1% of the first choices on the test set. The oracle's teacher is not published: here it is
// the class's number (of the next token, on text) modulo the experts. Pictures: the network of zoo and balance; text: a
// transformer of one layer.
#ifndef EX_EXP_ECOLOGY_H
#define EX_EXP_ECOLOGY_H

#include "exp_lm.h"
#include "exp_run.h"
#include "tokens_net.h"

enum { ECO_EXPERTS = 16, ECO_TRACK = 20, ECO_HIDDEN = 32, ECO_MAX_E = 10, ECO_TASKS = 2 };
typedef enum eco_task { ECO_PICTURES, ECO_TEXT } eco_task;
static const char *const eco_task_name[ECO_TASKS] = {"CIFAR-10", "WikiText-2"};

typedef struct eco_world {
    exp_run *run;
    cifar pictures;
    samples all;
    corpus *text;
    net_plan plan;  // of pictures
    lm_shape shape; // of text
    size_t steps[ECO_TASKS], rows, test_rows;
} eco_world;

typedef struct eco_setup {
    double T, H, O, B, ortho;
    eco_task task;
    size_t classes, random, hidden; // 0: all; steps of random routing; an expert's width
    const size_t *width;            // (ECO_EXPERTS) of each expert, at most hidden; NULL: all the same
} eco_setup;

typedef struct eco_result {
    double ecology, dead, maxvio, score; // score: accuracy, or nats a token; NaN: diverged
    double track[ECO_TRACK], peak;       // dead experts over the training
    double top1[ECO_EXPERTS];            // shares of the first choices
} eco_result;

static const eco_setup eco_base = {.T = 1, .H = 0.3, .O = 0.15, .B = 0.4, .hidden = ECO_HIDDEN}; // E = 0.545

EX_FUNC double eco_number(const eco_setup *s) { return moe_ecology_number(s->T, s->H, s->O, s->B); }

EX_FUNC moe_desc eco_desc(const eco_world *w, const eco_setup *s, uint64_t seed) {
    moe_desc d = {0};
    size_t at = 0;
    char text[400];
    d.d_model = NET_D;
    d.sequence = s->task == ECO_TEXT ? w->shape.length : NET_T;
    d.n_experts = ECO_EXPERTS;
    d.d_ff = s->hidden;
    d.random_steps = s->random;
    d.weight_decay = w->plan.decay;
    d.seed = seed + 1;
    d.parallel = w->run->parallel;
    snprintf(text, sizeof text,
             "score=mlp top_k=2 temperature=%.9g loss.entropy=%.9g loss.oracle=%.9g loss.kl-uniform=%.9g "
             "loss.switch=%.9g loss.prototype-orthogonality=%.9g", s->T, s->H, s->O, s->B, s->B, s->ortho);
    nn_must(moe_desc_parse(&d, text, &at));
    nn_must(moe_desc_resolve(&d, &d));
    return d;
}

// ---- a model of either task ----

typedef struct eco_model {
    const eco_world *world;
    const eco_setup *setup;
    samples own; // pictures of some classes; counts 0: all
    const samples *data;
    net_plan plan;
    net *net;  // of pictures
    exp_lm lm; // of text
} eco_model;

EX_FUNC tokens eco_some(const tokens *from, size_t classes) {
    tokens t = {.count = 0};
    size_t n = from->count, x = NET_T * NET_D;
    t.x = allocate(n * x, sizeof(float));
    t.id = allocate(n * NET_T, sizeof *t.id);
    t.label = allocate(n, 1);
    for (size_t i = 0; i < n; i++) {
        if (from->label[i] >= classes) continue;
        memcpy(t.x + t.count * x, from->x + i * x, x * sizeof(float));
        memcpy(t.id + t.count * NET_T, from->id + i * NET_T, NET_T * sizeof *t.id);
        t.label[t.count++] = from->label[i];
    }
    return t;
}

EX_FUNC moe_layer **eco_layer(eco_model *m) { return m->net ? &m->net->moe : &m->lm.m->layer[0].moe; }

// Experts narrower than the layer's: hidden units without weights stay so, since no gradient reaches them. What is left
// is scaled as the narrower expert would have been.
EX_FUNC void eco_narrow(moe_layer *layer, const size_t *width) {
    static const char *const name[] = {"experts.w1", "experts.wu", "experts.w2"};
    moe_tensor t;
    for (size_t k = 0; moe_layer_tensor(layer, k, &t) == MOE_OK; k++) {
        int which = 0;
        while (which < 3 && strcmp(t.name, name[which]) != 0) which++;
        if (which == 3) continue;
        float *value = allocate(t.count, sizeof *value);
        nn_must(moe_layer_get(layer, MOE_PART_PARAMS, t.name, value, t.count));
        size_t rows = t.dim[1], cols = t.dim[2], hidden = which == 2 ? rows : cols;
        for (size_t i = 0; i < t.count; i++) {
            size_t expert = i / (rows * cols), unit = which == 2 ? i / cols % rows : i % cols;
            if (unit >= width[expert]) value[i] = 0;
            else if (which == 2) value[i] *= sqrtf((float)hidden / (float)width[expert]);
        }
        nn_must(moe_layer_set(layer, MOE_PART_PARAMS, t.name, value, t.count));
        free(value);
    }
}

EX_FUNC void eco_new(eco_model *m, const eco_world *w, const eco_setup *s, uint64_t seed) {
    moe_desc desc = eco_desc(w, s, seed);
    *m = (eco_model){.world = w, .setup = s, .data = &w->all, .plan = w->plan};
    m->plan.seed = seed;
    if (s->task == ECO_TEXT) {
        lm_shape shape = w->shape;
        shape.seed = seed;
        m->lm = exp_lm_new(w->text, &shape, &desc, w->rows, w->steps[ECO_TEXT], w->plan.lr);
        m->lm.teacher_of = ECO_EXPERTS;
    } else {
        m->net = net_new(&m->plan, &desc);
        if (s->classes) {
            for (int k = 0; k < 2; k++) m->own.train[k] = eco_some(&w->all.train[k], s->classes);
            m->own.test = eco_some(&w->all.test, s->classes);
            m->data = &m->own;
        }
    }
    if (s->width) eco_narrow(*eco_layer(m), s->width);
}
EX_FUNC void eco_free(eco_model *m) {
    if (m->net) net_free(m->net);
    if (m->lm.m) exp_lm_free(&m->lm);
    samples_free(&m->own);
}

// 1: diverged.
EX_FUNC int eco_step(eco_model *m, size_t step, double *loss) {
    if (m->net) return net_step(m->net, &m->plan, m->data, step, loss);
    return exp_lm_step(&m->lm, step, loss);
}

// On the test set; the layer's health is of that. 1: diverged.
EX_FUNC int eco_test(eco_model *m, double *score, moe_health *h) {
    double loss;
    if (!m->net) *score = exp_lm_test(&m->lm, CORPUS_TEST, m->world->test_rows, NULL, NULL);
    else if (net_test(m->net, &m->plan, &m->data->test, m->data->test.count, &loss, score)) return 1;
    nn_must(moe_layer_health(*eco_layer(m), h));
    return 0;
}

// ---- one training ----

EX_FUNC void eco_write(exp_run *e, const char *part, const eco_setup *s, uint64_t seed, const eco_result *r) {
    struct json *j = exp_line(e, "run");
    json_text(j, "part", part);
    json_text(j, "data", eco_task_name[s->task]);
    json_whole(j, "seed", seed);
    json_real(j, "T", s->T);
    json_real(j, "H", s->H);
    json_real(j, "O", s->O);
    json_real(j, "B", s->B);
    json_real(j, "ecology", r->ecology);
    json_real(j, "orthogonality", s->ortho);
    json_whole(j, "classes", s->classes);
    json_whole(j, "random_steps", s->random);
    json_real(j, "dead_first", r->dead);
    json_real(j, "dead_peak", r->peak);
    json_real(j, "maxvio", r->maxvio);
    json_real(j, "score", r->score);
    json_end(j);
}

// Steps [from, to) with what `track` wants; 1: diverged.
EX_FUNC int eco_run(eco_model *m, size_t from, size_t to, const char *part, double *track) {
    exp_run *e = m->world->run;
    size_t all = m->world->steps[m->setup->task];
    double loss = 0, score;
    moe_health h;
    for (size_t step = from; step < to; step++) {
        if (eco_step(m, step, &loss)) return 1;
        exp_step(e, part, loss);
        size_t now = (step + 1) * ECO_TRACK / all, before = step * ECO_TRACK / all;
        if (!track || now == before) continue;
        if (eco_test(m, &score, &h)) return 1;
        for (size_t k = before; k < now; k++) track[k] = (double)h.n_dead_first;
    }
    return 0;
}

// What the test set says of a trained model.
EX_FUNC int eco_end(eco_model *m, eco_result *r) {
    moe_health h;
    double score;
    if (eco_test(m, &score, &h)) return 1;
    double first = 0;
    for (size_t i = 0; i < ECO_EXPERTS; i++) first += (double)h.top1[i];
    for (size_t i = 0; i < ECO_EXPERTS; i++) r->top1[i] = (double)h.top1[i] / first;
    r->dead = (double)h.n_dead_first;
    r->maxvio = h.maxvio;
    r->score = score;
    return 0;
}

// keep: the model, yours to free, or NULL; tracked: the dead experts over the training are wanted.
EX_FUNC eco_result eco_train(eco_world *w, const char *part, const eco_setup *s, uint64_t seed, int tracked,
                             eco_model *keep) {
    eco_result r = {.ecology = eco_number(s), .dead = NAN, .maxvio = NAN, .score = NAN, .peak = NAN};
    eco_model own, *m = keep ? keep : &own;
    size_t done = w->run->done, steps = w->steps[s->task];
    eco_new(m, w, s, seed);
    for (size_t k = 0; k < ECO_TRACK; k++) r.track[k] = NAN;
    int diverged = eco_run(m, 0, steps, part, tracked ? r.track : NULL);
    if (!diverged) diverged = eco_end(m, &r);
    w->run->done = done + steps;
    for (size_t k = 0; tracked && k < ECO_TRACK; k++) r.peak = fmax(r.peak, r.track[k]);
    eco_write(w->run, part, s, seed, &r);
    if (!keep) eco_free(m);
    return r;
}

// ---- the sweep ----

typedef struct eco_knob {
    const char *name;
    double T, H, O, B; // the one that is swept: 0
} eco_knob;
static const eco_knob eco_knobs[] = {{"T", 0, 0.3, 0.15, 0.4}, {"H", 1, 0, 0.15, 0.4}, {"O", 1, 0.3, 0, 0.15},
                                     {"B", 1, 0.3, 0.15, 0}};
enum { ECO_KNOBS = 4 };

// The setup at which a knob makes E.
EX_FUNC eco_setup eco_at(const eco_knob *k, double E, eco_task task) {
    eco_setup s = eco_base;
    s.T = k->T, s.H = k->H, s.O = k->O, s.B = k->B;
    s.task = task;
    switch (*k->name) {
    case 'T': s.T = E * (s.O + s.B) / s.H; break;
    case 'H': s.H = E * (s.O + s.B) / s.T; break;
    case 'O': s.O = fmax(s.T * s.H / E - s.B, 0); break;
    default: s.B = fmax(s.T * s.H / E - s.O, 0);
    }
    return s;
}

typedef struct eco_sweep {
    size_t n;
    double at[ECO_KNOBS * ECO_MAX_E * EXP_MAX_SEEDS], dead[ECO_KNOBS * ECO_MAX_E * EXP_MAX_SEEDS];
    double usual[ECO_KNOBS * ECO_MAX_E * EXP_MAX_SEEDS]; // E where B is at least the paper's 0.4, else NaN
    double mean[ECO_KNOBS * ECO_MAX_E], mean_at[ECO_KNOBS * ECO_MAX_E];
    int knob[ECO_KNOBS * ECO_MAX_E];
    size_t n_mean;
} eco_sweep;

static const double eco_quick[] = {0.05, 0.1, 0.25, 0.5, 1, 2};
static const double eco_full[ECO_MAX_E] = {0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 1, 1.4, 2};
EX_FUNC size_t eco_count(const exp_run *e) { return e->quick ? sizeof eco_quick / sizeof *eco_quick : ECO_MAX_E; }
EX_FUNC double eco_value(const exp_run *e, size_t i) { return e->quick ? eco_quick[i] : eco_full[i]; }

// "0 0 6": one number a seed
EX_FUNC void eco_list(size_t n, const double *value, char *out, size_t size) {
    size_t at = 0;
    char cell[32];
    for (size_t i = 0; i < n && at < size; i++)
        at += (size_t)snprintf(out + at, size - at, "%s%s", i ? " " : "", exp_number(cell, "%.0f", value[i]));
}
// Means over the seeds, and what they say; text: its scores are nats.
typedef struct eco_cell {
    double dead[EXP_MAX_SEEDS], score[EXP_MAX_SEEDS], peak[EXP_MAX_SEEDS];
} eco_cell;
EX_FUNC void eco_cell_text(const eco_cell *c, size_t seeds, eco_task task, char *out, size_t size) {
    char dead[80], score[48];
    double percent[EXP_MAX_SEEDS];
    for (size_t i = 0; i < seeds; i++) percent[i] = task == ECO_TEXT ? exp(c->score[i]) : 100 * c->score[i];
    eco_list(seeds, c->dead, dead, sizeof dead);
    spread_text(spread_of(seeds, percent), task == ECO_TEXT ? "%.2f" : "%.1f%%", score, sizeof score);
    snprintf(out, size, "%s|%s", dead, score);
}

EX_FUNC eco_cell eco_seeds(eco_world *w, const char *part, const eco_setup *s, int tracked) {
    eco_cell c;
    for (size_t i = 0; i < w->run->seeds; i++) {
        eco_result r = eco_train(w, part, s, w->run->seed + i, tracked, NULL);
        c.dead[i] = r.dead, c.score[i] = r.score, c.peak[i] = r.peak;
    }
    return c;
}

EX_FUNC void eco_sweep_run(eco_world *w, eco_sweep sweep[ECO_TASKS]) {
    exp_run *e = w->run;
    exp_table t = exp_table_begin("Dead experts of 16 at the end of the training, a number a seed");
    exp_row(&t, "<by|E|T|H|O|B|<CIFAR-10: dead|accuracy|<WikiText-2: dead|perplexity a token");
    for (size_t k = 0; k < ECO_KNOBS; k++)
        for (size_t i = 0; i < eco_count(e); i++) {
            char cell[ECO_TASKS][160];
            eco_setup s = eco_base;
            for (int task = 0; task < ECO_TASKS; task++) {
                eco_sweep *to = &sweep[task];
                s = eco_at(&eco_knobs[k], eco_value(e, i), (eco_task)task);
                eco_cell c = eco_seeds(w, "sweep", &s, 0);
                for (size_t n = 0; n < e->seeds; n++) {
                    to->at[to->n] = eco_number(&s);
                    to->usual[to->n] = s.B >= 0.4 ? eco_number(&s) : NAN;
                    to->dead[to->n++] = c.dead[n];
                }
                to->mean[to->n_mean] = spread_of(e->seeds, c.dead).mean;
                to->mean_at[to->n_mean] = eco_number(&s);
                to->knob[to->n_mean++] = (int)k;
                eco_cell_text(&c, e->seeds, (eco_task)task, cell[task], sizeof cell[task]);
            }
            exp_row(&t, "<%s|%.2f|%.3g|%.3g|%.3g|%.3g|<%s|<%s", eco_knobs[k].name, eco_number(&s), s.T, s.H, s.O, s.B,
                    cell[0], cell[1]);
        }
    exp_table_end(e, &t);
}

EX_FUNC void eco_draw(FILE *f, const void *arg) {
    static const char *const group[] = {"by T", "by H", "by O", "by B"};
    static const double mark[] = {-0.30103}; // log10(0.5)
    const eco_sweep *sweep = arg;
    for (int task = 0; task < ECO_TASKS; task++) {
        const eco_sweep *s = &sweep[task];
        double x[ECO_KNOBS * ECO_MAX_E + 2], y[ECO_KNOBS * ECO_MAX_E + 2];
        int knob[ECO_KNOBS * ECO_MAX_E + 2];
        char title[80];
        x[0] = log10(0.04), x[s->n_mean + 1] = log10(2.5); // the axis; no points
        y[0] = y[s->n_mean + 1] = NAN, knob[0] = knob[s->n_mean + 1] = 0;
        for (size_t i = 0; i < s->n_mean; i++)
            x[i + 1] = log10(s->mean_at[i]), y[i + 1] = s->mean[i], knob[i + 1] = s->knob[i];
        snprintf(title, sizeof title, "%s: dead experts of 16 (mean of the seeds)", eco_task_name[task]);
        plot_points(f, &(plot_point_chart){.box = {480.0 * task, 0, 480, 320}, .title = title,
                                           .x_label = "log10 E, from E = 0.04 to 2.5; dashed: E = 0.5",
                                           .n = s->n_mean + 2, .x = x, .y = y, .group = knob, .group_name = group,
                                           .n_groups = ECO_KNOBS, .mark = mark, .n_marks = 1});
    }
}

// ---- classes, orthogonality, tiers ----

// Dead experts by H for 2, 5 and 10 classes: the mean over the sweep, a seed.
EX_FUNC void eco_classes(eco_world *w, const eco_sweep *sweep) {
    static const size_t classes[] = {2, 5, 10};
    exp_run *e = w->run;
    size_t values = eco_count(e), by_h = values * e->seeds; // 10 classes: the sweep's, of which H is the second knob
    double mean[3][EXP_MAX_SEEDS] = {{0}}, difference[EXP_MAX_SEEDS];
    exp_table t = exp_table_begin("Classes of CIFAR-10: dead experts by H (10 classes: above)");
    exp_row(&t, "<classes|E|<dead|accuracy");
    for (int c = 0; c < 3; c++)
        for (size_t i = 0; i < values; i++) {
            eco_setup s = eco_at(&eco_knobs[1], eco_value(e, i), ECO_PICTURES);
            eco_cell r;
            s.classes = classes[c];
            if (c < 2) r = eco_seeds(w, "classes", &s, 0);
            else memcpy(r.dead, sweep->dead + by_h + i * e->seeds, e->seeds * sizeof *r.dead);
            for (size_t n = 0; n < e->seeds; n++) mean[c][n] += r.dead[n] / (double)values;
            char row[160];
            if (c == 2) continue;
            eco_cell_text(&r, e->seeds, ECO_PICTURES, row, sizeof row);
            exp_row(&t, "<%zu|%.2f|<%s", classes[c], eco_number(&s), row);
        }
    exp_table_end(e, &t);
    for (size_t n = 0; n < e->seeds; n++) difference[n] = mean[0][n] - mean[2][n];
    spread d = spread_of(e->seeds, difference);
    exp_claim(e, "the number of classes changes how many die", "0 dead of 10 classes; 7 of 16 dead of 200",
              exp_differs(d), "mean over the sweep by H: %.2f of 2 classes, %.2f of 5, %.2f of 10; 2 less 10: "
              "%.2f +- %.2f (95%%)", spread_of(e->seeds, mean[0]).mean, spread_of(e->seeds, mean[1]).mean,
              spread_of(e->seeds, mean[2]).mean, d.mean, spread_half(d));
}

EX_FUNC void eco_orthogonality(eco_world *w) {
    static const double ortho[] = {0, 0.02, 0.05, 0.1, 0.2};
    static const char *const name[ECO_TASKS] = {"orthogonality 0 to 0.2 does no harm, CIFAR-10",
                                                "orthogonality 0 to 0.2 does no harm, WikiText-2"};
    static const char *const source[ECO_TASKS] = {"no toxicity", "perplexity 35041 33493 35737 33163 37812"};
    static const char *const unit[ECO_TASKS] = {"of 1", "nats a token"};
    static const double margin[ECO_TASKS] = {0.02, 0.02};
    exp_run *e = w->run;
    double none[ECO_TASKS][EXP_MAX_SEEDS], most[ECO_TASKS][EXP_MAX_SEEDS];
    exp_table t = exp_table_begin("Orthogonality of the router's columns, at E = 0.545");
    exp_row(&t, "<weight|<CIFAR-10: dead|accuracy|<WikiText-2: dead|perplexity a token");
    for (int i = 0; i < 5; i++) {
        char cell[ECO_TASKS][160];
        for (int task = 0; task < ECO_TASKS; task++) {
            eco_setup s = eco_base;
            s.task = (eco_task)task, s.ortho = ortho[i];
            eco_cell r = eco_seeds(w, "orthogonality", &s, 0);
            for (size_t n = 0; n < e->seeds; n++) {
                double harm = task == ECO_TEXT ? r.score[n] : -r.score[n];
                if (!i) none[task][n] = harm;
                else most[task][n] = i > 1 ? fmax(most[task][n], harm) : harm;
            }
            eco_cell_text(&r, e->seeds, (eco_task)task, cell[task], sizeof cell[task]);
        }
        exp_row(&t, "<%.2f|<%s|<%s", ortho[i], cell[0], cell[1]);
    }
    exp_table_end(e, &t);
    for (int task = 0; task < ECO_TASKS; task++) {
        for (size_t n = 0; n < e->seeds; n++) most[task][n] = fmax(most[task][n] - none[task][n], 0);
        spread harm = spread_of(e->seeds, most[task]);
        exp_claim(e, name[task], source[task], exp_same(harm, margin[task]), "the worst weight costs %.3f +- %.3f %s",
                  harm.mean, spread_half(harm), unit[task]);
    }
}

// Tiers: experts of different width, the parameters of the flat ones in all. What a tier is, is not published.
typedef struct eco_tiers {
    const char *name;
    size_t hidden, size[4], width[4]; // size: of each tier
} eco_tiers;
static const eco_tiers eco_tier[] = {{"flat 16", ECO_HIDDEN, {16}, {ECO_HIDDEN}},
                                     {"8:4:4", 64, {8, 4, 4}, {16, 32, 64}},
                                     {"4:4:4:4", 72, {4, 4, 4, 4}, {8, 16, 32, 72}}};

EX_FUNC void eco_tiers_run(eco_world *w) {
    exp_run *e = w->run;
    exp_table t = exp_table_begin("Tiers of experts of different width, on CIFAR-10 at E = 0.545");
    exp_row(&t, "<tiers|<widths|<dead|accuracy|<first choices by tier, mean of the seeds");
    double score[3][EXP_MAX_SEEDS];
    for (int k = 0; k < 3; k++) {
        const eco_tiers *tier = &eco_tier[k];
        size_t width[ECO_EXPERTS], of[ECO_EXPERTS], n = 0;
        double used[4] = {0};
        char share[64] = "", widths[64] = "", cell[160];
        for (size_t i = 0; i < 4; i++)
            for (size_t c = 0; c < tier->size[i]; c++) of[n] = i, width[n++] = tier->width[i];
        eco_setup s = eco_base;
        s.hidden = tier->hidden, s.width = width;
        eco_cell c;
        for (size_t i = 0; i < e->seeds; i++) {
            eco_result r = eco_train(w, tier->name, &s, e->seed + i, 0, NULL);
            c.dead[i] = r.dead, c.score[i] = score[k][i] = r.score;
            for (size_t x = 0; x < ECO_EXPERTS; x++) used[of[x]] += 100 * r.top1[x] / (double)e->seeds;
        }
        for (size_t i = 0; i < 4 && tier->size[i]; i++) {
            snprintf(share + strlen(share), sizeof share - strlen(share), "%s%.0f", i ? "/" : "", used[i]);
            snprintf(widths + strlen(widths), sizeof widths - strlen(widths), "%s%zu", i ? "/" : "", tier->width[i]);
        }
        eco_cell_text(&c, e->seeds, ECO_PICTURES, cell, sizeof cell);
        exp_row(&t, "<%s|<%s|<%s|<%s%%", tier->name, widths, cell, share);
    }
    exp_table_end(e, &t);
    double gain[EXP_MAX_SEEDS];
    for (size_t i = 0; i < e->seeds; i++) gain[i] = 100 * (score[0][i] - score[2][i]);
    spread s = spread_of(e->seeds, gain);
    exp_claim(e, "flat 16 beats four tiers", "65.88 against 64.40% (CIFAR-100)", exp_positive(s),
              "%+.1f +- %.1f points (95%%)", s.mean, spread_half(s));
}

// ---- temperature, warm-up, revival ----

EX_FUNC void eco_temperature(eco_world *w) {
    static const float scan[] = {0.1f, 0.25f, 0.5f, 1, 2, 5};
    exp_run *e = w->run;
    double moved = 0, range[EXP_MAX_SEEDS];
    char text[6][3][96];
    memset(text, 0, sizeof text);
    for (size_t n = 0; n < e->seeds; n++) {
        eco_model m;
        eco_setup s = eco_base;
        eco_result trained = eco_train(w, "temperature", &s, e->seed + n, 0, &m);
        double lo = INFINITY, hi = -INFINITY;
        for (int i = 0; i < 6; i++) {
            eco_result r;
            moe_layer_side(m.net->moe)->temperature = scan[i];
            if (eco_end(&m, &r)) continue;
            moved = fmax(moved, fabs(r.dead - trained.dead));
            moved = fmax(moved, fabs(r.maxvio - trained.maxvio));
            lo = fmin(lo, r.score), hi = fmax(hi, r.score);
            const double shown[] = {r.dead, 100 * r.score, r.maxvio};
            const char *format[] = {"%s%.0f", "%s%.1f%%", "%s%.2f"};
            for (int k = 0; k < 3; k++) {
                size_t at = strlen(text[i][k]);
                snprintf(text[i][k] + at, sizeof text[i][k] - at, format[k], n ? " " : "", shown[k]);
            }
        }
        range[n] = hi - lo;
        eco_free(&m);
    }
    exp_table t = exp_table_begin("A trained network evaluated at other temperatures, a number a seed");
    exp_row(&t, "<T|<dead|<MaxVio|<accuracy");
    for (int i = 0; i < 6; i++) exp_row(&t, "<%g|<%s|<%s|<%s", (double)scan[i], text[i][0], text[i][2], text[i][1]);
    exp_table_end(e, &t);
    spread s = spread_of(e->seeds, range);
    exp_verdict v = EXP_NOT_CONFIRMED;
    if (moved <= 0.01) v = exp_at_least(e->seeds, range, 0.01);
    exp_claim(e, "T after training: usage stays, accuracy does not", "T 0.1 to 5", v,
              "dead and MaxVio move by at most %.2f, accuracy by %.1f points (mean)", moved, 100 * s.mean);
}

EX_FUNC void eco_warmup(eco_world *w) {
    exp_run *e = w->run;
    exp_table t = exp_table_begin("Random routing as a warm-up, at E = 0.545: dead experts a seed");
    exp_row(&t, "<data|random steps|<peak|<end|score");
    double most = 0;
    char peaks[2][64];
    for (int task = 0; task < ECO_TASKS; task++)
        for (int k = 0; k < 2; k++) {
            eco_setup s = eco_base;
            char cell[160];
            s.task = (eco_task)task, s.random = (size_t)k * w->steps[task] / 5;
            eco_cell c = eco_seeds(w, "warm-up", &s, 1);
            eco_list(e->seeds, c.peak, peaks[k], sizeof peaks[k]);
            for (size_t i = 0; i < e->seeds; i++) most = fmax(most, c.dead[i]);
            eco_cell_text(&c, e->seeds, s.task, cell, sizeof cell);
            exp_row(&t, "<%s|%zu|<%s|<%s", eco_task_name[task], s.random, peaks[k], cell);
        }
    exp_table_end(e, &t);
    exp_claim(e, "with or without a random warm-up all end without dead", "0; peak 9 without, 13 with",
              most > 0 ? EXP_NOT_CONFIRMED : EXP_CONFIRMED, "at most %.0f dead at the end", most);
}

// A router that begins with a head start of 4 logits for 4 of 16 experts, trained without any of H, O, B; at half time
// some are switched on.
EX_FUNC void eco_revival(eco_world *w) {
    static const struct {
        const char *name;
        double H, B;
    } arm[] = {{"nothing", 0, 0}, {"H = 0.3", 0.3, 0}, {"B = 0.4", 0, 0.4}};
    exp_run *e = w->run;
    exp_table t = exp_table_begin("Revival on CIFAR-10: dead experts of 16, a number a seed");
    exp_row(&t, "<switched on at half time|<dead at half time|<dead at the end|accuracy");
    double fell[3][EXP_MAX_SEEDS];
    for (int k = 0; k < 3; k++) {
        double before[EXP_MAX_SEEDS];
        char text[64], cell[160];
        eco_cell c;
        for (size_t n = 0; n < e->seeds; n++) {
            eco_setup s = eco_base, on;
            eco_model m;
            eco_result half = {.dead = NAN}, end = {.dead = NAN, .score = NAN};
            size_t steps = w->steps[ECO_PICTURES];
            float head[ECO_EXPERTS] = {4, 4, 4, 4};
            s.H = s.O = s.B = 0;
            on = s;
            on.H = arm[k].H, on.B = arm[k].B;
            eco_new(&m, w, &s, e->seed + n);
            nn_must(moe_layer_set(m.net->moe, MOE_PART_PARAMS, "router.bias", head, ECO_EXPERTS));
            int diverged = eco_run(&m, 0, steps / 2, "revival", NULL) || eco_end(&m, &half);
            moe_desc desc = eco_desc(w, &on, e->seed + n);
            moe_layer *next = exp_layer_like(m.net->moe, &desc);
            moe_layer_free(m.net->moe);
            m.net->moe = next;
            m.setup = &on;
            if (!diverged) diverged = eco_run(&m, steps / 2, steps, "revival", NULL) || eco_end(&m, &end);
            before[n] = half.dead, c.dead[n] = end.dead, c.score[n] = end.score;
            fell[k][n] = half.dead - end.dead;
            end.ecology = eco_number(&on), end.peak = half.dead;
            eco_write(e, "revival", &on, e->seed + n, &end);
            eco_free(&m);
        }
        eco_list(e->seeds, before, text, sizeof text);
        eco_cell_text(&c, e->seeds, ECO_PICTURES, cell, sizeof cell);
        exp_row(&t, "<%s|<%s|<%s", arm[k].name, text, cell);
    }
    exp_table_end(e, &t);
    double more[EXP_MAX_SEEDS];
    for (size_t n = 0; n < e->seeds; n++) more[n] = fell[2][n] - fell[0][n];
    spread s = spread_of(e->seeds, more);
    exp_claim(e, "B brings dead experts back", "12 to 4; without B stuck at 12", exp_positive(s),
              "%.1f +- %.1f more come back with B than without (95%%)", s.mean, spread_half(s));
}

// ---- the world ----

EX_FUNC void eco_begin(eco_world *w, exp_run *e) {
    memset(w, 0, sizeof *w);
    w->run = e;
    cifar_load(&w->pictures, e->data, e->argv0);
    nn ops = {.parallel = e->parallel};
    w->all = samples_make(&ops, &w->pictures, e->seed, e->quiet);
    nn_free(&ops);
    w->text = exp_text(e);
    w->steps[ECO_PICTURES] = exp_size(e, e->steps, 200, 2000);
    w->steps[ECO_TEXT] = exp_size(e, e->steps, 150, 2000);
    w->plan = (net_plan){.total = w->steps[ECO_PICTURES], .batch = 50, .threads = e->threads, .seed = e->seed,
                         .lr = 5e-3, .smoothing = 0.1f, .decay = 0.05f};
    w->shape = (lm_shape){.vocab = w->text->bpe->n_tokens, .d = NET_D, .heads = 2, .layers = 1, .length = 64,
                          .tied = 1, .optimizer = LM_ADAMW, .theta = 10000, .epsilon = 1e-5};
    w->rows = 8 * 64;
    w->test_rows = 4096;
}
EX_FUNC void eco_finish(eco_world *w) {
    cifar_free(&w->pictures);
    samples_free(&w->all);
}

// How many steps all parts take.
EX_FUNC size_t eco_steps(const eco_world *w) {
    size_t pictures = w->steps[0], text = w->steps[1], seeds = w->run->seeds, values = eco_count(w->run);
    return seeds * ((ECO_KNOBS * values + 5 + 2) * (pictures + text) + (2 * values + 3 + 1 + 3) * pictures);
}

// The claim for each data set, as it stands and with B as high as the paper's; the verdict on all trainings.
EX_FUNC exp_verdict eco_judge(exp_run *e, const eco_sweep sweep[ECO_TASKS], exp_sides *both) {
    size_t n = 0, all = sweep[0].n + sweep[1].n;
    double *at = allocate(2 * all, sizeof *at), *dead = at + all;
    for (int task = 0; task < ECO_TASKS; task++) {
        const eco_sweep *s = &sweep[task];
        for (int usual = 0; usual < 2; usual++) {
            char what[96];
            exp_sides side;
            exp_verdict v = exp_threshold(s->n, usual ? s->usual : s->at, s->dead, 0.5, &side);
            snprintf(what, sizeof what, "E >= 0.5%s: none dead, %s", usual ? " with B >= 0.4" : "",
                     eco_task_name[task]);
            exp_claim(e, what, "0 dead at E 0.545", v, "some dead in %zu of %zu trainings above, %zu of %zu below",
                      side.above_bad, side.above, side.below_bad, side.below);
        }
        memcpy(at + n, s->at, s->n * sizeof *at);
        memcpy(dead + n, s->dead, s->n * sizeof *dead);
        n += s->n;
    }
    exp_verdict v = exp_threshold(n, at, dead, 0.5, both);
    free(at);
    return v;
}

EX_FUNC void experiment_ecology(exp_run *e) {
    static eco_sweep sweep[ECO_TASKS];
    size_t flag = e->seeds;
    eco_world w;
    exp_sides both;
    e->seeds = exp_size(e, flag, 3, 3);
    eco_begin(&w, e);
    exp_bar(e, eco_steps(&w));
    memset(sweep, 0, sizeof sweep);
    eco_sweep_run(&w, sweep);
    exp_picture(e, "Dead experts against the ecology number", 960, 330, eco_draw, sweep);
    exp_verdict v = eco_judge(e, sweep, &both);
    eco_classes(&w, &sweep[ECO_PICTURES]);
    eco_orthogonality(&w);
    eco_tiers_run(&w);
    eco_temperature(&w);
    eco_warmup(&w);
    eco_revival(&w);
    exp_final(e, v,
              "with E >= 0.5, %zu of %zu trainings end with dead experts (at most %.0f of 16); below, %zu of %zu do",
              both.above_bad, both.above, both.most, both.below_bad, both.below);
    eco_finish(&w);
    e->seeds = flag;
}

#endif
