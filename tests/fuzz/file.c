/* Any bytes as a safetensors file, as a layer's file, as .npy and as a model's index of shards. */
#include "fuzz.h"

/* What was accepted must keep every promise of moe_file. */
static void fuzz_check_file(const moe_file *f) {
    moe_file_tensor t, found;
    char text[64];
    size_t covered = 8 + f->header;
    for (size_t i = 0; i < f->n_tensors; i++) {
        char name[64];
        moe_status status = moe_file_tensor_at(f, i, &t);
        require(status == MOE_OK || (status == MOE_E_FILE_DTYPE && moe_dtype_of(t.dtype) == MOE_DTYPE_NONE));
        require(t.n_dims <= 8 && t.data >= f->bytes + 8 + f->header);
        require(t.bytes <= (size_t)(f->bytes + f->size - t.data));
        covered += t.bytes;
        if (t.name_length >= sizeof name || memchr(t.name, '\\', t.name_length)) continue;
        memcpy(name, t.name, t.name_length);
        name[t.name_length] = 0;
        require(moe_file_find(f, name, &found) == status && found.data == t.data && found.bytes == t.bytes);
    }
    require(covered == f->size);
    require(moe_file_tensor_at(f, f->n_tensors, &t) == MOE_E_NAME);
    (void)moe_file_metadata(f, "format", text, sizeof text);
}

/* The other formats: what is accepted lies inside the bytes; what is not names a place in them. */
static void fuzz_check_others(const uint8_t *data, size_t size) {
    moe_npy a;
    moe_shards s;
    char name[64], file[64];
    size_t layer;
    if (moe_npy_open(&a, data, size) == MOE_OK) {
        require((size_t)(data + size - a.elements) == a.count * moe_dtype_size(a.dtype) && a.n_dims <= 8);
        float x[4];
        if (a.count >= 4) (void)moe_to_float(a.dtype, 4, a.elements, x);
    } else require(a.offset <= size && a.count == 0);
    if (moe_shards_open(&s, data, size) == MOE_OK) {
        for (size_t i = 0; i < 4 && moe_shards_router(&s, i, &layer, name, sizeof name) == MOE_OK; i++) {
            moe_status found = moe_shards_find(&s, name, file, sizeof file);
            require(found == MOE_OK || found == MOE_E_SMALL_MEMORY);
            require(strchr(file, '/') == NULL && strchr(file, '\\') == NULL);
        }
        moe_shards_close(&s);
    } else require(s.offset <= size && s.n_tensors == 0);
}

static int fuzz_file(const uint8_t *data, size_t size) {
    moe_file f;
    fuzz_check_others(data, size);
    moe_layer *m = NULL;
    if (moe_file_open(&f, data, size) == MOE_OK) fuzz_check_file(&f);
    else require(f.n_tensors == 0 && f.offset <= size);
    moe_file_close(&f);
    if (moe_layer_load_memory(&m, data, size, NULL) == MOE_OK) {
        const moe_desc *d = moe_layer_desc(m);
        float *x = (float *)calloc(2 * d->d_model, sizeof(float)), *y = x ? x + d->d_model : NULL;
        moe_layer *again = NULL;
        int with_optimizer = d->training != MOE_OFF;
        size_t n = 0;
        require(moe_layer_save_size(m, with_optimizer, &n) == MOE_OK);
        void *file = malloc(n);
        if (x && file) { /* a loaded layer works, and comes back from its own file */
            (void)moe_forward(m, x, 1, y);
            require(moe_layer_save_memory(m, with_optimizer, file, n) == MOE_OK);
            require(moe_layer_load_memory(&again, file, n, NULL) == MOE_OK);
            require(moe_layer_hash(again) == moe_layer_hash(m));
        }
        moe_layer_free(again);
        free(file);
        free(x);
    } else require(m == NULL);
    moe_layer_free(m);
    return 0;
}
FUZZ_TARGET(fuzz_file)
