// cifar10.c - a small convolutional network with a Mixture-of-Experts layer learns CIFAR-10.
//
//     build/cifar10                      on the sample of real pictures that the repository carries, under a minute
//     build/cifar10 --data DIR           on the full data set
//     build/cifar10 --system switch      another kind of mixture; --help lists everything
//     build/cifar10 --seeds 3            with three seeds: mean and standard deviation
//
// The network:  image -> convolutions (stem, three residual blocks) -> 256 features -> x + MoE(x) -> class
// The mixture's router looks at the pooled features of an image; with --tokens at each position of the last feature
// map, which is pooled after the mixture. For comparison a dense layer with as many active parameters takes the
// mixture's place in a second network, and a linear classifier learns from the same pixels.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/cifar_net.h"
#include "common/dead.h"
#include "common/game.h"
#include "common/json.h"
#include "common/plot.h"
#include "common/progress.h"
#include "common/reading.h"
#include "common/spread.h"

enum { FEATURES = CIFAR_FEATURES, D_FF = 256, CLASSES = CIFAR_CLASSES };
enum { GAME_BATCHES = 50 }; // of an epoch's tokens, for the interval of gamma_eff

// The balance loss of systems that have one weighs ten times the usual 0.01, because these trainings are short.
static const float balance_weight = 0.1f;
typedef struct config {
    const char *data, *system, *set, *isa, *out, *optimizer, *activation, *convolution;
    size_t epochs, steps, batch, eval, threads, experts, top_k, seeds;
    uint64_t seed;
    int wide, muon, gelu, winograd, tokens, no_dense, scan, grow, json, quiet;
    double lr, balance;
    // by the data
    size_t width[CIFAR_BLOCKS], shift;
    float smoothing, decay;
} config;

// AdamW's rate in a step of `all`: alone it rises and falls to 0 by a cosine, beside Muon it falls in a straight line.
static float rate(const config *o, size_t step, size_t all) {
    if (!o->muon) return moe_schedule_cosine(step, all / 5, all, (float)o->lr, 0);
    return (float)o->lr * (float)(all - step) / (float)all;
}

// ---- training and testing ----

typedef struct score {
    double loss, accuracy;
} score;

// What a training leaves for the report.
typedef struct result {
    char name[64];
    size_t experts, top_k, epochs, steps;                            // done
    double *train_loss, *test_loss, *train_accuracy, *test_accuracy; // (epochs)
    double *gamma, *gamma_lo, *gamma_hi, *ecology;                   // (epochs): NaN where the data do not tell gamma
    double *load;          // (experts, epochs): shares of the routes in training
    double *class_map;     // (CLASSES, experts): where the test images of a class go
    double *share, *first; // (experts): shares of the routes, and of the first choices, on the test images
    score test;
    moe_health health; // on the test images; its arrays are not kept
    dead_note dead;
    game_note game; // of the last epoch's training
    double game_batches, game_tokens;
    size_t params, active_params;
    double seconds, images_per_s;
    uint64_t seed, checksum;
} result;

static size_t test_count(const config *o, const cifar *data) {
    return o->eval && o->eval < data->test.count ? o->eval : data->test.count;
}

// How the final test looks at an image: as it is and moved by a pixel, each also mirrored; the logits are averaged.
static const struct view {
    int flip, moved;
    float weight;
} views[] = {{0, 0, 0.25f}, {2, 0, 0.25f}, {0, -1, 0.125f}, {2, -1, 0.125f}, {0, 1, 0.125f}, {2, 1, 0.125f}};
enum { VIEWS = sizeof views / sizeof *views };

// Tests on the first `count` images. With `r` the whole report: each image in all views, and the experts' health and
// classes noted.
static score test(cifar_net *m, const cifar_set *set, size_t count, result *r) {
    score sum = {0, 0};
    float *logits = allocate(m->shape.batch * CLASSES, sizeof(float));
    nn_must(moe_layer_health_reset(m->moe));
    for (size_t first = 0, n; first < count; first += n) {
        n = count - first < m->shape.batch ? count - first : m->shape.batch;
        memset(logits, 0, n * CLASSES * sizeof *logits);
        for (int v = 0; v < (r ? VIEWS : 1); v++) {
            float weight = r ? views[v].weight : 1;
            cifar_batch b = {.set = set,
                             .first = first,
                             .count = n,
                             .flip = views[v].flip,
                             .moved = views[v].moved,
                             .x = m->image,
                             .label = m->label};
            cifar_batch_make(&b, &m->ops.parallel);
            cifar_net_forward(m, n, 0);
            const moe_tape *t = moe_layer_tape(m->moe);
            size_t k = t->n_slots;
            for (size_t i = 0; i < n * CLASSES; i++) logits[i] += weight * m->logits[i];
            for (size_t i = 0; r && i < t->n_tokens * k; i++)
                if (t->index[i] >= 0)
                    r->class_map[m->label[i / (k * m->positions)] * r->experts + (size_t)t->index[i]] += 1;
        }
        sum.loss += nn_cross_entropy(&m->ops, n, CLASSES, 0, logits, m->label, m->prob, NULL);
        sum.accuracy += (double)nn_count_right(n, CLASSES, logits, m->label);
    }
    free(logits);
    return (score){sum.loss / (double)count, sum.accuracy / (double)count};
}

static void write_health(json *j, const moe_health *h, const dead_note *dead) {
    json_real(j, "maxvio", h->maxvio);
    json_real(j, "load_cv", h->load_cv);
    json_real(j, "load_entropy", h->load_entropy);
    dead_json(j, dead);
    json_whole(j, "dropped", h->n_dropped);
}

// One epoch's line, and its place in the curves. The experts' load is that of the epoch's training.
static void note_epoch(const config *o, result *r, cifar_net *m, const cifar *data, game *g, json *j, double loss,
                       double accuracy, size_t images) {
    size_t e = r->epochs++;
    moe_health h;
    r->game_batches = (double)(g->taken < g->counts.n_batches ? g->taken : g->counts.n_batches);
    r->game_tokens = (double)(g->taken * o->batch * m->positions) / r->game_batches;
    game_note note = r->game = game_end(g, m->moe, &m->ops.parallel);
    r->gamma[e] = note.gamma;
    r->gamma_lo[e] = note.lo;
    r->gamma_hi[e] = note.hi;
    r->ecology[e] = note.ecology;
    nn_must(moe_layer_health(m->moe, &h));
    json_begin(j);
    json_text(j, "event", "epoch");
    json_text(j, "system", r->name);
    json_whole(j, "seed", r->seed);
    json_whole(j, "epoch", e + 1);
    json_real(j, "train_loss", r->train_loss[e] = loss / (double)images);
    json_real(j, "train_accuracy", r->train_accuracy[e] = accuracy / (double)images);
    dead_note dead = dead_take(&h);
    write_health(j, &h, &dead);
    dead_free(&dead);
    json_real(j, "entropy", h.entropy);
    json_list_begin(j, "load");
    for (size_t i = 0; i < r->experts; i++)
        json_real(j, NULL, r->load[i * o->epochs + e] = (double)h.load[i] / (double)(h.n_selected ? h.n_selected : 1));
    json_list_end(j);
    size_t count = test_count(o, data);
    score s = test(m, &data->test, count < 2000 ? count : 2000, NULL); // a glance; the last test sees everything
    json_real(j, "test_loss", r->test_loss[e] = s.loss);
    json_real(j, "test_accuracy", r->test_accuracy[e] = s.accuracy);
    game_json(j, &note);
    json_end(j);
    if (o->quiet || r->experts == 1) return;
    FILE *human = o->json ? stderr : stdout;
    char text[160];
    game_text(&note, text, sizeof text);
    fprintf(human, "epoch %2zu  test loss %.4f  accuracy %5.2f%%  %s\n", e + 1, s.loss, 100 * s.accuracy, text);
    fflush(human);
}

// ---- growth, with --grow ----

enum { GROW_MOST = 3 }; // times the experts of the beginning, at most

// DynMoE's window is an epoch: its training's loads, and the tokens that no expert took.
typedef struct window {
    moe_health health;
    void *memory;
    float unserved[FEATURES];
    uint64_t count;
} window;

static void window_begin(window *w, const moe_layer *layer) {
    size_t bytes = 0, experts = moe_layer_desc(layer)->n_experts;
    free(w->memory);
    memset(w, 0, sizeof *w);
    nn_must(moe_health_size(experts, &bytes));
    w->memory = allocate(1, bytes);
    nn_must(moe_health_init(&w->health, experts, w->memory, bytes));
}

static void exchange(cifar_net *m, moe_layer *next) {
    moe_layer_free(m->moe);
    m->moe = next;
}

static int by_dynmoe(const config *o) { return strcmp(o->system, "dynmoe") == 0; }

// What has changed, for people and in a line of its own.
static void note_growth(const config *o, const result *r, const cifar_net *m, const char *reason, json *j) {
    const moe_desc *desc = moe_layer_desc(m->moe);
    size_t now = desc->n_experts + desc->n_bound;
    fprintf(o->json || o->quiet ? stderr : stdout, "epoch %2zu  %s: now %zu\n", r->epochs, reason, now);
    json_begin(j);
    json_text(j, "event", "growth");
    json_whole(j, "epoch", r->epochs);
    json_whole(j, "experts", now);
    json_text(j, "reason", reason);
    json_end(j);
}

static void grow_by_dynmoe(const config *o, const result *r, cifar_net *m, const window *w, size_t most, json *j) {
    moe_layer *next = NULL;
    char reason[100];
    size_t before = moe_layer_desc(m->moe)->n_experts;
    nn_must(moe_layer_dynmoe(&next, m->moe, &w->health, w->unserved, w->count, most, o->seed + r->epochs));
    exchange(m, next);
    snprintf(reason, sizeof reason, "%zu experts, %llu tokens that none took", before, (unsigned long long)w->count);
    if (moe_layer_desc(next)->n_experts != before) note_growth(o, r, m, reason, j);
}

// After an epoch: what the controller decides, carried out and said. `last`: nothing begins any more, but pairs get
// places of their own.
static void grow_by_controller(const config *o, const result *r, cifar_net *m, size_t most, int last, json *j) {
    moe_growth *g = moe_layer_growth(m->moe);
    moe_layer *next = NULL;
    char reason[sizeof g->reason];
    moe_health h;
    nn_must(moe_layer_health(m->moe, &h));
    g->max_experts = (int)most;
    nn_must(moe_growth_step(g, r->test_accuracy[r->epochs - 1], &h, NULL));
    if ((g->release || last) && moe_layer_desc(m->moe)->n_bound) {
        nn_must(moe_layer_release(&next, m->moe, 0));
        exchange(m, next);
        g = moe_layer_growth(m->moe);
    }
    if (last || g->decision != MOE_GROWTH_SPLIT) return;
    moe_growth_data seen = {.x = m->z, .n_tokens = moe_layer_tape(m->moe) ? moe_layer_tape(m->moe)->n_given : 0};
    memcpy(reason, g->reason, sizeof reason);
    nn_must(moe_layer_split(&next, m->moe, g->expert, seen.n_tokens ? &seen : NULL));
    exchange(m, next);
    note_growth(o, r, m, reason, j);
}

// The trained network tested again at other temperatures of its gate, as the ecology paper does [S]: what changes and
// what stays.
static void scan_temperatures(const config *o, cifar_net *m, const cifar *data, json *j) {
    static const float temperature[] = {0.1f, 0.2f, 0.5f, 1, 2, 5};
    enum { N = sizeof temperature / sizeof *temperature };
    FILE *human = o->json ? stderr : stdout;
    score s[N];
    moe_health h[N];
    double least[5] = {INFINITY, INFINITY, INFINITY, INFINITY, INFINITY}, most[5] = {0};
    static const char *const what[] = {"test accuracy", "load CV", "dead experts", "MaxVio", "entropy of the mean p"};
    fprintf(human, "\ntemperature  accuracy  load CV  dead  MaxVio  entropy of the mean p\n");
    for (size_t i = 0; i < N; i++) {
        moe_layer_side(m->moe)->temperature = temperature[i];
        s[i] = test(m, &data->test, test_count(o, data), NULL);
        nn_must(moe_layer_health(m->moe, &h[i]));
        const double v[5] = {s[i].accuracy, h[i].load_cv, (double)h[i].n_dead, h[i].maxvio, h[i].entropy};
        for (int k = 0; k < 5; k++) least[k] = fmin(least[k], v[k]), most[k] = fmax(most[k], v[k]);
        fprintf(human, "%11.1f  %7.2f%%  %7.3f  %4zu  %6.3f  %21.4f\n", (double)temperature[i], 100 * s[i].accuracy,
                h[i].load_cv, h[i].n_dead, h[i].maxvio, h[i].entropy);
        json_begin(j);
        json_text(j, "event", "scan");
        json_real(j, "temperature", (double)temperature[i]);
        json_real(j, "test_accuracy", s[i].accuracy);
        json_real(j, "test_loss", s[i].loss);
        dead_note dead = dead_take(&h[i]);
        write_health(j, &h[i], &dead);
        dead_free(&dead);
        json_real(j, "entropy", h[i].entropy);
        json_end(j);
    }
    moe_layer_side(m->moe)->temperature = 0;
    for (int stays = 1; stays >= 0; stays--) {
        fprintf(human, stays ? "stay:  " : "change:");
        for (int k = 0; k < 5; k++)
            if ((least[k] == most[k]) == stays) fprintf(human, "  %s", what[k]);
        fprintf(human, "\n");
    }
}

static cifar_shape shape_of(const config *o) {
    cifar_shape s = {.batch = o->batch, .seed = o->seed, .muon = o->muon, .gelu = o->gelu, .tokens = o->tokens};
    s.winograd = o->winograd;
    memcpy(s.width, o->width, sizeof s.width);
    s.decay = o->decay;
    return s;
}

static uint64_t net_checksum(const cifar_net *m) {
    return moe_hash(moe_layer_hash(m->moe), m->bank.value, m->bank.count * sizeof(float));
}

static result *train(const config *o, const cifar *data, const char *name, const moe_desc *desc, json *j) {
    result *r = allocate(1, sizeof *r);
    cifar_shape shape = shape_of(o);
    cifar_net *m = cifar_net_new(&shape, desc, data);
    nn *s = &m->ops;
    size_t per_epoch = data->train.count / o->batch, total = per_epoch * o->epochs;
    if (o->steps && o->steps < total) total = o->steps;
    uint32_t *order = allocate(data->train.count, sizeof *order);
    snprintf(r->name, sizeof r->name, "%s", name);
    r->experts = desc->n_experts;
    r->top_k = desc->top_k;
    r->seed = o->seed;
    size_t most = o->grow ? GROW_MOST * r->experts : r->experts;
    window seen = {.memory = NULL};
    window_begin(&seen, m->moe);
    r->train_loss = allocate(o->epochs * (8 + most) + (CLASSES + 2) * most, sizeof(double));
    r->test_loss = r->train_loss + o->epochs;
    r->train_accuracy = r->test_loss + o->epochs;
    r->test_accuracy = r->train_accuracy + o->epochs;
    r->gamma = r->test_accuracy + o->epochs;
    r->gamma_lo = r->gamma + o->epochs;
    r->gamma_hi = r->gamma_lo + o->epochs;
    r->ecology = r->gamma_hi + o->epochs;
    r->load = r->ecology + o->epochs;
    r->class_map = r->load + o->epochs * most;
    r->share = r->class_map + CLASSES * most;
    r->first = r->share + most;
    game played = game_new(m->moe, per_epoch < GAME_BATCHES ? per_epoch : GAME_BATCHES);
    progress p = progress_begin(name, "images", total * o->batch, o->quiet);
    double busy = 0;
    for (size_t step = 0; step < total;) {
        double loss = 0, accuracy = 0, begin = seconds_now();
        size_t epoch = step / per_epoch, images = 0;
        cifar_shuffle(order, data->train.count, o->seed, epoch);
        nn_must(moe_layer_health_reset(m->moe));
        for (size_t i = 0; i < per_epoch && step < total; i++) {
            cifar_batch b = {.set = &data->train,
                             .order = order,
                             .first = i * o->batch,
                             .count = o->batch,
                             .shift = o->shift,
                             .flip = 1,
                             .seed = o->seed,
                             .epoch = epoch,
                             .x = m->image,
                             .label = m->label};
            cifar_batch_make(&b, &s->parallel);
            cifar_net_forward(m, o->batch, 1);
            game_take(&played, m->moe);
            if (o->grow && desc->n_experts > 1 && by_dynmoe(o))
                nn_must(moe_growth_unserved(moe_layer_tape(m->moe), seen.unserved, &seen.count));
            loss += nn_cross_entropy(s, o->batch, CLASSES, o->smoothing, m->logits, m->label, m->prob, m->dlogits);
            accuracy += (double)nn_count_right(o->batch, CLASSES, m->logits, m->label);
            images += o->batch;
            cifar_net_backward(m, o->batch);
            float lr = rate(o, step, per_epoch * o->epochs);
            step++;
            cifar_net_step(m, lr, step);
            progress_update(&p, step * o->batch, "epoch %zu of %zu  loss %.3f", epoch + 1, o->epochs,
                            loss / (double)images);
        }
        busy += seconds_now() - begin;
        progress_clear(&p);
        moe_health trained;
        nn_must(moe_layer_health(m->moe, &trained));
        nn_must(moe_health_merge(&seen.health, &trained));
        note_epoch(o, r, m, data, &played, j, loss, accuracy, images);
        if (!o->grow || desc->n_experts == 1) continue;
        if (!by_dynmoe(o)) grow_by_controller(o, r, m, most, step >= total, j);
        else if (step < total) grow_by_dynmoe(o, r, m, &seen, most, j);
        r->experts = moe_layer_desc(m->moe)->n_experts;
        game_free(&played);
        played = game_new(m->moe, per_epoch < GAME_BATCHES ? per_epoch : GAME_BATCHES);
        window_begin(&seen, m->moe);
    }
    free(seen.memory);
    r->test = test(m, &data->test, test_count(o, data), r);
    progress_clear(&p);
    nn_must(moe_layer_health(m->moe, &r->health));
    r->dead = dead_take(&r->health);
    for (size_t e = 0; e < r->experts; e++) {
        r->share[e] = (double)r->health.load[e] / (double)r->health.n_selected;
        r->first[e] = (double)r->health.top1[e] / (double)r->health.n_tokens;
    }
    for (size_t c = 0; c < CLASSES; c++) {
        double sum = 0;
        for (size_t e = 0; e < r->experts; e++) sum += r->class_map[c * r->experts + e];
        for (size_t e = 0; e < r->experts; e++) r->class_map[c * r->experts + e] /= sum > 0 ? sum : 1;
    }
    r->steps = total;
    r->seconds = seconds_now() - p.start;
    r->images_per_s = (double)(total * o->batch) / busy;
    r->params = m->bank.count + moe_layer_params(m->moe);
    r->active_params = m->bank.count + moe_layer_active_params(m->moe);
    r->checksum = net_checksum(m);
    if (o->scan && r->experts > 1) scan_temperatures(o, m, data, j);
    free(order);
    game_free(&played);
    cifar_net_free(m);
    return r;
}

// Softmax regression on the same pixels, with the same flips (shifts only hurt it).
static score train_linear(const config *o, const moe_parallel *parallel, const cifar *data) {
    enum { PIXELS = 3 * CIFAR_PIXELS };
    nn s = {.parallel = *parallel};
    nn_bank bank = {0};
    size_t batch = o->batch, per_epoch = data->train.count / batch, total = per_epoch * (data->sample ? 40 : 5);
    size_t weight = nn_add(&bank, PIXELS * CLASSES, 1), bias = nn_add(&bank, CLASSES, 0);
    nn_bank_alloc(&s, &bank);
    float *x = nn_floats(&s, batch * PIXELS), *logits = nn_floats(&s, batch * CLASSES);
    float *prob = nn_floats(&s, batch * CLASSES), *dlogits = nn_floats(&s, batch * CLASSES);
    float *w = bank.value + weight, *b = bank.value + bias;
    unsigned char *label = allocate(batch, 1);
    uint32_t *order = allocate(data->train.count, sizeof *order);
    if (o->steps && o->steps < total) total = o->steps;
    for (size_t step = 0; step < total; step++) {
        size_t epoch = step / per_epoch;
        if (step % per_epoch == 0) cifar_shuffle(order, data->train.count, o->seed, epoch);
        cifar_batch in = {.set = &data->train,
                          .order = order,
                          .first = step % per_epoch * batch,
                          .count = batch,
                          .flip = 1,
                          .seed = o->seed,
                          .epoch = epoch,
                          .x = x,
                          .label = label};
        cifar_batch_make(&in, parallel);
        nn_linear_forward(&s, batch, PIXELS, CLASSES, x, w, b, logits);
        nn_cross_entropy(&s, batch, CLASSES, 0, logits, label, prob, dlogits);
        nn_linear_backward(&s, batch, PIXELS, CLASSES, x, w, dlogits, NULL, bank.grad + weight, bank.grad + bias);
        nn_bank_step(&bank, (moe_optimizer_args){.lr = moe_schedule_cosine(step, 0, total, 3e-4f, 0),
                                                 .weight_decay = data->sample ? 1.0f : 0.1f,
                                                 .step = step + 1,
                                                 .parallel = parallel});
    }
    score sum = {0, 0};
    size_t count = test_count(o, data);
    for (size_t first = 0, n; first < count; first += n) {
        n = count - first < batch ? count - first : batch;
        cifar_batch in = {.set = &data->test, .first = first, .count = n, .x = x, .label = label};
        cifar_batch_make(&in, parallel);
        nn_linear_forward(&s, n, PIXELS, CLASSES, x, w, b, logits);
        sum.loss += nn_cross_entropy(&s, n, CLASSES, 0, logits, label, prob, NULL) / (double)count;
        sum.accuracy += (double)nn_count_right(n, CLASSES, logits, label) / (double)count;
    }
    free(label);
    free(order);
    nn_free(&s);
    return sum;
}

// ---- the report ----

static void write_config(json *j, const config *o, const moe_desc *desc, const cifar *data) {
    char layer[2048];
    moe_desc_json(desc, layer, sizeof layer);
    json_config(j, "cifar10");
    json_text(j, "data", o->data ? o->data : "sample");
    json_whole(j, "train_images", data->train.count);
    json_whole(j, "test_images", data->test.count);
    json_text(j, "system", o->system);
    json_whole(j, "seed", o->seed);
    json_whole(j, "epochs", o->epochs);
    json_whole(j, "steps", o->steps);
    json_whole(j, "batch", o->batch);
    json_text(j, "optimizer", o->optimizer);
    json_real(j, "lr", o->lr);
    json_text(j, "activation", o->activation);
    json_text(j, "convolution", o->convolution);
    json_real(j, "weight_decay", (double)o->decay);
    json_real(j, "label_smoothing", (double)o->smoothing);
    json_whole(j, "shift", o->shift);
    json_list_begin(j, "width");
    for (int i = 0; i < CIFAR_BLOCKS; i++) json_whole(j, NULL, o->width[i]);
    json_list_end(j);
    json_raw(j, "tokens", o->tokens ? "true" : "false");
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_whole(j, "threads", moe_workers(&desc->parallel));
    json_raw(j, "layer", layer);
    json_end(j);
}

static void write_final(json *j, const result *r, const char *event) {
    char hash[17];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->checksum);
    json_begin(j);
    json_text(j, "event", event);
    json_text(j, "system", r->name);
    json_whole(j, "seed", r->seed);
    json_whole(j, "epochs", r->epochs);
    json_real(j, "train_loss", r->train_loss[r->epochs - 1]);
    json_real(j, "test_loss", r->test.loss);
    json_real(j, "test_accuracy", r->test.accuracy);
    json_whole(j, "params", r->params);
    json_whole(j, "active_params", r->active_params);
    json_real(j, "seconds", r->seconds);
    json_real(j, "images_per_s", r->images_per_s);
    write_health(j, &r->health, &r->dead);
    json_text(j, "checksum", hash);
    json_end(j);
}

// "cat 31%, dog 22%, bird 9%": of the test images that expert e gets, the classes with the largest shares.
static void top_classes(const result *r, size_t e, char *out, size_t size) {
    double share[CLASSES], sum = 0;
    for (size_t c = 0; c < CLASSES; c++) sum += share[c] = r->class_map[c * r->experts + e];
    *out = 0;
    for (int n = 0; n < 3 && sum > 0; n++) {
        size_t best = 0, at = strlen(out);
        for (size_t c = 1; c < CLASSES; c++)
            if (share[c] > share[best]) best = c;
        if (share[best] <= 0) break;
        snprintf(out + at, size - at, "%s%s %.0f%%", n ? ", " : "", cifar_class[best], 100 * share[best] / sum);
        share[best] = 0;
    }
}

static void print_tables(FILE *f, const result *r, const result *dense, score linear) {
    char text[128];
    fprintf(f, "\nexpert    load  first choice  classes\n");
    for (size_t e = 0; e < r->experts; e++) {
        top_classes(r, e, text, sizeof text);
        fprintf(f, "%6zu  %5.1f%%        %5.1f%%  %s\n", e, 100 * r->share[e], 100 * r->first[e], text);
    }
    dead_text(&r->dead, text, sizeof text);
    fprintf(f, "load: MaxVio %.3f, CV %.3f, entropy %.3f (1 = even); dead experts: %s; dropped: %llu\n\n",
            r->health.maxvio, r->health.load_cv, r->health.load_entropy, text,
            (unsigned long long)r->health.n_dropped);
    fprintf(f, "%-24s test accuracy  test loss  parameters      active  images/s\n", "");
    for (const result *x = r; x; x = x == r ? dense : NULL)
        fprintf(f, "%-24s        %5.2f%%  %9.4f  %10zu  %10zu  %8.0f\n", x->name, 100 * x->test.accuracy, x->test.loss,
                x->params, x->active_params, x->images_per_s);
    fprintf(f, "%-24s        %5.2f%%  %9.4f  %10d  %10d\n", "linear, on the pixels", 100 * linear.accuracy, linear.loss,
            3 * CIFAR_PIXELS * CLASSES + CLASSES, 3 * CIFAR_PIXELS * CLASSES + CLASSES);
}

static size_t identified(const result *r) {
    size_t n = 0;
    for (size_t e = 0; e < r->epochs; e++) n += isfinite(r->gamma[e]);
    return n;
}

// What the two numbers of the routing do not tell, and why; "" if they do.
static void explain(const result *r, char *out, size_t size) {
    size_t known = identified(r), at = 0;
    *out = 0;
    if (r->experts == 1) return;
    if (2 * known < r->epochs)
        at = (size_t)snprintf(out, size,
                              "gamma_eff is identified in %zu of %zu epochs: the router reads normalised features, "
                              "so mean logits hardly differ (with --set \"score=mlp loss.switch=0.02\" they do). ",
                              known, r->epochs);
    if (!(r->ecology[0] > 0) && at < size)
        snprintf(out + at, size - at,
                 "The ecology number is 0: the loss has no entropy term (--set loss.entropy=X adds one).");
}

// For the rules of common/reading.h: the load is that of the test, gamma_eff that of the last epoch's training.
static reading reading_of(const result *r) {
    const moe_health *h = &r->health;
    reading x = reading_unknown();
    x.experts = (double)r->experts, x.top_k = (double)r->top_k, x.selected = (double)h->n_selected;
    x.dead = (double)h->n_dead, x.dead_first = (double)h->n_dead_first;
    x.maxvio = h->maxvio, x.effective = h->effective_experts, x.drop_rate = h->drop_rate;
    x.logits = 1, x.masked = x.probabilities = 0;
    x.gamma = r->game.gamma, x.excess = r->game.null.gamma_excess;
    x.excess_lo = r->game.null.excess_lo, x.excess_hi = r->game.null.excess_hi;
    x.batches = r->game_batches, x.batch_tokens = r->game_tokens;
    x.ecology = r->game.ecology;
    return reading_complete(x);
}
static const char reading_title[] = "In words (load: on the test images; gamma_eff: of the last epoch's training)";

static void page_reading(FILE *f, const result *r) {
    char text[READING_TEXT];
    reading x = reading_of(r);
    const reading_rule *rule;
    if (r->experts == 1) return;
    page_heading(f, reading_title);
    page_card(f);
    for (size_t at = 0; (rule = reading_next(&x, &at)) != NULL;) {
        reading_text(rule, &x, text, sizeof text);
        page_pre(f, text);
    }
    page_card_end(f);
}

// gamma_eff and the ecology number over the epochs, the panel that says something; returns whether any does.
static int draw_game(FILE *f, const result *r) {
    int with_gamma = identified(r) > 0, with_ecology = isfinite(r->ecology[0]) && r->ecology[0] > 0;
    if (!f) return with_gamma || with_ecology; // only asked
    double *epoch = allocate(r->epochs, sizeof *epoch);
    plot_line ecology[] = {{"T H / (O + B)", r->ecology, r->epochs, 0}};
    for (size_t i = 0; i < r->epochs; i++) epoch[i] = (double)(i + 1);
    if (with_gamma)
        plot_points(f, &(plot_point_chart){.box = {0, 710, 480, 300},
                                           .title = "gamma_eff of the routing in training, where it is identified",
                                           .x_label = "epoch",
                                           .n = r->epochs,
                                           .x = epoch,
                                           .y = r->gamma,
                                           .lo = r->gamma_lo,
                                           .hi = r->gamma_hi,
                                           .joined = 1});
    if (with_ecology)
        plot_lines(f, &(plot_chart){{480, 710, 480, 300}, "Ecology number", "epoch", ecology, 1, 0, 0});
    free(epoch);
    return with_gamma || with_ecology;
}

static void draw(FILE *f, const config *o, const result *r, const result *dense, score linear) {
    double peak = 0, share = 0, *level = allocate(r->epochs, sizeof *level);
    double *load = allocate(r->experts * r->epochs, sizeof *load);
    for (size_t i = 0; i < r->epochs; i++) level[i] = linear.accuracy;
    for (size_t e = 0; e < r->experts; e++)
        for (size_t i = 0; i < r->epochs; i++) {
            load[e * r->epochs + i] = r->load[e * o->epochs + i];
            peak = fmax(peak, load[e * r->epochs + i]);
        }
    for (size_t i = 0; i < CLASSES * r->experts; i++) share = fmax(share, r->class_map[i]);
    plot_line loss[] = {{"training", r->train_loss, r->epochs, 0},
                        {"test", r->test_loss, r->epochs, 0},
                        {"test, dense layer", dense ? dense->test_loss : NULL, dense ? dense->epochs : 0, 1}};
    plot_line accuracy[] = {
        {"training", r->train_accuracy, r->epochs, 0},
        {"test", r->test_accuracy, r->epochs, 0},
        {"test, dense layer", dense ? dense->test_accuracy : NULL, dense ? dense->epochs : 0, 1},
        {"test, linear", level, r->epochs, 1},
    };
    if (!dense) accuracy[2] = accuracy[3];
    plot_begin(f, 960, draw_game(NULL, r) ? 1010 : 710, "CIFAR-10 with a Mixture of Experts");
    draw_game(f, r);
    plot_lines(f, &(plot_chart){{0, 0, 480, 330}, "Loss", "epoch", loss, dense ? 3 : 2, 0, 0});
    plot_lines(f, &(plot_chart){{480, 0, 480, 330}, "Accuracy", "epoch", accuracy, dense ? 4 : 3, 0, 0});
    plot_heat(f, &(plot_map){.box = {0, 340, 400, 360},
                             .title = "Load of the experts in training",
                             .x_label = "epoch",
                             .rows = r->experts,
                             .cols = r->epochs,
                             .value = load,
                             .hi = peak,
                             .col_first = 1,
                             .scale_format = "%.2f"});
    plot_heat(f, &(plot_map){.box = {400, 340, 560, 360},
                             .title = "Where the test images of a class go",
                             .x_label = "expert",
                             .rows = CLASSES,
                             .cols = r->experts,
                             .value = r->class_map,
                             .hi = share,
                             .row_name = cifar_class,
                             .format = r->experts <= 16 ? "%.2f" : NULL,
                             .scale_format = "%.2f"});
    plot_end(f);
    free(level);
    free(load);
}

static void write_page(const config *o, const result *r, const result *dense, score linear, const cifar *data) {
    char text[512], dead[96];
    FILE *f = open_output(o->out, "cifar10.html");
    snprintf(text, sizeof text, "%s, %zu experts, %zu epochs over %zu images, seed %llu, %.0f s, %.0f images/s.",
             r->name, r->experts, r->epochs, data->train.count, (unsigned long long)o->seed, r->seconds,
             r->images_per_s);
    page_begin(f, "CIFAR-10 with a Mixture of Experts", text);
    page_reading(f, r);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "model|test accuracy|test loss|parameters|active");
    for (const result *x = r; x; x = x == r ? dense : NULL)
        page_row(f, 0, "%s|%.2f%%|%.4f|%zu|%zu", x->name, 100 * x->test.accuracy, x->test.loss, x->params,
                 x->active_params);
    page_row(f, 0, "linear, on the pixels|%.2f%%|%.4f|30730|30730", 100 * linear.accuracy, linear.loss);
    page_table_end(f);
    page_card_end(f);
    page_card(f);
    draw(f, o, r, dense, linear);
    explain(r, text, sizeof text);
    if (*text) page_pre(f, text);
    page_card_end(f);
    page_heading(f, "The experts on the test images");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "expert|load|first choice|<classes");
    for (size_t e = 0; e < r->experts; e++) {
        top_classes(r, e, text, sizeof text);
        page_row(f, 0, "%zu|%.1f%%|%.1f%%|<%s", e, 100 * r->share[e], 100 * r->first[e], text);
    }
    page_table_end(f);
    page_card_end(f);
    dead_text(&r->dead, dead, sizeof dead);
    snprintf(text, sizeof text,
             "MaxVio %.3f, CV %.3f, entropy %.3f (1 = even), dead experts: %s, dropped %llu. Checksum %016llx.",
             r->health.maxvio, r->health.load_cv, r->health.load_entropy, dead,
             (unsigned long long)r->health.n_dropped, (unsigned long long)r->checksum);
    page_pre(f, text);
    page_end(f);
    close_output(f, "cifar10.html");
}

static void result_free(result *r) {
    if (r) free(r->train_loss), dead_free(&r->dead);
    free(r);
}

// ---- seeds ----

typedef struct many {
    result **mixture, **dense; // (seeds); dense NULL: not trained
} many;

// Mean and deviation of the models' test accuracy (0) or loss (1) over the seeds.
static spread over_seeds(const config *o, result *const *r, int loss) {
    double *value = allocate(o->seeds, sizeof *value);
    for (size_t s = 0; s < o->seeds; s++) value[s] = loss ? r[s]->test.loss : 100 * r[s]->test.accuracy;
    spread of = spread_of(o->seeds, value);
    free(value);
    return of;
}

static void write_seeds(json *j, const config *o, result *const *r) {
    spread accuracy = over_seeds(o, r, 0);
    accuracy.mean /= 100, accuracy.sd /= 100;
    json_begin(j);
    json_text(j, "event", "seeds");
    json_text(j, "system", r[0]->name);
    json_whole(j, "seeds", o->seeds);
    spread_json(j, "test_loss", over_seeds(o, r, 1));
    spread_json(j, "test_accuracy", accuracy);
    json_end(j);
}

static void print_seeds(FILE *f, const config *o, const many *runs) {
    char accuracy[64], loss[64];
    fprintf(f, "\n%-24s     test accuracy         test loss   mean +- deviation of %zu seeds\n", "", o->seeds);
    for (int i = 0; i < 2; i++) {
        result *const *r = i ? runs->dense : runs->mixture;
        if (!r[0]) continue;
        spread_text(over_seeds(o, r, 0), "%.2f%%", accuracy, sizeof accuracy);
        spread_text(over_seeds(o, r, 1), "%.4f", loss, sizeof loss);
        fprintf(f, "%-24s  %16s  %16s\n", r[0]->name, accuracy, loss);
    }
}

// The tables and pictures are the first seed's.
static many train_seeds(const config *o, const cifar *data, const moe_desc *desc, const moe_desc *dense, json *j) {
    many runs = {allocate(o->seeds, sizeof *runs.mixture), allocate(o->seeds, sizeof *runs.dense)};
    for (size_t s = 0; s < o->seeds; s++) {
        config one = *o;
        moe_desc mixture = *desc, beside = dense ? *dense : *desc;
        one.seed = o->seed + s;
        mixture.seed = beside.seed = desc->seed + s;
        runs.mixture[s] = train(&one, data, o->system, &mixture, j);
        if (dense) {
            runs.dense[s] = train(&one, data, "dense", &beside, j);
            write_final(j, runs.dense[s], "dense");
        }
        write_final(j, runs.mixture[s], "final");
    }
    if (o->seeds > 1 && dense) write_seeds(j, o, runs.dense);
    if (o->seeds > 1) write_seeds(j, o, runs.mixture);
    return runs;
}

static void many_free(const config *o, many *runs) {
    for (size_t s = 0; s < o->seeds; s++) result_free(runs->mixture[s]), result_free(runs->dense[s]);
    free(runs->mixture);
    free(runs->dense);
}

// ---- the program ----

static void parse(config *o, int argc, char **argv) {
    args_option options[] = {
        ARGS_DATA(&o->data),
        ARGS_EPOCHS(&o->epochs),
        ARGS_STEPS(&o->steps),
        ARGS_SEED(&o->seed),
        ARGS_SEEDS(&o->seeds),
        ARGS_THREADS(&o->threads),
        ARGS_ISA(&o->isa),
        ARGS_SYSTEM(&o->system, "a row of moe.h's table of systems (build/zoo lists them)"),
        ARGS_SET(&o->set),
        ARGS_EXPERTS(&o->experts),
        ARGS_TOP_K(&o->top_k),
        {"tokens", ARGS_FLAG, &o->tokens, NULL, "route each position of the last feature map, not the image", 0, 0},
        {"batch", ARGS_SIZE, &o->batch, "N", "images a step (0: by the data)", 0, 8192},
        {"optimizer", ARGS_TEXT, &o->optimizer, "NAME", "of the convolutions: muon or adamw (by the data)", 0, 0},
        {"activation", ARGS_TEXT, &o->activation, "NAME", "of the convolutions: gelu or relu (by the data)", 0, 0},
        {"convolution", ARGS_TEXT, &o->convolution, "NAME", "how: winograd or direct (by the data)", 0, 0},
        {"wide", ARGS_FLAG, &o->wide, NULL, "convolutions of 64 and 256 filters, more than twice the time", 0, 0},
        {"lr", ARGS_REAL, &o->lr, "X", "highest learning rate (0: by the data)", 0, 100},
        {"balance", ARGS_REAL, &o->balance, "X", "coefficient of the balance loss (0: the system's)", 0, 100},
        {"eval", ARGS_SIZE, &o->eval, "N", "test on the first N images only (0: all)", 0, 0},
        {"no-dense", ARGS_FLAG, &o->no_dense, NULL, "leave out the dense network that is trained for comparison", 0, 0},
        ARGS_OUT(&o->out),
        {"grow", ARGS_FLAG, &o->grow, NULL, "experts split on a plateau (dynmoe: grow and shrink by its rule)", 0, 0},
        {"scan", ARGS_FLAG, &o->scan, NULL, "test again at temperatures of the gate from 0.1 to 5", 0, 0},
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->quiet),
    };
    args_parse("cifar10", "Trains a small convolutional network with a Mixture-of-Experts layer on CIFAR-10.", options,
               sizeof options / sizeof *options, argc, argv);
    nn_isa("cifar10", o->isa);
    if (o->optimizer && strcmp(o->optimizer, "muon") != 0 && strcmp(o->optimizer, "adamw") != 0)
        args_fail("cifar10", "--optimizer: there is no '%s'; there are: muon, adamw", o->optimizer);
    if (o->activation && strcmp(o->activation, "gelu") != 0 && strcmp(o->activation, "relu") != 0)
        args_fail("cifar10", "--activation: there is no '%s'; there are: gelu, relu", o->activation);
    if (o->convolution && strcmp(o->convolution, "winograd") != 0 && strcmp(o->convolution, "direct") != 0)
        args_fail("cifar10", "--convolution: there is no '%s'; there are: winograd, direct", o->convolution);
    moe_desc desc = {0};
    nn_system("cifar10", &desc, o->system); // before anything is read
    nn_set("cifar10", &desc, o->set);
}

// What the data decide unless a flag does.
static void by_data(config *o, const cifar *data) {
    static const size_t small[] = {32, 64, FEATURES}, large[] = {32, 96, FEATURES};
    static const size_t wide[] = {64, 256, FEATURES};
    const size_t *width = data->sample ? small : large;
    memcpy(o->width, o->wide ? wide : width, sizeof o->width);
    if (!o->optimizer) o->optimizer = data->sample ? "adamw" : "muon";
    o->muon = strcmp(o->optimizer, "muon") == 0;
    if (!o->epochs) o->epochs = data->sample ? 20 : 5;
    if (!o->batch) o->batch = data->sample ? 50 : 250;
    if (o->lr <= 0) o->lr = data->sample ? 2e-3 : 6e-3;
    o->shift = data->sample ? 4 : 2;
    if (!o->activation) o->activation = data->sample ? "relu" : "gelu";
    o->gelu = strcmp(o->activation, "gelu") == 0;
    if (!o->convolution) o->convolution = data->sample ? "direct" : "winograd";
    o->winograd = strcmp(o->convolution, "winograd") == 0;
    o->smoothing = data->sample ? 0.1f : 0.2f;
    o->decay = 0.05f;
    if (o->batch > data->train.count) args_fail("cifar10", "--batch: only %zu training images", data->train.count);
}

static moe_desc mixture_desc(const config *o, const cifar *data) {
    moe_desc desc = {0};
    nn_must(moe_desc_system(&desc, o->system));
    desc.d_model = FEATURES;
    if (!desc.d_ff && desc.expert != MOE_EXPERT_ORTHONORMAL) desc.d_ff = desc.n_experts == 1 ? 2 * D_FF : D_FF;
    if (o->experts) desc.n_experts = o->experts;
    if (o->top_k) nn_top_k(&desc, o->top_k);
    if (desc.loss[MOE_LOSS_SWITCH] > 0) desc.loss[MOE_LOSS_SWITCH] = balance_weight;
    if (o->balance > 0) desc.loss[MOE_LOSS_SWITCH] = (float)o->balance;
    nn_set("cifar10", &desc, o->set);
    size_t side = CIFAR_SIDE - 1; // of the last feature map
    for (int i = 0; i < CIFAR_BLOCKS; i++) side /= 2;
    desc.sequence = o->tokens ? side * side : 1; // an image
    if (desc.schedule_steps) desc.schedule_steps = data->train.count / o->batch * o->epochs * 3 / 4;
    desc.weight_decay = o->decay;
    desc.seed = o->seed + 1;
    if (o->grow && !by_dynmoe(o)) desc.growth = MOE_ON;
    desc.parallel.n_threads = o->threads;
    nn_resolve("cifar10", "", &desc);
    return desc;
}

// One expert, as wide as all that one token of the mixture uses.
static moe_desc dense_desc(const config *o, const moe_desc *mixture) {
    moe_desc dense = {0};
    nn_must(moe_desc_system(&dense, "dense"));
    dense.d_model = FEATURES;
    dense.d_ff = mixture->top_k * mixture->d_ff;
    dense.expert = mixture->expert == MOE_EXPERT_ORTHONORMAL ? MOE_EXPERT_SWIGLU : mixture->expert;
    dense.weight_decay = o->decay;
    dense.seed = mixture->seed;
    dense.parallel = mixture->parallel;
    nn_must(moe_desc_resolve(&dense, &dense));
    return dense;
}

static score linear_baseline(const config *o, const moe_parallel *parallel, const cifar *data, json *j) {
    score linear = train_linear(o, parallel, data);
    json_begin(j);
    json_text(j, "event", "linear");
    json_real(j, "test_loss", linear.loss);
    json_real(j, "test_accuracy", linear.accuracy);
    json_end(j);
    return linear;
}

static void report(const config *o, const cifar *data, const result *r, const result *other, score linear,
                   FILE *human) {
    FILE *svg = open_output(o->out, "cifar10.svg");
    draw(svg, o, r, other, linear);
    close_output(svg, "cifar10.svg");
    write_page(o, r, other, linear, data);
    print_tables(human, r, other, linear);
    char text[512];
    explain(r, text, sizeof text);
    if (*text) fprintf(human, "\n%s\n", text);
    if (r->experts > 1) {
        reading x = reading_of(r);
        fprintf(human, "\n%s\n", reading_title);
        reading_print(human, "the mixture", &x);
    }
    fprintf(human, "\nchecksum %016llx; %.1f s; see %s/cifar10.html, .svg, .jsonl\n", (unsigned long long)r->checksum,
            r->seconds, o->out);
}

int main(int argc, char **argv) {
    config o = {.system = "mixtral", .isa = "auto", .out = "out", .seed = 1, .seeds = 1};
    cifar data;
    parse(&o, argc, argv);
    cifar_load(&data, o.data, argv[0]);
    by_data(&o, &data);
    moe_desc desc = mixture_desc(&o, &data), dense = dense_desc(&o, &desc);
    int beside = !o.no_dense && desc.n_experts > 1 && !o.steps; // a run cut short compares nothing

    FILE *human = o.json ? stderr : stdout;
    json j = {{open_output(o.out, "cifar10.jsonl"), o.json ? stdout : NULL}, 0};
    write_config(&j, &o, &desc, &data);
    fprintf(human, "CIFAR-10%s: %zu training and %zu test images; %s, %zu thread%s\n", data.sample ? " sample" : "",
            data.train.count, data.test.count, moe_isa_name(moe_active_isa()), moe_workers(&desc.parallel),
            moe_workers(&desc.parallel) == 1 ? "" : "s");
    fflush(human);
    score linear = linear_baseline(&o, &desc.parallel, &data, &j);
    many runs = train_seeds(&o, &data, &desc, beside ? &dense : NULL, &j);
    close_output(j.file[0], "cifar10.jsonl");
    report(&o, &data, runs.mixture[0], runs.dense[0], linear, human);
    if (o.seeds > 1) print_seeds(human, &o, &runs);
    many_free(&o, &runs);
    cifar_free(&data);
    return 0;
}
