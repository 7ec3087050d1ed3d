/* Any bytes as a model's folder: a config.json, a line's end, then a model.safetensors. */
#include "fuzz.h"

typedef struct fuzz_halves { const uint8_t *config, *file; size_t config_size, file_size; } fuzz_halves;
static moe_status fuzz_file_of(void *user, const char *name, const void **bytes, size_t *size) {
    const fuzz_halves *h = (const fuzz_halves *)user;
    int config = !strcmp(name, "config.json");
    if (!config && strcmp(name, "model.safetensors")) return MOE_E_OPEN;
    *bytes = config ? h->config : h->file;
    *size = config ? h->config_size : h->file_size;
    return MOE_OK;
}
/* What opens can be asked for anything; what loads has finite numbers, and runs. */
static int fuzz_model(const uint8_t *data, size_t size) {
    const uint8_t *line = size ? (const uint8_t *)memchr(data, '\n', size) : NULL;
    fuzz_halves h = {data, data, size, 0};
    if (line) h.config_size = (size_t)(line - data), h.file = line + 1, h.file_size = size - h.config_size - 1;
    moe_model_source source = {fuzz_file_of, &h, NULL, NULL};
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
        if (moe_model_desc(&model, l, &desc) || moe_model_layer(&model, l, NULL, NULL, &layer)) continue;
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
FUZZ_TARGET(fuzz_model)
