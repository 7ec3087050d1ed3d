// mot.c - three-stage training of a mixture of transformers, and whether its theory's claims are borne out.
//
//     build/mot                  under 40 s
//     build/mot --seed 2         another task, other parameters
//
// The theory: let an expert be attention and feed-forward together, route whole sequences, and train in three stages:
// (I) feed-forward with the attention frozen, which makes each expert a specialist of a class; (II) attention with the
// feed-forward frozen; (III) feed-forward again. Claimed: the loss falls at a linear rate (O(log 1/eps) steps; a line
// on this program's plot) where one transformer needs O(1/eps), and without attention experts it stops at a floor.
// Beside it train an end-to-end baseline, one without attention and one transformer, all with the same steps and data.
//
// The task is our own: a mixture of N classes of sequences of 8 tokens. Class n has three directions: c_n says the
// class, k_n marks the token that counts, v_n carries the label. A sequence holds, in any order, the token c_n, the
// token k_n + label v_n, three distractors k_m +- v_m of other classes with signs that say nothing, and three of noise.
// A small constant lets all tokens ask the same question. The answer, the mean over the tokens of the sum of the
// output, should be the label, +1 or -1; the loss is half the squared error on sequences that are not trained on.
//
// moe.h's row "mot" does the routing (by the mean of a sequence, top-1, uniform noise) and the feed-forward experts;
// the attention between them is common/attention.h. Since the experts read what the attention makes of the tokens that
// the router saw, there are two tapes: one that routes, one whose routes are filled from it. The noise is larger than
// the row's, and there is a balance loss, which the row has not: without them one expert takes all classes. The router
// learns in stage I only. Sizes and rates were found with seed 1; with others fewer claims are borne out.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/attention.h"
#include "common/json.h"
#include "common/plot.h"
#include "common/progress.h"
#include "common/rates.h"

enum { L = 8, DISTRACTORS = 3, D = 32, D_FF = 16, POINTS = 25, STAGES = 3, ALL = STAGES * POINTS };
enum { MAX_CLASSES = 10, MAX_EXPERTS = 64 };
enum { ROUTER = 1, FEED_FORWARD = 2, ATTENTION = 4, EVERYTHING = 7 }; // what learns in a stage

typedef struct config {
    size_t steps, batch, test, classes, experts, threads; // steps of a stage
    uint64_t seed;
    double lr, noise, gain;
    const char *isa, *out;
    int json, quiet;
} config;

typedef struct plan {
    const char *name, *key;
    size_t experts, d_ff;
    int learns[STAGES];
} plan;

typedef struct result {
    const plan *plan;
    double loss[ALL], first;                         // on the test sequences; first: before training
    double purity, share[MAX_CLASSES * MAX_EXPERTS]; // after stage I
    verdict rate;                                    // of stage II
    size_t params;
    uint64_t checksum;
} result;

// ---- the task ----

typedef struct batch {
    float *x, *label; // (n, L, D), (n)
    unsigned char *class;
} batch;

static batch batch_new(nn *s, size_t n) {
    return (batch){nn_floats(s, n * L * D), nn_floats(s, n), allocate(n, 1)};
}

// n sequences, made from (seed, stream) alone.
static void batch_fill(batch *b, const config *o, size_t n, uint64_t stream) {
    float gain = (float)o->gain;
    size_t N = o->classes;
    nn_must(moe_rand_normal(o->seed, 2 * stream, n * L * D, 0, (float)o->noise, b->x));
    for (size_t i = 0; i < n; i++) {
        uint32_t draw[4 * L];
        size_t place[L];
        for (size_t k = 0; k < 4 * L; k++) draw[k] = moe_rand_u32(o->seed, 2 * stream + 1, i * 4 * L + k);
        for (size_t k = 0; k < L; k++) place[k] = k;
        for (size_t k = L - 1; k > 0; k--) { // a shuffle
            size_t j = draw[k] % (k + 1), keep = place[k];
            place[k] = place[j];
            place[j] = keep;
        }
        size_t class = draw[L] % N;
        b->class[i] = (unsigned char)class;
        b->label[i] = draw[L + 1] & 1 ? 1.0f : -1.0f;
        for (size_t k = 0; k < L; k++) {
            float *token = b->x + (i * L + place[k]) * D;
            if (k < 2 + DISTRACTORS) memset(token, 0, D * sizeof(float));
            token[0] = 0.2f;
            if (k == 0) token[1 + class] = gain;
            if (k == 0 || k >= 2 + DISTRACTORS) continue;
            size_t m = k == 1 ? class : (class + 1 + draw[2 * L + k] % (N - 1)) % N; // a distractor is of another class
            float sign = k == 1 ? b->label[i] : draw[3 * L + k] & 1 ? 1.0f : -1.0f;
            token[1 + N + m] = gain;
            token[1 + 2 * N + m] = sign * gain;
        }
    }
}

// ---- the network ----

typedef struct net {
    nn ops;
    moe_desc desc;
    nn_bank router, experts, attention;
    moe_tape *routing, *running;
    struct attention mix;
    int32_t *expert; // (n) of each sequence
    float *y, *dy, *dmixed, *answer, *d_weight;
} net;

static net *net_new(const config *o, const plan *p, size_t n) {
    net *m = allocate(1, sizeof *m);
    nn *s = &m->ops;
    size_t count = 0;
    s->parallel.n_threads = o->threads;
    nn_must(moe_desc_system(&m->desc, "mot"));
    nn_must(moe_desc_parse(&m->desc, "noise_std=0.3 loss.switch=0.05", NULL)); // else one expert takes all classes
    m->desc.d_model = D;
    m->desc.d_ff = p->d_ff;
    m->desc.n_experts = p->experts;
    m->desc.expert = MOE_EXPERT_RELU;
    m->desc.sequence = L;
    m->desc.seed = o->seed;
    m->desc.parallel.n_threads = o->threads;
    nn_must(moe_router_count(&m->desc, &count));
    nn_add(&m->router, count, 0);
    nn_must(moe_experts_count(&m->desc, &count));
    nn_add(&m->experts, count, 0);
    nn_add(&m->attention, p->experts * D * D, 0);
    nn_bank_alloc(s, &m->router);
    nn_bank_alloc(s, &m->experts);
    nn_bank_alloc(s, &m->attention); // zeros: everyone gets the mean of the sequence
    m->mix = attention_new(s, n, L, D, p->experts, 1);
    float **token[] = {&m->y, &m->dy, &m->dmixed};
    for (int k = 0; k < 3; k++) *token[k] = nn_floats(s, n * L * D);
    m->answer = nn_floats(s, n);
    m->d_weight = nn_floats(s, n * L);
    m->expert = allocate(n, sizeof *m->expert);
    nn_must(moe_tape_new(&m->routing, &m->desc, n * L, MOE_ON));
    nn_must(moe_tape_new(&m->running, &m->desc, n * L, MOE_ON));

    float in = 1 / sqrtf(D), hidden = 1 / sqrtf((float)p->d_ff); // router and attention begin at zero
    float *w1 = nn_floats(s, D * p->d_ff), *w2 = nn_floats(s, D * p->d_ff);
    for (size_t e = 0; e < p->experts; e++) {
        nn_must(moe_rand_uniform(o->seed, (2ull << 40) + e, D * p->d_ff, -in, in, w1));
        nn_must(moe_rand_uniform(o->seed, (3ull << 40) + e, D * p->d_ff, -hidden, hidden, w2));
        nn_must(moe_expert_pack(&m->desc, e, &(moe_expert_weights){.w1 = w1, .w2 = w2}, m->experts.value));
    }
    return m;
}

static void net_free(net *m) {
    moe_tape_free(m->routing);
    moe_tape_free(m->running);
    free(m->expert);
    nn_free(&m->ops);
    free(m);
}

// b -> m->answer; the mean loss. noise: the router's, numbers `draw`.
static double net_forward(net *m, const batch *b, size_t n, int noise, uint64_t draw) {
    double loss = 0;
    m->routing->side.evaluate = !noise;
    m->routing->side.draw = draw;
    nn_must(moe_route(m->routing, m->router.value, b->x, n * L));
    for (size_t i = 0; i < n; i++) m->expert[i] = m->routing->index[i * L];
    m->mix.n = n;
    m->mix.x = b->x;
    m->mix.expert = m->expert;
    m->mix.weight = m->attention.value;
    attention_forward(&m->ops, &m->mix);
    nn_must(moe_tape_tokens(m->running, m->mix.y, n * L));
    nn_must(moe_routes_fill(&m->running->routes, n * L, m->routing->index, m->routing->weight, 0, MOE_ORDER_TOKEN));
    nn_must(moe_experts_forward(m->running, m->experts.value, m->y));
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (size_t k = 0; k < L * D; k++) sum += m->y[i * L * D + k];
        m->answer[i] = sum / L;
        loss += 0.5 * pow((double)(m->answer[i] - b->label[i]), 2) / (double)n;
    }
    return loss;
}

// After net_forward: gradients of what learns, and a step of gradient descent.
static void net_learn(net *m, const config *o, const batch *b, size_t n, int learns, size_t step) {
    for (size_t k = 0; k < n * L * D; k++)
        m->dy[k] = (m->answer[k / (L * D)] - b->label[k / (L * D)]) / (float)(n * L);
    memset(m->dmixed, 0, n * L * D * sizeof(float));
    nn_must(moe_experts_backward(m->running, m->experts.value, m->dy, 1, m->experts.grad, m->d_weight, m->dmixed));
    nn_bank *bank[] = {&m->router, &m->experts, &m->attention};
    static const float rate[] = {100, 1, 30}; // the first and the last see small gradients
    if (learns & ROUTER) {
        memset(m->router.grad, 0, m->router.count * sizeof(float));
        nn_must(moe_route_backward(m->routing, m->router.value, m->d_weight, m->router.grad, NULL));
    }
    if (learns & ATTENTION) {
        m->mix.dy = m->dmixed;
        m->mix.dweight = m->attention.grad;
        attention_backward(&m->ops, &m->mix);
    }
    for (int k = 0; k < 3; k++)
        if (learns & (1 << k))
            nn_bank_step(bank[k], (moe_optimizer_args){.kind = MOE_OPTIMIZER_SGD,
                                                       .lr = (float)o->lr * rate[k],
                                                       .momentum = MOE_OFF,
                                                       .weight_decay = MOE_OFF,
                                                       .step = step + 1,
                                                       .parallel = &m->ops.parallel});
}

// ---- training and what it shows ----

// Share of each class's test sequences that go to each expert; returns the share of sequences that are of their
// expert's most frequent class.
static double purity(const net *m, const batch *b, size_t n, size_t classes, double *share) {
    size_t experts = m->desc.n_experts, *count = allocate(classes * experts, sizeof *count);
    double own = 0;
    for (size_t i = 0; i < n; i++) count[b->class[i] * experts + (size_t)m->expert[i]]++;
    for (size_t e = 0; e < experts; e++) {
        size_t most = 0;
        for (size_t c = 0; c < classes; c++)
            if (count[c * experts + e] > most) most = count[c * experts + e];
        own += (double)most / (double)n;
    }
    for (size_t c = 0; c < classes; c++) {
        size_t sum = 0;
        for (size_t e = 0; e < experts; e++) sum += count[c * experts + e];
        for (size_t e = 0; e < experts; e++)
            share[c * experts + e] = sum ? (double)count[c * experts + e] / (double)sum : 0;
    }
    free(count);
    return own;
}

// How the loss of a stage falls: of its steps, the law.
static verdict stage_rate(const result *r, size_t stage, size_t steps) {
    double step[POINTS];
    for (size_t k = 0; k < POINTS; k++) step[k] = (double)((k + 1) * steps) / POINTS;
    return rate_judge(step, r->loss + stage * POINTS, POINTS);
}

static void train(result *r, const config *o, const plan *p, json *j, progress *bar, size_t before) {
    net *m = net_new(o, p, o->test > o->batch ? o->test : o->batch);
    batch b = batch_new(&m->ops, o->batch), test = batch_new(&m->ops, o->test);
    size_t total = STAGES * o->steps, point = 0;
    batch_fill(&test, o, o->test, 1ull << 50);
    r->plan = p;
    r->params = (m->router.count + m->attention.count) + p->experts * 2 * D * p->d_ff;
    r->first = net_forward(m, &test, o->test, 0, 0);
    for (size_t step = 0; step < total; step++) {
        size_t stage = step / o->steps;
        batch_fill(&b, o, o->batch, step);
        net_forward(m, &b, o->batch, stage == 0, step); // the router explores in the first stage
        net_learn(m, o, &b, o->batch, p->learns[stage], step);
        while (point < ALL && (step + 1) * POINTS >= (point + 1) * o->steps) {
            r->loss[point] = net_forward(m, &test, o->test, 0, 0);
            if (!isfinite(r->loss[point])) die("%s: the loss is no number; try a smaller --lr", p->name);
            json_begin(j);
            json_text(j, "event", "step");
            json_text(j, "run", p->key);
            json_whole(j, "stage", stage + 1);
            json_whole(j, "step", step + 1);
            json_real(j, "test_loss", r->loss[point++]);
            json_end(j);
        }
        if (step + 1 == o->steps) {
            net_forward(m, &test, o->test, 0, 0);
            r->purity = purity(m, &test, o->test, o->classes, r->share);
        }
        progress_update(bar, before + step + 1, "%s  loss %.5f", p->name, point ? r->loss[point - 1] : r->first);
    }
    const nn_bank *bank[] = {&m->router, &m->experts, &m->attention};
    for (int k = 0; k < 3; k++) r->checksum = moe_hash(r->checksum, bank[k]->value, bank[k]->count * sizeof(float));
    r->rate = stage_rate(r, 1, o->steps);
    free(b.class);
    free(test.class);
    net_free(m);
}

// ---- the report ----

static double stage_loss(const result *r, size_t stage) { return r->loss[(stage + 1) * POINTS - 1]; }

static void draw(FILE *f, const result *r, size_t n, const config *o) {
    static double log_loss[8][ALL];
    plot_line line[8];
    plot_begin(f, 960, 360, "Three-stage training");
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < ALL; k++) log_loss[i][k] = log10(fmax(r[i].loss[k], 1e-30));
        line[i] = (plot_line){r[i].plan->name, log_loss[i], ALL, i > 0};
    }
    plot_lines(f, &(plot_chart){.box = {0, 0, 600, 360},
                                .title = "log10 of the test loss (a line is the linear rate)",
                                .x_label = "time; a stage is 25",
                                .line = line,
                                .n_lines = n});
    plot_heat(f, &(plot_map){.box = {600, 0, 360, 360},
                             .title = "After stage I: where a class goes",
                             .x_label = "expert",
                             .rows = o->classes,
                             .cols = r->plan->experts,
                             .value = r->share,
                             .hi = 1,
                             .scale_format = "%.0f"});
    plot_end(f);
}

// The claims of the theory, each with what was found here; out[k]: it is borne out.
enum { CLAIMS = 4 };
static void judge(const result *r, char text[CLAIMS][240], int out[CLAIMS]) {
    double best = fmin(stage_loss(&r[0], 2), stage_loss(&r[0], 1));
    out[0] = r->purity >= 0.95;
    snprintf(text[0], 240, "stage I makes specialists: purity %.1f%% (95%% counts as yes)", 100 * r->purity);
    out[1] = r->rate.linear;
    snprintf(text[1], 240, "stage II has a linear rate: %s", r->rate.why);
    out[2] = stage_loss(&r[2], 2) > 2 * best;
    snprintf(text[2], 240,
             "without attention experts there is a floor: %.2g, against %.2g with them (twice counts as yes)",
             stage_loss(&r[2], 2), best);
    out[3] = stage_loss(&r[0], 2) < stage_loss(&r[1], 2) && stage_loss(&r[0], 2) < stage_loss(&r[3], 2);
    snprintf(text[3], 240,
             "three stages end lower than the same budget end to end: %.2g, against %.2g; one transformer %.2g",
             stage_loss(&r[0], 2), stage_loss(&r[1], 2), stage_loss(&r[3], 2));
}

static void write_page(const config *o, const result *r, size_t n) {
    char text[CLAIMS][240], about[256];
    int out[CLAIMS];
    FILE *f = open_output(o->out, "mot.html");
    snprintf(about, sizeof about, "%zu classes, %zu experts, %zu steps a stage of %zu sequences, seed %llu.",
             o->classes, r->plan->experts, o->steps, o->batch, (unsigned long long)o->seed);
    page_begin(f, "A mixture of transformers in three stages", about);
    page_card(f);
    draw(f, r, n, o);
    page_card_end(f);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "training|before|after I|after II|after III|purity after I|parameters");
    for (size_t i = 0; i < n; i++)
        page_row(f, 0, "%s|%.2g|%.2g|%.2g|%.2g|%.1f%%|%zu", r[i].plan->name, r[i].first, stage_loss(&r[i], 0),
                 stage_loss(&r[i], 1), stage_loss(&r[i], 2), 100 * r[i].purity, r[i].params);
    page_table_end(f);
    page_card_end(f);
    page_heading(f, "The claims");
    page_card(f);
    page_table_begin(f);
    judge(r, text, out);
    for (int k = 0; k < CLAIMS; k++) page_row(f, 0, "%s|<%s", out[k] ? "borne out" : "NOT borne out", text[k]);
    page_table_end(f);
    page_card_end(f);
    page_end(f);
    close_output(f, "mot.html");
}

static void parse(config *o, int argc, char **argv) {
    args_option options[] = {
        {"steps", ARGS_SIZE, &o->steps, "N", "steps of a stage (0: 1000)", 0, 1e7},
        ARGS_SEED(&o->seed),
        ARGS_THREADS(&o->threads),
        ARGS_ISA(&o->isa),
        ARGS_EXPERTS(&o->experts),
        {"classes", ARGS_SIZE, &o->classes, "N", "classes of sequences", 2, MAX_CLASSES},
        {"batch", ARGS_SIZE, &o->batch, "N", "sequences a step", 1, 8192},
        {"test", ARGS_SIZE, &o->test, "N", "sequences of the test", 1, 100000},
        {"lr", ARGS_REAL, &o->lr, "X", "learning rate of the feed-forward experts (0: 0.1)", 0, 1e30},
        {"noise", ARGS_REAL, &o->noise, "X", "deviation of a noise token's numbers", 0, 100},
        ARGS_OUT(&o->out),
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->quiet),
    };
    args_parse("mot", "Trains a mixture of transformers in three stages, and what its theory compares it with.",
               options, sizeof options / sizeof *options, argc, argv);
    nn_isa("mot", o->isa);
    if (!o->steps) o->steps = 1000;
    if (o->lr <= 0) o->lr = 0.1;
    if (!o->experts) o->experts = 2 * o->classes;
    if (o->experts > MAX_EXPERTS) args_fail("mot", "--experts: at most %d", MAX_EXPERTS);
}

enum { RUNS = 4 };
static void write_config(json *j, const config *o) {
    json_config(j, "mot");
    json_whole(j, "seed", o->seed);
    json_whole(j, "classes", o->classes);
    json_whole(j, "experts", o->experts);
    json_whole(j, "steps", o->steps);
    json_whole(j, "batch", o->batch);
    json_real(j, "lr", o->lr);
    json_real(j, "noise", o->noise);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_end(j);
}

static void print_results(FILE *human, const result *r) {
    char text[CLAIMS][240];
    int out[CLAIMS];
    judge(r, text, out);
    fprintf(human, "%-16s %9s %9s %9s %9s %8s %10s\n", "test loss", "before", "after I", "after II", "after III",
            "purity", "parameters");
    for (size_t i = 0; i < RUNS; i++)
        fprintf(human, "%-16s %9.2g %9.2g %9.2g %9.2g %7.1f%% %10zu\n", r[i].plan->name, r[i].first,
                stage_loss(&r[i], 0), stage_loss(&r[i], 1), stage_loss(&r[i], 2), 100 * r[i].purity, r[i].params);
    fputc('\n', human);
    for (int k = 0; k < CLAIMS; k++) fprintf(human, "%-14s %s\n", out[k] ? "borne out:" : "NOT borne out:", text[k]);
}

static void write_final(json *j, const result *r) {
    char text[CLAIMS][240];
    int out[CLAIMS];
    judge(r, text, out);
    json_begin(j);
    json_text(j, "event", "final");
    json_real(j, "stage1_loss", stage_loss(r, 0));
    json_real(j, "stage2_loss", stage_loss(r, 1));
    json_real(j, "stage3_loss", stage_loss(r, 2));
    json_real(j, "purity", r->purity);
    for (size_t i = 1; i < RUNS; i++) {
        char key[64];
        snprintf(key, sizeof key, "%s_loss", r[i].plan->key);
        json_real(j, key, stage_loss(&r[i], 2));
    }
    json_real(j, "stage2_line_fit", r->rate.line);
    json_real(j, "stage2_slow_fit", r->rate.slow);
    for (int k = 0; k < CLAIMS; k++) {
        static const char *const key[CLAIMS] = {"specialises", "linear_rate", "floor", "beats_end_to_end"};
        json_raw(j, key[k], out[k] ? "true" : "false");
    }
    char sum[32];
    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)r->checksum);
    json_text(j, "checksum", sum);
    json_end(j);
}

int main(int argc, char **argv) {
    config o = {
        .batch = 64, .test = 512, .classes = 4, .seed = 1, .isa = "auto", .out = "out", .noise = 0.5, .gain = 4};
    parse(&o, argc, argv);
    const plan plans[RUNS] = {
        {"three stages", "three_stages", o.experts, D_FF, {ROUTER | FEED_FORWARD, ATTENTION, FEED_FORWARD}},
        {"end to end", "end_to_end", o.experts, D_FF, {EVERYTHING, EVERYTHING, EVERYTHING}},
        {"no attention", "no_attention", o.experts, D_FF,
         {ROUTER | FEED_FORWARD, ROUTER | FEED_FORWARD, ROUTER | FEED_FORWARD}},
        {"one transformer", "one_transformer", 1, D_FF * o.experts, {EVERYTHING, EVERYTHING, EVERYTHING}},
    };
    static result r[RUNS];
    FILE *human = o.json ? stderr : stdout;
    json j = {{open_output(o.out, "mot.jsonl"), o.json ? stdout : NULL}, 0};
    write_config(&j, &o);
    double begin = seconds_now();
    progress bar = progress_begin("mot", "steps", RUNS * STAGES * o.steps, o.quiet);
    for (size_t i = 0; i < RUNS; i++) train(&r[i], &o, &plans[i], &j, &bar, i * STAGES * o.steps);
    progress_clear(&bar);

    FILE *svg = open_output(o.out, "mot.svg");
    draw(svg, r, RUNS, &o);
    close_output(svg, "mot.svg");
    write_page(&o, r, RUNS);
    print_results(human, r);
    fprintf(human, "\n%.1f s; see %s/mot.html, .svg, .jsonl\n", seconds_now() - begin, o.out);
    write_final(&j, r);
    close_output(j.file[0], "mot.jsonl");
    return 0;
}
