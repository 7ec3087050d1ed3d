/* Routers by name, in files and in shards. */
#include <time.h>
#include "test.h"

/* ---- routers ---- */
static void test_router_names(void) {
    static const struct {
        const char *name;
        int is;
        size_t layer;
    } rows[] = {{"model.layers.0.mlp.gate.weight", 1, 0},
                {"model.layers.15.mlp.gate.weight", 1, 15},
                {"model.layers.31.block_sparse_moe.gate.weight", 1, 31},
                {"model.layers.007.mlp.gate.weight", 0, 0},
                {"model.layers.1.mlp.gate_proj.weight", 0, 0},
                {"model.layers.1.mlp.shared_expert_gate.weight", 0, 0},
                {"model.layers.1.mlp.gate.e_score_correction_bias", 0, 0},
                {"model.layers.1.mlp.gate.weight2", 0, 0},
                {"model.layers..mlp.gate.weight", 0, 0},
                {"model.layers.1234567890.mlp.gate.weight", 0, 0},
                {"xmodel.layers.1.mlp.gate.weight", 0, 0},
                {"model.layers.1", 0, 0},
                {"model.layers.1a.mlp.gate.weight", 0, 0},
                {"model.layers.1/.mlp.gate.weight", 0, 0},
                {"", 0, 0}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t layer = 77;
        if (!CHECK(moe_router_name(rows[i].name, strlen(rows[i].name), &layer) == rows[i].is))
            printf("        %s\n", rows[i].name);
        if (rows[i].is)
            CHECK(layer == rows[i].layer);
        else
            CHECK(layer == 77);
    }
    CHECK(moe_router_name(NULL, 3, NULL) == 0 && moe_router_name("model.layers.3.mlp.gate.weight", 30, NULL) == 1);
}

static size_t safetensors(unsigned char *out, const char *header, const void *data, size_t bytes) {
    uint64_t n = strlen(header);
    for (int i = 0; i < 8; i++) out[i] = (unsigned char)(n >> 8 * i);
    memcpy(out + 8, header, (size_t)n);
    memcpy(out + 8 + n, data, bytes);
    return 8 + (size_t)n + bytes;
}

static void test_file_router(void) {
    uint16_t data[] = {0x3f80, 0x4000, 0x4040, 0x4080, 0xbf80, 0xc000, 0, 0};
    unsigned char bytes[1024];
    moe_file f;
    moe_file_tensor t;
    size_t layer = 0;
    test_little_endian(data, 8, sizeof *data);
    size_t size = safetensors(
        bytes,
        "{\"model.layers.10.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[0,8]},"
        "\"model.layers.2.block_sparse_moe.gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[8,12]},"
        "\"model.layers.2.mlp.gate_proj.weight\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[12,16]}}",
        data, sizeof data);
    CHECK_OK(moe_file_open(&f, bytes, size));
    CHECK_OK(moe_file_router(&f, 0, &layer, &t));
    CHECK(layer == 2 && !strcmp(t.dtype, "F32"));
    CHECK_OK(moe_file_router(&f, 1, &layer, &t));
    CHECK(layer == 10 && t.dim[0] == 2 && t.dim[1] == 2 && moe_dtype_of(t.dtype) == MOE_DTYPE_BF16);
    float w[4];
    CHECK_OK(moe_to_float(moe_dtype_of(t.dtype), 4, t.data, w));
    CHECK(w[0] == 1 && w[1] == 2 && w[2] == 3 && w[3] == 4);
    CHECK_STATUS(moe_file_router(&f, 2, &layer, &t), MOE_E_NAME);
    CHECK_STATUS(moe_file_router(&f, 0, NULL, &t), MOE_E_NULL_OUT);
}

static const char index_json[] =
    "{\"metadata\": {\"total_size\": 123, \"more\": [1, {\"a\": null}]},\n \"weight_map\": {\n"
    "  \"model.embed_tokens.weight\": \"model-00001-of-00002.safetensors\",\n"
    "  \"model.layers.1.mlp.gate.weight\": \"model-00002-of-00002.safetensors\",\n"
    "  \"model.layers.0.mlp.gate.weight\": \"model-0000\\u0031-of-00002.safetensors\"\n } }\n";

static void test_shards(void) {
    moe_shards f;
    char text[64], tiny[8];
    size_t layer = 9, size = sizeof index_json - 1;
    CHECK_OK(moe_shards_open(&f, index_json, size));
    CHECK(f.n_tensors == 3);
    CHECK_OK(moe_shards_find(&f, "model.embed_tokens.weight", text, sizeof text));
    CHECK(!strcmp(text, "model-00001-of-00002.safetensors"));
    CHECK_STATUS(moe_shards_find(&f, "model.norm.weight", text, sizeof text), MOE_E_NAME);
    CHECK_STATUS(moe_shards_find(&f, "model.embed_tokens.weight", tiny, sizeof tiny), MOE_E_SMALL_MEMORY);
    CHECK(tiny[0] == 0);
    CHECK_OK(moe_shards_router(&f, 0, &layer, text, sizeof text));
    CHECK(layer == 0 && !strcmp(text, "model.layers.0.mlp.gate.weight"));
    CHECK_OK(moe_shards_find(&f, text, text, sizeof text));
    CHECK(!strcmp(text, "model-00001-of-00002.safetensors"));
    CHECK_OK(moe_shards_router(&f, 1, &layer, text, sizeof text));
    CHECK(layer == 1);
    CHECK_STATUS(moe_shards_router(&f, 2, &layer, text, sizeof text), MOE_E_NAME);
    static const char outside[] = "{\"weight_map\":{\"t\":\"a\",\"u\":\"../b\"}}";
    CHECK_STATUS(moe_shards_open(&f, outside, sizeof outside - 1), MOE_E_SHARDS);
    CHECK(!memcmp(outside + f.offset, "../b", 4)); /* where the name stands that is none */
    for (size_t n = 0; n < size - 1; n++) { /* truncated at every length; the last byte is a line's end */
        unsigned char *copy = (unsigned char *)malloc(n ? n : 1);
        memcpy(copy, index_json, n);
        CHECK_STATUS(moe_shards_open(&f, copy, n), MOE_E_SHARDS);
        CHECK(f.offset <= n && f.n_tensors == 0);
        CHECK_STATUS(moe_shards_find(&f, "x", text, sizeof text), MOE_E_NULL_BYTES);
        free(copy);
    }
    static const char *const bad[] = {"[]",
                                      "{}",
                                      "{\"weight_map\": []}",
                                      "{\"weight_map\": {\"a\": 1}}",
                                      "{\"weight_map\": {\"a\": \"../b\"}}",
                                      "{\"weight_map\": {\"a\": \"/etc/passwd\"}}",
                                      "{\"weight_map\": {\"a\": \"b\\\\c\"}}",
                                      "{\"weight_map\": {\"a\": \"b\\u002fc\"}}",
                                      "{\"weight_map\": {\"a\": \"\"}}",
                                      "{\"weight_map\": {\"a\": \"..\"}}",
                                      "{\"weight_map\": {\"a\": \"c:b\"}}",
                                      "{\"weight_map\": {\"a\": \"b\"}} x",
                                      "{\"weight_map\": {}, \"weight_map\": {}}",
                                      "{\"weight_map\": {\"a\": \"b\",}}",
                                      "{\"metadata\": [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]], \"weight_map\": {}}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (!CHECK_STATUS(moe_shards_open(&f, bad[i], strlen(bad[i])), MOE_E_SHARDS)) printf("        %s\n", bad[i]);
    CHECK_OK(moe_shards_open(&f, "{\"weight_map\": {}}", 18));
    CHECK(f.n_tensors == 0);
    CHECK_STATUS(moe_shards_router(&f, 0, &layer, text, sizeof text), MOE_E_NAME);
    CHECK_STATUS(moe_shards_open(&f, NULL, 2), MOE_E_NULL_BYTES);
}

/* An index of n names, every 100th a router's, layers descending, the first `twice` names coming again. */
static char *index_of(size_t n, size_t twice) {
    char *text = (char *)test_memory(n + twice + 1, 100), *p = text + sprintf(text, "{\"weight_map\":{");
    for (size_t i = 0; i < n + twice; i++) {
        size_t k = i % n, layer = (n - 1 - k) / 100;
        p += sprintf(p, "%s\"model.layers.%zu.mlp.", i ? "," : "", layer);
        if (k % 100 == 50) p += sprintf(p, "gate.weight");
        else p += sprintf(p, "experts.%zu.up_proj.weight", k % 100);
        p += sprintf(p, "\":\"model-%05zu.safetensors\"", k % 163);
    }
    strcpy(p, "}}");
    return text;
}

/* Open it, ask for all routers, find the file of each name: the processor's time. */
static double reading(size_t n) {
    char *text = index_of(n, 0), name[80], file[40], want[40];
    moe_shards f;
    size_t layer, routers = 0, right = 0;
    clock_t start = clock();
    CHECK_OK(moe_shards_open(&f, text, strlen(text)));
    CHECK(f.n_tensors == n);
    for (; moe_shards_router(&f, routers, &layer, name, sizeof name) == MOE_OK; routers++) right += layer == routers;
    CHECK(routers == n / 100 && right == routers);
    for (size_t k = right = 0; k < n; k++) {
        sprintf(name, "model.layers.%zu.mlp.experts.%zu.up_proj.weight", (n - 1 - k) / 100, k % 100);
        if (k % 100 == 50) sprintf(name, "model.layers.%zu.mlp.gate.weight", (n - 1 - k) / 100);
        sprintf(want, "model-%05zu.safetensors", k % 163);
        right += !moe_shards_find(&f, name, file, sizeof file) && !strcmp(file, want);
    }
    CHECK(right == n);
    CHECK_STATUS(moe_shards_find(&f, "model.layers.0.mlp", file, sizeof file), MOE_E_NAME);
    CHECK(file[0] == 0);
    moe_shards_close(&f);
    CHECK_STATUS(moe_shards_find(&f, "x", file, sizeof file), MOE_E_NULL_BYTES);
    double took = (double)(clock() - start) / CLOCKS_PER_SEC;
    free(text);
    return took;
}

/* Four times the names take about four times as long; walking for each name, or each layer, would take sixteen. */
static void test_time(void) {
    double ratio = 1e30;
    for (int attempt = 0; attempt < 5 && ratio > 8; attempt++) ratio = reading(10000) / reading(2500);
    if (!CHECK(ratio < 8)) printf("        4 times the names took %.1f times as long\n", ratio);
}

static void test_shards_twice(void) {
    static const size_t sizes[] = {5, 192, 193, 3000};
    moe_shards f;
    for (size_t i = 0; i < 4; i++) {
        char *text = index_of(sizes[i], 0);
        CHECK_OK(moe_shards_open(&f, text, strlen(text)));
        CHECK((f.index != NULL) == (sizes[i] > 192));
        moe_shards_close(&f);
        free(text);
        text = index_of(sizes[i], 1);
        CHECK_STATUS(moe_shards_open(&f, text, strlen(text)), MOE_E_FILE_TWICE);
        CHECK(f.index == NULL && f.n_tensors == 0 && f.offset > strlen(text) / 2 && f.offset < strlen(text));
        free(text);
    }
    static const char escaped[] = "{\"weight_map\":{\"a\":\"x\",\"\\u0061\":\"x\"}}";
    CHECK_STATUS(moe_shards_open(&f, escaped, sizeof escaped - 1), MOE_E_FILE_TWICE);
    char *text = index_of(600, 0);
    test_fail_at = 0;
    CHECK_STATUS(moe_shards_open(&f, text, strlen(text)), MOE_E_NO_MEMORY);
    test_fail_at = -1;
    free(text);
}

/* ---- the bias of a router ---- */
#define BIAS "mlp.gate.e_score_correction_bias"

/* A DeepSeek-V3 router from a file: chosen by sigmoid(logit) + bias, weighted by sigmoid(logit) over its sum. */
static void test_router_bias(void) {
    static const float data[] = {0.5f, -0.5f, 0, 2, /* layer 3, F32 */ -1, 0, 0, 0}; /* layer 12: ends in a NaN */
    static const uint16_t halves[] = {0x3f80, 0, 0xc000, 0x3e80};                   /* layer 4, BF16: 1 0 -2 0.25 */
    unsigned char bytes[1024], all[sizeof data + sizeof halves];
    moe_file f;
    float bias[4];
    uint32_t nan_bits = 0x7fc00000;
    memcpy(all, data, sizeof data);
    memcpy(all + 28, &nan_bits, 4);
    memcpy(all + sizeof data, halves, sizeof halves);
    test_little_endian(all, sizeof data / 4, 4), test_little_endian(all + sizeof data, sizeof halves / 2, 2);
    size_t size = safetensors(
        bytes, "{\"model.layers.3." BIAS "\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
        "\"model.layers.12." BIAS "\":{\"dtype\":\"F32\",\"shape\":[1,4],\"data_offsets\":[16,32]},"
        "\"model.layers.4.block_sparse_moe.e_score_correction_bias\":"
        "{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[32,40]},"
        "\"model.layers.5." BIAS "\":{\"dtype\":\"I32\",\"shape\":[0],\"data_offsets\":[40,40]},"
        "\"model.layers.6." BIAS "\":{\"dtype\":\"NEW\",\"shape\":[0],\"data_offsets\":[40,40]}}", all, sizeof all);
    CHECK_OK(moe_file_open(&f, bytes, size));
    CHECK_OK(moe_file_router_bias(&f, 4, 4, bias));
    CHECK(bias[0] == 1 && bias[1] == 0 && bias[2] == -2 && bias[3] == 0.25f);
    CHECK_STATUS(moe_file_router_bias(&f, 12, 4, bias), MOE_E_FILE_NAN);
    CHECK_STATUS(moe_file_router_bias(&f, 3, 5, bias), MOE_E_FILE_SHAPE);
    CHECK_STATUS(moe_file_router_bias(&f, 3, SIZE_MAX, bias), MOE_E_FILE_SHAPE);
    CHECK_STATUS(moe_file_router_bias(&f, 5, 0, bias), MOE_E_FILE_DTYPE);
    CHECK_STATUS(moe_file_router_bias(&f, 6, 0, bias), MOE_E_FILE_DTYPE);
    CHECK_STATUS(moe_file_router_bias(&f, 1, 4, bias), MOE_E_NAME);
    CHECK_STATUS(moe_file_router_bias(&f, 3, 4, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_router_bias(NULL, 3, 4, bias), MOE_E_NULL_BYTES);
    CHECK_OK(moe_file_router_bias(&f, 3, 4, bias));
    CHECK(!memcmp(bias, data, 16));

    /* logits 1 2 0 -3: without the bias experts 1, 0; sigmoid + bias = 1.2311 0.3808 0.5 2.0474: experts 3, 0 */
    static const float router[4] = {1, 2, 0, -3}, x[1] = {1};
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = 1, d.n_experts = 4, d.top_k = 2, d.gate = MOE_GATE_SIGMOID, d.normalize = MOE_ON;
    moe_tape *t = NULL;
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_tape_new(&t, &d, 1, MOE_OFF))) return;
    double high = 1 / (1 + exp(-1.0)), low = 1 / (1 + exp(3.0));
    for (int with = 0; with < 2; with++) {
        t->side.bias = with ? bias : NULL;
        CHECK_OK(moe_route(t, router, x, 1));
        CHECK(t->index[0] == (with ? 3 : 1) && t->index[1] == 0);
        if (with) CHECK(fabs((double)t->weight[0] - low / (low + high)) < 1e-7);
        if (with) CHECK(fabs((double)t->weight[1] - high / (low + high)) < 1e-7);
    }
    d.controller = MOE_CONTROL_BIAS; /* and in a layer */
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", router, 4));
    CHECK_OK(moe_file_router_bias(&f, 3, 4, moe_layer_control(m)->bias));
    float y[1];
    CHECK_OK(moe_forward(m, x, 1, y));
    CHECK(moe_layer_tape(m)->index[0] == 3 && moe_layer_tape(m)->index[1] == 0);
    moe_layer_free(m);
    moe_tape_free(t);
    moe_file_close(&f);
}

static void test_router_bias_name(void) {
    char name[80];
    CHECK_OK(moe_router_bias_name("model.layers.17.mlp.gate.weight", name, sizeof name));
    CHECK(!strcmp(name, "model.layers.17." BIAS));
    CHECK_STATUS(moe_router_bias_name("model.layers.17.mlp.gate.weight", name, 15 + sizeof BIAS), MOE_E_SMALL_MEMORY);
    CHECK(name[0] == 0);
    CHECK_OK(moe_router_bias_name("model.layers.17.mlp.gate.weight", name, 16 + sizeof BIAS));
    CHECK_OK(moe_router_bias_name("model.layers.0.block_sparse_moe.gate.weight", name, sizeof name));
    CHECK(!strcmp(name, "model.layers.0.block_sparse_moe.e_score_correction_bias"));
    CHECK_STATUS(moe_router_bias_name("model.layers.0.mlp.gate_proj.weight", name, sizeof name), MOE_E_NAME);
    CHECK(name[0] == 0);
    CHECK_STATUS(moe_router_bias_name(NULL, name, sizeof name), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_router_bias_name("x", NULL, 4), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_router_bias_name("x", name, 0), MOE_E_SMALL_MEMORY);
}

/* ---- experts' weights in the layouts of others ---- */
enum { E = 4, D = 37, F = 45, FROM = 1, N = 2, MOST = N * D * 2 * F }; /* experts 1 and 2 are packed at once */

static float number_of(int tensor, size_t e, size_t r, size_t c) { /* of 7 bits: exact in every type */
    uint32_t h = (uint32_t)(((size_t)tensor * 31 + e) * 1009 + r) * 2654435761u + (uint32_t)c * 40503u;
    h ^= h >> 15;
    return (float)((int)(h * 2246822519u >> 24) - 128) / 128.0f;
}
static void put_number(moe_dtype_kind dtype, unsigned char *at, float value) {
    uint32_t bits = test_bits(value), half;
    double wide = value;
    int e = 0;
    if (dtype == MOE_DTYPE_F64) { memcpy(at, &wide, 8), test_little_endian(at, 1, 8); return; }
    if (dtype == MOE_DTYPE_F32) { memcpy(at, &value, 4), test_little_endian(at, 1, 4); return; }
    if (dtype == MOE_DTYPE_NONE) { memcpy(at, &value, 4); return; } /* as this machine has it */
    half = bits >> 16;
    if (dtype == MOE_DTYPE_F16) { /* 1 sign, 5 exponent, 10 fraction */
        double m = frexp(fabs(wide), &e);
        half = m > 0 ? (uint32_t)(e + 14) << 10 | (uint32_t)(m * 2048 - 1024) : 0;
        half |= bits >> 31 << 15;
    }
    at[0] = (unsigned char)half, at[1] = (unsigned char)(half >> 8);
}

/* The place of element (r, c) of tensor w1 or wu (0, 1) of expert e, as in the header's table, axis by axis. */
static size_t place_of(const moe_experts_layout *l, int up, size_t e, size_t rows, size_t r, size_t c) {
    size_t out = c, outs = F;
    if (l->gate_up == MOE_GATE_UP_FUSED) out = up ? F + c : c, outs = 2 * F;
    if (l->gate_up == MOE_GATE_UP_INTERLEAVED) out = 2 * c + (size_t)up, outs = 2 * F;
    return l->out_first ? (e * outs + out) * rows + r : (e * rows + r) * outs + out;
}

typedef struct foreign { unsigned char *w[6]; moe_experts_arrays arrays; } foreign; /* w1 wu w2 b1 bu b2 */

static void foreign_make(foreign *x, const moe_experts_layout *l, int gated, int bias) {
    size_t size = l->dtype ? moe_dtype_size(l->dtype) : sizeof(float);
    memset(x, 0, sizeof *x);
    for (int i = 0; i < 6; i++) {
        int is_up = i == 1 || i == 4, is_bias = i >= 3, second = i == 2 || i == 5;
        size_t rows = second ? F : D, columns = second ? D : F;
        if (is_bias) rows = 1;
        if ((is_up && !gated) || (is_bias && !bias)) continue;
        int to = is_up && l->gate_up ? i - 1 : i;
        if (!x->w[to]) x->w[to] = (unsigned char *)test_memory(MOST + 1, 8) + 1; /* not aligned */
        for (size_t e = 0; e < N; e++)
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < columns; c++) {
                    size_t place = place_of(l, is_up, e, rows, r, c);
                    if (second) place = (e * rows + r) * columns + c;
                    if (second && l->out_first) place = (e * columns + c) * rows + r;
                    put_number(l->dtype, x->w[to] + place * size, number_of(i, e, r, c));
                }
    }
    moe_experts_arrays arrays = {x->w[0], x->w[1], x->w[2], x->w[3], x->w[4], x->w[5]};
    x->arrays = arrays;
}
static void foreign_free(foreign *x) {
    for (int i = 0; i < 6; i++)
        if (x->w[i]) free(x->w[i] - 1);
}

/* The same through moe_expert_pack, from plain arrays of one expert. */
static void pack_plain(const moe_desc *d, int gated, int bias, float *params) {
    static float w[6][D * F];
    for (size_t e = 0; e < N; e++) {
        for (int i = 0; i < 6; i++) {
            size_t rows = i == 2 ? F : D, columns = i == 2 || i == 5 ? D : F;
            for (size_t k = 0; k < (i < 3 ? rows : 1) * columns; k++)
                w[i][k] = number_of(i, e, k / columns, k % columns);
        }
        moe_expert_weights plain = {w[0], gated ? w[1] : NULL, w[2], NULL, NULL, NULL};
        if (bias) plain.b1 = w[3], plain.bu = gated ? w[4] : NULL, plain.b2 = w[5];
        CHECK_OK(moe_expert_pack(d, FROM + e, &plain, params));
    }
}

/* y of each token through its one expert, in double precision, against the library's from the packed parameters. */
static void check_forward(const moe_desc *d, int gated, int bias, const float *params) {
    enum { T = 6 };
    static float x[T * D], y[T * D];
    int32_t index[T];
    float ones[T];
    moe_tape *t = NULL;
    test_fill(x, T * D, -1, 1);
    for (size_t i = 0; i < T; i++) index[i] = (int32_t)(FROM + i % N), ones[i] = 1;
    if (!CHECK_OK(moe_tape_new(&t, d, T, MOE_OFF))) return;
    CHECK_OK(moe_tape_tokens(t, x, T));
    CHECK_OK(moe_routes_fill(&t->routes, T, index, ones, 0, MOE_ORDER_DEFAULT));
    CHECK_OK(moe_experts_forward(t, params, y));
    for (size_t i = 0; i < T; i++) {
        double h[F], worst = 0;
        size_t e = i % N;
        for (size_t c = 0; c < F; c++) {
            double gate = bias ? number_of(3, e, 0, c) : 0, up = bias ? number_of(4, e, 0, c) : 0;
            for (size_t r = 0; r < D; r++) gate += (double)x[i * D + r] * number_of(0, e, r, c);
            for (size_t r = 0; r < D; r++) up += (double)x[i * D + r] * number_of(1, e, r, c);
            h[c] = gated ? gate / (1 + exp(-gate)) * up : gate > 0 ? gate : 0;
        }
        for (size_t c = 0; c < D; c++) {
            double want = bias ? number_of(5, e, 0, c) : 0;
            for (size_t r = 0; r < F; r++) want += h[r] * number_of(2, e, r, c);
            if (fabs(want - (double)y[i * D + c]) > worst) worst = fabs(want - (double)y[i * D + c]);
        }
        if (!CHECK(worst < 3e-5)) printf("        off by %g\n", worst); /* |y| is up to 40 */
    }
    moe_tape_free(t);
}

static moe_desc pack_desc(int gated, int bias) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.top_k = 1;
    d.expert = gated ? MOE_EXPERT_SWIGLU : MOE_EXPERT_RELU;
    d.bias = bias ? MOE_ON : MOE_OFF;
    d.parallel.n_threads = 1;
    return d;
}

static void test_pack_layouts(void) {
    static const moe_dtype_kind types[] = {MOE_DTYPE_NONE, MOE_DTYPE_F32, MOE_DTYPE_F16, MOE_DTYPE_BF16, MOE_DTYPE_F64};
    for (int variant = 0; variant < 4; variant++) {
        int gated = variant & 1, bias = variant >> 1;
        moe_desc d = pack_desc(gated, bias);
        size_t count = 0;
        CHECK_OK(moe_experts_count(&d, &count));
        float *want = test_floats(count), *got = test_floats(count);
        pack_plain(&d, gated, bias, want);
        check_forward(&d, gated, bias, want);
        for (int i = 0; i < 5 * 2 * 3; i++) {
            moe_experts_layout l = {types[i % 5], i / 5 % 2, (moe_gate_up_kind)(i / 10)};
            foreign x;
            if (l.gate_up && !gated) continue;
            foreign_make(&x, &l, gated, bias);
            memset(got, 0, count * sizeof *got);
            for (size_t k = 0; k < 2 * (count / E); k++) got[count / E + k] = 99; /* padding is written too */
            CHECK_OK(moe_experts_pack(&d, FROM, N, &x.arrays, &l, got));
            if (!CHECK(!memcmp(got, want, count * sizeof *got)))
                printf("        gated %d bias %d type %d out_first %d gate_up %d\n", gated, bias, (int)l.dtype,
                       l.out_first, (int)l.gate_up);
            foreign_free(&x);
        }
        free(want), free(got);
    }
}

static void test_pack_arguments(void) {
    moe_desc d = pack_desc(1, 1), relu = pack_desc(0, 0);
    moe_experts_layout l = {MOE_DTYPE_F32, 1, MOE_GATE_UP_FUSED}, wrong;
    foreign x;
    size_t count = 0;
    CHECK_OK(moe_experts_count(&d, &count));
    float *params = test_floats(count);
    foreign_make(&x, &l, 1, 1);
    moe_experts_arrays both = x.arrays;
    both.wu = x.w[0];
    CHECK_OK(moe_experts_pack(&d, 0, 0, &x.arrays, &l, params));
    CHECK_STATUS(moe_experts_pack(&d, 0, N, &both, &l, params), MOE_E_GATE_UP);
    CHECK_STATUS(moe_experts_pack(&relu, 0, N, &x.arrays, &l, params), MOE_E_GATE_UP);
    wrong = l, wrong.gate_up = (moe_gate_up_kind)3;
    CHECK_STATUS(moe_experts_pack(&d, 0, N, &x.arrays, &wrong, params), MOE_E_GATE_UP);
    wrong = l, wrong.dtype = MOE_DTYPE_I8;
    CHECK_STATUS(moe_experts_pack(&d, 0, N, &x.arrays, &wrong, params), MOE_E_FILE_DTYPE);
    CHECK_STATUS(moe_experts_pack(&d, E - 1, N, &x.arrays, &l, params), MOE_E_INDEX);
    CHECK_STATUS(moe_experts_pack(&d, SIZE_MAX, N, &x.arrays, &l, params), MOE_E_INDEX);
    CHECK_STATUS(moe_experts_pack(&d, 0, N, NULL, &l, params), MOE_E_NULL_WEIGHT);
    CHECK_STATUS(moe_experts_pack(&d, 0, N, &x.arrays, &l, NULL), MOE_E_NULL_PARAMS);
    both.wu = NULL, both.bu = x.w[3];
    CHECK_STATUS(moe_experts_pack(&d, 0, N, &both, &l, params), MOE_E_GATE_UP);
    moe_desc many = d;
    many.parallel.n_threads = SIZE_MAX / 8;
    CHECK_STATUS(moe_experts_pack(&many, 0, N, &x.arrays, &l, params), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_layer_pack(NULL, 0, N, &x.arrays, &l), MOE_E_NULL_LAYER);
    moe_layer *m = NULL;
    if (CHECK_OK(moe_layer_new(&m, &d))) CHECK_STATUS(moe_layer_pack(m, 0, N, NULL, &l), MOE_E_NULL_WEIGHT);
    CHECK_OK(moe_layer_pack(m, 0, 0, &x.arrays, NULL)); /* without a layout: as this machine and header have them */
    moe_layer_free(m);
    foreign_free(&x);
    free(params);
}

/* Every worker in its turn, each with every n-th task. */
static void in_turn(void *user, size_t workers, size_t n_tasks, moe_task *task, void *arg) {
    (void)user;
    for (size_t worker = 0; worker < workers; worker++)
        for (size_t i = worker; i < n_tasks; i += workers) task(arg, i, worker);
}
/* A number that is none, in each array of each expert, in either place of a line, with one worker and with three. */
static void test_pack_nan(void) {
    static const moe_experts_layout layouts[] = {{MOE_DTYPE_F32, 0, MOE_GATE_UP_SEPARATE},
                                                 {MOE_DTYPE_F32, 1, MOE_GATE_UP_SEPARATE},
                                                 {MOE_DTYPE_F32, 1, MOE_GATE_UP_FUSED}};
    moe_desc d = pack_desc(1, 1);
    size_t count = 0;
    CHECK_OK(moe_experts_count(&d, &count));
    float *params = test_floats(count);
    d.parallel.run = in_turn;
    for (int way = 0; way < 6; way++)
        for (size_t i = 0; i < 6; i++) {
            size_t e = (size_t)way % N, size = i < 3 ? D * F : i == 5 ? D : F;
            foreign x;
            foreign_make(&x, &layouts[way / 2], 1, 1);
            d.parallel.n_threads = i % 2 ? 3 : 1;
            if (!x.w[i]) { foreign_free(&x); continue; }
            if (way / 2 == 2 && i != 2 && i != 5) size *= 2; /* what the gate gates, too */
            CHECK_OK(moe_experts_pack(&d, FROM, N, &x.arrays, &layouts[way / 2], params));
            memset(x.w[i] + 4 * (e * size + size - 1 - (size_t)way), 0xff, 4);
            if (!CHECK_STATUS(moe_experts_pack(&d, FROM, N, &x.arrays, &layouts[way / 2], params), MOE_E_NAN_WEIGHT))
                printf("        way %d, array %zu\n", way, i);
            foreign_free(&x);
        }
    free(params);
}

/* Arrays that are not given stand for zeros. */
static void test_pack_zeros(void) {
    moe_desc d = pack_desc(1, 0);
    moe_experts_arrays none;
    size_t count = 0, not_zero = 0;
    memset(&none, 0, sizeof none);
    CHECK_OK(moe_experts_count(&d, &count));
    float *params = test_floats(count);
    for (size_t i = 0; i < count; i++) params[i] = 7;
    CHECK_OK(moe_experts_pack(&d, 0, E, &none, NULL, params));
    for (size_t i = 0; i < count; i++) not_zero += params[i] < 0 || params[i] > 0;
    CHECK(not_zero == 0);
    free(params);
}

static moe_status no_file(void *user, const char *name, const void **bytes, size_t *size) {
    (void)user, (void)name, (void)bytes, (void)size;
    return MOE_E_OPEN;
}
/* Models and shards that are not there. */
static void test_nothing(void) {
    static const char *const bad[] = {"..", ".", "", "a/b", "a\\\\b", "c:d", "\\n", "\\u0000x"}; /* no file beside it */
    moe_shards none, *nowhere = NULL;
    moe_model model, *no_model = NULL;
    moe_model_source source = {no_file, NULL, NULL, NULL};
    moe_desc d;
    moe_layer *m = NULL;
    moe_file_tensor t;
    char name[64], json[200];
    size_t layer = 0;
    float x[1];
    memset(&none, 0, sizeof none), memset(&model, 0, sizeof model);
    CHECK_STATUS(moe_shards_find(nowhere, "a", name, sizeof name), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_shards_find(&none, "a", name, sizeof name), MOE_E_NULL_BYTES);
    name[0] = name[1] = 'x';
    CHECK_STATUS(moe_shards_router(nowhere, 0, &layer, name, sizeof name), MOE_E_NULL_BYTES);
    CHECK(!name[0] && name[1] == 'x');
    CHECK_STATUS(moe_shards_router(&none, 0, &layer, name, sizeof name), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_shards_router(&none, 0, NULL, name, sizeof name), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_shards_router(&none, 0, &layer, NULL, sizeof name), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_shards_router(&none, 0, &layer, name, 0), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_shards_open(NULL, "{}", 2), MOE_E_NULL_OUT);
    moe_shards_close(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int n = snprintf(json, sizeof json, "{\"weight_map\":{\"a\":\"%s\"}}", bad[i]);
        if (!CHECK(moe_shards_open(&none, json, (size_t)n) != MOE_OK)) printf("        %s\n", bad[i]);
        moe_shards_close(&none);
    }
    CHECK_OK(moe_shards_open(&none, "{\"weight_map\":{\"a\":\"...\"}}", 26));
    CHECK_STATUS(moe_shards_find(&none, NULL, name, sizeof name), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_shards_find(&none, "a", NULL, sizeof name), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_shards_find(&none, "a", name, 0), MOE_E_SMALL_MEMORY);
    moe_shards_close(&none);
    static const char accents[] = "{\"weight_map\":{\"a\":\"mod\xc3\xa8le\"}}"; /* UTF-8 */
    CHECK_OK(moe_shards_open(&none, accents, sizeof accents - 1));
    CHECK_OK(moe_shards_find(&none, "a", name, sizeof name));
    CHECK(!strcmp(name, "mod\xc3\xa8le"));
    moe_shards_close(&none);
    CHECK_STATUS(moe_model_open(NULL, &source), MOE_E_NULL_MODEL);
    CHECK_STATUS(moe_model_open(&model, NULL), MOE_E_NULL_MODEL);
    source.file = NULL;
    CHECK_STATUS(moe_model_open(&model, &source), MOE_E_NULL_MODEL);
    source.file = no_file;
    CHECK_STATUS(moe_model_open(&model, &source), MOE_E_OPEN);
    moe_model *const given[] = {no_model, &model};
    for (size_t i = 0; i < 2; i++) { /* NULL, and one whose opening failed */
        CHECK_STATUS(moe_model_desc(given[i], 0, &d), MOE_E_NULL_MODEL);
        CHECK_STATUS(moe_model_layer(given[i], 0, NULL, NULL, &m), MOE_E_NULL_MODEL);
        CHECK_STATUS(moe_model_tensor(given[i], "a", &t), MOE_E_NULL_MODEL);
        CHECK_STATUS(moe_model_read(given[i], "a", 0, 1, x), MOE_E_NULL_MODEL);
        CHECK(!moe_model_mixture(given[i], 0) && m == NULL);
        moe_model_close(given[i]);
    }
}

int main(void) {
    RUN(test_router_names);
    RUN(test_file_router);
    RUN(test_shards);
    RUN(test_shards_twice);
    RUN(test_time);
    RUN(test_router_bias);
    RUN(test_router_bias_name);
    RUN(test_pack_layouts);
    RUN(test_pack_arguments);
    RUN(test_pack_nan);
    RUN(test_pack_zeros);
    RUN(test_nothing);
    return test_end();
}
