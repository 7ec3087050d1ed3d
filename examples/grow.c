// grow.c - a mixture that grows while it learns, and what keeps growth sane.
//
//     build/grow              three acts on a sample of MNIST: no brakes; a cooldown; cooldown, entropy loss, weak seed
//     build/grow --data DIR   the same on all of MNIST
//     build/grow --compare    growing against starting large, with and without cooldown, and shrinking: over seeds
//
// The story behind the acts is a press account (BorisovAI, 2026-02-08): growth that fired every epoch while two of
// twelve experts did the work, until a cooldown, an entropy loss and a weaker seed model made it fire once.
#include "common/args.h"
#include "common/digits_net.h"
#include "common/json.h"
#include "common/lanes.h"
#include "common/plot.h"
#include "common/progress.h"
#include "common/spread.h"

enum { MAX_EPOCHS = LANES_EPOCHS, MAX_SEEDS = 64, TEXT = 200 };

typedef struct config {
    const char *data, *isa, *out;
    size_t seeds, hidden; // hidden: of a seed model's expert
    double target, entropy;
    int json, quiet, compare;
    digits_plan plan;
    mnist pictures;
    FILE *human;
    json lines;
} config;

// ---- one training that may grow ----

typedef struct recipe {
    const char *key, *title;
    size_t experts, hidden; // at the start
    float entropy;          // coefficient of its loss
    moe_growth growth;      // the controller, with its brakes
    float noise, share;     // of a clone, in place of a split: MOE_OFF = split
    size_t shrink_to;       // 0, or the experts that are left after half of the epochs ...
    int shrink_by;          // ... by moe_worth_kind, or SHRINK_MERGE
} recipe;
enum { SHRINK_MERGE = MOE_WORTH_COUNT };

typedef struct epoch_note {
    double accuracy, loss, entropy, flops; // flops: of the training so far
    size_t experts, used;
    double utilisation[LANES_MOST]; // share of the test pictures that select the expert
    char event[16], reason[TEXT];
} epoch_note;

typedef struct story {
    const recipe *recipe;
    uint64_t seed;
    epoch_note epoch[MAX_EPOCHS];
    size_t epochs, events;
    lanes picture;
} story;

// Multiplications and additions, twice for the backward's two products: of a picture in training.
static double picture_flops(const digits_net *m, const digits_plan *o) {
    double around = 2.0 * (double)(o->width * (MNIST_PIXELS + MNIST_CLASSES));
    return 3 * (around + 2.0 * (double)moe_layer_active_params(m->moe));
}

// How the layer did on the test set: of every network, those that are bound to a parent too.
static void note_health(epoch_note *note, digits_net *m, size_t pictures) {
    moe_health health;
    const moe_desc *desc = moe_layer_desc(m->moe);
    size_t routed = desc->n_experts, n = routed + desc->n_bound;
    double selected = 0;
    nn_must(moe_layer_health(m->moe, &health));
    note->entropy = health.entropy;
    note->experts = n;
    for (size_t e = 0; e < routed; e++) note->utilisation[e] = (double)health.load[e] / (double)pictures;
    for (size_t b = 0; b < desc->n_bound; b++) {
        note->utilisation[routed + b] = (double)m->bound[b] / (double)pictures;
        note->utilisation[m->parent[b]] -= note->utilisation[routed + b];
    }
    for (size_t e = 0; e < n; e++) selected += note->utilisation[e];
    note->used = 0;
    for (size_t e = 0; e < n; e++) note->used += note->utilisation[e] >= 0.1 * selected / (double)n;
}

// The gradients of one batch, for an expert's utility; they are thrown away.
static void utility(digits_net *m, const config *o, double *worth) {
    const mnist_set *set = &o->pictures.train;
    for (size_t i = 0; i < o->plan.batch; i++) digits_take(m, i, set, i % set->count);
    digits_forward(m, &o->plan, o->plan.batch, 0);
    nn_cross_entropy(&m->ops, o->plan.batch, MNIST_CLASSES, 0, m->logits, m->label, m->prob, m->dlogits);
    digits_backward(m, &o->plan, o->plan.batch);
    nn_must(moe_layer_worth(m->moe, MOE_WORTH_GRADIENT, NULL, 0, worth));
    nn_must(moe_layer_scale_grads(m->moe, 0));
}

// What the controller decides after an epoch, carried out.
static void grow(story *s, epoch_note *note, digits_net *m, const config *o) {
    const recipe *r = s->recipe;
    double worth[LANES_MOST];
    moe_health health;
    moe_layer *next = NULL;
    moe_growth *g = moe_layer_growth(m->moe);
    int by_utility = g->which == MOE_GROWTH_HIGHEST_UTILITY;
    if (by_utility) utility(m, o, worth);
    nn_must(moe_layer_health(m->moe, &health));
    nn_must(moe_growth_step(g, note->accuracy, &health, by_utility ? worth : NULL));
    snprintf(note->reason, sizeof note->reason, "%s", g->reason);
    if (g->release && moe_layer_desc(m->moe)->n_bound) {
        nn_must(moe_layer_release(&next, m->moe, 0));
        digits_exchange(m, next);
        g = moe_layer_growth(m->moe);
    }
    if (g->decision != MOE_GROWTH_SPLIT) return;
    size_t parent = g->expert;
    moe_growth_data seen = {.x = m->x, .n_tokens = m->rows, .seed = s->seed};
    if (r->noise >= 0)
        nn_must(moe_layer_clone(&next, m->moe, parent, r->noise, r->share, s->seed + s->epochs));
    else
        nn_must(moe_layer_split(&next, m->moe, parent, &seen));
    digits_exchange(m, next);
    if (moe_layer_desc(m->moe)->n_bound) m->parent[moe_layer_desc(m->moe)->n_bound - 1] = parent;
    lanes_split(&s->picture, s->epochs, parent);
    snprintf(note->event, sizeof note->event, "split");
    s->events++;
}

// Half of the epochs are over: down to shrink_to experts.
static void shrink(story *s, epoch_note *note, digits_net *m) {
    const recipe *r = s->recipe;
    size_t n = moe_layer_desc(m->moe)->n_experts, gone[LANES_MOST], count = 0;
    double worth[LANES_MOST];
    moe_layer *next = NULL;
    if (r->shrink_by == SHRINK_MERGE) {
        nn_must(moe_layer_merge_to(&next, m->moe, r->shrink_to, m->x, m->rows, NULL));
    } else {
        nn_must(moe_layer_worth(m->moe, (moe_worth_kind)r->shrink_by, m->x, m->rows, worth));
        for (; count < n - r->shrink_to; count++) {
            size_t least = 0;
            for (size_t e = 1; e < n; e++)
                if (worth[e] < worth[least]) least = e;
            gone[count] = least;
            worth[least] = INFINITY;
        }
        nn_must(moe_layer_prune(&next, m->moe, count, gone));
    }
    digits_exchange(m, next);
    snprintf(note->event, sizeof note->event, "%s", r->shrink_by == SHRINK_MERGE ? "merge" : "prune");
    s->events++;
}

static moe_desc layer_desc(const recipe *r, const config *o, uint64_t seed) {
    moe_desc d = {0};
    d.d_model = o->plan.width;
    d.n_experts = r->experts;
    d.top_k = 2;
    d.d_ff = r->hidden;
    d.expert = MOE_EXPERT_RELU;
    d.seed = seed;
    d.growth = MOE_ON;
    d.loss[MOE_LOSS_ENTROPY] = r->entropy;
    d.parallel.n_threads = o->plan.threads;
    return d;
}

static void epoch_line(json *j, const story *s, size_t epoch) {
    const epoch_note *note = &s->epoch[epoch];
    json_begin(j);
    json_text(j, "act", s->recipe->key);
    json_whole(j, "epoch", epoch + 1);
    json_real(j, "accuracy", note->accuracy);
    json_whole(j, "experts", note->experts);
    json_whole(j, "used", note->used);
    json_real(j, "entropy", note->entropy);
    json_list_begin(j, "utilisation");
    for (size_t e = 0; e < note->experts; e++) json_real(j, NULL, note->utilisation[e]);
    json_list_end(j);
    json_text(j, "event", note->event);
    json_text(j, "reason", note->reason);
    json_whole(j, "seed", s->seed);
    json_end(j);
}

static void train(story *s, const recipe *r, config *o, uint64_t seed, progress *bar, size_t before) {
    digits_plan plan = o->plan;
    plan.seed = seed;
    moe_desc desc = layer_desc(r, o, seed);
    digits_net *m = digits_new(&plan, &desc);
    double flops = 0;
    memset(s, 0, sizeof *s);
    s->recipe = r;
    s->seed = seed;
    *moe_layer_growth(m->moe) = r->growth;
    lanes_begin(&s->picture, r->title, r->experts);
    for (; s->epochs < plan.epochs; s->epochs++) {
        epoch_note *note = &s->epoch[s->epochs];
        flops += picture_flops(m, &plan) * (double)(o->pictures.train.count / plan.batch * plan.batch);
        note->flops = flops;
        note->loss = digits_epoch(m, &plan, &o->pictures.train, s->epochs);
        note->accuracy = digits_test(m, &plan, &o->pictures.test);
        note_health(note, m, o->pictures.test.count);
        lanes_epoch(&s->picture, s->epochs, note->experts, note->utilisation);
        if (r->shrink_to && s->epochs + 1 == plan.epochs / 2) shrink(s, note, m);
        else if (s->epochs + 1 < plan.epochs) grow(s, note, m, o); // after the last there is nothing to grow for
        if (!o->compare) epoch_line(&o->lines, s, s->epochs);
        progress_update(bar, before + s->epochs + 1, "%s: %.2f%%, %zu experts", r->title, 100 * note->accuracy,
                        note->experts);
    }
    digits_free(m);
}

// ---- the three acts ----

enum { ACTS = 3 };
static void acts_make(recipe act[ACTS], const config *o) {
    static const char *const title[ACTS] = {"no brakes", "cooldown only", "cooldown, entropy loss, weak seed"};
    static const char *const key[ACTS] = {"a", "b", "c"};
    for (int k = 0; k < ACTS; k++) {
        moe_growth *g = &act[k].growth;
        act[k] = (recipe){.key = key[k], .title = title[k], .experts = 8, .hidden = 2 * o->hidden, .noise = MOE_OFF};
        g->newborn_share = MOE_OFF;
        g->delta = 0.002f;
        if (k == 0) g->window = g->cooldown = MOE_OFF;
        if (k < 2) continue;
        g->target = (float)o->target;
        act[k].experts = 3;
        act[k].hidden = o->hidden;
        act[k].entropy = (float)o->entropy;
        g->newborn_share = 0;
    }
}

static const epoch_note *last(const story *s) { return &s->epoch[s->epochs - 1]; }
static const epoch_note *best(const story *s) {
    const epoch_note *most = s->epoch;
    for (size_t k = 1; k < s->epochs; k++)
        if (s->epoch[k].accuracy > most->accuracy) most = &s->epoch[k];
    return most;
}

static void act_line(json *j, const story *s) {
    json_begin(j);
    json_text(j, "event", "final");
    json_text(j, "act", s->recipe->key);
    json_whole(j, "growth_events", s->events);
    json_whole(j, "experts", last(s)->experts);
    json_whole(j, "used", last(s)->used);
    json_real(j, "accuracy", best(s)->accuracy);
    json_real(j, "entropy", last(s)->entropy);
    json_whole(j, "seed", s->seed);
    json_end(j);
}

static void utilisation_text(const epoch_note *note, char out[TEXT]) {
    size_t at = 0;
    *out = 0;
    for (size_t e = 0; e < note->experts && at + 8 < TEXT; e++)
        at += (size_t)snprintf(out + at, TEXT - at, "%s%.0f", e ? "/" : "", 100 * note->utilisation[e]);
    if (at + 8 < TEXT) snprintf(out + at, TEXT - at, "%%");
}

// The story's own figures [P]: of acts a and c.
static const char *const told[ACTS] = {
    "growth every epoch, 8 to 17 experts; 2 of 12 used (84/88%); 97.0-97.3%",
    "(not told)",
    "1 event; 84/79/37%; entropy 0.48 -> 1.07; 97.11%",
};

static void print_acts(FILE *human, const story *s) {
    char text[TEXT];
    fprintf(human, "%-4s%-36s%7s%9s%6s%16s%10s\n", "act", "", "events", "experts", "used", "entropy", "accuracy");
    for (int k = 0; k < ACTS; k++) {
        const epoch_note *end = last(&s[k]);
        fprintf(human, "%-4s%-36s%7zu%9zu%6zu%8.2f -> %4.2f%9.2f%%\n", s[k].recipe->key, s[k].recipe->title,
                s[k].events, end->experts, end->used, s[k].epoch[0].entropy, end->entropy, 100 * best(&s[k])->accuracy);
        utilisation_text(end, text);
        fprintf(human, "    utilisation %s\n    the story: %s\n", text, told[k]);
        for (size_t e = 0; e < s[k].epochs; e++)
            if (*s[k].epoch[e].event)
                fprintf(human, "    epoch %2zu: %s\n", e + 1, s[k].epoch[e].reason);
    }
}

static void draw_acts(FILE *f, const story *s) {
    plot_begin(f, 1080, 420, "Experts as lanes: three acts of growth");
    for (int k = 0; k < ACTS; k++) lanes_draw(f, &s[k].picture, (plot_box){360 * k, 0, 360, 420});
    plot_end(f);
}

static void acts_page(const config *o, const story *s) {
    char about[TEXT], text[TEXT];
    FILE *f = open_output(o->out, "grow.html");
    snprintf(about, sizeof about, "%zu epochs on %zu pictures of MNIST; the target is %.2f%%. Seed %llu.", s->epochs,
             o->pictures.train.count, 100 * o->target, (unsigned long long)s->seed);
    page_begin(f, "Growing experts, in three acts", about);
    page_card(f);
    draw_acts(f, s);
    page_card_end(f);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "<act|events|experts|used|entropy|accuracy|<utilisation|<the story");
    for (int k = 0; k < ACTS; k++) {
        utilisation_text(last(&s[k]), text);
        page_row(f, 0, "<%s: %s|%zu|%zu|%zu|%.2f|%.2f%%|<%s|<%s", s[k].recipe->key, s[k].recipe->title, s[k].events,
                 last(&s[k])->experts, last(&s[k])->used, last(&s[k])->entropy, 100 * best(&s[k])->accuracy, text,
                 told[k]);
    }
    page_table_end(f);
    page_card_end(f);
    page_heading(f, "What happened, and why");
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "act|epoch|<event|<reason");
    for (int k = 0; k < ACTS; k++)
        for (size_t e = 0; e < s[k].epochs; e++)
            if (*s[k].epoch[e].event)
                page_row(f, 0, "%s|%zu|<%s|<%s", s[k].recipe->key, e + 1, s[k].epoch[e].event, s[k].epoch[e].reason);
    page_table_end(f);
    page_card_end(f);
    page_end(f);
    close_output(f, "grow.html");
}

static void run_acts(config *o) {
    static story s[ACTS], now;
    recipe act[ACTS];
    acts_make(act, o);
    progress bar = progress_begin("grow", "epochs", o->seeds * ACTS * o->plan.epochs, o->quiet);
    for (size_t seed = 0; seed < o->seeds; seed++)
        for (size_t k = 0; k < ACTS; k++) {
            train(&now, &act[k], o, o->plan.seed + seed, &bar, (seed * ACTS + k) * o->plan.epochs);
            act_line(&o->lines, &now);
            if (seed == 0) s[k] = now;
        }
    progress_clear(&bar);
    FILE *svg = open_output(o->out, "grow.svg");
    draw_acts(svg, s);
    close_output(svg, "grow.svg");
    acts_page(o, s);
    print_acts(o->human, s);
}

// ---- growing against starting large ----

enum { SMALL = 3, LARGE = 6, STRATEGIES = 11 };
enum { FROM_START, SPLIT_COOLDOWN, SPLIT_NONE, NOISE, HALF, UTILITY, STAYS_SMALL, BY_USAGE, BY_GATE, BY_REAP, MERGED };

static void strategies_make(recipe all[STRATEGIES], const config *o) {
    static const struct {
        const char *key, *title;
    } name[STRATEGIES] = {{"large", "6 experts from the start"}, {"split", "3, split to 6, cooldown"},
                          {"split-at-once", "3, split to 6, no cooldown"}, {"noise", "3, cloned with noise"},
                          {"half", "3, cloned, half drawn anew"}, {"utility", "3, split by gradient utility"},
                          {"small", "3 experts throughout"}, {"prune-usage", "6, pruned to 3 by usage"},
                          {"prune-gate", "6, pruned to 3 by gate"}, {"prune-reap", "6, pruned to 3 by REAP"},
                          {"merge", "6, merged to 3"}};
    for (int k = 0; k < STRATEGIES; k++) {
        moe_growth *g = &all[k].growth;
        int large = k == FROM_START || k >= BY_USAGE;
        all[k] = (recipe){.key = name[k].key, .title = name[k].title, .experts = large ? LARGE : SMALL,
                          .hidden = o->hidden, .entropy = (float)o->entropy, .noise = MOE_OFF};
        g->action = large || k == STAYS_SMALL ? MOE_GROWTH_NONE : MOE_GROWTH_SPLIT;
        g->max_experts = LARGE;
        g->window = MOE_OFF; // grow as soon as the cooldown lets: the number of experts is what is compared
        g->newborn_share = MOE_OFF;
        g->cooldown = k == SPLIT_NONE ? MOE_OFF : 3;
        if (k == UTILITY) g->which = MOE_GROWTH_HIGHEST_UTILITY;
        if (k == NOISE) all[k].noise = 0.05f;
        if (k == HALF) all[k].noise = 0, all[k].share = 0.5f;
        if (k < BY_USAGE) continue;
        static const int by[] = {MOE_WORTH_USAGE, MOE_WORTH_GATE, MOE_WORTH_SALIENCY, SHRINK_MERGE};
        all[k].shrink_to = SMALL;
        all[k].shrink_by = by[k - BY_USAGE];
    }
}

typedef struct outcome {
    double accuracy[MAX_SEEDS], curve[MAX_EPOCHS]; // of the last epoch; mean over the seeds
    double flops;
    size_t experts;
} outcome;

// "A - B in points": of the same seeds.
static void sentence(char out[TEXT], const char *what, const outcome *a, const outcome *b, size_t seeds) {
    double difference[MAX_SEEDS];
    const char *verdict = "no difference can be told";
    for (size_t i = 0; i < seeds; i++) difference[i] = 100 * (a->accuracy[i] - b->accuracy[i]);
    spread v = spread_of(seeds, difference);
    double lo = v.mean - spread_half(v), hi = v.mean + spread_half(v);
    if (lo > 0) verdict = "it helps";
    if (hi < 0) verdict = "it hurts";
    snprintf(out, TEXT, "%s: %+.2f points [%.2f, %.2f]: %s.", what, v.mean, lo, hi, verdict);
}

static void draw_compare(FILE *f, const recipe *r, const outcome *all, const config *o) {
    static const int shown[] = {FROM_START, SPLIT_COOLDOWN, SPLIT_NONE, STAYS_SMALL};
    plot_line line[4];
    plot_point point[STRATEGIES];
    plot_begin(f, 1080, 400, "Growing against starting large");
    for (int k = 0; k < 4; k++) line[k] = (plot_line){r[shown[k]].key, all[shown[k]].curve, o->plan.epochs, k > 1};
    plot_lines(f, &(plot_chart){.box = {0, 0, 480, 400}, .title = "accuracy on the test set, %", .x_label = "epoch",
                                .line = line, .n_lines = 4});
    for (int k = 0; k < STRATEGIES; k++)
        point[k] = (plot_point){all[k].flops / 1e9, 100 * spread_of(o->seeds, all[k].accuracy).mean, r[k].key,
                                k >= BY_USAGE};
    plot_scatter(f, &(plot_cloud){.box = {480, 0, 600, 400}, .title = "Quality against what the training costs",
                                  .x_label = "GFLOP", .y_label = "accuracy, %", .point = point,
                                  .n_points = STRATEGIES});
    plot_end(f);
}

static void report_compare(config *o, const recipe *r, const outcome *all) {
    char cooldown[TEXT], growing[TEXT], cells[TEXT];
    sentence(cooldown, "What the cooldown buys (split with it against without)",
             &all[SPLIT_COOLDOWN], &all[SPLIT_NONE], o->seeds);
    sentence(growing, "Growing (split, cooldown) against 6 experts from the start",
             &all[SPLIT_COOLDOWN], &all[FROM_START], o->seeds);
    FILE *svg = open_output(o->out, "grow_compare.svg"), *page = open_output(o->out, "grow_compare.html");
    draw_compare(svg, r, all, o);
    close_output(svg, "grow_compare.svg");
    snprintf(cells, sizeof cells, "%zu seeds, %zu epochs, %zu pictures of MNIST.", o->seeds, o->plan.epochs,
             o->pictures.train.count);
    page_begin(page, "Growing against starting large", cells);
    page_card(page);
    draw_compare(page, r, all, o);
    page_table_begin(page);
    page_row(page, 1, "<strategy|experts|GFLOP|accuracy|95%% interval");
    fprintf(o->human, "%-34s%9s%9s%10s   %s\n", "strategy", "experts", "GFLOP", "accuracy", "95% interval");
    for (int k = 0; k < STRATEGIES; k++) {
        spread v = spread_of(o->seeds, all[k].accuracy);
        double lo = v.mean - spread_half(v), hi = v.mean + spread_half(v);
        fprintf(o->human, "%-34s%9zu%9.1f%9.2f%%   %.2f to %.2f\n", r[k].title, all[k].experts, all[k].flops / 1e9,
                100 * v.mean, 100 * lo, 100 * hi);
        page_row(page, 0, "<%s|%zu|%.1f|%.2f%%|%.2f to %.2f", r[k].title, all[k].experts, all[k].flops / 1e9,
                 100 * v.mean, 100 * lo, 100 * hi);
        json_begin(&o->lines);
        json_text(&o->lines, "event", "final");
        json_text(&o->lines, "strategy", r[k].key);
        json_whole(&o->lines, "seeds", o->seeds);
        json_whole(&o->lines, "experts", all[k].experts);
        json_real(&o->lines, "flops", all[k].flops);
        json_real(&o->lines, "accuracy", v.mean);
        json_real(&o->lines, "accuracy_lo", lo);
        json_real(&o->lines, "accuracy_hi", hi);
        json_end(&o->lines);
    }
    page_table_end(page);
    page_pre(page, cooldown);
    page_pre(page, growing);
    page_card_end(page);
    page_end(page);
    close_output(page, "grow_compare.html");
    fprintf(o->human, "\n%s\n%s\n", cooldown, growing);
}

static void run_compare(config *o) {
    static outcome all[STRATEGIES];
    static story s;
    recipe r[STRATEGIES];
    strategies_make(r, o);
    progress bar = progress_begin("compare", "epochs", o->seeds * STRATEGIES * o->plan.epochs, o->quiet);
    for (size_t k = 0, done = 0; k < STRATEGIES; k++)
        for (size_t seed = 0; seed < o->seeds; seed++, done += o->plan.epochs) {
            train(&s, &r[k], o, o->plan.seed + seed, &bar, done);
            all[k].accuracy[seed] = last(&s)->accuracy;
            all[k].flops = last(&s)->flops;
            all[k].experts = last(&s)->experts;
            for (size_t e = 0; e < s.epochs; e++)
                all[k].curve[e] += 100 * s.epoch[e].accuracy / (double)o->seeds;
        }
    progress_clear(&bar);
    report_compare(o, r, all);
}

// ---- the program ----

static void parse(config *o, int argc, char **argv) {
    args_option options[] = {
        ARGS_DATA(&o->data),
        ARGS_EPOCHS(&o->plan.epochs),
        ARGS_SEED(&o->plan.seed),
        {"seeds", ARGS_SIZE, &o->seeds, "N", "so many seeds, from --seed on (0: 1; with --compare 5)", 0, MAX_SEEDS},
        ARGS_THREADS(&o->plan.threads),
        ARGS_ISA(&o->isa),
        {"compare", ARGS_FLAG, &o->compare, NULL, "growing against starting large, and shrinking", 0, 0},
        {"target", ARGS_REAL, &o->target, "X", "accuracy at which growth stops (0: 0.93, full data 0.97)", 0, 1},
        {"hidden", ARGS_SIZE, &o->hidden, "N", "hidden units of an expert of the weak seed", 1, 4096},
        {"entropy", ARGS_REAL, &o->entropy, "X", "coefficient of the entropy loss in act c", 0, 1e3},
        {"batch", ARGS_SIZE, &o->plan.batch, "N", "pictures a step", 1, 8192},
        {"lr", ARGS_REAL, &o->plan.lr, "X", "learning rate at first", 0, 1e30},
        ARGS_OUT(&o->out),
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->quiet),
    };
    args_parse("grow", "Lets a mixture grow while it learns MNIST, with and without the brakes that growth needs.",
               options, sizeof options / sizeof *options, argc, argv);
    nn_isa("grow", o->isa);
    if (!o->plan.epochs) o->plan.epochs = 16;
    if (o->plan.epochs > MAX_EPOCHS) args_fail("grow", "--epochs: at most %d", MAX_EPOCHS);
    if (!o->seeds) o->seeds = o->compare ? 5 : 1;
    mnist_load(&o->pictures, o->data, argv[0]);
    if (o->target <= 0) o->target = o->pictures.sample ? 0.93 : 0.97;
    if (o->plan.batch > o->pictures.train.count)
        args_fail("grow", "--batch: only %zu training pictures", o->pictures.train.count);
}

static void write_config(config *o) {
    json *j = &o->lines;
    json_config(j, "grow");
    json_text(j, "data", o->data ? o->data : "sample");
    json_whole(j, "train_pictures", o->pictures.train.count);
    json_whole(j, "test_pictures", o->pictures.test.count);
    json_whole(j, "seed", o->plan.seed);
    json_whole(j, "seeds", o->seeds);
    json_whole(j, "epochs", o->plan.epochs);
    json_whole(j, "batch", o->plan.batch);
    json_whole(j, "width", o->plan.width);
    json_whole(j, "hidden", o->hidden);
    json_real(j, "lr", o->plan.lr);
    json_real(j, "target", o->target);
    json_real(j, "entropy_loss", o->entropy);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_end(j);
}

int main(int argc, char **argv) {
    static config o = {.isa = "auto", .out = "out", .hidden = 6, .entropy = 0.05,
                       .plan = {.batch = 100, .width = 64, .threads = 1, .seed = 1, .lr = 0.003}};
    parse(&o, argc, argv);
    const char *file = o.compare ? "grow_compare.jsonl" : "grow.jsonl";
    o.human = o.json ? stderr : stdout;
    o.lines = (json){{open_output(o.out, file), o.json ? stdout : NULL}, 0};
    write_config(&o);
    double begin = seconds_now();
    fprintf(o.human, "MNIST%s: %zu training and %zu test pictures\n", o.pictures.sample ? " sample" : "",
            o.pictures.train.count, o.pictures.test.count);
    if (o.compare) run_compare(&o);
    else run_acts(&o);
    const char *name = o.compare ? "grow_compare" : "grow";
    fprintf(o.human, "\n%.1f s; see %s/%s.html, .svg, .jsonl\n", seconds_now() - begin, o.out, name);
    close_output(o.lines.file[0], file);
    mnist_free(&o.pictures);
    return 0;
}
