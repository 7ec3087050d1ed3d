// exp_simbal.h - SimBal against a load-balancing loss: fewer tokens, experts that are less alike, pruning.
//
// After arXiv 2506.14038 [P]: 32 experts, top-4; SimBal: a router that begins orthogonal and is kept so by
// loss.simbal = 0.1; the baseline: the Switch loss at 0.01; z loss 1e-5 for both. The ablation has the baseline's loss
// and a router whose columns have length 1: the scale constraint alone. All else is the same, and every training of a
// seed reads the same batches.
#ifndef EX_EXP_SIMBAL_H
#define EX_EXP_SIMBAL_H

#include "exp_lm.h"
#include "exp_run.h"

enum { SIMBAL_ARMS = 3, SIMBAL_POINTS = 25, SIMBAL_TAUS = 4, SIMBAL_ROWS = 16 * 64 };
static const struct {
    const char *name, *set;
} simbal_arm[SIMBAL_ARMS] = {
    {"load balancing", "loss.switch=0.01 loss.z=1e-5"},
    {"SimBal", "router_init=orthogonal loss.simbal=0.1 loss.z=1e-5"},
    {"unit columns", "score=unit loss.switch=0.01 loss.z=1e-5"},
};
enum { SIMBAL_BASE, SIMBAL_IT, SIMBAL_UNIT };
static const float simbal_tau[SIMBAL_TAUS] = {0, 0.1f, 0.15f, 0.2f};

typedef struct simbal_result {
    double valid[SIMBAL_POINTS]; // nats a token over the training
    double pes, maxvio;          // the lowest of the layers, the highest
    double pruned[SIMBAL_TAUS], kept[SIMBAL_TAUS], seconds[SIMBAL_TAUS];
} simbal_result;

typedef struct simbal_all {
    size_t seeds, tokens; // a training's
    simbal_result r[SIMBAL_ARMS][EXP_MAX_SEEDS];
    double curve[SIMBAL_ARMS][SIMBAL_POINTS], pruned[SIMBAL_ARMS][SIMBAL_TAUS]; // means: nats; perplexity
} simbal_all;

EX_FUNC moe_desc simbal_desc(const exp_run *e, const lm_shape *shape, int arm, float tau) {
    moe_desc d = {.d_model = shape->d, .n_experts = 32, .top_k = 4, .d_ff = 32, .prune = tau};
    size_t at = 0;
    d.sequence = shape->length;
    d.seed = shape->seed * 1000 + 1;
    d.parallel = e->parallel;
    nn_must(moe_desc_parse(&d, simbal_arm[arm].set, &at));
    nn_must(moe_desc_resolve(&d, &d));
    return d;
}

// Share of the tokens that one saves on the way to the other's final loss; by what the other saves where it does not
// get there. Both curves have n points, evenly over the training.
EX_FUNC double simbal_reach(size_t n, const double *curve, double goal) {
    double before = curve[0];
    for (size_t i = 0; i < n; i++) {
        if (curve[i] <= goal) {
            double part = before > curve[i] ? (before - goal) / (before - curve[i]) : 1;
            return i ? ((double)i + part) / (double)n : 1 / (double)n;
        }
        before = curve[i];
    }
    return NAN;
}
EX_FUNC double simbal_saved(size_t n, const double *one, const double *other) {
    double at = simbal_reach(n, one, other[n - 1]);
    if (!isnan(at)) return 1 - at;
    at = simbal_reach(n, other, one[n - 1]);
    return isnan(at) ? NAN : at - 1;
}

EX_FUNC void simbal_see(void *arg, exp_lm *l, size_t rows) { // the experts' similarity on one batch
    double *lowest = arg, pes;
    for (size_t i = 0; i < l->m->shape.layers && isinf(*lowest); i++) {
        double least = INFINITY;
        for (size_t k = 0; k < l->m->shape.layers; k++) {
            nn_must(moe_layer_pes(l->m->layer[k].moe, l->m->layer[k].z, rows, &pes));
            least = fmin(least, pes);
        }
        *lowest = least;
    }
}

// With every layer in place of itself at threshold tau.
EX_FUNC void simbal_prune(exp_run *e, exp_lm *l, int arm, size_t test, simbal_result *r) {
    for (int k = 0; k < SIMBAL_TAUS; k++) {
        moe_desc desc = simbal_desc(e, &l->m->shape, arm, simbal_tau[k]);
        double kept = 0, all = 0;
        for (size_t i = 0; i < l->m->shape.layers; i++) {
            moe_layer *pruned = exp_layer_like(l->m->layer[i].moe, &desc);
            moe_layer_free(l->m->layer[i].moe);
            l->m->layer[i].moe = pruned;
        }
        double begin = seconds_now();
        r->pruned[k] = exp_lm_test(l, CORPUS_VALID, test, NULL, NULL);
        r->seconds[k] = seconds_now() - begin;
        for (size_t i = 0; i < l->m->shape.layers; i++) {
            moe_health h;
            nn_must(moe_layer_health(l->m->layer[i].moe, &h));
            kept += (double)h.n_selected;
            all += (double)h.n_tokens * (double)desc.top_k;
        }
        r->kept[k] = kept / all;
    }
}

EX_FUNC void simbal_write(exp_run *e, int arm, uint64_t seed, const simbal_result *r) {
    struct json *j = exp_line(e, "run");
    json_text(j, "arm", simbal_arm[arm].name);
    json_whole(j, "seed", seed);
    json_list_begin(j, "valid_loss");
    for (size_t i = 0; i < SIMBAL_POINTS; i++) json_real(j, NULL, r->valid[i]);
    json_list_end(j);
    json_real(j, "pes", r->pes);
    json_real(j, "maxvio", r->maxvio);
    json_list_begin(j, "pruned");
    for (int k = 0; k < SIMBAL_TAUS; k++) {
        json_object_begin(j, NULL);
        json_real(j, "tau", (double)simbal_tau[k]);
        json_real(j, "loss", r->pruned[k]);
        json_real(j, "kept", r->kept[k]);
        json_real(j, "seconds", r->seconds[k]);
        json_object_end(j);
    }
    json_list_end(j);
    json_end(j);
}

EX_FUNC void simbal_train(exp_run *e, int arm, uint64_t seed, size_t steps, size_t test, simbal_result *r) {
    corpus *text = exp_text(e);
    lm_shape shape = {.vocab = text->bpe->n_tokens, .d = 64, .heads = 2, .layers = 2, .length = 64, .tied = 1,
                      .optimizer = LM_ADAMW, .theta = 10000, .epsilon = 1e-5, .seed = seed};
    moe_desc desc = simbal_desc(e, &shape, arm, 0);
    exp_lm l = exp_lm_new(text, &shape, &desc, SIMBAL_ROWS, steps, 5e-3);
    double loss = 0;
    l.decay = 0.01;
    for (size_t i = 0; i < SIMBAL_POINTS; i++) r->valid[i] = NAN;
    for (size_t step = 0; step < steps; step++) {
        if (exp_lm_step(&l, step, &loss)) die("SimBal's experiment: a training diverged (%s)", simbal_arm[arm].name);
        exp_step(e, simbal_arm[arm].name, loss);
        size_t now = (step + 1) * SIMBAL_POINTS / steps, before = step * SIMBAL_POINTS / steps;
        if (now == before) continue;
        double valid = exp_lm_test(&l, CORPUS_VALID, test, NULL, NULL);
        for (size_t k = before; k < now; k++) r->valid[k] = valid;
    }
    r->pes = INFINITY;
    (void)exp_lm_test(&l, CORPUS_VALID, SIMBAL_ROWS, simbal_see, &r->pes);
    simbal_prune(e, &l, arm, 4 * test, r);
    r->maxvio = 0;
    (void)exp_lm_test(&l, CORPUS_VALID, test, NULL, NULL);
    for (size_t i = 0; i < shape.layers; i++) {
        moe_health h;
        nn_must(moe_layer_health(l.m->layer[i].moe, &h));
        r->maxvio = fmax(r->maxvio, h.maxvio);
    }
    simbal_write(e, arm, seed, r);
    exp_lm_free(&l);
}

// ---- the report ----

EX_FUNC spread simbal_gain(const simbal_all *a, int arm) {
    double saved[EXP_MAX_SEEDS];
    for (size_t i = 0; i < a->seeds; i++)
        saved[i] = 100 * simbal_saved(SIMBAL_POINTS, a->r[arm][i].valid, a->r[SIMBAL_BASE][i].valid);
    return spread_of(a->seeds, saved);
}

EX_FUNC void simbal_tables(exp_run *e, const simbal_all *a) {
    exp_table t = exp_table_begin("SimBal on WikiText-2: 32 experts, top-4; means and standard deviations");
    exp_row(&t, "<router|validation, nats a token|tokens saved|lowest PES|MaxVio");
    for (int arm = 0; arm < SIMBAL_ARMS; arm++) {
        double end[EXP_MAX_SEEDS], pes[EXP_MAX_SEEDS], maxvio[EXP_MAX_SEEDS];
        char cell[4][64];
        for (size_t i = 0; i < a->seeds; i++) {
            const simbal_result *r = &a->r[arm][i];
            end[i] = r->valid[SIMBAL_POINTS - 1], pes[i] = r->pes, maxvio[i] = r->maxvio;
        }
        spread_text(spread_of(a->seeds, end), "%.4f", cell[0], 64);
        spread_text(simbal_gain(a, arm), "%.1f%%", cell[1], 64);
        spread_text(spread_of(a->seeds, pes), "%.4f", cell[2], 64);
        spread_text(spread_of(a->seeds, maxvio), "%.2f", cell[3], 64);
        exp_row(&t, "<%s|%s|%s|%s|%s", simbal_arm[arm].name, cell[0], arm ? cell[1] : "-", cell[2], cell[3]);
    }
    exp_table_end(e, &t);
    t = exp_table_begin("Pruning by the gate at tau: perplexity a token, share of the choices that stay, seconds");
    exp_row(&t, "<router|tau|perplexity|kept|seconds");
    for (int arm = 0; arm < SIMBAL_ARMS; arm++)
        for (int k = 0; k < SIMBAL_TAUS; k++) {
            double ppl[EXP_MAX_SEEDS], kept[EXP_MAX_SEEDS], seconds[EXP_MAX_SEEDS];
            char cell[64];
            for (size_t i = 0; i < a->seeds; i++) {
                const simbal_result *r = &a->r[arm][i];
                ppl[i] = exp(r->pruned[k]), kept[i] = r->kept[k], seconds[i] = r->seconds[k];
            }
            spread_text(spread_of(a->seeds, ppl), "%.2f", cell, sizeof cell);
            exp_row(&t, "<%s|%.2f|%s|%.1f%%|%.2f", simbal_arm[arm].name, (double)simbal_tau[k], cell,
                    100 * spread_of(a->seeds, kept).mean, spread_of(a->seeds, seconds).mean);
        }
    exp_table_end(e, &t);
}

EX_FUNC void simbal_draw(FILE *f, const void *arg) {
    const simbal_all *a = arg;
    plot_line loss[SIMBAL_ARMS], prune[SIMBAL_ARMS];
    char label[80];
    for (int arm = 0; arm < SIMBAL_ARMS; arm++) {
        loss[arm] = (plot_line){simbal_arm[arm].name, a->curve[arm], SIMBAL_POINTS, arm == SIMBAL_UNIT};
        prune[arm] = (plot_line){simbal_arm[arm].name, a->pruned[arm], SIMBAL_TAUS, arm == SIMBAL_UNIT};
    }
    snprintf(label, sizeof label, "evaluation, one every %.0f tokens", (double)a->tokens / SIMBAL_POINTS);
    plot_lines(f, &(plot_chart){{0, 0, 480, 320}, "Validation, nats a token (mean of the seeds)", label, loss,
                                SIMBAL_ARMS, 0, 0});
    plot_lines(f, &(plot_chart){{480, 0, 480, 320}, "Perplexity a token, pruned", "tau: 0, 0.1, 0.15, 0.2", prune,
                                SIMBAL_ARMS, 0, 0});
}

EX_FUNC void simbal_claims(exp_run *e, const simbal_all *a, spread saved) {
    double pes[EXP_MAX_SEEDS], cost[EXP_MAX_SEEDS], kept = 0;
    for (size_t i = 0; i < a->seeds; i++) {
        const simbal_result *base = &a->r[SIMBAL_BASE][i], *it = &a->r[SIMBAL_IT][i];
        pes[i] = base->pes - it->pes;
        cost[i] = it->pruned[1] - it->pruned[0]; // nats: hundredths are nearly percents of perplexity
        kept += it->kept[1] / (double)a->seeds;
    }
    spread p = spread_of(a->seeds, pes), c = spread_of(a->seeds, cost), unit = simbal_gain(a, SIMBAL_UNIT);
    exp_claim(e, "SimBal needs fewer tokens", "36% fewer", exp_positive(saved), "%.1f%% fewer +- %.1f (95%%)",
              saved.mean, spread_half(saved));
    exp_claim(e, "its experts are less alike: lower PES", "0.0255 to 0.0044, 0.0241 to 0.0028", exp_positive(p),
              "lower by %.4f +- %.4f (95%%)", p.mean, spread_half(p));
    exp_verdict v = kept > 0.999 ? EXP_NOT_TESTABLE : exp_same(c, 0.01);
    exp_claim(e, "pruning at tau 0.1 costs SimBal under 1% of perplexity", "8.317 to 8.364", v,
              "%+.2f%% +- %.2f, %.0f%% of the choices stay", 100 * c.mean, 100 * spread_half(c), 100 * kept);
    exp_claim(e, "unit columns alone need fewer tokens", "a reviewer's guess", exp_positive(unit),
              "%.1f%% fewer +- %.1f (95%%)", unit.mean, spread_half(unit));
}

EX_FUNC void experiment_simbal(exp_run *e) {
    simbal_all *a = allocate(1, sizeof *a);
    size_t steps = exp_size(e, e->steps, 300, 2000), test = exp_size(e, 0, 4096, 32768);
    if (test > 16 * steps) test = 16 * steps; // an evaluation is to cost little beside the training
    a->seeds = exp_size(e, e->seeds, 5, 5);
    a->tokens = steps * SIMBAL_ROWS;
    (void)exp_text(e);
    exp_bar(e, steps * a->seeds * SIMBAL_ARMS);
    for (int arm = 0; arm < SIMBAL_ARMS; arm++)
        for (size_t i = 0; i < a->seeds; i++) simbal_train(e, arm, e->seed + i, steps, test, &a->r[arm][i]);
    for (int arm = 0; arm < SIMBAL_ARMS; arm++)
        for (size_t i = 0; i < a->seeds; i++) {
            const simbal_result *r = &a->r[arm][i];
            for (int k = 0; k < SIMBAL_POINTS; k++) a->curve[arm][k] += r->valid[k] / (double)a->seeds;
            for (int k = 0; k < SIMBAL_TAUS; k++) a->pruned[arm][k] += exp(r->pruned[k]) / (double)a->seeds;
        }
    spread saved = simbal_gain(a, SIMBAL_IT);
    exp_picture(e, "SimBal against a load-balancing loss", 960, 330, simbal_draw, a);
    simbal_tables(e, a);
    simbal_claims(e, a, saved);
    exp_final(e, exp_positive(saved),
              "SimBal reaches the baseline's final validation loss with %.1f%% fewer tokens (95%% interval %.1f to "
              "%.1f, %zu seeds of %zu tokens; the paper: 36%%)", saved.mean, saved.mean - spread_half(saved),
              saved.mean + spread_half(saved), saved.n, a->tokens);
    free(a);
}

#endif
