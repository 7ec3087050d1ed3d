/* files.h - Layers to save, and files in memory, whole and damaged. Include test.h first. */
#ifndef FILES_H
#define FILES_H

enum { TOKENS = 12, WIDTH = 3 };

/* ---- layers ---- */
static inline moe_desc small_desc(void) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = WIDTH;
    d.d_ff = 2;
    d.n_experts = 2;
    d.parallel.n_threads = 1;
    return d;
}

/* ---- files ---- */
typedef struct bytes {
    unsigned char *p;
    size_t n;
} bytes;

static inline bytes new_bytes(size_t n) {
    bytes b;
    b.p = (unsigned char *)test_memory(n, 1);
    b.n = n;
    return b;
}

static inline void set_header_length(bytes b, uint64_t n) {
    for (int i = 0; i < 8; i++) b.p[i] = (unsigned char)(n >> (8 * i));
}

/* A file with this header and n_data bytes 0. */
static inline bytes with_header(const char *header, size_t n_data) {
    size_t n = strlen(header);
    bytes b = new_bytes(8 + n + n_data);
    set_header_length(b, n);
    memcpy(b.p + 8, header, n);
    return b;
}

static inline moe_status open_status(bytes b) {
    moe_file f;
    moe_status s = moe_file_open(&f, b.p, b.n);
    CHECK(s == MOE_OK || (f.n_tensors == 0 && f.offset <= b.n && f.index == NULL));
    moe_file_close(&f);
    return s;
}

static inline moe_status load_status(bytes b) {
    moe_layer *m = NULL;
    long live = test_live_blocks;
    moe_status s = moe_layer_load_memory(&m, b.p, b.n, NULL);
    CHECK((m == NULL) == (s != MOE_OK));
    moe_layer_free(m);
    CHECK(test_live_blocks == live);
    return s;
}

#define ONE(dtype, shape, begin, end)                                                                        \
    "{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" begin "," end "]}"

#endif
