// llm_model.h - a mixture-of-experts language model from its published folder: what build/llm runs, and the programs
// that look at its routing.
//
//     llm_options o = {.model = dir, .batch = 128};
//     llm *m = llm_open(&o);                          // folder and config
//     llm_load(m, positions);                         // all weights, and a cache of so many tokens
//     llm_forward(m, ids, n, 0, &(llm_taker){.rows = llm_nats_rows, .user = &nats});
//     llm_close(m);
//
// What differs between models is read from config and tensors here; the mixtures are moe.h's layers
// (moe_model_layer), the blocks around them transformer.h. Every fault names file and field and ends the program with
// status 2.
#ifndef EX_LLM_MODEL_H
#define EX_LLM_MODEL_H

#include "progress.h"
#include "record.h"
#include "tokenizer.h"
#include "transformer.h"

typedef struct llm_options {
    const char *model;           // the folder
    const char *record, *replay; // files: the routing of the run is kept there, or taken from there
    moe_format_kind experts;     // their format
    size_t batch, context, threads; // tokens of a prompt at a time; of a window of text (0: the model's, at most 1024)
    int alike;                   // every mixture must have as many experts
    int quiet;
} llm_options;

typedef struct llm {
    const llm_options *o;
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
    double seconds;                   // of loading
    record taken, given;              // the run's routing, with --record; that it has to take, with --replay
    size_t read;                      // tokens so far
} llm;

// ---- weights ----

EX_FUNC moe_status llm_file(void *user, const char *name, const void **bytes, size_t *size) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", (const char *)user, name);
    *bytes = file_view(path, size);
    return *bytes ? MOE_OK : MOE_E_OPEN;
}
EX_FUNC void llm_must(const llm *m, moe_status status, const char *what) {
    char path[1024];
    if (!status) return;
    snprintf(path, sizeof path, "%s/%s", m->o->model, *m->model.about ? m->model.about : what);
    int system = moe_status_kind(status) == MOE_KIND_IO && errno;
    refuse(path, "%s%s%s", moe_status_string(status), system ? ": " : "", system ? strerror(errno) : "");
}
EX_FUNC const char *llm_name(size_t layer, const char *name) {
    static char full[2][160];
    static int turn;
    turn = !turn;
    snprintf(full[turn], sizeof full[turn], "model.layers.%zu.%s", layer, name);
    return full[turn];
}
EX_FUNC int llm_has(llm *m, const char *name) {
    moe_file_tensor t;
    return moe_model_tensor(&m->model, name, &t) == MOE_OK;
}
// A tensor of these dimensions (cols 0: a vector).
EX_FUNC moe_file_tensor llm_tensor(llm *m, const char *name, size_t rows, size_t cols) {
    moe_file_tensor t;
    llm_must(m, moe_model_tensor(&m->model, name, &t), name);
    if (!cols && (t.n_dims != 1 || t.dim[0] != rows))
        refuse(m->o->model, "%s: its shape is not (%zu), as config.json asks", name, rows);
    if (cols && (t.n_dims != 2 || t.dim[0] != rows || t.dim[1] != cols))
        refuse(m->o->model, "%s: its shape is not (%zu, %zu), as config.json asks", name, rows, cols);
    return t;
}
EX_FUNC int llm_all_finite(size_t n, const float *x) {
    uint32_t top = 0, bits;
    for (size_t i = 0; i < n; i++) { // an exponent of ones, and one more, is the sign's bit
        memcpy(&bits, x + i, sizeof bits);
        top |= (bits & 0x7fffffff) + 0x00800000;
    }
    return top >> 31 == 0;
}
EX_FUNC void llm_finite(const llm *m, const char *name, size_t n, const float *x) {
    for (size_t i = 0; i < n; i++)
        if (!(x[i] - x[i] == 0)) refuse(m->o->model, "%s: element %zu is NaN or infinite", name, i);
}
static const float *llm_vector(llm *m, const char *name, size_t n) {
    float *v = nn_floats(&m->s, n);
    llm_tensor(m, name, n, 0);
    llm_must(m, moe_model_read(&m->model, name, 0, n, v), name);
    llm_finite(m, name, n, v);
    return v;
}
// (out, in) of the file in panels: a task packs 32 rows.
typedef struct llm_packing {
    llm *m;
    const char *name;
    moe_file_tensor from;
    size_t in, out;
    float *panels, *rows; // (workers, 32, in)
    int bad;              // a task found NaN or infinity
} llm_packing;
EX_FUNC void llm_pack_task(void *arg, size_t i, size_t worker) {
    static const moe_parallel alone = {.n_threads = 1};
    llm_packing *p = arg;
    moe_dtype_kind dtype = moe_dtype_of(p->from.dtype);
    size_t r = i * TF_PANEL, n = p->out - r < TF_PANEL ? p->out - r : TF_PANEL, at = r * p->in, count = n * p->in;
    float *rows = p->rows + worker * TF_PANEL * p->in;
    if (moe_to_float(dtype, count, p->from.data + at * moe_dtype_size(dtype), rows) != MOE_OK) // scaled: one thread
        llm_must(p->m, moe_model_read(&p->m->model, p->name, at, count, rows), p->name);
    if (!llm_all_finite(count, rows)) p->bad = 1;
    moe_gemm_args g = {.n = n, .k = p->in, .b = rows, .tb = 1, .parallel = &alone};
    nn_must(moe_gemm_pack(&g, p->panels + at));
}
EX_FUNC int llm_is_plain(moe_dtype_kind d) {
    return d == MOE_DTYPE_F32 || d == MOE_DTYPE_F16 || d == MOE_DTYPE_BF16 || d == MOE_DTYPE_F64;
}
EX_FUNC tf_linear llm_linear(llm *m, const char *name, size_t in, size_t out) {
    char bias[200], weight[200];
    moe_parallel alone = {.n_threads = 1}, *who = &m->s.parallel;
    snprintf(weight, sizeof weight, "%s.weight", name);
    snprintf(bias, sizeof bias, "%s.bias", name);
    llm_packing p = {.m = m, .name = weight, .from = llm_tensor(m, weight, out, in), .in = in, .out = out};
    if (!llm_is_plain(moe_dtype_of(p.from.dtype))) who = &alone;
    p.panels = nn_room(&m->s, tf_panels(out) * TF_PANEL * in);
    p.rows = allocate(moe_workers(who) * TF_PANEL * in, sizeof(float));
    moe_run(who, tf_panels(out), llm_pack_task, &p);
    free(p.rows);
    if (p.bad) refuse(m->o->model, "%s: NaN or infinite", weight);
    tf_linear l = {.in = in, .out = out, .panels = p.panels};
    if (llm_has(m, bias)) l.bias = llm_vector(m, bias, out);
    m->bytes_dense += (double)in * (double)out * sizeof(float);
    return l;
}

// config.json's rope_scaling (or rope_parameters), and by how much yarn scales the scores.
EX_FUNC tf_rope_args llm_rope(const llm *m, size_t dim, double *scores) {
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
EX_FUNC size_t llm_window(const llm *m, size_t layer) {
    const js_file *f = &m->config;
    char path[64], word[64];
    size_t size = js_whole(f, &f->root, "sliding_window", 0, 0, SIZE_MAX >> 12);
    if (!js_flag(f, &f->root, "use_sliding_window", strncmp(m->model.family, "qwen", 4) != 0)) return 0;
    snprintf(path, sizeof path, "layer_types.%zu", layer);
    return strcmp(js_word(f, &f->root, path, "sliding_attention", word), "sliding_attention") == 0 ? size : 0;
}
EX_FUNC void llm_load_attention(llm *m, size_t layer, tf_block *b, double scores) {
    const js_file *f = &m->config;
    const moe_json *c = &f->root;
    size_t d = m->d, heads = js_whole(f, c, "num_attention_heads", JS_MUST, 1, 65536);
    size_t kv = js_whole(f, c, "num_key_value_heads", heads, 1, heads), dim = b->rope->dim;
    moe_file_tensor t;
    if (heads % kv || (!js_get(c, "head_dim", &(moe_json){0}) && d % heads))
        refuse(f->path, "num_attention_heads: not a multiple of num_key_value_heads, or not a divisor of hidden_size");
    b->attention = (tf_attention){
        .heads = heads, .n_kv = kv, .k_dim = dim, .v_dim = dim, .window = llm_window(m, layer)};
    b->attention.scale = (float)js_above(f, c, "attention_multiplier", scores / sqrt((double)dim));
    b->clip = (float)js_real(f, c, "clip_qkv", 0);
    b->q = llm_linear(m, llm_name(layer, "self_attn.q_proj"), d, heads * dim);
    b->k = llm_linear(m, llm_name(layer, "self_attn.k_proj"), d, kv * dim);
    b->v = llm_linear(m, llm_name(layer, "self_attn.v_proj"), d, kv * dim);
    b->o = llm_linear(m, llm_name(layer, "self_attn.o_proj"), heads * dim, d);
    if (llm_has(m, llm_name(layer, "self_attn.sinks")))
        b->attention.sinks = llm_vector(m, llm_name(layer, "self_attn.sinks"), heads);
    if (moe_model_tensor(&m->model, llm_name(layer, "self_attn.q_norm.weight"), &t) != MOE_OK) return;
    b->norm_heads = t.n_dims == 1 && t.dim[0] == dim && heads > 1; // over each head, or over the whole projection
    b->q_norm = llm_vector(m, llm_name(layer, "self_attn.q_norm.weight"), b->norm_heads ? dim : heads * dim);
    b->k_norm = llm_vector(m, llm_name(layer, "self_attn.k_norm.weight"), b->norm_heads ? dim : kv * dim);
}
EX_FUNC void llm_load_latent(llm *m, size_t layer, tf_block *b, double scores) {
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
        l->q_down = llm_linear(m, llm_name(layer, "self_attn.q_a_proj"), d, q_rank);
        l->q_norm = llm_vector(m, llm_name(layer, "self_attn.q_a_layernorm.weight"), q_rank);
        from = q_rank;
    }
    b->q = llm_linear(m, llm_name(layer, q_rank ? "self_attn.q_b_proj" : "self_attn.q_proj"), from, heads * dim);
    l->kv_down = llm_linear(m, llm_name(layer, "self_attn.kv_a_proj_with_mqa"), d, l->rank + turned);
    l->kv_norm = llm_vector(m, llm_name(layer, "self_attn.kv_a_layernorm.weight"), l->rank);
    l->kv_up = llm_linear(m, llm_name(layer, "self_attn.kv_b_proj"), l->rank, heads * (plain + values));
    b->o = llm_linear(m, llm_name(layer, "self_attn.o_proj"), heads * values, d);
}
// Bytes of all experts, and how many other numbers the layer has.
EX_FUNC void llm_mixture_bytes(const moe_layer *layer, double *experts, double *others) {
    moe_tensor tensor;
    for (size_t e = 0; moe_layer_expert_bytes(layer, e); e++) *experts += (double)moe_layer_expert_bytes(layer, e);
    for (size_t i = 0; i < moe_layer_tensors(layer); i++) {
        nn_must(moe_layer_tensor(layer, i, &tensor));
        if (strncmp(tensor.name, "experts.", 8) != 0) *others += (double)tensor.count;
    }
}
EX_FUNC void llm_load_mixture(llm *m, size_t layer, tf_block *b) {
    moe_desc around = {0};
    around.parallel = m->s.parallel;
    moe_layer_formats formats = {.format = m->o->experts};
    const moe_layer_formats *stored = formats.format == MOE_FORMAT_F32 ? NULL : &formats;
    llm_must(m, moe_model_layer(&m->model, layer, &around, stored, &b->mixture), "mixture");
    const moe_desc *desc = moe_layer_desc(b->mixture);
    for (size_t l = 0; l < layer && !m->tape[layer]; l++)
        if (m->block[l].mixture && memcmp(moe_layer_desc(m->block[l].mixture), desc, sizeof *desc) == 0)
            m->tape[layer] = m->tape[l];
    if (!m->tape[layer]) nn_must(moe_tape_new(&m->tape[layer], desc, m->o->batch, MOE_OFF));
    m->tape[layer]->side.evaluate = 1;
    double active = (double)moe_layer_active_params(b->mixture), all = (double)moe_layer_params(b->mixture);
    double experts = 0, routers = 0; // a token reads the same share of the experts' bytes as of their weights
    llm_mixture_bytes(b->mixture, &experts, &routers);
    m->bytes_expert += routers * sizeof(float) + experts * (active - routers) / (all - routers);
    int kept = m->o->alike || m->o->record || m->o->replay;
    if (m->mixtures++ && (m->slots != m->tape[layer]->n_slots || m->experts != desc->n_experts) && kept)
        refuse(m->o->model, "layer %zu has another number of experts: no --dump, --record or --inspect", layer);
    m->slots = desc->top_k;
    m->experts = desc->n_experts;
}
EX_FUNC void llm_load_dense(llm *m, size_t layer, tf_block *b) {
    const js_file *f = &m->config;
    char word[64];
    size_t inner = js_whole(f, &f->root, "intermediate_size", JS_MUST, 1, 1 << 24);
    if (strcmp(js_word(f, &f->root, "hidden_act", "silu", word), "silu") != 0)
        refuse(f->path, "hidden_act: '%s' is not known here", word);
    b->gate = llm_linear(m, llm_name(layer, "mlp.gate_proj"), m->d, inner);
    b->up = llm_linear(m, llm_name(layer, "mlp.up_proj"), m->d, inner);
    b->down = llm_linear(m, llm_name(layer, "mlp.down_proj"), inner, m->d);
}
EX_FUNC void llm_load_layer(llm *m, size_t layer, double scores) {
    const js_file *f = &m->config;
    tf_block *b = &m->block[layer];
    b->d = m->d;
    b->eps = (float)js_above(f, &f->root, "rms_norm_eps", NAN);
    b->residual = (float)js_real(f, &f->root, "residual_multiplier", 1);
    b->rope = &m->rope;
    b->norm1 = llm_vector(m, llm_name(layer, "input_layernorm.weight"), m->d);
    b->norm2 = llm_vector(m, llm_name(layer, "post_attention_layernorm.weight"), m->d);
    if (m->rope.interleaved)
        llm_load_latent(m, layer, b, scores);
    else
        llm_load_attention(m, layer, b, scores);
    if (moe_model_mixture(&m->model, layer))
        llm_load_mixture(m, layer, b);
    else
        llm_load_dense(m, layer, b);
    m->cache[layer] = tf_cache_new(&m->s, m->positions, b->attention.n_kv, b->attention.k_dim, b->attention.v_dim);
}

// Folder, config and what does not belong to a layer.
EX_FUNC llm *llm_open(const llm_options *o) {
    static const char *const known[] = {"olmoe",       "mixtral",     "qwen2_moe", "qwen3_moe",
                                        "deepseek_v2", "deepseek_v3", "gpt_oss",   "granitemoe"};
    moe_model_source source = {llm_file, (void *)o->model, NULL, NULL};
    size_t i = 0, n = sizeof known / sizeof *known;
    llm *m = allocate(1, sizeof *m);
    m->o = o;
    m->s.parallel.n_threads = o->threads;
    snprintf(m->config_path, sizeof m->config_path, "%s/config.json", o->model);
    llm_must(m, moe_model_open(&m->model, &source), "");
    m->config = (js_file){m->config_path, m->model.config};
    while (i < n && strcmp(m->model.family, known[i]) != 0) i++;
    if (i == n) refuse(m->config_path, "model_type: the attention of '%s' is not known here", m->model.family);
    m->layers = m->model.n_layers;
    m->d = js_whole(&m->config, &m->config.root, "hidden_size", JS_MUST, 1, 1 << 20);
    m->vocab = js_whole(&m->config, &m->config.root, "vocab_size", JS_MUST, 1, 1 << 24);
    return m;
}
// Tokens of a window of text.
EX_FUNC size_t llm_window_of(const llm *m) {
    size_t most = js_whole(&m->config, &m->config.root, "max_position_embeddings", 2048, 1, SIZE_MAX >> 12);
    size_t context = m->o->context ? m->o->context : most < 1024 ? most : 1024;
    return context < 2 ? 2 : context;
}
EX_FUNC tokenizer *llm_tokenizer(const char *model) {
    char *path = allocate(strlen(model) + 32, 1);
    sprintf(path, "%s/tokenizer.json", model);
    return tokenizer_open(path);
}
EX_FUNC void llm_load(llm *m, size_t positions) {
    const js_file *f = &m->config;
    const moe_json *c = &f->root;
    progress p = progress_begin("loading", "layers", m->layers, m->o->quiet);
    int latent = strncmp(m->model.family, "deepseek", 8) == 0;
    size_t heads = js_whole(f, c, "num_attention_heads", JS_MUST, 1, 65536);
    size_t dim = latent ? js_whole(f, c, "qk_rope_head_dim", JS_MUST, 2, 65536) : m->d / heads;
    double scores = 1, begin = seconds_now();
    if (!latent) dim = js_whole(f, c, "head_dim", dim, 2, 65536);
    if (dim % 2 || !dim) refuse(f->path, "head_dim: must be even, not %zu", dim);
    m->positions = positions;
    m->block = allocate(m->layers, sizeof *m->block);
    m->cache = allocate(m->layers, sizeof *m->cache);
    m->tape = allocate(m->layers, sizeof *m->tape);
    tf_rope_args turns = llm_rope(m, dim, &scores);
    m->rope = tf_rope_new(&m->s, &turns, positions, latent);
    for (size_t l = 0; l < m->layers; l++) {
        llm_load_layer(m, l, scores);
        progress_update(&p, l + 1, "%.1f GB", (m->bytes_dense + m->bytes_expert) / 1e9);
    }
    progress_clear(&p);
    llm_tensor(m, "model.embed_tokens.weight", m->vocab, m->d);
    m->norm = (float *)llm_vector(m, "model.norm.weight", m->d);
    int tied = js_flag(f, c, "tie_word_embeddings", 0);
    m->head = llm_linear(m, tied ? "model.embed_tokens" : "lm_head", m->d, m->vocab);
    m->embedding = (float)js_real(f, c, "embedding_multiplier", 1);
    m->logits_scale = (float)js_above(f, c, "logits_scaling", 1);
    m->acts = tf_acts_new(&m->s, m->block, m->layers, m->o->batch);
    m->x = nn_floats(&m->s, m->o->batch * m->d);
    m->row = nn_floats(&m->s, m->o->batch * m->d);
    m->logits = nn_floats(&m->s, m->o->batch * m->vocab);
    m->seconds = seconds_now() - begin;
    m->taken = record_new(m->mixtures, m->experts, m->slots);
    if (m->o->replay) m->given = record_open(m->o->replay), record_check(&m->given, m->mixtures, m->experts, m->slots);
}
EX_FUNC void llm_close(llm *m) {
    if (m->o->record && m->read) record_save(&m->taken, m->o->record);
    if (m->o->replay && m->read < m->given.rows)
        refuse(m->o->replay, "ids: %zu tokens, and the run has only %zu", m->given.rows, m->read);
    for (size_t l = 0; l < m->layers; l++) {
        size_t first = 0;
        moe_layer_free(m->block[l].mixture);
        while (m->tape[first] != m->tape[l]) first++;
        if (first == l) moe_tape_free(m->tape[l]);
    }
    free(m->block), free(m->cache), free(m->tape);
    record_free(&m->taken), record_free(&m->given);
    nn_free(&m->s);
    moe_model_close(&m->model);
    free(m);
}

// ---- forward ----

// What a mixture did with a batch.
typedef struct llm_routed {
    const moe_layer *layer;
    size_t mixture, first, n; // tokens first .. first + n - 1
    const float *x, *logits;  // (n, d) what it read; (n, experts), NULL in a replay
    const int32_t *index;     // (n, slots)
} llm_routed;
// What becomes of each batch: NULL where nothing does.
typedef struct llm_taker {
    void (*layer)(void *user, const llm *m, const llm_routed *r);
    void (*rows)(void *user, const llm *m, size_t first, size_t rows); // m->logits
    void *user;
    int last; // logits of the last token only
} llm_taker;

// A block, its mixture's routing taken from the file that is replayed, or kept.
EX_FUNC void llm_forward_block(llm *m, size_t l, size_t mixture, const int32_t *ids, size_t n, size_t position,
                          const llm_taker *take, size_t first) {
    const tf_block *b = &m->block[l];
    const moe_tape *tape = m->acts.tape = m->tape[l];
    const record *given = b->mixture && m->o->replay ? &m->given : NULL;
    size_t at = given ? record_at(given, mixture, m->read) : 0;
    m->acts.index = given ? given->index + at : NULL;
    m->acts.weight = given ? given->weight + at : NULL;
    tf_block_forward(&m->s, b, &m->acts, 1, n, position, &m->cache[l], m->x, m->x);
    if (!b->mixture) return;
    llm_routed r = {b->mixture, mixture, first, n, m->acts.norm2, given ? NULL : tape->logits, m->acts.index};
    if (!given) r.index = tape->index;
    if (take->layer) take->layer(take->user, m, &r);
    if (m->o->record) record_add(&m->taken, n, ids, mixture, r.index, given ? m->acts.weight : tape->weight);
}
EX_FUNC void llm_forward_batch(llm *m, const int32_t *ids, size_t n, size_t position, const llm_taker *take,
                               size_t first) {
    size_t d = m->d, mixture = 0, rows = take->last ? 1 : n;
    for (size_t t = 0; t < n; t++) {
        if (ids[t] < 0 || (size_t)ids[t] >= m->vocab)
            refuse(m->config_path, "vocab_size: there is no token %d below %zu", (int)ids[t], m->vocab);
        llm_must(m, moe_model_read(&m->model, "model.embed_tokens.weight", (size_t)ids[t] * d, d, m->x + t * d),
                 "embed");
    }
    llm_finite(m, "model.embed_tokens.weight", n * d, m->x);
    for (size_t i = 0; i < n * d; i++) m->x[i] *= m->embedding;
    if (m->o->replay) record_rows(&m->given, m->read, n, ids);
    for (size_t l = 0; l < m->layers; l++) {
        llm_forward_block(m, l, mixture, ids, n, position, take, first);
        mixture += m->block[l].mixture != NULL;
    }
    m->read += n;
    if (!rows || !take->rows) return;
    tf_norm(rows, d, m->block[0].eps, m->x + (n - rows) * d, m->norm, m->row);
    tf_linear_forward(&m->s.parallel, &m->head, rows, m->row, m->logits);
    for (size_t i = 0; i < rows * m->vocab; i++) m->logits[i] /= m->logits_scale;
    take->rows(take->user, m, first + n - rows, rows);
}
// n tokens that stand at `position` and on, a batch at a time.
EX_FUNC void llm_forward(llm *m, const int32_t *ids, size_t n, size_t position, const llm_taker *take) {
    for (size_t i = 0, count; i < n; i += count) {
        llm_taker now = *take;
        count = n - i < m->o->batch ? n - i : m->o->batch;
        if (take->last && i + count < n) now.rows = NULL;
        llm_forward_batch(m, ids + i, count, position + i, &now, i);
    }
}

typedef struct llm_nats {
    const int32_t *ids; // of the window
    size_t n, from;     // tokens of the window; the first that counts
    double sum;
    size_t counted;
} llm_nats;
EX_FUNC void llm_nats_rows(void *user, const llm *m, size_t first, size_t rows) {
    llm_nats *r = user;
    for (size_t i = 0; i < rows; i++) {
        size_t next = first + i + 1;
        const float *z = m->logits + i * m->vocab;
        double top = (double)z[0], sum = 0;
        if (next >= r->n || next < r->from) continue;
        for (size_t k = 1; k < m->vocab; k++) top = fmax(top, (double)z[k]);
        for (size_t k = 0; k < m->vocab; k++) sum += exp((double)z[k] - top);
        r->sum += top + log(sum) - (double)z[r->ids[next]];
        r->counted++;
    }
}

#endif
