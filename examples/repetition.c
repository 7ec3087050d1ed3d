// repetition.c - RepetitionCurse: a prompt of one token again and again sends all its tokens to the same few experts.
//
//     build/repetition                    the small model that the repository carries
//     build/repetition --model DIR        any folder that build/llm reads; without a tokenizer.json no text is read
//
// Prompts of three kinds: random tokens, real text, and one token repeated, tried with several tokens. Of each: how the
// routing looks (moe_repetition), and the imbalance of P ranks that share the experts in equal blocks, beside its
// theoretical maximum TMI. Then what LASER, Replicate-and-Quantize and LLEP do against a batch of which half or all is
// attacked. Time: what a batch takes here outside the mixtures, by P, plus the busiest rank's tokens times what a
// token of an expert takes here, layer after layer: P ranks are simulated, exchange is not counted. Last, a detector by
// moe_repetition: a threshold is the 99th percentile of one half of the text, false alarms are counted on the other.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/corpus.h"
#include "common/json.h"
#include "common/plot.h"
#include "common/serve_llm.h"

enum { LIVE = 256, MOST_RANKS = 12, KINDS = 3, DEFENCES = 5, SHARES = 2 };
typedef enum kind { RANDOM, TEXT, REPEATED } kind;
enum { DYNAMIC = 3, LLEP = 4 }; // of the defences
static const char *const kind_name[KINDS] = {"random", "text", "repeated"};
static serve_method defence[DEFENCES] = {
    {"none", "", 0, 0, ""},
    {"laser", "select=laser top_p=1 threshold=0", 0, 0, "load chooses among the 2 k best, whatever the scores"},
    {"replicate-and-quantize", "", 4, 0, "four replicas, planned on normal prompts"},
    {"replicate-and-quantize-dynamic", "", 4, 4, "four replicas, planned anew on the batch before"},
    {"llep", "", 0, 0, "least-loaded expert parallelism: weights move"},
};

typedef struct config {
    llm_options llm;
    const char *isa;
    uint64_t seed;
    const char *text, *out;
    size_t length, prompts, tried, min_tokens; // tokens a prompt, prompts a batch, tokens to repeat
    int json, quiet;
    FILE *human;
    json lines;
} config;

// What one prompt shows, in the mean over the mixtures.
typedef struct look {
    double jaccard, longest, spread, imbalance[MOST_RANKS];
} look;
// A batch on P ranks: imbalance in the mean over the mixtures, seconds, and what LLEP moved.
typedef struct outcome {
    double imbalance[MOST_RANKS], seconds[MOST_RANKS], moved[MOST_RANKS];
} outcome;
enum { BY_JACCARD, BY_RUN, WAYS }; // what a detector looks at: mean Jaccard of neighbours, longest run
typedef struct detector {
    double threshold, alarms[KINDS]; // shares of the prompts of each kind; of text: false ones
} detector;
static const char *const way_name[WAYS] = {"jaccard", "longest"};

typedef struct lab {
    config *o;
    llm *m;
    token_list text;
    moe_layer *trained[LIVE];
    served live[LIVE];
    size_t layers, experts, top_k, n_ranks, ranks[MOST_RANKS];
    uint64_t *normal;        // (layers, E) load of normal prompts
    uint64_t *work;          // (layers, E + replicas) of a batch
    float *window;           // (layers, E) LASER's, of a batch
    look seen;               // of the prompt that runs
    double dense, each;      // measured: seconds a token outside the mixtures, a route inside
    int timing;
    double inside, routes;
} lab;

// ---- prompts ----

static int has_text(const lab *l) { return l->text.n >= 16 * l->o->length; }
static void prompt(const lab *l, kind k, size_t number, int32_t *ids) {
    size_t n = l->o->length, windows = l->text.n / n;
    uint64_t seed = l->o->seed;
    for (size_t i = 0; i < n; i++) {
        size_t draw = k == REPEATED ? 0 : i;
        if (k == TEXT) ids[i] = l->text.id[number % windows * n + i];
        else ids[i] = (int32_t)(moe_rand_u32(seed, 100 * (uint64_t)k + number, draw) % l->m->vocab);
    }
}

// ---- a prompt through the model ----

static double spread_of(size_t n, size_t d, const float *h) { // mean |h_i - mean h|^2
    double sum = 0;
    for (size_t c = 0; c < d; c++) {
        double mean = 0, square = 0;
        for (size_t t = 0; t < n; t++) mean += (double)h[t * d + c] / (double)n;
        for (size_t t = 0; t < n; t++) square += pow((double)h[t * d + c] - mean, 2);
        sum += square / (double)n;
    }
    return sum;
}
static void listen(void *user, const llm *m, const llm_routed *routed) {
    lab *l = user;
    const moe_tape *tape = m->acts.tape;
    served *live = &l->live[routed->mixture];
    uint64_t count[4096];
    moe_repeats r;
    for (size_t p = 0; p < l->n_ranks; p++) {
        nn_must(moe_repetition(tape->n_tokens, l->experts, tape->n_slots, l->ranks[p], tape->index, count, &r));
        l->seen.imbalance[p] += r.imbalance / (double)l->layers;
    }
    l->seen.jaccard += r.jaccard / (double)l->layers;
    l->seen.longest += (double)r.longest / (double)l->layers;
    l->seen.spread += spread_of(tape->n_tokens, m->d, m->acts.norm2) / (double)l->layers;
    double sum = (double)serve_work(live, tape);
    uint64_t *work = l->work + routed->mixture * (l->experts + SERVE_MOST_REPLICAS);
    for (size_t i = 0; i < l->experts + live->parents; i++) work[i] += live->work[i];
    if (!l->timing) return;
    double begin = seconds_now();
    nn_must(moe_forward_tape(live->layer, m->acts.tape, m->acts.norm2, tape->n_tokens, m->acts.y));
    l->inside += seconds_now() - begin;
    l->routes += sum;
}
static void run_one(lab *l, kind k, size_t number) {
    int32_t *ids = allocate(l->o->length, sizeof *ids);
    llm_taker take = {listen, NULL, l, 0};
    memset(&l->seen, 0, sizeof l->seen);
    prompt(l, k, number, ids);
    llm_forward_batch(l->m, ids, l->o->length, 0, &take, 0);
    serve_llm_after(l->m, l->live);
    free(ids);
}

// ---- defences ----

static moe_status begin(lab *l, const serve_method *method) {
    size_t E = l->experts;
    moe_status status = MOE_OK, last = MOE_OK;
    for (size_t i = 0; i < l->layers; i++) {
        l->live[i] = serve_begin(l->trained[i], method, l->normal + i * E, &status);
        if (status) last = status;
    }
    if (last) return last;
    serve_llm_place(l->m, l->live);
    for (size_t i = 0, at = 0; i < l->m->layers; i++)
        if (l->m->block[i].mixture) l->m->tape[i]->side.window = l->window + E * at++;
    return MOE_OK;
}
static void end(lab *l) {
    for (size_t i = 0; i < l->layers; i++) serve_end(&l->live[i]);
}
static void clear(lab *l) { // before a batch
    memset(l->work, 0, l->layers * (l->experts + SERVE_MOST_REPLICAS) * sizeof *l->work);
    memset(l->window, 0, l->layers * l->experts * sizeof *l->window);
}
// The busiest of P ranks: experts in blocks; each replica, the heaviest first, on the rank with the least.
static uint64_t makespan(const lab *l, const uint64_t *work, size_t parents, size_t P, uint64_t *sum) {
    uint64_t rank[4096] = {0}, most = 0, left[SERVE_MOST_REPLICAS];
    *sum = 0;
    for (size_t e = 0; e < l->experts; e++) rank[e * P / l->experts] += work[e], *sum += work[e];
    memcpy(left, work + l->experts, sizeof left);
    for (size_t n = 0; n < parents; n++) {
        size_t heaviest = 0, least = 0;
        for (size_t i = 1; i < parents; i++) heaviest = left[i] > left[heaviest] ? i : heaviest;
        for (size_t r = 1; r < P; r++) least = rank[r] < rank[least] ? r : least;
        rank[least] += left[heaviest], *sum += left[heaviest];
        left[heaviest] = 0;
    }
    for (size_t r = 0; r < P; r++) most = rank[r] > most ? rank[r] : most;
    return most;
}
static uint64_t llep_makespan(const lab *l, const uint64_t *work, size_t P, uint64_t *sum, double *moved) {
    moe_ep_desc desc = {.n_experts = l->experts, .n_ranks = P, .llep = 1, .min_tokens = l->o->min_tokens};
    size_t bytes;
    moe_ep plan;
    nn_must(moe_ep_plan_size(&desc, &bytes));
    void *memory = allocate(bytes, 1);
    nn_must(moe_ep_plan(&desc, work, &plan, memory, bytes));
    *sum = plan.n_tokens;
    *moved += (double)plan.n_moved * (double)moe_layer_expert_bytes(l->trained[0], 0);
    free(memory);
    return plan.makespan;
}
// What the batch in l->work costs on each number of ranks.
static outcome measure(const lab *l, int llep) {
    outcome r = {{0}, {0}, {0}};
    double tokens = (double)(l->o->length * l->o->prompts);
    for (size_t p = 0; p < l->n_ranks; p++) {
        size_t P = l->ranks[p];
        r.seconds[p] = l->dense * tokens / (double)P;
        for (size_t i = 0; i < l->layers; i++) {
            const uint64_t *work = l->work + i * (l->experts + SERVE_MOST_REPLICAS);
            uint64_t sum, most;
            if (llep) most = llep_makespan(l, work, P, &sum, &r.moved[p]);
            else most = makespan(l, work, l->live[i].parents, P, &sum);
            r.imbalance[p] += (double)most * (double)P / (double)sum / (double)l->layers;
            r.seconds[p] += l->each * (double)most;
        }
    }
    return r;
}
// A batch whose first `attacked` prompts repeat token number `token`; the others are normal.
static void run_batch(lab *l, size_t attacked, size_t token) {
    clear(l);
    for (size_t i = 0; i < l->o->prompts; i++) {
        if (i < attacked) run_one(l, REPEATED, token);
        else run_one(l, has_text(l) ? TEXT : RANDOM, 64 + token * l->o->prompts + i);
    }
}
static outcome mean_batches(lab *l, size_t attacked, int llep) {
    outcome mean = {{0}, {0}, {0}};
    for (size_t t = 0; t < l->o->tried; t++) {
        if (l->live[0].method->window) run_batch(l, attacked, t); // the attack lasts: what is planned from it comes
        run_batch(l, attacked, t);
        outcome r = measure(l, llep);
        for (size_t p = 0; p < l->n_ranks; p++) {
            mean.imbalance[p] += r.imbalance[p] / (double)l->o->tried;
            mean.seconds[p] += r.seconds[p] / (double)l->o->tried;
            mean.moved[p] += r.moved[p] / (double)l->o->tried;
        }
    }
    return mean;
}

// ---- what is asked ----

// Normal prompts: the loads of a calibration, and the two times.
static void calibrate(lab *l) {
    kind k = has_text(l) ? TEXT : RANDOM;
    size_t n = 8;
    nn_must(begin(l, &defence[0]));
    clear(l);
    run_one(l, k, 0); // warm
    clear(l);
    l->timing = 1;
    double start = seconds_now();
    for (size_t i = 0; i < n; i++) run_one(l, k, i);
    double all = seconds_now() - start - l->inside; // each mixture ran twice
    l->timing = 0;
    l->each = l->inside / l->routes;
    l->dense = fmax(all - l->inside, 0) / (double)(n * l->o->length);
    for (size_t i = 0; i < l->layers; i++)
        memcpy(l->normal + i * l->experts, l->live[i].load, l->experts * sizeof *l->normal);
    end(l);
}
static look mean_look(lab *l, kind k) {
    look mean = {0};
    size_t n = l->o->tried * l->o->prompts;
    for (size_t i = 0; i < n; i++) {
        clear(l);
        run_one(l, k, i);
        mean.jaccard += l->seen.jaccard / (double)n;
        mean.longest += l->seen.longest / (double)n;
        mean.spread += l->seen.spread / (double)n;
        for (size_t p = 0; p < l->n_ranks; p++) mean.imbalance[p] += l->seen.imbalance[p] / (double)n;
    }
    return mean;
}
static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
// What both look at, of n prompts: seen (WAYS, n).
static void watch(lab *l, kind k, size_t first, size_t n, double *seen) {
    progress p = progress_begin("detector", "prompts", n, l->o->quiet);
    for (size_t i = 0; i < n; i++) {
        run_one(l, k, first + i);
        seen[BY_JACCARD * n + i] = l->seen.jaccard;
        seen[BY_RUN * n + i] = l->seen.longest;
        progress_update(&p, i + 1, "%s", kind_name[k]);
    }
    progress_clear(&p);
}
// Thresholds: above what 99 in 100 prompts of the first half of the text show. Alarms on the second half are false.
static void detect(lab *l, detector *found) {
    size_t half = l->text.n / l->o->length / 2, n[KINDS] = {l->o->tried * 4, 0, l->o->tried * 4};
    if (half > 200) half = 200;
    n[TEXT] = half;
    double *seen = allocate(WAYS * (half + n[RANDOM]), sizeof *seen);
    watch(l, TEXT, 0, half, seen);
    for (size_t w = 0; w < WAYS; w++) {
        qsort(seen + w * half, half, sizeof *seen, ascending);
        found[w].threshold = seen[w * half + (half * 99 + 99) / 100 - 1];
    }
    for (kind k = RANDOM; k <= REPEATED; k++) {
        watch(l, k, k == TEXT ? half : 0, n[k], seen);
        for (size_t w = 0; w < WAYS; w++) {
            double above = 0;
            for (size_t i = 0; i < n[k]; i++) above += seen[w * n[k] + i] > found[w].threshold;
            found[w].alarms[k] = above / (double)n[k];
        }
    }
    free(seen);
}

// ---- the report ----

static double tmi(const lab *l, size_t P) { // min(k, E / P) / (k / P)
    double held = (double)(l->experts / P), k = (double)l->top_k;
    return fmin(k, held) * (double)P / k;
}
static void write_list(lab *l, const char *key, const double *value, double scale) {
    json_list_begin(&l->o->lines, key);
    for (size_t p = 0; p < l->n_ranks; p++) json_real(&l->o->lines, NULL, value[p] * scale);
    json_list_end(&l->o->lines);
}
static void write_config(lab *l) {
    config *o = l->o;
    json *j = &o->lines;
    json_config(j, "repetition");
    json_text(j, "model", o->llm.model);
    json_whole(j, "seed", o->seed);
    json_whole(j, "layers", l->layers);
    json_whole(j, "experts", l->experts);
    json_whole(j, "top_k", l->top_k);
    json_whole(j, "length", o->length);
    json_whole(j, "prompts", o->prompts);
    json_whole(j, "tried", o->tried);
    json_whole(j, "text_tokens", l->text.n);
    json_list_begin(j, "ranks");
    for (size_t p = 0; p < l->n_ranks; p++) json_whole(j, NULL, l->ranks[p]);
    json_list_end(j);
    json_list_begin(j, "tmi");
    for (size_t p = 0; p < l->n_ranks; p++) json_real(j, NULL, tmi(l, l->ranks[p]));
    json_list_end(j);
    json_end(j);
}
static void print_numbers(const lab *l, const double *value, const char *format) {
    for (size_t p = 0; p < l->n_ranks; p++) fprintf(l->o->human, format, value[p]);
}
static void report_look(lab *l, kind k, const look *r) {
    json *j = &l->o->lines;
    json_begin(j);
    json_text(j, "event", "prompts");
    json_text(j, "kind", kind_name[k]);
    json_real(j, "jaccard", r->jaccard);
    json_real(j, "longest", r->longest);
    json_real(j, "spread", r->spread);
    write_list(l, "imbalance", r->imbalance, 1);
    json_end(j);
    fprintf(l->o->human, "%-10s%10.3f%10.1f%10.3f", kind_name[k], r->jaccard, r->longest, r->spread);
    print_numbers(l, r->imbalance, "%9.3f");
    fprintf(l->o->human, "\n");
}
static void report_defence(lab *l, size_t d, size_t attacked, const outcome *r, const outcome *normal) {
    json *j = &l->o->lines;
    outcome ratio = *r;
    for (size_t p = 0; p < l->n_ranks; p++) ratio.seconds[p] /= normal->seconds[p];
    json_begin(j);
    json_text(j, "event", "defence");
    json_text(j, "method", defence[d].name);
    json_real(j, "attacked", (double)attacked / (double)l->o->prompts);
    write_list(l, "imbalance", r->imbalance, 1);
    write_list(l, "latency_ratio", ratio.seconds, 1);
    write_list(l, "moved_bytes", r->moved, 1);
    json_end(j);
    fprintf(l->o->human, "%-32s%4.0f%%", defence[d].name, 100 * (double)attacked / (double)l->o->prompts);
    print_numbers(l, r->imbalance, "%8.3f");
    fprintf(l->o->human, "  |");
    print_numbers(l, ratio.seconds, "%7.2f");
    fprintf(l->o->human, "\n");
}
static void report_end(lab *l, const detector *found, const outcome *worst, const outcome *normal) {
    json *j = &l->o->lines;
    size_t last = l->n_ranks - 1;
    json_begin(j);
    json_text(j, "event", "final");
    json_whole(j, "ranks", l->ranks[last]);
    json_real(j, "tmi", tmi(l, l->ranks[last]));
    json_real(j, "imbalance", worst->imbalance[last]);
    json_real(j, "latency_ratio", worst->seconds[last] / normal->seconds[last]);
    json_object_begin(j, "detector");
    for (size_t w = 0; w < WAYS; w++) {
        json_object_begin(j, way_name[w]);
        json_real(j, "threshold", found[w].threshold);
        json_real(j, "false_alarms", found[w].alarms[TEXT]);
        json_real(j, "detected", found[w].alarms[REPEATED]);
        json_real(j, "random_alarms", found[w].alarms[RANDOM]);
        json_object_end(j);
    }
    json_object_end(j);
    json_end(j);
    fprintf(l->o->human, "\n%-10s%10s%14s%10s%10s\n", "detector", "above", "false alarms", "repeated", "random");
    for (size_t w = 0; w < WAYS && has_text(l); w++)
        fprintf(l->o->human, "%-10s%10.3f%13.1f%%%9.0f%%%9.0f%%\n", way_name[w], found[w].threshold,
                100 * found[w].alarms[TEXT], 100 * found[w].alarms[REPEATED], 100 * found[w].alarms[RANDOM]);
    if (!has_text(l)) fprintf(l->o->human, "no text: not tried\n");
    fprintf(l->o->human, "see %s/repetition.html, .svg, .jsonl\n", l->o->out);
}
static void draw(FILE *f, const lab *l, const look *seen, const outcome *against) {
    double bound[MOST_RANKS];
    for (size_t p = 0; p < l->n_ranks; p++) bound[p] = tmi(l, l->ranks[p]);
    plot_line kinds[KINDS + 1] = {{"TMI", bound, l->n_ranks, 1}}, ways[DEFENCES];
    size_t n = 1;
    for (size_t k = 0; k < KINDS; k++)
        if (seen[k].longest > 0) kinds[n++] = (plot_line){kind_name[k], seen[k].imbalance, l->n_ranks, 0};
    for (size_t d = 0; d < DEFENCES; d++) ways[d] = (plot_line){defence[d].name, against[d].imbalance, l->n_ranks, 0};
    plot_begin(f, 960, 340, "RepetitionCurse");
    plot_lines(f, &(plot_chart){{0, 0, 400, 330}, "Imbalance by prompts", "log2 of the ranks", kinds, n, 0, 0});
    plot_lines(f, &(plot_chart){{400, 0, 560, 330}, "All attacked: imbalance, by defence", "log2 of the ranks", ways,
                                DEFENCES, 0, 0});
    plot_end(f);
}
static void write_pages(const lab *l, const look *seen, const outcome *against, const outcome *normal) {
    FILE *f = open_output(l->o->out, "repetition.svg");
    draw(f, l, seen, against);
    close_output(f, "repetition.svg");
    f = open_output(l->o->out, "repetition.html");
    page_begin(f, "RepetitionCurse", "Prompts of one repeated token: how they route, and what helps.");
    page_card(f);
    draw(f, l, seen, against);
    page_card_end(f);
    page_card(f);
    page_table_begin(f);
    page_row(f, 1, "all attacked|ranks|imbalance|TMI|time by normal|MB of weights moved");
    for (size_t i = 0; i < DEFENCES * l->n_ranks; i++) {
        size_t d = i / l->n_ranks, p = i % l->n_ranks;
        page_row(f, 0, "%s|%zu|%.3f|%.2f|%.2f|%.2f", defence[d].name, l->ranks[p], against[d].imbalance[p],
                 tmi(l, l->ranks[p]), against[d].seconds[p] / normal->seconds[p], against[d].moved[p] / 1e6);
    }
    page_table_end(f);
    page_card_end(f);
    page_end(f);
    close_output(f, "repetition.html");
}

// ---- the program ----

static void look_at(lab *l, look *seen) {
    fprintf(l->o->human, "%-10s%10s%10s%10s   imbalance of", "prompts", "Jaccard", "longest", "spread");
    for (size_t p = 0; p < l->n_ranks; p++) fprintf(l->o->human, " %zu", l->ranks[p]);
    fprintf(l->o->human, " ranks (TMI");
    for (size_t p = 0; p < l->n_ranks; p++) fprintf(l->o->human, " %.2f", tmi(l, l->ranks[p]));
    fprintf(l->o->human, ")\n");
    nn_must(begin(l, &defence[0]));
    for (kind k = RANDOM; k <= REPEATED; k++) {
        if (k == TEXT && !has_text(l)) continue;
        seen[k] = mean_look(l, k);
        report_look(l, k, &seen[k]);
    }
    end(l);
}
// The normal batch without a defence, then every defence against half and all; against: all attacked.
static outcome defend(lab *l, outcome *against) {
    fprintf(l->o->human, "\n%-31s share  imbalance  |  time attacked / normal\n", "defence");
    nn_must(begin(l, &defence[0]));
    outcome normal = mean_batches(l, 0, 0);
    end(l);
    for (size_t d = 0; d < DEFENCES; d++) {
        moe_status status = begin(l, &defence[d]);
        for (size_t share = 0; share <= SHARES && !status; share++) {
            size_t attacked = l->o->prompts * share / SHARES; // none, half, all
            against[d] = mean_batches(l, attacked, d == LLEP);
            report_defence(l, d, attacked, &against[d], &normal);
        }
        if (status) fprintf(l->o->human, "%-32s%s\n", defence[d].name, moe_status_string(status));
        end(l);
    }
    return normal;
}
static void open_lab(lab *l, const char *argv0) {
    config *o = l->o;
    static char folder[1024];
    size_t n = 0;
    static char sample[1024];
    if (!o->llm.model && sample_folder(argv0, "examples/data/wikitext2/model", "config.json", sample, sizeof sample))
        o->llm.model = sample;
    if (!o->llm.model) args_fail("repetition", "--model DIR is missing, and the sample's is not there");
    if (!file_exists(o->llm.model, "config.json"))
        args_fail("repetition", "--model: no config.json in %s; build/wikitext2 writes a model", o->llm.model);
    l->m = llm_open(&o->llm);
    o->llm.batch = o->length;
    llm_load(l->m, o->length);
    l->layers = serve_llm_layers(l->m, l->trained, LIVE);
    l->experts = moe_layer_desc(l->trained[0])->n_experts;
    l->top_k = moe_layer_desc(l->trained[0])->top_k;
    for (size_t P = 2; P <= l->experts && P <= 4096 && l->n_ranks < MOST_RANKS; P *= 2)
        if (l->experts % P == 0) l->ranks[l->n_ranks++] = P;
    if (!l->n_ranks) args_fail("repetition", "--model: %zu experts are not shared evenly by 2 ranks", l->experts);
    l->normal = allocate(l->layers * l->experts, sizeof *l->normal);
    l->work = allocate(l->layers * (l->experts + SERVE_MOST_REPLICAS), sizeof *l->work);
    l->window = allocate(l->layers * l->experts, sizeof *l->window);
    if (!file_exists(o->llm.model, "tokenizer.json")) return;
    if (!o->text && sample_folder(argv0, "examples/data/wikitext2", "wiki.valid.tokens", folder, sizeof folder - 20))
        o->text = strcat(folder, "/wiki.valid.tokens");
    const char *text = o->text ? file_view(o->text, &n) : NULL;
    if (o->text && !text) refuse(o->text, "cannot be read: %s", strerror(errno));
    if (text) l->text = tokenizer_encode(llm_tokenizer(o->llm.model), text, n, 0);
}
static void run_lab(lab *l, const char *argv0) {
    config *o = l->o;
    look seen[KINDS] = {{0}};
    outcome against[DEFENCES] = {{{0}, {0}, {0}}};
    detector found[WAYS] = {{NAN, {NAN, NAN, NAN}}, {NAN, {NAN, NAN, NAN}}};
    open_lab(l, argv0);
    o->human = o->json ? stderr : stdout;
    o->lines = (json){{open_output(o->out, "repetition.jsonl"), o->json ? stdout : NULL}, 0};
    write_config(l);
    calibrate(l);
    look_at(l, seen);
    outcome normal = defend(l, against);
    nn_must(begin(l, &defence[0]));
    if (has_text(l)) detect(l, found);
    end(l);
    report_end(l, found, &against[0], &normal);
    write_pages(l, seen, against, &normal);
    close_output(o->lines.file[0], "repetition.jsonl");
    free(l->normal);
    free(l->work);
    free(l->window);
}

int main(int argc, char **argv) {
    static lab l;
    config o = {.out = "out", .length = 128, .prompts = 4, .tried = 4, .min_tokens = 8, .isa = "auto", .seed = 1};
    args_option flags[] = {
        {"model", ARGS_TEXT, &o.llm.model, "DIR", "config.json, safetensors, tokenizer.json", 0, 0},
        {"text", ARGS_TEXT, &o.text, "FILE", "real text (default: the sample's wiki.valid.tokens)", 0, 0},
        {"length", ARGS_SIZE, &o.length, "N", "tokens of a prompt", 2, 1 << 20},
        {"prompts", ARGS_SIZE, &o.prompts, "N", "prompts of a batch", 2, 4096},
        {"tried", ARGS_SIZE, &o.tried, "N", "so many tokens to repeat; what is printed are means", 1, 4096},
        {"min-tokens", ARGS_SIZE, &o.min_tokens, "N", "LLEP's m: fewer tokens do not travel", 1, 1 << 20},
        ARGS_SEED(&o.seed),
        ARGS_THREADS(&o.llm.threads),
        ARGS_ISA(&o.isa),
        ARGS_OUT(&o.out),
        ARGS_JSON(&o.json),
        ARGS_QUIET(&o.quiet)};
    args_parse("repetition", "Repeated prompts against a mixture-of-experts language model.", flags,
               sizeof flags / sizeof *flags, argc, argv);
    nn_isa("repetition", o.isa);
    o.llm.quiet = o.quiet;
    l.o = &o;
    defence[DYNAMIC].window = o.prompts;
    run_lab(&l, argv[0]);
    return 0;
}
