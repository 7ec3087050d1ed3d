// wikitext2.c - a small language model with Mixture-of-Experts layers learns WikiText-2.
//
//     build/wikitext2                    on the sample of the text that the repository carries, about a minute
//     build/wikitext2 --data DIR         on all of WikiText-2 (DIR/wikitext-2/wiki.train.tokens ...)
//     build/wikitext2 --dense            the dense model of as many active parameters
//     build/wikitext2 --resume           go on where the last checkpoint in out/wikitext2 stands
//
// The model has OLMoE's architecture and is kept in its public layout (common/checkpoint.h), so that what runs real
// checkpoints runs it. Tokens are learned from the training text (common/bpe.h). Perplexity is by the word, as the
// published figures are (common/corpus.h): exp of all nats over all words and one <eos> a line. The model has no list
// of words, so it can spell any; what it gives to spellings that are no word of the list is lost to it. After training
// each token has at least half a window of text before it, so both texts are read twice; after an epoch the windows do
// not overlap.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/checkpoint.h"
#include "common/corpus.h"
#include "common/dead.h"
#include "common/game.h"
#include "common/json.h"
#include "common/peak.h"
#include "common/plot.h"
#include "common/progress.h"

#include <signal.h>

enum { MAX_EPOCHS = 64, MAX_EXPERTS = 64, CURVE = 200, MAX_SEEDS = 32, SAMPLE_TOKENS = 48 };

typedef struct config {
    const char *data, *system, *set, *isa, *out, *optimizer;
    size_t epochs, steps, batch, threads, experts, top_k, width, hidden, seeds, save;
    lm_shape shape;
    int dense, untied, bf16, resume, json, quiet;
    double lr, decay, warmup;
    size_t per_epoch; // steps of an epoch
    char key[4096];              // what a checkpoint must have been made with
    FILE *human;
    json lines;
} config;

// What a checkpoint keeps for the report. Plain numbers: it is written as it stands.
typedef struct curves {
    double loss[CURVE], seconds, window;       // training loss of each 200th of the steps; time spent training
    size_t in_window, epochs;                  // done
    double train[MAX_EPOCHS], valid[MAX_EPOCHS]; // nats a token; perplexity a word
    double epoch_loss, tokens;                 // sums of this epoch
    double load[LM_MAX_LAYERS][MAX_EXPERTS][MAX_EPOCHS]; // shares of the routes, on the validation text
    double peak, flops;                        // the highest measured; operations of all steps
} curves;

// The routing of one layer on a text.
typedef struct routing {
    moe_health health; // its arrays are not kept
    dead_note dead;
    game_note game;
} routing;

typedef struct result {
    uint64_t seed, checksum;
    size_t steps, params, active_params, dead;
    double train_loss, valid, test, tokens_per_s, peak_share, maxvio, ecology, gamma, seconds, gflops;
    routing layer[LM_MAX_LAYERS];
} result;

static volatile sig_atomic_t stop_asked;
static void ask_to_stop(int number) {
    stop_asked = number;
    signal(number, SIG_DFL); // a second time it ends the program
}
static void on_stop(void (*handler)(int)) {
    signal(SIGINT, handler);
    signal(SIGTERM, handler);
}

// ---- evaluation ----

// Perplexity by the word of a part; with `r` the routing of each layer. In windows `stride` apart.
static double evaluate(lm *m, const corpus *c, int part, size_t stride, routing *r) {
    size_t T = m->shape.length, layers = m->shape.layers, batch = m->rows / T, windows = 0, at = 0;
    int32_t *token = allocate(2 * m->rows, sizeof *token), *target = token + m->rows;
    game games[LM_MAX_LAYERS];
    double nats = 0;
    const struct corpus_part *p = &c->part[part];
    size_t all = p->n / stride / batch + 2;
    for (size_t i = 0; i < layers; i++) nn_must(moe_layer_health_reset(m->layer[i].moe));
    for (size_t i = 0; r && i < layers; i++) games[i] = game_new(m->layer[i].moe, all);
    do {
        for (windows = 0; windows < batch; windows++)
            if (!corpus_window(c, part, at + windows, T, stride, token + windows * T, target + windows * T)) break;
        at += windows;
        if (!windows) break;
        nats += lm_forward(m, token, target, windows * T, NULL);
        for (size_t i = 0; r && i < layers; i++) game_take(&games[i], m->layer[i].moe);
    } while (windows == batch);
    for (size_t i = 0; r && i < layers; i++) {
        nn_must(moe_layer_health(m->layer[i].moe, &r[i].health));
        r[i].dead = dead_take(&r[i].health);
        r[i].game = game_end(&games[i], m->layer[i].moe, &m->ops.parallel);
        game_free(&games[i]);
    }
    free(token);
    return exp(nats / (double)p->words);
}

// A line of text that the model goes on with, from the beginning of one.
static void speak(lm *m, const corpus *c, uint64_t seed, uint64_t epoch, char *out, size_t size) {
    size_t T = m->shape.length, V = m->shape.vocab, used = 0;
    int32_t *token = allocate(m->rows, sizeof *token);
    float *p = m->logits;
    bpe_encoder e = bpe_encoder_new(c->bpe);
    for (size_t i = 0; i < T; i++) token[i] = c->end;
    size_t n = bpe_encode(&e, " \n", 2, token);
    bpe_encoder_free(&e);
    for (; n < T && n < SAMPLE_TOKENS && used + 1 < size; n++) {
        lm_body(m, token, T, NULL);
        tb_head h = {.vocab = V, .x = m->xf, .w = m->bank.value + m->head, .logits = p};
        tb_head_products(&m->run, &h, n - 1, 1, 0);
        nn_must(moe_softmax(1, V, 0.8f, p, p));
        double draw = moe_rand_u32(seed, 9000 + epoch, n) / 4294967296.0, sum = 0;
        size_t next = 0;
        for (; next + 1 < V; next++)
            if ((sum += (double)p[next]) > draw) break;
        token[n] = (int32_t)next;
        char bytes[64];
        size_t length = bpe_bytes(c->bpe, (uint32_t)next, bytes, sizeof bytes);
        for (size_t k = 0; k < length && k < sizeof bytes && used + 1 < size; k++)
            out[used++] = (unsigned char)bytes[k] < ' ' ? ' ' : bytes[k];
    }
    out[used] = 0;
    free(token);
}

// ---- training ----

static float rate(const config *o, uint64_t step) { // warm-up, then straight down to 0
    double warm = o->warmup * (double)o->steps, at = (double)step;
    double share = at < warm ? (at + 1) / warm : ((double)o->steps - at) / fmax((double)o->steps - warm, 1);
    return (float)(o->lr * share);
}

static void save(const config *o, const lm *m, const corpus *c, const curves *v) {
    char dir[1000];
    snprintf(dir, sizeof dir, "%s/wikitext2", o->out);
    checkpoint_state_save(m, o->key, v, sizeof *v, dir);
    if (checkpoint_fits(moe_layer_desc(m->layer[0].moe))) checkpoint_save(m, c->bpe, o->bf16, dir);
}

static void write_layers(json *j, const routing *r, size_t layers) {
    json_list_begin(j, "layers");
    for (size_t i = 0; i < layers; i++) {
        json_object_begin(j, NULL);
        json_real(j, "maxvio", r[i].health.maxvio);
        json_real(j, "load_cv", r[i].health.load_cv);
        dead_json(j, &r[i].dead);
        game_json(j, &r[i].game);
        json_object_end(j);
    }
    json_list_end(j);
}

// The beginning of an epoch's line, or, of one before a pause, all that is left of it.
static void begin_epoch(config *o, const curves *v, size_t e, uint64_t step) {
    json *j = &o->lines;
    json_begin(j);
    json_text(j, "event", "epoch");
    json_whole(j, "epoch", e + 1);
    json_whole(j, "step", step);
    json_real(j, "train_loss", v->train[e]);
    json_real(j, "valid_perplexity", v->valid[e]);
}
static void write_epoch(config *o, const curves *v, size_t e) {
    begin_epoch(o, v, e, (e + 1) * o->per_epoch);
    json_end(&o->lines);
}

static void note_epoch(config *o, lm *m, const corpus *c, curves *v, uint64_t seed) {
    size_t e = v->epochs, layers = m->shape.layers, experts = moe_layer_desc(m->layer[0].moe)->n_experts;
    json *j = &o->lines;
    routing r[LM_MAX_LAYERS];
    char text[400], layer[160];
    v->valid[e] = evaluate(m, c, CORPUS_VALID, m->shape.length, r);
    v->train[e] = v->epoch_loss / v->tokens;
    v->epoch_loss = v->tokens = 0;
    for (size_t i = 0; i < layers; i++)
        for (size_t k = 0; k < experts && k < MAX_EXPERTS; k++)
            v->load[i][k][e] = (double)r[i].health.load[k] / fmax((double)r[i].health.n_selected, 1);
    v->epochs++;
    speak(m, c, seed, e, text, sizeof text);
    begin_epoch(o, v, e, m->steps);
    write_layers(j, r, layers);
    json_text(j, "sample", text);
    json_end(j);
    if (!o->quiet) {
        fprintf(o->human, "epoch %zu  training %.4f nats a token  validation %.2f a word\n", e + 1, v->train[e],
                v->valid[e]);
        for (size_t i = 0; i < layers && experts > 1; i++) {
            game_text(&r[i].game, layer, sizeof layer);
            fprintf(o->human, "  layer %zu  MaxVio %.2f  dead %zu  %s\n", i, r[i].health.maxvio, r[i].dead.n, layer);
        }
        fprintf(o->human, "  \"%s\"\n", text);
        fflush(o->human);
    }
    for (size_t i = 0; i < layers; i++) dead_free(&r[i].dead);
}

// One step; returns the loss, nats a token.
static double train_step(const config *o, lm *m, corpus *c, uint64_t seed, int32_t *token) {
    size_t epoch = (size_t)m->steps / o->per_epoch, at = (size_t)m->steps % o->per_epoch, rows = m->rows;
    lm_moment now = {m->steps};
    corpus_batch(c, seed, epoch, at, rows / m->shape.length, m->shape.length, token, token + rows);
    double loss = lm_forward(m, token, token + rows, rows, &now) / (double)rows;
    if (!(loss < 50)) die("the loss is %g at step %llu: try a smaller --lr", loss, (unsigned long long)m->steps);
    lm_backward(m, rows, &now);
    lm_step(m, rate(o, now.step), (float)o->decay);
    return loss;
}

// To the end, or until a signal: 0.
static int train(config *o, lm *m, corpus *c, curves *v, uint64_t seed) {
    size_t rows = m->rows, first = (size_t)m->steps;
    int32_t *token = allocate(2 * rows, sizeof *token);
    progress bar = progress_begin("wikitext2", "tokens", (o->steps - first) * rows, o->quiet);
    while (m->steps < o->steps && !stop_asked) {
        double begin = seconds_now(), loss = train_step(o, m, c, seed, token);
        v->seconds += seconds_now() - begin;
        size_t done = (size_t)m->steps, window = (done - 1) * CURVE / o->steps;
        v->window += loss;
        v->in_window++;
        v->epoch_loss += loss * (double)rows;
        v->tokens += (double)rows;
        v->flops += lm_flops(m, rows) + lm_step_flops(m);
        if (done * CURVE / o->steps > window || done == o->steps) {
            for (size_t k = window; k < done * CURVE / o->steps && k < CURVE; k++)
                v->loss[k] = v->window / (double)v->in_window;
            v->window = 0;
            v->in_window = 0;
        }
        progress_update(&bar, (done - first) * rows, "step %zu of %zu  loss %.4f", done, o->steps, loss);
        int epoch_done = done % o->per_epoch == 0 || done == o->steps;
        if (epoch_done) {
            progress_clear(&bar);
            v->peak = fmax(v->peak, peak_flops(&m->ops.parallel));
            note_epoch(o, m, c, v, seed);
        }
        if (epoch_done || (o->save && done % o->save == 0) || stop_asked) save(o, m, c, v);
    }
    progress_clear(&bar);
    free(token);
    return m->steps >= o->steps;
}

// ---- the report ----

static void write_config(config *o, const lm *m, const corpus *c) {
    json *j = &o->lines;
    char layer[4096];
    moe_desc_json(moe_layer_desc(m->layer[0].moe), layer, sizeof layer);
    json_config(j, "wikitext2");
    json_text(j, "data", o->data ? o->data : "sample");
    json_whole(j, "train_tokens", c->part[0].n);
    json_whole(j, "train_words", c->part[0].words);
    json_whole(j, "valid_words", c->part[1].words);
    json_whole(j, "test_words", c->part[2].words);
    json_text(j, "system", o->system);
    json_whole(j, "seed", o->shape.seed);
    json_whole(j, "epochs", o->epochs);
    json_whole(j, "steps", o->steps);
    json_whole(j, "batch", o->batch);
    json_whole(j, "length", m->shape.length);
    json_whole(j, "vocabulary", m->shape.vocab);
    json_whole(j, "width", m->shape.d);
    json_whole(j, "heads", m->shape.heads);
    json_whole(j, "layers", m->shape.layers);
    json_raw(j, "tied", m->shape.tied ? "true" : "false");
    json_text(j, "optimizer", o->optimizer);
    json_real(j, "lr", o->lr);
    json_real(j, "weight_decay", o->decay);
    json_real(j, "dropout", m->shape.dropout);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_whole(j, "threads", moe_workers(&m->ops.parallel));
    json_raw(j, "layer", layer);
    json_end(j);
}

static void write_final(config *o, const result *r, const char *event) {
    json *j = &o->lines;
    char hash[17];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->checksum);
    json_begin(j);
    json_text(j, "event", event);
    json_text(j, "system", o->system);
    json_whole(j, "seed", r->seed);
    json_whole(j, "steps", r->steps);
    json_real(j, "train_loss", r->train_loss);
    json_real(j, "valid_perplexity", r->valid);
    json_real(j, "test_perplexity", r->test);
    json_whole(j, "params", r->params);
    json_whole(j, "active_params", r->active_params);
    json_real(j, "tokens_per_s", r->tokens_per_s);
    json_real(j, "peak_share", r->peak_share);
    json_real(j, "maxvio", r->maxvio);
    json_whole(j, "dead", r->dead);
    json_real(j, "ecology", r->ecology);
    json_real(j, "gamma_eff", r->gamma);
    json_real(j, "seconds", r->seconds);
    json_text(j, "checksum", hash);
    json_end(j);
}

// The end of one training: both texts with at least half a window before each token.
static void finish(lm *m, const corpus *c, const curves *v, result *r) {
    size_t layers = m->shape.layers, T = m->shape.length, found = 0;
    r->valid = evaluate(m, c, CORPUS_VALID, T / 2, NULL);
    r->test = evaluate(m, c, CORPUS_TEST, T / 2, r->layer);
    r->steps = (size_t)m->steps;
    r->train_loss = v->epochs ? v->train[v->epochs - 1] : NAN;
    r->params = lm_params(m, 0);
    r->active_params = lm_params(m, 1);
    r->tokens_per_s = (double)(m->steps * m->rows) / v->seconds;
    r->gflops = v->flops / v->seconds * 1e-9;
    r->peak_share = v->flops / v->seconds / v->peak;
    r->checksum = lm_hash(m);
    r->ecology = r->layer[0].game.ecology;
    r->gamma = 0;
    for (size_t i = 0; i < layers; i++) { // the worst layer, all dead experts, the mean gamma where it is known
        r->maxvio = fmax(r->maxvio, r->layer[i].health.maxvio);
        r->dead += r->layer[i].dead.n;
        if (!isnan(r->layer[i].game.gamma)) r->gamma += r->layer[i].game.gamma, found++;
    }
    r->gamma = found ? r->gamma / (double)found : NAN;
}

static void draw(FILE *f, const config *o, const curves *v, size_t layers, size_t experts) {
    size_t rows = layers * experts, epochs = v->epochs;
    double peak = 0, *load = allocate(rows * (epochs + 1), sizeof *load);
    for (size_t i = 0; i < layers; i++)
        for (size_t k = 0; k < experts && k < MAX_EXPERTS; k++)
            for (size_t e = 0; e < epochs; e++) {
                load[(i * experts + k) * epochs + e] = v->load[i][k][e];
                peak = fmax(peak, v->load[i][k][e]);
            }
    char label[64];
    snprintf(label, sizeof label, "share of the steps, in 200 parts (%zu steps)", o->steps);
    plot_line loss[] = {{"training", v->loss, CURVE, 0}}, valid[] = {{"validation", v->valid, epochs, 0}};
    plot_begin(f, 960, experts > 1 ? 720 : 340, "WikiText-2 with a Mixture of Experts");
    plot_lines(f, &(plot_chart){{0, 0, 480, 330}, "Loss, nats a token", label, loss, 1, 0, 0});
    plot_lines(f, &(plot_chart){{480, 0, 480, 330}, "Perplexity a word", "epoch", valid, 1, 0, 0});
    if (experts > 1)
        plot_heat(f, &(plot_map){.box = {0, 340, 960, 370},
                                 .title = "Load on the validation text: the experts of each layer, one layer above "
                                          "the other",
                                 .x_label = "epoch",
                                 .rows = rows,
                                 .cols = epochs,
                                 .value = load,
                                 .hi = peak,
                                 .col_first = 1,
                                 .scale_format = "%.2f"});
    plot_end(f);
    free(load);
}

static void write_page(const config *o, const lm *m, const curves *v, const result *r, size_t experts) {
    char text[256], line[160];
    FILE *f = open_output(o->out, "wikitext2.html");
    snprintf(text, sizeof text, "%s, %zu layers of %zu experts, width %zu, %zu steps of %zu tokens, seed %llu.",
             o->system, m->shape.layers, experts, m->shape.d, r->steps, m->rows, (unsigned long long)r->seed);
    page_begin(f, "WikiText-2 with a Mixture of Experts", text);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "validation|test|parameters|active|tokens/s|GFLOP/s|of peak");
    page_row(f, 0, "%.2f|%.2f|%zu|%zu|%.0f|%.1f|%.0f%%", r->valid, r->test, r->params, r->active_params,
             r->tokens_per_s, r->gflops, 100 * r->peak_share);
    page_table_end(f);
    page_card_end(f);
    page_card(f);
    draw(f, o, v, m->shape.layers, experts);
    page_card_end(f);
    page_heading(f, "Routing on the test text");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "layer|MaxVio|dead|<ecology number and gamma_eff");
    for (size_t i = 0; i < m->shape.layers; i++) {
        game_text(&r->layer[i].game, line, sizeof line);
        page_row(f, 0, "%zu|%.3f|%zu|<%s", i, r->layer[i].health.maxvio, r->layer[i].dead.n, line);
    }
    page_table_end(f);
    page_card_end(f);
    page_pre(f, "Perplexity is by the word: exp of all nats over all words and one <eos> a line.");
    page_end(f);
    close_output(f, "wikitext2.html");
}

static void report(config *o, const lm *m, const curves *v, const result *r) {
    size_t experts = moe_layer_desc(m->layer[0].moe)->n_experts;
    char line[160];
    FILE *f = open_output(o->out, "wikitext2.svg");
    draw(f, o, v, m->shape.layers, experts);
    close_output(f, "wikitext2.svg");
    write_page(o, m, v, r, experts);
    fprintf(o->human, "\n%-14s validation %.2f  test %.2f (perplexity a word)  %zu parameters, %zu active\n", o->system,
            r->valid, r->test, r->params, r->active_params);
    for (size_t i = 0; i < m->shape.layers && experts > 1; i++) {
        game_text(&r->layer[i].game, line, sizeof line);
        fprintf(o->human, "layer %zu  MaxVio %.3f  dead %zu  %s\n", i, r->layer[i].health.maxvio, r->layer[i].dead.n,
                line);
    }
    fprintf(o->human, "%.0f tokens/s, %.1f GFLOP/s in products, %.0f%% of %.1f (a loop of multiply-adds); %.0f s\n",
            r->tokens_per_s, r->gflops, 100 * r->peak_share, v->peak * 1e-9, r->seconds);
    fprintf(o->human, "checksum %016llx; see %s/wikitext2.html, .svg, .jsonl; the model: %s/wikitext2/\n",
            (unsigned long long)r->checksum, o->out, o->out);
}

// ---- one training, and several ----

static moe_desc mixture(const config *o, uint64_t seed) {
    moe_desc d = {0};
    nn_must(moe_desc_system(&d, o->dense ? "dense" : o->system));
    d.d_model = o->shape.d;
    if (o->experts && !o->dense) d.n_experts = o->experts;
    if (o->top_k && !o->dense) nn_top_k(&d, o->top_k);
    if (d.expert == MOE_EXPERT_DEFAULT) d.expert = MOE_EXPERT_SWIGLU;
    if (!o->dense) nn_set("wikitext2", &d, o->set);
    if (!d.d_ff) d.d_ff = o->hidden;
    d.sequence = o->shape.length;
    if (d.schedule_steps) d.schedule_steps = o->steps * 3 / 4;
    d.weight_decay = o->decay > 0 && o->shape.optimizer != LM_MUON ? (float)o->decay : (float)MOE_OFF;
    d.beta2 = 0.95f;
    d.seed = seed * 1000 + 1;
    d.parallel.n_threads = o->threads;
    nn_resolve("wikitext2", "", &d);
    if (o->dense) { // as wide as all that one token of the mixture uses
        config other = *o;
        other.dense = 0;
        moe_desc m = mixture(&other, seed);
        d.d_ff = (m.top_k + m.n_shared) * m.d_ff;
        nn_resolve("wikitext2", "", &d);
    }
    return d;
}

// All that decides the bits of a training.
static void describe(config *o, const moe_desc *desc, const corpus *c) {
    const lm_shape *s = &o->shape;
    size_t n = (size_t)snprintf(o->key, sizeof o->key,
                                "seed=%llu steps=%zu per_epoch=%zu batch=%zu lr=%.9g decay=%.9g warmup=%.9g "
                                "dropout=%.9g vocab=%zu heads=%zu layers=%zu length=%zu tied=%d optimizer=%s "
                                "text=%016llx ",
                                (unsigned long long)s->seed, o->steps, o->per_epoch, o->batch, o->lr, o->decay,
                                o->warmup, s->dropout, s->vocab, s->heads, s->layers, s->length, s->tied, o->optimizer,
                                (unsigned long long)moe_hash(0, c->part[0].text, c->part[0].size));
    moe_desc_json(desc, o->key + n, sizeof o->key - n);
}

// Returns 0 if a signal ended it.
static int run(config *o, corpus *c, uint64_t seed, result *r) {
    curves *v = allocate(1, sizeof *v);
    double begin = seconds_now();
    o->shape.seed = seed;
    moe_desc desc = mixture(o, seed);
    lm *m = lm_new(&o->shape, &desc, o->batch * o->shape.length);
    describe(o, &desc, c);
    char dir[1000];
    snprintf(dir, sizeof dir, "%s/wikitext2", o->out);
    if (o->resume) checkpoint_state_load(m, o->key, v, sizeof *v, dir);
    v->peak = fmax(v->peak, peak_flops(&m->ops.parallel));
    write_config(o, m, c);
    for (size_t e = 0; e < v->epochs; e++) write_epoch(o, v, e); // of before
    memset(r, 0, sizeof *r);
    r->seed = seed;
    on_stop(ask_to_stop);
    int whole = train(o, m, c, v, seed);
    on_stop(SIG_DFL); // the checkpoint is written
    if (whole) finish(m, c, v, r);
    r->seconds = seconds_now() - begin;
    if (whole) report(o, m, v, r);
    lm_free(m);
    free(v);
    return whole;
}

// Runs from the seed on; prints the mean and the standard deviation of what is compared.
static int run_seeds(config *o, corpus *c, result *r) {
    uint64_t first = o->shape.seed;
    double mean[2] = {0}, square[2] = {0}, n = (double)o->seeds;
    for (size_t i = 0; i < o->seeds; i++) {
        if (!run(o, c, first + i, &r[i])) return 0;
        if (o->seeds > 1) write_final(o, &r[i], "seed");
        mean[0] += r[i].valid / n, mean[1] += r[i].test / n;
    }
    for (size_t i = 0; i < o->seeds; i++)
        square[0] += pow(r[i].valid - mean[0], 2), square[1] += pow(r[i].test - mean[1], 2);
    if (o->seeds == 1) return 1;
    for (int k = 0; k < 2; k++) square[k] = sqrt(square[k] / (n - 1));
    fprintf(o->human, "\n%zu seeds: validation %.2f +- %.2f, test %.2f +- %.2f (mean, standard deviation)\n", o->seeds,
            mean[0], square[0], mean[1], square[1]);
    json_begin(&o->lines);
    json_text(&o->lines, "event", "seeds");
    json_whole(&o->lines, "seeds", o->seeds);
    json_real(&o->lines, "valid_mean", mean[0]);
    json_real(&o->lines, "valid_std", square[0]);
    json_real(&o->lines, "test_mean", mean[1]);
    json_real(&o->lines, "test_std", square[1]);
    json_end(&o->lines);
    return 1;
}

static void parse(config *o, int argc, char **argv) {
    lm_shape *s = &o->shape;
    args_option options[] = {
        ARGS_DATA(&o->data),
        {"epochs", ARGS_SIZE, &o->epochs, "N", "passes over the training text (0: by the data)", 0, MAX_EPOCHS},
        ARGS_STEPS(&o->steps),
        ARGS_SEED(&s->seed),
        {"seeds", ARGS_SIZE, &o->seeds, "N", "so many trainings, from --seed on: mean and deviation", 1, MAX_SEEDS},
        ARGS_THREADS(&o->threads),
        ARGS_ISA(&o->isa),
        ARGS_SYSTEM(&o->system, "a causal row of moe.h's table of systems (build/zoo lists them)"),
        {"set", ARGS_TEXT, &o->set, "TEXT", "fields of moe_desc: \"loss.entropy=0.1 temperature=2\"", 0, 0},
        ARGS_EXPERTS(&o->experts),
        ARGS_TOP_K(&o->top_k),
        {"dense", ARGS_FLAG, &o->dense, NULL, "one expert, as wide as what a token uses of the mixture", 0, 0},
        {"batch", ARGS_SIZE, &o->batch, "N", "sequences a step (0: by the data)", 0, 4096},
        {"length", ARGS_SIZE, &s->length, "N", "tokens of a sequence (0: by the data)", 0, 4096},
        {"vocab", ARGS_SIZE, &s->vocab, "N", "tokens of the vocabulary, at most (0: by the data)", 0, 65536},
        {"width", ARGS_SIZE, &s->d, "N", "numbers of a token, a multiple of 16 (0: by the data)", 0, 4096},
        {"hidden", ARGS_SIZE, &o->hidden, "N", "width of an expert (0: by the data)", 0, 65536},
        {"layers", ARGS_SIZE, &s->layers, "N", "layers (0: by the data)", 0, LM_MAX_LAYERS},
        {"heads", ARGS_SIZE, &s->heads, "N", "heads of the attention (0: width / 64)", 0, 256},
        {"untied", ARGS_FLAG, &o->untied, NULL, "the head has a matrix of its own", 0, 0},
        {"optimizer", ARGS_TEXT, &o->optimizer, "NAME", "muon; mixed: AdamW for the experts; adamw: for all", 0, 0},
        {"lr", ARGS_REAL, &o->lr, "X", "highest learning rate (0: by the data)", 0, 10},
        {"warmup", ARGS_REAL, &o->warmup, "X", "share of the steps in which it rises", 0, 1},
        {"decay", ARGS_REAL, &o->decay, "X", "weight decay of the matrices", 0, 10},
        {"dropout", ARGS_REAL, &s->dropout, "X", "of what a block adds (negative: by the data)", -1, 0.9},
        {"save", ARGS_SIZE, &o->save, "N", "a checkpoint every N steps too, not after epochs alone", 0, 0},
        {"resume", ARGS_FLAG, &o->resume, NULL, "go on from the checkpoint in OUT/wikitext2", 0, 0},
        {"bf16", ARGS_FLAG, &o->bf16, NULL, "the model's file in bfloat16, half as large and rounded", 0, 0},
        ARGS_OUT(&o->out),
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->quiet),
    };
    args_parse("wikitext2", "Trains a small language model with Mixture-of-Experts layers on WikiText-2.", options,
               sizeof options / sizeof *options, argc, argv);
    nn_isa("wikitext2", o->isa);
    static const char *const optimizer[] = {"muon", "mixed", "adamw"};
    while (s->optimizer <= LM_ADAMW && strcmp(o->optimizer, optimizer[s->optimizer]) != 0) s->optimizer++;
    if (s->optimizer > LM_ADAMW)
        args_fail("wikitext2", "--optimizer: there is no '%s'; there are: muon, mixed, adamw", o->optimizer);
    moe_desc desc = {0};
    nn_system("wikitext2", &desc, o->system); // before anything is read
    nn_set("wikitext2", &desc, o->set);
    if (strstr(moe_system_find(o->system)->limits, "not causal"))
        args_fail("wikitext2", "--system: %s sees what comes after a token: %s", o->system,
                  moe_system_find(o->system)->limits);
    if (o->resume && o->seeds > 1) args_fail("wikitext2", "--resume: goes on with one training, not with --seeds");
}

// What the data decide unless a flag does.
static void by_data(config *o, const corpus *c) {
    lm_shape *s = &o->shape;
    struct {
        size_t *value, sample, full;
    } size[] = {{&o->epochs, 2, 4},  {&o->batch, 16, 16},      {&s->length, 128, 256}, {&s->vocab, 1024, 4096},
                {&s->d, 128, 192},   {&o->hidden, 128, 192},   {&s->layers, 2, 4}};
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        if (!*size[i].value) *size[i].value = c->sample ? size[i].sample : size[i].full;
    if (o->lr <= 0) o->lr = c->sample ? 1e-2 : 1.2e-2;
    if (s->dropout < 0) s->dropout = c->sample ? 0.1 : 0.05;
    if (!s->heads) s->heads = s->d >= 64 ? s->d / 64 : 1;
    s->tied = !o->untied;
    if (s->d % 16 || s->d % s->heads || s->d / s->heads % 2)
        args_fail("wikitext2", "--width: %zu is not a multiple of 16, or its %zu heads not of even size", s->d,
                  s->heads);
}
// The vocabulary is what was learned; the steps follow from the tokens.
static void by_tokens(config *o, corpus *c) {
    corpus_tokens(c, o->shape.vocab);
    o->shape.vocab = c->bpe->n_tokens;
    size_t sequences = corpus_sequences(c, o->shape.length);
    o->per_epoch = sequences / o->batch;
    if (!o->per_epoch)
        args_fail("wikitext2", "--batch: the text has only %zu sequences of %zu tokens", sequences, o->shape.length);
    size_t most = o->per_epoch * o->epochs;
    if (!o->steps || o->steps > most) o->steps = most;
}

int main(int argc, char **argv) {
    static result r[MAX_SEEDS];
    config o = {.system = "mixtral", .isa = "auto", .out = "out", .optimizer = "muon", .seeds = 1, .decay = 0.1};
    o.shape = (lm_shape){.seed = 1, .theta = 10000, .epsilon = 1e-5, .dropout = -1};
    o.warmup = 0.05;
    corpus c;
    parse(&o, argc, argv);
    corpus_load(&c, o.data, argv[0]);
    by_data(&o, &c);
    by_tokens(&o, &c);
    o.human = o.json ? stderr : stdout;
    o.lines = (json){{open_output(o.out, "wikitext2.jsonl"), o.json ? stdout : NULL}, 0};
    fprintf(o.human, "WikiText-2%s: %zu training tokens (%zu words), %zu different; %s\n", c.sample ? " sample" : "",
            c.part[0].n, c.part[0].words, o.shape.vocab, moe_isa_name(moe_active_isa()));
    int whole = run_seeds(&o, &c, r);
    if (whole) write_final(&o, &r[0], "final");
    else fprintf(stderr, "stopped; --resume goes on from %s/wikitext2/training.state\n", o.out);
    close_output(o.lines.file[0], "wikitext2.jsonl");
    for (size_t i = 0; i < o.seeds; i++)
        for (size_t k = 0; k < LM_MAX_LAYERS; k++) dead_free(&r[i].layer[k].dead);
    corpus_free(&c);
    return whole ? 0 : 128 + stop_asked;
}
