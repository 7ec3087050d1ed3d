// inspect_show.h - the layers of inspect.h as tables, JSON lines, CSV and a page; two dumps beside each other; a
// series.
#ifndef EX_INSPECT_SHOW_H
#define EX_INSPECT_SHOW_H

#include "inspect.h"
#include "json.h"
#include "plot.h"
#include "reading.h"

// ---- output ----

// OUT/NAME.ext, NAME the program's.
EX_FUNC FILE *inspect_output(const inspect_config *o, const char *ext) {
    char name[64];
    snprintf(name, sizeof name, "%s.%s", o->name, ext);
    return open_output(o->out, name);
}

// What is known of a layer, for the rules of common/reading.h.
EX_FUNC reading inspect_reading_of(const inspect_layer *r) {
    reading x = reading_unknown();
    x.experts = (double)r->experts, x.top_k = (double)r->top_k, x.selected = r->selected;
    x.dead = (double)r->dead.n, x.dead_first = (double)r->dead.first;
    x.maxvio = r->maxvio, x.effective = r->effective;
    x.logits = r->has_logits, x.masked = (double)r->masked, x.probabilities = r->probabilities;
    x.batches = (double)r->batches, x.batch_tokens = (double)r->tokens / (double)r->batches;
    if (r->probabilities) return reading_complete(x); // gamma_eff would be of the wrong numbers
    x.gamma = r->gamma, x.ols = r->gamma_ols, x.excess = r->null.gamma_excess;
    if (r->replicate) x.excess_lo = r->null.excess_lo, x.excess_hi = r->null.excess_hi;
    return reading_complete(x);
}

// All layers' lines; and as JSON, an object a line.
EX_FUNC void inspect_explain(FILE *f, json *j, const inspect_table *t) {
    char where[80], text[READING_TEXT];
    for (size_t i = 0; i < t->n; i++) {
        reading r = inspect_reading_of(&t->row[i]);
        snprintf(where, sizeof where, "layer %zu", t->row[i].layer);
        if (f) reading_print(f, where, &r);
        const reading_rule *rule;
        for (size_t at = 0; j && (rule = reading_next(&r, &at)) != NULL;) {
            reading_text(rule, &r, text, sizeof text);
            json_begin(j);
            json_text(j, "event", "reading");
            json_whole(j, "layer", t->row[i].layer);
            json_text(j, "rule", rule->name);
            json_text(j, "text", text);
            json_end(j);
        }
    }
}
EX_FUNC void inspect_page_explain(FILE *f, const inspect_table *t) {
    char text[READING_TEXT];
    page_heading(f, "In words");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "layer|<reading");
    for (size_t i = 0; i < t->n; i++) {
        reading r = inspect_reading_of(&t->row[i]);
        const reading_rule *rule;
        for (size_t at = 0; (rule = reading_next(&r, &at)) != NULL;) {
            reading_text(rule, &r, text, sizeof text);
            page_row(f, 0, "%zu|<%s", t->row[i].layer, text);
        }
    }
    page_table_end(f);
    page_card_end(f);
}

// The experts that take most of a label's tokens, best first: top (3), -1 where there is none.
EX_FUNC void inspect_top_experts(const inspect_layer *r, size_t label, int top[3], double share[3]) {
    double sum = 0;
    for (size_t e = 0; e < r->experts; e++) sum += (double)r->labels[e * r->n_labels + label];
    for (int k = 0; k < 3; k++) {
        top[k] = -1, share[k] = 0;
        for (size_t e = 0; e < r->experts && sum > 0; e++) {
            double part = (double)r->labels[e * r->n_labels + label] / sum;
            if (part > share[k] && (int)e != top[0] && !(k > 1 && (int)e == top[1])) top[k] = (int)e, share[k] = part;
        }
    }
}
EX_FUNC void inspect_top_text(const inspect_layer *r, size_t label, char out[80]) {
    int top[3];
    double share[3];
    inspect_top_experts(r, label, top, share);
    strcpy(out, top[0] < 0 ? "-" : "");
    for (int k = 0; k < 3 && top[k] >= 0; k++)
        snprintf(out + strlen(out), 80 - strlen(out), "%s%d %.0f%%", k ? ", " : "", top[k], 100 * share[k]);
}

EX_FUNC void inspect_write_labels(json *j, const inspect_layer *r) {
    json_real(j, "purity", r->purity);
    json_real(j, "label_information", r->domain.nats);
    json_real(j, "label_information_share", r->domain.share);
    json_real(j, "label_information_lo", r->domain.lo);
    json_real(j, "label_information_hi", r->domain.hi);
    json_list_begin(j, "labels"); // first choices: for each expert a list of its tokens by label
    for (size_t e = 0; e < r->experts; e++) {
        json_list_begin(j, NULL);
        for (size_t c = 0; c < r->n_labels; c++) json_whole(j, NULL, r->labels[e * r->n_labels + c]);
        json_list_end(j);
    }
    json_list_end(j);
    json_list_begin(j, "label_experts"); // for each label the experts that take most of it
    for (size_t c = 0; c < r->n_labels; c++) {
        int top[3];
        double share[3];
        inspect_top_experts(r, c, top, share);
        json_list_begin(j, NULL);
        for (int k = 0; k < 3 && top[k] >= 0; k++) json_whole(j, NULL, (uint64_t)top[k]);
        json_list_end(j);
    }
    json_list_end(j);
}

EX_FUNC void inspect_write_layer(json *j, const inspect_layer *r) {
    json_begin(j);
    json_whole(j, "layer", r->layer);
    json_whole(j, "tokens", r->tokens);
    json_whole(j, "experts", r->experts);
    json_whole(j, "top_k", r->top_k);
    json_list_begin(j, "load");
    for (size_t e = 0; e < r->experts; e++) json_real(j, NULL, r->load[e]);
    json_list_end(j);
    json_real(j, "maxvio", r->maxvio);
    json_real(j, "maxvio_batch", r->maxvio_batch);
    json_real(j, "cv", r->cv);
    json_real(j, "gini", r->gini);
    json_real(j, "entropy", r->entropy);
    json_real(j, "effective_experts", r->effective);
    dead_json(j, &r->dead);
    json_real(j, "gamma_eff", r->gamma);
    json_real(j, "gamma_lo", r->lo);
    json_real(j, "gamma_hi", r->hi);
    json_real(j, "gamma_null", r->null.gamma_null);
    json_real(j, "gamma_excess", r->null.gamma_excess);
    json_real(j, "excess_lo", r->null.excess_lo);
    json_real(j, "excess_hi", r->null.excess_hi);
    json_real(j, "gamma_ols", r->gamma_ols);
    json_raw(j, "identified", r->identified ? "true" : "false");
    json_real(j, "temperature", r->temperature);
    json_real(j, "l1_game", r->l1_game);
    json_real(j, "l1_softmax", r->l1_softmax);
    json_real(j, "l1_uniform", r->l1_uniform);
    json_real(j, "l1_types_coupled", r->l1_coupled);
    json_real(j, "l1_types_independent", r->l1_independent);
    json_whole(j, "masked", r->masked);
    json_raw(j, "probabilities", r->probabilities ? "true" : "false");
    if (r->labels) inspect_write_labels(j, r);
    json_raw(j, "feasible", r->feasible ? "true" : "false");
    json_real(j, "k_over_m", (double)r->top_k / (double)r->experts);
    json_end(j);
}

EX_FUNC void inspect_write_phases(json *j, const inspect_series *s) {
    static const char *const key[] = {"step", "gamma_eff", "gamma_excess", "excess_lo", "excess_hi"};
    const double *number[] = {s->step, s->gamma, s->excess, s->lo, s->hi};
    json_begin(j);
    json_text(j, "event", "phases");
    for (int i = 0; i < 5; i++) {
        json_list_begin(j, key[i]);
        for (size_t c = 0; c < s->n; c++) json_real(j, NULL, number[i][c]);
        json_list_end(j);
    }
    json_list_begin(j, "phase");
    for (size_t c = 0; c < s->n; c++) json_text(j, NULL, moe_phase_name(s->phase[c]));
    json_list_end(j);
    json_end(j);
}

// A number, or a dash where there is none.
EX_FUNC const char *inspect_show(char out[16], const char *format, double v) {
    if (isfinite(v))
        snprintf(out, 16, format, v);
    else
        strcpy(out, "-");
    return out;
}

EX_FUNC void inspect_interval_text(char out[40], const inspect_layer *r, double value, double lo, double hi) {
    if (!r->has_logits)
        strcpy(out, "-");
    else if (!isfinite(value))
        strcpy(out, "unidentified");
    else if (isfinite(lo))
        snprintf(out, 40, "%.2f [%.2f, %.2f]", value, lo, hi);
    else
        snprintf(out, 40, "%.2f", value);
}
EX_FUNC void inspect_gamma_text(char out[2][40], const inspect_layer *r) { // gamma_eff, and its excess
    inspect_interval_text(out[0], r, r->gamma, r->lo, r->hi);
    inspect_interval_text(out[1], r, r->null.gamma_excess, r->null.excess_lo, r->null.excess_hi);
}

EX_FUNC void inspect_information_text(char out[80], const relation_information *r) {
    if (!isfinite(r->nats))
        strcpy(out, "-");
    else if (isfinite(r->lo))
        snprintf(out, 80, "%.4f [%.4f, %.4f], %.1f%%", r->nats, r->lo, r->hi, 100 * r->share);
    else
        snprintf(out, 80, "%.4f, %.1f%%", r->nats, 100 * r->share);
}
EX_FUNC void inspect_print_domains(FILE *f, const inspect_table *t) {
    char text[80];
    fprintf(f, "\nMutual information of first choice and label, in nats [95%%]; its share of the labels' entropy\n");
    for (size_t i = 0; i < t->n; i++) {
        inspect_information_text(text, &t->row[i].domain);
        fprintf(f, "%5zu  %s\n", t->row[i].layer, text);
    }
}

// The experts of each label, and what else is to be said of a layer.
EX_FUNC void inspect_print_labels(FILE *f, const inspect_table *t) {
    char text[80];
    fprintf(f, "\nlayer  label  experts that take most of it\n");
    for (size_t i = 0; i < t->n; i++)
        for (size_t c = 0; c < t->row[i].n_labels; c++) {
            inspect_top_text(&t->row[i], c, text);
            fprintf(f, "%5zu  %5zu  %s\n", t->row[i].layer, c, text);
        }
}
EX_FUNC void inspect_warn(const inspect_table *t) {
    size_t masked = 0, probabilities = 0;
    for (size_t i = 0; i < t->n; i++) masked += t->row[i].masked > 0, probabilities += (size_t)t->row[i].probabilities;
    if (masked)
        fprintf(stderr, "inspect: warning: layers with masked experts: %zu; no mean logit, so no gamma_eff\n", masked);
    if (probabilities)
        fprintf(stderr,
                "inspect: warning: layers of probabilities, not logits (each row sums to 1): %zu; "
                "say --probabilities, or save their log\n",
                probabilities);
}

// Under the table the dead experts by number.
EX_FUNC void inspect_print_dead(FILE *f, const inspect_table *t) {
    fprintf(f, "\nDead: under a tenth of an even share of the selections (first: under 1%% of the first choices)\n");
    for (size_t i = 0; i < t->n; i++) {
        const inspect_layer *r = &t->row[i];
        if (r->dead.n) fprintf(f, "%5zu ", r->layer);
        for (size_t k = 0; k < r->dead.n; k++) fprintf(f, " %u", (unsigned)r->dead.expert[k]);
        if (r->dead.n) fprintf(f, "\n");
    }
}

EX_FUNC void inspect_print_table(FILE *f, const inspect_config *o, const inspect_table *t) {
    char a[7][16], gamma[2][40];
    const char *path = NULL;
    for (size_t i = 0; i < t->n; i++) {
        const inspect_layer *r = &t->row[i];
        if (r->path != path)
            fprintf(f, "%s%s: %zu tokens, %zu experts, top-%zu\n%s\n", path ? "\n" : "", r->path, r->tokens, r->experts,
                    r->top_k,
                    "layer  MaxVio     CV   Gini  effective  dead  (first)  gamma_eff [95%]           OLS      T  "
                    "epsilon");
        path = r->path;
        inspect_gamma_text(gamma, r);
        fprintf(f, "%5zu  %6.3f  %5.3f  %5.3f  %9.2f  %4zu  %7zu  %-22s  %6s  %5s  %7s\n", r->layer, r->maxvio, r->cv,
                r->gini, r->effective, r->dead.n, r->dead.first, gamma[0], inspect_show(a[0], "%.2f", r->gamma_ols),
                inspect_show(a[1], "%.2f", r->temperature), inspect_show(a[2], "%.3f", r->epsilon));
    }
    inspect_print_dead(f, t);
    if (!t->row[0].has_logits) return;
    fprintf(f, "\nAgainst the noise of the tokens alone (null: each expert's logits shuffled)\n"
               "layer  gamma_eff [95%%]           null  excess [95%%]\n");
    for (size_t i = 0; i < t->n; i++) {
        const inspect_layer *r = &t->row[i];
        inspect_gamma_text(gamma, r);
        fprintf(f, "%5zu  %-22s  %6s  %s\n", r->layer, gamma[0], inspect_show(a[0], "%.2f", r->null.gamma_null),
                gamma[1]);
    }
    fprintf(f,
            "\nHeld-out L1 of the load (0 to 2): half of the batches predicts the other\n"
            "layer    game  softmax  uniform  types coupled  independent    K/M  feasible  E max m  E max softmax\n");
    for (size_t i = 0; i < t->n; i++) {
        const inspect_layer *r = &t->row[i];
        fprintf(f, "%5zu  %6s  %7s  %7s  %13s  %11s  %5.3f  %8s  %7s  %13s\n", r->layer,
                inspect_show(a[0], "%.4f", r->l1_game), inspect_show(a[1], "%.4f", r->l1_softmax),
                inspect_show(a[2], "%.4f", r->l1_uniform), inspect_show(a[3], "%.4f", r->l1_coupled),
                inspect_show(a[4], "%.4f", r->l1_independent), (double)r->top_k / (double)r->experts,
                r->feasible ? "yes" : "no", inspect_show(a[5], "%.2f", r->peak_load),
                inspect_show(a[6], "%.2f", r->peak_softmax));
    }
    fprintf(f, "\nOther ways to say how good an expert is, against its mean logit (Pearson's r of the experts' "
               "qualities, mean "
               "over layers;\nof gamma_eff, over layers), on a sample of tokens\n");
    double *first = allocate(t->n, sizeof *first), *other = allocate(t->n, sizeof *other);
    for (int kind = 1; kind < MOE_QUALITY_COUNT; kind++) {
        double sum = 0, n = 0, r;
        for (size_t i = 0; i < t->n; i++) {
            first[i] = t->row[i].gamma_by[0], other[i] = t->row[i].gamma_by[kind];
            if (isfinite(t->row[i].agreement[kind])) sum += t->row[i].agreement[kind], n++;
        }
        inspect_must(moe_pearson(t->n, first, other, &r), "agreement");
        fprintf(f, "%-10s  qualities %6s  gamma_eff %6s\n", moe_quality_name((moe_quality_kind)kind),
                inspect_show(a[0], "%.3f", n > 0 ? sum / n : NAN), inspect_show(a[1], "%.3f", r));
    }
    free(first), free(other);
    if (o->labels) {
        fprintf(f,
                "\nExperts by usage and purity (share of the most frequent label among an expert's first choices)\n");
        fprintf(f, "layer  purity");
        for (int k = MOE_ECOLOGY_COUNT; k-- > 0;) fprintf(f, "  %10s", moe_ecology_name((moe_ecology_kind)k));
        for (size_t i = 0; i < t->n; i++) {
            fprintf(f, "\n%5zu  %6.3f", t->row[i].layer, t->row[i].purity);
            for (int k = MOE_ECOLOGY_COUNT; k-- > 0;) fprintf(f, "  %10zu", t->row[i].ecology[k]);
        }
        fprintf(f, "\n");
        inspect_print_domains(f, t);
        inspect_print_labels(f, t);
    }
    fprintf(
        f,
        "\ngamma_eff: logits a token gives up for a unit of load share, after arXiv 2604.04230 (docs/gamma.md). It can "
        "also come from\nnoise of the tokens (null; excess: gamma_eff less that) and from differences between tokens "
        "alone, with either sign.%s\n",
        t->row[0].top_k == 1 ? " Top-1 routing is outside that paper's scope." : "");
}

EX_FUNC void inspect_print_series(FILE *f, const inspect_series *s) {
    fprintf(f, "\nstep          gamma_eff  excess [95%%]               phase\n");
    for (size_t c = 0; c < s->n; c++) {
        const char *phase = moe_phase_name(s->phase[c]);
        fprintf(f, "%-12g  %9.2f  %6.2f [%.2f, %.2f]  %s\n", s->step[c], s->gamma[c], s->excess[c], s->lo[c], s->hi[c],
                phase ? phase : "");
    }
}

// ---- relations of choices ----

// One matrix as a list of lists.
EX_FUNC void inspect_write_matrix(json *j, const char *key, size_t rows, size_t cols, const double *value) {
    json_list_begin(j, key);
    for (size_t r = 0; r < rows; r++) {
        json_list_begin(j, NULL);
        for (size_t c = 0; c < cols; c++) json_real(j, NULL, value[r * cols + c]);
        json_list_end(j);
    }
    json_list_end(j);
}

// A map on the page; hi 0: the largest value.
EX_FUNC void inspect_draw_map(FILE *page, const char *title, const char *x_label, size_t rows, size_t cols,
                              const double *value, double hi) {
    if (!page) return;
    double height = 90 + fmin(22 * (double)rows, 700), top = hi;
    for (size_t i = 0; hi <= 0 && i < rows * cols; i++) top = fmax(top, value[i]);
    page_card(page);
    plot_begin(page, 960, height, title);
    plot_heat(page, &(plot_map){.box = {0, 0, 960, height},
                                .title = title,
                                .x_label = x_label,
                                .rows = rows,
                                .cols = cols,
                                .value = value,
                                .hi = top,
                                .scale_format = "%.2g"});
    plot_end(page);
    page_card_end(page);
}

// Where all of it goes; any may be NULL.
typedef struct inspect_outputs {
    FILE *human, *page;
    json *lines;
} inspect_outputs;

// The pairs of a layer that are chosen together most above what is expected, of those expected at least 5 times.
EX_FUNC void inspect_show_together(const inspect_outputs *to, const inspect_layer *r) {
    size_t E = r->experts, shown = 0, used = E * E;
    uint64_t *count = allocate(used, sizeof *count);
    double *expected = allocate(2 * used, sizeof *expected), *ratio = expected + used;
    char title[80];
    relation_together(r->n_sample, E, r->top_k, r->choice, count, expected, ratio);
    snprintf(title, sizeof title, "Layer %zu: chosen together, observed / expected", r->layer);
    inspect_draw_map(to->page, title, "expert", E, E, ratio, 0);
    if (to->lines) {
        json_begin(to->lines);
        json_text(to->lines, "event", "together");
        json_whole(to->lines, "layer", r->layer);
        inspect_write_matrix(to->lines, "ratio", E, E, ratio);
        json_end(to->lines);
    }
    if (to->human) fprintf(to->human, "%5zu ", r->layer);
    double last = INFINITY;
    for (size_t best = used; to->human && shown < 3; shown++) { // a tie: the first pair alone
        best = used;
        for (size_t i = 0; i < used; i++) {
            if (i / E >= i % E || !(expected[i] >= 5) || !(ratio[i] < last)) continue;
            if (best == used || ratio[i] > ratio[best]) best = i;
        }
        if (best == used) break;
        last = ratio[best];
        fprintf(to->human, "  %zu+%zu %.2f (%llu of %.1f)", best / E, best % E, last, (unsigned long long)count[best],
                expected[best]);
    }
    if (to->human) fprintf(to->human, shown ? "\n" : "  -\n");
    free(count), free(expected);
}

EX_FUNC void inspect_show_transition(const inspect_outputs *to, const inspect_config *o, const inspect_layer *a,
                                     const inspect_layer *b) {
    char title[96], text[80];
    double *share = allocate(a->experts * b->experts, sizeof *share);
    relation_information x = relation_inform(a->n_sample, a->choice, a->top_k, b->choice, b->top_k, a->batch,
                                             a->batches, o->bootstrap, o->seed);
    relation_transitions(a->n_sample, a->experts, a->top_k, a->choice, b->experts, b->top_k, b->choice, share);
    snprintf(title, sizeof title, "From layer %zu (rows) to layer %zu: share of an expert's tokens", a->layer,
             b->layer);
    inspect_draw_map(to->page, title, "expert of the next layer", a->experts, b->experts, share, 1);
    inspect_information_text(text, &x);
    if (to->human) fprintf(to->human, "%5zu -> %-5zu  %s\n", a->layer, b->layer, text);
    if (to->lines) {
        json_begin(to->lines);
        json_text(to->lines, "event", "transition");
        json_whole(to->lines, "from", a->layer);
        json_whole(to->lines, "to", b->layer);
        json_whole(to->lines, "pairs", x.pairs);
        json_real(to->lines, "information", x.nats);
        json_real(to->lines, "information_share", x.share);
        json_real(to->lines, "information_lo", x.lo);
        json_real(to->lines, "information_hi", x.hi);
        inspect_write_matrix(to->lines, "share", a->experts, b->experts, share);
        json_end(to->lines);
    }
    free(share);
}

EX_FUNC int inspect_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Five numbers of n, those that are not finite left out: least, quartiles (on a straight line between two), most.
EX_FUNC void inspect_percentiles(size_t n, double *value, double five[5]) {
    size_t known = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(value[i])) value[known++] = value[i];
    qsort(value, known, sizeof *value, inspect_by_value);
    for (int q = 0; q < 5; q++) {
        double at = 0.25 * q * (double)(known - 1);
        size_t low = (size_t)at;
        five[q] = NAN;
        if (known) five[q] = value[low];
        if (known && low + 1 < known) five[q] += (at - (double)low) * (value[low + 1] - value[low]);
    }
}

EX_FUNC void inspect_show_percentiles(const inspect_outputs *to, const inspect_table *t) {
    static const char *const name[] = {"maxvio", "maxvio_batch", "gini",        "effective_experts",
                                       "dead",   "gamma_eff",    "gamma_excess"};
    double *value = allocate(t->n, sizeof *value), five[5];
    char a[5][16];
    if (to->human) fprintf(to->human, "\nOver %zu layers          least      25%%   median      75%%     most\n", t->n);
    if (to->lines) json_begin(to->lines), json_text(to->lines, "event", "percentiles");
    for (size_t k = 0; k < sizeof name / sizeof *name; k++) {
        for (size_t i = 0; i < t->n; i++) {
            const inspect_layer *r = &t->row[i];
            const double of[] = {r->maxvio, r->maxvio_batch,     r->gini, r->effective, (double)r->dead.n,
                                 r->gamma,  r->null.gamma_excess};
            value[i] = of[k];
        }
        inspect_percentiles(t->n, value, five);
        for (int q = 0; q < 5; q++) inspect_show(a[q], "%.3f", five[q]);
        if (to->human) fprintf(to->human, "%-18s  %8s %8s %8s %8s %8s\n", name[k], a[0], a[1], a[2], a[3], a[4]);
        if (!to->lines) continue;
        json_list_begin(to->lines, name[k]);
        for (int q = 0; q < 5; q++) json_real(to->lines, NULL, five[q]);
        json_list_end(to->lines);
    }
    if (to->lines) json_end(to->lines);
    free(value);
}

EX_FUNC void inspect_show_relations(const inspect_outputs *to, const inspect_config *o, const inspect_table *t) {
    for (size_t i = 0; i < t->n; i++)
        if (t->row[i].experts > INSPECT_RELATED)
            args_fail("inspect", "--relations: %zu experts, at most %d", t->row[i].experts, INSPECT_RELATED);
    inspect_show_percentiles(to, t);
    if (to->human && t->row[0].top_k > 1)
        fprintf(to->human, "\nlayer  chosen together most: observed / expected, of pairs expected 5 times or more, on "
                           "a sample\n");
    for (size_t i = 0; i < t->n && t->row[0].top_k > 1; i++) inspect_show_together(to, &t->row[i]);
    if (to->human && t->n > 1)
        fprintf(to->human, "\nfrom -> to     mutual information of the first choices, in nats [95%%], and its share of "
                           "the next layer's entropy\n");
    for (size_t i = 1; i < t->n; i++)
        if (t->row[i].path == t->row[i - 1].path) inspect_show_transition(to, o, &t->row[i - 1], &t->row[i]);
}

// ---- two dumps ----

// NaN where tokens, experts or top-k are not the same.
EX_FUNC int inspect_same_tokens(const inspect_layer *a, const inspect_layer *b) {
    return a->experts == b->experts && a->top_k == b->top_k && a->tokens == b->tokens && a->n_sample == b->n_sample;
}
EX_FUNC relation_overlap inspect_overlap_of(const inspect_layer *a, const inspect_layer *b) {
    if (!inspect_same_tokens(a, b)) return (relation_overlap){0, NAN, NAN, NAN, NAN};
    return relation_overlap_of(a->n_sample, a->experts, a->top_k, a->choice, b->choice);
}

// What is kept, over the layers.
EX_FUNC void inspect_draw_kept(FILE *f, const inspect_table *a, const inspect_table *b, size_t n) {
    enum { LINES = 4 };
    static const char *const name[] = {"first choice", "all choices", "first, by chance", "all, by chance"};
    double *value = allocate(LINES * n, sizeof *value);
    plot_line line[LINES];
    for (size_t i = 0; i < n; i++) {
        relation_overlap x = inspect_overlap_of(&a->row[i], &b->row[i]);
        const double of[LINES] = {x.top1, x.topk, x.chance_top1, x.chance_topk};
        for (size_t k = 0; k < LINES; k++) value[k * n + i] = of[k];
    }
    for (size_t k = 0; k < LINES; k++) line[k] = (plot_line){name[k], value + k * n, n, k > 1};
    plot_begin(f, 960, 320, "Choices kept");
    plot_lines(f,
               &(plot_chart){
                   {0, 0, 960, 320}, "Share of the choices that both dumps have", "layer, from 1", line, LINES, 0, 1});
    plot_end(f);
    free(value);
}

// Of one layer in both: beside each other, and where the tokens are the same, how many of their choices are kept.
EX_FUNC void inspect_compare_layer(const inspect_outputs *to, const inspect_layer *a, const inspect_layer *b) {
    relation_overlap x = inspect_overlap_of(a, b);
    double moved = a->experts == b->experts ? 0 : NAN, churn = NAN;
    for (size_t e = 0; a->experts == b->experts && e < a->experts; e++) moved += fabs(a->load[e] - b->load[e]) / 2;
    if (inspect_same_tokens(a, b) && moe_churn(a->n_sample, a->top_k, a->choice, b->choice, &churn)) churn = NAN;
    if (to->human) {
        char s[8][16];
        fprintf(to->human, "%5zu  %6s (%6s)  %6s (%6s)  %6s  %6s   %6.3f %6.3f  %7.2f %7.2f  %4zu %4zu  %7s %7s\n",
                a->layer, inspect_show(s[0], "%.3f", x.top1), inspect_show(s[1], "%.3f", x.chance_top1),
                inspect_show(s[2], "%.3f", x.topk), inspect_show(s[3], "%.3f", x.chance_topk),
                inspect_show(s[4], "%.3f", churn), inspect_show(s[5], "%.3f", moved), a->maxvio, b->maxvio,
                a->effective, b->effective, a->dead.n, b->dead.n, inspect_show(s[6], "%.2f", a->null.gamma_excess),
                inspect_show(s[7], "%.2f", b->null.gamma_excess));
    }
    if (!to->lines) return;
    json *j = to->lines;
    const struct {
        const char *key;
        double value;
    } real[] = {{"top1_overlap", x.top1},
                {"top1_chance", x.chance_top1},
                {"topk_overlap", x.topk},
                {"topk_chance", x.chance_topk},
                {"churn", churn},
                {"load_moved", moved},
                {"maxvio", a->maxvio},
                {"other_maxvio", b->maxvio},
                {"gini", a->gini},
                {"other_gini", b->gini},
                {"effective_experts", a->effective},
                {"other_effective_experts", b->effective},
                {"gamma_eff", a->gamma},
                {"other_gamma_eff", b->gamma},
                {"gamma_excess", a->null.gamma_excess},
                {"other_gamma_excess", b->null.gamma_excess}};
    json_begin(j);
    json_text(j, "event", "compare");
    json_whole(j, "layer", a->layer);
    json_whole(j, "tokens", x.tokens);
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) json_real(j, real[i].key, real[i].value);
    json_whole(j, "dead", a->dead.n);
    json_whole(j, "other_dead", b->dead.n);
    json_end(j);
}

EX_FUNC void inspect_draw_loads(FILE *f, const inspect_table *t);

EX_FUNC void inspect_compare_table(FILE *f, const inspect_table *a, const inspect_table *b, size_t n) {
    char s[4][16];
    page_table_begin(f);
    page_row(f, 1, "layer|first choice kept|by chance|all kept|by chance|MaxVio|other|effective|other|dead|other");
    for (size_t i = 0; i < n; i++) {
        const inspect_layer *x = &a->row[i], *y = &b->row[i];
        relation_overlap kept = inspect_overlap_of(x, y);
        page_row(f, 0, "%zu|%s|%s|%s|%s|%.3f|%.3f|%.2f|%.2f|%zu|%zu", x->layer, inspect_show(s[0], "%.3f", kept.top1),
                 inspect_show(s[1], "%.3f", kept.chance_top1), inspect_show(s[2], "%.3f", kept.topk),
                 inspect_show(s[3], "%.3f", kept.chance_topk), x->maxvio, y->maxvio, x->effective, y->effective,
                 x->dead.n, y->dead.n);
    }
    page_table_end(f);
}

EX_FUNC void inspect_compare(const inspect_outputs *to, const inspect_table *a, const inspect_table *b) {
    size_t n = a->n < b->n ? a->n : b->n;
    if (to->human) {
        fprintf(to->human, "\n%s, and %s\n", a->row->path, b->row->path);
        if (a->n != b->n) fprintf(to->human, "%zu and %zu layers: the first %zu of both\n", a->n, b->n, n);
        fprintf(to->human, "layer  top-1 kept (chance)  top-k kept (chance)  churn   moved   MaxVio         effective"
                           "        dead       excess\n");
    }
    for (size_t i = 0; i < n; i++) inspect_compare_layer(to, &a->row[i], &b->row[i]);
    if (to->human)
        fprintf(to->human, "Kept: share of the tokens' first choice, of all their choices (chance: tokens shuffled).\n"
                           "Churn: tokens whose set differs. Moved: share of the load. A dash: not the same "
                           "tokens, experts or top-k.\n");
    if (!to->page) return;
    page_heading(to->page, "Against another dump");
    page_card(to->page);
    if (n > 1) inspect_draw_kept(to->page, a, b, n);
    inspect_compare_table(to->page, a, b, n);
    page_card_end(to->page);
    page_heading(to->page, b->row->path);
    page_card(to->page);
    inspect_draw_loads(to->page, b);
    page_card_end(to->page);
}

EX_FUNC void inspect_draw_loads(FILE *f, const inspect_table *t) {
    double top = 0, *even;
    size_t across = 3, down = (t->n + across - 1) / across, most = t->row[0].experts;
    char title[64];
    for (size_t i = 0; i < t->n; i++) {
        for (size_t e = 0; e < t->row[i].experts; e++) top = fmax(top, t->row[i].load[e] * (double)t->row[i].experts);
        if (t->row[i].experts > most) most = t->row[i].experts;
    }
    even = allocate(t->n * most, sizeof *even); // load as a multiple of an even share; NaN = no such expert
    for (size_t i = 0; i < t->n; i++)
        for (size_t e = 0; e < most; e++)
            even[i * most + e] = e < t->row[i].experts ? t->row[i].load[e] * (double)t->row[i].experts : NAN;
    if (t->n <= 48) {
        plot_begin(f, 960, 200 * (double)down, "Load of the experts");
        for (size_t i = 0; i < t->n; i++) {
            snprintf(title, sizeof title, "Layer %zu: load, 1 = even", t->row[i].layer);
            plot_bars(f, &(plot_bar_chart){.box = {320 * (double)(i % across), 200 * (double)(i / across), 320, 200},
                                           .title = title,
                                           .x_label = "expert",
                                           .n = t->row[i].experts,
                                           .value = even + i * most,
                                           .hi = top,
                                           .mark = 1});
        }
        plot_end(f);
    }
    double height = 90 + fmin(22 * (double)t->n, 700);
    plot_begin(f, 960, height, "Load by layer");
    plot_heat(f, &(plot_map){.box = {0, 0, 960, height},
                             .title = "Load by layer and expert, 1 = even",
                             .x_label = "expert",
                             .rows = t->n,
                             .cols = most,
                             .value = even,
                             .hi = top,
                             .scale_format = "%.2g"});
    plot_end(f);
    free(even);
}

EX_FUNC void inspect_draw_gamma(FILE *f, const inspect_table *t) {
    double *number = allocate(4 * t->n, sizeof *number);
    for (size_t i = 0; i < t->n; i++) {
        number[i] = (double)t->row[i].layer;
        number[t->n + i] = t->row[i].gamma, number[2 * t->n + i] = t->row[i].lo, number[3 * t->n + i] = t->row[i].hi;
    }
    plot_begin(f, 960, 320, "gamma_eff by layer");
    plot_points(f, &(plot_point_chart){.box = {0, 0, 960, 320},
                                       .title = "gamma_eff by layer, with 95% intervals",
                                       .x_label = "layer",
                                       .n = t->n,
                                       .x = number,
                                       .y = number + t->n,
                                       .lo = number + 2 * t->n,
                                       .hi = number + 3 * t->n});
    plot_end(f);
    free(number);
}

EX_FUNC void inspect_draw_series(FILE *f, const inspect_series *s) {
    const char *name[MOE_PHASE_COUNT];
    int *group = allocate(s->n, sizeof *group);
    for (int p = 0; p < MOE_PHASE_COUNT; p++) name[p] = moe_phase_name((moe_phase_kind)p);
    for (size_t c = 0; c < s->n; c++) group[c] = (int)s->phase[c];
    plot_begin(f, 960, 360, "Excess of gamma_eff by checkpoint");
    plot_points(f, &(plot_point_chart){.box = {0, 0, 960, 360},
                                       .title = "gamma_eff less the null over training, mean over layers, with phases",
                                       .x_label = "step",
                                       .n = s->n,
                                       .x = s->step,
                                       .y = s->excess,
                                       .lo = s->lo,
                                       .hi = s->hi,
                                       .group = group,
                                       .group_name = name,
                                       .n_groups = MOE_PHASE_COUNT,
                                       .joined = 1});
    plot_end(f);
    free(group);
}

// Where the tokens of a label go: a map, and the experts that take most of it.
EX_FUNC void inspect_page_labels(FILE *f, const inspect_layer *r) {
    char text[80];
    double *share = allocate(r->experts * r->n_labels, sizeof *share);
    double height = 90 + fmin(22 * (double)r->n_labels, 700);
    for (size_t c = 0; c < r->n_labels; c++) {
        double sum = 0;
        for (size_t e = 0; e < r->experts; e++) sum += (double)r->labels[e * r->n_labels + c];
        for (size_t e = 0; e < r->experts; e++)
            share[c * r->experts + e] = sum > 0 ? (double)r->labels[e * r->n_labels + c] / sum : NAN;
    }
    snprintf(text, sizeof text, "Layer %zu: share of a label's tokens by expert", r->layer);
    page_card(f);
    plot_begin(f, 960, height, text);
    plot_heat(f, &(plot_map){.box = {0, 0, 960, height},
                             .title = text,
                             .x_label = "expert",
                             .rows = r->n_labels,
                             .cols = r->experts,
                             .value = share,
                             .hi = 1,
                             .scale_format = "%.2g"});
    plot_end(f);
    page_table_begin(f);
    page_row(f, 1, "label|<experts that take most of it");
    for (size_t c = 0; c < r->n_labels; c++) {
        inspect_top_text(r, c, text);
        page_row(f, 0, "%zu|<%s", c, text);
    }
    page_table_end(f);
    page_card_end(f);
    free(share);
}

EX_FUNC void inspect_page(const inspect_config *o, const inspect_table *t, const inspect_table *other,
                          const inspect_series *s, size_t last) {
    char text[256], dead[256], gamma[2][40], a[6][16];
    inspect_table shown = {t->row + last, t->n - last}; // of a series the last checkpoint
    FILE *f = inspect_output(o, "html");
    snprintf(
        text, sizeof text, "%s: %zu layers, %zu tokens, %zu experts, top-%zu; %zu batches, %zu bootstrap replicates.",
        shown.row->path, shown.n, shown.row->tokens, shown.row->experts, shown.row->top_k, o->batches, o->bootstrap);
    page_begin(f, "How a model routes", text);
    inspect_page_explain(f, &shown);
    if (s) {
        page_heading(f, "Over training");
        page_card(f);
        inspect_draw_series(f, s);
        page_card_end(f);
    }
    if (shown.row->has_logits) {
        page_card(f);
        inspect_draw_gamma(f, &shown);
        page_card_end(f);
    }
    page_card(f);
    inspect_draw_loads(f, &shown);
    page_card_end(f);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1,
             "layer|MaxVio|CV|Gini|effective|<dead|dead first|gamma_eff [95%%]|null|excess [95%%]|OLS|T|L1 game|"
             "softmax|uniform|types");
    for (size_t i = 0; i < shown.n; i++) {
        const inspect_layer *r = &shown.row[i];
        inspect_gamma_text(gamma, r);
        dead_text(&r->dead, dead, sizeof dead);
        page_row(f, 0, "%zu|%.3f|%.3f|%.3f|%.2f|<%s|%zu|%s|%s|%s|%s|%s|%s|%s|%s|%s", r->layer, r->maxvio, r->cv,
                 r->gini, r->effective, dead, r->dead.first, gamma[0], inspect_show(a[5], "%.2f", r->null.gamma_null),
                 gamma[1], inspect_show(a[0], "%.2f", r->gamma_ols), inspect_show(a[1], "%.2f", r->temperature),
                 inspect_show(a[2], "%.4f", r->l1_game), inspect_show(a[3], "%.4f", r->l1_softmax),
                 inspect_show(a[4], "%.4f", r->l1_uniform), inspect_show(a[5], "%.4f", r->l1_coupled));
    }
    page_table_end(f);
    page_card_end(f);
    const inspect_outputs to_page = {NULL, f, NULL};
    if (other) inspect_compare(&to_page, &shown, other);
    if (o->relations) inspect_show_relations(&to_page, o, &shown);
    for (size_t i = 0; i < shown.n; i++)
        if (shown.row[i].labels) inspect_page_labels(f, &shown.row[i]);
    if (o->also) o->also(o->user, f);
    page_pre(
        f,
        "dead: under a tenth of an even share of the selections, with their numbers; dead first: under 1% of the first "
        "choices. L1: held out, 0 to 2. "
        "gamma_eff is after arXiv 2604.04230: derived, and moved by differences between tokens alone, in either "
        "sign. null: what the noise of the tokens alone makes, each expert's logits shuffled; excess: gamma_eff less "
        "that.");
    page_end(f);
    close_output(f, "the page");
}

// A layer a row, the keys of the JSON; an empty field is its null.
EX_FUNC void inspect_csv(const inspect_config *o, const inspect_table *const *tables, size_t n) {
    FILE *f = inspect_output(o, "csv");
    fprintf(f, "file,layer,tokens,experts,top_k,dead,dead_first,masked,identified,feasible,maxvio,maxvio_batch,cv,gini,"
               "entropy,"
               "effective_experts,gamma_eff,gamma_lo,gamma_hi,gamma_null,gamma_excess,excess_lo,excess_hi,gamma_ols,"
               "temperature,l1_game,l1_softmax,l1_uniform,l1_types_coupled,l1_types_independent,"
               "label_information,label_information_lo,label_information_hi\n");
    for (size_t k = 0; k < n; k++)
        for (size_t i = 0; i < tables[k]->n; i++) {
            const inspect_layer *r = &tables[k]->row[i];
            const int labels = r->labels != NULL;
            const double real[] = {r->maxvio,
                                   r->maxvio_batch,
                                   r->cv,
                                   r->gini,
                                   r->entropy,
                                   r->effective,
                                   r->gamma,
                                   r->lo,
                                   r->hi,
                                   r->null.gamma_null,
                                   r->null.gamma_excess,
                                   r->null.excess_lo,
                                   r->null.excess_hi,
                                   r->gamma_ols,
                                   r->temperature,
                                   r->l1_game,
                                   r->l1_softmax,
                                   r->l1_uniform,
                                   r->l1_coupled,
                                   r->l1_independent,
                                   r->domain.nats,
                                   r->domain.lo,
                                   r->domain.hi};
            const size_t count = sizeof real / sizeof *real;
            fputc('"', f);
            for (const char *c = r->path; *c; c++) fprintf(f, *c == '"' ? "\"\"" : "%c", *c);
            fprintf(f, "\",%zu,%zu,%zu,%zu,%zu,%zu,%zu,%s,%s", r->layer, r->tokens, r->experts, r->top_k, r->dead.n,
                    r->dead.first, r->masked, r->identified ? "true" : "false", r->feasible ? "true" : "false");
            for (size_t m = 0; m < count; m++) {
                if (isfinite(real[m]) && (labels || m + 3 < count))
                    fprintf(f, ",%.9g", real[m]);
                else
                    fputc(',', f);
            }
            fputc('\n', f);
        }
    close_output(f, "the CSV file");
}

// What was asked for beside the table.
EX_FUNC void inspect_more(const inspect_config *o, const inspect_outputs *to, const inspect_table *t,
                          const inspect_table *other) {
    if (o->relations) inspect_show_relations(to, o, t);
    if (other) inspect_compare(to, t, other);
    if (o->explain) {
        fprintf(to->human, "\nIn words\n");
        inspect_explain(to->human, to->lines, t);
    }
    const inspect_table *const both[] = {t, other};
    if (o->csv) inspect_csv(o, both, other ? 2 : 1);
}

#endif
