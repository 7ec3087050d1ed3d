/* Routers by name, in files and in shards. */
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
    static const uint16_t data[] = {0x3f80, 0x4000, 0x4040, 0x4080, 0xbf80, 0xc000, 0, 0};
    unsigned char bytes[1024];
    moe_file f;
    moe_file_tensor t;
    size_t layer = 0;
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

int main(void) {
    RUN(test_router_names);
    RUN(test_file_router);
    RUN(test_shards);
    return test_end();
}
