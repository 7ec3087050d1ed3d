/* libFuzzer target: any bytes as a model's folder: a config.json, a line, then a model.safetensors.
 *
 *     clang -std=c99 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_model.c -o build/fuzz_model -lm
 *     build/fuzz_model -max_len=8192 -max_total_time=60 CORPUS_DIR
 *
 * With -DFUZZ_SEED instead of -fsanitize=fuzzer it is a program that writes a small folder of each family into the
 * folder given, to begin a corpus with. */
#define MOE_IMPLEMENTATION
#include "moe.h"

#include <stdlib.h>

enum { E = 4, D = 2, F = 2 };

#ifdef FUZZ_SEED
/* The tensors that a layer of a family asks for, one after the other, until it has them all. */
static char header[8192];
static size_t bytes_of;
static void add(const char *name, const char *type, const char *shape, size_t bytes) {
    size_t n = strlen(header);
    snprintf(header + n, sizeof header - n, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
             n > 1 ? "," : "", name, type, shape, bytes_of, bytes_of + bytes);
    bytes_of += bytes;
}
static void experts(const char *before, const char *const names[3]) {
    char name[160];
    for (int e = 0; e < E; e++)
        for (int k = 0; k < 3; k++) {
            snprintf(name, sizeof name, "%sexperts.%d.%s.weight", before, e, names[k]);
            add(name, "BF16", "2,2", D * F * 2);
        }
}
static int put(const char *folder, const char *name, const char *config) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    size_t n = strlen(header) + 1;
    if (!f) return 1;
    fprintf(f, "%s\n", config);
    for (int i = 0; i < 8; i++) fputc((int)((uint64_t)n >> 8 * i & 255), f);
    fprintf(f, "%s}", header);
    for (size_t i = 0; i < bytes_of; i++) fputc(i % 2 ? 0x3d : (int)(i * 37 & 255), f);
    strcpy(header, "{");
    bytes_of = 0;
    return fclose(f);
}
int main(int argc, char **argv) {
    static const char *const proj[3] = {"gate_proj", "up_proj", "down_proj"}, *const w[3] = {"w1", "w3", "w2"};
    const char *folder = argc > 1 ? argv[1] : ".";
    int bad = 0;
    strcpy(header, "{");
    add("model.layers.0.mlp.gate.weight", "F32", "4,2", E * D * 4);
    experts("model.layers.0.mlp.", proj);
    bad |= put(folder, "olmoe", "{\"model_type\":\"olmoe\",\"num_hidden_layers\":1,\"hidden_size\":2,"
               "\"intermediate_size\":2,\"num_experts\":4,\"num_experts_per_tok\":2,\"norm_topk_prob\":true}");
    add("model.layers.0.block_sparse_moe.gate.weight", "F16", "4,2", E * D * 2);
    experts("model.layers.0.block_sparse_moe.", w);
    bad |= put(folder, "phimoe", "{\"model_type\":\"phimoe\",\"num_hidden_layers\":1,\"hidden_size\":2,"
               "\"intermediate_size\":2,\"num_local_experts\":4,\"num_experts_per_tok\":2}");
    add("model.layers.0.mlp.gate.weight", "F32", "4,2", E * D * 4);
    add("model.layers.0.mlp.gate.e_score_correction_bias", "F32", "4", E * 4);
    experts("model.layers.0.mlp.", proj);
    add("model.layers.0.mlp.shared_experts.gate_proj.weight", "F8_E4M3", "2,2", 4);
    add("model.layers.0.mlp.shared_experts.gate_proj.weight_scale_inv", "F32", "1,1", 4);
    add("model.layers.0.mlp.shared_experts.up_proj.weight", "F8_E4M3", "2,2", 4);
    add("model.layers.0.mlp.shared_experts.up_proj.weight_scale", "F32", "2,1", 8);
    add("model.layers.0.mlp.shared_experts.down_proj.weight", "BF16", "2,2", 8);
    bad |= put(folder, "deepseek_v3", "{\"model_type\":\"deepseek_v3\",\"num_hidden_layers\":1,\"hidden_size\":2,"
               "\"moe_intermediate_size\":2,\"n_routed_experts\":4,\"num_experts_per_tok\":2,\"n_group\":2,"
               "\"topk_group\":1,\"n_shared_experts\":1,\"routed_scaling_factor\":2.5}");
    add("model.layers.0.mlp.router.weight", "F32", "4,32", E * 32 * 4);
    add("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", "4,64,1,16", E * 64 * 16);
    add("model.layers.0.mlp.experts.gate_up_proj_scales", "U8", "4,64,1", E * 64);
    add("model.layers.0.mlp.experts.down_proj", "BF16", "4,32,32", E * 32 * 32 * 2);
    bad |= put(folder, "gpt_oss", "{\"model_type\":\"gpt_oss\",\"num_hidden_layers\":1,\"hidden_size\":32,"
               "\"intermediate_size\":32,\"num_local_experts\":4,\"num_experts_per_tok\":2}");
    return bad;
}
#else
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int ok) {
    if (!ok) abort();
}
typedef struct halves { const uint8_t *config, *file; size_t config_size, file_size; } halves;
static moe_status file_of(void *user, const char *name, const void **bytes, size_t *size) {
    const halves *h = (const halves *)user;
    int config = !strcmp(name, "config.json");
    if (!config && strcmp(name, "model.safetensors")) return MOE_E_OPEN;
    *bytes = config ? h->config : h->file;
    *size = config ? h->config_size : h->file_size;
    return MOE_OK;
}
/* What opens can be asked for anything; what loads has finite numbers, and runs. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint8_t *line = size ? (const uint8_t *)memchr(data, '\n', size) : NULL;
    halves h = {data, data, size, 0};
    if (line) h.config_size = (size_t)(line - data), h.file = line + 1, h.file_size = size - h.config_size - 1;
    moe_model_source source = {file_of, &h, NULL, NULL};
    moe_model model;
    moe_status status = moe_model_open(&model, &source);
    require(memchr(model.about, 0, sizeof model.about) != NULL);
    require(status ? model.memory == NULL : model.n_layers <= size);
    for (size_t l = 0; !status && l < model.n_layers && l < 4; l++) {
        moe_layer *layer = NULL;
        float some[3];
        moe_desc desc;
        (void)moe_model_read(&model, "model.layers.0.mlp.experts.0.gate_proj.weight", l, 3, some);
        (void)moe_model_read(&model, "model.layers.0.mlp.experts.gate_up_proj", l, 3, some);
        if (moe_model_desc(&model, l, &desc) || moe_model_layer(&model, l, NULL, &layer)) continue;
        moe_part_kind part;
        const char *name;
        require(moe_layer_check(layer, 0, &part, &name) == MOE_OK);
        float *x = (float *)calloc(2 * desc.d_model, sizeof(float));
        if (x) (void)moe_forward(layer, x, 1, x + desc.d_model);
        free(x);
        moe_layer_free(layer);
    }
    moe_model_close(&model);
    return 0;
}
#endif
