// train.c - the desktop's part of docs/embedded.md: trains a small layer, and writes it in two forms for flash:
//
//     train OUT     OUT/plan.h:    the layer's desc, for a build that has no other (level 2)
//                   OUT/weights.h: router and experts as const arrays (level 2), and tokens to try them on
//                   OUT/model.h:   the layer's safetensors file as bytes (level 3)
//
// It prints the outputs' bits, which every machine must give: flash.c and file.c print the same lines.
#include "model_of.h"

#include <stdio.h>
#include <stdlib.h>

enum { STEPS = 200, BATCH = 64 };

static void must(moe_status status) {
    if (!status) return;
    fprintf(stderr, "error: %s\n", moe_status_string(status));
    exit(1);
}
static FILE *open_out(const char *folder, const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    if (!file) perror(path), exit(1);
    return file;
}
static void close_out(FILE *file) {
    if (ferror(file) || fclose(file)) perror("error"), exit(1);
}
// Hexadecimal floats are exact.
static void write_floats(FILE *file, const char *name, size_t n, const float *values) {
    fprintf(file, "static const float %s[%zu] = {", name, n);
    for (size_t i = 0; i < n; i++) fprintf(file, "%s%af,", i % 8 ? " " : "\n    ", (double)values[i]);
    fprintf(file, "\n};\n");
}

// Copies a token whose first number is positive, and negates any other.
static void train(moe_layer *layer) {
    static float x[BATCH * D], y[BATCH * D], dy[BATCH * D];
    for (unsigned step = 0; step < STEPS; step++) {
        moe_rand_uniform(1, step, BATCH * D, -1, 1, x);
        must(moe_forward(layer, x, BATCH, y));
        for (size_t i = 0; i < BATCH * D; i++)
            dy[i] = 2 * (y[i] - (x[i / D * D] > 0 ? x[i] : -x[i])) / (float)(BATCH * D);
        must(moe_backward(layer, dy, NULL));
        must(moe_step(layer, 1e-2f));
    }
}

static void write_plan(const moe_layer *layer, const char *folder) {
    static char text[8192];
    size_t n = moe_desc_export(moe_layer_desc(layer), text, sizeof text);
    if (!n || n >= sizeof text) exit(1);
    FILE *file = open_out(folder, "plan.h");
    fputs(text, file);
    close_out(file);
}

// Level 2: the experts in the library's panels, as the firmware reads them where they lie.
static void write_weights(const moe_layer *layer, const moe_desc *desc, const char *folder) {
    size_t n_router = 0, n_experts = 0;
    must(moe_router_count(desc, &n_router));
    must(moe_experts_count(desc, &n_experts));
    float *router = calloc(n_router, sizeof *router), *experts = calloc(n_experts, sizeof *experts);
    static float w1[E][D * F], wu[E][D * F], w2[E][F * D], x[TOKENS * D];
    if (!router || !experts) exit(1);
    must(moe_layer_get(layer, MOE_PART_PARAMS, "router", router, n_router));
    must(moe_layer_get(layer, MOE_PART_PARAMS, "experts.w1", w1[0], E * D * F));
    must(moe_layer_get(layer, MOE_PART_PARAMS, "experts.wu", wu[0], E * D * F));
    must(moe_layer_get(layer, MOE_PART_PARAMS, "experts.w2", w2[0], E * F * D));
    for (size_t e = 0; e < E; e++) {
        moe_expert_weights weights = {.w1 = w1[e], .wu = wu[e], .w2 = w2[e]};
        must(moe_expert_pack(desc, e, &weights, experts));
    }
    moe_rand_uniform(7, 0, TOKENS * D, -1, 1, x);
    FILE *file = open_out(folder, "weights.h");
    write_floats(file, "router", n_router, router);
    write_floats(file, "experts", n_experts, experts);
    write_floats(file, "tokens", TOKENS * D, x);
    close_out(file);
    free(router);
    free(experts);
}

// Level 3: the file that moe_layer_save writes, aligned so that its floats can be read where they lie.
static void write_model(const moe_layer *layer, const char *folder) {
    size_t n = 0;
    must(moe_layer_save_size(layer, 0, &n));
    unsigned char *bytes = malloc(n);
    if (!bytes) exit(1);
    must(moe_layer_save_memory(layer, 0, bytes, n));
    FILE *file = open_out(folder, "model.h");
    fprintf(file, "static const unsigned char model[%zu] __attribute__((aligned(8))) = {", n);
    for (size_t i = 0; i < n; i++) fprintf(file, "%s%d,", i % 24 ? "" : "\n    ", bytes[i]);
    fprintf(file, "\n};\n");
    close_out(file);
    free(bytes);
}

int main(int argc, char **argv) {
    moe_layer *layer = NULL;
    moe_desc desc = model_desc();
    static float x[TOKENS * D], y[TOKENS * D];
    desc.training = MOE_ON;
    if (argc != 2) return fprintf(stderr, "usage: train OUT\n"), 2;
    must(moe_layer_new(&layer, &desc));
    train(layer);
    desc.training = MOE_OFF;
    write_plan(layer, argv[1]);
    write_weights(layer, &desc, argv[1]);
    write_model(layer, argv[1]);
    moe_rand_uniform(7, 0, TOKENS * D, -1, 1, x);
    must(moe_forward(layer, x, TOKENS, y));
    print_outputs(y);
    moe_layer_free(layer);
    return 0;
}
