/* The families of checkpoints: each row loaded from a small checkpoint that is made here, in its names and layout, and
 * held to a double-precision mixture of its formulas; and, with MOE_MODELS=DIR, real layouts with the outputs that the
 * original code gave (DIR/olmoe/f32/config.json, model.safetensors, expected/...). */
#include "test.h"
#include <time.h>

/* ---- a folder, in memory or on disk ---- */
enum { MOST_FILES = 8 };
typedef struct folder {
    const char *path; /* on disk; NULL: the files below are all */
    struct { char name[64]; unsigned char *bytes; size_t size; } file[MOST_FILES];
    size_t n;
} folder;

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    rewind(f);
    unsigned char *bytes = (unsigned char *)malloc(*size + 1);
    if (fread(bytes, 1, *size, f) != *size) *size = 0;
    fclose(f);
    return bytes;
}
static moe_status folder_file(void *user, const char *name, const void **bytes, size_t *size) {
    folder *from = (folder *)user;
    char path[512];
    for (size_t i = 0; i < from->n; i++)
        if (!strcmp(from->file[i].name, name)) {
            *bytes = from->file[i].bytes;
            *size = from->file[i].size;
            return *bytes ? MOE_OK : MOE_E_READ;
        }
    if (!from->path || !CHECK(from->n < MOST_FILES)) return MOE_E_OPEN;
    snprintf(path, sizeof path, "%s/%s", from->path, name);
    from->file[from->n].bytes = read_file(path, size);
    if (!from->file[from->n].bytes) return MOE_E_OPEN;
    snprintf(from->file[from->n].name, sizeof from->file[0].name, "%s", name);
    from->file[from->n].size = *size;
    *bytes = from->file[from->n++].bytes;
    return MOE_OK;
}
static void folder_free(folder *from) {
    for (size_t i = 0; i < from->n; i++) free(from->file[i].bytes);
    from->n = 0;
}
static moe_model_source folder_source(folder *from) {
    moe_model_source source;
    memset(&source, 0, sizeof source);
    source.file = folder_file;
    source.user = from;
    return source;
}

/* ---- real layouts, with what the original code gave ---- */
static const char *models_folder;

static float *npy(const char *folder_path, const char *name, moe_npy *array) {
    char path[512];
    size_t size = 0;
    snprintf(path, sizeof path, "%s/%s", folder_path, name);
    unsigned char *bytes = read_file(path, &size);
    if (!CHECK(bytes != NULL)) { printf("        %s\n", path); return NULL; }
    CHECK_OK(moe_npy_open(array, bytes, size));
    float *out = test_floats(array->count);
    if (array->dtype == MOE_DTYPE_F32) CHECK_OK(moe_to_float(array->dtype, array->count, array->elements, out));
    else CHECK_OK(moe_to_index(array->dtype, array->count, array->elements, (int32_t *)(void *)out, NULL));
    free(bytes);
    return out;
}
static double config_number(const moe_model *model, const char *key, double otherwise) {
    moe_json value;
    double number = otherwise;
    if (!moe_json_find(&model->config, key, &value)) (void)moe_json_number(&value, &number);
    return number;
}
static double furthest(size_t n, const float *a, const float *b) {
    double most = 0;
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs((double)a[i] - (double)b[i]));
    return most;
}

/* The mixtures of a model with float32 weights: their inputs follow from what was recorded around them. */
static void check_recorded(const char *name, const char *expected) {
    char path[400], results[400];
    folder from;
    moe_model model;
    moe_npy shape, other;
    memset(&from, 0, sizeof from);
    snprintf(path, sizeof path, "%s/%s", models_folder, name);
    snprintf(results, sizeof results, "%s/%s/expected", models_folder, expected);
    from.path = path;
    moe_model_source source = folder_source(&from);
    if (!CHECK_OK(moe_model_open(&model, &source))) { printf("        %s: %s\n", name, model.about); return; }
    float *hidden = npy(results, "a.hidden.npy", &shape), *attention = npy(results, "a.attn_out.npy", &other);
    float *mlp = npy(results, "a.mlp_out.npy", &other), *logits = npy(results, "a.router_logits.npy", &other);
    float *index = npy(results, "a.experts.npy", &other), *weight = npy(results, "a.expert_weights.npy", &other);
    size_t T = shape.dim[1], D = shape.dim[2], k = other.dim[2], mixtures = 0;
    double residual = config_number(&model, "residual_multiplier", 1), eps = config_number(&model, "rms_norm_eps", 0);
    double off[3] = {0, 0, 0};
    CHECK(model.n_layers == shape.dim[0] - 1);
    float *x = test_floats(T * D), *y = test_floats(T * D), *norm = test_floats(D);
    for (size_t l = 0; l < model.n_layers; l++) {
        moe_layer *layer = NULL;
        char tensor[80];
        if (!moe_model_mixture(&model, l)) continue;
        if (!CHECK_OK(moe_model_layer(&model, l, NULL, NULL, &layer))) { printf("        %s\n", model.about); break; }
        const moe_desc *d = moe_layer_desc(layer);
        CHECK(d->top_k == k && d->d_model == D);
        snprintf(tensor, sizeof tensor, "model.layers.%zu.post_attention_layernorm.weight", l);
        CHECK_OK(moe_model_read(&model, tensor, 0, D, norm));
        for (size_t t = 0; t < T; t++) {
            double sum = 0;
            for (size_t i = 0; i < D; i++) {
                size_t at = (l * T + t) * D + i;
                double value = (double)hidden[at] + residual * (double)attention[at];
                x[t * D + i] = (float)value;
                sum += value * value;
            }
            double scale = 1 / sqrt(sum / (double)D + eps);
            for (size_t i = 0; i < D; i++) x[t * D + i] = (float)((double)x[t * D + i] * scale * (double)norm[i]);
        }
        CHECK_OK(moe_forward(layer, x, T, y));
        const moe_tape *tape = moe_layer_tape(layer);
        size_t m = mixtures++;
        off[0] = fmax(off[0], furthest(T * d->n_experts, tape->logits, logits + m * T * d->n_experts));
        off[1] = fmax(off[1], furthest(T * k, tape->weight, weight + m * T * k));
        off[2] = fmax(off[2], furthest(T * D, y, mlp + l * T * D));
        CHECK(!memcmp(tape->index, index + m * T * k, T * k * sizeof(int32_t)));
        moe_layer_free(layer);
    }
    CHECK(mixtures == other.dim[0]);
    if (!CHECK(off[0] < 5e-5 && off[1] < 1e-5 && off[2] < 3e-4) || getenv("TEST_VERBOSE"))
        printf("        %-24s %zu mixtures: router logits off by %.1e, weights %.1e, outputs %.1e\n", name, mixtures,
               off[0], off[1], off[2]);
    free(hidden), free(attention), free(mlp), free(logits), free(index), free(weight), free(x), free(y), free(norm);
    moe_model_close(&model);
    folder_free(&from);
}
static void test_recorded(void) {
    static const char *const names[][2] = {
        {"olmoe/f32", "olmoe/f32"}, {"olmoe_clip/f32", "olmoe_clip/f32"}, {"mixtral/f32", "mixtral/f32"},
        {"mixtral/f32_sharded", "mixtral/f32"}, {"qwen2_moe/f32", "qwen2_moe/f32"}, {"qwen3_moe/f32", "qwen3_moe/f32"},
        {"deepseek_v2_lite/f32", "deepseek_v2_lite/f32"}, {"deepseek_v3/f32", "deepseek_v3/f32"},
        {"deepseek_v3_yarn/f32", "deepseek_v3_yarn/f32"}, {"gpt_oss/f32", "gpt_oss/f32"},
        {"granitemoe/f32", "granitemoe/f32"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) check_recorded(names[i][0], names[i][1]);
}

/* ---- checkpoints made here ---- */
enum { E = 12, D = 64, F = 32, W = 50, T = 24, MOST_K = 3 }; /* ten and more experts; shared ones that do not divide */
enum { NN, IN, HALVES, IN_HALVES, IN_TURNS, ROWS }; /* how the experts' tensors lie: below, in make_experts */
enum { SOFTMAX, SELECTED, SIGMOID, MIXER };
enum { SWIGLU, CLAMPED };

typedef struct family_row {
    const char *type, *config;           /* @E and so on stand for the sizes */
    const char *layer, *router, *names[3]; /* gate, up, down; * an expert's number */
    int layout, gate, normalize, k;
    double scale;
    int groups, kept, best;              /* of groups: 0 = none */
    const char *shared[3], *shared_gate, *choice;
    int act, input, router_bias;
    const char *own; /* a family's text, given */
} family_row;

/* One layer's numbers, row-major as torch's nn.Linear keeps them: (out, in). */
typedef struct mixture {
    size_t width;
    float router[E * D], bias[E], choice[E], gate[E * F * D], up[E * F * D], down[E * D * F];
    float b_gate[E * F], b_up[E * F], b_down[E * D], s_gate[W * D], s_up[W * D], s_down[D * W], s_weight[D];
} mixture;

#define LLAMA "gate_proj.weight"
#define QWEN {"experts.*.gate_proj.weight", "experts.*.up_proj.weight", "experts.*.down_proj.weight"}
#define SHARED(name) {name ".gate_proj.weight", name ".up_proj.weight", name ".down_proj.weight"}
#define BASE "'num_hidden_layers':2,'hidden_size':@D,'num_experts_per_tok':@K,'hidden_act':'silu',"
#define V3 BASE "'n_routed_experts':@E,'moe_intermediate_size':@F,'n_shared_experts':1,'n_group':4,'topk_group':2," \
    "'norm_topk_prob':true,'routed_scaling_factor':2.5,'first_k_dense_replace':1,'scoring_func':'sigmoid'"
#define V2 BASE "'n_routed_experts':@E,'moe_intermediate_size':@F,'n_shared_experts':1,'routed_scaling_factor':1.5e+00,"
#define MIXTRAL_NAMES {"experts.*.w1.weight", "experts.*.w3.weight", "experts.*.w2.weight"}
#define MIXTRAL_CONFIG BASE "'num_local_experts':@E,'intermediate_size':@F"
#define SPARSE "model.layers.#.block_sparse_moe."
#define MLP "model.layers.#.mlp."
#define GRANITE_NAMES {"block_sparse_moe.input_linear.weight", NULL, "block_sparse_moe.output_linear.weight"}
#define GRANITE_SHARED {"shared_mlp.input_linear.weight", NULL, "shared_mlp.output_linear.weight"}
#define OSS_NAMES {"experts.gate_up_proj", NULL, "experts.down_proj"}
#define LLAMA4 BASE "'num_local_experts':@E,'intermediate_size':@F,'intermediate_size_mlp':99"
#define NONE {NULL, NULL, NULL}
static const family_row rows[] = {
    {"olmoe", BASE "'num_experts':@E,'intermediate_size':@F,'norm_topk_prob':false,'clip_qkv':null", MLP, "gate.weight",
     QWEN, NN, SOFTMAX, 0, 3, 1, 0, 0, 0, NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"olmoe", BASE "'num_experts':@E,'intermediate_size':@F,'norm_topk_prob':true", MLP, "gate.weight",
     QWEN, NN, SOFTMAX, 1, 3, 1, 0, 0, 0, NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"mixtral", MIXTRAL_CONFIG, SPARSE, "gate.weight", MIXTRAL_NAMES, NN, SOFTMAX, 1, 2, 1, 0, 0, 0, NONE, NULL, NULL,
     SWIGLU, 0, 0, NULL},
    {"phimoe", MIXTRAL_CONFIG ",'router_jitter_noise':0.3", SPARSE, "gate.weight", MIXTRAL_NAMES, NN, MIXER, 0, 2, 1,
     0, 0, 0, NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"qwen2_moe", BASE "'num_experts':@E,'moe_intermediate_size':@F,'shared_expert_intermediate_size':@W,"
     "'intermediate_size':77", MLP, "gate.weight", QWEN, NN, SOFTMAX, 0, 3, 1, 0, 0, 0, SHARED("shared_expert"),
     "shared_expert_gate.weight", NULL, SWIGLU, 0, 0, NULL},
    {"qwen3_next", BASE "'num_experts':@E,'moe_intermediate_size':@F,'shared_expert_intermediate_size':@W", MLP,
     "gate.weight", QWEN, NN, SOFTMAX, 1, 3, 1, 0, 0, 0, SHARED("shared_expert"), "shared_expert_gate.weight", NULL,
     SWIGLU, 0, 0, NULL},
    {"qwen3_moe", BASE "'num_experts':@E,'moe_intermediate_size':@F,'norm_topk_prob':true,'mlp_only_layers':[0]", MLP,
     "gate.weight", QWEN, NN, SOFTMAX, 1, 3, 1, 0, 0, 0, NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"deepseek_v2", V2 "'topk_method':'greedy','n_group':4,'topk_group':1", MLP, "gate.weight", QWEN, NN, SOFTMAX, 0, 3,
     1.5, 0, 0, 0, SHARED("shared_experts"), NULL, NULL, SWIGLU, 0, 0, NULL},
    {"deepseek_v2", V2 "'topk_method':'group_limited_greedy','n_group':4,'topk_group':2", MLP, "gate.weight", QWEN, NN,
     SOFTMAX, 0, 3, 1.5, 4, 2, 1, SHARED("shared_experts"), NULL, NULL, SWIGLU, 0, 0, NULL},
    {"deepseek_v3", V3, MLP, "gate.weight", QWEN, NN, SIGMOID, 1, 3, 2.5, 4, 2, 2, SHARED("shared_experts"), NULL,
     "gate.e_score_correction_bias", SWIGLU, 0, 0, NULL},
    {"kimi_k2", V3, MLP, "gate.weight", QWEN, NN, SIGMOID, 1, 3, 2.5, 4, 2, 2, SHARED("shared_experts"), NULL,
     "gate.e_score_correction_bias", SWIGLU, 0, 0, NULL},
    {"glm4_moe", V3, MLP, "gate.weight", QWEN, NN, SIGMOID, 1, 3, 2.5, 4, 2, 2, SHARED("shared_experts"), NULL,
     "gate.e_score_correction_bias", SWIGLU, 0, 0, NULL},
    {"gpt_oss", BASE "'num_local_experts':@E,'intermediate_size':@F,'swiglu_limit':7.0", MLP, "router.weight",
     OSS_NAMES, IN_TURNS, SELECTED, 1, 3, 1, 0, 0, 0, NONE, NULL, NULL, CLAMPED, 0, 1, NULL},
    {"granitemoe", MIXTRAL_CONFIG, "model.layers.#.", "block_sparse_moe.router.layer.weight", GRANITE_NAMES, HALVES,
     SELECTED, 1, 3, 1, 0, 0, 0, NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"granitemoeshared", MIXTRAL_CONFIG ",'shared_intermediate_size':@W", "model.layers.#.",
     "block_sparse_moe.router.layer.weight", GRANITE_NAMES, HALVES, SELECTED, 1, 3, 1, 0, 0, 0, GRANITE_SHARED, NULL,
     NULL, SWIGLU, 0, 0, NULL},
    {"granitemoehybrid", MIXTRAL_CONFIG ",'shared_intermediate_size':@W", "model.layers.#.",
     "block_sparse_moe.router.layer.weight", GRANITE_NAMES, HALVES, SELECTED, 1, 3, 1, 0, 0, 0, GRANITE_SHARED, NULL,
     NULL, SWIGLU, 0, 0, NULL},
    {"dbrx", "'n_layers':2,'d_model':@D,'ffn_config':{'ffn_hidden_size':@F,'moe_num_experts':@E,'moe_top_k':@K}",
     "transformer.blocks.#.ffn.", "router.layer.weight", {"experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"}, ROWS,
     SOFTMAX, 1, 3, 1, 0, 0, 0, NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"dbrx", "'n_layers':2,'d_model':@D,'ffn_config':{'ffn_hidden_size':@F,'moe_num_experts':@E,'moe_top_k':@K,"
     "'moe_normalize_expert_weights':null,'ffn_act_fn':{'name':'silu'}}", "transformer.blocks.#.ffn.",
     "router.layer.weight", {"experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"}, ROWS, SOFTMAX, 0, 3, 1, 0, 0, 0,
     NONE, NULL, NULL, SWIGLU, 0, 0, NULL},
    {"jamba", BASE "'num_experts':@E,'intermediate_size':@F,'expert_layer_period':2,'expert_layer_offset':1",
     "model.layers.#.feed_forward.", "router.weight", QWEN, NN, SOFTMAX, 0, 2, 1, 0, 0, 0, NONE, NULL, NULL, SWIGLU, 0,
     0, NULL},
    {"llama4_text", LLAMA4, "model.layers.#.feed_forward.", "router.weight", OSS_NAMES, IN_HALVES, SIGMOID, 0, 1, 1, 0,
     0, 0, SHARED("shared_expert"), NULL, NULL, SWIGLU, 1, 0, NULL},
    {"llama4", "'hidden_size':5,'num_local_experts':@E,'text_config':{'model_type':'llama4_text'," BASE
     "'intermediate_size':@F,'intermediate_size_mlp':99}", /* a key of the text's first, then one of the whole */
     "language_model.model.layers.#.feed_forward.", "router.weight", OSS_NAMES, IN_HALVES, SIGMOID, 0, 3, 1, 0, 0, 0,
     SHARED("shared_expert"), NULL, NULL, SWIGLU, 1, 0, NULL},
    {"mine", "'depth':2,'sizes':[@D,@F,@E]", "net.#/", "choose", {"a[*]", "b[*]", "c[*]"}, IN, SOFTMAX, 0, 3, 1, 0, 0,
     0, {"s.a", "s.b", "s.c"}, NULL, NULL, SWIGLU, 0, 0,
     "n_layers=@depth d_model=@sizes.0 d_ff=@sizes.1 n_experts=@sizes.2 top_k=3 gate=softmax normalize=false "
     "shared_width=50 layer=other.#.|net.#/ router=choose experts.w1=a[*]:in experts.wu=b[*]:in experts.w2=c[*]:in "
     "shared.w1=s.a shared.wu=s.b shared.w2=s.c"}};

/* -- writing -- */
typedef struct writer { char *header; unsigned char *data; size_t h, n; int first; } writer;
static void write_begin(writer *w) {
    w->header = (char *)test_memory(1 << 20, 1);
    w->data = (unsigned char *)test_memory(1 << 22, 1);
    w->h = 1, w->n = 0, w->first = 1;
    w->header[0] = '{';
}
static void write_raw(writer *w, const char *name, const char *type, size_t n_dims, const size_t *dim,
                      const void *bytes, size_t n) {
    w->h += (size_t)sprintf(w->header + w->h, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", w->first ? "" : ",", name,
                            type);
    for (size_t i = 0; i < n_dims; i++) w->h += (size_t)sprintf(w->header + w->h, "%s%zu", i ? "," : "", dim[i]);
    w->h += (size_t)sprintf(w->header + w->h, "],\"data_offsets\":[%zu,%zu]}", w->n, w->n + n);
    memcpy(w->data + w->n, bytes, n);
    w->n += n, w->first = 0;
}
static void write_end(writer *w, folder *to, const char *name) {
    size_t size = 8 + w->h + 1 + w->n;
    unsigned char *bytes = (unsigned char *)malloc(size);
    w->header[w->h++] = '}';
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)w->h >> 8 * i);
    memcpy(bytes + 8, w->header, w->h);
    memcpy(bytes + 8 + w->h, w->data, w->n);
    strcpy(to->file[to->n].name, name);
    to->file[to->n].bytes = bytes, to->file[to->n++].size = size;
    free(w->header), free(w->data);
}
static void write_text(folder *to, const char *name, const char *text) {
    strcpy(to->file[to->n].name, name);
    to->file[to->n].size = strlen(text);
    to->file[to->n].bytes = (unsigned char *)malloc(strlen(text) + 1);
    memcpy(to->file[to->n++].bytes, text, strlen(text));
}
/* Numbers as two or four bytes each; they are multiples of 1/64 that every type holds. */
static void write_numbers(writer *w, moe_dtype_kind dtype, const char *name, size_t n_dims, const size_t *dim,
                          const float *values) {
    size_t n = 1, size = moe_dtype_size(dtype);
    for (size_t i = 0; i < n_dims; i++) n *= dim[i];
    unsigned char *bytes = (unsigned char *)test_memory(n, size);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = test_bits(values[i]), half = bits >> 16;
        if (dtype == MOE_DTYPE_F16 && (bits & 0x7fffffff))
            half = bits >> 31 << 15 | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023);
        if (size == 4) memcpy(bytes + 4 * i, &bits, 4), test_little_endian(bytes + 4 * i, 1, 4);
        else bytes[2 * i] = (unsigned char)half, bytes[2 * i + 1] = (unsigned char)(half >> 8);
    }
    write_raw(w, name, moe_dtype_name(dtype), n_dims, dim, bytes, n * size);
    free(bytes);
}

static const char *tensor_name(const family_row *row, const char *name, size_t layer, size_t e) {
    static char out[160];
    char *p = out;
    for (int part = 0; part < 2; part++)
        for (const char *c = part ? name : row->layer; *c; c++)
            if (*c == '#') p += sprintf(p, "%zu", layer);
            else if (*c == '*') p += sprintf(p, "%zu", e);
            else *p++ = *c;
    *p = 0;
    return out;
}
/* Either matrix (out, in) turned into (in, out). */
static float *turned(const float *m, size_t outs, size_t ins) {
    float *to = test_floats(outs * ins);
    for (size_t o = 0; o < outs; o++)
        for (size_t i = 0; i < ins; i++) to[i * outs + o] = m[o * ins + i];
    return to;
}
/* Gate and up (F, n) of one expert -> rows of both: one after the other, or in turns. */
static float *both(const float *gate, const float *up, size_t f, size_t n, int turns) {
    float *to = test_floats(2 * f * n);
    for (size_t o = 0; o < f; o++) {
        memcpy(to + (turns ? 2 * o : o) * n, gate + o * n, n * sizeof *to);
        memcpy(to + (turns ? 2 * o + 1 : f + o) * n, up + o * n, n * sizeof *to);
    }
    return to;
}

static void make_experts(writer *w, moe_dtype_kind dtype, const family_row *row, const mixture *m, size_t layer) {
    const float *const from[] = {m->gate, m->up, m->down};
    size_t all[3] = {E, 2 * F, D};
    if (row->layout == NN || row->layout == IN)
        for (size_t k = 0; k < 3; k++)
            for (size_t i = 0; i < E; i++) { /* one a tensor, not in order */
                size_t e = (i * 5 + 3) % E, dim[2] = {k < 2 ? F : D, k < 2 ? D : F};
                const float *one = from[k] + e * D * F;
                float *other = turned(one, dim[0], dim[1]);
                size_t back[2] = {dim[1], dim[0]};
                write_numbers(w, dtype, tensor_name(row, row->names[k], layer, e), 2, row->layout == IN ? back : dim,
                              row->layout == IN ? other : one);
                free(other);
            }
    else if (row->layout == ROWS) /* (E F, D) three times */
        for (size_t k = 0; k < 3; k++) {
            size_t dim[2] = {E * F, D};
            float *to = test_floats(E * F * D);
            memcpy(to, from[k], E * F * D * sizeof *to);
            for (size_t e = 0; k == 2 && e < E; e++) {
                float *one = turned(m->down + e * D * F, D, F);
                memcpy(to + e * D * F, one, D * F * sizeof *to);
                free(one);
            }
            write_numbers(w, dtype, tensor_name(row, row->names[k], layer, 0), 2, dim, to);
            free(to);
        }
    else { /* gate and up in one tensor (E, 2F, D) or (E, D, 2F), down (E, D, F) or (E, F, D) */
        int in = row->layout != HALVES, turns = row->layout == IN_TURNS;
        float *first = test_floats(E * 2 * F * D), *second = test_floats(E * D * F);
        size_t down[3] = {E, D, F};
        if (in) all[1] = D, all[2] = 2 * F, down[1] = F, down[2] = D;
        for (size_t e = 0; e < E; e++) {
            float *pair = both(m->gate + e * F * D, m->up + e * F * D, F, D, turns), *t = turned(pair, 2 * F, D);
            float *back = turned(m->down + e * D * F, D, F);
            memcpy(first + e * 2 * F * D, in ? t : pair, 2 * F * D * sizeof *first);
            memcpy(second + e * D * F, in ? back : m->down + e * D * F, D * F * sizeof *second);
            free(pair), free(t), free(back);
        }
        write_numbers(w, dtype, tensor_name(row, row->names[0], layer, 0), 3, all, first);
        write_numbers(w, dtype, tensor_name(row, row->names[2], layer, 0), 3, down, second);
        free(first), free(second);
    }
}
static void make_rest(writer *w, moe_dtype_kind dtype, const family_row *row, const mixture *m, size_t layer) {
    size_t router[2] = {E, D}, one[2] = {1, D}, wide[2] = {m->width, D}, tall[2] = {D, m->width}, e[2] = {E, 2 * F};
    write_numbers(w, dtype, tensor_name(row, row->router, layer, 0), 2, router, m->router);
    if (row->choice) write_numbers(w, MOE_DTYPE_F32, tensor_name(row, row->choice, layer, 0), 1, e, m->choice);
    if (row->shared_gate) write_numbers(w, dtype, tensor_name(row, row->shared_gate, layer, 0), 2, one, m->s_weight);
    if (row->shared[0] && !row->shared[1]) {
        float *pair = both(m->s_gate, m->s_up, m->width, D, 0);
        wide[0] *= 2;
        write_numbers(w, dtype, tensor_name(row, row->shared[0], layer, 0), 2, wide, pair);
        free(pair);
    } else if (row->shared[0]) {
        write_numbers(w, dtype, tensor_name(row, row->shared[0], layer, 0), 2, wide, m->s_gate);
        write_numbers(w, dtype, tensor_name(row, row->shared[1], layer, 0), 2, wide, m->s_up);
    }
    if (row->shared[0]) write_numbers(w, dtype, tensor_name(row, row->shared[2], layer, 0), 2, tall, m->s_down);
    if (!row->router_bias) return;
    float *pairs = test_floats(E * 2 * F);
    for (size_t i = 0; i < E; i++) {
        float *pair = both(m->b_gate + i * F, m->b_up + i * F, F, 1, 1);
        memcpy(pairs + i * 2 * F, pair, 2 * F * sizeof *pair);
        free(pair);
    }
    size_t out[2] = {E, D};
    write_numbers(w, dtype, tensor_name(row, "router.bias", layer, 0), 1, e, m->bias);
    write_numbers(w, dtype, tensor_name(row, "experts.gate_up_proj_bias", layer, 0), 2, e, pairs);
    write_numbers(w, dtype, tensor_name(row, "experts.down_proj_bias", layer, 0), 2, out, m->b_down);
    free(pairs);
}
static void make_config(const family_row *row, folder *to) {
    char text[1024];
    size_t n = (size_t)sprintf(text, "{\"model_type\": \"%s\",", row->type);
    for (const char *c = row->config; *c; c++) {
        static const char letters[] = "EDFWK";
        size_t sizes[5] = {E, D, F, W, (size_t)row->k};
        if (*c != '@') text[n++] = *c == '\'' ? '"' : *c;
        else n += (size_t)sprintf(text + n, "%zu", sizes[strchr(letters, *++c) - letters]);
    }
    strcpy(text + n, "}\n");
    write_text(to, "config.json", text);
}
static void fill(float *to, size_t n, int most) {
    for (size_t i = 0; i < n; i++) to[i] = (float)((int)test_below((size_t)(2 * most + 1)) - most) / 64.0f;
}
static void mixture_random(mixture *m, const family_row *row) {
    struct { float *at; size_t n; int most; } all[] = {
        {m->router, E * D, 24}, {m->bias, E, 40}, {m->choice, E, 20}, {m->gate, E * F * D, 16}, {m->up, E * F * D, 16},
        {m->down, E * D * F, 16}, {m->b_gate, E * F, 30}, {m->b_up, E * F, 30}, {m->b_down, E * D, 30},
        {m->s_gate, W * D, 16}, {m->s_up, W * D, 16}, {m->s_down, D * W, 16}, {m->s_weight, D, 30}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) fill(all[i].at, all[i].n, all[i].most);
    m->width = row->shared_gate || !row->shared[1] || row->own ? W : F;
}
/* Layer 1 is a mixture, layer 0 has other tensors; in two shards, of which the second has the experts. */
static void checkpoint(const family_row *row, const mixture *m, moe_dtype_kind dtype, int sharded, folder *to) {
    writer w;
    float norm[D];
    size_t dim = D;
    uint64_t odd = 7;
    memset(to, 0, sizeof *to);
    make_config(row, to);
    write_begin(&w);
    fill(norm, D, 64);
    write_raw(&w, "strange", "F4_NEW", 0, NULL, &odd, 3); /* of a type that is not known: skipped */
    write_numbers(&w, dtype, "model.layers.0.mlp.gate_proj.weight", 1, &dim, norm);
    make_rest(&w, dtype, row, m, 1);
    char *index = (char *)test_memory(1 << 16, 1), *p = index + sprintf(index, "{\"weight_map\":{");
    for (int part = 0; part < 2; part++) {
        char name[40];
        sprintf(name, sharded ? "model-%05d-of-00002.safetensors" : "model.safetensors", part + 1);
        if (part) make_experts(&w, dtype, row, m, 1);
        if (!sharded && !part) continue;
        moe_file file;
        moe_file_tensor tensor;
        write_end(&w, to, name);
        CHECK_OK(moe_file_open(&file, to->file[to->n - 1].bytes, to->file[to->n - 1].size));
        for (size_t i = 0; i < file.n_tensors; i++) {
            (void)moe_file_tensor_at(&file, i, &tensor);
            p += sprintf(p, "%s\"%.*s\":\"%s\"", p[-1] == '{' ? "" : ",", (int)tensor.name_length, tensor.name, name);
        }
        moe_file_close(&file);
        if (!part) write_begin(&w);
    }
    strcpy(p, "}}");
    if (sharded) write_text(to, "model.safetensors.index.json", index);
    free(index);
}

/* -- the oracle -- */
static double silu(double x) { return x / (1 + exp(-x)); }
static double dot(const float *m, const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)m[i] * x[i];
    return sum;
}
static void network(const family_row *row, const float *gate, const float *up, const float *down, const float *b_gate,
                    const float *b_up, const float *b_down, size_t f, const double *x, double weight, double *y) {
    double h[W > F ? W : F];
    for (size_t i = 0; i < f; i++) {
        double g = dot(gate + i * D, x, D), u = dot(up + i * D, x, D);
        h[i] = silu(g) * u;
        if (row->act != CLAMPED) continue;
        g = fmin(g + (double)b_gate[i], 7), u = fmax(-7, fmin(7, u + (double)b_up[i]));
        h[i] = (u + 1) * g / (1 + exp(-1.702 * g));
    }
    for (size_t i = 0; i < D; i++)
        y[i] += weight * (dot(down + i * f, h, f) + (row->act == CLAMPED ? (double)b_down[i] : 0));
}
static size_t best_of(const double *score, size_t n) { /* -1e300: taken */
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (score[i] > score[best]) best = i;
    return best;
}
/* The chosen experts and their weights, best first. */
static void choose(const family_row *row, const mixture *m, const double *x, size_t *index, double *weight) {
    double z[E], p[E], score[E], group[E], sum = 0;
    size_t per = row->groups ? E / (size_t)row->groups : E;
    for (size_t e = 0; e < E; e++) {
        z[e] = dot(m->router + e * D, x, D) + (row->router_bias ? (double)m->bias[e] : 0);
        p[e] = row->gate == SIGMOID ? 1 / (1 + exp(-z[e])) : exp(z[e]);
        sum += row->gate == SOFTMAX ? p[e] : 0;
    }
    for (size_t e = 0; e < E; e++) {
        if (row->gate == SOFTMAX) p[e] /= sum;
        score[e] = row->gate == MIXER || row->gate == SELECTED ? z[e] : p[e];
        if (row->choice) score[e] += (double)m->choice[e];
    }
    for (size_t g = 0; row->groups && g < E / per; g++) {
        double copy[E];
        memcpy(copy, score + g * per, per * sizeof *copy);
        group[g] = 0;
        for (int b = 0; b < row->best; b++) {
            size_t best = best_of(copy, per);
            group[g] += copy[best], copy[best] = -1e300;
        }
    }
    for (int drop = row->groups - row->kept; drop > 0; drop--) { /* the worst group, again and again */
        size_t worst = 0;
        for (size_t g = 1; g < (size_t)row->groups; g++)
            if (group[g] < group[worst]) worst = g;
        group[worst] = 1e300;
        for (size_t e = worst * per; e < (worst + 1) * per; e++) score[e] = -1e300;
    }
    sum = 0;
    for (int k = 0; k < row->k; k++) {
        index[k] = best_of(score, E);
        double highest = score[index[k]], mass = 0;
        for (size_t e = 0; row->gate == MIXER && e < E; e++) /* Phi-3.5-MoE: masked if too far below the highest */
            if (score[e] > -1e299 && (highest - z[e]) / fmax(fabs(z[e]), highest) <= 2 * 0.3) mass += exp(z[e]);
        weight[k] = row->gate == MIXER ? exp(highest) / mass : p[index[k]];
        score[index[k]] = -1e300;
        sum += weight[k];
    }
    for (int k = 0; k < row->k; k++) weight[k] *= (row->normalize ? 1 / sum : 1) * row->scale;
}
static void oracle(const family_row *row, const mixture *m, const float *token, size_t *index, double *y) {
    double x[D], in[D], weight[MOST_K], shared = 0;
    for (size_t i = 0; i < D; i++) x[i] = (double)token[i], y[i] = 0;
    choose(row, m, x, index, weight);
    for (int k = 0; k < row->k; k++) {
        size_t e = index[k];
        for (size_t i = 0; i < D; i++) in[i] = row->input ? weight[k] * x[i] : x[i];
        network(row, m->gate + e * F * D, m->up + e * F * D, m->down + e * D * F, m->b_gate + e * F, m->b_up + e * F,
                m->b_down + e * D, F, in, row->input ? 1 : weight[k], y);
    }
    if (row->shared_gate) shared = 1 / (1 + exp(-dot(m->s_weight, x, D)));
    else if (row->shared[0]) shared = 1;
    if (shared > 0) network(row, m->s_gate, m->s_up, m->s_down, NULL, NULL, NULL, m->width, x, shared, y);
}

/* Layer 1 of a checkpoint against the oracle: choices equal, outputs near. */
static void check_family(const family_row *row, const mixture *m, folder *from, const char *what) {
    moe_model model;
    moe_layer *layer = NULL;
    moe_model_source source = folder_source(from);
    float x[T * D], y[T * D];
    double want[D], off = 0, size = 0;
    size_t index[MOST_K], wrong = 0;
    source.family = row->own;
    if (!CHECK_OK(moe_model_open(&model, &source)) || !CHECK_OK(moe_model_layer(&model, 1, NULL, NULL, &layer))) {
        printf("        %s, %s: %s\n", row->type, what, model.about);
        moe_model_close(&model);
        return;
    }
    CHECK(model.n_layers == 2 && !moe_model_mixture(&model, 0) && moe_model_mixture(&model, 1));
    CHECK(!strcmp(model.family, row->own ? "" : row->type));
    moe_model_close(&model); /* the layer stays */
    test_fill(x, T * D, -1, 1);
    CHECK_OK(moe_forward(layer, x, T, y));
    const moe_tape *tape = moe_layer_tape(layer);
    CHECK(tape->n_slots == (size_t)row->k);
    for (size_t t = 0; t < T; t++) {
        oracle(row, m, x + t * D, index, want);
        for (int k = 0; k < row->k; k++) wrong += tape->index[t * (size_t)row->k + (size_t)k] != (int32_t)index[k];
        for (size_t i = 0; i < D; i++) {
            size = fmax(size, fabs(want[i]));
            off = fmax(off, fabs(want[i] - (double)y[t * D + i]));
        }
    }
    if (!CHECK(!wrong && off < 2e-6 * size + 1e-6 && size > 0.05))
        printf("        %s, %s: %zu choices differ, outputs off by %.2g of %.2g\n", row->type, what, wrong, off, size);
    moe_layer_free(layer);
}
static void test_families(void) {
    static const moe_dtype_kind types[] = {MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16};
    mixture *m = (mixture *)test_memory(1, sizeof *m);
    size_t seen = 0;
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (int variant = TEST_SANITIZED ? 2 : 0; variant < 3; variant++) {
            folder from;
            mixture_random(m, &rows[r]);
            checkpoint(&rows[r], m, types[variant], variant == 2, &from);
            check_family(&rows[r], m, &from, moe_dtype_name(types[variant]));
            folder_free(&from);
        }
    for (size_t i = 0; moe_model_family(i); i++) { /* every row of the library's table was among them */
        size_t r = 0;
        while (r < sizeof rows / sizeof *rows && strcmp(rows[r].type, moe_model_family(i)->name)) r++;
        if (!CHECK(r < sizeof rows / sizeof *rows)) printf("        %s\n", moe_model_family(i)->name);
        seen++;
    }
    CHECK(seen > 15 && moe_model_family(seen) == NULL);
    free(m);
}

/* ---- numbers of one byte and of half of one ---- */
/* One sign, four bits of exponent, three of fraction, the bias 7; by the definition. */
static double f8_value(unsigned byte) {
    int exponent = (int)(byte >> 3 & 15);
    double size = exponent ? ldexp(1 + (byte & 7) / 8.0, exponent - 7) : ldexp((byte & 7) / 8.0, -6);
    return byte & 128 ? -size : size;
}
/* A matrix (rows, columns) as F8 with a scale for each block; what it stands for is left in it. */
static void write_f8(writer *w, const char *name, size_t outs, size_t columns, const size_t block[2], const char *end,
                     float *values) {
    size_t dim[2] = {outs, columns};
    size_t scales[2] = {(outs + block[0] - 1) / block[0], (columns + block[1] - 1) / block[1]};
    unsigned char *bytes = (unsigned char *)test_memory(outs * columns, 1);
    float *scale = test_floats(scales[0] * scales[1]);
    char other[160];
    for (size_t i = 0; i < scales[0] * scales[1]; i++) scale[i] = ldexpf(1 + (float)test_below(8) / 8, -4);
    for (size_t i = 0; i < outs * columns; i++) {
        float by = scale[i / columns / block[0] * scales[1] + i % columns / block[1]];
        bytes[i] = (unsigned char)((test_u32() & 0x80) | (0x30 + test_below(8))); /* 0.5 to 0.9375 */
        if (!(i % 7)) bytes[i] &= 0x87;                                         /* and some below the normal ones */
        values[i] = (float)f8_value(bytes[i]) * by;
    }
    write_raw(w, name, "F8_E4M3", 2, dim, bytes, outs * columns);
    sprintf(other, "%s%s", name, end);
    if (scales[0] * scales[1] == 1) write_numbers(w, MOE_DTYPE_F32, other, 0, scales, scale);
    else write_numbers(w, MOE_DTYPE_F32, other, 2, scales, scale);
    free(bytes), free(scale);
}
static void test_f8(void) {
    static const struct { size_t block[2]; const char *end, *config; } ways[] = {
        {{20, 24}, "_scale_inv", ",'quantization_config':{'quant_method':'fp8','weight_block_size':[20,24]}"},
        {{128, 128}, "_scale_inv", ""},     /* one block of the default size */
        {{1, 1000}, "_scale", ""},          /* one a row */
        {{1000, 1000}, "_scale", ""}};      /* one */
    mixture *m = (mixture *)test_memory(1, sizeof *m);
    for (size_t i = 0; i < 4; i++) {
        family_row row = rows[9]; /* deepseek_v3 */
        char config[600];
        folder from;
        writer w;
        snprintf(config, sizeof config, "%s%s", row.config, ways[i].config);
        row.config = config;
        memset(&from, 0, sizeof from);
        mixture_random(m, &row);
        make_config(&row, &from);
        write_begin(&w);
        for (size_t e = 0; e < E; e++) {
            write_f8(&w, tensor_name(&row, row.names[0], 1, e), F, D, ways[i].block, ways[i].end, m->gate + e * F * D);
            write_f8(&w, tensor_name(&row, row.names[1], 1, e), F, D, ways[i].block, ways[i].end, m->up + e * F * D);
            write_f8(&w, tensor_name(&row, row.names[2], 1, e), D, F, ways[i].block, ways[i].end, m->down + e * D * F);
        }
        make_rest(&w, MOE_DTYPE_BF16, &row, m, 1);
        write_end(&w, &from, "model.safetensors");
        check_family(&row, m, &from, ways[i].end);
        moe_model model; /* and by moe_model_read, from the middle on */
        moe_model_source source = folder_source(&from);
        float some[50];
        CHECK_OK(moe_model_open(&model, &source));
        CHECK_OK(moe_model_read(&model, tensor_name(&row, row.names[1], 1, 11), 777, 50, some));
        CHECK_SAME(some, m->up + 11 * F * D + 777, 50);
        moe_model_close(&model);
        folder_free(&from);
    }
    free(m);
}

/* GPT-OSS as it is published: blocks of 32 of four bits, low half first, each with a power of two. */
static void write_mxfp4(writer *w, const char *name, size_t outs, size_t ins, float *values) {
    static const float numbers[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    size_t n = E * outs * ins, blocks[4] = {E, outs, ins / 32, 16}, powers[3] = {E, outs, ins / 32};
    unsigned char *bytes = (unsigned char *)test_memory(n / 2, 1), *power = (unsigned char *)test_memory(n / 32, 1);
    char full[160];
    for (size_t i = 0; i < n / 32; i++) power[i] = (unsigned char)(127 - 6 + test_below(4));
    for (size_t i = 0; i < n; i++) {
        unsigned half = test_u32() & 15;
        bytes[i / 2] = (unsigned char)(bytes[i / 2] | half << (i % 2 ? 4 : 0));
        values[i] = ldexpf(half & 8 ? -numbers[half & 7] : numbers[half & 7], power[i / 32] - 127);
    }
    sprintf(full, "%s_blocks", name);
    write_raw(w, full, "U8", 4, blocks, bytes, n / 2);
    sprintf(full, "%s_scales", name);
    write_raw(w, full, "U8", 3, powers, power, n / 32);
    free(bytes), free(power);
}
static const family_row *row_of(const char *type) {
    size_t r = 0;
    while (strcmp(rows[r].type, type)) r++;
    return &rows[r];
}
static void test_mxfp4(void) {
    const family_row *row = row_of("gpt_oss");
    mixture *m = (mixture *)test_memory(1, sizeof *m);
    float *pairs = test_floats(E * 2 * F * D), some[40];
    folder from;
    writer w;
    memset(&from, 0, sizeof from);
    mixture_random(m, row);
    make_config(row, &from);
    write_begin(&w);
    write_mxfp4(&w, tensor_name(row, row->names[0], 1, 0), 2 * F, D, pairs);
    write_mxfp4(&w, tensor_name(row, row->names[2], 1, 0), D, F, m->down);
    for (size_t e = 0; e < E; e++)
        for (size_t i = 0; i < F; i++) { /* gate and up in turns */
            memcpy(m->gate + (e * F + i) * D, pairs + (e * 2 * F + 2 * i) * D, D * sizeof *pairs);
            memcpy(m->up + (e * F + i) * D, pairs + (e * 2 * F + 2 * i + 1) * D, D * sizeof *pairs);
        }
    make_rest(&w, MOE_DTYPE_BF16, row, m, 1);
    write_end(&w, &from, "model.safetensors");
    check_family(row, m, &from, "MXFP4");
    moe_model model;
    moe_file_tensor tensor;
    moe_model_source source = folder_source(&from);
    CHECK_OK(moe_model_open(&model, &source));
    CHECK_OK(moe_model_tensor(&model, tensor_name(row, row->names[2], 1, 0), &tensor));
    CHECK(!strcmp(tensor.dtype, "MXFP4") && tensor.n_dims == 3 && tensor.dim[0] == E && tensor.dim[2] == F);
    CHECK_OK(moe_model_read(&model, tensor_name(row, row->names[2], 1, 0), 1001, 40, some));
    CHECK_SAME(some, m->down + 1001, 40);
    moe_model_close(&model);
    folder_free(&from);
    free(m), free(pairs);
}

/* ---- what is wrong is said, and where ---- */
#define LONG "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"
/* A checkpoint of a family, with a word of its config put in place of another: opened, described, loaded. */
static void refused(const char *type, const char *word, const char *other, moe_status want, const char *about) {
    const family_row *row = row_of(type);
    mixture *m = (mixture *)test_memory(1, sizeof *m);
    folder from;
    moe_model model;
    moe_layer *layer = NULL;
    mixture_random(m, row);
    checkpoint(row, m, MOE_DTYPE_BF16, 0, &from);
    char *text = (char *)test_memory(4096, 1), *at;
    memcpy(text, from.file[0].bytes, from.file[0].size);
    at = strstr(text, word);
    if (CHECK(at != NULL)) {
        size_t keep = strlen(at + strlen(word)) + 1;
        memmove(at + strlen(other), at + strlen(word), keep);
        memcpy(at, other, strlen(other));
    }
    free(from.file[0].bytes);
    from.file[0].size = strlen(text);
    from.file[0].bytes = (unsigned char *)text;
    moe_model_source source = folder_source(&from);
    long before = test_live_blocks;
    moe_status status = moe_model_open(&model, &source);
    if (!status) status = moe_model_layer(&model, 1, NULL, NULL, &layer);
    if (!CHECK_STATUS(status, want) || !CHECK(!strcmp(model.about, about)))
        printf("        %s, %s -> %s: about \"%s\"\n", type, word, other, model.about);
    CHECK(layer == NULL || !status);
    moe_layer_free(layer);
    moe_model_close(&model);
    CHECK(test_live_blocks == before);
    folder_free(&from);
    free(m);
}
static void test_config_faults(void) {
    refused("olmoe", "\"hidden_act\":\"silu\",", "", MOE_OK, ""); /* it has a default */
    refused("olmoe", "{\"model_type\"", "{\"model_typo\"", MOE_E_CONFIG_KEY, "config.json: model_type");
    refused("olmoe", "\"olmoe\"", "\"gpt2\"", MOE_E_MODEL_FAMILY, "model_type: gpt2");
    refused("olmoe", "\"olmoe\"", "7", MOE_E_CONFIG_VALUE, "config.json: model_type");
    refused("olmoe", "\"olmoe\"", "\"" LONG "\"", MOE_E_CONFIG_VALUE, "config.json: model_type");
    refused("olmoe", "\"olmoe\",", "\"olmoe\"", MOE_E_JSON, "config.json");
    refused("olmoe", "\"hidden_size\":64", "\"hidden\":64", MOE_E_CONFIG_KEY, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":null", MOE_E_CONFIG_KEY, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":\"64x\"", MOE_E_CONFIG_VALUE, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":64.5", MOE_E_CONFIG_VALUE, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":[64]", MOE_E_CONFIG_VALUE, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":-64", MOE_E_CONFIG_VALUE, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":0", MOE_E_CONFIG_VALUE, "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":99999999999999999999999", MOE_E_CONFIG_VALUE,
            "config.json: hidden_size");
    refused("olmoe", "\"hidden_size\":64", "\"hidden_size\":65", MOE_E_MODEL_SHAPE,
            "model.safetensors: model.layers.1.mlp.gate.weight");
    refused("olmoe", "\"num_experts\":12", "\"num_experts\":13", MOE_E_MODEL_SHAPE,
            "model.safetensors: model.layers.1.mlp.gate.weight");
    refused("olmoe", "\"num_experts\":12", "\"num_experts\":10000000", MOE_E_N_EXPERTS, "config.json: num_experts");
    refused("olmoe", "_tok\":3", "_tok\":13", MOE_E_TOP_K, "config.json: num_experts_per_tok");
    refused("olmoe", "\"silu\"", "\"relu\"", MOE_E_CONFIG_VALUE, "config.json: hidden_act");
    refused("olmoe", "\"silu\"", "\"mish\"", MOE_E_CONFIG_VALUE, "config.json: hidden_act");
    refused("olmoe", "\"norm_topk_prob\":false", "\"norm_topk_prob\":2", MOE_E_CONFIG_VALUE,
            "config.json: norm_topk_prob");
    refused("olmoe", "_layers\":2", "_layers\":2000000000", MOE_E_CONFIG_VALUE,
            "config.json: more layers than tensors");
    refused("olmoe", "_layers\":2", "_layers\":1", MOE_E_MODEL_TENSOR,
            "model.safetensors: model.layers.0.mlp.gate.weight");
    refused("phimoe", "_tok\":2", "_tok\":3", MOE_E_CONFIG_REQUIRE, "config.json: num_experts_per_tok");
    refused("gpt_oss", ":7.0", ":8", MOE_E_CONFIG_REQUIRE, "config.json: swiglu_limit");
    refused("deepseek_v3", "\"n_group\":4", "\"n_group\":5", MOE_E_GROUPS, "config.json: n_group");
    refused("deepseek_v3", "\"topk_group\":2", "\"topk_group\":5", MOE_E_TOP_GROUPS, "config.json: topk_group");
    refused("deepseek_v3", "_factor\":2.5", "_factor\":1e999", MOE_E_CONFIG_VALUE,
            "config.json: routed_scaling_factor");
    refused("deepseek_v3", "_factor\":2.5", "_factor\":0.0", MOE_E_CONFIG_VALUE, "config.json: routed_scaling_factor");
    refused("deepseek_v3", "_factor\":2.5", "_factor\":-2", MOE_E_WEIGHT_SCALE, "config.json: routed_scaling_factor");
    refused("deepseek_v3", "_experts\":1,", "_experts\":3,", MOE_E_MODEL_SHAPE,
            "model.safetensors: model.layers.1.mlp.shared_experts.gate_proj.weight");
    refused("deepseek_v2", "\"greedy\"", "\"random\"", MOE_E_CONFIG_VALUE, "config.json: topk_method");
    refused("qwen2_moe", ":50", ":49", MOE_E_MODEL_SHAPE,
            "model.safetensors: model.layers.1.mlp.shared_expert.gate_proj.weight");
    refused("dbrx", "\"moe_top_k\"", "\"moe_top\"", MOE_E_CONFIG_KEY, "config.json: ffn_config.moe_top_k");
}

/* A tensor of a DeepSeek-V3 layer changed as `what` says: dropped, of another shape or type, NaN. */
static void broken(const char *name, const char *what, moe_status want, const char *about) {
    const family_row *row = row_of("deepseek_v3");
    mixture *m = (mixture *)test_memory(1, sizeof *m);
    folder whole, from;
    moe_model model;
    moe_layer *layer = NULL;
    moe_file file;
    moe_file_tensor tensor;
    writer w;
    mixture_random(m, row);
    checkpoint(row, m, MOE_DTYPE_F32, 0, &whole);
    memset(&from, 0, sizeof from);
    make_config(row, &from);
    write_begin(&w);
    CHECK_OK(moe_file_open(&file, whole.file[1].bytes, whole.file[1].size));
    for (size_t i = 0; i < file.n_tensors; i++) {
        char now[160];
        (void)moe_file_tensor_at(&file, i, &tensor);
        snprintf(now, sizeof now, "%.*s", (int)tensor.name_length, tensor.name);
        unsigned char *bytes = (unsigned char *)test_memory(tensor.bytes, 1);
        memcpy(bytes, tensor.data, tensor.bytes);
        if (strstr(now, name)) {
            if (!strcmp(what, "missing")) tensor.n_dims = 99;
            if (!strcmp(what, "turned")) { size_t a = tensor.dim[0]; tensor.dim[0] = tensor.dim[1], tensor.dim[1] = a; }
            if (!strcmp(what, "flat")) tensor.dim[0] *= tensor.dim[1], tensor.n_dims = 1;
            if (!strcmp(what, "type")) strcpy(tensor.dtype, "I32");
            if (!strcmp(what, "halves")) strcpy(tensor.dtype, "F16"), tensor.dim[0] *= 2;
            if (!strcmp(what, "new")) strcpy(tensor.dtype, "F6_NEW");
            if (!strcmp(what, "f8")) strcpy(tensor.dtype, "F8_E4M3"), tensor.dim[0] *= 4;
            if (!strcmp(what, "nan")) memcpy(bytes + tensor.bytes - 4, "\0\0\xc0\x7f", 4);
            if (!strcmp(what, "infinite")) memcpy(bytes, "\0\0\x80\xff", 4);
        }
        if (tensor.n_dims != 99) write_raw(&w, now, tensor.dtype, tensor.n_dims, tensor.dim, bytes, tensor.bytes);
        free(bytes);
    }
    moe_file_close(&file);
    write_end(&w, &from, "model.safetensors");
    moe_model_source source = folder_source(&from);
    long before = test_live_blocks;
    moe_status status = moe_model_open(&model, &source);
    if (!status) status = moe_model_layer(&model, 1, NULL, NULL, &layer);
    if (!CHECK_STATUS(status, want) || !CHECK(!strcmp(model.about, about)))
        printf("        %s %s: about \"%s\"\n", name, what, model.about);
    CHECK(layer == NULL);
    moe_model_close(&model);
    CHECK(test_live_blocks == before);
    folder_free(&whole), folder_free(&from);
    free(m);
}
static void test_tensor_faults(void) {
#define IN_FILE "model.safetensors: model.layers.1.mlp."
    static const struct { const char *name, *about; } of[] = {
        {"gate.weight", IN_FILE "gate.weight"}, {"experts.11.gate_proj", IN_FILE "experts.11.gate_proj.weight"},
        {"experts.7.up_proj", IN_FILE "experts.7.up_proj.weight"},
        {"experts.0.down_proj", IN_FILE "experts.0.down_proj.weight"},
        {"shared_experts.up_proj", IN_FILE "shared_experts.up_proj.weight"}};
    static const struct { const char *what; moe_status status; } ways[] = {
        {"missing", MOE_E_MODEL_TENSOR}, {"turned", MOE_E_MODEL_SHAPE}, {"flat", MOE_E_MODEL_SHAPE},
        {"type", MOE_E_MODEL_DTYPE}, {"new", MOE_E_MODEL_DTYPE}, {"f8", MOE_E_MODEL_DTYPE}, {"nan", MOE_E_MODEL_NAN},
        {"infinite", MOE_E_MODEL_NAN}};
    for (size_t i = 0; i < sizeof of / sizeof *of; i++)
        for (size_t k = 0; k < sizeof ways / sizeof *ways; k++)
            broken(of[i].name, ways[k].what, ways[k].status, of[i].about);
    broken("e_score", "missing", MOE_E_MODEL_TENSOR, IN_FILE "gate.e_score_correction_bias");
    broken("e_score", "halves", MOE_E_MODEL_SHAPE, IN_FILE "gate.e_score_correction_bias");
    broken("e_score", "nan", MOE_E_MODEL_NAN, IN_FILE "gate.e_score_correction_bias");
    broken("e_score", "type", MOE_E_MODEL_DTYPE, IN_FILE "gate.e_score_correction_bias");
}

/* A folder's files missing or cut, texts of families that are none, arguments, no memory. */
static void test_other_faults(void) {
    static const struct { const char *text; moe_status status; const char *about; } texts[] = {
        {"n_layers", MOE_E_MODEL_FAMILY, "model_type: n_layers"}, {"a=b =c", MOE_E_MODEL_TEXT, "family"},
        {"n_layers=2", MOE_E_MODEL_TEXT, "family: layer"}, {"layer=x.#.", MOE_E_MODEL_TEXT, "family: n_layers"},
        {"layer=x.#. n_layers=many", MOE_E_MODEL_TEXT, "family: n_layers"},
        {"layer=x.#. n_layers=2", MOE_E_MODEL_TEXT, "family: router"},
        {"layer=x.#. n_layers=2 router=r", MOE_E_MODEL_TENSOR, "model.safetensors: x.0.r"},
        {"layer=model.layers.#.mlp. n_layers=2 router=gate.weight", MOE_E_D_MODEL, "family: d_model"},
        {"layer=model.layers.#.mlp. n_layers=2 router=gate.weight d_model=64 n_experts=12 colour=red", MOE_E_MODEL_TEXT,
         "family: colour"},
        {"layer=model.layers.#.mlp. n_layers=2 router=gate.weight d_model=64 n_experts=12", MOE_E_MODEL_TEXT,
         "family: experts.w1"}};
    const family_row *row = row_of("olmoe");
    mixture *m = (mixture *)test_memory(1, sizeof *m);
    folder from, less;
    moe_model model;
    moe_desc desc;
    moe_layer *layer = NULL;
    float number;
    mixture_random(m, row);
    checkpoint(row, m, MOE_DTYPE_F32, 0, &from);
    moe_model_source source = folder_source(&from);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        source.family = texts[i].text;
        moe_status status = moe_model_open(&model, &source);
        if (!status) status = moe_model_layer(&model, 1, NULL, NULL, &layer);
        if (!CHECK_STATUS(status, texts[i].status) || !CHECK(!strcmp(model.about, texts[i].about)))
            printf("        %s: about \"%s\"\n", texts[i].text, model.about);
        moe_model_close(&model);
    }
    source.family = NULL;
    CHECK_STATUS(moe_model_open(NULL, &source), MOE_E_NULL_MODEL);
    CHECK_STATUS(moe_model_open(&model, NULL), MOE_E_NULL_MODEL);
    memset(&model, 0, sizeof model);
    for (int closed = 0; closed < 2; closed++) {
        moe_model *none = closed ? &model : NULL;
        CHECK_STATUS(moe_model_read(none, "strange", 0, 1, &number), MOE_E_NULL_MODEL);
        CHECK_STATUS(moe_model_layer(none, 1, NULL, NULL, &layer), MOE_E_NULL_MODEL);
        CHECK_STATUS(moe_model_desc(none, 1, &desc), MOE_E_NULL_MODEL);
    }
    CHECK_OK(moe_model_open(&model, &source));
    CHECK_STATUS(moe_model_layer(&model, 0, NULL, NULL, &layer), MOE_E_MODEL_LAYER);
    CHECK(!strcmp(model.about, "layer 0"));
    CHECK_STATUS(moe_model_layer(&model, 2, NULL, NULL, &layer), MOE_E_MODEL_LAYER);
    CHECK_STATUS(moe_model_layer(&model, 1, NULL, NULL, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_model_desc(&model, 1, NULL), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_model_desc(&model, 0, &desc), MOE_E_MODEL_LAYER);
    CHECK_OK(moe_model_desc(&model, 1, &desc));
    CHECK(desc.n_experts == E && desc.d_ff == F && desc.training == MOE_OFF);
    CHECK_STATUS(moe_model_read(&model, "model.layers.1.mlp.gate.weight", E * D, 1, &number), MOE_E_MODEL_RANGE);
    CHECK_OK(moe_model_read(&model, "model.layers.1.mlp.gate.weight", E * D - 1, 1, &number));
    CHECK(number == m->router[E * D - 1]);
    CHECK_STATUS(moe_model_read(&model, "strange", 0, 1, &number), MOE_E_MODEL_DTYPE);
    CHECK_STATUS(moe_model_read(&model, "lm_head.weight", 0, 1, &number), MOE_E_MODEL_TENSOR);
    CHECK(!strcmp(model.about, "model.safetensors: lm_head.weight"));
    moe_desc train;
    memset(&train, 0, sizeof train);
    train.training = MOE_ON;
    test_pattern = 0xaa;
    CHECK_OK(moe_model_layer(&model, 1, &train, NULL, &layer));
    test_pattern = -1;
    CHECK(moe_layer_desc(layer)->training == MOE_ON);
    for (size_t i = 0, wrong = 0; i < moe_layer_tensors(layer); i++) { /* no steps yet, whatever stood in its memory */
        moe_tensor tensor;
        CHECK_OK(moe_layer_tensor(layer, i, &tensor));
        float *moment = test_floats(tensor.count);
        CHECK_OK(moe_layer_get(layer, MOE_PART_MOMENT1, tensor.name, moment, tensor.count));
        for (size_t k = 0; k < tensor.count; k++) wrong += moment[k] != 0.0f;
        free(moment);
        CHECK(!wrong);
    }
    moe_layer_free(layer);
    layer = NULL;
    moe_model_close(&model);
    for (size_t file = 0; file < 2; file++) { /* each missing, and cut short */
        for (int cut = 0; cut < 2; cut++) {
            memset(&less, 0, sizeof less);
            for (size_t i = 0; i < 2; i++)
                if (i != file || cut) less.file[less.n++] = from.file[i];
            if (cut) less.file[file].size -= 3;
            source = folder_source(&less);
            moe_status want = file ? MOE_E_FILE_SHORT : MOE_E_JSON;
            CHECK_STATUS(moe_model_open(&model, &source), cut ? want : MOE_E_OPEN);
            CHECK(!strncmp(model.about, from.file[file].name, strlen(from.file[file].name)));
            CHECK(model.memory == NULL);
        }
    }
    source = folder_source(&from);
    long before = test_live_blocks;
    for (long fail = 0;; fail++) { /* the n-th allocation fails, for every n */
        test_fail_at = fail;
        moe_status status = moe_model_open(&model, &source);
        if (!status) status = moe_model_layer(&model, 1, NULL, NULL, &layer);
        test_fail_at = -1;
        moe_model_close(&model);
        if (!status) break;
        CHECK_STATUS(status, MOE_E_NO_MEMORY);
        CHECK(test_live_blocks == before && layer == NULL);
    }
    moe_layer_free(layer);
    folder_free(&from);
    free(m);
}

/* ---- small checkpoints of a family of one's own ---- */
#define LONGER LONG LONG LONG /* 234 letters */
static const char own_config[] = "{\"five\":5,\"six\":6,\"eight\":8,\"list\":[1],\"object\":{},\"word\":\"abc\","
                                 "\"long\":\"" LONG "\",\"text_config\":7}";
static const char own_text[] = "n_layers=1 d_model=4 d_ff=6 n_experts=2 top_k=1 gate=softmax expert=swiglu layer=x. "
                               "router=r experts.w1=g* experts.wu=u* experts.w2=d*";
static const char own_tensors[] = "x.r:F32:2,4 x.g0:F32:6,4 x.g1:F32:6,4 x.u0:F32:6,4 x.u1:F32:6,4 x.d0:F32:4,6 "
                                  "x.d1:F32:4,6";

/* A text with its first `word` replaced; a word that is not there is a fault of the test. */
static void replaced(const char *text, const char *word, const char *other, char *to, size_t room) {
    const char *at = strstr(text, word);
    if (!CHECK(at != NULL)) { printf("        no \"%s\"\n", word); at = text; }
    CHECK((size_t)snprintf(to, room, "%.*s%s%s", (int)(at - text), text, other, at + strlen(word)) < room);
}
/* Tensors "name:type:dims", @ for a number that is too large, into a file; the floats are 1, 2, 3 ... of 64, the bytes
 * 0, 1, 2 ... */
static void write_tensors(const char *tensors, folder *to, const char *file) {
    writer w;
    write_begin(&w);
    while (*tensors) {
        char name[300], type[16], dims[64];
        size_t dim[8], n_dims = 0, n = 1;
        int length = 0;
        dims[0] = 0;
        if (!CHECK(sscanf(tensors, " %299[^:]:%15[^:]:%63[0-9,@]%n", name, type, dims, &length) == 3 ||
                   sscanf(tensors, " %299[^:]:%15[^:]:%n", name, type, &length) == 2)) break;
        for (char *d = strtok(dims, ","); d; d = strtok(NULL, ",")) {
            dim[n_dims] = *d == '@' ? SIZE_MAX / 16 : (size_t)strtoul(d, NULL, 10);
            n *= dim[n_dims++];
        }
        float *values = test_floats(n);
        unsigned char *bytes = (unsigned char *)test_memory(n, 1);
        for (size_t i = 0; i < n; i++) values[i] = (float)(i + 1) / 64, bytes[i] = (unsigned char)i;
        if (!strcmp(type, "F32")) write_numbers(&w, MOE_DTYPE_F32, name, n_dims, dim, values);
        else if (!strcmp(type, "I32")) write_raw(&w, name, type, n_dims, dim, values, 4 * n);
        else write_raw(&w, name, type, n_dims, dim, bytes, n);
        free(values), free(bytes);
        tensors += length + (tensors[length] == ' ');
    }
    write_end(&w, to, file);
}

/* The family's text and its tensors, each with a word replaced. */
static void test_own_families(void) {
#define TEXT(word, other) word, other, "", ""
#define AS(word, other) TEXT(word, other), MOE_OK, ""
#define SHARED_TEXT "shared.w1=s shared.wu=t shared.w2=v"
    static const struct {
        const char *word, *other, *tensor, *instead;
        moe_status status;
        const char *about;
    } ways[] = {
        {AS("", "")}, {AS(" d_ff", "   d_ff")}, {AS("w2=d*", "w2=d*  ")}, {AS("d_model=4", "d_model=@|=4")},
        {AS("d_model=4", "d_model=@none||=4")}, {AS("top_k=1", "top_k=1 bias=true router_bias=true")},
        {AS("top_k=1", "top_k=1 require.none=1")}, {AS("top_k=1", "top_k=1 require.five=5.0")},
        {AS("top_k=1", "top_k=1 require.word=abc")}, {AS("top_k=1", "top_k=1 shared_width=0")},
        {TEXT("top_k=1", "top_k="), MOE_E_MODEL_TEXT, "family"},
        {TEXT("n_layers=1", "n_layers=1x"), MOE_E_MODEL_TEXT, "family: n_layers"},
        {TEXT("n_layers=1", "n_layers=@word"), MOE_E_CONFIG_VALUE, "config.json: word"},
        {TEXT("n_layers=1", "n_layers=@none"), MOE_E_CONFIG_KEY, "config.json: none"},
        {TEXT("d_model=4", "d_model=@object"), MOE_E_CONFIG_VALUE, "config.json: object"},
        {TEXT("d_model=4", "d_model=@list"), MOE_E_CONFIG_VALUE, "config.json: list"},
        {TEXT("d_model=4", "d_model=@long"), MOE_E_CONFIG_VALUE, "config.json: long"},
        {TEXT("top_k=1", "top_k=1 require.list=1"), MOE_E_CONFIG_REQUIRE, "config.json: list"},
        {TEXT("top_k=1", "top_k=1 require.object=1"), MOE_E_CONFIG_REQUIRE, "config.json: object"},
        {TEXT("top_k=1", "top_k=1 require.long=1"), MOE_E_CONFIG_REQUIRE, "config.json: long"},
        {TEXT("top_k=1", "top_k=1 require.word=7"), MOE_E_CONFIG_REQUIRE, "config.json: word"},
        {TEXT("top_k=1", "top_k=1 require.five=abc"), MOE_E_CONFIG_REQUIRE, "config.json: five"},
        {TEXT("top_k=1", "top_k=1 require.six=7"), MOE_E_CONFIG_REQUIRE, "config.json: six"},
        {TEXT("top_k=1", "top_k=1 require.eight=7"), MOE_E_CONFIG_REQUIRE, "config.json: eight"},
        {TEXT("w1=g*", "w1=g*:odd"), MOE_E_MODEL_TEXT, "family: experts.w1"},
        {TEXT("router=r", "router=r:fused"), MOE_E_MODEL_TEXT, "family: router"},
        {TEXT("w2=d*", "w2=d*:interleaved"), MOE_E_MODEL_TEXT, "family: experts.w2"},
        {TEXT("experts.wu=u* ", ""), MOE_E_MODEL_TEXT, "family: experts.wu"},
        {TEXT("top_k=1", "top_k=1 control.bias=r"), MOE_E_MODEL_TEXT, "family: control.bias"},
        {TEXT("router=r", "router=" LONGER), MOE_E_MODEL_TENSOR, NULL},
        {TEXT("router=r", "router=" LONGER "abcdefghijklmnop"), MOE_E_MODEL_TENSOR, NULL}, /* and "_blocks" */
        {"", "", "x.r:F32:2,4 x.g0:F32:6,4", "x.g0_blocks:U8:1,2,16", MOE_E_MODEL_TENSOR, "model.safetensors: x.r"},
        {TEXT("router=r", "router=" LONGER LONG), MOE_E_MODEL_TEXT, "family: router"},
        {TEXT("d_ff=6", "shared_width=7 " SHARED_TEXT), MOE_E_MODEL_TEXT, "family: d_ff"},
        {TEXT("d_ff=6", "d_ff=6 shared_width=@word"), MOE_E_CONFIG_VALUE, "config.json: word"},
        {TEXT("d_ff=6", sizeof(size_t) > 4 ? "d_ff=6 n_shared=9223372036854775808" : "d_ff=6 n_shared=2147483648"),
         MOE_E_OVERFLOW, "family: size"}, /* half of SIZE_MAX and one */
        {"w1=g*", "w1=g", "x.g0:F32:6,4 x.g1:F32:6,4", "x.g:F32:2,6,4", MOE_OK, ""},
        {"w1=g*", "w1=g", "x.g0:F32:6,4 x.g1:F32:6,4", "x.g:F32:12,4", MOE_OK, ""},
        {"w1=g*", "w1=g", "x.g0:F32:6,4 x.g1:F32:6,4", "x.g:F32:3,4,4", MOE_E_MODEL_SHAPE, "model.safetensors: x.g"},
        {"w1=g*", "w1=g", "x.g0:F32:6,4 x.g1:F32:6,4", "x.g:F32:2,2,3,4", MOE_E_MODEL_SHAPE, "model.safetensors: x.g"},
        {"w1=g*", "w1=g", "x.g0:F32:6,4 x.g1:F32:6,4", "x.g:F32:2,5,4", MOE_E_MODEL_SHAPE, "model.safetensors: x.g"},
        {"", "", "x.r:F32:2,4", "x.r:F32:", MOE_E_MODEL_SHAPE, "model.safetensors: x.r"}};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        char text[1024], tensors[512];
        folder from;
        moe_model model;
        moe_layer *layer = NULL;
        memset(&from, 0, sizeof from);
        replaced(own_text, ways[i].word, ways[i].other, text, sizeof text);
        replaced(own_tensors, ways[i].tensor, ways[i].instead, tensors, sizeof tensors);
        write_text(&from, "config.json", own_config);
        write_tensors(tensors, &from, "model.safetensors");
        moe_model_source source = folder_source(&from);
        source.family = text;
        long before = test_live_blocks;
        moe_status status = moe_model_open(&model, &source);
        if (!status) status = moe_model_layer(&model, 0, NULL, NULL, &layer);
        if (!CHECK_STATUS(status, ways[i].status) || !CHECK(!ways[i].about || !strcmp(model.about, ways[i].about)))
            printf("        %s -> %s, %s: about \"%s\"\n", ways[i].word, ways[i].other, ways[i].instead, model.about);
        CHECK((layer != NULL) == (status == MOE_OK));
        moe_layer_free(layer);
        moe_model_close(&model);
        CHECK(test_live_blocks == before);
        folder_free(&from);
    }
}

/* Shared experts of width 161 over networks of 160, with biases: the second has one column and zeros, b2 the first
 * alone. */
static void test_own_shared(void) {
    enum { FF = 160, WIDE = 161, DD = 4 };
    static const struct { const char *text, *tensors; int turns; } ways[] = {
        {"shared.w1=s shared.wu=t shared.b1=sb shared.bu=tb",
         "x.s:F32:161,4 x.t:F32:161,4 x.sb:F32:161 x.tb:F32:161", 0},
        {"shared.w1=s:fused shared.b1=sb:fused", "x.s:F32:322,4 x.sb:F32:322", 1},
        {"shared.w1=s:interleaved shared.b1=sb:interleaved", "x.s:F32:322,4 x.sb:F32:322", 2}};
    for (size_t i = 0; i < 3; i++) {
        char text[512], tensors[512];
        static float w1[4 * DD * FF], wu[4 * DD * FF], w2[4 * DD * FF], b1[4 * FF], bu[4 * FF], b2[4 * DD];
        folder from;
        moe_model model;
        moe_layer *layer = NULL;
        memset(&from, 0, sizeof from);
        snprintf(text, sizeof text, "n_layers=1 d_model=4 d_ff=160 n_experts=2 top_k=1 gate=softmax expert=swiglu "
                 "bias=true shared_width=161 layer=x. router=r experts.w1=w:in experts.wu=w:in experts.w2=w "
                 "shared.w2=v shared.b2=vb %s", ways[i].text);
        snprintf(tensors, sizeof tensors, "x.r:F32:2,4 x.w:F32:2,4,160 x.v:F32:4,161 x.vb:F32:4 %s", ways[i].tensors);
        write_text(&from, "config.json", "{}");
        write_tensors(tensors, &from, "model.safetensors");
        moe_model_source source = folder_source(&from);
        source.family = text;
        if (!CHECK_OK(moe_model_open(&model, &source)) || !CHECK_OK(moe_model_layer(&model, 0, NULL, NULL, &layer)))
            printf("        %s\n", model.about);
        else {
            const moe_part_kind part = MOE_PART_PARAMS;
            size_t wrong = 0;
            CHECK(moe_layer_desc(layer)->n_shared == 2);
            CHECK_OK(moe_layer_get(layer, part, "experts.w1", w1, sizeof w1 / sizeof *w1));
            CHECK_OK(moe_layer_get(layer, part, "experts.wu", wu, sizeof wu / sizeof *wu));
            CHECK_OK(moe_layer_get(layer, part, "experts.w2", w2, sizeof w2 / sizeof *w2));
            CHECK_OK(moe_layer_get(layer, part, "experts.b1", b1, sizeof b1 / sizeof *b1));
            CHECK_OK(moe_layer_get(layer, part, "experts.bu", bu, sizeof bu / sizeof *bu));
            CHECK_OK(moe_layer_get(layer, part, "experts.b2", b2, sizeof b2 / sizeof *b2));
            for (size_t c = 0; c < 2 * FF; c++) { /* column c of both, one after the other: network 2, then 3 */
                size_t e = 2 + c / FF, at = c % FF;
                size_t gate = ways[i].turns == 2 ? 2 * c : c, up = ways[i].turns == 2 ? 2 * c + 1 : c;
                if (ways[i].turns == 1) up = WIDE + c;
                for (size_t k = 0; k < DD; k++) { /* number i of a tensor is (i + 1) / 64 */
                    int in = c < WIDE;
                    wrong += w1[(e * DD + k) * FF + at] != (in ? (float)(gate * DD + k + 1) / 64 : 0);
                    wrong += wu[(e * DD + k) * FF + at] != (in ? (float)(up * DD + k + 1) / 64 : 0);
                    wrong += w2[(e * FF + at) * DD + k] != (in ? (float)(k * WIDE + c + 1) / 64 : 0);
                    wrong += b1[e * FF + at] != (in ? (float)(gate + 1) / 64 : 0);
                    wrong += bu[e * FF + at] != (in ? (float)(up + 1) / 64 : 0);
                    wrong += b2[(2 + c / FF) * DD + k] != (c < FF ? (float)(k + 1) / 64 : 0);
                }
            }
            if (!CHECK(!wrong)) printf("        way %zu: %zu numbers are wrong\n", i, wrong);
        }
        moe_layer_free(layer);
        moe_model_close(&model);
        folder_free(&from);
    }
}

/* Tensors of one and of half a byte, whole and broken; scale: a digit for each element, the number of its scale. */
static void test_own_numbers(void) {
#define BLOCKS(text) "{\"quantization_config\":{\"weight_block_size\":" text "}}"
#define IN_IT "model.safetensors: "
    static const struct {
        const char *config, *tensors, *name, *scale;
        moe_status status;
        const char *about;
    } ways[] = {
        {"{}", "f:F8_E4M3: f_scale_inv:F32:", "f", "0", MOE_OK, ""},
        {"{}", "f:F8_E4M3:5 f_scale:F32:", "f", "00000", MOE_OK, ""},
        {"{}", "f:F8_E4M3:2,3,4 f_scale:F32:", "f", "000000000000000000000000", MOE_OK, ""},
        {"{}", "f:F8_E4M3:2,3,4 f_scale:F32:2,1,1", "f", "000000000000111111111111", MOE_OK, ""},
        {BLOCKS("[1,2]"), "f:F8_E4M3:2,3,4 f_scale:F32:2,1,1", "f", "000000000000111111111111", MOE_OK, ""},
        {"{}", "f:F8_E4M3:2,3,4 f_scale:F32:2,3,1", "f", "000011112222333344445555", MOE_OK, ""},
        {"{}", "f:F8_E4M3:2,3,4 f_scale:F32:2,1,4", "f", "012301230123456745674567", MOE_OK, ""},
        {"{}", "f:F8_E4M3:2,3,4 f_scale:F32:2,1", "f", "000000000000111111111111", MOE_OK, ""},
        {"{}", "f:F8_E4M3:2,3,4 f_scale:F32:3,1", "f", NULL, MOE_E_MODEL_SHAPE, IN_IT "f_scale"},
        {"{}", "f:F8_E4M3:3,2 f_scale:F32:3,1", "f", "001122", MOE_OK, ""},
        {"{}", "f:F8_E4M3:3,2 f_scale:F32:1,2", "f", "010101", MOE_OK, ""},
        {BLOCKS("[1,1]"), "f:F8_E4M3:3,2 f_scale:F32:3,2", "f", "012345", MOE_OK, ""},
        {BLOCKS("[3,2]"), "f:F8_E4M3:4,3 f_scale:F32:2,2", "f", "001001001223", MOE_OK, ""},
        {BLOCKS("[\"1\",\"x\"]"), "f:F8_E4M3:2,200 f_scale:F32:1,2", "f", "0", MOE_OK, ""}, /* no number: 128 */
        {BLOCKS("[0.5,0.5]"), "f:F8_E4M3:2,200 f_scale:F32:1,2", "f", "0", MOE_OK, ""},
        {BLOCKS("[1e10,1e10]"), "f:F8_E4M3:2,200 f_scale:F32:1,2", "f", "0", MOE_OK, ""},
        {"{}", "f:F8_E4M3:256 f_scale:F32:1,2", "f", "0", MOE_OK, ""}, /* of which 127 and 255 are no numbers */
        {"{}", "f:F8_E4M3:2,2", "f", NULL, MOE_E_MODEL_DTYPE, IN_IT "f"},
        {"{}", "f:F8_E4M3:2,2 f_scale:I32:", "f", NULL, MOE_E_MODEL_DTYPE, IN_IT "f_scale"},
        {"{}", "f:F8_E4M3:2,2 f_scale:F32:3", "f", NULL, MOE_E_MODEL_SHAPE, IN_IT "f_scale"},
        {"{}", "m_blocks:U8:1,2,16 m_scales:U8:1,2", "m", "", MOE_OK, ""},
        {"{}", "m_blocks:U8:1,2,16", "m", NULL, MOE_E_MODEL_TENSOR, IN_IT "m_scales"},
        {"{}", "m_blocks:I8:1,2,16 m_scales:U8:1,2", "m", NULL, MOE_E_MODEL_DTYPE, IN_IT "m_scales"},
        {"{}", "m_blocks:U8:1,2,16 m_scales:I8:1,2", "m", NULL, MOE_E_MODEL_DTYPE, IN_IT "m_scales"},
        {"{}", "m_blocks:U8:2,16 m_scales:U8:2", "m", NULL, MOE_E_MODEL_SHAPE, IN_IT "m_scales"},
        {"{}", "m_blocks:U8:1,4,8 m_scales:U8:1,2", "m", NULL, MOE_E_MODEL_SHAPE, IN_IT "m_scales"},
        {"{}", "m_blocks:U8:1,2,16 m_scales:U8:1,3", "m", NULL, MOE_E_MODEL_SHAPE, IN_IT "m_scales"},
        {"{}", "m_blocks:U8:0,@,16 m_scales:U8:0", "m", NULL, MOE_E_OVERFLOW, ""},
        {"{}", LONGER "abcdefghijklmno:F8_E4M3:2", LONGER "abcdefghijklmno", NULL, MOE_E_MODEL_DTYPE, NULL},
        {"{}", LONGER "abcdefghijklmnop:F8_E4M3:2 " LONGER "abcdefghijklmnop_scal:F32:", LONGER "abcdefghijklmnop",
         NULL, MOE_E_MODEL_DTYPE, NULL}, /* its scale's name has a letter too many; cut, it would be another's */
        {"{}", "f:I32:2", LONGER "abcdefghijklmnopq", NULL, MOE_E_MODEL_TENSOR, NULL}};
    static const double halves[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        folder from;
        moe_model model;
        char tensors[600];
        float out[400];
        size_t wrong = 0, n = ways[i].scale ? strlen(ways[i].scale) : 1;
        memset(&from, 0, sizeof from);
        snprintf(tensors, sizeof tensors, "x.r:F32:1 %s", ways[i].tensors);
        write_text(&from, "config.json", ways[i].config);
        write_tensors(tensors, &from, "model.safetensors");
        moe_model_source source = folder_source(&from);
        source.family = own_text;
        if (!CHECK_OK(moe_model_open(&model, &source))) continue;
        moe_status status = moe_model_read(&model, ways[i].name, 0, n, out);
        if (!CHECK_STATUS(status, ways[i].status) || !CHECK(!ways[i].about || !strcmp(model.about, ways[i].about)))
            printf("        %s: about \"%s\"\n", ways[i].tensors, model.about);
        for (size_t k = 0; !status && ways[i].scale && k < n; k++)
            wrong += out[k] != (float)(f8_value((unsigned)k) * (ways[i].scale[k] - '0' + 1) / 64);
        if (!status && n == 0) { /* two blocks of 32, with powers 0 and 1; a byte's lower half first */
            CHECK_OK(moe_model_read(&model, ways[i].name, 0, 64, out));
            for (int k = 0; k < 64; k++)
                wrong += (double)out[k] != ldexp(halves[k % 2 ? k / 2 >> 4 : k / 2 & 15], k / 32 - 127);
        }
        if (strstr(ways[i].tensors, "256")) {
            CHECK_OK(moe_model_read(&model, ways[i].name, 0, 256, out));
            for (unsigned k = 0; k < 256; k++)
                if (k % 128 == 127) CHECK(isnan(out[k]));
                else wrong += out[k] != (float)(f8_value(k) * (k / 128 + 1) / 64);
        }
        if (!CHECK(!wrong)) printf("        %s: %zu numbers are wrong\n", ways[i].tensors, wrong);
        moe_model_close(&model);
        folder_free(&from);
    }
}

/* A checkpoint of two files whose index has a word replaced. */
static void test_index_faults(void) {
#define IN_A(name) "\"" name "\":\"a.st\","
    static const char whole[] = "{\"weight_map\":{" IN_A("x.r") IN_A("x.g0") IN_A("x.g1") IN_A("x.u0") IN_A("x.d0")
                                IN_A("x.d1") IN_A("f") IN_A("f_scale") IN_A("m_blocks") IN_A("m_scales")
                                IN_A("whole") "\"more\":\"a.st\",\"x.u1\":\"b.st\"}}";
    static const struct { const char *word, *other, *name; moe_status status; const char *about; } ways[] = {
        {"", "", NULL, MOE_OK, ""}, {"", "", "f", MOE_OK, ""}, {"", "", "m", MOE_OK, ""},
        {"", "", "whole", MOE_E_MODEL_DTYPE, "a.st: whole"},
        {",\"x.u1\":\"b.st\"", "", NULL, MOE_E_MODEL_TENSOR, "model.safetensors.index.json: x.u1"},
        {"b.st", "a.st", NULL, MOE_E_MODEL_TENSOR, "a.st: x.u1"},
        {"b.st", "c.st", NULL, MOE_E_OPEN, "c.st"},
        {"b.st", LONGER LONG, NULL, MOE_E_SMALL_MEMORY, "model.safetensors.index.json: x.u1"},
        {"weight_map", "weight_mop", NULL, MOE_E_SHARDS, "model.safetensors.index.json"},
        {"\"x.r\":\"a.st\"", "\"x.r\":\"c.st\"", NULL, MOE_E_OPEN, "c.st"},
        {"\"f_scale\":\"a.st\"", "\"f_scale\":\"c.st\"", "f", MOE_E_OPEN, "c.st"},
        {"\"m_scales\":\"a.st\"", "\"m_scales\":\"c.st\"", "m", MOE_E_OPEN, "c.st"},
        {"\"m_blocks\":\"a.st\"", "\"m_blocks\":\"c.st\"", "m", MOE_E_OPEN, "c.st"},
        {NULL, NULL, NULL, MOE_E_READ, "model.safetensors.index.json"}};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        char index[1024], tensors[512];
        folder from;
        moe_model model;
        moe_layer *layer = NULL;
        float value;
        memset(&from, 0, sizeof from);
        replaced(whole, ways[i].word ? ways[i].word : "", ways[i].word ? ways[i].other : "", index, sizeof index);
        replaced(own_tensors, "x.u1:F32:6,4", "f:F8_E4M3:2 f_scale:F32: m_blocks:U8:1,2,16 m_scales:U8:1,2 whole:I32:2",
                 tensors, sizeof tensors);
        write_text(&from, "config.json", own_config);
        write_text(&from, "model.safetensors.index.json", index);
        if (!ways[i].word) free(from.file[1].bytes), from.file[1].bytes = NULL;
        write_tensors(tensors, &from, "a.st");
        write_tensors("x.u1:F32:6,4", &from, "b.st");
        moe_model_source source = folder_source(&from);
        source.family = own_text;
        long before = test_live_blocks;
        moe_status status = moe_model_open(&model, &source);
        if (!status && ways[i].name) status = moe_model_read(&model, ways[i].name, 1, 1, &value);
        else if (!status) status = moe_model_layer(&model, 0, NULL, NULL, &layer);
        if (!CHECK_STATUS(status, ways[i].status) || !CHECK(!strcmp(model.about, ways[i].about)))
            printf("        %s -> %s: about \"%s\"\n", ways[i].word, ways[i].other, model.about);
        CHECK((layer != NULL) == (status == MOE_OK && !ways[i].name));
        moe_layer_free(layer);
        moe_model_close(&model);
        CHECK(test_live_blocks == before);
        folder_free(&from);
    }
}

/* A checkpoint into experts of eight bits: what quantising the loaded layer gives; and arguments. */
static void test_formats(void) {
    static const moe_layer_formats int8 = {MOE_FORMAT_INT8, NULL, MOE_OFF, 0, NULL};
    folder from;
    moe_model model;
    moe_layer *plain = NULL, *quantised = NULL, *loaded = NULL;
    moe_file_tensor tensor;
    moe_desc around;
    float value;
    memset(&from, 0, sizeof from), memset(&around, 0, sizeof around);
    write_text(&from, "config.json", "{}");
    write_tensors(own_tensors, &from, "model.safetensors");
    moe_model_source source = folder_source(&from);
    source.family = own_text;
    if (!CHECK_OK(moe_model_open(&model, &source))) return;
    CHECK_OK(moe_model_layer(&model, 0, &around, NULL, &plain)); /* the surroundings' training is not said */
    CHECK(moe_layer_desc(plain)->training == MOE_OFF);
    CHECK_OK(moe_layer_quantize(plain, &int8, &quantised));
    CHECK_OK(moe_model_layer(&model, 0, NULL, &int8, &loaded));
    CHECK(moe_layer_hash(loaded) == moe_layer_hash(quantised) && moe_layer_hash(loaded) != moe_layer_hash(plain));
    moe_layer_free(plain), moe_layer_free(quantised), moe_layer_free(loaded);
    loaded = NULL;
    moe_layer_formats wrong = int8;
    wrong.format = (moe_format_kind)99;
    CHECK(moe_model_layer(&model, 0, NULL, &wrong, &loaded) == MOE_E_FORMAT && !loaded);
    around.parallel.n_threads = SIZE_MAX / 8;
    CHECK(moe_model_layer(&model, 0, &around, NULL, &loaded) == MOE_E_OVERFLOW && !loaded);
    CHECK_STATUS(moe_model_tensor(&model, NULL, &tensor), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_model_tensor(&model, "x.r", NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_model_read(&model, NULL, 0, 1, &value), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_model_read(&model, "x.r", 0, 1, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_model_read(&model, "x.r", 8, 0, NULL));
    CHECK_STATUS(moe_model_read(&model, "x.r", 9, 0, NULL), MOE_E_MODEL_RANGE);
    CHECK(!strcmp(model.about, "model.safetensors: x.r"));
    moe_model_close(&model);
    folder_free(&from);
}

/* ---- an index of many names ---- */
/* n experts' tensors in 64 layers listed, in a file that is not there: opened, every layer asked for, each name looked
 * up; the processor's time. */
static double index_time(size_t n) {
    folder from;
    moe_model model;
    moe_file_tensor tensor;
    char name[80];
    size_t mixtures = 0, missing = 0;
    memset(&from, 0, sizeof from);
    char *text = (char *)test_memory(n, 120), *p = text + sprintf(text, "{\"weight_map\":{");
    for (size_t i = 0; i < n; i++)
        p += sprintf(p, "%s\"model.layers.%zu.mlp.experts.%zu.gate_proj.weight\":\"model-%05zu-of-00163.safetensors\"",
                     i ? "," : "", i % 64, i / 64, i % 163);
    strcpy(p, "}}");
    write_text(&from, "model.safetensors.index.json", text);
    write_text(&from, "config.json", "{\"model_type\":\"olmoe\",\"num_hidden_layers\":64}");
    moe_model_source source = folder_source(&from);
    clock_t start = clock();
    if (!CHECK_OK(moe_model_open(&model, &source))) printf("        %s\n", model.about);
    for (size_t l = 0; l < 64; l++) mixtures += (size_t)moe_model_mixture(&model, l);
    for (size_t i = 0; i < n; i++) {
        sprintf(name, "model.layers.%zu.mlp.experts.%zu.gate_proj.weight", i % 64, i / 64);
        missing += moe_model_tensor(&model, name, &tensor) == MOE_E_OPEN;
    }
    double took = (double)(clock() - start) / CLOCKS_PER_SEC;
    CHECK(mixtures == 64 && missing == n);
    CHECK(!strncmp(model.about, "model-", 6) && strstr(model.about, "-of-00163.safetensors") != NULL);
    moe_model_close(&model);
    folder_free(&from);
    free(text);
    return took;
}
static void test_many_names(void) {
    size_t most = TEST_SANITIZED ? 20000 : 500000;
    double ratio = 1e30;
    for (int attempt = 0; attempt < 3 && ratio > 20; attempt++) ratio = index_time(most) / index_time(most / 10);
    if (!CHECK(ratio < 20)) printf("        10 times the names took %.1f times as long\n", ratio);
}

int main(void) {
    models_folder = getenv("MOE_MODELS");
    RUN(test_families);
    RUN(test_f8);
    RUN(test_mxfp4);
    RUN(test_config_faults);
    RUN(test_tensor_faults);
    RUN(test_other_faults);
    RUN(test_own_families);
    RUN(test_own_shared);
    RUN(test_own_numbers);
    RUN(test_index_faults);
    RUN(test_formats);
    RUN(test_many_names);
    RUN_IF(models_folder && *models_folder, test_recorded, "MOE_MODELS=DIR is not set");
    return test_end();
}
