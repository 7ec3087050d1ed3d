// llm.c - runs a mixture-of-experts language model from its published folder: config.json, safetensors, tokenizer.json.
//
//     build/llm                                        the small model that the repository carries
//     build/llm --model DIR --prompt "The moon"        writes on, greedily or (--temperature, --top-p) by chance
//     build/llm --model DIR --text FILE                perplexity of a text; --format all: in every format
//     build/llm --model DIR --inspect --text FILE ...  how it routes one or several texts: words, tables, pictures
//     build/llm --series --text FILE DIR DIR ...       the same over checkpoints
//     build/llm --model DIR --ids 5,17,3 --dump P      P.logits.npy, P.router_logits.npy, P.experts.npy
//     build/llm --model DIR --encode "a text"          its token ids
//
// OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3, GPT-OSS and Granite-MoE. The mixtures are moe.h's layers
// (moe_model_layer); the blocks around them are common/transformer.h; what differs between models is read from config
// and tensors in common/llm_model.h. docs/llm.md has the formulas and what was tested.
#define MOE_IMPLEMENTATION
#include "common/llm_model.h"
#include "common/survey.h"

typedef struct options {
    llm_options llm;
    const char *prompt, *text, *ids, *dump, *encode, *decode, *format, *isa, *against, *steps_at;
    const char *out, **file; // file: texts, or with --series folders
    size_t tokens, greedy, stride, bootstrap, n_files;
    uint64_t seed;
    double temperature, top_p;
    int special, inspect, series, json;
    json lines;
} options;

static void write_config(options *o, const llm *m) {
    json *j = &o->lines;
    json_config(j, "llm");
    json_text(j, "model", m->o->model);
    json_text(j, "family", m->model.family);
    json_whole(j, "layers", m->layers);
    json_whole(j, "mixtures", m->mixtures);
    json_whole(j, "experts", m->experts);
    json_whole(j, "top_k", m->slots);
    json_text(j, "format", o->format);
    json_whole(j, "seed", o->seed);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_whole(j, "threads", moe_workers(&m->s.parallel));
    json_end(j);
}

// ---- generating ----

typedef struct chooser {
    double temperature, top_p;
    uint64_t seed, drawn;
    int32_t *order; // (vocab)
    float *prob;
    int32_t chosen;
} chooser;
static void choose(void *user, const llm *m, size_t first, size_t rows) {
    chooser *c = user;
    const float *logits = m->logits;
    float draw, sum = 0;
    (void)first, (void)rows;
    c->chosen = 0;
    for (size_t i = 1; i < m->vocab; i++)
        if (logits[i] > logits[c->chosen]) c->chosen = (int32_t)i;
    if (c->temperature <= 0) return;
    nn_must(moe_softmax(1, m->vocab, (float)c->temperature, logits, c->prob));
    nn_must(moe_topk(1, m->vocab, m->vocab, c->prob, c->order, NULL));
    nn_must(moe_rand_uniform(c->seed, c->drawn++, 1, 0, 1, &draw));
    size_t kept = 0, i = 0;
    while (kept < m->vocab && (kept == 0 || sum < (float)c->top_p)) sum += c->prob[c->order[kept++]];
    for (draw *= sum; i + 1 < kept && draw >= c->prob[c->order[i]]; i++) draw -= c->prob[c->order[i]];
    c->chosen = c->order[i];
}
// Bytes a second that all threads together read from memory.
static void read_task(void *arg, size_t i, size_t worker) {
    const float *block = *(const float *const *)arg + i * (1 << 20);
    float lane[16] = {0};
    for (size_t k = 0; k < 1 << 20; k += 16)
        for (size_t j = 0; j < 16; j++) lane[j] += block[k + j];
    volatile float keep = lane[worker % 16];
    (void)keep;
}
static double read_bandwidth(llm *m) {
    size_t blocks = 64; // of 4 MB
    float *room = allocate(blocks << 20, sizeof *room);
    double best = 0;
    for (size_t i = 0; i < blocks << 20; i += 1024) room[i] = 1; // pages of its own
    for (int again = 0; again < 3; again++) {
        double begin = seconds_now();
        moe_run(&m->s.parallel, blocks, read_task, &room);
        double rate = (double)(blocks << 22) / (seconds_now() - begin);
        if (rate > best) best = rate;
    }
    free(room);
    return best;
}
static int is_end(const llm *m, int32_t id) {
    moe_json v, item = {0};
    double n;
    if (!js_get(&m->config.root, "eos_token_id", &v)) return 0;
    if (moe_json_number(&v, &n) == MOE_OK) return n == (double)id;
    while (v.kind == MOE_JSON_LIST && moe_json_next(&v, NULL, &item))
        if (moe_json_number(&item, &n) == MOE_OK && n == (double)id) return 1;
    return 0;
}
// Prints what a new token adds to the text; of half a character nothing.
static void print_text(const tokenizer *t, const token_list *ids, size_t *printed, FILE *human) {
    text_buffer b = tokenizer_decode(t, ids->id, ids->n, 1);
    size_t end = b.length;
    while (end >= 3 && memcmp(b.text + end - 3, "\xEF\xBF\xBD", 3) == 0) end -= 3;
    if (end > *printed) fwrite(b.text + *printed, 1, end - *printed, human);
    if (end > *printed) *printed = end;
    fflush(human);
    free(b.text);
}
// How fast that was; the bytes of weights that a token reads, and their share of the read bandwidth.
typedef struct pace {
    double prompt, tokens, bytes, reads, share; // prompt, tokens: a second
} pace;
static pace pace_of(llm *m, size_t prompt, size_t made, const double spent[2]) {
    pace p = {(double)prompt / spent[0], 0, m->bytes_dense + m->bytes_expert, NAN, NAN};
    if (made > 1) p.tokens = (double)(made - 1) / spent[1];
    if (m->o->quiet) return p;
    p.reads = read_bandwidth(m);
    p.share = p.bytes * p.tokens / p.reads;
    fprintf(stderr, "loaded in %.2f s; prompt: %zu tokens, %.1f/s; then %.2f tokens/s", m->seconds, prompt, p.prompt,
            p.tokens);
    fprintf(stderr, ", %.3g GB of weights a token, %.0f%% of the read bandwidth (%.1f GB/s)\n", p.bytes / 1e9,
            100 * p.share, p.reads / 1e9);
    return p;
}
// Writes n tokens on; returns them.
static token_list generate(llm *m, const options *o, token_list *ids, size_t n, const tokenizer *t, pace *speed) {
    chooser c = {t ? o->temperature : 0, o->top_p, o->seed, 0, allocate(m->vocab, 4), allocate(m->vocab, 4), 0};
    llm_taker take = {NULL, choose, &c, 1};
    token_list made = {0};
    size_t prompt = ids->n, printed = 0;
    FILE *human = o->json ? stderr : stdout;
    double begin = seconds_now(), spent[2];
    if (t) print_text(t, ids, &printed, human);
    llm_forward(m, ids->id, prompt, 0, &take);
    spent[0] = seconds_now() - begin;
    for (begin = seconds_now(); made.n < n; llm_forward(m, ids->id + ids->n - 1, 1, ids->n - 1, &take)) {
        token_push(&made, c.chosen);
        token_push(ids, c.chosen);
        if (t && is_end(m, c.chosen)) break;
        if (t) print_text(t, ids, &printed, human);
        if (made.n == n) break;
    }
    spent[1] = seconds_now() - begin;
    free(c.order);
    free(c.prob);
    if (t && (printed || !o->llm.quiet)) fputc('\n', human), fflush(human);
    *speed = pace_of(m, prompt, made.n, spent);
    return made;
}
static void write_ids(json *j, const token_list *ids) {
    json_list_begin(j, "ids");
    for (size_t i = 0; i < ids->n; i++) json_whole(j, NULL, (uint64_t)ids->id[i]);
    json_list_end(j);
}
static void print_ids(const options *o, const char *event, const token_list *ids) {
    json j = {{stdout}, 0};
    if (o->json) {
        json_begin(&j);
        if (event) json_text(&j, "event", event);
        write_ids(&j, ids);
        json_end(&j);
    } else {
        for (size_t i = 0; i < ids->n; i++) printf("%s%d", i ? "," : "", (int)ids->id[i]);
        printf("\n");
    }
}

// ---- dumps ----

typedef struct dumped {
    size_t tokens;
    float *logits, *router; // (T, vocab), (mixtures, T, E)
    int32_t *index;         // (mixtures, T, k)
} dumped;
static void dumped_layer(void *user, const llm *m, const llm_routed *r) {
    dumped *d = user;
    size_t at = r->mixture * d->tokens + r->first;
    if (r->logits) memcpy(d->router + at * m->experts, r->logits, r->n * m->experts * sizeof(float));
    memcpy(d->index + at * m->slots, r->index, r->n * m->slots * sizeof(int32_t));
}
static void dumped_rows(void *user, const llm *m, size_t first, size_t rows) {
    dumped *d = user;
    memcpy(d->logits + first * m->vocab, m->logits, rows * m->vocab * sizeof(float));
}
// A file's header; its data follow.
static FILE *begin_npy(const char *path, const char *type, const char *shape) {
    char text[128];
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot write %s: %s", path, strerror(errno));
    int used = snprintf(text, sizeof text, "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", type, shape);
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f); // the header has 118 bytes
    fprintf(f, "%s%*s\n", text, 117 - used, "");
    return f;
}
static void write_npy(const char *prefix, const char *name, const char *type, const char *shape, const void *data,
                      size_t count) {
    char path[1024];
    snprintf(path, sizeof path, "%s.%s.npy", prefix, name);
    FILE *f = begin_npy(path, type, shape);
    fwrite(data, 4, count, f);
    close_output(f, path);
}
static void write_dump(llm *m, const char *prefix, const token_list *ids) {
    size_t T = ids->n, M = m->mixtures;
    char shape[96];
    dumped d = {T, allocate(T * m->vocab, 4), allocate(M * T * m->experts, 4), allocate(M * T * m->slots, 4)};
    llm_taker take = {dumped_layer, dumped_rows, &d, 0};
    llm_forward(m, ids->id, T, 0, &take);
    snprintf(shape, sizeof shape, "%zu, %zu", T, m->vocab);
    write_npy(prefix, "logits", "<f4", shape, d.logits, T * m->vocab);
    snprintf(shape, sizeof shape, "%zu, %zu, %zu", M, T, m->experts);
    if (!m->o->replay) write_npy(prefix, "router_logits", "<f4", shape, d.router, M * T * m->experts);
    snprintf(shape, sizeof shape, "%zu, %zu, %zu", M, T, m->slots);
    write_npy(prefix, "experts", "<i4", shape, d.index, M * T * m->slots);
    free(d.logits);
    free(d.router);
    free(d.index);
}

// ---- perplexity ----

// Nats a token. Windows of `context` tokens, `stride` apart; of each only the tokens count that no window before it
// had.
static double perplexity(llm *m, const token_list *ids, size_t context, size_t stride, size_t *counted) {
    llm_nats r = {.from = 1};
    progress p = progress_begin("reading", "tokens", ids->n, m->o->quiet);
    for (size_t begin = 0, done = 1; done < ids->n; begin += stride) {
        r.ids = ids->id + begin;
        r.n = ids->n - begin < context ? ids->n - begin : context;
        r.from = done - begin;
        if (r.from >= r.n) continue;
        llm_taker take = {NULL, llm_nats_rows, &r, 0};
        llm_forward(m, r.ids, r.n, 0, &take);
        done = begin + r.n;
        progress_update(&p, done, "perplexity %.4f", exp(r.sum / (double)r.counted));
    }
    progress_clear(&p);
    *counted = r.counted;
    return r.sum / (double)(r.counted ? r.counted : 1);
}
// Of a text in one format, as an object of the lines.
static void write_perplexity(options *o, const char *event, double mean, size_t counted, size_t context,
                             size_t stride) {
    json *j = &o->lines;
    json_begin(j);
    json_text(j, "event", event);
    if (strcmp(event, "final") != 0) json_text(j, "format", moe_format_name(o->llm.experts));
    json_whole(j, "tokens", counted);
    json_whole(j, "context", context);
    json_whole(j, "stride", stride);
    json_real(j, "nats", mean);
    json_real(j, "perplexity", exp(mean));
    json_end(j);
}

// ---- how it routes ----

static void survey_layer(void *user, const llm *m, const llm_routed *r) {
    survey *v = user;
    size_t E = m->experts, S = m->slots, at = r->mixture * v->n_tokens + v->begin + r->first;
    double *sum = v->saliency + r->mixture * E;
    uint64_t *count = v->count + r->mixture * E, before;
    if (!file_seek(v->file, 128 + (uint64_t)at * E * sizeof(float)) ||
        fwrite(r->logits, sizeof(float), r->n * E, v->file) != r->n * E)
        die("cannot write %s: %s", v->logits, strerror(errno));
    memcpy(v->index + at * S, r->index, r->n * S * sizeof *r->index);
    nn_must(moe_layer_worth(r->layer, MOE_WORTH_SALIENCY, r->x, r->n, v->worth));
    for (size_t e = 0; e < E; e++) {
        before = count[e];
        for (size_t i = 0; i < r->n * S; i++) count[e] += r->index[i] == (int32_t)e;
        if (count[e] > before) sum[e] += v->worth[e] * (double)(count[e] - before);
    }
}
// The texts' tokens, one text after the other.
static void survey_texts(survey *v, const options *o, const char *const *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        size_t size;
        const char *bytes = file_view(text[i], &size);
        if (!bytes) refuse(text[i], "cannot be read: %s", strerror(errno));
        if (text_bad(bytes, size) < size) refuse(text[i], "byte %zu is not UTF-8", text_bad(bytes, size));
        token_list ids = tokenizer_encode(v->t, bytes, size, o->special);
        if (!ids.n) refuse(text[i], "no token in it");
        for (size_t k = 0; k < ids.n; k++) token_push(&v->ids, ids.id[k]), token_push(&v->label, (int32_t)i);
        free(ids.id);
    }
    v->n_tokens = v->ids.n;
}
static void survey_read(survey *v, llm *m, size_t context) {
    char shape[96];
    size_t T = v->n_tokens, M = v->mixtures = m->mixtures, E = v->n_experts = m->experts;
    llm_taker take = {survey_layer, NULL, v, 0};
    progress p = progress_begin("reading", "tokens", T, m->o->quiet);
    v->slots = m->slots;
    v->index = allocate(M * T * v->slots, sizeof *v->index);
    v->saliency = allocate(M * E, sizeof *v->saliency);
    v->count = allocate(M * E, sizeof *v->count);
    v->worth = allocate(E, sizeof *v->worth);
    snprintf(shape, sizeof shape, "%zu, %zu, %zu", M, T, E);
    v->file = begin_npy(v->logits, "<f4", shape);
    for (size_t n; v->begin < T; v->begin += n) {
        for (n = 1; v->begin + n < T && n < context && v->label.id[v->begin + n] == v->label.id[v->begin];) n++;
        llm_forward(m, v->ids.id + v->begin, n, 0, &take);
        progress_update(&p, v->begin + n, "%s", "");
    }
    progress_clear(&p);
    close_output(v->file, v->logits);
    for (size_t i = 0; i < M * E; i++) v->saliency[i] /= (double)v->count[i];
    snprintf(shape, sizeof shape, "%zu, %zu, %zu", M, T, v->slots);
    write_npy(v->prefix, "experts", "<i4", shape, v->index, M * T * v->slots);
    snprintf(shape, sizeof shape, "%zu,", T);
    write_npy(v->prefix, "labels", "<i4", shape, v->label.id, T);
}
// The model in `dir`, which the lines' configuration is of if `first`.
static survey *survey_model(options *o, const char *dir, const char *name, const char *const *text, size_t n,
                            int first) {
    survey *v = allocate(1, sizeof *v);
    llm_options mine = o->llm;
    mine.model = dir;
    v->t = llm_tokenizer(dir);
    snprintf(v->prefix, sizeof v->prefix, "%s/%s", o->out, name);
    snprintf(v->logits, sizeof v->logits, "%s.router_logits.npy", v->prefix);
    snprintf(v->experts, sizeof v->experts, "%s.experts.npy", v->prefix);
    snprintf(v->labels, sizeof v->labels, "%s.labels.npy", v->prefix);
    survey_texts(v, o, text, n);
    llm *m = llm_open(&mine);
    size_t context = llm_window_of(m);
    llm_load(m, context);
    if (!m->mixtures) refuse(dir, "no mixture in it");
    if (first) write_config(o, m);
    survey_read(v, m, context);
    llm_close(m);
    return v;
}
// Its layers, as build/inspect has them.
static void survey_inspect(const survey *v, inspect_config *c, size_t texts, inspect_table *t) {
    c->labels = texts > 1 ? v->labels : NULL;
    inspect_files(c, v->logits, v->experts, NULL, t);
}

static inspect_config inspect_options(options *o) {
    inspect_config c = {.name = "llm", .batches = 50, .types = 8, .out = o->out, .explain = 1, .relations = 1};
    c.csv = c.html = 1;
    c.bootstrap = o->bootstrap, c.seed = o->seed, c.quiet = o->llm.quiet, c.threads = o->llm.threads;
    c.parallel.n_threads = o->llm.threads;
    c.steps_at = o->steps_at;
    return c;
}
static void end_lines(options *o, size_t tokens, double gamma) {
    json_begin(&o->lines);
    json_text(&o->lines, "event", "final");
    json_whole(&o->lines, "tokens", tokens);
    json_real(&o->lines, "gamma_eff", gamma);
    json_end(&o->lines);
}
// Mean gamma_eff of the layers that tell it.
static double mean_gamma(const inspect_table *t) {
    double sum = 0, n = 0;
    for (size_t i = 0; i < t->n; i++)
        if (isfinite(t->row[i].gamma)) sum += t->row[i].gamma, n++;
    return sum / n;
}
static void run_inspect(options *o) {
    FILE *human = o->json ? stderr : stdout, *csv;
    inspect_config c = inspect_options(o);
    inspect_table t = {0}, other = {0};
    survey *v = survey_model(o, o->llm.model, "llm", o->file, o->n_files, 1);
    survey_inspect(v, &c, o->n_files, &t);
    if (o->against) survey_inspect(survey_model(o, o->against, "llm.against", o->file, o->n_files, 0), &c, 1, &other);
    const inspect_outputs to = {human, NULL, &o->lines};
    c.labels = o->n_files > 1 ? v->labels : NULL;
    for (size_t i = 0; i < o->n_files && o->n_files > 1; i++) fprintf(human, "label %zu: %s\n", i, o->file[i]);
    for (size_t i = 0; i < t.n; i++) inspect_write_layer(&o->lines, &t.row[i]);
    inspect_print_table(human, &c, &t);
    inspect_warn(&t);
    csv = open_output(o->out, "llm.tokens.csv");
    fprintf(csv, "layer,expert,rank,id,text,taken,seen,share,lift\n");
    survey_experts(v, &to, csv);
    close_output(csv, "llm.tokens.csv");
    survey_write(o->out, v, &t, o->file);
    inspect_more(&c, &to, &t, o->against ? &other : NULL);
    c.also = survey_page, c.user = v;
    inspect_page(&c, &t, o->against ? &other : NULL, NULL, 0);
    end_lines(o, v->n_tokens, mean_gamma(&t));
    fprintf(human, "see %s/llm.html, llm.csv, llm.experts.csv, llm.tokens.csv, llm.jsonl\n", o->out);
}
// The folders are checkpoints, in order.
static void run_series(options *o) {
    FILE *human = o->json ? stderr : stdout;
    inspect_config c = inspect_options(o);
    inspect_table t = {0};
    size_t *end = allocate(o->n_files, sizeof *end), last;
    survey *v = NULL;
    char name[32];
    for (size_t i = 0; i < o->n_files; i++) {
        snprintf(name, sizeof name, "llm.%zu", i + 1);
        v = survey_model(o, o->file[i], name, &o->text, 1, !i);
        survey_inspect(v, &c, 1, &t);
        for (size_t k = i ? end[i - 1] : 0; k < t.n; k++) inspect_write_layer(&o->lines, &t.row[k]);
        end[i] = t.n;
    }
    c.n_files = o->n_files;
    inspect_series s = inspect_make_series(&c, &t, end);
    last = o->n_files > 1 ? end[o->n_files - 2] : 0;
    inspect_table shown = {t.row + last, t.n - last};
    inspect_print_table(human, &c, &shown);
    inspect_more(&c, &(inspect_outputs){human, NULL, &o->lines}, &shown, NULL);
    inspect_print_series(human, &s);
    inspect_write_phases(&o->lines, &s);
    FILE *f = open_output(o->out, "llm.svg");
    inspect_draw_series(f, &s);
    close_output(f, "llm.svg");
    c.also = survey_page, c.user = v;
    inspect_page(&c, &t, NULL, &s, last);
    end_lines(o, v->n_tokens, s.gamma[s.n - 1]);
    fprintf(human, "see %s/llm.svg, llm.html, llm.csv, llm.jsonl\n", o->out);
}

// ---- what the flags ask for ----

static token_list read_ids(const char *text) {
    token_list l = {0};
    for (char *end; *text; text = *end ? end + 1 : end) {
        long id = strtol(text, &end, 10);
        if (end == text || id < 0 || id > INT32_MAX || (*end && (*end != ',' || !end[1])))
            args_fail("llm", "--ids: '%s' is not a list of token ids", text);
        token_push(&l, (int32_t)id);
    }
    if (!l.n) args_fail("llm", "--ids: empty");
    return l;
}
static void run_ids(options *o) {
    pace speed;
    llm *m = llm_open(&o->llm);
    token_list ids = read_ids(o->ids);
    llm_load(m, ids.n + o->greedy);
    if (o->dump) write_dump(m, o->dump, &ids);
    if (o->greedy || !o->dump) {
        token_list made = generate(m, o, &ids, o->greedy ? o->greedy : o->tokens, NULL, &speed);
        print_ids(o, "final", &made);
    }
    llm_close(m);
}
static void run_prompt(options *o) {
    const tokenizer *t = llm_tokenizer(o->llm.model);
    json *j = &o->lines;
    pace speed;
    size_t bad = text_bad(o->prompt, strlen(o->prompt));
    if (bad < strlen(o->prompt)) args_fail("llm", "--prompt: byte %zu is not UTF-8", bad);
    token_list ids = tokenizer_encode(t, o->prompt, strlen(o->prompt), 1);
    if (!ids.n) args_fail("llm", "--prompt: no token to begin with");
    llm *m = llm_open(&o->llm);
    llm_load(m, ids.n + o->tokens);
    write_config(o, m);
    token_list made = generate(m, o, &ids, o->tokens, t, &speed);
    text_buffer text = tokenizer_decode(t, made.id, made.n, 1);
    json_begin(j);
    json_text(j, "event", "final");
    write_ids(j, &made);
    json_text(j, "text", text.text ? text.text : "");
    json_real(j, "load_seconds", m->seconds);
    json_real(j, "prompt_tokens_per_s", speed.prompt);
    json_real(j, "tokens_per_s", speed.tokens);
    json_real(j, "bytes_per_token", speed.bytes);
    json_real(j, "read_share", speed.share);
    json_end(j);
    llm_close(m);
}
// Perplexity of a text: in one format, or in each.
static void run_text(options *o) {
    const tokenizer *t = llm_tokenizer(o->llm.model);
    FILE *human = o->json ? stderr : stdout;
    int all = strcmp(o->format, "all") == 0;
    size_t n, counted;
    const char *text = file_view(o->text, &n);
    if (!text) refuse(o->text, "cannot be read: %s", strerror(errno));
    if (text_bad(text, n) < n) refuse(o->text, "byte %zu is not UTF-8", text_bad(text, n));
    token_list ids = tokenizer_encode(t, text, n, o->special);
    if (ids.n < 2) refuse(o->text, "fewer than two tokens");
    double first = NAN, mean;
    if (all) fprintf(human, "format  perplexity   against f32  bytes of experts a token\n");
    for (int f = all ? 0 : (int)o->llm.experts; moe_format_name((moe_format_kind)f); f++) {
        o->llm.experts = (moe_format_kind)f;
        llm *m = llm_open(&o->llm);
        size_t context = llm_window_of(m), stride = o->stride ? o->stride : context / 2;
        if (!stride || stride > context) args_fail("llm", "--stride: must be 1 to the context, %zu", context);
        llm_load(m, context);
        if (!all || !f) write_config(o, m);
        mean = perplexity(m, &ids, context, stride, &counted);
        if (isnan(first)) first = mean;
        if (all) {
            write_perplexity(o, "format", mean, counted, context, stride);
            fprintf(human, "%-6s  %10.4f  %+10.3f%%  %.0f\n", moe_format_name(o->llm.experts), exp(mean),
                    100 * (exp(mean - first) - 1), m->bytes_expert);
        } else
            fprintf(human, "perplexity %.6f over %zu tokens (%.9f nats each), windows of %zu, %zu apart\n", exp(mean),
                    counted, mean, context, stride);
        llm_close(m);
        if (!all || !moe_format_name((moe_format_kind)(f + 1))) {
            write_perplexity(o, "final", first, counted, context, stride);
            return;
        }
    }
}
static void run_encode(const options *o) {
    size_t n = strlen(o->encode), bad = text_bad(o->encode, n);
    if (bad < n) args_fail("llm", "--encode: byte %zu is not UTF-8", bad);
    token_list ids = tokenizer_encode(llm_tokenizer(o->llm.model), o->encode, n, o->special);
    print_ids(o, NULL, &ids);
}
static void run_decode(const options *o) {
    token_list ids = read_ids(o->decode);
    text_buffer b = tokenizer_decode(llm_tokenizer(o->llm.model), ids.id, ids.n, 0);
    printf("%s\n", b.text);
}
// The checkpoint that this repository carries, and a sentence of its test text.
static void use_sample(options *o, const char *program) {
    static char folder[1100], prompt[400];
    char path[1200];
    size_t size, begin = 0, words = 0, n = 0;
    if (!sample_folder(program, "examples/data/wikitext2", "model/config.json", folder, sizeof folder))
        args_fail("llm", "--model DIR is missing, and examples/data/wikitext2/model is not there");
    snprintf(path, sizeof path, "%s/wiki.test.tokens", folder);
    const char *text = file_view(path, &size);
    for (size_t lines = 0; text && lines < 3 && begin < size; begin++) lines += text[begin] == '\n';
    for (; text && begin + n < size && n + 1 < sizeof prompt && text[begin + n] != '\n'; n++) {
        words += text[begin + n] == ' ';
        if (words > 13) break;
        prompt[n] = text[begin + n];
    }
    strcat(folder, "/model");
    o->llm.model = folder;
    if (!o->prompt && !o->text && n) o->prompt = prompt;
    if (o->temperature <= 0) o->temperature = 0.8; // the likeliest token over and over is dull
}
static void check_options(options *o, const char *program) {
    nn_isa("llm", o->isa);
    int all = strcmp(o->format, "all") == 0, other = o->ids || o->encode || o->decode;
    while (!all && moe_format_name(o->llm.experts) && strcmp(o->format, moe_format_name(o->llm.experts)) != 0)
        o->llm.experts = (moe_format_kind)(o->llm.experts + 1);
    if (!moe_format_name(o->llm.experts))
        args_fail("llm", "--format: f32, bf16, int8, int4 or all, not '%s'", o->format);
    if (o->series && (!o->text || !o->n_files)) args_fail("llm", "--series: with --text FILE and folders");
    if (o->series && !o->bootstrap) args_fail("llm", "--series: phases need intervals, so --bootstrap above 0");
    if (o->steps_at && !o->series) args_fail("llm", "--steps-at: only with --series");
    if (!o->series && o->n_files && !o->inspect) args_fail("llm", "what is '%s'?", o->file[0]);
    if (o->inspect && !o->text && !o->n_files) args_fail("llm", "--inspect: with --text FILE");
    if (o->against && !o->inspect) args_fail("llm", "--against: only with --inspect");
    if ((o->inspect || o->series) && (all || o->llm.record || o->llm.replay))
        args_fail("llm", "--inspect and --series: not with --record, --replay or --format all");
    if (all && (!o->text || o->llm.record || o->llm.replay)) args_fail("llm", "--format all: with --text, no --record");
    if (o->inspect && o->series) args_fail("llm", "--inspect is what --series does already");
    int asked = (o->prompt != NULL) + (o->text != NULL) + (o->ids != NULL) + (o->encode != NULL) + (o->decode != NULL);
    if (asked > 1) args_fail("llm", "one of --prompt, --text, --ids, --encode and --decode");
    if (o->dump && !o->ids) args_fail("llm", "--dump goes with --ids");
    if (!o->llm.model && !o->series && !other) use_sample(o, program);
    if (!o->llm.model && !o->series) args_fail("llm", "--model DIR is missing");
    if (!asked && !o->prompt && !o->n_files) o->prompt = "The ";
    o->llm.alike = o->dump || o->inspect;
    if (o->inspect && o->text) { // the first of the texts
        memmove(o->file + 1, o->file, o->n_files++ * sizeof *o->file);
        o->file[0] = o->text;
    }
}

static void run(options *o) {
    if (o->encode || o->decode || o->ids) {
        if (o->encode)
            run_encode(o);
        else if (o->decode)
            run_decode(o);
        else
            run_ids(o);
        return;
    }
    o->lines = (json){{open_output(o->out, "llm.jsonl"), o->json ? stdout : NULL}, 0};
    if (o->series)
        run_series(o);
    else if (o->inspect)
        run_inspect(o);
    else if (o->text)
        run_text(o);
    else
        run_prompt(o);
    close_output(o->lines.file[0], "llm.jsonl");
}

static void parse(options *o, int argc, char **argv) {
    args_option table[] = {
        {"model", ARGS_TEXT, &o->llm.model, "DIR", "config.json, safetensors, tokenizer.json", 0, 0},
        {"prompt", ARGS_TEXT, &o->prompt, "TEXT", "write on from here", 0, 0},
        {"tokens", ARGS_SIZE, &o->tokens, "N", "how many to write", 1, 1 << 24},
        {"temperature", ARGS_REAL, &o->temperature, "X", "of the drawing (0: the likeliest token)", 0, 1000},
        {"top-p", ARGS_REAL, &o->top_p, "X", "draw from the likeliest tokens of this share", 0, 1},
        {"text", ARGS_TEXT, &o->text, "FILE", "perplexity of a text; with --inspect and --series what is routed", 0, 0},
        {"inspect", ARGS_FLAG, &o->inspect, NULL, "how the texts are routed; more FILEs: a domain each", 0, 0},
        {"against", ARGS_TEXT, &o->against, "DIR", "with --inspect: another checkpoint beside it", 0, 0},
        {"series", ARGS_FLAG, &o->series, NULL, "the DIRs that follow are checkpoints, in order", 0, 0},
        {"steps-at", ARGS_TEXT, &o->steps_at, "A,B,...", "the checkpoints' steps (default: 1, 2, ...)", 0, 0},
        {"bootstrap", ARGS_SIZE, &o->bootstrap, "N", "replicates for the intervals (0: none)", 0, 1 << 24},
        {"record", ARGS_TEXT, &o->llm.record, "FILE", "keep the run's routing", 0, 0},
        {"replay", ARGS_TEXT, &o->llm.replay, "FILE", "take experts and weights from there, not from routers", 0, 0},
        {"context", ARGS_SIZE, &o->llm.context, "N", "tokens of a window (0: the model's, at most 1024)", 0, 1 << 24},
        {"stride", ARGS_SIZE, &o->stride, "N", "between windows (0: half a window)", 0, 1 << 24},
        {"ids", ARGS_TEXT, &o->ids, "I,J,..", "token ids instead of a prompt", 0, 0},
        {"greedy", ARGS_SIZE, &o->greedy, "N", "with --ids: so many of the likeliest", 0, 1 << 24},
        {"dump", ARGS_TEXT, &o->dump, "PREFIX", "with --ids: logits, router logits and experts as .npy", 0, 0},
        {"encode", ARGS_TEXT, &o->encode, "TEXT", "only its token ids", 0, 0},
        {"decode", ARGS_TEXT, &o->decode, "I,J,..", "only their text", 0, 0},
        {"special", ARGS_FLAG, &o->special, NULL, "special tokens around what --encode and --text read", 0, 0},
        {"batch", ARGS_SIZE, &o->llm.batch, "N", "tokens of a prompt at a time; changes no bit", 1, 65536},
        {"format", ARGS_TEXT, &o->format, "NAME", "of the experts: f32, bf16, int8, int4; with --text all", 0, 0},
        ARGS_SEED(&o->seed),
        ARGS_THREADS(&o->llm.threads),
        ARGS_ISA(&o->isa),
        ARGS_OUT(&o->out),
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->llm.quiet)};
    o->file = allocate((size_t)argc + 1, sizeof *o->file);
    o->n_files = args_parse_files("llm", "Runs a mixture-of-experts language model.", table,
                                  sizeof table / sizeof *table, argc, argv, o->file);
}

int main(int argc, char **argv) {
    options o = {.format = "f32", .isa = "auto", .tokens = 64, .seed = 1, .top_p = 1, .out = "out"};
    o.llm.batch = 128;
    o.bootstrap = 1000;
    parse(&o, argc, argv);
    check_options(&o, argv[0]);
    run(&o);
    return 0;
}
