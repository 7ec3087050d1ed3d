// exp_phases.h - the three phases of expert routing: gamma_eff of every layer over a training, checkpoint by
// checkpoint.
//
// After arXiv 2604.04230, of whose text only the abstract could be read: the estimators are this library's (docs/
// gamma.md), so are the model (OLMoE's layout, small) and its length. Each checkpoint reads the validation text in 50
// batches, the units of the bootstrap.
#ifndef EX_EXP_PHASES_H
#define EX_EXP_PHASES_H

#include "exp_lm.h"
#include "exp_run.h"
#include "game.h"

enum { PHASES_MOST = 64, PHASES_LAYERS = 4, PHASES_EXPERTS = 16, PHASES_BATCHES = 50, PHASES_SEQUENCES = 14,
       PHASES_KEPT = 8192 };
static const double phases_alpha = 0.01; // of the Switch loss
static const struct {
    const char *name, *set;
} phases_model = {"softmax-topk", "top_k=2 normalize=false loss.switch=0.01 loss.z=0.001"};

// One layer at one checkpoint.
typedef struct phases_point {
    game_note note;
    moe_game_fit fit, held;                   // on all batches; fitted on a half, measured on the other
    double of_quality[MOE_QUALITY_COUNT];     // gamma by each estimator of the quality
    double agree[MOE_QUALITY_COUNT];          // r of its qualities with the mean logits
} phases_point;

typedef struct phases_types { // of the last checkpoint
    double l1_single, l1_coupled, l1_independent;
} phases_types;

typedef struct phases_data {
    size_t n, layers, kept; // checkpoints; tokens whose logits are kept
    double step[PHASES_MOST], valid[PHASES_MOST];
    phases_point at[PHASES_LAYERS][PHASES_MOST];
    phases_types types[PHASES_LAYERS][3]; // of 4, 8, 16 types
    moe_phase_kind phase[PHASES_LAYERS + 1][PHASES_MOST];
    game game[PHASES_LAYERS];
    float *logits[PHASES_LAYERS]; // (PHASES_KEPT, experts) of this checkpoint's first tokens
    int32_t *index[PHASES_LAYERS];
} phases_data;
static const size_t phases_n_types[3] = {4, 8, 16};

EX_FUNC void phases_see(void *arg, exp_lm *l, size_t rows) {
    phases_data *d = arg;
    size_t take = rows;
    if (take > PHASES_KEPT - d->kept) take = PHASES_KEPT - d->kept;
    for (size_t i = 0; i < d->layers; i++) {
        const moe_tape *t = moe_layer_tape(l->m->layer[i].moe);
        game_take(&d->game[i], l->m->layer[i].moe);
        memcpy(d->logits[i] + d->kept * PHASES_EXPERTS, t->logits, take * PHASES_EXPERTS * sizeof(float));
        memcpy(d->index[i] + d->kept * t->n_slots, t->index, take * t->n_slots * sizeof(int32_t));
    }
    d->kept += take;
}

// Every estimator of the quality: gamma by it, and its r with the mean logits.
EX_FUNC void phases_qualities(const phases_data *d, size_t i, size_t slots, phases_point *p) {
    enum { E = PHASES_EXPERTS };
    double quality[MOE_QUALITY_COUNT][E], load[E] = {0}, work[2 * E];
    double *scratch = allocate(d->kept + E, sizeof *scratch);
    for (size_t t = 0; t < d->kept * slots; t++)
        if (d->index[i][t] >= 0) load[d->index[i][t]] += 1;
    for (int k = 0; k < MOE_QUALITY_COUNT; k++) {
        moe_game_fit fit;
        int finite = 1;
        nn_must(moe_game_quality((moe_quality_kind)k, d->kept, E, slots, d->logits[i], d->index[i], scratch,
                                 quality[k]));
        p->of_quality[k] = NAN;
        for (size_t x = 0; x < E; x++) finite &= isfinite(quality[k][x]) != 0;
        if (finite) {
            nn_must(moe_game_estimate(E, quality[k], load, (double)(d->kept * slots), work, &fit));
            p->of_quality[k] = fit.gamma;
        }
        nn_must(moe_pearson(E, quality[MOE_QUALITY_MEAN], quality[k], &p->agree[k]));
    }
    free(scratch);
}

EX_FUNC void phases_cluster(phases_data *d, size_t i, size_t slots) {
    enum { E = PHASES_EXPERTS };
    uint32_t *type = allocate(d->kept, sizeof *type);
    double load[E] = {0}, quality[E], two[2 * E];
    moe_game_fit single;
    for (size_t t = 0; t < d->kept * slots; t++)
        if (d->index[i][t] >= 0) load[d->index[i][t]] += 1;
    nn_must(moe_game_quality(MOE_QUALITY_MEAN, d->kept, E, slots, d->logits[i], d->index[i], NULL, quality));
    nn_must(moe_game_estimate(E, quality, load, (double)(d->kept * slots), two, &single));
    for (int k = 0; k < 3; k++) {
        size_t C = phases_n_types[k], bytes;
        nn_must(moe_game_types_scratch(E, C, &bytes));
        double *share = allocate(C, sizeof *share), *types = allocate(C * E, sizeof *types);
        double *work = allocate(1, bytes + (d->kept + E) * sizeof *work);
        moe_game_types_fit fit;
        nn_must(moe_game_cluster(d->kept, E, C, 1, d->logits[i], type, share, types, work));
        nn_must(moe_game_types_estimate(E, C, share, types, load, work, &fit));
        d->types[i][k] = (phases_types){single.l1_game, fit.l1_coupled, fit.l1_independent};
        free(share);
        free(types);
        free(work);
    }
    free(type);
}

EX_FUNC void phases_write(exp_run *e, const phases_data *d, size_t c, size_t i) {
    const phases_point *p = &d->at[i][c];
    struct json *j = exp_line(e, "checkpoint");
    json_real(j, "step", d->step[c]);
    json_whole(j, "layer", i);
    json_real(j, "valid_loss", d->valid[c]);
    game_json(j, &p->note);
    json_real(j, "gamma_explicit", moe_game_explicit(phases_alpha, PHASES_EXPERTS, 1));
    json_real(j, "l1_game_held_out", p->held.l1_game);
    json_real(j, "l1_softmax_held_out", p->held.l1_softmax);
    json_real(j, "peak_load", p->fit.peak_load);
    json_real(j, "peak_softmax", p->fit.peak_softmax);
    json_object_begin(j, "gamma_by_quality");
    for (int k = 0; k < MOE_QUALITY_COUNT; k++) json_real(j, moe_quality_name((moe_quality_kind)k), p->of_quality[k]);
    json_object_end(j);
    json_end(j);
}

EX_FUNC void phases_checkpoint(exp_run *e, exp_lm *l, phases_data *d, size_t step, int last) {
    enum { E = PHASES_EXPERTS };
    size_t c = d->n++, slots = 0;
    d->step[c] = (double)step;
    d->kept = 0;
    d->valid[c] = exp_lm_test(l, CORPUS_VALID, PHASES_BATCHES * l->rows, phases_see, d);
    for (size_t i = 0; i < d->layers; i++) {
        phases_point *p = &d->at[i][c];
        double quality[E], load[E], work[2 * E], selections;
        moe_layer *layer = l->m->layer[i].moe;
        moe_game view = d->game[i].counts;
        slots = moe_layer_tape(layer)->n_slots;
        if (d->game[i].taken < view.n_batches) view.n_batches = d->game[i].taken;
        nn_must(moe_game_pool(&view, NULL, 0, quality, load, &selections));
        nn_must(moe_game_estimate(E, quality, load, selections, work, &p->fit));
        nn_must(moe_game_holdout(&view, 1, &p->held));
        p->note = game_end(&d->game[i], layer, &e->parallel);
        phases_qualities(d, i, slots, p);
        if (last) phases_cluster(d, i, slots);
        phases_write(e, d, c, i);
    }
}

// ---- what the series say ----

// The series of a layer: gamma or its excess over the null, with the interval, where identified.
typedef struct phases_series {
    size_t n, top; // points; the highest
    double step[PHASES_MOST], y[PHASES_MOST], lo[PHASES_MOST], hi[PHASES_MOST];
    moe_phase_kind phase[PHASES_MOST];
    char text[80]; // the phases
} phases_series;

EX_FUNC void phases_take(const phases_data *d, size_t i, int excess, phases_series *s) {
    double work[PHASES_MOST];
    s->n = s->top = 0;
    for (size_t c = 0; c < d->n; c++) {
        const game_note *g = &d->at[i][c].note;
        double one[3] = {g->gamma, g->lo, g->hi};
        if (excess) one[0] = g->null.gamma_excess, one[1] = g->null.excess_lo, one[2] = g->null.excess_hi;
        if (!isfinite(one[0]) || !isfinite(one[1]) || !isfinite(one[2])) continue;
        s->step[s->n] = d->step[c];
        s->y[s->n] = one[0], s->lo[s->n] = one[1], s->hi[s->n] = one[2];
        if (one[0] > s->y[s->top]) s->top = s->n;
        s->n++;
    }
    nn_must(moe_game_phases(s->n, s->step, s->y, s->lo, s->hi, work, s->phase));
    exp_phases_text(s->n, s->phase, s->text, sizeof s->text);
}
// Too few points tell nothing: at least half of the checkpoints must have a number.
EX_FUNC exp_verdict phases_verdict(const phases_data *d, const phases_series *s) {
    return exp_phases(s->n, s->phase, 2 * s->n >= d->n ? s->n : 0);
}

// A row of the table; counts the layers that tell, and those that have the three phases.
EX_FUNC void phases_row(const phases_data *d, size_t i, int excess, exp_table *t, size_t telling[2], size_t so[2]) {
    phases_series s;
    char span[80] = "-";
    phases_take(d, i, excess, &s);
    if (s.n)
        snprintf(span, sizeof span, "%.1f|%.1f|%.0f|%.1f", s.y[0], s.y[s.top], s.step[s.top], s.y[s.n - 1]);
    exp_verdict v = phases_verdict(d, &s);
    if (v != EXP_NOT_TESTABLE) telling[excess]++;
    if (v == EXP_CONFIRMED) so[excess]++;
    exp_row(t, "<%zu|<%s|%zu|%s|<%s", i, excess ? "excess" : "gamma", s.n, s.n ? span : "-|-|-|-", s.text);
}

// Means over checkpoints and layers of what is known.
EX_FUNC double phases_mean(const phases_data *d, size_t offset) {
    double sum = 0, known = 0;
    for (size_t i = 0; i < d->layers; i++)
        for (size_t c = 0; c < d->n; c++) {
            double v;
            memcpy(&v, (const char *)&d->at[i][c] + offset, sizeof v);
            if (isfinite(v)) sum += v, known++;
        }
    return known > 0 ? sum / known : NAN;
}

EX_FUNC void phases_claims_types(exp_run *e, const phases_data *d) {
    exp_table t = exp_table_begin("Types of tokens, at the last checkpoint: L1 of the load");
    double gain[PHASES_LAYERS], mean[3] = {0};
    size_t better[3] = {0};
    exp_row(&t, "<layer|types|one type|coupled|independent|gain of the coupled");
    for (size_t i = 0; i < d->layers; i++)
        for (int k = 0; k < 3; k++) {
            const phases_types *p = &d->types[i][k];
            double g = 1 - p->l1_coupled / p->l1_single;
            if (k == 1) gain[i] = g;
            mean[k] += 100 * g / (double)d->layers;
            if (g >= 0.01) better[k]++;
            exp_row(&t, "<%zu|%zu|%.4f|%.4f|%.4f|%.0f%%", i, phases_n_types[k], p->l1_single, p->l1_coupled,
                    p->l1_independent, 100 * g);
        }
    exp_table_end(e, &t);
    exp_claim(e, "8 types predict every layer's load better, by 1% or more", "all of 16; 30% on average",
              exp_at_least(d->layers, gain, 0.01), "%zu of %zu layers; %.0f%% on average (4 types: %.0f%%, 16: %.0f%%)",
              better[1], d->layers, mean[1], mean[0], mean[2]);
    double coupled = 0, independent = 0;
    for (size_t i = 0; i < d->layers; i++) {
        coupled += d->types[i][1].l1_coupled / (double)d->layers;
        independent += d->types[i][1].l1_independent / (double)d->layers;
    }
    exp_claim(e, "independent types beat the coupled game", "0.133 against 0.146 [S]",
              independent < coupled ? EXP_CONFIRMED : EXP_NOT_CONFIRMED, "%.4f against %.4f", independent, coupled);
}

EX_FUNC void phases_claims_quality(exp_run *e, const phases_data *d) {
    exp_table t = exp_table_begin("Estimators of the quality against the mean logit");
    double series[MOE_QUALITY_COUNT], vectors[MOE_QUALITY_COUNT], lowest[2] = {INFINITY, INFINITY};
    exp_row(&t, "<estimator|r of the qualities (mean)|r of the gamma series|points");
    for (int k = 1; k < MOE_QUALITY_COUNT; k++) {
        double *a = allocate(2 * PHASES_LAYERS * PHASES_MOST, sizeof *a), *b = a + PHASES_LAYERS * PHASES_MOST;
        size_t n = 0;
        for (size_t i = 0; i < d->layers; i++)
            for (size_t c = 0; c < d->n; c++) {
                a[n] = d->at[i][c].of_quality[0], b[n] = d->at[i][c].of_quality[k];
                n += isfinite(a[n]) && isfinite(b[n]) ? 1 : 0;
            }
        series[k - 1] = NAN;
        if (n > 2) nn_must(moe_pearson(n, a, b, &series[k - 1]));
        vectors[k - 1] = phases_mean(d, offsetof(phases_point, agree) + (size_t)k * sizeof(double));
        lowest[0] = fmin(lowest[0], vectors[k - 1]), lowest[1] = fmin(lowest[1], series[k - 1]);
        char cell[2][32];
        exp_row(&t, "<%s|%s|%s|%zu", moe_quality_name((moe_quality_kind)k),
                exp_number(cell[0], "%.3f", vectors[k - 1]), exp_number(cell[1], "%.3f", series[k - 1]), n);
        free(a);
    }
    exp_table_end(e, &t);
    exp_claim(e, "estimators of the quality agree: qualities", "r >= 0.89",
              exp_at_least(MOE_QUALITY_COUNT - 1, vectors, 0.89), "lowest r %.3f", lowest[0]);
    exp_claim(e, "estimators of the quality agree: gamma", "r >= 0.89",
              exp_at_least(MOE_QUALITY_COUNT - 1, series, 0.89), "lowest r %.3f", lowest[1]);
}

EX_FUNC void phases_claims(exp_run *e, const phases_data *d) {
    double played = phases_mean(d, offsetof(phases_point, held) + offsetof(moe_game_fit, l1_game));
    double softmax = phases_mean(d, offsetof(phases_point, held) + offsetof(moe_game_fit, l1_softmax));
    double gamma = phases_mean(d, offsetof(phases_point, note) + offsetof(game_note, gamma));
    double explicit_part = moe_game_explicit(phases_alpha, PHASES_EXPERTS, 1), first = 0, last = 0;
    size_t known = 0, more = 0;
    exp_verdict near = EXP_NOT_TESTABLE;
    if (!isnan(played)) near = fabs(played - softmax) <= 0.01 ? EXP_CONFIRMED : EXP_NOT_CONFIRMED;
    exp_claim(e, "one type: the game is a softmax at a temperature (held-out L1 within 0.01)", "0.199 against 0.200",
              near, "%.3f against %.3f", played, softmax);
    for (size_t i = 0; i < d->layers; i++)
        for (size_t c = 0; c < d->n; c++) {
            double g = d->at[i][c].note.gamma;
            if (isnan(g)) continue;
            known++;
            if (g - explicit_part > explicit_part) more++;
        }
    exp_claim(e, "the implicit part is the larger one", "gamma_eff = explicit + implicit", exp_majority(more, known),
              "in %zu of %zu layers and checkpoints; mean gamma %.2f, explicit %.2f (a unit of loss = a logit)", more,
              known, gamma, explicit_part);
    for (size_t i = 0; i < d->layers; i++) {
        first += d->at[i][d->n / 2].fit.peak_load / (double)d->layers;
        last += d->at[i][d->n - 1].fit.peak_load / (double)d->layers;
    }
    exp_claim(e, "B_0 falls while gamma is stable", "2.4 to 2.3; its definition is unknown", EXP_NOT_TESTABLE,
              "M max m, a candidate: %.2f at half time, %.2f at the end", first, last);
}

EX_FUNC void phases_draw(FILE *f, const void *arg) {
    static const char *const title[] = {"gamma_eff by layer, 95%", "its excess over the null by layer, 95%"};
    static const char *const group[PHASES_LAYERS] = {"layer 0", "layer 1", "layer 2", "layer 3"};
    const phases_data *d = arg;
    double *x = allocate(4 * PHASES_LAYERS * PHASES_MOST, sizeof *x), *part[4];
    int layer[PHASES_LAYERS * PHASES_MOST];
    for (int k = 0; k < 4; k++) part[k] = x + k * PHASES_LAYERS * PHASES_MOST;
    for (int excess = 0; excess < 2; excess++) {
        size_t n = 0;
        for (size_t c = 0; c < d->n; c++)
            for (size_t i = 0; i < d->layers; i++) {
                const game_note *g = &d->at[i][c].note;
                part[0][n] = d->step[c];
                part[1][n] = excess ? g->null.gamma_excess : g->gamma;
                part[2][n] = excess ? g->null.excess_lo : g->lo;
                part[3][n] = excess ? g->null.excess_hi : g->hi;
                layer[n++] = (int)i;
            }
        plot_points(f, &(plot_point_chart){.box = {480.0 * excess, 0, 480, 320}, .title = title[excess],
                                           .x_label = "step", .n = n, .x = part[0], .y = part[1], .lo = part[2],
                                           .hi = part[3], .group = layer, .group_name = group,
                                           .n_groups = (int)d->layers});
    }
    free(x);
}

EX_FUNC void phases_report(exp_run *e, phases_data *d) {
    exp_table t = exp_table_begin("gamma_eff, and its excess over what the noise of the tokens makes");
    size_t telling[2] = {0}, so[2] = {0};
    exp_verdict v[2];
    exp_row(&t, "<layer|<series|identified|first|highest|at step|last|<phases");
    for (int excess = 0; excess < 2; excess++) {
        for (size_t i = 0; i < d->layers; i++) phases_row(d, i, excess, &t, telling, so);
        v[excess] = exp_majority(so[excess], telling[excess]);
    }
    exp_picture(e, "gamma_eff over a training", 960, 330, phases_draw, d);
    exp_table_end(e, &t);
    exp_claim(e, "gamma_eff: surge, stabilisation, relaxation", "14, 36 to 39, 9 over 1.2M steps", v[0],
              "in %zu of %zu layers that tell", so[0], telling[0]);
    exp_claim(e, "the same of its excess over the null", "(not in the source)", v[1], "in %zu of %zu layers that tell",
              so[1], telling[1]);
    phases_claims(e, d);
    phases_claims_types(e, d);
    phases_claims_quality(e, d);
    exp_final(e, v[0],
              "over %zu checkpoints of %.0f steps, %zu of the %zu layers that tell gamma_eff go through surge, "
              "stabilisation and relaxation; of its excess over the null %zu of %zu", d->n, d->step[d->n - 1], so[0],
              telling[0], so[1], telling[1]);
}

EX_FUNC void experiment_phases(exp_run *e) {
    corpus *text = exp_text(e);
    phases_data *d = allocate(1, sizeof *d);
    lm_shape shape = {.vocab = text->bpe->n_tokens, .d = 64, .heads = 2, .layers = e->quick ? 3 : 4,
                      .length = 64, .tied = 1, .optimizer = LM_MUON, .dropout = 0.1, .theta = 10000,
                      .epsilon = 1e-5, .seed = e->seed};
    moe_desc desc = {.d_model = shape.d, .n_experts = PHASES_EXPERTS, .d_ff = 64, .sequence = shape.length};
    size_t at = 0, steps = exp_size(e, e->steps, 400, 20000), points = exp_size(e, 0, 40, PHASES_MOST);
    double loss = 0;
    desc.seed = shape.seed * 1000 + 1;
    desc.parallel = e->parallel;
    desc.weight_decay = MOE_OFF; // Muon has the experts
    nn_must(moe_desc_parse(&desc, phases_model.set, &at));
    nn_must(moe_desc_resolve(&desc, &desc));
    if (points > steps) points = steps;
    exp_lm l = exp_lm_new(text, &shape, &desc, PHASES_SEQUENCES * shape.length, steps, 1e-2);
    l.decay = 0.1;
    d->layers = shape.layers;
    for (size_t i = 0; i < d->layers; i++) {
        d->game[i] = game_new(l.m->layer[i].moe, PHASES_BATCHES);
        d->logits[i] = allocate(PHASES_KEPT * PHASES_EXPERTS, sizeof(float));
        d->index[i] = allocate(PHASES_KEPT * desc.top_k, sizeof(int32_t));
    }
    exp_bar(e, steps);
    for (size_t step = 0; step < steps; step++) {
        if (exp_lm_step(&l, step, &loss)) die("the training of the three phases diverged at step %zu", step);
        exp_step(e, "training", loss);
        if ((step + 1) * points / steps > step * points / steps)
            phases_checkpoint(e, &l, d, step + 1, step + 1 == steps);
    }
    fprintf(e->human, "validation %.3f nats a token at the first checkpoint, %.3f at the last\n", d->valid[0],
            d->valid[d->n - 1]);
    phases_report(e, d);
    for (size_t i = 0; i < d->layers; i++) {
        game_free(&d->game[i]);
        free(d->logits[i]);
        free(d->index[i]);
    }
    exp_lm_free(&l);
    free(d);
}

#endif
