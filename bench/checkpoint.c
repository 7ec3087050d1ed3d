// checkpoint.c - a checkpoint of OLMoE-1B-7B's shape, or another of that family's, with random weights: to measure how
// one of that size loads and runs.
//
//     build/bench_checkpoint --out DIR --layers 16            the whole: 13.8 GB in three files and their index
//     build/llm --model DIR --ids 1,2,3 --greedy 32 --format int4
//
// config.json, safetensors in bfloat16, tokenizer.json (all pairs of bytes, so that every id is a text). A weight is
// one of 65,536 normal numbers of deviation 0.02, by a hash of the seed and its place in the model: the same numbers
// for any number of threads and files. config.json comes last and goes first: a folder that has one is whole.
#define MOE_IMPLEMENTATION
#include "../examples/common/args.h"
#include "../examples/common/bpe.h"
#include "../examples/common/progress.h"
#include "../examples/common/whole.h"

enum { DRAWN = 65536, PIECE = 1 << 20, PIECES = 16 }; // numbers of a task; tasks between two writes

typedef struct tensor {
    char name[96];
    size_t rows, cols; // cols 0: a vector of ones
    size_t at, shard;  // the first number's place in the model
} tensor;
typedef struct checkpoint {
    size_t layers, hidden, inner, experts, top_k, heads, vocabulary, shards, threads;
    uint64_t seed, key;
    const char *out;
    int quiet;
    tensor *list;
    size_t n, room, numbers; // of all tensors
    uint16_t drawn[DRAWN];
    moe_parallel parallel;
    progress bar;
} checkpoint;

// ---- what it has ----

EX_PRINTF(4, 5) static void add(checkpoint *c, size_t rows, size_t cols, const char *format, ...) {
    c->list = bpe_more(c->list, &c->room, c->n + 1, sizeof *c->list);
    tensor *t = &c->list[c->n++];
    va_list args;
    va_start(args, format);
    vsnprintf(t->name, sizeof t->name, format, args);
    va_end(args);
    t->rows = rows, t->cols = cols, t->at = c->numbers, t->shard = 0;
    c->numbers += rows * (cols ? cols : 1);
}
static void add_layer(checkpoint *c, size_t l) {
    static const char *const attention[] = {"q", "k", "v", "o"}, *const mlp[] = {"gate", "up", "down"};
    size_t d = c->hidden, f = c->inner;
    add(c, d, 0, "model.layers.%zu.input_layernorm.weight", l);
    add(c, d, 0, "model.layers.%zu.post_attention_layernorm.weight", l);
    add(c, d, 0, "model.layers.%zu.self_attn.q_norm.weight", l);
    add(c, d, 0, "model.layers.%zu.self_attn.k_norm.weight", l);
    add(c, c->experts, d, "model.layers.%zu.mlp.gate.weight", l);
    for (size_t k = 0; k < 4; k++) add(c, d, d, "model.layers.%zu.self_attn.%s_proj.weight", l, attention[k]);
    for (size_t e = 0; e < c->experts; e++)
        for (size_t k = 0; k < 3; k++)
            add(c, k < 2 ? f : d, k < 2 ? d : f, "model.layers.%zu.mlp.experts.%zu.%s_proj.weight", l, e, mlp[k]);
}
static void add_all(checkpoint *c) {
    add(c, c->vocabulary, c->hidden, "model.embed_tokens.weight");
    for (size_t l = 0; l < c->layers; l++) add_layer(c, l);
    add(c, c->hidden, 0, "model.norm.weight");
    add(c, c->vocabulary, c->hidden, "lm_head.weight");
    size_t share = (c->numbers + c->shards - 1) / c->shards, last = 0;
    for (size_t i = 0; i < c->n; i++) {
        size_t shard = c->list[i].at / share;
        if (shard > last + 1) shard = last + 1; // a file that one tensor would fill, and the next
        c->list[i].shard = last = shard;
    }
    c->shards = last + 1;
}

// ---- its files ----

static void shard_name(const checkpoint *c, size_t shard, char name[64]) {
    if (c->shards == 1) strcpy(name, "model.safetensors");
    else snprintf(name, 64, "model-%05zu-of-%05zu.safetensors", shard + 1, c->shards);
}
static void write_header(const tensor *t, size_t n, whole_file *f) {
    size_t used = 0, room = 0;
    char *text = NULL, shape[48];
    for (size_t i = 0; i < n; i++) {
        size_t begin = 2 * (t[i].at - t->at), count = t[i].rows * (t[i].cols ? t[i].cols : 1);
        snprintf(shape, sizeof shape, t[i].cols ? "%zu,%zu" : "%zu", t[i].rows, t[i].cols);
        text = bpe_more(text, &room, used + 400, 1);
        used += (size_t)snprintf(text + used, 400,
                                 "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                                 i ? "," : "{\"__metadata__\":{\"format\":\"pt\"},", t[i].name, shape, begin,
                                 begin + 2 * count);
    }
    text[used++] = '}';
    while (used % 8) text[used++] = ' ';
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)used >> 8 * i);
    whole_put(f, length, sizeof length);
    whole_put(f, text, used);
    free(text);
}

// PIECE numbers from a place of the model on, four of each hash.
typedef struct piece {
    const checkpoint *c;
    size_t begin, end;
    uint16_t *to;
} piece;
static void fill(void *arg, size_t i, size_t worker) {
    const piece *p = arg;
    const uint16_t *drawn = p->c->drawn;
    size_t at = p->begin + i * PIECE, end = p->end - at < PIECE ? p->end : at + PIECE;
    uint16_t *to = p->to + i * PIECE;
    (void)worker;
    for (; at < end && at % 4; at++) *to++ = drawn[bpe_mix(p->c->key + at / 4) >> at % 4 * 16 & 0xffff];
    for (; at + 4 <= end; at += 4, to += 4) {
        uint64_t hash = bpe_mix(p->c->key + at / 4);
        for (int k = 0; k < 4; k++) to[k] = drawn[hash >> 16 * k & 0xffff];
    }
    for (; at < end; at++) *to++ = drawn[bpe_mix(p->c->key + at / 4) >> at % 4 * 16 & 0xffff];
}
static void write_tensor(checkpoint *c, const tensor *t, uint16_t *room, whole_file *f) {
    size_t count = t->rows * (t->cols ? t->cols : 1);
    for (size_t done = 0, n; done < count; done += n) {
        n = count - done < (size_t)PIECE * PIECES ? count - done : (size_t)PIECE * PIECES;
        piece p = {c, t->at + done, t->at + done + n, room};
        if (t->cols) moe_run(&c->parallel, (n + PIECE - 1) / PIECE, fill, &p);
        for (size_t i = 0; !t->cols && i < n; i++) room[i] = 0x3F80; // 1
        whole_put(f, room, 2 * n);
        progress_update(&c->bar, t->at + done + n, "%.2f GB", 2e-9 * (double)(t->at + done + n));
    }
}
static void write_shards(checkpoint *c) {
    uint16_t *room = allocate((size_t)PIECE * PIECES, sizeof *room);
    char name[64];
    for (size_t i = 0, end; i < c->n; i = end) {
        for (end = i; end < c->n && c->list[end].shard == c->list[i].shard; end++) {}
        shard_name(c, c->list[i].shard, name);
        whole_file f = whole_begin(c->out, name);
        write_header(c->list + i, end - i, &f);
        for (size_t k = i; k < end; k++) write_tensor(c, &c->list[k], room, &f);
        whole_end(&f);
    }
    free(room);
}
static void write_index(const checkpoint *c) {
    char name[64];
    whole_file f = whole_begin(c->out, "model.safetensors.index.json");
    fprintf(f.file, "{\n  \"metadata\": {\n    \"total_size\": %zu\n  },\n  \"weight_map\": {", 2 * c->numbers);
    for (size_t i = 0; i < c->n; i++) {
        shard_name(c, c->list[i].shard, name);
        fprintf(f.file, "%s\n    \"%s\": \"%s\"", i ? "," : "", c->list[i].name, name);
    }
    fprintf(f.file, "\n  }\n}\n");
    whole_end(&f);
}
static void write_tokenizer(const checkpoint *c) {
    whole_file f = whole_begin(c->out, "tokenizer.json");
    bpe b = {.n_tokens = c->vocabulary, .n_merges = c->vocabulary - 257, .n_added = 1};
    b.merge = allocate(b.n_merges, sizeof *b.merge);
    strcpy(b.added[0], "<|endoftext|>");
    for (size_t i = 0; i < b.n_merges; i++) b.merge[i][0] = (uint32_t)(i / 256), b.merge[i][1] = (uint32_t)(i % 256);
    bpe_write(f.file, &b);
    free(b.merge);
    whole_end(&f);
}
static void write_config(const checkpoint *c) {
    whole_file f = whole_begin(c->out, "config.json");
    fprintf(f.file,
            "{\n  \"architectures\": [\"OlmoeForCausalLM\"],\n  \"attention_bias\": false,\n  \"clip_qkv\": null,\n"
            "  \"eos_token_id\": %zu,\n  \"hidden_act\": \"silu\",\n  \"hidden_size\": %zu,\n"
            "  \"intermediate_size\": %zu,\n  \"max_position_embeddings\": 4096,\n  \"model_type\": \"olmoe\",\n"
            "  \"norm_topk_prob\": false,\n  \"num_attention_heads\": %zu,\n  \"num_experts\": %zu,\n"
            "  \"num_experts_per_tok\": %zu,\n  \"num_hidden_layers\": %zu,\n  \"num_key_value_heads\": %zu,\n"
            "  \"rms_norm_eps\": 1e-05,\n  \"rope_scaling\": null,\n  \"rope_theta\": 10000.0,\n"
            "  \"tie_word_embeddings\": false,\n  \"torch_dtype\": \"bfloat16\",\n  \"vocab_size\": %zu\n}\n",
            c->vocabulary - 1, c->hidden, c->inner, c->heads, c->experts, c->top_k, c->layers, c->heads,
            c->vocabulary);
    whole_end(&f);
}

// What an earlier run left: its config first.
static void remove_old(const checkpoint *c) {
    static const char *const names[] = {"config.json", "model.safetensors.index.json", "model.safetensors"};
    char path[1200];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", c->out, names[i]);
        if (remove(path) != 0 && errno != ENOENT) die("cannot remove %s: %s", path, strerror(errno));
    }
}
// Normal numbers as bfloat16, cut off.
static void draw(checkpoint *c) {
    float *x = allocate(DRAWN, sizeof *x);
    if (moe_rand_normal(c->seed, 1, DRAWN, 0, 0.02f, x)) die("moe_rand_normal");
    for (size_t i = 0; i < DRAWN; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        c->drawn[i] = (uint16_t)(bits >> 16);
    }
    free(x);
}

int main(int argc, char **argv) {
    static checkpoint c = {.layers = 4, .hidden = 2048, .inner = 1024, .experts = 64, .top_k = 8, .heads = 16,
                           .vocabulary = 50304, .shards = 3, .seed = 1, .out = "out/olmoe"};
    args_option options[] = {
        {"layers", ARGS_SIZE, &c.layers, "N", "OLMoE has 16: 13.8 GB", 1, 1024},
        {"hidden", ARGS_SIZE, &c.hidden, "N", "numbers of a token", 2, 1 << 16},
        {"inner", ARGS_SIZE, &c.inner, "N", "of an expert", 1, 1 << 16},
        {"experts", ARGS_SIZE, &c.experts, "N", "in a layer", 1, 1 << 16},
        {"top-k", ARGS_SIZE, &c.top_k, "N", "experts a token", 1, 1 << 16},
        {"heads", ARGS_SIZE, &c.heads, "N", "of the attention", 1, 1024},
        {"vocabulary", ARGS_SIZE, &c.vocabulary, "N", "tokens", 257, 1 << 20},
        {"shards", ARGS_SIZE, &c.shards, "N", "files, at most; 1: without an index", 1, 99999},
        ARGS_SEED(&c.seed),
        ARGS_THREADS(&c.threads),
        ARGS_OUT(&c.out),
        ARGS_QUIET(&c.quiet)};
    args_parse("bench_checkpoint", "Makes a checkpoint of OLMoE-1B-7B's shape with random weights.", options,
               sizeof options / sizeof *options, argc, argv);
    if (c.hidden % c.heads || c.hidden / c.heads % 2)
        args_fail("bench_checkpoint", "--heads: must divide --hidden into even parts");
    if (c.top_k > c.experts) args_fail("bench_checkpoint", "--top-k: must be at most --experts, %zu", c.experts);
    c.parallel.n_threads = c.threads;
    c.key = moe_hash(c.seed, "weights", 7);
    double begin = seconds_now();
    draw(&c);
    add_all(&c);
    remove_old(&c);
    c.bar = progress_begin("writing", "numbers", c.numbers, c.quiet);
    write_shards(&c);
    if (c.shards > 1) write_index(&c);
    write_tokenizer(&c);
    write_config(&c);
    progress_clear(&c.bar);
    if (!c.quiet)
        printf("%s: %zu tensors, %.2f GB in %zu file%s, %.1f s\n", c.out, c.n, 2e-9 * (double)c.numbers, c.shards,
               c.shards > 1 ? "s" : "", seconds_now() - begin);
    free(c.list);
    return 0;
}
