// record.h - a run's routing in a file, and back: which experts each token had at each mixture, with which weights.
//
//     record r = record_new(mixtures, experts, slots);
//     record_add(&r, n, ids, mixture, index, weight);       // every mixture once for each batch
//     record_save(&r, "routing.safetensors");
//     record r = record_open("routing.safetensors");        // then record_check, and record_rows for each batch
//
// The file is safetensors: ids (T) I32; experts (M, T, k) I32, -1 = no choice; weights (M, T, k) F32; and the number of
// experts as metadata. Rows are tokens in the order in which the model read them, so a window that overlaps another has
// its tokens again. A bad file ends the program with status 2 and one line that names the file and the tensor.
#ifndef EX_RECORD_H
#define EX_RECORD_H

#include "json_read.h"

typedef struct record {
    const char *path; // of one that is replayed
    size_t mixtures, experts, slots, rows, room;
    int32_t *id, *index; // (rows); a mixture's (rows, slots) from record_at(mixture) on
    float *weight;
} record;

EX_FUNC record record_new(size_t mixtures, size_t experts, size_t slots) {
    return (record){.mixtures = mixtures, .experts = experts, .slots = slots};
}
EX_FUNC void record_free(record *r) {
    free(r->id), free(r->index), free(r->weight);
    *r = (record){0};
}
EX_FUNC size_t record_at(const record *r, size_t mixture, size_t row) { return (mixture * r->room + row) * r->slots; }

// Room for n more rows: each mixture's move apart.
EX_FUNC void record_grow(record *r, size_t n) {
    record now = *r;
    if (r->rows + n <= r->room) return;
    now.room = r->rows + n > 2 * r->room ? r->rows + n : 2 * r->room;
    now.id = allocate(now.room, sizeof *now.id);
    now.index = allocate(now.room * now.mixtures * now.slots, sizeof *now.index);
    now.weight = allocate(now.room * now.mixtures * now.slots, sizeof *now.weight);
    if (r->rows) memcpy(now.id, r->id, r->rows * sizeof *now.id);
    for (size_t m = 0; m < r->mixtures && r->rows; m++) {
        size_t bytes = r->rows * r->slots * sizeof(float);
        memcpy(now.index + record_at(&now, m, 0), r->index + record_at(r, m, 0), bytes);
        memcpy(now.weight + record_at(&now, m, 0), r->weight + record_at(r, m, 0), bytes);
    }
    free(r->id), free(r->index), free(r->weight);
    *r = now;
}
// A batch of n tokens at one mixture; those of the last mixture end it.
EX_FUNC void record_add(record *r, size_t n, const int32_t *ids, size_t mixture, const int32_t *index,
                        const float *weight) {
    record_grow(r, n);
    memcpy(r->id + r->rows, ids, n * sizeof *ids);
    memcpy(r->index + record_at(r, mixture, r->rows), index, n * r->slots * sizeof *index);
    memcpy(r->weight + record_at(r, mixture, r->rows), weight, n * r->slots * sizeof *weight);
    if (mixture + 1 == r->mixtures) r->rows += n;
}

EX_FUNC void record_save(const record *r, const char *path) {
    char head[512];
    size_t part = r->rows * r->slots, all = r->mixtures * part * 4, first = r->rows * 4;
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot write %s: %s", path, strerror(errno));
    int n = snprintf(head, sizeof head,
                     "{\"__metadata__\":{\"experts\":\"%zu\"},\"ids\":{\"dtype\":\"I32\",\"shape\":[%zu],"
                     "\"data_offsets\":[0,%zu]},\"experts\":{\"dtype\":\"I32\",\"shape\":[%zu,%zu,%zu],"
                     "\"data_offsets\":[%zu,%zu]},\"weights\":{\"dtype\":\"F32\",\"shape\":[%zu,%zu,%zu],"
                     "\"data_offsets\":[%zu,%zu]}}",
                     r->experts, r->rows, first, r->mixtures, r->rows, r->slots, first, first + all, r->mixtures,
                     r->rows, r->slots, first + all, first + 2 * all);
    while (n % 8) head[n++] = ' ';
    const unsigned char length[8] = {(unsigned char)(n & 255), (unsigned char)(n >> 8)};
    fwrite(length, 1, sizeof length, f);
    fwrite(head, 1, (size_t)n, f);
    fwrite(r->id, 4, r->rows, f);
    for (size_t m = 0; m < r->mixtures; m++) fwrite(r->index + record_at(r, m, 0), 4, part, f);
    for (size_t m = 0; m < r->mixtures; m++) fwrite(r->weight + record_at(r, m, 0), 4, part, f);
    close_output(f, path);
}

EX_FUNC moe_file_tensor record_tensor(const moe_file *file, const char *path, const char *name, size_t dims,
                                      const char *dtype) {
    moe_file_tensor t;
    moe_status status = moe_file_find(file, name, &t);
    if (status) refuse(path, "%s: %s", name, moe_status_string(status));
    if (strcmp(t.dtype, dtype) != 0) refuse(path, "%s: %s, not %s", name, t.dtype, dtype);
    if (t.n_dims != dims) refuse(path, "%s: %zu dimensions, not %zu", name, t.n_dims, dims);
    return t;
}
// Choices below the number of experts, none twice in a row; weights that are numbers.
EX_FUNC void record_inspect(const record *r) {
    for (size_t i = 0; i < r->mixtures * r->rows * r->slots; i++) {
        int32_t e = r->index[i];
        if (e < -1 || (e >= 0 && (size_t)e >= r->experts))
            refuse(r->path, "experts: element %zu is %d, of %zu experts", i, (int)e, r->experts);
        for (size_t k = i - i % r->slots; k < i; k++)
            if (e >= 0 && r->index[k] == e)
                refuse(r->path, "experts: element %zu: a token has expert %d twice", i, (int)e);
        if (!(r->weight[i] - r->weight[i] == 0)) refuse(r->path, "weights: element %zu is NaN or infinite", i);
    }
}
EX_FUNC record record_open(const char *path) {
    record r = {.path = path};
    moe_file file;
    size_t size;
    char text[32] = "", *end = text;
    const void *bytes = file_view(path, &size);
    if (!bytes) refuse(path, "cannot be read: %s", strerror(errno));
    moe_status status = moe_file_open(&file, bytes, size);
    if (status) refuse(path, "byte %llu: %s", (unsigned long long)file.offset, moe_status_string(status));
    moe_file_tensor id = record_tensor(&file, path, "ids", 1, "I32");
    moe_file_tensor index = record_tensor(&file, path, "experts", 3, "I32");
    moe_file_tensor weight = record_tensor(&file, path, "weights", 3, "F32");
    if (!moe_file_metadata(&file, "experts", text, sizeof text)) r.experts = (size_t)strtoull(text, &end, 10);
    if (end == text || *end || !r.experts || r.experts > INT32_MAX)
        refuse(path, "__metadata__.experts: '%s' is not how many experts there are", text);
    r.mixtures = index.dim[0], r.rows = r.room = id.dim[0], r.slots = index.dim[2];
    if (index.dim[1] != r.rows) refuse(path, "experts: %zu tokens, but ids has %zu", index.dim[1], r.rows);
    if (memcmp(index.dim, weight.dim, 3 * sizeof *index.dim) != 0) refuse(path, "weights: another shape than experts");
    r.id = allocate(r.rows, 4);
    r.index = allocate(index.bytes, 1);
    r.weight = allocate(weight.bytes, 1);
    memcpy(r.id, id.data, id.bytes);
    memcpy(r.index, index.data, index.bytes);
    memcpy(r.weight, weight.data, weight.bytes);
    record_inspect(&r);
    moe_file_close(&file);
    return r;
}
// Is it of a model with these extents?
EX_FUNC void record_check(const record *r, size_t mixtures, size_t experts, size_t slots) {
    if (r->mixtures != mixtures || r->slots != slots)
        refuse(r->path, "experts: %zu mixtures and top-%zu; the model has %zu and top-%zu", r->mixtures, r->slots,
               mixtures, slots);
    if (r->experts != experts) refuse(r->path, "__metadata__.experts: %zu; the model has %zu", r->experts, experts);
}
// The next n rows must be of these tokens.
EX_FUNC void record_rows(const record *r, size_t first, size_t n, const int32_t *ids) {
    if (first > r->rows || n > r->rows - first)
        refuse(r->path, "ids: %zu tokens, and the run goes on to %zu", r->rows, first + n);
    for (size_t i = 0; i < n; i++)
        if (r->id[first + i] != ids[i])
            refuse(r->path, "ids: token %zu is %d, and the run's is %d", first + i, (int)r->id[first + i], (int)ids[i]);
}

#endif
