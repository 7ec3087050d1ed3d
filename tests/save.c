/* A layer through safetensors and back, and every way in which such a file can lie. */
#ifndef _WIN32
#define _POSIX_C_SOURCE 200809L /* mkdir, rmdir, symlink, access, getpid, fork, kill */
#define _XOPEN_SOURCE 700
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#endif
#include "test.h"
#include "files.h"
#include "temp.h"

static moe_layer *new_layer(const moe_desc *d) {
    moe_layer *m = NULL;
    moe_status s = moe_layer_new(&m, d);
    if (s) {
        printf("    the test's own layer: %s\n0 passed, 1 failed\n", moe_status_string(s));
        exit(1);
    }
    return m;
}

/* The same batches each time; y of the last forward. */
static void train(moe_layer *m, int steps, float *y) {
    float x[TOKENS * WIDTH], dy[TOKENS * WIDTH];
    test_seed = 7;
    for (int i = 0; i < steps; i++) {
        test_fill(x, TOKENS * WIDTH, -1, 1);
        test_fill(dy, TOKENS * WIDTH, -1, 1);
        CHECK_OK(moe_forward(m, x, TOKENS, y));
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK_OK(moe_step(m, 0.01f));
    }
}

static void check_same_part(const moe_layer *a, const moe_layer *b, moe_part_kind part) {
    moe_tensor t;
    for (size_t i = 0; i < moe_layer_tensors(a) && CHECK_OK(moe_layer_tensor(a, i, &t)); i++) {
        float *va = test_floats(t.count), *vb = test_floats(t.count);
        CHECK_OK(moe_layer_get(a, part, t.name, va, t.count));
        CHECK_OK(moe_layer_get(b, part, t.name, vb, t.count));
        CHECK_SAME(va, vb, t.count);
        free(va);
        free(vb);
    }
}

static void check_same_desc(const moe_layer *a, const moe_layer *b) {
    char ja[2048], jb[2048];
    CHECK(moe_desc_json(moe_layer_desc(a), ja, sizeof ja) < sizeof ja);
    moe_desc_json(moe_layer_desc(b), jb, sizeof jb);
    CHECK(!strcmp(ja, jb));
}

static bytes save(const moe_layer *m, int with_optimizer) {
    size_t n = 0;
    CHECK_OK(moe_layer_save_size(m, with_optimizer, &n));
    bytes b = new_bytes(n);
    CHECK_OK(moe_layer_save_memory(m, with_optimizer, b.p, n));
    return b;
}

static bytes small_file(int with_optimizer) {
    moe_desc d = small_desc();
    moe_layer *m = new_layer(&d);
    float y[TOKENS * WIDTH];
    train(m, 2, y);
    bytes b = save(m, with_optimizer);
    moe_layer_free(m);
    return b;
}

/* The status of loading the file with its first `from` replaced by `to`, of the same length. */
static moe_status edited_status(bytes b, const char *from, const char *to) {
    size_t n = strlen(from);
    CHECK(strlen(to) == n);
    for (size_t i = 8; i + n <= b.n; i++) {
        if (memcmp(b.p + i, from, n)) continue;
        memcpy(b.p + i, to, n);
        moe_status s = load_status(b);
        memcpy(b.p + i, from, n);
        return s;
    }
    printf("    \"%s\" is not in the file\n", from);
    CHECK(0);
    return MOE_OK;
}

/* ---- files of the disk ---- */
static char path[512], part_path[520], other_path[520];

static void make_paths(void) {
    temp_path(path, sizeof path, "files");
    snprintf(part_path, sizeof part_path, "%s.part", path);
    snprintf(other_path, sizeof other_path, "%s.dir", path);
}

static bytes read_file(const char *name) {
    bytes b = { NULL, 0 };
    FILE *f = fopen(name, "rb");
    if (!f) return b;
    b = new_bytes(1 << 16);
    b.n = fread(b.p, 1, b.n, f);
    fclose(f);
    return b;
}

static int file_exists(const char *name) {
    FILE *f = fopen(name, "rb");
    if (f) fclose(f);
    return f != NULL;
}

static void put_file(const char *name, const unsigned char *p, size_t n) {
    FILE *f = fopen(name, "wb");
    if (CHECK(f != NULL)) CHECK(fwrite(p ? p : (const unsigned char *)"", 1, n, f) == n && !fclose(f));
}

/* ---- round trips ---- */
static void test_round_trip(void) {
    for (int kind = 1; kind <= MOE_EXPERT_GEGLU; kind++) {
        for (int variant = 0; variant < 8; variant++) {
            moe_desc d = small_desc();
            float y[TOKENS * WIDTH], z[TOKENS * WIDTH];
            int with_optimizer = variant & 1;
            d.expert = (moe_expert_kind)kind;
            d.bias = variant & 2 ? MOE_ON : MOE_OFF;
            d.optimizer = variant & 4 ? MOE_OPTIMIZER_SGD : MOE_OPTIMIZER_ADAMW;
            d.n_shared = (size_t)(variant & 1);
            d.temperature = 0.7f;
            d.capacity_factor = 1.3f;
            d.loss[MOE_LOSS_Z] = 1e-3f;
            d.seed = UINT64_C(0x8000000000000001);
            moe_layer *m = new_layer(&d), *back = NULL;
            train(m, 3, y);
            bytes b = save(m, with_optimizer);
            if (CHECK_OK(moe_layer_load_memory(&back, b.p, b.n, &d))) {
                check_same_desc(m, back);
                check_same_part(m, back, MOE_PART_PARAMS);
                CHECK(moe_layer_hash(m) == moe_layer_hash(back));
                if (with_optimizer) { /* training goes on as if nothing had been */
                    check_same_part(m, back, MOE_PART_MOMENT1);
                    if (d.optimizer == MOE_OPTIMIZER_ADAMW) check_same_part(m, back, MOE_PART_MOMENT2);
                    train(m, 1, y);
                    train(back, 1, z);
                    CHECK_SAME(y, z, TOKENS * WIDTH);
                    check_same_part(m, back, MOE_PART_PARAMS);
                }
                bytes again = save(back, with_optimizer), first = save(m, with_optimizer);
                CHECK(again.n == first.n && !memcmp(again.p, first.p, first.n));
                free(again.p);
                free(first.p);
            }
            moe_layer_free(back);
            moe_layer_free(m);
            free(b.p);
        }
    }
}

static void test_inference_layer(void) {
    moe_desc d = small_desc();
    size_t n = 1;
    d.training = MOE_OFF;
    moe_layer *m = new_layer(&d), *back = NULL;
    CHECK_STATUS(moe_layer_save_size(m, 1, &n), MOE_E_INFERENCE);
    CHECK(n == 0);
    bytes b = save(m, 0);
    if (CHECK_OK(moe_layer_load_memory(&back, b.p, b.n, NULL))) {
        check_same_desc(m, back);
        check_same_part(m, back, MOE_PART_PARAMS);
    }
    moe_layer_free(back);
    moe_layer_free(m);
    free(b.p);
}

/* With the optimiser a file promises to go on as if nothing had been: not with gradients in the layer. */
static void test_between_steps(void) {
    float x[TOKENS * WIDTH], y[TOKENS * WIDTH];
    moe_desc d = small_desc();
    moe_layer *m = new_layer(&d);
    bytes b = save(m, 1);
    test_fill(x, TOKENS * WIDTH, -1, 1);
    CHECK_OK(moe_forward(m, x, TOKENS, y));
    CHECK_OK(moe_layer_save_memory(m, 1, b.p, b.n)); /* a forward alone leaves nothing behind */
    CHECK_OK(moe_backward(m, x, NULL));
    CHECK_STATUS(moe_layer_save_memory(m, 1, b.p, b.n), MOE_E_UNSTEPPED);
    CHECK_STATUS(moe_layer_save(m, 1, path), MOE_E_UNSTEPPED);
    CHECK(!file_exists(path) && !file_exists(part_path));
    CHECK_OK(moe_layer_save_memory(m, 0, b.p, b.n)); /* the parameters alone promise nothing */
    CHECK_OK(moe_step(m, 0.01f));
    CHECK_OK(moe_layer_save_memory(m, 1, b.p, b.n));
    moe_layer_free(m);
    free(b.p);
}

/* Neither side asks for alignment, and nothing outside the file's bytes is written. */
static void test_unaligned(void) {
    bytes b = small_file(1);
    moe_layer *m = NULL;
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    for (size_t shift = 0; shift < 8; shift++) {
        bytes moved = new_bytes(b.n + 16);
        memset(moved.p, 0x5a, moved.n);
        CHECK_OK(moe_layer_save_memory(m, 1, moved.p + shift, b.n + 1));
        CHECK(!memcmp(moved.p + shift, b.p, b.n));
        for (size_t i = 0; i < moved.n; i++) {
            if (i < shift || i >= shift + b.n) CHECK(moved.p[i] == 0x5a);
        }
        moe_layer *back = NULL;
        if (CHECK_OK(moe_layer_load_memory(&back, moved.p + shift, b.n, NULL)))
            CHECK(moe_layer_hash(m) == moe_layer_hash(back));
        moe_layer_free(back);
        free(moved.p);
    }
    moe_layer_free(m);
    free(b.p);
}

/* The file as any reader of safetensors sees it. */
static void test_layout(void) {
    bytes b = small_file(1);
    moe_file f;
    moe_file_tensor t;
    char text[64];
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK(f.n_tensors == 12 && f.header % 8 == 0);
    CHECK_OK(moe_file_tensor_at(&f, 0, &t));
    CHECK(t.name_length == 6 && !memcmp(t.name, "router", 6) && !strcmp(t.dtype, "F32"));
    CHECK(t.n_dims == 2 && t.dim[0] == 3 && t.dim[1] == 2 && t.bytes == 24 && t.data == b.p + 8 + f.header);
    CHECK_OK(moe_file_find(&f, "moment2.experts.w2", &t));
    CHECK(t.n_dims == 3 && t.dim[0] == 2 && t.dim[1] == 2 && t.dim[2] == 3 && t.data + t.bytes == b.p + b.n);
    CHECK_STATUS(moe_file_find(&f, "moment3.router", &t), MOE_E_NAME);
    CHECK(t.data == NULL);
    CHECK_STATUS(moe_file_find(&f, "route", &t), MOE_E_NAME);
    CHECK_STATUS(moe_file_find(&f, "routers", &t), MOE_E_NAME);
    CHECK_STATUS(moe_file_tensor_at(&f, 12, &t), MOE_E_NAME);
    CHECK_OK(moe_file_metadata(&f, "format", text, sizeof text));
    CHECK(!strcmp(text, "moe.h"));
    CHECK_OK(moe_file_metadata(&f, "step", text, sizeof text));
    CHECK(!strcmp(text, "2"));
    CHECK_STATUS(moe_file_metadata(&f, "format", text, 5), MOE_E_SMALL_MEMORY);
    CHECK(text[0] == 0);
    CHECK_OK(moe_file_metadata(&f, "format", text, 6));
    CHECK_STATUS(moe_file_metadata(&f, "router", text, sizeof text), MOE_E_NAME);

    /* little-endian on every machine */
    static const float router[6] = { 1, -2, 0.1f, 0, 3.4028235e38f, 1.4e-45f };
    static const unsigned char want[24] = { 0, 0, 0x80, 0x3f, 0, 0, 0,    0xc0, 0xcd, 0xcc, 0xcc, 0x3d,
                                            0, 0, 0,    0,    0xff, 0xff, 0x7f, 0x7f, 1,    0,    0,    0 };
    moe_layer *m = NULL;
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", router, 6));
    CHECK_OK(moe_layer_save_memory(m, 1, b.p, b.n));
    CHECK_OK(moe_file_find(&f, "router", &t));
    CHECK(t.bytes == sizeof want && !memcmp(t.data, want, sizeof want));
    moe_layer_free(m);
    free(b.p);
}

static void test_arguments(void) {
    bytes b = small_file(0);
    moe_layer *m = NULL;
    moe_file f, none;
    moe_file_tensor t;
    char text[8];
    size_t n;
    CHECK_STATUS(moe_file_open(NULL, b.p, b.n), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_open(&none, NULL, b.n), MOE_E_NULL_BYTES);
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK_STATUS(moe_file_find(NULL, "router", &t), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_file_find(&none, "router", &t), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_file_find(&f, NULL, &t), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_file_find(&f, "router", NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_tensor_at(NULL, 0, &t), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_file_tensor_at(&f, 0, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_metadata(&f, NULL, text, sizeof text), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_file_metadata(NULL, "format", text, sizeof text), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_file_metadata(&f, "format", NULL, 8), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_metadata(&f, "format", text, 0), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_layer_load_memory(NULL, b.p, b.n, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_load_memory(&m, NULL, b.n, NULL), MOE_E_NULL_BYTES);
    CHECK(m == NULL);
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    CHECK_STATUS(moe_layer_save_size(NULL, 0, &n), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_save_size(m, 0, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_save_memory(NULL, 0, b.p, b.n), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_save_memory(m, 0, NULL, b.n), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_layer_save_memory(m, 0, b.p, b.n - 1), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_layer_save(NULL, 0, "x"), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_save(m, 0, NULL), MOE_E_NULL_PATH);
    moe_layer_free(m);
    CHECK_STATUS(moe_layer_load(NULL, "x", NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_load(&m, NULL, NULL), MOE_E_NULL_PATH);
    CHECK(m == NULL);
    free(b.p);
}

/* ---- damage ---- */
static void test_truncation(void) {
    bytes b = small_file(1);
    for (size_t n = 0; n < b.n; n++) { /* a copy of its own length: a byte read past it is an error of the sanitizer */
        bytes cut = new_bytes(n);
        memcpy(cut.p, b.p, n);
        CHECK(open_status(cut) != MOE_OK);
        moe_status s = load_status(cut);
        CHECK(s == MOE_E_FILE_SHORT || s == MOE_E_FILE_HEADER_SIZE);
        free(cut.p);
    }
    bytes longer = new_bytes(b.n + 1);
    memcpy(longer.p, b.p, b.n);
    CHECK_STATUS(load_status(longer), MOE_E_FILE_OFFSETS);
    free(longer.p);
    free(b.p);
}

/* Files that are fine as safetensors and no layer. */
static void test_lying_layers(void) {
    bytes b = small_file(1);
    CHECK_OK(load_status(b));
    CHECK_STATUS(edited_status(b, "\"router\"", "\"souter\""), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "\"moment2.experts.w2\"", "\"moment2.experts.w3\""), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "[3,2]", "[2,3]"), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "[2,3,2]", "[2,6,1]"), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "[2,3,2]", "[02,12]"), MOE_E_FILE_HEADER);
    CHECK_STATUS(edited_status(b, "[2,3,2]", "[12 ,1]"), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "\"F32\"", "\"I32\""), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "\"F32\"", "\"X32\""), MOE_E_FILE_DTYPE);
    CHECK_STATUS(edited_status(b, "__metadata__", "__metadatb__"), MOE_E_FILE_HEADER);
    CHECK_STATUS(edited_status(b, "\"format\":\"moe.h\"", "\"format\":\"moe.c\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"format\"", "\"farmot\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"version\":\"1\"", "\"version\":\"2\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"gate\":\"softmax\"", "\"gate\":\"softmin\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"normalize\":\"true\"", "\"normalize\":\"tru \""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"d_model\":\"3\"", "\"d_model\":\"0\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"d_model\":\"3\"", "\"d_model\":\"x\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"d_model\":\"3\"", "\"d_model\":\"4\""), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "\"d_model\":\"3\"", "\"e_model\":\"3\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"top_k\":\"2\"", "\"top_k\":\"3\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"bias\":\"false\"", "\"bias\":\"true\" "), MOE_E_FILE_TENSOR);
    CHECK_STATUS(edited_status(b, "\"training\":\"true\"", "\"training\":\"false"), MOE_E_FILE_HEADER);
    CHECK_STATUS(edited_status(b, "\"beta1\":\"0.9\"", "\"beta1\":\"1.9\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"beta1\":\"0.9\"", "\"beta1\":\"0,9\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"beta1\":\"0.9\"", "\"beta1\":\"nan\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"beta1\":\"0.9\"", "\"beta1\":\".9e\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"beta1\":\"0.9\"", "\"beta1\":\"9e9\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"weight_decay\":\"0.01\"", "\"weight_decay\":\"1e99\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"weight_decay\":\"0.01\"", "\"weight_decay\":\"1e-9\""), MOE_OK);
    CHECK_STATUS(edited_status(b, "\"step\":\"2\"", "\"step\":\"-\""), MOE_E_FILE_DESC);
    CHECK_STATUS(edited_status(b, "\"step\":\"2\"", "\"stop\":\"2\""), MOE_OK); /* then without the optimiser */
    static const char *const rows[][2] = {{"format", "moe.h"}, {"version", "1"}, {"d_model", "1"}, {"step", "1"},
                                          {"draws", "1"}};
    char digits[101];
    memset(digits, '1', 100), digits[100] = 0; /* longer than any value is */
    for (size_t i = 0; i < 5; i++) {
        char header[600] = "{\"__metadata__\":{\"x\":\"y\"";
        for (size_t k = 0; k < 5; k++) {
            size_t n = strlen(header);
            snprintf(header + n, sizeof header - n, ",\"%s\":\"%s\"", rows[k][0], k == i ? digits : rows[k][1]);
        }
        strcat(header, "},\"router\":" ONE("F32", "1,8", "0", "32") "}");
        bytes lengthy = with_header(header, 32);
        CHECK_STATUS(load_status(lengthy), MOE_E_FILE_DESC);
        free(lengthy.p);
    }
    moe_part_kind part;
    const char *name = NULL;
    moe_layer *m = NULL;
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    CHECK_STATUS(moe_layer_check(m, 1, NULL, &name), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_check(m, 1, &part, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_check(NULL, 1, &part, &name), MOE_E_NULL_LAYER);
    CHECK_OK(moe_layer_check(m, 1, &part, &name));
    moe_layer_free(m);
    free(b.p);
}

/* A number in the data that no layer can have. */
static void test_not_finite(void) {
    static const unsigned char values[4][4] = {
        { 0, 0, 0xc0, 0x7f }, { 0, 0, 0x80, 0x7f }, { 0, 0, 0x80, 0xff }, { 1, 0, 0x80, 0x7f }
    };
    static const char *const names[] = { "router",     "experts.w1",     "experts.wu",
                                         "experts.w2", "moment1.router", "moment2.experts.w2" };
    bytes b = small_file(1);
    moe_file f;
    moe_file_tensor t;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        CHECK_OK(moe_file_find(&f, names[i], &t));
        unsigned char kept[4], *p = b.p + (t.data - b.p) + t.bytes - 4;
        memcpy(kept, p, 4);
        for (size_t k = 0; k < 4; k++) {
            memcpy(p, values[k], 4);
            CHECK_STATUS(load_status(b), MOE_E_FILE_NAN);
        }
        memcpy(p, kept, 4);
    }
    b.p[b.n - 1] |= 0x80; /* a mean of squares below 0 */
    CHECK_STATUS(load_status(b), MOE_E_FILE_NAN);
    b.p[b.n - 1] &= 0x7f;
    CHECK_OK(load_status(b));
    free(b.p);
}

/* A layer in the test's own memory, where a number can be put that no setter takes. */
enum { BLOCK = 1 << 16 };
static unsigned char block[BLOCK];
static void put_into_block(uint32_t mark, uint32_t bits) {
    size_t found = 0;
    for (size_t i = 0; i + 4 <= BLOCK; i++) {
        if (memcmp(block + i, &mark, 4)) continue;
        memcpy(block + i, &bits, 4);
        found++;
    }
    CHECK(found == 1);
}

/* What cannot be loaded is not saved, and the tensor is named; what is saved is loaded. */
static void test_saving_not_finite(void) {
    static const uint32_t values[] = { 0x7fc00000, 0x7f800000, 0xff800000, 0x7f800001 }, mark = 0x42f6e9d5;
    static const unsigned char mine[] = "as it was";
    moe_desc d = small_desc();
    moe_layer *m = NULL;
    moe_tensor t;
    moe_part_kind part = MOE_PART_COUNT;
    const char *name = "";
    float marked;
    d.n_shared = 1;
    d.controller = MOE_CONTROL_BIAS;
    memcpy(&marked, &mark, 4);
    if (!CHECK_OK(moe_layer_init(&m, &d, block, BLOCK))) return;
    CHECK_OK(moe_layer_check(m, 1, &part, &name));
    CHECK(name == NULL);
    for (int p = 0; p < 3; p++)
        for (size_t i = 0; i <= moe_layer_tensors(m); i++) {
            static const moe_part_kind parts[] = { MOE_PART_PARAMS, MOE_PART_MOMENT1, MOE_PART_MOMENT2 };
            static float values_of[64];
            static unsigned char file[BLOCK];
            if (moe_layer_tensor(m, i, &t)) t.name = "controller.state", t.count = moe_layer_control(m)->n_state;
            if (parts[p] != MOE_PART_PARAMS && i == moe_layer_tensors(m)) continue;
            CHECK_OK(moe_layer_get(m, parts[p], t.name, values_of, t.count));
            float kept = values_of[t.count / 2];
            uint32_t kept_bits;
            memcpy(&kept_bits, &kept, 4);
            for (size_t v = 0; v < 5; v++) {
                uint32_t bits = v < 4 ? values[v] : UINT32_C(0xbf800000); /* -1: only as a mean of squares a fault */
                moe_status want = v < 4 || parts[p] == MOE_PART_MOMENT2 ? MOE_E_SAVE_NAN : MOE_OK;
                values_of[t.count / 2] = marked;
                CHECK_OK(moe_layer_set(m, parts[p], t.name, values_of, t.count));
                put_into_block(mark, bits);
                CHECK_STATUS(moe_layer_save_memory(m, 1, file, sizeof file), want);
                put_file(path, mine, sizeof mine);
                CHECK_STATUS(moe_layer_save(m, 1, path), want);
                bytes disk = read_file(path);
                if (want) CHECK(disk.n == sizeof mine && !memcmp(disk.p, mine, sizeof mine));
                else CHECK(disk.n > sizeof mine && !memcmp(disk.p, file, disk.n));
                CHECK(!file_exists(part_path));
                free(disk.p);
                CHECK_STATUS(moe_layer_check(m, 1, &part, &name), want);
                CHECK(want ? part == parts[p] && name && !strcmp(name, t.name) : name == NULL);
                CHECK_STATUS(moe_layer_check(m, 0, &part, &name), parts[p] == MOE_PART_PARAMS ? want : MOE_OK);
                values_of[t.count / 2] = kept;
                CHECK_OK(moe_layer_set(m, parts[p], t.name, values_of, t.count));
            }
        }
    remove(path);
    bytes b = save(m, 1);
    CHECK_OK(load_status(b));
    free(b.p);
    CHECK_STATUS(moe_layer_check(NULL, 0, &part, &name), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_check(m, 0, &part, NULL), MOE_E_NULL_OUT);
    moe_layer_free(m);
}

/* Which tensor of a file is at fault. */
static void test_fault(void) {
    bytes b = small_file(1);
    moe_layer *m = NULL;
    moe_file f;
    moe_file_tensor t;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK_OK(moe_layer_load_file(&m, &f, NULL));
    CHECK(f.fault.name == NULL);
    moe_layer_free(m);
    CHECK_OK(moe_file_find(&f, "moment1.experts.wu", &t));
    memset(b.p + (t.data - b.p), 0xff, 4);
    CHECK_STATUS(moe_layer_load_file(&m, &f, NULL), MOE_E_FILE_NAN);
    CHECK(m == NULL && f.fault.name == t.name && f.fault.name_length == 18 && f.fault.bytes == t.bytes);
    CHECK_OK(moe_file_find(&f, "experts.w1", &t));
    b.p[t.name - (const char *)b.p] = 'E';
    CHECK_STATUS(moe_layer_load_file(&m, &f, NULL), MOE_E_FILE_TENSOR);
    CHECK(f.fault.name_length == 10 && !memcmp(f.fault.name, "experts.w1", 10) && f.fault.data == NULL);
    CHECK_STATUS(moe_layer_load_file(&m, NULL, NULL), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_layer_load_file(NULL, &f, NULL), MOE_E_NULL_OUT);
    moe_file_close(&f);
    free(b.p);
}

/* The file with more in its metadata. */
static bytes with_metadata(bytes b, const char *more) {
    static const char after[] = "\"version\":\"1\"";
    size_t n = strlen(more), at = 8, header = 0;
    for (size_t i = 8; i-- > 0;) header = header << 8 | b.p[i];
    while (at + n < b.n && memcmp(b.p + at, after, sizeof after - 1)) at++;
    at += sizeof after - 1;
    bytes to = new_bytes(b.n + n);
    memcpy(to.p, b.p, at), memcpy(to.p + at, more, n), memcpy(to.p + at + n, b.p + at, b.n - at);
    set_header_length(to, header + n);
    return to;
}
/* Ranks that cannot be, numbers that are none, an optimiser's step without training, shards of experts in formats. */
static void test_lying_metadata(void) {
#define TEN "1111111111"
#define LENGTHY TEN TEN TEN TEN TEN TEN TEN TEN TEN /* longer than any value is */
    static const struct { const char *more; moe_status plain, formats; } rows[] = {
        {"", MOE_OK, MOE_OK},
        {",\"later\":\"" LENGTHY "\"", MOE_OK, MOE_OK}, /* a field of a later moe.h */
        {",\"shard\":\"0\",\"shards\":\"1\"", MOE_OK, MOE_OK},
        {",\"shard\":\"0\"", MOE_OK, MOE_OK},
        {",\"shard\":\"x\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"shards\":\"-1\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"shard\":\"" LENGTHY "\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"shards\":\"" LENGTHY "\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"draws\":\"x\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"shards\":\"0\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"shards\":\"4\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},            /* of three experts */
        {",\"shards\":\"2\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},            /* not as many on each */
        {",\"shard\":\"3\",\"shards\":\"3\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC},
        {",\"shard\":\"2\",\"shards\":\"3\"", MOE_E_FILE_TENSOR, MOE_E_FILE_DESC}, /* but all three are there */
        {",\"step\":\"1\"", MOE_E_FILE_DESC, MOE_E_FILE_DESC}};
    static const moe_layer_formats formats = {MOE_FORMAT_BF16, NULL, MOE_OFF, 0, NULL};
    moe_desc d = small_desc();
    moe_layer *quantised = NULL;
    d.n_experts = 3;
    moe_layer *m = new_layer(&d);
    CHECK_OK(moe_layer_quantize(m, &formats, &quantised));
    moe_layer_free(m);
    d.training = MOE_OFF;
    m = new_layer(&d);
    bytes b[2] = { save(m, 0), save(quantised, 0) };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int k = 0; k < 2; k++) {
            bytes changed = with_metadata(b[k], rows[i].more);
            if (!CHECK_STATUS(load_status(changed), k ? rows[i].formats : rows[i].plain))
                printf("        %s, %d\n", rows[i].more, k);
            free(changed.p);
        }
    CHECK_STATUS(edited_status(b[1], "\"n_shared\":\"0\"", "\"n_shared\":\"9\""), MOE_E_FILE_TENSOR); /* not so many */
    CHECK_STATUS(edited_status(b[1], "\"BF16\"", "\"XF16\""), MOE_E_FILE_DTYPE);
    CHECK_STATUS(edited_status(b[1], "\"BF16\",", "\"F16\", "), MOE_E_FILE_TENSOR); /* no format of experts */
    CHECK_STATUS(edited_status(b[1], "\"experts.w1.2\"", "\"experts.w1.9\""), MOE_E_FILE_TENSOR);
    b[1].p[b[1].n - 1] = 0xff, b[1].p[b[1].n - 2] = 0x80; /* a NaN */
    CHECK_STATUS(load_status(b[1]), MOE_E_FILE_NAN);
    free(b[0].p), free(b[1].p);
    moe_layer_free(m), moe_layer_free(quantised);
}

/* A rank's shard is saved with which of how many it is, and comes back. */
static void test_shard(void) {
    moe_desc d = small_desc();
    moe_layer *shard = NULL, *back = NULL;
    moe_file f;
    char text[8];
    d.n_experts = 3;
    moe_layer *m = new_layer(&d);
    CHECK_OK(moe_layer_shard(m, 2, 3, &shard));
    bytes b = save(shard, 1);
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK(!moe_file_metadata(&f, "shard", text, sizeof text) && !strcmp(text, "2"));
    CHECK(!moe_file_metadata(&f, "shards", text, sizeof text) && !strcmp(text, "3"));
    moe_file_close(&f);
    if (CHECK_OK(moe_layer_load_memory(&back, b.p, b.n, NULL))) CHECK(moe_layer_hash(back) == moe_layer_hash(shard));
    CHECK_STATUS(edited_status(b, "\"shard\":\"2\"", "\"shard\":\"3\""), MOE_E_FILE_DESC);
    free(b.p);
    moe_layer_free(m), moe_layer_free(shard), moe_layer_free(back);
}

/* A file that changes once it is open, and while its layer is made: refused, and nothing is left. */
static unsigned char *byte_to_change;
static void change_and_run(void *user, size_t workers, size_t n_tasks, moe_task *task, void *arg) {
    (void)user, (void)workers;
    *byte_to_change = '!';
    for (size_t i = 0; i < n_tasks; i++) task(arg, i, 0);
}
static void test_changing(void) {
    moe_desc d = small_desc();
    moe_layer *back = NULL;
    moe_file f;
    moe_file_tensor t;
    d.d_model = d.d_ff = 128;
    moe_layer *m = new_layer(&d);
    bytes b = save(m, 0);
    d.parallel.run = change_and_run, d.parallel.n_threads = 2;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK_OK(moe_file_find(&f, "experts.w2", &t));
    byte_to_change = b.p + (t.name - (const char *)b.p);
    long live = test_live_blocks;
    CHECK_STATUS(moe_layer_load_file(&back, &f, &d), MOE_E_FILE_TENSOR);
    CHECK(!back && test_live_blocks == live && *byte_to_change == '!');
    CHECK(f.fault.name_length == 10 && !memcmp(f.fault.name, "experts.w2", 10));
    *byte_to_change = 'e';
    d.parallel.run = NULL;
    CHECK_OK(moe_layer_load_file(&back, &f, &d));
    CHECK(moe_layer_hash(back) == moe_layer_hash(m));
    moe_layer_free(back);
    back = NULL;
    b.p[8] = '!'; /* the header's brace, then what is in it */
    CHECK(moe_layer_load_file(&back, &f, NULL) == MOE_E_FILE_DESC && !back);
    b.p[8] = '{';
    b.p[9] = '!';
    CHECK(moe_layer_load_file(&back, &f, NULL) == MOE_E_FILE_DESC && !back);
    moe_file_close(&f);
    moe_layer_free(m);
    free(b.p);
}

/* A desc far larger than the file is refused before anything is allocated. */
static void test_huge_desc(void) {
    static const char *const sizes[] = { "1000000", "1000000000000", "4611686018427387904", "18446744073709551615",
                                         "18446744073709551616" };
    static const char *const fields[] = { "d_model", "d_ff", "n_experts", "n_shared" };
    for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            char header[512];
            sprintf(header,
                    "{\"__metadata__\":{\"format\":\"moe.h\",\"version\":\"1\"%s,\"%s\":\"%s\"},"
                    "\"router\":" ONE("F32", "1,8", "0", "32") "}",
                    f ? ",\"d_model\":\"1\"" : "", fields[f], sizes[i]);
            bytes b = with_header(header, 32);
            long before = test_allocations;
            moe_status s = load_status(b);
            CHECK(s == MOE_E_FILE_TENSOR || s == MOE_E_FILE_DESC);
            CHECK(test_allocations == before);
            free(b.p);
        }
    }
}

/* Every byte of the length and the header with every other letter, all that JSON is built of and some that are no
 * letters: refused, or a layer that works. */
static void test_mutation(void) {
    bytes b = small_file(0);
    moe_file f;
    float x[WIDTH] = { 0.1f, 0.2f, 0.3f }, y[WIDTH];
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    long live = test_live_blocks;
    size_t loaded = 0;
    for (size_t i = 0; i < 8 + f.header; i++) {
        unsigned char kept = b.p[i];
        for (int v = 0; v < 256; v++) {
            moe_layer *m = NULL;
            moe_desc d;
            int text = v >= 32 && v <= 126;
            if (v % (TEST_SANITIZED ? 8 : text ? 2 : 16) && v != kept && !strchr("\"\\,:[]{}", v)) continue;
            b.p[i] = (unsigned char)v;
            if (moe_layer_load_memory(&m, b.p, b.n, NULL) == MOE_OK) {
                loaded++;
                CHECK_OK(moe_desc_resolve(moe_layer_desc(m), &d));
                if (d.training == MOE_ON) CHECK_OK(moe_forward(m, x, 1, y));
                moe_layer_free(m);
            } else CHECK(m == NULL);
        }
        b.p[i] = kept;
    }
    CHECK(loaded > 8 + f.header); /* at least the file itself, each time */
    CHECK(test_live_blocks == live);
    free(b.p);
}

/* ---- the allocator ---- */
/* Runs an action with 0, 1, ... allocations that succeed, until all do. */
static void check_failures(moe_status (*action)(void *), void *arg) {
    moe_status s = MOE_E_NO_MEMORY;
    for (long n = 0; n < 1000 && s == MOE_E_NO_MEMORY; n++) {
        long live = test_live_blocks;
        test_fail_at = n;
        s = action(arg);
        if (test_fail_at > 0) CHECK_OK(s); /* it did not need them all */
        test_fail_at = -1;
        CHECK(test_live_blocks == live);
    }
    CHECK_OK(s);
}

static moe_status load_action(void *arg) {
    return load_status(*(bytes *)arg);
}

static void test_no_memory_load(void) {
    bytes b = small_file(1);
    check_failures(load_action, &b);
    free(b.p);
}

static void test_save_memory_allocates_nothing(void) {
    bytes b = small_file(1);
    moe_layer *m = NULL;
    size_t n;
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    test_fail_at = 0;
    CHECK_OK(moe_layer_save_size(m, 1, &n));
    CHECK_OK(moe_layer_save_memory(m, 1, b.p, n));
    CHECK_OK(open_status(b));
    test_fail_at = -1;
    moe_layer_free(m);
    free(b.p);
}

static void test_surroundings(void) {
    bytes b = small_file(0);
    moe_desc d = small_desc();
    moe_layer *m = NULL;
    int context = 0;
    d.alloc_context = &context;
    d.parallel.n_threads = 2;
    d.d_model = 99; /* nothing else is taken from it */
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, &d));
    CHECK(test_last_context == &context);
    CHECK(moe_layer_desc(m)->alloc_context == &context && moe_layer_desc(m)->parallel.n_threads == 2);
    CHECK(moe_layer_desc(m)->d_model == WIDTH);
    moe_layer_free(m);
    free(b.p);
}

/* ---- the disk ---- */
static moe_status save_action(void *arg) {
    moe_status s = moe_layer_save((const moe_layer *)arg, 1, path);
    CHECK(!file_exists(part_path));
    return s;
}

static moe_status load_path_action(void *arg) {
    moe_layer *m = NULL;
    moe_status s = moe_layer_load(&m, (const char *)arg, NULL);
    CHECK((m == NULL) == (s != MOE_OK));
    moe_layer_free(m);
    return s;
}

/* A file by path has the bytes of save_memory; it replaces the old one; and a failure leaves the old one. */
static void test_disk(void) {
    bytes b = small_file(1);
    moe_layer *m = NULL, *back = NULL;
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    remove(path);
    check_failures(save_action, m);
    bytes disk = read_file(path);
    CHECK(disk.n == b.n && !memcmp(disk.p, b.p, b.n));
    free(disk.p);
    check_failures(load_path_action, path);
    moe_desc d = small_desc();
    int context = 0;
    d.alloc_context = &context;
    if (CHECK_OK(moe_layer_load(&back, path, &d))) CHECK(moe_layer_hash(back) == moe_layer_hash(m));
    CHECK(test_last_context == &context);
    moe_layer_free(back);

    CHECK_OK(moe_layer_save(m, 0, path));
    bytes old = read_file(path);
    CHECK(old.n > 0 && old.n < b.n);
    test_fail_at = 1; /* the path's memory, but not the buffer's: the new file is begun and not finished */
    CHECK_STATUS(moe_layer_save(m, 1, path), MOE_E_NO_MEMORY);
    test_fail_at = -1;
    CHECK(!file_exists(part_path));
    disk = read_file(path);
    CHECK(disk.n == old.n && !memcmp(disk.p, old.p, old.n));
    free(disk.p);
    remove(path);
    CHECK_STATUS(load_path_action(path), MOE_E_OPEN);

    put_file(path, NULL, 0);
    CHECK_STATUS(load_path_action(path), MOE_E_FILE_SHORT);
    remove(path);
    CHECK_STATUS(moe_layer_save(m, 0, "no/such/directory/file"), MOE_E_OPEN);
    moe_layer_free(m);
    free(old.p);
    free(b.p);
}

#ifndef _WIN32
/* A file's bytes are still these. */
static void check_file(const char *name, bytes want) {
    bytes disk = read_file(name);
    CHECK(disk.n == want.n && !memcmp(disk.p, want.p, want.n));
    free(disk.p);
}
static moe_layer *layer_of(bytes b) {
    moe_layer *m = NULL;
    CHECK_OK(moe_layer_load_memory(&m, b.p, b.n, NULL));
    return m;
}

/* Places where nothing can be written leave the existing file whole, and nothing beside it. */
static void test_unwritable(void) {
    bytes b = small_file(1);
    moe_layer *m = layer_of(b);
    CHECK_OK(moe_layer_save(m, 1, path));
    struct rlimit before, limit;
    CHECK(!getrlimit(RLIMIT_FSIZE, &before));
    limit = before;
    limit.rlim_cur = 512;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    CHECK(!setrlimit(RLIMIT_FSIZE, &limit)); /* as if the disk were full */
    moe_status s = moe_layer_save(m, 0, path);
    CHECK_STATUS(s, MOE_E_WRITE);
    CHECK(errno == EFBIG); /* the system's reason */
    CHECK(!setrlimit(RLIMIT_FSIZE, &before));
    signal(SIGXFSZ, handler);
    CHECK(access(part_path, F_OK) != 0);
    check_file(path, b);

    CHECK(!mkdir(other_path, 0700)); /* a directory: neither a file nor to be replaced by one */
    CHECK_STATUS(load_path_action(other_path), MOE_E_FOLDER);
    CHECK_STATUS(moe_layer_save(m, 0, other_path), MOE_E_FOLDER);
    CHECK(!rmdir(other_path)); /* also shows that it is empty */
    CHECK(!mkfifo(other_path, 0600));
    CHECK_STATUS(load_path_action(other_path), MOE_E_NOT_FILE);
    CHECK_STATUS(moe_layer_save(m, 0, other_path), MOE_E_NOT_FILE);
    CHECK(!remove(other_path));
    if (!access("/dev/full", W_OK)) {
        CHECK(!symlink("/dev/full", other_path));
        CHECK_STATUS(moe_layer_save(m, 0, other_path), MOE_E_NOT_FILE);
        CHECK_STATUS(moe_layer_save(m, 0, "/dev/full"), MOE_E_NOT_FILE);
        CHECK(!remove(other_path) && access("/dev/full.part", F_OK) != 0);
    }
    remove(path);
    moe_layer_free(m);
    free(b.p);
}

/* What stands under a new file's name is left alone, whatever it is. */
static void test_part_taken(void) {
    bytes b = small_file(1), mine = { (unsigned char *)part_path, 7 };
    moe_layer *m = layer_of(b);
    put_file(part_path, mine.p, mine.n);
    CHECK_OK(moe_layer_save(m, 1, path));
    check_file(part_path, mine);
    check_file(path, b);
    CHECK(!remove(part_path) && !mkdir(part_path, 0700));
    CHECK_OK(moe_layer_save(m, 0, path));
    CHECK(!rmdir(part_path) && !remove(path));
    moe_layer_free(m);
    free(b.p);
}

/* Of a symbolic link the target is replaced: absolute, from its own folder, over two links, and one that is not there
 * yet. Links in a circle are refused. */
static void test_links(void) {
    static char folder[540], link[560], second[560], target[560];
    bytes b = small_file(1);
    moe_layer *m = layer_of(b);
    struct stat info;
    snprintf(folder, sizeof folder, "%s", other_path);
    snprintf(link, sizeof link, "%s/link", folder);
    snprintf(second, sizeof second, "%s/second", folder);
    snprintf(target, sizeof target, "%s/target", folder);
    CHECK(!mkdir(folder, 0700));
    const char *to[] = { "target", target };
    for (size_t i = 0; i < 2; i++) {
        CHECK(!symlink(to[i], link) && !symlink("./link", second));
        CHECK_OK(moe_layer_save(m, 1, link)); /* the target is made */
        check_file(target, b);
        CHECK_OK(moe_layer_save(m, 0, second)); /* and replaced */
        CHECK_OK(moe_layer_save(m, 1, second));
        check_file(target, b);
        CHECK(!lstat(link, &info) && S_ISLNK(info.st_mode) && !lstat(second, &info) && S_ISLNK(info.st_mode));
        CHECK(!lstat(target, &info) && S_ISREG(info.st_mode));
        CHECK(!remove(link) && !remove(second) && !remove(target));
    }
    CHECK(!symlink("second", link) && !symlink("link", second));
    CHECK_STATUS(moe_layer_save(m, 0, link), MOE_E_OPEN);
    CHECK(!remove(link) && !remove(second));
    char here[1024], long_target[4096];
    CHECK(getcwd(here, sizeof here) && !chdir(folder)); /* a link that is named without its folder */
    CHECK(!symlink("target", "link"));
    CHECK_OK(moe_layer_save(m, 1, "link"));
    check_file(target, b);
    CHECK(!lstat("link", &info) && S_ISLNK(info.st_mode) && !remove("link"));
    memset(long_target, '/', sizeof long_target); /* "////...target", longer than there is room for */
    strcpy(long_target + sizeof long_target - sizeof "target", "target");
    if (!symlink(long_target, "link")) {
        CHECK_STATUS(moe_layer_save(m, 0, "./link"), MOE_E_OPEN);
        CHECK(!remove("link"));
    }
    check_file(target, b);
    CHECK(!remove(target) && !chdir(here) && !rmdir(folder));
    moe_layer_free(m);
    free(b.p);
}

/* A process that saves a layer to the path again and again. */
static pid_t saver(const moe_layer *m, int with_optimizer) {
    pid_t id = fork();
    if (id) return id;
    for (;;) {
        if (moe_layer_save(m, with_optimizer, path)) _exit(1);
    }
}
static void wait_a_moment(long microseconds) {
    struct timespec t = { 0, microseconds * 1000 };
    nanosleep(&t, NULL);
}
/* Two processes save to one path while this one reads it; then both are killed in the middle. At any time the file is
 * one of the two, whole. */
static void test_saves_at_one_time(void) {
    bytes b = small_file(1);
    moe_layer *m = layer_of(b);
    bytes shorter = save(m, 0);
    size_t seen[2] = { 0, 0 };
    for (int round = 0; round < 8; round++) {
        CHECK_OK(moe_layer_save(m, 1, path));
        pid_t one = saver(m, 0), two = saver(m, 1);
        if (!CHECK(one > 0 && two > 0)) break;
        for (int i = 0; i < 40; i++) {
            bytes disk = read_file(path), want = disk.n == b.n ? b : shorter;
            CHECK(disk.n == want.n && !memcmp(disk.p, want.p, want.n));
            seen[disk.n == b.n]++;
            free(disk.p);
            wait_a_moment(700 + 37 * round);
        }
        int status;
        CHECK(waitpid(-1, &status, WNOHANG) == 0); /* none has failed */
        CHECK(!kill(one, SIGKILL) && !kill(two, SIGKILL));
        CHECK(waitpid(one, &status, 0) == one && waitpid(two, &status, 0) == two);
        CHECK_OK(load_path_action(path));
    }
    CHECK(seen[0] && seen[1]);
    for (int i = 0; i < 17; i++) { /* what the killed ones left */
        char left[540];
        if (i) snprintf(left, sizeof left, "%s%d", part_path, i);
        else snprintf(left, sizeof left, "%s", part_path);
        remove(left);
    }
    remove(path);
    moe_layer_free(m);
    free(shorter.p);
    free(b.p);
}
#endif

/* ---- systems ---- */
#include "rows.h"

/* ---- saving and loading: the same layer, the same next step ---- */
static void test_save_load(void) {
    enum { T = 24, STEPS = 3 };
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const char *name = moe_system_at(i)->name;
        moe_layer *m = row(name, ""), *back = NULL;
        float again[T * D];
        size_t n_bytes = 0;
        if (!m) continue;
        for (int step = 0; step < STEPS; step++) {
            tokens(T);
            go(m, T, 0), go(m, T, 0); /* one forward more than steps: draws are not steps */
            back_and_step(m, 0.01f);
        }
        CHECK_OK(moe_layer_save_size(m, 1, &n_bytes));
        unsigned char *file = (unsigned char *)test_memory(n_bytes, 1);
        moe_desc surroundings = row_desc(name, "");
        moe_status s = moe_layer_save_memory(m, 1, file, n_bytes);
        if (!s) s = moe_layer_load_memory(&back, file, n_bytes, &surroundings);
        free(file);
        if (!CHECK_OK(s)) { printf("        %s\n", name); moe_layer_free(m); continue; }
        int same = CHECK(moe_layer_hash(m) == moe_layer_hash(back));
        const moe_control *a = moe_layer_control(m), *b = moe_layer_control(back);
        same &= CHECK(a->n_state == b->n_state && a->kind == b->kind);
        if (same && a->n_state) CHECK_SAME(a->state, b->state, a->n_state);
        for (int step = 0; step < 2; step++) {
            tokens(T);
            go(back, T, 0);
            memcpy(again, y, sizeof again);
            go(m, T, 0);
            same &= CHECK_SAME(y, again, T * D);
            back_and_step(m, 0.01f), back_and_step(back, 0.01f);
            same &= CHECK(moe_layer_hash(m) == moe_layer_hash(back));
            if (a->n_state) same &= CHECK_SAME(a->state, b->state, a->n_state);
        }
        for (int l = 0; l < MOE_LOSS_COUNT; l++) CHECK_BITS(moe_layer_desc(m)->loss[l], moe_layer_desc(back)->loss[l]);
        if (!same) printf("        %s\n", name);
        moe_layer_free(m), moe_layer_free(back);
    }
}

int main(void) {
    make_paths();
    RUN(test_round_trip);
    RUN(test_inference_layer);
    RUN(test_between_steps);
    RUN(test_unaligned);
    RUN(test_layout);
    RUN(test_arguments);
    RUN(test_truncation);
    RUN(test_lying_layers);
    RUN(test_not_finite);
    RUN(test_saving_not_finite);
    RUN(test_fault);
    RUN(test_lying_metadata);
    RUN(test_shard);
    RUN(test_changing);
    RUN(test_huge_desc);
    RUN(test_mutation);
    RUN(test_no_memory_load);
    RUN(test_save_memory_allocates_nothing);
    RUN(test_surroundings);
    RUN(test_disk);
#ifndef _WIN32
    RUN(test_unwritable);
    RUN(test_part_taken);
    RUN(test_links);
    RUN(test_saves_at_one_time);
#endif
    RUN(test_save_load);
    return test_end();
}
