/* What one machine computes, as one line: the hash of all of it, and the instruction sets that agreed on it.
 *
 *     matrix [FOLDER]     where a file may be written and read back (default: here)
 *
 * Small networks are trained in several systems; their experts are then stored in every format; layers are saved, in
 * memory and in a file, and loaded; tensors are read from safetensors and arrays from .npy. Numbers go into the hash by
 * their values, files by their bytes, so that it is one hash for processors of either order of bytes. The hash is this
 * program's own. tests/matrix.sh runs it on all kinds of machines. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOE_IMPLEMENTATION
#include "moe.h"

enum { T = 24, D = 10, STEPS = 4, SEQUENCE = 4 };
static uint64_t hash;
static moe_isa_kind isa;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "%s, %s: %s\n", moe_isa_name(isa), what, why);
    exit(1);
}
static void done(moe_status status, const char *what) {
    if (status) fail(what, moe_status_string(status));
}
static void hold(int ok, const char *what) {
    if (!ok) fail(what, "not as it must be");
}

/* FNV-1a, of the values' bytes from the lowest on */
static void take(uint64_t value, int n_bytes) {
    for (int i = 0; i < n_bytes; i++) hash = (hash ^ (value >> (8 * i) & 255)) * UINT64_C(1099511628211);
}
static void take_floats(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        take(bits, 4);
    }
}
static void take_bytes(const void *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) take(((const unsigned char *)bytes)[i], 1);
}

/* ---- a network of two layers, trained ---- */
static float x[T * D], want[T * D], inner[T * D], y[T * D], again[T * D], dy[T * D], between[T * D], dx[T * D];
static uint32_t id[T];
static unsigned char file[200000];

static void forward(moe_layer *const layer[2], int evaluate) {
    for (int i = 0; i < 2; i++) moe_layer_side(layer[i])->id = id, moe_layer_side(layer[i])->evaluate = evaluate;
    done(moe_forward(layer[0], x, T, inner), "forward");
    for (size_t i = 0; i < T * D; i++) inner[i] += x[i];
    done(moe_forward(layer[1], inner, T, y), "forward");
}
/* The squared error on the batch. Not in the hash: a compiler may contract this sum. */
static double error(moe_layer *const layer[2]) {
    double sum = 0;
    forward(layer, 1);
    for (size_t i = 0; i < T * D; i++) sum += (double)(y[i] - want[i]) * (double)(y[i] - want[i]);
    return sum;
}
static void train(moe_layer *const layer[2]) {
    for (int step = 0; step < STEPS; step++) {
        forward(layer, 0);
        for (size_t i = 0; i < T * D; i++) dy[i] = 0.125f * (y[i] - want[i]);
        take_floats(y, T * D);
        done(moe_backward(layer[1], dy, between), "backward");
        done(moe_backward(layer[0], between, dx), "backward");
        take_floats(between, T * D), take_floats(dx, T * D);
        for (int i = 0; i < 2; i++) done(moe_step(layer[i], 0.02f), "step");
    }
}

/* ---- files ---- */
/* Saved and loaded, a layer has the outputs it had; the file's bytes go into the hash. */
static void save(moe_layer *layer, int with_optimizer) {
    moe_layer *loaded = NULL;
    size_t size;
    done(moe_layer_save_size(layer, with_optimizer, &size), "save");
    hold(size <= sizeof file, "the size of a saved layer");
    done(moe_layer_save_memory(layer, with_optimizer, file, size), "save");
    take_bytes(file, size);
    done(moe_layer_load_memory(&loaded, file, size, NULL), "load");
    hold(moe_layer_hash(loaded) == moe_layer_hash(layer), "a loaded layer");
    for (int i = 0; i < 2; i++) {
        moe_layer *one = i ? loaded : layer;
        moe_layer_side(one)->id = id, moe_layer_side(one)->evaluate = 1;
        done(moe_forward(one, x, T, i ? again : y), "forward");
    }
    hold(!memcmp(again, y, sizeof y), "a loaded layer's outputs");
    if (with_optimizer) { /* and goes on as it would have */
        for (int i = 0; i < 2; i++) {
            moe_layer *one = i ? loaded : layer;
            moe_layer_side(one)->evaluate = 0;
            done(moe_forward(one, x, T, y), "forward");
            done(moe_backward(one, want, NULL), "backward");
            done(moe_step(one, 0.01f), "step");
        }
        hold(moe_layer_hash(loaded) == moe_layer_hash(layer), "a step after loading");
    }
    moe_layer_free(loaded);
}
static void tensors(size_t size) { /* of the file that was saved last */
    moe_file view;
    moe_file_tensor tensor;
    static float values[4096];
    done(moe_file_open(&view, file, size), "safetensors");
    take(view.n_tensors, 4);
    for (size_t i = 0; i < view.n_tensors; i++) {
        done(moe_file_tensor_at(&view, i, &tensor), "safetensors");
        take_bytes(tensor.name, tensor.name_length);
        if (moe_dtype_of(tensor.dtype) == MOE_DTYPE_I8 || moe_dtype_of(tensor.dtype) == MOE_DTYPE_U8) continue;
        size_t n = tensor.bytes / moe_dtype_size(moe_dtype_of(tensor.dtype));
        hold(n <= 4096, "a tensor's size");
        done(moe_to_float(moe_dtype_of(tensor.dtype), n, tensor.data, values), "safetensors");
        take_floats(values, n);
    }
    moe_file_close(&view);
}
static void path_of(const char *folder, char *path, size_t size) {
    hold(strlen(folder) + sizeof "/matrix.safetensors" <= size, "the folder's name");
    strcat(strcpy(path, folder), "/matrix.safetensors");
}
static void on_disk(moe_layer *layer, const char *folder) {
    char path[1000];
    moe_layer *loaded = NULL;
    path_of(folder, path, sizeof path);
    done(moe_layer_save(layer, 1, path), "save to a file");
    done(moe_layer_load(&loaded, path, NULL), "load from a file");
    hold(moe_layer_hash(loaded) == moe_layer_hash(layer), "a layer from a file");
    hold(remove(path) == 0, "removing the file");
    moe_layer_free(loaded);
}

/* ---- .npy: 12 elements of each type, of bytes that are given ---- */
static void arrays(void) {
    static const char *const descr[] = {"<f4", "<f2", "<f8", "<V2", "<u2", "<i4", "<i8", "|i1", "|u1", "<i2", "<u4"};
    for (size_t k = 0; k < sizeof descr / sizeof *descr; k++) {
        char text[128];
        moe_npy npy;
        float values[12];
        int32_t index[12];
        int n = sprintf(text, "{'descr': '%s', 'fortran_order': False, 'shape': (3, 4), }", descr[k]), length = 118;
        memset(file, ' ', 128);
        memcpy(file, "\x93NUMPY\1", 8), file[8] = (unsigned char)length, file[9] = 0;
        memcpy(file + 10, text, (size_t)n), file[127] = '\n';
        size_t bytes = (size_t)(descr[k][2] - '0');
        for (size_t i = 0; i < 12 * bytes; i++) file[128 + i] = (unsigned char)(i * 37 % 61 + 20);
        for (size_t i = 0; i < 12 && strchr("iu", descr[k][1]) && bytes > 2; i++) /* 24 bits: they fit */
            memset(file + 128 + i * bytes + 3, 0, bytes - 3);
        done(moe_npy_open(&npy, file, 128 + 12 * bytes), "npy");
        hold(npy.count == 12 && npy.n_dims == 2 && npy.dim[0] == 3, "an array's shape");
        if (npy.dtype < MOE_DTYPE_I32) {
            done(moe_to_float(npy.dtype, 12, npy.elements, values), "npy");
            take_floats(values, 12);
        }
        if (npy.dtype < MOE_DTYPE_U16) continue;
        done(moe_to_index(npy.dtype, 12, npy.elements, index, NULL), "npy");
        for (size_t i = 0; i < 12; i++) take((uint32_t)index[i], 4);
    }
}

/* ---- all of it ---- */
static void formats(moe_layer *layer) {
    static const moe_format_kind kinds[] = {MOE_FORMAT_BF16, MOE_FORMAT_INT8, MOE_FORMAT_INT4};
    for (int k = 0; k < 3; k++) {
        moe_layer_formats in;
        moe_layer *stored = NULL;
        size_t size;
        memset(&in, 0, sizeof in);
        in.format = kinds[k];
        done(moe_layer_quantize(layer, &in, &stored), "formats");
        moe_layer_side(stored)->evaluate = 1;
        done(moe_forward(stored, x, T, y), "formats");
        take_floats(y, T * D);
        save(stored, 0);
        done(moe_layer_save_size(stored, 0, &size), "save");
        tensors(size);
        moe_layer_free(stored);
    }
}
static void one_system(const char *name, const char *folder, double *before, double *after) {
    moe_layer *layer[2] = {NULL, NULL};
    for (uint64_t i = 0; i < 2; i++) {
        moe_desc d;
        memset(&d, 0, sizeof d);
        d.d_model = D, d.d_ff = 14, d.sequence = SEQUENCE, d.seed = 7 + i;
        done(moe_desc_system(&d, name), name);
        done(moe_layer_new(&layer[i], &d), name);
    }
    *before += error(layer);
    train(layer);
    *after += error(layer);
    take_floats(y, T * D);
    save(layer[1], 1);
    if (!strcmp(name, "deepseek-v3")) {
        char text[4000];
        size_t n = moe_desc_json(moe_layer_desc(layer[0]), text, sizeof text);
        hold(n < sizeof text, "the desc's text");
        take_bytes(text, n);
        formats(layer[0]);
        on_disk(layer[0], folder);
    }
    for (int i = 0; i < 2; i++) moe_layer_free(layer[i]);
}
static void everything(const char *folder) {
    static const char *const system[] = {"switch", "deepseek-v3", "expert-choice", "remoe", "soft-moe", "sparsemixer",
                                         "mixtral", "noisy-topk", "sinkhorn", "hash"};
    double before = 0, after = 0;
    hash = UINT64_C(14695981039346656037);
    for (uint32_t t = 0; t < T; t++) id[t] = t * 7 % 31;
    done(moe_rand_normal(1, 1, T * D, 0, 1, x), "random");
    for (size_t i = 0; i < T * D; i++) want[i] = x[i / D * D] > 0 ? x[i] : -0.5f * x[i];
    for (size_t s = 0; s < sizeof system / sizeof *system; s++) one_system(system[s], folder, &before, &after);
    hold(after < 0.97 * before, "training: the error after it");
    arrays();
}

int main(int argc, char **argv) {
    char names[200] = "";
    uint64_t first = 0;
    for (int i = 1; i < MOE_ISA_COUNT; i++) {
        isa = (moe_isa_kind)i;
        if (moe_force_isa(isa)) continue;
        everything(argc > 1 ? argv[1] : ".");
        if (!*names) first = hash;
        hold(hash == first, "the hash of another instruction set");
        if (*names) strcat(names, "+");
        strcat(names, moe_isa_name(isa));
    }
    if (!*names) fail("instruction sets", "there is none");
    printf("%08lx%08lx %s\n", (unsigned long)(first >> 32), (unsigned long)(first & 0xffffffffu), names);
    return 0;
}
