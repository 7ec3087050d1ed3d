// survey.h - how a model routes texts, beside what inspect.h knows from a dump: the tokens that are an expert's own,
// REAP's saliency, experts and domains in a table. build/llm fills it.
#ifndef EX_SURVEY_H
#define EX_SURVEY_H

#include "inspect_show.h"
#include "specific.h"
#include "tokenizer.h"

// A model's routing of texts, in files that build/inspect reads too: PREFIX.router_logits.npy, PREFIX.experts.npy
// and, with several texts, PREFIX.labels.npy. Each text is read in windows that do not overlap.
typedef struct survey {
    const tokenizer *t;
    char prefix[600], logits[640], experts[640], labels[640];
    size_t n_tokens, begin, mixtures, n_experts, slots; // begin: of the window that is read
    FILE *file;                                         // of the logits
    token_list ids, label;
    int32_t *index;   // (mixtures, T, slots)
    double *saliency; // (mixtures, E), NaN where nothing chooses an expert
    double *worth;    // (E), for a batch
    uint64_t *count;  // (mixtures, E): tokens that choose it
} survey;

// A token between quotes: what would break a line or a cell of a table stands for itself no more.
EX_FUNC const char *survey_token(const survey *v, int32_t id, char out[80]) {
    text_buffer b = tokenizer_decode(v->t, &id, 1, 0);
    size_t at = 0, end = b.length < 60 ? b.length : 60;
    out[at++] = '"';
    while (end < b.length && end && ((unsigned char)b.text[end] & 0xC0) == 0x80) end--;
    for (size_t i = 0; i < end && at < 70; i++) {
        unsigned char c = (unsigned char)b.text[i];
        if (c == '\n' || c == '\t' || c == '|') out[at++] = '\\', c = c == '\n' ? 'n' : c == '\t' ? 't' : '!';
        out[at++] = c < ' ' || c == 127 ? '?' : (char)c;
    }
    out[at++] = '"';
    out[at] = 0;
    free(b.text);
    return out;
}
// Each expert's own tokens: a line each, on the page, as JSON, as CSV.
EX_FUNC void survey_tokens(const survey *v, size_t mixture, const inspect_outputs *to, FILE *csv) {
    size_t E = v->n_experts, used;
    specific_token *best = allocate(E * SPECIFIC_MOST, sizeof *best);
    char text[80], line[1000];
    specific_tokens(v->n_tokens, E, v->slots, v->index + mixture * v->n_tokens * v->slots, v->ids.id, best);
    for (size_t e = 0; e < E; e++) {
        line[used = 0] = 0;
        for (size_t i = 0; i < SPECIFIC_MOST; i++) {
            const specific_token *s = &best[e * SPECIFIC_MOST + i];
            if (s->token < 0) break;
            survey_token(v, s->token, text);
            used +=
                (size_t)snprintf(line + used, sizeof line - used, "%s%s %.0f%%", i ? ", " : "", text, 100 * s->share);
            if (!csv) continue;
            fprintf(csv, "%zu,%zu,%zu,%d,", mixture, e, i + 1, (int)s->token);
            for (const char *c = text; *c; c++) fprintf(csv, *c == '"' && c > text && c[1] ? "\"\"" : "%c", *c);
            fprintf(csv, ",%llu,%llu,%.9g,%.9g\n", (unsigned long long)s->taken, (unsigned long long)s->seen, s->share,
                    s->lift);
        }
        if (to->human) fprintf(to->human, "%5zu  %6zu  %s\n", mixture, e, used ? line : "-");
        if (to->page) page_row(to->page, 0, "%zu|%zu|<%s", mixture, e, used ? line : "-");
        if (!to->lines) continue;
        json_begin(to->lines);
        json_text(to->lines, "event", "tokens");
        json_whole(to->lines, "layer", mixture);
        json_whole(to->lines, "expert", e);
        json_list_begin(to->lines, "tokens");
        for (const specific_token *s = best + e * SPECIFIC_MOST; s < best + (e + 1) * SPECIFIC_MOST; s++) {
            if (s->token < 0) break;
            json_object_begin(to->lines, NULL);
            json_whole(to->lines, "id", (uint64_t)s->token);
            json_text(to->lines, "text", survey_token(v, s->token, text));
            json_whole(to->lines, "taken", s->taken);
            json_whole(to->lines, "seen", s->seen);
            json_real(to->lines, "share", s->share);
            json_real(to->lines, "lift", s->lift);
            json_object_end(to->lines);
        }
        json_list_end(to->lines);
        json_end(to->lines);
    }
    free(best);
}
// REAP's saliency of each expert, the least first.
EX_FUNC void survey_saliency(const survey *v, size_t mixture, const inspect_outputs *to) {
    size_t E = v->n_experts, used = 0, shown = 0;
    const double *of = v->saliency + mixture * E;
    double last = -1;
    char line[400] = "-";
    for (size_t next = E; shown < 8; shown++, next = E) {
        for (size_t e = 0; e < E; e++)
            if (of[e] > last && (next == E || of[e] < of[next])) next = e;
        if (next == E) break;
        last = of[next];
        used += (size_t)snprintf(line + used, sizeof line - used, "%s%zu %.4g", shown ? ", " : "", next, last);
    }
    if (to->human) fprintf(to->human, "%5zu  %s\n", mixture, line);
    if (to->page) page_row(to->page, 0, "%zu|<%s", mixture, line);
    if (!to->lines) return;
    json_begin(to->lines);
    json_text(to->lines, "event", "saliency");
    json_whole(to->lines, "layer", mixture);
    json_list_begin(to->lines, "saliency");
    for (size_t e = 0; e < E; e++) json_real(to->lines, NULL, of[e]);
    json_list_end(to->lines);
    json_end(to->lines);
}
EX_FUNC void survey_experts(const survey *v, const inspect_outputs *to, FILE *csv) {
    if (to->human)
        fprintf(to->human,
                "\nlayer  expert  its own tokens: share of their occurrences that choose it, the surest of "
                "at least %d first\n",
                SPECIFIC_LEAST);
    for (size_t i = 0; i < v->mixtures; i++) survey_tokens(v, i, to, csv);
    if (to->human)
        fprintf(to->human, "\nlayer  saliency, the least first: weight times length of an expert's output, in the mean "
                           "over its tokens\n");
    for (size_t i = 0; i < v->mixtures; i++) survey_saliency(v, i, to);
}
EX_FUNC void survey_page(void *user, FILE *page) {
    const survey *v = user;
    const inspect_outputs to = {NULL, page, NULL};
    page_heading(page, "Experts and tokens");
    page_card(page);
    page_table_begin(page);
    page_row(page, 1, "layer|expert|<its own tokens: share of their occurrences that choose it");
    for (size_t i = 0; i < v->mixtures; i++) survey_tokens(v, i, &to, NULL);
    page_table_end(page);
    page_table_begin(page);
    page_row(page, 1, "layer|<saliency, the least first");
    for (size_t i = 0; i < v->mixtures; i++) survey_saliency(v, i, &to);
    page_table_end(page);
    page_card_end(page);
}
// Expert by expert: load and saliency, and where there are labels, how many first choices each has.
EX_FUNC void survey_write(const char *out, const survey *v, const inspect_table *t, const char *const *text) {
    FILE *f = open_output(out, "llm.experts.csv");
    fprintf(f, "layer,expert,load,saliency,domain,first_choices,share,lift\n");
    for (size_t i = 0; i < t->n; i++)
        for (size_t e = 0; e < v->n_experts; e++) {
            const inspect_layer *r = &t->row[i];
            double mine = 0, all = 0, saliency = v->saliency[i * v->n_experts + e];
            size_t c = 0, n = r->n_labels;
            for (size_t k = 0; k < n * v->n_experts; k++) all += (double)r->labels[k];
            for (; c < n; c++) mine += (double)r->labels[e * n + c];
            for (c = 0; c < (n ? n : 1); c++) {
                double domain = 0, count = n ? (double)r->labels[e * n + c] : 0;
                for (size_t k = 0; k < v->n_experts && n; k++) domain += (double)r->labels[k * n + c];
                fprintf(f, "%zu,%zu,%.9g,", r->layer, e, r->load[e]);
                if (saliency >= 0) fprintf(f, "%.9g", saliency);
                if (n)
                    fprintf(f, ",\"%s\",%.0f,%.9g,%.9g\n", text[c], count, count / domain,
                            mine > 0 ? count / domain / (mine / all) : 0);
                else
                    fprintf(f, ",,,,\n");
            }
        }
    close_output(f, "llm.experts.csv");
}

#endif
