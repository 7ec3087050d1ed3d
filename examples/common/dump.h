// dump.h - router dumps of any size: .npy files of logits, top-k indices or hidden states, read in pieces by several
// threads into the counters of moe_game. Memory does not grow with the file.
//
// A bad file ends the program with status 2 and one line that names the file and the byte.
#ifndef EX_DUMP_H
#define EX_DUMP_H

#include "platform.h"

#include <math.h>

#include "moe.h"

#include <float.h>
#include <math.h>

#define DUMP_PIECE ((size_t)256 << 10) // bytes that are read at once: they stay in the second-level cache

typedef struct dump_file {
    const char *path; // NULL = there is no such file
    moe_npy npy;
    const unsigned char *view; // its elements in memory, read from disk where they are looked at; NULL = by pieces
    size_t layers, tokens, width; // of (tokens,), (tokens, width) or (layers, tokens, width)
} dump_file;

EX_PRINTF(3, 4) EX_FUNC void dump_fail(const char *path, uint64_t offset, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "inspect: %s: byte %llu: ", path, (unsigned long long)offset);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

// The elements of a file as a view, which costs less than reading it piece by piece. On Windows a view would be a copy,
// and an address space of 32 bits may have no room: NULL. (DUMP_READ: for tests of the other way.)
EX_FUNC const unsigned char *dump_view(const dump_file *d) {
#if defined(_WIN32) || defined(DUMP_READ)
    (void)d;
    return NULL;
#else
    size_t size;
    const unsigned char *bytes = file_view(d->path, &size);
    uint64_t need = (uint64_t)d->npy.count * moe_dtype_size(d->npy.dtype);
    return bytes && size >= d->npy.data && size - d->npy.data >= need ? bytes + d->npy.data : NULL;
#endif
}

EX_FUNC dump_file dump_open(const char *path) {
    dump_file d = {.path = path, .layers = 1, .width = 1};
    FILE *f = fopen(path, "rb");
    if (!f) dump_fail(path, 0, "%s", strerror(errno));
    uint64_t length = file_size(f);
    size_t have = 0, want = 4096, got;
    char *head = NULL;
    moe_status s;
    do { // the header, longer if it says so
        head = realloc(head, want);
        if (!head) die("out of memory");
        have += got = fread(head + have, 1, want - have, f);
        s = moe_npy_header(&d.npy, head, have, length);
        want = d.npy.offset;
    } while (s == MOE_E_FILE_SHORT && want > have && got);
    if (ferror(f)) dump_fail(path, have, "%s", strerror(errno)); // a folder, say
    fclose(f);
    free(head);
    if (s) dump_fail(path, d.npy.offset, "%s", moe_status_string(s));
    if (!d.npy.n_dims || d.npy.n_dims > 3) dump_fail(path, 0, "%zu dimensions: 2 or 3 are expected", d.npy.n_dims);
    const size_t *dim = d.npy.dim;
    if (d.npy.n_dims == 3) d.layers = *dim++;
    d.tokens = dim[0];
    if (d.npy.n_dims > 1) d.width = dim[1];
    if (!d.npy.count) dump_fail(path, d.npy.data, "no tokens: the shape has a 0");
    d.view = dump_view(&d);
    return d;
}

// Integers; uint16 may be bfloat16 as well, and is an index where one is asked for.
EX_FUNC int dump_is_index(const dump_file *d) { return d->npy.dtype >= MOE_DTYPE_I32; }
EX_FUNC int dump_can_index(const dump_file *d) { return dump_is_index(d) || d->npy.dtype == MOE_DTYPE_U16; }

// One layer of a dump. Batch b is tokens b T / B .. (b + 1) T / B - 1; of all tokens an even sample is kept.
typedef struct dump_layer {
    const dump_file *logits, *indices, *labels; // any may be NULL, but not both of the first
    size_t layer, experts, top_k, n_labels;
    int probabilities;   // the logits are probabilities: their logarithm is taken
    const float *router; // (experts, width of logits): the logits are hidden states, and these the router's weights
    moe_game *game;
    int null;           // also what plain top-k of shuffled logits picks (moe_game_excess)
    uint64_t *first;    // (B, experts): first choices
    uint64_t *labelled; // (workers, experts, n_labels): first choices by label
    size_t n_sample;
    float *sample;          // (n_sample, experts)
    int32_t *sample_index;  // (n_sample, top_k)
    uint32_t *sample_batch; // (n_sample)
    int32_t *sample_label;  // (n_sample), with labels; below 0 = none
    const moe_parallel *parallel;
    const float *bias; // (experts) with a router: the choices are the highest sigmoid(logit) + bias; indices = logits
} dump_layer;

typedef struct dump_worker {
    FILE *file[3]; // logits, indices, labels
    unsigned char *raw;
    float *values, *logits, *scores;
    const float *numbers, *z; // of this piece: as read, and its logits; in `values`, in `logits`, or in the file's view
    int32_t *index, *label;
    uint32_t *class;
    void *work;
    size_t work_bytes;
} dump_worker;

// What stopped a batch.
typedef struct dump_error {
    const char *path, *text;
    uint64_t offset;
    size_t layer, token, number; // where text is about one number: numbers from 1, 0 = no such place
    const char *what;            // that is numbered: "expert"
} dump_error;

typedef struct dump_job {
    dump_layer *l;
    size_t piece; // tokens
    size_t begin; // the first batch of this round
    dump_worker *worker;
    dump_error *error; // (B)
} dump_job;

EX_FUNC size_t dump_tokens(const dump_layer *l) { return l->logits ? l->logits->tokens : l->indices->tokens; }

// Rows first .. first + n - 1 of a layer, as bytes: in a view of the file, or read into `out`. NULL: they cannot be.
EX_FUNC const unsigned char *dump_rows(dump_worker *w, int which, const dump_file *d, size_t layer, size_t first,
                                       size_t n, void *out, dump_error *e) {
    size_t row = d->width * moe_dtype_size(d->npy.dtype);
    uint64_t at = ((uint64_t)layer * d->tokens + first) * row;
    if (d->view) return d->view + at;
    at += d->npy.data;
    if (!w->file[which]) {
        w->file[which] = fopen(d->path, "rb");
        if (w->file[which]) setvbuf(w->file[which], NULL, _IONBF, 0); // pieces are large
    }
    if (w->file[which] && file_seek(w->file[which], at) && fread(out, row, n, w->file[which]) == n) return out;
    *e = (dump_error){.path = d->path, .text = "cannot be read", .offset = at};
    return NULL;
}

EX_FUNC int dump_little_endian(void) {
    const uint32_t one = 1;
    unsigned char low;
    memcpy(&low, &one, 1);
    return low;
}

// Brings a piece of a view into the second-level cache: front to back, as fast as memory gives it, which the rows and
// columns of what follows would not be.
EX_FUNC void dump_touch(const unsigned char *bytes, size_t n) {
    volatile unsigned char sink = 0;
    unsigned char sum = 0;
    for (size_t i = 0; i < n; i += 64) sum = (unsigned char)(sum ^ bytes[i]);
    sink = sum;
    (void)sink;
}

// The numbers of n tokens as floats: as they stand in the file, or in `values`. NULL: they cannot be read.
EX_FUNC const float *dump_values(dump_job *j, dump_worker *w, size_t first, size_t n, float *values, dump_error *e) {
    const dump_file *d = j->l->logits;
    int direct = d->npy.dtype == MOE_DTYPE_F32 && dump_little_endian();
    void *to = direct ? (void *)values : w->raw;
    const unsigned char *raw = dump_rows(w, 0, d, j->l->layer < d->layers ? j->l->layer : 0, first, n, to, e);
    if (!raw || raw == (const unsigned char *)values) return raw ? values : NULL;
    if (direct && (uintptr_t)raw % sizeof(float) == 0) {
        dump_touch(raw, n * d->width * sizeof(float));
        return (const float *)(const void *)raw;
    }
    if (direct) memcpy(values, raw, n * d->width * sizeof(float));
    else moe_to_float(d->npy.dtype, n * d->width, raw, values);
    return values;
}

// The logits of n tokens, as w->z; the error names the first number that is not finite.
EX_FUNC int dump_read_logits(dump_job *j, dump_worker *w, size_t first, size_t n, dump_error *e) {
    const dump_layer *l = j->l;
    const dump_file *d = l->logits;
    w->z = w->numbers = dump_values(j, w, first, n, l->router ? w->values : w->logits, e);
    if (!w->z) return 0;
    if (l->probabilities) {
        for (size_t i = 0; i < n * d->width; i++) w->logits[i] = logf(w->z[i]); // 0: a masked expert
        w->z = w->logits;
    }
    if (!l->router) return 1;
    const moe_parallel alone = {.n_threads = 1};
    moe_gemm_args g = {.m = n, .n = l->experts, .k = d->width, .a = w->z, .b = l->router, .tb = 1, .c = w->logits};
    g.parallel = &alone;
    moe_status s = moe_gemm(&g);
    if (s) *e = (dump_error){.path = d->path, .text = moe_status_string(s)};
    w->z = w->logits;
    return !s;
}

// The logits of n tokens as a copy that may be changed.
EX_FUNC void dump_copy(const dump_layer *l, dump_worker *w, size_t n) {
    if (w->z != w->logits) memcpy(w->logits, w->z, n * l->experts * sizeof(float));
    w->z = w->logits;
}

// -infinity is a masked expert, which is never chosen: of all numbers the lowest. 0: a number is NaN or infinite, or a
// token has fewer experts left than it chooses; the error names the first such number. n tokens from row `row` of those
// that begin at `first`.
#define DUMP_MASKED (-FLT_MAX)
EX_FUNC int dump_mask(const dump_layer *l, const dump_worker *w, size_t first, size_t row, size_t n, dump_error *e) {
    const dump_file *d = l->logits;
    const float *values = (l->router ? w->numbers : w->logits) + row * d->width;
    const char *text = NULL;
    size_t i = 0, count = n * d->width, layer = l->layer < d->layers ? l->layer : 0, left = 0;
    for (; i < count && !text; i++) {
        if (i % d->width == 0) left = d->width;
        if (!l->router && values[i] < -FLT_MAX) w->logits[row * d->width + i] = DUMP_MASKED;
        if (!l->router && values[i] <= DUMP_MASKED && --left < l->top_k)
            text = "fewer experts are left unmasked than top-k";
        if (values[i] - values[i] != 0) text = "NaN or infinite";
    }
    if (!text && !l->router) return 1;
    if (!text) text = "NaN or infinite", i = 1; // a product of hidden states and router
    uint64_t at = ((uint64_t)layer * d->tokens + first + row) * d->width + --i;
    *e = (dump_error){.path = d->path, .text = text, .offset = d->npy.data + at * moe_dtype_size(d->npy.dtype)};
    e->layer = layer + 1, e->token = first + row + i / d->width + 1, e->number = i % d->width + 1;
    e->what = l->router ? "number of the hidden state" : "expert";
    return 0;
}

// Experts that are masked in any token: without a mean logit. (Also those of models that mask by a lowest number.)
EX_FUNC size_t dump_masked(const dump_layer *l) {
    size_t masked = 0;
    for (size_t e = 0; l->logits && e < l->experts; e++) {
        int low = 0;
        for (size_t b = 0; b < l->game->n_batches; b++) low |= l->game->logit[b * l->experts + e] < -1e30;
        masked += (size_t)low;
    }
    return masked;
}

// Do the sampled rows look like probabilities: none below 0, and the sum 1 as nearly as 8 bits say?
EX_FUNC int dump_are_probabilities(const dump_layer *l) {
    for (size_t s = 0; s < l->n_sample; s++) {
        double sum = 0;
        for (size_t e = 0; e < l->experts; e++) {
            if (l->sample[s * l->experts + e] < 0) return 0;
            sum += (double)l->sample[s * l->experts + e];
        }
        if (fabs(sum - 1) > 0.004) return 0;
    }
    return l->logits && l->experts > 1;
}

// As DeepSeek-V3's router chooses, its groups left out. Logits that are not finite are found where they are counted.
EX_FUNC void dump_choose(const dump_layer *l, dump_worker *w, size_t n) {
    size_t E = l->experts, k = l->top_k;
    for (size_t i = 0; i < n * E; i++) w->scores[i] = 1 / (1 + expf(-w->z[i])) + l->bias[i % E];
    if (!moe_topk(n, E, k, w->scores, w->index, NULL)) return;
    for (size_t p = 0; p < n * k; p++) w->index[p] = (int32_t)(p % k);
}

// The choices of n tokens into w->index, counted; the error names the first that cannot be.
EX_FUNC int dump_read_indices(dump_job *j, dump_worker *w, size_t batch, size_t first, size_t n, dump_error *e) {
    const dump_layer *l = j->l;
    const dump_file *d = l->indices;
    size_t k = l->top_k, layer = l->layer < d->layers ? l->layer : 0, bad = 0;
    uint64_t at = ((uint64_t)layer * d->tokens + first) * k;
    const char *text = NULL;
    const unsigned char *raw = w->raw;
    if (l->bias) dump_choose(l, w, n);
    else if (!(raw = dump_rows(w, 1, d, layer, first, n, w->raw, e))) return 0;
    moe_status s = l->bias ? MOE_OK : moe_to_index(d->npy.dtype, n * k, raw, w->index, &bad);
    if (s) text = moe_status_string(MOE_E_NPY_INDEX);
    for (size_t p = 0; p < n * k && !text; p++) {
        if (w->index[p] < 0) continue;
        bad = p;
        if ((size_t)w->index[p] >= l->experts) text = "an expert's index is not below the number of experts";
        for (size_t q = p - p % k; q < p && !text; q++)
            if (w->index[q] == w->index[p]) text = "a token has the same expert twice";
        if (text) break;
        l->game->count[batch * l->experts + (size_t)w->index[p]]++;
        if (p % k == 0) l->first[batch * l->experts + (size_t)w->index[p]]++;
    }
    at = d->npy.data + (at + bad) * moe_dtype_size(d->npy.dtype);
    if (text) *e = (dump_error){.path = d->path, .text = text, .offset = at};
    return !text;
}

// A row without a choice is no token: padding, as a rule.
EX_FUNC int dump_is_token(const dump_layer *l, const int32_t *index) {
    if (!l->indices) return 1;
    for (size_t k = 0; k < l->top_k; k++)
        if (index[k] >= 0) return 1;
    return 0;
}

EX_FUNC int dump_read_labels(dump_job *j, dump_worker *w, size_t worker, size_t first, size_t n, dump_error *e) {
    const dump_layer *l = j->l;
    const dump_file *d = l->labels;
    size_t bad = 0;
    const unsigned char *raw = dump_rows(w, 2, d, 0, first, n, w->raw, e);
    if (!raw) return 0;
    moe_status s = moe_to_index(d->npy.dtype, n, raw, w->label, &bad);
    for (size_t t = 0; t < n && !s; t++) {
        if (!dump_is_token(l, w->index + t * l->top_k)) w->label[t] = -1; // whatever it was
        if (w->label[t] >= 0 && (size_t)w->label[t] >= l->n_labels) s = MOE_E_LABEL, bad = t;
        w->class[t] = (uint32_t)w->label[t];
    }
    uint64_t *count = l->labelled + worker * l->experts * l->n_labels;
    if (!s && !l->indices) moe_topk(n, l->experts, 1, w->z, w->index, NULL);
    if (!s) moe_label_by_expert(n, l->experts, l->indices ? l->top_k : 1, l->n_labels, w->index, w->class, count);
    uint64_t at = d->npy.data + (first + bad) * moe_dtype_size(d->npy.dtype);
    if (s) *e = (dump_error){.path = d->path, .text = moe_status_string(s), .offset = at};
    return !s;
}

// How many tokens follow each other from row *t of n on, which moves to the first of them.
EX_FUNC size_t dump_run(const dump_layer *l, const dump_worker *w, size_t n, size_t *t) {
    while (*t < n && !dump_is_token(l, w->index + *t * l->top_k)) ++*t;
    size_t end = *t;
    while (end < n && dump_is_token(l, w->index + end * l->top_k)) end++;
    return end - *t;
}

// Sample s is row s T / S, a token or not.
EX_FUNC void dump_keep_sample(const dump_layer *l, const dump_worker *w, size_t batch, size_t first, size_t n) {
    uint64_t T = dump_tokens(l), S = l->n_sample;
    for (uint64_t s = (first * S + T - 1) / T; s < S && s * T / S < first + n; s++) {
        size_t t = (size_t)(s * T / S) - first;
        l->sample_batch[s] = (uint32_t)batch;
        if (l->labels) l->sample_label[s] = w->label[t];
        if (l->logits) memcpy(l->sample + s * l->experts, w->z + t * l->experts, l->experts * sizeof(float));
        if (l->indices) memcpy(l->sample_index + s * l->top_k, w->index + t * l->top_k, l->top_k * sizeof(int32_t));
    }
}

EX_FUNC void dump_task(void *arg, size_t i, size_t worker) {
    dump_job *j = arg;
    dump_layer *l = j->l;
    dump_worker *w = &j->worker[worker];
    size_t batch = j->begin + i, E = l->experts, B = l->game->n_batches, T = dump_tokens(l), n;
    size_t first = (size_t)((uint64_t)batch * T / B), end = (size_t)((uint64_t)(batch + 1) * T / B);
    dump_error *e = &j->error[batch];
    for (; first < end; first += n) {
        n = end - first < j->piece ? end - first : j->piece;
        if (l->logits && !dump_read_logits(j, w, first, n, e)) return;
        if (l->indices && !dump_read_indices(j, w, batch, first, n, e)) return;
        // with indices the load is theirs, and of the logits only the sums count
        uint64_t *load = l->indices ? NULL : l->game->count + batch * E, *top1 = l->first + batch * E;
        double *sum = l->game->logit + batch * E;
        for (size_t t = 0, run; (run = dump_run(l, w, n, &t)) != 0; t += run) {
            l->game->tokens[batch] += run;
            if (!l->logits ||
                !moe_topk_count(run, E, l->top_k, w->z + t * E, load, top1, sum, w->work, w->work_bytes))
                continue;
            dump_copy(l, w, n);
            if (!dump_mask(l, w, first, t, run, e) ||
                moe_topk_count(run, E, l->top_k, w->z + t * E, load, top1, sum, w->work, w->work_bytes))
                return;
        }
        const int32_t *index = l->indices ? w->index : NULL;
        if (l->null && moe_game_add_null(l->game, batch, n, l->top_k, w->z, index)) {
            *e = (dump_error){.path = l->logits->path, .text = "the null"}; // not after what was checked above
            return;
        }
        if (l->labels && !dump_read_labels(j, w, worker, first, n, e)) return;
        dump_keep_sample(l, w, batch, first, n);
    }
}

EX_FUNC void dump_report(const dump_error *e) {
    if (!e->what) dump_fail(e->path, e->offset, "%s", e->text);
    dump_fail(e->path, e->offset, "%s: layer %zu, token %zu, %s %zu", e->text, e->layer - 1, e->token - 1, e->what,
              e->number - 1);
}

// Reads one layer. tick (may be NULL) is called between rounds with the tokens that are done.
EX_FUNC void dump_read(dump_layer *l, void (*tick)(void *user, size_t done), void *user) {
    size_t workers = moe_workers(l->parallel), B = l->game->n_batches, row = 4 * l->experts;
    if (l->logits && l->logits->width * 8 > row) row = l->logits->width * 8;
    if (l->indices && l->top_k * 8 > row) row = l->top_k * 8;
    dump_job j = {.l = l, .piece = DUMP_PIECE / row / 32 * 32};
    if (!j.piece) j.piece = 32;
    j.worker = allocate(workers, sizeof *j.worker);
    j.error = allocate(B, sizeof *j.error);
    for (size_t i = 0; i < workers; i++) {
        dump_worker *w = &j.worker[i];
        w->raw = allocate(j.piece, row);
        w->logits = allocate(j.piece, l->experts * sizeof(float));
        if (l->router) w->values = allocate(j.piece, l->logits->width * sizeof(float));
        if (l->bias) w->scores = allocate(j.piece, l->experts * sizeof(float));
        w->index = allocate(j.piece, l->top_k * sizeof(int32_t));
        w->label = allocate(j.piece, sizeof(int32_t));
        w->class = allocate(j.piece, sizeof(uint32_t));
        if (!moe_topk_count_scratch(l->experts, l->top_k, &w->work_bytes)) w->work = allocate(1, w->work_bytes);
    }
    for (; j.begin < B; j.begin += 4 * workers) {
        size_t round = B - j.begin < 4 * workers ? B - j.begin : 4 * workers;
        moe_run(l->parallel, round, dump_task, &j);
        for (size_t b = j.begin; b < j.begin + round; b++)
            if (j.error[b].path) dump_report(&j.error[b]);
        if (tick) tick(user, (size_t)((uint64_t)(j.begin + round) * dump_tokens(l) / B));
    }
    for (size_t i = 0; i < workers; i++) {
        dump_worker *w = &j.worker[i];
        for (int k = 0; k < 3; k++)
            if (w->file[k]) fclose(w->file[k]);
        free(w->scores);
        free(w->raw), free(w->values), free(w->logits), free(w->index), free(w->label), free(w->class), free(w->work);
    }
    free(j.worker);
    free(j.error);
}

// The largest value of a file of indices or labels, plus 1.
EX_FUNC size_t dump_largest(const dump_file *d) {
    enum { PIECE = 16384 };
    dump_worker w = {0};
    dump_error e = {0};
    size_t size = moe_dtype_size(d->npy.dtype), rows = d->layers * d->tokens, most = 0, bad = 0, n;
    size_t piece = PIECE / d->width ? PIECE / d->width : 1;
    dump_file flat = *d; // one layer of all rows
    flat.tokens = rows;
    unsigned char *raw = allocate(piece * d->width, size);
    int32_t *index = allocate(piece * d->width, sizeof *index);
    for (size_t first = 0; first < rows; first += n) {
        n = rows - first < piece ? rows - first : piece;
        uint64_t at = d->npy.data + (uint64_t)first * d->width * size;
        const unsigned char *part = dump_rows(&w, 0, &flat, 0, first, n, raw, &e);
        if (!part) dump_fail(e.path, e.offset, "%s", e.text);
        moe_status s = moe_to_index(d->npy.dtype, n * d->width, part, index, &bad);
        if (s) dump_fail(d->path, at + bad * size, "%s", moe_status_string(s));
        for (size_t i = 0; i < n * d->width; i++)
            if (index[i] >= 0 && (size_t)index[i] + 1 > most) most = (size_t)index[i] + 1;
    }
    if (w.file[0]) fclose(w.file[0]);
    free(raw);
    free(index);
    return most;
}

#endif
