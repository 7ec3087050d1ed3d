// checkpoint.h - a language model as a folder in OLMoE's public layout (config.json, model.safetensors,
// tokenizer.json), which the usual Python tools load; and the state of a training, from which it goes on with the same
// bits.
//
//     checkpoint_save(m, bpe, 0, "out/wikitext2");               // the model
//     checkpoint_state_save(m, config, curves, bytes, "out/wikitext2"); // what --resume reads: training.state
//
// Every file is the old one or the new one, whole (whole.h). The state holds everything by itself: parameters, moments,
// layers, curves.
#ifndef EX_CHECKPOINT_H
#define EX_CHECKPOINT_H

#include "bpe.h"
#include "language.h"
#include "whole.h"

// ---- the model ----

// A tensor of the file: rows x cols as they stand, or a (cols, rows) array that is written transposed. A vector has
// cols 0.
typedef struct checkpoint_tensor {
    char name[96];
    size_t rows, cols;
    const float *from;
    float *to; // reading; else NULL
    int transposed;
} checkpoint_tensor;

typedef struct checkpoint_list {
    checkpoint_tensor *tensor;
    size_t n, room;
    float *experts[LM_MAX_LAYERS]; // router (d, E); then w1, wu (E, d, f), w2 (E, f, d)
} checkpoint_list;

EX_PRINTF(6, 7) EX_FUNC void checkpoint_add(checkpoint_list *l, float *at, size_t rows, size_t cols, int transposed,
                                            const char *format, ...) {
    l->tensor = bpe_more(l->tensor, &l->room, l->n + 1, sizeof *l->tensor);
    checkpoint_tensor *t = &l->tensor[l->n++];
    va_list args;
    va_start(args, format);
    vsnprintf(t->name, sizeof t->name, format, args);
    va_end(args);
    t->from = t->to = at;
    t->rows = rows;
    t->cols = cols;
    t->transposed = transposed;
}

// The tensors of a layer's mixture, which stand in an array of ours.
EX_FUNC void checkpoint_mixture(checkpoint_list *l, const lm *m, size_t i) {
    const moe_desc *desc = moe_layer_desc(m->layer[i].moe);
    size_t d = m->shape.d, E = desc->n_experts, f = desc->d_ff;
    float *at = l->experts[i];
    if (E > 1) checkpoint_add(l, at, E, d, 1, "model.layers.%zu.mlp.gate.weight", i);
    else checkpoint_add(l, at, E, d, 0, "model.layers.%zu.mlp.gate.weight", i); // zeros
    at += d * E;
    for (size_t e = 0; e < E; e++) {
        static const char *const name[] = {"gate_proj", "up_proj", "down_proj"};
        for (size_t k = 0; k < 3; k++)
            checkpoint_add(l, at + (k * E + e) * d * f, k < 2 ? f : d, k < 2 ? d : f, 1,
                           "model.layers.%zu.mlp.experts.%zu.%s.weight", i, e, name[k]);
    }
}
EX_FUNC void checkpoint_get_mixture(const lm *m, size_t i, float *at, int back) {
    const moe_desc *desc = moe_layer_desc(m->layer[i].moe);
    size_t router = m->shape.d * desc->n_experts, matrices = desc->n_experts * m->shape.d * desc->d_ff;
    const char *const name[] = {"router", "experts.w1", "experts.wu", "experts.w2"};
    for (size_t k = desc->n_experts == 1; k < 4; k++) {
        float *tensor = at + (k ? router + (k - 1) * matrices : 0);
        size_t count = k ? matrices : router;
        nn_must(back ? moe_layer_set(m->layer[i].moe, MOE_PART_PARAMS, name[k], tensor, count)
                     : moe_layer_get(m->layer[i].moe, MOE_PART_PARAMS, name[k], tensor, count));
    }
}

// All tensors, in the order of the layers.
EX_FUNC checkpoint_list checkpoint_tensors(const lm *m) {
    checkpoint_list l = {.n = 0};
    size_t d = m->shape.d;
    float *w = m->bank.value;
    checkpoint_add(&l, w + m->embed, m->shape.vocab, d, 0, "model.embed_tokens.weight");
    for (size_t i = 0; i < m->shape.layers; i++) {
        static const char *const name[] = {"q_proj", "k_proj", "v_proj"};
        const lm_layer *layer = &m->layer[i];
        const moe_desc *desc = moe_layer_desc(layer->moe);
        l.experts[i] = allocate(d * desc->n_experts * (1 + 3 * desc->d_ff), sizeof(float));
        checkpoint_add(&l, w + layer->norm1, d, 0, 0, "model.layers.%zu.input_layernorm.weight", i);
        for (size_t k = 0; k < 3; k++)
            checkpoint_add(&l, w + layer->qkv + k * d * d, d, d, 0, "model.layers.%zu.self_attn.%s.weight", i, name[k]);
        checkpoint_add(&l, w + layer->out, d, d, 0, "model.layers.%zu.self_attn.o_proj.weight", i);
        for (size_t k = 0; k < 2; k++)
            checkpoint_add(&l, w + layer->query + k * d, d, 0, 0, "model.layers.%zu.self_attn.%c_norm.weight", i,
                           k ? 'k' : 'q');
        checkpoint_add(&l, w + layer->norm2, d, 0, 0, "model.layers.%zu.post_attention_layernorm.weight", i);
        checkpoint_mixture(&l, m, i);
    }
    checkpoint_add(&l, w + m->norm, d, 0, 0, "model.norm.weight");
    if (!m->shape.tied) checkpoint_add(&l, w + m->head, m->shape.vocab, d, 0, "lm_head.weight");
    return l;
}
EX_FUNC void checkpoint_free(checkpoint_list *l) {
    for (int i = 0; i < LM_MAX_LAYERS; i++) free(l->experts[i]);
    free(l->tensor);
}

// Can OLMoE's forward say what this layer does? Its router is linear, softmax, top-k, and nothing else.
EX_FUNC int checkpoint_fits(const moe_desc *d) {
    int gate = d->gate == MOE_GATE_SOFTMAX || d->gate == MOE_GATE_SOFTMAX_SELECTED;
    if (d->n_experts == 1) gate = 1;
    return gate && d->score == MOE_SCORE_LINEAR && d->select == MOE_SELECT_TOP_K && d->expert == MOE_EXPERT_SWIGLU &&
           d->combine == MOE_COMBINE_SUM && d->controller == MOE_CONTROL_NONE && !d->n_shared && !d->n_zero &&
           !d->n_copy && !d->n_constant && d->bias != MOE_ON && d->router_bias != MOE_ON && d->residual != MOE_ON &&
           d->expert_norm != MOE_ON && d->route_sequence != MOE_ON && d->learn_temperature != MOE_ON && !d->n_codes &&
           d->temperature == 1 && d->weight_scale == 1 && d->input_scale == 1 && d->capacity_factor_eval <= 0 &&
           d->threshold <= 0;
}

EX_FUNC void checkpoint_config(const lm *m, int32_t end, int bf16, FILE *f) {
    const lm_shape *s = &m->shape;
    const moe_desc *d = moe_layer_desc(m->layer[0].moe);
    int share = d->gate == MOE_GATE_SOFTMAX_SELECTED || d->normalize == MOE_ON || d->n_experts == 1;
    fprintf(f,
            "{\n  \"architectures\": [\n    \"OlmoeForCausalLM\"\n  ],\n  \"attention_bias\": false,\n"
            "  \"attention_dropout\": 0.0,\n  \"bos_token_id\": %d,\n  \"clip_qkv\": null,\n  \"eos_token_id\": %d,\n"
            "  \"hidden_act\": \"silu\",\n  \"hidden_size\": %zu,\n  \"initializer_range\": 0.02,\n"
            "  \"intermediate_size\": %zu,\n  \"max_position_embeddings\": %zu,\n  \"model_type\": \"olmoe\",\n"
            "  \"norm_topk_prob\": %s,\n",
            (int)end, (int)end, s->d, d->d_ff, s->length, share ? "true" : "false");
    if (d->gate == MOE_GATE_SOFTMAX_SELECTED && d->n_experts > 1) // norm_topk_prob's function in other bits
        fprintf(f, "  \"moe_gate\": \"%s\",\n", moe_gate_name(d->gate));
    fprintf(f,
            "  \"num_attention_heads\": %zu,\n  \"num_experts\": %zu,\n  \"num_experts_per_tok\": %zu,\n"
            "  \"num_hidden_layers\": %zu,\n  \"num_key_value_heads\": %zu,\n  \"output_router_logits\": false,\n"
            "  \"pad_token_id\": null,\n  \"rms_norm_eps\": %g,\n  \"rope_scaling\": null,\n  \"rope_theta\": %.1f,\n"
            "  \"router_aux_loss_coef\": %g,\n  \"tie_word_embeddings\": %s,\n  \"torch_dtype\": \"%s\",\n"
            "  \"use_cache\": true,\n  \"vocab_size\": %zu\n}\n",
            s->heads, d->n_experts, d->top_k, s->layers, s->heads, s->epsilon, s->theta,
            (double)d->loss[MOE_LOSS_SWITCH], s->tied ? "true" : "false", bf16 ? "bfloat16" : "float32", s->vocab);
}

EX_FUNC void checkpoint_header(checkpoint_list *l, int bf16, whole_file *f) {
    size_t at = 0, n = 0, room = 0;
    char *text = NULL;
    for (size_t i = 0; i < l->n; i++) {
        const checkpoint_tensor *t = &l->tensor[i];
        size_t bytes = t->rows * (t->cols ? t->cols : 1) * (bf16 ? 2 : sizeof(float));
        char shape[48];
        snprintf(shape, sizeof shape, t->cols ? "%zu,%zu" : "%zu", t->rows, t->cols);
        text = bpe_more(text, &room, n + 300, 1);
        n += (size_t)snprintf(text + n, 300, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                              i ? "," : "{\"__metadata__\":{\"format\":\"pt\"},", t->name, bf16 ? "BF16" : "F32", shape,
                              at, at + bytes);
        at += bytes;
    }
    text = bpe_more(text, &room, n + 16, 1);
    text[n++] = '}';
    while (n % 8) text[n++] = ' ';
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)n >> 8 * i);
    whole_put(f, length, 8);
    whole_put(f, text, n);
    free(text);
}

// rows of a tensor as the file has them; the same way back with `read`
EX_FUNC void checkpoint_row(const checkpoint_tensor *t, size_t r, float *row, int read) {
    size_t cols = t->cols ? t->cols : 1;
    for (size_t c = 0; c < cols; c++) {
        size_t at = t->transposed ? c * t->rows + r : r * cols + c;
        if (read) t->to[at] = row[c];
        else row[c] = t->from[at];
    }
}

// Numbers in place to bfloat16, the nearest, of two as near the even one; returns the bytes that they take.
EX_FUNC size_t checkpoint_halve(float *row, size_t n) {
    unsigned char *to = (unsigned char *)row;
    for (size_t i = 0; i < n; i++, to += 2) {
        uint32_t bits;
        memcpy(&bits, row + i, sizeof bits);
        uint16_t half = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        memcpy(to, &half, sizeof half);
    }
    return 2 * n;
}

// Little-endian machines, as all that this runs on. bf16: half the bytes, each number rounded.
EX_FUNC void checkpoint_save(const lm *m, const bpe *b, int bf16, const char *dir) {
    checkpoint_list l = checkpoint_tensors(m);
    float *row = allocate(m->shape.d + moe_layer_desc(m->layer[0].moe)->d_ff, sizeof *row);
    for (size_t i = 0; i < m->shape.layers; i++) checkpoint_get_mixture(m, i, l.experts[i], 0);
    whole_file f = whole_begin(dir, "model.safetensors");
    checkpoint_header(&l, bf16, &f);
    for (size_t i = 0; i < l.n; i++)
        for (size_t r = 0; r < l.tensor[i].rows; r++) {
            size_t cols = l.tensor[i].cols ? l.tensor[i].cols : 1, bytes = cols * sizeof *row;
            checkpoint_row(&l.tensor[i], r, row, 0);
            if (bf16) bytes = checkpoint_halve(row, cols);
            whole_put(&f, row, bytes);
        }
    whole_end(&f);
    f = whole_begin(dir, "config.json");
    checkpoint_config(m, (int32_t)m->shape.vocab - 1, bf16, f.file);
    whole_end(&f);
    if (b) {
        f = whole_begin(dir, "tokenizer.json");
        bpe_write(f.file, b);
        whole_end(&f);
    }
    free(row);
    checkpoint_free(&l);
}

// The weights of such a folder into a model of the same shape.
EX_FUNC void checkpoint_load(lm *m, const char *dir) {
    char path[1024];
    size_t size = 0;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    const void *bytes = file_view(path, &size);
    moe_file file;
    if (!bytes) refuse(path, "cannot be read: %s", strerror(errno));
    nn_must(moe_file_open(&file, bytes, size));
    checkpoint_list l = checkpoint_tensors(m);
    for (size_t i = 0; i < l.n; i++) {
        const checkpoint_tensor *t = &l.tensor[i];
        size_t cols = t->cols ? t->cols : 1;
        moe_file_tensor from;
        if (moe_file_find(&file, t->name, &from) != MOE_OK) refuse(path, "has no tensor %s", t->name);
        if (from.bytes != t->rows * cols * sizeof(float) || strcmp(from.dtype, "F32") != 0)
            refuse(path, "%s is not of %zu x %zu float32", t->name, t->rows, cols);
        float *row = allocate(cols, sizeof *row);
        for (size_t r = 0; r < t->rows; r++) {
            memcpy(row, from.data + r * cols * sizeof *row, cols * sizeof *row);
            checkpoint_row(t, r, row, 1);
        }
        free(row);
    }
    for (size_t i = 0; i < m->shape.layers; i++) checkpoint_get_mixture(m, i, l.experts[i], 1);
    checkpoint_free(&l);
    moe_file_close(&file);
}

// ---- the state of a training ----

// A file of blocks, a length and bytes each; the last is the hash of all before it.
typedef struct checkpoint_writer {
    whole_file file;
    uint64_t hash;
} checkpoint_writer;
EX_FUNC void checkpoint_block(checkpoint_writer *w, const void *bytes, size_t n) {
    uint64_t length = n;
    whole_put(&w->file, &length, sizeof length);
    whole_put(&w->file, bytes, n);
    w->hash = moe_hash(moe_hash(w->hash, &length, sizeof length), bytes, n);
}

typedef struct checkpoint_reader {
    const char *path;
    const unsigned char *at, *end;
    uint64_t hash; // of what was read, as checkpoint_block has it
} checkpoint_reader;
EX_FUNC const void *checkpoint_next(checkpoint_reader *r, size_t *n) {
    uint64_t length = 0;
    if ((size_t)(r->end - r->at) >= sizeof length) memcpy(&length, r->at, sizeof length);
    if ((size_t)(r->end - r->at) < sizeof length || length > (size_t)(r->end - r->at) - sizeof length)
        refuse(r->path, "ends too early");
    const unsigned char *bytes = r->at + sizeof length;
    r->at = bytes + length;
    r->hash = moe_hash(moe_hash(r->hash, &length, sizeof length), bytes, (size_t)length);
    *n = (size_t)length;
    return bytes;
}
EX_FUNC void checkpoint_take(checkpoint_reader *r, void *to, size_t n) {
    size_t has;
    const void *bytes = checkpoint_next(r, &has);
    if (has != n) refuse(r->path, "is of another model");
    memcpy(to, bytes, n);
}

static const char checkpoint_mark[] = "moe language model, training state 1\n";

// config: what has to be the same to go on; curves: whatever the program wants to have back.
EX_FUNC void checkpoint_state_save(const lm *m, const char *config, const void *curves, size_t bytes, const char *dir) {
    const nn_bank *b = &m->bank;
    checkpoint_writer f = {whole_begin(dir, "training.state"), 1};
    checkpoint_block(&f, checkpoint_mark, sizeof checkpoint_mark);
    checkpoint_block(&f, config, strlen(config));
    checkpoint_block(&f, &m->steps, sizeof m->steps);
    checkpoint_block(&f, curves, bytes);
    checkpoint_block(&f, b->value, b->count * sizeof(float));
    checkpoint_block(&f, b->moment1, b->count * sizeof(float));
    checkpoint_block(&f, b->moment2, b->count * sizeof(float));
    checkpoint_block(&f, m->muon.momentum, m->muon.n_momentum * sizeof(float));
    for (size_t i = 0; i < m->shape.layers; i++) {
        size_t size = 0;
        nn_must(moe_layer_save_size(m->layer[i].moe, 1, &size));
        void *bytes_of = allocate(1, size);
        nn_must(moe_layer_save_memory(m->layer[i].moe, 1, bytes_of, size));
        checkpoint_block(&f, bytes_of, size);
        free(bytes_of);
    }
    uint64_t hash = f.hash;
    checkpoint_block(&f, &hash, sizeof hash);
    whole_end(&f.file);
}

EX_FUNC void checkpoint_state_load(lm *m, const char *config, void *curves, size_t bytes, const char *dir) {
    char path[1024];
    size_t size = 0, n;
    nn_bank *b = &m->bank;
    snprintf(path, sizeof path, "%s/training.state", dir);
    const unsigned char *all = file_view(path, &size);
    checkpoint_reader r = {path, all, all + size, 1};
    if (!all) refuse(path, "cannot be read to go on from: %s", strerror(errno));
    const void *mark = checkpoint_next(&r, &n);
    if (n != sizeof checkpoint_mark || memcmp(mark, checkpoint_mark, n) != 0) refuse(path, "is no state of a training");
    const char *was = checkpoint_next(&r, &n);
    if (n != strlen(config) || memcmp(was, config, n) != 0)
        refuse(path, "is of another training:\n  it:   %.*s\n  this: %s", (int)n, was, config);
    checkpoint_take(&r, &m->steps, sizeof m->steps);
    checkpoint_take(&r, curves, bytes);
    checkpoint_take(&r, b->value, b->count * sizeof(float));
    checkpoint_take(&r, b->moment1, b->count * sizeof(float));
    checkpoint_take(&r, b->moment2, b->count * sizeof(float));
    checkpoint_take(&r, m->muon.momentum, m->muon.n_momentum * sizeof(float));
    for (size_t i = 0; i < m->shape.layers; i++) {
        const void *layer = checkpoint_next(&r, &n);
        moe_desc around = *moe_layer_desc(m->layer[i].moe);
        moe_layer_free(m->layer[i].moe);
        nn_must(moe_layer_load_memory(&m->layer[i].moe, layer, n, &around));
    }
    uint64_t hash = r.hash, kept = 0;
    checkpoint_take(&r, &kept, sizeof kept);
    if (kept != hash) refuse(path, "is damaged");
}

#endif
