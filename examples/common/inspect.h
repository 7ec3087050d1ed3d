// inspect.h - what a dump of routing says: build/inspect's table for each layer, and the reading of its files. What is
// printed, drawn and written of it is in inspect_show.h; docs/inspect.md says what every number means.
#ifndef EX_INSPECT_H
#define EX_INSPECT_H

#include "args.h"
#include "dead.h"
#include "dump.h"
#include "progress.h"
#include "relations.h"

#include <math.h>

enum { INSPECT_SAMPLE = 4096, INSPECT_LABELS = 4096, INSPECT_RELATED = 4096 };

typedef struct inspect_config {
    const char *name, *logits, *indices, *labels, *router, *steps_at, *compare, *out;
    size_t top_k, experts, batches, bootstrap, types, threads;
    uint64_t seed;
    int series, bf16, probabilities, explain, relations, csv, json, html, quiet;
    const char **file;
    size_t n_files;
    moe_parallel parallel;
    void (*also)(void *user, FILE *page); // what else belongs on the page
    void *user;
} inspect_config;

// What is known of one layer.
typedef struct inspect_layer {
    const char *path;
    size_t layer, tokens, experts, top_k;
    double *load; // (experts): shares
    double maxvio, maxvio_batch, cv, gini, entropy, effective, selected;
    size_t batches;
    dead_note dead;
    int has_logits, identified, feasible, probabilities;
    size_t masked; // experts without a mean logit
    size_t n_labels;
    uint64_t *labels; // (experts, n_labels): first choices by label
    double gamma, lo, hi, gamma_ols, temperature;
    moe_game_null null;
    double l1_game, l1_softmax, l1_uniform, l1_coupled, l1_independent; // held out
    double peak_load, peak_softmax, epsilon;                            // epsilon: NaN until the next layer is known
    double agreement[MOE_QUALITY_COUNT];                                // of the quality estimators with the mean logit
    double gamma_by[MOE_QUALITY_COUNT];
    double *replicate; // (bootstrap): gamma less the null's
    size_t ecology[MOE_ECOLOGY_COUNT];
    size_t n_sample;
    int32_t *choice; // (n_sample, top_k): of an even sample of rows, the same in every layer and dump of as many
    uint32_t *batch; // (n_sample)
    relation_information domain; // first choice and label, of that sample
    double purity;               // share of the labelled tokens whose label is their expert's most frequent one
} inspect_layer;

EX_FUNC void inspect_must(moe_status s, const char *what) {
    if (s) die("%s: %s", what, moe_status_string(s));
}

// ---- analysis ----

// MaxVio of a batch, in the mean over those with a choice: violation by micro-batch, beside that of the whole.
EX_FUNC double inspect_batches(const moe_game *game) {
    size_t E = game->n_experts, batches = 0;
    double sum = 0;
    for (size_t b = 0; b < game->n_batches; b++) {
        double most = 0, all = 0;
        for (size_t e = 0; e < E; e++) {
            most = fmax(most, (double)game->count[b * E + e]);
            all += (double)game->count[b * E + e];
        }
        if (all > 0) batches++, sum += most * (double)E / all - 1;
    }
    return sum / (double)batches;
}
EX_FUNC void inspect_load_metrics(inspect_layer *r, const dump_layer *d) {
    moe_health h;
    size_t bytes = 0, E = d->experts;
    inspect_must(moe_health_size(E, &bytes), "health");
    void *memory = allocate(1, bytes);
    inspect_must(moe_health_init(&h, E, memory, bytes), "health");
    for (size_t i = 0; i < d->game->n_batches * E; i++) {
        h.load[i % E] += d->game->count[i];
        h.top1[i % E] += d->first[i];
        h.n_selected += d->game->count[i];
    }
    inspect_must(moe_health_update(&h), "health");
    r->maxvio_batch = inspect_batches(d->game);
    r->load = allocate(E, sizeof *r->load);
    for (size_t e = 0; e < E && h.n_selected; e++) r->load[e] = (double)h.load[e] / (double)h.n_selected;
    r->selected = (double)h.n_selected, r->batches = d->game->n_batches;
    r->maxvio = h.maxvio, r->cv = h.load_cv, r->gini = h.gini;
    r->effective = h.effective_experts, r->entropy = h.n_selected ? log(h.effective_experts) : 0;
    r->dead = dead_take(&h);
    if (h.n_selected) inspect_must(moe_game_feasible(E, d->top_k, r->load, &r->feasible), "feasible");
    if (d->labels) {
        uint64_t *right = allocate(2 * E, sizeof *right), *seen = right + E, hits = 0, tokens = 0;
        moe_ecology_kind *kind = allocate(E, sizeof *kind);
        size_t cells = E * d->n_labels;
        for (size_t w = 1; w < moe_workers(d->parallel); w++)
            for (size_t i = 0; i < cells; i++) d->labelled[i] += d->labelled[w * cells + i];
        inspect_must(moe_label_majority(E, d->n_labels, d->labelled, right), "labels");
        for (size_t i = 0; i < cells; i++) seen[i / d->n_labels] += d->labelled[i];
        inspect_must(moe_ecology_classes(E, seen, right, kind),
                     "ecology"); // a token without a label says nothing of purity
        for (size_t e = 0; e < E; e++) r->ecology[kind[e]]++, hits += right[e], tokens += seen[e];
        r->n_labels = d->n_labels;
        r->labels = allocate(cells, sizeof *r->labels);
        memcpy(r->labels, d->labelled, cells * sizeof *r->labels);
        r->purity = tokens ? (double)hits / (double)tokens : 0;
        free(right), free(kind);
    }
    free(memory);
}

// The sample's tokens of half 0 make the types; their load is fitted to half 0's, and compared with half 1's.
EX_FUNC void inspect_type_errors(const inspect_config *o, inspect_layer *r, const dump_layer *d) {
    size_t E = d->experts, count = 0, n = 0, C = o->types;
    uint8_t *half = allocate(d->game->n_batches, 1);
    float *z = allocate(d->n_sample * E, sizeof *z);
    uint32_t *type = allocate(d->n_sample, sizeof *type);
    inspect_must(moe_game_types_scratch(E, C, &count), "types");
    if (count < d->n_sample + E) count = d->n_sample + E;
    double *work = allocate(count, sizeof *work), *share = allocate(C, sizeof *share), l1 = 0;
    double *quality = allocate(C * E, sizeof *quality), *load = allocate(4 * E, sizeof *load), *truth = load + E;
    moe_game_types_fit fit;
    inspect_must(moe_game_split(d->game, o->seed, half), "halves");
    inspect_must(moe_game_pool(d->game, half, 0, load + 2 * E, load, NULL), "halves");
    inspect_must(moe_game_pool(d->game, half, 1, load + 3 * E, truth, NULL), "halves");
    for (size_t s = 0; s < d->n_sample; s++)
        if (!half[d->sample_batch[s]] && dump_is_token(d, d->sample_index + s * d->top_k))
            memcpy(z + n++ * E, d->sample + s * E, E * sizeof *z);
    if (n) {
        inspect_must(moe_game_cluster(n, E, C, o->seed, z, type, share, quality, work), "types");
        inspect_must(moe_game_types_estimate(E, C, share, quality, load, work, &fit), "types");
        inspect_must(moe_game_types_solve(E, C, share, quality, fit.gamma, load, work, NULL), "types");
        for (size_t e = 0; e < E; e++) l1 += fabs(load[e] - truth[e]);
        r->l1_coupled = l1, l1 = 0;
        inspect_must(moe_game_types_softmax(E, C, share, quality, fit.temperature, load, work), "types");
        for (size_t e = 0; e < E; e++) l1 += fabs(load[e] - truth[e]);
        r->l1_independent = l1;
    }
    free(half), free(z), free(type), free(work), free(share), free(quality), free(load);
}

EX_FUNC void inspect_quality_agreement(inspect_layer *r, const dump_layer *d) {
    size_t E = d->experts, S = d->n_sample, most = S > E ? S : E;
    double *work = allocate(most > 2 * E ? most : 2 * E, sizeof *work), *q = allocate(2 * E, sizeof *q);
    for (int kind = 0; kind < MOE_QUALITY_COUNT; kind++) {
        double *mine = kind ? q + E : q;
        moe_game_fit fit;
        moe_status s = moe_game_quality((moe_quality_kind)kind, S, E, d->top_k, d->sample, d->sample_index, work, mine);
        r->agreement[kind] = r->gamma_by[kind] = NAN;
        if (s == MOE_E_NO_TOKENS) continue; // in the sample
        inspect_must(s, "quality");
        inspect_must(moe_pearson(E, q, mine, &r->agreement[kind]), "quality");
        r->gamma_by[kind] = NAN; // an expert that nobody selects has no quality by that estimator
        if (!moe_game_estimate(E, mine, r->load, 0, work, &fit)) r->gamma_by[kind] = fit.gamma;
    }
    free(work), free(q);
}

EX_FUNC void inspect_game_metrics(const inspect_config *o, inspect_layer *r, const dump_layer *d) {
    size_t E = d->experts;
    double *quality = allocate(4 * E, sizeof *quality), *load = quality + E, selections;
    moe_game_fit fit, held;
    r->gamma = r->lo = r->hi = r->gamma_ols = r->temperature = r->l1_game = r->l1_softmax = r->l1_uniform = NAN;
    r->l1_coupled = r->l1_independent = r->epsilon = r->peak_load = r->peak_softmax = NAN;
    r->null = (moe_game_null){NAN, NAN, NAN, NAN};
    r->has_logits = d->logits != NULL;
    r->masked = dump_masked(d);
    r->probabilities = !d->probabilities && dump_are_probabilities(d);
    if (d->logits && !r->masked && !moe_game_pool(d->game, NULL, 0, quality, load, &selections)) {
        inspect_must(moe_game_estimate(E, quality, load, selections, quality + 2 * E, &fit), "gamma");
        r->identified = fit.identified;
        r->gamma = fit.gamma, r->gamma_ols = fit.gamma_ols, r->temperature = fit.temperature;
        r->peak_load = fit.peak_load, r->peak_softmax = fit.peak_softmax;
        inspect_must(moe_game_excess(d->game, 0, o->seed, NULL, NULL, NULL, &r->null), "null");
        if (d->game->n_batches > 1 && o->bootstrap) {
            r->replicate = allocate(o->bootstrap, sizeof *r->replicate);
            inspect_must(moe_game_bootstrap(d->game, o->bootstrap, o->seed, &o->parallel, r->replicate, &r->lo, &r->hi),
                         "bootstrap");
            inspect_must(
                moe_game_excess(d->game, o->bootstrap, o->seed, &o->parallel, r->replicate, r->replicate, &r->null),
                "null");
            if (!r->identified) r->lo = r->hi = NAN;
        }
        if (d->game->n_batches > 1 && !moe_game_holdout(d->game, o->seed, &held)) {
            r->l1_game = held.l1_game, r->l1_softmax = held.l1_softmax, r->l1_uniform = held.l1_uniform;
            inspect_type_errors(o, r, d);
        }
        inspect_quality_agreement(r, d);
    }
    free(quality);
}

// The sample's choices stay with the layer; what they say of labels.
EX_FUNC void inspect_keep_choices(const inspect_config *o, inspect_layer *r, const dump_layer *d) {
    size_t S = r->n_sample = d->n_sample;
    r->choice = allocate(S * d->top_k, sizeof *r->choice);
    r->batch = allocate(S, sizeof *r->batch);
    memcpy(r->choice, d->sample_index, S * d->top_k * sizeof *r->choice);
    memcpy(r->batch, d->sample_batch, S * sizeof *r->batch);
    if (d->labels)
        r->domain =
            relation_inform(S, r->choice, d->top_k, d->sample_label, 1, r->batch, r->batches, o->bootstrap, o->seed);
}

// How much the choice at the layer before decides the value of this one: needs the same tokens of both.
EX_FUNC double inspect_epsilon_of(const dump_layer *before, const dump_layer *now, const inspect_layer *r) {
    double epsilon, *work = allocate(2 * before->experts, sizeof *work);
    moe_status s =
        moe_game_epsilon(before->n_sample, before->experts, before->top_k, before->sample_index, now->experts,
                         now->sample, r->load, r->identified ? r->gamma : 0, 10, work, &epsilon);
    free(work);
    return s ? NAN : epsilon;
}

// ---- reading ----

typedef struct inspect_table {
    inspect_layer *row;
    size_t n;
} inspect_table;

typedef struct inspect_ticker {
    progress p;
    size_t before;
} inspect_ticker;

EX_FUNC void inspect_tick(void *user, size_t done) {
    inspect_ticker *t = user;
    progress_update(&t->p, t->before + done, "%s", "");
}

EX_FUNC dump_layer *inspect_layer_memory(const inspect_config *o, const dump_layer *like) {
    dump_layer *d = allocate(1, sizeof *d);
    *d = *like;
    size_t T = dump_tokens(d), B = o->batches < T ? o->batches : T, bytes = 0;
    d->game = allocate(1, sizeof *d->game);
    d->null = d->logits != NULL;
    inspect_must(moe_game_size(d->experts, B, &bytes), "game");
    inspect_must(moe_game_init(d->game, d->experts, B, allocate(1, bytes), bytes), "game");
    d->first = allocate(B * d->experts, sizeof *d->first);
    if (d->labels) d->labelled = allocate(moe_workers(d->parallel) * d->experts * d->n_labels, sizeof *d->labelled);
    d->n_sample = T < INSPECT_SAMPLE ? T : INSPECT_SAMPLE;
    d->sample = allocate(d->n_sample * d->experts, sizeof *d->sample);
    d->sample_index = allocate(d->n_sample * d->top_k, sizeof *d->sample_index);
    d->sample_batch = allocate(d->n_sample, sizeof *d->sample_batch);
    if (d->labels) d->sample_label = allocate(d->n_sample, sizeof *d->sample_label);
    return d;
}

EX_FUNC void inspect_layer_reset(dump_layer *d) {
    inspect_must(moe_game_reset(d->game), "game");
    memset(d->first, 0, d->game->n_batches * d->experts * sizeof *d->first);
    if (d->labels) memset(d->labelled, 0, moe_workers(d->parallel) * d->experts * d->n_labels * sizeof *d->labelled);
}

// All layers of one dump; two lie in memory at a time. weights: a router for each layer, or NULL; so biases.
EX_FUNC void inspect_layers(const inspect_config *o, const dump_layer *like, size_t layers, const float *const *weights,
                            const float *const *biases, const size_t *number, inspect_table *t,
                            inspect_ticker *tick_at) {
    dump_layer *memory[2] = {inspect_layer_memory(o, like), inspect_layer_memory(o, like)};
    for (size_t i = 0; i < layers; i++) {
        dump_layer *d = memory[i % 2];
        inspect_layer r = {.path = like->logits ? like->logits->path : like->indices->path,
                           .layer = number ? number[i] : i};
        inspect_layer_reset(d);
        d->layer = i;
        d->router = weights ? weights[i] : NULL;
        d->bias = biases && !like->indices ? biases[i] : NULL; // indices that are given are the choices
        d->indices = d->bias ? like->logits : like->indices;
        dump_read(d, inspect_tick, tick_at);
        tick_at->before += dump_tokens(d);
        if (d->logits && !d->indices)
            inspect_must(moe_topk(d->n_sample, d->experts, d->top_k, d->sample, d->sample_index, NULL), "top-k");
        r.experts = d->experts, r.top_k = d->top_k;
        for (size_t b = 0; b < d->game->n_batches; b++) r.tokens += d->game->tokens[b];
        if (!r.tokens) dump_fail(d->indices->path, 0, "layer %zu: %s", r.layer, moe_status_string(MOE_E_NO_TOKENS));
        inspect_load_metrics(&r, d);
        inspect_game_metrics(o, &r, d);
        inspect_keep_choices(o, &r, d);
        if (i && d->logits && !r.masked && !t->row[t->n - 1].masked)
            t->row[t->n - 1].epsilon = inspect_epsilon_of(memory[(i - 1) % 2], d, &r);
        if (i + 1 == layers && d->logits && !r.masked) r.epsilon = 0; // the last layer's, by definition
        t->row = realloc(t->row, (t->n + 1) * sizeof r);
        if (!t->row) die("out of memory");
        t->row[t->n++] = r;
    }
    for (int i = 0; i < 2; i++) {
        dump_layer *d = memory[i]; // the game's own block is small, and stays until the end
        free(d->first), free(d->labelled), free(d->sample), free(d->sample_index), free(d->sample_batch), free(d->game);
        free(d->sample_label), free(d);
    }
}

EX_FUNC dump_file inspect_open_floats(const inspect_config *o, const char *path) {
    dump_file d = dump_open(path);
    if (dump_is_index(&d)) dump_fail(path, 0, "%s: logits or hidden states are expected", moe_dtype_name(d.npy.dtype));
    if (d.npy.dtype == MOE_DTYPE_U16 && !o->bf16) dump_fail(path, 0, "uint16: if this is bfloat16, say --bf16");
    if (d.npy.n_dims < 2) dump_fail(path, 0, "one dimension: (tokens, experts) is expected");
    return d;
}

// Routers of a safetensors file or of a model.safetensors.index.json beside its files.
typedef struct inspect_routers {
    size_t n, experts, width, *number;
    float **weight, **bias; // a layer without a bias: NULL
} inspect_routers;

// Of the last router, if the file has it.
EX_FUNC void inspect_add_bias(inspect_routers *r, const char *path, const moe_file *f) {
    float *bias = allocate(r->experts, sizeof *bias);
    moe_status s = moe_file_router_bias(f, r->number[r->n - 1], r->experts, bias);
    if (s && s != MOE_E_NAME)
        dump_fail(path, 0, "layer %zu's e_score_correction_bias: %s", r->number[r->n - 1], moe_status_string(s));
    if (s)
        free(bias);
    else
        r->bias[r->n - 1] = bias;
}

EX_FUNC void inspect_add_router(inspect_routers *r, const char *path, const moe_file *f, size_t number,
                                const moe_file_tensor *t) {
    uint64_t at = (uint64_t)(t->data - f->bytes);
    moe_dtype_kind type = moe_dtype_of(t->dtype);
    if (t->n_dims != 2 || !t->bytes) dump_fail(path, at, "layer %zu's router is not (experts, width)", number);
    if (r->n && (t->dim[0] != r->experts || t->dim[1] != r->width))
        dump_fail(path, at, "layer %zu's router has another shape than the first one", number);
    r->experts = t->dim[0], r->width = t->dim[1];
    r->weight = realloc(r->weight, (r->n + 1) * sizeof *r->weight);
    r->number = realloc(r->number, (r->n + 1) * sizeof *r->number);
    r->bias = realloc(r->bias, (r->n + 1) * sizeof *r->bias);
    if (!r->weight || !r->number || !r->bias) die("out of memory");
    float *w = r->weight[r->n] = allocate(r->experts * r->width, sizeof *w);
    moe_status s = moe_to_float(type, r->experts * r->width, t->data, w);
    if (s) dump_fail(path, at, "layer %zu's router is %s: %s", number, t->dtype, moe_status_string(s));
    for (size_t i = 0; i < r->experts * r->width; i++)
        if (w[i] - w[i] != 0)
            dump_fail(path, at + i * moe_dtype_size(type), "layer %zu's router: NaN or infinite", number);
    r->bias[r->n] = NULL;
    r->number[r->n++] = number;
    inspect_add_bias(r, path, f);
}

EX_FUNC const void *inspect_view(const char *path, size_t *size) {
    const void *p = file_view(path, size);
    if (!p && errno == EISDIR)
        dump_fail(path, 0, "a folder: give its .safetensors file, or the model.safetensors.index.json in it");
    if (!p) dump_fail(path, 0, "cannot be read: %s", strerror(errno));
    return p;
}

EX_FUNC inspect_routers inspect_open_routers(const char *path) {
    inspect_routers r = {0};
    moe_file f;
    moe_file_tensor t;
    moe_shards index;
    size_t size, length = strlen(path), number = 0;
    const void *bytes = inspect_view(path, &size);
    moe_status s;
    if (length > 5 && strcmp(path + length - 5, ".json") == 0) {
        char name[256], bias[256], file[256], full[1200], opened[1200] = "", *slash;
        s = moe_shards_open(&index, bytes, size);
        if (s) dump_fail(path, index.offset, "%s", moe_status_string(s));
        for (size_t i = 0; !(s = moe_shards_router(&index, i, &number, name, sizeof name)); i++) {
            if ((s = moe_shards_find(&index, name, file, sizeof file)) != 0) break;
            snprintf(full, sizeof full - sizeof file - 1, "%s", path);
            slash = strrchr(full, '/');
            strcpy(slash ? slash + 1 : full, file);
            if (strcmp(full, opened)) {
                if (*opened) moe_file_close(&f);
                bytes = inspect_view(strcpy(opened, full), &size);
                s = moe_file_open(&f, bytes, size);
                if (s) dump_fail(full, f.offset, "%s", moe_status_string(s));
            }
            s = moe_file_find(&f, name, &t);
            if (s && s != MOE_E_FILE_DTYPE) dump_fail(full, 0, "no %s in it, against %s", name, path);
            inspect_add_router(&r, strcpy(allocate(strlen(full) + 1, 1), full), &f, number, &t);
            if (r.bias[r.n - 1] || moe_router_bias_name(name, bias, sizeof bias)) continue;
            if (moe_shards_find(&index, bias, file, sizeof file)) continue; // else it is in another shard
            strcpy((slash = strrchr(full, '/')) ? slash + 1 : full, file);
            moe_file other;
            bytes = inspect_view(full, &size);
            s = moe_file_open(&other, bytes, size);
            if (s) dump_fail(full, other.offset, "%s", moe_status_string(s));
            inspect_add_bias(&r, full, &other);
            moe_file_close(&other);
            if (!r.bias[r.n - 1]) dump_fail(full, 0, "no %s in it, against %s", bias, path);
        }
        if (*opened) moe_file_close(&f);
        moe_shards_close(&index);
    } else {
        s = moe_file_open(&f, bytes, size);
        if (s) dump_fail(path, f.offset, "%s", moe_status_string(s));
        for (size_t i = 0; (s = moe_file_router(&f, i, &number, &t)) == MOE_OK || s == MOE_E_FILE_DTYPE; i++)
            inspect_add_router(&r, path, &f, number, &t);
        moe_file_close(&f);
    }
    if (s != MOE_E_NAME) dump_fail(path, 0, "%s", moe_status_string(s));
    if (!r.n) dump_fail(path, 0, "no router in it: model.layers.N.mlp.gate.weight or .block_sparse_moe.gate.weight");
    return r;
}

// Which files make one dump, and what of the options they need.
EX_FUNC void inspect_files(const inspect_config *o, const char *logits, const char *indices, const inspect_routers *r,
                           inspect_table *t) {
    dump_file z = {0}, i = {0}, l = {0};
    dump_layer like = {.parallel = &o->parallel, .probabilities = o->probabilities && !r};
    if (logits) z = inspect_open_floats(o, logits), like.logits = &z;
    if (indices) {
        i = dump_open(indices), like.indices = &i;
        if (!dump_can_index(&i)) dump_fail(indices, 0, "%s: indices are integers", moe_dtype_name(i.npy.dtype));
    }
    size_t layers = logits ? z.layers : i.layers;
    like.experts = r ? r->experts : logits ? z.width : o->experts ? o->experts : dump_largest(&i);
    if (!like.experts) dump_fail(indices, 0, "%s", moe_status_string(MOE_E_NO_TOKENS));
    like.top_k = indices ? i.width : o->top_k;
    if (!like.top_k)
        args_fail("inspect", "%s: say --top-k N, the experts that a token gets: 2 in Mixtral, 8 in OLMoE", logits);
    if (r && z.width != r->width)
        dump_fail(logits, 0, "hidden states of width %zu, but the routers take %zu", z.width, r->width);
    if (r && layers != 1 && layers != r->n) dump_fail(logits, 0, "%zu layers, but %zu routers", layers, r->n);
    if (r) layers = r->n;
    if (logits && indices && (z.tokens != i.tokens || z.layers != i.layers))
        dump_fail(indices, 0, "%zu layers of %zu tokens; %s has %zu of %zu", i.layers, i.tokens, logits, z.layers,
                  z.tokens);
    if (!like.experts || like.experts > (size_t)1 << 20)
        dump_fail(logits ? logits : indices, 0, "%zu experts", like.experts);
    if (like.top_k > like.experts)
        dump_fail(indices ? indices : logits, 0, "top-%zu of %zu experts", like.top_k, like.experts);
    if (o->labels) {
        l = dump_open(o->labels), like.labels = &l;
        if (!dump_can_index(&l) || l.layers != 1 || l.width != 1 || l.tokens != dump_tokens(&like))
            dump_fail(o->labels, 0, "labels are %zu integers: one for each token", dump_tokens(&like));
        like.n_labels = dump_largest(&l);
        if (like.n_labels > INSPECT_LABELS)
            dump_fail(o->labels, 0, "%zu labels: at most %d", like.n_labels, INSPECT_LABELS);
    }
    inspect_ticker at = {progress_begin(logits ? logits : indices, "tokens", layers * dump_tokens(&like), o->quiet), 0};
    inspect_layers(o, &like, layers, r ? (const float *const *)r->weight : NULL,
                   r ? (const float *const *)r->bias : NULL, r ? r->number : NULL, t, &at);
    progress_clear(&at.p);
}

// ---- a series of checkpoints ----

typedef struct inspect_series {
    size_t n;
    double *step, *gamma, *excess, *lo, *hi; // lo, hi: of the excess
    moe_phase_kind *phase;
} inspect_series;

// gamma of a checkpoint is the mean over its layers that tell it; so is its excess over the null, and each replicate of
// that, which gives the interval. Phases are those of the excess: logits that only grow have none.
EX_FUNC inspect_series inspect_make_series(const inspect_config *o, const inspect_table *t, const size_t *end) {
    inspect_series s = {.n = o->n_files};
    double **number[] = {&s.step, &s.gamma, &s.excess, &s.lo, &s.hi};
    for (int i = 0; i < 5; i++) *number[i] = allocate(s.n, sizeof(double));
    s.phase = allocate(s.n, sizeof *s.phase);
    double *mean = allocate(o->bootstrap, sizeof *mean), *work = allocate(s.n, sizeof *work);
    const char *text = o->steps_at;
    for (size_t c = 0, i = 0; c < s.n; c++) {
        size_t layers = 0, told = 0;
        char *rest = NULL;
        s.step[c] = text ? strtod(text, &rest) : (double)(c + 1);
        if (text && (rest == text || (*rest && *rest != ',') || (*rest == 0) != (c + 1 == s.n)))
            args_fail("inspect", "--steps-at: %zu numbers with commas between them are expected", s.n);
        if (text) text = rest + 1;
        if (!isfinite(s.step[c]) || (c && !(s.step[c] > s.step[c - 1])))
            args_fail("inspect", "--steps-at: must ascend");
        memset(mean, 0, o->bootstrap * sizeof *mean);
        for (; i < end[c]; i++) {
            if (!t->row[i].identified || !t->row[i].replicate) continue;
            told++;
            s.gamma[c] += t->row[i].gamma;
            if (!isfinite(t->row[i].null.gamma_excess)) continue;
            layers++;
            s.excess[c] += t->row[i].null.gamma_excess;
            for (size_t k = 0; k < o->bootstrap; k++) mean[k] += t->row[i].replicate[k];
        }
        for (size_t k = 0; k < o->bootstrap; k++) mean[k] /= (double)layers;
        s.gamma[c] = told ? s.gamma[c] / (double)told : NAN;
        s.excess[c] = layers ? s.excess[c] / (double)layers : NAN;
        s.lo[c] = s.hi[c] = NAN;
        if (layers) inspect_must(moe_interval(o->bootstrap, mean, &s.lo[c], &s.hi[c]), "interval");
    }
    if (moe_game_phases(s.n, s.step, s.excess, s.lo, s.hi, work, s.phase)) // a checkpoint does not tell it
        for (size_t c = 0; c < s.n; c++) s.phase[c] = MOE_PHASE_NONE;
    free(mean), free(work);
    return s;
}

#endif
