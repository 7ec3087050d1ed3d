// llm.c - runs a mixture-of-experts language model from its published folder: config.json, safetensors, tokenizer.json.
//
//     build/llm --model DIR --prompt "The moon"        writes on, greedily or (--temperature, --top-p) by chance
//     build/llm --model DIR --text FILE                perplexity of a text
//     build/llm --model DIR --ids 5,17,3 --dump P      P.logits.npy, P.router_logits.npy, P.experts.npy
//     build/llm --model DIR --encode "a text"          its token ids
//
// OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3, GPT-OSS and Granite-MoE. The mixtures are moe.h's layers
// (moe_model_layer); the blocks around them are common/transformer.h; what differs between models is read from config
// and tensors in "the model" below. docs/llm.md has the formulas and what was tested.
#define MOE_IMPLEMENTATION
#include "common/args.h"
#include "common/json.h"
#include "common/progress.h"
#include "common/tokenizer.h"
#include "common/transformer.h"

typedef struct options {
    const char *model, *prompt, *text, *ids, *dump, *encode, *decode, *format, *isa;
    moe_format_kind experts_format;
    size_t tokens, greedy, batch, context, stride, threads;
    uint64_t seed;
    double temperature, top_p;
    int special, json, quiet;
} options;

typedef struct llm {
    const options *o;
    nn s;
    char config_path[512];
    js_file config;
    moe_model model;
    size_t d, vocab, layers, mixtures, slots, experts, positions; // slots: experts a token; positions: of the cache
    tf_block *block;
    tf_rope rope;
    tf_cache *cache;
    tf_acts acts;
    moe_tape **tape; // one a layer; equal layers share theirs
    tf_linear head;
    float *norm, *x, *row, *logits; // (d), (batch, d), (batch, d), (rows, vocab)
    float embedding, logits_scale;
    double bytes_dense, bytes_expert; // read for a token
} llm;

// ---- the model ----

static moe_status open_file(void *user, const char *name, const void **bytes, size_t *size) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", (const char *)user, name);
    *bytes = file_view(path, size);
    return *bytes ? MOE_OK : MOE_E_OPEN;
}
static void must(const llm *m, moe_status status, const char *what) {
    char path[1024];
    if (!status) return;
    snprintf(path, sizeof path, "%s/%s", m->o->model, *m->model.about ? m->model.about : what);
    refuse(path, "%s", moe_status_string(status));
}
static const char *layer_name(size_t layer, const char *name) {
    static char full[2][160];
    static int turn;
    turn = !turn;
    snprintf(full[turn], sizeof full[turn], "model.layers.%zu.%s", layer, name);
    return full[turn];
}
static int has(llm *m, const char *name) {
    moe_file_tensor t;
    return moe_model_tensor(&m->model, name, &t) == MOE_OK;
}
// A tensor of these dimensions (cols 0: a vector).
static moe_file_tensor tensor(llm *m, const char *name, size_t rows, size_t cols) {
    moe_file_tensor t;
    must(m, moe_model_tensor(&m->model, name, &t), name);
    if (!cols && (t.n_dims != 1 || t.dim[0] != rows))
        refuse(m->o->model, "%s: its shape is not (%zu), as config.json asks", name, rows);
    if (cols && (t.n_dims != 2 || t.dim[0] != rows || t.dim[1] != cols))
        refuse(m->o->model, "%s: its shape is not (%zu, %zu), as config.json asks", name, rows, cols);
    return t;
}
static void must_be_finite(const llm *m, const char *name, size_t n, const float *x) {
    for (size_t i = 0; i < n; i++)
        if (!(x[i] - x[i] == 0)) refuse(m->o->model, "%s: element %zu is NaN or infinite", name, i);
}
static const float *vector(llm *m, const char *name, size_t n) {
    float *v = nn_floats(&m->s, n);
    tensor(m, name, n, 0);
    must(m, moe_model_read(&m->model, name, 0, n, v), name);
    must_be_finite(m, name, n, v);
    return v;
}
// (out, in) of the file in panels: a task packs 32 rows.
typedef struct packing {
    llm *m;
    const char *name;
    moe_file_tensor from;
    size_t in, out;
    float *panels, *rows; // (workers, 32, in)
    int bad;              // a task found NaN or infinity
} packing;
static void pack_task(void *arg, size_t i, size_t worker) {
    static const moe_parallel alone = {.n_threads = 1};
    packing *p = arg;
    moe_dtype_kind dtype = moe_dtype_of(p->from.dtype);
    size_t r = i * TF_PANEL, n = p->out - r < TF_PANEL ? p->out - r : TF_PANEL, at = r * p->in, count = n * p->in;
    float *rows = p->rows + worker * TF_PANEL * p->in, sum = 0;
    if (moe_to_float(dtype, count, p->from.data + at * moe_dtype_size(dtype), rows) != MOE_OK) // scaled: one thread
        must(p->m, moe_model_read(&p->m->model, p->name, at, count, rows), p->name);
    for (size_t k = 0; k < count; k++) sum += rows[k] - rows[k];
    if (!(sum == 0)) p->bad = 1;
    moe_gemm_args g = {.n = n, .k = p->in, .b = rows, .tb = 1, .parallel = &alone};
    nn_must(moe_gemm_pack(&g, p->panels + at));
}
static int is_plain(moe_dtype_kind d) {
    return d == MOE_DTYPE_F32 || d == MOE_DTYPE_F16 || d == MOE_DTYPE_BF16 || d == MOE_DTYPE_F64;
}
static tf_linear linear(llm *m, const char *name, size_t in, size_t out) {
    char bias[200], weight[200];
    moe_parallel alone = {.n_threads = 1}, *who = &m->s.parallel;
    snprintf(weight, sizeof weight, "%s.weight", name);
    snprintf(bias, sizeof bias, "%s.bias", name);
    packing p = {.m = m, .name = weight, .from = tensor(m, weight, out, in), .in = in, .out = out};
    if (!is_plain(moe_dtype_of(p.from.dtype))) who = &alone;
    p.panels = nn_floats(&m->s, tf_panels(out) * TF_PANEL * in);
    p.rows = allocate(moe_workers(who) * TF_PANEL * in, sizeof(float));
    moe_run(who, tf_panels(out), pack_task, &p);
    free(p.rows);
    if (p.bad) refuse(m->o->model, "%s: NaN or infinite", weight);
    tf_linear l = {.in = in, .out = out, .panels = p.panels};
    if (has(m, bias)) l.bias = vector(m, bias, out);
    m->bytes_dense += (double)in * (double)out * sizeof(float);
    return l;
}

// config.json's rope_scaling (or rope_parameters), and by how much yarn scales the scores.
static tf_rope_args rope_args(const llm *m, size_t dim, double *scores) {
    const js_file *f = &m->config;
    const moe_json *c = &f->root;
    moe_json s = {0};
    char word[64], other[64];
    tf_rope_args a = {.dim = dim, .truncate = 1};
    if (!js_get(c, "rope_parameters", &s)) js_get(c, "rope_scaling", &s);
    a.theta = js_above(f, c, "rope_theta", js_real(f, &s, "rope_theta", 10000));
    const char *type = js_word(f, &s, "rope_type", js_word(f, &s, "type", "default", other), word);
    double most = js_above(f, c, "max_position_embeddings", 4096);
    if (strcmp(type, "default") == 0) return a;
    a.factor = js_above(f, &s, "factor", NAN);
    a.original = js_above(f, &s, "original_max_position_embeddings", most);
    if (strcmp(type, "linear") == 0)
        a.scaling = TF_ROPE_LINEAR;
    else if (strcmp(type, "llama3") == 0) {
        a.scaling = TF_ROPE_LLAMA3;
        a.low = js_above(f, &s, "low_freq_factor", 1);
        a.high = js_above(f, &s, "high_freq_factor", 4);
    } else if (strcmp(type, "yarn") == 0) {
        double scale = js_real(f, &s, "mscale", 0), all = js_real(f, &s, "mscale_all_dim", 0);
        double grown = a.factor > 1 ? log(a.factor) / 10 : 0;
        a.scaling = TF_ROPE_YARN;
        a.low = js_above(f, &s, "beta_slow", 1);
        a.high = js_above(f, &s, "beta_fast", 32);
        a.truncate = js_flag(f, &s, "truncate", 1);
        a.attention = js_real(f, &s, "attention_factor", 0);
        if (a.attention == 0 && scale != 0 && all != 0) a.attention = (grown * scale + 1) / (grown * all + 1);
        if (all != 0 && strncmp(m->model.family, "deepseek", 8) == 0) *scores = (grown * all + 1) * (grown * all + 1);
    } else
        refuse(f->path, "rope_scaling.rope_type: '%s' is not known here", type);
    return a;
}
// How many keys a query of this layer sees; 0 = all.
static size_t window(const llm *m, size_t layer) {
    const js_file *f = &m->config;
    char path[64], word[64];
    size_t size = js_whole(f, &f->root, "sliding_window", 0, 0, SIZE_MAX >> 12);
    if (!js_flag(f, &f->root, "use_sliding_window", strncmp(m->model.family, "qwen", 4) != 0)) return 0;
    snprintf(path, sizeof path, "layer_types.%zu", layer);
    return strcmp(js_word(f, &f->root, path, "sliding_attention", word), "sliding_attention") == 0 ? size : 0;
}
static void load_attention(llm *m, size_t layer, tf_block *b, double scores) {
    const js_file *f = &m->config;
    const moe_json *c = &f->root;
    size_t d = m->d, heads = js_whole(f, c, "num_attention_heads", JS_MUST, 1, 65536);
    size_t kv = js_whole(f, c, "num_key_value_heads", heads, 1, heads), dim = b->rope->dim;
    moe_file_tensor t;
    if (heads % kv || (!js_get(c, "head_dim", &(moe_json){0}) && d % heads))
        refuse(f->path, "num_attention_heads: not a multiple of num_key_value_heads, or not a divisor of hidden_size");
    b->attention = (tf_attention){.heads = heads, .n_kv = kv, .k_dim = dim, .v_dim = dim, .window = window(m, layer)};
    b->attention.scale = (float)js_above(f, c, "attention_multiplier", scores / sqrt((double)dim));
    b->clip = (float)js_real(f, c, "clip_qkv", 0);
    b->q = linear(m, layer_name(layer, "self_attn.q_proj"), d, heads * dim);
    b->k = linear(m, layer_name(layer, "self_attn.k_proj"), d, kv * dim);
    b->v = linear(m, layer_name(layer, "self_attn.v_proj"), d, kv * dim);
    b->o = linear(m, layer_name(layer, "self_attn.o_proj"), heads * dim, d);
    if (has(m, layer_name(layer, "self_attn.sinks")))
        b->attention.sinks = vector(m, layer_name(layer, "self_attn.sinks"), heads);
    if (moe_model_tensor(&m->model, layer_name(layer, "self_attn.q_norm.weight"), &t) != MOE_OK) return;
    b->norm_heads = t.n_dims == 1 && t.dim[0] == dim && heads > 1; // over each head, or over the whole projection
    b->q_norm = vector(m, layer_name(layer, "self_attn.q_norm.weight"), b->norm_heads ? dim : heads * dim);
    b->k_norm = vector(m, layer_name(layer, "self_attn.k_norm.weight"), b->norm_heads ? dim : kv * dim);
}
static void load_latent(llm *m, size_t layer, tf_block *b, double scores) {
    const js_file *f = &m->config;
    const moe_json *c = &f->root;
    tf_latent *l = &b->latent;
    size_t d = m->d, heads = js_whole(f, c, "num_attention_heads", JS_MUST, 1, 65536), turned = b->rope->dim;
    size_t plain = js_whole(f, c, "qk_nope_head_dim", JS_MUST, 1, 65536), dim = plain + turned;
    size_t values = js_whole(f, c, "v_head_dim", JS_MUST, 1, 65536), from = d;
    size_t q_rank = js_whole(f, c, "q_lora_rank", 0, 1, 1 << 20);
    l->rank = js_whole(f, c, "kv_lora_rank", JS_MUST, 1, 1 << 20);
    b->attention = (tf_attention){.heads = heads, .n_kv = heads, .k_dim = dim, .v_dim = values};
    b->attention.scale = (float)(scores / sqrt((double)dim));
    if (q_rank) {
        l->q_down = linear(m, layer_name(layer, "self_attn.q_a_proj"), d, q_rank);
        l->q_norm = vector(m, layer_name(layer, "self_attn.q_a_layernorm.weight"), q_rank);
        from = q_rank;
    }
    b->q = linear(m, layer_name(layer, q_rank ? "self_attn.q_b_proj" : "self_attn.q_proj"), from, heads * dim);
    l->kv_down = linear(m, layer_name(layer, "self_attn.kv_a_proj_with_mqa"), d, l->rank + turned);
    l->kv_norm = vector(m, layer_name(layer, "self_attn.kv_a_layernorm.weight"), l->rank);
    l->kv_up = linear(m, layer_name(layer, "self_attn.kv_b_proj"), l->rank, heads * (plain + values));
    b->o = linear(m, layer_name(layer, "self_attn.o_proj"), heads * values, d);
}
// Bytes of all experts, and how many other numbers the layer has.
static void mixture_bytes(const moe_layer *layer, double *experts, double *others) {
    moe_tensor tensor;
    for (size_t e = 0; moe_layer_expert_bytes(layer, e); e++) *experts += (double)moe_layer_expert_bytes(layer, e);
    for (size_t i = 0; i < moe_layer_tensors(layer); i++) {
        nn_must(moe_layer_tensor(layer, i, &tensor));
        if (strncmp(tensor.name, "experts.", 8) != 0) *others += (double)tensor.count;
    }
}
static void load_mixture(llm *m, size_t layer, tf_block *b) {
    moe_desc around = {0};
    around.parallel = m->s.parallel;
    moe_layer_formats formats = {.format = m->o->experts_format};
    const moe_layer_formats *stored = formats.format == MOE_FORMAT_F32 ? NULL : &formats;
    must(m, moe_model_layer(&m->model, layer, &around, stored, &b->mixture), "mixture");
    const moe_desc *desc = moe_layer_desc(b->mixture);
    for (size_t l = 0; l < layer && !m->tape[layer]; l++)
        if (m->block[l].mixture && memcmp(moe_layer_desc(m->block[l].mixture), desc, sizeof *desc) == 0)
            m->tape[layer] = m->tape[l];
    if (!m->tape[layer]) nn_must(moe_tape_new(&m->tape[layer], desc, m->o->batch, MOE_OFF));
    m->tape[layer]->side.evaluate = 1;
    double active = (double)moe_layer_active_params(b->mixture), all = (double)moe_layer_params(b->mixture);
    double experts = 0, routers = 0; // a token reads the same share of the experts' bytes as of their weights
    mixture_bytes(b->mixture, &experts, &routers);
    m->bytes_expert += routers * sizeof(float) + experts * (active - routers) / (all - routers);
    if (m->mixtures++ && (m->slots != m->tape[layer]->n_slots || m->experts != desc->n_experts) && m->o->dump)
        refuse(m->o->model, "layer %zu has another number of experts: no --dump", layer);
    m->slots = desc->top_k;
    m->experts = desc->n_experts;
}
static void load_dense(llm *m, size_t layer, tf_block *b) {
    const js_file *f = &m->config;
    char word[64];
    size_t inner = js_whole(f, &f->root, "intermediate_size", JS_MUST, 1, 1 << 24);
    if (strcmp(js_word(f, &f->root, "hidden_act", "silu", word), "silu") != 0)
        refuse(f->path, "hidden_act: '%s' is not known here", word);
    b->gate = linear(m, layer_name(layer, "mlp.gate_proj"), m->d, inner);
    b->up = linear(m, layer_name(layer, "mlp.up_proj"), m->d, inner);
    b->down = linear(m, layer_name(layer, "mlp.down_proj"), inner, m->d);
}
static void load_layer(llm *m, size_t layer, double scores) {
    const js_file *f = &m->config;
    tf_block *b = &m->block[layer];
    b->d = m->d;
    b->eps = (float)js_above(f, &f->root, "rms_norm_eps", NAN);
    b->residual = (float)js_real(f, &f->root, "residual_multiplier", 1);
    b->rope = &m->rope;
    b->norm1 = vector(m, layer_name(layer, "input_layernorm.weight"), m->d);
    b->norm2 = vector(m, layer_name(layer, "post_attention_layernorm.weight"), m->d);
    if (m->rope.interleaved)
        load_latent(m, layer, b, scores);
    else
        load_attention(m, layer, b, scores);
    if (moe_model_mixture(&m->model, layer))
        load_mixture(m, layer, b);
    else
        load_dense(m, layer, b);
    m->cache[layer] = tf_cache_new(&m->s, m->positions, b->attention.n_kv, b->attention.k_dim, b->attention.v_dim);
}

// Folder, config and what does not belong to a layer.
static void open_model(llm *m, const options *o) {
    static const char *const known[] = {"olmoe",       "mixtral",     "qwen2_moe", "qwen3_moe",
                                        "deepseek_v2", "deepseek_v3", "gpt_oss",   "granitemoe"};
    moe_model_source source = {open_file, (void *)o->model, NULL, NULL};
    size_t i = 0, n = sizeof known / sizeof *known;
    m->o = o;
    m->s.parallel.n_threads = o->threads;
    snprintf(m->config_path, sizeof m->config_path, "%s/config.json", o->model);
    must(m, moe_model_open(&m->model, &source), "");
    m->config = (js_file){m->config_path, m->model.config};
    while (i < n && strcmp(m->model.family, known[i]) != 0) i++;
    if (i == n) refuse(m->config_path, "model_type: the attention of '%s' is not known here", m->model.family);
    m->layers = m->model.n_layers;
    m->d = js_whole(&m->config, &m->config.root, "hidden_size", JS_MUST, 1, 1 << 20);
    m->vocab = js_whole(&m->config, &m->config.root, "vocab_size", JS_MUST, 1, 1 << 24);
}
static void load_model(llm *m, size_t positions) {
    const js_file *f = &m->config;
    const moe_json *c = &f->root;
    progress p = progress_begin("loading", "layers", m->layers, m->o->quiet);
    int latent = strncmp(m->model.family, "deepseek", 8) == 0;
    size_t heads = js_whole(f, c, "num_attention_heads", JS_MUST, 1, 65536);
    size_t dim = latent ? js_whole(f, c, "qk_rope_head_dim", JS_MUST, 2, 65536) : m->d / heads;
    double scores = 1;
    if (!latent) dim = js_whole(f, c, "head_dim", dim, 2, 65536);
    if (dim % 2 || !dim) refuse(f->path, "head_dim: must be even, not %zu", dim);
    m->positions = positions;
    m->block = allocate(m->layers, sizeof *m->block);
    m->cache = allocate(m->layers, sizeof *m->cache);
    m->tape = allocate(m->layers, sizeof *m->tape);
    tf_rope_args turns = rope_args(m, dim, &scores);
    m->rope = tf_rope_new(&m->s, &turns, positions, latent);
    for (size_t l = 0; l < m->layers; l++) {
        load_layer(m, l, scores);
        progress_update(&p, l + 1, "%.1f GB", (m->bytes_dense + m->bytes_expert) / 1e9);
    }
    progress_clear(&p);
    tensor(m, "model.embed_tokens.weight", m->vocab, m->d);
    m->norm = (float *)vector(m, "model.norm.weight", m->d);
    int tied = js_flag(f, c, "tie_word_embeddings", 0);
    m->head = linear(m, tied ? "model.embed_tokens" : "lm_head", m->d, m->vocab);
    m->embedding = (float)js_real(f, c, "embedding_multiplier", 1);
    m->logits_scale = (float)js_above(f, c, "logits_scaling", 1);
    m->acts = tf_acts_new(&m->s, m->block, m->layers, m->o->batch);
    m->x = nn_floats(&m->s, m->o->batch * m->d);
    m->row = nn_floats(&m->s, m->o->batch * m->d);
    m->logits = nn_floats(&m->s, m->o->batch * m->vocab);
}

// ---- forward ----

// What becomes of each batch: NULL where nothing does.
typedef struct taker {
    void (*layer)(void *user, const llm *m, size_t mixture, size_t first, const moe_tape *tape);
    void (*rows)(void *user, const llm *m, size_t first, size_t rows); // m->logits
    void *user;
    int last; // logits of the last token only
} taker;

static void forward_batch(llm *m, const int32_t *ids, size_t n, size_t position, const taker *take, size_t first) {
    size_t d = m->d, mixture = 0, rows = take->last ? 1 : n;
    for (size_t t = 0; t < n; t++) {
        if (ids[t] < 0 || (size_t)ids[t] >= m->vocab)
            refuse(m->config_path, "vocab_size: there is no token %d below %zu", (int)ids[t], m->vocab);
        must(m, moe_model_read(&m->model, "model.embed_tokens.weight", (size_t)ids[t] * d, d, m->x + t * d), "embed");
    }
    must_be_finite(m, "model.embed_tokens.weight", n * d, m->x);
    for (size_t i = 0; i < n * d; i++) m->x[i] *= m->embedding;
    for (size_t l = 0; l < m->layers; l++) {
        m->acts.tape = m->tape[l];
        tf_block_forward(&m->s, &m->block[l], &m->acts, 1, n, position, &m->cache[l], m->x, m->x);
        if (m->block[l].mixture && take->layer) take->layer(take->user, m, mixture, first, m->tape[l]);
        mixture += m->block[l].mixture != NULL;
    }
    if (!rows || !take->rows) return;
    tf_norm(rows, d, m->block[0].eps, m->x + (n - rows) * d, m->norm, m->row);
    tf_linear_forward(&m->s.parallel, &m->head, rows, m->row, m->logits);
    for (size_t i = 0; i < rows * m->vocab; i++) m->logits[i] /= m->logits_scale;
    take->rows(take->user, m, first + n - rows, rows);
}
// n tokens that stand at `position` and on, a batch at a time.
static void forward(llm *m, const int32_t *ids, size_t n, size_t position, const taker *take) {
    for (size_t i = 0, count; i < n; i += count) {
        taker now = *take;
        count = n - i < m->o->batch ? n - i : m->o->batch;
        if (take->last && i + count < n) now.rows = NULL;
        forward_batch(m, ids + i, count, position + i, &now, i);
    }
}

// ---- generating ----

typedef struct chooser {
    double temperature, top_p;
    uint64_t seed, drawn;
    int32_t *order; // (vocab)
    float *prob;
    int32_t chosen;
} chooser;
static void choose(void *user, const llm *m, size_t first, size_t rows) {
    chooser *c = user;
    const float *logits = m->logits;
    float draw, sum = 0;
    (void)first, (void)rows;
    c->chosen = 0;
    for (size_t i = 1; i < m->vocab; i++)
        if (logits[i] > logits[c->chosen]) c->chosen = (int32_t)i;
    if (c->temperature <= 0) return;
    nn_must(moe_softmax(1, m->vocab, (float)c->temperature, logits, c->prob));
    nn_must(moe_topk(1, m->vocab, m->vocab, c->prob, c->order, NULL));
    nn_must(moe_rand_uniform(c->seed, c->drawn++, 1, 0, 1, &draw));
    size_t kept = 0, i = 0;
    while (kept < m->vocab && (kept == 0 || sum < (float)c->top_p)) sum += c->prob[c->order[kept++]];
    for (draw *= sum; i + 1 < kept && draw >= c->prob[c->order[i]]; i++) draw -= c->prob[c->order[i]];
    c->chosen = c->order[i];
}
// Bytes a second that all threads together read from memory.
static void read_task(void *arg, size_t i, size_t worker) {
    const float *block = *(const float *const *)arg + i * (1 << 20);
    float lane[16] = {0};
    for (size_t k = 0; k < 1 << 20; k += 16)
        for (size_t j = 0; j < 16; j++) lane[j] += block[k + j];
    volatile float keep = lane[worker % 16];
    (void)keep;
}
static double read_bandwidth(llm *m) {
    size_t blocks = 64; // of 4 MB
    float *room = allocate(blocks << 20, sizeof *room);
    double best = 0;
    for (size_t i = 0; i < blocks << 20; i += 1024) room[i] = 1; // pages of its own
    for (int again = 0; again < 3; again++) {
        double begin = seconds_now();
        moe_run(&m->s.parallel, blocks, read_task, &room);
        double rate = (double)(blocks << 22) / (seconds_now() - begin);
        if (rate > best) best = rate;
    }
    free(room);
    return best;
}
static int is_end(const llm *m, int32_t id) {
    moe_json v, item = {0};
    double n;
    if (!js_get(&m->config.root, "eos_token_id", &v)) return 0;
    if (moe_json_number(&v, &n) == MOE_OK) return n == (double)id;
    while (v.kind == MOE_JSON_LIST && moe_json_next(&v, NULL, &item))
        if (moe_json_number(&item, &n) == MOE_OK && n == (double)id) return 1;
    return 0;
}
// Prints what a new token adds to the text; of half a character nothing.
static void print_text(const tokenizer *t, const token_list *ids, size_t *printed, FILE *human) {
    text_buffer b = tokenizer_decode(t, ids->id, ids->n, 1);
    size_t end = b.length;
    while (end >= 3 && memcmp(b.text + end - 3, "\xEF\xBF\xBD", 3) == 0) end -= 3;
    if (end > *printed) fwrite(b.text + *printed, 1, end - *printed, human);
    if (end > *printed) *printed = end;
    fflush(human);
    free(b.text);
}
// Writes n tokens on; returns them.
static token_list generate(llm *m, token_list *ids, size_t n, const tokenizer *t) {
    const options *o = m->o;
    chooser c = {t ? o->temperature : 0, o->top_p, o->seed, 0, allocate(m->vocab, 4), allocate(m->vocab, 4), 0};
    taker take = {NULL, choose, &c, 1};
    token_list made = {0};
    size_t prompt = ids->n, printed = 0;
    FILE *human = o->json ? stderr : stdout;
    double begin = seconds_now(), spent[2];
    if (t) print_text(t, ids, &printed, human);
    forward(m, ids->id, prompt, 0, &take);
    spent[0] = seconds_now() - begin;
    for (begin = seconds_now(); made.n < n; forward(m, ids->id + ids->n - 1, 1, ids->n - 1, &take)) {
        token_push(&made, c.chosen);
        token_push(ids, c.chosen);
        if (t && is_end(m, c.chosen)) break;
        if (t) print_text(t, ids, &printed, human);
        if (made.n == n) break;
    }
    spent[1] = seconds_now() - begin;
    free(c.order);
    free(c.prob);
    if (o->quiet) return made;
    double each = made.n > 1 ? spent[1] / (double)(made.n - 1) : 0, bytes = m->bytes_dense + m->bytes_expert;
    double reads = read_bandwidth(m);
    fprintf(stderr, "%sprompt: %zu tokens, %.1f/s; then %.2f tokens/s", t ? "\n" : "", prompt,
            (double)prompt / spent[0], each > 0 ? 1 / each : 0);
    fprintf(stderr, ", %.3f GB of weights a token, %.0f%% of the read bandwidth (%.1f GB/s)\n", bytes / 1e9,
            each > 0 ? 100 * bytes / each / reads : 0, reads / 1e9);
    return made;
}
static void print_ids(const options *o, const char *event, const token_list *ids) {
    json j = {{stdout}, 0};
    if (o->json) {
        json_begin(&j);
        if (event) json_text(&j, "event", event);
        json_list_begin(&j, "ids");
        for (size_t i = 0; i < ids->n; i++) json_whole(&j, NULL, (uint64_t)ids->id[i]);
        json_list_end(&j);
        json_end(&j);
    } else {
        for (size_t i = 0; i < ids->n; i++) printf("%s%d", i ? "," : "", (int)ids->id[i]);
        printf("\n");
    }
}

// ---- dumps ----

typedef struct dump {
    size_t tokens;
    float *logits, *router; // (T, vocab), (mixtures, T, E)
    int32_t *index;         // (mixtures, T, k)
} dump;
static void dump_layer(void *user, const llm *m, size_t mixture, size_t first, const moe_tape *tape) {
    dump *d = user;
    size_t at = mixture * d->tokens + first;
    memcpy(d->router + at * m->experts, tape->logits, tape->n_tokens * m->experts * sizeof(float));
    memcpy(d->index + at * m->slots, tape->index, tape->n_tokens * m->slots * sizeof(int32_t));
}
static void dump_rows(void *user, const llm *m, size_t first, size_t rows) {
    dump *d = user;
    memcpy(d->logits + first * m->vocab, m->logits, rows * m->vocab * sizeof(float));
}
static void write_npy(const char *prefix, const char *name, const char *type, const char *shape, const void *data,
                      size_t count) {
    char path[1024], text[128];
    snprintf(path, sizeof path, "%s.%s.npy", prefix, name);
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot write %s: %s", path, strerror(errno));
    int used = snprintf(text, sizeof text, "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", type, shape);
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f); // the header has 118 bytes
    fprintf(f, "%s%*s\n", text, 117 - used, "");
    fwrite(data, 4, count, f);
    close_output(f, path);
}
static void dump_run(llm *m, const token_list *ids) {
    size_t T = ids->n, M = m->mixtures;
    char shape[96];
    dump d = {T, allocate(T * m->vocab, 4), allocate(M * T * m->experts, 4), allocate(M * T * m->slots, 4)};
    taker take = {dump_layer, dump_rows, &d, 0};
    forward(m, ids->id, T, 0, &take);
    snprintf(shape, sizeof shape, "%zu, %zu", T, m->vocab);
    write_npy(m->o->dump, "logits", "<f4", shape, d.logits, T * m->vocab);
    snprintf(shape, sizeof shape, "%zu, %zu, %zu", M, T, m->experts);
    write_npy(m->o->dump, "router_logits", "<f4", shape, d.router, M * T * m->experts);
    snprintf(shape, sizeof shape, "%zu, %zu, %zu", M, T, m->slots);
    write_npy(m->o->dump, "experts", "<i4", shape, d.index, M * T * m->slots);
    free(d.logits);
    free(d.router);
    free(d.index);
}

// ---- perplexity ----

typedef struct reading {
    const int32_t *ids; // of the window
    size_t n, from;     // tokens of the window; the first that counts
    double nats;
    size_t counted;
} reading;
static void read_rows(void *user, const llm *m, size_t first, size_t rows) {
    reading *r = user;
    for (size_t i = 0; i < rows; i++) {
        size_t next = first + i + 1;
        const float *z = m->logits + i * m->vocab;
        double top = (double)z[0], sum = 0;
        if (next >= r->n || next < r->from) continue;
        for (size_t k = 1; k < m->vocab; k++) top = fmax(top, (double)z[k]);
        for (size_t k = 0; k < m->vocab; k++) sum += exp((double)z[k] - top);
        r->nats += top + log(sum) - (double)z[r->ids[next]];
        r->counted++;
    }
}
// Windows of `context` tokens, `stride` apart; of each only the tokens count that no window before it had.
static void perplexity(llm *m, const token_list *ids, size_t context, size_t stride) {
    reading r = {.from = 1};
    progress p = progress_begin("reading", "tokens", ids->n, m->o->quiet);
    for (size_t begin = 0, done = 1; done < ids->n; begin += stride) {
        r.ids = ids->id + begin;
        r.n = ids->n - begin < context ? ids->n - begin : context;
        r.from = done - begin;
        if (r.from >= r.n) continue;
        taker take = {NULL, read_rows, &r, 0};
        forward(m, r.ids, r.n, 0, &take);
        done = begin + r.n;
        progress_update(&p, done, "perplexity %.4f", exp(r.nats / (double)r.counted));
    }
    progress_clear(&p);
    double mean = r.nats / (double)(r.counted ? r.counted : 1);
    json j = {{m->o->json ? stdout : NULL}, 0};
    json_begin(&j);
    json_text(&j, "event", "final");
    json_whole(&j, "tokens", r.counted);
    json_whole(&j, "context", context);
    json_whole(&j, "stride", stride);
    json_real(&j, "nats", mean);
    json_real(&j, "perplexity", exp(mean));
    json_end(&j);
    fprintf(m->o->json ? stderr : stdout, "perplexity %.6f over %zu tokens (%.9f nats each)", exp(mean), r.counted,
            mean);
    fprintf(m->o->json ? stderr : stdout, ", windows of %zu, %zu apart\n", context, stride);
}

// ---- what the flags ask for ----

static token_list read_ids(const char *text) {
    token_list l = {0};
    for (char *end; *text; text = *end ? end + 1 : end) {
        long id = strtol(text, &end, 10);
        if (end == text || id < 0 || id > INT32_MAX || (*end && (*end != ',' || !end[1])))
            args_fail("llm", "--ids: '%s' is not a list of token ids", text);
        token_push(&l, (int32_t)id);
    }
    if (!l.n) args_fail("llm", "--ids: empty");
    return l;
}
static tokenizer *own_tokenizer(const options *o) {
    char *path = allocate(strlen(o->model) + 32, 1);
    sprintf(path, "%s/tokenizer.json", o->model);
    return tokenizer_open(path);
}
static void run_ids(llm *m, const options *o) {
    token_list ids = read_ids(o->ids);
    load_model(m, ids.n + o->greedy);
    if (o->dump) dump_run(m, &ids);
    if (!o->greedy && o->dump) return;
    token_list made = generate(m, &ids, o->greedy ? o->greedy : o->tokens, NULL);
    print_ids(o, "final", &made);
}
static void run_prompt(llm *m, const options *o) {
    const tokenizer *t = own_tokenizer(o);
    size_t bad = text_bad(o->prompt, strlen(o->prompt));
    if (bad < strlen(o->prompt)) args_fail("llm", "--prompt: byte %zu is not UTF-8", bad);
    token_list ids = tokenizer_encode(t, o->prompt, strlen(o->prompt), 1);
    if (!ids.n) args_fail("llm", "--prompt: no token to begin with");
    load_model(m, ids.n + o->tokens);
    token_list made = generate(m, &ids, o->tokens, t);
    if (o->json) print_ids(o, "final", &made);
}
static void run_text(llm *m, const options *o) {
    const tokenizer *t = own_tokenizer(o);
    size_t n, most = js_whole(&m->config, &m->config.root, "max_position_embeddings", 2048, 1, SIZE_MAX >> 12);
    const char *text = file_view(o->text, &n);
    if (!text) refuse(o->text, "cannot be read: %s", strerror(errno));
    if (text_bad(text, n) < n) refuse(o->text, "byte %zu is not UTF-8", text_bad(text, n));
    token_list ids = tokenizer_encode(t, text, n, o->special);
    if (ids.n < 2) refuse(o->text, "fewer than two tokens");
    size_t context = o->context ? o->context : most < 1024 ? most : 1024, stride = o->stride ? o->stride : context / 2;
    if (context < 2) context = 2;
    if (!stride || stride > context) args_fail("llm", "--stride: must be 1 to the context, %zu", context);
    load_model(m, context);
    perplexity(m, &ids, context, stride);
}
static void run_encode(const options *o) {
    size_t n = strlen(o->encode), bad = text_bad(o->encode, n);
    if (bad < n) args_fail("llm", "--encode: byte %zu is not UTF-8", bad);
    token_list ids = tokenizer_encode(own_tokenizer(o), o->encode, n, o->special);
    print_ids(o, NULL, &ids);
}
static void run_decode(const options *o) {
    token_list ids = read_ids(o->decode);
    text_buffer b = tokenizer_decode(own_tokenizer(o), ids.id, ids.n, 0);
    printf("%s\n", b.text);
}
static void check_options(options *o) {
    if (!nn_use_isa(o->isa)) args_fail("llm", "--isa: there is no '%s'", o->isa);
    while (moe_format_name(o->experts_format) && strcmp(o->format, moe_format_name(o->experts_format)) != 0)
        o->experts_format = (moe_format_kind)(o->experts_format + 1);
    if (!moe_format_name(o->experts_format))
        args_fail("llm", "--format: f32, bf16, int8 or int4, not '%s'", o->format);
    if (!o->model) {
        o->model = "examples/data/wikitext2";
        FILE *f = fopen("examples/data/wikitext2/config.json", "rb");
        if (!f) args_fail("llm", "--model DIR is missing, and this repository carries no checkpoint (%s)", o->model);
        fclose(f);
    }
    int asked = (o->prompt != NULL) + (o->text != NULL) + (o->ids != NULL) + (o->encode != NULL) + (o->decode != NULL);
    if (asked > 1) args_fail("llm", "one of --prompt, --text, --ids, --encode and --decode");
    if (o->dump && !o->ids) args_fail("llm", "--dump goes with --ids");
    if (!asked) o->prompt = "The ";
}

static void run(const options *o) {
    static llm m;
    if (o->encode)
        run_encode(o);
    else if (o->decode)
        run_decode(o);
    else {
        open_model(&m, o);
        if (o->ids)
            run_ids(&m, o);
        else if (o->text)
            run_text(&m, o);
        else
            run_prompt(&m, o);
    }
}

int main(int argc, char **argv) {
    options o = {.format = "f32", .isa = "auto", .tokens = 64, .batch = 128, .seed = 1, .top_p = 1};
    args_option table[] = {
        {"model", ARGS_TEXT, &o.model, "DIR", "config.json, safetensors, tokenizer.json", 0, 0},
        {"prompt", ARGS_TEXT, &o.prompt, "TEXT", "write on from here", 0, 0},
        {"tokens", ARGS_SIZE, &o.tokens, "N", "how many to write", 1, 1 << 24},
        {"temperature", ARGS_REAL, &o.temperature, "X", "of the drawing (0: the likeliest token)", 0, 1000},
        {"top-p", ARGS_REAL, &o.top_p, "X", "draw from the likeliest tokens of this share", 0, 1},
        {"text", ARGS_TEXT, &o.text, "FILE", "perplexity of a text", 0, 0},
        {"context", ARGS_SIZE, &o.context, "N", "tokens of a window (0: the model's, at most 1024)", 0, 1 << 24},
        {"stride", ARGS_SIZE, &o.stride, "N", "between windows (0: half a window)", 0, 1 << 24},
        {"ids", ARGS_TEXT, &o.ids, "I,J,..", "token ids instead of a prompt", 0, 0},
        {"greedy", ARGS_SIZE, &o.greedy, "N", "with --ids: so many of the likeliest", 0, 1 << 24},
        {"dump", ARGS_TEXT, &o.dump, "PREFIX", "with --ids: logits, router logits and experts as .npy", 0, 0},
        {"encode", ARGS_TEXT, &o.encode, "TEXT", "only its token ids", 0, 0},
        {"decode", ARGS_TEXT, &o.decode, "I,J,..", "only their text", 0, 0},
        {"special", ARGS_FLAG, &o.special, NULL, "special tokens around what --encode and --text read", 0, 0},
        {"batch", ARGS_SIZE, &o.batch, "N", "tokens of a prompt at a time; changes no bit", 1, 65536},
        {"format", ARGS_TEXT, &o.format, "NAME", "of the experts' weights: f32, bf16, int8, int4", 0, 0},
        ARGS_SEED(&o.seed),
        ARGS_THREADS(&o.threads),
        ARGS_ISA(&o.isa),
        ARGS_JSON(&o.json),
        ARGS_QUIET(&o.quiet)};
    args_parse("llm", "Runs a mixture-of-experts language model.", table, sizeof table / sizeof *table, argc, argv);
    check_options(&o);
    run(&o);
    return 0;
}
