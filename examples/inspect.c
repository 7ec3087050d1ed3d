// inspect.c - how does a model route? Looks at router logits, at top-k indices, or at router weights and hidden states.
//
//     build/inspect                                    three routers that the repository carries
//     build/inspect --top-k 8 logits.npy               (tokens, experts) or (layers, tokens, experts)
//     build/inspect --logits z.npy --indices i.npy     the load is that of the indices
//     build/inspect --router model.safetensors --top-k 8 hidden.npy
//     build/inspect --explain                          the same in words: what is wrong, and which knob to turn
//     build/inspect --series --steps-at 1000,2000,4000 a.npy b.npy c.npy
//
// For each layer: the load and its metrics, and gamma_eff of the congestion game with its interval. docs/inspect.md
// says what every column means and how to get the files from a model; docs/gamma.md has the mathematics.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/dead.h"
#include "common/dump.h"
#include "common/json.h"
#include "common/plot.h"
#include "common/progress.h"
#include "common/reading.h"
#include "common/relations.h"

#include <math.h>

enum { SAMPLE = 4096, MAX_LABELS = 4096, MAX_RELATED = 4096 };

typedef struct config {
    const char *logits, *indices, *labels, *router, *steps_at, *compare, *out;
    size_t top_k, experts, batches, bootstrap, types, threads;
    uint64_t seed;
    int series, bf16, probabilities, explain, relations, csv, json, html, quiet;
    const char **file;
    size_t n_files;
    moe_parallel parallel;
} config;

// What is known of one layer.
typedef struct layer {
    const char *path;
    size_t layer, tokens, experts, top_k;
    double *load; // (experts): shares
    double maxvio, cv, gini, entropy, effective, selected;
    size_t batches;
    dead_note dead;
    int has_logits, identified, feasible, probabilities;
    size_t masked;       // experts without a mean logit
    size_t n_labels;
    uint64_t *labels;    // (experts, n_labels): first choices by label
    double gamma, lo, hi, gamma_ols, temperature;
    moe_game_null null;
    double l1_game, l1_softmax, l1_uniform, l1_coupled, l1_independent; // held out
    double peak_load, peak_softmax, epsilon;                            // epsilon: NaN until the next layer is known
    double agreement[MOE_QUALITY_COUNT];                               // of the quality estimators with the mean logit
    double gamma_by[MOE_QUALITY_COUNT];
    double *replicate; // (bootstrap): gamma less the null's
    size_t ecology[MOE_ECOLOGY_COUNT];
    size_t n_sample;
    int32_t *choice;  // (n_sample, top_k): of an even sample of rows, the same in every layer and dump of as many
    uint32_t *batch;  // (n_sample)
    relation_information domain; // first choice and label, of that sample
    double purity; // share of the labelled tokens whose label is their expert's most frequent one
} layer;

static void must(moe_status s, const char *what) {
    if (s) die("%s: %s", what, moe_status_string(s));
}

// ---- analysis ----

static void load_metrics(layer *r, const dump_layer *d) {
    moe_health h;
    size_t bytes = 0, E = d->experts;
    must(moe_health_size(E, &bytes), "health");
    void *memory = allocate(1, bytes);
    must(moe_health_init(&h, E, memory, bytes), "health");
    for (size_t i = 0; i < d->game->n_batches * E; i++) {
        h.load[i % E] += d->game->count[i];
        h.top1[i % E] += d->first[i];
        h.n_selected += d->game->count[i];
    }
    must(moe_health_update(&h), "health");
    r->load = allocate(E, sizeof *r->load);
    for (size_t e = 0; e < E && h.n_selected; e++) r->load[e] = (double)h.load[e] / (double)h.n_selected;
    r->selected = (double)h.n_selected, r->batches = d->game->n_batches;
    r->maxvio = h.maxvio, r->cv = h.load_cv, r->gini = h.gini;
    r->effective = h.effective_experts, r->entropy = h.n_selected ? log(h.effective_experts) : 0;
    r->dead = dead_take(&h);
    if (h.n_selected) must(moe_game_feasible(E, d->top_k, r->load, &r->feasible), "feasible");
    if (d->labels) {
        uint64_t *right = allocate(2 * E, sizeof *right), *seen = right + E, hits = 0, tokens = 0;
        moe_ecology_kind *kind = allocate(E, sizeof *kind);
        size_t cells = E * d->n_labels;
        for (size_t w = 1; w < moe_workers(d->parallel); w++)
            for (size_t i = 0; i < cells; i++) d->labelled[i] += d->labelled[w * cells + i];
        must(moe_label_majority(E, d->n_labels, d->labelled, right), "labels");
        for (size_t i = 0; i < cells; i++) seen[i / d->n_labels] += d->labelled[i];
        must(moe_ecology_classes(E, seen, right, kind), "ecology"); // a token without a label says nothing of purity
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
static void type_errors(const config *o, layer *r, const dump_layer *d) {
    size_t E = d->experts, count = 0, n = 0, C = o->types;
    uint8_t *half = allocate(d->game->n_batches, 1);
    float *z = allocate(d->n_sample * E, sizeof *z);
    uint32_t *type = allocate(d->n_sample, sizeof *type);
    must(moe_game_types_scratch(E, C, &count), "types");
    if (count < d->n_sample + E) count = d->n_sample + E;
    double *work = allocate(count, sizeof *work), *share = allocate(C, sizeof *share), l1 = 0;
    double *quality = allocate(C * E, sizeof *quality), *load = allocate(4 * E, sizeof *load), *truth = load + E;
    moe_game_types_fit fit;
    must(moe_game_split(d->game, o->seed, half), "halves");
    must(moe_game_pool(d->game, half, 0, load + 2 * E, load, NULL), "halves");
    must(moe_game_pool(d->game, half, 1, load + 3 * E, truth, NULL), "halves");
    for (size_t s = 0; s < d->n_sample; s++)
        if (!half[d->sample_batch[s]] && dump_is_token(d, d->sample_index + s * d->top_k))
            memcpy(z + n++ * E, d->sample + s * E, E * sizeof *z);
    if (n) {
        must(moe_game_cluster(n, E, C, o->seed, z, type, share, quality, work), "types");
        must(moe_game_types_estimate(E, C, share, quality, load, work, &fit), "types");
        must(moe_game_types_solve(E, C, share, quality, fit.gamma, load, work, NULL), "types");
        for (size_t e = 0; e < E; e++) l1 += fabs(load[e] - truth[e]);
        r->l1_coupled = l1, l1 = 0;
        must(moe_game_types_softmax(E, C, share, quality, fit.temperature, load, work), "types");
        for (size_t e = 0; e < E; e++) l1 += fabs(load[e] - truth[e]);
        r->l1_independent = l1;
    }
    free(half), free(z), free(type), free(work), free(share), free(quality), free(load);
}

static void quality_agreement(layer *r, const dump_layer *d) {
    size_t E = d->experts, S = d->n_sample, most = S > E ? S : E;
    double *work = allocate(most > 2 * E ? most : 2 * E, sizeof *work), *q = allocate(2 * E, sizeof *q);
    for (int kind = 0; kind < MOE_QUALITY_COUNT; kind++) {
        double *mine = kind ? q + E : q;
        moe_game_fit fit;
        moe_status s = moe_game_quality((moe_quality_kind)kind, S, E, d->top_k, d->sample, d->sample_index, work, mine);
        r->agreement[kind] = r->gamma_by[kind] = NAN;
        if (s == MOE_E_NO_TOKENS) continue; // in the sample
        must(s, "quality");
        must(moe_pearson(E, q, mine, &r->agreement[kind]), "quality");
        r->gamma_by[kind] = NAN; // an expert that nobody selects has no quality by that estimator
        if (!moe_game_estimate(E, mine, r->load, 0, work, &fit)) r->gamma_by[kind] = fit.gamma;
    }
    free(work), free(q);
}

static void game_metrics(const config *o, layer *r, const dump_layer *d) {
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
        must(moe_game_estimate(E, quality, load, selections, quality + 2 * E, &fit), "gamma");
        r->identified = fit.identified;
        r->gamma = fit.gamma, r->gamma_ols = fit.gamma_ols, r->temperature = fit.temperature;
        r->peak_load = fit.peak_load, r->peak_softmax = fit.peak_softmax;
        must(moe_game_excess(d->game, 0, o->seed, NULL, NULL, NULL, &r->null), "null");
        if (d->game->n_batches > 1 && o->bootstrap) {
            r->replicate = allocate(o->bootstrap, sizeof *r->replicate);
            must(moe_game_bootstrap(d->game, o->bootstrap, o->seed, &o->parallel, r->replicate, &r->lo, &r->hi),
                 "bootstrap");
            must(moe_game_excess(d->game, o->bootstrap, o->seed, &o->parallel, r->replicate, r->replicate, &r->null),
                 "null");
            if (!r->identified) r->lo = r->hi = NAN;
        }
        if (d->game->n_batches > 1 && !moe_game_holdout(d->game, o->seed, &held)) {
            r->l1_game = held.l1_game, r->l1_softmax = held.l1_softmax, r->l1_uniform = held.l1_uniform;
            type_errors(o, r, d);
        }
        quality_agreement(r, d);
    }
    free(quality);
}

// The sample's choices stay with the layer; what they say of labels.
static void keep_choices(const config *o, layer *r, const dump_layer *d) {
    size_t S = r->n_sample = d->n_sample;
    r->choice = allocate(S * d->top_k, sizeof *r->choice);
    r->batch = allocate(S, sizeof *r->batch);
    memcpy(r->choice, d->sample_index, S * d->top_k * sizeof *r->choice);
    memcpy(r->batch, d->sample_batch, S * sizeof *r->batch);
    if (d->labels)
        r->domain = relation_inform(S, r->choice, d->top_k, d->sample_label, 1, r->batch, r->batches, o->bootstrap,
                                    o->seed);
}

// How much the choice at the layer before decides the value of this one: needs the same tokens of both.
static double epsilon_of(const dump_layer *before, const dump_layer *now, const layer *r) {
    double epsilon, *work = allocate(2 * before->experts, sizeof *work);
    moe_status s =
        moe_game_epsilon(before->n_sample, before->experts, before->top_k, before->sample_index, now->experts,
                         now->sample, r->load, r->identified ? r->gamma : 0, 10, work, &epsilon);
    free(work);
    return s ? NAN : epsilon;
}

// ---- reading ----

typedef struct table {
    layer *row;
    size_t n;
} table;

typedef struct ticker {
    progress p;
    size_t before;
} ticker;

static void tick(void *user, size_t done) {
    ticker *t = user;
    progress_update(&t->p, t->before + done, "%s", "");
}

static dump_layer *layer_memory(const config *o, const dump_layer *like) {
    dump_layer *d = allocate(1, sizeof *d);
    *d = *like;
    size_t T = dump_tokens(d), B = o->batches < T ? o->batches : T, bytes = 0;
    d->game = allocate(1, sizeof *d->game);
    d->null = d->logits != NULL;
    must(moe_game_size(d->experts, B, &bytes), "game");
    must(moe_game_init(d->game, d->experts, B, allocate(1, bytes), bytes), "game");
    d->first = allocate(B * d->experts, sizeof *d->first);
    if (d->labels) d->labelled = allocate(moe_workers(d->parallel) * d->experts * d->n_labels, sizeof *d->labelled);
    d->n_sample = T < SAMPLE ? T : SAMPLE;
    d->sample = allocate(d->n_sample * d->experts, sizeof *d->sample);
    d->sample_index = allocate(d->n_sample * d->top_k, sizeof *d->sample_index);
    d->sample_batch = allocate(d->n_sample, sizeof *d->sample_batch);
    if (d->labels) d->sample_label = allocate(d->n_sample, sizeof *d->sample_label);
    return d;
}

static void layer_reset(dump_layer *d) {
    must(moe_game_reset(d->game), "game");
    memset(d->first, 0, d->game->n_batches * d->experts * sizeof *d->first);
    if (d->labels) memset(d->labelled, 0, moe_workers(d->parallel) * d->experts * d->n_labels * sizeof *d->labelled);
}

// All layers of one dump; two lie in memory at a time. weights: a router for each layer, or NULL; so biases.
static void inspect(const config *o, const dump_layer *like, size_t layers, const float *const *weights,
                    const float *const *biases, const size_t *number, table *t, ticker *tick_at) {
    dump_layer *memory[2] = {layer_memory(o, like), layer_memory(o, like)};
    for (size_t i = 0; i < layers; i++) {
        dump_layer *d = memory[i % 2];
        layer r = {.path = like->logits ? like->logits->path : like->indices->path, .layer = number ? number[i] : i};
        layer_reset(d);
        d->layer = i;
        d->router = weights ? weights[i] : NULL;
        d->bias = biases && !like->indices ? biases[i] : NULL; // indices that are given are the choices
        d->indices = d->bias ? like->logits : like->indices;
        dump_read(d, tick, tick_at);
        tick_at->before += dump_tokens(d);
        if (d->logits && !d->indices)
            must(moe_topk(d->n_sample, d->experts, d->top_k, d->sample, d->sample_index, NULL), "top-k");
        r.experts = d->experts, r.top_k = d->top_k;
        for (size_t b = 0; b < d->game->n_batches; b++) r.tokens += d->game->tokens[b];
        if (!r.tokens) dump_fail(d->indices->path, 0, "layer %zu: %s", r.layer, moe_status_string(MOE_E_NO_TOKENS));
        load_metrics(&r, d);
        game_metrics(o, &r, d);
        keep_choices(o, &r, d);
        if (i && d->logits && !r.masked && !t->row[t->n - 1].masked)
            t->row[t->n - 1].epsilon = epsilon_of(memory[(i - 1) % 2], d, &r);
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

static dump_file open_floats(const config *o, const char *path) {
    dump_file d = dump_open(path);
    if (dump_is_index(&d)) dump_fail(path, 0, "%s: logits or hidden states are expected", moe_dtype_name(d.npy.dtype));
    if (d.npy.dtype == MOE_DTYPE_U16 && !o->bf16) dump_fail(path, 0, "uint16: if this is bfloat16, say --bf16");
    if (d.npy.n_dims < 2) dump_fail(path, 0, "one dimension: (tokens, experts) is expected");
    return d;
}

// Routers of a safetensors file or of a model.safetensors.index.json beside its files.
typedef struct routers {
    size_t n, experts, width, *number;
    float **weight, **bias; // a layer without a bias: NULL
} routers;

// Of the last router, if the file has it.
static void add_bias(routers *r, const char *path, const moe_file *f) {
    float *bias = allocate(r->experts, sizeof *bias);
    moe_status s = moe_file_router_bias(f, r->number[r->n - 1], r->experts, bias);
    if (s && s != MOE_E_NAME)
        dump_fail(path, 0, "layer %zu's e_score_correction_bias: %s", r->number[r->n - 1], moe_status_string(s));
    if (s) free(bias);
    else r->bias[r->n - 1] = bias;
}

static void add_router(routers *r, const char *path, const moe_file *f, size_t number, const moe_file_tensor *t) {
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
    add_bias(r, path, f);
}

static const void *view(const char *path, size_t *size) {
    const void *p = file_view(path, size);
    if (!p && errno == EISDIR)
        dump_fail(path, 0, "a folder: give its .safetensors file, or the model.safetensors.index.json in it");
    if (!p) dump_fail(path, 0, "%s", errno ? strerror(errno) : "cannot be read");
    return p;
}

static routers open_routers(const char *path) {
    routers r = {0};
    moe_file f;
    moe_file_tensor t;
    moe_shards index;
    size_t size, length = strlen(path), number = 0;
    const void *bytes = view(path, &size);
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
                bytes = view(strcpy(opened, full), &size);
                s = moe_file_open(&f, bytes, size);
                if (s) dump_fail(full, f.offset, "%s", moe_status_string(s));
            }
            s = moe_file_find(&f, name, &t);
            if (s && s != MOE_E_FILE_DTYPE) dump_fail(full, 0, "no %s in it, against %s", name, path);
            add_router(&r, strcpy(allocate(strlen(full) + 1, 1), full), &f, number, &t);
            if (r.bias[r.n - 1] || moe_router_bias_name(name, bias, sizeof bias)) continue;
            if (moe_shards_find(&index, bias, file, sizeof file)) continue; // else it is in another shard
            strcpy((slash = strrchr(full, '/')) ? slash + 1 : full, file);
            moe_file other;
            bytes = view(full, &size);
            s = moe_file_open(&other, bytes, size);
            if (s) dump_fail(full, other.offset, "%s", moe_status_string(s));
            add_bias(&r, full, &other);
            moe_file_close(&other);
            if (!r.bias[r.n - 1]) dump_fail(full, 0, "no %s in it, against %s", bias, path);
        }
        if (*opened) moe_file_close(&f);
        moe_shards_close(&index);
    } else {
        s = moe_file_open(&f, bytes, size);
        if (s) dump_fail(path, f.offset, "%s", moe_status_string(s));
        for (size_t i = 0; (s = moe_file_router(&f, i, &number, &t)) == MOE_OK || s == MOE_E_FILE_DTYPE; i++)
            add_router(&r, path, &f, number, &t);
        moe_file_close(&f);
    }
    if (s != MOE_E_NAME) dump_fail(path, 0, "%s", moe_status_string(s));
    if (!r.n) dump_fail(path, 0, "no router in it: model.layers.N.mlp.gate.weight or .block_sparse_moe.gate.weight");
    return r;
}

// Which files make one dump, and what of the options they need.
static void inspect_files(const config *o, const char *logits, const char *indices, const routers *r, table *t) {
    dump_file z = {0}, i = {0}, l = {0};
    dump_layer like = {.parallel = &o->parallel, .probabilities = o->probabilities && !r};
    if (logits) z = open_floats(o, logits), like.logits = &z;
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
        if (like.n_labels > MAX_LABELS) dump_fail(o->labels, 0, "%zu labels: at most %d", like.n_labels, MAX_LABELS);
    }
    ticker at = {progress_begin(logits ? logits : indices, "tokens", layers * dump_tokens(&like), o->quiet), 0};
    inspect(o, &like, layers, r ? (const float *const *)r->weight : NULL, r ? (const float *const *)r->bias : NULL,
            r ? r->number : NULL, t, &at);
    progress_clear(&at.p);
}

// ---- a series of checkpoints ----

typedef struct series {
    size_t n;
    double *step, *gamma, *excess, *lo, *hi; // lo, hi: of the excess
    moe_phase_kind *phase;
} series;

// gamma of a checkpoint is the mean over its layers that tell it; so is its excess over the null, and each replicate of
// that, which gives the interval. Phases are those of the excess: logits that only grow have none.
static series make_series(const config *o, const table *t, const size_t *end) {
    series s = {.n = o->n_files};
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
        if (layers) must(moe_interval(o->bootstrap, mean, &s.lo[c], &s.hi[c]), "interval");
    }
    if (moe_game_phases(s.n, s.step, s.excess, s.lo, s.hi, work, s.phase)) // a checkpoint does not tell it
        for (size_t c = 0; c < s.n; c++) s.phase[c] = MOE_PHASE_NONE;
    free(mean), free(work);
    return s;
}

// ---- output ----

// What is known of a layer, for the rules of common/reading.h.
static reading reading_of(const layer *r) {
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
static void explain(FILE *f, json *j, const table *t) {
    char where[80], text[READING_TEXT];
    for (size_t i = 0; i < t->n; i++) {
        reading r = reading_of(&t->row[i]);
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
static void page_explain(FILE *f, const table *t) {
    char text[READING_TEXT];
    page_heading(f, "In words");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "layer|<reading");
    for (size_t i = 0; i < t->n; i++) {
        reading r = reading_of(&t->row[i]);
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
static void top_experts(const layer *r, size_t label, int top[3], double share[3]) {
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
static void top_text(const layer *r, size_t label, char out[80]) {
    int top[3];
    double share[3];
    top_experts(r, label, top, share);
    strcpy(out, top[0] < 0 ? "-" : "");
    for (int k = 0; k < 3 && top[k] >= 0; k++)
        snprintf(out + strlen(out), 80 - strlen(out), "%s%d %.0f%%", k ? ", " : "", top[k], 100 * share[k]);
}

static void write_labels(json *j, const layer *r) {
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
        top_experts(r, c, top, share);
        json_list_begin(j, NULL);
        for (int k = 0; k < 3 && top[k] >= 0; k++) json_whole(j, NULL, (uint64_t)top[k]);
        json_list_end(j);
    }
    json_list_end(j);
}

static void write_layer(json *j, const layer *r) {
    json_begin(j);
    json_whole(j, "layer", r->layer);
    json_whole(j, "tokens", r->tokens);
    json_whole(j, "experts", r->experts);
    json_whole(j, "top_k", r->top_k);
    json_list_begin(j, "load");
    for (size_t e = 0; e < r->experts; e++) json_real(j, NULL, r->load[e]);
    json_list_end(j);
    json_real(j, "maxvio", r->maxvio);
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
    if (r->labels) write_labels(j, r);
    json_raw(j, "feasible", r->feasible ? "true" : "false");
    json_real(j, "k_over_m", (double)r->top_k / (double)r->experts);
    json_end(j);
}

static void write_phases(json *j, const series *s) {
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
static const char *show(char out[16], const char *format, double v) {
    if (isfinite(v))
        snprintf(out, 16, format, v);
    else
        strcpy(out, "-");
    return out;
}

static void interval_text(char out[40], const layer *r, double value, double lo, double hi) {
    if (!r->has_logits)
        strcpy(out, "-");
    else if (!isfinite(value))
        strcpy(out, "unidentified");
    else if (isfinite(lo))
        snprintf(out, 40, "%.2f [%.2f, %.2f]", value, lo, hi);
    else
        snprintf(out, 40, "%.2f", value);
}
static void gamma_text(char out[2][40], const layer *r) { // gamma_eff, and its excess
    interval_text(out[0], r, r->gamma, r->lo, r->hi);
    interval_text(out[1], r, r->null.gamma_excess, r->null.excess_lo, r->null.excess_hi);
}

static void information_text(char out[80], const relation_information *r) {
    if (!isfinite(r->nats)) strcpy(out, "-");
    else if (isfinite(r->lo))
        snprintf(out, 80, "%.4f [%.4f, %.4f], %.1f%%", r->nats, r->lo, r->hi, 100 * r->share);
    else snprintf(out, 80, "%.4f, %.1f%%", r->nats, 100 * r->share);
}
static void print_domains(FILE *f, const table *t) {
    char text[80];
    fprintf(f, "\nMutual information of first choice and label, in nats [95%%]; its share of the labels' entropy\n");
    for (size_t i = 0; i < t->n; i++) {
        information_text(text, &t->row[i].domain);
        fprintf(f, "%5zu  %s\n", t->row[i].layer, text);
    }
}

// The experts of each label, and what else is to be said of a layer.
static void print_labels(FILE *f, const table *t) {
    char text[80];
    fprintf(f, "\nlayer  label  experts that take most of it\n");
    for (size_t i = 0; i < t->n; i++)
        for (size_t c = 0; c < t->row[i].n_labels; c++) {
            top_text(&t->row[i], c, text);
            fprintf(f, "%5zu  %5zu  %s\n", t->row[i].layer, c, text);
        }
}
static void warn(const table *t) {
    size_t masked = 0, probabilities = 0;
    for (size_t i = 0; i < t->n; i++) masked += t->row[i].masked > 0, probabilities += (size_t)t->row[i].probabilities;
    if (masked)
        fprintf(stderr, "inspect: warning: layers with masked experts: %zu; no mean logit, so no gamma_eff\n", masked);
    if (probabilities)
        fprintf(stderr, "inspect: warning: layers of probabilities, not logits (each row sums to 1): %zu; "
                "say --probabilities, or save their log\n", probabilities);
}

// Under the table the dead experts by number.
static void print_dead(FILE *f, const table *t) {
    fprintf(f, "\nDead: under a tenth of an even share of the selections (first: under 1%% of the first choices)\n");
    for (size_t i = 0; i < t->n; i++) {
        const layer *r = &t->row[i];
        if (r->dead.n) fprintf(f, "%5zu ", r->layer);
        for (size_t k = 0; k < r->dead.n; k++) fprintf(f, " %u", (unsigned)r->dead.expert[k]);
        if (r->dead.n) fprintf(f, "\n");
    }
}

static void print_table(FILE *f, const config *o, const table *t) {
    char a[7][16], gamma[2][40];
    const char *path = NULL;
    for (size_t i = 0; i < t->n; i++) {
        const layer *r = &t->row[i];
        if (r->path != path)
            fprintf(f, "%s%s: %zu tokens, %zu experts, top-%zu\n%s\n", path ? "\n" : "", r->path, r->tokens, r->experts,
                    r->top_k,
                    "layer  MaxVio     CV   Gini  effective  dead  (first)  gamma_eff [95%]           OLS      T  "
                    "epsilon");
        path = r->path;
        gamma_text(gamma, r);
        fprintf(f, "%5zu  %6.3f  %5.3f  %5.3f  %9.2f  %4zu  %7zu  %-22s  %6s  %5s  %7s\n", r->layer, r->maxvio, r->cv,
                r->gini, r->effective, r->dead.n, r->dead.first, gamma[0], show(a[0], "%.2f", r->gamma_ols),
                show(a[1], "%.2f", r->temperature), show(a[2], "%.3f", r->epsilon));
    }
    print_dead(f, t);
    if (!t->row[0].has_logits) return;
    fprintf(f, "\nAgainst the noise of the tokens alone (null: each expert's logits shuffled)\n"
               "layer  gamma_eff [95%%]           null  excess [95%%]\n");
    for (size_t i = 0; i < t->n; i++) {
        const layer *r = &t->row[i];
        gamma_text(gamma, r);
        fprintf(f, "%5zu  %-22s  %6s  %s\n", r->layer, gamma[0], show(a[0], "%.2f", r->null.gamma_null), gamma[1]);
    }
    fprintf(f,
            "\nHeld-out L1 of the load (0 to 2): half of the batches predicts the other\n"
            "layer    game  softmax  uniform  types coupled  independent    K/M  feasible  E max m  E max softmax\n");
    for (size_t i = 0; i < t->n; i++) {
        const layer *r = &t->row[i];
        fprintf(f, "%5zu  %6s  %7s  %7s  %13s  %11s  %5.3f  %8s  %7s  %13s\n", r->layer, show(a[0], "%.4f", r->l1_game),
                show(a[1], "%.4f", r->l1_softmax), show(a[2], "%.4f", r->l1_uniform), show(a[3], "%.4f", r->l1_coupled),
                show(a[4], "%.4f", r->l1_independent), (double)r->top_k / (double)r->experts,
                r->feasible ? "yes" : "no", show(a[5], "%.2f", r->peak_load), show(a[6], "%.2f", r->peak_softmax));
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
        must(moe_pearson(t->n, first, other, &r), "agreement");
        fprintf(f, "%-10s  qualities %6s  gamma_eff %6s\n", moe_quality_name((moe_quality_kind)kind),
                show(a[0], "%.3f", n > 0 ? sum / n : NAN), show(a[1], "%.3f", r));
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
        print_domains(f, t);
        print_labels(f, t);
    }
    fprintf(
        f,
        "\ngamma_eff: logits a token gives up for a unit of load share, after arXiv 2604.04230 (docs/gamma.md). It can "
        "also come from\nnoise of the tokens (null; excess: gamma_eff less that) and from differences between tokens "
        "alone, with either sign.%s\n",
        t->row[0].top_k == 1 ? " Top-1 routing is outside that paper's scope." : "");
}

static void print_series(FILE *f, const series *s) {
    fprintf(f, "\nstep          gamma_eff  excess [95%%]               phase\n");
    for (size_t c = 0; c < s->n; c++) {
        const char *phase = moe_phase_name(s->phase[c]);
        fprintf(f, "%-12g  %9.2f  %6.2f [%.2f, %.2f]  %s\n", s->step[c], s->gamma[c], s->excess[c], s->lo[c], s->hi[c],
                phase ? phase : "");
    }
}

// ---- relations of choices ----

// One matrix as a list of lists.
static void write_matrix(json *j, const char *key, size_t rows, size_t cols, const double *value) {
    json_list_begin(j, key);
    for (size_t r = 0; r < rows; r++) {
        json_list_begin(j, NULL);
        for (size_t c = 0; c < cols; c++) json_real(j, NULL, value[r * cols + c]);
        json_list_end(j);
    }
    json_list_end(j);
}

// A map on the page; hi 0: the largest value.
static void draw_map(FILE *page, const char *title, const char *x_label, size_t rows, size_t cols, const double *value,
                     double hi) {
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
typedef struct outputs {
    FILE *human, *page;
    json *lines;
} outputs;

// The pairs of a layer that are chosen together most above what is expected, of those expected at least 5 times.
static void show_together(const outputs *to, const layer *r) {
    size_t E = r->experts, shown = 0, used = E * E;
    uint64_t *count = allocate(used, sizeof *count);
    double *expected = allocate(2 * used, sizeof *expected), *ratio = expected + used;
    char title[80];
    relation_together(r->n_sample, E, r->top_k, r->choice, count, expected, ratio);
    snprintf(title, sizeof title, "Layer %zu: chosen together, observed / expected", r->layer);
    draw_map(to->page, title, "expert", E, E, ratio, 0);
    if (to->lines) {
        json_begin(to->lines);
        json_text(to->lines, "event", "together");
        json_whole(to->lines, "layer", r->layer);
        write_matrix(to->lines, "ratio", E, E, ratio);
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

static void show_transition(const outputs *to, const config *o, const layer *a, const layer *b) {
    char title[96], text[80];
    double *share = allocate(a->experts * b->experts, sizeof *share);
    relation_information x = relation_inform(a->n_sample, a->choice, a->top_k, b->choice, b->top_k, a->batch,
                                             a->batches, o->bootstrap, o->seed);
    relation_transitions(a->n_sample, a->experts, a->top_k, a->choice, b->experts, b->top_k, b->choice, share);
    snprintf(title, sizeof title, "From layer %zu (rows) to layer %zu: share of an expert's tokens", a->layer,
             b->layer);
    draw_map(to->page, title, "expert of the next layer", a->experts, b->experts, share, 1);
    information_text(text, &x);
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
        write_matrix(to->lines, "share", a->experts, b->experts, share);
        json_end(to->lines);
    }
    free(share);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Five numbers of n, those that are not finite left out: least, quartiles (on a straight line between two), most.
static void percentiles(size_t n, double *value, double five[5]) {
    size_t known = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(value[i])) value[known++] = value[i];
    qsort(value, known, sizeof *value, by_value);
    for (int q = 0; q < 5; q++) {
        double at = 0.25 * q * (double)(known - 1);
        size_t low = (size_t)at;
        five[q] = NAN;
        if (known) five[q] = value[low];
        if (known && low + 1 < known) five[q] += (at - (double)low) * (value[low + 1] - value[low]);
    }
}

static void show_percentiles(const outputs *to, const table *t) {
    static const char *const name[] = {"maxvio", "gini", "effective_experts", "dead", "gamma_eff", "gamma_excess"};
    double *value = allocate(t->n, sizeof *value), five[5];
    char a[5][16];
    if (to->human) fprintf(to->human, "\nOver %zu layers          least      25%%   median      75%%     most\n", t->n);
    if (to->lines) json_begin(to->lines), json_text(to->lines, "event", "percentiles");
    for (size_t k = 0; k < sizeof name / sizeof *name; k++) {
        for (size_t i = 0; i < t->n; i++) {
            const layer *r = &t->row[i];
            const double of[] = {r->maxvio, r->gini, r->effective, (double)r->dead.n, r->gamma, r->null.gamma_excess};
            value[i] = of[k];
        }
        percentiles(t->n, value, five);
        for (int q = 0; q < 5; q++) show(a[q], "%.3f", five[q]);
        if (to->human)
            fprintf(to->human, "%-18s  %8s %8s %8s %8s %8s\n", name[k], a[0], a[1], a[2], a[3], a[4]);
        if (!to->lines) continue;
        json_list_begin(to->lines, name[k]);
        for (int q = 0; q < 5; q++) json_real(to->lines, NULL, five[q]);
        json_list_end(to->lines);
    }
    if (to->lines) json_end(to->lines);
    free(value);
}

static void show_relations(const outputs *to, const config *o, const table *t) {
    for (size_t i = 0; i < t->n; i++)
        if (t->row[i].experts > MAX_RELATED)
            args_fail("inspect", "--relations: %zu experts, at most %d", t->row[i].experts, MAX_RELATED);
    show_percentiles(to, t);
    if (to->human && t->row[0].top_k > 1)
        fprintf(to->human, "\nlayer  chosen together most: observed / expected, of pairs expected 5 times or more, on "
                           "a sample\n");
    for (size_t i = 0; i < t->n && t->row[0].top_k > 1; i++) show_together(to, &t->row[i]);
    if (to->human && t->n > 1)
        fprintf(to->human, "\nfrom -> to     mutual information of the first choices, in nats [95%%], and its share of "
                           "the next layer's entropy\n");
    for (size_t i = 1; i < t->n; i++)
        if (t->row[i].path == t->row[i - 1].path) show_transition(to, o, &t->row[i - 1], &t->row[i]);
}

// ---- two dumps ----

// NaN where tokens, experts or top-k are not the same.
static int same_tokens(const layer *a, const layer *b) {
    return a->experts == b->experts && a->top_k == b->top_k && a->tokens == b->tokens && a->n_sample == b->n_sample;
}
static relation_overlap overlap_of(const layer *a, const layer *b) {
    if (!same_tokens(a, b)) return (relation_overlap){0, NAN, NAN, NAN, NAN};
    return relation_overlap_of(a->n_sample, a->experts, a->top_k, a->choice, b->choice);
}

// What is kept, over the layers.
static void draw_kept(FILE *f, const table *a, const table *b, size_t n) {
    enum { LINES = 4 };
    static const char *const name[] = {"first choice", "all choices", "first, by chance", "all, by chance"};
    double *value = allocate(LINES * n, sizeof *value);
    plot_line line[LINES];
    for (size_t i = 0; i < n; i++) {
        relation_overlap x = overlap_of(&a->row[i], &b->row[i]);
        const double of[LINES] = {x.top1, x.topk, x.chance_top1, x.chance_topk};
        for (size_t k = 0; k < LINES; k++) value[k * n + i] = of[k];
    }
    for (size_t k = 0; k < LINES; k++) line[k] = (plot_line){name[k], value + k * n, n, k > 1};
    plot_begin(f, 960, 320, "Choices kept");
    plot_lines(f, &(plot_chart){{0, 0, 960, 320}, "Share of the choices that both dumps have", "layer, from 1", line,
                                LINES, 0, 1});
    plot_end(f);
    free(value);
}

// Of one layer in both: beside each other, and where the tokens are the same, how many of their choices are kept.
static void compare_layer(const outputs *to, const layer *a, const layer *b) {
    relation_overlap x = overlap_of(a, b);
    double moved = a->experts == b->experts ? 0 : NAN, churn = NAN;
    for (size_t e = 0; a->experts == b->experts && e < a->experts; e++) moved += fabs(a->load[e] - b->load[e]) / 2;
    if (same_tokens(a, b) && moe_churn(a->n_sample, a->top_k, a->choice, b->choice, &churn)) churn = NAN;
    if (to->human) {
        char s[8][16];
        fprintf(to->human, "%5zu  %6s (%6s)  %6s (%6s)  %6s  %6s   %6.3f %6.3f  %7.2f %7.2f  %4zu %4zu  %7s %7s\n",
                a->layer, show(s[0], "%.3f", x.top1), show(s[1], "%.3f", x.chance_top1), show(s[2], "%.3f", x.topk),
                show(s[3], "%.3f", x.chance_topk), show(s[4], "%.3f", churn), show(s[5], "%.3f", moved), a->maxvio,
                b->maxvio, a->effective, b->effective, a->dead.n, b->dead.n,
                show(s[6], "%.2f", a->null.gamma_excess), show(s[7], "%.2f", b->null.gamma_excess));
    }
    if (!to->lines) return;
    json *j = to->lines;
    const struct {
        const char *key;
        double value;
    } real[] = {{"top1_overlap", x.top1},          {"top1_chance", x.chance_top1},    {"topk_overlap", x.topk},
                {"topk_chance", x.chance_topk},    {"churn", churn},                  {"load_moved", moved},
                {"maxvio", a->maxvio},             {"other_maxvio", b->maxvio},       {"gini", a->gini},
                {"other_gini", b->gini},           {"effective_experts", a->effective},
                {"other_effective_experts", b->effective}, {"gamma_eff", a->gamma},   {"other_gamma_eff", b->gamma},
                {"gamma_excess", a->null.gamma_excess},    {"other_gamma_excess", b->null.gamma_excess}};
    json_begin(j);
    json_text(j, "event", "compare");
    json_whole(j, "layer", a->layer);
    json_whole(j, "tokens", x.tokens);
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) json_real(j, real[i].key, real[i].value);
    json_whole(j, "dead", a->dead.n);
    json_whole(j, "other_dead", b->dead.n);
    json_end(j);
}

static void draw_loads(FILE *f, const table *t);

static void compare_table(FILE *f, const table *a, const table *b, size_t n) {
    char s[4][16];
    page_table_begin(f);
    page_row(f, 1, "layer|first choice kept|by chance|all kept|by chance|MaxVio|other|effective|other|dead|other");
    for (size_t i = 0; i < n; i++) {
        const layer *x = &a->row[i], *y = &b->row[i];
        relation_overlap kept = overlap_of(x, y);
        page_row(f, 0, "%zu|%s|%s|%s|%s|%.3f|%.3f|%.2f|%.2f|%zu|%zu", x->layer, show(s[0], "%.3f", kept.top1),
                 show(s[1], "%.3f", kept.chance_top1), show(s[2], "%.3f", kept.topk),
                 show(s[3], "%.3f", kept.chance_topk), x->maxvio, y->maxvio, x->effective, y->effective, x->dead.n,
                 y->dead.n);
    }
    page_table_end(f);
}

static void compare(const outputs *to, const table *a, const table *b) {
    size_t n = a->n < b->n ? a->n : b->n;
    if (to->human) {
        fprintf(to->human, "\n%s, and %s\n", a->row->path, b->row->path);
        if (a->n != b->n) fprintf(to->human, "%zu and %zu layers: the first %zu of both\n", a->n, b->n, n);
        fprintf(to->human, "layer  top-1 kept (chance)  top-k kept (chance)  churn   moved   MaxVio         effective"
                           "        dead       excess\n");
    }
    for (size_t i = 0; i < n; i++) compare_layer(to, &a->row[i], &b->row[i]);
    if (to->human)
        fprintf(to->human, "Kept: share of the tokens' first choice, of all their choices (chance: tokens shuffled).\n"
                           "Churn: tokens whose set differs. Moved: share of the load. A dash: not the same "
                           "tokens, experts or top-k.\n");
    if (!to->page) return;
    page_heading(to->page, "Against another dump");
    page_card(to->page);
    if (n > 1) draw_kept(to->page, a, b, n);
    compare_table(to->page, a, b, n);
    page_card_end(to->page);
    page_heading(to->page, b->row->path);
    page_card(to->page);
    draw_loads(to->page, b);
    page_card_end(to->page);
}

static void draw_loads(FILE *f, const table *t) {
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

static void draw_gamma(FILE *f, const table *t) {
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

static void draw_series(FILE *f, const series *s) {
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
static void page_labels(FILE *f, const layer *r) {
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
        top_text(r, c, text);
        page_row(f, 0, "%zu|<%s", c, text);
    }
    page_table_end(f);
    page_card_end(f);
    free(share);
}

static void write_page(const config *o, const table *t, const table *other, const series *s, size_t last) {
    char text[256], dead[256], gamma[2][40], a[6][16];
    table shown = {t->row + last, t->n - last}; // of a series the last checkpoint
    FILE *f = open_output(o->out, "inspect.html");
    snprintf(
        text, sizeof text, "%s: %zu layers, %zu tokens, %zu experts, top-%zu; %zu batches, %zu bootstrap replicates.",
        shown.row->path, shown.n, shown.row->tokens, shown.row->experts, shown.row->top_k, o->batches, o->bootstrap);
    page_begin(f, "How a model routes", text);
    page_explain(f, &shown);
    if (s) {
        page_heading(f, "Over training");
        page_card(f);
        draw_series(f, s);
        page_card_end(f);
    }
    if (shown.row->has_logits) {
        page_card(f);
        draw_gamma(f, &shown);
        page_card_end(f);
    }
    page_card(f);
    draw_loads(f, &shown);
    page_card_end(f);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "layer|MaxVio|CV|Gini|effective|<dead|dead first|gamma_eff [95%%]|null|excess [95%%]|OLS|T|L1 game|"
                   "softmax|uniform|types");
    for (size_t i = 0; i < shown.n; i++) {
        const layer *r = &shown.row[i];
        gamma_text(gamma, r);
        dead_text(&r->dead, dead, sizeof dead);
        page_row(f, 0, "%zu|%.3f|%.3f|%.3f|%.2f|<%s|%zu|%s|%s|%s|%s|%s|%s|%s|%s|%s", r->layer, r->maxvio, r->cv,
                 r->gini, r->effective, dead, r->dead.first, gamma[0], show(a[5], "%.2f", r->null.gamma_null), gamma[1],
                 show(a[0], "%.2f", r->gamma_ols),
                 show(a[1], "%.2f", r->temperature), show(a[2], "%.4f", r->l1_game), show(a[3], "%.4f", r->l1_softmax),
                 show(a[4], "%.4f", r->l1_uniform), show(a[5], "%.4f", r->l1_coupled));
    }
    page_table_end(f);
    page_card_end(f);
    const outputs to_page = {NULL, f, NULL};
    if (other) compare(&to_page, &shown, other);
    if (o->relations) show_relations(&to_page, o, &shown);
    for (size_t i = 0; i < shown.n; i++)
        if (shown.row[i].labels) page_labels(f, &shown.row[i]);
    page_pre(
        f,
        "dead: under a tenth of an even share of the selections, with their numbers; dead first: under 1% of the first "
        "choices. L1: held out, 0 to 2. "
        "gamma_eff is after arXiv 2604.04230: derived, and moved by differences between tokens alone, in either "
        "sign. null: what the noise of the tokens alone makes, each expert's logits shuffled; excess: gamma_eff less "
        "that.");
    page_end(f);
    close_output(f, "inspect.html");
}

// A layer a row, the keys of the JSON; an empty field is its null.
static void write_csv(const config *o, const table *const *tables, size_t n) {
    FILE *f = open_output(o->out, "inspect.csv");
    fprintf(f, "file,layer,tokens,experts,top_k,dead,dead_first,masked,identified,feasible,maxvio,cv,gini,entropy,"
               "effective_experts,gamma_eff,gamma_lo,gamma_hi,gamma_null,gamma_excess,excess_lo,excess_hi,gamma_ols,"
               "temperature,l1_game,l1_softmax,l1_uniform,l1_types_coupled,l1_types_independent,"
               "label_information,label_information_lo,label_information_hi\n");
    for (size_t k = 0; k < n; k++)
        for (size_t i = 0; i < tables[k]->n; i++) {
            const layer *r = &tables[k]->row[i];
            const int labels = r->labels != NULL;
            const double real[] = {r->maxvio, r->cv, r->gini, r->entropy, r->effective, r->gamma, r->lo, r->hi,
                                   r->null.gamma_null, r->null.gamma_excess, r->null.excess_lo, r->null.excess_hi,
                                   r->gamma_ols, r->temperature, r->l1_game, r->l1_softmax, r->l1_uniform,
                                   r->l1_coupled, r->l1_independent, r->domain.nats, r->domain.lo, r->domain.hi};
            const size_t count = sizeof real / sizeof *real;
            fputc('"', f);
            for (const char *c = r->path; *c; c++) fprintf(f, *c == '"' ? "\"\"" : "%c", *c);
            fprintf(f, "\",%zu,%zu,%zu,%zu,%zu,%zu,%zu,%s,%s", r->layer, r->tokens, r->experts, r->top_k, r->dead.n,
                    r->dead.first, r->masked, r->identified ? "true" : "false", r->feasible ? "true" : "false");
            for (size_t m = 0; m < count; m++) {
                if (isfinite(real[m]) && (labels || m + 3 < count)) fprintf(f, ",%.9g", real[m]);
                else fputc(',', f);
            }
            fputc('\n', f);
        }
    close_output(f, "inspect.csv");
}

// The routers that the repository carries, from the current folder or from that of the program.
static const char *sample_path(const char *program) {
    static char path[1200];
    char folder[1100];
    if (!sample_folder(program, "examples/data", "router.npy", folder, sizeof folder))
        args_fail("inspect", "no files given, and the sample examples/data/router.npy is not there");
    snprintf(path, sizeof path, "%s/router.npy", folder);
    return path;
}

static void parse(config *o, int argc, char **argv) {
    args_option options[] = {
        {"logits", ARGS_TEXT, &o->logits, "FILE", "router logits, .npy (as the first file without an option)", 0, 0},
        {"indices", ARGS_TEXT, &o->indices, "FILE", "selected experts, .npy (T, k): the load is theirs", 0, 0},
        {"router", ARGS_TEXT, &o->router, "FILE", "safetensors, or its index: the files are hidden states", 0, 0},
        {"labels", ARGS_TEXT, &o->labels, "FILE", "a class for each token, .npy of integers", 0, 0},
        {"top-k", ARGS_SIZE, &o->top_k, "N", "experts a token, where no indices are given", 1, 1 << 20},
        {"experts", ARGS_SIZE, &o->experts, "N", "experts, where only indices are given (0: the largest index + 1)", 0,
         1 << 20},
        {"probabilities", ARGS_FLAG, &o->probabilities, NULL, "the files hold probabilities: take their log", 0, 0},
        {"bf16", ARGS_FLAG, &o->bf16, NULL, "uint16 files hold bfloat16", 0, 0},
        {"batches", ARGS_SIZE, &o->batches, "N", "batches that the bootstrap draws from", 1, 1 << 20},
        {"bootstrap", ARGS_SIZE, &o->bootstrap, "N", "replicates for the intervals (0: none)", 0, 1 << 24},
        {"types", ARGS_SIZE, &o->types, "C", "types of tokens", 1, 64},
        {"explain", ARGS_FLAG, &o->explain, NULL, "in words: what is wrong, how sure that is, what to do", 0, 0},
        {"relations", ARGS_FLAG, &o->relations, NULL, "chosen together, from layer to layer, over the layers", 0, 0},
        {"compare", ARGS_TEXT, &o->compare, "FILE", "another dump, beside the first: what is kept", 0, 0},
        {"csv", ARGS_FLAG, &o->csv, NULL, "write inspect.csv, a layer a row", 0, 0},
        {"series", ARGS_FLAG, &o->series, NULL, "the files are checkpoints, in order", 0, 0},
        {"steps-at", ARGS_TEXT, &o->steps_at, "A,B,...", "the checkpoints' steps (default: 1, 2, ...)", 0, 0},
        ARGS_SEED(&o->seed),
        ARGS_THREADS(&o->threads),
        {"html", ARGS_FLAG, &o->html, NULL, "write inspect.html, which needs nothing else", 0, 0},
        ARGS_OUT(&o->out),
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->quiet),
    };
    o->file = allocate((size_t)argc + 1, sizeof *o->file);
    o->n_files = args_parse_files("inspect", "Tells how a model routes, from .npy files of its router's logits.",
                                 options, sizeof options / sizeof *options, argc, argv, o->file);
    o->parallel.n_threads = o->threads;
    if (o->series && !o->bootstrap) args_fail("inspect", "--series: phases need intervals, so --bootstrap above 0");
    if (o->steps_at && !o->series) args_fail("inspect", "--steps-at: only with --series");
    if (o->logits) o->file[o->n_files++] = o->logits;
    if (o->indices && o->n_files > 1) args_fail("inspect", "--indices: with one file of logits at most");
    if (o->probabilities && o->router) args_fail("inspect", "--probabilities: not of hidden states");
    if (!o->n_files && !o->indices) {
        o->file[o->n_files++] = sample_path(argv[0]);
        if (!o->top_k) o->top_k = 2; // the sample's
    }
    if (o->compare && (o->series || o->n_files > 1)) args_fail("inspect", "--compare: with one dump, no --series");
    if (o->router && !o->n_files) args_fail("inspect", "--router: a file of hidden states is needed");
}

// Every file's layers into t; end[i]: the layers up to and with file i.
static void inspect_all(config *o, table *t, size_t *end, json *j) {
    size_t printed = 0;
    routers opened = {0}, *r = NULL;
    if (o->router) opened = open_routers(o->router), r = &opened;
    for (size_t i = 0; i < o->n_files || (!i && o->indices); i++) {
        const char *path = i < o->n_files ? o->file[i] : NULL, *indices = o->indices;
        dump_file first = path ? dump_open(path) : (dump_file){0};
        if (path && !indices && dump_is_index(&first)) indices = path, path = NULL; // a file of indices alone
        inspect_files(o, path, indices, r, t);
        if (!o->series && i)
            // numbered on
            for (size_t k = end[i - 1]; k < t->n; k++) t->row[k].layer += t->row[end[i - 1] - 1].layer + 1;
        end[i] = t->n;
        for (; o->json && printed < t->n; printed++) write_layer(j, &t->row[printed]);
    }
}

// The dump that is compared: choices, or numbers of the kind that the first one has.
static table inspect_other(const config *o, const table *first) {
    table t = {0};
    config mine = *o;
    routers opened = {0};
    dump_file file = dump_open(o->compare);
    int indices = dump_is_index(&file) || (!o->n_files && dump_can_index(&file));
    mine.labels = NULL;
    if (!mine.top_k) mine.top_k = first->row[0].top_k;
    if (indices && !mine.experts) mine.experts = first->row[0].experts;
    if (o->router && !indices) opened = open_routers(o->router);
    inspect_files(&mine, indices ? NULL : o->compare, indices ? o->compare : NULL, opened.n ? &opened : NULL, &t);
    return t;
}

// What was asked for beside the table.
static void more(const config *o, const outputs *to, const table *t, const table *other) {
    if (o->relations) show_relations(to, o, t);
    if (other) compare(to, t, other);
    if (o->explain) {
        fprintf(to->human, "\nIn words\n");
        explain(to->human, to->lines, t);
    }
    const table *const both[] = {t, other};
    if (o->csv) write_csv(o, both, other ? 2 : 1);
}

int main(int argc, char **argv) {
    config o = {.batches = 50, .bootstrap = 1000, .types = 8, .seed = 1, .out = "out"};
    parse(&o, argc, argv);
    FILE *human = o.json ? stderr : stdout;
    json j = {{o.json ? stdout : NULL}, 0};
    table t = {0}, other = {0};
    series s = {0};
    size_t *end = allocate(o.n_files + 1, sizeof *end);
    inspect_all(&o, &t, end, &j);
    print_table(human, &o, &t);
    warn(&t);
    if (o.compare) other = inspect_other(&o, &t);
    more(&o, &(outputs){human, NULL, &j}, &t, o.compare ? &other : NULL);
    if (o.series) {
        s = make_series(&o, &t, end);
        print_series(human, &s);
        write_phases(&j, &s);
    }
    if (o.html) {
        write_page(&o, &t, o.compare ? &other : NULL, o.series ? &s : NULL,
                   o.series && o.n_files > 1 ? end[o.n_files - 2] : 0);
        fprintf(human, "see %s/inspect.html\n", o.out);
    }
    return 0;
}
