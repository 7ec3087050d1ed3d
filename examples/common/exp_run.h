// exp_run.h - what every experiment of experiments.c has: flags, tables, claims, the sentence at the end, the files.
//
//     exp_table t = exp_table_begin("Thresholds");
//     exp_row(&t, "experts|predicted|measured");          // the headings, then rows
//     exp_row(&t, "%zu|%.3f|%.3f", M, predicted, measured);
//     exp_table_end(run, &t);                             // terminal (as Markdown), page, JSON lines
//     exp_claim(run, "what", "the source's number", exp_positive(gain), "%.1f%%", here);
//     exp_final(run, verdict, "%zu of %zu ...", ...);     // the claims as a table, and one sentence
#ifndef EX_EXP_RUN_H
#define EX_EXP_RUN_H

#include "args.h"
#include "corpus.h"
#include "exp_verdict.h"
#include "nn.h"
#include "plot.h"
#include "progress.h"

enum { EXP_MAX_SEEDS = 32 };

typedef struct exp_table {
    const char *title;
    char **row;
    size_t n, room;
} exp_table;

typedef struct exp_run {
    const char *data, *isa, *out, *only, *argv0, *name; // name: of the experiment that runs
    size_t seeds, steps, threads;                       // 0: the experiment's own number
    uint64_t seed;
    int quick, json, quiet;
    moe_parallel parallel;
    FILE *human, *page;
    struct json lines;
    corpus *text; // of exp_text
    progress bar;
    size_t done; // of the bar's steps
    double begin; // of the experiment
    exp_table claims;
} exp_run;

// A number that --quick makes smaller and a flag (0: none) replaces.
EX_FUNC size_t exp_size(const exp_run *e, size_t flag, size_t quick, size_t full) {
    if (flag) return flag;
    return e->quick ? quick : full;
}

// WikiText-2, or the sample of it, as tokens; read once.
enum { EXP_VOCABULARY = 512 };
EX_FUNC corpus *exp_text(exp_run *e) {
    if (e->text) return e->text;
    e->text = allocate(1, sizeof *e->text);
    corpus_load(e->text, e->data, e->argv0);
    corpus_tokens(e->text, EXP_VOCABULARY);
    fprintf(e->human, "WikiText-2%s: %zu training tokens, %zu different\n", e->text->sample ? " sample" : "",
            e->text->part[CORPUS_TRAIN].n, e->text->bpe->n_tokens);
    fflush(e->human);
    return e->text;
}
EX_FUNC void exp_text_free(exp_run *e) {
    if (e->text) corpus_free(e->text);
    free(e->text);
}

// A layer of another desc with the same parameters; its optimiser begins anew. (Coefficients are a layer's for life.)
EX_FUNC moe_layer *exp_layer_like(const moe_layer *from, const moe_desc *desc) {
    moe_layer *to = NULL;
    moe_tensor t;
    nn_must(moe_layer_new(&to, desc));
    for (size_t k = 0; moe_layer_tensor(from, k, &t) == MOE_OK; k++) {
        float *value = allocate(t.count, sizeof *value);
        nn_must(moe_layer_get(from, MOE_PART_PARAMS, t.name, value, t.count));
        nn_must(moe_layer_set(to, MOE_PART_PARAMS, t.name, value, t.count));
        free(value);
    }
    return to;
}

// ---- tables ----

EX_FUNC exp_table exp_table_begin(const char *title) {
    exp_table t = {title, NULL, 0, 0};
    return t;
}
EX_PRINTF(2, 3) EX_FUNC void exp_row(exp_table *t, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (t->n == t->room) {
        t->room = 2 * t->room + 16;
        t->row = realloc(t->row, t->room * sizeof *t->row);
        if (!t->row) die("out of memory for a table");
    }
    t->row[t->n] = allocate(strlen(text) + 1, 1);
    strcpy(t->row[t->n++], text);
}
// A number as a part of a row; "-" where it is not known.
EX_FUNC const char *exp_number(char cell[32], const char *format, double v) {
    if (isnan(v)) snprintf(cell, 32, "-");
    else if (isinf(v)) snprintf(cell, 32, "infinite");
    else snprintf(cell, 32, format, v);
    return cell;
}

enum { EXP_COLUMNS = 16 };
// The cells of a row: where each begins, and how long it is. Returns how many.
EX_FUNC size_t exp_cells(const char *row, const char *at[EXP_COLUMNS], size_t length[EXP_COLUMNS]) {
    size_t n = 0;
    for (; n < EXP_COLUMNS; row++) {
        row += *row == '<'; // stands at the left
        at[n] = row;
        length[n++] = strcspn(row, "|");
        row += length[n - 1];
        if (!*row) break;
    }
    return n;
}

EX_FUNC void exp_table_print(FILE *f, const exp_table *t) {
    const char *at[EXP_COLUMNS];
    size_t length[EXP_COLUMNS], width[EXP_COLUMNS] = {0}, columns = 0;
    int left[EXP_COLUMNS] = {0};
    for (size_t i = 0; i < t->n; i++) {
        size_t n = exp_cells(t->row[i], at, length);
        if (n > columns) columns = n;
        for (size_t k = 0; k < n; k++) {
            if (length[k] > width[k]) width[k] = length[k];
            if (!i) left[k] = at[k] > t->row[i] && at[k][-1] == '<';
        }
    }
    for (size_t i = 0; i < t->n; i++) {
        size_t n = exp_cells(t->row[i], at, length);
        for (size_t k = 0; k < columns; k++) {
            int chars = k < n ? (int)length[k] : 0, blanks = (int)width[k] - chars;
            fputs(k ? " " : "| ", f);
            if (!left[k]) fprintf(f, "%*s", blanks, "");
            if (chars) fprintf(f, "%.*s", chars, at[k]);
            if (left[k]) fprintf(f, "%*s", blanks, "");
            fputs(" |", f);
        }
        fputc('\n', f);
        for (size_t k = 0; !i && k < columns; k++) fprintf(f, "%s%s |", k ? " " : "| ", left[k] ? "---" : "---:");
        if (!i) fputc('\n', f);
    }
}

EX_FUNC void exp_table_json(struct json *j, const char *experiment, const exp_table *t) {
    json_begin(j);
    json_text(j, "event", "table");
    json_text(j, "experiment", experiment);
    json_text(j, "title", t->title);
    json_list_begin(j, "rows");
    for (size_t i = 0; i < t->n; i++) {
        const char *at[EXP_COLUMNS];
        size_t length[EXP_COLUMNS], n = exp_cells(t->row[i], at, length);
        json_list_begin(j, NULL);
        for (size_t k = 0; k < n; k++) {
            char cell[512];
            snprintf(cell, sizeof cell, "%.*s", (int)length[k], at[k]);
            json_text(j, NULL, cell);
        }
        json_list_end(j);
    }
    json_list_end(j);
    json_end(j);
}

EX_FUNC void exp_table_end(exp_run *e, exp_table *t) {
    progress_clear(&e->bar);
    fprintf(e->human, "\n%s\n\n", t->title);
    exp_table_print(e->human, t);
    fflush(e->human);
    exp_table_json(&e->lines, e->name, t);
    page_heading(e->page, t->title);
    page_card(e->page);
    page_table_begin(e->page);
    for (size_t i = 0; i < t->n; i++) page_row(e->page, i == 0, "%s", t->row[i]);
    page_table_end(e->page);
    page_card_end(e->page);
    for (size_t i = 0; i < t->n; i++) free(t->row[i]);
    free(t->row);
    *t = (exp_table){NULL, NULL, 0, 0};
}

// ---- claims ----

// One row of the claims: what the source says, what was found here, and the verdict on it.
EX_PRINTF(5, 6) EX_FUNC void exp_claim(exp_run *e, const char *what, const char *source, exp_verdict verdict,
                                       const char *format, ...) {
    char here[512];
    va_list args;
    va_start(args, format);
    vsnprintf(here, sizeof here, format, args);
    va_end(args);
    exp_table *t = &e->claims;
    if (!t->n) exp_row(t, "<claim|<the source|<here|<verdict");
    exp_row(t, "<%s|<%s|<%s|<%s", what, source, here, exp_verdict_name[verdict]);
}

// The end of an experiment: its claims, and the sentence on the one that it is named after.
EX_PRINTF(3, 4) EX_FUNC void exp_final(exp_run *e, exp_verdict verdict, const char *format, ...) {
    char text[1024], sentence[1200];
    struct json *j = &e->lines;
    double seconds = seconds_now() - e->begin;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    e->claims.title = "Claims";
    if (e->claims.n) exp_table_end(e, &e->claims);
    snprintf(sentence, sizeof sentence, "Claim %s: %s.", exp_verdict_name[verdict], text);
    fprintf(e->human, "\n%s (%.0f s)\n", sentence, seconds);
    fprintf(e->page, "<p><b>");
    plot_escape(e->page, sentence);
    fprintf(e->page, "</b></p>\n");
    json_begin(j);
    json_text(j, "event", "final");
    json_text(j, "experiment", e->name);
    json_text(j, "verdict", exp_verdict_name[verdict]);
    json_text(j, "sentence", sentence);
    json_real(j, "seconds", seconds);
    json_end(j);
}

// The beginning of a JSON line of this experiment; the caller adds its numbers and ends it.
EX_FUNC struct json *exp_line(exp_run *e, const char *event) {
    json_begin(&e->lines);
    json_text(&e->lines, "event", event);
    json_text(&e->lines, "experiment", e->name);
    return &e->lines;
}

// ---- progress and pictures ----

EX_FUNC void exp_bar(exp_run *e, size_t steps) {
    e->bar = progress_begin(e->name, "steps", steps, e->quiet);
    e->done = 0;
}
EX_FUNC void exp_step(exp_run *e, const char *what, double loss) {
    progress_update(&e->bar, ++e->done, "%s  loss %.3f", what, loss);
}

// draw(f, arg) writes into out/experiments_NAME.svg and into the page.
EX_FUNC void exp_picture(exp_run *e, const char *title, double w, double h, void (*draw)(FILE *, const void *),
                         const void *arg) {
    char file[80];
    snprintf(file, sizeof file, "experiments_%s.svg", e->name);
    FILE *f = open_output(e->out, file), *both[2] = {f, e->page};
    progress_clear(&e->bar);
    page_card(e->page);
    for (int i = 0; i < 2; i++) {
        plot_begin(both[i], w, h, title);
        draw(both[i], arg);
        plot_end(both[i]);
    }
    page_card_end(e->page);
    close_output(f, file);
}

#endif
