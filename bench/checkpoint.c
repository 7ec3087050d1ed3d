// checkpoint.c - a checkpoint of OLMoE-1B-7B's shape with random weights, to measure how one of that size loads and
// runs.
//
//     build/bench_checkpoint --out DIR --layers 4             16 layers are the whole: 13.8 GB
//     build/llm --model DIR --ids 1,2,3 --greedy 32 --format bf16
//
// config.json and model.safetensors in bfloat16; the numbers are drawn once, a few million, and repeated.
#define MOE_IMPLEMENTATION
#include "../examples/common/args.h"
#include "../examples/common/progress.h"
#include "moe.h"

enum { DRAWN = 1 << 22, HIDDEN = 2048, INNER = 1024, EXPERTS = 64, TOP_K = 8, HEADS = 16, VOCABULARY = 50304 };

typedef struct writer {
    FILE *file;
    char *head;
    size_t used, room, at;
    uint16_t *drawn;
    progress bar;
} writer;

// A tensor (rows, cols), or with cols 0 a vector of ones; pass 0 writes its line of the header, pass 1 its numbers.
static void put(writer *w, int pass, size_t rows, size_t cols, const char *format, size_t layer, size_t expert) {
    size_t count = rows * (cols ? cols : 1), bytes = 2 * count;
    char name[128], shape[48];
    snprintf(shape, sizeof shape, cols ? "%zu,%zu" : "%zu", rows, cols);
    snprintf(name, sizeof name, format, layer, expert);
    if (pass == 0) {
        if (w->used + 400 > w->room) w->head = realloc(w->head, w->room = 2 * w->room + 65536);
        if (!w->head) die("out of memory");
        w->used += (size_t)snprintf(w->head + w->used, 400,
                                    "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                                    w->used ? "," : "{", name, shape, w->at, w->at + bytes);
        w->at += bytes;
        return;
    }
    const uint16_t one = 0x3F80;
    for (size_t i = 0; !cols && i < count; i++) fwrite(&one, 2, 1, w->file);
    for (size_t done = 0, n; cols && done < count; done += n) {
        size_t from = (w->at + done) % DRAWN;
        n = count - done < DRAWN - from ? count - done : DRAWN - from;
        fwrite(w->drawn + from, 2, n, w->file);
    }
    w->at += count + 977; // another tensor begins elsewhere
    progress_update(&w->bar, w->at, "%s", "");
}
static void all(writer *w, int pass, size_t layers) {
    static const char *const attention[] = {"q", "k", "v", "o"}, *const mlp[] = {"gate", "up", "down"};
    char name[128];
    w->at = 0;
    put(w, pass, VOCABULARY, HIDDEN, "model.embed_tokens.weight", 0, 0);
    for (size_t l = 0; l < layers; l++) {
        put(w, pass, HIDDEN, 0, "model.layers.%zu.input_layernorm.weight", l, 0);
        put(w, pass, HIDDEN, 0, "model.layers.%zu.post_attention_layernorm.weight", l, 0);
        put(w, pass, HIDDEN, 0, "model.layers.%zu.self_attn.q_norm.weight", l, 0);
        put(w, pass, HIDDEN, 0, "model.layers.%zu.self_attn.k_norm.weight", l, 0);
        put(w, pass, EXPERTS, HIDDEN, "model.layers.%zu.mlp.gate.weight", l, 0);
        for (size_t k = 0; k < 4; k++) {
            snprintf(name, sizeof name, "model.layers.%%zu.self_attn.%s_proj.weight", attention[k]);
            put(w, pass, HIDDEN, HIDDEN, name, l, 0);
        }
        for (size_t e = 0; e < EXPERTS; e++)
            for (size_t k = 0; k < 3; k++) {
                snprintf(name, sizeof name, "model.layers.%%zu.mlp.experts.%%zu.%s_proj.weight", mlp[k]);
                put(w, pass, k < 2 ? INNER : HIDDEN, k < 2 ? HIDDEN : INNER, name, l, e);
            }
    }
    put(w, pass, HIDDEN, 0, "model.norm.weight", 0, 0);
    put(w, pass, VOCABULARY, HIDDEN, "lm_head.weight", 0, 0);
}
static void write_config(const char *out, size_t layers) {
    FILE *f = open_output(out, "config.json");
    fprintf(f,
            "{\"architectures\": [\"OlmoeForCausalLM\"], \"model_type\": \"olmoe\", \"hidden_act\": \"silu\", "
            "\"hidden_size\": %d, \"intermediate_size\": %d, \"max_position_embeddings\": 4096, "
            "\"norm_topk_prob\": false, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
            "\"num_experts\": %d, \"num_experts_per_tok\": %d, \"num_hidden_layers\": %zu, \"rms_norm_eps\": 1e-05, "
            "\"rope_theta\": 10000.0, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\", "
            "\"vocab_size\": %d}\n",
            HIDDEN, INNER, HEADS, HEADS, EXPERTS, TOP_K, layers, VOCABULARY);
    close_output(f, "config.json");
}
// Normal numbers of deviation 0.02, as bfloat16, cut off.
static uint16_t *draw(void) {
    float *x = allocate(DRAWN, sizeof *x);
    uint16_t *drawn = allocate(DRAWN, sizeof *drawn);
    if (moe_rand_normal(1, 1, DRAWN, 0, 0.02f, x)) die("moe_rand_normal");
    for (size_t i = 0; i < DRAWN; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        drawn[i] = (uint16_t)(bits >> 16);
    }
    free(x);
    return drawn;
}

int main(int argc, char **argv) {
    const char *out = "out/olmoe";
    size_t layers = 4;
    int quiet = 0;
    args_option options[] = {
        {"layers", ARGS_SIZE, &layers, "N", "OLMoE has 16", 1, 64}, ARGS_OUT(&out), ARGS_QUIET(&quiet)};
    args_parse("bench_checkpoint", "Makes a checkpoint of OLMoE-1B-7B's shape with random weights.", options,
               sizeof options / sizeof *options, argc, argv);
    writer w = {.drawn = draw()};
    all(&w, 0, layers);
    w.head[w.used++] = '}';
    while (w.used % 8) w.head[w.used++] = ' ';
    write_config(out, layers);
    w.file = open_output(out, "model.safetensors");
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)w.used >> 8 * i);
    fwrite(length, 1, sizeof length, w.file);
    fwrite(w.head, 1, w.used, w.file);
    w.bar = progress_begin("writing", "numbers", w.at / 2, quiet);
    all(&w, 1, layers);
    progress_clear(&w.bar);
    close_output(w.file, "model.safetensors");
    free(w.head), free(w.drawn);
    return 0;
}
